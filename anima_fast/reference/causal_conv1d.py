"""Depthwise causal convolution over tokens, in the inputs' own precision (fp32 for half types).

    out[b, c, t] = act(bias[c] + Σ_j weight[c, j] x[b, c, t - (W - 1) + j])

x out [B, C, T], weight [C, W], bias [C], initial_states final_states [B, C, W - 1] (the tokens before token 0, or 0;
the last tokens), seq_idx [B, T]: tokens of another sequence count as 0, and a negative seq_idx (padding) gives 0.
Source: the arguments of causal-conv1d's causal_conv1d_fn.
"""

from __future__ import annotations

import torch


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    final_states: torch.Tensor | None,
    *,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    silu: bool,
) -> None:
    """Write out, and the last W - 1 of (initial_states, x) where asked."""
    precision = torch.promote_types(x.dtype, torch.float32)
    batch, channels, length = x.shape
    width = weight.shape[1]
    before = x.new_zeros(batch, channels, width - 1) if initial_states is None else initial_states
    tokens = torch.cat([before, x], dim=2)  # token t is column t + W - 1
    for t in range(length):
        total = x.new_zeros(batch, channels, dtype=precision)
        if bias is not None:
            total += bias.to(precision)
        for j in range(width):
            source = t - (width - 1) + j
            token = tokens[:, :, t + j].to(precision)
            if seq_idx is not None and source >= 0:
                token = torch.where((seq_idx[:, source] == seq_idx[:, t])[:, None], token, 0)
            total = total + weight[:, j].to(precision) * token
        if silu:
            total = torch.nn.functional.silu(total)
        if seq_idx is not None:
            total = torch.where((seq_idx[:, t] < 0)[:, None], 0, total)
        out[:, :, t] = total
    if final_states is not None:
        final_states.copy_(tokens[:, :, length:])
