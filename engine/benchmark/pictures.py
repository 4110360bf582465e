"""Pictures of a suite: bars for things side by side, lines over the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

OURS, RIVAL, LIMIT = "#1f5fa8", "#b9b9b9", "#d98a1f"
_LINES = ("#1f5fa8", "#b0483a", "#6f6f6f", "#d98a1f", "#3d8a55", "#7b57a6")


@dataclass(frozen=True)
class Panel:
    """Either ``bars`` (name → value) or ``lines`` (name → {tokens: value}). Names starting with "ours" are ours,
    those starting with "limit" are limits of the machine."""

    title: str
    unit: str
    bars: Mapping[str, float] = field(default_factory=dict)
    lines: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    logarithmic: bool = True


def draw(panels: Sequence[Panel], title: str, target: Path) -> None:
    """Write ``target`` (PNG), the panels beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), dpi=120, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        (_draw_lines if panel.lines else _draw_bars)(axis, panel)
        axis.set_title(panel.title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def _draw_bars(axis: object, panel: Panel) -> None:
    names = list(panel.bars)[::-1]
    values = [panel.bars[name] for name in names]
    colours = [OURS if n.startswith("ours") else LIMIT if n.startswith("limit") else RIVAL for n in names]
    places = np.arange(len(names))
    axis.barh(places, values, color=colours, height=0.65)
    axis.set_yticks(places, names, fontsize=8)
    axis.set_xlabel(panel.unit, fontsize=9)
    if panel.logarithmic and min(values) > 0:
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 3, max(values) * 4)
    else:
        axis.set_xlim(0, max(values) * 1.2 or 1)
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:.3g}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _draw_lines(axis: object, panel: Panel) -> None:
    for colour, (name, points) in zip(_LINES * len(panel.lines), panel.lines.items(), strict=False):
        tokens = sorted(points)
        axis.plot(tokens, [points[n] for n in tokens], "o-", color=colour, label=name, markersize=4, linewidth=1.5)
    axis.set_xscale("log")
    if panel.logarithmic:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    ticks = sorted({n for points in panel.lines.values() for n in points})
    axis.set_xticks(ticks, [str(n) for n in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("tokens", fontsize=9)
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
