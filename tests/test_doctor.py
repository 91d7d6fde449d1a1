"""doctor without a server: the corpus in tests/workflows, the official templates, --fix, the picture, bad input."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import struct
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from anima_fast.cli import main
from anima_fast.doctor import checks, files
from anima_fast.doctor.case import Case
from anima_fast.doctor.fix import fix, patch_text
from anima_fast.doctor.guidance import family
from anima_fast.doctor.node_types import WIDGETS
from anima_fast.doctor.region_masks import mask_of, token_weights
from anima_fast.doctor.workflow import UNKNOWN, Link, WorkflowError, read, read_text

ROOT = Path(__file__).parents[1]
CORPUS = Path(__file__).parent / "workflows"
EXPECTED = json.loads((CORPUS / "expected.json").read_text())
OWN = [*(ROOT / "example_workflows").glob("anima_*.json"), *(ROOT / "examples" / "comfyui").glob("*.json")]


def make():
    sys.path.insert(0, str(CORPUS))
    try:
        import make
    finally:
        sys.path.remove(str(CORPUS))
    return make


def found(workflow, **surroundings):
    return checks.run(Case(workflow, **surroundings))


def ids(findings, *severities):
    return sorted(finding.id for finding in findings if finding.severity in severities)


def mend(name, text):
    return fix(text, lambda changed: read_text(name, changed), found)


def doctor(capsys, *options):
    """(exit code, stdout, stderr) of the command."""
    code = main(["doctor", *map(str, options)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- what is found


def test_a_shift_beyond_every_number():
    nodes = make().patched("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=1e9, height=1e9)
    workflow = read_text("w.json", json.dumps(nodes))
    assert "sampling-shift" in ids(found(workflow), "warning", "error")


def test_the_corpus_is_what_make_writes():
    for name, text in make().written().items():
        assert (CORPUS / name).read_text() == text, f"{name}: run python tests/workflows/make.py"
    assert sorted(EXPECTED) == sorted(p.name for p in CORPUS.glob("*.json") if p.name != "expected.json")


@pytest.mark.parametrize("name", EXPECTED)
def test_corpus(name):
    findings = found(read(CORPUS / name))
    assert ids(findings, "error", "warning") == sorted(EXPECTED[name]["faults"]), [f.summary for f in findings]
    assert ids(findings, "note") == sorted(EXPECTED[name]["notes"]), [f.summary for f in findings]
    for finding in findings:
        assert finding.evidence or finding.id == "no-output", f"{finding.id} shows nothing"
        assert finding.why and finding.fix and finding.summary


def test_every_kind_of_finding_that_needs_no_server_is_in_the_corpus():
    with_surroundings = {"file-missing", "file-damaged", "lora-mismatch", "comfyui-version", "attention-backend"}
    with_surroundings |= {"value-refused", "picture-size"}
    rare = {
        "no-sampler",
        "unknown-node",
        "sampling-patched-twice",
        "regions-half-connected",
        "tile-size",
        "regions-off",
    }
    seen = {name for entry in EXPECTED.values() for name in (*entry["faults"], *entry["notes"])}
    assert finding_ids() - seen - with_surroundings - rare == set()


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_our_own_examples_are_clean(path):
    assert found(read(path)) == []


def templates():
    spec = importlib.util.find_spec("comfyui_workflow_templates_json")
    return sorted((Path(spec.submodule_search_locations[0]) / "templates").glob("image_anima_*.json")) if spec else []


@pytest.mark.skipif(not templates(), reason="needs comfyui-workflow-templates-json")
def test_official_templates_draw_no_alarm():
    paths = templates()
    assert len(paths) >= 5
    for path in paths:
        workflow = read(path)
        (sampler,) = (node.id for node in workflow.nodes.values() if node.class_type == "KSampler")
        assert workflow.value(sampler, "steps") in (8, 30) and workflow.source(sampler, "model") is not None
        assert found(workflow) == [], path.name


@pytest.mark.skipif(not templates(), reason="needs comfyui-workflow-templates-json")
def test_every_official_template_can_be_read():
    """Other models' too: nothing is judged by Anima's numbers, nothing breaks."""
    count = 0
    for path in templates()[0].parent.glob("*.json"):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and isinstance(document.get("nodes"), list):
            findings = found(read(path))
            count += 1
            if not path.name.startswith("image_anima"):
                assert set(ids(findings, "error", "warning")) <= {"dangling-link"}, path.name
    assert count > 500


# ---- reading


def test_both_forms_are_one_graph():
    writer = make()
    for nodes in (writer.hook(), writer.regions(), writer.plain()):
        api, ui = read_text("api", json.dumps(nodes)), read_text("ui", json.dumps(writer.to_ui(nodes)))
        assert {name: node.inputs for name, node in api.nodes.items()} == {
            n: node.inputs for n, node in ui.nodes.items()
        }
        assert api.to_api() == nodes
        assert ui.to_api() == nodes


def test_virtual_nodes_are_resolved():
    workflow = read(CORPUS / "right_virtual_nodes_ui.json")
    sampler = workflow.nodes["7"]
    assert sampler.inputs["model"] == Link("1", 0)  # reroute, bypassed LoRA, Set and Get
    assert workflow.value("7", "cfg") == 4.0  # of the primitive, not the 8 in the node
    assert workflow.skipped == {"11": 4, "15": 2}
    assert set(workflow.nodes) == {"1", "2", "3", "4", "5", "6", "7", "8", "9"}


def test_subgraphs_are_entered():
    workflow = read(CORPUS / "right_nested_subgraphs_ui.json")
    assert workflow.nodes["20:5:3"].class_type == "KSampler"
    assert workflow.value("20:5:3", "cfg") == 4.0  # of the host; the node inside says 9
    assert workflow.nodes["20:5:3"].inputs["model"] == Link("1", 0)
    assert workflow.nodes["8"].inputs["samples"] == Link("20:5:3", 0)


def test_switches_run_one_side():
    workflow = read(CORPUS / "right_turbo_switched_off.json")
    assert workflow.value("7", "steps") == 30 and "10" not in workflow.live()
    workflow = read(CORPUS / "right_turbo_switched_on.json")
    assert workflow.value("7", "steps") == 8 and "10" in workflow.live()


def test_a_computed_value_is_unknown_and_not_judged():
    nodes = make().plain()
    nodes["20"] = {"class_type": "SomeMath", "inputs": {"a": 1}}
    nodes["7"]["inputs"]["steps"] = ["20", 0]
    workflow = read_text("x", json.dumps(nodes))
    assert workflow.value("7", "steps") is UNKNOWN
    assert found(workflow) == []


def test_object_info_names_widgets():
    info = {
        "Strange": {
            "input": {
                "required": {
                    "model": ["MODEL"],
                    "noise_seed": ["INT", {"default": 0, "control_after_generate": True}],
                    "kind": [["a", "b"], {}],
                    "how": [
                        "COMFY_DYNAMICCOMBO_V3",
                        {"options": [{"key": "x"}, {"key": "y", "inputs": {"required": {"far": ["FLOAT", {}]}}}]},
                    ],
                    "later": ["INT", {"default": 5}],
                },
                "optional": {"forced": ["INT", {"forceInput": True}], "text": ["STRING", {"default": "none"}]},
            },
            "output_node": True,
        }
    }
    node = {"id": 1, "type": "Strange", "mode": 0, "widgets_values": [3, "randomize", "b", "y", 0.5, 9]}
    workflow = read_text("x", json.dumps({"nodes": [node], "links": []}), info)
    values = {"noise_seed": 3, "kind": "b", "how": "y", "how.far": 0.5, "later": 9, "text": "none"}
    assert workflow.nodes["1"].inputs == values
    plain = read_text("x", json.dumps({"nodes": [node], "links": []}))
    with pytest.raises(WorkflowError, match="widgets of Strange 1 have no names"):
        plain.to_api()
    assert plain.to_api(info)["1"]["inputs"] == values
    with pytest.raises(WorkflowError, match="the server does not have Strange 1"):
        plain.to_api({"Other": {}})


def png(path, size=(64, 48), **texts):
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", size).save(path, pnginfo=info)
    return path


def test_the_workflow_in_a_png(tmp_path, capsys):
    nodes = make().sized(1024, 1024)
    path = png(tmp_path / "a.png", (1024, 1024), prompt=json.dumps(nodes), workflow="{}")
    assert read(path).image == (1024, 1024)
    assert found(read(path), picture=(1024, 1024)) == []
    ui = png(tmp_path / "b.png", workflow=json.dumps(make().to_ui(nodes)))
    assert read(ui).kind == "ui"
    code, out, _ = doctor(capsys, CORPUS / "fault_steps.json", "--png", path, "--json")
    assert code == 1 and [f["id"] for f in json.loads(out)["findings"]] == ["steps"]
    small = png(tmp_path / "c.png", (2048, 2048))
    code, out, _ = doctor(capsys, CORPUS / "right_plain.json", "--png", small, "--json")
    assert code == 1 and [f["id"] for f in json.loads(out)["findings"]] == ["picture-size"]


# ---- masks


def test_masks_are_computed_as_comfyui_would():
    nodes = {
        "1": {"class_type": "SolidMask", "inputs": {"value": 0.25, "width": 40, "height": 20}},
        "2": {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 30, "height": 30}},
        "4": {"class_type": "InvertMask", "inputs": {"mask": ["3", 0]}},
    }
    base = np.full((20, 40), 0.25, np.float32)
    want = {"add": 0.75, "subtract": 0.0, "multiply": 0.125, "and": 0.0, "or": 0.0, "xor": 0.0}
    for operation, value in want.items():
        links = {"destination": ["1", 0], "source": ["2", 0]}
        nodes["3"] = {"class_type": "MaskComposite", "inputs": {**links, "x": 25, "y": 10, "operation": operation}}
        workflow = read_text("x", json.dumps(nodes))
        expected = base.copy()
        expected[10:, 25:] = value
        assert np.allclose(mask_of(workflow, Link("3", 0), []), expected), operation
        assert np.allclose(mask_of(workflow, Link("4", 0), []), 1 - expected), operation
    assert mask_of(read_text("x", json.dumps(nodes)), Link("9", 0), []) is None


def test_masks_from_files(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 64)).save(tmp_path / "m.png")
    for kind, extra, slot, value in (
        ("LoadImageMask", {"channel": "red"}, 0, 1.0),
        ("LoadImageMask", {"channel": "alpha"}, 0, 1 - 64 / 255),
        ("LoadImage", {}, 1, 1 - 64 / 255),
    ):
        workflow = read_text("x", json.dumps({"1": {"class_type": kind, "inputs": {"image": "m.png", **extra}}}))
        assert np.allclose(mask_of(workflow, Link("1", slot), [tmp_path]), value)
    workflow = read_text("x", json.dumps({"1": {"class_type": "LoadImage", "inputs": {"image": "../m.png"}}}))
    assert mask_of(workflow, Link("1", 1), []) is None


def test_token_weights_are_means():
    mask = np.zeros((64, 64), np.float32)
    mask[:, :40] = 1
    assert np.allclose(token_weights(mask, 64, 64), [[1, 1, 0.5, 0]] * 4)


# ---- model files


def safetensors(path, tensors, size=None):
    """A file of that header; its data are a hole."""
    at, header = 0, {}
    for name, shape in tensors.items():
        length = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at if size is None else size)
    return path


ANIMA = {"net.blocks.0.mlp.layer1.weight": (8, 2), "net.llm_adapter.blocks.0.cross_attn.q_proj.weight": (2, 2)}
QWEN = {f"model.layers.{n}.post_attention_layernorm.weight": (1024,) for n in range(28)}
QWEN |= {"model.layers.0.self_attn.q_norm.weight": (128,)}
WAN = {"decoder.conv1.weight": (4, 16, 3, 3, 3), "decoder.middle.0.residual.0.gamma": (4,)}
FLUX_VAE = {"decoder.conv_in.weight": (4, 16, 3, 3)}
SDXL_LORA = {"lora_unet_down_blocks_1.lora_down.weight": (4, 2), "lora_te1_x.alpha": (1,)}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (ANIMA, ("model", "anima")),
        (dict(list(ANIMA.items())[:1]), ("model", "Cosmos-Predict2 without Anima's text adapter")),
        ({"model.diffusion_model.input_blocks.0.0.weight": (4,)}, ("model", "an SD or SDXL UNet")),
        ({"double_blocks.0.img_attn.qkv.weight": (4,)}, ("model", "Flux or another of its design")),
        (QWEN, ("encoder", "anima")),
        ({**QWEN, "model.layers.28.x": (2,)}, ("encoder", "a language model of width 1024 and 29 layers")),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4,)}, ("encoder", "a T5 model")),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (4,)}, ("encoder", "a CLIP text model")),
        (WAN, ("vae", "anima")),
        ({**WAN, "decoder.conv1.weight": (4, 48, 3, 3, 3)}, ("vae", "Wan 2.2 or another of 48 latent channels")),
        (FLUX_VAE, ("vae", "a picture VAE of 16 latent channels (SD, SDXL, Flux)")),
        (SDXL_LORA, ("lora", "SD or SDXL")),
        ({"diffusion_model.blocks.3.self_attn.q_proj.lora_A.weight": (4, 2)}, ("lora", "anima")),
        ({"x": (1,)}, ("unknown", "nothing that doctor knows")),
    ],
)
def test_files_are_told_by_their_header(tmp_path, tensors, expected):
    assert files.identify(files.read_header(safetensors(tmp_path / "f.safetensors", tensors))) == expected


def folder(tmp_path, **names):
    models = tmp_path / "models" / "any"
    models.mkdir(parents=True)
    whole = {"anima-base-v1.0": ANIMA, "qwen_3_06b_base": QWEN, "qwen_image_vae": WAN, **names}
    for name, tensors in whole.items():
        if tensors is not None:
            safetensors(models / f"{name}.safetensors", tensors)
    return models.parent


def test_right_files_by_header(tmp_path):
    assert found(read(CORPUS / "right_plain.json"), models=folder(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "tensors", "identifier"),
    [
        ("qwen_image_vae", FLUX_VAE, "vae-mismatch"),
        ("qwen_3_06b_base", {"text_model.encoder.layers.0.w": (4,)}, "text-encoder-mismatch"),
        ("anima-base-v1.0", {"double_blocks.0.img_attn.qkv.weight": (4,)}, "checkpoint-mismatch"),
        ("qwen_image_vae", None, "file-missing"),
    ],
)
def test_wrong_files_under_right_names(tmp_path, name, tensors, identifier):
    models = folder(tmp_path, **{name: tensors})
    findings = found(read(CORPUS / "right_plain.json"), models=models)
    assert ids(findings, "error", "warning") == [identifier]
    assert f"{name}.safetensors" in findings[0].summary


def test_loras_by_header(tmp_path):
    models = folder(tmp_path, **{"anima-turbo-lora-v0.2": SDXL_LORA})
    assert ids(found(read(CORPUS / "right_turbo.json"), models=models), "error") == ["lora-mismatch"]


@pytest.mark.parametrize(
    "data", [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 30) + b"{" * 30, struct.pack("<Q", 3) + b"[1]"]
)
def test_damaged_files(tmp_path, data):
    models = folder(tmp_path)
    (models / "any" / "qwen_image_vae.safetensors").write_bytes(data)
    findings = found(read(CORPUS / "right_plain.json"), models=models)
    assert ids(findings, "error", "warning") == ["file-damaged"]


def test_an_unfinished_download(tmp_path):
    models = folder(tmp_path)
    safetensors(models / "any" / "qwen_image_vae.safetensors", WAN, size=600)
    (finding,) = found(read(CORPUS / "right_plain.json"), models=models)
    assert finding.id == "file-damaged" and "600 bytes of" in finding.summary


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("model", "Anima\\anima-base-v1.0.safetensors", "anima"),
        ("model", "animaYume_v2.safetensors", "anima"),
        ("model", "wan2.2_animate_14B.safetensors", "Wan"),
        ("model", "animagine-xl-4.0.safetensors", None),
        ("model", "my_merge.safetensors", None),
        ("encoder", "qwen_3_06b_base.safetensors", "anima"),
        ("encoder", "Qwen3-0.6B.safetensors", "anima"),
        ("encoder", "qwen_3_4b.safetensors", "a larger Qwen3 (other models)"),
        ("encoder", "qwen_2.5_vl_7b.safetensors", "Qwen2.5-VL (Qwen-Image)"),
        ("encoder", "umt5_xxl_fp8.safetensors", "UMT5 (Wan)"),
        ("vae", "qwen_image_vae.safetensors", "anima"),
        ("vae", "wan_2.1_vae.safetensors", "wan2.1"),
        ("vae", "wan2.2_vae.safetensors", "Wan 2.2, 48 channels"),
        ("vae", "something.safetensors", None),
    ],
)
def test_families_by_name(kind, name, expected):
    assert family(kind, name) == expected


# ---- the server's word


def environment(version="0.30.0", argv=(), info=None):
    return {"system_stats": {"system": {"comfyui_version": version, "argv": list(argv)}}, "object_info": info or {}}


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("right_plain", "0.30.0", []),
        ("right_plain", "v0.12.3", []),
        ("right_plain", "0.3.64", ["comfyui-version"]),
        ("right_regions", "0.28.1", ["comfyui-version"]),
        ("right_regions", "0.29.0", []),
        ("right_plain", None, []),
    ],
)
def test_versions(name, version, expected):
    findings = found(read(CORPUS / f"{name}.json"), environment=environment(version))
    assert ids(findings, "error", "warning", "note") == expected


def test_attention_flags():
    for flag in ("--use-flash-attention", "--use-ck-attention"):
        findings = found(read(CORPUS / "right_seed_fixed.json"), environment=environment(argv=["main.py", flag]))
        assert ids(findings, "note") == ["attention-backend"] and ids(findings, "error", "warning") == []


def test_what_a_server_refuses():
    needed = {"ckpt": [["a.safetensors"], {}], "n": ["INT", {"min": 1, "max": 9}], "how": ["COMBO", {"options": ["x"]}]}
    info = {"Odd": {"input": {"required": {**needed, "model": ["MODEL"]}}, "output_node": True}}
    info["Loader"] = {"input": {}, "output": ["MODEL"]}

    def refused(**inputs):
        workflow = read_text("x", json.dumps({"1": {"class_type": "Odd", "inputs": inputs}}), info)
        return ids(found(workflow, environment=environment(info=info)), "error", "warning")

    right = {"ckpt": "a.safetensors", "n": 3, "how": "x", "model": ["1", 0]}
    assert refused(**right) == ["cycle"]
    assert refused(**{**right, "model": ["2", 0]}) == ["dangling-link"]
    del right["model"]
    assert refused(**right) == ["missing-input"]
    assert refused(**{**right, "ckpt": "b.safetensors"}) == ["file-missing", "missing-input"]
    assert refused(**{**right, "n": 12}) == ["missing-input", "value-refused"]
    assert refused(**{**right, "how": "y"}) == ["missing-input", "value-refused"]
    unknown = read_text("x", json.dumps({"1": {"class_type": "Gone", "inputs": {}}}))
    findings = found(unknown, environment=environment(info={"Other": {}}))
    assert "unknown-node" in ids(findings, "error")


# ---- mending

#: What only a person can mend.
UNMENDED = {
    "fault_circle.json",
    "fault_dangling_link.json",
    "fault_mask_shape.json",
    "fault_mask_vanishes.json",
    "fault_missing_input.json",
    "fault_no_output.json",
    "fault_override_by_two_hooks.json",
    "fault_regional_grid.json",
    "fault_regions_unused.json",
    "fault_tiling.json",
    "fault_tiling_hook.json",
    "fault_two_text_encoders.json",
    "fault_unpaired.json",
}


@pytest.mark.parametrize("name", sorted(UNMENDED))
def test_what_a_person_has_to_mend_is_not_touched(name):
    text = (CORPUS / name).read_text()
    fixed = mend(name, text)
    assert fixed.text == text and ids(fixed.left, "error", "warning")


@pytest.mark.parametrize("name", [n for n, e in EXPECTED.items() if e["faults"] and n not in UNMENDED])
def test_fixed_workflows_pass_and_change_nothing_else(name):
    text = (CORPUS / name).read_text()
    fixed = mend(name, text)
    assert ids(fixed.left, "error", "warning") == []
    before, after = read_text(name, text).nodes, read_text(name, fixed.text).nodes
    edited = {edit.node for _, edit in fixed.done}
    readers = {node.id for node in before.values() for _, link in node.links() if link.node in edited}
    for identifier in before.keys() | after.keys():
        if identifier not in edited | readers:
            assert before[identifier].inputs == after[identifier].inputs
    assert mend(name, fixed.text).text == fixed.text
    # As many lines as values were set; a link in the user interface's form is in four places.
    changed = sum(a != b for a, b in zip(text.splitlines(), fixed.text.splitlines(), strict=False))
    if len(text.splitlines()) == len(fixed.text.splitlines()):
        assert changed <= 3 * len(fixed.done) + len(readers)


@pytest.mark.parametrize("name", [name for name, entry in EXPECTED.items() if not entry["faults"]])
def test_right_workflows_are_not_touched(name):
    text = (CORPUS / name).read_text()
    assert mend(name, text).text == text


@pytest.mark.parametrize("layout", [{"indent": 2}, {"indent": "\t"}, {}, {"separators": (",", ":")}])
def test_the_files_own_spelling_stays(layout):
    document = json.loads((CORPUS / "fault_shift_ui.json").read_text())
    document["extra"] = {"größe": "日本\n", "n": [1.50, 1e-7, True, None, {}], "empty": []}
    text = "\n " + json.dumps(document, ensure_ascii=False, **layout) + "\n\n"
    assert mend("x", text).text == text.replace("1.73", "3.0")


def test_patch_text():
    text = '{ "a" : [1, 2.50, {"b": null}],\n "c": "\\u00e9" }'
    assert patch_text(text, json.loads(text)) == text
    assert patch_text(text, {"a": [1, 2.5, {"b": 7}], "c": "é"}) == text.replace("null", "7")
    assert json.loads(patch_text(text, {"a": [1, 2.5], "c": "é", "d": 1})) == {"a": [1, 2.5], "c": "é", "d": 1}
    assert patch_text("[1,2]", [1, 2, 3]) == "[1,2,3]"
    assert patch_text('{"a": {}}', {"a": {"b": 1}}) == '{"a": {"b": 1}}'
    assert patch_text("[1]", [True]) == "[true]" and patch_text("[1]", [1.0]) == "[1.0]"


def test_fix_of_a_png_writes_its_prompt(tmp_path, capsys):
    path = png(tmp_path / "a.png", (1024, 1024), prompt=json.dumps(make().plain(steps=9)))
    code, out, _ = doctor(capsys, path, "--fix", tmp_path / "fixed.json")
    assert code == 0 and "node 7: steps = 30" in out and "it passes" in out
    assert doctor(capsys, tmp_path / "fixed.json")[0] == 0


# ---- the command


def test_exit_codes_and_text(capsys):
    code, out, err = doctor(capsys, CORPUS / "right_plain.json")
    assert (code, err) == (0, "") and "nothing found" in out and "UNETLoader 1 → KSampler 7" in out
    code, out, _ = doctor(capsys, CORPUS / "seed.json")
    assert code == 1 and "1 warning, 2 notes" in out and "docs/doctor.md#bias-strength" in out
    assert doctor(capsys, CORPUS / "right_seed_unpatched.json")[0] == 0  # a note


def test_json(capsys, tmp_path):
    code, out, _ = doctor(capsys, CORPUS / "seed.json", "--json", "--fix", tmp_path / "f.json")
    document = json.loads(out)
    assert code == 0 and document["counts"] == {"error": 0, "warning": 1, "note": 2}
    assert document["fixed"]["edits"] == [{"id": "bias-strength", "node": "13", "input": "strength", "value": 0.35}]
    (sampled,) = document["passes"]
    assert sampled["model_path"] == ["UNETLoader 1"] and sampled["size"] == [1024, 1024] and sampled["shift"] == 3.0
    keys = {"id", "severity", "summary", "nodes", "evidence", "why", "fix", "fixable", "docs"}
    assert all(set(finding) == keys for finding in document["findings"])


@pytest.mark.parametrize(
    "name", ["seed.json", "fault_circle.json", "fault_no_output.json", "right_nested_subgraphs_ui.json"]
)
def test_pictures(name, capsys, tmp_path):
    svg, image = tmp_path / "path.svg", tmp_path / "path.png"
    doctor(capsys, CORPUS / name, "--picture", svg)
    doctor(capsys, CORPUS / name, "--picture", image)
    text = "".join(xml.etree.ElementTree.parse(svg).getroot().itertext()).replace("\n", "")
    for finding in found(read(CORPUS / name)):
        assert finding.id in text
    if name == "seed.json":
        assert all(label in text for label in ("KSampler", "UNETLoader", "AnimaMaskToTokenGrid"))
    with Image.open(image) as drawn:
        width, height = drawn.size
    assert width > 700 and height > 100


def test_picture_of_another_kind(capsys, tmp_path):
    code, _, err = doctor(capsys, CORPUS / "seed.json", "--picture", tmp_path / "a.gif")
    assert code == 2 and "written as .svg or .png" in err


# ---- with a server

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("httpx2") is None or importlib.util.find_spec("websocket") is None,
    reason="needs pip install 'anima-fast[doctor]'",
)


@pytest.fixture
def server():
    import fake_comfyui

    with fake_comfyui.FakeComfyUI() as server:
        yield server


def on_server(tmp_path):
    """A workflow of the nodes and files that the server has; it samples at shift 1."""
    nodes = make().patched("ModelSamplingAuraFlow", shift=1.0)
    for kind, key in (("UNETLoader", "unet_name"), ("CLIPLoader", "clip_name"), ("VAELoader", "vae_name")):
        entry = next(entry for entry in nodes.values() if entry["class_type"] == kind)
        entry["inputs"] = {name: value for name, value in entry["inputs"].items() if name == key}
    nodes["1"]["inputs"]["unet_name"] = "sub/anima-base-v1.0.safetensors"
    path = tmp_path / "w.json"
    path.write_text(json.dumps(nodes))
    return path


@needs_client
def test_the_environment_of_a_server(capsys, tmp_path, server):
    code, out, err = doctor(capsys, on_server(tmp_path), "--comfyui", server.address)
    assert (code, err) == (1, "") and "sampling-shift" in out
    assert "0.38.1" in out and "2.14.1+cu130" in out and "Some GPU" in out and "--use-sage-attention" in out
    assert not server.queued
    # The file of that name is in another folder there, which --fix writes.
    code, out, _ = doctor(
        capsys, CORPUS / "right_plain.json", "--comfyui", server.address, "--fix", tmp_path / "f.json", "--json"
    )
    document = json.loads(out)
    assert {finding["id"] for finding in document["findings"]} == {"file-missing"}
    edits = [(edit["input"], edit["value"]) for edit in document["fixed"]["edits"]]
    assert edits == [("unet_name", "sub/anima-base-v1.0.safetensors")] and code == 0


@needs_client
def test_submit(capsys, tmp_path, server):
    import fake_comfyui

    server.draw = lambda prompt: fake_comfyui.picture()
    code, out, _ = doctor(capsys, on_server(tmp_path), "--comfyui", server.address, "--submit")
    assert code == 1 and "submitted: success" in out and ".png" in out  # 1: of the shift
    assert server.queued[0]["40"]["inputs"]["shift"] == 1.0
    server.refuse = {"7": {"errors": [{"type": "x", "message": "no", "details": ""}], "class_type": "KSampler"}}
    code, out, _ = doctor(capsys, on_server(tmp_path), "--comfyui", server.address, "--submit", "--json")
    assert code == 1 and json.loads(out)["submitted"]["status"] == "refused"


@needs_client
def test_ablate(capsys, tmp_path, server):
    import fake_comfyui

    def draw(prompt):
        wrong = any(entry["inputs"].get("shift") == 1.0 for entry in prompt.values())
        return fake_comfyui.noise() if wrong else fake_comfyui.picture()

    server.draw = draw
    report = tmp_path / "report.html"
    options = ("--comfyui", server.address, "--ablate", "--report", report)
    code, out, err = doctor(capsys, on_server(tmp_path), *options)
    assert "verdict: The model is sampled with a wrong shift" in out, out + err
    assert code == 1 and "test 1 of" in err
    assert "sampling-shift" in report.read_text()
    code, out, _ = doctor(capsys, on_server(tmp_path), *options, "--json")
    assert json.loads(out)["tests"]["verdict"]["fault"] == "sampling"


@needs_client
def test_servers_that_are_none(capsys, tmp_path, server):
    for address, message in (("http://127.0.0.1:9", "no server at"), ("ftp://x", "got 'ftp://x'"), ("", "got")):
        code, out, err = doctor(capsys, on_server(tmp_path), "--comfyui", address)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1, err
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    code, _, err = doctor(capsys, bad, "--comfyui", "http://127.0.0.1:9")
    assert code == 2 and "not JSON" in err


# ---- bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value in line 1, column 1"),
        (b"{'a': 1}", "not JSON"),
        (b'{"1": {"class_type": "X"', "not JSON"),
        (b"\xff\xfe\x00", "neither JSON nor a PNG"),
        (b"[1, 2]", "not a ComfyUI workflow: JSON, but a list"),
        (b"7", "not a ComfyUI workflow: JSON, but a int"),
        (b"{}", "not a ComfyUI workflow"),
        (b'{"name": "x", "size": 3}', "not a ComfyUI workflow: a JSON object with name, size"),
        (b'{"1": {"class_type": "X", "inputs": []}}', "node 1: inputs: got list"),
        (b'{"1": {"class_type": "X"}, "2": {"inputs": {}}}', "node 2: no class_type"),
        (b'{"nodes": [{"id": 1}]}', "a node without id or type"),
        (b'{"nodes": [7]}', "a node without id or type"),
        (b'{"nodes": [{"id": 1, "type": "A"}, {"id": 1, "type": "B"}]}', "two nodes"),
        (b"[" * 100_000, "nested too deep"),
        (b"\x89PNG\r\n\x1a\n" + b"rest", "a damaged PNG"),
    ],
)
def test_what_is_no_workflow(tmp_path, capsys, content, message):
    path = tmp_path / "w.json"
    path.write_bytes(content)
    code, out, err = doctor(capsys, path)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1, err


def test_other_files_that_cannot_be_read(tmp_path, capsys):
    for options, message in (
        ([tmp_path / "none.json"], "No such file"),
        ([tmp_path], "Is a directory"),
        ([png(tmp_path / "plain.png")], "a PNG without a workflow"),
        ([png(tmp_path / "odd.png", prompt="{")], "not JSON"),
        ([CORPUS / "seed.json", "--models", tmp_path / "none"], "--models: got"),
        ([CORPUS / "seed.json", "--png", CORPUS / "seed.json"], "--png: got"),
        ([CORPUS / "seed.json", "--fix", CORPUS / "seed.json"], "--fix: got"),
        ([CORPUS / "seed.json", "--submit"], "together with --comfyui URL"),
        ([CORPUS / "seed.json", "--ablate"], "together with --comfyui URL"),
        ([CORPUS / "seed.json", "--report", "r.html"], "together with --ablate"),
    ):
        code, out, err = doctor(capsys, *options)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1, err


def ui(nodes, links=(), **more):
    return json.dumps({"nodes": nodes, "links": list(links), **more})


def test_links_in_a_circle_of_reroutes():
    reroute = [
        {"id": n, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": n}], "outputs": []} for n in (1, 2)
    ]
    saver = {"id": 3, "type": "SaveImage", "inputs": [{"name": "images", "type": "IMAGE", "link": 3}]}
    links = [[1, 2, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"], [3, 1, 0, 3, 0, "*"]]
    with pytest.raises(WorkflowError, match="node 3, images: its link goes round in a circle"):
        read_text("x", ui([*reroute, saver], links))


def test_subgraphs_that_contain_themselves_or_too_many():
    def definition(name, *inside):
        nodes = [{"id": n, "type": kind} for n, kind in enumerate(inside)]
        return {"id": name, "name": name, "nodes": nodes, "links": [], "inputs": [], "outputs": []}

    endless = {"subgraphs": [definition("a", "b"), definition("b", "a")]}
    with pytest.raises(WorkflowError, match="subgraph a contains itself"):
        read_text("x", ui([{"id": 1, "type": "a"}], definitions=endless))
    levels = {"subgraphs": [definition(f"s{n}", *[f"s{n + 1}"] * 10) for n in range(8)] + [definition("s8", "X")]}
    with pytest.raises(WorkflowError, match="over 100000 nodes once its subgraphs are entered"):
        read_text("x", ui([{"id": 1, "type": "s0"}], definitions=levels))


def large(count):
    """A right workflow and a chain of as many masks, all in use."""
    nodes = make().regions()
    nodes["1000"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 512, "height": 1024}}
    for number in range(1001, 1000 + count):
        nodes[str(number)] = {"class_type": "GrowMask", "inputs": {"mask": [str(number - 1), 0], "expand": 1}}
    nodes["22"]["inputs"]["mask"] = [str(999 + count), 0]
    return nodes


def test_ten_thousand_nodes(tmp_path, capsys):
    path = tmp_path / "large.json"
    path.write_text(json.dumps(large(10_000)))
    start = time.perf_counter()
    code, out, _ = doctor(capsys, path, "--picture", tmp_path / "large.svg")
    assert code == 0 and "10018 nodes" in out
    assert time.perf_counter() - start < 60  # seconds on a busy machine; a quadratic walk would take hours
    nodes = json.loads(path.read_text())
    nodes["1000"] = {"class_type": "GrowMask", "inputs": {"mask": ["10999", 0], "expand": 1}}
    path.write_text(json.dumps(nodes))
    code, out, _ = doctor(capsys, path, "--picture", tmp_path / "large.svg")
    assert code == 1 and "a circle of 10000 nodes" in out


def test_ten_thousand_switches_and_reroutes():
    nodes = make().plain()
    nodes["s0"] = {"class_type": "ComfySwitchNode", "inputs": {"on_false": ["1", 0], "switch": False}}
    for number in range(1, 5000):
        nodes[f"s{number}"] = {
            "class_type": "ComfySwitchNode",
            "inputs": {"on_false": [f"s{number - 1}", 0], "switch": False},
        }
    nodes["7"]["inputs"]["model"] = ["s4999", 0]
    assert found(read_text("x", json.dumps(nodes))) == []


def test_random_damage_never_ends_in_a_traceback():
    """Any value of a right file replaced by another kind of value: findings or a WorkflowError, nothing else."""
    generator = np.random.default_rng(0)
    odd = [None, True, -1, 1.5, "", "x", [], {}, [1, 2], ["1", 0], {"a": 1}, 1e400, "9" * 50]
    texts = [
        (CORPUS / name).read_text()
        for name in ("right_seed_fixed_ui.json", "right_regions.json", "right_nested_subgraphs_ui.json")
    ]
    for text in texts:
        document = json.loads(text)
        places = list(walk(document))
        for turn in range(40):
            changed = copy.deepcopy(document)
            for _ in range(int(generator.integers(1, 4))):
                path = places[generator.integers(len(places))]
                put(changed, path, copy.deepcopy(odd[generator.integers(len(odd))]))
            said = json.dumps(changed)
            try:
                workflow = read_text("x", said)
                found(workflow)
                workflow.to_api()
                if turn % 4 == 0:
                    mend("x", said)
            except WorkflowError:
                pass


def walk(value, path=()):
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from walk(inner, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(value, (dict, list)):
        try:
            value[path[-1]] = new
        except (IndexError, TypeError):
            return


# ---- the documentation


def finding_ids():
    source = "".join(path.read_text() for path in (ROOT / "anima_fast" / "doctor" / "checks").glob("*.py"))
    named = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source)) | {"file-missing", "value-refused"}
    named |= {f"{what}-mismatch" for what in ("checkpoint", "text-encoder", "vae", "lora")}
    return named | {"steps", "cfg", "sampler", "scheduler", "denoise", "noise"}


def test_every_finding_has_its_heading():
    headings = set(re.findall(r"^### ([a-z-]+)$", (ROOT / "docs" / "doctor.md").read_text(), re.M))
    assert headings == finding_ids()


def test_known_widgets_have_no_twins():
    assert all(len(set(names)) == len(names) for names in WIDGETS.values())
