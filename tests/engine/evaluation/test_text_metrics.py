"""Language metrics equal the reference libraries' on the same strings, and CIDEr-D a sum done by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from config.errors import InputError
from engine.evaluation.bootstrap import Score, case_weights, interval, mean_score
from engine.evaluation.optional_metrics import OPTIONAL_METRICS, OptionalMetric, optional_scores
from engine.evaluation.text_metrics import ReportTokenizer, chrf_of_counts, cider_d, language_scores, rouge_l

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
    scores = language_scores(references, generated, language, repeats=20)
    for order in range(1, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bleu = BLEU(tokenize=TOKENS[language], max_ngram_order=order, lowercase=True)
        expected = bleu.corpus_score(generated, [references]).score
        assert scores[f"BLEU-{order}"].value == pytest.approx(expected, abs=1e-9)
        assert "sacrebleu 2.6.0" in scores[f"BLEU-{order}"].what and TOKENS[language] in scores[f"BLEU-{order}"].what
    assert scores["chrF"].value == pytest.approx(CHRF().corpus_score(generated, [references]).score, abs=1e-9)
    assert all(0 <= score.low <= score.high <= 100 for score in scores.values())


def test_interval_of_chrf_is_made_of_sacrebleus_own_value() -> None:
    """The resampled values come from our counts: on the whole set they must give what sacrebleu gives."""
    for references, generated in TEXTS.values():
        from engine.evaluation.text_metrics import _chrf_counts

        counts = np.sum([_chrf_counts(a, b) for a, b in zip(references, generated, strict=True)], axis=0)
        assert chrf_of_counts(counts.reshape(-1)) == pytest.approx(CHRF().corpus_score(generated, [references]).score)
    assert chrf_of_counts(np.zeros(18)) == 0


@pytest.mark.parametrize("language", ["zh", "en"])
def test_rouge_l_is_rouge_scores(language: str) -> None:
    references, generated = TEXTS[language]
    tokenizer = ReportTokenizer(language)
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    expected = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(references, generated, strict=True)]
    assert rouge_l(references, generated, language) == expected
    # The longest common subsequence by its definition.
    for a, b, value in zip(references, generated, expected, strict=True):
        x, y = tokenizer.tokenize(a), tokenizer.tokenize(b)
        table = np.zeros((len(x) + 1, len(y) + 1), int)
        for i in range(len(x)):
            for j in range(len(y)):
                table[i + 1, j + 1] = table[i, j] + 1 if x[i] == y[j] else max(table[i, j + 1], table[i + 1, j])
        assert value == pytest.approx(2 * table[-1, -1] / (len(x) + len(y)))


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


def test_empty_reports_score_nothing_and_lists_must_fit() -> None:
    references, _ = TEXTS["zh"]
    scores = language_scores(references, ["", "", ""], "zh", repeats=10)
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(scores, 0.0)
    with pytest.raises(InputError, match="3 references and 1 reports"):
        language_scores(references, [""], "zh")
    with pytest.raises(InputError, match="language 'fr'"):
        language_scores(references, references, "fr")


# ------------------------------------------------------------------ intervals


def test_weights_are_samples_with_replacement() -> None:
    weights = case_weights(7, repeats=200, seed=3)
    assert weights.shape == (200, 7) and (weights.sum(1) == 7).all() and weights.max() > 1
    assert (weights == case_weights(7, repeats=200, seed=3)).all()


def test_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        score = mean_score(rng.normal(1.0, 2.0, 60), repeats=300, seed=trial)
        covered += score.low <= 1.0 <= score.high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_of_nothing() -> None:
    assert math.isnan(mean_score([]).value) and mean_score([]).n == 0
    assert all(math.isnan(v) for v in interval(np.array([np.nan, np.nan])))
    assert str(Score(0.5, 0.25, 0.75, 4)) == "0.5 [0.25, 0.75]"


# ------------------------------------------------------------------ optional metrics


def test_each_optional_metric_gives_scores_or_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    scores, lines = optional_scores(["a nodule"], ["a nodule"], "en")
    assert scores == {} and len(lines) == len(OPTIONAL_METRICS)
    assert "BERTScore: not computed, bert_score is not installed (pip install bert-score, and its model)" in lines
    _, lines = optional_scores(["结节"], ["结节"], "zh", ["METEOR"])
    assert lines == ["METEOR: not computed, it is not made for reports in 'zh'"]


def test_an_optional_metric_that_is_there_is_used_and_one_without_its_model_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> list[float]:
        raise OSError("\n  no such file\nmore")

    there = OptionalMetric("json", ("en",), "nothing", lambda a, b, language: [1.0, 0.0])
    broken = OptionalMetric("json", ("en",), "a model", fails)
    monkeypatch.setattr("engine.evaluation.optional_metrics.OPTIONAL_METRICS", {"A": there, "B": broken})
    scores, lines = optional_scores(["x", "y"], ["x", "z"], "en")
    assert scores["A"].value == 0.5 and scores["A"].n == 2
    assert lines == ["B: not computed, OSError: no such file (a model)"]
