"""The quick start's language model and nnU-Net know synthetic data only: with a patient's scan they are refused.

The scripts that make them write :data:`STAMP` into the model folder's ``config.json``, or into the ``dataset_json`` of
the nnU-Net checkpoint. Synthetic data is recognised by the ``cases.json`` of ``scripts/make_phantoms.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from config.errors import InputError
from config.files import pickle_contains
from config.schema import Config

STAMP = "made_for_synthetic_data"
OWN_VALUE = {
    "mamba_model": "state-spaces/mamba-2.8b-hf",
    "nnunet_encoder_checkpoint": "d:/nnUNet_results/.../fold_0/checkpoint_best.pth",
}


def check_toy_models(config: Config, paths: Iterable[str | Path | None], allow: bool, remedy: str = "") -> None:
    """Refuse models that were made for synthetic data where ``paths`` (tables or images) hold other data.

    ``allow`` (--allow_toy_model): print a warning and go on. ``remedy``: what to do about it; by default, set the keys
    in the configuration.

    Raises InputError: such a model, such data, and not ``allow``.
    """
    toys = [key for key in OWN_VALUE if getattr(config, key) and is_toy(Path(getattr(config, key)))]
    real = next((path for path in paths if path and not is_synthetic(Path(path))), None)
    if not toys or real is None:
        return
    found = " and ".join(f"{key} ({getattr(config, key)})" for key in toys)
    message = f"{found}: made for the quick start's synthetic data, reports of {real} would be wrong"
    if allow:
        print(f"warning: {message} (--allow_toy_model)", flush=True)
        return
    remedy = remedy or " and ".join(f"set {key}: {OWN_VALUE[key]}" for key in toys)
    raise InputError(f"{message}; {remedy}, or add --allow_toy_model")


def is_toy(model: Path) -> bool:
    """Whether a language model's folder or an nnU-Net checkpoint is stamped; False where there is nothing to read."""
    description = model / "config.json"
    if description.is_file():
        return STAMP in description.read_text(encoding="utf-8", errors="replace")
    return pickle_contains(model, STAMP)


def is_synthetic(path: Path) -> bool:
    """Whether a table, or an image of its ``images`` folder, belongs to a data set of ``scripts/make_phantoms.py``."""
    return any(_is_phantom_folder(folder) for folder in list(path.parents)[:2])


@functools.cache
def _is_phantom_folder(folder: Path) -> bool:
    cases = folder / "cases.json"
    return cases.is_file() and '"lung_z_mm"' in cases.read_text(encoding="utf-8", errors="replace")[:10_000]
