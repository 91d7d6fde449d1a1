"""One token of Mamba2's recurrence in C++: csrc/cpu/ssd_state_update_kernel.h."""

from __future__ import annotations

import torch

from ..extension import address, view
from . import extension


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
    isa: str = "",
) -> None:
    """Update `state` in place and write the token's output to `out`."""
    rows = state if state.stride(-1) == 1 else state.contiguous()
    call = extension().SsdStateUpdate(
        state=view(rows),
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
    call.cpu(torch.get_num_threads(), isa)
    if rows is not state:
        state.copy_(rows)
