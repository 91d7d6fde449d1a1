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

__all__ = ["GatedDeltaNet", "Linear", "TextEncoder", "widen"]

_BLOCK = 1 << 21  # elements


class Linear(nn.Module):
    """`x Wᵀ + b` with W in any stored type, widened to x's; on a CPU a block of rows at a time, which a cache holds."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, None if self.bias is None else self.bias.to(x.dtype)
        if weight.dtype == x.dtype or x.device.type != "cpu":
            return F.linear(x, weight.to(x.dtype), bias)
        outputs, inputs = weight.shape
        rows = max(_BLOCK // max(inputs, 1), 1)
        y, wide = x.new_empty(*x.shape[:-1], outputs), x.new_empty(rows, inputs)
        for start in range(0, outputs, rows):
            narrow = weight[start : start + rows]
            block = widen(narrow, wide[: len(narrow)])
            torch.mm(x.flatten(0, -2), block.T, out=y.flatten(0, -2)[:, start : start + rows])
        return y if bias is None else y.add_(bias)


def widen(narrow: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """`wide.copy_(narrow)`, exact; for FP8 E4M3 by bits, which is ten times as fast as torch's conversion on a CPU.

    Sign, exponent and mantissa of E4M3 (1, 4, 3 bits; bias 7) moved to those of FP16 (1, 5, 10; bias 15) read as the
    number times 2⁻⁸, its subnormal numbers too. (The two codes of NaN read as 480: a checkpoint has none.)
    """
    if narrow.dtype != torch.float8_e4m3fn:
        return wide.copy_(narrow)
    bits = narrow.view(torch.int8).to(torch.int16)  # copies the sign into the upper half
    bits <<= 7
    bits &= -0x4080
    return wide.copy_(bits.view(torch.float16)).mul_(256)


class Embedding(nn.Module):
    """Rows of a stored table, in its type."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


class GatedDeltaNet(qwen.Qwen3_5GatedDeltaNet):
    """Qwen3.5's recurrent layer on `causal_conv1d` and `gated_delta_rule`."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        q, k, v = convolved(self, hidden_states).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        A_log, dt_bias = (p.to(hidden_states.device).float() for p in (self.A_log, self.dt_bias))
        g = -A_log.exp() * F.softplus(self.in_proj_a(hidden_states).float() + dt_bias)
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
    """Token ids `[B, L]` -> states `[B, L, output_size]`: the layers (`model`) and then the head (`norm`).

    Args:
        config: sizes.
        tensors: by their names without prefix, as `read_checkpoint` gives them.
        recurrence: "gdn", the model; "mamba2", the other reading of its tensors (`ssm`).
        head_norm: "exp" or "one_plus" (`head`); says nothing for a checkpoint without a head.
        dtype: what is computed in.
        ops: False leaves transformers' own recurrent functions in place (gdn only), for comparison.
        linear, embedding: classes with the arguments of torch's, for a host that manages weights itself.
    """

    def __init__(
        self,
        config: EncoderConfig,
        tensors: dict[str, torch.Tensor],
        recurrence: str = "gdn",
        head_norm: str = "exp",
        dtype: torch.dtype = torch.float32,
        ops: bool = True,
        linear: Any = Linear,
        embedding: Any = Embedding,
    ) -> None:
        super().__init__()
        if recurrence not in RECURRENCES:
            raise invalid("recurrence", repr(recurrence), "'gdn' | 'mamba2'")
        self.dtype = dtype
        with torch.device("meta"):
            self.model: Any = _text_model(config, recurrence, ops, linear, embedding)
            self.norm: nn.Module = nn.Identity()
            if config.head_size is None:
                self.norm = (qwen.Qwen3_5RMSNorm if recurrence == "gdn" else PlainRMSNorm)(
                    config.hidden_size, config.rms_norm_eps
                )
            else:
                self.norm = Head(config.hidden_size, config.head_size, head_norm, config.rms_norm_eps, linear)
        device = next(iter(tensors.values())).device
        # Its table is computed, not loaded, and so cannot come from the meta device.
        self.model.rotary_emb = qwen.Qwen3_5TextRotaryEmbedding(self.model.config).to(device)
        weights = {
            (name if name.startswith("norm.") else f"model.{name}"): t if t.ndim == 2 else t.float()
            for name, t in tensors.items()
        }
        self.load_state_dict(weights, strict=True, assign=True)
        self.eval().requires_grad_(False)

    def hidden(self, states: torch.Tensor, layers: int | None = None) -> torch.Tensor:
        """Embeddings `[B, L, hidden_size]` -> the states after `layers` layers (all), before the head."""
        # Three times: pictures have three coordinates, text has the same one in their places.
        positions = torch.arange(states.shape[1], device=states.device).expand(3, 1, -1)
        rotary = self.model.rotary_emb(states, positions)
        for layer in self.model.layers[:layers]:
            states = layer(states, position_embeddings=rotary, attention_mask=None)
        return states

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.hidden(self.model.embed_tokens(ids).to(self.dtype)))


def _text_model(config: EncoderConfig, recurrence: str, ops: bool, linear: Any, embedding: Any) -> nn.Module:
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
                setattr(parent, name, linear(child.in_features, child.out_features, bias=False))
            elif isinstance(child, nn.Embedding):
                setattr(parent, name, embedding(child.num_embeddings, child.embedding_dim))
            elif type(child) is qwen.Qwen3_5RMSNorm and recurrence == "mamba2":
                setattr(parent, name, PlainRMSNorm(child.weight.shape[0], child.eps))
    text.norm = nn.Identity()  # the encoder's own norm or head comes after
    return text
