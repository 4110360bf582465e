"""Reports of phantom findings: sections, wording, keys. That the labeller reads them is tested in test_labeller.py."""

from __future__ import annotations

import numpy as np
import pytest

from config.errors import InputError
from data.phantom.finding import LESION_TYPES, Finding
from data.phantom.report import finding_keys, write_report

NODULE = Finding("nodule", "right", "upper", 12)
EFFUSION = Finding("effusion", "left", "lower", 25)


def test_same_seed_same_words_and_wording_varies() -> None:
    texts = [write_report([NODULE], np.random.default_rng(seed)) for seed in range(60)]
    assert texts == [write_report([NODULE], np.random.default_rng(seed)) for seed in range(60)]
    assert len(set(texts)) > 25


@pytest.mark.parametrize("kind", LESION_TYPES)
def test_single_finding_report_is_compact_and_has_four_sections(kind: str) -> None:
    for seed in range(50):
        finding = Finding(kind, "left", "lower" if kind == "effusion" else "middle", 33)
        text = write_report([finding], np.random.default_rng(seed))
        assert 45 <= len(text) <= 110
        places = [text.index(h) for h in ("所见：", "结论：", "建议：", "病理倾向：")]
        assert places == sorted(places)


def test_no_report_denies_an_effusion_that_it_describes() -> None:
    for seed in range(200):
        chinese = write_report([EFFUSION], np.random.default_rng(seed))
        assert "未见胸腔积液" not in chinese and "胸腔未见积液" not in chinese
        assert "No pleural effusion" not in write_report([EFFUSION, NODULE], np.random.default_rng(seed), "en")


def test_keys_are_canonical() -> None:
    assert finding_keys([NODULE, EFFUSION]) == "右肺上野·结节·12mm；左侧·胸腔积液·25mm"
    assert finding_keys([]) == "未见异常"
    with pytest.raises(InputError, match="language 'fr'"):
        finding_keys([], "fr")
