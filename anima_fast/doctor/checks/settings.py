"""Settings and size of each pass, by the rules of what it is: a first or later one, of a turbo model, in tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .. import guidance
from ..case import Case
from ..findings import Edit, Finding
from ..passes import Pass, model_names
from ..workflow import Node

__all__ = ["CHECKS"]


def _judged(case: Case) -> list[Pass]:
    return case.passes if case.anima else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _place(one: Pass, name: str) -> tuple[Node, str] | None:
    return one.settings.get(name, (None, None))[1]


def _finding(
    case: Case, one: Pass, name: str, severity: str, summary: str, why: str, fix: str, value: Any, identifier: str = ""
) -> Finding:
    """A finding about one setting; `value` is what --fix sets, None for nothing."""
    place = _place(one, name)
    owner = place[0].id if place else one.node.id
    evidence = {case.said(owner, place[1] if place else name): one.get(name)}
    if one.turbo:
        evidence["turbo"] = one.turbo
    edits = (Edit(place[0].id, place[1], value),) if place and value is not None else ()
    nodes = (one.node.id,) if owner == one.node.id else (one.node.id, owner)
    return Finding(identifier or name, severity, summary, why, fix, nodes, evidence, edits)


def steps(case: Case) -> Iterator[Finding]:
    for one in _judged(case):
        count = _number(one.get("steps"))
        if count is None:
            continue
        why = "Each step removes a share of the noise; with too few of them some is left, as grain or mush."
        if one.turbo:
            least, most = guidance.TURBO_STEPS
            best = guidance.TURBO_BEST_STEPS
            if not least <= count <= most:
                yield _finding(
                    case,
                    one,
                    "steps",
                    "warning",
                    f"{one.node} takes {count:g} steps with a turbo model",
                    f"{one.turbo} is distilled for {best} steps: more burn the picture, fewer leave noise.",
                    f"Set {best} steps.",
                    best,
                )
            continue
        least, most = guidance.STEPS
        if one.later:
            # A part of the schedule is left, of which ComfyUI takes all the steps: fewer are enough.
            if count < guidance.STEPS_LEAST / 2:
                text = f"{one.node}, a later pass, takes {count:g} steps"
                yield _finding(case, one, "steps", "note", text, why, "Take 15 or more.", None)
        elif count < guidance.STEPS_LEAST:
            text = f"{one.node} takes {count:g} steps; Anima needs {least} to {most}"
            yield _finding(
                case, one, "steps", "warning", text, why, f"Set {least} steps, or use the turbo LoRA.", least
            )
        elif count < least or count > most:
            text = f"{one.node} takes {count:g} steps; usual are {least} to {most}"
            more = why if count < least else "More steps cost time and change little."
            yield _finding(case, one, "steps", "note", text, more, f"Set {least} to {most}.", None)


def cfg(case: Case) -> Iterator[Finding]:
    for one in _judged(case):
        scale = _number(one.get("cfg"))
        if scale is None:
            continue
        if one.turbo:
            best = guidance.TURBO_BEST_CFG
            if not guidance.TURBO_CFG[0] <= scale <= guidance.TURBO_CFG[1]:
                yield _finding(
                    case,
                    one,
                    "cfg",
                    "warning",
                    f"{one.node} has CFG {scale:g} with a turbo model",
                    f"{one.turbo} has guidance distilled into it: more on top burns the picture.",
                    f"Set CFG {best:g}.",
                    best,
                )
            continue
        least, most = guidance.CFG
        low, high = guidance.CFG_LIMITS
        sampler = str(one.get("sampler_name"))
        if sampler.endswith("_cfg_pp"):
            if scale > 2.5:
                yield _finding(
                    case,
                    one,
                    "cfg",
                    "warning",
                    f"{one.node} has CFG {scale:g} with {sampler}",
                    "CFG++ samplers scale guidance otherwise: 1 to 2 there is what 4 to 8 is elsewhere.",
                    "Set CFG 1 to 2, or another sampler.",
                    1.5,
                )
        elif scale < low or scale > high:
            why = (
                "Under it the prompt hardly counts and the negative prompt not at all (right for distilled "
                "models alone)."
                if scale < low
                else "High guidance saturates, burns edges and, with regional bias, breaks the picture up."
            )
            text = f"{one.node} has CFG {scale:g}; Anima wants {least:g} to {most:g}"
            yield _finding(case, one, "cfg", "warning", text, why, "Set CFG 4.", 4)
        elif not least <= scale <= most:
            text = f"{one.node} has CFG {scale:g}; usual are {least:g} to {most:g}"
            yield _finding(
                case, one, "cfg", "note", text, "More follows the prompt, less looks softer.", "Set CFG 4.", None
            )


def sampler(case: Case) -> Iterator[Finding]:
    for one in _judged(case):
        name = one.get("sampler_name")
        if not isinstance(name, str) or name in guidance.SAMPLERS or name.endswith("_cfg_pp"):
            continue
        good = ", ".join(guidance.SAMPLERS[:4])
        if name in guidance.SAMPLERS_NOT_FLOW:
            why = "Its formula assumes the noise of older models, not a flow's: noise is left in the picture."
            text = f"{name} is not made for a flow model"
            yield _finding(case, one, "sampler_name", "warning", text, why, f"Use {good}.", "er_sde", "sampler")
        elif name == "lcm" and not one.turbo:
            why = "It jumps to the end and adds noise anew each step, which only a model distilled for it can follow."
            text = "lcm without a distilled model"
            yield _finding(case, one, "sampler_name", "warning", text, why, f"Use {good}.", "er_sde", "sampler")
        else:
            why = "It may work well; these are the ones that Anima's authors recommend and tested."
            text = f"{name} is not among the samplers recommended for Anima"
            yield _finding(
                case, one, "sampler_name", "note", text, why, f"For a comparison use {good}.", None, "sampler"
            )


def scheduler(case: Case) -> Iterator[Finding]:
    for one in _judged(case):
        name = one.get("scheduler")
        if not isinstance(name, str) or name in guidance.SCHEDULERS:
            continue
        good = ", ".join(guidance.SCHEDULERS)
        if name in guidance.SCHEDULERS_NOT_FLOW:
            why = f"For a flow model {guidance.SCHEDULERS_NOT_FLOW[name]}."
            text = f"{name} is not a schedule for a flow model"
            yield _finding(case, one, "scheduler", "warning", text, why, f"Use {good}.", "simple")
        else:
            why = "It may work; the official templates use simple."
            text = f"{name} is not among the usual schedules"
            yield _finding(case, one, "scheduler", "note", text, why, f"For a comparison use {good}.", None)


def denoise(case: Case) -> Iterator[Finding]:
    for one in _judged(case):
        if one.size.start == "empty" and not one.later and one.denoise < 0.999:
            yield _finding(
                case,
                one,
                "denoise",
                "warning",
                f"{one.node} starts from an empty latent with denoise {one.denoise:g}",
                "The schedule is begun in its middle, where the model expects a picture with some noise; there is only "
                "grey with some noise, and the result stays blurred or noisy.",
                "Set denoise 1.",
                1.0,
            )
        elif one.later and one.size.known and not one.tiled:
            if one.denoise <= guidance.HIRES_DENOISE or one.size.megapixels <= 2:
                continue
            yield _finding(
                case,
                one,
                "denoise",
                "warning",
                f"{one.node}, a later pass at {one.size.megapixels:.1f} MP, has denoise {one.denoise:g}",
                "So much denoising makes a new picture at a size where the model repeats and breaks up.",
                "Set denoise 0.3 to 0.6.",
                0.5,
            )


def noise(case: Case) -> Iterator[Finding]:
    """Advanced samplers: noise that is not added, or left in a latent that is decoded."""
    for one in _judged(case):
        if one.get("add_noise") in ("disable", False) and one.size.start == "empty" and not one.later:
            value = "enable" if one.get("add_noise") == "disable" else True
            yield _finding(
                case,
                one,
                "add_noise",
                "error",
                f"{one.node} adds no noise to an empty latent",
                "There is nothing to make a picture of: it comes out grey.",
                "Set add_noise to enable for the first pass.",
                value,
                "noise",
            )
        last, count = _number(one.get("end_at_step")), _number(one.get("steps"))
        ends_early = last is not None and count is not None and last < count
        if one.get("return_with_leftover_noise") == "enable" and ends_early and _decoded(case, one):
            yield _finding(
                case,
                one,
                "return_with_leftover_noise",
                "error",
                f"{one.node} stops at step {last:g} of {count:g} with its noise, and that is decoded",
                "The VAE decodes a latent that is still part noise: structured noise is what it shows.",
                "Let a second sampler finish from that step, or set end_at_step to 10000.",
                "disable",
                "noise",
            )


def _decoded(case: Case, one: Pass) -> bool:
    readers = case.workflow.consumers()
    waiting, seen = [one.node.id], set()
    while waiting:
        name = waiting.pop()
        for reader, _, _ in readers.get(name, []):
            kind = case.workflow.nodes[reader].class_type
            if kind.startswith("VAEDecode") and reader in case.live:
                return True
            if reader not in seen and (kind.startswith("Latent") or kind == "ComfySwitchNode"):
                seen.add(reader)
                waiting.append(reader)
    return False


def size(case: Case) -> Iterator[Finding]:
    for one in _judged(case):
        if not one.size.known:
            continue
        width, height = int(one.size.width), int(one.size.height)
        evidence = {f"{case.label(one.size.node) if one.size.node else 'size'}": f"{width} x {height}"}
        nodes = tuple(name for name in (one.size.node, one.node.id) if name)
        cells = guidance.LATENT_PIXELS
        patch = guidance.PATCH_PIXELS
        if width % patch or height % patch:
            hook = any(r.pack == "hook" for r in case.regions)
            even = tuple(max(patch, round(side / patch) * patch) for side in (width, height))
            odd = width % cells or height % cells
            if hook:
                severity, why = "error", "AnimaMaskToTokenGrid stops with an error: half a token has no weight."
            elif odd:
                severity, why = "warning", "A latent cell is 8 pixels: the picture comes out smaller than asked for."
            else:
                severity = "warning"
                why = "A token is 16 pixels: ComfyUI pads the edge, and the last row or column is half a token."
            yield Finding(
                "size-multiple",
                severity,
                f"{width} x {height} is not a multiple of {patch}",
                why,
                f"Use {even[0]} x {even[1]}.",
                nodes,
                evidence,
                _resize(case, one, even),
            )
        if not one.later or one.size.start == "empty":
            yield from _megapixels(case, one, width, height, nodes, evidence)


def _megapixels(
    case: Case, one: Pass, width: int, height: int, nodes: tuple[str, ...], evidence: dict[str, Any]
) -> Iterator[Finding]:
    area = width * height / 2**20
    if one.tiled:
        return
    preview = any("preview" in name.lower() for _, _, name in model_names(case.workflow, one.path[-1:]))
    least, most = guidance.MEGAPIXELS["preview" if preview else "other"]
    usual = guidance.MEGAPIXELS_USUAL
    what = "preview checkpoints were trained around 1 MP" if preview else "it was trained from 0.25 to 2.4 MP"
    if area > most:
        text = f"the first pass is {width} x {height}, {area:.1f} MP; {what}"
        why = "At sizes it has not seen the model repeats things, loses the composition or leaves texture and noise."
        fix = "Make the first pass at about 1 MP (1024 x 1024, 896 x 1152, 832 x 1216) and enlarge it afterwards."
    elif area < least:
        text = f"the first pass is {width} x {height}, {area:.2f} MP; {what}"
        why = "There are too few tokens for what a picture shows."
        fix = "Make the first pass at about 1 MP."
    elif not preview and not usual[0] <= area <= usual[1]:
        yield Finding(
            "size",
            "note",
            f"the first pass is {width} x {height}, {area:.2f} MP; usual is about 1 MP",
            "Sizes from 0.25 to 2.4 MP work with checkpoints that were trained for them.",
            "If the composition suffers, make the first pass at about 1 MP.",
            nodes,
            evidence,
        )
        return
    else:
        return
    factor = math.sqrt(2**20 / (width * height))
    patch = guidance.PATCH_PIXELS
    best = tuple(max(patch, round(side * factor / patch) * patch) for side in (width, height))
    # Masks of solid pixels are made for this size: they would have to change with it.
    edits = () if case.regions else _resize(case, one, best)
    yield Finding("size", "warning", text, why, fix, nodes, evidence, edits)


def _resize(case: Case, one: Pass, to: tuple[int, ...]) -> tuple[Edit, ...]:
    node = case.workflow.nodes.get(one.size.node)
    if node is None or one.size.start != "empty":
        return ()
    places = [case.workflow.setting(node.id, name)[1] for name in ("width", "height")]
    if None in places or (places[0] and places[0] == places[1] and to[0] != to[1]):
        return ()
    return tuple(Edit(p[0].id, p[1], side) for p, side in zip(places, to, strict=True) if p is not None)


CHECKS = (steps, cfg, sampler, scheduler, denoise, noise, size)
