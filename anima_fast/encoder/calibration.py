"""A scale and a bias for each dimension, so that the source's tokens have the target's means and spreads.

    y_d = scale_d · x_d + bias_d        scale = σt / σs        bias = μt − scale · μs        over all real tokens

Statistics belong to the space they were taken in. The published files hold those of the source as it leaves the head;
after an alignment the vectors are turned, each dimension is a mixture of what it was, and those scales are wrong (the
seed's "may over-correct"). A calibration fitted with an alignment therefore also keeps the mean and σ of R (x − μs):
σ does not depend on the alignment's strength α, and the mean moves with it, so the bias is formed for the α in use:

    scale = σt / σ_R        bias = μt − scale · (mean_R + (1 − α) μs + α μt_pooled)

Dimensions in which the source hardly moves (σs below 1/1000 of the median) would be blown up to noise: their scale is
1. σ is that of the population, over tokens of all prompts alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from typing import Any

import torch

from ..errors import invalid
from .alignment import Alignment, check_strength
from .files import Origin, load_tensors, save_tensors

__all__ = ["Calibration", "CalibrationFit", "Moments", "affine", "fingerprint"]

#: Of the median σ: below it a dimension counts as constant.
_SMALLEST = 1e-3

# Field -> name in files: those that the published ones have, and those after a rotation.
_PUBLISHED = {
    "scale": "scale",
    "bias": "bias",
    "source_mean": "mean_4b",
    "source_std": "std_4b",
    "target_mean": "mean_06b",
    "target_std": "std_06b",
}
_ROTATED = {"rotated_mean": "mean_4b_rotated", "rotated_std": "std_4b_rotated"}


class Moments:
    """Mean and σ of vectors that arrive in batches, fp64, updated around the running mean."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)  # Σ (x − mean)²

    def add(self, x: torch.Tensor) -> None:
        """Count in `[N, D]`."""
        if not len(x):
            return
        x = x.detach().to("cpu", torch.float64)
        mean = x.mean(dim=0)
        away = mean - self.mean
        self.squares += (x - mean).square().sum(dim=0) + away.square() * (self.count * len(x) / (self.count + len(x)))
        self.count += len(x)
        self.mean += away * (len(x) / self.count)

    @property
    def std(self) -> torch.Tensor:
        return (self.squares / max(self.count, 1)).sqrt()


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of both sides. Made by `fit`, `CalibrationFit` or `load`."""

    scale: torch.Tensor  # [D] fp32, as `bias` for the source before any rotation
    bias: torch.Tensor
    source_mean: torch.Tensor
    source_std: torch.Tensor
    target_mean: torch.Tensor
    target_std: torch.Tensor
    rotated_mean: torch.Tensor | None = None  # of R (x − μs), if fitted with an alignment
    rotated_std: torch.Tensor | None = None
    origin: Origin = dataclasses.field(default_factory=Origin)
    report: Any = None

    @classmethod
    def fit(
        cls,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        alignment: Alignment | None = None,
        origin: Origin | None = None,
    ) -> Calibration:
        """From tokens `[N, D]` of the source and `[M, D]` of the target: the same prompts, not token for token.

        Args:
            source: as it leaves the head, before the alignment.
            alignment: the one it will be used with, if any.

        Example:
            >>> calibration = Calibration.fit(tokens_4b, tokens_06b, alignment=alignment)
        """
        fit = CalibrationFit(source.shape[-1], alignment=alignment)
        fit.add(source, target)
        return fit.finish(origin=origin)

    def coefficients(
        self, alignment: Alignment | None = None, strength: float = 0.5, *, force: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, bias), fp32 `[D]`, for vectors that come out of `alignment` at `strength`, or of the head (None).

        Without statistics after a rotation the published numbers are used after one all the same, with a warning; with
        those of another rotation it is refused, unless forced.
        """
        if alignment is None:
            return self.scale, self.bias
        check_strength(strength)
        if self.rotated_mean is None or self.rotated_std is None:
            warnings.warn(
                "calibration: fitted without an alignment and used after one: its scales are those of the vectors "
                "before they were turned, and may over-correct",
                stacklevel=2,
            )
            return self.scale, self.bias
        fitted = (self.report or {}).get("alignment")
        if fitted is not None and fitted != fingerprint(alignment):
            text = "fitted after another alignment than the one in use"
            if not force:
                raise invalid("calibration", f"statistics {text}", "a calibration fitted with this alignment, or force")
            warnings.warn(f"calibration: {text}", stacklevel=2)
        mean = self.rotated_mean.double() + alignment.shift(strength).double()
        scale, bias, _ = _scale_and_bias(mean, self.rotated_std, self.target_mean, self.target_std)
        return scale, bias

    def apply(
        self, x: torch.Tensor, alignment: Alignment | None = None, strength: float = 0.5, *, force: bool = False
    ) -> torch.Tensor:
        """scale · x + bias of `x [..., D]`, which came out of `alignment` at `strength`, or of the head (None)."""
        return affine(x, *self.coefficients(alignment, strength, force=force))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the published names (and `*_rotated`); whole or not at all."""
        names = _PUBLISHED if self.rotated_std is None else _PUBLISHED | _ROTATED
        tensors = {name: getattr(self, field) for field, name in names.items()}
        save_tensors(path, "Calibration", tensors, self.origin, self.report)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote, or a file of the published names (with a warning if it has no metadata).

        Raises FileNotFoundError; ValueError for a damaged file, wrong tensors, or a negative σ.
        """
        required, optional = (dict.fromkeys(names.values(), 1) for names in (_PUBLISHED, _ROTATED))
        tensors, origin, report = load_tensors(path, "Calibration", required, optional)
        if len(tensors.keys() & optional) == 1:
            raise invalid("calibration", f"{str(path)!r} with one of {' and '.join(optional)}", "both or none")
        for name, tensor in tensors.items():
            if name.startswith("std_") and bool((tensor < 0).any()):
                raise invalid("calibration", f"{str(path)!r}, {name} with negative values", "values >= 0")
        fields: dict[str, Any] = {f: tensors.get(name) for f, name in (_PUBLISHED | _ROTATED).items()}
        return cls(**fields, origin=origin, report=report)


class CalibrationFit:
    """A fit that takes tokens batch by batch; `alignment` is the one it will be used with, if any."""

    def __init__(self, width: int, *, alignment: Alignment | None = None) -> None:
        if alignment is not None and len(alignment.source_mean) != width:
            raise invalid("alignment", f"{len(alignment.source_mean)} dimensions", f"{width}, those of the source")
        self.alignment = alignment
        self.source, self.rotated, self.target = Moments(width), Moments(width), Moments(width)

    def add(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Count in real tokens, `[N, D]` and `[M, D]`; either may be empty. Raises ValueError."""
        width = len(self.source.mean)
        for name, tensor in (("source", source), ("target", target)):
            if tensor.ndim != 2 or tensor.shape[1] != width:
                raise invalid(name, f"shape {list(tensor.shape)}", f"[tokens, {width}]")
            if not bool(torch.isfinite(tensor).all()):
                raise invalid(name, "values that are not finite", "finite numbers")
        self.source.add(source)
        self.target.add(target)
        if self.alignment is not None:
            aligned = self.alignment.apply(source.double(), 0.0)
            self.rotated.add(aligned - self.alignment.source_mean.to(aligned))

    def finish(self, *, origin: Origin | None = None) -> Calibration:
        """Raises ValueError without two tokens of each side, or when no dimension of the source moves."""
        for name, moments in (("source", self.source), ("target", self.target)):
            if moments.count < 2:
                raise invalid(name, f"{moments.count} tokens", "at least 2")
        if not bool(self.source.std.any()):
            raise invalid("source", "the same vector for every token", "tokens that differ")
        scale, bias, kept = _scale_and_bias(self.source.mean, self.source.std, self.target.mean, self.target.std)
        report: dict[str, Any] = {
            "source_tokens": self.source.count,
            "target_tokens": self.target.count,
            "constant_dimensions": kept,
            "scale": _range(scale),
            "bias_mean": float(bias.mean()),
        }
        rotated: dict[str, torch.Tensor] = {}
        if self.alignment is not None:
            mean, std = self.rotated.mean.float(), self.rotated.std.float()
            rotated = {"rotated_mean": mean, "rotated_std": std}
            report["alignment"] = fingerprint(self.alignment)
            report["scale_rotated"] = _range(_scale_and_bias(mean, std, self.target.mean, self.target.std)[0])
        if kept:
            warnings.warn(
                f"{kept} of {len(scale)} dimensions of the source hardly move: their scale is 1", stacklevel=2
            )
        return Calibration(
            scale,
            bias,
            self.source.mean.float(),
            self.source.std.float(),
            self.target.mean.float(),
            self.target.std.float(),
            **rotated,
            origin=origin or Origin(),
            report=report,
        )


def affine(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """scale · x + bias in the type of `x [..., D]`, computed in fp32 or better."""
    if x.shape[-1] != len(scale):
        raise invalid("x", f"{x.shape[-1]} dimensions", f"{len(scale)}, those of the calibration")
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(bias.to(x.device, dtype), x.to(dtype), scale.to(x.device, dtype)).to(x.dtype)


def fingerprint(alignment: Alignment) -> str:
    """Of R and μs, which the statistics after a rotation depend on."""
    digest = hashlib.sha256()
    for tensor in (alignment.rotation, alignment.source_mean):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _scale_and_bias(
    source_mean: torch.Tensor, source_std: torch.Tensor, target_mean: torch.Tensor, target_std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """scale, bias (fp32), and how many dimensions count as constant."""
    source_mean, source_std, target_mean, target_std = (
        t.double() for t in (source_mean, source_std, target_mean, target_std)
    )
    constant = source_std <= _SMALLEST * source_std.median()
    scale = torch.where(constant, 1.0, target_std / source_std.where(~constant, torch.ones_like(source_std)))
    return scale.float(), (target_mean - scale * source_mean).float(), int(constant.sum())


def _range(values: torch.Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}
