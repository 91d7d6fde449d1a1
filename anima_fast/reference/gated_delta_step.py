"""gated_delta_step is the recurrence of gated_delta_rule.py itself: same formula, shapes and source."""

from __future__ import annotations

import torch

from .gated_delta_rule import gated_delta_rule


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
    """Write o, and each sequence's last state where asked."""
    options = dict(initial_state=initial_state, scale=scale, l2norm=l2norm, cu_seqlens=cu_seqlens)
    gated_delta_rule(q, k, v, g, beta, o, final_state, **options, chunk_size=1)  # type: ignore[arg-type]
