"""Mamba2's scan in plain torch, chunk by chunk.

Within a chunk of Q tokens, with G the running sums of dt A, u = dt x, and S the state before it:

    Y = exp(G_i) C Sᵀ + (C Bᵀ ∘ exp(G_i - G_j), i >= j) u
    S = exp(G_last) S + (exp(G_last - G) u)ᵀ B

All but the two terms with S are matrix products of several chunks at once; S goes chunk by chunk.

seq_idx: sequences are numbered by their order in the row, and products between tokens of different numbers, or with a
state of another number, are left out. Leaving out multiplies by 0, which a NaN or an infinity survives, so these are
first taken out of the data, and at the end the results that they reach in their own sequence are set to NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .decay import pieces, running_sums, span_decays


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
    batch, length, heads, head_dim = x.shape
    state = x.new_zeros(batch, heads, head_dim, B.shape[3], dtype=torch.float32)
    if initial_state is not None:
        state.copy_(initial_state)
    if varlen_states is not None:
        varlen_states.zero_()
    if length == 0:
        if final_state is not None:
            final_state.copy_(state)
        return
    chunk_size = min(chunk_size, length)
    step = dt.float()
    if dt_bias is not None:
        step = step + dt_bias
    if dt_softplus:
        step = torch.nn.functional.softplus(step)
    step = step.clamp(dt_min, dt_max)
    data = _Data(x, step, A, B, C, None)
    poison = None
    if seq_idx is not None:
        data, poison = _separated(data, seq_idx)
    starts = []
    for start, chunks, tokens in pieces(length, chunk_size, batch * heads, x.device):
        state, before = _piece(data, y, state, start, chunks, tokens)
        if varlen_states is not None:
            starts.append(before[0])
        part = slice(start, start + chunks * tokens)
        if D is not None or z is not None:
            out = y[:, part].float()
            if D is not None:
                out = out.addcmul_(D[:, part].float(), x[:, part].float())
            if z is not None:
                out *= torch.nn.functional.silu(z[:, part].float())
            y[:, part] = out
    if final_state is not None:
        final_state.copy_(state)
    if varlen_states is not None:
        assert cu_seqlens is not None
        _states_at_ends(data, torch.cat(starts), cu_seqlens, chunk_size, varlen_states)
    if poison is not None:
        y.masked_fill_(poison, torch.nan)
        if final_state is not None:
            final_state.masked_fill_(poison[:, -1, ..., None], torch.nan)
        if varlen_states is not None:
            assert cu_seqlens is not None
            reached = poison[0].index_select(0, (cu_seqlens[1:] - 1).clamp(min=0))
            varlen_states.masked_fill_((reached & (cu_seqlens.diff() > 0)[:, None, None])[..., None], torch.nan)


class _Data(NamedTuple):
    """x [B, L, H, P], dt after bias, softplus and clamp [B, L, H], A [H], B C [B, L, G, N]; and with seq_idx the number
    of each token's sequence [B, L], where sequence 0 owns the initial state."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    sequence: torch.Tensor | None


def _separated(data: _Data, seq_idx: torch.Tensor) -> tuple[_Data, torch.Tensor | None]:
    """`data` with sequences and with 0 for what is not finite; where results must be NaN [B, L, H, P], or None."""
    changes = torch.diff(seq_idx, dim=1, prepend=torch.zeros_like(seq_idx[:, :1])) != 0
    sequence = changes.cumsum(1)
    bad_x, bad_dt, bad_B = (~t.isfinite() for t in (data.x, data.dt, data.B))
    if data.x.device.type == "cpu" and not (bad_x.any() or bad_dt.any() or bad_B.any()):
        return data._replace(sequence=sequence), None
    clean = data._replace(
        x=data.x.masked_fill(bad_x, 0),
        dt=data.dt.masked_fill(bad_dt, 0),
        B=data.B.masked_fill(bad_B, 0),
        sequence=sequence,
    )
    per_group = data.x.shape[2] // data.B.shape[2]
    bad_head = bad_dt | bad_B.any(-1).repeat_interleave(per_group, dim=2)
    bad = bad_x | bad_head[..., None]
    # How many were bad up to here, less those before this sequence.
    count = bad.cumsum(1, dtype=torch.int32)
    tokens = torch.arange(bad.shape[1], device=bad.device)
    first = torch.where(changes, tokens, 0).cummax(1).values[:, :, None, None].expand(bad.shape)
    return clean, count - (count - bad.int()).gather(1, first) > 0


def _piece(
    data: _Data, y: torch.Tensor, state: torch.Tensor, start: int, chunks: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write some chunks of y without D and z; the state after them, and the state before each [B, c, H, P, N]."""
    batch, _, heads, head_dim = data.x.shape
    groups, state_dim = data.B.shape[2:]
    per_group = heads // groups
    part = slice(start, start + chunks * tokens)

    def cut(t: torch.Tensor) -> torch.Tensor:
        """[B, tokens of the piece, ...] as [B, chunks, tokens, ...]."""
        return t[:, part].unflatten(1, (chunks, tokens))

    sums = running_sums((cut(data.dt) * data.A).transpose(2, 3))  # [B, c, H, Q]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=y.device).tril()
    reach, left, kept = sums.exp().float(), (sums[..., -1:] - sums).exp().float(), sums[..., -1].exp().float()
    if data.sequence is not None:
        own = cut(data.sequence)  # [B, c, Q]
        last = data.sequence[:, max(start - 1, 0)] if start else torch.zeros_like(data.sequence[:, 0])
        entering = torch.cat([last[:, None], own[:, :-1, -1]], dim=1)[:, :, None]  # [B, c, 1]
        allowed = allowed & (own[..., :, None] == own[..., None, :])[:, :, None]
        reach = torch.where((own == entering)[:, :, None], reach, 0)
        left = torch.where((own == own[..., -1:])[:, :, None], left, 0)
        kept = torch.where(own[..., -1:] == entering, kept, 0)
    decays = span_decays(sums, allowed).unflatten(2, (groups, per_group))  # [B, c, G, H / G, Q, Q]
    query, key = (cut(t).transpose(2, 3).float() for t in (data.C, data.B))  # [B, c, G, Q, N]
    values = (cut(data.x).float() * cut(data.dt)[..., None]).transpose(2, 3)  # [B, c, H, Q, P]
    weights = decays.mul_((query @ key.transpose(-1, -2))[:, :, :, None]).flatten(2, 3)
    out = weights @ values  # [B, c, H, Q, P]
    writing = (values * left[..., None]).unflatten(2, (groups, per_group)).transpose(-1, -2).flatten(3, 4)
    added = (writing @ key).reshape(batch, chunks, heads, head_dim, state_dim)
    before = torch.empty_like(added)
    for c in range(chunks):
        before[:, c] = state
        decayed = kept[:, c, :, None, None] * state
        if data.sequence is not None:
            decayed = torch.where((kept[:, c] == 0)[..., None, None], 0, decayed)
        state = decayed + added[:, c]
    carried = query @ before.view(batch, chunks, groups, -1, state_dim).transpose(-1, -2)  # [B, c, G, Q, H / G · P]
    carried = carried.unflatten(-1, (per_group, head_dim)).transpose(3, 4).flatten(2, 3) * reach[..., None]
    if data.sequence is not None:
        carried = torch.where((own == entering)[:, :, None, :, None], carried, 0)
    cut(y).copy_((out + carried).transpose(2, 3))
    return state, before


def _states_at_ends(
    data: _Data, before: torch.Tensor, cu_seqlens: torch.Tensor, chunk_size: int, states: torch.Tensor
) -> None:
    """states[i] = the state after the last token of sequence i of row 0, from the state before its chunk."""
    length, heads, head_dim = data.x.shape[1:]
    groups, state_dim = data.B.shape[2:]
    sequence = data.sequence
    offsets = torch.arange(chunk_size, device=cu_seqlens.device)
    for i in range(states.shape[0]):
        end = (cu_seqlens[i + 1 : i + 2] - 1).clamp(min=0).long()
        chunk = end // chunk_size
        tokens = (chunk * chunk_size + offsets).clamp(max=length - 1)
        counted = chunk * chunk_size + offsets <= end
        step = torch.where(counted[:, None], data.dt[0].index_select(0, tokens), 0)  # [Q, H]
        sums = running_sums((step * data.A).T)  # [H, Q]
        left, kept = (sums[:, -1:] - sums).exp().float(), sums[:, -1].exp().float()
        old = before.index_select(0, chunk)[0]
        if sequence is not None:
            own = sequence[0].index_select(0, end)
            left = torch.where(sequence[0].index_select(0, tokens) == own, left, 0)
            entering = torch.where(chunk > 0, sequence[0].index_select(0, (chunk * chunk_size - 1).clamp(min=0)), 0)
            old = torch.where(entering == own, old, 0)
        values = data.x[0].index_select(0, tokens).float() * (step * left.T)[..., None]  # [Q, H, P]
        key = data.B[0].index_select(0, tokens).float().transpose(0, 1)  # [G, Q, N]
        added = values.unflatten(1, (groups, -1)).flatten(2).permute(1, 2, 0) @ key
        state = kept[:, None, None] * old + added.view(heads, head_dim, state_dim)
        states[i] = torch.where(cu_seqlens[i + 1] > cu_seqlens[i], state, 0)
