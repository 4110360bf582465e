"""Stands for train.py and train_vlm.py in the tests of the overnight search: same flags, same files, no training.

The folder ``plans`` beside the output folder has one JSON per run, ``<run>.json``: ``steps`` of 20 ms each, ``best``
and ``final`` (the checkpoints to leave, or null), ``status``, ``message``, and perhaps ``curve``: the validation
loss that each step logs, as an epoch. Each start adds a line to ``<run>.calls``: the step that it begins at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("config", "epochs", "seed", "lr", "batch_size", "output_dir", "resume"):
        parser.add_argument(f"--{flag}", required=True)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--objective")
    start.add_argument("--vision_checkpoint", type=Path)
    parser.add_argument("--mamba_model")
    parser.add_argument("--lora_rank", type=int)
    parser.add_argument("--allow_toy_model", action="store_true")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    plans = folder.parents[3] / "plans"
    assert Path(args.config).is_file() and args.resume == "auto"
    plan = json.loads((plans / f"{folder.name}.json").read_text(encoding="utf-8"))

    stage, kind = ("stage2", "vlm_") if args.vision_checkpoint else ("stage1", "")
    assert not args.vision_checkpoint or args.vision_checkpoint.is_file()
    state = folder / f"{stage}_state.pt"
    step = int(state.read_text()) if state.is_file() else 0
    with (plans / f"{folder.name}.calls").open("a", encoding="utf-8") as calls:
        calls.write(f"{step}\n")
    print(f"lr {args.lr} batch_size {args.batch_size} 报告", flush=True)
    try:
        while step < plan["steps"]:
            time.sleep(0.02)
            step += 1
            if step <= len(plan.get("curve", [])):
                record = {"event": "epoch", "epoch": step, "step": step, "val_loss": plan["curve"][step - 1]}
                with (folder / f"{stage}_log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({**record, "train_loss": 1.0, "collapsed": False}) + "\n")
            write(state, step)
    except KeyboardInterrupt:
        time.sleep(0.6)  # saving takes a while
        write(state, step)
        print(f"interrupted: state saved at step {step}", file=sys.stderr)
        return 130
    if plan["status"]:
        print(plan["message"], file=sys.stderr)
        return plan["status"]
    for name, checkpoint in (("best_val", plan["best"]), ("final", plan["final"])):
        if checkpoint:
            shutil.copyfile(plans / checkpoint, folder / f"vision_bridge_{kind}{name}.pt")
    state.unlink(missing_ok=True)
    return 0


def write(state: Path, step: int) -> None:
    part = state.with_name("state.part")
    part.write_text(str(step))
    part.replace(state)


if __name__ == "__main__":
    sys.exit(main())
