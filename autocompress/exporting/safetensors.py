"""safetensors: every tensor dense, in the dtype it has in the model. Any tool reads it, and nothing in it can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.exporting.base import Held, Request, Weight
from autocompress.files import atomic_path

__all__ = ["Safetensors"]


@dataclass(frozen=True)
class Safetensors:
    """One file with the state dict that `ac.load` fills, tied tensors once; `model.load_state_dict` takes it as it is.

    half=True stores what the file holds in half precision as float16: half the bytes, the same values.
    Source: the format of safetensors 0.8, an 8-byte length, JSON, data.
    """

    half: bool = False
    name: str = "safetensors"
    folder: bool = False

    def check(self, model: nn.Module, example: Any) -> None:
        pass

    def hold(self, weight: Weight, owner: nn.Module) -> Held:
        half = self.half and weight.values is not None and weight.values.dtype == "float16"
        return Held(weight, "float16" if half else "float32", 16 if half else 32)

    def write(self, request: Request, out: Path, admit: Callable[[int], None]) -> tuple[list[Path], dict[str, Any]]:
        from safetensors.torch import save as to_bytes

        tensors = {key: torch.from_numpy(held.weight.dense()) for key, held in request.held.items()}
        tensors |= {name: torch.from_numpy(values.copy()) for name, values in request.floats.items()}
        own = request.model.state_dict()
        for name, tensor in own.items():
            # What the file only implies: the statistics of folded norms, and their counters.
            if request.aliases[name] == name and name not in tensors:
                tensors[name] = tensor
        for name, tensor in tensors.items():
            kept = request.held.get(name)
            stored = tensor.half() if kept is not None and kept.bits == 16 else tensor
            if not self.half and stored.dtype == torch.float16:
                stored = stored.to(own[name].dtype if name in own else torch.float32)
            tensors[name] = stored.contiguous()
        data = to_bytes(tensors)
        admit(len(data))
        with atomic_path(out) as scratch:
            scratch.write_bytes(data)
        return [out], {"tensors": len(tensors)}
