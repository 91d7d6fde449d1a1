"""One token of Mamba2's recurrence in CUDA: csrc/cuda/ssd_state_update.cu."""

from __future__ import annotations

import torch

from .. import calls
from . import run


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
    call = calls.ssd_state_update(
        state, x, dt, A, B, C, out, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, state_indices=state_indices
    )
    run(call, state.device)
