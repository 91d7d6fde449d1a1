"""Model files by their safetensors header: what a file is, without loading a weight.

A safetensors file starts with the length of its header (8 bytes, little endian) and the header, JSON of
`{name: {"dtype", "shape", "data_offsets"}}`; a few kilobytes of a file of gigabytes say its architecture.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Header", "find", "identify", "read_header"]

_MOST_HEADER = 100 * 2**20  # the format's own limit
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "model.")


@dataclass(frozen=True)
class Header:
    """Tensors of a file, name to shape, and their data types."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: frozenset[str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises `ValueError` that says what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise ValueError("not a safetensors file, or cut short")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in tensors.items()}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        dtypes = frozenset(str(entry["dtype"]) for entry in tensors.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its safetensors header is damaged ({type(error).__name__})") from error
    if 8 + length + end > size:
        raise ValueError(f"cut short: {size} bytes of {8 + length + end}, an unfinished download?")
    return Header(shapes, dtypes)


def identify(header: Header) -> tuple[str, str]:
    """(kind, family) of a file: kind is model, encoder, vae, lora or unknown; family "anima" is what Anima uses.

    Anima's VAE and Wan 2.1's are one architecture, whose headers cannot be told apart.
    """
    names = header.shapes
    if any(".lora_" in name or name.endswith((".alpha", ".dora_scale")) for name in names):
        return "lora", _lora(names)
    bare = {_strip(name): shape for name, shape in names.items()}
    if "blocks.0.mlp.layer1.weight" in bare:
        adapter = "llm_adapter.blocks.0.cross_attn.q_proj.weight" in bare
        return "model", "anima" if adapter else "Cosmos-Predict2 without Anima's text adapter"
    if "double_blocks.0.img_attn.qkv.weight" in bare or "double_blocks.0.img_attn.norm.key_norm.scale" in bare:
        return "model", "Flux or another of its design"
    if any(name.startswith(("input_blocks.", "down_blocks.")) for name in bare):
        return "model", "an SD or SDXL UNet"
    if "transformer_blocks.0.attn.add_k_proj.weight" in bare:
        return "model", "Qwen-Image or another of its design"
    norm = next((s for n, s in names.items() if n.endswith("layers.0.post_attention_layernorm.weight")), None)
    if norm is not None:
        layers = 1 + max(int(found[1]) for n in names if (found := re.search(r"\blayers\.(\d+)\.", n)))
        qwen3 = any(n.endswith("layers.0.self_attn.q_norm.weight") for n in names)
        if qwen3 and norm == (1024,) and layers == 28:
            return "encoder", "anima"
        return "encoder", f"a language model of width {norm[0]} and {layers} layers"
    if any("text_model.encoder.layers.0" in n for n in names):
        return "encoder", "a CLIP text model"
    if any(n.endswith("block.0.layer.0.SelfAttention.q.weight") for n in names):
        return "encoder", "a T5 model"
    return _vae(names)


def _vae(names: dict[str, tuple[int, ...]]) -> tuple[str, str]:
    if "decoder.conv1.weight" in names and "decoder.middle.0.residual.0.gamma" in names:
        channels = names["decoder.conv1.weight"][1]
        return "vae", "anima" if channels == 16 else f"Wan 2.2 or another of {channels} latent channels"
    first = names.get("decoder.conv_in.weight") or names.get("first_stage_model.decoder.conv_in.weight")
    if first is not None and len(first) == 4:
        return "vae", f"a picture VAE of {first[1]} latent channels (SD, SDXL, Flux)"
    if first is not None:
        return "vae", f"a video VAE of {first[1]} latent channels"
    return "unknown", "nothing that doctor knows"


def _lora(names: dict[str, tuple[int, ...]]) -> str:
    text = "\n".join(names)
    if (
        re.search(r"llm_adapter|blocks[._]\d+[._](self_attn|cross_attn|mlp|adaln)", text)
        and "double_blocks" not in text
    ):
        return "anima"
    if re.search(r"down_blocks|input_blocks|lora_te", text):
        return "SD or SDXL"
    if "double_blocks" in text or "single_transformer_blocks" in text:
        return "Flux"
    return "unknown"


def _strip(name: str) -> str:
    return next((name[len(prefix) :] for prefix in _PREFIXES if name.startswith(prefix)), name)


def find(folder: Path) -> dict[str, list[Path]]:
    """Model files below a folder (symbolic links followed), by lower-case name."""
    found: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in files:
            if name.lower().endswith((".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")):
                found.setdefault(name.lower(), []).append(Path(root, name))
    return found
