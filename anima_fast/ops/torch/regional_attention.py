"""Regional attention in plain torch: what people without Triton or a compiler get, on any device.

Queries are taken in the plan's groups of one allowed set (one group, the image, where nothing is excluded), and
a group in chunks; only the keys of its allowed segments are read. The pads of a segment are folded into one
zero key whose bias is log P: exp(b + log P) = P e^b is exactly what P zero keys add, and its value is zero.

    K_s = [k_s; 0], V_s = [v_s; 0]             [H, n + 1, D], once a group
    logit   softmax(scale·q [K_1 … K_S]ᵀ + b) [V_1 … V_S]       per chunk of queries
    blend   Σ_s w_s softmax(scale·q K_sᵀ + (0 … log P)) V_s

On a CPU this is two batched matmuls around a softmax in place, in fp32, on at most `_CPU_SCORES` scores; on
other devices torch's scaled_dot_product_attention with the bias of a chunk as its mask. The largest temporary
does not grow with Nq.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...plan import PlanTensors, iterate_groups

# Scores of one chunk, H·C·n: 2 MiB of fp32 stays in a CPU's caches.
_CPU_SCORES = 512 * 1024
# Mask entries of one chunk, C·n, on other devices: larger chunks fill their cores.
_DEVICE_MASK = 4 * 1024 * 1024

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

    keys [H, D, n]; values [H, n, D]; rows: which rows of k they are (-1: pads); owner [n]: their segment;
    sink [n]: log P at the pads, else 0; sinks: the same as (column, log P).
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    owner: torch.Tensor
    sink: torch.Tensor
    sinks: tuple[tuple[int, float], ...]


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
    attend = _attend_matmul if matmuls else _attend_sdpa
    compute = torch.float32 if matmuls else q.dtype
    size = plan.segments.shape[1]
    for row, index in enumerate(plan.plan_index_host):
        numbers = plan.segments_host[3 * size * index : 3 * size * (index + 1)]
        bias = plan.bias[index] if plan.bias.shape[2] else None
        for group in _groups(plan.groups_host, index, numbers):
            parts = [group.segments] if combine == "logit" else [(s,) for s in group.segments]
            folded = [_fold(k[row], v[row], part, numbers, q.shape[1], compute) for part in parts]
            if matmuls:  # in fp32, where it costs no accuracy: once here instead of in every chunk
                folded = [part._replace(keys=part.keys * scale) for part in folded]
            widest = max(part.keys.shape[2] for part in folded)
            chunk = max(16, _CPU_SCORES // (q.shape[1] * widest) if matmuls else _DEVICE_MASK // widest)
            for start in range(group.start, group.end, chunk):
                end = min(start + chunk, group.end)
                where = plan.order[index, start:end].long() if plan.order.shape[1] else slice(start, end)
                queries = q[row][:, where].to(compute)
                in_place = isinstance(where, slice) and out.dtype == compute and len(parts) == 1
                result = out[row][:, where] if in_place else torch.empty_like(queries)
                log = None
                for i, (segments, part) in enumerate(zip(parts, folded, strict=True)):
                    added = None
                    if combine == "logit" and bias is not None and not group.flat:
                        added = bias[:, where].T[:, part.owner] + part.sink
                    empty = None
                    if mask is not None:
                        added, empty = _add_mask(mask[row][:, where], added, part)
                    to = result if i == 0 else torch.empty_like(result)
                    log = attend(queries, part, added, scale, to, lse is not None)
                    if empty is not None:
                        to.masked_fill_(empty[..., None], 0)
                        log = None if log is None else log.masked_fill(empty, -torch.inf)
                    if combine == "blend" and bias is not None and len(parts) > 1:
                        to *= bias[segments[0]][where][:, None].to(to.dtype)
                    if i > 0:
                        result += to
                if not in_place:
                    _write(out[row], where, result)
                if lse is not None:
                    _write(lse[row], where, log)


def _prefers_matmuls(device: torch.device) -> bool:
    """Two matmuls beat torch's fused attention on a CPU (1.2x there), and not on a device with fused kernels."""
    return device.type == "cpu"


def workspace_bytes(q: torch.Tensor, plan: PlanTensors, *, combine: str) -> int:
    """Bytes of temporaries of a call, at most: one group's keys and values, and a chunk's scores and results."""
    heads, head_dim = q.shape[1], q.shape[3]
    size, most = plan.segments.shape[1], 0
    for index in set(plan.plan_index_host):
        numbers = plan.segments_host[3 * size * index : 3 * size * (index + 1)]
        for group in _groups(plan.groups_host, index, numbers):
            n = sum(_width(numbers, s) for s in group.segments)
            widest = n if combine == "logit" else max(_width(numbers, s) for s in group.segments)
            chunk = min(max(16, _CPU_SCORES // (heads * widest)), group.end - group.start)
            most = max(most, 2 * heads * n * head_dim + heads * chunk * (widest + 4 * head_dim) + chunk * widest)
    return 4 * most


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[tuple[int, float], ...]]:
    """The rows, owner, sink and sinks of `_Folded`; kept, so that a call copies nothing to the device."""
    rows: list[int] = []
    owner: list[int] = []
    sinks: list[tuple[int, float]] = []
    for s in segments:
        start, end, pads = numbers[3 * s : 3 * s + 3]
        rows += range(start, end)
        if pads:
            sinks.append((len(rows), math.log(pads)))
            rows.append(-1)
        owner += [s] * (len(rows) - len(owner))
    sink = torch.zeros(len(rows))
    for column, log_pads in sinks:
        sink[column] = log_pads
    return torch.tensor(rows, device=device), torch.tensor(owner, device=device), sink.to(device), tuple(sinks)


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
