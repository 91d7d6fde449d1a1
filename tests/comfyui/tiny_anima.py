"""A small Anima of random weights, as a state dict that ComfyUI's own loader takes."""

from __future__ import annotations

import math

import torch

#: Not 2048 or 5120, so that the loader takes its defaults: ten blocks, sixteen heads.
CHANNELS = 256
TEXT = 1024


def state_dict(channels: int = CHANNELS, blocks: int = 10, seed: int = 0) -> dict:
    """Shapes come from ComfyUI's own class; values are random, small enough for a stable picture."""
    import comfy.ldm.anima.model
    import comfy.ops

    with torch.device("meta"):
        model = comfy.ldm.anima.model.Anima(
            max_img_h=240,
            max_img_w=240,
            max_frames=128,
            in_channels=16,
            out_channels=16,
            patch_spatial=2,
            patch_temporal=1,
            model_channels=channels,
            concat_padding_mask=True,
            crossattn_emb_channels=TEXT,
            pos_emb_cls="rope3d",
            pos_emb_learnable=True,
            pos_emb_interpolation="crop",
            use_adaln_lora=True,
            adaln_lora_dim=256,
            num_blocks=blocks,
            num_heads=16,
            extra_per_block_abs_pos_emb=False,
            operations=comfy.ops.disable_weight_init,
            device="meta",
            dtype=torch.float32,
        )
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in ((name, value.shape) for name, value in model.state_dict().items()):
        if "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith("pos_embedder.seq") or not shape:
            continue
        else:
            fan = shape[-1] if len(shape) > 1 else 1
            weights[name] = torch.randn(shape, generator=generator) * fan**-0.5
    # Cross-attention must matter, or a comparison of pictures would not see it.
    for name in weights:
        if name.endswith(("cross_attn.q_norm.weight", "cross_attn.k_norm.weight")):
            weights[name] = weights[name] * 2
    return weights


def conditioning(tokens: int, seed: int, text: int = TEXT) -> list:
    """What CLIP Text Encode gives for a prompt of that many T5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, max(1, tokens - 3), text, generator=generator)
    ids = torch.randint(1, 32000, (tokens,), generator=generator, dtype=torch.int)
    weights = torch.ones(tokens)
    weights[:2] = 1.2
    return [[embeds, {"pooled_output": None, "t5xxl_ids": ids, "t5xxl_weights": weights}]]


def lllite_state_dict(channels: int = CHANNELS, blocks: tuple[int, ...] = (0, 4)) -> dict:
    """A control model of ComfyUI's Anima LLLite format, random, for some blocks' attention and MLP."""
    generator = torch.Generator().manual_seed(7)
    half, width, emb, mid = 8, 16, 8, 4
    shapes = {
        "conv1": (half, 3, 4, 4),
        "conv2": (half, half, 3, 3),
        "conv3": (width, half, 4, 4),
        "proj": (emb, width, 1, 1),
    }
    shapes |= {"norm1": (half,), "norm2": (half,), "norm3": (width,), "out_norm": (emb,)}
    shapes = {f"lllite_conditioning1.{name}": shape for name, shape in shapes.items()}
    for block in blocks:
        for target in ("self_attn_q_proj", "self_attn_k_proj", "cross_attn_q_proj", "mlp_layer1"):
            name = f"lllite_dit_blocks_{block}_{target}"
            shapes |= {f"{name}.down": (mid, channels), f"{name}.mid": (mid, mid + emb)}
            shapes |= {f"{name}.cond_to_film": (2 * mid, emb), f"{name}.up": (channels, mid)}
    weights = {}
    for name, shape in shapes.items():
        scale = 1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        weights[f"{name}.bias"] = torch.zeros(shape[0])
        if name.endswith(".down"):
            weights[name.replace(".down", ".depth_embed")] = torch.randn(emb, generator=generator)
    return weights
