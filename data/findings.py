"""One record for a finding, wherever it comes from: stated in a report, or measured on a mask or a segmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

LESION = "lesion"  # a finding of a kind that is not known: what a network of one class segments

Source = Literal["report", "generated", "mask", "segmentation", "predicted"]
LABELS = 8  # of a segmentation that a lesion's descriptors tell apart
DESCRIPTORS = 14 + LABELS  # numbers of :meth:`FindingRecord.descriptors`


@dataclass(frozen=True)
class Measurement:
    """What is measured on labels. ``z, y, x``: centre of mass in voxels of the scan; ``z`` from the lowest slice.

    ``label``: value in the mask; ``mean_hu``: None where the scan was not at hand, and so are ``hu``, the percentiles
    5, 50 and 95, and ``rim_hu``, the mean of the two voxels around it in plane. ``thick_mm``: diameter of the widest
    disc inside it; ``height_mm``: extent along z. ``level``, ``across``, ``depth``: the centre in the box of the lungs,
    0 lowest, rightmost, foremost, 1 highest, leftmost, hindmost; None without lungs.
    """

    label: int
    volume_mm3: float
    mean_hu: float | None
    z: float
    y: float
    x: float
    hu: tuple[float, float, float] | None = None
    rim_hu: float | None = None
    thick_mm: float = 0.0
    height_mm: float = 0.0
    level: float | None = None
    across: float | None = None
    depth: float | None = None


@dataclass(frozen=True)
class FindingRecord:
    """A finding at one place; None where nothing is known. ``source``: who says so."""

    finding: str  # one of data.report_language.terms.FINDINGS, or LESION
    polarity: str = "present"  # present, absent or uncertain; a lesion that has become smaller is present
    side: str | None = None  # left, right, bilateral
    lobe: str | None = None  # upper (the lingula too), middle, lower
    zone: str | None = None  # upper, middle, lower: the craniocaudal level, as in 上野, upper zone, apex
    size_mm: float | None = None  # stated: largest extent, of a range its upper end; measured: longest axial diameter
    size_low_mm: float | None = None  # lower end of a stated range
    short_mm: float | None = None  # smallest extent of this size; None where only the long axis or a bound is stated
    count: int | None = None  # 0 for "several"
    change: str | None = None  # smaller, larger, stable, new, resolved (then the polarity is absent)
    source: Source = "report"
    section: str = ""  # of the report; "" before the first heading
    start: int = 0  # span of the finding's word in the text
    end: int = 0
    measured: Measurement | None = None
    probability: float | None = None  # of a predicted finding, calibrated

    @property
    def level(self) -> str | None:
        """Craniocaudal level: the zone or, failing that, the lobe."""
        return self.zone or self.lobe

    def describe(self) -> str:
        """One line for people: ``right upper zone, lesion 12 mm, 0.9 ml, mean -35 HU``."""
        place = " ".join(word for word in (self.side, self.zone and f"{self.zone} zone") if word)
        lobe = f"{self.lobe} lobe" if self.lobe else ""
        size = f" {self.size_mm:.0f} mm" if self.size_mm is not None else ""
        count = {None: "", 0: "several", 1: ""}.get(self.count, f"{self.count} parts")
        polarity = "" if self.polarity == "present" else self.polarity
        sure = f"probability {self.probability:.2f}" if self.probability is not None else ""
        parts = [place, lobe, f"{self.finding}{size}", polarity, count, self.change, sure]
        if self.measured:
            parts.append(f"{self.measured.volume_mm3 / 1000:.2g} ml")
            parts += [f"mean {self.measured.mean_hu:.0f} HU"] if self.measured.mean_hu is not None else []
        return ", ".join(part for part in parts if part)

    def descriptors(self) -> list[float]:
        """Label, place, size, shape and density of a measured lesion as :data:`DESCRIPTORS` numbers of about unit size;
        the last is 1, so that a row of zeros is no lesion. What is not known is 0."""
        m = self.measured
        density = [*(m.hu or (0.0, 0.0, 0.0)), m.mean_hu or 0.0, m.rim_hu or 0.0]
        lengths = [self.size_mm or 0.0, m.thick_mm, m.height_mm, m.volume_mm3 ** (1 / 3)]
        place = [0.0 if value is None else 2 * value - 1 for value in (m.level, m.across, m.depth)]
        shape = [math.log(max(length, 1.0) / 15) for length in lengths]
        label = [float(m.label == value) for value in range(1, LABELS + 1)]  # a network may know the kinds of lesions
        return [*label, *place, *shape, *(hu / 400 for hu in density), math.log1p(self.count or 1) - 1, 1.0]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without what is at its default."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> FindingRecord:
        """From :meth:`to_dict`."""
        measured = stored.get("measured")
        if measured:
            hu = measured.get("hu")
            measured = Measurement(**{**measured, "hu": tuple(hu) if hu else None})
        return cls(**{**stored, "measured": measured})
