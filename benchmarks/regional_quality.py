"""Regional prompting, judged by what is on the pictures: in which share of regions is what the region's prompt says?

    python benchmarks/regional_quality.py                    every setting on every layout; --sheet F draws some
    python benchmarks/regional_quality.py --list             the settings
    python benchmarks/regional_quality.py --only hard blend --cases 20 --workers 1
    python benchmarks/regional_quality.py --only hard --seed 5 --json F      on other cases than those it was chosen by

The tiny Anima (examples/tiny_anima) paints; `classify.py` of the same folder says what is there. A region is right if,
of the objects whose middle lies in it, the largest has the colour and the shape that its prompt names. Colours and
shapes of a picture all differ, so that a prompt that leaks or is ignored shows. All settings paint the same cases from
the same noise: what differs between two lines of the table is the setting. "One long prompt" names the same things and
places in one sentence, or as a list of tags, and has no regions.

Settings that are there already are not painted again when the same figures file is given.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from anima_fast.bench.machine import describe
from anima_fast.files import write_atomic
from anima_fast.integrations.diffusers import Region, enable
from anima_fast.runner.model import find, load

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny_anima"))
import classify  # noqa: E402
import pictures  # noqa: E402

SEED = 4


@dataclasses.dataclass(frozen=True)
class Place:
    """A region of a layout: its mask [H, W], and what one sentence calls the place."""

    mask: np.ndarray
    words: str


@dataclasses.dataclass(frozen=True)
class Case:
    layout: str
    places: tuple[Place, ...]
    asked: tuple[tuple[str, str], ...]  # colour and shape of each place
    ground: str
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.places[0].mask.shape
        return width, height

    @property
    def objects(self) -> list[str]:
        """What each region shows."""
        return [f"{colour} {shape}" for colour, shape in self.asked]

    @property
    def placed(self) -> list[str]:
        """What is where."""
        return [f"{text} {place.words}" for text, place in zip(self.objects, self.places, strict=True)]

    @property
    def prompts(self) -> list[str]:
        """Of each region: object, place, background."""
        return [f"{text}, {self.ground} background" for text in self.placed]

    @property
    def base(self) -> str:
        count = {2: "two", 4: "four", 6: "six"}[len(self.places)]
        return f"{count} shapes on a {self.ground} background"

    @property
    def sentence(self) -> str:
        """One long prompt."""
        named = [f"{'an' if text.startswith('o') else 'a'} {text}" for text in self.placed]
        return f"{', '.join(named[:-1])} and {named[-1]} on a {self.ground} background"

    @property
    def tags(self) -> str:
        """One long prompt as a list."""
        return ", ".join([*self.placed, f"{self.ground} background"])


def layouts() -> dict[str, tuple[Place, ...]]:
    """Masks at the picture's size: 128 x 128; six panels 192 x 128, a centre and all around it 192 x 192."""
    y, x = np.mgrid[0:128, 0:128].astype(np.float32) / 128 + 0.5 / 128
    ramp = np.clip((x - 0.5) / 0.5 + 0.5, 0, 1)  # from a quarter to three quarters of the width
    corners = {"top left": (y < 0.5) & (x < 0.5), "top right": (y < 0.5) & (x >= 0.5)}
    corners |= {"bottom left": (y >= 0.5) & (x < 0.5), "bottom right": (y >= 0.5) & (x >= 0.5)}
    row, column = np.mgrid[0:128, 0:192] // 64
    panels = [("top left", 0, 0), ("top", 0, 1), ("top right", 0, 2)]
    panels += [("bottom left", 1, 0), ("bottom", 1, 1), ("bottom right", 1, 2)]
    centre = np.zeros((192, 192), np.float32)
    centre[56:136, 56:136] = 1
    return {
        "halves": (Place(_float(x < 0.5), "on the left"), Place(_float(x >= 0.5), "on the right")),
        "soft halves": (Place(1 - ramp, "on the left"), Place(ramp, "on the right")),
        "quadrants": tuple(Place(_float(mask), f"at the {words}") for words, mask in corners.items()),
        "six panels": tuple(Place(_float((row == r) & (column == c)), f"at the {words}") for words, r, c in panels),
        "centre, surround": (Place(centre, "in the middle"), Place(1 - centre, "at the top")),
    }


def _float(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.float32)


def cases(count: int, seed: int = SEED) -> list[Case]:
    """`count` of each layout; what is asked, and the noise, follow from the seed, the layout and the number."""
    found = []
    for number, (layout, places) in enumerate(layouts().items()):
        for i in range(count):
            rng = np.random.default_rng((seed, number, i))
            colours = rng.permutation(list(pictures.COLOURS))[: len(places)]
            shapes = rng.permutation(pictures.SHAPES)[: len(places)]
            asked = tuple((str(c), str(s)) for c, s in zip(colours, shapes, strict=True))
            noise = 10000 * seed + 1000 * number + i
            found.append(Case(layout, places, asked, str(rng.choice(list(pictures.BACKGROUNDS))), noise))
    return found


#: Takes place and background out of each region's prompt; it is no argument of `enable`.
BARE = "regions name only the object"

#: What `enable` is called with besides regions; None: it is not called.
SETTINGS: dict[str, dict[str, Any] | None] = {
    (LONG := "one long prompt"): None,
    f"{LONG}, as tags": None,
    f"{LONG}, pads stripped": {"pads": "strip"},
    "soft 0.1": {"strength": 0.1},
    "soft 0.2": {"strength": 0.2},
    "soft 0.35": {"strength": 0.35},
    "soft 0.5": {"strength": 0.5},
    "soft 1": {"strength": 1.0},
    "hard": {"mode": "hard"},
    "blend": {"combine": "blend"},
    "soft 0.35, base only where no region is": {"strength": 0.35, "base_always_allowed": False},
    "hard, base only where no region is": {"mode": "hard", "base_always_allowed": False},
    "blend, base 0.2": {"combine": "blend", "base_weight": 0.2},
    "blend, base 0.5": {"combine": "blend", "base_weight": 0.5},
    "soft 0.35, no base": {"strength": 0.35, "base": False},
    "hard, no base": {"mode": "hard", "base": False},
    "blend, no base": {"combine": "blend", "base": False},
    f"soft 0.35, {BARE}": {"strength": 0.35},
    f"hard, {BARE}": {"mode": "hard"},
    f"blend, {BARE}": {"combine": "blend"},
    "hard, first half": {"mode": "hard", "end_percent": 0.5},
    "hard, first half, then base": {"mode": "hard", "end_percent": 0.5, "outside": "base"},
    "hard, from 0.3": {"mode": "hard", "start_percent": 0.3},
    "hard, from 0.3, before base": {"mode": "hard", "start_percent": 0.3, "outside": "base"},
    "blend, first half, then base": {"combine": "blend", "end_percent": 0.5, "outside": "base"},
    "soft 0.35, pads stripped": {"strength": 0.35, "pads": "strip"},
    "hard, pads stripped": {"mode": "hard", "pads": "strip"},
    "blend, pads stripped": {"combine": "blend", "pads": "strip"},
    "the seed's: soft 1, eps 1e-4, from 0.3": {"strength": 1.0, "eps": 1e-4, "start_percent": 0.3},
    "the seed's, eps 1e-3, from 0.15": {"strength": 1.0, "eps": 1e-3, "start_percent": 0.15},
}

#: Columns of the contact sheet.
SHOWN = (LONG, f"{LONG}, as tags", "soft 0.1", "soft 0.35", "soft 1", "hard", "blend", f"hard, {BARE}")


def paint(pipe: Any, some: list[Case], name: str, steps: int) -> list[np.ndarray]:
    """uint8 [H, W, 3] of cases of one size, each from its own noise."""
    setting = SETTINGS[name]
    regional = not name.startswith(LONG)
    rows = []
    for case in some:
        texts = case.objects if BARE in name else case.prompts
        rows.append([Region(p.mask, text) for p, text in zip(case.places, texts, strict=True)])
    with contextlib.ExitStack() as stack:
        if setting is not None:
            stack.enter_context(enable(pipe, rows if regional else (), **setting))
        found = pipe(
            prompt=[case.base if regional else case.tags if "as tags" in name else case.sentence for case in some],
            negative_prompt=[""] * len(some),
            width=some[0].size[0],
            height=some[0].size[1],
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(case.seed) for case in some],
            output_type="np",
        ).images
    return list((found * 255).round().astype(np.uint8))


def judge(image: np.ndarray, case: Case) -> dict[str, Any]:
    """Which regions are right, whether the background is, and how many objects are on the picture."""
    owner = np.stack([place.mask for place in case.places]).argmax(0)
    inside: list[list[classify.Found]] = [[] for _ in case.places]
    seen = classify.find(image)
    for one in seen:
        left, top, right, bottom = one.box
        inside[owner[(top + bottom) // 2, (left + right) // 2]].append(one)
    right = [bool(of) and (of[0].colour, of[0].shape) == what for of, what in zip(inside, case.asked, strict=True)]
    return {"right": right, "ground": classify.background(image) == case.ground, "objects": len(seen)}


def run(pipe: Any, every: list[Case], name: str, steps: int, batch: int) -> dict[str, Any]:
    """Paints and judges; the verdicts are in the order of the cases."""
    begun = time.perf_counter()
    verdicts = []
    shown = {}
    for layout in layouts():
        of = [case for case in every if case.layout == layout]
        for start in range(0, len(of), batch):
            some = of[start : start + batch]
            images = paint(pipe, some, name, steps)
            if start == 0:
                shown[layout] = images[:3]
            verdicts += [judge(image, case) for image, case in zip(images, some, strict=True)]
    return {"verdicts": verdicts, "seconds": round(time.perf_counter() - begun, 1), "shown": shown}


@functools.cache
def pipeline(model: str) -> Any:
    """A worker's own, on one thread."""
    torch.set_num_threads(1)
    return load(find(model), dtype=torch.float32, device="cpu")


def digest(model: str) -> str:
    """Of the weights, so that figures of two models never stand in one table."""
    found = hashlib.sha256()
    for file in sorted(find(model).rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def work(model: str, count: int, seed: int, name: str, steps: int, batch: int) -> dict[str, Any]:
    return run(pipeline(model), cases(count, seed), name, steps, batch)


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def table(every: list[Case], results: dict[str, dict[str, Any]]) -> str:
    """Markdown: shares of right regions by layout and in all, of wholly right pictures, and of right backgrounds."""
    names = list(layouts())
    lines = [
        f"| setting | {' | '.join(names)} | all regions | whole pictures | background |",
        f"|---|{'---|' * (len(names) + 3)}",
    ]
    for name in SETTINGS:
        if name not in results:
            continue
        verdicts = results[name]["verdicts"]
        cells = []
        for layout in names:
            of = [v for v, case in zip(verdicts, every, strict=True) if case.layout == layout]
            cells.append(f"{np.mean([r for v in of for r in v['right']]):.0%}")
        flat = [r for v in verdicts for r in v["right"]]
        low, high = interval(sum(flat), len(flat))
        cells.append(f"**{np.mean(flat):.1%}** ({low:.0%} to {high:.0%})")
        cells.append(f"{np.mean([all(v['right']) for v in verdicts]):.0%}")
        cells.append(f"{np.mean([v['ground'] for v in verdicts]):.0%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs(results: dict[str, dict[str, Any]]) -> list[str]:
    """Folded against stripped pads on the same pictures: regions that only one of them has right."""
    lines = []
    for name in results:
        stripped = f"{name}, pads stripped"
        if stripped in results:
            both = zip(results[name]["verdicts"], results[stripped]["verdicts"], strict=True)
            each = [pair for a, b in both for pair in zip(a["right"], b["right"], strict=True)]
            folded, other = (sum(pair == only for pair in each) for only in ((True, False), (False, True)))
            lines.append(f"{name}: {folded} regions right with folded pads only, {other} with stripped pads only")
    return lines


def sheet(every: list[Case], shown: dict[str, dict[str, list[np.ndarray]]], file: Path) -> None:
    """Two cases of each layout: what is asked, and each setting's picture, wrong regions crossed out."""
    from PIL import Image, ImageDraw, ImageFont

    cell, gap, head, first, words_line = 128, 10, 52, 210, 15
    names = [name for name in SHOWN if name in shown]
    chosen = [case for layout in layouts() for case in [c for c in every if c.layout == layout][:2]]
    heights = [gap + max(cell, words_line * (len(case.places) + 3)) for case in chosen]
    page = Image.new("RGB", (first + len(names) * (cell + gap), head + sum(heights)), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    for column, name in enumerate(names):
        words = textwrap.fill(name, 20)
        pen.multiline_text((first + column * (cell + gap), 2), words, fill="black", font=font, spacing=1)
    for row, case in enumerate(chosen):
        top = head + sum(heights[:row])
        asked = [f"{place.words}: {text}" for place, text in zip(case.places, case.objects, strict=True)]
        pen.multiline_text((4, top + 2), "\n".join([*asked, "", case.base.replace(" on ", "\non ")]), "black", font)
        for column, name in enumerate(names):
            image = shown[name][case.layout][row % 2]
            verdict = judge(image, case)
            left = first + column * (cell + gap)
            page.paste(Image.fromarray(image).resize((cell, cell), Image.Resampling.LANCZOS), (left, top))
            scale = cell / case.size[0]
            owner = np.stack([place.mask for place in case.places]).argmax(0)
            for i, right in enumerate(verdict["right"]):
                if not right:
                    ys, xs = np.nonzero(owner == i)
                    x, y = left + (xs.min() + 9) * scale, top + (ys.min() + 9) * scale
                    for line in ((x - 5, y - 5, x + 5, y + 5), (x - 5, y + 5, x + 5, y - 5)):
                        pen.line(line, "white", 5)
                        pen.line(line, (220, 0, 0), 3)
    page.save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny_anima/model"))
    parser.add_argument("--cases", type=int, default=60, help="of each layout (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the cases (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, metavar="SETTING", help="default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/regional_quality.json")
    parser.add_argument("--sheet", type=Path, help="also a contact sheet, of all that was painted now")
    parser.add_argument("--list", action="store_true", help="show the settings")
    options = parser.parse_args()
    if options.list:
        for name, setting in SETTINGS.items():
            print(f"{name:<42} {setting if setting is not None else 'no regions'}")
        return
    settings = {name: getattr(options, name) for name in ("cases", "seed", "steps", "batch")}
    settings["model"] = digest(options.model)
    every = cases(options.cases, options.seed)
    results: dict[str, dict[str, Any]] = {}
    if options.json.is_file():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        if before["settings"] == settings:
            results = before["results"]
    wanted = options.only or list(SETTINGS)
    if options.sheet:
        wanted += [name for name in SHOWN if name not in wanted]
    wanted = [name for name in wanted if name not in results or (options.sheet and name in SHOWN)]
    shown = {}
    with concurrent.futures.ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        common = options.model, options.cases, options.seed
        begun = {pool.submit(work, *common, name, options.steps, options.batch): name for name in wanted}
        for done in tqdm(concurrent.futures.as_completed(begun), total=len(begun), desc="settings"):
            name, found = begun[done], done.result()
            shown[name] = found.pop("shown")
            results[name] = found
            record = {"machine": describe(), "settings": settings, "results": results}
            write_atomic(options.json, (json.dumps(record) + "\n").encode())
            share = np.mean([r for v in found["verdicts"] for r in v["right"]])
            tqdm.write(f"{name}: {share:.1%} of regions, {found['seconds']} s")
    print("\n" + table(every, results))
    print("\n".join(["", *pairs(results)]))
    if options.sheet:
        sheet(every, shown, options.sheet)


if __name__ == "__main__":
    main()
