"""nnU-Net's checkpoint files: read safely, refused clearly, written so that they read back the same."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from models.nnunet.checkpoint import canonical_state, load_nnunet_checkpoint, save_nnunet_checkpoint
from models.nnunet.unet import SegmentationUNet


@pytest.fixture
def original(assets) -> Path:
    return assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"


@pytest.fixture
def content(original) -> dict:
    return torch.load(original, weights_only=False)  # our own asset


def _rewrite(source: Path, target: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a checkpoint."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as after:
        for name in before.namelist():
            data = before.read(name)
            if name.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            after.writestr(name, data)


def test_reads_what_a_trained_nnunet_stores(original):
    checkpoint = load_nnunet_checkpoint(original)
    assert checkpoint.configuration == "2d"
    assert checkpoint.dataset_json["channel_names"] == {"0": "CT"}
    assert checkpoint.architecture.in_channels == 1 and checkpoint.architecture.num_classes == 2
    assert not any("all_modules" in key or key.startswith("decoder.enc") for key in checkpoint.network_state)
    assert all(key.startswith("encoder.") for key in checkpoint.encoder_state)
    assert PreprocessPlan.from_nnunet(checkpoint.plans, "2d").dim == 2


@pytest.mark.parametrize("spelling", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_scalars_of_numpy_1_and_2_are_read(original, tmp_path, spelling):
    _rewrite(original, tmp_path / "checkpoint.pth", b"numpy._core.multiarray", spelling)
    assert load_nnunet_checkpoint(tmp_path / "checkpoint.pth").configuration == "2d"


@pytest.mark.parametrize("kind", [np.float16, np.int8, np.uint16])
def test_scalars_of_any_width_are_read(content, tmp_path, kind):
    content["logging"] = {"ema_fg_dice": [kind(1)]}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert load_nnunet_checkpoint(tmp_path / "checkpoint.pth").configuration == "2d"


class _Harmful:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_a_pickle_that_runs_code_is_refused_and_named(content, tmp_path):
    content["logging"] = _Harmful(f"echo harm > {tmp_path / 'harm'}")
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=r"checkpoint\.pth: asks for '(posix|nt)\.system'") as refusal:
        load_nnunet_checkpoint(tmp_path / "checkpoint.pth")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(logging=np.complex64(1)), r"asks for 'numpy\.dtypes\.Complex64DType'"),
        (lambda c: c["init_args"]["plans"].update(author=Path("somewhere")), r"asks for 'pathlib\.\w*Path'"),
        (lambda c: c.pop("network_weights"), "key 'network_weights' is missing"),
        (lambda c: c.pop("init_args"), "key 'init_args' is missing"),
        (lambda c: c.pop("trainer_name"), "key 'trainer_name' is missing"),
        (lambda c: c["init_args"].pop("plans"), r"'init_args\.plans' is missing"),
        (lambda c: (c.clear(), c.update(state_dict={}, epoch=3)), "v1 is not supported"),
        (lambda c: c.update(network_weights={"conv.weight": torch.zeros(1)}), "no first convolution"),
        (lambda c: c["network_weights"].pop("decoder.seg_layers.0.weight"), "seg_layers.0.weight' is missing"),
        (lambda c: c["network_weights"]["decoder.seg_layers.0.bias"].fill_(np.nan), r"layers\.0\.bias.*NaN"),
        (
            lambda c: c["init_args"]["plans"]["configurations"]["2d"]["architecture"].update(network_class_name="Mine"),
            "architecture: network 'Mine'",
        ),
    ],
)
def test_what_cannot_be_used_names_the_file_and_the_reason(content, tmp_path, change, message):
    change(content)
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=rf"checkpoint\.pth: .*{message}"):
        load_nnunet_checkpoint(tmp_path / "checkpoint.pth")


def test_missing_truncated_and_unrelated_files(original, tmp_path):
    with pytest.raises(InputError, match="file not found"):
        load_nnunet_checkpoint(tmp_path / "checkpoint_best.pth")
    with pytest.raises(InputError, match="is a folder"):
        load_nnunet_checkpoint(tmp_path)
    for name, data in (("cut.pth", original.read_bytes()[:-4000]), ("text.pth", b"hello"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="not a PyTorch checkpoint"):
            load_nnunet_checkpoint(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(InputError, match="holds a Tensor"):
        load_nnunet_checkpoint(tmp_path / "tensor.pth")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    with pytest.raises(InputError, match="damaged PyTorch checkpoint"):
        load_nnunet_checkpoint(tmp_path / "archive.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(prefix):
    state = canonical_state({f"{prefix}encoder.stem.weight": torch.ones(2)}, Path("x"))
    assert list(state) == ["encoder.stem.weight"]


def test_the_alias_that_nnunet_would_load_last_wins(caplog):
    stem = "stages.0.0.convs.0"
    names = [
        f"decoder.encoder.{stem}.all_modules.0.weight",  # given first: rank decides, not the order in the file
        f"encoder.{stem}.conv.weight",
        f"encoder.{stem}.all_modules.0.weight",
        f"decoder.encoder.{stem}.conv.weight",
    ]
    with caplog.at_level(logging.WARNING):
        state = canonical_state({name: torch.tensor([float(i)]) for i, name in enumerate(names)}, Path("x.pth"))
    assert state == {f"encoder.{stem}.conv.weight": torch.tensor([0.0])}
    assert "x.pth: 1 tensors are stored with conflicting values" in caplog.text


@pytest.mark.parametrize(("index", "layer"), [(0, "conv"), (1, "norm"), (2, "norm")])
def test_aliases_are_folded_by_their_place_in_the_block(index, layer):
    state = canonical_state({f"decoder.stages.1.convs.0.all_modules.{index}.bias": torch.ones(1)}, Path("x"))
    assert list(state) == [f"decoder.stages.1.convs.0.{layer}.bias"]


def test_agreeing_aliases_are_not_worth_a_warning(original, caplog):
    with caplog.at_level(logging.WARNING):
        load_nnunet_checkpoint(original)
    assert not caplog.records


def test_written_checkpoints_have_nnunets_format_and_read_back(original, content, tmp_path):
    first = load_nnunet_checkpoint(original)
    network = SegmentationUNet.from_checkpoint(first)
    path = tmp_path / "fold_0" / "checkpoint_best.pth"
    save_nnunet_checkpoint(path, network.state_dict_nnunet(), first.plans, first.configuration, first.dataset_json)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary left
    stored = torch.load(path, weights_only=True)
    assert stored.keys() == content.keys()
    assert stored["network_weights"].keys() == content["network_weights"].keys()
    assert path.stat().st_size < original.stat().st_size  # aliases share storage; no optimizer state
    second = load_nnunet_checkpoint(path)
    assert second.plans == first.plans and second.architecture == first.architecture
    assert second.network_state.keys() == first.network_state.keys()
    assert all(torch.equal(second.network_state[key], value) for key, value in first.network_state.items())


def test_the_file_may_be_replaced_after_reading(original, tmp_path):
    """Weights are copied out of the mapped file."""
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(original.read_bytes())
    checkpoint = load_nnunet_checkpoint(path)
    before = {key: value.clone() for key, value in checkpoint.network_state.items()}
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(checkpoint.network_state[key], value) for key, value in before.items())
