"""Triton kernels without a GPU: record a launch, and compile for it down to machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs = args, kwargs

        return launch


POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}


def compiled(kernel: triton.JITFunction, launch: Recorder, capability: int) -> dict[str, Any]:
    """The stages from Triton's own code to machine code, for the arguments of a launch."""
    kwargs = dict(launch.kwargs)
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    arguments = {**dict(zip(kernel.arg_names, launch.args, strict=False)), **kwargs}
    assert set(arguments) == set(kernel.arg_names)
    signature, constants, divisible = {}, dict(kwargs), {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in kwargs:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name], divisible[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not kernel.params[i].do_not_specialize:  # as at a launch
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not kernel.params[i].do_not_specialize:
                divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
