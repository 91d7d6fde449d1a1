"""The gated delta rule in plain torch, token by token: all rows and heads of a token at once."""

from __future__ import annotations

import torch


def gated_delta_step(
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
) -> None:
    """Write o, and each sequence's last state where asked."""
    batch, length, key_heads, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    per_key = heads // key_heads
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, heads, key_dim, value_dim)
    initial = q.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state
    if final_state is not None:
        final_state.copy_(initial)
    state = initial
    owner = starts = None
    if cu_seqlens is not None and length:
        tokens = torch.arange(length, dtype=torch.int32, device=q.device)
        owner = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        starts = cu_seqlens.index_select(0, owner) == tokens
    for t in range(length):
        query, key = normalized(q[:, t], l2norm) * scale, normalized(k[:, t], l2norm)
        if per_key > 1:
            query, key = query.repeat_interleave(per_key, 1), key.repeat_interleave(per_key, 1)
        if owner is not None:
            assert starts is not None
            state = torch.where(starts[t], initial.index_select(0, owner[t : t + 1]), state[:1])
        state = state * g[:, t].float().exp()[..., None, None]
        change = beta[:, t].float()[..., None] * (v[:, t].float() - (key[:, :, None, :] @ state)[:, :, 0])
        state.addcmul_(key[..., None], change[:, :, None, :])
        o[:, t] = (query[:, :, None, :] @ state)[:, :, 0]
        if owner is not None and final_state is not None:
            final_state.index_copy_(0, owner[t : t + 1], state)
    if owner is None and final_state is not None:
        final_state.copy_(state)


def normalized(x: torch.Tensor, l2norm: bool) -> torch.Tensor:
    """x in fp32, divided by sqrt(|x|² + 1e-6) where asked."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() if l2norm else x
