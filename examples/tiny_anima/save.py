"""Writes a trained run as a model in the modular pipeline's own format, fp16, then loads it again and compares.

python examples/tiny_anima/save.py --run RUN --out examples/tiny_anima/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import model
import torch
import train


def components(run: Path) -> dict[str, Any]:
    """The parts of a run, with the moving average of the weights, in fp32."""
    qwen, t5 = model.load_tokenizers(run)
    parts = model.build(len(qwen), len(t5))
    state = torch.load(run / "train.pt", weights_only=True)
    parts.load_state_dict(state["average"])
    vae = model.build_vae()
    vae.load_state_dict(torch.load(run / "vae.pt", weights_only=True)["vae"])
    scale = torch.load(run / "latent_scale.pt", weights_only=True)
    vae.register_to_config(latents_mean=scale["mean"].tolist(), latents_std=scale["std"].tolist())
    found = {**parts, "vae": vae}
    for part in found.values():
        part.eval().requires_grad_(False)
    return {**found, "tokenizer": qwen, "t5_tokenizer": t5, "scheduler": model.build_scheduler()}


def pipeline(run: Path) -> Any:
    """A run as a pipeline, in memory."""
    from diffusers import AnimaAutoBlocks

    blocks = AnimaAutoBlocks()
    for route in blocks.sub_blocks["denoise"].sub_blocks.values():
        route.sub_blocks["denoise"].set_progress_bar_config(disable=True)
    pipe = blocks.init_pipeline()
    pipe.update_components(**components(run))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(run: Path, out: Path) -> None:
    pipe = pipeline(run)
    for name in (*train.PARTS, "vae"):
        getattr(pipe, name).half()
    shutil.rmtree(out, ignore_errors=True)
    pipe.save_pretrained(str(out), overwrite_modular_index=True)
    # where it was written is nobody's business, and not where it will be read
    index = out / "modular_model_index.json"
    text = index.read_text(encoding="utf-8").replace(json.dumps(str(out)), json.dumps("."))
    index.write_text(text, encoding="utf-8")


def compare(run: Path, out: Path) -> None:
    """Prints the greatest difference of weights and of one picture between a run and its saved model."""
    from anima_fast.runner.model import find, load

    ours, saved = pipeline(run), load(find(str(out)), dtype=torch.float32, device="cpu")
    for name in (*train.PARTS, "vae"):
        pairs = zip(getattr(ours, name).parameters(), getattr(saved, name).parameters(), strict=True)
        print(f"{name}: weights differ by {max(float((a - b).abs().max()) for a, b in pairs):.1e} at most")
    images = [
        pipe(
            prompt="a red circle on the left and a blue square on the right",
            height=128,
            width=128,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for pipe in (ours, saved)
    ]
    print(f"picture: differs by {float((images[0] - images[1]).abs().mean()):.1e} on average")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    save(options.run, options.out)
    compare(options.run, options.out)


if __name__ == "__main__":
    main()
