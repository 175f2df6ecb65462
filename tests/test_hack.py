"""A user's own parts: plain modules work as they are, and their bugs show as plain tracebacks."""

import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, Run, assert_same, metrics, set_in_heads, write_config
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import data
import models
import train
from data import Data, DataError
from models import ConfigError, DecodeHead


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the modules, which a test may change."""
    folder = tmp_path / "code"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def run_code(code: Path, config: dict, *argv, world_size: int = 1, expect: int = 0) -> str:
    """The output of a run of these modules, which must end with the exit code `expect`."""
    argv = ["--config", write_config(config, code), *argv]
    process = Run(argv, code, world_size, code=code)
    codes = process.wait()
    assert set(codes) == {expect}, process.output()
    return process.output()


def check_network(config: dict, tmp_path: Path) -> list[str]:
    return train.check_network(train.read_config(write_config(config, tmp_path)))


# ------------------------------------------------------------------------- The check without data


def refuse_meta(x: torch.Tensor) -> None:
    assert x.device.type != "meta"


# What a plain training script may do, but a tensor without values cannot.
NEEDS_VALUES = {
    "item": lambda x: x.mean().item(),
    "float": lambda x: print(float(x.mean())),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "assert": lambda x: bool(torch.isfinite(x).all()) or 1 / 0,
    "format": lambda x: f"{x.mean():.3f}",
    "numpy": lambda x: x.detach().numpy(),
    "mask": lambda x: x[x > 0],
    "assert without a message": refuse_meta,
    "constant": lambda x: x + torch.from_numpy(np.ones(1, np.float32)),
}


class Curious(DecodeHead):
    """Looks at the values of its input."""

    def __init__(self, *, way: str, **kwargs):
        super().__init__(**kwargs)
        self.way = way
        self.rates = []
        if way == "init":
            self.rates = [r.item() for r in torch.linspace(0, 0.1, 3)]
        self.conv = nn.Conv2d(self.in_channels, self.channels, 1)

    def decode(self, x):
        if self.way != "init":
            NEEDS_VALUES[self.way](x)
        return self.conv(x)


@pytest.mark.parametrize("way", ["init", *NEEDS_VALUES])
@pytest.mark.parametrize("is_own", [False, True])
def test_what_needs_values_is_not_refused(tiny, tmp_path, monkeypatch, way, is_own):
    """In a user's head, and in one of models.py that a user has edited."""
    monkeypatch.setitem(models.HEADS, "Curious", Curious)
    monkeypatch.setattr(models, "OWN", models.OWN | {Curious} if is_own else models.OWN)
    tiny["model"]["decode_head"] = {
        "type": "Curious",
        "way": way,
        "in_channels": 64,
        "channels": 8,
        "num_classes": 8,
    }
    (note,) = check_network(tiny, tmp_path)
    assert note.startswith("the network is not checked")
    assert "\n" not in note
    if way != "init":
        assert "decode_head, Curious, fed with [[[2, 8, 12, 12], [2, 16, 6, 6]" in note


class Loaded(DecodeHead):
    """Loads its weights when it is built."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = nn.Conv2d(self.in_channels, self.channels, 1, bias=False)
        weight = torch.ones(self.conv.weight.shape, device="cpu")
        self.conv.load_state_dict({"weight": weight})

    def decode(self, x):
        return self.conv(x)


@pytest.mark.filterwarnings("error::UserWarning")
def test_module_that_loads_its_weights_causes_no_warnings(tiny, tmp_path, monkeypatch):
    """Though none are copied where the network is built without memory."""
    monkeypatch.setitem(models.HEADS, "Loaded", Loaded)
    head = {"type": "Loaded", "in_channels": 64, "channels": 8, "num_classes": 8}
    tiny["model"]["decode_head"] = head
    assert check_network(tiny, tmp_path) == []
    config = train.read_config(write_config(tiny, tmp_path))
    assert train.count_flops(config) > 0
    assert train.complete(train.asdict(config))["model"]["decode_head"]["dropout_ratio"] == 0.1


BUGGY = """


class Buggy(DecodeHead):
    def __init__(self, *, way: str, **kwargs):
        super().__init__(**kwargs)
        if way == "init":
            self.conv = nn.Conv2d(self.in_channels, self.channels, 3, groups=7)
        self.conv = nn.Conv2d(self.in_channels + 1, self.channels, 1)

    def decode(self, x):
        return self.conv(x)


HEADS["Buggy"] = Buggy
"""


@pytest.mark.parametrize("way", ["init", "decode"])
def test_bug_shows_as_a_plain_traceback(tiny, code, way):
    with open(code / "models.py", "a") as file:
        file.write(BUGGY)
    head = {"type": "Buggy", "way": way, "in_channels": 64, "channels": 8, "num_classes": 8}
    tiny["model"]["decode_head"] = head
    output = run_code(code, tiny, expect=1)
    assert output.count("Traceback") == 1
    before, trace = output.split("Traceback")
    own_frames = re.findall(r'File "([^"]*)", line \d+, in (\w+)', trace)
    own_frames = [(Path(file).name, name) for file, name in own_frames if "/torch/" not in file]
    lines = {"init": "self.conv = nn.Conv2d(self.in_channels, self.channels, 3, groups=7)"}
    assert own_frames[-1] == ("models.py", "__init__" if way == "init" else "decode")
    assert lines.get(way, "return self.conv(x)") in trace
    assert "error: " not in output
    assert "fit together" not in output
    assert "(backbone): " not in output  # the whole network printed
    if way == "decode":
        assert "decode_head.conv, Conv2d, fed with [[2, 64, 6, 6]]: RuntimeError" in before


@pytest.mark.parametrize(
    "section,keys,parts",
    [
        ("decode_head", {"in_channels": 63}, ["model.decode_head", "63", "[8, 16, 32, 64]"]),
        ("decode_head", {"in_index": 4}, ["model.decode_head", "in_index is 4", "4 feature maps"]),
        (
            "decode_head",
            {"in_channels": [8, 17], "in_index": [0, 1], "input_transform": "resize_concat"},
            ["model.decode_head", "in_channels is 17", "feature map 1 has 16"],
        ),
        (
            "neck",
            {"type": "FPN", "in_channels": [8, 16, 32], "out_channels": 64, "num_outs": 3},
            ["model.neck", "needs 3 feature maps, but", "gives 4"],
        ),
        (
            "neck",
            {"type": "FPN", "in_channels": [8, 16, 32, 65], "out_channels": 64, "num_outs": 4},
            ["model.neck", "65", "64"],
        ),
        ("neck", {"type": "Feature2Pyramid", "embed_dim": 8}, ["model.neck", "16"]),
        (
            "decode_head",
            {"type": "PIDHead", "loss_decode": [{}] * 4},
            ["model.decode_head", "needs 3 feature maps"],
        ),
        ("backbone", {"in_channels": 4}, ["model.backbone.in_channels is 4", "in_channels is 3"]),
        ("backbone", {"num_heads": [5, 6, 12, 24]}, ["SwinTransformer", "models.py, line"]),
    ],
)
def test_parts_that_do_not_fit_are_one_line(tiny, tmp_path, section, keys, parts):
    if keys.get("type") == "PIDHead":
        tiny["model"]["decode_head"].pop("pool_scales")
    if "num_heads" in keys:
        keys = {"type": "SwinTransformer", **keys}
        tiny["model"]["backbone"] = {}
    tiny["model"].setdefault(section, {}).update(keys)
    with pytest.raises(ConfigError) as error:
        check_network(tiny, tmp_path)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# ---------------------------------------------------------------------------------- Plain modules


class PlainBackbone(nn.Module):
    """Returns its maps in the given kind of container."""

    def __init__(self, *, kind: str):
        super().__init__()
        self.kind = kind
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer = nn.Conv2d(8, 16, 3, 2, 1)

    def forward(self, image):
        fine = self.stem(image)
        coarse = self.layer(fine)
        if self.kind == "tensor":
            return coarse
        if self.kind == "dict":
            return {"fine": fine, "coarse": coarse}
        if self.kind == "tuple":
            return fine, coarse
        if self.kind == "list":
            return [fine, coarse]
        return coarse.mean((2, 3))


class PlainLoss(nn.Module):
    """Cross entropy with a temperature that is learned."""

    def __init__(self, *, start: float = 1.0):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(start))

    def forward(self, logits, label):
        assert logits.shape[2:] == label.shape[1:]
        assert logits.dtype == torch.float32
        return nn.functional.cross_entropy(logits * self.temperature, label, ignore_index=255)


@pytest.fixture
def plain(tiny, monkeypatch) -> dict:
    """The tiny config with a plain backbone and a plain loss."""
    monkeypatch.setitem(models.BACKBONES, "PlainBackbone", PlainBackbone)
    monkeypatch.setitem(models.LOSSES, "PlainLoss", PlainLoss)
    tiny["model"] = {
        "backbone": {"type": "PlainBackbone", "kind": "list"},
        "decode_head": {
            "type": "FCNHead",
            "in_channels": 16,
            "channels": 8,
            "num_classes": 8,
            "dropout_ratio": 0.0,
            "loss_decode": [{"type": "PlainLoss", "start": 2.0, "loss_weight": 0.5}, {}],
        },
    }
    return tiny


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "tensor"])
def test_plain_backbone(plain, tmp_path, kind):
    plain["model"]["backbone"]["kind"] = kind
    assert check_network(plain, tmp_path) == []


def test_backbone_that_returns_no_maps(plain, tmp_path):
    plain["model"]["backbone"]["kind"] = "vector"
    with pytest.raises(ConfigError, match=r"model: the backbone returns \[2, 16\] where a feature"):
        check_network(plain, tmp_path)


def test_plain_loss(plain):
    """It is given logits at the label's resolution, weighted, named, and its parameters learn."""
    torch.manual_seed(0)
    model = models.build_model(plain["model"])
    image = torch.randn(2, 3, 32, 32)
    label = torch.randint(0, 8, (2, 32, 32), dtype=torch.uint8)
    label[:, :9] = 255
    losses = model(image, label)
    assert set(losses) == {"decode.loss_plainloss", "decode.loss_ce"}
    logits = nn.functional.interpolate(model(image), (32, 32), mode="bilinear")
    expected = nn.functional.cross_entropy(2 * logits, label.long(), ignore_index=255)
    torch.testing.assert_close(losses["decode.loss_plainloss"], 0.5 * expected)
    losses["decode.loss_plainloss"].backward()
    assert model.decode_head.loss_decode[0].module.temperature.grad.abs() > 0
    assert model.batch_dependent_parts() == ["PlainLoss"]


@pytest.mark.parametrize(
    "loss,part",
    [
        ({"stat": 1.0}, "PlainLoss has no such keyword; did you mean start"),
        ({"loss_weight": "high"}, "loss_decode.loss_weight: is 'high'"),
        ({"sampler": 1}, "sampler: PlainLoss has no such keyword"),
    ],
)
def test_errors_of_a_plain_loss(plain, loss, part):
    plain["model"]["decode_head"]["loss_decode"] = {"type": "PlainLoss", **loss}
    with pytest.raises(ConfigError) as error:
        models.build_model(plain["model"])
    assert part in str(error.value)


def test_plain_loss_takes_no_sampler(plain):
    plain["model"]["decode_head"]["sampler"] = {"type": "OHEMPixelSampler"}
    with pytest.raises(ConfigError, match="a sampler needs losses that take pixel weights"):
        models.build_model(plain["model"])


def test_loss_of_torch(plain, monkeypatch):
    monkeypatch.setitem(models.LOSSES, "Torch", nn.CrossEntropyLoss)
    loss = {"type": "Torch", "ignore_index": 255, "loss_name": "loss_torch"}
    plain["model"]["decode_head"]["loss_decode"] = [loss, {}]
    model = models.build_model(plain["model"])
    label = torch.randint(0, 8, (2, 32, 32), dtype=torch.uint8)
    losses = model(torch.randn(2, 3, 32, 32), label)
    torch.testing.assert_close(losses["decode.loss_torch"], losses["decode.loss_ce"])


def test_network_of_torchvision_as_backbone(plain, tmp_path, monkeypatch, recwarn):
    """With weights that it loads itself: the check, which cannot load them, does not warn."""

    def build() -> nn.Module:
        network = torchvision.models.resnet18()
        with torch.device("cpu"):
            state = nn.Conv2d(3, 64, 7, bias=False).state_dict()
        network.conv1.load_state_dict(state)
        return create_feature_extractor(network, {"layer1": "fine", "layer2": "coarse"})

    monkeypatch.setitem(models.BACKBONES, "torchvision", build)
    plain["model"]["backbone"] = {"type": "torchvision"}
    head = plain["model"]["decode_head"] | {"in_channels": 128}
    plain["model"]["decode_head"] = head
    assert check_network(plain, tmp_path) == []
    assert not recwarn.list
    head["in_channels"] = 127
    with pytest.raises(ConfigError, match="model.decode_head: in_channels is 127, but .* 128"):
        check_network(plain, tmp_path)


# ----------------------------------------------------------------------------- Plain data sets


class Scans:
    """The least that a data set needs; images of one channel in a .npz file."""

    classes = ["dark", "bright"]

    def __init__(self, split: str, *, root: str, kind: str = "array"):
        self.path = Path(root, f"{split}.npz")
        self.images = np.load(self.path)["images"]  # (N, H, W)
        self.kind = kind

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        label = (self.images[i] > 127).astype(np.int64)
        label[0] = 255
        if self.kind == "tensor":
            return torch.from_numpy(self.images[i])[None], torch.from_numpy(label)
        if self.kind == "pil":
            return Image.fromarray(self.images[i]), Image.fromarray(label.astype(np.uint8))
        return self.images[i], label


class ScansWithPaths(Scans):
    def paths(self, i):
        return [self.path]


@pytest.fixture
def scans(tiny, tmp_path, monkeypatch) -> dict:
    """The tiny config on Scans."""
    monkeypatch.setitem(data.DATASETS, "scans", Scans)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images = rng.integers(0, 256, (4, 40, 52), np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images)
    tiny["data"] = {
        "type": "scans",
        "root": str(tmp_path),
        "in_channels": 1,
        "mean": [127],
        "std": [50],
        "batch_size": 2,
        "workers": 0,
        "crop_size": [32, 32],
    }
    tiny["model"]["backbone"]["in_channels"] = 1
    set_in_heads(tiny, num_classes=2)
    return tiny


@pytest.mark.parametrize("kind", ["array", "tensor", "pil"])
def test_plain_data_set(scans, tmp_path, kind):
    scans["data"]["kind"] = kind
    source = Data(**scans["data"])
    source.check()
    image, label = source.train.load(1)
    assert image.shape == (40, 52, 1)
    assert label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1, 255}
    assert source.train.size(1) == (40, 52)
    assert source.train.name(1) == "sample 1 of scans"
    assert source.palette == data.voc_palette(2)
    image, label = source.prepare(next(source.train_batches()), "cpu")
    assert image.shape == (2, 1, 32, 32)


def test_plain_data_set_trains(scans, monkeypatch):
    """In this process, which knows the class."""
    path = Path(scans["work_dir"]).parent / "config.json"
    write_config(scans, path.parent)
    assert train.main(["--config", str(path), "--options", "schedule.max_iters=2"]) == "done"
    assert len(metrics(scans, "val")) == 1


def test_cache_of_a_plain_data_set(scans, tmp_path, monkeypatch):
    """It needs paths(i), and notices a changed file and another setting."""
    scans["data"]["cache"] = str(tmp_path / "cache")
    with pytest.raises(DataError, match=r"data.cache: .* add a method paths\(i\)"):
        Data(**scans["data"]).check()
    monkeypatch.setitem(data.DATASETS, "scans", ScansWithPaths)
    del scans["data"]["cache"]
    plain = Data(**scans["data"]).train.load(2)
    for _ in range(2):
        source = Data(**scans["data"], cache=str(tmp_path / "cache"))
        for a, b in zip(source.train.load(2), plain):
            np.testing.assert_array_equal(a, b)
    assert len(list((tmp_path / "cache").glob("*.sample"))) == 1
    monkeypatch.setattr(Scans, "__getitem__", None)  # what is cached needs no decoding
    source.train.load(2)


@pytest.mark.parametrize(
    "image,label,part",
    [
        (np.zeros((4, 4), np.uint8), np.full((4, 4), 2), "holds [2], which are none of the 2"),
        (np.zeros((4, 4), np.uint8), np.full((4, 4), -1), "holds [-1]"),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 5), int), "the label is int64 of shape (4, 5)"),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4)), "the label is float64"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), int), "data.in_channels is 1"),
    ],
)
def test_errors_of_a_plain_data_set(scans, monkeypatch, image, label, part):
    monkeypatch.setattr(Scans, "__getitem__", lambda self, i: (image, label))
    with pytest.raises(DataError) as error:
        Data(**scans["data"]).check()
    assert part in str(error.value)
    assert str(error.value).startswith("sample 0 of scans: ")


def test_images_with_other_channels_than_the_config_says(tiny):
    tiny["data"] |= {"in_channels": 1, "mean": [0], "std": [1]}
    with pytest.raises(DataError, match="the image has 3 channels, but data.in_channels is 1"):
        Data(**tiny["data"]).check()


# ---------------------------------------------------------------------------------- Transforms

ROTATION = {"type": "RandomRotation", "degrees": [90, 90], "interpolation": "bilinear"}


def batches(config: dict, count: int = 3, start: int = 0, **keywords) -> list[dict]:
    stream = Data(**config["data"] | keywords, seed=1).train_batches(start=start)
    return list(itertools.islice(stream, count))


def test_geometry_turns_image_and_label_alike(tiny):
    whole = {"ratio_range": [1, 1], "crop_size": [128, 128], "cat_max_ratio": 1.0, "flip": 0.0}
    (plain,) = batches(tiny, 1, **whole)
    (turned,) = batches(tiny, 1, **whole, transforms=[ROTATION])
    for key in ("image", "label"):
        torch.testing.assert_close(turned[key], plain[key].rot90(dims=(-2, -1)))
    assert torch.equal(turned["color"], plain["color"])


def test_color_leaves_the_label_and_outside_is_ignored(tiny):
    jitter = {"type": "ColorJitter", "brightness": 0.5}
    shift = {"type": "RandomAffine", "degrees": 0, "translate": [0.5, 0.5], "fill": 9}
    some = {"type": "RandomApply", "transforms": [shift], "p": 1.0}
    (plain,) = batches(tiny, 1)
    (jittered,) = batches(tiny, 1, transforms=[jitter])
    assert torch.equal(jittered["label"], plain["label"])
    assert not torch.equal(jittered["image"], plain["image"])
    (shifted,) = batches(tiny, 1, transforms=[some])
    outside = shifted["label"] == 255
    assert 0 < outside.float().mean() < 1
    pixels = shifted["image"].permute(0, 2, 3, 1)
    assert (pixels[outside] == 9).all()


class Noise:
    """A user's transform with random numbers of all three libraries."""

    def __init__(self, *, amount: int):
        self.amount = amount

    def __call__(self, image, label):
        noise = torch.rand(image.shape) + np.random.rand() + random.random()
        image += (noise * self.amount).to(image.dtype)
        return image, label


class ImageAlone:
    """A user's transform that forgets to return the label."""

    def __call__(self, image, label):
        return image


def test_transforms_depend_on_the_sample_alone(tiny, monkeypatch):
    """Not on workers, on where the stream starts, or on the global random numbers."""
    monkeypatch.setitem(data.TRANSFORMS, "Noise", Noise)
    tiny["data"]["transforms"] = [
        {"type": "Noise", "amount": 9},
        {"type": "RandomRotation", "degrees": 30},
        {"type": "RandomPerspective"},
    ]
    straight = batches(tiny, 4)
    torch.manual_seed(5)
    random.seed(5)
    state = torch.get_rng_state()
    assert_same(batches(tiny, 2, start=2), straight[2:])
    assert torch.equal(state, torch.get_rng_state())
    assert_same(batches(tiny, 4, workers=2), straight)
    assert not torch.equal(straight[0]["image"], straight[1]["image"])


def test_transform_in_place_leaves_the_data_set(scans, monkeypatch):
    monkeypatch.setitem(data.TRANSFORMS, "Noise", Noise)
    scans["data"] |= {
        "crop_size": [40, 52],
        "ratio_range": [1, 1],
        "transforms": [{"type": "Noise", "amount": 50}],
    }
    source = Data(**scans["data"])
    before = source.train.dataset.images.copy()
    source.samples.sample(0)
    np.testing.assert_array_equal(source.train.dataset.images, before)


@pytest.mark.parametrize(
    "section,parts",
    [
        ({"type": "RandomRotatoin"}, ["transforms.0.type", "Did you mean RandomRotation"]),
        ({"type": "RandomRotation"}, ["transforms.0: RandomRotation", "degrees"]),
        ({"type": "RandomRotation", "degrees": 5, "interpolation": "best"}, ["best"]),
        ({"type": "ColorJitter", "brightness": -1}, ["transforms.0: ColorJitter"]),
        ({"type": "Noise"}, ["transforms.0: Noise", "amount"]),
        ({"type": "Noise", "amount": 1, "amuont": 1}, ["transforms.0: Noise", "amuont"]),
        ({"type": "Resize", "size": [99, 99]}, ["transforms.0", "99", "at most 48x48"]),
        ({"type": "MixUp", "num_classes": 8}, ["MixUp"]),
        ({"type": "ImageAlone"}, ["transforms.0 returned a Tensor", "return image, label"]),
        (
            {"type": "RandomApply", "transforms": [{"type": "Noise", "amount": 1}]},
            ["torchvision's"],
        ),
    ],
)
def test_errors_in_transforms(tiny, monkeypatch, section, parts):
    monkeypatch.setitem(data.TRANSFORMS, "Noise", Noise)
    monkeypatch.setitem(data.TRANSFORMS, "ImageAlone", ImageAlone)
    with pytest.raises(DataError) as error:
        Data(**tiny["data"], transforms=[section]).check()
    for part in parts:
        assert part in str(error.value)


def test_torchvision_is_imported_for_transforms_only(tiny, tmp_path):
    script = """
import sys, train
train.Data(**train.load_config(sys.argv[1])["data"]).check()
print("torchvision" in sys.modules)
"""
    command = [sys.executable, "-c", script, write_config(tiny, tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# ------------------------------------------------------------------------ The README's recipes

README = (ROOT / "README.md").read_text()
RECIPES = README.split("## Hack it")[1].split("\n## ")[0]
RECIPE = r"\*\*(.+?)\*\*, (.+?):?\n```python\n(.*?)```\n(?:Config: (.*?)\n\n)?"


def recipes() -> dict[str, tuple[str, str, list[str]]]:
    """Name -> the place of the edit, the code, and the options that use it."""
    found = {}
    for name, place, code, config in re.findall(RECIPE, RECIPES + "\n\n", re.DOTALL):
        options = re.findall(r"`([^`]*)`", config)
        found[name] = (place, code, shlex.split(" ".join(options)))
    return found


def carry_out(recipe: tuple[str, str, list[str]], folder: Path) -> list[str]:
    """Edit the modules in `folder` as the recipe says. Return its options."""
    place, code, options = recipe
    path = folder / re.search(r"`(\w+\.py)`", place)[1]
    text = path.read_text()
    within = re.fullmatch(r"in `(\w+)` of `\w+\.py`, before `(.+)`", place)
    if within is None:
        assert place == f"at the end of `{path.name}`"
        path.write_text(f"{text}\n\n{code}")
        return options
    head, body = text.split(f"\ndef {within[1]}(")
    before, after = body.split(f"    {within[2]}\n", 1)
    path.write_text(f"{head}\ndef {within[1]}({before}{code}    {within[2]}\n{after}")
    return options


@pytest.fixture
def mine(tmp_path: Path) -> dict:
    """The README's config, on files in the layouts that it and the recipe of a data set name."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "code/data/mine" / kind / split).mkdir(parents=True)
        (tmp_path / "code/data/npz" / split).mkdir(parents=True)
        for i in range(4):
            image = rng.integers(0, 256, (64, 64, 3), np.uint8)
            label = rng.integers(0, 3, (64, 64), np.uint8)
            folder = tmp_path / "code/data/mine"
            Image.fromarray(image).save(folder / "images" / split / f"{i}.png")
            Image.fromarray(label).save(folder / "labels" / split / f"{i}.png")
            np.savez(tmp_path / "code/data/npz" / split / f"{i}.npz", image=image, label=label)
    (text,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    return json.loads(text)


SMALL = [
    "schedule.max_iters=2",
    "log.interval=1",
    "data.batch_size=2",
    "data.crop_size=[64, 64]",
    "data.workers=0",
    "evaluation.scale=[64, 64]",
]


@pytest.mark.parametrize(
    "names",
    [["Backbone", "Loss", "Augmentation", "Schedule", "Metric"], ["Head", "Data set"]],
    ids=["first", "second"],
)
def test_recipes(code, mine, names):
    """Each recipe is carried out by the README's own text, and two iterations are trained."""
    options = []
    for name in names:
        options += carry_out(recipes()[name], code)
    output = run_code(code, mine, "--options", *options, *SMALL)
    mine["work_dir"] = str(code / mine["work_dir"])
    lines = metrics(mine)
    scores = metrics(mine, "val")[-1]
    summary = output.splitlines()[0]
    assert [line["iteration"] for line in lines] == [1, 2]
    if "Head" in names:
        assert "ResNet, MyHead" in summary
        assert "decode.loss_ce" in lines[0]
        return
    assert "MyBackbone, PSPHead" in summary
    assert "decode.loss_myloss" in lines[0]
    assert lines[1]["lr"] == pytest.approx(0.01 * 0.01**0.5)
    assert 0 < scores["FWIoU"] < 1
    assert f"FWIoU {100 * scores['FWIoU']:.2f}" in output


def test_every_recipe_is_tested():
    expected = ["Backbone", "Head", "Loss", "Data set", "Augmentation", "Schedule", "Metric"]
    assert list(recipes()) == expected
    assert RECIPES.count("```python") == len(expected)
