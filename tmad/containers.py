"""What image files hold beside their pixels, taken from one file into another byte for byte.

Pillow's writers take over what they know by name. Here the parts of the file itself are moved: PNG chunks, JPEG
segments, JPEG 2000 boxes, TIFF tags, the blocks of a GIF. So what nobody has thought of stays too, and what cannot stay
has a name: `parts` of the file that was and of the one that is are compared.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

from tmad import tiff

Parts = list[tuple[str, bytes]]
"""Names for messages, and contents."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NAMES = {b"iCCP": "ICC profile", b"eXIf": "EXIF", b"pHYs": "resolution"} | dict.fromkeys(
    (b"tEXt", b"zTXt", b"iTXt"), "text"
)
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
_PNG_OF_COLOUR_TYPE = (b"sBIT", b"bKGD", b"hIST")
_PNG_FIRST = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"sBIT", b"mDCV", b"cLLI")
"""Chunks that stand before the palette."""
_XMP_IN_PNG = b"XML:com.adobe.xmp"

_JPEG_NAMES = {0xE0: "JFIF", 0xED: "IPTC", 0xEE: "Adobe", 0xFE: "comment"}
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.S)
"""Not those that stand among the pixels, or without a length."""
_JP2_IDS = {
    b"\xbe\x7a\xcf\xcb\x97\xa9\x42\xe8\x9c\x71\x99\x94\x91\xe3\xaf\xac": "XMP",
    b"JpgTiffExif->JP2": "EXIF",
    b"\x33\xc7\xa4\xd2\xb8\x1d\x47\x23\xa0\xba\xf1\xa3\xe0\x97\xad\x38": "IPTC",
    b"\xb1\x4b\xf8\xbd\x08\x3d\x4b\x43\xa5\xae\x8c\xd7\xd5\xa6\xce\x03": "GeoJP2",
}
_TIFF_NAMES = {
    **{tiff.ICC: "ICC profile", tiff.EXIF: "EXIF", tiff.GPS: "GPS", tiff.XMP: "XMP", tiff.IPTC: "IPTC"},
    **dict.fromkeys((282, 283, 296), "resolution"),
    **dict.fromkeys((33550, 33922, 34264, 34735, 34736, 34737), "GeoTIFF"),
    tiff.PHOTOSHOP: "Photoshop resources",
}
_LAYERS = 37724
"""Photoshop's layers in a TIFF file: they hold what was removed."""
_CREDENTIALS = "content credentials (JUMBF)"
"""They vouch for the pixels that were."""
_DAMAGED = "damaged EXIF"
"""It may hold a preview that nobody can find."""
_PREVIEWS = (1033, 1036)
"""Photoshop resources that are previews."""
_XMP_PREVIEW = re.compile(rb"(<xmpGImg:image>|xmpGImg:image=\")([^<\"]*)")


def parts(data: bytes, kind: str) -> Parts:
    """What *data*, a file of Pillow's format *kind*, holds beside its pixels, previews taken out, as it is to be kept.

    What cannot be read any more ends the list.
    """
    found = {"PNG": _png_parts, "JPEG": _jpeg_parts, "MPO": _jpeg_parts, "TIFF": _tiff_parts, "WEBP": _webp_parts}
    found |= {"GIF": _gif_parts, "JPEG2000": _jp2_parts, "BMP": _bmp_parts, "PPM": _ppm_parts}
    with suppress(struct.error, ValueError, IndexError, zlib.error):
        behind = ("data behind the picture", _behind(data, kind))
        return [part for part in [*found.get(kind, lambda _: [])(data), behind] if part[1]]
    return []


def _behind(data: bytes, kind: str) -> bytes:
    """What follows where a file of this format ends, as the film of a phone's photograph does. It shows what was
    removed, and is not kept."""
    end = len(data)
    if kind == "PNG":
        end = len(_PNG) + sum(12 + len(body) for _, body in png_chunks(data))
    elif kind == "JPEG":
        end = _jpeg_end(data)
    elif kind == "GIF":
        end = [last for _, _, last in _gif_blocks(data)][-1] + 1
    elif kind == "WEBP":
        end = 8 + int.from_bytes(data[4:8], "little")
    elif kind == "BMP":
        end = int.from_bytes(data[2:6], "little") or end
    elif kind == "PPM" and data[1:2] in b"456":
        (width, height, *top), _, start = ppm_header(data)
        samples = width * (3 if data[1:2] == b"6" else 1)
        end = start + height * (samples * (1 + (top[0] > 255)) if top else -(-samples // 8))
    return data[end:].strip(b"\0")


def graft(data: bytes, original: bytes, kind: str) -> bytes:
    """*data*, a file with new pixels, with the parts of *original*, a file of the same format."""
    moved = {"PNG": _png_graft, "JPEG": _jpeg_graft, "TIFF": _tiff_graft, "JPEG2000": _jp2_graft, "PPM": _ppm_graft}
    return moved[kind](data, original) if kind in moved else data


def without_xmp_previews(xmp: bytes) -> bytes:
    """XMP with its small pictures blanked out: they show what was removed."""
    return _XMP_PREVIEW.sub(lambda found: found[1] + b" " * len(found[2]), xmp)


def without_preview(exif: bytes) -> bytes:
    """The EXIF block with its small preview picture blanked out and unlinked; every other byte stays."""
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    block = bytearray(exif[start:])
    order = {b"II": "<", b"MM": ">"}.get(bytes(block[:2]))
    if order is None:
        return exif
    try:
        (first,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, first)
        link = first + 2 + 12 * count
        (second,) = struct.unpack_from(order + "I", block, link)
        if second == 0:
            return exif
        (count,) = struct.unpack_from(order + "H", block, second)
        entries = [struct.unpack_from(order + "HHII", block, second + 2 + 12 * number) for number in range(count)]
        values = {tag: value for tag, _, _, value in entries}
        offset, length = values.get(0x0201, 0), values.get(0x0202, 0)
        block[offset : offset + length] = bytes(len(block[offset : offset + length]))
        struct.pack_into(order + "I", block, link, 0)
    except struct.error:  # cut off or damaged: what cannot be walked cannot be trusted to be without one
        return b""
    return exif[:start] + bytes(block)


# PNG


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the chunks, to the end or to where they break off."""
    place = len(_PNG)
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        yield name, data[place + 8 : place + 8 + length]
        if name == b"IEND":
            return
        place += 12 + length


def png_file(chunks: Iterator[tuple[bytes, bytes]]) -> bytes:
    """A file of *chunks*."""
    return _PNG + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def png_text(keyword: bytes, text: bytes) -> tuple[bytes, bytes]:
    """A chunk of international text, uncompressed."""
    return b"iTXt", keyword + b"\0\0\0\0\0" + text


def _png_name(name: bytes, body: bytes) -> str:
    if body == _DAMAGED.encode():
        return _DAMAGED
    if body.startswith(_XMP_IN_PNG):
        return "XMP"
    return _PNG_NAMES.get(name, f"PNG chunk {name.decode('latin-1')}")


def _png_extra(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    for name, body in png_chunks(data):
        if name not in _PNG_PIXELS:
            if name == b"eXIf":
                body = without_preview(body) or _DAMAGED.encode()
            yield name, without_xmp_previews(body) if body.startswith(_XMP_IN_PNG) else body


def _png_parts(data: bytes) -> Parts:
    return [(_png_name(name, body), body or b"\0") for name, body in _png_extra(data)]


def _png_graft(data: bytes, original: bytes) -> bytes:
    made, was = list(png_chunks(data)), next(png_chunks(original))[1]
    same = made[0][1][8:10] == was[8:10]  # bit depth and colour type
    extra = []
    for name, body in _png_extra(original):
        known = name in _PNG_NAMES or name in _PNG_FIRST or name in (b"bKGD", b"hIST", b"sPLT", b"tIME")
        # The fourth letter of an unknown chunk says whether it may be copied where pixels have changed.
        if (
            _png_name(name, body) != _DAMAGED
            and (body and (known or name[3:4].islower()))
            and (same or name not in _PNG_OF_COLOUR_TYPE)
        ):
            extra.append((name, body))
    first = [one for one in extra if one[0] in _PNG_FIRST]
    later = [one for one in extra if one[0] not in _PNG_FIRST]
    pixels = {name: [one for one in made if one[0] == name] for name in _PNG_PIXELS}
    if same and not pixels[b"tRNS"]:
        pixels[b"tRNS"] = [one for one in png_chunks(original) if one[0] == b"tRNS"]
    order = [*pixels[b"IHDR"], *first, *pixels[b"PLTE"], *pixels[b"tRNS"], *later, *pixels[b"IDAT"], *pixels[b"IEND"]]
    return png_file(iter(order))


# JPEG


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and contents of the segments before the pixels."""
    place = 2
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker == 0xDA:
            return
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, data[place + 4 : place + 2 + length]
        place += 2 + length


def _jpeg_end(data: bytes) -> int:
    """Where the mark of the picture's end stands, and after it."""
    place = 2
    while found := _JPEG_MARKER.search(data, place):
        place = found.end()
        if found[0] == b"\xff\xd9":
            return place
        place += int.from_bytes(data[place : place + 2], "big")
    return len(data)


def _jpeg_extra(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    for marker, body in _jpeg_segments(data):
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            continue
        name = _JPEG_NAMES.get(marker, f"JPEG segment APP{marker - 0xE0}")
        if body.startswith(b"Exif\0\0"):
            name, body = ("EXIF", found) if (found := without_preview(body)) else (_DAMAGED, body)
        elif body.startswith((b"http://ns.adobe.com/xap", b"http://ns.adobe.com/xmp")):
            name, body = "XMP", without_xmp_previews(body)
        elif body.startswith(b"ICC_PROFILE\0"):
            name = "ICC profile"
        elif body.startswith(b"MPF\0"):
            continue  # the index of further pictures, which are left out
        elif marker == 0xEB:
            name = _CREDENTIALS
        elif body.startswith(b"Photoshop 3.0\0"):
            body = b"Photoshop 3.0\0" + _resources_without_previews(body[14:])
        elif body.startswith(b"JFIF\0") and len(body) >= 14:
            body = body[:12] + b"\0\0"  # without its preview
        elif marker == 0xE0:
            continue  # JFXX: a preview
        yield name, marker, body


def _resources_without_previews(data: bytes) -> bytes:
    """Photoshop's image resources without previews."""
    kept, place = b"", 0
    while data[place : place + 4] in (b"8BIM", b"MeSa", b"PHUT", b"AgHg", b"DCSR") and place + 7 <= len(data):
        (number,) = struct.unpack_from(">H", data, place + 4)
        at = place + 6 + (data[place + 6] + 2) // 2 * 2
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 4 + length + length % 2
        if number not in _PREVIEWS:
            kept += data[place:end]
        place = end
    return kept


def _jpeg_parts(data: bytes) -> Parts:
    return [(name, body) for name, _, body in _jpeg_extra(data) if name not in ("JFIF", "Adobe")] + [
        ("resolution", body[7:12]) for name, _, body in _jpeg_extra(data) if name == "JFIF" and body[7]
    ]


def _jpeg_graft(data: bytes, original: bytes) -> bytes:
    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    extra = list(_jpeg_extra(original))
    own = [(marker, body) for marker, body in _jpeg_segments(data)]
    jfif = next((body for name, _, body in extra if name == "JFIF"), None)
    # One that Pillow's writer did not begin with a JFIF header is no YCbCr, which that header promises.
    has_jfif = bool(own) and own[0][0] == 0xE0
    kept = [
        (marker, body) for name, marker, body in extra if body and name not in ("JFIF", "Adobe", _DAMAGED, _CREDENTIALS)
    ]
    start = 2 + (4 + len(own[0][1]) if has_jfif else 0)
    begin = b"\xff\xd8" + (segment(0xE0, jfif or own[0][1]) if has_jfif else b"")
    return b"".join([begin, *(segment(*one) for one in kept), memoryview(data)[start:]])


def jpeg_is_rgb(data: bytes) -> bool:
    """Whether three components are red, green and blue themselves."""
    found = dict(_jpeg_segments(data))
    adobe = found.get(0xEE, b"")
    return 0xE0 not in found and adobe.startswith(b"Adobe") and len(adobe) >= 12 and adobe[11] == 0


# TIFF


def _tiff_extra(data: bytes) -> dict[int, tiff.Entry]:
    found = {}
    for tag, entry in tiff.read_directory(data).items():
        if tag in (*tiff.STRUCTURE, _LAYERS):
            continue
        if tag == tiff.PHOTOSHOP:
            entry = tiff.Entry(entry.kind, _resources_without_previews(entry.data))
        elif tag == tiff.XMP:
            entry = tiff.Entry(entry.kind, without_xmp_previews(entry.data))
        found[tag] = entry
    return found


def _tiff_parts(data: bytes) -> Parts:
    whole = tiff.read_directory(data)
    # Without a unit it is the shape of a pixel.
    names = {tag: name for tag, name in _TIFF_NAMES.items() if name != "resolution" or tiff.numbers(whole, 296) != (1,)}
    found = [
        (names.get(tag, f"TIFF tag {tag}"), b"%d" % tag + tiff.write_directory({tag: entry}, 0))
        for tag, entry in _tiff_extra(data).items()
    ]
    left = {_LAYERS: "Photoshop layers", tiff.SUB_PICTURES: "pictures in SubIFDs"}
    return found + [(name, whole[tag].data) for tag, name in left.items() if tag in whole]


def _tiff_graft(data: bytes, original: bytes) -> bytes:
    own = tiff.read_directory(data)
    return tiff.with_directory(
        data, {tag: entry for tag, entry in own.items() if tag in tiff.STRUCTURE} | _tiff_extra(original)
    )


# JPEG 2000


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        start = place + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        end = len(data) if length == 0 else place + length
        if end < start:
            return
        yield name, data[start:end]
        place = end


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, name) + body


def _jp2_extra(data: bytes) -> Iterator[tuple[str, bytes, bytes]]:
    """Name, box and content of what lies beside header and pixels; those of the header have a lower-case h before."""
    if data[4:8] != b"jP  ":
        return
    for name, body in _boxes(data):
        if name == b"jp2h":
            for inner, content in _boxes(body):
                if inner == b"colr" and content[:1] in (b"\2", b"\3"):
                    yield "ICC profile", b"hcolr", content
                elif inner == b"res ":
                    yield "resolution", b"hres ", content
        elif name == b"uuid":
            what = _JP2_IDS.get(body[:16], "JPEG 2000 box uuid")
            if what == "EXIF":
                body = body[:16] + without_preview(body[16:])
            yield what, name, without_xmp_previews(body) if what == "XMP" else body
        elif name not in (b"jP  ", b"ftyp", b"jp2c"):
            yield f"JPEG 2000 box {name.decode('latin-1').strip()}", name, body


def _jp2_parts(data: bytes) -> Parts:
    return [(name, body) for name, _, body in _jp2_extra(data)] + [("comment", one) for one in jp2_comments(data)]


def jp2_comments(data: bytes) -> list[bytes]:
    """The comments in the header of the compressed pixels, but for the encoder's own."""
    place = data.find(b"\xff\x4f\xff\x51") + 2
    found = []
    while data[place : place + 1] == b"\xff" and data[place + 1] != 0x90:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == 0x64:
            found.append(data[place + 6 : end])
        place = end
    return [one for one in found if not one.startswith(b"Created by OpenJPEG")]


def _jp2_graft(data: bytes, original: bytes) -> bytes:
    if data[4:8] != b"jP  ":
        return data
    extra = list(_jp2_extra(original))
    profile = [body for _, box, body in extra if box == b"hcolr"]
    made = []
    for name, body in _boxes(data):
        if name == b"jp2h":
            inner = [one for one in _boxes(body) if not (profile and one[0] == b"colr")]
            at = 1 + (len(inner) > 1 and inner[1][0] == b"bpcc")
            inner[at:at] = [(b"colr", one) for one in profile]
            inner += [(b"res ", one) for _, box, one in extra if box == b"hres "]
            body = b"".join(_box(*one) for one in inner)
        if name == b"jp2c":
            made += [_box(box, one) for _, box, one in extra if not box.startswith(b"h")]
        made.append(_box(name, body))
    return b"".join(made)


# GIF


def _gif_blocks(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, first and last byte of every block behind the header; `pixels` follow on `image`."""
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    yield "header", 0, place
    while place < len(data) and data[place] in (0x21, 0x2C):
        start = place
        if data[place] == 0x2C:
            flags = data[place + 9]
            place += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            yield "image", start, place
            name, start, place = "pixels", place, place + 1
        else:
            names = {0xFE: "comment", 0xF9: "control", 0x01: "plain text"}
            name = names.get(data[place + 1], "")
            name = name or f"GIF application {data[place + 3 : place + 14].decode('latin-1')}"
            place += 2
        while data[place]:
            place += data[place] + 1
        place += 1
        yield name, start, place


def _gif_parts(data: bytes) -> Parts:
    kept = ("header", "image", "pixels")
    return [(name, data[first:last]) for name, first, last in _gif_blocks(data) if name not in kept]


def gif_with_pixels(original: bytes, encoded: bytes, size: tuple[int, int]) -> bytes:
    """*original* with the compressed pixels of *encoded*, a GIF of its screen's *size*: palettes and blocks stay."""
    pixels = next(encoded[first:last] for name, first, last in _gif_blocks(encoded) if name == "pixels")
    interlaced = next(encoded[first + 9] & 0x40 for name, first, _ in _gif_blocks(encoded) if name == "image")
    made = b""
    for name, first, last in _gif_blocks(original):
        block = original[first:last]
        if name == "image":
            flags = block[9] & ~0x40 | interlaced
            block = struct.pack("<BHHHHB", 0x2C, 0, 0, *size, flags) + block[10:]
        made += pixels if name == "pixels" else block
    return made + b";"


# The rest: named, so that what goes can be told


def riff_names(data: bytes) -> list[bytes]:
    """The names of a WebP file's chunks, of which one tells whether it is lossless."""
    return [name for name, _ in _riff_chunks(data)]


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= min(len(data), 8 + int.from_bytes(data[4:8], "little")):
        name, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        yield name, data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _webp_parts(data: bytes) -> Parts:
    names = {b"ICCP": "ICC profile", b"EXIF": "EXIF", b"XMP ": "XMP"}
    pixels = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
    found = []
    for name, body in _riff_chunks(data):
        if name == b"EXIF":
            body = without_preview(body).removeprefix(b"Exif\0\0")
        if name not in pixels:
            found.append((names.get(name, f"WebP chunk {name.decode('latin-1').strip()}"), body))
    return found


def _bmp_parts(data: bytes) -> Parts:
    (header,) = struct.unpack_from("<I", data, 14)
    found = []
    if header >= 40:
        resolution = struct.unpack_from("<II", data, 38)
        # Pillow counts in dots per inch, of which whole numbers come back.
        found += (
            [("resolution", b"%d %d" % tuple(round(one / 39.3701) for one in resolution))] if any(resolution) else []
        )
    if header >= 124 and struct.unpack_from("<I", data, 70)[0] in (0x4D424544, 0x4C494E4B):
        place, length = struct.unpack_from("<II", data, 126)
        found.append(("ICC profile", data[14 + place : 14 + place + length]))
    return found


def _ppm_parts(data: bytes) -> Parts:
    return [("comment", line) for line in ppm_header(data)[1]] if data[:1] == b"P" and data[1:2].isdigit() else []


def _ppm_graft(data: bytes, original: bytes) -> bytes:
    return data[:3] + b"".join(line + b"\n" for _, line in _ppm_parts(original)) + data[3:]


def ppm_header(data: bytes) -> tuple[list[int], list[bytes], int]:
    """Width, height and the value of white of a P1 to P6 file, its comments, and where its pixels begin."""
    found: list[int] = []
    comments: list[bytes] = []
    place = 2
    while len(found) < (2 if data[1:2] in b"14" else 3):
        match = re.compile(rb"\s*(?:#([^\r\n]*)[\r\n]|(\d+))").match(data, place)
        if match is None:
            raise ValueError("no header")
        if match[2] is None:
            comments.append(b"#" + match[1])
        else:
            found.append(int(match[2]))
        place = match.end()
    return found, comments, place + 1
