"""For each sentence that states a finding: the map of where the model looked, and whether that is the lesion.

The pointing game (Zhang et al. 2018): the largest value of a map lies in a cell of the feature grid that holds voxels
of the lesion, or not. Only sentences about a lesion that is there, and that the model was shown, are played.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor

from data.imaging.reader import read_mask, read_volume
from data.imaging.volume import Volume
from data.lesions import MeasuredLesion
from data.report_language.labeller import FindingMention
from engine.evaluation.attribution import attribution_maps
from engine.evaluation.calibration import split_sentences
from engine.evaluation.conditions import EvaluatedTable
from engine.evaluation.confidence import Statement
from engine.evaluation.heat_maps import FramedGrid, draw_heat, write_heat
from engine.evaluation.localisation import MaskedCase
from engine.evaluation.report_writer import ReportWriter, token_spans


@dataclass(frozen=True)
class Looked:
    """One sentence. ``hit``: None where the game is not played, then ``why`` says so; ``chance``: share of cells that
    hold the lesion; ``heat``: (K, T, T)."""

    sentence: int
    text: str
    heat: np.ndarray
    hit: bool | None
    chance: float
    why: str = ""


@dataclass(frozen=True)
class LookedCase:
    """What is needed to play and to draw one case."""

    volume: Volume | None
    labels: np.ndarray | None
    grid: FramedGrid
    looked: list[Looked]


def look_at_case(
    writer: ReportWriter,
    table: EvaluatedTable,
    row: int,
    batch: Mapping[str, Any],
    record: Mapping[str, Any],
    said: Sequence[Statement],
    masked: MaskedCase | None,
    names: Mapping[int, str] | None,
    baseline: Tensor,
    method: str,
) -> LookedCase:
    """Maps of the sentences of one report that state a finding as present or possible.

    Args:
        batch: of this case alone.
        record: of its report, with ``ids``.
        said: its statements.
        masked: its lesions, where it has a mask.
        names: of the mask's labels, where they are known.
        baseline: mean features (K, C, T, T).
    """
    caption = table.data.rows[row]
    stated = [s for s in said if s.mention.polarity != "absent" and s.mention.section != "impression"]
    stated = stated or [s for s in said if s.mention.polarity != "absent"]
    numbers = sorted({s.sentence for s in stated})
    spans = token_spans(writer.tokenizer, record["ids"])
    words = [[w for s in stated if s.sentence == n for w in s.words] for n in numbers]
    touched = [[k for k, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in w)] for w in words]
    maps = attribution_maps(writer.model, batch, record["ids"], touched, baseline, method).numpy()
    cached = table.data.cache.get(caption.image_path, caption.mask_path)
    shape = tuple(baseline.shape[i] for i in (0, 2, 3))
    grid = FramedGrid.of(table.data.view_selection, cached, shape, cached.axcodes)
    volume = labels = None
    if caption.mask_path is not None:
        volume = read_volume(caption.image_path)
        labels = read_mask(caption.mask_path, volume)
    pieces = split_sentences(record["text"])
    looked = []
    for number, heat in zip(numbers, maps, strict=True):
        mentions = [s.mention for s in stated if s.sentence == number]
        hit, chance, why = _point(heat, mentions, masked, labels, names, grid, volume)
        looked.append(Looked(number, pieces[number].strip(), heat, hit, chance, why))
    return LookedCase(volume, labels, grid, looked)


def save_maps(folder: Path, name: str, case: LookedCase, image: Path) -> Path | None:
    """Write ``NAME_sentence1.nii.gz`` … and ``NAME.png``; the picture, or None where the report states nothing."""
    if not case.looked:
        return None
    volume = case.volume or read_volume(image)
    heats = [case.grid.lay_over(one.heat) for one in case.looked]
    for number, heat in enumerate(heats, 1):
        write_heat(folder / f"{name}_sentence{number}.nii.gz", heat, volume)
    marks = {True: "hit", False: "miss", None: "not played"}
    titles = [f"{one.text[:24]}\n{marks[one.hit]}" for one in case.looked]
    draw_heat(folder / f"{name}.png", volume, heats, titles, case.labels)
    return folder / f"{name}.png"


def _point(
    heat: np.ndarray,
    mentions: Sequence[FindingMention],
    masked: MaskedCase | None,
    labels: np.ndarray | None,
    names: Mapping[int, str] | None,
    grid: FramedGrid,
    volume: Volume | None,
) -> tuple[bool | None, float, str]:
    """Hit or miss, share of cells that would hit, and why the game is not played."""
    if masked is None or labels is None or volume is None:
        return None, float("nan"), "no mask"
    if masked.problem:
        return None, float("nan"), "the lesions could not be measured"
    meant = [lesion for lesion in masked.lesions if any(_means(m, lesion, names) for m in mentions)]
    if not meant:
        return None, float("nan"), "the lesion that it states is not in the mask"
    cells = grid.cells_of(_solid(labels, meant))
    if not cells.any():
        return None, float("nan"), "the lesion lies in no slice that the model was shown"
    return bool(cells.flat[int(heat.argmax())]), float(cells.mean()), ""


def _means(mention: FindingMention, lesion: MeasuredLesion, names: Mapping[int, str] | None) -> bool:
    if names and lesion.label in names and names[lesion.label] != mention.finding:
        return False
    side = mention.side is None or mention.side in (lesion.side, "bilateral")
    return side and (mention.zone is None or mention.zone == lesion.zone)


def _solid(labels: np.ndarray, lesions: Sequence[MeasuredLesion]) -> np.ndarray:
    """Voxels of the components that hold these lesions."""
    solid = np.zeros(labels.shape, bool)
    for label in {lesion.label for lesion in lesions}:
        parts, count = ndimage.label(labels == label, np.ones((3, 3, 3), bool))
        centres = ndimage.center_of_mass(labels == label, parts, range(1, count + 1))
        wanted = [(x.z, x.y, x.x) for x in lesions if x.label == label]
        for number, centre in enumerate(centres, 1):
            if any(np.allclose(centre, other, atol=1e-3) for other in wanted):
                solid |= parts == number
    return solid
