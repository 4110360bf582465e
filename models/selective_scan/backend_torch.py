"""The selective scan in plain PyTorch, for any device: chunk by chunk, with a hand-written backward.

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
from torch.autograd.function import FunctionCtx, once_differentiable

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


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """See ``selective_scan.selective_scan``. Returns y (B, E, L) and the last state (B, E, N)."""
    return _ChunkedScan.apply(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if u.dtype is torch.float64 else torch.float32
        batch, channels, length = u.shape
        if initial_state is None:
            state = u.new_zeros(batch, channels, A.shape[1], dtype=dtype)
        else:
            state = initial_state.to(dtype, copy=True)
        inputs = (u, delta, A.to(dtype), B, C, delta_bias, delta_softplus, reverse)
        y = torch.empty_like(u)
        entries = []
        for span in _spans(length, reverse):
            entries.append(state)
            chunk = _run_chunk(*inputs, state, span)
            out = _output(chunk, D)
            if z is not None:
                out = out * F.silu(_read(z, span, reverse, dtype))
            _write(y, out, span, reverse)
            state = chunk.states[-1].clone()
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, *entries)
        ctx.dtype, ctx.delta_softplus, ctx.reverse = dtype, delta_softplus, reverse
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, *entries = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            grads = _backward(
                (u, delta, A, B, C, D, z, delta_bias),
                entries,
                grad_y,
                grad_last,
                ctx.dtype,
                ctx.delta_softplus,
                ctx.reverse,
            )
        *grads, carry = grads
        initial = None if ctx.initial_dtype is None else carry.to(ctx.initial_dtype)
        return (*grads, initial, None, None)


def _backward(
    inputs: tuple[Tensor | None, ...],
    entries: list[Tensor],
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    dtype: torch.dtype,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the eight inputs (None for absent ones), then that of the initial state.

    With dy_t the gradient of <C_t, h_t>, the state's adjoint is g_t = dy_t C_t + exp(Δ_{t+1} A) g_{t+1}.
    """
    u, delta, A, B, C, D, z, delta_bias = inputs
    a = A.to(dtype)
    grad_u, grad_delta, grad_B, grad_C = (torch.empty_like(t) for t in (u, delta, B, C))
    grad_z = None if z is None else torch.empty_like(z)
    grad_A = torch.zeros_like(a)
    grad_D, grad_bias = (u.new_zeros(u.shape[1], dtype=dtype) for _ in range(2))
    carry = u.new_zeros(u.shape[0], *A.shape, dtype=dtype)  # gradient of the state that leaves the chunk
    if grad_last is not None:
        carry = carry + grad_last
    spans = _spans(u.shape[2], reverse)
    for span, entry in zip(reversed(spans), reversed(entries), strict=True):
        chunk = _run_chunk(u, delta, a, B, C, delta_bias, delta_softplus, reverse, entry, span)
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
        if delta_softplus:
            d_delta = torch.where(chunk.raw > 20, d_delta, d_delta * torch.sigmoid(chunk.raw))
        grad_bias += d_delta.sum((0, 1))
        _write(grad_u, du, span, reverse)
        _write(grad_delta, d_delta, span, reverse)
    grad_D = None if D is None else grad_D.to(D.dtype)
    grad_bias = None if delta_bias is None else grad_bias.to(delta_bias.dtype)
    return grad_u, grad_delta, grad_A.to(A.dtype), grad_B, grad_C, grad_D, grad_z, grad_bias, carry


def _run_chunk(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    entry: Tensor,
    span: slice,
) -> _Chunk:
    """Run the recurrence over one chunk from the state ``entry`` (B, E, N)."""
    u, delta, B, C = (_read(t, span, reverse, A.dtype) for t in (u, delta, B, C))
    raw = delta if delta_bias is None else delta + delta_bias.to(A.dtype)
    delta = F.softplus(raw, threshold=20) if delta_softplus else raw
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
