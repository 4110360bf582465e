"""Language metrics of generated reports, one reference per case, each with its name, tokenisation and version.

BLEU and chrF are sacrebleu's (corpus level), ROUGE-L is rouge-score's, CIDEr-D is computed here. Tokens of
Chinese are single characters, with Latin words and numbers whole (sacrebleu's ``zh``); of English those of
mteval-v13a (sacrebleu's ``13a``). They count words; whether a report is true is measured by
:mod:`engine.evaluation.finding_metrics`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from engine.evaluation.bootstrap import Score, case_weights, interval, mean_score

BLEU_TOKENIZER = {"zh": "zh", "en": "13a"}
ROUGE_VERSION = "0.1.2"  # rouge-score does not say its own
CHRF_ORDER = 6
CIDER_ORDER = 4
CIDER_SIGMA = 6.0


class ReportTokenizer:
    """Tokens as BLEU counts them, lower-cased; the interface is that of rouge-score's tokenizers."""

    def __init__(self, language: str) -> None:
        self._tokenizer = BLEU(tokenize=BLEU_TOKENIZER[language]).tokenizer

    def tokenize(self, text: str) -> list[str]:
        return self._tokenizer(text.lower()).split()


def language_scores(references: Sequence[str], generated: Sequence[str], language: str) -> dict[str, Score]:
    """BLEU-1 to 4 and chrF (0 to 100), ROUGE-L (0 to 1), CIDEr-D (0 to 10) of at least one report in "zh" or "en".

    An empty report scores 0 and counts like any other.
    """
    tokenizer, tokens = ReportTokenizer(language), BLEU_TOKENIZER[language]
    scores = {}
    for order in range(1, 5):
        bleu, what = BLEU(tokenize=tokens, max_ngram_order=order, lowercase=True), f"BLEU-{order}"
        scores[what] = corpus_score(bleu, references, generated, f"{what}, tok:{tokens}|smooth:exp|lc")
    chrf = CHRF(char_order=CHRF_ORDER, word_order=0, beta=2)
    scores["chrF"] = corpus_score(chrf, references, generated, f"chrF2, character order {CHRF_ORDER}")
    rouge = f"rouge-score {ROUGE_VERSION} rougeL F1, tokens {tokens} of sacrebleu, mean of cases, 0 to 1"
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    common = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(references, generated, strict=True)]
    scores["ROUGE-L"] = mean_score(common, rouge)
    cider = f"own CIDEr-D, tokens {tokens} of sacrebleu, idf of the references scored, 0 to 10"
    token_lists = [[tokenizer.tokenize(text) for text in texts] for texts in (references, generated)]
    scores["CIDEr-D"] = mean_score(cider_d(*token_lists), cider)
    return scores


def corpus_score(metric: BLEU | CHRF, references: Sequence[str], generated: Sequence[str], what: str) -> Score:
    """sacrebleu's corpus value, and its interval from sacrebleu's own counts of each case.

    sacrebleu's bootstrap gives half a width around the mean of its samples, which can leave the scale; here the
    percentiles are taken, as for every other score.
    """
    counts = np.array(metric._extract_corpus_statistics(generated, [references]), np.int64)  # [cases, counts]

    def score(row: np.ndarray) -> float:
        return metric._compute_score_from_stats(row.tolist()).score

    low, high = interval(np.array([score(row) for row in case_weights(len(counts)) @ counts]))
    what = f"sacrebleu {sacrebleu.__version__} corpus {what}, 0 to 100"
    return Score(score(counts.sum(0)), low, high, len(references), what)


def cider_d(references: Sequence[Sequence[str]], generated: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D (Vedantam et al. 2015, section 4 and 5) per case, one reference each.

    With g_n the vector of n-gram counts times log(N / df), where df is the number of references that hold
    the n-gram (at least 1):

        10 · mean over n = 1..4 of  exp(−Δ² / 2σ²) · Σ min(g_n(c), g_n(r)) · g_n(r) / (‖g_n(c)‖ ‖g_n(r)‖)

    Δ is the difference in tokens, σ = 6. What every reference holds has weight 0: a single case scores 0.

    Args:
        references, generated: tokens of each case.
    """
    size = len(references)
    grams = [_ngrams(tokens) for tokens in references]
    frequency = Counter(gram for held in grams for gram in held)
    scores = []
    for tokens, words, truth in zip(references, generated, grams, strict=True):
        found = _ngrams(words)
        weigh = {g: math.log(size / max(1, frequency[g])) for g in found.keys() | truth.keys()}
        penalty = math.exp(-((len(words) - len(tokens)) ** 2) / (2 * CIDER_SIGMA**2))
        total = 0.0
        for n in range(1, CIDER_ORDER + 1):
            a = {g: count * weigh[g] for g, count in found.items() if len(g) == n}
            b = {g: count * weigh[g] for g, count in truth.items() if len(g) == n}
            length = math.hypot(*a.values()) * math.hypot(*b.values())
            common = sum(min(value, b[g]) * b[g] for g, value in a.items() if g in b)
            total += common / length if length else 0.0
        scores.append(10 * penalty * total / CIDER_ORDER)
    return scores


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, CIDER_ORDER + 1) for i in range(len(tokens) - n + 1))
