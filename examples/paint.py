"""Paints four prompts in four regions with the tiny Anima, beside the masks and beside the same words as one prompt.

    python examples/paint.py [--out demo_output] [--seed 4]        painted.png, and the pictures one by one

Each picture's PNG holds what made it: `anima-fast generate --like demo_output/panels_regions.png --seed 7 --out 7.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from anima_fast.commands.region_pictures import colours
from anima_fast.runner.model import find, load, quiet
from anima_fast.runner.request import Embedded, Request, RequestRegion, generate, write_png

HERE = Path(__file__).parent
MODEL = HERE / "tiny_anima" / "model"
sys.path.insert(0, str(HERE / "tiny_anima"))
import classify  # noqa: E402

SIDE, STEPS = 192, 20
PANEL, GAP, HEAD = 384, 14, 40


@dataclasses.dataclass(frozen=True)
class Scene:
    """Masks of examples/masks, what each region shows, and what words call its place."""

    name: str
    count: str
    ground: str
    regions: tuple[tuple[str, str, str], ...]  # mask, object, place

    @property
    def prompts(self) -> list[str]:
        return [f"{thing} {place}, {self.ground} background" for _, thing, place in self.regions]

    @property
    def one_prompt(self) -> str:
        """The same words, the background said once."""
        return ", ".join([*(f"{thing} {place}" for _, thing, place in self.regions), f"{self.ground} background"])

    def request(self, seed: int, *, regional: bool) -> Request:
        common: dict[str, Any] = dict(size=(SIDE, SIDE), steps=STEPS, seed=seed, model=str(MODEL))
        if not regional:
            return Request(self.one_prompt, **common)
        masks = [Embedded.read(str(HERE / "masks" / f"{mask}.png"), "mask") for mask, _, _ in self.regions]
        regions = [RequestRegion(mask, prompt) for mask, prompt in zip(masks, self.prompts, strict=True)]
        base = f"{self.count} shapes on a {self.ground} background"
        return Request(base, regions=tuple(regions), **common)


SCENES = (
    Scene(
        "panels",
        "four",
        "sand",
        (
            ("top_left", "large striped red heart", "at the top left"),
            ("top_right", "dotted blue star", "at the top right"),
            ("bottom_left", "small green ring", "at the bottom left"),
            ("bottom_right", "striped purple diamond", "at the bottom right"),
        ),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    print(paint(options.out, options.seed))
    return 0


def paint(out: Path, seed: int = 4) -> Path:
    """Paints every scene, prints what is on the pictures, and puts them on one page, whose file it returns.

    Raises ValueError if diffusers is not there."""
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        pipe = load(find(str(MODEL)), dtype=torch.float32, device="cpu")
    rows = []
    for scene in SCENES:
        print(f"{scene.name}: {len(scene.regions)} regions, {SIDE} x {SIDE} pixels, {STEPS} steps, seed {seed}")
        row = []
        for kind, regional in (("regions", True), ("one_prompt", False)):
            request = scene.request(seed, regional=regional)
            begun = time.perf_counter()
            with quiet():
                (picture,), _ = generate(pipe, request)
            seconds = time.perf_counter() - begun
            write_png(picture, out / f"{scene.name}_{kind}.png", request)
            print(f"  {'with regions' if regional else 'as one prompt':<14} {seconds:4.1f} s  {seen(picture)}")
            row.append(picture)
        rows.append((scene, *row))
    file = out / "painted.png"
    page(rows).save(file, optimize=True)
    return file


def seen(picture: Image.Image) -> str:
    """The objects on it, as the classifier of the pixels names them."""
    found = classify.find(np.array(picture))
    return ", ".join(f"{one.colour} {one.shape}" for one in found) or "no object"


def page(rows: list[tuple[Scene, Image.Image, Image.Image]]) -> Image.Image:
    titles = ("masks and prompts", "painted with regions", "the same words as one prompt, same seed")
    sheet = Image.new("RGB", (3 * PANEL + 4 * GAP, HEAD + len(rows) * (PANEL + GAP)), (250, 250, 251))
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((GAP + column * (PANEL + GAP), 10), title, (28, 31, 38), ImageFont.load_default(20))
    for number, (scene, *pictures) in enumerate(rows):
        top = HEAD + number * (PANEL + GAP)
        panels = [masks(scene), *(p.resize((PANEL, PANEL), Image.Resampling.LANCZOS) for p in pictures)]
        for column, panel in enumerate(panels):
            sheet.paste(panel, (GAP + column * (PANEL + GAP), top))
    return sheet


def masks(scene: Scene) -> Image.Image:
    """The masks in colours, each with its prompt."""
    found = []
    for name, _, _ in scene.regions:
        with Image.open(HERE / "masks" / f"{name}.png") as mask:
            found.append(np.array(mask.convert("L").resize((PANEL, PANEL), Image.Resampling.BOX)) / 255)
    weights = np.stack(found)
    mixed = (
        np.tensordot(weights, np.array(colours(len(found)), float), axes=(0, 0))
        / np.maximum(1, weights.sum(0))[..., None]
    )
    image = Image.fromarray(mixed.round().astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for mask, (_, thing, _) in zip(weights, scene.regions, strict=True):
        y, x = (float(at.mean()) for at in np.nonzero(mask > 0.5))
        first, *last = thing.rsplit(" ", 2)
        text = f"{first}\n{' '.join(last)}"
        pen.multiline_text(
            (x, y),
            text,
            "white",
            ImageFont.load_default(20),
            "mm",
            align="center",
            stroke_width=2,
            stroke_fill=(28, 31, 38),
        )
    return image


if __name__ == "__main__":
    raise SystemExit(main())
