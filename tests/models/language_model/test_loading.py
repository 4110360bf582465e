"""Loading as the hub stores a model, its identity, and what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from config.errors import InputError
from models.language_model.embedding_table import load_embedding_table
from models.language_model.identity import read_lm_config, read_tokenizer
from models.language_model.loading import TIED_MESSAGE
from models.language_model.mamba_lm import MambaLM
from tests.models.language_model.tiny import byte_tokenizer, random_mamba, without_head


def test_loads_shards_without_head_and_ties(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_head(folder)
    lm = MambaLM.load(str(folder))
    assert TIED_MESSAGE in capsys.readouterr().out
    assert lm.model.lm_head.weight is lm.model.get_input_embeddings().weight
    assert not any(p.requires_grad for p in lm.parameters())
    assert torch.equal(lm.model.get_input_embeddings().weight, random_mamba().get_input_embeddings().weight)


def test_decay_rates_stay_float32_in_bfloat16(folder: Path) -> None:
    model = MambaLM.load(str(folder), dtype="bfloat16").model
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj.weight.dtype is torch.bfloat16
    assert mixer.A_log.dtype is torch.float32 and mixer.D.dtype is torch.float32


def test_embedding_table_alone_equals_the_models(folder: Path) -> None:
    table = load_embedding_table(str(folder))
    assert torch.equal(table, MambaLM.load(str(folder)).model.get_input_embeddings().weight)


@pytest.mark.parametrize("reader", [read_lm_config, MambaLM.load, load_embedding_table])
def test_missing_model_is_one_line(reader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mamba_model '.*nowhere'"):
        reader(str(tmp_path / "nowhere"))


def test_a_missing_tokenizer_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    random_mamba().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        read_tokenizer(str(tmp_path))
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load(file.read_bytes())  # not mapped: it is written again
    del tensors["backbone.layers.1.mixer.A_log"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mixer\.A_log"):
        MambaLM.load(str(tmp_path))


def test_eight_bit_without_bitsandbytes_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="--llm_8bit needs bitsandbytes"):
        MambaLM.load(str(folder), load_in_8bit=True)


def test_a_truncated_file_of_weights_is_told_by_its_header(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    weights = max((tmp_path / "model").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{weights.name} is damaged .*: copy or download it again"):
        read_lm_config(str(tmp_path / "model"))
