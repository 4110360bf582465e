"""Adapters: what is trained and what is not, and that the merged model is the one that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config.errors import InputError
from models.language_model.lora import Adapters, merge
from models.language_model.mamba_lm import MambaLM
from tests.models.language_model.tiny import byte_tokenizer, random_mamba

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@pytest.fixture
def folder(tmp_path) -> Path:
    model = random_mamba(num_hidden_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **options: object) -> MambaLM:
    return MambaLM.load(str(folder), **{"dtype": "float32", **options})


def trained(folder: Path, dtype: str = "float32") -> tuple[MambaLM, Adapters]:
    """As after some steps: B is no longer zero."""
    lm = load(folder, dtype=dtype)
    adapters = Adapters(lm.model, 3)
    torch.manual_seed(1)
    with torch.no_grad():
        for matrix in adapters.matrices:
            matrix.normal_(0, 0.2)
    return lm, adapters


def test_fresh_adapters_change_nothing_and_alone_are_trained(folder):
    lm, plain = load(folder), load(folder)
    adapters = Adapters(lm.model, 4)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(IDS).logits, plain.model(IDS).logits)
    before = {name: p.clone() for name, p in lm.model.named_parameters() if ".lora_" not in name}
    assert {name for name, p in lm.model.named_parameters() if p.requires_grad} == {
        f"backbone.layers.{k}.mixer.in_proj.lora_{part}.default.weight" for k in range(2) for part in "AB"
    }
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        total, count = lm.answer_loss(lm.embed(IDS), IDS)
        losses.append(float(total.detach() / count))
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = dict(lm.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_merged_model_is_the_trained_one(folder):
    lm, adapters = trained(folder)
    merged, plain = load(folder, adapters=adapters.to_dict()), load(folder)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        logits = lm.model(IDS).logits
        torch.testing.assert_close(merged.model(IDS).logits, logits, atol=1e-4, rtol=1e-4)
        assert (plain.model(IDS).logits - logits).abs().max() > 0.1
    assert merged.generate(merged.embed(IDS), mask, 8) == lm.generate(lm.embed(IDS), mask, 8)
    assert not any(".lora_" in name for name, _ in merged.model.named_parameters())


def test_a_checkpoints_adapters_are_taken_up_again(folder):
    _, adapters = trained(folder)
    stored = adapters.to_dict()
    assert stored["rank"] == 3 and set(stored["layers"]) == {f"backbone.layers.{k}.mixer.in_proj" for k in range(2)}
    again = Adapters(load(folder).model, 3)
    again.load(stored)
    assert all(torch.equal(a, b) for a, b in zip(adapters.matrices, again.matrices, strict=True))


def test_in_a_bfloat16_model_they_are_float32_and_learn(folder):
    lm, adapters = trained(folder, "bfloat16")
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    total, _ = lm.answer_loss(lm.embed(IDS), IDS)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())


def test_int8_after_merging(folder):
    _, adapters = trained(folder)
    small, large = (load(folder, adapters=adapters.to_dict(), int8=int8) for int8 in (True, False))
    with torch.no_grad():
        error = (small.model(IDS).logits - large.model(IDS).logits).abs().max()
        assert error < 0.1 * large.model(IDS).logits.std()
    with pytest.raises(InputError, match="--llm_8bit: this checkpoint has adapters"):
        load(folder, adapters=adapters.to_dict(), load_in_8bit=True)


def test_adapters_of_another_model_are_refused(folder):
    _, adapters = trained(folder)
    other = random_mamba(hidden_size=16, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"adapter of layer 'backbone.layers.0.mixer.in_proj' fits no layer"):
        merge(other, adapters.to_dict())
    shallow = random_mamba(num_hidden_layers=1)
    with pytest.raises(InputError, match=r"layers.1.mixer.in_proj' fits no layer"):
        merge(shallow, adapters.to_dict())
