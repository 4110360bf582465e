"""The real scripts one after the other on synthetic data: what the quick start and the user's settings share.

Only the standard library is imported: the quick start runs before anything is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config.files import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED_NNUNET = REPOSITORY / "assets" / "nnunet" / "fold_0" / "checkpoint_best.pth"
SHIPPED_LANGUAGE_MODEL = REPOSITORY / "assets" / "mamba_general"
SHIPPED_ADAPTERS = REPOSITORY / "assets" / "language_model_adapters.safetensors"  # of the quick start's reports
SHIPPED_DEMO = REPOSITORY / "assets" / "demo"  # a checkpoint, its paths.yaml and a synthetic scan
CONFIG_KEYS = {
    "encoder_target_spatial": 8,
    "train_encoder": "false",
    "augment_shift": 2,
    "bridge_depth": 1,
    "bridge_width": 192,
    "max_visual_tokens": 16,
}
CHECKPOINT = "vision_bridge_vlm_best_val.pt"


class Step(NamedTuple):
    """One script of the chain. ``steps``: of its optimizer, where their number is known beforehand."""

    name: str
    title: str
    command: list[str]
    steps: int = 0


class Setting(NamedTuple):
    """Sizes of a synthetic data set, and how it is trained on; ``stage0_steps``: at most; ``batches``, ``rates``: batch
    size and learning rate of Stage 1 and of Stage 2."""

    train: int
    val: int
    test: int
    max_findings: int
    stage0_steps: int
    align_epochs: int
    caption_epochs: int
    max_new_tokens: int = 160
    batches: tuple[int, int] = (16, 16)
    rates: tuple[str, str] = ("4e-3", "1.5e-3")

    def steps(self, epochs: int, batch: int) -> int:
        return epochs * -(-self.train // batch)


class Models(NamedTuple):
    """What a user brings. A model that is not there yet is made by the first steps of the chain."""

    nnunet: Path
    language_model: Path


def write_paths_yaml(out: Path, models: Models, stage0: bool = True, keys: Mapping[str, Any] | None = None) -> Path:
    """Write OUT/paths.yaml, which any script takes with ``--config``. ``keys`` are added to it, or replace its own."""
    found = {
        "caption_csv_train": out / "data" / "train.csv",
        "caption_csv_val": out / "data" / "val.csv",
        "caption_prompt_json": out / "data" / "prompts.json",
        "cache_dir": out / "cache",
        "output_dir": out,
        "nnunet_encoder_checkpoint": models.nnunet,
        "mamba_model": models.language_model,
        **({"language_model_adapters": adapters(out)} if stage0 else {}),
        **CONFIG_KEYS,
        **(keys or {}),
    }
    # In quotes, as YAML reads JSON: a path may hold " #".
    quoted = {k: json.dumps(v.as_posix(), ensure_ascii=False) if isinstance(v, Path) else v for k, v in found.items()}
    lines = [f"{key}: {value}" for key, value in quoted.items()]
    head = "# Written by a script; every key is explained in config/paths.yaml."
    write_text(out / "paths.yaml", "\n".join([head, *lines, ""]))
    return out / "paths.yaml"


def adapters(out: Path) -> Path:
    """What Stage 0 writes."""
    return out / "language_model_adapters.safetensors"


# ------------------------------------------------------------------ steps


def step(name: str, title: str, seed: int, *words: object, steps: int = 0) -> Step:
    return Step(name, title, [*map(str, words), "--seed", str(seed)], steps)


def phantoms(setting: Setting, out: Path, seed: int) -> Step:
    counts = ["--n_train", setting.train, "--n_val", setting.val, "--n_test", setting.test]
    several = ["--max_findings", setting.max_findings]
    command = ["scripts/make_phantoms.py", "--out", out / "data", *counts, *several]
    return step("phantoms", "synthetic chest CTs with reports", seed, *command)


def segmentation(out: Path, seed: int) -> Step:
    command = ["scripts/make_tiny_nnunet.py", "--data", out / "data", "--out", out / "nnunet", "--one_class"]
    return step("segmentation", "a small nnU-Net with one class, lesion", seed, *command)


def language_model(folder: Path, seed: int) -> Step:
    command = ["scripts/make_tiny_lm.py", "--text", "general", "--out", folder]
    return step("language_model", "a tiny Mamba that knows general text", seed, *command)


def stage0(setting: Setting, out: Path, seed: int) -> Step:
    command = ["scripts/adapt_language_model.py", "--config", out / "paths.yaml", "--steps", setting.stage0_steps]
    return step("stage0", "Stage 0: the language model learns to write reports", seed, *command)


def training(setting: Setting, out: Path, seed: int, lora_rank: int = 0) -> list[Step]:
    """Both stages."""
    config, (batch1, batch2), (rate1, rate2) = ["--config", out / "paths.yaml"], setting.batches, setting.rates
    align = ["--objective", "align", "--epochs", setting.align_epochs, "--batch_size", batch1, "--lr", rate1]
    caption = ["--vision_checkpoint", out / "vision_bridge_best_val.pt", "--epochs", setting.caption_epochs]
    caption += ["--batch_size", batch2, "--lr", rate2, *(["--lora_rank", lora_rank] if lora_rank else [])]
    first = step("stage1", "Stage 1: vision and bridge", seed, "train.py", *config, *align, "--resume", "auto",
                 steps=setting.steps(setting.align_epochs, batch1))  # fmt: skip
    second = step("stage2", "Stage 2: through the frozen language model", seed, "train_vlm.py", *config, *caption,
                  steps=setting.steps(setting.caption_epochs, batch2))  # fmt: skip
    return [first, second]


def scores(setting: Setting, out: Path, seed: int, table: str = "test_no_masks.csv", corrections: int = 0) -> Step:
    """The report card in OUT/card; so many cases are written again with a corrected findings prompt."""
    words = [*_evaluation(setting, out, table, "card"), "--pointing_cases", 0, "--corrections", corrections]
    return step("scores", "reports for held-out cases without masks, and their report card", seed, *words)


def pointing(setting: Setting, out: Path, seed: int, cases: int) -> Step:
    """The pointing game of so many held-out cases in OUT/pointing."""
    table = out / "data" / "test.csv"  # named for calibration, so that no other is generated
    words = [*_evaluation(setting, out, "test.csv", "pointing"), "--limit", cases, "--calibration_csv", table]
    return step("pointing", "the pointing game on held-out cases with masks", seed, *words)


def _evaluation(setting: Setting, out: Path, table: str, folder: str) -> list[object]:
    command = ["scripts/evaluate_reports.py", "--checkpoint", out / CHECKPOINT, "--csv", out / "data" / table]
    command += ["--out", out / folder, "--maps", 0, "--same_finding", "miliary=tree_in_bud"]
    return [*command, "--max_new_tokens", setting.max_new_tokens]


# ------------------------------------------------------------------ running them


def run_steps(steps: list[Step], out: Path, repeat: bool = False) -> dict[str, float]:
    """Run each step that has not finished with this very command, and all after it. Returns the seconds of each."""
    seconds: dict[str, float] = {}
    for number, one in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] ", end="")
        seconds[one.name], repeat = run_step(one, out, repeat)
    return seconds


def run_step(one: Step, out: Path, repeat: bool = False) -> tuple[float, bool]:
    """Run one script unless it has finished with this very command and configuration. A failing one ends the chain.
    Returns the seconds that it took, and whether it ran now."""
    done = out / "done" / f"{one.name}.json"
    record = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    wanted = {"command": one.command}
    if "--config" in one.command:
        wanted["config"] = Path(one.command[one.command.index("--config") + 1]).read_text(encoding="utf-8")
    if not repeat and record.items() >= wanted.items():
        print(f"{one.title}: done before ({record['seconds']:.0f} s)", flush=True)
        return record["seconds"], False
    print(one.title, flush=True)
    done.unlink(missing_ok=True)
    start = time.perf_counter()
    if code := call_patiently([sys.executable, *one.command], cwd=REPOSITORY):
        print(
            f"error: step '{one.name}' failed with status {code}; the same command goes on from here", file=sys.stderr
        )
        sys.exit(code)
    seconds = time.perf_counter() - start
    write_text(done, json.dumps({**wanted, "seconds": seconds}))
    return seconds, True


def call_patiently(command: list[str], **options: object) -> int:
    """Run a program that saves its state on Ctrl-C, wait for it, and return its status.

    ``subprocess.run`` kills its child a quarter of a second after Ctrl-C. The console sends Ctrl-C to the child as
    well, so waiting is enough.
    """
    child = subprocess.Popen(command, **options)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


# ------------------------------------------------------------------ what they reach


def read_card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report_card.json").read_text(encoding="utf-8"))


def main_scores(card: Mapping[str, Any]) -> dict[str, Any]:
    """The report card's main lines, and those of each baseline. None where a card has no such value."""
    own = {name: score["value"] for name, score in card["whole_reports"]["own"].items()}
    return {
        "location_acc": card["location_acc"],
        "finding_acc": own["type_acc"],
        "finding_macro_f1": card["findings"]["macro_f1"],
        "size_within_3mm": card["size_within_3mm"],
        **{name: own[name] for name in ("exact_acc", "garbled_rate", "missed_lesion_rate")},
        "normal_false_finding_rate": card["audit"]["normal_false_finding_rate"],
        "ece": card["confidence"]["ece"],
        "shuffled": {"exact_acc": card["whole_reports"]["shuffled"]["exact_acc"]["value"]},
        "blank": {"finding_macro_f1": card["audit"]["blank"]["macro_f1"]},
        "baselines": {name: _baseline(scores) for name, scores in (card["baselines"] or {}).items()},
        "corrections": card.get("corrections"),
        "verdict": card["audit"]["verdict"],
        "cases": card["cases"],
    }


def _baseline(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of a baseline under the names of the reports' own; the difference is reports minus baseline."""
    whole, gain = scores["whole_reports"], scores["difference"]["whole_reports"]["exact_acc"]
    return {
        "location_acc": scores["location_acc"]["value"],
        "finding_acc": whole["type_acc"]["value"],
        "finding_macro_f1": scores["macro_f1"]["value"],
        "size_within_3mm": scores["size_within_3mm"]["value"],
        **{name: whole[name]["value"] for name in ("exact_acc", "garbled_rate", "missed_lesion_rate")},
        "exact_acc_difference": {"value": gain["value"], "interval": gain["interval"]},
    }


def compared(scores: Mapping[str, Any]) -> str:
    """The main lines of :func:`main_scores` as a table, each baseline in a column of its own."""
    columns = {"reports": scores, **scores["baselines"]}
    names = ("location_acc", "finding_acc", "finding_macro_f1", "size_within_3mm", "exact_acc", "garbled_rate")
    lines = [f"{'':18}" + "".join(f"{name:>10}" for name in columns)]
    for name in (*names, "missed_lesion_rate"):
        values = (column[name] for column in columns.values())
        cells = "".join(f"{'none' if value is None else format(value, '.3f'):>10}" for value in values)
        lines.append(f"{name:>18}{cells}")
    return "\n".join(lines)
