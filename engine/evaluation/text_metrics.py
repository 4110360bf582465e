"""Language metrics of generated reports, one reference per case, each with its name, tokenisation and version.

BLEU and chrF are sacrebleu's (corpus level), ROUGE-L is rouge-score's, CIDEr-D is computed here. Tokens of
Chinese are single characters, with Latin words and numbers whole (sacrebleu's ``zh``); of English those of
mteval-v13a (sacrebleu's ``13a``). None of these sees whether a report is true: see
:mod:`engine.evaluation.finding_metrics`. Metrics that need more software are in ``optional_metrics``.
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
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from config.errors import InputError
from engine.evaluation.bootstrap import REPEATS, Score, case_weights, interval, mean_score

BLEU_TOKENIZER = {"zh": "zh", "en": "13a"}
ROUGE_VERSION = "0.1.2"  # rouge-score does not say its own
CHRF_ORDER = 6
CHRF_BETA = 2
CIDER_ORDER = 4
CIDER_SIGMA = 6.0


class ReportTokenizer:
    """Tokens as BLEU counts them, lower-cased; the interface is that of rouge-score's tokenizers."""

    def __init__(self, language: str) -> None:
        if language not in BLEU_TOKENIZER:
            raise InputError(f"language {language!r} is unknown; use one of: {', '.join(BLEU_TOKENIZER)}")
        self._tokenizer = TokenizerZh() if language == "zh" else Tokenizer13a()

    def tokenize(self, text: str) -> list[str]:
        return self._tokenizer(text.lower()).split()


def language_scores(
    references: Sequence[str], generated: Sequence[str], language: str, repeats: int = REPEATS, seed: int = 0
) -> dict[str, Score]:
    """BLEU-1 to 4 and chrF (0 to 100), ROUGE-L (0 to 1), CIDEr-D (0 to 10) of a set of reports.

    An empty report scores 0 and counts like any other.

    Raises:
        InputError: unknown language, no case, or lists of different length.
    """
    if len(references) != len(generated) or not references:
        raise InputError(f"{len(references)} references and {len(generated)} reports; give as many of each, at least 1")
    tokenizer = ReportTokenizer(language)
    weights = case_weights(len(references), repeats, seed)
    token_lists = [[tokenizer.tokenize(text) for text in texts] for texts in (references, generated)]
    scores = bleu_scores(references, generated, language, weights)
    scores["chrF"] = chrf_score(references, generated, weights)
    rouge = (
        f"rouge-score {ROUGE_VERSION} rougeL F1, tokens {BLEU_TOKENIZER[language]} of sacrebleu, mean of cases, 0 to 1"
    )
    scores["ROUGE-L"] = mean_score(rouge_l(references, generated, language), rouge, repeats, seed)
    cider = f"own CIDEr-D, tokens {BLEU_TOKENIZER[language]} of sacrebleu, idf of the references scored, 0 to 10"
    scores["CIDEr-D"] = mean_score(cider_d(*token_lists), cider, repeats, seed)
    return scores


def bleu_scores(
    references: Sequence[str], generated: Sequence[str], language: str, weights: np.ndarray
) -> dict[str, Score]:
    """Corpus BLEU of orders 1 to 4, smoothing "exp", as ``BLEU(max_ngram_order=k).corpus_score`` gives it."""
    # Only the counts of single reports are taken, which effective_order does not change; it avoids a warning.
    bleu = BLEU(tokenize=BLEU_TOKENIZER[language], effective_order=True, lowercase=True)
    rows = []
    for truth, text in zip(references, generated, strict=True):
        one = bleu.sentence_score(text, [truth])
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    counts = np.array(rows, np.int64)

    def score(row: np.ndarray, order: int) -> float:
        lengths, correct, total = row[:2], row[2 : 2 + order], row[6 : 6 + order]
        held = BLEU.compute_bleu(
            correct.tolist(), total.tolist(), int(lengths[0]), int(lengths[1]), "exp", max_ngram_order=order
        )
        return held.score

    drawn = weights @ counts
    made = {}
    for order in range(1, 5):
        low, high = interval(np.array([score(row, order) for row in drawn]))
        tokens = f"tok:{BLEU_TOKENIZER[language]}|smooth:exp|lc"
        what = f"sacrebleu {sacrebleu.__version__} corpus BLEU-{order}, {tokens}, 0 to 100"
        made[f"BLEU-{order}"] = Score(score(counts.sum(0), order), low, high, len(references), what)
    return made


def chrf_score(references: Sequence[str], generated: Sequence[str], weights: np.ndarray) -> Score:
    """Corpus chrF2; the value is sacrebleu's, the interval from the same counts."""
    metric = CHRF(char_order=CHRF_ORDER, word_order=0, beta=CHRF_BETA)
    value = metric.corpus_score(list(generated), [list(references)]).score
    counts = np.array([_chrf_counts(a, b) for a, b in zip(references, generated, strict=True)])
    low, high = interval(np.array([chrf_of_counts(row) for row in weights @ counts.reshape(len(counts), -1)]))
    what = f"sacrebleu {sacrebleu.__version__} corpus chrF2, character order {CHRF_ORDER}, 0 to 100"
    return Score(value, low, high, len(references), what)


def _chrf_counts(truth: str, text: str) -> list[list[int]]:
    """Per order: n-grams of the report, of the reference, and common ones; white space is left out."""
    one, two = "".join(text.split()), "".join(truth.split())
    rows = []
    for n in range(1, CHRF_ORDER + 1):
        a, b = (Counter(s[i : i + n] for i in range(len(s) - n + 1)) for s in (one, two))
        rows.append([a.total(), b.total(), (a & b).total()])
    return rows


def chrf_of_counts(flat: np.ndarray) -> float:
    """chrF of summed counts [CHRF_ORDER × 3] (Popović 2015): F of mean precision and mean recall."""
    hyp, ref, both = flat.reshape(CHRF_ORDER, 3).T.astype(float)
    counted = (hyp > 0) & (ref > 0)
    if not counted.any():
        return 0.0
    precision, recall = (both[counted] / hyp[counted]).mean(), (both[counted] / ref[counted]).mean()
    square = CHRF_BETA**2
    return 100 * (1 + square) * precision * recall / (square * precision + recall) if precision + recall else 0.0


def rouge_l(references: Sequence[str], generated: Sequence[str], language: str) -> list[float]:
    """F1 of the longest common subsequence of tokens, per case."""
    scorer = RougeScorer(["rougeL"], tokenizer=ReportTokenizer(language))
    return [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(references, generated, strict=True)]


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
