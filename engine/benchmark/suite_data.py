"""Suite ``data``: preprocessing beside nnU-Net's own, and epochs from the cache beside reading .nii.gz each time.

nnU-Net needs an environment of its own (it pins other versions); NNUNET_PYTHON names that environment's Python:

    python -m venv nnunet_env, then in it: pip install torch==2.13.0 nnunetv2==2.8.1
    PowerShell: $env:NNUNET_PYTHON = "d:/nnunet_env/Scripts/python.exe"
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader

from config.nnunet_plans import PreprocessPlan
from config.schema import REPOSITORY
from data.cache import VolumeCache
from data.imaging.nifti import write_volume
from data.imaging.reader import read_mask, read_volume
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from data.nnunet_preprocess import preprocess
from data.tables.caption_table import CaptionRow
from data.view_selection import ViewSelection
from engine.benchmark.peak_memory import Peak, in_own_process, measure_peak
from engine.benchmark.pictures import Panel
from engine.benchmark.ratios import speedup
from engine.benchmark.report import Report
from engine.benchmark.timing import Candidate, Timing, take_turns
from engine.prepare import fill_cache
from models.nnunet.checkpoint import load_nnunet_checkpoint

NETWORKS = REPOSITORY / "tests" / "assets" / "nnunet_tiny"
CONFIGURATIONS = {"2d": "2d_plain", "3d_fullres": "3d_plain"}
SPACING = (1.0, 0.7, 0.7)  # mm, z y x: a usual chest CT
PASSES = 5  # over the cache in one timed call


def make_scan(folder: Path, shape: tuple[int, int, int], seed: int) -> tuple[Path, Path]:
    """An image with a body, lungs and noise of 25 HU, which is what makes real CT hard to compress; and a mask."""
    rng = np.random.default_rng(seed)
    z, y, x = (np.linspace(-1, 1, extent, dtype=np.float32) for extent in shape)
    body = (y[:, None] / 0.75) ** 2 + (x[None] / 0.9) ** 2 < 1
    lungs = ((y[:, None] / 0.5) ** 2 + ((np.abs(x[None]) - 0.42) / 0.3) ** 2) < 1
    plane = np.where(lungs, -850, np.where(body, 40, -1000)).astype(np.float32)
    texture = gaussian_filter(rng.normal(0, 300, (shape[1], shape[2])).astype(np.float32), 3)
    image = np.empty(shape, np.int16)
    for k, height in enumerate(z):
        noise = rng.normal(0, 25, plane.shape).astype(np.float32)
        image[k] = np.clip(plane + texture * (1 - abs(height)) + noise, -1024, 3071)
    mask = np.zeros(shape, np.uint8)
    at = [extent // 3 for extent in shape]
    mask[at[0] : at[0] + shape[0] // 10, at[1] : at[1] + shape[1] // 12, at[2] : at[2] + shape[2] // 12] = 1
    paths = folder / f"{seed}.nii.gz", folder / f"{seed}_mask.nii.gz"
    write_volume(paths[0], image, SPACING)
    write_volume(paths[1], mask, SPACING)
    return paths


def plan_of(network: str) -> PreprocessPlan:
    source = load_nnunet_checkpoint(NETWORKS / network / "fold_0" / "checkpoint_best.pth")
    return PreprocessPlan.from_nnunet(source.plans, source.configuration)


def ours(image: Path, mask: Path, plan: PreprocessPlan) -> None:
    volume = read_volume(image, plan.orientation)
    preprocess(volume, plan, read_mask(mask, volume))


def our_peak(image: Path, mask: Path, network: str, threads: int) -> Peak:
    """As nnU-Net's is measured: the first call of a process that has its libraries loaded."""
    torch.set_num_threads(threads)
    return measure_peak(partial(ours, image, mask, plan_of(network)))


def nnunets(image: Path, mask: Path, network: str, configuration: str, rounds: int) -> dict[str, object]:
    """What :mod:`engine.benchmark.nnunet_rival` prints, with one thread of every library.

    Raises:
        RuntimeError: it failed; the message is its own last line.
    """
    folder = NETWORKS / network
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    script = Path(__file__).with_name("nnunet_rival.py")
    files = [image, mask, folder / "plans.json", folder / "dataset.json"]
    done = subprocess.run(
        [os.environ["NNUNET_PYTHON"], str(script), *map(str, files), configuration, str(rounds)],
        env={**os.environ, **dict.fromkeys(names, "1")}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nnU-Net's preprocessing failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _preprocessing(report, Path(folder))
        _epochs(report, Path(folder))


def _preprocessing(report: Report, folder: Path) -> None:
    """One volume, mask and all, from .nii.gz to the encoder's voxels."""
    size = report.size
    shape = size.volume
    report.settings |= {"volume": shape, "spacing": SPACING, "epoch": [size.epoch_cases, size.epoch_volume]}
    image, mask = make_scan(folder, shape, 0)
    panel: dict[str, float] = {}
    for configuration, network in CONFIGURATIONS.items():
        call = partial(ours, image, mask, plan_of(network))
        [timing] = take_turns([Candidate(f"preprocessing {configuration} ours", call, 3)]).values()
        report.add_times([timing])
        measure: Callable[..., Peak] = in_own_process if size.own_process else lambda f, *a: f(*a)
        peak = measure(our_peak, image, mask, network, torch.get_num_threads())
        report.add_peak(f"preprocessing {configuration} ours", peak)
        panel[f"{configuration} ours"] = timing.median
        if not os.environ.get("NNUNET_PYTHON"):
            report.add_missing(
                f"preprocessing_{configuration}: set NNUNET_PYTHON to the Python of an environment with nnunetv2"
            )
            continue
        found = nnunets(image, mask, network, configuration, 3)
        rival = Timing(f"preprocessing {configuration} nnU-Net, one thread", tuple(found["seconds"]), found["version"])
        report.add_times([rival])
        panel[f"{configuration} nnU-Net"] = rival.median
        report.add_ratio(f"preprocessing_{configuration}_vs_nnunet_one_thread", speedup(timing.median, rival.median))
        if found["call"]:
            report.add_peak(f"preprocessing {configuration} nnU-Net", Peak(found["call"], found["process"]))
            report.add_ratio(f"preprocessing_{configuration}_peak_memory_vs_nnunet", peak.call / found["call"])
    report.panels.append(Panel(f"preprocessing, {' x '.join(map(str, reversed(shape)))}", "seconds", panel))


def _epochs(report: Report, folder: Path) -> None:
    """Epochs of a data set of 2-D slices: from the cache, and from the .nii.gz files."""
    size, plan = report.size, plan_of("2d_plain")
    pairs = [make_scan(folder, size.epoch_volume, 1 + case) for case in range(size.epoch_cases)]
    rows = [CaptionRow(2 + n, image, "Q?", "A.", mask) for n, (image, mask) in enumerate(pairs)]
    cache = VolumeCache(folder / "cache", plan)
    fill_cache(cache, rows)
    data = MedicalVLMDataset(rows, cache, ViewSelection(plan, (16, 16), 1, "mask"), [], 0)
    loader = DataLoader(data, batch_size=4, collate_fn=CaptionCollator(None, 1, 1))

    def from_cache() -> None:
        for _ in range(PASSES):
            for batch in loader:
                assert len(batch["images"])

    def reading() -> None:
        for image, _ in pairs:
            np.asarray(nib.load(image).dataobj)

    def preparing() -> None:
        for image, mask in pairs:
            ours(image, mask, plan)

    candidates = [Candidate("epochs from the cache", from_cache, 5, note=f"{PASSES} epochs of {len(rows)} slices"),
                  Candidate("an epoch that reads .nii.gz", reading, 3, note="nibabel, nothing more"),
                  Candidate("an epoch that reads and prepares", preparing, 1, warm=False)]  # fmt: skip
    times = take_turns(candidates)
    report.add_times(times.values())
    cached, read, prepared = (timing.median for timing in times.values())
    report.add_value("bytes of a slice", float(data[0].images.nbytes))
    report.add_ratio("cached_samples_per_s", PASSES * len(rows) / cached)
    report.add_ratio("cached_epoch_vs_nifti", speedup(cached / PASSES, read))
    report.add_ratio("cached_epoch_vs_preparing", speedup(cached / PASSES, prepared))
    report.add_note("the cache is on the disk; the files have been read before, so the system may hold them in memory")
    report.panels.append(
        Panel("an epoch", "seconds", {"cache": cached / PASSES, ".nii.gz, read only": read, "prepared anew": prepared})
    )
