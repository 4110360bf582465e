"""Stage 0's adapters as a file: what is merged is what was trained, and another model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config.errors import InputError
from models.language_model.adapter_file import ADAPTER_FILE, adapter_digest, read_adapters, save_adapters
from models.language_model.lora import MIXER_LAYERS, Adapters
from models.language_model.mamba_lm import MambaLM
from tests.models.language_model.tiny import byte_tokenizer, random_mamba

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def model_folder(path: Path, seed: int = 0, **options: object) -> Path:
    random_mamba(seed, **{"num_hidden_layers": 2, **options}).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def trained(lm: MambaLM, seed: int = 1) -> Adapters:
    """As after some steps: B is no longer zero."""
    adapters = Adapters(lm.model, 3, MIXER_LAYERS)
    torch.manual_seed(seed)
    with torch.no_grad():
        for matrix in adapters.matrices:
            matrix.normal_(0, 0.1)
    return adapters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "lm")


@pytest.fixture
def adapted(folder: Path, tmp_path: Path) -> tuple[MambaLM, Path]:
    """A model with adapters in all its layers, and their file."""
    lm = MambaLM.load(str(folder))
    adapters, path = trained(lm), tmp_path / ADAPTER_FILE
    assert len(adapters.layers) == 2 * len(MIXER_LAYERS), "peft refuses out_proj where it knows a Mamba"
    save_adapters(path, adapters.to_dict(), lm.model, lm.identity.to_dict(), MIXER_LAYERS)
    return lm, path


def test_the_merged_model_is_the_trained_one(folder, adapted):
    lm, path = adapted
    merged, plain = MambaLM.load(str(folder), stage0=path), MambaLM.load(str(folder))
    with torch.no_grad():
        logits = lm.model(IDS).logits
        torch.testing.assert_close(merged.model(IDS).logits, logits, atol=1e-4, rtol=1e-4)
        assert (plain.model(IDS).logits - logits).abs().max() > 0.01
    assert not any(".lora_" in name for name, _ in merged.model.named_parameters())
    assert merged.identity.adapters == read_adapters(path).digest == adapter_digest(path) != ""
    assert plain.identity.adapters == adapter_digest(None) == ""
    assert MambaLM.load(str(folder), dtype="bfloat16", stage0=path).adapters, "rounded weights are the same model"


def test_every_layers_adapter_learns(folder):
    lm = MambaLM.load(str(folder))
    adapters = trained(lm)
    total, _ = lm.answer_loss(lm.embed(IDS), IDS)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    assert not any(p.requires_grad for name, p in lm.model.named_parameters() if ".lora_" not in name)


def test_stage_2_adapters_are_merged_after_them(folder, adapted):
    _, path = adapted
    lm = MambaLM.load(str(folder), stage0=path)
    second = Adapters(lm.model, 2)
    with torch.no_grad():
        for matrix in second.matrices:
            matrix.normal_(0, 0.1)
        both = MambaLM.load(str(folder), stage0=path, adapters=second.to_dict())
        torch.testing.assert_close(both.model(IDS).logits, lm.model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"seed": 5}, "other weights"), ({"hidden_size": 16}, "width 32 there, 16 here")],
)
def test_adapters_of_another_language_model_are_refused(tmp_path, adapted, options, reason):
    other = model_folder(tmp_path / "other", **options)
    with pytest.raises(
        InputError, match=f"language_model_adapters: .*not to mamba_model '.*other' .{reason}"
    ) as caught:
        MambaLM.load(str(other), stage0=adapted[1])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_damaged_or_not_ours_is_one_line(folder, adapted, tmp_path):
    path = adapted[1]
    with pytest.raises(InputError, match=r"language_model_adapters: file not found: .*adapt_language_model\.py"):
        read_adapters(tmp_path / "none.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(InputError, match="is not a readable adapter file"):
        read_adapters(path)
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match="or is damaged"):
        read_adapters(path)
    with pytest.raises(InputError, match="is not a readable adapter file"):
        read_adapters(folder / "model.safetensors")
    with pytest.raises(InputError, match="--llm_8bit: this checkpoint has adapters .language_model_adapters"):
        MambaLM.load(str(folder), stage0=path, load_in_8bit=True)
