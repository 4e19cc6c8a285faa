"""The benchmarks are scripts beside the package; their folder `bench` is made importable for the tests of it.

Not by putting benchmarks/ on the path: transformers would find kernels.py there, and take it for a package.
"""

import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "bench"

if "bench" not in sys.modules:
    spec = importlib.util.spec_from_file_location("bench", BENCH / "__init__.py")
    assert spec is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
