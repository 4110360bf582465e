"""The rivals: transformers' Mamba as it is installed, mambapy, mamba-ssm, and an attention decoder."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer, mamba_selective_scan
from transformers.utils.import_utils import is_mambapy_available

from engine.benchmark.sizes import Size
from models.selective_scan import selective_scan

Scan = Callable[..., Tensor]

NO_MAMBAPY = "mambapy is not installed: pip install --no-deps mambapy (or put it on PYTHONPATH)"


def our_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)


def transformers_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """transformers' own: every state in memory, a Python loop over L (kernels where it finds mamba-ssm)."""
    return mamba_selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)


def mambapy_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """transformers' path through mambapy's parallel scan, as ``MambaConfig(use_mambapy=True)`` takes it."""
    return mamba_selective_scan(
        u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, use_mambapy=True
    )  # fmt: skip


def mamba_ssm_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    official = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return official(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)


SCANS: dict[str, Scan] = {
    "ours": our_scan,
    "transformers": transformers_scan,
    "mambapy": mambapy_scan,
    "mamba_ssm": mamba_ssm_scan,
}


def why_missing(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a rival cannot be measured here with a model of this dtype, or nothing."""
    if name == "mambapy" and not is_mambapy_available():
        return NO_MAMBAPY
    if name == "mambapy" and dtype is not torch.float32:
        return f"transformers' path through it multiplies float32 states with {dtype} and raises"
    if name == "mamba_ssm":
        if device.type != "cuda":
            return "mamba-ssm runs on NVIDIA GPUs alone"
        try:
            importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        except (ImportError, RuntimeError) as error:
            return f"mamba-ssm does not import ({str(error).splitlines()[0]}): see requirements-cuda.txt"
    return None


def use_mambapy(model: MambaForCausalLM) -> MambaForCausalLM:
    """What ``MambaConfig(use_mambapy=True)`` builds."""
    for module in model.modules():
        if isinstance(module, MambaMixer):
            module.use_mambapy = True
    return model


@torch.no_grad()
def attention_decoder(size: Size, mamba_layers: int, device: torch.device) -> GPTNeoXForCausalLM:
    """A decoder of the same width with as many weights: two Mamba layers weigh what one attention layer does.

    At width 2560, 32 heads and 64 Mamba layers it would be Pythia-2.8B (Biderman et al., arXiv 2304.01373), to which
    the Mamba paper compares Mamba-2.8B. Attention is torch's fused one.
    """
    config = GPTNeoXConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=max(1, mamba_layers // 2),
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=max(size.scaling),
        attn_implementation="sdpa",
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)  # no float32 copy of the weights
    try:
        with torch.device(device):
            model = GPTNeoXForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)
