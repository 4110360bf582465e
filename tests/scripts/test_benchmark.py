"""The benchmark script at its tiny size: structure, arithmetic on made-up times, pictures. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engine.benchmark import rivals, suite_scan, timing
from engine.benchmark.language_models import our_prefill, prompt, rival_prefill
from engine.benchmark.peak_memory import OutOfMemory, in_own_process, measure_peak
from engine.benchmark.random_lm import our_lm, random_mamba, same_weights, weight_bytes
from engine.benchmark.ratios import TARGETS, limit_seconds, speedup, verdict, vs_linear
from engine.benchmark.report import Report
from engine.benchmark.sizes import SIZES
from engine.benchmark.suite_decode import TokenClock
from engine.benchmark.timing import Candidate, Timing, in_words, take_turns

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
TINY, CPU = SIZES["tiny"], torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("suite", TARGETS)
def test_every_suite_writes_its_numbers_and_a_picture(
    suite: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), suite, "--size", "tiny", "--out", str(tmp_path / "a b")])
    script.main()
    found = json.loads((tmp_path / "a b" / f"{suite}.json").read_text(encoding="utf-8"))
    assert found["suite"] == suite and found["size"] == "tiny" and suite in found["command"]
    assert found["machine"]["processor"] and found["machine"]["torch_threads"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    for one in found["times"]:
        assert one["runs"] == len(one["seconds"]) > 0
        assert 0 < one["fastest"] <= one["median"] <= one["slowest"]
    assert all(isinstance(value, float | int) for value in found["ratios"].values())
    # A promised ratio is there, or one line says why not.
    for name in TARGETS[suite]:
        reasons = [line.split(":")[0] for line in found["missing"]]
        assert name in found["ratios"] or any(reason in name for reason in reasons), name
    assert (tmp_path / "a b" / f"{suite}.png").read_bytes().startswith(b"\x89PNG")


def test_an_absent_rival_is_said_in_one_line_with_what_to_install(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "is_mambapy_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "scan", "--size", "tiny", "--out", str(tmp_path)])
    script.main()
    found = json.loads((tmp_path / "scan.json").read_text(encoding="utf-8"))
    line = next(line for line in found["missing"] if "mambapy" in line)
    assert "pip install --no-deps mambapy" in line and "\n" not in line
    assert not any("mambapy" in name for name in found["ratios"])


# ------------------------------------------------------------------ arithmetic


def test_ratios_of_known_numbers() -> None:
    assert speedup(ours=0.05, rival=1.5) == pytest.approx(30)
    assert limit_seconds(5.6e9, 20e9) == pytest.approx(0.28)
    assert vs_linear({784: 2.0, 12544: 32.0}, 784, 12544) == pytest.approx(1)
    assert vs_linear({784: 2.0, 12544: 64.0}, 784, 12544) == pytest.approx(2)


def test_verdicts_have_the_right_direction() -> None:
    assert "reached" in verdict("scan", "forward_vs_transformers", 15.0)
    assert "missed" in verdict("scan", "forward_vs_transformers", 14.9)
    assert "reached" in verdict("prefill", "prefill_vs_matmul_limit", 1.5)
    assert "missed" in verdict("prefill", "prefill_vs_matmul_limit", 1.51)
    assert verdict("scan", "another", 1.0) == ""


def test_ratios_of_the_scan_on_made_up_times() -> None:
    report = Report("scan", TINY, CPU)
    short = TINY.scan_training_tokens
    seconds = {
        "forward ours": 0.05, "forward transformers": 1.5, "forward mambapy": 2.0,
        "forward+backward ours": 0.15, "forward+backward mambapy": 6.0,
        f"forward+backward ours L {short}": 0.04, f"forward+backward transformers L {short}": 16.0,
    }  # fmt: skip
    report.memory = {"forward+backward ours": {"call": 100}, "forward+backward mambapy": {"call": 3000}}
    suite_scan._add_ratios(report, {name: Timing(name, (s, s, 9 * s)) for name, s in seconds.items()}, short)
    expected = {
        "forward_vs_transformers": 30, "forward_vs_mambapy": 40, "forward_backward_vs_mambapy": 40,
        "forward_backward_vs_transformers": 400, "peak_memory_vs_mambapy": 1 / 30,
    }  # fmt: skip
    assert report.ratios == pytest.approx(expected)
    assert any(f"L {short} for both" in note for note in report.notes)


def test_a_timing_is_its_median_with_the_spread() -> None:
    found = Timing("scan", (3.0, 1.0, 2.0), "why").to_dict()
    assert (found["median"], found["fastest"], found["slowest"], found["runs"]) == (2.0, 1.0, 3.0, 3)
    assert found["seconds"] == [3.0, 1.0, 2.0] and found["note"] == "why"
    assert [in_words(value) for value in (2.5, 0.0123, 4.2e-5)] == ["2.5 s", "12.3 ms", "42 µs"]


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    ticks = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    heavy = Candidate("heavy", lambda: order.append("heavy"), 1, warm=False, note="once")
    found = take_turns([Candidate("light", lambda: order.append("light"), 3), heavy])
    assert order == ["light", "light", "heavy", "light", "light"]
    assert found["light"].seconds == (1.0, 1.0, 1.0)
    assert found["heavy"].seconds == (1.0,) and "once" in found["heavy"].line()


def test_a_token_clock_counts_from_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter([5.0, 5.5, 6.5])
    monkeypatch.setattr("engine.benchmark.suite_decode.time.perf_counter", lambda: next(stamps))
    clock = TokenClock(CPU)
    for _ in range(3):
        assert not clock(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 8)).any()
    assert clock.intervals() == [0.5, 1.0]


# ------------------------------------------------------------------ memory


def allocate(mib: int) -> None:
    torch.ones(mib * MIB // 4).sum()


def allocate_and_measure(mib: int) -> int:
    return measure_peak(lambda: allocate(mib)).call


def measure_large_then_small() -> tuple[int, int]:
    kept = torch.ones(64 * MIB // 4)  # not the call's
    peaks = measure_peak(lambda: allocate(96)).call, measure_peak(lambda: allocate(48)).call
    assert kept.sum() > 0
    return peaks


def test_a_peak_is_what_the_call_had_at_its_highest() -> None:
    """In a process of its own, as the benchmark measures: one that has run for long may hold enough freed memory."""
    large, small = in_own_process(measure_large_then_small)
    assert large == pytest.approx(96 * MIB, rel=0.2)
    # No mark of before. Larger than what the allocator may keep of freed memory (32 MiB), which costs nothing anew.
    assert small == pytest.approx(48 * MIB, rel=0.3)


def test_a_fresh_process_measures_and_its_death_is_said() -> None:
    assert in_own_process(allocate_and_measure, 96) == pytest.approx(96 * MIB, rel=0.2)
    with pytest.raises(OutOfMemory, match="_exit"):
        in_own_process(os._exit, 9)


# ------------------------------------------------------------------ models


def test_the_rival_shares_the_weights_and_stays_unpatched() -> None:
    model = random_mamba(TINY, CPU)
    rival, lm = same_weights(model), our_lm(model, TINY)
    ours, theirs = (m.backbone.layers[0].mixer for m in (lm.model, rival))
    assert ours.in_proj.weight.data_ptr() == theirs.in_proj.weight.data_ptr()
    assert "forward" in vars(ours) and "forward" not in vars(theirs)
    embeds = prompt(TINY, 24, CPU)
    torch.testing.assert_close(our_prefill(lm, embeds), rival_prefill(rival, embeds), rtol=1e-4, atol=1e-5)


def test_weights_are_counted_once_where_they_are_shared() -> None:
    model = random_mamba(TINY, CPU)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters())


def test_a_large_model_is_built_without_a_float32_copy() -> None:
    model = random_mamba(SIZES["2.8b"], torch.device("meta"), layers=1)
    kinds = {name.split(".")[-1] if "mixer.D" not in name else "D": p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("A_log") is kinds.pop("D") is torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
