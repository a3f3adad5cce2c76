"""Files that are there whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_path", "cache_dir", "write_once"]


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


def write_once(path: str | os.PathLike[str], text: str) -> bool:
    """Make a file of that text unless there is one: of several processes or hosts exactly one succeeds. Whether it did.

    The file is whole when its name appears: it is written beside its place and hard-linked, which every file system
    that is shared by hosts does atomically, NFS included, where a lock may be known to one host alone. Where there are
    no hard links it is renamed, and the last one wins. Raises OSError.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with atomic_path(scratch) as inner:
            inner.write_text(text)
        try:
            os.link(scratch, path)
        except FileExistsError:
            # NFS may answer so although the link was made, where it answered before and the answer was lost.
            return os.path.samefile(scratch, path)
        except OSError:
            if path.exists():
                return False
            scratch.replace(path)
        return True
    finally:
        scratch.unlink(missing_ok=True)
