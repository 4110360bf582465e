"""What runs inside Hugging Face's Mamba: convolution, chunked prefill, recomputation, adapters."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import MambaForCausalLM

from models.language_model import hf_patch, mamba_lm
from models.language_model.hf_patch import causal_conv_silu, recompute_blocks, use_our_scan
from models.language_model.mamba_lm import IGNORED, MambaLM
from tests.models.language_model.tiny import byte_tokenizer, random_mamba


def frozen_mamba() -> MambaForCausalLM:
    model = random_mamba().requires_grad_(False)
    for block in model.backbone.layers:  # as trained ones, not the zeros of a fresh model
        block.mixer.conv1d.bias.normal_()
    return model


def ours() -> MambaForCausalLM:
    model = frozen_mamba()
    use_our_scan(model)
    return model


@pytest.fixture
def lm() -> MambaLM:
    return MambaLM(frozen_mamba(), byte_tokenizer(), "random")


def embeddings(B: int, L: int, seed: int = 1) -> Tensor:
    return torch.randn(B, L, 32, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ convolution


@pytest.mark.parametrize("L", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shifted_sum_equals_conv1d(L: int, dtype: torch.dtype) -> None:
    torch.manual_seed(L)
    x, weight, bias = leaves = torch.randn(2, L, 6).to(dtype), torch.randn(6, 4), torch.randn(6)
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(2, L, 6).to(dtype)
    actual = causal_conv_silu(x, weight, bias)
    assert actual.dtype is dtype
    padded = F.pad(x.float().transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=6)).transpose(1, 2)
    tolerance = {"rtol": 2e-2, "atol": 3e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual.float(), expected, **tolerance)
    gradients, wanted = torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad.float())
    torch.testing.assert_close(gradients, wanted, **tolerance)


def test_convolution_continues_from_what_came_before() -> None:
    x, weight = torch.randn(2, 11, 6), torch.randn(6, 4)
    whole = causal_conv_silu(x, weight, None)
    torch.testing.assert_close(causal_conv_silu(x[:, 5:], weight, None, before=x[:, 2:5]), whole[:, 5:])


# ------------------------------------------------------------------ prefill in chunks


@pytest.mark.parametrize("left_padding", [0, 6])
def test_long_prompts_are_read_in_chunks(left_padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, embeds = ours(), embeddings(2, 23)
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, :left_padding] = 0
    with torch.no_grad():
        whole = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        monkeypatch.setattr(hf_patch, "PREFILL_CHUNK", {"cpu": 5})
        lengths: list[int] = []
        hook = model.backbone.layers[1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        chunked = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        hook.remove()
    assert lengths == [5, 5, 5, 5, 3]
    torch.testing.assert_close(chunked.logits[:, left_padding:], whole.logits[:, left_padding:], rtol=1e-4, atol=1e-5)
    for one, other in zip(chunked.cache_params.layers, whole.cache_params.layers, strict=True):
        torch.testing.assert_close(one.recurrent_states[0], other.recurrent_states[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.conv_states[0], other.conv_states[0], rtol=1e-4, atol=1e-5)


def test_chunks_only_without_gradients_and_caches_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_patch, "PREFILL_CHUNK", {"cpu": 5})
    model, embeds = ours(), embeddings(1, 12)
    with torch.no_grad():
        assert model.backbone(inputs_embeds=embeds, use_cache=False).cache_params is None
        hidden, cache = model.backbone(inputs_embeds=embeds, use_cache=True, return_dict=False)
        states = model.backbone(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    assert hidden.shape == (1, 12, 32) and cache.has_previous_state() and len(states) == 4
    embeds.requires_grad_()
    model.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()
    assert embeds.grad[0, 0].abs().sum() > 0  # through all chunks


def test_prefill_gives_the_last_hidden_state_and_the_cache(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_patch, "PREFILL_CHUNK", {"cpu": 4})
    embeds, mask = embeddings(2, 17), torch.ones(2, 17)
    mask[1, :4] = 0
    with torch.no_grad():
        whole = lm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        first, cache = lm.prefill(embeds[:, :10], mask[:, :10])
        last, cache = lm.prefill(embeds[:, 10:], cache=cache)
        after = lm.model(inputs_embeds=embeddings(2, 1, seed=2), cache_params=cache, use_cache=True).logits
        expected = lm.model(inputs_embeds=embeddings(2, 1, seed=2), cache_params=whole.cache_params, use_cache=True)
    assert first.shape == last.shape == (2, 32)
    torch.testing.assert_close(lm.model.lm_head(last), whole.logits[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, expected.logits, rtol=1e-4, atol=1e-5)


def test_generation_from_a_long_prompt_is_the_same(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, mask = embeddings(2, 19), torch.ones(2, 19)
    mask[0, :7] = 0
    texts = [lm.generate(embeds, mask, 9, num_beams=beams) for beams in (1, 3)]
    monkeypatch.setattr(hf_patch, "PREFILL_CHUNK", {"cpu": 4})
    assert [lm.generate(embeds, mask, 9, num_beams=beams) for beams in (1, 3)] == texts


# ------------------------------------------------------------------ training


def loss_and_gradient(lm: MambaLM) -> tuple[Tensor, Tensor]:
    embeds = embeddings(2, 15).requires_grad_()
    labels = torch.randint(0, 256, (2, 15), generator=torch.Generator().manual_seed(3))
    labels[:, :4] = IGNORED
    total, _ = lm.answer_loss(embeds, labels)
    total.backward()
    return total.detach(), embeds.grad


def test_recomputed_blocks_give_the_same_gradient(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loss_and_gradient(lm)
    runs: list[int] = []
    plain = hf_patch._whole_block
    monkeypatch.setattr(hf_patch, "_whole_block", lambda *args: (runs.append(1), plain(*args))[1])
    assert lm.checkpointing(True) is True
    torch.testing.assert_close(loss_and_gradient(lm), expected, rtol=1e-5, atol=1e-7)
    assert len(runs) == 2 * 3
    assert lm.checkpointing("auto") is lm.checkpointing(None) is False  # a small model
    loss_and_gradient(lm)
    assert len(runs) == 3 * 3


def test_recomputed_blocks_keep_their_input_alone() -> None:
    def kept(recompute: bool) -> int:
        model = ours()
        recompute_blocks(model, len(model.backbone.layers) if recompute else 0)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        embeds = embeddings(1, 40).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state
        assert out.requires_grad
        return sum(sizes.values())

    # The final norm keeps a few (L, D) of its own; a block would keep more than ten.
    assert kept(True) < (3 + 4) * 40 * 32 * 4 < kept(False) / 4


def test_some_blocks_are_recomputed(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones: what the last keep is freed before the backward pass comes to them."""
    expected, runs = loss_and_gradient(lm), []
    plain = hf_patch._whole_block
    monkeypatch.setattr(hf_patch, "_whole_block", lambda *args: (runs.append(args[0].mixer.layer_idx), plain(*args))[1])
    recompute_blocks(lm.model, 2)
    torch.testing.assert_close(loss_and_gradient(lm), expected, rtol=1e-5, atol=1e-7)
    assert runs == [0, 1, 2, 1, 0]
    recompute_blocks(lm.model, 0)


@pytest.mark.parametrize(
    ("room", "expected"),
    # 64 blocks of 4 x 1040 tokens, 72 kB each in a block, 10 kB of it the input: inputs 2.7 GB, a backward pass 0.9 GB
    [(2e9, 64), (3.7e9, 64), (3.9e9, 63), (10e9, 40), (24e9, 0), (80e9, 0)],
)
def test_as_many_blocks_are_kept_as_fit(room: float, expected: int) -> None:
    recomputed = hf_patch.blocks_to_recompute(64, 4 * 1040, 72_000, 10_240, int(room))
    assert recomputed == expected
    needed = 4160 * (64 * 10_240 + 3 * 72_000 + (64 - recomputed) * (72_000 - 10_240))
    assert needed <= room or recomputed == 64


def test_what_a_block_keeps_is_measured() -> None:
    """By the tensors that autograd keeps of a whole pass, less those of the same pass with fewer blocks."""
    block = ours().backbone.layers[0]
    kept = hf_patch.kept_bytes(block, torch.empty(0, 32))
    width, inner = 32, 64
    # The input, x and z, the convolution's output and the step size at the least; no more than a few of each.
    assert 4 * (width + 4 * inner) < kept < 4 * 4 * (width + 8 * inner)


def test_on_a_gpu_blocks_are_chosen_by_the_memory_that_is_free(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of a pass, on a pretended card."""
    chosen, memory = [], lm.memory
    monkeypatch.setattr(hf_patch, "recompute_blocks", lambda model, count: chosen.append(count))
    given = types.SimpleNamespace(is_cuda=True, shape=(2, 100, 32))
    inputs = 200 * (3 * 4 * 32 + hf_patch.TRANSIENT * memory.kept)
    logits = 4 * 4 * mamba_lm.LOSS_CHUNK * lm.model.config.vocab_size
    lm.checkpointing("auto", reserve=1000)
    for blocks in (0, 1, 3):
        free = 1000 + logits + inputs + blocks * 200 * (memory.kept - 4 * 32)
        monkeypatch.setattr(hf_patch, "free_bytes", lambda _, margin, free=free: free)
        memory.choose(given)
    with torch.no_grad():
        memory.choose(given)
    lm.checkpointing(False)
    memory.choose(given)
    assert chosen == [0, 3, 2, 0, 0], "the first and the last by checkpointing() itself"
    lm.checkpointing("auto")


def test_attribution_takes_as_many_rows_as_fit(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass over eight copies of a long report would take tens of GB of a large model."""
    memory = lm.memory
    assert memory.rows_that_fit(1000, 8) == 8, "a CPU pages"
    row = 1000 * (memory._blocks * 4 * lm.model.config.hidden_size + hf_patch.TRANSIENT * memory.kept)
    logits = 4 * 4 * mamba_lm.LOSS_CHUNK * lm.model.config.vocab_size
    monkeypatch.setattr(type(lm.model), "device", torch.device("cuda"))
    lm.checkpointing("auto")
    for room, rows in ((0, 1), (row - 1, 1), (3 * row, 3), (99 * row, 8)):
        monkeypatch.setattr(hf_patch, "free_bytes", lambda _, margin, room=room: room + logits)
        assert memory.rows_that_fit(1000, 8) == rows
    lm.checkpointing(False)  # every block keeps what its backward pass needs
    kept = 1000 * (memory._blocks + hf_patch.TRANSIENT) * memory.kept
    monkeypatch.setattr(hf_patch, "free_bytes", lambda _, margin: 3 * kept + logits)
    assert memory.rows_that_fit(1000, 8) == 3 < 3 * kept // row


@pytest.mark.parametrize("name", ("cuda", "cuda:0"))
def test_free_memory_is_asked_of_one_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's memory_fraction takes a number alone, and what accelerate calls the device of one process is "cuda"."""
    values = {"mem_get_info": (60, 100), "memory_reserved": 30, "memory_allocated": 20}
    values |= {"get_per_process_memory_fraction": 0.8, "current_device": 0}
    for function, value in values.items():
        if function == "current_device":
            monkeypatch.setattr(torch.cuda, function, lambda value=value: value)
        else:
            monkeypatch.setattr(torch.cuda, function, lambda index, value=value: {0: value}[index])
    assert hf_patch.free_bytes(torch.device(name)) == 60, "80 are allowed, 20 of them held"
    assert hf_patch.free_bytes(torch.device(name), 0.1) == 50


def test_loss_in_chunks_equals_the_loss_at_once(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_lm, "LOSS_CHUNK", 1000)
    expected = loss_and_gradient(lm)
    monkeypatch.setattr(mamba_lm, "LOSS_CHUNK", 3)
    torch.testing.assert_close(loss_and_gradient(lm), expected, rtol=1e-5, atol=1e-7)


def test_no_answer_gives_no_loss(lm: MambaLM) -> None:
    total, count = lm.answer_loss(embeddings(1, 5), torch.full((1, 5), IGNORED))
    assert total.item() == 0 and count.item() == 0


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj"])  # peft refuses out_proj
def test_adapters_take_part_and_get_gradients(name: str) -> None:
    adapted, merged = ours(), frozen_mamba()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[name], init_lora_weights=False), adapted)
    for block, other in zip(merged.backbone.layers, adapted.backbone.layers, strict=True):
        getattr(block.mixer, name).weight += getattr(other.mixer, name).get_delta_weight("default").detach()
    ids = torch.randint(0, 256, (2, 13))
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        out = adapted(input_ids=ids[:, :-1], use_cache=True)
        step = adapted(input_ids=ids[:, -1:], cache_params=out.cache_params, use_cache=True).logits
        torch.testing.assert_close(step[:, 0], merged(input_ids=ids).logits[:, -1], rtol=1e-3, atol=1e-4)
    adapted(input_ids=ids, use_cache=False).logits.square().mean().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 and all(p.grad.abs().sum() > 0 for p in trained)


def test_the_model_can_be_copied() -> None:
    model = ours()
    ids = torch.randint(0, 256, (1, 6))
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert other(input_ids=ids).logits.abs().sum() > 0
