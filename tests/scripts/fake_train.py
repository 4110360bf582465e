"""Stands for train.py in the tests of the overnight search: same flags, same files, same manners, no training.

FAKE_PLAN names a folder with one JSON per run, ``<run>.json`` or ``default.json``:
``steps`` of 20 ms each, ``best`` and ``final`` (the checkpoints to leave, or null), ``status``, ``says``.
Each start adds a line to ``<run>.calls`` there: the step it begins at.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("config", "objective", "epochs", "seed", "lr", "batch_size", "output_dir", "resume"):
        parser.add_argument(f"--{flag}", required=True)
    args = parser.parse_args()
    folder, plans = Path(args.output_dir), Path(os.environ["FAKE_PLAN"])
    assert Path(args.config).is_file() and args.resume == "auto"
    own = plans / f"{folder.name}.json"
    plan = json.loads((own if own.is_file() else plans / "default.json").read_text(encoding="utf-8"))

    state = folder / "stage1_state.pt"
    step = int(state.read_text()) if state.is_file() else 0
    with (plans / f"{folder.name}.calls").open("a", encoding="utf-8") as calls:
        calls.write(f"{step}\n")
    print(f"lr {args.lr} batch_size {args.batch_size} 报告", flush=True)
    try:
        while step < plan["steps"]:
            time.sleep(0.02)
            step += 1
            write(state, step)
    except KeyboardInterrupt:
        time.sleep(1)  # saving takes a while
        write(state, step)
        print(f"interrupted: state saved at step {step}", file=sys.stderr)
        return 130
    if plan["status"]:
        print(plan["says"], file=sys.stderr)
        return plan["status"]
    if plan["best"]:
        shutil.copyfile(plans / plan["best"], folder / "vision_bridge_best_val.pt")
    if plan["final"]:
        shutil.copyfile(plans / plan["final"], folder / "vision_bridge_final.pt")
    state.unlink(missing_ok=True)
    return 0


def write(state: Path, step: int) -> None:
    part = state.with_name("state.part")
    part.write_text(str(step))
    part.replace(state)


if __name__ == "__main__":
    sys.exit(main())
