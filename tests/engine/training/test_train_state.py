"""Which training state is resumed, and the order of an epoch."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from config.errors import InputError
from config.schema import build_config, load_config
from data.medical_vlm_dataset import CaptionCollator
from engine.loaders import build_loaders, load_encoder, prepare_data
from engine.run import EpochBatches
from engine.training.optimization import build_optimizer, build_schedule
from engine.training.train_state import TrainState, fingerprint


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state per process; each run here is to be like a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def state_at(path: Path, settings: dict | None = None) -> TrainState:
    """The state of a run that has not made a step yet."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = build_optimizer(model, 0.02, 0.1)
    trained = model, optimizer, build_schedule(optimizer, 9, 0.2)
    return TrainState(path, settings or {"lr": 0.02}, Accelerator(cpu=True), *trained)


def interrupted(path: Path, settings: dict | None = None) -> TrainState:
    """The same after two steps, saved."""
    state = state_at(path, settings)
    for _ in range(2):
        state.model(torch.ones(3, 4)).square().sum().backward()
        state.optimizer.step()
        state.progress.step += 1
    state.save()
    return state


def test_a_saved_state_does_not_change_with_the_run(tmp_path):
    run = interrupted(tmp_path / "state.pt")
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.weight.data.add_(1)
    later = state_at(tmp_path / "state.pt")
    assert later.resume("auto") and later.progress.step == 2
    assert all(torch.equal(value, weights[name]) for name, value in later.model.state_dict().items())


# ---------------------------------------------------------------- which state is taken


def test_auto_without_a_state_starts_anew_and_never_ignores_one(tmp_path):
    run = state_at(tmp_path / "state.pt")
    assert not run.resume("auto")
    interrupted(tmp_path / "state.pt")
    other = state_at(tmp_path / "state.pt")
    assert not other.resume("never")
    assert other.progress.step == 0 and (tmp_path / "state.pt").is_file()


def test_auto_sets_a_state_with_other_settings_aside_and_says_so(tmp_path, capsys):
    interrupted(tmp_path / "stage1_state.pt", settings={"lr": 0.02, "slices": 1})
    content = (tmp_path / "stage1_state.pt").read_bytes()
    other = state_at(tmp_path / "stage1_state.pt", settings={"lr": 0.01, "slices": 1})
    start = {name: value.clone() for name, value in other.model.state_dict().items()}
    assert not other.resume("auto")
    assert other.progress.step == 0
    assert all(torch.equal(value, start[name]) for name, value in other.model.state_dict().items())
    assert not (tmp_path / "stage1_state.pt").exists()
    assert (tmp_path / "stage1_state.previous.pt").read_bytes() == content
    said = capsys.readouterr().out
    assert "lr 0.02 there, 0.01 now" in said and "stage1_state.previous.pt" in said and "slices" not in said


def test_a_flag_that_is_left_out_now_is_another_setting(tmp_path):
    interrupted(tmp_path / "state.pt", settings={"lr": 0.02, "lora_rank": 8})
    with pytest.raises(InputError, match="lora_rank 8 there, None now"):
        state_at(tmp_path / "other.pt", settings={"lr": 0.02}).resume(str(tmp_path / "state.pt"))


def test_a_table_counts_by_its_content(tmp_path):
    flags = dict.fromkeys(("epochs", "lr", "seed", "warmup_ratio", "weight_decay", "max_grad_norm"), 1)
    args, table = argparse.Namespace(**flags, batch_size=4, grad_accumulation=1), tmp_path / "train.csv"
    config = build_config({"caption_csv_train": str(table)}, "test")
    table.write_text("one row", encoding="utf-8")
    before = fingerprint(args, config)
    table.write_text("one row, and one more", encoding="utf-8")
    assert {key for key, value in fingerprint(args, config).items() if before[key] != value} == {
        "content of caption_csv_train"
    }


def test_the_position_that_a_training_goes_on_from_is_of_the_state(tmp_path):
    state = state_at(tmp_path / "state.pt")
    state.progress.start = (40, 2)
    state.save()
    later = state_at(tmp_path / "state.pt")
    later.progress.start = (80, 4)  # of the checkpoint that the run itself has written since
    assert later.resume("auto") and tuple(later.progress.start) == (40, 2)


def test_a_named_state_is_taken_from_anywhere_and_refused_with_other_settings(tmp_path):
    interrupted(tmp_path / "a.pt")
    same = state_at(tmp_path / "elsewhere" / "state.pt")
    assert same.resume(str(tmp_path / "a.pt")) and same.progress.step == 2
    other = state_at(tmp_path / "state.pt", settings={"lr": 0.01})
    with pytest.raises(InputError, match="a.pt belongs to a run with other settings: lr 0.02 there, 0.01 now"):
        other.resume(str(tmp_path / "a.pt"))
    assert (tmp_path / "a.pt").is_file()


def test_missing_unreadable_and_foreign_states_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(InputError, match="training state not found"):
        state_at(path).resume(str(path))
    for content, message in ((b"torn", "not a readable training state"), (None, "is not a training state")):
        torch.save({"format": "mamba-ct-report"}, path)
        path.write_bytes(content or path.read_bytes())
        for wanted in ("auto", str(path)):
            with pytest.raises(InputError, match=message):
                state_at(path).resume(wanted)


def test_a_damaged_newest_state_gives_way_to_the_one_before(tmp_path, capsys):
    path = tmp_path / "state.pt"
    run = interrupted(path)
    run.progress.step = 3
    run.save()
    content = bytearray(path.read_bytes())
    content[content.index(run.model.weight.detach().numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)
    later = state_at(path)
    assert later.resume("auto") and later.progress.step == 2
    assert "checksum" in (said := capsys.readouterr().out) and "going on from the state before it, step 2" in said
    path.unlink()  # killed between two renamings
    later = state_at(path)
    assert later.resume("auto") and later.progress.step == 2


def test_the_state_before_is_of_the_same_run(tmp_path):
    interrupted(tmp_path / "state.pt")
    other = state_at(tmp_path / "state.pt")
    other.resume("never")
    other.save()
    assert not other.older.exists()
    other.save()
    assert other.older.is_file()


def test_finish_removes_the_state(tmp_path):
    run = interrupted(tmp_path / "state.pt")
    run.finish()
    assert list(tmp_path.iterdir()) == []
    run.finish()


def test_fingerprint_holds_what_decides_the_result_and_no_places():
    flags = {"epochs": 3, "lr": 1e-4, "seed": 42, "warmup_ratio": 0.05, "weight_decay": 0.05, "max_grad_norm": 1.0}
    args = argparse.Namespace(**flags, batch_size=4, grad_accumulation=2, save_every=200, resume="auto")
    config = build_config({}, "test")
    print_of = fingerprint(args, config, start=None)
    assert print_of["start"] is None and {**print_of, **flags} == print_of and print_of["cases_per_step"] == 8
    elsewhere = config.replace(
        output_dir="/a", cache_dir="/b", num_workers=3, memory_cache_mb=7, path_map={"d:/": "/mnt/d"}
    )
    assert fingerprint(args, elsewhere, start=None) == print_of
    for change in ({"slices": 3}, {"max_visual_tokens": 96}, {"train_encoder": False}, {"caption_csv_train": "/c.csv"}):
        assert fingerprint(args, config.replace(**change), start=None) != print_of
    args.save_every = 50
    assert fingerprint(args, config, start=None) == print_of
    args.lr = 2e-4
    assert fingerprint(args, config, start=None) != print_of


def test_a_step_may_be_divided_otherwise_but_not_where_cases_of_a_batch_are_compared():
    flags = dict.fromkeys(("epochs", "lr", "seed", "warmup_ratio", "weight_decay", "max_grad_norm"), 1)
    config = build_config({}, "test")
    one, two = (argparse.Namespace(**flags, batch_size=b, grad_accumulation=8 // b) for b in (8, 2))
    assert (
        fingerprint(one, config) == fingerprint(two, config) == fingerprint(two, config) != fingerprint(one, config, 2)
    )
    one.batch_size = 4
    assert fingerprint(one, config, 2) == fingerprint(two, config)
    assert fingerprint(one, config, 2, objective="align") != fingerprint(two, config, objective="align")


# ---------------------------------------------------------------- order


def rows_of(order: EpochBatches) -> list[list[int]]:
    return [[draw.row for draw in batch if draw.counts] for batch in order]


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    order = EpochBatches(20, 3, batch_size=4)
    epochs = []
    for epoch in range(3):
        order.start_epoch(epoch)
        epochs.append(rows_of(order))
        torch.rand(1)
        assert rows_of(order) == epochs[-1], "whatever else is drawn"
        assert {draw.epoch for batch in order for draw in batch} == {epoch}
    flat = [sum(epoch, []) for epoch in epochs]
    assert all(sorted(epoch) == list(range(20)) for epoch in flat)
    assert flat[0] != flat[1] != flat[2]
    assert rows_of(EpochBatches(20, 4, batch_size=4)) != epochs[0]
    for skip in (0, 4, 12, 20):
        order.start_epoch(2, skip)
        assert sum(rows_of(order), []) == flat[2][skip:] and len(order) == 5 - skip // 4, "it goes on where it was"


@pytest.mark.parametrize(("length", "batch", "processes"), [(13, 2, 2), (13, 1, 4), (9, 4, 2), (12, 3, 2), (2, 1, 3)])
def test_batches_of_all_processes_are_those_of_one(length, batch, processes):
    orders = [EpochBatches(length, 0, batch, process, processes) for process in range(processes)]
    together = [sum(parts, []) for parts in zip(*map(rows_of, orders), strict=True)]
    assert together == rows_of(EpochBatches(length, 0, batch * processes)), "the same cases in every step, each once"
    assert len({len(order) for order in orders}) == 1, "no process waits for a batch that another does not make"
    sizes = [[len(rows) for rows in parts] for parts in zip(*map(rows_of, orders), strict=True)]
    assert all(max(step) - min(step) <= 1 for step in sizes) and all(all(order) for order in orders)


def test_loaders_leave_the_global_generator_alone(small_training):
    """Or a resumed epoch, which begins its loader once more, would draw other dropout."""
    config = load_config(small_training / "paths.yaml")
    encoder, plan = load_encoder(config)
    args = argparse.Namespace(seed=0, batch_size=1)
    config, cache = prepare_data(config, plan, Accelerator(cpu=True), force=False)
    train, val, order = build_loaders(args, config, cache, encoder, CaptionCollator(None, 1, 1), Accelerator(cpu=True))
    before = torch.get_rng_state()
    order.start_epoch(0)
    assert sorted(int(batch["row"]) for batch in train) == [0, 1, 2, 3]
    order.start_epoch(0, skip=1)
    assert len(list(train)) == 3 and len(list(val)) == 4
    assert torch.equal(torch.get_rng_state(), before)
