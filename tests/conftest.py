"""What the tests share: a tiny config, and real runs of train.py's command line in processes that need not import torch anew."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.distributed", "numpy", "PIL.Image", "tqdm"])


def _child(argv: list[str], env: dict, log: str, cwd: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["train.py", *argv]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Run:
    """`python train.py ARGV` as one process, or as `world_size` processes that meet at a port, as torchrun starts them."""

    def __init__(self, argv: list, folder: Path, world_size: int = 1, env: dict | None = None):
        self.logs = [folder / f"rank{rank}.out" for rank in range(world_size)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            ranks = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = {
                key: str(value)
                for key, value in ((ranks if world_size > 1 else {}) | (env or {})).items()
            }
            process = SERVER.Process(
                target=_child, args=([str(a) for a in argv], environment, str(log), str(folder))
            )
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes of the ranks."""
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

    def output(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())


@pytest.fixture
def tiny(tmp_path: Path) -> dict:
    """A net of 44 thousand parameters on the built-in data set; six iterations."""
    head = {"num_classes": 8, "align_corners": False}
    return {
        "work_dir": str(tmp_path / "work"),
        "precision": "fp32",
        "model": {
            "backbone": {
                "type": "ResNet",
                "depth": 18,
                "base_channels": 8,
                "stem_channels": 8,
                "strides": [1, 2, 1, 1],
                "dilations": [1, 1, 2, 4],
            },
            "decode_head": {
                "type": "PSPHead",
                "in_channels": 64,
                "in_index": 3,
                "channels": 16,
                "pool_scales": [1, 2],
                "dropout_ratio": 0.1,
                **head,
            },
            "auxiliary_head": {
                "type": "FCNHead",
                "in_channels": 32,
                "in_index": 2,
                "channels": 8,
                "num_convs": 1,
                "concat_input": False,
                "dropout_ratio": 0.1,
                **head,
                "loss_decode": {"loss_weight": 0.4},
            },
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
def run(tmp_path: Path):
    """run(config, "--resume-from", "auto", world_size=2, env={}) -> a finished Run; started=True -> one under way."""

    def start(
        config: dict,
        *argv,
        world_size: int = 1,
        env: dict | None = None,
        started: bool = False,
        expect: int | None = 0,
    ) -> Run:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        process = Run(["--config", path, *argv], tmp_path, world_size, env)
        runs.append(process)
        if not started:
            codes = process.wait()
            assert expect is None or set(codes) == {expect}, process.output()
        return process

    runs: list[Run] = []
    yield start
    for process in runs:
        process.kill()


class Parity:
    """MMSegmentation's reference numbers in tests/parity, and the rule that fills weights and inputs in (its README)."""

    FOLDER = Path(__file__).resolve().parent / "parity"

    def __call__(self, name: str) -> tuple:
        """The net in float64 with dropout off and its weights filled in, and the reference trajectory."""
        import models

        reference = json.loads((self.FOLDER / f"{name}.json").read_text())
        net = models.build_model(reference["model"]).double().train()
        state = {
            key: self.value(key, tensor.shape) if tensor.is_floating_point() else tensor
            for key, tensor in net.state_dict().items()
        }
        net.load_state_dict(state)
        for module in net.modules():
            if "Drop" in type(module).__name__:
                module.p = 0.0
        self.classes = net.num_classes
        return net, json.loads((self.FOLDER / f"{name}.trajectory.json").read_text())

    @staticmethod
    def value(key: str, shape: tuple) -> torch.Tensor:
        n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
        name = key.split(".")[-1]
        if name == "running_var":
            n = 1 + 0.1 * np.abs(n)
        elif name in ("running_mean", "bias"):
            n = 0.1 * n
        else:
            n = n / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * n
        return torch.as_tensor(n)

    @staticmethod
    def image(step: int) -> torch.Tensor:
        return torch.as_tensor(
            np.random.default_rng(zlib.crc32(f"input{step}".encode())).standard_normal(
                (2, 3, 97, 129)
            )
        )

    def label(self, step: int) -> torch.Tensor:
        label = np.random.default_rng(zlib.crc32(f"labels{step}".encode())).integers(
            0, self.classes, (2, 97, 129)
        )
        label[:, :9] = 255
        return torch.as_tensor(label)


@pytest.fixture
def parity() -> Parity:
    return Parity()
