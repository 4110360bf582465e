"""Key points: written and read back, taken from reports."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from config.errors import InputError
from data.findings import LESION, FindingRecord
from data.phantom.finding import LESION_TYPES, SIDES, ZONES, Finding
from data.phantom.report import write_report
from data.report_language.key_points import key_points_of, point_key, read_key_points, write_key_points
from data.report_language.report_changes import change_together
from data.report_language.terms import FINDINGS

LANGUAGES = ("zh", "en")
NODULE = FindingRecord("nodule", side="right", zone="upper", size_mm=12.0)
EFFUSION = FindingRecord("effusion", side="left", size_mm=25.4)


def test_line_in_both_languages() -> None:
    assert write_key_points([NODULE, EFFUSION], "zh") == "已知：右肺上野结节12mm；左侧胸腔积液25mm。"
    line = "Known: right upper zone nodule 12 mm; left pleural effusion 25 mm."
    assert write_key_points([NODULE, EFFUSION], "en") == line
    assert write_key_points([], "zh") == "已知：未见病灶。"
    assert write_key_points([], "en") == "Known: no lesion seen."


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("finding", [*FINDINGS, LESION])
def test_every_finding_at_every_place_is_read_back(finding: str, language: str) -> None:
    places = [{}, *({kind: level} for kind in ("zone", "lobe") for level in ZONES)]
    for side, place, size in itertools.product((None, *SIDES, "bilateral"), places, (None, 7.0, 125.0)):
        if place.get("lobe") == "middle" and side != "right":
            continue  # only the right lung has one
        if finding == "coronary_calcification" and side and not place:
            continue  # a side is part of the artery's name
        record = FindingRecord(finding, side=side, size_mm=size, **place)
        line = write_key_points([record, EFFUSION], language)
        assert list(map(point_key, read_key_points(line, language))) == [point_key(record), point_key(EFFUSION)], line


@pytest.mark.parametrize("language", LANGUAGES)
def test_key_points_of_reports_in_any_wording_are_read_back(language: str, assets: Path) -> None:
    lines = [line.split("\t") for file in sorted(assets.glob("report_sentences_*.tsv")) for line in read_lines(file)]
    sentences = [text for known, text, _ in lines if known == language]
    rng = np.random.default_rng(0)
    for i in range(0, len(sentences), 4):
        report = change_together("\n".join(sentences[i : i + 4]), language, rng)
        found = key_points_of(report, language)
        line = write_key_points(found, language)
        assert list(map(point_key, read_key_points(line, language))) == list(map(point_key, found)), line


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("右肺上野结节12mm", ("nodule", "right", "upper", None, 12)),
        ("结节，直径1.2cm，位于右肺上叶", ("nodule", "right", None, "upper", 12)),
        ("Lesion of 12 mm in the left lower zone", ("lesion", "left", "lower", None, 12)),
        ("左侧病灶3cm", ("lesion", "left", None, None, 30)),
    ],
)
def test_own_wording_is_read(text: str, key: tuple[object, ...]) -> None:
    assert list(map(point_key, read_key_points(text, "auto"))) == [key]


@pytest.mark.parametrize("text", ["右肺上野异物感", "右肺上野结节12mm，左肺异物感", "Known: nodule 5 mm; left gizmo"])
def test_unknown_finding_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="^'.*(异物感|gizmo)' names no known finding; known are: [^\n]*$"):
        read_key_points(text, "auto")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("右肺上叶结节12", "12 has no unit"),
        ("右肺上叶结节，12.5", "12.5 has no unit"),
        ("结节99999mm", "99999 mm, expected up to"),
    ],
)
def test_a_size_needs_a_unit_and_fits_into_a_chest(text: str, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        read_key_points(text, "auto")


@pytest.mark.parametrize("text", ["已知：未见病灶。", "正常", "Known: no lesion seen.", "none", ""])
def test_no_finding(text: str) -> None:
    assert read_key_points(text, "auto") == []


def test_unknown_language() -> None:
    for call in (
        lambda: write_key_points([], "fr"),
        lambda: read_key_points("", "fr"),
        lambda: key_points_of("", "fr"),
    ):
        with pytest.raises(InputError, match="language 'fr'"):
            call()


def drawn(rng: np.random.Generator) -> list[Finding]:
    found = {}
    for _ in range(rng.integers(0, 4)):
        kind = str(rng.choice(LESION_TYPES))
        zone = "lower" if kind == "effusion" else str(rng.choice(ZONES))
        finding = Finding(kind, str(rng.choice(SIDES)), zone, int(rng.integers(4, 60)))
        found[finding.type, finding.side, finding.zone] = finding
    return list(found.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_key_points_of_phantom_reports_are_their_findings(language: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        findings = drawn(rng)
        report = write_report(findings, rng, language)
        keys = [(f.type, f.side, None if f.type == "effusion" else f.zone, None, f.size_mm) for f in findings]
        assert list(map(point_key, key_points_of(report, language))) == keys, report


@pytest.mark.parametrize(
    ("report", "keys"),
    [
        # The impression repeats a finding without its size, a place more exactly, or names it otherwise.
        ("所见：右肺上叶结节，12mm。结论：右肺结节。", [("nodule", "right", None, "upper", 12)]),
        ("所见：右肺结节，12mm。结论：右肺上叶结节。", [("nodule", "right", None, "upper", 12)]),
        ("所见：右肺上叶见8mm粟粒影。结论：右肺上叶树芽征。", [("tree_in_bud", "right", None, "upper", 8)]),
        # Two sizes at two places are two findings; advice states none.
        (
            "所见：右肺上叶见5mm结节。右肺下叶见9mm结节。结论：双肺结节。建议：随访肿块。",
            [
                ("nodule", "right", None, "upper", 5),
                ("nodule", "right", None, "lower", 9),
            ],
        ),
        # Possible counts, unless it is denied.
        ("Findings: Possible small nodule in the left lung.", [("nodule", "left", None, None, None)]),
        ("Findings: No pleural effusion. Impression: Effusion cannot be excluded.", []),
    ],
)
def test_key_points_of_mentions(report: str, keys: list[tuple[object, ...]]) -> None:
    assert (
        list(map(point_key, key_points_of(report, "auto" if not report else ("zh" if "：" in report else "en"))))
        == keys
    )


@pytest.mark.parametrize(
    "text",
    [
        "INDICATION: 8 mm right upper lobe nodule.\nTECHNIQUE: CT.\nFINDINGS: No nodule is seen.",
        "临床病史：发现右肺上叶结节1年。\n影像所见：双肺未见结节。",
        "检查项目：胸部CT；临床诊断：右侧胸腔积液。影像所见：双肺未见异常。",
        "COMPARISON: prior CT showed a 6 mm nodule.\nFINDINGS: No nodule.",
    ],
)
def test_what_was_known_before_is_no_finding(text: str) -> None:
    assert key_points_of(text, "en" if text.isascii() else "zh") == []
