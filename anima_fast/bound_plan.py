"""BoundPlan: a region plan for one token grid, in the form that backends read.

For each of P plans and S segments it holds a number per query: a bias (logit) or a weight (blend). Everything that
depends on the data is prepared here, once, so that a call neither syncs nor sorts: which segments a query may attend
to, the order of queries in which those with one allowed set are adjacent (so that kernels skip whole tiles), and the
runs of that order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .checks import check_grid, check_segments
from .errors import invalid, wrong_type
from .files import load_plan, save_plan

__all__ = ["COMBINE", "BoundPlan", "PlanTensors", "bind_rows", "iterate_groups"]

COMBINE = ("logit", "blend")

Range = tuple[int, int]

# Finite biases below this are raised to it: e^b is 0 either way, and kernels may multiply by log2 e.
_LOWEST_BIAS = -1e30


class PlanTensors(NamedTuple):
    """What a backend receives: P plans of S segments for Nq queries, and which plan each row uses.

    bias           [P, S, Nq] float32, or [P, S, 0] where nothing is biased. logit: additive, natural log,
                   -inf excludes a segment, never all of them. blend: weights, each query's sum is 1.
    order          [P, Nq] int32: queries sorted by the set of segments they may attend to; [P, 0] where no
                   query excludes any.
    segments       [P, S, 3] int32 on the device: start, end, pads. (0, 0, 0) is an absent segment.
    plan_index     [B] int32 on the device.
    segments_host, plan_index_host   the same numbers as flat tuples.
    groups_host    runs of `order` with one allowed set, flat: plan, start, end, flat, n, n segments;
                   flat = 1 where every allowed segment has bias 0.
    """

    bias: torch.Tensor
    order: torch.Tensor
    segments: torch.Tensor
    plan_index: torch.Tensor
    segments_host: tuple[int, ...]
    plan_index_host: tuple[int, ...]
    groups_host: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BoundPlan:
    """A plan for one token grid, ready for `regional_attention`. Made by `RegionPlan.bind`,
    `RegionPlan.from_bias` or `BoundPlan.batch`; fields as in `PlanTensors`.

    `plan_index` of length 1 serves a batch of any size; else its length is the batch size.
    """

    grid: tuple[int, int, int]
    combine: str
    tensors: PlanTensors

    @functools.cached_property
    def queries(self) -> int:
        """Nq = T·Ht·Wt."""
        return math.prod(self.grid)

    @property
    def device(self) -> torch.device:
        return self.tensors.segments.device

    @property
    def plans(self) -> int:
        """P, the number of different layouts."""
        return self.tensors.segments.shape[0]

    @property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(start, end, pads) of each segment, plan after plan."""
        flat = self.tensors.segments_host
        return tuple((flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3))

    @functools.cached_property
    def context_length(self) -> int:
        """Rows of k that the plan needs: its largest range end."""
        return max(end for _, end, _ in self.segments)

    @staticmethod
    def batch(plans: Sequence[BoundPlan], plan_index: Sequence[int]) -> BoundPlan:
        """One plan for a batch whose row b uses `plans[plan_index[b]]`: different layouts an image, or
        unconditional rows (`RegionPlan.plain`).

        All plans have one grid and one `combine`; a plan of a single unbiased prompt fits both.

        Example:
            >>> uncond = RegionPlan.plain(20, pad_count=492).bind((1, 64, 64))
            >>> BoundPlan.batch([uncond, regions], [0, 1])      # ComfyUI's order: uncond first
        """
        if not plans:
            raise invalid("plans", "an empty sequence", "at least one bound plan")
        for i, plan in enumerate(plans):
            if not isinstance(plan, BoundPlan):
                raise wrong_type(f"plans[{i}]", plan, "a BoundPlan (RegionPlan.bind makes one)")
            if plan.plans != 1:
                raise invalid(f"plans[{i}]", f"a batch of {plan.plans} plans", "single plans")
            if plan.grid != plans[0].grid:
                raise invalid(f"plans[{i}]", f"grid {plan.grid}", f"{plans[0].grid}, the grid of plans[0]")
            if plan.device != plans[0].device:
                raise invalid(f"plans[{i}]", f"device {plan.device}", f"{plans[0].device}, as plans[0]")
        index = tuple(int(i) for i in plan_index)
        if not index or not all(0 <= i < len(plans) for i in index):
            raise invalid("plan_index", str(list(plan_index)), f"one number from 0 to {len(plans) - 1} a row")
        modes = {plan.combine for plan in plans if not plan._is_plain()}
        if len(modes) > 1:
            raise invalid("plans", "both combine='logit' and 'blend'", "one combine in a batch")
        combine = modes.pop() if modes else "logit"
        if combine == "logit" and not any(plan.tensors.bias.shape[2] for plan in plans):
            return _stack(plans, index, combine, biased=False)
        return _stack(plans, index, combine, biased=True)

    def to(self, device: torch.device | str) -> BoundPlan:
        """The plan with its tensors on `device`."""
        t = self.tensors
        moved = t._replace(
            bias=t.bias.to(device),
            order=t.order.to(device),
            segments=t.segments.to(device),
            plan_index=t.plan_index.to(device),
        )
        return dataclasses.replace(self, tensors=moved)

    def estimate_bytes(
        self,
        *,
        batch: int = 1,
        heads: int = 16,
        head_dim: int = 128,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> int:
        """Bytes that one attention call needs beyond q, k, v and the output: the plan's tensors and the
        backend's workspace (default: the backend such a call would get on the plan's device)."""
        from .attention import workspace_bytes

        tensors = sum(x.numel() * x.element_size() for x in self.tensors[:4])
        return tensors + workspace_bytes(
            self, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, backend=backend
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bound plan as one safetensors file with JSON metadata; whole or not at all."""
        t = self.tensors
        fields = {
            "grid": self.grid,
            "combine": self.combine,
            "segments": self.segments,
            "plan_index": t.plan_index_host,
        }
        bias = t.bias if t.bias.shape[2] else t.bias.new_zeros(*t.bias.shape[:2], 0)
        save_plan(path, "BoundPlan", fields, {"bias": bias.cpu().contiguous()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BoundPlan:
        """Read what `save` wrote, with every value checked again.

        Raises FileNotFoundError; ValueError for a malformed file or one of another version.
        """
        fields, tensors = load_plan(path, "BoundPlan")
        problem = None
        try:
            grid = check_grid("grid", fields["grid"])
            bias, flat = tensors["bias"].float(), fields["segments"]
            count, size = bias.shape[0], bias.shape[1]
            if fields["combine"] not in COMBINE or len(flat) != count * size or size == 0:
                raise KeyError("combine or segments")
            if bias.shape[2] not in (0, math.prod(grid)) or bool((bias.isnan() | (bias == math.inf)).any()):
                raise KeyError("bias")
            if fields["combine"] == "blend" and bool((bias < 0).any()):
                raise KeyError("bias")
            plans = []
            for p in range(count):
                segments = [(int(a), int(b), int(c)) for a, b, c in flat[p * size : (p + 1) * size]]
                check_segments(segments, [f"segments[{i}]" for i in range(size)])
                rows = bias[p] if bias.shape[2] else bias.new_zeros(size, math.prod(grid))
                plans.append(bind_rows(rows, segments, fields["combine"], grid))
            index = [int(i) for i in fields["plan_index"]]
            return plans[0] if count == 1 and index == [0] else cls.batch(plans, index)
        except (KeyError, TypeError, IndexError) as error:
            problem = error
        raise invalid("path", f"{str(path)!r}, whose content does not fit ({problem})", "a saved plan")

    def __repr__(self) -> str:
        t = self.tensors
        frames, height, width = self.grid
        lines = [
            f"BoundPlan(grid {frames} x {height} x {width} = {self.queries} queries, {self.combine}, "
            f"{self.plans} plan{'s' * (self.plans > 1)}, rows {list(t.plan_index_host)}, {self.device})"
        ]
        size = t.segments.shape[1]
        for p in range(self.plans):
            for s, (start, end, pads) in enumerate(self.segments[p * size : (p + 1) * size]):
                if start == end and not pads:
                    continue
                text = "unbiased"
                if t.bias.shape[2]:
                    row = t.bias[p, s]
                    kept = row > (0 if self.combine == "blend" else -math.inf)
                    name = "weight" if self.combine == "blend" else "bias"
                    text = f"{100 * float(kept.float().mean()):.1f} % of the queries"
                    if bool(kept.any()):
                        text += f", {name} {float(row[kept].min()):.4g} to {float(row[kept].max()):.4g}"
                lines.append(f"  plan {p} segment {s}: tokens [{start}, {end}) + {pads} pads, {text}")
        return "\n".join(lines)

    def _is_plain(self) -> bool:
        """One present segment, so that logit and blend are the same."""
        return sum(end > start or pads > 0 for start, end, pads in self.segments) == 1


def bind_rows(
    rows: torch.Tensor, segments: Sequence[tuple[int, int, int]], combine: str, grid: tuple[int, int, int]
) -> BoundPlan:
    """A single bound plan from `[S, Nq]` bias (logit) or unnormalised weights (blend)."""
    rows = rows.float().clone()
    present = torch.tensor([end > start or pads > 0 for start, end, pads in segments])
    if not bool(present.any()):
        raise invalid("token_ranges", "no tokens and no pads in any segment", "a context that is not empty")
    nothing = 0.0 if combine == "blend" else -math.inf
    rows[~present] = nothing
    rows = torch.where(rows < _LOWEST_BIAS, torch.where(rows == -math.inf, rows, _LOWEST_BIAS), rows)
    lost = (rows == nothing).all(dim=0)  # excluded by every segment: attends to all, unbiased
    rows[:, lost] = torch.where(present, float(combine == "blend"), nothing)[:, None]
    if combine == "blend":
        rows /= rows.sum(dim=0)
    if int(present.sum()) == 1:  # a constant bias over one softmax cancels
        combine, nothing = "logit", -math.inf
        rows[present] = 0
        rows[~present] = nothing
    live = rows != nothing
    order, runs = _sort_by_allowed_set(live)
    groups: list[int] = []
    for start, end in runs:
        first = int(order[start]) if len(order) else start
        allowed = live[:, first].nonzero().flatten().tolist()
        members = order[start:end].long() if len(order) else slice(start, end)
        flat = combine == "logit" and not bool(rows[allowed][:, members].any())
        groups += [0, start, end, int(flat), len(allowed), *allowed]
    biased = combine == "blend" or bool((rows[present] != 0).any())
    rows = rows.contiguous() if biased else rows[:, :0].contiguous()
    flat_segments = [x for segment in segments for x in segment]
    tensors = PlanTensors(
        bias=rows[None],
        order=order[None],
        segments=torch.tensor(flat_segments, dtype=torch.int32).view(1, -1, 3),
        plan_index=torch.zeros(1, dtype=torch.int32),
        segments_host=tuple(flat_segments),
        plan_index_host=(0,),
        groups_host=tuple(groups),
    )
    return BoundPlan(grid=grid, combine=combine, tensors=tensors)


def _sort_by_allowed_set(live: torch.Tensor) -> tuple[torch.Tensor, list[Range]]:
    """Permutation (int32; empty if identity serves) that makes queries of one allowed set adjacent, in
    raster order within a set, and the runs [start, end) of it that share a set. `live` is bool [S, Nq]."""
    queries = live.shape[1]
    code = torch.zeros(queries, dtype=torch.int64)
    for rows in live.split(62):  # 62 segments a pass, so that a set's number fits an int64
        bits = (rows.long() << torch.arange(len(rows))[:, None]).sum(dim=0)
        _, high = torch.unique(code, return_inverse=True)
        _, low = torch.unique(bits, return_inverse=True)
        code = high * (int(low.max()) + 1) + low
    order = torch.argsort(code, stable=True)
    _, counts = torch.unique_consecutive(code[order], return_counts=True)
    if len(counts) == 1:
        return torch.zeros(0, dtype=torch.int32), [(0, queries)]
    ends = counts.cumsum(0).tolist()
    return order.int(), list(zip([0, *ends[:-1]], ends, strict=True))


def _stack(plans: Sequence[BoundPlan], index: tuple[int, ...], combine: str, biased: bool) -> BoundPlan:
    """P single plans side by side; shorter ones get absent segments."""
    first = plans[0]
    size = max(plan.tensors.segments.shape[1] for plan in plans)
    nothing = 0.0 if combine == "blend" else -math.inf
    ordered = any(plan.tensors.order.shape[1] for plan in plans)
    bias, order, segments, host, groups = [], [], [], [], []
    for p, plan in enumerate(plans):
        t = plan.tensors
        missing = size - t.segments.shape[1]
        rows = t.bias[0]
        if biased and not rows.shape[1]:  # an unbiased plan among biased ones
            kept = t.segments[0, :, 1:].sum(dim=1) > 0
            value = 1.0 if combine == "blend" else 0.0
            rows = torch.where(kept, value, nothing)[:, None].expand(-1, first.queries)
        elif biased and combine == "blend" and plan.combine == "logit":
            rows = torch.where(rows == 0, 1.0, 0.0)
        bias.append(torch.nn.functional.pad(rows, (0, 0, 0, missing), value=nothing))
        identity = torch.arange(first.queries, dtype=torch.int32, device=first.device)
        order.append(t.order[0] if t.order.shape[1] or not ordered else identity)
        segments.append(torch.nn.functional.pad(t.segments[0], (0, 0, 0, missing)))
        host += [*t.segments_host, *[0] * (3 * missing)]
        for _, start, end, flat, allowed in iterate_groups(t.groups_host):
            flat = flat and combine == "logit"
            groups += [p, start, end, int(flat), len(allowed), *allowed]
    tensors = PlanTensors(
        bias=torch.stack(bias).contiguous(),
        order=torch.stack(order).contiguous(),
        segments=torch.stack(segments).contiguous(),
        plan_index=torch.tensor(index, dtype=torch.int32, device=first.device),
        segments_host=tuple(host),
        plan_index_host=index,
        groups_host=tuple(groups),
    )
    return BoundPlan(grid=first.grid, combine=combine, tensors=tensors)


def iterate_groups(flat: Sequence[int]) -> list[tuple[int, int, int, bool, tuple[int, ...]]]:
    """`PlanTensors.groups_host` as (plan, start, end, flat, allowed segments) records."""
    groups = []
    position = 0
    while position < len(flat):
        plan, start, end, same, count = flat[position : position + 5]
        position += 5 + count
        groups.append((plan, start, end, bool(same), tuple(flat[position - count : position])))
    return groups
