"""What is known of a language model without its weights, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.errors import InputError
from models.language_model.identity import lm_identity, read_lm_config
from tests.models.language_model.tiny import byte_tokenizer, random_mamba


def test_identity_needs_no_weights(tmp_path: Path) -> None:
    random_mamba().config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert lm_identity(str(tmp_path)).to_dict() == {
        "name": str(tmp_path), "width": 32, "layers": 3, "vocabulary": 264, "tokens": 257, "adapters": "",
    }  # fmt: skip


def test_another_activation_is_refused(tmp_path: Path) -> None:
    config = random_mamba().config
    config.hidden_act = "gelu"
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="hidden_act 'gelu'; expected 'silu'"):
        read_lm_config(str(tmp_path))


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(InputError, match="'gpt2' model"):
        read_lm_config(str(tmp_path))
