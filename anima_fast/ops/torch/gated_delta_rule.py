"""The gated delta rule in plain torch, chunk by chunk (the WY form of a product of Householder-like steps).

Within a chunk of Q tokens, with G the running sums of g and S the state before it, the changes d of all its tokens
solve one unit lower-triangular system, and everything else is a matrix product:

    (I + tril(diag(beta) K Kᵀ ∘ exp(G_i - G_j), -1)) d = beta (V - exp(G) K S)
    O = exp(G) Q S + (tril(Q Kᵀ) ∘ exp(G_i - G_j)) d
    S = exp(G_last) S + (exp(G_last - G) K)ᵀ d

The system is solved for V and for exp(G) K before S is known, for several chunks at once; only the products with S go
chunk by chunk. Sequences of cu_seqlens are laid out so that each starts a chunk of its own; the ends of their last
chunks are zeros, which change nothing. How many chunks that takes depends on the data, so room is made for the most it
can be, L / Q and one a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .decay import pieces, running_sums, span_decays
from .gated_delta_step import normalized


class _Layout(NamedTuple):
    """Packed sequences in chunks: `position` [L] of each token; `owner` [chunks] of each chunk, `sequences` for those
    past the end; `starts` [chunks], whether the chunk is its sequence's first."""

    position: torch.Tensor
    owner: torch.Tensor
    starts: torch.Tensor


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
    batch, length, _, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    chunk_size = min(chunk_size, max(length, 1))
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # One more with cu_seqlens: what chunks past the end read and write.
    states = q.new_zeros(sequences + (cu_seqlens is not None), heads, key_dim, value_dim, dtype=torch.float32)
    if initial_state is not None:
        states[:sequences] = initial_state
    layout = None
    result = o
    if cu_seqlens is not None and length:
        layout = _layout(cu_seqlens, length, chunk_size)
        total = layout.owner.shape[0] * chunk_size

        def spread(x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(1, total, *x.shape[2:]).index_copy_(1, layout.position, x)

        q, k, v, g, beta = map(spread, (q, k, v, g, beta))
        result = o.new_empty(1, total, heads, value_dim)
    state = states[:batch].clone()
    for start, chunks, tokens in pieces(q.shape[1], chunk_size, batch * heads, q.device):

        def cut(x: torch.Tensor, start: int = start, chunks: int = chunks, tokens: int = tokens) -> torch.Tensor:
            """[B, tokens of the piece, H, ...] as [B, chunks, H, tokens, ...] in fp32."""
            return x[:, start : start + chunks * tokens].unflatten(1, (chunks, tokens)).transpose(2, 3)

        inputs = _Inputs(
            normalized(cut(q), l2norm) * scale, normalized(cut(k), l2norm), *(cut(x).float() for x in (v, g, beta))
        )
        prepared = _prepare(inputs)
        out = cut(result)
        for c in range(chunks):
            if layout is not None:
                number = start // chunk_size + c
                owner = layout.owner[number : number + 1]
                state = torch.where(layout.starts[number], states.index_select(0, owner), state)
            state = _step(prepared, c, state, out)
            if layout is not None:
                states.index_copy_(0, owner, state)
    if layout is not None:
        torch.index_select(result, 1, layout.position, out=o)
    elif length:
        states = state
    if final_state is not None:
        final_state.copy_(states[:sequences])


def _layout(cu_seqlens: torch.Tensor, length: int, chunk_size: int) -> _Layout:
    sequences = cu_seqlens.shape[0] - 1
    cu = cu_seqlens.long()
    ends = ((cu.diff() + chunk_size - 1) // chunk_size).cumsum(0)  # in chunks
    first = torch.nn.functional.pad(ends, (1, 0))
    tokens = torch.arange(length, device=cu.device)
    sequence = torch.searchsorted(cu, tokens, right=True) - 1
    position = first[sequence] * chunk_size + tokens - cu[sequence]
    numbers = torch.arange(length // chunk_size + sequences, device=cu.device)
    owner = torch.searchsorted(ends, numbers, right=True)
    return _Layout(position, owner, first[owner] == numbers)


class _Inputs(NamedTuple):
    """Of some chunks, fp32: q k [B, c, Hk, Q, K], v [B, c, Hv, Q, V], g beta [B, c, Hv, Q]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor


class _Prepared(NamedTuple):
    """What does not need the state: attention [B, c, Hv, Q, Q], and d = solved_v - solved_k S; with decays applied,
    the q that reads S, the k that writes it, and the factor exp(G_last) of S."""

    attention: torch.Tensor
    solved_v: torch.Tensor
    solved_k: torch.Tensor
    reading: torch.Tensor
    writing: torch.Tensor
    kept: torch.Tensor


def _prepare(x: _Inputs) -> _Prepared:
    key_heads, heads, tokens = x.q.shape[2], x.v.shape[2], x.q.shape[3]
    per_key = heads // key_heads

    def per_head(matrix: torch.Tensor) -> torch.Tensor:
        return matrix if per_key == 1 else matrix.repeat_interleave(per_key, dim=2)

    sums = running_sums(x.g)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=x.q.device).tril()
    decays = span_decays(sums, causal)
    keys = x.k.transpose(-1, -2)
    attention = per_head(x.q @ keys) * decays
    # The solver takes the diagonal as 1 and does not read above it.
    system = per_head(x.k @ keys) * decays * x.beta[..., None]
    reach = sums.exp().float()[..., None]
    key = per_head(x.k)
    right = torch.cat([x.v, reach * key], dim=-1) * x.beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    solved_v, solved_k = solved.split([x.v.shape[-1], x.k.shape[-1]], dim=-1)
    left = (sums[..., -1:] - sums).exp().float()[..., None]
    return _Prepared(attention, solved_v, solved_k, per_head(x.q) * reach, key * left, reach[..., -1:, :])


def _step(x: _Prepared, c: int, state: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write chunk c of out [B, c, Hv, Q, V]; the state after it."""
    change = x.solved_v[:, c] - x.solved_k[:, c] @ state
    out[:, c] = x.reading[:, c] @ state + x.attention[:, c] @ change
    return x.kept[:, c] * state + x.writing[:, c].transpose(-1, -2) @ change
