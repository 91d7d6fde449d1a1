"""The ComfyUI integration without ComfyUI: a stand-in calls the hook as it does. tests/comfyui/ runs the real one."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest
import torch

from anima_fast import RegionPlan
from anima_fast.integrations import comfyui as fast
from anima_fast.integrations.comfyui.hook import ModelHook
from anima_fast.integrations.comfyui.patching import parse_blocks, require_comfyui
from anima_fast.integrations.comfyui.preview import preview
from anima_fast.integrations.comfyui.regions import Prompt, picture_of

HEADS, HEAD_DIM, TEXT, PADDED = 2, 8, 16, 32


def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    assert skip_reshape
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class StandIn:
    """A diffusion model of three blocks that calls patches and overrides in ComfyUI's order."""

    patch_spatial = 2
    blocks = (0, 1, 2)

    def preprocess_text_embeds(self, embeds, ids, t5xxl_weights=None):
        rows = torch.sin(ids[..., None] * torch.arange(1, TEXT + 1)).to(embeds) + embeds.mean(dim=1, keepdim=True)
        rows = rows if t5xxl_weights is None else rows * t5xxl_weights
        return torch.nn.functional.pad(rows, (0, 0, 0, max(0, PADDED - rows.shape[1])))

    def __call__(self, x, timesteps, context, *, transformer_options):
        batch, tokens = x.shape[0], math.prod(picture_of(x.shape)[0])
        queries = x[:, :1].flatten(1).repeat(1, HEADS * HEAD_DIM)[:, : HEADS * tokens * HEAD_DIM]
        q = torch.sin(queries * 7).reshape(batch, HEADS, tokens, HEAD_DIM)
        self.outputs = []
        for block in self.blocks:
            transformer_options["block_index"] = block
            for kind, text in (("attn1_patch", None), ("attn2_patch", context)):
                k = q if text is None else text.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
                for patch in transformer_options.get("patches", {}).get(kind, ()):
                    patch(q, text, text, pe=None, attn_mask=None, extra_options=dict(transformer_options))
                override = transformer_options.get("optimized_attention_override")
                arguments = (q, k, k, HEADS)
                options = {"skip_reshape": True, "transformer_options": transformer_options}
                out = override(attention, *arguments, **options) if override else attention(*arguments, **options)
                if text is not None:
                    self.outputs.append(out)
        return torch.stack(self.outputs)


class Executor:
    def __init__(self, model):
        self.class_obj = model

    def __call__(self, x, timesteps, context, *args, transformer_options):
        return self.class_obj(x, timesteps, context, transformer_options=transformer_options)


def conditioning(tokens, seed, channels=TEXT):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (tokens,), generator=generator, dtype=torch.int)
    return [[torch.randn(1, tokens + 1, channels, generator=generator), {"t5xxl_ids": ids, "t5xxl_weights": None}]]


def padded(model, prompt):
    p = Prompt.from_conditioning(prompt, "prompt")
    return model.preprocess_text_embeds(p.embeds, p.ids[None])


def evaluate(hook, *, tags=(1, 0), sigma=0.5, size=(8, 12), override=None, names="ab", model=None, prompts=None):
    """One evaluation of the stand-in under a hook; cross-attention outputs `[blocks, B, N, C]`."""
    model = model or StandIn()
    texts = prompts or {0: conditioning(5, 1), 1: conditioning(3, 2)}
    context = torch.cat([padded(model, texts[tag]) for tag in tags])
    x = torch.randn(len(tags), 16, 1, *size, generator=torch.Generator().manual_seed(3))
    options = {"cond_or_uncond": list(tags), "sigmas": torch.tensor([sigma]), "uuids": list(names[: len(tags)])}
    if override is not None:
        options["optimized_attention_override"] = override
    with torch.no_grad():
        if hook is None:
            return model(x, None, context, transformer_options=options)
        return hook.wrapper(Executor(model), x, None, context, None, None, transformer_options=options)


def two_regions(size=(64, 96), **settings):
    left = torch.zeros(1, *size)
    left[:, :, : size[1] // 2] = 1
    regions = [
        fast.Region.make(conditioning(4, 5), left, name="left"),
        fast.Region.make(conditioning(7, 6), 1 - left, strength=2.0, name="right"),
    ]
    return ModelHook(regions, fast.Settings(**settings), title="Anima Regions")


def by_mask(strength=0.35):
    """The conditional row with every prompt padded and a materialised bias."""
    model, hook = StandIn(), two_regions()
    prompts = [padded(model, [[r.prompt.embeds, {"t5xxl_ids": r.prompt.ids}]]) for r in hook.regions]
    context = torch.cat([*prompts, padded(model, conditioning(5, 1))], dim=1)
    weight = torch.zeros(4, 6)
    weight[:, :3] = 1
    weight = weight.flatten()
    bias = torch.zeros(24, 3 * PADDED)
    bias[:, :PADDED] = strength * weight.clamp(min=1e-4).log()[:, None]
    bias[:, PADDED : 2 * PADDED] = 2 * strength * (1 - weight).clamp(min=1e-4).log()[:, None]
    x = torch.randn(2, 16, 1, 8, 12, generator=torch.Generator().manual_seed(3))[1:]

    def override(func, q, k, v, heads, **kwargs):
        mask = bias if k.shape[2] == 3 * PADDED else None
        return func(q, k, v, heads, mask=mask, **kwargs)

    return model(x, None, context, transformer_options={"optimized_attention_override": override})


def test_importing_it_imports_no_comfyui():
    script = "import sys, anima_fast.integrations.comfyui; print([m for m in sys.modules if m.startswith('comfy')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_regions_equal_a_materialised_mask():
    out = evaluate(two_regions())
    stock = evaluate(None)
    torch.testing.assert_close(out[:, 0], stock[:, 0])  # the unconditional row, which comes first
    torch.testing.assert_close(out[:, 1:], by_mask())
    assert (out[:, 1] - stock[:, 1]).abs().max() > 0.01


def test_accelerate_equals_stock():
    torch.testing.assert_close(evaluate(ModelHook()), evaluate(None))


def test_rows_follow_cond_or_uncond():
    both = evaluate(two_regions())
    turned = evaluate(two_regions(), tags=(0, 1), names="ba")
    assert turned.shape == both.shape
    alone = evaluate(two_regions(), tags=(1,))
    torch.testing.assert_close(alone[:, 0], evaluate(None, tags=(1,))[:, 0])


def test_self_attention_of_the_same_shape_goes_to_the_override_before_ours():
    calls = []

    def other(func, q, k, v, heads, **kwargs):
        calls.append((q.shape[2], k.shape[2]))
        return func(q, k, v, heads, **kwargs)

    # 4 + 7 + 5 rows of text and a grid of 4 x 4: cross- and self-attention have one shape.
    torch.testing.assert_close(
        evaluate(two_regions(size=(64, 64)), size=(8, 8), override=other),
        evaluate(two_regions(size=(64, 64)), size=(8, 8)),
    )
    assert calls == [(16, 16)] * 3


@pytest.mark.parametrize("outside", ["all", "base"])
def test_window_and_blocks(outside):
    settings = fast.Settings(start_percent=0.2, end_percent=0.8, outside=outside, blocks=frozenset({1}))
    hook = two_regions(outside=outside, blocks=frozenset({1}))
    hook._window = settings.window(lambda percent: 1 - percent)
    served = evaluate(hook, sigma=0.5)
    elsewhere = evaluate(hook, sigma=0.9)
    torch.testing.assert_close(served[1, 1:], by_mask()[1])
    expected = by_mask(0.0) if outside == "all" else evaluate(None)[:, 1:]
    torch.testing.assert_close(elsewhere[:, 1:], expected)
    torch.testing.assert_close(served[0, 1:], expected[0])


def test_a_declined_call_gets_stock_attention(caplog):
    hook = two_regions()
    model = StandIn()

    def with_a_mask(executor, x, timesteps, context, *args, transformer_options):
        inner = transformer_options["optimized_attention_override"]

        def masked(func, q, k, v, heads, **kwargs):
            return inner(func, q, k, v, heads, mask=torch.zeros(q.shape[2], 1), **kwargs)

        options = {**transformer_options, "optimized_attention_override": masked}
        return executor(x, timesteps, context, transformer_options=options)

    class Inner(Executor):
        def __call__(self, *args, **kwargs):
            return with_a_mask(super().__call__, *args, **kwargs)

    texts = {0: conditioning(5, 1), 1: conditioning(3, 2)}
    context = torch.cat([padded(model, texts[tag]) for tag in (1, 0)])
    x = torch.randn(2, 16, 1, 8, 12, generator=torch.Generator().manual_seed(3))
    options = {"cond_or_uncond": [1, 0], "sigmas": torch.tensor([0.5]), "uuids": ["a", "b"]}
    out = hook.wrapper(Inner(model), x, None, context, transformer_options=options)
    torch.testing.assert_close(out, evaluate(None))
    hook.cleanup()
    messages = [r.message for r in caplog.records]
    assert sum("attention mask" in m for m in messages) >= 1 and "none of 3 cross-attention calls" in messages[-1]


def test_a_run_is_reported_and_forgotten(caplog):
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    hook = two_regions()
    evaluate(hook)
    evaluate(hook)
    hook.cleanup()
    assert caplog.records[-1].message == "Anima Regions: served 6 of 6 cross-attention calls."
    hook.cleanup()
    assert len(caplog.records) == 1, "nothing to say of a run that did not happen"


def test_another_shape_is_declined_with_one_warning(caplog):
    hook = two_regions(size=(64, 64))
    torch.testing.assert_close(evaluate(hook), evaluate(None))
    evaluate(hook)
    hook.cleanup()
    assert sum("the picture is 96 x 64 pixels" in r.message for r in caplog.records) == 2  # and the summary
    assert "none of 6 cross-attention calls was served" in caplog.records[-1].message


@pytest.mark.parametrize(
    ("latent", "ratio", "fits"),
    [
        ((152, 104), 832 / 1216, True),
        ((153, 104), 832 / 1216, True),
        ((64, 64), 832 / 1216, False),
        ((33, 63), 2, True),
    ],
)
def test_what_counts_as_another_shape(latent, ratio, fits):
    settings = fast.Settings(canvas=(1000 * ratio, 1000))
    assert (settings.other_shape([], *latent) is None) == fits
    assert fast.Settings(canvas=(1000 * ratio, 1000), stretch=True).other_shape([], *latent) is None


def test_prompts_are_counted_once_a_run():
    hook, model = two_regions(), StandIn()
    encode, calls = model.preprocess_text_embeds, []
    prompts = {0: conditioning(5, 1), 1: conditioning(3, 2)}
    evaluate(hook, model=model, prompts=prompts)
    model.preprocess_text_embeds = lambda *a, **k: calls.append(a) or encode(*a, **k)
    evaluate(hook, model=model, prompts=prompts)
    assert len(calls) == 2, "the two prompts of the call, none of the regions"
    assert set(hook._rows.values()) == {5, 3}


# --- For other packs.


def test_accelerate_bias_override():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, 24, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, 2, HEADS, PADDED, HEAD_DIM, generator=generator)
    k[:, :, 11:], v[:, :, 11:] = 0, 0
    template = torch.zeros(1, 1, 24, 11)
    template[..., :4] = torch.randn(24, generator=generator).clamp(max=0)[:, None]
    template[..., 4:9] = torch.randn(24, generator=generator).clamp(max=0)[:, None]
    mask = torch.nn.functional.pad(template, (0, PADDED - 11), value=float(template.min())).repeat(2, 1, 1, 1)
    mask[0] = 0  # unconditional
    options = {"cond_or_uncond": [1, 0]}
    arguments = dict(skip_reshape=True, transformer_options=options, _inside_attn_wrapper=True)
    expected = attention(q, k, v, HEADS, mask=mask, skip_reshape=True)
    for _ in range(2):
        out = fast.accelerate_bias_override(attention, q, k, v, HEADS, template=template, **arguments)
        torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="template: got 24 x 11 .queries x text rows.; allowed: 20 queries"):
        fast.accelerate_bias_override(attention, q[:, :, :20], k, v, HEADS, template=template, **arguments)


def test_accelerate_bias_override_forgets_templates():
    from anima_fast.integrations.comfyui.override import _plans

    q = torch.randn(1, HEADS, 6, HEAD_DIM)
    template = torch.zeros(1, 1, 6, 5)
    k = torch.randn(1, HEADS, 5, HEAD_DIM)
    fast.accelerate_bias_override(attention, q, k, k, HEADS, template=template, skip_reshape=True)
    number = id(template)
    assert number in _plans._made
    del template
    assert number not in _plans._made


@pytest.mark.parametrize("packed", [False, True])
def test_couple_attention(packed):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, 24, HEAD_DIM, generator=generator)
    k, v = ([torch.randn(2, HEADS, n, HEAD_DIM, generator=generator) for n in (5, 9, 3)] for _ in range(2))
    weights = torch.rand(3, 4, 6, generator=generator)
    share = (weights / weights.sum(0)).flatten(1)
    each = [torch.nn.functional.scaled_dot_product_attention(q, *pair) for pair in zip(k, v, strict=True)]
    expected = sum(w[:, None] * o for w, o in zip(share, each, strict=True))
    if packed:
        q, *rest = (x.transpose(1, 2).flatten(2) for x in (q, *k, *v))
        k, v, expected = rest[:3], rest[3:], expected.transpose(1, 2).flatten(2)
    out = fast.couple_attention(q, k, v, weights, heads=HEADS if packed else None)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match=r"weights: got shape \[2, 24\]; allowed: \[3, 24\]"):
        fast.couple_attention(q, k, v, weights[:2], heads=HEADS if packed else None)


def test_regional_override_with_cond_and_uncond_plans():
    q = torch.randn(2, 24, HEADS * HEAD_DIM)
    k = torch.randn(2, 11, HEADS * HEAD_DIM)
    left = torch.zeros(4, 6)
    left[:, :3] = 1
    regions = RegionPlan.from_masks([left, 1 - left], [(0, 5), (5, 11)], mode="hard").bind((1, 4, 6))
    uncond = RegionPlan.plain(11).bind((1, 4, 6))
    options = {"cond_or_uncond": [0, 1]}
    out = fast.regional_override((regions, uncond), attention, q, k, k, HEADS, transformer_options=options)
    first = fast.regional_override(regions, attention, q[:1], k[:1], k[:1], HEADS)
    second = fast.regional_override(uncond, attention, q[1:], k[1:], k[1:], HEADS)
    torch.testing.assert_close(out, torch.cat([first, second]))


def test_four_steps():
    joined, ranges = fast.concatenate([conditioning(4, 1), conditioning(6, 2)], conditioning(3, 3), "first")
    assert ranges.base == (0, 3) and ranges.regions == ((3, 7), (7, 13)) and ranges.total == 13
    assert len(joined[0][1]["t5xxl_ids"]) == 13 and joined[0][0].shape[1] == 4 + 5 + 7
    left = torch.zeros(1, 64, 96)
    left[..., :40] = 1
    weights = fast.masks_to_token_grid([left, 1 - left], 8, 12)
    assert weights.shape == (2, 4, 6) and weights[0, 0].tolist() == [1, 1, 0.5, 0, 0, 0]
    plan = fast.build_bias(ranges, weights, padded_rows=PADDED)
    assert plan.segments == ((3, 7, 0), (7, 13, 0), (0, 3, 0), (0, 0, PADDED - 13))
    lowest = 0.35 * math.log(1e-4)
    torch.testing.assert_close(plan.tensors.bias[0, 3], torch.full((24,), lowest))


# --- What is said of bad input.

MASK = torch.ones(1, 64, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fast.Region.make([], MASK, name="left"), "left: conditioning: got a CONDITIONING with 0 entries"),
        (lambda: fast.Region.make(2 * conditioning(3, 1), MASK), "with 2 entries; allowed: .* one prompt a region"),
        (lambda: fast.Region.make(conditioning(3, 1), torch.ones(3, 8, 8)), "mask: got a batch of 3 masks"),
        (lambda: fast.Region.make(conditioning(3, 1), MASK * 255), r"mask: got values from 255 to 255.*divide by 255"),
        (lambda: fast.Settings(outside="none"), "outside: got 'none'; allowed: 'all' | 'base'"),
        (lambda: fast.Settings(start_percent=0.8, end_percent=0.2), "start_percent, end_percent: got 0.8 and 0.2"),
        (lambda: fast.Settings(canvas=(1024, 0)), "canvas: got 1024 x 0; allowed: a width and a height above 0"),
        (lambda: fast.Settings(crop=(0.5, 0, 0.5, 1)), "crop: got .*crop_top < crop_bottom"),
        (lambda: fast.Settings().check([]), "regions: got no region; allowed: at least one Anima Region"),
        (lambda: fast.Settings(combine="add").check([fast.Region.make(None, MASK)]), "combine: got 'add'"),
        (lambda: parse_blocks("1, x"), "blocks: got '1, x'; allowed: numbers and ranges such as 0-13, 20"),
        (lambda: fast.concatenate([]), "regions: got none; allowed: at least one CONDITIONING"),
        (lambda: fast.concatenate([conditioning(3, 1)], None, "middle"), "base_position: got 'middle'"),
        (lambda: fast.accelerate(object()), "model: got a model of class object; allowed: an Anima model"),
        (lambda: fast.apply_regions(object(), []), "regions: got no region"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_blocks():
    assert parse_blocks("") is None and parse_blocks(" 0-2, 7 ") == {0, 1, 2, 7}


def test_old_comfyui():
    with pytest.raises(RuntimeError, match="this is ComfyUI 0.28.4; its nodes need 0.29 or newer"):
        require_comfyui("0.28.4")
    require_comfyui("0.29.0")
    require_comfyui("1.0")


def test_preview():
    regions = two_regions(size=(128, 192)).regions
    grid, weights = preview(regions, fast.Settings(), 192, 128)
    assert grid.shape[0] == 1 and grid.shape[3] == 3 and weights.shape[0] == 2
    assert float(grid.min()) >= 0 and float(grid.max()) <= 1
