"""Trace networks, losses, evaluation and augmentation on CUDA without a GPU.

Under FakeTensorMode, tensors have shapes, types and devices but no values, and "cuda" needs no GPU.
An operation on tensors of two devices is an error. So is a size or a branch that depends on values
on the device, for which the host would have to wait.
"""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS as ALL_CONFIGS
from conftest import NEED_TIMM, ROOT
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dist_utils
import models
import train

CONFIGS = [name for name in ALL_CONFIGS if name not in NEED_TIMM]
CUDA = torch.device("cuda", 0)
META = torch.device("meta")


class NoWaitingCopies(TorchDispatchMode):
    """Fails on a copy between the host and the device that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            device = kwargs.get("device")
            if device is not None and device.type != args[0].device.type:
                raise AssertionError(f"the host waits for a copy of {args[0]} to {device}")
        return function(*args, **kwargs)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Make all new tensors fake. Small ones on the CPU keep their values, which the host knows."""
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 64)
    # Autocast refuses to work on CUDA without a GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def cuda(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that computes no values. Backward passes would need a real one: see `meta`."""
    # The losses differentiate in their forward pass.
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x: (torch.empty_like(x),))
    return CUDA


@pytest.fixture
def meta(fake: FakeTensorMode) -> torch.device:
    """Stands for a device other than the CPU whose backward passes can be traced without it."""
    fake.allow_meta = True
    return META


def model_section(config: str) -> dict:
    return json.loads((ROOT / "configs" / f"{config}.json").read_text())["model"]


def build(section: dict) -> models.Segmentor:
    """The network of a config's `model` section, on the meta device. Call it outside of a mode."""
    with META:
        return models.build_model(section)


def move(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace parameters and buffers by fake ones on a device. `Module.to` cannot do that."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                new = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
                )
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, tensor.requires_grad)
                tensors[name] = new
    return module


def batch_on(device: torch.device, model: models.Segmentor, size: int = 64) -> tuple:
    """An image (2, C, size, size) and its label."""
    image = torch.empty(2, model.in_channels, size, size, device=device)
    label = torch.empty(2, size, size, dtype=torch.uint8, device=device)
    return image.contiguous(memory_format=torch.channels_last), label


def assert_losses(losses: dict[str, Tensor], device: torch.device) -> None:
    assert losses
    for name, loss in losses.items():
        assert loss.shape == (), name
        assert loss.dtype == torch.float32, name
        assert loss.device == device, name
        assert loss.requires_grad, name


# ---------------------------------------------------------------------------------------- Networks


def distinct(configs: list[str]) -> list[str]:
    """One config, with the shallowest backbone, for each combination of backbone and heads."""
    found = {}
    for config in sorted(configs, key=lambda name: model_section(name)["backbone"].get("depth", 0)):
        section = model_section(config)
        heads = section["decode_head"]
        if isinstance(heads, dict):
            heads = [heads]
        types = (section["backbone"]["type"], *(head["type"] for head in heads))
        found.setdefault(types, config)
    return sorted(found.values())


@pytest.fixture
def network(request: pytest.FixtureRequest) -> models.Segmentor:
    return build(model_section(request.param))


@pytest.mark.parametrize("network", CONFIGS, indirect=True)
def test_every_network(network, cuda):
    model = move(network, cuda)
    image, label = batch_on(cuda, model)
    with NoWaitingCopies(), torch.autocast("cuda", torch.float16):
        assert_losses(model(image, label), cuda)
    model.eval()
    with NoWaitingCopies(), torch.inference_mode(), torch.autocast("cuda", torch.float16):
        logits = model.inference(image)
        classes, loss = train.classify(logits, label, model.align_corners, model.threshold)
    assert logits.dtype == torch.float32
    assert classes.shape == label.shape
    assert classes.device == loss.device == cuda


@pytest.mark.parametrize("network", distinct(CONFIGS), indirect=True)
def test_every_backward_pass(network, meta):
    model = move(network, meta)
    losses = model(*batch_on(meta, model))
    assert_losses(losses, meta)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # of a frozen backbone, and masks that only pretraining has
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.device == meta, name


@pytest.fixture
def quickstart() -> models.Segmentor:
    return build(model_section("quickstart"))


# ------------------------------------------------------------------------------------------ Losses

LOSSES = {
    "cross entropy": {"type": "CrossEntropyLoss"},
    "cross entropy, weighted": {
        "type": "CrossEntropyLoss",
        "class_weight": [1, 2, 3, 4, 5],
    },
    "cross entropy, avg_non_ignore": {"type": "CrossEntropyLoss", "avg_non_ignore": True},
    "cross entropy, both": {
        "type": "CrossEntropyLoss",
        "class_weight": [1, 2, 3, 4, 5],
        "avg_non_ignore": True,
    },
    "binary cross entropy": {
        "type": "CrossEntropyLoss",
        "use_sigmoid": True,
        "class_weight": [1, 2, 3, 4, 5],
        "avg_non_ignore": True,
    },
    "Dice": {"type": "DiceLoss"},
    "Dice, softmax": {"type": "DiceLoss", "use_sigmoid": False},
    "focal": {"type": "FocalLoss", "class_weight": [1, 2, 3, 4, 5]},
    "focal, alpha by class": {"type": "FocalLoss", "alpha": [0.1, 0.2, 0.3, 0.4, 0.5]},
    "Lovasz": {"type": "LovaszLoss", "class_weight": [1, 2, 3, 4, 5]},
    "Lovasz, all classes": {"type": "LovaszLoss", "classes": "all"},
    "Lovasz, some classes": {"type": "LovaszLoss", "classes": [0, 3]},
    "Lovasz by image": {"type": "LovaszLoss", "per_image": True},
}
BINARY_LOSSES = {
    "binary cross entropy": {"type": "CrossEntropyLoss", "use_sigmoid": True},
    "Dice": {"type": "DiceLoss"},
    "focal": {"type": "FocalLoss"},
    "Lovasz hinge": {"type": "LovaszLoss", "loss_type": "binary"},
}
SAMPLERS = {
    "no sampler": None,
    "OHEM": {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 100},
    "OHEM without threshold": {"type": "OHEMPixelSampler", "min_kept": 100},
}


def trace_loss(device: torch.device, num_classes: int, out_channels: int, **section) -> None:
    """Trace a head with `loss_decode` and `sampler` of `section`."""
    head = models.FCNHead(
        in_channels=4,
        channels=4,
        num_convs=0,
        concat_input=False,
        num_classes=num_classes,
        out_channels=out_channels,
        **section,
    )
    move(head, device)
    feature = torch.empty(3, 4, 16, 16, device=device)
    label = torch.empty(3, 64, 64, dtype=torch.uint8, device=device)
    with NoWaitingCopies():
        assert_losses(head.loss(head([feature]), label), device)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(cuda, monkeypatch, loss, sampler):
    monkeypatch.setattr(models, "CHUNK", 1)  # one image at a time
    trace_loss(cuda, 5, 5, loss_decode=LOSSES[loss], sampler=SAMPLERS[sampler])


@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_every_binary_loss(cuda, loss):
    trace_loss(cuda, 2, 1, loss_decode=BINARY_LOSSES[loss])


# -------------------------------------------------------------------------------------- Evaluation


@torch.inference_mode()
def test_inference_in_windows(quickstart, cuda):
    model = move(quickstart, cuda).eval()
    image = torch.empty(2, 3, 70, 90, device=cuda)
    windows = {"mode": "slide", "crop_size": (64, 64), "stride": (48, 48), "batch_size": 3}
    logits = model.inference(image, **windows)
    assert logits.shape == (2, model.num_classes, 70, 90)
    assert logits.device == cuda
    for settings in ({}, windows):
        logits = model.inference_tta(image, (140, 180), [0.75, 1.0], **settings)
        assert logits.shape == (2, model.num_classes, 140, 180)
        assert logits.device == cuda


@torch.inference_mode()
def test_classify_many_classes_and_threshold(cuda):
    label = torch.empty(2, 40, 40, dtype=torch.uint8, device=cuda)
    for num_classes, threshold in ((150, 0.5), (2, 0.3)):
        logits = torch.empty(2, num_classes, 10, 10, device=cuda)
        classes, loss = train.classify(logits, label, False, threshold)
        assert classes.shape == label.shape
        assert classes.device == loss.device == cuda


class EndOfLoop(Exception):
    pass


@pytest.mark.parametrize("augment", [False, True])
def test_evaluation_loop(quickstart, cuda, monkeypatch, augment):
    def stop(tensor: Tensor) -> None:
        assert tensor.device == cuda
        raise EndOfLoop

    monkeypatch.setattr(dist_utils, "all_reduce", stop)
    model = move(quickstart, cuda)
    dataset = synthetic().to(cuda)
    batch = {
        "image": torch.empty(1, 3, 64, 64, dtype=torch.uint8),
        "label": torch.empty(1, 80, 80, dtype=torch.uint8),
        "index": torch.zeros(1, dtype=torch.int64),
    }
    one_batch = SimpleNamespace(
        classes=range(8),
        val=dataset.val,
        val_batches=lambda *arguments: [batch],
        prepare=dataset.prepare,
    )
    with pytest.raises(EndOfLoop), NoWaitingCopies():
        train.evaluate(model, one_batch, cuda, augment=augment)


# -------------------------------------------------------------------------------------------- Data


def synthetic(**settings) -> data.Data:
    return data.Data(type="synthetic", batch_size=2, crop_size=[64, 64], **settings)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("photometric", [False, True])
def test_prepare(cuda, photometric, padded):
    dataset = synthetic(photometric=photometric).to(cuda)
    image = torch.empty(2, 3, 64, 64, dtype=torch.uint8)
    batch = {
        "image": image.contiguous(memory_format=torch.channels_last),
        "label": torch.empty(2, 64, 64, dtype=torch.uint8),
        "valid": torch.tensor([[64, 64], [48 if padded else 64, 64]]),
        "color": torch.empty(2, 5),
    }
    with NoWaitingCopies():
        image, label = dataset.prepare(batch, cuda)
    assert image.shape == (2, 3, 64, 64)
    assert image.dtype == torch.float32
    assert image.device == label.device == cuda
    assert image.is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------- What the traces detect


def test_a_tensor_on_the_wrong_device_fails(cuda):
    with pytest.raises(RuntimeError, match="cuda:0.*cpu"):
        torch.empty(4, device=cuda) + torch.arange(4)


def test_waiting_for_a_value_fails(cuda):
    x = torch.empty(4, device=cuda)
    with pytest.raises(fake_tensor.DynamicOutputShapeException):
        x[x > 0]
    with pytest.raises(fake_tensor.DataDependentOutputException):
        x.sum().item()
    with pytest.raises(AssertionError, match="the host waits"), NoWaitingCopies():
        x.cpu()
    if not torch.cuda.is_available():  # else torch creates this one directly on the GPU
        with pytest.raises(AssertionError, match="the host waits"), NoWaitingCopies():
            torch.tensor([1.0, 2.0], device=cuda)
