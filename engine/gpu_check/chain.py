"""Check 10 and the last one: the scripts of a user on the shipped models, and the tests that need a card."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine import chain
from engine.cli import EXIT_INTERRUPTED
from engine.gpu_check.context import Context, Line, OutOfTime

TAIL = 25  # lines of a failed script's output that are kept


def scripts(context: Context) -> Iterator[Line]:
    """train.py → train_vlm.py → evaluate_reports.py with maps → check_image_to_text.py in bfloat16.

    Both stages are interrupted and resumed, with no worker process and with two.
    """
    shutil.rmtree(context.out / "scripts", ignore_errors=True)  # of an earlier check
    out, train, few = context.out / "scripts", (48, 8, 3) if context.cuda else (8, 4, 2), 2
    setting = chain.Setting(*train, max_findings=1, stage0_steps=0, align_epochs=few, caption_epochs=few)
    yield finished(context, "phantoms", chain.phantoms(setting, out, 42).command, out)
    yamls = {workers: write_config(out, workers) for workers in (0, 2)}
    common = f"--batch_size 2 --epochs {few} --mixed_precision bf16 --save_every 1 --lr 1e-3".split()
    stage1 = ["train.py", *common, "--objective", "align"]
    yield from interrupted(context, "Stage 1", stage1, out, (yamls[0], yamls[2]))
    start = ["--vision_checkpoint", str(out / "vision_bridge_best_val.pt")]
    stage2 = ["train_vlm.py", *common, *start]
    yield from interrupted(context, "Stage 2", stage2, out, (yamls[2], yamls[0]))
    yield from use(context, out, yamls[0])


def use(context: Context, out: Path, yaml: Path) -> Iterator[Line]:
    """The report card of held-out cases with maps, and one scan to its report."""
    checkpoint = ["--checkpoint", str(out / "vision_bridge_vlm_final.pt")]
    table, card = ["--csv", str(out / "data" / "test.csv")], ["--out", str(out / "card")]
    options = ["--maps", "1", "--pointing_cases", "1", "--max_new_tokens", "60"]
    words = ["scripts/evaluate_reports.py", "--config", str(yaml), *checkpoint, *table, *card, *options]
    yield finished(context, "evaluate_reports.py with maps", words, out)
    written = sorted(path.name for path in (out / "card").rglob("*") if path.is_file())
    whole = "report_card.json" in written and any(name.endswith(".nii.gz") for name in written)
    yield context.verdict("its report card, and maps", whole, f"{len(written)} files")
    image = next((out / "data" / "images").glob("test_*.nii.gz"))
    device = ["--llm_device", "auto" if context.cuda else "cpu"]
    words = ["scripts/check_image_to_text.py", "--config", str(yaml), *checkpoint, "--image", str(image), *device]
    yield finished(context, "check_image_to_text.py", [*words, "--max_new_tokens", "60"], out, "生成文本")


def write_config(out: Path, workers: int) -> Path:
    """The quick start's configuration, the language model in bfloat16, and so many worker processes."""
    models = chain.Models(chain.SHIPPED_NNUNET, chain.SHIPPED_LANGUAGE_MODEL)
    keys = {"language_model_adapters": chain.SHIPPED_ADAPTERS, "mamba_dtype": "bfloat16", "num_workers": workers}
    written = chain.write_paths_yaml(out, models, keys=keys)
    return written.replace(written.with_stem(f"workers_{workers}"))


def finished(context: Context, name: str, command: Sequence[str], out: Path, wanted: str = "") -> Line:
    """Run a script to its end, which must print ``wanted``."""
    started = time.perf_counter()
    code, text = run(context, command, out)
    good = code == 0 and wanted in text
    measured = f"{time.perf_counter() - started:.1f} s" + ("" if good else f", status {code}")
    return context.verdict(name, good, measured, "" if good else last_lines(text))


def interrupted(
    context: Context, name: str, command: Sequence[str], out: Path, yamls: tuple[Path, Path]
) -> Iterator[Line]:
    """A training is interrupted with the first configuration, and resumed to its end with the second one."""
    first, second = (f"{name}, {yaml.stem.replace('_', ' ')}" for yaml in yamls)
    state = out / f"{name.lower().replace(' ', '')}_state.pt"
    code, text = run(context, [*command, "--config", str(yamls[0])], out, interrupt_at=state)
    good = code == EXIT_INTERRUPTED and "state saved at step" in text and state.is_file()
    found = re.findall(r"state saved at step \d+", text)
    yield context.verdict(
        f"{first}: interrupted", good, *(found or [f"status {code}"]), "" if good else last_lines(text)
    )
    yield finished(context, f"{second}: resumed", [*command, "--config", str(yamls[1])], out, "resuming at")


def run(context: Context, command: Sequence[str], out: Path, interrupt_at: Path | None = None) -> tuple[int, str]:
    """Status and output of a script. ``interrupt_at``: Ctrl-C, for its workers too, once it has written this file."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{len(list(out.glob('*.log'))):02d}_{Path(command[0]).stem}.log"
    environment = {**os.environ, "PYTHONUTF8": "1"}
    environment |= {} if context.cuda else {"CUDA_VISIBLE_DEVICES": ""}
    group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    before = interrupt_at.stat().st_mtime_ns if interrupt_at and interrupt_at.is_file() else 0
    with log.open("w+", encoding="utf-8", errors="replace") as stream:
        words = [sys.executable, "-X", "utf8", *command]
        child = subprocess.Popen(
            words, cwd=chain.REPOSITORY, stdout=stream, stderr=subprocess.STDOUT, env=environment, **group
        )
        try:
            while interrupt_at and child.poll() is None and context.left() > 0:
                if interrupt_at.is_file() and interrupt_at.stat().st_mtime_ns != before:
                    interrupt(child)
                    break
                time.sleep(0.02)
            code = child.wait(timeout=min(max(0.0, context.left()), threading.TIMEOUT_MAX))  # Windows takes no more
        except subprocess.TimeoutExpired as error:
            raise OutOfTime(f"out of time, {command[0]} stopped in the middle") from error
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")


def interrupt(child: subprocess.Popen) -> None:
    """As a console does it: all of the group get the signal. A new group of Windows takes Ctrl-Break alone."""
    if os.name == "nt":
        child.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        os.killpg(child.pid, signal.SIGINT)


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL:])


def marked_tests(context: Context) -> Iterator[Line]:
    """The repository's tests that need a card."""
    if not context.cuda:
        yield context.skipped("tests marked gpu", "they need a CUDA device")
        return
    tests = sorted((chain.REPOSITORY / "tests").rglob("test_*.py"))
    files = [str(path) for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--durations=0", *files]
    started = time.perf_counter()
    code, text = run(context, command, context.out / "tests")
    summary = next((line for line in reversed(text.splitlines()) if re.search(r"passed|failed|error", line)), "")
    measured = f"{summary or f'status {code}'} ({time.perf_counter() - started:.0f} s)"
    yield context.verdict("tests marked gpu", code == 0, measured, "" if code == 0 else last_lines(text))
