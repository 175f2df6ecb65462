"""Errors that a user can cause: each says what, where and what to do, on one "error: ..." without a traceback, and leaves nothing half done."""

import copy
import json
import os
import pickle
import re
import socket
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import DataError
from models import ConfigError


def failing(run, config: dict, *argv, world_size: int = 1, env: dict | None = None) -> str:
    """The output of a run that must end with an error of ours, not with a traceback."""
    process = run(config, *argv, world_size=world_size, env=env, expect=None)
    output = process.output()
    assert set(process.wait()) == {1}, output
    assert "error: " in output and "Traceback" not in output, output
    return output


def paths(section: dict, place: tuple = ()) -> list[tuple]:
    return [
        path
        for key, value in section.items()
        for path in [(*place, key)]
        + (paths(value, (*place, key)) if isinstance(value, dict) else [])
    ]


def test_misspelled_key_anywhere(tiny, tmp_path):
    """Every key of the config, misspelled in turn: named with its place and the right one."""
    for path in paths(tiny):
        if "paramwise" in path:
            continue
        config = copy.deepcopy(tiny)
        section = config
        for key in path[:-1]:
            section = section[key]
        wrong = path[-1][:-1] + "qx"
        section[wrong] = section.pop(path[-1])
        (tmp_path / "c.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError) as error:
            train.load_config(tmp_path / "c.json")
        place = ".".join([*path[:-1], wrong])
        missing = ".".join(path)
        assert (
            place in str(error.value)
            and f"did you mean {path[-1]}" in str(error.value)
            or missing in str(error.value)
        ), (path, str(error.value))


@pytest.mark.parametrize(
    "option,parts",
    [
        ("data.batch_size=four", ["data.batch_size", "four", "int"]),
        ("data.batch_size=2.5", ["data.batch_size", "2.5"]),
        ("data.batch_size=0", ["batch_size"]),
        ("data.crop_size=[48]", ["data.crop_size"]),
        ("data.workers=-1", ["workers"]),
        ("data.type=citiscapes", ["data.type", "cityscapes"]),
        ("model.backbone.type=ResNetV1", ["model.backbone.type", "ResNet"]),
        ("model.backbone.depth=20", ["model.backbone", "20"]),
        ("model.backbone.with_cp=1", ["model.backbone.with_cp", "bool"]),
        ("model.decode_head.in_channels=63", ["63", "64"]),
        ("optimizer.type=SDG", ["optimizer.type", "SGD"]),
        ("optimizer.lr=fast", ["optimizer.lr"]),
        ("optimizer.lr=-1", ["optimizer"]),
        ("optimizer.paramwise.head=2", ["optimizer.paramwise.head"]),
        ("schedule.max_iters=0", ["schedule.max_iters"]),
        ("schedule.warmup=cosine", ["schedule.warmup"]),
        ("evaluation.mode=slide", ["evaluation.crop_size"]),
        ("evaluation.interval=0", ["evaluation.interval"]),
        ("checkpoint.keep=0", ["checkpoint.keep"]),
        ("precision=fp8", ["precision", "bf16"]),
        ("clip_grad=0", ["clip_grad"]),
        ("modle.x=1", ["modle", "model"]),
        ("seed", ["KEY=VALUE"]),
        ("model.backbone.depth.x=1", ["model.backbone.depth.x=1"]),
        ("model.auxiliary_head.in_channels=77", ["auxiliary_head", "77", "32"]),
        ("model.auxiliary_head.in_index=9", ["auxiliary_head"]),
        ("schedule.iteration=3", ["schedule.iteration", "leave it out"]),
        ("optimizer.params=[]", ["optimizer.params", "leave it out"]),
        ("optimizer.paramwise.custom_keys=3", ["optimizer.paramwise.custom_keys"]),
        ("optimizer.paramwise.norm_decay_mult=x", ["optimizer.paramwise.norm_decay_mult"]),
        ("optimizer.type=LBFGS", ["optimizer.type", "LBFGS"]),
        ("data.type=[1]", ["data.type"]),
        ("data.lenght=4", ["data.lenght", "data set synthetic", "length"]),
        ("seed=-1", ["seed", "-1"]),
        ("evaluation.ratios=[]", ["evaluation.ratios"]),
        ("evaluation.scale=[0,0]", ["evaluation.scale"]),
        (
            'evaluation={"mode":"slide","crop_size":[32,32],"stride":[48,32]}',
            ["evaluation.stride", "crop_size"],
        ),
        ("schedule.warmup_iters=-5", ["schedule.warmup_iters"]),
    ],
)
def test_bad_options(tiny, tmp_path, option, parts):
    (tmp_path / "c.json").write_text(json.dumps(tiny))
    with pytest.raises((ConfigError, DataError)) as error:
        config = train.load_config(tmp_path / "c.json", [option])
        train.Data(**config["data"])  # what only the data section itself can know
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "text,part", [("{", "line 1"), ("[]", "object"), ('{"a": }', "line 1"), ("", "line 1")]
)
def test_bad_config_file(tmp_path, text, part):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=part):
        train.load_config(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="absent.json"):
        train.load_config(tmp_path / "absent.json")


def folder_of_images(root: Path, count: int = 4, size: tuple[int, int] = (64, 48)) -> dict:
    """A tiny `folder` data set; returns its config section."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(
                root / "images" / split / f"{i}.png"
            )
            Image.fromarray(rng.integers(0, 3, size[::-1], np.uint8)).save(
                root / "labels" / split / f"{i}.png"
            )
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
def on_folder(tiny, tmp_path):
    tiny["data"] = folder_of_images(tmp_path / "set")
    for head in ("decode_head", "auxiliary_head"):
        tiny["model"][head]["num_classes"] = 3
    return tiny


def test_folder_runs(on_folder, run):
    run(on_folder)


def test_missing_folder(on_folder, run):
    on_folder["data"]["root"] += "/absent"
    assert "/set/absent" in failing(run, on_folder)


def test_image_without_label(on_folder, run, tmp_path):
    (tmp_path / "set/labels/train/2.png").unlink()
    output = failing(run, on_folder)
    assert "images/train/2.png" in output or "labels/train/2.png" in output


def test_sizes_that_differ(on_folder, run, tmp_path):
    Image.fromarray(np.zeros((48, 60), np.uint8)).save(tmp_path / "set/labels/train/1.png")
    output = failing(run, on_folder)
    assert "labels/train/1.png" in output and "60" in output and "64" in output


def test_label_value_outside(on_folder, run, tmp_path):
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(tmp_path / "set/labels/train/3.png")
    output = failing(run, on_folder)
    assert "labels/train/3.png" in output and "7" in output and "0" in output and "2" in output


def test_color_label(on_folder, run, tmp_path):
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "set/labels/val/0.png")
    assert "labels/val/0.png" in failing(run, on_folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image(on_folder, run, tmp_path, workers):
    on_folder["data"]["workers"] = workers
    path = tmp_path / "set/images/train/1.png"
    path.write_bytes(path.read_bytes()[:500])
    assert "images/train/1.png" in failing(run, on_folder)


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
def test_what_does_not_go_together(on_folder, run, option, parts):
    output = failing(
        run, on_folder, "--options", option, world_size=2 if "batch_size" in option else 1
    )
    for part in parts:
        assert part in output


def test_one_value_per_channel(on_folder, run):
    """A batch of one image in one process, pooled to 1 x 1: said before training."""
    output = failing(run, on_folder, "--options", "data.batch_size=1")
    assert "data.batch_size" in output and "one value a channel" in output
    assert not Path(on_folder["work_dir"]).exists()


def test_other_net(tiny, run):
    run(tiny, "--no-validate")
    assert "size mismatch" in failing(
        run,
        tiny,
        "--no-validate",
        "--resume-from",
        "auto",
        "--options",
        "model.decode_head.channels=24",
    )


def test_other_optimizer(tiny, run):
    run(tiny, "--no-validate")
    output = failing(
        run,
        tiny,
        "--no-validate",
        "--resume-from",
        "auto",
        "--options",
        'optimizer={"type":"AdamW","lr":0.01}',
    )
    assert "holds the state of SGD, the config says AdamW" in output and "--load-from" in output


def test_images_of_different_depth(on_folder, run, tmp_path):
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(tmp_path / "set/images/train/1.png")
    on_folder["data"]["batch_size"] = 4
    assert "images/train/1.png: float32" in failing(
        run, on_folder, "--options", "data.cat_max_ratio=1.0"
    )


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


@pytest.mark.parametrize("flag", ["--resume-from", "--load-from"])
def test_checkpoints_that_are_refused(tiny, run, tmp_path, flag):
    """Missing, no checkpoint at all, damaged, and one that would run code."""
    run(tiny, "--no-validate")
    other = copy.deepcopy(tiny)
    other["work_dir"] += "_other"
    good = Path(tiny["work_dir"]) / "latest.pth"
    assert "absent.pth does not exist" in failing(run, other, flag, tmp_path / "absent.pth")
    whole = good.read_bytes()
    for name, content in {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "zeros": bytes(1000),
        "flipped": flipped(good),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "is damaged" in failing(run, other, flag, tmp_path / name), name
    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "evil.pkl"):
        assert "could run code" in failing(run, other, flag, tmp_path / name)
    assert not (tmp_path / "evil_was_here").exists()
    assert not Path(other["work_dir"]).exists()


def test_a_checkpoint_of_mmengine_is_read_without_its_objects(tiny, run, tmp_path, monkeypatch):
    """`iter_N.pth` of MMSegmentation 1.x holds its log as objects of mmengine and numpy; they are left out, and nothing of them runs."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.logging", types.ModuleType("mmengine.logging"))
    monkeypatch.setitem(sys.modules, "mmengine.logging.history_buffer", module)
    exec(
        "class HistoryBuffer:\n    __module__ = 'mmengine.logging.history_buffer'\n    def mean(self): ...",
        module.__dict__,
    )
    sys.modules["mmengine"].logging, sys.modules["mmengine.logging"].history_buffer = (
        sys.modules["mmengine.logging"],
        module,
    )
    log = module.HistoryBuffer()
    log.values, log.methods = np.arange(3.0), {"mean": module.HistoryBuffer.mean}
    run(tiny, "--no-validate")
    weights = torch.load(Path(tiny["work_dir"]) / "latest.pth", weights_only=True)["state_dict"]
    torch.save(
        {
            "state_dict": weights,
            "meta": {"dataset_meta": {"classes": ("a",)}},
            "message_hub": {"log_scalars": {"train/loss": log}},
        },
        tmp_path / "mm.pth",
    )
    for name in ("mmengine.logging.history_buffer", "mmengine.logging", "mmengine"):
        monkeypatch.delitem(sys.modules, name)
    process = run(
        tiny, "--no-validate", "--work-dir", tmp_path / "tuned", "--load-from", tmp_path / "mm.pth"
    )
    assert re.search(r"weights from .*mm.pth: loaded (\d+) of \1 tensors\n", process.output()), (
        process.output()
    )


def flipped(path: Path) -> bytes:
    """The file with one bit of the middle of its largest tensor turned."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content[record.header_offset + 200 + record.file_size // 2] ^= 1
    return bytes(content)


def test_work_dir_that_cannot_be_written(tiny, run, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"work_dir {tmp_path}/file/work cannot be written" in failing(
        run, tiny, "--work-dir", tmp_path / "file" / "work"
    )


def test_work_dir_that_holds_a_run(tiny, run):
    """A second start never overwrites the first run."""
    run(tiny, "--no-validate")
    before = {
        path.name: path.read_bytes() for path in Path(tiny["work_dir"]).iterdir() if path.is_file()
    }
    assert "--resume-from auto" in failing(run, tiny)
    assert before == {
        path.name: path.read_bytes() for path in Path(tiny["work_dir"]).iterdir() if path.is_file()
    }


def test_port_in_use(tiny, run):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = run(
            tiny,
            env={
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            expect=1,
        )
        assert (
            str(port) in process.output()
            and "--standalone" in process.output()
            and "Traceback" not in process.output()
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_starts(tiny, run, rank):
    """The other waits for it, for the config's `timeout`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    tiny["timeout"] = 2
    process = run(
        tiny,
        env={
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        },
        expect=1,
    )
    assert (
        f"rank {rank} cannot meet the others at 127.0.0.1:{port}" in process.output()
        and "were started" in process.output()
    )
    assert "Traceback" not in process.output()


def test_processes_that_nobody_numbers(tiny, run):
    output = run(tiny, env={"WORLD_SIZE": "2"}, expect=1).output()
    assert (
        "no RANK, MASTER_ADDR, MASTER_PORT" in output
        and "torchrun" in output
        and "Traceback" not in output
    )


def test_eval_only_needs_weights(tiny, run):
    assert "--load-from" in failing(run, tiny, "--eval-only")
