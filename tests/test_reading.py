"""What data.py reads from files of every kind: the table of data.read(), damage, decoders."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

import data
import train
from data import DataError, Folder

HEIGHT = 12
WIDTH = 10


def values(*channels: int, seed: int = 0, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    shape = (HEIGHT, WIDTH, *channels)
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


GRAY = values()
RGB = values(3)
RGBA = values(4)
GRAY_16 = values(high=65536, dtype=np.uint16)
RGB_16 = values(3, high=65536, dtype=np.uint16)
FIVE_16 = values(5, high=65536, dtype=np.uint16)
FLOAT = np.random.default_rng(0).normal(size=(HEIGHT, WIDTH)).astype(np.float32)
CLASSES = values(high=4)
BITS = values(high=2).astype(bool)


# --------------------------------------------------------------------------------- Writing files


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    array: np.ndarray, bits: int = 8, color: int = 0, before: bytes = b"", behind: bytes = b""
) -> bytes:
    """A PNG of a color type, with chunks before and behind the pixels."""
    height, width = array.shape[:2]
    rows = array.reshape(height, -1)
    if bits == 16:
        packed = rows.astype(">u2").view(np.uint8)
    elif bits == 8:
        packed = rows
    else:
        low = np.unpackbits(rows[..., None], axis=-1)[..., -bits:]  # (H, W, bits)
        packed = np.packbits(low.reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw)) + behind
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(array: np.ndarray, photometric: int = 2, **tags: int) -> bytes:
    """An uncompressed TIFF (H, W, C) of any type, with further tags as in t338=2."""
    height, width, channels = array.shape
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = {
        256: width,
        257: height,
        258: 8 * array.dtype.itemsize,
        259: 1,
        262: photometric,
        273: 0,
        277: channels,
        278: height,
        279: array.nbytes,
        339: kind,
    }
    entries |= {int(name[1:]): value for name, value in tags.items()}
    first = 8 + 2 + 12 * len(entries) + 4
    repeated = {258: first, 339: first + 2 * channels}
    entries[273] = first + 4 * channels
    directory = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        if tag in repeated and channels > 2:
            directory += struct.pack("<HHII", tag, 3, channels, repeated[tag])
        elif tag in repeated:
            directory += struct.pack("<HHIHH", tag, 3, channels, value, value)
        else:
            directory += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    directory += struct.pack("<I", 0)
    directory += struct.pack(f"<{channels}H", *[entries[258]] * channels)
    directory += struct.pack(f"<{channels}H", *[kind] * channels)
    return struct.pack("<2sHI", b"II", 42, 8) + directory + array.tobytes()


def encoded(array: np.ndarray | Image.Image, form: str, **keywords) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, form, **keywords)
    return file.getvalue()


def paletted(indices: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(palette)
    return image


def pages(*arrays: np.ndarray, **keywords) -> bytes:
    images = [Image.fromarray(array) for array in arrays]
    return encoded(images[0], "TIFF", save_all=True, append_images=images[1:], **keywords)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def overview(flag: int, size: int) -> bytes:
    """A TIFF with a second page of NewSubfileType `flag`."""
    file = io.BytesIO()
    second = Image.fromarray(np.zeros((size + 2, size), np.uint8))
    writer = AppendingTiffWriter(file, new=True)
    Image.fromarray(GRAY).save(writer, "TIFF")
    writer.newFrame()
    second.save(writer, "TIFF", tiffinfo={254: flag} if flag else {})
    writer.newFrame()
    return file.getvalue()


# --------------------------------------------------------------------------------------- The table

COLORS = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
GRAYS = [0, 0, 0, 5, 5, 5, 18, 18, 18, 255, 255, 255]
LEVELS = np.array(GRAYS[::3], np.uint8)
TRANSPARENT = chunk(b"tRNS", b"\0\5")
JPEG = np.array(Image.open(io.BytesIO(encoded(RGB, "JPEG"))))
GRAY_JPEG = np.array(Image.open(io.BytesIO(encoded(GRAY, "JPEG"))))
CMYK = Image.fromarray(RGB).convert("CMYK")
YCBCR = Image.fromarray(RGB).convert("YCbCr")
LABEL_32 = values(high=4, dtype=np.int32)


def gray(array: np.ndarray) -> dict:
    return {1: array, 3: np.stack([array] * 3, -1)}


CASES = [
    # name of the file, its content, the image for each number of channels, the label
    ("gray.png", png(GRAY), gray(GRAY), GRAY),
    ("gray-tRNS.png", png(GRAY, before=TRANSPARENT), gray(GRAY), GRAY),
    ("gray-gamma.png", png(GRAY, before=chunk(b"gAMA", b"\0\1\x86\xa0")), gray(GRAY), GRAY),
    ("gray-16.png", png(GRAY_16, 16), gray(GRAY_16), GRAY_16),
    ("gray-1.png", png(BITS.view(np.uint8), 1), gray(BITS * np.uint8(255)), BITS),
    ("gray-2.png", png(CLASSES, 2), gray(CLASSES * np.uint8(85)), None),
    ("gray-4.png", png(CLASSES, 4), gray(CLASSES * np.uint8(17)), None),
    ("gray-alpha.png", png(RGBA[..., :2], 8, 4), gray(RGBA[..., 0]) | {2: RGBA[..., :2]}, None),
    (
        "gray-alpha-16.png",
        png(FIVE_16[..., :2], 16, 4),
        gray(FIVE_16[..., 0]) | {2: FIVE_16[..., :2]},
        None,
    ),
    ("rgb.png", png(RGB, 8, 2), {3: RGB}, None),
    ("rgb-tRNS.png", png(RGB, 8, 2, chunk(b"tRNS", bytes(6))), {3: RGB}, None),
    ("rgb-16.png", png(RGB_16, 16, 2), {3: RGB_16}, None),
    ("rgba.png", png(RGBA, 8, 6), {3: RGBA[..., :3], 4: RGBA}, None),
    (
        "rgba-16.png",
        png(FIVE_16[..., :4], 16, 6),
        {3: FIVE_16[..., :3], 4: FIVE_16[..., :4]},
        None,
    ),
    (
        "colors.png",
        encoded(paletted(CLASSES, COLORS), "PNG"),
        {3: np.array(COLORS, np.uint8).reshape(-1, 3)[CLASSES]},
        CLASSES,
    ),
    (
        "colors-alpha.png",
        encoded(paletted(CLASSES, COLORS), "PNG", transparency=b"\0\x80"),
        {3: np.array(COLORS, np.uint8).reshape(-1, 3)[CLASSES]},
        CLASSES,
    ),
    (
        "grays.png",
        encoded(paletted(CLASSES, GRAYS), "PNG"),
        gray(LEVELS[CLASSES]),
        LEVELS[CLASSES],
    ),
    (
        "grays-8.png",
        png(CLASSES, 8, 3, chunk(b"PLTE", bytes(GRAYS))),
        gray(LEVELS[CLASSES]),
        LEVELS[CLASSES],
    ),
    # 26 bytes, as many as it takes to be opened.
    (
        "cut.jpg",
        bytes.fromhex("ffd8 ffc0000b080002000201011100 ffda0008010100003f00 00"),
        {},
        None,
    ),
    ("grays-short.png", png(CLASSES, 8, 3, chunk(b"PLTE", bytes(GRAYS[:9]))), {}, None),
    (
        "grays.tif",
        encoded(paletted(CLASSES, GRAYS), "TIFF"),
        gray(LEVELS[CLASSES]),
        LEVELS[CLASSES],
    ),
    (
        "colors.tif",
        encoded(paletted(CLASSES, COLORS), "TIFF"),
        {3: np.array(COLORS, np.uint8).reshape(-1, 3)[CLASSES]},
        CLASSES,
    ),
    (
        "colors.bmp",
        encoded(paletted(CLASSES, COLORS), "BMP"),
        {3: np.array(COLORS, np.uint8).reshape(-1, 3)[CLASSES]},
        CLASSES,
    ),
    (
        "colors.gif",
        encoded(paletted(CLASSES, COLORS), "GIF"),
        {3: np.array(COLORS, np.uint8).reshape(-1, 3)[CLASSES]},
        CLASSES,
    ),
    ("rgb.jpg", encoded(RGB, "JPEG"), {3: JPEG}, None),
    ("gray.jpg", encoded(GRAY, "JPEG"), gray(GRAY_JPEG), None),
    ("cmyk.tif", encoded(CMYK, "TIFF"), {3: np.array(CMYK.convert("RGB"))}, None),
    ("ycbcr.tif", encoded(YCBCR, "TIFF"), {3: np.array(YCBCR.convert("RGB"))}, None),
    ("lab.tif", encoded(Image.new("LAB", (WIDTH, HEIGHT)), "TIFF"), {}, None),
    ("rgb.webp", encoded(RGB, "WEBP", lossless=True), {3: RGB}, None),
    (
        "rgba.webp",
        encoded(RGBA, "WEBP", lossless=True, exact=True),
        {3: RGBA[..., :3], 4: RGBA},
        None,
    ),
    ("gray.bmp", encoded(GRAY, "BMP"), gray(GRAY), GRAY),
    ("bits.bmp", encoded(BITS, "BMP"), gray(BITS * np.uint8(255)), BITS),
    ("rgb.bmp", encoded(RGB, "BMP"), {3: RGB}, None),
    ("gray.pgm", encoded(GRAY, "PPM"), gray(GRAY), GRAY),
    ("gray.tif", encoded(GRAY, "TIFF"), gray(GRAY), GRAY),
    ("deflate.tif", encoded(GRAY, "TIFF", compression="tiff_deflate"), gray(GRAY), GRAY),
    ("jpeg.tif", encoded(RGB[..., 0], "TIFF", compression="jpeg", quality=100), None, None),
    ("bits.tif", encoded(BITS, "TIFF"), gray(BITS * np.uint8(255)), BITS),
    ("gray-16.tif", encoded(GRAY_16, "TIFF"), gray(GRAY_16), GRAY_16),
    ("gray-16-big-endian.tif", encoded(GRAY_16.astype(">u2"), "TIFF"), gray(GRAY_16), GRAY_16),
    ("int32.tif", encoded(LABEL_32, "TIFF"), gray(LABEL_32.astype(np.float32)), LABEL_32),
    ("float.tif", encoded(FLOAT, "TIFF"), gray(FLOAT), None),
    ("rgb.tif", encoded(RGB, "TIFF"), {3: RGB}, None),
    ("rgb-planar.tif", encoded(RGB, "TIFF", tiffinfo={284: 2}), None, None),
    ("rgba.tif", encoded(RGBA, "TIFF"), {3: RGBA[..., :3], 4: RGBA}, None),
    ("pages.tif", pages(*np.moveaxis(FIVE_16, -1, 0)), {5: FIVE_16}, None),
    ("three-pages.tif", pages(*np.moveaxis(RGB, -1, 0)), {3: RGB}, None),
    ("two-pages.tif", pages(GRAY, RGB[..., 0]), {2: np.stack([GRAY, RGB[..., 0]], -1)}, None),
    ("overview.tif", overview(1, 6), gray(GRAY), GRAY),
    ("thumbnail.tif", overview(0, 6), gray(GRAY), GRAY),
    ("mask.tif", overview(4, WIDTH), gray(GRAY), GRAY),
    ("larger.tif", overview(0, 40), {}, None),
    ("hw.npy", npy(FLOAT), gray(FLOAT), None),
    ("classes.npy", npy(LABEL_32), gray(LABEL_32.astype(np.float32)), LABEL_32),
    ("bool.npy", npy(BITS), gray(BITS.astype(np.float32)), BITS.view(np.uint8)),
    ("big-endian.npy", npy(GRAY_16.astype(">u2")), gray(GRAY_16), GRAY_16),
    ("hw1.npy", npy(GRAY[..., None]), gray(GRAY), GRAY),
    ("hw2.npy", npy(RGB[..., :2]), {2: RGB[..., :2]}, None),
    ("hw4.npy", npy(RGBA), {4: RGBA}, None),
    ("hw5.npy", npy(FIVE_16), {5: FIVE_16}, None),
    ("chw.npy", npy(RGB.transpose(2, 0, 1)), {}, None),
    ("1hw.npy", npy(GRAY[None]), {}, None),
    ("empty.npy", npy(GRAY[:0]), {}, None),
    (
        "animation.gif",
        encoded(GRAY, "GIF", save_all=True, append_images=[Image.fromarray(RGB)]),
        {},
        None,
    ),
    (
        "animation.png",
        encoded(GRAY, "PNG", save_all=True, append_images=[Image.fromarray(255 - GRAY)]),
        {},
        None,
    ),
    ("unknown.ico", encoded(RGB, "ICO", sizes=[(WIDTH, HEIGHT)]), {}, None),
]


@pytest.mark.parametrize(
    ("name", "content", "images", "label"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_table(name, content, images, label, tmp_path):
    """Values are those that were written, in every number of channels; all else is an error."""
    check_file(tmp_path / name, content, images, label)


def check_file(path: Path, content: bytes, images: dict | None, label: np.ndarray | None) -> None:
    path.write_bytes(content)
    for channels in (1, 2, 3, 4, 5):
        if images is not None and channels in images:
            found = data.read_image(str(path), channels)
            expected = images[channels].reshape(HEIGHT, WIDTH, channels)
            assert np.array_equal(found, expected), channels
            assert found.dtype == expected.dtype
            assert found.flags.writeable
            assert data.image_size(str(path)) == (HEIGHT, WIDTH)
        elif images is not None:
            with pytest.raises(DataError, match=path.stem):
                data.read_image(str(path), channels)
    if label is None:
        with pytest.raises(DataError, match=path.stem):
            data.read_label(str(path))
    else:
        found = data.read_label(str(path))
        assert np.array_equal(found, label)
        assert found.dtype == label.dtype


# ----------------------------------------------------------------------- TIFF beyond Pillow's reach

WIDE_TIFF = [
    ("rgb-16.tif", tiff(RGB_16), {3: RGB_16}, None),
    (
        "rgba-16.tif",
        tiff(FIVE_16[..., :4], t338=2),
        {3: FIVE_16[..., :3], 4: FIVE_16[..., :4]},
        None,
    ),
    ("four-bands.tif", tiff(RGBA, t338=0), {4: RGBA}, None),
    ("five-bands.tif", tiff(FIVE_16, photometric=1), {5: FIVE_16}, None),
    ("two-bands.tif", tiff(FIVE_16[..., :2], photometric=1), {2: FIVE_16[..., :2]}, None),
    ("two-bytes.tif", tiff(RGB[..., :2], photometric=1, t338=0), {2: RGB[..., :2]}, None),
    ("multiplied.tif", tiff(FIVE_16[..., :4], t338=1), {}, None),
]
SIGNED = CLASSES.view(np.int8) - 1
DOUBLE = FLOAT.astype(float)
UNSIGNED = CLASSES.astype(np.uint32)
for kind, array, is_label in (("int8", SIGNED, 1), ("double", DOUBLE, 0), ("uint32", UNSIGNED, 1)):
    content = tiff(array[..., None], photometric=1)
    label = array if is_label else None
    WIDE_TIFF.append((f"{kind}.tif", content, gray(array.astype(np.float32)), label))


@pytest.mark.optional("tifffile")
def test_tiff_of_many_bits_and_bands(tmp_path):
    for name, content, images, label in WIDE_TIFF:
        check_file(tmp_path / name, content, images, label)


@pytest.mark.parametrize("name", [case[0] for case in WIDE_TIFF])
def test_tiff_is_never_read_in_part(name, tmp_path, monkeypatch):
    """Without tifffile, the error says what to install."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    path = tmp_path / name
    path.write_bytes(next(content for known, content, *_ in WIDE_TIFF if known == name))
    for read in (lambda: data.read_image(str(path), 3), lambda: data.read_label(str(path))):
        with pytest.raises(DataError, match="pip install tifffile"):
            read()


# --------------------------------------------------------------------------------- EXIF orientation


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores with this orientation."""
    undo = {
        2: lambda x: x[:, ::-1],
        3: lambda x: np.rot90(x, 2),
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x[::-1], 1),
        8: lambda x: np.rot90(x, -1),
    }
    return np.ascontiguousarray(undo[orientation](array)) if orientation > 1 else array


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """Images, labels and sizes are upright in every format, with the tag before or behind."""
    assert np.array_equal(data.turn_upright(turned(RGB, orientation), orientation), RGB)
    smooth = np.kron(values(3)[:3, :2], np.ones((16, 16, 1))).astype(np.uint8)
    late = chunk(b"eXIf", exif(orientation).tobytes()[6:])
    stored = turned(smooth, orientation)
    files = {
        "a.jpg": encoded(stored, "JPEG", exif=exif(orientation), quality=100, subsampling=0),
        "b.png": encoded(stored, "PNG", exif=exif(orientation)),
        "c.png": png(stored, 8, 2, behind=late),
        "d.tif": encoded(stored, "TIFF", tiffinfo={274: orientation}),
        "e.webp": encoded(stored, "WEBP", lossless=True, exif=exif(orientation)),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        difference = data.read_image(str(path), 3).astype(int) - smooth
        assert np.abs(difference).max() <= (4 if name == "a.jpg" else 0), name
        assert data.image_size(str(path)) == smooth.shape[:2]
    path = tmp_path / "label.png"
    path.write_bytes(encoded(turned(CLASSES, orientation), "PNG", exif=exif(orientation)))
    assert np.array_equal(data.read_label(str(path)), CLASSES)


def test_damaged_exif_is_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(RGB, "JPEG", exif=b"Exif\0\0nonsense"))
    assert np.array_equal(data.read_image(str(path), 3), JPEG)


# ------------------------------------------------------------------------------------------- Damage


def damaged(content: bytes, case: int) -> bytes:
    """A file cut short, with a flipped bit, or with four bytes that are overwritten."""
    rng = np.random.default_rng(case)
    content = bytearray(content)
    position = int(rng.integers(8, len(content) - 4))
    if case % 3 == 0:
        return bytes(content[:position])
    if case % 3 == 1:
        content[position] ^= 1 << int(rng.integers(8))
    else:
        content[position : position + 4] = rng.bytes(4)
    return bytes(content)


def check_damaged_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for name, content, *_ in CASES:
        if not name.endswith(".png") or name == "animation.png":
            continue
        for case in range(60):
            path.write_bytes(damaged(content, case))
            for read in (lambda: data.read_image(str(path), 3), lambda: data.read_label(str(path))):
                with pytest.raises(DataError, match="a.png"):
                    read()


def test_damaged_png_is_always_an_error(tmp_path):
    """By Pillow it would not be, and torchvision's decoder would end the process."""
    check_damaged_png(tmp_path)


def with_pixels(content: bytes, change) -> bytes:
    """A PNG with one chunk IDAT whose compressed pixels are changed, and its checksum with them."""
    start = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    stream = change(content[start + 4 : start + 4 + length])
    chunk = b"IDAT" + stream
    checksum = struct.pack(">I", zlib.crc32(chunk))
    rest = content[start + 8 + length :]
    return content[: start - 4] + struct.pack(">I", len(stream)) + chunk + checksum + rest


def test_damaged_pixels_with_right_checksums(tmp_path):
    """They are found by what reads files before training; torchvision's decoder would crash."""
    path = tmp_path / "a.png"
    for pixels in (
        RGB,
        RGB[..., 0],
        np.dstack([RGB, RGB[..., :1]]),
        RGB[..., :1].astype(np.uint16),
    ):
        content = encoded(pixels.squeeze(), "PNG")
        path.write_bytes(with_pixels(content, bytes))
        data.check_pixels_of_png(str(path))
        for change in (
            lambda stream: b"",
            lambda stream: stream[2:],
            lambda stream: stream[: len(stream) // 2],
            lambda stream: stream[:-1] + bytes([stream[-1] ^ 1]),
            lambda stream: zlib.compress(zlib.decompress(stream)[:-1]),
            lambda stream: zlib.compress(b"\7" + zlib.decompress(stream)[1:]),
        ):
            path.write_bytes(with_pixels(content, change))
            with pytest.raises(DataError, match="a.png"):
                data.check_pixels_of_png(str(path))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_truncated_tiff(compression, tmp_path):
    path = tmp_path / "a.tif"
    content = encoded(RGB, "TIFF", compression=compression)
    for length in (0, 7, 100, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="a.tif"):
            data.read_image(str(path), 3)


@pytest.mark.optional("tifffile")
def test_truncated_wide_tiff(tmp_path):
    path = tmp_path / "a.tif"
    content = tiff(FIVE_16, photometric=1)
    for length in (7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="a.tif"):
            data.read_image(str(path), 5)


# ----------------------------------------------------------------------------------------- Decoders


def check_first_rows(tmp_path: Path) -> None:
    for name, content, images, _ in CASES:
        path = tmp_path / name
        path.write_bytes(content)
        for rows in (1, 7, HEIGHT, HEIGHT + 1) if images else ():
            whole, _ = data.read(str(path))
            part, _ = data.read(str(path), rows=rows)
            part = part.reshape(whole.shape)  # (H, W, 1) may be (H, W)
            assert np.array_equal(part[:rows], whole[:rows]), (name, rows)


def test_first_rows(tmp_path):
    check_first_rows(tmp_path)
    path = tmp_path / "a.png"
    content = png(values(3, seed=1), 8, 2)
    path.write_bytes(content)
    part, _ = data.read(str(path), rows=3)
    assert not part[3:].any()  # they have not been decoded
    for damage in (content[:-30], content[:-20] + b"?" + content[-19:]):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="a.png"):
            data.read(str(path), rows=3)


@pytest.mark.optional("pywuffs")
def test_wuffs_reads_the_same(tmp_path):
    assert data.decoder_name() == "pywuffs"
    for name, content, images, label in CASES:
        check_file(tmp_path / name, content, images, label)
    check_first_rows(tmp_path)
    check_damaged_png(tmp_path)


def test_pillow_alone_reads_the_same(tmp_path, monkeypatch):
    """As with a torchvision that has dropped its decoder; but 16 bits of RGB are an error."""
    monkeypatch.setattr(data, "decoder_name", lambda: "Pillow")
    monkeypatch.setattr(data, "torchvision_decodes", lambda: False)
    for name, content, images, label in CASES:
        if name in ("gray-alpha-16.png", "rgb-16.png", "rgba-16.png"):
            images = {}
        check_file(tmp_path / name, content, images, label)


# ----------------------------------------------------------------------------------- In a data set


def folder_of(root: Path, labels: dict[str, bytes], **keywords) -> Folder:
    """A data set of gray images with these label files."""
    for kind in ("images", "labels"):
        (root / kind).mkdir(exist_ok=True)
    for name, content in labels.items():
        (root / "labels" / name).write_bytes(content)
        (root / "images" / name).with_suffix(".png").write_bytes(png(GRAY))
    return Folder("", root=str(root), images="images", labels="labels", **keywords)


def test_label_of_one_bit(tmp_path):
    """White is 1 in a data set of 0 and 1, 255 in one of 0 and 255, and an error elsewhere."""
    content = {"a.png": png(BITS.view(np.uint8), 1)}
    for classes, values in ((["no", "yes"], None), (["no", "yes"], [0, 255])):
        _, label = folder_of(tmp_path, content, classes=classes, values=values).load(0)
        assert np.array_equal(label, BITS)
    three = folder_of(tmp_path, content, classes=["a", "b", "c"])
    with pytest.raises(DataError, match="ambiguous"):
        three.load(0)


def test_jpeg_labels_are_refused(tmp_path):
    dataset = folder_of(tmp_path, {"a.jpg": encoded(CLASSES, "JPEG")}, classes=["a", "b", "c", "d"])
    with pytest.raises(DataError, match="lossy") as error:
        dataset.load(0)
    assert "a.jpg" in str(error.value)


def test_labels_that_are_written_here_read_back(tmp_path):
    """Also with a palette of black and white."""
    for palette in ([[0, 0, 0], [255, 255, 255]], [[0, 0, 0], [0, 0, 255]]):
        train.palette_image(torch.from_numpy(CLASSES), palette).save(tmp_path / "a.png")
        assert np.array_equal(data.read_label(str(tmp_path / "a.png")), CLASSES)


def test_cache_of_an_earlier_version_is_not_used(tmp_path, monkeypatch):
    dataset = folder_of(
        tmp_path, {"a.png": png(CLASSES)}, classes=["a", "b", "c", "d"], in_channels=1
    )
    monkeypatch.setattr(data, "READING_VERSION", data.READING_VERSION - 1)
    stamp = dataset.stamp()
    data.CachedDataset(dataset, str(tmp_path / "cache")).load(0)
    monkeypatch.undo()
    assert dataset.stamp() != stamp
    data.CachedDataset(dataset, str(tmp_path / "cache")).load(0)
    assert len(list((tmp_path / "cache").iterdir())) == 2
