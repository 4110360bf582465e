"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.language_model.tiny import byte_tokenizer, random_mamba


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the official ``-hf`` repositories store it: in shards, without ``lm_head``."""
    path = tmp_path_factory.mktemp("mamba")
    random_mamba().save_pretrained(path, max_shard_size="40KB")
    byte_tokenizer(pad_token=None).save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path
