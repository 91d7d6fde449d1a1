"""The oracle: regions as a materialised mask over padded contexts, or one padded attention a prompt."""

from __future__ import annotations

import math

import torch

from anima_fast.masks import resample


def bias_or_weights(regions, settings, grid, canvas):
    """`[R + 1, Nq]`, the base prompt last, by the formulas of the documentation and nothing of the plan's code."""
    frames, height, width = grid
    masks = [resample(r.mask, (height, width), canvas=canvas, method=settings.resample) for r in regions]
    w = torch.stack(masks).flatten(1).repeat(1, frames)
    if settings.normalize_overlaps:
        w = w / w.sum(0).clamp(min=1)
    s = settings.strength * torch.tensor([r.strength for r in regions], dtype=torch.float64)[:, None]
    if settings.combine == "blend":
        u = s * (w if settings.mode == "soft_log" else (w > 0.5).double())
        u = torch.cat([u, (1 - u.sum(0, keepdim=True)).clamp(min=settings.base_weight)])
        return u / u.sum(0)
    if settings.mode == "soft_log":
        bias, lowest = s * w.clamp(min=settings.eps).log(), math.log(settings.eps) * settings.strength
    else:
        lowest = -math.inf if settings.hard_value is None else settings.hard_value
        bias = torch.where(w > 0.5, 0.0, lowest * s)
        lowest = lowest * settings.strength
    base = torch.zeros(1, w.shape[1], dtype=torch.float64)
    if not settings.base_always_allowed:
        base = torch.where((w.sum(0) <= settings.eps) & settings.unmasked_to_base, 0.0, lowest)[None]
    return torch.cat([bias, base])


def apply_masked(comfy, model, regions, settings, window=(-math.inf, math.inf)):
    """A clone of a model with the oracle on it: every prompt padded to 512 rows, one mask of all of them."""
    attend = comfy.attention.attention_pytorch
    seen = {"cross": 0}

    def wrapper(executor, x, timesteps, context, *args, **kwargs):
        options = kwargs["transformer_options"]
        sigma = float(options["sigmas"][0])
        active = window[0] <= sigma <= window[1]
        tags = options["cond_or_uncond"]
        size = len(x) // len(tags)
        padded = [
            executor.class_obj.preprocess_text_embeds(
                r.prompt.embeds.to(context), r.prompt.ids[None], t5xxl_weights=r.prompt.weights[None, :, None]
            ).expand(len(x), -1, -1)
            for r in regions
        ]
        given = torch.cat([*padded, context], dim=1)
        grid = (x.shape[2], math.ceil(x.shape[3] / 2), math.ceil(x.shape[4] / 2))
        rows = bias_or_weights(regions, settings, grid, (x.shape[3] / 2, x.shape[4] / 2))
        ends = torch.tensor([p.shape[1] for p in padded] + [context.shape[1]]).cumsum(0).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))

        def override(func, q, k, v, heads, **kw):
            block = kw["transformer_options"]["block_index"]
            if k.shape[2] != given.shape[1] or k.shape[2] == q.shape[2]:
                return func(q, k, v, heads, **kw)
            seen["cross"] += 1
            on = active and (settings.blocks is None or block in settings.blocks)
            outs = []
            for i, tag in enumerate(tags):
                part = slice(i * size, (i + 1) * size)
                qi, ki, vi = q[part], k[part], v[part]
                start = spans[-1][0]
                if tag == 1 or (not on and settings.outside == "base"):
                    outs.append(attend(qi, ki[:, :, start:], vi[:, :, start:], heads, skip_reshape=True))
                elif on and settings.combine == "blend":
                    each = [attend(qi, ki[:, :, a:b], vi[:, :, a:b], heads, skip_reshape=True) for a, b in spans]
                    outs.append(sum(w.to(q)[None, :, None] * o for w, o in zip(rows, each, strict=True)))
                else:
                    columns = [r[:, None].expand(-1, b - a) for r, (a, b) in zip(rows, spans, strict=True)]
                    mask = torch.cat(columns, dim=1).to(q)[None, None]
                    outs.append(attend(qi, ki, vi, heads, mask=mask if on else None, skip_reshape=True))
            return torch.cat(outs)

        kwargs["transformer_options"] = {**options, "optimized_attention_override": override}
        return executor(x, timesteps, given, *args, **kwargs)

    patched = model.clone()
    patched.add_wrapper_with_key("diffusion_model", "oracle", wrapper)
    return patched, seen


def scale_self_attention(patched, factor):
    """Multiplies the self-attention of a model that `apply_masked` patched."""

    def wrapper(executor, x, timesteps, context, *args, **kwargs):
        options = kwargs["transformer_options"]
        inner = options["optimized_attention_override"]

        def override(func, q, k, v, heads, **kw):
            return inner(func, q, k, v, heads, **kw) * (factor if k.shape[2] == q.shape[2] else 1)

        options = {**options, "optimized_attention_override": override}
        return executor(x, timesteps, context, *args, **{**kwargs, "transformer_options": options})

    patched.add_wrapper_with_key("diffusion_model", "scaled", wrapper)
