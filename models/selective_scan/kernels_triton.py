"""Triton kernels of the selective scan, for ``backend_triton``.

Letters: B batch, E channels, L tokens, N state. "Step" counts tokens in the order of the walk; a tile is CHUNK steps.

Two kernels walk: ``forward_kernel`` along the sequence with the state, ``adjoint_kernel`` back along it with the
state's gradient. A program is one sample × BLOCK channels × a segment of the sequence, in one warp for up to 16 states:
a lane owns a channel and holds its N states in registers, so a step is N independent exponentials and multiply-adds.
The loads of later steps are on their way meanwhile: u, Δ and z in registers; B and C, which all lanes read, in shared
memory, where they do not queue behind the others. Both kernels leave what they carry at the border of every tile.

A long sequence of a small batch is cut into segments, to fill the GPU. A first launch (LOCAL) walks each as if nothing
preceded it; the second starts each from what the others before it left: the decay over a segment is one exponential of
the sum of its Δ.

``tile_kernel`` then computes all gradients, each tile alone: it knows the state before and the adjoint after it. It
takes the states one after the other, along the tile's steps and back, a step in one register for each channel of the
lane. Only dB and dC need sums over lanes, five exchanges each, which the channels of a lane share.

Decays are only multiplied, never divided by, and h_t − Δ_t B_t u_t is never formed: it cancels when the decay
is small.

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
def _softplus_slope(y):
    """The derivative of softplus from its value y: 1 - exp(-y), as a series where that would cancel."""
    series = y * (1.0 - y * (0.5 - y * (1.0 / 6 - y * (1.0 / 24 - y * (1.0 / 120 - y / 720)))))
    return tl.where(y > 0.25, 1.0 - tl.exp(-y), series)


@triton.jit
def _row(pointer, stride_t, step, length, in_e, REVERSE: tl.constexpr):
    """(BLOCK,) of a token, in the tensor's dtype; zeros outside."""
    t = length - 1 - step if REVERSE else step
    return tl.load(pointer + t.to(tl.int64) * stride_t, mask=in_e & (step >= 0) & (step < length), other=0.0)


@triton.jit
def _rows(pointer, stride_t, first, length, in_e, REVERSE: tl.constexpr, STEPS: tl.constexpr):
    """The tokens of STEPS steps from ``first`` on."""
    rows = ()
    for i in tl.static_range(STEPS):
        rows = rows + (_row(pointer, stride_t, first + i, length, in_e, REVERSE),)
    return rows


@triton.jit
def _vector(pointer, step, length, n, REVERSE: tl.constexpr, STATES: tl.constexpr):
    """(STATES,) of a token of B or C. Beyond the end the last one, which meets a step size of zero."""
    step = tl.minimum(tl.maximum(step, 0), length - 1)
    t = length - 1 - step if REVERSE else step
    return tl.load(pointer + t * STATES + n)


@triton.jit
def _numbers(pointer, first, length, n, REVERSE: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr):
    """State n of B or C at STEPS steps from ``first`` on. Beyond the end the last one, which meets zeros."""
    numbers = ()
    for i in tl.static_range(STEPS):
        step = tl.minimum(first + i, length - 1)
        t = length - 1 - step if REVERSE else step
        numbers = numbers + (tl.load(pointer + t * STATES + n),)
    return numbers


@triton.jit
def _size(raw, bias, inside, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Δ; zero outside, where a step leaves the state alone."""
    size = raw.to(tl.float32)
    if HAS_BIAS:
        size += bias
    if SOFTPLUS:
        size = _softplus(size)
    return tl.where(inside, size, 0.0)


# Plain numbers, which keep the compiler from choosing by them: compiled once for all lengths. For the walks also the
# number of channels: a lane that loaded four neighbours at once would share its states with other lanes.
_PLAIN = ["length", "n_states", "segments", "segment"]


@triton.jit(do_not_specialize=[*_PLAIN, "channels"])
def forward_kernel(
    u, delta, z, y,  # (B, E, L), any strides
    A,  # (N, E)
    B, C,  # (B, L, STATES), zeros from state N on
    D, delta_bias,  # (E,)
    first, last,  # (B, E, N): before the first step and after the last
    states,  # (B, tiles, N, E): before each tile
    ends, sums,  # (B, segments, N, E) the state after each segment if it was zero before; (B, segments, E) sums of Δ
    length, channels, n_states, segments,
    segment,  # tiles in a segment
    u_b, u_e, u_t,
    delta_b, delta_e, delta_t,
    z_b, z_e, z_t,
    y_b, y_e, y_t,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    KEEP: tl.constexpr,  # write states
    LOCAL: tl.constexpr,  # write ends and sums, nothing else
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y, the last state, and the states between tiles."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    part = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    in_e = e < channels
    both = (n < n_states)[:, None] & in_e[None, :]
    plane = n.to(tl.int64)[:, None] * channels + e[None, :]
    turned = e[None, :] * n_states + n[:, None]
    size_of = (n_states * channels).to(tl.int64)
    u += sample * u_b + e * u_e
    delta += sample * delta_b + e * delta_e
    B += sample * length * STATES
    ends += sample * segments * size_of + plane
    sums += sample * segments * channels + e
    rate = tl.load(A + plane, mask=both, other=0.0) * LOG2E
    bias = tl.load(delta_bias + e, mask=in_e, other=0.0) if HAS_BIAS else 0.0
    state = tl.zeros((STATES, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if not LOCAL:
        z += sample * z_b + e * z_e
        y += sample * y_b + e * y_e
        C += sample * length * STATES
        states += sample * tl.cdiv(length, CHUNK) * size_of + plane
        skip = tl.load(D + e, mask=in_e, other=0.0) if HAS_D else 0.0
        if HAS_FIRST:
            state = tl.load(first + sample * size_of + turned, mask=both, other=0.0)
        for before in range(part):
            summed = tl.load(sums + before * channels, mask=in_e, other=0.0)
            left = tl.load(ends + before * size_of, mask=both, other=0.0)
            state = tl.exp2(summed[None, :] * rate) * state + left

    begin = part * segment * CHUNK
    xs = _rows(u, u_t, begin, length, in_e, REVERSE, UNROLL)
    raws = _rows(delta, delta_t, begin, length, in_e, REVERSE, UNROLL)
    if HAS_Z and not LOCAL:
        gates = _rows(z, z_t, begin, length, in_e, REVERSE, UNROLL)
    for start in tl.range(begin, tl.minimum(begin + segment * CHUNK, length), UNROLL, num_stages=STAGES):
        after = start + UNROLL
        next_xs = _rows(u, u_t, after, length, in_e, REVERSE, UNROLL)
        next_raws = _rows(delta, delta_t, after, length, in_e, REVERSE, UNROLL)
        if HAS_Z and not LOCAL:
            next_gates = _rows(z, z_t, after, length, in_e, REVERSE, UNROLL)
        if KEEP and not LOCAL and start % CHUNK == 0:
            tl.store(states + (start // CHUNK) * size_of, state.to(states.dtype.element_ty), mask=both)
        for i in tl.static_range(UNROLL):
            step = start + i
            x = xs[i].to(tl.float32)
            size = _size(raws[i], bias, in_e & (step < length), HAS_BIAS, SOFTPLUS)
            b = _vector(B, step, length, n, REVERSE, STATES)
            state = state * tl.exp2(size[None, :] * rate) + (size * x)[None, :] * b[:, None]
            if LOCAL:
                total += size
            else:
                c = _vector(C, step, length, n, REVERSE, STATES)
                out = tl.sum(state * c[:, None], axis=0)
                if HAS_D:
                    out += x * skip
                if HAS_Z:
                    gate = gates[i].to(tl.float32)
                    out *= gate * tl.sigmoid(gate)
                t = length - 1 - step if REVERSE else step
                place = y + t.to(tl.int64) * y_t
                tl.store(place, out.to(y.dtype.element_ty), mask=in_e & (step < length))
        xs, raws = next_xs, next_raws
        if HAS_Z and not LOCAL:
            gates = next_gates

    if LOCAL:
        tl.store(ends + part * size_of, state, mask=both)
        tl.store(sums + part * channels, total, mask=in_e)
    elif part == segments - 1:
        tl.store(last + sample * size_of + turned, state, mask=both)


@triton.jit(do_not_specialize=[*_PLAIN, "channels"])
def adjoint_kernel(
    delta, z, grad_y,  # (B, E, L), any strides
    A,  # (N, E)
    C,  # (B, L, STATES), zeros from state N on
    delta_bias,  # (E,)
    grad_last, grad_first,  # (B, E, N): gradients of the last and of the initial state
    adjoints,  # (B, tiles, N, E): the gradient of the state after each tile
    ends, sums,  # (B, segments, N, E), (B, segments, E), as in forward; here a segment's end is its first step
    length, channels, n_states, segments, segment,
    delta_b, delta_e, delta_t,
    z_b, z_e, z_t,
    gy_b, gy_e, gy_t,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, LOCAL: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of the state at the border of every tile."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    part = tl.program_id(1) + (1 if LOCAL else 0)  # no one asks what the first segment leaves
    sample = tl.program_id(2).to(tl.int64)
    in_e = e < channels
    both = (n < n_states)[:, None] & in_e[None, :]
    plane = n.to(tl.int64)[:, None] * channels + e[None, :]
    turned = e[None, :] * n_states + n[:, None]
    size_of = (n_states * channels).to(tl.int64)
    delta += sample * delta_b + e * delta_e
    z += sample * z_b + e * z_e
    grad_y += sample * gy_b + e * gy_e
    C += sample * length * STATES
    adjoints += sample * tl.cdiv(length, CHUNK) * size_of + plane
    ends += sample * segments * size_of + plane
    sums += sample * segments * channels + e
    rate = tl.load(A + plane, mask=both, other=0.0) * LOG2E
    bias = tl.load(delta_bias + e, mask=in_e, other=0.0) if HAS_BIAS else 0.0
    flow = tl.zeros((STATES, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if not LOCAL:
        if HAS_LAST:
            flow = tl.load(grad_last + sample * size_of + turned, mask=both, other=0.0)
        for behind in range(segments - 1 - part):
            later = segments - 1 - behind
            summed = tl.load(sums + later * channels, mask=in_e, other=0.0)
            left = tl.load(ends + later * size_of, mask=both, other=0.0)
            flow = tl.exp2(summed[None, :] * rate) * flow + left

    begin = part * segment * CHUNK
    stop = tl.minimum(begin + segment * CHUNK, tl.cdiv(length, CHUNK) * CHUNK)
    raws = _rows(delta, delta_t, stop - UNROLL, length, in_e, REVERSE, UNROLL)
    grads = _rows(grad_y, gy_t, stop - UNROLL, length, in_e, REVERSE, UNROLL)
    if HAS_Z:
        gates = _rows(z, z_t, stop - UNROLL, length, in_e, REVERSE, UNROLL)
    for walked in tl.range(0, stop - begin, UNROLL, num_stages=STAGES):
        start = stop - UNROLL - walked
        next_raws = _rows(delta, delta_t, start - UNROLL, length, in_e, REVERSE, UNROLL)
        next_grads = _rows(grad_y, gy_t, start - UNROLL, length, in_e, REVERSE, UNROLL)
        if HAS_Z:
            next_gates = _rows(z, z_t, start - UNROLL, length, in_e, REVERSE, UNROLL)
        if not LOCAL and walked % CHUNK == 0:
            tl.store(adjoints + (start // CHUNK) * size_of, flow.to(adjoints.dtype.element_ty), mask=both)
        for j in tl.static_range(UNROLL):
            step = start + (UNROLL - 1 - j)
            size = _size(raws[UNROLL - 1 - j], bias, in_e & (step < length), HAS_BIAS, SOFTPLUS)
            dy = grads[UNROLL - 1 - j].to(tl.float32)
            if HAS_Z:
                gate = gates[UNROLL - 1 - j].to(tl.float32)
                dy *= gate * tl.sigmoid(gate)
            c = _vector(C, step, length, n, REVERSE, STATES)
            flow = (flow + dy[None, :] * c[:, None]) * tl.exp2(size[None, :] * rate)
            if LOCAL:
                total += size
        raws, grads = next_raws, next_grads
        if HAS_Z:
            gates = next_gates

    if LOCAL:
        tl.store(ends + part * size_of, flow, mask=both)
        tl.store(sums + part * channels, total, mask=in_e)
    elif part == 0:
        tl.store(grad_first + sample * size_of + turned, flow, mask=both)


@triton.jit(do_not_specialize=_PLAIN)
def tile_kernel(
    u, delta, z, grad_y, grad_u, grad_delta, grad_z,  # (B, E, L), any strides
    A,  # (N, E)
    B, C,  # (B, L, STATES)
    D, delta_bias,  # (E,)
    states, adjoints,  # (B, tiles, N, E), before and after each tile
    part_B, part_C,  # (B, blocks, N, L), sums over a block's channels
    part_A,  # (B, tiles, N, E)
    part_D, part_bias,  # (B, tiles, E)
    length, channels, n_states,
    u_b, u_e, u_t,
    delta_b, delta_e, delta_t,
    z_b, z_e, z_t,
    gy_b, gy_e, gy_t,
    gu_b, gu_e, gu_t,
    gd_b, gd_e, gd_t,
    gz_b, gz_e, gz_t,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    WANT_A: tl.constexpr, WANT_D: tl.constexpr, WANT_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """All gradients but those of the states; the tile's states are computed again."""
    block, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    tiles = tl.num_programs(1)
    e = block * BLOCK + tl.arange(0, BLOCK)
    in_e = e < channels
    step = tl.arange(0, CHUNK)
    plane = (n_states * channels).to(tl.int64)
    states += (sample * tiles + chunk) * plane + e
    adjoints += (sample * tiles + chunk) * plane + e
    part_A += (sample * tiles + chunk) * plane + e
    A += e
    B += sample * length * STATES
    C += sample * length * STATES
    steps = chunk * CHUNK + step
    place = length - 1 - steps if REVERSE else steps
    part_B += (sample * tl.num_programs(0) + block) * n_states * length + place
    part_C += (sample * tl.num_programs(0) + block) * n_states * length + place

    zero = tl.zeros((BLOCK,), tl.float32)
    first = chunk * CHUNK
    u += sample * u_b + e * u_e
    delta += sample * delta_b + e * delta_e
    grad_y += sample * gy_b + e * gy_e
    bias = tl.load(delta_bias + e, mask=in_e, other=0.0) if HAS_BIAS else 0.0
    sizes, drives, dys = (), (), ()
    slopes, outs, grad_drives, grad_sizes = (), (), (), ()
    for i in tl.static_range(CHUNK):
        x = _row(u, u_t, first + i, length, in_e, REVERSE).to(tl.float32)
        raw = _row(delta, delta_t, first + i, length, in_e, REVERSE)
        size = _size(raw, bias, in_e & (first + i < length), HAS_BIAS, SOFTPLUS)
        dy = _row(grad_y, gy_t, first + i, length, in_e, REVERSE).to(tl.float32)
        if HAS_Z:
            gate = _row(z + sample * z_b + e * z_e, z_t, first + i, length, in_e, REVERSE).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            slopes = slopes + (dy * sigmoid * (1.0 + gate * (1.0 - sigmoid)),)
            outs = outs + (zero,)
            dy *= gate * sigmoid
        grad_drives, grad_sizes = grad_drives + (zero,), grad_sizes + (zero,)
        sizes, drives, dys = sizes + (size,), drives + (size * x,), dys + (dy,)

    rate = tl.load(A, mask=in_e, other=0.0)
    before, after = tl.load(states, mask=in_e, other=0.0), tl.load(adjoints, mask=in_e, other=0.0)
    bs = _numbers(B, first, length, 0, REVERSE, STATES, CHUNK)
    cs = _numbers(C, first, length, 0, REVERSE, STATES, CHUNK)
    for n in range(n_states):
        m = tl.minimum(n + 1, n_states - 1)  # the next one's loads are on their way during this one's arithmetic
        next_rate = tl.load(A + m * channels, mask=in_e, other=0.0)
        next_before = tl.load(states + m * channels, mask=in_e, other=0.0)
        next_after = tl.load(adjoints + m * channels, mask=in_e, other=0.0)
        next_bs = _numbers(B, first, length, m, REVERSE, STATES, CHUNK)
        next_cs = _numbers(C, first, length, m, REVERSE, STATES, CHUNK)

        decays, kepts, next_outs = (), (), ()
        state, sum_C = before.to(tl.float32), tl.zeros((CHUNK,), tl.float32)
        for i in tl.static_range(CHUNK):
            decay = tl.exp2(sizes[i] * (rate * LOG2E))
            kept = decay * state
            state = kept + drives[i] * bs[i]
            sum_C = tl.where(step == i, tl.sum(dys[i] * state, axis=0), sum_C)
            decays, kepts = decays + (decay,), kepts + (kept,)
            if HAS_Z:
                next_outs = next_outs + (outs[i] + state * cs[i],)
        tl.store(part_C + n * length, sum_C, mask=steps < length)

        flow, sum_B = after.to(tl.float32), tl.zeros((CHUNK,), tl.float32)
        next_drives, next_sizes = (), ()
        sum_A = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(CHUNK):
            adjoint = dys[CHUNK - 1 - j] * cs[CHUNK - 1 - j] + flow
            sum_B = tl.where(step == CHUNK - 1 - j, tl.sum(drives[CHUNK - 1 - j] * adjoint, axis=0), sum_B)
            next_drives = (grad_drives[CHUNK - 1 - j] + adjoint * bs[CHUNK - 1 - j],) + next_drives
            through = adjoint * kepts[CHUNK - 1 - j]  # gradient of Δ A
            next_sizes = (grad_sizes[CHUNK - 1 - j] + through * rate,) + next_sizes
            if WANT_A:
                sum_A += through * sizes[CHUNK - 1 - j]
            flow = adjoint * decays[CHUNK - 1 - j]
        tl.store(part_B + n * length, sum_B, mask=steps < length)
        if WANT_A:
            tl.store(part_A + n * channels, sum_A, mask=in_e)
        grad_drives, grad_sizes = next_drives, next_sizes
        if HAS_Z:
            outs = next_outs
        rate, before, after, bs, cs = next_rate, next_before, next_after, next_bs, next_cs

    skip = tl.load(D + e, mask=in_e, other=0.0) if HAS_D else 0.0
    sum_D, sum_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    grad_u += sample * gu_b + e * gu_e
    grad_delta += sample * gd_b + e * gd_e
    for i in tl.static_range(CHUNK):
        inside = in_e & (first + i < length)
        t = length - 1 - (first + i) if REVERSE else first + i
        x = _row(u, u_t, first + i, length, in_e, REVERSE).to(tl.float32)  # again: registers are scarce above
        dx, grad_size = grad_drives[i] * sizes[i], grad_sizes[i] + grad_drives[i] * x
        if HAS_D:
            dx += dys[i] * skip
        if SOFTPLUS:
            grad_size *= _softplus_slope(sizes[i])
        if WANT_D:
            sum_D += dys[i] * x
        if WANT_BIAS:
            sum_bias += tl.where(inside, grad_size, 0.0)
        tl.store(grad_u + t.to(tl.int64) * gu_t, dx.to(grad_u.dtype.element_ty), mask=inside)
        tl.store(grad_delta + t.to(tl.int64) * gd_t, grad_size.to(grad_delta.dtype.element_ty), mask=inside)
        if HAS_Z:
            grad = slopes[i] * (outs[i] + x * skip)
            place = grad_z + sample * gz_b + e * gz_e + t.to(tl.int64) * gz_t
            tl.store(place, grad.to(grad_z.dtype.element_ty), mask=inside)
    if WANT_D:
        tl.store(part_D + (sample * tiles + chunk) * channels + e, sum_D, mask=in_e)
    if WANT_BIAS:
        tl.store(part_bias + (sample * tiles + chunk) * channels + e, sum_bias, mask=in_e)


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
