"""The run through its command line: equal on any number of processes, resumed bit for bit, stopped, killed, evaluated."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image

import models
import train

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("time", "data_time", "memory")
WITHOUT_BATCH_NORM = {
    "backbone": {
        "type": "MixVisionTransformer",
        "embed_dims": 8,
        "num_layers": [1, 1, 1, 1],
        "drop_path_rate": 0.0,
    },
    "decode_head": {
        "type": "FCNHead",
        "in_channels": 64,
        "in_index": 3,
        "channels": 64,
        "num_convs": 0,
        "concat_input": False,
        "dropout_ratio": 0.0,
        "num_classes": 8,
    },
}


def metrics(config: dict, mode: str = "train") -> list[dict]:
    """The lines of metrics.jsonl of one mode without what a clock or the operating system decides."""
    lines = [
        json.loads(line)
        for line in (Path(config["work_dir"]) / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines
        if line["mode"] == mode
    ]


def checkpoint(config: dict, name: str = "latest.pth") -> dict:
    return torch.load(Path(config["work_dir"]) / name, weights_only=True)


def assert_same(a: object, b: object, place: str = "") -> None:
    """Equal bit for bit, tensors in nested dicts and lists included."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{place}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    else:
        assert a == b, place


def assert_same_run(a: dict, b: dict) -> None:
    for key in ("state_dict", "optimizer", "iteration", "best"):
        assert_same(checkpoint(a)[key], checkpoint(b)[key], key)
    for mode in ("train", "val"):
        assert metrics(a, mode) == metrics(b, mode)


def sibling(config: dict, name: str) -> dict:
    """A deep copy with a work_dir of its own."""
    config = copy.deepcopy(config)
    config["work_dir"] = str(Path(config["work_dir"]).parent / name)
    return config


def test_batch_split_over_processes_is_one_experiment(tiny, run):
    """4 processes x 2 images, 1 x 8, 8 x 1 and 2 x 2 x 2 accumulated: the same losses, as SyncBN, gradients and samples are global."""
    tiny["precision"] = "fp64"
    tiny["data"]["batch_size"], tiny["schedule"]["max_iters"] = 8, 5
    for head in ("decode_head", "auxiliary_head"):
        tiny["model"][head]["dropout_ratio"] = 0.0
    losses = {}
    for world_size in (1, 4, 8):
        config = sibling(tiny, f"world_size{world_size}")
        run(config, "--no-validate", world_size=world_size)
        losses[world_size] = [
            (line["decode.loss_ce"], line["aux.loss_ce"], line["loss"]) for line in metrics(config)
        ]
        assert len(losses[world_size]) == 5
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-8)
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-8)


def test_accumulation_is_the_same_gradient(tiny, run):
    """In a net without batch norm, a transformer, two micro-batches of 2 are one batch of 4."""
    tiny["precision"] = "fp64"
    tiny["model"] = WITHOUT_BATCH_NORM
    whole, split = sibling(tiny, "whole"), sibling(tiny, "split")
    split["data"]["accumulate"] = 2
    run(whole, "--no-validate")
    run(split, "--no-validate")
    np.testing.assert_allclose(
        [line["loss"] for line in metrics(split)],
        [line["loss"] for line in metrics(whole)],
        rtol=1e-9,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_run_is_the_uninterrupted_one(tiny, run, world_size):
    """20 iterations equal 10, a stop in the middle of an epoch, and 10 with another number of workers."""
    (
        tiny["schedule"]["max_iters"],
        tiny["checkpoint"]["interval"],
        tiny["evaluation"]["interval"],
    ) = 20, 10, 7
    tiny["data"]["length"] = 13
    straight, resumed = sibling(tiny, "straight"), sibling(tiny, "resumed")
    run(straight, world_size=world_size)
    Path(resumed["work_dir"]).mkdir()
    for name in (
        "train.log",
        "metrics.jsonl",
        "iter_10.pth",
    ):  # as a kill -9 in iteration 20 leaves them
        shutil.copy(Path(straight["work_dir"]) / name, resumed["work_dir"])
    resumed["data"]["workers"] = 2
    run(resumed, "--resume-from", "auto", world_size=world_size)
    assert_same_run(straight, resumed)


def test_compiled_net(tiny, run):
    """torch.compile with DDP, SyncBN, activation checkpointing and resume: the plain net's numbers, and batch norm's statistics moved once a step."""
    tiny["precision"], tiny["model"]["backbone"]["with_cp"] = "fp64", True
    for head in ("decode_head", "auxiliary_head"):
        tiny["model"][head]["dropout_ratio"] = 0.0
    plain, compiled = sibling(tiny, "plain"), sibling(tiny, "compiled")
    run(plain, "--no-validate", world_size=2)
    compiled["compile"] = True
    for _ in ("straight", "resumed from iteration 3"):
        run(compiled, "--no-validate", "--resume-from", "auto", world_size=2)
        ours, theirs = checkpoint(compiled)["state_dict"], checkpoint(plain)["state_dict"]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.allclose(
                ours[key].double(), theirs[key].double(), rtol=1e-8, atol=1e-10
            ), key
        for name in ("iter_6.pth", "latest.pth"):
            (Path(compiled["work_dir"]) / name).unlink()


def test_signal_saves_and_stops(tiny, run):
    """SIGTERM in the middle: iteration finished, checkpoint saved, exit status 143; resumed, the same as undisturbed."""
    (
        tiny["schedule"]["max_iters"],
        tiny["checkpoint"]["interval"],
        tiny["evaluation"]["interval"],
    ) = 30, 1000, 1000
    straight, stopped = sibling(tiny, "straight"), sibling(tiny, "stopped")
    run(straight, world_size=2)
    process = run(stopped, world_size=2, started=True)
    while not (Path(stopped["work_dir"]) / "metrics.jsonl").exists() or len(metrics(stopped)) < 3:
        time.sleep(0.02)
    os.kill(process.processes[1].pid, signal.SIGTERM)  # one rank alone hears it, both stop
    assert process.wait() == [143, 143]
    assert "stopped by a signal after iteration" in process.output()
    assert 3 <= checkpoint(stopped)["iteration"] < 30
    run(stopped, "--resume-from", "auto", world_size=2)
    assert_same_run(straight, stopped)


def test_validation_counts_each_image_once(tiny, run):
    """1, 2 and 3 processes give the same confusion matrix over 7 images, which sums to their valid pixels; windows work alike."""
    tiny["data"]["val_length"] = 7
    run(tiny, "--no-validate")
    weights = Path(tiny["work_dir"]) / "latest.pth"
    for mode in (
        {"mode": "whole"},
        {"mode": "slide", "crop_size": [48, 48], "stride": [32, 32], "batch_size": 3},
    ):
        found = []
        for world_size in (1, 2, 3):
            config = sibling(tiny, f"{mode['mode']}{world_size}")
            config["evaluation"] = mode
            run(config, "--eval-only", "--load-from", weights, world_size=world_size)
            found += metrics(config, "val")
        assert found[0]["confusion"] == found[1]["confusion"] == found[2]["confusion"]
        assert found[0]["mIoU"] == found[2]["mIoU"]
        source = train.Data(**tiny["data"])
        assert sum(map(sum, found[0]["confusion"])) == sum(
            (source.val.load(i)[1] != 255).sum() for i in range(7)
        )


def test_torchrun_command(tiny, tmp_path):
    """The real torchrun, two processes, as the README says; two such jobs at once do not disturb each other."""
    jobs = []
    for name in "ab":
        config = sibling(tiny, name)
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "train.py"),
            "--config",
            f"{tmp_path}/{name}.json",
        ]
        jobs.append(
            (
                config,
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                ),
            )
        )
    for config, job in jobs:
        output, _ = job.communicate(timeout=180)
        assert job.returncode == 0, output
        assert checkpoint(config)["iteration"] == 6
    assert metrics(jobs[0][0]) == metrics(jobs[1][0])


def test_torchrun_restarts_after_a_kill(tiny, tmp_path):
    """--max-restarts with --resume-from auto goes on after a killed process."""
    (
        tiny["schedule"]["max_iters"],
        tiny["checkpoint"]["interval"],
        tiny["evaluation"]["interval"],
    ) = 40, 2, 100
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=2",
        str(ROOT / "train.py"),
        "--config",
        f"{tmp_path}/config.json",
        "--resume-from",
        "auto",
    ]
    with open(tmp_path / "out", "w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while not (Path(tiny["work_dir"]) / "iter_4.pth").exists():
            assert job.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.02)
        children = subprocess.run(
            ["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert job.wait(120) == 0, (tmp_path / "out").read_text()
    assert "resumed from" in (tmp_path / "out").read_text()
    assert [line["iteration"] for line in metrics(tiny)] == list(range(1, 41))


def test_work_dir(tiny, run):
    """What a run leaves: config, logs, the last `keep` checkpoints, latest and best, previews; the log reads as said."""
    tiny["checkpoint"] = {"interval": 2, "keep": 2}
    run(tiny)
    folder = Path(tiny["work_dir"])
    assert sorted(p.name for p in folder.glob("*.pth")) == [
        "best.pth",
        "iter_4.pth",
        "iter_6.pth",
        "latest.pth",
    ]
    content = checkpoint(tiny)
    assert (
        content["iteration"] == 6
        and content["best"]["iteration"] == 6
        and content["config"]["data"] == tiny["data"]
    )
    assert len(content["classes"]) == len(content["palette"])
    assert json.loads((folder / "config.json").read_text())["run"]["versions"]["torch"] == str(
        torch.__version__
    )
    train.load_config(folder / "config.json")
    log = (folder / "train.log").read_text()
    assert (
        "Iter [6/6] lr: 2." in log
        and "decode.loss_ce: " in log
        and "aux.loss_ce: " in log
        and "mIoU" in log
    )
    assert Image.open(folder / "preview" / "iter_6.png").size[0] % 3 == 0
    value = metrics(tiny, "val")[0]
    confusion = torch.tensor(value["confusion"]).double()
    iou = confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())
    assert value["mIoU"] == pytest.approx(iou.nanmean().item())
    assert value["loss"] > 0


def test_show_dir_and_aug_test(tiny, run, tmp_path):
    run(tiny, "--no-validate")
    tiny["evaluation"]["ratios"] = [0.75, 1.0]
    run(
        sibling(tiny, "eval"),
        "--eval-only",
        "--aug-test",
        "--load-from",
        Path(tiny["work_dir"]) / "latest.pth",
        "--show-dir",
        tmp_path / "shown",
    )
    shown = sorted((tmp_path / "shown").iterdir())
    assert len(shown) == tiny["data"]["val_length"]
    assert Image.open(shown[0]).mode == "P"
    assert len(metrics(sibling(tiny, "eval"), "val")) == 1


def test_evaluation_leaves_the_run_as_it_is(tiny, run):
    """In the run's own work_dir, by its own config: lines are added to the logs, a preview, no more."""
    run(tiny)
    folder = Path(tiny["work_dir"])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run(tiny, "--eval-only", "--load-from", folder / "latest.pth")
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert before.keys() == after.keys()
    assert all(
        after[name].startswith(content) if name in train.RunDir.LOGS else after[name] == content
        for name, content in before.items()
    )
    (first, second) = metrics(tiny, "val")
    assert first["confusion"] == second["confusion"] and first["mIoU"] == second["mIoU"]


def test_real_images(tiny, run):
    """CamVid, by the config of the CPU figures with a narrow net: two iterations in two processes, and every validation image scored."""
    folder = ROOT.parent / "shared" / "camvid"
    if not folder.is_dir():
        reason = f"CamVid is not in {folder}"
        pytest.fail(reason) if os.environ.get("REQUIRE_ALL") else pytest.skip(reason)
    config = json.loads((ROOT / "configs" / "pspnet_r18-d8_360x360_camvid.json").read_text()) | {
        "work_dir": tiny["work_dir"]
    }
    config["data"] |= {"root": str(folder), "workers": 1, "crop_size": [120, 120]}
    config["model"]["backbone"] |= {"base_channels": 8, "stem_channels": 8}
    (
        config["model"]["decode_head"]["in_channels"],
        config["model"]["auxiliary_head"]["in_channels"],
    ) = 64, 32
    config["schedule"]["max_iters"], config["log"]["interval"] = 2, 1
    run(config, world_size=2)
    (value,) = metrics(config, "val")
    source = train.Data(**config["data"])
    assert len(source.train) == 367 and len(source.val) == 101
    assert sum(map(sum, value["confusion"])) == sum(
        int((source.val.load(i)[1] != 255).sum()) for i in range(101)
    )


def test_two_runs_in_one_work_dir_take_turns(tiny, run):
    """The second waits for the first to end, and then does not overwrite it."""
    tiny["schedule"]["max_iters"] = 40
    first = run(tiny, "--no-validate", started=True)
    while not (Path(tiny["work_dir"]) / "metrics.jsonl").exists():
        time.sleep(0.02)
    second = train_again(tiny)
    assert first.wait() == [0]
    assert second.wait() == [1], second.output()
    assert "waiting for another run" in second.output() and "already holds a run" in second.output()
    assert [line["iteration"] for line in metrics(tiny)] == list(range(1, 41))


def train_again(config: dict) -> Run:
    folder = Path(config["work_dir"]).parent / "again"
    folder.mkdir()
    return Run(
        ["--config", Path(config["work_dir"]).parent / "config.json", "--no-validate"], folder
    )


def test_load_from_takes_weights_only(tiny, run):
    """Starts at 0; names what did not match, such as the classifier of another data set."""
    run(tiny, "--no-validate")
    tuned = sibling(tiny, "tuned")
    weights = checkpoint(tiny)
    weights["state_dict"]["decode_head.conv_seg.weight"] = torch.zeros(3, 16, 1, 1)
    torch.save(
        {"state_dict": weights["state_dict"], "meta": {"CLASSES": ("a", "b", "c")}},
        Path(tiny["work_dir"]) / "published.pth",
    )
    process = run(tuned, "--no-validate", "--load-from", Path(tiny["work_dir"]) / "published.pth")
    assert "decode_head.conv_seg.weight" in process.output()
    assert [line["iteration"] for line in metrics(tuned)] == [1, 2, 3, 4, 5, 6]


def test_changing_the_schedule_on_resume_is_said(tiny, run):
    run(tiny, "--no-validate")
    process = run(
        tiny,
        "--no-validate",
        "--resume-from",
        "auto",
        "--options",
        "schedule.max_iters=8",
        "optimizer.lr=0.02",
    )
    assert (
        "schedule.max_iters 6 -> 8" in process.output()
        and "optimizer.lr 0.01 -> 0.02" in process.output()
    )
    assert metrics(tiny)[-1]["lr"] == pytest.approx(
        train.learning_rate(7, 0.02, max_iters=8, power=0.9, min_lr=0.0001)
    )


def test_scores_by_hand():
    """Three classes, the last absent: IoU 4/7 and 3/6, accuracy 4/5 and 3/5, Dice 8/11 and 6/9."""
    result = train.compute_metrics(torch.tensor([[4, 1, 0], [2, 3, 0], [0, 0, 0]]))
    assert result["IoU"] == pytest.approx([4 / 7, 3 / 6, None]) and result["Acc"] == pytest.approx(
        [4 / 5, 3 / 5, None]
    )
    assert (
        result["mIoU"] == pytest.approx((4 / 7 + 1 / 2) / 2)
        and result["mAcc"] == pytest.approx(0.7)
        and result["aAcc"] == pytest.approx(0.7)
    )
    assert result["mDice"] == result["mFscore"] == pytest.approx((8 / 11 + 6 / 9) / 2)
    assert "sky" in train.table(result, ["road", "car", "sky"]).splitlines()[-1]


@pytest.mark.parametrize("classes,chunk", [(5, 2), (5, 32), (150, 32)])
def test_classify_in_chunks_is_argmax_and_cross_entropy(classes, chunk):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 7, 9, generator=generator)
    label = torch.randint(0, classes, (2, 29, 37), generator=generator)
    label[:, :3] = 255
    full = torch.nn.functional.interpolate(logits, (29, 37), mode="bilinear", align_corners=False)
    best, loss = train.classify(logits, label, False, chunk=chunk)
    assert torch.equal(best, full.argmax(1))
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(full, label, ignore_index=255, reduction="sum").item(),
        rel=1e-5,
    )


def test_one_logit_for_two_classes_has_a_threshold():
    z = torch.tensor([-1.0, -0.8, 0.1]).view(1, 1, 1, 3)  # sigmoid: 0.27, 0.31, 0.52
    label = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    best, loss = train.classify(torch.cat([torch.zeros_like(z), z], 1), label, False, threshold=0.3)
    assert best.tolist() == [[[0, 1, 1]]]
    assert loss.item() == pytest.approx(
        torch.nn.functional.binary_cross_entropy_with_logits(
            z[0, 0, 0, :2], torch.tensor([0.0, 1.0]), reduction="sum"
        ).item()
    )


@pytest.mark.parametrize("name", ["pspnet_r18b-d8", "segformer_mit-b0"])
def test_trajectory_of_mmsegmentation(name, parity):
    """Six steps through build_optimizer and learning_rate: MMSegmentation's losses, learning rates and parameter groups."""
    net, reference = parity(name)
    section = dict(
        reference["optim_wrapper"]["optimizer"],
        paramwise=reference["optim_wrapper"].get("paramwise_cfg"),
    )
    optimizer = train.build_optimizer(net, **section)
    groups = sorted(len(group["params"]) for group in optimizer.param_groups)
    expected = [
        len(names) if isinstance(names[0], str) else names[0]
        for names in reference["parameter_groups"].values()
    ]
    assert groups == sorted(expected)
    for step in reference["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(
                step["iteration"], section["lr"] * group["lr_mult"], **reference["schedule"]
            )
        lrs = sorted({group["lr"] for group in optimizer.param_groups})
        np.testing.assert_allclose(lrs, step["lrs"], rtol=1e-9)
        loss = sum(net(parity.image(step["iteration"]), parity.label(step["iteration"])).values())
        assert loss.item() == pytest.approx(step["loss"], rel=1e-8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_paramwise_longest_part_wins():
    net = torch.nn.ModuleDict(
        {
            "head": torch.nn.Linear(2, 2),
            "head_norm": torch.nn.BatchNorm1d(2),
            "body": torch.nn.Linear(2, 2),
        }
    )
    optimizer = train.build_optimizer(
        net,
        "AdamW",
        1.0,
        weight_decay=0.1,
        paramwise={
            "head": {"lr_mult": 10.0},
            "head_norm": {"lr_mult": 2.0, "decay_mult": 0.0},
            "bias_lr_mult": 3.0,
            "bias_decay_mult": 0.0,
            "norm_decay_mult": 0.5,
        },
    )
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    seen = {
        name: (of[id(p)]["lr"], of[id(p)]["weight_decay"]) for name, p in net.named_parameters()
    }
    assert seen == {
        "head.weight": (10.0, 0.1),
        "head.bias": (10.0, 0.1),
        "head_norm.weight": (2.0, 0.0),
        "head_norm.bias": (2.0, 0.0),
        "body.weight": (1.0, 0.1),
        "body.bias": (3.0, 0.0),
    }


def test_options_are_json_or_python():
    config = {"model": {"heads": [{"channels": 1}]}}
    for option in (
        "a.b.a=5",
        "a.b.b=6",
        "model.backbone.with_cp=True",
        "data.scale=[512, 256]",
        "model.heads.0.channels=7",
        "work_dir=runs/a=b",
        "data.cache=None",
        "seed=3",
    ):
        train.override(config, option)
    assert config == {
        "a": {"b": {"a": 5, "b": 6}},
        "model": {"heads": [{"channels": 7}], "backbone": {"with_cp": True}},
        "data": {"scale": [512, 256], "cache": None},
        "work_dir": "runs/a=b",
        "seed": 3,
    }


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem
)
def test_every_config_builds(path):
    config = train.load_config(path)
    with torch.device("meta"):
        assert models.build_model(config["model"]).num_classes > 1
