"""Figures of cases, and the contact sheet: the page that shows a person what the model will see.

    OUT/contact_sheet.html     all cases, each with its figure, its report and its problems
    OUT/contact_sheet.png      the first cases in one figure
    OUT/cases/train_0002.png   one case: lung window, soft tissue, a coronal view, and the encoder's own input

Figures are in radiological view: the patient's right on the left, marked R and L.
"""

from __future__ import annotations

import html
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config.files import write_text
from data.checks.data_check import CheckedImage
from data.checks.problems import Problem
from data.imaging.volume import LUNG_WINDOW_HU, SOFT_TISSUE_WINDOW_HU, Volume
from data.report_language.labeller import label_report
from data.segmentation_scores import ComparedCase, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IN_ONE_FIGURE = 12
_COLOURS = {"error": "#b00020", "warning": "#b26a00", "note": "#666666"}
_CJK_FONTS = ("Microsoft YaHei", "SimHei", "Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "WenQuanYi Zen Hei",
              "WenQuanYi Micro Hei", "Noto Sans SC", "SimSun", "Droid Sans Fallback")  # fmt: skip
_STYLE = """body{font:15px/1.5 sans-serif;margin:1.5em;max-width:1300px}img{max-width:100%}
section{border-top:1px solid #bbb;padding:.8em 0}pre{white-space:pre-wrap;font:inherit;margin:.3em 0}"""

Range, Sides = tuple[float, float], tuple[str, str]


@dataclass(frozen=True)
class ModelView:
    """The encoder's input. ``planes``: (K, H, W); ``grey``: the values shown black and white; ``slices``: their
    indices in the scan; ``sides``: what lies left and right on a plane."""

    planes: np.ndarray
    grey: Range
    slices: list[int]
    sides: Sides


def draw_case(
    target: Path, volume: Volume, mask: np.ndarray | None, view: ModelView | None = None, text: str = ""
) -> None:
    """Write one case as PNG: the slice of ``view``, or the one with most lesion, or the middle one.

    Args:
        volume: read as LPS.
        mask: labels (z, y, x), outlined.
        text: shown beside the slices.
    """
    from matplotlib.figure import Figure

    array, (dz, dy, dx) = volume.array, volume.spacing
    lesion = np.zeros(array.shape, bool) if mask is None else mask > 0
    area = lesion.sum(axis=(1, 2))
    shown = view.slices if view else [int(area.argmax()) if area.any() else len(area) // 2]
    index = max(shown, key=lambda z: (area[z], -abs(z - shown[len(shown) // 2])))
    row = int(np.nonzero(lesion)[1].mean()) if area.any() else array.shape[1] // 2
    planes = list(view.planes[:2]) if view else []
    panels = 3 + len(planes) + bool(text)
    figure = Figure(figsize=(3 * panels, 3.2), dpi=80)
    margins = {"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.92, "wspace": 0.03}  # a layout engine takes longer
    axes = figure.subplots(1, panels, gridspec_kw=margins)
    for axis, window, name in ((axes[0], LUNG_WINDOW_HU, "lung"), (axes[1], SOFT_TISSUE_WINDOW_HU, "soft tissue")):
        _show(axis, array[index], window, f"{name}, slice {index + 1}/{len(array)}", dy / dx)
        if area[index]:
            axis.contour(lesion[index], [0.5], colors="red", linewidths=0.8)
    _show(axes[2], array[::-1, row], LUNG_WINDOW_HU, "coronal, head up", dz / dx)
    axes[2].axhline(len(array) - 1 - index, color="yellow", linewidth=0.6)
    for axis, plane in zip(axes[3:], planes, strict=False):
        _show(axis, plane, view.grey, "the encoder's input", 1.0, view.sides)
    if text:
        _write(axes[-1], text)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def draw_segmentation(target: Path, cases: Sequence[ComparedCase], least: float) -> None:
    """Write what masks say of a segmentation: Dice of the cases, and lesions found and missed by size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist([case.dice for case in cases if case.dice is not None], bins=np.linspace(0, 1, 21), color="#4c78a8")
    left.set(xlabel="Dice of a case", ylabel="cases", xlim=(0, 1))
    lesions = [(size, volume > 0 and volume >= least) for case in cases for size, volume in case.true]
    diameters = [2 * (3 * size / (4 * np.pi)) ** (1 / 3) for size, _ in lesions]
    edges = np.linspace(0, max(diameters, default=1) * 1.01, 13)
    groups = [
        [d for d, (_, found) in zip(diameters, lesions, strict=True) if found is wanted] for wanted in (True, False)
    ]
    right.hist(groups, bins=edges, stacked=True, color=["#4c78a8", "#f58518"], label=["found", "missed"])
    right.set(xlabel="diameter of a ball of the lesion's volume (mm)", ylabel="lesions of the masks")
    right.legend()
    false = scores(cases, least).false_lesions
    figure.suptitle(f"nnU-Net's segmentation beside {len(cases)} masks; {false:.2f} false lesions a case", fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def cjk_font() -> str | None:
    """A font of this machine that has Chinese characters."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CJK_FONTS if name in installed), None)


def write_sheet(cases: list[tuple[CheckedImage, str, Path | None]], problems: list[Problem], out: Path) -> Path:
    """Write the page, and the first cases in one figure; ``cases``: check, table, figure. Returns the page."""
    by_row: dict[tuple[str, int], list[Problem]] = defaultdict(list)
    for problem in problems:
        by_row[problem.table, problem.row].append(problem)
    head = f"<!doctype html><meta charset='utf-8'><title>Contact sheet</title><style>{_STYLE}</style>"
    parts = [head, "<h1>Contact sheet</h1>", _listed([problem for problem in problems if problem.row == 0])]
    for checked, table, figure in cases:
        row = checked.row
        shown = f"<img loading='lazy' src='{figure.relative_to(out).as_posix()}'>" if figure else ""
        parts.append(
            f"<section><h3>{table}, row {row.number}: {html.escape(str(row.image_path))}</h3>"
            f"{html.escape(_facts(checked))}{_listed(by_row[table, row.number])}{shown}"
            f"<pre><b>{html.escape(row.question)}</b></pre><table><tr><td><pre>{html.escape(row.answer)}</pre></td>"
            f"<td>read from the report:{_mined(row.answer)}</td></tr></table></section>"
        )
    if figures := [figure for _, _, figure in cases if figure][:_IN_ONE_FIGURE]:
        _stack(figures, out / "contact_sheet.png")
    page = out / "contact_sheet.html"
    write_text(page, "\n".join(parts))
    return page


def _show(axis: Axes, plane: np.ndarray, grey: Range, title: str, aspect: float, sides: Sides = ("R", "L")) -> None:
    axis.imshow(plane, cmap="gray", vmin=grey[0], vmax=grey[1], aspect=aspect)
    axis.set_title(title, fontsize=8, pad=2)
    for place, side, align in ((0.02, sides[0], "left"), (0.98, sides[1], "right")):
        axis.text(place, 0.5, side, color="yellow", fontsize=9, ha=align, va="center", transform=axis.transAxes)
    axis.axis("off")


def _write(axis: Axes, text: str) -> None:
    """A wrapped text; lines in Chinese only where a font has the characters."""
    font = cjk_font()
    parts = text[:500].split("\n")
    if font is None:
        hidden = "(no Chinese font on this machine: see the page)"
        parts = [hidden if any(ord(character) > 0x2E7F for character in part) else part for part in parts]
    lines = [line for part in parts for line in (textwrap.wrap(part, 24 if font else 40) or [""])]
    axis.text(0, 1, "\n".join(lines[:18]).replace("$", r"\$"), va="top", fontsize=8, family=font or "sans-serif")
    axis.axis("off")


def _facts(checked: CheckedImage) -> str:
    if checked.header is None:
        return ""
    z, y, x = checked.header.extent_mm
    shape = " x ".join(map(str, checked.header.shape))
    return f"{shape} voxels, {x:.0f} x {y:.0f} x {z:.0f} mm, stored as {checked.header.axcodes}"


def _mined(report: str) -> str:
    found = [f"{finding.section or 'text'}: {finding.describe()}" for finding in label_report(report)]
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in found or ["no finding"]) + "</ul>"


def _stack(figures: list[Path], target: Path) -> None:
    """Figures one below the other, padded with white to one width."""
    from matplotlib import image

    strips = [image.imread(figure)[..., :3] for figure in figures]
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(s, ((0, 6), (0, width - s.shape[1]), (0, 0)), constant_values=1) for s in strips]
    image.imsave(target, np.concatenate(padded))


def _listed(problems: list[Problem]) -> str:
    lines = "".join(
        f"<li style='color:{_COLOURS[problem.level]}'>{problem.level}: {html.escape(problem.problem)}"
        f"{'; ' if problem.remedy else ''}{html.escape(problem.remedy)}</li>"
        for problem in problems
    )
    return f"<ul>{lines}</ul>" if lines else ""
