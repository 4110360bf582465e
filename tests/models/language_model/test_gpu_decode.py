"""The kernels of a decoding step: their numbers in Triton's interpreter, their types by compiling for GPUs.

The interpreter must be chosen before Triton is imported, so tests of numbers run in another process.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.language_model import gpu_decode
from models.language_model.mamba_lm import MambaLM
from models.language_model.quantisation import quantise_int8
from tests.models.language_model.tiny import sharp_lm

pytest.importorskip("triton", reason="triton is not installed; requirements.txt has it for Linux on x86-64 only")

from models.language_model import gpu_decode_kernels  # noqa: E402
from tests.models.triton_kernels import Recorder, compiled  # noqa: E402

ROOT = Path(__file__).parents[3]
interpreted = pytest.mark.skipif(not gpu_decode.INTERPRETED, reason="needs TRITON_INTERPRET=1; run by another test")
plain = pytest.mark.skipif(gpu_decode.INTERPRETED, reason="TRITON_INTERPRET is set for this process")


def make_lm(dtype: torch.dtype = torch.float32, *, int8: bool = False, **options: object) -> MambaLM:
    """Sizes that are no powers of two: every mask is needed."""
    sizes = {"hidden_size": 20, "state_size": 6, "num_hidden_layers": 1, "time_step_rank": 5, "vocab_size": 257}
    lm = sharp_lm(sharpness=4.0, **{**sizes, **options}).to(dtype)
    for block in lm.model.backbone.layers:
        block.mixer.A_log.data = block.mixer.A_log.data.float()  # as MambaLM.load keeps it
    if int8:
        quantise_int8(lm.model)
    return lm


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "_VERDICTS", {})
    if gpu_decode.INTERPRETED:  # where programs follow each other, fewer are quicker
        monkeypatch.setattr(gpu_decode, "_rows_at_once", lambda *_: 16)


@pytest.mark.slow
@plain
def test_numbers_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not minutes", str(Path(__file__))]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 7, run.stdout[-2000:]


def steps(lm: MambaLM, rows: int) -> list[Tensor]:
    """Logits of two steps, and the states after them."""
    embeds = torch.randn(rows, 9, lm.width, generator=torch.Generator().manual_seed(1)).to(lm.model.dtype)
    with torch.no_grad():
        cache = lm.model(inputs_embeds=embeds, use_cache=True).cache_params
        ids = [torch.arange(rows)[:, None] + first for first in (3, 90)]
        logits = [lm.model(input_ids=one, cache_params=cache, use_cache=True).logits for one in ids]
    return [*logits, *(s for layer in cache.layers for s in (layer.conv_states[0], layer.recurrent_states[0]))]


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "_kernels", lambda _: None)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "int8", "rows", "options"),
    [
        (torch.float32, False, 1, {}),
        (torch.float32, False, 3, {"num_hidden_layers": 2, "use_bias": True, "use_conv_bias": False}),
        (torch.bfloat16, False, 1, {"residual_in_fp32": False}),
        (torch.float32, True, 2, {}),
        (torch.bfloat16, True, 1, {}),
    ],
)
def test_a_step_gives_what_the_block_gives(
    dtype: torch.dtype, int8: bool, rows: int, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, taken = make_lm(dtype, int8=int8, **options), []
    run = gpu_decode._run_block
    monkeypatch.setattr(gpu_decode, "_run_block", lambda *given: taken.append(given) or run(*given))
    ours = steps(lm, rows)
    assert len(taken) == 1 + 2 * len(lm.model.backbone.layers), "one to compare with the block, then every step"
    without_kernels(monkeypatch)
    for one, other in zip(ours, steps(lm, rows), strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        # On a CPU the block's int8 products round activations to 16 bits.
        assert error < (5e-2 if dtype is not torch.float32 else 1e-3 if int8 else 1e-5)


@interpreted
def test_an_int8_product_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_lm(int8=True).model.lm_head.narrow
    x = torch.randn(2, 3, layer.in_features)
    given = layer.weight, layer.scale, layer.bias
    with torch.no_grad():
        expected = x @ (layer.weight * layer.scale[:, None]).T
        monkeypatch.setattr(layer, "compiled", lambda _: None)
        torch.testing.assert_close(layer(x), expected)
        assert gpu_decode.int8_product(x, *given) is not None
    assert gpu_decode.int8_product(x.requires_grad_(), *given) is None, "gradients are PyTorch's"
    assert gpu_decode.int8_product(x.detach().expand(9, 2, 3, -1), *given) is None, "many rows too"


@interpreted
@pytest.mark.parametrize("wrong", ["numbers", "raises"])
def test_kernels_that_err_are_not_used(
    wrong: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, run = make_lm(), gpu_decode._run_block

    def err(*given: object) -> Tensor:
        if wrong == "raises":
            raise RuntimeError("no kernel image is available\nmore")
        return run(*given) * 1.1

    with monkeypatch.context() as patch:
        without_kernels(patch)
        expected = steps(lm, 1)
    monkeypatch.setattr(gpu_decode, "_run_block", err)
    with caplog.at_level(logging.WARNING, gpu_decode.__name__):
        for one, other in zip(steps(lm, 1), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert ("no kernel image" if wrong == "raises" else "the output is off by") in caplog.messages[0]


@plain
@pytest.mark.parametrize(("capability", "int8", "rows"), [(90, False, 3), (120, True, 1)])
def test_compiles_for_gpus(
    capability: int, int8: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, which needs no GPU, in the sizes of Mamba-2.8B and bfloat16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ("enter_kernel", "rows_kernel", "state_kernel")
    recorders = {name: Recorder() for name in names}
    monkeypatch.setattr(gpu_decode, "_kernels", lambda _: type("Kernels", (), recorders))
    sizes = {"hidden_size": 2560, "state_size": 16, "time_step_rank": 160, "vocab_size": 257}
    block = make_lm(torch.bfloat16, int8=int8, **sizes).model.backbone.layers[0]
    window = torch.zeros(rows, 5120, 4, dtype=torch.bfloat16)
    gpu_decode._run_block(block, torch.zeros(rows, 1, 2560), window, torch.zeros(rows, 5120, 16))
    for name, launch in recorders.items():
        asm = compiled(getattr(gpu_decode_kernels, name), launch, capability)
        assert len(asm["cubin"]) > 1000
        if name == "rows_kernel":  # out_proj was launched last: whole lines of weights, 16 bytes a load
            weights = launch.kwargs["ROWS"] * launch.kwargs["COLUMNS"] * (1 if int8 else 2)
            assert asm["ptx"].count("ld.global.v4.b32") >= weights // (16 * 32 * gpu_decode.WARPS)


@plain
def test_a_cpu_decodes_by_its_own_kernels() -> None:
    assert gpu_decode._kernels("cpu") is None
    assert gpu_decode.int8_product(torch.zeros(1, 20), torch.zeros(4, 20).char(), torch.ones(4), None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
def test_numbers_on_a_gpu(int8: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 640, "state_size": 16, "time_step_rank": 40, "num_hidden_layers": 2}
    lm = make_lm(torch.bfloat16, int8=int8, **sizes).to("cuda")
    embeds = torch.randn(3, 9, lm.width, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([[3], [40], [90]], device="cuda")

    def logits() -> Tensor:
        with torch.no_grad():
            cache = lm.model(inputs_embeds=embeds, use_cache=True).cache_params
            return lm.model(input_ids=ids, cache_params=cache, use_cache=True).logits

    with caplog.at_level(logging.WARNING, gpu_decode.__name__):
        ours = logits()
    assert not caplog.messages
    without_kernels(monkeypatch)
    expected = logits()
    assert float((ours - expected).norm() / expected.norm()) < 5e-2
