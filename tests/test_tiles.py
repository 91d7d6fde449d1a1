"""Large pictures in tiles and the hires pass, on a tiny random Anima, against computations that know no tiles."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
import torch

pytest.importorskip("diffusers", "0.42", reason="needs diffusers >= 0.42: pip install 'anima-fast[diffusers]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'anima-fast[diffusers]'")
pytest.importorskip("accelerate", reason="needs accelerate: diffusers loads Anima's transformer with it")

import numpy as np
import tiny_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import refused, run

from anima_fast.integrations import diffusers as regional
from anima_fast.runner.chunks import chunked
from anima_fast.runner.request import Request, generate, read_record
from anima_fast.runner.tiles import Layout, Tiles, decode, encode, latents_only, spans, tiled, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline.build()


SIZES = dict(length=st.integers(1, 400), tile=st.integers(4, 64), share=st.floats(0, 1))


@settings(max_examples=200, deadline=None)
@given(**SIZES)
def test_spans(length, tile, share):
    overlap = int(share * (tile // 3))
    found = spans(length, tile, overlap)
    assert found[0][0] == 0 and found[-1][1] == length
    assert len({stop - start for start, stop in found}) == 1 and found[0][1] <= tile
    assert all(before[1] - after[0] >= overlap for before, after in itertools.pairwise(found))
    assert len(found) == 1 or (len(found) - 1) * (tile - overlap) + overlap < length  # one fewer would not do


@settings(max_examples=100, deadline=None)
@given(**SIZES, unit=st.sampled_from([1, 2, 16]))
def test_weights_sum_to_one_exactly(length, tile, share, unit):
    overlap = int(share * (tile // 3))
    found = spans(length, tile, overlap)
    total = torch.zeros(length * unit)
    touched = torch.zeros(length * unit)
    for (start, stop), weight in zip(found, weights(found, overlap, unit), strict=True):
        assert weight.min() >= 0
        total[start * unit : stop * unit] += weight
        touched[start * unit : stop * unit] += weight > 0
    assert torch.equal(total, torch.ones_like(total)) and touched.max() <= 2


@pytest.mark.parametrize("backwards", [False, True])
def test_weights_of_tiles_sum_to_one_exactly(backwards):
    layout = Layout.of(50, 61, 20, 6)
    total = torch.zeros(100, 122)
    parts = list(zip(layout, layout.weights(2, torch.device("cpu")), strict=True))
    for ((top, bottom), (left, right)), weight in reversed(parts) if backwards else parts:
        total[top * 2 : bottom * 2, left * 2 : right * 2] += weight
    assert len(parts) == len(layout) == 16 and torch.equal(total, torch.ones_like(total))


def recorded(pipe, calls):
    """Inputs and outputs of the transformer's calls on tiles."""

    def hook(module, args, kwargs, out):
        tiles = getattr(module, "_anima_fast_tiles", None)
        if tiles is None or tiles.box is not None:
            calls.append((kwargs["hidden_states"].clone(), out[0].clone()))

    return pipe.transformer.register_forward_hook(hook, with_kwargs=True)


ONE_STEP = dict(prompt="blue cat", negative_prompt="left", num_inference_steps=1)
MASKS = {"left": (0, 0, 150, 160), "low": (60, 70, 256, 160)}


def regions(box=(0, 0, 256, 160)):
    found = []
    for (name, place), prompt in zip(MASKS.items(), ("a red house", "a tree"), strict=True):
        mask = Image.new("L", (256, 160), 0)
        mask.paste(255 if name == "left" else 130, place)
        found.append(regional.Region(mask.crop(box), prompt))
    return found


@pytest.mark.parametrize("options", [{}, {"mode": "hard"}, {"combine": "blend"}], ids=str)
def test_a_tile_is_the_same_tile_alone(pipe, options):
    """A tile's prediction is that of a picture of its size with the masks' crops; the canvas is their weighted sum."""
    canvas = torch.randn(1, 16, 1, 20, 32, generator=torch.Generator().manual_seed(1))
    tiles, whole = [], []
    pipe.update_components(guider=pipe.guider.new(guidance_scale=1.0))
    with regional.enable(pipe, regions(), **options) as enabled, tiled(pipe, 96, 32), latents_only(pipe):
        handle = recorded(pipe, tiles)
        out = pipe(**ONE_STEP, width=256, height=160, latents=canvas, output="latents")
        handle.remove()
    layout = Layout.of(10, 16, 6, 2)
    assert len(tiles) == len(layout) == 8 and enabled.served == {"regions": 16}
    blended = torch.zeros_like(canvas)
    place = layout.weights(2, canvas.device)
    for ((top, bottom), (left, right)), (given_in, given_out) in zip(layout, tiles, strict=True):
        assert torch.equal(given_in, canvas[..., top * 2 : bottom * 2, left * 2 : right * 2])
        blended[..., top * 2 : bottom * 2, left * 2 : right * 2] += given_out * next(place)
        box = tuple(side * 16 for side in (left, top, right, bottom))
        alone = []
        with regional.enable(pipe, regions(box), **options), latents_only(pipe):
            handle = recorded(pipe, alone)
            pipe(**ONE_STEP, width=box[2] - box[0], height=box[3] - box[1], latents=given_in, output="latents")
            handle.remove()
        torch.testing.assert_close(alone[0][1], given_out, rtol=1e-4, atol=1e-4)
        whole.append(given_out)
    torch.testing.assert_close(out, canvas - blended, rtol=1e-5, atol=1e-5)  # one step from sigma 1 to 0
    assert max((one - whole[0]).abs().max() for one in whole[1:]) > 0.1


def test_only_the_bound_plans_are_a_tile_s(pipe):
    """The prompts' rows are held once, whatever the number of tiles, and nothing of an earlier run is kept."""
    pipe.update_components(guider=pipe.guider.new(guidance_scale=4.0))
    with regional.enable(pipe, regions()), tiled(pipe, 96, 32), latents_only(pipe):
        for _ in range(2):
            pipe(**ONE_STEP, width=256, height=160, output="latents")
        calls = pipe.transformer._anima_fast.calls
        assert len(calls) == 2 * 8
        assert len({call.context["plain"].data_ptr() for call in calls.values()}) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_tile_is_no_tile(dtype):
    pipe = tiny_pipeline.build()
    pipe.to(dtype)
    request = Request("blue cat", negative="left", size=(96, 64), steps=3, seed=1)
    whole, _ = generate(pipe, request)
    tile, _ = generate(pipe, Request(**vars(request) | {"tiled": True, "tile": 128}))
    # diffusers makes bytes of bf16 in bf16
    assert np.abs(np.array(whole[0]).astype(int) - np.array(tile[0])).max() <= (1 if dtype == torch.float32 else 2)


def test_everything_is_put_back(pipe):
    before = pipe.transformer.forward
    blocks = list(pipe._blocks.sub_blocks)
    with pytest.raises(KeyError), tiled(pipe, 96, 16), latents_only(pipe):
        raise KeyError
    assert pipe.transformer.forward == before and not hasattr(pipe.transformer, "_anima_fast_tiles")
    assert list(pipe._blocks.sub_blocks) == blocks and "forward" not in vars(pipe.transformer)
    with tiled(pipe, 96, 16), pytest.raises(ValueError, match="tiled already"), tiled(pipe, 96, 16):
        pass


@torch.no_grad()
def test_decode(pipe):
    """In strips of bytes what blending the whole canvas in fp64 gives; and without tiles, what diffusers gives."""
    latents = torch.randn(2, 16, 1, 20, 12, generator=torch.Generator().manual_seed(2))
    mean, std = (
        torch.tensor(v).view(1, 16, 1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    real = latents * std + mean
    whole = decode(pipe, latents)
    stock = pipe.image_processor.postprocess(pipe.vae.decode(real).sample[:, :, 0], output_type="pil")
    layout = Layout.of(10, 6, 4, 1)
    expected = torch.zeros(2, 3, 160, 96, dtype=torch.float64)
    for ((top, bottom), (left, right)), weight in zip(layout, layout.weights(16, latents.device), strict=True):
        part = pipe.vae.decode(real[..., top * 2 : bottom * 2, left * 2 : right * 2]).sample[:, :, 0]
        expected[..., top * 16 : bottom * 16, left * 16 : right * 16] += part.double() * weight
    tiles = decode(pipe, latents, Tiles(4, 1))
    for i in range(2):
        assert np.abs(np.array(whole[i]).astype(int) - np.array(stock[i])).max() <= 1
        picture = ((expected[i] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert np.abs(np.array(tiles[i]) - picture).max() <= 0.51
        assert (np.array(tiles[i]) != np.array(whole[i])).any()


def test_encode(pipe):
    from diffusers.modular_pipelines.anima.encoders import encode_vae_image

    image = Image.effect_noise((96, 160), 80).convert("RGB")
    real = pipe.image_processor.preprocess(image)
    with torch.no_grad():
        stock = encode_vae_image(real, pipe.vae, None, "cpu", torch.float32, 16)
    torch.testing.assert_close(encode(pipe, image), stock, rtol=1e-5, atol=1e-5)
    tiles = encode(pipe, image, Tiles(4, 1))
    layout = Layout.of(10, 6, 4, 1)
    expected = torch.zeros_like(tiles)
    for ((top, bottom), (left, right)), weight in zip(layout, layout.weights(2, tiles.device), strict=True):
        with torch.no_grad():
            crop = real[..., top * 16 : bottom * 16, left * 16 : right * 16]
            part = encode_vae_image(crop, pipe.vae, None, "cpu", torch.float32, 16)
        expected[..., top * 2 : bottom * 2, left * 2 : right * 2] += part * weight
    torch.testing.assert_close(tiles, expected, rtol=1e-5, atol=1e-5)


def test_hires_is_image_to_image_of_the_enlarged_picture(pipe):
    """The same by hand: the first picture, enlarged, through the pipeline's own image to image and one generator."""
    request = Request("blue cat", size=(96, 64), steps=4, seed=3, guidance=2.0, hires=1.6, hires_denoise=0.5)
    (picture,), _ = generate(pipe, request)
    assert picture.size == request.final_size == (160, 96)  # 153.6 x 102.4
    generator = torch.Generator().manual_seed(3)
    common = dict(prompt="blue cat", num_inference_steps=4, generator=generator, output="images")
    with regional.enable(pipe):
        first = pipe(**common, width=96, height=64)[0]
        large = first.resize((160, 96), Image.Resampling.LANCZOS)
        second = pipe(**common, width=160, height=96, image=large, strength=0.5)[0]
    assert np.abs(np.array(picture).astype(int) - np.array(second)).max() <= 1


def pixels(path):
    with Image.open(path) as image:
        return np.array(image).astype(int)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, box in MASKS.items():
        mask = Image.new("L", (256, 160), 0)
        mask.paste(255, box)
        mask.save(f"{name}.png")
    Image.effect_noise((100, 70), 80).save("photo.png")
    return tmp_path


TINY = ["--prompt", "blue cat", "--steps", "2", "--seed", "5"]
REGIONS = ["--region", "left.png=a red house", "--region", "low.png=a tree"]


@pytest.mark.parametrize(
    ("options", "size", "calls"),
    [
        (["--size", "192x64", "--tiled", "--tile", "96", *REGIONS], (192, 64), {"regions": 4 * 3, "plain": 4 * 3}),
        (["--size", "96x64", "--hires", "2x", *REGIONS], (192, 128), {"regions": 6, "plain": 6}),
        (["--size", "96x64", "--hires", "2", "--tiled", "--tile", "96", "--overlap", "32", "--batch", "2"],
         (192, 128), {"plain": 8 + 4 * 6}),
        (["--image", "photo.png", "--strength", "0.5", "--tiled", "--tile", "64", "--preview", "1"],
         (96, 64), {"plain": 2 * 2 * 2}),
    ],
    ids=["tiled", "hires", "both, a batch", "image"],
)  # fmt: skip
def test_command(capsys, folder, model, options, size, calls):
    code, out, err = run(capsys, "generate", "--model", model, *TINY, *options, "--out", "a.png", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["size"] == list(size) and report["cross_attention_calls"] == calls
    assert pixels("a.png").shape == (size[1], size[0], 3)
    assert run(capsys, "generate", "--like", "a.png", "--out", "b.png")[0] == 0
    for file in report["files"]:
        assert (folder / file).read_bytes() == (folder / file.replace("a", "b", 1)).read_bytes()
    if "--batch" in options:  # the second picture is that of the next seed
        run(capsys, "generate", "--like", "a.png", "--seed", "6", "--batch", "1", "--out", "six.png")
        difference = np.abs(pixels("a_2.png") - pixels("six.png"))
        assert difference.max() <= 1
    assert run(capsys, "generate", "--like", "a.png", "--no-tiled", "--seed", "9", "--out", "c.png")[0] == 0
    assert not read_record("c.png").tiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tiled", "--tile", "100"], "--tile: got 100; allowed: a multiple of 16, 64 or more"),
        (["--tiled", "--tile", "96", "--overlap", "48"], "--overlap: got 48; allowed: a multiple of 16, at most 32"),
        (["--tiled", "--overlap", "-16"], "--overlap: got -16"),
        (["--hires", "1x"], "--hires: got 1x; allowed: above 1x and at most 16x"),
        (["--hires", "big"], "argument --hires"),
        (["--hires", "nan"], "--hires: got nanx"),
        (["--hires", "2", "--hires-denoise", "0"], "--hires-denoise: got 0.0 of 2 steps"),
        (["--hires", "2", "--hires-denoise", "1.5"], "--hires-denoise: got 1.5 of 2 steps"),
        (["--attention-chunk", "0"], "argument --attention-chunk: got 0"),
        (["--size", "1024x64"], "--size, --hires: got 1024x64 at once; allowed: at most 512 a side; larger ones with"),
        (["--size", "512x64", "--hires", "2"], "--size, --hires: got 1024x128 at once"),
        (["--size", "2048x64", "--tiled"], "--tile: got 1024; allowed: at most 512, for this model"),
    ],
)
def test_bad_input_is_one_line(capsys, folder, model, options, message):
    assert message in refused(capsys, "generate", "--model", model, *TINY, *options)


@pytest.mark.parametrize("queries", [1, 7, 24, 1000])
def test_chunked_attention_is_the_same(pipe, queries):
    request = Request("blue cat", negative="left", size=(96, 64), steps=2, seed=1)  # 24 tokens
    whole, _ = generate(pipe, request)
    latents = {}
    for name, context in (("stock", contextlib.nullcontext()), ("chunked", chunked(pipe, queries))):
        with context, latents_only(pipe):
            generator = torch.Generator().manual_seed(1)
            latents[name] = pipe(**ONE_STEP, width=96, height=64, generator=generator, output="latents")
    torch.testing.assert_close(latents["chunked"], latents["stock"], rtol=1e-4, atol=1e-4)
    chunks, _ = generate(pipe, Request(**vars(request) | {"attention_chunk": queries}))
    assert np.abs(np.array(whole[0]).astype(int) - np.array(chunks[0])).max() <= 1
    assert {type(block.attn1.processor).__name__ for block in pipe.transformer.transformer_blocks} == {
        "CosmosAttnProcessor2_0"
    }


def test_chunked_attention_of_another_processor(pipe):
    with chunked(pipe, 8), pytest.raises(ValueError, match="the attention processor _Chunked"), chunked(pipe, 8):
        pass


@torch.no_grad()
def test_the_padding_mask_is_cut_too():
    """The real transformer reads one; its calls with `return_dict` are served as well."""
    pytest.importorskip("torchvision", reason="diffusers resizes the padding mask with it")
    transformer = tiny_pipeline.components(concat_padding_mask=True)["transformer"]
    pipe = type("Pipe", (), {"transformer": transformer})()
    draw = torch.Generator().manual_seed(3)
    canvas, embeds = torch.randn(1, 16, 1, 20, 12, generator=draw), torch.randn(1, 48, 32, generator=draw)
    mask = (torch.rand(1, 1, 160, 96, generator=draw) > 0.5).float()
    common = {"timestep": torch.tensor([0.5]), "encoder_hidden_states": embeds}
    with tiled(pipe, 64, 16):
        found = transformer(canvas, padding_mask=mask, **common).sample
        plain = transformer(canvas, padding_mask=torch.zeros_like(mask), **common, return_dict=False)[0]
    layout, expected = Layout.of(10, 6, 4, 1), torch.zeros_like(canvas)
    for ((top, bottom), (left, right)), weight in zip(layout, layout.weights(2, canvas.device), strict=True):
        own = mask[..., top * 16 : bottom * 16, left * 16 : right * 16]
        part = canvas[..., top * 2 : bottom * 2, left * 2 : right * 2]
        place = expected[..., top * 2 : bottom * 2, left * 2 : right * 2]
        place += transformer(part, padding_mask=own, **common).sample * weight
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_overlap_hides_the_seams(pipe):
    """The step from pixel to pixel across borders of tiles, against that at the same places of the raster inside."""
    ratio = {}
    for overlap in (0, 32):
        request = Request("blue cat", size=(384, 128), steps=2, seed=1, tiled=True, tile=144, overlap=overlap)
        picture = np.array(generate(pipe, request)[0][0]).astype(float)
        steps = np.abs(np.diff(picture, axis=1)).mean(axis=(0, 2))
        of = spans(24, 9, overlap // 16)
        borders = [(a[1] + b[0]) * 8 for a, b in itertools.pairwise(of)]
        inside = [x for x in range(borders[0] % 16, 384, 16) if x and all(abs(x - b) > 32 for b in borders)]
        ratio[overlap] = np.mean([steps[b - 1] for b in borders]) / np.mean([steps[x - 1] for x in inside])
    assert ratio[32] < 1.25 and ratio[0] > 1.5 * ratio[32]
