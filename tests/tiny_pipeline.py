"""A tiny Anima pipeline with random weights, from diffusers' and transformers' own classes and small configurations.

save(directory)          writes it in the modular pipeline's own format, as a download of the real one would look
build()                  the same, in memory
"""

from __future__ import annotations

import os

import torch

WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,", "red", "green", "blue", "house", "tree", "cat", "left", "right"]
ROWS = 48  # what a prompt is padded to; 512 in the real one


def tokenizers():
    """Qwen's is a BPE over bytes, T5's a unigram; both know letters and a few words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, T5TokenizerFast

    pieces = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    qwen = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    words = dict.fromkeys(["▁", *WORDS, *("▁" + word for word in WORDS)])
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((w, -4.0 / len(w)) for w in words)]
    return qwen, T5TokenizerFast(vocab=scores, extra_ids=0)


def components(*, concat_padding_mask: bool = False, width: int = 2, seed: int = 0) -> dict:
    """Every component. The real transformer concatenates a padding mask, for which diffusers needs torchvision."""
    from diffusers import (
        AnimaTextConditioner,
        AutoencoderKLQwenImage,
        CosmosTransformer3DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    qwen, t5 = tokenizers()
    parts = {
        "text_encoder": Qwen3Model(
            Qwen3Config(
                vocab_size=len(qwen),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
            )
        ),
        "text_conditioner": AnimaTextConditioner(
            source_dim=32,
            target_dim=32,
            model_dim=32,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=len(t5),
            min_sequence_length=ROWS,
        ),
        "transformer": CosmosTransformer3DModel(
            num_attention_heads=width,
            attention_head_dim=32,
            num_layers=2,
            mlp_ratio=2.0,
            text_embed_dim=32,
            adaln_lora_dim=16,
            max_size=(4, 64, 64),
            extra_pos_embed_type=None,
            concat_padding_mask=concat_padding_mask,
        ),
        "vae": AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
    }
    for part in parts.values():
        part.eval().requires_grad_(False)
        for name, p in part.named_parameters():  # large enough for every layer, and so every prompt, to matter
            if p.ndim >= 2 and "vae" not in name:
                torch.nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5)
    return {
        **parts,
        "tokenizer": qwen,
        "t5_tokenizer": t5,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def build(**changed):
    from diffusers import AnimaAutoBlocks

    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(**components(**changed))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(directory: str | os.PathLike[str], **changed) -> None:
    build(**changed).save_pretrained(str(directory), overwrite_modular_index=True)
