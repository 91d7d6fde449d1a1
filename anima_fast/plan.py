"""RegionPlan: masks and token ranges -> what regional attention needs.

A context of Nk rows holds one contiguous range of rows for each prompt (a *segment*: R regions and
optionally a base prompt) and a pad count for each. A `RegionPlan` says where each prompt counts, at no
particular resolution; `bind((T, Ht, Wt))` turns it into a `BoundPlan` for Nq = T·Ht·Wt image tokens:

    combine="logit"   one softmax over all segments; segment r of query i has the bias (natural log)
                        soft_log   b_r(i) = s_r · log(max(w_r(i), eps))
                        hard       b_r(i) = 0 where w_r(i) > 0.5, else excluded (or s_r · hard_value)
                      with s_r = strength · region_strengths[r]; s_r = 0 means no bias
    combine="blend"   one softmax a segment, mixed by ŵ_r(i): u_r = s_r · w_r (hard: w_r > 0.5),
                      base max(base_weight, 1 - Σ u_r), normalised to sum 1

w_r is the mask on the token grid (`masks.resample`), divided by max(1, Σ w) with `normalize_overlaps`.
The base prompt's bias is 0 with `base_always_allowed`; else 0 where Σ w <= eps (`unmasked_to_base`) and
the mode's lowest value elsewhere. A query that every segment excludes attends to all of them unbiased.

Pads are zero rows of K and V (Anima pads every prompt to 512 rows and attends to them): P pads of segment
r add P · exp(b_r(i)) to the softmax denominator and nothing to the numerator. `pads="fold"` adds just that
term, `pads="strip"` leaves it out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import invalid, wrong_type
from .files import write_atomic
from .masks import RESAMPLE, load_mask, resample

__all__ = ["BoundPlan", "PlanTensors", "RegionPlan"]

MODES = ("soft_log", "hard")
COMBINE = ("logit", "blend")
PADS = ("fold", "strip")

_FORMAT_VERSION = 1

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RegionPlan:
    """Which prompt counts where, at no particular resolution. Made by `from_masks` or `plain`."""

    masks: tuple[torch.Tensor, ...]
    token_ranges: tuple[Range, ...]
    pad_counts: tuple[int, ...]
    base_range: Range | None
    base_pad_count: int
    mode: str
    eps: float
    strength: float
    region_strengths: tuple[float, ...]
    hard_value: float | None
    normalize_overlaps: bool
    base_always_allowed: bool
    unmasked_to_base: bool
    base_weight: float
    resample: str
    combine: str
    pads: str
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @classmethod
    def from_masks(
        cls,
        masks: Sequence[Any],
        token_ranges: Sequence[Sequence[int]],
        *,
        pad_counts: Sequence[int] | None = None,
        base_range: Sequence[int] | None = None,
        base_pad_count: int = 0,
        mode: str = "soft_log",
        eps: float = 1e-4,
        strength: float = 1.0,
        region_strengths: Sequence[float] | None = None,
        priorities: Sequence[float] | None = None,
        hard_value: float | None = None,
        normalize_overlaps: bool = True,
        base_always_allowed: bool = True,
        unmasked_to_base: bool = True,
        base_weight: float = 0.0,
        resample: str = "area",
        combine: str = "logit",
        pads: str = "fold",
    ) -> RegionPlan:
        """A plan from one mask and one range of context rows for each region.

        Args:
            masks: R masks: tensors, arrays, PIL images or paths (`masks.load_mask`), each of any size.
            token_ranges: R pairs [start, end) of rows of k; they may not overlap; empty is allowed.
            pad_counts: R counts of zero rows that belong to each prompt, wherever they lie (default 0).
            base_range, base_pad_count: the base prompt's rows and pads; None: no base prompt.
            mode: "soft_log" or "hard".
            eps: floor of a weight, 0 < eps <= 1.
            strength: factor of every region's bias (blend: weight), >= 0.
            region_strengths: one more factor a region, >= 0.
            priorities: a higher one takes its pixels from the lower ones: r_low · Π (1 - r_high), on the
                masks brought to one size. Equal priorities share.
            hard_value: hard mode's finite bias (<= 0) instead of exclusion; it is scaled by the strength.
            normalize_overlaps: divide the weights of a token by max(1, their sum).
            base_always_allowed: the base prompt has no bias anywhere (logit).
            unmasked_to_base: else, it is unbiased where no region counts (logit).
            base_weight: least weight of the base prompt (blend), >= 0.
            resample: "area", "bilinear", "nearest" or "max".
            combine: "logit" (one softmax) or "blend" (Attention Couple).
            pads: "fold" (same result as the padded model) or "strip" (leave pads out; changes the result).

        Raises:
            TypeError, ValueError, FileNotFoundError: naming the argument, what came and what is allowed.

        Example:
            >>> left = torch.zeros(64, 64); left[:, :32] = 1
            >>> plan = RegionPlan.from_masks([left, 1 - left], [(0, 77), (77, 154)], pad_counts=[435, 435])
            >>> plan.bind((1, 64, 64)).grid
            (1, 64, 64)
        """
        if isinstance(masks, (str, bytes)) or not isinstance(masks, (Sequence, torch.Tensor)):
            raise wrong_type("masks", masks, "a sequence of masks")
        loaded = [load_mask(mask, f"masks[{index}]") for index, mask in enumerate(masks)]
        count = len(loaded)
        ranges = _ranges("token_ranges", token_ranges, count)
        base = None if base_range is None else _ranges("base_range", [base_range], 1)[0]
        if count == 0 and base is None:
            raise invalid("masks", "no region and no base prompt", "at least one region or a base_range")
        if base is None and base_pad_count:
            raise invalid("base_pad_count", f"{base_pad_count} without a base_range", "0 without a base prompt")
        for name, value, allowed in (
            ("mode", mode, MODES),
            ("resample", resample, RESAMPLE),
            ("combine", combine, COMBINE),
            ("pads", pads, PADS),
        ):
            if value not in allowed:
                raise invalid(name, repr(value), " | ".join(map(repr, allowed)))
        eps = _number("eps", eps, "0 < eps <= 1", lambda x: 0 < x <= 1)
        at_least_0 = ("a finite number >= 0", lambda x: x >= 0)
        strengths = _per_region("region_strengths", region_strengths, count, 1.0)
        counts = _per_region("pad_counts", pad_counts, count, 0)
        if hard_value is not None:
            if mode != "hard":
                raise invalid("hard_value", f"{hard_value} with mode={mode!r}", "None unless mode='hard'")
            hard_value = _number("hard_value", hard_value, "a finite number <= 0", lambda x: x <= 0)
        if priorities is not None:
            order = [
                _number(f"priorities[{i}]", p, "a finite number", lambda x: True)
                for i, p in enumerate(_per_region("priorities", priorities, count, 0.0))
            ]
            loaded = _apply_priorities(loaded, order)
        plan = cls(
            masks=tuple(loaded),
            token_ranges=ranges,
            pad_counts=tuple(_pad_count(f"pad_counts[{i}]", c) for i, c in enumerate(counts)),
            base_range=base,
            base_pad_count=_pad_count("base_pad_count", base_pad_count),
            mode=mode,
            eps=eps,
            strength=_number("strength", strength, *at_least_0),
            region_strengths=tuple(_number(f"region_strengths[{i}]", s, *at_least_0) for i, s in enumerate(strengths)),
            hard_value=hard_value,
            normalize_overlaps=bool(normalize_overlaps),
            base_always_allowed=bool(base_always_allowed),
            unmasked_to_base=bool(unmasked_to_base),
            base_weight=_number("base_weight", base_weight, *at_least_0),
            resample=resample,
            combine=combine,
            pads=pads,
        )
        _check_segments(plan._segments(), plan._segment_names())
        return plan

    @classmethod
    def plain(cls, tokens: int, pad_count: int = 0, *, pads: str = "fold") -> RegionPlan:
        """One unbiased prompt of `tokens` rows and `pad_count` pads: ordinary attention, or a batch's
        unconditional row.

        Example:
            >>> RegionPlan.plain(77, pad_count=435).bind((1, 64, 64)).segments
            ((0, 77, 435),)
        """
        return cls.from_masks([], [], base_range=(0, tokens), base_pad_count=pad_count, pads=pads)

    @staticmethod
    def from_bias(
        template: torch.Tensor,
        ranges: Sequence[Sequence[int]] | None = None,
        *,
        grid: tuple[int, int, int] | None = None,
    ) -> BoundPlan:
        """The plan behind a materialised additive bias whose columns are equal within each prompt.

        Args:
            template: `[1, 1, Nq, Nk]` (or `[Nq, Nk]`), natural-log units, -inf = excluded.
            ranges: the prompts' column ranges. Columns in none of them become segments of their own where
                they can be attended. Default: every run of equal columns is a segment.
            grid: (T, Ht, Wt) of the Nq queries; default (1, 1, Nq).

        Returns a plan bound to that grid. A finite value is kept as it is, so the result equals attention
        with the template, except that a query whose row is -inf throughout attends to all segments.

        Raises ValueError with the segment and the query where the template is not of this form.

        Example:
            >>> bias = torch.tensor([[0.0, 0.0, -3.2], [-3.2, -3.2, 0.0]])
            >>> RegionPlan.from_bias(bias).segments
            ((0, 2, 0), (2, 3, 0))
        """
        if not isinstance(template, torch.Tensor):
            raise wrong_type("template", template, "a tensor [1, 1, Nq, Nk]")
        if template.ndim == 4 and template.shape[:2] == (1, 1):
            template = template[0, 0]
        if template.ndim != 2 or template.numel() == 0 or not template.dtype.is_floating_point:
            raise invalid(
                "template",
                f"{template.dtype} of shape {list(template.shape)}",
                "a floating tensor [1, 1, Nq, Nk] with Nq, Nk > 0",
            )
        template = template.detach().float()
        queries, keys = template.shape
        if ranges is not None:
            segments = _ranges("ranges", ranges, len(ranges))
            _check_segments([(s, e, 0) for s, e in segments], [f"ranges[{i}]" for i in range(len(segments))])
            if any(end > keys for _, end in segments):
                raise invalid("ranges", str(list(segments)), f"ranges within the {keys} columns of template")
        bad = (template.isnan() | (template == math.inf)).nonzero()
        if len(bad):
            query, key = bad[0].tolist()
            raise invalid(
                "template",
                f"{template[query, key].item()} at query {query}, column {key}",
                "finite values or -inf",
            )
        equal = (template[:, 1:] == template[:, :-1]).all(dim=0).tolist()  # column j + 1 equals column j
        found = []
        covered = [False] * keys
        for start, end in segments if ranges is not None else ():
            covered[start:end] = [True] * (end - start)
            if start < end and not all(equal[start : end - 1]):
                column = next(j for j in range(start, end - 1) if not equal[j]) + 1
                query = int((template[:, column] != template[:, column - 1]).nonzero()[0])
                raise invalid(
                    f"template, segment [{start}, {end}), query {query}",
                    f"{template[query, column - 1].item():g} at column {column - 1} but "
                    f"{template[query, column].item():g} at column {column}",
                    "one value a query over the columns of a segment",
                )
            found.append((start, end))
        start = 0
        for column in range(keys):  # what no range names: runs of equal, attended columns
            last = column + 1 == keys
            if covered[column]:
                start = column + 1
            elif last or not equal[column] or covered[column + 1]:
                if bool((template[:, column] > -math.inf).any()):
                    found.append((start, column + 1))
                start = column + 1
        if not any(end > start for start, end in found):
            raise invalid("template", "no column that any query may attend to", "at least one")
        bias = torch.stack([template[:, s] if e > s else template.new_full((queries,), -math.inf) for s, e in found])
        return _bound(bias, [(s, e, 0) for s, e in found], "logit", _grid("grid", grid or (1, 1, queries), queries))

    def token_weights(self, grid: tuple[int, int, int], canvas: tuple[float, float] | None = None) -> torch.Tensor:
        """w_r on the token grid, float64 `[R, Ht, Wt]`: resampled, and normalised if the plan says so."""
        _, height, width = _grid("grid", grid)
        canvas = _canvas(canvas, height, width)
        if not self.masks:
            return torch.zeros(0, height, width, dtype=torch.float64)
        weights = torch.stack(
            [
                resample(mask, (height, width), canvas=canvas, window=self.window, method=self.resample)
                for mask in self.masks
            ]
        )
        if self.normalize_overlaps:
            weights /= weights.sum(dim=0).clamp(min=1)
        return weights

    def bind(
        self,
        grid: tuple[int, int, int],
        canvas: tuple[float, float] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> BoundPlan:
        """The plan for a grid of (T, Ht, Wt) tokens: Nq = T·Ht·Wt queries, frames repeat the weights.

        Args:
            grid: tokens, not pixels: Anima has one token for 16 x 16 pixels.
            canvas: (rows, columns) of the grid that are picture, when an odd latent was padded up to the
                patch; may be fractional. Default: the whole grid.
            device: where the plan's tensors go.
        """
        frames, height, width = _grid("grid", grid)
        weights = self.token_weights(grid, canvas).flatten(1)
        rows = self._blend_weights(weights) if self.combine == "blend" else self._bias(weights)
        bound = _bound(rows.float().repeat(1, frames), self._segments(), self.combine, (frames, height, width))
        return bound.to(device)

    def crop(self, tile: Sequence[float]) -> RegionPlan:
        """The plan of a part of the picture: `tile` = (top, left, bottom, right) as fractions of it.

        Binding the crop to the tile's grid gives the tile's part of the whole picture's weights.

        Example:
            >>> plan.crop((0, 0.5, 1, 1)).bind((1, 64, 32))    # the right half of a (1, 64, 64) picture
        """
        allowed = "(top, left, bottom, right) with 0 <= top < bottom <= 1 and 0 <= left < right <= 1"
        box = [float(x) for x in tile]
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise invalid("tile", str(tuple(tile)), allowed)
        top, left, bottom, right = self.window
        rows, columns = bottom - top, right - left
        window = (
            top + rows * box[0],
            left + columns * box[1],
            top + rows * box[2],
            left + columns * box[3],
        )
        return dataclasses.replace(self, window=window)

    def estimate_bytes(self, grid: tuple[int, int, int] = (1, 64, 64), **call: Any) -> int:
        """`BoundPlan.estimate_bytes` of this plan bound to `grid` (default 1024 x 1024 pixels)."""
        return self.bind(grid).estimate_bytes(**call)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as one safetensors file with JSON metadata; whole or not at all."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "masks"}
        _save(path, "RegionPlan", fields, {f"mask.{i}": mask for i, mask in enumerate(self.masks)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RegionPlan:
        """Read what `save` wrote. Every value is checked again, as in `from_masks`.

        Raises FileNotFoundError; ValueError for a malformed file or one of another version.
        """
        fields, tensors = _load(path, "RegionPlan")
        try:
            window = fields.pop("window")
            masks = [tensors[f"mask.{i}"] for i in range(len(tensors))]
            plan = cls.from_masks(masks, fields.pop("token_ranges"), **fields)
            whole = dataclasses.replace(plan, window=(0.0, 0.0, 1.0, 1.0))
            return whole if tuple(window) == whole.window else whole.crop(window)
        except (KeyError, TypeError) as error:
            raise invalid("path", f"{str(path)!r}, whose content does not fit ({error})", "a saved plan") from error

    def __repr__(self) -> str:
        bias = {"soft_log": f"soft_log eps={self.eps:g}", "hard": "hard"}[self.mode]
        if self.hard_value is not None:
            bias += f" {self.hard_value:g}"
        head = f"RegionPlan({len(self.masks)} regions, {self.combine}, {bias}, strength {self.strength:g}, "
        head += f"pads {self.pads}, {self.resample}"
        head += ", overlaps normalised" if self.normalize_overlaps else ""
        if self.window != (0.0, 0.0, 1.0, 1.0):
            head += ", crop ({:g}, {:g}, {:g}, {:g})".format(*self.window)
        lines = [head + ")"]
        for i, (mask, (start, end)) in enumerate(zip(self.masks, self.token_ranges, strict=True)):
            lines.append(
                f"  region {i}: tokens [{start}, {end}) + {self.pad_counts[i]} pads, "
                f"strength {self.region_strengths[i]:g}, mask {mask.shape[0]} x {mask.shape[1]} "
                f"covering {100 * float(mask.mean()):.1f} %"
            )
        if self.base_range is not None:
            where = "where no region counts" if self.unmasked_to_base else "suppressed"
            where = "everywhere" if self.base_always_allowed else where
            if self.combine == "blend":
                where = f"weight max({self.base_weight:g}, 1 - sum of regions)"
            start, end = self.base_range
            lines.append(f"  base:     tokens [{start}, {end}) + {self.base_pad_count} pads, {where}")
        return "\n".join(lines)

    def _segments(self) -> list[tuple[int, int, int]]:
        """(start, end, pads) of each region, then of the base prompt."""
        segments = [(s, e, p) for (s, e), p in zip(self.token_ranges, self.pad_counts, strict=True)]
        if self.base_range is not None:
            segments.append((*self.base_range, self.base_pad_count))
        if self.pads == "strip":
            segments = [(s, e, 0) for s, e, _ in segments]
        return segments

    def _segment_names(self) -> list[str]:
        return [f"token_ranges[{i}]" for i in range(len(self.masks))] + ["base_range"]

    def _bias(self, weights: torch.Tensor) -> torch.Tensor:
        """`[S, Nq]` bias from token weights `[R, Nq]`."""
        scale = self.strength * torch.tensor(self.region_strengths, dtype=torch.float64)[:, None]
        lowest = -math.inf if self.hard_value is None else self.hard_value
        if self.mode == "soft_log":
            bias = weights.clamp(min=self.eps).log() * scale
            lowest = math.log(self.eps)
        else:
            bias = torch.zeros_like(weights)
            suppressed = (weights <= 0.5) & (scale > 0)
            bias = torch.where(suppressed, lowest * scale.clamp(min=1e-300), bias)
        if self.base_range is None:
            return bias
        if self.base_always_allowed or self.strength == 0:
            base = torch.zeros(weights.shape[1], dtype=torch.float64)
        else:
            base = torch.full((weights.shape[1],), lowest * self.strength, dtype=torch.float64)
            if self.unmasked_to_base:
                base[weights.sum(dim=0) <= self.eps] = 0
        return torch.cat([bias, base[None]])

    def _blend_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """`[S, Nq]` unnormalised blend weights from token weights `[R, Nq]`."""
        scale = self.strength * torch.tensor(self.region_strengths, dtype=torch.float64)[:, None]
        mixed = scale * ((weights > 0.5).double() if self.mode == "hard" else weights)
        if self.base_range is None:
            return mixed
        base = (1 - mixed.sum(dim=0)).clamp(min=self.base_weight)
        return torch.cat([mixed, base[None]])


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

    @property
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

    @property
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
        _save(path, "BoundPlan", fields, {"bias": bias.cpu().contiguous()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BoundPlan:
        """Read what `save` wrote, with every value checked again.

        Raises FileNotFoundError; ValueError for a malformed file or one of another version.
        """
        fields, tensors = _load(path, "BoundPlan")
        problem = None
        try:
            grid = _grid("grid", fields["grid"])
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
                _check_segments(segments, [f"segments[{i}]" for i in range(size)])
                rows = bias[p] if bias.shape[2] else bias.new_zeros(size, math.prod(grid))
                plans.append(_bound(rows, segments, fields["combine"], grid))
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


def _bound(
    rows: torch.Tensor, segments: Sequence[tuple[int, int, int]], combine: str, grid: tuple[int, int, int]
) -> BoundPlan:
    """A single bound plan from `[S, Nq]` bias (logit) or unnormalised weights (blend)."""
    rows = rows.float().clone()
    present = torch.tensor([end > start or pads > 0 for start, end, pads in segments])
    if not bool(present.any()):
        raise invalid("token_ranges", "no tokens and no pads in any segment", "a context that is not empty")
    nothing = 0.0 if combine == "blend" else -math.inf
    rows[~present] = nothing
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


def _ranges(name: str, ranges: Any, count: int) -> tuple[Range, ...]:
    try:
        pairs = [(_integer(s), _integer(e)) for s, e in ranges]
    except (TypeError, ValueError) as error:
        raise invalid(name, repr(ranges), "pairs of whole numbers (start, end)") from error
    if len(pairs) != count:
        raise invalid(name, f"{len(pairs)} ranges for {count} masks", "one range a mask")
    for i, (start, end) in enumerate(pairs):
        if not 0 <= start <= end:
            raise invalid(f"{name}[{i}]" if count > 1 else name, f"({start}, {end})", "0 <= start <= end")
    return tuple(pairs)


def _check_segments(segments: Sequence[tuple[int, ...]], names: Sequence[str]) -> None:
    """Ranges are in order and may not overlap; at least one token or pad."""
    for i, (start, end, pads) in enumerate(segments):
        if not 0 <= start <= end or pads < 0:
            raise invalid(names[i], f"({start}, {end}) with {pads} pads", "0 <= start <= end, pads >= 0")
    spans = sorted((start, end, name) for (start, end, _), name in zip(segments, names, strict=False) if end > start)
    for (s0, e0, first), (s1, e1, second) in itertools.pairwise(spans):
        if s1 < e0:
            raise invalid(second, f"[{s1}, {e1}), which overlaps {first} = [{s0}, {e0})", "disjoint ranges")
    if not any(end > start or pads for start, end, pads in segments):
        raise invalid(
            names[0] if names else "ranges",
            "no tokens and no pads in any segment",
            "a context that is not empty",
        )


def _per_region(name: str, values: Sequence[Any] | None, count: int, default: Any) -> list[Any]:
    if values is None:
        return [default] * count
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise wrong_type(name, values, "a sequence with one number a region")
    if len(values) != count:
        raise invalid(name, f"{len(values)} values for {count} regions", "one a region")
    return list(values)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _number(name: str, value: Any, allowed: str, holds: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise wrong_type(name, value, allowed) from error
    if not math.isfinite(number) or not holds(number):
        raise invalid(name, f"{value}", allowed)
    return number


def _pad_count(name: str, value: Any) -> int:
    try:
        count = _integer(value)
    except (TypeError, ValueError) as error:
        raise invalid(name, repr(value), "a whole number >= 0") from error
    if not 0 <= count < 2**31:
        raise invalid(name, f"{count}", "a whole number >= 0")
    return count


def _grid(name: str, grid: Any, queries: int | None = None) -> tuple[int, int, int]:
    allowed = "(T, Ht, Wt), whole numbers >= 1"
    try:
        frames, height, width = (_integer(x) for x in grid)
    except (TypeError, ValueError) as error:
        raise invalid(name, repr(grid), allowed) from error
    if min(frames, height, width) < 1 or frames * height * width >= 2**31:
        raise invalid(name, f"{(frames, height, width)}", f"{allowed}, fewer than 2^31 tokens")
    if queries is not None and frames * height * width != queries:
        raise invalid(name, f"{(frames, height, width)}", f"a grid of {queries} tokens")
    return frames, height, width


def _canvas(canvas: Any, height: int, width: int) -> tuple[float, float]:
    if canvas is None:
        return float(height), float(width)
    allowed = f"(rows, columns) with 0 < rows <= {height} and 0 < columns <= {width}"
    try:
        rows, columns = (float(x) for x in canvas)
    except (TypeError, ValueError) as error:
        raise invalid("canvas", repr(canvas), allowed) from error
    if not (0 < rows <= height and 0 < columns <= width):
        raise invalid("canvas", f"{(rows, columns)}", allowed)
    return rows, columns


def _apply_priorities(masks: list[torch.Tensor], priorities: list[float]) -> list[torch.Tensor]:
    """r_low · Π (1 - r_high) over the masks of strictly higher priority, at one common size."""
    if len(set(priorities)) < 2:
        return masks
    size = (max(m.shape[0] for m in masks), max(m.shape[1] for m in masks))
    same = [m if tuple(m.shape) == size else resample(m, size).float() for m in masks]
    result = []
    for mask, priority in zip(same, priorities, strict=True):
        left = mask.clone()
        for other, higher in zip(same, priorities, strict=True):
            if higher > priority:
                left *= 1 - other
        result.append(left)
    return result


def _save(path: str | os.PathLike[str], kind: str, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    metadata = {"format": f"anima_fast.{kind}", "version": str(_FORMAT_VERSION), "plan": json.dumps(fields)}
    write_atomic(path, save(tensors, metadata))


def _load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"anima_fast.{kind}":
                raise invalid("path", f"{str(path)!r} of format {metadata.get('format')!r}", f"a saved {kind}")
            if metadata.get("version") != str(_FORMAT_VERSION):
                raise invalid("path", f"version {metadata.get('version')!r}", f"version {_FORMAT_VERSION}")
            fields = json.loads(metadata.get("plan", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise invalid("path", f"{str(path)!r}, which cannot be read ({error})", "a whole safetensors file") from error
    if not isinstance(fields, dict):
        raise invalid("path", f"{str(path)!r}, whose metadata is not an object", f"a saved {kind}")
    return fields, tensors
