"""The causal-conv1d package's functions, served by anima_fast on any device, for inference.

    from anima_fast.integrations.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    out = causal_conv1d_fn(x, weight, bias, activation="silu")                   # x [B, D, L], weight [D, W]
    out = causal_conv1d_update(x_step, conv_state, weight, bias, "silu")         # conv_state is updated in place

Names, parameters and results are those of causal-conv1d 1.6.1 (Dao-AILab/causal-conv1d 0d2252d). What differs:
gradients are refused; widths up to 16 and any number of channels and memory layout are taken.
"""

from __future__ import annotations

import torch

from ...conv import causal_conv1d
from ...conv import causal_conv1d_update as _causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`anima_fast.causal_conv1d`. As in causal-conv1d, final_states_out counts only with return_final_states."""
    return causal_conv1d(
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        return_final_states,
        final_states_out if return_final_states else None,
        activation,
    )


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """`anima_fast.causal_conv1d_update`: x `[B, D]` or `[B, D, L]`; `conv_state` updated in place."""
    return _causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
