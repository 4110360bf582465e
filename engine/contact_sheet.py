"""A page that shows a person what the model will see: per case its slices, the lesion, the report, the doubts.

    OUT/contact_sheet.html     all cases, each with its picture, its report and its problems
    OUT/contact_sheet.png      the first cases as one picture
    OUT/cases/train_0002.png   one case: lung window, soft tissue, a coronal view, and the encoder's own input

Pictures are in radiological view: the patient's right on the left, marked R and L.
"""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.checks.data_check import CheckedImage
from data.checks.problems import Problem

LUNG_HU, SOFT_HU = (-1350, 150), (-160, 240)
_ON_THE_PICTURE = 12
_COLOURS = {"error": "#b00020", "warning": "#b26a00", "note": "#666666"}
_CJK_FONTS = ("Microsoft YaHei", "SimHei", "Noto Sans CJK SC", "Source Han Sans SC", "PingFang SC", "WenQuanYi Zen Hei",
              "Noto Sans SC", "SimSun", "Droid Sans Fallback")  # fmt: skip
_STYLE = """body{font:15px/1.5 sans-serif;margin:1.5em;max-width:1300px}img{max-width:100%}
section{border-top:1px solid #bbb;padding:.8em 0}pre{white-space:pre-wrap;font:inherit;margin:.3em 0}"""


@dataclass(frozen=True)
class ModelView:
    """What the encoder is fed. ``planes``: (K, H, W); ``grey``: the values shown black and white; ``slices``: their
    indices in the scan; ``sides``: what lies left and right on a plane."""

    planes: np.ndarray
    grey: tuple[float, float]
    slices: list[int]
    sides: tuple[str, str]


def draw_case(checked: CheckedImage, view: ModelView | None, target: Path) -> None:
    """Write one case's picture. ``checked`` must hold its volume."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    array, spacing = checked.volume.array, checked.volume.spacing
    lesion = checked.mask if checked.mask is not None else np.zeros(array.shape, np.uint8)
    index = view.slices[len(view.slices) // 2] if view else middle_slice(lesion)
    planes = list(view.planes[:2]) if view else []
    figure, axes = plt.subplots(1, 4 + len(planes), figsize=(3 * (4 + len(planes)), 3.2), dpi=80)
    for axis, window, name in ((axes[0], LUNG_HU, "lung"), (axes[1], SOFT_HU, "soft tissue")):
        _show(
            axis, array[index], window, spacing[1] / spacing[2], ("R", "L"), f"{name}, slice {index + 1}/{len(array)}"
        )
        if lesion[index].any():
            axis.contour(lesion[index] > 0, [0.5], colors="red", linewidths=0.8)
    row = int(np.nonzero(lesion)[1].mean()) if lesion.any() else array.shape[1] // 2
    _show(axes[2], array[::-1, row], LUNG_HU, spacing[0] / spacing[2], ("R", "L"), "coronal, head up")
    axes[2].axhline(len(array) - 1 - index, color="yellow", linewidth=0.6)
    for axis, plane in zip(axes[3:], planes, strict=False):
        _show(axis, plane, view.grey, 1.0, view.sides, "the encoder's input")
    _write_report(axes[-1], checked)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(pad=0.4)
    figure.savefig(target)
    plt.close(figure)


def middle_slice(lesion: np.ndarray) -> int:
    """The slice with most lesion, or the middle one."""
    area = (lesion > 0).sum(axis=(1, 2))
    return int(area.argmax()) if area.any() else len(area) // 2


def write_sheet(cases: list[tuple[CheckedImage, str, Path | None]], problems: list[Problem], out: Path) -> Path:
    """Write the page and the picture of the first cases; ``cases``: check, table, picture. Returns the page."""
    general = [problem for problem in problems if problem.row == 0]
    parts = [f"<!doctype html><meta charset='utf-8'><title>Contact sheet</title><style>{_STYLE}</style>"]
    parts += ["<h1>Contact sheet</h1>", _listed(general)]
    by_row: dict[tuple[str, int], list[Problem]] = {}
    for problem in problems:
        by_row.setdefault((problem.table, problem.row), []).append(problem)
    for checked, table, picture in cases:
        row = checked.row
        facts = ""
        if checked.header is not None:
            z, y, x = checked.header.extent_mm
            shape = " x ".join(map(str, checked.header.shape))
            facts = f"{shape} voxels, {x:.0f} x {y:.0f} x {z:.0f} mm, stored as {checked.header.axcodes}"
        if checked.volume is not None:
            facts += f", values {checked.volume.array.min():.0f} to {checked.volume.array.max():.0f}"
        shown = f"<img loading='lazy' src='{picture.relative_to(out).as_posix()}'>" if picture else ""
        parts.append(
            f"<section><h3>{table}, row {row.number}: {html.escape(str(row.image_path))}</h3>{html.escape(facts)}"
            f"{_listed(by_row.get((table, row.number), []))}{shown}"
            f"<pre><b>{html.escape(row.question)}</b></pre><pre>{html.escape(row.answer)}</pre></section>"
        )
    out.mkdir(parents=True, exist_ok=True)
    page = out / "contact_sheet.html"
    page.write_text("\n".join(parts), encoding="utf-8")
    pictures = [picture for _, _, picture in cases if picture][:_ON_THE_PICTURE]
    if pictures:
        _stack(pictures, out / "contact_sheet.png")
    return page


def _show(
    axis, plane: np.ndarray, grey: tuple[float, float], aspect: float, sides: tuple[str, str], title: str
) -> None:  # noqa: ANN001
    axis.imshow(plane, cmap="gray", vmin=grey[0], vmax=grey[1], aspect=aspect)
    axis.set_title(title, fontsize=8, pad=2)
    for place, side, align in ((0.02, sides[0], "left"), (0.98, sides[1], "right")):
        axis.text(place, 0.5, side, color="yellow", fontsize=9, ha=align, va="center", transform=axis.transAxes)
    axis.axis("off")


def _write_report(axis, checked: CheckedImage) -> None:  # noqa: ANN001
    """Row, file and report beside the pictures; a Chinese report only where a font has its characters."""
    font = _cjk_font()
    texts = [f"row {checked.row.number}", checked.row.image_path.name, "", checked.row.answer]
    if font is None:
        hidden = "(no Chinese font on this machine: see the page)"
        texts = [hidden if any(ord(character) > 0x2E7F for character in text) else text for text in texts]
    text = "\n".join(texts)
    lines = [line for part in text[:500].split("\n") for line in (textwrap.wrap(part, 24 if font else 40) or [""])]
    axis.text(0, 1, "\n".join(lines[:18]).replace("$", r"\$"), va="top", fontsize=8, family=font or "sans-serif")
    axis.axis("off")


def _cjk_font() -> str | None:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CJK_FONTS if name in installed), None)


def _stack(pictures: list[Path], target: Path) -> None:
    """Pictures one below the other, padded with white to one width."""
    from matplotlib import image

    strips = [image.imread(picture)[..., :3] for picture in pictures]
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
