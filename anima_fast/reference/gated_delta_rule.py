"""The gated delta rule, token by token, in the inputs' own precision (fp32 for half types).

    q_t, k_t <- q_t / sqrt(|q_t|² + 1e-6), same for k, if l2norm;  q_t <- scale q_t
    S = exp(g_t) S;  d = beta_t (v_t - Sᵀ k_t);  S = S + k_t dᵀ;  o_t = Sᵀ q_t        S [K, V]

q k [B, L, Hk, K], v o [B, L, Hv, V], g beta [B, L, Hv]; value head h reads key head h // (Hv / Hk). Sequence i is
tokens [cu_seqlens[i], cu_seqlens[i + 1]) of row 0, or without cu_seqlens row i. Source: Yang, Kautz and Hatamizadeh,
"Gated Delta Networks" (2024), and the arguments of fla's chunk_gated_delta_rule.
"""

from __future__ import annotations

import torch


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
) -> None:
    """Write o, and each sequence's last state where asked."""
    precision = torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens is None:
        spans = [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    else:
        cu = cu_seqlens.tolist()
        spans = [(0, cu[i], cu[i + 1]) for i in range(len(cu) - 1)]
    per_key = v.shape[2] // q.shape[2]
    for i, (row, start, end) in enumerate(spans):
        state = v.new_zeros(v.shape[2], q.shape[3], v.shape[3], dtype=precision)
        if initial_state is not None:
            state += initial_state[i]
        for t in range(start, end):
            query, key = q[row, t].to(precision), k[row, t].to(precision)
            if l2norm:
                query = query / (query.square().sum(-1, keepdim=True) + 1e-6).sqrt()
                key = key / (key.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            query, key = (x.repeat_interleave(per_key, dim=0)[..., None] for x in (scale * query, key))  # [Hv, K, 1]
            state = g[row, t].to(precision).exp()[:, None, None] * state
            change = beta[row, t].to(precision)[:, None] * (v[row, t].to(precision) - (state * key).sum(1))
            state = state + key * change[:, None, :]
            o[row, t] = (state * query).sum(1)
        if final_state is not None:
            final_state[i] = state
