"""Files appear whole or not at all (written beside the target, flushed to disk, then renamed), and plans as
safetensors files with JSON metadata."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .errors import invalid

__all__ = ["load_plan", "save_plan", "write_atomic"]

_FORMAT_VERSION = 1


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Raises `FileNotFoundError` when the directory does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the directory {str(path.parent)!r} does not exist")
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's file mode mask (it can only be read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_plan(
    path: str | os.PathLike[str], kind: str, fields: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write a plan's `fields` (as JSON) and `tensors` to one safetensors file."""
    from safetensors.torch import save

    metadata = {"format": f"anima_fast.{kind}", "version": str(_FORMAT_VERSION), "plan": json.dumps(fields)}
    write_atomic(path, save(tensors, metadata))


def load_plan(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields and tensors that `save_plan` wrote for this kind of plan.

    Raises FileNotFoundError; ValueError for a malformed file, another kind or another version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"anima_fast.{kind}":
                raise invalid("path", f"{str(path)!r} of format {metadata.get('format')!r}", f"a saved {kind}")
            if metadata.get("version") != str(_FORMAT_VERSION):
                raise invalid("path", f"version {metadata.get('version')!r}", f"version {_FORMAT_VERSION}")
            fields = json.loads(metadata.get("plan", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise invalid("path", f"{str(path)!r}, which cannot be read ({error})", "a whole safetensors file") from error
    if not isinstance(fields, dict):
        raise invalid("path", f"{str(path)!r}, whose metadata is not an object", f"a saved {kind}")
    return fields, tensors
