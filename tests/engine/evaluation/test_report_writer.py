"""Probabilities of written reports, their ends, and the characters of their tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.findings import FindingRecord
from engine.evaluation.report_writer import PROMPT_FIELDS, ReportWriter, answer_log_probs, token_spans
from engine.findings_prompt import SAMPLES, TURNS, with_key_points
from models.language_model.decoding import Decoding, Varied
from models.medical_vlm import MedicalVLM, generate_reports


def test_losses_are_the_training_loss(model: MedicalVLM, batch: dict[str, Tensor]) -> None:
    writer = ReportWriter(model, 5)
    losses = writer.losses(writer.visual(batch)[0], batch)
    total, count = model(batch)[0], batch["answer_mask"].sum()
    assert [n for _, n in losses] == [7, 4, 6] and int(count) == 17
    assert sum(nats for nats, _ in losses) == pytest.approx(float(total.detach()), rel=1e-5)


def test_an_embedding_is_of_the_image_alone(model: MedicalVLM, batch: dict[str, Tensor]) -> None:
    """Before CMI, which the question steers."""
    writer = ReportWriter(model, 5)
    found, other = writer.embedding(batch), {**batch, "question_ids": batch["question_ids"].flip(0)}
    assert found.shape == (3, 16) and not torch.allclose(writer.visual(batch)[0], writer.visual(other)[0])
    assert torch.equal(found, writer.embedding(other)) and not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("decoding", [None, Decoding(temperature=1.0)])
def test_log_probs_are_those_of_each_step(
    model: MedicalVLM, batch: dict[str, Tensor], decoding: Decoding | None
) -> None:
    writer = ReportWriter(model, 6)
    visual, _ = writer.visual(batch)
    torch.manual_seed(4)
    written = writer.write(visual, batch, decoding)
    if decoding is None:
        assert [one.text for one in written] == generate_reports(model.lm, visual, batch, 6)
    lm, table = model.lm, model.lm.model.get_input_embeddings()
    for b, one in enumerate(written):
        assert 0 < len(one.ids) == len(one.log_probs) <= 6
        question = batch["question_ids"][b, : int(batch["question_mask"][b].sum())]
        for k in range(len(one.ids)):
            read = torch.cat([visual[b], table(question), table(torch.tensor(one.ids[:k], dtype=torch.long))])
            logits = lm.model(inputs_embeds=read[None], use_cache=False).logits[0, -1, : lm.known_tokens]
            expected = logits.float().log_softmax(-1)
            assert one.log_probs[k] == pytest.approx(float(expected[one.ids[k]]), abs=2e-3)
            if decoding is None:
                assert int(expected.argmax()) == one.ids[k]


def test_a_sampled_report_is_chosen_with_its_probabilities_and_the_same_alone(
    model: MedicalVLM, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a random model, whose reports are taken for ended; only the fourth of the second turn states the prompt."""
    writer, said = ReportWriter(model, 8), [[FindingRecord("nodule", side="left", size_mm=9.0)], None, []]
    drafts = writer._drafts
    monkeypatch.setattr(writer, "_drafts", lambda *a, **k: [replace(one, ended=True) for one in drafts(*a, **k)])
    visual, _ = writer.visual(batch)
    prompted = with_key_points(batch, model.lm.tokenizer, said, "zh")
    plain, rows, warm = writer.write(visual, prompted), [0] * SAMPLES, (9.0, 9.0)
    monkeypatch.setattr("engine.findings_prompt.INCOMPLETE", "no report of a random model is whole")
    monkeypatch.setattr("engine.findings_prompt.TEMPERATURES", warm)  # its own are too cool for a model this sharp
    fields = {name: prompted[name][rows] for name in PROMPT_FIELDS}
    last = writer.write(visual[rows], fields, logits_processor=[Varied(SAMPLES, warm, TURNS - 1)])
    wanted = last[3]
    monkeypatch.setattr("engine.findings_prompt.deviations", lambda text, *_: ([0] * 99 * (text != wanted.text), []))
    chosen = writer.write_prompted(visual, prompted, said, "zh")
    assert chosen[0].text == wanted.text != plain[0].text and chosen[0].ids == wanted.ids
    assert chosen[0].log_probs == pytest.approx(wanted.log_probs, abs=2e-3)
    assert chosen[1] == plain[1], "no prompt, nothing to state"
    [alone] = writer.write_prompted(visual[:1], {n: v[:1] for n, v in prompted.items()}, said[:1], "zh")
    assert alone.text == chosen[0].text and alone.ids == chosen[0].ids
    assert [one.text for one in writer.write_prompted(visual, prompted, said, None)] == [one.text for one in plain]


def test_a_report_is_gone_on_from_its_beginning(
    model: MedicalVLM, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its words were the end of the question; they are the first words of the report, with their probability."""
    writer, said, tokenizer = ReportWriter(model, 6), [[FindingRecord("nodule")]], model.lm.tokenizer
    one = {name: value[:1] for name, value in batch.items()}
    visual, _ = writer.visual(one)
    prompted, drafts, ids = with_key_points(one, tokenizer, said, "zh"), writer._drafts, tokenizer.encode("AB")
    monkeypatch.setattr(writer, "_drafts", lambda *a, **k: [replace(one, ended=True) for one in drafts(*a, **k)])
    monkeypatch.setattr("engine.findings_prompt.right_beginning", lambda *_: "AB")
    monkeypatch.setattr("engine.findings_prompt.TEMPERATURES", (1e-6, 1e-6))  # as if greedily
    monkeypatch.setattr("engine.findings_prompt.INCOMPLETE", "no report of a random model is whole")
    begins = lambda text, *_: ([0] * (1 if text.startswith("AB") else 99), [])  # noqa: E731
    monkeypatch.setattr("engine.findings_prompt.deviations", begins)
    [chosen] = writer.write_prompted(visual, prompted, said, "zh")
    asked = prompted["question_ids"][0, prompted["question_mask"][0].bool()].tolist()
    longer = {**prompted, "question_ids": torch.tensor([asked + ids]), "question_mask": torch.ones(1, len(asked + ids))}
    [rest] = writer.write(visual, longer)
    assert chosen.text == "AB" + rest.text and chosen.ids == ids + rest.ids
    assert chosen.log_probs[len(ids) :] == pytest.approx(rest.log_probs, abs=1e-4)


def test_a_report_that_was_cut_is_not_written_again(model: MedicalVLM, batch: dict[str, Tensor]) -> None:
    writer, said = ReportWriter(model, 1), [[FindingRecord("nodule")]] * 3
    visual, _ = writer.visual(batch)
    prompted = with_key_points(batch, model.lm.tokenizer, said, "zh")
    plain = writer.write(visual, prompted)
    assert not any(one.ended for one in plain) and writer.write_prompted(visual, prompted, said, "zh") == plain


def test_an_answer_of_no_token_has_no_probability(model: MedicalVLM, batch: dict[str, Tensor]) -> None:
    empty = {**batch, "answer_ids": torch.zeros(3, 0, dtype=torch.long), "answer_mask": torch.zeros(3, 0)}
    log_probs = answer_log_probs(model.lm, model.read(batch)[0], empty)
    assert [len(values) for values in log_probs] == [0, 0, 0]


def test_a_report_has_ended_where_it_has_an_end_of_text(
    model: MedicalVLM, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, end = ReportWriter(model, 3), model.lm.tokenizer.eos_token_id

    def generate(*_: object, criteria: list, **__: object) -> list[str]:
        criteria[0](torch.tensor([[65, 66, 67], [65, end, end], [65, 66, end]]), None)
        return ["ABC", "A", "AB"]

    monkeypatch.setattr("engine.evaluation.report_writer.generate_reports", generate)
    written = writer.write(writer.visual(batch)[0], batch)
    assert [one.ended for one in written] == [False, True, True]
    assert [one.ids for one in written] == [[65, 66, 67], [65], [65, 66]]


def test_spans_of_tokens_are_their_characters(model: MedicalVLM) -> None:
    text = "右肺 8mm。"
    ids = model.lm.tokenizer.encode(text)  # one token a byte: three for a Chinese character
    spans = token_spans(model.lm.tokenizer, ids)
    assert spans[:6] == [(0, 1)] * 3 + [(1, 2)] * 3 and spans[6:10] == [(2, 3), (3, 4), (4, 5), (5, 6)]
    assert spans[-1] == (6, 7) and len(spans) == len(ids)
    assert token_spans(model.lm.tokenizer, []) == []
