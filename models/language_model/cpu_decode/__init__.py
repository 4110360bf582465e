"""Products with frozen weights, and single-token decoding, on a CPU. The language model imports from here alone.

``freeze_linear_layers`` gives a model linear layers that send few rows of activations to a compiled GEMV, and for many
widen their weights a block at a time where the CPU emulates their dtype. ``step`` advances all blocks by one token.
Where they do not apply, or numba does not import, PyTorch computes the same.
"""

from models.language_model.cpu_decode.frozen_linear import (
    FrozenLinear,
    WidenedProduct,
    freeze_linear_layers,
    has_hooks,
    is_native,
    many_rows,
    spans,
)

try:
    from models.language_model.cpu_decode.mamba_step import step
except (ImportError, RuntimeError):  # numba is missing; frozen_linear has logged it

    def step(*_: object) -> None:
        """Without numba a block computes every token itself."""


__all__ = [
    "FrozenLinear",
    "WidenedProduct",
    "freeze_linear_layers",
    "has_hooks",
    "is_native",
    "many_rows",
    "spans",
    "step",
]
