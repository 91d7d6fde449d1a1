"""Anima Region Preview: the regions on the model's tokens, as pictures. Nothing here imports ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...commands.region_pictures import colours, token_grid_preview, weight_map
from .regions import Region, Settings, token_weights

__all__ = ["preview"]


def preview(
    regions: Sequence[Region], settings: Settings, width: int, height: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGEs `[1, H, W, 3]` of the token grid with its legend and `[R, H, W, 3]` of each region's weights."""
    weights = token_weights(settings, regions, width, height)
    names = [region.name for region in regions]
    overlap, uncovered = (weights > 1e-3).sum(dim=0) > 1, weights.sum(dim=0) <= 1e-3
    legend: list[tuple[str, tuple[int, int, int] | None, str]] = []
    for region, weight, colour in zip(regions, weights, colours(len(regions)), strict=True):
        covers = f"covers {100 * float(weight.mean()):.1f} %, strength {region.strength:g}"
        legend.append((region.name, colour, covers))
    legend.append(("overlap", None, f"{100 * float(overlap.float().mean()):.1f} % of the tokens"))
    legend.append(("uncovered", None, f"{100 * float(uncovered.float().mean()):.1f} % of the tokens: base prompt only"))
    title = f"{width} x {height}: {weights.shape[2]} x {weights.shape[1]} tokens"
    grid = token_grid_preview(weights, legend, title)
    maps = [
        weight_map(weight, name, f"{float(weight.min()):.3g} to {float(weight.max()):.3g}")
        for weight, name in zip(weights, names, strict=True)
    ]
    return _image([grid]), _image(maps)


def _image(pictures: Sequence[object]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
