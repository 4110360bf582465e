"""Windows, by simulation: what differs there is imitated here, and the real entry points run under it.

Spawned workers, drive letters and backslashes, a home folder with Chinese letters, a console in code page 936, files
that cannot be replaced while they are open. tests/engine/test_interrupt.py has the console's events,
tests/scripts/test_powershell.py the PowerShell scripts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config.schema import load_config, write_config
from engine import cli
from engine.chain import SHIPPED_ADAPTERS
from engine.training import overnight
from models.language_model.adapter_file import read_adapters
from models.language_model.prefix_state import PrefixIdentity, PrefixState
from models.pretrained import read_folder

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="imitates Windows by /proc and POSIX signals")


def windows_os(**replaced: object) -> SimpleNamespace:
    """``os`` of a single module as Windows has it; for the whole process, pathlib would make Windows paths."""
    return SimpleNamespace(**{**vars(os), "name": "nt", **replaced})


# ---------------------------------------------------------------- files held open


def open_files() -> set[str]:
    """Regular files that this process has open or mapped into memory."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(os.readlink(descriptor))  # noqa: PTH115
        except OSError:  # the descriptor of this very listing
            continue
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    found |= {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return {name for name in found if name.startswith("/") and not Path(name).is_dir()}


@pytest.fixture
def exclusive(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Windows refuses to rename, replace or remove an open file, or a folder with one. Returns the calls it judged."""
    calls = []

    def guarded(name: str, paths: int) -> Callable[..., None]:
        original = getattr(os, name)

        def call(*arguments: object, **options: object) -> None:
            base = "" if options.get("dir_fd") is None else os.readlink(f"/proc/self/fd/{options['dir_fd']}")  # noqa: PTH115
            for path in arguments[:paths]:
                wanted = os.path.realpath(Path(base, os.fspath(path)))
                calls.append(f"{name} {wanted}")
                if held := [file for file in open_files() if file == wanted or file.startswith(f"{wanted}/")]:
                    raise PermissionError(13, f"[WinError 32] in use by another process: {held}", str(path))
            original(*arguments, **options)

        return call

    for name, paths in {"replace": 2, "rename": 2, "unlink": 1, "remove": 1}.items():
        monkeypatch.setattr(os, name, guarded(name, paths))
    return calls


def test_the_imitation_refuses_what_windows_refuses(exclusive, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    with first.open("rb"):
        for refused in (lambda: first.replace(second), first.unlink, lambda: tmp_path.rename(tmp_path.with_name("c"))):
            with pytest.raises(PermissionError, match="WinError 32"):
                refused()
    first.replace(second)
    second.unlink()
    assert len(exclusive) >= 6


def test_what_was_read_can_be_replaced_while_it_is_in_use(exclusive, demo_reporter, tmp_path):
    """Adapters, an image state and a saved model; safetensors maps its files into memory."""
    adapters = Path(shutil.copy(SHIPPED_ADAPTERS, tmp_path))
    state = PrefixState(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    state.save(tmp_path / "state.safetensors", PrefixIdentity())
    demo_reporter.model.save_pretrained(tmp_path / "model")
    used = [read_adapters(adapters), PrefixState.load(tmp_path / "state.safetensors"), read_folder(tmp_path / "model")]
    for path in (adapters, tmp_path / "state.safetensors", tmp_path / "model" / "model.safetensors"):
        Path(shutil.copy(path, tmp_path / "new")).replace(path)
    assert len(used) == 3 and len(exclusive) >= 3


@pytest.mark.parametrize(
    ("stage", "best"),
    [
        ("train", "vision_bridge_best_val"),
        pytest.param("train_vlm", "vision_bridge_vlm_best_val", marks=pytest.mark.slow),
    ],
)
def test_nothing_of_ours_is_replaced_while_it_is_open(exclusive, run_stage, small_training, tmp_path, stage, best):
    """Two trainings into one folder: checkpoints, states and logs are replaced, a damaged cache entry is repaired."""
    config = tmp_path / "paths.yaml"
    write_config(
        load_config(small_training / "paths.yaml", cache_dir=str(tmp_path / "cache"), slice_policy="mask"), config
    )
    flags = ["--output_dir", str(tmp_path / "out"), "--epochs", "1", "--save_every", "1"]
    flags += ["--from_scratch"] * (stage == "train_vlm")
    for _ in range(2):
        run_stage(stage, *flags, config=config)
        for damaged in list((tmp_path / "cache").glob("[0-9a-f]*/image.bin"))[:1]:
            damaged.write_bytes(damaged.read_bytes()[::-1])
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{best}.previous.pt", f"{best}.pt"} <= kept
    assert not list(tmp_path.rglob(".part-*")) and not list((tmp_path / "cache").glob(".tmp-*"))
    assert sum(f"{best}.pt" in call for call in exclusive) >= 2
    illegal = [path.name for path in tmp_path.rglob("*") if re.search(r'[<>:"\\|?*]|[. ]$', path.name)]
    assert not illegal, "Windows has no such names"


# ---------------------------------------------------------------- branches of Windows alone


def test_the_night_leaves_ctrl_c_to_the_console(monkeypatch, tmp_path):
    """On Windows the console interrupts the run as well: it is waited for, and not sent a second Ctrl-C."""
    monkeypatch.setattr(overnight, "os", windows_os())
    program = "import signal, sys, time; signal.signal(2, lambda *_: sys.exit(9)); time.sleep(1.5); sys.exit(3)"
    threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            overnight.train([sys.executable, "-c", program], tmp_path / "train.log")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started > 1.5, "the run had not saved its state yet"


@pytest.mark.parametrize(("home", "moved"), [("/home/张三", True), ("/home/zhang", False)])
def test_compiled_kernels_stay_out_of_a_home_folder_with_chinese_letters(home, moved, monkeypatch, tmp_path):
    """Triton's own files too: it writes what ptxas and the C compiler read into the temporary folder, below home."""
    environment = {"PROGRAMDATA": str(tmp_path)}
    temporary = SimpleNamespace(gettempdir=lambda: f"{home}/AppData/Local/Temp", tempdir=None)
    monkeypatch.setattr(cli, "tempfile", temporary)
    monkeypatch.setattr(cli, "os", windows_os(environ=environment))
    monkeypatch.setattr(Path, "home", classmethod(lambda _: Path(home)))
    cli.use_ascii_cache()
    folder = environment.get("TRITON_CACHE_DIR")
    assert (folder is not None) == (temporary.tempdir is not None) == moved
    if moved:
        assert folder.isascii() and Path(folder).is_relative_to(tmp_path)
        assert Path(temporary.tempdir).is_dir() and Path(temporary.tempdir).is_relative_to(folder)
        assert environment["TEMP"] == environment["TMP"] == temporary.tempdir
        environment["TRITON_CACHE_DIR"] = "D:/mine"
        cli.use_ascii_cache()
        assert environment["TRITON_CACHE_DIR"] == "D:/mine", "the user's own choice counts"


# ---------------------------------------------------------------- all of it at once


@pytest.fixture
def windows_user(small_training, tmp_path) -> SimpleNamespace:
    """Tables and configuration with drive letters, a home in Chinese letters, a GBK console, spawned workers."""
    root = tmp_path / "用户" / "张 三"
    root.mkdir(parents=True)
    table = (small_training / "table.csv").read_text(encoding="utf-8")
    table = re.sub(r"(\d(_mask)?\.nii\.gz)", r"D:\\ct\\\1", table).replace("Report", "报告")
    (root / "table.csv").write_text(table, encoding="gbk")
    drives = {"D:\\ct": str(small_training), "e:/": str(root)}
    keys = {"caption_csv_train": "E:\\table.csv", "caption_csv_val": "e:/table.csv", "path_map": drives}
    keys |= {"cache_dir": str(root / "缓存"), "num_workers": 1}
    write_config(load_config(small_training / "paths.yaml", **keys), root / "配置.yaml")
    # Read by every Python that starts here, as Windows' own default would be.
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n", encoding="utf-8"
    )
    environment = {**os.environ, "HOME": str(root), "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "cp936"}
    return SimpleNamespace(root=root, images=small_training, environment=environment | {"PYTHONUTF8": "0"})


def powershell_command(name: str, call: str) -> list[str]:
    """What a PowerShell script starts for ``call``."""
    from tests.scripts.test_powershell import TrainingScript, source_of

    script = TrainingScript(source_of(name))
    return [script.python_script, *script.command(call)]


def start(user: SimpleNamespace, *command: object) -> subprocess.Popen:
    """A Python script as ``user`` starts it, with that configuration."""
    words = [sys.executable, "-u", *map(str, command), "--config", str(user.root / "配置.yaml")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(words, **streams, cwd=REPOSITORY, env=user.environment, start_new_session=True)


def finish(process: subprocess.Popen) -> str:
    """What a script that succeeds has printed."""
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return printed


@pytest.mark.minutes
def test_a_training_as_windows_runs_it_is_interrupted_and_resumed(windows_user):
    def train(name: str) -> subprocess.Popen:
        command = powershell_command("run_train_5090.ps1", "-Epochs 6 -BatchSize 2 -Lr 5e-3")
        return start(windows_user, *command, "--output_dir", windows_user.root / name)

    printed = finish(train("whole"))
    assert "val_loss" in printed and "用户" in printed

    stopped = train("stopped")
    for line in stopped.stdout:
        if line.startswith("epoch 1/6"):  # the workers of both loaders run
            os.killpg(stopped.pid, signal.SIGINT)  # as a console does
            break
    _, errors = stopped.communicate(timeout=600)
    assert stopped.returncode == 130 and "state saved at step" in errors, errors
    assert (windows_user.root / "stopped" / "stage1_state.pt").is_file()
    assert "resuming at epoch" in finish(train("stopped"))
    logs = [windows_user.root / name / "stage1_log.jsonl" for name in ("whole", "stopped")]
    whole_log, resumed_log = ([json.loads(line) for line in log.read_text("utf-8").splitlines()] for log in logs)
    assert resumed_log == whole_log


@pytest.mark.minutes
def test_from_a_prepared_cache_to_a_report_card_as_windows_runs_it(windows_user):
    root = windows_user.root
    prepared = finish(start(windows_user, "scripts/prepare_data.py", "--workers", 2))
    assert "prepared 4, already there 0, failed 0" in prepared
    stage2 = powershell_command("run_stage2_train.ps1", "-Epochs 1 -BatchSize 2 -Lr 1e-3 -MaxVisualTokens 16")
    assert "平均 caption_loss" in finish(start(windows_user, *stage2, "--from_scratch", "--output_dir", root / "输出"))
    checkpoint = ["--checkpoint", root / "输出" / "vision_bridge_vlm_best_val.pt"]
    shutil.copy(windows_user.images / "0.nii.gz", root / "影像.nii.gz")
    check = ["scripts/check_image_to_text.py", *checkpoint, "--image", root / "影像.nii.gz", "--max_new_tokens", 4]
    check += ["--question", "有无病变？"]
    assert "生成文本" in finish(start(windows_user, *check, "--force"))
    card = ["scripts/evaluate_reports.py", *checkpoint, "--csv", root / "table.csv", "--out", root / "评价"]
    assert "report card: " in finish(start(windows_user, *card, "--maps", 1, "--max_new_tokens", 4, "--force"))
    assert (root / "评价" / "report_card.html").is_file()
    illegal = [path.name for path in root.rglob("*") if re.search(r'[<>:"\\|?*]|[. ]$', path.name)]
    assert not illegal, "Windows has no such names"
