"""Reading and writing nnU-Net v2's own checkpoint files, without nnU-Net and without unpickling code.

A pickle can run anything, so it is read with ``torch.load(weights_only=True)`` and an allow-list of the NumPy scalars
that nnU-Net logs; whatever else a file asks for is refused by name.

nnU-Net's state dict holds every encoder tensor four times: ``…conv``, its alias ``…all_modules.0``, and both again
under ``decoder.encoder``. Loading assigns them one after the other, so the last one counts.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from config.errors import InputError, first_line
from config.files import atomic_path
from config.nnunet_plans import plain_types
from models.nnunet.architecture import Architecture

logger = logging.getLogger(__name__)

_SCALAR = np.float32(0).__reduce__()[0]
_SAFE_GLOBALS = [
    # NumPy 2 pickles its scalars under numpy._core, NumPy 1 under numpy.core.
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIqQefd"),  # truth values, integers and floats of every width
]
_FORBIDDEN_GLOBAL = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)|but got <class '(\S+)'>")
_HEAD = "decoder.seg_layers.0.weight"
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_ALIAS = re.compile(r"\.all_modules\.(\d+)\.")


@dataclass(frozen=True)
class NnUNetCheckpoint:
    """A trained nnU-Net. ``network_state`` has the names of :class:`models.nnunet.unet.SegmentationUNet`, and
    ``encoder_state`` is its encoder's part; ``plans`` and ``dataset_json`` are plain Python types."""

    path: Path
    network_state: dict[str, Tensor]
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    architecture: Architecture

    @property
    def encoder_state(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.network_state.items() if key.startswith("encoder.")}

    @property
    def has_decoder(self) -> bool:
        """nnU-Net's own files have one; a pre-trained encoder may be stored without."""
        return _HEAD in self.network_state


def load_nnunet_checkpoint(path: Path | str) -> NnUNetCheckpoint:
    """Read ``checkpoint_best.pth`` or ``checkpoint_final.pth`` of nnU-Net v2, onto the CPU.

    Raises InputError if the file is missing or damaged, asks for anything but tensors and plain values, is not nnU-Net
    v2's (naming the key that is missing), holds weights that are not finite, or describes a network that cannot be
    rebuilt.
    """
    path = Path(path)
    content = _read(path)
    for key in ("network_weights", "init_args", "trainer_name"):
        if key not in content:
            hint = " (nnU-Net v1 is not supported)" if "state_dict" in content else ""
            raise InputError(f"{path}: key '{key}' is missing, this is no nnU-Net v2 checkpoint{hint}")
    arguments = content["init_args"]
    for key in ("plans", "configuration", "dataset_json"):
        if key not in arguments:
            raise InputError(f"{path}: key 'init_args.{key}' is missing, this is no nnU-Net v2 checkpoint")
    state = canonical_state(content["network_weights"], path)
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"{path}: '{broken[0]}' and {len(broken) - 1} other tensors hold NaN or infinite weights")
    plans, configuration = plain_types(arguments["plans"]), arguments["configuration"]
    in_channels, num_classes = _channels(state, path, len(arguments["dataset_json"].get("labels", {})))
    try:
        architecture = Architecture.from_plans(plans, configuration, in_channels=in_channels, num_classes=num_classes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return NnUNetCheckpoint(path, state, plans, configuration, plain_types(arguments["dataset_json"]), architecture)


def save_nnunet_checkpoint(
    path: Path,
    network_state: Mapping[str, Tensor],
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """Write a checkpoint that nnU-Net's predictor loads, atomically, and without optimizer state.

    ``network_state`` must have nnU-Net's names, aliases included
    (:meth:`models.nnunet.unet.SegmentationUNet.state_dict_nnunet`).
    """
    arguments = {"plans": plans, "configuration": configuration, "fold": 0, "dataset_json": dataset_json}
    content = {
        "network_weights": {key: value.detach().cpu() for key, value in network_state.items()},
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": plain_types(arguments),
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
    }
    with atomic_path(path) as part:
        torch.save(content, part)


def canonical_state(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """One name per tensor of a state dict of nnU-Net's: prefixes stripped, aliases folded.

    Where the aliases of one tensor differ, the one that nnU-Net's own loading would leave in place is taken, with a
    warning. Tensors are copied, so that the file may be unmapped.
    """
    chosen: dict[str, tuple[int, Tensor]] = {}
    conflicts = []
    for name, tensor in weights.items():
        key = name
        while key.startswith(_PREFIXES):
            key = key.split(".", 1)[1]
        # load_state_dict walks names before aliases, and the encoder once more as a part of the decoder.
        rank = 0
        if key.startswith("decoder.encoder."):
            key, rank = key.removeprefix("decoder."), 2
        if alias := _ALIAS.search(key):
            # The convolution always comes first; of what follows only the norm has parameters.
            part = "conv" if alias[1] == "0" else "norm"
            key, rank = key[: alias.start()] + f".{part}." + key[alias.end() :], rank + 1
        if key in chosen and not torch.equal(chosen[key][1], tensor):
            conflicts.append(key)
        if key not in chosen or rank > chosen[key][0]:
            chosen[key] = (rank, tensor)
    if conflicts:
        logger.warning(
            f"{path}: {len(set(conflicts))} tensors are stored with conflicting values under several names, "
            f"'{conflicts[0]}' among them; the value that nnU-Net itself would load is used"
        )
    return {key: tensor.clone() for key, (_, tensor) in chosen.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Load ``state``, every name and shape of which must fit; raises InputError that names the first misfit."""
    own = module.state_dict()
    for problem, names in (("is missing", own.keys() - state.keys()), ("is unknown", state.keys() - own.keys())):
        if names:
            raise InputError(
                f"{where}: weight '{min(names)}' {problem} (and {len(names) - 1} more); weights and plans belong "
                "to different networks"
            )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(
                f"{where}: weight '{name}' has shape {tuple(state[name].shape)}, the plans describe "
                f"{tuple(tensor.shape)}; weights and plans belong to different networks"
            )
    module.load_state_dict(state, strict=True)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file such as {path / 'fold_0' / 'checkpoint_best.pth'}")
    if not path.is_file():
        raise InputError(f"{path}: file not found; expected nnU-Net's checkpoint_best.pth or checkpoint_final.pth")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a PyTorch checkpoint, or cut short while it was copied")
    try:
        with safe_globals(_SAFE_GLOBALS):
            # Mapped, because two thirds of the file are optimizer state that is never looked at.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        forbidden = _FORBIDDEN_GLOBAL.search(str(error))
        name = forbidden and (forbidden[1] or forbidden[2])
        reason = f"asks for '{name}'" if name else "holds a pickle that cannot be read safely"
        raise InputError(
            f"{path}: {reason}; only tensors, numbers and texts are read, because loading anything else can run "
            "code; re-save the checkpoint without it if you trust its origin"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError) as error:
        raise InputError(f"{path}: damaged PyTorch checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected nnU-Net's dictionary")
    return content


def _channels(state: Mapping[str, Tensor], path: Path, labels: int) -> tuple[int, int]:
    """Input channels and classes; of an encoder without decoder, ``labels``."""
    names = ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight")
    first = [name for name in names if name in state]
    if not first:
        raise InputError(f"{path}: no first convolution of a PlainConvUNet or ResidualEncoderUNet among the weights")
    if not any(name.startswith("decoder.") for name in state):  # an encoder alone
        return state[first[0]].shape[1], max(labels, 2)
    if _HEAD not in state:
        raise InputError(f"{path}: weight '{_HEAD}' is missing, expected an nnU-Net U-Net")
    return state[first[0]].shape[1], state[_HEAD].shape[0]
