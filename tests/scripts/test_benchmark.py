"""The benchmark script at its tiny size: structure, arithmetic on made-up times, figures. No time is asserted."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.benchmark import measure, report, suites
from engine.benchmark.measure import Candidate, OutOfMemory, in_own_process, in_words, measure_peak, take_turns, timing
from engine.benchmark.models import SIZES, candidate_model, prefill, prompt, random_mamba
from engine.benchmark.report import Report, verdict

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
TINY, CPU, MIB = SIZES["tiny"], torch.device("cpu"), 1 << 20
SCAN = "forward_vs_transformers forward_backward_vs_transformers"
NNUNET = "preprocessing_{0}_vs_nnunet_one_thread preprocessing_{0}_peak_memory_vs_nnunet"
TARGETS = {
    "scan": f"{SCAN} forward_backward_vs_mambapy peak_memory_vs_mambapy",
    "prefill": "prefill_vs_matmul_limit prefill_vs_transformers",
    "decode": "decode_bf16_vs_bandwidth_limit decode_int8_vs_transformers_bf16 second_question_speedup",
    "train_step": "",
    "scaling": "time_784_to_12544_vs_linear peak_memory_784_to_12544",
    "memory": "",
    "data": f"{NNUNET.format('2d')} {NNUNET.format('3d_fullres')} cached_samples_per_s cached_epoch_vs_nifti",
}


@pytest.mark.parametrize("suite", TARGETS)
def test_a_suite_writes_numbers_and_a_figure(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), suite, "--size", "tiny", "--out", str(tmp_path / "a b")])
    monkeypatch.setattr("engine.benchmark.models.is_mambapy_available", lambda: False)
    runpy.run_path(str(SCRIPT))["main"]()
    found = json.loads((tmp_path / "a b" / f"{suite}.json").read_text(encoding="utf-8"))
    assert found["suite"] == suite and found["size"] == "tiny" and suite in found["command"]
    assert found["machine"]["processor"] and found["machine"]["torch_threads"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    for one in found["times"]:
        assert one["runs"] == len(one["seconds"]) > 0
        assert 0 < one["fastest"] <= one["median"] <= one["slowest"]
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
    assert bool(lines) == (suite in ("scan", "prefill", "train_step", "memory"))
    assert not any("mambapy" in name for name in found["ratios"])


@pytest.mark.parametrize("arguments", [["--help"], ["scan", "--size", "7b"]])
def test_help_and_a_wrong_flag_need_no_torch(arguments: list[str]) -> None:
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, *arguments], capture_output=True, encoding="utf-8")
    assert "usage:" in done.stdout + done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------ arithmetic


def test_verdicts_have_the_right_direction() -> None:
    assert verdict(15.0, "≥ 15") == "(target ≥ 15: reached)" and verdict(1.51, "≤ 1.5") == "(target ≤ 1.5: missed)"
    assert "missed" in verdict(14.9, "≥ 15") and "reached" in verdict(1.5, "≤ 1.5")
    assert verdict(1.0, "") == ""


def test_ratios_of_the_scan_on_made_up_times() -> None:
    found = Report("scan", TINY, CPU)
    short = TINY.baseline_training_tokens
    seconds = {
        "forward ours": 0.05, "forward transformers": 1.5, "forward mambapy": 2.0,
        "forward+backward ours": 0.15, "forward+backward mambapy": 6.0,
        f"forward+backward ours L {short}": 0.04, f"forward+backward transformers L {short}": 16.0,
    }  # fmt: skip
    found.memory = {"forward+backward ours": {"call": 100}, "forward+backward mambapy": {"call": 3000}}
    suites.scan_ratios(found, seconds)
    expected = {
        "forward_vs_transformers": 30, "forward_vs_mambapy": 40, "forward_backward_vs_mambapy": 40,
        "forward_backward_vs_transformers": 400, "peak_memory_vs_mambapy": 1 / 30,
    }  # fmt: skip
    assert found.ratios == pytest.approx(expected)
    assert any(f"L {short} for both" in note for note in found.notes)


def test_the_rate_of_a_limit_is_its_amount_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Report("scan", TINY, CPU)
    limits = [Candidate(name, list, amount=amount, unit="B/s") for name, amount in (("slow", 4e9), ("fast", 6e9))]
    monkeypatch.setattr(report, "take_turns", lambda *_: {"slow": [1.0, 2.0, 9.0], "fast": [2.0]})
    assert found.time(limits) == {"slow": 2.0, "fast": 2.0} and not found.times
    assert found.best_rate(limits) == 3e9


def test_a_timing_is_its_median_with_the_spread() -> None:
    found = timing("scan", (3.0, 1.0, 2.0), "why")
    assert (found["median"], found["fastest"], found["slowest"], found["runs"]) == (2.0, 1.0, 3.0, 3)
    assert found["seconds"] == [3.0, 1.0, 2.0] and found["note"] == "why"
    assert [in_words(value) for value in (2.5, 0.0123, 4.2e-5)] == ["2.5 s", "12.3 ms", "42 µs"]


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks = iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(ticks)))
    heavy = Candidate("heavy", lambda: order.append("heavy"), 1, warm="never")
    fresh = Candidate("fresh", lambda: order.append("fresh"), 1, warm="each")
    own = Candidate("own", lambda: [7.0, 8.0], 2, own_clock=True)
    found = take_turns([Candidate("light", lambda: order.append("light"), 3), heavy, fresh, own], CPU)
    assert order == ["light", "light", "heavy", "fresh", "fresh", "light", "light"]
    assert found == {"light": [1.0, 1.0, 1.0], "heavy": [1.0], "fresh": [1.0], "own": [7.0, 8.0, 7.0, 8.0]}


@pytest.mark.parametrize("who", ["ours", "transformers"])
def test_seconds_of_tokens_count_from_the_first_one(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter([5.0, 5.5, 6.5])
    monkeypatch.setattr(suites, "time", SimpleNamespace(perf_counter=lambda: next(stamps)))
    model = candidate_model(who, TINY, random_mamba(TINY, CPU))
    assert suites.token_seconds(model, prompt(TINY, 8, CPU), 2) == [0.5, 1.0]


# ------------------------------------------------------------------ memory


def measure_large_then_small() -> tuple[int, int]:
    kept = torch.ones(64 * MIB // 4)  # not the call's
    large, small = (measure_peak(lambda n=mib: torch.ones(n * MIB // 4).sum(), CPU).call for mib in (96, 48))
    assert kept.sum() > 0
    return large, small


def test_a_peak_is_what_the_call_had_at_its_highest() -> None:
    large, small = in_own_process(measure_large_then_small)
    assert large == pytest.approx(96 * MIB, rel=0.2)
    # No mark of the call before. Larger than the freed memory that the allocator may keep (32 MiB).
    assert small == pytest.approx(48 * MIB, rel=0.3)


def test_a_killed_process_is_reported() -> None:
    with pytest.raises(OutOfMemory, match="_exit"):
        in_own_process(os._exit, 9)


# ------------------------------------------------------------------ models


def test_the_baseline_shares_the_weights_and_stays_unpatched() -> None:
    weights = random_mamba(TINY, CPU)
    lm, baseline = (candidate_model(who, TINY, weights) for who in ("ours", "transformers"))
    ours, theirs = (m.backbone.layers[0].mixer for m in (lm.model, baseline))
    assert ours.in_proj.weight.data_ptr() == theirs.in_proj.weight.data_ptr()
    assert "forward" in vars(ours) and "forward" not in vars(theirs)
    embeds = prompt(TINY, 24, CPU)
    torch.testing.assert_close(prefill(lm, embeds), prefill(baseline, embeds), rtol=1e-4, atol=1e-5)


def test_a_large_model_is_built_without_a_float32_copy() -> None:
    model = random_mamba(SIZES["2.8b"], torch.device("meta"), layers=1)
    kinds = {name.split(".")[-1] if "mixer.D" not in name else "D": p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("A_log") is kinds.pop("D") is torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
