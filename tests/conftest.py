"""What all tests share: a cache of their own, examples that repeat, and the folder of real networks if there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: the first example of a test may compile a kernel. The same examples every time: a red suite stays red.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Path]:
    """AUTOCOMPRESS_CACHE in a temporary folder that all worker processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOCOMPRESS_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real networks; the test is skipped, saying so, where there is none."""
    folder = os.environ.get("AUTOCOMPRESS_DATA")
    if not folder:
        pytest.skip("AUTOCOMPRESS_DATA is not set: no real networks to test with")
    return Path(folder)
