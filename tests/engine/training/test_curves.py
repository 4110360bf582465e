"""Runs read from their logs: what counts of a resumed run, what is refused, what the page shows."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

import pytest

from config.errors import InputError
from engine.training.curves import draw_runs, find_runs, read_run, write_page


def write_log(folder: Path, losses: list[float], stage: str = "stage1", **flags: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{stage}_log.jsonl"
    loss = {"stage1": "train_loss", "stage2": "caption_loss"}[stage]
    records = [{"event": "step", "step": 10, "epoch": 1, loss: 1.5, "lr": 1e-3}]
    for epoch, value in enumerate(losses):
        shown = None if epoch == 0 else 2 * value
        records.append({"event": "epoch", "epoch": epoch, "step": 9 * epoch, loss: shown, "val_loss": value})
        records[-1] |= {"collapsed": value < 0.1, "token_std": 0.02, "image_std": 0.01, "effective_rank": 5.0}
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (folder / f"{stage}_run.json").write_text(json.dumps({"flags": flags}), encoding="utf-8")
    return log


def test_a_log_that_was_kept_is_read_without_flags(tmp_path):
    log = write_log(tmp_path, [0.9, 0.4], lr=1e-4)
    run = read_run(log.rename(log.with_name("stage1_log.previous.jsonl")), "a")
    assert len(run.epochs) == 2 and run.flags == {}


def test_a_run_is_read_with_its_flags_and_its_best_epoch_is_not_collapsed(tmp_path):
    run = read_run(write_log(tmp_path, [0.9, 0.4, 0.01, 0.6], lr=1e-4), "a")
    assert (len(run.steps), len(run.epochs), run.loss_name) == (1, 4, "train_loss")
    assert run.best["epoch"] == 1 and run.flags == {"lr": 1e-4}


def test_what_a_resumed_run_repeated_counts_once_and_a_line_cut_short_is_counted_as_damaged(tmp_path):
    log = write_log(tmp_path, [0.9, 0.4])
    again = {"event": "epoch", "epoch": 1, "step": 9, "train_loss": 0.7, "val_loss": 0.3, "collapsed": False}
    with log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(again) + "\n" + json.dumps(again)[:20])
        stream.write(json.dumps(again | {"epoch": 2}) + "\n")  # on the same line
    run = read_run(log, "a")
    assert [epoch["val_loss"] for epoch in run.epochs] == [0.9, 0.3] and run.damaged == 1
    log.write_text("step,epoch\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match="is not the log of a training"):
        read_run(log, "a")


def test_runs_are_found_in_folders_and_named_by_what_differs(tmp_path):
    write_log(tmp_path / "night" / "lr1_bs2", [0.5])
    write_log(tmp_path / "night" / "lr2_bs2", [0.5])
    assert [run.name for run in find_runs([tmp_path])] == ["lr1_bs2", "lr2_bs2"]
    alone = write_log(tmp_path / "night" / "lr2_bs2", [0.5], "stage2")
    names = ["lr1_bs2 stage1", "lr2_bs2 stage1", "lr2_bs2 stage2"]
    assert [run.name for run in find_runs([tmp_path / "night", alone])] == names, "none twice"
    assert [run.name for run in find_runs([alone])] == ["lr2_bs2"]
    with pytest.raises(InputError, match="no such file or folder"):
        find_runs([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no stage1_log.jsonl or stage2_log.jsonl in"):
        find_runs([tmp_path / "empty"])


def test_the_page_needs_no_other_file_and_names_every_run(tmp_path):
    name = "学习率 &b" if os.name == "nt" else "学习率 <b>"  # which Windows does not allow
    write_log(tmp_path / name, [0.9, 0.4, 0.6], lr=1e-4, batch_size=2, seed=42, epochs=3)
    write_log(tmp_path / "other", [0.8, 0.3], lr=2e-5, batch_size=4, epochs=9)
    write_log(tmp_path / "begun", [], lr=1e-5)
    runs = find_runs([tmp_path])
    write_page(tmp_path / "page.html", runs, "a night")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.escape(name) in page and name[-3:] not in page and "<b>" not in page and "<svg" in page
    assert not any(word in page for word in ("<script", "<img", "src=", "url(h"))
    rows = page.split("<tr")[2:]
    assert [row.split("<td>")[1].split("</td>")[0] for row in rows] == ["other", html.escape(name), "begun"]
    assert rows[0].startswith(" class=best") and "<td>0.3</td><td>1</td>" in rows[0] and "1 of 9" in rows[0]
    draw_runs(runs, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
