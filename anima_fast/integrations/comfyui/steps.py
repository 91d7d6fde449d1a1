"""Regional conditioning in four plain steps, as anima-regional-comfy-nodes has it in four nodes, whose names and
defaults map one to one: concatenate with ranges, masks to the token grid, bias, apply (`apply_plan`).

Its prompts are concatenated before the adapter, so they see each other there, and the whole is padded to 512 rows that
get the lowest bias. Anima Regions runs the adapter on each prompt by itself instead. Nothing here imports ComfyUI.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...bound_plan import BoundPlan, bind_rows
from ...errors import invalid
from ...masks import load_mask, resample
from ...plan import RegionPlan
from .hook import ModelHook
from .override import CrossAttention
from .regions import Layout, Prompt

__all__ = ["PlanHook", "Ranges", "build_bias", "concatenate", "masks_to_token_grid"]


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Which rows of a concatenated conditioning belong to which prompt."""

    regions: tuple[tuple[int, int], ...]
    base: tuple[int, int] | None
    total: int


def concatenate(
    regions: Sequence[Any], base: Any = None, base_position: str = "last"
) -> tuple[list[list[Any]], Ranges]:
    """Step 1: CONDITIONINGs of regions and base -> one CONDITIONING and the ranges of its rows."""
    if base_position not in ("first", "last"):
        raise invalid("base_position", repr(base_position), "'first' | 'last'")
    if not regions:
        raise invalid("regions", "none", "at least one CONDITIONING")
    named = [(f"region_{i + 1}", conditioning) for i, conditioning in enumerate(regions)]
    if base is not None:
        named.insert(0 if base_position == "first" else len(named), ("base", base))
    prompts = [(name, Prompt.from_conditioning(conditioning, name)) for name, conditioning in named]
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, prompt in prompts:
        count = prompt.embeds.shape[1] if prompt.ids is None else len(prompt.ids)
        spans[name] = (end, end + count)
        end += count
    chosen = named[[name for name, _ in named].index("base") if base is not None else 0][1]
    options = {key: value for key, value in chosen[0][1].items() if key not in ("t5xxl_ids", "t5xxl_weights")}
    for key, field in (("t5xxl_ids", "ids"), ("t5xxl_weights", "weights")):
        values = [getattr(prompt, field) for _, prompt in prompts]
        if all(value is not None for value in values):
            options[key] = torch.cat(values)
    embeds = torch.cat([prompt.embeds for _, prompt in prompts], dim=1)
    ranges = Ranges(tuple(span for name, span in spans.items() if name != "base"), spans.get("base"), end)
    return [[embeds, options]], ranges


def masks_to_token_grid(
    masks: Sequence[Any],
    latent_height: int,
    latent_width: int,
    patch_size: int = 2,
    downscale_mode: str = "area",
    normalize_overlaps: bool = True,
) -> torch.Tensor:
    """Step 2: masks -> weights `[R, Ht, Wt]` on the model's tokens, float64."""
    size = (-(-latent_height // patch_size), -(-latent_width // patch_size))
    canvas = (latent_height / patch_size, latent_width / patch_size)
    loaded = [load_mask(mask, f"mask_{i + 1}") for i, mask in enumerate(masks)]
    weights = torch.stack([resample(mask, size, canvas=canvas, method=downscale_mode) for mask in loaded])
    return weights / weights.sum(dim=0).clamp(min=1) if normalize_overlaps else weights


def build_bias(
    ranges: Ranges,
    token_weights: torch.Tensor,
    mode: str = "soft_log",
    eps: float = 1e-4,
    hard_value: float | None = -80.0,
    strength: float = 0.35,
    base_always_allowed: bool = True,
    unmasked_to_base: bool = True,
    padded_rows: int = 512,
) -> BoundPlan:
    """Step 3: the bias, as a plan instead of a template `[1, 1, Nq, Nt]`. Pads get its lowest value."""
    plan = RegionPlan.from_masks(
        list(token_weights),
        ranges.regions,
        base_range=ranges.base,
        mode=mode,
        eps=eps,
        hard_value=hard_value if mode == "hard" else None,
        strength=strength,
        normalize_overlaps=False,
        base_always_allowed=base_always_allowed,
        unmasked_to_base=unmasked_to_base,
        resample="nearest",
    )
    grid = (1, token_weights.shape[1], token_weights.shape[2])
    rows = plan.segment_rows(grid).flatten(1)
    segments = [(start, end, 0) for start, end in (*ranges.regions, *([ranges.base] if ranges.base else []))]
    if ranges.total < padded_rows:
        rows = torch.cat([rows, rows.min().expand(1, rows.shape[1])])
        segments.append((0, 0, padded_rows - ranges.total))
    return bind_rows(rows, segments, "logit", grid)


class PlanHook(ModelHook):
    """Step 4's hook: the text stays as it is, conditional rows are served by a plan, others as in the stock model."""

    def __init__(self, plan: BoundPlan, window: tuple[float, float]) -> None:
        super().__init__(window=window, title="Anima bias")
        self._plan = plan

    def _why_not(self, x: torch.Tensor, context: Any, options: Mapping[str, Any]) -> str | None:
        frames, height, width = x.shape[-3], -(-x.shape[-2] // 2), -(-x.shape[-1] // 2)
        if self._plan.grid != (frames, height, width):
            return f"the picture has {(frames, height, width)} tokens, the bias was built for {self._plan.grid}"
        return super()._why_not(x, context, dict(options))

    def _override(
        self, model: Any, x: torch.Tensor, context: torch.Tensor, options: dict[str, Any], active: bool
    ) -> CrossAttention:
        rows = context.shape[1]
        plain = RegionPlan.plain(rows).bind(self._plan.grid)
        tags = options.get("cond_or_uncond") or [0]
        index = [int(tag != 0 or not active) for tag in tags for _ in range(x.shape[0] // len(tags))]
        key = (tuple(index), rows, x.device)
        if key not in self._plans:
            self._plans[key] = BoundPlan.batch([self._plan, plain], index).to(x.device)
        layouts = [Layout(False, 0, rows, 0)] * x.shape[0]

        def report(block: int, reason: str | None) -> None:
            if reason is not None:
                self._say(f"{self.title}: a cross-attention call of block {block} was not served: {reason}.")
            elif active:
                self._served += 1

        return CrossAttention(lambda _: self._plans[key], context, layouts, rows, report)
