"""Draw which part of a slice of a synthetic scan each visual token stands for, with training's view and token budget.

    python docs/draw_token_grid.py --out docs/token_grid.png

All features, the pooled overview, the centre crop, and the overview with lesion tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not docs/

from config.schema import REPOSITORY, Config
from engine.cli import Parser, positive_int, run_main


def parse_args() -> argparse.Namespace:
    defaults = Config()
    parser = Parser(description="Draw the token grid of a slice")
    parser.add_argument("--out", type=Path, default=Path("docs/token_grid.png"))
    parser.add_argument("--grid", type=positive_int, default=defaults.encoder_target_spatial, help="features per side")
    parser.add_argument("--max_visual_tokens", type=positive_int, default=defaults.max_visual_tokens)
    parser.add_argument("--seed", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from config.nnunet_plans import PreprocessPlan
from data.cache import VolumeCache
from data.phantom.case import make_case, write_case
from data.view_selection import View, ViewSelection
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.roi_crop import center_crop, roi_extent
from models.vim_bridge import grid_side

NETWORK = REPOSITORY / "tests" / "assets" / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"
STRIDE = (16, 16)  # of nnU-Net's stage that gives 28 x 28 at a patch of 448
ROI_SIDE = 7


def lesion_view(seed: int) -> View:
    """The slice that shows most of a small lesion, selected as in training."""
    source = load_nnunet_checkpoint(NETWORK)
    plan = PreprocessPlan.from_nnunet(source.plans, source.configuration)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_case(make_case(seed, [("nodule", "left", "upper")]), folder / "ct.nii.gz", folder / "mask.nii.gz")
        volume = VolumeCache(folder / "cache", plan).get(folder / "ct.nii.gz", folder / "mask.nii.gz")
        return ViewSelection(plan, STRIDE, 1, "mask").select(volume)


def draw_cells(axes: Axes, box: tuple[float, float, float, float], cells: int, colour: str) -> None:
    """Draw a grid of ``cells`` x ``cells`` within ``box``: top, left, bottom, right."""
    top, left, bottom, right = box
    axes.hlines(np.linspace(top, bottom, cells + 1), left, right, color=colour, linewidth=0.8)
    axes.vlines(np.linspace(left, right, cells + 1), top, bottom, color=colour, linewidth=0.8)


def main() -> None:
    args = parse_args()
    view = lesion_view(args.seed)
    image, grid = view.images[0, 0], args.grid
    height, width = image.shape
    scale = np.array([height, width, height, width])
    overview = grid_side(args.max_visual_tokens, 1, grid)
    beside = grid_side(args.max_visual_tokens, 1, grid, ROI_SIDE**2)
    _, (row, column) = center_crop(torch.zeros(1, 1, grid, grid), ROI_SIDE)
    centre, extent = (v[0].numpy() for v in roi_extent(view.roi[:1], (grid, grid), ROI_SIDE))
    whole = (0.0, 0.0, float(height), float(width))
    crop = tuple(np.array([row, column, row + ROI_SIDE, column + ROI_SIDE]) / grid * scale)
    roi = tuple(np.concatenate([centre - extent / 2, centre + extent / 2]) * scale)

    figure = Figure(figsize=(13, 3.9), dpi=110, layout="constrained")
    blue, orange = "deepskyblue", "orange"
    lesion = f"{beside} × {beside} + {ROI_SIDE} × {ROI_SIDE} = {beside**2 + ROI_SIDE**2} tokens"
    pooled = f"{overview} × {overview} = {overview**2} tokens\n(max_visual_tokens {args.max_visual_tokens})"
    panels = [
        (f"features: {grid} × {grid}", [(whole, grid, blue)]),
        (pooled, [(whole, overview, blue)]),
        (f"roi_policy centre, roi_side {ROI_SIDE}:\n{ROI_SIDE**2} tokens", [(crop, ROI_SIDE, blue)]),
        (f"roi_policy lesion, roi_side {ROI_SIDE}:\n{lesion}", [(whole, beside, blue), (roi, ROI_SIDE, orange)]),
    ]
    for axes, (title, grids) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(image, cmap="gray")
        axes.set(xlim=(-2, width + 2), ylim=(height + 2, -2))
        for box, cells, colour in grids:
            draw_cells(axes, box, cells, colour)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(f"written: {args.out}", flush=True)


if __name__ == "__main__":
    run_main(main)
