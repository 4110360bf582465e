"""The selective scan in PyTorch operations, for any device: chunk by chunk, with a hand-written backward.

Letters: B batch, E channels, L tokens, N state, T tokens of one chunk.
Inside a chunk the tensors are time-major, (T, B, E) and (T, B, E, N), so that a step of the recurrence is one
fused multiply-add over contiguous memory. Decays are only ever multiplied, never divided by or accumulated as
logarithms, so extreme step sizes cannot overflow. For backward only the inputs and the state at each chunk's
start are kept, 1/CHUNK of B·L·E·N; everything else is computed again, one chunk at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.selective_scan import ScanInputs, differentiable

CHUNK = 32


class _Chunk(NamedTuple):
    """What both passes compute from a chunk's inputs, in the order of the walk."""

    u: Tensor  # (T, B, E)
    raw: Tensor  # (T, B, E), delta + bias
    delta: Tensor  # (T, B, E), after softplus
    B: Tensor  # (T, B, N)
    C: Tensor  # (T, B, N)
    decay: Tensor  # (T, B, E, N)
    states: Tensor  # (T + 1, B, E, N), the first is the state on entry


def forward(inputs: ScanInputs, softplus: bool, reverse: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and the states at the chunks' starts (chunks, B, E, N), none unless kept."""
    u, z, initial_state = inputs.u, inputs.z, inputs.initial_state
    dtype = torch.float64 if u.dtype is torch.float64 else torch.float32
    inputs = inputs._replace(A=inputs.A.to(dtype))
    state = u.new_zeros(u.shape[0], *inputs.A.shape, dtype=dtype)
    if initial_state is not None:
        state.copy_(initial_state)
    y = torch.empty_like(u)
    spans = _spans(u.shape[2], reverse)
    entries = state.new_empty(len(spans) if keep else 0, *state.shape)
    for i, span in enumerate(spans):
        if keep:
            entries[i] = state
        chunk = _run_chunk(inputs, state, span, softplus, reverse)
        out = _output(chunk, inputs.D)
        if z is not None:
            out = out * F.silu(_read(z, span, reverse, dtype))
        _write(y, out, span, reverse)
        state = chunk.states[-1].clone()
    return y, state, entries


def backward(
    inputs: ScanInputs,
    entries: Tensor,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    softplus: bool,
    reverse: bool,
    _wanted: tuple[bool, ...],  # all are computed
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine inputs; those of absent ones mean nothing.

    With dy_t the gradient of <C_t, h_t>, the state's adjoint is g_t = dy_t C_t + exp(Δ_{t+1} A) g_{t+1}.
    """
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    dtype = entries.dtype
    a = A.to(dtype)
    inputs = inputs._replace(A=a)
    grad_u, grad_delta, grad_B, grad_C = (torch.empty_like(t) for t in (u, delta, B, C))
    grad_z = None if z is None else torch.empty_like(z)
    grad_A = torch.zeros_like(a)
    grad_D, grad_bias = (u.new_zeros(u.shape[1], dtype=dtype) for _ in range(2))
    carry = u.new_zeros(u.shape[0], *A.shape, dtype=dtype)  # gradient of the state that leaves the chunk
    if grad_last is not None:
        carry = carry + grad_last
    spans = _spans(u.shape[2], reverse)
    for i, span in reversed(list(enumerate(spans))):
        chunk = _run_chunk(inputs, entries[i], span, softplus, reverse)
        dy = torch.zeros_like(chunk.u) if grad_y is None else _read(grad_y, span, reverse, dtype)
        if z is not None:
            gate = _read(z, span, reverse, dtype)
            sigmoid = torch.sigmoid(gate)
            silu_slope = sigmoid * (1 + gate * (1 - sigmoid))
            _write(grad_z, dy * _output(chunk, D) * silu_slope, span, reverse)
            dy = dy * gate * sigmoid
        g = dy[..., None] * chunk.C[:, :, None, :]
        g[-1] += carry
        steps, decays = g.unbind(0), chunk.decay.unbind(0)
        for t in range(len(steps) - 2, -1, -1):
            steps[t].addcmul_(decays[t + 1], steps[t + 1])
        carry = decays[0] * steps[0]

        _write(grad_C, torch.einsum("tbe,tben->tbn", dy, chunk.states[1:]), span, reverse)
        _write(grad_B, torch.einsum("tbe,tben->tbn", chunk.delta * chunk.u, g), span, reverse)
        drive = (g @ chunk.B[..., None]).squeeze(-1)  # gradient of Δ u
        g.mul_(chunk.states[:-1]).mul_(chunk.decay)  # from here on the gradient of Δ A
        d_delta = drive * chunk.u + torch.einsum("tben,en->tbe", g, a)
        grad_A += torch.einsum("tben,tbe->en", g, chunk.delta)
        du = drive * chunk.delta
        if D is not None:
            du = du + dy * D.to(dtype)
            grad_D += (dy * chunk.u).sum((0, 1))
        if softplus:
            d_delta = torch.where(chunk.raw > 20, d_delta, d_delta * torch.sigmoid(chunk.raw))
        grad_bias += d_delta.sum((0, 1))
        _write(grad_u, du, span, reverse)
        _write(grad_delta, d_delta, span, reverse)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, carry


scan = differentiable(forward, backward)


def _run_chunk(inputs: ScanInputs, entry: Tensor, span: slice, softplus: bool, reverse: bool) -> _Chunk:
    """Run the recurrence over one chunk from the state ``entry`` (B, E, N); A has the dtype of the state."""
    A, delta_bias = inputs.A, inputs.delta_bias
    u, delta, B, C = (_read(t, span, reverse, A.dtype) for t in (inputs.u, inputs.delta, inputs.B, inputs.C))
    raw = delta if delta_bias is None else delta + delta_bias.to(A.dtype)
    delta = F.softplus(raw, threshold=20) if softplus else raw
    decay = torch.exp_(delta[..., None] * A)
    states = decay.new_empty(decay.shape[0] + 1, *entry.shape)
    states[0] = entry
    torch.mul((delta * u)[..., None], B[:, :, None, :], out=states[1:])
    steps = states.unbind(0)
    for t, step_decay in enumerate(decay.unbind(0)):
        steps[t + 1].addcmul_(step_decay, steps[t])
    return _Chunk(u, raw, delta, B, C, decay, states)


def _output(chunk: _Chunk, D: Tensor | None) -> Tensor:
    """y before the gate, (T, B, E)."""
    y = (chunk.states[1:] @ chunk.C[..., None]).squeeze(-1)
    return y if D is None else y + D.to(y.dtype) * chunk.u


def _spans(length: int, reverse: bool) -> list[slice]:
    spans = [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
    return spans[::-1] if reverse else spans


def _read(tensor: Tensor, span: slice, reverse: bool, dtype: torch.dtype) -> Tensor:
    """(B, X, L) -> time-major (T, B, X) of the chunk, in the order of the walk."""
    tile = tensor[:, :, span].permute(2, 0, 1).to(dtype)
    return tile.flip(0) if reverse else tile


def _write(tensor: Tensor, tile: Tensor, span: slice, reverse: bool) -> None:
    tensor[:, :, span] = (tile.flip(0) if reverse else tile).permute(1, 2, 0)
