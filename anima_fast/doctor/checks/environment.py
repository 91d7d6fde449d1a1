"""The server and the picture: versions, attention flags, what its nodes accept, a picture of another size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..case import Case
from ..environment import said
from ..findings import Edit, Finding
from ..guidance import COMFYUI_ANIMA, COMFYUI_NODES, family
from ..workflow import Link, Node

__all__ = ["CHECKS", "table"]

_MODEL_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".sft")


def _system(case: Case) -> Mapping[str, Any]:
    return ((case.environment or {}).get("system_stats") or {}).get("system") or {}


def _version(text: Any) -> tuple[int, ...] | None:
    found = re.match(r"v?(\d+)\.(\d+)", str(text or ""))
    return (int(found[1]), int(found[2])) if found else None


def table(case: Case) -> dict[str, str]:
    """What a diagnosis should know of the surroundings: the server's facts, and how to find out what it does not say;
    weights cast on loading; the picture's size beside the workflow's."""
    found = case.environment or {}
    rows = {name: said(value) for name, value in (found.get("facts") or {}).items()}
    rows.update({name: f"unknown: {where}" for name, where in (found.get("unknown") or {}).items()})
    weights = [
        f"{node}: {value}"
        for node in case.nodes
        if isinstance(value := node.inputs.get("weight_dtype"), str) and value != "default"
    ]
    if weights:
        rows["weights cast"] = ", ".join(weights)
    if case.picture:
        rows["picture"] = f"{case.picture[0]} x {case.picture[1]}"
        sizes = [f"{one.size.width:g} x {one.size.height:g}" for one in case.passes if one.size.known]
        rows["workflow's size"] = ", ".join(sizes) or "computed when it runs"
    return rows


def comfyui_version(case: Case) -> Iterator[Finding]:
    text = _system(case).get("comfyui_version")
    version = _version(text)
    if version is None or not case.anima:
        return
    newer = [node for node in case.nodes if node.class_type.startswith(("AnimaFast", "AnimaLLLite"))]
    if version < COMFYUI_ANIMA:
        yield Finding(
            "comfyui-version",
            "error",
            f"ComfyUI {text} has no Anima",
            "It would load the checkpoint as the Cosmos model that Anima is made from, without its text adapter "
            "and with "
            "another noise schedule: noise.",
            "Update ComfyUI to 0.29 or newer.",
            (),
            {"comfyui_version": text},
        )
    elif newer and version < COMFYUI_NODES:
        yield Finding(
            "comfyui-version",
            "error",
            f"ComfyUI {text} is too old for {newer[0].class_type}",
            "The attention patches of Anima that it needs came with 0.29.",
            "Update ComfyUI to 0.29 or newer.",
            tuple(node.id for node in newer),
            {"comfyui_version": text},
        )


def attention_flags(case: Case) -> Iterator[Finding]:
    argv = [str(word) for word in _system(case).get("argv") or []]
    hooks = [regions.node for regions in case.regions if regions.pack == "hook"]
    if hooks and "--use-flash-attention" in argv:
        yield Finding(
            "attention-backend",
            "note",
            "the server runs --use-flash-attention, which takes no mask",
            "Each call with a regional bias fails there, is logged and computed by SDPA: right, but slow and noisy in "
            "the log.",
            "Start ComfyUI without the flag.",
            tuple(node.id for node in hooks),
            {"argv": " ".join(argv)},
        )
    if hooks and "--use-ck-attention" in argv:
        yield Finding(
            "attention-backend",
            "note",
            "the server runs --use-ck-attention: attention in INT8",
            "The regional bias is added to rounded scores; borders can be uneven.",
            "To rule it out, start ComfyUI without the flag.",
            tuple(node.id for node in hooks),
            {"argv": " ".join(argv)},
        )


def refused_values(case: Case) -> Iterator[Finding]:
    """Values that the server's own description of a node does not allow: it refuses the prompt."""
    for node in case.nodes:
        info = case.object_info.get(node.class_type)
        inputs = info.get("input") if isinstance(info, Mapping) else None
        for group in ("required", "optional"):
            for name, spec in ((inputs or {}).get(group) or {}).items():
                value = node.inputs.get(name)
                if value is None or isinstance(value, Link) or not isinstance(spec, (list, tuple)) or not spec:
                    continue
                options = spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
                offered = (
                    spec[0] if isinstance(spec[0], list) else options.get("options") if spec[0] == "COMBO" else None
                )
                if isinstance(offered, list) and value not in offered:
                    yield from _not_offered(case, node, name, value, offered, options)
                yield from _out_of_range(case, node, name, value, options)


def _not_offered(
    case: Case, node: Node, name: str, value: Any, offered: list[Any], options: Mapping[str, Any]
) -> Iterator[Finding]:
    is_file = isinstance(value, str) and value.lower().endswith(_MODEL_FILES)
    is_upload = any(key.endswith("_upload") and options[key] for key in options)
    if options.get("remote") or not (offered or is_file or is_upload):
        return  # fetched by the user interface, or choices that the user writes
    missing = is_file or is_upload
    shown = ", ".join(map(str, offered[:8])) + (" …" if len(offered) > 8 else "")
    yield Finding(
        "file-missing" if missing else "value-refused",
        "error",
        f"the server does not have {value}" if missing else f"{node} does not take {name} {value}",
        "ComfyUI refuses a prompt with a value that is not in its list.",
        f"Choose one of: {shown}." if offered else "Put the file into the server's folder.",
        (node.id,),
        {case.said(node.id, name): value, "offered": len(offered)},
        _offered(node.id, name, str(value), offered) if is_file else (),
    )


def _out_of_range(case: Case, node: Node, name: str, value: Any, options: Mapping[str, Any]) -> Iterator[Finding]:
    low, high = options.get("min"), options.get("max")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if (low is not None and value < low) or (high is not None and value > high):
        yield Finding(
            "value-refused",
            "error",
            f"{node} takes {name} from {low} to {high}, not {value}",
            "ComfyUI refuses a prompt with a value out of its range.",
            f"Set {name} within it.",
            (node.id,),
            {case.said(node.id, name): value},
        )


def _offered(node: str, name: str, value: str, allowed: list[Any]) -> tuple[Edit, ...]:
    """The one file on the server that is meant: of the same name in another folder, or the one made for Anima."""
    base = _base(value)
    kind = {"clip_name": "encoder", "vae_name": "vae", "unet_name": "model"}.get(name)
    same = [choice for choice in allowed if _base(str(choice)) == base]
    fitting = [choice for choice in allowed if kind and family(kind, str(choice)) == "anima"]
    for found in (same, fitting):
        if len(found) == 1:
            return (Edit(node, name, found[0]),)
    return ()


def _base(name: str) -> str:
    return re.split(r"[\\/]", name)[-1].lower()


def picture_size(case: Case) -> Iterator[Finding]:
    if case.picture is None:
        return
    known = [one for one in case.passes if one.size.known]
    if not known or any((int(one.size.width), int(one.size.height)) == case.picture for one in known):
        return
    if any(not one.size.known for one in case.passes):
        return
    scaled = [
        n for n in case.nodes if "pscale" in n.class_type or "Resize" in n.class_type or "ImageScale" in n.class_type
    ]
    first = known[0]
    picture = f"{case.picture[0]} x {case.picture[1]}"
    yield Finding(
        "picture-size",
        "note" if scaled else "warning",
        f"the picture is {picture}, the workflow samples {first.size.width:g} x {first.size.height:g}",
        f"{scaled[0]} changes the size after sampling."
        if scaled
        else "The picture is not what this workflow makes: what is wrong with the one may not be in the other.",
        "Nothing."
        if scaled
        else "Diagnose the workflow that is in the picture itself (doctor reads PNG files), at its size.",
        (first.node.id,),
        {"picture": picture, "workflow": f"{first.size.width:g} x {first.size.height:g}"},
    )


CHECKS = (comfyui_version, attention_flags, refused_values, picture_size)
