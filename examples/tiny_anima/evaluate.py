"""Paints held-out captions of one object and judges the pictures (`classify.py`).

    python examples/tiny_anima/evaluate.py --model examples/tiny_anima/model --count 200
    python examples/tiny_anima/evaluate.py --run RUN ...                  a training that goes on

The captions name all of a description that training never drew (`pictures.held_out`); the largest object is judged.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import classify
import numpy as np
import pictures
import torch
from tqdm import tqdm


def prompts(count: int, seed: int = 0) -> list[tuple[str, pictures.Picture]]:
    """Held-out captions of one object and the pictures they describe."""
    rng = np.random.default_rng((3, seed))
    found = []
    for _ in range(count):
        picture = pictures.sample(rng, (128, 128), testing=True)
        found.append((pictures.describe_fully(picture, rng), picture))
    return found


def paint(
    pipe: Any,
    texts: list[str],
    seeds: list[int],
    *,
    size: tuple[int, int] = (128, 128),
    steps: int = 20,
    batch: int = 10,
) -> list[np.ndarray]:
    """uint8 [H, W, 3] for each text; a picture depends on its own seed alone."""
    images: list[np.ndarray] = []
    for start in tqdm(range(0, len(texts), batch), desc="paint"):
        some = texts[start : start + batch]
        found = pipe(
            prompt=some,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]],
            output_type="np",
        ).images
        images += list((found * 255).round().astype(np.uint8))
    return images


def judge(images: list[np.ndarray], asked: list[tuple[str, pictures.Picture]]) -> dict[str, Any]:
    """Shares of pictures that show what was asked, and which words were mistaken for which."""
    right: collections.Counter[str] = collections.Counter()
    mistakes: collections.Counter[str] = collections.Counter()
    for image, (_, picture) in zip(images, asked, strict=True):
        (thing,) = picture.things
        found = classify.find(image)
        best = found[0] if found else None
        right["one object"] += len(found) == 1
        right["background"] += classify.background(image) == picture.background
        for what in ("colour", "shape"):
            seen = getattr(best, what, "nothing")
            right[what] += seen == getattr(thing, what)
            if seen != getattr(thing, what):
                mistakes[f"{getattr(thing, what)} as {seen}"] += 1
    shares = {name: round(right[name] / len(images), 4) for name in ("colour", "shape", "background", "one object")}
    return {"pictures": len(images), **shares, "mistakes": dict(mistakes.most_common(12))}


def sheet(images: list[np.ndarray], texts: list[str], file: Path, columns: int = 8) -> None:
    """A contact sheet with the captions."""
    from PIL import Image, ImageDraw

    height, width = images[0].shape[:2]
    page = Image.new("RGB", (columns * (width + 8), -(-len(images) // columns) * (height + 46)), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = i % columns * (width + 8) + 4, i // columns * (height + 46) + 4
        page.paste(Image.fromarray(image), (left, top))
        words, lines = text.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > width // 6:
                lines.append("")
            lines[-1] += word + " "
        pen.text((left, top + height + 1), "\n".join(lines[:3]), fill="black", font_size=10)
    page.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path)
    source.add_argument("--run", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="also a contact sheet of the first 40")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run:
        import save

        pipe = save.pipeline(options.run)
    else:
        from anima_fast.runner.model import find, load

        pipe = load(find(str(options.model)), dtype=torch.float32, device="cpu")
    from diffusers import ClassifierFreeGuidance

    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=options.guidance))
    asked = prompts(options.count, options.seed)
    texts = [text for text, _ in asked]
    images = paint(pipe, texts, list(range(options.seed, options.seed + len(texts))), steps=options.steps)
    print(json.dumps(judge(images, asked), indent=1))
    if options.sheet:
        sheet(images[:40], texts[:40], options.sheet)


if __name__ == "__main__":
    main()
