"""Every backend of the selective scan against recorded official results and against the float64 reference.

Under TRITON_INTERPRET=1 the backend is Triton's, in its interpreter and with smaller inputs: test_backend_triton.py
runs this file so.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from config.errors import InputError
from models import selective_scan
from models.selective_scan import BackendUnavailable, ScanInputs, backend_torch, selective_state_update
from models.selective_scan import selective_scan as run_scan
from models.selective_scan.backend_reference import scan as reference_scan
from models.selective_scan.selftest import check_scan

NAMES = ScanInputs._fields
GOLDEN_NAMES = NAMES[:-1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TESTED = ("triton",) if INTERPRETED else ("numba", "torch")
MODULES = {"numba": "numba", "triton": "triton"}  # what a backend needs
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=TESTED)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in MODULES:
        pytest.importorskip(MODULES[request.param])
    monkeypatch.setenv(selective_scan.FORCE_VARIABLE, request.param)
    if INTERPRETED:  # where the self-test takes half a minute: test_official_results_and_gradients runs it
        monkeypatch.setattr(importlib.import_module(f"models.selective_scan.backend_{request.param}"), "check", id)
    return request.param


def make_inputs(
    batch: int, channels: int, states: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    inputs = {
        "u": normal(batch, channels, length).to(dtype),
        "delta": normal(batch, channels, length).to(dtype),
        "A": -torch.exp(normal(channels, states)).float(),
        "B": normal(batch, states, length).to(dtype),
        "C": normal(batch, states, length).to(dtype),
        "D": normal(channels).float(),
        "z": normal(batch, channels, length).to(dtype),
        "delta_bias": (normal(channels) - 2).float(),
        "initial_state": normal(batch, channels, states).float(),
    }
    return {k: v.double() for k, v in inputs.items()} if dtype is torch.float64 else inputs


def results(
    scan: object, inputs: dict[str, Tensor], grad_y: Tensor, grad_last: Tensor | None, **options: bool
) -> dict[str, Tensor]:
    """y, last state and all gradients, by name."""
    # detach().clone() would lose the strides under test for expanded tensors; detach alone keeps them.
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y, last = scan(leaves, **options)
    outputs = [(y, grad_y)] if grad_last is None else [(y, grad_y), (last, grad_last)]
    grads = [grad.to(value.dtype) for value, grad in outputs]
    found = torch.autograd.grad([value for value, _ in outputs], list(leaves.values()), grads, allow_unused=True)
    named = {f"grad {k}": g for k, g in zip(leaves, found, strict=True)}
    return {"y": y.detach(), "last": last.detach(), **named}


def through_function(leaves: dict[str, Tensor], **options: bool) -> tuple[Tensor, Tensor]:
    return run_scan(**leaves, return_last_state=True, **options)


def through_reference(leaves: dict[str, Tensor], **options: bool) -> tuple[Tensor, Tensor]:
    return reference_scan(ScanInputs(**leaves), options.get("delta_softplus", False), options.get("reverse", False))


def relative_error(actual: Tensor, expected: Tensor, smallest: float = 1e-6) -> float:
    """Norm of the difference over the norm of ``expected``, or over ``smallest`` if that is larger."""
    scale = expected.double().norm().clamp_min(smallest)
    return float((actual.double() - expected.double()).norm() / scale)


def assert_matches_reference(inputs: dict[str, Tensor], dtype: torch.dtype, seed: int, **options: bool) -> None:
    random = torch.Generator().manual_seed(seed + 1)
    grad_y = torch.randn(inputs["u"].shape, generator=random).to(dtype)
    grad_last = torch.randn(inputs["u"].shape[0], *inputs["A"].shape, generator=random)
    actual = results(through_function, inputs, grad_y, grad_last, **options)
    exact_inputs = {name: value.double() for name, value in inputs.items()}
    expected = results(through_reference, exact_inputs, grad_y.double(), grad_last.double(), **options)
    assert actual["y"].dtype is dtype
    # Gradients summed over tokens may cancel; their error is that of the terms.
    terms = 0.1 * float(torch.stack([expected["grad u"].norm(), expected["grad delta"].norm()]).max())
    for name, value in expected.items():
        smallest = terms if name in ("grad A", "grad D", "grad delta_bias") else 1e-6
        assert relative_error(actual[name], value, smallest) < TOLERANCE[dtype], name
    for name, value in inputs.items():
        assert actual[f"grad {name}"].dtype is value.dtype, name


@pytest.mark.parametrize("name", TESTED if INTERPRETED else ("reference", *TESTED))
def test_official_results_and_gradients(name: str, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    monkeypatch.setenv(selective_scan.FORCE_VARIABLE, name)
    selective_scan._resolve.cache_clear()
    with np.load(assets / "golden" / "selective_scan.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    inputs = {key: golden[key] for key in GOLDEN_NAMES}
    actual = results(through_function, inputs, golden["grad_out"], None, delta_softplus=True)
    assert relative_error(actual["y"], golden["out"]) < 1e-6
    assert relative_error(actual["last"], golden["last_state"]) < 1e-6
    for key in GOLDEN_NAMES:
        assert relative_error(actual[f"grad {key}"], golden[f"grad_{key}"]) < 1e-6, key


LAYOUTS = ("plain", "channels last", "every other", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (for "expanded", the first token's) with other strides."""
    if layout == "channels last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
    if layout == "expanded":
        return tensor[..., :1].expand_as(tensor)
    return tensor


SIZES = st.tuples(
    st.integers(1, 2 if INTERPRETED else 3),  # batch
    st.integers(1, 40),  # channels
    st.integers(1, 5 if INTERPRETED else 19),  # states
    st.integers(1, 40 if INTERPRETED else 300),  # length
)
OPTIONS = st.fixed_dictionaries({"delta_softplus": st.booleans(), "reverse": st.booleans()})


@settings(
    max_examples=8 if INTERPRETED else 40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=SIZES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    absent=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"])),
    layouts=st.fixed_dictionaries({k: st.sampled_from(LAYOUTS) for k in ("u", "delta", "B", "C", "z")}),
    options=OPTIONS,
    seed=st.integers(0, 999),
)
def test_any_shape_dtype_and_stride(
    backend: str, sizes: tuple, dtype: torch.dtype, absent: set[str], layouts: dict, options: dict, seed: int
) -> None:
    inputs = make_inputs(*sizes, dtype, seed)
    if not options["delta_softplus"]:  # a negative step size makes the state grow without bound
        inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs() * 0.1, inputs["delta_bias"].abs() * 0.1
    inputs = {k: laid_out(v, layouts.get(k, "plain")) for k, v in inputs.items() if k not in absent}
    assert_matches_reference(inputs, dtype, seed, **options)


def extreme(delta: Tensor, softplus: bool, seed: int) -> Tensor:
    """Step sizes from nothing to 10,000, or what softplus turns into such."""
    values = torch.tensor([0.0, 1e-30, 1e-4, 0.01, 0.1, 19.9, 20.1, 60.0, 1e4] + [-5.0, -60.0, -1e4] * softplus)
    return values[torch.randint(len(values), delta.shape, generator=torch.Generator().manual_seed(seed))]


@settings(
    max_examples=4 if INTERPRETED else 8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    channels=st.integers(1, 20),
    states=st.integers(1, 3 if INTERPRETED else 16),
    length=st.integers(1, 70 if INTERPRETED else 2000),
    options=OPTIONS,
    calm=st.booleans(),
    seed=st.integers(0, 999),
)
def test_long_sequences_and_extreme_step_sizes(
    backend: str, channels: int, states: int, length: int, options: dict[str, bool], calm: bool, seed: int
) -> None:
    """``calm`` sequences only remember for long: the extremes forget everything again and again."""
    inputs = make_inputs(1, channels, states, length, seed=seed)
    if calm:
        inputs["delta_bias"] -= 4
        options["delta_softplus"] = True
    else:
        inputs["delta"] = extreme(inputs["delta"], options["delta_softplus"], seed)
        inputs["delta_bias"] = torch.zeros(channels)
    assert_matches_reference(inputs, torch.float32, seed, **options)


def test_mixed_precision_inputs_keep_their_own_gradient_dtypes(backend: str) -> None:
    inputs = make_inputs(2, 20, 4, 50)
    inputs["u"], inputs["B"] = inputs["u"].bfloat16(), inputs["B"].bfloat16()
    assert_matches_reference(inputs, torch.bfloat16, 0, delta_softplus=True)


def test_empty_sequence_returns_the_initial_state(backend: str) -> None:
    inputs = make_inputs(2, 5, 3, 0)
    y, last = run_scan(**inputs, return_last_state=True)
    assert y.shape == (2, 5, 0)
    assert torch.equal(last, inputs["initial_state"])


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def beside_another(tensor: Tensor) -> Tensor:
    """Channels last, of rows twice as long, as one half of a projection is."""
    return torch.stack([tensor.mT, torch.full_like(tensor.mT, torch.nan)], -2)[..., 0, :].mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [channels_last, beside_another])
def test_every_layout_gives_the_same(backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """50 channels: three whole vectors of the numba kernels, and two channels beside."""
    inputs = make_inputs(2, 50, 4, 70, dtype)
    laid = {name: layout(value) if name in ("u", "delta", "z") else value for name, value in inputs.items()}
    assert laid["u"].stride(1) == 1 and torch.equal(laid["u"], inputs["u"])
    for options in ({"delta_softplus": True}, {"delta_softplus": True, "reverse": True}):
        random = torch.Generator().manual_seed(1)
        grad_y, grad_last = (torch.randn(2, 50, n, generator=random) for n in (70, 4))
        grad_y = grad_y.to(dtype)
        expected = results(through_function, inputs, grad_y, grad_last, **options)
        actual = results(through_function, laid, layout(grad_y), grad_last, **options)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, channels_last])
def test_nan_is_not_swallowed(backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 20, 4, 80, dtype)
    inputs["u"][0, 3, 40] = torch.nan
    inputs["A"][7, 2] = torch.nan
    inputs |= {name: layout(inputs[name]) for name in ("u", "delta", "z")}
    y = run_scan(**inputs, delta_softplus=True)
    bad = y.isnan()[0]
    assert bad[3, 40:].all() and bad[7].all()
    assert not bad[3, :40].any() and not bad[torch.tensor([i for i in range(20) if i not in (3, 7)])].any()


def test_an_infinite_step_reaches_its_own_channel_alone(backend: str) -> None:
    inputs = make_inputs(1, 20, 4, 40)
    inputs["u"], inputs["B"] = inputs["u"].abs(), inputs["B"].abs()  # so that no sum is inf - inf
    inputs["C"], inputs["delta"][0, 3, 25] = inputs["C"].abs(), torch.inf
    y = run_scan(**inputs | {"z": torch.ones_like(inputs["u"])}, delta_softplus=True)[0]
    assert torch.isposinf(y[3, 25]) and y[3, :25].isfinite().all()
    assert y[torch.arange(20) != 3].isfinite().all()


def test_reverse_equals_flipping(backend: str) -> None:
    inputs = make_inputs(2, 20, 5, 70)
    flipped = {k: v.flip(-1) if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    y, last = run_scan(**inputs, delta_softplus=True, reverse=True, return_last_state=True)
    y_flipped, last_flipped = run_scan(**flipped, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(y, y_flipped.flip(-1))
    torch.testing.assert_close(last, last_flipped)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_of_the_torch_backend(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_torch, "CHUNK", 2)
    inputs = {k: v.requires_grad_() for k, v in make_inputs(2, 2, 2, 5, torch.float64).items()}

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return backend_torch.scan(ScanInputs(*tensors), True, reverse)

    assert torch.autograd.gradcheck(scan, tuple(inputs[name] for name in NAMES))


def test_backward_keeps_little(backend: str) -> None:
    batch, channels, states, length = 2, 32, 16, 512
    if INTERPRETED:
        batch, states, length = 1, 4, 128
    inputs = {k: v.requires_grad_() for k, v in make_inputs(batch, channels, states, length).items()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_scan(**inputs, delta_softplus=True)
    beside_inputs = sum(kept.values()) - sum(v.numel() for v in inputs.values())
    assert kept and beside_inputs < batch * channels * states * length / (7.5 if backend == "triton" else 16)


def test_autocast_does_not_reach_inside(backend: str) -> None:
    inputs = make_inputs(1, 16, 4, 40)
    expected = run_scan(**inputs, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_scan(**inputs, delta_softplus=True)
    assert torch.equal(actual, expected)


@torch.inference_mode()
def test_the_self_test_has_gradients_wherever_it_is_run() -> None:
    check_scan(backend_torch.scan, "cpu", channels=5, length=9)
    with pytest.raises(BackendUnavailable, match="wrong numbers"):
        check_scan(lambda *given: tuple(2 * t for t in backend_torch.scan(*given)), "cpu", channels=5, length=9)


def test_threads_and_concurrent_callers_agree(backend: str) -> None:
    inputs = make_inputs(3, 50, 4, 90)
    grad_y, before = torch.ones(3, 50, 90), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(through_function, inputs, grad_y, None, delta_softplus=True)
        torch.set_num_threads(3)
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(results, through_function, inputs, grad_y, None, delta_softplus=True) for _ in range(8)]
            together = [job.result() for job in jobs]
    finally:
        torch.set_num_threads(before)
    for one in together:
        for key in ("y", "last", "grad u", "grad A", "grad B", "grad C"):
            torch.testing.assert_close(one[key], alone[key], rtol=1e-5, atol=1e-4, msg=key)


@pytest.mark.skipif(INTERPRETED, reason="a numba kernel")
def test_powers_of_two_in_vectors() -> None:
    numba = pytest.importorskip("numba")
    from models.selective_scan import kernels_numba

    @numba.njit
    def kernel(tiles):
        for row in range(len(tiles)):
            kernels_numba.store(tiles, row, kernels_numba.exp2(kernels_numba.load(tiles, row)))

    special = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 128, -127, 0, -0.0, 1, 127, -126, 0.5, -0.5, 1.5, -1.5])
    exponents = np.concatenate([np.linspace(-135, 135, 2**14), special]).astype(np.float32).reshape(-1, 16)
    actual = exponents.copy()
    kernel(actual)
    with np.errstate(over="ignore"):
        exact = np.exp2(exponents.astype(np.float64))
    assert np.array_equal(np.isnan(actual), np.isnan(exponents))
    inside = (exponents >= -126) & (exponents <= 127.5)
    assert np.abs(actual[inside] / exact[inside] - 1).max() < 2e-7
    assert (actual[exponents < -126.5] == 0).all() and np.isinf(actual[exponents > 127.5]).all()


FORK_SCRIPT = """
import os, signal, torch
from models.selective_scan import selective_scan
torch.set_num_threads(2)
x = torch.ones(1, 64, 8)
run = lambda: selective_scan(x, x, -torch.ones(64, 2), x[:, :2], x[:, :2])
expected = run()
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that hangs ends itself
    os._exit(0 if torch.equal(run(), expected) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_numba_works_in_a_forked_child() -> None:
    """Of the torch backend this cannot be asked: PyTorch's own threads do not survive a fork."""
    pytest.importorskip("numba")
    environment = {**os.environ, selective_scan.FORCE_VARIABLE: "numba"}
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", FORK_SCRIPT], check=True, timeout=60, cwd=root, env=environment)


def test_single_steps_equal_the_scan(backend: str) -> None:
    inputs = make_inputs(2, 6, 4, 12)
    state = inputs["initial_state"].clone()
    expected, last = run_scan(**inputs, delta_softplus=True, return_last_state=True)
    constant = {k: inputs[k] for k in ("A", "D", "delta_bias")}
    steps = []
    for t in range(12):
        moving = {k: inputs[k][..., t] for k in ("u", "delta", "B", "C", "z")}
        steps.append(selective_state_update(state, **moving, **constant, delta_softplus=True))
    torch.testing.assert_close(torch.stack(steps, -1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_step_equals_plain_pytorch(backend: str, dtype: torch.dtype, absent: tuple[str, ...]) -> None:
    inputs = make_inputs(2, 37, 5, 3, dtype)
    moving = {k: inputs[k][..., 1] for k in ("u", "delta", "B", "C", "z")}
    given_ = {**moving, **{k: inputs[k] for k in ("A", "D", "delta_bias")}}
    given_ = {k: None if k in absent else v for k, v in given_.items()}
    state = torch.full((2, 37, 10), torch.nan)[..., ::2].copy_(inputs["initial_state"])
    exact = {k: None if v is None else v.double() for k, v in given_.items()}
    expected_state = inputs["initial_state"].double()
    softplus = "delta_bias" not in absent
    expected = selective_scan.reference_state_update(expected_state, ScanInputs(**exact), softplus)
    y = selective_state_update(state, **given_, delta_softplus=softplus)
    assert y.dtype is dtype
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert relative_error(state, expected_state) < TOLERANCE[torch.float32]


def test_double_precision_stays_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(selective_scan.FORCE_VARIABLE, raising=False)
    assert_matches_reference(make_inputs(1, 4, 3, 40, torch.float64), torch.float64, 0, delta_softplus=True)


def test_choice_is_announced_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(selective_scan.FORCE_VARIABLE, "torch")
    selective_scan._resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger=selective_scan.__name__):
        for _ in range(3):
            run_scan(*(make_inputs(1, 2, 2, 3)[k] for k in NAMES[:5]))
    assert [r.message for r in caplog.records] == ["selective scan on cpu: torch (forced by MAMBA_SCAN_BACKEND)"]


def test_unknown_backend_names_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selective_scan.FORCE_VARIABLE, "cuda")
    with pytest.raises(InputError, match="MAMBA_SCAN_BACKEND=cuda.*mamba_ssm, triton, numba, torch, reference"):
        run_scan(*(make_inputs(1, 2, 2, 3)[k] for k in NAMES[:5]))


OWN_MODULES = ("backend_mamba_ssm", "backend_triton", "kernels_triton", "backend_numba", "kernels_numba")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Call it with packages that shall be absent."""

    def hide(*packages: str) -> None:
        for module in OWN_MODULES:
            monkeypatch.delitem(sys.modules, f"models.selective_scan.{module}", raising=False)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delenv(selective_scan.FORCE_VARIABLE, raising=False)
        selective_scan._resolve.cache_clear()

    yield hide
    selective_scan._resolve.cache_clear()


@pytest.mark.parametrize("packages", [("numba",), ("triton",), ("mamba_ssm", "triton", "numba")])
def test_without_optional_packages(
    packages: tuple[str, ...], without: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Automatic choice goes on to the next; a forced backend says what is missing; a scan runs."""
    without(*packages)
    inputs = make_inputs(1, 2, 2, 3)
    exact = {name: value.double() for name, value in inputs.items()}
    assert relative_error(run_scan(**inputs), through_reference(exact)[0]) < 1e-5
    if "numba" in packages:
        assert selective_scan._resolve("cpu", False, "") is backend_torch
    for name in packages:
        monkeypatch.setenv(selective_scan.FORCE_VARIABLE, name)
        reason = "it runs on cuda, not on cpu" if name == "mamba_ssm" else f"importing it fails: .*{name}"
        with pytest.raises(InputError, match=f"MAMBA_SCAN_BACKEND={name} cannot be used: {reason}"):
            run_scan(**inputs)


def test_a_gpu_without_its_packages_gets_torch(without: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """Which backend serves a type of device is decided without touching one."""
    without("mamba_ssm", "triton")
    with caplog.at_level(logging.INFO, logger=selective_scan.__name__):
        assert selective_scan._resolve("cuda", False, "") is backend_torch
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("selective scan on cuda: torch (not mamba_ssm: importing it fails: ")
    assert "(not triton: importing it fails: " in message and "numba" not in message


def test_preference() -> None:
    serving = {kind: [b.name for b in selective_scan.BACKENDS if b.serves(kind)] for kind in ("cpu", "cuda", "xpu")}
    assert serving["cpu"] == ["numba", "torch", "reference"]
    assert serving["cuda"] == ["mamba_ssm", "triton", "torch", "reference"]
    assert serving["xpu"] == ["triton", "torch", "reference"]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_refused(name: str) -> None:
    inputs = make_inputs(2, 6, 4, 12)
    wrong = {**inputs, name: torch.cat((inputs[name], inputs[name]))}
    with pytest.raises(ValueError, match="must have shape"):
        run_scan(**wrong)
    step = {k: v if k in ("A", "D", "delta_bias") else v[..., 0] for k, v in wrong.items() if k != "initial_state"}
    if name != "initial_state":
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            selective_state_update(inputs["initial_state"], **step)
