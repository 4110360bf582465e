"""A trained model as one folder, or as a repository of the Hugging Face hub, by ``huggingface_hub``'s mixin.

    config.json            a checkpoint's content; a tensor in it is {"tensor": NAME}
    model.safetensors      these tensors
    nnunet_checkpoint.pth  the nnU-Net that segments
    language_model_adapters.safetensors, prompts.json      where the model has them
    language_model/        with ``language_model=True``; else the hub's name stands in config.json
    README.md              model card

Wherever a checkpoint is asked for, such a folder can be given. No table, path or scan of the training goes into it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from config.errors import InputError, first_line
from config.files import atomic_path, read_safetensors, write_text
from config.schema import FIELDS, REMOVED, Config, build_config
from models.findings_head import DESCRIPTORS
from models.language_model.mamba_lm import MambaLM
from models.nnunet.encoder import NnUNetEncoder

FORMAT = "mamba-ct-report"
VERSION = 3
REMEDY = "use one that train.py or train_vlm.py wrote"
CONFIG, WEIGHTS, LANGUAGE_MODEL = "config.json", "model.safetensors", "language_model"
# Files that the configuration names, and what they are called in the folder.
FILES = {
    "nnunet_encoder_checkpoint": "nnunet_checkpoint.pth",
    "language_model_adapters": "language_model_adapters.safetensors",
    "caption_prompt_json": "prompts.json",
}
_OF_THE_TRAINING = ("caption_csv_train", "caption_csv_val", "image_root", "path_map", "cache_dir", "output_dir")
_CARD = """---
library_name: mamba-ct-report
pipeline_tag: image-to-text
tags: [medical, radiology, chest-ct, mamba, nnunet, model_hub_mixin]
---
# Chest CT to radiology report

nnU-Net encoder, Vision-Mamba bridge, frozen Mamba language model. **Research software, not a medical device: its text
must not be used for patients.**

| | |
| --- | --- |
{rows}

```python
from engine.reporting import Reporter
from models.medical_vlm import MedicalVLM

model = MedicalVLM.from_pretrained("FOLDER OR HUB NAME")
print(Reporter.of(model).report("scan.nii.gz").full)
```

Scores belong to a report card: `python scripts/evaluate_reports.py --checkpoint FOLDER --csv test.csv --out card`.
"""
Model = TypeVar("Model", bound="Pretrained")
Vision = TypeVar("Vision", bound=nn.Module)


class Pretrained(ModelHubMixin):
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` of a model with ``vision`` and ``lm``.

    ``content``: what a checkpoint holds beside the weights of ``vision`` (engine/checkpoint.py), with the configuration
    of this machine; None for a model that is still being trained.
    """

    vision_type: type[nn.Module]
    content: dict[str, Any] | None = None
    _with_language_model = False

    def save_pretrained(
        self, save_directory: str | Path, *, language_model: bool = False, **options: Any
    ) -> str | None:
        """Write the folder. ``language_model``: copy the folder of the language model into it, which may be large;
        ``options``: of the mixin, such as ``push_to_hub``.

        Raises InputError: a model that was not loaded from a checkpoint, or a file that is no longer there.
        """
        self._with_language_model = language_model
        (Path(save_directory) / "README.md").unlink(missing_ok=True)  # the mixin keeps an old one
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.content is None:
            raise InputError("only a model of a checkpoint can be saved: Reporter.load(CHECKPOINT).model")
        values = {key: value for key, value in self.content["config"].items() if key not in _OF_THE_TRAINING}
        for key, name in FILES.items():
            if values.get(key):
                source = Path(values[key])
                if not source.is_file():
                    raise InputError(f"{key}: {source} is not there any more; it belongs to the model")
                if source.resolve() != (save_directory / name).resolve():
                    with atomic_path(save_directory / name) as part:
                        shutil.copyfile(source, part)
                values[key] = name
        values["mamba_model"] = self._language_model_name(save_directory)
        vision = {key: value.detach().cpu() for key, value in self.vision.state_dict().items()}
        tensors: dict[str, Tensor] = {}
        llm = {**self.content["llm"], "name": _public(self.content["llm"]["name"])}
        described = _split({**self.content, "config": values, "llm": llm, "model_state_dict": vision}, "", tensors)
        with atomic_path(save_directory / WEIGHTS) as part:
            save_file(tensors, part, metadata={"format": "pt"})
        write_text(save_directory / CONFIG, json.dumps(described, ensure_ascii=False, indent=1))

    def _language_model_name(self, folder: Path) -> str:
        name = self.content["config"]["mamba_model"]
        local = Path(name).is_dir()
        if self._with_language_model:
            if not local:
                raise InputError(f"language_model=True: {name} is a hub name, which needs no copy; leave it out")
            if Path(name).resolve() != (folder / LANGUAGE_MODEL).resolve():
                shutil.copytree(name, folder / LANGUAGE_MODEL, dirs_exist_ok=True)
            return LANGUAGE_MODEL
        return _public(name)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | Path,
        *,
        mamba_model: str | None = None,
        device: torch.device | str | None = None,
        **hub: Any,
    ) -> Model:
        """A saved model, ready to write reports.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the hub.
            mamba_model: another place of the language model.
            device: by default the GPU where there is one.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and others of ``snapshot_download``.

        Raises InputError: no such folder or repository, one that is not ours, or one of a newer version.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(pretrained_model_name_or_path), **hub))
            except (OSError, ValueError) as error:  # what the hub raises are OSErrors, of a wrong name a ValueError
                raise InputError(
                    f"'{pretrained_model_name_or_path}' is neither a folder nor a repository that the hub gave (a "
                    f"mirror: set HF_ENDPOINT): {first_line(error)}"
                ) from error
        content = migrated(read_folder(folder, mamba_model), folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        config = build_config(content["config"], origin=str(folder / CONFIG))
        weights = {"adapters": content.get("adapters"), "stage0": config.language_model_adapters}
        lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=device, **weights)
        vision = rebuild_vision(cls.vision_type, config, content)
        vision.load_state_dict(content["model_state_dict"])
        model = cls(vision.to(device), lm)
        model.content = {**content, "config": config.to_dict()}
        return model.eval()

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """From what the checkpoint says of itself."""
        content, config = self.content, self.content["config"]
        rows = {
            "trained to": f"step {content['step']}, validation loss {content['val_loss']:.4f}",
            "language model": f"{_public(config['mamba_model'])}, width {content['llm']['width']}, frozen",
            "Stage-0 adapters": content["llm"].get("adapters") or "none",
            "encoder": f"{content['preprocess_plan']['configuration']} of nnU-Net, slices {config['slices']}",
            "visual tokens": config["max_visual_tokens"],
            "findings that the head knows": ", ".join(content.get("findings") or []) or "none",
            "findings prompt": config["findings_prompt"],
            "language of the reports": (content.get("scan_checks") or {}).get("language") or "unknown",
        }
        lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return ModelCard(_CARD.replace("{rows}", lines))


def rebuild_vision(
    kind: type[Vision], config: Config, content: Mapping[str, Any], *, with_cmi: bool | None = None
) -> Vision:
    """The vision part as a checkpoint's content describes it; its weights are not loaded.

    ``kind``: :class:`models.medical_vlm.VisionBridge`. ``with_cmi``: None: as it was saved."""
    encoder = NnUNetEncoder.from_architecture(content["encoder_architecture"])
    saved = any(key.startswith("cmi.") for key in content["model_state_dict"])
    parts = {"with_cmi": saved if with_cmi is None else with_cmi, "findings": content.get("findings") or ()}
    return kind.build(config, encoder, content["llm"]["width"], content["diagnostics"]["expected_std"], **parts)


def read_folder(folder: Path, mamba_model: str | None = None) -> dict[str, Any]:
    """A checkpoint's content from a saved folder; files that the configuration names are those of the folder.

    Raises InputError: a file is missing or damaged, or was not written by ``save_pretrained``.
    """
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        _, tensors = read_safetensors(folder / WEIGHTS)
        content = _join(described, tensors)
        values = content["config"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} is no saved model ({first_line(error)}): expected the {CONFIG} and {WEIGHTS} of save_pretrained"
        ) from error
    for key in FILES:
        if values.get(key):
            values[key] = str((folder / values[key]).resolve())
    if mamba_model:
        values["mamba_model"] = mamba_model
    elif (folder / values["mamba_model"]).is_dir():
        values["mamba_model"] = str((folder / values["mamba_model"]).resolve())
    return content


def _public(name: str) -> str:
    """A hub name as it is, of a local folder its name: a path says something of the machine."""
    unified = name.replace("\\", "/")
    return unified.rsplit("/", 1)[-1] if unified.startswith("/") or unified[1:2] == ":" else name


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON values in place of a tree's tensors, which are put into ``tensors`` by their place in it."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {key: _split(part, f"{name}/{key}".lstrip("/"), tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_split(part, f"{name}/{k}", tensors) for k, part in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_split`, tuples being lists."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _join(part, tensors) for key, part in value.items()}
    return [_join(part, tensors) for part in value] if isinstance(value, list) else value


def _refuse_lesion_tokens(content: dict[str, Any], older: str) -> dict[str, Any]:
    """For a version whose tokens around lesions were others; without such tokens nothing changed."""
    if content.get("config", {}).get("roi_policy") == "lesion":
        raise InputError(
            f"it was trained with roi_policy: lesion of an older version, {older}; train both stages again"
        )
    return content


# From version n to n + 1; a file of an older layout passes through all that follow it.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: partial(_refuse_lesion_tokens, older="whose tokens around lesions did not pass the bridge's blocks"),
    2: partial(_refuse_lesion_tokens, older="whose regions were as wide as the lesion"),
}


def migrated(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint's content in today's layout, from a .pt or a saved folder.

    Raises InputError: not ours, of a newer version, incomplete, or trained with what is no longer a choice.
    """
    if content.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this project (no format '{FORMAT}'): {REMEDY}")
    for name in ("version", "config", "model_state_dict"):
        if name not in content:
            raise InputError(f"{path} is incomplete, it has no '{name}': {REMEDY}")
    version = content["version"]
    if version > VERSION:
        raise InputError(f"{path} has format version {version}, this program knows {VERSION}: update the program")
    while version < VERSION:
        try:
            content = MIGRATIONS[version](content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        version += 1
    for key, kept in REMOVED.items():
        value = content["config"].get(key, kept)
        if value != kept:
            reason = f"{key}: {value}, which is no longer a choice (it is always {kept})"
            raise InputError(f"{path} was trained with {reason}: train both stages again")
    known = {key: value for key, value in content["config"].items() if key in FIELDS}
    add_missing_weights(content["model_state_dict"])
    optional = dict.fromkeys(("adapters", "scan_checks", "findings"))
    # Files from before the findings prompt have none.
    return {**optional, **content, "version": VERSION, "config": {"findings_prompt": "off", **known}}


def add_missing_weights(weights: dict[str, Tensor]) -> None:
    """Buffers that the head of an older file lacks: nothing is segmented, no sizes are fitted."""
    if "head.query" in weights:
        n = len(weights["head.query"])
        weights.setdefault("head.segmented", torch.zeros(n, dtype=torch.bool))
        weights.setdefault("head.size_weights", torch.zeros(n, DESCRIPTORS))
        weights.setdefault("head.size_range", torch.tensor([[-torch.inf], [torch.inf]]).repeat(1, DESCRIPTORS))
