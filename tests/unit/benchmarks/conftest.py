"""The benchmarks are scripts that import each other by name, as Python does when it runs one of them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
