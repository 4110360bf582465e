"""An evaluation from a checkpoint to its card, step by step; ``scripts/evaluate_reports.py`` starts it."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from config.errors import InputError
from config.schema import Config
from config.toy_models import check_toy_models
from data.cache import file_digest
from data.lesions import MeasuredLesion
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from data.report_language.terms import FINDINGS
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.cli import local_config
from engine.evaluation.calibration import draw_reliability, draw_risk_coverage
from engine.evaluation.card_pages import ShownCase, card_blocks, write_html, write_markdown
from engine.evaluation.conditions import AUDITED, OWN, SAMPLE, EvaluatedTable, MeanImage, ReportPasses
from engine.evaluation.confidence import Labeller, Statement, statements
from engine.evaluation.confidence_scores import Judged, confidence_scores
from engine.evaluation.generation_store import GenerationStore
from engine.evaluation.localisation import MaskedCase, measure_case
from engine.evaluation.report_card import Evaluated, language_of, marked_reports, report_card
from engine.evaluation.report_writer import ReportWriter, token_spans
from engine.evaluation.saliency import look_at_case, save_maps
from engine.run import environment, jsonable, set_seeds
from engine.segmentation import open_cache, prepare_cases
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import weights_fingerprint
from models.medical_vlm import MedicalVLM

_SHOWN = 40  # reports on the card


@dataclass
class Job:
    """What every step needs."""

    args: argparse.Namespace
    passes: ReportPasses
    table: EvaluatedTable
    calibration: EvaluatedTable | None
    names: dict[int, str] | None
    label: Labeller

    @property
    def told(self) -> list[str]:
        """What the model is told of lesions beside the image."""
        by_lesion = self.table.data.view_selection.policy in ("mask", "nnunet")
        squares = self.passes.writer.model.vision.bridge.local_side > 0
        return [*(["heights of slices"] if by_lesion else []), *(["squares of lesions"] if squares else [])]

    @property
    def maps(self) -> Path:
        return self.args.out / "maps"

    def kept_as(self, name: str) -> str:
        """Name in the store of what depends on the mask's labels and on how maps are made."""
        settings = [self.args.attribution, self.names and sorted(self.names.items()), self.label.merged, self.args.maps]
        digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
        return f"{name}/{digest}/{len(self.table)}"


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Generate what is missing, then (main process) score it and write the card. Returns the card.

    Raises:
        InputError: a flag, file, table or checkpoint that cannot be used.
    """
    check_flags(args)
    accelerator = Accelerator()
    set_seeds(args.seed)
    job = prepare(args, accelerator)
    generate(job, accelerator)
    look(job, accelerator)
    job.passes.store.reload()
    card: dict[str, Any] = {}
    if accelerator.is_main_process:
        card = write_card(job)
    accelerator.wait_for_everyone()
    return card


def check_flags(args: argparse.Namespace) -> None:
    """Raises: InputError for a value out of range."""
    for name in ("samples", "maps"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: expected a whole number from 0 on")
    if not 0 <= args.abstain_below <= 1:
        raise InputError(f"--abstain_below {args.abstain_below}: expected a confidence from 0 to 1")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file: expected the name of a folder")
    read_mask_labels(args.mask_labels)
    Labeller("zh", read_merged(args.same_finding))


def read_mask_labels(given: Sequence[str] | None) -> dict[int, str] | None:
    """Finding of each mask value, from ``1=nodule 2=cavity`` or from the labels of nnU-Net's dataset.json.

    Raises:
        InputError: neither, or a name that is no finding (in a dataset.json those are passed over).
    """
    if not given:
        return None
    if len(given) == 1 and given[0].lower().endswith(".json"):
        path = Path(given[0])
        try:
            labels = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--mask_labels {path}: expected nnU-Net's dataset.json with 'labels' ({error})"
            ) from error
        return {int(v): name for name, v in labels.items() if name in FINDINGS and not isinstance(v, list)} or None
    names = {}
    for pair in given:
        value, _, name = pair.partition("=")
        if not value.isdigit() or name not in FINDINGS:
            raise InputError(f"--mask_labels {pair}: expected N=FINDING with one of {', '.join(FINDINGS)}")
        names[int(value)] = name
    return names


def read_merged(given: Sequence[str] | None) -> dict[str, str]:
    """``miliary=tree_in_bud`` → the first counts as the second."""
    pairs = [pair.partition("=") for pair in given or []]
    return {one: other for one, _, other in pairs}


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Job:
    """Model, tables and the store of what was generated before."""
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint.stage != "vlm":
        raise InputError(
            f"{args.checkpoint} is a Stage-1 checkpoint, which writes no reports yet: train_vlm.py comes next"
        )
    config = resolve(args, checkpoint)
    vision = checkpoint.build_vision().to(accelerator.device).eval()
    names = read_mask_labels(args.mask_labels)

    def load(path: Path, limit: int | None) -> EvaluatedTable:
        data = MedicalVLMDataset.from_config(
            config, path, open_cache(config, checkpoint.preprocess_plan), vision.encoder, args.seed
        )
        data.rows, data.questions = data.rows[:limit], data.questions[:limit]
        with accelerator.main_process_first():
            prepare_cases(data.cache, data.rows)
        return EvaluatedTable.of(file_digest(path).hex()[:12], data)

    table = load(args.csv, args.limit)
    other = args.calibration_csv or (Path(config.caption_csv_val) if config.caption_csv_val else None)
    same = other is not None and other.is_file() and file_digest(other) == file_digest(args.csv)
    if other is not None and not other.is_file() and args.calibration_csv:
        raise InputError(f"--calibration_csv not found: {other}")
    calibration = load(other, None) if other is not None and other.is_file() and not same else None
    lm = MambaLM.load(
        config.mamba_model, dtype=config.mamba_dtype, device=accelerator.device, adapters=checkpoint.adapters
    )
    if lm.width != checkpoint.llm["width"]:
        raise InputError(
            f"mamba_model '{config.mamba_model}' has width {lm.width}, {args.checkpoint} was trained for width "
            f"{checkpoint.llm['width']}: use that model"
        )
    described = {
        "checkpoint": file_digest(args.checkpoint).hex(),
        "prompts": file_digest(Path(config.caption_prompt_json)).hex() if config.caption_prompt_json else None,
        "language_model": weights_fingerprint(lm.model),
        "framing": [config.slices, config.slice_policy, config.roi_policy, config.max_visual_tokens],
        "cut_at": [config.max_question_tokens, config.max_answer_tokens],
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "format": 3,  # raise it when the same checkpoint would be shown something else
    }
    store = GenerationStore(args.out, described, accelerator.process_index)
    collator = CaptionCollator(lm.tokenizer, config.max_question_tokens, config.max_answer_tokens)
    passes = ReportPasses(
        ReportWriter(MedicalVLM(vision, lm).eval(), args.max_new_tokens), collator, store, batch_size=args.batch_size,
        seed=args.seed, process=accelerator.process_index, processes=accelerator.num_processes,
    )  # fmt: skip
    language = language_of([row.answer for row in table.data.rows]) if args.language == "auto" else args.language
    if accelerator.is_main_process:
        where = f"{len(calibration)} cases to calibrate on" if calibration else "no other table to calibrate on"
        print(f"evaluation: {len(table)} cases, {where}, reports in {language}, device {accelerator.device}, "
              f"{accelerator.num_processes} process(es), generations {store.identity}", flush=True)  # fmt: skip
    return Job(args, passes, table, calibration, names, Labeller(language, read_merged(args.same_finding)))


def resolve(args: argparse.Namespace, checkpoint: Checkpoint) -> Config:
    """The training configuration, with places and paths of --config where it is given, and --mamba_model.

    Raises InputError when a toy model would read scans that are not synthetic.
    """
    config = local_config(args, checkpoint.config)
    remedy = "use a checkpoint that was trained with your own models"
    check_toy_models(config, [args.csv], args.allow_toy_model, remedy)
    return config


def generate(job: Job, accelerator: Accelerator) -> None:
    """All reports: of the calibration table with its own images, of the table in every condition."""
    sampled = [f"{SAMPLE}{k}" for k in range(1, job.args.samples + 1)]
    if job.calibration:
        for condition in (OWN, *sampled):
            job.passes.run(job.calibration, condition)
    wanted = [condition for condition in (*AUDITED, *sampled) if not job.passes.complete(job.table, condition)]
    mean = job.passes.mean_image(job.table) if wanted else None
    for condition in wanted:
        job.passes.run(job.table, condition, mean)
    accelerator.wait_for_everyone()
    job.passes.store.reload()


def said_in(job: Job, table: EvaluatedTable) -> list[list[Statement]]:
    """Statements of all reports of a table, with their raw confidence."""
    records = job.passes.records(table, OWN)
    samples = [job.passes.records(table, f"{SAMPLE}{k}") for k in range(1, job.args.samples + 1)]
    return [
        statements(
            record["text"], job.label, token_spans(job.passes.writer.tokenizer, record["ids"]), record["log_probs"],
            [other[row]["text"] for other in samples],
        )
        for row, record in enumerate(records)
    ]  # fmt: skip


def look(job: Job, accelerator: Accelerator) -> None:
    """Lesions of the masks, then maps of the reports and the pointing game; each process its share."""
    rows = job.table.data.rows
    with_mask = [r for r, row in enumerate(rows) if row.mask_path is not None]
    job.passes.run_rows(
        job.table, job.kept_as("lesions"), with_mask,
        lambda r: asdict(measure_case(rows[r].image_path, rows[r].mask_path, job.names)),
    )  # fmt: skip
    played = with_mask if job.args.pointing_cases is None else with_mask[: job.args.pointing_cases]
    wanted = sorted({*range(min(job.args.maps, len(rows))), *played})
    kept, store = job.kept_as("looked"), job.passes.store
    if any(store.get(job.table.name, kept, r, job.table.cases[r]) is None for r in wanted):
        mean = job.passes.mean_image(job.table)
        records, said = job.passes.records(job.table, OWN), said_in(job, job.table)
        job.passes.run_rows(job.table, kept, wanted, lambda r: look_at_row(job, r, records[r], said[r], mean))
    accelerator.wait_for_everyone()


def look_at_row(
    job: Job, row: int, record: Mapping[str, Any], said: Sequence[Statement], mean: MeanImage
) -> dict[str, Any]:
    """The record of one case; its maps are saved where they are asked for."""
    batch = job.passes.batch([job.table.data[row]])
    case = look_at_case(
        job.passes.writer, job.table, row, batch, record, said, masked_case(job, row), job.names, mean.features,
        job.args.attribution,
    )  # fmt: skip
    picture = None
    if row < job.args.maps:
        picture = save_maps(job.maps, f"case{row:04d}", case, job.table.data.rows[row].image_path)
    sentences = [
        {"sentence": one.sentence, "hit": one.hit, "chance": one.chance, "why": one.why} for one in case.looked
    ]
    return {"sentences": sentences, "picture": picture and picture.name}


def masked_case(job: Job, row: int) -> MaskedCase | None:
    record = job.passes.store.get(job.table.name, job.kept_as("lesions"), row, job.table.cases[row])
    return record and MaskedCase([MeasuredLesion(**lesion) for lesion in record["lesions"]], record["problem"])


def write_card(job: Job) -> dict[str, Any]:
    """Score everything and write the card's files."""
    rows = job.table.data.rows
    references = [row.answer for row in rows]
    said = said_in(job, job.table)
    judged = Judged.of(said, [job.label(text) for text in references])
    other = None
    if job.calibration:
        truth = [job.label(row.answer) for row in job.calibration.data.rows]
        other = Judged.of(said_in(job, job.calibration), truth)
    held = Evaluated(
        label=job.label,
        references=references,
        records={name: job.passes.records(job.table, name) for name in AUDITED},
        masked=[masked_case(job, row) for row in range(len(rows))],
        statements=said,
        confidence=confidence_scores(judged, other, "the calibration table"),
        looked=[
            job.passes.store.get(job.table.name, job.kept_as("looked"), row, case)
            for row, case in enumerate(job.table.cases)
        ],
        abstain_below=job.args.abstain_below,
        told=job.told,
    )
    card = {"checkpoint": str(job.args.checkpoint), "csv": str(job.args.csv)} | report_card(held)
    card |= {"run": {"flags": jsonable(vars(job.args)), **environment()}}
    out = job.args.out
    (out / "report_card.json").write_text(json.dumps(card, ensure_ascii=False, indent=1), encoding="utf-8")
    marked = marked_reports(held)
    write_reports(out / "reports.csv", job, held, marked)
    blocks = card_blocks(card, draw_plots(out, held), shown_cases(job, held, marked))
    write_markdown(out / "report_card.md", blocks)
    write_html(out / "report_card.html", blocks)
    audit = card["audit"]
    print(f"macro-F1 {held_out(card['findings']['macro_f1'])} (chance {held_out(card['findings']['chance'])}), "
          f"shuffled {held_out(audit['shuffled']['macro_f1'])}, blank {held_out(audit['blank']['macro_f1'])}; "
          f"ECE {held_out(card['confidence']['ece'])}; pointing game {held_out(card['pointing_game'])}")  # fmt: skip
    print(f"verdict: {audit['verdict']}")
    print(f"report card: {out / 'report_card.html'}", flush=True)
    return card


def held_out(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def draw_plots(out: Path, held: Evaluated) -> list[tuple[Path, str]]:
    """Reliability and risk-coverage, where there are statements."""
    scores = held.confidence
    if scores.after is None or scores.curve is None:
        return []
    draw_reliability(scores.after, out / "reliability.png", "statements")
    draw_risk_coverage(scores.curve, out / "risk_coverage.png", "statements")
    return [(out / "reliability.png", "Reliability"), (out / "risk_coverage.png", "Risk and coverage")]


def shown_cases(job: Job, held: Evaluated, marked: Sequence[str]) -> list[ShownCase]:
    shown = []
    for row in range(min(_SHOWN, len(marked))):
        record = held.looked[row]
        picture = job.maps / record["picture"] if record and record["picture"] else None
        name = f"{row}: {job.table.data.rows[row].image_path.name}"
        there = picture if picture and picture.is_file() else None
        shown.append(ShownCase(name, held.references[row], marked[row], there))
    return shown


def write_reports(path: Path, job: Job, held: Evaluated, marked: Sequence[str]) -> None:
    """Every report as the model wrote it, and with its marks. The mark at the start lets Excel read UTF-8."""
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "image_path", "question", "reference", "generated", "marked"])
        data = job.table.data
        for row, text in enumerate(held.texts()):
            caption = data.rows[row]
            writer.writerow(
                [caption.number, caption.image_path, data.questions[row], caption.answer, text, marked[row]]
            )
