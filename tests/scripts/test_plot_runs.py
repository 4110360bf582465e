"""The script that draws the curves of trainings."""

from __future__ import annotations

import sys

import pytest

from scripts import plot_runs
from tests.engine.training.test_curves import write_log


def test_a_folder_of_runs_becomes_a_figure_and_a_page(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "a", [0.9, 0.4])
    write_log(tmp_path / "b", [])
    monkeypatch.setattr(sys, "argv", ["plot_runs.py", str(tmp_path), "--out", str(tmp_path / "out")])
    plot_runs.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a: lowest val_loss 0.400000 at epoch 1, 2 validations", "b: no epoch yet, 0 validations"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "curves.html"}


def test_it_needs_a_place(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot_runs.py"])
    with pytest.raises(SystemExit):
        plot_runs.parse_args()
