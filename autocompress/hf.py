"""Hugging Face models from a local folder as tasks: encoders and causal language models, calibrated on a text.

Nothing is ever downloaded: a folder is what `save_pretrained` writes, config.json and model.safetensors, with the
tokenizer beside them. Needs the extra `hf` (transformers), which is imported where it is first needed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from autocompress.batches import Batch, batch_digest
from autocompress.errors import TaskError
from autocompress.tasks import Task

__all__ = [
    "batch_rows",
    "mean_embedding",
    "model_task",
    "perplexity",
    "pretrained",
    "skeleton",
    "window_batches",
    "windows",
]

TAIL = 0.1  # of the windows of a text, its last ones: what a causal model's perplexity is reported on
BATCH, POSITIONS = 32, 2048  # windows of one batch, and tokens, unless a single window has more
LENGTH = 128  # tokens of a window, unless told otherwise


def model_task(
    folder: str | Path,
    text: str | Path | None = None,
    length: int | None = None,
    samples: int = 256,
) -> Task:
    """The task of a model folder: `samples` windows of `length` tokens of a text to calibrate on, drawn by the seed.
    By default a window has 128 tokens, or what the model takes if that is less.

    A model with a head for causal language modelling in `architectures` of config.json is one, and reports
    `evaluate` = -exp(mean cross-entropy per token) on the last tenth of the text, which calibration never sees; any
    other is an encoder, judged by its last hidden states (`embedding`), and reports what a task of the user's says.
    Tokens are those of the folder's own tokenizer. Raises TaskError where the folder, its tokenizer, the text or
    transformers is missing, for names of models on the hub, and for a text of fewer than two windows.
    """
    path = _checked(Path(folder))
    config = _config(path)
    causal = _is_causal(config)

    def model() -> nn.Module:
        return pretrained(_kind(config), path)

    @functools.cache
    def parts() -> tuple[torch.Tensor, torch.Tensor]:
        if text is None:
            raise TaskError(f"{path} is a model folder, and calibration needs a text: give one (--text FILE)")
        limit = getattr(config, "max_position_embeddings", None)
        size = min(LENGTH, limit or LENGTH) if length is None else length
        if limit is not None and size > limit:
            raise TaskError(f"windows of {size} tokens are longer than the model takes, {limit}; give a lower length")
        found = windows(_tokenizer(path), _read(Path(text)), size)
        tail = max(1, round(TAIL * len(found))) if causal else 0
        if len(found) - tail < 2:
            raise TaskError(f"{text} has {len(found)} windows of {size} tokens; needed are {2 + tail} at least")
        return found[: len(found) - tail], found[len(found) - tail :]

    def calibration(seed: int = 0) -> list[Batch]:
        found = parts()[0]
        rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:samples]
        return window_batches(found[rows], causal)

    return Task(
        name=path.name or str(path),
        source=str(folder),
        folder=None,
        model=model,
        calibration=calibration,
        evaluate=Perplexity(lambda: parts()[1]) if causal and text is not None else None,
        embedding=None if causal else hidden_states,
        recipe=functools.partial(model_task, folder, text, length, samples),
    )


@dataclass(frozen=True)
class Perplexity:
    """evaluate(model): minus the perplexity on these windows (n, length). `version` tells their tokens from others."""

    windows: Callable[[], torch.Tensor]

    def __call__(self, model: nn.Module) -> float:
        return -perplexity(model, self.windows())

    @property
    def version(self) -> str:
        return batch_digest(self.windows())


def pretrained(kind: Any, folder: Path, **arguments: Any) -> nn.Module:
    """kind.from_pretrained of a local folder, float32, in eval mode and without a word on stderr. Raises TaskError."""
    logging = _transformers().utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **arguments).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise TaskError(f"the model in {folder} cannot be loaded: {_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def skeleton(folder: str | Path) -> nn.Module:
    """What the task of a model folder builds, in eval mode, with every parameter on the meta device, where it has a
    shape and takes no memory; buffers are as config.json makes them. Nothing of the weights is read. Raises TaskError.
    """
    path = _checked(Path(folder))
    config = _config(path)
    try:
        with _no_parameters():
            return _kind(config).from_config(config, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TaskError(f"the model in {path} cannot be built: {_line(error)}") from error


@contextlib.contextmanager
def _no_parameters() -> Iterator[None]:
    """Put every parameter that a module gets on the meta device. A default device would do so to buffers too, and what
    they hold (frequencies, positions) is often in no file.
    """
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied one is there already, and stays the same object
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def windows(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    """A text as int64 (windows, length): its tokens in order, cut, each window between the special tokens that the
    tokenizer puts around a single sequence; what is left over at the end is dropped.
    """
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    probe = tokenizer(tokenizer.decode(tokens[:1]) or "a", verbose=False)["input_ids"]
    plain = tokenizer(tokenizer.decode(tokens[:1]) or "a", add_special_tokens=False, verbose=False)["input_ids"]
    before, after = _around(probe, plain)
    size = length - len(before) - len(after)
    if size < 1:
        raise TaskError(f"windows of {length} tokens have no room beside {len(before) + len(after)} special ones")
    count = len(tokens) // size
    body = torch.tensor(tokens[: count * size], dtype=torch.int64).reshape(count, size)
    ends = (torch.tensor(end, dtype=torch.int64).expand(count, -1) for end in (before, after))
    first, last = ends
    return torch.cat([first, body, last], dim=1)


def _around(whole: list[int], inner: list[int]) -> tuple[list[int], list[int]]:
    """What stands before and after `inner` in `whole`."""
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []


def window_batches(tokens: torch.Tensor, causal: bool = False) -> list[Batch]:
    """Windows (n, length) as batches by the names of a model's arguments; a causal model need keep no cache."""
    extra = {"use_cache": False} if causal else {}
    return [{"input_ids": rows.contiguous(), **extra} for rows in tokens.split(batch_rows(tokens.shape[1]))]


def batch_rows(length: int) -> int:
    """Windows of so many tokens that go through a model at once: what it makes of them is all in memory."""
    return max(1, min(BATCH, POSITIONS // length))


def perplexity(model: nn.Module, sequences: torch.Tensor | Sequence[torch.Tensor]) -> float:
    """exp of the mean of -log p(token | those before it), over the predicted tokens of sequences (n, length)."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in sequences.split(BATCH) if isinstance(sequences, torch.Tensor) else sequences:
            tokens = rows.reshape(-1, rows.shape[-1]).to(device)
            scores = model(input_ids=tokens, use_cache=False).logits[:, :-1].double()
            found = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            total, count = total + float(found), count + tokens[:, 1:].numel()
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def hidden_states(output: Any, batch: Batch) -> torch.Tensor:
    """The last hidden states (n, length, width) of an encoder, zero where the batch has an attention mask of zero."""
    states = output.last_hidden_state
    mask = batch.get("attention_mask")
    return states if mask is None else states * mask[..., None].to(states)


def mean_embedding(output: Any, batch: Batch) -> torch.Tensor:
    """The mean over tokens of the last hidden states, of length one: what sentence encoders of this kind compare."""
    states, mask = output.last_hidden_state, batch.get("attention_mask")
    weights = torch.ones_like(states[..., :1]) if mask is None else mask[..., None].to(states)
    return nn.functional.normalize((states * weights).sum(1) / weights.sum(1).clamp_min(1.0), dim=-1)


def _is_causal(config: Any) -> bool:
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def _kind(config: Any) -> Any:
    """The class that loads a folder of that configuration."""
    library = _transformers()
    return library.AutoModelForCausalLM if _is_causal(config) else library.AutoModel


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TaskError("models of Hugging Face need transformers: pip install 'autocompress[hf]'") from error
    return transformers


def _checked(path: Path) -> Path:
    if not path.is_dir():
        raise TaskError(
            f"there is no folder {str(path)!r}. Models are never downloaded; fetch it first, for example by "
            f"`hf download {path} --local-dir DIR`, and give DIR"
        )
    if not (path / "config.json").is_file():
        raise TaskError(f"{path} holds no config.json; needed is a folder as save_pretrained writes it")
    if not list(path.glob("*.safetensors")):
        raise TaskError(f"{path} holds no model.safetensors; save the model again by save_pretrained")
    return path


def _config(path: Path) -> Any:
    try:
        return _transformers().AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TaskError(f"{path}/config.json is not one of a model: {_line(error)}") from error


def _tokenizer(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")):
        raise TaskError(
            f"{path} holds no tokenizer (tokenizer.json): save the model's own there by tokenizer.save_pretrained, or "
            "write a task file that yields token ids"
        )
    try:
        return _transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TaskError(f"the tokenizer in {path} cannot be loaded: {_line(error)}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"the text {path} cannot be read: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
