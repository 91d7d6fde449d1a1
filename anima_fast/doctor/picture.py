"""The model's way through a workflow, drawn: loaders, patches, regional nodes, samplers, with the findings on them.

One scene of rectangles, curves and text, written as SVG or painted as PNG. Columns are the longest way from a source,
so every link goes from left to right, past the boxes between; prompts and other nodes are left out, and the links
through them are dashed.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .case import Case, regional
from .findings import SEVERITIES, Finding
from .passes import model_path
from .workflow import Link, Node

__all__ = ["draw"]

Point = tuple[float, float]

_COLOURS = {"error": "#c8323c", "warning": "#b96a00", "note": "#3b6fb6"}
_LINKS = {
    "model": "#7a5fc0",
    "conditioning": "#cc7a29",
    "latent": "#d0508a",
    "vae": "#c0504a",
    "clip": "#b59b1f",
    "mask": "#3f9b62",
    "image": "#4a90c2",
    "other": "#98a0ac",
}
_KINDS = (
    ("model", ("model", "guider", "unet", "base_model")),
    ("vae", ("vae",)),
    ("clip", ("clip",)),
    ("mask", ("mask", "destination", "source", "regions")),
    ("latent", ("latent", "samples")),
    ("image", ("image", "pixels")),
    ("conditioning", ("positive", "negative", "conditioning", "base", "region", "bias_template", "ranges", "token_w")),
)
_INK, _MUTED, _PAPER, _CARD, _EDGE = "#1c1f26", "#6c727f", "#fafafb", "#ffffff", "#cfd4dc"
_WIDTH, _COLUMN, _GAP, _LINE, _PAD, _MARGIN = 208, 64, 20, 17, 10, 28
_MOST = 60
_SHOWN: tuple[str, ...] = (
    "unet_name",
    "ckpt_name",
    "clip_name",
    "vae_name",
    "lora_name",
    "strength_model",
    "name",
    "shift",
    "width",
)
_SHOWN += ("height", "steps", "cfg", "sampler_name", "scheduler", "denoise", "mode", "eps", "strength", "start_percent")
_SHOWN += ("end_percent", "normalize_overlaps", "tile_width", "tile_height", "scale_by", "combine")


@dataclass
class _Rect:
    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str = "none"
    line: float = 1.0
    radius: float = 7.0


@dataclass
class _Curve:
    points: tuple[Point, Point, Point, Point]
    colour: str
    line: float
    dashed: bool


@dataclass
class _Text:
    x: float
    y: float  # of the baseline
    text: str
    size: float
    colour: str
    bold: bool = False


@dataclass
class _Box:
    node: Node
    title: list[str]
    lines: list[str]
    badges: list[Finding]
    column: int = 0
    x: float = 0.0
    y: float = 0.0
    height: float = 0.0
    before: list[tuple[str, str, bool]] = field(default_factory=list)  # node, kind of link, through others


def draw(case: Case, findings: Sequence[Finding], path: str | Path, title: str = "") -> None:
    """Write the picture to `path`, `.svg` or `.png`. Raises `ValueError` for another ending."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ValueError(f"{path}: a picture is written as .svg or .png")
    boxes = _boxes(case, findings)
    shapes, width, height = _scene(boxes, findings, title or case.workflow.path)
    if suffix == ".svg":
        Path(path).write_text(_svg(shapes, width, height), encoding="utf-8")
    else:
        _png(shapes, width, height).save(path)


def _boxes(case: Case, findings: Sequence[Finding]) -> dict[str, _Box]:
    """The nodes that are shown, in columns, linked through those that are not."""
    workflow = case.workflow
    wanted: dict[str, None] = {}
    for one in case.passes:
        wanted.update(dict.fromkeys([*(node.id for node in reversed(one.path)), one.node.id]))
    for regions in case.regions:
        for node in (regions.grid, regions.bias, regions.node):
            if node is not None:
                seen = [other.id for other in reversed(model_path(workflow, node.id))]
                wanted.update(dict.fromkeys([*seen, node.id]))
    kinds = ("VAEDecode", "VAEEncode", "VAELoader", "CLIPLoader", "EmptyLatent", "LatentUpscale", "ControlNet")
    for node in case.nodes:
        if node.class_type.startswith((*kinds, "AnimaRegionalConditioning", "AnimaFastRegion")) or regional(node):
            wanted[node.id] = None
    for finding in findings:
        wanted.update(dict.fromkeys(node for node in finding.nodes[:8] if node in workflow.nodes))
    outputs = [node for node in workflow.outputs() if node in case.live]
    wanted.update(dict.fromkeys(outputs))
    shown = dict(list(wanted.items())[:_MOST])
    boxes = {}
    for name in shown:
        node = workflow.nodes[name]
        badges = [finding for finding in findings if name in finding.nodes[:3]]
        lines = [f"{key} {_short(value)}" for key in _SHOWN if (value := workflow.value(name, key)) not in (None, "")]
        boxes[name] = _Box(
            node, _title(node.class_type, _WIDTH - 2 * _PAD - _measure(name, 12) - 12), lines[:6], badges
        )
    for box in boxes.values():
        box.before = _links(case, box.node, shown)
        rows = len(box.title) + len(box.lines)
        box.height = 2 * _PAD + _LINE * rows + (len(box.badges) * (_LINE + 3) + 2 if box.badges else 0)
    _columns(boxes)
    return boxes


def _links(case: Case, node: Node, shown: dict[str, None]) -> list[tuple[str, str, bool]]:
    found: dict[tuple[str, str], bool] = {}
    for name, link in node.links():
        kind = _kind(name)
        waiting: list[tuple[Link, bool]] = [(link, False)]
        seen: set[str] = set()
        while waiting and len(seen) < 300:
            here, through = waiting.pop()
            followed = case.workflow.follow(here)
            if followed is None or followed.node in seen:
                continue
            seen.add(followed.node)
            if followed.node in shown:
                key = (followed.node, kind)
                found[key] = found.get(key, True) and through
            else:
                waiting += [(inner, True) for _, inner in case.workflow.nodes[followed.node].links()]
    return [(name, kind, through) for (name, kind), through in found.items()]


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, starts in _KINDS if lower.startswith(starts)), "other")


def _columns(boxes: dict[str, _Box]) -> None:
    """Longest way from a source, then every source is moved next to its first reader."""
    order: list[str] = []
    state: dict[str, int] = {}
    for root in boxes:
        stack = [root]
        while stack:
            name = stack[-1]
            if state.get(name) == 2:
                stack.pop()
                continue
            state[name] = 1
            fresh = [n for n, _, _ in boxes[name].before if state.get(n) is None]
            if fresh:
                stack += fresh
            else:
                state[name] = 2
                order.append(stack.pop())
    for name in order:
        box = boxes[name]
        box.column = max((boxes[n].column + 1 for n, _, _ in box.before if n != name), default=0)
    readers: dict[str, list[str]] = {name: [] for name in boxes}
    for name, box in boxes.items():
        for before, _, _ in box.before:
            readers[before].append(name)
    for name in reversed(order):
        if readers[name]:
            boxes[name].column = max(boxes[name].column, min(boxes[reader].column for reader in readers[name]) - 1)


@dataclass
class _Way:
    """A link's place in a column that it passes."""

    before: list[Any]
    x: float = 0.0
    y: float = 0.0
    height: float = 4.0


def _scene(boxes: dict[str, _Box], findings: Sequence[Finding], title: str) -> tuple[list[Any], int, int]:
    columns: dict[int, list[Any]] = {}
    for box in boxes.values():
        columns.setdefault(box.column, []).append(box)
    chains: list[tuple[list[Any], str, bool]] = []
    ways: dict[tuple[str, str, int], _Way] = {}  # links of one output share their way
    after: dict[int, list[Any]] = {}
    for box in boxes.values():
        for name, kind, through in box.before:
            chain: list[Any] = [boxes[name]]
            for column in range(boxes[name].column + 1, box.column):
                key = (name, kind, column)
                if key not in ways:
                    ways[key] = _Way([chain[-1]])
                    columns.setdefault(column, []).append(ways[key])
                    after.setdefault(id(chain[-1]), []).append(ways[key])
                chain.append(ways[key])
            after.setdefault(id(chain[-1]), []).append(box)
            chains.append(([*chain, box], kind, through))
    nearest: dict[int, list[Any]] = {}
    for chain, _, _ in chains:
        nearest.setdefault(id(chain[-1]), []).append(chain[-2])
    for way in ways.values():
        nearest[id(way)] = way.before
    top = _MARGIN + 44
    tallest = max((sum(b.height + _GAP for b in stack) - _GAP for stack in columns.values()), default=0)
    for number, stack in sorted(columns.items()):
        y = top
        for item in stack:
            item.x, item.y = _MARGIN + number * (_WIDTH + _COLUMN), y
            y += item.height + _GAP
    for sweep in range(8):  # neighbours pull each box to their middle, from either side in turn
        sides = nearest if sweep % 2 else after
        for _, stack in sorted(columns.items(), reverse=sweep % 2 == 0):
            for item in stack:
                near = sides.get(id(item), [])
                if near:
                    item.y = sum(n.y + n.height / 2 for n in near) / len(near) - item.height / 2
            stack.sort(key=lambda item: item.y + item.height / 2)
            _spread(stack, top, tallest)
    shapes: list[Any] = []
    drawn: set[tuple[Any, ...]] = set()
    for chain, kind, through in chains:
        line = 2.6 if kind == "model" else 1.6
        for start, end in pairwise(chain):
            x0 = start.x + _WIDTH
            y0, y1 = start.y + start.height / 2, end.y + end.height / 2
            bend = (end.x - x0) / 2
            points = ((x0, y0), (x0 + bend, y0), (end.x - bend, y1), (end.x, y1))
            if (points, kind) not in drawn:
                drawn.add((points, kind))
                shapes.append(_Curve(points, _LINKS[kind], line, through))
            if isinstance(end, _Way) and (end.x, end.y, kind) not in drawn:
                drawn.add((end.x, end.y, kind))
                across = ((end.x, y1), (end.x + 1, y1), (end.x + _WIDTH - 1, y1), (end.x + _WIDTH, y1))
                shapes.append(_Curve(across, _LINKS[kind], line, through))
    for box in boxes.values():
        shapes += _card(box)
    used = {kind for box in boxes.values() for _, kind, _ in box.before}
    width = max(_MARGIN * 2 + (max(columns, default=0) + 1) * (_WIDTH + _COLUMN) - _COLUMN, 760)
    shapes.append(_Text(_MARGIN, _MARGIN + 8, _fit(title, 17, width - 2 * _MARGIN), 17, _INK, True))
    x = float(_MARGIN)
    for kind in [kind for kind in _LINKS if kind in used]:
        shapes.append(_Rect(x, _MARGIN + 22, 16, 4, _LINKS[kind], radius=2))
        shapes.append(_Text(x + 22, _MARGIN + 29, kind, 12, _MUTED))
        x += 34 + _measure(kind, 12)
    y = top + tallest + 34
    for finding in findings:
        shapes.append(_Rect(_MARGIN, y - 11, 62, 15, _COLOURS[finding.severity], radius=7))
        shapes.append(_Text(_MARGIN + 8, y, finding.severity, 11, "#ffffff", True))
        named = f"{finding.id}: {finding.summary}"
        shapes.append(_Text(_MARGIN + 72, y, _fit(named, 13, width - 2 * _MARGIN - 72), 13, _INK))
        y += 22
    if not findings:
        shapes.append(_Text(_MARGIN, y, "nothing found", 13, _MUTED))
        y += 22
    return shapes, round(width), round(y + _MARGIN - 12)


def _spread(stack: list[Any], top: float, tallest: float) -> None:
    """Boxes keep their order and wishes, without overlap, between top and bottom."""
    y = top
    for box in stack:
        box.y = max(box.y, y)
        y = box.y + box.height + _GAP
    limit = top + tallest
    for box in reversed(stack):
        box.y = min(box.y, limit - box.height)
        limit = box.y - _GAP


def _card(box: _Box) -> list[Any]:
    level = next((s for s in SEVERITIES if any(f.severity == s for f in box.badges)), None)
    edge = _COLOURS[level] if level else _EDGE
    shapes: list[Any] = [_Rect(box.x, box.y, _WIDTH, box.height, _CARD, edge, 2.2 if level else 1.2)]
    y = box.y + _PAD + 12
    number = box.node.id
    shapes.append(_Text(box.x + _WIDTH - _PAD - _measure(number, 12) * 1.07, y, number, 12, _MUTED))
    for index, part in enumerate(box.title):
        y += _LINE if index else 0
        shapes.append(_Text(box.x + _PAD, y, part, 13, _INK, True))
    for line in box.lines:
        y += _LINE
        shapes.append(_Text(box.x + _PAD, y, _fit(line, 12, _WIDTH - 2 * _PAD), 12, _MUTED))
    y += 4
    for finding in box.badges:
        y += _LINE + 3
        label = _fit(finding.id, 11, _WIDTH - 2 * _PAD - 16)
        colour = _COLOURS[finding.severity]
        shapes.append(_Rect(box.x + _PAD, y - 12, _measure(label, 11) + 16, 16, colour, radius=8))
        shapes.append(_Text(box.x + _PAD + 8, y, label, 11, "#ffffff", True))
    return shapes


def _title(kind: str, width: float) -> list[str]:
    """A class name on one line, or cut where a capital begins on two."""
    if _measure(kind, 13) * 1.1 <= width:
        return [kind]
    parts = re.findall(r"[A-Z]?[^A-Z]+|[A-Z]+(?![a-z])", kind)
    first = ""
    while parts and (not first or _measure(first + parts[0], 13) * 1.1 <= width):
        first += parts.pop(0)
    rest = "".join(parts)
    return [_fit(first, 13, width)] + ([_fit(rest, 13, width)] if rest else [])


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "/").rsplit("/", 1)[-1]


def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _measure(text: str, size: float) -> float:
    return float(_font(size).getlength(text))


def _fit(text: str, size: float, width: float) -> str:
    """`text`, its end cut off with an ellipsis where it would be wider; 7 % are kept for other fonts."""
    if _measure(text, size) * 1.07 <= width:
        return text
    while text and _measure(text + "…", size) * 1.07 > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _svg(shapes: list[Any], width: int, height: int) -> str:
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Inter, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>',
    ]
    for shape in shapes:
        if isinstance(shape, _Rect):
            out.append(
                f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}" '
                f'rx="{shape.radius:g}" fill="{shape.fill}" stroke="{shape.stroke}" stroke-width="{shape.line:g}"/>'
            )
        elif isinstance(shape, _Curve):
            (a, b), (c, d), (e, f), (g, h) = shape.points
            dash = ' stroke-dasharray="5 4"' if shape.dashed else ""
            out.append(
                f'<path d="M{a:.1f} {b:.1f}C{c:.1f} {d:.1f} {e:.1f} {f:.1f} {g:.1f} {h:.1f}" fill="none" '
                f'stroke="{shape.colour}" stroke-width="{shape.line:g}"{dash}/>'
            )
        else:
            weight = ' font-weight="600"' if shape.bold else ""
            out.append(
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size:g}" fill="{shape.colour}"{weight}>'
                f"{html.escape(shape.text)}</text>"
            )
    return "\n".join([*out, "</svg>", ""])


def _png(shapes: list[Any], width: int, height: int) -> Any:
    """Painted at twice the size, so that text stays sharp on dense screens."""
    from PIL import Image, ImageDraw

    scale = 2
    image = Image.new("RGB", (width * scale, height * scale), _PAPER)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        if isinstance(shape, _Rect):
            box = [v * scale for v in (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)]
            outline = None if shape.stroke == "none" else shape.stroke
            pen.rounded_rectangle(box, shape.radius * scale, shape.fill, outline, round(shape.line * scale))
        elif isinstance(shape, _Curve):
            points = [(x * scale, y * scale) for x, y in _bezier(shape.points)]
            pairs = list(pairwise(points))
            for index, (start, end) in enumerate(pairs):
                if not shape.dashed or index % 3 < 2:
                    pen.line([start, end], shape.colour, round(shape.line * scale))
        else:
            bold = 0.4 if shape.bold else 0
            font = _font(shape.size * scale)
            at = (shape.x * scale, shape.y * scale)
            pen.text(at, shape.text, shape.colour, font, anchor="ls", stroke_width=bold, stroke_fill=shape.colour)
    return image


def _bezier(points: tuple[Point, Point, Point, Point]) -> list[Point]:
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = points
    steps = max(12, round(abs(dx - ax) / 5))
    out = []
    for step in range(steps + 1):
        t = step / steps
        u = 1 - t
        weights = (u * u * u, 3 * u * u * t, 3 * u * t * t, t * t * t)
        out.append(
            (
                weights[0] * ax + weights[1] * bx + weights[2] * cx + weights[3] * dx,
                weights[0] * ay + weights[1] * by + weights[2] * cy + weights[3] * dy,
            )
        )
    return out
