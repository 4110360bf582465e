"""The doctor: every problem has a line to type, none stops the others, and slow checks are not waited for."""

from __future__ import annotations

import http.server
import os
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from engine.chain import SHIPPED_LANGUAGE_MODEL, SHIPPED_NNUNET
from scripts import doctor


def lines(config: Path) -> dict[str, doctor.Line]:
    return {
        line.what: line for check in (doctor.configuration_lines, doctor.language_model_lines) for line in check(config)
    }


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "table.csv").write_text("image_path\n", encoding="utf-8")
    keys = {"caption_csv_train": tmp_path / "table.csv", "caption_csv_val": tmp_path / "gone.csv"}
    keys |= {"nnunet_encoder_checkpoint": SHIPPED_NNUNET, "mamba_model": SHIPPED_LANGUAGE_MODEL}
    keys |= {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    file = tmp_path / "paths.yaml"
    file.write_text("".join(f"{key}: {value.as_posix()}\n" for key, value in keys.items()), encoding="utf-8")
    return file


def test_what_is_there_is_named_and_what_is_not_has_a_line_to_type(config, tmp_path):
    found = lines(config)
    good = ("configuration", "caption_csv_train", "nnunet_encoder_checkpoint", "language model")
    assert not [name for name in good if found[name].remedy]
    assert "gone.csv is not there" in found["caption_csv_val"].text and str(config) in found["caption_csv_val"].remedy
    assert found["checkpoints"].remedy == "python scripts/check_image_to_text.py --demo"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "vision_bridge_vlm_final.pt").touch()
    assert not lines(config)["checkpoints"].remedy


def test_a_configuration_that_cannot_be_read_is_one_line(config):
    config.write_text("mamba_modle: x\n", encoding="utf-8")
    [line] = doctor.configuration_lines(config)
    assert "did you mean 'mamba_model'?" in line.text and str(config) in line.remedy


def test_the_quick_starts_files_are_made_by_the_quick_start(config):
    text = config.read_text(encoding="utf-8").replace("gone.csv", "quickstart/val.csv")
    config.write_text(text, encoding="utf-8")
    assert lines(config)["caption_csv_val"].remedy == "python scripts/quickstart.py"


def test_packages_that_are_missing_or_others_are_named(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("numpy==0.1\nno-such-thing==1.0\npytest==1 ; platform_system == 'x'\n")
    monkeypatch.setattr(doctor, "REPOSITORY", tmp_path)
    missing, other = doctor.package_lines()
    assert missing.text == "missing: no-such-thing" and re.search(r"numpy [\d.]+, tested with 0.1$", other.text)
    assert missing.remedy == other.remedy == "pip install -r requirements.txt"


@pytest.fixture
def hub(monkeypatch) -> http.server.HTTPServer:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path.startswith("/known/") else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()


def test_the_hub_is_asked_for_the_model(hub, monkeypatch):
    [there] = doctor.hub_lines("known/model")
    assert "answers for known/model" in there.text and not there.remedy
    [gone] = doctor.hub_lines("other/model")
    assert "Not Found" in gone.text and "HF_ENDPOINT" in gone.remedy
    monkeypatch.setattr(doctor, "_cached", lambda model: True)
    [cached] = doctor.hub_lines("other/model")
    assert "is cached" in cached.text and not cached.remedy


def test_a_folder_without_weights_is_no_language_model(tmp_path):
    [line] = doctor.hub_lines(str(tmp_path))
    assert "no config.json with weights" in line.text and str(tmp_path) in line.remedy


def test_the_scan_backend_is_named_with_the_reason(monkeypatch):
    [line] = doctor.scan_lines()
    assert line.text and not line.remedy
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "nonsense")
    [wrong] = doctor.scan_lines()
    assert "no such backend" in wrong.text and "MAMBA_SCAN_BACKEND" in wrong.remedy


def test_a_check_that_hangs_is_not_waited_for(monkeypatch, capsys, config):
    release = threading.Event()
    monkeypatch.setattr(doctor, "gpu_lines", lambda: iter([doctor.Line("GPU", str(release.wait()))]))
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--config", str(config)])
    started = time.monotonic()
    status = doctor.main()
    release.set()
    assert time.monotonic() - started < 5
    printed = capsys.readouterr().out
    assert "?? " in printed and "not known within 0.5 s" in printed and status in (0, 1)


def test_a_hub_that_does_not_answer_has_its_line_in_time(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: release.wait())  # each address in turn
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    started = time.monotonic()
    [line] = doctor.hub_lines("known/model")
    release.set()
    assert time.monotonic() - started < 3 and "no answer within 0.2 s" in line.text and "HF_ENDPOINT" in line.remedy


def test_a_full_disk_never_has_a_line_that_deletes_what_was_trained(config, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK_GB", 10**9)
    for name in ("out", "cache"):
        (tmp_path / name).mkdir()
    found = {line.text: line.remedy for line in doctor.configuration_lines(config) if line.what == "disk"}
    [of_cache] = [remedy for text, remedy in found.items() if "cache" in text]
    [of_output] = [remedy for text, remedy in found.items() if text.endswith("out: little")]
    removal = "Remove-Item -Recurse" if os.name == "nt" else "rm -r"
    assert of_cache == f'{removal} "{tmp_path / "cache"}"' and of_output.endswith(str(config)), (
        "the cache is made again"
    )
    inside = config.read_text(encoding="utf-8").replace((tmp_path / "cache").as_posix(), tmp_path.as_posix())
    config.write_text(inside, encoding="utf-8")
    assert removal not in lines(config)["disk"].remedy, "the cache holds the output"


def test_a_drive_that_is_not_there_is_one_line(config, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    [line] = doctor._disk_lines(Path("cache"), Path("cache"), config)
    assert "there is no drive" in line.text and str(config) in line.remedy


def test_a_path_is_no_name_of_the_hub():
    [line] = doctor.hub_lines("d:/models/mamba-2.8b-hf")
    assert "has no config.json with weights" in line.text and "huggingface" not in line.text


@pytest.mark.parametrize(
    ("cuda", "text", "remedy"),
    [("13.0", "CUDA 13.0 needs 580 or newer", "nvidia-smi"), (None, "cannot use it", "pip install torch==")],
)
def test_a_card_that_torch_cannot_use(
    cuda: str | None, text: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old driver, or a torch for the CPU alone: another torch would not help the one, nor a driver the other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    (line,) = doctor.gpu_lines()
    assert text in line.text and line.remedy.startswith(remedy)
