"""What this machine has, and for each problem the line to type; within five seconds.

    python scripts/doctor.py
    python scripts/doctor.py --config my_paths.yaml

Python, packages, selective scan and why, GPU, memory, disk, the Hugging Face hub, configuration, tables, checkpoints.
Nothing is changed, nothing is downloaded. Exit status 1 where there is a problem.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

import config  # refuses an old Python; the packages of requirements.txt may be missing here
from engine.environment import DRIVER, cuda_torch

REPOSITORY = Path(config.__file__).resolve().parents[1]
SECONDS = 4.5  # after which a check is no longer waited for
HUB_SECONDS = 2.0
LEAST_DISK_GB = 20
LEAST_MEMORY_GB = 8
INSTALL = "pip install -r requirements.txt"


class Line(NamedTuple):
    """``remedy``: the line to type; empty where nothing is wrong. ``known``: False where a check was too slow."""

    what: str
    text: str
    remedy: str = ""
    known: bool = True

    def show(self) -> str:
        mark = "!!" if self.remedy else "ok" if self.known else "??"
        return f"{mark}  {self.what:<14} {self.text}" + (f"\n       type: {self.remedy}" if self.remedy else "")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What this machine has, and what is missing")
    parser.add_argument("--config", type=Path, help="configuration file (default: config/paths.yaml)")
    return parser.parse_args()


# ------------------------------------------------------------------ the machine


def python_line() -> Iterator[Line]:
    yield Line("Python", f"{platform.python_version()}, {sys.executable}, {platform.platform()}")


def package_lines() -> Iterator[Line]:
    """The packages of requirements.txt beside what is installed."""
    missing, other = [], []
    for line in (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines():
        match = re.match(r"([\w-]+)==([\w.]+)", line)
        elsewhere = any(
            name in line and f'"{here}"' not in line
            for name, here in (("platform_system", platform.system()), ("platform_machine", platform.machine()))
        )
        if match is None or elsewhere:
            continue
        name, wanted = match.groups()
        try:
            found = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
        else:
            other += [f"{name} {found}, tested with {wanted}"] * (found != wanted)
    if missing:
        yield Line("packages", f"missing: {', '.join(missing)}", INSTALL)
    if other:
        yield Line("packages", "; ".join(other), INSTALL)
    if not (missing or other):
        yield Line("packages", "all as in requirements.txt")


def gpu_lines() -> Iterator[Line]:
    """torch's view of the GPU; a driver that torch cannot use is a problem."""
    try:
        import torch
    except ImportError as error:
        yield Line("torch", f"cannot be imported: {error}", INSTALL)
        return
    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Line("GPU", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {build}")
    elif shutil.which("nvidia-smi") and torch.version.cuda:
        old = f"{build} cannot use NVIDIA's driver: CUDA {torch.version.cuda} needs {DRIVER} or newer"
        yield Line("GPU", old, "nvidia-smi  (it shows the driver's version; newer ones: nvidia.com/drivers)")
    elif shutil.which("nvidia-smi"):
        cuda = " ".join(["pip install", *cuda_torch()])
        yield Line("GPU", f"there is an NVIDIA driver, and {build} cannot use it", cuda)
    else:
        yield Line("GPU", f"none: everything runs on the CPU, {build}")


def scan_lines() -> Iterator[Line]:
    """The selective scan that is chosen here, and why others are not."""
    try:
        import torch

        from config.errors import InputError
        from engine.gpu_check.context import messages
        from models.selective_scan import FORCE_VARIABLE, backend_name
    except ImportError as error:
        yield Line("selective scan", f"cannot be imported: {error}", INSTALL)
        return
    try:
        with messages("models.selective_scan") as said:
            backend_name("cuda" if torch.cuda.is_available() else "cpu")
    except InputError as error:
        clear = f"$env:{FORCE_VARIABLE} = ''" if os.name == "nt" else f"unset {FORCE_VARIABLE}"
        yield Line("selective scan", str(error), clear)
        return
    yield Line("selective scan", (said or ["chosen before"])[-1].removeprefix("selective scan "))


def memory_lines() -> Iterator[Line]:
    try:
        import psutil
    except ImportError:
        yield Line("memory", "unknown: psutil is missing", INSTALL)
        return
    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    text = f"{free:.1f} of {total:.1f} GiB free, {os.cpu_count()} cores"
    close = "python scripts/prepare_data.py --workers 1" if free < LEAST_MEMORY_GB else ""
    yield Line("memory", text + (": little, prepare one volume at a time" if close else ""), close)


# ------------------------------------------------------------------ configuration


def configuration_lines(path: Path | None) -> Iterator[Line]:
    """The configuration, and everything on the disk that it names."""
    try:
        from config.errors import InputError
        from config.schema import DEFAULT_CONFIG, load_config
    except ImportError as error:
        yield Line("configuration", f"cannot be read: {error}", INSTALL)
        return
    file = path or DEFAULT_CONFIG
    try:
        values = load_config(path)
    except InputError as error:
        yield Line("configuration", str(error), _edit(file))
        return
    yield Line("configuration", f"{file}, mamba_model {values.mamba_model}")
    needed_keys = ("caption_csv_train", "caption_csv_val", "nnunet_encoder_checkpoint")
    for key in (*needed_keys, "caption_prompt_json", "language_model_adapters"):
        value, needed = getattr(values, key), key in needed_keys
        if value and Path(value).is_file():
            yield Line(key, f"{value}, {Path(value).stat().st_size / 2**20:.2f} MiB")
        elif value and "quickstart" in value:
            yield Line(key, f"{value} is not there: it is the quick start's", "python scripts/quickstart.py")
        elif value or needed:
            yield Line(key, f"{value} is not there" if value else "empty", _edit(file))
    yield from _disk_lines(Path(values.cache_dir), Path(values.output_dir), file)
    yield from _checkpoint_lines(Path(values.output_dir))


def language_model_lines(path: Path | None) -> Iterator[Line]:
    """A check of its own: a blocked hub takes long to fail, and must not hide what else the configuration names."""
    try:
        from config.errors import InputError
        from config.schema import load_config

        model = load_config(path).mamba_model
    except (ImportError, InputError):  # which the configuration's check says
        return
    yield from hub_lines(model)


def _edit(file: Path) -> str:
    return f"notepad {file}" if os.name == "nt" else f"${{EDITOR:-nano}} {file}"


def _disk_lines(cache: Path, output: Path, file: Path) -> Iterator[Line]:
    for folder in dict.fromkeys((cache, output)):
        there = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
        if there is None:
            yield Line("disk", f"{folder}: there is no drive {folder.drive}", _edit(file))
            continue
        free = shutil.disk_usage(there).free / 2**30
        little = free < LEAST_DISK_GB
        # The cache can be made again; a pasted line must never delete what was trained.
        spare = folder == cache and folder.exists() and cache not in (output, *output.parents)
        clear = f'{"Remove-Item -Recurse" if os.name == "nt" else "rm -r"} "{folder}"'
        remedy = (clear if spare else _edit(file)) if little else ""
        yield Line("disk", f"{free:.0f} GiB free for {folder}" + (": little" if little else ""), remedy)


def _checkpoint_lines(folder: Path) -> Iterator[Line]:
    from engine.cli import CHECKPOINTS

    found = [name for name in CHECKPOINTS if (folder / name).is_file()]
    if found:
        yield Line("checkpoints", f"{', '.join(found)} in {folder}; the first is taken")
    else:
        yield Line(
            "checkpoints", f"none in {folder}; without training:", "python scripts/check_image_to_text.py --demo"
        )


def hub_lines(model: str) -> Iterator[Line]:
    """Whether the language model is here, or its hub answers."""
    # A hub name has one slash at most, and no drive.
    if Path(model).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        weights = [file for pattern in ("*.safetensors", "*.bin") for file in Path(model).glob(pattern)]
        if weights and (Path(model) / "config.json").is_file():
            yield Line("language model", f"local folder, {sum(f.stat().st_size for f in weights) / 2**20:.0f} MiB")
        else:
            fetch = "hf download state-spaces/mamba-2.8b-hf --local-dir " + model
            yield Line("language model", f"{model} has no config.json with weights", fetch)
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    named = f"HF_ENDPOINT {endpoint}" if "HF_ENDPOINT" in os.environ else endpoint
    cached = _cached(model)
    try:
        request = urllib.request.Request(f"{endpoint}/{model}/resolve/main/config.json", method="HEAD")
        # urlopen's limit holds for each of the hub's addresses anew.
        asked = ThreadPoolExecutor(1).submit(urllib.request.urlopen, request, timeout=HUB_SECONDS)
        try:
            with asked.result(HUB_SECONDS) as answer:
                yield Line("hub", f"{named} answers for {model} ({answer.status}){', and it is cached' * cached}")
        except NotInTime as error:
            raise OSError(f"no answer within {HUB_SECONDS:g} s") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if cached:
            yield Line("hub", f"{named} does not answer ({reason}); {model} is cached, so it is not needed")
            return
        mirror = "https://hf-mirror.com"
        setting = f"$env:HF_ENDPOINT = '{mirror}'" if os.name == "nt" else f"export HF_ENDPOINT={mirror}"
        yield Line("hub", f"{named} does not give {model} ({reason}), and it is in no local folder", setting)


def _cached(model: str) -> bool:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return False
    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # no name of a repository: reported by the hub
        return False


# ------------------------------------------------------------------


def main() -> int:
    args = parse_args()
    checks: dict[str, Callable[[], Iterator[Line]]] = {
        "Python": python_line,
        "packages": package_lines,
        "GPU": gpu_lines,
        "selective scan": scan_lines,
        "memory": memory_lines,
        "configuration": lambda: configuration_lines(args.config),
        "language model": lambda: language_model_lines(args.config),
    }
    started, problems = time.monotonic(), 0
    pool = ThreadPoolExecutor(len(checks))
    running: dict[str, Future[list[Line]]] = {
        name: pool.submit(lambda check=check: list(check())) for name, check in checks.items()
    }
    for name, job in running.items():
        try:
            lines = job.result(max(0.0, started + SECONDS - time.monotonic()))
        except NotInTime:
            slow = f"not known within {SECONDS:g} s: first use compiles, and imports are slow once"
            lines = [Line(name, slow, known=False)]
        for line in lines:
            print(line.show(), flush=True)
            problems += bool(line.remedy)
    print(f"{problems} problems" if problems else "no problem", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a check that is still running is not waited for
