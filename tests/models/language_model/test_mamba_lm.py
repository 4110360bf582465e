"""The language model wrapper: loading as the hub stores it, our mixers against theirs, generation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from config.errors import InputError
from models.language_model.embedding_table import load_embedding_table
from models.language_model.hf_patch import use_our_scan
from models.language_model.identity import lm_identity, read_lm_config, read_tokenizer
from models.language_model.mamba_lm import IGNORED, TIED_MESSAGE, MambaLM
from tests.models.language_model.tiny import byte_tokenizer, random_mamba


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the official ``-hf`` repositories store it: in shards, without ``lm_head``."""
    path = tmp_path_factory.mktemp("mamba")
    random_mamba().save_pretrained(path, max_shard_size="40KB")
    byte_tokenizer(pad_token=None).save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def without_head(path: Path) -> None:
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("lm_head.weight", None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"].pop("lm_head.weight", None)
    index.write_text(json.dumps(content), encoding="utf-8")


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


def test_identity_needs_no_weights(folder: Path) -> None:
    assert lm_identity(str(folder)).to_dict() == {
        "name": str(folder), "width": 32, "layers": 3, "vocabulary": 264, "tokens": 257, "adapters": "",
    }  # fmt: skip


@pytest.mark.parametrize("left_padding", [0, 5])
def test_our_mixer_gives_their_logits(left_padding: int) -> None:
    theirs, ours = random_mamba(), random_mamba()
    use_our_scan(ours)
    ids = torch.randint(0, 256, (2, 37))
    mask = torch.ones_like(ids)
    mask[1, :left_padding] = 0
    expected, actual = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (theirs, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_our_mixer_gives_their_gradient_of_the_inputs() -> None:
    theirs, ours = random_mamba(), random_mamba()
    use_our_scan(ours)
    gradients = []
    for model in (theirs, ours):
        embeds = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits.square().mean().backward()
        gradients.append(embeds.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_decoding_equals_the_full_forward() -> None:
    model = random_mamba()
    use_our_scan(model)
    ids = torch.randint(0, 256, (2, 19))
    full = model(input_ids=ids, use_cache=False).logits
    out = model(input_ids=ids[:, :7], use_cache=True)
    steps = [out.logits]
    for t in range(7, 19):
        out = model(input_ids=ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)


def test_padded_batch_generates_what_single_prompts_do(folder: Path) -> None:
    lm = MambaLM.load(str(folder))
    embeds = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (6, 11)]
    alone = [lm.generate(e[None], torch.ones(1, len(e)), 12)[0] for e in embeds]
    padded = torch.stack([torch.nn.functional.pad(e, (0, 0, 11 - len(e), 0)) for e in embeds])
    mask = torch.tensor([[0] * 5 + [1] * 6, [1] * 11])
    assert lm.generate(padded, mask, 12) == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # bfloat16 without autocast, as a large model trains on CPU
def test_answer_loss_is_the_models_own_loss(folder: Path, dtype: str) -> None:
    lm = MambaLM.load(str(folder), dtype=dtype)
    ids = torch.randint(0, 256, (2, 15))
    labels = ids.clone()
    labels[:, :6] = IGNORED
    labels[1, 12:] = IGNORED
    total, count = lm.answer_loss(lm.embed(ids), labels)
    assert int(count) == 9 + 6
    logits = lm.model(input_ids=ids).logits[:, :-1, :257].float()
    wanted = labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 257), wanted.reshape(-1), ignore_index=IGNORED)
    torch.testing.assert_close(total / count, expected)


def test_real_tokenizer_with_a_random_model(shared: Path, tmp_path: Path) -> None:
    """GPT-NeoX's tokenizer, 50,280 rows, shards, no head: loads, ties, generates valid UTF-8.

    This copy of the file has four tokens more than the model's own (50,281, one of them without a row).
    """
    random_mamba(vocab_size=50280, tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="2MB")
    without_head(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "tokenizer" / "20B_tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path)
    lm = MambaLM.load(str(tmp_path))
    assert len(lm.tokenizer) == 50281 and lm.known_tokens == 50280
    with pytest.raises(InputError, match="'RWKV'"):
        lm.embed(torch.tensor([lm.tokenizer.encode("RWKV")]))
    assert lm.model.lm_head.weight is lm.model.get_input_embeddings().weight
    text = lm.generate(torch.randn(1, 8, 32), torch.ones(1, 8), 30)[0]
    assert text.encode("utf-8").decode("utf-8") == text
    report = "所见：右肺上叶见结节，大小约12mm。"
    assert lm.tokenizer.decode(lm.tokenizer.encode(report)) == report


@pytest.mark.parametrize("reader", [read_lm_config, MambaLM.load, load_embedding_table])
def test_missing_model_is_one_line(reader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mamba_model '.*nowhere'"):
        reader(str(tmp_path / "nowhere"))


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(InputError, match="'gpt2' model"):
        read_lm_config(str(tmp_path))


def test_a_missing_tokenizer_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    random_mamba().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        read_tokenizer(str(tmp_path))
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["backbone.layers.1.mixer.A_log"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mixer\.A_log"):
        MambaLM.load(str(tmp_path))


def test_eight_bit_without_bitsandbytes_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="--llm_8bit needs bitsandbytes"):
        MambaLM.load(str(folder), load_in_8bit=True)
