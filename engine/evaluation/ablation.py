"""What is compared in the ablations, one choice at a time, and the table of what came out.

Every variant is the baseline with one thing changed, trained with the same number of optimizer steps, cases and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from config.schema import BridgeMixer, CMIKind, Config
from data.phantom.finding import Finding
from data.phantom.report import score_reports
from engine.evaluation.bootstrap import Score, mean_score
from models.vim_bridge import grid_side

BASELINE = "baseline"
STAGE1 = "align"  # the baseline's start of Stage 2
MEASURES = {
    "exact_acc": "exact",
    "location_acc": "side and zone",
    "type_acc": "finding",
    "size_within_4mm": "size ± 4 mm",
}


@dataclass(frozen=True)
class Variant:
    """``keys``: of the configuration, changed against the baseline. ``start``: of Stage 2; ``scratch`` gives Stage 2
    the steps that Stage 1 has otherwise. ``flags``: of Stage 2. ``random_encoder``: an nnU-Net before any training."""

    axis: str
    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    start: str = STAGE1
    flags: tuple[str, ...] = ()
    random_encoder: bool = False

    def differs_from(self, base: Config) -> bool:
        """Whether it is the baseline itself, or another set-up than the baseline's."""
        other = self.start != STAGE1 or self.flags or self.random_encoder
        return bool(self.axis == BASELINE or other or base.replace(**self.keys) != base)

    @property
    def folder(self) -> str:
        return f"{self.axis}_{self.name}".replace(" ", "_")


def variants(base: Config) -> list[Variant]:
    """The baseline and everything that is compared with it; what the baseline is already is left out.

    A region of interest has the baseline's ``roi_side``, or without one half of its token grid. Budgets of visual
    tokens are squares of 7, 14 and 28.

    Raises:
        InputError: the baseline's slices and squares need more than 49 visual tokens.
    """
    side = base.roi_side or max(base.encoder_target_spatial // 2, 1)
    # The budget of a baseline without squares has no room for them: one overview token a slice is added.
    lesion = [
        {
            "roi_side": side, "roi_policy": "lesion", "roi_scales": scales,
            "max_visual_tokens": max(base.max_visual_tokens, base.slices * (scales * side**2 + 1)),
        }
        for scales in (1, 2)
        if side * 3 ** (scales - 1) <= base.encoder_target_spatial
    ]  # fmt: skip
    found = [
        Variant(BASELINE, BASELINE),
        Variant("Stage-1 start", "scratch", start="scratch"),
        Variant("Stage-1 start", "proxy_l2", start="proxy_l2"),
        *(Variant("bridge", mixer, {"bridge_mixer": mixer}) for mixer in get_args(BridgeMixer)),
        Variant("bridge", "pooled before", {"bridge_pool": "before"}),
        Variant("bridge", "pooled after", {"bridge_pool": "after"}),
        Variant("CMI", "off", {"use_cmi": False}),
        *(Variant("CMI", kind, {"use_cmi": True, "cmi_kind": kind}) for kind in get_args(CMIKind)),
        Variant("RoI", "off", {"roi_side": None, "roi_policy": "centre"}),
        Variant("RoI", "centre", {"roi_side": side, "roi_policy": "centre"}),
        *(Variant("RoI", f"lesion x{keys['roi_scales']}", keys) for keys in lesion),
        *(_tokens(base, n * n) for n in (7, 14, 28)),
        *(Variant("augmentation", f"shift {n}", {"augment_shift": n}) for n in (0, 2, 6)),
        Variant("augmentation", "rotate 5", {"augment_rotate": 5.0}),
        Variant("augmentation", "noise 0.2", {"augment_noise": 0.2}),
        Variant("language model", "LoRA, rank 8", flags=("--lora_rank", "8")),
        Variant("encoder", "random, trained", {"train_encoder": True}, random_encoder=True),
        Variant("encoder", "nnU-Net, trained on", {"train_encoder": True}),
        Variant("encoder", "nnU-Net, frozen", {"train_encoder": False}),
    ]  # fmt: skip
    return [one for one in found if one.differs_from(base)]


def _tokens(base: Config, budget: int) -> Variant:
    """Another budget of visual tokens, with a grid that has as many features as it asks for."""
    local = base.roi_scales * base.roi_side**2 if base.roi_policy == "lesion" and base.roi_side else 0
    grid = max(base.encoder_target_spatial, grid_side(budget, base.slices, budget, local))
    return Variant("visual tokens", str(budget), {"max_visual_tokens": budget, "encoder_target_spatial": grid})


def score_cases(truth: Sequence[Sequence[Finding]], texts: Sequence[str]) -> dict[str, Score]:
    """Each measure with its 95 % interval over cases; a case that has no such measure does not count."""
    each = [score_reports([findings], [text]) for findings, text in zip(truth, texts, strict=True)]
    return {name: mean_score([one[name] for one in each if np.isfinite(one[name])]) for name in MEASURES}


@dataclass(frozen=True)
class Outcome:
    """One variant with one seed. ``loss``: of the validation table, in nats per token, after each epoch of Stage 2."""

    variant: Variant
    seed: int
    scores: Mapping[str, Score]
    loss: Sequence[float]
    seconds: float


def markdown(outcomes: Iterable[Outcome], commands: Sequence[str], about: str) -> str:
    """The table: a row for each variant and seed, and the command lines that made it."""
    head = ["", "variant", "seed", *MEASURES.values(), "validation loss by epoch", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for one in outcomes:
        cells = [f"{s.value:.3f} [{s.low:.3f}, {s.high:.3f}]" for s in (one.scores[name] for name in MEASURES)]
        losses = " ".join(f"{loss:.3f}" for loss in one.loss)
        row = [one.variant.axis, one.variant.name, str(one.seed), *cells, losses, f"{one.seconds:.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    shown = "\n".join(commands)
    return f"{about}\n\n" + "\n".join(lines) + f"\n\n```bash\n{shown}\n```\n"


def read_losses(log: Path) -> list[float]:
    """Validation loss after each epoch, out of a run's log of JSON lines."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [record["val_loss"] for record in records if record.get("val_loss") is not None]
