"""`load` and what it returns: prompts in, the states that Anima's adapter takes out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import invalid, wrong_type
from .adjust import Adjustment
from .alignment import Alignment
from .calibration import Calibration
from .checkpoint import Checkpoint, read_checkpoint
from .files import HEAD_NORMS, RECURRENCES
from .head import log_norm
from .prompts import batches, pieces
from .tokenizer import PAD, load_tokenizer

if TYPE_CHECKING:
    from .model import TextEncoder

__all__ = ["Encoder", "load"]

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(
    path: str | os.PathLike[str],
    recurrence: str = "gdn",
    head_norm: str = "exp",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    *,
    alignment: Alignment | str | os.PathLike[str] | None = None,
    alignment_strength: float = 0.5,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    output_scale: float = 1.0,
    force: bool = False,
    progress: bool | None = None,
) -> Encoder:
    """The hybrid text encoder (Qwen3.5-4B for Anima) from a safetensors file.

    Args:
        path: a file, or a directory in transformers' layout. Names may begin with `model.` or
            `model.language_model.`. On the CPU the file stays mapped: it must not change while the encoder is in use.
        recurrence: "gdn": the recurrent layers as the gated delta nets they are. "mamba2": the reading that the first
            node for this checkpoint had; for files that were fitted with it.
        head_norm: the factor of the head's norm, "exp": exp(w), "one_plus": 1 + w. `info()["norm"]` tells by how much
            they differ here.
        dtype: what is computed in: fp32, bf16 or fp16. Weights keep the type of the file until they are used.
        config: values that tensor shapes do not tell, under transformers' names: linear_num_key_heads,
            linear_key_head_dim, rope_theta, partial_rotary_factor, rms_norm_eps. Default: the file's metadata
            ("config", JSON), a config.json beside it, Qwen3.5's. Everything else must agree with the tensors.
        tokenizer: Qwen3.5's tokenizer.json, its directory, or a loaded tokenizer. Default: the file beside the
            checkpoint, else a download. Looked for when the first prompt comes.
        alignment, alignment_strength, calibration, output_scale: what follows the head, all off by default.
        force: use an alignment or calibration that was fitted to another recurrence.
        progress: show a bar; default: when stderr is a terminal.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming the argument, what came and what is allowed; for a checkpoint
            every tensor that is missing, unknown, of a wrong shape or type, or not finite.

    Example:
        >>> encoder = load("qwen35_4b.safetensors")
        >>> states, mask = encoder.encode(["a red (cat:1.2)", "the sea"])
        >>> states.shape, mask.sum(dim=1)
        (torch.Size([2, 4, 1024]), tensor([4, 2]))
    """
    for name, value, allowed in (("recurrence", recurrence, RECURRENCES), ("head_norm", head_norm, HEAD_NORMS)):
        if value not in allowed:
            raise invalid(name, repr(value), " | ".join(map(repr, allowed)))
    if dtype not in _TYPES:
        raise invalid("dtype", repr(dtype), " | ".join(map(str, _TYPES)))
    from .model import TextEncoder

    checkpoint = read_checkpoint(path, config, device, progress)
    adjustment = Adjustment.read(
        alignment,
        alignment_strength,
        calibration,
        output_scale,
        recurrence=recurrence,
        head_norm=head_norm,
        encoder_hash=checkpoint.hash,
        width=checkpoint.config.output_size,
        force=force,
    )
    model = TextEncoder(checkpoint.config, checkpoint.tensors, recurrence, head_norm, dtype)
    return Encoder(checkpoint, model, recurrence, head_norm, dtype, adjustment, tokenizer)


class Encoder:
    """A loaded encoder. Made by `load`.

    Attributes:
        model: the torch module: token ids `[B, L]` -> states `[B, L, output_size]`, before any adjustment.
        adjustment: what follows the head; may be replaced.
        recurrence: as loaded.
        head_norm: as loaded.
        dtype: as loaded.
        hash: of the file's header and the head's tensors; alignment and calibration files name it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: TextEncoder,
        recurrence: str,
        head_norm: str,
        dtype: torch.dtype,
        adjustment: Adjustment,
        tokenizer: Any = None,
    ) -> None:
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.hash = checkpoint.hash
        self.model = model
        self.recurrence = recurrence
        self.head_norm = head_norm
        self.dtype = dtype
        self.adjustment = adjustment
        self._metadata = checkpoint.metadata
        self._other_parts = checkpoint.other_parts
        self._stored = {str(t.dtype).removeprefix("torch."): 0 for t in checkpoint.tensors.values()}
        for tensor in checkpoint.tensors.values():
            self._stored[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        head = checkpoint.tensors.get("norm.1.weight")
        self._norm = None if head is None else log_norm(head)
        self._tokenizer: Any = None
        self._tokenizer_source = tokenizer
        if tokenizer is not None:  # its complaints now, not at the first prompt
            self._tokenizer = load_tokenizer(tokenizer, self.path, self.config.vocab_size)

    @property
    def tokenizer(self) -> Any:
        """Qwen3.5's tokenizer (transformers'); found or downloaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_source, self.path, self.config.vocab_size)
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def tokenize(self, prompt: str, weights: bool = True) -> list[int]:
        """The ids of one prompt: no token added in front or behind, an empty prompt is one `<|endoftext|>`.

        `weights`: round brackets are ComfyUI's weights (`prompts`), and go; else they are text.
        """
        if not isinstance(prompt, str):
            raise wrong_type("prompts", prompt, "text")
        texts = [text for text, _ in pieces(prompt)] if weights else [prompt]
        ids = [i for text in texts for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return ids or [self.tokenizer.get_vocab()[PAD]]

    def encode(
        self, prompts: str | Sequence[str], weights: bool = True, batch_tokens: int = 2048
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of prompts, ready for Anima's adapter.

        Args:
            prompts: one or many. Encoded in batches of similar length; padding changes no real token.
            weights: round brackets are ComfyUI's weights and are taken out. (They count in the adapter, not here.)
            batch_tokens: tokens a batch, padding counted; bounds the memory.

        Returns:
            states `[B, L, output_size]` fp32 and mask `[B, L]`, True on real tokens; L is the longest prompt's length,
            states are 0 elsewhere. On the encoder's device.
        """
        states, mask = self.raw(prompts, weights, batch_tokens)
        return torch.where(mask[..., None], self.adjustment(states), 0.0), mask

    def raw(
        self, prompts: str | Sequence[str], weights: bool = True, batch_tokens: int = 2048
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` without alignment, calibration and output scale: what leaves the head."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.encode_ids([self.tokenize(prompt, weights) for prompt in prompts], batch_tokens)

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[Sequence[int]], batch_tokens: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
        """What leaves the head for lists of token ids, and the mask, as `encode` returns them."""
        lengths = [len(row) for row in ids]
        for row in ids:
            if not row or not all(0 <= i < self.config.vocab_size for i in row):
                got = f"{min(row)} to {max(row)}" if row else "an empty list"
                raise invalid("ids", got, f"at least one, each from 0 to {self.config.vocab_size - 1}")
        longest = max(lengths, default=0)
        states = torch.zeros(len(ids), longest, self.config.output_size, device=self.device)
        mask = torch.arange(longest)[None] < torch.tensor(lengths, dtype=torch.long)[:, None]
        for batch in batches(lengths, batch_tokens):
            width = max(lengths[i] for i in batch)
            padded = torch.tensor([[*ids[i], *[0] * (width - lengths[i])] for i in batch], device=self.device)
            for i, row in zip(batch, self.model(padded), strict=True):
                states[i, : lengths[i]] = row[: lengths[i]]
        return states, mask.to(self.device)

    def info(self) -> dict[str, Any]:
        """What is loaded, as plain values: path, hash, recurrence, head_norm, dtype, config, parameters, the bytes
        stored in each type, the norm's report (`head.norm_report`; None without a head), metadata, and tensors of the
        file that belong to other parts of a whole Qwen3.5."""
        return {
            "path": str(self.path),
            "hash": self.hash,
            "recurrence": self.recurrence,
            "head_norm": self.head_norm if self._norm else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "config": {**vars(self.config), "layer_types": list(self.config.layer_types)},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tensors": len(self.config.shapes()),
            "stored_bytes": dict(self._stored),
            "norm": self._norm,
            "metadata": dict(self._metadata),
            "other_parts": len(self._other_parts),
        }

    def __repr__(self) -> str:
        size = sum(self._stored.values()) / 1e9
        kinds = ", ".join(sorted(self._stored))
        return (
            f"Encoder({self.path.name}: {self.config.num_hidden_layers} layers of {self.config.hidden_size}, "
            f"{self.recurrence}, {size:.2f} GB of {kinds}, computing in {str(self.dtype).removeprefix('torch.')})"
        )
