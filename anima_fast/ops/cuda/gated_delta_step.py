"""The gated delta rule token by token in CUDA: csrc/cuda/gated_delta_step.cu."""

from __future__ import annotations

import torch

from .. import calls
from . import run


def gated_delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    o: torch.Tensor,
    final_state: torch.Tensor | None,
    *,
    initial_state: torch.Tensor | None,
    scale: float,
    l2norm: bool,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Write the outputs to `o` and, if asked for, the last states."""
    call = calls.gated_delta_rule(
        q, k, v, g, beta, o, final_state, initial_state=initial_state, scale=scale, l2norm=l2norm, cu_seqlens=cu_seqlens
    )
    run(call, q.device, step=True)
