"""Trains text encoder, text conditioner and transformer together, from latents that `train_vae.py --encode` made.

    x_t = (1 - sigma) x_0 + sigma noise        the transformer sees (x_t, sigma, caption) and predicts noise - x_0
    sigma = shift u / (1 + (shift - 1) u)      u uniform: the levels that the scheduler steps through

A tenth of the captions are empty, for guidance. What a step does follows from its number alone, so that a resumed
training is the same training. Small pictures come first: they cost little, and teach words and shapes.

    python examples/tiny_anima/train.py --run RUN --steps 8000       RUN/train.pt, RUN/loss.png; resumes from there
    torchrun --standalone --nproc-per-node 2 -- examples/tiny_anima/train.py --run RUN --threads 1
                                                                     two processes that share each batch
    ... train.py --run RUN --painter OTHER/train.pt                  the transformer of another training to begin with
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import model
import numpy as np
import pictures
import run
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

LEARNING_RATE = 1e-3
DROPOUT = 0.1  # of captions
EMA = 0.999
TOKENS = 2048  # of pictures in a batch
PARTS = ("text_encoder", "text_conditioner", "transformer")


class Data:
    """The encoded training set, and its batches by number."""

    def __init__(self, file: Path, steps: int) -> None:
        from safetensors.torch import load_file

        tensors = load_file(str(file))
        self.seed = int(tensors["seed"])
        self.steps = steps
        names = sorted(name.partition(".")[2] for name in tensors if name.startswith("latents."))
        self.latents = [tensors[f"latents.{name}"] for name in names]
        self.numbers = [tensors[f"numbers.{name}"] for name in names]

    def batch(self, step: int) -> tuple[torch.Tensor, list[str]]:
        """Latents [B, 16, 1, h, w] of one picture size, and captions."""
        rng = np.random.default_rng((2, self.seed, step))
        size = rng.choice(len(self.latents), p=self._weights(step))
        latents = self.latents[size]
        count = max(8, min(96, 4 * TOKENS // (latents.shape[2] * latents.shape[3])))
        chosen = rng.integers(len(latents), size=count)
        captions = []
        for i in chosen:
            picture = run.picture(self.seed, int(self.numbers[size][i]))
            captions.append("" if rng.random() < DROPOUT else pictures.describe(picture, rng))
        return latents[torch.from_numpy(chosen)].float().unsqueeze(2), captions

    def _weights(self, step: int) -> np.ndarray:
        """Share of each picture size: from mostly small ones to all pictures equally often, in the first two thirds."""
        late = min(1.0, 1.5 * step / self.steps)
        natural = np.array([float(latents[:, 0].numel()) for latents in self.latents])  # batches hold equal areas
        small = np.array([float(latents[0, 0].numel() <= 144) for latents in self.latents])
        if not small.any():
            small = natural
        weights = late * natural / natural.sum() + (1 - late) * small / small.sum()
        return weights / weights.sum()


def context(parts: Any, qwen: Any, t5: Any, captions: list[str]) -> torch.Tensor:
    """Rows [B, L, TEXT] of captions, as the pipeline makes them; zeros after a caption's end."""
    source = qwen(captions, padding="longest", padding_side="right", return_tensors="pt")
    target = t5(captions, padding="longest", padding_side="right", return_tensors="pt")
    ids, mask = source.input_ids, source.attention_mask
    if ids.shape[1] == 0:
        ids, mask = ids.new_zeros(len(captions), 1), mask.new_zeros(len(captions), 1)
    # An empty caption has no state to look at. One zero state adds nothing either, and a softmax over it is defined.
    looked_at = mask.clone()
    looked_at[:, 0] = 1
    states = parts["text_encoder"](input_ids=ids, attention_mask=looked_at).last_hidden_state
    states = states * mask.to(states).unsqueeze(-1)
    return parts["text_conditioner"](states, target.input_ids, target.attention_mask, looked_at)


def fold(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and attention bias that stand for `rows` padded with zeros to `model.ROWS`: n zero keys of value zero are
    one with n times the weight, exp(log n)."""
    batch, length, width = rows.shape
    pads = model.ROWS - length
    bias = rows.new_zeros(batch, length + 1)
    bias[:, -1] = math.log(pads) if pads > 0 else -torch.inf
    return torch.cat([rows, rows.new_zeros(batch, 1, width)], dim=1), bias


def loss_of(
    parts: Any,
    qwen: Any,
    t5: Any,
    latents: torch.Tensor,
    captions: list[str],
    seed: int,
    rows: slice = slice(None),
) -> torch.Tensor:
    """The loss of some rows of a batch, whose noise and levels are drawn for all of it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator)
    # stratified: one u in each of B equal intervals
    count = len(latents)
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    sigma = model.SHIFT * u / (1 + (model.SHIFT - 1) * u)
    latents, noise, sigma, captions = latents[rows], noise[rows], sigma[rows], captions[rows]
    s = sigma.view(-1, 1, 1, 1, 1)
    text, bias = fold(context(parts, qwen, t5, captions))
    found = parts["transformer"]((1 - s) * latents + s * noise, sigma, text, attention_mask=bias, return_dict=False)[0]
    return (found.float() - (noise - latents)).square().mean()


class Training:
    """Weights, their moving average, the optimizer and the number of steps done: all that a checkpoint holds.

    Of several processes (torch.distributed), each computes the gradient of its rows of a batch; all add them up and
    take the same step."""

    def __init__(self, qwen: Any, t5: Any, steps: int, *, bf16: bool = True) -> None:
        several = torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if several else 0
        self.processes = torch.distributed.get_world_size() if several else 1
        torch.manual_seed(0)
        self.qwen, self.t5, self.steps, self.bf16 = qwen, t5, steps, bf16
        self.parts = model.build(len(qwen), len(t5), rows=0)
        self.average = {name: p.detach().clone() for name, p in self.parts.named_parameters()}
        decayed = [p for p in self.parts.parameters() if p.ndim >= 2]
        others = [p for p in self.parts.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99))
        self.done = 0
        self.losses: list[float] = []

    def step(self, data: Data) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * run.schedule(self.done, self.steps, warmup=200)
        latents, captions = data.batch(self.done)
        cuts = [len(captions) * i // self.processes for i in range(self.processes + 1)]
        rows = slice(cuts[self.rank], cuts[self.rank + 1])
        share = (rows.stop - rows.start) / len(captions)
        # for 64 tokens, plain products are faster than the flash kernel's backward pass
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16), sdpa_kernel(SDPBackend.MATH):
            loss = share * loss_of(self.parts, self.qwen, self.t5, latents, captions, seed=self.done, rows=rows)
        loss.backward()
        loss = self._summed(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        keep = min(EMA, self.done / (self.done + 10))
        with torch.no_grad():
            averages = list(self.average.values())
            torch._foreach_lerp_(averages, [p.detach() for p in self.parts.parameters()], 1 - keep)
        self.losses.append(loss.item())
        return self.losses[-1]

    def _summed(self, loss: torch.Tensor) -> torch.Tensor:
        """Adds up the gradients of all processes, and the loss."""
        if self.processes == 1:
            return loss
        grads = [p.grad for p in self.parts.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads] + [loss.flatten()])
        torch.distributed.all_reduce(flat)
        for grad, found in zip(grads, flat[:-1].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(found.view_as(grad))
        return flat[-1]

    def save(self, file: Path) -> None:
        state = {
            "parts": self.parts.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.done,
            "losses": self.losses,
        }
        run.save(state, file)

    def take_painter(self, file: Path) -> None:
        """Begins with another training's transformer: a painter that is still to learn what words mean."""
        found = torch.load(file, weights_only=True)["average"]
        with torch.no_grad():
            for name, p in self.parts["transformer"].named_parameters(prefix="transformer"):
                p.copy_(found[name])
                self.average[name].copy_(p)

    def load(self, file: Path) -> None:
        state = torch.load(file, weights_only=True)
        self.parts.load_state_dict(state["parts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.done, self.losses = state["average"], state["step"], state["losses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000, help="in all, the resumed ones included")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--painter", type=Path, metavar="FILE", help="train.pt whose transformer a new training takes")
    parser.add_argument("--fp32", action="store_true", help="without bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rank = 0
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
    qwen, t5 = model.load_tokenizers(options.run)
    training = Training(qwen, t5, options.steps, bf16=not options.fp32)
    data = Data(options.run / "latents.safetensors", options.steps)
    file = options.run / "train.pt"
    if file.is_file():
        training.load(file)
    elif options.painter:
        training.take_painter(options.painter)
    if training.processes > 1:
        torch.distributed.barrier()  # nobody writes the file before all have read it
    bar = tqdm(total=options.steps, initial=training.done, desc="train", disable=rank > 0)
    saved = time.monotonic()
    while training.done < options.steps:
        run.wait_while_quiet()
        training.step(data)
        bar.set_postfix(loss=f"{np.mean(training.losses[-50:]):.4f}", refresh=False)
        bar.update()
        late = time.monotonic() - saved > options.save_every or training.done == options.steps
        if rank == 0 and late:
            training.save(file)
            run.plot({"loss": training.losses}, options.run / "loss.png")
            saved = time.monotonic()


if __name__ == "__main__":
    main()
