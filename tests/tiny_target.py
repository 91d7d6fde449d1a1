"""A tiny stand-in for the stock encoder: Qwen3 of random weights, with a small tokenizer of its class.

save_file_form(path)     as ComfyUI has it: one safetensors file, its names beginning with `model.`
save_directory(path)     as the hub has it
"""

from __future__ import annotations

from pathlib import Path

import torch

WIDTH = 24  # that of tiny_encoder's head


def model(width: int = WIDTH, seed: int = 1):
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    made = Qwen3Model(config).eval().requires_grad_(False)
    for name, p in made.named_parameters():
        torch.nn.init.normal_(
            p, mean=1.0 if "norm" in name else 0.0, std=0.3 if "norm" in name else p.shape[-1] ** -0.5
        )
    made.norm.weight *= 3  # the stock encoder's are large
    return made


def tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    return Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def save_file_form(path, prefix: str = "model.", with_tokenizer: bool = True, change=None, **how) -> Path:
    """`change` replaces tensors by name; None takes one away."""
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {prefix + name: t for name, t in model(**how).state_dict().items()} | (change or {})
    save_file({name: t.contiguous().clone() for name, t in tensors.items() if t is not None}, path)
    if with_tokenizer:
        tokenizer().save_pretrained(path.parent)
    return path


def save_directory(path, **how) -> Path:
    model(**how).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return Path(path)
