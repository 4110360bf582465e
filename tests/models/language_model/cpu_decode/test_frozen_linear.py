"""Frozen linear layers whose weights are widened a block at a time: outputs and gradients against float32's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.run import native_bf16
from models.language_model.cpu_decode import FrozenLinear, frozen_linear, many_rows
from models.language_model.hf_patch import recompute_blocks, use_our_scan
from models.language_model.mamba_lm import MambaLM
from tests.models.language_model.tiny import byte_tokenizer, random_mamba


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """A CPU without instructions for half precision, several blocks in a small layer; every block that is widened."""
    widened, real = [], frozen_linear.widen

    def widen(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        widened.append((weight.numel(), dtype))
        return real(weight, scale, dtype)

    monkeypatch.setattr(frozen_linear, "is_native", lambda dtype: dtype not in frozen_linear._NATIVE)
    monkeypatch.setattr(frozen_linear, "BLOCK", {"cpu": 150, "other": 150})
    monkeypatch.setattr(frozen_linear, "gemm", None)  # test_gemm.py
    monkeypatch.setattr(frozen_linear, "widen", widen)
    return widened


def layer(dtype: torch.dtype, *, bias: bool = True) -> FrozenLinear:
    torch.manual_seed(0)
    return FrozenLinear(50, 37, bias=bias, dtype=dtype).requires_grad_(False)


def rounded_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(20, 50), (2, 30, 50), (0, 50)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_the_float32_product_rounded_once(emulated, dtype, shape, bias) -> None:
    frozen, x = layer(dtype, bias=bias), torch.randn(shape).to(dtype)
    out, expected = frozen(x), rounded_once(x, frozen.weight, frozen.bias)
    assert out.dtype is dtype and out.shape == (*shape[:-1], 37)
    # Sums in another order may fall on the other side of a rounding: one unit of the last place, seldom.
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert x.numel() == 0 or (out == expected).float().mean() > 0.95
    sizes, kinds = zip(*emulated, strict=True)
    assert sum(sizes) == frozen.weight.numel() and max(sizes) <= 150 and set(kinds) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(20, 50), (2, 30, 50), (3, 1, 50)])
def test_gradients_to_the_inputs_are_float32s_rounded_once(emulated, dtype, shape) -> None:
    frozen = layer(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    exact = x.detach().float().requires_grad_()
    grad = torch.randn(*shape[:-1], 37).to(dtype)
    frozen(x).backward(grad)
    F.linear(exact, frozen.weight.float(), frozen.bias.float()).backward(grad.float())
    assert x.grad.dtype is dtype
    torch.testing.assert_close(x.grad, exact.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert sum(size for size, _ in emulated) == 2 * frozen.weight.numel()  # forward and backward, each once
    assert frozen.weight.grad is None and frozen.bias.grad is None


def test_nothing_widened_is_kept_for_the_backward_pass(emulated) -> None:
    frozen, kept = layer(torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen(torch.randn(20, 50).bfloat16().requires_grad_())
    assert emulated and {t.data_ptr() for t in kept} == {frozen.weight.data_ptr()}


def test_pytorch_computes_what_is_native_or_trained(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 50).bfloat16()
    trained = layer(torch.bfloat16).requires_grad_(True)
    trained(x).float().sum().backward()
    torch.testing.assert_close(trained.weight.grad, x.sum(0).expand(37, 50), rtol=2e-2, atol=2e-2)
    layer(torch.float32)(x.float())
    layer(torch.float64)(x.double())
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.bfloat16)(x.float())
    monkeypatch.setattr(frozen_linear, "is_native", lambda _: True)
    layer(torch.bfloat16)(x)
    assert not emulated


def test_autocast_multiplies_as_it_would_without_us(emulated) -> None:
    frozen, x = layer(torch.bfloat16), torch.randn(20, 50, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = frozen(x), F.linear(x, frozen.weight, frozen.bias)
    assert emulated and out.dtype is plain.dtype is torch.bfloat16
    torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)
    out.float().sum().backward()
    assert x.grad.dtype is torch.float32
    torch.testing.assert_close(x.grad, frozen.weight.float().sum(0).expand(20, 50), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_bfloat16_model_gives_the_loss_and_gradients_of_float32(emulated, recompute: bool) -> None:
    """Reading a prompt, the loss of an answer, and its gradient at the visual tokens."""
    model = random_mamba(vocab_size=264, hidden_size=48, num_hidden_layers=2).bfloat16()
    for mixer in (block.mixer for block in model.backbone.layers):
        mixer.A_log.data, mixer.D.data = mixer.A_log.data.float(), mixer.D.data.float()
    plain = random_mamba(hidden_size=48, num_hidden_layers=2)
    lm, exact = (MambaLM(one, byte_tokenizer(), "random") for one in (model, plain))
    exact.model.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    embeds, labels = torch.randn(2, 40, 48).bfloat16(), torch.randint(1, 250, (2, 40))
    found = {}
    for kind in (lm, exact):
        recompute_blocks(kind.model, recompute)
        inputs = embeds.detach().to(kind.model.dtype).requires_grad_()
        loss, count = kind.answer_loss(inputs, labels)
        (loss / count).backward()
        found[kind] = loss / count, inputs.grad.float(), kind.prefill(inputs.detach())[0].float()
    for got, expected in zip(found[lm], found[exact], strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2 * float(expected.abs().max()))
    assert {kind for _, kind in emulated} == {torch.float32}


def test_the_projection_of_delta_is_widened_too(emulated) -> None:
    model = random_mamba(num_hidden_layers=1).bfloat16()
    use_our_scan(model.requires_grad_(False))
    mixer, seen = model.backbone.layers[0].mixer, []
    weights = {id(part.weight): name for name, part in mixer.named_modules() if isinstance(part, nn.Linear)}
    apply = frozen_linear.WidenedProduct.apply
    frozen_linear.WidenedProduct.apply = lambda x, weight, *rest: (
        seen.append(weights[id(weight)]) or apply(x, weight, *rest)
    )
    try:
        mixer(torch.randn(1, 20, 32).bfloat16())
    finally:
        del frozen_linear.WidenedProduct.apply
    assert seen == ["in_proj", "x_proj", "dt_proj", "out_proj"]


@pytest.mark.parametrize(("flags", "native"), [((), False), (("avx512_bf16",), True), (("amx_bf16",), True)])
def test_what_the_processor_reports_decides(flags, native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, **dict.fromkeys(flags, True)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    frozen_linear.is_native.cache_clear()
    try:
        assert frozen_linear.is_native(torch.bfloat16) is native is native_bf16()
        assert frozen_linear.is_native(torch.float32) and not frozen_linear.is_native(torch.float16)
        x, weight = torch.randn(9, 20).bfloat16(), torch.randn(5, 20).bfloat16()
        torch.testing.assert_close(many_rows(x, weight), F.linear(x, weight), rtol=2e-2, atol=2e-2)
    finally:
        frozen_linear.is_native.cache_clear()
