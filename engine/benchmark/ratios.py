"""From medians to the ratios that a suite promises, and what each should reach. Plain arithmetic, no timing."""

from __future__ import annotations

from collections.abc import Mapping

AT_LEAST, AT_MOST = "≥", "≤"

TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "scan": {
        "forward_vs_transformers": (AT_LEAST, 15),
        "forward_backward_vs_mambapy": (AT_LEAST, 12),
        "forward_backward_vs_transformers": (AT_LEAST, 150),
        "peak_memory_vs_mambapy": (AT_MOST, 0.1),
    },
    "prefill": {"prefill_vs_matmul_limit": (AT_MOST, 1.5), "prefill_vs_transformers": (AT_LEAST, 3)},
    "decode": {
        "decode_bf16_vs_bandwidth_limit": (AT_LEAST, 0.85),
        "decode_int8_vs_transformers_bf16": (AT_LEAST, 1.6),
        "second_question_speedup": (AT_LEAST, 5),
    },
    "train_step": {},
    "scaling": {"time_784_to_12544_vs_linear": (AT_MOST, 1.1), "peak_memory_784_to_12544": (AT_MOST, 1.15)},
    "memory": {},
    "data": {
        "preprocessing_2d_vs_nnunet_one_thread": (AT_LEAST, 2),
        "preprocessing_2d_peak_memory_vs_nnunet": (AT_MOST, 1),
        "preprocessing_3d_fullres_vs_nnunet_one_thread": (AT_LEAST, 2),
        "preprocessing_3d_fullres_peak_memory_vs_nnunet": (AT_MOST, 1),
        "cached_samples_per_s": (AT_LEAST, 100),
        "cached_epoch_vs_nifti": (AT_LEAST, 20),
    },
}


def speedup(ours: float, rival: float) -> float:
    """How many times faster: the rival's seconds over ours."""
    return rival / ours


def limit_seconds(amount: float, rate: float) -> float:
    """Operations or bytes over what the machine does per second."""
    return amount / rate


def vs_linear(times: Mapping[int, float], short: int, long: int) -> float:
    """Growth of the time from ``short`` to ``long`` tokens, over the growth of the tokens: 1 is linear."""
    return times[long] / times[short] / (long / short)


def verdict(suite: str, name: str, value: float) -> str:
    """``(target ≥ 15: reached)``, or nothing where there is no target."""
    if name not in TARGETS[suite]:
        return ""
    sign, bound = TARGETS[suite][name]
    reached = value >= bound if sign == AT_LEAST else value <= bound
    return f"(target {sign} {bound:g}: {'reached' if reached else 'missed'})"
