"""Mamba2 SSD in CUDA: csrc/cuda/ssd_chunk_scan.cu says how."""

from __future__ import annotations

import torch

from .. import calls
from . import run


def ssd_chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    y: torch.Tensor,
    final_state: torch.Tensor | None,
    varlen_states: torch.Tensor | None,
    *,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> None:
    """Write the scan of x to `y` and the states that are asked for. The chunk is at most 64 tokens here."""
    call = calls.ssd_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        y,
        final_state,
        varlen_states,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
        dt_softplus=dt_softplus,
        dt_min=dt_min,
        dt_max=dt_max,
    )
    run(call, x.device)
