"""A model saved as a folder writes the same report, holds nothing of the training machine, and is refused in one line
where it is damaged; the manual's five lines run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, save_file

import config.schema
from config.errors import InputError
from config.schema import REPOSITORY
from engine.chain import SHIPPED_DEMO, SHIPPED_LANGUAGE_MODEL
from engine.checkpoint import load_checkpoint
from engine.reporting import Reporter
from models.medical_vlm import MedicalVLM

SCAN = SHIPPED_DEMO / "data" / "images" / "val_0000.nii.gz"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, demo_reporter) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "my_model"
    demo_reporter.model.save_pretrained(folder, language_model=True)
    return folder


def test_the_five_lines_of_the_manual_write_the_same_report(saved, demo_reporter, tmp_path, monkeypatch, capsys):
    [block] = re.findall(
        r"```python\n(from engine.reporting.*?)```", (REPOSITORY / "README.md").read_text("utf-8"), re.S
    )
    assert len([line for line in block.splitlines() if line]) <= 5
    (tmp_path / "outputs").mkdir()
    shutil.copytree(saved, tmp_path / "outputs" / "my_model")
    shutil.copy(SCAN, tmp_path / "scan.nii.gz")
    shutil.copy(SHIPPED_DEMO / "data" / "cases.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config.schema, "REPOSITORY", tmp_path)  # its cache goes there
    monkeypatch.setattr("config.toy_models.is_synthetic", lambda path: True)  # a relative path has no second parent
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102  (the repository's own manual)
    assert demo_reporter.report(SCAN).full in capsys.readouterr().out


def test_the_folder_is_a_checkpoint_for_every_script(saved):
    folder, file = load_checkpoint(saved), load_checkpoint(SHIPPED_DEMO / "vision_bridge_vlm.pt")
    assert folder.preprocess_plan == file.preprocess_plan and folder.findings == list(file.findings)
    assert all(torch.equal(value, folder.model_state_dict[key]) for key, value in file.model_state_dict.items())
    there, here = file.scan_checks["feature_distance"], folder.scan_checks["feature_distance"]
    assert all(torch.equal(value, here[key]) for key, value in there.items())
    assert folder.build_vision().head.names == file.build_vision().head.names


def test_a_folder_from_before_sizes_were_fitted_is_read(saved, demo_reporter, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "older")
    weights = load((folder / "model.safetensors").read_bytes())
    weights = {name: weight for name, weight in weights.items() if "head.size_" not in name}
    save_file(weights, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del described["model_state_dict"]["head.size_weights"], described["model_state_dict"]["head.size_range"]
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    model = MedicalVLM.from_pretrained(folder, mamba_model=demo_reporter.model.lm.name)
    assert not model.vision.head.size_weights.any()
    assert not load_checkpoint(folder).build_vision().head.size_weights.any()


def test_the_folder_says_nothing_of_the_machine_and_much_of_the_model(saved):
    described = (saved / "config.json").read_text(encoding="utf-8")
    assert str(REPOSITORY) not in described and "/work/" not in described and "caption_csv" not in described
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "mamba-ct-report" and "not a medical device" in card.text
    assert "cavity" in card.text and "mamba_general" in card.text


def test_the_language_model_may_stay_where_it_is(demo_reporter, tmp_path):
    demo_reporter.model.save_pretrained(tmp_path)
    assert not (tmp_path / "language_model").exists()
    assert (
        json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["config"]["mamba_model"] == "mamba_general"
    )
    model = MedicalVLM.from_pretrained(tmp_path, mamba_model=str(SHIPPED_LANGUAGE_MODEL), device="cpu")
    assert isinstance(model, MedicalVLM) and not model.training
    model.save_pretrained(tmp_path)  # onto itself
    assert Reporter.load(tmp_path, mamba_model=str(SHIPPED_LANGUAGE_MODEL)).reader.checkpoint.findings


def test_a_folder_that_is_no_model_is_one_line(saved, tmp_path, demo_reporter):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="is no saved model"):
        load_checkpoint(copy)
    with pytest.raises(InputError, match="is no saved model"):
        MedicalVLM.from_pretrained(tmp_path)
    described = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**described, "version": 99}), encoding="utf-8")
    shutil.copy(saved / "model.safetensors", copy)
    for read in (load_checkpoint, MedicalVLM.from_pretrained):
        with pytest.raises(InputError, match="format version 99, this program knows 3: update"):
            read(copy)
    with pytest.raises(InputError, match="neither a folder nor a repository"):
        MedicalVLM.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(InputError, match="only a model of a checkpoint can be saved"):
        MedicalVLM(demo_reporter.model.vision, demo_reporter.lm).save_pretrained(tmp_path / "new")
