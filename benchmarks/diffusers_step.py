"""A sampling step of diffusers' Anima pipeline, end to end: with four regions against without any.

    python benchmarks/diffusers_step.py                        the tiny Anima, 192 and 512 pixels
    python benchmarks/diffusers_step.py --real --sizes 1024    random weights at Anima's own width (2048, 16 heads of
                                                               128, prompts of 512 rows), --blocks of its 28

Each variant samples the same noise. A step is what passes between the ends of two of the scheduler's steps (the
conditional and the negative call, guidance), the median over the steps of a run but the first. The variants run in
shuffled order, --rounds times; medians of the rounds are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from anima_fast.bench.machine import describe
from anima_fast.files import write_atomic
from anima_fast.integrations.diffusers import Region, enable
from anima_fast.runner.model import find, load, quiet

ROOT = Path(__file__).parents[1]
REGIONS = {"top_left": "a red heart", "top_right": "a blue star", "bottom_left": "a green ring"}
REGIONS |= {"bottom_right": "a purple diamond"}
BASE = "four shapes on a sand background"

VARIANTS: dict[str, dict[str, Any] | None] = {
    "without regions": None,
    "without regions, pads folded": {},
    "four regions, soft": {"mode": "soft_log"},
    "four regions, hard": {"mode": "hard"},
    "four regions, blend": {"combine": "blend"},
}


def real_width(blocks: int) -> Any:
    """A pipeline with Anima's transformer and text conditioner at their own widths, few blocks and random weights."""
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_pipeline

    pipe = tiny_pipeline.build()
    torch.manual_seed(0)
    pipe.update_components(
        text_conditioner=AnimaTextConditioner(
            source_dim=pipe.text_encoder.config.hidden_size, num_layers=1, target_vocab_size=len(pipe.t5_tokenizer)
        ),
        transformer=CosmosTransformer3DModel(
            num_attention_heads=16, num_layers=blocks, concat_padding_mask=False, extra_pos_embed_type=None
        ),
    )
    return pipe


def run(pipe: Any, name: str, size: int, count: int) -> float:
    """Median seconds of a step."""
    regions = [Region(str(ROOT / f"examples/masks/{mask}.png"), text) for mask, text in REGIONS.items()]
    setting = VARIANTS[name]
    with contextlib.ExitStack() as stack:
        if setting is not None:
            stack.enter_context(enable(pipe, regions if setting else (), **setting))
        times = stack.enter_context(watched(pipe.scheduler))
        pipe(
            prompt=BASE,
            negative_prompt="",
            width=size,
            height=size,
            num_inference_steps=count,
            generator=torch.Generator().manual_seed(0),
            output="latents",
        )
    return statistics.median(b - a for a, b in itertools.pairwise(times))


@contextlib.contextmanager
def watched(scheduler: Any) -> Iterator[list[float]]:
    """When its steps end."""
    times: list[float] = []

    def step(*arguments: Any, **keywords: Any) -> Any:
        found = type(scheduler).step(scheduler, *arguments, **keywords)
        times.append(time.perf_counter())
        return found

    scheduler.step = step
    try:
        yield times
    finally:
        del scheduler.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/tiny_anima/model")
    parser.add_argument("--real", action="store_true", help="random weights of the real width instead")
    parser.add_argument("--blocks", type=int, default=2, help="with --real (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[192, 512])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with quiet():
        pipe = (
            real_width(options.blocks) if options.real else load(find(options.model), dtype=torch.float32, device="cpu")
        )
    rows = []
    for size in options.sizes:
        for name in VARIANTS:  # memory and caches are warm afterwards
            run(pipe, name, size, 2)
        samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in range(options.rounds):
            for name in random.Random(number).sample(list(VARIANTS), len(VARIANTS)):
                samples[name].append(run(pipe, name, size, options.steps))
        without = statistics.median(samples["without regions"])
        print(f"{size} x {size}, a step in ms, medians of {options.rounds} rounds")
        for name, values in samples.items():
            middle = statistics.median(values)
            print(f"  {name:<30} {1000 * middle:9.1f}  {middle / without:5.2f} of that without regions")
            rows.append({"size": size, "variant": name, "seconds": values, "median": middle})
    if options.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        record = {"machine": describe(), "settings": settings, "rows": rows}
        write_atomic(options.json, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
