"""One token of Mamba2's recurrence in CUDA: csrc/cuda/ssd_state_update.cu."""

from __future__ import annotations

import torch

from ..extension import address, view
from . import extension, stream


def ssd_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    out: torch.Tensor,
    *,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_indices: torch.Tensor | None,
) -> None:
    """Update `state` in place and write the token's output to `out`."""
    call = extension().SsdStateUpdate(
        state=view(state),
        x=view(x),
        dt=view(dt),
        A=view(A),
        B=view(B),
        C=view(C),
        D=view(D),
        z=view(z),
        dt_bias=view(dt_bias),
        out=view(out),
        state_indices=address(state_indices),
        slots=state.shape[0],
        batch=x.shape[0],
        heads=x.shape[1],
        head_dim=x.shape[2],
        groups=B.shape[1],
        state_dim=B.shape[2],
        dt_softplus=dt_softplus,
    )
    with stream(x.device) as current:
        workspace = x.new_empty(call.cuda_workspace(), dtype=torch.uint8)
        call.cuda(workspace.data_ptr(), current)
