"""The suites: what is timed and weighed in each, beside which baselines and limits of the machine.

nnU-Net (suite ``data``) needs an environment of its own with nnunetv2 2.8.1; NNUNET_PYTHON names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config.nnunet_plans import PreprocessPlan
from config.schema import REPOSITORY
from data.cache import VolumeCache
from data.imaging.nifti import write_volume
from data.imaging.reader import read_mask, read_volume
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from data.nnunet_preprocess import preprocess
from data.tables.caption_table import CaptionRow
from data.view_selection import ViewSelection
from engine.benchmark import models
from engine.benchmark.end_to_end import end_to_end
from engine.benchmark.measure import Report, measure_peak
from engine.benchmark.models import CALLS, STATE, our_model
from engine.benchmark.saving import saving
from engine.prepare import fill_cache
from models.language_model import cpu_decode
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixState, answer_from_state
from models.language_model.quantisation import quantisation_quality, quantise_int8
from models.medical_vlm import generate_reports
from models.nnunet.checkpoint import load_nnunet_checkpoint

PART_LAYERS = 8  # where all of them would take hours; all layers cost the same
ROUNDS = 5
NETWORKS = REPOSITORY / "tests" / "assets" / "nnunet_tiny"
CASES, PASSES = 8, 5  # of an epoch; epochs from the cache in one timed call
THREADS = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"


def scan(report: Report) -> None:
    """The selective scan alone in float32: times, agreement, peak memory, fractions of the machine's limits. Ours also
    as the language model calls it."""
    size, device = report.size, report.device
    E, L, short = 2 * size.width, size.scan_tokens, size.short
    names = models.scans(report)
    y = {who: CALLS["scan"](who, size, short, device)() for who in names}
    for who in names[1:]:
        difference = float((y[who] - y["ours"]).abs().max())
        report.add("values", f"largest difference of y to {who} (L {short})", difference)
    rows = {f"forward {who}": ("scan", who, L) for who in names}
    rows |= {f"forward+backward {who}": ("scan_training", who, L) for who in names if who != "transformers"}
    rows |= {f"{way} {models.IN_THE_MODEL}": (kind, models.IN_THE_MODEL, L) for way, kind in
             (("forward", "scan"), ("forward+backward", "scan_training"))}  # fmt: skip
    rows |= {f"forward+backward {who} L {short}": ("scan_training", who, short) for who in names[:2]}
    calls = {name: CALLS[kind](who, size, n, device) for name, (kind, who, n) in rows.items()}
    block, cached = (torch.rand(n, device=device) for n in (size.block // 4, 1 << 18))  # the second lies in caches
    exponentials = partial(torch.exp, cached, out=torch.empty_like(cached))
    limits = models.read_limits(size.block, device)
    limits["copy"] = partial(torch.empty_like(block).copy_, block), 2 * size.block, "B/s"
    limits["exponentials: torch.exp"] = exponentials, len(cached), "exp/s"
    seconds = report.time(calls, limits, ROUNDS)
    needed = L * E * (STATE + 2)  # a decay per state; a softplus and a gate per token and channel
    fastest = needed / report.best_rate(["exponentials: torch.exp"])
    report.add("shares", "forward scan, of its exponentials by torch.exp alone", fastest / seconds["forward ours"])
    long = {name: (kind, who, size, n, device, 0) for name, (kind, who, n) in rows.items() if n == L}
    peaks = {name: report.peak(name, models.call_peak, *arguments) for name, arguments in long.items()}
    scan_ratios(report, seconds, peaks)
    report.panels["forward, seconds"] = {name: seconds[name] for name in rows if "+" not in name}
    report.panels["forward + backward, seconds"] = {name: seconds[name] for name in rows if "+" in name}
    report.panels["peak memory above the inputs, bytes"] = {name: peak or 0 for name, peak in peaks.items()}


def scan_ratios(report: Report, seconds: Mapping[str, float], peaks: Mapping[str, int | None]) -> None:
    """Ratios of the medians and of the peaks, with their targets."""
    short = f" L {report.size.short}"  # transformers' backward pass takes the square of L
    for who, suffix, forward, both in (("transformers", short, "≥ 15", "≥ 150"), ("mambapy", "", "", "≥ 12")):
        ours, baseline = (f"forward+backward {name}{suffix}" for name in ("ours", who))
        report.add_ratio(f"forward_vs_{who}", seconds.get(f"forward {who}"), seconds["forward ours"], forward)
        report.add_ratio(f"forward_backward_vs_{who}", seconds.get(baseline), seconds[ours], both)
    report.add_ratio("peak_memory_vs_mambapy", peaks[ours], peaks.get(baseline), "≤ 0.1")


def prefill(report: Report) -> None:
    """The language model reads visual tokens and a question, up to the first token's logits; all with same weights."""
    size, device, L = report.size, report.device, report.size.visual + report.size.text
    weights = models.random_mamba(size, device, size.layers)
    built = {"ours": our_model(size, weights), "transformers": weights}
    calls = {who: CALLS["prefill"](model, size, L, device) for who, model in built.items()}
    limits = models.product_limits(size, L, device)
    seconds = report.time(calls, limits, ROUNDS)
    ours, theirs = (call().float() for call in calls.values())
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    report.add("values", "largest relative difference of the logits to transformers", difference)
    operations = models.product_operations(weights, L) + 2 * size.vocabulary * size.width
    limit, bars = operations / report.best_rate(limits), {who: seconds[who] for who in calls}
    report.add("values", "seconds of the matrix products alone at the best rate", limit)
    report.add("shares", "matrix products in all of the prefill", limit / bars["ours"])
    report.add_ratio("prefill_vs_matmul_limit", bars["ours"], limit, "≤ 1.5")
    report.add_ratio("prefill_vs_transformers", bars["transformers"], bars["ours"], "≥ 3")
    report.panels[f"{L} tokens, seconds"] = bars | {"limit: matrix products": limit}


def token_seconds(model: models.Model, embeds: Tensor, count: int) -> list[float]:
    """Seconds of each of ``count`` new tokens, after a first one whose time includes reading ``embeds`` (1, L, D)."""
    stamps: list[float] = []

    def clock(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        torch.get_device_module(ids.device).synchronize()
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # never stops

    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    tokens = {"max_new_tokens": count + 1, "min_new_tokens": count + 1, "do_sample": False}
    criteria = {"criteria" if isinstance(model, MambaLM) else "stopping_criteria": [clock]}
    model.generate(inputs_embeds=embeds, attention_mask=mask, **tokens, **criteria)
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def layer_by_layer(call: Callable[[], list[float]]) -> list[float]:
    """``call`` without the kernel that advances all blocks by one token: each layer's product has its own."""
    with mock.patch.object(cpu_decode, "step", lambda *_: None):
        return call()


def decode(report: Report) -> None:
    """Seconds per new token beside reading the weights once and beside transformers; bf16: in the size's own dtype."""
    size, device = report.size, report.device
    weights = models.random_mamba(size, device, size.layers)
    lm, narrow = (our_model(size, weights) for _ in range(2))
    quantise_int8(narrow.model)
    kind = str(size.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    candidates = {f"ours {kind}": lm, "ours int8": narrow, f"transformers {kind}": weights}
    embeds = models.prompt(size, size.text, device)
    calls = {name: partial(token_seconds, model, embeds, size.decode) for name, model in candidates.items()}
    limits = models.read_limits(size.block, device)
    by_layer = {f"ours {kind}, layer by layer": partial(layer_by_layer, calls[f"ours {kind}"])}
    seconds = report.time(calls | (by_layer if device.type == "cpu" else {}), limits, ROUNDS)
    ours, int8, plain = (seconds[name] for name in calls)
    report.add_ratio("decode_whole_block_vs_layer_by_layer", seconds.get(*by_layer), ours, "≥ 1.1")
    table = narrow.model.get_input_embeddings().weight.nbytes  # one row of it is read, the head has its own copy
    wide_limit = lm.model.get_memory_footprint() / report.best_rate(limits)
    int8_limit = (narrow.model.get_memory_footprint() - table) / report.best_rate(limits)
    report.add("shares", f"reading the weights, ours {kind}", wide_limit / ours)
    report.add("shares", "reading the weights, ours int8", int8_limit / int8)
    report.add_ratio("decode_bf16_vs_bandwidth_limit", wide_limit, ours, "≥ 0.85")
    report.add_ratio("decode_int8_vs_bandwidth_limit", int8_limit, int8, "≥ 0.85")
    report.add_ratio("decode_bf16_vs_transformers", plain, ours)
    report.add_ratio("decode_int8_vs_transformers_bf16", plain, int8, "≥ 1.6")
    report.add_ratio("decode_int8_vs_ours_bf16", ours, int8)
    bars = {f"limit: {kind} read once": wide_limit, "limit: int8 read once": int8_limit}
    report.panels["one new token, seconds"] = {name: seconds[name] for name in calls} | bars

    ids = torch.randint(1, size.vocabulary - 3, (1, size.answer), device=device)
    quality = quantisation_quality(lm, narrow, ids)  # on random tokens
    report.add("values", "int8: largest difference of a logit", quality.max_difference)
    report.add("values", "int8: mean difference of a logit", quality.mean_difference)
    report.add("values", "int8: deviation of the logits themselves", quality.standard_deviation)
    report.add("values", "int8: perplexity over the plain model's", quality.perplexity_ratio)
    second_question(report, lm)


def second_question(report: Report, lm: MambaLM) -> None:
    """Seconds to the first token of a first and of a second question about the same image, without the vision part."""
    visual = models.prompt(report.size, report.size.visual, report.device)
    state = PrefixState.read(lm, visual)
    ids = torch.arange(1, report.size.text + 1, device=report.device)[None]
    batch = {"question_ids": ids, "question_mask": torch.ones_like(ids)}
    calls = {
        "ours: first question": partial(generate_reports, lm, visual, batch, 1),
        "ours: second question": partial(answer_from_state, lm, state, batch, 1),
    }
    bars = report.panels["to the first token of an answer, seconds"] = report.time(calls)
    report.add("values", "bytes of the state after the image", state.nbytes)
    report.add_ratio("second_question_speedup", *bars.values(), "≥ 5")


def train_step(report: Report) -> None:
    """One step of Stage 2 through the frozen language model, batch 1: the whole model, then a part beside baselines."""
    size, device = report.size, report.device
    tokens, part, layers = (size.visual, size.answer), (size.scaling[1], size.text), 2
    weights = models.random_mamba(size, device, size.layers)
    report.add("values", "bytes of the weights", weights.get_memory_footprint())
    name, passes = "ours, all layers", 3 if size.recomputes else 2  # forward, again, and the gradient of the inputs
    limits = models.product_limits(size, sum(tokens), device)
    calls = {name: CALLS["train_step"](our_model(size, weights), size, tokens, device)}
    whole = report.time(calls, limits)[name]
    limit = passes * models.product_operations(weights, sum(tokens)) / report.best_rate(limits)
    report.add("values", f"seconds of the matrix products alone, {passes} passes", limit)
    report.add("shares", "matrix products in all of the step", limit / whole)
    report.panels["all layers, seconds"] = {"ours": whole, "limit: matrix products": limit}
    del weights, calls  # memory for the process that follows
    report.peak(name, models.call_peak, "train_step", "ours", size, tokens, device, size.layers)

    weights = models.random_mamba(size, device, layers)
    built = {f"ours, {layers} layers": our_model(size, weights), f"transformers, {layers} layers": weights}
    calls = {name: CALLS["train_step"](model, size, part, device) for name, model in built.items()}
    bars = report.panels[f"{part[0]} + {part[1]} tokens, seconds"] = report.time(calls)
    ours, baseline = bars.values()
    report.add_ratio("train_step_vs_transformers", baseline, ours)


def scaling(report: Report) -> None:
    """Cost against the number of visual tokens: Mamba in chunks, fused attention all at once, and the bridge alone."""
    size, device, layers = report.size, report.device, min(PART_LAYERS, report.size.layers)
    short, long = size.scaling[2], size.scaling[-1]
    kinds = {"ours": "prefill", "attention": "prefill", "bridge": "bridge"}
    built = {who: models.build_model(who, size, device, layers) for who in ("ours", "attention")}
    calls = {f"{who} {n}": CALLS[kinds[who]](built.get(who), size, n, device) for n in size.scaling for who in kinds}
    seconds = report.time(calls, models.product_limits(size, 512, device))
    del built, calls  # memory for the processes that follow
    times = {who: {n: seconds[f"{who} {n}"] for n in size.scaling} for who in kinds}
    peaks = {who: peak_line(report, kinds[who], who, size.scaling) for who in kinds}
    for who, *targets in (("ours", "≤ 1.1", "≤ 1.15"), ("attention", "", ""), ("bridge", "", "")):
        prefix = "" if who == "ours" else f"{who}_"
        linear = times[who][short] * long / short
        report.add_ratio(f"{prefix}time_784_to_12544_vs_linear", times[who][long], linear, targets[0])
        report.add_ratio(f"{prefix}peak_memory_784_to_12544", peaks[who][long], peaks[who][short], targets[1])
    process = [report.results["memory"].get(f"ours {n}", {}).get("process") for n in (long, short)]
    report.add_ratio("process_peak_memory_784_to_12544", *process)
    report.panels |= {f"reading with {layers} layers, seconds": times, "peak memory above the inputs, bytes": peaks}


def memory(report: Report) -> None:
    """Peak memory of scan, prefill and training step against the number of tokens; ratios where a baseline ends."""
    size, most = report.size, max(report.size.memory_tokens)
    ends = {"ours": most, "transformers": size.short, "mambapy": size.scan_tokens}  # the last for its memory
    for name, kind, names, last in (
        ("scan", "scan_training", models.scans(report), ends),
        ("prefill", "prefill", ["ours", "transformers"], dict.fromkeys(ends, most)),
        ("train_step", "train_step", ["ours", "transformers"], ends),
    ):
        tokens = {who: [n for n in size.memory_tokens if n <= last[who]] for who in names}
        lines = {who: peak_line(report, kind, who, tokens[who], f"{name} ") for who in names}
        for who in names[1:]:
            n = tokens[who][-1]
            report.add_ratio(f"{name}_peak_memory_vs_{who}", lines["ours"][n], lines[who][n])
        report.panels[f"{name}: peak memory above the inputs, bytes"] = lines


def peak_line(report: Report, kind: str, who: str, tokens: Iterable[int], prefix: str = "") -> dict[int, int | None]:
    """Peak memory of a candidate with some of the layers, in bytes by the number of tokens."""
    size, line = report.size, {}
    for n in tokens:
        visual = int((0.77 * n) ** 0.5) ** 2  # about three quarters, a square number as the bridge gives them
        amount = (visual, n - visual) if kind == "train_step" else n
        arguments = kind, who, size, amount, report.device, min(PART_LAYERS, size.layers)
        line[n] = report.peak(f"{prefix}{who} {n}", models.call_peak, *arguments)
    return line


def data(report: Report) -> None:
    """Preprocessing beside nnU-Net's own, and epochs from the cache beside reading .nii.gz each time."""
    with tempfile.TemporaryDirectory() as folder:
        preprocessing(report, Path(folder))
        epochs(report, Path(folder))


def preprocessing(report: Report, folder: Path) -> None:
    """One volume and its mask, from .nii.gz to the encoder's voxels."""
    image, mask = make_scan(folder, report.size.volume, 0)
    bars = report.panels["preprocessing, seconds"] = {}
    for plan, network in (("2d", "2d_plain"), ("3d_fullres", "3d_plain")):
        name, short = f"preprocessing {plan}", f"preprocessing_{plan}"
        bars |= report.time({f"{name} ours": partial(prepare, image, mask, plan_of(network))})
        peak = report.peak(f"{name} ours", prepare_peak, image, mask, network)
        theirs, their_peak = f"{name} nnU-Net, one thread", None
        if os.environ.get("NNUNET_PYTHON"):
            found = nnunet_baseline(image, mask, network, plan)
            bars[theirs] = report.add_seconds(theirs, found["seconds"])
            their_peak = found["peak"] and report.add_peak(f"{name} nnU-Net", found["peak"])
        else:
            report.missing.append(f"{short}: set NNUNET_PYTHON to the Python of an environment with nnunetv2")
        report.add_ratio(f"{short}_vs_nnunet_one_thread", bars.get(theirs), bars[f"{name} ours"], "≥ 2")
        report.add_ratio(f"{short}_peak_memory_vs_nnunet", peak, their_peak, "≤ 1")


def epochs(report: Report, folder: Path) -> None:
    """Epochs of a data set of 2-D slices: from the cache, and from the .nii.gz files, which the system may hold."""
    plan, (depth, *plane) = plan_of("2d_plain"), report.size.volume
    pairs = [make_scan(folder, (depth * 2 // 5, *plane), 1 + case) for case in range(CASES)]
    rows = [CaptionRow(2 + n, image, "Q?", "A.", mask) for n, (image, mask) in enumerate(pairs)]
    cache = VolumeCache(folder / "cache", plan)
    fill_cache(cache, rows)
    slices = MedicalVLMDataset(rows, cache, ViewSelection(plan, (16, 16), 1, "mask"), [], 0)
    loader = DataLoader(slices, batch_size=4, collate_fn=CaptionCollator(None, 1, 1))
    calls = {
        "epochs from the cache": lambda: sum(len(batch["images"]) for _ in range(PASSES) for batch in loader),
        "an epoch that reads .nii.gz": lambda: sum(np.asarray(nib.load(image).dataobj).nbytes for image, _ in pairs),
        "an epoch that reads and prepares": lambda: any(prepare(*pair, plan) for pair in pairs),
    }
    cached, read, prepared = report.time(calls).values()
    report.add("values", "bytes of a slice", float(slices[0].images.nbytes))
    report.add_ratio("cached_samples_per_s", PASSES * CASES, cached, "≥ 100")
    report.add_ratio("cached_epoch_vs_nifti", read, cached / PASSES, "≥ 20")
    report.add_ratio("cached_epoch_vs_preparing", prepared, cached / PASSES)
    report.panels["an epoch, seconds"] = {"ours: cache": cached / PASSES, ".nii.gz, read only": read, "anew": prepared}


def make_scan(folder: Path, shape: tuple[int, ...], seed: int) -> tuple[Path, Path]:
    """An image of a body with noise of 25 HU, which makes real CT hard to compress; and the mask of a lesion."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[-1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]
    body = np.where(y**2 + x**2 < 0.7, 40, -1000)
    image = np.stack([(body + rng.normal(0, 25, body.shape)).astype(np.int16) for _ in range(shape[0])])
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(n // 3, n // 3 + n // 12) for n in shape)] = 1
    paths = folder / f"{seed}.nii.gz", folder / f"{seed}_mask.nii.gz"
    write_volume(paths[0], image, (1.0, 0.7, 0.7))  # mm, z y x: a usual chest CT
    write_volume(paths[1], mask, (1.0, 0.7, 0.7))
    return paths


def plan_of(network: str) -> PreprocessPlan:
    source = load_nnunet_checkpoint(NETWORKS / network / "fold_0" / "checkpoint_best.pth")
    return PreprocessPlan.from_nnunet(source.plans, source.configuration)


def prepare(image: Path, mask: Path, plan: PreprocessPlan) -> None:
    volume = read_volume(image, plan.orientation)
    preprocess(volume, plan, read_mask(mask, volume))


def prepare_peak(image: Path, mask: Path, network: str) -> tuple[int, int]:
    """As nnU-Net's is measured: the first call of a process that has its libraries loaded."""
    return measure_peak(partial(prepare, image, mask, plan_of(network)), torch.device("cpu"))


def nnunet_baseline(image: Path, mask: Path, network: str, configuration: str) -> dict[str, Any]:
    """What ``nnunet_baseline.py`` prints, with one thread of every library; its errors stand on the console."""
    script, environment = Path(__file__).with_name("nnunet_baseline.py"), {**os.environ, **dict.fromkeys(THREADS, "1")}
    command = [os.environ["NNUNET_PYTHON"], script, image, mask, NETWORKS / network, configuration]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


_ALL = scan, prefill, decode, train_step, scaling, memory, data, end_to_end, saving
SUITES = {suite.__name__: suite for suite in _ALL}
