"""Depthwise causal convolution in CUDA: csrc/cuda/causal_conv1d.cu."""

from __future__ import annotations

import torch

from ..extension import address, view
from . import extension, stream


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
    """Write the convolution of x to `out` and, if asked for, its last W - 1 inputs to `final_states`."""
    call = extension().CausalConv1d(
        x=view(x),
        weight=view(weight),
        bias=view(bias),
        initial_states=view(initial_states),
        out=view(out),
        final_states=view(final_states),
        seq_idx=address(seq_idx),
        batch=x.shape[0],
        channels=x.shape[1],
        length=x.shape[2],
        width=weight.shape[1],
        silu=silu,
    )
    with stream(x.device) as current:
        workspace = x.new_empty(call.cuda_workspace(), dtype=torch.uint8)
        call.cuda(workspace.data_ptr(), current)
