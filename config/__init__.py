"""Configuration. Importing it refuses a Python that is too old, before any module that such a Python cannot read."""

import sys

OLDEST_PYTHON = (3, 11)

if sys.version_info < OLDEST_PYTHON:  # every script imports this package first; the syntax here is that of 3.8
    sys.stderr.write(
        "error: Python 3.11 or newer is needed, this is {}.{}.{}: run  conda env create -n mamba311 -f environment.yml"
        "  and  conda activate mamba311\n".format(*sys.version_info[:3])
    )
    sys.exit(2)
