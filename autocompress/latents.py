"""Attention that caches latents of low rank, and expands them, whenever it runs, to the keys and values of a Llama.

Rotary embeddings turn a key by its position after the projection, and turning does not commute with an expansion: so
latents are cached unturned, and keys are expanded, then turned by their own positions, whenever they are read. A cached
token's position is not its place in the cache where a batch is padded or a sequence packed, so the first layer's
latents carry it, in four bytes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from autocompress.errors import LayerError

__all__ = ["LatentAttention", "position_columns"]


def position_columns(dtype: torch.dtype, longest: int) -> int:
    """How many numbers of a type tell positions below `longest`: float32 holds integers below 2²⁴, and of narrower
    types each holds a digit of base 256.
    """
    return max(1, math.ceil(round(math.log2(max(longest, 2)), 9) / _digit_bits(dtype)))


def _digit_bits(dtype: torch.dtype) -> int:
    return 8 if dtype.itemsize < 4 else 24


class LatentAttention(nn.Module):
    """Attention in the place of a Llama's, whose key and value projections are `Factored`: caches what their first
    halves put out, in the cache's tensors (batch, 1, tokens, rank), and expands all of it whenever it runs.

    carries: whether its keys' latents end with the tokens' positions; the first layer's do, and all others read them
    there. A cache that does not hand back what it was given is refused by a LayerError.
    """

    def __init__(self, dense: Any, rotary: nn.Module, longest: int, carries: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = dense.q_proj, dense.k_proj, dense.v_proj, dense.o_proj
        self.rotary_emb = rotary
        self.config, self.layer_idx = dense.config, dense.layer_idx
        self.head_dim, self.scaling = dense.head_dim, dense.scaling
        self.num_key_value_groups, self.is_causal = dense.num_key_value_groups, dense.is_causal
        self.attention_dropout = dense.attention_dropout
        self.longest, self.carries = longest, carries
        self.training = dense.training

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        *,
        position_ids: torch.Tensor,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As LlamaAttention.forward of transformers; position_ids, which its decoder layer hands on, are needed."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        keys, values = self.k_proj[0](hidden_states), self.v_proj[0](hidden_states)
        turns = position_embeddings
        if past_key_values is not None:
            keys, values, positions = self._cached(past_key_values, keys, values, position_ids)
            turns = self.rotary_emb(values, positions)
        query = _turned(self._heads(self.q_proj(hidden_states)), *position_embeddings)
        key, value = _turned(self._heads(self.k_proj[1](keys)), *turns), self._heads(self.v_proj[1](values))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **more)
        return self.o_proj(mixed.flatten(-2).contiguous()), weights

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads · head_dim) as (batch, heads, tokens, head_dim)"""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _cached(
        self, cache: Any, keys: torch.Tensor, values: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents (batch, tokens, rank) of keys and values, and positions (batch, tokens), of all tokens so far."""
        bits, width = _digit_bits(keys.dtype), keys.shape[-1]
        columns = position_columns(keys.dtype, self.longest)
        scales = 2 ** (bits * torch.arange(columns, device=keys.device))
        if self.carries:
            if int(position_ids.max()) >= 2 ** (bits * columns):
                raise LayerError(f"position {int(position_ids.max())} is beyond the model's {self.longest}")
            digits = position_ids.expand(len(keys), -1)[..., None] // scales % 2**bits
            keys = torch.cat([keys, digits.to(keys.dtype)], -1)
        keys, values = (x[:, 0] for x in cache.update(keys[:, None], values[:, None], self.layer_idx))
        carried = cache.layers[0].keys[:, 0, :, -columns:].to(keys.device)
        if carried.shape[:2] != keys.shape[:2]:
            raise LayerError(
                f"{type(cache).__name__} keeps {tuple(carried.shape[:2])} tokens as they are, of "
                f"{tuple(keys.shape[:2])}; needed a DynamicCache or a StaticCache"
            )
        return keys[..., :width], values, (carried.long() * scales).sum(-1)


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads (batch, heads, tokens, head_dim) turned by rotary embeddings (batch or 1, tokens, head_dim)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
