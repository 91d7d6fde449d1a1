"""`anima-fast generate` on a tiny random Anima: run in process, from the options to the PNG and back."""

from __future__ import annotations

import base64
import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers >= 0.42: pip install 'anima-fast[diffusers]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'anima-fast[diffusers]'")
pytest.importorskip("accelerate", reason="needs accelerate: diffusers loads Anima's transformer with it")

import huggingface_hub
import numpy as np
import tiny_pipeline
from huggingface_hub import errors
from PIL import Image, PngImagePlugin
from test_cli import refused, run

from anima_fast.integrations import diffusers as regional
from anima_fast.runner.model import DEFAULT_MODEL, find
from anima_fast.runner.request import CHUNK, Request, read_record

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with masks; what the commands below name is relative to it."""
    monkeypatch.chdir(tmp_path)
    for name, box in (("left.png", (0, 0, 50, 64)), ("right.png", (50, 0, 96, 64)), ("a=b.png", (0, 0, 96, 20))):
        image = Image.new("L", (96, 64), 0)
        image.paste(255, box)
        image.save(name)
    Image.linear_gradient("L").resize((100, 70)).save("photo.png")
    return tmp_path


TINY = ["--prompt", "blue cat", "--negative", "left", "--size", "96x64", "--steps", "2", "--seed", "5"]
REGIONS = ["--region", "left.png=a red house", "--region", "right.png=a tree", "--region-strength", "1", "0.8"]


def pixels(path):
    return np.array(Image.open(path))


def test_regions_and_the_same_again(capsys, folder, model):
    code, out, err = run(capsys, "generate", "--model", model, *TINY, *REGIONS, "--out", "a.png")
    assert (code, err) == (0, "") and out.startswith("a.png: 96 x 64, seed 5, 2 steps")
    assert pixels("a.png").shape == (64, 96, 3)
    for name in ("left.png", "right.png"):
        (folder / name).unlink()  # the picture holds them
    code, out, err = run(capsys, "generate", "--like", "a.png", "--out", "b.png", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["files"] == ["b.png"] and report["seed"] == 5 and report["warnings"] == []
    assert report["cross_attention_calls"] == {"regions": 4, "plain": 4}
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    run(capsys, "generate", "--like", "b.png", "--seed", 6, "--out", "c.png")
    assert (pixels("a.png") != pixels("c.png")).any() and read_record("c.png").seed == 6


def test_it_is_what_the_library_gives(capsys, folder, model):
    run(capsys, "generate", "--model", model, *TINY, *REGIONS, "--plan", "mode=hard", "eps=0.01", "--out", "a.png")
    pipe = tiny_pipeline.build()
    regions = [regional.Region("left.png", "a red house"), regional.Region("right.png", "a tree", 0.8)]
    with regional.enable(pipe, regions, mode="hard", eps=0.01):
        image = pipe(
            prompt="blue cat",
            negative_prompt="left",
            width=96,
            height=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(5),
            output="images",
        )[0]
    assert (np.array(image) == pixels("a.png")).all()


OTHERS = {
    "no regions": [],
    "batch": [*REGIONS, "--batch", "2"],
    "guidance off": [*REGIONS, "--guidance", "1"],
    "shift": ["--shift", "1.5"],
    "blend": [*REGIONS, "--plan", "combine=blend", "base_weight=0.3", "normalize_overlaps=false"],
    "window": [*REGIONS, "--start", "0.4", "--end", "0.6", "--outside", "base"],
    "no base": [*REGIONS, "--no-base"],
    "priority": ["--region", "left.png=cat", "--region", "a=b.png=x = y", "--region-priority", "0", "1"],
    "image": ["--image", "photo.png", "--strength", "0.5", *REGIONS],
    "bf16": ["--dtype", "bf16"],
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_every_option_matters_and_is_repeated(capsys, folder, model, options):
    common = ["generate", "--model", model, *TINY]
    reference = list(REGIONS) if "--region" in options and "--region-priority" not in options else []
    assert run(capsys, *common, *options, "--out", "a.png")[0] == 0
    assert run(capsys, *common, *reference, "--out", "plain.png")[0] == 0
    assert run(capsys, "generate", "--like", "a.png", "--out", "b.png")[0] == 0
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    if options and "--batch" not in options:
        assert (pixels("a.png") != pixels("plain.png")).any()
    if "--batch" in options:
        assert (folder / "a_2.png").read_bytes() == (folder / "b_2.png").read_bytes()
        run(capsys, *common, *REGIONS, "--seed", "6", "--out", "six.png")
        difference = np.abs(pixels("a_2.png").astype(int) - pixels("six.png"))
        assert difference.max() <= 1  # the second picture is that of the next seed, up to rounding
    if "--region-priority" in options:
        assert read_record("a.png").regions[1].prompt == "x = y"


def test_like_with_other_options(capsys, folder, model):
    run(capsys, "generate", "--model", model, *TINY, *REGIONS, "--plan", "mode=hard", "--out", "a.png")
    changes = ["--prompt", "a house", "--plan", "resample=nearest", "--region", "a=b.png=green", "--base"]
    run(capsys, "generate", "--like", "a.png", *changes, "--out", "b.png")
    was, now = read_record("a.png"), read_record("b.png")
    assert now.prompt == "a house" and now.negative == was.negative == "left"
    assert now.plan == {"mode": "hard", "resample": "nearest"}
    assert [(r.mask.name, r.prompt) for r in now.regions] == [("a=b.png", "green")]


def test_seeds_sizes_and_types_by_default(capsys, folder, model):
    few = ["--prompt", "cat", "--steps", "2", "--image", "photo.png", "--strength", "0.5"]
    seeds = []
    for name in ("a.png", "b.png"):
        code, out, _ = run(capsys, "generate", "--model", model, *few, "--device", "cpu", "--out", name, "--json")
        assert code == 0
        report = json.loads(out)
        seeds.append(report["seed"])
        assert (report["size"], report["dtype"]) == ([96, 64], "fp32")  # photo.png is 100 x 70
    assert seeds[0] != seeds[1]


def test_preview(capsys, folder, model, monkeypatch):
    from anima_fast.commands import generate

    written = []

    def write(image, path, request=None):
        write_png(image, path, request)
        written.append((path.name, image.size, request is None))

    write_png = generate.write_png
    monkeypatch.setattr(generate, "write_png", write)
    run(capsys, "generate", "--model", model, *TINY, "--steps", "5", "--preview", "2", "--batch", "2", "--out", "a.png")
    assert written[:2] == [("a.preview.png", (96, 64), True)] * 2 and len(written) == 4
    assert (folder / "a.preview.png").is_file()


def test_the_last_preview_is_the_picture(folder, model):
    """Without noise left to take away, what `preview` shows is the result, up to rounding."""
    from anima_fast.runner.model import load
    from anima_fast.runner.request import generate, preview

    shown = []
    pipe = load(
        model, dtype=torch.float32, device="cpu", after_step=lambda i, n, state: shown.append(preview(pipe, state))
    )
    images, _ = generate(pipe, Request("blue cat", size=(96, 64), steps=3, seed=1))
    assert np.abs(np.array(shown[-1]).astype(int) - np.array(images[0])).max() <= 1
    assert (np.array(shown[0]) != np.array(images[0])).any()


def test_warnings(capsys, folder, model):
    Image.new("L", (64, 64), 255).save("square.png")
    few = ["--model", model, *TINY, "--region", "square.png=cat", "--start", "0.6", "--end", "0.7", "--out", "a.png"]
    code, out, err = run(capsys, "generate", *few)
    assert code == 0 and out.startswith("a.png")
    lines = err.splitlines()
    assert lines[0].endswith("warning: the mask square.png is 64 x 64 and is stretched to 96 x 64")
    assert lines[1].endswith("warning: no step fell between --start 0.6 and --end 0.7: no region acted")
    assert json.loads(run(capsys, "generate", *few, "--json")[1])["warnings"] == [
        line.partition("warning: ")[2] for line in lines
    ]


def test_nan_is_a_problem(capsys, folder, tmp_path):
    pipe = tiny_pipeline.build()
    pipe.transformer.proj_out.weight.fill_(torch.nan)
    pipe.save_pretrained(str(tmp_path / "nan"), overwrite_modular_index=True)
    code, out, err = run(capsys, "generate", "--model", tmp_path / "nan", *TINY, "--out", "a.png")
    assert (code, out) == (1, "") and "NaN in fp32" in err
    assert not (folder / "a.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompt: got nothing"),
        (["--prompt", "a", "--size", "100x64"], "--size: got 100x64; allowed: multiples of 16, such as 96x64"),
        (["--prompt", "a", "--size", "big"], "argument --size: got 'big'"),
        (["--prompt", "a", "--steps", "0"], "argument --steps: got 0"),
        (["--prompt", "a", "--seed", "-1"], "--seed: got -1"),
        (["--prompt", "a", "--guidance", "-1"], "--guidance: got -1"),
        (["--prompt", "a", "--shift", "0"], "--shift: got 0"),
        (["--prompt", "a", "--region", "left.png"], "--region: got 'left.png'; allowed: MASK=PROMPT"),
        (["--prompt", "a", "--region", "nowhere.png=cat"], "--region: no file 'nowhere.png'"),
        (["--prompt", "a", "--region", "text.png=cat"], "--region text.png: got 'text.png', which cannot be read"),
        (["--prompt", "a", *REGIONS[:4], "--region-strength", "1"], "--region-strength: got 1 numbers for 2 regions"),
        (["--prompt", "a", *REGIONS[:4], "--region-strength", "1", "-2"], "--region-strength[1]: got -2"),
        (["--prompt", "a", "--region-priority", "1"], "--region-strength, --region-priority: got numbers without"),
        (["--prompt", "a", "--plan", "hard"], "--plan: got 'hard'; allowed: NAME=VALUE"),
        (["--prompt", "a", "--plan", "modus=hard"], "--plan: got the unknown 'modus'; allowed: mode |"),
        (["--prompt", "a", *REGIONS, "--plan", "mode=medium"], "--plan: mode: got 'medium'"),
        (["--prompt", "a", "--plan", "eps=small"], "--plan: eps: got 'small'; allowed: a number"),
        (["--prompt", "a", "--plan", "normalize_overlaps=1"], "--plan: normalize_overlaps: got '1'"),
        (["--prompt", "a", "--start", "0.5", "--end", "0.2"], "--start, --end: got 0.5 and 0.2"),
        (["--prompt", "a", "--image", "nowhere.png"], "--image: no file 'nowhere.png'"),
        (["--prompt", "a", "--image", "text.png"], "--image: got 'text.png', which cannot be read"),
        (["--prompt", "a", "--image", "photo.png", "--strength", "0"], "--strength: got 0.0"),
        (["--prompt", "a", "--image", "photo.png", "--strength", "0.01"], "--strength: got 0.01 of 30 steps"),
        (["--prompt", "a", "--out", "a.jpg"], "--out: got 'a.jpg'"),
        (["--prompt", "a", "--out", "nowhere/a.png"], "--out: the directory 'nowhere' does not exist"),
        (["--prompt", "a", "--device", "abacus"], "--device: got 'abacus'"),
        (["--like", "nowhere.png"], "--like: no file 'nowhere.png'"),
        (["--like", "left.png"], "--like: got 'left.png', without a record"),
        (["--like", "text.png"], "--like: got 'text.png', which cannot be read"),
        (["--prompt", "a", "--model", "./nowhere"], "--model: no directory './nowhere'"),
        (["--prompt", "a", "--model", "left.png"], "--model: got 'left.png', which is a file"),
        (["--prompt", "a", "--model", "."], "has no modular_model_index.json; allowed: a model in diffusers' form"),
        (["--prompt", "a", "--model", "anima-base-v1.0.safetensors"], "single files as ComfyUI takes them"),
        (["--prompt", "a", "--model", "circlestone-labs/Anima"], f"a hub name: {DEFAULT_MODEL}"),
        (["--prompt", "a", "--model", "comfy"], "(anima-base-v1.0.safetensors); allowed: a model in diffusers' form"),
        (["--prompt", "a", "--model", "flux"], "a FluxPipeline; allowed: an Anima model"),
        (["--prompt", "a", "--model", "broken"], "modular_model_index.json', which cannot be read"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, options, message):
    (folder / "text.png").write_text("no picture")
    for name in ("comfy", "flux", "broken"):
        (folder / name).mkdir()
    (folder / "comfy" / "anima-base-v1.0.safetensors").touch()
    (folder / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (folder / "broken" / "modular_model_index.json").write_text("{")
    assert message in refused(capsys, "generate", *options)


@pytest.mark.parametrize("part", ["transformer", "tokenizer", "vae", "scheduler"])
def test_a_model_that_is_not_whole(capsys, folder, model, part):
    shutil.copytree(model, "copy")
    shutil.rmtree(f"copy/{part}")
    index = folder / "copy" / "modular_model_index.json"
    index.write_text(index.read_text().replace(str(model), str(folder / "copy")))
    error = refused(capsys, "generate", "--model", "copy", *TINY)
    assert f"whose {part} cannot be loaded" in error and "allowed: a whole download" in error


def test_a_model_that_was_moved(capsys, folder, model):
    """Its index names another place, as that of a downloaded one names the hub."""
    shutil.copytree(model, "copy")
    index = folder / "copy" / "modular_model_index.json"
    index.write_text(index.read_text().replace(str(model), DEFAULT_MODEL))
    assert run(capsys, "generate", "--model", "copy", *TINY, "--out", "a.png")[0] == 0


def test_damaged_records(capsys, folder):
    good = Request("cat").to_json()
    image = {"name": "a.png", "data": base64.b64encode(b"x").decode()}
    for record, message in [
        ("{", "cannot be read"),
        ("[]", "record: got list; allowed: an object"),
        (json.dumps(good | {"colour": 1}), "the unknown 'colour'"),
        (json.dumps(good | {"steps": "many"}), "record: steps: got str"),
        (json.dumps(good | {"regions": [{"mask": {}, "prompt": "a"}]}), "record: got one that does not fit"),
        (json.dumps(good | {"image": image | {"data": "%"}}), "'a.png' is damaged"),
        (json.dumps({"seed": 1}), "record: got one that does not fit"),
    ]:
        info = PngImagePlugin.PngInfo()
        info.add_text(CHUNK, record)
        Image.new("L", (16, 16)).save("a.png", pnginfo=info)
        error = refused(capsys, "generate", "--like", "a.png")
        assert "--like: " in error and message in error


def fail(error, *_, **__):
    raise error


def test_the_hub(monkeypatch, tmp_path, model):
    """Found, not found, terms to accept, no network with and without an earlier download."""
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **_: asked.append(name))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(model))
    assert find("someone/anima") == model and asked == ["someone/anima"]
    no_network = ConnectionError("name or service not known\nsecond line")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: fail(no_network))
    assert find(DEFAULT_MODEL) == model
    missing = errors.LocalEntryNotFoundError("no")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: fail(missing))
    with pytest.raises(FileNotFoundError, match=r"never downloaded .* \(name or service not known\)\. With a network"):
        find(DEFAULT_MODEL)
    for kind, message in (
        (errors.RepositoryNotFoundError, "no directory 'someone/anima', and the hub has no model of that name"),
        (errors.GatedRepoError, "log in with `hf auth login`"),
    ):
        error = kind.__new__(kind)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, error=error, **__: fail(error))
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            find("someone/anima")


def test_packages_that_are_missing(capsys, monkeypatch, folder, model):
    import importlib.util

    find_spec = importlib.util.find_spec
    for package in ("diffusers", "accelerate"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, p=package: None if name == p else find_spec(name))
        error = refused(capsys, "generate", "--model", model, *TINY)
        assert f"{package} not installed: pip install 'anima-fast[diffusers]'" in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    shutil.copytree(model, "copy")
    config = folder / "copy" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"concat_padding_mask": false', '"concat_padding_mask": true'))
    assert "torchvision is not installed" in refused(capsys, "generate", "--model", "copy", *TINY)
