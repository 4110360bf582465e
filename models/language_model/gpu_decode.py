"""One token through one block of Hugging Face's Mamba on a GPU, in four launches of three Triton kernels.

    hidden [B, 1, D] → hidden [B, 1, D]; the cache's convolution inputs and recurrent state change in place

Letters: B rows, D width, E inner width, N state, K taps of the convolution, R rank of Δ.

    enter_kernel    RMSNorm, in_proj rows   → x: convolution, SiLU;  z
    rows_kernel     x_proj rows             → Δ (rank R), B, C
    state_kernel    dt_proj rows            → Δ: state update, + D·x, · SiLU(z) → y
    rows_kernel     out_proj rows           → + residual

Decoding is bound by reading the weights, and otherwise by the number of launches: PyTorch needs some thirty for a
block. −e**A_log and the widened taps of the convolution are made where they are used, so nothing is kept that could
differ from the weights. The reference is the block itself (``hf_patch``), with which the first step on a device is
compared; what is not a frozen layer in float32, bfloat16 or our int8 is left to it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.mamba.modeling_mamba import MambaBlock

from config.errors import first_line
from models.language_model.cpu_decode import FrozenLinear, has_hooks

logger = logging.getLogger(__name__)

SWITCH = "MAMBA_GPU_DECODE"  # environment variable; 0 leaves single tokens to PyTorch's kernels
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"  # the kernels run on CPU tensors, for tests
MOST_ROWS = 16  # of activations; beyond them tensor cores are faster
MOST_COLUMNS = 1 << 14  # of a matrix: a row lies in the registers of a program
TILE = 1 << 13  # weights that a program holds
FEW = 1024  # rows of a matrix that are multiplied one at a time
CHANNELS = 16  # that a program of state_kernel advances
WARPS = 4
KINDS = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative error, in norm, against PyTorch's operations


def step(block: MambaBlock, hidden: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor | None:
    """One token per row, (B, 1, D) → (B, 1, D); None, and nothing changed, where the block has to do it itself.

    That is: no state to go on from, more than :data:`MOST_ROWS` rows, a mask, gradients, or layers of another kind.
    """
    if cache is None or mask is not None or hidden.shape[1] != 1 or hidden.shape[0] > MOST_ROWS:
        return None
    if torch.is_grad_enabled() or _kernels(hidden.device.type) is None:
        return None
    mixer = block.mixer
    window, state = cache.get_conv_state(mixer.layer_idx), cache.get_recurrent_state(mixer.layer_idx)
    if window is None or state is None or window.shape[0] != hidden.shape[0] or not _is_ready(block, window, state):
        return None
    key = (hidden.device, hidden.shape, block.norm.weight.dtype, mixer.in_proj.weight.dtype)
    if not _tried(key, lambda: _block_difference(block, hidden, window, state)):
        return None
    return _run_block(block, hidden, window, state)


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """x (…, I) · weightᵀ · scale + bias → (…, O) in the dtype of ``x``, summed in float32; int8 ``weight`` (O, I).

    None where it is not the way to compute that: many rows, something to differentiate, or no GPU.
    """
    rows = x.numel() // weight.shape[1]
    if not 0 < rows <= MOST_ROWS or x.dtype not in KINDS or weight.shape[1] > MOST_COLUMNS:
        return None
    if torch.is_grad_enabled() and x.requires_grad or _kernels(x.device.type) is None or not weight.is_contiguous():
        return None
    rows = x.reshape(rows, -1).contiguous()
    if not _tried((x.device, x.dtype, rows.shape), lambda: _product_difference(rows, weight, scale, bias)):
        return None
    return _product(rows, weight, scale, bias).reshape(*x.shape[:-1], weight.shape[0])


def _product(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty(len(rows), weight.shape[0], dtype=rows.dtype, device=rows.device)
    with _on(rows.device):
        _launch_rows(rows, weight, scale, bias, None, out)
    return out


@functools.cache
def _kernels(device_type: str) -> ModuleType | None:
    """The kernels where they can run: on a GPU, or with ``TRITON_INTERPRET`` on a CPU; the log says why not."""
    if device_type != ("cpu" if INTERPRETED else "cuda"):
        return None
    if os.environ.get(SWITCH) == "0":
        logger.info("decoding by PyTorch's kernels: %s=0", SWITCH)
        return None
    try:
        from models.language_model import gpu_decode_kernels
    except ImportError as error:
        logger.warning("decoding by PyTorch's kernels: triton does not import (%s)", first_line(error))
        return None
    return gpu_decode_kernels


def _is_ready(block: MambaBlock, window: Tensor, state: Tensor) -> bool:
    mixer = block.mixer
    layers = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    small = (mixer.A_log, mixer.D, mixer.conv1d.weight, block.norm.weight, window, state)
    return (
        all(isinstance(layer, FrozenLinear) and layer.is_ready() for layer in layers)
        and mixer.x_proj.weight.dtype in KINDS
        and mixer.dt_proj.weight.dtype in KINDS
        and max(mixer.hidden_size, mixer.intermediate_size) <= MOST_COLUMNS
        and all(tensor.dtype in KINDS and tensor.is_contiguous() for tensor in small)
        and state.dtype is torch.float32
        and not any(has_hooks(part) for part in (mixer, mixer.conv1d, block.norm))
    )


_VERDICTS: dict[tuple[object, ...], bool] = {}


def _tried(key: tuple[object, ...], difference: Callable[[], str]) -> bool:
    """Whether the kernels give what PyTorch gives; tried once for a device, its dtypes and a number of rows."""
    if key not in _VERDICTS:
        _VERDICTS[key] = False  # what the reference computes must not come from the kernels
        try:
            reason = difference()
        except Exception as error:  # noqa: BLE001 (compilers and drivers raise exceptions of any type)
            reason = f"{type(error).__name__}: {first_line(error)}"
        if reason:
            logger.warning("decoding by PyTorch's kernels: %s", reason)
        _VERDICTS[key] = not reason
    return _VERDICTS[key]


def _product_difference(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> str:
    """Why the int8 product cannot be used, empty where it can; a thousand outputs are compared."""
    part = None if bias is None else bias[:FEW]
    expected = rows.float() @ (weight[:FEW].float() * scale[:FEW, None]).T
    expected = expected if part is None else expected + part
    return _off({"an int8 product": _product(rows, weight, scale, bias)[:, :FEW]}, [expected], rows.dtype)


def _block_difference(block: MambaBlock, hidden: Tensor, window: Tensor, state: Tensor) -> str:
    """Why the kernels cannot be used for the block, empty where they can; the states stay as they are."""
    layer, cache = block.mixer.layer_idx, DynamicCache(config=block.config)
    cache.update_conv_state(window, layer, conv_kernel_size=window.shape[2])
    cache.update_recurrent_state(state, layer)
    expected = [MambaBlock.forward(block, hidden, cache), cache.get_conv_state(layer), cache.get_recurrent_state(layer)]
    shifted, advanced = window.clone(), state.clone()
    out = _run_block(block, hidden, shifted, advanced)
    own = {"the output": out, "the window": shifted, "the state": advanced}
    return _off(own, expected, block.norm.weight.dtype)


def _off(own: dict[str, Tensor], expected: list[Tensor], dtype: torch.dtype) -> str:
    for (name, one), other in zip(own.items(), expected, strict=True):
        off = float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-6))
        if not off <= TOLERANCE[dtype]:
            return f"wrong numbers: {name} is off by {off:.1e}"
    return ""


def _run_block(block: MambaBlock, hidden: Tensor, window: Tensor, state: Tensor) -> Tensor:
    mixer, kind = block.mixer, block.norm.weight.dtype
    (B, E, N), D, K, R = state.shape, mixer.hidden_size, window.shape[2], mixer.time_step_rank
    kernels, hidden = _kernels(hidden.device.type), hidden[:, 0].contiguous()
    inner, gate, y = torch.empty(3, B, E, dtype=kind, device=hidden.device)
    low = torch.empty(B, R + 2 * N, dtype=kind, device=hidden.device)
    out = hidden.new_empty(B, D, dtype=torch.float32 if block.residual_in_fp32 else None)
    weight, scale = mixer.in_proj.stored()
    bias, conv_bias, delta_bias = mixer.in_proj.bias, mixer.conv1d.bias, mixer.dt_proj.bias
    rows, channels = _rows_at_once(2 * E, D, 8 if B == 1 else 2), min(CHANNELS, _power(E))
    with _on(hidden.device):
        kernels.enter_kernel[(2 * -(-E // rows),)](
            hidden, block.norm.weight, weight, *_or(gate, scale, bias), mixer.conv1d.weight, *_or(gate, conv_bias),
            window, inner, gate, B, block.norm.variance_epsilon, D=D, E=E, K=K, HAS_SCALE=scale is not None,
            HAS_BIAS=bias is not None, HAS_CONV_BIAS=conv_bias is not None, ONE=B == 1, ROWS=rows,
            PIECE=_piece(D), COLUMNS=_power(D), num_warps=WARPS,
        )  # fmt: skip
        _launch_rows(inner, mixer.x_proj.weight, None, mixer.x_proj.bias, None, low)
        kernels.state_kernel[(-(-E // channels),)](
            low, mixer.dt_proj.weight, *_or(low, delta_bias), mixer.A_log, mixer.D, inner, gate, y, state, B, E=E, R=R,
            N=N, HAS_BIAS=delta_bias is not None, ONE=B == 1, ROWS=channels, RANK=_power(R), STATES=_power(N),
            num_warps=WARPS,
        )  # fmt: skip
        _launch_rows(y, *mixer.out_proj.stored(), mixer.out_proj.bias, hidden, out)
    return out[:, None]


def _launch_rows(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    outputs, inputs = weight.shape
    # Measured on an H200: walking over pieces, four rows of bfloat16 are fastest; int8 and tiles take fewer.
    rows = _rows_at_once(outputs, inputs, 4 if len(x) == 1 and scale is None else 2)
    _kernels(x.device.type).rows_kernel[(-(-outputs // rows),)](
        x, weight, *_or(out, scale, bias, residual), out, len(x), I=inputs, O=outputs, HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ONE=len(x) == 1, ROWS=rows,
        PIECE=_piece(inputs), COLUMNS=_power(inputs),
        num_warps=2 * WARPS if outputs <= FEW else WARPS,
    )  # fmt: skip


def _rows_at_once(outputs: int, inputs: int, most: int) -> int:
    """Rows of a program, a power of two; a matrix of few rows is spread over as many programs as it has rows."""
    return 1 if outputs <= FEW else most if most > 2 else max(1, min(most, TILE // _power(inputs)))


def _piece(columns: int) -> int:
    """A power of two that divides the columns, at most 1024; where that is a small one, all columns as one piece."""
    largest = min(columns & -columns, 1024)
    return largest if largest >= 128 else _power(columns)


def _or(other: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """``other`` in place of absent tensors, which a kernel does not read."""
    return [other if tensor is None else tensor for tensor in tensors]


def _power(size: int) -> int:
    """``size`` rounded up to a power of two."""
    return 1 << (size - 1).bit_length()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
