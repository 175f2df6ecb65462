"""Faults in settings, data, checkpoints, disks, numbers and processes.

An error that the user can fix says what is wrong, where, and what to do, without a traceback. A run
that is killed at any moment can be resumed as if nothing had happened.

The random tests can run for longer than in the suite:
KILLS=50 FUZZ=5000 LONG=20000 python -m pytest tests/test_faults.py -s
"""

import concurrent.futures
import contextlib
import copy
import functools
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SERVER,
    WITHOUT_BATCH_NORM,
    Run,
    assert_same,
    assert_same_run,
    checkpoint,
    failing,
    files_of,
    free_port,
    iterations,
    last_iteration,
    rank_environment,
    run_train,
    set_in_heads,
    sibling,
    skip,
    tiny_config,
    wait_for,
    write_config,
)
from PIL import Image

import train
from data import TRANSFORMS, DataError
from models import ConfigError

KILLS = int(os.environ.get("KILLS", 6))
FUZZ = int(os.environ.get("FUZZ", 150))
LONG = int(os.environ.get("LONG", 240))


# -------------------------------------------------------------------------------------- The config


def places(node: object, place: tuple = ()) -> list[tuple]:
    """The path of every key and list index in nested dicts and lists."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        return []
    found = []
    for key, value in items:
        found.append((*place, key))
        found += places(value, (*place, key))
    return found


def section_of(config: dict, place: tuple) -> dict | list:
    """The dict or list that holds the last key of `place`."""
    section = config
    for key in place[:-1]:
        section = section[key]
    return section


def test_misspelled_key_anywhere(tiny, tmp_path):
    """For every key, the error names the wrong one with a correction, or the missing one."""
    for place in places(tiny):
        if not isinstance(place[-1], str):
            continue
        wrong = place[-1][:-1] + "qx"
        config = copy.deepcopy(tiny)
        section = section_of(config, place)
        section[wrong] = section.pop(place[-1])
        with pytest.raises(ConfigError) as error:
            train.load_config(write_config(config, tmp_path))
        message = str(error.value)
        corrected = f"did you mean {place[-1]}" in message
        corrected = corrected and ".".join((*place[:-1], wrong)) in message
        assert corrected or ".".join(place) in message, (place, message)


@pytest.mark.parametrize(
    "option,parts",
    [
        ("data.batch_size=four", ["data.batch_size", "four", "int"]),
        ("data.batch_size=2.5", ["data.batch_size", "2.5"]),
        ("data.batch_size=0", ["batch_size"]),
        ("data.crop_size=[48]", ["data.crop_size"]),
        ("data.workers=-1", ["workers"]),
        ("data.type=citiscapes", ["data.type", "cityscapes"]),
        ("data.type=[1]", ["data.type"]),
        ("data.lenght=4", ["data.lenght", "data set synthetic", "length"]),
        ("model.backbone.type=ResNetV1", ["model.backbone.type", "backbones are: ", "ResNet"]),
        ("model.backbone.depth=20", ["model.backbone", "20"]),
        ("model.backbone.depth.x=1", ["model.backbone.depth.x=1"]),
        ("model.backbone.with_cp=1", ["model.backbone.with_cp", "bool"]),
        ("model.decode_head.in_channels=63", ["63", "64"]),
        (
            'model.decode_head.loss_decode={"class_weight": [0, 0, 0, 0, 0, 0, 0, 0]}',
            ["model.decode_head.loss_decode", "no class would be learned"],
        ),
        (
            'model.decode_head.loss_decode={"class_weight": [-1, 1, 1, 1, 1, 1, 1, 1]}',
            ["class_weight", "0 or more"],
        ),
        ('model.decode_head.loss_decode={"loss_weight": -1.0}', ["loss_weight", "0 or more"]),
        (
            'model.decode_head.loss_decode={"type": "FocalLoss", "alpha": 2.0}',
            ["alpha", "from 0 to 1"],
        ),
        (
            'model.decode_head.loss_decode={"type": "OhemCrossEntropy", "thres": 2.0}',
            ["thresh", "at most 1"],
        ),
        ("model.auxiliary_head.in_channels=77", ["auxiliary_head", "77", "32"]),
        ("model.auxiliary_head.in_index=9", ["auxiliary_head"]),
        ("optimizer.type=SDG", ["optimizer.type", "SGD"]),
        ("optimizer.type=LBFGS", ["optimizer.type", "LBFGS"]),
        ("optimizer.lr=fast", ["optimizer.lr"]),
        ("optimizer.lr=NaN", ["optimizer.lr", "NaN"]),
        (
            'model.freeze=["backbone", "decode_head", "auxiliary_head"]',
            ["nothing to train", "model.freeze"],
        ),
        ("optimizer.lr=-1", ["optimizer"]),
        ("optimizer.params=[]", ["optimizer.params", "leave it out"]),
        ("optimizer.paramwise.head=2", ["optimizer.paramwise.head"]),
        ("optimizer.paramwise.custom_keys=3", ["optimizer.paramwise.custom_keys"]),
        ("optimizer.paramwise.norm_decay_mult=x", ["optimizer.paramwise.norm_decay_mult"]),
        ("schedule.max_iters=0", ["schedule.max_iters"]),
        ("schedule.warmup=cosine", ["schedule.warmup"]),
        ("schedule.warmup_iters=-5", ["schedule.warmup_iters"]),
        ("schedule.iteration=3", ["schedule.iteration", "leave it out"]),
        ("schedule.warmup=linear", ["schedule.warmup_iters"]),
        ("schedule.warmup_iters=5", ["schedule.warmup_iters", "Set schedule.warmup"]),
        ("schedule.warmup_ratio=0.1", ["schedule.warmup_ratio", "Set schedule.warmup"]),
        ("schedule.power=-1.0", ["schedule.power", "0 or more"]),
        ("schedule.min_lr=0.02", ["schedule.min_lr", "at most optimizer.lr"]),
        ("optimizer.paramwise.head.lr_mult=-1.0", ["optimizer.paramwise.head", "0 or more"]),
        ("schedule.gamma=0.5", ["schedule.gamma", "Set schedule.policy too"]),
        ("optimizer.paramwise.decay_type=stage_wise", ["decay_type", "layer_decay"]),
        (
            'data={"type": "folder", "root": ".", "classes": ["a"], "fold_seed": 1, '
            '"batch_size": 2, "crop_size": [8, 8]}',
            ["data.fold_seed", "Set data.fold"],
        ),
        ("evaluation.mode=slide", ["evaluation.crop_size"]),
        ("evaluation.crop_size=[32,32]", ["evaluation.crop_size", "Set evaluation.mode"]),
        ("evaluation.interval=0", ["evaluation.interval"]),
        ("evaluation.patience=0", ["evaluation.patience", "null"]),
        ("evaluation.ratios=[]", ["evaluation.ratios"]),
        ("evaluation.ratios=[half,one]", ["evaluation.ratios", "need quotes"]),
        ("evaluation.scale=[0,0]", ["evaluation.scale"]),
        (
            'evaluation={"mode":"slide","crop_size":[32,32],"stride":[48,32]}',
            ["evaluation.stride", "crop_size"],
        ),
        ("checkpoint.keep=0", ["checkpoint.keep"]),
        ("precision=fp8", ["precision", "bf16"]),
        ("clip_grad=0", ["clip_grad"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=9223372036854775808", ["seed", "2**63"]),
        ("seed", ["KEY=VALUE"]),
        ("modle.x=1", ["modle", "model"]),
    ],
)
def test_bad_option(tiny, tmp_path, option, parts):
    with pytest.raises((ConfigError, DataError)) as error:
        config = train.load_config(write_config(tiny, tmp_path), [option])
        train.Data(**config["data"])  # raises what load_config cannot find
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "option,parts,absent",
    [
        ("model.backbone.type=HRNets", ["there is no HRNets", "Did you mean HRNet?"], "heads"),
        ("model.backbone.type=hrnet", ["Did you mean HRNet?"], "heads"),
        ("model.backbone.type=UNetV2", ["there is no UNetV2", "backbones are: "], "mean"),
        ("model.backbone.type=MobileNetV3", ["backbones are: ConvNeXt, "], "mean"),
        ("model.backbone.type=DDRNet", ["backbones are: "], "mean"),
        ("model.decode_head.type=OCRNet", ["heads are: "], "mean"),
        ("model.decode_head.type=null", ["type: is missing; heads are: "], "mean"),
        ('model.decode_head.loss_decode={"type":"CELoss"}', ["losses are: "], "mean"),
        ("data.type=coco", ["data sets are: "], "mean"),
        ("schedule.base_iters=1", ["schedule.base_iters", "max_iters"], "base_lr"),
        ("schedule.iterations=1", ["schedule.iterations"], "iteration?"),
        ("optimizer.param=1", ["optimizer.param"], "params"),
        ("optimizer.paramwize=null", ["did you mean paramwise?"], "params"),
        ("optimizer.paramwise=[1]", ["optimizer.paramwise: is [1], should be of type"], "mean"),
        ("model.test_cfg=slide", ["model.test_cfg: is 'slide', should be of type dict"], "mean"),
        ("model.train_cfg=1", ["model.train_cfg: is 1, should be of type dict"], "mean"),
        ("model.decode_head.threshold=0.4", ["threshold", "8 output channels"], "mean"),
    ],
)
def test_suggestions_are_of_the_same_kind(tiny, tmp_path, option, parts, absent):
    with pytest.raises(ConfigError) as error:
        train.load_config(write_config(tiny, tmp_path), [option])
    for part in parts:
        assert part in str(error.value)
    assert absent not in str(error.value)


def test_command_line_that_is_wrong(capsys):
    for argv, part in (
        ([], "python train.py --config configs/quickstart.json"),
        (["--confg", "x"], "unrecognized arguments: --confg x"),
        (["--wrok-dir", "x"], "unrecognized arguments: --wrok-dir x"),
        (["mine.json"], "a config is named by --config mine.json"),
        (["--lr", "0.1"], "--options optimizer.lr=0.01"),
        (["--config", "x", "--resume-from", ""], "--resume-from: the path is empty"),
    ):
        with pytest.raises(SystemExit):
            train.parse_args(argv)
        assert part in capsys.readouterr().err


def test_main_after_gradients_were_turned_off(tiny, tmp_path):
    tiny["schedule"]["max_iters"] = 1
    argv = ["--config", write_config(tiny, tmp_path), "--no-validate"]
    with torch.no_grad():
        assert train.main(argv) == "done"
        assert not torch.is_grad_enabled()


def test_predict_may_be_repeated():
    args = train.parse_args(["--predict", "a", "b", "--predict", "c"])
    assert args.predict == ["a", "b", "c"]


def test_ctrl_c_prints_no_traceback(tmp_path):
    config = tmp_path / "config.json"
    os.mkfifo(config)  # reading it waits for ever
    argv = [sys.executable, ROOT / "train.py", "--config", config]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    writer = None
    while writer is None and process.poll() is None:
        with contextlib.suppress(OSError):  # it has not opened the file yet
            writer = os.open(config, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n"
    assert process.returncode == -signal.SIGINT
    os.close(writer)


def test_a_run_is_named_in_place_of_its_config(finished, capsys):
    work_dir = finished["work_dir"]
    checkpoint = f"{work_dir}/iter_3.pth"
    for argv, part in (
        (["--eval-only", "--work-dir", work_dir], f"--load-from {work_dir}/best.pth --eval-only"),
        (["--work-dir", work_dir], f"--config {work_dir}/config.json --resume-from auto"),
        (["--resume-from", checkpoint], f"/config.json --resume-from {checkpoint}"),
    ):
        with pytest.raises(SystemExit):
            train.parse_args(argv)
        assert part in capsys.readouterr().err


def test_data_as_a_command_names_the_right_one():
    """It was one, and would do nothing without a word."""
    command = [sys.executable, str(ROOT / "data.py"), "--config", "c.json"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: data.py")
    assert "--check-data" in process.stderr


def test_flags_that_exclude_each_other():
    for flags in ("--eval-only --no-validate", "--predict a --check-data"):
        with pytest.raises(ConfigError, match="leave out one of them"):
            train.main(["--config", "c.json", "--load-from", "w.pth", *flags.split()])


@pytest.mark.parametrize(
    "text,part",
    [
        ("{", "line 1"),
        ("[]", "object"),
        ('{"a": }', "line 1"),
        ("", "line 1"),
        ('{"clip_grad": Infinity}', "Infinity is not a valid value"),
        ('{"data": {"scale": 1, "flip": 1, "scale": 2}}', "the key 'scale' twice"),
    ],
)
def test_config_that_is_not_a_json_object(tmp_path, text, part):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=part):
        train.load_config(tmp_path / "config.json")


def test_config_of_a_windows_editor(tiny, tmp_path):
    text = Path(write_config(tiny, tmp_path)).read_text()
    (tmp_path / "windows.json").write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig")
    assert train.read_config(tmp_path / "windows.json").data == tiny["data"]


def test_config_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="absent.json"):
        train.load_config(tmp_path / "absent.json")


def test_evaluation_without_weights(tiny, run):
    assert "--load-from" in failing(run, tiny, "--eval-only")


# ---------------------------------------------------------------------------------------- The data


def folder_of_images(root: Path, count: int = 4) -> dict:
    """Write a small data set of images of 64x48 pixels. Return the config's data section."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 255, (48, 64, 3), np.uint8)
            label = rng.integers(0, 3, (48, 64), np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    return {
        "type": "folder",
        "root": str(root),
        "image_suffix": ".png",
        "classes": ["a", "b", "c"],
        "batch_size": 2,
        "workers": 0,
        "scale": [64, 48],
        "crop_size": [32, 32],
    }


@pytest.fixture
def on_folder(tiny, tmp_path) -> dict:
    """The tiny config with images in files as its data set."""
    tiny["data"] = folder_of_images(tmp_path / "set")
    set_in_heads(tiny, num_classes=3)
    return tiny


def test_folder_without_faults(on_folder, run):
    run(on_folder)


def test_images_that_change_before_a_resume(on_folder, tmp_path):
    """The samples that follow are others, and the log must say so; a folder may be moved."""
    argv = ["--config", str(write_config(on_folder, tmp_path)), "--no-validate"]
    train.main([*argv, "--options", "schedule.max_iters=1"])
    moved = tmp_path / "moved"
    Path(on_folder["data"]["root"]).rename(moved)
    options = ["--resume-from", "auto", "--options", f"data.root={moved}"]
    log = Path(on_folder["work_dir"], "train.log")
    train.main([*argv, *options, "schedule.max_iters=2"])
    assert "data.root" in log.read_text() and "training images" not in log.read_text()
    for kind in ("images", "labels"):
        (moved / kind / "train/2.png").unlink()
    train.main([*argv, *options, "schedule.max_iters=3"])
    text = " ".join(log.read_text().split())
    assert "warning: the training images are not those of the checkpoint" in text
    assert "number of train images 4 -> 3" in text


def remove_label(root: Path) -> None:
    (root / "labels/train/2.png").unlink()


def change_size_of_label(root: Path) -> None:
    Image.fromarray(np.zeros((48, 60), np.uint8)).save(root / "labels/train/1.png")


def change_value_in_label(root: Path) -> None:
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(root / "labels/train/3.png")


def color_label(root: Path) -> None:
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(root / "labels/val/0.png")


def truncate_image(root: Path) -> None:
    path = root / "images/train/1.png"
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (remove_label, ["train/2.png"]),
        (change_size_of_label, ["labels/train/1.png", "60", "64"]),
        (change_value_in_label, ["labels/train/3.png", "7", "0", "2"]),
        (color_label, ["labels/val/0.png"]),
        (truncate_image, ["images/train/1.png"]),
        (shutil.rmtree, ["/set/images/train"]),
    ],
)
def test_faults_in_the_data_are_named_before_training(on_folder, run, tmp_path, damage, parts):
    """The command prints them; test_data.py covers more of them."""
    damage(tmp_path / "set")
    output = failing(run, on_folder)
    for part in parts:
        assert part in output
    assert not Path(on_folder["work_dir"]).exists()


def test_images_of_8_and_16_bits(on_folder, tmp_path):
    """The check before a training or the first batch names them."""
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "set/images/train/1.png")
    dataset = train.Data(**on_folder["data"] | {"batch_size": 4, "cat_max_ratio": 1.0})
    with pytest.raises(DataError, match=r"0.png \(uint8\) and .*train/1.png \(uint16\)"):
        dataset.check()
    with pytest.raises(DataError, match=r"train/1.png \(torch.float32\)"):
        next(dataset.train_batches())


def test_files_that_may_not_be_read(on_folder, straight, tmp_path):
    dataset = train.Data(**on_folder["data"]).train
    weights = Path(shutil.copy(f"{straight['work_dir']}/latest.pth", tmp_path))
    dataset.load(0)
    for path in (Path(dataset.name(0)), weights):
        path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(DataError, match="0.png: this user may not read it"):
            dataset.load(0)
        with pytest.raises(train.CheckpointError, match="latest.pth"):
            train.load_checkpoint(weights)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    "option,parts",
    [
        ("data.crop_size=[0,32]", ["crop_size"]),
        ("data.batch_size=3", ["batch_size", "3", "2"]),
        ("data.accumulate=4", ["accumulate"]),
        ("model.decode_head.num_classes=4", ["model.decode_head.num_classes", "4", "3"]),
        ("model.auxiliary_head.num_classes=4", ["model.auxiliary_head.num_classes", "4", "3"]),
    ],
)
def test_settings_that_contradict_each_other(on_folder, run, option, parts):
    world_size = 2 if "batch_size" in option else 1
    output = failing(run, on_folder, "--options", option, world_size=world_size)
    for part in parts:
        assert part in output


def test_batch_norm_of_a_single_value(on_folder, run):
    """One image on one process, pooled to 1 x 1, is an error before training."""
    output = failing(run, on_folder, "--options", "data.batch_size=1")
    assert "data.batch_size" in output
    assert "one value per channel" in output
    assert not Path(on_folder["work_dir"]).exists()


# ------------------------------------------------------------------------------------- Checkpoints


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


def flip_a_bit(path: Path) -> bytes:
    """The content of a checkpoint with one bit changed in the middle of its largest tensor."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content[record.header_offset + 200 + record.file_size // 2] ^= 1
    return bytes(content)


def write_wrong_checkpoint(kind: str, path: Path, good: Path) -> None:
    whole = good.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(1000))
    elif kind == "flipped":
        path.write_bytes(flip_a_bit(good))
    elif kind == "torch file with code":
        torch.save({"state_dict": {}, "x": Evil()}, path)
    elif kind == "pickle with code":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        assert kind == "absent"


@pytest.mark.parametrize("flag", ["--resume-from", "--load-from"])
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("absent", "absent.pth does not exist"),
        ("truncated", "is damaged"),
        ("empty", "is damaged"),
        ("zeros", "is damaged"),
        ("flipped", "is damaged"),
        ("torch file with code", "could run code"),
        ("pickle with code", "could run code"),
    ],
)
def test_checkpoint_that_is_refused(straight, tiny, run, tmp_path, flag, kind, part):
    path = tmp_path / f"{kind}.pth"
    write_wrong_checkpoint(kind, path, Path(straight["work_dir"]) / "latest.pth")
    assert part in failing(run, tiny, flag, path)
    assert not (tmp_path / "evil_was_here").exists()
    assert not Path(tiny["work_dir"]).exists()


def test_checkpoint_that_is_a_folder(tmp_path):
    with pytest.raises(train.CheckpointError, match="is a folder; name a checkpoint in it"):
        train.load_checkpoint(tmp_path)


def test_resume_with_another_model(finished, run):
    option = "model.decode_head.channels=24"
    output = failing(run, finished, "--no-validate", "--resume-from", "auto", "--options", option)
    assert "size mismatch" in output


def test_resume_with_another_optimizer(finished, run):
    option = 'optimizer={"type":"AdamW","lr":0.01}'
    output = failing(run, finished, "--no-validate", "--resume-from", "auto", "--options", option)
    assert "holds the state of SGD, the config says AdamW" in output
    assert "--load-from" in output


class HistoryBuffer:
    """Stands in for mmengine's class of this name."""

    def mean(self): ...


def test_checkpoint_of_mmengine_is_read_without_its_objects(
    straight, tiny, run, tmp_path, monkeypatch
):
    """MMSegmentation 1.x saves its log as objects; none of their code is loaded or run."""
    with monkeypatch.context() as context:
        name = "mmengine.logging.history_buffer"
        module = types.ModuleType(name)
        module.HistoryBuffer = HistoryBuffer
        context.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        context.setitem(sys.modules, name, module)
        context.setattr(HistoryBuffer, "__module__", name)
        context.setattr(HistoryBuffer.mean, "__module__", name)
        log = HistoryBuffer()
        log.values = np.arange(3.0)
        log.methods = {"mean": HistoryBuffer.mean}
        content = {
            "state_dict": checkpoint(straight)["state_dict"],
            "meta": {"dataset_meta": {"classes": ("a",)}},
            "message_hub": {"log_scalars": {"train/loss": log}},
        }
        torch.save(content, tmp_path / "mm.pth")
    output = run(tiny, "--no-validate", "--load-from", tmp_path / "mm.pth").output()
    assert re.search(r"weights from .*mm.pth: loaded (\d+) of \1 tensors\n", output), output


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "zeros", "not finite"])
def test_auto_falls_back_to_the_last_good_checkpoint(straight, finished, run, damage):
    folder = Path(finished["work_dir"])
    path = folder / "iter_6.pth"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "zeros":
        path.write_bytes(bytes(len(content)))
    else:
        state = checkpoint(finished)
        state["state_dict"]["decode_head.conv_seg.bias"][0] = float("nan")
        torch.save(state, path)
    output = run(finished, "--resume-from", "auto").output()
    assert "iter_6.pth" in output
    assert re.search(r"resumed from .*iter_3.pth at iteration 3", output)
    assert_same_run(straight, finished)


def test_flipped_bit_is_noticed_or_without_effect(straight, tmp_path):
    """Flip bits all over the file; only those in padding may have no effect."""
    whole = (Path(straight["work_dir"]) / "latest.pth").read_bytes()
    good = checkpoint(straight)
    path = tmp_path / "flipped.pth"
    dice = random.Random(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        try:
            assert_same(train.load_checkpoint(path), good)
        except train.CheckpointError:
            refused += 1
    assert refused > 200


def test_log_sizes_in_a_checkpoint_are_not_trusted(finished, run, tmp_path):
    """Neither a negative size nor a file outside of the work_dir does harm."""
    path = Path(finished["work_dir"]) / "iter_6.pth"
    torch.save(checkpoint(finished) | {"logs": {"train.log": -1, "../config.json": 0}}, path)
    process = run(finished, "--no-validate", "--resume-from", "auto", expect=None)
    assert "Traceback" not in process.output()
    assert (tmp_path / "config.json").stat().st_size > 0


# --------------------------------------------------------------------------- The work_dir and disks


def test_work_dir_below_a_file(tiny, run, tmp_path):
    (tmp_path / "file").write_text("")
    output = failing(run, tiny, "--work-dir", tmp_path / "file" / "work")
    assert f"work_dir {tmp_path}/file/work cannot be written" in output


def test_a_second_name_without_hard_links_is_a_copy(tmp_path, monkeypatch):
    def refuse(*paths: Path) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "iter_1.pth").write_bytes(b"weights")
    train.link(tmp_path / "iter_1.pth", tmp_path / "latest.pth")
    assert (tmp_path / "latest.pth").read_bytes() == b"weights"
    assert len(list(tmp_path.iterdir())) == 2


def test_work_dir_that_holds_a_run(finished, run):
    """A second start without --resume-from changes nothing in it."""
    before = files_of(finished)
    assert "--resume-from auto" in failing(run, finished)
    assert files_of(finished) == before


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        skip("needs root, to mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_work_dir_on_a_read_only_disk(tiny, run, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    output = failing(run, tiny, "--work-dir", disk / "work")
    assert f"work_dir {disk}/work cannot be written" in output


def test_work_dir_that_is_deleted_during_a_run(tmp_path):
    run_dir = train.RunDir(tmp_path / "work", keep=2)
    run_dir.path.mkdir()
    run_dir.open_logs()
    shutil.rmtree(run_dir.path)
    run_dir.save({"iteration": 1}, ["iter_1.pth", "latest.pth"])
    assert run_dir.save_error is None
    assert train.load_checkpoint(run_dir.path / "latest.pth")["iteration"] == 1
    assert "deleted during the run" in (run_dir.path / "train.log").read_text()


def test_auto_takes_a_checkpoint_that_was_copied_alone(finished, tmp_path):
    for name in ("best.pth", "latest.pth"):
        shutil.copy(Path(finished["work_dir"]) / name, tmp_path)
        path, checkpoint, _ = train.find_checkpoint(tmp_path)
        assert path == tmp_path / name
        assert checkpoint["iteration"] > 0


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def is_sound(folder: Path, keep: int) -> bool:
    """All checkpoints load, and there are at most `keep`, or one more after a kill."""
    found = train.newest_checkpoints(folder)
    for path in [*found, *folder.glob("latest.pth"), *folder.glob("best.pth")]:
        train.load_checkpoint(path)
    return len(found) <= keep + 1


@pytest.mark.parametrize("lasting", [False, True])
def test_full_disk(tiny, run, disk, lasting):
    """A failed save is reported and costs no earlier checkpoint; the run goes on.

    It ends with an error only if the last checkpoint could not be written.
    """
    tiny["schedule"]["max_iters"] = 60
    tiny["checkpoint"] = {"interval": 2, "keep": 2}
    tiny["work_dir"] = str(disk / "work")
    folder = disk / "work"
    filler = disk / "filler"
    process = run(tiny, "--no-validate", started=True)
    wait_for(lambda: (folder / "iter_4.pth").exists(), process)
    fill(filler)
    wait_for(lambda: "could not be written" in process.output(), process)
    if not lasting:
        filler.unlink()
    codes = process.wait()
    output = process.output()
    assert "Traceback" not in output, output
    if lasting:
        assert codes == [1], output
        message = "error: the last checkpoint .*No space left on device"
        assert re.search(message, output), output
        filler.unlink()
    else:
        assert codes == [0], output
        assert checkpoint(tiny)["iteration"] == 60
    assert is_sound(folder, keep=2)
    run(tiny, "--no-validate", "--resume-from", "auto")
    assert iterations(tiny) == list(range(1, 61))


# --------------------------------------------------------------------- A validation that goes wrong


@pytest.mark.parametrize("checkpoint_interval, last", [(2, 2), (3, 2), (6, 6)])
def test_a_validation_that_fails_costs_no_iteration(on_folder, tmp_path, checkpoint_interval, last):
    """The state is saved, whether a checkpoint is due or not, and a resume makes up for it.

    After the last of the six iterations, a resume only validates.
    """
    shutil.rmtree(tmp_path / "set")
    on_folder["data"] = folder_of_images(tmp_path / "set", count=12)
    on_folder["evaluation"]["interval"] = last
    on_folder["checkpoint"]["interval"] = checkpoint_interval
    straight = sibling(on_folder, "straight")
    argv = ["--config", str(write_config(straight, tmp_path))]
    train.main(argv)

    # Not one of the files that are decoded before the start.
    image = tmp_path / "set" / "images" / "val" / "10.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    argv = ["--config", str(write_config(on_folder, tmp_path)), "--resume-from", "auto"]
    for _ in ("while training", "when the resume makes up for it"):
        with pytest.raises(DataError, match="val/10.png"):
            train.main(argv)
        saved = checkpoint(on_folder, f"iter_{last}.pth")
        assert saved["validated"] is False
        assert iterations(on_folder) == list(range(1, last + 1))
    image.write_bytes(whole)
    train.main(argv)
    assert_same_run(straight, on_folder)
    assert checkpoint(on_folder)["validated"] is True
    log = (Path(on_folder["work_dir"]) / "train.log").read_text()
    assert f"to come: iterations: {6 - last}, validations: {6 // last}" in log


def without_head(content: dict) -> None:
    for key in list(content["state_dict"]):
        if key.startswith("decode_head"):
            del content["state_dict"][key]


def without_one_layer(content: dict) -> None:
    del content["state_dict"]["backbone.layer2.0.conv1.weight"]


def of_other_shape(content: dict) -> None:
    content["state_dict"]["decode_head.conv_seg.weight"] = torch.zeros(3, 16, 1, 1)


def classes_in_another_order(content: dict) -> None:
    content["classes"].reverse()


def fewer_classes(content: dict) -> None:
    content["classes"].pop()


def other_classes_of_mmsegmentation(content: dict) -> None:
    content["meta"] = {"CLASSES": (*content.pop("classes")[:-1], "giraffe")}


def other_classes_of_mmengine(content: dict) -> None:
    classes = [*content.pop("classes"), "giraffe"]
    content["meta"] = {"dataset_meta": {"classes": classes}}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (without_head, "decode_head"),
        (without_one_layer, "backbone.layer2.0.conv1.weight"),
        (of_other_shape, "decode_head.conv_seg.weight"),
        (classes_in_another_order, "in another order"),
        (fewer_classes, "it has 7, the data set 8"),
        (other_classes_of_mmsegmentation, "number 7 is 'giraffe' there"),
        (other_classes_of_mmengine, "it has 9, the data set 8"),
    ],
)
def test_only_the_weights_of_this_network_and_these_classes_are_scored(
    straight, tiny, tmp_path, change, part
):
    """A training may start from them, and says what does not fit."""
    content = checkpoint(straight)
    change(content)
    torch.save(content, tmp_path / "changed.pth")
    argv = ["--config", str(write_config(tiny, tmp_path)), "--load-from"]
    argv.append(str(tmp_path / "changed.pth"))
    with pytest.raises(train.UserError, match=part):
        train.main([*argv, "--eval-only"])
    assert not Path(tiny["work_dir"]).exists()
    train.main([*argv, "--no-validate", "--options", "schedule.max_iters=1"])
    assert part in (Path(tiny["work_dir"]) / "train.log").read_text()


def test_weights_without_auxiliary_head_are_scored(straight, tiny, tmp_path):
    """The names of the classes may be written in another way."""
    content = checkpoint(straight)
    state = content["state_dict"]
    kept = {key: value for key, value in state.items() if not key.startswith("auxiliary")}
    classes = [f"{name[0].upper()}_{name[1:]}" for name in content["classes"]]
    torch.save({"state_dict": kept, "meta": {"CLASSES": classes}}, tmp_path / "kept.pth")
    argv = ["--config", str(write_config(tiny, tmp_path)), "--eval-only", "--load-from"]
    assert train.main([*argv, str(tmp_path / "kept.pth")]) == "done"


def test_log_has_warnings_and_what_changed_since_the_training(on_folder, tmp_path, capfd):
    """Parameters of a network do not show that it was trained with another normalization."""
    argv = ["--config", str(write_config(on_folder, tmp_path)), "--no-validate", "--options"]
    options = ["schedule.max_iters=1", "data.std=[0.2,0.2,0.2]"]
    train.main([*argv, *options])
    log = Path(on_folder["work_dir"], "train.log")
    assert "warning: data.mean and data.std" in log.read_text()
    assert "data.py" not in capfd.readouterr().err
    weights = Path(on_folder["work_dir"], "latest.pth")
    options = ["data.std=[50,50,50]", "model.decode_head.align_corners=true", "log.interval=2"]
    argv = ["--config", str(tmp_path / "config.json"), "--eval-only", "--load-from", str(weights)]
    train.main([*argv, "--options", *options])
    changes = [line for line in log.read_text().splitlines() if "changed since then" in line]
    assert [line.split()[5] for line in changes] == ["model.decode_head.align_corners", "data.std"]


def test_an_output_that_is_not_finite_is_named(on_folder, run, tmp_path):
    """The image is named by every process, not only by the one that evaluated it."""
    for path in (tmp_path / "set" / "images").glob("*/*.png"):
        pixels = np.asarray(Image.open(path)).astype(np.float32)
        if path.stem == "2" and path.parent.name == "val":
            pixels[:] = 1e38  # finite, but not if divided by std
        np.save(path.with_suffix(".npy"), pixels)
        path.unlink()
    on_folder["data"] |= {"image_suffix": ".npy", "std": [1e-3, 1e-3, 1e-3]}
    output = failing(run, on_folder, world_size=2)
    message = r"output for 1 of 4 images is not finite: .*/val/2.npy\."
    assert len(re.findall(message, output)) == 2, output
    assert checkpoint(on_folder)["iteration"] == 6


def test_an_image_that_is_too_small_is_named(on_folder, tmp_path):
    on_folder["model"] = copy.deepcopy(WITHOUT_BATCH_NORM)
    on_folder["model"]["decode_head"]["num_classes"] = 3
    for kind in ("images", "labels"):
        path = tmp_path / "set" / kind / "val" / "1.png"
        Image.open(path).crop((0, 0, 20, 14)).save(path)
    argv = ["--config", str(write_config(on_folder, tmp_path))]
    options = ["--options", "evaluation.scale=null"]
    with pytest.raises(train.UserError, match=r"val/1.png: the network cannot take .*\[14, 20\]"):
        train.main([*argv, *options])


def test_resuming_from_an_earlier_checkpoint_leaves_no_later_best(finished, run):
    """best.pth and later checkpoints belong to the course that is abandoned."""
    folder = Path(finished["work_dir"])
    path = folder / "iter_3.pth"
    run(finished, "--no-validate", "--resume-from", path, "--options", "optimizer.lr=0.001")
    assert not (folder / "best.pth").exists()
    assert checkpoint(finished, "best.pth.old")["iteration"] == 6
    assert list(folder.glob("iter_*.old")) == []  # it went when the new iter_6.pth was written
    # A best one that is still there is found again.
    torch.save(
        checkpoint(finished) | {"best": {"mIoU": 0.5, "iteration": 3}}, folder / "iter_6.pth"
    )
    run(finished, "--no-validate", "--resume-from", "auto")
    assert checkpoint(finished, "best.pth")["iteration"] == 3


# -------------------------------------------------------------------------- Numbers that go wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_that_is_not_finite_stops_the_run(tiny, run, tmp_path, world_size):
    """The error names iteration and files; the command that it prints repeats that iteration."""
    tiny["data"] = folder_of_images(tmp_path / "set", count=16)
    tiny["data"] |= {
        "image_suffix": None,
        "in_channels": 3,
        "ratio_range": [1.0, 1.0],
        "cat_max_ratio": 1.0,
    }
    set_in_heads(tiny, num_classes=3)
    images = tmp_path / "set" / "images" / "train"
    for i in range(16):
        (images / f"{i}.png").unlink()
        value = np.nan if i == 5 else i  # not among those that are checked before
        np.save(images / f"{i}.npy", np.full((48, 64, 3), value, np.float32))
    output = run(tiny, "--no-validate", world_size=world_size, expect=1).output()

    message = (
        r"the loss of iteration (\d+) \(counted from 0\) is not finite: .* "
        "The weights were not updated"
    )
    (iteration,) = {int(number) for number in re.findall(message, output)}
    dataset = train.Data(**tiny["data"])
    first = iteration * dataset.batch_size
    positions = range(first, first + dataset.batch_size)
    files = dataset.sample_files(positions)
    assert str(images / "5.npy") in files
    for position, name in zip(positions, files):
        assert f"{position} {name}\n" in output

    launcher = "(?:python|torchrun --standalone --nproc_per_node=2)"
    command = re.search(rf"To repeat iteration \d+: {launcher} train.py (.*)", output)[1].split()
    again = Run(command, tmp_path, world_size)
    assert set(again.wait()) == {1}
    line = r"the loss of iteration .*"
    assert re.search(line, again.output())[0] == re.search(line, output)[0]


def test_update_that_breaks_the_weights_is_named(tiny, run):
    """Iteration 1 has the loss that is not finite, but the update of iteration 0 caused it."""
    tiny["optimizer"] = {"type": "SGD", "lr": 1e39}
    output = run(tiny, "--no-validate", expect=1).output()
    message = r"the loss of iteration 1 .*The update of iteration 0 broke the weights"
    assert re.search(message, output)
    assert "\n  0 synthetic scene" in output


def test_weights_that_are_not_finite_are_not_saved(tiny, run):
    """The loss of iteration 0 is finite, but the weights after it are not."""
    tiny["optimizer"] = {"type": "SGD", "lr": 1e39}
    tiny["checkpoint"]["interval"] = 1
    output = failing(run, tiny, "--no-validate")
    assert "values that are not finite in" in output
    assert not list(Path(tiny["work_dir"]).glob("iter_*.pth"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_unused_parameters_are_named_at_the_first_step(tiny, run, world_size):
    """One process warns; for several, which average gradients, it is an error."""
    # Neither head reads the fourth stage.
    tiny["model"]["decode_head"] = dict(tiny["model"]["auxiliary_head"], channels=16)
    expect = 0 if world_size == 1 else 1
    output = run(tiny, "--no-validate", world_size=world_size, expect=expect).output()
    assert re.search(r"no loss depends on \d+ parameters: backbone\.layer4", output)
    assert "Traceback" not in output


# --------------------------------------------------------------------------------------- Processes


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_file_that_is_lost_costs_no_iteration(on_folder, tmp_path, monkeypatch):
    """What was trained before is saved, though no checkpoint was due."""
    path = tmp_path / "set" / "images" / "train" / "1.png"
    crops = []

    def lose_file(image, label):
        crops.append(image)
        if len(crops) == 1 + 4 * 2:  # one is for the check, and two for each iteration
            path.unlink()
        return image, label

    monkeypatch.setitem(TRANSFORMS, "Lose", lambda: lose_file)
    on_folder["data"] |= {"batch_size": 2, "transforms": [{"type": "Lose"}]}
    on_folder["checkpoint"]["interval"] = 6
    argv = ["--config", str(write_config(on_folder, tmp_path)), "--no-validate"]
    with pytest.raises(DataError, match="train/1.png: this file no longer exists"):
        train.main(argv)
    assert checkpoint(on_folder)["iteration"] in (4, 5)


def test_killed_worker_ends_the_run(tiny, run):
    tiny["schedule"]["max_iters"] = 10000
    tiny["data"]["workers"] = 1
    process = run(tiny, "--no-validate", started=True)
    wait_for(lambda: last_iteration(tiny) > 2, process)
    worker = children_of(process.processes[0].pid)[0]
    os.kill(worker, signal.SIGKILL)
    assert process.wait(30) == [1]
    assert "error: a data worker has died" in process.output()
    assert "Traceback" not in process.output()


def test_ranks_that_differ(tiny, tmp_path):
    """As with other code, another config or other data on one of several machines."""
    argv = ["--config", str(write_config(tiny, tmp_path))]
    log = tmp_path / "out"
    port = free_port()
    processes = []
    for rank, options in enumerate(([], ["--options", "optimizer.lr=1", "data.length=9"])):
        environment = rank_environment(rank, 2, port)
        arguments = ([*argv, *options], environment, str(log), str(tmp_path), str(ROOT))
        processes.append(SERVER.Process(target=run_train, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 1
    for part in ("error: rank 1 on ", "optimizer.lr 0.01 -> 1", "number of train images 10 -> 9"):
        assert part in log.read_text()
    assert not Path(tiny["work_dir"]).exists()


def test_output_that_cannot_be_written(tiny, tmp_path):
    """As on a full disk, after Ctrl-C under `| tee log`, or when the terminal closes."""
    argv = ["--config", str(write_config(tiny, tmp_path))]
    arguments = (argv, {}, "/dev/full", str(tmp_path), str(ROOT))
    process = SERVER.Process(target=run_train, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert checkpoint(tiny)["iteration"] == 6


def test_output_in_ascii(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    train.escape_output()
    train.write_line("B\xe4ume")
    assert output.buffer.getvalue() == b"B\\xe4ume\n"


def test_training_in_a_thread(tiny, tmp_path):
    """As libraries for hyperparameter search do it. Signals are not for such a run."""
    tiny["data"]["workers"] = 1
    argv = ["--config", str(write_config(tiny, tmp_path))]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(train.main, argv).result(timeout=120) == "done"
    assert checkpoint(tiny)["iteration"] == 6


# -------------------------------------------------------------------------- Killed at any moment


def crash_config(work_dir: Path) -> dict:
    config = tiny_config(work_dir)
    config["schedule"]["max_iters"] = 16
    config["checkpoint"] = {"interval": 2, "keep": 2}
    config["evaluation"]["interval"] = 5
    config["timeout"] = 8
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], tuple[dict, float]]:
    """`undisturbed(world_size)` -> the config and the seconds of a run that is not killed."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def finish(world_size: int) -> tuple[dict, float]:
        config = crash_config(folder / f"world_size{world_size}")
        began = time.monotonic()
        process = Run(["--config", write_config(config, folder)], folder, world_size)
        assert set(process.wait()) == {0}, process.output()
        return config, time.monotonic() - began

    return finish


def wait_for_a_save(folder: Path, process: Run) -> None:
    """Wait until a checkpoint is being written, or has been written if that went unseen."""
    before = set(folder.glob("iter_*.pth"))

    def saving() -> bool:
        if any(".tmp" in path.name for path in folder.glob(".iter*")):
            return True
        return set(folder.glob("iter_*.pth")) > before

    wait_for(saving, process)


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(run, undisturbed, tmp_path, number):
    """Kill all or one of the processes, at a random time or during a save, and resume."""
    dice = random.Random(number)
    world_size = 1 + number % 2
    straight, seconds = undisturbed(world_size)
    killed = crash_config(tmp_path / "killed")
    folder = Path(killed["work_dir"])
    for _ in range(dice.randint(1, 4)):
        process = run(killed, "--resume-from", "auto", world_size=world_size, started=True)
        if dice.random() < 0.5:
            time.sleep(dice.uniform(0, seconds))
        else:
            wait_for_a_save(folder, process)
        victims = process.processes
        if dice.random() >= 0.5:
            victims = [dice.choice(process.processes)]
        for victim in victims:
            victim.kill()
        process.wait()
        assert is_sound(folder, keep=2)
    run(killed, "--resume-from", "auto", world_size=world_size)
    assert_same_run(straight, killed)
    assert len(train.newest_checkpoints(folder)) == 2
    assert not list(folder.glob(".*.tmp"))


# --------------------------------------------------------------------------------- Random configs

WORDS = [
    "", "x", "ResNet", "MixVisionTransformer", "PSPHead", "ASPPHead", "OCRHead", "UPerHead",
    "folder", "synthetic", "voc", "SGD", "AdamW", "LBFGS", "SparseAdam", "Adafactor", "slide",
    "linear", "fp64", "bf16", "fp16", "multiple_select", "None", "[", "{split}", "\0", "é",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 7, 64, 1.5, -0.5, 1e-9, 1e300, float("inf"), float("nan"),
    2**31, 10**12, 2**63,
]  # fmt: skip


def random_value(dice: random.Random, depth: int = 2) -> object:
    kinds = ["word", "word", "number", "number", "constant"]
    if depth:
        kinds += ["dict", "list", "list"]
    kind = dice.choice(kinds)
    if kind == "word":
        return dice.choice(WORDS)
    if kind == "number":
        return dice.choice(NUMBERS)
    if kind == "constant":
        return dice.choice([True, False, None])
    if kind == "list":
        return [random_value(dice, depth - 1) for _ in range(dice.randrange(5))]
    section = {}
    for _ in range(dice.randrange(3)):
        key = dice.choice(["type", "lr_mult", *WORDS])
        section[key] = random_value(dice, depth - 1)
    return section


def mutate(config: dict, dice: random.Random) -> tuple[dict, list[str]]:
    """One to three random changes of a config, some of them as options."""
    config = copy.deepcopy(config)
    options = []
    for _ in range(dice.randint(1, 3)):
        place = dice.choice(places(config))
        value = random_value(dice)
        how = dice.choice(["replace", "replace", "option", "remove", "add"])
        section = section_of(config, place)
        if how == "option":
            text = value if isinstance(value, str) else json.dumps(value)
            options.append(".".join(map(str, place)) + "=" + text)
        elif how == "remove":
            del section[place[-1]]
        elif how == "add" and isinstance(section, dict):
            section[dice.choice(WORDS)] = value
        else:
            section[place[-1]] = value
    return config, options


def test_random_config_is_a_run_or_a_clear_error(tiny, tmp_path, monkeypatch):
    """Each config trains for one iteration or raises an error that the user can fix."""
    monkeypatch.chdir(tmp_path)
    refused = 0
    ran = 0
    for number in range(FUZZ):
        config, options = mutate(tiny, random.Random(number))
        options += ["schedule.max_iters=1", "compile=false"]  # to save time
        path = write_config(config, tmp_path)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            workers = train.load_config(path, options)["data"].get("workers", 0)
            if workers < 3:
                flags = ["--config", str(path), "--work-dir", str(tmp_path / "out")]
                train.main([*flags, "--options", *options])
            ran += 1
        except train.UserError as error:
            assert len(str(error)) > 20
            refused += 1
        except BaseException as error:
            raise AssertionError(f"case {number}: {options}\n{json.dumps(config)}") from error
    print(f"\nfuzz: {refused} refused, {ran} ran")
    assert refused > 0
    assert ran > 0


# ------------------------------------------------------------------------------------- A long run


def resources(process: Run) -> dict[int, tuple[int, int]]:
    """Unshared memory in MiB, and the number of open files, of each process and data worker."""
    found = {}
    pids = [process.pid for process in process.processes]
    for pid in pids:
        pids += children_of(pid)  # visited next
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
        memory = (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") >> 20
        found[pid] = (memory, len(os.listdir(f"/proc/{pid}/fd")))
    return found


def test_long_run(tiny, run):
    """A run that is stopped three times keeps memory and open files flat and its logs whole."""
    tiny["schedule"]["max_iters"] = LONG
    tiny["data"] |= {"workers": 1, "length": 97}
    tiny["model"] = WITHOUT_BATCH_NORM
    tiny["evaluation"]["interval"] = LONG // 8
    tiny["checkpoint"] = {"interval": max(LONG // 40, 10), "keep": 2}
    memory = []
    files = []
    for quarter in range(4):
        process = run(tiny, "--resume-from", "auto", world_size=2, started=True)
        begin = LONG * (quarter + 0.4) / 4
        end = LONG * (quarter + 0.95) / 4
        wait_for(lambda begin=begin: last_iteration(tiny) >= begin, process, 1800)
        before = resources(process)
        wait_for(lambda end=end: last_iteration(tiny) >= end, process, 1800)
        after = resources(process)
        assert before.keys() == after.keys()
        memory += [after[pid][0] - before[pid][0] for pid in before]
        files += [after[pid][1] - before[pid][1] for pid in before]
        if quarter < 3:
            process.processes[0].terminate()
            assert process.wait(1800) == [143, 143], process.output()
        else:
            assert process.wait(1800) == [0, 0], process.output()
    print(f"\nlong: {LONG} iterations; growth in MiB {memory}, in open files {files}")
    assert max(memory) < 16
    assert max(files) <= 24  # of batches on their way from a worker
    assert iterations(tiny) == list(range(1, LONG + 1))
    log = (Path(tiny["work_dir"]) / "train.log").read_text()
    assert len(re.findall(r"Iter \[", log)) == LONG
