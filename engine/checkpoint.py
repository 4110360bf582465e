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
"""

from __future__ import annotations

import os
import pickle
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import FIELDS, Config, build_config
from models.medical_vlm import VisionBridge
from models.nnunet.encoder import NnUNetEncoder

FORMAT = "mamba-ct-report"
VERSION = 3


def _other_squares(older: str) -> Callable[[dict], dict]:
    """A version with other tokens around lesions: weights for the ``older`` ones are of no use for it; without such
    tokens nothing changed."""

    def migrate(content: dict) -> dict:
        if content.get("config", {}).get("roi_policy") == "lesion":
            raise InputError(
                f"it was trained with roi_policy: lesion of an older version, {older}; train both stages again"
            )
        return content

    return migrate


# From version n to n + 1, by name; a file of an older layout passes through all that follow it.
MIGRATIONS: dict[int, Callable[[dict], dict]] = {
    1: _other_squares("whose tokens around lesions did not pass the bridge's blocks"),
    2: _other_squares("which saw regions as wide as the lesion"),
}


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

    @property
    def collapsed(self) -> bool:
        return bool(self.diagnostics.get("collapsed", False))

    @property
    def has_cmi(self) -> bool:
        return any(key.startswith("cmi.") for key in self.model_state_dict)

    def build_vision(self) -> VisionBridge:
        """The vision part as it was saved, with its weights, strictly loaded."""
        encoder = NnUNetEncoder.from_architecture(self.encoder_architecture)
        bridge_width = self.model_state_dict["bridge.out_proj.weight"].shape[0]
        output_std = self.diagnostics["expected_std"]
        vision = VisionBridge.build(self.config, encoder, bridge_width, output_std, with_cmi=self.has_cmi)
        load_vision_weights(vision, self)
        return vision


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write beside the target, flush to the disk, then rename: a crash leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        _replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _replace(source: Path, target: Path, attempts: int = 10) -> None:
    """``os.replace``; on Windows a virus scanner or viewer can hold the target for a moment."""
    for attempt in range(attempts):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == attempts - 1:
                raise
            time.sleep(0.2)


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
) -> None:
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
    }
    save_atomically(content, path)


def read_torch_file(path: Path, what: str) -> dict[str, Any]:
    """``torch.load(weights_only=True)`` of a dictionary, with one clear line when it cannot be."""
    if not path.is_file():
        raise InputError(f"{what} not found: {path}")
    if not zipfile.is_zipfile(path):  # as torch has saved since 1.6; anything else ends in all kinds of exceptions
        raise InputError(f"{path} is not a readable {what}: truncated while it was copied, or no file of torch's")
    if _is_nnunet(path):
        raise InputError(f"{path} is an nnU-Net checkpoint: give it as nnunet_encoder_checkpoint in the configuration")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is not a readable {what} (damaged, or not ours): {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a {what}: expected a dictionary, found {type(content).__name__}")
    return content


def _is_nnunet(path: Path) -> bool:
    """By the names in its pickle, which is not executed: nnU-Net's own files hold NumPy scalars and would not load."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(b"network_weights" in archive.read(name) for name in pickles)
    except zipfile.BadZipFile:
        return False  # torch.load says what is wrong with it


def load_checkpoint(path: Path) -> Checkpoint:
    """Read, migrate and check a checkpoint.

    Raises:
        InputError: missing, truncated, not ours, from a newer version, or incomplete.
    """
    content = read_torch_file(path, "checkpoint")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a checkpoint of this project (no format '{FORMAT}'): "
            "use one that train.py or train_vlm.py wrote"
        )
    version = _part(content, "version", path)
    if version > VERSION:
        raise InputError(f"{path} has format version {version}, this program knows {VERSION}: update the program")
    while version < VERSION:
        try:
            content = MIGRATIONS[version](content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        version += 1
    needed = [name for name in Checkpoint.__dataclass_fields__ if name not in ("path", "adapters")]
    fields = {name: _part(content, name, path) for name in needed} | {"adapters": content.get("adapters")}
    known = {key: value for key, value in fields["config"].items() if key in FIELDS}
    fields["config"] = build_config(known, origin=f"{path} (its configuration)")
    fields["preprocess_plan"] = PreprocessPlan.from_dict(fields["preprocess_plan"])
    return Checkpoint(path=path, **fields)


def _part(content: dict[str, Any], name: str, path: Path) -> Any:
    if name not in content:
        raise InputError(f"{path} is incomplete, it has no '{name}': use one that train.py or train_vlm.py wrote")
    return content[name]


def load_vision_weights(vision: VisionBridge, checkpoint: Checkpoint) -> list[str]:
    """Strict loading, with one exception: a model with CMI takes a checkpoint without.

    Returns:
        The names of the parameters that keep their random start (those of CMI, or none).

    Raises:
        InputError: the shapes or names differ; names the key and the likely configuration key.
    """
    own, saved = vision.state_dict(), checkpoint.model_state_dict
    at_random = [key for key in own if key.startswith("cmi.")] if not checkpoint.has_cmi else []
    missing = [key for key in own if key not in saved and key not in at_random]
    unexpected = [key for key in saved if key not in own]
    wrong = [key for key in own if key in saved and own[key].shape != saved[key].shape]
    if checkpoint.has_cmi and vision.cmi is None:
        raise InputError(
            f"{checkpoint.path} was trained with CMI, this configuration has use_cmi: false; set use_cmi: true"
        )
    if wrong and wrong[0].startswith("bridge.out_proj"):
        raise InputError(
            f"{checkpoint.path} gives tokens of width {saved['bridge.out_proj.weight'].shape[0]}, the language model "
            f"has width {own['bridge.out_proj.weight'].shape[0]}: use the mamba_model it was trained for "
            f"('{checkpoint.llm.get('name')}') or retrain both stages"
        )
    if missing or unexpected or wrong:
        key = (wrong or missing or unexpected)[0]
        detail = (
            f"{tuple(saved[key].shape)} there, {tuple(own[key].shape)} here" if wrong else "present on one side only"
        )
        raise InputError(
            f"{checkpoint.path} does not fit this configuration at '{key}' ({detail}); "
            f"{_differences(checkpoint, vision)} must be as in training"
        )
    vision.load_state_dict({**{key: own[key] for key in at_random}, **saved}, strict=True)
    return at_random


# What the weights were trained with; another value would load and give other tokens in silence.
_FIXED = (
    "encoder_output_stage", "encoder_target_spatial", "bridge_depth", "bridge_width", "bridge_mixer", "bridge_pool",
    "roi_side", "roi_policy", "image_axis_order",
)  # fmt: skip
_FREE = ("max_visual_tokens", "slices", "use_cmi", "cmi_compress_to")


def check_agreement(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Compare the checkpoint's settings with a configuration that is to go on from it.

    Returns:
        One line for each setting that may differ and does.

    Raises:
        InputError: one differs that must not.
    """
    # The encoder pools a 3-D volume to this many planes; of 2-D slices, each is encoded on its own.
    fixed = (*_FIXED, "slices") if len(checkpoint.preprocess_plan.patch_size) == 3 else _FIXED
    if checkpoint.has_cmi and config.use_cmi:
        fixed = (*fixed, "cmi_kind")
    if config.roi_policy == "lesion":
        fixed = (*fixed, "roi_scales")
    for key in fixed:
        there, here = getattr(checkpoint.config, key), getattr(config, key)
        if there != here:
            raise InputError(
                f"{checkpoint.path} was trained with {key}: {there}, the configuration says {here}; "
                f"set {key}: {there}, or retrain Stage 1 with the new value"
            )
    pairs = [(key, getattr(checkpoint.config, key), getattr(config, key)) for key in _FREE]
    return [
        f"note: {key} was {there} in {checkpoint.path.name}, now {here}" for key, there, here in pairs if there != here
    ]


def _differences(checkpoint: Checkpoint, vision: VisionBridge) -> str:
    config = checkpoint.config
    if vision.encoder.architecture != checkpoint.encoder_architecture:
        return "nnunet_encoder_checkpoint"
    keys = ("bridge_depth", "bridge_width", "encoder_target_spatial", "roi_side", "roi_scales")
    return ", ".join(f"{key} {getattr(config, key)}" for key in keys)
