"""Exports, read back by the runtimes that they are for; and weights that stay packed in memory."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import KINDS, ConvNet, Kinds, batches, convnet, profiled, seeded
from networks import kinds as kinds_of_layers
from tiny_tasks import call, write_task
from torch import nn

import autocompress as ac
from autocompress.exporting import EXPORTERS, CompressedTensors, ExportError, ExportWarning, Onnx, Safetensors
from autocompress.exporting.base import Request, Weight, code_bits, requantised
from autocompress.exporting.compressed_tensors import pack_rows
from autocompress.exporting.graph import nbits_blocks
from autocompress.packed import packed_bytes
from autocompress.types import Option, Plan

ROOT = Path(__file__).resolve().parents[1]
MIXED = ("w4", "rd(0.05,0.1)", "fp16", "rd(0.9,0.3)s60")


def forced(plan: Plan, options: Sequence[str]) -> Plan:
    """A plan with these options in turn, whatever a solver would have chosen."""
    layers = {name: Option.parse(options[i % len(options)]) for i, name in enumerate(plan.layers)}
    return plan.replace(layers=layers, budget_bytes=10**8)


def applied(model: nn.Module, data: list[Any], options: Sequence[str]) -> tuple[nn.Module, Plan]:
    profile = profiled(model, data, options)
    plan = forced(ac.plan(profile, 10**8), options)
    return ac.apply(model, plan, profile, data), plan


@functools.cache
def small_convnet() -> tuple[nn.Module, list[torch.Tensor], nn.Module, Plan]:
    """(model, data, applied model, plan) with a norm whose scale has both signs."""
    model = convnet()
    with torch.no_grad():
        model.get_parameter("bn1.weight")[::2] *= -1
    data = batches(3, 6, 6)
    return model, data, *applied(model, data, MIXED)


class Words(nn.Module):
    """Token numbers and a mask by name; two heads that share a weight; linear layers without and with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32)
        self.norm = nn.LayerNorm(32)
        self.head, self.other = nn.Linear(32, 20, bias=False), nn.Linear(32, 20)
        self.other.weight = self.head.weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(tokens) * mask[..., None]
        x = self.norm(x + self.down(torch.relu(self.up(x)))).sum(1)
        return self.head(x), self.other(x)


def words(size: int = 8, count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"tokens": torch.randint(0, 20, (size, 5), generator=generator), "mask": torch.ones(size, 5)}
        for _ in range(count)
    ]


@functools.cache
def small_words() -> tuple[nn.Module, list[Any], nn.Module, Plan]:
    model, data = seeded(Words), words()
    return model, data, *applied(model, data, ("w4", "rd(0.1,0.1)", "w3"))


def onnx_outputs(path: Path, *inputs: torch.Tensor, exact: bool = True) -> list[np.ndarray]:
    """What onnxruntime makes of them. exact: linear layers in float32, which is not what it does by itself."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, [t.numpy() for t in inputs], strict=True)))


def graph_of(path: Path) -> Any:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra onnx)")
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(str(path)).graph


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in graph_of(path).node]


def close(found: np.ndarray, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)


# ONNX


def test_onnx_runs_for_any_batch_and_gives_what_the_file_gives(tmp_path: Path) -> None:
    model, data, small, plan = small_convnet()
    path = ac.save(small, plan, tmp_path / "model.acz").path
    info = ac.export(path, model, "onnx", tmp_path / "model.onnx", example=data[0][:1])
    loaded: Any = ac.load(path, convnet())
    for size in (1, 3, 12):
        close(onnx_outputs(info.path, data[0][:size])[0], loaded(data[0][:size]))
    assert info.bytes == info.path.stat().st_size
    assert info.facts["max_difference"] < 1e-5
    assert info.by_kind() == {
        "float16": ["conv3"],
        "int4 QDQ": ["conv1", "linear"],
        "int8 QDQ": ["conv2"],
    }
    assert "BatchNormalization" not in kinds(info.path)
    assert not list(tmp_path.glob("*.part"))
    assert graph_of(info.path).input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_onnx_integers_times_scale_are_the_weights_bit_for_bit(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra onnx)")
    _, data, small, _ = small_convnet()
    info = ac.export(small, format=Onnx(fold_norms=False), out=tmp_path / "m.onnx", example=data[0])
    graph = graph_of(info.path)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    wanted = small.state_dict()
    checked = 0
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            codes, scale = stored[node.input[0]].astype(np.float32), stored[node.input[1]]
            found = codes * scale.reshape(-1, *(1,) * (codes.ndim - 1)) if scale.ndim else codes * scale
            assert found.tobytes() == wanted[node.output[0]].numpy().tobytes()
            checked += 1
    assert checked == 3
    assert kinds(info.path).count("BatchNormalization") == 3
    assert stored["conv3.weight.half"].dtype == np.float16
    close(onnx_outputs(info.path, data[0])[0], small(data[0]))


def test_onnx_matmul_nbits_named_inputs_and_tied_weights(tmp_path: Path) -> None:
    _, data, small, _ = small_words()
    format = Onnx(matmul_nbits=True)
    info = ac.export(small, format=format, out=tmp_path / "m.onnx", example=data[0])
    found = onnx_outputs(info.path, data[0]["tokens"][:3], data[0]["mask"][:3], exact=False)
    for got, wanted in zip(found, small(data[0]["tokens"][:3], data[0]["mask"][:3]), strict=True):
        close(got, wanted)
    assert kinds(info.path).count("MatMulNBits") == 4
    assert kinds(info.path).count("DequantizeLinear") == 1
    assert info.by_kind() == {"MatMulNBits 4": ["down", "head"], "MatMulNBits 8": ["up"], "int4 QDQ": ["embed"]}
    # The weight of both heads is there once.
    names = [tensor.name for tensor in graph_of(info.path).initializer]
    assert sum(name.endswith(".packed") for name in names) == 3
    again = ac.export(small, format=format, out=tmp_path / "again.onnx", example=data[0])
    assert again.path.read_bytes() == info.path.read_bytes()


def test_onnx_qdq_of_linear_layers_and_external_data(tmp_path: Path) -> None:
    _, data, small, _ = small_words()
    out = tmp_path / "m.onnx"
    (tmp_path / "m.onnx.01234567.data").write_bytes(b"of an earlier export")
    with pytest.raises(ac.AutocompressError, match=r"would have [\d,]+ bytes, the budget is 3,000; nothing written"):
        ac.export(small, format=Onnx(external=True), out=out, example=data[0], budget=3000)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx.01234567.data"]
    out.mkdir()  # a folder in the place of the file: the tensors' file is written first, and must not stay
    with pytest.raises(ac.AutocompressError, match="cannot write"):
        ac.export(small, format=Onnx(external=True), out=out, example=data[0])
    out.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx.01234567.data"]
    info = ac.export(small, format=Onnx(external=True), out=out, example=data[0], budget=100_000)
    assert sorted(info.files) == sorted(tmp_path.iterdir())
    assert len(info.files) == 2
    assert info.bytes == sum(path.stat().st_size for path in info.files) > out.stat().st_size
    for got, wanted in zip(onnx_outputs(out, *data[0].values()), small(**data[0]), strict=True):
        close(got, wanted)
    assert "Transpose" not in kinds(out)  # integers are stored as MatMul wants them


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("nbits", [False, True], ids=["QDQ", "MatMulNBits"])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_blocked_steps(tmp_path: Path, bits: int, nbits: bool, asymmetric: bool) -> None:
    rng = np.random.default_rng(bits)

    def grouped(key: str, shape: tuple[int, ...], groups: int) -> Weight:
        group = int(np.prod(shape[1:])) // groups
        low = (
            -rng.integers(0, 2**bits, (shape[0], groups))
            if asymmetric
            else np.full((shape[0], groups), -(2 ** (bits - 1)))
        )
        codes = rng.integers(0, 2**bits, (shape[0], groups * group)) + np.repeat(low, group, axis=1)
        step = rng.random((shape[0], groups)).astype(np.float32)
        option = Option(bits=bits, group=group, asymmetric=asymmetric)
        owners = (key.removesuffix(".weight"),)
        return Weight(key, owners, shape, option, codes.astype(np.int32).reshape(shape), step, group=group)

    class Blocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 6, 2), nn.Linear(6 * 8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x).flatten(1))

    model = seeded(Blocked)
    weights = {
        "conv.weight": grouped("conv.weight", (6, 4, 2, 2), 2),
        "linear.weight": grouped("linear.weight", (5, 48), 3),
    }
    for key, weight in weights.items():
        model.get_parameter(key).data = torch.from_numpy(weight.dense())
    exporter = Onnx(matmul_nbits=nbits)
    held = {key: exporter.hold(weight, model.get_submodule(weight.name)) for key, weight in weights.items()}
    floats = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in weights}
    x = torch.randn(3, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    request = Request(model, held, floats, {name: name for name in model.state_dict()}, x)
    out = tmp_path / "m.onnx"
    exporter.write(request, out, lambda size: None)
    np.testing.assert_allclose(onnx_outputs(out, x)[0], model(x).detach().numpy(), rtol=1e-4, atol=1e-3)
    blocks = [a.i for node in graph_of(out).node for a in node.attribute if a.name == "block_size"]
    assert blocks == [8, 16]
    assert ("MatMulNBits" in kinds(out)) is (nbits and not asymmetric)  # that has no zero points here


def test_onnx_refuses_by_name_or_maps_with_a_warning(tmp_path: Path) -> None:
    _, data, small, _ = small_convnet()
    out = tmp_path / "m.onnx"
    with pytest.raises(
        ExportError, match=r"onnx cannot hold conv2 \(rd\(0.05,0.1\)\): its codes need more than 4 bits"
    ):
        ac.export(small, format=Onnx(weights="int4"), out=out, example=data[0])
    assert not list(tmp_path.iterdir())
    with pytest.warns(ExportWarning, match="conv2"):
        info = ac.export(small, format=Onnx(weights="int4"), out=out, example=data[0], lossless_only=False)
    assert ("conv2", "rd(0.05,0.1)", "int4 QDQ") in info.layers
    assert len(info.notes) == 1
    assert float(np.abs(onnx_outputs(out, data[0])[0] - small(data[0]).detach().numpy()).max()) < 0.5


def test_onnx_without_example_or_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data, small, _ = small_convnet()
    with pytest.raises(ExportError, match="needs example="):
        ac.export(small, format="onnx", out=tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="there are onnx, compressed-tensors, safetensors"):
        ac.export(small, format="gguf", out=tmp_path / "m")
    with pytest.raises(ExportError, match="auto, int4, int8, dense"):
        Onnx(weights="int3")
    with pytest.raises(ac.AutocompressError, match="carries no encoded weights"):
        ac.export(convnet(), format="onnx", out=tmp_path / "m", example=data[0])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=re.escape("pip install 'autocompress[onnx]'")):
        ac.export(small, format="onnx", out=tmp_path / "m.onnx", example=data[0])
    assert not list(tmp_path.iterdir())


def test_onnx_of_a_model_in_half_precision(tmp_path: Path) -> None:
    model, data, small, plan = small_convnet()
    path = ac.save(small, plan, tmp_path / "model.acz").path
    half = copy.deepcopy(model).bfloat16()
    info = ac.export(path, half, "onnx", tmp_path / "m.onnx", example=data[0])
    close(onnx_outputs(info.path, data[0])[0], small(data[0]))
    assert half.get_parameter("conv1.weight").dtype == torch.bfloat16


def test_onnx_codes_that_int8_cannot_hold_stay_float32() -> None:
    codes = np.array([[-129, 5], [3, 0]], np.int32)
    weight = Weight("a.weight", ("a",), (2, 2), Option.parse("rd(0.01,0.1)"), codes, np.full((), 0.5, np.float32))
    assert Onnx().hold(weight, nn.Linear(2, 2)).kind == "float32"
    assert Onnx(weights="int8").hold(weight, nn.Linear(2, 2)).loses.startswith("its codes need more than 8 bits")


@pytest.mark.parametrize("columns", [5, 16, 100, 300])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_matmul_nbits_hold_every_code(bits: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns))
    packed, scales, block = nbits_blocks(codes, np.array([1.0, 2.0, 4.0], np.float32), bits)
    assert packed.shape == (3, -(-columns // block), block * bits // 8)
    assert 16 <= block <= 256
    assert block & (block - 1) == 0
    flat = packed.reshape(3, -1)
    low = flat if bits == 8 else np.stack([flat & 15, flat >> 4], -1).reshape(3, -1)
    assert np.array_equal(low[:, :columns].astype(int) - 2 ** (bits - 1), codes)
    assert np.array_equal(scales[:, -1], [1, 2, 4])


def test_bits_and_rounding() -> None:
    assert [code_bits(np.array(c)) for c in ([0], [-1], [1], [-2, 1], [-8, 7], [8], [-9], [127], [-128], [128])] == [
        1, 1, 2, 2, 4, 5, 5, 8, 8, 9,
    ]  # fmt: skip
    codes = np.array([[300, -150], [0, 0]], np.int32)
    weight = Weight("a.weight", ("a",), (2, 2), Option.parse("rd(0.01,0.1)"), codes, np.ones(2, np.float32))
    rounded = requantised(weight, 8)
    assert rounded.codes is not None
    assert np.array_equal(rounded.codes, [[127, -64], [0, 0]])
    np.testing.assert_allclose(rounded.dense(), weight.dense(), atol=300 / 127 / 2)


class Encoder(nn.Module):
    """Tokens through attention, to a head that is tied to their table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(24, 16), nn.Linear(16, 24)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.words(tokens)))


class Recurrent(nn.Module):
    def __init__(self, kind: Any = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.words, self.read = nn.Embedding(24, 16), kind(16, 12, batch_first=True, **options)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.read(self.words(tokens))[0]


def upsampler(groups: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, groups=groups), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
    )


OTHERS: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "attention and a tied table": (
        Encoder,
        lambda: kind_tokens(),
        {
            "words": "int4",
            "encoder.self_attn.in_proj_weight": "int8",
            "encoder.self_attn.out_proj": "int4",
            "encoder.linear1": "int8",
            "encoder.linear2": "int4",
        },
    ),
    "lstm": (
        lambda: Recurrent(bidirectional=True),
        lambda: kind_tokens(),
        {
            "words": "int4",
            "read.weight_ih_l0": "int8",
            "read.weight_hh_l0": "int4",
            "read.weight_ih_l0_reverse": "int8",
            "read.weight_hh_l0_reverse": "int4",
        },
    ),
    "gru": (
        lambda: Recurrent(nn.GRU),
        lambda: kind_tokens(),
        {"words": "int4", "read.weight_ih_l0": "int8", "read.weight_hh_l0": "int4"},
    ),
    "a bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(24, 16), nn.Linear(16, 3)),
        lambda: kind_tokens(),
        {"0": "int4", "1": "int8"},
    ),
    "transposed, a step per row": (upsampler, lambda: batches(4, 5, 5), {"0": "float32", "2": "int8"}),
}


def kind_tokens() -> list[torch.Tensor]:
    return kinds_of_layers()[1]


@pytest.mark.parametrize(("case", "matmul_nbits"), [*((case, False) for case in OTHERS), (next(iter(OTHERS)), True)])
def test_onnx_holds_other_kinds_of_layers(case: str, matmul_nbits: bool, tmp_path: Path) -> None:
    build, data, expected = OTHERS[case]
    model, inputs = seeded(build), data()
    small, _ = applied(model, inputs, ("w4", "rd(0.1,0.1)"))
    info = ac.export(small, None, Onnx(matmul_nbits=matmul_nbits), tmp_path / "m.onnx", example=inputs[0])
    (found,) = onnx_outputs(info.path, inputs[0][:3])[:1]
    close(found, small(inputs[0][:3]))
    if not matmul_nbits:
        assert len(expected) == len(info.layers)
        # A table that is a head too has the name of the one that comes first in the alphabet.
        got = {("words" if name == "head" else name): kind.removesuffix(" QDQ") for name, _, kind in info.layers}
        assert got == expected


def test_onnx_holds_a_transposed_convolutions_codes_with_one_step(tmp_path: Path) -> None:
    model, inputs = seeded(upsampler), batches(4, 5, 5)
    small, _ = applied(model, inputs, ("rd(0.5,0.3)",))
    info = ac.export(small, None, "onnx", tmp_path / "m.onnx", example=inputs[0])
    assert info.by_kind() == {"int4 QDQ": ["0", "2"]}
    close(onnx_outputs(info.path, inputs[0][:3])[0], small(inputs[0][:3]))


class Bags(nn.Module):
    """A bag for every two tokens, which torch exports as a loop over sequences of unknown shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(24, 16), nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(tokens.reshape(-1, 2)).reshape(len(tokens), -1, 16))


def test_a_graph_of_torch_that_is_not_valid_is_an_error_of_ours(tmp_path: Path) -> None:
    small, _ = applied(seeded(Bags), kind_tokens(), ("w8",))
    with pytest.raises(ExportError, match=r"what torch.onnx.export makes of Bags is no valid graph: .*Loop"):
        ac.export(small, None, "onnx", tmp_path / "m.onnx", example=kind_tokens()[0])
    assert not list(tmp_path.iterdir())


def test_onnx_refuses_a_projected_lstm_by_name(tmp_path: Path) -> None:
    model, data = kinds_of_layers()
    small, _ = applied(model, data, ("w8",))
    with pytest.raises(ExportError, match=r"LSTM of onnx has no projection, and 'lstm' has proj_size=8"):
        ac.export(small, None, "onnx", tmp_path / "m.onnx", example=data[0])
    assert not list(tmp_path.iterdir())


def test_safetensors_has_every_kind_of_layer(tmp_path: Path) -> None:
    model, data = kinds_of_layers()
    small, plan = applied(model, data, ("w8", "rd(0.5,0.3)"))
    path = ac.save(small, plan, tmp_path / "model.acz").path
    info = ac.export(path, model, "safetensors", tmp_path / "m.safetensors")
    assert [name for name, _, _ in info.layers][1:] == list(plan.layers)[1:]
    from safetensors.torch import load_file

    fresh = seeded(Kinds, seed=1)
    assert fresh.load_state_dict(load_file(info.path), strict=False).missing_keys == ["head.weight"]
    assert torch.equal(fresh(data[0]), small(data[0]))


# compressed-tensors


def llama(tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=36,  # rows of 36 codes of 3 or 5 bits end within a word
        intermediate_size=52,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def tokens() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 40, (6, 10), generator=generator)} for _ in range(4)]


HF_OPTIONS = ("w3", "rd(0.5,0.3)", "s50w5", "fp16", "dense", "w8", "rd(0.05,0.1)")


@pytest.mark.parametrize(
    ("build", "auto"),
    [
        (llama, "AutoModelForCausalLM"),
        (lambda: llama(tied=True), "AutoModelForCausalLM"),
        (bert, "AutoModelForSequenceClassification"),
    ],
    ids=["llama", "tied llama", "bert"],
)
def test_transformers_loads_compressed_tensors(tmp_path: Path, build: Any, auto: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra hf)")
    model, data = seeded(build), tokens()
    small, plan = applied(model, data, HF_OPTIONS)
    path = ac.save(small, plan, tmp_path / "model.acz").path
    info = ac.export(path, model, "compressed-tensors", tmp_path / "hf", budget="1x")
    assert info.bytes == sum(file.stat().st_size for file in (tmp_path / "hf").iterdir())

    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(targets) == len(set(targets))
    assert set(targets) | set(config["ignore"]) == names
    assert not set(targets) & set(config["ignore"])

    back = getattr(transformers, auto).from_pretrained(tmp_path / "hf")
    packed = {name for name in back.state_dict() if name.endswith("weight_packed")}
    assert packed == {f"{target}.weight_packed" for target in targets}
    with torch.no_grad():  # the library decompresses at the first forward
        found = back(**data[0]).logits
    wanted: Any = ac.load(path, copy.deepcopy(model))
    state = back.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(state[name], tensor), name
    close(found.numpy(), wanted(**data[0]).logits)

    # One width and one kind of step: what dequantize=True needs, which takes all layers for the first group's.
    one = ac.export(path, model, CompressedTensors(bits=8), tmp_path / "one")
    assert list(one.facts["groups"].values()) == ["8 bits per channel"]
    dense = getattr(transformers, auto).from_pretrained(
        tmp_path / "one", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor), name

    again = ac.export(path, model, "compressed-tensors", tmp_path / "hf")  # in the place of the first
    assert again.bytes == info.bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "model.acz", "one"]


def test_transformers_loads_groups_and_grids_that_are_not_symmetric(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra hf)")
    model, data = seeded(llama), tokens()
    small, plan = applied(model, data, ("w4a", "w3g4a", "w4tam", "w4g4", "s50w2a", "s75", "fp8", "w1"))
    path = ac.save(small, plan, tmp_path / "model.acz").path
    ac.export(path, model, "compressed-tensors", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    kinds = {(g["weights"]["num_bits"], g["weights"]["strategy"], g["weights"]["symmetric"])
             for g in config["config_groups"].values()}  # fmt: skip
    assert all(symmetric for _, _, symmetric in kinds)
    assert {strategy for _, strategy, _ in kinds} == {"channel", "group", "tensor"}
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        back(**data[0])
    wanted: Any = ac.load(path, copy.deepcopy(model))
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    small, _ = applied(model, data, ("w8a",))
    with pytest.raises(ExportError, match=r"\(w8a\).*: its codes need more than 8 bits"):
        ac.export(small, format="compressed-tensors", out=tmp_path / "no")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 45])
def test_packing_is_the_librarys(bits: int, columns: int) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra hf)")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns))
    wanted = pack_to_int32(torch.from_numpy(codes.astype(np.int8)), bits)
    assert np.array_equal(pack_rows(codes, bits), wanted.numpy())


def test_compressed_tensors_refuses_what_only_a_module_of_torch_reads(tmp_path: Path) -> None:
    model, data = kinds_of_layers()
    model.config = type("Config", (), {"to_dict": lambda self: {}})()
    small, _ = applied(model, data, ("w8",))
    with pytest.raises(ExportError, match="cannot hold") as caught:
        ac.export(small, format="compressed-tensors", out=tmp_path / "hf")
    held = ("words", "topic", "encoder.linear1", "encoder.linear2", "spare", "head")
    refused = [name for name in KINDS if name not in held]
    assert set(re.findall(r"([\w.]+) \(w8\)", str(caught.value))) == set(refused)
    assert not list(tmp_path.iterdir())


def test_compressed_tensors_refuses_before_it_writes(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    _, _, small, _ = small_words()
    with pytest.raises(ExportError, match=r"needs a Hugging Face model.*Words has none"):
        ac.export(small, format="compressed-tensors", out=tmp_path / "hf")
    wide, _ = applied(seeded(bert), tokens(), ("w4", "rd(0.01,0.0001)"))
    name = "bert.encoder.layer.0.attention.self.query"
    with pytest.raises(ExportError, match=rf"{re.escape(name)} \(rd\(0.01,0.0001\)\).*need more than 8 bits"):
        ac.export(wide, format="compressed-tensors", out=tmp_path / "hf")
    assert not list(tmp_path.iterdir())
    with pytest.warns(ExportWarning, match=re.escape(name)):
        info = ac.export(wide, format="compressed-tensors", out=tmp_path / "hf", lossless_only=False)
    assert name in info.by_kind()["float32"]
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match=r"holds 'thesis.tex'"):
        ac.export(wide, format="compressed-tensors", out=strange, lossless_only=False)
    assert [path.name for path in strange.iterdir()] == ["thesis.tex"]


def test_a_full_disk_leaves_the_folder_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = applied(seeded(bert), tokens(), ("w4",))
    out = tmp_path / "hf"
    before = {file: file.read_bytes() for file in ac.export(small, format="compressed-tensors", out=out).files}

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ac.AutocompressError, match="No space left on device"):
        ac.export(small, format=CompressedTensors(bits=8), out=out)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_compressed_tensors_holds_no_convolution() -> None:
    weight = Weight("a.weight", ("a",), (1, 1, 1, 1), Option(bits=4), np.ones((1, 1, 1, 1), np.int32))
    assert "linear layers only" in CompressedTensors().hold(weight, nn.Conv2d(1, 1, 1)).loses
    assert CompressedTensors(bits=4).hold(weight, nn.Linear(1, 1)).bits == 4


# safetensors


def test_safetensors_is_the_state_dict(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, _, small, plan = small_convnet()
    path = ac.save(small, plan, tmp_path / "model.acz").path
    info = ac.export(path, model, "safetensors", tmp_path / "dense.safetensors")
    fresh = ConvNet().eval()
    fresh.load_state_dict(load_file(info.path), strict=True)
    for name, tensor in small.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    alone = ac.export(path, None, "safetensors", tmp_path / "alone.safetensors")
    tensors: Any = ac.load(path)
    found = load_file(alone.path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].to(found[name].dtype)) for name in found)
    half = ac.export(path, model, Safetensors(half=True), tmp_path / "half.safetensors")
    assert half.bytes < info.bytes
    assert load_file(half.path)["conv3.weight"].dtype == torch.float16
    with pytest.raises(ac.AutocompressError, match="the budget is 100"):
        ac.export(path, None, "safetensors", tmp_path / "none.safetensors", budget=100)
    assert not (tmp_path / "none.safetensors").exists()


def test_nothing_here_pickles() -> None:
    package = ROOT / "autocompress"
    for path in [package / "saving.py", package / "packed.py", *(package / "exporting").glob("*.py")]:
        assert not re.search(r"torch\.save\(|\bpickle\b\.|import pickle", path.read_text()), path


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    _, _, small, plan = small_convnet()
    path = ac.save(small, plan, tmp_path / "model.acz").path
    with pytest.raises(ac.AutocompressError, match="belongs to another architecture than Words"):
        ac.export(path, Words(), "safetensors", tmp_path / "out")
    with pytest.raises(ExportError, match="onnx needs the model"):
        ac.export(path, None, "onnx", tmp_path / "out")
    with pytest.raises(ac.AutocompressError, match="does not exist"):
        ac.export(tmp_path / "nothing", None, "safetensors", tmp_path / "out")


# the command line


def test_export_on_the_command_line(tmp_path: Path) -> None:
    task = write_task(tmp_path, evaluate="def example_input():\n    return torch.ones(1, 1, 6, 6)\n")
    run = tmp_path / "run"
    assert call("compress", task, "--budget", "2x", "--out", run, "--effort", "fast", "--workers", 1).code == 0
    out = tmp_path / "m.onnx"
    done = call("export", run, "--format", "onnx", "--out", out, "--task", task, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["bytes"] == out.stat().st_size
    assert facts["max_difference"] < 1e-5
    assert call("export", run, "--format", "safetensors", "--out", tmp_path / "d.safetensors").code == 0
    refused = call("export", run, "--format", "compressed-tensors", "--out", tmp_path / "hf", "--task", task)
    assert "needs a Hugging Face model" in refused.refused(2)
    assert "gguf" in call("export", run, "--format", "gguf", "--out", tmp_path / "hf").refused(2)
    line = ("export", run, "--out", tmp_path / "m4.onnx", "--task", task)
    assert "nothing written" in call(*line, "--budget", "10").refused(2)
    mapped = call(*line, "--weights", "int4", "--no-lossless-only")
    assert mapped.code == 0, mapped.err
    refused = call(*line, "--weights", "int4")
    if "warning: onnx cannot hold" in mapped.err:
        assert "--no-lossless-only" in refused.refused(2)


# packed


@pytest.mark.parametrize("how", [True, "bits"])
@pytest.mark.parametrize("made", [small_convnet, small_words], ids=["convolutions", "tied"])
def test_packed_weights_give_the_same_bits(tmp_path: Path, made: Any, how: Any) -> None:
    model, data, small, plan = made()
    path = ac.save(small, plan, tmp_path / "model.acz").path
    dense, packed = ac.load(path, copy.deepcopy(model)), ac.load(path, copy.deepcopy(model), packed=how)

    def run(network: Any) -> Any:
        with torch.no_grad():
            return network(**data[0]) if isinstance(data[0], dict) else network(data[0])

    for _ in range(2):
        for a, b in zip(
            torch.utils._pytree.tree_leaves(run(dense)), torch.utils._pytree.tree_leaves(run(packed)), strict=True
        ):
            assert torch.equal(a, b)
    again = copy.deepcopy(packed)
    assert torch.equal(torch.utils._pytree.tree_leaves(run(again))[0], torch.utils._pytree.tree_leaves(run(dense))[0])
    for name in plan.layers:
        one: Any = packed.get_submodule(name)
        assert torch.equal(one.weight, dense.get_parameter(f"{name}.weight"))
    assert packed_bytes(packed) < packed_bytes(dense)
    assert not any(p.requires_grad and p.dtype == torch.uint8 for p in packed.parameters())


def test_packed_weights_that_are_shared_are_there_once(tmp_path: Path) -> None:
    model, _, small, plan = small_words()
    packed: Any = ac.load(ac.save(small, plan, tmp_path / "m.acz").path, copy.deepcopy(model), packed=True)
    head, other = (m.parametrizations.weight.original for m in (packed.head, packed.other))
    assert head.data_ptr() == other.data_ptr()
    assert head.dtype == torch.uint8


def test_packed_checks_before_it_touches(tmp_path: Path) -> None:
    _, _, small, plan = small_convnet()
    path = ac.save(small, plan, tmp_path / "m.acz").path
    with pytest.raises(ac.AutocompressError, match="packed=True needs the model"):
        ac.load(path, None, packed=True)  # type: ignore[call-overload]
    with pytest.raises(ac.AutocompressError, match="packed is 'yes'; it is False, True or 'bits'"):
        ac.load(path, convnet(), packed="yes")  # type: ignore[call-overload]
    other = seeded(Words)
    with pytest.raises(ac.AutocompressError, match="belongs to another architecture"):
        ac.load(path, other, packed=True)
    assert not hasattr(other.get_submodule("up"), "parametrizations")
    raw = bytearray(path.read_bytes())
    raw[-30] ^= 1
    path.write_bytes(raw)
    fresh = convnet()
    with pytest.raises(ac.FormatError, match="checksum"):
        ac.load(path, fresh, packed=True)
    assert not hasattr(fresh.get_submodule("conv1"), "parametrizations")


def test_every_exporter_has_its_name() -> None:
    assert all(exporter.name == name for name, exporter in EXPORTERS.items())


PATTERNS = (
    ("s75", "2:4fp16", "blk2x4@50", "out25"),
    ("ch50fp16", "blk4@50w4g8", "1:4w3a", "w4g5"),
    ("fp8", "w1", "s50fp8", "w1g3"),
    ("w8a", "w4tam", "w3g7am", "w4a"),
    ("rd(0.5,0.3)2:4", "rd(0.5,0.3)ch25", "w2g3m", "w8a"),
    ("mix25/25/25/25/0", "mix12.5/0/25/0/62.5", "mix0/0/100/0/0", "mix50/50/0/0/0"),
    ("kq8w6", "kq4@1w4", "pq2x8w5", "pq4x4pw3"),
)


@functools.cache
def patterned(options: tuple[str, ...]) -> tuple[nn.Module, list[torch.Tensor], nn.Module, Plan]:
    model, data = convnet(), batches(3, 6, 6)
    with torch.no_grad():
        model.get_parameter("bn1.weight")[::2] *= -1
    return model, data, *applied(model, data, options)


@pytest.mark.parametrize("options", PATTERNS, ids=" ".join)
def test_every_pattern_goes_through_file_memory_and_runtime(tmp_path: Path, options: tuple[str, ...]) -> None:
    model, data, small, plan = patterned(options)
    path = ac.save(small, plan, tmp_path / "model.acz").path
    profile = profiled(model, data, options)
    assert path.stat().st_size == profile.template.file_bytes(
        {name: profile.layers[name].row(option) for name, option in plan.layers.items()}
    )
    for packed in (False, True, "bits"):
        loaded: Any = ac.load(path, copy.deepcopy(model), packed=packed)
        assert torch.equal(loaded(data[0]), small(data[0])), packed
    for name, layer in profile.layers.items():
        before, after = (m.get_parameter(layer.layer.key).detach().double().numpy() for m in (model, small))
        delta = after - before
        hessian = profile.statistics.layers[name].hessian
        delta = delta.reshape(hessian.shape[0], -1, hessian.shape[1])
        error = 0.5 * np.einsum("grd,gde,gre->", delta, hessian, delta)
        assert layer.row(plan.layers[name]).error == pytest.approx(error, rel=1e-4, abs=1e-7 * layer.energy)
    info = ac.export(path, copy.deepcopy(model), "onnx", tmp_path / "m.onnx", example=data[0][:1])
    close(onnx_outputs(info.path, data[0])[0], small(data[0]))
    held = {option: kind for _, option, kind in info.layers}
    for option, kind in {"w8a": "int8", "w4tam": "int4", "w3g7am": "int4", "w4a": "int4", "w4g5": "int4"}.items():
        assert held.get(option, kind).startswith(kind)
    assert held.get("s75", "float32") == "float32"
    assert held.get("2:4fp16", "float16") == "float16"
