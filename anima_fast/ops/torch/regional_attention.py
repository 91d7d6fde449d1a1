"""Regional attention in plain torch: what people without Triton or a compiler get, on any device.

Queries are taken in the plan's groups of one allowed set (one group, the image, where nothing is excluded), and
a group in chunks; only the keys of its allowed segments are read. The pads of a segment are folded into one
zero key whose bias is log P: exp(b + log P) = P e^b is exactly what P zero keys add, and its value is zero.

    K_s = [k_s; 0], V_s = [v_s; 0]             [H, n + 1, D], once a group
    logit   softmax(scale·q [K_1 … K_S]ᵀ + b) [V_1 … V_S]       per chunk of queries
    blend   Σ_s w_s softmax(scale·q K_sᵀ + (0 … log P)) V_s

Each is one call of torch's scaled_dot_product_attention, with the bias of a chunk as its mask; that keeps no log of
the denominator, so where one is asked for, it is two matmuls around a softmax. A few heads at a time on a CPU, and
there in fp32. The largest temporary does not grow with Nq.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...bound_plan import PlanTensors, iterate_groups

# Temporaries of one chunk on a CPU, in floats (6.5 MiB), and the heads that share it: larger chunks mean fewer
# operations, each a barrier for all threads; fewer heads a smaller copy of K and V.
_CPU_CHUNK = 1664 * 1024
_CPU_HEADS = 8
# Mask entries of one chunk on other devices: larger chunks fill their cores.
_DEVICE_CHUNK = 4 * 1024 * 1024

# Distinct allowed sets explode with overlaps (16 circles: over 100). A group is merged with its neighbour in the
# plan's order while that reads fewer extra (query, key) pairs than this: what starting another group costs.
_MERGE_PAIRS = 4096


class _Group(NamedTuple):
    """Queries [start, end) of the plan's order and the segments they read. flat: their bias is 0."""

    start: int
    end: int
    flat: bool
    segments: tuple[int, ...]


class _Folded(NamedTuple):
    """The keys of some segments, each followed by one zero key for its pads.

    keys, values [H, n, D]; spans: each segment's number, keys and log P (None without pads); rows [n]: which rows of
    k they are (-1: pads); sink [n]: log P at the pads, else 0.
    """

    keys: torch.Tensor
    values: torch.Tensor
    spans: tuple[tuple[int, int, float | None], ...]
    rows: torch.Tensor
    sink: torch.Tensor


class _Rows(NamedTuple):
    """Some heads of one row of the batch: q, out [H, Nq, D], k, v [Hk, Nk, D], lse [H, Nq], mask [H, Nq, Nk]; and
    the plan it uses: bias [S, Nq], order [Nq], the segments' numbers."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    order: torch.Tensor | None
    numbers: tuple[int, ...]


def regional_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    plan: PlanTensors,
    *,
    scale: float,
    combine: str,
    mask: torch.Tensor | None,
) -> None:
    """Write attention of every row under its plan to `out`, and the log of its denominator to `lse`."""
    for row, index in enumerate(plan.plan_index_host):
        for heads, kv_heads in _head_blocks(q.shape[1], k.shape[1], q.device):
            rows = _Rows(
                q[row, heads],
                k[row, kv_heads],
                v[row, kv_heads],
                out[row, heads],
                None if lse is None else lse[row, heads],
                None if mask is None else mask[row, heads],
                plan.bias[index] if plan.bias.shape[2] else None,
                plan.order[index] if plan.order.shape[1] else None,
                _numbers(plan, index),
            )
            for group in _groups(plan.groups_host, index, rows.numbers):
                _attend_group(rows, group, scale, combine)


def _attend_group(rows: _Rows, group: _Group, scale: float, combine: str) -> None:
    """The queries of one group, chunk by chunk."""
    # Not every CPU multiplies 16-bit floats fast, and a copy of a chunk costs little.
    compute = torch.float32 if rows.q.device.type == "cpu" else rows.q.dtype
    parts = _parts(group, combine)
    folded = [_fold(rows.k, rows.v, part, rows.numbers, rows.q.shape[0], compute) for part in parts]
    chunk = _chunk(rows.q, rows.numbers, group, parts, rows.order is not None, rows.lse is not None)
    for start in range(group.start, group.end, chunk):
        end = min(start + chunk, group.end)
        where = slice(start, end) if rows.order is None else rows.order[start:end].long()
        _attend_chunk(rows, where, folded, scale, combine, group.flat)


def _attend_chunk(
    rows: _Rows, where: slice | torch.Tensor, folded: list[_Folded], scale: float, combine: str, flat: bool
) -> None:
    """Some queries; a function of its own, so that a chunk's temporaries are gone before the next one's come."""
    attend = _attend_sdpa if rows.lse is None else _attend_matmul
    queries = _read(rows.q, where).to(folded[0].keys.dtype)
    result, log = None, None
    for part in folded:
        added, empty = None, None
        if combine == "logit" and rows.bias is not None and not flat:
            added = _spread(rows.bias[:, where], part)
        if rows.mask is not None:
            added, empty = _add_mask(rows.mask[:, where], added, part)
        one, log = attend(queries, part, added, scale)
        if empty is not None:
            one.masked_fill_(empty[..., None], 0)
            log = None if log is None else log.masked_fill_(empty, -torch.inf)
        if combine == "blend" and rows.bias is not None and len(folded) > 1:
            one *= rows.bias[part.spans[0][0]][where][:, None].to(one.dtype)
        result = one if result is None else result.add_(one)
    _write(rows.out, where, result)
    if rows.lse is not None:
        _write(rows.lse, where, log)


def _head_blocks(heads: int, kv_heads: int, device: torch.device) -> list[tuple[slice, slice]]:
    """The heads of q and of k that are taken together."""
    group = heads // kv_heads
    step = max(1, _CPU_HEADS // group) if device.type == "cpu" else kv_heads
    return [
        (slice(first * group, (first + step) * group), slice(first, first + step)) for first in range(0, kv_heads, step)
    ]


def _parts(group: _Group, combine: str) -> list[tuple[int, ...]]:
    """The segments that share a softmax: all (logit), or each its own (blend)."""
    return [group.segments] if combine == "logit" else [(s,) for s in group.segments]


def _chunk(
    q: torch.Tensor,
    numbers: tuple[int, ...],
    group: _Group,
    parts: list[tuple[int, ...]],
    ordered: bool,
    scores: bool,
) -> int:
    """Queries of one chunk, so that what `_chunk_floats` counts fits the budget and the group's chunks are alike."""
    widest = max(sum(_width(numbers, s) for s in part) for part in parts)
    if q.device.type == "cpu":
        most = max(16, _CPU_CHUNK // _chunk_floats(q, widest, len(parts), ordered, scores))
    else:
        most = max(16, _DEVICE_CHUNK // widest)
    queries = group.end - group.start
    return -(-queries // -(-queries // most))


def _chunk_floats(q: torch.Tensor, widest: int, parts: int, ordered: bool, scores: bool) -> int:
    """Temporaries of one query of some heads: results, a copy of q, the bias, and scores where they are formed."""
    copies = 1 + (parts > 1) + (ordered or q.dtype != torch.float32)
    return q.shape[0] * (copies * q.shape[2] + scores * widest) + 2 * widest


def workspace_bytes(q: torch.Tensor, plan: PlanTensors, *, combine: str) -> int:
    """Bytes of temporaries of a call on a CPU, at most: some heads' keys and values, a chunk's bias and results, and
    the workspace of torch's attention."""
    most = 0
    heads, _ = _head_blocks(q.shape[1], q.shape[1], torch.device("cpu"))[0]
    some = q[0, heads].to("cpu") if q.device.type != "meta" else torch.empty_like(q[0, heads], device="cpu")
    for index in set(plan.plan_index_host):
        numbers = _numbers(plan, index)
        for group in _groups(plan.groups_host, index, numbers):
            parts = _parts(group, combine)
            keys = sum(_width(numbers, s) for s in group.segments)
            widest = max(sum(_width(numbers, s) for s in part) for part in parts)
            ordered = plan.order.shape[1] > 0
            chunk = _chunk(some, numbers, group, parts, ordered, False)
            floats = _chunk_floats(some, widest, len(parts), ordered, False)
            most = max(most, 2 * some.shape[0] * keys * q.shape[3] + chunk * floats)
    # torch's attention keeps scores of 256 queries x 512 keys and a tile of the result a thread.
    return 4 * (most + torch.get_num_threads() * 256 * (528 + q.shape[3]))


def _numbers(plan: PlanTensors, index: int) -> tuple[int, ...]:
    """start, end, pads of each segment of one plan, flat."""
    size = 3 * plan.segments.shape[1]
    return plan.segments_host[size * index : size * (index + 1)]


def _attend_sdpa(
    q: torch.Tensor, part: _Folded, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[H, C, D] by torch's fused attention."""
    if bias is None and any(log_pads is not None for _, _, log_pads in part.spans):
        bias = part.sink.expand(q.shape[1], -1)
    mask = None if bias is None else bias.to(q.dtype).contiguous()[(None,) * (4 - bias.ndim)]
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q[None], part.keys[None], part.values[None], attn_mask=mask, scale=scale)[0], None


def _attend_matmul(
    q: torch.Tensor, part: _Folded, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[H, C, D] and the log of the denominator, in fp32, by two matmuls around a softmax."""
    scores = torch.bmm(q.float() * scale, part.keys.float().transpose(1, 2))
    scores += part.sink if bias is None else bias
    log = torch.logsumexp(scores, dim=-1)
    return torch.bmm(torch.softmax(scores, dim=-1), part.values.float()), log


def _spread(bias: torch.Tensor, part: _Folded) -> torch.Tensor:
    """[S, C] bias to the columns of the folded keys [C, n], log P added at the pads."""
    pieces = []
    for s, keys, log_pads in part.spans:
        column = bias[s][:, None]
        pieces += [column.expand(-1, keys)] if log_pads is None else [column.expand(-1, keys), column + log_pads]
    return torch.cat(pieces, dim=1)


def _add_mask(mask: torch.Tensor, bias: torch.Tensor | None, part: _Folded) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias [H or nothing, C, n] with the extra mask [H, C, Nk] of the keys, and which rows it empties.

    Emptied rows get bias 0, so that nothing is NaN; the caller zeroes their result."""
    if mask.stride(0) == 0:
        mask = mask[0]
    mask = mask[..., part.rows.clamp(min=0)]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    mask = mask.float().masked_fill(part.rows < 0, 0)
    bias = mask + (part.sink if bias is None else bias)
    empty = (bias == -torch.inf).all(dim=-1)
    return bias.masked_fill(empty[..., None], 0), empty


def _fold(
    k: torch.Tensor,
    v: torch.Tensor,
    segments: tuple[int, ...],
    numbers: tuple[int, ...],
    heads: int,
    dtype: torch.dtype,
) -> _Folded:
    """K and V of some segments, `[Hk, Nk, D]`, each segment's pads as one zero key."""
    zero = k.new_zeros(1, 1, 1).expand(k.shape[0], 1, k.shape[2])
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for s in segments:
        start, end, pads = numbers[3 * s : 3 * s + 3]
        keys += [k[:, start:end], zero] if pads else [k[:, start:end]]
        values += [v[:, start:end], zero] if pads else [v[:, start:end]]
    key, value = torch.cat(keys, dim=1).to(dtype), torch.cat(values, dim=1).to(dtype)
    group = heads // k.shape[0]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    return _Folded(key, value, *_columns(segments, numbers, k.device))


@functools.lru_cache(maxsize=256)
def _columns(
    segments: tuple[int, ...], numbers: tuple[int, ...], device: torch.device
) -> tuple[tuple[tuple[int, int, float | None], ...], torch.Tensor, torch.Tensor]:
    """spans, rows and sink of `_Folded`; kept, so that a call copies nothing to the device."""
    spans: list[tuple[int, int, float | None]] = []
    rows: list[int] = []
    sink: list[float] = []
    for s in segments:
        start, end, pads = numbers[3 * s : 3 * s + 3]
        log_pads = math.log(pads) if pads else None
        spans.append((s, end - start, log_pads))
        rows += range(start, end)
        sink += [0.0] * (end - start)
        if log_pads is not None:
            rows.append(-1)
            sink.append(log_pads)
    return tuple(spans), torch.tensor(rows, device=device), torch.tensor(sink, device=device)


def _read(what: torch.Tensor, where: slice | torch.Tensor) -> torch.Tensor:
    """Rows of [H, Nq, D]; whole rows of the usual memory [Nq, H, D] are six times faster to gather."""
    if isinstance(where, slice):
        return what[:, where]
    return what.transpose(0, 1).index_select(0, where).transpose(0, 1)


def _write(to: torch.Tensor, where: slice | torch.Tensor, what: torch.Tensor | None) -> None:
    assert what is not None
    if isinstance(where, slice):
        to[:, where] = what
    else:
        to.index_copy_(1, where, what.to(to.dtype))


def _width(numbers: tuple[int, ...], s: int) -> int:
    """Keys of segment s, its pads as one."""
    start, end, pads = numbers[3 * s : 3 * s + 3]
    return end - start + (pads > 0)


@functools.lru_cache(maxsize=64)
def _groups(flat: tuple[int, ...], plan: int, numbers: tuple[int, ...]) -> tuple[_Group, ...]:
    """The groups of one plan, small ones merged with their neighbour."""
    merged: list[_Group] = []
    for owner, start, end, same, segments in iterate_groups(flat):
        if owner != plan:
            continue
        group = _Group(start, end, same, segments)
        while merged:
            last = merged[-1]
            union = tuple(sorted({*last.segments, *group.segments}))
            total = sum(_width(numbers, s) for s in union)
            extra = sum(
                (g.end - g.start) * (total - sum(_width(numbers, s) for s in g.segments)) for g in (last, group)
            )
            if extra > _MERGE_PAIRS:
                break
            flat_union = last.flat and group.flat and last.segments == group.segments
            group = _Group(last.start, group.end, flat_union, union)
            merged.pop()
        merged.append(group)
    return tuple(merged)
