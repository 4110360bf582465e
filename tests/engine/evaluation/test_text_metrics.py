"""Language metrics equal the reference libraries' on the same strings, and CIDEr-D a sum done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from engine.evaluation.bootstrap import case_weights
from engine.evaluation.text_metrics import ReportTokenizer, cider_d, language_scores

TEXTS = {
    "zh": (
        ["所见：右肺上叶见12mm结节，边缘光滑。结论：右肺上叶结节。", "双肺未见异常。", "左侧胸腔积液，CT值约15HU。"],
        ["所见：右肺上叶见10mm结节。结论：右肺结节。", "双肺未见异常。", "右侧少量积液；心影不大。"],
    ),
    "en": (
        ["Findings: a 12 mm nodule in the right upper lobe.", "Normal chest CT.", "Left pleural effusion (2.5 cm)."],
        ["Findings: a 9 mm Nodule in the right lobe.", "normal chest CT.", "No effusion; the heart isn't large."],
    ),
}  # fmt: skip
TOKENS = {"zh": "zh", "en": "13a"}


@pytest.mark.parametrize("language", ["zh", "en"])
def test_bleu_and_chrf_are_sacrebleus(language: str) -> None:
    references, generated = TEXTS[language]
    scores = language_scores(references, generated, language)
    for order in range(1, 5):
        bleu = BLEU(tokenize=TOKENS[language], max_ngram_order=order, lowercase=True)
        expected = bleu.corpus_score(generated, [references]).score
        assert scores[f"BLEU-{order}"].value == pytest.approx(expected, abs=1e-9)
        assert "sacrebleu 2.6.0" in scores[f"BLEU-{order}"].what and TOKENS[language] in scores[f"BLEU-{order}"].what
    assert scores["chrF"].value == pytest.approx(CHRF().corpus_score(generated, [references]).score, abs=1e-9)
    assert all(0 <= score.low <= score.high <= 100 + 1e-9 for score in scores.values())


def test_intervals_are_percentiles_of_sacrebleus_score_of_resampled_cases() -> None:
    """Against the definition: sacrebleu's score of the very cases that each sample draws."""
    references, generated = TEXTS["zh"]
    scores = language_scores(references, generated, "zh")
    drawn = [np.repeat(np.arange(3), row) for row in case_weights(3)]
    for name, metric in (("BLEU-2", BLEU(tokenize="zh", max_ngram_order=2, lowercase=True)), ("chrF", CHRF())):
        values = [metric.corpus_score([generated[k] for k in s], [[references[k] for k in s]]).score for s in drawn]
        assert scores[name].bounds == pytest.approx(np.percentile(values, [2.5, 97.5]))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_rouge_l_is_the_longest_common_subsequence(language: str) -> None:
    references, generated = TEXTS[language]
    tokenizer, expected = ReportTokenizer(language), []
    for a, b in zip(references, generated, strict=True):
        x, y = tokenizer.tokenize(a), tokenizer.tokenize(b)
        table = np.zeros((len(x) + 1, len(y) + 1), int)
        for i, j in np.ndindex(len(x), len(y)):
            table[i + 1, j + 1] = table[i, j] + 1 if x[i] == y[j] else max(table[i, j + 1], table[i + 1, j])
        expected.append(2 * table[-1, -1] / (len(x) + len(y)))
    assert language_scores(references, generated, language)["ROUGE-L"].value == pytest.approx(np.mean(expected))


def test_chinese_is_read_character_by_character_and_numbers_whole() -> None:
    assert ReportTokenizer("zh").tokenize("右肺12mm结节，CT") == ["右", "肺", "12mm", "结", "节", "，", "ct"]
    assert ReportTokenizer("en").tokenize("A 1.5 cm nodule.") == ["a", "1.5", "cm", "nodule", "."]


def test_cider_d_by_hand() -> None:
    """Two cases. Unigrams: a in both references (idf 0), b, c, d in one (idf ln 2)."""
    references, generated = [["a", "b"], ["c", "d"]], [["a", "b"], ["c", "c"]]
    first, second = cider_d(references, generated)
    # Case 1 is its reference: cosine 1 for n = 1 and 2; of 3- and 4-grams there are none.
    assert first == pytest.approx(10 * (1 + 1) / 4)
    # Case 2: c twice, clipped to once: min(2, 1)·1 / (2 · √2) for n = 1; "c c" is not in the reference.
    assert second == pytest.approx(10 * (1 / (2 * math.sqrt(2))) / 4)
    # A token more costs the Gaussian of the length difference. References: ab, cd; report "a b b".
    longer = cider_d(references, [["a", "b", "b"], ["x"]])
    ln2 = math.log(2)
    assert longer[1] == 0
    # "a" is in one reference only, so its weight is ln 2 as well.
    uni = (ln2 * ln2 + ln2 * ln2) / (math.hypot(ln2, 2 * ln2) * math.hypot(ln2, ln2))
    # "b b" is in no reference: idf ln(2/1).
    bi = (ln2 * ln2) / (math.hypot(ln2, ln2) * ln2)
    assert longer[0] == pytest.approx(10 * math.exp(-1 / (2 * 36)) * (uni + bi) / 4)


def test_what_every_reference_says_is_worth_nothing_in_cider() -> None:
    assert cider_d([["a", "b"]], [["a", "b"]]) == [0.0]
    assert cider_d([["x", "a"], ["x", "b"]], [["x"], ["x"]]) == [0.0, 0.0]


def test_empty_reports_score_nothing() -> None:
    references, _ = TEXTS["zh"]
    scores = language_scores(references, ["", "", ""], "zh")
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(scores, 0.0)
