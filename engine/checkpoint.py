"""Checkpoints: one ``.pt`` that ``torch.load(weights_only=True)`` opens and that carries all inference needs.

format, version          who wrote it, and which layout
stage                    "vision" (train.py) or "vlm" (train_vlm.py)
model_state_dict         encoder + bridge (+ CMI); never the language model
step, epoch, val_loss    where it stood
config                   the resolved configuration (every key of config/schema.py)
encoder_architecture     the nnU-Net encoder's architecture, so that it is rebuilt without nnU-Net's file
preprocess_plan          what turned the scan into the encoder's input
llm                      the language model's and tokenizer's identity
diagnostics              token statistics; ``collapsed`` is true where the vision part gives nothing
adapters                 of the language model (--lora_rank), where it has any (models/language_model/lora.py)
scan_checks              feature distances of the training set, and a digest of the nnU-Net that segments
                         (engine/scan_checks.py); None in older files
findings                 that the findings head knows; None without a head
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config.errors import InputError, first_line
from config.files import atomic_path, pickle_contains, replace
from config.nnunet_plans import PreprocessPlan
from config.schema import Config, build_config, keys_with_role, yaml_line
from models.language_model.adapter_file import adapter_digest
from models.language_model.identity import read_lm_config
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import VisionBridge
from models.pretrained import CONFIG, FORMAT, REMEDY, VERSION, migrated, read_folder, rebuild_vision


@dataclass
class Checkpoint:
    """A loaded checkpoint; the fields are those of the module's docstring."""

    path: Path
    stage: str
    model_state_dict: dict[str, torch.Tensor]
    step: int
    epoch: int
    val_loss: float
    config: Config
    encoder_architecture: dict[str, Any]
    preprocess_plan: PreprocessPlan
    llm: dict[str, Any]
    diagnostics: dict[str, Any]
    adapters: dict[str, Any] | None = None
    scan_checks: dict[str, Any] | None = None
    findings: list[str] | None = None

    @property
    def collapsed(self) -> bool:
        return bool(self.diagnostics.get("collapsed", False))

    @property
    def has_cmi(self) -> bool:
        return any(key.startswith("cmi.") for key in self.model_state_dict)

    def build_vision(self, max_visual_tokens: int | None = None) -> VisionBridge:
        """The vision part as it was saved, with its weights, strictly loaded; by default with its own token budget."""
        config = self.config.replace(max_visual_tokens=max_visual_tokens or self.config.max_visual_tokens)
        vision = rebuild_vision(VisionBridge, config, vars(self))
        load_vision_weights(vision, self)
        return vision

    def load_lm(self, config: Config, device: torch.device | str, **options: Any) -> MambaLM:
        """The language model with the adapters of Stage 0 and of this checkpoint; ``options`` as ``MambaLM.load``."""
        weights = {"adapters": self.adapters, "stage0": config.language_model_adapters, **options}
        lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=device, **weights)
        lm.checkpointing(config.llm_checkpointing)  # attribution needs gradients
        return lm

    def content(self, config: Config) -> dict[str, Any]:
        """What the file holds, but ``config`` in place of its configuration, and no weights of the vision part."""
        fields = {name: getattr(self, name) for name in Checkpoint.__dataclass_fields__ if name != "path"}
        fields |= {"config": config.to_dict(), "preprocess_plan": self.preprocess_plan.to_dict()}
        return {"format": FORMAT, "version": VERSION, **fields, "model_state_dict": {}}


def save_torch_file(content: dict[str, Any], path: Path, older: Path | None = None) -> None:
    """``torch.save``, atomically; the file that it replaces is kept as ``older``.

    Raises OSError: the disk is full; ``path`` is as it was.
    """
    with atomic_path(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # torch's writer tells no errno
            if not re.search("PytorchStreamWriter|inline_container|iostream error", str(error)):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if older is not None and path.is_file():
            replace(path, older)


def save_checkpoint(
    path: Path,
    vision: VisionBridge,
    *,
    stage: str,
    step: int,
    epoch: int,
    val_loss: float,
    config: Config,
    plan: PreprocessPlan,
    llm: dict[str, Any],
    diagnostics: dict[str, Any],
    adapters: dict[str, Any] | None = None,
    scan_checks: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, atomically. The arguments are the parts named in the module's docstring."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "model_state_dict": {key: value.detach().cpu() for key, value in vision.state_dict().items()},
        "step": step,
        "epoch": epoch,
        "val_loss": float(val_loss),
        "config": config.to_dict(),
        "encoder_architecture": vision.encoder.architecture,
        "preprocess_plan": plan.to_dict(),
        "llm": llm,
        "diagnostics": diagnostics,
        **({"adapters": adapters} if adapters else {}),
        **({"scan_checks": scan_checks} if scan_checks else {}),
        **({"findings": list(vision.head.names)} if vision.head is not None else {}),
    }
    save_torch_file(content, path)


def read_torch_file(path: Path, what: str) -> dict[str, Any]:
    """``torch.load(weights_only=True)`` of a dictionary, with one clear line when it cannot be."""
    if not path.is_file():
        raise InputError(f"{what} {'is a folder' if path.is_dir() else 'not found'}: {path}")
    if not zipfile.is_zipfile(path):  # as torch has saved since 1.6; anything else ends in all kinds of exceptions
        if path.suffix == ".safetensors":
            raise InputError(f"{path} is no {what}: adapters are named by the key language_model_adapters")
        raise InputError(f"{path} is not a readable {what}: truncated while it was copied, or no file of torch's")
    if pickle_contains(path, "network_weights"):  # NumPy scalars in it would not load
        raise InputError(f"{path} is an nnU-Net checkpoint: give it as nnunet_encoder_checkpoint in the configuration")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            if damaged := archive.testzip():
                raise InputError(f"{path} is not a readable {what} (damaged): the checksum of '{damaged}' is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable {what} (damaged, or not ours): {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a {what}: expected a dictionary, found {type(content).__name__}")
    return content


def load_checkpoint(path: Path) -> Checkpoint:
    """Read, migrate and check a checkpoint, or a folder of ``MedicalVLM.save_pretrained``.

    Raises InputError: missing, truncated, not ours, from a newer version, or incomplete.
    """
    return checkpoint_of(read_folder(path) if (path / CONFIG).is_file() else read_torch_file(path, "checkpoint"), path)


def checkpoint_of(content: dict[str, Any], path: Path) -> Checkpoint:
    """Migrate and check a checkpoint's content, as :func:`load_checkpoint` does."""
    content = migrated(content, path)
    missing = [name for name in Checkpoint.__dataclass_fields__ if name != "path" and name not in content]
    if missing:
        raise InputError(f"{path} is incomplete, it has no '{missing[0]}': {REMEDY}")
    fields = {name: content[name] for name in Checkpoint.__dataclass_fields__ if name != "path"}
    fields["config"] = build_config(fields["config"], origin=f"{path} (its configuration)")
    fields["preprocess_plan"] = PreprocessPlan.from_dict(fields["preprocess_plan"])
    return Checkpoint(path=path, **fields)


def load_vision_weights(vision: VisionBridge, checkpoint: Checkpoint) -> list[str]:
    """Strict loading, with one exception: a model with CMI takes a checkpoint without.

    Returns the names of the parameters that keep their random start (those of CMI, or none). Raises InputError where
    shapes or names differ, with the weight and the likely configuration key.
    """
    own, saved = vision.state_dict(), checkpoint.model_state_dict
    at_random = [key for key in own if key.startswith("cmi.")] if not checkpoint.has_cmi else []
    missing = [key for key in own if key not in saved and key not in at_random]
    unexpected = [key for key in saved if key not in own]
    wrong = [key for key in own if key in saved and own[key].shape != saved[key].shape]
    if missing or unexpected or wrong:
        key = (wrong or missing or unexpected)[0]
        sides = (
            f"{tuple(saved[key].shape)} there, {tuple(own[key].shape)} here" if wrong else "present on one side only"
        )
        raise InputError(
            f"{checkpoint.path} does not fit this configuration at '{key}' ({sides}); "
            f"{_differences(checkpoint)} must be as in training"
        )
    vision.load_state_dict({**{key: own[key] for key in at_random}, **saved}, strict=True)
    return at_random


def check_agreement(checkpoint: Checkpoint, config: Config) -> list[str]:
    """One line for each setting that may differ between a checkpoint and a configuration that continues from it, and
    does. Raises InputError for one that must not."""
    trained = checkpoint.config
    if checkpoint.has_cmi and not config.use_cmi:
        reason = "was trained with CMI, this configuration has use_cmi: false; set use_cmi: true"
        raise InputError(f"{checkpoint.path} {reason}")
    check_language_model(checkpoint, config)
    free = keys_with_role("tokens")
    if len(checkpoint.preprocess_plan.patch_size) == 3:
        free.remove("slices")  # a 3-D encoder pools its volume to this many planes
    if trained.roi_policy == config.roi_policy == "centre":
        free.append("roi_side")  # the centre crop has no parameters
    differ = {
        key: (yaml_line(key, there), yaml_line(key, here))
        for key in keys_with_role("arch") + keys_with_role("tokens")
        if (there := getattr(trained, key)) != (here := getattr(config, key))
    }
    if bound := [pair for key, pair in differ.items() if key not in free]:
        there, here = map(" and ".join, zip(*bound, strict=True))
        raise InputError(
            f"{checkpoint.path} was trained with {there}, the configuration says {here}; set {there}, or retrain "
            "Stage 1 with the new values and name its checkpoint (--vision_checkpoint)"
        )
    return [f"note: {there} in {checkpoint.path.name}, now {here}" for there, here in differ.values()]


def check_language_model(checkpoint: Checkpoint, config: Config) -> None:
    """Raises InputError where the language model has not the width that the tokens were trained for, or not the Stage-0
    adapters that Stage 2 was trained with; reads no weights of the model."""
    width, trained = read_lm_config(config.mamba_model).hidden_size, checkpoint.llm
    if width != trained["width"]:
        raise InputError(
            f"mamba_model '{config.mamba_model}' has width {width}, {checkpoint.path} was trained for width "
            f"{trained['width']} ('{trained.get('name')}'): use that model, or retrain both stages"
        )
    here, there = adapter_digest(config.language_model_adapters), trained.get("adapters", "")
    if checkpoint.stage == "vlm" and here != there:
        names = config.language_model_adapters or "empty", checkpoint.config.language_model_adapters or "empty"
        raise InputError(
            f"language_model_adapters is {names[0]} ({here or 'none'}), {checkpoint.path} was trained with {names[1]} "
            f"({there or 'none'}): set language_model_adapters to that file in the configuration, or retrain Stage 2"
        )


def _differences(checkpoint: Checkpoint) -> str:
    keys = ("bridge_depth", "bridge_width", "encoder_target_spatial", "roi_side", "roi_policy")
    return ", ".join(yaml_line(key, getattr(checkpoint.config, key)) for key in keys)
