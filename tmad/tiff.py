"""TIFF directories, read and written byte for byte, and samples of any depth through them.

Pillow decodes eight bits of a deep colour channel and writes back the tags that it knows. Here a directory is copied as
it is, EXIF and GPS directories too, and the strips are handed to Pillow as if their bytes were grey pixels: so every
compression without loss that it has gives back the samples themselves.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, TiffImagePlugin

_SIZE = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    3: 2,
    8: 2,
    4: 4,
    9: 4,
    11: 4,
    13: 4,
    5: 8,
    10: 8,
    12: 8,
    16: 8,
    17: 8,
    18: 8,
}
"""Bytes of one value by type."""
_WORD = {**_SIZE, 5: 4, 10: 4}
"""Bytes that are turned together where the byte order changes."""
_SHORT, _LONG = 3, 4

WIDTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIPS, ORIENTATION = 256, 258, 259, 262, 266, 273, 274
CHANNELS, STRIP_BYTES, PLANAR, PREDICTOR = 277, 279, 284, 317
TILE_WIDTH, TILES, TILE_BYTES, EXTRA, FORMAT = 322, 324, 325, 338, 339
SUB_PICTURES, PHOTOSHOP, XMP, IPTC, ICC, EXIF, GPS = 330, 34377, 700, 33723, 34675, 34665, 34853
_INNER = (EXIF, GPS, 40965)
"""Tags whose value is the place of a further directory."""

STRUCTURE = frozenset(
    (
        *(254, 255, *range(256, 260), PHOTOMETRIC, 263, 264, 265, FILL_ORDER, STRIPS, *range(277, 282), PLANAR),
        *(*range(288, 294), PREDICTOR, 320, *range(322, 326), SUB_PICTURES, 332, 333, 334, 336, EXTRA, FORMAT, 340),
        *(341, 347, *range(512, 522), *range(529, 533)),
    )
)
"""Tags that say how the pixels lie: they belong to the pixels, not to the picture."""

_LOSSLESS = {1: "raw", 5: "tiff_lzw", 8: "tiff_adobe_deflate", 32946: "tiff_adobe_deflate", 32773: "packbits"} | {
    34925: "lzma",
    50000: "zstd",
}


@dataclass(frozen=True)
class Entry:
    """One tag: its type, and its values, least significant byte first; or the directory that it names."""

    kind: int
    data: bytes = b""
    inner: Mapping[int, Entry] | None = None


Directory = Mapping[int, Entry]


def shorts(*values: int) -> Entry:
    """An entry of 16-bit numbers."""
    return Entry(_SHORT, struct.pack(f"<{len(values)}H", *values))


def longs(*values: int) -> Entry:
    """An entry of 32-bit numbers."""
    return Entry(_LONG, struct.pack(f"<{len(values)}I", *values))


def numbers(directory: Directory, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The whole numbers of *tag*."""
    entry = directory.get(tag)
    if entry is None or entry.kind not in (1, 3, 4, 13, 16, 18):
        return default
    return tuple(np.frombuffer(entry.data, f"<u{_SIZE[entry.kind]}").tolist())


def orientation(data: bytes) -> int:
    """1 to 8; 1 also where there is none, or no directory."""
    try:
        (found,) = numbers(read_directory(data), ORIENTATION, (1,))
    except ValueError:
        return 1
    return found if found in range(2, 9) else 1


def read_directory(data: bytes) -> dict[int, Entry]:
    """The first directory of a TIFF file (or of an EXIF block without its first six bytes). Raises `ValueError`."""
    order, big = _kind_of(data)
    (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    return _read(data, place, order, big, ())


def _kind_of(data: bytes) -> tuple[str, bool]:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        raise ValueError("no TIFF header")
    return order, struct.unpack_from(order + "H", data, 2)[0] == 43


def _read(data: bytes, place: int, order: str, big: bool, above: tuple[int, ...]) -> dict[int, Entry]:
    if place in above or len(above) > 3:
        raise ValueError("a directory that holds itself")
    count_form, form, room = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    found: dict[int, Entry] = {}
    try:
        (count,) = struct.unpack_from(order + count_form, data, place)
        step = struct.calcsize("<" + form) + room
        first = place + struct.calcsize("<" + count_form)
        for at in range(first, first + step * min(count, 65536), step):
            tag, kind, amount = struct.unpack_from(order + form, data, at)
            length = amount * _SIZE.get(kind, 1)
            at += step - room
            if length > room:
                (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, at)
            content = data[at : at + length]
            if len(content) < length:
                continue  # a value beyond the end of the file
            content = _turned(content, kind) if order == ">" and kind in _WORD else content
            if tag in _INNER and kind in (_LONG, 13, 16, 18) and amount == 1:
                inner = _read(data, int.from_bytes(content, "little"), order, big, (*above, place))
                found[tag] = Entry(_LONG, inner=inner)
            elif kind in _SIZE:
                found[tag] = Entry(kind, content)
    except struct.error:
        raise ValueError("a directory that is cut off") from None
    return found


def _turned(content: bytes, kind: int) -> bytes:
    return np.frombuffer(content, f">u{_WORD[kind]}").astype(f"<u{_WORD[kind]}").tobytes()


def write_directory(directory: Directory, place: int, order: str = "<") -> bytes:
    """The bytes of *directory* where they begin at byte *place* of a file."""
    heap_at = place + 2 + 12 * len(directory) + 4
    entries, heap = [], bytearray()
    for tag, entry in sorted(directory.items()):
        kind, content = entry.kind, entry.data
        if entry.inner is not None:
            heap += b"\0" * ((heap_at + len(heap)) % 2)
            content = struct.pack("<I", heap_at + len(heap))
            heap += write_directory(entry.inner, heap_at + len(heap), order)
        if kind in (16, 18):  # of BigTIFF: places and counts, which are small enough here
            content = np.frombuffer(content, "<u8").astype("<u4").tobytes()
            kind = _LONG
        amount = len(content) // _SIZE[kind]
        content = _turned(content, kind) if order == ">" else content
        if len(content) > 4:
            heap += b"\0" * ((heap_at + len(heap)) % 2)
            value = struct.pack(order + "I", heap_at + len(heap))
            heap += content
        else:
            value = content.ljust(4, b"\0")
        entries.append(struct.pack(order + "HHI", tag, kind, amount) + value)
    return struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4) + bytes(heap)


def with_directory(data: bytes, directory: Directory) -> bytes:
    """The file *data* with *directory* as its only one; what the strips' places point to stays where it is."""
    order, _ = _kind_of(data)
    place = len(data) + len(data) % 2
    magic = data[:2] + struct.pack(order + "H", 42)
    body = data[8:].ljust(place - 8, b"\0")
    return magic + struct.pack(order + "I", place) + body + write_directory(directory, place, order)


def exif_block(directory: Directory) -> bytes:
    """EXIF for other formats, of the tags of a TIFF file that are about the picture; empty if there is none."""
    kept = {tag: entry for tag, entry in directory.items() if tag not in (*STRUCTURE, XMP, IPTC, ICC, PHOTOSHOP)}
    return b"Exif\0\0II*\0\x08\0\0\0" + write_directory(kept, 8) if kept else b""


def read_samples(data: bytes) -> np.ndarray | None:
    """All samples of the first picture (H, W, channels) as they are in the file, in this machine's byte order: signed,
    unsigned or float, 8 to 64 bits. None for palettes, less than 8 bits, lossy compression, other colour spaces."""
    try:
        directory = read_directory(data)
    except ValueError:
        return None
    bits, formats = set(numbers(directory, BITS, (1,))), set(numbers(directory, FORMAT, (1,)))
    (width,), (height,) = numbers(directory, WIDTH)[:1] or (0,), numbers(directory, 257)[:1] or (0,)
    (channels,) = numbers(directory, CHANNELS, (1,))
    plain = (
        numbers(directory, COMPRESSION, (1,))[0] in _LOSSLESS
        and numbers(directory, PHOTOMETRIC, (1,))[0] in (0, 1, 2, 5)
        and numbers(directory, FILL_ORDER, (1,)) == (1,)
    )
    kind = {1: "u", 2: "i", 3: "f"}.get(min(formats))
    if not plain or len(bits) > 1 or len(formats) > 1 or kind is None or not width or not height:
        return None
    (depth,) = bits
    if depth not in ((16, 32, 64) if kind == "f" else (8, 16, 32, 64)):
        return None
    planes = channels if numbers(directory, PLANAR, (1,)) == (2,) and channels > 1 else 1
    beside = channels // planes
    dtype = np.dtype(f"{_kind_of(data)[0]}{kind}{depth // 8}")
    parts = [_plane(data, directory, number, planes, beside, dtype, width) for number in range(planes)]
    samples = parts[0] if planes == 1 else np.concatenate(parts, axis=2)
    return samples if samples.shape == (height, width, channels) else None


def shows_a_preview(data: bytes) -> bool:
    """Whether this is a camera raw file that shows a small picture first: DNG, CR2, or said to be reduced."""
    try:
        directory = read_directory(data)
    except ValueError:
        return False
    reduced = numbers(directory, 254, (0,))[:1] == (1,)
    return reduced or 50706 in directory or data[8:10] == b"CR"


def deep_planes(data: bytes) -> np.ndarray | None:
    """(H, W, channels), uint8, of a file with channels of 16 bits that lie apart, which Pillow misreads; else none."""
    try:
        directory = read_directory(data)
    except ValueError:
        return None
    if numbers(directory, PLANAR, (1,)) != (2,) or set(numbers(directory, BITS, (1,))) != {16}:
        return None
    samples = read_samples(data)
    return None if samples is None or samples.shape[2] == 1 else (samples >> 8).astype(np.uint8)


def _plane(
    data: bytes, directory: Directory, number: int, planes: int, beside: int, dtype: np.dtype, width: int
) -> np.ndarray:
    """One plane (H, W, beside), decoded as grey bytes, differences undone here, as they run over whole samples."""
    unit = beside * dtype.itemsize
    tiled = TILES in directory
    grey: dict[int, Entry] = dict(directory) | {
        **{WIDTH: longs(width * unit), BITS: shorts(8), PHOTOMETRIC: shorts(1), CHANNELS: shorts(1)},
        **{PLANAR: shorts(1), PREDICTOR: shorts(1), FORMAT: shorts(1)},
    }
    for tag in (EXTRA, ICC, XMP, *_INNER, ORIENTATION, SUB_PICTURES):
        grey.pop(tag, None)
    for tag in (TILES, TILE_BYTES) if tiled else (STRIPS, STRIP_BYTES):
        places = numbers(directory, tag)
        share = len(places) // planes
        grey[tag] = longs(*places[number * share : (number + 1) * share])
    segment = width
    if tiled:
        (segment,) = numbers(directory, TILE_WIDTH)
        grey[TILE_WIDTH] = longs(segment * unit)
    # By the class: `Image.open` would count its bytes as pixels and call it a bomb.
    with TiffImagePlugin.TiffImageFile(io.BytesIO(with_directory(data, grey))) as picture:
        stored = np.asarray(picture)
    rows = [
        _undone(stored[:, at * unit : (at + segment) * unit], directory, beside, dtype)
        for at in range(0, width, segment)
    ]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)


def _undone(stored: np.ndarray, directory: Directory, beside: int, dtype: np.dtype) -> np.ndarray:
    """Bytes (H, w) of a strip or a column of tiles as samples (H, w, beside)."""
    height, predictor = len(stored), numbers(directory, PREDICTOR, (1,))[0]
    native = dtype.newbyteorder("=")
    if predictor == 3:
        sums = np.cumsum(stored.reshape(height, -1, beside), axis=1, dtype=np.uint8)
        turned = sums.reshape(height, dtype.itemsize, -1).transpose(0, 2, 1)
        return np.ascontiguousarray(turned).view(dtype.newbyteorder(">")).reshape(height, -1, beside).astype(native)
    samples = np.ascontiguousarray(stored).view(dtype).reshape(height, -1, beside).astype(native)
    return np.cumsum(samples, axis=1, dtype=native) if predictor == 2 else samples


def write_samples(samples: np.ndarray, original: bytes) -> bytes:
    """A file with *samples* (H, W, channels) in place of those of *original*, compressed as they were there."""
    before = read_directory(original)
    height, width, channels = samples.shape
    little = np.ascontiguousarray(samples.astype(samples.dtype.newbyteorder("<")))
    grey = Image.frombytes("L", (width * channels * little.itemsize, height), little.tobytes())
    buffer = io.BytesIO()
    grey.save(buffer, "TIFF", compression=_LOSSLESS[numbers(before, COMPRESSION, (1,))[0]])
    made = read_directory(buffer.getvalue()) | {
        **{WIDTH: longs(width), BITS: shorts(*[8 * little.itemsize] * channels), CHANNELS: shorts(channels)},
        **{PHOTOMETRIC: before.get(PHOTOMETRIC, shorts(1)), PLANAR: shorts(1)},
    }
    made |= {tag: before[tag] for tag in (EXTRA, FORMAT) if tag in before}
    return with_directory(buffer.getvalue(), made)
