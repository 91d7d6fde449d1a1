"""What `make demo` runs: the main job, painted by the tiny Anima (`paint.py`), then measured at the real one's shapes.

For each region file in this folder: read it, bind the plan to the picture's tokens, run attention as one of Anima's 28
blocks does (16 heads of 128, one query for 16 x 16 pixels, each prompt padded to 512 rows), hold every result to the
fp64 reference, and time it against what people use today. Pictures and figures go to demo_output/.

    python examples/demo.py [--rounds 3] [--out demo_output]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import paint

from anima_fast.bench.cases import Problem, padded_problem
from anima_fast.bench.machine import describe
from anima_fast.bench.measure import Result, report
from anima_fast.bench.peers import contenders
from anima_fast.commands import regions
from anima_fast.commands.bench import draw, measure_with_bar

HERE = Path(__file__).parent
HEADS, HEAD_DIM = 16, 128
FILES = ("quadrants", "left_right", "portrait", "knight_and_dragon")

# Who is timed: ours, the line to beat, and what the node packs of today do. `anima-fast bench attention` times all.
TIMED = {
    "cpu": "anima_fast, C++",
    "triton": "anima_fast, Triton",
    "torch": "anima_fast, plain torch",
    "stock": "torch attention without regions, 512 padded keys",
    "sdpa_mask": "torch attention with a materialised mask",
    "blend_packs": "one attention a prompt, blended",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Four prompts in four regions, painted; then regional attention at Anima's shapes."
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="default: %(default)s")
    options = parser.parse_args()
    begun = time.perf_counter()
    machine = describe()
    print(
        f"anima_fast {machine['anima_fast']}, torch {machine['torch']}, {machine['cpu']}, {machine['threads']} threads"
    )
    try:
        painted = f"{paint.paint(options.out)}, "
    except ValueError as error:  # diffusers is not installed
        painted = ""
        print(f"nothing painted: {error}")
    print(f"\nOne cross-attention call of Anima ({HEADS} heads of {HEAD_DIM}, fp32), prompts padded to 512 rows.\n")
    measured, failed = [], 0
    for name in FILES:
        read = regions.read_region_file(HERE / "regions" / f"{name}.json")
        figures = regions.describe(read)
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        regions.draw(read, figures, folder)
        problem = padded_problem(title(name, read), read.plan, read.size, heads=HEADS, head_dim=HEAD_DIM)
        results = measure_with_bar(problem, [c for c in contenders() if c.name in TIMED], options.rounds)
        show(problem, results)
        failed += sum(result.status == "gate failed" for result in results)
        width, height = read.size
        what = {
            "width": width,
            "height": height,
            "layout": name,
            "regions": len(read.names),
            "dtype": "fp32",
            "device": "cpu",
        }
        measured.append((what, problem, results))
    try:
        draw(report(measured, options.rounds), str(options.out / "timing.png"))
    except ValueError as error:
        print(f"no timing.png: {error}")
    print(
        f"\nPictures: {painted}{options.out}/timing.png, and of each region file overlay.png, tokens.png, weights_*.png"
    )
    print(f"{'FAILED' if failed else 'All results correct'}; {time.perf_counter() - begun:.0f} s.")
    return 1 if failed else 0


def title(name: str, read: regions.Regions) -> str:
    width, height = read.size
    return f"{name}.json: {len(read.names)} regions, {width} x {height} pixels, {regions.modes(read.plan)}"


def show(problem: Problem, results: list[Result]) -> None:
    """Error and time of each, and how much faster ours is."""
    timed = [r for r in results if r.median_ms is not None]
    ours = next(r.median_ms for r in timed if r.kind == "backend")
    print(problem.title)
    for r in results:
        if r.status == "not executed":
            continue
        if r.median_ms is None:
            print(f"  WRONG    {TIMED[r.name]}: {r.reason}")
            continue
        error = f"error {r.error:.1e} of {r.bound:.1e} allowed"
        ratio = "" if r is timed[0] else f"{r.median_ms / (ours or 1):5.1f} x the time of the first line"
        print(f"  correct  {TIMED[r.name]:<50} {r.median_ms:7.1f} ms  {error}  {ratio}")
    print()


if __name__ == "__main__":
    raise SystemExit(main())
