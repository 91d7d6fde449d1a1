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
import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from .bound_plan import COMBINE, BoundPlan, bind_rows
from .checks import (
    check_canvas,
    check_grid,
    check_number,
    check_pad_count,
    check_per_region,
    check_ranges,
    check_segments,
)
from .errors import invalid, wrong_type
from .files import load_plan, save_plan
from .masks import RESAMPLE, load_mask, resample

__all__ = ["RegionPlan"]

MODES = ("soft_log", "hard")
PADS = ("fold", "strip")

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
        ranges = check_ranges("token_ranges", token_ranges, count)
        base = None if base_range is None else check_ranges("base_range", [base_range], 1)[0]
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
        eps = check_number("eps", eps, "0 < eps <= 1", lambda x: 0 < x <= 1)
        at_least_0 = ("a finite number >= 0", lambda x: x >= 0)
        strengths = check_per_region("region_strengths", region_strengths, count, 1.0)
        counts = check_per_region("pad_counts", pad_counts, count, 0)
        if hard_value is not None:
            if mode != "hard":
                raise invalid("hard_value", f"{hard_value} with mode={mode!r}", "None unless mode='hard'")
            hard_value = check_number("hard_value", hard_value, "a finite number <= 0", lambda x: x <= 0)
        if priorities is not None:
            order = [
                check_number(f"priorities[{i}]", p, "a finite number", lambda x: True)
                for i, p in enumerate(check_per_region("priorities", priorities, count, 0.0))
            ]
            loaded = _apply_priorities(loaded, order)
        plan = cls(
            masks=tuple(loaded),
            token_ranges=ranges,
            pad_counts=tuple(check_pad_count(f"pad_counts[{i}]", c) for i, c in enumerate(counts)),
            base_range=base,
            base_pad_count=check_pad_count("base_pad_count", base_pad_count),
            mode=mode,
            eps=eps,
            strength=check_number("strength", strength, *at_least_0),
            region_strengths=tuple(
                check_number(f"region_strengths[{i}]", s, *at_least_0) for i, s in enumerate(strengths)
            ),
            hard_value=hard_value,
            normalize_overlaps=bool(normalize_overlaps),
            base_always_allowed=bool(base_always_allowed),
            unmasked_to_base=bool(unmasked_to_base),
            base_weight=check_number("base_weight", base_weight, *at_least_0),
            resample=resample,
            combine=combine,
            pads=pads,
        )
        check_segments(plan._segments(), plan._segment_names())
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
        pad_count: int = 0,
        pad_bias: float = 0.0,
    ) -> BoundPlan:
        """The plan behind a materialised additive bias whose columns are equal within each prompt.

        Args:
            template: `[1, 1, Nq, Nk]` (or `[Nq, Nk]`), natural-log units, -inf = excluded.
            ranges: the prompts' column ranges. Columns in none of them become segments of their own where
                they can be attended. Default: every run of equal columns is a segment.
            grid: (T, Ht, Wt) of the Nq queries; default (1, 1, Nq).
            pad_count, pad_bias: zero rows that belong to no prompt, and the bias they all have (-inf: none): how a
                pack that concatenates prompts and then pads the whole suppresses those pads.

        Returns a plan bound to that grid. A finite value is kept as it is (at least -1e30), so the result equals
        attention with the template, except that a query whose row is -inf throughout attends to all segments.

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
            segments = check_ranges("ranges", ranges, len(ranges))
            check_segments([(s, e, 0) for s, e in segments], [f"ranges[{i}]" for i in range(len(segments))])
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
        shared = [(s, e, 0) for s, e in found]
        if check_pad_count("pad_count", pad_count):
            if not float(pad_bias) < math.inf:
                raise invalid("pad_bias", f"{pad_bias}", "a finite number or -inf")
            shared.append((0, 0, pad_count))
            bias = torch.cat([bias, bias.new_full((1, queries), float(pad_bias))])
        return bind_rows(bias, shared, "logit", check_grid("grid", grid or (1, 1, queries), queries))

    def token_weights(self, grid: tuple[int, int, int], canvas: tuple[float, float] | None = None) -> torch.Tensor:
        """w_r on the token grid, float64 `[R, Ht, Wt]`: resampled, and normalised if the plan says so."""
        _, height, width = check_grid("grid", grid)
        canvas = check_canvas(canvas, height, width)
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

    def segment_rows(self, grid: tuple[int, int, int], canvas: tuple[float, float] | None = None) -> torch.Tensor:
        """Each segment's bias (logit) or unnormalised weight (blend) on the token grid, float64 `[S, Ht, Wt]`,
        the base prompt last; before `bind` lets queries that every segment excludes attend to all."""
        weights = self.token_weights(grid, canvas)
        rows = self._blend_weights if self.combine == "blend" else self._bias
        return rows(weights.flatten(1)).unflatten(1, weights.shape[1:])

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
        frames, height, width = check_grid("grid", grid)
        rows = self.segment_rows(grid, canvas).flatten(1)
        bound = bind_rows(rows.float().repeat(1, frames), self._segments(), self.combine, (frames, height, width))
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
        save_plan(path, "RegionPlan", fields, {f"mask.{i}": mask for i, mask in enumerate(self.masks)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RegionPlan:
        """Read what `save` wrote. Every value is checked again, as in `from_masks`.

        Raises FileNotFoundError; ValueError for a malformed file or one of another version.
        """
        fields, tensors = load_plan(path, "RegionPlan")
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
