"""Captioned pictures, drawn from a seed: coloured shapes with patterns, sizes, counts and places on a background.

    picture = sample(np.random.default_rng(7))      what is to be seen: a `Picture`
    draw(picture)                                   uint8 [height, width, 3]
    describe(picture, rng)                          one of its many captions: "a small red circle on the left"

A picture is its description, so that a data set is a seed and a count, and its captions change from epoch to epoch.
Lengths are in pixels, origin top left. Object colours and background colours share no value: a pixel tells which it is
(`classify.py`). Descriptions in the held-out tenth (`held_out`) are never drawn for training.

    python examples/tiny_anima/pictures.py --seed 1 --out sheet.png       a contact sheet
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import zlib
from pathlib import Path

import numpy as np

#: Object colours.
COLOURS = {
    "red": (214, 32, 40),
    "orange": (245, 132, 20),
    "yellow": (250, 222, 40),
    "green": (40, 160, 60),
    "blue": (36, 84, 220),
    "purple": (140, 44, 176),
    "white": (250, 250, 250),
    "black": (16, 16, 18),
}
#: Background colours.
BACKGROUNDS = {
    "gray": (128, 132, 138),
    "pink": (246, 172, 196),
    "sky": (146, 204, 240),
    "mint": (164, 222, 176),
    "sand": (214, 188, 146),
    "brown": (112, 76, 50),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
PATTERNS = ("plain", "striped", "dotted")
BACKGROUND_PATTERNS = ("plain", "striped", "checkered")
#: Radius of the circle around an object.
RADII = {"small": 17.0, "medium": 22.0, "large": 30.0}
#: Objects' middles lie on a raster, that of the transformer's tokens: a small model learns shapes many times faster so.
RASTER = 16
#: Width and height of pictures, and how often each is drawn.
SIZES = {
    (128, 128): 8,
    (96, 96): 2,
    (64, 64): 1,
    (192, 128): 5,
    (128, 192): 2,
    (192, 192): 3,
}
#: Side of a panel, the smallest place of an object among several.
PANEL = 64
#: Chances of 0, 1, 2, ... objects in a picture of up to six panels, and of one with more room.
CHANCES = {1: (0.02, 0.98), 4: (0.02, 0.42, 0.32, 0.1, 0.14), 6: (0.02, 0.2, 0.22, 0.1, 0.14, 0.08, 0.24)}

_COUNTS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_OVERSAMPLING = 3


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: a shape of `radius` around (x, y)."""

    colour: str
    shape: str
    pattern: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        r = self.radius + 1
        return int(self.x - r), int(self.y - r), int(self.x + r) + 1, int(self.y + r) + 1


@dataclasses.dataclass(frozen=True)
class Picture:
    width: int
    height: int
    background: str
    background_pattern: str
    things: tuple[Thing, ...]


# --------------------------------------------------------------------------------------------------------- drawing


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points are in the shape, in coordinates where its radius is 1 (v downwards)."""
    r = np.hypot(u, v)
    if shape == "circle":
        return r < 0.92
    if shape == "ring":
        return (r < 0.96) & (r > 0.52)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.8
    if shape == "diamond":
        return 1.25 * abs(u) + abs(v) < 1
    if shape == "triangle":
        return (v < 0.66) & (1.8 * abs(u) < v + 1.0)
    if shape == "cross":
        return np.minimum(abs(u), abs(v)) < 0.3 * (np.maximum(abs(u), abs(v)) < 0.95)
    if shape == "heart":
        x, y = 1.2 * u, -1.2 * v + 0.1
        return (x * x + y * y - 1) ** 3 < x * x * y**3
    if shape == "star":  # between its five tips the edge is a straight line from radius 1 to the inner radius
        turn = abs((np.arctan2(u, -v) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
        inner, half = 0.45, np.pi / 5
        edge = inner * np.sin(half) / (np.sin(half - turn) * inner + np.sin(turn))
        return r < 1.05 * edge
    raise ValueError(f"shape: got {shape!r}; allowed: {', '.join(SHAPES)}")


def second_tone(rgb: tuple[int, int, int], amount: float) -> np.ndarray:
    """The other tone of a pattern: darker, of dark colours lighter."""
    colour = np.array(rgb, np.float32)
    return colour + amount * ((255 - colour) if colour.mean() < 60 else -colour)


def draw(picture: Picture) -> np.ndarray:
    """uint8 [height, width, 3]. Later things lie over earlier ones."""
    y, x = np.mgrid[0 : picture.height, 0 : picture.width].astype(np.float32) + 0.5
    base = BACKGROUNDS[picture.background]
    canvas = np.empty((picture.height, picture.width, 3), np.float32)
    canvas[:] = base
    if picture.background_pattern == "striped":
        canvas[(y % 32) < 16] = second_tone(base, 0.12)
    elif picture.background_pattern == "checkered":
        canvas[((x % 32) < 16) == ((y % 32) < 16)] = second_tone(base, 0.12)
    for thing in picture.things:
        _draw_thing(canvas, thing)
    return canvas.round().clip(0, 255).astype(np.uint8)


def _draw_thing(canvas: np.ndarray, thing: Thing) -> None:
    height, width = canvas.shape[:2]
    left, top, right, bottom = thing.box
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    n = _OVERSAMPLING
    dy = (np.arange(n * top, n * bottom, dtype=np.float32) + 0.5)[:, None] / n - thing.y
    dx = (np.arange(n * left, n * right, dtype=np.float32) + 0.5)[None, :] / n - thing.x
    u, v = np.broadcast_arrays(dx, dy)
    covered = inside(thing.shape, u / thing.radius, v / thing.radius).astype(np.float32)
    tones = np.array([COLOURS[thing.colour], second_tone(COLOURS[thing.colour], 0.35)], np.float32)
    if thing.pattern == "striped":
        second = (u + v) % 14 < 6
    elif thing.pattern == "dotted":
        second = np.hypot((u + 6) % 12 - 6, (v + 6) % 12 - 6) < 3.6
    else:
        second = np.zeros_like(covered, dtype=bool)
    colour = tones[second.astype(np.int64)] * covered[..., None]
    rows, columns = bottom - top, right - left
    colour = colour.reshape(rows, n, columns, n, 3).mean((1, 3))
    share = covered.reshape(rows, n, columns, n).mean((1, 3))[..., None]
    part = canvas[top:bottom, left:right]
    part[:] = part * (1 - share) + colour


# -------------------------------------------------------------------------------------------------------- sampling


def held_out(picture: Picture) -> bool:
    """Whether the picture belongs to the tenth of descriptions that training never sees. One object: its colour,
    shape, pattern, size and background decide. Several: never."""
    if len(picture.things) != 1:
        return False
    thing = picture.things[0]
    text = (
        f"{thing.size} {thing.pattern} {thing.colour} {thing.shape} {picture.background} {picture.background_pattern}"
    )
    return zlib.crc32(text.encode()) % 10 == 0


def sample(
    rng: np.random.Generator, size: tuple[int, int] | None = None, count: int | None = None, *, testing: bool = False
) -> Picture:
    """A random picture of the training set, or (`testing`) of the held-out ones, which have one object.

    size     width and height; random if not given
    count    number of objects, up to 4 in 128 x 128 pixels and 6 in more (0: an empty background); random if not given
    """
    while True:
        picture = _sample(rng, size, 1 if testing else count)
        if held_out(picture) == testing:
            return picture


def _sample(rng: np.random.Generator, size: tuple[int, int] | None, count: int | None) -> Picture:
    if size is None:
        weights = np.array(list(SIZES.values()), float)
        size = list(SIZES)[rng.choice(len(SIZES), p=weights / weights.sum())]
    width, height = size
    if count is None:
        most = min(6, (width // PANEL) * (height // PANEL))
        count = int(rng.choice(most + 1, p=CHANCES[most]))
    background = str(rng.choice(list(BACKGROUNDS)))
    pattern = str(rng.choice(BACKGROUND_PATTERNS, p=[0.7, 0.15, 0.15]))
    cells = _cells(rng, width, height, count)
    same = count > 1 and rng.random() < 0.25
    things: list[Thing] = []
    for cell in cells:
        things.append(_thing(rng, cell, things[0] if same and things else None))
    return Picture(width, height, background, pattern, tuple(things))


def _cells(rng: np.random.Generator, width: int, height: int, count: int) -> list[tuple[float, float, float, float]]:
    """A rectangle (left, top, right, bottom) for each object, in which it lies whole."""
    whole = (0.0, 0.0, float(width), float(height))
    if count == 0:
        return []
    if count == 1:
        return [whole]
    panels = _grid(width, height, width // PANEL, height // PANEL)
    if len(panels) > 4 and (count > 4 or rng.random() < 0.5):
        chosen = rng.permutation(len(panels))
        if len(panels) == 9 and rng.random() < 0.6:  # one in the middle, the others around it
            chosen = np.array([4, *chosen[chosen != 4]])
        return [panels[i] for i in rng.permutation(chosen[:count])]
    across, down = _grid(width, height, 2, 1), _grid(width, height, 1, 2)
    quarters = _grid(width, height, 2, 2)
    if count == 2:
        cells = across if rng.random() < np.clip(0.6 * width / height, 0.3, 0.85) else down
    elif count == 3 and rng.random() < 0.6:  # two quarters and the half that is left
        halves, gone = (across, ((0, 2), (1, 3))) if rng.random() < 0.5 else (down, ((0, 1), (2, 3)))
        half = int(rng.integers(2))
        cells = [halves[half], *(quarters[i] for i in gone[1 - half])]
    else:
        cells = [quarters[i] for i in sorted(rng.permutation(4)[:count])]
    return [cells[i] for i in rng.permutation(len(cells))]


def _grid(width: int, height: int, columns: int, rows: int) -> list[tuple[float, float, float, float]]:
    """Equal rectangles, row by row."""
    w, h = width / columns, height / rows
    return [(w * c, h * r, w * (c + 1), h * (r + 1)) for r in range(rows) for c in range(columns)]


def _thing(rng: np.random.Generator, cell: tuple[float, float, float, float], like: Thing | None) -> Thing:
    left, top, right, bottom = cell
    most = min(right - left, bottom - top) / 2 - 2
    size = like.size if like else str(rng.choice(list(RADII), p=[0.2, 0.55, 0.25]))
    while RADII[size] > most:
        size = "medium" if size == "large" else "small"
    radius = RADII[size]
    x, y = rng.random(2)
    if rng.random() < 0.5:  # near the middle of its place
        x, y = 0.4 + 0.2 * x, 0.4 + 0.2 * y
    return Thing(
        like.colour if like else str(rng.choice(list(COLOURS))),
        like.shape if like else str(rng.choice(SHAPES)),
        like.pattern if like else str(rng.choice(PATTERNS, p=[0.76, 0.14, 0.1])),
        size,
        _on_raster(left + radius + 2, right - radius - 2, x),
        _on_raster(top + radius + 2, bottom - radius - 2, y),
        radius,
    )


def _on_raster(low: float, high: float, share: float) -> float:
    """The point of the raster from low to high that lies nearest to that share of the way."""
    first, last = math.ceil(low / RASTER), math.floor(high / RASTER)
    return float(RASTER * min(max(round((low + share * (high - low)) / RASTER), first), last))


# -------------------------------------------------------------------------------------------------------- captions


def name(thing: Thing, rng: np.random.Generator, *, article: str = "a", plural: bool = False) -> str:
    """ "a large striped red circle"; sizes and patterns are often, what is medium and plain always left out."""
    words = [article] if article else []
    if thing.size != "medium" and rng.random() < 0.6:
        words.append(thing.size)
    if thing.pattern != "plain" and rng.random() < 0.7:
        words.append(thing.pattern)
    words += [thing.colour, _plural(thing.shape) if plural else thing.shape]
    text = " ".join(words)
    return text.replace("a orange", "an orange", 1) if text.startswith("a orange") else text


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def place(picture: Picture, thing: Thing, rng: np.random.Generator) -> str:
    """Where a thing is: "on the left", "at the bottom right", "in the middle"; empty if it is nowhere in particular."""
    x, y = thing.x / picture.width, thing.y / picture.height
    across = "left" if x < 0.4 else "right" if x > 0.6 else ""
    down = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    if across and down:
        choice = rng.random()
        if choice < 0.7:
            return f"at the {down} {across}"
        across, down = (across, "") if choice < 0.85 else ("", down)
    if across:
        return f"on the {across}"
    if down:
        return f"at the {down}"
    return str(rng.choice(["in the middle", "in the centre"]))


def ground(picture: Picture, rng: np.random.Generator) -> str:
    pattern = picture.background_pattern
    said = f"{pattern} " if pattern != "plain" and rng.random() < 0.7 else ""
    return f"a {said}{picture.background} background"


def describe(picture: Picture, rng: np.random.Generator) -> str:
    """One of the picture's captions, as large image models mostly read them. A sentence is of a picture with one object
    ("a red circle on the left on a gray background"). Tags name one thing and at times its place, and leave out what
    else there is ("red circle on the left, gray background"), or are loose words in any order, which say what there is
    and not what belongs together or where ("circle, blue, gray background, red, star"). A few captions only count, as
    base prompts do."""
    things = picture.things
    kind = rng.random()
    if not things:
        return ground(picture, rng) if kind < 0.7 else f"an empty picture with {ground(picture, rng)}"
    if kind < 0.03:
        text = str(rng.choice(["shapes", "some shapes", "a picture of shapes", "coloured shapes"]))
    elif kind < (0.06 if len(things) == 1 else 0.18):
        text = f"{_COUNTS[len(things)]} shape{'s' if len(things) > 1 else ''}"
    elif len(things) == 1 and kind < 0.75:
        text = _sentence(picture, things[0], rng)
    else:
        return _tags(picture, rng)
    choice = rng.random()
    if choice < 0.45:
        return f"{text} on {ground(picture, rng)}"
    if choice < 0.5:
        return f"{ground(picture, rng)} with {text}"
    return text


def describe_fully(picture: Picture, rng: np.random.Generator) -> str:
    """Of one object: all that decides whether the picture is held out, and at times the place."""
    (thing,) = picture.things
    words = ["" if thing.size == "medium" else thing.size, "" if thing.pattern == "plain" else thing.pattern]
    text = " ".join(word for word in ("a", *words, thing.colour, thing.shape) if word).replace("a orange", "an orange")
    where = f" {place(picture, thing, rng)}" if rng.random() < 0.3 else ""
    pattern = "" if picture.background_pattern == "plain" else f"{picture.background_pattern} "
    return f"{text}{where} on a {pattern}{picture.background} background"


def _sentence(picture: Picture, thing: Thing, rng: np.random.Generator) -> str:
    style = rng.random()
    text = name(thing, rng, article="" if style < 0.1 else "a")
    if 0.1 < style < 0.2:
        text = str(rng.choice(["there is ", "a picture of ", "a picture with "])) + text
    return f"{text} {place(picture, thing, rng)}" if rng.random() < 0.4 else text


def _tags(picture: Picture, rng: np.random.Generator) -> str:
    things = picture.things
    alike = len({(thing.colour, thing.shape, thing.pattern, thing.size) for thing in things}) == 1
    if len(things) > 1 and alike and rng.random() < 0.5:
        tags = [name(things[0], rng, article=_COUNTS[len(things)], plural=True)]
    elif rng.random() < (0.9 if len(things) == 1 else 0.6):
        thing = things[rng.integers(len(things))]
        tags = [name(thing, rng, article="")]
        if rng.random() < 0.7:
            tags[0] += f" {place(picture, thing, rng)}"
    else:
        return _loose_words(picture, rng)
    if rng.random() < 0.6:
        tags.append(ground(picture, rng).removeprefix("a "))
    return ", ".join(tags)


def _loose_words(picture: Picture, rng: np.random.Generator) -> str:
    words = {word for thing in picture.things for word in name(thing, rng, article="").split()}
    if len(picture.things) > 1 and rng.random() < 0.4:
        words.add(f"{_COUNTS[len(picture.things)]} shapes")
    if rng.random() < 0.6:
        words.add(ground(picture, rng).removeprefix("a "))
    kept = len(words) if rng.random() < 0.7 else int(rng.integers(1, len(words) + 1))
    return ", ".join(str(word) for word in rng.permutation(sorted(words))[:kept])


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("pictures.png"))
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    columns, cell = 8, 200
    sheet = Image.new("RGB", (columns * cell, -(-options.count // columns) * cell), "white")
    for i in range(options.count):
        picture = sample(rng)
        sheet.paste(Image.fromarray(draw(picture)), (i % columns * cell, i // columns * cell))
        print(f"{i:3d} {describe(picture, rng)}")
    sheet.save(options.out)


if __name__ == "__main__":
    main()
