"""The real sampler on a small latent, and how close two pictures must be."""

from __future__ import annotations

import tiny_anima
import torch

TOLERANCE = 1e-4  # of the picture's scale

POSITIVE, NEGATIVE = tiny_anima.conditioning(20, 1), tiny_anima.conditioning(9, 2)


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
