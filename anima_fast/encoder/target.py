"""The stock encoder, Qwen3-0.6B: the space that Anima's adapter was trained on, and so what alignments aim at.

It is read from ComfyUI's single file (`qwen_3_06b_base.safetensors`) or from a directory as the hub has it, and gives
what Anima takes: the last hidden state after the final norm, without padding, one token for an empty prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import invalid
from .prompts import batches, pieces
from .tokenizer import PAD

__all__ = ["HUB_NAME", "Target", "load_target"]

HUB_NAME = "Qwen/Qwen3-0.6B"
_COMFYUI_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")
_FILES = "tokenizer_config.json with tokenizer.json, or with vocab.json and merges.txt"
_EPS, _THETA = 1e-6, 1e6  # no tensor tells; of every Qwen3


@dataclasses.dataclass(eq=False)
class Target:
    """A loaded target. `encode` as the encoder's."""

    model: Any
    tokenizer: Any
    hash: str
    device: torch.device

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @torch.inference_mode()
    def encode(
        self, prompts: Sequence[str], weights: bool = True, batch_tokens: int = 2048
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States fp32 `[B, L, D]` and mask `[B, L]` bool, zeros where no token is. `weights`: as `Encoder.encode`."""
        empty = self.tokenizer.convert_tokens_to_ids(PAD)
        texts = [[text for text, _ in pieces(prompt)] if weights else [prompt] for prompt in prompts]
        ids = [[i for text in cut for i in self.tokenizer(text).input_ids] or [empty] for cut in texts]
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        states = torch.zeros(*mask.shape, self.width, device=self.device)
        for batch in batches(lengths.tolist(), batch_tokens):
            width = int(lengths[batch].max())
            padded = torch.tensor([[*ids[i], *[empty] * (width - len(ids[i]))] for i in batch], device=self.device)
            found = self.model(
                input_ids=padded, attention_mask=mask[batch, :width].long().to(self.device), use_cache=False
            ).last_hidden_state
            states[batch, :width] = found.float()
        mask = mask.to(self.device)
        return torch.where(mask[..., None], states, 0.0), mask


def load_target(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Target:
    """Read a Qwen3 text model: a .safetensors file, or a directory with config.json.

    Args:
        tokenizer: directory of Qwen3's tokenizer. Default: beside the weights, then in the ComfyUI that the file lies
            in, then the hub's (or its local cache).

    Raises FileNotFoundError, or ValueError naming the file and what does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"target: no file or directory {str(path)!r} (hf download {HUB_NAME} --local-dir DIR makes one)"
        )
    model, digest = _from_directory(path, dtype) if path.is_dir() else _from_file(path, dtype)
    found = _tokenizer(path if path.is_dir() else path.parent, tokenizer, model.config.vocab_size)
    device = torch.device(device)
    return Target(model.to(device).eval().requires_grad_(False), found, digest, device)


def _from_file(path: Path, dtype: torch.dtype) -> tuple[Any, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise invalid("target", f"{str(path)!r}, which cannot be read ({error})", "a whole safetensors file") from error
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix) and n != "lm_head.weight"}
    config = _config(path, own)
    qwen = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    with torch.device("meta"):
        model = qwen.Qwen3Model(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    problems = [f"{name} missing" for name in expected if name not in own]
    for name, tensor in own.items():
        if name not in expected:
            problems.append(f"{name} unknown")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"{name} of shape {list(tensor.shape)} and not {list(expected[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} of {tensor.dtype}")
        elif not bool(torch.isfinite(tensor.float()).all()):
            problems.append(f"{name} not finite")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        named = ", ".join(problems[:8]) + more
        raise invalid("target", f"{str(path)!r} with {named}", "the tensors of a Qwen3 text model")
    model.load_state_dict({name: t.to(dtype) for name, t in own.items()}, strict=True, assign=True)
    model.rotary_emb = qwen.Qwen3RotaryEmbedding(config)  # computed, not loaded: it cannot stay on the meta device
    return model, _digest(model)


def _config(path: Path, own: dict[str, torch.Tensor]) -> Any:
    """Qwen3's sizes from its tensors' shapes."""
    allowed = "Qwen3-0.6B as ComfyUI has it (qwen_3_06b_base.safetensors), or a directory with config.json"
    if any(".linear_attn." in name for name in own):
        raise invalid("target", f"{str(path)!r}, a Qwen3.5: that is the encoder's side", allowed)

    def side(name: str, axis: int) -> int:
        if name not in own or own[name].ndim <= axis:
            raise invalid("target", f"{str(path)!r} without {name}", allowed)
        return own[name].shape[axis]

    head = side("layers.0.self_attn.q_norm.weight", 0)
    layers = {int(m[1]) for name in own if (m := re.match(r"layers\.(\d+)\.", name))}
    return importlib.import_module("transformers").Qwen3Config(
        vocab_size=side("embed_tokens.weight", 0),
        hidden_size=side("embed_tokens.weight", 1),
        intermediate_size=side("layers.0.mlp.gate_proj.weight", 0),
        num_hidden_layers=len(layers),
        num_attention_heads=side("layers.0.self_attn.q_proj.weight", 0) // head,
        num_key_value_heads=side("layers.0.self_attn.k_proj.weight", 0) // head,
        head_dim=head,
        rms_norm_eps=_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
    )


def _from_directory(path: Path, dtype: torch.dtype) -> tuple[Any, str]:
    transformers = importlib.import_module("transformers")
    if not (path / "config.json").is_file():
        raise invalid("target", f"{str(path)!r} without config.json", f"a directory as a download of {HUB_NAME}")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if config.model_type != "qwen3":
            raise invalid("target", f"{str(path)!r}, a {config.model_type}", "a qwen3, as Anima's own encoder")
        model, info = transformers.Qwen3Model.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise invalid("target", f"{str(path)!r}, which cannot be loaded ({reason})", "a whole download") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise invalid("target", f"{str(path)!r} without {', '.join(missing[:8])}", "a whole download")
    return model, _digest(model)


def _digest(model: Any) -> str:
    """Of the sizes and the final norm: tells targets apart without reading gigabytes."""
    sizes = [model.config.vocab_size, model.config.hidden_size, model.config.num_hidden_layers]
    digest = hashlib.sha256(repr(sizes).encode())
    digest.update(model.norm.weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tokenizer(beside: Path, given: str | os.PathLike[str] | None, rows: int) -> Any:
    places = [Path(given)] if given is not None else [beside]
    if given is None:
        places += [parent / _COMFYUI_TOKENIZER for parent in beside.resolve().parents]
    transformers = importlib.import_module("transformers")
    place = next((p for p in places if (p / "tokenizer.json").is_file() or (p / "vocab.json").is_file()), None)
    if place is None and given is not None:
        raise FileNotFoundError(
            f"target tokenizer: no tokenizer.json or vocab.json in {str(given)!r}; put there {_FILES}"
        )
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            HUB_NAME if place is None else str(place), local_files_only=place is not None
        )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if place is not None:
            raise invalid("target tokenizer", f"{str(place)!r}, which cannot be loaded ({reason})", _FILES) from error
        raise FileNotFoundError(
            f"target tokenizer: none beside the weights, and {HUB_NAME} cannot be downloaded ({reason}). Put beside "
            f"them, or in a directory given as the target's tokenizer: {_FILES}"
        ) from error
    where = HUB_NAME if place is None else str(place)
    end = found.convert_tokens_to_ids(PAD)
    if len(found) > rows or end is None or not 0 <= end < rows:
        raise invalid(
            "target tokenizer",
            f"{where!r} with {len(found)} ids for {rows} rows of embeddings",
            "Qwen3's, whose <|endoftext|> is 151643; that of Qwen3.5 is the encoder's",
        )
    return found
