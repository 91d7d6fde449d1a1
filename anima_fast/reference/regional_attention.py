"""Regional attention in the plainest form: every score materialised, in the inputs' own precision.

    logit   out_i = Σ_s Σ_j exp(scale q_i·k_j + b_s(i) + mask - m) v_j / Z_i,
            Z_i = Σ_s [Σ_j exp(scale q_i·k_j + b_s(i) + mask - m) + pads_s exp(b_s(i) - m)],  lse_i = m + log Z_i
    blend   out_i = Σ_s w_s(i) · (the same with segment s alone and b = 0)

q [B, H, Nq, D], k v [B, Hk, Nk, D]. A row that nothing reaches gives 0 and lse = -inf. The oracle of every
other backend: it is called with fp64 copies, and with the inputs' own type as the same-precision reference.
"""

from __future__ import annotations

import torch

from ..bound_plan import PlanTensors


def regional_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    plan: PlanTensors,
    *,
    scale: float,
    combine: str,
    mask: torch.Tensor | None,
) -> None:
    """Write attention of every row under its plan to `out`, and the log of its denominator to `lse`."""
    group = q.shape[1] // k.shape[1]
    segments = plan.segments_host
    size = plan.segments.shape[1]
    for row, index in enumerate(plan.plan_index_host):
        keys, values = (x[row].repeat_interleave(group, dim=0) for x in (k, v))
        scores = scale * (q[row] @ keys.transpose(-1, -2))  # [H, Nq, Nk]
        if mask is not None:
            extra = mask[row]
            scores = scores.masked_fill(~extra, -torch.inf) if extra.dtype == torch.bool else scores + extra.to(q.dtype)
        bias = plan.bias[index].to(q.dtype)
        parts = []  # one a segment: logits [H, Nq, n + 1], the last column the pads, and values [H, n + 1, D]
        for s in range(size):
            start, end, pads = segments[3 * (index * size + s) :][:3]
            sink = scores.new_full((*scores.shape[:2], 1), float(pads)).log()
            logits = torch.cat([scores[..., start:end], sink], dim=-1)
            if combine == "logit" and bias.shape[1]:
                logits = logits + bias[s][:, None]
            parts.append((logits, torch.nn.functional.pad(values[:, start:end], (0, 0, 0, 1))))
        if combine == "logit":
            logits, padded = (torch.cat(x, dim=d) for x, d in zip(zip(*parts, strict=True), (-1, -2), strict=True))
            out[row] = _softmax(logits) @ padded
            if lse is not None:
                lse[row] = torch.logsumexp(logits, dim=-1)
        else:
            out[row] = sum(
                w[:, None] * (_softmax(logits) @ padded) for w, (logits, padded) in zip(bias, parts, strict=True)
            )


def workspace_bytes(q: torch.Tensor, plan: PlanTensors, *, combine: str) -> int:
    """Bytes of temporaries of a call: scores, logits, their concatenation and two of softmax, all [H, Nq, n]."""
    size = plan.segments.shape[1]
    keys = max(end for end in plan.segments_host[1::3]) + size
    return 5 * q.shape[1] * q.shape[2] * keys * q.element_size()


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax whose empty rows (-inf throughout) are 0 instead of NaN."""
    empty = (logits == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
