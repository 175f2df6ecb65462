"""Never lose a run: kills, bad checkpoints, full disks, numbers that go wrong, hangs, files that want to do harm, and whatever comes in a config.

More of it than the suite has time for: KILLS=50 FUZZ=5000 LONG=20000 python -m pytest tests/test_lost.py -s
"""

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from test_train import (
    WITHOUT_BATCH_NORM,
    assert_same,
    assert_same_run,
    checkpoint,
    metrics,
    sibling,
)

import train

KILLS, FUZZ, LONG = (
    int(os.environ.get(name, default))
    for name, default in (("KILLS", 6), ("FUZZ", 150), ("LONG", 240))
)


def wait_for(true, process: Run, seconds: float = 60) -> None:
    """Until it is true, or the run has ended."""
    end = time.monotonic() + seconds
    while not true() and any(p.is_alive() for p in process.processes):
        assert time.monotonic() < end, process.output()
        time.sleep(0.002)


def assert_sound(folder: Path, keep: int) -> None:
    """Every checkpoint loads, and there are no more than `keep` (and one more where a kill came before the oldest was removed)."""
    found = train.newest_checkpoints(folder)
    assert len(found) <= keep + 1
    for path in [*found, *folder.glob("latest.pth"), *folder.glob("best.pth")]:
        train.load_checkpoint(path)


# ------------------------------------------------------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    return {"folder": tmp_path_factory.mktemp("undisturbed")}


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(tiny, run, undisturbed, number):
    """One or two processes, all or one of them killed: at a random time, or while a checkpoint is being written; resumed until done."""
    dice, world_size = random.Random(number), 1 + number % 2
    tiny["schedule"]["max_iters"], tiny["checkpoint"], tiny["timeout"] = (
        16,
        {"interval": 2, "keep": 2},
        8,
    )
    tiny["evaluation"]["interval"] = 5
    straight, killed = sibling(tiny, "straight"), sibling(tiny, "killed")
    straight["work_dir"] = str(undisturbed["folder"] / f"world_size{world_size}")
    if world_size not in undisturbed:
        began = time.monotonic()
        run(straight, world_size=world_size)
        undisturbed[world_size] = time.monotonic() - began
    folder, kills = Path(killed["work_dir"]), dice.randint(1, 4)
    for _ in range(kills):
        process = run(killed, "--resume-from", "auto", world_size=world_size, started=True)
        if dice.random() < 0.5:
            time.sleep(dice.uniform(0, undisturbed[world_size]))
        else:
            before = set(folder.glob("iter_*.pth"))
            wait_for(
                lambda before=before: (
                    any(".tmp" in p.name for p in folder.glob(".iter*"))
                    or set(folder.glob("iter_*.pth")) > before
                ),
                process,
            )
        for victim in (
            process.processes if dice.random() < 0.5 else [dice.choice(process.processes)]
        ):
            victim.kill()
        process.wait()
        assert_sound(folder, keep=2)
    run(killed, "--resume-from", "auto", world_size=world_size)
    assert_same_run(straight, killed)
    assert len(train.newest_checkpoints(folder)) == 2 and not list(folder.glob(".*.tmp"))


# ------------------------------------------------------------------------------------------------------- bad checkpoints


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "zeros", "not finite"])
def test_auto_falls_back_to_the_last_good_checkpoint(tiny, run, damage):
    tiny["checkpoint"]["interval"] = 2
    straight, damaged = sibling(tiny, "straight"), sibling(tiny, "damaged")
    run(straight)
    shutil.copytree(straight["work_dir"], damaged["work_dir"])
    path = Path(damaged["work_dir"]) / "iter_6.pth"
    content = bytearray(path.read_bytes())
    path.unlink()  # latest.pth is the same file
    if damage == "not finite":
        state = checkpoint(straight)
        state["state_dict"]["decode_head.conv_seg.bias"][0] = float("nan")
        torch.save(state, path)
    else:
        content[len(content) // 2] ^= damage == "flipped"
        path.write_bytes(
            {
                "truncated": content[:-1000],
                "flipped": content,
                "empty": b"",
                "zeros": bytes(len(content)),
            }[damage]
        )
    process = run(damaged, "--resume-from", "auto")
    assert (
        "iter_6.pth" in process.output()
        and "resumed from" in process.output()
        and "iter_4.pth at iteration 4" in process.output()
    )
    assert_same_run(straight, damaged)


def test_any_flipped_bit_is_noticed_or_without_effect(tiny, run, tmp_path):
    """300 places all over the file: it is refused, or what is loaded is the same (the bit was in padding)."""
    run(tiny, "--no-validate")
    path = Path(tiny["work_dir"]) / "latest.pth"
    whole, good, dice, refused = path.read_bytes(), checkpoint(tiny), random.Random(0), 0
    for _ in range(300):
        content = bytearray(whole)
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (tmp_path / "flipped.pth").write_bytes(content)
        try:
            assert_same(train.load_checkpoint(tmp_path / "flipped.pth"), good)
        except train.CheckpointError:
            refused += 1
    assert refused > 200


# ------------------------------------------------------------------------------------------------------------ full disks


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], check=False
        ).returncode
    ):
        pytest.fail("needs root") if os.environ.get("REQUIRE_ALL") else pytest.skip(
            "needs root, to mount a file system"
        )
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("trouble", ["full", "gone"])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_checkpoint_that_cannot_be_written(tiny, run, disk, trouble, lasting):
    """It is reported, the good ones stay, the run goes on; if the last save works it ends well, else with an error."""
    tiny["schedule"]["max_iters"], tiny["checkpoint"] = 60, {"interval": 2, "keep": 2}
    tiny["work_dir"] = str(disk / "work")
    folder, filler = disk / "work", disk / "filler"
    process = run(tiny, "--no-validate", started=True)
    wait_for(lambda: (folder / "iter_4.pth").exists(), process)
    if trouble == "full":
        with open(filler, "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
    else:
        shutil.rmtree(folder)
        if lasting:
            folder.write_text("in the way")
    if trouble == "full" or lasting:
        wait_for(lambda: "could not be written" in process.output(), process)
    if not lasting:
        filler.unlink(missing_ok=True)
    codes, output = process.wait(), process.output()
    assert codes == [int(lasting)] and "Traceback" not in output, output
    if lasting:
        assert re.search(
            "error: the last checkpoint .*"
            + ("No space left on device" if trouble == "full" else "exists"),
            output,
        ), output
    else:
        assert checkpoint(tiny)["iteration"] == 60
    if trouble == "full":
        assert_sound(folder, keep=2)
        filler.unlink(missing_ok=True)
        run(tiny, "--no-validate", "--resume-from", "auto")
        assert [line["iteration"] for line in metrics(tiny)] == list(range(1, 61))


def test_a_disk_that_can_only_be_read(tiny, run, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    process = run(tiny, "--work-dir", disk / "work", expect=1)
    assert (
        f"work_dir {disk}/work cannot be written" in process.output()
        and "Traceback" not in process.output()
    )


# ------------------------------------------------------------------------------------------------- numbers that go wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(tiny, run, tmp_path, world_size):
    """A NaN in one image. All processes stop; the message names iteration, positions and files, and its command runs that batch again."""
    from test_errors import folder_of_images

    tiny["data"] = folder_of_images(tmp_path / "set", count=8) | {
        "image_suffix": None,
        "in_channels": 3,
    }
    for head in ("decode_head", "auxiliary_head"):
        tiny["model"][head]["num_classes"] = 3
    bad = tmp_path / "set" / "images" / "train" / "5.npy"
    for i in range(8):
        bad.with_name(f"{i}.png").unlink()
        np.save(
            bad.with_name(f"{i}.npy"), np.full((48, 64, 3), np.nan if i == 5 else i, np.float32)
        )
    tiny["data"] |= {"ratio_range": [1.0, 1.0], "cat_max_ratio": 1.0}
    process = run(tiny, "--no-validate", world_size=world_size, expect=1)
    output, source, batch = process.output(), train.Data(**tiny["data"]), tiny["data"]["batch_size"]
    (iteration,) = set(
        map(
            int,
            re.findall(
                r"the loss of iteration (\d+) \(counted from 0\) is not finite: .* The weights were not updated",
                output,
            ),
        )
    )
    files = {
        position: source.sample_files([position])[0]
        for position in range(iteration * batch, (iteration + 1) * batch)
    }
    assert str(bad) in files.values() and all(
        f"{position} {name}\n" in output for position, name in files.items()
    )
    command = re.search(
        r"Iteration \d+ again: (?:python|torchrun --standalone --nproc_per_node=2) train.py (.*)",
        output,
    )[1].split()
    again = Run(command, Path(tiny["work_dir"]).parent, world_size)
    assert set(again.wait()) == {1}
    line = r"the loss of iteration .*"
    assert re.search(line, again.output())[0] == re.search(line, output)[0]


def test_an_update_that_breaks_the_weights_is_named(tiny, run):
    """The loss of iteration 0 is finite, its update is not: iteration 1 notices, and iteration 0 is to blame."""
    tiny["optimizer"] = {"type": "SGD", "lr": 1e39}
    output = run(tiny, "--no-validate", expect=1).output()
    assert (
        re.search(r"the loss of iteration 1 .*The update of iteration 0 broke the weights", output)
        and "\n  0 synthetic scene" in output
    )


def test_weights_that_are_not_finite_are_not_saved(tiny, run):
    """The loss is still finite when the weights no longer are."""
    tiny["optimizer"] = {"type": "SGD", "lr": 1e39}
    tiny["checkpoint"]["interval"] = 1
    process = run(tiny, "--no-validate", expect=1)
    assert (
        "values that are not finite in" in process.output() and "Traceback" not in process.output()
    )
    assert not list(Path(tiny["work_dir"]).glob("iter_*.pth"))


# ------------------------------------------------------------------------------------------- determinism, other numbers


def test_two_runs_are_equal_and_say_what_they_were(tiny, run):
    a, b = sibling(tiny, "a"), sibling(tiny, "b")
    for config in (a, b):
        run(config)
    assert_same_run(a, b)
    said = json.loads((Path(a["work_dir"]) / "config.json").read_text())
    assert {"command", "git_commit", "git_diff", "versions"} <= said[
        "run"
    ].keys() and "--config" in said["run"]["command"]
    assert checkpoint(a)["config"]["model"] == a["model"] == said["model"]


def test_resume_on_another_number_of_processes(tiny, run):
    """The same samples; in float64 without dropout the same losses but for rounding."""
    tiny["precision"] = "fp64"
    for head in ("decode_head", "auxiliary_head"):
        tiny["model"][head]["dropout_ratio"] = 0.0
    straight = sibling(tiny, "straight")
    run(straight, "--no-validate")
    for world_size in (2, 4):
        elastic = sibling(tiny, f"elastic{world_size}")
        Path(elastic["work_dir"]).mkdir()
        shutil.copy(Path(straight["work_dir"]) / "iter_3.pth", elastic["work_dir"])
        run(elastic, "--no-validate", "--resume-from", "auto", world_size=world_size)
        np.testing.assert_allclose(
            [line["loss"] for line in metrics(elastic)],
            [line["loss"] for line in metrics(straight)][3:],
            rtol=1e-8,
        )


# ------------------------------------------------------------------------------------------------------------------ hangs


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_and_is_named(tiny, run, how, victim):
    tiny["schedule"]["max_iters"], tiny["timeout"] = 10000, 4
    process = run(tiny, "--no-validate", world_size=2, started=True)
    wait_for(
        lambda: Path(tiny["work_dir"], "metrics.jsonl").exists() and len(metrics(tiny)) > 2, process
    )
    os.kill(process.processes[victim].pid, how)
    other = process.processes[1 - victim]
    other.join(40)
    assert other.exitcode == 1, process.output()
    assert (
        f"rank {1 - victim} lost contact" in process.output()
        and f"No answer from rank(s) [{victim}]" in process.output()
    )


def test_a_killed_worker_ends_the_run(tiny, run):
    tiny["schedule"]["max_iters"], tiny["data"]["workers"] = 10000, 1
    process = run(tiny, "--no-validate", started=True)
    wait_for(
        lambda: Path(tiny["work_dir"], "metrics.jsonl").exists() and len(metrics(tiny)) > 2, process
    )
    pid = process.processes[0].pid
    worker = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait(30) == [1]
    assert (
        "error: a data worker has died" in process.output() and "Traceback" not in process.output()
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_unused_parameters_are_named_at_the_first_step(tiny, run, world_size):
    tiny["model"]["decode_head"] = dict(
        tiny["model"]["auxiliary_head"], channels=16
    )  # on the third stage: nobody needs the fourth
    process = run(tiny, "--no-validate", world_size=world_size, expect=int(world_size > 1))
    assert (
        re.search(r"no loss depends on \d+ parameters: backbone\.layer4", process.output())
        and "Traceback" not in process.output()
    )


# ------------------------------------------------------------------------------------------- files that want to do harm


def test_names_from_files_stay_in_their_folders(tiny, run, tmp_path):
    """A list of samples that leads out of data.root, and log sizes in a checkpoint that are none."""
    from test_errors import folder_of_images

    tiny["data"] = folder_of_images(tmp_path / "set")
    for head in ("decode_head", "auxiliary_head"):
        tiny["model"][head]["num_classes"] = 3
    (tmp_path / "set" / "list.txt").write_text("../secret.png labels/train/0.png\n")
    process = run(tiny, "--options", "data.files=list.txt", expect=1)
    assert "is outside data.root" in process.output()
    run(tiny, "--no-validate")
    path = Path(tiny["work_dir"]) / "iter_6.pth"
    torch.save(checkpoint(tiny) | {"logs": {"train.log": -1, "../config.json": 0}}, path)
    process = run(tiny, "--no-validate", "--resume-from", "auto", expect=None)
    assert "Traceback" not in process.output() and (tmp_path / "config.json").stat().st_size


# ------------------------------------------------------------------------------------------------------------------- fuzz

WORDS = [
    "",
    "x",
    "ResNet",
    "MixVisionTransformer",
    "PSPHead",
    "ASPPHead",
    "OCRHead",
    "UPerHead",
    "folder",
    "synthetic",
    "voc",
    "SGD",
    "AdamW",
    "LBFGS",
    "SparseAdam",
    "Adafactor",
    "slide",
    "linear",
    "fp64",
    "bf16",
    "fp16",
    "multiple_select",
    "None",
    "[",
    "{split}",
    "\0",
    "é",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    1.5,
    -0.5,
    1e-9,
    1e300,
    float("inf"),
    float("nan"),
    2**31,
    10**12,
    2**63,
]


def places(node: object, place: tuple = ()) -> list[tuple]:
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    return [
        found for key, value in items for found in [(*place, key), *places(value, (*place, key))]
    ]


def some_value(dice: random.Random, depth: int = 2) -> object:
    kind = dice.randrange(8 if depth else 5)
    if kind > 5:
        return [some_value(dice, depth - 1) for _ in range(dice.randrange(5))]
    if kind == 5:
        return {
            dice.choice(["type", "lr_mult", *WORDS]): some_value(dice, depth - 1)
            for _ in range(dice.randrange(3))
        }
    return dice.choice([WORDS, WORDS, NUMBERS, NUMBERS, [True, False, None]][kind])


def mutated(config: dict, dice: random.Random) -> tuple[dict, list[str]]:
    """One to three places of a config replaced, removed or added to, some of them by an option."""
    config, options = copy.deepcopy(config), []
    for _ in range(dice.randint(1, 3)):
        place, value, how = (
            dice.choice(places(config)),
            some_value(dice),
            dice.choice(["replace", "replace", "option", "remove", "add"]),
        )
        section = config
        for key in place[:-1]:
            section = section[key]
        if how == "option":
            options.append(
                ".".join(map(str, place))
                + "="
                + (value if isinstance(value, str) else json.dumps(value))
            )
        elif how == "remove":
            del section[place[-1]]
        elif how == "add" and isinstance(section, dict):
            section[dice.choice(WORDS)] = value
        else:
            section[place[-1]] = value
    return config, options


def test_whatever_comes_in_is_a_run_or_one_clear_error(tiny, tmp_path, monkeypatch):
    """Mutations of a config and of its options: each runs for one iteration or is one of the errors that a user can mend."""
    monkeypatch.chdir(tmp_path)
    refused = ran = 0
    for number in range(FUZZ):
        config, options = mutated(tiny, random.Random(number))
        options += ["schedule.max_iters=1", "compile=false"]  # would take long, no more
        (tmp_path / "fuzz.json").write_text(json.dumps(config))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            if train.load_config(tmp_path / "fuzz.json", options)["data"].get("workers", 0) < 3:
                train.main(
                    [
                        "--config",
                        str(tmp_path / "fuzz.json"),
                        "--work-dir",
                        str(tmp_path / "out"),
                        "--options",
                        *options,
                    ]
                )
            ran += 1
        except train.UserError as error:
            assert len(str(error)) > 20
            refused += 1
        except BaseException as error:
            raise AssertionError(f"case {number}: {options}\n{json.dumps(config)}") from error
    print(f"\nfuzz: {refused} refused, {ran} ran")
    assert refused > ran > 0


# ----------------------------------------------------------------------------------------------------------------- long


def resources(process: Run) -> dict[int, tuple[int, int]]:
    """MiB in memory (not shared) and open files of each process and worker."""
    found, pids = {}, [p.pid for p in process.processes]
    for pid in pids:
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
        found[pid] = (
            (resident - shared) * os.sysconf("SC_PAGE_SIZE") >> 20,
            len(os.listdir(f"/proc/{pid}/fd")),
        )
    return found


def test_long_run(tiny, run):
    """Stopped three times: memory and open files of every process and worker are flat, and no line is lost or doubled."""
    (
        tiny["schedule"]["max_iters"],
        tiny["data"]["workers"],
        tiny["data"]["length"],
        tiny["model"],
    ) = LONG, 1, 97, WITHOUT_BATCH_NORM
    tiny["evaluation"]["interval"], tiny["checkpoint"] = (
        LONG // 8,
        {"interval": max(LONG // 40, 10), "keep": 2},
    )
    growth = []
    for quarter in (1, 2, 3, 4):
        process = run(tiny, "--resume-from", "auto", world_size=2, started=True)

        def done() -> int:
            return (
                metrics(tiny)[-1]["iteration"]
                if Path(tiny["work_dir"], "metrics.jsonl").exists() and metrics(tiny)
                else 0
            )

        wait_for(lambda begin=LONG * (quarter - 0.6) / 4: done() >= begin, process, 1800)
        before = resources(process)
        wait_for(lambda end=LONG * (quarter - 0.05) / 4: done() >= end, process, 1800)
        after = resources(process)
        assert before.keys() == after.keys()
        growth += [
            (after[pid][0] - before[pid][0], after[pid][1] - before[pid][1]) for pid in before
        ]
        if quarter < 4:
            process.processes[0].terminate()
        assert process.wait(1800) == ([143, 143] if quarter < 4 else [0, 0]), process.output()
    print(
        f"\nlong: {LONG} iterations, growth of memory (MiB) and open files of each process: {growth}"
    )
    assert (
        max(memory for memory, _ in growth) < 16 and max(files for _, files in growth) <= 24
    )  # batches on their way from a worker
    assert [line["iteration"] for line in metrics(tiny)] == list(range(1, LONG + 1))
    assert len(re.findall(r"Iter \[", Path(tiny["work_dir"], "train.log").read_text())) == LONG
