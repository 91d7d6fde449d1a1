"""The real sampler on a small latent, two regions on it, and how close two pictures must be."""

from __future__ import annotations

import tiny_anima
import torch

TOLERANCE = 1e-4  # of the picture's scale

POSITIVE, NEGATIVE = tiny_anima.conditioning(20, 1), tiny_anima.conditioning(9, 2)


def regions(fast, size=(128, 192), soft=True, names=("left", "right")):
    x = torch.linspace(0, 1, size[1])
    left = (0.5 + 4 * (0.45 - x)).clamp(0, 1) if soft else (x < 0.45).float()
    right = (0.5 + 4 * (x - 0.6)).clamp(0, 1) if soft else (x > 0.6).float()
    masks = [m.expand(1, *size).contiguous() for m in (left, right)]
    masks[1][:, : size[0] // 4] = 0
    return [
        fast.Region.make(tiny_anima.conditioning(12 + 3 * i, 3 + i), mask, strength=1 + i / 2, name=name)
        for i, (mask, name) in enumerate(zip(masks, names, strict=True))
    ]


def sample(
    comfy,
    model,
    size=(16, 24),
    batch=1,
    frames=1,
    cfg=4.0,
    steps=2,
    positive=POSITIVE,
    negative=NEGATIVE,
    latent=None,
    denoise=1.0,
):
    """A latent from the real sampler. `size` is (height, width) in latent pixels."""
    latent = torch.zeros(batch, 16, frames, *size) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", positive, negative, latent, denoise, disable_pbar=True, seed=1
        )


def assert_close(out, expected, tolerance=TOLERANCE):
    assert out.shape == expected.shape
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"differs by {error:.2e} of the scale"
