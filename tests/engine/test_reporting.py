"""One scan to its report, on the demonstration checkpoint: the check script's text, with findings and confidence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from config.errors import InputError
from config.schema import REPOSITORY
from data.cache import file_digest
from engine.chain import SHIPPED_DEMO
from engine.evaluation.report_writer import Report
from engine.reporting import Reporter, Trust

SCAN = SHIPPED_DEMO / "data" / "images" / "val_0000.nii.gz"


def test_a_scan_is_read_in_steps_and_its_report_says_what_was_found(demo_reporter):
    begun = []
    reading = demo_reporter.reader.read(SCAN, begin=begun.append)
    assert begun == ["checks", "segmentation", "vision"] == list(reading.seconds) and min(reading.seconds.values()) > 0
    [lesion] = reading.measured
    [said] = reading.believed
    assert (lesion.side, lesion.zone) == ("right", "middle") and said.finding == "cavity" and reading.language == "zh"
    assert reading.key_points == "已知：右肺中野空洞27mm。"
    [written] = demo_reporter.write([reading])
    assert "空洞" in written.text and "右" in written.text and written.tokens.ended
    assert "".join(sentence.text for sentence in written.sentences) == written.text
    sure = [sentence.confidence for sentence in written.sentences if sentence.stated]
    assert sure and all(0 < one <= 1 for one in sure)
    assert written.marked.count("【待核实】") == sum(sentence.unsure for sentence in written.sentences)
    [other] = demo_reporter.write([reading], ["已知：左肺下野结节12mm。"])
    assert "左" in other.text and "结节" in other.text and other.text != written.text


def test_a_model_in_bfloat16_writes_and_is_judged(demo_reporter):
    """As on a GPU: for folder and page too, which write through the same calls."""
    reader = demo_reporter.reader
    lm = reader.checkpoint.load_lm(reader.config.replace(mamba_dtype="bfloat16"), "cpu")
    assert lm.model.dtype == torch.bfloat16
    [report] = Reporter(reader, lm, max_new_tokens=200).write([reader.read(SCAN)])
    assert "27mm" in report.text and all(0 < sure <= 1 for sure in report.confidences)


def test_reports_written_together_are_those_written_alone(demo_reporter):
    reading = demo_reporter.reader.read(SCAN)
    lines = [reading.key_points, "已知：未见病灶。"]
    together = demo_reporter.write([reading, reading], lines)
    assert [one.text for one in together] == [demo_reporter.write([reading], [line])[0].text for line in lines]


def test_a_report_that_does_not_say_its_prompt_says_so(demo_reporter):
    """Before the text, wherever it is shown; the answer to a person's own question need not be a report."""
    reading, text = demo_reporter.reader.read(SCAN), "所见：左侧胸腔积液，深约20mm。\n结论：左侧胸腔积液。"
    ids = demo_reporter.lm.tokenizer(text).input_ids
    report = Report(text, ids, [-0.1] * len(ids))
    written = demo_reporter.assess(reading, reading.key_points, report, 0.0)
    assert "下文没有写出：右肺中野空洞27mm" in written.notice and "左侧胸腔积液20mm" in written.notice
    assert written.full.startswith(written.notice) and written.text == text
    assert demo_reporter.assess(reading, "已知：左侧胸腔积液20mm。", report, 0.0).notice == reading.notice == ""
    reading.own_question = True
    assert demo_reporter.assess(reading, reading.key_points, report, 0.0).notice == ""


def test_a_report_card_calibrates_the_confidence(demo_reporter, tmp_path):
    path = tmp_path / "report_card.json"
    fitted = {"weights": [0.0] * 5, "offset": 2.0}
    card = {"confidence": {"calibrator": fitted}, "audit": {"verdict": "v"}, "run": {"flags": {"samples": 0}}}
    path.write_text(json.dumps(card), encoding="utf-8")
    checkpoint = demo_reporter.reader.checkpoint.path
    trust = Trust.of_card(path, checkpoint)
    reading = demo_reporter.reader.read(SCAN)
    stated = demo_reporter.write([reading])[0].statements
    assert stated and np.allclose(trust(stated), 1 / (1 + np.exp(-2.0))) and trust.verdict == "v" and trust([]) == []
    path.write_text(json.dumps({**card, "run": {"flags": {"samples": 3}}}), encoding="utf-8")
    with pytest.raises(InputError, match="--samples 3"):
        Trust.of_card(path, checkpoint)
    with pytest.raises(InputError, match="is no readable report card"):
        Trust.of_card(REPOSITORY / "README.md", checkpoint)


def test_the_report_card_of_another_checkpoint_is_refused(tmp_path):
    checkpoint, other, path = (tmp_path / name for name in ("best.pt", "final.pt", "report_card.json"))
    checkpoint.write_bytes(b"one")
    other.write_bytes(b"two")
    card = {"confidence": {"calibrator": None}, "audit": {"verdict": "v"}, "run": {"flags": {"samples": 0}}}
    card |= {"checkpoint": "outputs/best.pt", "digest": file_digest(checkpoint).hex()}
    path.write_text(json.dumps(card), encoding="utf-8")
    assert Trust.of_card(path, checkpoint).verdict == "v"
    with pytest.raises(InputError, match=r"is the report card of outputs/best\.pt, not of .*final\.pt"):
        Trust.of_card(path, other)


def test_a_patients_scan_is_refused_by_a_toy_model(demo_reporter, tmp_path):
    copy = tmp_path / "images" / "scan.nii.gz"
    copy.parent.mkdir()
    copy.write_bytes(Path(SCAN).read_bytes())
    with pytest.raises(InputError, match="made for the quick start's synthetic data"):
        demo_reporter.report(copy)
