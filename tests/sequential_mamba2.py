"""The other reading of the checkpoint (`recurrence="mamba2"`), token by token in fp64, from its published description.

Nothing here is shared with the package: tensors in, states before the head out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps=1e-6):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def recurrent(h, w):
    """`h [L, hidden]`; x, B, C of one head each, state [P, N]."""
    heads, width = len(w["A_log"]), len(w["norm.weight"])
    z = h @ w["in_proj_z.weight"].T
    mixed = h @ w["in_proj_qkv.weight"].T
    kernel = w["conv1d.weight"][:, 0]
    reach = kernel.shape[1]
    before = torch.cat([torch.zeros(reach - 1, mixed.shape[1], dtype=h.dtype), mixed])
    mixed = F.silu(torch.stack([(before[t : t + reach].T * kernel).sum(-1) for t in range(len(h))]))
    rest = (mixed.shape[1] - heads * width) // 2
    x, B, C = mixed[:, : heads * width], mixed[:, heads * width : -rest], mixed[:, -rest:]
    x, B, C = (part.reshape(len(h), heads, -1) for part in (x, B, C))
    dt = F.softplus(h @ w["in_proj_b.weight"].T + w["dt_bias"])
    D = h @ w["in_proj_a.weight"].T
    A = -w["A_log"].exp()
    state = torch.zeros(heads, width, B.shape[-1], dtype=h.dtype)
    rows = []
    for t in range(len(h)):
        for n in range(heads):
            state[n] = (dt[t, n] * A[n]).exp() * state[n] + dt[t, n] * torch.outer(x[t, n], B[t, n])
        y = torch.stack([state[n] @ C[t, n] + D[t, n] * x[t, n] for n in range(heads)])
        rows.append(rms_norm(y, w["norm.weight"]).flatten())
    return (torch.stack(rows) * F.silu(z)) @ w["out_proj.weight"].T


def attention(h, w, theta=1e6):
    size = len(w["q_norm.weight"])
    q, gate = (h @ w["q_proj.weight"].T).chunk(2, dim=-1)
    q = rms_norm(q.reshape(len(h), -1, size), w["q_norm.weight"])
    k = rms_norm((h @ w["k_proj.weight"].T).reshape(len(h), -1, size), w["k_norm.weight"])
    v = (h @ w["v_proj.weight"].T).reshape(len(h), -1, size)
    # Rotation of the pairs (i, i + size / 2) by t / theta^(2 i / size), as complex numbers.
    angle = torch.outer(torch.arange(len(h)), theta ** (-torch.arange(0, size, 2) / size)).double()
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(*p.chunk(2, dim=-1)) * turn for p in (q, k))
    q, k = (torch.cat([p.real, p.imag], dim=-1) for p in (q, k))
    rows = torch.zeros_like(q)
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        for t in range(len(h)):
            p = (k[: t + 1, group] @ q[t, head] / size**0.5).softmax(0)
            rows[t, head] = p @ v[: t + 1, group]
    return (rows.flatten(1) * F.silu(gate)) @ w["o_proj.weight"].T


def hidden(tensors, layers, ids):
    """States `[L, hidden]` after the last layer."""
    tensors = {name: t.double() for name, t in tensors.items()}
    h = tensors["embed_tokens.weight"][torch.tensor(ids)]
    for i in range(layers):
        w = {name.removeprefix(f"layers.{i}."): t for name, t in tensors.items() if name.startswith(f"layers.{i}.")}
        kind, mixer = ("self_attn.", attention) if "self_attn.q_proj.weight" in w else ("linear_attn.", recurrent)
        own = {name.removeprefix(kind): t for name, t in w.items() if name.startswith(kind)}
        h = h + mixer(rms_norm(h, w["input_layernorm.weight"]), own)
        if "mlp.up_proj.weight" in w:
            x = rms_norm(h, w["post_attention_layernorm.weight"])
            x = F.silu(x @ w["mlp.gate_proj.weight"].T) * (x @ w["mlp.up_proj.weight"].T)
            h = h + x @ w["mlp.down_proj.weight"].T
    return h


def head(tensors, h):
    """Linear, norm by exp(w), SiLU, Linear."""
    w = {name.removeprefix("norm."): t.double() for name, t in tensors.items() if name.startswith("norm.")}
    h = rms_norm(h @ w["0.weight"].T + w["0.bias"], w["1.weight"].exp())
    return F.silu(h) @ w["3.weight"].T + w["3.bias"]
