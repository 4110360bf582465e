"""Decoding on CPU: our products and the compiled step against PyTorch's and the block's own."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaForCausalLM
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaBlock

pytest.importorskip("numba", reason="numba has no build for this platform")

from config.schema import REPOSITORY
from models.language_model import cpu_decode
from models.language_model.cpu_decode import FrozenLinear, frozen_linear, gemm, gemv, mamba_step
from models.language_model.cpu_decode.gemv import MOST_ROWS, few_rows, product
from models.language_model.cuda_graph_decode import _states
from models.language_model.hf_patch import use_our_scan
from models.language_model.quantisation import quantise_int8
from models.selective_scan.kernels_numba import digest_of
from tests.models.language_model.tiny import random_mamba

CLOSE, CLOSE_INT8 = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-2, "atol": 1e-3}  # int8 meets activations of 16 bits

# ------------------------------------------------------------------ products


@pytest.mark.parametrize(
    ("dtype", "rows"), [(dtype, rows) for dtype, most in MOST_ROWS.items() for rows in (1, 3, most)]
)
@pytest.mark.usefixtures("three_threads")
def test_product_equals_linear(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    for outputs, inputs in ((1, 1), (5, 2), (33, 50), (70, 160), (131, 300)):
        weight = torch.randn(outputs, inputs).to(dtype)
        if dtype is torch.int8:
            weight = torch.randint(-127, 128, (outputs, inputs), dtype=dtype)
        x, bias, scale = torch.randn(rows, 1, inputs).bfloat16(), torch.randn(outputs), torch.rand(outputs)
        expected = F.linear(x.float(), weight.float()) * scale + bias
        actual = product(x.float(), weight, bias, scale)
        assert actual.shape == (rows, 1, outputs) and actual.dtype is torch.float32
        bound = 1e-5 * expected.abs() + 2e-6 * float(expected.abs().max())
        if dtype is torch.int8:  # x is rounded to 2**-16 of its row's largest value
            bound = bound + 6e-5 * x.float().abs().amax(-1, keepdim=True) * weight.float().norm(dim=1) * scale
        assert ((actual - expected).abs() <= bound).all()
        plain = product(x, weight, None)
        assert plain.dtype is torch.bfloat16
        expected = F.linear(x.float(), weight.float())
        torch.testing.assert_close(plain.float(), expected, rtol=1e-2, atol=1e-2 + 1e-4 * float(expected.abs().max()))


def test_infinities_and_nans_pass_through() -> None:
    weight = torch.ones(4, 64, dtype=torch.bfloat16)
    weight[1, 3], weight[2, 5] = torch.inf, torch.nan
    out = product(torch.ones(1, 64, dtype=torch.bfloat16), weight, None)[0]
    assert out[0] == 64 and out[1] == torch.inf and out[2].isnan()


def test_int8_sums_do_not_overflow_and_rows_do_not_touch_each_other() -> None:
    weight = torch.full((5, 20_011), 127, dtype=torch.int8)
    weight[3] = -127
    x = torch.full((4, 20_011), 3.0)
    x[1], x[2, 5], x[3, 7] = 1e-40, torch.inf, torch.nan
    out = product(x, weight, None)
    torch.testing.assert_close(out[0], 3 * weight.sum(1).float(), rtol=1e-4, atol=0)
    assert out[1].abs().max() < 1e-30 and not out[2].isfinite().any() and out[3].isnan().all()


def test_cached_kernels_know_the_files_that_they_are_made_of(tmp_path: Path) -> None:
    """Numba notices changes only in a kernel's own file, and in what it closes over."""
    own, used = digest_of(), digest_of(gemv.__file__)
    kernels = {gemv.product_kernel: [own], gemm.product_kernel: [gemm.LANES, used], mamba_step.model_kernel: [used]}
    for kernel, parts in kernels.items():
        assert [cell.cell_contents for cell in kernel.py_func.__closure__] == parts
    changed = tmp_path / "gemv.py"
    changed.write_bytes(Path(gemv.__file__).read_bytes() + b" ")
    assert len({own, used, digest_of(str(changed))}) == 3


def test_another_target_than_this_processor(tmp_path: Path) -> None:
    """Numba's settings decide which instructions there are; int8 is then widened."""
    code = """
import torch
from models.language_model.cpu_decode import gemm, gemv
weight, x = torch.full((3, 40), 127, dtype=torch.int8), torch.ones(1, 40)
assert not (gemv.HAS_PAIRS or gemm.HAS_INT8 or gemm.HAS_BFLOAT16)
assert gemv.product(x, weight, None).tolist() == [[5080.0] * 3]
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, check=True)


def test_large_problems_and_gradients_stay_with_torch() -> None:
    layer = FrozenLinear(64, 5).requires_grad_(False)
    assert few_rows(torch.randn(8, 64), layer.weight)
    assert not few_rows(torch.randn(MOST_ROWS[torch.float32] + 1, 64), layer.weight)
    assert not few_rows(torch.randn(0, 64), layer.weight)
    assert not few_rows(torch.randn(1, 64).double(), layer.weight)
    assert not few_rows(torch.randn(1, 64).bfloat16(), layer.weight)  # PyTorch refuses it, and so should we
    x = torch.randn(2, 3, 64, requires_grad=True)
    assert not few_rows(x, layer.weight)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


def test_linear_layers_become_ours_and_stay_linear_layers() -> None:
    class Other(nn.Linear):
        """As a quantised layer is one."""

    model = nn.Sequential(nn.Linear(4, 4), Other(4, 4), nn.Conv1d(4, 4, 1))
    weight = model[0].weight
    cpu_decode.freeze_linear_layers(model)
    assert isinstance(model[0], nn.Linear) and type(model[0]) is FrozenLinear and model[0].weight is weight
    assert type(model[1]) is Other


@torch.no_grad()
def test_without_numba_pytorch_computes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    package = cpu_decode.__name__
    monkeypatch.setattr("models.language_model.cpu_decode", cpu_decode)  # the parent's attribute, restored at the end
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "models.selective_scan.kernels_numba")
    fresh = importlib.import_module(package)
    layer, x = fresh.FrozenLinear(8, 3), torch.randn(1, 8)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert fresh.step(None, x, None, None) is None and not fresh.frozen_linear.few_rows(x, layer.weight)


# ------------------------------------------------------------------ the step


def small_mamba(dtype: torch.dtype = torch.float32, int8: bool = False, **options: object) -> MambaForCausalLM:
    model = random_mamba(**{"num_hidden_layers": 2, "vocab_size": 50, **options}).requires_grad_(False)
    for block in model.backbone.layers:  # a fresh model has zeros and ones in many places
        block.norm.weight.uniform_(0.5, 2)
        for parameter in (block.mixer.conv1d.bias, block.mixer.D, block.mixer.dt_proj.bias):
            parameter.normal_()
        for layer in (block.mixer.in_proj, block.mixer.out_proj):
            if layer.bias is not None:
                layer.bias.normal_()
        block.mixer.A_log.add_(torch.rand_like(block.mixer.A_log))
    model = model.to(dtype)
    use_our_scan(model)
    if int8:
        quantise_int8(model)
    return model


@torch.no_grad()
def after_prompt(model: MambaForCausalLM, rows: int) -> Cache:
    ids = torch.randint(0, 50, (rows, 5), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=True).cache_params


@torch.no_grad()
def decode(model: MambaForCausalLM, cache: Cache, tokens: int = 4) -> Tensor:
    rows = cache.layers[0].conv_states[0].shape[0]
    ids = torch.randint(0, 50, (tokens, rows, 1), generator=torch.Generator().manual_seed(2))
    return torch.stack([model(input_ids=step, cache_params=cache, use_cache=True).logits for step in ids])


def plainly(model: MambaForCausalLM, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same tokens as a machine without numba computes them (but for the scan)."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu_decode, "step", lambda *_: None)
        patch.setattr(frozen_linear, "few_rows", lambda *_: False)
        return decode(model, cache)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every token: whether the compiled step served it."""
    served: list[bool] = []
    real = cpu_decode.step
    monkeypatch.setattr(cpu_decode, "step", lambda *args: served.append((out := real(*args)) is not None) or out)
    return served


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (1, {}),
        (1, {"state_size": 16, "hidden_size": 48, "use_bias": True}),
        (1, {"hidden_size": 30, "state_size": 32, "residual_in_fp32": False}),
        (1, {"hidden_size": 48, "int8": True}),
        (3, {"state_size": 20, "conv_kernel": 3, "time_step_rank": 37}),  # 3 are padded to 4
        (3, {"hidden_size": 30, "state_size": 32, "residual_in_fp32": False}),
    ],
)
@pytest.mark.usefixtures("three_threads")
def test_step_equals_the_block(rows: int, options: dict, steps: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mamba(**options)
    cache = after_prompt(model, rows)
    same = copy.deepcopy(cache)
    steps.clear()
    actual = decode(model, cache)
    assert steps == [True] * 4
    close = CLOSE_INT8 if "int8" in options else CLOSE
    torch.testing.assert_close(actual, plainly(model, same, monkeypatch), **close)
    torch.testing.assert_close(_states(cache), _states(same), **close)


@pytest.mark.parametrize("int8", [False, True])
def test_step_in_bfloat16(int8: bool, steps: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mamba(torch.bfloat16, int8, hidden_size=64, state_size=16)
    cache = after_prompt(model, 1)
    assert cache.layers[0].conv_states[0].dtype is torch.bfloat16
    same, exact = copy.deepcopy(cache), small_mamba(hidden_size=64, state_size=16)
    steps.clear()
    actual = decode(model, cache)
    assert all(steps) and actual.dtype is torch.float32
    expected = plainly(model, same, monkeypatch)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    # No further from the float32 model than the plain path is.
    truth = plainly(exact, after_prompt(exact, 1), monkeypatch)
    assert (actual - truth).abs().mean() < 1.5 * (expected - truth).abs().mean()


def test_results_do_not_depend_on_the_threads() -> None:
    model = small_mamba(hidden_size=96)
    cache = after_prompt(model, 1)
    before, logits = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        logits.append(decode(model, copy.deepcopy(cache)))
    torch.set_num_threads(before)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.usefixtures("three_threads")
def test_a_small_block_is_read_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba-2.8B's block, 79 MB in bfloat16, by all; one of 0.5 MB by one, which nothing holds up."""
    monkeypatch.setattr(gemv, "LEAST_BYTES", 2**20)
    assert [gemv.threads_for(nbytes) for nbytes in (0, 2**19, 2**21, 79 * 10**6)] == [1, 1, 2, 3]
    model, given = small_mamba(), []
    monkeypatch.setattr(gemv, "together", lambda threads, *_: given.append(threads))
    decode(model, after_prompt(model, 1), tokens=1)
    assert given and set(given) == {1}


@pytest.mark.usefixtures("three_threads")
def test_several_callers_at_once() -> None:
    model = small_mamba()
    cache = after_prompt(model, 1)
    expected = decode(model, copy.deepcopy(cache), tokens=20)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(decode, model, copy.deepcopy(cache), tokens=20) for _ in range(4)]
        assert all(torch.equal(job.result(timeout=60), expected) for job in jobs)


def test_what_is_not_plain_takes_the_block_itself(steps: list[bool]) -> None:
    model = small_mamba()
    cache = after_prompt(model, 1)

    def served(cache: Cache) -> bool:
        decode(model, cache, tokens=1)
        return steps[-1]

    assert served(cache) and not served(after_prompt(model, mamba_step.MOST_ROWS + 1))
    model(input_ids=torch.zeros(1, 1, dtype=torch.long), cache_params=cache, use_cache=True)  # gradients are enabled
    assert not steps[-1]
    block = model.backbone.layers[1]
    for module in (block, block.mixer, block.mixer.x_proj):
        seen: list[int] = []
        hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert not served(cache) and seen == [1]
        hook.remove()
        assert served(cache)
    block.norm.variance_epsilon *= 2  # another than the first block's
    block.step_plan = None
    assert not served(cache)
    block.norm.variance_epsilon /= 2
    block.mixer.in_proj = nn.Sequential(block.mixer.in_proj)
    assert not served(cache)


def replace(block: MambaBlock) -> None:
    block.mixer.out_proj.weight = nn.Parameter(-2 * block.mixer.out_proj.weight, requires_grad=False)


def move(block: MambaBlock) -> None:
    block.mixer.dt_proj.weight.data = 2 * block.mixer.dt_proj.weight.data


def replace_layer(block: MambaBlock) -> None:
    block.mixer.x_proj = copy.deepcopy(block.mixer.x_proj)
    block.mixer.x_proj.weight.mul_(-1)


def change_rates(block: MambaBlock) -> None:
    block.mixer.A_log.add_(0.5)


def rescale(block: MambaBlock) -> None:
    block.mixer.in_proj.scale.mul_(2)


@pytest.mark.parametrize("change", [change_rates, replace, move, replace_layer, rescale])
def test_changed_weights_are_noticed(change, steps: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mamba(int8=change is rescale)
    cache = after_prompt(model, 1)
    before = decode(model, copy.deepcopy(cache))
    change(model.backbone.layers[0])
    actual = decode(model, copy.deepcopy(cache))
    assert all(steps[-4:]) and not torch.allclose(actual, before, rtol=1e-3)
    close = CLOSE_INT8 if change is rescale else CLOSE
    torch.testing.assert_close(actual, plainly(model, cache, monkeypatch), **close)
