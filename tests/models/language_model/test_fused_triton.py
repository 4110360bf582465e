"""The fused kernels of a Mamba block against plain PyTorch in Triton's interpreter, and compiled for GPUs.

The interpreter must be chosen before Triton is imported: ``test_numbers_in_the_interpreter`` runs the first half of
this file in another process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; requirements.txt has it for Linux on x86-64 only")

from transformers.models.mamba.modeling_mamba import MambaRMSNorm  # noqa: E402

from models.language_model import fused_triton, hf_patch  # noqa: E402
from models.language_model.hf_patch import causal_conv_silu, norm_and_residual, use_our_scan  # noqa: E402
from models.selective_scan import FORCE_VARIABLE  # noqa: E402
from tests.models.language_model.tiny import random_mamba  # noqa: E402
from tests.models.triton_kernels import Recorder, compiled  # noqa: E402

ROOT = Path(__file__).parents[3]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with Triton's interpreter")
compiling = pytest.mark.skipif(INTERPRETED, reason="runs where Triton compiles")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "triton")
    monkeypatch.setattr(fused_triton, "REPEATS", 2)
    monkeypatch.setattr(hf_patch, "triton_serves", lambda *_: True)  # half a minute of the scan's self-test


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """In norm, relative."""
    assert float((actual.double() - expected).norm() / expected.norm()) < tolerance


@interpreted
@pytest.mark.parametrize(
    ("dtype", "length", "channels", "taps", "before", "bias"),
    [
        (torch.float32, 1, 5, 4, True, True),
        (torch.bfloat16, 11, 300, 4, False, True),
        (torch.float16, 18, 20, 4, True, False),
        (torch.float32, 9, 20, 2, True, True),
    ],
)
def test_convolution(
    forced: None, dtype: torch.dtype, length: int, channels: int, taps: int, before: bool, bias: bool
) -> None:
    """Also of one half of a projection, as the mixer's x is: its rows are not adjacent."""
    random = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 2 * channels, generator=random).to(dtype)[..., :channels].requires_grad_()
    weight, shift = torch.randn(channels, taps, generator=random).to(dtype), torch.randn(channels, generator=random)
    prior = torch.randn(2, channels, taps - 1, generator=random).to(dtype).transpose(1, 2) if before else None
    grad = torch.randn(2, length, channels, generator=random).to(dtype)
    y = causal_conv_silu(x, weight, shift if bias else None, prior)
    assert y.grad_fn.name().startswith("ConvSiLU") and y.dtype is dtype
    (found,) = torch.autograd.grad(y, x, grad)

    exact = x.detach().double().requires_grad_()
    head = exact.new_zeros(2, taps - 1, channels) if prior is None else prior.double()
    padded = torch.cat([head, exact], dim=1).transpose(1, 2)
    expected = F.conv1d(padded, weight.double()[:, None], shift.double() if bias else None, groups=channels)
    expected = F.silu(expected).transpose(1, 2)
    close(y, expected, TOLERANCE[dtype])
    close(found, torch.autograd.grad(expected, exact, grad.double())[0], TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@DTYPES
@pytest.mark.parametrize("width", [5, 96])
def test_norm_and_residual(forced: None, hidden_dtype: torch.dtype, dtype: torch.dtype, width: int) -> None:
    random = torch.Generator().manual_seed(width)
    hidden = (3 * torch.randn(2, 7, width, generator=random)).to(hidden_dtype).requires_grad_()
    norm = MambaRMSNorm(width, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(torch.randn(width, generator=random))
    norm.to(dtype)
    grads = torch.randn(2, 2, 7, width, generator=random)
    normed, residual = norm_and_residual(norm, hidden, dtype, torch.float32)
    assert normed.grad_fn.name().startswith("NormAndResidual") and normed.dtype is dtype
    assert residual.dtype is torch.float32 and torch.equal(residual, hidden.float())

    exact = hidden.detach().to(dtype).double().requires_grad_()
    expected = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * norm.weight.double()
    tolerance = max(TOLERANCE[dtype], TOLERANCE[hidden_dtype])
    close(normed, expected, tolerance)
    given = grads[0].to(dtype), grads[1]
    for use in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both outputs, the norm alone, the residual alone
        outputs = [(normed, residual)[i] for i in range(*use.indices(2))]
        (found,) = torch.autograd.grad(outputs, hidden, given[use], retain_graph=True)
        (through,) = torch.autograd.grad(expected, exact, given[0].double(), retain_graph=True)
        wanted = (through if use.start == 0 else 0) + (given[1].double() if use.stop == 2 else 0)
        assert found.dtype is hidden_dtype
        close(found, wanted, tolerance)


@pytest.mark.minutes
@interpreted
def test_a_model_with_them_equals_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_mamba(num_hidden_layers=2, state_size=3).requires_grad_(False)
    use_our_scan(model)
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv(FORCE_VARIABLE, backend)
        for recompute in (False, True):
            hf_patch.recompute_blocks(model, len(model.backbone.layers) if recompute else 0)
            logits = model(inputs_embeds=embeds, use_cache=False).logits
            found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), embeds)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize("wrong", [None, "ConvSiLU", "NormAndResidual"])
def test_kernels_that_err_are_not_used(
    forced: None, wrong: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hf_patch._kernels_agree.cache_clear()
    if wrong:
        kind = getattr(fused_triton, wrong)
        backward = staticmethod(lambda ctx, *grads: kind.backward(ctx, *(-grad for grad in grads)))
        monkeypatch.setattr(fused_triton, wrong, type(wrong, (kind,), {"backward": backward}))
    try:
        assert hf_patch._fused(torch.ones(1, 2, 3)) is (wrong is None)
        assert ("wrong numbers: the gradient of the" in caplog.text) is (wrong is not None)
    finally:
        hf_patch._kernels_agree.cache_clear()


@interpreted
def test_trained_weights_take_the_plain_way(forced: None) -> None:
    """The kernels give them no gradient."""
    x, weight = torch.randn(1, 4, 6), torch.randn(6, 4, requires_grad=True)
    causal_conv_silu(x, weight, None).sum().backward()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert hf_patch._fused(x, weight)


@compiling
@pytest.mark.parametrize(
    ("marked", "least"), [("not minutes", 20), pytest.param("minutes", 1, marks=pytest.mark.minutes)]
)
def test_numbers_in_the_interpreter(marked: str, least: int) -> None:
    plugin = ["-p", "tests.models.selective_scan.fast_triton_interpreter"]  # with a model the scan runs too
    command = [sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "-k", "not interpreter", __file__]
    command += ["-m", marked]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least, run.stdout[-2000:]


KERNELS = ("conv_silu_kernel", "conv_silu_backward_kernel", "rms_norm_kernel", "rms_norm_backward_kernel")


@compiling
@pytest.mark.parametrize("capability", [90, 120])
def test_compiles_for_gpus(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Down to machine code, which needs no GPU; of bfloat16 a thread loads 16 bytes at once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    recorders = {name: Recorder() for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(fused_triton, name, recorder)
    x = torch.zeros(2, 16, 512, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.zeros(512, 4, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
    fused_triton.ConvSiLU.apply(x, weight, bias, torch.zeros(2, 3, 512, dtype=torch.bfloat16)).sum().backward()
    hidden = torch.zeros(2, 16, 512, requires_grad=True)
    outputs = fused_triton.NormAndResidual.apply(hidden, bias, 1e-5, torch.bfloat16, torch.float32)
    torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
    monkeypatch.undo()
    for name, recorder in recorders.items():
        asm = compiled(getattr(fused_triton, name), recorder, capability)
        assert len(asm["cubin"]) > 1000
        if name.startswith("conv"):
            assert "ld.global.v4" in asm["ptx"] and "st.global.v4" in asm["ptx"]
