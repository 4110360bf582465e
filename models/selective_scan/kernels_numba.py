"""Compiled kernels of the selective scan on CPU, for ``backend_numba``.

Letters: B batch, E channels, L tokens, N state. A tile is CHUNK tokens × LANES channels, float32.
A task is one sample × one block of LANES channels. A vector holds one token and one state index of a block,
so that the recurrence runs in registers, for any N and E; a task's tiles stay in the first-level cache.

Numba's automatic vectorisation gives up where it cannot prove that arrays do not overlap, which is everywhere
here (five times slower backward). So the first part defines a vector as a value of its own, with + - * /;
LLVM lowers it to whatever the processor has (one AVX-512 register, two AVX2, four SSE or NEON). Operations
may be contracted to fused multiply-adds but assume nothing about NaN: a NaN that comes in comes out.
Both parts share a file because numba's on-disk cache notices changes only in the file of the cached function; a kernel
elsewhere that uses them, or those of another file, closes over the :func:`digest_of` these files.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

CHUNK = 32
# Rows of a tile: the spare one keeps tiles from starting in the same cache set, where they evict each other.
PADDED = CHUNK + 1
LANES = 16
LOG2E = np.float32(1.4426950408889634)
ONE, ZERO = np.float32(1.0), np.float32(0.0)

FLOAT, INT = ir.FloatType(), ir.IntType(32)
VECTOR, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
CONTRACT = ("contract",)

# (2**f - 1) / f on [-1/2, 1/2], highest power first, interpolated at Chebyshev nodes; error of 2**f 5e-9.
_EXP2 = (
    0.00015453162941980736,
    0.0013390863364174759,
    0.00961808255728395,
    0.055503571142201544,
    0.24022650760568132,
    0.6931471880262287,
)
_SHIFT = 1.5 * 2**23 + 127
# 2 artanh(s) / s as a polynomial in s**2 on [0, 1/9], made alike; relative error of log1p 4e-9.
_LOG1P = (0.28157778313522575, 0.2796515775679465, 0.4002459522981895, 0.6666632164140144, 2.000000007681758)


def target_features() -> dict[str, bool]:
    """Instruction sets that numba compiles for: this processor's, unless its settings name another target."""
    own = config.CPU_NAME is None and config.CPU_FEATURES is None and config.ENABLE_AVX
    return dict(get_host_cpu_features()) if own else {}


def digest_of(*files: str) -> int:
    """Of source files that a cached kernel is made of besides its own."""
    content = b"".join(Path(file).read_bytes() for file in (__file__, *files))
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big")


class LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, VECTOR)


def _constant(value: float) -> ir.Constant:
    # LLVM accepts only constants that float32 represents exactly.
    return ir.Constant(VECTOR, [float(np.float32(value))] * LANES)


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic on vectors."""
    function_type = ir.FunctionType(VECTOR, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, args)


def _row(context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value, row: ir.Value) -> ir.Value:
    """Pointer to row ``row`` of a contiguous (rows, LANES) array."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    offset = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(data, [offset]), VECTOR.as_pointer())


def _channels(
    context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value, channel: ir.Value, token: ir.Value
) -> ir.Value:
    """Pointer to array[channel, token], array (E, L)."""
    struct = cgutils.create_struct_proxy(array_type)(context, builder, value=array)
    place = cgutils.get_item_pointer(context, builder, array_type, struct, [channel, token])
    return builder.bitcast(place, (VECTOR if array_type.dtype == types.float32 else HALVES).as_pointer())


@intrinsic
def load(typing_context, tile, row):
    """tile[row], tile (rows, LANES) contiguous float32."""

    def codegen(context, builder, signature, args):
        return builder.load(_row(context, builder, signature.args[0], *args), align=4)

    return lanes(tile, types.intp), codegen


@intrinsic
def store(typing_context, tile, row, value):
    """tile[row] = value."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _row(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(tile, types.intp, lanes), codegen


@intrinsic
def load_channels(typing_context, source, channel, token):
    """source[channel : channel + LANES, token] in float32; source (E, L), its channels neighbours in memory."""

    def codegen(context, builder, signature, args):
        place = _channels(context, builder, signature.args[0], *args)
        if source.dtype == types.float32:
            return builder.load(place, align=4)
        return widened(builder, builder.load(place, align=2))

    return lanes(source, types.intp, types.intp), codegen


@intrinsic
def store_channels(typing_context, target, channel, token, value):
    """target[channel : channel + LANES, token] = value, as in :func:`load_channels`; rounded as by :func:`narrow`."""

    def codegen(context, builder, signature, args):
        place, value = _channels(context, builder, signature.args[0], *args[:3]), args[3]
        if target.dtype == types.float32:
            builder.store(value, place, align=4)
        else:
            bits, half = builder.bitcast(value, INTS), ir.Constant(INTS, [16] * LANES)
            odd = builder.and_(builder.lshr(bits, half), ir.Constant(INTS, [1] * LANES))
            even = builder.add(builder.add(bits, ir.Constant(INTS, [0x7FFF] * LANES)), odd)
            is_nan, nan = builder.fcmp_unordered("uno", value, value), ir.Constant(INTS, [0x7FC0] * LANES)
            rounded = builder.select(is_nan, nan, builder.lshr(even, half))
            builder.store(builder.trunc(rounded, HALVES), place, align=2)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.intp, lanes), codegen


def widen(value):
    """One number of an array as float32; bfloat16 lies there as uint16."""


@overload(widen)
def _widen(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: np.float32(value)


def narrow(like, value):
    """A float32 as an element of ``like``: itself, or rounded to bfloat16 as PyTorch does."""


@overload(narrow)
def _narrow(like, value):
    if like.dtype == types.float32:
        return lambda like, value: value

    def rounded(like, value):
        if np.isnan(value):
            return np.uint16(0x7FC0)
        bits = np.float32(value).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


@intrinsic
def splat(typing_context, value):
    """The float32 ``value`` in every lane."""

    def codegen(context, builder, signature, args):
        first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), args[0], ir.Constant(INT, 0))
        return builder.shuffle_vector(first, ir.Constant(VECTOR, ir.Undefined), ir.Constant(INTS, [0] * LANES))

    return lanes(types.float32), codegen


def widened(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    """A vector of bfloat16, as 16-bit integers, in float32."""
    count = halves.type.count
    words = builder.zext(halves, ir.VectorType(INT, count))
    return builder.bitcast(builder.shl(words, ir.Constant(words.type, [16] * count)), ir.VectorType(FLOAT, count))


def sum_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    function_type, count = ir.FunctionType(FLOAT, [FLOAT, vector.type]), vector.type.count
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.vector.reduce.fadd.v{count}f32")
    return builder.call(function, [ir.Constant(FLOAT, -0.0), vector], fastmath=("reassoc",))


@intrinsic
def total(typing_context, value):
    """Sum over the lanes, float32."""

    def codegen(context, builder, signature, args):
        return sum_lanes(builder, args[0])

    return types.float32(lanes), codegen


@intrinsic
def exp2(typing_context, value):
    """2**value, relative error 1e-7; 0 below -126.5 and infinity above 127.5."""

    def codegen(context, builder, signature, args):
        (x,) = args
        for symbol, bound in ((">", 128.0), ("<", -127.0)):
            x = builder.select(builder.fcmp_ordered(symbol, x, _constant(bound)), _constant(bound), x)
        # The sum has no room for a fraction: its last bits are the nearest whole number with an exponent's bias. Of the
        # power, a biased exponent of 0 means 0, one of 255 infinity.
        shifted = builder.fadd(x, _constant(_SHIFT))
        f = builder.fsub(x, builder.fsub(shifted, _constant(_SHIFT)))
        p = _constant(_EXP2[0])
        for coefficient in (*_EXP2[1:], 1.0):
            p = _call(builder, "fmuladd", p, f, _constant(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, INTS), ir.Constant(INTS, [23] * LANES))
        return builder.fmul(p, builder.bitcast(exponent, VECTOR))

    return lanes(lanes), codegen


@intrinsic
def positive_part(typing_context, value):
    """max(value, 0), NaN kept."""

    def codegen(context, builder, signature, args):
        negative = builder.fcmp_ordered("<", args[0], _constant(0.0))
        return builder.select(negative, _constant(0.0), args[0])

    return lanes(lanes), codegen


def _define_operator(symbol: Callable[[Any, Any], Any], instruction: str) -> None:
    @intrinsic
    def apply(typing_context, left, right):
        def codegen(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=CONTRACT)

        return lanes(lanes, lanes), codegen

    @overload(symbol)
    def _(left, right):
        if left == lanes and right == lanes:
            return lambda left, right: apply(left, right)
        return None


for _name in ("add", "sub", "mul", "truediv"):
    _define_operator(getattr(operator, _name), "f" + _name.removeprefix("true"))


@njit
def softplus(x):
    """log(1 + e**x) = max(x, 0) + log1p(e**-|x|); above 20 the second term is below float32's resolution."""
    positive = positive_part(x)
    w = exp2((positive + positive_part(splat(ZERO) - x)) * splat(-LOG2E))
    s = w / (w + splat(np.float32(2.0)))
    v = s * s
    p = splat(np.float32(_LOG1P[0]))
    p = p * v + splat(np.float32(_LOG1P[1]))
    p = p * v + splat(np.float32(_LOG1P[2]))
    p = p * v + splat(np.float32(_LOG1P[3]))
    p = p * v + splat(np.float32(_LOG1P[4]))
    return positive + s * p


@njit
def sigmoid(x):
    """1 / (1 + e**-x)."""
    return splat(ONE) / (splat(ONE) + exp2(x * splat(-LOG2E)))


F1, F2, F3 = "float32[:]", "float32[:,:]", "float32[:,:,:]"
C3, C4 = "float32[:,:,::1]", "float32[:,:,:,::1]"
X3 = "{activations}[:,:,:]"  # what has a value for each channel and token
NUMBERS = "i8,i8,b1,b1,b1"


def _for_activations(signature: str) -> Callable[[Callable[..., None]], Callable[[type[np.generic]], Callable]]:
    """Make a kernel a function from the activations' kind, float32 or uint16 (bfloat16), to the compiled kernel."""

    def make(kernel: Callable[..., None]) -> Callable[[type[np.generic]], Callable]:
        @functools.cache
        def compiled(kind: type[np.generic]) -> Callable:
            # Under a name of its own: two processes that compile two kinds at once would mix them up in numba's cache.
            own = FunctionType(kernel.__code__, kernel.__globals__)
            own.__qualname__ = f"{kernel.__name__}_{kind.__name__}"
            return njit(signature.format(activations=kind.__name__), nogil=True, cache=True)(own)

        return compiled

    return make


@njit
def _load_tile(tile, source, e0, width, t0, steps, reverse):
    """tile[step, lane] = source[e0 + lane, token], steps in the order of the walk; zero in spare lanes."""
    first, direction = (source.shape[1] - 1 - t0, -1) if reverse else (t0, 1)
    if width == LANES and source.strides[0] == source.itemsize:
        # Lane by lane, a token's channels would be read LANES times, from places that evict each other from the cache.
        for i in range(steps):
            store(tile, i, load_channels(source, e0, first + direction * i))
        return
    if width < LANES:
        tile[:] = ZERO
    for lane in range(width):
        row = source[e0 + lane]
        for i in range(steps):
            tile[i, lane] = widen(row[np.uint64(first + direction * i)])


@njit
def _store_tile(target, tile, e0, width, t0, steps, reverse):
    first, direction = (target.shape[1] - 1 - t0, -1) if reverse else (t0, 1)
    if width == LANES and target.strides[0] == target.itemsize:
        for i in range(steps):
            store_channels(target, e0, first + direction * i, load(tile, i))
        return
    for lane in range(width):
        row = target[e0 + lane]
        for i in range(steps):
            row[np.uint64(first + direction * i)] = narrow(row, tile[i, lane])


@njit
def _open_gate(dy, gate, steps):
    """dy becomes dy · silu(gate); gate becomes dy · silu'(gate), which times y is the gate's gradient."""
    for i in range(steps):
        grad, value = load(dy, i), load(gate, i)
        s = sigmoid(value)
        store(gate, i, grad * s * (splat(ONE) + value * (splat(ONE) - s)))
        store(dy, i, grad * value * s)


@njit
def _load_block(block, D, bias, A, e0, width):
    """Fill row 0 and 1 of ``block`` with D and bias, and the rows from 2 with A."""
    block[:] = ZERO
    for lane in range(width):
        block[0, lane], block[1, lane] = D[e0 + lane], bias[e0 + lane]
        for n in range(A.shape[1]):
            block[2 + n, lane] = A[e0 + lane, n]


@_for_activations(f"void({X3},{X3},{F2},{C3},{C3},{F1},{X3},{F1},{X3},{F3},{C3},{C4},{NUMBERS},b1)")
def forward_kernel(
    u, delta, A, B, C, D, z, bias, y, first, last, entries, low, high, has_z, has_softplus, reverse, keep
):
    """Tasks low..high of y and of the last state; if ``keep``, also entries (tasks, chunks, N, LANES)."""
    channels, length = u.shape[1], u.shape[2]
    states = A.shape[1]
    blocks = (channels + LANES - 1) // LANES
    constants, h = np.empty((2 + states, LANES), np.float32), np.empty((states, LANES), np.float32)
    tiles = np.zeros((4, PADDED, LANES), np.float32)
    step, drive, out, gate = tiles[0], tiles[1], tiles[2], tiles[3]
    for task in range(low, high):
        sample, e0 = task // blocks, (task % blocks) * LANES
        width = min(LANES, channels - e0)
        _load_block(constants, D, bias, A, e0, width)
        h[:] = ZERO
        for lane in range(width):
            h[:, lane] = first[sample, e0 + lane]
        skip, shift = load(constants, 0), load(constants, 1)
        for t0 in range(0, length, CHUNK):
            steps = min(CHUNK, length - t0)
            if keep:
                entries[task, t0 // CHUNK] = h
            _load_tile(drive, u[sample], e0, width, t0, steps, reverse)
            _load_tile(step, delta[sample], e0, width, t0, steps, reverse)
            for i in range(steps):
                dt, x = load(step, i) + shift, load(drive, i)
                if has_softplus:
                    dt = softplus(dt)
                store(step, i, dt)
                store(drive, i, dt * x)
                store(out, i, skip * x)
            for n in range(states):
                a, state = load(constants, 2 + n) * splat(LOG2E), load(h, n)
                b, c = B[sample, n, t0:], C[sample, n, t0:]
                for i in range(steps):
                    state = exp2(load(step, i) * a) * state + load(drive, i) * splat(b[i])
                    store(out, i, load(out, i) + state * splat(c[i]))
                store(h, n, state)
            if has_z:
                _load_tile(gate, z[sample], e0, width, t0, steps, reverse)
                for i in range(steps):
                    s = load(gate, i)
                    store(out, i, load(out, i) * s * sigmoid(s))
            _store_tile(y[sample], out, e0, width, t0, steps, reverse)
        for lane in range(width):
            last[sample, e0 + lane] = h[:, lane]


@_for_activations(
    f"void({X3},{X3},{F2},{C3},{C3},{F1},{X3},{F1},{X3},{C3},{C4},{X3},{X3},{C3},{F2},{X3},{F2},{C3},{C3},{NUMBERS})"
)
def backward_kernel(
    u, delta, A, B, C, D, z, bias, grad_y, carry, entries,
    grad_u, grad_delta, grad_A, grad_D, grad_z, grad_bias, grad_B, grad_C, low, high, has_z, has_softplus,
    reverse,
):  # fmt: skip
    """Tasks low..high. carry (B, E, N): in, the gradient of the last state; out, that of the initial state.

    grad_A (B, E, N), grad_D and grad_bias (B, E) are per sample. grad_B and grad_C (samples of this range,
    N, L), in the order of the walk, must come zeroed and take the sums over this range's channels.
    """
    channels, length = u.shape[1], u.shape[2]
    states = A.shape[1]
    blocks = (channels + LANES - 1) // LANES
    constants, sums = np.empty((2, 2 + states, LANES), np.float32)  # D, bias, A and their gradients
    adjoint = np.empty((states, LANES), np.float32)
    tiles = np.zeros((11, PADDED, LANES), np.float32)
    x, raw, step, drive, gate, out = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5]
    dy, decay, h, d_step, d_drive = tiles[6], tiles[7], tiles[8], tiles[9], tiles[10]
    for task in range(low, high):
        sample, e0 = task // blocks, (task % blocks) * LANES
        local = sample - low // blocks
        width = min(LANES, channels - e0)
        _load_block(constants, D, bias, A, e0, width)
        sums[:], adjoint[:] = ZERO, ZERO
        for lane in range(width):
            adjoint[:, lane] = carry[sample, e0 + lane]
        skip, shift = load(constants, 0), load(constants, 1)
        for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
            steps = min(CHUNK, length - t0)
            _load_tile(x, u[sample], e0, width, t0, steps, reverse)
            _load_tile(raw, delta[sample], e0, width, t0, steps, reverse)
            _load_tile(dy, grad_y[sample], e0, width, t0, steps, reverse)
            if has_z:
                _load_tile(gate, z[sample], e0, width, t0, steps, reverse)
                _open_gate(dy, gate, steps)
            for i in range(steps):
                dt = load(raw, i) + shift
                store(raw, i, dt)
                if has_softplus:
                    dt = softplus(dt)
                store(step, i, dt)
                store(drive, i, dt * load(x, i))
                store(out, i, skip * load(x, i))
                store(d_step, i, splat(ZERO))
                store(d_drive, i, splat(ZERO))
            for n in range(states):
                a = load(constants, 2 + n)
                b, c = B[sample, n, t0:], C[sample, n, t0:]
                state = load(entries[task, t0 // CHUNK], n)
                store(h, 0, state)
                for i in range(steps):
                    factor = exp2(load(step, i) * a * splat(LOG2E))
                    state = factor * state + load(drive, i) * splat(b[i])
                    store(decay, i, factor)
                    store(h, i + 1, state)
                    if has_z:
                        store(out, i, load(out, i) + state * splat(c[i]))
                grad_b, grad_c = grad_B[local, n, t0:], grad_C[local, n, t0:]
                back, d_a = load(adjoint, n), load(sums, 2 + n)
                for i in range(steps - 1, -1, -1):
                    g = back + load(dy, i) * splat(c[i])  # gradient of the state after step i
                    back = load(decay, i) * g
                    exponent = back * load(h, i)  # gradient of Δ A
                    grad_c[i] += total(load(dy, i) * load(h, i + 1))
                    grad_b[i] += total(load(drive, i) * g)
                    store(d_drive, i, load(d_drive, i) + g * splat(b[i]))
                    store(d_step, i, load(d_step, i) + exponent * a)
                    d_a = d_a + exponent * load(step, i)
                store(adjoint, n, back)
                store(sums, 2 + n, d_a)
            for i in range(steps):
                slope = load(d_step, i) + load(d_drive, i) * load(x, i)
                if has_softplus:
                    slope = slope * sigmoid(load(raw, i))
                store(sums, 0, load(sums, 0) + load(dy, i) * load(x, i))
                store(sums, 1, load(sums, 1) + slope)
                store(d_step, i, slope)
                store(d_drive, i, load(d_drive, i) * load(step, i) + load(dy, i) * skip)
                if has_z:
                    store(gate, i, load(gate, i) * load(out, i))
            _store_tile(grad_delta[sample], d_step, e0, width, t0, steps, reverse)
            _store_tile(grad_u[sample], d_drive, e0, width, t0, steps, reverse)
            if has_z:
                _store_tile(grad_z[sample], gate, e0, width, t0, steps, reverse)
        for lane in range(width):
            grad_D[sample, e0 + lane], grad_bias[sample, e0 + lane] = sums[0, lane], sums[1, lane]
            grad_A[sample, e0 + lane] = sums[2:, lane]
            carry[sample, e0 + lane] = adjoint[:, lane]
