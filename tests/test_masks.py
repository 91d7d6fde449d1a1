"""Masks: reading any image, and resampling against slower formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anima_fast import masks
from anima_fast.masks import RESAMPLE, load_mask, resample


def picture(height=6, width=4):
    return (np.arange(height * width).reshape(height, width) * 10 % 256).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_image_files_and_images_of_any_mode(mode, tmp_path):
    grey = Image.fromarray(np.where(picture() > 100, 255, 0).astype(np.uint8))
    expected = torch.from_numpy(np.where(picture() > 100, 1.0, 0.0)).float()
    if mode in ("I;16", "I"):
        image = Image.fromarray((np.array(grey).astype(np.uint16) * 257).astype(np.uint16))
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(np.array(grey).astype(np.float32) / 255)
    else:
        image = grey.convert("RGB").convert(mode) if mode in ("YCbCr", "CMYK", "HSV") else grey.convert(mode)
    torch.testing.assert_close(load_mask(image), expected, atol=0.01, rtol=0)
    if mode not in ("HSV", "F", "I"):
        path = tmp_path / ("mask.tiff" if mode in ("CMYK", "YCbCr") else "mask.png")
        image.save(path)
        torch.testing.assert_close(load_mask(path), expected, atol=0.01, rtol=0)
        torch.testing.assert_close(load_mask(str(path)), expected, atol=0.01, rtol=0)


def test_alpha_multiplies_luminance():
    white = np.full((3, 5, 4), 255, np.uint8)
    white[..., 3] = 51
    torch.testing.assert_close(load_mask(Image.fromarray(white)), torch.full((3, 5), 0.2))


def test_rotation_in_the_file_is_applied(tmp_path):
    image = Image.fromarray(picture(4, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show"
    image.save(tmp_path / "mask.png", exif=exif)
    assert load_mask(tmp_path / "mask.png").shape == (8, 4)


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (1, 1, 5, 7)])
@pytest.mark.parametrize("kind", ["float32", "float64", "bool", "uint8", "uint16", "float16"])
def test_tensors_and_arrays(shape, kind):
    ones = np.ones(shape, bool)
    value = {"uint8": 255, "uint16": 65535}.get(kind, 1)
    array = (ones * value).astype(kind)
    assert torch.equal(load_mask(array), torch.ones(5, 7))
    assert torch.equal(load_mask(torch.from_numpy(array)), torch.ones(5, 7))
    assert load_mask(array).dtype == torch.float32


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(4), ValueError, r"masks\[1\]: got shape \[4\]; allowed: \[H, W\]"),
        (torch.ones(2, 4, 4), ValueError, r"got shape \[2, 4, 4\]; .*one mask a region"),
        (torch.ones(0, 4), ValueError, r"got an empty mask of shape \[0, 4\]"),
        (torch.full((2, 2), math.nan), ValueError, "got 4 NaN or infinite values; allowed: finite"),
        (torch.full((2, 2), math.inf), ValueError, "got 4 NaN or infinite values"),
        (torch.full((2, 2), 1.5), ValueError, r"got values from 1.5 to 1.5; allowed: \[0, 1\]"),
        (torch.full((2, 2), 255.0), ValueError, r"allowed: \[0, 1\] \(divide by 255\?\)"),
        (torch.full((2, 2), -0.5), ValueError, r"got values from -0.5 to -0.5"),
        (torch.full((2, 2), 7), ValueError, r"got values from 7 to 7"),
        (torch.ones(2, 2, dtype=torch.complex64), ValueError, "got a mask of type torch.complex64"),
        (np.array([["a"]]), ValueError, "got an array of type <U1"),
        (7, TypeError, "got int; allowed: a tensor, an array, a PIL image or the path"),
        ("no/such/mask.png", FileNotFoundError, r"masks\[1\]: no file 'no/such/mask.png'"),
    ],
)
def test_bad_masks_name_the_argument(mask, error, message):
    with pytest.raises(error, match=message):
        load_mask(mask, "masks[1]")


def test_rounding_noise_is_clamped():
    assert load_mask(torch.tensor([[1 + 5e-5, -5e-5]])).tolist() == [[1, 0]]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_unreadable_files(content, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="which cannot be read .*allowed: a whole image file"):
        load_mask(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match="which cannot be read"):
        load_mask(path)


def test_huge_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    Image.new("1", (300, 200)).save(path)
    monkeypatch.setattr(masks, "MAX_MASK_PIXELS", 59_999)
    with pytest.raises(ValueError, match="got an image of 300 x 200 pixels; allowed: at most 59999 pixels"):
        load_mask(path)


def test_area_equals_the_mean_over_a_finer_picture():
    """Token averages of a size that does not divide: every pixel split into 12 x 10, then plain means."""
    mask = torch.rand(7, 9)
    fine = mask.repeat_interleave(10, 0).repeat_interleave(12, 1).double()  # 70 x 108
    expected = fine.reshape(10, 7, 12, 9).mean(dim=(1, 3))
    torch.testing.assert_close(resample(mask, (10, 12)), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("size", [(4, 3), (8, 12), (16, 6)])
def test_methods_equal_torch_interpolation_where_it_is_defined_the_same(size):
    mask = torch.rand(8, 12)
    four = mask.double()[None, None]
    interpolate = torch.nn.functional.interpolate
    close = dict(atol=1e-7, rtol=0)
    torch.testing.assert_close(resample(mask, size), interpolate(four, size, mode="area")[0, 0], **close)
    expected = interpolate(four, size, mode="nearest-exact")[0, 0]
    torch.testing.assert_close(resample(mask, size, method="nearest"), expected, **close)
    expected = interpolate(four, size, mode="bilinear")[0, 0]
    torch.testing.assert_close(resample(mask, size, method="bilinear"), expected, **close)
    expected = torch.nn.functional.adaptive_max_pool2d(four, size)[0, 0]
    torch.testing.assert_close(resample(mask, size, method="max"), expected, **close)


@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from(RESAMPLE),
    st.integers(0, 99),
)
def test_weights_stay_in_range_and_constants_stay_constant(pixels, tokens, method, seed):
    mask = torch.rand(pixels, generator=torch.Generator().manual_seed(seed))
    weights = resample(mask, tokens, method=method)
    assert weights.shape == tokens and float(weights.min()) >= 0 and float(weights.max()) <= 1
    ones = resample(torch.ones(pixels), tokens, method=method)
    torch.testing.assert_close(ones, torch.ones_like(ones), atol=1e-12, rtol=0)
    if method == "area":
        assert float(weights.mean()) == pytest.approx(float(mask.double().mean()), abs=1e-6)


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(RESAMPLE), st.data())
def test_a_window_on_token_borders_is_the_crop_of_the_whole(rows, columns, method, data):
    pixels = data.draw(st.tuples(st.integers(1, 25), st.integers(1, 25)))
    mask = torch.rand(pixels, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    top, bottom = sorted(
        data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows)).filter(lambda x: x[0] != x[1]))
    )
    left, right = sorted(
        data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns)).filter(lambda x: x[0] != x[1]))
    )
    whole = resample(mask, (rows, columns), method=method)
    window = (top / rows, left / columns, bottom / rows, right / columns)
    part = resample(mask, (bottom - top, right - left), window=window, method=method)
    torch.testing.assert_close(part, whole[top:bottom, left:right], atol=1e-6, rtol=0)


def test_an_odd_latent_covers_half_of_its_last_token():
    """33 latent rows are 16.5 tokens, padded to 17: the last token sees only the last half row of the picture."""
    mask = torch.zeros(33, 1)
    mask[32] = 1
    weights = resample(mask, (17, 1), canvas=(16.5, 1))
    assert weights.flatten().tolist() == [0] * 16 + [1]
    beyond = resample(mask, (19, 1), canvas=(16.5, 1))
    assert beyond.flatten().tolist() == [0] * 16 + [1] * 3
