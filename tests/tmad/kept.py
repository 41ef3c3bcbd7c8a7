"""Image files of every format, mode and metadata, made up from a seed, for what must come back from a filling."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import simplejpeg
import tifffile
from PIL import Image, TiffImagePlugin

from tests.tmad.tiny import make_image

HEIGHT, WIDTH = 44, 53
ICC = b"\x00\x00\x00\x80lcms" + bytes(range(56)) + bytes(64)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>kept</rdf:RDF></x:xmpmeta>'
IPTC = b"\x1c\x02\x78\x00\x05words"
NOTHING: frozenset[str] = frozenset()


def exif() -> bytes:
    """EXIF with a camera's name, an EXIF directory and a GPS directory."""
    block = Image.Exif()
    block[271] = "Maker of cameras"
    block.get_ifd(0x8769)[0x9003] = "2026:11:27 10:00:00"
    block.get_ifd(0x8825)[1] = "N"
    block.get_ifd(0x8825)[2] = (48.0, 51.0, 30.0)
    return block.tobytes()


def rgb() -> np.ndarray:
    return make_image(3, 64)[:HEIGHT, :WIDTH]


def alpha() -> np.ndarray:
    ramp = np.linspace(0, 255, WIDTH).astype(np.uint8)
    return np.broadcast_to(ramp, (HEIGHT, WIDTH)).copy()


def deep(channels: int, dtype: str = "u2") -> np.ndarray:
    """(H, W, channels) whose lower bits carry something."""
    rng = np.random.default_rng(5)
    base = np.dstack([rgb(), alpha()])[..., :channels] if channels != 2 else np.dstack([rgb()[..., 0], alpha()])
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return (base.astype(np.float64) / 255 + rng.normal(0, 1e-4, base.shape)).astype(kind)
    if kind.kind == "i":
        return (
            base.astype(np.int64) * (100 if kind.itemsize > 1 else 1) // (1 if kind.itemsize > 1 else 2) - 60
        ).astype(kind)
    step = (2 ** (8 * kind.itemsize) - 1) // 255
    return (
        (base.astype(np.uint64) * step + rng.integers(0, max(1, step // 300), base.shape).astype(np.uint64))
        .clip(0, 255 * step)
        .astype(kind)
    )


def pillow(mode: str) -> Image.Image:
    picture = Image.fromarray(rgb())
    if mode in ("LA", "RGBA"):
        picture = picture.convert(mode[:-1])
        picture.putalpha(Image.fromarray(alpha()))
        return picture
    if mode == "I;16":
        return Image.fromarray(deep(1)[..., 0])
    if mode == "P":
        return picture.quantize(200)
    if mode == "P4":
        return picture.quantize(13)
    return picture.convert(mode)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# PNG


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_16(samples: np.ndarray) -> bytes:
    """Written with each of the five filters in turn, byte by byte, as the standard describes them."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").tobytes()
    length, reach = width * channels * 2, channels * 2
    body, above = b"", bytes(length)
    for y in range(height):
        line = rows[y * length : (y + 1) * length]
        kind = y % 5
        out = bytearray([kind])
        for x in range(length):
            a = line[x - reach] if x >= reach else 0
            b, c = above[x], above[x - reach] if x >= reach else 0
            p = a + b - c
            nearest = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            out.append((line[x] - (0, a, b, (a + b) // 2, nearest)[kind]) % 256)
        body, above = body + bytes(out), line
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(body))
        + png_chunk(b"IEND", b"")
    )


PNG_METADATA = {
    "icc": png_chunk(b"iCCP", b"p\0\0" + zlib.compress(ICC)),
    "gamma": png_chunk(b"gAMA", struct.pack(">I", 45455)) + png_chunk(b"cHRM", bytes(range(32))),
    "exif": png_chunk(b"eXIf", exif().removeprefix(b"Exif\0\0")),
    "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "text": png_chunk(b"tEXt", b"Author\0somebody") + png_chunk(b"zTXt", b"Long\0\0" + zlib.compress(b"words " * 50)),
    "dpi": png_chunk(b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
    "time": png_chunk(b"tIME", b"\x07\xe0\x01\x02\x03\x04\x05"),
    "private": png_chunk(b"prVt", b"kept, as its name ends in a small letter"),
}


def png(data: bytes, wanted: frozenset[str]) -> bytes:
    at = 8 + 25
    return data[:at] + b"".join(chunk for name, chunk in PNG_METADATA.items() if name in wanted) + data[at:]


def png_interlaced(samples: np.ndarray, colour_type: int) -> bytes:
    """The seven passes of the standard, each without a filter."""
    height, width = samples.shape[:2]
    body = b""
    for left, top, across, down in (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    ):
        for row in samples[top::down, left::across]:
            body += b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes()
    bits = 8 * samples.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*one) for one in chunks)


# JPEG


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


JPEG_METADATA = {
    "exif": jpeg_segment(0xE1, exif()),
    "xmp": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
    "icc": jpeg_segment(0xE2, b"ICC_PROFILE\0\x01\x01" + ICC),
    "iptc": jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC),
    "comment": jpeg_segment(0xFE, b"a word"),
    "private": jpeg_segment(0xE5, b"OWN\0what nobody has thought of"),
}


def jpeg(data: bytes, wanted: frozenset[str]) -> bytes:
    at = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2
    return data[:at] + b"".join(segment for name, segment in JPEG_METADATA.items() if name in wanted) + data[at:]


def subsampled(name: str) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(rgb()), quality=90, colorsubsampling=name)


# TIFF


TIFF_METADATA = {
    "icc": (34675, 7, len(ICC), ICC, True),
    "xmp": (700, 1, len(XMP), XMP, True),
    "iptc": (33723, 7, len(IPTC), IPTC, True),
    "geo": (33550, 12, 3, (10.0, 10.0, 0.0), True),
    "private": (65000, 3, 3, (7, 8, 9), True),
    "text": (315, 2, 9, b"somebody\0", True),
}


def tiff(dtype: str, channels: int, **options: object) -> Callable[[frozenset[str]], bytes]:
    def make(wanted: frozenset[str]) -> bytes:
        samples = deep(channels, dtype)
        if options.get("planarconfig") == "separate":
            samples = samples.transpose(2, 0, 1)
        buffer = io.BytesIO()
        tags = [TIFF_METADATA[name] for name in TIFF_METADATA if name in wanted]
        resolution = (300, 300) if "dpi" in wanted else None
        tifffile.imwrite(
            buffer,
            samples if channels > 1 else samples[..., 0],
            extratags=tags,
            resolution=resolution,
            metadata=None,
            **{"photometric": "rgb" if channels > 2 else "minisblack", **options},
        )
        return buffer.getvalue()

    return make


def tiff_of_pillow(mode: str, differences: int = 0, **options: object) -> Callable[[frozenset[str]], bytes]:
    def make(wanted: frozenset[str]) -> bytes:
        info = TiffImagePlugin.ImageFileDirectory_v2()
        if differences:
            info[317] = differences
        if "exif" in wanted:
            info[271] = "Maker of cameras"
            info[34665] = {0x9003: "2026:11:27 10:00:00"}
            info[34853] = {1: "N", 2: (48.0, 51.0, 30.0)}
        more: dict[str, object] = {"icc_profile": ICC} if "icc" in wanted else {}
        return saved(pillow(mode), "TIFF", tiffinfo=info, **options, **more)

    return make


# JPEG 2000


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, name) + body


JP2_METADATA = {
    "xmp": box(b"uuid", bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + XMP),
    "exif": box(b"uuid", b"JpgTiffExif->JP2" + exif().removeprefix(b"Exif\0\0")),
    "private": box(b"xml ", b"<anything/>"),
}


def jp2(data: bytes, wanted: frozenset[str]) -> bytes:
    at = data.index(b"jp2c") - 4
    if "icc" in wanted:
        header, colour = data.index(b"jp2h") - 4, data.index(b"colr") - 4
        length = int.from_bytes(data[colour : colour + 4], "big")
        new = box(b"colr", b"\2\0\0" + ICC)
        whole = int.from_bytes(data[header : header + 4], "big") + len(new) - length
        data = data[:header] + struct.pack(">I", whole) + data[header + 4 : colour] + new + data[colour + length :]
        at += len(new) - length
    return data[:at] + b"".join(one for name, one in JP2_METADATA.items() if name in wanted) + data[at:]


# GIF, PPM, and the rest


def gif(wanted: frozenset[str], *, colours: int, clear: int | None) -> bytes:
    picture = Image.fromarray(rgb()).quantize(colours, kmeans=0)
    options = {} if clear is None else {"transparency": clear}
    data = saved(picture, "GIF", optimize=False, **options, **({"comment": b"a word"} if "comment" in wanted else {}))
    if "xmp" in wanted:
        magic = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
        block = b"\x21\xff\x0bXMP DataXMP" + XMP + magic
        data = data[:-1] + block + b";"
    return data


def ppm(magic: str, top: int, wanted: frozenset[str]) -> bytes:
    channels = 3 if magic in ("P3", "P6") else 1
    values = np.rint(deep(3)[..., :channels].astype(np.float64) * top / 65535).astype(">u2" if top > 255 else "u1")
    comment = "# a word\n" if "comment" in wanted else ""
    head = f"{magic}\n{comment}{WIDTH} {HEIGHT}\n" + ("" if magic in ("P1", "P4") else f"{top}\n")
    if magic in ("P2", "P3"):
        body = "\n".join(" ".join(map(str, row)) for row in values.reshape(HEIGHT, -1).tolist()).encode() + b"\n"
    elif magic == "P1":
        body = "\n".join(" ".join(map(str, row)) for row in (rgb()[..., 0] > 120).astype(int).tolist()).encode() + b"\n"
    elif magic == "P4":
        body = np.packbits(rgb()[..., 0] > 120, axis=1).tobytes()
    else:
        body = values.tobytes()
    return head.encode() + body


def webp(mode: str, wanted: frozenset[str], kind: str = "WEBP", **options: object) -> bytes:
    known = {"icc": ("icc_profile", ICC), "exif": ("exif", exif()), "xmp": ("xmp", XMP)}
    return saved(pillow(mode), kind, **options, **dict(known[name] for name in known if name in wanted))


def bmp_16() -> bytes:
    """Five bits a channel."""
    values = rgb().astype(np.uint16) >> 3
    packed = (values[..., 0] << 10 | values[..., 1] << 5 | values[..., 2])[::-1]
    rows = np.zeros((HEIGHT, -(-WIDTH * 2 // 4) * 4), np.uint8)
    rows[:, : WIDTH * 2] = np.ascontiguousarray(packed.astype("<u2")).view(np.uint8)
    head = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 0, rows.size, 2835, 2835, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + rows.size, 0, 0, 54) + head + rows.tobytes()


def bmp_alpha() -> bytes:
    pixels = np.dstack([rgb()[::-1, :, ::-1], alpha()[::-1]]).tobytes()
    head = struct.pack("<IiiHHIIiiII", 108, WIDTH, HEIGHT, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return struct.pack("<2sIHHI", b"BM", 122 + len(pixels), 0, 0, 122) + head + pixels


def premultiplied() -> np.ndarray:
    samples = deep(4)
    samples[..., :3] = samples[..., :3].astype(np.float64) * samples[..., 3:] / 65535
    return samples


def every_file() -> dict[str, tuple[Callable[[frozenset[str]], bytes], tuple[str, ...]]]:
    """Maker of a file with the metadata that are named, and the names of those that it can have, by a name of ours."""
    files: dict[str, tuple[Callable[[frozenset[str]], bytes], tuple[str, ...]]] = {}
    of_png = tuple(PNG_METADATA)
    for mode in ("1", "L", "LA", "P", "P4", "RGB", "RGBA", "I;16"):
        files[f"png {mode}"] = (lambda wanted, mode=mode: png(saved(pillow(mode), "PNG"), wanted), of_png)
    for bits in (2, 4):
        few = Image.fromarray(rgb()).quantize(2**bits)
        files[f"png palette of {bits} bits"] = (
            lambda wanted, few=few, bits=bits: png(saved(few, "PNG", bits=bits), wanted),
            of_png,
        )
    soft = Image.fromarray(rgb()).quantize(100)
    clear = bytes(range(0, 200, 2))
    files["png palette, soft"] = (lambda wanted: png(saved(soft, "PNG", transparency=clear), wanted), of_png)
    files["png palette, one clear"] = (lambda wanted: png(saved(soft, "PNG", transparency=3), wanted), of_png)
    key = tuple(int(one) for one in rgb()[3, 5])
    files["png with a clear colour"] = (
        lambda wanted: png(saved(pillow("RGB"), "PNG", transparency=key), wanted),
        of_png,
    )
    files["png with a clear grey"] = (lambda wanted: png(saved(pillow("L"), "PNG", transparency=120), wanted), of_png)
    for channels, name in ((2, "LA"), (3, "RGB"), (4, "RGBA")):
        files[f"png {name} of 16 bits"] = (
            lambda wanted, channels=channels: png(png_16(deep(channels)), wanted),
            of_png,
        )

    for name, samples, colour_type in (
        ("RGB", rgb(), 2),
        *(
            (f"{mode} of 16 bits", deep(channels), kind)
            for mode, channels, kind in (("L", 1, 0), ("LA", 2, 4), ("RGB", 3, 2))
        ),
    ):
        files[f"png {name}, interlaced"] = (
            lambda wanted, samples=samples, kind=colour_type: png(png_interlaced(samples, kind), wanted),
            of_png,
        )

    of_jpeg = tuple(JPEG_METADATA)
    for mode in ("L", "RGB", "CMYK"):
        files[f"jpeg {mode}"] = (
            lambda wanted, mode=mode: jpeg(saved(pillow(mode), "JPEG", quality=88), wanted),
            of_jpeg,
        )
    files["jpeg progressive"] = (lambda wanted: jpeg(saved(pillow("RGB"), "JPEG", progressive=True), wanted), of_jpeg)
    files["jpeg of red, green, blue"] = (
        lambda wanted: jpeg(saved(pillow("RGB"), "JPEG", keep_rgb=True), wanted),
        of_jpeg,
    )
    for name in ("444", "422", "420", "440", "411"):
        files[f"jpeg {name}"] = (lambda wanted, name=name: jpeg(subsampled(name), wanted), of_jpeg)

    of_tiff = (*TIFF_METADATA, "dpi")
    for dtype in ("u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8"):
        files[f"tiff grey {dtype}"] = (tiff(dtype, 1), of_tiff)
        files[f"tiff grey {dtype} MM"] = (tiff(dtype, 1, byteorder=">"), of_tiff)
    for dtype in ("u1", "u2"):
        for channels in (3, 4):
            more = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
            files[f"tiff {channels} x {dtype}"] = (tiff(dtype, channels, **more), of_tiff)
            files[f"tiff {channels} x {dtype} deflate"] = (
                tiff(dtype, channels, compression="zlib", predictor=True, byteorder=">", **more),
                of_tiff,
            )
            files[f"tiff {channels} x {dtype} big, tiled"] = (
                tiff(dtype, channels, bigtiff=True, tile=(16, 16), **more),
                of_tiff,
            )
        files[f"tiff 3 planes {dtype}"] = (tiff(dtype, 3, planarconfig="separate", rowsperstrip=10), of_tiff)
    files["tiff white is zero"] = (tiff("u1", 1, photometric="miniswhite"), of_tiff)
    files["tiff white is zero, deep"] = (tiff("u2", 1, photometric="miniswhite"), of_tiff)
    files["tiff cmyk u2"] = (tiff("u2", 4, photometric="separated"), of_tiff)

    def associated(wanted: frozenset[str]) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, premultiplied(), photometric="rgb", extrasamples=["assocalpha"], metadata=None)
        return buffer.getvalue()

    files["tiff premultiplied"] = (associated, ())
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"):
        files[f"tiff of Pillow {mode}"] = (tiff_of_pillow(mode), ("exif", "icc"))
    for compression in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma", "jpeg"):
        files[f"tiff of Pillow RGB {compression}"] = (tiff_of_pillow("RGB", compression=compression), ("icc",))
    for mode, differences in (("RGB", 2), ("I;16", 2), ("F", 3)):
        make = tiff_of_pillow(mode, compression="tiff_lzw", differences=differences)
        files[f"tiff of Pillow {mode} in differences"] = (make, ("icc",))
    files["tiff fax"] = (tiff_of_pillow("1", compression="group4"), ("icc",))
    for turned in (3, 6):
        files[f"tiff turned {turned}"] = (_turned(turned), ())

    of_jp2 = (*JP2_METADATA, "icc")
    for mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        files[f"jpeg 2000 {mode}"] = (lambda wanted, mode=mode: jp2(saved(pillow(mode), "JPEG2000"), wanted), of_jp2)
    words = {"comment": "a word"}
    files["jpeg 2000 with words"] = (
        lambda wanted: saved(pillow("RGB"), "JPEG2000", **(words if wanted else {})),
        ("comment",),
    )
    files["jpeg 2000 stream"] = (lambda wanted: saved(pillow("RGB"), "JPEG2000", no_jp2=True), ())

    for colours in (2, 16, 256):
        for clear_at in (None, 0, colours - 1):
            files[f"gif {colours}, clear {clear_at}"] = (
                lambda wanted, colours=colours, clear_at=clear_at: gif(wanted, colours=colours, clear=clear_at),
                ("comment", "xmp"),
            )
    for magic, top in (
        *(("P1", 1), ("P4", 1), ("P2", 255), ("P2", 1000), ("P3", 65535), ("P5", 255), ("P5", 100), ("P5", 4095)),
        *(("P5", 65535), ("P6", 255), ("P6", 31), ("P6", 1023), ("P6", 65535)),
    ):
        files[f"ppm {magic} to {top}"] = (lambda wanted, magic=magic, top=top: ppm(magic, top, wanted), ("comment",))
    files["pfm"] = (lambda wanted: saved(Image.fromarray(deep(1, "f4")[..., 0]), "PPM"), ())

    rest = ("icc", "exif", "xmp")
    for mode in ("RGB", "RGBA"):
        files[f"webp {mode}"] = (lambda wanted, mode=mode: webp(mode, wanted, lossless=True, exact=True), rest)
        files[f"webp {mode} lossy"] = (lambda wanted, mode=mode: webp(mode, wanted, quality=80), rest)
        files[f"avif {mode}"] = (lambda wanted, mode=mode: webp(mode, wanted, "AVIF", quality=80), rest)
    for mode in ("1", "L", "P", "RGB"):
        files[f"bmp {mode}"] = (lambda wanted, mode=mode: saved(pillow(mode), "BMP", dpi=(300, 300)), ())
    files["bmp with alpha"] = (lambda wanted: bmp_alpha(), ())
    files["bmp of 16 bits"] = (lambda wanted: bmp_16(), ())
    return files


def _turned(orientation: int) -> Callable[[frozenset[str]], bytes]:
    def make(wanted: frozenset[str]) -> bytes:
        buffer = io.BytesIO()
        tag = (274, 3, 1, orientation, True)
        tifffile.imwrite(buffer, deep(3), photometric="rgb", extratags=[tag], metadata=None)
        return buffer.getvalue()

    return make
