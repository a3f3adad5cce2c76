"""Model folders as tasks, on networks of a few thousand weights that are made here; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tiny_tasks import call
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import autocompress as ac
from autocompress import estimating, hf, measuring, streaming
from autocompress.comparing import CompareWarning, summary
from autocompress.compressors import named_options
from autocompress.errors import TaskError
from autocompress.profiling import load_profile
from autocompress.tasks import load_evaluate
from autocompress.workloads import REFERENCE

WORDS = [f"w{i}" for i in range(56)]


def save_tokenizer(folder: Path, around: bool) -> None:
    """A tokenizer of 60 words; around: it puts [CLS] and [SEP] about a sequence."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        initializer_range=0.4,  # so that blocks count beside the tied embedding, which alone repeats its input
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tiny_bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    rows = torch.randint(0, len(WORDS), (1200,), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text(" ".join(WORDS[i] for i in rows))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_llama().save_pretrained(folder)
    save_tokenizer(folder, around=False)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    tiny_bert().save_pretrained(folder)
    save_tokenizer(folder, around=True)
    return folder


def test_windows_are_the_text_in_order_between_the_special_tokens(bert: Path, llama: Path, text: Path) -> None:
    words = text.read_text().split()
    for folder, inner, ends in ((bert, 14, (1, 2)), (llama, 16, ())):
        found = hf.model_task(folder, text, length=16).calibration_batches(0)
        rows = torch.cat([batch["input_ids"] for batch in found])
        assert rows.shape[1] == 16
        body = rows[:, 1:-1] if ends else rows
        assert not ends or (set(rows[:, 0].tolist()), set(rows[:, -1].tolist())) == ({1}, {2})
        known = {tuple(4 + int(w[1:]) for w in words[i : i + inner]) for i in range(0, len(words) - inner + 1, inner)}
        assert {tuple(row) for row in body.tolist()} <= known


def test_the_seed_draws_the_windows_and_the_tail_is_never_among_them(llama: Path, text: Path) -> None:
    task = hf.model_task(llama, text, length=16, samples=20)
    first, again, other = (torch.cat([b["input_ids"] for b in task.calibration_batches(s)]) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    words = [4 + int(w[1:]) for w in text.read_text().split()]
    every = torch.tensor(words[: len(words) // 16 * 16]).reshape(-1, 16)
    tail = round(0.1 * len(every))
    everything = torch.cat([b["input_ids"] for b in hf.model_task(llama, text, 16, 1000).calibration_batches(0)])
    assert len(everything) == len(every) - tail
    assert not {tuple(r) for r in everything.tolist()} & {tuple(r) for r in every[-tail:].tolist()}
    model = task.build_model()
    assert task.evaluate is not None
    assert task.evaluate(model) == pytest.approx(-expected_perplexity(model, every[-tail:]), rel=1e-6)


def expected_perplexity(model: Any, rows: torch.Tensor) -> float:
    """By the library's own loss, a mean over each row's predicted tokens, which are as many in every row."""
    with torch.no_grad():
        return math.exp(sum(float(model(input_ids=r[None], labels=r[None]).loss) for r in rows) / len(rows))


def test_a_causal_model_is_compressed_and_read_back_into_its_class(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--text", text, "--length", 16, "--options", "w4,w8", "--effort", "fast", "--workers", 1]
    outcome = call("compress", llama, "--budget", "5x", "--out", out, *arguments)
    assert outcome.code == 0, outcome.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert (out / "model.acz").stat().st_size <= metrics["budget_bytes"]
    restored: Any = ac.load(out / "model.acz", transformers.AutoModelForCausalLM.from_pretrained(llama))
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    words = [4 + int(w[1:]) for w in text.read_text().split()]
    rows = torch.tensor(words[: len(words) // 16 * 16]).reshape(-1, 16)[-round(0.1 * (len(words) // 16)) :]
    assert metrics["metric"] == pytest.approx(-expected_perplexity(restored, rows), rel=1e-6)
    layers = json.loads((out / "plan.json").read_text())["layers"]
    assert "model.embed_tokens" in layers
    assert "lm_head" not in layers  # one matrix, one entry
    assert call("verify", out, "--task", llama).code == 0


def test_a_folder_gets_fewer_options_unless_told_otherwise(bert: Path, text: Path, tmp_path: Path) -> None:
    for given, count in (([], len(named_options(["lean", "fine"]))), (["--options", "w4,w8"], 3)):
        arguments = ["--text", text, "--budget", "4x", "--out", tmp_path / "out", "--dry-run", "--json", *given]
        facts = json.loads(call("compress", bert, *arguments).out)
        assert facts["options_per_layer"] == count


def test_an_encoder_is_judged_by_its_hidden_states_and_reports_what_a_file_says(
    bert: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "metric.py").write_text("def evaluate(model):\n    return 1.0 if model.training is False else 0.0\n")
    out = tmp_path / "out"
    arguments = ["--text", text, "--length", 16, "--options", "w4,w8", "--workers", 1, "--no-sequential"]
    outcome = call("compress", bert, "--budget", "4x", "--out", out, *arguments, "--evaluate", tmp_path / "metric.py")
    assert outcome.code == 0, outcome.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metric"] == 1.0
    task = hf.model_task(bert, text, length=16)
    context = ac.Context(task.build_model(), task.calibration_batches(0), embedding=task.embedding)
    restored = ac.load(out / "model.acz", task.build_model())
    expected = [
        (a - b).square().mean(dtype=torch.float64) / b.square().mean(dtype=torch.float64) * len(a)
        for piece in context.pieces()
        for a, b in [[hidden(m, piece["input_ids"]) for m in (restored, context.model)]]
    ]
    assert metrics["measured"]["kl"] == pytest.approx(float(sum(expected)) / context.held_samples, rel=1e-5)


COMPARED = ("--length", 16, "--options", "w4,w8", "--strategies", "uniform,exact")


def test_compare_reports_perplexity_on_the_tail_and_another_tail_makes_other_rows(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    out, known = tmp_path / "out", tmp_path / "text.txt"
    known.write_text(text.read_text())
    arguments = ["compare", llama, "--budget", "5x", "--budget", "6x,5.5x", "--out", out, "--workers", 1, *COMPARED]
    assert call(*arguments, "--text", known).code == 0
    table = ac.load_comparison(out)
    assert list(table["budget"]) == [b for b in ("5x", "6x", "5.5x") for _ in range(2)]
    task = hf.model_task(llama, known, length=16)
    model, data = task.build_model(), task.calibration_batches(0)
    words = known.read_text().split()
    whole = len(words) // 16
    tail = torch.tensor([4 + int(w[1:]) for w in words[: whole * 16]]).reshape(-1, 16)[-round(0.1 * whole) :]
    profile = load_profile(out / "seed0" / "profile")
    for line, row in zip(map(json.loads, (out / "plans.jsonl").open()), table.to_dict("records"), strict=True):
        small = ac.apply(model, ac.Plan.from_json(json.dumps(line["plan"])), profile, data)
        assert row["metric"] == pytest.approx(-expected_perplexity(small, tail), rel=1e-5)
        assert row["kl"] > 0
    # The same calibration with other words behind it is the same profile, and not the same perplexity.
    first = {p.name for p in (out / "seed0" / "rows").iterdir()}
    for again, others in ((words, 0), (words[:-20] + words[-40:-20], 6), (words, 6)):
        known.write_text(" ".join(again))
        assert call(*arguments, "--text", known).code == 0
        assert len({p.name for p in (out / "seed0" / "rows").iterdir()} - first) == others
    pd.testing.assert_frame_equal(ac.load_comparison(out), table, check_exact=True)
    known.write_text(" ".join(words[::-1]))
    assert "field 'data'" in call(*arguments, "--text", known).refused(2)


def test_compare_of_an_encoder_goes_by_its_hidden_states_or_by_a_file_in_workers_too(
    bert: Path, text: Path, tmp_path: Path
) -> None:
    metric = tmp_path / "metric.py"
    metric.write_text("def evaluate(model):\n    return model.embeddings.word_embeddings.weight.detach().abs().sum()\n")
    arguments = ["compare", bert, "--budget", "4x", "--budget", "6x", "--text", text, "--samples", 40, *COMPARED]
    tables = {}
    for name, given in (("plain", []), ("file", ["--evaluate", metric]), ("both", ["--evaluate", metric])):
        out = tmp_path / name
        if name != "plain":
            shutil.copytree(tmp_path / "plain" / "seed0" / "profile", out / "seed0" / "profile")
        with warnings.catch_warnings():
            warnings.simplefilter("error", CompareWarning)  # where workers cannot load what they need
            outcome = call(*arguments, "--out", out, "--workers", 2 if name == "both" else 1, *given)
        assert outcome.code == 0, outcome.err
        tables[name] = ac.load_comparison(out).assign(seconds=0.0)
    plain, file = tables["plain"], tables["file"]
    pd.testing.assert_frame_equal(tables["both"], file, check_exact=True)
    pd.testing.assert_frame_equal(plain.drop(columns="metric"), file.drop(columns="metric"), check_exact=True)
    assert plain["metric"].isna().all()
    assert file["metric"].nunique() > 1
    best = summary(plain).query("best")
    assert list(best["kl"]) == list(plain.groupby("budget", sort=False)["kl"].min())
    task = hf.model_task(bert, text, length=16, samples=40)
    context = ac.Context(task.build_model(), task.calibration_batches(0), embedding=task.embedding)
    profile = load_profile(tmp_path / "plain" / "seed0" / "profile")
    for row in plain.to_dict("records"):
        layers = {n: ac.Option.parse(option) for n, (option, _) in json.loads(row["layers"]).items()}
        plan = ac.plan(profile, row["budget"], row["strategy"])
        assert layers == dict(plan.layers)
        small = ac.apply(context.model, plan, profile, task.calibration_batches(0))
        assert row["kl"] == pytest.approx(context.divergence_of(small), rel=1e-5)


def test_compare_says_that_it_holds_what_others_would_stream(
    bert: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", bert, "--budget", "4x", "--text", text, "--out", tmp_path / "out", "--dry-run", *COMPARED]
    assert "warning" not in call(*arguments).err
    monkeypatch.setattr(streaming, "SHARE", 0.0)
    assert "more than 0% of this machine's memory; compare does not stream" in call(*arguments).err


def test_doctor_estimates_a_folder_by_its_own_windows(
    bert: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "measured_rates", lambda: dict(REFERENCE))
    arguments = [bert, "--text", text, "--length", 16, "--samples", 40, "--options", "w4,w8", "--workers", 1, "--json"]
    found = json.loads(call("doctor", "--estimate", *arguments).out)
    facts = json.loads(call("profile", *arguments, "--store", tmp_path / "store").out)
    assert found["layers"] == facts["layers"]
    assert found["calibration_samples"] == 32  # a fifth is held out
    kept = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.npz"))
    assert found["disk_bytes"] < kept < 1.5 * found["disk_bytes"]
    task = hf.model_task(bert, text, length=16, samples=40)
    network = estimating.network_of(task.build_model(), task.calibration_batches(0))
    alone = dataclasses.replace(network, transformers=False)
    library = found["memory_bytes"] - estimating.estimate(alone, REFERENCE, 1, ["w4", "w8"]).memory_bytes
    assert library == estimating.TRANSFORMERS
    assert "calibration needs a text" in call("doctor", "--estimate", bert).refused(2)


def hidden(model: Any, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows).last_hidden_state


def test_padding_counts_nowhere_in_an_embedding() -> None:
    model = tiny_bert()
    rows = torch.randint(4, 60, (3, 10), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([rows, torch.full((3, 5), 7)], dim=1)
    mask = (torch.arange(15) < 10).long().expand(3, -1)
    short, long = {"input_ids": rows}, {"input_ids": padded, "attention_mask": mask}
    with torch.no_grad():
        a, b = hf.mean_embedding(model(**short), short), hf.mean_embedding(model(**long), long)
        states = hf.hidden_states(model(**long), long)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(3))
    assert not states[:, 10:].any()
    assert states[:, :10].all(dim=-1).any()


def test_what_is_missing_is_named(bert: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    refused: list[tuple[list[Any], str]] = [
        (["sentence-transformers/all-MiniLM-L6-v2", "--text", text], "never downloaded"),
        (["sentence-transformers/all-MiniLM-L6-v2"], "hf download sentence-transformers/all-MiniLM-L6-v2"),
        ([bert], "calibration needs a text"),
        ([tmp_path, "--text", text], "no config.json"),
        ([bert, "--text", tmp_path / "none.txt"], "cannot be read"),
        ([bert, "--text", text, "--length", 41], "longer than the model takes, 40"),
        ([bert, "--text", text, "--length", 2], "no room"),
    ]
    for arguments, words in refused:
        message = call("compress", *arguments, "--budget", "4x", "--out", tmp_path / "out").refused(2)
        assert words in message
    bare = tmp_path / "bare"
    tiny_llama().save_pretrained(bare)
    assert "no tokenizer" in call("compress", bare, "--text", text, "--budget", "4x", "--out", tmp_path / "o").refused(
        2
    )
    (bare / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TaskError, match="cannot be loaded"):
        hf.model_task(bare, text).build_model()
    (bare / "model.safetensors").unlink()
    with pytest.raises(TaskError, match=r"no model\.safetensors"):
        hf.model_task(bare, text)
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(TaskError, match=r"has 0 windows of 16 tokens; needed are 3 at least"):
        hf.model_task(llama, tmp_path / "short.txt", 16).calibration_batches(0)


def test_a_metric_of_the_users_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    path.write_text("import helper\n\n\ndef evaluate(model):\n    return helper.value(model)\n")
    (tmp_path / "helper.py").write_text("def value(model):\n    return {1: 2.5, 2: 'much'}[model]\n")
    evaluate: Any = load_evaluate(path)
    assert evaluate(1) == 2.5
    with pytest.raises(TaskError, match="returned a str; needed one number"):
        evaluate(2)
    with pytest.raises(TaskError, match=r"evaluate\(\) failed: KeyError: 3"):
        evaluate(3)
    path.write_text("score = 1.0\n")
    with pytest.raises(TaskError, match=r"does not define evaluate\(model\)"):
        load_evaluate(path)


def test_without_transformers_the_extra_is_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(TaskError, match=r"pip install 'autocompress\[hf\]'"):
        hf.model_task(bert)


def test_loading_says_nothing_and_leaves_the_library_as_it_was(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hf.model_task(bert).build_model()
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_query_key_and_value_share_one_hessian_and_a_tied_head_is_one_layer(llama: Path, text: Path) -> None:
    task = hf.model_task(llama, text, length=16)
    stats = ac.calibrate(task.build_model(), task.calibration_batches(0))
    for block in range(2):
        q, k, v, o = (stats.layers[f"model.layers.{block}.self_attn.{n}_proj"].hessian for n in "qkvo")
        assert q is k
        assert k is v
        assert not np.array_equal(q, o)
    table = stats.layers["model.embed_tokens"]
    assert table.hessian.shape == (1, 32, 32)  # as the output head
    assert table.row_weights is not None  # as the table
    assert "lm_head" not in stats.layers


def test_a_compressed_tensors_export_generates_the_same_tokens(llama: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra hf)")
    out = tmp_path / "out"
    arguments = ["--text", text, "--length", 16, "--options", "w3,w4,w8", "--effort", "fast", "--workers", 1]
    assert call("compress", llama, "--budget", "6x", "--out", out, *arguments).code == 0
    exported = tmp_path / "exported"
    done = call("export", out, "--task", llama, "--format", "compressed-tensors", "--out", exported)
    assert done.code == 0, done.err
    own: Any = ac.load(out / "model.acz", transformers.AutoModelForCausalLM.from_pretrained(llama))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(exported)
    start = torch.tensor([[5, 9, 31], [17, 40, 8]])
    wanted, found = (m.generate(start, max_new_tokens=24, do_sample=False, use_cache=True) for m in (own, theirs))
    assert found.tolist() == wanted.tolist()
    dense = tiny_llama().generate(start, max_new_tokens=24, do_sample=False)
    assert dense.tolist() != wanted.tolist()  # so that weights matter to what is compared


def test_outputs_that_do_not_fit_into_memory_measure_the_same(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = hf.model_task(llama, text, length=16)
    model, data = task.build_model(), task.calibration_batches(0)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.1)

    def figures() -> tuple[list[float], int]:
        context, calls = ac.Context(model, data), []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        found = [*context.judge(other), context.divergence_of(other, "all"), context.divergence_of(other)]
        handle.remove()
        return found, len(calls)

    kept, calls = figures()
    assert 0.0 < kept[0] == kept[3]
    monkeypatch.setattr(measuring, "OUTPUT_BYTES", 0)
    again, more = figures()
    assert again == kept
    assert more > calls  # the dense model ran again, instead of its outputs being held
    monkeypatch.setattr(measuring, "SCORES_AT_ONCE", 1000)
    assert figures()[0] == pytest.approx(kept, rel=1e-12)
