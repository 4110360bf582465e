"""nnU-Net's own preprocessing of one case, timed. Run by a Python that has nnunetv2; imports nothing of ours.

    python nnunet_baseline.py IMAGE MASK PLANS DATASET_JSON CONFIGURATION RUNS

Prints one JSON line: seconds of each run, bytes of the first above those in use before it, bytes of the whole
process, and the version. Only Linux tells the highest memory; elsewhere both are null.
"""

import json
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def resident(field: str) -> int | None:
    """``VmRSS`` (now) or ``VmHWM`` (highest) of this process in bytes."""
    status = Path("/proc/self/status")
    return int(re.search(rf"{field}:\s*(\d+)", status.read_text())[1]) * 1024 if status.is_file() else None


def main() -> None:
    image, mask, plans, dataset, configuration, runs = sys.argv[1:]
    torch.set_num_threads(1)
    manager = PlansManager(json.loads(Path(plans).read_text(encoding="utf-8")))
    described = json.loads(Path(dataset).read_text(encoding="utf-8"))
    preprocessor = DefaultPreprocessor(verbose=False)
    seconds, before, highest = [], resident("VmRSS"), None
    for _ in range(int(runs)):
        started = time.perf_counter()
        preprocessor.run_case([image], mask, manager, manager.get_configuration(configuration), described)
        seconds.append(time.perf_counter() - started)
        highest = highest or resident("VmHWM")  # of the first run; later runs reuse its freed memory
    call = None if highest is None else highest - before
    print(json.dumps({"seconds": seconds, "call": call, "process": highest, "version": version("nnunetv2")}))


if __name__ == "__main__":
    main()
