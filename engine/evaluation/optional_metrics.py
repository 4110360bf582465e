"""Metrics that need software, models or data of their own: used where they are, else one line says why not.

METEOR (NLTK with WordNet), BERTScore, RadGraph F1, GREEN, RaTEScore and CheXbert. Of these only NLTK is there by
default, brought by rouge-score; what is installed may fetch its own model. The calls follow each package's
documentation; only METEOR and the choice between "runs" and "says why not" are tested here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.evaluation.bootstrap import Score, mean_score

Texts = Sequence[str]


@dataclass(frozen=True)
class OptionalMetric:
    """One metric of the registry.

    Attributes:
        package: what must be importable.
        languages: what it is made for.
        needs: what to install or put in place, for the line.
        compute: (references, generated, language) → one value per case.
    """

    package: str
    languages: tuple[str, ...]
    needs: str
    compute: Callable[[Texts, Texts, str], list[float]]


def _meteor(references: Texts, generated: Texts, language: str) -> list[float]:
    import nltk
    from nltk.translate.meteor_score import single_meteor_score

    from engine.evaluation.text_metrics import ReportTokenizer

    nltk.data.find("corpora/wordnet.zip")  # LookupError without the data; NLTK itself would try other names
    tokenizer = ReportTokenizer(language)
    return [
        float(single_meteor_score(tokenizer.tokenize(a), tokenizer.tokenize(b)))
        for a, b in zip(references, generated, strict=True)
    ]


def _bertscore(references: Texts, generated: Texts, language: str) -> list[float]:
    import bert_score

    return bert_score.score(list(generated), list(references), lang=language)[2].tolist()


def _radgraph(references: Texts, generated: Texts, language: str) -> list[float]:
    from radgraph import F1RadGraph

    _, rewards, _, _ = F1RadGraph(reward_level="partial")(hyps=list(generated), refs=list(references))
    return [float(value) for value in rewards]


def _green(references: Texts, generated: Texts, language: str) -> list[float]:
    from green_score import GREEN

    _, _, values, _, _ = GREEN("StanfordAIMI/GREEN-radllama2-7b", output_dir=".")(list(references), list(generated))
    return [float(value) for value in values]


def _ratescore(references: Texts, generated: Texts, language: str) -> list[float]:
    from RaTEScore import RaTEScore

    return [float(value) for value in RaTEScore().compute_score(list(generated), list(references))]


def _chexbert(references: Texts, generated: Texts, language: str) -> list[float]:
    from f1chexbert import F1CheXbert

    _, by_case, _, _ = F1CheXbert()(list(generated), list(references))
    return [float(value) for value in by_case]


OPTIONAL_METRICS = {
    "METEOR": OptionalMetric("nltk", ("en",), "NLTK's WordNet: python -m nltk.downloader wordnet", _meteor),
    "BERTScore": OptionalMetric("bert_score", ("zh", "en"), "pip install bert-score, and its model", _bertscore),
    "RadGraph-F1": OptionalMetric("radgraph", ("en",), "pip install radgraph, and its model", _radgraph),
    "GREEN": OptionalMetric("green_score", ("en",), "pip install green-score, and its 7B model", _green),
    "RaTEScore": OptionalMetric("RaTEScore", ("en",), "pip install RaTEScore, and its models", _ratescore),
    "CheXbert": OptionalMetric("f1chexbert", ("en",), "pip install f1chexbert, and its model", _chexbert),
}


def optional_scores(
    references: Texts, generated: Texts, language: str, names: Sequence[str] | None = None
) -> tuple[dict[str, Score], list[str]]:
    """Scores of what can run here, and a line for each metric that cannot.

    Args:
        references, generated: one text per case.
        language: "zh" or "en".
        names: of ``OPTIONAL_METRICS``; None for all.
    """
    scores, lines = {}, []
    for name in names if names is not None else OPTIONAL_METRICS:
        metric = OPTIONAL_METRICS[name]
        if language not in metric.languages:
            lines.append(f"{name}: not computed, it is not made for reports in {language!r}")
        elif importlib.util.find_spec(metric.package) is None:
            lines.append(f"{name}: not computed, {metric.package} is not installed ({metric.needs})")
        else:
            try:
                values = metric.compute(references, generated, language)
            except (ImportError, LookupError, OSError) as problem:
                reason = next((line.strip() for line in str(problem).splitlines() if line.strip()), "no reason given")
                lines.append(f"{name}: not computed, {type(problem).__name__}: {reason} ({metric.needs})")
            else:
                scores[name] = mean_score(values, f"{name} by {metric.package}, mean of cases")
    return scores, lines
