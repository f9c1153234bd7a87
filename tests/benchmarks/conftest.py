"""Puts benchmarks/ on the path, as running a script of it does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
