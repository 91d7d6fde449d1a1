"""The text model: transformers' Qwen3.5 classes with our recurrent ops inside, and weights that stay as stored.

A matrix stays in the type of its file (FP8, BF16, ...) and is widened to the type of the activations when its layer
runs, a block of rows at a time: 4 billion parameters take 4.5 GB in FP8, whatever type they are computed in.

No attention mask anywhere: every layer is causal, so padding on the right changes no real token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import invalid
from ..gated_delta import gated_delta_rule
from .checkpoint import EncoderConfig
from .files import RECURRENCES
from .head import Head

try:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
except ImportError as error:
    import transformers

    raise ImportError(
        f"the text encoder needs transformers with Qwen3.5, which {transformers.__version__} is without; "
        "pip install -U transformers"
    ) from error

from .ssm import ROPE, GatedAttention, PlainRMSNorm, SelectiveStateSpace, convolved

__all__ = ["GatedDeltaNet", "Linear", "TextEncoder"]


class Linear(nn.Module):
    """`x Wᵀ + b` with W in any stored type, widened to x's."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """Rows of a stored table, in the type that is computed in."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(rows, size), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].to(self.dtype)


class GatedDeltaNet(qwen.Qwen3_5GatedDeltaNet):
    """Qwen3.5's recurrent layer on `causal_conv1d` and `gated_delta_rule`."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        q, k, v = convolved(self, hidden_states).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        g = -self.A_log.float().exp() * F.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias.float())
        o, _ = gated_delta_rule(
            q.unflatten(-1, (-1, self.head_k_dim)),
            k.unflatten(-1, (-1, self.head_k_dim)),
            v.unflatten(-1, (-1, self.head_v_dim)),
            g,
            self.in_proj_b(hidden_states).sigmoid(),
            use_qk_l2norm_in_kernel=True,
        )
        z = self.in_proj_z(hidden_states).unflatten(-1, (-1, self.head_v_dim))
        return self.out_proj(self.norm(o, z).flatten(2))


class _NoMLP(nn.Module):
    """For a layer without an MLP: nothing is added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class TextEncoder(nn.Module):
    """Token ids `[B, L]` -> states `[B, L, output_size]`, of the model and its head.

    Args:
        config: sizes.
        tensors: by their names without prefix, as `read_checkpoint` gives them.
        recurrence: "gdn", the model; "mamba2", the other reading of its tensors (`ssm`).
        head_norm: "exp" or "one_plus" (`head`); says nothing for a checkpoint without a head.
        dtype: what is computed in.
        ops: False leaves transformers' own recurrent functions in place (gdn only), for comparison.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tensors: dict[str, torch.Tensor],
        recurrence: str = "gdn",
        head_norm: str = "exp",
        dtype: torch.dtype = torch.float32,
        ops: bool = True,
    ) -> None:
        super().__init__()
        if recurrence not in RECURRENCES:
            raise invalid("recurrence", repr(recurrence), "'gdn' | 'mamba2'")
        with torch.device("meta"):
            self.text = _text_model(config, recurrence, dtype, ops)
            self.norm: nn.Module = nn.Identity()
            if config.head_size is None:
                self.norm = (qwen.Qwen3_5RMSNorm if recurrence == "gdn" else PlainRMSNorm)(
                    config.hidden_size, config.rms_norm_eps
                )
            else:
                self.norm = Head(config.hidden_size, config.head_size, head_norm, config.rms_norm_eps, Linear)
        device = next(iter(tensors.values())).device
        # Its table is computed, not loaded, and so cannot come from the meta device.
        self.text.rotary_emb = qwen.Qwen3_5TextRotaryEmbedding(self.text.config).to(device)
        weights = {
            (name if name.startswith("norm.") else f"text.{name}"): t if t.ndim == 2 else t.float()
            for name, t in tensors.items()
        }
        self.load_state_dict(weights, strict=True, assign=True)
        self.eval().requires_grad_(False)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The states before the head, `[B, L, hidden_size]`."""
        return self.text(input_ids=ids, use_cache=False).last_hidden_state

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.hidden(ids))


def _text_model(config: EncoderConfig, recurrence: str, dtype: torch.dtype, ops: bool) -> nn.Module:
    """transformers' model with the modules that differ in their places."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
    }
    sizes = qwen.Qwen3_5TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        layer_types=list(config.layer_types),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        linear_num_key_heads=config.linear_num_key_heads,
        linear_num_value_heads=config.linear_num_value_heads,
        linear_key_head_dim=config.linear_key_head_dim,
        linear_value_head_dim=config.linear_value_head_dim,
        linear_conv_kernel_dim=config.linear_conv_kernel_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope if recurrence == "gdn" else dict(ROPE),
        attn_implementation="sdpa",
        use_cache=False,
    )
    text = qwen.Qwen3_5TextModel(sizes)
    recurrent = SelectiveStateSpace if recurrence == "mamba2" else GatedDeltaNet if ops else qwen.Qwen3_5GatedDeltaNet
    for i, layer in enumerate(text.layers):
        if config.layer_types[i] == "linear_attention":
            layer.linear_attn = recurrent(sizes, i)
        elif recurrence == "mamba2":
            layer.self_attn = GatedAttention(sizes, i)
    if not config.last_mlp:
        text.layers[-1].mlp = _NoMLP()
        text.layers[-1].post_attention_layernorm = nn.Identity()
    for parent in list(text.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Linear(child.in_features, child.out_features))
            elif isinstance(child, nn.Embedding):
                setattr(parent, name, Embedding(child.num_embeddings, child.embedding_dim, dtype))
            elif type(child) is qwen.Qwen3_5RMSNorm and recurrence == "mamba2":
                setattr(parent, name, PlainRMSNorm(child.weight.shape[0], child.eps))
    text.norm = nn.Identity()  # the encoder's own norm or head comes after
    return text
