"""The ablations: variants are valid configurations, the table holds the card's scores, finished runs are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config.errors import InputError
from config.schema import build_config, write_config
from docs import run_ablations
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.unet import SegmentationUNet
from models.vim_bridge import grid_side

BASES = [
    {"encoder_target_spatial": 8, "max_visual_tokens": 16},
    {"encoder_target_spatial": 28, "use_cmi": True, "augment_shift": 2},
    {"slices": 4, "encoder_target_spatial": 16, "max_visual_tokens": 80, "roi_side": 2, "roi_policy": "lesion"},
]


@pytest.mark.parametrize("keys", BASES)
def test_every_variant_is_valid_has_room_for_its_tokens_and_differs_from_the_baseline(keys):
    base = build_config(keys, "test")
    baseline, *found = run_ablations.variants(base)
    assert baseline.axis == "baseline" and len({(v.axis, v.name) for v in found}) == len(found)
    for variant in found:
        config = base.replace(**variant.keys)
        assert config != base or variant.start != "align" or variant.flags or variant.random_encoder
        local = config.roi_side**2 if config.roi_policy == "lesion" else 0
        assert grid_side(config.max_visual_tokens, config.slices or 1, config.encoder_target_spatial, local) >= 1
    axes = {"Stage-1 start", "CMI", "RoI", "visual tokens", "augmentation", "language model", "encoder"}
    assert {v.axis for v in found} == axes


class Runs:
    """Stands for the three scripts: writes what they write, and records its calls."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch, self.calls, self.fail = root, monkeypatch, [], ""

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        self.calls.append(command[1:])
        if command[1] == self.fail:
            return subprocess.CompletedProcess(command, 3)
        if command[1] == "train_vlm.py":
            folder = Path(command[command.index("--config") + 1]).parent
            lines = [{"event": "step"}, {"event": "epoch", "val_loss": 2.0}, {"event": "epoch", "val_loss": 1.5}]
            (folder / "stage2_log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        if command[1] == "scripts/evaluate_reports.py":
            score = {"value": 0.5, "interval": [0.25, 0.75], "n": 2, "what": ""}
            own = dict.fromkeys(("exact_acc", "location_acc", "type_acc"), score) | {"size_within_4mm": {"value": None}}
            out = Path(command[command.index("--out") + 1])
            out.mkdir(exist_ok=True)
            (out / "report_card.json").write_text(json.dumps({"whole_reports": {"own": own}}), encoding="utf-8")
        return subprocess.CompletedProcess(command, 0)

    def start(self, *flags: str) -> None:
        command = ["--base", self.root / "base.yaml", "--data", self.root, "--out", self.root / "out", *flags]
        self.monkeypatch.setattr(sys, "argv", ["run_ablations.py", *map(str, command)])
        run_ablations.main()


@pytest.fixture
def runs(tmp_path, monkeypatch, assets) -> Runs:
    network = assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"
    write_config(build_config({"nnunet_encoder_checkpoint": str(network)}, "test"), tmp_path / "base.yaml")
    found = Runs(tmp_path, monkeypatch)
    monkeypatch.setattr(subprocess, "run", found)
    return found


def test_a_table_is_written_and_nothing_is_run_twice(runs):
    only = ["--only", "Stage-1 start", "rotate 5"]
    runs.start(*only)
    scripts = [call[0] for call in runs.calls]
    assert scripts.count("train.py") == 3 and scripts.count("train_vlm.py") == 4  # none of Stage 1 from scratch
    scratch = next(call for call in runs.calls if "--from_scratch" in call)
    assert scratch[scratch.index("--epochs") + 1] == "5", "the steps of both stages"
    table = (runs.root / "out" / "ablations.md").read_text(encoding="utf-8")
    assert "| augmentation | rotate 5 | 42 | 0.500 [0.250, 0.750] |" in table and "| none | 2.000 1.500 |" in table
    assert "Held-out synthetic cases: 2." in table and "--only" in table
    assert len(json.loads((runs.root / "out" / "ablations.json").read_text(encoding="utf-8"))) == 4
    runs.start(*only)
    assert len(runs.calls) == len(scripts)
    runs.start(*only, "--epochs", "6")
    assert len(runs.calls) == 2 * len(scripts), "another number of epochs is another run"


def test_a_failing_run_is_one_line_and_the_others_are_kept(runs):
    runs.fail = "scripts/evaluate_reports.py"
    words = "baseline baseline: scripts/evaluate_reports.py ended with status 3, see .*run.log"
    with pytest.raises(InputError, match=words):
        runs.start()
    with pytest.raises(InputError, match="--only nonsense: there is no such axis or variant"):
        runs.start("--only", "nonsense")


def test_the_random_encoder_is_the_same_network_untrained(runs, assets):
    runs.start("--only", "random, trained")
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    other = load_nnunet_checkpoint(runs.root / "out" / "random_encoder.pth")
    assert other.architecture == source.architecture and other.plans == source.plans
    SegmentationUNet.from_checkpoint(other)
    name = next(name for name in source.network_state if name.endswith("conv.weight"))
    assert not np.allclose(source.network_state[name], other.network_state[name])
    folder = next((runs.root / "out").glob("encoder_random*"))
    assert "random_encoder.pth" in (folder / "paths.yaml").read_text(encoding="utf-8")
