"""Decoding with causal_conv1d: one row and one token at a time.

The W - 1 tokens before x come from conv_state [slots, C, S]: without cache_seqlens its last ones, and the state is
shifted to end with x; with cache_seqlens [B] it is a ring, and token t of row b goes to position
(cache_seqlens[b] + t) mod S. x out [B, C, T]; the formula is that of causal_conv1d.py. Rows whose slot
state_indices[b] is outside [0, slots) give 0. Source: causal-conv1d's causal_conv1d_update.
"""

from __future__ import annotations

import torch


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
    precision = torch.promote_types(x.dtype, torch.float32)
    slots, _, size = conv_state.shape
    width = weight.shape[1]
    for b in range(x.shape[0]):
        slot = b if state_indices is None else int(state_indices[b])
        if not 0 <= slot < slots:
            out[b] = 0
            continue
        state = conv_state[slot]
        for t in range(x.shape[2]):
            if cache_seqlens is None:
                window = torch.cat([state[:, size - (width - 1) :], x[b, :, t : t + 1]], dim=1)
                state.copy_(torch.cat([state, x[b, :, t : t + 1]], dim=1)[:, 1:])
            else:
                position = int(cache_seqlens[b]) + t
                past = [(position - j) % size for j in range(width - 1, 0, -1)]
                window = torch.cat([state[:, past], x[b, :, t : t + 1]], dim=1)
                state[:, position % size] = x[b, :, t]
            total = (window.to(precision) * weight.to(precision)).sum(1)
            if bias is not None:
                total = total + bias.to(precision)
            out[b, :, t] = torch.nn.functional.silu(total) if silu else total
