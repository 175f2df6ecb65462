"""The run: config, optimizer, schedule, checkpoints, run directory, evaluation, training loop.

    python train.py --config configs/quickstart.json
    torchrun --standalone --nproc_per_node=2 train.py --config configs/quickstart.json
    python train.py --config configs/quickstart.json --resume-from auto

`run` holds the training loop. Everything above it is one of its steps.
"""

import argparse
import ast
import contextlib
import copy
import fcntl
import functools
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import textwrap
import time
import unittest.mock
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import dist_utils  # before torch, which reads the environment that this sets

# isort: split
import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

import models
from data import (
    DATASETS,
    IGNORE,
    INVALID,
    ConcatSection,
    Data,
    DataError,
    DataWarning,
    as_array,
    check_encoding,
    check_every_sample,
    checksum_of_images,
    decoder_name,
    find_images,
    images_of_any_size,
    moments_of,
    pixels_of,
    read_image,
    unlabeled_batch,
    with_channels,
    worker_failure,
)
from dist_utils import ProcessError, UserError
from models import (
    ConfigError,
    Segmentor,
    check_keywords,
    check_parameters,
    fits,
    keywords,
    no_such_type,
)


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another network, or could not be written."""


# ------------------------------------------------------------------------------------------ Config


def require(is_valid: bool, key: str, value: object, expected: str) -> None:
    """Raise ConfigError unless the value of a config key is valid."""
    if not is_valid:
        raise ConfigError(f"{key} is {value!r}; expected {expected}")


def require_positive(section: str, values: object, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        require(value >= 1, f"{section}.{key}", value, "at least 1")


@dataclass(frozen=True)
class Evaluation:
    """The `evaluation` section.

    interval: iterations between validations.
    patience: end the run after this many validations in a row without a better mIoU.
    mode: "whole" images, or "slide": windows whose logits are averaged where they overlap.
    crop_size, stride: (height, width) of a window, and (down, right) from one to the next, pixels.
    scale: (width, height) that images are resized to fit into; labels never are.
    batch_size: images, or windows, per forward pass of each process.
    max_pixels: larger images are predicted in tiles that overlap, which bounds the memory.
    ratios: the scales of --aug-test.
    """

    interval: int = 4000
    patience: int | None = None
    mode: str = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scale: tuple[int, int] | None = None
    batch_size: int = 1
    max_pixels: int = 2**24
    ratios: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

    def __post_init__(self):
        require_positive("evaluation", self, "interval", "batch_size", "max_pixels")
        is_valid = self.patience is None or self.patience >= 1
        require(is_valid, "evaluation.patience", self.patience, "at least 1, or null")
        is_valid = min(self.scale or [1]) >= 1
        require(is_valid, "evaluation.scale", self.scale, "[width, height] above 0, or null")
        is_valid = min(self.ratios, default=0) > 0
        require(is_valid, "evaluation.ratios", self.ratios, "scales above 0")
        require(self.mode in ("whole", "slide"), "evaluation.mode", self.mode, "whole or slide")
        if self.mode == "whole":
            return
        size = self.crop_size
        is_valid = min(size or [0]) > 0
        require(is_valid, "evaluation.crop_size", size, "a window's [height, width] for mode slide")
        steps = zip(self.stride or [0], size)
        require(
            all(0 < step <= side for step, side in steps),
            "evaluation.stride",
            self.stride,
            "[down, right], the pixels from one window to the next, for mode slide: at most "
            "crop_size, or pixels would be left out",
        )


@dataclass(frozen=True)
class Checkpoint:
    """The `checkpoint` section.

    interval: iterations between checkpoints.
    keep: how many of the last ones to keep.
    """

    interval: int = 4000
    keep: int = 3

    def __post_init__(self):
        require_positive("checkpoint", self, "interval", "keep")


@dataclass(frozen=True)
class Logging:
    """The `log` section. interval: iterations between lines of the log."""

    interval: int = 50

    def __post_init__(self):
        require_positive("log", self, "interval")


@dataclass(frozen=True)
class Config:
    """The top level of a config, whose sections are the keyword arguments of what takes them.

    model: models.build_model. data: data.Data and the data set that `type` names.
    optimizer: build_optimizer. schedule: learning_rate.
    evaluation, checkpoint, log: the dataclasses Evaluation, Checkpoint, Logging.

    precision: "fp32", "tf32", "bf16", "fp16" (with loss scaling), "fp64", or "auto": bf16 where the
        hardware computes in it, else fp16 on a GPU and fp32 on a CPU.
    clip_grad: the largest 2-norm of the gradient.
    ema_decay: decay of a moving average of the weights, see `update_ema`, which is evaluated and
        saved beside them.
    deterministic: only operations that repeat bit for bit (those of a CPU always do).
    compile: torch.compile.
    timeout: seconds after which a process that does not answer ends the run.
    """

    model: dict
    data: dict
    optimizer: dict
    schedule: dict
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Logging = field(default_factory=Logging)
    work_dir: str | None = None
    seed: int = 0
    precision: str = "auto"
    clip_grad: float | None = None
    ema_decay: float | None = None
    deterministic: bool = False
    compile: bool = False
    timeout: float = 600.0

    def __post_init__(self):
        precisions = ("auto", *PRECISIONS)
        expected = ", ".join(precisions)
        require(self.precision in precisions, "precision", self.precision, expected)
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, and below 2**63")
        is_valid = self.clip_grad is None or self.clip_grad > 0
        require(is_valid, "clip_grad", self.clip_grad, "a number above 0, or null")
        is_valid = self.ema_decay is None or 0 <= self.ema_decay < 1
        require(is_valid, "ema_decay", self.ema_decay, "a number from 0 to below 1, or null")
        require(self.timeout > 0, "timeout", self.timeout, "seconds above 0")


SECTIONS = {"evaluation": Evaluation, "checkpoint": Checkpoint, "log": Logging}
GIVEN_BY_THE_RUN = {
    "data": {"split", "seed"},
    "optimizer": {"model", "params"},
    "schedule": {"iteration", "base_lr"},
}
# Keys that have no effect in a section that leaves out another one.
NEEDED = {
    "data": {"first_column": "files", "fold_seed": "fold"},
    "schedule": {"gamma": "policy", "warmup_iters": "warmup", "warmup_ratio": "warmup"},
    "evaluation": {"crop_size": "mode", "stride": "mode"},
    "optimizer": {"decay_type": "layer_decay"},  # in its section paramwise
}


def load_config(path: str | Path, options: Sequence[str] = ()) -> dict:
    """Read and check a config and its network. Return it as plain types."""
    config = read_config(path, options)
    check_network(config)
    return asdict(config)


def read_config(path: str | Path, options: Sequence[str] = ()) -> Config:
    """Read a JSON config, apply `K=V` options, and check all that needs no network or data.

    Raises ConfigError with the place of what is wrong.
    """
    try:
        # Windows editors put a byte order mark first.
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        config = from_json(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"config {path}, line {error.lineno}, column {error.colno}: {error.msg}; "
            "a config is one JSON object"
        ) from None
    except ValueError as error:
        raise ConfigError(f"config {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"config {path} holds a {type(config).__name__}; a config is one JSON object"
        )
    return make_config(config, options, Path(path).stem)


def from_json(text: str) -> object:
    """Parse JSON without what Python adds to it: NaN, Infinity, and keys that occur twice."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not a valid value")

    def unique(pairs: list[tuple[str, object]]) -> dict:
        section = dict(pairs)
        if len(section) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"a section has the key {twice!r} twice; leave out one of them")
        return section

    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)


def make_config(config: dict, options: Sequence[str], name: str) -> Config:
    """Make a Config of a dict, which this changes. The default work_dir is named after `name`."""
    config.pop("run", None)  # the record of the command and versions, as RunDir writes it
    for option in options:
        override(config, option)
    for section, section_class in SECTIONS.items():
        if isinstance(config.get(section), dict):
            check_keywords(section_class, config[section], section)
            if section in NEEDED:
                check_needed_keys(section, config[section])
            config[section] = section_class(**config[section])
    check_keywords(Config, config, "config")
    if not config.get("work_dir"):
        config["work_dir"] = f"work_dirs/{name}"
    config["work_dir"] = os.path.expanduser(config["work_dir"])
    config = Config(**config)
    check_config(config)
    return config


def complete(config: dict) -> dict:
    """Return the config of the same run with all defaults written out.

    Types that do not exist, as in a config of another version, keep their sections as they are.
    """
    full = config | models.defaults(Config) | config
    for name, section_class in SECTIONS.items():
        full[name] = models.defaults(section_class) | full.get(name, {})
    full["model"] = models.with_defaults(full["model"])
    optimizer = getattr(torch.optim, str(full["optimizer"].get("type")), None)
    full["optimizer"] = add_defaults(full["optimizer"], optimizer, build_optimizer)
    full["schedule"] = add_defaults(full["schedule"], learning_rate)
    datasets = full["data"].get("datasets")
    full["data"] = add_defaults(full["data"], DATASETS.get(full["data"].get("type")), Data)
    if datasets:
        full["data"]["datasets"] = [
            add_defaults(part, DATASETS.get(part.get("type")), ConcatSection) for part in datasets
        ]
        for part in full["data"]["datasets"]:
            part.pop("in_channels", None)  # that of the whole
    return json.loads(json.dumps(full))


def add_defaults(section: dict, *functions: Callable | None) -> dict:
    """Return a section with the defaults of what takes it, without the keys that the run sets."""
    known = {}
    for function in filter(None, functions):
        known |= models.defaults(function, inherited=False)
    for name in set().union(*GIVEN_BY_THE_RUN.values()):
        known.pop(name, None)
    return section | known | section


def override(config: dict, option: str) -> None:
    """Apply one option in place: `model.backbone.with_cp=True`, `data.scale=[512, 512]`.

    A number names an item of a list: `model.decode_head.0.channels=64`.
    """
    key, equals, text = option.partition("=")
    if not equals or not key:
        raise ConfigError(f"--options {option}: expected KEY=VALUE, such as data.batch_size=4")
    *parents, last = key.split(".")
    node = config
    for name in parents:
        if isinstance(node, dict):
            node = node.setdefault(name, {})
        else:
            node = node[list_index(node, name, option)]
    if isinstance(node, dict):
        node[last] = parse_value(text)
    else:
        node[list_index(node, last, option)] = parse_value(text)


def list_index(node: object, name: str, option: str) -> int:
    """Return the position in the list `node` that a part of an option's key names."""
    if not isinstance(node, list):
        raise ConfigError(
            f"--options {option}: {name} cannot be set in {node!r}, which is not a section"
        )
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(f"--options {option}: {name} is not a position in a list of {len(node)}")
    return int(name)


def parse_value(text: str) -> object:
    """Return an option's value: JSON, else a Python literal, else the text itself."""
    for parse in (from_json, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError):
            return parse(text)
    return text


def check_config(config: Config) -> None:
    """Check that each section fits the function that takes it. Raise ConfigError if not."""
    for section, names in GIVEN_BY_THE_RUN.items():
        for name in getattr(config, section).keys() & names:
            raise ConfigError(f"{section}.{name} is set by the run itself; leave it out")
    check_data_section(config.data)
    check_pasted(config)
    for key in ("type", "lr"):
        if key not in config.optimizer:
            raise ConfigError(f"optimizer.{key} is missing; build_optimizer needs it")
    known = keywords(learning_rate)
    for name in GIVEN_BY_THE_RUN["schedule"]:
        known.pop(name)
    check_parameters("learning_rate", known, config.schedule, "schedule")
    learning_rate(0, 1.0, **config.schedule)
    lr = config.optimizer["lr"]
    min_lr = config.schedule.get("min_lr", 0.0)
    if fits(lr, float):  # else build_optimizer's own check says so
        require(min_lr <= lr, "schedule.min_lr", min_lr, "at most optimizer.lr")
    if config.schedule.get("warmup"):
        is_given = "warmup_iters" in config.schedule
        require(is_given, "schedule.warmup_iters", None, "the number of iterations of the warm-up")
    check_needed_keys("schedule", config.schedule)


def check_needed_keys(place: str, section: dict) -> None:
    """Raise ConfigError for a key that has no effect, as the section lacks the key in NEEDED."""
    for key, other in NEEDED[place.partition(".")[0]].items():
        if key in section and other not in section:
            raise ConfigError(
                f"{place}.{key} is {section[key]!r}, but has no effect without {place}.{other}. "
                f"Set {place}.{other} too, or leave out {key}"
            )


def check_pasted(config: Config) -> None:
    """Check that a `model` section of MMSegmentation agrees with our data and evaluation.

    Raises ConfigError.
    """
    defaults = keywords(Data)
    decided_here = {
        "data_preprocessor.size": ("data.crop_size", config.data["crop_size"]),
        "test_cfg.mode": ("evaluation.mode", config.evaluation.mode),
    }
    for key in ("mean", "std"):
        value = config.data.get(key, defaults[key].default)
        decided_here[f"data_preprocessor.{key}"] = (f"data.{key}", value)
    if config.evaluation.mode == "slide":
        for key in ("crop_size", "stride"):
            value = getattr(config.evaluation, key)
            decided_here[f"test_cfg.{key}"] = (f"evaluation.{key}", value)

    def plain(value: object) -> object:
        return list(value) if isinstance(value, (list, tuple)) else value

    for place, (key, value) in decided_here.items():
        section, name = place.split(".")
        pasted = config.model.get(section)
        pasted = pasted.get(name) if isinstance(pasted, dict) else None  # build_model checks that
        if pasted is not None and plain(pasted) != plain(value):
            raise ConfigError(
                f"model.{place} is {plain(pasted)!r}, but {key}, which decides here, is "
                f"{plain(value)!r}. Set {key}, or leave out model.{place}"
            )


def check_data_section(section: dict) -> None:
    """Check that `data` holds the keywords of Data and of the data set that `type` names."""
    check_data_set(section, Data, "data")
    if section["type"] == "concat":
        for i, part in enumerate(section["datasets"]):
            check_data_set(part, ConcatSection, f"data.datasets.{i}")
    require(
        min(section["crop_size"]) >= 1,
        "data.crop_size",
        section["crop_size"],
        "[height, width] above 0",
    )


def check_data_set(section: dict, owner: type, place: str) -> None:
    """Check that a section holds the keywords of `owner` and of the data set that `type` names.

    Raises ConfigError.
    """
    kind = section.get("type")
    kinds = [name for name in DATASETS if owner is Data or name != "concat"]
    if kind not in kinds:
        raise ConfigError(f"{place}.type: {no_such_type(str(kind), 'data sets', kinds)}")
    known = keywords(DATASETS[kind]) | keywords(owner)
    for name in ("split", "seed"):
        known.pop(name, None)
    if owner is not Data:
        known.pop("in_channels", None)
    check_parameters(f"data set {kind}", known, section, place)
    check_needed_keys(place, section)


def check_network(config: Config, batch_size: int = 2) -> list[str]:
    """Build the network and the optimizer without memory, and run the forward pass on shapes.

    Returns notes for the log on what could not be checked. Raises ConfigError if the parts of the
    network do not fit together. An exception in a user's module shows at the first iteration.
    """
    notes = []
    try:
        model = models.build_on_meta(config.model).train()
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        notes.append(f"the network is not checked before it trains, as it needs values: {reason}")
        model = None
    if model is None:
        # An exception in a user's module shows here with its own traceback.
        model = models.build_model(config.model)
    else:
        notes += dry_run(model, config, batch_size)
        if not notes:
            notes = size_warnings(model, config)
    build_optimizer(model, **config.optimizer)
    return notes


def dry_run(model: Segmentor, config: Config, batch_size: int) -> list[str]:
    """Run one training step's forward pass on the meta device. Return notes for the log."""
    running = []  # (name, module, inputs) of the modules whose forward pass has not ended

    def enter(name: str, module: nn.Module, inputs: tuple) -> None:
        running.append((name, module, inputs))

    def leave(module: nn.Module, *_) -> None:
        while running.pop()[1] is not module:  # a failure that the modules themselves have handled
            pass

    for name, module in model.named_modules():
        module.register_forward_pre_hook(functools.partial(enter, name))
        module.register_forward_hook(leave)
    crop_size = config.data["crop_size"]
    channels = config.data.get("in_channels", 3)
    if model.in_channels not in (None, channels):
        raise ConfigError(
            f"model.backbone.in_channels is {model.in_channels}, but data.in_channels is {channels}"
        )
    with torch.device("meta"):
        image = torch.zeros(batch_size, channels, *crop_size)
        label = torch.zeros(batch_size, *crop_size, dtype=torch.uint8)
        try:
            model(image, label)
            return []
        except Exception as error:
            failure = error
    name, module, inputs = running[-1]
    place = f"{name or 'model'}, {type(module).__name__}, fed with {shapes(inputs)}"
    if "more than 1 value per channel" in str(failure):
        raise ConfigError(
            f"{place}: a batch norm of this network would see one value per channel, which has no "
            f"variance: a process takes {batch_size} image at a time and a layer pools it to "
            "1 x 1. Raise data.batch_size, lower data.accumulate, or start more processes."
        )
    if isinstance(failure, UserError):
        raise ConfigError(f"{'.'.join(['model', name]).rstrip('.')}: {failure}")
    part_class = models.part_class_of(failure, model)
    if models.is_invalid_value(failure, part_class):
        raise ConfigError(
            f"model: {part_class.__name__} fails on a crop of {crop_size}: {place}: {failure} "
            f"({models.code_line(failure)})"
        ) from failure
    reason = f"{place}: {first_line(failure)}"
    return [f"the network is not checked before it trains, as it needs values: {reason}"]


def size_warnings(model: Segmentor, config: Config) -> list[str]:
    """Warn of a network on the meta device that takes crops, but no images of another size."""
    of_any_size = isinstance(model.backbone, models.Backbone) and not isinstance(
        model.backbone, (models.TimmBackbone, models.TorchvisionBackbone)
    )
    if of_any_size or config.evaluation.mode == "slide":
        return []
    crop_size = list(config.data["crop_size"])
    height, width = crop_size
    try:
        with torch.device("meta"), torch.no_grad():
            model.eval()(torch.zeros(1, config.data.get("in_channels", 3), 2 * height, 3 * width))
    except Exception as error:
        return [
            f"warning: this network takes images of {crop_size}, data.crop_size, but not those of "
            f"every other size ({first_line(error)}). If the validation has others, set "
            f"evaluation.mode=slide, evaluation.crop_size={crop_size} and evaluation.stride"
        ]
    return []


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def shapes(value: object) -> object:
    """Return the shapes of the tensors in nested lists and dicts; other values by their type."""
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (list, tuple)):
        return [shapes(item) for item in value]
    if isinstance(value, dict):
        return {key: shapes(item) for key, item in value.items()}
    return type(value).__name__


def differences(old: object, new: object, key: str = "") -> list[str]:
    """Return what changed from one config to another: `schedule.max_iters 400 -> 800`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in old | new:
            lines += differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        return lines
    if json.dumps(old) == json.dumps(new):
        return []
    return [f"{key} {json.dumps(old)} -> {json.dumps(new)}"]


# ---------------------------------------------------------------------------- Optimizer, schedule


def build_optimizer(
    model: nn.Module, type: str, lr: float, paramwise: dict | None = None, **options
) -> torch.optim.Optimizer:
    """Build any optimizer of torch.optim by its name, with its keywords.

    paramwise: {part of a parameter's name: {"lr_mult": x, "decay_mult": y}}. The longest part that
        occurs in a name counts. Where none does, `norm_decay_mult` applies to the parameters of
        norm layers, and `bias_lr_mult` and `bias_decay_mult` to the biases of other layers.
        MMSegmentation's `custom_keys` is accepted. `layer_decay` also multiplies the learning
        rates of the backbone, see `layer_multipliers`.

    Parameters that share multipliers share a group, which keeps them as `lr_mult`.
    """
    optimizer_class = optimizer_class_named(type)
    known = keywords(optimizer_class)
    known.pop("params")
    known["paramwise"] = keywords(build_optimizer)["paramwise"]
    check_parameters(type, known, {"lr": lr, "paramwise": paramwise} | options, "optimizer")
    defaults = inspect.signature(optimizer_class).parameters
    weight_decay = 0.0
    if "weight_decay" in defaults:
        weight_decay = options.get("weight_decay", defaults["weight_decay"].default)

    groups = []
    for (lr_mult, decay_mult), parameters in group_by_multipliers(model, paramwise or {}).items():
        group = {"params": parameters, "lr": lr * lr_mult, "lr_mult": lr_mult}
        if decay_mult != 1.0:
            group["weight_decay"] = weight_decay * decay_mult
        groups.append(group)

    if not groups:
        raise ConfigError("optimizer: there is nothing to train, as model.freeze names all parts")
    if "fused" in defaults and not options.get("foreach") and not options.get("differentiable"):
        device = next(model.parameters()).device
        if options.get("fused") is None:
            options["fused"] = device.type in ("cpu", "cuda")
    try:
        return optimizer_class(groups, lr=lr, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {error}") from None


def optimizer_class_named(name: str) -> type[torch.optim.Optimizer]:
    found = getattr(torch.optim, str(name), None)
    is_optimizer = (
        inspect.isclass(found)
        and issubclass(found, torch.optim.Optimizer)
        and found is not torch.optim.Optimizer
    )
    # LBFGS needs a closure, SparseAdam sparse gradients.
    if not is_optimizer or name in ("LBFGS", "SparseAdam"):
        raise ConfigError(
            f"optimizer.type is {name!r}; expected the name of a class in torch.optim for dense "
            "gradients, such as SGD or AdamW"
        )
    return found


def group_by_multipliers(
    model: nn.Module, paramwise: dict
) -> dict[tuple[float, float], list[nn.Parameter]]:
    """Return the trainable parameters by their (lr_mult, decay_mult)."""
    rules, general, layer_decay = parse_paramwise(paramwise)
    of_layers = layer_multipliers(model, **layer_decay)
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    groups = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not parameter.requires_grad:
                continue
            matching = [part for part in rules if part in name]
            if matching:
                rule = rules[max(matching, key=len)]
                multipliers = (rule.get("lr_mult", 1.0), rule.get("decay_mult", 1.0))
            elif isinstance(module, norms):
                multipliers = (1.0, general["norm_decay_mult"])
            elif name.endswith(".bias"):
                multipliers = (general["bias_lr_mult"], general["bias_decay_mult"])
            else:
                multipliers = (1.0, 1.0)
            lr_mult, decay_mult = multipliers
            lr_mult *= of_layers.get(name, 1.0)
            groups.setdefault((lr_mult, decay_mult), []).append(parameter)
    return groups


def layer_multipliers(
    model: nn.Module, layer_decay: float = 1.0, decay_type: str = "layer_wise"
) -> dict[str, float]:
    """Return factors of the backbone's learning rates: layer_decay^D (BEiT, arXiv:2106.08254).

    D is the number of layers from the parameter up to the heads: 1 in the last block, and in the
    stem the number of blocks + 1. decay_type "stage_wise" gives all blocks of a stage the same D,
    with which MMSegmentation trains ConvNeXt.
    """
    types = ("layer_wise", "stage_wise")
    place = "optimizer.paramwise"
    require(decay_type in types, f"{place}.decay_type", decay_type, " or ".join(types))
    require(0 < layer_decay <= 1, f"{place}.layer_decay", layer_decay, "above 0, at most 1")
    if layer_decay == 1.0:
        return {}
    if not hasattr(model.backbone, "layer_distances"):
        raise ConfigError(
            f"{place}.layer_decay: {type(model.backbone).__name__} has no method layer_distances; "
            "define it as models.Backbone does"
        )
    try:
        distances = model.backbone.layer_distances(by_stage=decay_type == "stage_wise")
    except UserError as error:
        raise ConfigError(f"{place}.layer_decay: {error}") from None
    return {f"backbone.{name}": layer_decay**distance for name, distance in distances.items()}


def parse_paramwise(paramwise: dict) -> tuple[dict[str, dict], dict[str, float], dict]:
    """Return the rules by part of a name, the factors for norms and biases, and those of layers.

    Raises ConfigError.
    """
    rules = dict(paramwise)
    layer_decay = {key: rules.pop(key) for key in ("layer_decay", "decay_type") if key in rules}
    check_needed_keys("optimizer.paramwise", layer_decay)
    check_keywords(layer_multipliers, {"model": nn.Module()} | layer_decay, "optimizer.paramwise")
    general = {}
    for key in ("norm_decay_mult", "bias_lr_mult", "bias_decay_mult"):
        general[key] = rules.pop(key, 1.0)
    custom_keys = rules.pop("custom_keys", {})
    if not isinstance(custom_keys, dict):
        raise ConfigError(f"optimizer.paramwise.custom_keys is {custom_keys!r}; expected a section")
    rules |= custom_keys
    for key, value in general.items():
        is_valid = fits(value, float) and value >= 0
        require(is_valid, f"optimizer.paramwise.{key}", value, "a number, 0 or more")
    for part, rule in rules.items():
        is_rule = (
            isinstance(rule, dict)
            and rule.keys() <= {"lr_mult", "decay_mult"}
            and all(fits(value, float) and value >= 0 for value in rule.values())
        )
        expected = f'{{"lr_mult": x, "decay_mult": y}}, 0 or more, or one of {", ".join(general)}'
        require(is_rule, f"optimizer.paramwise.{part}", rule, expected)
    return rules, general, layer_decay


def learning_rate(
    iteration: int,
    base_lr: float,
    *,
    max_iters: int,
    policy: str = "poly",
    power: float = 0.9,
    min_lr: float = 0.0,
    milestones: list[int] | None = None,
    gamma: float = 0.1,
    warmup: str | None = None,
    warmup_iters: int = 0,
    warmup_ratio: float = 1e-6,
) -> float:
    """Return the learning rate of an iteration, counted from 0. It falls from base_lr to min_lr.

    With t = iteration / max_iters, `policy` is one of:
    - "poly": (base_lr - min_lr) (1 - t)^power + min_lr (PSPNet, arXiv:1612.01105).
    - "cosine": (base_lr - min_lr) (1 + cos(pi t)) / 2 + min_lr (SGDR, arXiv:1608.03983).
    - "step": base_lr * gamma^(number of `milestones` reached), but at least min_lr (ResNet,
      arXiv:1512.03385).

    During a "linear" warm-up this is multiplied by 1 - (1 - iteration / warmup_iters)
    (1 - warmup_ratio), as in mmcv 1.x.
    """
    require(warmup in (None, "linear"), "schedule.warmup", warmup, 'null or "linear"')
    require(max_iters >= 1, "schedule.max_iters", max_iters, "at least 1")
    require(warmup_iters >= 0, "schedule.warmup_iters", warmup_iters, "0 or more")
    require(0 <= warmup_ratio <= 1, "schedule.warmup_ratio", warmup_ratio, "from 0 to 1")
    require(power >= 0, "schedule.power", power, "0 or more")
    require(gamma > 0, "schedule.gamma", gamma, "above 0")
    require(0 <= min_lr, "schedule.min_lr", min_lr, "0 or more")
    is_valid = (milestones is not None) == (policy == "step")
    expected = 'a list of iterations with policy "step", null with the others'
    require(is_valid, "schedule.milestones", milestones, expected)
    progress = min(1.0, iteration / max_iters)
    if policy == "step":
        reached = sum(iteration >= milestone for milestone in milestones)
        lr = max(min_lr, base_lr * gamma**reached)
    elif policy == "cosine":
        lr = (base_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2 + min_lr
    elif policy == "poly":
        lr = (base_lr - min_lr) * (1 - progress) ** power + min_lr
    else:
        raise ConfigError(f"schedule.policy is {policy!r}; expected poly, cosine or step")
    if warmup and iteration < warmup_iters:
        lr *= 1 - (1 - iteration / warmup_iters) * (1 - warmup_ratio)
    return lr


def set_learning_rate(optimizer: torch.optim.Optimizer, iteration: int, config: Config) -> float:
    """Set the learning rate of every parameter group. Return that of multiplier 1.

    A multiplier scales the result of the schedule, its floor included: `lr_mult: 0` means no
    learning. In MMSegmentation `min_lr` is the floor of every group, whatever its multiplier.
    """
    lr = learning_rate(iteration, config.optimizer["lr"], **config.schedule)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
    return lr


# -------------------------------------------------------------------------------------- Checkpoints


def atomic_write(path: Path, write: Callable) -> None:
    """Write a file whole or not at all.

    `write(file)` fills a temporary file in the same folder, which is flushed to disk and renamed.
    """
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
    """Give a file a second name atomically. File systems without hard links get a copy."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError:
        atomic_write(name, lambda file: file.write(path.read_bytes()))


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU without running code that it may hold.

    Raises CheckpointError.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder; name a checkpoint in it, such as best.pth")
    if "://" in path:
        raise CheckpointError(f"checkpoint {path}: download it, and name the file")
    if not os.path.isfile(path):
        raise CheckpointError(f"checkpoint {path} does not exist; nothing was started")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"checkpoint {path}: this user may not read it; set its permissions")
    try:
        return models.read_weights(path)
    except UserError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged, or holds Python objects, which could run code and are "
            f"not loaded: {error}. Take another file, or --resume-from auto for the newest good "
            "one of the work_dir."
        ) from None


def newest_checkpoints(work_dir: Path) -> list[Path]:
    """Return the files iter_N.pth of a work_dir, newest first."""
    paths = work_dir.glob("iter_*.pth")
    checkpoints = [path for path in paths if re.fullmatch(r"iter_\d+\.pth", path.name)]
    return sorted(checkpoints, key=iteration_of, reverse=True)


def iteration_of(path: Path) -> int:
    return int(path.stem.removeprefix("iter_"))


def find_checkpoint(work_dir: Path) -> tuple[Path | None, dict | None, list[str]]:
    """Return a work_dir's newest good checkpoint, its content, and what is wrong with newer ones.

    (None, None, []) if the work_dir has no checkpoint. Raises CheckpointError if none is good.
    """
    problems = []
    paths = newest_checkpoints(work_dir)
    if not paths:  # one of these may have been copied here alone
        names = ("latest.pth", "best.pth")
        paths = [work_dir / name for name in names if (work_dir / name).exists()]
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        bad_keys = not_finite(checkpoint)
        if not bad_keys:
            return path, checkpoint, problems
        problems.append(f"checkpoint {path} holds values that are not finite, in {bad_keys[0]}")
    if problems:
        problems.append(f"{work_dir} holds no good checkpoint; delete these to start afresh")
        raise CheckpointError("\n".join(problems))
    return None, None, []


def not_finite(state: object, key: str = "") -> list[str]:
    """Return the keys of tensors in nested dicts that hold infinities or NaN."""
    if isinstance(state, dict):
        keys = []
        for name, value in state.items():
            keys += not_finite(value, f"{key}.{name}".lstrip("."))
        return keys
    if isinstance(state, Tensor) and state.is_floating_point() and not state.isfinite().all():
        return [key]
    return []


class TrainState:
    """Everything that a checkpoint restores.

    ema: a second model, which holds the moving average of the weights, or None.
    iteration: optimizer steps finished.
    best: {"mIoU", "iteration"} of the best validation so far.
    validations_since_best: the validations after it.
    validated: False as long as the validation that is due at this iteration is not finished.
    log_sizes: bytes of each log file at the checkpoint. Later lines will be written again.
    resumed_from: the checkpoint that was loaded, or None.
    images: in it, the checksum_of_images() that it was trained on, or None.
    """

    def __init__(
        self,
        model: Segmentor,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: Segmentor | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.ema = ema
        self.iteration = 0
        self.best = None
        self.validations_since_best = 0
        self.validated = True
        self.resumed_from = None
        self.images = None
        # Without a checkpoint, logs are left over from a run that died before its first save.
        self.log_sizes = dict.fromkeys(RunDir.LOGS, 0)

    def record_score(self, miou: float) -> bool:
        """Record a finished validation. Return whether its mIoU is the best so far."""
        if self.best and miou <= self.best["mIoU"]:
            self.validations_since_best += 1
            return False
        self.validations_since_best = 0
        self.best = {"mIoU": miou, "iteration": self.iteration}
        return True

    def state_dict(self) -> dict:
        state = {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iteration,
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "validated": self.validated,
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restore a state_dict. Raise RuntimeError or ValueError if network or optimizer differ."""
        config_groups = [dict(group) for group in self.optimizer.param_groups]
        self.model.load_state_dict(checkpoint["state_dict"])
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.get("ema", checkpoint["state_dict"]))
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        # Settings such as weight decay come from the config: they may be changed on purpose. The
        # learning rate is that of the last step, until the next one sets it.
        for group, settings in zip(self.optimizer.param_groups, config_groups):
            group.update(settings, lr=group["lr"])
        if checkpoint["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.iteration = checkpoint["iteration"]
        self.best = checkpoint.get("best")
        self.validations_since_best = checkpoint.get("validations_since_best", 0)
        self.validated = checkpoint.get("validated", True)
        self.log_sizes = checkpoint.get("logs", {})
        self.images = checkpoint.get("images")


# What decides, beside the weights, what an evaluation computes and on which images.
EVALUATED_KEYS = (
    "model.",
    "data.type",
    "data.root",
    "data.val_split",
    "data.fold",
    "data.mean",
    "data.std",
    "data.values",
    "data.reduce_zero_label",
)


def initialize(
    state: TrainState, args: argparse.Namespace, config: Config, classes: list[str]
) -> list[str]:
    """Set the state that the run starts from. Return notes for the log.

    In order of precedence:
    1. --resume-from: the whole state of a checkpoint; "auto" is the work_dir's newest good one.
    2. --load-from: weights only, at iteration 0; their moving average if the checkpoint has one.
    3. model.backbone.pretrained: weights of the backbone.
    4. From scratch.

    classes: of the data set. Those of the weights may be others, except for an evaluation.
    """
    is_main = dist_utils.rank() == 0
    path = args.resume_from
    checkpoint = None
    notes = []
    if path == "auto":
        problems = []
        if is_main:
            path, checkpoint, problems = find_checkpoint(Path(config.work_dir))
        path, problems = dist_utils.broadcast_object((path, problems))
        notes += problems
        if path is None:
            notes.append("no checkpoint yet: starting afresh")

    source = path or args.load_from
    if source:
        checkpoint = checkpoint or load_checkpoint(source)
        difference = compare_classes(checkpoint, classes)
        if difference:
            notes.append(f"{source}: {difference}")
        if difference and args.eval_only:
            raise CheckpointError(f"{notes[-1]}. Evaluate it with a config that has its classes.")
    if path and args.load_from:
        notes.append(f"{args.load_from} is not loaded, as the run is resumed from {path}")
    if path:
        return notes + resume(state, path, checkpoint, config)
    if args.load_from:
        report = models.load_weights(state.model, checkpoint, complete=args.eval_only)
        notes.append(f"weights from {args.load_from}: {report}")
        if args.eval_only:
            state.iteration = checkpoint.get("iteration", 0)
            notes += changes_since(checkpoint, config, EVALUATED_KEYS)
        if state.ema is not None:
            state.ema.load_state_dict(state.model.state_dict())
        return notes
    if args.eval_only:
        raise ConfigError(
            "--eval-only has no weights to evaluate: name them with --load-from or --resume-from"
        )
    if state.model.pretrained and is_main:  # `distribute` sends rank 0's weights to the others
        notes.append(models.load_pretrained(state.model))
    if not state.model.pretrained:
        notes.append("from scratch: all weights are random")
    return notes


def compare_classes(checkpoint: dict, classes: list[str]) -> str:
    """Say how the classes of a checkpoint, ours or MMSegmentation's, differ from the data set's.

    Returns "" if their names differ at most in case and spaces, or if the checkpoint has none.
    """
    trained = data_set_meta(checkpoint).get("classes") or classes
    for number, (theirs, ours) in enumerate(itertools.zip_longest(trained, classes)):
        if re.sub(r"[\W_]+", "", str(theirs)).lower() != re.sub(r"[\W_]+", "", str(ours)).lower():
            return (
                "it was trained for other classes than the data set's, or in another order: it has "
                f"{len(trained)}, the data set {len(classes)}, and number {number} is {theirs!r} "
                f"there, {ours!r} here"
            )
    return ""


def data_set_meta(checkpoint: dict) -> dict:
    """Return the part of a checkpoint, ours or MMSegmentation's, with `classes` and `palette`."""
    found = checkpoint
    for key in ("meta", "dataset_meta"):
        if isinstance(found.get(key), dict):
            found = found[key]
    return {str(key).lower(): value for key, value in found.items()}  # CLASSES before version 1.0


def resume(state: TrainState, path: str | Path, checkpoint: dict, config: Config) -> list[str]:
    """Restore a checkpoint that train.py wrote. Raise CheckpointError if it does not fit."""
    if not checkpoint.keys() >= {"state_dict", "optimizer", "iteration", "scaler"}:
        raise CheckpointError(
            f"{path} is no checkpoint of train.py: it cannot be resumed. "
            f"To take its weights alone, use --load-from {path}."
        )
    old_config = checkpoint.get("config", asdict(config))
    old_type = old_config.get("optimizer", {}).get("type")
    new_type = config.optimizer["type"]
    if old_type not in (None, new_type):
        raise CheckpointError(
            f"{path} holds the state of {old_type}, the config says {new_type}. "
            f"Go on with {old_type}, or take the weights alone with --load-from {path}."
        )
    try:
        state.load_state_dict(checkpoint)
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()
        if len(lines) > 6:
            lines[6:] = ["..."]
        raise CheckpointError(
            f"{path} is of another network or optimizer than the config's; take its own config, "
            "or --load-from for the weights that fit:\n" + "\n".join(lines)
        ) from None
    state.resumed_from = path
    if Path(path).resolve().parent != Path(config.work_dir).resolve():
        state.log_sizes = {}  # of the logs in another work_dir
    return [
        f"resumed from {path} at iteration {state.iteration}",
        *changes_since(checkpoint, config),
    ]


def changes_since(checkpoint: dict, config: Config, keys: tuple[str, ...] = ("",)) -> list[str]:
    """Say what differs from the config in a checkpoint of train.py; only keys that begin so."""
    if not checkpoint.keys() >= {"config", "versions"}:
        return []
    new_config = asdict(config)
    changed = differences(complete(new_config | checkpoint["config"]), complete(new_config))
    return [f"changed since then: {line}" for line in changed if line.startswith(keys)]


# ------------------------------------------------------------------------------------------- RunDir


def write_line(text: str) -> None:
    """Print a line at once, above the progress bar.

    A closed terminal, a broken pipe (Ctrl-C also ends the tee of `| tee log`) or a full disk costs
    the output, not the run, which writes train.log too.
    """
    try:
        tqdm.write(text)
        print(end="", flush=True)
    except OSError:
        # Python would try again at exit to write what is left in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunDir:
    """The folder of a run: config.json, logs, checkpoints, TensorBoard files if that is installed.

    Rank 0 writes; on other ranks the methods do nothing.
    """

    LOGS = ("train.log", "metrics.jsonl")

    def __init__(self, path: Path, keep: int):
        self.path = path
        self.keep = keep  # the number of iter_N.pth files
        self.logs = {}
        self.board = None
        self.save_error = None  # why the last checkpoint could not be written

    def open(self, config: Config, state: TrainState, eval_only: bool) -> None:
        """Open the logs. Training first takes the folder over; an evaluation only adds to logs."""
        if dist_utils.rank() > 0:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not eval_only:
                self.take_over(config, state)
            self.open_logs()
        except OSError as error:
            raise ConfigError(
                f"work_dir {self.path} cannot be written: {error}. Name another with --work-dir."
            ) from None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            purge_step = None if eval_only else state.iteration
            self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)
            text = json.dumps(complete(asdict(config)), indent=1)
            self.board.add_text("config", textwrap.indent(text, "    "), state.iteration)

    def open_logs(self) -> None:
        for name in self.LOGS:
            self.logs[name] = open(self.path / name, "a", buffering=1)

    def take_over(self, config: Config, state: TrainState) -> None:
        """Bring the folder back to what it was at the state's iteration."""
        self.lock()
        checkpoints = sorted(self.path.glob("*.pth"))
        if checkpoints and not state.resumed_from:
            raise ConfigError(
                f"work_dir {self.path} already holds a run: {checkpoints[-1].name}. Continue it "
                "with --resume-from auto, or name another --work-dir; nothing was overwritten."
            )
        for path in newest_checkpoints(self.path):
            # Damaged, or abandoned by resuming from an earlier checkpoint.
            if iteration_of(path) > state.iteration:
                os.replace(path, f"{path}.old")
        self.restore_best(state)
        for temporary in self.path.glob(".*.tmp"):
            temporary.unlink()
        content = json.dumps(complete(asdict(config)) | {"run": describe_run()}, indent=1)
        atomic_write(self.path / "config.json", lambda file: file.write(content.encode()))
        for name, size in state.log_sizes.items():
            log = self.path / name
            if name in self.LOGS and log.exists() and log.stat().st_size > size:
                os.truncate(log, max(0, int(size)))

    def holds_training(self) -> bool:
        """Return whether a run has trained here, which writes config.json."""
        return (self.path / "config.json").exists()

    def restore_best(self, state: TrainState) -> None:
        """Make best.pth the checkpoint that `state.best` is about, or remove it if that is gone.

        The file may come from iterations that are abandoned by resuming from an earlier checkpoint,
        or be older than the checkpoint if the run was killed between writing the two.
        """
        path = self.path / "best.pth"
        if path.exists():
            with contextlib.suppress(CheckpointError):
                if load_checkpoint(path).get("best") == state.best:
                    return
            os.replace(path, f"{path}.old")
        if state.best:
            checkpoint = self.path / f"iter_{state.best['iteration']}.pth"
            if checkpoint.exists():
                link(checkpoint, path)
            else:
                write_line(
                    f"best.pth, of {state.best}, is gone: only a higher mIoU will replace it"
                )

    def lock(self, patience: float = 150) -> None:
        """Wait up to `patience` seconds for another run in this folder to end.

        Two runs at once would overwrite each other's checkpoints. A file server may hold the lock
        of a lost machine for a while.
        """
        self.lock_file = open(self.path / ".lock", "a")
        deadline = time.monotonic() + patience
        is_waiting = False
        while True:
            try:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another run is at work in {self.path}: name another --work-dir, or end "
                        "that one. If there is none, its machine was lost: remove "
                        f"{self.path / '.lock'}"
                    ) from None
                if not is_waiting:
                    write_line(f"waiting for another run in {self.path} to end")
                is_waiting = True
                time.sleep(1)
            except OSError:  # a file system without locks
                return

    def log(self, *texts: str) -> None:
        """Print lines and add them to train.log."""
        if not self.logs:
            return
        for text in texts:
            write_line(text)
            self.append("train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, mode: str, iteration: int, values: dict) -> None:
        """Add a line to metrics.jsonl, and the scalars among `values` to TensorBoard."""
        if not self.logs:
            return
        record = {"mode": mode, "iteration": iteration} | values
        self.append("metrics.jsonl", json.dumps(record) + "\n")
        for name, value in values.items():
            if self.board and isinstance(value, (int, float)):
                with contextlib.suppress(OSError):
                    self.board.add_scalar(f"{mode}/{name}", value, iteration)

    def draw(self, iteration: int, metrics: dict, classes: Sequence[str], preview: Path) -> None:
        """Draw a validation for TensorBoard and, where matplotlib is installed, as pictures.

        A failure costs a picture, not the run.
        """
        if not self.logs:
            return
        try:
            if self.board:
                for name, value in zip(classes, metrics["IoU"]):
                    if value is not None:
                        self.board.add_scalar(f"val_IoU/{name}", value, iteration)
                if preview.exists():
                    picture = np.asarray(Image.open(preview))
                    self.board.add_image("preview", picture, iteration, dataformats="HWC")
            figures = {
                "curves.png": curves_figure(read_metrics(self.path / "metrics.jsonl")),
                "confusion.png": confusion_figure(metrics["confusion"], classes),
            }
            for name, figure in figures.items():
                save = functools.partial(figure.savefig, format="png")
                atomic_write(self.path / name, save)
        except ImportError:
            return
        except Exception as error:  # of whatever kind another package may raise
            self.log(f"no pictures of this validation: {type(error).__name__}: {error}")

    def append(self, name: str, text: str) -> None:
        try:
            self.logs[name].write(text)
        except OSError as error:  # a full disk costs a line, not the run
            write_line(f"{name}: {error}")

    def save(self, content: dict, names: list[str]) -> None:
        """Write a checkpoint under the first name and link the other names to it.

        Then removes all but the last `keep` iter_N.pth. If writing fails, the earlier checkpoints
        stand, `save_error` says why, and the run continues to the next one.
        """
        if dist_utils.rank() > 0:
            return
        self.log(f"saving {', '.join(names)}")
        first = self.path / names[0]
        try:
            if not all((self.path / name).exists() for name in self.logs):
                self.path.mkdir(parents=True, exist_ok=True)
                self.open_logs()
                self.log(f"{self.path} or logs in it were deleted during the run: made anew")
            sizes = {name: os.fstat(log.fileno()).st_size for name, log in self.logs.items()}
            atomic_write(first, lambda file: torch.save(content | {"logs": sizes}, file))
            for name in names[1:]:
                link(first, self.path / name)
            for path in newest_checkpoints(self.path)[self.keep :]:
                path.unlink()
            for path in self.path.glob("iter_*.pth.old"):
                path.unlink()
            if self.board:
                self.board.flush()
            self.save_error = None
        except (OSError, RuntimeError) as error:
            while error.__context__:  # Unwrap the OSError that torch.save hides.
                error = error.__context__
            self.save_error = f"checkpoint {first} could not be written: {error}"
            self.log(f"{self.save_error}; the earlier ones stand, the run goes on to the next")


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics.jsonl, without confusion matrices, which are long."""
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a full disk cut off
            records.append(json.loads(re.sub(r', "confusion": \[\[[^{}]*\]\]', "", line)))
    return records


def curves_figure(records: list[dict]):
    """Plot the losses, the learning rate and the mIoU. Raise ImportError without matplotlib."""
    from matplotlib.figure import Figure  # without pyplot, which keeps state and may need a display

    train = [record for record in records if record["mode"] == "train"]
    val = [record for record in records if record["mode"] == "val"]
    figure = Figure(figsize=(15, 4))
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.12, wspace=0.15)
    loss_axes, lr_axes, score_axes = figure.subplots(1, 3)
    iterations = [record["iteration"] for record in train]
    names = [name for name in train[-1] if "loss" in name] if train else []
    for name in names:
        values = [record.get(name, math.nan) for record in train]
        loss_axes.plot(iterations, values, label=name, linewidth=2 if name == "loss" else 1)
    lr_axes.plot(iterations, [record["lr"] for record in train])
    iterations = [record["iteration"] for record in val]
    loss_axes.plot(iterations, [record["loss"] for record in val], "o-", label="validation loss")
    for name in ("mIoU", "mAcc", "aAcc"):
        score_axes.plot(iterations, [100 * record[name] for record in val], "o-", label=name)
    loss_axes.legend()
    score_axes.legend()
    titles = ("loss", "learning rate", "validation, percent")
    for axes, title in zip((loss_axes, lr_axes, score_axes), titles):
        axes.set_title(title)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    return figure


def confusion_figure(confusion: list[list[int]], classes: Sequence[str]):
    """Plot a confusion matrix in percent of the true class's pixels."""
    from matplotlib.figure import Figure

    counts = np.asarray(confusion, float)
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    count = len(classes)
    side = min(12.0, 4 + 0.3 * count)
    figure = Figure(figsize=(side, side))
    figure.subplots_adjust(left=2 / side, right=1 - 0.2 / side, bottom=2 / side, top=0.95)
    axes = figure.subplots()
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_title("percent of the true class")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if count <= 40:  # the numbers of more classes suffice, as names take a second to draw
        names = [name[:20] for name in classes]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= 20:
        for i, j in itertools.product(range(count), repeat=2):
            color = "white" if percent[i, j] > 50 else "black"
            axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=color)
    return figure


def describe_run() -> dict:
    """Return what it takes to repeat a run: command, commit and changes of the code, versions."""

    def git(*arguments: str) -> str | None:
        command = ["git", *arguments]
        try:
            answer = subprocess.run(
                command, cwd=Path(__file__).parent, capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None
        return answer.stdout.decode(errors="replace").strip()

    return {
        "command": [sys.executable, *sys.argv],
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": git("diff", "HEAD"),
        "versions": versions(),
        "processes": dist_utils.world_size(),
        "host": platform.node(),
    }


def version_of(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # as if built from source
        return importlib.metadata.version(package)
    return None


def versions() -> dict:
    has_gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version_of("torchvision"),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
    }


# ------------------------------------------------------------------------------ Metrics, evaluation


def classify(
    logits: Tensor,
    label: Tensor,
    align_corners: bool,
    threshold: float = 0.5,
    chunk: int = 32,
    max_pixels: int = 2**24,
) -> tuple[Tensor, Tensor]:
    """Return predicted classes at the label's size, and the sum of cross entropy over valid pixels.

    logits (N, classes, h, w), label (N, H, W) -> classes (N, H, W), loss ().
    Logits are upsampled `chunk` classes and about `max_pixels` pixels at a time, so that memory
    does not grow with the number of classes, nor much with the size.
    threshold: the probability above which class 1 of two is predicted.
    """
    height, width = label.shape[1:]
    count = max(1, max_pixels // width)  # rows at a time
    if count >= height:
        logits_of = functools.partial(upsample, size=(height, width), align_corners=align_corners)
        return classify_upsampled(logits, label, logits_of, threshold, chunk)
    classes = torch.empty(label.shape, dtype=torch.uint8, device=logits.device)
    loss = 0.0
    for top in range(0, height, count):
        rows = slice(top, min(top + count, height))
        logits_of = functools.partial(
            upsample_rows, size=(height, width), rows=rows, align_corners=align_corners
        )
        classes[:, rows], loss_sum = classify_upsampled(
            logits, label[:, rows], logits_of, threshold, chunk
        )
        loss = loss + loss_sum
    return classes, loss


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def upsample(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def upsample_rows(
    logits: Tensor, size: tuple[int, int], rows: slice, align_corners: bool
) -> Tensor:
    """Return some rows of upsample(logits, size, align_corners)."""
    height = logits.size(2)
    y = torch.arange(rows.start, rows.stop, device=logits.device)
    if align_corners:
        y = y * ((height - 1) / max(1, size[0] - 1))
    else:
        y = ((y + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = y.long().clamp(max=height - 1)
    below = (above + 1).clamp(max=height - 1)
    share = (y - above)[:, None].to(logits.dtype)
    mixed = logits[:, :, above].lerp(logits[:, :, below], share)  # (N, C, rows, w)
    return upsample(mixed, (len(y), size[1]), align_corners)


def classify_upsampled(
    logits: Tensor, label: Tensor, upsampled: Callable, threshold: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """Classify the pixels of `label`, at which `upsampled(logits)` are the logits."""
    label_logit = torch.zeros(label.shape, device=logits.device)  # the logit of the true class
    for first in range(0, logits.size(1), chunk):
        part = upsampled(logits[:, first : first + chunk])  # (N, up to chunk, H, W)
        part_max, part_class = part.max(1)
        part_log_sum = part.logsumexp(1)
        if threshold != 0.5:
            part_class = (part[:, 1] - part[:, 0] > log_odds(threshold)).long()
        index = label.long() - first
        is_in_part = (index >= 0) & (index < part.size(1))
        index = index.clamp(0, part.size(1) - 1)
        label_logit += part.gather(1, index[:, None])[:, 0] * is_in_part
        if first == 0:
            best = part_max
            best_class = part_class
            log_sum = part_log_sum
        else:
            best_class = torch.where(part_max > best, part_class + first, best_class)
            best = torch.maximum(best, part_max)
            log_sum = torch.logaddexp(log_sum, part_log_sum)
    loss = (log_sum - label_logit) * (label != IGNORE)
    return best_class, loss.sum(dtype=torch.float64)


def mean_iou(confusion: Tensor) -> Tensor:
    """Return the mean IoU (N) of confusion matrices (N, classes^2); 1 if all pixels are ignored."""
    classes = math.isqrt(confusion.size(1))
    matrix = confusion.view(-1, classes, classes).double()
    correct = matrix.diagonal(dim1=1, dim2=2)  # (N, classes)
    iou = correct / (matrix.sum(1) + matrix.sum(2) - correct)
    return iou.nanmean(1).nan_to_num(1.0)


def compute_metrics(confusion: Tensor) -> dict:
    """Compute MMSegmentation's metrics of a confusion matrix (true classes, predicted classes).

    IoU, Acc (recall), Precision and Dice (F1 score) are lists over classes, with None for a class
    that does not occur. The means leave those classes out.
    """
    confusion = confusion.double().cpu()
    correct = confusion.diag()
    true = confusion.sum(1)
    predicted = confusion.sum(0)
    per_class = {
        "IoU": correct / (true + predicted - correct),
        "Acc": correct / true,
        "Precision": correct / predicted,
        "Dice": 2 * correct / (true + predicted),
    }
    metrics = {"mIoU": 0.0, "mAcc": 0.0}  # the order of the log
    metrics["aAcc"] = (correct.sum() / true.sum().clamp(min=1)).item()
    for name, values in per_class.items():
        metrics[f"m{name}"] = values.nanmean().nan_to_num(0.0).item()
    metrics["mFscore"] = metrics["mDice"]
    for name, values in per_class.items():
        metrics[name] = [None if math.isnan(value) else value for value in values.tolist()]
    return metrics


def table(metrics: dict, classes: Sequence[str]) -> str:
    """Return a line for each class: IoU, Acc and Dice in percent."""

    def percent(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:6.2f}"

    width = min(72, max(map(len, classes)))
    lines = [f"{'class':{width}}    IoU    Acc   Dice"]
    absent = []
    for name, *values in zip(classes, metrics["IoU"], metrics["Acc"], metrics["Dice"]):
        lines.append(" ".join([f"{name[:width]:{width}}", *map(percent, values)]))
        if values[0] is None:
            absent.append(name)
    if absent:
        lines.append(wrap_line(f"left out of the means, as they never occur: {', '.join(absent)}"))
    return "\n".join(lines)


def palette_image(classes: Tensor, palette: Sequence) -> Image.Image:
    """Return a map of classes (H, W) as an image with a palette. Ignored pixels are black."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    # This index is never used. Without any color, data.read() would take the grays for the values.
    colors[INVALID] = [255, 0, 0]
    image = Image.fromarray(classes.byte().cpu().numpy())
    image.putpalette(colors.tobytes())
    return image


def as_rgb(image: Tensor) -> Image.Image:
    """Return an image (C, h, w) for looking at: three channels of 8 bits."""
    image = image[:3] if image.size(0) >= 3 else image[:1].expand(3, -1, -1)
    if image.dtype != torch.uint8:
        image = 255 * (image - image.min()) / (image.max() - image.min()).clamp_min(1e-6)
    return Image.fromarray(image.byte().permute(1, 2, 0).cpu().numpy())


def paint(image: Image.Image, label: Image.Image, palette: Sequence) -> Image.Image:
    """Blend an image with the colors of its classes.

    Ignored pixels are striped, as the color of a class may be black.
    label: of any size, in mode L or P.
    """
    colors = np.zeros((256, 3))
    colors[: len(palette)] = palette
    classes = np.asarray(label.resize(image.size, Image.Resampling.NEAREST))
    mixed = 0.4 * np.asarray(image) + 0.6 * colors[classes]  # (h, w, 3)
    stripes = np.indices(classes.shape).sum(0) // 4 % 2
    mixed[(classes == IGNORE) & (stripes == 0)] = 255
    mixed[(classes == IGNORE) & (stripes == 1)] = 64
    return Image.fromarray(mixed.astype(np.uint8))


def with_legend(picture: Image.Image, names: Sequence[str], colors: Sequence) -> Image.Image:
    """Return the picture with a legend below it."""
    line = 16  # pixels
    draw = ImageDraw.Draw(picture)
    width = 24 + max(math.ceil(draw.textlength(name)) for name in names)
    columns = max(1, picture.width // width)
    height = picture.height + line * math.ceil(len(names) / columns)
    sheet = Image.new("RGB", (max(picture.width, width), height), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for number, (name, color) in enumerate(zip(names, colors)):
        x = width * (number % columns)
        y = picture.height + line * (number // columns)
        draw.rectangle((x + 3, y + 3, x + 14, y + 13), fill=tuple(color), outline="black")
        draw.text((x + 18, y + 2), name, fill="black")
    return sheet


def preview_row(
    title: str, image: Tensor, maps: dict[str, Tensor], palette: Sequence
) -> Image.Image:
    """Draw the image (C, h, w) beside maps of classes (H, W) blended with it, with captions."""
    height, width = next(iter(maps.values())).shape
    factor = min(480 / max(height, width), max(1, 240 / max(height, width)))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    picture = as_rgb(image).resize(size)
    tiles = {title: picture}
    for caption, classes in maps.items():
        label = Image.fromarray(classes.byte().cpu().numpy())
        tiles[caption] = paint(picture, label, palette)
    caption_height = 16
    row = Image.new("RGB", (3 * size[0], size[1] + caption_height), "white")
    draw = ImageDraw.Draw(row)
    for number, (caption, tile) in enumerate(tiles.items()):
        x = number * size[0]
        while caption and draw.textlength(caption) > size[0] - 4:
            caption = caption[:-1]
        draw.text((x + 2, 2), caption, fill="black")
        row.paste(tile, (x, caption_height))
    return row


def write_preview(
    path: Path, rows: list[Image.Image], classes: Sequence[str], palette: Sequence
) -> None:
    """Write the rows and a legend as a PNG."""
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height
    sheet = with_legend(sheet, classes, palette)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: sheet.save(file, "png"))
    except OSError as error:  # a full disk costs a picture, not the run
        write_line(f"{path}: {error}")


def write_val_predictions(show_dir: Path, batch: dict, prediction: Tensor, data: Data) -> None:
    """Write each prediction (N, H, W) as a palette PNG. Every process writes its own images."""
    for index, classes in zip(batch["index"].tolist(), prediction):
        path = show_dir / f"{index:06d}_{Path(data.val.name(index)).stem}.png"
        try:
            palette_image(classes, data.palette).save(path)
        except OSError as error:
            write_line(f"{path}: {error}")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run dropout and batch norm as in evaluation, and do not autotune for every image size."""
    was_training = model.training
    was_tuning = torch.backends.cudnn.benchmark
    model.eval()
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        model.train(was_training)
        torch.backends.cudnn.benchmark = was_tuning


def is_quiet() -> bool:
    """Return whether to hide progress bars: on other ranks than 0, and without a terminal."""
    return dist_utils.rank() > 0 or not sys.stderr or not sys.stderr.isatty()


def predict_logits(
    model: Segmentor, image: Tensor, size: tuple[int, int], settings: Evaluation, augment: bool
) -> Tensor:
    """Return logits as `settings` says; with `augment`, over several scales and mirror images."""
    options = {
        "mode": settings.mode,
        "crop_size": settings.crop_size,
        "stride": settings.stride,
        "batch_size": settings.batch_size,
    }
    if augment:
        return model.inference_tta(image, size, settings.ratios, **options)
    return model.inference(image, **options)


def count_pixels(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Return confusion matrices (N, classes^2) of labels and predictions (N, H, W)."""
    ignored = num_classes * num_classes
    cell = label.long() * num_classes + prediction
    cell = torch.where(label == IGNORE, ignored, cell).flatten(1)
    counts = cell.new_zeros(len(label), ignored + 1)
    counts.scatter_add_(1, cell, torch.ones_like(cell))  # bincount would sync the GPU
    return counts[:, :-1]


def not_finite_output(
    scored: list[tuple[Tensor, Tensor, Tensor]], data: Data, device: torch.device
) -> UserError:
    """Return an error that names the images for which the network's output is not finite.

    Call it on every process.

    scored: see `evaluate`.
    """
    is_bad = torch.zeros(len(data.val), device=device)
    for index, loss, _ in scored:
        is_bad[index] = float(not loss.isfinite())
    bad = dist_utils.all_reduce(is_bad).nonzero()[:, 0].tolist()
    names = ", ".join(data.val.name(i) for i in bad[:8])
    return UserError(
        f"the network's output for {len(bad)} of {len(data.val)} images is not finite: {names}. "
        "If these images are as they should be, the weights or a running variance have diverged, "
        "or numbers exceed the range of precision=fp16."
    )


def gather_iou(
    scored: list[tuple[Tensor, Tensor, Tensor]], count: int, device: torch.device
) -> list[float]:
    """Return the mean IoU of each of the `count` images on every process; see `evaluate`."""
    image_iou = torch.zeros(count, dtype=torch.float64, device=device)
    for index, _, iou in scored:
        image_iou[index.to(device)] = iou
    return dist_utils.all_reduce(image_iou).tolist()


@contextlib.contextmanager
def explain_small_images(
    model: Segmentor, data: Data, batch: dict, name_of: Callable
) -> Iterator[None]:
    """Raise UserError for an error of the network that larger images would not cause.

    name_of: (index) -> the name of an image of the batch.
    """
    try:
        yield
    except (torch.OutOfMemoryError, UserError, OSError):
        raise
    except Exception as error:
        image = batch["image"]
        larger = [max(sides) for sides in zip(image.shape[2:], data.sampling["crop_size"])]
        try:
            model(next(model.parameters()).new_zeros(1, image.size(1), *larger))
        except Exception:
            raise error from None
        names = [name_of(i) for i in batch["index"].tolist()]
        raise UserError(
            f"{', '.join(names)}: the network cannot take images of {list(image.shape[2:])} pixels "
            "([height, width], after evaluation.scale and times evaluation.ratios), but of "
            f"{larger}: {error}. Set a larger evaluation.scale, or leave these images out."
        ) from None


def predict_batch(
    model: Segmentor,
    data: Data,
    batch: dict,
    device: torch.device,
    settings: Evaluation,
    augment: bool = False,
) -> tuple[Tensor, Tensor]:
    """Predict a batch of the validation split, or an unlabeled one. Return what `classify` does."""
    if batch["image"][0, 0].numel() > settings.max_pixels:
        return predict_in_tiles(model, data, batch, device, settings, augment)
    image, label = data.prepare(batch, device)
    image = image.to(next(model.parameters()).dtype)
    logits = predict_logits(model, image, label.shape[1:], settings, augment)
    return classify(
        logits, label, model.align_corners, model.threshold, max_pixels=settings.max_pixels
    )


@dataclass(frozen=True)
class Tile:
    """What a tile covers along one axis: source pixels start..stop, output pixels first..last.

    weight: (last - first) of its logits. Where two tiles overlap, their weights sum to 1.
    next_first: where the next tile begins; the output is complete up to there.
    """

    start: int
    stop: int
    first: int
    last: int
    next_first: int
    weight: Tensor


def tiles_along(source: int, output: int, side: int, device: torch.device) -> list[Tile]:
    """Return tiles of at most `side` source pixels, a multiple of 64, along an axis.

    They begin at multiples of 32, a network's usual total stride, and at most two overlap.
    """
    overlap = max(32, side // 8 // 32 * 32)
    count = max(1, math.ceil((source - overlap) / (side - overlap)))
    step = max(32, math.ceil((source - overlap) / count / 32) * 32)
    starts = list(range(0, max(1, source - overlap), step))
    spans = []
    for start in starts:
        stop = min(start + step + overlap, source)
        spans.append((start, stop, round(start * output / source), round(stop * output / source)))
    tiles = []
    for number, (start, stop, first, last) in enumerate(spans):
        weight = torch.ones(last - first, device=device)
        next_first = last
        if number > 0:
            shared = spans[number - 1][3] - first
            weight[:shared] = ramp(shared, device)
        if number + 1 < len(spans):
            next_first = spans[number + 1][2]
            weight[next_first - first :] = ramp(last - next_first, device).flip(0)
        tiles.append(Tile(start, stop, first, last, next_first, weight))
    return tiles


def ramp(count: int, device: torch.device) -> Tensor:
    """Return weights from 0 to 1 that add up to 1 with their mirror image.

    The quarter next to a tile's border, which lacks context, has no weight.
    """
    position = (torch.arange(count, device=device) + 0.5) / count
    return (2 * position - 0.5).clamp(0, 1)


def blend(
    rows: list[Tile], columns: list[Tile], logits_of: Callable
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows, columns and blended logits of parts that make up the whole output.

    logits_of: (row, column) -> the logits (N, classes, h, w) of a tile. Only the parts that
        later tiles overlap are kept in memory.
    """
    below = []  # for each column, what the row above adds to this row
    for row in rows:
        next_below = []
        right = None  # what the tile to the left adds to this one
        for index, column in enumerate(columns):
            logits = logits_of(row, column) * row.weight[:, None] * column.weight
            if right is not None:
                logits[:, :, :, : right.size(3)] += right
            width = column.next_first - column.first
            right = logits[:, :, :, width:].clone()
            logits = logits[:, :, :, :width]
            if below:
                logits[:, :, : below[index].size(2)] += below[index]
            height = row.next_first - row.first
            next_below.append(logits[:, :, height:].clone())
            yield (
                slice(row.first, row.next_first),
                slice(column.first, column.next_first),
                logits[:, :, :height],
            )
        below = next_below


def predict_in_tiles(
    model: Segmentor,
    data: Data,
    batch: dict,
    device: torch.device,
    settings: Evaluation,
    augment: bool,
) -> tuple[Tensor, Tensor]:
    """Predict as `predict_batch` does, in overlapping tiles, whose logits are blended."""
    image = batch["image"]  # (N, C, h, w), on the host
    label = batch["label"]  # (N, H, W)
    dtype = next(model.parameters()).dtype
    side = max(64, math.isqrt(settings.max_pixels) // 128 * 64)

    def logits_of(row: Tile, column: Tile) -> Tensor:
        tile = {
            "image": image[:, :, row.start : row.stop, column.start : column.stop],
            "label": label[:, row.first : row.last, column.first : column.last],
        }
        pixels, _ = data.prepare(tile, device)
        size = tile["label"].shape[1:]
        logits = predict_logits(model, pixels.to(dtype), size, settings, augment)
        return upsample(logits.float(), size, model.align_corners)

    tile_rows = tiles_along(image.size(2), label.size(1), side, device)
    tile_columns = tiles_along(image.size(3), label.size(2), side, device)
    classes = torch.empty(label.shape, dtype=torch.uint8, device=device)
    loss = 0.0
    for rows, columns, logits in blend(tile_rows, tile_columns, logits_of):
        classes[:, rows, columns], loss_sum = classify(
            logits, label[:, rows, columns].to(device), model.align_corners, model.threshold
        )
        loss = loss + loss_sum
    return classes, loss


def draw_preview(
    path: Path,
    image_iou: list[float],
    model: Segmentor,
    data: Data,
    device: torch.device,
    settings: Evaluation,
) -> None:
    """Draw two images that are always the same, to see progress, and the two with the lowest IoU.

    One process predicts them again. So no pictures are sent between processes, and the preview does
    not depend on their number.
    """
    fixed = [0, len(image_iou) // 2]
    others = [i for i in range(len(image_iou)) if i not in fixed]
    worst = sorted(others, key=image_iou.__getitem__)[:2]
    indices = list(dict.fromkeys(fixed + worst))
    rows = []
    for batch in data.val_samples(indices, settings.scale):
        index = batch["index"].item()
        prediction, _ = predict_batch(model, data, batch, device, settings)
        kind = "lowest IoU" if index in worst else "fixed"
        title = f"{kind}: {Path(data.val.name(index)).name}"
        maps = {
            "truth (striped: ignored)": batch["label"][0],
            f"prediction, mIoU {100 * image_iou[index]:.1f}": prediction[0],
        }
        rows.append(preview_row(title, batch["image"][0], maps, data.palette))
    write_preview(path, rows, data.classes, data.palette)


@torch.inference_mode()
def evaluate(
    model: Segmentor,
    data: Data,
    device: torch.device,
    settings: Evaluation = Evaluation(),
    autocast: Callable = contextlib.nullcontext,
    augment: bool = False,
    preview: Path | None = None,
    show_dir: Path | None = None,
    interrupted: Callable = lambda: False,
) -> dict | None:
    """Score the model on the validation split at the labels' own size.

    Validation while training and --eval-only both run this. Each image counts once whatever the
    number of processes. Returns what `compute_metrics` does, with `loss`, the mean cross entropy
    over valid pixels, and `confusion`; None if `interrupted()` is true on any process.

    augment: average over several scales and mirror images.
    preview: where to write a PNG of two fixed images and the two with the lowest IoU.
    show_dir: where to write a PNG of each prediction.
    """
    num_classes = len(data.classes)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    is_interrupted = torch.zeros((), device=device)
    scored = []  # of each batch the images' numbers (n), the loss () and the mean IoU (n)
    rank = dist_utils.rank()
    batch_size = settings.batch_size if settings.mode == "whole" else 1
    batches = data.val_batches(rank, dist_utils.world_size(), settings.scale, batch_size)
    # One autocast around all batches keeps the weights that it has cast.
    with evaluation_mode(model), autocast():
        for batch in tqdm(batches, "evaluate", leave=False, disable=is_quiet()):
            if interrupted():
                is_interrupted += 1
                break
            batch["label"] = batch["label"].to(device, non_blocking=True)
            with explain_small_images(model, data, batch, data.val.name):
                prediction, loss_sum = predict_batch(model, data, batch, device, settings, augment)
            loss += loss_sum
            counts = count_pixels(batch["label"], prediction, num_classes)
            confusion += counts.sum(0)
            # A copy, as the batch lies in memory that it shares with a worker.
            scored.append((batch["index"].clone(), loss_sum, mean_iou(counts)))
            if show_dir:
                write_val_predictions(show_dir, batch, prediction, data)
        if dist_utils.all_reduce(is_interrupted):
            return None
        dist_utils.all_reduce(confusion)
        dist_utils.all_reduce(loss)
        if not loss.isfinite():
            raise not_finite_output(scored, data, device)
        if preview:
            image_iou = gather_iou(scored, len(data.val), device)
            if rank == 0:
                draw_preview(preview, image_iou, model, data, device, settings)
    confusion = confusion.view(num_classes, num_classes)
    mean_loss = (loss / confusion.sum().clamp(min=1)).item()
    return compute_metrics(confusion) | {"loss": mean_loss, "confusion": confusion.tolist()}


# ------------------------------------------------------------------------------ Prediction, export


class Predictor:
    """Predicts classes as the evaluation does. `load_predictor` makes one from a checkpoint.

    classes: the names of the classes. palette: [red, green, blue] for each.
    """

    def __init__(
        self,
        checkpoint: dict,
        config: Config,
        device: torch.device,
        augment: bool = False,
    ):
        self.device = device
        self.settings = config.evaluation
        self.augment = augment
        self.deterministic = config.deterministic
        # Without drawing from the caller's random numbers or following their default device.
        with switches_restored(), torch.random.fork_rng([]), torch.device("cpu"):
            self.precision, self.autocast = choose_arithmetic(config, device)
            dtype, _ = PRECISIONS[self.precision]
            model = models.build_model(config.model)
            models.load_weights(model, checkpoint, complete=True)
            model.eval()  # once for all: threads may share the network
            self.model = model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
            self.data = Data(**config.data, seed=config.seed).to(device)
        self.fits = True  # the mean and std, as far as is known
        self.classes, self.palette = classes_of(checkpoint, self.data)
        if len(self.classes) != model.num_classes:
            raise ConfigError(
                f"the network has {model.num_classes} classes, but {len(self.classes)} have names: "
                f"{', '.join(self.classes[:8])}... They must agree."
            )

    def __call__(self, image: Image.Image | np.ndarray | Tensor | str | Path) -> np.ndarray:
        """Predict one image: (H, W) uint8, the classes at the image's own size.

        image: a file, which is read as training reads it; a PIL image; or an array or tensor
            (H, W, C) or (H, W), RGB and in the units of the training files.
        Raises UserError.
        """
        pixels = self.pixels(image)
        if self.fits:  # one warning is enough
            self.fits = self.data.fits_normalization({"this one": moments_of(pixels)})
        with torch.device("cpu"):  # whatever torch.set_default_device() says
            return self.predict_batch(unlabeled_batch(pixels, self.settings.scale))

    def pixels(self, image: Image.Image | np.ndarray | Tensor | str | Path) -> np.ndarray:
        """Return an image of any kind as (H, W, channels). Raise DataError."""
        channels = self.data.in_channels
        if isinstance(image, (str, Path)):
            path = os.path.expanduser(image)
            if not os.path.isfile(path):
                raise DataError(f"{path}: there is no such file")
            with images_of_any_size():
                return read_image(path, channels)
        has_alpha = False
        if isinstance(image, Image.Image):
            has_alpha = image.mode in ("LA", "RGBA")
            try:
                pixels = pixels_of(ImageOps.exif_transpose(image))
            except (OSError, ValueError) as error:  # truncated, closed, or of a rare mode
                raise DataError(f"the image cannot be decoded: {error}") from None
        else:
            if isinstance(image, Tensor):
                image = image.detach().cpu()
            pixels = as_array(image)
        if pixels.dtype.kind not in "buif" or pixels.ndim not in (2, 3) or pixels.size == 0:
            raise DataError(
                f"the image is {type(image).__name__} of shape {pixels.shape} and type "
                f"{pixels.dtype}; expected a path, a PIL image, or numbers (H, W, C)"
            )
        return with_channels(pixels, channels, "the image", has_alpha)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Compute in the config's precision, whatever another network or the caller has set."""
        with switches_restored(), self.autocast():
            set_up_arithmetic(self.precision, self.deterministic)
            yield

    @torch.inference_mode()
    def predict_batch(self, batch: dict, name: str = "the image") -> np.ndarray:
        """Predict a batch of one image: (H, W) uint8. Error messages call the image `name`."""
        while True:
            try:
                with (
                    self.arithmetic(),
                    evaluation_mode(self.model),
                    explain_small_images(self.model, self.data, batch, lambda index: name),
                ):
                    classes, loss = predict_batch(
                        self.model, self.data, batch, self.device, self.settings, self.augment
                    )
                break
            except torch.OutOfMemoryError:
                # Tiles have about a quarter of max_pixels.
                max_pixels = min(self.settings.max_pixels, batch["image"][0, 0].numel()) // 4
                if max_pixels < 256**2:
                    raise
                self.settings = replace(self.settings, max_pixels=max_pixels)
                write_line(f"GPU memory is too small: evaluation.max_pixels={max_pixels} from now")
        if not loss.isfinite():  # it is 0 without labels, unless a logit is not finite
            raise UserError(f"{name}: the network's output is not finite")
        return classes[0].byte().cpu().numpy()


def load_predictor(checkpoint: str | Path, device: str | torch.device | None = None) -> Predictor:
    """Return the network of a checkpoint, to be called with images; see `Predictor`.

    Leaves torch's global switches and random numbers as they are.

    device: by default the GPU if there is one.
    Raises CheckpointError or ConfigError.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    content = load_checkpoint(checkpoint)
    return Predictor(content, config_of(content, checkpoint), torch.device(device))


def config_of(checkpoint: dict, path: str | Path, options: Sequence[str] = ()) -> Config:
    """Return the config in a checkpoint, whose folder is the work_dir, with options applied."""
    if not isinstance(checkpoint.get("config"), dict):
        raise CheckpointError(
            f"{path} holds no config, as it was not written by train.py: name one with --config"
        )
    folder = Path(path).parent  # where it is now
    config = copy.deepcopy(checkpoint["config"]) | {"work_dir": str(folder)}
    return make_config(config, options, folder.name)


def classes_of(checkpoint: dict, data: Data) -> tuple[list[str], list[list[int]]]:
    """Return the classes' names and colors, of the checkpoint or else of the config's data set."""
    found = data_set_meta(checkpoint)
    classes = found.get("classes") or []
    palette = found.get("palette") or []
    if classes and len(palette) == len(classes):
        return list(classes), [list(color) for color in palette]
    return data.classes, data.palette


def predict_files(predict: Predictor, paths: list[str], show_dir: Path) -> None:
    """Predict image files and those in folders, and write labels and overlays below show_dir.

    Each process takes its share of the files. Raises UserError at the end if some of them could
    not be read or written.
    """
    path_of = find_images(paths)
    name_of = {path: name for name, path in path_of.items()}
    for name in path_of:
        for path in output_paths(show_dir, name):
            if os.path.abspath(path) in name_of:
                raise ConfigError(
                    f"--show-dir {show_dir}: {path} is one of the images to predict, perhaps from "
                    "an earlier call; name a folder outside of theirs"
                )
    mine = list(name_of)[dist_utils.rank() :: dist_utils.world_size()]
    settings = predict.settings
    batches = predict.data.unlabeled_batches(mine, settings.scale, settings.max_pixels)
    failed = 0
    pixels = 0
    began = time.perf_counter()
    # One autocast around all images keeps the weights that it has cast.
    with predict.autocast():
        for path, batch in tqdm(batches, "predict", len(mine), disable=is_quiet()):
            try:
                pixels += predict_file(predict, path, batch, show_dir, name_of[path])
            except UserError as error:
                failed += 1
                tqdm.write(str(error), file=sys.stderr)
    seconds = time.perf_counter() - began
    counts = torch.tensor([failed, pixels], dtype=torch.float64, device=predict.device)
    failed, pixels = dist_utils.all_reduce(counts).tolist()
    count = len(path_of) - int(failed)
    if dist_utils.rank() == 0:
        print(
            f"predicted {count} images in {seconds:.1f} s: {count / seconds:.2f} images/s, "
            f"{pixels / 1e6 / seconds:.1f} megapixels/s; classes in {show_dir / 'labels'}, "
            f"overlays in {show_dir / 'overlays'}"
        )
    if failed:
        raise UserError(f"{int(failed)} of {len(path_of)} images failed; they are named above")


def predict_file(
    predict: Predictor, path: str, batch: dict | DataError, show_dir: Path, name: str
) -> int:
    """Predict an image file that was read, and write the result. Return its number of pixels.

    Raises UserError if the file could not be read, predicted or written.
    """
    if isinstance(batch, DataError):
        raise batch
    try:
        classes = predict.predict_batch(batch, path)
        write_prediction(show_dir, name, batch["image"][0], classes, predict)
    except OSError as error:
        raise UserError(f"{path} could not be written below {show_dir}: {error}") from None
    return classes.size


def output_paths(show_dir: Path, name: str) -> tuple[Path, Path]:
    """Return where the label and the overlay of an image are written."""
    return show_dir / "labels" / f"{name}.png", show_dir / "overlays" / f"{name}.jpg"


def write_prediction(
    show_dir: Path, name: str, image: Tensor, classes: np.ndarray, predict: Predictor
) -> None:
    """Write the classes (H, W) as a PNG with a palette, and over the image (C, h, w) as a JPEG."""
    label_path, overlay_path = output_paths(show_dir, name)
    label = palette_image(torch.from_numpy(classes), predict.palette)
    sheet = overlay(image, label, predict.classes, predict.palette)
    for path in (label_path, overlay_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(label_path, lambda file: label.save(file, "png"))
    atomic_write(overlay_path, lambda file: sheet.save(file, "jpeg"))


def overlay(
    image: Tensor, label: Image.Image, classes: Sequence[str], palette: Sequence
) -> Image.Image:
    """Draw the image (C, h, w) under the colors of its label, at most 2048 pixels wide and high.

    A legend names the classes that occur, with their share of the pixels.
    """
    factor = min(1.0, 2048 / max(label.size))
    size = [max(1, round(side * factor)) for side in label.size]
    picture = paint(as_rgb(image).resize(size), label, palette)
    shares = np.array(label.histogram()) / (label.width * label.height)
    found = np.flatnonzero(shares[: len(classes)])
    names = [f"{classes[index]} {100 * shares[index]:.1f} %" for index in found]
    return with_legend(picture, names, [palette[index] for index in found])


EXPORT_CHECKS = ((256, 320), (225, 353))  # sizes at which an exported network is tried


class ExportedNetwork(nn.Module):
    """Images (N, C, H, W), as the files hold them -> classes (N, H, W) uint8.

    Normalization is inside. The image is predicted as a whole, at its own scale.
    """

    def __init__(self, model: Segmentor, mean: Tensor, std: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, image: Tensor) -> Tensor:
        logits = self.model.class_logits((image.float() - self.mean) / self.std)
        logits = upsample(logits, image.shape[2:], self.model.align_corners)
        if self.model.threshold != 0.5:
            return (logits[:, 1] - logits[:, 0] > log_odds(self.model.threshold)).byte()
        return logits.argmax(1).byte()


def export(predict: Predictor, path: Path) -> list[str]:
    """Write the network as ONNX (.onnx) or by torch.export (.pt2), and check the file.

    predict: on the CPU. Returns lines for the user.
    """
    data = predict.data
    network = ExportedNetwork(predict.model, data.mean, data.std).float().eval()
    network = network.to(memory_format=torch.contiguous_format)
    # A larger mean or std belongs to images of more than 8 bits.
    is_8_bit = max(data.mean.max(), data.std.max()) <= 255
    dtype = torch.uint8 if is_8_bit else torch.float32
    program, batch_size = trace(network, data.in_channels, dtype)
    content = to_onnx(program) if path.suffix == ".onnx" else to_pt2(program)
    try:
        atomic_write(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"--export {path} cannot be written: {error}") from None
    lines = [f"wrote {path}: image ({batch_size}, {data.in_channels}, H, W) {dtype} -> classes"]
    lines += check_exported(network, path, data.in_channels, dtype)
    if predict.settings.scale or predict.settings.mode == "slide":
        lines.append(
            f"note: the file predicts a whole image at its own scale. The evaluation has mode "
            f"{predict.settings.mode}, scale {predict.settings.scale}: resize images, and cut them "
            "into windows, before the exported network in the same way"
        )
    return lines


def trace(
    network: ExportedNetwork, channels: int, dtype: torch.dtype
) -> tuple[torch.export.ExportedProgram, str]:
    """Return the traced network and the batch size that it takes, "N" or "1"."""
    from torch.fx.experimental import _config
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dynamic = torch.export.Dim.DYNAMIC
    attempts = [
        ("N", 2, {0: dynamic, 2: dynamic, 3: dynamic}),
        ("1", 1, {2: dynamic, 3: dynamic}),
    ]
    for batch_size, count, shapes in attempts:
        image = sample_image(count, channels, 256, 320, dtype)
        try:
            with (
                torch.no_grad(),
                # Sizes of 1 are no special cases, and fused attention fixes the batch size.
                _config.patch(backed_size_oblivious=True),
                sdpa_kernel(SDPBackend.MATH),
                integer_padding(),
            ):
                program = torch.export.export(network, (image,), dynamic_shapes=(shapes,))
                # torch 2.11 adds a condition on the size wherever a network pools, without need.
                guards = getattr(program, "_guards_code", [])
                program._guards_code = [text for text in guards if not text.endswith("% 2) != 0")]
                for height, width in EXPORT_CHECKS:
                    program.module()(sample_image(1, channels, height, width, dtype))
            return program, batch_size
        except Exception as error:  # torch.export raises many kinds
            failure = error
    raise ConfigError(
        "this network cannot be exported for images of any size, because an operation in it "
        "depends on the size, or an if or assert depends on values, in a way that torch.export "
        f"cannot express: {failure}"
    ) from failure


@contextlib.contextmanager
def integer_padding() -> Iterator[None]:
    """Let timm compute TensorFlow's "same" padding in a way that torch.export can simplify.

    With timm's own, in which the size occurs several times in a maximum, the terms for the sizes
    of an EfficientNet's maps grow exponentially, and the export takes minutes.
    """
    padding = sys.modules.get("timm.layers.padding")
    if padding is None:
        yield
        return
    with unittest.mock.patch.object(padding, "get_same_padding", same_padding):
        yield


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Return how many pixels make a convolution's output ceil(size / stride) pixels long."""
    extent = (kernel_size - 1) * dilation + 1
    padding = (size - 1) // stride * stride + extent - size
    return padding if extent >= stride else max(padding, 0)


def sample_image(count: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return a smooth random image (N, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, channels, 9, 9, generator=generator)
    return (255 * upsample(noise, (height, width), align_corners=True)).to(dtype)


def to_onnx(program: torch.export.ExportedProgram) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--export to ONNX needs the package {error.name}: pip install onnx onnxscript"
        ) from None
    try:
        converted = torch.onnx.export(
            program, dynamo=True, input_names=["image"], output_names=["classes"], verbose=False
        )
        return converted.model_proto.SerializeToString()
    except Exception as error:  # the converter raises many kinds
        raise ConfigError(
            f"this network cannot be converted to ONNX: {error}\nExport it as a .pt2 file instead"
        ) from error


def to_pt2(program: torch.export.ExportedProgram) -> bytes:
    replace_ceil(program.graph)
    file = io.BytesIO()
    try:
        torch.export.save(program, file)
    except Exception as error:  # the serializer raises many kinds
        raise ConfigError(
            f"torch.export cannot save this network: {error}\nExport it as an .onnx file instead"
        ) from error
    return file.getvalue()


def replace_ceil(graph: torch.fx.Graph) -> None:
    """Write ceil(a / b) as -(-a // b), because torch.export.save lacks ceil of sizes.

    Padding as in TensorFlow is often computed with it.
    """
    for node in graph.find_nodes(op="call_function", target=math.ceil):
        division = node.args[0]
        if division.target is not operator.truediv:
            continue
        numerator, denominator = division.args
        with graph.inserting_before(node):
            negative = graph.call_function(operator.neg, (numerator,))
            quotient = graph.call_function(operator.floordiv, (negative, denominator))
        negative.meta["val"] = -numerator.meta["val"]
        quotient.meta["val"] = negative.meta["val"] // denominator
        node.target = operator.neg
        node.args = (quotient,)
    graph.eliminate_dead_code()


def check_exported(
    network: ExportedNetwork, path: Path, channels: int, dtype: torch.dtype
) -> list[str]:
    """Compare the file with the network at two sizes. Raise UserError if they disagree."""
    if path.suffix == ".pt2":
        exported = torch.export.load(path).module()
    else:
        try:
            import onnxruntime
        except ImportError:
            return ["not checked: pip install onnxruntime, and export again to compare the two"]
        session = onnxruntime.InferenceSession(path)

        def exported(image: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    lines = []
    for height, width in EXPORT_CHECKS:
        image = sample_image(1, channels, height, width, dtype)
        with torch.inference_mode():
            differ = (exported(image) != network(image)).sum().item()
        lines.append(f"checked at {height} x {width}: {differ} of {height * width} pixels differ")
        if differ > 0.01 * height * width:
            raise UserError(f"{path} is not what the network computes: {lines[-1]}")
    return lines


# ------------------------------------------------------------------------------- One training step


PRECISIONS = {  # the type of the weights, and that of autocast or None
    "fp64": (torch.float64, None),
    "fp32": (torch.float32, None),
    "tf32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
    "fp16": (torch.float32, torch.float16),
}


def choose_precision(name: str, device: torch.device) -> str:
    """Return a key of PRECISIONS: `name`, or what "auto" stands for on a device.

    That is bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


def set_up_arithmetic(precision: str, deterministic: bool) -> None:
    """Set torch's global switches. TF32 shortens the mantissa of float32 in GPU kernels."""
    if precision in ("fp32", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:  # cuBLAS reads this when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode would also fill every new tensor, which is only of use for debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextlib.contextmanager
def switches_restored() -> Iterator[None]:
    """Give torch's global switches back as they were; see set_up_arithmetic()."""
    cudnn = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    cpu_matmul = torch.backends.mkldnn.matmul
    parts = (matmul, cpu_matmul, cudnn.conv, cudnn.rnn)
    precisions = {part: part.fp32_precision for part in parts}
    name = "high" if matmul.fp32_precision == "tf32" else "highest"
    with contextlib.suppress(RuntimeError):  # where the caller has set fp32_precision alone
        name = torch.get_float32_matmul_precision()
    was_tuning = cudnn.benchmark
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filled_memory = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        # Both of torch's ways to set it: where they disagree, asking is an error.
        torch.set_float32_matmul_precision(name)
        cudnn.allow_tf32 = precisions[cudnn.conv] == "tf32"
        for part, precision in precisions.items():
            part.fp32_precision = precision
        cudnn.benchmark = was_tuning
        torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = filled_memory


def choose_arithmetic(config: Config, device: torch.device) -> tuple[str, Callable]:
    """Set torch up for a config's precision. Return that and autocast."""
    precision = choose_precision(config.precision, device)
    set_up_arithmetic(precision, config.deterministic)
    _, low_precision = PRECISIONS[precision]
    autocast = functools.partial(
        torch.autocast, device.type, low_precision, enabled=low_precision is not None
    )
    return precision, autocast


def step_seed(seed: int, iteration: int, rank: int) -> int:
    """Return the seed of one process's random numbers, such as dropout, in one iteration."""
    sequence = np.random.SeedSequence((seed, iteration, rank))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class StepTimer:
    """Seconds per iteration and seconds of it spent waiting for data, averaged since `reset`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.began = time.perf_counter()
        self.steps = 0
        self.data_wait = 0.0

    def tick(self) -> None:
        """Count one iteration."""
        self.steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep the time spent inside, as for validating and saving, out of the iterations."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.data_wait += time.perf_counter() - began

    def averages(self) -> tuple[float, float]:
        return (time.perf_counter() - self.began) / self.steps, self.data_wait / self.steps


def warm_up(
    state: TrainState, net: nn.Module, data: Data, autocast: Callable, run_dir: RunDir
) -> None:
    """Run one forward and backward pass that leaves no trace, if there are several processes.

    DDP's first backward pass reduces gradients in buckets that follow the order of the parameters.
    All later ones use buckets in the order in which the gradients of the first pass arrived. The
    order of a sum decides how it is rounded, so without this pass the first iteration of a resumed
    run would differ from the same iteration of the uninterrupted run.
    """
    world_size = dist_utils.world_size()
    if world_size == 1:
        return
    parameter = next(state.model.parameters())
    buffers = [buffer.clone() for buffer in state.model.buffers()]
    batch_size = data.batch_size // (world_size * data.accumulate)
    size = data.sampling["crop_size"]
    image = parameter.new_zeros(batch_size, data.in_channels, *size)
    label = torch.zeros(batch_size, *size, dtype=torch.uint8, device=parameter.device)
    normalizers = state.model.normalizers([label])
    with autocast():
        losses = net(image.contiguous(memory_format=torch.channels_last), label, normalizers)
    sum(losses.values()).backward()
    check_gradients(state.model, run_dir)
    state.model.zero_grad(set_to_none=True)
    for buffer, saved in zip(state.model.buffers(), buffers):
        buffer.copy_(saved)


def forward_backward(
    state: TrainState,
    net: nn.Module,
    micro_batches: list[dict],
    data: Data,
    autocast: Callable,
    stopping: bool,
    timeout: float,
) -> tuple[dict[str, float], bool]:
    """Compute the gradient of one step over its micro-batches.

    Returns the losses averaged over all processes, and whether any process was told to stop.
    """
    parameter = next(state.model.parameters())
    device = parameter.device
    count = len(micro_batches)
    labels = [batch["label"].to(device, non_blocking=True) for batch in micro_batches]
    normalizers = state.model.normalizers(labels)
    values = 0.0
    for number, batch in enumerate(micro_batches, start=1):
        image, label = data.prepare(batch, device)
        # DDP averages the gradients of all micro-batches once, with the last one.
        is_synchronized = number == count or dist_utils.world_size() == 1
        with contextlib.nullcontext() if is_synchronized else net.no_sync():
            with autocast():
                losses = net(image.to(parameter.dtype), label, normalizers)
            detached = [loss.detach().double() for loss in losses.values()]
            values = values + torch.stack(detached) / count
            if number == count:
                # The host later waits for this mean alone, while the device runs backward.
                flag = torch.full((1,), float(stopping), dtype=values.dtype, device=device)
                mean = dist_utils.AsyncMean(torch.cat([values, flag]), timeout)
            state.scaler.scale(sum(losses.values()) / count).backward()
    *means, stopping = mean.result()
    averaged = dict(zip(losses, means)) | {"loss": sum(means)}
    return averaged, stopping > 0


def optimizer_step(state: TrainState, clip_grad: float | None) -> None:
    """Clip the gradient, update the weights and clear the gradient."""
    if clip_grad:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_ema(state: TrainState, decay: float | None) -> None:
    """Update the average, if there is one: average = decay * average + (1 - decay) * weights.

    With N updates done, the decay is at most N / (N + 1), which makes the average a plain mean at
    first (Mean Teacher, arXiv:1703.01780). Batch norm's statistics are averaged like the weights,
    integers are copied. An iteration whose update was skipped (fp16) counts like any other.
    """
    if state.ema is None:
        return
    decay = min(decay, 1 - 1 / (state.iteration + 1))
    averages = []
    weights = []
    average_tensors = itertools.chain(state.ema.parameters(), state.ema.buffers())
    weight_tensors = itertools.chain(state.model.parameters(), state.model.buffers())
    for average, weight in zip(average_tensors, weight_tensors, strict=True):
        if weight.is_floating_point():
            averages.append(average)
            weights.append(weight)
        else:
            average.copy_(weight)
    torch._foreach_lerp_(averages, weights, 1 - decay)


def check_gradients(model: nn.Module, run_dir: RunDir) -> None:
    """Name the parameters that no loss depends on, after the first backward pass.

    With several processes this is an error: DDP would fail at the next step without a name.
    """
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if not unused:
        return
    message = (
        f"no loss depends on {len(unused)} parameters: {', '.join(unused[:8])}. "
        "Take them out of the network, or name them or their modules in model.freeze."
    )
    if dist_utils.world_size() > 1:
        raise ConfigError(f"{message} Several processes cannot average their gradients.")
    run_dir.log(message)


def stop_on_non_finite(
    state: TrainState, losses: dict, is_first: bool, config: Config, data: Data, run_dir: RunDir
) -> None:
    """Save a checkpoint that replays the iteration, and raise UserError.

    is_first: whether the run has not updated the weights yet, so that it cannot have broken them.
    """
    iteration = state.iteration
    replay = run_dir.path / f"not_finite_iter_{iteration}.pth"
    run_dir.save(checkpoint_content(state, config, data), [replay.name])
    # The launcher ends all ranks when the first one exits, so wait until rank 0 has written.
    dist_utils.barrier()

    weights = "The weights were not updated"
    culprit = iteration  # the iteration whose batch is to blame
    broken = not_finite({name: p.data for name, p in state.model.named_parameters()})
    if broken and not is_first:
        culprit = iteration - 1
        weights = f"The update of iteration {culprit} broke the weights ({broken[0]}, ...)"
    indices = range(culprit * data.batch_size, (culprit + 1) * data.batch_size)
    files = [f"  {index} {name}" for index, name in zip(indices, data.sample_files(indices))]
    launcher = "python"
    if dist_utils.world_size() > 1:
        launcher = f"torchrun --standalone --nproc_per_node={dist_utils.world_size()}"
    values = ", ".join(f"{name} {value}" for name, value in losses.items())
    raise UserError(
        f"the loss of iteration {iteration} (counted from 0) is not finite: {values}. {weights}. "
        f"Sample numbers and files of the batch of iteration {culprit}:\n"
        + "\n".join(files)
        + f"\nTo repeat iteration {iteration}: {launcher} train.py "
        f"--config {run_dir.path / 'config.json'} --work-dir {run_dir.path / 'replay'} "
        f"--resume-from {replay}\n"
        "Lower the learning rate, set clip_grad=1, or precision=fp32, and go on from the last "
        "checkpoint with --resume-from auto."
    )


# ------------------------------------------------------------------------------------------ The run


def validate(
    state: TrainState,
    data: Data,
    autocast: Callable,
    args: argparse.Namespace,
    config: Config,
    run_dir: RunDir,
    interrupted: Callable = lambda: False,
) -> bool | None:
    """Evaluate and log. Return whether this is the best mIoU so far; None if interrupted."""
    # In the folder of a training run, an evaluation must not look like one of its validations.
    mode = "test" if args.eval_only and run_dir.holds_training() else "val"
    preview = None
    if not args.eval_only:
        preview = run_dir.path / "preview" / f"iter_{state.iteration}.png"
    began = time.perf_counter()
    try:
        metrics = evaluate(
            state.model if state.ema is None else state.ema,
            data,
            next(state.model.parameters()).device,
            config.evaluation,
            autocast,
            augment=args.aug_test,
            preview=preview,
            show_dir=Path(args.show_dir) if args.show_dir else None,
            interrupted=interrupted,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is too small for the evaluation: {error}\n"
            "Set evaluation.mode=slide with a smaller evaluation.crop_size, "
            "evaluation.batch_size=1 or a smaller evaluation.scale."
        ) from None
    if metrics is None:
        return None
    seconds = time.perf_counter() - began
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    loss = numbers.pop("loss")
    means = [f"{name} {100 * value:.2f}" for name, value in numbers.items()]
    run_dir.log(
        f"validation at iteration {state.iteration}: {len(data.val)} images in {seconds:.1f} s\n"
        f"{table(metrics, data.classes)}\n{', '.join(means)}, loss {loss:.4f}"
    )
    run_dir.metrics(mode, state.iteration, metrics)
    if preview:
        run_dir.draw(state.iteration, metrics, data.classes, preview)
    return state.record_score(metrics["mIoU"])


def is_due(state: TrainState, max_iters: int, interval: int) -> bool:
    """Return whether to do what is done every `interval` iterations and after the last one."""
    return state.iteration % interval == 0 or state.iteration == max_iters


def is_finished(state: TrainState, config: Config) -> bool:
    """Return whether the run is at its last iteration, or out of evaluation.patience."""
    is_last = state.iteration >= config.schedule["max_iters"]
    patience = config.evaluation.patience
    is_early = patience is not None and state.validations_since_best >= patience
    return state.validated and (is_last or is_early)


def checkpoint_content(state: TrainState, config: Config, data: Data) -> dict:
    """Return a checkpoint's content: plain types and tensors."""
    return state.state_dict() | {
        "config": asdict(config),
        "classes": list(data.classes),
        "palette": [[int(value) for value in color] for color in data.palette],
        "versions": versions(),
        "images": data.checksum_of_train,
    }


def save(state: TrainState, config: Config, data: Data, run_dir: RunDir, names: list[str]) -> None:
    """Save a checkpoint under all of `names`. Raise UserError if the state is not finite."""
    content = checkpoint_content(state, config, data)
    bad_keys = not_finite({key: content.get(key) for key in ("state_dict", "optimizer", "ema")})
    if bad_keys:
        raise UserError(
            f"after iteration {state.iteration} there are values that are not finite in "
            f"{', '.join(bad_keys[:5])}: no checkpoint was written, the last one stands. "
            "Lower the learning rate, or set clip_grad, or precision=fp32."
        )
    run_dir.save(content, names)


def save_and_validate(
    state: TrainState,
    config: Config,
    save_as: Callable,
    score: Callable,
    save_is_due: bool,
    validation_is_due: bool,
) -> None:
    """Save a checkpoint and validate, whichever is due.

    save_as(names) saves a checkpoint; score() returns what validate() returns.

    The checkpoint comes first, because the validation may fail, and is saved again with the score.
    Where none was due, one is saved if the validation fails, so that a resumed run makes up for it,
    and at the end of the run.
    """
    names = [f"iter_{state.iteration}.pth", "latest.pth"]
    state.validated = not validation_is_due
    if save_is_due:
        save_as(names)
    if not validation_is_due:
        return
    is_best = None  # as it stays if the validation fails or a signal interrupts it
    try:
        is_best = score()
    finally:
        state.validated = is_best is not None
        best = ["best.pth"] if is_best else []
        has_new_score = save_is_due and state.validated
        lacks_validation = not save_is_due and not state.validated
        if has_new_score or lacks_validation or is_finished(state, config):
            save_as(names + best)
        elif best:
            save_as(best)


def report(
    state: TrainState,
    lr: float,
    losses: dict,
    timer: StepTimer,
    config: Config,
    data: Data,
    run_dir: RunDir,
) -> None:
    """Log one line to train.log and one to metrics.jsonl.

    Times are in seconds per iteration. Memory is the peak in MiB, of the GPU or else the process.
    """
    seconds, data_wait = timer.averages()
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    max_iters = config.schedule["max_iters"]
    line = (
        f"Iter [{state.iteration}/{max_iters}] lr: {lr:.3e}, "
        f"eta: {duration(seconds * (max_iters - state.iteration))}, time: {seconds:.3f}, "
        f"data_time: {data_wait:.3f}, memory: {memory:.0f}, "
    )
    line += ", ".join(f"{name}: {value:.4f}" for name, value in losses.items())
    if data_wait > 0.1 * seconds:
        share = 100 * data_wait / seconds
        # The workers deliver a batch every `seconds`; without the wait, a step would take less.
        enough = math.ceil(max(data.workers, 1) * seconds / (seconds - data_wait))
        line += f"; waiting for data {share:.0f} % of the time: "
        line += f"set data.workers={enough}, or data.cache to a folder on a local disk"
    run_dir.log(wrap_line(line))
    values = {"lr": lr, "time": seconds, "data_time": data_wait, "memory": memory}
    run_dir.metrics("train", state.iteration, values | losses)


def duration(seconds: float) -> str:
    hours, seconds = divmod(int(seconds), 3600)
    return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"


def wrap_line(text: str) -> str:
    """Fold a long text, so that lines of train.log with their time stay below 120 columns."""
    text = text.replace(": ", ":\N{NO-BREAK SPACE}")  # keeps a name beside its value
    lines = textwrap.wrap(text, 95, break_long_words=False, break_on_hyphens=False)
    return "\n    ".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def log_start(
    state: TrainState,
    notes: list[str],
    data: Data,
    args: argparse.Namespace,
    config: Config,
    run_dir: RunDir,
) -> None:
    """Log what runs on which data, where it starts and what is to come."""
    if dist_utils.rank() > 0:
        return
    model = state.model
    device = next(model.parameters()).device
    parts = [model.backbone, model.neck, model.decode_head, model.auxiliary_head]
    names = [type(part).__name__ for part in parts if part is not None]
    count = sum(parameter.numel() for parameter in model.parameters())
    network = f"network: {', '.join(names)}: {count / 1e6:.1f} M parameters"
    flops = count_flops(config)
    if flops:
        height, width = config.data["crop_size"]
        network += f", {flops / 1e9:.1f} GFLOPs for {height} x {width} pixels"
    sizes = []
    if not args.eval_only:
        sizes.append(f"{len(data.train)} images to train on")
    if args.eval_only or not args.no_validate:
        sizes.append(f"{len(data.val)} to evaluate on")
    decoder = "" if data.type == "synthetic" else f"; PNG files decoded by {decoder_name()}"
    world_size = dist_utils.world_size()
    share = data.batch_size // (world_size * data.accumulate)
    batch = f"batch: {data.batch_size} = {world_size} x {share} x {data.accumulate}"
    batch += " (processes x images x data.accumulate)"
    place = f"on {device.type}"
    if device.type == "cuda":
        place += f" ({torch.cuda.get_device_name(device)})"
    for line in (
        network,
        f"data: {data.type}, {', '.join(sizes)}; {len(data.classes)} classes{decoder}",
        f"{batch}, in {choose_precision(config.precision, device)} {place}",
        f"work_dir: {config.work_dir}",
    ):
        run_dir.log(wrap_line(line))
    run_dir.log(*notes)
    warned = batch_warnings(model, data) + setting_warnings(config, data, model)
    if not args.eval_only:
        warned += image_warnings(state, data)
    run_dir.log(*map(wrap_line, warned))
    if not args.eval_only:
        run_dir.log(remaining_work(state, args, config))


def count_flops(config: Config) -> int | None:
    """Count the multiplications and additions for one image; None if the network needs values."""
    from torch.utils.flop_counter import FlopCounterMode

    with contextlib.suppress(Exception), torch.device("meta"), torch.no_grad():
        model = models.build_on_meta(config.model).eval()
        channels = config.data.get("in_channels", 3)
        image = torch.zeros(1, channels, *config.data["crop_size"])
        with FlopCounterMode(display=False) as counter:
            model(image)
        return counter.get_total_flops()
    return None


def remaining_work(state: TrainState, args: argparse.Namespace, config: Config) -> str:
    max_iters = config.schedule["max_iters"]
    if is_finished(state, config):
        key = "evaluation.patience" if state.iteration < max_iters else "schedule.max_iters"
        return (
            f"this run is finished: it is at iteration {state.iteration} of {max_iters}. "
            f"To train on, raise {key}."
        )
    interval = config.evaluation.interval
    steps = max(0, max_iters - state.iteration)
    validations = math.ceil(max_iters / interval) - state.iteration // interval
    if not state.validated:
        validations += 1
    if args.no_validate:
        validations = 0
    return f"to come: iterations: {steps}, validations: {validations}"


def log_end(state: TrainState, config: Config, run_dir: RunDir) -> str:
    """Log the result and what to do with it. Return "done", or "stopped" by a signal.

    Raises CheckpointError if the last checkpoint could not be written.
    """
    max_iters = config.schedule["max_iters"]
    if not is_finished(state, config):
        run_dir.log(
            f"stopped by a signal after iteration {state.iteration} of {max_iters}; "
            "go on with --resume-from auto"
        )
        return "stopped"
    if run_dir.save_error:
        raise CheckpointError(f"the last {run_dir.save_error}")
    if state.iteration < max_iters:
        run_dir.log(
            f"finished early: the last {state.validations_since_best} validations brought no "
            "better mIoU (evaluation.patience)"
        )
    weights = run_dir.path / "latest.pth"
    if state.best:
        score = f"best mIoU {100 * state.best['mIoU']:.2f} at iteration {state.best['iteration']}"
        if (run_dir.path / "best.pth").exists():
            weights = run_dir.path / "best.pth"
        run_dir.log(f"{score}: {weights}")
    preview = run_dir.path / "preview" / f"iter_{state.iteration}.png"
    if preview.exists():
        run_dir.log(f"preview: {preview}")
    weights = shlex.quote(str(weights))
    run_dir.log(f"next: python train.py --load-from {weights} --predict IMAGES --show-dir DIR")
    return "done"


def build_network(
    config: Config, data: Data, device: torch.device, dtype: torch.dtype
) -> Segmentor:
    """Build the network with random weights. Raise ConfigError if its classes do not fit."""
    torch.manual_seed(config.seed)
    model = models.build_model(config.model)
    heads = model.named_heads(model.decode_head, "decode_head")
    heads += model.named_heads(model.auxiliary_head, "auxiliary_head")
    for name, head in heads:
        if head.num_classes != len(data.classes):
            raise ConfigError(
                f"model.{name}.num_classes is {head.num_classes}, but data set "
                f"{config.data['type']} has {len(data.classes)} classes: "
                f"{', '.join(data.classes[:8])}... They must agree."
            )
    return model.to(device=device, dtype=dtype, memory_format=torch.channels_last)


def build_state(config: Config, data: Data, device: torch.device, precision: str) -> TrainState:
    """Build network and optimizer before the first iteration, and the moving average if any."""
    dtype, low_precision = PRECISIONS[precision]
    model = build_network(config, data, device, dtype)
    optimizer = build_optimizer(model, **config.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=low_precision == torch.float16)
    ema = None
    if config.ema_decay is not None:
        ema = build_network(config, data, device, dtype).requires_grad_(False)
    return TrainState(model, optimizer, scaler, ema)


def batch_warnings(model: Segmentor, data: Data) -> list[str]:
    """Say which losses do not depend on the global batch alone."""
    parts = model.batch_dependent_parts()
    if not parts or dist_utils.world_size() * data.accumulate == 1:
        return []
    return [
        f"warning: {', '.join(parts)} takes the images of one forward pass together, so "
        "the number of processes and data.accumulate change the experiment"
    ]


def image_warnings(state: TrainState, data: Data) -> list[str]:
    """Say how the training images differ from those of the checkpoint that is resumed."""
    changes = differences(state.images, data.checksum_of_train) if state.images else []
    if not changes:
        return []
    return [
        "warning: the training images are not those of the checkpoint, so the samples that follow "
        f"are others than without the interruption ({'; '.join(changes)})"
    ]


def setting_warnings(config: Config, data: Data, model: Segmentor) -> list[str]:
    """Say which settings are valid, but probably not intended."""
    found = []
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if data.workers > max(cores, 1):
        found.append(
            f"warning: data.workers is {data.workers}, but there are {cores} cores for each "
            "process: lower it, or leave it out"
        )
    warmup_iters = config.schedule.get("warmup_iters", 0)
    max_iters = config.schedule["max_iters"]
    if config.schedule.get("warmup") and warmup_iters > max_iters:
        found.append(
            f"warning: schedule.warmup_iters is {warmup_iters}, but max_iters {max_iters}: the "
            "learning rate never reaches optimizer.lr"
        )
    late = [
        milestone for milestone in config.schedule.get("milestones") or [] if milestone >= max_iters
    ]
    if late:
        found.append(
            f"warning: schedule.milestones {late} are never reached, as max_iters is {max_iters}"
        )
    names = [name for name, _ in model.named_parameters()]
    rules, _, _ = parse_paramwise(config.optimizer.get("paramwise") or {})
    for part in rules:
        if not any(part in name for name in names):
            found.append(
                f"warning: optimizer.paramwise.{part} changes nothing, as it is part of no "
                "parameter's name"
            )
    return found


def wrap(model: Segmentor, config: Config) -> nn.Module:
    """Return the network as the training step calls it: in DDP, compiled."""
    net = dist_utils.distribute(model)
    if config.compile:
        net = models.compiled(net)
    return net


def load_data(
    args: argparse.Namespace, config: Config, device: torch.device
) -> tuple[Data, list[str]]:
    """Return the data sets, checked before anything is written, and warnings for the log."""
    data = Data(**config.data, seed=config.seed).to(device)
    takes_one_image = data.batch_size == data.accumulate and dist_utils.world_size() == 1
    if takes_one_image and not args.eval_only:  # several processes would share their statistics
        check_network(config, batch_size=1)
    with warnings.catch_warnings(record=True) as caught:
        data.check(train=not args.eval_only, val=args.eval_only or not args.no_validate)
    notes = []
    for found in caught:
        if found.category is DataWarning:
            notes.append(f"warning: {found.message}")
        else:  # of a package or of the user's code
            warnings.showwarning(found.message, found.category, found.filename, found.lineno)
    if args.show_dir:
        make_folder(args.show_dir)
    if dist_utils.world_size() > 1:
        check_ranks_agree(args, config, data)
    return data, notes


def check_ranks_agree(args: argparse.Namespace, config: Config, data: Data) -> None:
    """Raise ConfigError on all ranks if one was started with other code, settings or data.

    Otherwise their weights would differ without a word. Only what a machine may have of its own is
    not compared: the folders of data and work_dir, and the number of workers.
    """
    settings = copy.deepcopy(asdict(config))
    settings.pop("work_dir")
    for section in (settings["data"], *settings["data"].get("datasets", [])):
        for key in ("root", "cache", "workers"):
            section.pop(key, None)
    for flag in ("eval_only", "no_validate", "aug_test", "resume_from"):
        settings[f"--{flag.replace('_', '-')}"] = getattr(args, flag)
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    settings["checksum of the code"] = zlib.crc32(b"".join(code))
    settings["torch"] = str(torch.__version__)
    splits = {} if args.eval_only else {"train": data.train}
    if args.eval_only or not args.no_validate:
        splits["val"] = data.val
    for split, dataset in splits.items():
        settings |= checksum_of_images(dataset, split)

    ranks = dist_utils.all_gather_object((platform.node(), settings))
    for rank, (host, theirs) in enumerate(ranks):
        lines = differences(ranks[0][1], theirs)
        if lines:
            raise ConfigError(
                f"rank {rank} on {host} differs from rank 0: {'; '.join(lines[:3])}. "
                "Start all ranks with the same code, config, flags and data."
            )


def make_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder {folder} cannot be written: {error}") from None
    return folder


@torch.inference_mode(False)  # a notebook may have turned gradients off
def run(  # noqa: PLR0915
    args: argparse.Namespace, config: Config, device: torch.device, notes: Sequence[str] = ()
) -> str:
    """Run one experiment to its end. Return "done", or "stopped" by a signal, with the state saved.

    notes: for the log.
    """
    rank = dist_utils.rank()
    max_iters = config.schedule["max_iters"]

    # Data, network, optimizer.
    precision, autocast = choose_arithmetic(config, device)
    data, warned = load_data(args, config, device)
    state = build_state(config, data, device, precision)

    # Where to start.
    notes = [*notes, *warned, *initialize(state, args, config, data.classes)]
    start = state.iteration
    net = wrap(state.model, config)
    batches = None
    if not args.eval_only:
        batches = data.train_batches(rank, dist_utils.world_size(), start)

    # The run directory.
    run_dir = RunDir(Path(config.work_dir), config.checkpoint.keep)
    run_dir.open(config, state, args.eval_only)
    log_start(state, notes, data, args, config, run_dir)
    validation = functools.partial(validate, state, data, autocast, args, config, run_dir)
    if args.eval_only:
        validation()
        return "done"

    with (
        contextlib.closing(batches),
        dist_utils.StopSignal() as stop,
        tqdm(total=max_iters, initial=start, disable=is_quiet()) as bar,
    ):
        due = functools.partial(is_due, state, max_iters)
        save_as = functools.partial(save, state, config, data, run_dir)
        score = functools.partial(validation, interrupted=lambda: stop.received)

        # The validation that was due when the checkpoint was saved failed or was interrupted.
        if not state.validated:
            validation_is_due = not args.no_validate
            save_and_validate(
                state, config, save_as, score, save_is_due=True, validation_is_due=validation_is_due
            )
        warm_up(state, net, data, autocast, run_dir)
        timer = StepTimer()
        stopping = not state.validated
        while not stopping and not is_finished(state, config):
            # All that is scheduled or random is a function of the iteration: a resumed run is the
            # same run.
            lr = set_learning_rate(state.optimizer, state.iteration, config)
            torch.manual_seed(step_seed(config.seed, state.iteration, rank))

            with timer.waiting_for_data():
                try:
                    micro_batches = list(itertools.islice(batches, data.accumulate))
                except DataError:  # one damaged file is not to cost what was trained since the save
                    if state.iteration > start:
                        save_as([f"iter_{state.iteration}.pth", "latest.pth"])
                    raise
            # A stop signal travels with the losses: all ranks leave after the same iteration.
            losses, stopping = forward_backward(
                state, net, micro_batches, data, autocast, stop.received > 0, config.timeout
            )
            is_first = state.iteration == start
            if not math.isfinite(losses["loss"]):
                stop_on_non_finite(state, losses, is_first, config, data, run_dir)
            if is_first:
                check_gradients(state.model, run_dir)
            optimizer_step(state, config.clip_grad)
            update_ema(state, config.ema_decay)
            state.iteration += 1
            timer.tick()
            bar.set_postfix(loss=f"{losses['loss']:.4f}", lr=f"{lr:.2e}", refresh=False)
            bar.update()

            if due(config.log.interval):
                report(state, lr, losses, timer, config, data, run_dir)
                timer.reset()
            if is_first:  # Exclude the first step: worker start-up and autotuning.
                timer.reset()

            with timer.pause():
                save_is_due = due(config.checkpoint.interval) or stopping
                validation_is_due = due(config.evaluation.interval) and not args.no_validate
                save_and_validate(state, config, save_as, score, save_is_due, validation_is_due)
            stopping = stopping or not state.validated
    return log_end(state, config, run_dir)


# ------------------------------------------------------------------------------------- Command line


def path_argument(text: str) -> str:
    if not text:  # not to train from scratch where --resume-from $CHECKPOINT is meant
        raise argparse.ArgumentTypeError("the path is empty; is a variable of the shell not set?")
    return os.path.expanduser(text)  # the shell leaves the ~ in --config=~/mine.json


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what the run is of, where it starts, and how it is scored."""
    add = parser.add_argument
    add(
        "--config",
        type=path_argument,
        help="a JSON file, such as one of configs/; by default the config in the checkpoint for "
        "--eval-only, --predict and --export",
    )
    add(
        "--work-dir",
        type=path_argument,
        help="folder of logs and checkpoints; default: the config's work_dir",
    )
    add(
        "--resume-from",
        type=path_argument,
        metavar="PATH|auto",
        help="go on from a checkpoint; auto: from the newest good one of the work_dir, if any",
    )
    add(
        "--load-from",
        type=path_argument,
        metavar="PATH",
        help="take weights only (MMSegmentation's .pth too) and start at iteration 0",
    )
    add("--no-validate", action="store_true", help="do not evaluate while training")
    add(
        "--eval-only",
        action="store_true",
        help="evaluate the weights of --load-from or --resume-from, then exit",
    )
    add(
        "--aug-test",
        action="store_true",
        help="evaluate at several scales (evaluation.ratios), each with its mirror image",
    )


def add_other_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for predictions, for what is done in place of a run, and for single keys."""
    add = parser.add_argument
    add(
        "--show-dir",
        type=path_argument,
        metavar="DIR",
        help="write each validation image's prediction there as a PNG with a palette",
    )
    add(
        "--predict",
        type=path_argument,
        metavar="PATH",
        nargs="+",
        action="extend",
        help="predict images, and those in folders, with --load-from; write them to --show-dir",
    )
    add(
        "--export",
        type=path_argument,
        metavar="FILE",
        help="write --load-from as .onnx or .pt2 (torch.export)",
    )
    add(
        "--check-data",
        action="store_true",
        help="decode every sample, print class frequencies and draw a contact sheet, then exit",
    )
    add(
        "--print-config",
        action="store_true",
        help="print the config with all defaults, which can be saved and trained from, then exit",
    )
    add(
        "--options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override the config: model.backbone.with_cp=True data.batch_size=4",
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    add_other_flags(parser)
    argv = [str(argument) for argument in (sys.argv[1:] if argv is None else argv)]  # a Path too
    for argument in argv:
        check_encoding(argument)
    # argparse alone would first complain of a missing --config, whatever else is misspelled.
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = "keys of the config are set with --options, such as --options optimizer.lr=0.01"
        if unknown[0].endswith(".json"):
            hint = f"a config is named by --config {unknown[0]}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {hint}")
    has_config = args.predict or args.export or (args.eval_only and args.load_from)
    if not args.config and not has_config:
        parser.error(f"--config is missing. Try: {command_with_config(args)}")
    return args


def command_with_config(args: argparse.Namespace) -> str:
    """Return the command to suggest to a user who has named a run, but no config."""
    folder = args.work_dir or os.path.dirname(args.resume_from or "")
    config = os.path.join(folder, "config.json")
    best = os.path.join(folder, "best.pth")
    if args.eval_only and os.path.isfile(best):
        return f"python train.py --load-from {shlex.quote(best)} --eval-only"
    if folder and os.path.isfile(config):
        checkpoint = shlex.quote(args.resume_from or "auto")
        return f"python train.py --config {shlex.quote(config)} --resume-from {checkpoint}"
    return "python train.py --config configs/quickstart.json"


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags of which one would be ignored because of another."""
    for first, others in {
        "predict": ("resume_from", "no_validate"),
        "export": ("resume_from", "no_validate"),
        "check_data": ("predict", "export"),
        "eval_only": ("no_validate", "predict", "export", "check_data"),
    }.items():
        for other in others:
            if getattr(args, first) and getattr(args, other):
                flags = [f"--{name.replace('_', '-')}" for name in (first, other)]
                raise ConfigError(f"{flags[0]} has no use for {flags[1]}: leave out one of them")


format_of_python = warnings.formatwarning


def format_warning(message: Warning, category: type, *place, **options) -> str:
    """Return a warning as it is printed; those about data without a place in the code."""
    if category is DataWarning:
        return f"warning: {message}\n"
    return format_of_python(message, category, *place, **options)


def escape_output() -> None:
    """Let print escape characters that the locale lacks, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # a file that was replaced by a pipe below Python
            sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> str:
    """Run train.py with these arguments. Return "done", or "stopped" after a signal."""
    escape_output()
    args = parse_args(argv)
    check_flags(args)
    warnings.formatwarning = format_warning
    options = list(args.options)
    if args.work_dir:
        options.append(f"work_dir={json.dumps(args.work_dir)}")
    is_inference = args.predict or args.export
    if is_inference:
        check_inference_flags(args)
    if args.config:
        config = read_config(args.config, options)
    else:
        config = config_of(load_checkpoint(args.load_from), args.load_from, options)
    if args.print_config:
        check_network(config)
        print(json.dumps(complete(asdict(config)), indent=1))
        return "done"
    if args.check_data:
        check_data(config, make_folder(args.show_dir or config.work_dir))
        return "done"
    notes = [] if is_inference else check_network(config)
    device = dist_utils.init(timeout=config.timeout)
    try:
        if is_inference:
            ending = run_inference(args, config, device)
        else:
            ending = run(args, config, device, notes)
        # Not after an error: cleaning up would wait for processes that may be gone.
        dist_utils.cleanup()
        return ending
    except (RuntimeError, ProcessError) as error:
        raise as_user_error(error) from None


def check_data(config: Config, folder: Path) -> None:
    """Check every sample and draw a contact sheet into `folder`."""
    section = config.data
    channels = section.get("in_channels", 3)
    if channels != 3:  # This prints the mean and std that such data needs, so it runs without.
        section = {"mean": [0.0] * channels, "std": [1.0] * channels} | section
    data = Data(**section, seed=config.seed)
    check_every_sample(data, folder / "contact_sheet.png")


def check_inference_flags(args: argparse.Namespace) -> None:
    """Check the arguments that go with --predict and --export. Raise ConfigError."""
    if not args.load_from:
        raise ConfigError("--predict and --export need a checkpoint: name it with --load-from")
    if args.predict and not args.show_dir:
        raise ConfigError("--predict writes into a folder: name it with --show-dir")
    if args.export and Path(args.export).suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"--export {args.export}: expected a name that ends in .onnx or .pt2")
    if args.export and os.path.isdir(args.export):
        raise ConfigError(f"--export {args.export} is a folder; name a file")


def run_inference(args: argparse.Namespace, config: Config, device: torch.device) -> str:
    """Predict images, export the network, or both. Return "done"."""
    checkpoint = load_checkpoint(args.load_from)
    if args.predict:
        predict = Predictor(checkpoint, config, device, args.aug_test)
        predict_files(predict, args.predict, make_folder(args.show_dir))
    if args.export and dist_utils.rank() == 0:
        path = Path(args.export)
        make_folder(path.parent)
        predict = Predictor(checkpoint, config, torch.device("cpu"))
        print(*export(predict, path), sep="\n")
    return "done"


def as_user_error(error: Exception) -> Exception:
    """Return the UserError that explains a failure of the hardware, the network or a process.

    Any other error, such as one in a user's module, is returned as it is.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"the GPU's memory is too small for a training step: {error}\n"
            "Set model.backbone.with_cp=true (activation checkpointing), data.accumulate=2 or more "
            "(the same batch in parts), precision=bf16, or a smaller data.crop_size."
        )
    if dist_utils.world_size() > 1 and dist_utils.is_communication_error(error):
        return ProcessError(
            f"rank {dist_utils.rank()} lost contact with the others: {error}\n"
            f"No answer from rank(s) {dist_utils.lost_ranks()}: what they printed last says why. "
            "Go on with --resume-from auto."
        )
    if "deterministic" in str(error):
        return ConfigError(f"deterministic=true is not possible with this network: {error}")
    return worker_failure(error) or error


if __name__ == "__main__":
    try:
        # 143 is how a shell reports an end by SIGTERM.
        sys.exit(0 if main() == "done" else 143)
    except UserError as error:
        if dist_utils.is_first_to_report(str(error)):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # so that Python ends by the signal, which stops a loop of the shell
        sys.excepthook = lambda *_: print("interrupted", file=sys.stderr)
        raise
