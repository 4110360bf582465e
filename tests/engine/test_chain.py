"""Steps that are kept or repeated, the configuration that they share, and the scores that are read from a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.schema import load_config
from engine import chain


def step(code: str, *words: str) -> chain.Step:
    return chain.Step("one", "title", ["-c", code, *words])


def test_a_step_is_kept_only_for_the_same_command_and_where_it_succeeded(tmp_path: Path) -> None:
    done = step("print('done')")
    seconds, ran = chain.run_step(done, tmp_path)
    assert ran and chain.run_step(done, tmp_path) == (seconds, False)
    assert chain.run_step(done, tmp_path, repeat=True)[1]
    assert chain.run_step(step("pass"), tmp_path)[1]
    for _ in range(2):
        with pytest.raises(SystemExit, match="3"):
            chain.run_step(step("raise SystemExit(3)"), tmp_path)


def test_a_step_is_repeated_with_another_configuration_and_so_are_those_after_it(tmp_path: Path) -> None:
    config = tmp_path / "paths.yaml"
    config.write_text("slices: 2", encoding="utf-8")
    steps = [step("pass", "--config", str(config)), step("pass")._replace(name="two")]
    chain.run_steps(steps, tmp_path)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "done").iterdir())]
    chain.run_steps(steps, tmp_path)
    assert times == [path.stat().st_mtime_ns for path in sorted((tmp_path / "done").iterdir())]
    config.write_text("slices: 3", encoding="utf-8")
    chain.run_steps(steps, tmp_path)
    assert all(
        path.stat().st_mtime_ns > time for path, time in zip(sorted((tmp_path / "done").iterdir()), times, strict=True)
    )


def test_given_keys_replace_those_of_the_configuration(tmp_path: Path) -> None:
    models = chain.Models(tmp_path / "net.pth", tmp_path / "lm")
    config = load_config(chain.write_paths_yaml(tmp_path, models, False, {"bridge_width": 64, "slice_policy": "mask"}))
    assert (config.bridge_width, config.slice_policy, config.bridge_depth) == (64, "mask", 1)
    assert not config.language_model_adapters


def test_main_scores_are_those_of_the_card_and_of_its_baselines(card: dict) -> None:
    found = chain.main_scores(card)
    assert (found["finding_acc"], found["exact_acc"], found["finding_macro_f1"]) == (0.5, 0.5, 0.75)
    assert found["shuffled"] == {"exact_acc": 0.25} and found["blank"] == {"finding_macro_f1": 0.1}
    nearest = found["baselines"]["nearest"]
    assert nearest["exact_acc"] == 0.25
    assert nearest["exact_acc_difference"] == {"value": 0.25, "interval": [0.1, 0.4]}
    assert chain.compared(found).splitlines()[0].split() == ["reports", "nearest"]
    assert json.dumps(found)
    assert chain.main_scores(card | {"baselines": None})["baselines"] == {}


def test_a_folder_of_any_name_is_read_back_from_the_configuration(tmp_path: Path) -> None:
    out = tmp_path / "run #2: 试验"
    file = chain.write_paths_yaml(out, chain.Models(out / "net.pth", out / "lm"))
    assert load_config(file).resolved("output_dir") == out
