"""A sample's life: files -> decode -> scale, crop, flip -> batch -> device; and the data sets.

    data = Data(**config["data"], seed=0)
    for batch in data.train_batches(rank=0, world_size=1, start=0):       # uint8, on the host
        image, label = data.prepare(batch, device)                   # color distortion and normalization for the whole batch

The sample at place p of the endless training stream depends on (seed, p) alone: not on ranks, on workers or on where a run was resumed.
Training follows MMSegmentation's pipeline step by step (RandomResize, RandomCrop, RandomFlip, PhotoMetricDistortion, normalize, pad), but
never scales a pixel that is cropped away, and leaves color to the device.

`python data.py --config C` looks at every file of a data set and draws a contact sheet of what the net will see.
"""

import argparse
import contextlib
import fcntl
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dist_utils import UserError

IGNORE = 255  # the one value that means "not scored", whatever the files use
INVALID = (
    254  # marks a value in a label file that is no class; so a data set has at most 253 classes
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".npy"}
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, of 0..255
ORDER, SAMPLE, SCENE = (
    1,
    2,
    3,
)  # what a random stream is for: np.random.default_rng((seed, purpose, place))


class DataError(UserError):
    """The data or its settings are wrong."""


# --------------------------------------------------------------------------------------------------------------- files


@functools.cache
def torchvision_decodes() -> bool:
    """Loads torchvision's decoder, which is faster than Pillow and keeps the 16 bits of an RGB PNG; a later torchvision may lack it.

    Its library alone, as the package takes a second and 100 MB to import: it brings torch's compiler.
    """
    for path in glob.glob(
        os.path.join(
            importlib.util.find_spec("torchvision").submodule_search_locations[0], "image*.so"
        )
    ):
        with contextlib.suppress(OSError):
            torch.ops.load_library(path)
    return hasattr(torch.ops.image, "decode_image")


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """What goes wrong within with the file at `path` is a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(
            f"{path}: this file is gone. Put it back, or start anew so that the folders are read again"
        ) from None
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(
            f"{path}: cannot be decoded ({error}). The file is cut short, damaged, too large or of an unknown kind: "
            "bring it again, or take it and its label out of the data set"
        ) from None


def read(path: str) -> np.ndarray:
    """Any image file or .npy as it stands: (H, W) or (H, W, C), the values of the file, a palette PNG as its indices."""
    with readable(path):
        if path.endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            if (
                not isinstance(array, np.ndarray)
                or array.ndim < 2
                or array.dtype.kind not in "buif"
            ):
                raise ValueError("it holds no array (H, W) or (H, W, C) of numbers")
            return array
        with Image.open(path) as image:  # reads the header alone, and refuses an image bomb
            if (
                image.format in ("PNG", "JPEG")
                and image.mode in ("L", "LA", "RGB", "RGBA", "I;16")
                and torchvision_decodes()
            ):
                return (
                    torch.ops.image.decode_image(torch.ops.image.read_file(path), 0, False)
                    .permute(1, 2, 0)
                    .numpy()
                )  # (H, W, C)
            if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "PA"):
                image = image.convert("RGB")
            if image.format != "TIFF" or image.n_frames == 1:
                return np.array(image)
            return np.stack(
                [np.asarray(image) for page in range(image.n_frames) if image.seek(page) is None],
                axis=-1,
            )  # a band a page


def read_image(path: str, channels: int) -> np.ndarray:
    """(H, W, channels) uint8, uint16 or float32. Grey becomes RGB and an alpha channel is dropped where 3 channels are asked for."""
    image = read(path)
    if image.ndim == 2 and image.dtype == np.uint8 and channels == 3 and not path.endswith(".npy"):
        with readable(path), Image.open(path) as source:
            image = (
                np.array(source.convert("RGB")) if source.mode == "P" else image
            )  # a palette PNG
    image = image[..., None] if image.ndim == 2 else image
    if channels == 3 and image.shape[-1] in (1, 2):
        image = image[..., :1].repeat(3, axis=-1)
    elif (image.shape[-1], channels) in ((4, 3), (2, 1)):
        image = image[..., :channels]
    if image.ndim != 3 or image.shape[-1] != channels:
        raise DataError(
            f"{path}: an image of shape {image.shape} where data.in_channels is {channels}. Set data.in_channels, "
            "data.mean and data.std, and in_channels of the net's backbone, to the number of channels"
        )
    return image if image.dtype in (np.uint8, np.uint16) else image.astype(np.float32, copy=False)


def read_label(path: str) -> np.ndarray:
    """(H, W) integers: the values of the file."""
    label = read(path)
    label = label[..., 0] if label.ndim == 3 and label.shape[-1] == 1 else label
    label = label.astype(np.uint8) if label.dtype == bool else label
    if label.ndim != 2 or label.dtype.kind not in "ui":
        raise DataError(
            f"{path}: a label holds one whole number a pixel, its class; this file has shape {label.shape} of {label.dtype}. "
            "If it shows classes as colors, turn it into an 8-bit grey PNG first: "
            "sum(c * (picture[..., :3] == palette[c]).all(-1) for c in range(len(palette)))"
        )
    return label


def scan(top: str, suffix: str | None) -> dict[str, str]:
    """The files under `top`: name without suffix -> path, both relative to `top`. Without a suffix: every kind that can be read."""
    if not os.path.isdir(top):
        raise DataError(
            f"{top}: there is no such folder. Check data.root, and how the folders in it are named"
        )

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}). Make it readable, or take it out of the data set"
        )

    found = {}
    for where, folders, names in os.walk(top, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            ending = os.path.splitext(name)[1] if suffix is None else suffix
            if (
                name.startswith(".")
                or not name.endswith(ending)
                or suffix is None
                and ending.lower() not in SUFFIXES
            ):
                continue
            path = os.path.relpath(os.path.join(where, name), top)
            other = found.setdefault(path[: -len(ending)], path)
            if other != path:
                raise DataError(
                    f"{top}: {other} and {path} have one name. Say by data.image_suffix or data.label_suffix which is meant"
                )
    return found


# ----------------------------------------------------------------------------------------------------------- data sets


def voc_palette(count: int) -> list[list[int]]:
    """Pascal VOC's colors: the bits of the class dealt out to red, green and blue, highest first."""
    return [
        [sum((c >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3)]
        for c in range(count)
    ]


def names(text: str) -> list[str]:
    return text.split(",")


def colors(text: str) -> list[list[int]]:
    """Six hexadecimal digits a color -> [r, g, b] each."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 3).tolist()


CITYSCAPES_CLASSES = names(
    "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,bus,train,"
    "motorcycle,bicycle"
)
CITYSCAPES_PALETTE = colors(
    "804080f423e846464666669cbe9999999999faaa1edcdc006b8e2398fb984682b4dc143cff000000008e000046003c640050640000e6770b20"
)
CAMVID_CLASSES = names("sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist")
CAMVID_PALETTE = colors("808080800000c0c0808040803c28de808000c080804040804000804040000080c0")
VOC_CLASSES = names(
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,sheep,"
    "sofa,train,tvmonitor"
)
ADE20K_CLASSES = names(
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,mountain,plant,curtain,"
    "chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,rock,wardrobe,lamp,bathtub,railing,cushion,"
    "base,box,column,signboard,chest of drawers,counter,sand,sink,skyscraper,fireplace,refrigerator,grandstand,path,stairs,runway,case,"
    "pool table,pillow,screen door,stairway,river,bridge,bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,"
    "kitchen island,computer,swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,booth,"
    "television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,poster,stage,van,ship,fountain,"
    "conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,"
    "trade name,microwave,pot,animal,bicycle,lake,dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,"
    "pier,crt screen,plate,monitor,bulletin board,shower,radiator,glass,clock,flag"
)
ADE20K_PALETTE = colors(
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04ff3307cc46030066c83de6fa"
    "ff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff0599"
    "0633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85"
    "ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ff"
    "ff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff"
    "00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff5000abed4d6ff0000ccff1400ff"
    "ffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cffb8ff000085ffffd60019c2c266ff005c00ff"
)
CONTEXT_CLASSES = names(
    "background,aeroplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,ceiling,chair,cloth,"
    "computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,horse,keyboard,light,motorbike,mountain,mouse,person,plate,"
    "platform,pottedplant,road,rock,sheep,shelves,sidewalk,sign,sky,snow,sofa,table,track,train,tree,truck,tvmonitor,wall,water,window,"
    "wood"
)
COCO_STUFF_CLASSES = names(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,"
    "horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,banner,blanket,branch,"
    "bridge,building-other,bush,cabinet,cage,cardboard,carpet,ceiling-other,ceiling-tile,cloth,clothes,clouds,counter,cupboard,curtain,"
    "desk-stuff,dirt,door-stuff,fence,floor-marble,floor-other,floor-stone,floor-tile,floor-wood,flower,fog,food-other,fruit,"
    "furniture-other,grass,gravel,ground-other,hill,house,leaves,light,mat,metal,mirror-stuff,moss,mountain,mud,napkin,net,paper,"
    "pavement,pillow,plant-other,plastic,platform,playingfield,railing,railroad,river,road,rock,roof,rug,salad,sand,sea,shelf,sky-other,"
    "skyscraper,snow,solid-other,stairs,stone,straw,structural-other,table,tent,textile-other,towel,tree,vegetable,wall-brick,"
    "wall-concrete,wall-other,wall-panel,wall-stone,wall-tile,wall-wood,water-other,waterdrops,window-blind,window-other,wood"
)


class Folder:
    """Images and their labels in two folders, paired by name; or the pairs that a file lists.

    root: the folder that all other paths are relative to. `{split}` in images, labels and files stands for the split's name.
    classes: the names of the classes.   palette: an [r, g, b] for each (default: Pascal VOC's colors).
    images, labels: the two folders, searched with their subfolders.   files: a text file with one sample a line, either a name
        (path in `images` without suffix) or the image and the label, relative to root, with a blank or a tab between.
    image_suffix, label_suffix: what follows the name that both have in common, such as `_leftImg8bit.png` (default: any known suffix).
    ignore_index: the value in the files that is not scored, or several; 255 never is, unless `values` names it.
    reduce_zero_label: 0 in the files is not scored either, and class c is written as c + 1.
    values: the value of each class in the files, where it is not its number: [0, 255] reads a black and white mask.
    """

    cache: "Cache | None" = None

    def __init__(
        self,
        split: str,
        *,
        root: str,
        classes: list[str],
        images: str = "images/{split}",
        labels: str = "labels/{split}",
        files: str | None = None,
        image_suffix: str | None = None,
        label_suffix: str | None = None,
        palette: list[list[int]] | None = None,
        ignore_index: int | list[int] = 255,
        reduce_zero_label: bool = False,
        values: list[int] | None = None,
        in_channels: int = 3,
    ):
        self.root, self.classes, self.in_channels = (
            os.path.abspath(root),
            list(classes),
            in_channels,
        )
        self.palette = voc_palette(len(classes)) if palette is None else palette
        self.values = (
            list(range(reduce_zero_label, len(classes) + reduce_zero_label))
            if values is None
            else values
        )
        if not 0 < len(classes) < INVALID or not len(self.palette) == len(self.values) == len(
            classes
        ):
            raise DataError(
                f"data: {len(classes)} classes, {len(self.palette)} colors in palette, {len(self.values)} values. "
                f"Name 1 to {INVALID - 1} classes, and as many colors and values, if any"
            )
        if not all(
            len(color) == 3 and 0 <= min(color) and max(color) <= 255 for color in self.palette
        ):
            raise DataError("data.palette: a color is [red, green, blue], each of 0..255")
        ignored = [ignore_index] if isinstance(ignore_index, int) else ignore_index
        if not all(0 <= value <= 255 for value in (*self.values, *ignored)):
            raise DataError(
                f"data: ignore_index {ignore_index} and the values of the classes {self.values} must be within 0..255"
            )
        if len({*self.values}) < len(self.values):
            raise DataError(
                f"data.values: {self.values} names a value twice, so that a class would never occur"
            )
        self.table = np.full(256, INVALID, np.uint8)  # value in the file -> class
        self.table[[0] * reduce_zero_label + [IGNORE]] = IGNORE
        self.table[self.values] = np.arange(len(classes))
        self.table[[value for value in ignored if value != IGNORE]] = IGNORE
        images, labels, files = (
            text and text.replace("{split}", split) for text in (images, labels, files)
        )
        self.pairs = np.array(
            self.find(images, labels, files, image_suffix, label_suffix)
        )  # (samples, 2) paths

    def find(
        self,
        images: str,
        labels: str,
        files: str | None,
        image_suffix: str | None,
        label_suffix: str | None,
    ) -> list:
        """The pairs of paths, relative to root, sorted: the same list on every machine."""
        image_top, label_top = os.path.join(self.root, images), os.path.join(self.root, labels)
        image_of, label_of = scan(image_top, image_suffix), scan(label_top, label_suffix)
        pairs, names = self.listed(files, image_of) if files else ([], sorted(image_of))
        lost, unused = (
            [name for name in names if name not in label_of],
            sorted(label_of.keys() - image_of.keys()),
        )
        also = (
            f"{len(unused)} labels have no image, such as {os.path.join(label_top, label_of[unused[0]])}. "
            if unused
            else ""
        )
        if lost:
            first = os.path.join(image_top, image_of[lost[0]])
            raise DataError(
                f"{len(lost)} of {len(names)} images have no label: for {first} there is no {lost[0]}{label_suffix or '.*'} "
                f"in {label_top}. {also}Add the labels, correct data.image_suffix and "
                "data.label_suffix, or list the samples in a file (data.files)"
            )
        if not pairs and not names:
            raise DataError(
                f"{os.path.join(self.root, files or images)}: no images (data.image_suffix: {image_suffix or 'any'})"
            )
        if unused and not files:
            warnings.warn(also, stacklevel=2)
        return sorted(
            pairs
            + [
                (os.path.join(images, image_of[name]), os.path.join(labels, label_of[name]))
                for name in names
            ]
        )

    def listed(
        self, files: str, image_of: dict[str, str]
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """What the file lists: pairs of paths, which must be under root, and names."""
        path, pairs, names = os.path.join(self.root, files), set(), set()
        if not os.path.isfile(path):
            raise DataError(f"{path}: there is no such file (data.files)")
        try:
            with open(
                path, encoding="utf-8-sig"
            ) as text:  # with or without the mark that Windows puts first
                lines = text.read().splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is no text in UTF-8 ({error}). Save it as such") from None
        for number, line in enumerate(map(str.strip, lines), 1):
            columns = line.split("\t") if "\t" in line else line.split()
            if line in image_of:
                names.add(line)
            elif len(columns) == 2:
                for column in columns:
                    full = os.path.normpath(os.path.join(self.root, column))
                    if os.path.commonpath([self.root, full]) != self.root:
                        raise DataError(
                            f"{path}, line {number}: {column} is outside data.root ({self.root}), and is not read"
                        )
                    if not os.path.isfile(full):
                        raise DataError(f"{path}, line {number}: there is no file {full}")
                pairs.add(tuple(map(os.path.normpath, columns)))
            elif columns and columns[0] in image_of:
                names.add(columns[0])
            elif columns:
                raise DataError(
                    f"{path}, line {number}: there is no image named {columns[0]} in the folder of data.images"
                )
        return list(pairs), list(names)

    def __len__(self) -> int:
        return len(self.pairs)

    def paths(self, i: int) -> tuple[str, str]:
        return os.path.join(self.root, self.pairs[i, 0]), os.path.join(self.root, self.pairs[i, 1])

    def name(self, i: int) -> str:
        return self.paths(i)[0]

    def size(self, i: int) -> tuple[int, int]:
        """(height, width), from the file's header where it has one."""
        path = self.name(i)
        if path.endswith(".npy"):
            return self.load(i)[1].shape
        with readable(path), Image.open(path) as image:
            return image.size[::-1]

    def load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """image (H, W, in_channels) uint8, uint16 or float32, and label (H, W) uint8: the class, or 255 where it is not scored."""
        return self.cache.load(self, i) if self.cache else self.decode(i)

    def decode(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, label_path = self.paths(i)
        image, label = read_image(image_path, self.in_channels), read_label(label_path)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{image_path} is {image.shape[1]}x{image.shape[0]}, but its label {label_path} is "
                f"{label.shape[1]}x{label.shape[0]}. Both must have one size: was one of them scaled or turned?"
            )
        small = label if label.dtype == np.uint8 else label.clip(0, 255).astype(np.uint8)
        classes = np.frombuffer(
            bytearray(np.ascontiguousarray(small)).translate(self.table.tobytes()), np.uint8
        ).reshape(label.shape)
        if (classes == INVALID).any() or small is not label and (small != label).any():
            raise DataError(self.complaint(label, label_path))
        return image, classes

    def complaint(self, label: np.ndarray, path: str) -> str:
        found, count = np.unique(label, return_counts=True)
        bad = [int(v) for v in found if not 0 <= v <= 255 or self.table[v] == INVALID]
        allowed = (
            f"{min(self.values)}..{max(self.values)}"
            if np.ptp(self.values) == len(self.values) - 1
            else str(self.values)
        )
        hint = "Correct the file, or the list in data.classes"
        if {0, 255} <= set(found.tolist()) and len(self.classes) == 2:
            hint = "If this is a black and white mask, it must hold 0 and 255 alone, as a PNG, never a JPEG; data.values=[0, 255] reads it"
        elif bad == [len(self.classes)]:
            hint = f"If {bad[0]} means 'not scored', set data.ignore_index={bad[0]}; if the classes start at 1, data.reduce_zero_label=true"
        elif bad == [0]:
            hint = "If 0 means 'not scored', set data.ignore_index=0"
        share, ignored = (
            count[np.isin(found, bad)].sum() / label.size,
            np.flatnonzero(self.table == IGNORE).tolist(),
        )
        return (
            f"{path}: label value{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:8]))}{', ...' * (len(bad) > 8)} ({share:.1%} of the "
            f"pixels) outside the {len(self.classes)} classes. Allowed: {allowed}; not scored: {ignored}. {hint}"
        )


def cityscapes(split: str, *, root: str) -> Folder:
    """Cityscapes (Cordts et al., 2016), 19 classes: leftImg8bit/train/town/*_leftImg8bit.png, gtFine/train/town/*_gtFine_labelTrainIds.png,
    or where these were not made, *_labelIds.png."""
    label = {"label_suffix": "_gtFine_labelTrainIds.png"}
    if not scan(os.path.join(root, "gtFine", split), label["label_suffix"]):
        values = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
        label = {
            "label_suffix": "_gtFine_labelIds.png",
            "values": values,
            "ignore_index": sorted({*range(34)} - {*values}),
        }
    return Folder(
        split,
        root=root,
        images="leftImg8bit/{split}",
        image_suffix="_leftImg8bit.png",
        labels="gtFine/{split}",
        classes=CITYSCAPES_CLASSES,
        palette=CITYSCAPES_PALETTE,
        **label,
    )


def ade20k(split: str, *, root: str) -> Folder:
    """ADE20K (Zhou et al., 2017), ADEChallengeData2016, 150 classes: images/training/*.jpg, annotations/training/*.png; 0 is not scored."""
    return Folder(
        {"train": "training", "val": "validation"}.get(split, split),
        root=root,
        labels="annotations/{split}",
        reduce_zero_label=True,
        classes=ADE20K_CLASSES,
        palette=ADE20K_PALETTE,
    )


def voc(split: str, *, root: str, labels: str = "SegmentationClass") -> Folder:
    """Pascal VOC 2012 (Everingham et al.), VOCdevkit/VOC2012, 21 classes; 1,464 images to train and 1,449 to validate."""
    return Folder(
        split,
        root=root,
        images="JPEGImages",
        labels=labels,
        files="ImageSets/Segmentation/{split}.txt",
        classes=VOC_CLASSES,
    )


def voc_aug(split: str, *, root: str) -> Folder:
    """Pascal VOC 2012 with labels of SBD (Hariharan et al., 2011): 10,582 images to train, aug.txt and SegmentationClassAug added."""
    dataset = voc(split, root=root)
    if split == "train":
        dataset.pairs = np.concatenate(
            [dataset.pairs, voc("aug", root=root, labels="SegmentationClassAug").pairs]
        )
    return dataset


def pascal_context(split: str, *, root: str) -> Folder:
    """Pascal Context (Mottaghi et al., 2014), VOCdevkit/VOC2010, 60 classes of which 0 is the background."""
    return Folder(
        split,
        root=root,
        images="JPEGImages",
        labels="SegmentationClassContext",
        classes=CONTEXT_CLASSES,
        files="ImageSets/SegmentationContext/{split}.txt",
        palette=ADE20K_PALETTE[:60],
    )


def pascal_context_59(split: str, *, root: str) -> Folder:
    """Pascal Context without its background, which is not scored: 59 classes."""
    return Folder(
        split,
        root=root,
        images="JPEGImages",
        labels="SegmentationClassContext",
        classes=CONTEXT_CLASSES[1:],
        files="ImageSets/SegmentationContext/{split}.txt",
        palette=ADE20K_PALETTE[1:60],
        reduce_zero_label=True,
    )


def coco_stuff(split: str, *, root: str) -> Folder:
    """COCO-Stuff 164k (Caesar et al., 2018), 171 classes: images/train2017/*.jpg; annotations/train2017/*_labelTrainIds.png, or where these
    were not made, the *.png of stuffthingmaps_trainval2017, whose 182 numbers leave 11 out."""
    split, label = (
        {"train": "train2017", "val": "val2017"}.get(split, split),
        {"label_suffix": "_labelTrainIds.png"},
    )
    if not scan(os.path.join(root, "annotations", split), label["label_suffix"]):
        label = {
            "values": [
                value
                for value in range(182)
                if value not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
            ]
        }
    return Folder(
        split, root=root, labels="annotations/{split}", classes=COCO_STUFF_CLASSES, **label
    )


def camvid(split: str, *, root: str) -> Folder:
    """CamVid (Brostow et al., 2009) in the 11 classes of SegNet's tutorial: images/train, labels/train; or as there: train, trainannot."""
    tutorial = os.path.isdir(os.path.join(root, "trainannot"))
    images, labels = (
        ("{split}", "{split}annot") if tutorial else ("images/{split}", "labels/{split}")
    )
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
    """Oxford-IIIT Pet (Parkhi et al., 2012), 3 classes, 3,680 images to train, 3,669 to validate. `download`: by torchvision."""
    if download:
        os.makedirs(root, exist_ok=True)
        with open(
            os.path.join(root, ".download"), "w"
        ) as lock:  # the processes of one machine take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            import torchvision

            try:
                torchvision.datasets.OxfordIIITPet(root, target_types="segmentation", download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{root}: Oxford-IIIT Pet cannot be downloaded ({error}). Bring it from where there is a network"
                ) from None
    return Folder(
        {"train": "trainval", "val": "test"}.get(split, split),
        root=os.path.join(root, "oxford-iiit-pet"),
        images="images",
        image_suffix=".jpg",
        labels="annotations/trimaps",
        files="annotations/{split}.txt",
        reduce_zero_label=True,
        classes=["pet", "background", "border"],
    )


class Synthetic:
    """Scenes drawn from their index alone, no files: what a thing is follows from its shape and texture; its colors are drawn at random.

    size: [height, width] of the scenes.   length, val_length: how many there are to train and to validate on.
    """

    # Two classes share each tint: color says which two, texture or shape says which.
    tints = np.array([[115, 100, 80], [190, 80, 70], [80, 115, 190], [190, 185, 110]])[
        [0, 1, 2, 1, 3, 0, 3, 2]
    ]

    def __init__(
        self,
        split: str,
        *,
        size: tuple[int, int] = (128, 128),
        length: int = 4000,
        val_length: int = 100,
    ):
        self.tag, self.shape, self.length = (
            int(split != "train"),
            tuple(size),
            length if split == "train" else val_length,
        )
        self.classes = ["ground", "stripes", "checks", "disc", "ball", "square", "ring", "pole"]
        self.palette = colors("5a5046f423e84682b4dc143cfaaa1e00008e00dc78ffff00")
        if min(*size, length, val_length) < 1:
            raise DataError(
                f"data: size {list(size)}, length {length}, val_length {val_length}: each must be 1 or more"
            )

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return f"synthetic scene {i} of the {'validation' if self.tag else 'training'} split"

    def size(self, i: int) -> tuple[int, int]:
        return self.shape

    def load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """image (height, width, 3) uint8, label (height, width) uint8."""
        rng = np.random.default_rng((SCENE, self.tag, i))
        y, x = (axis.astype(np.float32) for axis in np.ogrid[: self.shape[0], : self.shape[1]])
        label, paint = np.zeros(
            (2, *self.shape), np.uint8
        )  # the class, and which color a pixel has
        kinds = [
            1,
            2,
            *rng.choice(np.arange(3, 8), 7, p=(0.22, 0.22, 0.22, 0.18, 0.16)),
        ]  # two wide regions, and things on top of them
        for n, kind in enumerate(kinds, 1):
            outline, core, angle = self.draw(rng, int(kind))
            mix = core  # of its two colors: a rim and a core, or
            for turn in (0, np.pi / 2)[
                : {1: 1, 2: 2, 4: 1}.get(kind, 0)
            ]:  # stripes of 4 to 6 pixels, one way or both ways
                mix = (
                    mix
                    ^ (
                        (x * np.cos(angle + turn) + y * np.sin(angle + turn)) / rng.uniform(4, 6)
                        + 1000
                    ).astype(np.int32)
                    & 1
                )
            label[outline] = kind
            np.copyto(paint, 2 * n + mix, where=outline, casting="unsafe")
        contrast = (
            rng.uniform(20, 40, (len(kinds) + 1, 1, 1)) * np.array([-1, 1])[:, None]
        )  # of the darker and the lighter color
        contrast[0] = 0
        tints = (
            self.tints[[0, *kinds], None] + rng.normal(0, 28, (len(kinds) + 1, 1, 3)) + contrast
        )  # (things, 2, 3)
        light = (
            1
            + rng.uniform(-0.3, 0.3) * (x / self.shape[1] - 0.5)
            + rng.uniform(-0.3, 0.3) * (y / self.shape[0] - 0.5)
        )
        image = np.take(
            tints.reshape(-1, 3).astype(np.float32), paint, axis=0
        )  # (height, width, 3)
        image = image * light[..., None] + rng.integers(-12, 13, (*self.shape, 1), np.int8)
        return image.clip(0, 255).astype(np.uint8), label

    def draw(self, rng: np.random.Generator, kind: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Somewhere in the scene, a thing of this kind: where it is and where its core is, (height, width) bool and 0 or 1; its angle."""
        height, width = self.shape
        unit, x, y, angle = (
            min(self.shape),
            rng.uniform(0, width),
            rng.uniform(0, height),
            rng.uniform(0, np.pi),
        )
        radius, bar = unit * rng.uniform(0.12, 0.2), max(2, unit // 32)
        shape = Image.new("L", (width, height))
        draw = ImageDraw.Draw(shape)
        if kind in (1, 2):  # a field with up to six corners
            reach = rng.uniform(2, 4) * radius
            draw.polygon(
                [
                    (x + reach * np.cos(a), y + reach * np.sin(a))
                    for a in np.sort(rng.uniform(0, 2 * np.pi, 6))
                ],
                fill=1,
            )
        elif kind == 5:  # a square with a lighter core
            for reach, fill in ((1.25 * radius, 1), (0.7 * radius, 2)):
                draw.polygon(
                    [
                        (x + reach * np.cos(angle + a), y + reach * np.sin(angle + a))
                        for a in np.arange(4) * np.pi / 2
                    ],
                    fill=fill,
                )
        elif kind == 7:  # a pole, lighter on one side
            dx, dy = unit * 0.4 * np.cos(angle), unit * 0.4 * np.sin(angle)
            for aside, wide, fill in ((0, 2 * bar + 1, 1), (bar / unit, bar, 2)):
                px, py = x - dy * aside, y + dx * aside
                draw.line([(px - dx, py - dy), (px + dx, py + dy)], fill=fill, width=wide)
        elif kind == 6:  # a ring with a lighter inner half
            for reach, fill in ((radius - bar, 2), (radius, 1)):
                draw.ellipse(
                    (x - reach, y - reach, x + reach, y + reach), outline=fill, width=bar + 1
                )
        else:  # a plain disc or a striped ball
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
        painted = np.asarray(shape)
        return painted > 0, (painted > 1).astype(np.uint8), angle


DATASETS = {
    "folder": Folder,
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
}


# --------------------------------------------------------------------------------------------------------------- cache


class Cache:
    """Decoded samples of a Folder kept in `folder`, one file each, memory-mapped: only the rows that are used are read.

    A file is [JSON header, 4096 bytes][image][label], under a name made from the sample's paths and the meaning of its label. The header
    holds size and time of the source files, so a changed source is noticed. Files appear whole or not at all: processes may share a folder.
    """

    HEADER = 4096

    def __init__(self, folder: str):
        self.folder, self.full = (
            os.path.abspath(os.path.expanduser(folder)),
            torch.zeros(1).share_memory_(),
        )  # all workers see `full`
        try:
            os.makedirs(self.folder, exist_ok=True)
            for file in os.scandir(self.folder):
                if (
                    file.name.endswith(".tmp") and file.stat().st_mtime < time.time() - 3600
                ):  # what a killed process left behind
                    os.unlink(file)
        except FileNotFoundError:
            pass  # another process has just removed it
        except OSError as error:
            raise DataError(
                f"data.cache: {self.folder} cannot be used ({error}). Name a folder that can be written"
            ) from None

    def load(self, dataset: Folder, i: int) -> tuple[np.ndarray, np.ndarray]:
        """As dataset.decode; the arrays are views of the file."""
        paths = dataset.paths(i)
        try:
            stamp = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, paths)]
        except OSError:
            return dataset.decode(i)  # which says what is the matter
        key = repr((paths, dataset.in_channels, dataset.table.tobytes()))
        path = os.path.join(self.folder, hashlib.sha256(key.encode()).hexdigest() + ".sample")
        sample = self.read(path, stamp)
        if sample is None:
            sample = dataset.decode(i)
            if not self.full:
                self.write(path, stamp, *sample)
        return sample

    def read(self, path: str, stamp: list) -> tuple[np.ndarray, np.ndarray] | None:
        """None if the file is not there yet, cut short or of a changed source."""
        try:
            data = np.memmap(path, np.uint8, mode="c")  # copied where it is written to
            header = json.loads(data[: self.HEADER].tobytes())
            kind, shape = np.dtype(header["dtype"]), header["shape"]
            end = self.HEADER + math.prod(shape) * kind.itemsize
            if (
                header["stamp"] == stamp
                and len(data) == end + shape[0] * shape[1]
                and kind.kind in "uf"
            ):
                return data[self.HEADER : end].view(np.ndarray).view(kind).reshape(shape), data[
                    end:
                ].view(np.ndarray).reshape(shape[:2])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def write(self, path: str, stamp: list, image: np.ndarray, label: np.ndarray) -> None:
        header = (
            json.dumps({"stamp": stamp, "dtype": image.dtype.str, "shape": image.shape})
            .ljust(self.HEADER)
            .encode()
        )
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                temporary = file.name
                for part in (header, np.ascontiguousarray(image), np.ascontiguousarray(label)):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError as error:
            if not self.full:
                warnings.warn(
                    f"data.cache: nothing more is kept in {self.folder} ({error}); training goes on without",
                    stacklevel=2,
                )
            self.full[0] = 1
            if temporary and os.path.exists(temporary):
                os.unlink(temporary)


# -------------------------------------------------------------------------------------------------------------- sample


def scaled_size(
    height: int, width: int, scale: tuple[int, int] | None, ratio: float = 1.0
) -> tuple[int, int]:
    """The (height, width) of an image made as large as fits into `scale` (long and short side) times `ratio`, its aspect kept."""
    factor = ratio
    if scale is not None:
        factor = min(
            int(max(scale) * ratio) / max(height, width),
            int(min(scale) * ratio) / min(height, width),
        )
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest_pixels(start: int, count: int, size: int, scaled: int) -> np.ndarray:
    """The source pixels of the scaled pixels start..start+count, as cv2.INTER_NEAREST picks them: floor(X * size / scaled)."""
    return np.arange(start, start + count) * size // scaled


def span(start: int, count: int, size: int, scaled: int) -> tuple[int, int, int]:
    """Which piece of the source to hand to a resampler so that the scaled pixels start..start+count come out: (skip, first, last).

    Scaled pixel X lies at (X + 1/2) * size / scaled - 1/2 in the source. A resampler that is given source[first:last] counts X from
    `first`, so this must be a whole source pixel where X is whole, at start - skip; the `skip` pixels too many are dropped afterwards.
    The nearest place that is right within 1/1024 of a pixel is taken, at worst the beginning: a quarter of a grey level even between
    black and white, which with the resampler's two roundings stays within one. It costs a third more pixels on either axis.
    """
    step = size / scaled
    skip = np.arange(
        min(start, math.ceil(0.5 / step - 0.5)), start + 1
    )  # not less, or the left neighbour of `first` would be missed
    first = (start - skip) * step
    best = np.argmax(np.abs(first - np.rint(first)) < 1 / 1024)
    return (
        int(skip[best]),
        int(np.rint(first[best])),
        min(size, int((start + count - 0.5) * step - 0.5) + 2),
    )


def resample(
    image: np.ndarray, scaled: tuple[int, int], box: tuple[int, int, int, int]
) -> torch.Tensor:
    """The part `box` (top, left, height, width) of `image` (H, W, C) scaled bilinearly to the size `scaled`, without scaling the rest.

    As cv2.INTER_LINEAR: pixel centres at halves, no antialiasing. Returns (C, height, width), channels last in memory, uint8 or float32.
    """
    (skip_y, y0, y1), (skip_x, x0, x1) = (
        span(*axis) for axis in zip(box[:2], box[2:], image.shape, scaled)
    )
    piece = np.ascontiguousarray(
        image[y0:y1, x0:x1], np.uint8 if image.dtype == np.uint8 else np.float32
    )
    piece = torch.from_numpy(piece)[None].permute(0, 3, 1, 2)  # (1, C, h, w)
    if scaled != image.shape[:2]:
        size = [skip_y + box[2], skip_x + box[3]]
        size = [
            out + (out == whole) for out, whole in zip(size, piece.shape[2:])
        ]  # torch copies an axis of the same size as it is
        factor = [new / old for new, old in zip(scaled, image.shape)]
        piece = torch.ops.aten.upsample_bilinear2d(piece, size, False, *factor)
    return piece[0, :, skip_y : skip_y + box[2], skip_x : skip_x + box[3]]


class TrainSamples(Dataset):
    """Places in the endless stream of training samples -> a host batch. What a worker process holds."""

    def __init__(
        self,
        dataset,
        *,
        seed: int,
        crop_size: tuple[int, int],
        scale: tuple[int, int] | None,
        ratio_range: tuple[float, float],
        cat_max_ratio: float,
        flip: float,
        photometric: bool,
    ):
        self.dataset, self.seed, self.crop_size, self.scale = dataset, seed, tuple(crop_size), scale
        self.ratio_range, self.cat_max_ratio, self.flip, self.photometric = (
            ratio_range,
            cat_max_ratio,
            flip,
            photometric,
        )
        self.epoch, self.order = -1, np.empty(0, int)

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self.epoch:
            self.epoch, self.order = (
                epoch,
                np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.dataset)),
            )
        return int(self.order[place])

    def __getitem__(self, positions: range | list[int]) -> "dict[str, torch.Tensor] | DataError":
        try:
            samples = [self.sample(position) for position in positions]
        except DataError as error:
            return error  # raised by the main process, without a worker's traceback
        (h, w), pixels = self.crop_size, samples[0][0]
        if len({pixels.dtype for pixels, _, _ in samples}) > 1:
            files = [
                f"{self.dataset.name(self.index(p))}: {str(s[0].dtype)[6:]}"
                for p, s in zip(positions, samples)
            ]
            return DataError(
                f"images of 8 bits and of more in one data set: {', '.join(files[:4])}. Convert them to one kind"
            )
        image = torch.zeros(len(samples), h, w, len(pixels), dtype=pixels.dtype).permute(
            0, 3, 1, 2
        )  # (N, C, h, w), channels last
        label = torch.full((len(samples), h, w), IGNORE, dtype=torch.uint8)
        for n, (pixels, classes, _) in enumerate(samples):
            image[n, :, : pixels.shape[1], : pixels.shape[2]] = pixels
            label[n, : classes.shape[0], : classes.shape[1]] = torch.from_numpy(classes)
        return {
            "image": image,
            "label": label,
            "valid": torch.tensor([classes.shape for _, classes, _ in samples]),
            "color": torch.tensor([color for _, _, color in samples], dtype=torch.float32),
            "position": torch.tensor(positions),
        }

    def sample(self, position: int) -> tuple[torch.Tensor, np.ndarray, list[float]]:
        """image (C, h, w) and label (h, w) of at most crop_size, and the drawn color parameters, see photometric_distortion()."""
        image, label = self.dataset.load(self.index(position))
        rng = np.random.default_rng((self.seed, SAMPLE, position))
        scaled = scaled_size(*label.shape, self.scale, rng.uniform(*self.ratio_range))
        h, w = (min(crop, whole) for crop, whole in zip(self.crop_size, scaled))
        for attempt in range(11):  # the last one is taken whatever is in it
            top, left = int(rng.integers(scaled[0] - h + 1)), int(rng.integers(scaled[1] - w + 1))
            rows, columns = (
                nearest_pixels(top, h, label.shape[0], scaled[0]),
                nearest_pixels(left, w, label.shape[1], scaled[1]),
            )
            classes = np.take(label[rows], columns, axis=1)
            if attempt == 10 or self.satisfies_cat_max_ratio(classes):
                break
        pixels = resample(image, scaled, (top, left, h, w))
        if rng.random() < self.flip:
            pixels, classes = pixels.flip(-1), np.ascontiguousarray(classes[:, ::-1])
        return pixels, classes, self.draw_color(rng)

    def satisfies_cat_max_ratio(self, classes: np.ndarray) -> bool:
        """Whether there is more than one class, and none that covers cat_max_ratio of the scored pixels."""
        if self.cat_max_ratio >= 1:
            return True
        count = torch.bincount(torch.from_numpy(classes).view(-1), minlength=256)[:IGNORE].numpy()
        return (count > 0).sum() > 1 and count.max() < self.cat_max_ratio * count.sum()

    def draw_color(self, rng: np.random.Generator) -> list[float]:
        """[brightness, contrast, saturation, hue, contrast]: each at odds of one half, the contrast at one of its two places."""
        late, use = rng.random() < 0.5, (rng.random(4) < 0.5) & self.photometric
        drawn = rng.uniform((-32, 0.5, 0.5, -18), (32, 1.5, 1.5, 18))
        brightness, contrast, saturation, hue = np.where(use, drawn, (0, 1, 1, 0)).tolist()
        return [brightness, 1.0 if late else contrast, saturation, hue, contrast if late else 1.0]


class ValSamples(Dataset):
    """Lists of indices -> a host batch of whole images of one size, with labels at their own size."""

    def __init__(self, dataset, scale: tuple[int, int] | None):
        self.dataset, self.scale = dataset, scale

    def __getitem__(self, indices: list[int]) -> "dict[str, torch.Tensor] | DataError":
        try:
            images, labels = zip(*(self.dataset.load(i) for i in indices))
        except DataError as error:
            return error
        size = scaled_size(*labels[0].shape, self.scale)
        return {
            "image": torch.stack([resample(image, size, (0, 0, *size)) for image in images]),
            "label": torch.from_numpy(np.stack(labels)),
            "index": torch.tensor(indices),
        }


# -------------------------------------------------------------------------------------------------------------- device


def photometric_distortion(image: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """MMSegmentation's PhotoMetricDistortion of a batch, without a device sync; changes `image` in place and returns it.

    image: (N, 3, h, w) float32 RGB, 0..255, clipped to it after each step.   color: (N, 5): added brightness, contrast if it comes first,
    saturation, hue in 1/180 of the circle, contrast if last. With V the largest channel, C = V - the smallest, S = C / V: scaling S is
    scaling C, and a hue p, in sixths of the circle, is the channels V - C + C * ramp(p).
    """
    brightness, before, saturation, hue, after = color[:, :, None, None].unbind(1)  # (N, 1, 1) each
    image.add_(brightness[:, None]).clamp_(0, 255).mul_(before[:, None]).clamp_(0, 255)
    red, green, blue = image.unbind(1)  # (N, h, w) each
    high, low = image.amax(1), image.amin(1)
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
    chroma.mul_(torch.minimum(saturation, scale.mul_(high)))  # S stays at most 1: C at most V
    low = high.sub_(chroma)
    torch.sub(sixth, 3, out=red).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)
    torch.sub(sixth, 2, out=green).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    torch.sub(sixth, 4, out=blue).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
    return image.mul_(after[:, None]).clamp_(0, 255)


# ---------------------------------------------------------------------------------------------------------------- data


def start_worker(number: int) -> None:
    """Workers outlive Ctrl-C and a scheduler's warning, which go to all processes: the run decides when to end."""

    def second_time(*_) -> None:  # the training process's own, when it ends by an error
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, second_time)
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)


def lost_worker(error: Exception) -> DataError | None:
    """What to say of an error that comes of a worker's death: a RuntimeError that torch raises wherever the main process is just then, or a
    connection that breaks off. None if the error is another's."""
    if not isinstance(error, (ConnectionError, EOFError)) and not str(error).startswith(
        ("DataLoader worker (pid", "DataLoader timed out")
    ):
        return None
    return DataError(
        f"a data worker has died or hangs: {error} If memory ran out (see dmesg), lower data.workers or data.batch_size; if it "
        "was shared memory, enlarge /dev/shm; or set data.workers=0"
    )


class Batches:
    """Runs `samples` over `indices`, lists of numbers, in worker processes; yields host batches in their order."""

    def __init__(self, samples: Dataset, indices, workers: int):
        self.indices, self.loader = (
            indices,
            DataLoader(
                samples,
                sampler=indices,
                batch_size=None,
                num_workers=workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=start_worker,
                prefetch_factor=4 if workers else None,
                timeout=300 if workers else 0,
                generator=torch.Generator(),
            ),
        )  # leaves torch's global random numbers alone

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            for batch in self.loader:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            raise lost_worker(error) or error from None


class Data:
    """The data of a run; the keywords, together with those of the data set, are the config's `data` section.

    type: a name in DATASETS, whose keywords follow in **dataset.   batch_size: of one iteration, over all processes.
    accumulate: in how many parts a process takes its share of the batch.   workers: loader processes of each training process (0: none).
    scale: [width, height] that an image is scaled to fit into, its aspect kept (None: its own size), times a ratio drawn from ratio_range.
    crop_size: [height, width].   cat_max_ratio: crops of which one class covers more are drawn anew, up to ten times.   flip: probability.
    photometric: color distortion, of 8-bit RGB images.   in_channels, mean, std: of the images, RGB order, in the units of the files.
    cache: a folder on a local disk where decoded samples are kept (None: every file is decoded each time).
    """

    def __init__(
        self,
        *,
        type: str,
        batch_size: int,
        crop_size: tuple[int, int],
        scale: tuple[int, int] | None = None,
        workers: int = 4,
        accumulate: int = 1,
        ratio_range: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        in_channels: int = 3,
        mean: list[float] = IMAGENET_MEAN,
        std: list[float] = IMAGENET_STD,
        cache: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        seed: int = 0,
        **dataset,
    ):
        self.type, self.batch_size, self.accumulate, self.workers, self.cache = (
            type,
            batch_size,
            accumulate,
            workers,
            cache,
        )
        dataset |= {"root": os.path.expanduser(dataset["root"])} if "root" in dataset else {}
        self.in_channels, self.train_split, self.val_split, self.keywords = (
            in_channels,
            train_split,
            val_split,
            dataset,
        )
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std)
        )  # (C, 1, 1)
        self.sampling = {
            "seed": seed,
            "crop_size": tuple(crop_size),
            "scale": scale,
            "ratio_range": tuple(ratio_range),
            "cat_max_ratio": cat_max_ratio,
            "flip": flip,
            "photometric": photometric,
        }
        if type not in DATASETS:
            raise DataError(f"data.type: {type} is none of {', '.join(DATASETS)}")
        if not len(mean) == len(std) == in_channels or not all(value > 0 for value in std):
            raise DataError(
                f"data: in_channels is {in_channels}: mean {list(mean)} and std {list(std)} need as many values, std above 0"
            )
        if in_channels != 3:
            if type != "folder":
                raise DataError(f"data.in_channels: the images of {type} have 3 channels")
            self.keywords = {**dataset, "in_channels": in_channels}
        least = {
            "crop_size": min(crop_size),
            "batch_size": batch_size,
            "accumulate": accumulate,
            "scale": min(scale or [1]),
        }
        for name, number in least.items():
            if number < 1:
                raise DataError(f"data.{name}: {number} where 1 or more is needed")
        if workers < 0 or not 0 < ratio_range[0] <= ratio_range[1] < math.inf:
            raise DataError(
                f"data: workers ({workers}) must be 0 or more, and ratio_range {list(ratio_range)} rise from above 0"
            )

    def to(self, device: torch.device) -> "Data":
        """Keeps mean and std on `device`: to copy them at every step would make the host wait for the device."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def split(self, name: str):
        dataset = DATASETS[self.type](name, **self.keywords)
        if self.cache and isinstance(dataset, Folder):
            dataset.cache = Cache(self.cache)
        return dataset

    @functools.cached_property
    def train(self):
        return self.split(self.train_split)

    @functools.cached_property
    def val(self):
        return self.split(self.val_split)

    @functools.cached_property
    def val_sizes(self) -> list[tuple[int, int]]:
        return [self.val.size(i) for i in range(len(self.val))]

    @functools.cached_property
    def samples(self) -> TrainSamples:
        return TrainSamples(self.train, **self.sampling)

    @functools.cached_property
    def about(self):
        """Either split, for what they have in common: to evaluate, the training images need not be there."""
        try:
            return self.train
        except DataError:
            return self.val

    @property
    def classes(self) -> list[str]:
        return self.about.classes

    @property
    def palette(self) -> list[list[int]]:
        return self.about.palette

    def train_batches(
        self, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of `rank` from iteration `start` on, `accumulate` of them an iteration, without end.

        A batch of n = batch_size / (world_size * accumulate) samples: image (n, C, h, w) uint8 or float32, channels last; label (n, h, w) uint8,
        padded with 255; valid (n, 2): height and width without padding; color (n, 5), see photometric_distortion(); position (n,), places in the stream.
        """
        share, rest = divmod(self.batch_size, world_size * self.accumulate)
        if rest:
            near = [n * world_size * self.accumulate for n in (share, share + 1) if n]
            raise DataError(
                f"data.batch_size: {self.batch_size} samples cannot be dealt out evenly to {world_size} processes, in "
                f"{self.accumulate} parts each (data.accumulate). The nearest that can: {' or '.join(map(str, near))}"
            )
        steps = (
            range(first, first + share)
            for first in itertools.count(
                (start * self.accumulate * world_size + rank) * share, world_size * share
            )
        )
        return iter(Batches(self.samples, steps, self.workers))

    def val_batches(
        self,
        rank: int = 0,
        world_size: int = 1,
        scale: tuple[int, int] | None = None,
        batch_size: int = 1,
    ) -> Batches:
        """Each image of the validation split once over all ranks; those of one size share a batch.

        A batch: image (n, C, h, w), scaled to fit into `scale` if given; label (n, H, W) uint8 at its own size; index (n,) in the split.
        """
        groups = {}
        for i in range(len(self.val))[rank::world_size]:
            groups.setdefault(self.val_sizes[i] if batch_size > 1 else i, []).append(i)
        batches = [
            group[k : k + batch_size]
            for group in groups.values()
            for k in range(0, len(group), batch_size)
        ]
        return Batches(ValSamples(self.val, scale), batches, min(self.workers, len(batches)))

    def prepare(
        self, batch: dict[str, torch.Tensor], device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A host batch -> image (n, C, h, w) float32, normalized, channels last, and label (n, H, W) uint8, both on `device`."""
        host = batch["image"]
        distorted = (
            "color" in batch
            and self.sampling["photometric"]
            and host.dtype == torch.uint8
            and host.shape[1] == 3
        )
        layout = (
            torch.contiguous_format if distorted else torch.preserve_format
        )  # photometric_distortion() works plane by plane
        image = host.to(device, non_blocking=True).to(
            torch.float32, memory_format=layout, copy=True
        )
        if distorted:
            image = photometric_distortion(image, batch["color"].to(device, non_blocking=True))
        image = image.sub_(self.mean).div_(self.std)
        if "valid" in batch and bool(
            (batch["valid"] != torch.tensor(host.shape[2:])).any()
        ):  # known on the host: no sync
            height, width = (
                batch["valid"].to(device, non_blocking=True)[:, :, None, None].unbind(1)
            )  # (n, 1, 1) each
            y, x = (torch.arange(size, device=device) for size in host.shape[2:])
            image = image.masked_fill_(((y[:, None] >= height) | (x >= width))[:, None], 0)
        return image.contiguous(memory_format=torch.channels_last), batch["label"].to(
            device, non_blocking=True
        )

    def sample_files(self, positions: list[int]) -> list[str]:
        """The image files behind places in the stream of training samples."""
        return [self.train.name(self.samples.index(int(position))) for position in positions]

    def check(self, train: bool = True, val: bool = True, count: int = 8) -> None:
        """Decodes `count` samples spread over each split. Raises DataError for the first that is wrong, or if crops would be padding."""
        crop, filled = self.sampling["crop_size"], {}
        for split in ["train"] * train + ["val"] * val:
            dataset, values = getattr(self, split), np.zeros(256, int)
            for i in (
                np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()
            ):
                _, label = dataset.load(i)
                values += np.bincount(label.ravel(), minlength=256)
                if split == "train":  # the others are not cropped
                    size = scaled_size(
                        *label.shape, self.sampling["scale"], self.sampling["ratio_range"][1]
                    )
                    filled[size] = min(size[0], crop[0]) * min(size[1], crop[1])
            if looks_like_mask(values, dataset):
                warnings.warn(f"{dataset.name(0)} and others: {MASK}", stacklevel=2)
        if filled and max(filled.values()) < crop[0] * crop[1] / 4:
            raise DataError(
                f"data.crop_size: {list(crop)} is more than four times what an image fills even at the largest ratio "
                f"{list(max(filled, key=filled.get))}; the net would see little but padding. Lower it, or raise data.scale or data.ratio_range"
            )


# ----------------------------------------------------------------------------------------------------------- preflight

MASK = (
    "the labels hold 0 and 255 alone, and 255 is not scored. If they are black and white masks, set data.values=[0, 255]; otherwise "
    "one of the two classes never occurs"
)


def looks_like_mask(count: np.ndarray, dataset) -> bool:
    return len(dataset.classes) == 2 and np.flatnonzero(count).tolist() == [0, IGNORE]


class Labels(Dataset):
    """Lists of n numbers of samples -> the pixels of each value 0..255 in their labels (n, 256), and what is wrong with each, or ""."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, numbers) -> tuple[np.ndarray, list[str]]:
        count, problems = zip(*map(self.inspect, numbers))
        return np.stack(count), list(problems)

    def inspect(self, i: int) -> tuple[np.ndarray, str]:
        try:
            return np.bincount(self.dataset.load(i)[1].ravel(), minlength=256), ""
        except DataError as error:
            return np.zeros(256, int), str(error)


def preflight(dataset, processes: int) -> list[str]:
    """Decodes every sample, prints class frequencies, suggested class weights and labels without a class; returns what is wrong."""
    parts, found = [range(k, min(k + 16, len(dataset))) for k in range(0, len(dataset), 16)], []
    count = np.zeros((len(dataset), 256), int)
    for part, (rows, problems) in zip(
        parts,
        tqdm(
            Batches(Labels(dataset), parts, min(processes, len(parts))),
            "look at every file",
            leave=False,
        ),
    ):
        count[part.start : part.stop] = (
            rows  # copied, as what comes from a worker keeps a file open
        )
        found += problems
    classes = count[:, : len(dataset.classes)]
    total, images = classes.sum(0), (classes > 0).sum(0)
    # median frequency balancing (Eigen and Fergus, 2015): frequency in the images where a class occurs at all
    frequency = total / np.maximum((classes.sum(1, keepdims=True) * (classes > 0)).sum(0), 1)
    weight = (
        np.where(total > 0, np.median(frequency[total > 0]) / np.maximum(frequency, 1e-12), 0)
        if total.any()
        else total
    )
    print(
        f"{len(dataset)} samples, {count[:, IGNORE].sum() / max(count.sum(), 1):.1%} of the pixels not scored"
    )
    print(f"{'class':24s}{'pixels':>9s}{'images':>9s}{'weight':>9s}")
    for name, part, number, factor in zip(
        dataset.classes, (total / max(total.sum(), 1)).tolist(), images.tolist(), weight.tolist()
    ):
        print(f"{name:24s}{part:9.3%}{number:9d}{factor:9.2f}" + "   never occurs" * (number == 0))
    print("suggested class_weight:", [round(float(w), 2) for w in weight.clip(0, 10)])
    empty = [
        dataset.name(i)
        for i, (row, problem) in enumerate(zip(classes, found))
        if not row.any() and not problem
    ]
    if empty:
        print(f"{len(empty)} labels in which nothing is scored, such as that of {empty[0]}")
    return [*filter(None, found)] + [f"{dataset.name(0)} and all others: {MASK}"] * looks_like_mask(
        count.sum(0), dataset
    )


def contact_sheet(data: Data, path: str, count: int = 12) -> None:
    """A PNG of the first `count` training samples as the net will see them, below each its label drawn over it, and the colors."""
    batch = data.samples[range(count)]
    if isinstance(batch, DataError):
        raise batch
    image, label = data.prepare(batch, "cpu")
    image = (
        (image * data.std + data.mean)
        .permute(0, 2, 3, 1)[..., [0, 1, 2] if data.in_channels >= 3 else [0, 0, 0]]
        .numpy()
    )
    image *= 255 / max(255, image.max())  # (N, h, w, 3), 16 bits scaled to 8
    drawn = np.array(data.palette + [[0, 0, 0]] * (256 - len(data.palette)), np.uint8)[
        label.numpy()
    ]
    over = np.where((label == IGNORE).numpy()[..., None], image / 3, image / 2 + drawn / 2)
    tiles = [np.concatenate(pair) for pair in zip(image, over)]
    rows = [np.concatenate(tiles[k : k + 4], 1) for k in range(0, count, 4)]
    sheet = Image.fromarray(np.concatenate(rows).clip(0, 255).astype(np.uint8))
    sheet.thumbnail((2400, 2400))
    legend = Image.new(
        "RGB", (sheet.width, sheet.height + 16 * -(-len(data.classes) // 6)), "white"
    )
    legend.paste(sheet)
    draw = ImageDraw.Draw(legend)
    for c, (name, color) in enumerate(zip(data.classes, data.palette)):
        x, y = c % 6 * sheet.width // 6, sheet.height + c // 6 * 16
        draw.rectangle((x + 2, y + 2, x + 14, y + 14), fill=tuple(color))
        draw.text((x + 18, y + 2), name, fill="black")
    try:
        legend.save(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: the contact sheet cannot be written ({error}). Name a .png in a folder that can, by --sheet"
        ) from None


def main(argv: list[str] | None = None) -> int:
    import train  # which imports this module

    parser = argparse.ArgumentParser(
        description="Looks at every file of a data set, and draws a contact sheet of what the net will see."
    )
    parser.add_argument("--config", required=True, help="a config of train.py")
    parser.add_argument(
        "--options", nargs="*", default=[], help="override it: data.root=/path/to/images"
    )
    parser.add_argument(
        "--sheet",
        default="contact_sheet.png",
        help="where to write the contact sheet (default: %(default)s)",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    try:
        config = train.load_config(args.config, args.options)
        data, problems = Data(**config["data"], seed=config["seed"]), []
        for split in ("train", "val"):
            print(f"--- {split}")
            problems += preflight(getattr(data, split), args.processes)
        print(f"{len(problems)} samples are wrong", *problems[:20], sep="\n- ")
        if not problems:
            data.check()
            contact_sheet(data, args.sheet)
            print("contact sheet:", args.sheet)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return bool(problems)


if __name__ == "__main__":
    import data  # the module that train imports too, not a second __main__

    sys.exit(data.main())
