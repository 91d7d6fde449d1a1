"""Causal convolution of a few new tokens in C++: csrc/cpu/causal_conv1d_kernel.h."""

from __future__ import annotations

import torch

from .. import calls
from . import run


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
    isa: str = "",
) -> None:
    """Write the convolution of x to `out` and append x to `conv_state`."""
    call = calls.causal_conv1d_update(
        x, conv_state, weight, bias, out, silu=silu, cache_seqlens=cache_seqlens, state_indices=state_indices
    )
    run(call, isa)
