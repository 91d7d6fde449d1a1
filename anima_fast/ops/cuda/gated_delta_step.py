"""The gated delta rule token by token in CUDA: csrc/cuda/gated_delta_step.cu."""

from __future__ import annotations

import torch

from . import extension, stream
from .gated_delta_rule import delta_arguments


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
    arguments = delta_arguments(q, k, v, g, beta, o, final_state, initial_state, scale, l2norm, cu_seqlens)
    call = extension().GatedDeltaRule(**arguments)
    with stream(q.device) as current:
        workspace = q.new_empty(call.cuda_step_workspace(), dtype=torch.uint8)
        call.cuda_step(workspace.data_ptr(), current)
