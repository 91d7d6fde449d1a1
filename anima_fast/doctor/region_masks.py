"""Regions as a workflow wires them: their masks, made without running it, on the model's token grid.

Masks made of solid masks, their composites, inversions and thresholds are computed exactly, image files are read where
they can be found; anything else (painted, detected, computed by packs) is unknown and not judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..masks import load_mask, resample
from .guidance import PATCH_PIXELS
from .workflow import Link, Node, Workflow

__all__ = ["Region", "Regions", "find_regions", "mask_of", "token_weights"]

Mask = npt.NDArray[np.float32]
_MOST_PIXELS = 64 * 2**20
_MOST_DEPTH = 100


@dataclass
class Region:
    """One region: where its mask and its prompt come from; `mask` is None if it cannot be known."""

    name: str
    mask_link: Link | None
    prompt_link: Link | None
    strength: Any = 1.0
    mask: Mask | None = None


@dataclass
class Regions:
    """A regional node with its regions and settings. `pack`: "anima_fast" or "hook" (anima-regional-comfy-nodes)."""

    pack: str
    node: Node
    regions: list[Region] = field(default_factory=list)
    grid: Node | None = None
    bias: Node | None = None
    base: Link | None = None
    normalize: Any = True
    always: Any = True
    unmasked: Any = True

    @property
    def settings(self) -> Node:
        """The node that has mode, eps and strength."""
        return self.bias or self.node


def find_regions(workflow: Workflow, live: set[str], folders: list[Path]) -> list[Regions]:
    """Every regional node of the two kinds that doctor can look into."""
    found = []
    for node in workflow.nodes.values():
        if node.id not in live:
            continue
        if node.class_type == "AnimaApplyRegionalAttentionHook":
            found.append(_hook(workflow, node))
        elif node.class_type == "AnimaFastRegions":
            found.append(_anima_fast(workflow, node))
    for regions in found:
        for region in regions.regions:
            region.mask = mask_of(workflow, region.mask_link, folders)
    return found


def _link(node: Node | None, name: str) -> Link | None:
    value = node.inputs.get(name) if node else None
    return value if isinstance(value, Link) else None


def _hook(workflow: Workflow, node: Node) -> Regions:
    bias = workflow.source(node.id, "bias_template")
    grid = workflow.source(bias.id, "token_weights") if bias else None
    concat = workflow.source(bias.id, "ranges") if bias else None
    regions = Regions("hook", node, grid=grid, bias=bias, base=_link(concat, "base"))
    for number in range(1, 5):
        mask, prompt = _link(grid, f"mask_{number}"), _link(concat, f"region_{number}")
        if mask or prompt:
            regions.regions.append(Region(f"region_{number}", mask, prompt))
    if grid is not None:
        regions.normalize = workflow.value(grid.id, "normalize_overlaps", True)
    if bias is not None:
        regions.always = workflow.value(bias.id, "base_always_allowed", True)
        regions.unmasked = workflow.value(bias.id, "unmasked_to_base", True)
    return regions


def _anima_fast(workflow: Workflow, node: Node) -> Regions:
    regions = Regions("anima_fast", node, base=_link(node, "base"))
    for name, link in node.links():
        if not name.startswith("regions."):
            continue
        found = workflow.follow(link)
        region = workflow.nodes[found.node] if found else None
        if region is None or region.class_type != "AnimaFastRegion":
            continue
        title = workflow.value(region.id, "name", "region")
        title = title if isinstance(title, str) else name.removeprefix("regions.")
        strength = workflow.value(region.id, "strength", 1.0)
        regions.regions.append(Region(title, _link(region, "mask"), _link(region, "conditioning"), strength))
    regions.normalize = workflow.value(node.id, "normalize_overlaps", True)
    regions.always = workflow.value(node.id, "base_always_allowed", True)
    regions.unmasked = workflow.value(node.id, "unmasked_to_base", True)
    return regions


def mask_of(workflow: Workflow, link: Link | None, folders: list[Path], depth: int = 0) -> Mask | None:
    """The mask that an output carries, `[height, width]` in [0, 1]; None if it cannot be known."""
    found = workflow.follow(link)
    if found is None or depth > _MOST_DEPTH:
        return None
    node = workflow.nodes[found.node]

    def number(name: str) -> Any:
        value = workflow.value(node.id, name)
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MOST_PIXELS
        return value if usable else None

    def upstream(name: str) -> Mask | None:
        return mask_of(workflow, _link(node, name), folders, depth + 1)

    kind = node.class_type
    if kind == "SolidMask":
        value, width, height = number("value"), number("width"), number("height")
        if value is None or width is None or height is None or not 1 <= width * height <= _MOST_PIXELS:
            return None
        if min(width, height) < 1:
            return None
        return np.full((int(height), int(width)), min(max(float(value), 0.0), 1.0), dtype=np.float32)
    if kind == "InvertMask":
        mask = upstream("mask")
        return None if mask is None else np.subtract(1, mask)
    if kind == "ThresholdMask":
        mask, value = upstream("mask"), number("value")
        return None if mask is None or value is None else (mask > value).astype(np.float32)
    if kind == "MaskComposite":
        return _composite(upstream("destination"), upstream("source"), number("x"), number("y"), workflow, node)
    if kind in ("MaskPreview", "MaskPreview+"):
        return upstream("mask")
    if kind in ("LoadImageMask", "LoadImage"):
        return _loaded(workflow, node, found.slot, folders)
    return None


def _composite(
    destination: Mask | None, source: Mask | None, x: Any, y: Any, workflow: Workflow, node: Node
) -> Mask | None:
    """`source` onto `destination` with its top left corner at (x, y), what runs over the edge cut off."""
    operation = workflow.value(node.id, "operation")
    if destination is None or source is None or x is None or y is None or min(x, y) < 0:
        return None
    out = destination.copy()
    part = out[int(y) : int(y) + source.shape[0], int(x) : int(x) + source.shape[1]]
    other = source[: part.shape[0], : part.shape[1]]
    here, there = part.round() > 0, other.round() > 0
    results = {
        "multiply": lambda: part * other,
        "add": lambda: part + other,
        "subtract": lambda: part - other,
        "and": lambda: here & there,
        "or": lambda: here | there,
        "xor": lambda: here ^ there,
    }
    if not isinstance(operation, str) or operation not in results:
        return None
    part[...] = np.clip(results[operation](), 0, 1)
    return out


def _loaded(workflow: Workflow, node: Node, slot: int, folders: list[Path]) -> Mask | None:
    """A mask from an image file: the channel that LoadImageMask names, or what LoadImage leaves transparent."""
    name = workflow.value(node.id, "image")
    if not isinstance(name, str):
        return None
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        return None
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            channel = workflow.value(node.id, "channel", "alpha") if node.class_type == "LoadImageMask" else "alpha"
            if node.class_type == "LoadImage" and slot != 1:
                return None
            letter = {"red": "R", "green": "G", "blue": "B", "alpha": "A"}.get(str(channel))
            rgba = image.convert("RGBA")
            if letter is None:
                return None
            mask = load_mask(rgba.getchannel(letter), path.name).numpy()
            return np.subtract(1, mask) if letter == "A" else mask
    except (OSError, ValueError, SyntaxError):
        return None


def token_weights(mask: Mask, width: int, height: int) -> Mask:
    """A mask on the token grid of a picture: the mean over each token's 16 x 16 pixels, `[height/16, width/16]`."""
    import torch

    grid = (-(-height // PATCH_PIXELS), -(-width // PATCH_PIXELS))
    weights: Mask = resample(torch.from_numpy(np.ascontiguousarray(mask)), grid, method="area").float().numpy()
    return weights
