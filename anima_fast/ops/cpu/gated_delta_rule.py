"""The gated delta rule in C++: csrc/cpu/chunk_scan.h says how."""

from __future__ import annotations

import torch

from .. import calls
from . import run


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
    isa: str = "",
) -> None:
    """Write the outputs to `o` and, if asked for, the last states. The chunk is always 64 tokens here."""
    call = calls.gated_delta_rule(
        q, k, v, g, beta, o, final_state, initial_state=initial_state, scale=scale, l2norm=l2norm, cu_seqlens=cu_seqlens
    )
    run(call, isa)
