"""What a picture shows, from its pixels: the objects' colours and shapes, and the background.

Each pixel is given to the nearest colour of `pictures.COLOURS` (either tone of its patterns) or of the picture's
background. An object is a connected patch of one colour; its shape is the one whose drawing overlaps it best,

    IoU = |patch and drawing| / |patch or drawing|        both scaled to 32 x 32, the longer side of the box filled

Nothing is learnt, and nothing but the generator's own palette and shapes is known.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pictures
import torch
import torch.nn.functional as F

LEAST_AREA = 80  # pixels; smaller patches are edges and specks
_SIDE = 32
_TONES = (0.0, 0.18, 0.35)  # of object patterns, with the blend that a blur makes of them


@dataclasses.dataclass(frozen=True)
class Found:
    """A patch: left, top, right, bottom of its box, its area in pixels, and how well the shape fits (IoU)."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]
    area: int
    fit: float


def background(image: np.ndarray) -> str:
    """The background of a picture: the nearest of its colours for most pixels. image: uint8 [H, W, 3]."""
    values, owners = _palette(None)
    labels = owners[_nearest(image, values)]
    counts = [int((labels == i).sum()) for i in range(len(pictures.BACKGROUNDS))]
    return list(pictures.BACKGROUNDS)[int(np.argmax(counts))]


def find(image: np.ndarray) -> list[Found]:
    """All objects of a picture, uint8 [H, W, 3], the largest first."""
    values, owners = _palette(background(image))
    labels = owners[_nearest(image, values)]
    found = []
    for i, colour in enumerate(pictures.COLOURS):
        mask = torch.from_numpy(labels == len(pictures.BACKGROUNDS) + i)
        if int(mask.sum()) >= LEAST_AREA:
            found += [_describe(colour, patch) for patch in _patches(_smooth(mask))]
    return sorted(found, key=lambda one: -one.area)


def classify(image: np.ndarray, box: tuple[int, int, int, int] | None = None) -> Found | None:
    """The object with the largest part in a box (left, top, right, bottom; default: the picture); None: there is none.

    Example:
        >>> classify(pictures.draw(picture)).colour
        'red'
    """
    return within(find(image), box or (0, 0, image.shape[1], image.shape[0]))


def within(found: list[Found], box: tuple[int, int, int, int]) -> Found | None:
    """Of found objects the one with the largest part in a box."""
    left, top, right, bottom = box

    def part(one: Found) -> float:
        width = min(right, one.box[2]) - max(left, one.box[0])
        height = min(bottom, one.box[3]) - max(top, one.box[1])
        whole = (one.box[2] - one.box[0]) * (one.box[3] - one.box[1])
        return one.area * max(0, width) * max(0, height) / whole

    best = max(found, key=part, default=None)
    return best if best is not None and part(best) > 0 else None


@functools.cache
def _palette(ground: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, 3] and whose they are: the backgrounds' numbers (one, if it is known), then the objects'."""
    values, owners = [], []
    for i, (name, rgb) in enumerate(pictures.BACKGROUNDS.items()):
        if ground in (None, name):
            values += [pictures.second_tone(rgb, amount) for amount in (0.0, 0.06, 0.12)]
            owners += [i] * 3
    for i, rgb in enumerate(pictures.COLOURS.values()):
        values += [pictures.second_tone(rgb, amount) for amount in _TONES]
        owners += [len(pictures.BACKGROUNDS) + i] * len(_TONES)
    return np.array(values, np.float32), np.array(owners)


def _nearest(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Number of the nearest value for each pixel [H, W]."""
    flat = image.reshape(-1, 3).astype(np.float32)
    distance = torch.from_numpy((values**2).sum(1) - 2 * flat @ values.T)  # numpy's argmin of rows is slow
    return distance.argmin(1).numpy().reshape(image.shape[:2])


def _grow(mask: torch.Tensor, radius: int) -> torch.Tensor:
    return F.max_pool2d(mask[None].float(), 2 * radius + 1, 1, radius)[0] > 0


def _smooth(mask: torch.Tensor) -> torch.Tensor:
    """Without slivers up to two pixels wide (blurred edges have other colours' values), with gaps closed."""
    opened = _grow(~_grow(~mask, 1), 1)
    padded = F.pad(opened, (3, 3, 3, 3))
    return ~_grow(~_grow(padded, 2), 2)[3:-3, 3:-3]


def _patches(mask: torch.Tensor) -> list[torch.Tensor]:
    """Connected parts of at least LEAST_AREA pixels: runs of pixels in a row, joined where they touch one above."""
    steps = np.diff(F.pad(mask, (1, 1)).numpy().astype(np.int8), axis=1)
    runs: list[tuple[int, int, int]] = []  # row, start, end
    first: list[int] = []  # a run of the same part with a smaller number, or itself

    def root(number: int) -> int:
        while first[number] != number:
            number = first[number]
        return number

    above: list[int] = []
    for row, step in enumerate(steps):
        here = []
        for start, end in zip(np.flatnonzero(step == 1).tolist(), np.flatnonzero(step == -1).tolist(), strict=True):
            number = len(runs)
            runs.append((row, start, end))
            first.append(number)
            for other in above:
                if runs[other][1] <= end and start <= runs[other][2]:  # corners touch too
                    low, high = sorted((root(other), root(number)))
                    first[high] = low
            here.append(number)
        above = here
    patches: dict[int, torch.Tensor] = {}
    for number, (row, start, end) in enumerate(runs):
        patches.setdefault(root(number), torch.zeros_like(mask))[row, start:end] = True
    return [patch for patch in patches.values() if int(patch.sum()) >= LEAST_AREA]


def _describe(colour: str, patch: torch.Tensor) -> Found:
    rows, columns = patch.any(1).nonzero().flatten(), patch.any(0).nonzero().flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    seen = _framed(patch[top:bottom, left:right])
    names, drawings = _drawings()
    fits = (drawings & seen).sum((1, 2)) / (drawings | seen).sum((1, 2))
    best = int(fits.argmax())
    return Found(colour, names[best], (left, top, right, bottom), int(patch.sum()), float(fits[best]))


def _framed(mask: torch.Tensor) -> torch.Tensor:
    """The mask in the middle of [32, 32], its longer side filling it."""
    height, width = mask.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = F.pad(mask.float(), (left, side - width - left, top, side - height - top))
    return F.interpolate(square[None, None], (_SIDE, _SIDE), mode="bilinear", antialias=True)[0, 0] > 0.5


@functools.cache
def _drawings() -> tuple[list[str], torch.Tensor]:
    """Every shape at a few angles, upright within 0.1 radians, [n, 32, 32]."""
    at = np.linspace(-1.2, 1.2, 193, dtype=np.float32)
    x, y = np.meshgrid(at, at)
    names, drawings = [], []
    for shape in pictures.SHAPES:
        for angle in (-0.1, 0.0, 0.1):
            cos, sin = np.cos(angle), np.sin(angle)
            mask = torch.from_numpy(pictures.inside(shape, cos * x + sin * y, cos * y - sin * x))
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            names.append(shape)
            drawings.append(_framed(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))
    return names, torch.stack(drawings)
