"""The plans of the small nnU-Net have what nnU-Net's own predictor reads."""

from __future__ import annotations

import json
from pathlib import Path

from config.nnunet_plans import PreprocessPlan
from scripts.make_tiny_nnunet import make_plans


def test_resampling_is_written_as_nnunet_writes_it(assets: Path) -> None:
    theirs = json.loads((assets / "nnunet_tiny" / "2d_plain" / "plans.json").read_text(encoding="utf-8"))
    intensity = theirs["foreground_intensity_properties_per_channel"]["0"]
    plans = make_plans(intensity, 2.8, [8, 24, 48, 96])
    ours, nnunets = plans["configurations"]["2d"], theirs["configurations"]["2d"]
    keys = [key for key in nnunets if key.startswith("resampling_fn")]
    assert len(keys) == 6 and {key: ours.get(key) for key in keys} == {key: nnunets[key] for key in keys}
    assert PreprocessPlan.from_nnunet(plans, "2d").spacing == (2.8, 2.8)
