"""Triton kernels of the selective scan, for ``backend_triton``.

Letters: B batch, E channels, L tokens, N state. "Step" counts tokens in the order of the walk.
One program is one sample × BLOCK channels, in one warp: a lane owns a channel. It walks over the sequence in
tiles of CHUNK tokens × BLOCK channels, and inside a tile takes the N states one after the other. The recurrence
inside a tile is an associative scan over the tile's tokens, which lie in the registers of one lane: no exchange
between lanes, and CHUNK independent exponentials for the scheduler. Only dB and dC need sums over lanes.
Tiles follow each other, so a small B·E leaves a large GPU partly idle; it has little work to do then.

The carried state, and in backward the carried adjoint and the sum for dA, pass from tile to tile through global
memory (the first-level cache, in effect): with them in registers a large N would spill. Each tile reads one
slot and writes the next, with a barrier between tiles.

Decays are only multiplied, never divided by, and h_t − Δ_t B_t u_t is never formed: it cancels when the decay
is small. The tuples that the scans combine carry what would need it.

Nothing here needs more than basic Triton: no tensor cores, descriptors or libdevice calls. ``TRITON_INTERPRET``
set before the import makes the same functions run on CPU tensors, for tests.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# 2 artanh(s) / s as a polynomial in s**2 on [0, 1/9], for log1p; relative error 4e-9 (as in kernels_numba).
_LOG1P_4 = tl.constexpr(0.28157778313522575)
_LOG1P_3 = tl.constexpr(0.2796515775679465)
_LOG1P_2 = tl.constexpr(0.4002459522981895)
_LOG1P_1 = tl.constexpr(0.6666632164140144)
_LOG1P_0 = tl.constexpr(2.000000007681758)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), linear above 20. The hardware logarithm near 1 would cost small steps their precision."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    s2 = s * s
    series = (((_LOG1P_4 * s2 + _LOG1P_3) * s2 + _LOG1P_2) * s2 + _LOG1P_1) * s2 + _LOG1P_0
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + s * series)


@triton.jit
def _follow(decay_a, state_a, decay_b, state_b):
    """Span a, then b: (product of the decays, state at the end if it was zero at the start)."""
    return decay_a * decay_b, decay_b * state_a + state_b


@triton.jit
def _follow_kept(decay_a, kept_a, input_a, decay_b, kept_b, input_b):
    """As ``_follow``, with the final state as two parts: what the last token kept, and what it put in."""
    return decay_a * decay_b, kept_b + decay_b * (kept_a + input_a), input_b


@triton.jit
def _precede(reach_a, adjoint_a, decay_a, reach_b, adjoint_b, decay_b):
    """Span b comes before a in the walk; the adjoint runs from a to b.

    (product of the decays after the first token, adjoint at the first token, decay of the first token).
    """
    return reach_b * decay_a * reach_a, adjoint_b + reach_b * decay_a * adjoint_a, decay_b


@triton.jit
def _tile(pointer, stride_b, stride_e, stride_t, sample, e, t, here):
    """(CHUNK, BLOCK) of a (B, E, L) tensor, in float32; zeros outside."""
    offsets = sample * stride_b + e[None, :] * stride_e + t[:, None] * stride_t
    return tl.load(pointer + offsets, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(pointer, stride_b, stride_e, stride_t, sample, e, t, here, value):
    offsets = sample * stride_b + e[None, :] * stride_e + t[:, None] * stride_t
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=here)


# Sizes and strides as plain numbers: a fast path for contiguous channels would give each lane several channels,
# and the scan would need exchanges between lanes. It also saves compiling again for every length.
_SIZES = ["length", "channels", "n_states", "slots"]
_STRIDES = [f"{name}_{axis}" for name in ("u", "delta", "z", "y", "gy", "gu", "gd", "gz") for axis in "bet"]


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def forward_kernel(
    u, delta, z, y,  # (B, E, L), any strides
    A,  # (N, E)
    B, C,  # (B, N, padded), in the order of the walk, zeros after step L
    D, delta_bias,  # (E,)
    states,  # (B, slots, N, E): slot 0 filled; each tile reads its slot and fills the next
    length, padded, channels, n_states, slots,
    u_b, u_e, u_t,
    delta_b, delta_e, delta_t,
    z_b, z_e, z_t,
    y_b, y_e, y_t,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    KEEP: tl.constexpr,  # a slot per tile, else two used in turn
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y and the states between tiles."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    in_e = e < channels
    step = tl.arange(0, CHUNK)
    plane = (n_states * channels).to(tl.int64)  # a slot
    states += sample * slots * plane + e
    B += sample * n_states * padded
    C += sample * n_states * padded
    if HAS_D:
        skip = tl.load(D + e, mask=in_e, other=0.0)
    if HAS_BIAS:
        bias = tl.load(delta_bias + e, mask=in_e, other=0.0)

    for chunk in range(tl.cdiv(length, CHUNK)):
        steps = chunk * CHUNK + step
        t = (length - 1 - steps if REVERSE else steps).to(tl.int64)
        here = (steps < length)[:, None] & in_e[None, :]
        x = _tile(u, u_b, u_e, u_t, sample, e, t, here)
        size = _tile(delta, delta_b, delta_e, delta_t, sample, e, t, here)
        if HAS_BIAS:
            size += bias[None, :]
        if SOFTPLUS:
            size = _softplus(size)
        size = tl.where(here, size, 0.0)  # a step of size zero leaves the state alone
        drive = size * x
        out = x * skip[None, :] if HAS_D else tl.zeros_like(x)
        if KEEP:
            entry, leave = states + chunk * plane, states + (chunk + 1) * plane
        else:
            entry, leave = states + (chunk % 2) * plane, states + ((chunk + 1) % 2) * plane
        for n in range(n_states):
            rate = tl.load(A + n * channels + e, mask=in_e, other=0.0) * LOG2E
            b = tl.load(B + n * padded + steps)
            c = tl.load(C + n * padded + steps)
            before = tl.load(entry + n * channels, mask=in_e, other=0.0)
            decay, state = tl.associative_scan((tl.exp2(size * rate[None, :]), drive * b[:, None]), 0, _follow)
            state += decay * before[None, :]
            out += state * c[:, None]
            last = tl.sum(tl.where(step[:, None] == CHUNK - 1, state, 0.0), axis=0)
            tl.store(leave + n * channels, last, mask=in_e)
        if HAS_Z:
            gate = _tile(z, z_b, z_e, z_t, sample, e, t, here)
            out *= gate * tl.sigmoid(gate)
        _store_tile(y, y_b, y_e, y_t, sample, e, t, here, out)
        tl.debug_barrier()


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def backward_kernel(
    u, delta, z, grad_y, grad_u, grad_delta, grad_z,  # (B, E, L), any strides
    A,  # (N, E)
    B, C,  # (B, N, padded), in the order of the walk, zeros after step L
    D, delta_bias,  # (E,)
    states,  # (B, slots, N, E), from forward
    carry, sum_A,  # (B, 2, N, E): slot 0 filled with the last state's gradient and with zeros
    part_B, part_C,  # (B, blocks, N, padded), sums over a block's channels
    grad_D, grad_bias,  # (B, E)
    length, padded, channels, n_states, slots,
    u_b, u_e, u_t,
    delta_b, delta_e, delta_t,
    z_b, z_e, z_t,
    gy_b, gy_e, gy_t,
    gu_b, gu_e, gu_t,
    gd_b, gd_e, gd_t,
    gz_b, gz_e, gz_t,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients, walking the tiles backward; each tile's states are computed again from its slot.

    The initial state's gradient and dA of each sample end in slot (number of tiles) % 2.
    """
    block = tl.program_id(0).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    in_e = e < channels
    step = tl.arange(0, CHUNK)
    plane = (n_states * channels).to(tl.int64)
    states += sample * slots * plane + e
    carry += sample * 2 * plane + e
    sum_A += sample * 2 * plane + e
    B += sample * n_states * padded
    C += sample * n_states * padded
    part_B += (sample * tl.num_programs(0) + block) * n_states * padded
    part_C += (sample * tl.num_programs(0) + block) * n_states * padded
    if HAS_D:
        skip = tl.load(D + e, mask=in_e, other=0.0)
    if HAS_BIAS:
        bias = tl.load(delta_bias + e, mask=in_e, other=0.0)
    sum_D = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)

    chunks = tl.cdiv(length, CHUNK)
    for walked in range(chunks):
        chunk = chunks - 1 - walked
        steps = chunk * CHUNK + step
        t = (length - 1 - steps if REVERSE else steps).to(tl.int64)
        here = (steps < length)[:, None] & in_e[None, :]
        x = _tile(u, u_b, u_e, u_t, sample, e, t, here)
        raw = _tile(delta, delta_b, delta_e, delta_t, sample, e, t, here)
        if HAS_BIAS:
            raw += bias[None, :]
        size = tl.where(here, _softplus(raw) if SOFTPLUS else raw, 0.0)
        dy = _tile(grad_y, gy_b, gy_e, gy_t, sample, e, t, here)
        if HAS_Z:
            gate = _tile(z, z_b, z_e, z_t, sample, e, t, here)
            sigmoid = tl.sigmoid(gate)
            slope = dy * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            dy *= gate * sigmoid
            out = x * skip[None, :] if HAS_D else tl.zeros_like(x)
        drive = size * x
        grad_drive = tl.zeros_like(x)
        grad_size = tl.zeros_like(x)
        entry = states + chunk * plane
        slot, next_slot = (walked % 2) * plane, ((walked + 1) % 2) * plane
        for n in range(n_states):
            rate = tl.load(A + n * channels + e, mask=in_e, other=0.0)
            b = tl.load(B + n * padded + steps)[:, None]
            c = tl.load(C + n * padded + steps)[:, None]
            before = tl.load(entry + n * channels, mask=in_e, other=0.0)
            after = tl.load(carry + slot + n * channels, mask=in_e, other=0.0)
            decay = tl.exp2(size * (rate * LOG2E)[None, :])
            reach, kept, put = tl.associative_scan((decay, tl.zeros_like(decay), drive * b), 0, _follow_kept)
            kept += reach * before[None, :]
            state = kept + put
            tl.store(part_C + n * padded + steps, tl.sum(dy * state, axis=1))
            if HAS_Z:
                out += state * c
            # Not reverse=True: that exchanges all lanes, while flipping registers costs nothing.
            reach, adjoint, _ = tl.associative_scan(
                (tl.full(decay.shape, 1.0, tl.float32), tl.flip(dy * c, 0), tl.flip(decay, 0)), 0, _precede
            )
            adjoint = tl.flip(adjoint + reach * after[None, :], 0)
            tl.store(part_B + n * padded + steps, tl.sum(drive * adjoint, axis=1))
            grad_drive += adjoint * b
            flow = adjoint * kept  # gradient of Δ A
            grad_size += flow * rate[None, :]
            so_far = tl.load(sum_A + slot + n * channels, mask=in_e, other=0.0)
            tl.store(sum_A + next_slot + n * channels, so_far + tl.sum(flow * size, axis=0), mask=in_e)
            leaving = tl.sum(tl.where(step[:, None] == 0, decay * adjoint, 0.0), axis=0)
            tl.store(carry + next_slot + n * channels, leaving, mask=in_e)
        dx = grad_drive * size
        if HAS_D:
            dx += dy * skip[None, :]
            sum_D += tl.sum(dy * x, axis=0)
        grad_size += grad_drive * x
        if SOFTPLUS:
            grad_size = tl.where(raw > 20.0, grad_size, grad_size * tl.sigmoid(raw))
        sum_bias += tl.sum(tl.where(here, grad_size, 0.0), axis=0)
        _store_tile(grad_u, gu_b, gu_e, gu_t, sample, e, t, here, dx)
        _store_tile(grad_delta, gd_b, gd_e, gd_t, sample, e, t, here, grad_size)
        if HAS_Z:
            _store_tile(grad_z, gz_b, gz_e, gz_t, sample, e, t, here, slope * out)
        tl.debug_barrier()

    tl.store(grad_D + sample * channels + e, sum_D, mask=in_e)
    tl.store(grad_bias + sample * channels + e, sum_bias, mask=in_e)


@triton.jit
def update_kernel(
    state,  # (B, E, N), any strides, overwritten
    u, delta, z, y,  # (B, E), any strides
    A,  # (E, N), any strides
    B, C,  # (B, N), any strides
    D, delta_bias,  # (E,)
    channels, n_states,
    state_b, state_e, state_n,
    u_b, u_e,
    delta_b, delta_e,
    z_b, z_e,
    y_b, y_e,
    A_e, A_n,
    B_b, B_n,
    C_b, C_n,
    D_e, bias_e,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr, STATES: tl.constexpr,  # STATES: N rounded up to a power of two
):  # fmt: skip
    """One step of the recurrence."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    in_e, in_n = e < channels, n < n_states
    both = in_e[:, None] & in_n[None, :]
    x = tl.load(u + sample * u_b + e * u_e, mask=in_e, other=0.0).to(tl.float32)
    size = tl.load(delta + sample * delta_b + e * delta_e, mask=in_e, other=0.0).to(tl.float32)
    if HAS_BIAS:
        size += tl.load(delta_bias + e * bias_e, mask=in_e, other=0.0).to(tl.float32)
    if SOFTPLUS:
        size = _softplus(size)
    rate = tl.load(A + e[:, None] * A_e + n[None, :] * A_n, mask=both, other=0.0).to(tl.float32) * LOG2E
    b = tl.load(B + sample * B_b + n * B_n, mask=in_n, other=0.0).to(tl.float32)
    c = tl.load(C + sample * C_b + n * C_n, mask=in_n, other=0.0).to(tl.float32)
    place = state + sample * state_b + e[:, None] * state_e + n[None, :] * state_n
    h = tl.load(place, mask=both, other=0.0) * tl.exp2(size[:, None] * rate) + (size * x)[:, None] * b[None, :]
    tl.store(place, h, mask=both)
    out = tl.sum(h * c[None, :], axis=1)
    if HAS_D:
        out += tl.load(D + e * D_e, mask=in_e, other=0.0).to(tl.float32) * x
    if HAS_Z:
        gate = tl.load(z + sample * z_b + e * z_e, mask=in_e, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(y + sample * y_b + e * y_e, out.to(y.dtype.element_ty), mask=in_e)
