"""The tiny Anima's parts: diffusers' and transformers' own classes with small configurations.

    tokenizers    BPE over bytes (Qwen's) and unigram (T5's), trained on the captions
    text_encoder  Qwen3, causal        [B, L] ids   -> [B, L, TEXT]
    text_conditioner                   T5 ids, which look at the encoder's states -> [B, max(L, ROWS), TEXT], rows of
                                       zeros after the caption
    transformer   Cosmos DiT           latents [B, 16, 1, h/8, w/8], sigma, context -> velocity
    vae           8 x 8 pixels a latent, 16 channels

The numbers are the smallest that paint; see README.md for what was measured.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import torch
import torch.nn.functional as F

TEXT = 192  # width of the text encoder's states and of the context
ROWS = 64  # rows of the context: what a caption is padded to with zeros (512 in Anima)
SHIFT = 3.0


def captions(seed: int, count: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield pictures.describe(pictures.sample(rng), rng)


def tokenizers(seed: int = 0, count: int = 20000) -> tuple[Any, Any]:
    """Qwen's and T5's, trained on `count` captions; what they cannot say in words they spell."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, T5TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        captions(seed, count),
        trainers.BpeTrainer(
            vocab_size=480,
            min_frequency=20,
            initial_alphabet=sorted(ByteLevel.alphabet()),
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        ),
    )
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    qwen = Qwen2Tokenizer(vocab=trained["vocab"], merges=merges)

    # A unigram model whose pieces are the captions' words, by their frequency; letters spell any other.
    counts = collections.Counter(word for text in captions(seed, count) for word in re.findall(r"\w+|[^\w\s]", text))
    total = sum(counts.values())
    words = [(f"▁{word}" if word.isalpha() else word, math.log(n / total)) for word, n in sorted(counts.items())]
    letters = [(letter, -20.0) for letter in ("▁", *map(chr, range(33, 127)))]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *dict([*letters, *words]).items()]
    return qwen, T5TokenizerFast(vocab=pieces, extra_ids=0)


def load_tokenizers(folder: Path) -> tuple[Any, Any]:
    """Those of a training run, made by its first call."""
    from transformers import Qwen2Tokenizer, T5TokenizerFast

    if not (folder / "t5_tokenizer").is_dir():
        for name, tokenizer in zip(("tokenizer", "t5_tokenizer"), tokenizers(), strict=True):
            tokenizer.save_pretrained(folder / name)
    return Qwen2Tokenizer.from_pretrained(folder / "tokenizer"), T5TokenizerFast.from_pretrained(
        folder / "t5_tokenizer"
    )


def build_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16
    )
    _start_as_averages(vae)
    return vae


@torch.no_grad()
def _start_as_averages(vae: Any) -> None:
    """Before training, most of the VAE hands its input on (down: 2 x 2 means; up: copies), so that colours come through
    from the first step. From random weights it learns brightness, and for hundreds of steps nothing else.
    Of a causal kernel a single frame meets the last time step only; the others start at zero."""
    for name, p in vae.named_parameters():
        if p.ndim < 4:
            continue
        kernel = p.clone() if p.ndim == 4 else p[:, :, -1].clone()
        if "conv2" in name or "proj" in name:  # the last layer of a residual branch
            kernel.zero_()
        elif "conv1" not in name and "to_qkv" not in name:
            through = torch.zeros_like(kernel)
            torch.nn.init.dirac_(through)
            if "resample" in name and kernel.shape[0] == kernel.shape[1]:
                through.zero_()
                through.diagonal().movedim(-1, 0)[:, :2, :2] = 0.25
            kernel = through + 0.3 * kernel
        p.zero_()
        (p if p.ndim == 4 else p[:, :, -1]).copy_(kernel)
    half = vae.quant_conv.bias.shape[0] // 2
    vae.quant_conv.weight[half:] *= 0.1
    vae.quant_conv.bias[half:] = -5.0  # log variance: at 0 the noise hides the picture


def build(qwen_vocabulary: int, t5_vocabulary: int, *, rows: int = ROWS) -> torch.nn.ModuleDict:
    """text_encoder, text_conditioner, transformer. `rows=0`: captions without their padding, for training."""
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
    from transformers import Qwen3Config, Qwen3Model

    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=qwen_vocabulary,
            hidden_size=TEXT,
            intermediate_size=2 * TEXT,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=64,
        )
    )
    conditioner = AnimaTextConditioner(
        source_dim=TEXT,
        target_dim=TEXT,
        model_dim=TEXT,
        num_layers=2,
        num_attention_heads=3,
        mlp_ratio=2.0,
        target_vocab_size=t5_vocabulary,
        min_sequence_length=rows,
    )
    transformer = CosmosTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        num_layers=4,
        mlp_ratio=4.0,
        text_embed_dim=TEXT,
        adaln_lora_dim=64,
        max_size=(4, 128, 128),
        rope_scale=(1.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    _initialise(encoder, conditioner, transformer)
    return torch.nn.ModuleDict({"text_encoder": encoder, "text_conditioner": conditioner, "transformer": transformer})


def _initialise(encoder: Any, conditioner: Any, transformer: Any) -> None:
    torch.nn.init.normal_(conditioner.embed.weight)
    torch.nn.init.normal_(encoder.embed_tokens.weight, std=0.5)
    # Positions are divided by their norm, which has no gradient at 0. Those of neighbours begin alike.
    embed = transformer.learnable_pos_embed
    for table in (embed.pos_emb_t, embed.pos_emb_h, embed.pos_emb_w):
        at = torch.arange(table.shape[0])[:, None] + 1.0
        rate = torch.exp(torch.randn(table.shape[1]) * 1.0 - 1.5)
        table.data.copy_(torch.sin(at * rate + torch.rand(table.shape[1]) * 6.3))
    # Each block begins as the identity: the gates' last layer is zero. So is the output.
    for name, p in transformer.named_parameters():
        if (name.endswith("linear_2.weight") and "norm" in name) or name == "proj_out.weight":
            torch.nn.init.zeros_(p)
        elif "t_embedder.linear_2" in name:  # it ends in shift, scale and gate of every block
            torch.nn.init.normal_(p, std=0.02)
    with torch.no_grad():
        gates = transformer.time_embed.t_embedder.linear_2.weight
        gates[2 * gates.shape[0] // 3 :] += 0.05


def build_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def one_frame(vae: Any) -> Any:
    """The same VAE for training on pictures: of a causal convolution's three time steps, a single frame meets the last
    one only, the others multiply padding. A third of the work, the same result."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    def forward(conv: Any, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        left, right, top, bottom, _, _ = conv._padding
        x = x[:, :, 0]
        if left != right or top != bottom:
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        return F.conv2d(x, conv.weight[:, :, -1], conv.bias, conv.stride[1:], (top, left)).unsqueeze(2)

    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = functools.partial(forward, module)
    return vae
