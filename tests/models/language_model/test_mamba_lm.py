"""The language model wrapper: our mixers against theirs, generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from config.errors import InputError
from models.language_model.hf_patch import use_our_scan
from models.language_model.mamba_lm import IGNORED, MambaLM
from tests.models.language_model.tiny import random_mamba, sharp_lm, without_head


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


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)], ids=str)
def test_a_card_gives_the_cpus_loss_and_gradient(
    dtype: torch.dtype, tolerance: float, checkpointing: bool, device: str
) -> None:
    """bfloat16 against the same weights in float32, from which a CPU's own bfloat16 differs by 0.11."""
    lm = sharp_lm(hidden_size=640, state_size=16, sharpness=4.0, memory=1.0).to(dtype)
    embeds = torch.randn(2, 300, 640, generator=torch.Generator().manual_seed(1)).to(dtype)
    labels = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(2))
    labels[:, :200] = IGNORED
    found = {}
    for name, kind in (("cpu", torch.float32), (device, dtype)):
        lm.to(name, kind).checkpointing(checkpointing)
        for block in lm.model.backbone.layers:
            block.mixer.A_log.data = block.mixer.A_log.data.float()  # as MambaLM.load keeps it
        given = embeds.to(name, kind).requires_grad_()
        loss = torch.div(*lm.answer_loss(given, labels.to(name)))
        found[name] = [t.detach().cpu().double() for t in (loss, *torch.autograd.grad(loss, given))]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found[device], found["cpu"], strict=True)]
    assert max(errors) < tolerance, errors


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
