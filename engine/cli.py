"""What every entry point shares: its common flags, its exit codes, and a console that takes any text."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from config.errors import InputError, first_line, is_out_of_memory
from config.schema import Config, SlicePolicy, keys_with_role, load_config
from config.toy_models import check_toy_models

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive")
# Of a disk or its permissions, not of the program.
ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Where --checkpoint is left out, the first of these that exists.
CHECKPOINTS = (
    "vision_bridge_vlm_final.pt",
    "vision_bridge_vlm_best_val.pt",
    "vision_bridge_vlm_overnight_best.pt",
    "vision_bridge_overnight_best.pt",
    "vision_bridge_best_val.pt",
    "vision_bridge_final.pt",
)


class Interrupted(Exception):
    """SIGINT or SIGTERM, after the state was saved. The message says how to go on."""


def force_utf8() -> None:
    """Write UTF-8, so that no report raises an encoding error on a GBK console or in a redirected file."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def use_ascii_cache() -> None:
    """On Windows, keep compiled Triton kernels, and the files that its compilers read, outside a home folder with other
    letters than ASCII.

    The C compiler and ptxas open their files by names in the system's code page, which may lack those letters.
    """
    home = str(Path.home())
    if os.name == "nt" and not home.isascii():
        owner = hashlib.sha256(home.encode()).hexdigest()[:8]  # the next folder is shared by all users
        folder = Path(os.environ.get("PROGRAMDATA", "C:/ProgramData"), "mamba-ct-report", f"triton-{owner}")
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
        if not tempfile.gettempdir().isascii():
            (folder / "temporary").mkdir(parents=True, exist_ok=True)
            os.environ["TEMP"] = os.environ["TMP"] = tempfile.tempdir = str(folder / "temporary")


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point. Bad input, a full disk and the like give one line and status 2; any other error keeps its
    traceback."""
    force_utf8()
    use_ascii_cache()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("models.selective_scan").setLevel(logging.INFO)  # the backend is logged once
    atexit.register(gc.freeze)  # else the interpreter looks through all objects as it ends, for one to two seconds
    try:
        code = main() or 0
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
    except OSError as problem:
        if problem.errno not in (*ENVIRONMENT, errno.EEXIST, errno.ENOTDIR):
            raise
        where = f"{problem.filename}: " if problem.filename else ""
        remedy = (
            "files written before are whole: put that right (free space, permissions, a program that shows the file) "
            "and run the same command, it goes on from them"
        )
        if problem.errno not in ENVIRONMENT:
            remedy = "it is a file, or lies below one: name a folder"
        print(f"error: {where}{problem.strerror}; {remedy}", file=sys.stderr, flush=True)
        code = EXIT_BAD_INPUT
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        print(f"error: out of memory: end other programs, or ask for less (fewer tokens, --llm_int8, --llm_device cpu "
              f"where the script has them); {first_line(problem)}", file=sys.stderr, flush=True)  # fmt: skip
        code = EXIT_BAD_INPUT
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"interrupted: {stop}".rstrip(": "), file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    gc.collect()  # with the exception's frames: loaders end their workers now, at the interpreter's end they complain
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Names a flag's default in its help, unless it has none or the text names it; the help is printed as UTF-8."""

    def __init__(self, **options: Any) -> None:
        force_utf8()
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        text, default = options.get("help", ""), options.get("default")
        if default is not None and argparse.SUPPRESS not in (default, text) and "default" not in text:
            options["help"] = f"{text} (default: %(default)s)" if text else "default: %(default)s"
        return super().add_argument(*names, **options)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every script that loads the language model."""
    parser.add_argument("--mamba_model", metavar="NAME", help="hub name or folder; overrides the configuration")
    add_toy_flag(parser)


def add_toy_flag(parser: argparse.ArgumentParser) -> None:
    """For scripts that load the language model or segment scans."""
    toy = "use the quick start's models with data that is not synthetic"
    parser.add_argument("--allow_toy_model", action="store_true", help=toy)


def add_force_flag(parser: argparse.ArgumentParser) -> None:
    """For scripts that check scans."""
    parser.add_argument("--force", action="store_true", help="go on with images that cannot be a chest CT in HU")


def add_view_flag(parser: argparse.ArgumentParser) -> None:
    """For scripts that read scans with a trained checkpoint; :func:`local_config` applies it."""
    choices, words = get_args(SlicePolicy), "how slices are chosen; default: as the checkpoint was trained"
    parser.add_argument("--slice_policy", choices=choices, help=words)


def add_reading_flags(parser: argparse.ArgumentParser, *, llm_device: str) -> None:
    """Flags of every script that writes a report of a new scan."""
    add = parser.add_argument
    add("--checkpoint", type=Path, help="default: the latest stage's in output_dir")
    add("--config", type=Path, help="take tables, model folder and cache from here instead of the checkpoint")
    add("--llm_device", choices=("auto", "cpu"), default=llm_device, help="auto: the GPU where there is one")
    add_view_flag(parser)
    add_model_flags(parser)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every script that trains."""
    parser.add_argument("--config", type=Path, help="configuration file (default: config/paths.yaml)")
    parser.add_argument("--output_dir", type=Path, help="where this run writes (default: the configuration's)")
    parser.add_argument("--seed", type=int, default=42, help="of every random number")
    add_force_flag(parser)
    add_model_flags(parser)


def add_training_flags(parser: argparse.ArgumentParser, *, epochs: int, batch_size: int, lr: float) -> None:
    """Flags that both stages take, with the stage's own defaults."""
    add_common_flags(parser)
    parser.add_argument("--epochs", type=positive_int, default=epochs, help="passes over the training table")
    parser.add_argument("--batch_size", type=positive_int, default=batch_size, help="cases per process and step")
    parser.add_argument("--lr", type=positive_float, default=lr, help="peak learning rate")
    parser.add_argument("--grad_accumulation", type=positive_int, default=1, help="batches per optimizer step")
    parser.add_argument("--warmup_ratio", type=fraction, default=0.05, help="share of all steps; cosine decay follows")
    parser.add_argument("--weight_decay", type=fraction, default=0.05, help="of AdamW")
    parser.add_argument("--max_grad_norm", type=positive_float, default=1.0, help="gradients are clipped to it")
    precisions, bf16 = ("auto", "no", "bf16", "fp16"), "auto: bf16 on a GPU or CPU that computes in it"
    parser.add_argument("--mixed_precision", choices=precisions, default="auto", help=bf16)
    parser.add_argument("--resume", default="auto", metavar="auto|PATH|never", help="continue an interrupted run")
    parser.add_argument("--auto_batch", action="store_true", help="compute a batch in pieces where memory runs out")
    parser.add_argument("--save_every", type=positive_int, default=200, help="steps between saved training states")
    parser.add_argument("--tracker", choices=TRACKERS, help="log there too; tensorboard: --logdir OUTPUT/tracker")


def config_from(args: argparse.Namespace, **overrides: object) -> Config:
    """The configuration of a training run, with the flags that override it.

    Raises InputError: as :func:`load_config`, or a toy model with data that is not synthetic.
    """
    output_dir = str(args.output_dir.resolve()) if args.output_dir else None
    config = load_config(args.config, output_dir=output_dir, mamba_model=args.mamba_model, **overrides)
    check_toy_models(config, (config.caption_csv_train, config.caption_csv_val), args.allow_toy_model)
    return config


def leave_numba_out() -> None:
    """For the demonstration, before the heavy imports: importing numba fails, and PyTorch's operations take its place.

    Its model is so small that compiling numba's kernels takes longer than it saves: 20 of 28 s after a fresh
    installation.
    """

    def find_spec(name: str, *_: object) -> None:
        if name == "numba":
            raise ImportError("left out of the demonstration, which is too small to gain by compiling")

    sys.meta_path.insert(0, SimpleNamespace(find_spec=find_spec))


def local_config(args: argparse.Namespace, trained: Config) -> Config:
    """A checkpoint's configuration on this machine: paths and places of --config, --mamba_model, --slice_policy."""
    changes = {}
    if args.config:
        local = load_config(args.config)
        changes = {key: getattr(local, key) for key in keys_with_role("path") + keys_with_role("place")}
    if args.mamba_model:
        changes["mamba_model"] = args.mamba_model
    if args.slice_policy not in (None, trained.slice_policy):
        changes["slice_policy"] = args.slice_policy
        print(f"note: slice_policy {args.slice_policy}; the checkpoint was trained with {trained.slice_policy}")
    return trained.replace(**changes)


def find_checkpoint(config_file: Path | None) -> Path:
    """The checkpoint in the configuration's ``output_dir`` that comes first in :data:`CHECKPOINTS`; it is printed.

    Raises InputError: there is none.
    """
    folder = load_config(config_file).resolved("output_dir")
    found = next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"no checkpoint in {folder}: name one with --checkpoint FILE, or make one with  python train.py  and "
            f"python train_vlm.py --vision_checkpoint {folder / 'vision_bridge_best_val.pt'}"
        )
    print(f"checkpoint: {found}", flush=True)
    return found


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def numbers(text: str) -> list[int]:
    """``3,4`` → [3, 4]."""
    words = [word.strip() for word in text.split(",")]
    if not all(map(str.isdecimal, words)):
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, e.g. 3,4, got {text}")
    return sorted(set(map(int, words)))


def clock_time(text: str) -> float:
    """``07:30`` → the next time that a clock here shows it, in seconds since the epoch."""
    try:
        wanted = datetime.strptime(text, "%H:%M").time()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a time of day such as 07:30, got {text}") from error
    now = datetime.now()
    then = datetime.combine(now, wanted)
    return (then if then > now else then + timedelta(days=1)).timestamp()


def hours_from_now(text: str) -> float:
    """So many hours from now, in seconds since the epoch."""
    return time.time() + 3600 * positive_float(text)


def shard(text: str) -> tuple[int, int]:
    """``2/4`` → (2, 4)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, e.g. 2/4, got {text}")
    return int(index), int(count)


def shard_of_environment() -> tuple[int, int]:
    """The shard that torchrun or accelerate gives this process; without them the whole list."""
    return int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1))
