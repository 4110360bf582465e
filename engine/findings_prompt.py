"""The findings prompt: what was measured on the segmentation and what the findings head is sure of, as one line of text
before the question.

    measured   lesions of the segmentation: side, level, size; without a name where the network has one class
    predicted  the head's findings with their probability: of each measured lesion, and of the scan
    both       measured places and sizes, the head's names, and what the head alone is sure of

A lesion that the head holds for a false one is not said, and a lesion is not said twice: where one is measured, the
head's findings of a kind that is segmented are that lesion. Reports are written from this line and the image; people
can read it, and correct it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, compress
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from config.schema import FindingsPrompt
from data.finding_targets import LEAST_POSITIVE, MOST_LESIONS, PromptErrors, Targets, learnable
from data.findings import LESION, FindingRecord
from data.lesion_sizes import fit_sizes
from data.medical_vlm_dataset import MedicalVLMDataset, encode_key_points, pad_tokens
from data.report_language.key_points import MOST_MM, OUTSIDE_LUNG, key_points_of, list_key_points, write_key_points
from data.report_language.sections import HISTORY, PREAMBLE, split_sections, split_sentences
from engine.parallel import of_all
from models.findings_head import SIDES, UNKNOWN, ZONES, FindingsHead, Found
from models.language_model.decoding import INCOMPLETE, Varied
from models.medical_vlm import VisionBridge

SURE = 0.5  # calibrated probability from which a finding is said
POSSIBLE = 0.1  # from which a person is asked
PROMPT_DROPOUT = 0.3  # fraction of the training samples whose image must be read without a prompt
SIZE_MM = 1.0  # a stated size is that of the prompt, rounded
# Of a report that deviates from its prompt: how many more are written in a turn, how freely, and in how many turns.
SAMPLES, TEMPERATURES, TURNS = 8, (0.4, 1.2), 4
AT_ONCE = 4  # reports that are written again together: a large model reads the prompts of 32 rows at a time, not more
DEVIATES = {  # points left out, findings besides
    "zh": ("【系统提示】下文没有写出：{}。", "【系统提示】下文另写了征象提示之外的：{}。"),
    "en": ("[System note] The text leaves out: {}.", "[System note] The text adds to the findings prompt: {}."),
}
R = TypeVar("R")


def set_up_findings(
    accelerator: Accelerator, vision: VisionBridge, train: DataLoader, val: DataLoader, mode: FindingsPrompt
) -> FindingsPrompt:
    """For Stage 2: a findings head where ``vision`` has none, and training prompts that err as those of held-out cases.

    Returns ``mode``, or ``off`` where the labeller does not know the language of the reports; a head goes then.
    """
    trained = vision.head is not None
    findings = learnt_findings(train.dataset, val.dataset, vision.head.names if trained else ())
    if not (trained and findings):  # no head yet, or nothing that it could learn from these reports
        vision.add_head(findings)
        vision.to(accelerator.device)
    set_sizes(vision.head, train.dataset, val.dataset)
    if train.dataset.language is None:
        return "off"
    if mode != "off":
        errors = prompt_errors(accelerator, vision, val, mode) if trained else PromptErrors()
        train.dataset.prompt_errors, train.dataset.prompt_dropout = errors, PROMPT_DROPOUT
    return mode


def learnt_findings(train: MedicalVLMDataset, val: MedicalVLMDataset, names: Sequence[str] = ()) -> Sequence[str]:
    """What the head learns: ``names``, else what enough training reports state; what is too rare is printed. Both data
    sets make its targets from then on, in the language of the training reports."""
    val.language = train.language
    if train.language is None:
        print("note: the labeller does not know the language of the reports: no findings head, no findings prompt")
        return ()
    if not names:
        names, rare = learnable(train.stated)
        if rare:
            few = ", ".join(f"{name} ({count})" for name, count in rare.items())
            print(f"findings too rare to be learnt, below {LEAST_POSITIVE} training reports: {few}", flush=True)
    print(f"findings head: {', '.join(names) or 'nothing to learn'}", flush=True)
    train.findings = val.findings = names
    return names


def set_sizes(head: FindingsHead | None, *tables: MedicalVLMDataset) -> None:
    """Fit how reports size measured lesions on the cases of both tables, and print how far a new lesion's is off."""
    if head is None:
        return
    cases = [
        (said, data.measured(row) or []) for data in tables for row, said in enumerate(data.stated) if said is not None
    ]
    fit = fit_sizes(head.names, cases)
    head.set_sizes(torch.from_numpy(fit.weights), torch.from_numpy(fit.span))
    if math.isnan(fit.left_out):
        print(f"lesion sizes: {fit.lesions} stated of measured lesions, too few to fit: said as measured", flush=True)
    else:
        before, after = (100 * math.expm1(log) for log in (fit.measured, fit.left_out))
        print(
            f"lesion sizes: {fit.lesions} stated; nine in ten measured ones differ from these by at most {before:.0f} "
            f"%, nine in ten fitted ones by at most {after:.0f} % (each left out of its own fit)",
            flush=True,
        )


@torch.no_grad()
def calibrate(accelerator: Accelerator, head: FindingsHead, batches: Sequence[tuple[Tensor, Found, Targets]]) -> None:
    """Set the temperatures from what the head says of the validation cases and their targets, and print how often it is
    right.

    Args:
        batches: rows (B,) of this process, what the head says of them, and their targets.
    """
    pairs = [pair for _, *pair in batches]
    if accelerator.num_processes > 1:
        by_row = {int(rows[0]): [[value.cpu() for value in part] for part in pair] for rows, *pair in batches}
        pairs = list(of_all(by_row).values())
    device = head.query.device
    said, target = (
        Found(*(torch.cat(values).to(device) for values in zip(*part, strict=True)))
        for part in zip(*pairs, strict=True)
    )
    head.calibrate(said, target)
    known, stated = target.lesion != UNKNOWN, target.presence == 1
    named = (said.lesion.argmax(-1) == target.lesion)[known].float()
    positive = said.presence > 0
    f1 = 2 * (positive & stated).sum() / (positive.sum() + stated.sum()).clamp(min=1)
    accelerator.print(
        f"findings head on {len(stated)} validation cases: {len(named)} measured lesions, named rightly "
        f"{float(named.mean()) if len(named) else math.nan:.3f}; findings of the scan, micro-F1 {float(f1):.3f}",
        flush=True,
    )


@torch.no_grad()
def prompt_errors(
    accelerator: Accelerator, vision: VisionBridge, loader: DataLoader, mode: FindingsPrompt
) -> PromptErrors:
    """How prompts of the held-out cases of ``loader`` err beside their reports."""
    data, said = loader.dataset, {}
    training = vision.training
    vision.eval()
    for batch in loader:
        rows = batch["row"].tolist()
        measured = [data.measured(row) for row in rows]
        said |= zip(rows, batch_believed(vision.head, vision.read(batch)[1], measured, mode), strict=True)
    vision.train(training)
    said = {row: one for row, one in of_all(said).items() if data.stated[row] is not None}
    errors = PromptErrors.of([data.stated[row] for row in said], [one or [] for one in said.values()])
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in errors.rates().items())
    accelerator.print(f"findings prompt ({mode}) on {len(said)} held-out cases: {rates} a case", flush=True)
    return errors


def believed(
    head: FindingsHead | None, found: Found | None, measured: Sequence[FindingRecord] | None, mode: FindingsPrompt
) -> list[FindingRecord] | None:
    """The findings of one case to be said, largest measured lesion first; None where nothing is known to say.

    Args:
        found: of a batch of this case alone. measured: None where nobody looked for lesions.
    """
    if mode == "off" or (measured is None and (mode == "measured" or head is None)):
        return None
    measured = list(measured or [])[:MOST_LESIONS]
    if mode == "measured" or head is None or found is None:
        return None if mode == "predicted" else measured
    said = head.probabilities(found)
    lesions = [_named(head, said, k, lesion) for k, lesion in enumerate(measured)]
    scan = [_of_scan(head, said, k) for k in range(len(head.names)) if said.presence[0, k] >= SURE]
    if mode == "predicted":
        return scan
    real = [lesion for lesion in lesions if lesion is not None]
    kinds = set(compress(head.names, head.segmented.tolist()))
    return real + [finding for finding in scan if not _measured(finding, real, kinds)]


def doubtful(
    head: FindingsHead, found: Found, measured: Sequence[FindingRecord], said: Sequence[FindingRecord]
) -> list[FindingRecord]:
    """What :func:`believed` leaves out of one case and a person may know better: measured lesions that are probably
    false, and findings of the scan that are only possible."""
    chances = head.probabilities(found)
    kinds = chances.lesion[0, :, :-1].argmax(-1).tolist()
    lesions = [_as_stated(head, chances, k, kinds[k], lesion) for k, lesion in enumerate(measured[:MOST_LESIONS])]
    named = {(f.measured.z, f.measured.y, f.measured.x) for f in said if f.measured}
    false = [_placed(f) for f in lesions if (f.measured.z, f.measured.y, f.measured.x) not in named]
    scan = [_of_scan(head, chances, k) for k in range(len(head.names)) if chances.presence[0, k] >= POSSIBLE]
    known = {finding.finding for finding in [*said, *false]}
    return false + [finding for finding in scan if finding.finding not in known]


def _named(head: FindingsHead, said: Found, k: int, lesion: FindingRecord) -> FindingRecord | None:
    """A measured lesion with the head's name and its fitted size; None where it is probably false."""
    best = int(said.lesion[0, k].argmax())
    return None if best == len(head.names) else _placed(_as_stated(head, said, k, best, lesion))


def _as_stated(head: FindingsHead, said: Found, k: int, kind: int, lesion: FindingRecord) -> FindingRecord:
    """Measured lesion ``k`` as one of the head's findings, with its size as reports state it; as it is measured where
    that cannot be."""
    size = lesion.size_mm and max(1.0, lesion.size_mm * float(said.lesion_size[0, k]))
    size = lesion.size_mm if size and size > MOST_MM else size
    return replace(lesion, finding=head.names[kind], size_mm=size, probability=float(said.lesion[0, k, kind]))


def _of_scan(head: FindingsHead, said: Found, k: int) -> FindingRecord:
    """Finding ``k``, with its likeliest side and level and its size."""
    side, zone = SIDES[int(said.side[0, k].argmax())], ZONES[int(said.zone[0, k].argmax())]
    size = float(said.size[0, k])
    record = FindingRecord(head.names[k], side=side, zone=zone, size_mm=size, source="predicted")
    return _placed(replace(record, probability=float(said.presence[0, k])))


def _measured(finding: FindingRecord, lesions: Sequence[FindingRecord], segmented: Collection[str]) -> bool:
    """Whether one of the lesions is this finding of the scan: it has its name, or its place and another name."""
    at = [(one.side, one.level) for one in lesions if finding.finding in segmented and one.level]
    return finding.finding in {one.finding for one in lesions} or (finding.side, finding.level) in at


def _placed(record: FindingRecord) -> FindingRecord:
    """Without a level where reports state none."""
    return replace(record, zone=None, lobe=None) if record.finding in OUTSIDE_LUNG else record


def rows_of(found: Found | None, rows: int) -> list[Found | None]:
    """What the head says of each case of a batch."""
    return [None] * rows if found is None else [Found(*(part[b : b + 1] for part in found)) for b in range(rows)]


def with_key_points(
    batch: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    said: Sequence[Sequence[FindingRecord] | None],
    language: str | None,
) -> dict[str, Any]:
    """``batch`` with findings prompts that say these; without a prompt where there is None, or no known language."""
    lines = ["" if one is None or language is None else write_key_points(one, language) for one in said]
    device = batch["question_ids"].device
    ids, mask = (part.to(device) for part in pad_tokens([encode_key_points(tokenizer, line) for line in lines]))
    return {**batch, "key_point_ids": ids, "key_point_mask": mask}


def batch_believed(
    head: FindingsHead | None,
    found: Found | None,
    measured: Sequence[Sequence[FindingRecord] | None],
    mode: FindingsPrompt,
) -> list[list[FindingRecord] | None]:
    """:func:`believed` of each case of a batch."""
    cases = zip(rows_of(found, len(measured)), measured, strict=True)
    return [believed(head, one, lesions, mode) for one, lesions in cases]


# ------------------------------------------------------------------ reports that say what their prompt says


def states(mention: FindingRecord, point: FindingRecord) -> bool:
    """Whether a mention says a point of the prompt: its finding, side, level and size, of what the point has."""
    size = point.size_mm is None or (mention.size_mm is not None and abs(point.size_mm - mention.size_mm) <= SIZE_MM)
    return (
        point.finding in (LESION, mention.finding)
        and point.side in (None, mention.side)
        and (point.finding in OUTSIDE_LUNG or point.level in (None, mention.level))
        and size
    )


def unmatched(
    mentions: Sequence[FindingRecord], points: Sequence[FindingRecord]
) -> tuple[list[FindingRecord], list[FindingRecord]]:
    """Points that no mention states, and mentions that state no point; each mention states one."""
    left, missing = list(mentions), []
    for point in points:
        match = next((mention for mention in left if states(mention, point)), None)
        if match is None:
            missing.append(point)
        else:
            left.remove(match)
    return missing, left


def deviations(
    report: str, points: Sequence[FindingRecord], kinds: Collection[str], language: str
) -> tuple[list[FindingRecord], list[FindingRecord]]:
    """Points of its findings prompt that a report leaves out, and findings of ``kinds`` that it has besides."""
    missing, left = unmatched(key_points_of(report, language), points)
    return missing, [mention for mention in left if mention.finding in kinds]


def deviation_notice(report: str, points: Sequence[FindingRecord], kinds: Collection[str], language: str) -> str:
    """What a reader must know of a report that does not say what its prompt says; empty where it does."""
    found = zip(DEVIATES[language], deviations(report, points, kinds, language), strict=True)
    return " ".join(line.format(list_key_points(part, language)) for line, part in found if part)


def right_beginning(report: str, points: Sequence[FindingRecord], kinds: Collection[str], language: str) -> str:
    """The sentences of a report up to the first that adds a finding to its prompt, or up to its impression where the
    findings leave out a point."""
    later = [section.start for section in split_sections(report) if section.name not in (PREAMBLE, HISTORY, "findings")]
    concluded, right, left_out = min(later, default=len(report)), "", points
    for end in accumulate(map(len, split_sentences(report))):
        beginning = report[:end].rstrip()  # a blank belongs to the word behind it
        missing, besides = deviations(beginning, points, kinds, language)
        if besides or INCOMPLETE in beginning or (end > concluded and left_out):
            return right
        right, left_out = beginning, missing
    return ""


def closest_reports(
    reports: Sequence[R],
    said: Sequence[Sequence[FindingRecord] | None],
    kinds: Collection[str],
    language: str | None,
    text_of: Callable[[R], str],
    write: Callable[[list[int], Varied, list[str]], Sequence[R]],
) -> list[R]:
    """``reports``, where one that deviates from its findings prompt is replaced by the closest of several more.

    They go on by sampling from where the report was right, some at a time, until one says what the prompt says: best of
    n by a verifier (Cobbe et al. 2021, arXiv:2110.14168), here the labeller, in steps. Every word is the model's; of
    equally close reports the first is taken.

    Args:
        said: by the prompts; None without one.
        kinds: findings that no report states unless its prompt does.
        language: of the reports; None where the labeller does not know it, and nothing is done.
        write: samples a report for each of these rows, which come in runs of :data:`SAMPLES`, from its beginning on.
    """
    chosen, begun = list(reports), [""] * len(reports)

    def off(row: int, report: R) -> tuple[int, int]:
        """Broken characters, and deviations."""
        text = text_of(report)
        return text.count(INCOMPLETE), sum(map(len, deviations(text, said[row], kinds, language)))

    def progress(row: int, beginning: str) -> tuple[int, int]:
        """Points that it states; of equal ones the shortest, which denies least."""
        return -len(deviations(beginning, said[row], kinds, language)[0]), -len(beginning)

    def take(row: int, candidates: Sequence[R]) -> None:
        chosen[row] = min([chosen[row], *candidates], key=partial(off, row))
        right = (right_beginning(text_of(one), said[row], kinds, language) for one in candidates)
        begun[row] = max([begun[row], *right], key=partial(progress, row))

    known = [row for row, points in enumerate(said) if points is not None and language is not None]
    open_rows = [row for row in known if any(off(row, chosen[row]))]
    for row in open_rows:
        take(row, [chosen[row]])
    for turn in range(TURNS):
        for start in range(0, len(open_rows), AT_ONCE):
            part = open_rows[start : start + AT_ONCE]
            rows = [row for row in part for _ in range(SAMPLES)]
            written = write(rows, Varied(SAMPLES, TEMPERATURES, turn), [begun[row] for row in rows])
            for k, row in enumerate(part):
                take(row, written[k * SAMPLES : (k + 1) * SAMPLES])
        open_rows = [row for row in open_rows if any(off(row, chosen[row]))]
    return chosen
