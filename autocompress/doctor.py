"""What this machine offers: versions, cores, the folders that are used, and whether they can be."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path

from autocompress.files import cache_dir

__all__ = ["diagnose", "environment"]

LIBRARIES = ("torch", "numpy", "scipy", "numba", "scikit-learn")
OPTIONAL = {
    "onnx": "the extra `onnx`",
    "transformers": "the extra `hf`",
    "ray": "the extra `ray`",
    "matplotlib": "the extra `notebooks`",
}


def environment() -> dict[str, str | int]:
    """Versions and cores: what a result depends on besides its inputs. No paths, no host name, no clock."""
    found: dict[str, str | int] = {
        "autocompress": version("autocompress") or "not installed",
        "python": platform.python_version(),
    }
    found |= {name: version(name) or "not installed" for name in LIBRARIES}
    return found | {"system": platform.system(), "machine": platform.machine(), "cores": cores()}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnose() -> dict[str, tuple[bool, str]]:
    """(good, what was found) by name. Only what is needed can be bad; what is optional says how to get it."""
    found: dict[str, tuple[bool, str]] = {}
    for name, value in environment().items():
        found[name] = (value != "not installed", str(value))
    found["memory"] = (True, memory())
    found["kernels"] = numba_cache()
    found["cache"] = writable(cache_dir(), "trained and downloaded networks")
    data = os.environ.get("AUTOCOMPRESS_DATA")
    if data is None:
        found["data"] = (True, "AUTOCOMPRESS_DATA is not set: the tasks of experiments/tasks download what they need")
    else:
        good = Path(data).is_dir()
        found["data"] = (good, f"{data}" if good else f"AUTOCOMPRESS_DATA names {data}, which is not a folder")
    for name, extra in OPTIONAL.items():
        found[name] = (True, version(name) or f"not installed; it comes with {extra}")
    return found


def memory() -> str:
    """Physical memory, where the system says so."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def numba_cache() -> tuple[bool, str]:
    """Where compiled kernels are kept; without such a folder every process compiles them again."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    place = Path(chosen) if chosen else Path(__file__).parent / "obs" / "__pycache__"
    good, text = writable(place, "compiled kernels")
    return good, text if good else f"{text}; set NUMBA_CACHE_DIR, or every process compiles them again"


def writable(folder: Path, holds: str) -> tuple[bool, str]:
    """Whether a file can be made in the folder, or in the nearest one above it that exists."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return False, f"{folder} ({holds}) cannot be written: {error.strerror or error}"
    return True, f"{folder} ({holds})"
