"""data.py: samples, color, order, errors, cache, data sets, validation, preflight."""

import colorsys
import functools
import json
import math
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Data, DataError, Folder, Synthetic

ROOT = Path(__file__).resolve().parent.parent


def scene(rng, height, width, classes=4):
    """A noisy image with hard edges, and a blocky label."""
    blocks = rng.integers(0, classes, (height // 8 + 1, width // 8 + 1)).astype(np.uint8)
    label = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    image = np.array([[0, 0, 0], [255, 255, 255], [200, 30, 60], [20, 180, 240]])[
        label % 4
    ] + rng.integers(-40, 40, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), label


@pytest.fixture
def folder(tmp_path):
    """Six training and five validation pairs of two sizes; returns the keywords of Data."""
    rng = np.random.default_rng(0)
    for split, count in ("train", 6), ("val", 5):
        for i in range(count):
            image, label = scene(rng, *((60, 90), (72, 64))[i % 2])
            for kind, array in ("images", image), ("labels", label):
                path = tmp_path / "set" / kind / split / f"sub{i % 2}" / f"{i:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return {
        "type": "folder",
        "root": str(tmp_path / "set"),
        "classes": ["a", "b", "c", "d"],
        "batch_size": 4,
        "crop_size": [48, 56],
        "scale": [96, 64],
        "workers": 0,
    }


def take(batches, count):
    return [batch for batch, _ in zip(batches, range(count))]


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# ------------------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_crop_equals_scaling_the_whole_and_cropping(kind):
    """Within one grey level, for noise with hard edges, at any size and place; the label to the last pixel."""
    rng = np.random.default_rng(1)
    for case in range(60):
        height, width = rng.integers(5, 400, 2).tolist()
        image, label = scene(rng, height, width)
        image = image.astype(kind)
        scaled = data.scaled_size(
            height, width, None, rng.uniform(0.3, 3) if case % 4 else (0.5, 1, 2)[case % 3]
        )
        h, w = (int(rng.integers(1, min(whole, 300) + 1)) for whole in scaled)
        top, left = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(scaled, (h, w)))
        whole = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
        expected = torch.nn.functional.interpolate(whole[None], scaled, mode="bilinear")[
            0, :, top : top + h, left : left + w
        ]
        found = data.resample(image, scaled, (top, left, h, w))
        assert found.shape == expected.shape and found.dtype == (
            torch.uint8 if kind is np.uint8 else torch.float32
        )
        expected = expected.round() if kind is np.uint8 else expected
        assert (found.float() - expected).abs().max() <= 1, (height, width, scaled, top, left, h, w)
        rows, columns = (
            data.nearest_pixels(top, h, height, scaled[0]),
            data.nearest_pixels(left, w, width, scaled[1]),
        )
        exact = [
            [y * height // scaled[0] for y in range(top, top + h)],
            [x * width // scaled[1] for x in range(left, left + w)],
        ]
        assert np.array_equal(label[rows][:, columns], label[np.ix_(*exact)])


def test_the_phase_of_a_crop_is_exact_enough():
    """span() begins where source and scaled pixels meet, within 1/1024 of a pixel, whatever the ratio."""
    rng = np.random.default_rng(2)
    for _ in range(2000):
        size, scaled = rng.integers(1, 3000, 2).tolist()
        start = int(rng.integers(0, scaled))
        count = int(rng.integers(1, scaled - start + 1))
        skip, first, last = data.span(start, count, size, scaled)
        assert 0 <= first < last <= size and 0 <= skip <= start
        assert abs((start - skip) * size / scaled - first) < 1 / 1024
        assert first == 0 or (skip + 0.5) * size / scaled - 0.5 > -1 / 128


def test_scaled_size_is_that_of_mmcv():
    assert data.scaled_size(1024, 2048, (2048, 1024), 0.7) == (
        716,
        1432,
    )  # int(1024 * 0.7) = 716 limits: 716.8 is cut first
    assert data.scaled_size(375, 500, (2048, 512), 1.3) == (665, 887)
    assert data.scaled_size(360, 480, (480, 360)) == (360, 480)
    assert data.scaled_size(3, 1000, (10, 10)) == (1, 10)


def test_crops_are_retried_until_they_are_varied():
    """A label with one rare corner: crops without it are drawn anew, up to ten times, and the last is taken."""

    class Corner:
        def __len__(self):
            return 1

        def load(self, i):
            label = np.zeros((100, 100), np.uint8)
            label[:, :40] = 1
            return np.zeros((100, 100, 3), np.uint8), label

    def labels(cat_max_ratio):
        samples = data.TrainSamples(
            Corner(),
            seed=0,
            crop_size=(20, 20),
            scale=None,
            ratio_range=(1, 1),
            cat_max_ratio=cat_max_ratio,
            flip=0.5,
            photometric=True,
        )
        return [samples.sample(p)[1] for p in range(200)]

    def satisfies_cat_max_ratio(label):
        return 0.25 < (label == 1).mean() < 0.75

    assert (
        np.mean([satisfies_cat_max_ratio(label) for label in labels(0.75)]) > 0.6
        and np.mean([satisfies_cat_max_ratio(label) for label in labels(1.0)]) < 0.2
    )
    assert all(
        label.shape == (20, 20) for label in labels(0.01)
    )  # nothing passes, the last is taken


def test_a_batch_is_padded_right_and_below(folder):
    source = Data(**folder | {"crop_size": [80, 120], "ratio_range": [0.5, 0.6]})
    batch = next(source.train_batches())
    image, label = source.prepare(batch, "cpu")
    assert (
        image.dtype == torch.float32
        and image.is_contiguous(memory_format=torch.channels_last)
        and image.shape == (4, 3, 80, 120)
    )
    for n, (h, w) in enumerate(batch["valid"].tolist()):
        assert (
            h < 80
            and w < 120
            and (label[n, :h, :w] < 4).all()
            and (label[n, h:] == 255).all()
            and (label[n, :, w:] == 255).all()
        )
        assert (
            image[n, :, h:].abs().max() == 0
            and image[n, :, :, w:].abs().max() == 0
            and image[n, :, :h, :w].abs().min(0)[0].max() > 0
        )


def test_flip_turns_image_and_label_together(folder):
    plain, turned = (
        next(Data(**folder, flip=flip, photometric=False).train_batches()) for flip in (0.0, 1.0)
    )
    for n, (h, w) in enumerate(plain["valid"].tolist()):
        assert torch.equal(plain["image"][n, :, :h, :w], turned["image"][n, :, :h, :w].flip(-1))
        assert torch.equal(plain["label"][n, :h, :w], turned["label"][n, :h, :w].flip(-1))


# ------------------------------------------------------------------------------------------------------------- color


def reference_color(pixel, brightness, before, saturation, hue, after):
    """One pixel through MMSegmentation's steps, by colorsys."""

    def clip(values):
        return [min(max(v, 0.0), 255.0) for v in values]

    pixel = clip(v * before for v in clip(v + brightness for v in pixel))
    h, s, v = colorsys.rgb_to_hsv(*(v / 255 for v in pixel))
    pixel = [255 * v for v in colorsys.hsv_to_rgb((h + hue / 180) % 1, min(s * saturation, 1), v)]
    return clip(v * after for v in pixel)


def test_color_agrees_with_a_pixel_by_pixel_reference():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 3, 9, 11)).astype(np.float32)
    image[:, :, 0] = image[:, :1, 0]  # greys, black and white among them
    image[:, :, 1, :3] = np.array([0, 255, 128])
    samples = Data(type="synthetic", batch_size=1, crop_size=[8, 8]).samples
    color = torch.tensor([samples.draw_color(rng) for _ in range(8)])
    found = data.photometric_distortion(torch.from_numpy(image.copy()), color)
    for n, y, x in np.ndindex(8, 9, 11):
        expected = reference_color(image[n, :, y, x].tolist(), *color[n].tolist())
        assert np.abs(found[n, :, y, x].numpy() - expected).max() < 0.1


def test_color_draws_have_the_right_odds_and_ranges():
    samples = Data(type="synthetic", batch_size=1, crop_size=[8, 8]).samples
    drawn = np.array([samples.draw_color(np.random.default_rng(i)) for i in range(4000)])
    neutral = np.array([0, 1, 1, 0, 1])
    assert np.allclose((drawn != neutral).mean(0), [0.5, 0.25, 0.5, 0.5, 0.25], atol=0.03)
    assert not ((drawn[:, 1] != 1) & (drawn[:, 4] != 1)).any()
    assert (drawn.min(0) > [-32, 0.5, 0.5, -18, 0.5]).all() and (
        drawn.max(0) < [32, 1.5, 1.5, 18, 1.5]
    ).all()
    assert (drawn.min(0) < [-31, 0.52, 0.52, -17, 0.52]).all() and (
        drawn.max(0) > [31, 1.48, 1.48, 17, 1.48]
    ).all()


def test_normalization_of_undistorted_batches_is_exact(folder):
    source = Data(**folder, photometric=False)
    batch = next(source.train_batches())
    image, _ = source.prepare(batch, "cpu")
    expected = (
        batch["image"].double() - torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)
    ) / torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    h, w = batch["valid"][0].tolist()
    assert torch.allclose(image[0, :, :h, :w].double(), expected[0, :, :h, :w], atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- order


def test_samples_do_not_depend_on_workers_processes_parts_or_start(folder):
    whole = take(Data(**folder | {"batch_size": 8}, seed=3).train_batches(), 3)
    assert len({int(p) for batch in whole for p in batch["position"]}) == 24
    for workers, world_size, accumulate, start in (
        (2, 1, 1, 0),
        (0, 2, 1, 1),
        (1, 2, 2, 2),
        (0, 8, 1, 0),
        (0, 1, 4, 1),
    ):
        source = Data(
            **folder | {"batch_size": 8, "workers": workers, "accumulate": accumulate}, seed=3
        )
        parts = [
            take(source.train_batches(rank, world_size, start), (3 - start) * accumulate)
            for rank in range(world_size)
        ]
        for step in range(start, 3):
            mine = [
                part[(step - start) * accumulate + m] for m in range(accumulate) for part in parts
            ]
            joined = {key: torch.cat([batch[key] for batch in mine]) for key in whole[0]}
            same(joined, whole[step])


def test_every_epoch_has_each_image_once_in_another_order(folder):
    source = Data(**folder | {"batch_size": 6})
    epochs = [source.sample_files(batch["position"]) for batch in take(source.train_batches(), 4)]
    assert all(sorted(epoch) == [source.train.name(i) for i in range(6)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert Data(**folder, seed=1).sample_files(range(6)) != epochs[0]


def test_a_late_start_costs_what_an_early_one_costs(folder):
    source = Data(**folder)
    began = time.perf_counter()
    next(source.train_batches(start=10**9))
    assert time.perf_counter() - began < 2


def test_torch_and_numpy_random_numbers_are_left_alone(folder):
    torch.manual_seed(0), np.random.seed(0)
    expected = torch.rand(2), np.random.rand()
    torch.manual_seed(0), np.random.seed(0)
    take(Data(**folder | {"workers": 1}).train_batches(), 2)
    assert torch.equal(torch.rand(2), expected[0]) and np.random.rand() == expected[1]


def test_what_a_worker_holds_can_be_pickled(folder, tmp_path):
    """As start methods other than fork need it."""
    source = Data(**folder, cache=str(tmp_path / "cache"))
    same(pickle.loads(pickle.dumps(source.samples))[range(4)], source.samples[range(4)])


# ------------------------------------------------------------------------------------------------------------- errors


def complaint(run):
    with pytest.raises(DataError) as error:
        run()
    return str(error.value)


def edit(folder, kind, array, name="sub0/00.png"):
    path = Path(folder["root"], kind, "train", name)
    Image.fromarray(array).save(path)
    return str(path)


def test_missing_folder(folder):
    text = complaint(lambda: Data(**folder | {"root": "/nowhere"}).train)
    assert "/nowhere/images/train" in text and "data.root" in text


def test_image_without_label(folder):
    os.rename(
        Path(folder["root"], "labels/train/sub0/00.png"),
        Path(folder["root"], "labels/train/sub0/00_mask.png"),
    )
    text = complaint(lambda: Data(**folder).train)
    assert (
        "1 of 6 images have no label" in text
        and "sub0/00.png" in text
        and "00_mask.png" in text
        and "data.label_suffix" in text
    )


def test_label_without_image_is_a_warning(folder):
    os.remove(Path(folder["root"], "images/train/sub0/00.png"))
    with pytest.warns(UserWarning, match="1 labels have no image.*sub0/00.png"):
        assert len(Data(**folder).train) == 5


def test_sizes_that_differ(folder):
    path = edit(folder, "labels", np.zeros((90, 60), np.uint8))
    text = complaint(lambda: next(Data(**folder).train_batches()) and Data(**folder).check())
    assert path in text and "90x60" in text and "60x90" in text


@pytest.mark.parametrize(
    ("value", "hint"), [(7, "data.classes"), (4, "data.ignore_index=4"), (254, "data.classes")]
)
def test_label_value_outside_the_classes(folder, value, hint):
    label = np.zeros((60, 90), np.uint8)
    label[0, 0] = value
    path = edit(folder, "labels", label)
    text = complaint(lambda: Data(**folder).train.load(0))
    assert path in text and f"value {value} " in text and "0..3" in text and hint in text


def test_16_bit_label_outside_the_classes(folder):
    edit(folder, "labels", np.full((60, 90), 256, np.uint16))  # not 0 by wrapping around
    assert "value 256 " in complaint(lambda: Data(**folder).train.load(0))


def test_black_and_white_masks_are_noticed(folder, capsys):
    """255 is not scored, so that such a mask would train on one class alone."""
    for i in range(6):
        shape = ((60, 90), (72, 64))[i % 2]
        edit(
            folder,
            "labels",
            np.tile(np.array([[0, 255]], np.uint8), (shape[0], shape[1] // 2)),
            f"sub{i % 2}/{i:02d}.png",
        )
    two = folder | {"classes": ["no", "yes"]}
    with pytest.warns(UserWarning, match=r"data.values=\[0, 255\]"):
        Data(**two).check(val=False)
    assert [
        r"data.values=[0, 255]" in problem for problem in data.preflight(Data(**two).train, 1)
    ] == [True]
    right = Data(**two, values=[0, 255])
    right.check(val=False)
    assert (
        np.unique(right.train.load(0)[1]).tolist() == [0, 1]
        and data.preflight(right.train, 1) == []
    )
    edit(
        folder, "labels", np.tile(np.array([[0, 7, 255]], np.uint8), (60, 30))
    )  # what JPEG or scaling makes of one
    assert "never a JPEG" in complaint(lambda: right.train.load(0))


def test_black_and_white_bits_and_wide_integers_are_labels_too(folder):
    path = Path(
        edit(folder, "labels", np.tile(np.array([[False, True]]), (60, 45)))
    )  # a PNG of one bit
    assert np.unique(Data(**folder).train.load(0)[1]).tolist() == [0, 1]
    path.unlink()
    np.save(path.with_suffix(".npy"), np.full((60, 90), 3, np.int64))
    assert np.unique(Data(**folder).train.load(0)[1]).tolist() == [3]
    np.save(path.with_suffix(".npy"), np.full((60, 90), -1))
    assert "value -1 " in complaint(lambda: Data(**folder).train.load(0))


def test_color_picture_as_label(folder):
    path = edit(folder, "labels", np.zeros((60, 90, 3), np.uint8))
    text = complaint(lambda: Data(**folder).train.load(0))
    assert path in text and "palette" in text and "grey PNG" in text


def test_truncated_and_empty_images_are_named_by_workers_too(folder):
    path = Path(folder["root"], "images/train/sub0/00.png")
    whole = path.read_bytes()
    for content in whole[: len(whole) // 2], b"", b"\0" * 100:
        path.write_bytes(content)
        for workers in (0, 1):
            batches = Data(**folder | {"workers": workers}).train_batches()
            text = complaint(functools.partial(take, batches, 3))
            assert str(path) in text and "cannot be decoded" in text and "Traceback" not in text


def test_image_bomb_is_refused(folder):
    """A file of a hundred bytes that says it is 60,000 pixels wide and high."""
    path = Path(folder["root"], "images/train/sub0/00.png")
    content = bytearray(path.read_bytes())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    assert str(path) in complaint(lambda: Data(**folder).train.load(0))


def test_pickled_npy_is_refused(folder):
    path = Path(folder["root"], "images/train/sub0/00.png")
    path.unlink()
    np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "allow_pickle" in complaint(lambda: Data(**folder).train.load(0))


def test_numbers_that_cannot_be(folder):
    for wrong in {"crop_size": [0, 8]}, {"batch_size": 0}, {"accumulate": 0}, {"scale": [0, 5]}:
        assert f"data.{next(iter(wrong))}" in complaint(functools.partial(Data, **folder | wrong))
    assert "workers (-1)" in complaint(lambda: Data(**folder | {"workers": -1}))
    assert "ratio_range" in complaint(lambda: Data(**folder | {"ratio_range": [2, 1]}))
    assert "std" in complaint(lambda: Data(**folder | {"std": [1, 1, 0]}))
    assert "mean" in complaint(lambda: Data(**folder | {"in_channels": 4}))
    assert "none of" in complaint(lambda: Data(**folder | {"type": "citiscapes"}))
    assert "253" in complaint(lambda: Data(**folder | {"classes": ["c"] * 300}).train)
    assert "colors" in complaint(lambda: Data(**folder, palette=[[0, 0, 0]]).train)
    assert "0..255" in complaint(lambda: Data(**folder, ignore_index=-1).train)


def test_batch_that_cannot_be_dealt_out(folder):
    text = complaint(
        lambda: Data(**folder | {"batch_size": 10, "accumulate": 2}).train_batches(0, 4)
    )
    assert "8 or 16" in text and "4 processes" in text
    assert complaint(lambda: Data(**folder | {"batch_size": 2}).train_batches(0, 4)).endswith(": 4")


def test_crop_that_padding_cannot_serve(folder):
    assert "data.crop_size" in complaint(
        lambda: Data(**folder | {"crop_size": [2000, 2000]}).check()
    )
    Data(**folder).check()


def test_file_list(folder):
    lines = Path(folder["root"], "list.txt")
    pair = "images/train/sub1/01.png labels/train/sub1/01.png"
    lines.write_text(f"sub0/02\n\n{pair}\nsub0/00\n")
    listed = Data(**folder, files="list.txt").train
    assert [os.path.basename(listed.name(i)) for i in range(3)] == [
        "00.png",
        "02.png",
        "01.png",
    ] and len(listed) == 3
    for line, reason in {
        "../../etc/passwd labels/train/sub1/01.png": "outside data.root",
        "/etc/passwd /etc/passwd": "outside data.root",
        "images/gone.png labels/train/sub1/01.png": "there is no file",
        "sub0/77": "no image named sub0/77",
    }.items():
        lines.write_text(f"sub0/00\n{line}\n")
        text = complaint(lambda: Data(**folder, files="list.txt").train)
        assert reason in text and "line 2" in text
    assert "there is no such file" in complaint(lambda: Data(**folder, files="gone.txt").train)


def test_killed_worker_is_an_error_that_says_so(folder):
    """The error comes wherever the main process is just then; in a process of its own here."""
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
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and (
        "a data worker has died" in done.stderr
        or "worker (pid" in done.stderr
        and "killed" in done.stderr
    )


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cached(folder, tmp_path):
    return folder | {"cache": str(tmp_path / "cache")}


def test_cache_gives_the_same_samples(folder, cached):
    plain = take(Data(**folder).train_batches(), 3)
    for _ in range(2):  # while it is filled, and from the files
        for one, other in zip(plain, take(Data(**cached).train_batches(), 3)):
            same(one, other)
    assert len(os.listdir(cached["cache"])) == 6
    assert all(
        name.endswith(".sample") and os.sep not in name for name in os.listdir(cached["cache"])
    )


def test_cache_notices_a_changed_source(cached):
    before = Data(**cached).train.load(0)[0]
    edit(cached, "images", 255 - np.asarray(before))
    assert np.array_equal(Data(**cached).train.load(0)[0], 255 - np.asarray(before))
    assert len(os.listdir(cached["cache"])) == 1
    ignoring = Data(**cached, ignore_index=1).train.load(0)[
        1
    ]  # another meaning of the same label is another sample
    assert 1 not in ignoring and 1 in Data(**cached).train.load(0)[1]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: bytes(len(c)), lambda c: c + b"x"],
)
def test_damaged_cache_file_is_written_anew(cached, damage):
    expected = [np.array(part) for part in Data(**cached).train.load(0)]
    path = Path(cached["cache"], os.listdir(cached["cache"])[0])
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    for found, part in zip(Data(**cached).train.load(0), expected):
        assert np.array_equal(found, part)
    assert path.read_bytes() == whole


def fill(keywords):
    source = Data(**keywords)
    return [int(source.train.load(i)[0].astype(int).sum()) for i in range(6) for _ in range(3)]


def test_cache_is_filled_by_many_processes_at_once(cached):
    with multiprocessing.Pool(4) as pool:
        sums = pool.map(fill, [cached] * 8)
    assert all(s == sums[0] for s in sums) and len(os.listdir(cached["cache"])) == 6


def test_full_disk_is_one_warning_and_the_run_goes_on(folder, cached):
    """A limit on the size of files stands for the disk: the write ends short with an error."""
    plain = take(Data(**folder).train_batches(), 2)
    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    source = Data(**cached)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = take(source.train_batches(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [str(w.message) for w in caught if "data.cache" in str(w.message)].__len__() == 1
    for one, other in zip(plain, found):
        same(one, other)
    assert os.listdir(cached["cache"]) == []


def test_cache_clears_up_after_killed_processes(cached):
    os.makedirs(cached["cache"])
    old, new = Path(cached["cache"], "old.tmp"), Path(cached["cache"], "new.tmp")
    old.touch(), new.touch()
    os.utime(old, (0, 0))
    Data(**cached).train.load(0)
    assert not old.exists() and new.exists()


def test_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    assert "data.cache" in complaint(
        lambda: Data(**folder, cache=str(tmp_path / "file" / "cache")).train
    )


# ---------------------------------------------------------------------------------------------------------- data sets


def lay_out(root, pairs, value):
    """Writes a 12x10 image and a label full of `value` for each pair of paths."""
    for image, label in pairs:
        for path, array in (
            (image, np.full((10, 12, 3), 90, np.uint8)),
            (label, np.full((10, 12), value, np.uint8)),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / path)


LAYOUTS = {  # type: (training pairs, value in the file, the class it means, number of classes, lists)
    "cityscapes": (
        [
            (
                "leftImg8bit/{s}/ulm/ulm_000_019_leftImg8bit.png",
                "gtFine/{s}/ulm/ulm_000_019_gtFine_labelTrainIds.png",
            )
        ],
        ("train", "val"),
        18,
        18,
        19,
        {},
    ),
    "ade20k": (
        [("images/{s}/ADE_1.jpg", "annotations/{s}/ADE_1.png")],
        ("training", "validation"),
        150,
        149,
        150,
        {},
    ),
    "voc": (
        [("JPEGImages/{s}_1.jpg", "SegmentationClass/{s}_1.png")],
        ("train", "val"),
        20,
        20,
        21,
        {"ImageSets/Segmentation/{s}.txt": "{s}_1\n"},
    ),
    "pascal_context": (
        [("JPEGImages/{s}_1.jpg", "SegmentationClassContext/{s}_1.png")],
        ("train", "val"),
        59,
        59,
        60,
        {"ImageSets/SegmentationContext/{s}.txt": "{s}_1\n"},
    ),
    "pascal_context_59": (
        [("JPEGImages/{s}_1.jpg", "SegmentationClassContext/{s}_1.png")],
        ("train", "val"),
        59,
        58,
        59,
        {"ImageSets/SegmentationContext/{s}.txt": "{s}_1\n"},
    ),
    "coco_stuff": (
        [("images/{s}2017/01.jpg", "annotations/{s}2017/01_labelTrainIds.png")],
        ("train", "val"),
        170,
        170,
        171,
        {},
    ),
    "camvid": ([("images/{s}/01.png", "labels/{s}/01.png")], ("train", "val"), 10, 10, 11, {}),
    "oxford_pet": (
        [
            (
                "oxford-iiit-pet/images/Abyssinian_{s}.jpg",
                "oxford-iiit-pet/annotations/trimaps/Abyssinian_{s}.png",
            )
        ],
        ("trainval", "test"),
        3,
        2,
        3,
        {"oxford-iiit-pet/annotations/{s}.txt": "Abyssinian_{s} 1 1 1\n"},
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_official_layouts(kind, tmp_path):
    pairs, splits, value, meant, classes, lists = LAYOUTS[kind]
    for split in splits:
        lay_out(
            tmp_path,
            [(image.format(s=split), label.format(s=split)) for image, label in pairs],
            value,
        )
        for path, content in lists.items():
            (tmp_path / path.format(s=split)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.format(s=split)).write_text(content.format(s=split))
    source = Data(type=kind, root=str(tmp_path), batch_size=2, crop_size=[8, 8], workers=0)
    assert len(source.train) == len(source.val) == 1 and source.train.name(0) != source.val.name(0)
    assert (
        len(source.classes) == len(source.palette) == classes
        and len(set(source.classes)) == classes
    )
    assert all(len(color) == 3 and all(0 <= v <= 255 for v in color) for color in source.palette)
    assert np.unique(source.train.load(0)[1]).tolist() == [meant]
    next(source.train_batches()), next(iter(source.val_batches()))


def test_official_labels_that_were_not_converted(tmp_path):
    """Cityscapes' labelIds, COCO-Stuff's numbers up to 181, the palette PNGs of VOC, and SegNet's CamVid."""
    lay_out(
        tmp_path / "city",
        [("leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png")],
        33,
    )
    assert data.cityscapes("val", root=str(tmp_path / "city")).load(0)[1].max() == 18
    lay_out(
        tmp_path / "city",
        [("leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png")],
        29,
    )
    assert data.cityscapes("val", root=str(tmp_path / "city")).load(0)[1].min() == 255
    lay_out(tmp_path / "coco", [("images/val2017/1.jpg", "annotations/val2017/1.png")], 181)
    assert data.coco_stuff("val", root=str(tmp_path / "coco")).load(0)[1].max() == 170
    lay_out(tmp_path / "camvid", [("train/1.png", "trainannot/1.png")], 11)
    assert data.camvid("train", root=str(tmp_path / "camvid")).load(0)[1].min() == 255
    lay_out(
        tmp_path / "voc",
        [
            ("JPEGImages/1.jpg", "SegmentationClass/1.png"),
            ("JPEGImages/2.jpg", "SegmentationClassAug/2.png"),
        ],
        0,
    )
    picture = Image.fromarray(np.tile(np.array([5, 255, 20, 0], np.uint8), (10, 3)))
    picture.putpalette(np.array(data.voc_palette(256), np.uint8).tobytes())
    picture.save(tmp_path / "voc/SegmentationClass/1.png")
    (tmp_path / "voc/ImageSets/Segmentation").mkdir(parents=True)
    for name, line in ("train", "1"), ("aug", "2"):
        (tmp_path / f"voc/ImageSets/Segmentation/{name}.txt").write_text(line + "\n")
    found = data.voc_aug("train", root=str(tmp_path / "voc"))
    assert (
        len(found) == 2
        and np.unique(found.load(0)[1]).tolist() == [0, 5, 20, 255]
        and "Aug" in found.paths(1)[1]
    )


def test_names_and_colors_are_the_published_ones():
    assert (
        data.voc_palette(21)[15] == [192, 128, 128]
        and data.voc_palette(21)[20] == [0, 64, 128]
        and data.VOC_CLASSES[15] == "person"
    )
    assert (
        data.CITYSCAPES_PALETTE[::18] == [[128, 64, 128], [119, 11, 32]]
        and data.CITYSCAPES_CLASSES[13] == "car"
    )
    assert (
        data.ADE20K_PALETTE[149] == [92, 0, 255]
        and data.ADE20K_CLASSES[12] == "person"
        and data.ADE20K_CLASSES[149] == "flag"
    )
    assert (
        data.CAMVID_PALETTE[10] == [0, 128, 192]
        and data.CONTEXT_CLASSES[59] == "wood"
        and data.COCO_STUFF_CLASSES[170] == "wood"
    )


def test_synthetic_scenes_need_more_than_color():
    train, val = Synthetic("train"), Synthetic("val")
    assert all(
        np.array_equal(one, other)
        for one, other in zip(train.load(5), Synthetic("train", length=9).load(5))
    )
    assert not np.array_equal(train.load(5)[0], val.load(5)[0])
    images, labels = (
        np.concatenate([part.reshape(128 * 128, -1) for part in parts])
        for parts in zip(*map(train.load, range(60)))
    )
    count = np.bincount(labels[:, 0], minlength=8)
    assert (
        count.min() > 0 and count.max() / count.min() > 5 and count.max() / count.sum() / 8 < 0.12
    )  # the mIoU of always "ground"
    mean = np.stack([images[labels[:, 0] == c].mean(0) for c in range(8)])
    image, label = (
        np.concatenate([part.reshape(128 * 128, -1) for part in parts])
        for parts in zip(*map(val.load, range(20)))
    )
    guess = ((image[:, None] - mean) ** 2).sum(-1).argmin(-1)
    both = np.bincount(label[:, 0] * 8 + guess, minlength=64).reshape(8, 8)
    assert (
        np.diag(both) / (both.sum(0) + both.sum(1) - np.diag(both))
    ).mean() < 0.4  # of the nearest mean color
    assert Synthetic("val", size=(40, 70)).load(0)[0].shape == (40, 70, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "16", "npy5", "npy1", "tiff", "pages"])
def test_unusual_images(mode, tmp_path):
    rng = np.random.default_rng(0)
    pixels, channels, suffix = rng.integers(0, 255, (20, 30, 4), dtype=np.uint8), 3, ".png"
    (tmp_path / "images/train").mkdir(parents=True), (tmp_path / "labels/train").mkdir(parents=True)
    expected = pixels[..., :3]
    if mode in ("L", "LA", "RGBA"):
        Image.fromarray(pixels[..., {"L": 0, "LA": slice(0, 2), "RGBA": slice(0, 4)}[mode]]).save(
            tmp_path / "images/train/a.png"
        )
        expected = pixels[..., :3] if mode == "RGBA" else pixels[..., :1].repeat(3, -1)
    elif mode == "P":
        picture = Image.fromarray(pixels[..., :3]).quantize(32)
        picture.save(tmp_path / "images/train/a.png")
        expected = np.asarray(picture.convert("RGB"))
    elif mode == "16":
        channels, expected = 1, pixels[..., :1].astype(np.uint16) * 200
        Image.fromarray(expected[..., 0]).save(tmp_path / "images/train/a.png")
    elif mode.startswith("npy"):
        channels, suffix = int(mode[3]), ".npy"
        expected = rng.normal(size=(20, 30, channels))
        np.save(tmp_path / "images/train/a.npy", expected if channels > 1 else expected[..., 0])
    elif mode == "tiff":
        suffix = ".tif"
        Image.fromarray(expected).save(tmp_path / "images/train/a.tif")
    else:
        channels, suffix, expected = 4, ".tif", pixels
        bands = [Image.fromarray(pixels[..., k]) for k in range(4)]
        bands[0].save(tmp_path / "images/train/a.tif", save_all=True, append_images=bands[1:])
    Image.fromarray((pixels[..., 0] > 99).astype(np.uint8)).save(tmp_path / "labels/train/a.png")
    source = Data(
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
    for _ in range(2):
        image, _ = source.prepare(next(source.train_batches()), "cpu")
        assert np.allclose(image[0].permute(1, 2, 0) * 2 + 10, expected, rtol=1e-5, atol=1e-3)
    same(
        {"i": source.prepare(next(iter(source.val_batches(batch_size=2))), "cpu")[0]}, {"i": image}
    )
    assert source.train.size(0) == (20, 30) and source.train.name(0).endswith(suffix)


def test_wrong_number_of_channels(folder):
    text = complaint(
        lambda: Data(**folder, in_channels=5, mean=[0.0] * 5, std=[1.0] * 5).train.load(0)
    )
    assert "data.in_channels is 5" in text and "(60, 90, 3)" in text


# --------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_each_validation_image_counts_once(folder, world_size, batch_size):
    source, seen = Data(**folder | {"workers": 1 if world_size == 2 else 0}), []
    for rank in range(world_size):
        batches = source.val_batches(rank, world_size, batch_size=batch_size)
        found = list(batches)
        assert len(found) == len(batches)
        for batch in found:
            seen += batch["index"].tolist()
            for n, i in enumerate(batch["index"].tolist()):
                image, label = source.val.load(i)
                assert np.array_equal(batch["image"][n].permute(1, 2, 0), image) and np.array_equal(
                    batch["label"][n], label
                )
    assert sorted(seen) == list(range(5))


def test_validation_images_are_scaled_but_not_their_labels(folder):
    batch = next(iter(Data(**folder).val_batches(scale=(45, 45))))
    assert batch["image"].shape == (1, 3, 30, 45) and batch["label"].shape == (1, 60, 90)


def test_evaluation_needs_no_training_images(folder):
    import shutil

    shutil.rmtree(Path(folder["root"], "images/train"))
    source = Data(**folder)
    assert source.classes == ["a", "b", "c", "d"] and len(list(source.val_batches())) == 5


# ---------------------------------------------------------------------------------------------------------- preflight


def test_preflight_reports_and_draws(folder, tmp_path, capsys):
    edit(folder, "labels", np.full((60, 90), 255, np.uint8))
    source = Data(**folder)
    assert data.preflight(source.train, 2) == []
    printed = capsys.readouterr().out
    assert (
        "6 samples" in printed
        and "suggested class_weight" in printed
        and "1 labels in which nothing is scored" in printed
    )
    data.contact_sheet(source, str(tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").width == 4 * 56
    path = edit(folder, "labels", np.full((60, 90), 9, np.uint8))
    assert [path in problem for problem in data.preflight(Data(**folder).train, 2)] == [True]
    assert path in complaint(Data(**folder).check)


def test_suggested_weights_balance_by_median_frequency(tmp_path, capsys):
    """Two labels: class 0 covers 3/4 of both, class 1 1/4 of the first, class 2 1/4 of the second: frequencies 3/4, 1/4, 1/4."""
    for name, rare in ("a", 1), ("b", 2):
        label = np.zeros((8, 8), np.uint8)
        label[:4, :4] = rare
        for kind, array in ("images", np.zeros((8, 8, 3), np.uint8)), ("labels", label):
            (tmp_path / kind / "train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / kind / "train" / f"{name}.png")
    data.preflight(Folder("train", root=str(tmp_path), classes=["x", "y", "z", "never"]), 1)
    assert "suggested class_weight: [0.33, 1.0, 1.0, 0.0]" in capsys.readouterr().out


def test_preflight_command(folder, tmp_path):
    section = {key: value for key, value in folder.items() if key != "workers"}
    config = {
        "work_dir": str(tmp_path / "work"),
        "model": {
            "backbone": {"type": "ResNetV1c", "depth": 18},
            "decode_head": {
                "type": "FCNHead",
                "in_channels": 512,
                "in_index": 3,
                "channels": 16,
                "num_classes": 4,
            },
        },
        "data": section,
        "optimizer": {"type": "SGD", "lr": 0.01},
        "schedule": {"max_iters": 10},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        str(ROOT / "data.py"),
        "--config",
        str(tmp_path / "config.json"),
        "--sheet",
        str(tmp_path / "sheet.png"),
        "--processes",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- val" in done.stdout and (tmp_path / "sheet.png").exists()
    path = edit(folder, "labels", np.full((60, 90), 9, np.uint8))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and path in done.stdout
    done = subprocess.run(
        [*command, "--options", "data.root=/nowhere"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: /nowhere")


# ------------------------------------------------------------------------------------------------------------- limits


def test_memory_is_flat(cached):
    """Over 10,000 samples from the cache, after a warm-up: pages of its own, not those of mapped files."""

    def used():
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    source = Data(**cached)
    batches = source.train_batches()
    for _ in range(250):
        next(batches)
    before, files = used(), len(os.listdir("/proc/self/fd"))
    for _ in range(2500):  # none is kept
        next(batches)
    assert used() - before < 8 << 20 and len(os.listdir("/proc/self/fd")) == files


def test_each_split_is_checked_alone(folder, tmp_path):
    """To evaluate, neither the training images nor their crops matter; --no-validate needs no validation images."""
    os.rename(f"{folder['root']}/images/val", tmp_path / "away")
    Data(**folder).check(val=False)
    assert "there is no such folder" in complaint(Data(**folder).check)
    os.rename(tmp_path / "away", f"{folder['root']}/images/val")
    os.rename(f"{folder['root']}/images/train", tmp_path / "away")
    Data(**(folder | {"crop_size": [4000, 4000]})).check(train=False)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"palette": [[0, 0]] * 4}, "data.palette"),
        ({"palette": [[0, 0, 300]] * 4}, "data.palette"),
        ({"values": [0, 1, 1, 2]}, "twice"),
        ({"ratio_range": [1.0, math.inf]}, "ratio_range"),
        ({"std": [math.nan, 1.0, 1.0]}, "std"),
    ],
)
def test_settings_that_cannot_be(folder, section, says):
    assert says in complaint(lambda: Data(**(folder | section)).check())


@pytest.mark.parametrize("content", [b"", b"PK"])
def test_broken_npy(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    assert str(tmp_path / "x.npy") in complaint(lambda: data.read(str(tmp_path / "x.npy")))


def test_size_of_a_broken_image(folder):
    source = Data(**folder)
    Path(source.val.name(0)).write_bytes(b"nothing")
    assert source.val.name(0) in complaint(lambda: source.val_batches(batch_size=2))
