"""What exports weigh and how fast they run: onnxruntime's CPU kernels, and packed loading in torch.

    AUTOCOMPRESS_DATA=... python experiments/bench_exports.py          # about twelve minutes on one thread
    python experiments/bench_exports.py --only transformer             # one network, which needs no data
    python experiments/bench_exports.py --table                        # the results as docs/exports.md has them

Every network's layers are rounded to the nearest on one uniform grid (`w4`: a step per row; `rd`: one step per layer,
more than half of the codes zero); time and bytes do not depend on how good the codes are. Each row runs in a process of
its own on one thread: milliseconds are the fastest of the repetitions, memory is what loading and running added to the
resident set (in torch: also the bytes of all parameters and buffers, as `weights_mb`). ResNet-20 takes images
(N, 3, 32, 32), the transformer (4 layers, 512 wide) rows of 64 vectors.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, ROOT, environment, keep_row
from torch import nn

KEYS = ("network", "option", "form", "batch")
SESSIONS = {  # entries of onnxruntime's session configuration
    "session exact": ("session.qdq_matmulnbits_accuracy_level", "1"),
    "session dense": ("session.disable_quant_qdq", "1"),
}
FORMS = (
    "onnx dense",
    "onnx QDQ",
    "onnx QDQ, session exact",
    "onnx QDQ, session dense",
    "onnx QDQ int8",
    "onnx MatMulNBits",
    "onnx MatMulNBits level 4",
    "torch dense",
    "torch packed",
    "torch packed, bits",
)
OPTIONS = ("w4", "w8", "rd(0.25,0.1)s60")


class Transformer(nn.Module):
    """Four encoder layers 512 wide, attention written out as linear layers, rows of 64 vectors in and out."""

    def __init__(self, width: int = 512, layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    """Pre-norm attention with eight heads, then a feed-forward layer four times as wide."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(count, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(count, length, width))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network in eval mode and one sample of what it takes."""
    if name == "transformer":
        torch.manual_seed(0)
        return Transformer().eval(), torch.randn(1, 64, 512)
    from autocompress.tasks import load_task

    task = load_task(ROOT / "experiments" / "tasks" / f"{name}_cifar10.py")
    assert task.example_input is not None
    return task.build_model(), task.example_input()[:1]


def rounded(model: nn.Module, option: str, path: Path) -> Path:
    """A file with every layer rounded to the option's grid."""
    from autocompress.layers import find_layers
    from autocompress.records import fold_norms, records, vector_keys
    from autocompress.storage import weight_entry, write
    from autocompress.types import Option

    wanted = Option.parse(option)
    layers = find_layers(model)
    small = copy.deepcopy(model)
    entries = {}
    with torch.no_grad():
        fold_norms(small)
        for layer in layers:
            weight = small.get_parameter(layer.key).numpy()
            rows = weight.reshape(layer.shape[0], -1).astype(np.float64)
            if wanted.bits is not None:
                top = 2 ** (wanted.bits - 1) - 1
                step: Any = np.maximum(np.abs(rows).max(1) / top, 1e-7).astype(np.float16)
                codes = np.clip(np.rint(rows / step[:, None].astype(np.float64)), -top - 1, top)
            else:
                step = float(np.float32((wanted.step or 1.0) * rows.std()))
                codes = np.rint(rows / step)
                codes[np.abs(rows) < np.quantile(np.abs(rows), wanted.sparsity / 100)] = 0
            codes = codes.astype(np.int32).reshape(layer.shape)
            entry = weight_entry(layer.key, codes, step, params={"option": option})
            entries[layer.key] = entry
            small.get_parameter(layer.key).copy_(torch.from_numpy(entry.dequantise()).reshape(layer.shape))
        write(path, records(small, entries, vector_keys(model, layers)[0]))
    return path


def prepare(name: str, option: str, form: str, folder: Path) -> dict[str, Any]:
    """Write what the form runs: {path, file_bytes, max_difference}."""
    import autocompress as ac
    from autocompress.exporting import Onnx

    model, sample = network(name)
    archive = rounded(model, option, folder / "model.acz")
    if form.startswith("torch"):
        return {"path": str(archive), "file_bytes": archive.stat().st_size}
    exporter = {
        "onnx dense": Onnx(weights="dense"),
        "onnx QDQ int8": Onnx(weights="int8"),
        "onnx MatMulNBits": Onnx(matmul_nbits=True),
        "onnx MatMulNBits level 4": Onnx(matmul_nbits=True, accuracy_level=4),
    }.get(form, Onnx())
    info = ac.export(archive, model, exporter, folder / "model.onnx", example=sample)
    exact = form.partition(", ")[2] in SESSIONS
    difference = info.facts["max_difference" if exact else "max_difference_default_session"]
    return {
        "path": str(info.path),
        "file_bytes": info.bytes,
        "relative_difference": f"{difference / info.facts['max_output']:.1e}",
    }


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(name: str, form: str, batch: int, path: str) -> dict[str, Any]:
    """Load and run in this process: {load_ms, run_ms, memory_mb, weights_mb}."""
    torch.set_num_threads(1)
    model, sample = network(name)
    given = torch.cat([sample] * batch)
    found: dict[str, Any] = {}
    if form.startswith("onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if entry := SESSIONS.get(form.partition(", ")[2]):
            options.add_session_config_entry(*entry)
        del model
        before, start = resident(), time.perf_counter()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {session.get_inputs()[0].name: given.numpy()}

        def run() -> Any:
            return session.run(None, feeds)
    else:
        import autocompress as ac
        from autocompress.packed import packed_bytes

        warm = ac.load(path, copy.deepcopy(model), packed=True)  # compiles the decoder
        del warm
        before, start = resident(), time.perf_counter()
        packed: Any = {"torch packed": True, "torch packed, bits": "bits"}.get(form, False)
        loaded: Any = ac.load(path, model, packed=packed)
        found["weights_mb"] = round(packed_bytes(loaded) / 1e6, 3)

        def run() -> Any:
            with torch.inference_mode():
                return loaded(given)

    found["load_ms"] = round(1e3 * (time.perf_counter() - start), 1)
    run()
    found["memory_mb"] = round((resident() - before) / 1e6, 1)
    times: list[float] = []
    while len(times) < 7 or (sum(times) < 1.5 and len(times) < 200):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return found | {"run_ms": round(1e3 * min(times), 3), "runs": len(times)}


def table(path: Path) -> str:
    """The results as Markdown, one line for both batch sizes; for torch, memory is that of its tensors alone."""
    import csv

    with path.open(newline="") as file:
        rows = {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}
    lines = [
        "| network | option | form | file, kB | memory, MB | ms, 1 sample | ms, 16 samples | difference |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in ("resnet20", "transformer"):
        for option in OPTIONS:
            for form in FORMS:
                one, many = rows.get((name, option, form, "1")), rows.get((name, option, form, "16"))
                if one is None or many is None:
                    continue
                cells = [
                    name,
                    option,
                    form,
                    f"{int(one['file_bytes']) / 1e3:,.0f}",
                    one["weights_mb"] or one["memory_mb"],
                ]
                cells += [f"{float(row['run_ms']):.2f}" for row in (one, many)]
                lines.append(f"| {' | '.join([*cells, one['relative_difference'] or '0'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("resnet20", "transformer"))
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=OPTIONS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--table", action="store_true", help="only print the results that are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_exports.csv")
    parser.add_argument("--child", nargs=4, metavar=("NETWORK", "FORM", "BATCH", "PATH"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, form, batch, path = asked.child
        sys.stdout.write(json.dumps(child(name, form, int(batch), path)))
        return
    if asked.table:
        sys.stdout.write(table(asked.out))
        return
    facts = environment()
    facts["versions"] += f" onnxruntime={version('onnxruntime')} onnx={version('onnx')}"
    for name in [asked.only] if asked.only else ["resnet20", "transformer"]:
        for option in asked.options:
            for form in asked.forms:
                if "MatMulNBits" in form and name == "resnet20":
                    continue  # its one linear layer would say nothing
                with tempfile.TemporaryDirectory() as scratch:
                    made = prepare(name, option, form, Path(scratch))
                    for batch in (1, 16):
                        command = [sys.executable, __file__, "--child", name, form, str(batch), made["path"]]
                        limited = {**os.environ, "OMP_NUM_THREADS": "1"}
                        done = subprocess.run(command, capture_output=True, text=True, check=True, env=limited)
                        row = {"network": name, "option": option, "form": form, "batch": batch}
                        row |= {key: value for key, value in made.items() if key != "path"}
                        row |= json.loads(done.stdout)
                        sys.stdout.write(json.dumps(row) + "\n")
                        sys.stdout.flush()
                        keep_row(asked.out, row | facts, KEYS)


if __name__ == "__main__":
    main()
