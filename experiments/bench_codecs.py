"""Bytes and speed of the entropy coder beside NNCodec's DeepCABAC, zstd -19, order-0 entropy and the plain codecs.

    python experiments/bench_codecs.py                                     # rounded weights of the real networks
    python experiments/bench_codecs.py --only-archives --archives runs/budgets_cifar10/*/seed0/*/model.acz \
        --out experiments/results/bench_codecs_plans.csv                   # the codes of real plans
    python experiments/bench_codecs.py --nncodec-python /path/to/python    # a Python that has nncodec

Weights are read from AUTOCOMPRESS_DATA and rounded to a step per layer (a share of its standard deviation) such that
the network's order-0 entropy is what the row says. NNCodec's column is the sum of its DeepCABAC payloads alone, without
its container, each with the best of 5 scan orders x 2 context tunings x row skipping on or off; ours includes the model
byte. Every coder gets the same integers; `stored_bytes` is what the archive itself has for them, which is less where
they lie on the trellis, as its codec knows the states (NNCodec's own dependent quantisation walks another trellis).
The speed rows are single-core CPU time on large Laplace-distributed matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NETWORKS = ("cifar10_resnet20", "cifar10_resnet32", "cifar10_resnet56", "cifar10_resnet8_mlperftiny", "stories260k")
TARGETS = (0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0)  # bits per weight, order 0
SPEEDS = ((1024, 2048, 1), (512, 512, 9))
COLUMNS = (
    "source", "order0_bpw", "weights", "zeros", "order0_bytes", "ours_bytes", "stored_bytes", "nncodec_bytes",
    "zstd19_bytes", "packed_bytes", "bitmask_bytes", "ours_vs_nncodec_percent", "ours_vs_order0_percent",
    "encode_mweights_per_s",
    "decode_mweights_per_s", "nncodec", "numba", "numpy", "cpu", "commit",
)  # fmt: skip

# Runs under the Python that has NNCodec: codes in, one size per tensor out.
NNCODEC = """
import json, sys
import numpy as np
from importlib.metadata import version
from nncodec.extensions.deepCABAC import Encoder, HdspMode
sizes = []
with np.load(sys.argv[1]) as arrays:
    for i in range(len(arrays.files)):
        codes = np.ascontiguousarray(arrays[f"arr_{i}"], np.int32)
        skipped = np.array([0 if row.any() else 1 for row in codes], np.int32)
        best = None
        for scan in range(5) if codes.ndim > 1 else [0]:
            for tuned in (0, 1):
                for skip in (0, 1):
                    encoder = Encoder()
                    encoder.initCtxModels(11, tuned)
                    off = np.zeros(2, np.int8)
                    encoder.encodeLayer(codes, 0, scan, 1, 0, skip, skipped, HdspMode.AlwaysOff, off, 0, 0)
                    size = len(encoder.finish())
                    best = size if best is None else min(best, size)
        sizes.append(best)
print(json.dumps({"version": version("nncodec"), "sizes": sizes}))
"""


def nncodec_sizes(tensors: Sequence[np.ndarray], python: str) -> tuple[str, list[int]]:
    """Ask NNCodec for the payload of each tensor. Returns (its version, bytes per tensor)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.npz"
        np.savez(path, *tensors)
        run = subprocess.run([python, "-c", NNCODEC, str(path)], capture_output=True, text=True, check=True)
    answer = json.loads(run.stdout)
    return answer["version"], answer["sizes"]


def rounded(weights: Sequence[np.ndarray], bits_per_weight: float) -> list[np.ndarray]:
    """Round each tensor to a common share of its standard deviation, such that order 0 takes the bits asked for."""
    from autocompress.storage import order0_bits

    numel, low, high = sum(w.size for w in weights), 0.01, 20.0
    codes: list[np.ndarray] = []
    for _ in range(30):
        share = (low * high) ** 0.5
        codes = [np.rint(w / (share * w.std())).astype(np.int32) for w in weights]
        if sum(order0_bits(c) for c in codes) / numel > bits_per_weight:
            low = share
        else:
            high = share
    return codes


def sources(archives: Sequence[str], networks: Sequence[str]) -> Iterator[tuple[str, list[np.ndarray], int | None]]:
    """Yield (name, integer tensors, stored bytes): the networks at every target, then the weight entries of archives,
    which are named by their folders.
    """
    from safetensors.numpy import load_file

    from autocompress.storage import read, step_bytes

    data = os.environ.get("AUTOCOMPRESS_DATA")
    for network in networks:
        path = Path(data or "") / f"{network}.safetensors"
        if data is None or not path.exists():
            sys.stderr.write(f"{network}: AUTOCOMPRESS_DATA has no such file, left out\n")
            continue
        weights = [w.astype(np.float64) for _, w in sorted(load_file(path).items()) if w.ndim > 1]
        for target in TARGETS:
            yield f"{network} rounded at {target}", rounded(weights, target), None
    for archive in archives:
        with read(archive) as opened:
            layers = [e for e in opened.values() if "option" in e.params and e.step != "none"]
            stored = sum(entry.bytes - step_bytes(entry.shape, entry.step) for entry in layers)
            yield " ".join(Path(archive).resolve().parts[-4:-1]), [entry.codes() for entry in layers], stored


def size_row(name: str, tensors: list[np.ndarray], python: str | None) -> dict[str, object]:
    """Measure every codec on the tensors of one network."""
    import zstandard

    from autocompress.storage import CODECS, encode_codes, order0_bits

    zstd = zstandard.ZstdCompressor(level=19)
    order0 = sum(order0_bits(codes) for codes in tensors) / 8
    numel = sum(codes.size for codes in tensors)
    ours = sum(len(encode_codes(codes)) for codes in tensors)
    narrow = [codes.astype(np.int8 if np.abs(codes).max() < 128 else np.int16) for codes in tensors]
    row: dict[str, object] = {
        "source": name, "order0_bpw": round(8 * order0 / numel, 3), "weights": numel,
        "zeros": round(sum(int((codes == 0).sum()) for codes in tensors) / numel, 3),
        "order0_bytes": round(order0), "ours_bytes": ours,
        "zstd19_bytes": sum(len(zstd.compress(codes.tobytes())) for codes in narrow),
        "packed_bytes": sum(CODECS["packed"].size(codes) for codes in tensors),
        "bitmask_bytes": sum(CODECS["bitmask"].size(codes) for codes in tensors),
        "ours_vs_order0_percent": round(100 * (ours / order0 - 1), 2),
    }  # fmt: skip
    if python is not None:
        row["nncodec"], sizes = nncodec_sizes(tensors, python)
        row["nncodec_bytes"] = sum(sizes)
        row["ours_vs_nncodec_percent"] = round(100 * (ours / sum(sizes) - 1), 2)
    return row


def speed_rows() -> Iterator[dict[str, object]]:
    """Time encoding and decoding of large matrices, best of 3, in CPU seconds of this one thread."""
    from autocompress.storage import decode_codes, encode_codes, order0_bits

    rng = np.random.default_rng(0)
    for rows, channels, kernel in SPEEDS:
        shape = (rows, channels) if kernel == 1 else (rows, channels, 3, 3)
        for scale in (0.3, 0.45, 0.7):
            codes = np.rint(rng.laplace(size=shape) * scale).astype(np.int32)
            payload = encode_codes(codes)  # compiles, the first time
            decode_codes(payload, shape)
            encoding, decoding = [], []
            for _ in range(3):
                start = time.thread_time()
                encode_codes(codes)
                middle = time.thread_time()
                decode_codes(payload, shape)
                encoding.append(middle - start)
                decoding.append(time.thread_time() - middle)
            yield {
                "source": f"speed {'x'.join(map(str, shape))}",
                "order0_bpw": round(order0_bits(codes) / codes.size, 3), "weights": codes.size,
                "zeros": round(float((codes == 0).mean()), 3), "order0_bytes": round(order0_bits(codes) / 8),
                "ours_bytes": len(payload), "encode_mweights_per_s": round(codes.size / min(encoding) / 1e6, 1),
                "decode_mweights_per_s": round(codes.size / min(decoding) / 1e6, 1),
            }  # fmt: skip


def machine() -> dict[str, object]:
    """Name the processor, the libraries and the commit that a row was made with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        cpu = f"{lines[0].split(':')[1].strip()} x{len(lines)}" if lines else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {"numba": version("numba"), "numpy": version("numpy"), "cpu": cpu, "commit": commit.stdout.strip()}


def main() -> None:
    """Write the table."""
    import pandas as pd

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", nargs="*", default=[])
    parser.add_argument("--only-archives", action="store_true", help="no rounded networks and no speeds")
    parser.add_argument("--nncodec-python", default=None, help="a Python interpreter that has nncodec")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "bench_codecs.csv")
    options = parser.parse_args()
    networks = () if options.only_archives else NETWORKS
    rows = [
        {**size_row(name, tensors, options.nncodec_python), "stored_bytes": stored}
        for name, tensors, stored in sources(options.archives, networks)
    ]
    rows += () if options.only_archives else speed_rows()
    table = pd.DataFrame([{**row, **machine()} for row in rows]).reindex(columns=list(COLUMNS))
    table = table.convert_dtypes().sort_values(["source", "order0_bpw"], kind="stable")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)
    sys.stdout.write(table.iloc[:, :14].to_string(index=False) + "\n")


if __name__ == "__main__":
    main()
