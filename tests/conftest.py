"""Shared fixtures. Reference material lies beside the checkout in ``../shared`` and may be absent."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell starts background jobs with Ctrl-C ignored, and every child inherits that; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu are skipped where there is none; scripts/gpu_check.py runs them on a card."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def assets() -> Path:
    return REPOSITORY / "tests" / "assets"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material; a test that asks for it skips where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "README.md").is_file():
        pytest.skip(f"reference material not found at {folder}; only full checkouts have it")
    return folder


@pytest.fixture(scope="session")
def small_training(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """A folder with four scans of a few voxels, reports, a byte-level Mamba and ``paths.yaml``; nobody changes it."""
    import numpy as np

    from config.schema import build_config, write_config
    from data.imaging.nifti import write_volume
    from tests.models.language_model.tiny import byte_tokenizer, random_mamba

    folder = tmp_path_factory.mktemp("small_training")
    rng = np.random.default_rng(0)
    lines = ["image_path,question,answer,mask_path"]
    for case in range(4):
        mask = np.zeros((6, 48, 48), np.uint8)
        mask[2:4, 10 + 5 * case : 20 + 5 * case, 12:20] = 1
        hu = rng.normal(-600, 300, mask.shape).astype(np.int16)
        write_volume(folder / f"{case}.nii.gz", hu, (5.0, 1.6, 1.6))
        write_volume(folder / f"{case}_mask.nii.gz", mask, (5.0, 1.6, 1.6))
        lines.append(f"{case}.nii.gz,Q?,Report {case}.,{case}_mask.nii.gz")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    byte_tokenizer().save_pretrained(folder / "lm")
    random_mamba(vocab_size=257, num_hidden_layers=2).save_pretrained(folder / "lm")
    network = assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"
    values = dict.fromkeys(("caption_csv_train", "caption_csv_val"), str(folder / "table.csv"))
    values |= {"cache_dir": str(folder / "cache"), "output_dir": str(folder / "out"), "mamba_model": str(folder / "lm")}
    values |= {"nnunet_encoder_checkpoint": str(network), "encoder_target_spatial": 6, "slices": 2, "bridge_width": 16}
    values |= {"bridge_depth": 1, "roi_side": 2, "roi_policy": "lesion", "max_visual_tokens": 16}
    write_config(build_config(values, "test"), folder / "paths.yaml")
    return folder


@pytest.fixture
def forget_accelerator() -> Iterator[Callable[[], None]]:
    """Before a script's main in this process: accelerate keeps the precision of the first one, of any test."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    yield forget
    forget()


@pytest.fixture
def run_stage(
    small_training: Path, monkeypatch: pytest.MonkeyPatch, forget_accelerator: Callable[[], None]
) -> Callable[..., None]:
    """``run_stage("train", "--epochs", "1", config=…)``: a stage script's main in this process."""

    def run(stage: str, *flags: str, config: Path | None = None) -> None:
        command = [f"{stage}.py", "--config", str(config or small_training / "paths.yaml"), "--mixed_precision", "no"]
        monkeypatch.setattr(sys, "argv", [*command, "--batch_size", "2", "--lr", "5e-3", *flags])
        forget_accelerator()
        importlib.import_module(stage).main()

    return run


@pytest.fixture
def card() -> dict[str, Any]:
    """The parts of a report card that a summary reads."""
    names = ("location_acc", "type_acc", "size_within_4mm", "exact_acc", "garbled_rate", "missed_lesion_rate")
    own, shuffled = ({name: {"value": value, "n": 4} for name in names} for value in (0.5, 0.25))
    scores = {name: {"value": 0.25} for name in ("location_acc", "macro_f1", "size_within_3mm")}
    gain = {"whole_reports": {"exact_acc": {"value": 0.25, "interval": [0.1, 0.4]}}}
    return {
        "cases": 4,
        "location_acc": 0.5,
        "size_within_3mm": 0.5,
        "findings": {"macro_f1": 0.75},
        "whole_reports": {"own": own, "shuffled": shuffled},
        "audit": {"normal_false_finding_rate": 0.125, "blank": {"macro_f1": 0.1}, "verdict": "they depend"},
        "confidence": {"ece": 0.02},
        "baselines": {"nearest": {**scores, "whole_reports": shuffled, "difference": gain}},
    }


@pytest.fixture(scope="session")
def demo_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's ``paths.yaml`` with a cache of its own."""
    from config.schema import load_config, write_config
    from engine.chain import SHIPPED_DEMO

    folder = tmp_path_factory.mktemp("demo")
    own = {"cache_dir": str(folder / "cache"), "output_dir": str(folder / "out")}
    write_config(load_config(SHIPPED_DEMO / "paths.yaml").replace(**own), folder / "paths.yaml")
    return folder / "paths.yaml"


@pytest.fixture(scope="session")
def demo_reporter(demo_config: Path) -> Any:
    """The demonstration checkpoint with its language model."""
    from engine.chain import SHIPPED_DEMO
    from engine.reporting import Reporter

    return Reporter.load(SHIPPED_DEMO / "vision_bridge_vlm.pt", demo_config, max_new_tokens=200)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The flags of a command, ``["scripts/x.py", "--flag", …]``, as that script's own parser reads them."""

    def read(command: list[str]):
        module = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", command)
        return module.parse_args()

    return read
