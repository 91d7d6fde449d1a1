"""Mamba2's recurrence, token by token, in the inputs' own precision (fp32 for half types).

    dt_t = clamp(softplus?(dt_t + dt_bias), dt_min, dt_max)
    S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ            S [P, N]
    y_t  = S_t C_t + D_t x_t,  then · silu(z_t) if z is given

x y z D [B, L, H, P], dt [B, L, H], A dt_bias [H], B C [B, L, G, N]; head h reads group h // (H / G). S is 0 before
every t at which seq_idx changes; seq_idx before token 0 counts as 0. Source: Dao and Gu, "Transformers are SSMs"
(2024), and the arguments of mamba-ssm's mamba_chunk_scan_combined.
"""

from __future__ import annotations

import torch


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
    """Write y, and the states after the last token and at the ends of cu_seqlens where asked."""
    precision = torch.promote_types(x.dtype, torch.float32)
    batch, length, heads, head_dim = x.shape
    per_group = heads // B.shape[2]
    state = x.new_zeros(batch, heads, head_dim, B.shape[3], dtype=precision)
    if initial_state is not None:
        state += initial_state
    ends: dict[int, list[int]] = {}
    if varlen_states is not None:
        assert cu_seqlens is not None
        varlen_states.zero_()
        cu = cu_seqlens.tolist()
        for i in range(len(cu) - 1):
            if cu[i + 1] > cu[i]:
                ends.setdefault(cu[i + 1] - 1, []).append(i)
    for t in range(length):
        if seq_idx is not None:
            previous = seq_idx[:, t - 1] if t else torch.zeros_like(seq_idx[:, 0])
            state = torch.where((seq_idx[:, t] != previous)[:, None, None, None], 0, state)
        step = dt[:, t].to(precision)  # [B, H]
        if dt_bias is not None:
            step = step + dt_bias.to(precision)
        if dt_softplus:
            step = torch.nn.functional.softplus(step)
        step = step.clamp(dt_min, dt_max)
        token = x[:, t].to(precision)
        key, query = (v[:, t].to(precision).repeat_interleave(per_group, dim=1) for v in (B, C))
        state = (step * A.to(precision)).exp()[..., None, None] * state
        state = state + (step[..., None] * token)[..., None] * key[:, :, None, :]
        out = (state * query[:, :, None, :]).sum(-1)
        if D is not None:
            out = out + D[:, t].to(precision) * token
        if z is not None:
            out = out * torch.nn.functional.silu(z[:, t].to(precision))
        y[:, t] = out
        for i in ends.get(t, ()):
            assert varlen_states is not None
            varlen_states[i] = state[0]
    if final_state is not None:
        final_state.copy_(state)
