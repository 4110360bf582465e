"""An evaluation from a checkpoint to its card, step by step; ``scripts/evaluate_reports.py`` starts it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from config.errors import InputError, counted
from config.files import write_csv, write_text
from config.schema import Config
from config.toy_models import check_toy_models
from data.cache import file_digest
from data.findings import FindingRecord
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from data.report_language.key_points import OUTSIDE_LUNG
from data.report_language.labeller import language_of
from data.report_language.terms import FINDINGS
from engine.checkpoint import check_language_model, load_checkpoint
from engine.cli import local_config
from engine.evaluation.baselines import (
    CopiedReports,
    TrainingCases,
    copied_reports,
    predicted_findings,
    training_cases,
)
from engine.evaluation.card_pages import ShownCase, card_blocks, draw_plots, opening_blocks, show, write_pages
from engine.evaluation.conditions import (
    AUDITED,
    CORRECTED,
    OWN,
    SAMPLE,
    GenerationStore,
    ReportPasses,
    patients_of,
    shuffled_order,
)
from engine.evaluation.confidence import Labeller, Outcomes, Statement, confidence_scores, statements
from engine.evaluation.finding_metrics import Mentions
from engine.evaluation.image_dependence import correction_scores
from engine.evaluation.localisation import MaskedCase, measure_case
from engine.evaluation.report_card import TableResults, marked_reports, plain, report_card
from engine.evaluation.report_writer import ReportWriter, token_spans
from engine.evaluation.saliency import map_case
from engine.parallel import start_accelerator
from engine.run import environment, limit_gpu_memory, set_seeds
from engine.scan_checks import check_scans, chosen_blindly, notice
from engine.segmentation import free_network, open_cache, prepare_cases
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import weights_fingerprint
from models.medical_vlm import MedicalVLM

_SHOWN = 40  # reports on the card
_DRAWN = 6  # of them at its top, at random


@dataclass
class Job:
    """What every step needs. ``names``: of the mask's labels, where they are known; ``training``: the training table,
    None where it cannot be used, and ``copied``: which of its reports the baselines copy."""

    args: argparse.Namespace
    passes: ReportPasses
    calibration: ReportPasses | None
    names: dict[int, str] | None
    label: Labeller
    training: ReportPasses | None
    copied: TrainingCases

    @property
    def lesion_inputs(self) -> list[str]:
        """What the model is given of lesions beside the image, in words."""
        by_lesion = self.passes.data.view_selection.policy in ("auto", "mask", "nnunet")
        regions = self.passes.writer.model.vision.bridge.spec.lesion_side > 0
        prompted = self.passes.mode not in ("off", "predicted") and self.passes.language is not None
        given = {"levels of slices": by_lesion, "RoIs of lesions": regions, "measured lesions": prompted}
        return [what for what, there in given.items() if there]

    @cached_property
    def notices(self) -> list[list[str]]:
        """Kinds of sentences that stand before each report."""
        data, found = self.passes.data, []
        for row in data.rows:
            volume = data.cache.get(row.image_path, row.mask_path)
            blind = chosen_blindly(volume, data.view_selection)
            forced = any(problem.fatal for problem in volume.problems)
            found.append(["forced"] * forced + ["blind"] * blind)
        return found

    @cached_property
    def stated(self) -> list[list[Statement]]:
        """Statements of the table's reports."""
        return table_statements(self, self.passes)

    @property
    def corrections(self) -> int:
        """Cases whose findings prompt is corrected; none where the model has no findings to correct."""
        head = self.passes.writer.model.vision.head
        known = head is not None and set(head.names) - OUTSIDE_LUNG
        prompted = self.passes.mode != "off" and self.passes.language and known
        return min(self.args.corrections, len(self.passes)) if prompted else 0

    @cached_property
    def drawn(self) -> list[int]:
        """Rows whose cases the card shows first: drawn by the seed, so that nobody has chosen them."""
        cases = len(self.passes)
        return sorted(np.random.default_rng(self.args.seed).choice(cases, min(_DRAWN, cases), replace=False).tolist())

    @property
    def mapped(self) -> list[int]:
        """Rows whose maps are saved: the first ``--maps`` and those at the card's top."""
        return sorted({*range(min(self.args.maps, len(self.passes))), *self.drawn}) if self.args.maps else []

    @property
    def sampled(self) -> list[str]:
        """Conditions of the sampled reports."""
        return [f"{SAMPLE}{k}" for k in range(1, self.args.samples + 1)]

    def key(self, name: str) -> str:
        """Key in the store of what depends on the mask's labels and on how maps are made."""
        settings = [self.args.attribution, self.names and sorted(self.names.items()), self.label.merged, self.mapped]
        digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
        return f"{name}/{digest}/{len(self.passes)}"


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate what is missing, then (main process) score it and write the card. Returns the card.

    Raises InputError: a flag, file, table or checkpoint that cannot be used.
    """
    check_flags(args)
    accelerator = start_accelerator()
    set_seeds(args.seed)
    job = prepare(args, accelerator)
    generate(job, accelerator)
    measure_lesions_and_maps(job, accelerator)
    job.passes.store.reload()
    card: dict[str, Any] = {}
    if accelerator.is_main_process:
        card = write_card(job)
    accelerator.wait_for_everyone()
    return card


def check_flags(args: argparse.Namespace) -> None:
    """Raises: InputError for a value out of range."""
    for name in ("samples", "maps", "corrections", "pointing_cases"):
        if (getattr(args, name) or 0) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: expected a whole number from 0 on")
    if not 0 <= args.abstain_below <= 1:
        raise InputError(f"--abstain_below {args.abstain_below}: expected a confidence from 0 to 1")
    for name in ("csv", "calibration_csv"):
        path = getattr(args, name)
        if path and not path.is_file():
            raise InputError(f"--{name} not found: {path}; expected a table of cases")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file: expected the name of a folder")
    read_mask_labels(args.mask_labels)
    same_finding(args)


def read_mask_labels(given: Sequence[str] | None) -> dict[int, str] | None:
    """Finding of each mask value, from ``1=nodule 2=cavity`` or from the labels of nnU-Net's dataset.json.

    Raises InputError: neither, or a name that is no finding (in a dataset.json those are passed over).
    """
    if not given:
        return None
    if len(given) == 1 and given[0].lower().endswith(".json"):
        path = Path(given[0])
        try:
            labels = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        except (OSError, ValueError, KeyError, TypeError) as why:
            raise InputError(f"--mask_labels {path}: expected nnU-Net's dataset.json with 'labels' ({why})") from why
        return {int(v): name for name, v in labels.items() if name in FINDINGS and not isinstance(v, list)} or None
    names = {}
    for pair in given:
        value, _, name = pair.partition("=")
        if not value.isdigit() or name not in FINDINGS:
            raise InputError(f"--mask_labels {pair}: expected N=FINDING with one of {', '.join(FINDINGS)}")
        names[int(value)] = name
    return names


def same_finding(args: argparse.Namespace) -> dict[str, str]:
    """``miliary=tree_in_bud`` → the first counts as the second. Raises InputError: another form, or no finding."""
    same = {}
    for pair in args.same_finding or []:
        one, _, other = pair.partition("=")
        if one not in FINDINGS or other not in FINDINGS:
            raise InputError(f"--same_finding {pair}: expected A=B, each one of {', '.join(FINDINGS)}")
        same[one] = other
    return same


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Job:
    """Model, tables and the store of what was generated before."""
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint.stage != "vlm":
        raise InputError(
            f"{args.checkpoint} is a Stage-1 checkpoint, which writes no reports yet: train_vlm.py comes next"
        )
    config = local_config(args, checkpoint.config)
    remedy = "use a checkpoint that was trained with your own models"
    check_toy_models(config, [args.csv], args.allow_toy_model, remedy)
    check_language_model(checkpoint, config)
    limit_gpu_memory(config.gpu_memory_fraction)
    device = accelerator.device
    vision = checkpoint.build_vision().to(device).eval()

    def load(path: Path, limit: int | None = None) -> MedicalVLMDataset:
        cache = open_cache(config, checkpoint.preprocess_plan)
        data = MedicalVLMDataset.from_config(config, path, cache, vision.encoder, args.seed)
        data.rows, data.questions = data.rows[:limit], data.questions[:limit]
        if path == args.csv:  # refused before anything is prepared or generated
            shuffled_order(patients_of(data.rows), args.seed)
        with accelerator.main_process_first():
            prepare_cases(data.cache, data.rows)
        check_scans(data.cache, {path.name: data.rows}, force=args.force)
        return data

    tables, other = {args.csv: load(args.csv, args.limit)}, calibration_csv(args, config)
    tables |= {other: load(other)} if other else {}
    cache = open_cache(config, checkpoint.preprocess_plan)
    with accelerator.main_process_first():
        copied = training_cases(config, cache, vision.encoder, tables[args.csv].rows)
    free_network()
    lm = checkpoint.load_lm(config, device)
    store = GenerationStore(args.out, generated_from(args, config, lm), accelerator.process_index)
    collator = CaptionCollator(lm.tokenizer, config.max_question_tokens, config.max_answer_tokens)
    writer = ReportWriter(MedicalVLM(vision, lm).eval(), args.max_new_tokens)
    options = args.batch_size, args.seed, accelerator.process_index, accelerator.num_processes
    prompt = config.findings_prompt, (checkpoint.scan_checks or {}).get("language")

    def passes_of(path: Path, data: MedicalVLMDataset) -> ReportPasses:
        return ReportPasses(writer, collator, store, file_digest(path).hex()[:12], data, *options, *prompt)

    passes, *calibration = (passes_of(path, data) for path, data in tables.items())
    training = passes_of(config.resolved("caption_csv_train"), copied.data) if copied.data else None
    answers = [row.answer for row in passes.data.rows]
    label = Labeller(language_of(answers) if args.language == "auto" else args.language, same_finding(args))
    if accelerator.is_main_process:
        where = f"{len(calibration[0])} cases to calibrate on" if calibration else "no other table to calibrate on"
        print(f"evaluation: {len(passes)} cases, {where}, reports in {label.language}, device {device}, "
              f"{counted(accelerator.num_processes, 'process')}, generations {store.identity}", flush=True)  # fmt: skip
    held_out, names = calibration[0] if calibration else None, read_mask_labels(args.mask_labels)
    return Job(args, passes, held_out, names, label, training, copied)


def calibration_csv(args: argparse.Namespace, config: Config) -> Path | None:
    """The table to calibrate confidence on; None where it is absent or the evaluated table itself."""
    path = args.calibration_csv or Path(config.caption_csv_val or "")
    return path if path.is_file() and file_digest(path) != file_digest(args.csv) else None


def generated_from(args: argparse.Namespace, config: Config, lm: MambaLM) -> dict[str, Any]:
    """What the generations depend on; the store's identity is its digest."""
    return {
        "checkpoint": file_digest(args.checkpoint).hex(),
        "prompts": file_digest(Path(config.caption_prompt_json)).hex() if config.caption_prompt_json else None,
        "language_model": weights_fingerprint(lm.model),
        "framing": [config.slices, config.slice_policy, config.roi_policy, config.max_visual_tokens]
        + [config.min_lesion_mm3] * (config.min_lesion_mm3 is not None),
        "cut_at": [config.max_question_tokens, config.max_answer_tokens],
        "max_new_tokens": args.max_new_tokens,
        **({} if config.findings_prompt == "off" else {"findings_prompt": config.findings_prompt}),
        "seed": args.seed,
        "format": 7,  # raise it when the same checkpoint would be shown something else, or a record has other keys
    }


def generate(job: Job, accelerator: Accelerator) -> None:
    """All reports: of the calibration table with its own images, of the table in every condition."""
    if job.calibration:
        for condition in (OWN, *job.sampled):
            job.calibration.run(condition)
    for condition in (*AUDITED, *job.sampled):
        job.passes.run(condition)
    if job.corrections:
        job.passes.run(CORRECTED, job.corrections)
    if job.training:
        job.training.embed(job.copied.rows)
        job.passes.embed(range(len(job.passes)))
    accelerator.wait_for_everyone()
    job.passes.store.reload()


def table_statements(job: Job, passes: ReportPasses) -> list[list[Statement]]:
    """Statements of all reports of a table, with their raw confidence."""
    samples = [[record["text"] for record in passes.records(condition)] for condition in job.sampled]
    found = []
    for row, record in enumerate(passes.records(OWN)):
        spans = token_spans(passes.writer.tokenizer, record["ids"])
        others = [texts[row] for texts in samples]
        found.append(statements(record["text"], job.label, spans, record["log_probs"], others))
    return found


def measure_lesions_and_maps(job: Job, accelerator: Accelerator) -> None:
    """Lesions of the masks, then the pointing game and the maps of the first ``--maps`` rows, which are saved; each
    process takes its own rows."""
    rows = job.passes.data.rows
    with_mask = [r for r, row in enumerate(rows) if row.mask_path is not None]

    def measure(part: list[int]) -> list[dict[str, Any]]:
        return [measure_case(rows[r].image_path, rows[r].mask_path, job.names).to_dict() for r in part]

    job.passes.fill(job.key("measured_lesions"), with_mask, 1, measure)
    wanted = sorted({*job.mapped, *with_mask[: job.args.pointing_cases]})
    masked = masked_cases(job)

    def make(part: list[int]) -> list[dict[str, Any]]:
        [row] = part
        out = job.args.out / "maps" if row in job.mapped else None
        return [map_case(job.passes, row, job.stated[row], masked[row], job.args.attribution, out)]

    job.passes.fill(job.key("maps"), wanted, 1, make)
    accelerator.wait_for_everyone()


def masked_cases(job: Job) -> list[MaskedCase | None]:
    """Lesions by row of the table, None for a row without a mask."""
    return [
        record and MaskedCase([FindingRecord.from_dict(lesion) for lesion in record["lesions"]], record["problem"])
        for record in job.passes.stored(job.key("measured_lesions"))
    ]


def copy_reports(job: Job, predicted: Mentions) -> CopiedReports:
    """The baselines' reports; ``predicted``: findings that the model states in each case."""
    if job.training is None:
        return CopiedReports({}, job.copied.note)
    rows = job.copied.rows
    reports = [job.training.data.rows[row].answer for row in rows]
    embeddings = job.passes.embeddings(range(len(job.passes))), job.training.embeddings(rows)
    return copied_reports(reports, [job.label(text) for text in reports], predicted, embeddings, job.copied.note)


def write_card(job: Job) -> dict[str, Any]:
    """Score everything and write the card's files."""
    args, passes, other = job.args, job.passes, job.calibration
    outcomes = Outcomes.of(job.stated, passes.data.rows, job.label)
    held_out = Outcomes.of(table_statements(job, other), other.data.rows, job.label) if other else None
    results = TableResults(
        label=job.label,
        references=[row.answer for row in passes.data.rows],
        records={name: passes.records(name) for name in AUDITED},
        masked=masked_cases(job),
        statements=job.stated,
        confidence=confidence_scores(outcomes, held_out, "the calibration table"),
        pointing=passes.stored(job.key("maps")),
        abstain_below=args.abstain_below,
        lesion_inputs=job.lesion_inputs,
    )
    believed = [record.get("believed") for record in results.records[OWN]]
    predicted = [job.label.merge(predicted_findings(*one)) for one in zip(results.mentions[OWN], believed, strict=True)]
    results.copied = copy_reports(job, predicted)
    digest = file_digest(args.checkpoint).hex()
    card = {"checkpoint": str(args.checkpoint), "digest": digest, "csv": str(args.csv)} | report_card(results)
    blind = sum("blind" in kinds for kinds in job.notices)
    if job.corrections:
        records = [merged_names(record, job.label) for record in passes.stored(CORRECTED) if record is not None]
        card["corrections"] = plain(correction_scores(records, [job.label(record["text"]) for record in records]))
    card["views"] = {"slice_policy": passes.data.view_selection.policy, "blind_cases": blind}
    if blind:
        print(
            f"warning: the slices of {blind} of {len(passes)} cases were chosen without knowing of a lesion", flush=True
        )
    card |= {"run": {"flags": vars(args), **environment()}}
    write_text(args.out / "report_card.json", json.dumps(card, ensure_ascii=False, indent=1, default=str))
    marked = [
        f"{notice(kinds, job.label.language)}{text}"
        for kinds, text in zip(job.notices, marked_reports(results), strict=True)
    ]
    write_reports(args.out / "reports.csv", job, results, marked)
    plots = draw_plots(args.out, results.confidence)

    def shown_case(row: int) -> ShownCase:
        one, record = passes.data.rows[row], results.pointing[row]
        figure = args.out / "maps" / record["figure"] if record and record["figure"] else None
        figure = figure if figure and figure.is_file() else None
        return f"{row}: {one.image_path.name}", one.answer, marked[row], figure

    opening = opening_blocks(card, [shown_case(row) for row in job.drawn])
    cases = [shown_case(row) for row in range(min(_SHOWN, len(passes)))]
    write_pages(args.out, opening, card_blocks(card, plots, cases))
    audit = card["audit"]
    macro = [one["macro_f1"] for one in (card["findings"], audit["shuffled"], audit["blank"])]
    values = (*macro, card["findings"]["chance"], card["confidence"]["ece"], card["pointing_game"])
    shown = ["none" if value is None else f"{value:.3f}" for value in values]
    print("macro-F1 {0} (chance {3}), shuffled {1}, blank {2}; ECE {4}; pointing game {5}".format(*shown))
    crg = show(card["findings"]["crg"]["value"]), *(show(floor["crg"]["value"]) for floor in card["floors"].values())
    print("CRG {} (all-negative reports {}, all-positive {}, permuted {})".format(*crg))
    for name, one in (card["baselines"] or {}).items():
        values = one["macro_f1"], one["crg"], one["location_acc"], one["whole_reports"]["exact_acc"]
        shown = (show(score["value"]) for score in values)
        print("baseline {}: macro-F1 {}, CRG {}, side and level {}, exact {}".format(name, *shown))
    print(f"verdict: {audit['verdict']}")
    print(f"report card: {args.out / 'report_card.html'}", flush=True)
    return card


def merged_names(record: Mapping[str, Any], label: Labeller) -> dict[str, Any]:
    """A record of a corrected prompt with its findings under the names that reports are labelled with."""
    [point, *asked] = label.merge(map(FindingRecord.from_dict, [record["point"], *record["asked"]]))
    return {**record, "point": point.to_dict(), "asked": [one.to_dict() for one in asked]}


def write_reports(path: Path, job: Job, results: TableResults, marked: Sequence[str]) -> None:
    """Every report as generated, and with its marks."""
    data, lines = job.passes.data, [["row", "image_path", "question", "reference", "generated", "marked"]]
    for row, question, text, mark in zip(data.rows, data.questions, results.texts(), marked, strict=True):
        lines.append([row.number, row.image_path, question, row.answer, text, mark])
    write_csv(path, lines)
