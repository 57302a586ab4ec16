"""Sets the environment before a test imports torch."""

import os

from benchmarks.environment import CALM

for _name, _value in CALM.items():
    os.environ.setdefault(_name, _value)
