"""Pictures of any mode and orientation against Pillow; pixels against OpenCV's and torchvision's own transforms."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

import gesso.data.decode as decode
from gesso.data.decode import colour, draw, read_picture, reduced_size, reduction
from gesso.data.placement import Placement
from gesso.data.transforms import Direct
from gesso.errors import DataError


def smooth(height=60, width=90, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth().save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    found = read_picture(path)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert found.shape == expected.shape == ((90, 60, 3) if orientation > 4 else (60, 90, 3))
    assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("L", "png"),
        ("1", "png"),
        ("P", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    smooth().convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    found = read_picture(path).astype(int)
    assert found.shape == (60, 90, 3)
    assert np.abs(found - expected).max() <= 2


DEEP = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.pgm"])
def test_sixteen_bits_keep_the_high_byte(tmp_path, name):
    """The whole range is scaled to 8 bits: nothing is clipped at 255."""
    deep = DEEP.astype(">u2") if name == "big.tif" else DEEP
    image = Image.frombytes("I;16B", (90, 60), deep.tobytes()) if name == "big.tif" else Image.fromarray(deep)
    image.save(tmp_path / name)
    found = read_picture(tmp_path / name)
    assert np.array_equal(found, np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=2))
    assert found.min() == 0 and found.max() == 255 and len(np.unique(found)) == 256


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_of_colour_are_scaled(tmp_path, channels):
    colours = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1], DEEP][:channels], axis=-1)
    cv2.imwrite(str(tmp_path / "a.png"), colours[..., [2, 1, 0, 3][:channels]])
    found = read_picture(tmp_path / "a.png")
    assert np.abs(found.astype(int) - (colours[..., :3] >> 8)).max() <= 1


PATCHES = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90), "white": (255,) * 3}


def patches():
    """Patches of 16 x 16 pixels side by side."""
    parts = [np.full((16, 16, 3), colour, np.uint8) for colour in PATCHES.values()]
    return Image.fromarray(np.concatenate(parts, axis=1))


def patch_means(picture):
    return picture.reshape(16, -1, 16, 3)[4:12, :, 4:12].mean((0, 2))


def test_cmyk_has_the_right_colours(tmp_path):
    """Adobe's files hold the inks inverted; OpenCV, which knows that too, is the other opinion."""
    patches().convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == "CMYK"
    found = read_picture(tmp_path / "a.jpg")
    assert np.abs(patch_means(found) - np.array(list(PATCHES.values()))).max() <= 4
    other = cv2.imread(str(tmp_path / "a.jpg"), cv2.IMREAD_COLOR_RGB)
    assert np.abs(patch_means(found) - patch_means(other)).max() <= 4
    patches().convert("CMYK").save(tmp_path / "a.tif")
    assert np.abs(patch_means(read_picture(tmp_path / "a.tif")) - np.array(list(PATCHES.values()))).max() <= 1


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_have_the_right_colours(tmp_path, transparent):
    image = patches().convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    image.save(tmp_path / "a.png", **({"transparency": 0} if transparent else {}))
    image.save(tmp_path / "a.gif", **({"transparency": 0} if transparent else {}))
    for name in ("a.png", "a.gif"):
        found = read_picture(tmp_path / name)
        assert np.abs(patch_means(found) - np.array(list(PATCHES.values()))).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_alpha_is_dropped_and_not_blended(tmp_path, name):
    image = patches().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(0, 80, dtype=np.uint8) * 3 + 1, (16, 1))))
    image.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    assert np.array_equal(read_picture(tmp_path / name), np.asarray(patches()))


def test_grey_is_the_same_in_all_channels(tmp_path):
    ramp = np.tile(np.arange(80, dtype=np.uint8) * 3, (16, 1))
    for name, image in {
        "a.png": Image.fromarray(ramp),
        "alpha.png": Image.merge("LA", [Image.fromarray(ramp), Image.fromarray(255 - ramp)]),
        "a.jpg": Image.fromarray(ramp),
    }.items():
        image.save(tmp_path / name, **({"quality": 100} if name == "a.jpg" else {}))
        found = read_picture(tmp_path / name)
        assert np.abs(found.astype(int) - ramp[..., None]).max() <= (2 if name == "a.jpg" else 0)
        assert np.ptp(found.astype(int), axis=2).max() == 0
    bits = Image.fromarray(ramp > 100)
    bits.save(tmp_path / "bits.png")
    assert np.array_equal(read_picture(tmp_path / "bits.png")[..., 1], (ramp > 100) * np.uint8(255))


def test_one_pixel_is_a_picture(tmp_path):
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg").shape == (1, 1, 3)


def jpeg_bytes():
    buffer = io.BytesIO()
    smooth(200, 300).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"this is a text file\n" * 20, "no picture"),
        (jpeg_bytes()[:700], "broken"),
        (jpeg_bytes()[:-300], "broken"),
        (jpeg_bytes()[:10], "broken"),
        (b"\xff\xd8", "no picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "no picture|broken"),
    ],
)
def test_broken_files_are_named(tmp_path, data, what):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=what) as caught:
        read_picture(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(DataError, match="cannot be read") as caught:
            read_picture(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    smooth(50, 70).save(path)
    monkeypatch.setattr(decode, "MAX_PIXELS", 50 * 70)
    read_picture(path)
    monkeypatch.setattr(decode, "MAX_PIXELS", 50 * 70 - 1)
    with pytest.raises(DataError, match="70 x 50"):
        read_picture(path)


def test_a_picture_of_400_megapixels_is_refused(tmp_path):
    header = bytearray(jpeg_bytes())
    at = header.find(b"\xff\xc0")
    header[at + 5 : at + 9] = (20_000).to_bytes(2, "big") * 2
    (tmp_path / "a.jpg").write_bytes(header)
    with pytest.raises(DataError, match="20000 x 20000 = 400 megapixels"):
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize("flip", [False, True])
def test_drawing_is_torchvisions_resize_crop_flip_and_pad(flip):
    picture = np.asarray(smooth(60, 90)).copy()
    placement = Placement((60, 90), (80, 120), (7, 11), (64, 96), (64, 128), flip)
    canvas = np.zeros((64, 128, 3), np.uint8)
    draw(picture, placement, canvas)
    expected = F.resize(torch.from_numpy(picture).permute(2, 0, 1), [80, 120], antialias=False)
    expected = F.crop(expected, 7, 11, 64, 96)
    expected = F.horizontal_flip(expected) if flip else expected
    expected = F.pad(expected, [0, 0, 32, 0]).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(canvas.astype(int) - expected).max() <= 1
    assert not canvas[:, 96:].any()


def test_strong_reduction_does_not_alias():
    fine = np.zeros((200, 200, 3), np.uint8)
    fine[::2] = 255
    canvas = np.zeros((64, 64, 3), np.uint8)
    placement = Placement((200, 200), (64, 64), (0, 0), (64, 64), (64, 64))
    draw(fine, placement, canvas)
    assert np.ptp(canvas.astype(int)) < 90
    same = dataclasses.replace(placement, original=(64, 64))
    draw(canvas.copy(), same, again := np.zeros_like(canvas))
    assert np.array_equal(canvas, again)


@pytest.mark.parametrize(
    "factors", [(1.3, 1.0, 1.0), (0.6, 1.0, 1.0), (1.0, 1.4, 1.0), (1.0, 0.7, 1.0), (1.0, 1.0, 1.5), (1.2, 0.8, 0.5)]
)
def test_colour_is_torchvisions_jitter(factors):
    picture = np.asarray(smooth(40, 50)).copy()
    expected = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    brightness, contrast, saturation = factors
    expected = F.adjust_brightness(expected, brightness)
    expected = F.adjust_contrast(expected, contrast)
    expected = F.adjust_saturation(expected, saturation)
    canvas = np.zeros((64, 64, 3), np.uint8)
    canvas[:40, :50] = picture
    colour(canvas[:40, :50], factors)
    difference = np.abs(canvas[:40, :50].astype(int) - expected.permute(1, 2, 0).numpy().astype(int))
    assert difference.max() <= 2
    assert not canvas[40:].any() and not canvas[:, 50:].any()


def shrink(height, width, side, flip=False):
    """The placement of a whole picture with its long side ``side``."""
    placement = Direct(side=side).place(height, width, shape=0, scale=0, key=None)
    return dataclasses.replace(placement, flip=flip)


def waves(height, width, length=70):
    """Slow waves of three colours whose phase tells every place, out to the last pixel."""
    y, x = np.mgrid[:height, :width] * (2 * np.pi / length)
    return (127 + 120 * np.stack([np.sin(x), np.sin(y), np.cos(x + y)], -1)).astype(np.uint8)


def on_canvas(picture, placement):
    canvas = np.zeros((*placement.canvas, 3), np.uint8)
    draw(picture, placement, canvas)
    return canvas.astype(int)


@given(height=st.integers(1, 9000), width=st.integers(1, 9000), side=st.sampled_from([32, 448, 1024]))
def test_a_reduced_picture_keeps_a_third_more_pixels_than_are_drawn(height, width, side):
    placement = shrink(height, width, side)
    number, reduced = reduction(placement), reduced_size(placement)
    assert reduced == (-(-height // number), -(-width // number))
    if number > 1:
        assert all(3 * a >= 4 * b * (1 - 1e-9) for a, b in zip(reduced, placement.resized, strict=True))
    if number < 8:
        assert min(height / placement.resized[0], width / placement.resized[1]) < 4 / 3 * 2 * number * (1 + 1e-9)


@pytest.mark.parametrize(
    ("size", "side", "number"),
    [
        ((480, 640), 448, 1),
        ((960, 1280), 448, 2),
        ((3000, 4000), 448, 4),
        ((3000, 4000), 1056, 2),
        ((960, 1280), 800, 1),
    ],
)
def test_common_pictures_are_reduced(size, side, number):
    assert reduction(shrink(*size, side)) == number


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(1024, 1536), (1001, 1503), (1007, 911)])
@pytest.mark.parametrize("side", [64, 128, 256])
def test_a_reduced_picture_is_drawn_where_the_whole_one_is(tmp_path, side, height, width, flip):
    """Also at its far ends, where the last pixel of the reduced picture is not full."""
    placement = shrink(height, width, side, flip)
    Image.fromarray(waves(height, width, 24 / min(placement.scale))).save(tmp_path / "a.jpg", quality=95)
    reduced = read_picture(tmp_path / "a.jpg", placement)
    assert reduced.shape[:2] == reduced_size(placement) != (height, width)
    difference = np.abs(on_canvas(reduced, placement) - on_canvas(read_picture(tmp_path / "a.jpg"), placement))
    assert difference.mean() < 0.8 and difference.max() <= 6


def test_a_crop_of_a_reduced_picture_is_that_of_the_whole_one(tmp_path):
    Image.fromarray(waves(1001, 1503)).save(tmp_path / "a.jpg", quality=95)
    resize = Direct(side=256, low=1.5, high=1.5)
    placement = resize.place(1001, 1503, shape=0, scale=0, key=5)
    assert min(placement.offset) >= 0 < max(placement.offset) and reduction(placement) == 2
    reduced, whole = read_picture(tmp_path / "a.jpg", placement), read_picture(tmp_path / "a.jpg")
    assert np.abs(on_canvas(reduced, placement) - on_canvas(whole, placement)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_picture_is_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(waves(600, 803, 200)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    size = (803, 600) if orientation > 4 else (600, 803)
    placement = shrink(*size, 96)
    reduced, whole = read_picture(tmp_path / "a.jpg", placement), read_picture(tmp_path / "a.jpg")
    assert whole.shape[:2] == size and reduced.shape[:2] == reduced_size(placement)
    assert np.abs(on_canvas(reduced, placement) - on_canvas(whole, placement)).max() <= 6
    with pytest.raises(DataError, match=f"picture is {size[1]} x {size[0]}, expected {size[0]} x {size[1]}"):
        read_picture(tmp_path / "a.jpg", shrink(*size[::-1], 96))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_modes_of_reduced_pictures(tmp_path, mode):
    """Four inks are decoded whole, by Pillow."""
    Image.fromarray(waves(600, 800, 200)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    placement = shrink(600, 800, 96)
    found = read_picture(tmp_path / "a.jpg", placement)
    assert found.shape == ((600, 800, 3) if mode == "CMYK" else (150, 200, 3))
    expected = on_canvas(read_picture(tmp_path / "a.jpg"), placement)
    assert np.abs(on_canvas(found, placement) - expected).max() <= 6


def test_other_files_come_whole(tmp_path):
    picture = waves(600, 800)
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png", shrink(600, 800, 96)), picture)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_of_another_size_than_placed_is_refused(tmp_path, suffix):
    Image.fromarray(waves(301, 400)).save(tmp_path / f"a.{suffix}")
    for other in ((300, 400), (302, 400), (602, 800), (400, 301), (75, 100)):
        with pytest.raises(DataError, match=f"picture is 400 x 301, expected {other[1]} x {other[0]}"):
            read_picture(tmp_path / f"a.{suffix}", shrink(*other, 96))


def test_a_picture_is_not_reduced_where_a_region_is_cut_out(tmp_path):
    Image.fromarray(waves(601, 801)).save(tmp_path / "a.jpg", quality=95)
    placement = Placement((601, 801), (64, 64), (0, 0), (64, 64), (64, 64), True, (13, 27, 501, 703))
    picture = read_picture(tmp_path / "a.jpg", placement)
    assert picture.shape == (601, 801, 3)
    expected = F.resized_crop(torch.from_numpy(picture).permute(2, 0, 1), 13, 27, 501, 703, [64, 64], antialias=True)
    expected = F.horizontal_flip(expected).permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(on_canvas(picture, placement) - expected)
    assert difference.mean() < 3 and difference.max() <= 20  # the mean over an area here, a triangle there


def test_a_region_is_stretched_as_in_torchvision():
    picture = np.asarray(smooth(60, 90)).copy()
    placement = Placement((60, 90), (96, 96), (0, 0), (96, 96), (96, 96), False, (7, 11, 41, 33))
    expected = F.resized_crop(torch.from_numpy(picture).permute(2, 0, 1), 7, 11, 41, 33, [96, 96], antialias=False)
    assert np.abs(on_canvas(picture, placement) - expected.permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize("cut", [30, 3000])
def test_a_broken_file_is_not_reduced_unnoticed(tmp_path, cut):
    Image.fromarray(waves(600, 800)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-cut])
    with pytest.raises(DataError, match="broken"):
        read_picture(tmp_path / "a.jpg", shrink(600, 800, 96))
