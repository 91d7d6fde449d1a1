"""Depthwise causal convolution in CUDA: csrc/cuda/causal_conv1d.cu."""

from __future__ import annotations

import torch

from .. import calls
from . import run


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
    call = calls.causal_conv1d(
        x, weight, bias, out, final_states, initial_states=initial_states, seq_idx=seq_idx, silu=silu
    )
    run(call, x.device)
