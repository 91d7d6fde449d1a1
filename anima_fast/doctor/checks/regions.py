"""Regional prompts: the bias, its window, masks on the token grid, tiling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import guidance
from ..case import Case
from ..findings import Edit, Finding
from ..passes import Pass, latent_size
from ..region_masks import Regions, token_weights
from ..workflow import Link, Node

__all__ = ["CHECKS"]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _edit(case: Case, node: Node, name: str, value: Any) -> tuple[Edit, ...]:
    place = case.workflow.setting(node.id, name)[1]
    return (Edit(place[0].id, place[1], value),) if place else (Edit(node.id, name, value),)


def _bias(case: Case, regions: Regions) -> tuple[float | None, float | None, float | None]:
    """(the bias where a region's weight is 0, strength, eps), None for what is computed or not used.

    soft_log: strength · ln(eps). Early versions of the hook pack had no strength; without it the bias acts whole.
    """
    node = regions.settings
    value = case.workflow.value
    strength = _number(value(node.id, "strength", 1.0))
    if regions.pack == "anima_fast" and value(node.id, "combine", "logit") == "blend":
        return None, strength, None
    if value(node.id, "mode", "soft_log") == "hard":
        hard = _number(value(node.id, "hard_value", -80.0))
        if regions.pack == "anima_fast" or hard is None or strength is None:
            return None, strength, None  # excluded altogether, which is exact
        return strength * hard, strength, None
    eps = _number(value(node.id, "eps", 1e-4))
    if strength is None or eps is None or eps <= 0:
        return None, strength, eps
    return strength * math.log(eps), strength, eps


def strength(case: Case) -> Iterator[Finding]:
    for regions in case.regions:
        node = regions.settings
        bias, value, eps = _bias(case, regions)
        said = case.said(node.id, "strength")
        blend = regions.pack == "anima_fast" and case.workflow.value(node.id, "combine", "logit") == "blend"
        if value == 0:
            yield Finding(
                "bias-strength",
                "warning",
                f"{node} has strength 0: regions are off",
                "The bias is multiplied by 0; all prompts count everywhere.",
                "Set strength 0.35.",
                (node.id,),
                {said: value},
                _edit(case, node, "strength", 0.35),
            )
            continue
        if blend or bias is None or value is None:
            continue
        unset = "strength" not in node.inputs
        evidence = {said: "not set: 1" if unset else value, "bias outside a mask": f"{bias:.1f}"}
        if eps is not None:
            evidence[case.said(node.id, "eps")] = eps
        if case.workflow.value(node.id, "mode", "soft_log") == "hard":
            yield Finding(
                "bias-strength",
                "note",
                f"{node} is hard: a bias of {bias:.1f} outside the masks",
                "Prompts count inside their masks and nowhere else. Borders show; soft_log is more forgiving.",
                "Nothing, if it is meant.",
                (node.id,),
                evidence,
            )
        elif value > guidance.BIAS_STRENGTH_MOST or bias <= guidance.BIAS_EXTREME:
            yield Finding(
                "bias-strength",
                "warning",
                f"{node}: a bias of {bias:.1f} outside the masks" + (", since strength is not set" if unset else ""),
                f"e^{bias:.1f}: prompts are cut off hard. From early steps on this breaks the composition up, "
                "with seams "
                "and noise along the masks. At strength 0.35 a prompt keeps 4 % of its weight outside its mask.",
                "Set strength 0.2 to 0.5.",
                (node.id,),
                evidence,
                _edit(case, node, "strength", 0.35),
            )
        elif value > guidance.BIAS_STRENGTH[1]:
            yield Finding(
                "bias-strength",
                "note",
                f"{node} has strength {value:g}: strict regions",
                "0.2 to 0.5 is usual; more draws harder borders.",
                "If borders show, lower it.",
                (node.id,),
                evidence,
            )


def eps(case: Case) -> Iterator[Finding]:
    for regions in case.regions:
        node = regions.settings
        _, _, value = _bias(case, regions)
        least, most = guidance.BIAS_EPS
        if value is None or least * 0.999 <= value <= most * 1.001:
            continue
        low = value < least
        yield Finding(
            "bias-eps",
            "warning",
            f"{node} has eps {value:g}; safe is {least:g} to {most:g}",
            "eps is the least weight, so ln(eps) the largest bias. "
            + ("So small, soft masks act as hard ones." if low else "So large, regions hardly keep to their masks."),
            f"Set eps {least if low else most:g}.",
            (node.id,),
            {case.said(node.id, "eps"): value, "ln(eps)": f"{math.log(value):.1f}"},
            _edit(case, node, "eps", least if low else most),
        )


def window(case: Case) -> Iterator[Finding]:
    for regions in case.regions:
        node = regions.node
        start = _number(case.workflow.value(node.id, "start_percent", 0.0))
        end = _number(case.workflow.value(node.id, "end_percent", 1.0))
        if start is None or end is None:
            continue
        evidence = {case.said(node.id, "start_percent"): start, case.said(node.id, "end_percent"): end}
        good = guidance.BIAS_START
        if start >= end:
            yield Finding(
                "bias-window",
                "error",
                f"{node} acts from {start:g} to {end:g} of the sampling: never",
                "The window is empty.",
                f"Set start_percent {good[1]:g} and end_percent 1.",
                (node.id,),
                evidence,
                _edit(case, node, "start_percent", good[1]) + _edit(case, node, "end_percent", 1.0),
            )
            continue
        bias, _, _ = _bias(case, regions)
        strict = bias is not None and bias < guidance.BIAS_STRICT
        if start < good[0] and strict:
            yield Finding(
                "bias-window",
                "warning",
                f"{node} forces strict regions from {start:g} of the sampling",
                f"The first steps lay out the picture. A bias of {bias:.1f} there keeps regions from agreeing on one "
                "composition; gentle regions (strength 0.35) may start at once.",
                f"Set start_percent {good[0]:g} to {good[1]:g}, or a lower strength.",
                (node.id,),
                {**evidence, "bias outside a mask": f"{bias:.1f}"},
                _edit(case, node, "start_percent", 0.25),
            )
        elif start > guidance.BIAS_START_LATE:
            yield Finding(
                "bias-window",
                "warning",
                f"{node} begins at {start:g} of the sampling",
                "By then the picture is laid out: regions change texture and colour at most.",
                f"Set start_percent {good[0]:g} to {good[1]:g}.",
                (node.id,),
                evidence,
                _edit(case, node, "start_percent", good[1]),
            )
        elif start > good[1]:
            yield Finding(
                "bias-window",
                "note",
                f"{node} begins at {start:g} of the sampling; usual is {good[0]:g} to {good[1]:g}",
                "The later, the weaker are regions, and the safer the composition.",
                "If regions are ignored, start earlier.",
                (node.id,),
                evidence,
            )
        if end < guidance.BIAS_END:
            yield Finding(
                "bias-window",
                "note",
                f"{node} ends at {end:g} of the sampling; usual is 1",
                "Afterwards all prompts count everywhere: details of one region can show in another.",
                "Set end_percent 1.",
                (node.id,),
                evidence,
            )


def cross_only(case: Case) -> Iterator[Finding]:
    for regions in case.regions:
        value = case.workflow.value(regions.node.id, "apply_to_cross_attn_only", True)
        if regions.pack == "hook" and value is False:
            yield Finding(
                "bias-on-self-attention",
                "warning",
                f"{regions.node} may put its bias on self-attention",
                "The bias is over text tokens. Where a picture has as many tokens as the text (512 x 256 pixels: 512) "
                "it lands on the picture's own attention.",
                "Set apply_to_cross_attn_only to true.",
                (regions.node.id,),
                {case.said(regions.node.id, "apply_to_cross_attn_only"): value},
                _edit(case, regions.node, "apply_to_cross_attn_only", True),
            )


def unpaired(case: Case) -> Iterator[Finding]:
    for regions in case.regions:
        for region in regions.regions:
            if region.mask_link and region.prompt_link:
                continue
            missing = "prompt" if region.mask_link else "mask"
            yield Finding(
                "region-unpaired",
                "warning",
                f"{region.name} of {regions.node} has no {missing}",
                "Its mask has no tokens to act on."
                if missing == "prompt"
                else "Its prompt counts nowhere: outside every mask the bias is at its lowest.",
                f"Connect the {missing}, or disconnect the other.",
                tuple(node.id for node in (regions.grid, regions.node) if node),
                {region.name: f"no {missing}"},
            )


def _sized(case: Case, regions: Regions) -> Iterator[tuple[Pass, int, int]]:
    """The passes that a regional node acts in, with a size that is known."""
    for one in case.passes:
        usable = one.size.known and one.size.width >= 16 and one.size.height >= 16 and not one.tiled
        if usable and regions.node.id in case.workflow.ancestors(one.node.id):
            yield one, int(one.size.width), int(one.size.height)


def masks(case: Case) -> Iterator[Finding]:
    for regions in case.regions:
        known = [region for region in regions.regions if region.mask is not None]
        for one, width, height in list(_sized(case, regions))[:1]:
            shapes = {region.name: region.mask.shape for region in known if region.mask is not None}
            yield from _shapes(case, regions, shapes, width, height)
            weights = {r.name: token_weights(r.mask, width, height) for r in known if r.mask is not None}
            yield from _vanished(case, regions, weights, one)
            if len(weights) == len(regions.regions) and weights:
                yield from _coverage(case, regions, np.stack(list(weights.values())), one)


def _tokens(width: int, height: int) -> int:
    return -(-width // guidance.PATCH_PIXELS) * -(-height // guidance.PATCH_PIXELS)


def grid_size(case: Case) -> Iterator[Finding]:
    """The hook pack makes its weights for one latent; at another size they do not fit."""
    for regions in case.regions:
        latent = regions.grid.inputs.get("latent") if regions.grid else None
        made = latent_size(case.workflow, latent) if isinstance(latent, Link) else None
        if regions.pack != "hook" or regions.grid is None or made is None or not made.known:
            continue
        for one, width, height in _sized(case, regions):
            tokens, theirs = _tokens(width, height), _tokens(int(made.width), int(made.height))
            if tokens != theirs:
                yield Finding(
                    "regional-grid",
                    "warning",
                    f"{regions.grid} makes weights for {made.width:g} x {made.height:g}, {one.node} samples "
                    f"{width} x {height}",
                    "The bias has a row for each of the picture's tokens; where their number differs the hook skips "
                    "it, and regions do not act.",
                    "Give this pass a grid, bias and hook of its own, made from its latent, or the base prompt alone.",
                    (regions.grid.id, regions.node.id, one.node.id),
                    {str(regions.grid): f"{theirs} tokens", str(one.node): f"{tokens} tokens"},
                )


def _nodes(regions: Regions, one: Pass) -> tuple[str, ...]:
    masks = [region.mask_link.node for region in regions.regions if region.mask_link]
    return tuple(dict.fromkeys([regions.grid.id if regions.grid else regions.node.id, *masks, one.node.id]))


def _shapes(
    case: Case, regions: Regions, shapes: dict[str, tuple[int, ...]], width: int, height: int
) -> Iterator[Finding]:
    value = case.workflow.value
    if regions.pack == "anima_fast" and (
        value(regions.node.id, "stretch_masks", False) or value(regions.node.id, "canvas_width", 0)
    ):
        return
    off = {
        name: shape for name, shape in shapes.items() if abs(math.log(shape[1] / shape[0] / (width / height))) > 0.02
    }
    if off:
        ours = regions.pack == "anima_fast"
        yield Finding(
            "mask-shape",
            "warning",
            f"masks of {', '.join(off)} have another shape than the picture, {width} x {height}",
            "Anima Regions leaves pictures of another shape alone, since they are often tiles: regions do not act."
            if ours
            else "The mask is stretched to the picture: borders are not where they were drawn.",
            f"Make the masks {width} x {height}, or of that shape" + (", or turn on stretch_masks." if ours else "."),
            (regions.grid.id if regions.grid else regions.node.id,),
            {name: f"{shape[1]} x {shape[0]}" for name, shape in off.items()},
        )


def _vanished(case: Case, regions: Regions, weights: dict[str, Any], one: Pass) -> Iterator[Finding]:
    for name, weight in weights.items():
        top = float(weight.max())
        grid = f"{weight.shape[1]} x {weight.shape[0]} tokens"
        if top == 0:
            text, why = f"the mask of {name} is empty", "The region's prompt counts nowhere."
        elif top < 0.5:
            text = f"the mask of {name} vanishes on the token grid: no token is half covered"
            why = (
                "A token is 16 x 16 pixels and gets the mean of the mask under it; thin or faint masks are "
                "averaged away."
            )
        else:
            continue
        yield Finding(
            "mask-vanishes",
            "warning",
            text,
            why,
            "Make it larger than 16 pixels and brighter, or remove the region.",
            _nodes(regions, one),
            {name: f"largest weight {top:.2f} on {grid}"},
        )


def _coverage(case: Case, regions: Regions, weights: Any, one: Pass) -> Iterator[Finding]:
    total = weights.sum(0)
    over, bare = float((total > 1.01).mean()), float((total < 0.01).mean())
    evidence = {"grid": f"{weights.shape[2]} x {weights.shape[1]} tokens"}
    nodes = _nodes(regions, one)
    if over > 0.01:
        normalized = regions.normalize is not False
        owner = regions.grid or regions.node
        yield Finding(
            "masks-overlap",
            "note" if normalized else "warning",
            f"masks overlap on {over:.0%} of the picture" + ("" if normalized else ", and are not normalized"),
            "Where they do, weights are divided by their sum: the prompts share the place."
            if normalized
            else "Weights add up to more than 1 there, so those tokens listen to the regions more than elsewhere.",
            "Nothing, if it is meant; priority gives the place to one."
            if normalized
            else "Turn on normalize_overlaps.",
            nodes,
            {**evidence, "overlap": f"{over:.1%}", case.said(owner.id, "normalize_overlaps"): regions.normalize},
            () if normalized else _edit(case, owner, "normalize_overlaps", True),
        )
    if bare > 0.01:
        served = regions.base is not None and (regions.always is not False or regions.unmasked is not False)
        settings = regions.settings
        yield Finding(
            "masks-hole",
            "note" if served else "warning",
            f"{bare:.0%} of the picture is in no mask" + ("; the base prompt has it" if served else ""),
            "There the base prompt alone counts."
            if served
            else "There every prompt is pushed down alike: the place follows none of them in particular.",
            "Nothing, if it is meant."
            if served
            else "Connect a base prompt, and let it count there (unmasked_to_base or base_always_allowed).",
            nodes,
            {**evidence, "uncovered": f"{bare:.1%}", "base": case.label(regions.base.node) if regions.base else "none"},
            () if served or regions.base is None else _edit(case, settings, "unmasked_to_base", True),
        )


def tiling(case: Case) -> Iterator[Finding]:
    for one in case.passes:
        if not one.tiled:
            continue
        before = case.workflow.ancestors(one.node.id)
        tiler = next(
            (node for node in [one.node, *one.path] if "Tile" in node.class_type or "Ultimate" in node.class_type),
            one.node,
        )
        for regions in case.regions:
            if regions.node.id not in before:
                continue
            value = case.workflow.value
            crops = (value(regions.node.id, f"crop_{side}", None) for side in ("top", "left", "bottom", "right"))
            if regions.pack == "anima_fast" and tuple(crops) not in ((None,) * 4, (0, 0, 1, 1)):
                continue
            yield Finding(
                "tiling",
                "warning",
                f"{tiler} samples tiles, but the masks of {regions.node} are for the whole picture",
                "A tile has its own tokens. The hook pack's bias no longer fits and is skipped, or, if a tile "
                "has as many "
                "tokens as the picture, every tile gets the whole picture's regions."
                if regions.pack == "hook"
                else "A tile of the picture's shape gets the whole picture's regions, others get none.",
                "Make the regional pass without tiles; tile a second pass with the base prompt, or give each "
                "tile its own "
                "masks (crop_* of Anima Regions).",
                (tiler.id, regions.node.id, one.node.id),
                {
                    case.label(tiler.id): {
                        k: v for k, v in tiler.inputs.items() if k.startswith("tile") or k == "upscale_by"
                    }
                },
            )
        sides = [case.workflow.value(tiler.id, name) for name in ("tile_width", "tile_height")]
        width, height = (_number(side) for side in sides)
        if width and height and not 0.25 <= width * height / 2**20 <= 2.4:
            yield Finding(
                "tile-size",
                "note",
                f"tiles of {width:g} x {height:g}",
                "Each tile is a picture to the model: best at about 1 MP.",
                "Use tiles of about 1024 x 1024.",
                (tiler.id,),
                {case.said(tiler.id, "tile_width"): width, case.said(tiler.id, "tile_height"): height},
            )


def switched_off(case: Case) -> Iterator[Finding]:
    for regions in case.regions:
        if case.workflow.value(regions.node.id, "enabled", True) is False:
            yield Finding(
                "regions-off",
                "note",
                f"{regions.node} is switched off",
                "Conditioning passes through unchanged.",
                "Set enabled to true when you are done comparing.",
                (regions.node.id,),
                {case.said(regions.node.id, "enabled"): False},
            )


CHECKS = (strength, eps, window, cross_only, unpaired, masks, grid_size, tiling, switched_off)
