"""The selective scan on a GPU: autograd and launches around the Triton kernels.

Letters: B batch, E channels, L tokens, N state. Everything is computed in float32, whatever the inputs are.
For backward the inputs and the state before each tile are kept, B·E·N·L/CHUNK numbers: bfloat16 where u is that,
whose gradients are rounded so in the end, else float32; the walks themselves never go on from a rounded state.
Backward needs as much for the adjoints, and room for dB and dC summed over blocks of channels, 2·N·L floats for each
block; a block has at least N/2 channels, so that is at most about 4·B·E·L floats whatever N is, and 0.5·B·E·L for
N = 16. The blocks are then summed in a fixed order: no atomics, results repeat exactly.

Runs wherever Triton 3.3 or later does, including Windows (package triton-windows). With ``TRITON_INTERPRET=1``
in the environment before Triton is imported it runs, slowly, on CPU tensors instead.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

from models.selective_scan import BackendUnavailable, ScanInputs, differentiable, reference_state_update
from models.selective_scan.kernels_triton import adjoint_kernel, forward_kernel, tile_kernel, update_kernel
from models.selective_scan.selftest import attempt, check_scan, expect_close, sample_inputs

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
CHUNK = 8  # tokens a tile
TILE_BLOCK = (
    64  # channels a warp of tile_kernel, two for each lane: half the exchanges between lanes that one would need
)
BLOCK = 32  # channels a program of the walks, one for each lane of a warp
UNROLL = 4  # tokens that a walk loads ahead
STAGES = 3  # of the walks' copies of B and C into shared memory
WARP_STATES = 16  # states that a lane holds; of more, several warps share a program
PROGRAMS = 8  # of the walks, that a multiprocessor shall have; fewer, and the sequence is cut into segments
LEAST = 4  # tiles in a segment


def check(device_type: str) -> None:
    """Raise ``BackendUnavailable`` unless the kernels compile on this device and return the right numbers.

    Tests the current device of that type; other devices of the machine are taken to be alike.
    """
    if device_type == "cpu" and not INTERPRETED:
        raise BackendUnavailable("it runs on the CPU only in Triton's interpreter (TRITON_INTERPRET=1, for tests)")
    if device_type != "cpu" and INTERPRETED:
        raise BackendUnavailable("TRITON_INTERPRET is set, which is for tests on the CPU")
    check_scan(scan, device_type, channels=TILE_BLOCK + 3, length=2 * LEAST * CHUNK + 3, states=WARP_STATES)
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
    """y, the last state (B, E, N) and, if ``keep``, the states before each tile (B, tiles, N, E)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    batch, channels, length = u.shape
    n_states, y = A.shape[1], torch.empty_like(u)
    first = None if initial_state is None else initial_state.detach().float().contiguous()
    if length == 0:
        last = u.new_zeros(batch, channels, n_states, dtype=torch.float32) if first is None else first.clone()
        return y, last, last
    last = torch.empty(batch, channels, n_states, device=u.device)
    tiles, kind = triton.cdiv(length, CHUNK), torch.bfloat16 if u.dtype is torch.bfloat16 else torch.float32
    states = torch.empty(batch, tiles, n_states, channels, dtype=kind, device=u.device) if keep else last
    gate = u if z is None else z  # never read where absent
    walk = _Walk(u, n_states)
    tensors = (u, delta, gate, y, _rates(A), walk.by_token(B), walk.by_token(C), _vector(D, u), _vector(delta_bias, u))
    with _on(u.device):
        for local in walk.launches():
            forward_kernel[walk.grid(local)](
                *tensors, last if first is None else first, last, states, walk.ends, walk.sums, *walk.sizes,
                *u.stride(), *delta.stride(), *gate.stride(), *y.stride(),
                HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, HAS_FIRST=first is not None,
                SOFTPLUS=softplus, REVERSE=reverse, KEEP=keep, LOCAL=local, **walk.options,
            )  # fmt: skip
    return y, last, states


def backward(
    inputs: ScanInputs,
    states: Tensor,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    softplus: bool,
    reverse: bool,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine inputs; those of absent ones mean nothing. The sums for A, D and the bias cost extra."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    batch, channels, length = u.shape
    n_states, tiles = A.shape[1], triton.cdiv(length, CHUNK)
    want_A, want_D, want_bias = wanted[2], wanted[5] and D is not None, wanted[7] and delta_bias is not None
    if length == 0:
        first = torch.zeros(batch, channels, n_states, device=u.device) if grad_last is None else grad_last
        return *(None if t is None else torch.zeros_like(t) for t in inputs[:-1]), first
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    gate, grad_z = (u, grad_u) if z is None else (z, torch.empty_like(z))  # never read or written where absent
    grad_y = torch.zeros((), device=u.device).expand(u.shape) if grad_y is None else grad_y
    rates, bias = _rates(A), _vector(delta_bias, u)
    flags = {"HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None, "SOFTPLUS": softplus, "REVERSE": reverse}

    adjoints, grad_first = torch.empty_like(states), torch.empty(batch, channels, n_states, device=u.device)
    last = grad_first if grad_last is None else grad_last.float().contiguous()  # never read where absent
    walk = _Walk(u, n_states)
    by_token = walk.by_token(C)
    tensors = (delta, gate, grad_y, rates, by_token, bias, last, grad_first, adjoints, walk.ends, walk.sums)
    block = max(TILE_BLOCK, triton.next_power_of_2(n_states) // 2)  # bounds the room for dB and dC
    blocks = triton.cdiv(channels, block)
    parts = torch.empty(2, batch, blocks, n_states, length, device=u.device)
    part_A = torch.empty(states.shape, device=u.device) if want_A else states  # never written where not wanted
    part_D, part_bias = torch.empty(2, batch, tiles, channels, device=u.device)
    with _on(u.device):
        for local in walk.launches():
            adjoint_kernel[walk.grid(local)](
                *tensors, *walk.sizes, *delta.stride(), *gate.stride(), *grad_y.stride(),
                HAS_LAST=grad_last is not None, LOCAL=local, **flags, **walk.options,
            )  # fmt: skip
        tile_kernel[(blocks, tiles, batch)](
            u, delta, gate, grad_y, grad_u, grad_delta, grad_z, rates, walk.by_token(B), by_token,
            _vector(D, u), bias, states, adjoints, *parts, part_A, part_D, part_bias,
            length, channels, n_states,
            *u.stride(), *delta.stride(), *gate.stride(), *grad_y.stride(),
            *grad_u.stride(), *grad_delta.stride(), *grad_z.stride(),
            HAS_D=D is not None, WANT_A=want_A, WANT_D=want_D, WANT_BIAS=want_bias, **flags,
            CHUNK=CHUNK, BLOCK=block, STATES=walk.states, num_warps=block // TILE_BLOCK, num_stages=1,
        )  # fmt: skip
    grad_B, grad_C = parts.sum(2)
    return (
        grad_u,
        grad_delta,
        part_A.sum((0, 1)).t() if want_A else None,
        grad_B,
        grad_C,
        part_D.sum((0, 1)) if want_D else None,
        grad_z,
        part_bias.sum((0, 1)) if want_bias else None,
        grad_first,
    )


class _Walk:
    """How ``forward_kernel`` and ``adjoint_kernel`` are launched for u (B, E, L), and the room between two launches."""

    def __init__(self, u: Tensor, n_states: int) -> None:
        self.batch, channels, length = u.shape
        self.device, self.blocks, tiles = u.device, triton.cdiv(channels, BLOCK), triton.cdiv(length, CHUNK)
        wanted = PROGRAMS * _multiprocessors(u.device) // (self.blocks * self.batch)
        self.tiles = triton.cdiv(tiles, max(1, min(wanted, tiles // LEAST)))  # in a segment
        self.segments = triton.cdiv(tiles, self.tiles)
        self.sizes = length, channels, n_states, self.segments, self.tiles
        self.ends = torch.empty(self.batch, self.segments, n_states, channels, device=u.device)
        self.sums = torch.empty(self.batch, self.segments, channels, device=u.device)
        self.states = triton.next_power_of_2(n_states)
        self.options = {
            "CHUNK": CHUNK, "BLOCK": BLOCK, "STATES": self.states, "UNROLL": UNROLL, "STAGES": STAGES,
            "num_warps": max(1, min(32, self.states // WARP_STATES)), "num_stages": 1,
        }  # fmt: skip

    def launches(self) -> tuple[bool, ...]:
        """The values of LOCAL."""
        return (False,) if self.segments == 1 else (True, False)

    def grid(self, local: bool) -> tuple[int, int, int]:
        return self.blocks, self.segments - local, self.batch

    def by_token(self, tensor: Tensor) -> Tensor:
        """B or C (B, N, L) → (B, L, STATES) in float32: a lane reads all states of a token at once."""
        batch, n_states, length = tensor.shape
        if n_states == self.states:
            return tensor.detach().mT.float().contiguous()
        padded = tensor.new_zeros(batch, length, self.states, dtype=torch.float32)
        padded[..., :n_states] = tensor.mT
        return padded


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    properties = None if device.type == "cpu" else torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", 64)


scan = differentiable(forward, backward)


def _rates(A: Tensor) -> Tensor:
    """(E, N) -> (N, E), so that the lanes of a warp read neighbours."""
    return A.detach().float().t().contiguous()


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
