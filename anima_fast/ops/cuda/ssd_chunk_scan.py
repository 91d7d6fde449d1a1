"""Mamba2 SSD in CUDA: csrc/cuda/ssd_chunk_scan.cu says how."""

from __future__ import annotations

import torch

from ..extension import address, view
from . import extension, stream


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
    call = extension().SsdChunkScan(
        x=view(x),
        dt=view(dt),
        A=view(A),
        B=view(B),
        C=view(C),
        D=view(D),
        z=view(z),
        dt_bias=view(dt_bias),
        initial_state=view(initial_state),
        y=view(y),
        final_state=view(final_state),
        varlen_states=view(varlen_states),
        seq_idx=address(seq_idx),
        cu_seqlens=address(cu_seqlens if varlen_states is not None else None),
        batch=x.shape[0],
        length=x.shape[1],
        heads=x.shape[2],
        head_dim=x.shape[3],
        groups=B.shape[2],
        state_dim=B.shape[3],
        sequences=0 if varlen_states is None else varlen_states.shape[0],
        dt_min=dt_min,
        dt_max=dt_max,
        dt_softplus=dt_softplus,
    )
    with stream(x.device) as current:
        workspace = x.new_empty(call.cuda_workspace(), dtype=torch.uint8)
        call.cuda(workspace.data_ptr(), current)
