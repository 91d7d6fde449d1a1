"""The hybrid text encoder in diffusers' Anima pipeline, in the places of its own tokenizer and text encoder.

diffusers knows no prompt weights, so round brackets are text here, for T5 and for the encoder alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..encoder.files import HEAD_NORMS, RECURRENCES
from ..errors import invalid

if TYPE_CHECKING:
    from ..encoder.encoder import Encoder

__all__ = ["EncoderChoice", "check_width", "replacements"]


@dataclasses.dataclass(frozen=True)
class EncoderChoice:
    """Which encoder a request asks for, and what follows its head. Files by name; `sums` tells if they are the same."""

    file: str
    recurrence: str = "gdn"
    head_norm: str = "exp"
    tokenizer: str | None = None
    alignment: str | None = None
    alignment_strength: float = 0.5
    calibration: str | None = None
    output_scale: float = 1.0
    force: bool = False
    sums: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("recurrence", RECURRENCES), ("head_norm", HEAD_NORMS)):
            if getattr(self, name) not in allowed:
                raise invalid(f"--{name.replace('_', '-')}", repr(getattr(self, name)), " | ".join(allowed))

    def load(self, *, device: torch.device | str, dtype: torch.dtype) -> tuple[Encoder, EncoderChoice]:
        """The encoder, and this choice with the sums of the files that were read. Warns when those of a record are
        others. Raises what `encoder.load` raises."""
        from ..encoder.encoder import load

        encoder = load(
            self.file,
            self.recurrence,
            self.head_norm,
            device,
            dtype,
            tokenizer=self.tokenizer,
            alignment=self.alignment,
            alignment_strength=self.alignment_strength,
            calibration=self.calibration,
            output_scale=self.output_scale,
            force=self.force,
        )
        sums = {self.file: encoder.hash[:16]}
        for file in (self.alignment, self.calibration):
            if file is not None:
                sums[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
        for file, value in sums.items():
            if self.sums.get(file, value) != value:
                warnings.warn(f"--like: {file!r} is not the file that the picture was made with", stacklevel=2)
        return encoder, dataclasses.replace(self, sums=sums)


def replacements(encoder: Encoder, dtype: torch.dtype) -> dict[str, Any]:
    """The pipeline's components `tokenizer` and `text_encoder`; the states are handed on in `dtype`.

    Example:
        >>> pipe.update_components(**replacements(encoder.load("qwen35_4b.safetensors"), torch.bfloat16))
    """
    return {"tokenizer": _Tokenizer(encoder), "text_encoder": _TextEncoder(encoder, dtype)}


def check_width(pipe: Any, encoder: Encoder) -> None:
    """Raises ValueError when the pipeline's text conditioner takes states of another width."""
    width = pipe.text_conditioner.config.source_dim
    if encoder.config.output_size != width:
        raise invalid("--encoder", f"an encoder of {encoder.config.output_size} dimensions", f"{width}, the model's")


@dataclasses.dataclass
class _Batch:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


@dataclasses.dataclass
class _Output:
    last_hidden_state: torch.Tensor


class _Tokenizer:
    """Called as diffusers calls transformers' tokenizers; an empty prompt is one token, as in ComfyUI."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, prompts: str | Sequence[str], *, max_length: int | None = None, **_: Any) -> _Batch:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.encoder.tokenize(prompt, weights=False)[:max_length] for prompt in prompts]
        longest = max(map(len, rows))
        return _Batch(
            torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            torch.tensor([[int(i < len(row)) for i in range(longest)] for row in rows]),
        )


class _TextEncoder(torch.nn.Module):
    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = encoder.model  # moves with the pipeline
        self.encoder = encoder
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> _Output:
        rows = [ids[real.bool()].tolist() for ids, real in zip(input_ids, attention_mask, strict=True)]
        states, mask = self.encoder.encode_ids(rows)
        return _Output(torch.where(mask[..., None], self.encoder.adjustment(states), 0.0).to(self.dtype))
