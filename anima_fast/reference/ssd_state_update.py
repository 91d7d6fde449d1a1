"""One token of Mamba2's recurrence, in the inputs' own precision (fp32 for half types).

    dt_p     = softplus?(dt_p + dt_bias_p)
    state_pn = exp(dt_p A_pn) state_pn + dt_p x_p B_n
    out_p    = Σ_n state_pn C_n + D_p x_p,  then · silu(z_p) if z is given

state [slots, H, P, N] (updated), x dt z out [B, H, P], A [H, P, N], B C [B, G, N], D dt_bias [H, P], state_indices
[B] or None (slot b). Rows with a slot outside [0, slots) give 0. Source: mamba-ssm's selective_state_update.
"""

from __future__ import annotations

import torch


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
    precision = torch.promote_types(x.dtype, torch.float32)
    per_group = x.shape[1] // B.shape[1]
    for b in range(x.shape[0]):
        slot = b if state_indices is None else int(state_indices[b])
        if not 0 <= slot < state.shape[0]:
            out[b] = 0
            continue
        step = dt[b].to(precision)  # [H, P]
        if dt_bias is not None:
            step = step + dt_bias.to(precision)
        if dt_softplus:
            step = torch.nn.functional.softplus(step)
        token = x[b].to(precision)
        key, query = (v[b].to(precision).repeat_interleave(per_group, dim=0)[:, None, :] for v in (B, C))
        new = (step[..., None] * A.to(precision)).exp() * state[slot].to(precision)
        new = new + (step * token)[..., None] * key
        result = (new * query).sum(-1)
        if D is not None:
            result = result + D.to(precision) * token
        if z is not None:
            result = result * torch.nn.functional.silu(z[b].to(precision))
        state[slot] = new.to(state.dtype)
        out[b] = result.to(out.dtype)
