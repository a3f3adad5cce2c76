"""Estimates against what is counted: bytes of real stores, shapes of published networks, rates that are recovered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import OPTIONS, convnet, images, kinds, profiled
from tiny_tasks import call, write_task

from autocompress import calibration, estimating
from autocompress.batches import batch_samples, split_batches
from autocompress.compressors import default_options, named_options
from autocompress.estimating import (
    Network,
    Unit,
    compressing_bytes,
    estimate,
    fit,
    llama,
    network_of,
    task_bytes,
)
from autocompress.layers import find_layers
from autocompress.threads import default_workers
from autocompress.workloads import KINDS, REFERENCE, counts, seconds

ROOT = Path(__file__).resolve().parents[1]
SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


@pytest.mark.parametrize("case", ["convnet", "kinds"])
def test_disk_is_that_of_the_store(case: str, tmp_path: Path) -> None:
    """Up to the headers of archives, which have some hundred bytes per array."""
    model, data = (convnet(), images()) if case == "convnet" else kinds()
    found = profiled(model, data, OPTIONS, store=tmp_path)
    predicted = estimate(network_of(model, data), REFERENCE, 1, list(OPTIONS)).disk_bytes
    arrays = 0
    for path in [tmp_path / "statistics.npz", *(tmp_path / "layers").iterdir()]:
        with np.load(path) as kept:
            held = {name: kept[name].nbytes for name in kept.files}
        arrays += sum(size for name, size in held.items() if name[0] == "h" or name in ("order", "losses"))
    assert len(found.layers) == len(list((tmp_path / "layers").iterdir()))
    # A Hessian that few samples leave equal to another by chance is stored once; none is here.
    assert predicted == arrays


def test_a_network_is_what_its_model_and_calibration_say() -> None:
    model, data = convnet(), images()
    found = network_of(model, data)
    layers = {layer.name: layer for layer in find_layers(model)}
    assert {u.name: u.shape for u in found.units} == {name: layer.matrix_shape for name, layer in layers.items()}
    assert {u.name: u.positions for u in found.units} == {"conv1": 36.0, "conv2": 36.0, "conv3": 36.0, "linear": 1.0}
    assert found.samples == sum(map(batch_samples, split_batches(data)[0]))
    assert found.data_bytes == sum(batch.numel() * 4 for batch in data)
    assert (found.batches, found.batch_samples) == (len(split_batches(data)[0]), max(map(batch_samples, data)))
    assert found.pass_seconds is not None
    assert min(found.pass_seconds) >= 0 < sum(found.pass_seconds)


def test_what_is_done_once_for_each_batch_and_for_each_sample_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that knows nothing else; on one thread, which does not spin while it waits for others."""
    spent, sizes, before = 0.0, set(), torch.get_num_threads()

    def counted(model: Any, batches: list[torch.Tensor], holdout: float) -> None:
        nonlocal spent
        assert torch.get_num_threads() == 1
        spent += 2.0 + sum(0.5 + 0.01 * len(batch) for batch in batches)
        sizes.add(tuple(map(len, batches)))

    monkeypatch.setattr(calibration, "calibrate", counted)
    monkeypatch.setattr(estimating.time, "process_time", lambda: spent)
    torch.set_num_threads(2)
    try:
        found = estimating.pass_seconds(None, torch.zeros(33, 1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx((2.0, 0.5, 0.01))
    assert sizes == {(16,), (16, 16), (33,)}
    network = Network((Unit("a", (1, 4, 9), "a", 1.0),), 640, 36, 0, batches=5, pass_seconds=found)
    assert estimate(network, REFERENCE, 1).calibrate_cpu_seconds == pytest.approx(2.0 + 5 * 0.5 + 640 * 0.01)
    # Of a single sample there is no half, and a second batch of it costs what it costs.
    alone = estimating.pass_seconds(None, torch.zeros(1, 1))
    assert alone[0] + 7 * (alone[1] + alone[2]) == pytest.approx(2.0 + 7 * 0.51)


def test_shapes_of_published_networks_have_their_numbers_of_parameters() -> None:
    seven = llama(SEVEN)
    assert seven.parameters == 6_738_415_616  # Llama 2 7B, arXiv 2307.09288's checkpoint
    seventy = llama(
        {
            **SEVEN,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        }
    )
    assert seventy.parameters == 68_976_648_192
    # q, k and v read one input, gate and up another: four Hessians of a block, of three sizes.
    assert seven.hessian_bytes(seven.block) == 8 * (3 * 4096**2 + 11008**2)
    assert seven.hessian_bytes() == 32 * seven.hessian_bytes(seven.block) + 8 * 4096**2
    assert len(seven.units) == 32 * 7 + 2
    tied = llama({**SEVEN, "tie_word_embeddings": True})
    assert seven.parameters - tied.parameters == 32000 * 4096
    assert tied.hessian_bytes() == seven.hessian_bytes()


def test_streaming_holds_a_block_and_its_statistics() -> None:
    network = llama(SEVEN)
    found = estimate(network, REFERENCE, 8)
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    assert network.batch_samples == 1  # of 2,048 tokens
    values = 2048 * (3 * 4096 + 11008 + 11008)
    block = 4 * weights + (8 + 4) * (3 * 4096**2 + 11008**2) + 4 * values
    rest = network.data_bytes + estimating.LIBRARIES + estimating.TRANSFORMERS + estimating.BUFFERS
    assert found.streaming_bytes == block + rest, "workers profile elsewhere"
    # What streaming is for: a block, its statistics, and 1.5 GiB for everything else.
    assert found.streaming_bytes <= 4 * weights + network.hessian_bytes(network.block) + 1.5 * 2**30
    alone = estimate(network, REFERENCE, 1).streaming_bytes
    assert alone == max(task_bytes(u, default_options(), sent=False) for u in network.units) + rest
    assert found.streaming_bytes < alone < found.memory_bytes / 10
    assert estimate(network_of(convnet(), images()), REFERENCE).streaming_bytes is None


def test_compressing_a_streamed_network_takes_what_the_docs_say() -> None:
    """docs/transformers.md, of Llama 2 at 12x with options `lean,fine`, as the profile's figures there."""
    words = (ROOT / "docs" / "transformers.md").read_text().replace("\n", " ")
    found = {}
    for size in ("7b", "70b"):
        network = llama(ROOT / "experiments" / "shapes" / f"llama2_{size}.json")
        file_bytes = 4 * network.parameters // 12
        for sequential in (False, True):
            taken = compressing_bytes(network, file_bytes, named_options(["lean,fine"]), sequential=sequential)
            assert taken > 2 * file_bytes + network.data_bytes
            found[size, sequential] = taken / 2**30
        assert found[size, False] < found[size, True]
    assert f"{found['7b', False]:.2f} GiB with `--no-sequential`, {found['7b', True]:.1f} GiB with sequential" in words
    # Bytes of the file twice, whatever else is there at the most.
    more = compressing_bytes(network, file_bytes + 1000) - compressing_bytes(network, file_bytes)
    assert more == 2000
    assert f"70B at 12x (21.4 GiB): {found['70b', False]:.0f} and {found['70b', True]:.0f} GiB" in words


def test_time_is_the_scheduled_sum_of_counted_work() -> None:
    network = llama(SEVEN, samples=8, tokens=16)
    alone, eight, many = (estimate(network, REFERENCE, workers) for workers in (1, 8, 10_000))
    expected = sorted(seconds(counts(u.shape, default_options(), u.table), REFERENCE) for u in network.units)[::-1]
    assert list(alone.tasks) == pytest.approx(expected)
    assert alone.profile_seconds == pytest.approx(sum(expected))
    assert sum(expected) / 8 < eight.profile_seconds < 1.1 * sum(expected) / 8
    assert many.profile_seconds == pytest.approx(expected[0], rel=1e-3)  # one layer is one task
    assert many.worker_bytes == eight.worker_bytes > alone.worker_bytes == 0
    passed = sum(u.macs for u in network.units) + 16 / 2 * network.hessian_bytes() / 8
    assert alone.calibrate_seconds == pytest.approx(8 * passed * REFERENCE["product"] / default_workers())
    assert many.calibrate_seconds == alone.calibrate_seconds, "the caller calibrates, however many workers there are"
    tiny = Network(
        (Unit("a", (1, 4, 9), "a", 1.0), Unit("b", (1, 4, 9), "b", 1.0)), 4, 72, 0, pass_seconds=(0.5, 0.5, 0.25)
    )
    assert estimate(tiny, REFERENCE, 8).workers == 1, "processes that do not pay are not started"
    assert estimate(tiny, REFERENCE, 8).calibrate_cpu_seconds == 2.0


def test_a_task_holds_its_codes_up_to_a_limit() -> None:
    options = default_options()
    small, large = Unit("s", (1, 8, 64), "s", 1.0), Unit("l", (1, 4096, 4096), "l", 1.0)
    assert task_bytes(small, options) >= 8 * small.weights * len(options)
    assert task_bytes(large, options) < 8 * large.weights * len(options)
    table = Unit("t", (1, 8, 64), "t", 1.0, table=True)
    assert task_bytes(table, options) < task_bytes(small, options)


def test_rates_are_recovered_from_times_that_they_made() -> None:
    true = {**REFERENCE, "option": 2e-4}
    work = [counts(shape, options, exact_limit=limit) for shape, options, limit in benches()]
    known = {kind: true[kind] for kind in ("trace", "factor", "product")}
    found = fit(work, [seconds(c, true) for c in work], known)
    assert found == pytest.approx(true)
    assert set(found) == set(KINDS)


def benches() -> list[Any]:
    return [(s, options, limit) for s, limit in estimating.BENCHES for options in estimating.families(s)]


def test_the_command_says_what_a_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "measured_rates", lambda: dict(REFERENCE))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SEVEN))
    found = json.loads(call("doctor", "--estimate", config, "--workers", 8, "--json").out)
    expected = estimate(llama(SEVEN), REFERENCE, 8)
    assert found["minutes"] == round(expected.minutes, 3)
    assert found["memory_bytes_block_by_block"] == expected.streaming_bytes
    assert found["weights"] == 6_738_149_376
    small = json.loads(call("doctor", "--estimate", write_task(tmp_path), "--options", "w4,w8", "--json").out)
    assert small["layers"] == 3
    assert small["workers"] == 1
    assert "memory_bytes_block_by_block" not in small
    assert "minutes" in call("doctor", "--estimate", config).out
    exact, shared = (
        json.loads(call("doctor", "--estimate", config, "--json", "--exact-limit", limit).out)["minutes"]
        for limit in ("inf", 0)
    )
    assert shared < exact / 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not the description of a network"),
        ("[]", "lacks names and values"),
        ('{"hidden_size": 8}', "lacks intermediate_size, num_hidden_layers, num_attention_heads, vocab_size"),
    ],
)
def test_a_description_that_lacks_something_is_refused(text: str, words: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    assert words in call("doctor", "--estimate", config).refused(2)
