"""What preprocessing needs of an nnU-Net plans file, as one small value that can be stored and hashed.

nnU-Net's plans describe a whole experiment. :class:`PreprocessPlan` keeps the part that decides voxel values, so that a
checkpoint of this project reproduces the preprocessing without the plans. It lies here because both ``data`` and
``models`` need it, and neither imports the other.

Axis order: nnU-Net's own, i.e. array axes (z, y, x) permuted by ``transpose_forward``. Spacing is in mm.

Source: nnU-Net 2.8.1, ``nnunetv2/utilities/plans_handling/plans_handler.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from config.errors import InputError

NORMALIZATION_SCHEMES = ("CTNormalization", "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization")
_RESAMPLING_FUNCTION = "resample_data_or_seg_to_shape"
_PREPROCESSOR = "DefaultPreprocessor"

# The orientation that each of nnU-Net's readers gives. SimpleITKIO and NibabelIO keep the file's own order, which is
# LPS for converted DICOM series.
_ORIENTATION_OF_READER = {
    "SimpleITKIO": "LPS",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIO": "LPS",
    "NibabelIOWithReorient": "RAS",
}


@dataclass(frozen=True)
class Intensity:
    """Foreground intensities of one channel over the training set, in the image's unit (CT: HU)."""

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True)
class Resampling:
    """Arguments of nnU-Net's ``resample_data_or_seg_to_shape``; the defaults are nnU-Net's planner's."""

    order: int
    order_z: int = 0
    force_separate_z: bool | None = None
    separate_z_anisotropy_threshold: float = 3.0


@dataclass(frozen=True)
class PreprocessPlan:
    """Everything that decides the voxel values a network of one nnU-Net configuration is fed.

    ``spacing`` has ``dim`` entries: a 2D configuration keeps the spacing of the first axis as it is.
    ``orientation``: three axis codes such as "LPS", or "file" for each file's own order.
    ``intensity`` has one entry per channel, None where the plans give no foreground intensities.
    """

    configuration: str
    dim: int
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    transpose_forward: tuple[int, int, int]
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensity: tuple[Intensity | None, ...]
    image_reader_writer: str
    orientation: str
    data_resampling: Resampling
    mask_resampling: Resampling

    def __post_init__(self) -> None:
        where = f"plans, configuration '{self.configuration}'"
        if self.dim not in (2, 3):
            raise InputError(f"{where}: patch_size has {self.dim} axes, expected 2 or 3")
        if len(self.patch_size) != self.dim or min(self.patch_size) < 1:
            raise InputError(f"{where}: patch_size {self.patch_size} does not fit a {self.dim}D network")
        if len(self.spacing) not in (self.dim, 3) or min(self.spacing) <= 0:
            raise InputError(f"{where}: spacing {self.spacing} must be {self.dim} positive numbers (mm)")
        if sorted(self.transpose_forward) != [0, 1, 2]:
            raise InputError(f"{where}: transpose_forward {self.transpose_forward} is no permutation of 0, 1, 2")
        channels = len(self.normalization_schemes)
        if channels == 0 or len(self.use_mask_for_norm) != channels or len(self.intensity) != channels:
            raise InputError(
                f"{where}: {channels} normalization_schemes, {len(self.use_mask_for_norm)} use_mask_for_norm "
                f"and {len(self.intensity)} intensity entries; expected one of each per input channel"
            )
        for channel, (scheme, intensity) in enumerate(zip(self.normalization_schemes, self.intensity, strict=True)):
            if scheme not in NORMALIZATION_SCHEMES:
                known = f"expected one of {', '.join(NORMALIZATION_SCHEMES)}"
                name = f"normalization scheme '{scheme}' of channel {channel}"
                raise InputError(f"{where}: {name} is not supported; {known}")
            if scheme == "CTNormalization" and intensity is None:
                key = f"foreground_intensity_properties_per_channel['{channel}']"
                raise InputError(f"{where}: CTNormalization of channel {channel} needs {key}, which the plans lack")

    @classmethod
    def from_nnunet(cls, plans: Mapping[str, Any], configuration: str, axis_order: str = "canonical") -> PreprocessPlan:
        """Read nnU-Net ``plans`` (the dict of ``plans.json`` or of a checkpoint's ``init_args``).

        ``axis_order`` "file" keeps each file's own order, as SimpleITKIO and NibabelIO do; the reorienting readers give
        RAS all the same. Raises InputError, naming key and value, where preprocessing would not equal nnU-Net's.
        """
        resolved = resolve_configuration(plans, configuration)
        where = f"plans, configuration '{configuration}'"
        preprocessor = resolved.get("preprocessor_name", _PREPROCESSOR)
        if preprocessor != _PREPROCESSOR:
            raise InputError(f"{where}: preprocessor '{preprocessor}' is not supported, only {_PREPROCESSOR}")
        reader = required(plans, "image_reader_writer", "plans")
        if reader not in _ORIENTATION_OF_READER:
            known = ", ".join(_ORIENTATION_OF_READER)
            raise InputError(f"plans: image_reader_writer '{reader}' is not supported; expected one of {known}")
        reorients = reader.endswith("WithReorient")
        schemes = tuple(required(resolved, "normalization_schemes", where))
        properties = plans.get("foreground_intensity_properties_per_channel") or {}
        patch_size = tuple(int(size) for size in required(resolved, "patch_size", where))
        return cls(
            configuration=configuration,
            dim=len(patch_size),
            spacing=tuple(float(step) for step in required(resolved, "spacing", where)),
            patch_size=patch_size,
            transpose_forward=tuple(int(axis) for axis in required(plans, "transpose_forward", "plans")),
            normalization_schemes=schemes,
            use_mask_for_norm=tuple(bool(flag) for flag in required(resolved, "use_mask_for_norm", where)),
            intensity=tuple(_intensity(properties.get(str(channel)), channel) for channel in range(len(schemes))),
            image_reader_writer=reader,
            orientation="file" if axis_order == "file" and not reorients else _ORIENTATION_OF_READER[reader],
            data_resampling=_resampling(resolved, "data", where),
            mask_resampling=_resampling(resolved, "seg", where),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python types only: survives JSON and ``torch.load(weights_only=True)``."""
        return plain_types(asdict(self))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> PreprocessPlan:
        """Inverse of :meth:`to_dict`. Raises InputError for a missing or unknown key."""
        expected = set(cls.__dataclass_fields__)
        if set(stored) != expected:
            missing, unknown = sorted(expected - set(stored)), sorted(set(stored) - expected)
            raise InputError(f"stored preprocessing plan: missing keys {missing}, unknown keys {unknown}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
        values["intensity"] = tuple(Intensity(**entry) if entry else None for entry in stored["intensity"])
        values["data_resampling"] = Resampling(**stored["data_resampling"])
        values["mask_resampling"] = Resampling(**stored["mask_resampling"])
        return cls(**values)


def resolve_configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration ``name`` of nnU-Net ``plans`` with its chain of ``inherits_from`` merged in.

    Raises InputError if the configuration, or one it inherits from, does not exist or inherits in a circle.
    """
    configurations = plans.get("configurations")
    if not isinstance(configurations, Mapping):
        raise InputError("plans: key 'configurations' is missing; expected the plans of nnU-Net v2")
    chain: list[str] = []
    while name is not None:
        if name in chain:
            raise InputError(f"plans: configurations inherit in a circle: {' -> '.join([*chain, name])}")
        if name not in configurations:
            available = ", ".join(sorted(configurations))
            origin = f" (which '{chain[-1]}' inherits from)" if chain else ""
            raise InputError(f"plans: no configuration '{name}'{origin}; the plans hold: {available}")
        chain.append(name)
        name = configurations[name].get("inherits_from")
    merged: dict[str, Any] = {}
    for ancestor in reversed(chain):
        merged.update(configurations[ancestor])
    merged.pop("inherits_from", None)
    return merged


def required(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    """``mapping[key]``. Raises InputError that says ``where`` the key is missing."""
    if key not in mapping:
        raise InputError(f"{where}: key '{key}' is missing")
    return mapping[key]


def plain_types(value: Any) -> Any:
    """Dictionaries, lists, numbers and texts instead of mappings, tuples and NumPy scalars, as JSON stores them."""
    if isinstance(value, Mapping):
        return {str(key): plain_types(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_types(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def _intensity(properties: Mapping[str, Any] | None, channel: int) -> Intensity | None:
    if properties is None:
        return None
    where = f"plans, foreground_intensity_properties_per_channel['{channel}']"
    return Intensity(**{key: float(required(properties, key, where)) for key in Intensity.__dataclass_fields__})


def _resampling(resolved: Mapping[str, Any], kind: str, where: str) -> Resampling:
    function = resolved.get(f"resampling_fn_{kind}", _RESAMPLING_FUNCTION)
    if function != _RESAMPLING_FUNCTION:
        raise InputError(f"{where}: resampling_fn_{kind} '{function}' is not supported, only {_RESAMPLING_FUNCTION}")
    key = f"resampling_fn_{kind}_kwargs"
    given = dict(required(resolved, key, where))
    if given.pop("is_seg", kind == "seg") != (kind == "seg"):
        raise InputError(f"{where}: {key} has the wrong is_seg for {kind}")
    unknown = sorted(set(given) - set(Resampling.__dataclass_fields__))
    if unknown:
        raise InputError(f"{where}: {key} has arguments that are not supported: {', '.join(unknown)}")
    # A key that is absent means the function's own default (order 3, no separate z), not what the planner writes.
    settings = Resampling(**{"order": 3, "order_z": 0, "force_separate_z": False, **given})
    # Interpolation orders of labels other than nearest and linear give no partition of unity.
    allowed = (range(6), range(6)) if kind == "data" else (range(2), range(1))
    if settings.order not in allowed[0] or settings.order_z not in allowed[1]:
        raise InputError(f"{where}: {key} with order {settings.order} and order_z {settings.order_z} is not supported")
    return settings
