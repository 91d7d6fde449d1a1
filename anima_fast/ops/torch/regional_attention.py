"""Regional attention in plain torch: what people without Triton or a compiler get, on any device.

Queries are taken in the plan's groups of one allowed set (one group, the image, where nothing is excluded), and
a group in chunks; only the keys of its allowed segments are read. The pads of a segment are folded into one
zero key whose bias is log P: exp(b + log P) = P e^b is exactly what P zero keys add, and its value is zero.

    K_s = [k_s; 0], V_s = [v_s; 0]             [H, n + 1, D], once a group
    logit   softmax(scale·q [K_1 … K_S]ᵀ + b) [V_1 … V_S]       per chunk of queries
    blend   Σ_s w_s softmax(scale·q K_sᵀ + (0 … log P)) V_s

On a CPU this is two batched matmuls around a softmax in place, in fp32, a few heads at a time; on other devices
torch's scaled_dot_product_attention with the bias of a chunk as its mask. The largest temporary does not grow
with Nq.
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

    keys [H, D, n]; values [H, n, D]; rows [n]: which rows of k they are (-1: pads); log_pads [S]: log P of every
    segment of the plan; owner [n]: their row of [bias; bias + log_pads]; sink [n]: log P at the pads, else 0;
    sinks: the same as (column, log P).
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    owner: torch.Tensor
    log_pads: torch.Tensor
    sink: torch.Tensor
    sinks: tuple[tuple[int, float], ...]


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
    matmuls = _prefers_matmuls(q.device) or lse is not None
    for row, index in enumerate(plan.plan_index_host):
        for heads, kv_heads in _head_blocks(q.shape[1], k.shape[1], matmuls):
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
                _attend_group(rows, group, scale, combine, matmuls)


def _attend_group(rows: _Rows, group: _Group, scale: float, combine: str, matmuls: bool) -> None:
    """The queries of one group, chunk by chunk."""
    compute = torch.float32 if matmuls else rows.q.dtype
    attend = _attend_matmul if matmuls else _attend_sdpa
    parts = _parts(group, combine)
    folded = [_fold(rows.k, rows.v, part, rows.numbers, rows.q.shape[0], compute) for part in parts]
    if matmuls:  # in fp32, where it costs no accuracy: once here instead of in every chunk
        for part in folded:
            part.keys.mul_(scale)
    in_place = rows.order is None and rows.out.dtype == compute and len(parts) == 1
    chunk = _chunk(rows.q, rows.numbers, group, parts, matmuls, in_place)
    for start in range(group.start, group.end, chunk):
        end = min(start + chunk, group.end)
        where = slice(start, end) if rows.order is None else rows.order[start:end].long()
        queries = rows.q[:, where].to(compute)
        result = rows.out[:, where] if in_place else torch.empty_like(queries)
        log = None
        for i, (segments, part) in enumerate(zip(parts, folded, strict=True)):
            added = None
            if combine == "logit" and rows.bias is not None and not group.flat:
                added = _spread(rows.bias[:, where], part)
            empty = None
            if rows.mask is not None:
                added, empty = _add_mask(rows.mask[:, where], added, part)
            to = result if i == 0 else torch.empty_like(result)
            log = attend(queries, part, added, scale, to, rows.lse is not None)
            if empty is not None:
                to.masked_fill_(empty[..., None], 0)
                log = None if log is None else log.masked_fill(empty, -torch.inf)
            if combine == "blend" and rows.bias is not None and len(parts) > 1:
                to *= rows.bias[segments[0]][where][:, None].to(to.dtype)
            if i > 0:
                result += to
        if not in_place:
            _write(rows.out, where, result)
        if rows.lse is not None:
            _write(rows.lse, where, log)


def _prefers_matmuls(device: torch.device) -> bool:
    """Two matmuls beat torch's fused attention on a CPU, in time and memory; elsewhere it has fused kernels."""
    return device.type == "cpu"


def _head_blocks(heads: int, kv_heads: int, matmuls: bool) -> list[tuple[slice, slice]]:
    """The heads of q and of k that are taken together."""
    group = heads // kv_heads
    step = max(1, _CPU_HEADS // group) if matmuls else kv_heads
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
    matmuls: bool,
    in_place: bool,
) -> int:
    """Queries of one chunk, so that its scores, its bias and copies of q and of the results fit the budget; and so
    that the chunks of the group are alike."""
    widest = max(sum(_width(numbers, s) for s in part) for part in parts)
    copies = 0 if in_place else 2 if len(parts) == 1 else 3
    size = q.shape[0] * (widest + copies * q.shape[-1]) + 2 * widest
    most = max(16, _CPU_CHUNK // size if matmuls else _DEVICE_CHUNK // widest)
    queries = group.end - group.start
    return -(-queries // -(-queries // most))


def workspace_bytes(q: torch.Tensor, plan: PlanTensors, *, combine: str) -> int:
    """Bytes of temporaries of a call on a CPU, at most: some heads' keys and values, and a chunk's scores, bias and
    results."""
    most = 0
    heads, _ = _head_blocks(q.shape[1], q.shape[1], True)[0]
    some = q[0, heads]
    for index in set(plan.plan_index_host):
        numbers = _numbers(plan, index)
        for group in _groups(plan.groups_host, index, numbers):
            parts = _parts(group, combine)
            keys = sum(_width(numbers, s) for s in group.segments)
            widest = max(sum(_width(numbers, s) for s in part) for part in parts)
            in_place = plan.order.shape[1] == 0 and q.dtype == torch.float32 and len(parts) == 1
            chunk = _chunk(some, numbers, group, parts, True, in_place)
            copies = 0 if in_place else 3
            scores = some.shape[0] * (widest + copies * q.shape[3]) + 2 * widest
            most = max(most, 2 * some.shape[0] * keys * q.shape[3] + chunk * scores)
    return 4 * most + 64 * 1024  # and small change: column numbers, a chunk of the order


def _numbers(plan: PlanTensors, index: int) -> tuple[int, ...]:
    """start, end, pads of each segment of one plan, flat."""
    size = 3 * plan.segments.shape[1]
    return plan.segments_host[size * index : size * (index + 1)]


def _attend_matmul(
    q: torch.Tensor, part: _Folded, bias: torch.Tensor | None, scale: float, out: torch.Tensor, want_log: bool
) -> torch.Tensor | None:
    """Write [H, C, D] by two matmuls around a softmax in place; return the log of the denominator. The keys
    are scaled already."""
    scores = torch.bmm(q, part.keys)
    if bias is not None:
        scores += bias
    else:
        for column, log_pads in part.sinks:  # a zero key scores 0
            scores[..., column] = log_pads
    log = torch.logsumexp(scores, dim=-1) if want_log else None
    torch.softmax(scores, dim=-1, out=scores)
    torch.bmm(scores, part.values, out=out)
    return log


def _attend_sdpa(
    q: torch.Tensor, part: _Folded, bias: torch.Tensor | None, scale: float, out: torch.Tensor, want_log: bool
) -> None:
    """Write [H, C, D] by torch's fused attention, which keeps no log of the denominator."""
    if bias is None and part.sinks:
        bias = part.sink.expand(q.shape[1], -1)
    mask = None if bias is None else bias.to(q.dtype).contiguous()[(None,) * (4 - bias.ndim)]
    attention = torch.nn.functional.scaled_dot_product_attention
    keys = part.keys.transpose(1, 2)
    out.copy_(attention(q[None], keys[None], part.values[None], attn_mask=mask, scale=scale)[0])


def _spread(bias: torch.Tensor, part: _Folded) -> torch.Tensor:
    """[S, C] bias to the columns of the folded keys [C, n], log P added at the pads."""
    with_pads = torch.cat([bias, bias + part.log_pads[:, None]])  # [2S, C] is small; so one pass makes the result
    return with_pads.T[:, part.owner]


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
    return _Folded(key.transpose(1, 2), value, *_columns(segments, numbers, k.device))


@functools.lru_cache(maxsize=256)
def _columns(
    segments: tuple[int, ...], numbers: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[tuple[int, float], ...]]:
    """rows, owner, log_pads, sink and sinks of `_Folded`; kept, so that a call copies nothing to the device."""
    rows: list[int] = []
    owner: list[int] = []
    sinks: list[tuple[int, float]] = []
    for s in segments:
        start, end, pads = numbers[3 * s : 3 * s + 3]
        rows += range(start, end)
        owner += [s] * (end - start)
        if pads:
            sinks.append((len(rows), math.log(pads)))
            rows.append(-1)
            owner.append(len(numbers) // 3 + s)
    log_pads = torch.tensor(numbers[2::3], dtype=torch.float32).log()
    sink = torch.zeros(len(rows))
    for column, value in sinks:
        sink[column] = value
    place = functools.partial(torch.Tensor.to, device=device)
    return place(torch.tensor(rows)), place(torch.tensor(owner)), place(log_pads), place(sink), tuple(sinks)


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
