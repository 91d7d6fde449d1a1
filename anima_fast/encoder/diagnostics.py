"""Figures that tell a healthy encoder from a broken one, over the real tokens of a set of prompts.

    mean, std               of all components of all tokens
    L2 per token            mean of |x_t|
    token diversity         1 − mean cosine between different token vectors of one prompt, averaged over prompts (of at
                            least two tokens): 0 when every token has become the same vector
    cross-prompt similarity mean cosine between mean-pooled vectors of different prompts: 1 when all prompts look alike
    per-dimension σ         over all tokens; and, where a target is given, the scale σt / σ that would match it

Sums are fp64 and nothing is kept but those, so any number of prompts will do. The mean cosine over pairs i ≠ j of
vectors u of length 1 is (|Σ u|² − n) / (n (n − 1)); a zero vector has cosine 0 with every other.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import invalid
from .calibration import Moments

__all__ = ["Diagnostics", "draw", "draw_alignment", "pool", "rows_of_table"]


def pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the real tokens of each prompt: `states [B, L, D]`, `mask [B, L]` bool -> fp64 `[B, D]`."""
    weights = mask.to(states.device, torch.float64)[..., None]
    return (states.double() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class Diagnostics:
    """Collects batches of prompts; `result` gives the figures."""

    def __init__(self, width: int) -> None:
        self.moments = Moments(width)
        self.norms = 0.0
        self.prompts = 0
        self.diversity: list[float] = []
        self.pooled = torch.zeros(width, dtype=torch.float64)  # Σ of mean-pooled vectors of length 1
        self.pooled_squares = 0.0

    def add(self, states: torch.Tensor, mask: torch.Tensor) -> None:
        """Count in prompts: `states [B, L, D]`, `mask [B, L]` bool, whatever padding holds."""
        if states.ndim != 3 or states.shape[2] != len(self.pooled) or mask.shape != states.shape[:2]:
            raise invalid(
                "states, mask",
                f"shapes {list(states.shape)} and {list(mask.shape)}",
                f"[B, L, {len(self.pooled)}] and [B, L]",
            )
        for row, real in zip(states, mask, strict=True):
            tokens = row[real.to(row.device)].detach().to("cpu", torch.float64)
            if not bool(torch.isfinite(tokens).all()):
                raise invalid("states", "values that are not finite", "finite numbers")
            if not len(tokens):
                continue
            self.prompts += 1
            self.moments.add(tokens)
            self.norms += float(tokens.norm(dim=1).sum())
            if len(tokens) > 1:
                units = torch.nn.functional.normalize(tokens, dim=1)
                self.diversity.append(1 - _pairs(units.sum(dim=0), float(units.square().sum()), len(tokens)))
            unit = torch.nn.functional.normalize(tokens.mean(dim=0), dim=0)
            self.pooled += unit
            self.pooled_squares += float(unit.square().sum())

    def result(self) -> dict[str, Any]:
        """The figures; None for what there were too few tokens or prompts for. Raises ValueError without tokens."""
        tokens, mean, std = self.moments.count, self.moments.mean, self.moments.std
        if not tokens:
            raise invalid("prompts", "no tokens", "at least one")
        total = float(mean.mean())
        return {
            "prompts": self.prompts,
            "tokens": tokens,
            "mean": total,
            "std": float((std.square() + (mean - total).square()).mean().sqrt()),
            "l2_per_token": self.norms / tokens,
            "token_diversity": sum(self.diversity) / len(self.diversity) if self.diversity else None,
            "cross_prompt_similarity": (
                _pairs(self.pooled, self.pooled_squares, self.prompts) if self.prompts > 1 else None
            ),
            "std_per_dimension": std.tolist(),
        }


def _pairs(total: torch.Tensor, squares: float, count: int) -> float:
    """Mean cosine of pairs of different vectors, from their sum and the sum of their squares (1 each, or 0)."""
    return (float(total.square().sum()) - squares) / (count * (count - 1))


@dataclasses.dataclass(frozen=True)
class _Figure:
    key: str
    label: str
    form: str


_FIGURES = (
    _Figure("mean", "global mean", "{:.4g}"),
    _Figure("std", "global std", "{:.4g}"),
    _Figure("l2_per_token", "L2 per token", "{:.4g}"),
    _Figure("token_diversity", "token diversity", "{:.3f}"),
    _Figure("cross_prompt_similarity", "cross-prompt similarity", "{:.3f}"),
)


def scale_range(result: Mapping[str, Any], target: Mapping[str, Any] | None) -> dict[str, float] | None:
    """min, mean and max of the per-dimension scale σt / σ; of σ itself without a target. Dimensions with σ = 0 have
    no scale."""
    values = torch.tensor(result["std_per_dimension"], dtype=torch.float64)
    if target is not None:
        goal = torch.tensor(target["std_per_dimension"], dtype=torch.float64)
        values = goal[values > 0] / values[values > 0]
    if not len(values):
        return None
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def rows_of_table(results: Mapping[str, Mapping[str, Any]], target: Mapping[str, Any] | None = None) -> list[list[str]]:
    """The figures as rows of text, a column for each result."""
    rows = [["", *results]]
    for figure in _FIGURES:
        values = [result[figure.key] for result in results.values()]
        rows.append([figure.label, *("-" if value is None else figure.form.format(value) for value in values)])
    ranges = [scale_range(result, target) for result in results.values()]
    name = "per-dimension std" if target is None else "per-dimension scale"
    for key in ("min", "mean", "max"):
        rows.append([f"{name}, {key}", *("-" if found is None else f"{found[key]:.4g}" for found in ranges)])
    for key, label in (("cosine_with_target", "cosine with target"), ("centred_cosine_with_target", "  centred")):
        if any(key in result for result in results.values()):
            values = [result.get(key) for result in results.values()]
            rows.append([label, *("-" if value is None else f"{value:.3f}" for value in values)])
    return rows


_INK, _GREY = "#22262e", "#6b7280"
_COLOURS = {"gdn": "#2f6fde", "mamba2": "#c2571a", "target": "#3f8f5f"}
_SHADES = {"raw": 0.35, "aligned": 0.65, "calibrated": 1.0, "scaled": 1.0}


def _colours(names: list[str]) -> dict[str, tuple[float, float, float]]:
    """By recurrence, the paler the earlier the stage; other names, the steps of a sweep, from pale to dark."""
    steps = [name for name in names if not any(word in name for word in _COLOURS)]
    colours = {}
    for name in names:
        base = next((colour for word, colour in _COLOURS.items() if word in name), "#5b3fa0")
        share = next((share for word, share in _SHADES.items() if word in name), 1.0)
        if name in steps and len(steps) > 1:
            share = 0.3 + 0.7 * steps.index(name) / (len(steps) - 1)
        red, green, blue = (1 - share * (1 - int(base[i : i + 2], 16) / 255) for i in (1, 3, 5))
        colours[name] = red, green, blue
    return colours


def draw(
    results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str], *, pyplot: Any, title: str = ""
) -> None:
    """The figures as a picture: one bar chart each, and the sorted σ of the dimensions."""
    height = 1.1 + 0.3 * len(results)
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 2 * height + 1.2), layout="constrained")
    names = list(results)
    colours = _colours(names)
    for place, entry in zip(axes.flat, _FIGURES, strict=False):
        values = [results[name][entry.key] for name in names]
        drawn = [0.0 if value is None else value for value in values]
        place.barh(range(len(names)), drawn, color=[colours[name] for name in names], height=0.72)
        place.set_yticks(range(len(names)), names, fontsize=8)
        place.invert_yaxis()
        low, high = min(0.0, *drawn), max(0.0, *drawn)
        room = (high - low) or 1.0
        for position, (value, width) in enumerate(zip(values, drawn, strict=True)):
            text = "none" if value is None else entry.form.format(value)
            place.text(
                width + (0.015 if width >= 0 else -0.015) * room,
                position,
                text,
                va="center",
                ha="left" if width >= 0 else "right",
                fontsize=8,
                color=_INK,
            )
        place.set_xlim(low - (0.28 * room if low < 0 else 0), high + (0.28 * room if high > 0 else 0))
        place.axvline(0, color=_GREY, linewidth=0.6)
        _style(place, entry.label)
    last = axes.flat[5]
    for name in names:
        values = sorted(results[name]["std_per_dimension"], reverse=True)
        last.plot(range(1, len(values) + 1), values, color=colours[name], linewidth=1.6, label=name)
    last.set_yscale("log")
    last.tick_params(axis="y", which="both", labelsize=8)
    last.set_xlabel("dimension, largest first", fontsize=8, color=_GREY)
    last.legend(fontsize=7, frameon=False)
    _style(last, "std of each dimension")
    if title:
        figure.suptitle(title, fontsize=9, color=_GREY)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_alignment(report: Mapping[str, Any], path: str | os.PathLike[str], *, pyplot: Any, title: str = "") -> None:
    """What a fit says of its held-out prompts: cosines of each category before, after, and of the mean alone."""
    measures = {
        "before": ("before", "#cfd4dd"),
        "the target's mean alone": ("of_mean", "#8d95a3"),
        "after": ("after", "#2f6fde"),
        "centred, before": ("centred_before", "#f1cdb4"),
        "centred, after": ("centred_after", "#c2571a"),
    }
    rows = {"all": {measure: report[measure]["mean"] for measure, _ in measures.values()}}
    rows |= {name or "no category": entry for name, entry in (report.get("categories") or {}).items()}
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.75 * len(rows)), layout="constrained")
    height = 0.8 / len(measures)
    low = 0.0
    for j, (label, (measure, colour)) in enumerate(measures.items()):
        places = [i + (j - (len(measures) - 1) / 2) * height for i in range(len(rows))]
        values = [row[measure] for row in rows.values()]
        low = min(low, *values)
        axes.barh(places, values, height=height, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            side = "left" if value >= 0 else "right"
            axes.text(
                value + (0.008 if value >= 0 else -0.008), place, f"{value:.3f}", va="center", ha=side, fontsize=7
            )
    names = [f"{name} ({row['held_out']})" if "held_out" in row else name for name, row in rows.items()]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlim(low - (0.08 if low < 0 else 0), 1.09)
    axes.axvline(0, color=_GREY, linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, ncols=len(measures), loc="upper center", bbox_to_anchor=(0.45, -0.06))
    r2 = "" if report["r2"] is None else f"   R² {report['r2']:.3f}, with the best scale {report['r2_scaled']:.3f}"
    _style(axes, f"cosine on {report['held_out']} held-out prompts{r2}")
    if title:
        figure.suptitle(title, fontsize=9, color=_GREY)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
