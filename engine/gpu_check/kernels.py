"""Checks 1 to 4: the machine, the choice of a backend, its numbers and its times.

Letters: B batch, E channels, L tokens, N state.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba.modeling_mamba import MambaRMSNorm

from engine.gpu_check.context import Context, Expected, Line
from engine.gpu_check.first_scan import STATE, first_scan, on
from engine.run import native_bf16
from models.language_model.hf_patch import causal_conv_silu, norm_and_residual
from models.selective_scan import BACKENDS, BackendUnavailable, ScanFunction, ScanInputs
from models.selective_scan.backend_reference import scan as reference_scan
from models.selective_scan.selftest import results, sample_inputs

TAPS, EPSILON = 4, 1e-5  # as Mamba has them
PACKAGES = ("torch", "triton", "triton-windows", "transformers", "accelerate", "mamba-ssm", "bitsandbytes")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative, in norm
LONG = 1000  # tokens; the reference takes them one by one, for seconds, and is asked twice
MATMUL = Expected(600, 180, "TFLOP/s", least=True)
COPY = Expected(2600, 1400, "GB/s", least=True)
FIRST_COMPILE, SECOND_COMPILE = Expected(60, 60, "s"), Expected(5, 5, "s")


def machine(context: Context) -> Iterator[Line]:
    """Versions, capability, memory, matrix products, bandwidth."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    yield context.verdict("versions", True, ", ".join(f"{name} {value}" for name, value in found.items()))
    if context.cuda:
        properties = torch.cuda.get_device_properties(context.device)
        free, total = torch.cuda.mem_get_info(context.device)
        capability = f"{properties.major}.{properties.minor}"
        facts = f"{context.card}, compute capability {capability}, {properties.multi_processor_count} multiprocessors"
        facts += f", CUDA {torch.version.cuda}, driver {driver()}"
        built = torch.cuda.get_arch_list()
        known = any(int(arch.rsplit("_", 1)[1].rstrip("af")) // 10 == properties.major for arch in built)
        facts += "" if known else f"; this torch is built for {', '.join(built)}"
        yield context.verdict("card", known, facts)
        yield context.verdict("memory", free > 0.5 * total, f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB")
        yield context.verdict("bfloat16", native_bf16(), "computed by the card")
    n = 8192 if context.cuda else 256
    a, b = (torch.randn(n, n, device=context.device).bfloat16() for _ in range(2))
    rate = 2 * n**3 / context.seconds(lambda: a @ b)
    yield context.figure(f"matrix product {n} x {n} x {n}, bfloat16", rate / 1e12, "TFLOP/s", MATMUL)
    yield context.figure("copy, bytes read and written", context.copy_rate / 1e9, "GB/s", COPY)


def driver() -> str:
    """Version of NVIDIA's driver, by its own tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=False)
    return done.stdout.split("\n")[0].strip() or "unknown"


def backend(context: Context) -> Iterator[Line]:
    """Which backend, why, and how long it compiles in a first process and in a second one."""
    with tempfile.TemporaryDirectory() as cache:
        chosen, first = fresh_scan(context, cache)
        quick = "mamba_ssm|triton" if context.cuda else "numba|torch"
        good = re.search(rf"selective scan on \w+: ({quick})\b", chosen) is not None
        yield context.verdict("backend", good, chosen)
        yield context.figure("first process, self-test and first pass", first, "s", FIRST_COMPILE)
        if context.cuda:
            again, second = fresh_scan(context, cache)
            yield context.figure(
                "second process, self-test and first pass", second, "s", SECOND_COMPILE, good=again == chosen
            )


def fresh_scan(context: Context, cache: str) -> tuple[str, float]:
    """What :func:`first_scan` says in a process of its own, whose Triton keeps what it compiles in ``cache``."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = cache
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(first_scan, str(context.device)).result()
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before


def numbers(context: Context) -> Iterator[Line]:
    """Every backend against the float64 reference: output, last state and all gradients."""
    E, lengths = (5120, (1, 17, 1040)) if context.cuda else (70, (1, 17, 40))
    references: dict[tuple[int, torch.dtype, bool, bool], dict[str, Tensor]] = {}
    for name, scan in working_backends(context):
        if isinstance(scan, str):
            yield context.skipped(name, scan)
            continue
        worst: dict[torch.dtype, tuple[float, str]] = {}
        for L in lengths:
            for dtype in TOLERANCE:
                for reverse in (False, True):
                    inputs = on(sample_inputs(1 if L >= LONG else 2, E, L, STATE, dtype), context.device)
                    if name == "mamba_ssm":  # its kernel takes no initial state: another backend would compute
                        inputs = inputs._replace(initial_state=None)
                    key = L, dtype, reverse, inputs.initial_state is None
                    if key not in references:
                        exact = ScanInputs(*(None if t is None else t.double() for t in inputs))
                        references[key] = {
                            n: t.detach().cpu() for n, t in results(reference_scan, exact, reverse).items()
                        }
                    found = results(scan, inputs, reverse)
                    for what, expected in references[key].items():
                        error = relative_error(found[what], expected)
                        place = f"{what}, L {L}{', reversed' if reverse else ''}"
                        worst[dtype] = max(worst.get(dtype, (0.0, "")), (error, place))
        for dtype, (error, place) in worst.items():
            label = f"{name}, {str(dtype).removeprefix('torch.')}, E {E}, N {STATE}, L {'/'.join(map(str, lengths))}"
            bound = f"at most {TOLERANCE[dtype]:g}"
            good = error <= TOLERANCE[dtype]
            yield context.verdict(label, good, f"largest relative error {error:.1e} ({place}), {bound}")
    yield from beside_the_products(context, E, lengths)


def beside_the_products(context: Context, E: int, lengths: Iterable[int]) -> Iterator[Line]:
    """The convolution with SiLU and the norm, as the language model calls them, and the gradients of their inputs."""
    torch.manual_seed(0)
    for name, call, exact in (
        ("convolution with SiLU", causal_conv_silu, convolved_exactly),
        ("norm", normed, normed_exactly),
    ):
        for dtype, bound in TOLERANCE.items():
            worst = 0.0
            for L in lengths:
                shapes = (2, L, E), (E, TAPS), (E,), (2, TAPS - 1, E), (2, L, E)
                x, weight, bias, before, above = (torch.randn(s, device=context.device).to(dtype) for s in shapes)
                given = x.requires_grad_(), weight, bias, before
                wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in given)
                found, expected = call(*given), exact(*wide)
                gradients = torch.autograd.grad(found, x, above), torch.autograd.grad(expected, wide[0], above.double())
                pairs = (found, expected), (gradients[0][0], gradients[1][0])
                worst = max([worst, *(relative_error(one, other.detach().cpu()) for one, other in pairs)])
            measured = f"largest relative error {worst:.1e}, at most {bound:g}"
            yield context.verdict(f"{name}, {str(dtype).removeprefix('torch.')}", worst <= bound, measured)


def convolved_exactly(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Tensor:
    whole = torch.cat([before, x], 1).mT
    return F.silu(F.conv1d(whole, weight[:, None], bias, groups=len(weight))).mT


def normed(x: Tensor, _: Tensor, weight: Tensor, __: Tensor) -> Tensor:
    """The norm and the residual beside it: the sum has both gradients."""
    norm = MambaRMSNorm(len(weight), EPSILON).to(x.device, x.dtype).requires_grad_(False)
    norm.weight.copy_(weight)
    one, residual = norm_and_residual(norm, x, x.dtype, x.dtype)
    return one + residual


def normed_exactly(x: Tensor, _: Tensor, weight: Tensor, __: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight + x


def working_backends(context: Context) -> Iterator[tuple[str, ScanFunction | str]]:
    """Each backend of this device by name, or why it does not work here."""
    for candidate in BACKENDS:
        if candidate.name == "reference" or not candidate.serves(context.device.type):
            continue
        try:
            yield candidate.name, candidate.load(context.device.type, False).scan
        except BackendUnavailable as reason:
            yield candidate.name, str(reason)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """In norm; infinite where a value is not finite."""
    actual = actual.detach().cpu().double()
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def scan_times(context: Context) -> Iterator[Line]:
    """Forward, and forward with backward as a frozen model needs it, beside other backends and the bandwidth."""
    E, L = (5120, 1040) if context.cuda else (64, 40)
    found = dict(working_backends(context))
    best = next(name for name in ("triton", "numba", "torch") if name in found and not isinstance(found[name], str))
    others = [name for name in ("mamba_ssm", "torch") if name != best and not isinstance(found.get(name, ""), str)]
    if "mamba_ssm" not in others:
        yield context.skipped("beside mamba-ssm", str(found.get("mamba_ssm", "it needs a CUDA device")))
    for B in (1, 4, 16) if context.cuda else (1, 2):
        for backward in (False, True):
            label = f"{'forward + backward' if backward else 'forward'}, B {B}"
            seconds = {}
            for name in (best, *others):
                if name == "torch" and B > 4:
                    continue  # it needs the memory of all states
                rounds = 5 if name == best else 3
                call = scan_call(found[name], B, E, L, context.device, backward)
                seconds[name] = context.seconds(call, rounds)
            limit = (11 if backward else 4) * 2 * B * E * L / context.copy_rate  # each value of u, Δ, z, y once
            parts = [f"{name} {value * 1e3:.3g} ms" for name, value in seconds.items() if name != best]
            note = ", ".join([*parts, f"bandwidth limit {limit * 1e3:.3g} ms"])
            good = True
            if "mamba_ssm" in seconds:  # within 1.25 times its time at batch 1, ahead from batch 4 on
                good = seconds[best] <= seconds["mamba_ssm"] * (1.25 if B == 1 else 1)
            yield context.figure(f"{best}, {label}", seconds[best] * 1e3, "ms", note=note, good=good)


def scan_call(scan: ScanFunction, B: int, E: int, L: int, device: torch.device, backward: bool) -> Callable[[], object]:
    """A scan with the layout and dtypes of the language model's; its A, D and bias are frozen."""
    torch.manual_seed(0)
    u, delta, z, above = (torch.randn(B, L, E, device=device).bfloat16().mT for _ in range(4))
    B_, C_ = (torch.randn(B, L, STATE, device=device).bfloat16().mT for _ in range(2))
    A = -torch.arange(1.0, STATE + 1, device=device).repeat(E, 1)
    D, bias = torch.ones(E, device=device), torch.full((E,), -4.0, device=device)
    leaves = [t.requires_grad_(backward) for t in (u, delta, B_, C_, z)]
    inputs = ScanInputs(u, delta, A, B_, C_, D, z, bias)

    def call() -> object:
        with torch.set_grad_enabled(backward):
            y, _ = scan(inputs, True, False)
        return torch.autograd.grad(y, leaves, above) if backward else y

    return call
