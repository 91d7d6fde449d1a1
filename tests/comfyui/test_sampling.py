"""Regions and Accelerate through ComfyUI's own loader and sampler, against a materialised mask and the stock model."""

from __future__ import annotations

import logging

import pytest
import tiny_anima
import torch
from masked import apply_masked, scale_self_attention
from sampling import assert_close, regions, sample

CASES = {
    "soft": dict(),
    "soft, base only elsewhere": dict(base_always_allowed=False, strength=1.0),
    "hard": dict(mode="hard"),
    "hard -80": dict(mode="hard", hard_value=-80.0),
    "blend": dict(combine="blend", strength=1.0, base_weight=0.2),
    "some blocks": dict(blocks=frozenset({0, 3, 4, 9})),
    "some blocks, base outside": dict(blocks=frozenset({0, 3, 4, 9}), outside="base", strength=1.0),
    "stretched, no overlap rule": dict(stretch=True, normalize_overlaps=False, resample="bilinear"),
}


@pytest.mark.parametrize("name", CASES)
def test_regions_equal_a_materialised_mask(comfy, model, fast, name):
    settings, chosen = fast.Settings(**CASES[name]), regions(fast)
    expected, seen = apply_masked(comfy, model, chosen, settings)
    expected = sample(comfy, expected)
    assert seen["cross"] == 20
    out = sample(comfy, fast.apply_regions(model, chosen, settings))
    assert_close(out, expected)
    assert (out - sample(comfy, model)).abs().max() > 0.05 * out.abs().max(), "regions must change the picture"


def test_the_node_as_it_comes(comfy, model, fast):
    """Its settings as they stand: soft regions by `strength`; in blend the shares are the regions' own strengths."""
    import anima_fast.integrations.comfyui.nodes as nodes

    chosen = regions(fast)
    inputs = nodes.AnimaFastRegions.define_schema().inputs
    widgets = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}
    given = dict(model=model, base=None, negative=None, regions={f"region{i}": r for i, r in enumerate(chosen)})
    for combine, strength in (("logit", 0.35), ("blend", 1.0)):
        node = nodes.AnimaFastRegions.execute(**given, **{**widgets, "combine": combine})
        settings = fast.Settings(combine=combine, strength=strength)
        expected = sample(comfy, fast.apply_regions(model, chosen, settings))
        assert torch.equal(sample(comfy, node.args[0]), expected)


SHAPES = {
    "512 x 256 pixels, as many tokens as text rows": dict(size=(32, 64)),
    "odd size": dict(size=(17, 25)),
    "batch of 2": dict(batch=2),
    "two frames": dict(frames=2),
    "cfg 1": dict(cfg=1.0),
    "negative of 600 tokens": dict(negative=tiny_anima.conditioning(600, 8)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_batches(comfy, model, fast, name):
    size = SHAPES[name].get("size", (16, 24))
    settings, chosen = fast.Settings(strength=1.0), regions(fast, (8 * size[0], 8 * size[1]))
    expected, _ = apply_masked(comfy, model, chosen, settings)
    out = sample(comfy, fast.apply_regions(model, chosen, settings), **SHAPES[name])
    assert_close(out, sample(comfy, expected, **SHAPES[name]))
    assert_close(sample(comfy, fast.accelerate(model), **SHAPES[name]), sample(comfy, model, **SHAPES[name]))


@pytest.mark.parametrize("outside", ["all", "base"])
def test_window(comfy, model, fast, outside, caplog):
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    settings = fast.Settings(start_percent=0.3, end_percent=0.75, outside=outside, strength=1.0)
    chosen = regions(fast)
    window = settings.window(model.get_model_object("model_sampling").percent_to_sigma)
    expected, _ = apply_masked(comfy, model, chosen, settings, window)
    assert_close(sample(comfy, fast.apply_regions(model, chosen, settings), steps=4), sample(comfy, expected, steps=4))
    assert "served 20 of 20" in caplog.text, "two of four steps are in the window"


def test_hires_pass(comfy, model, fast):
    settings, chosen = fast.Settings(), regions(fast)
    ours = fast.apply_regions(model, chosen, settings)
    oracle, _ = apply_masked(comfy, model, chosen, settings)
    pictures = []
    for patched in (ours, oracle):
        low = sample(comfy, patched)
        high = torch.nn.functional.interpolate(low[:, :, 0], scale_factor=1.5)[:, :, None]
        pictures.append(sample(comfy, patched, latent=high, denoise=0.6))
    assert_close(*pictures)


def test_accelerate_equals_stock(comfy, model, fast, caplog):
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    assert_close(sample(comfy, fast.accelerate(model)), sample(comfy, model))
    assert "Anima Accelerate: served 20 of 20" in caplog.text


class Louder:
    """An override of another pack: it scales what it serves, and it hands on to whatever was there before."""

    def __init__(self):
        self.shapes = []

    def on(self, model):
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        previous = options.get("optimized_attention_override")

        def override(func, *args, **kwargs):
            self.shapes.append((args[0].shape[2], args[1].shape[2]))
            out = func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)
            return 1.05 * out

        options["optimized_attention_override"] = override
        return patched


@pytest.mark.parametrize("text_first", [False, True])
def test_chained_with_another_override_in_either_order(comfy, model, fast, text_first):
    size = (32, 64)  # self- and cross-attention have the same shapes here
    settings, chosen, other = fast.Settings(), regions(fast, (256, 512)), Louder()
    if text_first:
        both = other.on(fast.apply_regions(model, chosen, settings))
    else:
        both = fast.apply_regions(other.on(model), chosen, settings)
    out = sample(comfy, both, size=size)
    assert other.shapes == [(512, 512)] * 20, "the other one has self-attention, and only that"

    expected, _ = apply_masked(comfy, model, chosen, settings)

    scale_self_attention(expected, 1.05)
    assert_close(out, sample(comfy, expected, size=size))


def test_two_of_ours(comfy, model, fast, caplog):
    chosen = regions(fast)
    once = sample(comfy, fast.apply_regions(model, chosen))
    assert torch.equal(sample(comfy, fast.accelerate(fast.apply_regions(model, chosen))), once)
    assert torch.equal(sample(comfy, fast.apply_regions(fast.accelerate(model), chosen)), once)


def test_lora(comfy, model, fast):
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for layer, width in (("q_proj", 256), ("k_proj", 1024), ("v_proj", 1024)):
        key = f"diffusion_model.blocks.2.cross_attn.{layer}"
        lora[f"{key}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.3
        lora[f"{key}.lora_B.weight"] = torch.randn(256, 4, generator=generator) * 0.3
    adapter = "diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj"
    lora[f"{adapter}.lora_A.weight"] = torch.randn(4, 1024, generator=generator) * 0.3
    lora[f"{adapter}.lora_B.weight"] = torch.randn(1024, 4, generator=generator) * 0.3
    tuned, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    settings, chosen = fast.Settings(), regions(fast)
    expected, _ = apply_masked(comfy, tuned, chosen, settings)
    out = sample(comfy, fast.apply_regions(tuned, chosen, settings))
    assert_close(out, sample(comfy, expected))
    assert (out - sample(comfy, fast.apply_regions(model, chosen, settings))).abs().max() > 0.01


def test_turbo_lora(comfy, model, fast, caplog):
    """A LoRA on what makes keys and values in every block, sampled as the turbo LoRA is: 8 steps, CFG 1."""
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for block in range(10):
        for layer in ("k_proj", "v_proj"):
            key = f"diffusion_model.blocks.{block}.cross_attn.{layer}"
            lora[f"{key}.lora_A.weight"] = torch.randn(4, 1024, generator=generator) * 0.1
            lora[f"{key}.lora_B.weight"] = torch.randn(256, 4, generator=generator) * 0.1
    settings, chosen, turbo = fast.Settings(), regions(fast), dict(steps=8, cfg=1.0)
    tuned, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    expected, _ = apply_masked(comfy, tuned, chosen, settings)
    expected = sample(comfy, expected, **turbo)
    assert_close(sample(comfy, fast.apply_regions(tuned, chosen, settings), **turbo), expected)
    assert "Anima Regions: served 80 of 80" in caplog.text
    late, _ = comfy.sd.load_lora_for_models(fast.apply_regions(model, chosen, settings), None, lora, 1.0, 0.0)
    assert_close(sample(comfy, late, **turbo), expected)
    assert len(tuned.patches) == len(late.patches) == 20


def test_control(comfy, model, fast, tmp_path):
    """Anima LLLite by core's own nodes, which patch what goes into self- and cross-attention."""
    import comfy_extras.nodes_model_patch as control
    import folder_paths
    from safetensors.torch import save_file

    save_file(tiny_anima.lllite_state_dict(), tmp_path / "tiny_lllite.safetensors")
    folder_paths.add_model_folder_path("model_patches", str(tmp_path))
    patch = control.ModelPatchLoader().load_model_patch("tiny_lllite.safetensors")[0]
    picture = torch.rand(1, 128, 192, 3, generator=torch.Generator().manual_seed(2))

    def controlled(model):
        return control.AnimaLLLiteApply().apply_patch(model, patch, picture, 1.0, 0.0, 1.0)[0]

    settings, chosen = fast.Settings(), regions(fast)
    expected = sample(comfy, apply_masked(comfy, controlled(model), chosen, settings)[0])
    before = sample(comfy, fast.apply_regions(controlled(model), chosen, settings))
    after = sample(comfy, controlled(fast.apply_regions(model, chosen, settings)))
    assert_close(before, expected)
    assert_close(after, expected)
    assert (before - sample(comfy, fast.apply_regions(model, chosen, settings))).abs().max() > 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_types(comfy, fast, dtype, caplog):
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    options = {"dtype": getattr(torch, dtype)}
    model = comfy.sd.load_diffusion_model_state_dict(tiny_anima.state_dict(), model_options=options)
    settings, chosen = fast.Settings(), regions(fast)
    expected, _ = apply_masked(comfy, model, chosen, settings)
    # Half precision: rounding in other places, carried through ten blocks and two steps.
    out = sample(comfy, fast.apply_regions(model, chosen, settings))
    error = (out - sample(comfy, expected)).float().pow(2).mean().sqrt() / out.std()
    assert error < 0.03 and "served 20 of 20" in caplog.text


def test_a_tile_of_another_shape_is_declined_and_a_crop_is_served(comfy, model, fast, caplog):
    chosen = regions(fast)  # for 24 x 16
    out = sample(comfy, fast.apply_regions(model, chosen), size=(16, 12))
    assert_close(out, sample(comfy, model, size=(16, 12)), 1e-6)
    assert "if it is a tile, set the crop" in caplog.text and "none of 20 cross-attention calls" in caplog.text
    crop = fast.Settings(crop=(0.0, 0.5, 1.0, 1.0))
    right = [fast.Region(r.prompt, r.mask[:, 96:].contiguous(), r.strength, r.priority, r.name) for r in chosen]
    expected, _ = apply_masked(comfy, model, right, fast.Settings())
    assert_close(
        sample(comfy, fast.apply_regions(model, chosen, crop), size=(16, 12)), sample(comfy, expected, size=(16, 12))
    )


def test_a_window_without_steps_warns(comfy, model, fast, caplog):
    settings = fast.Settings(start_percent=0.97, end_percent=0.98)
    sample(comfy, fast.apply_regions(model, regions(fast), settings))
    assert "none of 2 model evaluations fell in the window" in caplog.text


def test_somebody_else_computing_the_attention_is_reported(comfy, model, fast, caplog):
    patched = fast.apply_regions(model, regions(fast))

    def thief(executor, *args, **kwargs):
        options = dict(kwargs["transformer_options"])
        options["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
        return executor(*args, **{**kwargs, "transformer_options": options})

    patched.add_wrapper_with_key("diffusion_model", "thief", thief)
    sample(comfy, patched)
    assert "another extension computed the attention itself" in caplog.text
    assert "none of 20 cross-attention calls was served" in caplog.text


def test_debug(comfy, model, fast, caplog):
    caplog.set_level(logging.INFO, "anima_fast.comfyui")
    sample(comfy, fast.apply_regions(model, regions(fast), fast.Settings(debug=True)))
    lines = [r.message for r in caplog.records if ": block " in r.message]
    assert len(lines) == 10, "each block once a run"
    for part in ("q [2, 16, 96, 16]", "grid (1, 8, 12)", "12 + 500 pads", "NaN 0", "cond_or_uncond [1, 0]"):
        assert part in lines[0]
