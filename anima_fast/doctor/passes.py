"""The sampling passes of a workflow: which model reaches each sampler by which patches, at what size and settings.

A workflow may sample more than once (a hires pass, an inpainted detail); what is right for the first pass, from an
empty latent, is not what is right for a later one, so each is judged by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .guidance import TURBO_NAMES, family
from .workflow import UNKNOWN, Link, Node, Workflow

__all__ = [
    "FlowSampling",
    "Pass",
    "Size",
    "is_anima",
    "latent_size",
    "model_names",
    "model_path",
    "passes",
    "sampling",
]

#: Inputs through which a node takes the model it patches.
_MODEL_INPUTS = ("model", "model1", "unet", "base_model", "MODEL", "guider")
_MOST_DEPTH = 200
_MOST_PIXELS = 2**20  # of a side; anything more, or not finite, is no size


@dataclass(frozen=True)
class Size:
    """A picture's size in pixels and what it starts from: "empty" noise, "image" or "unknown"."""

    width: Any
    height: Any
    start: str
    node: str = ""

    @property
    def known(self) -> bool:
        sides = (self.width, self.height)
        return all(isinstance(side, (int, float)) and 0 < side <= _MOST_PIXELS for side in sides)

    @property
    def megapixels(self) -> float:
        return self.width * self.height / 2**20


@dataclass(frozen=True)
class FlowSampling:
    """What a path's sampling patch makes of the model: `multiplier` scales the timestep that the model is told."""

    kind: str
    shift: Any
    multiplier: float
    node: str | None


@dataclass
class Pass:
    """One sampler at work. `path` goes from it back to the loader; settings are (value, (node, input) that set it)."""

    node: Node
    path: list[Node]
    settings: dict[str, tuple[Any, tuple[Node, str] | None]] = field(default_factory=dict)
    size: Size = Size(None, None, "unknown")
    latent: Link | None = None
    later: bool = False
    tiled: bool = False
    positive: Link | None = None
    negative: Link | None = None
    scheduler_path: list[Node] | None = None
    turbo: str | None = None

    def get(self, name: str) -> Any:
        return self.settings.get(name, (None, None))[0]

    @property
    def denoise(self) -> float:
        value = self.get("denoise")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 1.0


_TILED = ("UltimateSDUpscale", "TiledKSampler", "BNK_Tiled", "TiledDiffusion", "MixtureOfDiffusers", "SpotDiffusion")


def passes(workflow: Workflow, live: set[str]) -> list[Pass]:
    """Every sampler that a run reaches, those that start from nothing first."""
    found = []
    for node in workflow.nodes.values():
        if node.id not in live:
            continue
        if node.class_type == "SamplerCustomAdvanced":
            found.append(_advanced(workflow, node))
        elif node.class_type == "SamplerCustom":
            found.append(_custom(workflow, node, node, ("positive", "negative")))
        elif _samples(node) and any(name in node.inputs for name in ("steps", "sampler_name", "cfg", "denoise")):
            found.append(_plain(workflow, node))
    for one in found:
        one.tiled = any(node.class_type.startswith(_TILED) for node in [one.node, *one.path])
        one.turbo = _turbo(workflow, one.path)
        one.size = latent_size(workflow, one.latent) if one.latent else _own_size(workflow, one.node)
        one.later = one.size.start != "empty" or _after_another(workflow, one, found)
    return sorted(found, key=lambda one: one.later)


def _linked(node: Node, *names: str) -> Link | None:
    return next((value for name in names if isinstance(value := node.inputs.get(name), Link)), None)


def _plain(workflow: Workflow, node: Node) -> Pass:
    names: tuple[str, ...] = ("steps", "cfg", "sampler_name", "scheduler", "denoise", "seed", "noise_seed", "add_noise")
    names += ("start_at_step", "end_at_step", "return_with_leftover_noise")
    one = Pass(node, model_path(workflow, node.id))
    one.settings = {name: workflow.setting(node.id, name) for name in names if name in node.inputs}
    one.latent = _linked(node, "latent_image", "latent", "samples")
    one.positive, one.negative = _linked(node, "positive"), _linked(node, "negative")
    return one


def _custom(workflow: Workflow, node: Node, guider: Node, names: tuple[str, str]) -> Pass:
    one = Pass(node, model_path(workflow, guider.id))
    one.positive, one.negative = _linked(guider, names[0]), _linked(guider, names[1])
    one.latent = _linked(node, "latent_image")
    for name in ("cfg", "noise_seed", "add_noise"):
        for owner in (node, guider):
            if name in owner.inputs:
                one.settings[name] = workflow.setting(owner.id, name)
    sampler = workflow.source(node.id, "sampler")
    if sampler is not None and "sampler_name" in sampler.inputs:
        one.settings["sampler_name"] = workflow.setting(sampler.id, "sampler_name")
    sigmas = workflow.source(node.id, "sigmas")
    for _ in range(_MOST_DEPTH):
        if sigmas is None or "steps" in sigmas.inputs:
            break
        sigmas = workflow.source(sigmas.id, "sigmas")  # SplitSigmas, FlipSigmas …
    if sigmas is not None:
        for name in ("scheduler", "steps", "denoise"):
            if name in sigmas.inputs:
                one.settings[name] = workflow.setting(sigmas.id, name)
        if isinstance(sigmas.inputs.get("model"), Link):
            one.scheduler_path = model_path(workflow, sigmas.id)
    return one


def _advanced(workflow: Workflow, node: Node) -> Pass:
    guider = workflow.source(node.id, "guider")
    if guider is None:
        return Pass(node, [], latent=_linked(node, "latent_image"))
    one = _custom(workflow, node, guider, ("positive", "negative"))
    if one.positive is None:
        one.positive = _linked(guider, "conditioning", "cond1")
    if guider.class_type == "BasicGuider":
        one.settings["cfg"] = (1.0, None)
    return one


def model_path(workflow: Workflow, start: str) -> list[Node]:
    """The nodes that a model has come through, from the one a node's `model` is connected to back to the loader."""
    path: list[Node] = []
    seen: set[str] = {start}
    node: Node | None = workflow.nodes[start]
    while node is not None:
        name = next((name for name in _MODEL_INPUTS if isinstance(node.inputs.get(name), Link)), None)
        node = workflow.source(node.id, name) if name else None
        if node is None or node.id in seen:
            break
        seen.add(node.id)
        path.append(node)
    return path


def model_names(workflow: Workflow, path: list[Node]) -> list[tuple[Node, str, str]]:
    """The files that a path loads, as (node, input, name), LoRAs of strength 0 left out."""
    found = []
    for node in path:
        for name in node.inputs:
            value = workflow.value(node.id, name)
            if isinstance(value, dict):  # loaders of many LoRAs say each as {"on", "lora", "strength"}
                if value.get("on") is False or value.get("strength") == 0:
                    continue
                value = value.get("lora") or value.get("content")
            elif name.startswith("lora") and 0 in (
                workflow.value(node.id, "strength_model", 1),
                workflow.value(node.id, "strength", 1),
            ):
                continue
            if isinstance(value, str) and value.lower().endswith((".safetensors", ".gguf", ".sft", ".ckpt", ".pt")):
                found.append((node, name, value))
    return found


def _turbo(workflow: Workflow, path: list[Node]) -> str | None:
    return next((name for _, _, name in model_names(workflow, path) if TURBO_NAMES.search(name)), None)


def sampling(workflow: Workflow, path: list[Node]) -> FlowSampling:
    """The noise schedule at a path's end: the patch nearest to the sampler decides, none leaves the model's own."""
    for node in path:
        kind = node.class_type
        if not kind.startswith("ModelSampling"):
            continue
        shift = workflow.value(node.id, "shift")
        if kind in ("ModelSamplingAuraFlow", "ModelSamplingSD3"):
            flow = workflow.value(node.id, "sampling", "flow") in ("flow", UNKNOWN)
            return FlowSampling("flow" if flow else "other", shift, 1000.0 if kind.endswith("SD3") else 1.0, node.id)
        if kind == "ModelSamplingFlux":
            return FlowSampling("flow", _flux_shift(workflow, node), 1.0, node.id)
        if kind == "ModelSamplingLTXV":
            return FlowSampling("flow", UNKNOWN, 1.0, node.id)
        return FlowSampling("other", UNKNOWN, 1.0, node.id)
    return FlowSampling("flow", 3.0, 1.0, None)


def _flux_shift(workflow: Workflow, node: Node) -> Any:
    """e^mu of Flux's schedule, mu linear in the number of 16-pixel tokens from 256 to 4096."""
    names = ("max_shift", "base_shift", "width", "height")
    values = [workflow.value(node.id, name) for name in names]
    if not all(isinstance(value, (int, float)) for value in values):
        return UNKNOWN
    most, least, width, height = values
    tokens = width * height / 256
    mu = least + (most - least) * (tokens - 256) / (4096 - 256)
    return round(math.exp(min(mu, 100.0)), 3)  # absurd already, and exp of more would overflow


def latent_size(workflow: Workflow, link: Link | None, depth: int = 0) -> Size:
    """Pixels of the picture that a latent becomes, and what it was made from."""
    found = workflow.follow(link)
    if found is None or depth > _MOST_DEPTH:
        return Size(UNKNOWN, UNKNOWN, "unknown")
    node = workflow.nodes[found.node]
    kind = node.class_type
    if "width" in node.inputs and "height" in node.inputs and "Latent" in kind and "Empty" in kind:
        return Size(workflow.value(node.id, "width"), workflow.value(node.id, "height"), "empty", node.id)
    if kind == "LatentUpscaleBy":
        before = latent_size(workflow, _linked(node, "samples"), depth + 1)
        return _scaled(before, workflow.value(node.id, "scale_by"), node.id, 8)
    if kind == "LatentUpscale":
        return Size(workflow.value(node.id, "width"), workflow.value(node.id, "height"), "image", node.id)
    if kind.startswith("VAEEncode"):
        before = image_size(workflow, _linked(node, "pixels", "image"), depth + 1)
        return Size(before.width, before.height, "image", before.node or node.id)
    for name in ("latent_image", "samples", "latent"):
        if isinstance(node.inputs.get(name), Link):
            before = latent_size(workflow, node.inputs[name], depth + 1)
            made = "image" if _samples(node) else before.start
            return Size(before.width, before.height, made, before.node)
    return Size(UNKNOWN, UNKNOWN, "unknown", node.id)


def _samples(node: Node) -> bool:
    from_something = _linked(node, "latent_image", "latent", "samples", "image", "upscaled_image", "pixels")
    linked = all(isinstance(node.inputs.get(name), Link) for name in ("positive", "model"))
    return (linked and from_something is not None) or node.class_type == "SamplerCustomAdvanced"


def image_size(workflow: Workflow, link: Link | None, depth: int = 0) -> Size:
    """Pixels of an IMAGE, as far as the workflow says."""
    found = workflow.follow(link)
    if found is None or depth > _MOST_DEPTH:
        return Size(UNKNOWN, UNKNOWN, "unknown")
    node = workflow.nodes[found.node]
    kind = node.class_type
    if kind in ("ImageScale", "EmptyImage", "SolidMask"):
        return Size(workflow.value(node.id, "width"), workflow.value(node.id, "height"), "image", node.id)
    if kind == "ImageScaleBy":
        before = image_size(workflow, _linked(node, "image"), depth + 1)
        return _scaled(before, workflow.value(node.id, "scale_by"), node.id, 1)
    if kind.startswith("VAEDecode"):
        return latent_size(workflow, _linked(node, "samples"), depth + 1)
    for name in ("image", "images", "pixels"):
        if isinstance(node.inputs.get(name), Link) and not _resizes(kind):
            return image_size(workflow, node.inputs[name], depth + 1)
    return Size(UNKNOWN, UNKNOWN, "image", node.id)


def _resizes(kind: str) -> bool:
    return any(word in kind for word in ("Scale", "Upscale", "Resize", "Crop", "Pad"))


def _scaled(before: Size, factor: Any, node: str, cell: int) -> Size:
    if not before.known or not isinstance(factor, (int, float)):
        return Size(UNKNOWN, UNKNOWN, "image", node)
    width, height = (round(side / cell * factor) * cell for side in (before.width, before.height))
    return Size(width, height, "image", node)


def _own_size(workflow: Workflow, node: Node) -> Size:
    """Samplers that take pictures, not latents (upscalers, detailers)."""
    before = image_size(workflow, _linked(node, "image", "upscaled_image", "pixels"))
    factor = workflow.value(node.id, "upscale_by", 1.0)
    return _scaled(before, factor, before.node, 1) if factor != 1 else before


def _after_another(workflow: Workflow, one: Pass, found: list[Pass]) -> bool:
    if one.latent is None:
        return False
    before = workflow.ancestors(one.latent.node)
    return any(other.node.id in before for other in found if other is not one)


def is_anima(workflow: Workflow, path: list[Node]) -> bool | None:
    """Whether a path's checkpoint is Anima by its name: True, False, or None if the name does not say."""
    names = model_names(workflow, path[-1:]) if path else []
    kinds = {family("model", name) for _, _, name in names}
    return True if "anima" in kinds else False if kinds - {None} else None
