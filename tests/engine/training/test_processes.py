"""Two processes are one of the same effective batch: weights, validation, and after a kill."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.engine.training.runs import Runs, differing, history

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="runs are forked")

ONE, TWO = ("--batch_size", "4"), ("--batch_size", "2")  # 13 cases: the last batch is one case, for one process
NO_GRADIENT = re.compile(r"convs\.\d+\.conv\.bias$")
STAGES = {
    "train": ("stage1", "vision_bridge_final.pt", ("--lr", "1e-4", "--epochs", "5")),
    "train_vlm": ("stage2", "vision_bridge_vlm_final.pt", ("--lr", "1e-4", "--epochs", "5", "--from_scratch")),
}


@pytest.mark.parametrize("script", ["train", pytest.param("train_vlm", marks=pytest.mark.minutes)])
def test_two_processes_equal_one(runs: Runs, tmp_path: Path, script: str) -> None:
    stage, final, flags = STAGES[script]
    exact = "--config", str(runs.exact)
    runs.run(script, tmp_path / "one", *ONE, *flags, *exact)
    runs.run_two(script, tmp_path / "two", *TWO, *flags, *exact)
    # A bias that instance norm takes away again has no gradient but rounding errors, which Adam makes as large as any.
    different = differing(tmp_path / "one" / final, tmp_path / "two" / final)
    different = {name: value for name, value in different.items() if not NO_GRADIENT.search(name)}
    print(f"{script}: largest difference of a weight {max(different.values(), default=0):.2g}")
    assert max(different.values(), default=0) < 1e-5, different
    one, two = (history(tmp_path / name, stage) for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] and one[-1]["step"] == 20
    for a, b in zip(one, two, strict=True):
        for name in a.keys() & {"val_loss", "train_loss", "caption_loss", "token_std", "image_std"}:
            assert a[name] is None or a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (name, a, b)
