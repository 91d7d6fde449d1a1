"""Self-attention in chunks of queries: the same numbers up to rounding, and no memory by the square of the tokens where
the attention that torch picks holds all its scores (its "math" one: old GPUs, some devices). Cross-attention is
`regional_attention`, which never holds them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import invalid

__all__ = ["chunked"]


@contextlib.contextmanager
def chunked(pipe: Any, queries: int) -> Iterator[None]:
    """Within it, the transformer's self-attention takes at most `queries` tokens at once to all keys.

    Raises:
        ValueError: for no number of tokens, or processors other than diffusers' own.

    Example:
        >>> with chunked(pipe, 4096):
        ...     pipe(prompt="a village", width=2048, height=2048)
    """
    if queries < 1:
        raise invalid("--attention-chunk", f"{queries}", "a whole number >= 1")
    layers = [block.attn1 for block in pipe.transformer.transformer_blocks]
    before = [layer.processor for layer in layers]
    for processor in before:
        if type(processor).__name__ != "CosmosAttnProcessor2_0":
            raise invalid("pipe", f"one with the attention processor {type(processor).__name__}", "diffusers' own")
    for layer in layers:
        layer.set_processor(_Chunked(queries))
    try:
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)


@dataclasses.dataclass(eq=False)
class _Chunked:
    queries: int

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise invalid("attn", "cross-attention, or a mask", "self-attention without one")
        rotate = importlib.import_module("diffusers.models.embeddings").apply_rotary_emb
        attend = importlib.import_module("diffusers.models.attention_dispatch").dispatch_attention_fn

        def heads(x: torch.Tensor, project: Any, norm: Any, rows: slice) -> torch.Tensor:
            x = norm(project(x).unflatten(2, (attn.heads, -1))).transpose(1, 2)
            if image_rotary_emb is not None:
                angles = tuple(part[rows] for part in image_rotary_emb)
                x = rotate(x, angles, use_real=True, use_real_unbind_dim=-2)
            return x.transpose(1, 2)

        k = heads(hidden_states, attn.to_k, attn.norm_k, slice(None))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        found = []
        for start in range(0, hidden_states.shape[1], self.queries):
            rows = slice(start, start + self.queries)
            q = heads(hidden_states[:, rows], attn.to_q, attn.norm_q, rows)
            out = attend(q, k, v).flatten(2).type_as(q)
            found.append(attn.to_out[1](attn.to_out[0](out)))
        return torch.cat(found, dim=1)
