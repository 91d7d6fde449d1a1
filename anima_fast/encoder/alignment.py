"""Orthogonal Procrustes: turn one encoder's vectors into the directions of another's.

    C = Σ_i (y_i − μt)(x_i − μs)ᵀ = U S Vᵀ          x source, y target: mean-pooled prompts, [D]
    R = U Vᵀ                                        the orthogonal matrix nearest to mapping x − μs onto y − μt
    x' = R (x − μs) + (1 − α) μs + α μt             strength α in [0, 1] moves the mean and nothing else

`fit` needs C, the means and two sums of squares, all in fp64 and updated batch by batch around the running means, so
that no prompt is kept but the held-out ones. From fewer prompts than dimensions, or from prompts that do not vary in
some direction, R is not determined everywhere: there it turns as little as possible.

What a fit says is measured on held-out prompts. The cosine of x' with y is mostly that of the shared mean, so beside it
stand the cosine that the target's mean alone would have, the centred cosine cos(R (x − μs), y − μt), and
R² = 1 − Σ|y − x'|² / Σ|y − ȳ|². R does not stretch, so R² of a source ten times smaller is at most about 0.2 however
right its directions; R² with the one best scale s, s R (x − μs) + μt, is given too.

Source: P. Schönemann, A generalized solution of the orthogonal Procrustes problem, 1966. The formula of x' and the
names in the files are those of the published node for this encoder.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import invalid, wrong_type
from .files import Origin, load_tensors, save_tensors

__all__ = ["Alignment", "AlignmentFit", "check_strength", "evaluate"]

#: Pairs that a fit sets aside at most: enough for every figure, and 67 MB at D = 1024.
_MOST_HELD_OUT = 8192

_FILE_NAMES = {"rotation": "rotation", "source_mean": "mean_4b", "target_mean": "mean_06b"}


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """R and the two means. Made by `fit`, `AlignmentFit` or `load`."""

    rotation: torch.Tensor  # [D, D] fp32
    source_mean: torch.Tensor  # [D] fp32
    target_mean: torch.Tensor  # [D] fp32
    origin: Origin = dataclasses.field(default_factory=Origin)
    report: Any = None

    @classmethod
    def fit(
        cls,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        categories: Sequence[str] | None = None,
        reflections: bool = True,
        held_out: float = 0.1,
        origin: Origin | None = None,
    ) -> Alignment:
        """The alignment of `source` to `target`, both `[N, D]`: row i of each is the same prompt, mean-pooled.

        Args:
            categories: of each prompt, for the report.
            reflections: whether det R = −1 is allowed; without, R is the best proper rotation.
            held_out: share of each category that is not fitted but measured. 0: no report of what was not seen.
            origin: which encoder the source is of; it goes into the file.

        Raises ValueError or TypeError naming the argument. For more prompts than memory holds: `AlignmentFit`.

        Example:
            >>> alignment = Alignment.fit(pooled_4b, pooled_06b)
            >>> alignment.report["centred_after"]["mean"]
        """
        if not isinstance(source, torch.Tensor) or source.ndim != 2:
            raise wrong_type("source", source, "a tensor [N, D]")
        fit = AlignmentFit(source.shape[1], held_out=held_out)
        fit.add(source, target, categories)
        return fit.finish(reflections=reflections, origin=origin)

    def apply(self, x: torch.Tensor, strength: float = 0.5) -> torch.Tensor:
        """x' of `x [..., D]`, in its type (computed in fp32 or better), on the device of `x`."""
        check_strength(strength)
        if x.shape[-1] != len(self.source_mean):
            raise invalid("x", f"{x.shape[-1]} dimensions", f"{len(self.source_mean)}, those of the alignment")
        dtype = torch.promote_types(x.dtype, torch.float32)
        rotation, source, target = (t.to(x.device, dtype) for t in (self.rotation, self.source_mean, self.target_mean))
        shifted = torch.nn.functional.linear(x.to(dtype) - source, rotation)
        return (shifted + source.lerp(target, strength)).to(x.dtype)

    def shift(self, strength: float) -> torch.Tensor:
        """(1 − α) μs + α μt, where the mean of the source lands, `[D]`."""
        check_strength(strength)
        return self.source_mean.lerp(self.target_mean, strength)

    @property
    def determinant(self) -> int:
        """+1 for a rotation, −1 for a rotation with a reflection."""
        return int(torch.linalg.slogdet(self.rotation.double()).sign)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the tensors `rotation`, `mean_4b` and `mean_06b`; whole or not at all."""
        tensors = {name: getattr(self, field) for field, name in _FILE_NAMES.items()}
        save_tensors(path, "Alignment", tensors, self.origin, self.report)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Alignment:
        """Read what `save` wrote, or a file of the published names (with a warning if it has no metadata).

        Raises FileNotFoundError; ValueError for a damaged file, wrong tensors, or a matrix that is not orthogonal.
        """
        tensors, origin, report = load_tensors(path, "Alignment", {"rotation": 2, "mean_4b": 1, "mean_06b": 1}, {})
        found = cls(**{field: tensors[name] for field, name in _FILE_NAMES.items()}, origin=origin, report=report)
        rotation = found.rotation.double()
        error = float((rotation @ rotation.T - torch.eye(len(rotation), dtype=torch.float64)).abs().max())
        if error > 1e-2:
            raise invalid("alignment", f"{str(path)!r}, whose rotation is not orthogonal (by {error:.2g})", "R Rᵀ = 1")
        return found


class AlignmentFit:
    """A fit that takes prompts batch by batch.

    Example:
        >>> fit = AlignmentFit(1024)
        >>> for source, target in batches:
        ...     fit.add(source, target)
        >>> alignment = fit.finish()
    """

    def __init__(self, width: int, *, held_out: float = 0.1) -> None:
        if not (math.isfinite(held_out) and 0 <= held_out <= 0.5):
            raise invalid("held_out", f"{held_out}", "a share from 0 to 0.5")
        self.width = width
        self.period = round(1 / held_out) if held_out else 0
        self.count = 0
        self.seen: dict[str, int] = {}
        self.held: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        self.source_mean = torch.zeros(width, dtype=torch.float64)
        self.target_mean = torch.zeros(width, dtype=torch.float64)
        self.cross = torch.zeros(width, width, dtype=torch.float64)  # C
        self.source_squares = 0.0  # Σ|x − μs|²
        self.target_squares = 0.0

    def add(self, source: torch.Tensor, target: torch.Tensor, categories: Sequence[str] | None = None) -> None:
        """Count in prompts, `[N, D]` each. Raises ValueError or TypeError; then nothing was counted."""
        for name, tensor in (("source", source), ("target", target)):
            if not isinstance(tensor, torch.Tensor):
                raise wrong_type(name, tensor, "a tensor [N, D]")
            if tensor.ndim != 2 or tensor.shape[1] != self.width or len(tensor) != len(source):
                raise invalid(name, f"shape {list(tensor.shape)}", f"[{len(source)}, {self.width}]")
            broken = (~torch.isfinite(tensor).all(dim=1)).nonzero()
            if len(broken):
                raise invalid(name, f"values that are not finite in row {int(broken[0])}", "finite numbers")
        if categories is not None and len(categories) != len(source):
            raise invalid("categories", f"{len(categories)} for {len(source)} prompts", "one for each")
        names = [""] * len(source) if categories is None else [str(category) for category in categories]
        fitted = [i for i, name in enumerate(names) if not self._hold_out(name, source[i], target[i])]
        if fitted:
            self._update(source[fitted].to("cpu", torch.float64), target[fitted].to("cpu", torch.float64))

    def _hold_out(self, name: str, source: torch.Tensor, target: torch.Tensor) -> bool:
        """Every `period`th prompt of a category, the middle one first, so that small categories have one too."""
        position = self.seen.get(name, 0)
        self.seen[name] = position + 1
        if not self.period or position % self.period != self.period // 2 or len(self.held) >= _MOST_HELD_OUT:
            return False
        self.held.append((source.detach().float().cpu(), target.detach().float().cpu(), name))
        return True

    def _update(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Chan's update of co-moments: of the batch around its own means, and of the means around each other."""
        batch = len(source)
        source_mean, target_mean = source.mean(dim=0), target.mean(dim=0)
        source, target = source - source_mean, target - target_mean
        from_source, from_target = source_mean - self.source_mean, target_mean - self.target_mean
        weight = self.count * batch / (self.count + batch)
        self.cross += target.T @ source + weight * torch.outer(from_target, from_source)
        self.source_squares += float(source.square().sum() + weight * from_source.square().sum())
        self.target_squares += float(target.square().sum() + weight * from_target.square().sum())
        self.count += batch
        self.source_mean += from_source * (batch / self.count)
        self.target_mean += from_target * (batch / self.count)

    def finish(self, *, reflections: bool = True, origin: Origin | None = None) -> Alignment:
        """The alignment of everything added. Raises ValueError for fewer than two prompts, or all alike."""
        if self.count < 2:
            raise invalid("source", f"{self.count} prompts to fit", "at least 2, besides the held-out ones")
        if not self.source_squares or not self.target_squares:
            side = "target" if self.source_squares else "source"
            raise invalid(side, "the same vector for every prompt", "prompts that differ")
        rotation, trace, rank = procrustes(self.cross, reflections=reflections)
        if rank < self.width:
            warnings.warn(
                f"{self.count} prompts determine {rank} of {self.width} directions; the others are turned as little "
                "as possible",
                stacklevel=2,
            )
        total = sum(self.seen.values())
        origin = dataclasses.replace(origin or Origin(), prompts=total)
        scale = trace / self.source_squares
        report: dict[str, Any] = {
            "prompts": total,
            "fitted": self.count,
            "width": self.width,
            "rank": rank,
            "determinant": int(torch.linalg.slogdet(rotation).sign),
            "best_scale": scale,
            "r2_fitted": 1 - (self.target_squares + self.source_squares - 2 * trace) / self.target_squares,
            "r2_scaled_fitted": trace * scale / self.target_squares,
            "source_mean_norm": float(self.source_mean.norm()),
            "target_mean_norm": float(self.target_mean.norm()),
        }
        found = Alignment(rotation.float(), self.source_mean.float(), self.target_mean.float(), origin, report)
        if self.held:
            sources, targets, names = zip(*self.held, strict=True)
            categories = names if any(names) else None
            report |= evaluate(found, torch.stack(sources), torch.stack(targets), categories, scale=scale)
        return found


def procrustes(cross: torch.Tensor, *, reflections: bool = True) -> tuple[torch.Tensor, float, int]:
    """R that maximises trace(Rᵀ C), fp64 `[D, D]`; that trace; and the rank of C, beyond which R is a choice."""
    u, s, vh = torch.linalg.svd(cross)
    rank = int((s > s[0] * len(s) * torch.finfo(torch.float64).eps).sum())
    if rank < len(s):  # U₀ W V₀ᵀ nearest to the identity on what C does not determine
        left, _, right = torch.linalg.svd(u[:, rank:].T @ vh[rank:].T)
        u = torch.cat([u[:, :rank], u[:, rank:] @ left @ right], dim=1)
    if not reflections and float(torch.linalg.det(u) * torch.linalg.det(vh)) < 0:
        u, s = u.clone(), s.clone()
        u[:, -1] *= -1  # the direction that C determines least
        s[-1] *= -1
    return u @ vh, float(s.sum()), rank


def evaluate(
    alignment: Alignment,
    source: torch.Tensor,
    target: torch.Tensor,
    categories: Sequence[str] | None = None,
    *,
    scale: float | None = None,
) -> dict[str, Any]:
    """What an alignment does to prompts `[N, D]` that it was not fitted to, at strength 1.

    `before`, `after` and `of_mean` are cos(x, y), cos(x', y) and cos(μt, y); `centred_before` and `centred_after`
    cos(x − μs, y − μt) and cos(R (x − μs), y − μt); each with mean and min, and the means for each category. `r2` is as
    in the module's text (None for a single prompt), `r2_scaled` that with `scale`.
    """
    x, y = source.double(), target.double()
    after = alignment.apply(x, 1.0)
    source_mean, target_mean = (t.double().to(x.device) for t in (alignment.source_mean, alignment.target_mean))
    rotated = after - target_mean
    cosine = torch.nn.functional.cosine_similarity
    measures = {
        "before": cosine(x, y, dim=1),
        "after": cosine(after, y, dim=1),
        "of_mean": cosine(target_mean[None], y, dim=1),
        "centred_before": cosine(x - source_mean, y - target_mean, dim=1),
        "centred_after": cosine(rotated, y - target_mean, dim=1),
    }
    spread = float((y - y.mean(dim=0)).square().sum())

    def r2(times: float) -> float | None:
        return 1 - float((y - target_mean - times * rotated).square().sum()) / spread if spread > 0 else None

    found: dict[str, Any] = {"held_out": len(x)}
    found |= {name: {"mean": float(c.mean()), "min": float(c.min())} for name, c in measures.items()}
    found |= {"r2": r2(1.0), "r2_scaled": None if scale is None else r2(scale)}
    if categories is not None:
        found["categories"] = {}
        for name in dict.fromkeys(categories):
            rows = torch.tensor([i for i, other in enumerate(categories) if other == name], device=x.device)
            found["categories"][name] = {"held_out": len(rows)} | {
                measure: float(values[rows].mean()) for measure, values in measures.items()
            }
    return found


def check_strength(strength: float) -> None:
    if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise invalid("alignment_strength", repr(strength), "a number from 0 to 1")
