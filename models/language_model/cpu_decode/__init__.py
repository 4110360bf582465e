"""Compiled single-token decoding on a CPU. The rest of the language model imports from here alone.

``freeze_linear_layers`` gives a model linear layers that send few rows of activations to a compiled GEMV, and ``step``
advances a whole block by one token. Where they do not apply, or numba does not import, PyTorch computes the same.
"""

from models.language_model.cpu_decode.frozen_linear import FrozenLinear, freeze_linear_layers, has_hooks

try:
    from models.language_model.cpu_decode.mamba_step import step
except ImportError:  # numba is missing; frozen_linear has logged it

    def step(*_: object) -> None:
        """Without numba a block computes every token itself."""


__all__ = ["FrozenLinear", "freeze_linear_layers", "has_hooks", "step"]
