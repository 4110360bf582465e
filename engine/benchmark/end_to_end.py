"""What a user feels: scripts/check_image_to_text.py from its start to its end, with a random language model on disk.

The demonstration's scan and nnU-Net, an untrained bridge of the language model's width, 64 visual tokens, a findings
prompt of one lesion (an untrained head believes in seven), 80 new ones.
Cold: the system has dropped what it held of the models' files (POSIX alone); warm: it holds them from the run before.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from config.schema import REPOSITORY
from engine.benchmark import models
from engine.benchmark.measure import Report, Size
from engine.chain import SHIPPED_DEMO
from engine.checkpoint import load_checkpoint, save_checkpoint
from models.language_model.identity import lm_identity
from models.medical_vlm import VisionBridge

SCRIPT = REPOSITORY / "scripts" / "check_image_to_text.py"
QUESTION = "请根据这份胸部CT写一份报告，包括所见、结论、建议和病理倾向。"
FINDINGS = "右肺上野结节12mm"
VISUAL, NEW = 64, 80  # tokens
WARM = 2  # runs
# What the script prints: the whole and its parts, and the seconds of the text that end with its first token.
WHOLE = re.compile(r"^time: [\d.]+ s = (.*)$", re.MULTILINE)
FIRST = re.compile(r"^time to first token: ([\d.]+) s", re.MULTILINE)


def end_to_end(report: Report) -> None:
    """Seconds of each part: weights of the size's own dtype, int8 ones made anew, and kept int8 ones."""
    kind = str(report.size.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    flags = {kind: [], "int8": ["--llm_int8"], "kept int8": ["--save_int8", "int8"]}
    # Where a run was in this process, its int8 weights may still be mapped, and Windows removes no such file.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        write_inputs(report.size, root)
        run(report.size, root, flags["kept int8"])  # writes them
        for name in flags:
            weights = [*root.glob("int8/*" if name == "kept int8" else "lm/*")]
            cold = drop_from_memory(weights)
            parts = run(report.size, root, flags[name])
            if cold:
                add_parts(report, f"{name}, cold", [parts])
            else:
                report.missing.append(f"{name}, cold: this system does not drop files from its memory when asked")
            runs = 1 if report.size.name == "tiny" else WARM
            add_parts(report, f"{name}, warm", [run(report.size, root, flags[name]) for _ in range(runs)])
    bars = report.panels["from start to end, seconds"]
    for name, target in ((kind, "≤ 30"), ("kept int8", "≤ 24")):
        first = report.panels[f"{name}, warm, seconds"]["first token"]
        report.add_ratio(f"seconds_{name.replace(' ', '_')}", bars[f"{name}, warm"], 1, target)
        report.add_ratio(f"first_token_seconds_{name.replace(' ', '_')}", first, 1, "≤ 3")
    report.add_ratio("kept_int8_speedup", bars["int8, warm"], bars["kept int8, warm"])


def write_inputs(size: Size, root: Path) -> None:
    """``lm``: a random language model and a tokenizer with as many tokens; ``untrained.pt``: a checkpoint for it."""
    lm = models.random_mamba(size, torch.device("cpu"), size.layers)
    lm.save_pretrained(root / "lm")
    words = [
        "<|endoftext|>",
        "<unknown>",
        *dict.fromkeys(QUESTION),
        *(f"w{number}" for number in range(size.vocabulary)),
    ]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words[: size.vocabulary - 3])}, words[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"eos_token": words[0], "pad_token": words[0], "unk_token": words[1]}  # a random model repeats words
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / "lm")
    trained = load_checkpoint(SHIPPED_DEMO / "vision_bridge_vlm.pt")
    places = {"mamba_model": str(root / "lm"), "cache_dir": str(root / "cache"), "output_dir": str(root)}
    places |= dict.fromkeys(("caption_csv_train", "caption_csv_val", "language_model_adapters"))
    network = REPOSITORY / "assets" / "nnunet" / "fold_0" / "checkpoint_best.pth"
    config = trained.config.replace(**places, nnunet_encoder_checkpoint=str(network), max_visual_tokens=VISUAL)
    encoder, std = trained.build_vision().encoder, trained.diagnostics["expected_std"]
    vision = VisionBridge.build(config, encoder, size.width, std, with_cmi=False, findings=trained.findings or ())
    save_checkpoint(
        root / "untrained.pt", vision, stage="vlm", step=0, epoch=0, val_loss=1.0, config=config,
        plan=trained.preprocess_plan, llm=lm_identity(places["mamba_model"]).to_dict(),
        diagnostics=trained.diagnostics, scan_checks=trained.scan_checks,
    )  # fmt: skip


def run(size: Size, root: Path, flags: list[str]) -> dict[str, float]:
    """Seconds of each part of one call of the script; a process of its own, but at the size tiny."""
    command = [str(SCRIPT), "--checkpoint", str(root / "untrained.pt"), "--allow_toy_model"]
    command += ["--question", QUESTION, "--findings", FINDINGS]
    command += ["--image", str(SHIPPED_DEMO / "data" / "images" / "val_0000.nii.gz"), "--max_new_tokens", str(NEW)]
    command += [str(root / flag) if flag == "int8" else flag for flag in flags]
    started, here = time.perf_counter(), size.name == "tiny"
    printed = printed_here(command) if here else printed_apart(command)
    seconds = time.perf_counter() - started
    [parts], [first] = WHOLE.findall(printed), FIRST.findall(printed)
    found = {name: float(value) for name, value in (part.rsplit(" ", 1) for part in parts.split(" + "))}
    text = found.pop("text")
    found |= {"first token": float(first), "rest of the text": text - float(first)}
    return found if here else found | {"exit": seconds - sum(found.values())}


def printed_apart(command: list[str]) -> str:
    return subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout


def printed_here(command: list[str]) -> str:
    before, sys.argv = sys.argv, command
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(command[0])["main"]()
    finally:
        sys.argv = before
    return printed.getvalue()


def drop_from_memory(files: list[Path]) -> bool:
    """Make the system forget what it holds of files, so that they are read from the disk; whether it can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())  # what is not written yet is not dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def add_parts(report: Report, name: str, runs: list[dict[str, float]]) -> None:
    """Record the parts and the whole of ``runs``; their medians go into the figure."""
    medians = {part: report.add_seconds(f"{name}: {part}", [found[part] for found in runs]) for part in runs[0]}
    whole = report.add_seconds(f"{name}: from start to end", [sum(found.values()) for found in runs])
    report.panels.setdefault("from start to end, seconds", {})[name] = whole
    report.panels[f"{name}, seconds"] = medians
