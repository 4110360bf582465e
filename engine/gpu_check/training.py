"""Checks 8, 9, 11 and 12: steps of Stage 2, where their time goes, maps of a report, an epoch of Stage 1.

Letters: B batch, L tokens, D the language model's width.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from config.schema import REPOSITORY, Config, load_config
from engine.benchmark.measure import measure_peak
from engine.evaluation.saliency import ReportLikelihood, attribution_maps
from engine.gpu_check.context import Context, Expected, Line
from engine.loaders import load_encoder
from engine.training.diagnostics import DIAGNOSED_IMAGES, MAX_TOKENS, token_statistics
from models.language_model.hf_patch import TRANSIENT
from models.language_model.lora import Adapters
from models.language_model.mamba_lm import IGNORED, LOSS_CHUNK, MambaLM
from models.language_model.quantisation import quantise_int8
from models.medical_vlm import MedicalVLM, VisionBridge
from models.objectives import ProxyL2
from models.vim_bridge import BridgeSpec, VimBridge

STEP, MEMORY = Expected(0.30, 0.60, "s"), Expected(12, 12, "GB")
CHECK = Expected(1, 1, "s")
MAPS = Expected(18, 18, "GB")
STEPS = {"cuda": 20, "cpu": 5}
# name: batch, checkpointing (None: the system decides), rank of adapters, int8
VARIANTS: dict[str, tuple[int, bool | None, int, bool]] = {
    "B 1, checkpointing off": (1, False, 0, False),
    "B 1, checkpointing auto": (1, None, 0, False),
    "B 1, checkpointing on": (1, True, 0, False),
    "B 4, checkpointing off": (4, False, 0, False),
    "B 4, checkpointing auto": (4, None, 0, False),
    "B 4, checkpointing on": (4, True, 0, False),
    "B 1, adapters of rank 8": (1, None, 8, False),
    "B 1, int8": (1, None, 0, True),
}
KINDS = {  # of kernels by their names, the first that matches
    "matrix products": r"gemm|cutlass|nvjet|wgmma|gemv|ampere_|sm\d+_x|splitK|aten::(add)?mm|aten::bmm|aten::linear",
    "convolution and norm": r"conv|norm",
    "scan": r"^[a-z_]+_kernel$|scan_fwd|scan_bwd|selective_scan|_TwoPasses",  # Triton's names are bare
    "copies": r"copy|memcpy|memset|Memcpy|Memset|cat|Cat",
    "elementwise": r"elementwise|vectorized|reduce|Reduce|softmax|foreach|triton|index|aten::",
}


class Stage2:
    """Steps of Stage 2 from the encoder's features on: bridge, frozen language model, loss, gradients, AdamW.

    The reports and their features are always the same, so that the loss must fall.
    """

    def __init__(self, context: Context, lm: MambaLM, B: int, checkpointing: bool | None, rank: int = 0) -> None:
        size, device = context.size, context.device
        side = 28 if context.cuda else 4
        self.visual, self.others = side**2, 256 if context.cuda else 16
        torch.manual_seed(0)
        self.lm, self.context = lm, context
        adapters = Adapters(lm.model, rank) if rank else None
        channels, width = (512, 512) if context.cuda else (16, 64)
        spec = BridgeSpec(channels, size.width, width=width, grid=side, max_visual_tokens=self.visual)
        self.bridge = VimBridge(spec).to(device)
        self.features = torch.randn(B, 1, spec.in_channels, side, side, device=device)
        ids = torch.randint(1, 5, (B, self.others), device=device)  # few words: even a random model can learn them
        self.text = lm.embed(ids)
        self.labels = F.pad(ids, (self.visual, 0), value=IGNORED)
        self.labels[:, : self.visual + self.others // 8] = IGNORED
        parameters = [*self.bridge.parameters(), *(adapters.parameters() if adapters else ())]
        self.trained, self.tokens = sum(p.numel() for p in parameters), self.labels.numel()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        lm.checkpointing(checkpointing, reserve=12 * self.trained)  # gradients and two moments, in float32

    @property
    def recomputed(self) -> int:
        """Blocks that the last step computed again."""
        return sum(block.recompute for block in self.lm.model.backbone.layers)

    def __call__(self) -> Tensor:
        with torch.autocast(self.context.device.type, torch.bfloat16, enabled=self.context.cuda):
            position = torch.zeros(self.features.shape[:2], device=self.context.device)
            visual = self.bridge(self.features, position)
            embeds = torch.cat([visual.to(self.text.dtype), self.text], 1)
            total, count = self.lm.answer_loss(embeds, self.labels)
        (total / count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return (total / count).detach()


def language_model(context: Context, int8: bool) -> MambaLM:
    lm = context.lm()
    if int8:
        quantise_int8(lm.model)
    return lm


def steps(context: Context) -> Iterator[Line]:
    """Time, peak memory and a falling loss of steps with each choice of memory."""
    for name, (B, checkpointing, rank, int8) in VARIANTS.items():
        context.release()
        stage = Stage2(context, language_model(context, int8), B, checkpointing, rank)
        held = torch.cuda.memory_allocated() if context.cuda else context.weights.get_memory_footprint()
        layers = context.size.layers
        needed, there = held + memory_model(stage, 0 if checkpointing is False else layers), free_memory(context)
        if needed > there:
            yield context.skipped(name, f"it needs {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB are free")
            continue
        losses, times = [stage()], []
        _, peak = measure_peak(stage, context.device)
        count = STEPS[context.device.type] if checkpointing is None else 3
        for _ in range(count):
            context.wait()
            started = time.perf_counter()
            losses.append(stage())
            context.wait()
            times.append(time.perf_counter() - started)
        seconds, values = statistics.median(times), [float(loss) for loss in losses]
        expected = STEP if B == 4 and checkpointing is None else None
        note = f"{stage.recomputed} of {layers} blocks computed again"
        yield context.figure(f"{name}: a step of {stage.tokens} tokens", seconds, "s", expected, note)
        if count > 3:
            note = f"loss {values[0]:.4f} to {values[-1]:.4f} in {len(values)} steps"
            yield context.verdict(f"{name}: the loss falls", sum(values[-4:]) < 4 * values[0], note)
        needed = held + memory_model(stage, stage.recomputed)
        note = f"memory model {needed / 1e9:.2f} GB, of which weights {held / 1e9:.2f} GB"
        expected = MEMORY if B == 4 and checkpointing is True else None
        good = not context.cuda or peak < 1.3 * needed
        yield context.figure(f"{name}: peak memory", peak / 1e9, "GB", expected, note, good)
        del stage


def memory_model(stage: Stage2, recomputed: int) -> float:
    """Bytes of a step beside the weights, where so many blocks are computed again: what the blocks keep, what one needs
    for a moment in its backward pass, the logits of a part of the answer; the bridge with its optimizer."""
    lm, blocks = stage.lm, len(stage.lm.model.backbone.layers)
    keeping = (blocks - recomputed) * lm.memory.kept + recomputed * 4 * lm.width + TRANSIENT * lm.memory.kept
    bridge = 12 * stage.trained + stage.features.nbytes * 30
    return stage.tokens * keeping + 16 * LOSS_CHUNK * lm.model.config.vocab_size + bridge


def free_memory(context: Context) -> float:
    """Bytes that a step may take, those of the weights included."""
    if not context.cuda:
        return float("inf")
    return torch.cuda.mem_get_info(context.device)[0] + torch.cuda.memory_allocated(context.device)


def step_parts(context: Context) -> Iterator[Line]:
    """Where the time of one step goes, by the kernels' names."""
    B = 4 if context.cuda else 1
    stage = Stage2(context, context.lm(), B, None)
    stage()
    stage()
    context.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.cuda else [])]
    with profile(activities=activities) as record:
        started = time.perf_counter()
        stage()
        context.wait()
        wall = time.perf_counter() - started
    spent: dict[str, float] = {}
    for event in record.events():
        if context.cuda:
            marked = getattr(event, "is_user_annotation", False) or event.name.startswith(
                ("Optimizer.", "ProfilerStep")
            )
            if event.device_type != torch.autograd.DeviceType.CUDA or marked:
                continue
            own = event.time_range.elapsed_us()
        else:
            own = event.self_cpu_time_total
        spent[event.name] = spent.get(event.name, 0) + own / 1e6
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, seconds in spent.items():
        kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")] += seconds
    busy = sum(kinds.values())
    yield context.verdict("kernels seen by the profiler", busy > 0, f"{len(spent)} kinds")
    for kind, seconds in kinds.items():
        yield context.figure(kind, 100 * seconds / wall, "% of the step", note=f"{seconds * 1e3:.3g} ms")
    top = sorted(spent.items(), key=lambda one: -one[1])[:25]
    table = "\n".join(f"{seconds * 1e3:9.3f} ms  {name[:150]}" for name, seconds in top)
    # The profiler itself slows the launches: gaps are an upper bound.
    gaps = max(0.0, 1 - busy / wall)
    line = context.figure("gaps", 100 * gaps, "% of the step", note=f"{wall * 1e3:.4g} ms in all, under the profiler")
    yield Line(**{**vars(line), "detail": table})


def small_config(context: Context) -> Config:
    """The shipped encoder with the token grid of the manual."""
    side = 28 if context.cuda else 4
    keys = {"encoder_target_spatial": side, "max_visual_tokens": side**2, "slices": 1}
    return load_config(REPOSITORY / "assets" / "demo" / "paths.yaml", **keys)


def vision_part(context: Context) -> VisionBridge:
    config = small_config(context)
    encoder, _ = load_encoder(config)
    torch.manual_seed(0)
    return VisionBridge.build(config, encoder, context.size.width, 0.1, with_cmi=False).to(context.device)


def random_images(context: Context, B: int) -> Tensor:
    """(B, 1, 1, H, W), as a 2-D plan with one channel prepares them."""
    side = 256 if context.cuda else 64
    return torch.randn(B, 1, 1, side, side, device=context.device)


def attribution(context: Context) -> Iterator[Line]:
    """Peak memory and time of the maps of a report of 226 tokens."""
    size, device = context.size, context.device
    lm = context.lm()
    model = MedicalVLM(vision_part(context), lm).eval().requires_grad_(False)
    question, count = torch.randint(1, size.vocabulary - 3, (1, 30), device=device), 226 if context.cuda else 20
    batch = {
        "images": random_images(context, 1),
        "slice_position": torch.zeros(1, 1, device=device),
        "roi": torch.zeros(1, 1, 4, device=device),
        "question_ids": question,
        "question_mask": torch.ones_like(question),
    }
    ids = torch.randint(1, size.vocabulary - 3, (count,)).tolist()
    report = ReportLikelihood(model, batch, ids)
    spans = [range(start, start + count // 4) for start in (0, count // 4, count // 2)]
    for name, wanted in (("checkpointing auto", None), ("checkpointing on", True)):
        context.release()
        lm.checkpointing(wanted)
        maps: list[Tensor] = []
        seconds = []

        def call(maps: list[Tensor] = maps, seconds: list[float] = seconds) -> None:
            started = time.perf_counter()
            maps.append(attribution_maps(report, spans, torch.zeros_like(report.features), "evidence"))
            seconds.append(time.perf_counter() - started)

        _, peak = measure_peak(call, device)
        good = bool(maps[0].isfinite().all()) and float(maps[0].abs().sum()) > 0
        # What is free is used: only where all blocks are computed again the peak says what is needed.
        expected, note = MAPS if wanted else None, f"maps of three sentences in {seconds[0]:.3g} s"
        yield context.figure(f"{name}: peak memory", peak / 1e9, "GB", expected, note, good)


def stage1(context: Context) -> Iterator[Line]:
    """An epoch of Stage 1 with 300 cases: its steps, and its check of the tokens."""
    vision = vision_part(context).train()
    vision.freeze(train_encoder=False)
    optimizer = torch.optim.AdamW([p for p in vision.parameters() if p.requires_grad], lr=1e-4)
    images, position = random_images(context, 4), torch.zeros(4, 1, device=context.device)
    objective = ProxyL2()

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=context.cuda):
            visual = vision.visual_tokens(vision.features(images), position)
            loss = objective(visual, torch.arange(4, device=context.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    epoch = 75 * context.seconds(step, least=0.1)
    D = context.size.width
    tokens = 0.1 * torch.randn(DIAGNOSED_IMAGES, MAX_TOKENS // DIAGNOSED_IMAGES, D, device=context.device)
    check = once(lambda: token_statistics(tokens, 0.1), context)
    yield context.figure("75 steps of 4 cases", epoch, "s", note="without reading them from the disk")
    label = f"check of {MAX_TOKENS} tokens of width {D}"
    yield context.figure(label, check, "s", CHECK)


def once(call: Callable[[], object], context: Context) -> float:
    """Seconds of a single call."""
    context.wait()
    started = time.perf_counter()
    call()
    context.wait()
    return time.perf_counter() - started
