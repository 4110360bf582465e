"""What a chest CT may show, in the vocabulary shared by the phantom, its reports and their scores.

A patient is a list of :class:`Finding`; the empty list is a normal examination. Sides are the patient's.
Zones are the upper, middle and lower third of the z-extent of the lung on that side (not lobes: a third
can be told from an axial slice, a lobe cannot where fissures do not show).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

# The position in this tuple is the value of the lesion mask; 0 is background, and also "normal".
FINDING_TYPES = (
    "normal",
    "nodule",
    "cavity",
    "consolidation",
    "tree_in_bud",
    "fibrosis",
    "effusion",
    "calcification",
)
LESION_TYPES = FINDING_TYPES[1:]
SIDES = ("right", "left")
ZONES = ("upper", "middle", "lower")


@dataclass(frozen=True, order=True)
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

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)
