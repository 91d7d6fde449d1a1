"""What the ComfyUI nodes are told: regions and settings, and the plans made of them. Nothing here imports ComfyUI.

A conditioning is ComfyUI's: a list of one entry `[embeds [1, N, C], options]`. Anima's options hold `t5xxl_ids` and
`t5xxl_weights`; the model's adapter turns embeds and ids into as many context rows as there are ids, and pads them with
zero rows to 512. Rows here are those real ones, `[n, C]`; pads are counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...bound_plan import BoundPlan
from ...checks import check_number
from ...errors import invalid, wrong_type
from ...masks import load_mask
from ...plan import RegionPlan

__all__ = ["Layout", "Prompt", "Region", "Settings", "bind_layouts", "picture_of", "token_weights"]

OUTSIDE = ("all", "base")

#: The picture may differ from the canvas by one token or this share of its width before it counts as another shape.
_ASPECT_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One conditioning: what the adapter needs to turn it into context rows."""

    embeds: torch.Tensor
    ids: torch.Tensor | None
    weights: torch.Tensor | None

    @classmethod
    def from_conditioning(cls, conditioning: Any, name: str) -> Prompt:
        """Raises TypeError or ValueError that calls the input `name` and says what to connect instead."""
        allowed = "a CONDITIONING with one entry, as CLIP Text Encode makes it"
        if not isinstance(conditioning, (list, tuple)):
            raise wrong_type(name, conditioning, allowed)
        if len(conditioning) != 1:
            raise invalid(name, f"a CONDITIONING with {len(conditioning)} entries", f"{allowed}; one prompt a region")
        entry = conditioning[0]
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], torch.Tensor):
            raise invalid(name, "a CONDITIONING without text", allowed)
        embeds, options = entry
        if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[1] == 0:
            raise invalid(name, f"text of shape {list(embeds.shape)}", "[1, tokens, channels]: one prompt, not a batch")
        return cls(embeds, _flat(options.get("t5xxl_ids")), _flat(options.get("t5xxl_weights")))

    def rows(self, diffusion_model: Any, like: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The adapter's rows `[n, C]` in `like`'s type and device, and the pad count that came with them."""
        embeds = self.embeds.to(like)
        if self.ids is None:
            return embeds[0], 0
        ids = self.ids.to(like.device)[None]
        weights = None if self.weights is None else self.weights.to(like)[None, :, None]
        padded = diffusion_model.preprocess_text_embeds(embeds, ids, t5xxl_weights=weights)
        count = ids.shape[1]
        return padded[0, :count], padded.shape[1] - count


def _flat(value: Any) -> torch.Tensor | None:
    return value.flatten() if isinstance(value, torch.Tensor) and value.numel() else None


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A prompt, where it counts and how much."""

    prompt: Prompt | None  # None: a region that is only drawn
    mask: torch.Tensor
    strength: float = 1.0
    priority: float = 0.0
    name: str = "region"

    @classmethod
    def make(
        cls, conditioning: Any, mask: Any, strength: float = 1.0, priority: float = 0.0, name: str = "region"
    ) -> Region:
        """A region from ComfyUI's CONDITIONING and MASK (`[1, H, W]`), or anything `masks.load_mask` reads."""
        if isinstance(mask, torch.Tensor) and mask.ndim == 3 and mask.shape[0] > 1:
            raise invalid(f"{name}: mask", f"a batch of {mask.shape[0]} masks", "one mask; pick or combine them first")
        strength = check_number(f"{name}: strength", strength, "a finite number >= 0", lambda x: x >= 0)
        priority = check_number(f"{name}: priority", priority, "a finite number", lambda x: True)
        prompt = None if conditioning is None else Prompt.from_conditioning(conditioning, f"{name}: conditioning")
        return cls(prompt, load_mask(mask, f"{name}: mask"), strength, priority, name)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all regions: the plan's parameters (`RegionPlan.from_masks`), when, where and how to report.

    Attributes:
        outside: what counts outside the window of sampling and in blocks that are not listed: "all" prompts, unbiased,
            or only the "base" prompt.
        blocks: indices of the transformer blocks that see regions; None: all.
        canvas: (width, height) of the picture that the masks cover; only the ratio counts. None: the masks' own.
        stretch: serve pictures of another shape than the canvas, stretching the masks.
        crop: (top, left, bottom, right), the part of the canvas that is sampled, as fractions.
    """

    combine: str = "logit"
    mode: str = "soft_log"
    strength: float = 0.35
    eps: float = 1e-4
    hard_value: float | None = None
    normalize_overlaps: bool = True
    base_always_allowed: bool = True
    unmasked_to_base: bool = True
    base_weight: float = 0.0
    resample: str = "area"
    pads: str = "fold"
    start_percent: float = 0.0
    end_percent: float = 1.0
    outside: str = "all"
    blocks: frozenset[int] | None = None
    canvas: tuple[float, float] | None = None
    stretch: bool = False
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    debug: bool = False

    def __post_init__(self) -> None:
        if self.outside not in OUTSIDE:
            raise invalid("outside", repr(self.outside), " | ".join(map(repr, OUTSIDE)))
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            got = f"{self.start_percent:g} and {self.end_percent:g}"
            raise invalid("start_percent, end_percent", got, "0 <= start_percent <= end_percent <= 1")
        top, left, bottom, right = self.crop
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise invalid("crop", f"{self.crop}", "0 <= crop_top < crop_bottom <= 1, 0 <= crop_left < crop_right <= 1")
        if self.canvas is not None and not (self.canvas[0] > 0 and self.canvas[1] > 0):
            raise invalid(
                "canvas", f"{self.canvas[0]:g} x {self.canvas[1]:g}", "a width and a height above 0, or both 0"
            )

    def plan(
        self,
        regions: Sequence[Region],
        ranges: Sequence[tuple[int, int]],
        pad_counts: Sequence[int],
        base_range: tuple[int, int] | None,
        base_pad_count: int = 0,
    ) -> RegionPlan:
        plan = RegionPlan.from_masks(
            [region.mask for region in regions],
            ranges,
            pad_counts=pad_counts,
            base_range=base_range,
            base_pad_count=base_pad_count,
            mode=self.mode,
            eps=self.eps,
            strength=self.strength,
            region_strengths=[region.strength for region in regions],
            priorities=[region.priority for region in regions],
            hard_value=self.hard_value if self.mode == "hard" else None,
            normalize_overlaps=self.normalize_overlaps,
            base_always_allowed=self.base_always_allowed,
            unmasked_to_base=self.unmasked_to_base,
            base_weight=self.base_weight,
            resample=self.resample,
            combine=self.combine,
            pads=self.pads,
        )
        return plan if self.crop == (0.0, 0.0, 1.0, 1.0) else plan.crop(self.crop)

    def check(self, regions: Sequence[Region]) -> None:
        """Raises what binding would raise later, so that a node can say it before anything is sampled."""
        if not regions:
            raise invalid("regions", "no region", "at least one Anima Region")
        ranges = [(i, i + 1) for i in range(len(regions))]
        self.plan(regions, ranges, [0] * len(regions), (len(regions), len(regions) + 1))

    def window(self, percent_to_sigma: Callable[[float], Any]) -> tuple[float, float]:
        """(lowest, highest) sigma at which regions count."""
        high = math.inf if self.start_percent <= 0 else float(percent_to_sigma(self.start_percent))
        low = -math.inf if self.end_percent >= 1 else float(percent_to_sigma(self.end_percent))
        return low, high

    def other_shape(self, regions: Sequence[Region], height: float, width: float) -> str | None:
        """Why a picture of `height` x `width` latent pixels is not what the masks are for, or None."""
        canvas = self.canvas
        if canvas is None:
            shapes = {(region.mask.shape[1], region.mask.shape[0]) for region in regions}
            ratios = [w / h for w, h in shapes]
            if not shapes or max(ratios) / min(ratios) > 1 + _ASPECT_TOLERANCE:
                return None
            canvas = max(shapes)
        top, left, bottom, right = self.crop
        ratio = canvas[0] * (right - left) / (canvas[1] * (bottom - top))
        token = 2  # latent pixels
        if self.stretch or abs(width - height * ratio) <= max(token, token * ratio, _ASPECT_TOLERANCE * width):
            return None
        return (
            f"the picture is {8 * width:g} x {8 * height:g} pixels (ratio {width / height:.3f}), the masks' canvas has "
            f"ratio {ratio:.3f}. If it is the whole picture, give masks of its shape, set canvas_width and "
            "canvas_height, or turn stretch_masks on; if it is a tile, set the crop"
        )


def picture_of(latent_shape: Sequence[int], patch: int = 2) -> tuple[tuple[int, int, int], tuple[float, float]]:
    """Token grid (T, Ht, Wt) and canvas (rows, columns) of a latent `[..., T, H, W]` that is padded up to the patch."""
    frames, height, width = latent_shape[-3:]
    return (frames, -(-height // patch), -(-width // patch)), (height / patch, width / patch)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one row of a batch lies in the context: where its own prompt starts, its rows and its pads.

    regions: whether the regions' rows precede it.
    """

    regions: bool
    start: int
    rows: int
    pads: int


def bind_layouts(
    layouts: Sequence[Layout],
    settings: Settings,
    regions: Sequence[Region],
    ranges: Sequence[tuple[int, int]],
    pad_counts: Sequence[int],
    grid: tuple[int, int, int],
    canvas: tuple[float, float],
    *,
    active: bool,
    device: torch.device | str,
) -> BoundPlan:
    """One plan for a batch whose row b is laid out as `layouts[b]`."""
    different = list(dict.fromkeys(layouts))
    plans = []
    for layout in different:
        base = (layout.start, layout.start + layout.rows)
        if layout.regions and (active or settings.outside == "all"):
            plan = settings.plan(regions, ranges, pad_counts, base, layout.pads)
            if not active:
                plan = dataclasses.replace(plan, combine="logit", strength=0.0)
        else:
            pads = settings.pads if layout.regions else "fold"
            plan = RegionPlan.from_masks([], [], base_range=base, base_pad_count=layout.pads, pads=pads)
        plans.append(plan.bind(grid, canvas))
    index = [different.index(layout) for layout in layouts]
    bound = plans[0] if len(plans) == 1 else BoundPlan.batch(plans, index)
    return bound.to(device)


def token_weights(settings: Settings, regions: Sequence[Region], width: int, height: int) -> torch.Tensor:
    """`[R, Ht, Wt]` weights as the model sees them in a picture of `width` x `height` pixels."""
    settings.check(regions)
    ranges = [(i, i + 1) for i in range(len(regions))]
    plan = settings.plan(regions, ranges, [0] * len(regions), None)
    grid, canvas = picture_of((1, -(-height // 8), -(-width // 8)))
    return plan.token_weights(grid, canvas)
