"""The text encoder as a ComfyUI CLIP. Importing this imports ComfyUI.

The CLIP is ComfyUI's own class around `TextEncoder`, whose matrices are ComfyUI's castable operations: so loading,
offloading, LoRA patches and FP8 weights are ComfyUI's business, and what comes out carries T5 ids and weights for
Anima's adapter as the stock encoder's does. Parameters are named `qwen35_4b.transformer.model.layers.{i}...`, which
ComfyUI's LoRA loaders find under `text_encoders.*` and kohya's `lora_te_layers_{i}_...`.
"""

from __future__ import annotations

from typing import Any

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import torch
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.anima import T5XXLTokenizer

from ...encoder.adjust import Adjustment
from ...encoder.checkpoint import Checkpoint, read_checkpoint
from ...encoder.head import log_norm
from ...encoder.model import TextEncoder
from ...encoder.tokenizer import PAD, load_tokenizer

__all__ = ["load_clip"]

NAME = "qwen35_4b"


class _Transformer(TextEncoder):
    """`TextEncoder` as `SDClipModel` calls it: embeddings in, (states, states of an earlier layer or None) out."""

    def __init__(self, checkpoint: Checkpoint, recurrence: str, head_norm: str, adjustment: Adjustment, ops: Any):
        super().__init__(
            checkpoint.config,
            checkpoint.tensors,
            recurrence,
            head_norm,
            linear=ops.Linear,
            embedding=ops.Embedding,
        )
        self.num_layers = checkpoint.config.num_hidden_layers
        self.adjustment = adjustment

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        embeds: torch.Tensor | None = None,
        intermediate_output: int | None = None,
        dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # No mask: there is one prompt in a batch, or prompts padded on the right, and every layer is causal.
        if embeds is None:
            embeds = self.model.embed_tokens(input_ids, out_dtype=dtype)
        last = self.num_layers if intermediate_output is None else intermediate_output % self.num_layers + 1
        # An earlier layer's states go through the head too: the adapter takes no others.
        states = self.adjustment(self.norm(self.hidden(embeds, last)).float())
        return states, None if intermediate_output is None else states


def _clip_class(checkpoint: Checkpoint, recurrence: str, head_norm: str, adjustment: Adjustment, pad: int) -> type:
    """ComfyUI makes the model itself, from a class: this one has the file's tensors from the start, so that their
    types are the ones that ComfyUI's memory management notes."""

    def transformer(config: Any, dtype: Any, device: Any, operations: Any) -> _Transformer:
        return _Transformer(checkpoint, recurrence, head_norm, adjustment, operations)

    class Qwen35Model(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None, **_: Any) -> None:
            super().__init__(
                device=device,
                textmodel_json_config={},
                dtype=dtype,
                special_tokens={"pad": pad},
                layer_norm_hidden_state=False,
                model_class=transformer,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    class Qwen35TextEncoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            options = model_options or {}
            super().__init__(device=device, dtype=dtype, name=NAME, clip_model=Qwen35Model, model_options=options)
            self.dtypes = {p.dtype for p in self.parameters()}

        def encode_token_weights(self, token_weight_pairs: Any) -> Any:
            states, pooled, extra = super().encode_token_weights(token_weight_pairs)
            ids, weights = zip(*(pair[:2] for pair in token_weight_pairs["t5xxl"][0]), strict=True)
            extra["t5xxl_ids"] = torch.tensor(ids, dtype=torch.int)
            extra["t5xxl_weights"] = torch.tensor(weights)
            return states, pooled, extra

        def memory_estimation_function(self, tokens: Any, device: Any = None) -> int:
            """Bytes beside the weights: one widened matrix, and a layer's activations (all fp32)."""
            sizes = checkpoint.config
            length = sum(len(section) for section in tokens.get(NAME, []))
            widest = 2 * sizes.linear_num_key_heads * sizes.linear_key_head_dim
            widest += sizes.linear_num_value_heads * sizes.linear_value_head_dim
            matrix = max(sizes.intermediate_size, widest) * sizes.hidden_size
            return 4 * (matrix + length * 4 * (sizes.intermediate_size + widest))

    return Qwen35TextEncoder


def _tokenizer_class(tokenizer: Any, pad: int, width: int) -> type:
    class Loaded:
        """ComfyUI takes a class that loads from a path; this one has it loaded."""

        @staticmethod
        def from_pretrained(path: Any, **_: Any) -> Any:
            return tokenizer

    class AnimaQwen35Tokenizer:
        """Qwen3.5's ids, all of weight 1, and T5's with the prompt's weights."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            data = tokenizer_data or {}
            self.qwen35_4b = comfy.sd1_clip.SDTokenizer(
                "",
                tokenizer_class=Loaded,
                pad_with_end=False,
                embedding_directory=embedding_directory,
                embedding_size=width,
                embedding_key=NAME,
                has_start_token=False,
                has_end_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=1,
                pad_token=pad,
                tokenizer_data=data,
            )
            self.t5xxl = T5XXLTokenizer(embedding_directory=embedding_directory, tokenizer_data=data)

        def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, Any]:
            ids = self.qwen35_4b.tokenize_with_weights(text, return_word_ids, **options)
            return {
                NAME: [[(token[0], 1.0, *token[2:]) for token in section] for section in ids],
                "t5xxl": self.t5xxl.tokenize_with_weights(text, return_word_ids, **options),
            }

        def untokenize(self, token_weight_pair: Any) -> Any:
            return self.t5xxl.untokenize(token_weight_pair)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def decode(self, token_ids: Any, **options: Any) -> Any:
            return self.qwen35_4b.tokenizer.decode(token_ids, **options)

    return AnimaQwen35Tokenizer


def load_clip(
    path: str,
    recurrence: str = "gdn",
    head_norm: str = "exp",
    *,
    alignment: str | None = None,
    alignment_strength: float = 0.5,
    calibration: str | None = None,
    output_scale: float = 1.0,
    tokenizer: str | None = None,
    embedding_directory: Any = None,
    model_options: dict[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """A `comfy.sd.CLIP` of the encoder in `path`; the other arguments are those of `anima_fast.encoder.load`."""
    checkpoint = read_checkpoint(path)
    config = checkpoint.config
    adjustment = Adjustment.read(
        alignment,
        alignment_strength,
        calibration,
        output_scale,
        recurrence=recurrence,
        head_norm=head_norm,
        encoder_hash=checkpoint.hash,
        width=config.output_size,
    )
    if config.head_size is not None:
        log_norm(checkpoint.tensors["norm.1.weight"])
    loaded = load_tokenizer(tokenizer, path, config.vocab_size)
    pad = loaded.get_vocab()[PAD]
    clip = comfy.sd.CLIP(
        ClipTarget(
            _tokenizer_class(loaded, pad, config.hidden_size),
            _clip_class(checkpoint, recurrence, head_norm, adjustment, pad),
        ),
        embedding_directory=embedding_directory,
        parameters=sum(t.numel() for t in checkpoint.tensors.values()),
        model_options=model_options or {},
        disable_dynamic=disable_dynamic,
    )
    again = (path, recurrence, head_norm, alignment, alignment_strength, calibration, output_scale, tokenizer)
    # By which ComfyUI makes the model once more, without its dynamic memory or for another device.
    clip.patcher.cached_patcher_init = (_load_patcher, (*again, embedding_directory, model_options))
    return clip


def _load_patcher(
    path: str,
    recurrence: str,
    head_norm: str,
    alignment: str | None,
    alignment_strength: float,
    calibration: str | None,
    output_scale: float,
    tokenizer: str | None,
    embedding_directory: Any,
    model_options: dict[str, Any] | None,
    disable_dynamic: bool = False,
) -> Any:
    clip = load_clip(
        path,
        recurrence,
        head_norm,
        alignment=alignment,
        alignment_strength=alignment_strength,
        calibration=calibration,
        output_scale=output_scale,
        tokenizer=tokenizer,
        embedding_directory=embedding_directory,
        model_options=model_options,
        disable_dynamic=disable_dynamic,
    )
    return clip.patcher
