"""What the scripts share: where a checkpoint is looked for, and what the flags change in a configuration."""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from config.errors import InputError
from config.schema import load_config
from config.toy_models import STAMP
from engine.cli import (
    CHECKPOINTS,
    add_training_flags,
    add_view_flag,
    clock_time,
    config_from,
    find_checkpoint,
    hours_from_now,
    local_config,
    run_main,
)

Capture = pytest.CaptureFixture[str]


def paths_yaml(folder: Path, **keys: str) -> Path:
    path = folder / "paths.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()), encoding="utf-8")
    return path


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_view_flag(parser)
    add_training_flags(parser, epochs=1, batch_size=1, lr=1e-4)
    return parser.parse_args(flags)


def test_the_checkpoint_of_the_latest_stage_is_found_and_printed(tmp_path: Path, capsys: Capture) -> None:
    config = paths_yaml(tmp_path, output_dir=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    for name in reversed(CHECKPOINTS):
        (tmp_path / "out" / name).touch()
        assert find_checkpoint(config) == tmp_path / "out" / name
        assert capsys.readouterr().out == f"checkpoint: {tmp_path / 'out' / name}\n"


def test_without_a_checkpoint_the_message_says_which_commands_make_one(tmp_path: Path) -> None:
    message = r"no checkpoint in .*out: .*python train\.py .*python train_vlm\.py"
    with pytest.raises(InputError, match=message) as caught:
        find_checkpoint(paths_yaml(tmp_path, output_dir=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)


def test_mamba_model_overrides_the_key_in_training_and_of_a_checkpoint(tmp_path: Path) -> None:
    file = paths_yaml(tmp_path, mamba_model="named/in-the-file", caption_csv_train="a.csv", slices="3")
    assert config_from(parse("--config", str(file))).mamba_model == "named/in-the-file"
    args = parse("--config", str(file), "--mamba_model", "named/by-the-flag")
    assert config_from(args).mamba_model == "named/by-the-flag"
    trained = load_config(None, slices=2)
    here = local_config(args, trained)
    assert (here.mamba_model, Path(here.caption_csv_train).name, here.slices) == ("named/by-the-flag", "a.csv", 2)
    assert local_config(parse(), trained) == trained


def test_training_with_a_toy_model_and_own_tables_is_refused_unless_allowed(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text(json.dumps({STAMP: True}), encoding="utf-8")
    flags = ["--config", str(paths_yaml(tmp_path, caption_csv_train="own.csv")), "--mamba_model", str(tmp_path / "toy")]
    with pytest.raises(InputError, match="^mamba_model .*set mamba_model: state-spaces/mamba-2.8b-hf"):
        config_from(parse(*flags))
    config_from(parse(*flags, "--allow_toy_model"))
    assert capsys.readouterr().out.startswith("warning: mamba_model")


def test_a_time_of_day_is_the_next_one_and_hours_start_now():
    now = datetime.now().replace(second=0, microsecond=0)
    for minutes in (-2, 3, 90):
        until = now + timedelta(minutes=minutes)
        expected = until if minutes > 0 else until + timedelta(days=1)
        assert clock_time(f"{until:%H:%M}") == expected.timestamp()
    assert hours_from_now("1.5") == pytest.approx(time.time() + 5400, abs=5)


def test_a_file_where_a_folder_is_needed_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: (tmp_path / "file" / "out").mkdir(parents=True))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "file") in printed and "name a folder" in printed
