"""One token of Mamba2's recurrence in plain torch: the formula of the reference over the whole batch."""

from __future__ import annotations

import torch

from .slots import read_slots, write_slots


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
    """Write out and update state."""
    if state.shape[0] == 0:
        out.zero_()
        return
    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    valid = None
    old = state
    if state_indices is not None:
        old, valid = read_slots(state, state_indices)
    step = dt.float()
    if dt_bias is not None:
        step = step + dt_bias
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    token = x.float()
    decay = (step[..., None] * A).exp_()
    grouped = (batch, groups, heads // groups, head_dim, state_dim)
    new = (decay * old).view(grouped)
    new.addcmul_((step * token).view(*grouped[:-1], 1), B.float()[:, :, None, None, :])
    # y = S C, one matrix a group: [H / G · P, N] times [N, 1].
    result = (new.flatten(2, 3) @ C.float()[..., None]).view(batch, heads, head_dim)
    new = new.view(batch, heads, head_dim, state_dim)
    if D is not None:
        result = result + D * token
    if z is not None:
        result = result * torch.nn.functional.silu(z.float())
    if state_indices is None:
        state.copy_(new)
    else:
        assert valid is not None
        write_slots(state, state_indices, valid, torch.where(valid[:, None, None, None], new.to(state.dtype), old))
        result = torch.where(valid[:, None, None], result, 0)
    out.copy_(result)
