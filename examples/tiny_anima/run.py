"""What both trainings share: the numbered pictures of a training set, the learning rate, checkpoints, the loss plot."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import torch


def picture(seed: int, number: int) -> pictures.Picture:
    """A training set's picture of that number."""
    return pictures.sample(np.random.default_rng((seed, number)))


def schedule(step: int, steps: int, *, warmup: int) -> float:
    """Share of the learning rate: a rise, a level stretch, a cosine fall over the last 40% to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    left = min(1.0, (steps - step) / (0.4 * steps))
    return 0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * left))


def wait_while_quiet() -> None:
    """Training pauses while the file named by TINY_ANIMA_PAUSE exists, for measurements on the same machine."""
    name = os.environ.get("TINY_ANIMA_PAUSE")
    while name and Path(name).exists():
        time.sleep(2)


def save(state: dict[str, Any], file: Path) -> None:
    """A kill leaves the old file or the new one."""
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


def plot(curves: dict[str, list[float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        width = max(1, len(values) // 200)
        means = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(means)) + width, means, label=label)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=100)
