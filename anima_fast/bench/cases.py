"""The attention problems that are measured, with inputs strided as Anima's blocks hand them over.

    q      [B, H, Nq, D]            a view of [B, Nq, H, D] memory; Nq = one query for 16 x 16 pixels
    k, v   [B, H, S * pad_to, D]    likewise; S prompts of `tokens` rows, each followed by zero rows up to `pad_to`

Everybody gets these same tensors. Pads are real rows here because they are in the model: what to do about them is
part of what is compared. `mode` is the question asked of them:

    soft_log, hard   one softmax over R region prompts (S = R)
    blend            a softmax a prompt, mixed by weight; the base prompt is one of them (S = R + 1)
    plain            one prompt, no regions (S = 1)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from ..bound_plan import BoundPlan
from ..errors import invalid
from ..plan import RegionPlan

__all__ = ["DTYPES", "LAYOUTS", "MODES", "Case", "Problem", "padded_problem", "region_masks", "token_grid"]

MODES = ("soft_log", "hard", "blend", "plain")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Soft edges, as people paint them: the ramp between two regions is this share of the picture wide.
_FEATHER = 1 / 8
# The base prompt keeps a share everywhere, as Attention Couple packs recommend; also, no blend then gets away with
# reading a single prompt.
_BASE_WEIGHT = 0.2


def token_grid(width: int, height: int) -> tuple[tuple[int, int, int], tuple[float, float]]:
    """Anima's tokens of a picture of so many pixels: the grid (T, Ht, Wt) and how much of it is picture.

    The latent has one cell for 8 pixels and a token is 2 x 2 cells, both rounded up.

    Example:
        >>> token_grid(1000, 1024)
        ((1, 64, 63), (64.0, 62.5))
    """
    rows, columns = (math.ceil(math.ceil(pixels / 8) / 2) for pixels in (height, width))
    return (1, rows, columns), (height / 16, width / 16)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: a picture size, regions, prompt lengths, attention shape, and the mode."""

    mode: str = "soft_log"
    width: int = 1024
    height: int = 1024
    layout: str = "quadrants"
    regions: int | None = None
    tokens: int = 77
    pad_to: int = 512
    heads: int = 16
    head_dim: int = 128
    dtype: str = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, MODES),
            ("layout", self.layout, tuple(LAYOUTS)),
            ("dtype", self.dtype, tuple(DTYPES)),
        ):
            if value not in allowed:
                raise invalid(name, repr(value), " | ".join(allowed))
        for name in ("width", "height", "tokens", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "a whole number >= 1")
        if self.pad_to < self.tokens:
            raise invalid("pad_to", self.pad_to, f"at least the {self.tokens} tokens of a prompt")
        count = LAYOUTS[self.layout][0]
        if count is None:
            if (self.regions or 8) < 1:
                raise invalid("regions", self.regions, "a whole number >= 1")
        elif self.regions not in (None, count):
            raise invalid("regions", self.regions, f"{count}, which is what layout {self.layout!r} has")

    @property
    def region_count(self) -> int:
        return LAYOUTS[self.layout][0] or self.regions or 8

    def __str__(self) -> str:
        regions = "no regions" if self.mode == "plain" else f"{self.layout} ({self.region_count} regions)"
        return (
            f"{self.mode}, {self.width}x{self.height}, {regions}, {self.tokens} tokens a prompt padded to "
            f"{self.pad_to}, H {self.heads}, D {self.head_dim}, {self.dtype}, {self.device}"
        )

    def build(self) -> Problem:
        """The tensors and the bound plan of this case; the same ones each time."""
        tokens, pads = self.tokens, self.pad_to - self.tokens
        if self.mode == "plain":
            plan = RegionPlan.plain(tokens, pads)
        else:
            count = self.region_count
            blend = self.mode == "blend"
            plan = RegionPlan.from_masks(
                self._masks(),
                [(i * tokens, (i + 1) * tokens) for i in range(count)],
                pad_counts=[pads] * count,
                base_range=(count * tokens, (count + 1) * tokens) if blend else None,
                base_pad_count=pads if blend else 0,
                base_weight=_BASE_WEIGHT,
                mode="soft_log" if blend else self.mode,
                combine="blend" if blend else "logit",
            )
        size = (self.width, self.height)
        return padded_problem(
            str(self), plan, size, heads=self.heads, head_dim=self.head_dim, dtype=self.dtype, device=self.device
        )

    def _masks(self) -> list[torch.Tensor]:
        # A quarter of the picture's resolution is finer than its tokens by four.
        return region_masks(self.layout, self.region_count, (-(-self.height // 4), -(-self.width // 4)))


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Tensors, the bound plan, and which of `MODES` it is. The pads of the plan are zero rows of k and v, which follow
    their prompt's tokens."""

    title: str
    mode: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plan: BoundPlan

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(start, end of the tokens, end of the pads) of each prompt, as rows of k."""
        return [(start, end, end + pads) for start, end, pads in self.plan.segments]

    @property
    def rows(self) -> torch.Tensor:
        """`[S, Nq]` bias (or blend weight) of each prompt and query, float32; zeros where nothing is biased."""
        bias = self.plan.tensors.bias[0]
        return bias if bias.shape[1] else bias.new_zeros(bias.shape[0], self.plan.queries)

    @property
    def padded_mask_bytes(self) -> int:
        """A materialised mask over all rows of k, in the inputs' type: what memory is compared with."""
        return self.plan.queries * self.k.shape[2] * self.q.element_size()

    @functools.cached_property
    def plain(self) -> Problem:
        """The first prompt alone: attention without regions."""
        start, end, pads_end = self.spans[0]
        plan = RegionPlan.plain(end - start, pads_end - end).bind(self.plan.grid, device=self.plan.device)
        k, v = self.k[:, :, start:pads_end], self.v[:, :, start:pads_end]
        return Problem(f"{self.title}: first prompt alone", "plain", self.q, k, v, plan)


def padded_problem(
    title: str,
    plan: RegionPlan,
    size: tuple[int, int],
    *,
    heads: int = 16,
    head_dim: int = 128,
    dtype: str = "fp32",
    device: str = "cpu",
) -> Problem:
    """Attention under a plan for a picture of `size` (width, height) pixels, with random q, k and v.

    The prompts are laid out anew, each followed by its pads as zero rows.
    """
    row = 0
    ranges, pads = [], []
    prompts = [*zip(plan.token_ranges, plan.pad_counts, strict=True)]
    if plan.base_range is not None:
        prompts.append((plan.base_range, plan.base_pad_count))
    for (start, end), count in prompts:
        ranges.append((row, row + end - start))
        pads.append((row + end - start, row + end - start + count))
        row = pads[-1][1]
    base = ranges.pop() if plan.base_range is not None else None
    plan = dataclasses.replace(plan, token_ranges=tuple(ranges), base_range=base)
    grid, canvas = token_grid(*size)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, head_dim, generator=generator) for n in (math.prod(grid), row, row))
    for start, end in pads:
        k[:, start:end] = 0
        v[:, start:end] = 0
    q, k, v = (x.to(device, DTYPES[dtype]).transpose(1, 2) for x in (q, k, v))
    mode = "plain" if not plan.masks else "blend" if plan.combine == "blend" else plan.mode
    return Problem(title, mode, q, k, v, plan.bind(grid, canvas, device=device))


def region_masks(layout: str, count: int, size: tuple[int, int]) -> list[torch.Tensor]:
    """`count` masks `[height, width]` in [0, 1] with soft edges."""
    y = (torch.arange(size[0]) + 0.5)[:, None] / size[0]
    x = (torch.arange(size[1]) + 0.5)[None, :] / size[1]
    return LAYOUTS[layout][1](y, x, count)


def _ramp(distance: torch.Tensor) -> torch.Tensor:
    """0 outside, 1 inside, by signed distance to the edge as a share of the picture."""
    return (distance / _FEATHER + 0.5).clamp(0, 1)


def _halves(y: torch.Tensor, x: torch.Tensor, count: int) -> list[torch.Tensor]:
    left = _ramp(0.5 - x).expand(len(y), -1)
    return [left, 1 - left]


def _quadrants(y: torch.Tensor, x: torch.Tensor, count: int) -> list[torch.Tensor]:
    top, left = _ramp(0.5 - y), _ramp(0.5 - x)
    return [a * b for a in (top, 1 - top) for b in (left, 1 - left)]


def _centre(y: torch.Tensor, x: torch.Tensor, count: int) -> list[torch.Tensor]:
    centre = _ramp(0.3 - torch.hypot(y - 0.5, x - 0.5))
    return [centre, 1 - centre]


def _circles(y: torch.Tensor, x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Overlapping discs on a sunflower spiral, which spreads any number of them evenly; together they cover the picture
    up to its corners."""
    masks = []
    for i in range(count):
        distance, angle = 0.5 * math.sqrt((i + 0.5) / count), i * math.pi * (3 - math.sqrt(5))
        cy, cx = 0.5 + distance * math.sin(angle), 0.5 + distance * math.cos(angle)
        masks.append(_ramp(0.75 / math.sqrt(count) - torch.hypot(y - cy, x - cx)))
    return masks


_Layout = Callable[[torch.Tensor, torch.Tensor, int], list[torch.Tensor]]

#: name -> (how many regions, or None for any number; their masks)
LAYOUTS: dict[str, tuple[int | None, _Layout]] = {
    "quadrants": (4, _quadrants),
    "halves": (2, _halves),
    "centre": (2, _centre),
    "circles": (None, _circles),
}
