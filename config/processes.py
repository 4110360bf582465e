"""Sizes of process pools."""

from __future__ import annotations

import sys

WINDOWS_LIMIT = 61  # a pool waits for all its processes in one system call, which takes no more handles


def pool_size(wanted: int, jobs: int) -> int:
    """``wanted`` worker processes, but no more than there are jobs, and than a pool can have on this system."""
    return max(1, min(wanted, jobs, WINDOWS_LIMIT if sys.platform == "win32" else wanted))
