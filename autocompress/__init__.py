"""A trained network, a little calibration data and a budget in; a file within that budget out, with proof of how good
it is.

    import autocompress as ac
    result = ac.compress(model, batches, "64 kB", out="runs/out")

The stages by themselves: calibrate -> profile -> plan -> apply -> save; load reads the file back. Names load on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AutocompressError": "errors",
    "Budget": "types",
    "Context": "measuring",
    "FormatError": "storage",
    "Option": "types",
    "Plan": "types",
    "Precropped": "precropping",
    "Profile": "profiling",
    "Result": "pipeline",
    "Statistics": "calibration",
    "apply": "applying",
    "apply_sequentially": "sequential",
    "calibrate": "calibration",
    "compare": "comparing",
    "compress": "pipeline",
    "compress_cache": "kvcache",
    "export": "exporting",
    "load": "saving",
    "load_comparison": "comparing",
    "load_profile": "profiling",
    "load_task": "tasks",
    "plan": "strategies",
    "precrop": "precropping",
    "problem": "planning",
    "profile": "profiling",
    "save": "saving",
    "spending": "comparing",
    "tune": "tuning",
    "unpack": "saving",
    "verify": "verifying",
}

__all__ = [
    "AutocompressError",
    "Budget",
    "Context",
    "FormatError",
    "Option",
    "Plan",
    "Precropped",
    "Profile",
    "Result",
    "Statistics",
    "__version__",
    "apply",
    "apply_sequentially",
    "calibrate",
    "compare",
    "compress",
    "compress_cache",
    "export",
    "load",
    "load_comparison",
    "load_profile",
    "load_task",
    "plan",
    "precrop",
    "problem",
    "profile",
    "save",
    "spending",
    "tune",
    "unpack",
    "verify",
]

if TYPE_CHECKING:
    from autocompress.applying import apply
    from autocompress.calibration import Statistics, calibrate
    from autocompress.comparing import compare, load_comparison, spending
    from autocompress.errors import AutocompressError
    from autocompress.exporting import export
    from autocompress.kvcache import compress_cache
    from autocompress.measuring import Context
    from autocompress.pipeline import Result, compress
    from autocompress.planning import problem
    from autocompress.precropping import Precropped, precrop
    from autocompress.profiling import Profile, load_profile, profile
    from autocompress.saving import load, save, unpack
    from autocompress.sequential import apply_sequentially
    from autocompress.storage import FormatError
    from autocompress.strategies import plan
    from autocompress.tasks import load_task
    from autocompress.tuning import tune
    from autocompress.types import Budget, Option, Plan
    from autocompress.verifying import verify


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"autocompress.{_HOME[name]}"), name)
    raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
