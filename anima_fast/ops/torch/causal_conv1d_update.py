"""Decoding with causal_conv1d in plain torch: the tokens before x, then the convolution of causal_conv1d.py."""

from __future__ import annotations

import torch

from .causal_conv1d import causal_conv1d
from .slots import read_slots, write_slots


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    silu: bool,
    cache_seqlens: torch.Tensor | None,
    state_indices: torch.Tensor | None,
) -> None:
    """Write out and update conv_state."""
    if conv_state.shape[0] == 0:
        out.zero_()
        return
    size = conv_state.shape[2]
    width = weight.shape[1]
    old, valid = (conv_state, None) if state_indices is None else read_slots(conv_state, state_indices)
    if cache_seqlens is None:
        new = torch.cat([old, x], dim=2)[:, :, -size:]
        before = old[:, :, size - (width - 1) :]
    else:
        first = cache_seqlens.long()[:, None, None]
        past = torch.arange(1 - width, 0, device=x.device)
        before = old.gather(2, ((first + past) % size).expand(-1, x.shape[1], -1))
        # Of tokens that share a position of the ring, the last S are what remains.
        kept = torch.arange(max(x.shape[2] - size, 0), x.shape[2], device=x.device)
        new = old.scatter(2, ((first + kept) % size).expand(-1, x.shape[1], -1), x[:, :, max(x.shape[2] - size, 0) :])
    causal_conv1d(x, weight, bias, out, None, initial_states=before, seq_idx=None, silu=silu)
    if state_indices is None:
        conv_state.copy_(new)
    else:
        assert valid is not None
        out.masked_fill_(~valid[:, None, None], 0)
        write_slots(conv_state, state_indices, valid, torch.where(valid[:, None, None], new, old))
