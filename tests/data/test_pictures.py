"""What is read of a picture's head agrees with what the decoder gives, and costs no decoding."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gesso.data import pictures
from gesso.data.decode import read_picture
from gesso.data.pictures import jpeg_layout, read_header, read_headers

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def saved(path, size=(90, 60), **more):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **more)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_head_and_decoder_agree_on_the_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", exif=exif)
    header = read_header(path)
    assert (header.width, header.height, header.orientation, header.problem) == (90, 60, orientation, "")
    assert header.transposed == read_picture(path).shape[1::-1] == ((60, 90) if orientation > 4 else (90, 60))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_an_orientation_in_xmp_alone_counts_for_neither(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", xmp=XMP)
    header = read_header(path)
    assert header.orientation == 1 and header.transposed == read_picture(path).shape[1::-1] == (90, 60)


def test_no_pixel_is_decoded(tmp_path, monkeypatch):
    paths = [saved(tmp_path / f"a.{suffix}") for suffix in ("jpg", "png", "tif", "bmp", "gif")]

    def refuse(self):
        raise AssertionError("decoded")

    for kind in {type(Image.open(path)) for path in paths} | {PngImagePlugin.PngImageFile}:
        monkeypatch.setattr(kind, "load", refuse)
    for header in read_headers(paths):
        assert (header.width, header.height, header.problem) == (90, 60, "")


def test_too_large_is_said_whatever_the_format(tmp_path, monkeypatch):
    """WebP's plug-in has a limit of its own, and raises."""
    paths = [saved(tmp_path / f"a.{suffix}") for suffix in ("jpg", "png", "webp", "tif")]
    monkeypatch.setattr(pictures, "MAX_PIXELS", 5000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)
    for header in read_headers(paths):
        assert header.problem == "picture is too large" and "million pixels" in header.detail


def test_what_follows_the_end_of_a_jpeg_does_not_count(tmp_path):
    """Phones append a film; its bytes hold the markers of scans and ends by chance."""
    whole = saved(tmp_path / "a.jpg").read_bytes()
    for film in (b"\xff\xda" * 9, b"\xff\xd9\xff\xda", bytes(5000)):
        (tmp_path / "a.jpg").write_bytes(whole + film)
        assert read_header(tmp_path / "a.jpg").problem == ""
        assert read_picture(tmp_path / "a.jpg").shape == (60, 90, 3)


@pytest.mark.parametrize(("suffix", "left"), [("jpg", 0.5), ("jpg", 0.95), ("png", 0.5), ("png", 0.99)])
def test_a_picture_that_breaks_off_is_found(tmp_path, suffix, left):
    path = saved(tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    assert read_header(path).problem == "picture is cut off"


def test_a_thumbnail_in_the_head_is_no_end(tmp_path):
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 16)).save(thumbnail, "JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail.getvalue()
    path = saved(tmp_path / "a.jpg", exif=exif)
    data = path.read_bytes()
    assert jpeg_layout(data).scan > data.find(thumbnail.getvalue())
    path.write_bytes(data[:-500])
    assert read_header(path).problem == "picture is cut off"


def test_a_content_hash_tells_files_apart(tmp_path):
    one, two = saved(tmp_path / "a.jpg"), saved(tmp_path / "b.jpg", quality=50)
    assert read_header(one).content_hash not in (0, read_header(two).content_hash)
    assert read_header(one).content_hash == read_header(saved(tmp_path / "c.jpg")).content_hash
    assert read_header(one, content_hash=False).content_hash == 0
