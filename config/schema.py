"""Every configuration key: its type, its default, its meaning. An unknown key is an error.

The user edits ``config/paths.yaml``; this file lists what it may contain. Relative paths start at the repository's
folder, whatever the working folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from config.errors import InputError, first_line
from config.files import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPOSITORY / "config" / "paths.yaml"

SlicePolicy = Literal["auto", "nnunet", "mask", "middle", "uniform"]
FindingsPrompt = Literal["off", "measured", "predicted", "both"]


def _key(default: Any, doc: str, role: str, minimum: int | None = None) -> Any:
    """A dataclass field. ``role``: ``path`` is resolved to an absolute path, ``place`` is any other value that belongs
    to this machine or data set, ``arch`` shapes the network and must agree with a checkpoint, ``tokens`` shapes the
    visual tokens and may differ from it, ``run`` may change between runs."""
    metadata = {"doc": doc, "role": role, "minimum": minimum}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The resolved configuration of one run; written into its output folder before step 0."""

    # data
    caption_csv_train: str | None = _key(None, "training table: image_path,question,answer[,mask_path]", "path")
    caption_csv_val: str | None = _key(None, "validation table, same columns", "path")
    caption_prompt_json: str | None = _key(None, "questions for rows without one", "path")
    image_root: str | None = _key(None, "where relative image paths start (empty: the table's folder)", "path")
    path_map: dict[str, str] = _key({}, 'prefixes of another machine, e.g. "d:/": "/mnt/d/"', "place")
    cache_dir: str = _key("outputs/cache", "preprocessed volumes are kept here", "path")
    output_dir: str = _key("outputs", "everything a run writes", "path")
    num_workers: int = _key(0, "processes that load data (0: the main process)", "run", 0)
    memory_cache_mb: int = _key(2048, "memory for images once read, for later epochs", "run", 0)
    # encoder
    nnunet_encoder_checkpoint: str | None = _key(None, "your nnU-Net checkpoint_best.pth", "path")
    image_axis_order: Literal["canonical", "file"] = _key(
        "canonical",
        "canonical: volumes are turned to the order of the plans' reader; file: they keep their file's axis order, "
        "as nnU-Net's SimpleITKIO and NibabelIO read them (for a network that was trained on files of another order)",
        "arch",
    )
    encoder_output_stage: int | None = _key(None, "encoder stage (empty: deepest that fills the token grid)", "arch", 0)
    encoder_target_spatial: int = _key(28, "side of the grid of features: 28 -> 784 of each slice", "arch", 1)
    train_encoder: bool = _key(True, "false keeps the nnU-Net encoder as it was trained", "run")
    slices: int | None = _key(
        None,
        "axial slices per case (empty: as many as the lesions of the training table need within the token budget, and "
        "some spread over the scan), or depth planes of a 3-D encoder (empty: 1)",
        "tokens",
        1,
    )
    slice_policy: SlicePolicy = _key(
        "auto",
        "auto: slices that show the lesions of nnU-Net's own segmentation, or of a row's mask where the checkpoint has "
        "no decoder, and slices spread over the scan; nnunet: of the segmentation alone; mask: of the mask, else the "
        "middle; middle; uniform: spread over the scan",
        "run",
    )
    min_lesion_mm3: float | None = _key(
        None, "smaller lesions of the segmentation are dropped (empty: chosen on the masks of both tables)", "run", 0
    )
    augment_shift: int = _key(0, "training images are moved in plane by up to so many voxels", "run", 0)
    augment_rotate: float = _key(0.0, "they are turned in plane by up to so many degrees", "run", 0)
    augment_noise: float = _key(0.0, "they get Gaussian noise up to this standard deviation (normalised)", "run", 0)
    # bridge
    bridge_depth: int = _key(2, "Vision-Mamba blocks", "arch", 1)
    bridge_width: int = _key(512, "inner width of the bridge; its output has the LLM's width", "arch", 8)
    max_visual_tokens: int = _key(64, "visual tokens given to the LLM (largest square grid that fits)", "tokens", 1)
    roi_side: int | None = _key(None, "region of interest on the feature map: 7 -> 49 tokens", "arch", 1)
    roi_policy: Literal["centre", "lesion"] = _key(
        "centre", "centre: that crop alone; lesion: all features, and so many around each slice's lesion", "arch"
    )
    use_cmi: bool = _key(False, "the question steers the visual tokens (Cross-Mamba Interaction)", "tokens")
    cmi_compress_to: int | None = _key(None, "visual tokens after CMI, if fewer", "tokens", 1)
    findings_prompt: FindingsPrompt = _key(
        "both",
        "a line before the question: lesions measured on the segmentation, the findings head's findings, both, or none",
        "run",
    )
    # language model
    mamba_model: str = _key("state-spaces/mamba-2.8b-hf", "hub name or local folder of the Mamba LLM", "place")
    language_model_adapters: str | None = _key(
        None, "Stage 0's adapters, from scripts/adapt_language_model.py (empty: none)", "path"
    )
    mamba_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "auto", "auto: bfloat16 on a GPU or for a large model, else float32", "run"
    )
    llm_checkpointing: bool | Literal["auto"] | None = _key(
        "auto",
        "blocks of the LLM that are computed again in the backward pass, which saves memory: auto: on a GPU as many as "
        "do not fit into its memory, elsewhere all from 1e9 parameters on; true: all; false: none",
        "run",
    )
    gpu_memory_fraction: float | None = _key(
        None, "most of the GPU's memory that this program may take, 0 to 1 (empty: 0.95 on Windows, else all)", "run", 0
    )
    max_question_tokens: int = _key(128, "questions are cut here", "run", 1)
    max_answer_tokens: int = _key(1024, "reports are cut here; how many were is printed", "run", 1)

    def resolved(self, key: str) -> Path:
        """The path under ``key``. Raises :class:`InputError` when the key is empty."""
        value = getattr(self, key)
        if not value:
            raise InputError(f"configuration key '{key}' is empty: set it in the configuration file")
        return Path(value)

    @property
    def table_root(self) -> Path | None:
        """``image_root``: where relative paths of a table start. None stands for the table's own folder."""
        return Path(self.image_root) if self.image_root else None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Config:
        return build_config({**self.to_dict(), **changes}, origin="command line")


# Choices that made no difference (docs/ablations.md), and the value that each now always has.
REMOVED = {"bridge_mixer": "vim", "bridge_pool": "after", "cmi_kind": "text_ssm", "roi_scales": 1}
FIELDS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(Config)}
_TYPES = get_type_hints(Config)
_POWER_OF_TEN = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def keys_with_role(role: str) -> list[str]:
    return [name for name, f in FIELDS.items() if f.metadata["role"] == role]


def yaml_line(key: str, value: Any) -> str:
    """``key: value`` as a line of the configuration file, also where the value is empty."""
    return yaml.safe_dump({key: value}, allow_unicode=True, width=math.inf).strip()


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or mapping as key: refused by the base class
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise InputError(f"{self.name}: key '{key_node.value}' stands twice (line {line}); keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path | None = None, **overrides: Any) -> Config:
    """Read a YAML configuration; ``overrides`` that are not ``None`` win over the file.

    Raises InputError: the file is missing or is not YAML, or a key is unknown or of the wrong type.
    """
    path = Path(path) if path else DEFAULT_CONFIG
    if not path.is_file():
        remedy = f"pass --config FILE (the shipped one is {DEFAULT_CONFIG})"
        raise InputError(f"configuration file not found: {path}; {remedy}")
    try:
        with path.open(encoding="utf-8-sig") as stream:
            values = yaml.load(stream, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise InputError(
            f"{path} is not valid YAML: {detail} (write Windows paths with forward slashes or in single quotes)"
        ) from error
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start}"
        raise InputError(f"{path} is not UTF-8 text ({detail}): save it as UTF-8") from error
    except InputError:
        raise
    except ValueError as error:  # a date that is none
        raise InputError(f"{path}: {first_line(error)}: put values such as 2024-13-45 in quotes") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        hint = "; '：' is no colon to YAML, type ':' and a blank" if "：" in str(values) else ""
        raise InputError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}{hint}")
    given = {key: value for key, value in overrides.items() if value is not None}
    return build_config({**values, **given}, origin=str(path))


def build_config(values: dict[str, Any], origin: str) -> Config:
    """Check ``values`` against the schema and resolve its paths; ``origin`` is named in errors."""
    for key in values:
        if key in REMOVED:
            raise InputError(f"{origin}: '{key}' is no longer a choice (it is always {REMOVED[key]}): delete the line")
        if key not in FIELDS:
            near = difflib.get_close_matches(str(key).lower(), FIELDS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(FIELDS)}"
            raise InputError(f"{origin}: unknown configuration key '{key}'; {hint}")
    checked = {key: _checked(key, value, origin) for key, value in values.items()}
    path_map = checked.get("path_map", {})
    for key in keys_with_role("path"):
        if checked.get(key):
            checked[key] = str(resolve_path(checked[key], REPOSITORY, path_map))
    defaults = Config()
    for key in ("cache_dir", "output_dir"):
        checked.setdefault(key, str(resolve_path(getattr(defaults, key), REPOSITORY, path_map)))
    if "mamba_model" in checked:
        local = resolve_path(checked["mamba_model"], REPOSITORY, path_map)
        if local.is_dir():
            checked["mamba_model"] = str(local)
    return Config(**checked)


def resolve_path(raw: str, base: Path, path_map: dict[str, str] | None = None) -> Path:
    """Apply ``path_map`` (longest prefix first, case and slash direction ignored), then ``base``.

    A prefix ends where a folder's name ends: ``d:/ct`` does not match ``d:/ct2``. A path inside the target stays as it
    is: resolving twice gives the same, also where the target begins with the prefix.
    """
    unified = raw.strip().strip('"').replace("\\", "/")  # Windows copies a path in quotes
    for prefix, target in sorted((path_map or {}).items(), key=lambda item: -len(item[0])):
        here, there = target.replace("\\", "/").rstrip("/"), prefix.replace("\\", "/").rstrip("/")
        if _inside(unified, there):
            if not (_inside(here, there) and _inside(unified, here)):
                unified = here + unified[len(there) :]
            break
    # The user's own home alone: a cell such as "~$scan.nii.gz" is no home, though Windows would make one of it.
    path = Path(unified)
    path = path.expanduser() if path.parts[:1] == ("~",) else path
    has_drive = len(unified) > 1 and unified[1] == ":"  # of another machine, when this one is not Windows
    return path if path.is_absolute() or has_drive else (base / path).resolve()


def _inside(path: str, folder: str) -> bool:
    return f"{path}/".lower().startswith(f"{folder}/".lower())


def write_config(config: Config, path: Path) -> None:
    """Write every key with its one-line comment, atomically; ``--config`` takes the result."""
    lines = ["# The resolved configuration of this run; usable with --config."]
    for name, f in FIELDS.items():
        lines += [f"# {f.metadata['doc']}", yaml_line(name, getattr(config, name))]
    write_text(path, "\n".join(lines) + "\n")


def _checked(key: str, value: Any, origin: str) -> Any:
    expected = _TYPES[key]
    if value is False and "off" in get_args(expected):
        value = "off"  # which YAML 1.1 reads as false
    if isinstance(value, str) and float in (expected, *get_args(expected)) and re.fullmatch(_POWER_OF_TEN, value):
        value = float(value)  # which YAML 1.1 reads as text
    if not _matches(value, expected):
        raise InputError(f"{origin}: '{key}' is {value!r}, expected {_describe(expected)}")
    if isinstance(value, str) and any(character < " " for character in value.strip()):
        raise InputError(
            f"{origin}: '{key}' is {value!r}, with control characters in it: between double quotes YAML reads \\n and "
            "\\t as a line break and a tab; write Windows paths with forward slashes or in single quotes"
        )
    minimum = FIELDS[key].metadata["minimum"]
    if minimum is not None and value is not None and value < minimum:
        raise InputError(f"{origin}: '{key}' is {value}, expected at least {minimum}")
    return float(value) if isinstance(value, int) and float in (expected, *get_args(expected)) else value


def _matches(value: Any, expected: Any) -> bool:
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in get_args(expected))
    if origin is Literal:
        return value in get_args(expected)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(t, str) for pair in value.items() for t in pair)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, expected)


def _describe(expected: Any) -> str:
    origin = get_origin(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(expected))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(expected))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "nothing (empty)" if expected is type(None) else names.get(expected, "'text: text' pairs")
