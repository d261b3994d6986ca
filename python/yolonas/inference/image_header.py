"""What the bytes of an image file say before any pixel is decoded: size, orientation, truncation, animation."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator

_TIFF_WIDTH, _TIFF_HEIGHT, _EXIF_ORIENTATION = 0x0100, 0x0101, 0x0112
# BYTE, SHORT, LONG, the signed ones, which libtiff takes as well, and BigTIFF's LONG8 and SLONG8
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start-of-frame markers; C4, C8, CC are tables and extensions
# Netpbm (P1 to P6, PF), PAM and Radiance write the size as text. Stricter than OpenCV reads it, never looser: what is
# found is what OpenCV finds.
_GAP, _PAM_LINES = rb"\s(?:\s|#[^\n\r]*[\n\r])*", rb"(?:(?!ENDHDR)[A-Z#][^\n\r]*\n)*?"
_SIZE_IN_TEXT = re.compile(
    rb"P[1-6]" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})(?=\D)"
    rb"|P[Ff]\n(\d{1,9})\s(\d{1,9})(?=\s)"
    rb"|P7\n(?=" + _PAM_LINES + rb"WIDTH (\d{1,9})\n)(?=" + _PAM_LINES + rb"HEIGHT (\d{1,9})\n)"
    rb"|#\?(?:[^\n]{1,120}\n)+\n-Y (\d{1,9}) \+X (\d{1,9})(?=\D)"
)
_TEXT_BYTES = 4096  # of a header in text that are looked at
# A marker with a segment, so none of TEM and RST. What stands before one libjpeg passes over too, with a warning.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1


def size(data: bytes) -> tuple[int, int] | None:
    """(height, width) as displayed, EXIF orientation applied, of the first bytes of a JPEG or PNG file.

    None where the header does not tell: another format, an orientation kept where only a decoder finds it, or damage.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return None if b"eXIf" in data else (height, width)
    height = width = 0
    orientation = 1
    for marker, start, end in _jpeg_segments(data):
        if marker in _SOF and end - start >= 5:
            height, width = struct.unpack(">HH", data[start + 1 : start + 5])
        elif marker == _APP1 and data[start : start + 6] == b"Exif\0\0":
            orientation = _orientation(data[start + 6 : end])
        elif marker == _SOS:
            return (width, height) if orientation >= 5 else (height, width)
    return None


def pixels(data: bytes) -> int:
    """How many pixels an image file declares to have; 0 where its header does not tell."""
    width = height = 0
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack(">II", data[16:24]) if data[12:16] == b"IHDR" else (0, 0)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            width, height = struct.unpack("<HH", data[6:10])
        elif data.startswith(b"BM") and data[14:18] == b"\x0c\0\0\0":  # OS/2's
            width, height = struct.unpack("<HH", data[18:22])
        elif data.startswith(b"BM"):
            width, height = struct.unpack("<ii", data[18:26])
        elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
            tags = _tiff_tags(data)
            width, height = tags.get(_TIFF_WIDTH, 0), tags.get(_TIFF_HEIGHT, 0)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            width, height = _webp_size(data)
        elif data[4:8] == b"ftyp" and b"avif" in data[8 : int.from_bytes(data[:4])]:  # the largest of its images
            width, height = max(_words(data, b"ispe", 8), key=math.prod, default=(0, 0))
        elif data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):  # JPEG 2000: the file and its code stream
            found = [*_words(data, b"\xff\x4f\xff\x51", 8), *_words(data, b"ihdr", 4)]
            width, height = max(found, key=math.prod, default=(0, 0))
        elif data.startswith(b"\x59\xa6\x6a\x95"):  # Sun raster
            width, height = struct.unpack(">II", data[4:12])
        elif (text := _SIZE_IN_TEXT.match(data, 0, _TEXT_BYTES)) is not None:
            width, height = (int(number) for number in text.groups() if number is not None)
        else:
            for marker, start, end in _jpeg_segments(data):
                if marker in _SOF and end - start >= 5:
                    height, width = struct.unpack(">HH", data[start + 1 : start + 5])
    except struct.error:  # cut off
        return 0
    return abs(width * height)


def _webp_size(data: bytes) -> tuple[int, int]:
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if data[12:16] != b"VP8 ":
        return 0, 0
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _words(data: bytes, mark: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """The two big-endian words that stand `offset` bytes after the begin of each mark."""
    position = data.find(mark)
    while position >= 0:
        pair = data[position + offset : position + offset + 8]
        if len(pair) == 8:
            yield struct.unpack(">II", pair)
        position = data.find(mark, position + 1)


def is_truncated_jpeg(data: bytes) -> bool:
    """Whether a JPEG file ends before its end-of-image marker; OpenCV before 5 fills the missing part with grey."""
    if not data.startswith(b"\xff\xd8"):
        return False
    # Only behind the start of scan: an embedded thumbnail brings an end marker of its own, earlier. A file cut before
    # its start of scan is refused by every decoder.
    scan = next((start for marker, start, _ in _jpeg_segments(data) if marker == _SOS), None)
    return scan is not None and data.find(bytes([0xFF, _EOI]), scan) < 0


def is_animated(data: bytes) -> bool:
    """Whether a GIF, WebP or PNG file holds more than one frame."""
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _gif_frames(data) > 1
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        return bool(data[20] & 0x02) if len(data) > 20 else False
    return data.startswith(b"\x89PNG") and b"acTL" in data[: data.find(b"IDAT")]


def is_turned_avif(data: bytes) -> bool:
    """Whether an AVIF file asks to be shown rotated or mirrored, which OpenCV does not do."""
    if data[4:12] != b"ftypavif":
        return False
    head = data[: data.find(b"mdat")]
    rotation = head.find(b"irot")
    return b"imir" in head or (rotation >= 0 and head[rotation + 4] & 3 != 0)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the payload, of each segment up to the start of scan."""
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    while (found := _MARKER.search(data, position)) is not None:
        marker, start = found[1][0], found.end()
        if marker == _EOI or start + 2 > len(data):
            return
        (length,) = struct.unpack(">H", data[start : start + 2])
        yield marker, start + 2, start + length
        if marker == _SOS:
            return
        position = start + max(length, 2)


def _orientation(tiff: bytes) -> int:
    """EXIF orientation, 1 to 8, of the TIFF block of an EXIF segment; 1 where it has none."""
    value = _tiff_tags(tiff).get(_EXIF_ORIENTATION, 1)
    return value if 1 <= value <= 8 else 1


def _tiff_tags(tiff: bytes) -> dict[int, int]:
    """Tag -> value of the entries of a TIFF block's first directory that hold one whole number."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 16:
        return {}
    if tiff[2:4] in (b"+\0", b"\0+"):  # BigTIFF: all is twice as wide
        (directory,), number, length, head = struct.unpack(order + "Q", tiff[8:16]), "Q", 20, "HHQ"
    else:
        (directory,), number, length, head = struct.unpack(order + "I", tiff[4:8]), "H", 12, "HHI"
    first = directory + struct.calcsize(order + number)
    (entries,) = struct.unpack(order + number, tiff[directory:first].ljust(first - directory, b"\0"))
    tags: dict[int, int] = {}
    for i in range(min(entries, 1 << 16)):
        entry = tiff[first + length * i : first + length * (i + 1)]
        if len(entry) < length:
            break
        tag, kind, count = struct.unpack_from(order + head, entry)
        if count == 1 and kind in _WHOLE_NUMBERS:
            (value,) = struct.unpack_from(order + _WHOLE_NUMBERS[kind], entry, struct.calcsize(order + head))
            tags.setdefault(tag, value)  # libtiff ignores the second of two
    return tags


def _gif_frames(data: bytes) -> int:
    """Number of image blocks of a GIF file; counting stops at two."""

    def table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    frames, position = 0, 13 + (table(data[10]) if len(data) > 10 else 0)
    while position < len(data) and frames < 2:
        if data[position] == 0x21:  # extension: label, then sub-blocks
            position += 2
        elif data[position] == 0x2C and position + 9 < len(data):  # image: descriptor, colours, code size, sub-blocks
            frames += 1
            position += 11 + table(data[position + 9])
        else:
            break
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1
    return frames
