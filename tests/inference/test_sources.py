"""Reading images of every kind, and refusing the rest in one sentence."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from yolonas.errors import DataError
from yolonas.inference import image_header
from yolonas.inference.sources import image_size, is_single, iter_sources, read_image, write_image


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that JPEG hardly changes, with no symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 200], axis=-1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "A maker whose name stands before the orientation"
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    data = encoded(smooth(), kind, exif=with_orientation(orientation), **({"quality": 95} if kind == "JPEG" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(data)
    found = read_image(path)
    assert found.shape == expected.shape == ((64, 48, 3) if orientation >= 5 else (48, 64, 3))
    assert np.abs(found.astype(int) - expected).max() <= 3  # two JPEG decoders
    assert image_size(path) == found.shape[:2]
    np.testing.assert_array_equal(read_image(data), found)


def test_exif_of_big_endian_cameras() -> None:
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    assert image_header.size(data) == read_image(data).shape[:2] == (64, 48)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG")]
)
def test_grey_alpha_and_palette_become_rgb(mode: str, kind: str) -> None:
    picture = Image.fromarray(smooth()).convert(mode)
    found = read_image(encoded(picture, kind))
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), np.asarray(picture.convert("RGB")), atol=3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_keeps_the_high_byte(orientation: int) -> None:
    values = (np.arange(48 * 64, dtype=np.uint16) * 21).reshape(48, 64)
    values[0, 0], values[-1, -1] = 0, 65535
    found = read_image(encoded(Image.fromarray(values), "PNG", exif=with_orientation(orientation)))
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(found, expected if orientation == 1 else np.rot90(expected, -1))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_in_every_number_of_channels(suffix: str, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (48, 64, channels), dtype=np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    data = cv2.imencode(suffix, values)[1].tobytes()  # BGR, which Pillow cannot write in 16 bits
    colours = np.repeat(values, 3, axis=2) if channels == 1 else values[..., 2::-1]
    found = read_image(data)
    assert (found[0, 0].max(), found[0, 1].min()) == (0, 255)
    assert np.abs(found.astype(int) - (colours >> 8)).max() <= 1  # libtiff rounds to the nearest


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("CMYK", "JPEG", {"quality": 100, "subsampling": 0}),
        ("CMYK", "TIFF", {}),
        ("YCbCr", "TIFF", {}),
        ("P", "TIFF", {}),
        ("P", "GIF", {}),
        ("P", "BMP", {}),
        ("P", "PNG", {"transparency": 0}),
        ("LA", "TIFF", {}),
        ("1", "TIFF", {"compression": "group4"}),
        ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
        ("L", "JPEG2000", {}),
    ],
)
def test_every_colour_space_shows_the_colours_it_was_made_from(mode: str, kind: str, options: dict[str, Any]) -> None:
    picture = Image.fromarray(smooth()).convert(mode)
    found = read_image(encoded(picture, kind, **options)).astype(int)
    assert np.abs(found - np.asarray(picture.convert("RGB"))).max() <= 3


def bomb(kind: str, side: int = 50_000) -> bytes:
    """A small file of which the header declares `side` x `side` pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8)), kind))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, -side)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "JPEG2000":
        for mark, offset in ((b"ihdr", 4), (b"\xff\x4f\xff\x51", 8)):
            begin = data.index(mark) + offset
            data[begin : begin + 8] = struct.pack(">II", side, side)
    else:  # TIFF: width and height are the first tags of the directory
        (directory,) = struct.unpack("<I", data[4:8])
        for tag in (0, 1):
            entry = directory + 2 + 12 * tag
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "JPEG2000"])
def test_a_file_that_declares_endless_pixels_is_refused_undecoded(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "imdecode", None)
    (tmp_path / "bomb.jpg").write_bytes(bomb(kind))
    with pytest.raises(DataError, match=r"bomb\.jpg declares 2500000000 pixels"):
        read_image(tmp_path / "bomb.jpg")
    assert image_header.pixels(bomb(kind, 20)) == 400


def damaged(data: bytes, segment: bytes, added: bytes) -> bytes:
    """A JPEG file with these bytes before one of its segments, over which libjpeg goes on with a warning."""
    position = data.index(segment)
    return data[:position] + added + data[position:]


@pytest.mark.parametrize("added", [b"\0", b"stray", b"\xff\0", b"\xff\xff", b"\xff\x01", b"\xff\xd3", b"\xff\xfe\0\0"])
@pytest.mark.parametrize("segment", [b"\xff\xdb", b"\xff\xc0", b"\xff\xc4"])
def test_stray_bytes_between_the_segments_of_a_jpeg_hide_nothing(
    segment: bytes, added: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph = damaged(encoded(smooth(), "JPEG"), segment, added)
    assert read_image(photograph).shape[:2] == image_header.size(photograph) == (48, 64)
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(DataError, match="declares 2500000000 pixels"):
        read_image(damaged(bomb("JPEG"), segment, added))


LARGE = b"32000 32000"


@pytest.mark.parametrize(
    "header",
    [
        b"P6\n#" + b"c" * 5000 + b"\n" + LARGE + b"\n255\n",
        b"P6\n#" + b"c" * 4084 + b"\n8 100000000\n255\n",  # of which only some digits are looked at
        b"P6\n# a\r" + LARGE + b" 255\n8 8\n255\n",
        b"P6\n8#32000000\n8 255\n",
        b"P7\n# a\rWIDTH 32000\rHEIGHT 32000\rDEPTH 3\rMAXVAL 255\rENDHDR\n\nWIDTH 8\nHEIGHT 8\nENDHDR\n",
        b"P7\nWIDTH  32000\nHEIGHT  32000\nDEPTH 3\nMAXVAL 255\nENDHDR\nWIDTH 8\nHEIGHT 8\nENDHDR\n",
        b"#?RADIANCE\n-Y 8 +X 8\nFORMAT=32-bit_rle_rgbe\n\n-Y 32000 +X 32000\n",
        b"#?RADIANCE\n" + b"c" * 127 + b"\nFORMAT=32-bit_rle_rgbe\n\n-Y 32000 +X 32000\n\n-Y 8 +X 8\n",
        b"RIFF\x64\0\0\0WEBP" + b"/\xff\x3f\xff\x0f" + b"\0" * 100,  # a raw VP8L stream, in no chunk
        b"\x89PNG\r\n\x1a\n\0\0\0\x08tEXt\0\0\0\x08\0\0\0\x08",
    ],
)
def test_a_header_that_opencv_reads_otherwise_is_not_taken_for_a_small_image(
    header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(DataError, match=r"declares \d{9,} pixels|its header tells no size"):
        read_image(header + b"\0" * 1000)


@pytest.mark.parametrize("kind", [6, 8, 9, 4])
def test_a_tiff_whose_size_stands_there_twice_or_signed(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {6: 127, 8: 32000, 9: 32000, 4: 32000}[kind]
    entries = [(0x100, kind, 1, large), (0x100, 4, 1, 8), (0x101, kind, 1, large), (0x101, 4, 1, 8)]
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", 4) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    assert image_header.pixels(data + b"\0" * 100) == large**2


def test_a_bitmap_of_os_2_tells_its_size() -> None:
    assert image_header.pixels(b"BM" + b"\0" * 12 + b"\x0c\0\0\0" + struct.pack("<HH", 30, 20)) == 600


@pytest.mark.parametrize(
    "suffix", [".webp", ".avif", ".tiff", ".ppm", ".pgm", ".pbm", ".pam", ".pfm", ".hdr", ".ras", ".jp2"]
)
def test_what_opencv_writes_tells_its_size_before_it_is_decoded(suffix: str) -> None:
    image = smooth().astype(np.float32) if suffix in (".pfm", ".hdr") else smooth()
    data = cv2.imencode(suffix, image[..., :1] if suffix in (".pgm", ".pbm") else image)[1].tobytes()
    assert image_header.pixels(data) == image.shape[0] * image.shape[1]
    assert image_header.pixels(data[:5]) == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": with_orientation(1)}),  # the extended form
        ("TIFF", {"big_tiff": True}),
        ("JPEG2000", {"no_jp2": True}),
    ],
)
def test_rarer_forms_tell_their_size_too(kind: str, options: dict[str, Any]) -> None:
    image = smooth()
    assert image_header.pixels(encoded(image, kind, **options)) == image.shape[0] * image.shape[1]


def test_comments_in_the_header_of_a_netpbm_file() -> None:
    assert image_header.pixels(b"P6\n# made by\n# hand\n 30000 # wide\n 20000\n255\n") == 600_000_000


def test_arrays_are_checked_and_passed_on() -> None:
    image = smooth()
    assert read_image(image) is image
    for wrong in (image[..., 0], image.astype(np.float32), np.zeros((2, 2, 4), np.uint8), image[:0]):
        with pytest.raises(DataError, match=r"uint8 \[height, width, 3\] RGB"):
            read_image(wrong)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_that_opencv_would_show_turned_is_refused(orientation: int) -> None:
    data = encoded(smooth(), "AVIF", exif=with_orientation(orientation))
    assert image_header.is_turned_avif(data) == (orientation != 1)
    if orientation != 1:
        with pytest.raises(DataError, match="AVIF file with a rotation"):
            read_image(data)


NOISE = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99, -2])
def test_a_truncated_jpeg_is_refused(tmp_path: Path, progressive: bool, kept: float) -> None:
    # The thumbnail inside brings an end marker of its own.
    thumbnail = encoded(NOISE[:20, :30], "JPEG")
    data = encoded(NOISE, "JPEG", progressive=progressive, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + thumbnail)
    read_image(data)
    path = tmp_path / "half.jpg"
    path.write_bytes(data[: int(len(data) * kept) if kept >= 0 else int(kept)])
    with pytest.raises(DataError, match=r"half\.jpg"):
        read_image(path)


def test_truncation_is_found_without_the_decoder() -> None:
    # OpenCV before 5 decodes such files with a grey lower part, so the header's verdict must not depend on it.
    data = encoded(NOISE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + encoded(NOISE[:20, :30], "JPEG"))
    assert not image_header.is_truncated_jpeg(data)
    assert not image_header.is_truncated_jpeg(data + b"appended by a phone")
    for end in (len(data) - 2, len(data) * 3 // 4, len(data) // 2):
        assert image_header.is_truncated_jpeg(data[:end])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_other_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "half.img"
    path.write_bytes(encoded(NOISE, kind)[:2000])
    with pytest.raises(DataError, match=r"half\.img"):
        read_image(path)


@pytest.mark.parametrize(("kind", "extra"), [("GIF", {}), ("PNG", {}), ("WEBP", {}), ("GIF", {"comment": b"x" * 600})])
def test_animations_are_refused(kind: str, extra: dict[str, bytes]) -> None:
    first, second = Image.fromarray(NOISE), Image.fromarray(NOISE[::-1].copy())
    animation = encoded(first, kind, save_all=True, append_images=[second], **extra)
    with pytest.raises(DataError, match="animated"):
        read_image(animation)
    assert not image_header.is_animated(encoded(first, kind, **extra))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\n<html><body>",
        b"\xff\xd8",
        b"\x89PNG\r\n\x1a\n",
        b"<svg/>",
        b"GIF89a",
        b"RIFF0000WEBPVP8X",
        b"\0" * 99,
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.jpg"):
        read_image(path)
    with pytest.raises(DataError):
        image_size(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_image(path)


@given(
    st.binary(max_size=200),
    st.sampled_from(
        [b"\xff\xd8", b"GIF89a", b"RIFF1234WEBPVP8X", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b""]
    ),
)
def test_no_header_breaks_the_parser(data: bytes, magic: bytes) -> None:
    image_header.size(magic + data)
    image_header.pixels(magic + data)
    image_header.is_truncated_jpeg(magic + data)
    image_header.is_animated(magic + data)
    image_header.is_turned_avif(data[:4] + b"ftypavif" + data)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_photograph_never_breaks_the_parser(position: int, value: int) -> None:
    data = bytearray(JPEG_WITH_EXIF)
    data[position % len(data)] = value
    image_header.size(bytes(data))
    image_header.is_truncated_jpeg(bytes(data))


JPEG_WITH_EXIF = encoded(smooth(), "JPEG", exif=with_orientation(6))


def test_the_size_of_photographs_needs_their_header_only(shared: Path) -> None:
    for path in sorted((shared / "data/coco_permissive/images").iterdir()):
        assert image_header.size(path.read_bytes()[: 1 << 17]) == read_image(path).shape[:2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "c.txt", ".hidden.jpg", "sub/d.jpg", "sub/deep/e.jpg", "we[i]rd.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(smooth(), "PNG" if name.endswith("PNG") else "JPEG"))
    return tmp_path


def names(source: object) -> list[str]:
    return [path.name for path in iter_sources(source)]


def test_folders_patterns_and_lists(folder: Path) -> None:
    assert names(folder) == ["a.PNG", "b.jpg", "we[i]rd.jpg"]
    assert names(str(folder / "*.jpg")) == ["b.jpg", "we[i]rd.jpg"]
    assert names(str(folder / "**/*.jpg")) == ["b.jpg", "d.jpg", "e.jpg", "we[i]rd.jpg"]
    assert names(folder / "we[i]rd.jpg") == ["we[i]rd.jpg"]
    assert names([folder / "sub", str(folder / "b.jpg")]) == ["d.jpg", "b.jpg"]
    image = smooth()
    found = list(iter_sources([image, np.stack([image, image]), b"bytes"]))
    assert [type(item) for item in found] == [np.ndarray] * 3 + [bytes]


def test_pil_images_and_torch_tensors() -> None:
    image = smooth()
    turned = Image.open(io.BytesIO(encoded(image, "PNG", exif=with_orientation(6))))
    np.testing.assert_array_equal(next(iter_sources(Image.fromarray(image))), image)
    np.testing.assert_array_equal(next(iter_sources(turned)), np.rot90(image, -1))
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for several in (tensor[None], tensor[None].float() / 255):
        (found,) = iter_sources(several)
        np.testing.assert_array_equal(read_image(found), image)
        assert not is_single(several)
    assert is_single(tensor)
    with pytest.raises(DataError, match=r"uint8 \[height, width, 3\] RGB"):
        read_image(next(iter_sources(tensor[0])))


def test_single_sources(folder: Path) -> None:
    image = smooth()
    for single in (folder / "b.jpg", str(folder / "we[i]rd.jpg"), "missing.jpg", image, b"bytes"):
        assert is_single(single)
    for several in (folder, str(folder / "*.jpg"), [image], np.stack([image]), iter([image])):
        assert not is_single(several)


def test_sources_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image matches the folder"):
        list(iter_sources(tmp_path))
    with pytest.raises(DataError, match=r"no image matches the pattern .*\*\.jpg"):
        list(iter_sources(str(tmp_path / "*.jpg")))
    for wrong in (3.5, True, None):
        with pytest.raises(TypeError, match="a source is a path"):
            list(iter_sources(wrong))


@pytest.mark.parametrize("name", ["out.png", "ausgeführt 猫.png"])
def test_write_image(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(read_image(write_image(tmp_path / name, smooth())), smooth())


@pytest.mark.parametrize("name", ["out.xyz", "out", "no/such/folder.png"])
def test_write_image_names_what_it_cannot_write(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        write_image(tmp_path / name, smooth())


def test_a_missing_system_library_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import yolonas.inference.sources"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "libGL.so.1" in done.stderr.splitlines()[-1]
    assert "opencv-python-headless" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("turned", [1, 6])
def test_jpeg_has_the_same_pixels_with_any_opencv(turned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr("yolonas.inference.sources._RGB", None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), image)
    assert image.shape == ((40, 60, 3) if turned == 1 else (60, 40, 3))
