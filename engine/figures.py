"""Pictures of a case for people: the slice that the model sees, in lung window, the lesion outlined."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.imaging.reader import read_mask, read_volume

LUNG_WINDOW_HU = (-1350, 150)


def draw_case(image: Path, mask: Path | None, target: Path) -> None:
    """Write ``target`` (PNG): the axial slice with most lesion, or the middle one, patient's left on the right.

    Raises:
        InputError: the image or the mask cannot be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    volume = read_volume(image)
    lesion = read_mask(mask, like=volume) if mask else np.zeros(volume.array.shape, np.uint8)
    area = (lesion > 0).sum((1, 2))
    index = int(area.argmax()) if area.any() else len(area) // 2
    height_mm, width_mm = (n * s for n, s in zip(volume.array.shape[1:], volume.spacing[1:], strict=True))
    figure, axes = plt.subplots(figsize=(4, 4 * height_mm / width_mm), dpi=130)
    axes.set_position((0, 0, 1, 1))
    low, high = LUNG_WINDOW_HU
    axes.imshow(volume.array[index], cmap="gray", vmin=low, vmax=high)
    axes.set_aspect(volume.spacing[1] / volume.spacing[2])
    if area.any():
        axes.contour(lesion[index] > 0, [0.5], colors="red", linewidths=0.6)
    axes.axis("off")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    plt.close(figure)
