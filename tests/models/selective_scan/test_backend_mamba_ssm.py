"""The adapter to mamba-ssm, with a stand-in for the package: it needs a GPU and a CUDA tool chain to install.

The stand-in has the package's limits as its source shows them, and takes its numbers from the reference.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from models import selective_scan
from models.selective_scan import BackendUnavailable, ScanInputs, backend_mamba_ssm, backend_torch
from models.selective_scan.backend_reference import scan as reference_scan
from models.selective_scan.selftest import expect_close, results, sample_inputs

Function = Callable[..., tuple[Tensor, Tensor]]
OPTIONAL = ("D", "z", "delta_bias")
Install = Callable[[Function], None]


def kernel(
    *tensors: Tensor, delta_softplus: bool, return_last_state: bool, **optional: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``mamba_ssm.selective_scan_fn``: the last state is returned, but backward does not see it."""
    inputs = ScanInputs(*tensors, **optional)
    assert return_last_state and inputs.A.shape[1] <= 256 and inputs.u.numel() > 0
    for moving in filter(torch.is_tensor, (inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z)):
        assert moving.dtype is inputs.u.dtype and moving.stride(-1) == 1
    assert all(t.dtype is torch.float32 for t in (inputs.A, inputs.D, inputs.delta_bias) if t is not None)
    y, last = reference_scan(inputs, delta_softplus, False)
    return y, last.detach()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a function in the place of the package's."""
    caches = (backend_mamba_ssm._kernel, backend_mamba_ssm._other, selective_scan._resolve)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(backend_mamba_ssm, "KERNEL_TOKENS", 40)  # the self-test's length follows; its speed too

    def put(function: Function) -> None:
        package = ModuleType("mamba_ssm")
        package.selective_scan_fn = function
        monkeypatch.setitem(sys.modules, "mamba_ssm", package)

    yield put
    for cache in caches:
        cache.cache_clear()


def inputs_of(dtype: torch.dtype = torch.float32, length: int = 21, **changed: Tensor | None) -> ScanInputs:
    return sample_inputs(2, 6, length, 4, dtype)._replace(**changed)


def assert_equal_to_reference(inputs: ScanInputs, reverse: bool, tolerance: float, use_last: bool = True) -> None:
    actual = results(backend_mamba_ssm.scan, inputs, reverse, use_last)
    for name, tensor in inputs._asdict().items():
        assert tensor is None or actual[f"the gradient of {name}"].dtype is tensor.dtype
    exact = ScanInputs(*(t if t is None else t.double() for t in inputs))
    for name, expected in results(reference_scan, exact, reverse, use_last).items():
        expect_close(name, actual[name], expected, tolerance, "cpu")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("absent", [["initial_state"], ["initial_state", "D"], ["initial_state", *OPTIONAL], [], ["z"]])
@pytest.mark.parametrize("use_last", [False, True])
def test_equals_the_reference(install: Install, absent: list[str], reverse: bool, use_last: bool) -> None:
    """With the gradient of the last state, and with the initial state, though the kernel knows neither."""
    install(kernel)
    assert_equal_to_reference(inputs_of(**dict.fromkeys(absent)), reverse, 2e-5, use_last)


@pytest.mark.parametrize("half", ["u", "delta", "B", "z", "all"])
def test_mixed_dtypes_are_promoted(install: Install, half: str) -> None:
    """y is in the dtype of u; one float32 tensor among the others is not rounded."""
    install(kernel)
    names = ("u", "delta", "B", "C", "z") if half == "all" else (half,)
    plain = inputs_of(initial_state=None)
    inputs = plain._replace(**{name: getattr(plain, name).bfloat16() for name in names})
    assert backend_mamba_ssm.scan(inputs, True, False)[0].dtype is inputs.u.dtype
    assert_equal_to_reference(inputs, False, 2e-2)


@pytest.mark.parametrize("unserved", ["an initial state", "no tokens", "300 states"])
def test_what_the_kernel_cannot_do_goes_to_another_backend(
    install: Install, unserved: str, caplog: pytest.LogCaptureFixture
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the kernel was asked")

    install(never)
    inputs = inputs_of(length=0 if unserved == "no tokens" else 21)
    if unserved != "an initial state":
        inputs = inputs._replace(initial_state=None)
    if unserved == "300 states":
        inputs = inputs._replace(A=-torch.rand(6, 300), B=torch.randn(2, 300, 21), C=torch.randn(2, 300, 21))
    with caplog.at_level(logging.INFO, logger=backend_mamba_ssm.__name__):
        for _ in range(2):
            y, last = backend_mamba_ssm.scan(inputs, True, False)
    expected_y, expected_last = backend_torch.scan(inputs, True, False)
    assert torch.equal(y, expected_y) and torch.equal(last, expected_last)
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("selective scan on cpu: calls that mamba_ssm cannot serve go to torch (not triton: ")


def test_a_single_step_is_the_other_backend(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(kernel)
    *tensors, state = inputs_of()
    step = ScanInputs(*(t[..., 0] if t.ndim == 3 else t for t in tensors))
    expected_state, actual_state = state.clone(), state.clone()
    expected = selective_scan.reference_state_update(expected_state, step, True)
    assert torch.equal(backend_mamba_ssm.state_update(actual_state, step, True), expected)
    assert torch.equal(actual_state, expected_state)
    other = SimpleNamespace(state_update=lambda *_: "fused")
    monkeypatch.setattr(backend_mamba_ssm, "_other", lambda _: other)
    assert backend_mamba_ssm.state_update(actual_state, step, True) == "fused"


def test_memory_that_starts_at_an_odd_address_is_copied(install: Install) -> None:
    def strict(u: Tensor, *others: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        assert u.data_ptr() % 16 == 0 and u.is_contiguous()
        return kernel(u, *others, **options)

    install(strict)
    odd = torch.randn(2 * 6 * 16 + 1)[1:].view(2, 6, 16)
    backend_mamba_ssm.scan(inputs_of(length=16, u=odd, initial_state=None), True, False)


def test_the_last_state_is_its_own_memory(install: Install) -> None:
    """The kernel's is a slice of its work space, which must be neither kept alive nor overwritten."""
    space = {}

    def sliced(*tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        y, last = kernel(*tensors, **options)
        space["last"] = torch.stack((last, last), -1)[..., 1]
        return y, space["last"]

    install(sliced)
    _, last = backend_mamba_ssm.scan(inputs_of(initial_state=None), True, False)
    assert last.is_contiguous() and last.data_ptr() != space["last"].data_ptr()


def no_kernel_image(*_: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ...")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda y, last: (1.001 * y, last), "gives wrong numbers: y is off by 1.0e-03"),
        (lambda y, last: (y, last + 0.1), "gives wrong numbers: the last state is off by "),
        (lambda y, last: (0.9 * y + 0.1 * y.detach(), last), "gives wrong numbers: the gradient of u is off by "),
        (lambda y, last: (y + torch.nan, last), "gives wrong numbers: y is off by nan"),
        (no_kernel_image, "raises RuntimeError: CUDA error: no kernel image is available for"),
    ],
)
def test_a_package_that_does_not_work_is_refused_in_one_line(
    install: Install, spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], reason: str
) -> None:
    install(lambda *tensors, **options: spoil(*kernel(*tensors, **options)))
    with pytest.raises(BackendUnavailable, match=f"^its self-test on cpu {re.escape(reason)}") as refused:
        backend_mamba_ssm.check("cpu")
    assert "\n" not in str(refused.value)


def test_a_package_that_raises_when_imported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for another torch ends in OSError or RuntimeError as often as in ImportError."""

    def fail(name: str) -> ModuleType:
        raise OSError(f"{name}.so: undefined symbol: _ZN3c10\nsecond line")

    monkeypatch.setattr(backend_mamba_ssm.importlib, "import_module", fail)
    with pytest.raises(
        BackendUnavailable, match="^importing it fails: OSError: mamba_ssm.so: undefined symbol: _ZN3c10$"
    ):
        backend_mamba_ssm.check("cuda")


def test_the_dispatcher_takes_it_first_on_a_gpu(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(kernel)
    check = backend_mamba_ssm.check
    monkeypatch.setattr(backend_mamba_ssm, "check", lambda device_type: check("cpu"))  # there is no GPU here
    monkeypatch.delenv(selective_scan.FORCE_VARIABLE, raising=False)
    assert selective_scan._resolve("cuda", False, "") is backend_mamba_ssm
