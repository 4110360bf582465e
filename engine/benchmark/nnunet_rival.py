"""nnU-Net's own preprocessing of one case, timed. Run by a Python that has nnunetv2; imports nothing of ours.

    python nnunet_rival.py IMAGE MASK PLANS DATASET_JSON CONFIGURATION RUNS

Prints one JSON line: seconds of each run, bytes above what there was before, bytes of the whole process, and the
version. The mark of the highest memory is Linux's; elsewhere both are null.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def resident(field: str) -> int | None:
    """``VmRSS`` (now) or ``VmHWM`` (highest) of this process in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    image, mask, plans, dataset, configuration, runs = sys.argv[1:]
    import torch
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(1)
    manager = PlansManager(json.loads(Path(plans).read_text(encoding="utf-8")))
    described = json.loads(Path(dataset).read_text(encoding="utf-8"))
    preprocessor = DefaultPreprocessor(verbose=False)
    seconds, before, highest = [], resident("VmRSS"), None
    for _ in range(int(runs)):
        started = time.perf_counter()
        preprocessor.run_case([image], mask, manager, manager.get_configuration(configuration), described)
        seconds.append(time.perf_counter() - started)
        highest = highest or resident("VmHWM")  # of the first run: what later ones find in place is not theirs
    call = None if highest is None else highest - before
    print(json.dumps({"seconds": seconds, "call": call, "process": highest, "version": version("nnunetv2")}))


if __name__ == "__main__":
    main()
