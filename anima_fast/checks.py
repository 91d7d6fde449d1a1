"""Checks of arguments that plans are made of. Each error names the argument, what came and what is allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from .errors import invalid, wrong_type

__all__ = [
    "check_canvas",
    "check_grid",
    "check_number",
    "check_pad_count",
    "check_per_region",
    "check_ranges",
    "check_segments",
]

Range = tuple[int, int]


def check_ranges(name: str, ranges: Any, count: int) -> tuple[Range, ...]:
    try:
        pairs = [(_integer(s), _integer(e)) for s, e in ranges]
    except (TypeError, ValueError) as error:
        raise invalid(name, repr(ranges), "pairs of whole numbers (start, end)") from error
    if len(pairs) != count:
        raise invalid(name, f"{len(pairs)} ranges for {count} masks", "one range a mask")
    for i, (start, end) in enumerate(pairs):
        if not 0 <= start <= end:
            raise invalid(f"{name}[{i}]" if count > 1 else name, f"({start}, {end})", "0 <= start <= end")
    return tuple(pairs)


def check_segments(segments: Sequence[tuple[int, ...]], names: Sequence[str]) -> None:
    """Ranges are in order and may not overlap; at least one token or pad."""
    for i, (start, end, pads) in enumerate(segments):
        if not 0 <= start <= end or pads < 0:
            raise invalid(names[i], f"({start}, {end}) with {pads} pads", "0 <= start <= end, pads >= 0")
    spans = sorted((start, end, name) for (start, end, _), name in zip(segments, names, strict=False) if end > start)
    for (s0, e0, first), (s1, e1, second) in itertools.pairwise(spans):
        if s1 < e0:
            raise invalid(second, f"[{s1}, {e1}), which overlaps {first} = [{s0}, {e0})", "disjoint ranges")
    if not any(end > start or pads for start, end, pads in segments):
        raise invalid(
            names[0] if names else "ranges",
            "no tokens and no pads in any segment",
            "a context that is not empty",
        )


def check_per_region(name: str, values: Sequence[Any] | None, count: int, default: Any) -> list[Any]:
    if values is None:
        return [default] * count
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise wrong_type(name, values, "a sequence with one number a region")
    if len(values) != count:
        raise invalid(name, f"{len(values)} values for {count} regions", "one a region")
    return list(values)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def check_number(name: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise wrong_type(name, value, allowed) from error
    if not math.isfinite(number) or not holds(number):
        raise invalid(name, f"{value}", allowed)
    return number


def check_pad_count(name: str, value: Any) -> int:
    try:
        count = _integer(value)
    except (TypeError, ValueError) as error:
        raise invalid(name, repr(value), "a whole number >= 0") from error
    if not 0 <= count < 2**31:
        raise invalid(name, f"{count}", "a whole number >= 0")
    return count


def check_grid(name: str, grid: Any, queries: int | None = None) -> tuple[int, int, int]:
    allowed = "(T, Ht, Wt), whole numbers >= 1"
    try:
        frames, height, width = (_integer(x) for x in grid)
    except (TypeError, ValueError) as error:
        raise invalid(name, repr(grid), allowed) from error
    if min(frames, height, width) < 1 or frames * height * width >= 2**31:
        raise invalid(name, f"{(frames, height, width)}", f"{allowed}, fewer than 2^31 tokens")
    if queries is not None and frames * height * width != queries:
        raise invalid(name, f"{(frames, height, width)}", f"a grid of {queries} tokens")
    return frames, height, width


def check_canvas(canvas: Any, height: int, width: int) -> tuple[float, float]:
    if canvas is None:
        return float(height), float(width)
    allowed = f"(rows, columns) with 0 < rows <= {height} and 0 < columns <= {width}"
    try:
        rows, columns = (float(x) for x in canvas)
    except (TypeError, ValueError) as error:
        raise invalid("canvas", repr(canvas), allowed) from error
    if not (0 < rows <= height and 0 < columns <= width):
        raise invalid("canvas", f"{(rows, columns)}", allowed)
    return rows, columns
