"""What both tables together decide before a training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from config.schema import build_config
from data.segmentation_scores import ComparedCase
from data.tables.caption_table import CaptionRow
from engine.loaders import resolve_views
from engine.segmentation import SegmentedCache


class Segmented(SegmentedCache):
    """Cases of one lesion each, found at its full volume (mm3), which the name of the image says."""

    def __init__(self) -> None:
        self.checkpoint, self.held_out = Path("fold_0/checkpoint_best.pth"), {}

    def get(self, image_path: Path, mask_path: Path | None = None) -> SimpleNamespace:
        volume = float(image_path.stem)
        compared = ComparedCase(0.9, ((volume, True),), ((volume, volume),)) if mask_path else None
        return SimpleNamespace(compared=compared, findings=("a lesion",), lesions_from="segmentation")


def rows(*volumes: int, masks: bool = True) -> list[CaptionRow]:
    mask = Path("mask.nii.gz") if masks else None
    return [CaptionRow(n, Path(f"{volume}.nii"), "", "", mask) for n, volume in enumerate(volumes, start=2)]


@pytest.mark.parametrize("masks_to_validate", [True, False])
def test_specks_are_chosen_on_the_masks_of_both_tables(masks_to_validate: bool) -> None:
    """Each of a few validation cases may happen to have a large lesion: by them alone, 500 mm3 would lose none."""
    tables = {"train": rows(150, *[900] * 40), "val": rows(900, 700, masks=masks_to_validate)}
    config = resolve_views(build_config({"slices": 1}, "test"), Segmented(), tables)
    assert config.min_lesion_mm3 == 100
