"""A tiny encoder checkpoint of random weights, and a small tokenizer of Qwen3.5's class.

tensors(config)      the checkpoint's tensors, of realistic scale
save(path)           a companion file and, beside it, tokenizer.json
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from anima_fast.encoder.checkpoint import EncoderConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = ["a red cat on the left, a blue house on the right", "from the side, full body, masterpiece, 1girl, (sea)"]

CONFIG = EncoderConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    layer_types=("linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    head_size=24,
)
BASE = dataclasses.replace(CONFIG, head_size=None, last_mlp=True)


def value(name: str, shape, generator) -> torch.Tensor:
    """Random numbers of the scale that a trained tensor of that name has."""
    noise = torch.randn(shape, generator=generator)
    if name == "norm.1.weight":
        return -0.003 + 0.02 * noise
    if name.endswith("linear_attn.norm.weight"):
        return 0.95 + 0.1 * noise
    if name.endswith("norm.weight"):
        return 0.2 + 0.2 * noise
    if name.endswith("A_log"):  # a memory of tokens to hundreds of them
        return torch.empty(shape).uniform_(0.01, 1, generator=generator).log()
    if name.endswith("dt_bias"):
        return noise - 1
    if name.endswith("conv1d.weight"):
        return 0.5 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    return noise if name == "embed_tokens.weight" else noise * shape[-1] ** -0.5


def dtype_of(name: str, shape, dtype=torch.float32, fp8=False) -> torch.dtype:
    """`fp8`: matrices of layers and head in E4M3, as in the published file."""
    return torch.float8_e4m3fn if fp8 and len(shape) == 2 and name != "embed_tokens.weight" else dtype


def tensors(config: EncoderConfig = CONFIG, dtype=torch.float32, fp8=False, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value(name, shape, generator).to(dtype_of(name, shape, dtype, fp8))
        for name, shape in config.shapes().items()
    }


def tokenizer():
    """Byte-level BPE with a few merges, trained here."""
    from transformers import Qwen3_5Tokenizer

    return Qwen3_5Tokenizer().train_new_from_iterator(TEXT, 300, new_special_tokens=SPECIAL[1:])


def save(path, config: EncoderConfig = CONFIG, prefix: str = "", metadata=None, with_tokenizer=True, **how) -> Path:
    from safetensors.torch import save_file

    path = Path(path)
    save_file({prefix + name: t for name, t in tensors(config, **how).items()}, path, metadata)
    if with_tokenizer:
        tokenizer()._tokenizer.save(str(path.parent / "tokenizer.json"))
    return path
