"""Streaming against the whole model: every byte of the store; where it must refuse; what it holds in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_hf import WORDS, save_tokenizer, tiny_bert, tiny_llama
from tiny_tasks import call
from torch import nn

import autocompress as ac
from autocompress import estimating, hf, streaming
from autocompress.applying import apply, encoded_of
from autocompress.batches import feed
from autocompress.calibration import Statistics, calibrate
from autocompress.errors import BudgetError, CalibrationError, LayerError, MismatchError, StoreError, TaskError
from autocompress.layers import find_layers, model_digest
from autocompress.measuring import Context
from autocompress.offloading import READER
from autocompress.pipeline import compress, profiled
from autocompress.profiling import load_profile, profile
from autocompress.sequential import apply_sequentially
from autocompress.strategies import plan
from autocompress.streaming import calibrate_streamed, find_chain, streamed_model
from autocompress.types import DENSE, Option

OPTIONS: list[Option | str] = ["w4", "s50", "rd(0.1,0.1)"]


def bare_gpt2() -> Any:
    """Conv1D layers, which are left alone and held whole, and positions in a table; its output head is tied."""
    config = transformers.GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def gemma() -> Any:
    """Layers of two kinds, which get masks and rotations of their own."""
    config = transformers.Gemma3TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


def untied_llama() -> Any:
    """In several files, in bfloat16, with an output head of its own."""
    whole = tiny_llama()
    config = transformers.LlamaConfig.from_dict({**whole.config.to_dict(), "tie_word_embeddings": False})
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


CASES: dict[str, tuple[Callable[[], Any], bool, dict[str, Any]]] = {
    "llama": (tiny_llama, False, {}),
    "bert": (tiny_bert, True, {}),
    "shards": (untied_llama, False, {"max_shard_size": "8KB"}),
    "gemma": (gemma, False, {}),
    "gpt2": (bare_gpt2, False, {}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    rows = torch.randint(0, len(WORDS), (2400,), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text(" ".join(WORDS[i] for i in rows))
    return path


def saved(folder: Path, case: str) -> Path:
    make, around, arguments = CASES[case]
    make().save_pretrained(folder, **arguments)
    save_tokenizer(folder, around)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "llama", "llama")


def stored(folder: Path) -> dict[str, bytes]:
    """What a store holds, but clock times and what streaming leaves beside it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name not in ("seconds", "streaming")
    }


@pytest.mark.parametrize(("saved_as", "read_as"), [("ForCausalLM", "Model"), ("Model", "ForCausalLM")])
def test_a_model_saved_with_a_head_about_it_or_without_one_is_found(
    saved_as: str, read_as: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    (model if saved_as == "ForCausalLM" else model.model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [f"Llama{saved_as}"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [f"Llama{read_as}"]}))
    assert model_digest(streamed_model(tmp_path)) == model_digest(hf.model_task(tmp_path).build_model())


@pytest.mark.parametrize("case", list(CASES))
def test_a_streamed_store_has_the_same_bytes(case: str, text: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", case)
    assert (folder / streaming.INDEX).is_file() == (case == "shards")
    task = hf.model_task(folder, text, length=16)
    model, data = task.build_model(), task.calibration_batches(0)
    assert len(data) > 3
    streamed = streamed_model(folder)
    assert find_layers(streamed) == find_layers(model)
    assert model_digest(streamed) == model_digest(model)
    whole = profile(model, calibrate(model, data), tmp_path / "whole", OPTIONS, workers=1)
    stats = calibrate_streamed(streamed, data, tmp_path / "streamed")
    assert all(streamed.get_parameter(layer.key).is_meta for layer in find_layers(streamed)), "weights stay in files"
    found = profile(streamed, stats, tmp_path / "streamed", OPTIONS, workers=1)
    assert found.fingerprint == whole.fingerprint
    assert stored(tmp_path / "streamed") == stored(tmp_path / "whole")
    assert len(stored(tmp_path / "whole")) == len(whole.layers) + 3


def test_hessians_and_traces_of_a_streamed_profile_are_read_when_they_are_asked_for(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    data = hf.model_task(llama, text, length=16).calibration_batches(0)
    model = streamed_model(llama)
    made = profile(model, calibrate_streamed(model, data, tmp_path), tmp_path, OPTIONS, workers=1)
    (tmp_path / "streaming" / "statistics.npz").unlink()  # the store has its own
    for found in (made, load_profile(tmp_path, held=False)):
        assert not isinstance(found.statistics.layers, dict)
        assert all(isinstance(layer.kept, Path) for layer in found.layers.values() if layer.kept is not None)
        assert any(isinstance(layer.kept, Path) for layer in found.layers.values())
        held = load_profile(tmp_path)
        assert isinstance(held.statistics.layers, dict)
        assert found.fingerprint == held.fingerprint
        name = "model.layers.1.mlp.down_proj"
        weight = hf.model_task(llama).build_model().get_parameter(f"{name}.weight")
        one, other = (each.problem(name, weight) for each in (found, held))
        for field in ("hessian", "order", "losses"):
            assert (getattr(one, field) == getattr(other, field)).all()


def test_a_calibration_that_is_interrupted_goes_on_with_the_next_block(llama: Path, text: Path, tmp_path: Path) -> None:
    data = hf.model_task(llama, text, length=16).calibration_batches(0)
    model = streamed_model(llama)
    done: list[int] = []

    def stop(number: int, total: int) -> None:
        assert total == 3
        done.append(number)
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_streamed(model, data, tmp_path / "one", progress=stop)
    assert all(model.get_parameter(layer.key).is_meta for layer in find_layers(model))
    again: list[int] = []
    first = calibrate_streamed(model, data, tmp_path / "one", progress=lambda number, _: again.append(number))
    assert (done, again) == ([0, 1], [1, 2])
    calibrate_streamed(model, data, tmp_path / "other")
    assert stored_statistics(tmp_path / "one") == stored_statistics(tmp_path / "other")
    kept = sorted(path.name for path in (tmp_path / "one" / "streaming").iterdir())
    assert kept == ["statistics.npz"], "inputs of blocks are removed"
    # Other data starts from the beginning, whatever is there.
    other = calibrate_streamed(model, data[:-1], tmp_path / "one", progress=lambda number, _: again.append(number))
    assert again == [1, 2, 0, 1, 2]
    assert other.fingerprint != first.fingerprint


def stored_statistics(store: Path) -> bytes:
    return (store / "streaming" / "statistics.npz").read_bytes()


@pytest.mark.parametrize("case", ["shards", "bert"])
def test_a_streamed_result_is_that_of_the_whole_model(case: str, text: Path, tmp_path: Path) -> None:
    """Corrections, sequential mode, measured plans and factors: the same plan, the same bytes, the same outputs."""
    folder = saved(tmp_path / "model", case)
    task = hf.model_task(folder, text, length=16)
    found: dict[str, Any] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, model in (("streamed", streamed_model(folder)), ("whole", task.build_model())):
        data = task.calibration_batches(0)
        context = Context(model, data, embedding=task.embedding)
        profile_ = profiled(model, data, 0, tmp_path / name, ["w3", "rd(0.3,0.1)", "rank4w6+w2"], 1)
        plans = [plan(profile_, "8x", strategy, context) for strategy in ("exact", "kl")]
        split = {
            n: next((row.option for row in layer.rows if row.option.residual), plans[0].layers[n])
            for n, layer in profile_.layers.items()
        }
        models = [apply_sequentially(model, plans[0], profile_, data), context.build(profile_, split)]
        found[name] = [encoded_of(models[0]), [p.replace(measured={}).to_json() for p in plans], plans[0].measured]
        outputs[name] = [context.output(small, data[0]) for small in models]
        assert all(p.is_meta for n, p in models[0].named_parameters() if n in profile_.template.keys.values()) == (
            name == "streamed"
        )
    assert found["streamed"] == found["whole"]
    assert len({entry.name for entry in found["whole"][0].entries}) > 20
    for one, other in zip(outputs["streamed"], outputs["whole"], strict=True):
        assert torch.equal(one, other)


def test_what_comes_back_of_a_streamed_model_runs_without_its_folder(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    task = hf.model_task(folder, text, length=16)
    data = task.calibration_batches(0)
    result = compress(
        streamed_model(folder), data, "5x", effort="normal", options=OPTIONS, out=tmp_path / "out", strategy="exact"
    )
    assert "tune: not possible (gradients need the whole model" in " ".join(result.plan.notes)
    shutil.rmtree(folder)
    again = ac.save(result.model, result.plan, tmp_path / "again.acz")
    assert again.path.read_bytes() == result.info.path.read_bytes()
    fresh = tiny_llama()
    with torch.no_grad():
        expected = ac.load(result.info.path, fresh)(**data[0]).logits
        assert torch.equal(result.model(**data[0]).logits, expected)
    layer: Any = result.model.get_submodule("model.layers.0.mlp.up_proj")
    payload = layer.parametrizations.weight.original.detach().clone()
    payload[-1] += 1
    layer.parametrizations.weight.original = nn.Parameter(payload, requires_grad=False)
    with pytest.raises(MismatchError, match="its payload was changed after it was loaded"):
        ac.save(result.model, result.plan, tmp_path / "other.acz")


def test_what_needs_the_whole_model_says_so(llama: Path, text: Path, tmp_path: Path) -> None:
    task = hf.model_task(llama, text, length=16)
    data, model = task.calibration_batches(0), streamed_model(llama)
    with pytest.raises(BudgetError, match="milliseconds are timed on the whole model"):
        compress(model, data, ac.Budget(ratio=5, latency_ms=1.0), out=tmp_path / "out")
    found = profiled(model, data, 0, tmp_path / "store", ["w4", "w6"], 1)
    with pytest.raises(CalibrationError, match="this strategy changes or differentiates weights of the whole model"):
        plan(found, "5x", "loss", Context(model, data))
    small = apply(model, plan(found, "5x", "exact"), found, data)
    info = ac.save(small, encoded_of(small).plan, tmp_path / "model.acz")
    with pytest.raises(MismatchError, match=r"are not in memory; load .*model\.acz with packed=True"):
        ac.load(info.path, streamed_model(llama))


def test_a_weight_that_is_used_outside_of_its_layer_is_noticed() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + (self.inner.weight.sum() if x.sum() > 0 else 0.0)

    model = Peeking()
    held = model.inner.weight
    setattr(model, READER, lambda key: held.detach().clone())
    model.inner._parameters["weight"] = nn.Parameter(held.to("meta"))
    assert torch.equal(feed(model, -torch.ones(2, 3)), -torch.ones(2, 3) @ held.T + model.inner.bias)
    with pytest.raises(CalibrationError, match="uses a weight outside of the layer that holds it"):
        feed(model, torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="cannot take a batch"):
        feed(model, torch.ones(2, 4))
    assert model.inner.weight.is_meta
    assert not model.inner._forward_hooks


def test_compress_writes_the_same_file_either_way(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--budget", "5x", "--text", text, "--length", 16, "--effort", "fast", "--options", "w4,w6,w8,rd(0.1,0.1)"]
    for name in ("--stream", "--no-stream"):
        call("compress", llama, *common, "--out", tmp_path / name, "--json", name)
    one, other = (tmp_path / name for name in ("--stream", "--no-stream"))
    assert (one / "model.acz").read_bytes() == (other / "model.acz").read_bytes()
    assert stored(one / "profile") == stored(other / "profile")
    metrics = [json.loads((each / "metrics.json").read_text()) for each in (one, other)]
    assert metrics[0]["baseline_metric"] == metrics[1]["baseline_metric"] < 0
    planned = json.loads(call("plan", one, "--budget", "5x", "--json").out)
    assert planned["predicted_bytes"] <= metrics[0]["budget_bytes"]
    for large in (False, True):
        monkeypatch.setattr(streaming, "too_large", lambda folder, large=large: large)
        assert "every tensor arrives in LlamaForCausalLM" in call("verify", one, "--task", llama).out


def test_what_a_streamed_model_cannot_have_is_refused_before_the_work(llama: Path, text: Path, tmp_path: Path) -> None:
    common = ["compress", llama, "--text", text, "--length", 16, "--out", tmp_path / "out", "--stream"]
    facts = json.loads(call(*common, "--budget", "5x", "--dry-run", "--json").out)
    assert facts["layers"] == len(find_layers(tiny_llama()))
    assert "no allocation fits in 300 bytes" in call(*common, "--budget", 300).refused(3)
    assert "leave streaming off" in call(*common, "--budget", "5x", "--options", "channels").refused(2)
    data = hf.model_task(llama, text, length=16).calibration_batches(0)
    with pytest.raises(CalibrationError, match="keeps its statistics in a store; name one"):
        profiled(streamed_model(llama), data)
    stats = calibrate_streamed(streamed_model(llama), data, tmp_path / "store")
    with pytest.raises(StoreError, match="needs a store, as it is more than memory may hold; name one"):
        profile(streamed_model(llama), stats)


def test_a_model_is_streamed_if_it_is_large_for_the_machine(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * sum(p.numel() for p in tiny_llama().parameters())
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 4 * weights}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert not streaming.too_large(llama)
    pages["SC_PHYS_PAGES"] -= 4
    assert streaming.too_large(llama)
    assert "no model folder" in call("profile", "digits", "--store", tmp_path, "--stream").refused(2)


class Block(nn.Module):
    """A linear layer and what else a test wants of it."""

    def __init__(self, act: Callable[[torch.Tensor], Any] = torch.tanh) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.act = act

    def forward(self, x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> Any:
        return self.act(self.linear(x) * scale)


class Net(nn.Module):
    def __init__(self, run: Callable[[Sequence[Any], torch.Tensor], Any], **arguments: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**arguments) for _ in range(3))
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(list(self.blocks), x)


def chained(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def scaled(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x, scale=x.mean())
    return x


def with_pairs(blocks: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x, _ = block(x)
    return x


def pair(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x.mean()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no list": (lambda: nn.Sequential(nn.Linear(6, 6)), "no list of two blocks"),
    "side by side": (lambda: Net(lambda b, x: sum(block(x) for block in b)), "is not called on what the one before"),
    "in between": (lambda: Net(lambda b, x: b[2](b[1](b[0](x) + x))), "is not called on what the one before"),
    "another order": (lambda: Net(lambda b, x: b[1](b[0](b[2](x)))), "is not called on what the one before"),
    "twice": (lambda: Net(lambda b, x: chained(b, chained(b, x))), "is not called on what the one before"),
    "not all": (lambda: Net(lambda b, x: chained(b[:2], x)), "block 2 of 'blocks' is not called"),
    "none": (lambda: Net(lambda b, x: x * b[0].linear.weight.sum()), "block 0 of 'blocks' is not called"),
    "data-dependent": (lambda: Net(scaled), "block 1 of 'blocks' is called with more that depends on"),
    "two outputs": (lambda: Net(with_pairs, act=pair), "returns more than hidden states"),
    "other type": (lambda: Net(chained, act=torch.Tensor.double), "returns more than hidden states"),
    "double": (lambda: Net(lambda b, x: chained(b, x.double())), "gets torch.float64 as its first argument"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_chain_of_blocks_is_refused(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    with pytest.raises(CalibrationError, match=words) as caught:
        calibrate_streamed(make(), [torch.ones(4, 6)], tmp_path)
    assert "--no-stream" in str(caught.value)


def test_a_weight_of_two_blocks_is_refused(tmp_path: Path) -> None:
    model = Net(chained)
    model.blocks[1].linear.weight = model.blocks[0].linear.weight  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match=r"'blocks\.0\.linear' is shared by blocks\.0\.linear, b"):
        calibrate_streamed(model, [torch.ones(4, 6)], tmp_path)


def test_models_in_memory_and_blocks_in_tuples_are_walked_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [torch.randn(5, 3, 6), torch.randn(4, 2, 6), torch.randn(5, 3, 6)]  # of two shapes
    for number, model in enumerate((Net(chained), Net(with_pairs, act=lambda x: (torch.tanh(x), None)))):
        found, expected = calibrate_streamed(model, data, tmp_path / str(number)), calibrate(model, data)
        expected.save(tmp_path / "whole.npz")
        assert stored_statistics(tmp_path / str(number)) == (tmp_path / "whole.npz").read_bytes()
        assert found.fingerprint == expected.fingerprint
        assert not any("forward" in block.__dict__ for block in model.blocks)


def test_the_chain_is_the_list_with_most_weights() -> None:
    model = nn.Module()
    model.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    model.blocks = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)] * 2)}) for _ in range(2))
    assert find_chain(model) == "blocks"


def changed(folder: Path, llama: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    model: Any = hf.model_task(llama).build_model()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_files_that_lack_something_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    down, norm = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
    data = hf.model_task(llama, text, length=16).calibration_batches(0)
    with pytest.raises(TaskError, match=f"holds no tensor '{norm}'; save the model again"):
        streamed_model(changed(tmp_path / "a", llama, lambda t: t.__delitem__(norm)))
    with pytest.raises(TaskError, match=f"holds no tensor '{down}'; save the model again"):
        calibrate_streamed(
            streamed_model(changed(tmp_path / "b", llama, lambda t: t.__delitem__(down))), data, tmp_path / "s"
        )
    with pytest.raises(TaskError, match=r"'model.norm.weight' is \(31,\), and config.json makes it \(32,\)"):
        streamed_model(changed(tmp_path / "c", llama, lambda t: t.__setitem__(norm, torch.ones(31))))
    bad = streamed_model(changed(tmp_path / "d", llama, lambda t: t[down][0, 0].fill_(torch.nan)))
    with pytest.raises(LayerError, match=r"layer 'model\.layers\.1\.mlp\.down_proj' has weights that are NaN"):
        calibrate_streamed(bad, data, tmp_path / "s")
    (tmp_path / "d" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(TaskError, match="cannot be read"):
        streamed_model(tmp_path / "d")


def test_statistics_on_disk_are_saved_as_those_in_memory_are(llama: Path, text: Path, tmp_path: Path) -> None:
    task = hf.model_task(llama, text, length=16)
    held = calibrate(task.build_model(), task.calibration_batches(0))
    held.save(tmp_path / "held.npz")
    Statistics.load(tmp_path / "held.npz", held=False).save(tmp_path / "kept.npz")
    assert (tmp_path / "held.npz").read_bytes() == (tmp_path / "kept.npz").read_bytes()


def test_layers_that_part_after_the_first_batch_are_refused(tmp_path: Path) -> None:
    class Parting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.other(x if x.sum() > 0 else x + 1)

    model = nn.Module()
    model.blocks = nn.ModuleList(Parting() for _ in range(2))
    model.forward = lambda x: chained(list(model.blocks), x)  # type: ignore[arg-type]
    calibrate_streamed(model, [torch.ones(4, 6)] * 3, tmp_path / "one")
    with pytest.raises(CalibrationError, match=r"'blocks\.0\.one' and 'blocks\.0\.other' read the same at first"):
        calibrate_streamed(model, [torch.ones(4, 6), -torch.ones(4, 6)], tmp_path / "other", holdout=0.0)


# Peaks in bytes: once a tiny model has been through all of it; after calibration, the profile, and all the rest.
MEASURED = """
import sys
import torch
from autocompress.pipeline import compress
from autocompress.profiling import profile
from autocompress.streaming import calibrate_streamed, streamed_model
data = [{"input_ids": rows, "use_cache": False} for rows in torch.arange(192).reshape(6, 32).remainder(60).split(6)]
marks = []
def peak():  # not ru_maxrss, which begins with that of the parent
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
for folder, store in zip(sys.argv[1::2], sys.argv[2::2]):
    model = streamed_model(folder)
    stats = calibrate_streamed(model, data, store)
    marks.append(peak())
    profile(model, stats, store, ["fp16"], workers=1)
    marks.append(peak())
    compress(model, data, "1.9x", effort="fast", options=["fp16"], workers=1, store=store, out=store + "-out")
    marks.append(peak())
print(*marks[2:])
"""


def test_peak_memory_is_that_of_a_block_as_the_formula_says(llama: Path, tmp_path: Path) -> None:
    """Of sixteen blocks, whose weights together are more than what one takes with statistics and buffers."""
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=320, intermediate_size=896, num_hidden_layers=16, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    given = [llama, tmp_path / "a", tmp_path / "model", tmp_path / "b"]
    # Arrays of these sizes would go to the heap, which keeps holes between them; larger ones never do.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURED, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    before, calibrated, profiled, compressed = map(int, done.stdout.split())
    network = estimating.llama(tmp_path / "model" / "config.json", samples=6, tokens=32)
    fixed = estimating.LIBRARIES + estimating.TRANSFORMERS
    offered = [DENSE, Option.parse("fp16")]
    calibration, whole = (estimating.streaming_bytes(network, options) - fixed for options in (None, offered))
    size = (tmp_path / "b-out" / "model.acz").stat().st_size
    everything = estimating.compressing_bytes(network, size, offered, sequential=False) - fixed
    assert size < 2.2 * network.parameters
    assert everything < 1.75 * 4 * network.parameters  # the model and a copy, whole, are twice
    assert max(calibration, whole) < 0.75 * 4 * network.parameters  # or it would not tell
    assert calibrated - before <= calibration
    assert profiled - before <= whole
    assert compressed - before <= everything
    inside = sum(unit.weights for unit in network.units if unit.name in network.block)
    assert profiled <= 4 * inside + network.hessian_bytes(network.block) + 1.5 * 2**30
