"""Int8 weights of our own: layers against the dequantised reference, decoding, quality, what must not be mixed."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.errors import InputError
from models.language_model import cpu_decode, loading, quantisation
from models.language_model.cpu_decode import frozen_linear
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixIdentity, PrefixState
from models.language_model.quantisation import Int8Head, Int8Linear, quantisation_quality, quantise_int8, quantise_rows
from tests.models.language_model.tiny import byte_tokenizer, random_mamba


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds with our compiled products and, as on a machine without numba, without them."""
    if request.param:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(frozen_linear, "few_rows", lambda *_: False)
        monkeypatch.setattr(frozen_linear, "gemm", None)
        monkeypatch.setattr(cpu_decode, "step", lambda *_: None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and a last one that is not full, also in a small layer."""
    monkeypatch.setattr(frozen_linear, "BLOCK", {"cpu": 150, "other": 150})


def layer(outputs: int = 37, inputs: int = 50, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def reference(narrow: Int8Linear, x: Tensor) -> Tensor:
    bias = None if narrow.bias is None else narrow.bias.float()
    return F.linear(x.float(), narrow.weight.float() * narrow.scale[:, None], bias)


def make_lm(dtype: torch.dtype = torch.float32) -> MambaLM:
    model = random_mamba(vocab_size=264, hidden_size=48, tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)  # logits that differ
    return MambaLM(model.to(dtype), byte_tokenizer(), "random")


def int8_twin(lm: MambaLM) -> MambaLM:
    twin = copy.deepcopy(lm)
    quantise_int8(twin.model)
    return twin


@pytest.fixture
def folder(tmp_path: Path) -> str:
    lm = make_lm()
    lm.model.save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


# ------------------------------------------------------------------ the layer


@pytest.mark.usefixtures("small_blocks")
def test_no_weight_moves_by_more_than_half_a_step() -> None:
    weight = layer().weight * torch.logspace(-20, 20, 37)[:, None]
    weight[3], weight[4] = 0, 0
    weight[4, 7] = -5
    whole, scale = quantise_rows(weight)
    assert whole.dtype is torch.int8 and whole.abs().max() == 127 and not (whole == -128).any()
    assert scale.dtype is torch.float32 and scale[3] == 0 and whole[3].abs().max() == 0
    assert whole[4, 7] == -127 and scale[4] == pytest.approx(5 / 127)
    torch.testing.assert_close(scale, weight.abs().amax(1) / 127)
    assert ((whole * scale[:, None] - weight).abs() <= scale[:, None] * 0.50001).all()


def test_a_row_of_the_smallest_numbers_and_weights_that_are_no_numbers() -> None:
    weight = torch.full((2, 4), 1e-44)
    whole, scale = quantise_rows(weight)
    assert (whole * scale[:, None]).isfinite().all()
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="not finite"):
            quantise_rows(torch.tensor([[1.0, bad]]))


@pytest.mark.usefixtures("kernels", "small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50,), (3, 1, 50), (2, 30, 50), (0, 50)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_equal_the_dequantised_reference(dtype: torch.dtype, shape: tuple, bias: bool) -> None:
    plain = layer(bias=bias)
    plain.weight[5] = 0
    narrow = Int8Linear.of(plain)
    x = torch.randn(shape).to(dtype)
    actual, expected = narrow(x), reference(narrow, x)
    assert actual.dtype is dtype and actual.shape == (*shape[:-1], 37)
    # The kernels round activations to 2**-16 of their row's largest value.
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)
    if bias and len(x):
        torch.testing.assert_close(actual[..., 5].float(), plain.bias[5].expand(shape[:-1]), rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(frozen_linear.gemm is None or not frozen_linear.gemm.HAS_INT8, reason="no compiled int8 product")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("native", [True, False])
def test_many_rows_are_widened_where_the_cpu_multiplies_bfloat16(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, product = [], frozen_linear.gemm.product
    monkeypatch.setattr(frozen_linear, "is_native", lambda _: native)
    monkeypatch.setattr(frozen_linear.gemm, "product", lambda *given: compiled.append(len(given[0])) or product(*given))
    narrow, most = Int8Linear.of(layer()), frozen_linear.INT8_ROWS
    for rows in (most, most + 1):
        x = torch.randn(rows, 50).to(dtype)
        torch.testing.assert_close(narrow(x).float(), reference(narrow, x), rtol=2e-2, atol=2e-2)
    assert compiled == ([most] if native and dtype is torch.bfloat16 else [most, most + 1])


@pytest.mark.usefixtures("kernels", "small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 50), (2, 30, 50)])
def test_gradients_to_the_inputs_and_to_nothing_else(dtype: torch.dtype, shape: tuple) -> None:
    narrow = Int8Linear.of(layer())
    x = torch.randn(shape).to(dtype).requires_grad_()
    exact = x.detach().float().requires_grad_()
    grad = torch.randn(*shape[:-1], 37)
    narrow(x).backward(grad.to(dtype))
    reference(narrow, exact).backward(grad.to(dtype).float())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert x.grad.dtype is dtype
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=tolerance, atol=tolerance)
    assert all(p.grad is None and not p.requires_grad for p in narrow.parameters())


def test_nothing_widened_is_kept_for_the_backward_pass() -> None:
    narrow, kept = Int8Linear.of(layer()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        narrow(torch.randn(20, 50, requires_grad=True))
    assert kept and all(t.dtype is torch.int8 for t in kept if t.numel() >= narrow.weight.numel())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("native", [True, False])
def test_blocks_are_bounded_and_widened_to_the_dtype_of_the_product(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    widened: list[tuple[int, torch.dtype]] = []
    real = frozen_linear.widen
    monkeypatch.setattr(frozen_linear, "is_native", lambda _: native)
    monkeypatch.setattr(frozen_linear, "gemm", None)
    monkeypatch.setattr(
        frozen_linear, "widen", lambda *given: widened.append((given[0].numel(), given[2])) or real(*given)
    )
    narrow = Int8Linear.of(layer())
    x = torch.randn(20, 50, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = narrow(x)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    sizes, dtypes = zip(*widened, strict=True)
    assert sum(sizes) == 2 * 37 * 50 and max(sizes) <= 150
    assert x.grad.dtype is torch.float32 and set(dtypes) == {torch.bfloat16 if native else torch.float32}
    expected = (narrow.weight * narrow.scale[:, None]).sum(0).expand(20, 50)
    torch.testing.assert_close(x.grad, expected, rtol=2e-2, atol=2e-2)


def test_copies_casts_and_files_keep_it(tmp_path: Path) -> None:
    narrow = Int8Linear.of(layer())
    scale, x = narrow.scale.clone(), torch.randn(20, 50)
    expected = narrow(x)
    twin = copy.deepcopy(narrow)
    assert twin.weight.data_ptr() != narrow.weight.data_ptr() and torch.equal(twin(x), expected)
    for cast in (twin.bfloat16(), twin.half().float(), twin.to(torch.float64).cpu()):
        assert cast.weight.dtype is torch.int8 and cast.scale.dtype is torch.float32
        assert torch.equal(cast.scale, scale)
    moved = copy.deepcopy(narrow).to("meta")
    assert moved.weight.is_meta and moved.scale.is_meta
    torch.save(narrow.state_dict(), tmp_path / "layer.pt")
    other = Int8Linear.of(nn.Linear(50, 37))
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other(x), expected)
    assert isinstance(narrow, nn.Linear) and (narrow.in_features, narrow.out_features) == (50, 37)


# ------------------------------------------------------------------ the model


def test_the_large_matrices_become_int8_and_the_table_stays() -> None:
    lm = make_lm()
    table = lm.model.get_input_embeddings().weight
    assert quantise_int8(lm.model) == 3 * 2 + 1
    for block in lm.model.backbone.layers:
        assert isinstance(block.mixer.in_proj, Int8Linear) and isinstance(block.mixer.out_proj, Int8Linear)
        assert block.mixer.x_proj.weight.dtype is block.mixer.dt_proj.weight.dtype is torch.float32
    head = lm.model.lm_head
    assert isinstance(head, Int8Head) and head.weight is lm.model.get_input_embeddings().weight is table
    assert head.narrow.weight.dtype is torch.int8
    assert not any(p.requires_grad for p in lm.parameters())
    large = [p for p in lm.model.backbone.layers.parameters() if p.numel() >= 96 * 48]
    assert large and all(p.dtype is torch.int8 for p in large)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_says_nearly_the_same(dtype: torch.dtype) -> None:
    lm = make_lm(dtype=dtype)
    ids = torch.randint(1, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    quality = quantisation_quality(lm, int8_twin(lm), ids)
    assert 0 < quality.mean_difference < 0.05 * quality.standard_deviation
    assert quality.mean_difference < quality.max_difference < 0.5 * quality.standard_deviation
    assert quality.perplexity_ratio == pytest.approx(1, abs=0.02) and quality.perplexity_ratio != 1
    assert quantisation_quality(lm, lm, ids)[:3] == (0, 0, 1)


def test_quality_is_what_the_models_own_forwards_give() -> None:
    lm, ids = make_lm(), torch.randint(1, 60, (2, 300))  # more positions than have logits at a time
    twin = int8_twin(lm)
    with torch.no_grad():
        logits, changed = (m.model(input_ids=ids).logits[:, :-1].flatten(0, 1) for m in (lm, twin))
    target = ids[:, 1:].flatten()
    ratio = torch.exp(F.cross_entropy(changed, target) - F.cross_entropy(logits, target))
    difference = (logits - changed).abs()
    expected = (difference.max(), difference.mean(), ratio, logits.var(1, correction=0).mean().sqrt())
    assert quantisation_quality(lm, twin, ids) == pytest.approx([float(value) for value in expected], rel=1e-4)


# ------------------------------------------------------------------ loading, states, flags


@pytest.mark.usefixtures("kernels")
def test_loaded_in_int8_and_written_with(folder: str) -> None:
    for dtype in ("float32", "bfloat16"):
        lm = MambaLM.load(folder, dtype=dtype, int8=True)
        assert isinstance(lm.model.lm_head, Int8Head)
        assert lm.model.lm_head.weight is lm.model.get_input_embeddings().weight
        assert lm.model.lm_head.weight.dtype is getattr(torch, dtype)
        embeds = lm.embed(torch.tensor([[1, 2, 3]]))
        assert lm.generate(embeds, torch.ones(1, 3, dtype=torch.long), 5, min_new_tokens=5)[0]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "tied"), [("bfloat16", True), ("float32", False)])
def test_a_kept_int8_model_is_the_one_that_was_made(
    dtype: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = make_lm()
    lm.model.generation_config.repetition_penalty = 1.25  # a file of its own
    if not tied:
        lm.model.lm_head.weight = nn.Parameter(torch.randn(264, 48))
        lm.model.config.tie_word_embeddings = False
    folder, kept = tmp_path / "lm", tmp_path / "a b" / "中"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    made = MambaLM.load(str(folder), dtype=dtype, int8_folder=kept)
    [file] = kept.iterdir()
    assert "int8 weights kept: " in capsys.readouterr().out and file.suffix == ".safetensors"
    monkeypatch.setattr(quantisation, "quantise_rows", lambda *_: pytest.fail("quantised again"))
    mapped = MambaLM.load(str(folder), dtype=dtype, int8_folder=kept)
    assert [path.name for path in kept.iterdir()] == [file.name]
    assert (loading.TIED_MESSAGE in capsys.readouterr().out) is tied
    assert (mapped.model.lm_head.weight is mapped.model.get_input_embeddings().weight) is tied
    assert not mapped.model.training and mapped.model.dtype is made.model.dtype is getattr(torch, dtype)
    assert mapped.model.generation_config.repetition_penalty == 1.25
    weights, others = made.model.state_dict(), mapped.model.state_dict()
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert value.dtype is others[name].dtype and torch.equal(value, others[name]), name
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in mapped.parameters())
    prompt = lm.embed(torch.tensor([[1, 2, 3]])).to(made.model.dtype)
    one, two = (m.generate(prompt, torch.ones(1, 3, dtype=torch.long), 12, min_new_tokens=12) for m in (made, mapped))
    assert one == two


def test_what_an_int8_file_is_made_from_names_it(folder: str, tmp_path: Path) -> None:
    def path(**changes: object) -> Path:
        given = {"name": folder, "dtype": torch.float32, "stage0": "", "adapters": None, **changes}
        return loading.int8_file(tmp_path, **given)

    adapters = [
        {"rank": 1, "layers": {"x": {"A": torch.full((1, 2), value), "B": torch.ones(2, 1)}}} for value in (1.0, 2)
    ]
    before = [path(), path(dtype=torch.bfloat16), path(stage0="ab"), *(path(adapters=one) for one in adapters)]
    assert len(set(before)) == 5 and path() == before[0]
    weights = Path(folder) / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + (100 if os.name == "nt" else 1)))
    assert path() not in before


def test_a_damaged_int8_file_and_a_place_that_cannot_be_written(folder: str, tmp_path: Path) -> None:
    MambaLM.load(folder, int8_folder=tmp_path / "kept")
    [file] = (tmp_path / "kept").iterdir()
    content = file.read_bytes()
    for damaged in (content[:1000], b"", safetensors.torch.save({"x": torch.zeros(1)})):
        file.unlink()
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"^--save_int8: .*{file.name} is damaged, delete it"):
            MambaLM.load(folder, int8_folder=tmp_path / "kept")
    (tmp_path / "taken").write_text("x")
    with pytest.raises(InputError, match="^--save_int8: .* cannot be written: "):
        MambaLM.load(folder, int8_folder=tmp_path / "taken")


@pytest.mark.parametrize("made_in_int8", [True, False])
def test_a_state_is_not_taken_up_by_the_other_kind(folder: str, made_in_int8: bool, tmp_path: Path) -> None:
    maker, other = (MambaLM.load(folder, int8=kind) for kind in (made_in_int8, not made_in_int8))
    state = PrefixState.read(maker, maker.embed(torch.tensor([[1, 2, 3]])))
    state.save(tmp_path / "state.safetensors", PrefixIdentity.of_model(maker))
    loaded, identity = PrefixState.load(tmp_path / "state.safetensors")
    identity.check(PrefixIdentity.of_model(MambaLM.load(folder, int8=made_in_int8)), "state")
    assert torch.equal(loaded.recurrent, state.recurrent)
    with pytest.raises(InputError, match="another precision"):
        identity.check(PrefixIdentity.of_model(other), "state")


def test_both_ways_to_int8_contradict_each_other(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"^{quantisation.CONTRADICTION}$"):
        MambaLM.load(folder, int8=True, load_in_8bit=True)
    from scripts import check_image_to_text as script

    for flags in (["--llm_int8"], ["--save_int8", "folder"]):
        monkeypatch.setattr(sys, "argv", ["check_image_to_text.py", "--checkpoint", "x.pt", "--llm_8bit", *flags])
        with pytest.raises(InputError, match="--llm_8bit and --llm_int8"):
            script.check_flags(script.parse_args())
