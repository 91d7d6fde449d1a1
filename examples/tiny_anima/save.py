"""Writes a trained run as a model in the modular pipeline's own format, fp16, then loads it again and compares.

python examples/tiny_anima/save.py --run RUN --out examples/tiny_anima/model
... save.py --run RUN --out OUT --earlier EARLIER/train.pt --share 0.2      weights averaged with an earlier checkpoint
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

#: The checkpoint of an earlier stage of the same training, and its share of the weights.
Earlier = tuple[Path, float]


def components(run: Path, earlier: Earlier | None = None) -> dict[str, Any]:
    """The parts of a run, with the moving average of the weights, in fp32. Averaged with those of an earlier stage they
    keep what the last one began to forget (Wortsman et al., "Model soups", 2022)."""
    qwen, t5 = model.load_tokenizers(run)
    parts = model.build(len(qwen), len(t5))
    weights = torch.load(run / "train.pt", weights_only=True)["average"]
    if earlier is not None:
        file, share = earlier
        others = torch.load(file, weights_only=True)["average"]
        weights = {name: w.lerp(others[name], share) for name, w in weights.items()}
    parts.load_state_dict(weights)
    vae = model.build_vae()
    vae.load_state_dict(torch.load(run / "vae.pt", weights_only=True)["vae"])
    scale = torch.load(run / "latent_scale.pt", weights_only=True)
    vae.register_to_config(latents_mean=scale["mean"].tolist(), latents_std=scale["std"].tolist())
    found = {**parts, "vae": vae}
    for part in found.values():
        part.eval().requires_grad_(False)
    return {**found, "tokenizer": qwen, "t5_tokenizer": t5, "scheduler": model.build_scheduler()}


def pipeline(run: Path, earlier: Earlier | None = None) -> Any:
    """A run as a pipeline, in memory."""
    from diffusers import AnimaAutoBlocks

    blocks = AnimaAutoBlocks()
    for route in blocks.sub_blocks["denoise"].sub_blocks.values():
        route.sub_blocks["denoise"].set_progress_bar_config(disable=True)
    pipe = blocks.init_pipeline()
    pipe.update_components(**components(run, earlier))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: Any, out: Path) -> None:
    for name in (*train.PARTS, "vae"):
        getattr(pipe, name).half()
    shutil.rmtree(out, ignore_errors=True)
    pipe.save_pretrained(str(out), overwrite_modular_index=True)
    # where it was written is nobody's business, and not where it will be read
    index = out / "modular_model_index.json"
    text = index.read_text(encoding="utf-8").replace(json.dumps(str(out)), json.dumps("."))
    index.write_text(text, encoding="utf-8")


def compare(ours: Any, out: Path) -> None:
    """Prints the greatest difference of weights and of one picture between a pipeline and its saved model."""
    from anima_fast.runner.model import find, load

    saved = load(find(str(out)), dtype=torch.float32, device="cpu")
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
    parser.add_argument("--earlier", type=Path, metavar="FILE", help="train.pt of an earlier stage")
    parser.add_argument("--share", type=float, default=0.2, help="of the earlier weights (default: %(default)s)")
    options = parser.parse_args()
    earlier = (options.earlier, options.share) if options.earlier else None
    save(pipeline(options.run, earlier), options.out)
    compare(pipeline(options.run, earlier), options.out)


if __name__ == "__main__":
    main()
