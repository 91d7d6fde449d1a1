"""doctor's corpus on a real server: its widgets are those doctor knows, and what --fix writes is accepted."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from anima_fast.doctor import checks, workflow
from anima_fast.doctor.case import Case
from anima_fast.doctor.fix import fix
from anima_fast.doctor.node_types import WIDGETS

CORPUS = Path(__file__).parents[1] / "workflows"
EXPECTED = json.loads((CORPUS / "expected.json").read_text())

#: Names in the corpus, as empty files: the server lists and accepts them; prompts are taken back at once.
FILES = {
    "diffusion_models": ("anima-base-v1.0", "anima_diffusion", "anima-preview3-base", "cosmos_predict2_2B_t2i"),
    "text_encoders": ("qwen_3_06b_base", "anima_clip", "qwen_3_06b_anima_tuned", "t5xxl_fp16"),
    "vae": ("qwen_image_vae", "anima_vae", "sdxl_vae", "ae"),
    "loras": ("anima-turbo-lora-v0.2",),
    "model_patches": ("anima-lllite-depth-1",),
}


@pytest.fixture(scope="module")
def address(comfy, tmp_path_factory):
    import live_server
    from PIL import Image

    base = tmp_path_factory.mktemp("comfyui")
    with live_server.started(base) as address:
        for folder, names in FILES.items():
            (base / "models" / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                (base / "models" / folder / f"{name}.safetensors").touch()
        (base / "input").mkdir(exist_ok=True)
        for name in ("photo.png", "depth.png"):
            Image.new("RGB", (64, 64)).save(base / "input" / name)
        yield address


@pytest.fixture(scope="module")
def info(address):
    with urllib.request.urlopen(address + "/object_info", timeout=60) as answer:
        return json.load(answer)


def post(address, path, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return json.loads(error.read())


def test_widgets_are_known_in_their_order(info):
    """A newer ComfyUI may have more of them behind; what a file has is named right."""
    for kind, names in WIDGETS.items():
        if kind in info:
            theirs = [name for name, _, _ in workflow._widgets_by_schema(info[kind], [None] * 50) if name != "upload"]
            shared = min(len(theirs), len(names))
            assert list(names[:shared]) == theirs[:shared], kind


@pytest.mark.parametrize("name", EXPECTED)
def test_what_fix_writes_is_accepted(address, info, name):
    def read(text):
        return workflow.read_text(name, text, info)

    def check(read_workflow):
        return checks.run(Case(read_workflow, environment={"object_info": info}))

    fixed = fix((CORPUS / name).read_text(), read, check)
    left = [finding for finding in fixed.left if finding.severity != "note"]
    if {finding.id for finding in left} == {"unknown-node"}:
        pytest.skip(f"this server lacks a pack: {left[0].summary}")
    if left:
        assert not any(finding.edits for finding in left), [finding.summary for finding in left]
        pytest.skip(f"a person has to mend it: {left[0].summary}")
    answer = post(address, "/prompt", {"prompt": read(fixed.text).to_api(info), "client_id": "doctor"})
    post(address, "/queue", {"clear": True})
    post(address, "/interrupt", {})
    assert answer.get("node_errors") == {} and "error" not in answer, answer


def test_the_regional_pack_is_there(info):
    if "AnimaMaskToTokenGrid" not in info:
        assert not os.environ.get("ANIMA_FAST_REGIONAL_NODES")
        pytest.skip("needs anima-regional-comfy-nodes: set ANIMA_FAST_REGIONAL_NODES to a checkout")
