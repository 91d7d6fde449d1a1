"""Causal convolution of a few new tokens in CUDA: csrc/cuda/causal_conv1d.cu."""

from __future__ import annotations

import torch

from ..extension import address, view
from . import extension, stream


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
    """Write the convolution of x to `out` and append x to `conv_state`."""
    call = extension().CausalConv1dUpdate(
        x=view(x),
        conv_state=view(conv_state),
        weight=view(weight),
        bias=view(bias),
        out=view(out),
        cache_seqlens=address(cache_seqlens),
        state_indices=address(state_indices),
        slots=conv_state.shape[0],
        batch=x.shape[0],
        channels=x.shape[1],
        length=x.shape[2],
        width=weight.shape[1],
        state_length=conv_state.shape[2],
        silu=silu,
    )
    with stream(x.device) as current:
        workspace = x.new_empty(call.cuda_workspace(), dtype=torch.uint8)
        call.cuda(workspace.data_ptr(), current)
