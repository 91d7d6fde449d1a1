"""The checkpoint read as Mamba2, as the first ComfyUI node for it did: `recurrence="mamba2"`.

The weights are those of a gated delta net; the shapes also fit another reading, which published alignment and
calibration files were measured with. That reading differs from the model in every line of this table:

                        gdn (the model)                             mamba2 (the reading)
in_proj_qkv             q | k | v                                   x (values) | B | C
heads                   key heads, each for several value heads     as many groups as heads, state width keys / heads
in_proj_b               beta = sigmoid(b)                           dt = softplus(b + dt_bias)
in_proj_a               g = −exp(A_log) softplus(a + dt_bias)       D, one a token and head
q, k                    of length 1, q · width^−½                   as they are
recurrence              gated delta rule                            S = exp(−dt exp(A_log)) S + dt x Bᵀ, y = S C + D x
norms                   (1 + w) · x / RMS(x)                        w · x / RMS(x)
q_proj                  q and gate in turn, head by head            all q, then all gates
attention's gate        sigmoid                                     SiLU
rotary embedding        first quarter of a head, theta 1e7          the whole head, theta 1e6

Convolution, the recurrent layers' own norm and gate, MLP and head are the same in both.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from ..conv import causal_conv1d
from ..ssd import ssd_chunk_scan

__all__ = ["ROPE", "GatedAttention", "PlainRMSNorm", "SelectiveStateSpace", "convolved"]

ROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}


def convolved(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A recurrent layer's `in_proj_qkv` and convolution, with its SiLU: `[B, L, hidden]` -> `[B, L, channels]`."""
    channels_first = layer.in_proj_qkv(hidden_states).transpose(1, 2)
    out = causal_conv1d(channels_first, layer.conv1d.weight.squeeze(1), activation="silu")
    return cast(torch.Tensor, out).transpose(1, 2)


class SelectiveStateSpace(qwen.Qwen3_5GatedDeltaNet):
    """A recurrent layer's tensors as a Mamba2 block, on `ssd_chunk_scan` with D per token."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        heads = (self.num_v_heads, -1)
        x, B, C = (
            part.unflatten(-1, heads)
            for part in convolved(self, hidden_states).split([self.value_dim, self.key_dim, self.key_dim], -1)
        )
        A_log, dt_bias = (p.to(hidden_states.device).float() for p in (self.A_log, self.dt_bias))
        y = ssd_chunk_scan(
            x,
            self.in_proj_b(hidden_states),
            -A_log.exp(),
            B,
            C,
            D=self.in_proj_a(hidden_states),
            dt_bias=dt_bias,
            dt_softplus=True,
        )
        return self.out_proj(self.norm(y, self.in_proj_z(hidden_states).unflatten(-1, heads)).flatten(2))


class GatedAttention(qwen.Qwen3_5Attention):
    """Attention with q and gate as the two halves of q_proj, and a SiLU gate."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        heads = (-1, self.head_dim)
        q, gate = self.q_proj(hidden_states).chunk(2, dim=-1)
        q = self.q_norm(q.unflatten(-1, heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)
        v = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        q, k = qwen.apply_rotary_pos_emb(q, k, *position_embeddings)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None, scale=self.scaling, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2) * F.silu(gate)), None


class PlainRMSNorm(qwen.Qwen3_5RMSNorm):
    """`w · x / RMS(x)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self._norm(x.float()) * self.weight.float()).type_as(x)
