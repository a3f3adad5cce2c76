"""Rewriting a traced ONNX graph: batch norms folded, weights replaced by integers, what nothing uses removed."""

from __future__ import annotations

from typing import Any

import numpy as np

from autocompress.exporting.base import Held, Request, Weight, with_zero_points

__all__ = ["Graph", "nbits_blocks"]

SHORT = 256  # values below which a Cast node has more bytes than half precision saves


class Graph:
    """A traced program on its way to a file. Steps in order: fold_norms (or not), lower, finished."""

    def __init__(self, program: Any, request: Request, accuracy_level: int = 0) -> None:
        from onnxscript import ir, optimizer

        # Shapes of weights are constants; nothing that reads a stored tensor's values may be computed here.
        stored = set(request.aliases)

        def foldable(node: Any) -> bool | None:
            reads = any(value is not None and value.name in stored for value in node.inputs)
            return False if reads and node.op_type != "Shape" else None

        optimizer.fold_constants_ir(program.model, should_fold=foldable, onnx_shape_inference=True)
        optimizer.remove_unused_nodes(program.model)
        self.proto = ir.to_proto(program.model)
        self.request, self.accuracy_level = request, accuracy_level
        self.initializers = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self.factors: dict[str, np.ndarray] = {}
        self.biases: dict[str, np.ndarray] = {}
        self._index()

    def _index(self) -> None:
        self.producers = {name: node for node in self.proto.graph.node for name in node.output}
        self.users: dict[str, list[Any]] = {}
        for node in self.proto.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.results = {value.name for value in self.proto.graph.output}

    def value(self, name: str) -> np.ndarray:
        """An initializer's values, as the file has them where it is in the file."""
        from onnx import numpy_helper

        key = self.request.aliases.get(name, name)
        if key in self.request.floats:
            return self.request.floats[key].astype(np.float32)
        if key in self.request.held:
            return self.request.held[key].weight.dense()
        return numpy_helper.to_array(self.initializers[name])

    def fold_norms(self) -> None:
        """Fold each batch norm that alone follows a Conv or Gemm: weight' = g weight, bias' = g bias + b per row,
        g = γ/√(var+ε), b = β - g mean.
        """
        for norm in [n for n in self.proto.graph.node if n.op_type == "BatchNormalization"]:
            layer = self.producers.get(norm.input[0])
            if layer is None or layer.op_type not in ("Conv", "Gemm") or not self._alone(norm.input[0]):
                continue
            if layer.input[1] not in self.initializers or len(self.users[layer.input[1]]) != 1:
                continue
            bias = layer.input[2] if len(layer.input) > 2 else ""
            if bias and bias not in self.initializers and not self._constant(bias):
                continue
            if layer.op_type == "Gemm" and not _plain_gemm(layer):
                continue
            epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
            gamma, beta, mean, var = (self.value(name).astype(np.float64) for name in norm.input[1:5])
            factor = gamma / np.sqrt(var + np.float64(np.float32(epsilon)))
            old = self._known(bias).astype(np.float64) if bias else 0.0
            key = f"{layer.input[1]}.folded_bias"
            self.factors[layer.input[1]] = factor
            self.biases[key] = (factor * (old - mean) + beta).astype(np.float32)
            del layer.input[2:]
            layer.input.append(key)
            layer.output[0] = norm.output[0]
            self.proto.graph.node.remove(norm)
            self._index()

    def _alone(self, name: str) -> bool:
        return len(self.users.get(name, ())) == 1 and name not in self.results

    def _constant(self, name: str) -> bool:
        node = self.producers.get(name)
        return node is not None and node.op_type == "Constant"

    def _known(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        if name in self.initializers:
            return self.value(name)
        return numpy_helper.to_array(next(a.t for a in self.producers[name].attribute if a.name == "value"))

    def lower(self) -> None:
        """Replace every initializer by what the file has: integers behind DequantizeLinear, MatMulNBits, floats."""
        self.front: list[Any] = []
        self.stored: list[Any] = []
        for name in sorted(self.initializers):
            held = self.request.held.get(self.request.aliases.get(name, name))
            if held is None:
                self._store_float(name, self.value(name), half=self._is_half(name))
            else:
                self._lower_weight(name, held)
        for name, values in sorted(self.biases.items()):
            self._store_float(name, values)

    def _is_half(self, name: str) -> bool:
        values = self.request.floats.get(self.request.aliases.get(name, name))
        return values is not None and values.dtype == np.float16 and values.size >= SHORT

    def _tensor(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def _integers(self, name: str, codes: np.ndarray, bits: int) -> str:
        from onnx import TensorProto, helper

        if bits == 8:
            return self._tensor(name, codes.astype(np.int8))
        low = (codes.reshape(-1) & 15).astype(np.uint8)
        low = np.append(low, np.zeros(low.size % 2, np.uint8))
        packed = (low[0::2] | low[1::2] << 4).tobytes()  # low bits first
        self.stored.append(helper.make_tensor(name, TensorProto.INT4, codes.shape, packed, raw=True))
        return name

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.front.append(helper.make_node(kind, inputs, [output], name=f"{output}.{kind}", **attributes))
        return output

    def _store_float(self, name: str, values: np.ndarray, half: bool = False) -> None:
        from onnx import TensorProto

        if half:
            self._add("Cast", [self._tensor(f"{name}.half", values.astype(np.float16))], name, to=TensorProto.FLOAT)
        else:
            self._tensor(name, values)

    def _lower_weight(self, name: str, held: Held) -> None:
        weight, factor = held.weight, self.factors.get(name)
        if held.kind.startswith("float"):
            self._lower_float(name, held, factor)
            return
        codes, step = _scaled(weight, factor, held.bits)
        rest = []
        for node in list(self.users.get(name, ())):
            if held.kind.startswith("MatMulNBits") and self._to_nbits(node, name, codes, step, held):
                continue
            if node.op_type == "Transpose" and codes.ndim == 2 and _swaps(node):
                self._dequantised(node.output[0], codes.T, step, held, axis=1)
                self.proto.graph.node.remove(node)
                continue
            rest.append(node)
        if rest:
            self._dequantised(name, codes, step, held, axis=0)

    def _lower_float(self, name: str, held: Held, factor: np.ndarray | None) -> None:
        from onnx import TensorProto

        dense = held.weight.dense()
        wide = None if factor is None else factor.reshape(-1, *(1,) * (dense.ndim - 1))
        if held.bits == 32:
            self._tensor(name, dense if wide is None else (dense.astype(np.float64) * wide).astype(np.float32))
            return
        # A runtime computes these once, when it loads the graph.
        assert held.weight.values is not None
        half = self._tensor(f"{name}.half", held.weight.values)
        if wide is None:
            self._add("Cast", [half], name, to=TensorProto.FLOAT)
        else:
            cast = self._add("Cast", [half], f"{name}.cast", to=TensorProto.FLOAT)
            self._add("Mul", [cast, self._tensor(f"{name}.factor", wide.astype(np.float32))], name)

    def _dequantised(self, output: str, codes: np.ndarray, step: np.ndarray, held: Held, axis: int) -> None:
        """codes -> DequantizeLinear -> output. `axis` is that of the rows; groups run over the other one."""
        rows = codes if axis == 0 else codes.T
        zero: list[np.ndarray] = []
        if held.shifted:
            rows, points = with_zero_points(rows, step, held.weight.group, held.bits)
            zero.append(points)
            codes = rows if axis == 0 else rows.T
        if step.ndim < 2:
            parts = [self._integers(f"{output}.codes", codes, held.bits), self._tensor(f"{output}.scale", step)]
            parts += [self._integers(f"{output}.zero", z, held.bits) for z in zero]
            attributes = {"axis": axis} if step.ndim else {}
            self._add("DequantizeLinear", parts, output, **attributes)
            return
        flat = codes if codes.ndim == 2 else codes.reshape(codes.shape[0], -1)
        parts = [self._integers(f"{output}.codes", flat, held.bits)]
        parts.append(self._tensor(f"{output}.scale", step if axis == 0 else step.T))
        parts += [self._integers(f"{output}.zero", z if axis == 0 else z.T, held.bits) for z in zero]
        place = output if codes.ndim == 2 else f"{output}.rows"
        self._add("DequantizeLinear", parts, place, axis=1 - axis, block_size=held.weight.group)
        if codes.ndim != 2:
            shape = self._tensor(f"{output}.shape", np.array(codes.shape, np.int64))
            self._add("Reshape", [place, shape], output)

    def _to_nbits(self, node: Any, name: str, codes: np.ndarray, step: np.ndarray, held: Held) -> bool:
        """Replace x Wᵀ by MatMulNBits, for each MatMul of the transposed weight, or the Gemm. False for other uses."""
        if node.op_type == "Gemm" and _plain_gemm(node) and node.input[1] == name:
            self._nbits(node, node.input[0], node.input[2] if len(node.input) > 2 else "", name, codes, step, held)
            return True
        if node.op_type != "Transpose" or not _swaps(node):
            return False
        users = list(self.users.get(node.output[0], ()))
        if not all(u.op_type == "MatMul" and u.input[1] == node.output[0] for u in users):
            return False
        for user in users:
            self._nbits(user, user.input[0], "", name, codes, step, held)
        self.proto.graph.node.remove(node)
        return True

    def _nbits(
        self, node: Any, given: str, bias: str, name: str, codes: np.ndarray, step: np.ndarray, held: Held
    ) -> None:
        from onnx import helper

        packed, scales, block = nbits_blocks(codes, step, held.bits, held.weight.group)
        if f"{name}.packed" not in {tensor.name for tensor in self.stored}:
            self._tensor(f"{name}.packed", packed)
            self._tensor(f"{name}.scales", scales)
        rows, columns = codes.shape
        place = list(self.proto.graph.node).index(node)
        output = node.output[0] if not bias else f"{node.output[0]}.product"
        made = [
            helper.make_node(
                "MatMulNBits",
                [given, f"{name}.packed", f"{name}.scales"],
                [output],
                name=f"{output}.MatMulNBits",
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=held.bits,
                block_size=block,
                accuracy_level=self.accuracy_level,
            )
        ]
        if bias:
            made.append(helper.make_node("Add", [output, bias], [node.output[0]], name=f"{node.output[0]}.Add"))
        self.proto.graph.node.remove(node)
        for i, each in enumerate(made):
            self.proto.graph.node.insert(place + i, each)

    def finished(self) -> Any:
        """The model: new initializers in place, nothing in it that no output needs, no traces of where it was made."""
        proto = self.proto
        nodes = [*self.front, *proto.graph.node]
        needed, kept = {value.name for value in proto.graph.output}, []
        for node in reversed(nodes):
            if any(name in needed for name in node.output):
                kept.append(node)
                needed |= set(node.input) | _outer_names(node)
        del proto.graph.node[:], proto.graph.initializer[:], proto.graph.value_info[:], proto.metadata_props[:]
        for node in reversed(kept):
            del node.metadata_props[:]
            node.ClearField("doc_string")
        proto.graph.node.extend(reversed(kept))
        proto.graph.initializer.extend(tensor for tensor in self.stored if tensor.name in needed)
        del proto.graph.metadata_props[:]
        for value in (*proto.graph.input, *proto.graph.output):
            del value.metadata_props[:]
        if any(node.domain == "com.microsoft" for node in kept):
            proto.opset_import.add(domain="com.microsoft", version=1)
        proto.producer_name, proto.producer_version = "autocompress", ""
        return proto


def nbits_blocks(
    codes: np.ndarray, step: np.ndarray, bits: int, group: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """A weight as MatMulNBits wants it: B uint8 (N, blocks, block*bits/8) low bits first, scales (N, blocks), block.

    Codes are stored plus 2^(bits-1), the zero point that is meant where none is given. A step per row or tensor is
    repeated for each block; then the block is the least power of two from 16 that covers a row, at most 256.
    """
    rows, columns = codes.shape
    block = group or min(max(16, 1 << (columns - 1).bit_length()), 256)
    count = -(-columns // block)
    raw = np.full((rows, count * block), 2 ** (bits - 1), np.uint8)
    raw[:, :columns] = codes + 2 ** (bits - 1)
    if bits == 4:
        raw = raw[:, 0::2] | raw[:, 1::2] << 4
    scales = step if step.ndim == 2 else np.broadcast_to(step.reshape(-1, 1), (rows, count))
    return raw.reshape(rows, count, -1), np.ascontiguousarray(scales, np.float32), block


def _scaled(weight: Weight, factor: np.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and step with a factor per row folded in; its sign goes to the codes where they stay within the bits."""
    assert weight.codes is not None
    if factor is None:
        return weight.codes, weight.step
    step = weight.step.astype(np.float64)
    step = step * (factor[:, None] if step.ndim == 2 else factor)
    codes = weight.codes.copy()
    rows = codes.reshape(codes.shape[0], -1)
    turned = (factor < 0) & (-rows.min(axis=1) < 2 ** (bits - 1))
    rows[turned] *= -1
    step[turned] *= -1
    return codes, step.astype(np.float32)


def _swaps(node: Any) -> bool:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0]) == [1, 0]


def _plain_gemm(node: Any) -> bool:
    """Whether a Gemm is x Wᵀ + b, as nn.Linear makes it."""
    found = {a.name: a.i if a.name.startswith("trans") else a.f for a in node.attribute}
    return (
        found.get("transB", 0) == 1
        and found.get("transA", 0) == 0
        and found.get("alpha", 1.0) == 1.0
        and found.get("beta", 1.0) == 1.0
    )


def _outer_names(node: Any) -> set[str]:
    """Names that subgraphs of a node may take from around it."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names |= set(inner.input) | _outer_names(inner)
    return names
