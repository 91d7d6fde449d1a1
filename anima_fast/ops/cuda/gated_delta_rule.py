"""The gated delta rule in CUDA: csrc/cuda/gated_delta_rule.cu says how."""

from __future__ import annotations

from typing import Any

import torch

from ..extension import address, view
from . import extension, stream


def gated_delta_rule(
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
    chunk_size: int,
) -> None:
    """Write the outputs to `o` and, if asked for, the last states. The chunk is always 64 tokens here."""
    arguments = delta_arguments(q, k, v, g, beta, o, final_state, initial_state, scale, l2norm, cu_seqlens)
    call = extension().GatedDeltaRule(**arguments)
    with stream(q.device) as current:
        workspace = q.new_empty(call.cuda_workspace(), dtype=torch.uint8)
        call.cuda(workspace.data_ptr(), current)


def delta_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    o: torch.Tensor,
    final_state: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    scale: float,
    l2norm: bool,
    cu_seqlens: torch.Tensor | None,
) -> dict[str, Any]:
    """The call that `gated_delta_rule` and `gated_delta_step` have in common."""
    return dict(
        q=view(q),
        k=view(k),
        v=view(v),
        g=view(g),
        beta=view(beta),
        initial_state=view(initial_state),
        o=view(o),
        final_state=view(final_state),
        cu_seqlens=address(cu_seqlens),
        batch=q.shape[0],
        length=q.shape[1],
        key_heads=q.shape[2],
        value_heads=v.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        sequences=q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        scale=scale,
        l2norm=l2norm,
    )
