"""Tiled pictures: peak memory, time and seams of `anima-fast generate --tiled`, each size in a process of its own.

    python benchmarks/tiles.py                      a tiny random Anima on the CPU (tests/tiny_pipeline.py)
    python benchmarks/tiles.py --model DIR --tile 1024 --sizes 1024 2048 4096

A seam: the mean step between neighbouring pixels where one tile hands over to the next, divided by the same inside
tiles, at the same places of the decoder's 16-pixel raster. 1 is no seam.
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
from pathlib import Path

import numpy as np
from PIL import Image

from anima_fast.bench.machine import describe
from anima_fast.runner.tiles import TOKEN, spans


def seam(picture: np.ndarray, tile: int, overlap: int) -> float | None:
    """Both directions together; None if there is one tile."""
    borders, inside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(picture.astype(np.float64), axis=axis)).mean(axis=(1 - axis, 2))
        of = spans(picture.shape[axis] // TOKEN, tile // TOKEN, overlap // TOKEN)
        middles = [(a[1] + b[0]) * TOKEN // 2 for a, b in itertools.pairwise(of)]
        reach = max(overlap, TOKEN)
        for middle in middles:
            borders.append(steps[middle - 1])
            for place in range(middle % TOKEN, picture.shape[axis], TOKEN):
                if place > 0 and all(abs(place - other) > reach for other in middles):
                    inside.append(steps[place - 1])
    return float(np.mean(borders) / np.mean(inside)) if borders else None


def measure(model: str, size: int, options: list[str], folder: str) -> tuple[dict, np.ndarray]:
    out = f"{folder}/{size}.png"
    command = ["generate", "--model", model, "--prompt", "blue cat", "--seed", "1", "--size", f"{size}x{size}"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a tiny random one")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlaps", nargs="+", type=int, default=[64], help="0 shows the seams of no overlap")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", metavar="F")
    options = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            import tiny_pipeline

            model = f"{folder}/model"
            tiny_pipeline.save(model)
        for size in options.sizes:
            for overlap in options.overlaps:
                tiled = ["--tiled", "--tile", str(options.tile), "--overlap", str(overlap)]
                row, picture = measure(model, size, [*tiled, "--steps", str(options.steps)], folder)
                row |= {"tile": options.tile, "overlap": overlap, "seam": seam(picture, options.tile, overlap)}
                print(json.dumps(row), flush=True)
                rows.append(row)
    if options.json:
        found = {"machine": describe(), "settings": vars(options), "rows": rows}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
