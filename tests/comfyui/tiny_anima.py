"""A small Anima of random weights, as a state dict that ComfyUI's own loader takes."""

from __future__ import annotations

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
