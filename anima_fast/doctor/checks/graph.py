"""Is the graph whole: links, needed inputs, nodes, something to save."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..case import REGIONAL_PACKS, Case
from ..findings import Edit, Finding
from ..node_types import WIDGETS
from ..workflow import Link

__all__ = ["CHECKS", "cycle"]

#: Links that ComfyUI asks of the nodes this tool is about, known without a server.
_NEEDED = {
    "KSampler": ("model", "positive", "negative", "latent_image"),
    "KSamplerAdvanced": ("model", "positive", "negative", "latent_image"),
    "SamplerCustom": ("model", "positive", "negative", "sampler", "sigmas", "latent_image"),
    "SamplerCustomAdvanced": ("noise", "guider", "sampler", "sigmas", "latent_image"),
    "VAEDecode": ("samples", "vae"),
    "CLIPTextEncode": ("clip",),
    "AnimaFastRegions": ("model", "base", "negative"),
    "AnimaFastRegion": ("conditioning", "mask"),
    "AnimaMaskToTokenGrid": ("model", "latent"),
    "AnimaApplyRegionalAttentionHook": ("positive", "negative", "bias_template"),
    "AnimaBuildRegionalCrossAttnBias": ("ranges", "token_weights"),
    "ModelSamplingAuraFlow": ("model",),
    "SaveImage": ("images",),
}


def cycle(case: Case) -> Iterator[Finding]:
    circle = case.workflow.cycle()
    if circle:
        shown = [case.label(node) for node in circle[:8]]
        yield Finding(
            "cycle",
            "error",
            f"a circle of {len(circle)} nodes: each needs the next one's output",
            "ComfyUI refuses a prompt that goes in a circle.",
            "Disconnect one link of the circle.",
            tuple(circle),
            {"circle": " <- ".join([*shown, "…" if len(circle) > 8 else shown[0]])},
        )


def dangling(case: Case) -> Iterator[Finding]:
    for node, name in case.workflow.dangling:
        if node in case.live:
            yield Finding(
                "dangling-link",
                "error",
                f"{case.said(node, name)} is linked to a node that is not there",
                "ComfyUI refuses the prompt, or runs without what was connected.",
                "Connect the input again.",
                (node,),
                {case.said(node, name): case.workflow.nodes[node].inputs.get(name)},
            )


def missing_input(case: Case) -> Iterator[Finding]:
    described = [info for info in case.object_info.values() if isinstance(info, dict)]
    produced = {kind for info in described for kind in info.get("output") or [] if isinstance(kind, str)}
    for node in case.nodes:
        info = case.object_info.get(node.class_type)
        names = set(_NEEDED.get(node.class_type, ()))
        if info is not None:
            needed = (info.get("input") or {}).get("required") or {}
            # Inputs that grow have other names; the user interface fills in widgets by itself.
            names |= {name for name, spec in needed.items() if str(_kind(spec)) in produced and not _is_widget(spec)}
            if case.workflow.kind == "api":
                names |= {name for name, spec in needed.items() if _is_widget(spec)}
        if node.class_type == "ComfySwitchNode":
            names = {"switch"}  # it asks for the chosen side only
        missing = sorted(name for name in names if name not in node.inputs)
        if missing:
            needed = (info.get("input") or {}).get("required") or {} if info is not None else {}
            defaults = {name: default for name in missing if (default := _default(needed.get(name))) is not None}
            yield Finding(
                "missing-input",
                "error",
                f"{node} has no {' and no '.join(missing)}",
                "ComfyUI refuses a prompt in which a needed input is missing. Often its source is muted or deleted.",
                f"Connect or set {', '.join(missing)}.",
                (node.id,),
                {case.said(node.id, name): "nothing" for name in missing},
                tuple(Edit(node.id, name, default) for name, default in defaults.items()),
            )


def _default(spec: object) -> Any:
    """What the server's description of a widget has it begin with."""
    options = spec[1] if isinstance(spec, (list, tuple)) and len(spec) > 1 and isinstance(spec[1], dict) else {}
    choices = _kind(spec) if isinstance(_kind(spec), list) else options.get("options")
    return options.get("default", choices[0] if isinstance(choices, list) and choices else None)


def _kind(spec: object) -> object:
    return spec[0] if isinstance(spec, (list, tuple)) and spec else None


def _is_widget(spec: object) -> bool:
    kind = _kind(spec)
    options = spec[1] if isinstance(spec, (list, tuple)) and len(spec) > 1 and isinstance(spec[1], dict) else {}
    plain = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    return (plain and not options.get("forceInput")) or options.get("socketless") is True


def no_output(case: Case) -> Iterator[Finding]:
    if not case.workflow.outputs():
        yield Finding(
            "no-output",
            "error",
            "nothing is saved or shown",
            "ComfyUI runs a workflow for its output nodes; without one it refuses the prompt.",
            "Connect the decoded picture to SaveImage.",
        )


def no_sampler(case: Case) -> Iterator[Finding]:
    if case.workflow.outputs() and not case.passes:
        yield Finding(
            "no-sampler",
            "note",
            "no sampler that doctor knows is reached by an output",
            "Settings, sizes and the model's way to the sampler cannot be judged.",
            "If the workflow does sample, run doctor with --comfyui, or with an API export.",
        )


def unknown_node(case: Case) -> Iterator[Finding]:
    info = case.object_info
    if info:
        for node in case.nodes:
            if node.class_type not in info:
                yield Finding(
                    "unknown-node",
                    "error",
                    f"the server does not have {node.class_type}",
                    "ComfyUI refuses a prompt with a node that it does not know.",
                    "Install the pack that the node is from, or remove the node.",
                    (node.id,),
                    {case.label(node.id): "not in /object_info"},
                )
        return
    on_path = {node.id: node for one in case.passes for node in one.path}
    known = WIDGETS.keys() | REGIONAL_PACKS.keys()
    strange = [node for node in on_path.values() if node.class_type not in known]
    if strange:
        yield Finding(
            "unknown-node",
            "note",
            f"the model goes through {', '.join(sorted({node.class_type for node in strange}))}: not known to doctor",
            "What it changes in the model (schedule, attention, sampling) cannot be read from the workflow.",
            "Nothing, if the pack is meant for Anima. With --comfyui the server's description of it is used.",
            tuple(node.id for node in strange),
            {case.label(node.id): "unknown" for node in strange},
        )


def not_anima(case: Case) -> Iterator[Finding]:
    if case.passes and not case.anima:
        loaders = [one.path[-1] for one in case.passes if one.path]
        yield Finding(
            "not-anima",
            "note",
            "nothing here says that the model is Anima",
            "Anima's numbers (schedule, steps, CFG, size, files) are not applied to other models.",
            "If it is Anima under another name, use --models: the file's header tells.",
            tuple(node.id for node in loaders),
            {
                case.said(node.id, name): value
                for node in loaders
                for name, value in node.inputs.items()
                if name.endswith("_name") and not isinstance(value, Link)
            },
        )


CHECKS = (dangling, missing_input, no_output, no_sampler, unknown_node, not_anima)
