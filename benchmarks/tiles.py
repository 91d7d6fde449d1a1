"""Tiled pictures: peak memory, time and seams of `anima-fast generate --tiled`, each size in a process of its own.

    python benchmarks/tiles.py                      the tiny Anima, two regions, up to 4096 x 4096
    python benchmarks/tiles.py --sizes 512 --overlaps 48 0 --steps 12 --sheet F.png
    python benchmarks/tiles.py --model DIR --tile 1024 --overlaps 128 --sizes 1024 2048 4096

A seam: the mean step between neighbouring pixels where one tile hands over to the next, divided by the same inside
tiles, at the same places of the decoder's 16-pixel raster. 1 is no seam. --sheet puts the pictures of the first size
side by side, with ticks where tiles meet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from anima_fast.bench.machine import describe
from anima_fast.files import write_atomic
from anima_fast.runner.tiles import TOKEN, spans

EXAMPLES = Path(__file__).parents[1] / "examples"
MASKS = EXAMPLES / "masks"
ASKED = ["--prompt", "shapes on a mint background", "--seed", "1"]
ASKED += ["--region", f"{MASKS}/left.png=red circle, mint background"]
ASKED += ["--region", f"{MASKS}/right.png=blue star, mint background"]


def meetings(length: int, tile: int, overlap: int) -> Iterator[int]:
    """The pixels of a side where one tile hands over to the next: the middles of their overlaps."""
    for a, b in itertools.pairwise(spans(length // TOKEN, tile // TOKEN, overlap // TOKEN)):
        yield (a[1] + b[0]) * TOKEN // 2


def seam(picture: np.ndarray, tile: int, overlap: int) -> float | None:
    """Both directions together; None if there is one tile."""
    borders, inside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(picture.astype(np.float64), axis=axis)).mean(axis=(1 - axis, 2))
        middles = list(meetings(picture.shape[axis], tile, overlap))
        reach = max(overlap, TOKEN)
        for middle in middles:
            borders.append(steps[middle - 1])
            for place in range(middle % TOKEN, picture.shape[axis], TOKEN):
                if place > 0 and all(abs(place - other) > reach for other in middles):
                    inside.append(steps[place - 1])
    return float(np.mean(borders) / np.mean(inside)) if borders else None


def measure(model: str, size: int, options: list[str], folder: str) -> tuple[dict, np.ndarray]:
    out = f"{folder}/{size}.png"
    command = ["generate", "--model", model, *ASKED, "--size", f"{size}x{size}"]
    code = "import sys; from anima_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code, *command, *options, "--out", out], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"generate ended with status {status}")
    seconds = time.perf_counter() - started
    with Image.open(out) as image:
        picture = np.array(image)
    return {"size": size, "peak_MB": round(usage.ru_maxrss / 1024), "seconds": round(seconds, 1)}, picture


def sheet(shown: list[tuple[np.ndarray, dict]], file: Path) -> None:
    """Pictures side by side, each with its overlap and its seam, with ticks at its edge where tiles meet."""
    from PIL import ImageDraw, ImageFont

    side, edge, head = shown[0][0].shape[0], 12, 34
    page = Image.new("RGB", (len(shown) * (side + 2 * edge), head + side + edge), "white")
    pen = ImageDraw.Draw(page)
    for number, (picture, row) in enumerate(shown):
        left = number * (side + 2 * edge) + edge
        seam = "one tile" if row["seam"] is None else f"seam {row['seam']:.2f}"
        text = f"{side} x {side}, tiles of {row['tile']}, overlap {row['overlap']}: {seam}"
        pen.text((left, 4), text, "black", ImageFont.load_default(14))
        page.paste(Image.fromarray(picture), (left, head))
        for at in meetings(side, row["tile"], row["overlap"]):
            pen.line((left + at, head - 10, left + at, head - 2), (200, 0, 0), 2)
            pen.line((left - 10, head + at, left - 2, head + at), (200, 0, 0), 2)
    page.save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLES / "tiny_anima" / "model"))
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--tile", type=int, default=192)
    parser.add_argument("--overlaps", nargs="+", type=int, default=[48], help="0 shows the seams of no overlap")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--sheet", type=Path, metavar="F")
    options = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    rows, shown = [], []
    settings = {name: getattr(options, name) for name in ("sizes", "tile", "overlaps", "steps")}
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            for overlap in options.overlaps:
                tiled = ["--tiled", "--tile", str(options.tile), "--overlap", str(overlap)]
                row, picture = measure(options.model, size, [*tiled, "--steps", str(options.steps)], folder)
                row |= {"tile": options.tile, "overlap": overlap, "seam": seam(picture, options.tile, overlap)}
                print(json.dumps(row), flush=True)
                rows.append(row)
                if size == options.sizes[0]:
                    shown.append((picture, row))
                if options.json:
                    found = {"machine": describe(), "settings": settings, "rows": rows}
                    write_atomic(options.json, (json.dumps(found, indent=1) + "\n").encode())
    if options.sheet:
        sheet(shown, options.sheet)


if __name__ == "__main__":
    main()
