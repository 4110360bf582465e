"""The adapters of Stage 0 as one file, merged into the language model that they were trained for.

``language_model_adapters.safetensors``: A and B of each layer in float32, with rank, target layers, the language
model's identity and some of its weights in the metadata: a model of the same shape is not the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from transformers import MambaForCausalLM

from config.errors import InputError, first_line
from config.files import atomic_path, read_safetensors
from models.language_model.lora import merge

KEY = "language_model_adapters"  # of the configuration
ADAPTER_FILE = "language_model_adapters.safetensors"
FORMAT = "mamba-ct-report-adapters"
_SAMPLED = 64  # weights of the language model that are compared
_REMEDY = "make it with  python scripts/adapt_language_model.py"


@dataclass(frozen=True)
class AdapterFile:
    """``layers``: as in :meth:`models.language_model.lora.Adapters.to_dict`; ``llm``: ``LMIdentity`` as a dictionary;
    ``digest``: of the matrices."""

    path: Path
    rank: int
    layers: dict[str, dict[str, Tensor]]
    llm: dict[str, Any]
    sample: list[float]
    digest: str

    def merge_into(self, model: MambaForCausalLM, llm: Mapping[str, Any]) -> None:
        """Add them to the weights, in place. Raises InputError: ``model``, whose identity is ``llm``, is another."""
        compared = [name for name in self.llm if name not in ("name", "adapters")]
        other = next((name for name in compared if self.llm[name] != llm[name]), None)
        here, there = torch.tensor(_sample(model)), torch.tensor(self.sample)
        if other is None and torch.allclose(here, there, rtol=0.02, atol=1e-4):  # half precision rounds
            merge(model, {"layers": self.layers})
            return
        differs = f"{other} {self.llm[other]} there, {llm[other]} here" if other else "other weights"
        raise InputError(
            f"{KEY}: {self.path} belongs to the language model '{self.llm['name']}', not to mamba_model "
            f"'{llm['name']}' ({differs}): {_REMEDY} for this model, or leave the key empty"
        )


def save_adapters(
    path: Path, stored: Mapping[str, Any], model: MambaForCausalLM, llm: Mapping[str, Any], targets: Sequence[str]
) -> None:
    """Write the adapters ``stored`` (as of ``Adapters.to_dict``) of a frozen ``model``, atomically."""
    tensors = {f"{name}.{part}": value for name, parts in stored["layers"].items() for part, value in parts.items()}
    head = {"format": FORMAT, "rank": stored["rank"], "targets": [*targets], "llm": dict(llm)}
    head |= {"sample": _sample(model), "digest": tensor_digest(tensors)}
    content = save(tensors, {name: json.dumps(value, ensure_ascii=False) for name, value in head.items()})
    with atomic_path(path) as part:
        part.write_bytes(content)


def read_adapters(path: Path) -> AdapterFile:
    """Raises InputError: there is no such file, or it is damaged or not ours."""
    if not path.is_file():
        raise InputError(f"{KEY}: file not found: {path}; {_REMEDY}, or leave the key empty")
    try:
        metadata, tensors = read_safetensors(path)
        head = {name: json.loads(value) for name, value in metadata.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{KEY}: {path} is not a readable adapter file ({first_line(error)}): {_REMEDY}") from error
    if head.get("format") != FORMAT or head["digest"] != tensor_digest(tensors):
        raise InputError(f"{KEY}: {path} is no adapter file of this project, or is damaged: {_REMEDY}")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = value
    return AdapterFile(path, head["rank"], layers, head["llm"], head["sample"], head["digest"])


def adapter_digest(path: str | Path | None) -> str:
    """What a checkpoint remembers of the adapters; empty without any. Raises InputError as :func:`read_adapters`."""
    return read_adapters(Path(path)).digest if path else ""


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values."""
    total = blake2b(digest_size=8)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def _sample(model: MambaForCausalLM) -> list[float]:
    """Some weights of the last block, which training changes as every other."""
    layer = model.backbone.layers[-1].mixer.out_proj
    weight = getattr(layer, "base_layer", layer).weight  # adapters wrap the layer
    return weight.detach().flatten()[:_SAMPLED].float().tolist()
