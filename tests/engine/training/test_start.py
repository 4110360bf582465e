"""Which checkpoint a Stage-2 training starts from, and what is refused before anything large is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from config.errors import InputError
from engine.training import start
from engine.training.start import FINAL_FILE, find_start, rank_of, validate_best

DIAGNOSTICS = {"token_std": 0.001, "effective_rank": 1.2}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What every path holds."""
    checkpoint = SimpleNamespace(collapsed=False, diagnostics=DIAGNOSTICS, adapters=None, path=None)

    def load(path: Path) -> SimpleNamespace:
        checkpoint.path = path
        return checkpoint

    monkeypatch.setattr(start, "load_checkpoint", load)
    return checkpoint


def flags(**given: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"vision_checkpoint": None, "from_scratch": False, "allow_collapsed": False, "resume": "auto", **given}
    )


def test_the_named_checkpoint_comes_before_the_last_result(loaded: SimpleNamespace, tmp_path: Path) -> None:
    assert find_start(flags(), tmp_path) is None
    (tmp_path / FINAL_FILE).write_bytes(b"")
    assert find_start(flags(), tmp_path).path == tmp_path / FINAL_FILE
    assert find_start(flags(from_scratch=True), tmp_path) is None
    assert find_start(flags(vision_checkpoint=tmp_path / "a.pt"), tmp_path).path == tmp_path / "a.pt"


def test_a_collapsed_checkpoint_is_refused_unless_insisted_on(loaded: SimpleNamespace, tmp_path: Path) -> None:
    loaded.collapsed, one = True, tmp_path / "a.pt"
    with pytest.raises(
        InputError, match=r"stamped as collapsed \(token_std 0.001, effective rank 1.2\).*--from_scratch"
    ):
        find_start(flags(vision_checkpoint=one), tmp_path)
    assert find_start(flags(vision_checkpoint=one, allow_collapsed=True), tmp_path) is loaded


def test_rank_of_the_adapters(loaded: SimpleNamespace) -> None:
    assert rank_of(None) == rank_of(loaded) == 0
    loaded.adapters = {"rank": 4, "layers": {}}
    assert rank_of(loaded) == 4


@pytest.mark.parametrize(("findings", "kept"), [(("nodule",), False), (("nodule", "cavity"), True)])
def test_a_best_checkpoint_with_other_findings_cannot_be_compared(
    findings: tuple[str, ...], kept: bool, loaded: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, lm = SimpleNamespace(patch_size=(8, 8)), SimpleNamespace(width=16, adapters="")
    loaded.preprocess_plan, loaded.llm, loaded.findings = plan, {"width": 16}, ["nodule"]
    loaded.config = SimpleNamespace(slices=1)
    for name in ("step", "epoch", "val_loss"):
        setattr(loaded, name, 3)
    loaded.build_vision = lambda: nn.Identity()
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, device="cpu", print=print)
    best, saved = tmp_path / "best.pt", []
    best.write_bytes(b"")
    statistics = SimpleNamespace(to_dict=dict)
    validate_best(
        accelerator, loaded, best, plan, lm, None, findings,
        lambda model: (1.0, statistics), lambda name, **_: saved.append(name),
    )  # fmt: skip
    assert (tmp_path / "best.previous.pt").is_file() is kept is ("of another training" in capsys.readouterr().out)


def test_a_run_that_was_killed_after_its_last_checkpoint_goes_on_from_where_it_began(
    loaded: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FINAL_FILE).write_bytes(b"")
    for began in (None, str(tmp_path / "first.pt")):
        monkeypatch.setattr(start, "started_from", lambda path, began=began: {"start": began, "lr": 1e-5})
        found = find_start(flags(), tmp_path)
        assert found is None if began is None else found.path == Path(began)
        assert find_start(flags(resume="never"), tmp_path).path == tmp_path / FINAL_FILE
