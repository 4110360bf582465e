"""Which machine and which versions the numbers belong to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "numba", "numpy", "mambapy", "mamba-ssm", "triton")


def describe_machine(device: torch.device) -> dict[str, object]:
    """Names and sizes; memory in bytes."""
    machine: dict[str, object] = {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
    return machine


def processor_name() -> str:
    """As lscpu and the system's settings show it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["commit"] = commit()
    return versions


def commit() -> str:
    """Of this repository, with a mark where files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git here)"
    return shown.stdout.strip()
