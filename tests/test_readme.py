"""The READMEs stay true: commands parse, paths and flags exist, tables match, the config trains."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import launch_slurm
import models
import train

PATHS = [
    ROOT / "README.md",
    ROOT / "configs/README.md",
    ROOT / "tests/README.md",
]


def without_their_names(text: str) -> str:
    """Leaves out the first column of the table of MMSegmentation's commands and keys."""

    def without_first_column(table: re.Match) -> str:
        return re.sub(r"^\| .*? \| ", "| ", table[0], flags=re.MULTILINE)

    table = r"^\| MMSegmentation \|.*?\n\n"
    return re.sub(table, without_first_column, text, flags=re.MULTILINE | re.DOTALL)


README = PATHS[0].read_text()
ZOO = without_their_names(PATHS[1].read_text())
TESTS = PATHS[2].read_text()
each_file = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.parent.name)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The command lines in blocks and in backticks, with variables filled in."""
    block = "\n".join(code_blocks(text, "bash"))
    block = block.replace("\\\n", " ")
    for name, value in re.findall(r"^(\w+)=(\S+)$", block, re.MULTILINE):
        block = block.replace(f"${name}", value)
    return block.splitlines() + re.findall(r"`(python [^`]+)`", text)


def flags(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


def flags_of(parse_args: Callable, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    return flags(capsys.readouterr().out)


# ------------------------------------------------------------------------------------- All three


def test_length():
    assert len(README.splitlines()) <= 400


@each_file
def test_width(path: Path):
    for line in path.read_text().splitlines():
        # The two commands that do their own set-up are one line each, to be copied as they are.
        assert len(line) <= 100 or line.startswith("python3 -m venv .venv && "), line


@each_file
def test_paths_exist(path: Path):
    text = without_their_names(path.read_text())
    links = re.findall(r"\]\((?!https:)([^)]+)\)", text)
    paths = re.findall(r"(?<![\w./-])(?:configs|tests|\.ci)/[\w./-]*\w", text)
    files = re.findall(r"(?<![\w./-])\w+\.(?:py|sh)\b", text)
    assert links
    assert files
    for name in links + paths + files:
        exists = (path.parent / name).exists() or (ROOT / name).exists()
        assert exists or name == "configs/NAME.json", name


def programs(name: str) -> list[str]:
    """The command lines that run a program: by python, by torchrun, or after setting up python."""
    lines = commands(README) + commands(ZOO) + commands(TESTS)
    return [line for line in lines if name in line]


def arguments(line: str, program: str) -> list[str]:
    words = shlex.split(line, comments=True)
    return words[words.index(program) + 1 :]


def check_arguments_of_train(argv: list[str]) -> None:
    config = train.parse_args(argv).config
    if config is None:  # it is in the checkpoint
        return
    # The README tells the user to write mine.json; NAME stands for any config.
    placeholders = ("mine.json", "configs/NAME.json")
    assert config in placeholders or (ROOT / config).is_file()


@pytest.mark.parametrize("line", programs("train.py"))
def test_commands_of_train(line: str):
    check_arguments_of_train(arguments(line, "train.py"))


@pytest.mark.parametrize("line", programs("launch_slurm.py"))
def test_commands_of_launch_slurm(line: str):
    _, rest = launch_slurm.parse_args(arguments(line, "launch_slurm.py"))
    check_arguments_of_train(rest)


def test_commands_are_found():
    """Guards the tests above against an expression that matches nothing."""
    text = "\n".join(commands(README))
    for part in ("torchrun", "launch_slurm.py", "--eval-only", "quickstart.json", "mine.json"):
        assert part in text


def test_commands_of_help(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " train.py --" in line]
    assert len(lines) > 2
    for line in lines:
        check_arguments_of_train(arguments(line, "train.py"))


def test_flags_exist(capsys):
    of_train = flags_of(train.parse_args, capsys)
    of_slurm = flags_of(launch_slurm.parse_args, capsys)
    table = README.split("| flag ")[1].split("\n\n")[0]
    assert flags(table) <= of_slurm
    in_backticks = re.findall(r"`(--[^`]*)`", README + ZOO)
    assert flags(" ".join(in_backticks)) <= of_train | of_slurm


# ---------------------------------------------------------------------------------------- README


def write_samples(folder: Path, split: str, count: int) -> None:
    """Random images, and labels of three classes, in the layout that the README describes."""
    rng = np.random.default_rng(0)
    images = folder / "images" / split
    labels = folder / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i in range(count):
        image = rng.integers(0, 256, (32, 64, 3), np.uint8)
        label = rng.integers(0, 3, (32, 64), np.uint8)
        Image.fromarray(image).save(images / f"{i}.png")
        Image.fromarray(label).save(labels / f"{i}.png")


def test_own_data(tmp_path: Path, run):
    """The config of the README loads as it is, and trains once it is made small."""
    write_samples(tmp_path / "data/mine", "train", 4)
    write_samples(tmp_path / "data/mine", "val", 2)
    (text,) = code_blocks(README, "json")
    path = tmp_path / "mine.json"
    path.write_text(text)
    train.load_config(path)
    small = [
        "schedule.max_iters=2",
        "data.batch_size=2",
        "data.crop_size=[64, 64]",
        "data.workers=0",
        "evaluation.scale=[128, 64]",
    ]
    run(json.loads(text), "--options", *small)
    latest = tmp_path / "work_dirs/mine/latest.pth"
    checkpoint = torch.load(latest, weights_only=True)
    assert checkpoint["iteration"] == 2
    assert checkpoint["classes"] == ["road", "car", "sky"]


def test_every_key_of_the_config_is_explained():
    (text,) = code_blocks(README, "json")
    explained = README.split(text)[1].split("## Hack it")[0]
    for key in re.findall(r'"(\w+)":', text):
        assert f"`{key}`" in explained, key


# --------------------------------------------------------------------------------------- The zoo


def gflops(model: models.Segmentor, height: int, width: int) -> float:
    image = torch.zeros(1, 3, height, width)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 1e9


def test_zoo():
    """A row for every config, with the figures that the config and its network have."""
    rows = re.findall(r"^\| (\w[\w-]*) \| (\d.*) \|$", ZOO, re.MULTILINE)
    names = [name for name, _ in rows]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "configs").glob("*.json"))
    for name, row in rows:
        config = json.loads((ROOT / f"configs/{name}.json").read_text())
        height, width = config["data"]["crop_size"]
        with torch.device("meta"), torch.no_grad():
            model = models.build_model(config["model"]).eval()
            cost = gflops(model, height, width)
        parameters = sum(p.numel() for p in model.parameters())
        cells = row.split(" | ")
        assert cells[0] == str(model.num_classes), name
        assert cells[1] == f"{height}x{width}", name
        assert cells[2].replace("k", "000") == str(config["schedule"]["max_iters"]), name
        assert cells[3] == str(config["data"]["batch_size"]), name
        assert cells[4] == f"{parameters / 1e6:.1f}", name
        assert float(cells[5]) == pytest.approx(cost, rel=0.01), name


def test_counterparts_of_mmsegmentation_exist():
    """Every key in the second column of the table is one of a config."""
    sections = {
        "data": models.keywords(data.Data) | models.keywords(data.Folder),
        "evaluation": models.keywords(train.Evaluation),
        "checkpoint": models.keywords(train.Checkpoint),
        "log": models.keywords(train.Logging),
        "optimizer": models.keywords(train.build_optimizer),
        "schedule": models.keywords(train.learning_rate),
    }
    table = ZOO.split("## From MMSegmentation")[1].split("## ")[0]
    keys = re.findall(rf"`({'|'.join(sections)})\.(\w+)`", table)
    assert len(keys) > 20
    for section, key in keys:
        assert key in sections[section], (section, key)


def test_zoo_names_what_exists():
    camel_case = set(re.findall(r"`([A-Z]\w*[a-z]\w*)`", ZOO))
    classes = camel_case - {"True", "False", "None"}
    assert classes - {*models.NECKS} == {*models.BACKBONES, *models.HEADS, *models.LOSSES}
    table = ZOO.split("| type | classes |")[1].split("\n\n")[0]
    types = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert set(types) == set(data.DATASETS)


def test_class_map_of_several_data_sets():
    (block,) = code_blocks(ZOO, "json")
    _, camvid = json.loads(f"{{{block}}}")["datasets"]
    names = [camvid["class_map"].get(name, name) for name in data.CAMVID_CLASSES]
    assert set(names) <= set(data.CITYSCAPES_CLASSES)
    assert set(camvid["class_map"]) <= set(data.CAMVID_CLASSES)


# ------------------------------------------------------------------------------ The measurements


def test_benchmark_commands():
    source = (ROOT / "tests/benchmark.py").read_text()
    lines = programs("benchmark.py")
    assert lines
    for flag in flags(" ".join(lines)):
        assert f'"{flag}"' in source, flag


def test_variables_are_read():
    files = (ROOT / "tests").glob("*.py")
    sources = "".join(path.read_text() for path in files)
    names = re.findall(r"^\| `([A-Z_]+)", TESTS, re.MULTILINE)
    assert names
    for name in names:
        assert f'"{name}"' in sources, name
