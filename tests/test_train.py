"""Runs of train.py: equal on any number of processes, resumed bit for bit, stopped, evaluated."""

import copy
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PARITY,
    ROOT,
    WITHOUT_BATCH_NORM,
    Run,
    assert_same,
    assert_same_run,
    checkpoint,
    each_config,
    files_of,
    iterations,
    last_iteration,
    metrics,
    parity_image,
    parity_label,
    parity_model,
    set_in_heads,
    sibling,
    skip,
    wait_for,
    write_config,
)
from PIL import Image
from torch import nn

import models
import train


def losses(config: dict, name: str = "loss") -> list[float]:
    """A loss of every iteration."""
    return [line[name] for line in metrics(config)]


# -------------------------------------------------------------------------------------- Equal runs


def test_two_runs_are_equal_and_record_how_they_were_made(straight, tiny, run):
    run(tiny)
    assert_same_run(straight, tiny)
    written = json.loads((Path(tiny["work_dir"]) / "config.json").read_text())
    for key in ("command", "git_commit", "git_diff", "versions"):
        assert key in written["run"]
    assert "--config" in written["run"]["command"]
    assert written.pop("run")
    assert written == train.complete(tiny)
    assert checkpoint(tiny)["config"]["model"] == tiny["model"]


def test_batch_split_over_processes_is_the_same_experiment(tiny, run):
    """One process with 8 images, 4 with 2 and 8 with 1 have the same losses.

    This holds because batch norm, gradients and the order of the samples are global.
    """
    tiny["precision"] = "fp64"
    tiny["data"]["batch_size"] = 8
    tiny["schedule"]["max_iters"] = 5
    set_in_heads(tiny, dropout_ratio=0.0)
    found = {}
    for world_size in (1, 4, 8):
        config = sibling(tiny, f"world_size{world_size}")
        run(config, "--no-validate", world_size=world_size)
        found[world_size] = np.array(
            [losses(config, name) for name in ("decode.loss_ce", "aux.loss_ce", "loss")]
        )
        assert found[world_size].shape == (3, 5)
    np.testing.assert_allclose(found[4], found[1], rtol=1e-8)
    np.testing.assert_allclose(found[8], found[1], rtol=1e-8)


def test_accumulation_is_the_same_gradient(tiny, run):
    """Without batch norm, two micro-batches of 2 images equal one batch of 4."""
    tiny["precision"] = "fp64"
    tiny["model"] = WITHOUT_BATCH_NORM
    whole = sibling(tiny, "whole")
    split = sibling(tiny, "split")
    split["data"]["accumulate"] = 2
    run(whole, "--no-validate")
    run(split, "--no-validate")
    np.testing.assert_allclose(losses(split), losses(whole), rtol=1e-9)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one(tiny, run, world_size):
    """Resumed at iteration 10 of 20, within an epoch and with another number of workers."""
    tiny["schedule"]["max_iters"] = 20
    tiny["checkpoint"]["interval"] = 10
    tiny["evaluation"]["interval"] = 7
    tiny["data"]["length"] = 13
    straight = sibling(tiny, "straight")
    resumed = sibling(tiny, "resumed")
    run(straight, world_size=world_size)
    # The files that a kill in iteration 20 would leave.
    Path(resumed["work_dir"]).mkdir()
    for name in ("train.log", "metrics.jsonl", "iter_10.pth"):
        shutil.copy(Path(straight["work_dir"]) / name, resumed["work_dir"])
    resumed["data"]["workers"] = 2
    run(resumed, "--resume-from", "auto", world_size=world_size)
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("world_size", [1, 2])
def test_average_is_resumed_and_evaluated(tiny, run, world_size):
    """Resumed bit for bit; the scores are those of the averaged weights."""
    tiny["ema_decay"] = 0.7
    straight = sibling(tiny, "straight")
    resumed = sibling(tiny, "resumed")
    run(straight, world_size=world_size)
    Path(resumed["work_dir"]).mkdir()
    for name in ("train.log", "metrics.jsonl", "iter_3.pth"):
        shutil.copy(Path(straight["work_dir"]) / name, resumed["work_dir"])
    run(resumed, "--resume-from", "auto", world_size=world_size)
    assert_same_run(straight, resumed)
    assert_same(checkpoint(straight)["ema"], checkpoint(resumed)["ema"])
    if world_size > 1:
        return
    # A config without an average evaluates that of the checkpoint.
    del tiny["ema_decay"]
    saved = checkpoint(straight)
    model = models.build_model(tiny["model"])
    models.load_weights(model, saved)
    assert_same(dict(model.state_dict()), dict(saved["ema"]))
    run(tiny, "--eval-only", "--load-from", Path(straight["work_dir"]) / "iter_6.pth")
    assert metrics(tiny, "val")[0]["loss"] == metrics(straight, "val")[0]["loss"]


def test_loss_scale_of_fp16_is_resumed():
    def new_state() -> train.TrainState:
        model = nn.Linear(2, 2)
        optimizer = train.build_optimizer(model, type="SGD", lr=0.1)
        return train.TrainState(model, optimizer, torch.amp.GradScaler("cpu"))

    state = new_state()
    state.scaler.scale(torch.ones(()))
    state.scaler.update(128.0)
    resumed = new_state()
    resumed.load_state_dict(state.state_dict())
    assert resumed.scaler.get_scale() == 128.0


def test_average_is_the_formula():
    """A plain mean of the weights at first, then an exponential one; integers are copied."""
    model = nn.BatchNorm1d(2, dtype=torch.float64)
    state = train.TrainState(model, None, None, copy.deepcopy(model))
    expected = 0.0
    for iteration in range(9):
        state.iteration = iteration
        value = 3.0**iteration
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(-value)
        model.num_batches_tracked += 1
        train.update_ema(state, 0.75)
        decay = min(0.75, iteration / (iteration + 1))
        expected = decay * expected + (1 - decay) * value
        assert state.ema.weight.tolist() == pytest.approx([expected] * 2)
        assert state.ema.running_mean.tolist() == pytest.approx([-expected] * 2)
        assert state.ema.num_batches_tracked == iteration + 1


def test_resume_on_another_number_of_processes(tiny, run):
    """The samples are the same, and in float64 without dropout the losses up to rounding."""
    tiny["precision"] = "fp64"
    set_in_heads(tiny, dropout_ratio=0.0)
    straight = sibling(tiny, "straight")
    run(straight, "--no-validate")
    for world_size in (2, 4):
        resumed = sibling(tiny, f"world_size{world_size}")
        Path(resumed["work_dir"]).mkdir()
        shutil.copy(Path(straight["work_dir"]) / "iter_3.pth", resumed["work_dir"])
        run(resumed, "--no-validate", "--resume-from", "auto", world_size=world_size)
        np.testing.assert_allclose(losses(resumed), losses(straight)[3:], rtol=1e-8)


def use_few_layers(config: dict) -> None:
    """A network that compiles fast, as the compilers of all processes share the cores."""
    config["model"]["backbone"] = {
        "type": "UNet",
        "base_channels": 8,
        "num_stages": 2,
        "strides": [1, 1],
        "enc_num_convs": [1, 1],
        "enc_dilations": [1, 1],
        "downsamples": [True],
        "dec_num_convs": [1],
        "dec_dilations": [1],
    }
    set_in_heads(config, in_channels=8, in_index=1)


def test_compiled_model_trains_like_the_plain_one(tiny, run):
    """This holds with DDP, SyncBN and activation checkpointing, and after a resume.

    That the weights and the running statistics are equal shows that the recomputation does not
    update the statistics a second time.
    """
    tiny["precision"] = "fp64"
    use_few_layers(tiny)
    tiny["model"]["backbone"]["with_cp"] = True
    set_in_heads(tiny, dropout_ratio=0.0)
    plain = sibling(tiny, "plain")
    run(plain, "--no-validate", world_size=2)
    expected = checkpoint(plain)["state_dict"]

    compiled = sibling(tiny, "compiled")
    compiled["compile"] = True
    for _ in ("from scratch", "resumed at iteration 3"):
        run(compiled, "--no-validate", "--resume-from", "auto", world_size=2)
        found = checkpoint(compiled)["state_dict"]
        assert found.keys() == expected.keys()
        for key, value in found.items():
            wanted = expected[key].double()
            assert torch.allclose(value.double(), wanted, rtol=1e-8, atol=1e-10), key
        for name in ("iter_6.pth", "latest.pth"):
            (Path(compiled["work_dir"]) / name).unlink()


# ---------------------------------------------------------------------------- Stopped and restarted


def test_signal_saves_and_stops(tiny, run):
    """SIGTERM to one of two ranks: both finish the iteration, save and exit with status 143."""
    tiny["schedule"]["max_iters"] = 30
    tiny["checkpoint"]["interval"] = 1000
    tiny["evaluation"]["interval"] = 1000
    straight = sibling(tiny, "straight")
    stopped = sibling(tiny, "stopped")
    run(straight, world_size=2)

    process = run(stopped, world_size=2, started=True)
    wait_for(lambda: last_iteration(stopped) >= 3, process)
    os.kill(process.processes[1].pid, signal.SIGTERM)
    assert process.wait() == [143, 143]
    assert "stopped by a signal after iteration" in process.output()
    assert 3 <= checkpoint(stopped)["iteration"] < 30

    run(stopped, "--resume-from", "auto", world_size=2)
    assert_same_run(straight, stopped)


def torchrun(*argv: object) -> list[str]:
    """The README's command for two processes on one machine."""
    module = "torch.distributed.run"
    command = [sys.executable, "-m", module, "--standalone", "--nproc_per_node=2", *argv]
    return [str(argument) for argument in command]


def test_two_runs_in_one_work_dir_take_turns(tiny, run, tmp_path):
    """The second run waits for the first to end and then refuses to overwrite it."""
    tiny["schedule"]["max_iters"] = 40
    first = run(tiny, "--no-validate", started=True)
    wait_for(lambda: last_iteration(tiny) > 0, first)
    (tmp_path / "second").mkdir()
    second = Run(["--config", tmp_path / "config.json", "--no-validate"], tmp_path / "second")
    assert first.wait() == [0]
    assert second.wait() == [1], second.output()
    assert "waiting for another run" in second.output()
    assert "already holds a run" in second.output()
    assert iterations(tiny) == list(range(1, 41))


# ------------------------------------------------------------------------- Initialized from a file


def test_load_from_takes_weights_only(straight, tiny, run, tmp_path):
    """The run starts at iteration 0 and names what does not fit, such as another classifier."""
    state_dict = checkpoint(straight)["state_dict"]
    state_dict["decode_head.conv_seg.weight"] = torch.zeros(3, 16, 1, 1)
    published = {
        "state_dict": state_dict,
        "meta": {"CLASSES": ("a", "b", "c")},
    }
    torch.save(published, tmp_path / "published.pth")
    process = run(tiny, "--no-validate", "--load-from", tmp_path / "published.pth")
    assert "decode_head.conv_seg.weight" in process.output()
    assert iterations(tiny) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("state_dict", "module."),
        ("model", "_orig_mod."),
        ("model_state_dict", "module._orig_mod."),
        ("state_dict", "_orig_mod.module."),
        ("state_dict", "model.backbone._orig_mod."),
        (None, "module.module."),
    ],
)
def test_weights_of_wrapped_networks(straight, tiny, key, prefix):
    """As torch.compile, DDP, AveragedModel and Lightning save them."""
    state = checkpoint(straight)["state_dict"]
    wrapper, _, part = prefix.partition("backbone.")
    wrapped = {}
    for name, value in state.items():
        wrapped[wrapper + name.replace("backbone.", f"backbone.{part}")] = value
    model = models.build_model(tiny["model"])
    report = models.load_weights(model, {key: wrapped} if key else wrapped)
    assert re.fullmatch(r"loaded (\d+) of \1 tensors", report)
    assert_same(dict(model.state_dict()), dict(state))


def test_home_in_every_path(tiny, tmp_path, monkeypatch):
    """~ is the home, in the config and on the command line, for every kind of path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
        for i in range(4):
            array = np.full((48, 48, 3) if kind == "images" else (48, 48), i, np.uint8)
            Image.fromarray(array).save(tmp_path / "set" / kind / f"{i}.png")
    (tmp_path / "list.txt").write_text("0\n1\n2\n3\n")
    backbone = models.build_model(tiny["model"]).backbone.state_dict()
    torch.save(backbone, tmp_path / "backbone.pth")
    tiny["model"]["backbone"]["pretrained"] = "~/backbone.pth"
    tiny["work_dir"] = "~/first"
    tiny["schedule"]["max_iters"] = 1
    tiny["data"] = {
        "type": "folder",
        "root": "~/set",
        "images": "images",
        "labels": "labels",
        "files": "~/list.txt",
        "classes": list("abcdefgh"),
        "allow_overlap": True,
        "cache": "~/cache",
        "batch_size": 2,
        "workers": 0,
        "crop_size": [48, 48],
    }
    write_config(tiny, tmp_path)
    train.main(["--config=~/config.json"])
    train.main(["--config=~/config.json", "--resume-from=~/first/iter_1.pth"])
    shown = ["--eval-only", "--load-from=~/first/best.pth", "--show-dir=~/shown"]
    train.main(["--config=~/config.json", "--work-dir=~/second", *shown])
    for name in ("first/iter_1.pth", "second/train.log", "cache", "shown"):
        assert (tmp_path / name).exists(), name


def test_resume_reports_what_changed_in_the_config(finished, run):
    options = ("schedule.max_iters=8", "optimizer.lr=0.02")
    process = run(finished, "--no-validate", "--resume-from", "auto", "--options", *options)
    assert "schedule.max_iters 6 -> 8" in process.output()
    assert "optimizer.lr 0.01 -> 0.02" in process.output()
    assert process.output().count("changed since then") == 3  # the work_dir too
    expected = train.learning_rate(7, 0.02, max_iters=8, power=0.9, min_lr=0.0001)
    assert metrics(finished)[-1]["lr"] == pytest.approx(expected)


def test_finished_run_that_is_started_again_says_so(finished, run):
    before = files_of(finished)
    output = run(finished, "--resume-from", "auto").output()
    assert "this run is finished: it is at iteration 6 of 6" in output
    assert "best.pth" in output.splitlines()[-3]
    assert files_of(finished)["latest.pth"] == before["latest.pth"]


def test_patience_ends_the_run_and_survives_a_resume(tiny, run):
    """With a learning rate of 0, the first mIoU is the best: three validations later it ends."""
    tiny["model"] = WITHOUT_BATCH_NORM
    tiny["optimizer"] = {"type": "SGD", "lr": 0.0}
    tiny["schedule"] = {"max_iters": 9}
    tiny["evaluation"] = {"interval": 1, "patience": 3}
    tiny["checkpoint"] = {"interval": 2, "keep": 9}
    output = run(tiny, world_size=2).output()
    assert "finished early: the last 3 validations" in output
    assert iterations(tiny) == [1, 2, 3, 4]
    end = checkpoint(tiny)
    assert end["iteration"] == 4
    assert end["best"]["iteration"] == 1
    assert end["validations_since_best"] == 3

    resumed = sibling(tiny, "resumed")
    path = Path(tiny["work_dir"]) / "iter_2.pth"
    run(resumed, "--resume-from", path, world_size=2)
    assert iterations(resumed) == [3, 4]
    assert checkpoint(resumed)["validations_since_best"] == 3
    output = run(resumed, "--resume-from", "auto").output()
    assert "this run is finished: it is at iteration 4 of 9" in output
    assert iterations(resumed) == [3, 4]
    more = ("evaluation.patience=4", "evaluation.interval=3")
    run(resumed, "--resume-from", "auto", "--options", *more)
    assert iterations(resumed) == [3, 4, 5, 6]
    assert checkpoint(resumed)["iteration"] == 6  # where no checkpoint was due
    # The weights are still the same, and so is the picture, on one process and on two.
    pictures = [(tiny, 1), (tiny, 4), (resumed, 6)]
    paths = [Path(config["work_dir"]) / f"preview/iter_{i}.png" for config, i in pictures]
    assert len({path.read_bytes() for path in paths}) == 1


def test_waiting_for_data_names_the_workers_that_are_enough(tiny, tmp_path, capsys):
    """Two workers that make a step of 1 s take 2 s have half of the speed that is needed."""
    config = train.read_config(write_config(tiny, tmp_path), ["data.workers=2"])
    data = train.Data(**config.data)
    run_dir = train.RunDir(tmp_path, keep=1)
    state = train.TrainState(nn.Module(), None, None)
    state.iteration = 2  # of 6
    run_dir.open(config, state, eval_only=True)
    timer = train.StepTimer()
    timer.steps = 3
    timer.began -= 3 * 2
    timer.data_wait = 3 * 1.0
    train.report(state, 0.1, {"loss": 1.0}, timer, config, data, run_dir)
    line = " ".join(capsys.readouterr().out.split())
    assert "waiting for data 50 % of the time: set data.workers=4, or data.cache" in line
    assert "eta: 0:00:08, time: 2.0" in line


def test_lines_of_the_log_are_short():
    losses = {f"decode_{i}.loss_{name}": 0.123 for i in range(3) for name in ("ce", "dice")}
    line = ", ".join(f"{name}: {value:.4f}" for name, value in losses.items())
    folded = train.wrap_line(line)
    assert max(map(len, folded.splitlines())) < 100
    assert " ".join(folded.split()) == line
    assert not any(text.endswith(":") for text in folded.splitlines())
    names = ["a name of a class " * 20, "b"]
    metrics = {key: [0.5, None] for key in ("IoU", "Acc", "Dice")}
    assert max(map(len, train.table(metrics, names).splitlines())) < 100


def test_settings_that_are_hardly_meant_are_named(tiny, tmp_path, recwarn):
    tiny["data"]["workers"] = 500
    tiny["schedule"] |= {"warmup": "linear", "warmup_iters": 7}
    tiny["optimizer"]["paramwise"] = {"decode_head": {"lr_mult": 10}, "hed": {"lr_mult": 10}}
    config = train.read_config(write_config(tiny, tmp_path))
    model = models.build_model(config.model)
    data = train.Data(**config.data)
    data.train_batches()
    first, second, third = train.setting_warnings(config, data, model)
    assert "data.workers is 500" in first
    assert "schedule.warmup_iters is 7, but max_iters 6" in second
    assert "optimizer.paramwise.hed changes nothing" in third
    assert not recwarn.list
    tiny["data"]["workers"] = 1
    tiny["schedule"]["warmup_iters"] = 6
    del tiny["optimizer"]["paramwise"]
    config = train.read_config(write_config(tiny, tmp_path))
    assert train.setting_warnings(config, train.Data(**config.data), model) == []
    tiny["schedule"] |= {"policy": "step", "milestones": [4, 6, 9]}
    config = train.read_config(write_config(tiny, tmp_path))
    (found,) = train.setting_warnings(config, train.Data(**config.data), model)
    assert "schedule.milestones [6, 9] are never reached" in found


# -------------------------------------------------------------------------------------- Evaluation


def valid_pixels(config: dict) -> int:
    """The number of pixels of the validation labels that are scored."""
    dataset = train.Data(**config["data"]).val
    count = 0
    for i in range(len(dataset)):
        _, label = dataset.load(i)
        count += int((label != 255).sum())
    return count


@pytest.mark.parametrize(
    "evaluation",
    [
        {"mode": "whole"},
        {
            "mode": "slide",
            "crop_size": [48, 48],
            "stride": [32, 32],
            "batch_size": 3,
        },
    ],
    ids=lambda evaluation: evaluation["mode"],
)
def test_validation_counts_each_image_once(straight, tiny, run, evaluation):
    """1, 2 and 3 processes have the same confusion matrix of the valid pixels of 7 images."""
    tiny["data"]["val_length"] = 7
    tiny["evaluation"] = evaluation
    weights = Path(straight["work_dir"]) / "latest.pth"
    results = []
    for world_size in (1, 2, 3):
        config = sibling(tiny, f"world_size{world_size}")
        run(config, "--eval-only", "--load-from", weights, world_size=world_size)
        results += metrics(config, "val")
    one, two, three = results
    assert one["confusion"] == two["confusion"] == three["confusion"]
    assert one["mIoU"] == three["mIoU"]

    assert sum(map(sum, one["confusion"])) == valid_pixels(tiny)


def test_evaluation_leaves_the_run_as_it_is(finished):
    """In the work_dir of the run itself, it appends to the logs only, without needing a config."""
    before = files_of(finished)
    previews = list((Path(finished["work_dir"]) / "preview").iterdir())
    latest = Path(finished["work_dir"]) / "latest.pth"
    for preview in previews:
        os.utime(preview, (0, 0))
    assert train.main(["--eval-only", "--load-from", str(latest)]) == "done"
    assert torch.backends.cudnn.benchmark  # off during the evaluation, on again for training
    assert {preview.stat().st_mtime for preview in previews} == {0}
    after = files_of(finished)
    assert after.keys() == before.keys()
    for name, content in before.items():
        if name in train.RunDir.LOGS:
            assert after[name].startswith(content), name
        else:
            assert after[name] == content, name
    (first,) = metrics(finished, "val")
    (second,) = metrics(finished, "test")
    assert second["iteration"] == first["iteration"] == 6
    assert first["confusion"] == second["confusion"]
    assert first["mIoU"] == second["mIoU"]


def test_show_dir_with_aug_test(straight, tiny, run, tmp_path):
    tiny["evaluation"]["ratios"] = [0.75, 1.0]
    weights = Path(straight["work_dir"]) / "latest.pth"
    show_dir = tmp_path / "shown"
    run(tiny, "--eval-only", "--aug-test", "--load-from", weights, "--show-dir", show_dir)
    shown = sorted(show_dir.iterdir())
    assert len(shown) == tiny["data"]["val_length"]
    assert Image.open(shown[0]).mode == "P"
    assert len(metrics(tiny, "val")) == 1
    assert not metrics(tiny, "test")  # only beside training


def test_camvid_on_two_processes(tiny, run):
    """Two iterations of a narrow model on real images; every validation image is scored."""
    folder = ROOT.parent / "shared" / "camvid"
    if not folder.is_dir():
        skip(f"CamVid is not in {folder}")
    config = json.loads((ROOT / "configs" / "pspnet_r18-d8_360x360_camvid.json").read_text())
    config["work_dir"] = tiny["work_dir"]
    config["data"] |= {"root": str(folder), "workers": 1, "crop_size": [120, 120]}
    config["model"]["backbone"] |= {"base_channels": 8, "stem_channels": 8}
    config["model"]["decode_head"]["in_channels"] = 64
    config["model"]["auxiliary_head"]["in_channels"] = 32
    config["schedule"]["max_iters"] = 2
    config["log"]["interval"] = 1
    run(config, world_size=2)

    data = train.Data(**config["data"])
    assert len(data.train) == 367
    assert len(data.val) == 101
    (result,) = metrics(config, "val")
    assert sum(map(sum, result["confusion"])) == valid_pixels(config)


def test_metrics_by_hand():
    """Three classes of which the last does not occur."""
    confusion = [
        [4, 1, 0],
        [2, 3, 0],
        [0, 0, 0],
    ]
    result = train.compute_metrics(torch.tensor(confusion))
    assert result["IoU"] == pytest.approx([4 / 7, 3 / 6, None])
    assert result["Acc"] == pytest.approx([4 / 5, 3 / 5, None])
    assert result["mIoU"] == pytest.approx((4 / 7 + 1 / 2) / 2)
    assert result["mAcc"] == pytest.approx(0.7)
    assert result["aAcc"] == pytest.approx(0.7)
    assert result["mDice"] == pytest.approx((8 / 11 + 6 / 9) / 2)
    assert result["mFscore"] == result["mDice"]
    table = train.table(result, ["road", "car", "sky"])
    assert "sky" in table.splitlines()[-1]


@pytest.mark.parametrize(
    ("classes", "chunk"),
    [
        (5, 2),
        (5, 32),
        (150, 32),
    ],
)
def test_classify_in_chunks_is_argmax_and_cross_entropy(classes, chunk):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 7, 9, generator=generator)
    label = torch.randint(0, classes, (2, 29, 37), generator=generator)
    label[:, :3] = 255
    prediction, loss = train.classify(logits, label, False, chunk=chunk)
    full = F.interpolate(logits, (29, 37), mode="bilinear", align_corners=False)
    assert torch.equal(prediction, full.argmax(1))
    expected = F.cross_entropy(full, label, ignore_index=255, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_binary_classification_has_a_threshold():
    z = torch.tensor([-1.0, -0.8, 0.1])  # sigmoid: 0.27, 0.31, 0.52
    logits = torch.stack([torch.zeros(3), z]).view(1, 2, 1, 3)
    label = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    prediction, loss = train.classify(logits, label, False, threshold=0.3)
    assert prediction.tolist() == [[[0, 1, 1]]]
    truth = torch.tensor([0.0, 1.0])
    expected = F.binary_cross_entropy_with_logits(z[:2], truth, reduction="sum")
    assert loss.item() == pytest.approx(expected.item())


# ---------------------------------------------------------------------------- Files of the work_dir


def test_files_of_a_run(tiny, run):
    tiny["work_dir"] += " with spaces"
    tiny["checkpoint"] = {"interval": 2, "keep": 2}
    run(tiny)
    folder = Path(tiny["work_dir"])
    checkpoints = sorted(path.name for path in folder.glob("*.pth"))
    assert checkpoints == ["best.pth", "iter_4.pth", "iter_6.pth", "latest.pth"]

    content = checkpoint(tiny)
    assert content["iteration"] == 6
    assert content["best"]["iteration"] == 6
    assert content["config"]["data"] == tiny["data"]
    assert len(content["classes"]) == len(content["palette"])

    written = json.loads((folder / "config.json").read_text())
    assert written["run"]["versions"]["torch"] == str(torch.__version__)
    train.load_config(folder / "config.json")

    log = (folder / "train.log").read_text()
    for part in ("Iter [6/6] lr: 2.", "decode.loss_ce: ", "aux.loss_ce: ", "mIoU"):
        assert part in log
    for part in (
        "network: ResNet, PSPHead, FCNHead: 0.2 M parameters, 0.0 GFLOPs for 48 x 48 pixels",
        "data: synthetic, 10 images to train on, 4 to evaluate on; 8 classes",
        "batch: 4 = 1 x 4 x 1 (processes x images x data.accumulate), in fp32 on cpu",
        f"work_dir: {folder}",
        "from scratch: all weights are random",
        "to come: iterations: 6, validations: 1",
        f"at iteration 6: {folder}/best.pth",
        f"preview: {folder}/preview/iter_6.png",
        f"next: python train.py --load-from '{folder}/best.pth' --predict IMAGES --show-dir DIR",
    ):
        assert part in log
    assert max(len(line) for line in log.splitlines() if str(folder) not in line) < 120
    preview = Image.open(folder / "preview" / "iter_6.png")
    assert preview.width == 3 * 240
    assert preview.height > 4 * 240

    (result,) = metrics(tiny, "val")
    confusion = torch.tensor(result["confusion"]).double()
    hit = confusion.diag()
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    assert result["mIoU"] == pytest.approx(iou.nanmean().item())
    assert result["loss"] > 0


def test_preview_tells_black_classes_from_ignored_pixels():
    label = np.zeros((20, 30), np.uint8)
    label[:, 15:] = 255
    image = Image.new("RGB", (60, 40), (200, 100, 50))
    mixed = np.asarray(train.paint(image, Image.fromarray(label), [[0, 0, 0], [255, 0, 0]]))
    assert mixed.shape == (40, 60, 3)
    assert (mixed[:, :28] == (80, 40, 20)).all()
    assert set(np.unique(mixed[:, 32:])) == {64, 255}


@pytest.mark.parametrize("size", [(4000, 1000), (30, 20), (1, 700)])
def test_preview_is_bounded(size, tmp_path):
    width, height = size
    label = torch.zeros(height, width, dtype=torch.uint8)
    image = torch.rand(4, max(1, height // 2), max(1, width // 2))
    row = train.preview_row("a name " * 99, image, {"truth": label, "prediction": label}, [[0] * 3])
    assert row.width <= 1440
    assert row.height <= 496
    names = [f"class number {i}" for i in range(171)]
    train.write_preview(tmp_path / "a/b.png", [row] * 4, names, [[1, 2, 3]] * 171)
    assert Image.open(tmp_path / "a/b.png").width >= row.width


def test_mean_iou_of_each_image():
    confusion = torch.tensor([[3, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]])
    assert train.mean_iou(confusion).tolist() == [(3 / 4 + 0) / 2, 1.0, 1.0]


@pytest.mark.optional("matplotlib", "tensorboard")
def test_pictures_of_validations(finished, run, tmp_path):
    """A resumed run draws the whole course; what cannot be drawn costs a picture."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(finished["work_dir"])
    options = ("schedule.max_iters=8", "evaluation.interval=1")
    (folder / "confusion.png").unlink()  # the first run drew it
    (folder / "confusion.png").mkdir()
    output = run(finished, "--resume-from", "auto", "--options", *options).output()
    assert "no pictures of this validation: IsADirectoryError" in output
    picture = Image.open(folder / "curves.png")
    assert picture.size == (1500, 400)
    figure = train.curves_figure(train.read_metrics(folder / "metrics.jsonl"))
    losses, lr, scores = figure.axes
    assert [line.get_label() for line in losses.lines] == [
        "decode.loss_ce",
        "aux.loss_ce",
        "loss",
        "validation loss",
    ]
    assert list(lr.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(scores.lines[0].get_xdata()) == [6, 7, 8]

    (folder / "confusion.png").rmdir()
    (result,) = metrics(finished, "val")[-1:]
    train.confusion_figure(result["confusion"], ["name"] * 8).savefig(tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").size == (640, 640)
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Images("preview")] == [7, 8]
    assert [event.step for event in events.Scalars("val_IoU/ground")] == [7, 8]
    assert any("config" in tag for tag in events.Tags()["tensors"])


# -------------------------------------------------------------------------- Optimizer and schedule


@pytest.mark.parametrize("name", ["pspnet_r18b-d8", "segformer_mit-b0"])
def test_six_steps_of_mmsegmentation(name):
    """Our optimizer and schedule reproduce its parameter groups, learning rates and losses."""
    model = parity_model(name)
    reference = json.loads((PARITY / f"{name}.trajectory.json").read_text())
    wrapper = reference["optim_wrapper"]
    section = dict(wrapper["optimizer"], paramwise=wrapper.get("paramwise_cfg"))
    optimizer = train.build_optimizer(model, **section)

    groups = reference["parameter_groups"]
    assert len(optimizer.param_groups) == len(groups)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        title = f"lr x{group['lr_mult']:g}, weight_decay {group['weight_decay']:g}"
        members = [name_of[parameter] for parameter in group["params"]]
        if groups[title] != [len(members)]:  # the group of all the rest is given by its size
            assert sorted(members) == sorted(groups[title]), title

    for step in reference["steps"]:
        iteration = step["iteration"]
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(
                iteration, section["lr"] * group["lr_mult"], **reference["schedule"]
            )
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        np.testing.assert_allclose(rates, step["lrs"], rtol=1e-9)
        image = parity_image(f"input{iteration}")
        label = parity_label(model.num_classes, f"labels{iteration}")
        loss = sum(model(image, label).values())
        assert loss.item() == pytest.approx(step["loss"], rel=1e-8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_schedules_by_hand():
    options = {"max_iters": 100, "min_lr": 0.01}
    cosine = [train.learning_rate(i, 0.11, policy="cosine", **options) for i in (0, 25, 50, 100)]
    np.testing.assert_allclose(cosine, [0.11, 0.06 + 0.05 * 0.5**0.5, 0.06, 0.01])
    step = options | {"policy": "step", "milestones": [40, 70, 90], "gamma": 0.2}
    rates = [train.learning_rate(i, 1.0, **step) for i in (0, 39, 40, 69, 70, 90, 100)]
    np.testing.assert_allclose(rates, [1.0, 1.0, 0.2, 0.2, 0.04, 0.01, 0.01])
    warm = train.learning_rate(10, 1.0, warmup="linear", warmup_iters=20, warmup_ratio=0.5, **step)
    assert warm == pytest.approx(0.75)


@pytest.mark.parametrize(
    "schedule",
    [{"policy": "step"}, {"milestones": [3]}, {"policy": "exp"}, {"milestones": 3}],
)
def test_bad_schedules_are_named(tiny, tmp_path, schedule):
    tiny["schedule"] |= schedule
    with pytest.raises(models.ConfigError, match="schedule.(policy|milestones)"):
        train.load_config(write_config(tiny, tmp_path))


def test_multipliers_scale_the_floor_too(tiny, tmp_path):
    tiny["optimizer"]["paramwise"] = {"backbone": {"lr_mult": 0.0}, "decode": {"lr_mult": 2.0}}
    config = train.read_config(write_config(tiny, tmp_path))
    optimizer = train.build_optimizer(models.build_model(config.model), **config.optimizer)
    for iteration in (0, 3, 6):
        lr = train.set_learning_rate(optimizer, iteration, config)
        rates = {group["lr_mult"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {0.0: 0.0, 1.0: lr, 2.0: 2 * lr}
    assert lr == tiny["schedule"]["min_lr"]


def test_paramwise_takes_the_longest_matching_part():
    layers = {
        "head": torch.nn.Linear(2, 2),
        "head_norm": torch.nn.BatchNorm1d(2),
        "body": torch.nn.Linear(2, 2),
    }
    paramwise = {
        "head": {"lr_mult": 10.0},
        "head_norm": {"lr_mult": 2.0, "decay_mult": 0.0},
        "bias_lr_mult": 3.0,
        "bias_decay_mult": 0.0,
        "norm_decay_mult": 0.5,
    }
    model = torch.nn.ModuleDict(layers)
    optimizer = train.build_optimizer(
        model,
        type="AdamW",
        lr=1.0,
        weight_decay=0.1,
        paramwise=paramwise,
    )
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[name_of[parameter]] = (group["lr"], group["weight_decay"])
    assert found == {
        "head.weight": (10.0, 0.1),
        "head.bias": (10.0, 0.1),
        "head_norm.weight": (2.0, 0.0),
        "head_norm.bias": (2.0, 0.0),
        "body.weight": (1.0, 0.1),
        "body.bias": (3.0, 0.0),
    }


# ------------------------------------------------------------------------------------------ Config


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


def test_work_dir_is_named_after_the_config(tiny, tmp_path):
    del tiny["work_dir"]
    path = write_config(tiny, tmp_path)
    assert train.read_config(path).work_dir == f"work_dirs/{path.stem}"


@each_config
def test_every_config_builds(name):
    config = train.load_config(ROOT / f"configs/{name}.json")
    with torch.device("meta"):
        assert models.build_model(config["model"]).num_classes > 1


def test_printed_config_gives_the_same_run(straight, tiny, run, tmp_path, capsys):
    path = write_config(tiny, tmp_path)
    assert train.main(["--config", str(path), "--print-config"]) == "done"
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"]["decode_head"]["loss_decode"]["type"] == "CrossEntropyLoss"
    assert printed["model"]["backbone"]["with_cp"] is False
    assert printed["data"]["flip"] == 0.5
    assert printed["optimizer"]["nesterov"] is False
    assert printed["schedule"]["warmup_iters"] == 0
    assert printed["evaluation"]["mode"] == "whole"
    assert printed["clip_grad"] is None
    run(printed)
    assert_same_run(straight, tiny)
    assert train.complete(printed) == printed


@pytest.mark.parametrize(
    "name",
    [
        "ann_r50-d8_512x512_80k_ade20k",
        "fcn_hr18_512x512_80k_ade20k",
        "ocrnet_hr18_512x512_80k_ade20k",
        "sem_fpn_r50_512x512_160k_ade20k",
        "upernet_swin-t_512x512_160k_ade20k",
    ],
)
def test_complete_model_is_the_same_network(name):
    section = json.loads((ROOT / f"configs/{name}.json").read_text())["model"]
    full = models.with_defaults(section)
    assert full == models.with_class_defaults(section, inherited=True)
    assert full != section
    assert models.with_defaults(full) == full
    built = [models.describe(models.build_on_meta(cfg)) for cfg in (section, full)]
    assert built[0] == built[1]


class PassesItsOwnValue(models.FCNHead):
    def __init__(self, *, gain: float = 1.0, **kwargs):
        super().__init__(num_convs=1, **kwargs)


class ChangesADefault(models.FCNHead):
    def __init__(self, *, gain: float = 1.0, **kwargs):
        kwargs.setdefault("dropout_ratio", 0.5)
        super().__init__(**kwargs)


@pytest.mark.parametrize("head", [PassesItsOwnValue, ChangesADefault])
def test_default_that_a_class_replaces_is_not_written_out(head, tiny, monkeypatch):
    monkeypatch.setitem(models.HEADS, "Mine", head)
    mine = {"type": "Mine", "in_channels": 64, "channels": 8, "num_classes": 8}
    tiny["model"]["decode_head"] = mine
    full = models.with_defaults(tiny["model"])
    assert full["decode_head"] == mine | {"gain": 1.0}
    assert models.with_defaults(full) == full


LOSSES = [
    {"type": "CrossEntropyLoss", "loss_name": "loss_plain"},
    {"type": "CrossEntropyLoss", "loss_name": "loss_valid", "avg_non_ignore": True},
    {
        "type": "CrossEntropyLoss",
        "loss_name": "loss_weighted",
        "class_weight": [1.0, 5.0, 0.2, 1.0, 1.0, 3.0, 1.0, 0.1],
    },
    {
        "type": "CrossEntropyLoss",
        "loss_name": "loss_weighted_valid",
        "class_weight": [1.0, 5.0, 0.2, 1.0, 1.0, 3.0, 1.0, 0.1],
        "avg_non_ignore": True,
    },
    {
        "type": "CrossEntropyLoss",
        "loss_name": "loss_sigmoid",
        "use_sigmoid": True,
        "avg_non_ignore": True,
    },
    {"type": "DiceLoss"},
    {"type": "FocalLoss"},
    {"type": "LovaszLoss", "per_image": True},
]


def test_every_loss_is_global(tiny, run):
    """1 x 8, 2 x 4 and 2 x 2 x 2 images have the same losses and weights, for every loss."""
    tiny["precision"] = "fp64"
    tiny["model"] = WITHOUT_BATCH_NORM | {
        "decode_head": WITHOUT_BATCH_NORM["decode_head"] | {"loss_decode": LOSSES}
    }
    # Images smaller than the crop: the padding is ignored, so the number of valid pixels varies.
    tiny["data"] |= {"batch_size": 8, "size": [40, 40], "ratio_range": [0.5, 2.0]}
    tiny["schedule"]["max_iters"] = 4
    found = []
    for world_size, accumulate in ((1, 1), (2, 1), (2, 2)):
        config = sibling(tiny, f"{world_size}x{accumulate}")
        config["data"]["accumulate"] = accumulate
        run(config, "--no-validate", world_size=world_size)
        found.append(metrics(config))
    names = [f"decode.{loss.get('loss_name')}" for loss in LOSSES[:5]]
    names += ["decode.loss_dice", "decode.loss_focal", "decode.loss_lovasz", "loss"]
    for name in names:
        whole, processes, micro_batches = [[line[name] for line in lines] for lines in found]
        np.testing.assert_allclose(processes, whole, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(micro_batches, whole, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_dependent_losses_are_announced(tiny, run, accumulate):
    """OHEM and the Lovász loss of a batch depend on how it is divided, and the log says so."""
    set_in_heads(tiny, sampler={"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 100})
    tiny["schedule"]["max_iters"] = 1
    tiny["data"]["accumulate"] = accumulate
    output = run(tiny, "--no-validate").output()
    assert ("warning: OHEMPixelSampler" in output) == (accumulate > 1)


@pytest.mark.parametrize(
    "world_size, settings",
    [(3, {}), (4, {}), (3, {"accumulate": 2}), (3, {"compile": True})],
    ids=["3", "4", "accumulate", "compile"],
)
def test_resume_is_exact_with_several_processes(tiny, run, world_size, settings):
    """From 3 processes on, the order in which gradients are summed matters."""
    tiny["data"]["accumulate"] = settings.get("accumulate", 1)
    tiny["data"]["batch_size"] = 2 * world_size * tiny["data"]["accumulate"]
    if "compile" in settings:
        tiny["compile"] = True
        use_few_layers(tiny)
    straight = sibling(tiny, "straight")
    resumed = sibling(tiny, "resumed")
    run(straight, "--no-validate", world_size=world_size)
    Path(resumed["work_dir"]).mkdir()
    for name in ("train.log", "metrics.jsonl", "iter_3.pth"):
        shutil.copy(Path(straight["work_dir"]) / name, resumed["work_dir"])
    run(resumed, "--no-validate", "--resume-from", "auto", world_size=world_size)
    assert_same_run(straight, resumed)


def test_signal_during_the_validation_that_a_resume_makes_up_for(tiny, run):
    """A second preemption, during the validation that the first one interrupted, is honored too.

    It comes to one of two ranks. The new work_dir has a log, which the checkpoint knows nothing of.
    """
    tiny["data"]["val_length"] = 600
    run(tiny, "--no-validate")
    path = Path(tiny["work_dir"]) / "iter_3.pth"
    torch.save(torch.load(path, weights_only=True) | {"validated": False}, path)
    other = sibling(tiny, "other")
    log = Path(other["work_dir"]) / "train.log"
    log.parent.mkdir()
    earlier = "an earlier line\n" * 1000
    log.write_text(earlier)
    process = run(other, "--resume-from", path, world_size=2, started=True)
    wait_for(lambda: "resumed from" in log.read_text(), process)
    os.kill(process.processes[1].pid, signal.SIGTERM)
    assert process.wait() == [143, 143]
    assert log.read_text().startswith(earlier)
    assert metrics(other) == []
    # The new work_dir holds the state, so that --resume-from auto goes on from it.
    saved = checkpoint(other)
    assert saved["iteration"] == 3
    assert saved["validated"] is False


@pytest.mark.parametrize("name, expected", [("fp32", False), ("tf32", True)])
def test_fp32_and_tf32_set_both_kinds_of_kernels(name, expected):
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    train.set_up_arithmetic(name, deterministic=False)
    found = [kind.allow_tf32 for kind in kinds]
    for kind, value in zip(kinds, before):
        kind.allow_tf32 = value
    assert found == [expected, expected]


@pytest.mark.parametrize("has_bf16, expected", [(True, "bf16"), (False, "fp16")])
def test_auto_precision_on_a_gpu(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert train.choose_precision("auto", torch.device("cuda")) == expected


# --------------------------------------------------------------------- Frozen parts, layer decay


def saved_bytes(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> int:
    """Bytes of tensors that a training step's forward pass keeps for the backward pass."""
    storages = {}  # keeps them alive, so that none takes the place of another

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = sum(model(image, label).values())
    loss.backward()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("with_cp", [False, True])
def test_frozen_backbone(tiny, with_cp: bool):
    """It has no gradients, keeps its statistics and nothing for the backward pass."""
    image = torch.randn(2, 3, 48, 48)
    label = torch.zeros(2, 48, 48, dtype=torch.uint8)
    tiny["model"]["backbone"]["with_cp"] = with_cp
    model = models.build_model(tiny["model"] | {"freeze": ["backbone"]}).eval().train()
    before = copy.deepcopy(model.backbone.state_dict())
    saved = saved_bytes(model, image, label)
    assert_same(dict(model.backbone.state_dict()), dict(before))
    assert not any(m.training for m in model.backbone.modules())
    assert model.decode_head.training
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.decode_head.parameters())
    with torch.no_grad():
        maps = model.backbone(image)
    model.backbone.forward = lambda image: maps
    assert saved == saved_bytes(model, image, label)


def test_frozen_parts_of_a_network(tiny):
    """A module of a backbone, without those whose names only begin alike, and a parameter."""
    freeze = ["backbone.layer1", "decode_head.conv_seg.bias"]
    model = models.build_model(tiny["model"] | {"freeze": freeze})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if not name.startswith("backbone.layer1.")} == {freeze[1]}
    assert len(frozen) == 1 + len(list(model.backbone.layer1.parameters()))
    with pytest.raises(models.ConfigError, match=r"model.freeze: .*did you mean backbone.layer4"):
        models.build_model(tiny["model"] | {"freeze": ["backbone.layer"]})
    with pytest.raises(models.ConfigError, match="model.freeze"):
        models.build_model(tiny["model"] | {"freeze": [""]})


def test_frozen_backbone_on_two_processes(tiny, run):
    """Resumed, with an average: the weights and statistics do not change."""
    tiny["model"]["freeze"] = ["backbone"]
    tiny["ema_decay"] = 0.5
    straight = sibling(tiny, "straight")
    run(straight, "--no-validate", world_size=2)
    Path(tiny["work_dir"]).mkdir()
    for name in ("train.log", "metrics.jsonl", "iter_3.pth"):
        shutil.copy(Path(straight["work_dir"]) / name, tiny["work_dir"])
    run(tiny, "--no-validate", "--resume-from", "auto", world_size=2)
    assert_same_run(straight, tiny)
    first = checkpoint(straight, "iter_3.pth")["state_dict"]
    for key, value in checkpoint(straight)["state_dict"].items():
        assert torch.equal(value, first[key]) == key.startswith("backbone."), key


def rates(backbone: dict, **paramwise) -> dict[str, float]:
    """The multiplier of each parameter's learning rate."""
    model = nn.Module()
    with torch.device("meta"):
        model.backbone = models.construct(models.BACKBONES, backbone, "backbone")
        model.decode_head = nn.Linear(2, 2)
    optimizer = train.build_optimizer(model, type="AdamW", lr=1e-3, paramwise=paramwise)
    of_parameter = {}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_mult"])
        of_parameter |= {id(parameter): group["lr_mult"] for parameter in group["params"]}
    names = {id(p): name.removeprefix("backbone.") for name, p in model.named_parameters()}
    return {names[key]: value for key, value in of_parameter.items()}


@pytest.mark.parametrize("arch,num_layers", [("tiny", 6), ("base", 12)])
def test_layer_decay_of_convnext_is_that_of_mmsegmentation(arch: str, num_layers: int):
    """By the formulas of its LearningRateDecayOptimizerConstructor with this `num_layers`."""

    def layer_id(name: str) -> int:
        part, stage, block = [*name.split("."), "0"][:3]
        if part == "downsample_layers":
            return [0, 2, 3, num_layers][int(stage)]
        if part == "stages":
            return [1, 2, 3 + int(block) // 3, num_layers][int(stage)]
        return num_layers + 1

    def stage_id(name: str) -> int:
        part, stage = name.split(".")[:2]
        if part == "downsample_layers":
            return 0
        return int(stage) + 1 if part == "stages" else num_layers + 1

    backbone = {"type": "ConvNeXt", "arch": arch}
    for decay_type, number in (("layer_wise", layer_id), ("stage_wise", stage_id)):
        found = rates(backbone, layer_decay=0.9, decay_type=decay_type)
        for name, rate in found.items():
            assert rate == pytest.approx(0.9 ** (num_layers + 1 - number(name))), name


def test_layer_decay_of_transformers():
    """BEiT's: 1 for the last norm and the heads, one factor more for each block below."""
    found = rates({"type": "VisionTransformer", "arch": "dinov3_vits16"}, layer_decay=0.5)
    exponents = {name: round(-np.log2(rate)) for name, rate in found.items()}
    for name, exponent in exponents.items():
        block = name.removeprefix("blocks.").split(".")[0]
        expected = 12 - int(block) if block.isdigit() else 13
        if name.startswith(("norm.", "decode_head.")):
            expected = 0
        assert exponent == expected, name

    found = rates({"type": "SwinTransformer"}, layer_decay=0.5)
    exponents = {name: round(-np.log2(rate)) for name, rate in found.items()}
    assert exponents["patch_embed.projection.weight"] == 13
    assert exponents["stages.0.blocks.1.norm1.weight"] == 11
    assert exponents["stages.0.downsample.reduction.weight"] == 11
    assert exponents["stages.3.blocks.1.norm1.weight"] == 1
    assert exponents["norm3.weight"] == 0

    found = rates({"type": "MixVisionTransformer", "num_layers": [2, 2, 2, 2]}, layer_decay=0.5)
    exponents = {name: round(-np.log2(rate)) for name, rate in found.items()}
    assert exponents["layers.0.0.projection.weight"] == 9
    assert exponents["layers.1.0.projection.weight"] == 7
    assert exponents["layers.3.1.1.norm1.weight"] == 1


def test_layer_decay_multiplies_rules():
    paramwise = {"layer_decay": 0.5, "blocks.11": {"lr_mult": 0.1}, "decode_head": {"lr_mult": 10}}
    found = rates({"type": "VisionTransformer", "arch": "dinov3_vits16"}, **paramwise)
    assert found["blocks.11.norm1.weight"] == pytest.approx(0.1 * 0.5)
    assert found["blocks.10.norm1.weight"] == pytest.approx(0.25)
    assert found["decode_head.weight"] == 10


@pytest.mark.parametrize(
    "backbone,paramwise,message",
    [
        ({"type": "ResNet", "depth": 18}, {}, "ResNet does not define the layers"),
        ({"type": "SwinTransformer"}, {"decay_type": "stage_wise"}, "stage_wise"),
        ({"type": "SwinTransformer"}, {"decay_type": "layers"}, "layer_wise or stage_wise"),
        ({"type": "SwinTransformer"}, {"layer_decay": 1.5}, "at most 1"),
        ({"type": "SwinTransformer"}, {"layer_decay": "0.9"}, "should be of type float"),
    ],
)
def test_errors_of_layer_decay(backbone: dict, paramwise: dict, message: str):
    with pytest.raises(models.ConfigError, match=message):
        rates(backbone, **({"layer_decay": 0.5} | paramwise))


@pytest.mark.parametrize(
    "place,key,value",
    [
        ("data_preprocessor.mean", "data.mean", [1, 2, 3]),
        ("data_preprocessor.std", "data.std", [1, 2, 3]),
        ("data_preprocessor.size", "data.crop_size", [64, 64]),
        ("test_cfg.mode", "evaluation.mode", "slide"),
        ("test_cfg.crop_size", "evaluation.crop_size", [32, 32]),
        ("test_cfg.stride", "evaluation.stride", [32, 32]),
    ],
)
def test_pasted_model_section_agrees_with_the_others(tiny, tmp_path, place, key, value):
    """What MMSegmentation says in the model section counts, or is an error that names our key."""
    tiny["evaluation"] |= {"mode": "slide", "crop_size": [48, 48], "stride": [24, 24]}
    tiny["model"]["test_cfg"] = dict(tiny["evaluation"])
    del tiny["model"]["test_cfg"]["interval"]
    if key == "evaluation.mode":
        tiny["evaluation"]["mode"] = "whole"
    section, name = place.split(".")
    tiny["model"].setdefault(section, {})[name] = value
    with pytest.raises(models.ConfigError, match=rf"model\.{place} is .* but {key}, which"):
        train.load_config(write_config(tiny, tmp_path))
    train.load_config(write_config(tiny, tmp_path), [f"{key}={json.dumps(value)}"])
