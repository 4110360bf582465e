"""Findings of a phantom, in the vocabulary shared by its images and its reports.

Sides are the patient's. Zones are thirds of the z-extent of the lung on that side; lobes are not used, because an axial
slice without visible fissures does not show them.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.lesions import ZONES

# The position in this tuple is the value of the lesion mask; 0 is background, and also "normal".
FINDING_TYPES = ("normal", "nodule", "cavity", "consolidation", "tree_in_bud", "fibrosis", "effusion", "calcification")
LESION_TYPES = FINDING_TYPES[1:]
SIDES = ("right", "left")


@dataclass(frozen=True)
class Finding:
    """One lesion. ``size_mm`` is the longest axial diameter; for an effusion the greatest depth."""

    type: str
    side: str
    zone: str
    size_mm: int

    def __post_init__(self) -> None:
        for value, allowed in ((self.type, LESION_TYPES), (self.side, SIDES), (self.zone, ZONES)):
            if value not in allowed:
                raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
        if self.type == "effusion" and self.zone != "lower":
            raise ValueError("a free effusion is dependent: its zone is 'lower'")
        if self.size_mm <= 0:
            raise ValueError(f"size_mm must be positive, not {self.size_mm}")

    @property
    def mask_value(self) -> int:
        return FINDING_TYPES.index(self.type)
