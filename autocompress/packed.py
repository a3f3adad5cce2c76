"""Weights that stay compressed in memory: a layer decodes its own whenever it runs, and lets it go."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from autocompress.layers import swap
from autocompress.storage import Entry, weight_entry, with_fixed_fields

__all__ = ["Decode", "fixed_width", "pack", "packable", "packed_bytes", "payload_key"]

META = torch.device("meta")


class Decode(nn.Module):
    """A parametrisation: the payload of a file's entry in (uint8, on any device), the weight it stands for out.

    The weight is float32(code) * step, as `ac.load` without packed gives it, in the dtype that the layer had.
    """

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.shape, self.codec, self.step = entry.name, entry.shape, entry.codec, entry.step
        self.stored_dtype, self.dtype = entry.dtype, dtype
        self.swapped = int(entry.params.get("swapped", 0))  # type: ignore[arg-type]

    def forward(self, payload: torch.Tensor) -> torch.Tensor:
        raw = payload.detach().cpu().numpy().tobytes()
        entry = Entry(self.name, self.shape, self.stored_dtype, self.codec, raw, self.step)
        # The product of `Entry.dequantise`, without its checks: the payload was checked when it was loaded.
        values = torch.from_numpy(np.ascontiguousarray(entry.codes())).reshape(self.shape)
        if self.step != "none":
            steps = torch.from_numpy(np.array(entry.steps()))
            if entry.group is not None:
                columns = values[0].numel()
                steps = steps.repeat_interleave(entry.group, 1)[:, :columns].reshape(self.shape)
            elif steps.ndim:
                steps = steps.reshape(-1, *(1,) * (len(self.shape) - 1))
            values = values.to(torch.float32).mul_(steps)
        if self.swapped:
            values = torch.from_numpy(np.ascontiguousarray(swap(values.numpy(), self.swapped)))
        return values.to(payload.device, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.codec}, {tuple(self.shape)}"


def packable(entry: Entry, model: nn.Module) -> bool:
    """Whether an entry is a layer's weight that is shorter in the file than dense (or not in memory), and whose module
    would look for it in a parametrisation: RNN, LSTM and GRU hold their weights in a second list, and compute with
    those.
    """
    if "option" not in entry.params or isinstance(model.get_submodule(entry.name.rpartition(".")[0]), nn.RNNBase):
        return False
    return entry.bytes < 4 * entry.numel or model.get_parameter(entry.name).is_meta


def fixed_width(entry: Entry) -> Entry:
    """The same weight with its codes, or the words and indices of its codebook, in as many bits as the widest needs:
    longer, and ten times as fast to decode.
    """
    if entry.step == "none" or entry.codec in ("packed", "fp8"):
        return entry
    if entry.codec == "codebook":
        return with_fixed_fields(entry)
    recoded = weight_entry(
        entry.name, entry.codes(), entry.steps(), codec="packed", group=entry.group, params=entry.params
    )
    return recoded if recoded.bytes < 4 * recoded.numel else entry


def pack(model: nn.Module, weights: Mapping[str, Entry]) -> nn.Module:
    """Replace weights, by their names in the state dict, with their payloads; modules that share one share the payload.

    Such a weight cannot be trained or assigned; reading `layer.weight` decodes it anew. In a state dict it is
    `parametrizations.weight.original`, a uint8 vector.
    """
    owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in weights}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known in owners:
            place, _, field = name.rpartition(".")
            owners[known].append((model.get_submodule(place), field))
    for name, entry in weights.items():
        with warnings.catch_warnings():
            # That bytes cannot be written: nothing writes into a payload, and a copy would be as large as the file.
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.frombuffer(entry.payload, dtype=torch.uint8)
        payload = nn.Parameter(raw, requires_grad=False)
        for module, field in owners[name]:
            if parametrize.is_parametrized(module, field):  # the same module under two names
                continue
            dense = module._parameters[field]
            assert dense is not None
            decode = Decode(entry, dense.dtype)
            module._parameters[field] = (
                payload if dense.device in (payload.device, META) else nn.Parameter(raw.to(dense.device), False)
            )
            # unsafe: the weight has another dtype and shape than what it is made from.
            parametrize.register_parametrization(module, field, decode, unsafe=True)
    return model


def payload_key(name: str) -> str:
    """What the state dict of a packed model calls the payload of a weight."""
    owner, _, field = name.rpartition(".")
    return f"{owner}.parametrizations.{field}.original" if owner else f"parametrizations.{field}.original"


def packed_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters and buffers take in memory, shared ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(t.numel() * t.element_size() for t in tensors.values())
