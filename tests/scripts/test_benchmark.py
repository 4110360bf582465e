"""The benchmark script at its tiny size: structure, arithmetic on made-up times, figures. No time is asserted."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.benchmark import measure, suites
from engine.benchmark.measure import SIZES, Report, measure_peak
from engine.benchmark.models import CALLS, build_model, our_model, prompt, random_mamba
from engine.benchmark.saving import add_shares, timed

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
TINY, CPU, MIB = SIZES["tiny"], torch.device("cpu"), 1 << 20
SCAN = "forward_vs_transformers forward_backward_vs_transformers"
NNUNET = "preprocessing_{0}_vs_nnunet_one_thread preprocessing_{0}_peak_memory_vs_nnunet"
TARGETS = {
    "scan": f"{SCAN} forward_backward_vs_mambapy peak_memory_vs_mambapy",
    "prefill": "prefill_vs_matmul_limit prefill_vs_transformers",
    "decode": "decode_bf16_vs_bandwidth_limit decode_int8_vs_bandwidth_limit decode_whole_block_vs_layer_by_layer "
    "decode_int8_vs_transformers_bf16 second_question_speedup",
    "train_step": "",
    "scaling": "time_784_to_12544_vs_linear peak_memory_784_to_12544",
    "memory": "",
    "end_to_end": "seconds_float32 first_token_seconds_float32 seconds_kept_int8 first_token_seconds_kept_int8",
    "saving": "saving_share_stage1 saving_share_stage2",
    "data": f"{NNUNET.format('2d')} {NNUNET.format('3d_fullres')} cached_samples_per_s cached_epoch_vs_nifti",
}


LONG = ("scan", "scaling", "decode", "train_step", "data", "saving")


@pytest.mark.parametrize(
    "suite", [pytest.param(suite, marks=pytest.mark.minutes) if suite in LONG else suite for suite in TARGETS]
)
def test_a_suite_writes_numbers_and_a_figure(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), suite, "--size", "tiny", "--out", str(tmp_path / "a b")])
    monkeypatch.setattr("engine.benchmark.models.is_mambapy_available", lambda: False)
    runpy.run_path(str(SCRIPT))["main"]()
    found = json.loads((tmp_path / "a b" / f"{suite}.json").read_text(encoding="utf-8"))
    assert found["suite"] == suite and found["size"] == "tiny"
    assert found["machine"]["processor"] and found["machine"]["torch_threads"] >= 1
    known = found["versions"]["torch"]
    assert known == torch.__version__ or (os.name == "nt" and f"{known}+cpu" == torch.__version__)  # PyPI's for Windows
    for one in found["times"]:
        assert one["runs"] == len(one["seconds"]) > 0
        assert one["fastest"] > 0 or one["name"].endswith("first token")  # which the script prints in hundredths
        assert 0 <= one["fastest"] <= one["median"] <= one["slowest"]
    assert all(isinstance(value, float | int) for value in found["ratios"].values())
    # A promised ratio is there, or one line says why not.
    assert set(found["targets"]) == set(TARGETS[suite].split())
    for name in found["targets"]:
        reasons = [line.split(":")[0] for line in found["missing"]]
        assert name in found["ratios"] or any(reason in name for reason in reasons), name
    assert (tmp_path / "a b" / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
    # An absent baseline is reported in one line that says what to install.
    lines = [line for line in found["missing"] if "mambapy is not installed" in line]
    assert all("pip install --no-deps mambapy" in line and "\n" not in line for line in lines)
    assert bool(lines) == (suite in ("scan", "memory"))
    assert not any("mambapy" in name for name in found["ratios"])


# ------------------------------------------------------------------ arithmetic


def test_ratios_of_the_scan_on_made_up_times() -> None:
    found, short = Report("scan", TINY, CPU), f" L {TINY.short}"
    seconds = {"forward ours": 0.05, "forward transformers": 1.5, "forward mambapy": 2.0}
    seconds |= {"forward+backward ours": 0.15, "forward+backward mambapy": 6.0}
    seconds |= {f"forward+backward ours{short}": 0.04, f"forward+backward transformers{short}": 16.0}
    suites.scan_ratios(found, seconds, {"forward+backward ours": 100, "forward+backward mambapy": 3000})
    expected = {"forward_vs_transformers": 30, "forward_vs_mambapy": 40, "forward_backward_vs_mambapy": 40}
    expected |= {"forward_backward_vs_transformers": 400, "peak_memory_vs_mambapy": 1 / 30}
    assert found.results["ratios"] == pytest.approx(expected)


def test_seconds_are_recorded_with_median_and_spread_and_a_limit_with_its_rate() -> None:
    found = Report("scan", TINY, CPU)
    assert found.add_seconds("scan", [3.0, 1.0, 2.0]) == 2.0
    expected = {"name": "scan", "runs": 3, "median": 2.0, "fastest": 1.0, "slowest": 3.0, "seconds": [3.0, 1.0, 2.0]}
    assert found.results["times"] == {"scan": expected}
    found.add_seconds("slow", [1.0, 2.0, 9.0], (list, 4e9, "B/s"))
    found.add_seconds("fast", [2.0], (list, 6e9, "B/s"))
    assert found.best_rate(["slow", "fast"]) == found.results["limits"]["fast"]["rate"] == 3e9


def test_calls_take_turns_after_one_untimed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks = iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(ticks)))
    limits = {"limit": (lambda: order.append("limit"), 1.0, "B/s")}
    found = Report("scan", TINY, CPU).time({"a": lambda: order.append("a"), "own": lambda: [7.0, 8.0]}, limits, 2)
    assert order == ["limit", "a"] * 3
    assert found == {"limit": 1.0, "a": 1.0, "own": 7.5}


@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_seconds_of_tokens_count_from_the_first_one(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter([5.0, 5.5, 6.5])
    monkeypatch.setattr(suites, "time", SimpleNamespace(perf_counter=lambda: next(stamps)))
    model = build_model(who, TINY, CPU, 2)
    assert suites.token_seconds(model, prompt(TINY, 8, CPU), 2) == [0.5, 1.0]


def test_the_share_of_saving_is_of_the_epochs_that_it_is_part_of() -> None:
    found = Report("saving", TINY, CPU)
    add_shares(found, "stage1", {"state": [0.5, 0.7], "checkpoints": [0.8], "checks": []}, 100.0)
    assert found.results["ratios"] == {"saving_share_stage1": pytest.approx(0.02)}
    owner = SimpleNamespace(call=lambda fails: 1 / (not fails))
    real = owner.call
    with timed(owner, "call") as seconds:
        assert owner.call(False) == 1
        with pytest.raises(ZeroDivisionError):
            owner.call(True)
    assert len(seconds) == 2 and owner.call is real


# ------------------------------------------------------------------ memory


def measure_large_then_small() -> tuple[int, int]:
    kept = torch.ones(64 * MIB // 4)  # not the call's
    large, small = (measure_peak(lambda n=mib: torch.ones(n * MIB // 4).exp_().sum(), CPU)[0] for mib in (96, 48))
    assert kept.sum() > 0
    return large, small


def test_a_peak_is_what_the_call_had_at_its_highest() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        large, small = pool.submit(measure_large_then_small).result()
    assert large == pytest.approx(96 * MIB, rel=0.2)
    # Not that of the call before. Larger than the freed memory that glibc's allocator may keep (32 MiB). Windows' may
    # keep all: a suite measures each call in a new process.
    assert os.name == "nt" or small == pytest.approx(48 * MIB, rel=0.3)


def test_a_killed_process_is_reported() -> None:
    found = Report("memory", SIZES["130m"], CPU)
    assert found.peak("scan ours", os._exit, 9) is None
    assert "scan ours: its process was killed" in found.missing[0]


# ------------------------------------------------------------------ models


def test_the_baseline_shares_the_weights_and_stays_unpatched() -> None:
    baseline = random_mamba(TINY, CPU, 2)
    lm = our_model(TINY, baseline)
    ours, theirs = (m.backbone.layers[0].mixer for m in (lm.model, baseline))
    assert ours.in_proj.weight.data_ptr() == theirs.in_proj.weight.data_ptr()
    assert "forward" in vars(ours) and "forward" not in vars(theirs)
    logits, expected = (CALLS["prefill"](model, TINY, 24, CPU)() for model in (lm, baseline))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_large_model_is_built_without_a_float32_copy() -> None:
    model = random_mamba(SIZES["2.8b"], torch.device("meta"), 1)
    kinds = {name.split(".")[-1] if "mixer.D" not in name else "D": p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("A_log") is kinds.pop("D") is torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
