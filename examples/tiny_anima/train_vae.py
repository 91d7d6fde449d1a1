"""Trains the VAE on 64-pixel crops, then encodes the training set once.

    loss = mean |x - decode(z)| + 2 mean (x - decode(z))^2 + KL_WEIGHT * mean KL(q(z|x) || N(0, 1))

z is a sample of q, so that the decoder bears small errors of the transformer.

    python examples/tiny_anima/train_vae.py --run RUN --steps 2500       RUN/vae.pt, RUN/vae_loss.png; resumes
    python examples/tiny_anima/train_vae.py --run RUN --encode 10000     RUN/latents.safetensors: the numbered pictures
                                                                         of the training set, in units of mean and std
The mean and standard deviation of the latents are measured once, by the first --encode, and kept in RUN/latent_scale.pt
for the configuration (`latents_mean`, `latents_std`); transformers are trained for them.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import model
import numpy as np
import pictures
import run
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tqdm import tqdm

KL_WEIGHT = 1e-4
CROP = 64
LEARNING_RATE = 3e-3


def crops(rng: np.random.Generator, count: int) -> torch.Tensor:
    """[count, 3, 64, 64] in [-1, 1], two of each picture."""
    found = []
    while len(found) < count:
        image = pictures.draw(pictures.sample(rng, (96, 96)))
        for _ in range(2):
            top, left = rng.integers(0, 96 - CROP + 1, size=2)
            found.append(image[top : top + CROP, left : left + CROP])
    return pixels(np.stack(found[:count]))


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_of(vae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the reconstruction's mean absolute error."""
    posterior = DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(x.unsqueeze(2))))
    # not vae.decode: it clamps, and what is beyond white would learn nothing
    y = vae.decoder(vae.post_quant_conv(posterior.sample()))[:, :, 0]
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    error = (x - y).abs().mean()
    return error + 2 * (x - y).square().mean() + KL_WEIGHT * kl, error


def train(folder: Path, steps: int, batch: int) -> None:
    torch.manual_seed(0)
    vae = model.one_frame(model.build_vae())
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    done, losses = 0, []
    file = folder / "vae.pt"
    if file.is_file():
        state = torch.load(file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        done, losses = state["step"], state["losses"]
    bar = tqdm(range(done, steps), initial=done, total=steps, desc="vae")
    saved = time.monotonic()
    for step in bar:
        run.wait_while_quiet()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * run.schedule(step, steps, warmup=50)
        loss, error = loss_of(vae, crops(np.random.default_rng((1, step)), batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(error))
        bar.set_postfix(error=f"{np.mean(losses[-20:]):.4f}", refresh=False)
        if time.monotonic() - saved > 60 or step + 1 == steps:
            state = {
                "vae": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "step": step + 1,
                "losses": losses,
            }
            run.save(state, file)
            run.plot({"mean absolute error": losses}, folder / "vae_loss.png")
            saved = time.monotonic()


@torch.no_grad()
def encode(folder: Path, count: int, seed: int, batch: int = 16) -> None:
    """Latents of the pictures `run.picture(seed, i)`, i < count, in fp16: [n, 16, h/8, w/8] for each picture size."""
    from safetensors.torch import save_file

    vae = model.build_vae()
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["vae"])
    model.one_frame(vae).eval()

    def latents(numbers: list[int]) -> torch.Tensor:
        run.wait_while_quiet()
        images = np.stack([pictures.draw(run.picture(seed, i)) for i in numbers])
        return vae.encode(pixels(images).unsqueeze(2)).latent_dist.mode()[:, :, 0]

    groups: dict[tuple[int, int], list[int]] = {}
    for i in range(count):
        picture = run.picture(seed, i)
        groups.setdefault((picture.width, picture.height), []).append(i)
    scale_file = folder / "latent_scale.pt"
    if not scale_file.is_file():
        some = torch.cat([latents(members[:64]).movedim(1, 0).flatten(1) for members in groups.values()], dim=1)
        run.save({"mean": some.mean(1), "std": some.std(1)}, scale_file)
    scale = torch.load(scale_file, weights_only=True)
    mean, std = scale["mean"][:, None, None], scale["std"][:, None, None]
    print("std of the latents", [round(float(s), 2) for s in std.flatten()])

    bar = tqdm(total=count, desc="encode")
    found = {"seed": torch.tensor(seed)}
    for (width, height), members in groups.items():
        parts = []
        for start in range(0, len(members), batch):
            parts.append(((latents(members[start : start + batch]) - mean) / std).half())
            bar.update(len(parts[-1]))
        found[f"latents.{width}x{height}"] = torch.cat(parts).contiguous()
        found[f"numbers.{width}x{height}"] = torch.tensor(members)
    part = folder / "latents.part"
    save_file(found, str(part))
    os.replace(part, folder / "latents.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--encode", type=int, default=0, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=1, help="of the training set")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    if options.encode:
        encode(options.run, options.encode, options.seed)
    else:
        train(options.run, options.steps, options.batch)


if __name__ == "__main__":
    main()
