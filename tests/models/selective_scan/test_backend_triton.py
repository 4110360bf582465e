"""The Triton backend without a GPU: its numbers in Triton's interpreter, its types by compiling for GPUs.

The interpreter must be chosen before Triton is imported, so those tests run in another process. They are the
tests of test_selective_scan.py, with Triton as the backend.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config.errors import InputError
from models import selective_scan
from models.selective_scan import ScanInputs
from models.selective_scan.backend_reference import scan as reference_scan
from models.selective_scan.selftest import check_scan

pytest.importorskip("triton", reason="triton is not installed; requirements.txt has it for Linux on x86-64 only")


from models.selective_scan import backend_triton, kernels_triton  # noqa: E402
from tests.models.triton_kernels import Recorder, compiled  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# The interpreter is not thread-safe; the others do not ask the backend.
LEFT_OUT = "thread or fork or gradcheck or without or gpu or preference or announced or unknown or refused or layout"
FAST = "mixed or reverse or nan or infinite or single or empty or autocast"  # seconds; gradients and segments included

pytestmark = pytest.mark.skipif(backend_triton.INTERPRETED, reason="TRITON_INTERPRET is set for this process")


@pytest.mark.parametrize(
    ("chosen", "least"), [(FAST, 10), pytest.param(f"not ({LEFT_OUT})", 15, marks=pytest.mark.minutes)]
)
def test_numbers_in_the_interpreter(chosen: str, least: int) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "pytest", "-p", "fast_triton_interpreter", "-p", "no:cacheprovider"]
    command += [str(HERE / "test_selective_scan.py"), "-k", chosen]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed >= least, run.stdout[-2000:]


KERNELS = ("forward_kernel", "adjoint_kernel", "tile_kernel", "update_kernel")


def launches(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, states: int, full: bool) -> dict[str, Recorder]:
    """What forward, backward and a single step launch; nothing is computed."""
    recorders = {name: Recorder() for name in KERNELS}
    for name, recorder in recorders.items():
        monkeypatch.setattr(backend_triton, name, recorder)
    tile = torch.zeros(1, 48, 64, dtype=dtype).mT  # channels last, as the mixers give it
    per_channel, per_state = torch.zeros(64), torch.zeros(1, states, 48, dtype=dtype)
    A, z = torch.zeros(64, states), tile if full else None
    D, bias = (per_channel, per_channel) if full else (None, None)
    first = torch.zeros(1, 64, states, requires_grad=True)
    inputs = ScanInputs(tile, tile, A, per_state, per_state, D, z, bias, first)
    backend_triton.scan(inputs, full, not full)[0].sum().backward()
    step = ScanInputs(*(t[..., 0] if t is not None and t.ndim == 3 else t for t in inputs[:-1]))
    backend_triton.state_update(torch.zeros(1, 64, states), step, full)
    return recorders


@pytest.mark.parametrize(
    ("capability", "dtype", "states", "full"),
    [(120, torch.bfloat16, 16, True), (120, torch.float32, 3, False), (90, torch.float16, 128, True)],
)
def test_compiles_for_gpus(
    capability: int, dtype: torch.dtype, states: int, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, which needs no GPU. The interpreter knows no types, so it misses such mistakes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shuffles = {}
    for name, launch in launches(monkeypatch, dtype, states, full).items():
        asm = compiled(getattr(kernels_triton, name), launch, capability)
        assert len(asm["cubin"]) > 1000
        shuffles[name] = asm["ptx"].count("shfl.")
    if states == 16:  # what the layout was chosen for: a lane owns a channel
        assert shuffles["forward_kernel"] == shuffles["adjoint_kernel"] == 0
        assert shuffles["tile_kernel"] == 2 * backend_triton.CHUNK * 5  # dB and dC, five each for 32 lanes


def test_on_the_cpu_it_wants_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selective_scan.FORCE_VARIABLE, "triton")
    x = torch.ones(1, 2, 3)
    with pytest.raises(InputError, match="MAMBA_SCAN_BACKEND=triton cannot be used: .*TRITON_INTERPRET=1"):
        selective_scan.selective_scan(x, x, -torch.ones(2, 2), x[:, :2], x[:, :2])


def test_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU compiled the kernels into something else."""
    monkeypatch.setattr(
        backend_triton, "scan", lambda inputs, *_: (1.1 * r for r in reference_scan(inputs, True, False))
    )
    monkeypatch.setattr(backend_triton, "INTERPRETED", True)
    with pytest.raises(selective_scan.BackendUnavailable, match="wrong numbers: y is off by") as refused:
        backend_triton.check("cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.gpu
def test_numbers_on_a_gpu() -> None:
    backend_triton.check("cuda")
    check_scan(backend_triton.scan, "cuda", channels=200, length=300, states=16)
    check_scan(backend_triton.scan, "cuda", channels=70, length=100, states=100)
