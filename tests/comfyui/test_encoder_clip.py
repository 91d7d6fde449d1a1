"""Load Qwen3.5 CLIP (Anima): the tiny checkpoint through ComfyUI's own CLIP, LoRA loader and sampler."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling import sample

sys.path.append(str(Path(__file__).parents[1]))
import tiny_encoder

from anima_fast.doctor.node_types import WIDGETS

CONFIG = dataclasses.replace(tiny_encoder.CONFIG, head_size=1024)
PROMPT = r"a red (cat:1.3) on the ((left)), \(sea\)"
NAME = "qwen35_4b.transformer."


@pytest.fixture(scope="module")
def folder(comfy, tmp_path_factory):
    """models/text_encoders with an encoder in FP32, one in FP8, and its tokenizer."""
    import folder_paths

    place = tmp_path_factory.mktemp("text_encoders")
    tiny_encoder.save(place / "tiny.safetensors", CONFIG)
    tiny_encoder.save(place / "tiny_fp8.safetensors", CONFIG, fp8=True, dtype=torch.bfloat16)
    folder_paths.add_model_folder_path("text_encoders", str(place), is_default=True)
    return place


@pytest.fixture(scope="module")
def node(comfy):
    import anima_fast.integrations.comfyui.nodes as nodes

    return nodes.AnimaFastLoadQwen35CLIP


def load(node, name="tiny.safetensors", **changed):
    settings = dict(
        clip_name=name,
        recurrence="gdn",
        use_alignment=False,
        alignment_strength=0.5,
        use_calibration=False,
        output_scale=1.0,
        alignment_file="none",
        calibration_file="none",
        head_norm="exp",
        tokenizer="",
        device="default",
    )
    with torch.inference_mode():
        return node.execute(**{**settings, **changed}).args[0]


def text_encode(comfy, clip, prompt):
    with torch.inference_mode():
        return comfy.nodes.CLIPTextEncode().encode(clip, prompt)[0]


@pytest.mark.parametrize("file", ["tiny.safetensors", "tiny_fp8.safetensors"])
@pytest.mark.parametrize("recurrence", ["gdn", "mamba2"])
def test_conditioning_is_the_encoders(comfy, node, folder, file, recurrence):
    from comfy.text_encoders.anima import T5XXLTokenizer

    from anima_fast import encoder

    clip = load(node, file, recurrence=recurrence)
    alone = encoder.load(folder / file, recurrence)
    for prompt in (PROMPT, "", "the sea, " * 40):
        (states, extra), *others = text_encode(comfy, clip, prompt)
        assert not others
        expected, _ = alone.encode(prompt)
        assert states.shape == expected.shape and (states - expected).abs().max() < 1e-5
        t5 = T5XXLTokenizer().tokenize_with_weights(prompt)[0]
        assert extra["t5xxl_ids"].tolist() == [i for i, _ in t5] and extra["t5xxl_ids"].dtype == torch.int
        assert extra["t5xxl_weights"].tolist() == pytest.approx([w for _, w in t5])
    stored = {name: t.dtype for name, t in encoder.checkpoint.read_checkpoint(folder / file).tensors.items()}
    for name, p in clip.cond_stage_model.qwen35_4b.transformer.named_parameters():
        assert p.dtype == (stored[name.removeprefix("model.")] if p.ndim == 2 else torch.float32), name


def test_conditioning_drives_the_sampler(comfy, node, folder, model):
    clip = load(node)
    pictures = []
    for prompt in (PROMPT, "a blue house"):
        positive, negative = text_encode(comfy, clip, prompt), text_encode(comfy, clip, "")
        pictures.append(sample(comfy, model, positive=positive, negative=negative))
        assert pictures[-1].isfinite().all()
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
    latent = {"samples": torch.zeros(1, 16, 1, 16, 24)}
    with torch.inference_mode():
        out = comfy.nodes.KSampler().sample(model, 1, 2, 4.0, "euler", "simple", positive, negative, latent)[0]
    assert out["samples"].isfinite().all() and out["samples"].abs().max() > 0


@pytest.mark.parametrize("file", ["tiny.safetensors", "tiny_fp8.safetensors"])
def test_lora(comfy, node, folder, file, model):
    """ComfyUI's LoRA loader reaches the encoder's matrices by kohya's names and by its own, and leaves no trace."""
    clip = load(node, file)
    before = text_encode(comfy, clip, PROMPT)[0][0]
    up, down = torch.randn(48, 4), torch.randn(4, 32) / 4
    qkv = "text_encoders.qwen35_4b.transformer.model.layers.0.linear_attn.in_proj_qkv"
    lora = {
        "lora_te_layers_2_mlp_gate_proj.lora_up.weight": up,
        "lora_te_layers_2_mlp_gate_proj.lora_down.weight": down,
    }
    lora |= {f"{qkv}.lora_up.weight": torch.randn(64, 2), f"{qkv}.lora_down.weight": torch.randn(2, 32) / 2}
    with torch.inference_mode():
        _, patched = comfy.sd.load_lora_for_models(model, clip, lora, 0.0, 0.5)
    assert {key.removeprefix(NAME) for key in patched.patcher.patches} == {
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.0.linear_attn.in_proj_qkv.weight",
    }
    after = text_encode(comfy, patched, PROMPT)[0][0]
    assert (after - before).abs().max() > 1e-3
    if file == "tiny.safetensors":
        from anima_fast.encoder.model import TextEncoder

        tensors = tiny_encoder.tensors(CONFIG)
        tensors["layers.2.mlp.gate_proj.weight"] += 0.5 * up @ down
        tensors["layers.0.linear_attn.in_proj_qkv.weight"] += (
            0.5 * lora[f"{qkv}.lora_up.weight"] @ lora[f"{qkv}.lora_down.weight"]
        )
        ids = [i for i, _ in clip.tokenize(PROMPT)["qwen35_4b"][0]]
        with torch.no_grad():
            expected = TextEncoder(CONFIG, tensors)(torch.tensor([ids]))
        assert (after - expected).abs().max() < 1e-5
    assert torch.equal(text_encode(comfy, clip, PROMPT)[0][0], before)


def test_adjustments(comfy, node, folder):
    from anima_fast import encoder
    from anima_fast.encoder.files import Origin

    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(1024, 1024, generator=generator))[0]
    means = torch.randn(2, 1024, generator=generator)
    alignment = encoder.Alignment(rotation, *means, origin=Origin("gdn", "exp"))
    alignment.save(folder / "alignment.safetensors")
    source, target = torch.randn(2, 400, 1024, generator=generator)
    encoder.Calibration.fit(source, 3 * target, origin=Origin("gdn", "exp")).save(folder / "calibration.safetensors")
    files = dict(alignment_file="alignment.safetensors", calibration_file="calibration.safetensors")
    for settings in (
        dict(use_alignment=True),
        dict(use_alignment=True, alignment_strength=1.0, output_scale=2.0),
        dict(use_calibration=True),
        dict(),
    ):
        clip = load(node, **files, **settings)
        expected = encoder.load(
            folder / "tiny.safetensors",
            alignment=folder / "alignment.safetensors" if settings.get("use_alignment") else None,
            alignment_strength=settings.get("alignment_strength", 0.5),
            calibration=folder / "calibration.safetensors" if settings.get("use_calibration") else None,
            output_scale=settings.get("output_scale", 1.0),
        ).encode(PROMPT)[0]
        error = (text_encode(comfy, clip, PROMPT)[0][0] - expected).abs().max()
        assert error < 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="alignment_file: got 'none'"):
        load(node, use_alignment=True)
    with pytest.raises(ValueError, match="fitted to recurrence='gdn', but the encoder runs 'mamba2'"):
        load(node, **files, use_alignment=True, recurrence="mamba2")
    first = node.fingerprint_inputs(clip_name="tiny.safetensors", alignment_file="none", calibration_file="none")
    assert len(first) == 1
    tiny_encoder.save(folder / "tiny.safetensors", CONFIG)
    assert (
        node.fingerprint_inputs(clip_name="tiny.safetensors", alignment_file="none", calibration_file="none") != first
    )


def test_clip_functions(comfy, node, folder):
    """Clip skip, unloading and loading again, a second model of the same settings, textual inversion, saving."""
    from comfy import model_management

    clip = load(node, device="cpu")
    before = text_encode(comfy, clip, PROMPT)[0][0]
    skipped = comfy.nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    after = text_encode(comfy, skipped, PROMPT)[0][0]
    assert after.shape == before.shape and (after - before).abs().max() > 1e-3
    model_management.unload_all_models()
    assert torch.equal(text_encode(comfy, clip, PROMPT)[0][0], before)
    make, arguments = clip.patcher.cached_patcher_init
    again = make(*arguments, disable_dynamic=True)
    assert again.model.state_dict().keys() == clip.patcher.model.state_dict().keys()
    assert f"{NAME}norm.1.weight" in clip.get_sd() and f"{NAME}model.embed_tokens.weight" in clip.get_sd()


def test_node_and_defaults(node):
    schema = node.define_schema()
    assert schema.display_name == "Load Qwen3.5 CLIP (Anima)"
    defaults = {i.id: getattr(i, "default", None) for i in schema.inputs}
    assert (defaults["use_alignment"], defaults["use_calibration"]) == (False, False)
    assert (defaults["alignment_strength"], defaults["output_scale"]) == (0.5, 1.0)
    assert defaults["recurrence"] == "gdn"
    assert all(i.tooltip for i in schema.inputs)
    names = tuple(i.id for i in schema.inputs)
    assert names == WIDGETS[schema.node_id]
    root = Path(__file__).parents[2]
    saved = json.loads((root / "example_workflows" / "anima_qwen35.json").read_text())["nodes"]
    saved = next(n for n in saved if n["type"] == schema.node_id)
    assert tuple(i["name"] for i in saved["inputs"]) == names
    api = json.loads((root / "examples" / "comfyui" / "qwen35_api.json").read_text()).values()
    api = next(n["inputs"] for n in api if n["class_type"] == schema.node_id)
    assert api == dict(zip(names, saved["widgets_values"], strict=True))
    assert all(defaults[name] == value for name, value in api.items() if defaults[name] is not None)


@given(st.text(alphabet="ab ():1.2\\n,", max_size=24))
def test_prompt_weights_are_comfyuis(comfy, prompt):
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    from anima_fast.encoder.prompts import pieces

    expected = [(unescape_important(text), weight) for text, weight in token_weights(escape_important(prompt), 1.0)]
    assert pieces(prompt) == [(text, weight) for text, weight in expected if text]
