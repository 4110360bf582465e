"""The selective scan on a GPU: autograd and launches around the Triton kernels.

Letters: B batch, E channels, L tokens, N state. Everything is computed in float32, whatever the inputs are.
For backward the inputs and the state at each tile's start are kept, B·E·N·L/CHUNK floats. Backward needs room
for dB and dC summed over blocks of channels, 2·N·L for each block; a block has at least N/2 channels, so that is
at most about 4·B·E·L floats whatever N is, and 1·B·E·L for N = 16. The blocks are then summed in a fixed order: no
atomics, results repeat exactly.

Runs wherever Triton 3.3 or later does, including Windows (package triton-windows). With ``TRITON_INTERPRET=1``
in the environment before Triton is imported it runs, slowly, on CPU tensors instead.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from models.selective_scan import BackendUnavailable, ScanInputs, differentiable, reference_state_update
from models.selective_scan.kernels_triton import backward_kernel, forward_kernel, update_kernel
from models.selective_scan.selftest import attempt, check_scan, expect_close, sample_inputs

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
CHUNK = 16  # tokens a tile; with 32, backward no longer fits into 255 registers
BLOCK = 32  # channels a program, one for each lane of a warp
STAGES = 1  # no pipelining of loads: the state passes through memory from tile to tile


def check(device_type: str) -> None:
    """Raise ``BackendUnavailable`` unless the kernels compile on this device and return the right numbers.

    Tests the current device of that type; other devices of the machine are taken to be alike.
    """
    if device_type == "cpu" and not INTERPRETED:
        raise BackendUnavailable("it runs on the CPU only in Triton's interpreter (TRITON_INTERPRET=1, for tests)")
    if device_type != "cpu" and INTERPRETED:
        raise BackendUnavailable("TRITON_INTERPRET is set, which is for tests on the CPU")
    check_scan(scan, device_type, channels=BLOCK + 3, length=CHUNK + 3)
    attempt(lambda: _check_update(device_type), device_type)


def state_update(state: Tensor, inputs: ScanInputs, delta_softplus: bool) -> Tensor:
    """See ``selective_scan.selective_state_update``; ``state`` is float32. One launch instead of a dozen."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    batch, channels, states = state.shape
    y = torch.empty_like(u)
    D_, z_, bias_ = (u if t is None else t for t in (D, z, delta_bias))  # never read where absent
    block = min(BLOCK, triton.next_power_of_2(channels))
    with _on(state.device):
        update_kernel[(triton.cdiv(channels, block), batch)](
            state, u, delta, z_, y, A, B, C, D_, bias_, channels, states,
            *state.stride(), *u.stride(), *delta.stride(), *z_.stride(), *y.stride(),
            *A.stride(), *B.stride(), *C.stride(), D_.stride(0), bias_.stride(0),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            BLOCK=block, STATES=triton.next_power_of_2(states),
        )  # fmt: skip
    return y


def forward(inputs: ScanInputs, softplus: bool, reverse: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state (B, E, N) and the states between tiles (B, tiles + 1, N, E), only two unless kept."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    batch, channels, length = u.shape
    tiles, slots = triton.cdiv(length, CHUNK), triton.cdiv(length, CHUNK) + 1 if keep else 2
    y = torch.empty_like(u)
    states = torch.empty(batch, slots, A.shape[1], channels, device=u.device)
    states[:, 0] = 0 if initial_state is None else initial_state.transpose(1, 2)
    gate = u if z is None else z  # never read where absent
    with _on(u.device):
        forward_kernel[(triton.cdiv(channels, BLOCK), batch)](
            u, delta, gate, y, _rates(A), _walk(B, reverse), _walk(C, reverse),
            _vector(D, u), _vector(delta_bias, u), states,
            length, tiles * CHUNK, channels, A.shape[1], slots,
            *u.stride(), *delta.stride(), *gate.stride(), *y.stride(),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            SOFTPLUS=softplus, REVERSE=reverse, KEEP=keep, CHUNK=CHUNK, BLOCK=BLOCK,
            num_warps=1, num_stages=STAGES,
        )  # fmt: skip
    last = states[:, tiles if keep else tiles % 2].transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return y, last, states


def backward(
    inputs: ScanInputs, states: Tensor, grad_y: Tensor | None, grad_last: Tensor | None, softplus: bool, reverse: bool
) -> tuple[Tensor, ...]:
    """Gradients of the nine inputs; those of absent ones mean nothing."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    batch, channels, length = u.shape
    n_states, tiles = A.shape[1], triton.cdiv(length, CHUNK)
    block = max(BLOCK, triton.next_power_of_2(n_states) // 2)  # bounds the room for dB and dC
    blocks = triton.cdiv(channels, block)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    gate, grad_z = (u, grad_u) if z is None else (z, torch.empty_like(z))  # never read or written where absent
    carry, sum_A = torch.zeros(2, batch, 2, n_states, channels, device=u.device)
    if grad_last is not None:
        carry[:, 0] = grad_last.transpose(1, 2)
    grad_y = torch.zeros((), device=u.device).expand(u.shape) if grad_y is None else grad_y
    parts = torch.empty(2, batch, blocks, n_states, tiles * CHUNK, device=u.device)
    grad_D, grad_bias = torch.empty(2, batch, channels, device=u.device)
    with _on(u.device):
        backward_kernel[(blocks, batch)](
            u, delta, gate, grad_y, grad_u, grad_delta, grad_z,
            _rates(A), _walk(B, reverse), _walk(C, reverse), _vector(D, u), _vector(delta_bias, u),
            states, carry, sum_A, *parts, grad_D, grad_bias,
            length, tiles * CHUNK, channels, n_states, states.shape[1],
            *u.stride(), *delta.stride(), *gate.stride(), *grad_y.stride(),
            *grad_u.stride(), *grad_delta.stride(), *grad_z.stride(),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
            SOFTPLUS=softplus, REVERSE=reverse, CHUNK=CHUNK, BLOCK=block,
            num_warps=block // BLOCK, num_stages=STAGES,
        )  # fmt: skip
    grad_B, grad_C = parts.sum(2)[..., :length]
    if reverse:
        grad_B, grad_C = grad_B.flip(-1), grad_C.flip(-1)
    grad_A, grad_first = sum_A[:, tiles % 2].sum(0).t(), carry[:, tiles % 2].transpose(1, 2)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D.sum(0), grad_z, grad_bias.sum(0), grad_first


scan = differentiable(forward, backward)


def _rates(A: Tensor) -> Tensor:
    """(E, N) -> (N, E), so that the lanes of a warp read neighbours."""
    return A.detach().float().t().contiguous()


def _walk(tensor: Tensor, reverse: bool) -> Tensor:
    """B or C (B, N, L) in the order of the walk, with zeros up to whole tiles: every block reads all of it."""
    length = tensor.shape[2]
    padded = tensor.new_zeros(*tensor.shape[:2], triton.cdiv(length, CHUNK) * CHUNK, dtype=torch.float32)
    padded[..., :length] = tensor.flip(-1) if reverse else tensor
    return padded


def _vector(tensor: Tensor | None, u: Tensor) -> Tensor:
    """D or delta_bias in float32; ``u`` takes the place of an absent one, which is never read."""
    return u if tensor is None else tensor.detach().float().contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _check_update(device_type: str) -> None:
    *tensors, state = sample_inputs(2, BLOCK + 3, 1, 3, torch.float32)
    tensors = [t[..., 0] if t.ndim == 3 else t for t in tensors]
    exact, here = state.double(), state.to(device_type)
    expected = reference_state_update(exact, ScanInputs(*(t.double() for t in tensors)), True)
    actual = state_update(here, ScanInputs(*(t.to(device_type) for t in tensors)), True)
    expect_close("a single step", actual, expected, 1e-4, device_type)
    expect_close("the state after a single step", here, exact, 1e-4, device_type)
