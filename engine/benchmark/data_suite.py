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
from engine.benchmark.measure import Candidate, Peak, measure_peak
from engine.benchmark.report import Panel, Report
from engine.prepare import fill_cache
from models.nnunet.checkpoint import load_nnunet_checkpoint

NETWORKS = REPOSITORY / "tests" / "assets" / "nnunet_tiny"
SPACING = (1.0, 0.7, 0.7)  # mm, z y x: a usual chest CT
PASSES = 5  # over the cache in one timed call


def data(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = report.size
        report.settings |= {"volume": size.volume, "spacing": SPACING, "epoch": [size.epoch_cases, size.epoch_volume]}
        preprocessing(report, *make_scan(Path(folder), size.volume, 0))
        epochs(report, Path(folder))


def preprocessing(report: Report, image: Path, mask: Path) -> None:
    """One volume and its mask, from .nii.gz to the encoder's voxels."""
    bars: dict[str, float] = {}
    for plan, network in (("2d", "2d_plain"), ("3d_fullres", "3d_plain")):
        name, short = f"preprocessing {plan}", f"preprocessing_{plan}"
        ours = f"{name} ours"
        bars[f"{plan} ours"] = report.time([Candidate(ours, partial(prepare, image, mask, plan_of(network)))])[ours]
        call = report.peak(ours, prepare_peak, image, mask, network, torch.get_num_threads())
        found = nnunet_baseline(image, mask, network, plan) if os.environ.get("NNUNET_PYTHON") else {}
        if found:
            candidate = Candidate(f"{name} nnU-Net, one thread", list, note=found["version"])
            bars[f"{plan} nnU-Net"] = report.add_seconds(candidate, found["seconds"])
        else:
            report.add_missing(f"{short}: set NNUNET_PYTHON to the Python of an environment with nnunetv2")
        report.add_ratio(f"{short}_vs_nnunet_one_thread", bars.get(f"{plan} nnU-Net"), bars[f"{plan} ours"], "≥ 2")
        if found.get("call"):
            report.add_peak(f"{name} nnU-Net", Peak(found["call"], found["process"]))
        report.add_ratio(f"{short}_peak_memory_vs_nnunet", call, found.get("call"), "≤ 1")
    shape = " x ".join(map(str, reversed(report.size.volume)))
    report.panels.append(Panel(f"preprocessing, {shape}", "seconds", bars))


def epochs(report: Report, folder: Path) -> None:
    """Epochs of a data set of 2-D slices: from the cache, and from the .nii.gz files."""
    size, plan = report.size, plan_of("2d_plain")
    pairs = [make_scan(folder, size.epoch_volume, 1 + case) for case in range(size.epoch_cases)]
    rows = [CaptionRow(2 + n, image, "Q?", "A.", mask) for n, (image, mask) in enumerate(pairs)]
    cache = VolumeCache(folder / "cache", plan)
    fill_cache(cache, rows)
    slices = MedicalVLMDataset(rows, cache, ViewSelection(plan, (16, 16), 1, "mask"), [], 0)
    loader = DataLoader(slices, batch_size=4, collate_fn=CaptionCollator(None, 1, 1))

    def from_cache() -> None:
        for _ in range(PASSES):
            for batch in loader:
                assert len(batch["images"])

    def reading() -> None:
        for image, _ in pairs:
            np.asarray(nib.load(image).dataobj)

    def preparing() -> None:
        for image, mask in pairs:
            prepare(image, mask, plan)

    seconds = report.time(
        [
            Candidate("epochs from the cache", from_cache, 5, note=f"{PASSES} epochs of {len(rows)} slices"),
            Candidate("an epoch that reads .nii.gz", reading, note="nibabel, nothing more"),
            Candidate("an epoch that reads and prepares", preparing, 1, "never"),
        ]
    )
    cached, read, prepared = seconds.values()
    report.add_value("bytes of a slice", float(slices[0].images.nbytes))
    report.add_ratio("cached_samples_per_s", PASSES * len(rows), cached, "≥ 100")
    report.add_ratio("cached_epoch_vs_nifti", read, cached / PASSES, "≥ 20")
    report.add_ratio("cached_epoch_vs_preparing", prepared, cached / PASSES)
    report.add_note("the cache is on the disk; the files have been read before, so the system may hold them in memory")
    bars = {"cache": cached / PASSES, ".nii.gz, read only": read, "prepared anew": prepared}
    report.panels.append(Panel("an epoch", "seconds", bars))


def make_scan(folder: Path, shape: tuple[int, int, int], seed: int) -> tuple[Path, Path]:
    """An image with a body, lungs and noise of 25 HU, which makes real CT hard to compress; and its mask."""
    rng = np.random.default_rng(seed)
    z, y, x = (np.linspace(-1, 1, extent, dtype=np.float32) for extent in shape)
    body = (y[:, None] / 0.75) ** 2 + (x[None] / 0.9) ** 2 < 1
    lungs = ((y[:, None] / 0.5) ** 2 + ((np.abs(x[None]) - 0.42) / 0.3) ** 2) < 1
    plane = np.where(lungs, -850, np.where(body, 40, -1000)).astype(np.float32)
    texture = gaussian_filter(rng.normal(0, 300, plane.shape).astype(np.float32), 3)
    image = np.empty(shape, np.int16)
    for k, height in enumerate(z):
        noise = rng.normal(0, 25, plane.shape).astype(np.float32)
        image[k] = np.clip(plane + texture * (1 - abs(height)) + noise, -1024, 3071)
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(n // 3, n // 3 + n // part) for n, part in zip(shape, (10, 12, 12), strict=True))] = 1
    paths = folder / f"{seed}.nii.gz", folder / f"{seed}_mask.nii.gz"
    for path, array in zip(paths, (image, mask), strict=True):
        write_volume(path, array, SPACING)
    return paths


def plan_of(network: str) -> PreprocessPlan:
    source = load_nnunet_checkpoint(NETWORKS / network / "fold_0" / "checkpoint_best.pth")
    return PreprocessPlan.from_nnunet(source.plans, source.configuration)


def prepare(image: Path, mask: Path, plan: PreprocessPlan) -> None:
    volume = read_volume(image, plan.orientation)
    preprocess(volume, plan, read_mask(mask, volume))


def prepare_peak(image: Path, mask: Path, network: str, threads: int) -> Peak:
    """As nnU-Net's is measured: the first call of a process that has its libraries loaded."""
    torch.set_num_threads(threads)
    return measure_peak(partial(prepare, image, mask, plan_of(network)), torch.device("cpu"))


def nnunet_baseline(image: Path, mask: Path, network: str, configuration: str) -> dict[str, object]:
    """What ``nnunet_baseline.py`` prints after three runs, with one thread of every library.

    Raises:
        RuntimeError: it failed; the message is its own last line.
    """
    folder = NETWORKS / network
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    script, files = Path(__file__).with_name("nnunet_baseline.py"), (folder / "plans.json", folder / "dataset.json")
    done = subprocess.run(
        [os.environ["NNUNET_PYTHON"], script, image, mask, *files, configuration, "3"],
        env={**os.environ, **dict.fromkeys(names, "1")}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nnU-Net's preprocessing failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
