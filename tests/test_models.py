"""Models against MMSegmentation's numbers, torchvision's weights and formulas written out."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import PARITY, ROOT, parity_image, parity_label, parity_model, without_dropout
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models

# test_new_networks.py compares those of other sizes and those of parts of a network.
PARITY_NAMES = [
    path.stem
    for path in sorted(PARITY.glob("*.npz"))
    if not {"size", "head"} & json.loads(path.with_suffix(".json").read_text()).keys()
]
HEAD = {
    "type": "FCNHead",
    "in_index": -1,
    "channels": 8,
    "num_convs": 1,
    "concat_input": False,
    "num_classes": 5,
}
RESNET_18 = {
    "backbone": {"type": "ResNet", "depth": 18},
    "decode_head": {**HEAD, "in_channels": 512},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------ MMSegmentation's numbers


@pytest.mark.parametrize("name", PARITY_NAMES)
def test_parity(name: str):
    """Logits, losses and the norm of the gradient are MMSegmentation's."""
    model = parity_model(name)
    expected = dict(np.load(PARITY / f"{name}.npz"))
    logits = expected.pop("logits")
    with torch.no_grad():
        found = model.eval()(parity_image())
    tolerance = 1e-8 * abs(logits).max()
    assert np.allclose(found, logits, rtol=0, atol=tolerance)

    label = parity_label(model.num_classes)
    values = model.train()(parity_image(), label)
    assert set(values) == set(expected) - {"loss", "grad_norm"}
    values["loss"] = sum(values.values())
    values["loss"].backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    norms = torch.stack([gradient.norm() for gradient in gradients])
    values["grad_norm"] = norms.norm()
    for key, value in values.items():
        wanted = float(expected[key])
        assert value.item() == pytest.approx(wanted, rel=1e-8), key


def published_configs() -> list[Path]:
    """The Cityscapes configs of models with reference numbers."""
    paths = []
    for name in PARITY_NAMES:
        if "_r50" in name:
            paths += sorted((ROOT / "configs").glob(f"{name}_*_cityscapes.json"))
    return paths


@pytest.mark.parametrize("path", published_configs(), ids=lambda path: path.stem)
def test_config_holds_the_published_model(path: Path):
    """This includes strides, dilations and channels, which checkpoint keys do not show."""
    name = path.stem.rsplit("_", 3)[0]
    config = json.loads(path.read_text())
    described = json.loads((PARITY / f"{name}.json").read_text())
    with torch.device("meta"):
        ours = models.build_model(config["model"])
        theirs = models.build_model(described["model"])
    assert repr(ours.backbone) == repr(theirs.backbone)
    assert repr(ours.neck) == repr(theirs.neck)
    assert repr(ours.decode_head) == repr(theirs.decode_head)
    assert repr(ours.auxiliary_head) == repr(theirs.auxiliary_head)


# ------------------------------------------------------------ Settings that must not change numbers


def hr_stage(block: str, num_channels: list[int]) -> dict:
    return {
        "num_modules": 1,
        "num_branches": len(num_channels),
        "block": block,
        "num_blocks": [1] * len(num_channels),
        "num_channels": num_channels,
    }


HRNET_STAGES = {
    "stage1": hr_stage("BOTTLENECK", [4]),
    "stage2": hr_stage("BASIC", [4, 6]),
    "stage3": hr_stage("BASIC", [4, 6, 8]),
    "stage4": hr_stage("BASIC", [4, 6, 8, 10]),
}
# A small backbone of each kind, and the channels of its last map.
SMALL = {
    "BasicBlock": (
        {
            "type": "ResNet",
            "depth": 18,
            "base_channels": 4,
            "stem_channels": 4,
        },
        32,
    ),
    "Bottleneck": (
        {
            "type": "ResNetV1c",
            "depth": 50,
            "base_channels": 4,
            "stem_channels": 4,
        },
        128,
    ),
    "HRNet": ({"type": "HRNet", "extra": HRNET_STAGES}, 10),
    "MixVisionTransformer": (
        {
            "type": "MixVisionTransformer",
            "embed_dims": 4,
            "num_layers": [1, 1, 1, 1],
            "drop_path_rate": 0.3,
        },
        32,
    ),
    "MobileNetV2": ({"type": "MobileNetV2", "widen_factor": 0.25}, 80),
    "ConvNeXt": (
        {
            "type": "ConvNeXt",
            "arch": "tiny",
            "layer_scale_init_value": 1.0,
            "drop_path_rate": 0.3,
        },
        768,
    ),
    "SwinTransformer": (
        {
            "type": "SwinTransformer",
            "embed_dims": 12,
            "depths": [2, 1, 1, 1],
            "drop_path_rate": 0.3,
        },
        96,
    ),
}
FOUR_KINDS = pytest.mark.parametrize(
    "name", ["Bottleneck", "MixVisionTransformer", "SwinTransformer", "ConvNeXt"]
)


def small_model(name: str, head: dict | None = None, **backbone) -> models.Segmentor:
    """A model with the same weights in every call; `head` and `backbone` change its config."""
    section, channels = SMALL[name]
    config = {
        "backbone": section | backbone,
        "decode_head": HEAD | {"in_channels": channels},
    }
    if head:
        config["decode_head"] |= head
    torch.manual_seed(0)
    return models.build_model(config)


def make_batch(num_classes: int = 5) -> tuple[Tensor, Tensor]:
    """Image (2, 3, 64, 80) and label (2, 64, 80) with ignored pixels."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(num_classes, (2, 64, 80), generator=generator)
    label[0, :5] = 255
    image = torch.randn(2, 3, 64, 80, generator=generator)
    return image, label.byte()


def losses_and_gradients(model: nn.Module, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)  # of dropout
    losses = model(image, label)
    sum(losses.values()).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    for name, loss in losses.items():
        found[name] = loss.detach()
    return found


@pytest.mark.parametrize("name", SMALL)
def test_activation_checkpointing_changes_nothing(name: str):
    """Losses, gradients and running statistics stay the same, with dropout and DropPath."""
    plain = small_model(name)
    checkpointed = small_model(name, with_cp=True)
    assert checkpointed.backbone.with_cp
    expected = losses_and_gradients(plain, *make_batch())
    found = losses_and_gradients(checkpointed, *make_batch())
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    buffers = dict(checkpointed.named_buffers())
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffers[key], buffer), key
        if key.endswith("num_batches_tracked"):
            assert buffer == 1, key


def test_activation_checkpointing_saves_less_than_half():
    def saved_values(model: nn.Module) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*make_batch())
        return count

    checkpointed = saved_values(small_model("Bottleneck", with_cp=True))
    assert checkpointed < 0.5 * saved_values(small_model("Bottleneck"))


@FOUR_KINDS
def test_channels_last_changes_nothing(name: str):
    image, label = make_batch()
    model = without_dropout(small_model(name))
    expected = model(image, label)["decode.loss_ce"]
    model = without_dropout(small_model(name)).to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    found = losses_and_gradients(model, image, label)["decode.loss_ce"]
    assert torch.allclose(found, expected, rtol=1e-5)


@FOUR_KINDS
def test_autocast_to_bf16_changes_little(name: str):
    model = without_dropout(small_model(name))
    expected = model(*make_batch())["decode.loss_ce"]
    model = without_dropout(small_model(name))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*make_batch())["decode.loss_ce"]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0.02)


@FOUR_KINDS
def test_training_step_on_the_meta_device(name: str):
    with torch.device("meta"):
        model = small_model(name)
    image, label = make_batch()
    found = losses_and_gradients(model, image.to("meta"), label.to("meta"))
    assert all(value.is_meta for value in found.values())


@pytest.mark.parametrize("with_cp", [False, True])
def test_compiled_model_has_the_same_gradients(with_cp: bool):
    plain = without_dropout(small_model("BasicBlock", with_cp=with_cp))
    expected = losses_and_gradients(plain, *make_batch())
    model = without_dropout(small_model("BasicBlock", with_cp=with_cp))
    compiled = models.compiled(model, backend="aot_eager")
    for key, found in losses_and_gradients(compiled, *make_batch()).items():
        value = expected.pop(key.removeprefix("_orig_mod."))
        assert torch.allclose(found, value, rtol=1e-4, atol=1e-5), key
    assert not expected
    for key, buffer in model.named_buffers():
        if key.endswith("num_batches_tracked"):
            assert buffer == 1, key


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((13, 17), 6),
        ((64, 128), 3),
        ((5, 4), 6),
        ((8, 9), 1),
    ],
)
def test_pooling_by_matrices_is_average_pooling(size: tuple[int, int], grid: int):
    """CUDA pools by matrices if only deterministic operations are allowed."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    pool = models.AdaptiveAvgPool(grid)
    rows = pool.means(size[0], x)
    columns = pool.means(size[1], x)
    expected = F.adaptive_avg_pool2d(x, grid)
    assert torch.allclose(rows @ x @ columns.T, expected, rtol=1e-12)


def test_initial_weights():
    """Residual branches start at zero, the classifier is small, and convolutions are He's."""
    model = small_model("Bottleneck", base_channels=64)
    for module in model.modules():
        if isinstance(module, models.Bottleneck):
            assert module.bn3.weight.eq(0).all()
    classifier = model.decode_head.conv_seg.weight
    assert classifier.std().item() == pytest.approx(0.01, rel=0.3)
    convolution = model.backbone.layer3[1].conv2.weight
    fan_out = convolution.shape[0] * 9
    he = math.sqrt(2 / fan_out)
    assert convolution.std().item() == pytest.approx(he, rel=0.02)


# ------------------------------------------------------------------------------------------ Losses

WEIGHTS = [1.0, 2.0, 3.0, 4.0]  # of the classes


def upsample(logits: Tensor, label: Tensor) -> Tensor:
    return F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)


def make_logits(channels: int = 4, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (3, channels, 5, 6), the same up-sampled, and a label (3, 17, 23)."""
    logits = torch.randn(3, channels, 5, 6, dtype=torch.float64)
    logits.requires_grad_()
    label = torch.randint(classes, (3, 17, 23), dtype=torch.uint8)
    label[:, :4] = 255
    return logits, upsample(logits, label), label


def make_loss(kind: str, **options) -> nn.Module:
    section = {"type": kind, **options}
    return models.construct(models.LOSSES, section, "loss_decode").double()


def one_hot(label: Tensor, channels: int) -> Tensor:
    masks = [label == c for c in range(channels)]
    return torch.stack(masks, 1).double()


def per_pixel(x: Tensor, label: Tensor) -> Tensor:
    """(N, C, H, W) -> (valid pixels, C)."""
    return x.permute(0, 2, 3, 1)[label != 255]


def cross_entropy_over_all(full: Tensor, label: Tensor) -> Tensor:
    total = F.cross_entropy(full, label.long(), ignore_index=255, reduction="sum")
    return total / label.numel()


def cross_entropy_over_valid(full: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(full, label.long(), ignore_index=255)


def half_weighted_cross_entropy(full: Tensor, label: Tensor) -> Tensor:
    weight = torch.tensor(WEIGHTS).double()
    return 0.5 * F.cross_entropy(full, label.long(), weight, ignore_index=255)


def binary_cross_entropy(full: Tensor, label: Tensor) -> Tensor:
    weight = torch.tensor(WEIGHTS).double()
    weight = weight.view(-1, 1, 1)
    hot = one_hot(label, 4)
    entries = F.binary_cross_entropy_with_logits(full, hot, pos_weight=weight, reduction="none")
    return per_pixel(entries, label).sum() / full.numel()


def dice(full: Tensor, label: Tensor) -> Tensor:
    hot = one_hot(label, 4)
    losses = []
    for i in range(len(full)):
        valid = label[i] != 255
        p = full[i].softmax(0)[:, valid]
        t = hot[i][:, valid]
        overlap = (p * t).sum()
        norm = (p**2).sum() + (t**2).sum() + 2e-3
        losses.append(1 - 2 * overlap / norm)
    return sum(losses) / len(losses)


def focal(full: Tensor, label: Tensor) -> Tensor:
    positive = one_hot(label, 4) > 0
    p = torch.where(positive, full.sigmoid(), 1 - full.sigmoid())
    alpha = torch.where(positive, 0.25, 0.75)
    entries = -alpha * (1 - p) ** 1.5 * p.log()
    return per_pixel(entries, label).sum() / full.numel()


def lovasz_extension(errors: Tensor, truth: Tensor) -> float:
    """The definition: sorted errors, each times the increase of the Jaccard loss there."""
    truth = truth.int().tolist()
    pairs = sorted(zip(errors.tolist(), truth), reverse=True)
    positive = sum(truth)
    missed = 0
    invented = 0
    before = 0.0
    total = 0.0
    for error, t in pairs:
        missed += t
        invented += 1 - t
        jaccard_loss = 1 - (positive - missed) / (positive + invented)
        total += max(error, 0) * (jaccard_loss - before)
        before = jaccard_loss
    return total


def lovasz(full: Tensor, label: Tensor) -> Tensor:
    p = per_pixel(full.softmax(1), label)
    classes = label[label != 255]
    found = []
    for c in classes.unique().tolist():
        truth = classes == c
        errors = (p[:, c] - truth.double()).abs()
        found.append(lovasz_extension(errors, truth))
    return torch.tensor(found, dtype=torch.float64).mean()


def lovasz_per_image(full: Tensor, label: Tensor) -> Tensor:
    images = zip(full.split(1), label.split(1))
    return torch.stack([lovasz(*image) for image in images]).mean()


def lovasz_hinge(full: Tensor, label: Tensor) -> Tensor:
    truth = label[label != 255] == 1
    sign = 2 * truth.double() - 1
    errors = 1 - per_pixel(full, label)[:, 0] * sign
    return torch.tensor(lovasz_extension(errors, truth), dtype=torch.float64)


# Name: type, options, the same written down for logits of the label's size.
LOSSES = {
    "mean over all": ("CrossEntropyLoss", {}, cross_entropy_over_all),
    "mean over valid": (
        "CrossEntropyLoss",
        {"avg_non_ignore": True},
        cross_entropy_over_valid,
    ),
    "weighted": (
        "CrossEntropyLoss",
        {"avg_non_ignore": True, "class_weight": WEIGHTS, "loss_weight": 0.5},
        half_weighted_cross_entropy,
    ),
    "sigmoid": (
        "CrossEntropyLoss",
        {"use_sigmoid": True, "class_weight": WEIGHTS},
        binary_cross_entropy,
    ),
    "dice": ("DiceLoss", {"use_sigmoid": False}, dice),
    "focal": ("FocalLoss", {"gamma": 1.5, "alpha": 0.25}, focal),
    "lovasz": ("LovaszLoss", {"reduction": "none"}, lovasz),
    "lovasz per image": ("LovaszLoss", {"per_image": True}, lovasz_per_image),
    "lovasz hinge": ("LovaszLoss", {"loss_type": "binary"}, lovasz_hinge),
}


@pytest.mark.parametrize("chunk", [1, 2**25])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_by_hand(name: str, chunk: int, monkeypatch):
    """Check value and gradient, which is zero at ignored pixels, in chunks and at once."""
    monkeypatch.setattr(models, "CHUNK", chunk)
    kind, options, reference = LOSSES[name]
    if name == "lovasz hinge":
        logits, full, label = make_logits(channels=1, classes=2)
    else:
        logits, full, label = make_logits()
    criterion = make_loss(kind, **options)
    loss = criterion(logits, label)
    expected = reference(full, label)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)

    if expected.requires_grad:  # not lovasz_extension's
        (found,) = torch.autograd.grad(3 * loss, logits)
        (gradient,) = torch.autograd.grad(expected, logits)
        assert torch.allclose(found, 3 * gradient, rtol=1e-9, atol=1e-15)
    full = full.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(full, label), full)
    ignored = (label == 255).unsqueeze(1).expand_as(gradient)
    assert gradient[ignored].eq(0).all()
    assert gradient[~ignored].ne(0).any()


def probability_of_label(full: Tensor, label: Tensor) -> Tensor:
    """(N, H, W), anything where the label is ignored."""
    index = label.long().clamp(max=3).unsqueeze(1)
    return full.softmax(1).gather(1, index).squeeze(1)


def test_ohem_keeps_hard_pixels():
    """It keeps all pixels below the threshold, but at least min_kept of each image."""

    def sample(label: Tensor, **options) -> Tensor:
        sampler = models.OHEMPixelSampler(**options)
        return sampler(logits, label, False)

    logits, full, label = make_logits()
    p = probability_of_label(full, label)
    valid = label != 255

    kept = sample(label, thresh=0.4, min_kept=10)
    assert torch.equal(kept > 0, valid & (p < 0.4))

    few = sample(label, thresh=1e-9, min_kept=10)
    assert few.sum() == 30
    left_out = valid & (few == 0)
    assert p[few > 0].max() < p[left_out].min()
    assert torch.equal(sample(label, min_kept=10), few)

    assert sample(label, min_kept=10**9).sum() == valid.sum()
    ignored = torch.full_like(label, 255)
    assert sample(ignored, thresh=0.4).sum() == 0


def test_ohem_loss_is_that_of_the_kept_pixels():
    logits, full, label = make_logits()
    sampler = {"type": "OHEMPixelSampler", "thresh": 0.4, "min_kept": 10}
    section = {**HEAD, "in_channels": 4, "num_classes": 4, "sampler": sampler}
    head = models.construct(models.HEADS, section, "head")
    loss = head.loss({"": logits}, label)["loss_ce"]

    hard = (label != 255) & (probability_of_label(full, label) < 0.4)
    entries = F.cross_entropy(full, label.long(), ignore_index=255, reduction="none")
    expected = entries[hard].sum() / label.numel()
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("options", [{"thresh": 0.7}, {"min_kept": 10}])
def test_ohem_does_not_wait_for_the_device(options: dict):
    """The meta device, on which train.py tries every config, has no values to wait for."""
    with torch.device("meta"):
        sampler = {"type": "OHEMPixelSampler", **options}
        model = small_model("BasicBlock", {"sampler": sampler}).train()
        label = torch.zeros(2, 64, 64, dtype=torch.uint8)
        assert model(torch.zeros(2, 3, 64, 64), label)


def test_losses_of_one_name_are_added():
    sections = [
        {"type": "CrossEntropyLoss", "loss_weight": 2.0},
        {"type": "DiceLoss", "loss_weight": 3.0},
        {"type": "LovaszLoss", "loss_name": "loss_dice"},
        {"type": "FocalLoss", "loss_name": "loss_mine"},
    ]

    def train_step(loss_decode: dict | list[dict]) -> dict[str, Tensor]:
        head = {"loss_decode": loss_decode, "dropout_ratio": 0}
        return small_model("BasicBlock", head)(*make_batch())

    losses = train_step(sections)
    assert list(losses) == ["decode.loss_ce", "decode.loss_dice", "decode.loss_mine"]
    alone = []
    for section in sections:
        (loss,) = train_step(section).values()
        alone.append(loss)
    assert losses["decode.loss_ce"] == alone[0]
    assert torch.allclose(losses["decode.loss_dice"], alone[1] + alone[2])


def test_one_channel_for_two_classes():
    """Equals two channels of which the first is zero."""
    binary = {"num_classes": 2, "out_channels": 1}
    loss_decode = {"use_sigmoid": True, "avg_non_ignore": True}
    model = small_model("BasicBlock", {**binary, "loss_decode": loss_decode}).eval()
    image, label = make_batch(2)
    logits = model(image)
    assert model.num_classes == 2
    assert model.out_channels == logits.shape[1] == 1

    full = upsample(logits, label)
    two = torch.cat([torch.zeros_like(full), full], 1)
    expected = cross_entropy_over_valid(two, label)
    assert torch.allclose(model(image, label)["decode.loss_ce"], expected)
    wrong = {
        "use_sigmoid": {},
        "binary": {"type": "LovaszLoss"},
        "one output channel per class": {"type": "OhemCrossEntropy"},
    }
    for part, section in wrong.items():
        with pytest.raises(models.ConfigError, match=part):
            small_model("BasicBlock", {**binary, "loss_decode": section})
    hinge = {"type": "LovaszLoss", "loss_type": "binary"}
    small_model("BasicBlock", {**binary, "loss_decode": hinge})
    with pytest.raises(models.ConfigError, match="out_channels: 1"):
        small_model("BasicBlock", {"num_classes": 2, "loss_decode": hinge})


class LargestTensor(TorchDispatchMode):
    """Records the number of values of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.parametrize("kind", ["CrossEntropyLoss", "DiceLoss", "FocalLoss"])
def test_logits_are_never_upsampled_for_the_whole_batch(kind: str, monkeypatch):
    """With 150 classes these would be the largest tensor of the whole step."""
    monkeypatch.setattr(models, "CHUNK", 150 * 64 * 64)
    logits = torch.randn(8, 150, 16, 16, requires_grad=True)
    label = torch.randint(150, (8, 64, 64), dtype=torch.uint8)
    with LargestTensor() as largest:
        make_loss(kind)(logits, label).backward()
    assert largest.numel <= 150 * 64 * 64
    with LargestTensor() as largest:
        cross_entropy_over_valid(upsample(logits, label), label).backward()
    assert largest.numel == 8 * 150 * 64 * 64


def test_small_gradients_survive_half_precision():
    """The gradient stays in float32 until the loss scale has multiplied it."""
    half = torch.randn(1, 3, 64, 64).half().requires_grad_()
    exact = half.detach().float().requires_grad_()
    label = torch.randint(3, (1, 256, 256))
    criterion = make_loss("CrossEntropyLoss").float()
    for logits in (half, exact):
        scaled = criterion(logits, label) * 2**16
        scaled.backward()
    assert torch.allclose(half.grad.float(), exact.grad, rtol=2e-3, atol=1e-6)


NORMALIZED = (
    {"avg_non_ignore": True},
    {"avg_non_ignore": True, "class_weight": WEIGHTS},
)


def uneven_batch() -> tuple[Tensor, Tensor]:
    """Four images, of which the second has fewer valid pixels."""
    torch.manual_seed(0)
    logits, _, label = make_logits()
    label = torch.cat([label, label])[:4]
    label[1, 6:] = 255
    return torch.cat([logits, logits])[:4].detach(), label


def global_normalizer(criterion: nn.Module, logits: Tensor, label: Tensor) -> Tensor:
    """That of a network whose only head has this one loss."""
    head = SimpleNamespace(loss_decode=[criterion], out_channels=logits.shape[1])
    network = SimpleNamespace(
        decode_head=head, auxiliary_head=None, named_heads=models.Segmentor.named_heads
    )
    return models.Segmentor.normalizers(network, [label])["decode"][0]


def check_half_of_the_batch(rank: int, path: str, expected: Tensor) -> None:
    """One of two processes; the average of their gradients is that of the whole batch."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    logits, label = uneven_batch()
    half = logits[rank::2].clone().requires_grad_()
    half_label = label[rank::2]
    for options in NORMALIZED:
        criterion = make_loss("CrossEntropyLoss", **options)
        normalizer = global_normalizer(criterion, half, half_label)
        criterion(half, half_label, normalizer=normalizer).backward()
    mean = half.grad / 2
    assert torch.allclose(mean, expected[rank::2], rtol=1e-12)

    # Evaluation does not communicate, as ranks may have different numbers of images.
    if rank == 0:
        criterion = make_loss("CrossEntropyLoss", avg_non_ignore=True)
        criterion.eval()(half, half_label)
    dist.destroy_process_group()


def test_loss_is_normalized_over_all_processes(tmp_path: Path):
    logits, label = uneven_batch()
    logits.requires_grad_()
    for options in NORMALIZED:
        make_loss("CrossEntropyLoss", **options)(logits, label).backward()
    torch.multiprocessing.start_processes(
        check_half_of_the_batch,
        (str(tmp_path / "store"), logits.grad),
        nprocs=2,
        start_method="forkserver",
    )


# ------------------------------------------------------------------------------ Weights from files


def randomize(network: nn.Module) -> nn.Module:
    """Set values with which batch norm, layer scale and position biases matter."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1 or "layer_scale" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "relative_position" in name:
            nn.init.normal_(parameter)
    return network.eval()


def load_torchvision(name: str, backbone: dict, folder: Path) -> tuple:
    """torchvision's network, our backbone with its weights, and the report of the loading."""
    build = getattr(torchvision.models, name)
    theirs = randomize(build(weights=None))
    path = folder / "weights.pth"
    torch.save(theirs.state_dict(), path)
    config = {
        "backbone": {**backbone, "pretrained": str(path)},
        "decode_head": {**HEAD, "in_channels": 8},
    }
    model = models.build_model(config)
    assert model.backbone.torchvision_name == name
    report = models.load_pretrained(model)
    return theirs, model.backbone.eval(), report


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("resnet18", {"type": "ResNet", "depth": 18}),
        ("resnet50", {"type": "ResNet", "depth": 50}),
        ("resnext50_32x4d", {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4}),
    ],
)
def test_torchvision_resnet(name: str, backbone: dict, tmp_path: Path):
    theirs, ours, report = load_torchvision(name, backbone, tmp_path)
    assert "missing" not in report
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        found = ours(x)[3]
        children = dict(theirs.named_children())
        for layer in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = children[layer](x)
        assert torch.allclose(found, x, rtol=1e-4, atol=1e-5)


def test_torchvision_mobilenet(tmp_path: Path):
    theirs, ours, report = load_torchvision("mobilenet_v2", {"type": "MobileNetV2"}, tmp_path)
    assert "missing" not in report
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        for found, layers in zip(ours(x), (4, 7, 14, 18)):
            expected = theirs.features[:layers](x)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swin_t", "SwinTransformer"),
        ("convnext_tiny", "ConvNeXt"),
    ],
)
def test_torchvision_swin_and_convnext(name: str, kind: str, tmp_path: Path):
    """A classifier has no norms after the first three stages."""
    theirs, ours, report = load_torchvision(name, {"type": kind}, tmp_path)
    missing = re.search("missing in the file: (.*?);", report)[1]
    assert sorted(missing.split(", ")) == [
        "norm0.bias",
        "norm0.weight",
        "norm1.bias",
        "norm1.weight",
        "norm2.bias",
        "norm2.weight",
    ]
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        for i, found in enumerate(ours(x)):
            expected = theirs.features[: 2 * i + 2](x)
            if name == "convnext_tiny":
                expected = expected.permute(0, 2, 3, 1)  # (N, h, w, C), as swin_t has it
            norm = getattr(ours, f"norm{i}")
            shape = expected.shape[3:]
            expected = F.layer_norm(expected, shape, norm.weight, norm.bias, norm.eps)
            expected = expected.permute(0, 3, 1, 2)
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), i


def fcn_from_torchvision() -> dict:
    head = {**HEAD, "in_channels": 2048, "in_index": 3, "channels": 512}
    return {
        "backbone": {
            "type": "ResNet",
            "depth": 50,
            "strides": [1, 2, 1, 1],
            "dilations": [1, 1, 2, 4],
            "contract_dilation": True,
        },
        "decode_head": head,
        "auxiliary_head": {**head, "in_channels": 1024, "in_index": 2, "channels": 256},
    }


def test_torchvision_fcn():
    """Every tensor of fcn_resnet50 is taken, and the logits are the same."""
    theirs = randomize(
        torchvision.models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        )
    )
    model = models.build_model(fcn_from_torchvision()).eval()
    report = models.load_weights(model, theirs.state_dict())
    assert re.search(r"loaded (\d+) of \1 tensors$", report)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = F.interpolate(model(x), (64, 64), mode="bilinear")
        expected = theirs(x)["out"]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_torchvision_deeplab():
    """All of deeplabv3_resnet50 that the models share is taken."""
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=5
    )
    head = {
        "type": "ASPPHead",
        "in_channels": 2048,
        "channels": 256,
        "num_classes": 5,
        "dilations": [1, 12, 24, 36],
    }
    with torch.device("meta"):
        model = models.build_model(
            {"backbone": fcn_from_torchvision()["backbone"], "decode_head": head}
        )
    model.to_empty(device="cpu")
    report = models.load_weights(model, theirs.state_dict())
    missing = re.search("missing in the file: ([^;]*)", report)[1]
    assert missing.split(", ") == [
        "decode_head.bottleneck.conv.weight",
        "decode_head.bottleneck.bn.weight",
        "decode_head.bottleneck.bn.bias",
        "decode_head.bottleneck.bn.running_mean",
        "decode_head.bottleneck.bn.running_var",
    ]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and an empty cache of torch.hub in tmp_path."""

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


def test_pretrained_by_name(offline, tmp_path: Path):
    """Weights come from torch.hub's cache; without a network, the error says how to get them."""
    model = models.build_model({**RESNET_18, "pretrained": "IMAGENET1K_V1"})
    advice = r"models/resnet18.*--options model.backbone.pretrained=/path/to/resnet18"
    with pytest.raises(models.ConfigError, match=advice):
        models.load_pretrained(model)

    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), cache / Path(url).name)
    assert "loaded 100 of 100 tensors" in models.load_pretrained(model)
    found = model.backbone.layer4[1].conv2.weight
    assert torch.equal(found, theirs.layer4[1].conv2.weight)

    model.pretrained = None
    assert models.load_pretrained(model) is None


def test_pretrained_by_hand():
    """DINOv3's weights: the error says where to ask for the file, and how to name it."""
    path = ROOT / "configs/linear_dinov3-b_512x512_40k_ade20k.json"
    model = models.build_on_meta(json.loads(path.read_text())["model"])
    file = model.pretrained
    assert file.startswith("dinov3_vitb16_pretrain_lvd1689m-")
    advice = f"{file} .*dinov3-downloads.*--options model.backbone.pretrained=/path/to/{file}"
    with pytest.raises(models.ConfigError, match=advice):
        models.load_pretrained(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("IMAGENET1K_V9", "did you mean IMAGENET1K_V1"),
        ("open-mmlab://resnet50", "open-mmlab://resnet50_v1c"),
        ("open-mmlab://resnet50_v1c", "third_party/resnet50_v1c-2cccc1ad.pth"),
    ],
)
def test_pretrained_by_an_unknown_name(offline, name: str, message: str):
    model = models.build_model({**RESNET_18, "pretrained": name})
    with pytest.raises(models.ConfigError, match=message):
        models.load_pretrained(model)


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", ["", "nonsense", "code"])
def test_unreadable_weights(content: str, tmp_path: Path):
    path = tmp_path / "weights.pth"
    if content == "code":
        torch.save({"state_dict": Code()}, path)
    else:
        path.write_text(content)
    model = small_model("BasicBlock", pretrained=str(path))
    with pytest.raises(models.ConfigError, match="cannot be loaded"):
        models.load_pretrained(model)


def test_pretrained_backbone_of_a_checkpoint(tmp_path: Path):
    """Only the backbone of a classifier's checkpoint is taken; the report names what is not."""
    source = small_model("BasicBlock")
    content = {"meta": {"epoch": 1}, "state_dict": source.state_dict()}
    content["state_dict"]["head.fc.weight"] = torch.zeros(3)
    path = tmp_path / "classifier.pth"
    torch.save(content, path)
    init_cfg = [{"type": "Kaiming"}, {"type": "Pretrained", "checkpoint": str(path)}]
    model = small_model("BasicBlock", init_cfg=init_cfg, in_channels=4)
    report = models.load_pretrained(model)
    assert "conv1.weight (4, 3, 7, 7) in the file, (4, 4, 7, 7) here" in report
    assert "head" not in report
    found = model.backbone.layer1[0].conv1.weight
    assert torch.equal(found, source.backbone.layer1[0].conv1.weight)


def test_load_weights_of_other_classes():
    """All of an MMSegmentation checkpoint but the classifier is taken, which the report names."""
    source = small_model("BasicBlock", {"num_classes": 19})
    nn.init.normal_(source.decode_head.convs[0].conv.weight)
    expected = source.state_dict()
    content = {
        "meta": {"CLASSES": ("road",)},
        "state_dict": {f"module.{key}": value for key, value in expected.items()},
    }
    model = small_model("BasicBlock")
    report = models.load_weights(model, content)
    skipped = ["decode_head.conv_seg.weight", "decode_head.conv_seg.bias"]
    assert re.findall(r"[\w.]+(?= \(\d+)", report) == skipped
    assert "missing" not in report
    assert "only in the file" not in report
    for key, value in model.state_dict().items():
        if key not in skipped:
            assert torch.equal(value, expected[key]), key


def test_weights_of_another_model():
    model = small_model("BasicBlock")
    with pytest.raises(models.ConfigError, match="none of the .* tensors fits"):
        models.load_weights(model, {"encoder.weight": torch.zeros(3)})
    with pytest.raises(models.ConfigError, match="but student, teacher: save the network's"):
        models.load_weights(model, {"student": {"a": torch.zeros(3)}, "teacher": None})
    with pytest.raises(models.ConfigError, match="name it in model.backbone.pretrained"):
        models.load_weights(model, model.backbone.state_dict())
    state_dict = model.state_dict()
    key = next(iter(state_dict))
    state_dict[key] = torch.full_like(state_dict[key], math.nan)
    with pytest.raises(models.ConfigError, match=f"{key} holds values that are not finite"):
        models.load_weights(model, state_dict)


def test_weights_of_a_model_of_other_sizes():
    """Batch counters, which have one shape in every model, do not count as weights."""
    model = small_model("BasicBlock")
    state_dict = {}
    for key, value in model.state_dict().items():
        if value.dim() > 0:
            value = torch.cat([value, value])
        state_dict[key] = value
    with pytest.raises(models.ConfigError, match="none of the"):
        models.load_weights(model, state_dict)


# ----------------------------------------------------------------------------------------- Configs


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "backbone",
            {"wth_cp": True},
            r"\.wth_cp: ResNet has no such keyword; did you mean with_cp\?",
        ),
        ("backbone", {"depth": "50"}, r"\.depth: is '50', should be of type int"),
        ("backbone", {"depth": True}, r"\.depth: is True"),
        ("backbone", {"depth": 20}, r": depth is 20; it can be \[18, 34, 50, 101, 152\]"),
        ("backbone", {"with_cp": 1}, r"\.with_cp: is 1, should be of type bool"),
        ("backbone", {"strides": [1, 2, 2.5, 1]}, r"\.strides"),
        ("backbone", {"strides": [1, 2]}, r": num_stages"),
        (
            "backbone",
            {"type": "ResNett"},
            r"\.type: there is no ResNett here; backbones are: .*\. Did you mean ResNet\?",
        ),
        ("backbone", {"style": "caffe"}, r"\.style: is 'caffe'; in ResNet it is always 'pytorch'"),
        (
            "backbone",
            {"norm_cfg": {"type": "GN", "num_groups": 32}},
            r"\.norm_cfg: is .*GN.* always .*BN",
        ),
        ("backbone", {"norm_cfg": {"type": "BN", "requires_grad": False}}, r"\.norm_cfg"),
        ("backbone", {"pretrained": 3}, r"\.pretrained: is 3"),
        ("backbone", {"type": "HRNet", "depth": 18}, r"\.depth: HRNet has no such keyword"),
        ("decode_head", {"num_class": 3}, r"\.num_class: .*did you mean num_classes"),
        ("decode_head", {"in_channels": None}, r"\.in_channels: is None"),
        (
            "decode_head",
            {"in_channels": [64, 512]},
            r": in_channels .* single numbers, or set input_transform",
        ),
        ("decode_head", {"ignore_index": 0}, r"\.ignore_index: is 0; .*always 255"),
        ("decode_head", {"out_channels": 3}, r": out_channels is 3; it can be num_classes, 5"),
        (
            "decode_head",
            {"loss_decode": {"typ": "DiceLoss"}},
            r"\.loss_decode\.typ: CrossEntropyLoss has no such keyword",
        ),
        (
            "decode_head",
            {"loss_decode": {"type": "Dice"}},
            r"\.loss_decode\.type: there is no Dice here; losses are: .*\. Did you mean DiceLoss\?",
        ),
        ("decode_head", {"loss_decode": {"loss_weight": "1"}}, r"\.loss_decode\.loss_weight"),
        (
            "decode_head",
            {"loss_decode": {"type": "DiceLoss", "class_weight": [1.0] * 5}},
            r"\.loss_decode\.class_weight: is .* always None",
        ),
        (
            "decode_head",
            {"loss_decode": {"type": "LovaszLoss", "loss_type": "binary", "class_weight": [2.0]}},
            r"\.loss_decode: class_weight and classes need loss_type",
        ),
        (
            "decode_head",
            {"sampler": {"type": "OHEMPixelSampler", "tresh": 1}},
            r"\.sampler\.tresh: .*did you mean thresh",
        ),
        (
            "neck",
            {"type": "FPN", "in_channels": [64, 128], "out_channels": 8, "num_outs": 3},
            r": num_outs is 3",
        ),
        (
            "auxiliary_head",
            {"type": "FCNHead"},
            r"\.in_channels: is missing; FCNHead needs it",
        ),
    ],
)
def test_error_in_a_section(section: str, change: dict, message: str):
    config = copy.deepcopy(RESNET_18)
    config[section] = config.get(section, {}) | change
    with pytest.raises(models.ConfigError, match=rf"model\.{section}{message}"):
        models.build_model(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_heads": {}}, r"model\.decode_heads: .*did you mean decode_head\?"),
        ({"type": "PointRend"}, r"model\.type: is 'PointRend'"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "a.pth"}}, r"model\.init_cfg: 'a.pth'"),
    ],
)
def test_error_beside_the_sections(change: dict, message: str):
    with pytest.raises(models.ConfigError, match=message):
        models.build_model(RESNET_18 | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_block": [1]}, r"stage2\.num_block: .*num_blocks"),
        ({"block": "BASE"}, r"stage2: block is BASIC"),
        (None, r"stage2: is missing"),
    ],
)
def test_error_in_a_stage_of_hrnet(change: dict | None, message: str):
    stages = dict(HRNET_STAGES)
    stage = stages.pop("stage2")
    if change:
        stages["stage2"] = stage | change
    config = {**RESNET_18, "backbone": {"type": "HRNet", "extra": stages}}
    with pytest.raises(models.ConfigError, match=r"model\.backbone\.extra\." + message):
        models.build_model(config)


def test_error_in_a_cascade_names_the_head_by_its_number():
    first = RESNET_18["decode_head"]
    cascade = [first, {**first, "type": "OCRHead", "ocr_channel": 8}]
    message = r"model\.decode_head\.1\.num_convs: OCRHead has no such keyword"
    with pytest.raises(models.ConfigError, match=message):
        models.build_model({**RESNET_18, "decode_head": cascade})


def test_model_section_of_mmsegmentation():
    """Keys of MMSegmentation's machinery, and values that are fixed here, are accepted."""
    loss_decode = {
        "type": "CrossEntropyLoss",
        "use_sigmoid": False,
        "use_mask": False,
        "reduction": "mean",
    }
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor"},
        "pretrained": "open-mmlab://resnet18_v1c",
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        "backbone": {
            "type": "ResNetV1c",
            "depth": 18,
            "norm_eval": False,
            "style": "pytorch",
            "init_cfg": None,
            "norm_cfg": {"type": "SyncBN", "requires_grad": True},
        },
        "decode_head": {
            **RESNET_18["decode_head"],
            "norm_cfg": {"type": "BN"},
            "act_cfg": {"type": "ReLU"},
            "conv_cfg": None,
            "loss_decode": loss_decode,
        },
    }
    before = copy.deepcopy(config)
    assert models.build_model(config).pretrained == "open-mmlab://resnet18_v1c"
    assert config == before


SLIDE = {"mode": "slide", "crop_size": [128, 128], "stride": [85, 85]}
PREPROCESSOR = {
    "type": "SegDataPreProcessor",
    "mean": [1, 2, 3],
    "std": [4, 5, 6],
    "bgr_to_rgb": True,
    "pad_val": 0,
    "seg_pad_val": 255,
    "size": [64, 64],
}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("test_cfg", "mode", None),
        ("test_cfg", "multi_label", True),
        ("train_cfg", "sampler", "x"),
        ("data_preprocessor", "pad_val", 1),
        ("data_preprocessor", "seg_pad_val", 0),
        ("data_preprocessor", "bgr_to_rgb", False),
        ("data_preprocessor", "rgb_to_bgr", True),
        ("data_preprocessor", "size_divisor", 32),
        ("data_preprocessor", "test_cfg", {"size_divisor": 32}),
        ("data_preprocessor", "batch_augments", [{}]),
        ("data_preprocessor", "type", "Mine"),
    ],
)
def test_pasted_sections(section: str, key: str, value: object):
    """What other sections decide is left to train.py, and what is not done here is an error."""
    config = {"test_cfg": SLIDE, "data_preprocessor": PREPROCESSOR, "train_cfg": {}}
    models.build_model({**RESNET_18, **config})
    if value is None:
        return
    config[section] = {**config[section], key: value}
    with pytest.raises(models.ConfigError, match=rf"model\.{section}\.{key}: is "):
        models.build_model({**RESNET_18, **config})


# ------------------------------------------------------------------------ Frozen parts of backbones

# The prefixes of the stem and of the stages in MMSegmentation's _freeze_stages().
FREEZABLE = {
    "ResNet": ["conv1 bn1", "layer1", "layer2", "layer3", "layer4"],
    "ResNetV1c": ["stem", "layer1", "layer2", "layer3", "layer4"],
    "HRNet": [
        "conv1 bn1 conv2 bn2",
        "layer1 transition1",
        "stage2 transition2",
        "stage3 transition3",
        "stage4",
    ],
    "MobileNetV2": ["conv1", *(f"layer{i}" for i in range(1, 8))],
    "SwinTransformer": [
        "patch_embed drop",
        "stages.0 norm0",
        "stages.1 norm1",
        "stages.2 norm2",
        "stages.3 norm3",
    ],
}
BACKBONE_KEYWORDS = {
    "ResNet": {"depth": 18, "base_channels": 8},
    "ResNetV1c": {"depth": 18, "base_channels": 8, "stem_channels": 8},
    "HRNet": {
        "extra": {
            f"stage{i}": {
                "num_modules": 1,
                "num_branches": i,
                "block": "BOTTLENECK" if i == 1 else "BASIC",
                "num_blocks": [1] * i,
                "num_channels": [8 * 2**k for k in range(i)],
            }
            for i in range(1, 5)
        }
    },
    "MobileNetV2": {"widen_factor": 0.25},
    "SwinTransformer": {"embed_dims": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
}


def build_backbone(kind: str, **keywords) -> nn.Module:
    """As part of a whole network, which freezes it."""
    section = {"type": kind, **BACKBONE_KEYWORDS[kind], **keywords}
    with torch.device("meta"):
        model = models.build_model({**RESNET_18, "backbone": section})
    model.eval()
    return model.train().backbone


@pytest.mark.parametrize("kind", FREEZABLE)
@pytest.mark.parametrize("frozen_stages", [-1, 0, 2])
def test_frozen_stages(kind: str, frozen_stages: int):
    """The parameters of the first stages are not trained, and their norms stay in evaluation."""
    backbone = build_backbone(kind, frozen_stages=frozen_stages)
    parts = " ".join(FREEZABLE[kind][: frozen_stages + 1]).split()
    frozen = tuple(f"{part}." for part in parts)
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name
    for name, module in backbone.named_modules():
        is_frozen = f"{name}.".startswith(frozen)
        if kind == "MobileNetV2" and name.startswith("conv1"):
            is_frozen = False  # of its stem, only the parameters
        assert module.training == (not is_frozen), name


@pytest.mark.parametrize("kind", ["ResNet", "HRNet", "MobileNetV2"])
def test_norm_eval(kind: str):
    backbone = build_backbone(kind, norm_eval=True)
    for module in backbone.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert module.training == (not is_norm)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_frozen_stages_that_do_not_exist():
    with pytest.raises(models.ConfigError, match="frozen_stages is 5; it can be -1 to 4"):
        build_backbone("ResNet", frozen_stages=5)
    section = {"type": "MixVisionTransformer", "frozen_stages": 1}
    with pytest.raises(models.ConfigError, match="it has to be -1 in this backbone"):
        models.construct(models.BACKBONES, section, "model.backbone")


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (float, [1, 1.5], [True, "1", None]),
        (int, [1], [1.5, True, None]),
        (bool, [True], [1, 0]),
        (str, ["a"], [1]),
        (int | None, [1, None], [1.5]),
        (list[int], [[1, 2], []], [[1, "2"], "12", 1]),
        (tuple[int, int], [[512, 1024]], [[512], [1, 2, 3]]),
        (dict | list[dict], [{"type": "a"}, [{"type": "a"}]], [["a"], "a"]),
        (str | list[int], ["all", [1]], [["all"]]),
    ],
)
def test_values_are_checked_by_annotations(annotation, right: list, wrong: list):
    assert all(models.fits(value, annotation) for value in right)
    assert not any(models.fits(value, annotation) for value in wrong)


def test_check_keywords_of_a_function():
    def function(*, lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        raise AssertionError

    def check(section: dict) -> None:
        models.check_keywords(function, section, "optimizer")

    check({"lr": 1, "betas": [0.9, 1]})
    message = r"optimizer\.beta: function has no such keyword; did you mean betas\?"
    with pytest.raises(models.ConfigError, match=message):
        check({"lr": 1, "beta": 1})
    with pytest.raises(models.ConfigError, match=r"optimizer\.lr: is missing"):
        check({})
