"""nnU-Net's own preprocessing, three times: NNUNET_PYTHON nnunet_baseline.py IMAGE MASK NETWORK_FOLDER CONFIGURATION

Prints seconds of each run and the peak of the first: bytes above those in use before, and of the process (Linux only).
"""

import json
import re
import sys
import time
from pathlib import Path

from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

image, mask, folder, configuration = sys.argv[1:]
plans, status = PlansManager(f"{folder}/plans.json"), Path("/proc/self/status")
seconds, memory = [], []
for _ in range(3):
    memory.append(status.read_text(encoding="ascii") if status.is_file() else "")
    started = time.perf_counter()
    preprocessing = [image], mask, plans, plans.get_configuration(configuration), f"{folder}/dataset.json"
    DefaultPreprocessor(verbose=False).run_case(*preprocessing)
    seconds.append(time.perf_counter() - started)
before, highest = (re.search(rf"{key}:\s*(\d+)", text) for key, text in zip(("VmRSS", "VmHWM"), memory, strict=False))
peak = before and (1024 * (int(highest[1]) - int(before[1])), 1024 * int(highest[1]))
print(json.dumps({"seconds": seconds, "peak": peak}))
