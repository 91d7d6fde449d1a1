"""What a server says of itself, under the names a diagnosis asks for; and where to look for what it does not say.

`facts(found)` of the raw answers (`Server.environment`) gives

    facts    name -> value: versions, GPU, attention and its flags, dtypes, packs, those of them that change attention
    unknown  name -> how to find out
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

__all__ = ["facts", "said"]

#: Command-line flags that decide how attention, precision and memory are done.
_FLAGS = re.compile(
    r"^--(use-.*attention|disable-xformers|force-upcast-attention|dont-upcast-attention|fp\d+-\w+|bf16-\w+|force-fp\d+"
    r"|fast|deterministic|cpu|gpu-only|highvram|normalvram|lowvram|novram|directml|enable-triton-backend"
    r"|disable-cuda-graphs|disable-comfy-compiler|cuda-malloc|disable-cuda-malloc|supports-fp8-compute)"
)

#: What the server logs once of the attention it has chosen, and what that means.
_ATTENTION = {
    "using sage attention": "sage",
    "using flash attention": "flash",
    "using xformers attention": "xformers",
    "using pytorch attention": "pytorch",
    "using split optimization for attention": "split",
    "using sub quadratic optimization for attention": "sub_quad",
}

_DTYPES = {
    "model": re.compile(r"^model weight dtype (torch\.\w+), manual cast: (\S+)"),
    "text encoder": re.compile(r"^CLIP/text encoder model load device: .* dtype: (torch\.\w+)"),
    "VAE": re.compile(r"^VAE load device: .* dtype: (torch\.\w+)"),
}

#: Nodes that write the attention override, replace attention modules, or skip forwards, whatever pack they are from.
_PATCHES_ATTENTION = re.compile(
    r"sage.?att|attention.?(backend|couple|select|override|patch)|attn|sparse.?att|region|nag\b|teacache|easycache|"
    r"lazycache|wavespeed|firstblockcache|fbcache|perturbed|hypertile|torch.?compile|freeu|tiled.?diffusion",
    re.IGNORECASE,
)
_CORE = re.compile(r"^(nodes|comfy_extras|comfy_api_nodes)(\.|$)")


def facts(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"facts": …, "unknown": …}` of `system_stats`, `object_info` and `log`."""
    system = found["system_stats"].get("system", {})
    devices = [d for d in found["system_stats"].get("devices") or [] if isinstance(d, dict)]
    log = [str(line) for line in found.get("log") or []]
    argv = [str(a) for a in system.get("argv") or []]
    torch = str(system.get("pytorch_version") or "")
    known: dict[str, Any] = {
        "ComfyUI": system.get("comfyui_version"),
        "Python": str(system.get("python_version") or "").split(" ")[0] or None,
        "torch": torch or None,
        "CUDA": _cuda(torch),
        "driver": _driver(bool(found.get("is_local"))),
        "devices": [str(d.get("name")) for d in devices] or None,
        "VRAM": [f"{d.get('vram_total', 0) / 2**30:.1f} GiB" for d in devices if d.get("type") != "cpu"] or None,
        "attention": _attention(argv, log),
        "flags": [a for a in argv if _FLAGS.match(a)],
        "dtypes": _dtypes(log),
        "packs": _packs(found.get("object_info") or {}),
        "attention nodes": _attention_nodes(found.get("object_info") or {}),
    }
    where = {
        "driver": "nvidia-smi, on the machine of the server",
        "CUDA": "python -c 'import torch; print(torch.version.cuda)', with the server's Python",
        "attention": 'the server\'s log when it starts: a line "Using … attention"',
        "dtypes": 'the server\'s log when it loads the models: lines with "dtype"',
    }
    if devices and all(d.get("type") == "cpu" for d in devices):
        known["CUDA"] = known["driver"] = known["VRAM"] = "none: it runs on the CPU"
    unknown = {
        name: where.get(name, "the server does not say")
        for name, value in known.items()
        if value is None or value == {}
    }
    return {"facts": {name: value for name, value in known.items() if name not in unknown}, "unknown": unknown}


def _cuda(torch: str) -> str | None:
    """From the version of a PyTorch build, such as 2.9.0+cu130."""
    local = re.search(r"\+cu(\d+)(\d)$", torch)
    return f"{local[1]}.{local[2]}" if local else None


def _driver(local: bool) -> str | None:
    """Of this machine, if it is the server's."""
    program = shutil.which("nvidia-smi")
    if program is None or not local:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _attention(argv: list[str], log: list[str]) -> str | None:
    for line in log:
        for start, name in _ATTENTION.items():
            if line.lower().startswith(start):
                return name
    named = next((a for a in argv if re.match(r"^--use-.*attention$", a)), None)
    return named.removeprefix("--use-").removesuffix("-attention") if named else None


def _dtypes(log: list[str]) -> dict[str, str]:
    found = {}
    for line in log:  # later lines count: they are of the models in use
        for name, pattern in _DTYPES.items():
            match = pattern.match(line)
            if match:
                cast = f", computed in {match[2]}" if match.lastindex == 2 and match[2] != "None" else ""
                found[name] = match[1] + cast
    return found


def _packs(info: Mapping[str, Any]) -> list[str]:
    modules = {str(node.get("python_module", "")) for node in info.values() if isinstance(node, dict)}
    return sorted(module.split(".", 1)[1] for module in modules if module.startswith("custom_nodes."))


def _attention_nodes(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Pack -> its nodes that change a model's attention, as far as their names tell. Core's are not listed."""
    found: dict[str, list[str]] = {}
    for name, node in info.items():
        module = str(node.get("python_module", "")) if isinstance(node, dict) else ""
        if module and not _CORE.match(module) and _PATCHES_ATTENTION.search(name):
            outputs = [str(kind) for kind in node.get("output") or []]
            if {"MODEL", "CONDITIONING"} & set(outputs):
                found.setdefault(module.removeprefix("custom_nodes."), []).append(name)
    return found


def said(value: Any) -> str:
    """A fact as a report says it: what it consists of, in one line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {said(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)
