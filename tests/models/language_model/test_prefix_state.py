"""One image, many questions: what is answered from the saved state is what the full path answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from config.errors import InputError
from models.language_model import prefix_state
from models.language_model.decoding import Decoding
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixIdentity, PrefixState, answer_from_state
from models.medical_vlm import generate_reports
from tests.models.language_model.tiny import sharp_lm

QUESTIONS = ("右肺有无结节？\n", "q\n", "请描述这份胸部CT的影像表现。\n", "\n", "左肺有无结节？\n")


@pytest.fixture(scope="module")
def lm() -> MambaLM:
    return sharp_lm()


@pytest.fixture(scope="module")
def visual() -> Tensor:
    return torch.randn(1, 49, 32, generator=torch.Generator().manual_seed(7))


def batch_of(lm: MambaLM, *questions: str) -> dict[str, Tensor]:
    ids = [torch.tensor(lm.tokenizer.encode(question)) for question in questions]
    masks = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"question_ids": pad(ids, batch_first=True), "question_mask": pad(masks, batch_first=True)}


def greedy(lm: MambaLM, embeds: Tensor, **options: object) -> tuple[list[int], Tensor]:
    """Token ids, and the logits of the first one."""
    out = lm.model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), max_new_tokens=25,
        pad_token_id=256, do_sample=False, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[0].tolist(), out.logits[0]


def test_ids_and_first_logits_are_those_of_the_full_path(lm: MambaLM, visual: Tensor, tmp_path: Path) -> None:
    PrefixState.read(lm, visual).save(tmp_path / "a.safetensors", PrefixIdentity())
    state, _ = PrefixState.load(tmp_path / "a.safetensors")
    answers = set()
    for question in QUESTIONS:
        ids = lm.embed(torch.tensor([lm.tokenizer.encode(question)]))
        expected, logits = greedy(lm, torch.cat([visual, ids], dim=1))
        answer, first = greedy(lm, ids, cache_params=state.cache(lm))
        assert answer == expected
        torch.testing.assert_close(first, logits, rtol=1e-4, atol=1e-3)
        answers.add(tuple(answer))
    assert len(answers) == len(QUESTIONS)
    without, _ = greedy(lm, ids)
    assert tuple(without) not in answers  # the image does matter


def test_a_state_is_not_changed_by_its_use(lm: MambaLM, visual: Tensor) -> None:
    state = PrefixState.read(lm, visual)
    before = state.conv.clone(), state.recurrent.clone()
    first = answer_from_state(lm, state, batch_of(lm, QUESTIONS[0]), 20)
    answer_from_state(lm, state, batch_of(lm, *QUESTIONS), 20)
    assert torch.equal(state.conv, before[0]) and torch.equal(state.recurrent, before[1])
    assert answer_from_state(lm, state, batch_of(lm, QUESTIONS[0]), 20) == first


@pytest.mark.parametrize(
    "options", [{}, Decoding(num_beams=3).options(), Decoding(repetition_penalty=1.3).options()], ids=str
)
def test_texts_are_those_of_the_full_path(lm: MambaLM, visual: Tensor, options: dict) -> None:
    """Alone and in one batch of questions of different length, greedy and by beams."""
    state = PrefixState.read(lm, visual)
    expected = [generate_reports(lm, visual, batch_of(lm, q), 20, **options)[0] for q in QUESTIONS]
    assert [answer_from_state(lm, state, batch_of(lm, q), 20, **options)[0] for q in QUESTIONS] == expected
    assert answer_from_state(lm, state, batch_of(lm, *QUESTIONS), 20, **options) == expected
    assert len(set(expected)) == len(QUESTIONS)


def test_a_batch_of_images_has_a_question_each(lm: MambaLM, visual: Tensor) -> None:
    images = torch.cat([visual, torch.randn(1, 49, 32, generator=torch.Generator().manual_seed(8))])
    both = PrefixState.read(lm, images)
    batch = batch_of(lm, *QUESTIONS[:2])
    assert answer_from_state(lm, both, batch, 20) == generate_reports(lm, images, batch, 20)
    assert torch.allclose(both.rows([0]).recurrent, PrefixState.read(lm, visual).recurrent, atol=1e-6)
    with pytest.raises(ValueError, match="3 questions about the states of 2 images"):
        answer_from_state(lm, both, batch_of(lm, *QUESTIONS[:3]), 5)


def test_the_size_does_not_depend_on_the_number_of_visual_tokens(lm: MambaLM, tmp_path: Path) -> None:
    sizes = []
    for count in (4, 784):
        state = PrefixState.read(lm, torch.randn(1, count, 32))
        state.save(tmp_path / f"{count}.safetensors", PrefixIdentity())
        sizes.append((state.nbytes, (tmp_path / f"{count}.safetensors").stat().st_size))
    assert sizes[0][0] == sizes[1][0] == 3 * 64 * (4 + 8) * 4
    assert abs(sizes[0][1] - sizes[1][1]) <= 8  # the number itself is written down


def test_precision_and_identity_are_kept_on_disk(tmp_path: Path) -> None:
    lm = sharp_lm().bfloat16()
    state = PrefixState.read(lm, torch.randn(1, 9, 32))
    identity = PrefixIdentity(vision="v" * 40, image_name="d:/胸部/0001.nii.gz")
    state.save(tmp_path / "new folder" / "a.safetensors", identity)
    loaded, stored = PrefixState.load(tmp_path / "new folder" / "a.safetensors")
    assert stored == identity
    assert (loaded.conv.dtype, loaded.recurrent.dtype) == (state.conv.dtype, state.recurrent.dtype)
    assert torch.equal(loaded.conv, state.conv) and torch.equal(loaded.recurrent, state.recurrent)
    assert loaded.visual_tokens == 9
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["a.safetensors"]


# ------------------------------------------------------------------ identity


@pytest.fixture
def identity(lm: MambaLM) -> PrefixIdentity:
    return PrefixIdentity.of_model(lm, vision="v" * 40, preprocessing="p" * 40, image="i" * 40, mask="none")


@pytest.mark.parametrize(("field", "words"), prefix_state._COMPARED.items())
def test_what_differs_is_named_in_one_line(identity: PrefixIdentity, field: str, words: str) -> None:
    identity.check(identity, "a.safetensors")
    identity.check(PrefixIdentity(vision=identity.vision), "a.safetensors")  # the rest is not asked for
    identity.check(replace(identity, lm_name="moved", image_name="renamed.nii.gz"), "a.safetensors")
    with pytest.raises(InputError, match=rf"a\.safetensors was made with {words}") as error:
        identity.check(replace(identity, **{field: "other"}), "a.safetensors")
    assert "\n" not in str(error.value)


def test_fingerprint_knows_other_weights_and_precisions(lm: MambaLM) -> None:
    assert prefix_state.weights_fingerprint(sharp_lm().model) == prefix_state.weights_fingerprint(lm.model)
    others = [sharp_lm(seed=1), sharp_lm().bfloat16()]
    assert all(
        prefix_state.weights_fingerprint(other.model) != prefix_state.weights_fingerprint(lm.model) for other in others
    )


def test_a_state_of_another_size_does_not_enter_a_model(visual: Tensor, lm: MambaLM) -> None:
    with pytest.raises(InputError, match="shapes"):
        PrefixState.read(lm, visual).cache(sharp_lm(hidden_size=16))


def test_files_that_are_no_state(lm: MambaLM, visual: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="not found"):
        PrefixState.load(path)
    PrefixState.read(lm, visual).save(path, PrefixIdentity())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated or damaged"):
        PrefixState.load(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(InputError, match="format version 9"):
        PrefixState.load(path)
    path.write_bytes(whole.replace(b"mamba-ct-image-state", b"some-other-tensors.."))
    with pytest.raises(InputError, match="no image state"):
        PrefixState.load(path)
