"""The files a workflow loads: checkpoint, text encoder, VAE and LoRAs, by name and, where there is one, by header."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..case import Case
from ..files import identify, read_header
from ..findings import Edit, Finding
from ..guidance import family
from ..passes import model_names
from ..workflow import Link, Node

__all__ = ["CHECKS"]

OFFICIAL = {
    "model": "anima-base-v1.0.safetensors",
    "encoder": "qwen_3_06b_base.safetensors",
    "vae": "qwen_image_vae.safetensors",
}
_LOADERS = {
    "UNETLoader": ("unet_name", "model"),
    "CheckpointLoaderSimple": ("ckpt_name", "model"),
    "CLIPLoader": ("clip_name", "encoder"),
    "VAELoader": ("vae_name", "vae"),
}
_WHAT = {"model": "checkpoint", "encoder": "text encoder", "vae": "VAE"}
_WHY = {
    "model": "Anima's prompts, schedule and latents mean nothing to another model.",
    "encoder": "Anima reads the last hidden states of Qwen3-0.6B (1024 wide) through its own adapter; states of "
    "another "
    "model are refused or read as noise.",
    "vae": "Anima's latents are those of Qwen-Image's VAE: 16 channels of their own scale. Another VAE fails, or "
    "decodes "
    "a good latent into texture and noise.",
}


def _loaders(case: Case) -> Iterator[tuple[Node, str, str, str]]:
    for node in case.nodes:
        if node.class_type not in _LOADERS:
            continue
        name, kind = _LOADERS[node.class_type]
        value = case.workflow.value(node.id, name)
        if isinstance(value, str):
            yield node, name, value, kind


def by_name(case: Case) -> Iterator[Finding]:
    if not case.anima:
        return
    sampled = {node.id for one in case.passes for node in one.path}
    for node, name, value, kind in _loaders(case):
        found = family(kind, value)
        if kind == "model" and node.id not in sampled:
            continue
        if found in (None, "anima") or _known_by_header(case, value):
            continue
        if found == "wan2.1":
            yield Finding(
                "vae-mismatch",
                "note",
                f"{node} decodes with Wan 2.1's VAE",
                "It shares Anima's latent space; Qwen-Image's VAE is the same design tuned for pictures.",
                f"For the official result load {OFFICIAL['vae']}.",
                (node.id,),
                {case.said(node.id, name): value},
            )
            continue
        yield Finding(
            f"{_WHAT[kind].replace(' ', '-').lower()}-mismatch",
            "error",
            f"{node} loads {value}: {'by its name ' if found else ''}{found}, not what Anima needs",
            _WHY[kind],
            f"Load {OFFICIAL[kind]}" + (" or a model made of it." if kind == "model" else "."),
            (node.id,),
            {case.said(node.id, name): value},
            (Edit(node.id, name, OFFICIAL[kind]),) if kind != "model" or node.class_type == "UNETLoader" else (),
        )
    yield from _unnamed(case)
    for node in case.nodes:
        if node.class_type == "DualCLIPLoader":
            names = [case.workflow.value(node.id, f"clip_name{n}") for n in (1, 2)]
            yield Finding(
                "text-encoder-mismatch",
                "error",
                f"{node} loads two text encoders; Anima has one",
                _WHY["encoder"],
                f"Use CLIPLoader with {OFFICIAL['encoder']}.",
                (node.id,),
                {case.said(node.id, "clip_name1"): names[0], case.said(node.id, "clip_name2"): names[1]},
            )


def _unnamed(case: Case) -> Iterator[Finding]:
    """Renamed files: nothing wrong, but nothing to go by either."""
    if case.models:
        return
    renamed = [
        (node, name, value)
        for node, name, value, kind in _loaders(case)
        if kind != "model" and (family(kind, value) is None or (family(kind, value) == "anima" and _vague(value)))
    ]
    if renamed:
        yield Finding(
            "files-renamed",
            "note",
            f"{' and '.join(value for _, _, value in renamed)}: the names do not say which models these are",
            f"Right are {OFFICIAL['encoder']} and {OFFICIAL['vae']}; a wrong file under a right-sounding name "
            "gives noise.",
            "Give --models with ComfyUI's models folder: the files' headers tell.",
            tuple(node.id for node, _, _ in renamed),
            {case.said(node.id, name): value for node, name, value in renamed},
        )


def _vague(name: str) -> bool:
    return re.search(r"qwen", name, re.I) is None


def _known_by_header(case: Case, name: str) -> bool:
    """Whether a header decides, so that the name need not."""
    return any(path.suffix.lower() in (".safetensors", ".sft") for path in _paths(case, name))


def _paths(case: Case, name: str) -> list[Any]:
    return case.files.get(re.split(r"[\\/]", name)[-1].lower(), [])


def by_header(case: Case) -> Iterator[Finding]:
    if case.models is None:
        return
    wanted = [(node, name, value, kind) for node, name, value, kind in _loaders(case)]
    for one in case.passes:
        for node, name, value in model_names(case.workflow, one.path):
            if name.startswith("lora"):
                wanted.append((node, name, value, "lora"))
    seen = set()
    for node, name, value, kind in wanted:
        if (node.id, name) in seen:
            continue
        seen.add((node.id, name))
        paths = _paths(case, value)
        evidence: dict[str, Any] = {case.said(node.id, name): value}
        if not paths:
            yield Finding(
                "file-missing",
                "warning",
                f"{value} is not below {case.models.name}",
                "ComfyUI refuses a prompt that names a file it does not have.",
                "Put the file there, or choose one that is.",
                (node.id,),
                evidence,
            )
            continue
        if paths[0].suffix.lower() not in (".safetensors", ".sft"):
            continue
        try:
            header = read_header(paths[0])
        except (OSError, ValueError) as error:
            yield Finding(
                "file-damaged",
                "error",
                f"{value}: {error}",
                "ComfyUI cannot load it, or loads it without some of its weights.",
                "Download it again.",
                (node.id,),
                evidence,
            )
            continue
        got, found = identify(header)
        evidence["header"] = f"{got}, {found}; {len(header.shapes)} tensors, {', '.join(sorted(header.dtypes))}"
        if not case.anima or "unknown" in (got, found) or (got == kind and found == "anima"):
            continue
        if kind == "model" and node.class_type == "CheckpointLoaderSimple" and got != "model":
            continue
        identifier = f"{_WHAT.get(kind, 'LoRA').replace(' ', '-').lower()}-mismatch"
        yield Finding(
            identifier,
            "error",
            f"{node} loads {value}, which is {'a LoRA for ' + found if got == 'lora' else f'a {got}: {found}'}",
            _WHY.get(kind, "Its weights have no place in Anima: ComfyUI skips them, and the LoRA does nothing."),
            f"Load {OFFICIAL[kind]}." if kind in OFFICIAL else "Use a LoRA made for Anima.",
            (node.id,),
            evidence,
            (Edit(node.id, name, OFFICIAL[kind]),) if kind in ("encoder", "vae") else (),
        )


def region_encoders(case: Case) -> Iterator[Finding]:
    """All prompts of a picture must come from one text encoder."""
    for one in case.passes if case.anima else []:
        used: dict[str, list[str]] = {}
        for link in (one.positive, one.negative):
            for name in case.workflow.ancestors(link.node) if link else ():
                node = case.workflow.nodes[name]
                if node.class_type == "CLIPTextEncode" and isinstance(node.inputs.get("clip"), Link):
                    source = case.workflow.source(name, "clip")
                    while source is not None and isinstance(source.inputs.get("clip"), Link):
                        source = case.workflow.source(source.id, "clip")  # LoRAs, clip skip
                    if source is not None:
                        used.setdefault(source.id, []).append(name)
        names = {str(case.workflow.value(s, "clip_name", s)) for s in used}
        if len(names) > 1:
            yield Finding(
                "text-encoders-differ",
                "warning",
                f"the prompts of {one.node} come from {len(names)} text encoders",
                "Prompts of one picture are read by one adapter, which knows one encoder.",
                "Encode all prompts with the same CLIPLoader.",
                tuple(used),
                {case.label(source): [case.label(n) for n in sorted(nodes)] for source, nodes in used.items()},
            )


CHECKS = (by_name, by_header, region_encoders)
