"""The networks: blocks, losses, backbones, necks, heads, and how a config becomes a network.

The file is in the order of reading: blocks; losses; backbones; necks; heads; Segmentor;
config -> network; weights from files.

Constructor keywords and submodule names are MMSegmentation's, so that its published checkpoints
load unchanged. A config section holds the keyword arguments of the class that its `type` names;
the class is looked up in one of the plain dicts BACKBONES, NECKS, HEADS, LOSSES and SAMPLERS.

Comments beside tensors give their shapes, such as `# (N, C, H/8, W/8)`: N images, C channels, and
the height H and width W of the image. Lower-case h and w are those of a feature map.
"""

import contextlib
import copy
import difflib
import inspect
import json
import math
import os
import re
import traceback
import types
import typing
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import dist_utils  # before torch, which reads the environment that this sets

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dist_utils import UserError

# Losses and metrics skip pixels with this label; data.py maps each data set's own value to it.
IGNORE = 255


class ConfigError(UserError):
    """A config section is invalid; the message begins with the path of the key at fault."""


# ------------------------------------------------------------------------------------------- Blocks
def resize(x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    """Interpolate `x` bilinearly to the height and width of `like`."""
    # An exported network must not depend on whether the sizes happen to be equal.
    if not torch.compiler.is_exporting() and x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)


def without_autocast(device):
    """Disable autocast inside; do nothing on a device that has none, such as meta."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def upcast(x):
    """Convert half precision (float16 or bfloat16) to float32; return other types unchanged."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def init_kaiming(module):
    """Initialize every convolution by its fan-out (He et al., https://arxiv.org/abs/1502.01852)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class ConvModule(nn.Sequential):
    """Convolution, BN and ReLU, under mmcv's names.

    padding: None for as much as keeps the size of the feature map, up to the stride.
    norm: False for no BN; the convolution then has a bias.
    act: class of the activation; None for no activation.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=1,
        *,
        stride=1,
        padding=None,
        dilation=1,
        groups=1,
        norm=True,
        act=nn.ReLU,
    ):
        super().__init__()
        if min(kernel_size, stride, dilation) < 1:
            raise UserError(
                "kernel_size, stride and dilation must be 1 or more; "
                f"here they are {kernel_size}, {stride} and {dilation}"
            )
        if padding is None:
            padding = kernel_size // 2 * dilation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=not norm
        )
        init_kaiming(self.conv)
        if norm:
            self.bn = nn.BatchNorm2d(out_channels)
        if act:
            self.activate = act(inplace=True)


class SeparableConvModule(nn.Sequential):
    """Depthwise separable 3x3 convolution (https://arxiv.org/abs/1610.02357), with BN and ReLU."""

    def __init__(self, in_channels, out_channels, dilation=1):
        super().__init__()
        self.depthwise_conv = ConvModule(
            in_channels, in_channels, 3, dilation=dilation, groups=in_channels
        )
        self.pointwise_conv = ConvModule(in_channels, out_channels)


def conv_bn(in_channels, out_channels, kernel_size, stride, *after):
    """Return convolution and BN, named 0 and 1, and then the modules `after`."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *after)


@contextlib.contextmanager
def frozen_statistics(module):
    """Keep BN, which still normalizes by the batch in training, from updating its statistics."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    saved = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum = 0.0
        m.num_batches_tracked = m.num_batches_tracked.clone()
    try:
        yield
    finally:
        for m, (momentum, num_batches_tracked) in zip(norms, saved):
            m.momentum = momentum
            m.num_batches_tracked = num_batches_tracked


def run_blocks(blocks, x, with_cp):
    """Apply the blocks in sequence.

    with_cp: activation checkpointing (https://arxiv.org/abs/1604.06174). Only the input of each
        block is stored; its other activations are recomputed in the backward pass.
    """
    for block in blocks:
        if with_cp and torch.is_grad_enabled():
            x = checkpointed(block, x)
        else:
            x = block(x)
    return x


def checkpointed(block, x):
    """Return `block(x)`, with activation checkpointing.

    The recomputation in the backward pass does not update BN's running statistics a second time.
    """
    if torch.compiler.is_compiling():  # the compiler decides what to recompute, see `compiled`
        return block(x)
    return checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), frozen_statistics(block)),
    )


class DropPath(nn.Dropout):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): drops the residual branch per sample."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        ones = x.new_ones(len(x), *[1] * (x.dim() - 1))  # (N, 1, ...)
        return x * F.dropout(ones, self.p)


class Scale(nn.Module):
    """Multiplies by a learnable scalar, which is initialized to zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x * self.scale


def attend(query, key, value, scale):
    """Compute attention between the pixels of feature maps, one head: softmax(scale * Q Kᵀ) V.

    query (N, C, ...), key (N, C, ...) and value (N, V, ...) -> (N, V, ...) with the size of query.
    """
    # (N, 1, pixels, channels) each; the second dimension is that of the heads.
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (N, 1, pixels of query, V)
    return out.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


class SelfAttentionBlock(nn.Module):
    """Attention from the pixels of one feature map to those of another, as in OCR, ANN and DANet.

    query_channels, key_channels: channels of the map that attends and of the map attended to.
    channels: channels of the projected queries, keys and values.
    out_channels: None for no output projection; the values then keep `key_channels` channels.
    num_convs: number of 1x1 convolutions that project the queries, and the keys.
    norm: BN and ReLU after the projections of queries and keys.
    value_norm: BN and ReLU after the projections of values and output.
    scale: multiplies the attention logits.
    share: queries and keys share one projection.
    pool: applied to the projected keys and values.
    """

    def __init__(
        self,
        query_channels,
        key_channels,
        channels,
        out_channels,
        *,
        num_convs=1,
        norm=True,
        value_norm=False,
        scale=1.0,
        share=False,
        pool=nn.Identity(),
    ):
        super().__init__()
        self.scale = scale
        self.pool = pool
        self.key_project = self.projection(key_channels, channels, num_convs, norm)
        if share:
            self.query_project = self.key_project
        else:
            self.query_project = self.projection(query_channels, channels, num_convs, norm)
        if out_channels is None:
            self.value_project = self.projection(key_channels, key_channels, 1, value_norm)
            self.out_project = nn.Identity()
        else:
            self.value_project = self.projection(key_channels, channels, 1, value_norm)
            self.out_project = self.projection(channels, out_channels, 1, value_norm)
            if not value_norm:
                nn.init.zeros_(self.out_project.weight)
                nn.init.zeros_(self.out_project.bias)

    @staticmethod
    def projection(in_channels, out_channels, num_convs, norm):
        layer = ConvModule if norm else nn.Conv2d
        convs = []
        for _ in range(num_convs):
            convs.append(layer(in_channels, out_channels, 1))
            in_channels = out_channels
        # Parameter names as in MMSegmentation, which does not wrap a single convolution.
        return convs[0] if num_convs == 1 else nn.Sequential(*convs)

    def forward(self, query, key):
        """(N, query_channels, h, w), (N, key_channels, ...) -> (N, out_channels, h, w)."""
        keys = self.pool(self.key_project(key))  # (N, channels, ...)
        values = self.pool(self.value_project(key))  # (N, channels or key_channels, ...)
        queries = self.query_project(query)  # (N, channels, h, w)
        return self.out_project(attend(queries, keys, values, self.scale))


class AdaptiveAvgPool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling that supports torch.use_deterministic_algorithms and ONNX.

    PyTorch has no deterministic gradient on CUDA, ONNX no such operation for dynamic sizes. There,
    two matrix products do the same.
    """

    def forward(self, x):
        is_deterministic = x.is_cuda and torch.are_deterministic_algorithms_enabled()
        needs_products = is_deterministic or torch.compiler.is_exporting()
        if self.output_size == 1 or not needs_products:
            return super().forward(x)
        rows, columns = (self.means(size, x) for size in x.shape[2:])
        return rows @ x @ columns.T  # (N, C, output_size, output_size)

    def means(self, size, like):
        """Return the matrix (output_size, size) whose row i averages the pixels of cell i.

        Cell i extends from floor(i * size / output_size) to ceil((i + 1) * size / output_size).
        """
        i = torch.arange(self.output_size, device=like.device)[:, None]
        pixel = torch.arange(size, device=like.device)
        start = i * size // self.output_size
        end = -(-(i + 1) * size // self.output_size)
        within = (pixel >= start) & (pixel < end)
        return (within.double() / within.sum(1, keepdim=True)).to(like.dtype)


class PPM(nn.ModuleList):
    """Pyramid pooling module (https://arxiv.org/abs/1612.01105).

    For each s in `pool_scales`: pool the map to s x s, project it to `channels`, resize it back.
    """

    def __init__(self, pool_scales, in_channels, channels, align_corners):
        super().__init__(
            nn.Sequential(AdaptiveAvgPool(scale), ConvModule(in_channels, channels))
            for scale in pool_scales
        )
        self.align_corners = align_corners

    def forward(self, x):
        """(N, C, h, w) -> (N, C + len(pool_scales) * channels, h, w): the map, then the pooled."""
        pooled = [resize(pool(x), x, self.align_corners) for pool in self]
        return torch.cat([x, *pooled], 1)


# ---------------------- Losses: logits (N, C, h, w) of any resolution and label (N, H, W) -> scalar
CHUNK = 2**25  # full-resolution logits in memory at a time: 128 MiB in float32


def images_per_chunk(logits, label):
    """Return how many images may have their full-resolution logits in memory at a time."""
    return max(1, CHUNK // (logits.shape[1] * label[0].numel()))


class ChunkedLoss(torch.autograd.Function):
    """Sum of `loss_sum(logits, label, weight)` over the batch, `chunk_size` images at a time.

    The gradient is computed in the forward pass. Full-resolution logits, their softmax and their
    gradient thus never exist for the whole batch, and nothing is computed twice: all that is kept
    for the backward pass is the gradient with respect to the low-resolution logits.
    """

    @staticmethod
    def forward(ctx, logits, label, weight, loss_sum, align_corners, chunk_size):
        needs_grad = ctx.needs_input_grad[0]
        losses = []
        gradients = []
        with without_autocast(logits.device), torch.set_grad_enabled(needs_grad):
            for start in range(0, len(logits), chunk_size):
                chunk = slice(start, start + chunk_size)
                x = upcast(logits[chunk].detach()).requires_grad_(needs_grad)  # (n, C, h, w)
                y = label[chunk]  # (n, H, W)
                w = None if weight is None else weight[chunk]
                loss = loss_sum(resize(x, y.unsqueeze(1), align_corners), y.long(), w)
                losses.append(loss.detach())
                if needs_grad:
                    gradients.append(torch.autograd.grad(loss, x)[0])
        ctx.dtype = logits.dtype
        ctx.save_for_backward(torch.cat(gradients) if needs_grad else None)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None, None, None


def one_hot(label, channels):
    """(n, H, W) -> (n, channels, H, W) bool, False where ignored. A single channel is class 1."""
    first_class = 1 if channels == 1 else 0
    classes = torch.arange(first_class, first_class + channels, device=label.device)
    return label.unsqueeze(1) == classes.view(1, -1, 1, 1)


class Loss(nn.Module):
    """Base class of the losses: loss_weight * (sum of `loss_sum` over all images) / `normalizer`.

    class_weight: one factor per channel.
    loss_name: name in the log; losses of one head that share a name are added up.
    """

    NAME = "loss"
    whole_batch = False  # True if `loss_sum` cannot be computed image by image
    depends_on_batch = False  # True if images of one forward pass affect each other's loss

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        class_weight: list[float] | None = None,
        loss_name: str | None = None,
    ):
        super().__init__()
        self.loss_weight = loss_weight
        self.loss_name = loss_name or self.NAME
        if not 0 <= loss_weight < math.inf:
            raise UserError(f"loss_weight is {loss_weight}; it must be 0 or more")
        if class_weight is not None:
            if not class_weight or not all(0 <= factor < math.inf for factor in class_weight):
                raise UserError(f"class_weight is {class_weight}; its factors must be 0 or more")
            if not any(class_weight):
                raise UserError(
                    f"class_weight is {class_weight}; with it no class would be learned"
                )
            class_weight = torch.tensor(class_weight, dtype=torch.float64)
        self.register_buffer("class_weight", class_weight, persistent=False)

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """Return the sum of the loss over some images.

        logits: (n, C, H, W), at the resolution of the label.
        label: (n, H, W), int64.
        weight: (n, H, W), the sampler's weight of each pixel; None without a sampler.
        """
        raise NotImplementedError

    def mean_over_processes(self, count):
        """Return the mean of a number that depends on the pixels of a forward pass, in training."""
        if not self.training or count.is_meta:
            return count
        return dist_utils.all_reduce(count) / dist_utils.world_size()

    def normalizer(self, label: Tensor, channels: int) -> int | Tensor:
        """Return what the sum is divided by: a number, or a scalar that depends on the label.

        A scalar is averaged over micro-batches and processes, see `Segmentor.normalizers`.
        """
        return label.numel() * channels

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        align_corners: bool = False,
        weight: Tensor | None = None,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        """logits (N, C, h, w) of any resolution, label (N, H, W), weight (N, H, W) -> scalar.

        normalizer: that of the whole iteration; by default it is computed from this label.
        """
        channels = logits.shape[1]
        if self.class_weight is not None and len(self.class_weight) != channels:
            raise UserError(
                f"class_weight has {len(self.class_weight)} values, but the head has {channels} "
                "output channels"
            )
        chunk_size = len(label) if self.whole_batch else images_per_chunk(logits, label)
        total = ChunkedLoss.apply(logits, label, weight, self.loss_sum, align_corners, chunk_size)
        if normalizer is None:
            normalizer = self.normalizer(label, channels)
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.to(total.dtype).clamp(min=1e-6)
        return self.loss_weight * (total / normalizer)  # rounded as by MMSegmentation


class PlainLoss(Loss):
    """Makes a loss of any module `forward(logits, label)` -> scalar, a mean over the batch.

    logits: (N, C, H, W), float32, at the resolution of the label; the whole batch at once.
    label: (N, H, W), int64, 255 where ignored.

    The value is averaged over processes and micro-batches: a mean of means.
    """

    depends_on_batch = True

    def __init__(
        self, module: nn.Module, /, *, loss_weight: float = 1.0, loss_name: str | None = None
    ):
        name = loss_name or f"loss_{type(module).__name__.lower()}"
        super().__init__(loss_weight=loss_weight, loss_name=name)
        self.module = module

    def forward(self, logits, label, align_corners=False, weight=None, normalizer=None):
        # Not through ChunkedLoss, as the module may have parameters.
        with without_autocast(logits.device):
            logits = resize(upcast(logits), label.unsqueeze(1), align_corners)
            loss = self.module(logits, label.long())
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            raise UserError(f"{type(self.module).__name__} must return a scalar, such as a mean")
        return self.loss_weight * loss

    def normalizer(self, label: Tensor, channels: int) -> int:
        return 1


class CrossEntropyLoss(Loss):
    """Cross entropy, averaged over all pixels, ignored ones included, as in MMSegmentation.

    With `class_weight`, it is a weighted average, in which an ignored pixel counts 1.

    use_sigmoid: binary cross entropy of each channel instead of a softmax over the channels.
    avg_non_ignore: average over the valid pixels of all processes instead.
    """

    NAME = "loss_ce"

    def __init__(self, *, use_sigmoid: bool = False, avg_non_ignore: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.use_sigmoid = use_sigmoid
        self.avg_non_ignore = avg_non_ignore

    def loss_sum(self, logits, label, weight):
        factors = None if self.class_weight is None else self.class_weight.to(logits.dtype)
        if self.use_sigmoid:
            target = one_hot(label, logits.shape[1]).to(logits.dtype)
            if factors is not None:
                factors = factors.view(-1, 1, 1)
            entries = F.binary_cross_entropy_with_logits(
                logits, target, pos_weight=factors, reduction="none"
            )  # (n, C, H, W)
            pixels = entries.sum(1) * (label != IGNORE)  # (n, H, W)
        else:
            pixels = F.cross_entropy(
                logits, label, factors, ignore_index=IGNORE, reduction="none"
            )  # (n, H, W)
        if weight is not None:
            pixels = pixels * weight
        return pixels.sum()

    def normalizer(self, label: Tensor, channels: int) -> int | Tensor:
        weighted = self.class_weight is not None and not self.use_sigmoid
        entries = channels if self.use_sigmoid else 1  # per pixel
        if not weighted and not self.avg_non_ignore:
            return label.numel() * entries
        counts = label != IGNORE
        if weighted:
            last_class = len(self.class_weight) - 1
            factors = self.class_weight[label.long().clamp(max=last_class)]
            counts = torch.where(counts, factors, 0.0 if self.avg_non_ignore else 1.0)
        return counts.sum() * entries


class DiceLoss(Loss):
    """Dice loss of each image over all of its classes (https://arxiv.org/abs/1606.04797).

    use_sigmoid: a sigmoid of each channel instead of a softmax over the channels.
    """

    NAME = "loss_dice"
    FIXED = {"activate": [True], "naive_dice": [False], "class_weight": [None]}

    def __init__(
        self,
        *,
        use_sigmoid: bool = True,
        eps: float = 1e-3,
        loss_weight: float = 1.0,
        loss_name: str | None = None,
    ):
        super().__init__(loss_weight=loss_weight, loss_name=loss_name)
        self.use_sigmoid = use_sigmoid
        self.eps = eps

    def loss_sum(self, logits, label, weight):
        if self.use_sigmoid or logits.shape[1] == 1:
            probability = logits.sigmoid()
        else:
            probability = logits.softmax(1)
        counted = label != IGNORE
        if weight is not None:
            counted = weight * counted
        counted = counted.unsqueeze(1)  # (n, 1, H, W)
        p = (probability * counted).flatten(1)  # (n, C*H*W)
        t = (one_hot(label, logits.shape[1]) * counted).flatten(1).to(logits.dtype)
        dice = 2 * (p * t).sum(1) / ((p * p).sum(1) + (t * t).sum(1) + 2 * self.eps)
        return (1 - dice).sum()

    def normalizer(self, label: Tensor, channels: int) -> int:
        return len(label)


class FocalLoss(Loss):
    """Sigmoid focal loss, averaged over pixels and classes (https://arxiv.org/abs/1708.02002).

    alpha: weight of the positive class, one for all classes or a list with one per class.
    """

    NAME = "loss_focal"
    FIXED = {"use_sigmoid": [True]}

    def __init__(self, *, gamma: float = 2.0, alpha: float | list[float] = 0.5, **kwargs):
        super().__init__(**kwargs)
        alphas = alpha if isinstance(alpha, list) else [alpha]
        if not all(0 <= value <= 1 for value in alphas) or gamma < 0:
            raise UserError(f"alpha is {alpha}, from 0 to 1; gamma is {gamma}, 0 or more")
        self.gamma = gamma
        alpha = torch.tensor(alpha, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("alpha", alpha, persistent=False)

    def loss_sum(self, logits, label, weight):
        target = one_hot(label, logits.shape[1]).to(logits.dtype)
        alpha = self.alpha.to(logits.dtype)
        factors = alpha * target + (1 - alpha) * (1 - target)
        if self.class_weight is not None:
            factors = factors * self.class_weight.to(logits.dtype).view(-1, 1, 1)
        error = (logits.sigmoid() - target).abs()  # 1 - p_t in the paper
        entries = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        entries = entries * error**self.gamma * factors  # (n, C, H, W)
        pixels = entries.sum(1) * (label != IGNORE)  # (n, H, W)
        if weight is not None:
            pixels = pixels * weight
        return pixels.sum()


def lovasz_extension(errors, truth):
    """Return the Lovász extension of 1 - IoU; errors and truth (0 or 1) of pixels, both (P,)."""
    errors, order = errors.sort(descending=True)
    truth = truth[order].to(errors.dtype)
    jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
    return errors.relu() @ jaccard.diff(prepend=jaccard.new_zeros(1))


class LovaszLoss(Loss):
    """Lovász-Softmax or Lovász hinge loss (https://arxiv.org/abs/1705.08790).

    loss_type: "multi_class" is Lovász-Softmax, "binary" is the hinge loss of a single channel.
    classes: which classes are averaged: those "present" in the label, "all", or a list.
    per_image: average the losses of the images instead of computing one loss of the batch. The
        loss of a batch compares its images with each other, so it depends on the number of
        processes and on data.accumulate.
    """

    NAME = "loss_lovasz"
    FIXED = {"reduction": ["none", "mean"]}

    def __init__(
        self,
        *,
        loss_type: str = "multi_class",
        classes: str | list[int] = "present",
        per_image: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if loss_type not in ("multi_class", "binary"):
            raise UserError(f'loss_type is {loss_type!r}; it can be "multi_class" or "binary"')
        if isinstance(classes, str) and classes not in ("present", "all"):
            raise UserError(
                f'classes is {classes!r}; it can be "present", "all" or a list of class indices'
            )
        if loss_type == "binary" and (self.class_weight is not None or classes != "present"):
            raise UserError('class_weight and classes need loss_type "multi_class"')
        self.binary = loss_type == "binary"
        self.classes = classes
        self.whole_batch = not per_image
        self.depends_on_batch = not per_image

    def loss_sum(self, logits, label, weight):
        # Ignored pixels get error 0; masking keeps shapes static, so the GPU does not sync.
        valid = label != IGNORE
        if weight is not None:
            valid = valid & (weight > 0)
        loss = self.lovasz_hinge if self.binary else self.lovasz_softmax
        if self.whole_batch:
            return loss(logits, label, valid)
        return torch.stack([loss(*image) for image in zip(logits, label, valid)]).sum()

    def lovasz_hinge(self, logits, label, valid):
        """Logits (..., 1, H, W), label and valid (..., H, W) -> scalar."""
        valid = valid.flatten()
        truth = (label == 1).flatten()
        errors = (1 - logits.flatten() * (2.0 * truth - 1)) * valid
        return lovasz_extension(errors, truth & valid)

    def lovasz_softmax(self, logits, label, valid):
        """Logits (..., C, H, W), label and valid (..., H, W) -> scalar."""
        probability = logits.softmax(-3)
        classes = range(logits.shape[-3]) if isinstance(self.classes, str) else self.classes
        losses = []
        present = []
        for c in classes:
            truth = ((label == c) & valid).flatten()
            errors = (truth.to(logits.dtype) - probability.select(-3, c).flatten()).abs()
            loss = lovasz_extension(errors * valid.flatten(), truth)
            if self.class_weight is not None:
                loss = loss * self.class_weight[c].to(loss.dtype)
            losses.append(loss)
            present.append(truth.any())
        counted = torch.stack(present).to(logits.dtype)
        if self.classes != "present":
            counted = torch.ones_like(counted)
        return (torch.stack(losses) * counted).sum() / counted.sum().clamp(min=1)

    def normalizer(self, label: Tensor, channels: int) -> int:
        return 1 if self.whole_batch else len(label)


class OhemCrossEntropy(Loss):
    """Cross entropy, averaged over the hard pixels alone (https://arxiv.org/abs/1604.03540).

    A pixel is hard if the probability of its own class is below `thres`. At least `min_kept` pixels
    of the batch that a process has are kept.
    """

    NAME = "loss_ohem"
    depends_on_batch = True
    FIXED = {"ignore_label": [IGNORE]}

    def __init__(self, *, thres: float = 0.7, min_kept: int = 100000, **kwargs):
        super().__init__(**kwargs)
        OHEMPixelSampler(thresh=thres, min_kept=min_kept)  # checks them
        self.thres = thres
        self.min_kept = min_kept

    def forward(self, logits, label, align_corners=False, weight=None, normalizer=None):
        min_kept = max(1, self.min_kept // len(label))
        sampler = OHEMPixelSampler(thresh=self.thres, min_kept=min_kept)
        hard = sampler(logits, label, align_corners)  # (N, H, W), 1 or 0
        if weight is not None:
            hard = hard * weight
        count = self.mean_over_processes(hard.sum())
        return super().forward(logits, label, align_corners, hard / count.clamp(min=1))

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        factors = None if self.class_weight is None else self.class_weight.to(logits.dtype)
        loss = F.cross_entropy(logits, label, factors, ignore_index=IGNORE, reduction="none")
        return (loss * weight).sum()

    def normalizer(self, label: Tensor, channels: int) -> int:
        return 1  # the weights have been divided already


class BoundaryLoss(Loss):
    """Binary cross entropy of edges, in which edges and the rest have the same weight in total.

    logits (N, 1, h, w), label (N, H, W): 1 for an edge, else 0 (https://arxiv.org/abs/2206.02066).
    """

    NAME = "loss_boundary"
    depends_on_batch = True
    FIXED = {"class_weight": [None]}

    def __init__(self, *, loss_weight: float = 1.0, loss_name: str | None = None):
        super().__init__(loss_weight=loss_weight, loss_name=loss_name)

    def forward(self, logits, label, align_corners=False, weight=None, normalizer=None):
        edges = self.mean_over_processes((label == 1).sum().float())
        total = label.numel()
        balance = torch.where(label == 1, (total - edges) / total, edges / total)
        return super().forward(logits, label, align_corners, balance)

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            logits.squeeze(1), label.float(), weight, reduction="sum"
        )


class OHEMPixelSampler:
    """Online hard example mining: weight 1 for hard pixels, 0 for all others.

    The lower the predicted probability of its true class, the harder a pixel is
    (https://arxiv.org/abs/1604.03540).

    thresh: keep the pixels with a probability below it; None keeps the `min_kept` hardest ones.
    min_kept: keep at least this many, per image on average over the batch.
    """

    def __init__(self, *, thresh: float | None = None, min_kept: int = 100000):
        if min_kept < 1:
            raise UserError(f"min_kept is {min_kept}; it must be 1 or more")
        if thresh is not None and not 0 < thresh <= 1:
            raise UserError(f"thresh is {thresh}; a probability is above 0 and at most 1")
        self.thresh = thresh
        self.min_kept = min_kept

    @torch.no_grad()
    def __call__(self, logits: Tensor, label: Tensor, align_corners: bool) -> Tensor:
        """logits (N, C, h, w), label (N, H, W) -> the pixels' weights (N, H, W)."""
        chunk_size = images_per_chunk(logits, label)
        last_class = logits.shape[1] - 1
        chunks = []
        for x, y in zip(logits.split(chunk_size), label.split(chunk_size)):
            x = resize(upcast(x), y.unsqueeze(1), align_corners).softmax(1)  # (n, C, H, W)
            true_class = y.long().clamp(max=last_class).unsqueeze(1)
            chunks.append(x.gather(1, true_class).squeeze(1))
        probability = torch.cat(chunks)  # (N, H, W)
        valid = label != IGNORE
        probability[~valid] = 2  # sorts ignored pixels behind all valid ones

        # `take` rather than an index, for which the host would wait for the GPU.
        ordered = probability.flatten().sort().values
        last_valid = valid.sum() - 1
        min_kept = self.min_kept * len(label)
        if self.thresh is None:
            kept = probability <= ordered.take(last_valid.clamp(0, min_kept - 1))
        else:
            thresh = ordered.take(last_valid.clamp(0, min_kept)).clamp(min=self.thresh)
            kept = probability < thresh
        return (valid & kept).to(probability.dtype)


LOSSES = {
    c.__name__: c
    for c in (
        CrossEntropyLoss,
        DiceLoss,
        FocalLoss,
        LovaszLoss,
        OhemCrossEntropy,
        BoundaryLoss,
    )
}
SAMPLERS = {"OHEMPixelSampler": OHEMPixelSampler}


# ---------------------------------------------------------------------------------------- Backbones
class Backbone(nn.Module):
    """Base class: image (N, C, H, W) -> list of feature maps, from fine to coarse.

    num_stages: positional, so that it is not a config key.
    out_indices: the stages whose feature maps are returned.
    with_cp: activation checkpointing of each block.
    frozen_stages: how many stages, besides the stem, are not trained; -1 trains all. They are in
        evaluation mode even in training.
    norm_eval: batch norm normalizes by its running statistics even in training.
    """

    # Name of the same network in torchvision.models, if there is one, whose weights can be loaded.
    torchvision_name = None

    def __init__(
        self,
        num_stages: int,
        /,
        *,
        in_channels: int = 3,
        out_indices: list[int] = (0, 1, 2, 3),
        with_cp: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ):
        super().__init__()
        if not out_indices or not all(0 <= i < num_stages for i in out_indices):
            raise UserError(
                f"out_indices is {list(out_indices)}; it lists stages, from 0 to {num_stages - 1}"
            )
        if not -1 <= frozen_stages <= num_stages:
            raise UserError(f"frozen_stages is {frozen_stages}; it can be -1 to {num_stages}")
        if frozen_stages >= 0 and type(self).stage_modules is Backbone.stage_modules:
            raise UserError(f"frozen_stages is {frozen_stages}; it has to be -1 in this backbone")
        self.num_stages = num_stages
        self.in_channels = in_channels
        self.out_indices = out_indices
        self.with_cp = with_cp
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    def stage_modules(self) -> list[list[nn.Module]]:
        """Return the modules of the stem, and of each stage, that `frozen_stages` freezes."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Backbone":
        """Do what any module does, but leave what `frozen_stages` and `norm_eval` keep as it is."""
        super().train(mode)
        if self.frozen_stages >= 0:
            for modules in self.stage_modules()[: self.frozen_stages + 1]:
                for module in modules:
                    module.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def run_layers(self, x):
        """Apply the stages layer1, layer2, ... in turn -> the feature maps of `out_indices`."""
        outs = []
        for i in range(self.num_stages):
            x = run_blocks(getattr(self, f"layer{i + 1}"), x, self.with_cp)
            outs.append(x)
        return [outs[i] for i in self.out_indices]

    def published_weights(self, name: str) -> dict[str, Tensor]:
        """Download the weights that the config calls by this name."""
        return fetch(name, self.torchvision_name)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of torchvision's network to the names used here."""
        return state

    def layer_names(self) -> list[tuple[str, ...]]:
        """Return what parameters' names begin with in each layer, from the stem on."""
        raise UserError(f"{type(self).__name__} does not define the layers of layer_decay")

    def stage_names(self) -> list[tuple[str, ...]]:
        """Return the same for each stage."""
        raise UserError(f'{type(self).__name__} does not define decay_type "stage_wise"')

    def layer_distances(self, by_stage: bool = False) -> dict[str, int]:
        """Parameter -> the number of layers from its own up to the heads; 0 where it is left out.

        by_stage: count from a stage's number, as MMSegmentation does for ConvNeXt.
        """
        names = self.layer_names()
        distances = {}
        for number, prefixes in enumerate(self.stage_names() if by_stage else names):
            for name, _ in self.named_parameters():
                if name.startswith(prefixes):
                    distances[name] = len(names) - number
        return distances


def conv3x3(in_channels, out_channels, stride=1, dilation=1, groups=1):
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


def make_downsample(inplanes, outplanes, stride):
    """Return the 1x1 convolution for the shortcut of a block that changes size or channels."""
    if stride == 1 and inplanes == outplanes:
        return None
    return conv_bn(inplanes, outplanes, 1, stride)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, the first with the stride and the dilation."""

    expansion = 1

    def __init__(self, inplanes, planes, stride, dilation):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride, dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = make_downsample(inplanes, planes, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 (with stride, dilation and groups) and 1x1 convolutions."""

    expansion = 4

    def __init__(self, inplanes, planes, stride, dilation, groups=1, base_width=64):
        super().__init__()
        width = planes
        if groups > 1:
            width = planes * base_width // 64 * groups
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, dilation, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.downsample = make_downsample(inplanes, outplanes, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


def make_layer(block, inplanes, planes, stride, dilations, **block_options):
    """Return a stage: one residual block for each of `dilations`, the first with `stride`."""
    blocks = []
    for dilation in dilations:
        blocks.append(block(inplanes, planes, stride, dilation, **block_options))
        inplanes = planes * block.expansion
        stride = 1
    return nn.Sequential(*blocks)


def make_deep_stem(in_channels, stem_channels):
    """Return three 3x3 convolutions, the first with stride 2."""
    half = stem_channels // 2
    return nn.Sequential(
        *conv_bn(in_channels, half, 3, 2, nn.ReLU(inplace=True)),
        *conv_bn(half, half, 3, 1, nn.ReLU(inplace=True)),
        *conv_bn(half, stem_channels, 3, 1, nn.ReLU(inplace=True)),
    )


class ResNet(Backbone):
    """Deep Residual Learning (https://arxiv.org/abs/1512.03385), under torchvision's names.

    block_options: further arguments of the blocks, for subclasses; positional, so that it is not a
        config key.
    strides, dilations: one for each stage. Strides (1, 2, 1, 1) with dilations (1, 1, 2, 4) give
        an output stride of 8, as in DeepLab (https://arxiv.org/abs/1706.05587).
    contract_dilation: halve the dilation of the first block of each dilated stage.
    multi_grid: dilations of the last stage's blocks, instead of its value in `dilations`.
    deep_stem: three 3x3 convolutions instead of the 7x7 convolution.
    zero_init_residual: zero the weight of each block's last BN, so that it starts as the identity.
    """

    LAYERS = {
        18: (BasicBlock, [2, 2, 2, 2]),
        34: (BasicBlock, [3, 4, 6, 3]),
        50: (Bottleneck, [3, 4, 6, 3]),
        101: (Bottleneck, [3, 4, 23, 3]),
        152: (Bottleneck, [3, 8, 36, 3]),
    }
    FIXED = {"avg_down": [False], "stage_with_dcn": [[False] * 4]}

    def __init__(
        self,
        block_options: dict = {},
        /,
        *,
        depth: int,
        stem_channels: int = 64,
        base_channels: int = 64,
        num_stages: int = 4,
        strides: list[int] = (1, 2, 2, 2),
        dilations: list[int] = (1, 1, 1, 1),
        contract_dilation: bool = False,
        multi_grid: list[int] | None = None,
        deep_stem: bool = False,
        zero_init_residual: bool = True,
        **kwargs,
    ):
        super().__init__(num_stages, **kwargs)
        if depth not in self.LAYERS:
            raise UserError(f"depth is {depth}; it can be {sorted(self.LAYERS)}")
        if num_stages > 4 or not len(strides) == len(dilations) == num_stages:
            raise UserError(
                f"num_stages is {num_stages}; it can be 4 at most, and strides and dilations need "
                "as many values"
            )
        block, num_blocks = self.LAYERS[depth]
        if multi_grid and len(multi_grid) < num_blocks[num_stages - 1]:
            raise UserError(
                f"multi_grid has {len(multi_grid)} values, but the last stage has "
                f"{num_blocks[num_stages - 1]} blocks"
            )
        if min([*strides, *dilations, *(multi_grid or [])]) < 1:
            raise UserError("strides, dilations and multi_grid must be 1 or more")
        self.torchvision_name = f"resnet{depth}"
        self.deep_stem = deep_stem
        if deep_stem:
            self.stem = make_deep_stem(self.in_channels, stem_channels)
        else:
            self.conv1 = nn.Conv2d(self.in_channels, stem_channels, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem_channels)
        inplanes = stem_channels
        for i in range(num_stages):
            block_dilations = [dilations[i]] * num_blocks[i]
            if contract_dilation and dilations[i] > 1:
                block_dilations[0] = dilations[i] // 2
            if multi_grid and i == num_stages - 1:
                block_dilations = multi_grid[: num_blocks[i]]
            planes = base_channels * 2**i
            layer = make_layer(
                block, inplanes, planes, strides[i], block_dilations, **block_options
            )
            self.add_module(f"layer{i + 1}", layer)
            inplanes = planes * block.expansion
        init_kaiming(self)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, BasicBlock):
                    nn.init.zeros_(m.bn2.weight)
                elif isinstance(m, Bottleneck):
                    nn.init.zeros_(m.bn3.weight)

    def stage_modules(self):
        stem = [self.stem] if self.deep_stem else [self.conv1, self.bn1]
        return [stem, *([getattr(self, f"layer{i + 1}")] for i in range(self.num_stages))]

    def forward(self, image):
        if self.deep_stem:
            x = self.stem(image)  # (N, stem_channels, H/2, W/2)
        else:
            x = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (N, stem_channels, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, 1)  # (N, stem_channels, H/4, W/4)
        return self.run_layers(x)  # (N, base_channels * 2**i * expansion, h, w)


class ResNetV1c(ResNet):
    """ResNet with a deep stem (https://arxiv.org/abs/1812.01187), common in segmentation."""

    def __init__(self, *, deep_stem: bool = True, **kwargs):
        super().__init__(deep_stem=deep_stem, **kwargs)


class ResNeXt(ResNet):
    """Aggregated Residual Transformations (https://arxiv.org/abs/1611.05431).

    groups, base_width: of the 3x3 convolutions; ResNeXt-50 32x4d has 32 groups of width 4. With
        one group, the network is a ResNet.
    """

    LAYERS = {depth: layers for depth, layers in ResNet.LAYERS.items() if layers[0] is Bottleneck}

    def __init__(self, *, groups: int = 1, base_width: int = 4, **kwargs):
        super().__init__({"groups": groups, "base_width": base_width}, **kwargs)
        self.torchvision_name = f"resnext{kwargs['depth']}_{groups}x{base_width}d"


@dataclass
class HRStage:
    """Description of one stage of HRNet, a section of its `extra`.

    block: BASIC or BOTTLENECK.
    num_blocks, num_channels: one for each branch.
    """

    num_modules: int
    num_branches: int
    block: str
    num_blocks: list[int]
    num_channels: list[int]

    def __post_init__(self):
        if self.block not in ("BASIC", "BOTTLENECK"):
            raise UserError(f"block is BASIC or BOTTLENECK, not {self.block!r}")
        if not self.num_branches == len(self.num_blocks) == len(self.num_channels):
            raise UserError(
                f"num_branches is {self.num_branches}; num_blocks and num_channels need "
                "as many values"
            )
        self.block_type = BasicBlock if self.block == "BASIC" else Bottleneck
        self.channels = [c * self.block_type.expansion for c in self.num_channels]

    def make_branches(self, in_channels):
        return [
            make_layer(self.block_type, inplanes, planes, 1, [1] * num_blocks)
            for inplanes, planes, num_blocks in zip(in_channels, self.num_channels, self.num_blocks)
        ]


def make_hr_stages(*, stage1: dict, stage2: dict, stage3: dict, stage4: dict) -> list[HRStage]:
    """HRNet's `extra` -> the descriptions of its stages."""
    return [
        construct({"HRStage": HRStage}, {"type": "HRStage", **section}, f"extra.stage{i}")
        for i, section in enumerate((stage1, stage2, stage3, stage4), 1)
    ]


def make_transition(old, new):
    """For each branch of a stage, the layer that leads to it from the stage before.

    old, new: channels of the branches before and after. An additional branch halves the resolution
        of the coarsest one before.
    """
    layers = nn.ModuleList()
    for i, channels in enumerate(new):
        if i >= len(old):
            # Nested for MMSegmentation's parameter names.
            layers.append(nn.Sequential(conv_bn(old[-1], channels, 3, 2, nn.ReLU(inplace=True))))
        elif channels != old[i]:
            layers.append(conv_bn(old[i], channels, 3, 1, nn.ReLU(inplace=True)))
        else:
            layers.append(nn.Identity())
    return layers


def make_fuse_layer(channels, source, target):
    """Return layers that bring branch `source` to the resolution and channels of `target`.

    Upsampling to a finer branch; one convolution with stride 2 per level to a coarser branch.
    """
    c = channels[source]
    if source > target:
        upsample = nn.Upsample(scale_factor=2 ** (source - target), mode="bilinear")
        return conv_bn(c, channels[target], 1, 1, upsample)
    layers = []
    for _ in range(target - source - 1):
        layers.append(conv_bn(c, c, 3, 2, nn.ReLU(inplace=True)))
    if source < target:
        layers.append(conv_bn(c, channels[target], 3, 2))
    return nn.Sequential(*layers)


class HRModule(nn.Module):
    """Parallel branches of different resolutions, whose outputs are then fused into each other."""

    def __init__(self, stage, with_cp):
        super().__init__()
        self.with_cp = with_cp
        self.branches = nn.ModuleList(stage.make_branches(stage.channels))
        self.fuse_layers = nn.ModuleList()
        branches = range(stage.num_branches)
        for target in branches:
            layers = [make_fuse_layer(stage.channels, source, target) for source in branches]
            self.fuse_layers.append(nn.ModuleList(layers))

    def forward(self, xs):
        xs = [run_blocks(branch, x, self.with_cp) for branch, x in zip(self.branches, xs)]
        outs = []
        for target, layers in zip(xs, self.fuse_layers):
            maps = [resize(layer(x), target, False) for layer, x in zip(layers, xs)]
            outs.append(F.relu(sum(maps)))
        return outs


class HRNet(Backbone):
    """High-Resolution Representations (https://arxiv.org/abs/1904.04514).

    extra: sections `stage1` to `stage4`, each with the keywords of HRStage.
    """

    FIXED = {"zero_init_residual": [False], "multiscale_output": [True]}

    def __init__(self, *, extra: dict, **kwargs):
        super().__init__(4, **kwargs)
        check_parameters("HRNet", keywords(make_hr_stages), extra, "extra")
        first, *stages = make_hr_stages(**extra)
        self.conv1 = conv3x3(self.in_channels, 64, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = conv3x3(64, 64, stride=2)
        self.bn2 = nn.BatchNorm2d(64)
        (self.layer1,) = first.make_branches([64])
        channels = first.channels
        for i, stage in enumerate(stages, 1):
            self.add_module(f"transition{i}", make_transition(channels, stage.channels))
            modules = [HRModule(stage, self.with_cp) for _ in range(stage.num_modules)]
            self.add_module(f"stage{i + 1}", nn.Sequential(*modules))
            channels = stage.channels
        init_kaiming(self)

    def stage_modules(self):
        return [
            [self.conv1, self.bn1, self.conv2, self.bn2],
            [self.layer1, self.transition1],
            [self.stage2, self.transition2],
            [self.stage3, self.transition3],
            [self.stage4],
        ]

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (N, 64, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)  # (N, 64, H/4, W/4)
        xs = [run_blocks(self.layer1, x, self.with_cp)]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # An additional branch starts from the coarsest one.
            xs += [xs[-1]] * (len(transition) - len(xs))
            xs = stage([layer(x) for layer, x in zip(transition, xs)])
        return [xs[i] for i in self.out_indices]  # (N, channels[i], H/4/2**i, W/4/2**i)


class MixFFN(nn.Module):
    """Feed-forward network with a depthwise 3x3 convolution, which replaces position encodings."""

    def __init__(self, channels, hidden_channels, drop_rate):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden_channels, 1),
            nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1, groups=hidden_channels),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Conv2d(hidden_channels, channels, 1),
            nn.Dropout(drop_rate),
        )

    def forward(self, x):  # (N, h, w, C)
        return self.layers(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EfficientAttention(nn.Module):
    """Self-attention whose keys and values come from a map reduced by a factor of `sr_ratio`."""

    def __init__(self, channels, num_heads, sr_ratio, qkv_bias, drop_rate, attn_drop_rate):
        super().__init__()
        self.sr_ratio = sr_ratio
        self.attn = nn.MultiheadAttention(
            channels, num_heads, attn_drop_rate, qkv_bias, batch_first=True
        )
        self.drop = nn.Dropout(drop_rate)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(channels, channels, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(channels, 1e-6)

    def forward(self, x):  # (N, h, w, C)
        query = x.flatten(1, 2)  # (N, h*w, C)
        key = query
        if self.sr_ratio > 1:
            key = self.sr(x.permute(0, 3, 1, 2))  # (N, C, h/sr_ratio, w/sr_ratio)
            key = self.norm(key.flatten(2).transpose(1, 2))  # (N, h*w/sr_ratio², C)
        y, _ = self.attn(query, key, key, need_weights=False)
        return self.drop(y).unflatten(1, x.shape[1:3])


class TransformerBlock(nn.Module):
    """Pre-norm transformer block of the given attention and feed-forward network."""

    def __init__(self, channels, attn, ffn, drop_path_rate, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps)
        self.norm2 = nn.LayerNorm(channels, eps)
        self.attn = attn
        self.ffn = ffn
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x):  # (N, h, w, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Strided convolution and layer norm."""

    def __init__(self, in_channels, channels, kernel_size, stride, padding, eps):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, x):  # (N, C, H, W) -> (N, h, w, channels)
        return self.norm(self.projection(x).permute(0, 2, 3, 1))


def init_transformer(module, *layer_types):
    """Give linear layers and `layer_types` truncated normal weights (std 0.02) and zero biases."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, *layer_types)):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def drop_path_rates(rate, depths):
    """Return the drop rate of each block of each stage, which grows linearly from 0 to `rate`."""
    total = sum(depths)
    rates = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


class MixVisionTransformer(Backbone):
    """MiT, the encoder of SegFormer (https://arxiv.org/abs/2105.15203).

    MiT-b0 has embed_dims 32 and num_layers 2, 2, 2, 2; MiT-b5 has 64 and 3, 6, 40, 3.

    embed_dims: channels of each attention head; stage i has `embed_dims * num_heads[i]` channels.
    num_layers, num_heads, patch_sizes, strides, sr_ratios: one value for each stage. The keys and
        values of stage i's attention are `sr_ratios[i]` times smaller in height and width.
    """

    FIXED = {"norm_cfg": [{"type": "LN", "eps": 1e-6}], "act_cfg": [{"type": "GELU"}]}

    def __init__(
        self,
        *,
        embed_dims: int = 64,
        num_stages: int = 4,
        num_layers: list[int] = (3, 4, 6, 3),
        num_heads: list[int] = (1, 2, 4, 8),
        patch_sizes: list[int] = (7, 3, 3, 3),
        strides: list[int] = (4, 2, 2, 2),
        sr_ratios: list[int] = (8, 4, 2, 1),
        mlp_ratio: int = 4,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **kwargs,
    ):
        super().__init__(num_stages, **kwargs)
        per_stage = (num_layers, num_heads, patch_sizes, strides, sr_ratios)
        if any(len(values) != num_stages for values in per_stage):
            raise UserError(
                f"num_stages is {num_stages}; num_layers, num_heads, patch_sizes, strides and "
                "sr_ratios need as many values"
            )
        rates = drop_path_rates(drop_path_rate, num_layers)
        self.layers = nn.ModuleList()
        in_channels = self.in_channels
        for i in range(num_stages):
            channels = embed_dims * num_heads[i]
            blocks = nn.ModuleList()
            for rate in rates[i]:
                attn = EfficientAttention(
                    channels, num_heads[i], sr_ratios[i], qkv_bias, drop_rate, attn_drop_rate
                )
                ffn = MixFFN(channels, mlp_ratio * channels, drop_rate)
                blocks.append(TransformerBlock(channels, attn, ffn, rate, 1e-6))
            patch = patch_sizes[i]
            embed = PatchEmbed(in_channels, channels, patch, strides[i], patch // 2, 1e-6)
            self.layers.append(nn.ModuleList([embed, blocks, nn.LayerNorm(channels, 1e-6)]))
            in_channels = channels
        init_transformer(self)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
                nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(m.bias)

    def forward(self, image):
        x = image
        outs = []
        for embed, blocks, norm in self.layers:
            x = run_blocks(blocks, embed(x), self.with_cp)  # (N, h, w, C)
            x = norm(x).permute(0, 3, 1, 2)
            outs.append(x)  # (N, embed_dims * num_heads[i], H/4/2**i, W/4/2**i)
        return [outs[i] for i in self.out_indices]

    def layer_names(self):
        layers = [("layers.0.0.",)]
        for i, (_, blocks, _) in enumerate(self.layers):
            layers += [(f"layers.{i}.1.{k}.",) for k in range(len(blocks))]
            layers[-1] += (f"layers.{i}.2.", f"layers.{i + 1}.0.")
        return layers


def make_divisible(channels):
    """Round to the nearest multiple of 8, but not down by more than 10 %."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    if rounded < 0.9 * channels:
        rounded += 8
    return rounded


class InvertedResidual(nn.Module):
    """MobileNetV2 block: 1x1 convolution to more channels, depthwise 3x3, and 1x1 to fewer."""

    def __init__(self, in_channels, out_channels, stride, dilation, expand_ratio):
        super().__init__()
        hidden = in_channels * expand_ratio
        layers = []
        if expand_ratio > 1:
            layers.append(ConvModule(in_channels, hidden, act=nn.ReLU6))
        layers += [
            ConvModule(
                hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden, act=nn.ReLU6
            ),
            ConvModule(hidden, out_channels, act=None),
        ]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x):
        if self.shortcut:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(Backbone):
    """Inverted residuals in seven stages (https://arxiv.org/abs/1801.04381).

    widen_factor: multiplies the channels of every stage.
    strides, dilations: of the first block of each stage.
    """

    LAYERS = [  # (expand_ratio, channels, blocks) of each stage
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    ]
    FIXED = {"act_cfg": [{"type": "ReLU6"}]}
    torchvision_name = "mobilenet_v2"

    def __init__(
        self,
        *,
        widen_factor: float = 1.0,
        strides: list[int] = (1, 2, 2, 2, 1, 2, 1),
        dilations: list[int] = (1, 1, 1, 1, 1, 1, 1),
        out_indices: list[int] = (1, 2, 4, 6),
        **kwargs,
    ):
        super().__init__(7, out_indices=out_indices, **kwargs)
        if not len(strides) == len(dilations) == 7:
            raise UserError("strides and dilations need seven values each")
        inplanes = make_divisible(32 * widen_factor)
        self.conv1 = ConvModule(self.in_channels, inplanes, 3, stride=2, act=nn.ReLU6)
        for i, (expand_ratio, channels, num_blocks) in enumerate(self.LAYERS):
            planes = make_divisible(channels * widen_factor)
            stride = strides[i]
            dilation = dilations[i]
            blocks = []
            for _ in range(num_blocks):
                blocks.append(InvertedResidual(inplanes, planes, stride, dilation, expand_ratio))
                inplanes = planes
                stride = 1
                dilation = 1
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def stage_modules(self):
        return [[self.conv1], *([getattr(self, f"layer{i + 1}")] for i in range(7))]

    def train(self, mode: bool = True) -> "MobileNetV2":
        super().train(mode)
        if not self.norm_eval:
            self.conv1.train(mode)  # as in MMSegmentation, a frozen stem updates its statistics
        return self

    def forward(self, image):
        return self.run_layers(self.conv1(image))  # (N, LAYERS[i][1] * widen_factor, h, w)

    def from_published(self, state):
        # torchvision has the same tensors in the same order, and features.18 for the classifier.
        tensors = [v for k, v in state.items() if re.match(r"features\.(\d|1[0-7])\.", k)]
        return dict(zip(self.state_dict(), tensors))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a feature map."""

    def forward(self, x):  # (N, C, h, w)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, layer norm, two linear layers, and a learned scale per channel."""

    def __init__(self, channels, layer_scale, drop_path_rate):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale))
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, 1e-6)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x):  # (N, C, h, w)
        y = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))  # (N, h, w, C)
        y = self.gamma * self.pointwise_conv2(F.gelu(self.pointwise_conv1(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(Backbone):
    """A ConvNet for the 2020s (https://arxiv.org/abs/2201.03545), under mmpretrain's names.

    arch: one of ARCHS.
    layer_scale_init_value: initial scale of every residual branch.
    """

    ARCHS = {  # blocks of each stage, channels of the first stage
        "tiny": ([3, 3, 9, 3], 96),
        "small": ([3, 3, 27, 3], 96),
        "base": ([3, 3, 27, 3], 128),
        "large": ([3, 3, 27, 3], 192),
        "xlarge": ([3, 3, 27, 3], 256),
    }
    FIXED = {
        "norm_cfg": [{"type": "LN2d", "eps": 1e-6}],
        "act_cfg": [{"type": "GELU"}],
        "gap_before_final_norm": [False],
    }

    def __init__(
        self,
        *,
        arch: str = "tiny",
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        **kwargs,
    ):
        super().__init__(4, **kwargs)
        if arch not in self.ARCHS:
            raise UserError(f"arch is {arch!r}; it can be {', '.join(self.ARCHS)}")
        self.torchvision_name = f"convnext_{arch}"
        depths, width = self.ARCHS[arch]
        widths = [width * 2**i for i in range(4)]
        stem = nn.Sequential(nn.Conv2d(self.in_channels, width, 4, 4), LayerNorm2d(width, 1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for channels in widths[:3]:
            norm = LayerNorm2d(channels, 1e-6)
            conv = nn.Conv2d(channels, 2 * channels, 2, 2)
            self.downsample_layers.append(nn.Sequential(norm, conv))
        self.stages = nn.ModuleList()
        for channels, rates in zip(widths, drop_path_rates(drop_path_rate, depths)):
            blocks = [ConvNeXtBlock(channels, layer_scale_init_value, rate) for rate in rates]
            self.stages.append(nn.Sequential(*blocks))
        for i in self.out_indices:
            self.add_module(f"norm{i}", LayerNorm2d(widths[i], 1e-6))
        init_transformer(self, nn.Conv2d)

    def forward(self, image):
        x = image
        outs = []
        for downsample, blocks in zip(self.downsample_layers, self.stages):
            x = run_blocks(blocks, downsample(x), self.with_cp)
            outs.append(x)  # (N, width * 2**i, H/4/2**i, W/4/2**i)
        return [getattr(self, f"norm{i}")(outs[i]) for i in self.out_indices]

    def layer_names(self):
        """Three blocks of the third stage make a layer, as in BEiT's and ConvNeXt's own code."""
        third = [f"stages.2.{k}." for k in range(len(self.stages[2]))]
        return [
            ("downsample_layers.0.",),
            ("stages.0.",),
            ("downsample_layers.1.", "stages.1."),
            ("downsample_layers.2.", *third[:3]),
            *(tuple(third[k : k + 3]) for k in range(3, len(third), 3)),
            ("downsample_layers.3.", "stages.3."),
        ]

    def stage_names(self):
        return [("downsample_layers.",), *((f"stages.{i}.",) for i in range(4))]

    def from_published(self, state):
        rules = [
            (r"^classifier\.0", "norm3"),
            (r"^features\.0\.", "downsample_layers.0."),
            (r"\.block\.0\.", ".depthwise_conv."),
            (r"\.block\.2\.", ".norm."),
            (r"\.block\.3\.", ".pointwise_conv1."),
            (r"\.block\.5\.", ".pointwise_conv2."),
            (r"\.layer_scale$", ".gamma"),
        ]
        rules += [(rf"^features\.{2 * i + 1}\.", f"stages.{i}.") for i in range(4)]
        rules += [(rf"^features\.{2 * i}\.", f"downsample_layers.{i}.") for i in range(1, 4)]
        state = rename(state, rules)
        for key, value in state.items():
            if key.endswith("gamma"):
                state[key] = value.flatten()  # (C, 1, 1) -> (C,)
        return state


def rename(state, rules):
    """Apply all rules, pairs of a regular expression and its replacement, in turn to every key."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


class WindowMSA(nn.Module):
    """Self-attention within windows of window_size x window_size pixels.

    Adds a learned bias for the relative position of query and key to the attention logits.
    """

    def __init__(self, channels, num_heads, window_size, qkv_bias, drop_rate, attn_drop_rate):
        super().__init__()
        self.num_heads = num_heads
        offsets = 2 * window_size - 1  # from 1 - window_size to window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets**2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        axis = torch.arange(window_size)
        position = torch.cartesian_prod(axis, axis)  # (L, 2): row and column; L = window_size²
        offset = position[:, None] - position + window_size - 1  # (L, L, 2)
        index = offset[..., 0] * offsets + offset[..., 1]
        self.register_buffer("relative_position_index", index)  # (L, L)
        self.qkv = nn.Linear(channels, 3 * channels, qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x, mask):
        """x (N * windows, L, C), mask (windows, L, L) added to the attention logits."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N * windows, num_heads, L, C / num_heads) each
        bias = self.relative_position_bias_table[self.relative_position_index]  # (L, L, num_heads)
        # Contiguous, as fused attention on GPUs does not take the strides of a permuted bias.
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)  # (1, num_heads, L, L)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class ShiftWindowMSA(nn.Module):
    """WindowMSA on a whole feature map, with windows that are shifted by `shift_size` pixels.

    The shift rolls the map, so that opposite borders meet in one window. A mask keeps them from
    attending to each other.
    """

    def __init__(self, w_msa, window_size, shift_size):
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.w_msa = w_msa

    def window_partition(self, x):
        """(N, H, W, C) -> (N * windows, window_size², C)."""
        x = x.unflatten(2, (-1, self.window_size)).unflatten(1, (-1, self.window_size))
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def window_reverse(self, x, height, width):
        """(N * windows, window_size², C) -> (N, height, width, C)."""
        size = self.window_size
        x = x.unflatten(1, (size, size)).unflatten(0, (-1, height // size, width // size))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def shift_mask(self, x):
        """Return the mask of the rolled map x: -100 between pixels from opposite borders, else 0.

        Returns (windows, window_size², window_size²).
        """
        height, width = x.shape[1:3]
        row_wrapped = torch.arange(height, device=x.device) >= height - self.shift_size
        column_wrapped = torch.arange(width, device=x.device) >= width - self.shift_size
        region = 2 * row_wrapped[:, None] + column_wrapped  # (H, W)
        region = self.window_partition(region[None, :, :, None])  # (windows, window_size², 1)
        return torch.where(region == region.transpose(1, 2), 0.0, -100.0).to(x.dtype)

    def forward(self, x):  # (N, h, w, C)
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -w % self.window_size, 0, -h % self.window_size))  # (N, H, W, C)
        height, width = x.shape[1:3]
        mask = None
        if self.shift_size:
            x = x.roll((-self.shift_size, -self.shift_size), (1, 2))
            mask = self.shift_mask(x)
        x = self.window_reverse(self.w_msa(self.window_partition(x), mask), height, width)
        if self.shift_size:
            x = x.roll((self.shift_size, self.shift_size), (1, 2))
        return x[:, :h, :w]


class FFN(nn.Sequential):
    """Feed-forward network of two linear layers, under mmcv's names."""

    def __init__(self, channels, hidden_channels, drop_rate):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden_channels), nn.GELU(), nn.Dropout(drop_rate)),
            nn.Linear(hidden_channels, channels),
            nn.Dropout(drop_rate),
        )


class PatchMerging(nn.Module):
    """Merges 2x2 pixels into one with twice the channels."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x):  # (N, h, w, C) -> (N, h/2, w/2, 2C)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (N, h/2, 2, w/2, 2, C)
        # In MMSegmentation's order: the four pixels of the first channel, of the second, and so on.
        x = x.permute(0, 1, 3, 5, 2, 4).flatten(3)  # (N, h/2, w/2, 4C)
        return self.reduction(self.norm(x))


class SwinTransformer(Backbone):
    """Swin, a transformer with shifted windows (https://arxiv.org/abs/2103.14030).

    Swin-T has embed_dims 96 and depths 2, 2, 6, 2; Swin-B has 128 and 2, 2, 18, 2.

    embed_dims: channels of the first stage; every further stage doubles them.
    depths: blocks of each stage.
    """

    FIXED = {
        "norm_cfg": [{"type": "LN"}],
        "act_cfg": [{"type": "GELU"}],
        "patch_size": [4],
        "strides": [[4, 2, 2, 2]],
        "patch_norm": [True],
        "qk_scale": [None],
        "use_abs_pos_embed": [False],
        "pretrain_img_size": [224, 384],
    }

    def __init__(
        self,
        *,
        embed_dims: int = 96,
        depths: list[int] = (2, 2, 6, 2),
        num_heads: list[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: int = 4,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        **kwargs,
    ):
        super().__init__(len(depths), **kwargs)
        if len(depths) != len(num_heads):
            raise UserError("depths and num_heads need a value for each stage")
        sizes = {
            (96, (2, 2, 6, 2)): "swin_t",
            (96, (2, 2, 18, 2)): "swin_s",
            (128, (2, 2, 18, 2)): "swin_b",
        }
        self.torchvision_name = sizes.get((embed_dims, tuple(depths)))
        self.patch_embed = PatchEmbed(self.in_channels, embed_dims, 4, 4, 0, 1e-5)
        self.drop = nn.Dropout(drop_rate)
        self.stages = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depths)
        for i in range(self.num_stages):
            channels = embed_dims * 2**i
            stage = nn.Module()  # a namespace, for MMSegmentation's parameter names
            stage.blocks = nn.ModuleList()
            for k, rate in enumerate(rates[i]):
                w_msa = WindowMSA(
                    channels, num_heads[i], window_size, qkv_bias, drop_rate, attn_drop_rate
                )
                # Every second block shifts the windows.
                shift_size = window_size // 2 if k % 2 else 0
                attn = ShiftWindowMSA(w_msa, window_size, shift_size)
                ffn = FFN(channels, mlp_ratio * channels, drop_rate)
                stage.blocks.append(TransformerBlock(channels, attn, ffn, rate, 1e-5))
            if i < self.num_stages - 1:
                stage.downsample = PatchMerging(channels)
            self.stages.append(stage)
            if i in self.out_indices:
                self.add_module(f"norm{i}", nn.LayerNorm(channels))
        init_transformer(self)

    def stage_modules(self):
        modules = [[self.patch_embed, self.drop]]
        for i, stage in enumerate(self.stages):
            norms = [getattr(self, f"norm{i}")] if i in self.out_indices else []
            modules.append([stage, *norms])
        return modules

    def forward(self, image):
        image = F.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))
        x = self.drop(self.patch_embed(image))  # (N, H/4, W/4, embed_dims)
        outs = []
        for stage in self.stages:
            x = run_blocks(stage.blocks, x, self.with_cp)
            outs.append(x)  # (N, H/4/2**i, W/4/2**i, embed_dims * 2**i)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)
        return [getattr(self, f"norm{i}")(outs[i]).permute(0, 3, 1, 2) for i in self.out_indices]

    def layer_names(self):
        layers = [("patch_embed.",)]
        for i, stage in enumerate(self.stages):
            layers += [(f"stages.{i}.blocks.{k}.",) for k in range(len(stage.blocks))]
            layers[-1] += (f"stages.{i}.downsample.",)
        return layers

    def from_published(self, state):
        rules = [
            (r"^norm\.", "norm3."),
            (r"^features\.0\.0\.", "patch_embed.projection."),
            (r"^features\.0\.2\.", "patch_embed.norm."),
            (r"\.attn\.", ".attn.w_msa."),
            (r"\.mlp\.0\.", ".ffn.layers.0.0."),
            (r"\.mlp\.3\.", ".ffn.layers.1."),
        ]
        rules += [(rf"^features\.{2 * i + 1}\.", f"stages.{i}.blocks.") for i in range(4)]
        rules += [(rf"^features\.{2 * i + 2}\.", f"stages.{i}.downsample.") for i in range(4)]
        renamed = {}
        for key, value in rename(state, rules).items():
            if key.endswith("relative_position_index"):
                continue  # A constant; torchvision stores it flattened.
            if ".downsample." in key:
                # torchvision stacks the pixels (0, 0), (1, 0), (0, 1) and (1, 1) with all channels.
                value = value.unflatten(-1, (2, 2, -1)).transpose(-3, -2)
                value = value.movedim(-1, -3).flatten(-3).contiguous()
            renamed[key] = value
        return renamed


class RopePositionEmbedding(nn.Module):
    """Rotary positions (https://arxiv.org/abs/2104.09864) of a grid of patches, as DINOv3 has them.

    Rows and columns run from -1 to 1 over the image; each rotates half of a head's channels.
    """

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        # float64, so that the angles are exact in every precision.
        exponents = torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4)
        self.register_buffer("periods", base**exponents)

    def forward(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Sine and cosine of the angles, (h*w, head_dim) each."""
        like = {"dtype": self.periods.dtype, "device": self.periods.device}
        rows = (torch.arange(h, **like) + 0.5) / h * 2 - 1
        columns = (torch.arange(w, **like) + 0.5) / w * 2 - 1
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), 2)  # (h, w, 2)
        angles = 2 * math.pi * grid.unsqueeze(3) / self.periods  # (h, w, 2, head_dim/4)
        angles = angles.view(h * w, -1).repeat(1, 2)
        return angles.sin(), angles.cos()


def rotate(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Rotate the patches, the last tokens of x (N, heads, L, C), by angles given as (h*w, C)."""
    extra = x.shape[2] - sine.shape[0]
    patches = x[:, :, extra:]
    first, second = patches.chunk(2, 3)
    turned = torch.cat([-second, first], 3)
    rotated = patches * cosine + turned * sine
    return torch.cat([x[:, :, :extra], rotated.to(x.dtype)], 2)


class LinearKMaskedBias(nn.Linear):
    """The projection to queries, keys and values; `bias_mask` leaves out the bias of the keys."""

    def __init__(self, channels: int):
        super().__init__(channels, 3 * channels)
        mask = torch.ones(3, channels)
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, channels: int, num_heads: int, mask_k_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        if mask_k_bias:
            self.qkv = LinearKMaskedBias(channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:  # (N, L, C)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, num_heads, L, C/num_heads) each
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """Two linear layers."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)


class SwiGLU(nn.Module):
    """A gated feed-forward layer (https://arxiv.org/abs/2002.05202), two thirds of `hidden` wide.

    `fused`: gate and value by one projection, as in DINOv2; DINOv3 has two.
    """

    def __init__(self, channels: int, hidden: int, fused: bool = False):
        super().__init__()
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
        self.fused = fused
        if fused:
            self.w12 = nn.Linear(channels, 2 * hidden)
        else:
            self.w1 = nn.Linear(channels, hidden)
            self.w2 = nn.Linear(channels, hidden)
        self.w3 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, 2) if self.fused else (self.w1(x), self.w2(x))
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, channels: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ViTBlock(nn.Module):
    """A transformer block that normalizes what enters attention and MLP."""

    def __init__(
        self, channels: int, attn: nn.Module, mlp: nn.Module, drop_path: float, eps: float
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps)
        self.attn = attn
        self.ls1 = nn.Identity()
        self.norm2 = nn.LayerNorm(channels, eps)
        self.mlp = mlp
        self.ls2 = nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens_and_rope: tuple) -> tuple:
        x, rope = tokens_and_rope  # (N, L, C), (sine, cosine) or None
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rope)))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x, rope


class ViT(Backbone):
    """A plain Vision Transformer (https://arxiv.org/abs/2010.11929), by default ViT-B/16.

    Names are those of timm, DINOv2 and DINOv3, whose weight files load as they are. A map is the
    normalized patch tokens after a block of `out_indices` (four evenly spaced ones by default):
    (N, embed_dim, H/patch_size, W/patch_size), of an image of any size.

    `img_size`: of the pretraining, which gives the number of learned positions. For other sizes
    they are interpolated, with the pretraining's `interpolate_offset` and `interpolate_antialias`.
    `pos_embed_rope_base`: of rotary positions, which take the place of learned ones.
    `num_register_tokens`: https://arxiv.org/abs/2309.16588. `init_values`: of LayerScale, None for
    no such layer. `ffn_layer`: mlp, swiglu (DINOv3) or swiglufused (DINOv2). `mask_k_bias`: no bias
    for keys. `pre_norm`: layer norm before the blocks, as in CLIP. `mask_token`: has the one of the
    weight files, which is not used.
    """

    FFN_LAYERS = {"mlp": Mlp, "swiglu": SwiGLU, "swiglufused": partial(SwiGLU, fused=True)}
    FIXED = {"norm_cfg": [{"type": "LN", "eps": 1e-6}], "act_cfg": [{"type": "GELU"}]}

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        ffn_layer: str = "mlp",
        init_values: float | None = None,
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        mask_k_bias: bool = False,
        mask_token: bool = False,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.0,
        pos_embed_rope_base: float | None = None,
        drop_path_rate: float = 0.0,
        out_indices: list[int] | None = None,
        **kwargs,
    ):
        c = embed_dim
        out_indices = out_indices or [depth * k // 4 - 1 for k in (1, 2, 3, 4)]
        super().__init__(depth, out_indices=out_indices, **kwargs)
        if ffn_layer not in self.FFN_LAYERS or c % (4 * num_heads):
            raise UserError(
                f"ffn_layer is {ffn_layer!r}, which can be {', '.join(self.FFN_LAYERS)}, and "
                f"embed_dim {c}, which has to be a multiple of 4 * num_heads, {4 * num_heads}"
            )
        self.patch_size = patch_size
        self.interpolate_offset = interpolate_offset
        self.interpolate_antialias = interpolate_antialias
        self.create_tokens(c, num_register_tokens, img_size, pos_embed_rope_base is None)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, c), requires_grad=False)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(
            self.in_channels, c, patch_size, patch_size, bias=not pre_norm
        )
        if pos_embed_rope_base is not None:
            self.rope_embed = RopePositionEmbedding(c // num_heads, pos_embed_rope_base)
        self.norm_pre = nn.LayerNorm(c, norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList()
        for rate in drop_path_rates(drop_path_rate, [depth])[0]:
            attn = Attention(c, num_heads, mask_k_bias)
            mlp = self.FFN_LAYERS[ffn_layer](c, int(c * mlp_ratio))
            block = ViTBlock(c, attn, mlp, rate, norm_eps)
            if init_values is not None:
                block.ls1 = LayerScale(c, init_values)
                block.ls2 = LayerScale(c, init_values)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(c, norm_eps)
        init_transformer(self)
        self.blocks[max(out_indices) + 1 :].requires_grad_(False)  # no map depends on these

    def create_tokens(self, channels: int, registers: int, img_size: int, positions: bool) -> None:
        """Create the learned tokens beside the patches, and the learned positions."""
        counts = {"cls_token": 1}
        if registers:
            counts["register_tokens" if positions else "storage_tokens"] = registers
        self.extra_tokens = list(counts)
        if positions:
            counts["pos_embed"] = 1 + (img_size // self.patch_size) ** 2
        for name, count in counts.items():
            tokens = nn.init.trunc_normal_(torch.empty(1, count, channels), std=0.02)
            self.register_parameter(name, nn.Parameter(tokens))

    def forward(self, image: Tensor) -> list[Tensor]:
        size = self.patch_size
        height, width = image.shape[2:]
        image = F.pad(image, (0, -image.shape[3] % size, 0, -image.shape[2] % size))
        x = self.patch_embed.proj(image)  # (N, C, h, w)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        extra = [getattr(self, name) for name in self.extra_tokens]
        rope = None
        if hasattr(self, "rope_embed"):
            rope = [table.to(self.cls_token.dtype) for table in self.rope_embed(h, w)]
        else:
            x = x + self.positions(h, w)
            extra[0] = extra[0] + self.pos_embed[:, :1]
        x = torch.cat([*(tokens.expand(x.shape[0], -1, -1) for tokens in extra), x], 1)
        x = self.norm_pre(x)  # (N, extra + h*w, C)
        maps = {}
        for i, block in enumerate(self.blocks[: max(self.out_indices) + 1]):
            x, rope = run_blocks([block], (x, rope), self.with_cp)
            if i in self.out_indices:
                patches = self.norm(x[:, -h * w :]).transpose(1, 2)
                maps[i] = crop_map(patches.unflatten(2, (h, w)), height, width, size)
        return [maps[i] for i in self.out_indices]

    def positions(self, h: int, w: int) -> Tensor:
        """Return the learned positions of h x w patches, (1, h*w, C), by bicubic interpolation."""
        grid = self.pos_embed[:, 1:]
        side = math.isqrt(grid.shape[1])
        if not torch.compiler.is_exporting() and h == w == side:
            return grid
        # Matrix products, as the gradient of F.interpolate is not deterministic on CUDA.
        rows = self.interpolation(h, side, grid)  # (h, side)
        columns = self.interpolation(w, side, grid)  # (w, side)
        with without_autocast(grid.device):
            y = (rows @ grid.reshape(side, -1)).view(h, side, -1)
            return (columns @ y).view(1, h * w, -1)

    def interpolation(self, size: int, side: int, grid: Tensor) -> Tensor:
        """Return the matrix (size, side) that interpolates `side` positions to `size`, bicubic."""
        like = {"dtype": grid.dtype, "device": grid.device}
        unit = torch.eye(side, **like)[None, None]
        if self.interpolate_offset and torch.compiler.is_exporting():
            # torch.export would fix the scale factor of F.interpolate, but not this grid.
            rows = (2 * torch.arange(size, **like) + 1) / (size + self.interpolate_offset)
            columns = (2 * torch.arange(side, **like) + 1) / side
            points = torch.stack(torch.meshgrid(columns - 1, rows - 1, indexing="xy"), 2)
            points = points.unsqueeze(0)  # (1, size, side, 2)
            return F.grid_sample(unit, points, "bicubic", "border", align_corners=False)[0, 0]
        target = {"size": (size, side)}
        if self.interpolate_offset:
            target = {"scale_factor": ((size + self.interpolate_offset) / side, 1.0)}
        options = {"mode": "bicubic", "antialias": self.interpolate_antialias}
        return F.interpolate(unit, **target, **options)[0, 0]

    def layer_names(self):
        tokens = (*self.extra_tokens, "mask_token", "pos_embed")
        blocks = [(f"blocks.{i}.",) for i in range(len(self.blocks))]
        return [(*tokens, "patch_embed.", "norm_pre."), *blocks]

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """Without timm's classifier and a norm that only DINOv3's own training uses."""
        for key in list(state_dict):
            if key.startswith((f"{prefix}head.", f"{prefix}local_cls_norm.")):
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def crop_map(x: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Return the part of a padded map (N, C, h, w) that its image covers, resampled to h x w.

    height, width: the size of the image, whose border may lie within a pixel of the map.
    """
    h, w = x.shape[2:]
    # An exported network must not depend on whether the image happens to fill the map.
    if not torch.compiler.is_exporting() and (h * patch_size, w * patch_size) == (height, width):
        return x
    # F.interpolate would only copy the map, as its size stays. In the coordinates of grid_sample,
    # the map extends from -1 to 1.
    like = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    rows = (2 * torch.arange(h, **like) + 1) * height / (patch_size * h * h) - 1
    columns = (2 * torch.arange(w, **like) + 1) * width / (patch_size * w * w) - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2).to(x.dtype)  # (h, w, 2)
    grid = grid.expand(x.shape[0], -1, -1, -1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class VisionTransformer(ViT):
    """ViT, where `arch` stands for the keywords of a published one; other keywords override them.

    DINOv2 (https://arxiv.org/abs/2304.07193): dinov2_vits14, vitb14, vitl14, vitg14, and each with
    `_reg`; DINOv3 (https://arxiv.org/abs/2508.10104): dinov3_vits16, vits16plus, vitb16, vitl16,
    vitl16plus, vith16plus.
    """

    DINOV2 = {"img_size": 518, "patch_size": 14, "init_values": 1.0, "mask_token": True}
    OFFSET = {"interpolate_offset": 0.1}
    REGISTERS = {"num_register_tokens": 4, "interpolate_antialias": True}
    DINOV3 = {
        "num_register_tokens": 4,
        "pos_embed_rope_base": 100.0,
        "init_values": 1e-5,
        "norm_eps": 1e-5,
        "mask_k_bias": True,
        "mask_token": True,
    }
    PLUS = {"mlp_ratio": 6.0, "ffn_layer": "swiglu"}
    VITS = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    VITB = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    VITL = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    VITH = {"embed_dim": 1280, "depth": 32, "num_heads": 20}
    VITG = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn_layer": "swiglufused"}
    ARCHS = {
        "dinov2_vits14": DINOV2 | VITS | OFFSET,
        "dinov2_vitb14": DINOV2 | VITB | OFFSET,
        "dinov2_vitl14": DINOV2 | VITL | OFFSET,
        "dinov2_vitg14": DINOV2 | VITG | OFFSET,
        "dinov2_vits14_reg": DINOV2 | VITS | REGISTERS,
        "dinov2_vitb14_reg": DINOV2 | VITB | REGISTERS,
        "dinov2_vitl14_reg": DINOV2 | VITL | REGISTERS,
        "dinov2_vitg14_reg": DINOV2 | VITG | REGISTERS,
        "dinov3_vits16": DINOV3 | VITS,
        "dinov3_vits16plus": DINOV3 | VITS | PLUS,
        "dinov3_vitb16": DINOV3 | VITB,
        "dinov3_vitl16": DINOV3 | VITL,
        "dinov3_vitl16plus": DINOV3 | VITL | PLUS,
        "dinov3_vith16plus": DINOV3 | VITH | PLUS,
    }

    def __init__(self, *, arch: str | None = None, **kwargs):
        if arch is not None and arch not in self.ARCHS:
            raise UserError(f"arch is {arch!r}; it can be {', '.join(self.ARCHS)}")
        super().__init__(**{**self.ARCHS.get(arch, {}), **kwargs})


class ConvBlock(nn.Sequential):
    """3x3 convolutions, the first with the stride, the others dilated."""

    def __init__(
        self, in_channels: int, channels: int, num_convs: int, dilation: int, stride: int = 1
    ):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3, stride=stride))
        for _ in range(num_convs - 1):
            self.convs.append(ConvModule(channels, channels, 3, dilation=dilation))


class UpConvBlock(nn.Module):
    """Merges a map into the encoder's finer one, which has half the channels."""

    def __init__(self, channels: int, num_convs: int, dilation: int, same_size: bool):
        super().__init__()
        self.conv_block = ConvBlock(channels, channels // 2, num_convs, dilation)
        self.upsample = ConvModule(channels, channels // 2)
        if not same_size:  # the names of MMSegmentation's InterpConv
            conv = nn.Sequential(nn.Identity(), self.upsample)
            self.upsample = nn.Sequential()
            self.upsample.interp_upsample = conv

    def forward(self, skip_and_x: tuple[Tensor, Tensor]) -> Tensor:
        skip, x = skip_and_x  # (N, channels/2, 2h, 2w), (N, channels, h, w)
        x = self.upsample(resize(x, skip, align_corners=False))
        return self.conv_block(torch.cat([skip, x], 1))


class UNet(Backbone):
    """U-Net (https://arxiv.org/abs/1505.04597) with padded convolutions and BN, for any image size.

    Stage i of the encoder halves the map by the stride of its first convolution if `strides[i]` is
    2, else by max pooling if `downsamples[i - 1]`. Maps, coarsest first: the encoder's last, with
    base_channels * 2**(num_stages - 1) channels, then the decoder's, up to the image's size.
    """

    FIXED = {"upsample_cfg": [{"type": "InterpConv"}]}

    def __init__(
        self,
        *,
        in_channels: int = 3,
        base_channels: int = 64,
        num_stages: int = 5,
        strides: list[int] = (1,) * 5,
        enc_num_convs: list[int] = (2,) * 5,
        dec_num_convs: list[int] = (2,) * 4,
        downsamples: list[bool] = (True,) * 4,
        enc_dilations: list[int] = (1,) * 5,
        dec_dilations: list[int] = (1,) * 4,
        **kwargs,
    ):
        indices = range(num_stages)
        super().__init__(num_stages, in_channels=in_channels, out_indices=indices, **kwargs)
        lengths = {len(x) for x in (strides, enc_num_convs, enc_dilations)}
        lengths |= {len(x) + 1 for x in (downsamples, dec_num_convs, dec_dilations)}
        if lengths != {num_stages}:
            raise UserError(
                f"num_stages is {num_stages}; strides, enc_num_convs and enc_dilations need as "
                "many values, and downsamples, dec_num_convs and dec_dilations one fewer"
            )
        self.encoder = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for i in indices:
            channels = base_channels * 2**i
            block = ConvBlock(in_channels, channels, enc_num_convs[i], enc_dilations[i], strides[i])
            stage = nn.Sequential(block)
            if i > 0:
                if downsamples[i - 1] and strides[i] == 1:
                    stage.insert(0, nn.MaxPool2d(2))
                same_size = strides[i] == 1 and not downsamples[i - 1]
                self.decoder.append(
                    UpConvBlock(channels, dec_num_convs[i - 1], dec_dilations[i - 1], same_size)
                )
            self.encoder.append(stage)
            in_channels = channels

    def forward(self, image: Tensor) -> list[Tensor]:
        x = image
        skips = []
        for stage in self.encoder:
            x = run_blocks(stage, x, self.with_cp)
            skips.append(x)  # (N, base_channels * 2**i, H/2**i, W/2**i)
        maps = [skips.pop()]
        for block in self.decoder[::-1]:
            maps.append(run_blocks([block], (skips.pop(), maps[-1]), self.with_cp))
        return maps


class PreActConv(nn.Module):
    """BN, ReLU and convolution, under mmcv's names."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, 1, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x), inplace=True))


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling (https://arxiv.org/abs/2101.06085).

    `parallel`: PIDNet's PAPPM, which takes all scales at once through a grouped convolution.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, parallel: bool):
        super().__init__()
        pools = [nn.AvgPool2d(2 * stride + 1, stride, stride) for stride in (2, 4, 8)]
        pools.append(nn.AdaptiveAvgPool2d(1))
        self.scales = nn.ModuleList([PreActConv(in_channels, channels)])
        self.scales.extend(nn.Sequential(pool, PreActConv(in_channels, channels)) for pool in pools)
        self.parallel = parallel
        if parallel:
            self.processes = PreActConv(4 * channels, 4 * channels, 3, groups=4)
        else:
            self.processes = nn.ModuleList(PreActConv(channels, channels, 3) for _ in pools)
        self.compression = PreActConv(5 * channels, out_channels)
        self.shortcut = PreActConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, h, w) -> (N, out_channels, h, w)
        first, *pooled = [resize(scale(x), x, align_corners=False) for scale in self.scales]
        maps = [first]
        if self.parallel:
            maps.append(self.processes(torch.cat([first + y for y in pooled], 1)))
        else:
            for process, y in zip(self.processes, pooled):
                maps.append(process(maps[-1] + y))
        return self.compression(torch.cat(maps, 1)) + self.shortcut(x)


class PIDBlock(nn.Module):
    """ResNet's basic block or bottleneck under mmcv's names; `relu`: whether it ends with one."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, relu: bool, bottleneck: bool = False
    ):
        super().__init__()
        self.relu = relu
        if bottleneck:
            self.conv1 = ConvModule(in_channels, channels)
            self.conv2 = ConvModule(channels, channels, 3, stride=stride)
            self.conv3 = ConvModule(channels, 2 * channels, act=None)
            channels = 2 * channels
        else:
            self.conv1 = ConvModule(in_channels, channels, 3, stride=stride)
            self.conv2 = ConvModule(channels, channels, 3, act=None)
            self.conv3 = nn.Identity()
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = ConvModule(in_channels, channels, stride=stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x))) + self.downsample(x)
        return F.relu(y, inplace=True) if self.relu else y


def pid_layer(
    in_channels: int, channels: int, count: int = 1, stride: int = 1, bottleneck: bool = False
) -> nn.Sequential:
    """Residual blocks; bottlenecks and the last of several basic blocks end without ReLU."""
    blocks = nn.Sequential()
    for i in range(count):
        relu = not bottleneck and (i == 0 or i < count - 1)
        blocks.append(PIDBlock(in_channels, channels, stride, relu, bottleneck))
        in_channels = 2 * channels if bottleneck else channels
        stride = 1
    return blocks


class PagFM(nn.Module):
    """Mixes a pixel of p with that of i, which counts the more the better the two agree."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.f_i = ConvModule(in_channels, channels, act=None)
        self.f_p = ConvModule(in_channels, channels, act=None)

    def forward(self, p: Tensor, i: Tensor) -> Tensor:  # (N, C, h, w), and any size
        agreement = self.f_p(p) * resize(self.f_i(i), p, align_corners=False)
        share = agreement.sum(1, keepdim=True).sigmoid()  # (N, 1, h, w)
        return share * resize(i, p, align_corners=False) + (1 - share) * p


class Bag(nn.Module):
    """Fuses the three branches: details (p) at boundaries (d), context (i) elsewhere."""

    def __init__(self, channels: int, light: bool):
        super().__init__()
        self.light = light
        if light:
            self.f_p = ConvModule(channels, channels, act=None)
            self.f_i = ConvModule(channels, channels, act=None)
        else:
            self.conv = PreActConv(channels, channels, 3)

    def forward(self, p: Tensor, i: Tensor, d: Tensor) -> Tensor:  # (N, channels, h, w) each
        share = d.sigmoid()
        if self.light:
            return self.f_p((1 - share) * i + p) + self.f_i(i + share * p)
        return self.conv(share * p + (1 - share) * i)


class PIDNet(Backbone):
    """PIDNet (https://arxiv.org/abs/2206.02066): branches for details, context and boundaries.

    S has `channels` 32, M 64; L has 64, `ppm_channels` 112, 3 stem blocks and 4 branch blocks.
    Maps: the proportional one (N, 2 * channels, H/8, W/8), the fused one (N, 4 * channels, H/8,
    W/8) and the derivative one (N, 2 * channels, H/8, W/8).
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 64,
        ppm_channels: int = 96,
        num_stem_blocks: int = 2,
        num_branch_blocks: int = 3,
        align_corners: bool = False,
        with_cp: bool = False,
    ):
        super().__init__(3, in_channels=in_channels, out_indices=range(3), with_cp=with_cp)
        self.align_corners = align_corners
        c = channels
        stem = num_stem_blocks
        light = stem == 2  # S and M
        self.stem = nn.Sequential(
            ConvModule(in_channels, c, 3, stride=2),
            ConvModule(c, c, 3, stride=2),
            pid_layer(c, c, stem),
            nn.ReLU(),
            pid_layer(c, 2 * c, stem, stride=2),
            nn.ReLU(),
        )
        context = [
            pid_layer(2 * c, 4 * c, num_branch_blocks, stride=2),
            pid_layer(4 * c, 8 * c, num_branch_blocks, stride=2),
            pid_layer(8 * c, 8 * c, 2, stride=2, bottleneck=True),
        ]
        details = [pid_layer(2 * c, 2 * c, stem) for _ in range(2)]
        details.append(pid_layer(2 * c, 2 * c, bottleneck=True))
        d = c if light else 2 * c
        boundaries = [
            PIDBlock(2 * c, d, 1, relu=False),
            pid_layer(c, c, bottleneck=True) if light else PIDBlock(d, d, 1, relu=False),
            pid_layer(2 * c, 2 * c, bottleneck=True),
        ]
        self.i_branch_layers = nn.ModuleList(context)
        self.p_branch_layers = nn.ModuleList(details)
        self.d_branch_layers = nn.ModuleList(boundaries)
        self.compression_1 = ConvModule(4 * c, 2 * c, act=None)
        self.compression_2 = ConvModule(8 * c, 2 * c, act=None)
        self.pag_1 = PagFM(2 * c, c)
        self.pag_2 = PagFM(2 * c, c)
        self.diff_1 = ConvModule(4 * c, d, 3, act=None)
        self.diff_2 = ConvModule(8 * c, 2 * c, 3, act=None)
        self.spp = DAPPM(16 * c, ppm_channels, 4 * c, parallel=light)
        self.dfm = Bag(4 * c, light)
        init_kaiming(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
            return run_blocks([layer], x, self.with_cp)

        # p, i and d are the proportional, integral and derivative branch.
        x = run_blocks(self.stem, image, self.with_cp)  # (N, 2 * channels, H/8, W/8)
        i = F.relu(run_layer(self.i_branch_layers[0], x))  # (N, 4 * channels, H/16, W/16)
        proportional = self.pag_1(run_layer(self.p_branch_layers[0], x), self.compression_1(i))
        d = run_layer(self.d_branch_layers[0], x)
        d = d + resize(self.diff_1(i), d, self.align_corners)

        i = F.relu(run_layer(self.i_branch_layers[1], i))  # (N, 8 * channels, H/32, W/32)
        p = run_layer(self.p_branch_layers[1], F.relu(proportional))
        p = self.pag_2(p, self.compression_2(i))
        d = run_layer(self.d_branch_layers[1], F.relu(d))
        derivative = d + resize(self.diff_2(i), d, self.align_corners)

        i = self.spp(run_layer(self.i_branch_layers[2], i))  # (N, 4 * channels, H/64, W/64)
        p = run_layer(self.p_branch_layers[2], F.relu(p))  # (N, 4 * channels, H/8, W/8)
        d = run_layer(self.d_branch_layers[2], F.relu(derivative))
        fused = self.dfm(p, resize(i, p, self.align_corners), d)
        return [proportional, fused, derivative]


class TimmBackbone(Backbone):
    """Any network of timm that gives feature maps, such as "convnext_tiny.fb_in22k".

    `channels` and `strides` say what the maps are. `out_indices` and `drop_path_rate`: null for the
    network's own. `options`: further keywords of timm.create_model, such as {"img_size": 512}, or
    for images of any size {"dynamic_img_size": true} (ViT), {"strict_img_size": false} (Swin).
    `pretrained`: "timm" for the weights of that name, which timm downloads; or their file.
    `with_cp`: timm's own checkpointing, which updates the statistics of BN twice in each step.
    """

    def __init__(
        self,
        *,
        name: str,
        in_channels: int = 3,
        out_indices: list[int] | None = None,
        drop_path_rate: float | None = None,
        with_cp: bool = False,
        options: dict = {},
    ):
        try:
            import timm
        except ImportError:
            raise UserError("this needs the package timm: pip install timm") from None
        if not timm.is_model(name):
            raise UserError(f"timm has no network {name!r}; {suggest(name, timm.list_models())}")
        self.create = partial(timm.create_model, name, in_chans=in_channels, **options)
        options = {"out_indices": out_indices, "drop_path_rate": drop_path_rate}
        options = {key: value for key, value in options.items() if value is not None}
        net = self.create(features_only=True, **options)
        self.channels = net.feature_info.channels()
        self.strides = net.feature_info.reduction()
        count = len(self.channels)
        super().__init__(count, in_channels=in_channels, out_indices=range(count), with_cp=with_cp)
        self.net = net
        self.is_channels_last = getattr(net, "output_fmt", None) == "NHWC"
        if with_cp:
            getattr(net, "model", net).set_grad_checkpointing()

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.net(image)
        return [x.permute(0, 3, 1, 2) if self.is_channels_last else x for x in maps]

    def published_weights(self, name):
        if name != "timm":
            return fetch(name, None)
        try:
            return self.create(pretrained=True).state_dict()
        except (OSError, RuntimeError) as error:  # no network, or no weights of this name
            raise UserError(
                f"timm has no weights of {self.create.args[0]} here ({error!r}). Download "
                "them on a machine with network access, and name the file in place of timm"
            ) from None

    def published_key(self, key: str) -> str:
        """Return what timm's whole network calls a tensor; "_" stands for ".", as in timm."""
        return re.sub("^(net_)?(model_)?(body_)*", "", key.replace(".", "_"))

    def from_published(self, state):
        own = {self.published_key(key): key for key in self.state_dict()}
        return {own.get(self.published_key(key), key): value for key, value in state.items()}

    def layer_distances(self, by_stage=False):
        from timm.models import group_parameters

        if by_stage:
            self.stage_names()
        with torch.device("meta"):
            whole = self.create()
        if not hasattr(whole, "group_matcher"):
            raise UserError(f"timm does not define the layers of {type(whole).__name__}")
        numbers = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        count = max(numbers.values())  # the number of the classifier, or of the last norm
        numbers = {self.published_key(name): number for name, number in numbers.items()}
        names = [name for name, _ in self.named_parameters()]
        return {name: count - numbers[self.published_key(name)] for name in names}


class TorchvisionBackbone(Backbone):
    """Any network of torchvision.models, such as "mobilenet_v3_large".

    `return_nodes`: the layers whose outputs are the maps, as torchvision.models.feature_extraction
    takes and lists them (get_graph_node_names). `channels` and `strides` say what the maps are.
    `options`: further keywords of torchvision.models.get_model.
    """

    def __init__(self, *, name: str, return_nodes: dict | list[str], options: dict = {}):
        from torchvision import models as torchvision_models
        from torchvision.models.feature_extraction import create_feature_extractor

        names = torchvision_models.list_models(torchvision_models)
        if name not in names:
            raise UserError(f"torchvision.models has no network {name!r}; {suggest(name, names)}")
        super().__init__(len(return_nodes), out_indices=range(len(return_nodes)))
        self.torchvision_name = name
        net = torchvision_models.get_model(name, weights=None, **options)
        self.net = create_feature_extractor(net, return_nodes).eval()
        height, width = 224, 672  # 224 / 2**k is no multiple of 3, to tell heights from channels
        with torch.device("meta"):
            probe = copy.deepcopy(self.net).to("meta")(torch.zeros(1, 3, height, width))
        self.net.train()
        for node, x in probe.items():
            if x.dim() != 4:
                raise UserError(f"return_nodes: {node} gives {list(x.shape)}, not a feature map")
        self.is_channels_last = all(x.shape[2] == 3 * x.shape[1] for x in probe.values())
        maps = [x.movedim(3, 1) if self.is_channels_last else x for x in probe.values()]
        self.channels = [x.shape[1] for x in maps]
        self.strides = [height // x.shape[2] for x in maps]

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.net(image).values()
        return [x.permute(0, 3, 1, 2) if self.is_channels_last else x for x in maps]

    def from_published(self, state):
        return {f"net.{key}": value for key, value in state.items()}


BACKBONES = {
    "ResNet": ResNet,
    "ResNetV1c": ResNetV1c,
    "ResNeXt": ResNeXt,
    "HRNet": HRNet,
    "MixVisionTransformer": MixVisionTransformer,
    "MobileNetV2": MobileNetV2,
    "ConvNeXt": ConvNeXt,
    "SwinTransformer": SwinTransformer,
    "VisionTransformer": VisionTransformer,
    "UNet": UNet,
    "PIDNet": PIDNet,
    "TimmBackbone": TimmBackbone,
    "TorchvisionBackbone": TorchvisionBackbone,
}


def check_maps(
    features: list[Tensor], channels: list[int], indices: list[int] | None = None
) -> None:
    """Raise UserError unless features[indices[i]] has channels[i] channels, for every i.

    indices: None for all maps, of which there have to be as many as `channels`.
    """
    found = [x.shape[1] for x in features]
    if indices is None:
        indices = range(len(channels))
        if len(found) != len(channels):
            raise UserError(
                f"needs {len(channels)} feature maps, but the backbone gives {len(found)}"
            )
    for index, expected in zip(indices, channels):
        if not -len(found) <= index < len(found):
            raise UserError(
                f"in_index is {index}, but there are {len(found)} feature maps, of {found} channels"
            )
        if found[index] != expected:
            raise UserError(
                f"in_channels is {expected}, but feature map {index} has {found[index]} channels; "
                f"all maps have {found}"
            )


# ---------------------------------------------- Necks: list of feature maps -> list of feature maps
class FPN(nn.Module):
    """Feature Pyramid Network (https://arxiv.org/abs/1612.03144).

    Projects every map to `out_channels` and adds the upsampled, coarser maps to it.
    """

    FIXED = {
        "norm_cfg": [None],
        "act_cfg": [None],
        "start_level": [0],
        "end_level": [-1],
        "add_extra_convs": [False],
        "upsample_cfg": [{"mode": "nearest"}],
    }

    def __init__(self, *, in_channels: list[int], out_channels: int, num_outs: int):
        super().__init__()
        if num_outs != len(in_channels):
            raise UserError(
                f"num_outs is {num_outs}; it must be {len(in_channels)}, the number of in_channels"
            )
        self.in_channels = in_channels
        self.lateral_convs = nn.ModuleList(
            ConvModule(c, out_channels, norm=False, act=None) for c in in_channels
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, norm=False, act=None) for _ in in_channels
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)

    def forward(self, features):
        check_maps(features, self.in_channels)
        # (N, out_channels, h, w) each
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:])
        return [conv(x) for conv, x in zip(self.fpn_convs, maps)]


class Feature2Pyramid(nn.Module):
    """Gives a plain ViT's four maps 4, 2, 1 and 0.5 times their size, for heads such as UPerHead.

    As in BEiT (https://arxiv.org/abs/2106.08254).
    """

    FIXED = {"rescales": [[4, 2, 1, 0.5]]}

    def __init__(self, *, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        c = embed_dim
        self.upsample_4x = nn.Sequential(
            nn.ConvTranspose2d(c, c, 2, 2),
            nn.BatchNorm2d(c),
            nn.GELU(),
            nn.ConvTranspose2d(c, c, 2, 2),
        )
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(c, c, 2, 2))

    def forward(self, features: list[Tensor]) -> list[Tensor]:  # (N, embed_dim, h, w) each
        check_maps(features, [self.embed_dim] * 4)
        a, b, c, d = features
        return [self.upsample_4x(a), self.upsample_2x(b), c, F.max_pool2d(d, 2)]


NECKS = {c.__name__: c for c in (FPN, Feature2Pyramid)}


# ---------- Heads: list of feature maps -> {part: logits (N, out_channels, h, w)}, prediction first
class DecodeHead(nn.Module):
    """Base class of the heads: feature selection, classifier and losses.

    A subclass defines `decode`.

    in_channels, in_index: channels and index of the feature map to take, or lists of several.
    input_transform: how to take several: "resize_concat" concatenates them at the size of the
        first one, "multiple_select" passes on the list.
    out_channels: num_classes by default. 1 is for two classes and losses with use_sigmoid.
    threshold: with one output channel, the probability above which a pixel is of class 1.
    sampler: section of a sampler, which weights the pixels in the losses.
    loss_decode: section of a loss, or a list of them; by default CrossEntropyLoss.
    """

    input_transform = None  # the default of a subclass that takes several feature maps

    def __init__(
        self,
        *,
        in_channels: int | list[int],
        channels: int,
        num_classes: int,
        out_channels: int | None = None,
        threshold: float | None = None,
        in_index: int | list[int] = -1,
        input_transform: str | None = None,
        dropout_ratio: float = 0.1,
        align_corners: bool = False,
        sampler: dict | None = None,
        loss_decode: dict | list[dict] = {},
    ):
        super().__init__()
        self.input_transform = input_transform or self.input_transform
        self.in_channels = in_channels
        self.in_index = in_index
        self.channels = channels
        self.num_classes = num_classes
        self.out_channels = num_classes if out_channels is None else out_channels
        self.threshold = threshold
        self.align_corners = align_corners
        self.check_inputs()
        self.check_outputs()
        self.map_channels = in_channels  # of each map
        if self.input_transform == "resize_concat":
            self.in_channels = sum(in_channels)
        if self.out_channels > 1:
            self.threshold = 0.5  # the class with the largest logit
        elif threshold is None:
            self.threshold = 0.3  # as in MMSegmentation

        losses = loss_decode if isinstance(loss_decode, (list, tuple)) else [loss_decode]
        self.loss_decode = nn.ModuleList(build_loss(loss, "loss_decode") for loss in losses)
        self.sampler = construct(SAMPLERS, sampler, "sampler") if sampler else None
        self.check_losses()

        self.dropout = nn.Dropout2d(max(dropout_ratio, 0))
        self.conv_seg = nn.Conv2d(channels, self.out_channels, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def check_inputs(self):
        if self.input_transform not in (None, "resize_concat", "multiple_select"):
            raise UserError(
                f"input_transform is {self.input_transform!r}; it can be resize_concat, "
                "multiple_select or null"
            )
        inputs = f"in_channels {self.in_channels} and in_index {self.in_index}"
        lists = [isinstance(value, (list, tuple)) for value in (self.in_channels, self.in_index)]
        if self.input_transform is None:
            if any(lists):
                raise UserError(f"{inputs} should be single numbers, or set input_transform")
        elif not all(lists) or len(self.in_channels) != len(self.in_index):
            raise UserError(f"{inputs} should be lists of the same length")

    def check_outputs(self):
        if self.num_classes < 2:
            raise UserError(
                f"num_classes is {self.num_classes}, but the background is a class too. Set "
                'num_classes to 2 and name both, as in data.classes=["background", "crack"]; for a '
                "single logit, also set out_channels to 1 and use_sigmoid in loss_decode"
            )
        one_for_two = self.out_channels == 1 and self.num_classes == 2
        if self.out_channels != self.num_classes and not one_for_two:
            raise UserError(
                f"out_channels is {self.out_channels}; it can be num_classes, {self.num_classes}, "
                "or 1 if num_classes is 2"
            )
        if self.threshold is not None and self.out_channels > 1:
            raise UserError(
                f"threshold is {self.threshold}, but with {self.out_channels} output channels the "
                "class is that of the largest logit; leave threshold out, or set out_channels to 1"
            )
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise UserError(f"threshold is {self.threshold}; it must be between 0 and 1")

    def check_losses(self):
        if not self.loss_decode:
            raise UserError("loss_decode is empty; leave it out for CrossEntropyLoss")
        if self.sampler and any(isinstance(loss, PlainLoss) for loss in self.loss_decode):
            raise UserError("a sampler needs losses that take pixel weights, as subclasses of Loss")
        if self.out_channels > 1:
            if any(isinstance(loss, LovaszLoss) and loss.binary for loss in self.loss_decode):
                raise UserError('loss_type "binary" of LovaszLoss needs out_channels: 1')
            return
        if self.sampler is not None:
            raise UserError("a sampler needs one output channel per class")
        for loss in self.loss_decode:
            if isinstance(loss, CrossEntropyLoss) and not loss.use_sigmoid:
                raise UserError("with one output channel, loss_decode needs use_sigmoid: true")
            if isinstance(loss, LovaszLoss) and not loss.binary:
                raise UserError('with one output channel, LovaszLoss needs loss_type: "binary"')
            if isinstance(loss, OhemCrossEntropy):
                raise UserError("OhemCrossEntropy needs one output channel per class")

    def select(self, features: list[Tensor]) -> Tensor | list[Tensor]:
        if self.input_transform is None:
            check_maps(features, [self.in_channels], [self.in_index])
            return features[self.in_index]
        check_maps(features, self.map_channels, self.in_index)
        selected = [features[i] for i in self.in_index]
        if self.input_transform == "resize_concat":
            return self.concat(selected)
        return selected

    def concat(self, maps):
        """Concatenate the maps along the channels, at the size of the first one."""
        return torch.cat([resize(x, maps[0], self.align_corners) for x in maps], 1)

    def decode(self, x: Tensor | list[Tensor]) -> Tensor:
        """What `select` returns -> (N, channels, h, w)."""
        raise NotImplementedError

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {"": self.conv_seg(self.dropout(self.decode(self.select(features))))}

    def loss(
        self, outputs: dict[str, Tensor], label: Tensor, normalizers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What `forward` returns and label (N, H, W) -> scalar losses by name.

        normalizers: one for each of `loss_decode`, see `Segmentor.normalizers`.
        """
        if normalizers is None:
            normalizers = [None] * len(self.loss_decode)
        losses = {}
        for part, logits in outputs.items():
            weight = None
            if self.sampler is not None:
                weight = self.sampler(logits, label, self.align_corners)
            for loss, normalizer in zip(self.loss_decode, normalizers):
                name = part + loss.loss_name
                value = loss(logits, label, self.align_corners, weight, normalizer)
                losses[name] = losses[name] + value if name in losses else value
        return losses


class FCNHead(DecodeHead):
    """Fully Convolutional Networks (https://arxiv.org/abs/1411.4038).

    num_convs: convolutions before the classifier.
    concat_input: concatenate their input to their output, and fuse the two by one more convolution.
    """

    def __init__(
        self,
        *,
        num_convs: int = 2,
        kernel_size: int = 3,
        concat_input: bool = True,
        dilation: int = 1,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_convs == 0 and self.in_channels != self.channels:
            raise UserError(
                f"channels is {self.channels}; without convolutions it must be in_channels, "
                f"{self.in_channels}"
            )
        widths = [self.in_channels] + [self.channels] * num_convs
        self.convs = nn.Sequential(
            *[ConvModule(i, o, kernel_size, dilation=dilation) for i, o in zip(widths, widths[1:])]
        )
        self.concat_input = concat_input
        if concat_input:
            self.conv_cat = ConvModule(self.in_channels + self.channels, self.channels, kernel_size)

    def context(self, x):
        """Return x. Subclasses gather context from the image here, after the first convolution."""
        return x

    def decode(self, x):  # (N, in_channels, h, w) -> (N, channels, h, w)
        y = x
        for i, conv in enumerate(self.convs):
            y = conv(y)
            if i == 0:
                y = self.context(y)
        if self.concat_input:
            y = self.conv_cat(torch.cat([x, y], 1))
        return y


class NonLocal(nn.Module):
    """Attention of every pixel to all pixels, added to the input."""

    def __init__(self, channels, reduction, use_scale):
        super().__init__()
        inner = max(channels // reduction, 1)
        self.scale = inner**-0.5 if use_scale else 1.0
        self.g = ConvModule(channels, inner, norm=False, act=None)
        self.theta = ConvModule(channels, inner, norm=False, act=None)
        self.phi = ConvModule(channels, inner, norm=False, act=None)
        self.conv_out = ConvModule(inner, channels, act=None)
        for module in (self.g, self.theta, self.phi):
            nn.init.normal_(module.conv.weight, std=0.01)
        nn.init.zeros_(self.conv_out.bn.weight)

    def forward(self, x):  # (N, C, h, w)
        return x + self.conv_out(attend(self.theta(x), self.phi(x), self.g(x), self.scale))


class NLHead(FCNHead):
    """Non-local Neural Networks (https://arxiv.org/abs/1711.07971)."""

    FIXED = {"mode": ["embedded_gaussian"]}

    def __init__(self, *, reduction: int = 2, use_scale: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.nl_block = NonLocal(self.channels, reduction, use_scale)

    def context(self, x):
        return self.nl_block(x)


class GlobalContext(nn.Module):
    """A weighted mean of all pixels, transformed and added to every pixel."""

    def __init__(self, channels, inner):
        super().__init__()
        self.conv_mask = nn.Conv2d(channels, 1, 1)
        self.channel_add_conv = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.LayerNorm([inner, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1),
        )
        nn.init.kaiming_normal_(self.conv_mask.weight, nonlinearity="relu")
        for parameter in (self.conv_mask.bias, *self.channel_add_conv[3].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x):  # (N, C, h, w)
        weights = self.conv_mask(x).flatten(2).softmax(2).to(x.dtype)  # (N, 1, h*w)
        mean = x.flatten(2) @ weights.transpose(1, 2)  # (N, C, 1)
        return x + self.channel_add_conv(mean.unsqueeze(3))


class GCHead(FCNHead):
    """GCNet (https://arxiv.org/abs/1904.11492)."""

    FIXED = {"pooling_type": ["att"], "fusion_types": [["channel_add"]]}

    def __init__(self, *, ratio: float = 0.25, **kwargs):
        super().__init__(**kwargs)
        self.gc_block = GlobalContext(self.channels, int(self.channels * ratio))

    def context(self, x):
        return self.gc_block(x)


class CrissCrossAttention(nn.Module):
    """Attention of every pixel to the pixels of its row and its column."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = Scale()

    def forward(self, x):  # (N, C, h, w)
        query = self.query_conv(x)  # (N, C/8, h, w)
        key = self.key_conv(x)
        value = self.value_conv(x)
        h = x.shape[2]
        column = torch.einsum("nchw,nciw->nhwi", query, key)  # (N, h, w, h)
        row = torch.einsum("nchw,nchj->nhwj", query, key)  # (N, h, w, w)
        # The pixel itself is part of its row already.
        itself = torch.eye(h, dtype=torch.bool, device=x.device).unsqueeze(1)  # (h, 1, h)
        energy = torch.cat([column.masked_fill(itself, -math.inf), row], 3)
        attention = energy.softmax(3).to(value.dtype)
        from_column = torch.einsum("nciw,nhwi->nchw", value, attention[..., :h])
        from_row = torch.einsum("nchj,nhwj->nchw", value, attention[..., h:])
        return self.gamma(from_column + from_row) + x


class CCHead(FCNHead):
    """CCNet (https://arxiv.org/abs/1811.11721).

    recurrence: rounds of criss-cross attention; two suffice for every pixel to see all others.
    """

    def __init__(self, *, recurrence: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.recurrence = recurrence
        self.cca = CrissCrossAttention(self.channels)

    def context(self, x):
        for _ in range(self.recurrence):
            x = self.cca(x)
        return x


class PSPHead(DecodeHead):
    """Pyramid Scene Parsing Network (https://arxiv.org/abs/1612.01105).

    pool_scales: side lengths of the grids that the map is pooled to.
    """

    def __init__(self, *, pool_scales: list[int] = (1, 2, 3, 6), **kwargs):
        super().__init__(**kwargs)
        self.psp_modules = PPM(pool_scales, self.in_channels, self.channels, self.align_corners)
        ppm_channels = self.in_channels + len(pool_scales) * self.channels
        self.bottleneck = ConvModule(ppm_channels, self.channels, 3)

    def decode(self, x):
        return self.bottleneck(self.psp_modules(x))


class UPerHead(DecodeHead):
    """Unified Perceptual Parsing (https://arxiv.org/abs/1807.10221): PSPNet's pyramid and an FPN.

    pool_scales: side lengths of the grids that the coarsest map is pooled to.
    """

    input_transform = "multiple_select"

    def __init__(self, *, pool_scales: list[int] = (1, 2, 3, 6), **kwargs):
        super().__init__(**kwargs)
        *finer, last = self.in_channels
        self.psp_modules = PPM(pool_scales, last, self.channels, self.align_corners)
        self.bottleneck = ConvModule(last + len(pool_scales) * self.channels, self.channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, self.channels) for c in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(self.channels, self.channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * self.channels, self.channels, 3)

    def decode(self, xs):
        maps = [conv(x) for conv, x in zip(self.lateral_convs, xs)]
        maps.append(self.bottleneck(self.psp_modules(xs[-1])))
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i], self.align_corners)
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, maps)]
        return self.fpn_bottleneck(self.concat([*outputs, maps[-1]]))


class FPNHead(DecodeHead):
    """Semantic branch of Panoptic FPN (https://arxiv.org/abs/1901.02446).

    Each map is upsampled to the size of the finest one in steps of two, and all are added up.

    feature_strides: stride of each map with respect to the image, finest first.
    """

    input_transform = "multiple_select"

    def __init__(self, *, feature_strides: list[int], **kwargs):
        super().__init__(**kwargs)
        finest = min(feature_strides)
        if len(feature_strides) != len(self.in_channels) or feature_strides[0] != finest:
            raise UserError(
                f"feature_strides {feature_strides} should have one value for each of in_channels, "
                "the smallest first"
            )
        self.scale_heads = nn.ModuleList()
        for in_channels, stride in zip(self.in_channels, feature_strides):
            layers = []
            for i in range(max(1, int(math.log2(stride / finest)))):
                layers.append(ConvModule(self.channels if i else in_channels, self.channels, 3))
                if stride != finest:
                    layers.append(
                        nn.Upsample(
                            scale_factor=2, mode="bilinear", align_corners=self.align_corners
                        )
                    )
            self.scale_heads.append(nn.Sequential(*layers))

    def decode(self, xs):
        first, *others = [head(x) for head, x in zip(self.scale_heads, xs)]
        return first + sum(resize(x, first, self.align_corners) for x in others)


class SegformerHead(DecodeHead):
    """All-MLP decoder of SegFormer (https://arxiv.org/abs/2105.15203), as 1x1 convolutions."""

    input_transform = "multiple_select"
    FIXED = {"interpolate_mode": ["bilinear"]}

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convs = nn.ModuleList(ConvModule(c, self.channels) for c in self.in_channels)
        self.fusion_conv = ConvModule(len(self.in_channels) * self.channels, self.channels)

    def decode(self, xs):
        return self.fusion_conv(self.concat([conv(x) for conv, x in zip(self.convs, xs)]))


class ASPPHead(DecodeHead):
    """Atrous spatial pyramid pooling of DeepLabV3 (https://arxiv.org/abs/1706.05587).

    dilations: one parallel convolution for each; a dilation of 1 is a 1x1 convolution.
    """

    def __init__(self, *, dilations: list[int] = (1, 6, 12, 18), **kwargs):
        super().__init__(**kwargs)
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvModule(self.in_channels, self.channels)
        )
        self.aspp_modules = nn.ModuleList(self.branch(dilation) for dilation in dilations)
        self.bottleneck = ConvModule((len(dilations) + 1) * self.channels, self.channels, 3)

    def branch(self, dilation):
        kernel_size = 1 if dilation == 1 else 3
        return ConvModule(self.in_channels, self.channels, kernel_size, dilation=dilation)

    def decode(self, x):
        mean = self.image_pool(x).expand(-1, -1, *x.shape[2:])  # (N, channels, h, w)
        branches = [module(x) for module in self.aspp_modules]
        return self.bottleneck(torch.cat([mean, *branches], 1))


class DepthwiseSeparableASPPHead(ASPPHead):
    """DeepLabV3+ (https://arxiv.org/abs/1802.02611): separable convolutions, and a decoder.

    c1_in_channels: channels of the backbone's first map, which the decoder concatenates; 0 for a
        decoder without it.
    c1_channels: channels that the map is projected to.
    """

    def __init__(self, *, c1_in_channels: int, c1_channels: int, **kwargs):
        super().__init__(**kwargs)
        self.c1_bottleneck = None
        decoder_channels = self.channels
        self.c1_in_channels = c1_in_channels
        if c1_in_channels:
            self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels)
            decoder_channels += c1_channels
        self.sep_bottleneck = nn.Sequential(
            SeparableConvModule(decoder_channels, self.channels),
            SeparableConvModule(self.channels, self.channels),
        )

    def branch(self, dilation):
        if dilation == 1:
            return super().branch(dilation)
        return SeparableConvModule(self.in_channels, self.channels, dilation=dilation)

    def select(self, features):
        if self.c1_in_channels:
            check_maps(features, [self.c1_in_channels], [0])
        return super().select(features), features[0]

    def decode(self, xs):
        x, c1 = xs
        y = super().decode(x)
        if self.c1_bottleneck is not None:
            c1 = self.c1_bottleneck(c1)  # (N, c1_channels, H/4, W/4)
            y = torch.cat([resize(y, c1, self.align_corners), c1], 1)
        return self.sep_bottleneck(y)


class DAHead(DecodeHead):
    """Dual Attention Network (https://arxiv.org/abs/1809.02983).

    Attention over positions (PAM) and over channels (CAM). The two and their sum have a classifier
    and losses each.

    pam_channels: channels of PAM's queries and keys.
    """

    def __init__(self, *, pam_channels: int, **kwargs):
        super().__init__(**kwargs)
        c = self.channels
        self.pam_in_conv = ConvModule(self.in_channels, c, 3)
        self.cam_in_conv = ConvModule(self.in_channels, c, 3)
        self.pam = SelfAttentionBlock(c, c, pam_channels, None, norm=False)
        self.cam = nn.Module()
        self.pam.gamma = Scale()
        self.cam.gamma = Scale()
        self.pam_out_conv = ConvModule(c, c, 3)
        self.cam_out_conv = ConvModule(c, c, 3)
        self.pam_conv_seg = nn.Conv2d(c, self.out_channels, 1)
        self.cam_conv_seg = nn.Conv2d(c, self.out_channels, 1)

    def channel_attention(self, x):  # (N, channels, h, w)
        energy = x.flatten(2) @ x.flatten(2).transpose(1, 2)  # (N, channels, channels)
        attention = (energy.amax(2, keepdim=True) - energy).softmax(2).to(x.dtype)
        return (attention @ x.flatten(2)).unflatten(2, x.shape[2:])

    def forward(self, features):
        x = self.select(features)
        pam = self.pam_in_conv(x)  # (N, channels, h, w)
        cam = self.cam_in_conv(x)
        pam = self.pam_out_conv(self.pam.gamma(self.pam(pam, pam)) + pam)
        cam = self.cam_out_conv(self.cam.gamma(self.channel_attention(cam)) + cam)
        return {
            "pam_cam.": self.conv_seg(self.dropout(pam + cam)),
            "pam.": self.pam_conv_seg(self.dropout(pam)),
            "cam.": self.cam_conv_seg(self.dropout(cam)),
        }


class Encoding(nn.Module):
    """Aggregate the residuals of all pixels to each of `num_codes` learned codewords."""

    def __init__(self, channels, num_codes):
        super().__init__()
        std = (num_codes * channels) ** -0.5
        self.codewords = nn.Parameter(torch.empty(num_codes, channels).uniform_(-std, std))
        self.scale = nn.Parameter(torch.empty(num_codes).uniform_(-1, 0))

    def forward(self, x):  # (N, C, h, w) -> (N, num_codes, C)
        x = x.flatten(2).transpose(1, 2)  # (N, h*w, C)
        with without_autocast(x.device):  # small differences of large numbers
            x = x.to(self.codewords.dtype)
            # |x - codeword|² = |x|² - 2 x codeword + |codeword|²
            distance = (
                x.square().sum(2, keepdim=True)
                - 2 * x @ self.codewords.T
                + self.codewords.square().sum(1)
            )  # (N, h*w, num_codes)
            weights = (self.scale * distance).softmax(2)
            return weights.transpose(1, 2) @ x - weights.sum(1).unsqueeze(2) * self.codewords


class EncModule(nn.Module):
    """Scale the channels by a function of the encoded image."""

    def __init__(self, channels, num_codes):
        super().__init__()
        self.encoding_project = ConvModule(channels, channels)
        self.encoding = nn.Sequential(
            Encoding(channels, num_codes), nn.BatchNorm1d(num_codes), nn.ReLU(inplace=True)
        )
        self.fc = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())

    def forward(self, x):  # (N, C, h, w) -> (N, C), (N, C, h, w)
        encoded = self.encoding(self.encoding_project(x)).mean(1)
        scale = self.fc(encoded)[:, :, None, None]
        return encoded, F.relu(x + x * scale)


class EncHead(DecodeHead):
    """EncNet (https://arxiv.org/abs/1803.08904).

    use_se_loss: also learn to predict which classes the image contains.
    loss_se_decode: the section of that loss, of which loss_weight and loss_name can be chosen.
    """

    input_transform = "multiple_select"
    FIXED = {"add_lateral": [False]}

    def __init__(
        self, *, num_codes: int = 32, use_se_loss: bool = True, loss_se_decode: dict = {}, **kwargs
    ):
        super().__init__(**kwargs)
        self.bottleneck = ConvModule(self.in_channels[-1], self.channels, 3)
        self.enc_module = EncModule(self.channels, num_codes)
        self.se_layer = None
        if use_se_loss:
            defaults = {"use_sigmoid": True, "loss_weight": 0.2}
            loss = build_loss(defaults | loss_se_decode, "loss_se_decode")
            cross_entropy = type(loss) is CrossEntropyLoss and loss.use_sigmoid
            if not cross_entropy or loss.class_weight is not None:
                raise UserError(
                    "loss_se_decode is always CrossEntropyLoss with use_sigmoid and without "
                    "class_weight; only its loss_weight and loss_name can be set"
                )
            # No class is ignored, so avg_non_ignore would change nothing.
            self.se_weight = loss.loss_weight
            self.se_name = loss_se_decode.get("loss_name", "loss_se")
            self.se_layer = nn.Linear(self.channels, self.num_classes)

    def forward(self, features):
        encoded, x = self.enc_module(self.bottleneck(self.select(features)[-1]))
        outputs = {"": self.conv_seg(self.dropout(x))}
        if self.se_layer is not None:
            outputs["se"] = self.se_layer(encoded)  # (N, num_classes)
        return outputs

    def loss(self, outputs, label, normalizers=None):
        losses = super().loss({"": outputs[""]}, label, normalizers)
        if self.se_layer is not None:
            logits = outputs["se"]
            classes = logits.shape[1]
            present = torch.zeros(len(label), classes + 1, device=label.device)
            # Ignored pixels go into the last column, which is cut off.
            present.scatter_(1, label.long().clamp(max=classes).flatten(1), 1)
            se_loss = F.binary_cross_entropy_with_logits(logits, present[:, :-1])
            losses[self.se_name] = self.se_weight * se_loss
        return losses


class ANNHead(DecodeHead):
    """Asymmetric Non-local Neural Network (https://arxiv.org/abs/1908.07678).

    key_pool_scales: side lengths of the grids that keys and values are pooled to.
    """

    input_transform = "multiple_select"
    FIXED = {"query_scales": [[1]]}

    def __init__(
        self, *, project_channels: int, key_pool_scales: list[int] = (1, 3, 6, 8), **kwargs
    ):
        super().__init__(**kwargs)
        if len(self.in_channels) != 2:
            raise UserError(
                f"in_channels {self.in_channels} should be two, of a finer and a coarser map"
            )
        low, high = self.in_channels
        c = self.channels
        pools = [AdaptiveAvgPool(scale) for scale in key_pool_scales]

        def pool(x):  # (N, C, h, w) -> (N, C, number of all grids' cells)
            return torch.cat([grid(x).flatten(2) for grid in pools], 2)

        options = {"scale": project_channels**-0.5, "pool": pool}
        self.fusion = nn.Module()
        self.context = nn.Module()
        block = SelfAttentionBlock(high, low, project_channels, high, **options)
        self.fusion.stages = nn.ModuleList([block])
        self.fusion.bottleneck = ConvModule(2 * high, high, act=None)
        self.bottleneck = ConvModule(high, c, 3)
        block = SelfAttentionBlock(c, c, project_channels, c, share=True, **options)
        self.context.stages = nn.ModuleList([block])
        self.context.bottleneck = ConvModule(2 * c, c)

    def decode(self, xs):
        low, high = xs
        fused = self.fusion.stages[0](high, low)  # (N, C of high, h, w)
        x = self.fusion.bottleneck(torch.cat([fused, high], 1))
        x = self.bottleneck(self.dropout(x))
        context = self.context.stages[0](x, x)  # (N, channels, h, w)
        return self.context.bottleneck(torch.cat([context, x], 1))


class OCRHead(DecodeHead):
    """Object-Contextual Representations (https://arxiv.org/abs/1909.11065).

    The second head of a cascade: each pixel attends to the mean feature of every class, which the
    first head's prediction defines.

    ocr_channels: channels of queries, keys and values.
    """

    FIXED = {"scale": [1]}

    def __init__(self, *, ocr_channels: int, **kwargs):
        super().__init__(**kwargs)
        self.object_context_block = SelfAttentionBlock(
            self.channels,
            self.channels,
            ocr_channels,
            self.channels,
            num_convs=2,
            value_norm=True,
            scale=ocr_channels**-0.5,
        )
        self.object_context_block.bottleneck = ConvModule(2 * self.channels, self.channels)
        self.bottleneck = ConvModule(self.in_channels, self.channels, 3)

    def forward(self, features, previous):
        x = self.bottleneck(self.select(features))  # (N, channels, h, w)
        weights = previous.flatten(2).softmax(2).to(x.dtype)  # (N, num_classes, h*w)
        objects = x.flatten(2) @ weights.transpose(1, 2)  # (N, channels, num_classes)
        block = self.object_context_block
        context = block(x, objects.unsqueeze(3))  # (N, channels, h, w)
        x = block.bottleneck(torch.cat([context, x], 1))
        return {"": self.conv_seg(self.dropout(x))}


def point_wise_attention(mask, mask_size, collect):
    """Spread PSANet's masks over the map: (N, mask_h * mask_w, h, w) -> (N, h*w, h*w).

    Each pixel's mask is centered on it and weights its surroundings; beyond the mask, weights are
    0. With `collect`, column s of the result is the mask of pixel s, otherwise row s is.
    """
    mask_h, mask_w = mask_size
    h, w = mask.shape[2:]
    y = torch.arange(h, device=mask.device)
    x = torch.arange(w, device=mask.device)
    # Row and column of the surrounding pixel (first axis) in the mask of its center (second axis).
    row = y[:, None] - y + (mask_h - 1) // 2  # (h, h)
    column = x[:, None] - x + (mask_w - 1) // 2  # (w, w)
    row = row[:, None, :, None]  # (h, 1, h, 1)
    column = column[None, :, None, :]  # (1, w, 1, w)
    inside = (row >= 0) & (row < mask_h) & (column >= 0) & (column < mask_w)  # (h, w, h, w)
    index = row.clamp(0, mask_h - 1) * mask_w + column.clamp(0, mask_w - 1)
    index = index.reshape(1, h * w, h * w).expand(mask.shape[0], -1, -1)
    weights = mask.flatten(2).gather(1, index) * inside.reshape(h * w, h * w)
    return weights if collect else weights.transpose(1, 2)


class PSAHead(DecodeHead):
    """Point-wise Spatial Attention (https://hszhao.github.io/papers/eccv18_psanet.pdf).

    mask_size: height and width of the mask that each pixel predicts over its surroundings.
    psa_type: the mask weights what the pixel collects from its surroundings ("collect"), what it
        gives to them ("distribute"), or there is one mask for each ("bi-direction").
    shrink_factor: attention works on a map this many times smaller.
    normalization_factor: divides the result; None is the number of values in a mask.
    """

    FIXED = {"compact": [False]}
    BRANCHES = {  # suffix of the submodules' names, whether the branch collects
        "collect": [("", True)],
        "distribute": [("", False)],
        "bi-direction": [("", True), ("_p", False)],
    }

    def __init__(
        self,
        *,
        mask_size: tuple[int, int],
        psa_type: str = "bi-direction",
        shrink_factor: int = 2,
        normalization_factor: float | None = 1.0,
        psa_softmax: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if psa_type not in self.BRANCHES:
            raise UserError(f"psa_type is {psa_type!r}; it can be {', '.join(self.BRANCHES)}")
        self.branches = self.BRANCHES[psa_type]
        self.mask_size = mask_size
        self.shrink_factor = shrink_factor
        self.psa_softmax = psa_softmax
        c = self.channels
        values = mask_size[0] * mask_size[1]
        self.normalization_factor = values if normalization_factor is None else normalization_factor
        for suffix, _ in self.branches:
            reduce = ConvModule(self.in_channels, c)
            attention = nn.Sequential(ConvModule(c, c), nn.Conv2d(c, values, 1, bias=False))
            self.add_module(f"reduce{suffix}", reduce)
            self.add_module(f"attention{suffix}", attention)
        # MMSegmentation pads this 1x1 convolution.
        self.proj = ConvModule(c * len(self.branches), self.in_channels, padding=1)
        self.bottleneck = ConvModule(2 * self.in_channels, c, 3)

    def decode(self, x):
        size = x.shape[2:]
        align_corners = self.align_corners
        if self.shrink_factor != 1:
            align_corners = all(side % self.shrink_factor for side in size)
            if align_corners:
                size = [(side - 1) // self.shrink_factor + 1 for side in size]
            else:
                size = [side // self.shrink_factor for side in size]
        contexts = []
        for suffix, collect in self.branches:
            y = getattr(self, f"reduce{suffix}")(x)
            y = F.interpolate(y, size, mode="bilinear", align_corners=align_corners)
            mask = getattr(self, f"attention{suffix}")(y)  # (N, mask_h * mask_w, h', w')
            weights = point_wise_attention(mask, self.mask_size, collect)  # (N, h'*w', h'*w')
            if self.psa_softmax:
                weights = weights.softmax(1).to(y.dtype)
            context = y.flatten(2) @ weights / self.normalization_factor  # (N, channels, h'*w')
            contexts.append(context.unflatten(2, y.shape[2:]))
        y = resize(self.proj(torch.cat(contexts, 1)), x, align_corners)
        return self.bottleneck(torch.cat([x, y], 1))


class ResidualConvUnit(nn.Module):
    """Two convolutions, each between ReLU and BN, beside a shortcut."""

    def __init__(self, channels: int, norm: bool):
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3, norm=norm, act=None)
        self.conv2 = ConvModule(channels, channels, 3, norm=norm, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class FeatureFusionBlock(nn.Module):
    """Adds a finer map, refines the sum, and upsamples it to `size`, or else to twice its own."""

    def __init__(self, channels: int, norm: bool):
        super().__init__()
        self.project = ConvModule(channels, channels, norm=False, act=None)
        self.res_conv_unit1 = ResidualConvUnit(channels, norm)
        self.res_conv_unit2 = ResidualConvUnit(channels, norm)

    def forward(
        self, x: Tensor, finer: Tensor | None = None, size: torch.Size | None = None
    ) -> Tensor:  # (N, channels, h, w)
        if finer is not None:
            x = x + self.res_conv_unit1(resize(finer, x, align_corners=False))
        x = self.res_conv_unit2(x)
        if size is None:
            size = [2 * side for side in x.shape[2:]]
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        return self.project(x)


class DPTHead(DecodeHead):
    """Vision Transformers for Dense Prediction (https://arxiv.org/abs/2103.13413).

    A ViT's four maps (N, embed_dims, h, w) get `post_process_channels` and 4, 2, 1 and 0.5 times
    the size, and are merged from the coarsest on; the logits have about 8 times the size.

    Depth Anything (https://arxiv.org/abs/2401.10891) and UniMatch V2 have no BN, `norm` false, and
    `match_sizes`: a map is upsampled to the size of the next finer one, even if that is odd.
    MMSegmentation doubles it and resizes the finer one.
    """

    input_transform = "multiple_select"
    FIXED = {
        "readout_type": ["ignore"],
        "expand_channels": [False],
        "patch_size": [16, 14, 8],  # the backbone's, on which nothing here depends
    }

    def __init__(
        self,
        *,
        embed_dims: int | None = None,
        post_process_channels: list[int] = (96, 192, 384, 768),
        norm: bool = True,
        match_sizes: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        widths = post_process_channels
        if not len(self.in_channels) == len(widths) == 4:
            raise UserError("in_channels and post_process_channels need four values each")
        if embed_dims is not None and set(self.in_channels) != {embed_dims}:
            raise UserError(f"in_channels is {self.in_channels}, but embed_dims is {embed_dims}")
        self.match_sizes = match_sizes
        self.reassemble_blocks = nn.Module()
        self.reassemble_blocks.projects = nn.ModuleList(
            ConvModule(i, o, norm=False, act=None) for i, o in zip(self.in_channels, widths)
        )
        self.reassemble_blocks.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, 4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, 2, 1),
            ]
        )
        self.convs = nn.ModuleList()
        for width in widths:
            layer = ConvModule(width, self.channels, 3, norm=False, act=None)
            layer.conv.bias = None
            self.convs.append(layer)
        self.fusion_blocks = nn.ModuleList(FeatureFusionBlock(self.channels, norm) for _ in widths)
        self.fusion_blocks[0].res_conv_unit1 = None  # there is no finer map to add
        self.project = ConvModule(self.channels, self.channels, 3, norm=norm)

    def decode(self, xs: list[Tensor]) -> Tensor:
        projects = self.reassemble_blocks.projects
        rescales = self.reassemble_blocks.resize_layers
        maps = []  # (N, channels, 4h, 4w), (2h, 2w), (h, w), (h/2, w/2)
        for x, project, rescale, conv in zip(xs, projects, rescales, self.convs, strict=True):
            maps.append(conv(rescale(project(x))))
        sizes = [None] * 4  # what the sum with each map is upsampled to
        if self.match_sizes:
            sizes[1:] = [x.shape[2:] for x in maps[:3]]
        x = self.fusion_blocks[0](maps.pop(), size=sizes.pop())
        for fuse in self.fusion_blocks[1:]:
            x = fuse(x, maps.pop(), sizes.pop())
        return self.project(x)


class BNHead(DecodeHead):
    """The linear probe that DINOv2 and DINOv3 measure frozen backbones by: BN and `conv_seg`.

    `channels` is in_channels, their sum with input_transform "resize_concat".
    """

    FIXED = {"resize_factors": [None]}

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.in_channels != self.channels:
            raise UserError(f"channels is {self.channels}; it has to be {self.in_channels} here")
        self.bn = nn.BatchNorm2d(self.channels)

    def decode(self, x: Tensor) -> Tensor:  # (N, channels, h, w)
        return self.bn(x)


def label_edges(label: Tensor, width: int) -> Tensor:
    """1 where two classes of label (N, H, W) meet, `width` pixels wide, else 0: (N, H, W).

    As MMSegmentation's GenerateEdge draws them: no edge where a class meets ignored pixels.
    """
    h, w = label.shape[1:]
    padded = F.pad(label, (1, 1, 1, 1), value=IGNORE)
    edges = torch.zeros_like(label, dtype=torch.bool)
    for down, right in ((-1, 0), (0, 1), (1, 1), (1, -1)):
        neighbor = padded[:, 1 + down : 1 + down + h, 1 + right : 1 + right + w]
        edges |= (label != neighbor) & (label != IGNORE) & (neighbor != IGNORE)
    before = width // 2
    after = width - 1 - before
    return F.max_pool2d(F.pad(edges.float(), (before, after, before, after)), width, 1)


class PIDHead(DecodeHead):
    """PIDNet's three heads (https://arxiv.org/abs/2206.02066).

    The fused map of `in_channels` gives the prediction. For the losses alone, the proportional map
    gives classes too, and the derivative map edges, which `label_edges` draws `edge_width` wide.
    `loss_decode`: four losses, logged as loss_sem_p (the proportional map's classes), loss_sem_i
    (the fused map's), loss_bd (edges) and loss_sem_bd (the fused map's classes at those pixels that
    are predicted to be an edge with a probability above 0.8).
    """

    def __init__(self, *, edge_width: int = 4, **kwargs):
        super().__init__(**kwargs)
        if len(self.loss_decode) != 4 or self.sampler or edge_width < 1:
            raise UserError(
                f"loss_decode needs four losses, not {len(self.loss_decode)}, without a sampler, "
                f"and edge_width has to be 1 or more, not {edge_width}"
            )
        self.edge_width = edge_width
        c = self.in_channels
        self.i_head = self.branch(c, self.channels)
        self.p_head = self.branch(c // 2, self.channels)
        self.d_head = self.branch(c // 2, c // 4)
        self.p_cls_seg = nn.Conv2d(self.channels, self.out_channels, 1)
        self.d_cls_seg = nn.Conv2d(c // 4, 1, 1)
        init_kaiming(self)

    @staticmethod
    def branch(in_channels: int, channels: int) -> nn.Sequential:
        branch = nn.Sequential()
        branch.conv = PreActConv(in_channels, channels, 3)
        branch.norm = nn.BatchNorm2d(channels)
        branch.act = nn.ReLU(inplace=True)
        return branch

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        c = self.in_channels
        check_maps(features, [c // 2, c, c // 2])
        p, fused, d = features
        return {"": self.conv_seg(self.dropout(self.i_head(fused))), "p": p, "d": d}

    def loss(self, outputs, label, normalizers=None):
        # Only the losses need the heads of the other two maps.
        p_logits = self.p_cls_seg(self.p_head(outputs["p"]))
        d_logits = self.d_cls_seg(self.d_head(outputs["d"]))  # (N, 1, h, w)
        edges = label_edges(label, self.edge_width)
        predicted = resize(upcast(d_logits), label.unsqueeze(1), self.align_corners).sigmoid()
        label_at_edges = torch.where(predicted[:, 0] > 0.8, label, IGNORE)
        sem_p, sem_i, bd, sem_bd = self.loss_decode
        if normalizers is None:
            normalizers = [None] * 4
        return {
            "loss_sem_p": sem_p(p_logits, label, self.align_corners, None, normalizers[0]),
            "loss_sem_i": sem_i(outputs[""], label, self.align_corners, None, normalizers[1]),
            "loss_bd": bd(d_logits, edges, self.align_corners),
            "loss_sem_bd": sem_bd(outputs[""], label_at_edges, self.align_corners),
        }


HEADS = {
    c.__name__: c
    for c in (
        FCNHead,
        NLHead,
        GCHead,
        CCHead,
        PSPHead,
        UPerHead,
        FPNHead,
        SegformerHead,
        ASPPHead,
        DepthwiseSeparableASPPHead,
        DAHead,
        EncHead,
        ANNHead,
        OCRHead,
        PSAHead,
        DPTHead,
        BNHead,
        PIDHead,
    )
}


# -------------------------------------------------------------------------------- The whole network
def as_feature_maps(output: Tensor | list | tuple | dict) -> list[Tensor]:
    """Return the feature maps in a backbone's output: one, or a list, tuple or dict of them."""
    if isinstance(output, dict):
        output = output.values()
    maps = [output] if isinstance(output, Tensor) else list(output)
    for x in maps:
        if not isinstance(x, Tensor) or x.dim() != 4:
            kind = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"the backbone returns {kind} where a feature map (N, C, h, w) is expected; leave "
                "out pooling and classifier"
            )
    return maps


class Segmentor(nn.Module):
    """Backbone, neck and heads.

    A list of decode heads is a cascade, in which each head also takes the previous one's logits.

    forward(image): (N, C, H, W), normalized -> the last decode head's logits (N, out_channels,
        h, w), at the head's own resolution.
    forward(image, label): label (N, H, W), uint8 or int64, 255 where ignored -> a dict of scalar
        losses, whose sum is trained.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module | list[nn.Module],
        auxiliary_head: nn.Module | list[nn.Module] | None = None,
        neck: nn.Module | None = None,
        pretrained: str | None = None,
        freeze: list[str] = (),
    ):
        super().__init__()
        last = decode_head[-1] if isinstance(decode_head, list) else decode_head
        if isinstance(decode_head, list):
            decode_head = nn.ModuleList(decode_head)
        if isinstance(auxiliary_head, list):
            auxiliary_head = nn.ModuleList(auxiliary_head)
        self.backbone = backbone
        self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.pretrained = pretrained
        self.in_channels = getattr(backbone, "in_channels", None)  # None: a plain module
        self.num_classes = last.num_classes
        self.out_channels = last.out_channels
        self.threshold = last.threshold
        self.align_corners = last.align_corners
        self.frozen = []  # names of modules that stay in evaluation mode
        for name in freeze:
            self.freeze(name)
        self.train()  # a backbone may keep stages frozen

    def freeze(self, name: str) -> None:
        """Stop the training of a module, whose statistics stay too, or of a single parameter."""
        modules = dict(self.named_modules())
        parameters = dict(self.named_parameters())
        if name and name in modules:
            self.frozen.append(name)
            modules[name].requires_grad_(False).eval()
            for module in modules[name].modules():
                if hasattr(module, "with_cp"):
                    module.with_cp = False  # there is nothing to recompute for
        elif name in parameters:
            parameters[name].requires_grad_(False)
        else:
            shallow = [known for known in modules if known and known.count(".") < 2]
            right = suggest(name, shallow)
            raise ConfigError(f"model.freeze: nothing is called {name!r}; {right}")

    def train(self, mode: bool = True) -> "Segmentor":
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    @staticmethod
    def named_heads(heads, name):
        if heads is None:
            return []
        if isinstance(heads, nn.ModuleList):
            return [(f"{name}_{i}", head) for i, head in enumerate(heads)]
        return [(name, heads)]

    def forward(
        self,
        image: Tensor,
        label: Tensor | None = None,
        normalizers: dict[str, Tensor] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        features = as_feature_maps(self.backbone(image))
        if self.neck is not None:
            features = self.neck(features)
        losses = {}
        is_alone = dist_utils.world_size() == 1
        if label is not None and normalizers is None and self.training and not is_alone:
            # The caller has one micro-batch. The dry run has no values to exchange.
            normalizers = None if label.is_meta else self.normalizers([label])

        def add_losses(name, head, outputs):
            own = None if normalizers is None else normalizers[name]
            for key, loss in head.loss(outputs, label, own).items():
                losses[f"{name}.{key}"] = loss

        logits = None
        for name, head in self.named_heads(self.decode_head, "decode"):
            outputs = head(features) if logits is None else head(features, logits)
            logits = next(iter(outputs.values()))
            if label is not None:
                add_losses(name, head, outputs)
        if label is None:
            return logits
        for name, head in self.named_heads(self.auxiliary_head, "aux"):
            add_losses(name, head, head(features))
        return losses

    def normalizers(self, labels: list[Tensor]) -> dict[str, Tensor] | None:
        """Return what each head's losses are divided by in one iteration; None if no label matters.

        labels: (N, H, W) of each micro-batch of this process. The mean over micro-batches and
            processes makes 4 processes with 2 images each, as well as 2 micro-batches of 4 images,
            equal to one batch of 8 images, because gradients are averaged in the same way.
        """
        heads = self.named_heads(self.decode_head, "decode")
        heads += self.named_heads(self.auxiliary_head, "aux")
        rows = []  # (micro-batches, losses)
        for label in labels:
            row = []
            for _, head in heads:
                row += [loss.normalizer(label, head.out_channels) for loss in head.loss_decode]
            rows.append(row)
        if not any(isinstance(value, Tensor) for value in rows[0]):
            return None
        # Multiplied with a scalar on the device: copying a number there would make the host wait.
        one = labels[0].new_ones((), dtype=torch.float64)
        table = torch.stack([torch.stack([one * value for value in row]) for row in rows])
        means = dist_utils.all_reduce(table.mean(0)) / dist_utils.world_size()
        sizes = [len(head.loss_decode) for _, head in heads]
        return dict(zip([name for name, _ in heads], means.split(sizes)))

    def batch_dependent_parts(self) -> list[str]:
        """Return the losses and samplers that compare a forward pass's images."""
        parts = []
        for module in self.modules():
            if isinstance(module, PlainLoss):
                parts.append(module.module)
            elif isinstance(module, Loss) and module.depends_on_batch:
                parts.append(module)
            if isinstance(module, DecodeHead) and module.sampler is not None:
                parts.append(module.sampler)
        return sorted({type(part).__name__ for part in parts})

    def class_logits(self, image: Tensor) -> Tensor:
        """Return one logit per class, in float32.

        The single logit z of a binary network becomes (0, z), whose softmax is the sigmoid of z.
        """
        logits = self(image).float()
        if logits.size(1) > 1:
            return logits
        return torch.cat([torch.zeros_like(logits), logits], 1)

    def inference(
        self,
        image: Tensor,
        mode: str = "whole",
        crop_size: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """Return logits (N, num_classes, h, w) of normalized images (N, C, H, W).

        mode: "whole" is one forward pass, whose result has the resolution of the head. "slide"
            averages the logits of overlapping windows, at the resolution of the image.
        crop_size, stride: height and width of a window, and the steps down and to the right.
        batch_size: windows in a forward pass.
        """
        if mode == "whole":
            return self.class_logits(image)
        return self.slide_inference(image, crop_size, stride, batch_size)

    def slide_inference(
        self, image: Tensor, crop_size: tuple[int, int], stride: tuple[int, int], batch_size: int
    ) -> Tensor:
        height, width = image.shape[2:]
        window_size = (min(crop_size[0], height), min(crop_size[1], width))
        windows = [
            (n, slice(y, y + window_size[0]), slice(x, x + window_size[1]))
            for n in range(len(image))
            for y in window_starts(height, window_size[0], stride[0])
            for x in window_starts(width, window_size[1], stride[1])
        ]
        channels = max(self.out_channels, 2)  # of class_logits
        total = image.new_zeros(len(image), channels, height, width, dtype=torch.float32)
        count = image.new_zeros(len(image), 1, height, width)
        for start in range(0, len(windows), batch_size):
            chunk = windows[start : start + batch_size]
            crops = torch.stack([image[n, :, rows, columns] for n, rows, columns in chunk])
            logits = F.interpolate(
                self.class_logits(crops),
                window_size,
                mode="bilinear",
                align_corners=self.align_corners,
            )
            for (n, rows, columns), window in zip(chunk, logits):
                total[n, :, rows, columns] += window
                count[n, :, rows, columns] += 1
        return total / count

    def inference_tta(
        self, image: Tensor, size: tuple[int, int], ratios: list[float], **options
    ) -> Tensor:
        """Return the log of the mean probabilities (N, num_classes, *size) of all views.

        ratios: scales of the image; each is also run mirrored.
        options: keywords of `inference`.
        """
        total = 0.0
        for ratio in ratios:
            scaled_size = [int(side * ratio + 0.5) for side in image.shape[2:]]
            scaled = F.interpolate(image, scaled_size, mode="bilinear", align_corners=False)
            for flip in (False, True):
                logits = self.inference(scaled.flip(3) if flip else scaled, **options)
                if flip:
                    logits = logits.flip(3)
                logits = F.interpolate(
                    logits, size, mode="bilinear", align_corners=self.align_corners
                )
                total = total + logits.softmax(1)
        mean = total / (2 * len(ratios))
        return mean.clamp_min(1e-12).log()


def window_starts(size, window, stride):
    """Return where windows start along an axis; the last one is moved back to end at the border."""
    last = size - window
    return [min(start, last) for start in range(0, last + stride, stride)]


def compiled(network: nn.Module, **options) -> nn.Module:
    """torch.compile(network, **options), except for the losses, which call autograd themselves.

    Before torch 2.14, synchronized batch norm is left out too. With `with_cp`, the compiler itself
    chooses the activations to recompute, within a memory budget from 0 (recompute all that it can)
    to 1 (recompute nothing that takes time).
    """
    # torch 2.11 compiles synchronized batch norm to a gradient of 0; 2.14 gets it right.
    is_old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)
    for module in network.modules():
        is_left_out = is_old and isinstance(module, dist_utils.SyncBatchNorm)
        if isinstance(module, Loss) or is_left_out:
            # Not as a decorator, with which `import models` would import the slow compiler.
            module.forward = torch.compiler.disable(module.forward)
        if getattr(module, "with_cp", False):
            from torch._functorch import config

            config.activation_memory_budget = 0.2
    return torch.compile(network, **options)


# -------------------------------------------------------------------------------- Config -> network
def fits(value, annotation) -> bool:
    """Return whether a JSON value has the annotated type. An int may be a float; a bool may not."""
    if annotation in (inspect.Parameter.empty, typing.Any):
        return True
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in args)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args))
        return all(fits(item, args[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        keys_fit = all(fits(key, args[0]) for key in value)
        return keys_fit and all(fits(item, args[1]) for item in value.values())
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, (int, float))
    return isinstance(value, origin or annotation)


def keywords(function: Callable, inherited: bool = True) -> dict[str, inspect.Parameter]:
    """Return the keyword parameters of a function or class.

    A class whose __init__ takes **kwargs also has the keywords of its parent, if `inherited`.
    """
    functions = [function]
    if isinstance(function, type):
        functions = [vars(c)["__init__"] for c in function.__mro__ if "__init__" in vars(c)]
    if not inherited:
        functions = functions[:1]
    found = {}
    for init in functions:
        parameters = inspect.signature(init).parameters.values()
        by_keyword = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        found = {p.name: p for p in by_keyword if p.name != "self"} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def defaults(function: Callable, inherited: bool = True) -> dict:
    """Return the defaults of a function's keyword parameters that JSON can hold, as JSON types."""
    found = {}
    for name, parameter in keywords(function, inherited).items():
        with contextlib.suppress(TypeError):  # a parameter without default, or not of a JSON type
            value = json.loads(json.dumps(parameter.default))
            if fits(value, parameter.annotation):
                found[name] = value
    return found


def suggest(name: str, right: list[str]) -> str:
    close = difflib.get_close_matches(name, right, 1)
    names = sorted(right)
    if len(names) > 100:
        names[100:] = ["..."]
    return f"did you mean {close[0]}?" if close else f"it can be: {', '.join(names)}"


def no_such_type(name: str, kind: str, right: list[str]) -> str:
    """Return the message about a type that does not exist; kind: "backbones", "heads" and so on.

    Only a misspelling and a missing "Head" or "Loss" are corrected, never the first letter or a
    number: HRNet, MobileNetV2 and DiceLoss are not suggested for UNet, MobileNetV3 and CELoss.
    """
    numbers = re.findall(r"\d+", name)
    known = {
        other.lower(): other
        for other in right
        if re.findall(r"\d+", other) == numbers and other[0].lower() == name[:1].lower()
    }
    completed = (f"{name}head".lower(), f"{name}loss".lower())
    close = [other for other in completed if other in known]
    close += difflib.get_close_matches(name.lower(), known, 1, cutoff=0.85)
    question = f" Did you mean {known[close[0]]}?" if close else ""
    problem = "is missing" if name == "None" else f"there is no {name} here"
    return f"{problem}; {kind} are: {', '.join(sorted(right))}.{question}"


def check_keywords(function: Callable, section: dict, place: str) -> None:
    """Raise ConfigError unless `section` can be the keyword arguments of a function or class.

    place: where the section stands in the config, such as "model.backbone".
    """
    check_parameters(function.__name__, keywords(function), section, place)


def check_parameters(
    name: str, parameters: dict[str, inspect.Parameter], section: dict, place: str
) -> None:
    """Like `check_keywords`, but with given parameters; error messages call their owner `name`."""
    for key, value in section.items():
        if key not in parameters:
            raise ConfigError(
                f"{place}.{key}: {name} has no such keyword; {suggest(key, list(parameters))}"
            )
        annotation = parameters[key].annotation
        if not fits(value, annotation):
            plain = isinstance(annotation, type) and not typing.get_args(annotation)
            expected = annotation.__name__ if plain else annotation
            hint = ""
            if isinstance(value, str) and value.startswith(("[", "{")):
                hint = """. Names in it need quotes: --options 'data.classes=["road", "car"]'"""
            raise ConfigError(f"{place}.{key}: is {value!r}, should be of type {expected}{hint}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in section:
            raise ConfigError(f"{place}.{key}: is missing; {name} needs it")


# Sections of MMSegmentation's `model` that are no part of the network: the values that mean what is
# done here anyway. None: a key that another section of a config decides, see train.check_pasted.
PASTED = {
    "train_cfg": {},
    "test_cfg": {"mode": None, "crop_size": None, "stride": None},
    "data_preprocessor": {
        "type": ["SegDataPreProcessor"],
        "mean": None,
        "std": None,
        "size": None,
        "size_divisor": [None],
        "bgr_to_rgb": [True],
        "rgb_to_bgr": [False],
        "pad_val": [0],
        "seg_pad_val": [IGNORE],
        "batch_augments": [None],
        "test_cfg": [None],
    },
}
# Keywords of MMSegmentation that have become automatic, with the values that can be honored. A
# class adds to them, or has other values, in an attribute of the same name.
FIXED = {
    "norm_cfg": [{"type": "BN"}, {"type": "SyncBN"}],
    "act_cfg": [{"type": "ReLU"}],
    "conv_cfg": [None],
    "norm_eval": [False],
    "frozen_stages": [-1],
    "style": ["pytorch"],
    "dcn": [None],
    "plugins": [None],
    "ignore_index": [IGNORE],
    "reduction": ["mean"],
    "use_mask": [False],
}
NO_EFFECT = [("requires_grad", True), ("inplace", True), ("inplace", False)]  # in norm_cfg, act_cfg


def without_fixed(cls, section, place):
    """`section` without the keywords in FIXED; ConfigError if one has another value than there."""
    fixed = FIXED | getattr(cls, "FIXED", {})
    known = keywords(cls)
    kept = {}
    for key, value in section.items():
        if key in known or key not in fixed:
            kept[key] = value
            continue
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if (k, v) not in NO_EFFECT}
        elif isinstance(value, tuple):
            value = list(value)
        if value not in fixed[key]:
            raise ConfigError(
                f"{place}.{key}: is {value!r}; in {cls.__name__} it is always {fixed[key][0]!r}. "
                "Leave the key out"
            )
    return kept


TABLES = {  # name of a section -> what its `type` names, and where it is looked up
    "backbone": ("backbones", BACKBONES),
    "neck": ("necks", NECKS),
    "decode_head": ("heads", HEADS),
    "auxiliary_head": ("heads", HEADS),
    "loss_decode": ("losses", LOSSES),
    "sampler": ("samplers", SAMPLERS),
}


def named_weights(init_cfg: object) -> object:
    """Return the weights that MMSegmentation's `init_cfg` names, a section or a list of them."""
    if isinstance(init_cfg, (list, tuple)):
        return next(filter(None, map(named_weights, init_cfg)), None)
    return init_cfg.get("checkpoint") if isinstance(init_cfg, dict) else None


def check_init_cfg(init_cfg: object, place: str) -> None:
    """Raise ConfigError if an `init_cfg` names weights. All else in it is automatic here."""
    name = named_weights(init_cfg)
    if name:
        raise ConfigError(
            f"{place}.init_cfg: {name!r} is not loaded here. Name weights of the backbone in "
            "model.backbone.pretrained, those of the whole network with --load-from"
        )


def construct(table: dict[str, type], section: dict, place: str):
    """Build `table[type](**keywords)` from a section {"type": type, **keywords}.

    place: where the section stands in the config; error messages begin with it.
    """
    section = dict(section)
    check_init_cfg(section.pop("init_cfg", None), place)
    kind = str(section.pop("type", None)).removeprefix("mmpretrain.")
    if kind not in table:
        name = place.rstrip(".0123456789").rpartition(".")[-1]
        kinds, _ = TABLES.get(name, (name, table))
        raise ConfigError(f"{place}.type: {no_such_type(kind, kinds, list(table))}")
    part_class = table[kind]
    section = without_fixed(part_class, section, place)
    check_keywords(part_class, section, place)
    try:
        return part_class(**section)
    except ConfigError as error:  # in a section within this one
        raise ConfigError(f"{place}.{error}") from None
    except UserError as error:
        raise ConfigError(f"{place}: {error}") from error
    except Exception as error:
        # A section within this one has been judged by its own call of this function.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        calls = [frame.f_locals for frame in frames if frame.f_code is construct.__code__]
        if not is_invalid_value(error, calls[-1]["part_class"]):
            raise
        raise ConfigError(
            f"{place}: {kind} cannot be built of these values: {error} ({code_line(error)})"
        ) from error


# The classes of this file. In one of them, an error of torch means a wrong value in the config; in
# one that was added to the tables, it is a bug, whose traceback its author needs to see.
OWN = {Segmentor}.union(*(table.values() for _, table in TABLES.values()))


def is_invalid_value(error: Exception, part_class: Callable) -> bool:
    """Return whether `error`, raised in a part of the network, is due to a value in the config."""
    kinds = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AssertionError)
    return part_class in OWN and isinstance(error, kinds) and not needs_data(error)


def part_class_of(error: Exception, model: Segmentor) -> type:
    """Return the class of the backbone, neck, head or loss whose code a forward pass failed in.

    Returns Segmentor if it is none of them.
    """
    found = model
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module):
            continue
        is_plain = module is model.backbone or module is model.neck
        if is_plain or isinstance(module, (Backbone, DecodeHead, Loss)):
            found = module
    return type(found)


def needs_data(error: Exception) -> bool:
    """Return whether `error` is due to the meta device, whose tensors have shapes but no values."""
    if isinstance(error, NotImplementedError) or not str(error):  # a bare assert says nothing
        return True
    of_meta = r"\bmeta (tensor|device)|device meta|'meta'|expected device|Tensor\.__format__"
    return bool(re.search(of_meta, str(error)))


def code_line(error: Exception) -> str:
    """Return where in this code, not within torch, an error was raised: "models.py, line 12"."""
    torch_folder = os.path.dirname(torch.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    return f"{os.path.basename(own[-1].filename)}, line {own[-1].lineno}"


def build_loss(section: dict, place: str) -> Loss:
    """Build a loss. One that is no subclass of `Loss` is made one by PlainLoss."""
    section = {"type": "CrossEntropyLoss"} | section
    loss_class = LOSSES.get(str(section["type"]))
    if loss_class is None or (isinstance(loss_class, type) and issubclass(loss_class, Loss)):
        return construct(LOSSES, section, place)
    known = keywords(loss_class)
    common = {}
    for key in ("loss_weight", "loss_name"):
        if key in section and key not in known:
            common[key] = section.pop(key)
    check_keywords(PlainLoss, common, place)
    return PlainLoss(construct(LOSSES, section, place), **common)


def build_model(cfg: dict) -> Segmentor:
    """Build the network of a config's `model` section, or of an MMSegmentation `model` dict.

    Reads no files and does not change `cfg`. Raises ConfigError.
    """
    cfg = dict(cfg)
    kind = cfg.pop("type", "EncoderDecoder")
    if kind not in ("EncoderDecoder", "CascadeEncoderDecoder"):
        raise ConfigError(
            f"model.type: is {kind!r}; it can be EncoderDecoder or CascadeEncoderDecoder, or left "
            "out"
        )
    cfg.pop("num_stages", None)  # of a cascade: the number of its heads
    check_init_cfg(cfg.pop("init_cfg", None), "model")
    for name in PASTED:
        check_pasted_section(name, cfg.pop(name, None) or {})
    check_parameters(kind, keywords(assemble), cfg, "model")
    return assemble(**cfg)


def check_pasted_section(name: str, section: dict) -> None:
    """Raise ConfigError if one of the sections in PASTED has a key that cannot be honored."""
    if not isinstance(section, dict):
        raise ConfigError(f"model.{name}: is {section!r}, should be of type dict")
    for key, value in section.items():
        place = f"model.{name}.{key}"
        if key not in PASTED[name]:
            raise ConfigError(f"{place}: is {value!r}; it has no counterpart here, leave it out")
        allowed = PASTED[name][key]
        if allowed is not None and value not in allowed:
            raise ConfigError(
                f"{place}: is {value!r}; it is always {allowed[0]!r} here. Leave the key out if "
                "that value will do"
            )


def assemble(
    *,
    backbone: dict,
    decode_head: dict | list[dict],
    auxiliary_head: dict | list[dict] | None = None,
    neck: dict | None = None,
    pretrained: str | None = None,
    freeze: list[str] = (),
) -> Segmentor:
    """freeze: names of modules, such as "backbone" or "backbone.layer1", that are not trained."""
    if not decode_head:
        raise ConfigError(
            'model.decode_head: is empty; name a head, such as {"type": "FCNHead", ...}'
        )
    backbone = dict(backbone)
    weights = named_weights(backbone.pop("init_cfg", None))
    pretrained = backbone.pop("pretrained", None) or pretrained or weights
    if not isinstance(pretrained, str | None):
        raise ConfigError(
            f"model.backbone.pretrained: is {pretrained!r}, should be the name of weights, a URL, "
            "a file or null"
        )
    return Segmentor(
        construct(BACKBONES, backbone, "model.backbone"),
        build_heads(decode_head, "model.decode_head"),
        build_heads(auxiliary_head, "model.auxiliary_head"),
        construct(NECKS, neck, "model.neck") if neck else None,
        pretrained,
        freeze,
    )


def build_heads(section, place):
    if isinstance(section, (list, tuple)):
        return [construct(HEADS, head, f"{place}.{i}") for i, head in enumerate(section)]
    return construct(HEADS, section, place) if section else None


def with_defaults(cfg: dict) -> dict:
    """Return a `model` section with the defaults of its classes, which builds the same network.

    A class may pass other values to its parent than the parent's own defaults. So the defaults of
    the parents are only added if that changes nothing.
    """
    full = with_class_defaults(cfg, inherited=True)
    try:
        if describe(build_on_meta(full)) == describe(build_on_meta(cfg)):
            return full
    except Exception:  # a parent's keyword that the user's class sets itself
        pass
    return with_class_defaults(cfg, inherited=False)


def build_on_meta(cfg: dict) -> Segmentor:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights are not copied to the meta device
        return build_model(cfg)


def describe(network: nn.Module) -> list:
    """Return what tells one network from another: modules, their plain attributes, shapes."""
    found = [repr(network)]
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_"):
                value = list(value) if isinstance(value, tuple) else value
                found.append(f"{name}.{key} {value!r}")
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        found.append(f"{name} {list(tensor.shape)}")
    return [re.sub(" at 0x[0-9a-f]+", "", text) for text in found]  # without memory addresses


def with_class_defaults(section: dict, inherited: bool, function: Callable = assemble) -> dict:
    """Return the keyword arguments of `function` with its defaults and its classes' defaults.

    inherited: whether to add the defaults of the parents' keywords too.
    """
    full = section | defaults(function, inherited) | section
    for name in full.keys() & TABLES.keys():
        full[name] = complete_part(full[name], name, inherited)
    return full


def complete_part(part: object, name: str, inherited: bool) -> object:
    """Return the section `name`, or the list of several, with the defaults of the classes."""
    if isinstance(part, (list, tuple)):
        return [complete_part(item, name, inherited) for item in part]
    if not isinstance(part, dict):
        return part
    if name == "loss_decode":
        part = {"type": "CrossEntropyLoss"} | part
    _, table = TABLES[name]
    found = table.get(str(part.get("type")).removeprefix("mmpretrain."))
    return with_class_defaults(part, inherited, found) if found else part


# ------------------------------------------------------------------------------- Weights from files
OPENMMLAB = "https://download.openmmlab.com/"
PRETRAINED = {  # name in MMSegmentation's configs -> path on that server
    "open-mmlab://resnet18_v1c": "pretrain/third_party/resnet18_v1c-b5776b93.pth",
    "open-mmlab://resnet50_v1c": "pretrain/third_party/resnet50_v1c-2cccc1ad.pth",
    "open-mmlab://resnet101_v1c": "pretrain/third_party/resnet101_v1c-e67eebb6.pth",
    "open-mmlab://resnext50_32x4d": "pretrain/third_party/resnext50-32x4d-0ab1a123.pth",
    "open-mmlab://resnext101_32x4d": "pretrain/third_party/resnext101_32x4d-a5af3160.pth",
    "open-mmlab://resnext101_64x4d": "pretrain/third_party/resnext101_64x4d-ee2c6f71.pth",
    "open-mmlab://msra/hrnetv2_w18_small": "pretrain/third_party/hrnetv2_w18_small-b5a04e21.pth",
    "open-mmlab://msra/hrnetv2_w18": "pretrain/third_party/hrnetv2_w18-00eb2006.pth",
    "open-mmlab://msra/hrnetv2_w48": "pretrain/third_party/hrnetv2_w48-d2186c55.pth",
    "mmcls://mobilenet_v2": "mmclassification/v0/mobilenet_v2/"
    "mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth",
}


def load_pretrained(model: Segmentor) -> str | None:
    """Load what the config's `pretrained` names into the backbone, and return a report.

    It can be the name of torchvision's weights (IMAGENET1K_V1, torchvision://resnet50), a name in
    PRETRAINED, a URL or a file. Returns None if it is null. Raises ConfigError.
    """
    if model.pretrained is None:
        return None
    name = os.path.expanduser(model.pretrained)
    backbone = model.backbone
    try:
        if os.path.exists(name):
            state = read_weights(name)
        elif isinstance(backbone, Backbone):
            state = backbone.published_weights(name)
        else:
            state = fetch(name, None)
        state = plain_state(state)
        of_backbone = [key for key in state if key.startswith("backbone.")]
        if of_backbone:
            state = {key.removeprefix("backbone."): state[key] for key in of_backbone}
        is_of_others = not state.keys() & backbone.state_dict().keys()
        if is_of_others and isinstance(backbone, Backbone):
            state = backbone.from_published(state)
        return f"pretrained {name}: {load_matching(backbone, state)}"
    except UserError as error:
        raise ConfigError(f"model.backbone.pretrained: {name} cannot be loaded: {error}") from None


class Absent:
    """Stands in for the log objects that MMEngine pickles into its checkpoints. Does nothing.

    With it, the tensors beside them can be read.
    """

    def __init__(self, *args, **kwargs): ...

    def __setstate__(self, state): ...

    def __setitem__(self, key, value): ...


def read_weights(path: str | os.PathLike) -> dict:
    """Read the dict in a file onto the CPU, without running code that it may contain.

    Raises UserError with what is wrong with the file.
    """
    try:
        absent = []
        if zipfile.is_zipfile(path):
            # torch.save writes a CRC-32 of each record, which torch.load does not check.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"record {damaged} does not match its checksum")
            absent = [
                (Absent, name)
                for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if re.match(r"(mmengine|numpy)\.|builtins\.getattr$", name)
            ]
        with torch.serialization.safe_globals(absent):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make any part of the reader fail
        message = re.sub(r"\x1b\[\d+m", "", str(error)) or type(error).__name__  # without colors
        raise UserError(message.splitlines()[0]) from None
    if not isinstance(content, dict):
        raise UserError(f"it holds a {type(content).__name__}; expected a dict of tensors")
    return content


def fetch(name, backbone_name):
    """Get weights from torch.hub's cache or the network. Raises UserError.

    backbone_name: torchvision's name of the backbone; None if torchvision lacks it.
    """
    url = name
    if name in PRETRAINED:
        url = OPENMMLAB + PRETRAINED[name]
    elif name.startswith("torchvision://") or re.fullmatch(r"IMAGENET1K_\w+|DEFAULT", name):
        url = torchvision_url(name, backbone_name)
    file = os.path.basename(name)
    if file.startswith("dinov3_"):
        raise UserError(
            "there is no such file. Meta sends links to DINOv3's weights to those who accept its "
            "license: ask for them on "
            "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads and name the "
            f"downloaded file: --options model.backbone.pretrained=/path/to/{file}"
        )
    if not url.startswith(("http://", "https://", "file://")):
        raise UserError(
            "there is no such file, and it is neither a URL nor a name of weights. Names are "
            f"IMAGENET1K_V1, {', '.join(PRETRAINED)}"
        )
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # the network, the URL or the file can be at fault
        cache = os.path.join(torch.hub.get_dir(), "checkpoints")
        file = url.split("/")[-1]
        raise UserError(
            f"{url} cannot be downloaded ({error}). Download it on a machine with network access "
            f"and put it into {cache}, or name the file: "
            f"--options model.backbone.pretrained=/path/to/{file}"
        ) from None


def torchvision_url(name, backbone_name):
    import torchvision  # here, because it imports torch's compiler, which is slow

    if backbone_name not in torchvision.models.list_models():
        raise UserError("torchvision has no weights for this backbone")
    if name.startswith("torchvision://"):
        if name != f"torchvision://{backbone_name}":
            raise UserError(f"this backbone is torchvision://{backbone_name}")
        name = "IMAGENET1K_V1"
    weights = torchvision.models.get_model_weights(backbone_name).__members__
    if name not in weights:
        raise UserError(f"{backbone_name} has no such weights; {suggest(name, list(weights))}")
    return weights[name].url


def load_weights(model: Segmentor, state: dict, complete: bool = False) -> str:
    """Load every tensor of `state` that matches the model's by name and shape.

    state: of this code, of MMSegmentation (a checkpoint or its state_dict), or of torchvision's
        fcn_resnet and deeplabv3_resnet.
    complete: require all that a prediction depends on, which is all but the auxiliary heads.

    Returns a report that names all other tensors. Raises ConfigError if none matches, or not all
    that are required.
    """
    keys = list(state)
    state = plain_state(state)
    if not state:
        raise ConfigError(
            f"the file holds no tensors by name, but {', '.join(map(str, keys[:8]))}: save the "
            'network\'s state_dict() in it, alone or as "state_dict"'
        )
    if any(key.startswith("classifier.") for key in state):
        state = rename(
            state,
            [
                (r"^(aux_)?classifier\.4\.", r"\1head.conv_seg."),
                (r"^classifier\.0\.convs\.([0-3])\.0\.", r"head.aspp_modules.\1.conv."),
                (r"^classifier\.0\.convs\.([0-3])\.1\.", r"head.aspp_modules.\1.bn."),
                (r"^classifier\.0\.convs\.4\.1\.", "head.image_pool.1.conv."),
                (r"^classifier\.0\.convs\.4\.2\.", "head.image_pool.1.bn."),
                (r"^(aux_)?classifier\.0\.(?=weight)", r"\1head.convs.0.conv."),
                (r"^(aux_)?classifier\.1\.", r"\1head.convs.0.bn."),
                (r"^aux_head", "auxiliary_head"),
                (r"^head", "decode_head"),
            ],
        )
    own = model.state_dict()
    if not own.keys() & state.keys() and any(f"backbone.{key}" in own for key in state):
        raise ConfigError(
            "the file holds weights of a backbone alone: name it in model.backbone.pretrained"
        )
    report = load_matching(model, state)
    for key, value in model.state_dict().items():
        is_needed = value.is_floating_point() and not key.startswith("auxiliary_head.")
        if complete and is_needed and (key not in state or state[key].shape != value.shape):
            raise ConfigError(
                f"these are not the weights of this network: {key} {tuple(value.shape)} would keep "
                f"its random values; {report}"
            )
    return report


def plain_state(state):
    """Return the tensors of a state_dict or checkpoint, named as in the plain network.

    Those of a checkpoint's moving average, `ema`, come first. What wrappers add to the names is
    removed: `module.` of DDP and AveragedModel, `model.` of Lightning, and torch.compile's and
    FSDP's parts.
    """
    for key in ("ema", "state_dict", "model_state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    wrappers = r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    plain = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            plain[re.sub(r"^((module|model)\.)+", "", re.sub(wrappers, "", key))] = value
    return plain


def load_matching(module: nn.Module, state: dict[str, Tensor]) -> str:
    """Load every tensor of `state` that matches the module's by name and shape; return a report."""
    own = module.state_dict()
    shared = [key for key in state if key in own]
    matching = {key: state[key] for key in shared if state[key].shape == own[key].shape}
    for key in shared:
        if key.endswith("pos_embed") and key not in matching:
            shapes = f"{tuple(state[key].shape)} in the file, {tuple(own[key].shape)} here"
            raise ConfigError(f"{key} is {shapes}; set img_size to that of the weights")
    # Only floating-point tensors count: batch norm's counters match in any network.
    counted = [key for key in own if own[key].is_floating_point()]
    loaded = [key for key in counted if key in matching]
    if not loaded:
        raise ConfigError(
            f"none of the {len(state)} tensors fits this network: it has "
            f"{', '.join(list(own)[:3])}, ..., the file {', '.join(list(state)[:3]) or 'none'}, ..."
        )
    for key in loaded:
        if not matching[key].isfinite().all():
            raise ConfigError(
                f"the file's {key} holds values that are not finite: take another one"
            )
    module.load_state_dict(matching, strict=False)
    report = f"loaded {len(loaded)} of {len(counted)} tensors"
    others = {
        "skipped, of another shape": [
            f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} here"
            for key in shared
            if key not in matching
        ],
        "missing in the file": [key for key in counted if key not in state],
        "only in the file": [key for key in state if key not in own],
    }
    for title, keys in others.items():
        if keys:
            report += f"; {title}: {', '.join(keys[:20])}"
        if len(keys) > 20:
            report += f" and {len(keys) - 20} more"
    return report
