"""Use of what was trained: prediction of files and in notebooks, tiles, exported networks."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from test_readme import README, code_blocks

import data
import models
import train

SIZES = [(60, 90), (48, 40), (97, 65)]


def smooth_image(
    rng: np.random.Generator, height: int, width: int, channels: int = 3
) -> np.ndarray:
    noise = torch.from_numpy(rng.uniform(0, 255, (1, channels, 7, 7)))
    image = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return image[0].permute(1, 2, 0).byte().contiguous().numpy()


def write_images(folder: Path, channels: int = 3, suffix: str = ".png") -> None:
    """Images of several sizes in the layout of a folder data set; labels that are all 0."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        image = smooth_image(rng, height, width, channels)
        if suffix == ".npy":
            image = image.astype(np.uint16) * 200
        for split in ("train", "val"):
            for kind in ("images", "labels"):
                (folder / kind / split / "sub").mkdir(parents=True, exist_ok=True)
            name = f"sub/{number}" if number else str(number)
            path = folder / "images" / split / f"{name}{suffix}"
            if suffix == ".npy":
                np.save(path, image)
            else:
                Image.fromarray(image).save(path)
            label = Image.fromarray(np.zeros((height, width), np.uint8))
            label.save(folder / "labels" / split / f"{name}.png")


def folder_config(root: Path, **settings) -> dict:
    """The tiny config on a folder data set."""
    config = tiny_config(root / "work")
    section = {key: config["data"][key] for key in ("batch_size", "workers", "crop_size")}
    classes = [f"class{k}" for k in range(8)]
    config["data"] = section | {"type": "folder", "root": str(root), "classes": classes}
    return config | settings


def write_checkpoint(config: dict, path: Path) -> Path:
    """A checkpoint with random weights, whose predictions are of several classes."""
    torch.manual_seed(0)
    model = models.build_model(config["model"])
    for module in model.modules():
        if isinstance(module, models.DecodeHead):
            torch.nn.init.normal_(module.conv_seg.weight)
    with torch.no_grad():  # batch norm's statistics
        model.train()(torch.randn(4, model.in_channels, 64, 64))
    classes = config["data"].get("classes", data.Synthetic.classes)
    content = {
        "state_dict": model.state_dict(),
        "config": copy.deepcopy(config),
        "classes": classes,
        "palette": data.voc_palette(len(classes)),
        "iteration": 5,
    }
    torch.save(content, path)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def predicted(show_dir: Path) -> list[np.ndarray]:
    """The label images below a folder in the order of their names."""
    return [pixels(path) for path in sorted(show_dir.rglob("*.png"))]


def check_against_evaluation(checkpoint: Path, root: Path, *argv: str) -> list[np.ndarray]:
    """--eval-only and --predict write the same classes; returns them."""
    argv = ["--load-from", str(checkpoint), *argv]
    shown = root / "shown"
    train.main([*argv, "--eval-only", "--show-dir", str(shown)])
    out = root / "out"
    train.main([*argv, "--predict", str(root / "images/val"), "--show-dir", str(out)])
    results = predicted(out / "labels")
    expected = predicted(shown)
    assert len(results) == len(expected) == len(SIZES)
    for result, image in zip(results, expected):
        assert np.array_equal(result, image)
    assert [result.shape for result in results] == SIZES
    assert len(np.unique(np.concatenate([result.ravel() for result in results]))) > 1
    return results


SLIDE = {"mode": "slide", "crop_size": [40, 40], "stride": [24, 24], "batch_size": 3}


@pytest.mark.parametrize(
    "argv, evaluation",
    [
        ([], {}),
        ([], SLIDE),
        ([], {"scale": [80, 48]}),
        (["--aug-test"], SLIDE | {"scale": [80, 48], "ratios": [0.75, 1.0]}),
        ([], {"max_pixels": 4000}),
    ],
    ids=["whole", "slide", "scale", "augmented", "tiles"],
)
def test_prediction_is_that_of_the_evaluation(tmp_path, argv, evaluation):
    write_images(tmp_path)
    config = folder_config(tmp_path, evaluation=evaluation)
    checkpoint = write_checkpoint(config, tmp_path / "best.pth")
    results = check_against_evaluation(checkpoint, tmp_path, *argv)
    if not argv:
        predict = train.load_predictor(checkpoint, device="cpu")
        assert np.array_equal(predict(tmp_path / "images/val/0.png"), results[0])


def test_prediction_with_a_threshold(tmp_path):
    write_images(tmp_path)
    config = folder_config(tmp_path)
    config["data"]["classes"] = ["background", "object"]
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    binary = {"num_classes": 2, "out_channels": 1, "threshold": 0.2, "loss_decode": loss}
    config["model"]["decode_head"] |= binary
    config["model"]["auxiliary_head"] = None
    checkpoint = write_checkpoint(config, tmp_path / "best.pth")
    low = check_against_evaluation(checkpoint, tmp_path)
    override = ["--options", "model.decode_head.threshold=0.8"]
    high = check_against_evaluation(checkpoint, tmp_path / "images/..", *override)
    assert sum(map(np.sum, low)) > sum(map(np.sum, high))


def test_five_channels_of_16_bits(tmp_path):
    write_images(tmp_path, channels=5, suffix=".npy")
    config = folder_config(tmp_path)
    config["data"] |= {"in_channels": 5, "mean": [25000.0] * 5, "std": [15000.0] * 5}
    config["model"]["backbone"]["in_channels"] = 5
    checkpoint = write_checkpoint(config, tmp_path / "best.pth")
    results = check_against_evaluation(checkpoint, tmp_path)
    predict = train.load_predictor(checkpoint, device="cpu")
    assert np.array_equal(predict(np.load(tmp_path / "images/val/0.npy")), results[0])
    with pytest.raises(data.DataError, match="in_channels"):
        predict(np.zeros((8, 8, 3), np.uint8))


def test_predictor_takes_arrays_and_pillow_images(tmp_path):
    config = tiny_config(tmp_path / "work")
    predict = train.load_predictor(write_checkpoint(config, tmp_path / "best.pth"), device="cpu")
    assert predict.classes == data.Synthetic.classes
    assert len(predict.palette) == 8
    array, _ = data.Synthetic("val").load(0)
    array = array[:100]
    expected = predict(array)
    assert expected.shape == (100, 128)
    assert expected.dtype == np.uint8
    image = Image.fromarray(array)
    assert np.array_equal(predict(image), expected)
    image.putalpha(7)
    assert np.array_equal(predict(image), expected)
    gray = Image.fromarray(array[:, :, 0])
    repeated = np.stack([array[:, :, 0]] * 3, 2)
    assert np.array_equal(predict(gray), predict(repeated))
    turned = Image.fromarray(array)
    turned.getexif()[0x0112] = 6  # to be shown turned by 90 degrees
    assert np.array_equal(predict(turned), predict(np.rot90(array, -1)))


@pytest.mark.filterwarnings("error::data.DataWarning")
def test_wrong_images(tmp_path):
    config = tiny_config(tmp_path / "work")
    predict = train.load_predictor(write_checkpoint(config, tmp_path / "best.pth"), device="cpu")
    array = smooth_image(np.random.default_rng(0), 40, 50)
    closed = Image.fromarray(array)
    closed.close()
    for image, message in (
        (None, "is NoneType"),
        (3, "expected a path"),
        (array.astype(object), "type object"),
        (array[:0], r"shape \(0, 50, 3\)"),
        (array[None], r"shape \(1, 40, 50, 3\)"),
        (Image.fromarray(array).convert("HSV"), "mode HSV"),
        (closed, "closed"),
        (tmp_path, "no such file"),
        (str(tmp_path / "missing.png"), "no such file"),
    ):
        with pytest.raises(data.DataError, match=message):
            predict(image)
    tensor = torch.tensor(array, dtype=torch.float32, requires_grad=True)
    assert np.array_equal(predict(tensor), predict(array))
    with pytest.raises(data.DataWarning, match="do not fit the values"):
        predict(array / 255)


def test_predictor_leaves_torch_as_it_is(tmp_path):
    """Random numbers, the switches for precision and determinism, the default device."""
    config = tiny_config(tmp_path / "work") | {"precision": "tf32"}
    checkpoint = write_checkpoint(config, tmp_path / "best.pth")
    backends = torch.backends
    matmul = backends.cuda.matmul
    array = smooth_image(np.random.default_rng(0), 40, 50)
    state = torch.get_rng_state()
    with train.switches_restored():
        torch.set_float32_matmul_precision("medium")
        backends.cudnn.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        predict = train.load_predictor(checkpoint, device="cpu")
        with predict.arithmetic():
            assert backends.cudnn.allow_tf32
            assert not torch.are_deterministic_algorithms_enabled()
        expected = predict(array)
        assert torch.get_float32_matmul_precision() == "medium"
        assert not backends.cudnn.allow_tf32
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        # torch forbids to ask for allow_tf32 after this.
        matmul.fp32_precision = "ieee"
        predict(array)
        assert matmul.fp32_precision == "ieee"
    with torch.device("meta"):
        predict = train.load_predictor(checkpoint, device="cpu")
        assert np.array_equal(predict(array), expected)
    assert torch.equal(torch.get_rng_state(), state)
    # In training mode, threads that share the network would change its batch norm.
    assert not predict.model.training


def test_palette_of_another_length(tmp_path):
    checkpoint = write_checkpoint(tiny_config(tmp_path / "work"), tmp_path / "best.pth")
    content = torch.load(checkpoint)
    content["palette"] = content["palette"][:3]
    torch.save(content, checkpoint)
    assert len(train.load_predictor(checkpoint, device="cpu").palette) == 8


def test_lines_for_a_notebook(tmp_path, monkeypatch, capsys):
    """The code in the README runs as it is."""
    (code,) = code_blocks(README.split("## Your own data")[0], "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work_dirs/psp").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    write_checkpoint(tiny_config(tmp_path / "work"), tmp_path / "work_dirs/psp/best.pth")
    image = smooth_image(np.random.default_rng(0), 50, 70)
    Image.fromarray(image).save("photos/a.jpg")
    names = {}
    exec(code, names)
    assert names["classes"].shape == (50, 70)
    assert capsys.readouterr().out.split()[0] in data.Synthetic.classes


def test_files_and_their_names(tmp_path, run, capfd):
    """Folders, single files, equal names; damaged files are named and the others are done."""
    rng = np.random.default_rng(0)
    names = ["a/x.png", "a/deep/y.JPG", "b/x.jpg", "b/x.png", "b/.hidden.png", "z.webp"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    (tmp_path / "b/broken.png").write_bytes(b"no image")
    config = tiny_config(tmp_path / "work")
    config["data"]["workers"] = 1
    checkpoint = write_checkpoint(config, tmp_path / "best.pth")
    inputs = [tmp_path / "a", tmp_path / "b", tmp_path / "z.webp", tmp_path / "a/x.png"]
    argv = ["--load-from", checkpoint, "--show-dir", tmp_path / "out", "--predict", *inputs]
    output = run(config, *argv, world_size=2, expect=1).output()
    assert "b/broken.png: cannot be decoded" in output
    assert "1 of 6 images failed" in output
    assert "predicted 5 images" in output
    assert "Traceback" not in output
    labels = tmp_path / "out/labels"
    written = sorted(str(path.relative_to(labels)) for path in labels.rglob("*.*"))
    assert written == [
        "a/deep/y.JPG.png",
        "a/x.png.png",
        "b/x.jpg.png",
        "b/x.png.png",
        "z.webp.png",
    ]
    overlay = Image.open(tmp_path / "out/overlays/a/x.png.jpg")
    assert overlay.width >= 50
    assert overlay.height > 40  # with the legend
    assert Image.open(labels / "a/x.png.png").getpalette()[3:6] == [128, 0, 0]


def test_a_later_file_that_does_not_fit_the_normalization(tmp_path):
    config = tiny_config(tmp_path / "work")
    checkpoint = write_checkpoint(config, tmp_path / "best.pth")
    (tmp_path / "in").mkdir()
    array = smooth_image(np.random.default_rng(0), 40, 50)
    Image.fromarray(array).save(tmp_path / "in/a.png")
    np.save(tmp_path / "in/b.npy", array / 255)
    argv = ["--load-from", checkpoint, "--predict", tmp_path / "in", "--show-dir", tmp_path / "o"]
    with pytest.warns(data.DataWarning, match="do not fit the values of images such as .*b.npy"):
        train.main([str(word) for word in argv])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--predict", "x"], "--load-from"),
        (["--load-from", "P", "--predict", "images"], "--show-dir"),
        (["--load-from", "P", "--predict", "missing", "--show-dir", "out"], "no such file or"),
        (["--load-from", "P", "--predict", "empty", "--show-dir", "out"], "no images"),
        (["--load-from", "P", "--predict", "out", "--show-dir", "out/.."], "images to predict"),
        (["--load-from", "foreign.pth", "--predict", "out", "--show-dir", "o"], "--config"),
        (["--load-from", "P", "--export", "net.pb"], ".onnx"),
        (["--load-from", "P", "--export", "out.pt2"], "is a folder"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "images", "labels", "out", "out.pt2"):
        Path(folder).mkdir()
    Image.new("RGB", (9, 9)).save("labels/a.png")
    Image.new("RGB", (9, 9)).save("out/a.png")
    checkpoint = write_checkpoint(tiny_config(tmp_path / "work"), tmp_path / "best.pth")
    content = torch.load(checkpoint)
    torch.save({"state_dict": content["state_dict"], "meta": {}}, "foreign.pth")
    if "out/.." in argv:
        argv = ["--load-from", "P", "--predict", "labels", "--show-dir", "."]
    argv = [str(checkpoint) if word == "P" else word for word in argv]
    with pytest.raises(train.UserError, match=message):
        train.main(argv)


# ------------------------------------------------------------------------------------------- Tiles


@pytest.mark.parametrize("source, output", [(64, 64), (65, 65), (700, 700), (333, 500), (500, 90)])
@pytest.mark.parametrize("side", [64, 128, 512])
def test_weights_of_tiles_sum_to_one(source, output, side):
    tiles = train.tiles_along(source, output, side, torch.device("cpu"))
    total = torch.zeros(output)
    for tile, following in zip(tiles, [*tiles[1:], None]):
        total[tile.first : tile.last] += tile.weight
        assert tile.start % 32 == 0
        assert tile.stop - tile.start <= side
        assert len(tile.weight) == tile.last - tile.first
        assert tile.next_first == (tile.last if following is None else following.first)
    assert torch.allclose(total, torch.ones(output))


def test_tiles_equal_the_whole_where_they_see_enough(tmp_path):
    """A network that sees 17 pixels predicts the same in tiles, also between image and output."""
    model = {
        "backbone": {"type": "UNet", "base_channels": 4, "num_stages": 2},
        "decode_head": {
            "type": "FCNHead",
            "in_channels": 4,
            "channels": 8,
            "num_convs": 1,
            "num_classes": 8,
        },
    }
    model["backbone"] |= {
        "strides": [1, 1],
        "enc_num_convs": [1, 1],
        "dec_num_convs": [1],
        "downsamples": [True],
        "enc_dilations": [1, 1],
        "dec_dilations": [1],
    }
    config = tiny_config(tmp_path / "work") | {"model": model}
    predict = train.load_predictor(write_checkpoint(config, tmp_path / "best.pth"), device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (300, 410, 3), np.uint8)
    for scale in (None, (600, 820), (200, 273)):
        predict.settings = train.Evaluation(scale=scale)
        whole = predict(image)
        predict.settings = train.Evaluation(scale=scale, max_pixels=256**2)
        tiled = predict(image)
        assert len(np.unique(whole)) > 1
        if scale is None:
            assert (tiled != whole).sum() <= 2  # rounding
        assert (tiled != whole).mean() < 0.01


@pytest.mark.parametrize("align_corners", [False, True])
def test_classification_in_bands_of_rows(align_corners):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 17, 9, generator=generator)
    label = torch.randint(0, 5, (2, 100, 70), generator=generator).byte()
    whole, loss = train.classify(logits, label, align_corners)
    bands, loss_of_bands = train.classify(logits, label, align_corners, max_pixels=700)
    assert (whole != bands).sum() <= 2
    assert loss_of_bands.item() == pytest.approx(loss.item(), rel=1e-6)


# ---------------------------------------------------------------------------------------- Exported


def check_export(config: dict, path: Path, capsys) -> str:
    checkpoint = write_checkpoint(config, path.parent / "best.pth")
    train.main(["--load-from", str(checkpoint), "--export", str(path)])
    output = capsys.readouterr().out
    assert output.count("checked at") == 2
    for line in output.splitlines():
        if line.startswith("checked at"):
            assert int(line.split(": ")[1].split()[0]) < 100
    return output


def test_export_of_torch(tmp_path, capsys):
    """The saved file alone predicts uint8 images of any size as the predictor does."""
    config = tiny_config(tmp_path / "work")
    output = check_export(config, tmp_path / "net.pt2", capsys)
    assert "note" not in output
    exported = torch.export.load(tmp_path / "net.pt2").module()
    predict = train.load_predictor(tmp_path / "best.pth", device="cpu")
    array, _ = data.Synthetic("val").load(0)
    image = torch.from_numpy(array[:90]).permute(2, 0, 1)
    classes = exported(torch.stack([image, image.flip(2), image]))
    assert classes.dtype == torch.uint8
    assert (classes[0].numpy() != predict(array[:90])).sum() <= 5


class SamePadding(torch.nn.Module):
    """A convolution with TensorFlow's padding, computed as in timm."""

    def __init__(self):
        super().__init__()
        self.in_channels = 3
        self.conv = torch.nn.Conv2d(3, 8, 3, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        padding = []
        for size in (image.shape[3], image.shape[2]):
            total = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
            padding += [total // 2, total - total // 2]
        return self.conv(torch.nn.functional.pad(image, padding))


def test_export_of_padding_by_ceil(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.BACKBONES, "SamePadding", SamePadding)
    config = tiny_config(tmp_path / "work")
    head = {"type": "FCNHead", "in_channels": 8, "in_index": 0, "channels": 8, "num_classes": 8}
    config["model"] = {"backbone": {"type": "SamePadding"}, "decode_head": head}
    check_export(config, tmp_path / "net.pt2", capsys)


@pytest.mark.optional("timm")
def test_export_of_padding_in_timm():
    """Without maxima and ceil of sizes, whose terms take torch.export minutes to simplify."""
    from timm.layers import get_same_padding

    cases = list(itertools.product(range(1, 20), range(1, 6), range(1, 4), (1, 2)))
    assert all(train.same_padding(*case) == get_same_padding(*case) for case in cases)
    head = {"type": "FCNHead", "in_channels": 320, "channels": 8, "num_classes": 8}
    backbone = {"type": "TimmBackbone", "name": "tf_efficientnet_lite0"}
    model = models.build_model({"backbone": backbone, "decode_head": head})
    network = train.ExportedNetwork(model, torch.zeros(3, 1, 1), torch.ones(3, 1, 1)).eval()
    program, _ = train.trace(network, 3, torch.uint8)
    assert not {node.target for node in program.graph.nodes} & {math.ceil, torch.sym_max}
    image = train.sample_image(2, 3, 65, 98, torch.uint8)
    assert torch.equal(program.module()(image), network(image))


@pytest.mark.optional("onnx", "onnxscript", "onnxruntime")
def test_export_of_onnx(tmp_path, capsys):
    config = tiny_config(tmp_path / "work")
    config["evaluation"]["scale"] = [256, 256]
    assert "resize images" in check_export(config, tmp_path / "net.onnx", capsys)


def test_export_that_is_impossible(tmp_path):
    config = tiny_config(tmp_path / "work")
    head = {"type": "PSAHead", "in_channels": 64, "channels": 8, "num_classes": 8}
    config["model"]["decode_head"] = head | {"mask_size": [9, 9]}
    checkpoint = write_checkpoint(config, tmp_path / "best.pth")
    with pytest.raises(train.ConfigError, match="depends on the size"):
        train.main(["--load-from", str(checkpoint), "--export", str(tmp_path / "net.pt2")])
    assert not (tmp_path / "net.pt2").exists()
