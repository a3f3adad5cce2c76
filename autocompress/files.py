"""Files that are there whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_path", "cache_dir"]


def cache_dir() -> Path:
    """Where trained and downloaded things are kept between runs; it may not exist yet.

    `AUTOCOMPRESS_CACHE` if it is set, else `autocompress` in `XDG_CACHE_HOME`, else `~/.cache/autocompress`.
    """
    if chosen := os.environ.get("AUTOCOMPRESS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autocompress"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch path beside `path`, which takes its place when the block ends well and is removed when it does not.

    The parent folder is made. A reader sees the old file or the new one, never a part: the bytes are on the disk before
    the name changes. Raises OSError (no permission, disk full), with `path` as it was.

    >>> with atomic_path("plan.json") as scratch:  # doctest: +SKIP
    ...     scratch.write_text(plan.to_json())
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        with scratch.open("rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes files that only their owner can read; a result should be as readable as any other new file.
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)
        scratch.replace(path)
    except OSError as error:
        # A failing write names no file; whoever reads the message wants to know which disk is full.
        error.filename = error.filename or str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)
