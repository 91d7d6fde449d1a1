"""Alignments and calibrations on disk: safetensors whose metadata says which encoder they belong to.

    tensors     the names that the published files use: rotation, mean_4b, mean_06b; scale, bias, mean_*, std_*
    metadata    format       anima_fast.Alignment | anima_fast.Calibration
                version      of the format, 1
                recurrence   gdn | mamba2: the reading of the checkpoint that the statistics were taken of
                head_norm    exp | one_plus
                encoder      the encoder's hash, target that of the target's file
                prompts      how many prompts were fitted
                report       what the fit found (JSON)

A file without such metadata is somebody else's: it loads with a warning, since nothing says what it was fitted to.
Nothing is read but safetensors; a pickle is refused by its first bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import invalid
from ..files import write_atomic

__all__ = ["RECURRENCES", "Origin", "load_tensors", "save_tensors"]

FORMAT_VERSION = "1"
RECURRENCES = ("gdn", "mamba2")
HEAD_NORMS = ("exp", "one_plus")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a file was fitted to. None: not known (a file without metadata, or a fit from tensors alone)."""

    recurrence: str | None = None
    head_norm: str | None = None
    encoder: str | None = None
    target: str | None = None
    prompts: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("recurrence", RECURRENCES), ("head_norm", HEAD_NORMS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise invalid(name, repr(value), " | ".join(allowed))
        if self.prompts is not None and self.prompts < 1:
            raise invalid("prompts", f"{self.prompts}", "at least 1")

    def check(self, other: Origin, what: str, *, force: bool = False) -> None:
        """Refuse to use `what` (fitted to `self`) with an encoder (`other`) of another recurrence, unless forced;
        warn of another head norm or other weights. What either side does not know is not compared."""
        if None not in (self.recurrence, other.recurrence) and self.recurrence != other.recurrence:
            text = f"fitted to recurrence={self.recurrence!r}, but the encoder runs {other.recurrence!r}"
            if not force:
                raise invalid(what, f"a file {text}", f"one fitted to {other.recurrence!r}, or force")
            warnings.warn(f"{what}: {text}: its statistics are of other vectors", stacklevel=3)
        for name, label in (("head_norm", "head_norm="), ("encoder", "encoder weights ")):
            mine, theirs = getattr(self, name), getattr(other, name)
            if None not in (mine, theirs) and mine != theirs:
                shown = [value[:12] if name == "encoder" else repr(value) for value in (mine, theirs)]
                warnings.warn(f"{what}: fitted to {label}{shown[0]}, used with {shown[1]}", stacklevel=3)


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], origin: Origin, report: Any
) -> None:
    """Write one file, whole or not at all. Raises FileNotFoundError when the directory does not exist."""
    from safetensors.torch import save

    metadata = {"format": f"anima_fast.{kind}", "version": FORMAT_VERSION}
    metadata |= {name: str(value) for name, value in dataclasses.asdict(origin).items() if value is not None}
    if report is not None:
        metadata["report"] = json.dumps(report)
    plain = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    write_atomic(path, save(plain, metadata))


def load_tensors(
    path: str | os.PathLike[str], kind: str, required: Mapping[str, int], optional: Mapping[str, int]
) -> tuple[dict[str, torch.Tensor], Origin, Any]:
    """The fp32 tensors, origin and report of a file. `required` and `optional` give each tensor's dimensions (1 or 2);
    every side of every tensor has one length.

    Raises FileNotFoundError; ValueError for what is no whole safetensors file, has another format or version, lacks a
    tensor, has one too many, of another shape, not floating or not finite. Each is named.
    """
    argument = kind.lower()
    metadata, tensors = _read(path, argument)
    found = metadata.get("format")
    if found is None:
        warnings.warn(
            f"{argument}: {str(path)!r} does not say which recurrence, head norm and weights it was fitted to",
            stacklevel=3,
        )
    elif found != f"anima_fast.{kind}":
        raise invalid(argument, f"{str(path)!r} of format {found!r}", f"a saved {kind}")
    elif metadata.get("version") != FORMAT_VERSION:
        raise invalid(argument, f"{str(path)!r} of version {metadata.get('version')!r}", f"version {FORMAT_VERSION!r}")
    missing = [name for name in required if name not in tensors]
    extra = [name for name in tensors if name not in required and name not in optional]
    if missing or extra:
        problems = [f"without {', '.join(missing)}"] if missing else []
        problems += [f"with {', '.join(extra)} besides"] if extra else []
        allowed = f"the tensors {', '.join(required)}" + (f" (and {', '.join(optional)})" if optional else "")
        raise invalid(argument, f"{str(path)!r} {' and '.join(problems)}", allowed)
    width = next(iter(tensors.values())).shape[-1] if tensors else 0
    for name, tensor in tensors.items():
        shape = [width] * (required | optional)[name]  # type: ignore[operator]
        if list(tensor.shape) != shape or not width:
            raise invalid(argument, f"{str(path)!r}, {name} of shape {list(tensor.shape)}", f"{shape or '[1024]'}")
        if not tensor.is_floating_point():
            raise invalid(argument, f"{str(path)!r}, {name} of {tensor.dtype}", "a floating-point type")
        tensors[name] = tensor.float()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise invalid(argument, f"{str(path)!r}, {name} with values that are not finite", "finite numbers")
    return tensors, *_origin(metadata, argument, path)


def _read(path: str | os.PathLike[str], argument: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            head = file.read(4)
        kind = "a pickle" if head[:1] == b"\x80" or head == b"PK\x03\x04" else "which cannot be read"
        raise invalid(argument, f"{str(path)!r}, {kind} ({error})", "a whole safetensors file") from error


def _origin(metadata: dict[str, str], argument: str, path: str | os.PathLike[str]) -> tuple[Origin, Any]:
    if "format" not in metadata:
        return Origin(), None
    fields: dict[str, Any] = {f.name: metadata.get(f.name) for f in dataclasses.fields(Origin)}
    try:
        if fields["prompts"] is not None:
            fields["prompts"] = int(fields["prompts"])
        return Origin(**fields), json.loads(metadata.get("report", "null"))
    except ValueError as error:  # a number, a name or JSON that is not one
        raise invalid(argument, f"{str(path)!r}, whose metadata does not fit ({error})", "what save wrote") from error
