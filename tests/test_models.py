"""The nets against MMSegmentation's own numbers (tests/parity), torchvision's weights, losses by hand, and what must not change them."""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models

PARITY = Path(__file__).parent / "parity"
NAMES = sorted(path.stem for path in PARITY.glob("*.npz"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------------------------
# MMSegmentation's numbers
# ---------------------------------------------------------------------------------------------------------------------------------------
def normal(key: str, shape: tuple) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)


def filled(key: str, shape: list[int]) -> Tensor:
    """A checkpoint's entry, by the rule that tests/parity/README.md states."""
    n, name = normal(key, tuple(shape)), key.rsplit(".", 1)[-1]
    if name == "running_var":
        n = 1 + 0.1 * abs(n)
    elif name in ("running_mean", "bias"):
        n = 0.1 * n
    elif len(shape) >= 2:
        n = n / math.sqrt(math.prod(shape[1:]))
    else:
        n = 1 + 0.1 * n
    return torch.as_tensor(n)


def image(key: str = "input") -> Tensor:
    return torch.as_tensor(normal(key, (2, 3, 97, 129)))


def labels(num_classes: int, key: str = "labels") -> Tensor:
    y = np.random.default_rng(zlib.crc32(key.encode())).integers(0, num_classes, (2, 97, 129))
    y[:, :9] = 255
    return torch.as_tensor(y)


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.p = 0.0
    return model


def reference(name: str) -> tuple[models.Segmentor, dict]:
    """The net of tests/parity, in float64 with the rule's weights; all its keys have to match."""
    described = json.loads((PARITY / f"{name}.json").read_text())
    before = json.dumps(described["model"])
    model = models.build_model(described["model"]).double()
    assert json.dumps(described["model"]) == before
    assert sum(p.numel() for p in model.parameters()) == described["parameters"]
    own = model.state_dict()
    state = {
        key: own[key] if mark else filled(key, shape)
        for key, shape, *mark in described["checkpoint"]
    }
    assert [tuple(own[key].shape) for key, *_ in described["checkpoint"]] == [
        tuple(shape) for _, shape, *_ in described["checkpoint"]
    ]
    model.load_state_dict(state, strict=True)
    return without_dropout(model), described


@pytest.mark.parametrize("name", NAMES)
def test_parity(name: str):
    model, _ = reference(name)
    expected = dict(np.load(PARITY / f"{name}.npz"))
    with torch.no_grad():
        logits = model.eval()(image())
    assert np.allclose(
        logits, expected["logits"], rtol=0, atol=1e-8 * abs(expected["logits"]).max()
    )
    losses = model.train()(image(), labels(model.num_classes))
    assert set(losses) == set(expected) - {"logits", "loss", "grad_norm"}
    loss = sum(losses.values())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    for key, value in {**losses, "loss": loss, "grad_norm": norm}.items():
        assert value.item() == pytest.approx(float(expected[key]), rel=1e-8), key


CONFIGS = Path(__file__).parent.parent / "configs"
PUBLISHED = [
    path
    for name in NAMES
    if "_r50" in name
    for path in sorted(CONFIGS.glob(f"{name}_*_cityscapes.json"))
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_configs_hold_the_published_nets(path: Path):
    """Strides, dilations and channels, which no checkpoint's keys would tell apart."""
    described = json.loads((PARITY / f"{path.stem.rsplit('_', 3)[0]}.json").read_text())["model"]
    with torch.device("meta"):
        mine, theirs = (
            models.build_model(json.loads(path.read_text())["model"]),
            models.build_model(described),
        )
    assert repr(mine.backbone) == repr(theirs.backbone)
    assert repr(mine.neck) == repr(theirs.neck)
    assert repr(mine.decode_head) == repr(theirs.decode_head)
    assert repr(mine.auxiliary_head) == repr(theirs.auxiliary_head)


@pytest.mark.parametrize("name", ["pspnet_r18b-d8", "segformer_mit-b0"])
def test_trajectory(name: str):
    """Six steps; the parameter groups, the optimizer and the learning rates are the file's."""
    told = json.loads((PARITY / f"{name}.trajectory.json").read_text())
    model, _ = reference(name)
    options = dict(told["optim_wrapper"]["optimizer"])
    kind, parameters = options.pop("type"), dict(model.named_parameters())
    group_of, groups = {}, []
    for title, names in told[
        "parameter_groups"
    ].items():  # "lr x10, weight_decay 0.01": names, or the number of all the rest
        group_of |= (
            {name: title for name in names}
            if len(names) > 1
            else {name: title for name in parameters if name not in group_of}
        )
    for title, names in told["parameter_groups"].items():
        factor, decay = map(float, re.match(r"lr x(\S+), weight_decay (\S+)", title).groups())
        members = [p for name, p in parameters.items() if group_of[name] == title]
        assert len(members) == (len(names) if len(names) > 1 else names[0])
        groups.append({"params": members, "weight_decay": decay, "factor": factor})
    optimizer = getattr(torch.optim, kind)(groups, **options)
    for i, step in enumerate(told["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = step["lrs"][0] * group["factor"]
        loss = sum(model(image(f"input{i}"), labels(model.num_classes, f"labels{i}")).values())
        assert loss.item() == pytest.approx(step["loss"], rel=1e-8), i
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------------------------
# Settings that must not change the numbers
# ---------------------------------------------------------------------------------------------------------------------------------------
STAGE = {"num_modules": 1, "block": "BASIC"}
SMALL = {  # one of each backbone, small, and the channels of its last map
    "BasicBlock": ({"type": "ResNet", "depth": 18, "base_channels": 4, "stem_channels": 4}, 32),
    "Bottleneck": ({"type": "ResNetV1c", "depth": 50, "base_channels": 4, "stem_channels": 4}, 128),
    "HRNet": (
        {
            "type": "HRNet",
            "extra": {
                "stage1": {
                    "num_modules": 1,
                    "num_branches": 1,
                    "block": "BOTTLENECK",
                    "num_blocks": [1],
                    "num_channels": [4],
                },
                "stage2": {
                    **STAGE,
                    "num_branches": 2,
                    "num_blocks": [1] * 2,
                    "num_channels": [4, 6],
                },
                "stage3": {
                    **STAGE,
                    "num_branches": 3,
                    "num_blocks": [1] * 3,
                    "num_channels": [4, 6, 8],
                },
                "stage4": {
                    **STAGE,
                    "num_branches": 4,
                    "num_blocks": [1] * 4,
                    "num_channels": [4, 6, 8, 10],
                },
            },
        },
        10,
    ),
    "MixVisionTransformer": (
        {
            "type": "MixVisionTransformer",
            "embed_dims": 4,
            "num_layers": [1] * 4,
            "drop_path_rate": 0.3,
        },
        32,
    ),
    "MobileNetV2": ({"type": "MobileNetV2", "widen_factor": 0.25}, 80),
    "ConvNeXt": (
        {"type": "ConvNeXt", "arch": "tiny", "layer_scale_init_value": 1.0, "drop_path_rate": 0.3},
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
HEAD = {
    "type": "FCNHead",
    "in_index": -1,
    "channels": 8,
    "num_convs": 1,
    "concat_input": False,
    "num_classes": 5,
}


def small(name: str, head: dict = {}, **backbone) -> models.Segmentor:
    section, channels = SMALL[name]
    torch.manual_seed(0)
    return models.build_model(
        {
            "backbone": {**section, **backbone},
            "decode_head": {**HEAD, "in_channels": channels, **head},
        }
    )


def batch(num_classes: int = 5, size: tuple[int, int] = (64, 80)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(num_classes, (2, *size), generator=generator, dtype=torch.uint8)
    label[0, :5] = 255
    return torch.randn(2, 3, *size, generator=generator), label


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)  # of dropout
    losses = model(x, y)
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {
        k: v.detach() for k, v in losses.items()
    }


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_nothing(name: str):
    """Gradients, losses and BN's statistics are the same bit for bit; with dropout and stochastic depth on."""
    x, y = batch()
    plain, cp = small(name), small(name, with_cp=True)
    assert cp.backbone.with_cp
    expected, got = gradients(plain, x, y), gradients(cp, x, y)
    assert set(expected) == set(got) and all(torch.equal(expected[k], got[k]) for k in expected)
    for (key, a), (_, b) in zip(plain.named_buffers(), cp.named_buffers()):
        assert torch.equal(a, b), key
        assert not key.endswith("num_batches_tracked") or a == 1


def test_checkpointing_stores_less():
    saved = {}
    for with_cp in (False, True):
        seen: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.append(t.numel()) or t, lambda t: t
        ):
            small("Bottleneck", with_cp=with_cp)(*batch())
        saved[with_cp] = sum(seen)
    assert saved[True] < 0.5 * saved[False]


@pytest.mark.parametrize(
    "name", ["Bottleneck", "MixVisionTransformer", "SwinTransformer", "ConvNeXt"]
)
def test_layouts_and_precisions(name: str):
    """channels_last gives the same, bf16 autocast nearly; on the meta device it runs without values."""
    x, y = batch()
    model = without_dropout(small(name))
    expected = gradients(model, x, y)["decode.loss_ce"]
    layout = without_dropout(small(name)).to(memory_format=torch.channels_last)
    assert torch.allclose(
        gradients(layout, x.to(memory_format=torch.channels_last), y)["decode.loss_ce"],
        expected,
        rtol=1e-5,
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = without_dropout(small(name))(x, y)["decode.loss_ce"]
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected, rtol=0.02)
    with torch.device("meta"):
        meta = small(name)
    got = gradients(meta, x.to("meta"), y.to("meta"))
    assert all(v.is_meta for v in got.values())


@pytest.mark.parametrize("with_cp", [False, True])
def test_compiled(with_cp: bool):
    x, y = batch()
    expected = gradients(without_dropout(small("BasicBlock", with_cp=with_cp)), x, y)
    model = without_dropout(small("BasicBlock", with_cp=with_cp))
    run_compiled = models.compiled(model, backend="aot_eager")
    got = gradients(run_compiled, x, y)
    got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
    assert all(torch.allclose(got[k], expected[k], rtol=1e-4, atol=1e-5) for k in expected)
    assert all(b == 1 for key, b in model.named_buffers() if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    ("size", "grid"), [((13, 17), 6), ((64, 128), 3), ((5, 4), 6), ((8, 9), 1)]
)
def test_pooling_by_matrices_is_pooling(size, grid, monkeypatch):
    """The way taken on a GPU where everything must repeat bit for bit."""
    x, pool = torch.randn(2, 3, *size, dtype=torch.float64), models.AdaptiveAvgPool(grid)
    rows, columns = (pool.means(s, x) for s in size)
    assert torch.allclose(rows @ x @ columns.T, F.adaptive_avg_pool2d(x, grid), rtol=1e-12)


def test_initial_weights():
    """Residual branches start at zero, the classifier small, convolutions as He's."""
    model = small("Bottleneck", base_channels=64)
    assert all(
        m.bn3.weight.eq(0).all() for m in model.modules() if isinstance(m, models.Bottleneck)
    )
    assert model.decode_head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.3)
    conv = model.backbone.layer3[1].conv2.weight
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (conv.shape[0] * 9)), rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------------------------
def logits_and_label(
    channels: int = 4, classes: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Small logits, their up-sampled selves and a label with ignored pixels."""
    logits = torch.randn(3, channels, 5, 6, dtype=torch.float64, requires_grad=True)
    label = torch.randint(classes or channels, (3, 17, 23), dtype=torch.uint8)
    label[:, :4] = 255
    return logits, F.interpolate(logits, (17, 23), mode="bilinear", align_corners=False), label


def loss(kind: str, **options) -> nn.Module:
    return models.construct(models.LOSSES, {"type": kind, **options}, "loss_decode").double()


def brute_lovasz(errors: list[float], truth: list[int]) -> float:
    """By its definition: the errors in falling order, each times what it adds to the Jaccard loss."""
    pairs, before, result = sorted(zip(errors, truth), reverse=True), 0.0, 0.0
    for k in range(len(pairs)):
        wrong = pairs[: k + 1]
        missed, invented = sum(t for _, t in wrong), sum(1 - t for _, t in wrong)
        jaccard = 1 - (sum(truth) - missed) / (sum(truth) + invented)
        result, before = result + max(pairs[k][0], 0) * (jaccard - before), jaccard
    return result


def by_hand(name: str, full: Tensor, label: Tensor) -> Tensor:
    """Each loss, written down plainly on logits of the label's size."""
    valid, y = label != 255, label.long()
    hot = torch.stack([(y == c) for c in range(full.shape[1])], 1).double()
    if name == "mean over all":
        return F.cross_entropy(full, y, ignore_index=255, reduction="sum") / y.numel()
    if name == "mean over valid":
        return F.cross_entropy(full, y, ignore_index=255)
    if name == "weighted":
        return 0.5 * F.cross_entropy(
            full, y, torch.tensor([1.0, 2, 3, 4]).double(), ignore_index=255
        )
    if name == "sigmoid":
        factors = torch.tensor([1.0, 2, 3, 4]).double().view(-1, 1, 1)
        entries = F.binary_cross_entropy_with_logits(
            full, hot, pos_weight=factors, reduction="none"
        )
        return entries.permute(0, 2, 3, 1)[valid].sum() / full.numel()
    if name == "dice":
        result = 0
        for i in range(len(full)):
            p, t = full[i].softmax(0)[:, valid[i]], hot[i][:, valid[i]]
            result += 1 - 2 * (p * t).sum() / ((p**2).sum() + (t**2).sum() + 2e-3)
        return result / len(full)
    if name == "focal":
        p = torch.where(hot > 0, full.sigmoid(), 1 - full.sigmoid()).permute(0, 2, 3, 1)[valid]
        alpha = torch.where(hot > 0, 0.25, 0.75).permute(0, 2, 3, 1)[valid]
        return -(alpha * (1 - p) ** 1.5 * p.log()).sum() / full.numel()
    if name in ("lovasz", "lovasz per image"):
        groups = (
            [(full.softmax(1), label)]
            if name == "lovasz"
            else [(full[i : i + 1].softmax(1), label[i : i + 1]) for i in range(len(full))]
        )
        results = []
        for p, t in groups:
            p, t = p.permute(0, 2, 3, 1)[t != 255], t[t != 255]
            found = [
                brute_lovasz((p[:, c] - (t == c).double()).abs().tolist(), (t == c).int().tolist())
                for c in t.unique().tolist()
            ]
            results.append(sum(found) / len(found))
        return torch.tensor(sum(results) / len(results), dtype=torch.float64)
    assert name == "lovasz hinge"
    sign = 2 * (y[valid] == 1).double() - 1
    return torch.tensor(
        brute_lovasz((1 - full[:, 0][valid] * sign).tolist(), (y[valid] == 1).int().tolist()),
        dtype=torch.float64,
    )


LOSSES = {
    "mean over all": ("CrossEntropyLoss", {}),
    "mean over valid": ("CrossEntropyLoss", {"avg_non_ignore": True}),
    "weighted": (
        "CrossEntropyLoss",
        {"avg_non_ignore": True, "class_weight": [1, 2, 3, 4], "loss_weight": 0.5},
    ),
    "sigmoid": ("CrossEntropyLoss", {"use_sigmoid": True, "class_weight": [1, 2, 3, 4]}),
    "dice": ("DiceLoss", {"use_sigmoid": False}),
    "focal": ("FocalLoss", {"gamma": 1.5, "alpha": 0.25}),
    "lovasz": ("LovaszLoss", {"reduction": "none"}),
    "lovasz per image": ("LovaszLoss", {"per_image": True}),
    "lovasz hinge": ("LovaszLoss", {"loss_type": "binary"}),
}


@pytest.mark.parametrize("chunk", [1, 2**25])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_by_hand(name: str, chunk: int, monkeypatch):
    """Values and gradients, one image at a time and all at once; an ignored pixel moves nothing."""
    monkeypatch.setattr(models, "CHUNK", chunk)
    logits, full, label = logits_and_label(
        1 if name == "lovasz hinge" else 4, 2 if name == "lovasz hinge" else 4
    )
    kind, options = LOSSES[name]
    criterion = loss(kind, **options)
    value = criterion(logits, label)
    expected = by_hand(name, full, label)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    if expected.requires_grad:
        (gradient,) = torch.autograd.grad(3 * value, logits)
        assert torch.allclose(
            gradient, 3 * torch.autograd.grad(expected, logits)[0], rtol=1e-9, atol=1e-15
        )
    full = full.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(full, label), full)
    ignored = (label == 255).unsqueeze(1).expand_as(gradient)
    assert gradient[ignored].eq(0).all() and gradient[~ignored].ne(0).any()


def test_hard_pixels():
    """OHEM: at least min_kept pixels an image, all below the threshold; the others have no gradient."""
    logits, full, label = logits_and_label()
    p = full.softmax(1).gather(1, label.long().clamp(max=3).unsqueeze(1)).squeeze(1)
    valid = label != 255
    assert torch.equal(
        models.OHEMPixelSampler(thresh=0.4, min_kept=10)(logits, label, False) > 0,
        valid & (p < 0.4),
    )
    few = models.OHEMPixelSampler(thresh=1e-9, min_kept=10)(logits, label, False)
    assert few.sum() == 30 and p[few > 0].max() < p[valid & (few == 0)].min()
    assert torch.equal(models.OHEMPixelSampler(min_kept=10)(logits, label, False), few)
    assert models.OHEMPixelSampler(min_kept=10**9)(logits, label, False).sum() == valid.sum()
    assert (
        models.OHEMPixelSampler(thresh=0.4)(logits, torch.full_like(label, 255), False).sum() == 0
    )
    sampler = {"type": "OHEMPixelSampler", "thresh": 0.4, "min_kept": 10}
    head = models.construct(
        models.HEADS, {**HEAD, "in_channels": 4, "num_classes": 4, "sampler": sampler}, "head"
    )
    value = head.loss({"": logits}, label)["loss_ce"]
    kept = F.cross_entropy(full, label.long(), ignore_index=255, reduction="none")[
        valid & (p < 0.4)
    ]
    assert value.item() == pytest.approx((kept.sum() / label.numel()).item())


def test_several_losses_and_their_names():
    several = [
        {"type": "CrossEntropyLoss", "loss_weight": 2.0},
        {"type": "DiceLoss", "loss_weight": 3.0},
        {"type": "LovaszLoss", "loss_name": "loss_dice"},
        {"type": "FocalLoss", "loss_name": "loss_mine"},
    ]
    losses = small("BasicBlock", {"loss_decode": several, "dropout_ratio": 0})(*batch())
    assert list(losses) == ["decode.loss_ce", "decode.loss_dice", "decode.loss_mine"]
    alone = [
        small("BasicBlock", {"loss_decode": section, "dropout_ratio": 0})(*batch())
        for section in several
    ]
    (ce,), (dice,), (lovasz,), _ = ([*found.values()] for found in alone)
    assert losses["decode.loss_ce"] == ce and torch.allclose(
        losses["decode.loss_dice"], dice + lovasz
    )


def test_binary():
    """One channel for two classes: equal to two channels of which the first is zero."""
    model = small(
        "BasicBlock",
        {
            "num_classes": 2,
            "out_channels": 1,
            "loss_decode": {"use_sigmoid": True, "avg_non_ignore": True},
        },
    )
    x, y = batch(2)
    logits = model.eval()(x)
    assert (model.num_classes, model.out_channels, logits.shape[1]) == (2, 1, 1)
    full = F.interpolate(logits, y.shape[1:], mode="bilinear")
    expected = F.cross_entropy(
        torch.cat([torch.zeros_like(full), full], 1), y.long(), ignore_index=255
    )
    assert torch.allclose(model(x, y)["decode.loss_ce"], expected)
    with pytest.raises(models.ConfigError, match="use_sigmoid"):
        small("BasicBlock", {"num_classes": 2, "out_channels": 1})


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that comes into being."""

    values = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.values = max(self.values, t.numel() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize(
    "criterion",
    [loss("CrossEntropyLoss"), loss("DiceLoss"), loss("FocalLoss")],
    ids=lambda c: type(c).__name__,
)
def test_full_resolution_never_exists_for_the_whole_batch(criterion: nn.Module, monkeypatch):
    """With 150 classes the logits at full resolution would be the largest tensor of the whole step."""
    monkeypatch.setattr(models, "CHUNK", 150 * 64 * 64)
    logits, label = (
        torch.randn(8, 150, 16, 16, requires_grad=True),
        torch.randint(150, (8, 64, 64), dtype=torch.uint8),
    )
    with Largest() as seen:
        criterion(logits, label).backward()
    assert seen.values <= 150 * 64 * 64
    with Largest() as seen:
        F.cross_entropy(F.interpolate(logits, (64, 64), mode="bilinear"), label.long()).backward()
    assert seen.values == 8 * 150 * 64 * 64


def test_small_gradients_survive_half_precision():
    """The loss's gradient is kept in float32 until the scaler has multiplied it."""
    logits, label = (
        torch.randn(1, 3, 64, 64).half().requires_grad_(),
        torch.randint(3, (1, 256, 256)),
    )
    (loss("CrossEntropyLoss").float()(logits, label) * 2**16).backward()
    exact = logits.detach().float().requires_grad_()
    (loss("CrossEntropyLoss").float()(exact, label) * 2**16).backward()
    assert torch.allclose(logits.grad.float(), exact.grad, rtol=2e-3, atol=1e-6)


def rank_of_two(rank: int, path: str, expected: Tensor) -> None:
    """Half of the batch each, with different numbers of valid pixels; the average of the gradients is the whole batch's."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    logits, label = uneven()
    half = logits.detach()[rank::2].requires_grad_()
    for options in (
        {"avg_non_ignore": True},
        {"avg_non_ignore": True, "class_weight": [1, 2, 3, 4]},
    ):
        loss("CrossEntropyLoss", **options)(half, label[rank::2]).backward()
    mean = half.grad / 2
    assert torch.allclose(mean, expected[rank::2], rtol=1e-12)
    alone = loss(
        "CrossEntropyLoss", avg_non_ignore=True
    ).eval()  # evaluation asks nobody: ranks may have different numbers of images
    if rank == 0:
        alone(half, label[rank::2])
    dist.destroy_process_group()


def uneven() -> tuple[Tensor, Tensor]:
    logits, _, label = logits_and_label()
    label = torch.cat([label, label])[:4]
    label[1, 6:] = 255
    return torch.cat([logits, logits])[:4].detach(), label


def test_divisor_over_processes(tmp_path: Path):
    logits, label = uneven()
    logits.requires_grad_()
    for options in (
        {"avg_non_ignore": True},
        {"avg_non_ignore": True, "class_weight": [1, 2, 3, 4]},
    ):
        loss("CrossEntropyLoss", **options)(logits, label).backward()
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path / "store"), logits.grad), nprocs=2)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Weights from files
# ---------------------------------------------------------------------------------------------------------------------------------------
def random_statistics(net: nn.Module) -> nn.Module:
    """So that BN, layer scale and the like take part."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    for name, p in net.named_parameters():
        if p.dim() == 1 or "layer_scale" in name:
            nn.init.uniform_(p, 0.5, 1.5)
        elif "relative_position" in name:
            nn.init.normal_(p)
    return net.eval()


TORCHVISION = {
    "resnet18": {"type": "ResNet", "depth": 18},
    "resnet50": {"type": "ResNet", "depth": 50},
    "resnext50_32x4d": {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4},
    "mobilenet_v2": {"type": "MobileNetV2"},
    "swin_t": {"type": "SwinTransformer"},
    "convnext_tiny": {"type": "ConvNeXt"},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_weights(name: str, tmp_path: Path):
    """A file of torchvision's weights gives torchvision's feature maps."""
    net = random_statistics(getattr(torchvision.models, name)(weights=None))
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    backbone = {**TORCHVISION[name], "pretrained": str(path)}
    model = models.build_model(
        {"backbone": backbone, "decode_head": {**HEAD, "in_channels": 8}}
    ).eval()
    assert model.backbone.torchvision_name == name
    report = models.load_pretrained(model)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        got = model.backbone(x)
        if name.startswith("res"):
            assert "missing" not in report
            expected = net.layer4(
                net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))
            )
            assert torch.allclose(got[3], expected, rtol=1e-4, atol=1e-5)
        elif name == "mobilenet_v2":
            assert "missing" not in report
            for mine, until in zip(got, (4, 7, 14, 18)):
                assert torch.allclose(mine, net.features[:until](x), rtol=1e-4, atol=1e-5)
        else:
            missing = {f"norm{i}.{k}" for i in range(3) for k in ("weight", "bias")}
            assert set(re.search("missing in the file: (.*?);", report)[1].split(", ")) == missing
            for i, mine in enumerate(got):
                theirs = net.features[: 2 * i + 2](x)
                theirs = theirs if name == "swin_t" else theirs.permute(0, 2, 3, 1)
                norm = getattr(model.backbone, f"norm{i}")
                theirs = F.layer_norm(
                    theirs, theirs.shape[3:], norm.weight, norm.bias, norm.eps
                ).permute(0, 3, 1, 2)
                assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4), i


def test_pretrained_by_name(tmp_path: Path, monkeypatch):
    """A name is fetched through torch.hub's cache; without network the error says how to bring the file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")),
    )
    model = models.build_model({**GOOD, "pretrained": "IMAGENET1K_V1"})
    with pytest.raises(
        models.ConfigError,
        match=r"models/resnet18.*--options model.backbone.pretrained=/path/to/resnet18",
    ):
        models.load_pretrained(model)
    file = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    net = torchvision.models.resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    assert "loaded 100 of 100 tensors" in models.load_pretrained(model)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    for wrong, message in {
        "IMAGENET1K_V9": "did you mean IMAGENET1K_V1",
        "open-mmlab://resnet50": "open-mmlab://resnet50_v1c",
        "open-mmlab://resnet50_v1c": "third_party/resnet50_v1c-2cccc1ad.pth",
    }.items():
        model.pretrained = wrong
        with pytest.raises(models.ConfigError, match=message):
            models.load_pretrained(model)
    model.pretrained = None
    assert models.load_pretrained(model) is None


def test_unreadable_weights(tmp_path: Path):
    class Code:
        def __reduce__(self):
            return print, ("this must not run",)

    for content in (b"", b"nonsense", None):
        path = tmp_path / "weights.pth"
        path.write_bytes(content) if content is not None else torch.save(
            {"state_dict": Code()}, path
        )
        model = small("BasicBlock", pretrained=str(path))
        with pytest.raises(models.ConfigError, match="cannot be read as weights"):
            models.load_pretrained(model)


def test_pretrained_backbone_of_a_checkpoint(tmp_path: Path):
    """A classifier's checkpoint: its backbone alone is taken, out of `state_dict`; the report says what was not."""
    source = small("BasicBlock")
    torch.save(
        {
            "meta": {"epoch": 1},
            "state_dict": {**source.state_dict(), "head.fc.weight": torch.zeros(3)},
        },
        tmp_path / "a.pth",
    )
    model = small(
        "BasicBlock",
        init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "a.pth")},
        in_channels=4,
    )
    report = models.load_pretrained(model)
    assert (
        "conv1.weight (4, 3, 7, 7) in the file, (4, 4, 7, 7) here" in report
        and "head" not in report
    )
    assert torch.equal(
        model.backbone.layer1[0].conv1.weight, source.backbone.layer1[0].conv1.weight
    )


def test_load_weights_with_other_classes():
    """An MMSegmentation checkpoint with its `meta`, of a wrapped net: all but the classifier is taken, and that is named."""
    source = small("BasicBlock", {"num_classes": 19})
    nn.init.normal_(source.decode_head.convs[0].conv.weight)
    state = {
        "meta": {"CLASSES": ("road",)},
        "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()},
    }
    model = small("BasicBlock")
    report = models.load_weights(model, state)
    assert re.findall(r"[\w.]+(?= \(\d+)", report) == [
        "decode_head.conv_seg.weight",
        "decode_head.conv_seg.bias",
    ]
    assert "missing" not in report and "in the file alone" not in report
    for key, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]) or "conv_seg" in key, key
    with pytest.raises(models.ConfigError, match="none of the .* tensors fits"):
        models.load_weights(model, {"encoder.weight": torch.zeros(3)})


def test_torchvision_fcn():
    """torchvision's fcn_resnet50, tensor by tensor: the same logits; of deeplabv3_resnet50 what the nets share."""
    net = random_statistics(
        torchvision.models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        )
    )
    backbone = {
        "type": "ResNet",
        "depth": 50,
        "strides": [1, 2, 1, 1],
        "dilations": [1, 1, 2, 4],
        "contract_dilation": True,
    }
    head = {**HEAD, "in_channels": 2048, "in_index": 3, "channels": 512}
    model = models.build_model(
        {
            "backbone": backbone,
            "decode_head": head,
            "auxiliary_head": {**head, "in_channels": 1024, "in_index": 2, "channels": 256},
        }
    ).eval()
    report = models.load_weights(model, net.state_dict())
    assert re.search(r"loaded (\d+) of \1 tensors$", report)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = F.interpolate(model(x), (64, 64), mode="bilinear")
        assert torch.allclose(logits, net(x)["out"], rtol=1e-4, atol=1e-4)
    deeplab = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=5
    )
    with torch.device("meta"):
        head = {
            "type": "ASPPHead",
            "in_channels": 2048,
            "channels": 256,
            "num_classes": 5,
            "dilations": [1, 12, 24, 36],
        }
        model = models.build_model({"backbone": backbone, "decode_head": head})
    report = models.load_weights(model.to_empty(device="cpu"), deeplab.state_dict())
    assert re.search("missing in the file: ([^;]*)", report)[1].split(", ") == [
        f"decode_head.bottleneck.{k}"
        for k in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    ]


# ---------------------------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------------------------
GOOD = {"backbone": {"type": "ResNet", "depth": 18}, "decode_head": {**HEAD, "in_channels": 512}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": {"wth_cp": True}},
            r"model\.backbone\.wth_cp: ResNet has no such keyword; did you mean with_cp\?",
        ),
        ({"backbone": {"depth": "50"}}, r"model\.backbone\.depth: is '50', should be of type int"),
        ({"backbone": {"depth": True}}, r"model\.backbone\.depth: is True"),
        (
            {"backbone": {"depth": 20}},
            r"model\.backbone: depth is 20; it can be \[18, 34, 50, 101, 152\]",
        ),
        ({"backbone": {"with_cp": 1}}, r"model\.backbone\.with_cp: is 1, should be of type bool"),
        ({"backbone": {"strides": [1, 2, 2.5, 1]}}, r"model\.backbone\.strides"),
        ({"backbone": {"strides": [1, 2]}}, r"model\.backbone: num_stages"),
        (
            {"backbone": {"type": "ResNett"}},
            r"model\.backbone\.type: is 'ResNett'; did you mean ResNet",
        ),
        (
            {"backbone": {"style": "caffe"}},
            r"model\.backbone\.style: is 'caffe'; in ResNet it is always 'pytorch'",
        ),
        (
            {"backbone": {"norm_cfg": {"type": "GN", "num_groups": 32}}},
            r"model\.backbone\.norm_cfg: is .*GN.* always .*BN",
        ),
        (
            {"backbone": {"norm_cfg": {"type": "BN", "requires_grad": False}}},
            r"model\.backbone\.norm_cfg",
        ),
        ({"backbone": {"pretrained": 3}}, r"model\.backbone\.pretrained: is 3"),
        (
            {"decode_head": {"num_class": 3}},
            r"model\.decode_head\.num_class: .*did you mean num_classes",
        ),
        ({"decode_head": {"in_channels": None}}, r"model\.decode_head\.in_channels: is None"),
        (
            {"decode_head": {"in_channels": [64, 512]}},
            r"model\.decode_head: in_channels .* single numbers, or set input_transform",
        ),
        (
            {"decode_head": {"ignore_index": 0}},
            r"model\.decode_head\.ignore_index: is 0; .*always 255",
        ),
        (
            {"decode_head": {"out_channels": 3}},
            r"model\.decode_head: out_channels is 3; it can be num_classes, 5",
        ),
        (
            {"decode_head": {"loss_decode": {"typ": "DiceLoss"}}},
            r"model\.decode_head\.loss_decode\.typ: CrossEntropyLoss has no such keyword",
        ),
        (
            {"decode_head": {"loss_decode": {"type": "Dice"}}},
            r"model\.decode_head\.loss_decode\.type: is 'Dice'; did you mean DiceLoss\?",
        ),
        (
            {"decode_head": {"loss_decode": {"loss_weight": "1"}}},
            r"model\.decode_head\.loss_decode\.loss_weight",
        ),
        (
            {"decode_head": {"sampler": {"type": "OHEMPixelSampler", "tresh": 1}}},
            r"model\.decode_head\.sampler\.tresh: .*did you mean thresh",
        ),
        ({"decode_heads": {}}, r"model\.decode_heads: .*did you mean decode_head\?"),
        (
            {"neck": {"type": "FPN", "in_channels": [64, 128], "out_channels": 8, "num_outs": 3}},
            r"model\.neck: num_outs is 3",
        ),
        (
            {"auxiliary_head": {"type": "FCNHead"}},
            r"model\.auxiliary_head\.in_channels: is missing; FCNHead needs it",
        ),
        ({"type": "PointRend"}, r"model\.type: is 'PointRend'"),
        (
            {"backbone": {"type": "HRNet", "depth": 18}},
            r"model\.backbone\.depth: HRNet has no such keyword",
        ),
    ],
)
def test_config_errors(change: dict, message: str):
    config = {**GOOD, **{k: {**GOOD[k], **v} if k in GOOD else v for k, v in change.items()}}
    with pytest.raises(models.ConfigError, match=message):
        models.build_model(config)


def test_nested_config_errors():
    extra = SMALL["HRNet"][0]["extra"]
    for broken, message in (
        (
            {**extra, "stage2": {**extra["stage2"], "num_block": [1]}},
            r"stage2\.num_block: .*num_blocks",
        ),
        ({**extra, "stage2": {**extra["stage2"], "block": "BASE"}}, r"stage2: block is BASIC"),
        ({k: v for k, v in extra.items() if k != "stage3"}, r"stage3: is missing"),
    ):
        with pytest.raises(models.ConfigError, match=r"model\.backbone\.extra\." + message):
            models.build_model({**GOOD, "backbone": {"type": "HRNet", "extra": broken}})
    cascade = {
        **GOOD,
        "decode_head": [
            GOOD["decode_head"],
            {**GOOD["decode_head"], "type": "OCRHead", "ocr_channel": 8},
        ],
    }
    with pytest.raises(
        models.ConfigError, match=r"model\.decode_head\.1\.num_convs: OCRHead has no such keyword"
    ):
        models.build_model(cascade)


def test_mmsegmentation_dict():
    """What its configs hold beside the net itself is taken or left, as it means."""
    config = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor"},
        "pretrained": "open-mmlab://resnet18_v1c",
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
        **GOOD,
        "backbone": {
            "type": "ResNetV1c",
            "depth": 18,
            "norm_eval": False,
            "style": "pytorch",
            "init_cfg": None,
            "norm_cfg": {"type": "SyncBN", "requires_grad": True},
        },
        "decode_head": {
            **GOOD["decode_head"],
            "norm_cfg": {"type": "BN"},
            "act_cfg": {"type": "ReLU"},
            "conv_cfg": None,
            "loss_decode": {
                "type": "CrossEntropyLoss",
                "use_sigmoid": False,
                "use_mask": False,
                "reduction": "mean",
            },
        },
    }
    before = json.dumps(config)
    assert models.build_model(config).pretrained == "open-mmlab://resnet18_v1c"
    assert json.dumps(config) == before


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
def test_types(annotation, right: list, wrong: list):
    assert all(models.fits(value, annotation) for value in right)
    assert not any(models.fits(value, annotation) for value in wrong)


def test_check_keywords_of_a_function():
    def function(*, lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        raise AssertionError

    models.check_keywords(function, {"lr": 1, "betas": [0.9, 1]}, "optimizer")
    with pytest.raises(
        models.ConfigError,
        match=r"optimizer\.beta: function has no such keyword; did you mean betas\?",
    ):
        models.check_keywords(function, {"lr": 1, "beta": 1}, "optimizer")
    with pytest.raises(models.ConfigError, match=r"optimizer\.lr: is missing"):
        models.check_keywords(function, {}, "optimizer")


@pytest.mark.parametrize(
    "sampler",
    [{"type": "OHEMPixelSampler", "thresh": 0.7}, {"type": "OHEMPixelSampler", "min_kept": 10}],
)
def test_hard_pixels_without_waiting_for_the_device(sampler):
    """On the meta device, which has no values to wait for, as train.py tries every config."""
    with torch.device("meta"):
        net = small("BasicBlock", {"sampler": sampler}).train()
        assert net(torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8))


def test_weights_of_which_none_fits():
    """Counters of batches have one shape in every net: they alone are no weights."""
    net = small("BasicBlock")
    state = {
        key: value if value.dim() == 0 else value.repeat(2, *[1] * (value.dim() - 1))
        for key, value in net.state_dict().items()
    }
    with pytest.raises(models.ConfigError, match="none of the"):
        models.load_weights(net, state)
