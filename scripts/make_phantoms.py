"""Make the built-in data set of synthetic chest CTs with reports.

python scripts/make_phantoms.py --out outputs/phantoms --n_train 300 --n_val 40 --n_test 40
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Make synthetic chest CTs with reports")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; completed if begun")
    parser.add_argument("--n_train", type=int, default=300)
    parser.add_argument("--n_val", type=int, default=40)
    parser.add_argument("--n_test", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal files")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="of reports and questions")
    parser.add_argument("--max_findings", type=int, default=1, help="findings in an abnormal case: 1 to this many")
    parser.add_argument("--normal_share", type=float, default=0.1, help="fraction of healthy chests")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument("--contact_sheet", action="store_true", help="also write contact_sheet.png into --out")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from rich.progress import Progress

from data.imaging.volume import LUNG_WINDOW_HU, SOFT_TISSUE_WINDOW_HU
from data.phantom.dataset import DatasetPaths, make_dataset
from data.phantom.finding import FINDING_TYPES


def write_contact_sheet(paths: DatasetPaths) -> Path:
    """One case of each type in the slice with most of its lesion; below, a healthy chest from top to bottom."""
    cases = json.loads(paths.cases_json.read_text(encoding="utf-8"))
    shown = {(case["findings"][0]["type"] if case["findings"] else "normal"): case for case in reversed(cases)}
    columns = len(FINDING_TYPES)
    figure, axes = plt.subplots(4, columns, figsize=(2.4 * columns, 10), layout="constrained")
    for column, kind in enumerate(sorted(shown)):
        hu, mask = (_load(paths.root / folder / f"{shown[kind]['id']}.nii.gz") for folder in ("images", "masks"))
        best = int((mask > 0).sum((1, 2)).argmax()) if mask.any() else len(hu) // 2
        title = ", ".join(f"{f['side']} {f['zone']} {f['type']} {f['size_mm']}" for f in shown[kind]["findings"])
        axes[0, column].set_title(title or "normal", fontsize=7)
        _show(axes[:2, column], hu[best])
        if mask.any():
            axes[0, column].contour(mask[best] > 0, [0.5], colors="red", linewidths=0.4)
    hu = _load(paths.root / "images" / f"{shown.get('normal', cases[0])['id']}.nii.gz")
    for column, level in enumerate(np.linspace(0.93, 0.12, columns)):
        _show(axes[2:, column], hu[int(level * len(hu))])
    for axis in axes.flat:
        axis.axis("off")
    target = paths.root / "contact_sheet.png"
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


def _show(axes: np.ndarray, image: np.ndarray) -> None:
    for axis, (low, high) in zip(axes, (LUNG_WINDOW_HU, SOFT_TISSUE_WINDOW_HU), strict=True):
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")


def _load(path: Path) -> np.ndarray:
    """Voxels of an image or mask, [Z, Y, X]."""
    return np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)


def main() -> None:
    args = parse_args()
    total = args.n_train + args.n_val + args.n_test
    options = {name: value for name, value in vars(args).items() if name not in ("out", "contact_sheet")}
    with Progress() as bar:
        task = bar.add_task("phantoms", total=total)
        paths = make_dataset(args.out, **options, progress=lambda done, _: bar.update(task, completed=done))
    if args.contact_sheet and total:
        print(f"contact sheet: {write_contact_sheet(paths)}")
    print(f"{total} cases in {paths.root}: train.csv, val.csv, test.csv")


if __name__ == "__main__":
    run_main(main)
