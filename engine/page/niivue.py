"""NiiVue for the page, from the ipyniivue package that is installed: no network, no Node, no copy in this repository.

ipyniivue's widget carries NiiVue's whole ES module as an escaped string, for the pages that it saves. That string is
what the browser gets.
"""

from __future__ import annotations

import functools
import re
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote

_MODULE = re.compile(r'"([^"\\]*export%7B[^"\\]*Niivue[^"\\]*)"')
_WIDGET = "ipyniivue/static/widget.js"


@functools.cache
def niivue_module() -> bytes | None:
    """NiiVue as an ES module that exports ``Niivue`` and ``NVImage``; None where the package is not there or has
    another layout: the page then shows its own slices."""
    try:
        widget = distribution("ipyniivue").locate_file(_WIDGET)
    except PackageNotFoundError:
        return None
    if not widget.is_file():
        return None
    found = _MODULE.search(widget.read_text(encoding="utf-8"))
    return unquote(found[1]).encode() if found else None
