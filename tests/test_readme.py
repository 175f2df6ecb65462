"""The READMEs stay true: commands parse, paths and flags exist, tables match, the config trains."""

import json
import re
import shlex
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

PATHS = [ROOT / "README.md", ROOT / "configs" / "README.md", ROOT / "tests" / "README.md"]
README, ZOO, TESTS = (path.read_text() for path in PATHS)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The command lines in blocks and in backticks, with variables filled in."""
    block = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ")
    lines = block.splitlines() + re.findall(r"`(python [^`]+)`", text)
    for name, value in re.findall(r"^(\w+)=(\S+)$", block, re.MULTILINE):
        lines = [line.replace(f"${name}", value) for line in lines]
    return lines


def flags(parse_args, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


# ------------------------------------------------------------------------------------- All three


def test_length():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.parent.name)
def test_width(path: Path):
    for line in path.read_text().splitlines():
        # The two commands that do their own set-up are one line each, to be copied as they are.
        assert len(line) <= 100 or line.startswith("python3 -m venv .venv && "), line


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.parent.name)
def test_paths_exist(path: Path):
    text = path.read_text()
    links = re.findall(r"\]\((?!https:)([^)]+)\)", text)
    names = re.findall(r"(?<![\w./-])((?:configs|tests|\.ci)/[\w./-]*\w|\w+\.(?:py|sh))\b", text)
    assert links and names
    for name in {*links, *names} - {"configs/NAME.json"}:
        assert (path.parent / name).exists() or (ROOT / name).exists(), name


# python, torchrun, or the set-up of an environment stands before the program and its arguments.
STARTED = [
    (program, line)
    for line in commands(README) + commands(ZOO) + commands(TESTS)
    for program in ("train.py", "launch_slurm.py")
    if program in line
]


@pytest.mark.parametrize("program,line", STARTED, ids=[line for _, line in STARTED])
def test_commands_parse(program: str, line: str):
    words = shlex.split(line, comments=True)
    argv = words[words.index(program) + 1 :]
    if program == "launch_slurm.py":
        _, argv = launch_slurm.parse_args(argv)
    config = train.parse_args(argv).config
    # The README tells the user to write the first; the second stands for any config.
    assert config in ("mine.json", "configs/NAME.json") or (ROOT / config).is_file()


def test_commands_are_found():
    """Guards the tests above against an expression that matches nothing."""
    text = "\n".join(commands(README))
    for part in ("torchrun", "launch_slurm.py", "--eval-only", "quickstart.json", "mine.json"):
        assert part in text


def test_flags_exist(capsys):
    of_train = flags(train.parse_args, capsys)
    of_slurm = flags(launch_slurm.parse_args, capsys)
    (table,) = re.findall(r"^\| flag.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"--[a-z-]+", table)) - {"---"} <= of_slurm
    assert set(re.findall(r"`(--[a-z-]+)", README + ZOO)) <= of_train | of_slurm


# ---------------------------------------------------------------------------------------- README


def test_own_data(tmp_path: Path, run):
    """The config of the README trains as it is, but for the sizes, on a folder as described."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind, channels in (("images", (3,)), ("labels", ())):
            folder = tmp_path / "data" / "mine" / kind / split
            folder.mkdir(parents=True)
            for i in range(count):
                values = rng.integers(0, 3, (32, 64, *channels), np.uint8)
                Image.fromarray(values).save(folder / f"{i}.png")
    (text,) = code_blocks(README, "json")
    (tmp_path / "mine.json").write_text(text)
    train.load_config(tmp_path / "mine.json")
    options = ["schedule.max_iters=2", "data.batch_size=2", "data.crop_size=[64, 64]"]
    options += ["data.workers=0", "evaluation.scale=[128, 64]"]
    run(json.loads(text), "--options", *options)
    checkpoint = torch.load(tmp_path / "work_dirs" / "mine" / "latest.pth", weights_only=True)
    assert checkpoint["iteration"] == 2 and checkpoint["classes"] == ["road", "car", "sky"]


def test_every_key_of_the_config_is_explained():
    (text,) = code_blocks(README, "json")
    explained = README.split(text)[1].split("## Hack it")[0]
    for key in re.findall(r'"(\w+)":', text):
        assert f"`{key}`" in explained, key


def test_recipe_of_a_head(monkeypatch):
    """The code that the README puts at the end of models.py makes a head that trains."""
    monkeypatch.setattr(models, "HEADS", dict(models.HEADS))
    (code,) = code_blocks(README, "python")
    exec(code, dict(vars(models)))
    head = {"type": "MyHead", "dilation": 2, "in_channels": 512, "channels": 8, "num_classes": 3}
    model = models.build_model({"backbone": {"type": "ResNet", "depth": 18}, "decode_head": head})
    label = torch.zeros(2, 64, 64, dtype=torch.uint8)
    loss = sum(model(torch.randn(2, 3, 64, 64), label).values())
    loss.backward()
    assert model.decode_head.conv.conv.weight.grad.abs().sum() > 0


def test_recipes_name_what_exists():
    recipes = README.split("## Hack it")[1].split("## Slurm")[0]
    places = [
        (models, ["Backbone", "BACKBONES", "Loss", "LOSSES"]),
        (models.Loss, ["loss_sum", "normalizer"]),
        (data, ["Folder", "Synthetic", "DATASETS", "TrainSamples", "photometric_distortion"]),
        (data.TrainSamples, ["sample"]),
        (train, ["learning_rate"]),
    ]
    for place, names in places:
        for name in names:
            assert name in recipes and hasattr(place, name), name


# --------------------------------------------------------------------------------------- The zoo


def test_zoo():
    """A row for every config, with the figures that the config and its network have."""
    rows = re.findall(r"^\| (\w[\w-]*) \| (\d.*) \|$", ZOO, re.MULTILINE)
    found = dict(rows)
    assert len(rows) == len(found)
    assert found.keys() == {path.stem for path in (ROOT / "configs").glob("*.json")}
    for name, row in found.items():
        classes, crop, iterations, batch, parameters, gflops, _ = row.split(" | ")
        config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
        height, width = config["data"]["crop_size"]
        assert crop == f"{height}x{width}", name
        assert int(iterations.replace("k", "000")) == config["schedule"]["max_iters"], name
        assert int(batch) == config["data"]["batch_size"], name
        with torch.device("meta"), torch.no_grad():
            model = models.build_model(config["model"]).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 3, height, width))
        assert int(classes) == model.num_classes, name
        assert parameters == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}", name
        assert float(gflops) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01), name


def test_zoo_names_what_exists():
    classes = set(re.findall(r"`([A-Z]\w*[a-z]\w*)`", ZOO)) - {"True", "False", "None"}
    assert classes == {*models.BACKBONES, *models.HEADS, *models.LOSSES}
    table = ZOO.split("| type | classes |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(data.DATASETS)


# ------------------------------------------------------------------------------ The measurements


def test_benchmark_commands():
    source = (ROOT / "tests" / "benchmark.py").read_text()
    lines = [line for line in commands(TESTS) if "benchmark.py" in line]
    assert len(lines) >= 6
    for word in shlex.split(" ".join(lines)):
        if word.startswith("--"):
            assert f'"{word}"' in source, word


def test_variables_are_read():
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"^\| `([A-Z_]+)", TESTS, re.MULTILINE)
    assert len(names) == 4
    for name in names:
        assert f'"{name}"' in sources, name
