"""The store: resumed after a kill, refused when it is of something else, and the same for any number of workers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import OPTIONS, convnet, images, profiled, small_profile
from torch import nn

import autocompress as ac
from autocompress import profiling
from autocompress.calibration import Statistics, calibrate
from autocompress.compressors import COMPRESSORS, realise
from autocompress.errors import MismatchError, OptionError, StoreError
from autocompress.obs import exact_operations
from autocompress.planning import size_range
from autocompress.profiling import Profile, Store, load_profile, profile

NAMES = ["conv1", "conv2", "conv3", "linear"]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[nn.Module, Statistics, Path]:
    """A model, its statistics, and a finished store of its profile."""
    model, data, _ = small_profile()
    stats = calibrate(model, data)
    profile(model, stats, tmp_path / "store", OPTIONS, workers=1)
    return model, stats, tmp_path / "store"


def layer_files(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every layer's file: a file that was written again has others."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted((store / "layers").glob("*.npz"))}


def resume(model: nn.Module, stats: Statistics, store: Path, **changes: Any) -> tuple[Profile, list[str]]:
    """The profile, and the layers that were computed for it."""
    computed: list[str] = []
    given: dict[str, Any] = {"options": OPTIONS, "workers": 1, **changes}
    found = profile(model, stats, store, progress=lambda done, total, name: computed.append(name), **given)
    return found, computed


def test_a_profile_in_memory_equals_the_stored_and_the_loaded_one(stored: Any) -> None:
    model, stats, store = stored
    memory = small_profile()[2]
    kept, computed = resume(model, stats, store)
    loaded = load_profile(store)
    assert computed == []
    for other in (kept, loaded):
        assert other.fingerprint == memory.fingerprint
        assert list(other.layers) == list(memory.layers) == NAMES
        assert other.template == memory.template
        assert other.fields == memory.fields
        assert other.skipped == memory.skipped
        assert other.statistics.fingerprint == memory.statistics.fingerprint
        for name, layer in memory.layers.items():
            assert other.layers[name].rows == layer.rows
            assert other.layers[name].layer == layer.layer
            np.testing.assert_array_equal(other.layers[name].order, layer.order)
            np.testing.assert_array_equal(other.statistics.layers[name].hessian, stats.layers[name].hessian)
    columns = ["layer", "option", "error", "bytes"]
    assert loaded.table[columns].equals(memory.table[columns])
    assert loaded.store is not None
    assert memory.store is None


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_nothing(workers: int, tmp_path: Path) -> None:
    model, data, expected = small_profile()
    found = profiled(model, data, store=tmp_path, workers=workers)
    assert found.fingerprint == expected.fingerprint
    assert load_profile(tmp_path).fingerprint == expected.fingerprint


def test_only_missing_layers_are_computed(stored: Any) -> None:
    model, stats, store = stored
    expected = load_profile(store).fingerprint
    before = layer_files(store)
    gone = sorted(before)[:2]
    for name in gone:
        (store / "layers" / name).unlink()
    found, computed = resume(model, stats, store)
    assert len(computed) == 2
    assert found.fingerprint == expected
    after = layer_files(store)
    assert {n: v for n, v in after.items() if n not in gone} == {n: v for n, v in before.items() if n not in gone}
    assert sorted(after) == sorted(before)


KILLED = """
import sys, time
from pathlib import Path
sys.path.append({tests!r})
from networks import OPTIONS, convnet, images
from autocompress.calibration import calibrate
from autocompress.profiling import profile

def progress(done, total, name):
    print(name, flush=True)
    if done == 2:
        time.sleep(60)

model = convnet()
profile(model, calibrate(model, images()), {store!r}, OPTIONS, workers={workers}, progress=progress)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_is_taken_up_where_it_was(workers: int, tmp_path: Path) -> None:
    """A real SIGKILL, after two layers: what is finished is kept, and the result is that of a whole run."""
    store = tmp_path / "store"
    code = KILLED.format(tests=str(Path(__file__).parent), store=str(store), workers=workers)
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    finished = [process.stdout.readline().strip() for _ in range(2)]
    with pytest.raises(StoreError, match="being written by another process"), Store(store).writing():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = layer_files(store)
    assert len(before) == 2
    # What a kill in the middle of a write leaves behind.
    (store / "layers" / f".{next(iter(before))}.abc.part").write_bytes(b"PK half a file")
    (store / ".profile.json.abc.part").write_text("{")
    with pytest.raises(StoreError, match=r"is not finished \(layer '\w+' is missing\)"):
        load_profile(store)
    model, data, expected = small_profile()
    found, computed = resume(model, calibrate(model, data), store)
    assert sorted(computed) == sorted(set(NAMES) - set(finished))
    assert found.fingerprint == expected.fingerprint
    after = layer_files(store)
    assert {name: after[name] for name in before} == before
    assert load_profile(store).fingerprint == expected.fingerprint


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store but clock times."""
    files = [p for p in store.rglob("*") if p.is_file() and p.parent.name != "seconds"]
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


def test_a_profile_whose_worker_is_killed_has_the_same_bytes(stored: Any, tmp_path: Path) -> None:
    model, stats, store = stored
    killed: list[int] = []

    def progress(done: int, total: int, name: str) -> None:
        # Of every thread: pytest-xdist may run a test in another one than the first.
        children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
        if not killed:
            killed.append(int(children[-1]))
            os.kill(killed[0], signal.SIGKILL)

    found = profile(model, stats, tmp_path / "two", OPTIONS, 2, progress, engine="processes")
    assert killed
    assert found.fingerprint == small_profile()[2].fingerprint
    assert contents(tmp_path / "two") == contents(store)


def test_clock_times_are_beside_the_store_and_may_be_lost(stored: Any) -> None:
    _, _, store = stored
    kept = load_profile(store)
    assert all(row.seconds > 0 for layer in kept.layers.values() for row in layer.rows)
    for path in (store / "seconds").iterdir():
        path.write_text("[1.0]")
    assert {row.seconds for layer in load_profile(store).layers.values() for row in layer.rows} == {0.0}
    shutil.rmtree(store / "seconds")
    assert load_profile(store).fingerprint == kept.fingerprint


def test_a_store_goes_on_with_its_own_statistics(stored: Any, tmp_path: Path) -> None:
    """On another processor the same sums differ in their last bits; the layers that are there must still count."""
    model, stats, store = stored
    before, expected = layer_files(store), contents(store)
    gone = sorted(before)[0]
    (store / "layers" / gone).unlink()
    nudged = {name: dataclasses.replace(s, hessian=s.hessian * (1 + 1e-12)) for name, s in stats.layers.items()}
    found, computed = resume(model, dataclasses.replace(stats, layers=nudged), store)
    assert len(computed) == 1
    assert found.fingerprint == small_profile()[2].fingerprint
    assert contents(store) == expected
    np.testing.assert_array_equal(found.statistics.layers["conv1"].hessian, stats.layers["conv1"].hessian)
    head = json.loads((store / "profile.json").read_text())
    head["layers"][0][-1] = "0" * 64
    (store / "profile.json").write_text(json.dumps(head))
    with pytest.raises(StoreError, match=r"profile.json is damaged"):
        resume(model, stats, store)


def test_of_two_writers_without_a_lock_the_second_compares_itself(
    stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading that there is no index and making it, another host made one."""
    model, stats, store = stored
    read = profiling._read_head
    answers = [None]
    monkeypatch.setattr(profiling, "_read_head", lambda place: answers.pop() if answers else read(place))
    before = contents(store)
    _, computed = resume(model, stats, store)
    assert (computed, contents(store)) == ([], before)
    answers.append(None)
    with pytest.raises(MismatchError, match="field 'options'"):
        resume(model, stats, store, options=["w4"])
    assert contents(store) == before


def test_a_store_killed_before_its_head_was_written_is_begun_again(stored: Any) -> None:
    model, stats, store = stored
    (store / "profile.json").unlink()
    (store / "statistics.npz").write_bytes(b"half")
    found, computed = resume(model, stats, store)
    assert computed == []
    assert load_profile(store).fingerprint == found.fingerprint == small_profile()[2].fingerprint


def _patch(patch: pytest.MonkeyPatch, *what: Any) -> dict[str, Any]:
    patch.setattr(*what)
    return {}


Change = Callable[[Any, pytest.MonkeyPatch], dict[str, Any]]
CHANGES: dict[str, tuple[str, Change]] = {
    "other weights": ("model", lambda stored, patch: {"model": convnet(seed=1)}),
    "other data": ("data", lambda stored, patch: {"data": images(seed=1)}),
    "another split": ("data", lambda stored, patch: {"seed": 1}),
    "another damping": ("damping", lambda stored, patch: {"damping": 0.1}),
    "other options": ("options", lambda stored, patch: {"options": [*OPTIONS, "w3"]}),
    "options in another order": ("options", lambda stored, patch: {"options": OPTIONS[::-1]}),
    "another compressor": ("compressors", lambda stored, patch: _patch(patch, type(COMPRESSORS["obc"]), "version", 99)),
    "another profile": ("profile_version", lambda stored, patch: _patch(patch, profiling, "PROFILE_VERSION", 99)),
    "another format": ("format_version", lambda stored, patch: _patch(patch, profiling, "FORMAT_VERSION", 99)),
    "another calibration": (
        "calibration_version",
        lambda stored, patch: _patch(patch, "autocompress.calibration.CALIBRATION_VERSION", 99),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_store_of_something_else_is_refused_by_field(case: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, store = stored
    field, change = CHANGES[case]
    given = change(stored, monkeypatch)
    model = given.get("model", model)
    stats = calibrate(model, given.get("data", images()), seed=given.get("seed", 0), damping=given.get("damping", 1e-2))
    before = layer_files(store), (store / "profile.json").read_bytes()
    with pytest.raises(
        MismatchError, match=rf"field '{field}': the profile in .* was made with .*; name another store"
    ):
        resume(model, stats, store, **{k: v for k, v in given.items() if k == "options"})
    assert (layer_files(store), (store / "profile.json").read_bytes()) == before


@pytest.mark.parametrize("case", ["another compressor", "another profile", "another format"])
def test_a_loaded_profile_of_other_code_is_refused_by_field(
    case: str, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, change = CHANGES[case]
    change(stored, monkeypatch)
    with pytest.raises(MismatchError, match=f"field '{field}'"):
        load_profile(stored[2])


def test_statistics_of_other_weights_are_refused(stored: Any) -> None:
    with pytest.raises(MismatchError, match="field 'model': the statistics were made from other weights"):
        profile(convnet(seed=1), stored[1], options=OPTIONS)


def test_an_option_that_nobody_realises_is_refused_before_the_work(stored: Any, tmp_path: Path) -> None:
    model, stats, _ = stored
    with pytest.raises(OptionError, match="rank8w8t"):
        profile(model, stats, tmp_path / "other", ["rank8w8t"])
    assert not (tmp_path / "other").exists()


def test_a_second_writer_is_refused(stored: Any) -> None:
    model, stats, store = stored
    with Store(store).writing():
        with pytest.raises(StoreError, match="being written by another process; wait for it, or name another"):
            resume(model, stats, store)
        assert load_profile(store).fingerprint  # readers need no lock
    resume(model, stats, store)


def damages() -> Iterator[Any]:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-40])

    def empty(path: Path) -> None:
        path.write_bytes(b"")

    def garbage(path: Path) -> None:
        path.write_bytes(b"garbage" * 50)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for at in range(len(data) // 2, len(data) // 2 + 64):  # longer than what a zip file holds beside its members
            data[at] ^= 0xFF
        path.write_bytes(data)

    def other(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, something=np.zeros(3))

    for damage in (cut, empty, garbage, flip, other):
        yield pytest.param(damage, id=damage.__name__)


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_file_is_named(damage: Callable[[Path], None], stored: Any) -> None:
    model, stats, store = stored
    path = sorted((store / "layers").glob("*.npz"))[1]
    kept = path.read_bytes()
    damage(path)
    for action in (lambda: resume(model, stats, store), lambda: load_profile(store)):
        with pytest.raises(StoreError, match=rf"{path.name} is damaged \(.*\); remove it and run again"):
            action()
    path.write_bytes(kept)
    damage(store / "statistics.npz")
    with pytest.raises(MismatchError, match=r"statistics.npz does not hold statistics"):
        load_profile(store)


def test_a_damaged_head_is_named(stored: Any) -> None:
    model, stats, store = stored
    head = store / "profile.json"
    for text, words in [("{", "profile.json cannot be read"), ("{}", "profile.json is damaged"), ("[]", "is damaged")]:
        head.write_text(text)
        with pytest.raises(StoreError, match=words):
            load_profile(store)
        with pytest.raises(StoreError, match=words):
            resume(model, stats, store)


def test_there_is_no_profile_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no profile in"):
        load_profile(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="cannot make the profile store"):
        Store(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written_is_named(stored: Any, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"cannot make the profile store .*closed/store"):
        profile(stored[0], stored[1], tmp_path / "closed" / "store", OPTIONS)


def test_files_do_not_depend_on_where_the_store_is(stored: Any, tmp_path: Path) -> None:
    """A store can be moved, and holds nothing of the machine."""
    moved = tmp_path / "elsewhere"
    shutil.move(stored[2], moved)
    assert load_profile(moved).fingerprint == small_profile()[2].fingerprint
    assert str(tmp_path) not in (moved / "profile.json").read_text()


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_layer_that_calibration_never_reaches_has_what_needs_no_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Unreached().eval()
    data = [torch.randn(20, 6, generator=torch.Generator().manual_seed(0))]
    found = profiled(model, data, (*OPTIONS, "w8", "s50w8"), store=tmp_path)
    assert found.statistics.unreached == ("unused",)
    assert [(str(row.option), row.error) for row in found.layers["unused"].rows] == [
        ("dense", 0.0),
        ("fp16", 0.0),
        ("w8", 0.0),
    ]
    assert not found.layers["unused"].reached
    assert load_profile(tmp_path).fingerprint == found.fingerprint
    for strategy in ("exact", "uniform"):
        plan = ac.plan(found, size_range(found)[0] + 30, strategy)
        assert str(plan.layers["unused"]) == "w8"
        assert not plan.layers["used"].is_dense
    small: Any = ac.apply(model, plan, found, data)
    weight = model.unused.weight.detach()
    # At most half a step, of 255 over the range of a row, and what 127 steps lose when theirs is a half float.
    step = 2 * weight.abs().amax(dim=1, keepdim=True) / 255
    assert 0 < float(((small.unused.weight.detach() - weight).abs() / step).max()) <= 0.5 + 128 * 2.0**-11
    info = ac.save(small, plan, tmp_path / "model.acz")
    assert info.bytes == plan.predicted_bytes


def test_a_model_that_calibration_never_reaches_has_single_options_too() -> None:
    model: Any = Unreached().eval()
    model.forward = lambda x: x
    data = [torch.randn(20, 6, generator=torch.Generator().manual_seed(0))]
    found = profiled(model, data, (*OPTIONS, "w8"))
    for strategy, option in (("exact", "w8"), ("uniform", "dense")):
        assert {str(o) for o in ac.plan(found, "1.1x", strategy).layers.values()} == {option}


def test_the_fingerprint_covers_rows_and_not_clocks() -> None:
    found = small_profile()[2]
    layer = found.layers["conv1"]

    def changed(**change: Any) -> str:
        rows = (dataclasses.replace(layer.rows[1], **change), *layer.rows[2:])
        layers = {**found.layers, "conv1": dataclasses.replace(layer, rows=(layer.rows[0], *rows))}
        return dataclasses.replace(found, layers=layers).fingerprint

    assert changed(seconds=123.0) == found.fingerprint
    others = {changed(error=1.0), changed(bytes=5), changed(option=ac.Option(bits=7)), found.fingerprint}
    assert len(others) == 4


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    model, data, _ = small_profile()
    calls: list[tuple[int, int, str]] = []
    profile(model, calibrate(model, data), tmp_path, OPTIONS, 1, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(i, 4) for i in range(1, 5)]
    assert {call[2] for call in calls} == set(NAMES)


def test_the_head_holds_no_clock(stored: Any) -> None:
    head = json.loads((stored[2] / "profile.json").read_text())
    assert set(head) == {"fields", "skipped", "layers", "template"}
    assert str(time.gmtime().tm_year) not in json.dumps(head["fields"])


def test_a_table_is_never_too_wide() -> None:
    model = nn.Sequential(nn.Embedding(12, 4), nn.Linear(4, 3)).eval()
    made = profile(model, calibrate(model, [torch.arange(12)] * 4), options=["w4"], workers=1, exact_limit=0)
    assert {name: made.method(name) for name in made.layers} == {"0": "exact", "1": "shared"}


def test_layers_too_wide_for_exact_rows_offer_the_same_options(stored: Any, tmp_path: Path) -> None:
    model, stats, store = stored
    exact = load_profile(store)
    assert set(exact.table["method"]) == {"exact"}
    limit = min(exact_operations(x.layer.matrix_shape) for x in exact.layers.values())
    wide = profile(model, stats, tmp_path / "wide", OPTIONS, workers=1, exact_limit=limit)
    methods = dict(zip(wide.table["layer"], wide.table["method"], strict=True))
    assert sorted(methods.values()) == ["exact", "shared", "shared", "shared"]
    for name, layer in wide.layers.items():
        assert [r.option for r in layer.rows] == [r.option for r in exact.layers[name].rows]
        owner: Any = model.get_submodule(name)
        for row in layer.rows:
            realised = realise(wide.problem(name, owner.weight), row.option)
            assert realised.bytes() == row.bytes
            assert wide.problem(name, owner.weight).error(realised.weight()) == pytest.approx(row.error, rel=1e-9)
        if methods[name] == "exact":
            assert layer.rows == exact.layers[name].rows
    assert load_profile(tmp_path / "wide").fingerprint == wide.fingerprint
    with pytest.raises(MismatchError, match=r"field 'exact_limit': .* another limit of exact work"):
        resume(model, stats, store, exact_limit=limit)
