"""Models of the quick start are refused with a patient's scan, and accepted with synthetic data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from config.errors import InputError
from config.schema import Config, build_config
from config.toy_models import STAMP, check_toy_models
from data.phantom.dataset import make_dataset
from models.language_model.identity import read_lm_config
from models.nnunet.checkpoint import load_nnunet_checkpoint, save_nnunet_checkpoint
from scripts import make_tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """``lm`` and ``nnunet.pth`` with the stamp, a synthetic data set in ``data``, and a table of one's own."""
    folder = tmp_path_factory.mktemp("toys")
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    dataset = {**source.dataset_json, STAMP: True}
    save_nnunet_checkpoint(folder / "nnunet.pth", source.network_state, source.plans, source.configuration, dataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny_lm.py", "--out", str(folder / "lm"), "--steps", "1", "--width", "32"])
        make_tiny_lm.main()
    make_dataset(folder / "data", 1, 0, 0, seed=0, workers=1)
    (folder / "own.csv").write_text("image_path,question,answer\n", encoding="utf-8")
    return folder


def config(folder: Path, **keys: str) -> Config:
    toys = {"mamba_model": str(folder / "lm"), "nnunet_encoder_checkpoint": str(folder / "nnunet.pth")}
    return build_config({**toys, **keys}, "test")


def test_the_stamp_stays_in_the_files_and_no_loader_minds(folder: Path) -> None:
    assert json.loads((folder / "lm" / "config.json").read_text(encoding="utf-8"))[STAMP] is True
    assert read_lm_config(str(folder / "lm")).hidden_size == 32
    assert load_nnunet_checkpoint(folder / "nnunet.pth").dataset_json[STAMP] is True


def test_synthetic_tables_and_images_are_fine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "data"
    check_toy_models(config(folder), [data / "train.csv", None, data / "images" / "train_0000.nii.gz"], allow=False)
    assert capsys.readouterr().out == ""


def test_own_data_is_refused_naming_each_key_and_a_value(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_toy_models(config(folder), [folder / "data" / "train.csv", folder / "own.csv"], allow=False)
    message = str(caught.value)
    assert "\n" not in message and str(folder / "own.csv") in message and "--allow_toy_model" in message
    assert "set mamba_model: state-spaces/mamba-2.8b-hf and set nnunet_encoder_checkpoint: " in message


@pytest.mark.parametrize("key", ["mamba_model", "nnunet_encoder_checkpoint"])
def test_one_toy_beside_an_own_model_is_refused(folder: Path, assets: Path, key: str) -> None:
    nnunet = str(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    own = {"mamba_model": "state-spaces/mamba-2.8b-hf", "nnunet_encoder_checkpoint": nnunet}
    check_toy_models(config(folder, **own), [folder / "own.csv"], allow=False)
    del own[key]
    with pytest.raises(InputError, match=f"^{key} .*set {key}: "):
        check_toy_models(config(folder, **own), [folder / "own.csv"], allow=False)


def test_allowed_it_is_still_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_toy_models(config(folder), [folder / "own.csv"], allow=True)
    assert capsys.readouterr().out.startswith("warning: mamba_model (")
