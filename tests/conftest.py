"""Shared by the tests: a tiny config, runs of train.py's command line, and reference numbers.

Runs are forked from a server process that has already imported torch, which saves seconds for each.
"""

import copy
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PARITY = ROOT / "tests" / "parity"
sys.path.insert(0, str(ROOT))

SERVER = multiprocessing.get_context("forkserver")
# Building a model on the meta device imports torch._dynamo, which takes a second.
SERVER.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "numpy", "PIL.Image", "tqdm"]
)


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.json"))
NEED_TIMM = [
    name for name in CONFIGS if '"TimmBackbone"' in (ROOT / f"configs/{name}.json").read_text()
]
each_config = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.optional("timm")) if name in NEED_TIMM else name
        for name in CONFIGS
    ],
)


def skip(reason: str) -> None:
    """Skip the test; fail it where REQUIRE_ALL is set, as in CI."""
    if os.environ.get("REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "optional(*packages): needs packages that requirements.txt does not list"
    )
    # nohup, and a shell that starts pytest in the background, leave signals ignored, which every
    # process that a test starts would inherit.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("optional"):
        for package in marker.args:
            if importlib.util.find_spec(package) is None:
                skip(f"the package {package} is not installed")


# -------------------------------------------------------------------------------------------- Runs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives to a process on a single machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_train(argv: list[str], env: dict[str, str], log: str, folder: str, code: str) -> None:
    """Run the train.py in the folder `code` in this process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["train.py", *argv]
    sys.path.insert(0, code)
    runpy.run_path(f"{code}/train.py", run_name="__main__")


class Run:
    """`python train.py ARGV` in `folder`, as one process or as `world_size` processes.

    code: the folder of train.py and the other modules.
    """

    def __init__(
        self,
        argv: list,
        folder: Path,
        world_size: int = 1,
        env: dict | None = None,
        code: Path = ROOT,
    ):
        self.logs = [folder / f"rank{rank}.out" for rank in range(world_size)]
        self.processes = []
        argv = [str(argument) for argument in argv]
        port = free_port()
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            environment = {}
            if world_size > 1:
                environment |= rank_environment(rank, world_size, port)
            if env:
                environment |= env
            arguments = (argv, environment, str(log), str(folder), str(code))
            process = SERVER.Process(target=run_train, args=arguments)
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for every rank to end. Return their exit codes."""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                self.kill()
                raise TimeoutError(f"still running after {timeout} s:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def output(self) -> str:
        """Standard output and errors of all ranks so far."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())


def write_config(config: dict, folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`run(config, "--resume-from", "auto", world_size=2, env={})` -> a finished Run.

    expect: the exit code of every rank; None allows any.
    started: return at once. What still runs at the end of the test is killed.
    """
    runs: list[Run] = []

    def start(
        config: dict,
        *argv,
        world_size: int = 1,
        env: dict | None = None,
        started: bool = False,
        expect: int | None = 0,
    ) -> Run:
        path = write_config(config, tmp_path)
        process = Run(["--config", path, *argv], tmp_path, world_size, env)
        runs.append(process)
        if not started:
            codes = process.wait()
            assert expect is None or set(codes) == {expect}, process.output()
        return process

    yield start
    for process in runs:
        process.kill()


def failing(run, config: dict, *argv, world_size: int = 1, env: dict | None = None) -> str:
    """The output of a run that must end with an error message and without a traceback."""
    output = run(config, *argv, world_size=world_size, env=env, expect=1).output()
    assert "error: " in output, output
    assert "Traceback" not in output, output
    return output


def wait_for(condition: Callable[[], bool], process: Run, seconds: float = 60) -> None:
    """Wait until `condition()` is true or the run has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.is_alive():
        assert time.monotonic() < end, process.output()
        time.sleep(0.002)


# ----------------------------------------------------------------------------------------- Configs

# Without batch norm, splitting a batch does not change the gradient.
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


def tiny_config(work_dir: Path) -> dict:
    """Six iterations of a model with 0.2 million parameters on the built-in data set."""
    backbone = {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "stem_channels": 8,
        "strides": [1, 2, 1, 1],
        "dilations": [1, 1, 2, 4],
    }
    decode_head = {
        "type": "PSPHead",
        "in_channels": 64,
        "in_index": 3,
        "channels": 16,
        "pool_scales": [1, 2],
        "dropout_ratio": 0.1,
        "num_classes": 8,
        "align_corners": False,
    }
    auxiliary_head = {
        "type": "FCNHead",
        "in_channels": 32,
        "in_index": 2,
        "channels": 8,
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0.1,
        "num_classes": 8,
        "align_corners": False,
        "loss_decode": {"loss_weight": 0.4},
    }
    return {
        "work_dir": str(work_dir),
        "precision": "fp32",
        "model": {
            "backbone": backbone,
            "decode_head": decode_head,
            "auxiliary_head": auxiliary_head,
        },
        "data": {
            "type": "synthetic",
            "batch_size": 4,
            "workers": 0,
            "crop_size": [48, 48],
            "length": 10,
            "val_length": 4,
        },
        "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0005},
        "schedule": {"max_iters": 6, "power": 0.9, "min_lr": 0.0001},
        "evaluation": {"interval": 6},
        "checkpoint": {"interval": 3},
        "log": {"interval": 1},
    }


@pytest.fixture
def tiny(tmp_path: Path) -> dict:
    return tiny_config(tmp_path / "work")


def set_in_heads(config: dict, **settings) -> None:
    """Change settings of both heads of the tiny config."""
    for head in ("decode_head", "auxiliary_head"):
        config["model"][head] |= settings


def sibling(config: dict, name: str) -> dict:
    """The same config with another work_dir, beside that of the given one."""
    config = copy.deepcopy(config)
    config["work_dir"] = str(Path(config["work_dir"]).with_name(name))
    return config


# --------------------------------------------------------------------------------- Results of runs


def metrics(config: dict, mode: str = "train") -> list[dict]:
    """The lines of metrics.jsonl of one mode, without times and memory, which vary."""
    found = []
    content = (Path(config["work_dir"]) / "metrics.jsonl").read_text()
    complete = content[: content.rfind("\n") + 1]  # a run may be writing the last line
    for text in complete.splitlines():
        line = json.loads(text)
        if line["mode"] == mode:
            for key in ("time", "data_time", "memory"):
                line.pop(key, None)
            found.append(line)
    return found


def iterations(config: dict) -> list[int]:
    """The iterations of the training lines of metrics.jsonl, in the order of the file."""
    return [line["iteration"] for line in metrics(config)]


def last_iteration(config: dict) -> int:
    """The last iteration in metrics.jsonl; 0 before the first. For runs under way."""
    if not (Path(config["work_dir"]) / "metrics.jsonl").exists():
        return 0
    return max(iterations(config), default=0)


def files_of(config: dict) -> dict[str, bytes]:
    """Name -> content of the files of the work_dir, without its subfolders."""
    paths = Path(config["work_dir"]).iterdir()
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def checkpoint(config: dict, name: str = "latest.pth") -> dict:
    return torch.load(Path(config["work_dir"]) / name, weights_only=True)


def assert_same(a: object, b: object, place: str = "") -> None:
    """Equal bit for bit, including tensors in nested dicts and lists."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{place}[{i}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), place
    else:
        assert a == b, place


def assert_same_run(a: dict, b: dict) -> None:
    """Two runs ended with the same checkpoint and wrote the same metrics."""
    for key in ("state_dict", "optimizer", "iteration", "best"):
        assert_same(checkpoint(a)[key], checkpoint(b)[key], key)
    for mode in ("train", "val"):
        assert metrics(a, mode) == metrics(b, mode)


# ------------------------------------------------------------------------- A run that tests share


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The tiny config after an uninterrupted run. Its work_dir is shared: do not write to it."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_config(folder / "work")
    process = Run(["--config", write_config(config, folder)], folder)
    assert process.wait() == [0], process.output()
    return config


@pytest.fixture
def finished(straight: dict, tiny: dict) -> dict:
    """The tiny config after an uninterrupted run, in a work_dir that the test may change."""
    shutil.copytree(straight["work_dir"], tiny["work_dir"])
    return tiny


# ------------------------------------------------------- Reference numbers: see parity/README.md


def parity_normal(key: str, shape: tuple) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)


def parity_tensor(key: str, shape: tuple) -> Tensor:
    """The entry of a checkpoint, filled in by the rule of parity/README.md."""
    n = parity_normal(key, shape)
    name = key.rsplit(".", 1)[-1]
    if name == "running_var":
        n = 1 + 0.1 * np.abs(n)
    elif name in ("running_mean", "bias"):
        n = 0.1 * n
    elif len(shape) >= 2:
        n = n / np.sqrt(np.prod(shape[1:]))
    else:
        n = 1 + 0.1 * n
    return torch.as_tensor(n)


def parity_image(key: str = "input") -> Tensor:
    return torch.as_tensor(parity_normal(key, (2, 3, 97, 129)))


def parity_label(num_classes: int, key: str = "labels") -> Tensor:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    label = rng.integers(0, num_classes, (2, 97, 129))
    label[:, :9] = 255
    return torch.as_tensor(label)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def parity_model(name: str) -> nn.Module:
    """The model that NAME.json describes, in float64, with the rule's weights and no dropout.

    Checks its number of parameters and its checkpoint's keys and shapes.
    """
    import models  # not at the top, where ROOT is not in sys.path yet

    described = json.loads((PARITY / f"{name}.json").read_text())
    before = copy.deepcopy(described["model"])
    model = models.build_model(described["model"]).double()
    assert described["model"] == before, "build_model changed its argument"
    assert sum(p.numel() for p in model.parameters()) == described["parameters"]

    built = model.state_dict()
    state = {}
    for key, shape, *kept in described["checkpoint"]:
        assert list(built[key].shape) == shape, key
        state[key] = built[key] if kept else parity_tensor(key, tuple(shape))
    model.load_state_dict(state, strict=True)
    return without_dropout(model)
