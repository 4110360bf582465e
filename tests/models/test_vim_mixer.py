"""The Vim v2 mixer against recorded official outputs and gradients, and its own invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.selective_scan import FORCE_VARIABLE
from models.vim_mixer import STEP_SIZES, VimBlock, VimMixer


@pytest.fixture(params=["reference", "torch", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv(FORCE_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize(("file", "scale"), [("vim_mixer_v2", 2.0), ("vim_mixer_v2_divide_out", 1.0)])
def test_official_output_and_gradients(backend: str, file: str, scale: float, assets: Path) -> None:
    """``scale``: of the last projection, which makes up for the mean in place of the sum of the directions."""
    with np.load(assets / "golden" / f"{file}.npz") as archive:
        golden = {key: torch.from_numpy(archive[key]) for key in archive.files}
    golden["param.out_proj.weight"] *= scale
    golden["grad.out_proj.weight"] /= scale
    mixer = VimMixer(d_model=32)
    mixer.load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    hidden = golden["input"].requires_grad_()
    output = mixer(hidden)
    output.backward(golden["grad_output"])
    torch.testing.assert_close(output, golden["output"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden.grad, golden["grad_input"], rtol=1e-4, atol=1e-5)
    gradients = {f"grad.{name}": parameter.grad for name, parameter in mixer.named_parameters()}
    assert gradients.keys() == {key for key in golden if key.startswith("grad.")}
    for name, gradient in gradients.items():
        error = (gradient - golden[name]).norm() / golden[name].norm()
        assert error < 1e-5, (name, float(error))


def test_step_sizes_start_in_range_in_both_directions() -> None:
    torch.manual_seed(0)
    mixer = VimMixer(64)
    for projection in (mixer.dt_proj, mixer.dt_proj_b):
        steps = F.softplus(projection.bias)
        assert steps.min() >= STEP_SIZES[0] * 0.999 and steps.max() <= STEP_SIZES[1] * 1.001
        assert steps.max() / steps.min() > 5  # spread over the range, not one value
        assert projection.weight.abs().max() <= mixer.dt_rank**-0.5


def test_swapping_directions_mirrors_the_output(backend: str) -> None:
    torch.manual_seed(1)
    mixer, mirrored = VimMixer(16), VimMixer(16)
    state = mixer.state_dict()
    partner = {
        name: name.replace("A_b_log", "A_log").replace("_b.", ".")
        if "_b." in name or name == "A_b_log"
        else name.replace("A_log", "A_b_log").replace("1d.", "1d_b.").replace("t_proj.", "t_proj_b.")
        for name in state
    }
    partner |= {"D": "D_b", "D_b": "D", "x_proj.weight": "x_proj_b.weight", "out_proj.weight": "out_proj.weight"}
    assert sorted(partner.values()) == sorted(state)
    mirrored.load_state_dict({name: state[partner[name]] for name in state})
    hidden = torch.randn(2, 21, 16)
    assert not torch.allclose(mixer(hidden.flip(1)).flip(1), mixer(hidden), atol=1e-4)
    torch.testing.assert_close(mirrored(hidden.flip(1)).flip(1), mixer(hidden), rtol=1e-4, atol=1e-6)


def test_every_token_depends_on_every_other() -> None:
    torch.manual_seed(2)
    mixer, hidden = VimMixer(16), torch.randn(1, 12, 16)
    changed = hidden.clone()
    changed[:, 7] += 1
    assert ((mixer(changed) - mixer(hidden)).abs().sum(-1)[0] > 0).all()


def test_dynamics_biases_and_norms_are_spared_weight_decay() -> None:
    block = VimBlock(16)
    spared = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    per_direction = {"conv1d{}.bias", "dt_proj{}.bias", "A{}_log", "D{}"}
    assert spared == {"norm.weight"} | {f"mixer.{n.format(s)}" for n in per_direction for s in ("", "_b")}


def test_block_adds_before_the_norm_and_keeps_the_residual_in_float32(backend: str) -> None:
    torch.manual_seed(3)
    block = VimBlock(16)
    hidden, residual = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    out, carried = block(hidden, residual)
    assert torch.equal(carried, hidden + residual)
    torch.testing.assert_close(out, block.mixer(block.norm(hidden + residual)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, carried = block(hidden.bfloat16())
    assert out.dtype is torch.bfloat16 and carried.dtype is torch.float32
    assert torch.equal(carried, hidden.bfloat16().float())
