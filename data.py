"""The data: files -> decode -> scale, crop, flip -> batch -> device; and the data sets.

    data = Data(**config["data"], seed=0)
    for batch in data.train_batches(rank=0, world_size=1, start=0):  # on the host, uint8
        image, label = data.prepare(batch, device)  # color distortion and normalization

A training sample is a function of the seed and of `sample_index`, its place in the endless stream
of training samples. It does not depend on the number of processes or workers, nor on where a run
was resumed.

Training follows MMSegmentation's pipeline (RandomResize, RandomCrop, RandomFlip,
PhotoMetricDistortion, Normalize, Pad), with two differences for speed: only the pixels inside the
crop are scaled, and colors are distorted on the device, for the whole batch at once.
"""

import collections
import contextlib
import dataclasses
import difflib
import fcntl
import filecmp
import functools
import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import resource
import signal
import struct
import tempfile
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch, which reads the environment that this sets.
from dist_utils import StopSignal, UserError

# isort: split
import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

IGNORE = 255  # the label of ignored pixels, whatever value the files use
INVALID = 254  # marks a label value that is no class, so a data set has at most 253 classes
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".npy"}
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, 0..255
IMAGENET_STD = (58.395, 57.12, 57.375)

# The purposes of random streams: np.random.default_rng((seed, purpose, index)).
ORDER = 1
SAMPLE = 2
SCENE = 3
PART = 4

Size = tuple[int, int]  # (height, width)
Sample = tuple[np.ndarray, np.ndarray]  # image (H, W, C) and label (H, W) uint8
Batch = dict[str, Tensor]  # see Data.train_batches() and Data.val_batches()


class DataError(UserError):
    """The data or its settings are wrong."""


class DataWarning(UserWarning):
    """The data or a setting is valid, but probably not intended. train.py logs it like a note."""


def warn(text: str) -> None:
    warnings.warn(text, DataWarning, stacklevel=3)


# ------------------------------------------------------------------------------------ Reading files

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM")  # as Pillow names them
LOSSY_FORMATS = ("JPEG", "MPO", "WEBP")  # MPO is a JPEG of several pictures
# Values of TIFF's tag Compression: none, CCITT (three kinds), LZW, deflate (two), PackBits, LZMA,
# Zstandard.
LOSSLESS_TIFF = {1, 2, 3, 4, 5, 8, 32946, 32773, 34925, 50000}
# Part of the keys of data.cache. To be raised whenever files are read differently.
READING_VERSION = 2


@functools.cache
def torchvision_decodes() -> bool:
    """Load torchvision's image decoder; return whether it is there.

    It is faster than Pillow and keeps all 16 bits of an RGB PNG, but a future torchvision may drop
    it. Only its shared library is loaded: importing the package takes a second and 100 MB, because
    that also imports torch's compiler.
    """
    package = importlib.util.find_spec("torchvision").submodule_search_locations[0]
    for path in glob.glob(os.path.join(package, "image*.so")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(path)
    return hasattr(torch.ops.image, "decode_image")


@functools.cache
def decoder_name() -> str:
    """Return the package that decodes PNG files: pywuffs, the fastest, if it is installed."""
    if importlib.util.find_spec("pywuffs"):
        return "pywuffs"
    return "torchvision" if torchvision_decodes() else "Pillow"


@contextlib.contextmanager
def reraise_as_data_error(path: str) -> Iterator[None]:
    """Re-raise read errors as DataError naming `path`."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(
            f"{path}: this file no longer exists. Restore it, or start the run again to rescan the "
            "folders"
        ) from None
    except PermissionError:
        raise DataError(f"{path}: this user may not read it; set its permissions") from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{path}: the image has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels, "
            "the limit against files that only claim to be large. If it really is that large, "
            "set data.large_images=true"
        ) from None
    except (
        OSError,
        EOFError,
        MemoryError,
        RuntimeError,
        ValueError,
        SyntaxError,
        zlib.error,
    ) as error:
        raise DataError(
            f"{path}: cannot be decoded ({error}). The file is truncated, damaged, too large or of "
            "an unknown type: replace it, or remove it and its label from the data set"
        ) from None


def read(path: str, as_label: bool = False, rows: int | None = None) -> tuple[np.ndarray, bool]:
    """Read an image or a label, (H, W) or (H, W, C), and whether its last channel is alpha.

    rows: how many rows from the top are needed; others may be 0. Decoding less of a PNG is faster.

    This is what a file means by its content (in brackets, Pillow's name of the mode), as an image
    with data.in_channels 1, 3 or another number n, and as a label. Whatever is missing, and every
    other mode and format, is an error.

        content                            1         3          n         label
        ---------------------------------  --------  ---------  --------  --------------------
        gray, 8, 16, 32 bits (L, I;16, I)  values    repeated             values
        gray, 1 bit (1)                    0, 255    repeated             0, 1; Folder.of_bits()
        gray, 2 or 4 bits (L)              scaled    repeated
        gray, float (F)                    values    repeated
        gray and alpha (LA)                gray      repeated   2: both
        RGB, 8 or 16 bits                            values
        RGB and alpha (RGBA)                         RGB        4: both
        palette of grays (P)               grays     repeated             grays
        palette with a color (P)                     RGB                  indices
        CMYK, YCbCr                                  to RGB
        TIFF with several bands or pages             3 bands    n bands
        .npy (H, W) or (H, W, 1)           values    repeated             integers, bool
        .npy (H, W, C)                               C = 3      C = n
        .npy (C, H, W)

    - PNG, JPEG, TIFF, WebP, BMP, GIF and PPM are read, without animations. A label must not be in
      a lossy format: JPEG, WebP, or TIFF with such a compression.
    - Image and label are turned upright by EXIF's orientation.
    - A single color that is marked as transparent (PNG's tRNS) and gamma are ignored.
    - Each page of a TIFF is a band, except overviews, masks and pages smaller than the first. A
      TIFF that Pillow would not read whole, such as one of 16 bits and several channels, is read
      by tifffile if that is installed.
    """
    with reraise_as_data_error(path):
        if path.endswith(".npy"):
            return read_npy(path), False
        try:
            image = Image.open(path, formats=FORMATS)  # the header; rejects decompression bombs
        except UnidentifiedImageError:
            if is_tiff(path):
                return read_with_tifffile(path, as_label)
            raise
        with image:
            if as_label and image.format in LOSSY_FORMATS:
                raise lossy_label(path, image.format)
            if image.format == "TIFF":
                return read_tiff(image, path, as_label)
            if image.format in ("PNG", "WEBP", "GIF") and image.is_animated:
                raise ValueError("it is an animation")
            orientation = exif_orientation(image)
            array = decode(image, path, as_label, rows if orientation == 1 else None)
            if array is None:
                array = pixels_of(image, as_label)
            has_alpha = array.ndim == 3 and array.shape[-1] in (2, 4)
            return turn_upright(array, orientation), has_alpha


def read_npy(path: str) -> np.ndarray:
    array = np.load(path, allow_pickle=False)
    is_array = isinstance(array, np.ndarray)  # False for a zip archive
    if not is_array or array.ndim < 2 or array.dtype.kind not in "buif" or not array.size:
        raise ValueError("it holds no numeric array (H, W) or (H, W, C)")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def pixels_of(image: Image.Image, as_label: bool = False) -> np.ndarray:
    """Return the pixels of a Pillow image, (H, W) or (H, W, C); see the table in read()."""
    if image.mode == "P":
        indices = np.array(image)
        # (entries, 3); Pillow may have read less than 256 of them.
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        is_gray = (palette == palette[:, :1]).all()
        if as_label and not is_gray:
            return indices
        if indices.max() >= len(palette):
            raise ValueError(f"the color {indices.max()} is not in its palette")
        return (palette[:, 0] if is_gray else palette)[indices]
    if image.mode in ("PA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    elif image.mode == "1" and not as_label:
        image = image.convert("L")
    elif image.mode not in ("1", "L", "LA", "I", "F", "RGB", "RGBA") and image.mode[:4] != "I;16":
        raise ValueError(f"images of mode {image.mode} are not read; convert it to RGB")
    array = np.array(image)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def decode(image: Image.Image, path: str, as_label: bool, rows: int | None) -> np.ndarray | None:
    """Decode a PNG or JPEG that is open in Pillow by a faster decoder, (H, W, C) or (H, W).

    Returns None if there is none for its mode. Checks a PNG in any case. For `rows` see read().
    """
    if image.format not in ("PNG", "JPEG"):
        return None
    content = np.fromfile(path, np.uint8)
    bits = 8  # of a channel
    has_rows = False  # whether rows are stored one after another, as in a PNG without interlacing
    if image.format == "PNG":
        check_png(content)
        bits = content[24]
        has_rows = content[28] == 0
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
        return None
    if as_label and bits < 8:
        raise ValueError(
            f"a label of {bits} bits is ambiguous: are its values 0, 1, ... or scaled to 0..255? "
            "Convert it to 8 bits"
        )
    has_plain_mode = image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info
    if bits == 8 and has_plain_mode and has_rows:
        height = image.height
        rows = height if rows is None else min(rows, height)
        # Pillow is slower than torchvision, but can stop.
        if decoder_name() == "pywuffs" or rows < 0.8 * height:
            return decode_rows(image, content, rows)
    if torchvision_decodes():
        decoded = torch.ops.image.decode_image(torch.from_numpy(content), 0, False)  # (C, H, W)
        return decoded.permute(1, 2, 0).numpy()
    if bits == 16 and image.mode != "I;16":
        raise ValueError("Pillow does not keep 16 bits of it, and torchvision has no decoder")
    return None


def decode_rows(image: Image.Image, content: np.ndarray, rows: int) -> np.ndarray:
    """Decode the first rows of a PNG of mode L, RGB or RGBA, without interlacing; others are 0.

    content: (bytes,) uint8. Its header is changed to that of a file with only these rows.
    """
    content[20:24] = np.frombuffer(struct.pack(">I", rows), np.uint8)
    content[29:33] = np.frombuffer(struct.pack(">I", zlib.crc32(content[12:29])), np.uint8)
    channels = [] if image.mode == "L" else [len(image.mode)]
    pixels = np.zeros((image.height, image.width, *channels), np.uint8)
    if decoder_name() == "pywuffs":
        part = decode_by_wuffs(content, image.mode, has_more_rows=rows < image.height)
        pixels[:rows] = part.reshape(pixels[:rows].shape)
    else:
        with Image.open(io.BytesIO(content)) as part:
            pixels[:rows] = part
    return pixels


def decode_by_wuffs(content: np.ndarray, mode: str, has_more_rows: bool) -> np.ndarray:
    """Decode a PNG of mode L, RGB or RGBA: (bytes,) uint8 -> (H, W, C).

    has_more_rows: whether the file has more rows than its header says.
    """
    import pywuffs

    formats = {"L": "Y", "RGB": "RGB", "RGBA": "RGBA_NONPREMUL"}
    config = pywuffs.aux.ImageDecoderConfig()
    config.enabled_decoders = [pywuffs.ImageDecoderType.PNG]
    config.pixel_format = getattr(pywuffs.PixelFormat, formats[mode])
    config.max_incl_dimension = 2**24 - 1
    # By default, pywuffs accepts damaged pixels.
    config.quirks = {pywuffs.ImageDecoderQuirks.IGNORE_CHECKSUM: 0}
    result = pywuffs.aux.ImageDecoder(config).decode(content.tobytes())
    error = result.error_message
    if error and not (has_more_rows and error == "base: too much data"):
        raise ValueError(error)
    return result.pixbuf


def check_png(content: np.ndarray) -> None:
    """Raise ValueError if a PNG is truncated or its checksums are wrong; content: (bytes,) uint8.

    Pillow does not notice all damage, and torchvision's decoder crashes on some.
    """
    for _ in png_chunks(content):
        pass


def png_chunks(content: np.ndarray) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yield type and data of each chunk; raises as check_png()."""
    start = 8  # of a chunk: length, type, data, checksum
    kind = b""
    while kind != b"IEND":
        if start + 12 > len(content):
            raise ValueError("it is truncated")
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 8 + length
        if end + 4 > len(content):
            raise ValueError("it is truncated")
        if zlib.crc32(content[start + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise ValueError("a checksum is wrong")
        yield kind, content[start + 8 : end]
        start = end + 4


def check_pixels_of_png(path: str) -> None:
    """Raise DataError for a PNG whose pixels are damaged although its checksums are right.

    torchvision's decoder crashes on it. To check every file would double the time of decoding.
    """
    with reraise_as_data_error(path):
        content = np.fromfile(path, np.uint8)
        if content[:8].tobytes() != b"\x89PNG\r\n\x1a\n":
            return
        chunks = list(png_chunks(content))
        width, height, bits, color, *_, interlace = struct.unpack_from(">IIBBBBB", chunks[0][1])
        channels = {2: 3, 4: 2, 6: 4}.get(color, 1)
        row = 1 + (width * channels * bits + 7) // 8  # bytes: its filter, 0 to 4, and its pixels
        if row * height > 2**29:  # too much memory to decompress it at once
            return
        decompressor = zlib.decompressobj()
        stream = b"".join(data for kind, data in chunks if kind == b"IDAT")
        pixels = decompressor.decompress(stream, 2 * row * height + 64)
        filters = pixels[: row * height : row]
        is_whole = len(pixels) >= row * height and max(filters) <= 4
        # The rows of an interlaced file have several lengths.
        if not decompressor.eof or not (is_whole or interlace):
            raise ValueError("its pixels do not fit its header")


def exif_orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8, of a file that was just opened and not decoded yet."""
    if image.format == "TIFF":
        return 1  # Pillow turns it
    orientation = 1
    with contextlib.suppress(SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error):
        if image.format == "PNG" and not has_late_exif(image.fp):
            exif = Image.Image.getexif(image)  # PngImageFile.getexif() would decode the image
        else:
            exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def has_late_exif(file) -> bool:
    """Return whether a PNG has EXIF data behind its pixels."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16))
    tail = file.read()
    file.seek(position)
    return any(name in tail for name in (b"eXIf", b"Raw profile type exif", b"tiff:Orientation"))


def turn_upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF's orientation of (H, W) or (H, W, C)."""
    if orientation == 1:
        return np.ascontiguousarray(array)
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    # A copy: torch takes no negative strides, but np.ascontiguousarray() keeps that of one row.
    return array.copy(order="C")


def is_tiff(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + is BigTIFF


def bands_of_tiff(pages: list[tuple[int, Size]]) -> list[int]:
    """Return which pages of a TIFF are its bands, by their tag NewSubfileType and size."""
    _, first_size = pages[0]
    bands = []
    for number, (subfile_type, size) in enumerate(pages):
        if math.prod(size) > math.prod(first_size):
            raise ValueError(f"its page {number + 1} is larger than the first")
        is_overview_or_mask = subfile_type & 0b101
        if size == first_size and not is_overview_or_mask:
            bands.append(number)
    if not bands or bands[0] > 0:
        raise ValueError("its first page is an overview or a mask")
    return bands


def read_tiff(image: Image.Image, path: str, as_label: bool) -> tuple[np.ndarray, bool]:
    """As read()."""
    pages = []
    for number in range(image.n_frames):
        image.seek(number)
        pages.append((image.tag_v2.get(ExifTags.Base.NewSubfileType, 0), image.size))
    bands = []
    for number in bands_of_tiff(pages):
        image.seek(number)
        if not pillow_keeps(image):
            return read_with_tifffile(path, as_label)
        compression = image.tag_v2.get(ExifTags.Base.Compression, 1)
        if as_label and compression not in LOSSLESS_TIFF:
            raise lossy_label(path, f"TIFF with the compression {image.info.get('compression')}")
        bits = max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,)))
        if as_label and image.mode == "L" and bits < 8:
            raise ValueError("a label of 2 or 4 bits is ambiguous; convert it to 8 bits")
        bands.append(pixels_of(image, as_label))
    if len(bands) > 1:
        return np.stack(bands, axis=-1), False
    return bands[0], image.mode in ("LA", "RGBA")


def pillow_keeps(page: Image.Image) -> bool:
    """Return whether Pillow reads all channels and bits of this page of a TIFF, and their signs."""
    tags = page.tag_v2
    is_inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    bits = max(tags.get(ExifTags.Base.BitsPerSample, (1,)))
    samples = tags.get(ExifTags.Base.SamplesPerPixel, 1)
    sample_format = tags.get(ExifTags.Base.SampleFormat, (1,))[0]  # 1: unsigned, 2: signed
    is_int8 = bits == 8 and sample_format == 2
    is_uint32 = bits == 32 and sample_format == 1
    if is_int8 or is_uint32:
        return False
    if bits > 8 and (is_inverted or samples > 1):
        return False
    return samples == len(page.getbands())


def read_with_tifffile(path: str, as_label: bool) -> tuple[np.ndarray, bool]:
    """As read()."""
    try:
        import tifffile
    except ImportError:
        raise DataError(
            f"{path}: Pillow does not read this TIFF, or not all of its bits and channels. "
            "`pip install tifffile imagecodecs`, or convert it to .npy (H, W, C)"
        ) from None
    try:
        with tifffile.TiffFile(path) as file:
            sizes = [(page.subfiletype, (page.imagelength, page.imagewidth)) for page in file.pages]
            pages = [file.pages[number] for number in bands_of_tiff(sizes)]
            bands = [page.asarray() for page in pages]
    except Exception as error:  # of many types, if a file is damaged
        raise ValueError(error) from None
    for number, page in enumerate(pages):
        if as_label and page.compression not in LOSSLESS_TIFF:
            raise lossy_label(path, f"TIFF with the compression {page.compression.name}")
        if page.photometric not in (1, 2) or 1 in page.extrasamples:
            raise ValueError(f"{page.photometric.name}, or premultiplied alpha, is not read")
        if page.axes == "SYX":  # one channel after another
            bands[number] = np.moveaxis(bands[number], 0, -1)
        elif page.axes not in ("YX", "YXS"):
            raise ValueError(f"its axes are {page.axes}")
        orientation = page.tags.valueof(ExifTags.Base.Orientation, 1)
        bands[number] = turn_upright(bands[number], orientation)
    if len(bands) > 1:
        return np.stack(bands, axis=-1), False
    return bands[0], tuple(pages[0].extrasamples) == (2,)


def lossy_label(path: str, kind: str) -> DataError:
    return DataError(
        f"{path}: a label must not be {kind}, because lossy compression changes the values of its "
        "pixels, which are classes. Make PNG files of the original labels; converting this file "
        "does not restore it"
    )


def read_image(path: str, channels: int, rows: int | None = None) -> np.ndarray:
    """Read an image as (H, W, channels) uint8, uint16 or float32; see read()."""
    image, has_alpha = read(path, rows=rows)
    return with_channels(image, channels, path, has_alpha)


def with_channels(
    image: np.ndarray, channels: int, name: str, has_alpha: bool = False
) -> np.ndarray:
    """Return an image (H, W) or (H, W, C) as (H, W, channels) uint8, uint16 or float32; see read().

    Raises DataError, which calls the image `name`.
    """
    if image.ndim == 2:
        image = image[..., None]
    if has_alpha and image.shape[-1] != channels:
        image = image[..., :-1]
    if channels == 3 and image.shape[-1] == 1:
        image = image.repeat(3, axis=-1)
    if image.ndim != 3 or image.shape[-1] != channels:
        hint = (
            "Set data.in_channels, data.mean, data.std and the backbone's in_channels to the "
            "number of channels of the images"
        )
        if image.ndim == 3 and image.shape[0] < min(image.shape[1:]):
            hint = "If the channels come first, save it as array.transpose(1, 2, 0)"
        raise DataError(
            f"{name}: the image has shape {image.shape}, but data.in_channels is {channels}. {hint}"
        )
    if image.dtype in (np.uint8, np.uint16):
        return image
    with np.errstate(over="ignore"):  # infinite values are reported by name
        return image.astype(np.float32, copy=False)


def image_size(path: str) -> Size:
    """Return (height, width) of an image as read() gives it, by its header if possible."""
    with reraise_as_data_error(path):
        if path.endswith(".npy"):
            return np.load(path, mmap_mode="r").shape[:2]
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                return (width, height) if exif_orientation(image) >= 5 else (height, width)
        except UnidentifiedImageError:
            return read(path)[0].shape[:2]


def read_label(path: str, values: list[int] = ()) -> np.ndarray:
    """Read a label as (H, W) integers, see the table in read(); bool if it is a file of 1 bit.

    values: of the classes, for the error message about a label of colors.
    """
    label, _ = read(path, as_label=True)
    if label.ndim == 3 and label.shape[-1] == 1:
        label = label[..., 0]
    if path.endswith(".npy") and label.dtype == bool:
        label = label.astype(np.uint8)
    if label.ndim != 2 or label.dtype.kind not in "bui":
        raise DataError(
            f"{path}: a label must hold one integer per pixel, its class, but this file holds "
            f"{label.dtype} of shape {label.shape}. If it shows classes as colors, convert it to "
            "an 8-bit grayscale PNG, in which other colors are 255 and ignored: 255 - sum((255 - "
            "value) * (picture[..., :3] == color).all(-1) for value, color in zip(values, palette))"
            "; palette holds the colors of the classes, and values their values in the files"
            f"{': ' if values else ''}{shortened(values)}"
        )
    return label


def shortened(values: list[int]) -> str:
    """Write values as 1..6 if they are consecutive."""
    if len(values) > 1 and np.ptp(values) == len(values) - 1:
        return f"{min(values)}..{max(values)}"
    return ", ".join(map(str, values))


def scan(root: str, folder: str, suffix: str | None) -> dict[str, str]:
    """Find the files in `folder` and its subfolders, except hidden ones.

    Returns a dict from the name (the path below `folder` without suffix) to the path relative to
    root. If `suffix` is None, a file may have any of SUFFIXES.
    """
    path_of = {}
    for path, ending in walk(os.path.join(root, folder), suffix):
        name = composed(path[: -len(ending)])
        path = os.path.join(folder, path)
        other = path_of.setdefault(name, path)
        if other == path:
            continue
        if composed(other) == composed(path):
            raise DataError(
                f"{root}: {ascii(other)} and {ascii(path)} are the same name in two Unicode forms. "
                "Rename or remove one of them"
            )
        raise DataError(
            f"{root}: {other} and {path} have the same name. Choose one of them by "
            "data.image_suffix or data.label_suffix"
        )
    return path_of


def composed(name: str) -> str:
    """Return a name in the Unicode form NFC. macOS writes file names in NFD, others in NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def check_encoding(path: str) -> None:
    """Raise DataError if a path is not UTF-8, as it could not be logged."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{ascii(path)}: this name is not UTF-8 text. Rename it; convmv -f latin1 -t utf8 "
            "--notest -r FOLDER does so for all files in a folder"
        ) from None


def walk(top: str, suffix: str | None) -> Iterator[tuple[str, str]]:
    """Yield the path below `top` and the suffix of each file that is not hidden; see scan()."""
    if not os.path.isdir(top):
        raise DataError(
            f"{top}: there is no such folder. {subfolders_above(top)}. Check data.root, the names "
            "of the folders in it, and those of the splits, data.train_split and data.val_split"
        )

    # Folders to search, each with the real paths of the folders on the way to it.
    pending = [(top, [os.path.realpath(top)])]
    while pending:
        folder, parents = pending.pop()
        below = "" if folder == top else os.path.relpath(folder, top)
        for entry in entries_of(folder):
            if entry.is_dir():
                pending.append((entry.path, [*parents, real_path(entry, parents)]))
                continue
            ending = os.path.splitext(entry.name)[1] if suffix is None else suffix
            known = suffix is not None or ending.lower() in SUFFIXES
            if not known or not entry.name.lower().endswith(ending.lower()):
                continue
            check_encoding(entry.path)
            if not entry.is_file():
                raise DataError(f"{entry.path}: this is neither a file nor a folder. Remove it")
            yield os.path.join(below, entry.name), ending


def entries_of(folder: str) -> list[os.DirEntry]:
    """Return the files and folders in `folder` that are not hidden, sorted by name.

    @eaDir is the folder in which storage devices of Synology hide thumbnails of images.
    """
    check_encoding(folder)
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith((".", "@eaDir"))]
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}). Make it readable, or remove it "
            "from the data set"
        ) from None
    for entry in found:
        if entry.is_symlink() and not os.path.exists(entry):
            raise DataError(
                f"{ascii(entry.path)}: this link leads to {ascii(os.readlink(entry))}, which "
                "cannot be reached. Restore that, or remove the link"
            )
    return sorted(found, key=lambda entry: entry.name)


def real_path(folder: os.DirEntry, parents: list[str]) -> str:
    """Return the real path of a folder that was found in the last of `parents`, real paths too.

    Raises DataError for a link by which a search would run in a circle.
    """
    if not folder.is_symlink():
        return os.path.join(parents[-1], folder.name)
    real = os.path.realpath(folder)
    if any(os.path.commonpath([real, parent]) == real for parent in parents):
        raise DataError(
            f"{folder.path}: this link leads to {real}, a folder that contains it, so a search "
            "would never end. Remove the link"
        )
    return real


def subfolders_above(path: str) -> str:
    """Say which folders there are where the first missing part of a path would have to be."""
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    found = sorted(glob.glob("*/", root_dir=parent))
    names = ", ".join(name.rstrip("/") for name in found[:8])
    if len(found) > 8:
        names += ", ..."
    return f"The folders in {parent} are: {names or 'none'}"


def find_images(paths: list[str]) -> dict[str, str]:
    """Find the image files that `paths` name, and those in the folders that they name.

    Returns a dict from names to paths. A name is the path below the folder without suffix. If two
    files would have the same one, all names are paths below the common folder, with suffix.
    """
    name_of = {}
    for path in paths:
        path = os.path.abspath(os.path.expanduser(path))
        check_encoding(path)
        if os.path.isfile(path):
            name_of.setdefault(path, os.path.splitext(os.path.basename(path))[0])
            continue
        if not os.path.exists(path):
            raise DataError(f"{path}: there is no such file or folder")
        for below, ending in walk(path, None):
            name_of.setdefault(os.path.join(path, below), below[: -len(ending)])
    if not name_of:
        raise DataError(
            f"{', '.join(paths)}: no images found. Their suffixes are {', '.join(sorted(SUFFIXES))}"
        )
    if len(set(name_of.values())) < len(name_of):
        top = os.path.commonpath([os.path.dirname(path) for path in name_of])
        name_of = {path: os.path.relpath(path, top) for path in name_of}
    return {name: path for path, name in sorted(name_of.items())}


@contextlib.contextmanager
def images_of_any_size(allowed: bool = True) -> Iterator[None]:
    """Let Pillow read more than its 179 megapixels, its limit against malicious files."""
    limit = Image.MAX_IMAGE_PIXELS
    if allowed:
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ---------------------------------------------------------------------------------------- Data sets

LIST_HINT = (
    "A line holds either a name, which is the path below data.images without suffix, or the paths "
    "of image and label below data.root, separated by a space, or by a tab if they contain spaces. "
    "If other columns follow a name, set data.first_column=true"
)


class Folder:
    """Images and labels in two folders, paired by name, or pairs listed in a file.

    `{split}` in images, labels and files stands for the name of the split.

    root: the folder that all other paths are relative to.
    classes: the names of the classes.
    images, labels: the two folders; their subfolders are searched too.
    files: a text file with one sample per line: either a name (the path below `images` without
        suffix), or the paths of image and label below root, separated by a space or a tab. A line
        that is repeated is a sample that comes as often in training, and counts once in evaluation.
    first_column: a line of `files` is a name and other columns, which are not read.
    image_suffix, label_suffix: what follows the name that image and label have in common, such as
        `_leftImg8bit.png`. Default: any known suffix.
    palette: [red, green, blue] for each class. Default: Pascal VOC's colors.
    ignore_index: the value, or list of values, to ignore. 255 is always ignored, unless it is one
        of `values`.
    reduce_zero_label: ignore 0 and read class c from the value c + 1.
    values: the value, or the list of values, of each class in the files. Default: its index.
        [0, 255] reads a black and white mask.
    fold: [k, n] splits the samples into n parts: `val` is part k, counted from 0, `train` is all
        others. `images`, `labels` and `files` then name all samples, without `{split}`.
    fold_seed: which samples a part holds. It is not the seed of the run, so that runs with other
        seeds have the same parts.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str,
        classes: list[str],
        images: str = "images/{split}",
        labels: str = "labels/{split}",
        files: str | None = None,
        first_column: bool = False,
        image_suffix: str | None = None,
        label_suffix: str | None = None,
        palette: list[list[int]] | None = None,
        ignore_index: int | list[int] = 255,
        reduce_zero_label: bool = False,
        values: list[int | list[int]] | None = None,
        fold: tuple[int, int] | None = None,
        fold_seed: int = 0,
        in_channels: int = 3,
    ):
        if palette is None:
            palette = voc_palette(len(classes))
        if values is None:
            values = [c + reduce_zero_label for c in range(len(classes))]
        if not 0 < len(classes) < INVALID or not len(palette) == len(values) == len(classes):
            raise DataError(
                f"data: {len(classes)} classes, {len(palette)} colors in palette, {len(values)} "
                f"values. Name 1 to {INVALID - 1} classes, with a color and a value for each"
            )
        for color in palette:
            if len(color) != 3 or not 0 <= min(color) <= max(color) <= 255:
                raise DataError("data.palette: a color is [red, green, blue], each in 0..255")
        self.large_images = False  # see Data
        self.root = os.path.abspath(root)
        self.first_column = first_column
        self.classes = list(classes)
        self.palette = palette
        self.values = flatten(values)
        self.in_channels = in_channels
        self.table = class_table(values, ignore_index, reduce_zero_label)
        if fold and "{split}" in f"{images} {labels} {files}":
            raise DataError(
                "data.fold: name the folders or the list of all samples, data.images, data.labels "
                f"and data.files, without {{split}}; they are {images}, {labels} and {files}"
            )
        images = images.replace("{split}", split)
        labels = labels.replace("{split}", split)
        if files:
            files = files.replace("{split}", split)
        # (samples, 2) paths relative to root
        self.pairs = np.array(self.find_pairs(images, labels, files, image_suffix, label_suffix))
        if fold:
            self.pairs = self.pairs[in_fold(self.pairs, split, fold, fold_seed)]

    def find_pairs(
        self,
        images: str,
        labels: str,
        files: str | None,
        image_suffix: str | None,
        label_suffix: str | None,
    ) -> list[tuple[str, str]]:
        """Find the paths of images and labels, sorted so that every machine has the same order."""
        image_of = scan(self.root, images, image_suffix)  # name -> path
        label_of = scan(self.root, labels, label_suffix)
        pairs = []
        names = list(image_of)
        if files:
            pairs, names = self.read_list(files, image_of)
        else:
            self.check_folders(image_of)

        hint = ""
        unused = sorted(label_of.keys() - image_of.keys())
        if unused:
            example = os.path.join(self.root, label_of[unused[0]])
            hint = f"{len(unused)} labels have no image, such as {example}. "
        unlabeled = sorted(set(names) - label_of.keys())
        if unlabeled:
            raise DataError(
                f"{len(unlabeled)} of {len(names)} images have no label: for "
                f"{os.path.join(self.root, image_of[unlabeled[0]])} there is no "
                f"{os.path.join(self.root, labels, unlabeled[0])}{label_suffix or '.*'}. {hint}Add "
                "the labels, correct data.image_suffix and data.label_suffix, or list the samples "
                "in a file (data.files)"
            )
        suffixes = image_suffix or ", ".join(sorted(SUFFIXES))
        if not pairs and not names:
            raise DataError(
                f"{os.path.join(self.root, files or images)}: no images found. Images end in "
                f"{suffixes} (data.image_suffix)"
            )
        if hint and not files:
            warn(f"{hint}They are not used. Images end in {suffixes}")
        pairs += [(image_of[name], label_of[name]) for name in names]
        for image, label in pairs:
            if os.path.normpath(image) == os.path.normpath(label):
                raise DataError(
                    f"{os.path.join(self.root, image)} is both an image and its own label. Correct "
                    "data.labels, or set data.image_suffix and data.label_suffix"
                )
        return sorted(pairs)

    def check_folders(self, image_of: dict[str, str]) -> None:
        """Raise DataError if, by a link, a folder of images is found twice."""
        found = {}
        for folder in sorted({os.path.dirname(path) for path in image_of.values()}):
            path = os.path.join(self.root, folder)
            other = found.setdefault(os.path.realpath(path), path)
            if other != path:
                raise DataError(
                    f"{other} and {path} are the same folder, by a link, so each of its images "
                    "would be two samples. Remove the link; to repeat samples on purpose, repeat "
                    "their lines in data.files"
                )

    def read_list(
        self, files: str, image_of: dict[str, str]
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """Read the list of samples: the pairs of paths and the names in it."""
        path = os.path.join(self.root, files)
        if not os.path.isfile(path):
            raise DataError(f"{path}: there is no such file (data.files)")
        try:
            # Windows editors put a byte order mark first.
            with open(path, encoding="utf-8-sig") as file:
                lines = list(file)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8") from None
        pairs = []
        names = []
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            columns = text.split("\t") if "\t" in text else text.split()
            name = composed(line.rstrip("\n"))  # may begin or end with a space
            if name not in image_of:
                name = composed(columns[0] if self.first_column and columns else text)
            if name in image_of:
                names.append(name)
            elif len(columns) == 2:
                place = f"{path}, line {number}"
                image, label = (self.listed_path(column, place) for column in columns)
                pairs.append((image, label))
            elif columns:
                raise DataError(
                    f"{path}, line {number}: there is no image named {text} in the folder "
                    f"data.images. {LIST_HINT}"
                )
        return pairs, names

    def listed_path(self, path: str, place: str) -> str:
        """Return the listed path below root, in the Unicode form that it has on the disk.

        Raises DataError if the file is missing or outside root; `place` names the line.
        """
        for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
            full = os.path.normpath(os.path.join(self.root, form))
            if os.path.commonpath([self.root, full]) != self.root:
                raise DataError(
                    f"{place}: {path} is outside data.root ({self.root}), so it is not read. Paths "
                    "are relative to data.root, without / at the beginning"
                )
            if os.path.isfile(full):
                return os.path.relpath(full, self.root)
        raise DataError(f"{place}: there is no file {os.path.join(self.root, path)}. {LIST_HINT}")

    def __len__(self) -> int:
        return len(self.pairs)

    def paths(self, i: int) -> tuple[str, str]:
        """Return the paths of image and label."""
        image, label = self.pairs[i]
        return os.path.join(self.root, image), os.path.join(self.root, label)

    def name(self, i: int) -> str:
        return self.paths(i)[0]

    def size(self, i: int) -> Size:
        """Return (height, width) of the image, by its header if possible."""
        with images_of_any_size(self.large_images):
            return image_size(self.name(i))

    def load(self, i: int) -> Sample:
        """Decode image (H, W, in_channels) uint8, uint16 or float32, and label (H, W) uint8.

        The label holds classes, and 255 at ignored pixels.
        """
        label = self.load_label(i)
        return self.load_image(i, label.shape), label

    def load_image(self, i: int, size: Size, rows: int | None = None) -> np.ndarray:
        """Decode the image, which must have the (height, width) of the label.

        rows: how many rows from the top are needed; others may be 0.
        """
        path, label_path = self.paths(i)
        with images_of_any_size(self.large_images):
            image = read_image(path, self.in_channels, rows)
        height, width = image.shape[:2]
        if (height, width) != size:
            raise DataError(
                f"{path} is {width}x{height}, but its label {label_path} is {size[1]}x{size[0]}. "
                "Both must have the same size: was one of them scaled or rotated?"
            )
        return image

    def load_label(self, i: int) -> np.ndarray:
        """Decode the label alone; see load()."""
        _, path = self.paths(i)
        with images_of_any_size(self.large_images):
            label = read_label(path, self.values)
        if label.dtype == bool:
            label = self.of_bits(label, path)
        values = label
        in_range = True
        if label.dtype != np.uint8:
            values = label.clip(0, 255).astype(np.uint8)
            in_range = (values == label).all()
        classes = translate(values, self.table)
        if not in_range or (classes == INVALID).any():
            raise DataError(self.explain_bad_values(label, path))
        return classes

    def of_bits(self, label: np.ndarray, path: str) -> np.ndarray:
        """Return the values of a label file of 1 bit a pixel.

        Black is 0. White is 1 if the classes are 0 and 1, or 255 if they are 0 and 255. With other
        classes it may be either, as programs that compress PNG files store 0 and 255 in this way.
        """
        if set(self.values) == {0, 255}:
            return label * np.uint8(255)
        if label.any() and not set(self.values) <= {0, 1, 255}:
            raise DataError(
                f"{path}: this label of 1 bit a pixel is ambiguous: white may be 1 or 255. Convert "
                "it to 8 bits"
            )
        return label.astype(np.uint8)

    @property
    def settings(self) -> tuple:
        """What decides, beside the files, what load() returns."""
        return self.in_channels, self.table.tobytes()

    def stamp(self) -> str:
        """Return a hash that changes with the labels: their paths, sizes, times and meaning."""
        digest = hashlib.sha256(self.table.tobytes() + bytes([READING_VERSION]))
        for i in range(len(self)):
            _, path = self.paths(i)
            with reraise_as_data_error(path):
                status = os.stat(path)
            digest.update(os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns}\n"))
        return digest.hexdigest()

    def explain_bad_values(self, label: np.ndarray, path: str) -> str:
        """Say which values of `label` are no classes, and which setting may read them."""
        values, counts = np.unique(label, return_counts=True)
        bad = [int(v) for v in values if not 0 <= v <= 255 or self.table[v] == INVALID]
        share = counts[np.isin(values, bad)].sum() / label.size
        subject = "label value" if len(bad) == 1 else "label values"
        shown = ", ".join(map(str, bad[:8]))
        if len(bad) > 8:
            shown += ", ..."
        ignored = np.flatnonzero(self.table == IGNORE).tolist()

        if {0, 255} <= set(values.tolist()) and len(self.classes) == 2:
            hint = (
                "If this is a black and white mask, it must hold only 0 and 255 and be a PNG, "
                "never a JPEG; data.values=[0, 255] reads it"
            )
        elif bad == [len(self.classes)]:
            hint = (
                f"If {bad[0]} means 'ignore', set data.ignore_index={bad[0]}. If 0 is the "
                "background, name it first in data.classes; if 0 means 'ignore' and the classes "
                "start at 1, set data.reduce_zero_label=true"
            )
        elif bad == [0]:
            hint = (
                "If 0 means 'ignore', set data.ignore_index=0; if it is a class, add it to "
                "data.classes and data.values"
            )
        else:
            hint = (
                "Correct the file, the list in data.classes, or data.values, which lists the value "
                "of each class in the files"
            )
        return (
            f"{path}: {subject} {shown} ({share:.1%} of the pixels) outside the "
            f"{len(self.classes)} classes. Allowed: {shortened(self.values)}; ignored: {ignored}. "
            f"{hint}"
        )


def translate(label: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Compute table[label]; label: (H, W) uint8, table: (256,) uint8."""
    # Much faster than indexing; a bytearray, so that the result is writable.
    translated = bytearray(np.ascontiguousarray(label)).translate(table.tobytes())
    return np.frombuffer(translated, np.uint8).reshape(label.shape)


def voc_palette(count: int) -> list[list[int]]:
    """Pascal VOC's colors: the bits of the class, dealt to red, green and blue in turn."""
    classes = np.arange(count)
    palette = np.zeros((count, 3), int)
    for bit in range(8):
        palette[:, bit % 3] |= (classes >> bit & 1) << (7 - bit // 3)
    return palette.tolist()


def in_fold(pairs: np.ndarray, split: str, fold: tuple[int, int], seed: int) -> np.ndarray:
    """Return which of the samples (samples, 2) belong to a split of a fold: (samples,) bool."""
    k, n = fold
    # A sample that is listed twice must not be in both splits, and counts once in evaluation.
    unique, first, number = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    if split not in ("train", "val"):
        raise DataError(
            f"data.fold makes the splits train and val; for split {split}, set data.fold=null and "
            "name its samples by data.images and data.labels, or by data.files"
        )
    if seed < 0:
        raise DataError(f"data.fold_seed: {seed} must be 0 or more")
    if not 0 <= k < n or not 2 <= n <= len(unique):
        raise DataError(
            f"data.fold: [{k}, {n}] of {len(unique)} samples; expected [k, n] with 0 <= k < n, and "
            "n from 2 to the number of samples"
        )
    part = np.random.default_rng(seed).permutation(len(unique)) % n
    if split == "val":
        return np.isin(np.arange(len(pairs)), first[part == k])
    return part[number.ravel()] != k


def flatten(values: list[int | list[int]]) -> list[int]:
    """Return the values of all classes, one after another."""
    flat = []
    for value in values:
        flat += [value] if isinstance(value, int) else value
    return flat


def class_table(
    values: list[int | list[int]], ignore_index: int | list[int], reduce_zero_label: bool
) -> np.ndarray:
    """Return the table (256,) uint8 from values in label files to classes, IGNORE or INVALID."""
    ignored = [ignore_index] if isinstance(ignore_index, int) else ignore_index
    flat = flatten(values)
    if not all(0 <= value <= 255 for value in (*flat, *ignored)):
        raise DataError(
            f"data: ignore_index {ignore_index} and the values of the classes {values} must be in "
            "0..255"
        )
    if len(set(flat)) < len(flat) or [] in values:
        raise DataError(
            f"data.values: {values} contains a value twice or an empty list, so one of its classes "
            "would never occur"
        )
    if reduce_zero_label:
        ignored = [0, *ignored]
    # 255 is a class if `values` contains it.
    lost = [value for value in ignored if value in flat and value != IGNORE]
    if lost:
        raise DataError(
            f"data: the value {lost[0]} is ignored (ignore_index, reduce_zero_label), but it is "
            f"also that of a class (values: {values}), which would never occur. Take either the "
            "value from those that are ignored, or the class from data.classes, and set "
            "data.values to the values of the classes"
        )
    table = np.full(256, INVALID, np.uint8)
    table[ignored] = IGNORE
    table[IGNORE] = IGNORE
    for c, value in enumerate(values):
        table[value] = c
    return table


def cityscapes(split: str, *, root: str) -> Folder:
    """Cityscapes (Cordts et al., 2016), 19 classes.

    leftImg8bit/train/*/*_leftImg8bit.png and gtFine/train/*/*_gtFine_labelTrainIds.png, or where
    those have not been generated, *_gtFine_labelIds.png.
    """
    label_suffix = "_gtFine_labelTrainIds.png"
    values = None
    ignore_index = IGNORE
    if not scan(root, f"gtFine/{split}", label_suffix):
        label_suffix = "_gtFine_labelIds.png"
        values = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
        ignore_index = [value for value in range(34) if value not in values]
    return Folder(
        split,
        root=root,
        images="leftImg8bit/{split}",
        image_suffix="_leftImg8bit.png",
        labels="gtFine/{split}",
        label_suffix=label_suffix,
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
        values=values,
        ignore_index=ignore_index,
    )


def ade20k(split: str, *, root: str) -> Folder:
    """ADE20K (Zhou et al., 2017), the folder ADEChallengeData2016, 150 classes; 0 is ignored.

    images/training/*.jpg and annotations/training/*.png.
    """
    return Folder(
        {"train": "training", "val": "validation"}.get(split, split),
        root=root,
        labels="annotations/{split}",
        reduce_zero_label=True,
        classes=ADE20K_CLASSES,
        palette=ADE20K_PALETTE,
    )


def voc(split: str, *, root: str, labels: str = "SegmentationClass") -> Folder:
    """Pascal VOC 2012 (Everingham et al.), the folder VOCdevkit/VOC2012, 21 classes.

    1,464 training and 1,449 validation images.
    """
    return Folder(
        split,
        root=root,
        images="JPEGImages",
        labels=labels,
        files="ImageSets/Segmentation/{split}.txt",
        classes=VOC_CLASSES,
    )


def voc_aug(split: str, *, root: str) -> Folder:
    """Pascal VOC 2012 with the labels of SBD (Hariharan et al., 2011): 10,582 training images.

    These need ImageSets/Segmentation/aug.txt and the folder SegmentationClassAug.
    """
    dataset = voc(split, root=root)
    if split == "train":
        added = voc("aug", root=root, labels="SegmentationClassAug")
        common = np.intersect1d(dataset.pairs[:, 0], added.pairs[:, 0])
        if len(common):
            warn(
                f"{len(common)} images of aug.txt, such as {common[0]}, are also in train.txt, so "
                "they come twice as often. The usual aug.txt has only those that are not in it"
            )
        dataset.pairs = np.concatenate([dataset.pairs, added.pairs])
    return dataset


CONTEXT_LAYOUT = {
    "images": "JPEGImages",
    "labels": "SegmentationClassContext",
    "files": "ImageSets/SegmentationContext/{split}.txt",
}


def pascal_context(split: str, *, root: str) -> Folder:
    """Pascal Context (Mottaghi et al., 2014), the folder VOCdevkit/VOC2010, 60 classes.

    Class 0 is the background.
    """
    palette = ADE20K_PALETTE[:60]
    return Folder(split, root=root, classes=CONTEXT_CLASSES, palette=palette, **CONTEXT_LAYOUT)


def pascal_context_59(split: str, *, root: str) -> Folder:
    """Pascal Context with its background ignored: 59 classes."""
    return Folder(
        split,
        root=root,
        classes=CONTEXT_CLASSES[1:],
        palette=ADE20K_PALETTE[1:60],
        reduce_zero_label=True,
        **CONTEXT_LAYOUT,
    )


def coco_stuff(split: str, *, root: str) -> Folder:
    """COCO-Stuff 164k (Caesar et al., 2018), 171 classes.

    images/train2017/*.jpg and annotations/train2017/*_labelTrainIds.png, or where those have not
    been generated, the *.png of stuffthingmaps_trainval2017, which skip 11 of their 182 values.
    """
    split = {"train": "train2017", "val": "val2017"}.get(split, split)
    label_suffix = "_labelTrainIds.png"
    values = None
    if not scan(root, f"annotations/{split}", label_suffix):
        label_suffix = None
        skipped = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
        values = [value for value in range(182) if value not in skipped]
    return Folder(
        split,
        root=root,
        labels="annotations/{split}",
        label_suffix=label_suffix,
        classes=COCO_STUFF_CLASSES,
        values=values,
    )


def camvid(split: str, *, root: str) -> Folder:
    """CamVid (Brostow et al., 2009) with the 11 classes of SegNet's tutorial.

    images/train and labels/train, or as in the tutorial, train and trainannot.
    """
    images = "images/{split}"
    labels = "labels/{split}"
    if os.path.isdir(os.path.join(root, "trainannot")):
        images = "{split}"
        labels = "{split}annot"
    return Folder(
        split,
        root=root,
        images=images,
        labels=labels,
        ignore_index=11,
        classes=CAMVID_CLASSES,
        palette=CAMVID_PALETTE,
    )


def oxford_pet(split: str, *, root: str, download: bool = False) -> Folder:
    """Oxford-IIIT Pet (Parkhi et al., 2012), 3 classes, 3,680 training, 3,669 validation images.

    download: let torchvision download it to root, unless it is already there.
    """
    if download:
        os.makedirs(root, exist_ok=True)
        # The processes of a machine take turns: the first one downloads.
        with open(os.path.join(root, ".download"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            import torchvision

            try:
                torchvision.datasets.OxfordIIITPet(root, target_types="segmentation", download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{root}: Oxford-IIIT Pet cannot be downloaded ({error}). Copy it from a "
                    "machine with network access"
                ) from None
    return Folder(
        {"train": "trainval", "val": "test"}.get(split, split),
        root=os.path.join(root, "oxford-iiit-pet"),
        images="images",
        image_suffix=".jpg",
        labels="annotations/trimaps",
        files="annotations/{split}.txt",
        first_column=True,
        reduce_zero_label=True,
        classes=["pet", "background", "border"],
    )


def mapillary(split: str, *, root: str) -> Folder:
    """Mapillary Vistas v1.2 (Neuhold et al., 2017), 65 classes; "Unlabeled" is ignored.

    training/images/*.jpg and training/v1.2/labels/*.png.
    """
    return Folder(
        {"train": "training", "val": "validation"}.get(split, split),
        root=root,
        images="{split}/images",
        labels="{split}/v1.2/labels",
        ignore_index=65,
        classes=MAPILLARY_CLASSES,
        palette=MAPILLARY_PALETTE,
    )


def bdd100k(split: str, *, root: str) -> Folder:
    """BDD100K (Yu et al., 2020), 10,000 images with the classes of Cityscapes.

    images/10k/train/*.jpg and labels/sem_seg/masks/train/*.png.
    """
    return Folder(
        split,
        root=root,
        images="images/10k/{split}",
        labels="labels/sem_seg/masks/{split}",
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
    )


def dark_zurich(split: str, *, root: str) -> Folder:
    """Dark Zurich (Sakaridis et al., 2019), only validation images, the classes of Cityscapes.

    rgb_anon/val/night/*/*_rgb_anon.png and gt/val/night/*/*_gt_labelTrainIds.png.
    """
    return Folder(
        split,
        root=root,
        images="rgb_anon/{split}/night",
        image_suffix="_rgb_anon.png",
        labels="gt/{split}/night",
        label_suffix="_gt_labelTrainIds.png",
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
    )


def night_driving(split: str, *, root: str) -> Folder:
    """Nighttime Driving (Dai and Van Gool, 2018), only test images, the classes of Cityscapes.

    leftImg8bit/test/night/*_leftImg8bit.png and
    gtCoarse_daytime_trainvaltest/test/night/*_gtCoarse_labelTrainIds.png.
    """
    return Folder(
        {"val": "test"}.get(split, split),
        root=root,
        images="leftImg8bit/{split}/night",
        image_suffix="_leftImg8bit.png",
        labels="gtCoarse_daytime_trainvaltest/{split}/night",
        label_suffix="_gtCoarse_labelTrainIds.png",
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
    )


# Crops of large pictures, as MMSegmentation's tools/dataset_converters make them.
TILES = {"images": "img_dir/{split}", "labels": "ann_dir/{split}"}


def loveda(split: str, *, root: str) -> Folder:
    """LoveDA (Wang et al., 2021), 7 classes; 0 is ignored."""
    return Folder(
        split,
        root=root,
        reduce_zero_label=True,
        classes=LOVEDA_CLASSES,
        palette=LOVEDA_PALETTE,
        **TILES,
    )


def isprs(split: str, *, root: str) -> Folder:
    """ISPRS Potsdam or Vaihingen, 6 classes; 0, the boundaries of objects, is ignored."""
    return Folder(
        split,
        root=root,
        reduce_zero_label=True,
        classes=ISPRS_CLASSES,
        palette=ISPRS_PALETTE,
        **TILES,
    )


def isaid(split: str, *, root: str) -> Folder:
    """iSAID (Zamir et al., 2019), 16 classes.

    img_dir/train/*.png and ann_dir/train/*_instance_color_RGB.png.
    """
    return Folder(
        split,
        root=root,
        label_suffix="_instance_color_RGB.png",
        classes=ISAID_CLASSES,
        palette=ISAID_PALETTE,
        **TILES,
    )


def synapse(split: str, *, root: str) -> Folder:
    """Slices of Synapse's CT scans of the abdomen, 9 classes, split as by TransUNet (2021)."""
    return Folder(split, root=root, classes=SYNAPSE_CLASSES, palette=SYNAPSE_PALETTE, **TILES)


def retina(split: str, root: str, label_suffix: str) -> Folder:
    """Vessels of the retina: images/training/*.png and annotations/training/* with `label_suffix`.

    The masks hold 0 and 1, as MMSegmentation's tools/dataset_converters write them, or 0 and 255.
    """
    return Folder(
        {"train": "training", "val": "validation"}.get(split, split),
        root=root,
        labels="annotations/{split}",
        label_suffix=label_suffix,
        values=[0, [1, 255]],
        classes=["background", "vessel"],
        palette=ADE20K_PALETTE[:2],
    )


def drive(split: str, *, root: str) -> Folder:
    """DRIVE (Staal et al., 2004), 2 classes, the first annotator's masks, *_manual1.png."""
    return retina(split, root, "_manual1.png")


def stare(split: str, *, root: str) -> Folder:
    """STARE (Hoover et al., 2000), 2 classes, the masks of Adam Hoover, *.ah.png."""
    return retina(split, root, ".ah.png")


def chase_db1(split: str, *, root: str) -> Folder:
    """CHASE_DB1 (Fraz et al., 2012), 2 classes, the first annotator's masks, *_1stHO.png."""
    return retina(split, root, "_1stHO.png")


def hrf(split: str, *, root: str) -> Folder:
    """HRF (Budai et al., 2013), 2 classes."""
    return retina(split, root, ".png")


def refuge(split: str, *, root: str) -> Folder:
    """REFUGE (Orlando et al., 2020), 3 classes; images/training and annotations/training."""
    return Folder(
        {"train": "training", "val": "validation"}.get(split, split),
        root=root,
        labels="annotations/{split}",
        classes=["background", " Optic Cup", "Optic Disc"],  # the space is MMSegmentation's
        palette=parse_colors("787878 06e6e6 383b78"),
    )


class Synthetic:
    """Randomly drawn scenes, without files. A scene depends only on its split and index.

    An object's class shows in its shape and texture; its colors are random.

    size: [height, width] of the scenes.
    length, val_length: the number of training and of validation scenes.
    """

    classes = ["ground", "stripes", "checks", "disc", "ball", "square", "ring", "pole"]
    # The mean color of each class. Every tint belongs to two classes, so color alone cannot tell.
    tints = np.array([[115, 100, 80], [190, 80, 70], [80, 115, 190], [190, 185, 110]])[
        [0, 1, 2, 1, 3, 0, 3, 2]
    ]

    def __init__(
        self,
        split: str,
        *,
        size: Size = (128, 128),
        length: int = 4000,
        val_length: int = 100,
    ):
        if min(*size, length, val_length) < 1:
            raise DataError(
                f"data: size {list(size)}, length {length} and val_length {val_length} must be at "
                "least 1"
            )
        self.split = "training" if split == "train" else "validation"
        self.shape = tuple(size)
        self.length = length if split == "train" else val_length
        self.palette = parse_colors("5a5046 f423e8 4682b4 dc143c faaa1e 00008e 00dc78 ffff00")

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"synthetic scene {i} of the {self.split} split"

    def size(self, i: int) -> Size:
        return self.shape

    def load(self, i: int) -> Sample:
        """Draw image (height, width, 3) uint8 and label (height, width) uint8."""
        height, width = self.shape
        rng = np.random.default_rng((SCENE, int(self.split != "training"), i))
        y = np.arange(height, dtype=np.float32)[:, None]
        x = np.arange(width, dtype=np.float32)[None]
        # Ground, two large regions, and seven objects on top of them.
        kinds = [0, 1, 2, *rng.choice(np.arange(3, 8), 7, p=(0.22, 0.22, 0.22, 0.18, 0.16))]
        label = np.zeros(self.shape, np.uint8)
        paint = np.zeros(self.shape, np.uint8)  # 2 * object, + 1 for the lighter of its two colors
        stripes = {"stripes": [0], "checks": [0, np.pi / 2], "ball": [0]}  # their directions
        for n, kind in enumerate(kinds[1:], start=1):
            mask, lighter, angle = self.draw_object(rng, self.classes[kind])
            for turn in stripes.get(self.classes[kind], []):
                across = x * np.cos(angle + turn) + y * np.sin(angle + turn)
                stripe = (across / rng.uniform(4, 6) + 1000).astype(np.int32)  # 4 to 6 pixels wide
                lighter = lighter ^ stripe & 1
            label[mask] = kind
            np.copyto(paint, 2 * n + lighter, where=mask, casting="unsafe")

        contrast = rng.uniform(20, 40, (len(kinds), 1, 1)) * np.array([-1, 1])[:, None]
        contrast[0] = 0  # the ground has one color
        jitter = rng.normal(0, 28, (len(kinds), 1, 3))
        colors = self.tints[kinds, None] + jitter + contrast  # (objects, 2, 3)
        image = np.take(colors.reshape(-1, 3).astype(np.float32), paint, axis=0)
        slope_x = rng.uniform(-0.3, 0.3)
        slope_y = rng.uniform(-0.3, 0.3)
        light = 1 + slope_x * (x / width - 0.5) + slope_y * (y / height - 0.5)
        image = image * light[..., None] + rng.integers(-12, 13, (height, width, 1), np.int8)
        return image.clip(0, 255).astype(np.uint8), label

    def draw_object(
        self, rng: np.random.Generator, kind: str
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Draw an object of class `kind` at a random place.

        Returns its mask (height, width) bool; its lighter part (height, width) uint8, 0 or 1; and
        its angle.
        """
        height, width = self.shape
        unit = min(self.shape)
        x = rng.uniform(0, width)
        y = rng.uniform(0, height)
        angle = rng.uniform(0, np.pi)
        radius = unit * rng.uniform(0.12, 0.2)
        bar = max(2, unit // 32)
        canvas = Image.new("L", (width, height))  # 1: object, 2: its lighter part
        draw = ImageDraw.Draw(canvas)

        def polygon(reach, angles, fill):
            corners = [(x + reach * np.cos(a), y + reach * np.sin(a)) for a in angles]
            draw.polygon(corners, fill=fill)

        def circle(reach, **options):
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), **options)

        if kind in ("stripes", "checks"):  # a region with six corners
            reach = rng.uniform(2, 4) * radius
            polygon(reach, np.sort(rng.uniform(0, 2 * np.pi, 6)), fill=1)
        elif kind == "square":
            angles = angle + np.arange(4) * np.pi / 2
            polygon(1.25 * radius, angles, fill=1)
            polygon(0.7 * radius, angles, fill=2)
        elif kind == "pole":  # lighter on one side
            dx = unit * 0.4 * np.cos(angle)
            dy = unit * 0.4 * np.sin(angle)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=1, width=2 * bar + 1)
            x -= dy * (bar / unit)
            y += dx * (bar / unit)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=2, width=bar)
        elif kind == "ring":  # lighter on the inside
            circle(radius - bar, outline=2, width=bar + 1)
            circle(radius, outline=1, width=bar + 1)
        else:
            circle(radius, fill=1)
        painted = np.asarray(canvas)
        return painted > 0, (painted > 1).astype(np.uint8), angle


@dataclasses.dataclass
class ConcatSection:
    """The keywords of a section of `Concat` besides those of its data set.

    type: a name in DATASETS.
    weight: its share of the training samples, relative to the weights of the others. Either all
        sections have one or none, and then every sample comes equally often.
    class_map: from its classes to those of the first data set, or to None to ignore a class.
        Classes that are not in it keep their names.
    splits: from the names of the config's splits to those of this data set, such as
        {"train": "trainval"}, or to None to leave the data set out: {"val": None}.
    """

    type: str
    weight: float | None = None
    class_map: dict[str, str | None] = dataclasses.field(default_factory=dict)
    splits: dict[str, str | None] = dataclasses.field(default_factory=dict)


class Concat:
    """Several data sets as one, with the classes and colors of the first.

    datasets: sections of keywords, see ConcatSection.
    """

    def __init__(self, split: str, *, datasets: list[dict], in_channels: int = 3):
        self.parts = []
        self.tables = []  # for each part see class_table()
        self.missing = []  # the classes of the first data set that no part has
        self.weights = []
        other_split = "val" if split == "train" else "train"
        for number, keywords in enumerate(datasets):
            place = f"data.datasets.{number}"
            section, keywords = self.divide(keywords)
            if section.type == "concat" or (number == 0 and section.class_map):
                raise DataError(
                    f"{place}: a section cannot be a concat itself, and the first one cannot have "
                    "a class_map, as it names the classes"
                )
            name = section.splits.get(split, split)
            if number == 0:
                # It names the classes even if it is left out of this split.
                some_name = name or section.splits.get(other_split) or other_split
                dataset = build_dataset(section.type, some_name, in_channels, keywords)
                self.classes = list(dataset.classes)
                self.palette = dataset.palette
            elif name:
                dataset = build_dataset(section.type, name, in_channels, keywords)
            if name:
                self.parts.append(dataset)
                self.tables.append(self.class_table(place, dataset.classes, section.class_map))
                self.weights.append(section.weight)
        if not self.parts:
            raise DataError(f"data.datasets: none of them has samples for the split {split}")
        found = set()
        for part, table in zip(self.parts, self.tables):
            classes = np.arange(len(part.classes))
            found.update((classes if table is None else table[classes]).tolist())
        self.missing = [name for c, name in enumerate(self.classes) if c not in found]
        given = [weight for weight in self.weights if weight is not None]
        if min(given, default=1) <= 0 or len(given) not in (0, len(self.weights)):
            raise DataError(
                f"data.datasets: the weights are {self.weights}; expected numbers above 0 in all "
                "sections or in none"
            )
        if not given:
            self.weights = None

    @staticmethod
    def divide(keywords: dict) -> tuple[ConcatSection, dict]:
        """Divide a section into its ConcatSection and the keywords of its data set."""
        own = {}
        others = dict(keywords)
        for field in dataclasses.fields(ConcatSection):
            if field.name in others:
                own[field.name] = others.pop(field.name)
        return ConcatSection(**own), others

    def class_table(self, place: str, classes: list[str], class_map: dict) -> np.ndarray | None:
        """Return the table (256,) uint8 from `classes` to the first data set's; None if equal."""
        targets = [class_map.get(name, name) for name in classes]
        wrong = [name for name in class_map if name not in classes]
        wrong += [name for name in targets if name is not None and name not in self.classes]
        if wrong:
            raise DataError(
                f"{place}: there is no class {' and no class '.join(map(repr, wrong))}. class_map "
                f"takes classes of this data set ({', '.join(classes)}) to classes of the first "
                f"({', '.join(self.classes)}) or to null, which ignores them"
            )
        if set(targets) == {None}:
            raise DataError(
                f"{place}: class_map ignores all classes, so nothing is learned from this data "
                'set. Leave it out, or out of a split: "splits": {"train": null}'
            )
        table = np.arange(256, dtype=np.uint8)
        for c, target in enumerate(targets):
            table[c] = IGNORE if target is None else self.classes.index(target)
        return None if targets == self.classes else table

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Return the indices (samples,) of an epoch's samples by weight, not shuffled.

        Every part is an endless stream of its samples, in another order in each pass. An epoch
        takes the next ones of each stream, as many of each part as its weight says.
        """
        shares = np.cumsum(self.weights) / np.sum(self.weights)
        counts = np.diff(np.rint(shares * len(self)).astype(int), prepend=0)
        if not counts.all():
            raise DataError(
                f"data.datasets: with the weights {self.weights}, an epoch of {len(self)} samples "
                "has none of one data set. Raise its weight, or leave it out"
            )
        indices = []
        for part, count in enumerate(counts.tolist()):
            size = len(self.parts[part])
            first = epoch * count
            passes = range(first // size, (first + count - 1) // size + 1)
            orders = []
            for number in passes:
                rng = np.random.default_rng((seed, PART, part, number))
                orders.append(rng.permutation(size) + self.ends[part] - size)
            start = first - passes[0] * size
            indices.append(np.concatenate(orders)[start : start + count])
        return np.concatenate(indices)

    @property
    def ends(self) -> np.ndarray:
        """Return for each part the index that follows that of its last sample."""
        return np.cumsum([len(part) for part in self.parts])

    def locate(self, i: int) -> tuple[int, int]:
        """Return the part that holds sample i, and the sample's index in it."""
        ends = self.ends
        part = int(np.searchsorted(ends, i, side="right"))
        return part, i - int(ends[part]) + len(self.parts[part])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def name(self, i: int) -> str:
        part, index = self.locate(i)
        return self.parts[part].name(index)

    def size(self, i: int) -> Size:
        part, index = self.locate(i)
        return self.parts[part].size(index)

    def load(self, i: int) -> Sample:
        """Load image (H, W, C) and label (H, W) uint8 with the classes of the first data set."""
        part, index = self.locate(i)
        image, label = self.parts[part].load(index)
        return image, self.in_first_classes(part, label)

    def in_first_classes(self, part: int, label: np.ndarray) -> np.ndarray:
        """Return the label of a part with the classes of the first data set."""
        table = self.tables[part]
        return label if table is None else translate(label, table)

    def load_label(self, i: int) -> np.ndarray:
        """Load the label alone; see load()."""
        part, index = self.locate(i)
        return self.in_first_classes(part, load_label(self.parts[part], index))

    def stamp(self) -> str | None:
        """As Folder.stamp(); None if a part is not read from files."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part, table in zip(self.parts, self.tables):
            stamp = stamp_of(part)
            if stamp is None:
                return None
            digest.update(f"{stamp} {table if table is None else table.tolist()}".encode())
        return digest.hexdigest()


class PlainDataset:
    """Completes a data set that has only `classes`, len(), and load(i) or [i] -> image, label.

    image: (H, W) or (H, W, C), as a NumPy array or a PIL image; a tensor is (C, H, W).
    label: (H, W), an integer for each pixel: the index of its class, or 255 to ignore it.

    If it has `palette`, name(i) or size(i), they are used. If it has paths(i), the files that a
    sample is read from, its samples can be cached.
    """

    def __init__(self, dataset, kind: str, in_channels: int, keywords: dict):
        if not hasattr(dataset, "classes") or not hasattr(dataset, "__len__"):
            raise DataError(f"data.type: {kind} needs the names of its `classes`, and len()")
        self.dataset = dataset
        self.kind = kind
        self.in_channels = in_channels
        self.classes = list(dataset.classes)
        self.palette = getattr(dataset, "palette", voc_palette(len(self.classes)))
        # Decides, beside the files, what load() returns.
        self.settings = (kind, in_channels, sorted(keywords.items()), source_of(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def paths(self, i: int) -> list[str]:
        return [os.fspath(path) for path in self.dataset.paths(i)]

    def name(self, i: int) -> str:
        if hasattr(self.dataset, "name"):
            return self.dataset.name(i)
        if hasattr(self.dataset, "paths"):
            return self.paths(i)[0]
        return f"sample {i} of {self.kind}"

    def size(self, i: int) -> Size:
        if hasattr(self.dataset, "size"):
            return self.dataset.size(i)
        return self.load(i)[1].shape

    def load(self, i: int) -> Sample:
        """As Folder.load()."""
        load = getattr(self.dataset, "load", None) or self.dataset.__getitem__
        image, label = load(i)
        if isinstance(image, Tensor) and image.dim() == 3:
            image = image.permute(1, 2, 0)
        image = as_array(image)
        label = as_array(label)
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[-1] != self.in_channels:
            raise DataError(
                f"{self.name(i)}: the image has shape {image.shape}, but data.in_channels is "
                f"{self.in_channels}"
            )
        if label.shape != image.shape[:2] or label.dtype.kind not in "ui":
            raise DataError(
                f"{self.name(i)}: the label is {label.dtype} of shape {label.shape}; expected an "
                f"integer for each pixel of the image, shape {image.shape[:2]}"
            )
        is_class = (label >= 0) & (label < len(self.classes))
        wrong = np.unique(label[~is_class & (label != IGNORE)])
        if len(wrong):
            raise DataError(
                f"{self.name(i)}: the label holds {wrong[:8].tolist()}, which are none of the "
                f"{len(self.classes)} classes; ignored pixels are {IGNORE}"
            )
        if image.dtype not in (np.uint8, np.uint16):
            image = image.astype(np.float32, copy=False)
        return image, label.astype(np.uint8, copy=False)


def as_array(value) -> np.ndarray:
    """Return an array that can be written to, as torch.from_numpy() wants it."""
    array = np.asarray(value)
    return array if array.flags.writeable else array.copy()


def source_of(dataset) -> str:
    """Return the source code of a data set's class; "" if there is none, as in a notebook."""
    try:
        return inspect.getsource(type(dataset))
    except (OSError, TypeError):
        return ""


# The data sets of config key data.type. Each is called with the name of a split and the keywords of
# the section, and returns a Folder or anything else that PlainDataset can complete.
DATASETS = {
    "folder": Folder,
    "concat": Concat,
    "synthetic": Synthetic,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "voc": voc,
    "voc_aug": voc_aug,
    "pascal_context": pascal_context,
    "pascal_context_59": pascal_context_59,
    "coco_stuff": coco_stuff,
    "camvid": camvid,
    "oxford_pet": oxford_pet,
    "mapillary": mapillary,
    "bdd100k": bdd100k,
    "dark_zurich": dark_zurich,
    "night_driving": night_driving,
    "loveda": loveda,
    "potsdam": isprs,
    "vaihingen": isprs,
    "isaid": isaid,
    "synapse": synapse,
    "drive": drive,
    "stare": stare,
    "chase_db1": chase_db1,
    "hrf": hrf,
    "refuge": refuge,
}


def build_dataset(kind: str, split: str, in_channels: int, keywords: dict):
    """Build a split of the data set `kind`, a key of DATASETS; `keywords` are those of its own."""
    if kind not in DATASETS:
        raise DataError(f"data.type: {kind} is none of {', '.join(DATASETS)}")
    for key, value in keywords.items():
        if isinstance(value, str):  # root, and paths that may be absolute, such as `files`
            keywords = keywords | {key: os.path.expanduser(value)}
    if "in_channels" in inspect.signature(DATASETS[kind]).parameters:
        keywords = keywords | {"in_channels": in_channels}
    dataset = DATASETS[kind](split, **keywords)
    if isinstance(dataset, Folder):
        dataset.in_channels = in_channels
    elif not isinstance(dataset, (Concat, Synthetic)):
        dataset = PlainDataset(dataset, kind, in_channels, keywords)
    return dataset


def check_files(dataset, i: int) -> None:
    """Raise DataError if a file of a sample would crash the process that decodes it."""
    if isinstance(dataset, Concat):
        part, i = dataset.locate(i)
        dataset = dataset.parts[part]
    if isinstance(dataset, CachedDataset):
        dataset = dataset.dataset
    if isinstance(dataset, Folder):
        for path in dataset.paths(i):
            check_pixels_of_png(path)


def folders_of(dataset) -> list[Folder]:
    """Return the Folders that a data set without a cache consists of."""
    parts = dataset.parts if isinstance(dataset, Concat) else [dataset]
    return [part for part in parts if isinstance(part, Folder)]


def drop_repeats(dataset) -> None:
    """Let each sample of a list in which lines are repeated count once, as an evaluation must."""
    for part in folders_of(dataset):
        pairs = list(dict.fromkeys(map(tuple, part.pairs.tolist())))
        if len(pairs) < len(part):
            warn(
                f"{len(part) - len(pairs)} lines of the list of validation samples are repeated; "
                f"each of the {len(pairs)} samples counts once"
            )
            part.pairs = np.array(pairs)
    images = [path for part in folders_of(dataset) for path in image_files(part)]
    repeated = [path for path, n in collections.Counter(images).items() if n > 1]
    if repeated:
        raise DataError(
            f"{repeated[0]} would be scored twice: it is in two of data.datasets, or listed with "
            'two labels. Leave a section out of the evaluation by "splits": {"val": null}'
        )


# -------------------------------------------------------------------------------------------- Cache


class CachedDataset:
    """A data set read from files that keeps its decoded samples in files below `folder`.

    The files are memory-mapped, so only the rows that are used are read. A file is [JSON header,
    4096 bytes][image][label]. Its name is a hash of the sample's paths and of the settings that
    decide how they are read; its header holds the size and time of the source files, so that
    changed ones are decoded again. Files are written atomically: processes may share a folder.
    """

    HEADER = 4096

    def __init__(self, dataset: Folder | PlainDataset, folder: str):
        self.dataset = dataset
        self.classes = dataset.classes
        self.palette = dataset.palette
        self.folder = os.path.abspath(os.path.expanduser(folder))
        self.full = torch.zeros(1).share_memory_()  # shared with all workers
        try:
            os.makedirs(self.folder, exist_ok=True)
            for file in os.scandir(self.folder):  # remove what killed processes left behind
                if file.name.endswith(".tmp") and file.stat().st_mtime < time.time() - 3600:
                    os.unlink(file)
        except FileNotFoundError:
            pass  # another process has just removed it
        except OSError as error:
            raise DataError(
                f"data.cache: {self.folder} cannot be used ({error}). Choose a writable folder"
            ) from None

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, i: int) -> str:
        return self.dataset.name(i)

    def size(self, i: int) -> Size:
        return self.dataset.size(i)

    def stamp(self) -> str | None:
        return stamp_of(self.dataset)

    def load(self, i: int) -> Sample:
        """As Folder.load(); the arrays are views of a memory-mapped file."""
        paths = self.dataset.paths(i)
        try:
            stamp = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, paths)]
        except OSError:
            return self.dataset.load(i)  # raises an error that explains the problem
        key = repr((READING_VERSION, paths, *self.dataset.settings))
        path = os.path.join(self.folder, hashlib.sha256(key.encode()).hexdigest() + ".sample")
        sample = self.read(path, stamp)
        if sample is None:
            sample = self.dataset.load(i)
            if not self.full:
                self.write(path, stamp, *sample)
        return sample

    def read(self, path: str, stamp: list) -> Sample | None:
        """Map a file; None if it does not exist, is damaged, or its source has changed."""
        try:
            content = np.memmap(path, np.uint8, mode="c")  # copy on write
            header = json.loads(content[: self.HEADER].tobytes())
            dtype = np.dtype(header["dtype"])
            shape = header["shape"]
            end = self.HEADER + math.prod(shape) * dtype.itemsize
            is_whole = len(content) == end + shape[0] * shape[1]
            if header["stamp"] == stamp and is_whole and dtype.kind in "uf":
                image = content[self.HEADER : end].view(np.ndarray).view(dtype).reshape(shape)
                label = content[end:].view(np.ndarray).reshape(shape[:2])
                return image, label
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def write(self, path: str, stamp: list, image: np.ndarray, label: np.ndarray) -> None:
        """Write a file atomically. If that fails, warn once and write no more files."""
        header = json.dumps({"stamp": stamp, "dtype": image.dtype.str, "shape": image.shape})
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                temporary = file.name
                file.write(header.ljust(self.HEADER).encode())
                file.write(np.ascontiguousarray(image))
                file.write(np.ascontiguousarray(label))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError as error:
            if not self.full:
                warn(
                    f"data.cache: cannot write to {self.folder} ({error}). Training continues "
                    "without caching further samples"
                )
            self.full[0] = 1
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)


def cached(dataset, folder: str):
    """Return `dataset`, with the samples that it reads from files kept in `folder`."""
    if isinstance(dataset, Concat):
        dataset.parts = [cached(part, folder) for part in dataset.parts]
    elif isinstance(dataset, PlainDataset) and not hasattr(dataset.dataset, "paths"):
        raise DataError(
            f"data.cache: the samples of {dataset.kind} cannot be kept, as they may change. Leave "
            "the key out, or add a method paths(i) with the files that sample i is read from"
        )
    elif isinstance(dataset, (Folder, PlainDataset)):
        dataset = CachedDataset(dataset, folder)
    return dataset


# ------------------------------------------------------------------ Statistics and rare classes


NOT_FINITE = (
    "{}: the image holds values that are NaN or infinite, perhaps where the sensor has no data. "
    "Replace them, and ignore those pixels in the label"
)


@dataclasses.dataclass(eq=False)
class SampleStatistics(Dataset):
    """Maps an index to the statistics of its sample.

    Returns the histogram (256) of its label, the sum and the sum of squares of each channel of its
    image, (2, C), both as lists, and an error message, which is "" if it loads. They are lists,
    because workers send arrays through shared memory, which is slower.
    """

    dataset: Any
    of_images: bool  # otherwise the sums are left out

    def __getitem__(self, i: int) -> tuple[list[int], list[list[float]], str]:
        try:
            if not self.of_images:
                return label_histogram(load_label(self.dataset, i)).tolist(), [], ""
            check_files(self.dataset, i)
            image, label = self.dataset.load(i)
        except DataError as error:
            return [0] * 256, [], str(error)
        histogram = label_histogram(label).tolist()
        sums = np.zeros((2, image.shape[-1]))
        for rows in in_parts(image):
            values = rows.reshape(-1, image.shape[-1]).astype(float)  # (pixels, C)
            sums += [values.sum(0), np.einsum("nc,nc->c", values, values)]
        sums = sums.tolist()
        problem = ""
        if not np.isfinite(sums).all():
            problem = NOT_FINITE.format(self.dataset.name(i))
        return histogram, sums, problem


def in_parts(array: np.ndarray, pixels: int = 2**22) -> Iterator[np.ndarray]:
    """Yield the rows of an array (H, W, ...), so many at a time that they have about `pixels`."""
    count = max(1, pixels // array.shape[1])
    for top in range(0, len(array), count):
        yield array[top : top + count]


def label_histogram(label: np.ndarray) -> np.ndarray:
    """Return the pixels (256,) of each value in a label (H, W) uint8."""
    # np.bincount takes eight times the memory of what it counts.
    return sum(np.bincount(rows.ravel(), minlength=256) for rows in in_parts(label))


def load_label(dataset, i: int) -> np.ndarray:
    """Return the label (H, W) uint8 of a sample, without its image if the data set can do so."""
    if hasattr(dataset, "load_label"):
        return dataset.load_label(i)
    return dataset.load(i)[1]


def stamp_of(dataset) -> str | None:
    """Return the hash that changes with a data set's labels; None if it is not read from files."""
    return dataset.stamp() if hasattr(dataset, "stamp") else None


def counts_file(dataset, folder: str | None) -> Path | None:
    """Return where the pixels of each class are kept: in data.cache, or torch.hub's cache."""
    stamp = stamp_of(dataset)
    if stamp is None:
        return None
    folder = os.path.expanduser(folder or os.path.join(torch.hub.get_dir(), "class_counts"))
    return Path(folder, f"{stamp}.npz")


def write_counts(path: Path, counts: np.ndarray) -> None:
    """Write a file atomically. If that fails, warn."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez_compressed(file, counts=counts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        warn(
            f"{path}: cannot be written ({error}), so every run counts the classes again. Set "
            "data.cache to a writable folder"
        )
        temporary.unlink(missing_ok=True)


def read_counts(path: Path | None) -> np.ndarray | None:
    """Read what write_counts() wrote; None if there is no such file or it is damaged."""
    try:
        return np.load(path)["counts"] if path else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Let the processes of this machine take turns, by a lock beside `path`."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a lock, each of them does the same work
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(path.with_name("class_counts.lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def class_counts(dataset, folder: str | None, workers: int) -> np.ndarray:
    """Count the pixels of each class in each label: (samples, classes).

    The first process of a machine counts and writes the file that the others and later runs read.
    """
    path = counts_file(dataset, folder)
    with turn(path):
        counts = read_counts(path)
        if counts is not None:
            return counts
        counts = np.zeros((len(dataset), len(dataset.classes)), np.uint32)
        statistics = SampleStatistics(dataset, of_images=False)
        items = Batches(statistics, range(len(dataset)), workers)
        for i, (histogram, _, problem) in enumerate(tqdm(items, "counting classes", leave=False)):
            if problem:
                raise DataError(problem)
            counts[i] = histogram[: len(dataset.classes)]
        if path:
            write_counts(path, counts)
        return counts


class RareClassSampler:
    """Rare class sampling of DAFormer (Hoyer et al., 2022, arXiv:2111.14887).

    For each sample, a class c is drawn with the probability

        P(c) = exp((1 - f_c) / T) / sum over all classes k of exp((1 - f_k) / T)

    where f_c is the share of c in all pixels that are not ignored and T the temperature: the lower
    it is, the more often rare classes come. Then one of the images that show c is drawn.

    An image shows a class, if possible, on 1 % of the pixels of a crop, and a crop of it on half
    as many (DAFormer: 3000 and 1500 pixels of 512x512). Classes that never occur are left out.

    counts: (samples, classes), the pixels of each class in each label.
    """

    def __init__(self, counts: np.ndarray, temperature: float, crop_size: Size):
        total = counts.sum(0, dtype=float)  # (classes,)
        if not total.any():
            raise DataError("data.rare_classes: every pixel of every label is ignored")
        share = total / total.sum()
        # Subtracting the largest exponent leaves P as it is and prevents an overflow.
        weight = np.exp((share[total > 0].min() - share) / temperature)
        weight[total == 0] = 0
        self.probability = weight / weight.sum()
        enough = math.prod(crop_size) // 100
        self.images = []  # for each class the images that show it
        self.least_pixels = []  # for each class the pixels that a crop is to show
        for c in range(len(total)):
            images = np.flatnonzero(counts[:, c] >= max(1, enough))
            self.least_pixels.append(max(1, enough // 2))
            if not len(images):
                images = np.flatnonzero(counts[:, c])
                self.least_pixels[c] = 1
            self.images.append(images)

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw `count` classes, and for each the index of an image that shows it."""
        classes = rng.choice(len(self.images), count, p=self.probability)
        indices = np.zeros(count, int)
        for c in np.unique(classes):
            is_drawn = classes == c
            indices[is_drawn] = rng.choice(self.images[c], is_drawn.sum())
        return classes, indices


# ------------------------------------------------------------------------------------------ Samples


def scaled_size(height: int, width: int, scale: tuple[int, int] | None, ratio: float = 1.0) -> Size:
    """Return the largest (height, width) with the same aspect that fits into `scale` * `ratio`.

    scale: long and short side in either order. None: the image's own size.
    """
    factor = ratio
    if scale is not None:
        long_side = int(max(scale) * ratio)
        short_side = int(min(scale) * ratio)
        factor = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest_pixels(start: int, count: int, size: int, scaled: int) -> np.ndarray:
    """Return the source pixels of the scaled pixels start..start+count, floor(X * size / scaled).

    These are the pixels that cv2.INTER_NEAREST picks.
    """
    return np.arange(start, start + count) * size // scaled


def span(start: int, count: int, size: int, scaled: int) -> tuple[int, int, int]:
    """Find the source pixels that bilinear scaling needs for the scaled pixels start..start+count.

    Returns (skip, first, last): scaling source[first:last] and dropping the first `skip` pixels
    gives the same as scaling the whole axis from `size` to `scaled` pixels and cropping it.

    Scaled pixel X lies at (X + 1/2) * size / scaled - 1/2 in the source. A resampler that is given
    a piece counts both from the start of the piece, so there the left edges of a source pixel and
    of a scaled pixel must coincide: first = (start - skip) * size / scaled must be an integer. This
    takes the smallest `skip` for which it is one to within 1/1024; with skip = start it always is.
    An error of 1/1024 pixel is at most a quarter of a gray level, even between black and white, so
    that with the two roundings of the resampler, the result is within one level. The skipped pixels
    cost about a third more per axis.
    """
    step = size / scaled
    # Skip at least half a source pixel, or the first pixel would miss its left neighbor.
    least = min(start, math.ceil(0.5 / step - 0.5))
    skip = np.arange(least, start + 1)
    first = (start - skip) * step
    nearest = np.rint(first)
    best = np.argmax(np.abs(first - nearest) < 1 / 1024)
    last = int((start + count - 0.5) * step - 0.5) + 2
    return int(skip[best]), int(nearest[best]), min(size, last)


def resample(image: np.ndarray, scaled: Size, box: tuple[int, int, int, int]) -> Tensor:
    """Scale `image` (H, W, C) bilinearly to the size `scaled`, but only the part `box` of it.

    As cv2.INTER_LINEAR: pixel centers at halves, no antialiasing.

    box: (top, left, height, width) in the scaled image.
    Returns (C, height, width) uint8 or float32, channels last in memory.
    """
    top, left, height, width = box
    skip_y, first_y, last_y = span(top, height, image.shape[0], scaled[0])
    skip_x, first_x, last_x = span(left, width, image.shape[1], scaled[1])
    dtype = np.uint8 if image.dtype == np.uint8 else np.float32
    piece = np.ascontiguousarray(image[first_y:last_y, first_x:last_x], dtype)
    piece = torch.from_numpy(piece)[None].permute(0, 3, 1, 2)  # (1, C, h, w)
    if scaled != image.shape[:2]:
        size = [skip_y + height, skip_x + width]
        for axis in (0, 1):
            # If the size stays the same, PyTorch copies the axis without scaling it.
            if size[axis] == piece.shape[2 + axis]:
                size[axis] += 1
        factor_y = scaled[0] / image.shape[0]
        factor_x = scaled[1] / image.shape[1]
        piece = torch.ops.aten.upsample_bilinear2d(piece, size, False, factor_y, factor_x)
    return piece[0, :, skip_y : skip_y + height, skip_x : skip_x + width]


# A user's own transforms for data.transforms: classes or functions that take the keywords of a
# section and return a function (image, label) -> image, label, as TorchvisionTransform describes.
TRANSFORMS = {}


class TorchvisionTransform:
    """A transform of torchvision.transforms.v2: geometry for image and label, color for the image.

    Labels are sampled to the nearest pixel. Pixels from outside of the image get the label 255 and
    the value of the transform's `fill`, 0 by default.
    """

    def __init__(self, transform_class: type, keywords: dict):
        from torchvision import tv_tensors

        self.image_class = tv_tensors.Image
        self.label_class = tv_tensors.Mask
        if "fill" in inspect.signature(transform_class).parameters:
            fill = keywords.get("fill", 0)
            keywords = keywords | {"fill": {self.image_class: fill, self.label_class: IGNORE}}
        self.transform = transform_class(**keywords)

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """image (C, h, w) and label (h, w) uint8 -> the same, of any size up to crop_size."""
        try:
            image, label = self.transform(self.image_class(image), self.label_class(label))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"data.transforms: {type(self.transform).__name__} cannot be applied to an image "
                f"of {image.dtype} {list(image.shape)}: {error}"
            ) from error
        return image.as_subclass(Tensor), label.as_subclass(Tensor)


def build_transform(section: dict, place: str):
    """Build what `type` names in TRANSFORMS or in torchvision.transforms.v2, of its keywords.

    The sections in the keyword `transforms`, as of RandomApply, are built in the same way.
    """
    keywords = dict(section)
    name = keywords.pop("type", None)
    if name in list(TRANSFORMS):
        transform_class = TRANSFORMS[name]
        try:
            inspect.signature(transform_class).bind(**keywords)
        except TypeError as error:
            raise DataError(f"{place}: {name}: {error}") from None
        return transform_class(**keywords)

    from torchvision.transforms import v2  # here, because it imports torch's compiler

    transform_class = getattr(v2, str(name), None)
    if not isinstance(transform_class, type) or not issubclass(transform_class, v2.Transform):
        names = [key for key, value in vars(v2).items() if isinstance(value, type)]
        close = difflib.get_close_matches(str(name), [*TRANSFORMS, *names], 1)
        hint = f"Did you mean {close[0]}?" if close else "Add yours to data.TRANSFORMS"
        raise DataError(
            f"{place}.type: {name!r} is no transform of torchvision.transforms.v2. {hint}"
        )
    try:
        if "interpolation" in keywords:
            keywords["interpolation"] = v2.InterpolationMode(keywords["interpolation"])
        if "transforms" in keywords:
            inner = build_transforms(keywords["transforms"], f"{place}.transforms")
            if not all(isinstance(item, TorchvisionTransform) for item in inner):
                raise ValueError("all of its transforms have to be torchvision's")
            keywords["transforms"] = [item.transform for item in inner]
        return TorchvisionTransform(transform_class, keywords)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: {name}: {error}") from None


def build_transforms(sections: list[dict], place: str) -> list:
    return [build_transform(section, f"{place}.{i}") for i, section in enumerate(sections)]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random numbers of torch (on the CPU), NumPy and Python inside."""
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@dataclasses.dataclass(eq=False)
class Crop:
    """A part of a scaled sample."""

    scaled: Size  # of the whole
    box: tuple[int, int, int, int]  # top, left, height and width in it
    rows: int  # of the image, from the top, that are needed
    classes: np.ndarray  # (height, width), of the crop


def load_crop(dataset, i: int, draw: Callable[[np.ndarray], Crop]) -> tuple[np.ndarray, Crop]:
    """Load an image (H, W, C) and a crop that is drawn given the label (H, W).

    The rows of the image that the crop does not need may be 0.
    """
    if isinstance(dataset, Concat):
        part, index = dataset.locate(i)
        in_first = functools.partial(dataset.in_first_classes, part)
        return load_crop(dataset.parts[part], index, lambda label: draw(in_first(label)))
    if isinstance(dataset, Folder):
        label = dataset.load_label(i)
        crop = draw(label)
        return dataset.load_image(i, label.shape, crop.rows), crop
    image, label = dataset.load(i)
    return image, draw(label)


def different_types(name_of: dict) -> DataError:
    """name_of: for each type of pixels the name of an image."""
    images = [f"{name} ({dtype})" for dtype, name in name_of.items()]
    return DataError(
        f"the images have different types: {' and '.join(images)}. Convert them to one type"
    )


@dataclasses.dataclass(eq=False)
class TrainSamples(Dataset):
    """Maps a list of sample indices to a training batch. The fields are arguments of `Data`."""

    dataset: Any
    seed: int
    crop_size: Size
    scale: tuple[int, int] | None
    ratio_range: tuple[float, float]
    cat_max_ratio: float
    flip: float
    photometric: bool
    transforms: list = ()
    rare_classes: RareClassSampler | None = None
    epoch: int = -1
    order: np.ndarray | None = None  # of the data set in this epoch
    wanted: np.ndarray | None = None  # the classes that the samples of this epoch are drawn for

    def dataset_index(self, sample_index: int) -> int:
        """Return the index in the data set; every epoch visits each image once, in another order.

        With data.rare_classes or the weights of Concat, an epoch has as many samples, but some
        images come more often.
        """
        epoch, place = divmod(sample_index, len(self.dataset))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, ORDER, epoch))
            self.epoch = epoch
            if self.rare_classes:
                self.wanted, self.order = self.rare_classes.draw(rng, len(self.dataset))
            elif isinstance(self.dataset, Concat) and self.dataset.weights:
                self.order = rng.permutation(self.dataset.epoch(self.seed, epoch))
            else:
                self.order = rng.permutation(len(self.dataset))
        return int(self.order[place])

    def __getitem__(self, sample_indices: range | list[int]) -> Batch | DataError:
        try:
            samples = [self.sample(sample_index) for sample_index in sample_indices]
        except DataError as error:
            return error  # the main process raises it, without the worker's traceback
        name_of = {}  # type of the pixels -> an image
        for k, (pixels, _, _) in zip(sample_indices, samples):
            name_of[pixels.dtype] = self.dataset.name(self.dataset_index(k))
        if len(name_of) > 1:
            return different_types(name_of)
        size = (len(samples), *self.crop_size)
        first = samples[0][0]
        image = torch.zeros(*size, len(first), dtype=first.dtype)
        image = image.permute(0, 3, 1, 2)  # (N, C, h, w), channels last in memory
        label = torch.full(size, IGNORE, dtype=torch.uint8)
        for n, (pixels, classes, _) in enumerate(samples):
            h, w = classes.shape
            image[n, :, :h, :w] = pixels
            label[n, :h, :w] = torch.from_numpy(classes)
        return {
            "image": image,
            "label": label,
            "valid": torch.tensor([classes.shape for _, classes, _ in samples]),
            "color": torch.tensor([color for _, _, color in samples], dtype=torch.float32),
            "sample_index": torch.tensor(sample_indices),
        }

    def sample(self, sample_index: int) -> tuple[Tensor, np.ndarray, list[float]]:
        """Return image (C, h, w), label (h, w), at most crop_size, and what draw_color() does."""
        rng = np.random.default_rng((self.seed, SAMPLE, sample_index))
        draw = functools.partial(self.draw_crop, sample_index, rng)
        image, crop = load_crop(self.dataset, self.dataset_index(sample_index), draw)
        pixels = resample(image, crop.scaled, crop.box)
        classes = crop.classes
        if rng.random() < self.flip:
            pixels = pixels.flip(-1)
            classes = classes[:, ::-1].copy()  # see turn_upright()
        color = self.draw_color(rng)
        if self.transforms:
            with seeded(int(rng.integers(2**63))):
                pixels, classes = self.transform(pixels, classes)
        return pixels, classes, color

    def draw_crop(self, sample_index: int, rng: np.random.Generator, label: np.ndarray) -> Crop:
        """Draw the size to scale to, and a crop of it that is accepted."""
        height, width = label.shape
        scaled = scaled_size(height, width, self.scale, rng.uniform(*self.ratio_range))
        h = min(self.crop_size[0], scaled[0])
        w = min(self.crop_size[1], scaled[1])
        for attempt in range(11):  # the last one is taken whatever it shows
            top = int(rng.integers(scaled[0] - h + 1))
            left = int(rng.integers(scaled[1] - w + 1))
            rows = nearest_pixels(top, h, height, scaled[0])
            columns = nearest_pixels(left, w, width, scaled[1])
            classes = np.take(label[rows], columns, axis=1)
            if attempt == 10 or self.accepts(classes, sample_index):
                break
        _, _, last_row = span(top, h, height, scaled[0])
        return Crop(scaled, (top, left, h, w), last_row, classes)

    def transform(self, image: Tensor, label: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Apply data.transforms to a crop (C, h, w) and its label (h, w)."""
        pixels = image.clone()  # a transform may work in place, but the data set keeps its image
        classes = torch.from_numpy(label)
        height, width = self.crop_size
        for number, transform in enumerate(self.transforms):
            result = transform(pixels, classes)
            if not isinstance(result, tuple | list) or len(result) != 2:
                raise DataError(
                    f"data.transforms.{number} returned a {type(result).__name__}; expected the "
                    "image and the label: return image, label"
                )
            pixels, classes = result
            is_right = (
                pixels.shape == (len(image), *classes.shape)
                and classes.shape[0] <= height
                and classes.shape[1] <= width
                and (pixels.dtype, classes.dtype) == (image.dtype, torch.uint8)
            )
            if not is_right:
                raise DataError(
                    f"data.transforms.{number} returned an image of {pixels.dtype} "
                    f"{list(pixels.shape)} and a label of {classes.dtype} {list(classes.shape)}; "
                    "expected the types and channels that it was given, and at most "
                    f"{height}x{width} pixels"
                )
        return pixels, classes.numpy()

    def accepts(self, classes: np.ndarray, sample_index: int) -> bool:
        """Return whether a crop (h, w) shows the rare class that its image was drawn for, if any.

        And whether it satisfies cat_max_ratio: there are several classes, each on < cat_max_ratio
        of the pixels that are not ignored.
        """
        if self.cat_max_ratio >= 1 and not self.rare_classes:
            return True
        count = torch.bincount(torch.from_numpy(classes).view(-1), minlength=256)[:IGNORE].numpy()
        if self.rare_classes:
            wanted = self.wanted[sample_index % len(self.dataset)]
            if count[wanted] < self.rare_classes.least_pixels[wanted]:
                return False
        if self.cat_max_ratio >= 1:
            return True
        return (count > 0).sum() > 1 and count.max() < self.cat_max_ratio * count.sum()

    def draw_color(self, rng: np.random.Generator) -> list[float]:
        """Draw [brightness, contrast, saturation, hue, contrast] for photometric_distortion().

        Each is used with probability 1/2; contrast changes either before or after the others.
        """
        contrast_last = rng.random() < 0.5
        use = (rng.random(4) < 0.5) & self.photometric
        drawn = rng.uniform((-32, 0.5, 0.5, -18), (32, 1.5, 1.5, 18))
        brightness, contrast, saturation, hue = np.where(use, drawn, (0, 1, 1, 0)).tolist()
        if contrast_last:
            return [brightness, 1.0, saturation, hue, contrast]
        return [brightness, contrast, saturation, hue, 1.0]


@dataclasses.dataclass(eq=False)
class ValSamples(Dataset):
    """Maps a list of indices of images of the same size to a validation batch."""

    dataset: Any
    scale: tuple[int, int] | None

    def __getitem__(self, indices: list[int]) -> Batch | DataError:
        try:
            samples = [self.dataset.load(i) for i in indices]
        except DataError as error:
            return error
        size = scaled_size(*samples[0][1].shape, self.scale)
        return {
            "image": torch.stack([resample(image, size, (0, 0, *size)) for image, _ in samples]),
            "label": torch.from_numpy(np.stack([label for _, label in samples])),
            "index": torch.tensor(indices),
        }


def unlabeled_batch(image: np.ndarray, scale: tuple[int, int] | None) -> Batch:
    """Return a batch like those of ValSamples, of one image (H, W, C) with all pixels ignored."""
    size = scaled_size(*image.shape[:2], scale)
    ignored = torch.full((1, 1, 1), IGNORE, dtype=torch.uint8)
    return {
        "image": resample(image, size, (0, 0, *size))[None],
        "label": ignored.expand(1, *image.shape[:2]),  # takes no memory
        "index": torch.zeros(1, dtype=torch.int64),
    }


@dataclasses.dataclass(eq=False)
class UnlabeledSamples(Dataset):
    """Maps the index of an image file to a batch, or to the DataError that says what is wrong."""

    paths: list[str]
    channels: int
    scale: tuple[int, int] | None

    def __getitem__(self, index: int) -> Batch | DataError:
        try:
            with images_of_any_size():
                return unlabeled_batch(read_image(self.paths[index], self.channels), self.scale)
        except DataError as error:
            return error

    def pixels(self, index: int) -> int:
        """Return the number of pixels by the file's header; 0 if that cannot be read."""
        path = self.paths[index]
        with contextlib.suppress(Exception):  # any damage; reading the whole file will name it
            if path.endswith(".npy"):
                return math.prod(np.load(path, mmap_mode="r").shape[:2])
            with images_of_any_size(), Image.open(path) as image:
                return math.prod(image.size)
        return 0


# ------------------------------------------------------------------------------------------- Device


def photometric_distortion(image: Tensor, color: Tensor) -> Tensor:
    """MMSegmentation's PhotoMetricDistortion of a batch, in place, without a device sync.

    image: (N, 3, h, w) float32 RGB in 0..255; clipped to that range after each step.
    color: (N, 5): brightness to add, contrast factor if it comes first, saturation factor, hue to
        add in units of 1/180 of the color circle, contrast factor if it comes last.

    In HSV, V is the largest channel, chroma C = V - the smallest channel, and S = C / V, so scaling
    S is scaling C. With the hue p in sixths of the circle, a channel is V - C + C * ramp(p).
    """
    brightness, before, saturation, hue, after = color[:, :, None, None].unbind(1)  # (N, 1, 1) each
    image.add_(brightness[:, None]).clamp_(0, 255).mul_(before[:, None]).clamp_(0, 255)
    red, green, blue = image.unbind(1)  # (N, h, w) each
    high = image.amax(1)
    low = image.amin(1)
    chroma = high - low
    scale = chroma.clamp_min(1e-6).reciprocal_()
    sixth = torch.where(
        high == red,
        (green - blue).mul_(scale),
        torch.where(
            high == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)
        ),
    )
    sixth.add_(hue / 30).remainder_(6)
    chroma.mul_(torch.minimum(saturation, scale.mul_(high)))  # keeps S <= 1, that is C <= V
    low = high.sub_(chroma)
    torch.sub(sixth, 3, out=red).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)
    torch.sub(sixth, 2, out=green).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    torch.sub(sixth, 4, out=blue).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    return image.mul_(after[:, None]).clamp_(0, 255)


# -------------------------------------------------------------------------------------------- Data


def start_worker(worker_id: int) -> None:
    """Let a worker ignore stop signals, which terminals and schedulers send to all processes.

    The training process decides when the run ends, and still needs its workers until then. It ends
    them by a SIGTERM of its own.
    """
    parent = os.getppid()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    StopSignal.set_handlers(signal.SIG_IGN)
    # Only sigwaitinfo tells who sent a signal, and it takes those that are blocked.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait_for_parent, daemon=True).start()


def worker_failure(error: Exception) -> DataError | None:
    """Return the DataError to raise instead of `error` if a worker has died; None for other errors.

    When a worker dies, torch raises a RuntimeError wherever the main process happens to be, or a
    connection breaks.
    """
    text = str(error).strip()
    if "Too many open files" in text or "ancdata" in text:  # the latter if sockets cannot pass them
        return DataError(
            "the batches of the data workers need more open files than this process may have: "
            "raise the limit (ulimit -n), or lower data.workers or data.batch_size"
        )
    from_torch = text.startswith(("DataLoader worker (pid", "DataLoader timed out"))
    from_torch = from_torch or "allocate shared memory" in text
    if not from_torch and not isinstance(error, (ConnectionError, EOFError)):
        return None
    reason = text.splitlines()[-1] if text else type(error).__name__
    return DataError(
        f"a data worker has died or hangs: {reason} If memory ran out (see dmesg), lower "
        "data.workers or data.batch_size; if shared memory did, enlarge /dev/shm; or set "
        "data.workers=0. If it was a segmentation fault, --check-data names the damaged file"
    )


def share_of_cores() -> int:
    """Return the number of cores that this process can give to workers."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, cores - 1))


def raise_file_limit(wanted: int = 65536) -> None:
    """Raise the soft limit of open files, often 1024, as a batch from a worker holds several."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if 0 <= soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def to_shared_memory(batch: Any) -> Any:
    """Move a batch to shared memory, in a worker.

    Otherwise the queue to the training process would do it in a thread, whose errors nobody sees:
    the training process would wait for the batch until its timeout.
    """
    if isinstance(batch, dict):
        for tensor in batch.values():
            tensor.share_memory_()
    return batch


class Batches:
    """Yields samples[index] for each of `indices`, in this order, computed by worker processes.

    keep_errors: yield a sample that is a DataError, instead of raising it.
    """

    def __init__(
        self,
        samples: Dataset,
        indices,
        workers: int,
        pin_memory: bool = False,
        keep_errors: bool = False,
    ):
        # train.py warns of too many workers itself, and names the key.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        if workers:
            raise_file_limit()
        self.keep_errors = keep_errors
        self.loader = DataLoader(
            samples,
            sampler=indices,
            batch_size=None,
            num_workers=workers,
            collate_fn=to_shared_memory if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            prefetch_factor=4 if workers else None,
            timeout=300 if workers else 0,
            generator=torch.Generator(),  # keeps the global random state of torch unchanged
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self.loader:
                if isinstance(batch, DataError) and not self.keep_errors:
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            raise worker_failure(error) or error from None


class Data:
    """The training and validation data of a run: the `data` section of a config.

    type: a name in DATASETS; the keywords of that data set go into the same section.
    batch_size: samples per iteration, over all processes.
    crop_size: [height, width].
    scale: [width, height] that an image is scaled to fit into, keeping its aspect, times a ratio
        drawn from ratio_range. None: the image's own size times the ratio.
    workers: loader processes per training process. 0: load in the training process. None: its
        share of the cores of the machine, less one for training itself, at most 16.
    accumulate: number of micro-batches into which a process splits its share of the batch.
    cat_max_ratio: a crop is drawn again, up to ten times, if one class covers at least this share.
    flip: the probability of a horizontal flip.
    photometric: distort the colors of 8-bit RGB images.
    transforms: sections of transforms in TRANSFORMS or in torchvision.transforms.v2, such as
        {"type": "RandomRotation", "degrees": 10}. They are applied to each training crop, after
        the flip and before the colors are distorted and normalized.
    in_channels, mean, std: of the images, in RGB order and in the units of the files. --check-data
        prints the mean and std of the training images.
    cache: a folder on a local disk for decoded samples. None: decode the files every time.
    rare_classes: the temperature of RareClassSampler, such as 0.01, by which images with rare
        classes come more often. None: every image comes once in an epoch.
    large_images: read images of more than 179 megapixels. Without it they are an error, as a small
        file may claim to be that large. With `cache`, crops of them take little time and memory.
    allow_overlap: accept training images among the validation images, for example to see whether a
        network can overfit.
    """

    def __init__(
        self,
        *,
        type: str,
        batch_size: int,
        crop_size: Size,
        scale: tuple[int, int] | None = None,
        workers: int | None = None,
        accumulate: int = 1,
        ratio_range: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        transforms: list[dict] = (),
        in_channels: int = 3,
        mean: list[float] = IMAGENET_MEAN,
        std: list[float] = IMAGENET_STD,
        cache: str | None = None,
        rare_classes: float | None = None,
        large_images: bool = False,
        allow_overlap: bool = False,
        train_split: str = "train",
        val_split: str = "val",
        seed: int = 0,
        **dataset,
    ):
        self.type = type
        self.batch_size = batch_size
        self.workers = share_of_cores() if workers is None else workers
        self.accumulate = accumulate
        self.in_channels = in_channels
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.cache = cache
        self.rare_classes = rare_classes
        self.large_images = large_images
        self.allow_overlap = allow_overlap
        self.train_split = train_split
        self.val_split = val_split
        self.sampling = {
            "seed": seed,
            "crop_size": tuple(crop_size),
            "scale": scale,
            "ratio_range": tuple(ratio_range),
            "cat_max_ratio": cat_max_ratio,
            "flip": flip,
            "photometric": photometric,
            "transforms": build_transforms(transforms, "data.transforms"),
        }
        self.dataset_keywords = dataset
        self.validate()

    def validate(self) -> None:
        """Raise DataError for settings that are wrong whatever the files hold."""
        if self.type not in DATASETS:
            raise DataError(f"data.type: {self.type} is none of {', '.join(DATASETS)}")
        is_finite = self.mean.isfinite().all() and self.std.isfinite().all()
        is_long_enough = len(self.mean) == len(self.std) == self.in_channels
        if not is_long_enough or not is_finite or not (self.std > 0).all():
            raise DataError(
                f"data: mean and std need in_channels ({self.in_channels}) finite values each, and "
                "those of std must be above 0. --check-data prints those of the training images"
            )
        smallest = {
            "crop_size": min(self.sampling["crop_size"]),
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "scale": min(self.sampling["scale"] or [1]),
        }
        for name, number in smallest.items():
            if number < 1:
                raise DataError(f"data.{name}: {number} must be 1 or more")
        low, high = self.sampling["ratio_range"]
        if self.rare_classes is not None and not self.rare_classes > 0:
            raise DataError(f"data.rare_classes: {self.rare_classes} must be above 0, or null")
        if not 0 <= self.sampling["flip"] <= 1 or not self.sampling["cat_max_ratio"] > 0:
            raise DataError(
                f"data: flip ({self.sampling['flip']}) is a probability from 0 to 1, and "
                f"cat_max_ratio ({self.sampling['cat_max_ratio']}) must be above 0; 1 or more "
                "accepts every crop"
            )
        if self.workers < 0 or not 0 < low <= high < math.inf:
            raise DataError(
                f"data: workers ({self.workers}) must be 0 or more, and ratio_range must be "
                f"[low, high] with 0 < low <= high, not [{low}, {high}]"
            )
        splits = {"train", "val", "test", self.train_split, self.val_split}
        for number, section in enumerate(self.dataset_keywords.get("datasets", [])):
            unknown = section.get("splits", {}).keys() - splits
            if unknown:
                raise DataError(
                    f"data.datasets.{number}.splits: {min(unknown)!r} is not a split of this run; "
                    f"its splits are {self.train_split} and {self.val_split}"
                )

    def to(self, device: torch.device) -> "Data":
        """Move mean and std to `device`. Copying them in every step would cause a device sync."""
        self.mean = self.mean.to(device)
        self.std = self.std.to(device)
        return self

    def build_dataset(self, split: str, is_scored: bool):
        dataset = build_dataset(self.type, split, self.in_channels, self.dataset_keywords)
        repeated = [name for name, n in collections.Counter(dataset.classes).items() if n > 1]
        if repeated:
            raise DataError(f"data.classes: {repeated[0]!r} names two classes")
        if len(dataset.classes) < 2:
            raise DataError(
                f"data.classes: {dataset.classes} is a single class, but the background is a class "
                'too. Name both, as in data.classes=["background", "crack"], set num_classes to 2, '
                "and if the masks hold other values than 0 and 1, data.values, such as [0, 255]"
            )
        for folder in folders_of(dataset):
            folder.large_images = self.large_images
        if is_scored:
            drop_repeats(dataset)
        return cached(dataset, self.cache) if self.cache else dataset

    @functools.cached_property
    def train(self):
        return self.build_dataset(self.train_split, is_scored=False)

    @functools.cached_property
    def val(self):
        return self.build_dataset(self.val_split, is_scored=True)

    @functools.cached_property
    def val_sizes(self) -> list[Size]:
        return [self.val.size(i) for i in range(len(self.val))]

    @functools.cached_property
    def samples(self) -> TrainSamples:
        rare = None
        if self.rare_classes:
            if isinstance(self.train, Concat) and self.train.weights:
                raise DataError(
                    "data.rare_classes and the weights of data.datasets both say how often an "
                    "image comes. Remove one of them"
                )
            counts = class_counts(self.train, self.cache, self.workers)
            missing = [name for name, count in zip(self.classes, counts.sum(0)) if not count]
            if missing:
                warn(
                    f"no training label shows the class {', '.join(missing)}, so it is not learned"
                )
            rare = RareClassSampler(counts, self.rare_classes, self.sampling["crop_size"])
        return TrainSamples(self.train, rare_classes=rare, **self.sampling)

    @functools.cached_property
    def checksum_of_train(self) -> dict[str, int]:
        return checksum_of_images(self.train, "train")

    @functools.cached_property
    def available_split(self):
        """The training split, or the validation split, as evaluation needs no training images."""
        try:
            return self.train
        except DataError:
            return self.val

    @property
    def classes(self) -> list[str]:
        return self.available_split.classes

    @property
    def palette(self) -> list[list[int]]:
        return self.available_split.palette

    def train_batches(self, rank: int = 0, world_size: int = 1, start: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of `rank` from iteration `start` on, without end.

        An iteration has `accumulate` of them, each with n = batch_size / (world_size * accumulate)
        samples:
            image: (n, C, h, w) uint8 or float32, channels last in memory.
            label: (n, h, w) uint8, padded with 255.
            valid: (n, 2), height and width without padding.
            color: (n, 5), see photometric_distortion().
            sample_index: (n,), the place in the stream of training samples.
        """
        parts = world_size * self.accumulate
        share, rest = divmod(self.batch_size, parts)
        if rest:
            nearest = [str(n * parts) for n in (share, share + 1) if n > 0]
            raise DataError(
                f"data.batch_size: {self.batch_size} samples cannot be divided evenly among "
                f"{world_size} processes in {self.accumulate} parts each (data.accumulate). The "
                f"nearest batch sizes that can: {' or '.join(nearest)}"
            )
        first = (start * parts + rank) * share
        steps = (range(k, k + share) for k in itertools.count(first, world_size * share))
        return iter(Batches(self.samples, steps, self.workers, torch.cuda.is_available()))

    def val_batches(
        self,
        rank: int = 0,
        world_size: int = 1,
        scale: tuple[int, int] | None = None,
        batch_size: int = 1,
    ) -> Batches:
        """Return this rank's batches of the validation split; the ranks see each image once.

        The n images of a batch have the same size:
            image: (n, C, h, w) uint8 or float32, scaled to fit into `scale` if it is given.
            label: (n, H, W) uint8 at its original size.
            index: (n,), the index in the validation split.
        """
        groups = {}
        for i in range(rank, len(self.val), world_size):
            group = self.val_sizes[i] if batch_size > 1 else i
            groups.setdefault(group, []).append(i)
        batches = []
        for group in groups.values():
            for k in range(0, len(group), batch_size):
                batches.append(group[k : k + batch_size])
        workers = min(self.workers, len(batches))
        return Batches(ValSamples(self.val, scale), batches, workers, torch.cuda.is_available())

    def unlabeled_batches(
        self, paths: list[str], scale: tuple[int, int] | None, max_pixels: int
    ) -> Iterator[tuple[str, Batch | DataError]]:
        """Yield each path with its batch as in val_batches(), or with what is wrong with the file.

        Images above max_pixels come last and one at a time: workers, which read ahead, would hold
        too many of them.
        """
        samples = UnlabeledSamples(paths, self.in_channels, scale)
        fits = True
        groups = {False: [], True: []}
        for index in range(len(paths)):
            groups[samples.pixels(index) > max_pixels].append(index)
        for is_large, indices in groups.items():
            workers = 0 if is_large else min(self.workers, len(indices))
            pin_memory = torch.cuda.is_available() and not is_large
            batches = Batches(samples, indices, workers, pin_memory, keep_errors=True)
            for index, batch in zip(indices, batches):
                if fits and not isinstance(batch, DataError):  # one warning is enough
                    image = batch["image"][0].permute(1, 2, 0)  # (H, W, C)
                    fits = self.fits_normalization({paths[index]: moments_of(image.numpy())})
                yield paths[index], batch

    def val_samples(self, indices: list[int], scale: tuple[int, int] | None = None) -> Batches:
        """Return batches of one image each, see val_batches()."""
        return Batches(ValSamples(self.val, scale), [[i] for i in indices], workers=0)

    def prepare(self, batch: Batch, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Move a host batch to `device`, distort its colors if it is for training, normalize it.

        Returns image (n, C, h, w) float32, channels last in memory, 0 where it is padded; and label
        (n, H, W) uint8.
        """
        host = batch["image"]
        is_rgb = host.dtype == torch.uint8 and host.shape[1] == 3
        distort = "color" in batch and self.sampling["photometric"] and is_rgb
        # photometric_distortion() is fastest if each channel is contiguous.
        layout = torch.contiguous_format if distort else torch.preserve_format
        image = host.to(device, non_blocking=True)
        image = image.to(torch.float32, memory_format=layout, copy=True)
        if distort:
            image = photometric_distortion(image, batch["color"].to(device, non_blocking=True))
        image = image.sub_(self.mean).div_(self.std)
        # Whether there is padding is decided on the host, to avoid a device sync.
        if "valid" in batch and (batch["valid"] != torch.tensor(host.shape[2:])).any():
            valid = batch["valid"].to(device, non_blocking=True)
            height, width = valid[:, :, None, None].unbind(1)  # (n, 1, 1) each
            y = torch.arange(host.shape[2], device=device)[:, None]  # (h, 1)
            x = torch.arange(host.shape[3], device=device)  # (w)
            padding = (y >= height) | (x >= width)  # (n, h, w)
            image = image.masked_fill_(padding[:, None], 0)
        label = batch["label"].to(device, non_blocking=True)
        return image.contiguous(memory_format=torch.channels_last), label

    def sample_files(self, sample_indices: list[int]) -> list[str]:
        """Return the image files of training samples."""
        return [self.train.name(self.samples.dataset_index(int(k))) for k in sample_indices]

    def check(self, train: bool = True, val: bool = True, count: int = 8) -> None:
        """Decode `count` samples of each of these splits; raise DataError if one cannot be used.

        Also raises DataError if training crops would be mostly padding, if the labels show a single
        class, or if the splits share images. Counts the classes if data.rare_classes needs them.
        """
        if train and val:
            self.check_overlap()
        fits = True  # whether data.mean and data.std fit the training images; one warning is enough
        if train:
            missing = self.train.missing if isinstance(self.train, Concat) else []
            if missing:
                raise DataError(
                    f"data.datasets: no part of the training split has the class {missing[0]}, so "
                    "it would never occur. Correct class_map or splits, or leave out the class"
                )
            self.samples.dataset_index(0)
            shapes, counts, fits = self.check_split(self.train, count)
            check_classes(self.train, counts, is_trained=True)
        if val:
            _, counts, _ = self.check_split(self.val, count, is_compared=fits)
            check_classes(self.val, counts, is_trained=False, is_alone=not train)
        if train:
            self.check_crop_size(shapes)
            if self.sampling["transforms"]:
                self.samples.sample(0)

    def check_overlap(self) -> None:
        """Raise DataError if images are both for training and for validation."""
        if self.allow_overlap:
            return
        train_images = image_files(self.train)
        val_images = image_files(self.val)
        common, copies = common_files(train_images, val_images)
        if self.train_split == self.val_split:  # perhaps of a data set that names no files
            common = [self.val.name(i) for i in range(len(self.val))]
        if common:
            raise DataError(
                f"{len(common)} of {len(self.val)} validation images are training images too, such "
                f"as {common[0]}, so their score does not show how the network does on other "
                "images. Correct data.val_split, data.images or data.files, or set data.fold. If "
                "it is on purpose, set data.allow_overlap=true"
            )
        if copies:
            warn(
                f"{len(copies)} of {len(self.val)} validation images are copies of training "
                f"images, such as {copies[0]}, so their score does not show how the network does "
                "on other images"
            )

    def check_split(
        self, dataset, count: int, is_compared: bool = True
    ) -> tuple[list[Size], np.ndarray, bool]:
        """Decode `count` samples, spread over the split.

        is_compared: whether to compare the values of the images with data.mean and data.std.
        Returns their (height, width), the pixels (samples, 256) of each class in them, and whether
        their values fit.
        """
        shapes = []
        counts = []
        moments = {}  # part of a Concat -> those of its images, by name
        name_of = {}  # type of the pixels -> an image
        indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset)))
        for i in indices.astype(int).tolist():
            check_files(dataset, i)
            image, label = dataset.load(i)
            if image.shape[-1] != self.in_channels:
                raise DataError(
                    f"{dataset.name(i)}: the image has {image.shape[-1]} channels, but "
                    f"data.in_channels is {self.in_channels}"
                )
            if not np.isfinite(image).all():
                raise DataError(NOT_FINITE.format(dataset.name(i)))
            name_of.setdefault(image.dtype, dataset.name(i))
            if len(name_of) > 1:
                raise different_types(name_of)
            shapes.append(label.shape)
            counts.append(label_histogram(label))
            part = dataset.locate(i)[0] if isinstance(dataset, Concat) else 0
            moments.setdefault(part, {})[dataset.name(i)] = moments_of(image)
        fits = True
        for of_part in moments.values():
            fits = fits and (not is_compared or self.fits_normalization(of_part))
        return shapes, np.array(counts), fits

    def fits_normalization(self, moments: dict[str, np.ndarray]) -> bool:
        """Return whether the images will have a mean near 0 and a deviation near 1; warn if not.

        moments: for the name of each image what moments_of() returns, (2, C).
        """
        mean, std = mean_and_std(np.mean(list(moments.values()), axis=0))
        set_mean = self.mean.flatten().cpu().numpy()
        set_std = self.std.flatten().cpu().numpy()
        distance = np.max(np.abs(mean - set_mean) / set_std)
        spread = np.max(std / set_std)
        is_scaled = (set_std != 1).any()  # otherwise the values are used as they are, on purpose
        fits = not is_scaled or (distance <= 10 and spread <= 10 and not 0 < spread < 0.02)
        if not fits:
            warn(
                f"data.mean and data.std ({as_keys(set_mean, set_std)}) do not fit the values of "
                f"images such as {next(iter(moments))}. Measured on {len(moments)} of them: "
                f"{as_keys(mean, std)}; --check-data prints those of all training images"
            )
        return fits

    def check_crop_size(self, shapes: list[Size]) -> None:
        """Raise DataError if no image (height, width) fills a quarter of a crop at any ratio."""
        height, width = self.sampling["crop_size"]
        ratio = self.sampling["ratio_range"][1]
        sizes = [scaled_size(*shape, self.sampling["scale"], ratio) for shape in shapes]
        areas = [min(h, height) * min(w, width) for h, w in sizes]
        largest = max(areas)
        if largest < height * width / 4:
            raise DataError(
                f"data.crop_size: [{height}, {width}] is more than four times the area that an "
                f"image fills even at the largest ratio, {list(sizes[areas.index(largest)])}, so "
                "most of every crop would be padding. Lower it, or raise data.scale or "
                "data.ratio_range"
            )


# ------------------------------------------------------------------------------ Checks and pictures


def image_files(dataset) -> list[str]:
    """Return the image file of each sample; none for a data set that does not name its files."""
    if isinstance(dataset, Concat):
        return [path for part in dataset.parts for path in image_files(part)]
    if isinstance(dataset, CachedDataset):
        dataset = dataset.dataset
    if isinstance(dataset, Folder):
        return [os.path.join(dataset.root, path) for path in dataset.pairs[:, 0].tolist()]
    if isinstance(dataset, PlainDataset) and hasattr(dataset.dataset, "paths"):
        return [dataset.paths(i)[0] for i in range(len(dataset))]
    return []


def checksum_of_images(dataset, split: str) -> dict[str, int]:
    """Return the number of a split's images, and a checksum of their names without folders."""
    names = [os.path.basename(dataset.name(i)) for i in range(len(dataset))]
    return {
        f"number of {split} images": len(names),
        f"checksum of the names of {split} images": zlib.crc32("\n".join(names).encode()),
    }


def common_files(
    first: list[str], second: list[str], most: int = 1000
) -> tuple[list[str], list[str]]:
    """Return those files of `second` that are in `first` as well, and those that are copies.

    Links to folders are followed. Files of the same name, up to `most` of them, are compared: they
    may be links to one file, or copies, which are read up to where they differ.
    """
    real_folder = functools.cache(os.path.realpath)
    found = {}  # name -> the real paths of the files of `first` that have it
    for path in first:
        folder, name = os.path.split(path)
        found.setdefault(name, set()).add(real_folder(folder))
    common = []
    copies = []
    namesakes = []
    for path in second:
        folder, name = os.path.split(path)
        if real_folder(folder) in found.get(name, ()):
            common.append(path)
        elif name in found:
            namesakes.append(path)
    for path in namesakes[:: len(namesakes) // most + 1]:
        name = os.path.basename(path)
        others = [os.path.join(folder, name) for folder in itertools.islice(found[name], 10)]
        if any(os.path.samefile(path, other) for other in others):
            common.append(path)
        elif any(filecmp.cmp(path, other, shallow=False) for other in others):
            copies.append(path)
    return common, copies


MIXED_HINT = (
    "some labels show the second class and others ignored pixels, but none shows both. If these "
    "are masks of 0 and 1 and masks of 0 and 255, set data.values=[0, [1, 255]]"
)


def looks_mixed(counts: np.ndarray, dataset) -> bool:
    """Return whether labels (samples, 256) of two classes may come from masks of two kinds."""
    is_second = counts[:, 1] > 0
    is_ignored = counts[:, IGNORE] > 0
    both = is_second & is_ignored
    return len(dataset.classes) == 2 and is_second.any() and is_ignored.any() and not both.any()


def check_classes(dataset, counts: np.ndarray, is_trained: bool, is_alone: bool = True) -> None:
    """Raise DataError if the labels show no more than one class, as then nothing can be learned.

    Validation labels may well do so: some have only the background, or all are placeholders. That
    is a warning, unless they look like black and white masks that are misread.

    counts: (samples, 256), the pixels of each class in some labels. If they show one class, the
        others are searched for a second one, or 100 of them in validation.
    is_alone: there are no training labels that have shown that masks are read rightly.
    """
    if looks_mixed(counts, dataset):
        warn(MIXED_HINT)
    for part in dataset.parts if isinstance(dataset, Concat) else [dataset]:
        warn_of_reduced_labels(part)
    seen = counts.any(0)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    if not is_trained:
        order = order[:100]
    for i in tqdm(order, "looking for a second class", leave=False, delay=1):
        if seen[: len(dataset.classes)].sum() > 1:
            return
        seen |= label_histogram(load_label(dataset, i)) > 0
    problem = single_class_problem(dataset, seen)
    is_mask = is_alone and seen[: len(dataset.classes)].any() and seen[IGNORE]
    if problem and (is_trained or is_mask):
        raise DataError(problem)
    if problem:
        warn(problem)


def single_class_problem(dataset, seen: np.ndarray) -> str:
    """Return what is wrong if the labels show no more than one class, or "".

    seen: (256,) bool, which classes and ignored pixels the labels show.
    """
    classes = np.flatnonzero(seen[: len(dataset.classes)])
    if len(classes) > 1:
        return ""
    found = "every pixel is ignored"
    if len(classes):
        found = f"every pixel is of the class {dataset.classes[classes[0]]!r}"
        found += " or ignored" if seen[IGNORE] else ""
    problem = (
        f"the labels of {dataset.name(0)} and others: {found}, so there is nothing to tell apart"
    )
    folder = dataset.dataset if isinstance(dataset, CachedDataset) else dataset
    if not isinstance(folder, Folder):
        return problem
    values = values_in_files(folder)
    ignored = [value for value in values if folder.table[value] == IGNORE]
    problem += f". The label files hold the values {values}, of which {ignored} are ignored"
    if len(values) == len(folder.classes):
        problem += (
            f". If they are the classes {', '.join(folder.classes)}, set data.values={values}, "
            "and leave out data.reduce_zero_label and data.ignore_index"
        )
    return problem


def values_in_files(folder: Folder) -> list[int]:
    """Return the values in the first label files, sorted."""
    values = set()
    for i in range(min(8, len(folder))):
        with images_of_any_size(folder.large_images):
            values.update(np.unique(read_label(folder.paths(i)[1])).astype(int).tolist())
    return sorted(values)


def warn_of_reduced_labels(dataset) -> None:
    """Warn if a Folder reads classes from 1 on, but its files seem to hold them from 0 on.

    The sign is that 0 and 255 are both there, and the last value is not.
    """
    folder = dataset.dataset if isinstance(dataset, CachedDataset) else dataset
    if not isinstance(folder, Folder) or folder.table[0] != IGNORE or min(folder.values) != 1:
        return
    found = values_in_files(folder)
    last = max(folder.values)
    if {0, IGNORE} <= set(found) and last not in found:
        warn(
            f"the labels of {folder.name(0)} and others hold 0 and {IGNORE}, which are both "
            f"ignored, and not {last}. If their classes start at 0, as in labels that "
            "reduce_zero_label has been applied to before, every class is taken for the one "
            "before it: read them with data.type=folder and without reduce_zero_label"
        )


def preflight(dataset, processes: int, kept_counts: Path | None = None) -> list[str]:
    """Decode every sample; print what the labels and the channels of the images hold.

    kept_counts: the file that data.rare_classes reads, written if all is well.

    Returns what is wrong, one message for each sample that cannot be used.
    """
    size = len(dataset)
    statistics = SampleStatistics(dataset, of_images=True)
    items = Batches(statistics, range(size), min(processes, size))
    histograms = np.zeros((size, 256), np.uint32)
    channels = 0.0  # (2, C)
    problems = []
    empty = []
    items = tqdm(items, "checking every file", leave=False)
    for i, (histogram, sums, problem) in enumerate(items):
        histograms[i] = histogram
        if problem:
            problems.append(problem)
            continue
        channels = channels + np.array(sums)
        if not any(histogram[: len(dataset.classes)]):
            empty.append(dataset.name(i))
    pixels = histograms.sum(dtype=int)
    ignored = histograms[:, IGNORE].sum(dtype=int) / max(pixels, 1)
    print(f"{size} samples, {ignored:.1%} of the pixels ignored")
    counts = histograms[:, : len(dataset.classes)]
    print_class_table(dataset.classes, counts.astype(int))
    if not problems:
        print("mean and std of the images:", as_keys(*mean_and_std(channels / pixels)))
        if kept_counts:
            write_counts(kept_counts, counts)
    if looks_mixed(histograms, dataset):
        print(f"warning: {MIXED_HINT}")
    if empty:
        print(f"{len(empty)} labels in which every pixel is ignored, such as that of {empty[0]}")
    return problems


def moments_of(image: np.ndarray) -> np.ndarray:
    """Return the mean and the mean square of the channels of (H, W, C), about, as (2, C)."""
    few = image[::4, ::4].astype(float)
    return np.stack([few.mean((0, 1)), np.square(few).mean((0, 1))])


def mean_and_std(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std (C,) from the means of values and of their squares, (2, C)."""
    mean, square = moments
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def as_keys(mean: np.ndarray, std: np.ndarray) -> str:
    """Return mean and std (C,) as keys of the section data."""
    std = np.where(std <= 1e-6 * np.abs(mean), 1, std)  # a constant channel; it must be above 0
    values = [", ".join(f"{value:.5g}" for value in row) for row in (mean, std)]
    return f'"mean": [{values[0]}], "std": [{values[1]}]'


def print_class_table(classes: list[str], pixels: np.ndarray) -> None:
    """Print the frequency and suggested weight of each class; pixels: (samples, classes).

    The weights are those of median frequency balancing (Eigen and Fergus, 2015): the median of all
    frequencies / the frequency of the class in the images where it occurs.
    """
    occurs = pixels > 0
    total = pixels.sum(0)  # (classes)
    images = occurs.sum(0)
    frequency = total / np.maximum((pixels.sum(1, keepdims=True) * occurs).sum(0), 1)
    weight = np.zeros(len(classes))
    if total.any():
        weight[total > 0] = np.median(frequency[total > 0]) / frequency[total > 0]
    share = total / max(total.sum(), 1)
    print(f"{'class':24s}{'pixels':>9s}{'images':>9s}{'weight':>9s}")
    for c, name in enumerate(classes):
        note = "" if images[c] else "   never occurs"
        print(f"{name:24s}{share[c]:9.3%}{images[c]:9d}{weight[c]:9.2f}{note}")
    print("suggested class_weight:", [round(float(w), 2) for w in weight.clip(0, 10)])


def check_every_sample(data: Data, sheet: Path, processes: int | None = None) -> None:
    """Decode every sample of both splits, print their class tables, and draw a contact sheet.

    sheet: the PNG to write, see contact_sheet().
    processes: the number of workers. Default: one per core.

    Raises DataError with the first 20 problems if samples cannot be used.
    """
    data.check_overlap()
    problems = []
    for split in ("train", "val"):
        print(f"--- {split}")
        dataset = getattr(data, split)
        kept_counts = counts_file(dataset, data.cache) if split == "train" else None
        problems += preflight(dataset, processes or os.cpu_count(), kept_counts)
    if problems:
        raise DataError("\n- ".join([f"{len(problems)} samples are wrong", *problems[:20]]))
    data.check()
    contact_sheet(data, sheet)
    print("contact sheet:", sheet)


def contact_sheet(data: Data, path: Path | str, count: int = 12) -> None:
    """Write a PNG of the first `count` training samples as the network sees them.

    Below each is the same image overlaid with its label, and at the bottom a legend of the classes.
    """
    batch = data.samples[range(count)]
    if isinstance(batch, DataError):
        raise batch
    image, label = data.prepare(batch, "cpu")
    channels = [0, 1, 2] if data.in_channels >= 3 else [0, 0, 0]
    image = (image * data.std + data.mean).permute(0, 2, 3, 1)[..., channels].numpy()
    image *= 255 / max(255, image.max())  # (N, h, w, 3), 16 bits scaled to 8
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(data.palette)] = data.palette
    overlay = image / 2 + colors[label.numpy()] / 2
    overlay = np.where((label == IGNORE).numpy()[..., None], image / 3, overlay)
    tiles = np.concatenate([image, overlay], axis=1)  # (N, 2h, w, 3)
    rows = [np.concatenate(tiles[k : k + 4], axis=1) for k in range(0, count, 4)]
    sheet = Image.fromarray(np.concatenate(rows).clip(0, 255).astype(np.uint8))
    sheet.thumbnail((2400, 2400))

    legend_rows = math.ceil(len(data.classes) / 6)
    picture = Image.new("RGB", (sheet.width, sheet.height + 16 * legend_rows), "white")
    picture.paste(sheet)
    draw = ImageDraw.Draw(picture)
    for c, (name, color) in enumerate(zip(data.classes, data.palette)):
        x = c % 6 * sheet.width // 6
        y = c // 6 * 16 + sheet.height
        draw.rectangle((x + 2, y + 2, x + 14, y + 14), fill=tuple(color))
        draw.text((x + 18, y + 2), name, fill="black")
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: the contact sheet cannot be written ({error}). Choose a writable folder by "
            "--show-dir"
        ) from None


# --------------------------------------------------------------------- Names and colors of classes


def parse_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def parse_colors(text: str) -> list[list[int]]:
    """Convert hexadecimal colors to [red, green, blue] each."""
    return [list(bytes.fromhex(color)) for color in text.split()]


CITYSCAPES_CLASSES = parse_names("""
    road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
    sky, person, rider, car, truck, bus, train, motorcycle, bicycle
""")
CITYSCAPES_PALETTE = parse_colors("""
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000
    00008e 000046 003c64 005064 0000e6 770b20
""")
CAMVID_CLASSES = parse_names("""
    sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist
""")
CAMVID_PALETTE = parse_colors("""
    808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0
""")
VOC_CLASSES = parse_names("""
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog,
    horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor
""")
ADE20K_CLASSES = parse_names("""
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
    screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
""")
ADE20K_PALETTE = parse_colors("""
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d
    787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0
    0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06
    ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00
    ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70
    00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99
    ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52
    000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00
    08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff
    9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00
    00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8
    005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
""")
CONTEXT_CLASSES = parse_names("""
    background, aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building,
    bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence,
    floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person,
    plate, platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa,
    table, track, train, tree, truck, tvmonitor, wall, water, window, wood
""")
COCO_STUFF_CLASSES = parse_names("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge,
    building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth,
    clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
    floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
    furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal,
    mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic,
    platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
    shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
    tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
    wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
""")
MAPILLARY_CLASSES = parse_names("""
    Bird, Ground Animal, Curb, Fence, Guard Rail, Barrier, Wall, Bike Lane, Crosswalk - Plain,
    Curb Cut, Parking, Pedestrian Area, Rail Track, Road, Service Lane, Sidewalk, Bridge, Building,
    Tunnel, Person, Bicyclist, Motorcyclist, Other Rider, Lane Marking - Crosswalk,
    Lane Marking - General, Mountain, Sand, Sky, Snow, Terrain, Vegetation, Water, Banner, Bench,
    Bike Rack, Billboard, Catch Basin, CCTV Camera, Fire Hydrant, Junction Box, Mailbox, Manhole,
    Phone Booth, Pothole, Street Light, Pole, Traffic Sign Frame, Utility Pole, Traffic Light,
    Traffic Sign (Back), Traffic Sign (Front), Trash Can, Bicycle, Boat, Bus, Car, Caravan,
    Motorcycle, On Rails, Other Vehicle, Trailer, Truck, Wheeled Slow, Car Mount, Ego Vehicle
""")
MAPILLARY_PALETTE = parse_colors("""
    a52a2a 00c000 c4c4c4 be9999 b4a5b4 5a7896 66669c 8040ff 8c8cc8 aaaaaa faaaa0 606060 e6968c
    804080 6e6e6e f423e8 966464 464646 96785a dc143c ff0000 ff0064 ff00c8 c88080 ffffff 40aa40
    e6a032 4682b4 beffff 98fb98 6b8e23 00aa1e ffff80 fa001e 648cb4 dcdcdc dc8080 de2828 64aa1e
    282828 212121 6480a0 8e0000 466496 d2aa64 999999 808080 000050 faaa1e c0c0c0 dcdc00 8c8c14
    770b20 9600ff 003c64 00008e 00005a 0000e6 005064 804040 00006e 000046 0000c0 202020 780a0a
""")
LOVEDA_CLASSES = parse_names("""
    background, building, road, water, barren, forest, agricultural
""")
LOVEDA_PALETTE = parse_colors("ffffff ff0000 ffff00 0000ff 9f81b7 00ff00 ffc380")
ISPRS_CLASSES = parse_names("""
    impervious_surface, building, low_vegetation, tree, car, clutter
""")
ISPRS_PALETTE = parse_colors("ffffff 0000ff 00ffff 00ff00 ffff00 ff0000")
ISAID_CLASSES = parse_names("""
    background, ship, store_tank, baseball_diamond, tennis_court, basketball_court,
    Ground_Track_Field, Bridge, Large_Vehicle, Small_Vehicle, Helicopter, Swimming_pool, Roundabout,
    Soccer_ball_field, plane, Harbor
""")
ISAID_PALETTE = parse_colors("""
    000000 00003f 003f3f 003f00 003f7f 003fbf 003fff 007f3f 007f7f 00007f 0000bf 0000ff 00bf7f
    007fbf 007fff 00649b
""")
SYNAPSE_CLASSES = parse_names("""
    background, aorta, gallbladder, left_kidney, right_kidney, liver, pancreas, spleen, stomach
""")
SYNAPSE_PALETTE = parse_colors("""
    000000 0000ff 00ff00 ff0000 00ffff ff00ff ffff00 3cffff f0f0f0
""")


if __name__ == "__main__":
    raise SystemExit(
        "error: data.py is not a command. To check and draw the data, run "
        "python train.py --config CONFIG --check-data"
    )
