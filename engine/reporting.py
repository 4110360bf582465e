"""One scan to its report: what the check script, the folder tool and a program of one's own share.

    ScanReader    a checkpoint's vision part, loaded once: scan → checks, segmentation, view, visual tokens, findings
    Reading       what it gives of one scan
    Reporter      a reader and the language model: readings → reports, with the confidence of each statement

A checkpoint carries its configuration; :func:`run_config` changes in it what belongs to this machine and this run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config.errors import InputError
from config.schema import Config, keys_with_role
from config.toy_models import check_toy_models
from data.cache import CachedVolume, file_digest
from data.finding_targets import descriptors
from data.findings import FindingRecord
from data.medical_vlm_dataset import encode_key_points, encode_prompt, pad_tokens
from data.report_language.key_points import read_key_points, write_key_points
from data.report_language.labeller import detect_language
from data.report_language.sections import split_sections, split_sentences
from data.tables.caption_table import CaptionRow, question_of, read_prompts
from data.view_selection import View, ViewSelection
from engine import segmentation
from engine.checkpoint import Checkpoint, check_language_model, checkpoint_of, load_checkpoint
from engine.cli import local_config
from engine.evaluation.confidence import (
    TO_CHECK,
    Labeller,
    Logistic,
    Statement,
    mark_unsure,
    statements,
)
from engine.evaluation.report_writer import PROMPT_FIELDS, Report, ReportWriter, token_spans
from engine.findings_prompt import believed, deviation_notice, doubtful
from engine.run import best_device, limit_gpu_memory
from engine.scan_checks import check_new_scan, chosen_blindly, compare_described, describe_view, judge_features, notice
from models.language_model.decoding import Decoding
from models.language_model.embedding_table import load_embedding_table
from models.language_model.identity import read_tokenizer
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import MedicalVLM, VisionBridge, check_regions

MAX_NEW_TOKENS = 300  # of a report, by default
UNSURE = 0.5  # confidence below which a sentence is marked 待核实, by default


# ------------------------------------------------------------------ configuration of a run


def run_config(args: argparse.Namespace, checkpoint: Checkpoint, cap: int | None = None) -> Config:
    """The training configuration with what the flags and the GPU's token cap change in it; changes are printed.

    ``args``: ``config``, ``mamba_model``, ``slice_policy`` and, where the script has it, ``max_visual_tokens``.
    """
    trained = checkpoint.config
    config = local_config(args, trained)
    if args.config:
        local = keys_with_role("path") + keys_with_role("place")
        changed = [key for key in local if getattr(config, key) != getattr(trained, key)]
        print(f"note: from {args.config}, not from the checkpoint: {', '.join(changed) or 'nothing differs'}")
    tokens, reason = token_budget(config, getattr(args, "max_visual_tokens", None), cap)
    if reason:
        print(f"note: {tokens} visual tokens: {reason}; the checkpoint was trained with {trained.max_visual_tokens}")
    return config.replace(max_visual_tokens=tokens)


def token_budget(config: Config, wanted: int | None, cap: int | None) -> tuple[int, str]:
    """The number of visual tokens, and the reason where a flag or the cap decides.

    Args:
        config: with ``max_visual_tokens`` as in training.
        wanted: --max_visual_tokens; it overrides the cap.
        cap: for a GPU. It is raised to the least number that holds one token and the RoI of each slice, which
            training had room for.
    """
    trained = config.max_visual_tokens
    if wanted:
        return wanted, "--max_visual_tokens" if wanted != trained else ""
    if cap is None or cap >= trained:
        return trained, ""
    roi = config.roi_side**2 if config.roi_policy == "lesion" else 0
    tokens = min(trained, max(cap, config.slices * (1 + roi)))
    raised = f", raised to what {config.slices} slice(s) and their RoI need" if tokens > cap else ""
    return tokens, f"the GPU cap of {cap}{raised} (--max_visual_tokens overrides it)"


def check_models(checkpoint: Checkpoint, config: Config) -> None:
    """Before anything large is read. Raises: InputError where the language model, the RoI or the token budget does not
    fit the checkpoint."""
    check_language_model(checkpoint, config)
    check_regions(config)
    if config.mamba_model != checkpoint.llm["name"]:
        print(f"note: language model {config.mamba_model}; the checkpoint was trained with {checkpoint.llm['name']}")
    if checkpoint.stage == "vision":
        print("note: a Stage-1 checkpoint: the text is no report before train_vlm.py has trained it too")
    if checkpoint.collapsed:
        print("warning: this checkpoint is stamped as collapsed: its tokens do not depend on the image")


def default_question(row: CaptionRow, config: Config, seed: int) -> str:
    """The row's own question, or one of the prompt file. Raises InputError where there is neither."""
    prompts = read_prompts(Path(config.caption_prompt_json)) if config.caption_prompt_json else []
    if not row.question and not prompts:
        raise InputError("no question: give --question, or set caption_prompt_json in the configuration")
    return question_of(row, prompts, seed)


def encode_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Tensor]:
    """Token ids (Lq,) of each question, cut at ``max_question_tokens``."""
    return [torch.tensor(encode_prompt(tokenizer, text, config.max_question_tokens)) for text in questions]


# ------------------------------------------------------------------ scan → visual tokens and findings


@dataclass
class Reading:
    """A scan as the vision part read it.

    Attributes:
        questions: about the scan; the first is that of the report.
        own_question: whether a person asked it: the answer need not be a report, nor state the findings prompt.
        facts: lines for people on the scan, its lesions, the slices read and what is believed.
        notices: kinds of sentences that stand before the report (engine/scan_checks.py).
        language: of the reports, "zh" or "en".
        key_points: the findings prompt, empty for none; edit it, or set ``key_points`` of :meth:`Reporter.write`.
        visuals: visual tokens (1, L, D) on the CPU: one for all questions, with CMI one for each.
        features: of the encoder, (K, C, T, T) on the CPU.
        volume, view: the preprocessed case, and what the encoder got of it.
        measured: lesions of the segmentation, largest first; None where nobody looked.
        believed: findings of the prompt: measured lesions with the head's names, and what it alone is sure of; None
            without a prompt.
        doubtful: what the prompt leaves out and a person may know better, where there is a prompt.
        seconds: of checks (with the preprocessing), segmentation and vision.
    """

    image: Path
    mask: Path | None
    questions: list[str]
    own_question: bool = False
    facts: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    language: str = "zh"
    key_points: str = ""
    visuals: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None
    volume: CachedVolume | None = None
    view: View | None = None
    measured: list[FindingRecord] | None = None
    believed: list[FindingRecord] | None = None
    doubtful: list[FindingRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def notice(self) -> str:
        """The system's own sentences before the report, empty without any."""
        return notice(self.notices, self.language)

    @contextlib.contextmanager
    def step(self, name: str, begin: Callable[[str], object]) -> Iterator[None]:
        """Measure a step; ``begin`` is told its name first."""
        begin(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


class ScanReader:
    """The vision part of a checkpoint with what turns a scan into its input; loaded once, for any number of scans."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        *,
        vision: VisionBridge | None = None,
        device: str | None = None,
        allow_toy_model: bool = False,
    ) -> None:
        """``config``: of :func:`run_config`; ``vision``: of the checkpoint, where it is loaded already.

        Raises InputError as :func:`engine.segmentation.open_cache` does."""
        limit_gpu_memory(config.gpu_memory_fraction)
        self.checkpoint, self.config, self.allow_toy_model = checkpoint, config, allow_toy_model
        self.device = torch.device(device or best_device())
        self.known = checkpoint.scan_checks or {}
        self.tokenizer = read_tokenizer(config.mamba_model)
        vision = vision or checkpoint.build_vision(config.max_visual_tokens)
        self.vision = vision.eval().to(self.device)
        self.selection = ViewSelection.from_config(config, checkpoint.preprocess_plan, self.vision.encoder)
        self.cache = segmentation.open_cache(config, checkpoint.preprocess_plan)
        self._table: Tensor | None = None  # of embeddings, for CMI

    @torch.no_grad()
    def read(
        self,
        image: Path | str,
        mask: Path | None = None,
        questions: Sequence[str] = (),
        *,
        own_question: bool = False,
        force: bool = False,
        begin: Callable[[str], object] = lambda name: None,
    ) -> Reading:
        """Check, segment and read a scan.

        Args:
            mask: lesion mask, for a checkpoint whose slices follow masks.
            questions: by default one of the prompt file.
            own_question: see :class:`Reading`.
            force: go on with a scan that cannot be a chest CT.
            begin: called with the name of each step before it.

        Raises:
            InputError: the scan cannot be read or is no chest CT, or a toy model would read one that is not synthetic.
        """
        image = Path(image)
        if not questions:
            questions = [default_question(CaptionRow(1, image, "", "", None), self.config, 0)]
        remedy = "use a checkpoint that was trained with your own models"
        check_toy_models(self.config, [image], self.allow_toy_model, remedy)
        reading = Reading(image, mask, list(questions), own_question)
        reading.language = self.known.get("language") or detect_language(reading.questions[0])
        with reading.step("checks", begin):
            network = self.cache.network
            if network and self.known.get("segmentation_network") not in (None, network):
                other = "lesions are not segmented by the nnU-Net that the checkpoint was trained with"
                reading.facts.append(f"warning: {other}")
            problems = check_new_scan(self.cache, image, mask, force=force)
            reading.facts += [f"{problem.level}: {problem}" for problem in problems]
        with reading.step("segmentation", begin):
            volume, view = self.cache.read(image, mask, lambda volume: (volume, self.selection(volume)))
            reading.facts += describe_view(volume, self.selection)
            reading.volume, reading.view, reading.measured = volume, view, self.selection.measured(volume)
        with reading.step("vision", begin):
            self._read_view(reading)
        forced, blind = any(problem.fatal for problem in problems), chosen_blindly(volume, self.selection)
        reading.notices = ["forced"] * forced + ["blind"] * blind + reading.notices
        return reading

    def _read_view(self, reading: Reading) -> None:
        """Visual tokens and findings of a selected view."""
        images, position, roi = (part[None].to(self.device) for part in reading.view)
        features = self.vision.features(images)
        seen = self.vision.visual_tokens(features, position, roi)
        unusual = compare_described(self.known.get("described"), reading.volume)
        unfamiliar, line = judge_features(self.known.get("feature_distance"), features)
        reading.facts += [*unusual, line]
        reading.notices = ["unfamiliar"] * (unfamiliar or bool(unusual))
        reading.features = features[0].cpu()
        found, measured = None, reading.measured
        if self.vision.head is not None:
            found = self.vision.head(seen, torch.tensor([descriptors(measured or [])], device=self.device))
        said = believed(self.vision.head, found, measured, self.config.findings_prompt)
        if said is not None and self.known.get("language"):
            reading.facts += [f"believed: {finding.describe()}" for finding in said]
            reading.believed, reading.key_points = said, write_key_points(said, reading.language)
            if found is not None:
                reading.doubtful = doubtful(self.vision.head, found, measured or [], said)
        if self.vision.cmi is None:
            reading.visuals = [seen.cpu()]
            return
        if self._table is None:  # CMI needs the questions' embeddings: the table alone is loaded for them
            self._table = load_embedding_table(self.config.mamba_model)
        for ids in encode_questions(reading.questions, self.tokenizer, self.config):
            asked = self._table[ids][None].to(self.device), torch.ones_like(ids)[None].to(self.device)
            reading.visuals.append(self.vision.steer(seen, *asked).cpu())


# ------------------------------------------------------------------ reports


@dataclass(frozen=True)
class Sentence:
    """A piece of a report with what it states; ``confidence``: of its least sure statement, None without one."""

    text: str
    stated: tuple[FindingRecord, ...]
    confidence: float | None
    unsure: bool


@dataclass(frozen=True)
class WrittenReport:
    """``text``: as generated; ``notice``: the system's sentences before it, also on points of the prompt that it does
    not state; ``key_points``: the findings prompt that it was written from; ``marked``: the text with 待核实 behind
    each unsure sentence; ``tokens``: what was generated; ``seconds``: of its batch, divided by the batch's size."""

    text: str
    notice: str
    key_points: str
    marked: str
    sentences: tuple[Sentence, ...]
    statements: tuple[Statement, ...]
    confidences: tuple[float, ...]
    tokens: Report
    seconds: float

    @property
    def full(self) -> str:
        """Notice and marked text: what may be shown."""
        return f"{self.notice}\n{self.marked}" if self.notice else self.marked

    def sections(self, language: str) -> list[tuple[str, str]]:
        """Name and marked body of each section of the text, in its order."""
        ends, end = [], 0  # of the unsure sentences
        for one in self.sentences:
            ends += [end + len(one.text.rstrip())] * one.unsure
            end += len(one.text)
        found = []
        for section in split_sections(self.text):
            cuts = [section.start, *(at for at in ends if section.start < at <= section.end), section.end]
            parts = [self.text[first:last] for first, last in pairwise(cuts)]
            found.append((section.name, TO_CHECK[language].join(parts)))
        return found


@dataclass(frozen=True)
class Trust:
    """How a statement's probability becomes a confidence. ``calibrator``: of a report card; None: as it is."""

    calibrator: Logistic | None = None
    threshold: float = UNSURE
    verdict: str = ""

    @classmethod
    def of_card(cls, path: Path, checkpoint: Path, threshold: float = UNSURE) -> Trust:
        """From the ``report_card.json`` of a checkpoint.

        Raises InputError: no such file, no report card, that of another checkpoint, or one whose confidence needs
            sampled reports.
        """
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            fitted, verdict = card["confidence"]["calibrator"], card["audit"]["verdict"]
            sampled = card["run"]["flags"]["samples"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no readable report card ({type(error).__name__}): name the report_card.json that "
                "scripts/evaluate_reports.py wrote"
            ) from error
        if card.get("digest") not in (None, file_digest(checkpoint).hex()):  # none: of an earlier version
            raise InputError(
                f"{path} is the report card of {card['checkpoint']}, not of {checkpoint}: name that checkpoint, or "
                "evaluate this one (scripts/evaluate_reports.py)"
            )
        if sampled:
            raise InputError(
                f"{path}: its confidence was calibrated with --samples {sampled}: evaluate with --samples 0"
            )
        return cls(fitted and Logistic(tuple(fitted["weights"]), fitted["offset"]), threshold, verdict)

    def __call__(self, stated: Sequence[Statement]) -> list[float]:
        if self.calibrator is None or not stated:
            return [one.raw for one in stated]
        return self.calibrator([one.features for one in stated]).tolist()


class Reporter:
    """A reader and a language model that stay loaded: scans to reports."""

    def __init__(
        self, reader: ScanReader, lm: MambaLM, *, max_new_tokens: int = MAX_NEW_TOKENS, trust: Trust | None = None
    ) -> None:
        self.reader, self.lm, self.trust = reader, lm, trust or Trust()
        self.model = MedicalVLM(reader.vision, lm).eval()
        self.model.content = reader.checkpoint.content(reader.config)
        self.writer = ReportWriter(self.model, max_new_tokens)

    @classmethod
    def of(cls, model: MedicalVLM, *, allow_toy_model: bool = False, **options: Any) -> Reporter:
        """Of a model of ``MedicalVLM.from_pretrained``; ``options``: of the constructor."""
        checkpoint = checkpoint_of({**model.content, "model_state_dict": model.vision.state_dict()}, Path("model"))
        device = str(next(model.vision.parameters()).device)
        reader = ScanReader(
            checkpoint, checkpoint.config, vision=model.vision, device=device, allow_toy_model=allow_toy_model
        )
        return cls(reader, model.lm, **options)

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        config: Path | str | None = None,
        *,
        mamba_model: str | None = None,
        slice_policy: str | None = None,
        llm_device: str | None = None,
        llm_int8: bool = False,
        allow_toy_model: bool = False,
        **options: Any,
    ) -> Reporter:
        """From a checkpoint.

        Args:
            config: file that paths and places are taken from instead of the checkpoint.
            llm_device: of the language model; by default the GPU where there is one.
            llm_int8: its large weights in int8.
            options: of the constructor.

        Raises InputError: a file is missing or does not fit the others.
        """
        loaded = load_checkpoint(Path(checkpoint))
        flags = {"config": config and Path(config), "mamba_model": mamba_model, "slice_policy": slice_policy}
        resolved = run_config(argparse.Namespace(**flags), loaded)
        check_models(loaded, resolved)
        reader = ScanReader(loaded, resolved, allow_toy_model=allow_toy_model)
        return cls(reader, loaded.load_lm(resolved, llm_device or best_device(), int8=llm_int8), **options)

    def report(
        self, image: Path | str, question: str = "", *, mask: Path | None = None, force: bool = False
    ) -> WrittenReport:
        """The report of one scan; see :meth:`ScanReader.read` and :meth:`write`."""
        asked = {"questions": [question] if question else [], "own_question": bool(question)}
        [written] = self.write([self.reader.read(image, mask, **asked, force=force)])
        return written

    def write(
        self,
        readings: Sequence[Reading],
        key_points: Sequence[str] | None = None,
        decoding: Decoding | None = None,
        **options: Any,
    ) -> list[WrittenReport]:
        """Reports for the first question of each reading, written together.

        Args:
            key_points: findings prompts in place of the readings' own.
            decoding: by default greedy, and again where a report does not state its findings prompt.
            options: of ``MambaLM.generate``, such as ``streamer`` (one reading).
        """
        # transformers warns at length that its penalties apply to the answer alone; the manual says so.
        warnings.filterwarnings("ignore", message="Passing .* with `inputs_embeds`")
        prompts = [reading.key_points for reading in readings] if key_points is None else list(key_points)
        visual = torch.cat([reading.visuals[0] for reading in readings]).to(self.lm.model.device)
        started = time.perf_counter()
        batch = self.batch(readings, prompts)
        if decoding is None:
            said = [self._prompted(*pair) for pair in zip(readings, prompts, strict=True)]
            reports = self.writer.write_prompted(visual, batch, said, self.reader.known.get("language"), **options)
        else:
            reports = self.writer.write(visual, batch, decoding, **options)
        seconds = (time.perf_counter() - started) / len(readings)
        return [self.assess(*pair, seconds) for pair in zip(readings, prompts, reports, strict=True)]

    def batch(self, readings: Sequence[Reading], key_points: Sequence[str]) -> Mapping[str, Tensor]:
        """Findings prompts and questions, as :func:`models.medical_vlm.prompt_ids` takes them."""
        tokenizer, device = self.lm.tokenizer, self.lm.model.device
        lines = [encode_key_points(tokenizer, line) for line in key_points]
        asked = encode_questions([reading.questions[0] for reading in readings], tokenizer, self.reader.config)
        parts = [*pad_tokens(lines), *pad_tokens([ids.tolist() for ids in asked])]
        return {name: part.to(device) for name, part in zip(PROMPT_FIELDS, parts, strict=True)}

    def assess(self, reading: Reading, key_points: str, report: Report, seconds: float) -> WrittenReport:
        """A generated report with what it states, how sure that is, and where it deviates from its findings prompt."""
        notices, said = [reading.notice], self._prompted(reading, key_points)
        if said is not None:
            notices.append(deviation_notice(report.text, said, self.writer.kinds, reading.language))
        label, spans = Labeller(reading.language), token_spans(self.lm.tokenizer, report.ids)
        stated = statements(report.text, label, spans, report.log_probs)
        sure = self.trust(stated)
        sentences = []
        for number, piece in enumerate(split_sentences(report.text)):
            own = [k for k, one in enumerate(stated) if one.sentence == number]
            least = min((sure[k] for k in own), default=None)
            mentions = tuple(stated[k].mention for k in own)
            sentences.append(Sentence(piece, mentions, least, least is not None and least < self.trust.threshold))
        marked = mark_unsure(report.text, stated, sure, self.trust.threshold, reading.language)
        parts = (marked, tuple(sentences), tuple(stated), tuple(sure), report, seconds)
        return WrittenReport(report.text, " ".join(filter(None, notices)), key_points, *parts)

    def _prompted(self, reading: Reading, key_points: str) -> list[FindingRecord] | None:
        """What a report must state; None without a prompt, for a person's own question, and in a language that the
        labeller does not know."""
        language = self.reader.known.get("language")
        return read_key_points(key_points, language) if key_points and language and not reading.own_question else None
