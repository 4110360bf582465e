"""The ablations: variants that are valid, scores that are those of the scorer, a run that goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from config.errors import InputError
from config.schema import build_config, write_config
from data.phantom.finding import Finding
from data.phantom.report import score_reports, write_report
from engine.evaluation.ablation import MEASURES, score_cases, variants
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.unet import SegmentationUNet
from models.vim_bridge import grid_side

REPOSITORY = Path(__file__).resolve().parents[3]
FINDINGS = [Finding("nodule", "left", "upper", 12), Finding("cavity", "right", "lower", 30)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_ablations", REPOSITORY / "scripts" / "run_ablations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BASES = [
    {"encoder_target_spatial": 8, "max_visual_tokens": 16},
    {"encoder_target_spatial": 28, "use_cmi": True, "bridge_mixer": "linear", "augment_shift": 2},
    {"slices": 4, "encoder_target_spatial": 16, "max_visual_tokens": 80, "roi_side": 2, "roi_policy": "lesion"},
]


@pytest.mark.parametrize("keys", BASES)
def test_every_variant_is_a_valid_configuration_with_room_for_its_tokens(keys):
    base = build_config(keys, "test")
    found = variants(base)
    assert found[0].axis == "baseline" and len({variant.folder for variant in found}) == len(found)
    for variant in found:
        config = base.replace(**variant.keys)
        local = config.roi_scales * config.roi_side**2 if config.roi_policy == "lesion" else 0
        assert grid_side(config.max_visual_tokens, config.slices, config.encoder_target_spatial, local) >= 1


@pytest.mark.parametrize("keys", BASES)
def test_no_variant_repeats_the_baseline_and_every_axis_has_one(keys):
    base = build_config(keys, "test")
    found = variants(base)[1:]
    changed = [v for v in found if base.replace(**v.keys) != base]
    assert all(v in changed or v.start != "align" or v.flags or v.random_encoder for v in found)
    axes = {"Stage-1 start", "bridge", "CMI", "RoI", "visual tokens", "augmentation", "language model", "encoder"}
    assert {v.axis for v in found} == axes


def test_scores_are_those_of_the_whole_with_an_interval():
    rng = np.random.default_rng(0)
    truth = [[FINDINGS[k % 2]] if k % 5 else [] for k in range(20)]
    texts = [write_report(truth[k] if k % 3 else [FINDINGS[0]], rng) for k in range(20)]
    scores, whole = score_cases(truth, texts), score_reports(truth, texts)
    for name in MEASURES:
        assert scores[name].value == pytest.approx(whole[name])
        assert scores[name].low <= scores[name].value <= scores[name].high
    assert scores["location_acc"].n == sum(map(bool, truth)) and scores["exact_acc"].n == 20


class Runs:
    """Stands for the three scripts: writes what they write, and remembers how it was called."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.fail = root, [], ""

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        self.calls.append(command[1:])
        if command[1] == self.fail:
            return subprocess.CompletedProcess(command, 3)
        if command[1] == "train_vlm.py":
            folder = Path(command[command.index("--config") + 1]).parent
            lines = [{"event": "step"}, {"event": "epoch", "val_loss": 2.0}, {"event": "epoch", "val_loss": 1.5}]
            (folder / "stage2_log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        if command[1] == "scripts/score_phantoms.py":
            report = write_report(FINDINGS[:1], np.random.default_rng(0))
            cases = [{"image": f"d:/x/test_000{k}.nii.gz", "generated": report} for k in range(2)]
            Path(command[command.index("--out") + 1]).write_text(json.dumps({"cases": cases}), encoding="utf-8")
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def runs(tmp_path, script, monkeypatch, assets) -> Runs:
    network = assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"
    write_config(build_config({"nnunet_encoder_checkpoint": str(network)}, "test"), tmp_path / "base.yaml")
    cases = [{"id": f"test_000{k}", "findings": [FINDINGS[k].as_dict()]} for k in range(2)]
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    found = Runs(tmp_path)
    monkeypatch.setattr(script.subprocess, "run", found)
    return found


def start(script: ModuleType, runs: Runs, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    root = runs.root
    command = ["--base", str(root / "base.yaml"), "--data", str(root), "--out", str(root / "out"), *flags]
    monkeypatch.setattr(sys, "argv", ["run_ablations.py", *command])
    script.main()


def test_a_table_is_written_and_nothing_is_run_twice(script, runs, monkeypatch):
    only = ["--only", "Stage-1 start", "linear"]
    start(script, runs, monkeypatch, *only)
    scripts = [call[0] for call in runs.calls]
    assert scripts.count("train.py") == 3 and scripts.count("train_vlm.py") == 4  # none of Stage 1 from scratch
    scratch = next(call for call in runs.calls if "--from_scratch" in call)
    assert scratch[scratch.index("--epochs") + 1] == "5", "the steps of both stages"
    table = (runs.root / "out" / "ablations.md").read_text(encoding="utf-8")
    assert "| bridge | linear | 42 | 0.500 [" in table and "| 2.000 1.500 |" in table and "--only" in table
    assert len(json.loads((runs.root / "out" / "ablations.json").read_text(encoding="utf-8"))) == 4
    start(script, runs, monkeypatch, *only)
    assert len(runs.calls) == len(scripts)
    start(script, runs, monkeypatch, *only, "--epochs", "6")
    assert len(runs.calls) == 2 * len(scripts), "another number of epochs is another run"


def test_a_failing_run_is_one_line_and_the_others_are_kept(script, runs, monkeypatch):
    runs.fail = "scripts/score_phantoms.py"
    with pytest.raises(
        InputError, match="baseline baseline: scripts/score_phantoms.py ended with status 3, see .*run.log"
    ):
        start(script, runs, monkeypatch)
    with pytest.raises(InputError, match="--only nonsense: there is no such axis or variant"):
        start(script, runs, monkeypatch, "--only", "nonsense")


def test_the_random_encoder_is_the_same_network_untrained(script, runs, monkeypatch, assets):
    start(script, runs, monkeypatch, "--only", "random, trained")
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    other = load_nnunet_checkpoint(runs.root / "out" / "random_encoder.pth")
    assert other.architecture == source.architecture and other.plans == source.plans
    SegmentationUNet.from_checkpoint(other)
    name = next(name for name in source.network_state if name.endswith("conv.weight"))
    assert not np.allclose(source.network_state[name], other.network_state[name])
    folder = next((runs.root / "out").glob("encoder_random*"))
    assert "random_encoder.pth" in (folder / "paths.yaml").read_text(encoding="utf-8")
