"""The run: arguments, config, optimizer, schedule, checkpoints, evaluation and the loop that puts them together.

    python train.py --config configs/quickstart.json
    torchrun --standalone --nproc_per_node=8 train.py --config C --work-dir D --resume-from auto --options data.batch_size=16

Read from the bottom: `run` is the recipe, what stands above it are its steps.
"""

import argparse
import ast
import contextlib
import fcntl
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import data
import dist_utils
import models
from data import Data
from dist_utils import ProcessError, UserError
from models import ConfigError, Segmentor, check_keywords, fits, keywords, suggest


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another net, or the last one could not be written."""


# ---------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    """The top level of a config. Each section is the keywords of the function or class in brackets.

    model [models.build_model], data [data.Data and the data set that `type` names], optimizer [build_optimizer], schedule [learning_rate],
    evaluation [Evaluation], checkpoint [Checkpoint], log [Logging].
    precision: "fp32", "bf16", "fp16" (with loss scaling), "fp64", or "auto": bf16 where the hardware computes in it, else fp32.
    clip_grad: the largest 2-norm of the gradient. deterministic: only operations that repeat bit for bit (a CPU's always do).
    compile: torch.compile. timeout: seconds after which a process that does not answer ends the run.
    """

    model: dict
    data: dict
    optimizer: dict
    schedule: dict
    evaluation: dict = field(default_factory=dict)
    checkpoint: dict = field(default_factory=dict)
    log: dict = field(default_factory=dict)
    work_dir: str | None = None
    seed: int = 0
    precision: str = "auto"
    clip_grad: float | None = None
    deterministic: bool = False
    compile: bool = False
    timeout: float = 600.0


@dataclass(frozen=True)
class Evaluation:
    """The `evaluation` section.

    interval: iterations from one validation to the next. mode: "whole" images, or "slide": windows of `crop_size` [h, w] every `stride`
    [h, w] pixels, their logits averaged where they overlap. scale: [w, h] that images are resized to fit (labels never are).
    batch_size: images, or windows, at a time in each process. ratios: the scales of --aug-test.
    """

    interval: int = 4000
    mode: str = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scale: tuple[int, int] | None = None
    batch_size: int = 1
    ratios: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class Checkpoint:
    """The `checkpoint` section. interval: iterations from one to the next. keep: how many of the last to keep."""

    interval: int = 4000
    keep: int = 3


@dataclass(frozen=True)
class Logging:
    """The `log` section. interval: iterations from one line to the next."""

    interval: int = 50


def load_config(path: str | Path, options: Sequence[str] = ()) -> dict:
    """Reads a JSON config, applies `K=V` options and checks all that can be checked without the data; defaults are filled in.

    Raises ConfigError with the place of what is wrong.
    """
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"config {path}, line {error.lineno}, column {error.colno}: {error.msg}; a config is one JSON object"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"config {path} holds a {type(config).__name__}; a config is one JSON object"
        )
    config.pop("run", None)  # what write_config noted beside the config itself
    for option in options:
        override(config, option)
    check_keywords(Config, config, "config")
    config = asdict(Config(**config)) | {
        "work_dir": config.get("work_dir") or f"work_dirs/{Path(path).stem}"
    }
    check_config(config)
    return config


def override(config: dict, option: str) -> None:
    """Applies one option in place: `model.backbone.with_cp=True`, `model.decode_head.0.channels=64`, `data.scale=[512, 512]`."""
    key, equals, text = option.partition("=")
    if not equals or not key:
        raise ConfigError(f"--options {option}: expected KEY=VALUE, such as data.batch_size=4")
    value = text  # what is neither JSON nor a Python literal is a string
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = read(text)
            break
    node, names = config, key.split(".")
    for depth, name in enumerate(names, 1):
        if isinstance(node, list) and not (name.isdecimal() and int(name) < len(node)):
            raise ConfigError(f"--options {option}: {name} is no position in a list of {len(node)}")
        if not isinstance(node, (dict, list)):
            raise ConfigError(
                f"--options {option}: what {name} should stand in is {node!r}, not a section"
            )
        place = int(name) if isinstance(node, list) else name
        if depth == len(names):
            node[place] = value
        else:
            node = node[place] if isinstance(node, list) else node.setdefault(place, {})


def check_config(config: dict) -> None:
    """Everything that can be known of a config without its data. Raises ConfigError."""
    for section, function in (
        ("evaluation", Evaluation),
        ("checkpoint", Checkpoint),
        ("log", Logging),
    ):
        check_keywords(function, config[section], section)
        if config[section].get("interval", 1) < 1:
            raise ConfigError(
                f"{section}.interval is {config[section]['interval']}; it must be at least 1"
            )
    check_keywords(data_keywords(config["data"]), config["data"], "data")
    for section, names in (
        ("schedule", ("iteration", "base_lr")),
        ("optimizer", ("model", "params")),
        ("data", ("split", "seed")),
    ):
        for name in names:
            if name in config[section]:
                raise ConfigError(f"{section}.{name} is what the run itself gives; leave it out")
    check_keywords(learning_rate, {"iteration": 0, "base_lr": 0.0} | config["schedule"], "schedule")
    if min(config["data"]["crop_size"]) < 1:
        raise ConfigError(
            f"data.crop_size is {config['data']['crop_size']}; expected [height, width] above 0"
        )
    model = dry_run(config, 2)
    for key in ("type", "lr"):
        if key not in config["optimizer"]:
            raise ConfigError(f"optimizer.{key} is missing; build_optimizer needs it")
    build_optimizer(model, **config["optimizer"])
    settings = Evaluation(**config["evaluation"])
    problems = {
        "precision": config["precision"] not in ("auto", "fp32", "bf16", "fp16", "fp64")
        and "expected auto, fp32, bf16, fp16 or fp64",
        "seed": config["seed"] < 0 and "expected 0 or more",
        "clip_grad": config["clip_grad"] is not None
        and not config["clip_grad"] > 0
        and "expected a number above 0, or null",
        "timeout": not config["timeout"] > 0 and "expected seconds above 0",
        "schedule.max_iters": config["schedule"]["max_iters"] < 1 and "expected at least 1",
        "schedule.warmup_iters": config["schedule"].get("warmup_iters", 0) < 0
        and "expected 0 or more",
        "checkpoint.keep": Checkpoint(**config["checkpoint"]).keep < 1 and "expected at least 1",
        "evaluation.batch_size": settings.batch_size < 1 and "expected at least 1",
        "evaluation.scale": settings.scale
        and min(settings.scale) < 1
        and "expected [width, height] above 0, or null",
        "evaluation.ratios": not (settings.ratios and min(settings.ratios) > 0)
        and "expected scales above 0",
        "evaluation.mode": settings.mode not in ("whole", "slide") and "expected whole or slide",
        "evaluation.crop_size": settings.mode == "slide"
        and not (settings.crop_size and min(settings.crop_size) > 0)
        and "mode slide needs [height, width] of a window",
        "evaluation.stride": settings.mode == "slide"
        and not (
            settings.stride
            and all(0 < s <= c for s, c in zip(settings.stride, settings.crop_size or ()))
        )
        and "mode slide needs [down, right], the pixels from one window to the next, at most crop_size, or pixels would be left out",
    }
    for key, problem in problems.items():
        if problem:
            value = config
            for name in key.split("."):
                value = value.get(name)
            raise ConfigError(f"{key} is {value!r}; {problem}")
    learning_rate(0, config["optimizer"]["lr"], **config["schedule"])


def data_keywords(section: dict):
    """Something to check the `data` section by: the keywords of Data and of the data set that `type` names."""
    if section.get("type") not in list(data.DATASETS):
        raise ConfigError(
            f"data.type is {section.get('type')!r}; {suggest(str(section.get('type')), list(data.DATASETS))}"
        )

    def keywords_of_data(): ...

    known = keywords(data.DATASETS[section["type"]]) | keywords(Data)
    keywords_of_data.__name__ = f"data set {section['type']}"
    keywords_of_data.__signature__ = inspect.Signature(
        p.replace(kind=p.KEYWORD_ONLY) for name, p in known.items() if name not in ("split", "seed")
    )
    return keywords_of_data


def differences(old: object, new: object, place: str = "") -> list[str]:
    """What changed from one config to another: `schedule.max_iters 400 -> 800`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in old | new
            for line in differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
        ]
    return (
        []
        if json.dumps(old) == json.dumps(new)
        else [f"{place} {json.dumps(old)} -> {json.dumps(new)}"]
    )


# -------------------------------------------------------------------------------------------------- optimizer and schedule


def build_optimizer(
    model: nn.Module, type: str, lr: float, paramwise: dict | None = None, **options
) -> torch.optim.Optimizer:
    """Any optimizer of torch.optim by its name, with its keywords.

    paramwise: {part of a parameter's name: {"lr_mult": x, "decay_mult": y}}, of which the longest part that occurs in the name counts;
    MMSegmentation's `custom_keys` around them is taken too. Where none occurs, `norm_decay_mult` applies to the parameters of norm layers,
    `bias_lr_mult` and `bias_decay_mult` to the biases of the others. Each group keeps its `lr_mult`; parameters that share multipliers share a group.
    """
    optimizer = getattr(torch.optim, str(type), None)
    usable = (
        inspect.isclass(optimizer)
        and issubclass(optimizer, torch.optim.Optimizer)
        and optimizer is not torch.optim.Optimizer
    )
    if not usable or type in ("LBFGS", "SparseAdam"):  # which need a closure, and sparse gradients
        raise ConfigError(
            f"optimizer.type is {type!r}; expected the name of a class in torch.optim for dense gradients, such as SGD or AdamW"
        )
    check_keywords(optimizer, {"params": [], "lr": lr} | options, "optimizer")
    rules = dict(paramwise or {})
    if not isinstance(rules.get("custom_keys", {}), dict):
        raise ConfigError(
            f"optimizer.paramwise.custom_keys is {rules['custom_keys']!r}; expected a section"
        )
    rules |= rules.pop("custom_keys", {})
    general = {
        key: rules.pop(key, 1.0) for key in ("norm_decay_mult", "bias_lr_mult", "bias_decay_mult")
    }
    for part, rule in [
        *rules.items(),
        *((key, {"lr_mult": value}) for key, value in general.items()),
    ]:
        if (
            not isinstance(rule, dict)
            or not rule.keys() <= {"lr_mult", "decay_mult"}
            or not all(fits(value, float) for value in rule.values())
        ):
            raise ConfigError(
                f'optimizer.paramwise.{part} is {rule!r}; expected {{"lr_mult": x, "decay_mult": y}}, or one of {", ".join(general)}'
            )
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    groups = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not parameter.requires_grad:
                continue
            matching = [part for part in rules if part in name]
            if matching:
                rule = rules[max(matching, key=len)]
                multipliers = rule.get("lr_mult", 1.0), rule.get("decay_mult", 1.0)
            elif isinstance(module, norms):
                multipliers = 1.0, general["norm_decay_mult"]
            elif name.endswith(".bias"):
                multipliers = general["bias_lr_mult"], general["bias_decay_mult"]
            else:
                multipliers = 1.0, 1.0
            groups.setdefault(multipliers, []).append(parameter)
    defaults = inspect.signature(optimizer).parameters
    decay = options.get(
        "weight_decay", defaults["weight_decay"].default if "weight_decay" in defaults else 0.0
    )
    groups = [
        {"params": parameters, "lr": lr * lr_mult, "lr_mult": lr_mult}
        | ({} if decay_mult == 1.0 else {"weight_decay": decay * decay_mult})
        for (lr_mult, decay_mult), parameters in groups.items()
    ]
    if "fused" in defaults and not options.get("foreach") and not options.get("differentiable"):
        options = {"fused": next(model.parameters()).device.type in ("cpu", "cuda")} | options
    try:
        return optimizer(groups, lr=lr, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {error}") from None


def learning_rate(
    iteration: int,
    base_lr: float,
    *,
    max_iters: int,
    power: float = 0.9,
    min_lr: float = 0.0,
    policy: str = "poly",
    warmup: str | None = None,
    warmup_iters: int = 0,
    warmup_ratio: float = 1e-6,
) -> float:
    """The learning rate of an iteration, counted from 0: polynomial decay with a floor, times a linear warm-up, as in mmcv 1.x.

    (base_lr - min_lr) (1 - iteration / max_iters)^power + min_lr (PSPNet, arXiv:1612.01105); during `warmup` "linear" times
    1 - (1 - iteration / warmup_iters) (1 - warmup_ratio).
    """
    if policy != "poly" or warmup not in (None, "linear"):
        raise ConfigError(
            f'schedule.policy is {policy!r} and schedule.warmup {warmup!r}; expected "poly", and null or "linear"'
        )
    lr = (base_lr - min_lr) * max(0.0, 1 - iteration / max_iters) ** power + min_lr
    if warmup and iteration < warmup_iters:
        lr *= 1 - (1 - iteration / warmup_iters) * (1 - warmup_ratio)
    return lr


# ------------------------------------------------------------------------------------------------------------ checkpoints


def atomic_write(path: Path, write) -> None:
    """Writes a file whole or not at all: `write(file)` to a temporary name beside it, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link(path: Path, name: Path) -> None:
    """Gives a file a second name, at once; on file systems without links, a copy."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError:
        atomic_write(name, lambda file: file.write(path.read_bytes()))


def load_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint, onto the CPU, without running code that may be in it. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; nothing was started")
    try:
        return models.read_weights(path)
    except UserError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged, or holds Python objects, which could run code and are not loaded: {error}. "
            "Take another file, or --resume-from auto for the newest good one of the work_dir."
        ) from None


def newest_checkpoints(work_dir: Path) -> list[Path]:
    """iter_N.pth of a work_dir, the newest first."""
    found = [
        path for path in work_dir.glob("iter_*.pth") if re.fullmatch(r"iter_\d+\.pth", path.name)
    ]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(path: Path) -> int:
    return int(path.stem.removeprefix("iter_"))


def find_checkpoint(work_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a work_dir that is good, or None if there is none at all, and what is wrong with the newer ones."""
    complaints = []
    for path in newest_checkpoints(work_dir):
        try:
            bad = not_finite(load_checkpoint(path))
            if not bad:
                return path, complaints
            complaints.append(f"checkpoint {path} holds values that are not finite, in {bad[0]}")
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError(
            "\n".join(
                complaints + [f"{work_dir} holds no good checkpoint; delete these to start afresh"]
            )
        )
    return None, complaints


def restore(
    checkpoint: dict,
    path: Path,
    config: dict,
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Puts a checkpoint of this code into net, optimizer and loss scaler. Raises CheckpointError if it is of another net."""
    if not checkpoint.keys() >= {"state_dict", "optimizer", "iteration", "scaler"}:
        raise CheckpointError(
            f"{path} is no checkpoint of train.py: it cannot be resumed. Its weights alone may be taken by --load-from {path}."
        )
    before, now = (
        c.get("config", {}).get("optimizer", {}).get("type")
        for c in (checkpoint, {"config": config})
    )
    if before not in (None, now):
        raise CheckpointError(
            f"{path} holds the state of {before}, the config says {now}. Go on with {before}, or take the weights alone by --load-from {path}."
        )
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            "\n".join(
                [
                    f"{path} is of another net or optimizer than the config's; take its own config, or --load-from for the weights "
                    "that fit:"
                ]
                + lines[:6]
                + ["..."] * (len(lines) > 6)
            )
        ) from None
    for group, own in zip(
        optimizer.param_groups, settings
    ):  # the config rules, so that it can be changed on purpose
        group.update(own)
    if checkpoint["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(checkpoint["scaler"])


def snapshot(
    model: Segmentor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: dict,
    source: Data,
    iteration: int,
    best: dict | None,
    validated: bool = True,
) -> dict:
    """The content of a checkpoint: plain types and tensors. `validated`: False if a validation is due at `iteration` that a signal broke off."""
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "iteration": iteration,
        "best": best,
        "validated": validated,
        "config": config,
        "classes": list(source.classes),
        "palette": [list(map(int, c)) for c in source.palette],
        "versions": versions(),
    }


def not_finite(state: object, place: str = "") -> list[str]:
    """The places of tensors in nested dicts that hold infinities or NaN."""
    if isinstance(state, dict):
        return [
            line
            for key, value in state.items()
            for line in not_finite(value, f"{place}.{key}".lstrip("."))
        ]
    return (
        [place]
        if isinstance(state, Tensor) and state.is_floating_point() and not state.isfinite().all()
        else []
    )


# --------------------------------------------------------------------------------------------------------------- work_dir


class RunDir:
    """The folder of a run: config.json, train.log, metrics.jsonl, checkpoints, TensorBoard's files (where that is installed).

    Rank 0 writes; on other ranks the methods do nothing. `fresh`: a new run, which refuses a folder that holds one; else one that goes on from
    iteration `start`, or, if that is None, an evaluation, which only adds to the logs. `sizes`: the bytes of each log at the checkpoint: what was
    written later will be written again, so it is cut off.
    """

    LOGS = ("train.log", "metrics.jsonl")

    def __init__(
        self, path: Path, config: dict, fresh: bool, start: int | None, sizes: dict, keep: int
    ):
        self.path, self.keep, self.failed, self.logs, self.board = path, keep, None, (), None
        if dist_utils.rank():
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            if start is not None:
                self.take(config, fresh, start, sizes)
            self.logs = [open(path / name, "a", buffering=1) for name in self.LOGS]
        except OSError as error:
            raise ConfigError(
                f"work_dir {path} cannot be written: {error}. Name another with --work-dir."
            ) from None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path / "tensorboard"), purge_step=start)

    def take(self, config: dict, fresh: bool, start: int, sizes: dict) -> None:
        """Makes the folder this run's own, as it was at iteration `start`."""
        self.lock()
        found = sorted(self.path.glob("*.pth"))
        if fresh and found:
            raise ConfigError(
                f"work_dir {self.path} already holds a run: {found[-1].name}. Go on with it by --resume-from auto, or name another --work-dir; "
                "nothing was overwritten."
            )
        for newer in newest_checkpoints(self.path):
            if (
                iteration_of(newer) > start
            ):  # damaged, or of a course that this run leaves by resuming before it
                os.replace(newer, f"{newer}.old")
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()
        atomic_write(
            self.path / "config.json",
            lambda file: file.write(
                json.dumps(config | {"run": describe_run()}, indent=1).encode()
            ),
        )
        for name in self.LOGS:
            log = self.path / name
            if log.exists() and log.stat().st_size > sizes.get(name, math.inf):
                os.truncate(log, max(0, int(sizes[name])))

    def lock(self, patience: float = 150) -> None:
        """One run at a time: two would overwrite each other's checkpoints. A file server may hold the lock of a lost machine for a while."""
        self.locked, end = open(self.path / ".lock", "a"), time.monotonic() + patience
        while True:
            try:
                return fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ConfigError(
                        f"another run is at work in {self.path}: name another --work-dir, or end that one. If there is none, its machine was lost: "
                        f"remove {self.path / '.lock'}"
                    ) from None
                if end - time.monotonic() > patience - 0.5:
                    tqdm.write(f"waiting for another run in {self.path} to end")
                time.sleep(1)
            except OSError:  # a file system without locks
                return None

    def line(self, text: str) -> None:
        if self.logs:
            tqdm.write(text)
            self.write(0, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, mode: str, iteration: int, values: dict) -> None:
        if self.logs:
            self.write(1, json.dumps({"mode": mode, "iteration": iteration} | values) + "\n")
        if self.board:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    with contextlib.suppress(OSError):
                        self.board.add_scalar(f"{mode}/{name}", value, iteration)

    def write(self, log: int, text: str) -> None:
        try:
            self.logs[log].write(text)
        except OSError as error:  # a full disk costs a line, not the run
            tqdm.write(f"{self.LOGS[log]}: {error}")

    def save(self, content: dict, names: list[str]) -> None:
        """Writes `content` under the first name and links the others to it; then removes all but the last `keep` iter_N.pth.

        A write that fails is reported and noted in `failed`; the earlier checkpoints stand, and the run goes on to the next.
        """
        if dist_utils.rank():
            return
        self.line(f"saving {', '.join(names)}")
        sizes = {name: os.fstat(log.fileno()).st_size for name, log in zip(self.LOGS, self.logs)}
        try:
            self.path.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            atomic_write(
                self.path / names[0], lambda file: torch.save(content | {"logs": sizes}, file)
            )
            for name in names[1:]:
                link(self.path / names[0], self.path / name)
            for old in [
                *newest_checkpoints(self.path)[self.keep :],
                *self.path.glob("iter_*.pth.old"),
            ]:
                old.unlink()
            if self.board:
                self.board.flush()
            self.failed = None
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            while (
                error.__context__
            ):  # to what the operating system said, which torch.save speaks over
                error = error.__context__
            self.failed = f"checkpoint {self.path / names[0]} could not be written: {error}"
            self.line(f"{self.failed}; the earlier ones stand, the run goes on to the next")


def describe_run() -> dict:
    """What a run must note to be repeated: command line, commit and changes of the code, versions, machine."""

    def git(*arguments: str) -> str | None:
        try:
            return (
                subprocess.run(
                    ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, check=True
                )
                .stdout.decode(errors="replace")
                .strip()
            )
        except (OSError, subprocess.CalledProcessError):  # no git, or a copy of the files alone
            return None

    return {
        "command": [sys.executable, *sys.argv],
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": git("diff", "HEAD"),
        "versions": versions(),
        "processes": dist_utils.world_size(),
        "host": platform.node(),
    }


def versions() -> dict:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def duration(seconds: float) -> str:
    hours, seconds = divmod(int(seconds), 3600)
    return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"


# ------------------------------------------------------------------------------------------------------------- evaluation


def classify(
    logits: Tensor, label: Tensor, align_corners: bool, threshold: float = 0.5, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """The best class (N, H, W) of each pixel of `label` (N, H, W), and the sum of cross entropy over the valid ones.

    Logits (N, classes, h, w) are up-sampled `chunk` classes at a time, so that memory does not grow with their number. `threshold`: the
    probability beyond which class 1 of two is taken.
    """
    best = best_class = log_sum = None
    own = torch.zeros(label.shape, device=logits.device)
    for first in range(0, logits.size(1), chunk):
        part = F.interpolate(
            logits[:, first : first + chunk],
            label.shape[1:],
            mode="bilinear",
            align_corners=align_corners,
        )
        top, index = part.max(1)
        if threshold != 0.5:
            index = (part[:, 1] - part[:, 0] > math.log(threshold / (1 - threshold))).long()
        at = label.long() - first
        own += part.gather(1, at.clamp(0, part.size(1) - 1)[:, None])[:, 0] * (
            (at >= 0) & (at < part.size(1))
        )
        if first == 0:
            best, best_class, log_sum = top, index, part.logsumexp(1)
        else:
            best_class = torch.where(top > best, index + first, best_class)
            best, log_sum = torch.maximum(best, top), torch.logaddexp(log_sum, part.logsumexp(1))
    return best_class, ((log_sum - own) * (label != 255)).sum(dtype=torch.float64)


def compute_metrics(confusion: Tensor) -> dict:
    """MMSegmentation's metrics from a confusion matrix (classes, classes), rows the truth, columns the prediction.

    IoU, Acc (recall), Precision and Dice (the F1 score) are lists over classes, None where a class does not occur; means leave those out.
    """
    confusion = confusion.double().cpu()
    hit, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    per_class = {
        "IoU": hit / (truth + predicted - hit),
        "Acc": hit / truth,
        "Precision": hit / predicted,
        "Dice": 2 * hit / (truth + predicted),
    }
    result = {"mIoU": 0.0, "mAcc": 0.0, "aAcc": (hit.sum() / truth.sum().clamp(min=1)).item()}
    result |= {
        f"m{name}": values.nanmean().nan_to_num(0.0).item() for name, values in per_class.items()
    }
    result["mFscore"] = result["mDice"]
    return result | {
        name: [None if math.isnan(v) else v for v in values.tolist()]
        for name, values in per_class.items()
    }


def table(result: dict, classes: Sequence[str]) -> str:
    """A line a class: IoU, Acc, Dice in percent."""

    def percent(value):
        return "     -" if value is None else f"{100 * value:6.2f}"

    width = max(map(len, classes))
    lines = [f"{'class':{width}}    IoU    Acc   Dice"]
    lines += [
        f"{name:{width}} {percent(i)} {percent(a)} {percent(d)}"
        for name, i, a, d in zip(classes, result["IoU"], result["Acc"], result["Dice"])
    ]
    absent = [name for name, value in zip(classes, result["IoU"]) if value is None]
    return "\n".join(
        lines + [f"left out of the means, as they never occur: {', '.join(absent)}"] * bool(absent)
    )


def colored(classes: Tensor, palette: Sequence) -> Image.Image:
    """A map of classes (H, W) as a palette image; 255 is black."""
    image = Image.fromarray(classes.byte().cpu().numpy())
    image.putpalette(
        np.asarray(list(palette) + [[0, 0, 0]] * (256 - len(palette)), np.uint8).tobytes()
    )
    return image


def write_preview(
    path: Path, image: Tensor, label: Tensor, prediction: Tensor, palette: Sequence
) -> None:
    """Image (C, h, w), truth and prediction (H, W) side by side."""
    image = image[:3] if image.size(0) >= 3 else image[:1].expand(3, -1, -1)
    if image.dtype != torch.uint8:
        image = 255 * (image - image.min()) / (image.max() - image.min()).clamp_min(1e-6)
    size = label.shape[::-1]
    sheet = Image.new("RGB", (3 * size[0], size[1]))
    sheet.paste(Image.fromarray(image.byte().permute(1, 2, 0).cpu().numpy()).resize(size), (0, 0))
    sheet.paste(colored(label, palette).convert("RGB"), (size[0], 0))
    sheet.paste(colored(prediction, palette).convert("RGB"), (2 * size[0], 0))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: sheet.save(file, "png"))
    except OSError as error:  # a full disk costs a picture, not the run
        tqdm.write(f"{path}: {error}")


@torch.inference_mode()
def evaluate(
    model: Segmentor,
    source: Data,
    device: torch.device,
    settings: Evaluation = Evaluation(),
    autocast=contextlib.nullcontext,
    augment: bool = False,
    preview: Path | None = None,
    show_dir: Path | None = None,
    interrupted=lambda: False,
) -> dict | None:
    """Scores `model` on the validation split, at the labels' own size, each image once whatever the number of processes.

    The same for validation while training and for --eval-only. Returns `scores` with `loss`, the mean cross entropy over valid pixels,
    and `confusion`; None if `interrupted()` on any process. `augment`: several scales and mirror images. `preview`: a PNG of the first
    image. `show_dir`: a PNG of each prediction.
    """
    training, classes, tuned = model.training, len(source.classes), torch.backends.cudnn.benchmark
    model.eval()
    torch.backends.cudnn.benchmark = (
        False  # which would try out all algorithms for every size of image
    )
    confusion = torch.zeros(
        classes * classes + 1, dtype=torch.int64, device=device
    )  # the last counts ignored pixels
    loss = torch.zeros((), dtype=torch.float64, device=device)
    batches = source.val_batches(
        dist_utils.rank(),
        dist_utils.world_size(),
        settings.scale,
        settings.batch_size if settings.mode == "whole" else 1,
    )
    broken = torch.zeros((), device=device)
    windows = {
        "mode": settings.mode,
        "crop_size": settings.crop_size,
        "stride": settings.stride,
        "batch_size": settings.batch_size,
    }
    for number, batch in enumerate(
        tqdm(
            batches,
            "evaluate",
            leave=False,
            disable=dist_utils.rank() > 0 or not sys.stderr.isatty(),
        )
    ):
        if interrupted():
            broken += 1
            break
        image, label = source.prepare(batch, device)
        image = image.to(next(model.parameters()).dtype)
        with autocast():
            logits = (
                model.inference_tta(image, label.shape[1:], settings.ratios, **windows)
                if augment
                else model.inference(image, **windows)
            )
        prediction, batch_loss = classify(logits, label, model.align_corners, model.threshold)
        loss += batch_loss
        cell = torch.where(label == 255, classes * classes, label.long() * classes + prediction)
        confusion += torch.bincount(cell.flatten(), minlength=classes * classes + 1)
        if preview and number == 0 and dist_utils.rank() == 0:
            write_preview(preview, batch["image"][0], label[0], prediction[0], source.palette)
        if show_dir:  # the one thing that each process writes for itself: its own images
            for index, classes_of in zip(batch["index"], prediction):
                path = show_dir / f"{int(index):06d}_{Path(source.val.name(int(index))).stem}.png"
                try:
                    colored(classes_of, source.palette).save(path)
                except OSError as error:
                    tqdm.write(f"{path}: {error}")
    model.train(training)
    torch.backends.cudnn.benchmark = tuned
    if dist_utils.all_reduce(broken):
        return None
    dist_utils.all_reduce(confusion), dist_utils.all_reduce(loss)
    confusion = confusion[:-1].view(classes, classes)
    return compute_metrics(confusion) | {
        "loss": (loss / confusion.sum().clamp(min=1)).item(),
        "confusion": confusion.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------------- the run


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """The type of the weights, and that of autocast or None."""
    if name == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        )
        name = "bf16" if native else "fp32"
    return torch.float64 if name == "fp64" else torch.float32, {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }.get(name)


def dry_run(config: dict, batch: int) -> Segmentor:
    """Builds the net on the meta device, which costs neither memory nor time, and runs it there. Raises ConfigError if it does not fit together."""
    with torch.device("meta"):
        model, entered = models.build_model(config["model"]).train(), []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: entered.append((name, module, inputs))
            )
        try:
            size = config["data"]["crop_size"]
            model(
                torch.zeros(batch, model.in_channels, *size),
                torch.zeros(batch, *size, dtype=torch.uint8),
            )
        except NotImplementedError:  # a net of one's own may use operations without a meta kernel
            pass
        except (
            UserError,
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
        ) as error:
            if "more than 1 value per channel" in str(error):
                raise ConfigError(
                    f"a batch norm of this net would see one value a channel, which has no variance: a process takes {batch} image at a time and "
                    "a layer pools it to 1 x 1. Raise data.batch_size, lower data.accumulate, or start more processes."
                ) from None
            if not entered:
                raise ConfigError(
                    f"data.crop_size: {config['data']['crop_size']}: {error}"
                ) from None
            name, module, inputs = entered[-1]
            shapes = [list(x.shape) for x in inputs if isinstance(x, Tensor)]
            raise ConfigError(
                f"model: its parts do not fit together: {name}, {module}, fed with {shapes}: {error}"
            ) from error
    return model


def model_summary(model: Segmentor) -> str:
    parts = [
        type(part).__name__
        for part in (model.backbone, model.neck, model.decode_head)
        if part is not None
    ]
    return (
        f"{', '.join(parts)}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    )


def step_seed(seed: int, iteration: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1, np.uint64)[0] >> 1)


def forward_backward(
    net: nn.Module,
    batches,
    source: Data,
    device: torch.device,
    dtype: torch.dtype,
    autocast,
    scaler: torch.amp.GradScaler,
    stopping: bool,
    timeout: float,
) -> tuple[dict, bool, float]:
    """The gradient of one step, over its micro-batches. Returns the losses, averaged over the processes, whether any process is to stop,
    and the seconds spent waiting for data."""
    values, waited = 0.0, 0.0
    for micro in range(source.accumulate):
        asked, last = time.perf_counter(), micro == source.accumulate - 1
        batch = next(batches)
        waited += time.perf_counter() - asked
        image, label = source.prepare(batch, device)
        with contextlib.nullcontext() if last or dist_utils.world_size() == 1 else net.no_sync():
            with autocast():
                losses = net(image.to(dtype), label)
            values = (
                values
                + torch.stack([loss.detach().double() for loss in losses.values()])
                / source.accumulate
            )
            if last:  # the host waits for this mean alone, while the device goes on with the backward pass
                flag = torch.full((1,), float(stopping), dtype=values.dtype, device=device)
                mean = dist_utils.AsyncMean(torch.cat([values, flag]), timeout)
            scaler.scale(sum(losses.values()) / source.accumulate).backward()
    *means, stopping = mean.result()
    return dict(zip(losses, means)) | {"loss": sum(means)}, stopping > 0, waited


def check_gradients(model: nn.Module, folder: RunDir) -> None:
    """After the first backward: names parameters that no loss depends on. DDP would fail at the next step without a name."""
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if unused:
        text = f"no loss depends on {len(unused)} parameters: {', '.join(unused[:8])}. Take them out of the net, or set requires_grad=False on them."
        if dist_utils.world_size() > 1:
            raise ConfigError(text + " Several processes cannot average their gradients.")
        folder.line(text)


def run(args: argparse.Namespace, config: dict, device: torch.device) -> str:
    """One experiment from its config to its end: "done", or "stopped" by a signal, its state saved."""
    rank, world_size = dist_utils.rank(), dist_utils.world_size()
    work_dir, settings = Path(config["work_dir"]), Evaluation(**config["evaluation"])
    checkpointing, log_interval, max_iters = (
        Checkpoint(**config["checkpoint"]),
        Logging(**config["log"]).interval,
        config["schedule"]["max_iters"],
    )

    # ---- arithmetic
    dtype, low = choose_precision(config["precision"], device)

    def autocast():
        return torch.autocast(device.type, low, enabled=low is not None)

    torch.backends.cudnn.benchmark = not config["deterministic"]
    torch.use_deterministic_algorithms(config["deterministic"])
    scaler = torch.amp.GradScaler(device.type, enabled=low == torch.float16)

    # ---- data
    source = Data(**config["data"], seed=config["seed"]).to(device)
    if (
        not args.eval_only and world_size == 1 and source.batch_size == source.accumulate
    ):  # several processes share their statistics
        dry_run(config, 1)
    source.check(train=not args.eval_only, val=args.eval_only or not args.no_validate)

    # ---- net and optimizer
    torch.manual_seed(config["seed"])
    model = models.build_model(config["model"])
    for name, head in [
        *model.named(model.decode_head, "decode_head"),
        *model.named(model.auxiliary_head, "auxiliary_head"),
    ]:
        if head.num_classes != len(source.classes):
            raise ConfigError(
                f"model.{name}.num_classes is {head.num_classes}, but data set {config['data']['type']} has {len(source.classes)} classes: "
                f"{', '.join(source.classes[:8])}... They must agree."
            )
    model = model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, **config["optimizer"])

    # ---- where to start: --resume-from before --load-from before the backbone's `pretrained`
    start, best, validated, notes = 0, None, True, []
    sizes = dict.fromkeys(
        RunDir.LOGS, 0
    )  # what is there without a checkpoint is of a try that ended before its first
    path = args.resume_from
    if path == "auto":
        path, complaints = dist_utils.broadcast_object(
            find_checkpoint(work_dir) if rank == 0 else None
        )
        notes += complaints + ["no checkpoint yet: starting afresh"] * (path is None)
    if path:
        checkpoint = load_checkpoint(path)
        restore(checkpoint, path, config, model, optimizer, scaler)
        start, best, validated = (
            checkpoint["iteration"],
            checkpoint.get("best"),
            checkpoint.get("validated", True),
        )
        notes += [f"resumed from {path} at iteration {start}"]
        notes += [
            f"changed since then: {line}"
            for line in differences(checkpoint.get("config", config), config)
        ]
        sizes = (
            checkpoint.get("logs", {}) if Path(path).resolve().parent == work_dir.resolve() else {}
        )
        del checkpoint  # as large as the net and its optimizer
    elif args.load_from:
        notes += [
            f"weights from {args.load_from}: "
            + models.load_weights(model, load_checkpoint(args.load_from))
        ]
    elif args.eval_only:
        raise ConfigError(
            "--eval-only has no weights to evaluate: name them by --load-from or --resume-from"
        )
    elif model.pretrained and rank == 0:  # the others get rank 0's weights
        notes += [models.load_pretrained(model)]
    net = dist_utils.distribute(model)
    net = models.compiled(net) if config["compile"] else net

    batches = None if args.eval_only else source.train_batches(rank, world_size, start)

    # ---- work_dir
    folder = RunDir(
        work_dir, config, not path, None if args.eval_only else start, sizes, checkpointing.keep
    )
    folder.line(
        f"{model_summary(model)}; {world_size} process(es) on {device.type}, {low or dtype}; work_dir {work_dir}"
    )
    for note in notes:
        folder.line(note)

    def validate(done: int, interrupted=lambda: False) -> bool | None:
        """Evaluates and logs. Returns whether this is the best so far; None if interrupted."""
        nonlocal best
        began, show_dir = time.perf_counter(), Path(args.show_dir) if args.show_dir else None
        result = evaluate(
            model,
            source,
            device,
            settings,
            autocast,
            args.aug_test,
            work_dir / "preview" / f"iter_{done}.png",
            show_dir,
            interrupted,
        )
        if result is None:
            return None
        folder.line(
            f"validation at iteration {done}: {len(source.val)} images in {time.perf_counter() - began:.1f} s\n{table(result, source.classes)}\n"
            + ", ".join(
                f"{key} {100 * result[key]:.2f}" for key in ("mIoU", "mAcc", "aAcc", "mDice")
            )
            + f", loss {result['loss']:.4f}"
        )
        folder.metrics("val", done, result)
        improved = best is None or result["mIoU"] > best["mIoU"]
        best = {"mIoU": result["mIoU"], "iteration": done} if improved else best
        return improved

    def save(names: list[str], done: int, validated: bool = True) -> None:
        content = snapshot(model, optimizer, scaler, config, source, done, best, validated)
        bad = not_finite({key: content[key] for key in ("state_dict", "optimizer")})
        if bad:
            raise UserError(
                f"after iteration {done} there are values that are not finite in {', '.join(bad[:5])}: no checkpoint was written, the last one "
                "stands. Lower the learning rate, or set clip_grad, or precision=fp32."
            )
        folder.save(content, names)

    if args.show_dir:
        try:
            Path(args.show_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--show-dir {args.show_dir} cannot be written: {error}") from None
    if args.eval_only:
        validate(start)
        return "done"

    # ---- the loop
    quiet = rank > 0 or not sys.stderr.isatty()
    with (
        contextlib.closing(batches),
        dist_utils.StopSignal() as stop,
        tqdm(total=max_iters, initial=start, disable=quiet) as bar,
    ):
        if not validated and not args.no_validate and validate(start):
            save(["best.pth"], start)
        since, first, waited = time.perf_counter(), start, 0.0
        for iteration in range(start, max_iters):
            lr = learning_rate(iteration, config["optimizer"]["lr"], **config["schedule"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    iteration, config["optimizer"]["lr"] * group["lr_mult"], **config["schedule"]
                )
            torch.manual_seed(step_seed(config["seed"], iteration, rank))  # dropout
            losses, stopping, wait = forward_backward(
                net,
                batches,
                source,
                device,
                dtype,
                autocast,
                scaler,
                stop.received > 0,
                config["timeout"],
            )
            if not math.isfinite(losses["loss"]):
                replay = work_dir / f"not_finite_iter_{iteration}.pth"
                folder.save(
                    snapshot(model, optimizer, scaler, config, source, iteration, best),
                    [replay.name],
                )
                dist_utils.barrier()  # who ends first ends the others, and with them the saving
                broken = not_finite(
                    {name: parameter.data for name, parameter in model.named_parameters()}
                )
                raise UserError(
                    not_finite_message(
                        iteration,
                        losses,
                        broken if iteration > start else [],
                        source,
                        work_dir,
                        replay,
                    )
                )
            if iteration == start:
                check_gradients(model, folder)
            if config["clip_grad"]:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config["clip_grad"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            done, waited = iteration + 1, waited + wait

            logged = done % log_interval == 0 or done == max_iters
            if logged:
                seconds = (time.perf_counter() - since) / (done - first)
                report(
                    folder, done, max_iters, lr, seconds, waited / (done - first), device, losses
                )
            if (
                logged or done == start + 1
            ):  # in the first, workers start and libraries tune themselves, which says nothing of the others
                since, first, waited = time.perf_counter(), done, 0.0
            bar.set_postfix(loss=f"{losses['loss']:.4f}", lr=f"{lr:.2e}", refresh=False)
            bar.update()

            began, end = time.perf_counter(), done == max_iters
            improved = False
            if (done % settings.interval == 0 or end) and not args.no_validate:
                improved = validate(done, lambda: stop.received)
            if done % checkpointing.interval == 0 or end or stopping or improved is None:
                save(
                    [f"iter_{done}.pth", "latest.pth"] + ["best.pth"] * bool(improved),
                    done,
                    validated=improved is not None,
                )
            elif improved:
                save(["best.pth"], done)
            since += time.perf_counter() - began  # not a part of the steps' time
            if stopping and not end or improved is None:
                folder.line(
                    f"stopped by a signal after iteration {done} of {max_iters}; go on with --resume-from auto"
                )
                return "stopped"
    if folder.failed:
        raise CheckpointError(f"the last {folder.failed}")
    return "done"


def not_finite_message(
    iteration: int, losses: dict, broken: list[str], source: Data, work_dir: Path, replay: Path
) -> str:
    """`broken`: the weights that were not finite before this batch came."""
    culprit = iteration - bool(broken)
    positions = range(culprit * source.batch_size, (culprit + 1) * source.batch_size)
    files = "\n  ".join(
        f"{position} {name}" for position, name in zip(positions, source.sample_files(positions))
    )
    launcher = (
        "python"
        if dist_utils.world_size() == 1
        else f"torchrun --standalone --nproc_per_node={dist_utils.world_size()}"
    )
    values = ", ".join(f"{name} {value}" for name, value in losses.items())
    weights = (
        f"The update of iteration {culprit} broke the weights ({broken[0]}, ...)"
        if broken
        else "The weights were not updated"
    )
    return (
        f"the loss of iteration {iteration} (counted from 0) is not finite: {values}. {weights}. Sample positions and files of the "
        f"batch of iteration {culprit}:\n  {files}\nIteration {iteration} again: {launcher} train.py --config {work_dir / 'config.json'} "
        f"--work-dir {work_dir / 'replay'} --resume-from {replay}\nLower the learning rate, set clip_grad=1, or precision=fp32, and go on from the last "
        "checkpoint by --resume-from auto."
    )


def report(
    folder: RunDir,
    done: int,
    max_iters: int,
    lr: float,
    seconds: float,
    waited: float,
    device: torch.device,
    losses: dict,
) -> None:
    """One line in train.log and one in metrics.jsonl. Times in seconds an iteration, memory in MiB: the GPU's peak, or a CPU process's."""
    memory = (
        torch.cuda.max_memory_allocated() / 2**20
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    advice = (
        f"; waiting for data {100 * waited / seconds:.0f} % of the time: raise data.workers or set data.cache"
        if waited > 0.1 * seconds
        else ""
    )
    folder.line(
        f"Iter [{done}/{max_iters}] lr: {lr:.3e}, eta: {duration(seconds * (max_iters - done))}, time: {seconds:.3f}, data_time: {waited:.3f}, "
        f"memory: {memory:.0f}, "
        + ", ".join(f"{name}: {value:.4f}" for name, value in losses.items())
        + advice
    )
    folder.metrics(
        "train", done, {"lr": lr, "time": seconds, "data_time": waited, "memory": memory} | losses
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a JSON file, such as one of configs/")
    parser.add_argument(
        "--work-dir", help="folder of logs and checkpoints; default: the config's work_dir"
    )
    parser.add_argument(
        "--resume-from",
        metavar="PATH|auto",
        help="go on from a checkpoint; auto: the newest good one of the work_dir, if there is one",
    )
    parser.add_argument(
        "--load-from",
        metavar="PATH",
        help="take weights only (MMSegmentation's .pth too) and start at iteration 0",
    )
    parser.add_argument("--no-validate", action="store_true", help="do not evaluate while training")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the weights of --load-from or --resume-from, and end",
    )
    parser.add_argument(
        "--aug-test",
        action="store_true",
        help="evaluate at several scales (evaluation.ratios), each with its mirror image",
    )
    parser.add_argument(
        "--show-dir",
        metavar="DIR",
        help="write each validation image's prediction there as a colored PNG",
    )
    parser.add_argument(
        "--options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override the config: model.backbone.with_cp=True data.batch_size=4",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Runs train.py with these arguments. Returns "done", or "stopped" after a signal."""
    args = parse_args(argv)
    config = load_config(
        args.config,
        args.options + ([f"work_dir={json.dumps(args.work_dir)}"] if args.work_dir else []),
    )
    if config["deterministic"]:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # which cuBLAS asks for, before it starts
    device = dist_utils.init(timeout=config["timeout"])
    try:
        ending = run(args, config, device)
        dist_utils.cleanup()  # not after an error: to leave in order would wait for processes that may be gone
        return ending
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is too small: {error}\nSet model.backbone.with_cp=true (activation checkpointing), data.accumulate=2 or more "
            "(the same batch in parts), precision=bf16, or a smaller data.crop_size."
        ) from None
    except (RuntimeError, ProcessError) as error:
        if dist_utils.world_size() > 1 and (
            isinstance(error, dist_utils.COMMUNICATION) or "gloo" in str(error)
        ):
            raise ProcessError(
                f"rank {dist_utils.rank()} lost contact with the others: {error}\nNo answer from rank(s) {dist_utils.lost_ranks()}: "
                "what they printed last says why. Go on with --resume-from auto."
            ) from None
        if "deterministic" in str(error):
            raise ConfigError(f"deterministic=true cannot be had with this net: {error}") from None
        raise data.lost_worker(error) or error from None


if __name__ == "__main__":
    try:
        sys.exit(0 if main() == "done" else 143)  # 143: ended by SIGTERM, as a shell counts
    except UserError as error:
        sys.exit(f"error: {error}")
