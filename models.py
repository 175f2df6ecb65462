"""The nets: blocks, backbones, necks, heads, losses, Segmentor and how a config becomes one.

Constructor keywords and submodule names are MMSegmentation's, so that its published checkpoints load as they are. A config section is the
keyword arguments of the class that its `type` names, looked up in the plain dicts BACKBONES, NECKS, HEADS and LOSSES.
Shapes: N images, C channels, H and W pixels; `# (N, C, H/8, W/8)` stands beside a tensor.
"""

import difflib
import inspect
import math
import os
import re
import traceback
import types
import typing
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dist_utils import UserError

IGNORE = 255  # the label of pixels that no loss and no metric counts; data.py maps every data set's own to it


class ConfigError(UserError):
    """A config section cannot be built; the message begins with the place of the wrong key."""


# ---------------------------------------------------------------------------------------------------------------- Blocks
def resize(x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)


def without_autocast(device: torch.device):
    return (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type)
        else nullcontext()
    )


def upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def init_kaiming(module: nn.Module) -> None:
    """He's initialization of every convolution (https://arxiv.org/abs/1502.01852), with the fan-out of a ReLU net."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class ConvModule(nn.Sequential):
    """Convolution, BN, ReLU, under mmcv's names; keeps the size unless `padding` is given. Without a norm the convolution has a bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        norm: bool = True,
        act: type[nn.Module] | None = nn.ReLU,
    ):
        super().__init__()
        if min(kernel_size, stride, dilation) < 1:
            raise UserError(
                f"kernel_size, stride and dilation must be 1 or more; here they are {kernel_size}, {stride} and {dilation}"
            )
        padding = kernel_size // 2 * dilation if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=not norm
        )
        init_kaiming(self.conv)
        if norm:
            self.bn = nn.BatchNorm2d(out_channels)
        if act:
            self.activate = act(inplace=True)


class SeparableConvModule(nn.Sequential):
    """A depthwise and a pointwise convolution, each with BN and ReLU (https://arxiv.org/abs/1610.02357)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, dilation: int = 1
    ):
        super().__init__()
        self.depthwise_conv = ConvModule(
            in_channels, in_channels, kernel_size, dilation=dilation, groups=in_channels
        )
        self.pointwise_conv = ConvModule(in_channels, out_channels)


def conv_bn(i: int, o: int, kernel_size: int, stride: int, *after: nn.Module) -> nn.Sequential:
    """Convolution and BN under the names 0 and 1."""
    return nn.Sequential(
        nn.Conv2d(i, o, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(o),
        *after,
    )


@contextmanager
def frozen_statistics(module: nn.Module):
    """BN in training mode still normalizes by the batch, but its running statistics stay as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(m, m.momentum, m.num_batches_tracked) for m in norms if m.track_running_stats]
    for m, _, count in before:
        m.momentum, m.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for m, momentum, count in before:
            m.momentum, m.num_batches_tracked = momentum, count


def run_blocks(blocks: nn.Sequential | nn.ModuleList, x: Tensor, with_cp: bool) -> Tensor:
    """One block after the other; `with_cp` stores only what enters each, which is computed again in the backward pass
    (https://arxiv.org/abs/1604.06174)."""
    for block in blocks:
        x = checkpointed(block, x) if with_cp and torch.is_grad_enabled() else block(x)
    return x


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), frozen_statistics(block))
    )


class DropPath(nn.Dropout):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): drops the whole residual of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), self.p)


class Scale(nn.Module):
    """A learnt factor, 0 at first."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query . key) value over all pixels: (N, C, ...), (N, C, L), (N, V, L) -> (N, V, ...)."""
    q, k, v = (
        x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value)
    )  # (N, 1 head, L, C)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (N, 1, Lq, V)
    return out.squeeze(1).transpose(1, 2).reshape(len(query), -1, *query.shape[2:])


class SelfAttentionBlock(nn.Module):
    """Attention of a map's pixels to those of another, as OCR, ANN and DANet use it.

    `pool`: what keys and values pass through. `norm`, `value_norm`: BN and ReLU after the projections of keys and queries, of values and
    output. `out_channels` None: no output projection, the values keep the map's channels.
    """

    def __init__(
        self,
        query_channels: int,
        key_channels: int,
        channels: int,
        out_channels: int | None,
        *,
        num_convs: int = 1,
        norm: bool = True,
        value_norm: bool = False,
        scale: float = 1.0,
        share: bool = False,
        pool: Callable = nn.Identity(),
    ):
        super().__init__()

        def project(i: int, o: int, count: int, norm: bool) -> nn.Module:
            convs = [
                ConvModule(i if k == 0 else o, o) if norm else nn.Conv2d(i if k == 0 else o, o, 1)
                for k in range(count)
            ]
            return nn.Sequential(*convs) if count > 1 else convs[0]

        self.scale, self.pool = scale, pool
        self.key_project = project(key_channels, channels, num_convs, norm)
        self.query_project = (
            self.key_project if share else project(query_channels, channels, num_convs, norm)
        )
        self.value_project = project(
            key_channels, channels if out_channels else key_channels, 1, value_norm
        )
        self.out_project = (
            project(channels, out_channels, 1, value_norm) if out_channels else nn.Identity()
        )
        if out_channels and not value_norm:
            nn.init.zeros_(self.out_project.weight)
            nn.init.zeros_(self.out_project.bias)

    def forward(
        self, query: Tensor, key: Tensor
    ) -> Tensor:  # (N, Cq, h, w), (N, Ck, ...) -> (N, out_channels, h, w)
        k, v = self.pool(self.key_project(key)), self.pool(self.value_project(key))
        return self.out_project(attend(self.query_project(query), k, v, self.scale))


class AdaptiveAvgPool(nn.AdaptiveAvgPool2d):
    """The mean of each cell of a grid; where only operations that repeat bit for bit are allowed, by two matrices, as CUDA's own gradient does not."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.output_size == 1
            or not torch.are_deterministic_algorithms_enabled()
            or not x.is_cuda
        ):
            return super().forward(x)
        rows, columns = (self.means(size, x) for size in x.shape[2:])
        return rows @ x @ columns.T  # (N, C, output_size, output_size)

    def means(self, size: int, like: Tensor) -> Tensor:
        """(output_size, size): row i is the mean of the pixels from floor(i * size / output_size) to ceil((i + 1) * size / output_size)."""
        i, pixel = (
            torch.arange(self.output_size, device=like.device)[:, None],
            torch.arange(size, device=like.device),
        )
        within = (pixel >= i * size // self.output_size) & (
            pixel < -(-(i + 1) * size // self.output_size)
        )
        return (within.double() / within.sum(1, keepdim=True)).to(like.dtype)


class PPM(nn.ModuleList):
    """PSPNet's pyramid: the map pooled to each of `pool_scales` squared, projected and brought back to its size."""

    def __init__(
        self, pool_scales: list[int], in_channels: int, channels: int, align_corners: bool
    ):
        super().__init__(
            nn.Sequential(AdaptiveAvgPool(s), ConvModule(in_channels, channels))
            for s in pool_scales
        )
        self.align_corners = align_corners

    def forward(
        self, x: Tensor
    ) -> Tensor:  # (N, C, h, w) -> (N, C + len(pool_scales) * channels, h, w)
        return torch.cat([x, *(resize(pool(x), x, self.align_corners) for pool in self)], 1)


# --------------------------------------------------- Backbones: image (N, C, H, W) -> list of feature maps, finest first
class Backbone(nn.Module):
    """What all backbones share. `out_indices`: the stages whose maps are given out. `with_cp`: activation checkpointing of each block."""

    torchvision_name = None  # of the same net in torchvision.models, whose weights load

    def __init__(
        self,
        stages: int,
        /,
        *,
        in_channels: int = 3,
        out_indices: list[int] = (0, 1, 2, 3),
        with_cp: bool = False,
    ):
        super().__init__()
        if not out_indices or not all(0 <= i < stages for i in out_indices):
            raise UserError(
                f"out_indices is {list(out_indices)}; it names stages, from 0 to {stages - 1}"
            )
        self.in_channels, self.out_indices, self.with_cp = in_channels, out_indices, with_cp

    def from_torchvision(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of torchvision's net under the names of this one."""
        return state


class ResidualBlock(nn.Module):
    """Convolutions with BN beside a shortcut (https://arxiv.org/abs/1512.03385), under torchvision's names."""

    def __init__(self, inplanes: int, stride: int, *convs: tuple):
        super().__init__()
        self.count, outplanes = len(convs), convs[-1][1]
        for i, (channels, out_channels, kernel_size, stride_, dilation, groups) in enumerate(
            convs, 1
        ):
            if min(stride_, dilation) < 1:
                raise UserError(
                    f"strides and dilations must be 1 or more; here is a block with {stride_} and {dilation}"
                )
            conv = nn.Conv2d(
                channels,
                out_channels,
                kernel_size,
                stride_,
                kernel_size // 2 * dilation,
                dilation,
                groups,
                bias=False,
            )
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(out_channels))
        self.downsample = (
            conv_bn(inplanes, outplanes, 1, stride)
            if stride != 1 or inplanes != outplanes
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y, inplace=True) if i < self.count else y
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, of which the first has the stride and the dilation."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, dilation: int = 1):
        super().__init__(
            inplanes,
            stride,
            (inplanes, planes, 3, stride, dilation, 1),
            (planes, planes, 3, 1, 1, 1),
        )


class Bottleneck(ResidualBlock):
    """1x1, 3x3 with stride, dilation and groups, and 1x1 to four times the channels."""

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        base_width: int = 64,
    ):
        width = planes * base_width // 64 * groups
        super().__init__(
            inplanes,
            stride,
            (inplanes, width, 1, 1, 1, 1),
            (width, width, 3, stride, dilation, groups),
            (width, 4 * planes, 1, 1, 1, 1),
        )


class ResNet(Backbone):
    """Deep Residual Learning (https://arxiv.org/abs/1512.03385), dilated as DeepLab's (https://arxiv.org/abs/1706.05587).

    `strides` and `dilations` of the stages: (1, 2, 1, 1) and (1, 1, 2, 4) give an output stride of 8. `contract_dilation`: the first block
    of a dilated stage has half the dilation. `multi_grid`: dilations of the last stage's blocks instead. `deep_stem`: three 3x3
    convolutions instead of the 7x7.
    """

    LAYERS = {
        18: (BasicBlock, [2, 2, 2, 2]),
        34: (BasicBlock, [3, 4, 6, 3]),
        50: (Bottleneck, [3, 4, 6, 3]),
        101: (Bottleneck, [3, 4, 23, 3]),
        152: (Bottleneck, [3, 8, 36, 3]),
    }
    FIXED = {"avg_down": [False], "stage_with_dcn": [[False] * 4]}
    block_options: dict = {}

    def __init__(
        self,
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
        if not len(strides) == len(dilations) == num_stages <= 4:
            raise UserError(
                f"num_stages is {num_stages}; it can be 4 at most, and strides and dilations need as many values"
            )
        self.torchvision_name = f"resnet{depth}"
        block, counts = self.LAYERS[depth]
        if multi_grid and len(multi_grid) < counts[num_stages - 1]:
            raise UserError(
                f"multi_grid has {len(multi_grid)} values, the last stage {counts[num_stages - 1]} blocks"
            )
        if deep_stem:
            half = stem_channels // 2
            convs = [(self.in_channels, half, 2), (half, half, 1), (half, stem_channels, 1)]
            self.stem = nn.Sequential(
                *[
                    m
                    for i, o, stride in convs
                    for m in conv_bn(i, o, 3, stride, nn.ReLU(inplace=True))
                ]
            )
        else:
            self.conv1 = nn.Conv2d(self.in_channels, stem_channels, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem_channels)
        self.stages, inplanes = [f"layer{i + 1}" for i in range(num_stages)], stem_channels
        for i, (name, count, stride, dilation) in enumerate(
            zip(self.stages, counts, strides, dilations)
        ):
            grid = [dilation // 2 if contract_dilation and dilation > 1 else dilation] + [
                dilation
            ] * (count - 1)
            if multi_grid and i == num_stages - 1:
                grid = multi_grid
            planes, blocks = base_channels * 2**i, []
            for j in range(count):
                blocks.append(
                    block(inplanes, planes, stride if j == 0 else 1, grid[j], **self.block_options)
                )
                inplanes = planes * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        init_kaiming(self)
        for m in self.modules() if zero_init_residual else ():  # each block starts as the identity
            if isinstance(m, block):
                nn.init.zeros_(m.bn2.weight if block is BasicBlock else m.bn3.weight)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = (
            self.stem(image)
            if hasattr(self, "stem")
            else F.relu(self.bn1(self.conv1(image)), inplace=True)
        )  # (N, 64, H/2, W/2)
        x, outs = F.max_pool2d(x, 3, 2, 1), []  # (N, 64, H/4, W/4)
        for name in self.stages:
            x = run_blocks(getattr(self, name), x, self.with_cp)
            outs.append(x)  # (N, 64 * 2**i * expansion, H/stride, W/stride)
        return [outs[i] for i in self.out_indices]


class ResNetV1c(ResNet):
    """ResNet with a deep stem (https://arxiv.org/abs/1812.01187), the usual one for segmentation."""

    def __init__(self, *, deep_stem: bool = True, **kwargs):
        super().__init__(deep_stem=deep_stem, **kwargs)


class ResNeXt(ResNet):
    """Aggregated residual transformations (https://arxiv.org/abs/1611.05431): grouped 3x3 convolutions, e.g. 32 groups of width 4."""

    LAYERS = {depth: layers for depth, layers in ResNet.LAYERS.items() if layers[0] is Bottleneck}

    def __init__(self, *, groups: int = 1, base_width: int = 4, **kwargs):
        self.block_options = {"groups": groups, "base_width": base_width} if groups > 1 else {}
        super().__init__(**kwargs)
        self.torchvision_name = f"resnext{kwargs['depth']}_{groups}x{base_width}d"


@dataclass
class HRStage:
    """A stage of HRNet: `num_modules` modules of `num_branches` branches with `num_blocks` blocks of `num_channels` each."""

    num_modules: int
    num_branches: int
    block: str
    num_blocks: list[int]
    num_channels: list[int]

    def __post_init__(self):
        if self.block not in ("BASIC", "BOTTLENECK") or not self.num_branches == len(
            self.num_blocks
        ) == len(self.num_channels):
            raise UserError(
                "block is BASIC or BOTTLENECK; num_blocks and num_channels need one value a branch"
            )
        self.block = BasicBlock if self.block == "BASIC" else Bottleneck
        self.channels = [c * self.block.expansion for c in self.num_channels]

    def branches(self, in_channels: list[int]) -> list[nn.Sequential]:
        return [
            nn.Sequential(
                *[self.block(i if k == 0 else c * self.block.expansion, c) for k in range(n)]
            )
            for i, c, n in zip(in_channels, self.num_channels, self.num_blocks)
        ]


class HRModule(nn.Module):
    """Branches of several resolutions, and the exchange between them."""

    def __init__(self, stage: HRStage, with_cp: bool):
        super().__init__()
        self.with_cp, c = with_cp, stage.channels
        self.branches = nn.ModuleList(stage.branches(c))
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self.path(j, i, c) for j in range(len(c))) for i in range(len(c))
        )

    @staticmethod
    def path(j: int, i: int, c: list[int]) -> nn.Module:
        """From branch j to branch i: up-sampling, nothing, or one stride-2 convolution a level."""
        if j > i:
            return conv_bn(
                c[j], c[i], 1, 1, nn.Upsample(scale_factor=2 ** (j - i), mode="bilinear")
            )
        return nn.Sequential(
            *[
                conv_bn(
                    c[j],
                    c[i] if k == i - j - 1 else c[j],
                    3,
                    2,
                    *[nn.ReLU(inplace=True)] * (k < i - j - 1),
                )
                for k in range(i - j)
            ]
        )

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [run_blocks(branch, x, self.with_cp) for branch, x in zip(self.branches, xs)]
        return [
            F.relu(sum(resize(path(x), xs[i], False) for path, x in zip(paths, xs)))
            for i, paths in enumerate(self.fuse_layers)
        ]


class HRNet(Backbone):
    """High-Resolution Representations (https://arxiv.org/abs/1904.04514); `extra` has stage1 to stage4, each an HRStage's keywords."""

    FIXED = {"zero_init_residual": [False], "multiscale_output": [True]}

    def __init__(self, *, extra: dict, **kwargs):
        super().__init__(4, **kwargs)
        check_keywords(make_hr_stages, extra, "extra")
        stages = make_hr_stages(**extra)
        self.conv1, self.bn1 = (
            nn.Conv2d(self.in_channels, 64, 3, 2, 1, bias=False),
            nn.BatchNorm2d(64),
        )
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64)
        (self.layer1,) = stages[0].branches([64])
        channels = stages[0].channels
        for i, stage in enumerate(stages[1:], 1):
            self.add_module(f"transition{i}", self.transition(channels, stage.channels))
            channels = stage.channels
            self.add_module(
                f"stage{i + 1}",
                nn.Sequential(*[HRModule(stage, self.with_cp) for _ in range(stage.num_modules)]),
            )
        init_kaiming(self)

    @staticmethod
    def transition(old: list[int], new: list[int]) -> nn.ModuleList:
        """Brings the branches to the next stage's channels; a new branch comes of the coarsest old one at half its size."""
        relu = nn.ReLU(inplace=True)
        layers = [nn.Identity() if o == n else conv_bn(o, n, 3, 1, relu) for o, n in zip(old, new)]
        return nn.ModuleList(
            layers + [nn.Sequential(conv_bn(old[-1], n, 3, 2, relu)) for n in new[len(old) :]]
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)  # (N, 64, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)  # (N, 64, H/4, W/4)
        xs = [run_blocks(self.layer1, x, self.with_cp)]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            xs = stage([layer(xs[min(i, len(xs) - 1)]) for i, layer in enumerate(transition)])
        return [xs[i] for i in self.out_indices]  # (N, channels[i], H/4/2**i, W/4/2**i)


def make_hr_stages(*, stage1: dict, stage2: dict, stage3: dict, stage4: dict) -> list[HRStage]:
    return [
        construct({"HRStage": HRStage}, {"type": "HRStage", **section}, f"extra.stage{i}")
        for i, section in enumerate((stage1, stage2, stage3, stage4), 1)
    ]


class MixFFN(nn.Module):
    """Two 1x1 convolutions with a depthwise 3x3 between them, which tells the net where it is."""

    def __init__(self, channels: int, hidden: int, drop: float, drop_path: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Dropout(drop),
            nn.Conv2d(hidden, channels, 1),
            nn.Dropout(drop),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        return self.drop_path(self.layers(x))


class EfficientAttention(nn.Module):
    """Self-attention whose keys and values come of a map made `sr_ratio` times smaller by a convolution."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        sr_ratio: int,
        bias: bool,
        attn_drop: float,
        drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, num_heads, attn_drop, bias, batch_first=True)
        self.drop, self.drop_path = nn.Dropout(drop), DropPath(drop_path)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(channels, channels, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(channels, 1e-6)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (N, h*w, C), (h, w)
        y = x
        if hasattr(self, "sr"):
            y = self.sr(x.transpose(1, 2).unflatten(2, size))  # (N, C, h/sr, w/sr)
            y = self.norm(y.flatten(2).transpose(1, 2))  # (N, h*w/sr², C)
        return self.drop_path(self.drop(self.attn(x, y, y, need_weights=False)[0]))


class MixBlock(nn.Module):
    """MiT's transformer block."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        sr_ratio: int,
        hidden: int,
        bias: bool,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, 1e-6), nn.LayerNorm(channels, 1e-6)
        self.attn = EfficientAttention(
            channels, num_heads, sr_ratio, bias, attn_drop, drop, drop_path
        )
        self.ffn = MixFFN(channels, hidden, drop, drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        tokens, size = x.flatten(2).transpose(1, 2), x.shape[2:]  # (N, h*w, C)
        tokens = tokens + self.attn(self.norm1(tokens), size)
        y = self.norm2(tokens).transpose(1, 2).unflatten(2, size)
        return tokens.transpose(1, 2).unflatten(2, size) + self.ffn(y)


class PatchEmbed(nn.Module):
    """A strided convolution and layer norm."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        eps: float,
    ):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, h, w, channels)
        return self.norm(self.projection(x).permute(0, 2, 3, 1))


def init_transformer(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Truncated normal of 0.02 for linear layers and `kinds`, zero for their biases."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, *kinds)):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class MixVisionTransformer(Backbone):
    """MiT, SegFormer's encoder (https://arxiv.org/abs/2105.15203): b0 has embed_dims 32 and 2 layers a stage, b5 64 and 3, 6, 40, 3."""

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
        if {len(x) for x in (num_layers, num_heads, patch_sizes, strides, sr_ratios)} != {
            num_stages
        }:
            raise UserError(
                f"num_layers, num_heads, patch_sizes, strides and sr_ratios need num_stages, {num_stages}, values each"
            )
        rates = drop_path_rates(drop_path_rate, num_layers)
        self.layers, channels = nn.ModuleList(), self.in_channels
        for layers, heads, patch, stride, sr, rate in zip(
            num_layers, num_heads, patch_sizes, strides, sr_ratios, rates
        ):
            dims = embed_dims * heads
            blocks = [
                MixBlock(
                    dims, heads, sr, mlp_ratio * dims, qkv_bias, drop_rate, attn_drop_rate, rate[k]
                )
                for k in range(layers)
            ]
            self.layers.append(
                nn.ModuleList(
                    [
                        PatchEmbed(channels, dims, patch, stride, patch // 2, 1e-6),
                        nn.ModuleList(blocks),
                        nn.LayerNorm(dims, 1e-6),
                    ]
                )
            )
            channels = dims
        init_transformer(self)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(
                    m.weight,
                    std=math.sqrt(
                        2 * m.groups / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)
                    ),
                )
                nn.init.zeros_(m.bias)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, outs = image, []
        for embed, blocks, norm in self.layers:
            x = run_blocks(blocks, embed(x).permute(0, 3, 1, 2), self.with_cp)
            x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            outs.append(x)  # (N, embed_dims * num_heads[i], H/4/2**i, W/4/2**i)
        return [outs[i] for i in self.out_indices]


def drop_path_rates(rate: float, depths: list[int]) -> list[list[float]]:
    """From 0 in the first block to `rate` in the last, by stage."""
    total = sum(depths)
    rates = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


class InvertedResidual(nn.Module):
    """MobileNetV2's block: wider, depthwise, narrower."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dilation: int, expand_ratio: int
    ):
        super().__init__()
        hidden, relu6 = in_channels * expand_ratio, nn.ReLU6
        wider = [ConvModule(in_channels, hidden, act=relu6)] if expand_ratio > 1 else []
        self.conv = nn.Sequential(
            *wider,
            ConvModule(
                hidden, hidden, 3, stride=stride, dilation=dilation, groups=hidden, act=relu6
            ),
            ConvModule(hidden, out_channels, act=None),
        )
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(Backbone):
    """Inverted residuals (https://arxiv.org/abs/1801.04381) in seven stages; `strides` and `dilations` are of their first blocks."""

    LAYERS = [
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    ]  # expansion, channels, blocks
    FIXED = {"act_cfg": [{"type": "ReLU6"}]}
    torchvision_name = "mobilenet_v2"

    def __init__(
        self,
        *,
        widen_factor: float = 1.0,
        strides: list[int] = (1, 2, 2, 2, 1, 2, 1),
        dilations: list[int] = (1,) * 7,
        out_indices: list[int] = (1, 2, 4, 6),
        **kwargs,
    ):
        super().__init__(7, out_indices=out_indices, **kwargs)
        if not len(strides) == len(dilations) == 7:
            raise UserError("strides and dilations need seven values each")

        def width(channels: float) -> int:
            """A multiple of 8, not more than a tenth less."""
            near = max(8, int(channels + 4) // 8 * 8)
            return near + 8 * (near < 0.9 * channels)

        inplanes = width(32 * widen_factor)
        self.conv1 = ConvModule(self.in_channels, inplanes, 3, stride=2, act=nn.ReLU6)
        for i, (expand, channels, count) in enumerate(self.LAYERS):
            blocks, planes = [], width(channels * widen_factor)
            for j in range(count):
                blocks.append(
                    InvertedResidual(
                        inplanes,
                        planes,
                        *((strides[i], dilations[i]) if j == 0 else (1, 1)),
                        expand,
                    )
                )
                inplanes = planes
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, outs = self.conv1(image), []  # (N, 32, H/2, W/2)
        for i in range(7):
            x = run_blocks(getattr(self, f"layer{i + 1}"), x, self.with_cp)
            outs.append(x)
        return [outs[i] for i in self.out_indices]

    def from_torchvision(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        same = [
            v for k, v in state.items() if re.match(r"features\.(\d|1[0-7])\.", k)
        ]  # the same tensors in the same order
        return dict(zip(self.state_dict(), same))


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, two linear layers, and a learnt factor a channel."""

    def __init__(self, channels: int, layer_scale: float, drop_path: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale))
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, 1e-6)
        self.pointwise_conv1, self.pointwise_conv2 = (
            nn.Linear(channels, 4 * channels),
            nn.Linear(4 * channels, channels),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        y = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))  # (N, h, w, C)
        y = self.gamma * self.pointwise_conv2(F.gelu(self.pointwise_conv1(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(Backbone):
    """A ConvNet for the 2020s (https://arxiv.org/abs/2201.03545), under mmpretrain's names; `arch` is one of ARCHS."""

    ARCHS = {
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
        depths, width = self.ARCHS[arch]
        self.torchvision_name = f"convnext_{arch}"
        widths = [width * 2**i for i in range(4)]
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        self.downsample_layers.append(
            nn.Sequential(nn.Conv2d(self.in_channels, width, 4, 4), LayerNorm2d(width, 1e-6))
        )
        for i, o in zip(widths, widths[1:]):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm2d(i, 1e-6), nn.Conv2d(i, o, 2, 2))
            )
        for channels, rates in zip(widths, drop_path_rates(drop_path_rate, depths)):
            self.stages.append(
                nn.Sequential(
                    *[ConvNeXtBlock(channels, layer_scale_init_value, rate) for rate in rates]
                )
            )
        for i in self.out_indices:
            self.add_module(f"norm{i}", LayerNorm2d(widths[i], 1e-6))
        init_transformer(self, nn.Conv2d)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, outs = image, {}
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = run_blocks(stage, down(x), self.with_cp)
            if i in self.out_indices:
                outs[i] = getattr(self, f"norm{i}")(x)  # (N, width * 2**i, H/4/2**i, W/4/2**i)
        return [outs[i] for i in self.out_indices]

    def from_torchvision(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
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
        return {
            k: v.flatten() if k.endswith("gamma") else v for k, v in rename(state, rules).items()
        }


def rename(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Every rule, a pattern and what takes its place, is applied to every name in turn."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


class WindowAttention(nn.Module):
    """Self-attention within windows of `window` squared, with a learnt bias by relative position."""

    def __init__(
        self, channels: int, num_heads: int, window: int, bias: bool, attn_drop: float, drop: float
    ):
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, num_heads)
        )
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        rows, columns = torch.arange(window**2) // window, torch.arange(window**2) % window
        index = (
            (rows[:, None] - rows + window - 1) * (2 * window - 1)
            + columns[:, None]
            - columns
            + window
            - 1
        )
        self.register_buffer("relative_position_index", index)  # (window², window²)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels, bias), nn.Linear(channels, channels)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(drop)

    def forward(
        self, x: Tensor, mask: Tensor | None
    ) -> Tensor:  # (N * windows, window², C), (windows, window², window²)
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (N * windows, heads, window², C/heads)
        bias = (
            self.relative_position_bias_table[self.relative_position_index]
            .permute(2, 0, 1)
            .unsqueeze(0)
        )  # (1, heads, window², window²)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(len(x) // len(mask), 1, 1, 1)
        y = F.scaled_dot_product_attention(
            q, k, v, bias.to(q.dtype), self.attn_drop.p if self.training else 0.0
        )
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class ShiftedWindows(nn.Module):
    """WindowAttention over a whole map; the windows are shifted by `shift` and pixels that do not belong together do not see each other."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: int,
        shift: int,
        bias: bool,
        attn_drop: float,
        drop: float,
    ):
        super().__init__()
        self.window, self.shift = window, shift
        self.w_msa = WindowAttention(channels, num_heads, window, bias, attn_drop, drop)

    def windows(self, x: Tensor) -> Tensor:  # (N, H, W, C) -> (N * windows, window², C)
        n, h, w, c = x.shape
        x = x.reshape(n, h // self.window, self.window, w // self.window, self.window, c)
        return x.transpose(2, 3).reshape(-1, self.window**2, c)

    def forward(self, x: Tensor) -> Tensor:  # (N, h, w, C)
        n, h, w, c = x.shape
        x, mask = F.pad(x, (0, 0, 0, -w % self.window, 0, -h % self.window)), None  # (N, H, W, C)
        height, width = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            places = [torch.arange(size, device=x.device) for size in (height, width)]
            rows, columns = (
                (p >= len(p) - self.window).int() + (p >= len(p) - self.shift) for p in places
            )  # 0, 1, 2: whence they come
            region = self.windows(
                (3 * rows[:, None] + columns)[None, :, :, None]
            )  # (windows, window², 1)
            mask = torch.where(region == region.transpose(1, 2), 0.0, -100.0).to(x.dtype)
        y = self.w_msa(self.windows(x), mask).unflatten(1, (self.window, self.window))
        y = (
            y.reshape(n, height // self.window, width // self.window, *y.shape[1:])
            .transpose(2, 3)
            .reshape(n, height, width, c)
        )
        return y.roll((self.shift, self.shift), (1, 2))[:, :h, :w] if self.shift else y[:, :h, :w]


class FFN(nn.Module):
    """Two linear layers, under mmcv's names."""

    def __init__(self, channels: int, hidden: int, drop: float):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(drop)),
            nn.Linear(hidden, channels),
            nn.Dropout(drop),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SwinBlock(nn.Module):
    """Swin's transformer block."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: int,
        shift: int,
        hidden: int,
        bias: bool,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = ShiftedWindows(channels, num_heads, window, shift, bias, attn_drop, drop)
        self.ffn, self.drop_path = FFN(channels, hidden, drop), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (N, h, w, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class PatchMerging(nn.Module):
    """2x2 pixels become one of twice the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.reduction = (
            nn.LayerNorm(4 * channels),
            nn.Linear(4 * channels, 2 * channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:  # (N, h, w, C) -> (N, h/2, w/2, 2C)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (N, h/2, 2, w/2, 2, C)
        return self.reduction(
            self.norm(x.permute(0, 1, 3, 5, 2, 4).flatten(3))
        )  # channels before the pixels, as MMSegmentation has them


class SwinTransformer(Backbone):
    """Shifted windows (https://arxiv.org/abs/2103.14030): tiny has embed_dims 96 and depths 2, 2, 6, 2."""

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
            raise UserError("depths and num_heads need one value a stage")
        sizes = {(96, 6): "t", (96, 18): "s", (128, 18): "b"}
        self.torchvision_name = (
            f"swin_{sizes[embed_dims, depths[2]]}" if (embed_dims, depths[2]) in sizes else None
        )
        self.patch_embed = PatchEmbed(self.in_channels, embed_dims, 4, 4, 0, 1e-5)
        self.drop, self.stages = nn.Dropout(drop_rate), nn.ModuleList()
        for i, (depth, heads, rates) in enumerate(
            zip(depths, num_heads, drop_path_rates(drop_path_rate, depths))
        ):
            c, stage = embed_dims * 2**i, nn.Module()
            stage.blocks = nn.ModuleList(
                SwinBlock(
                    c,
                    heads,
                    window_size,
                    window_size // 2 * (k % 2),
                    mlp_ratio * c,
                    qkv_bias,
                    drop_rate,
                    attn_drop_rate,
                    rates[k],
                )
                for k in range(depth)
            )
            if i < len(depths) - 1:
                stage.downsample = PatchMerging(c)
            self.stages.append(stage)
            if i in self.out_indices:
                self.add_module(f"norm{i}", nn.LayerNorm(c))
        init_transformer(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        image = F.pad(image, (0, -image.shape[3] % 4, 0, -image.shape[2] % 4))
        x, outs = self.drop(self.patch_embed(image)), {}  # (N, H/4, W/4, C)
        for i, stage in enumerate(self.stages):
            x = run_blocks(stage.blocks, x, self.with_cp)
            if i in self.out_indices:
                outs[i] = getattr(self, f"norm{i}")(x).permute(
                    0, 3, 1, 2
                )  # (N, C * 2**i, H/4/2**i, W/4/2**i)
            x = stage.downsample(x) if hasattr(stage, "downsample") else x
        return [outs[i] for i in self.out_indices]

    def from_torchvision(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        rules = [
            (r"^norm\.", "norm3."),
            (r"^features\.0\.0\.", "patch_embed.projection."),
            (r"^features\.0\.2\.", "patch_embed.norm."),
            (r"\.attn\.", ".attn.w_msa."),
            (r"\.mlp\.0\.", ".ffn.layers.0.0."),
            (r"\.mlp\.3\.", ".ffn.layers.1."),
        ]
        for i in range(4):
            rules += [
                (rf"^features\.{2 * i + 1}\.", f"stages.{i}.blocks."),
                (rf"^features\.{2 * i + 2}\.", f"stages.{i}.downsample."),
            ]
        state = {
            k: v
            for k, v in rename(state, rules).items()
            if not k.endswith("relative_position_index")
        }
        for key in [k for k in state if ".downsample." in k]:
            v = state[
                key
            ]  # torchvision stacks the pixels (0, 0), (1, 0), (0, 1), (1, 1), each with its channels
            state[key] = (
                v.unflatten(-1, (2, 2, -1))
                .transpose(-3, -2)
                .movedim(-1, -3)
                .flatten(-3)
                .contiguous()
            )
        return state


BACKBONES = {
    c.__name__: c
    for c in (
        ResNet,
        ResNetV1c,
        ResNeXt,
        HRNet,
        MixVisionTransformer,
        MobileNetV2,
        ConvNeXt,
        SwinTransformer,
    )
}


# ------------------------------------------------------------------- Necks: list of feature maps -> list of feature maps
class FPN(nn.Module):
    """Feature Pyramid Network (https://arxiv.org/abs/1612.03144): every map in `out_channels`, with what the coarser ones know."""

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
                f"num_outs is {num_outs}; it has to be {len(in_channels)}, the number of in_channels"
            )
        self.lateral_convs = nn.ModuleList(
            ConvModule(c, out_channels, norm=False, act=None) for c in in_channels
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, norm=False, act=None) for _ in in_channels
        )
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps = [
            conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)
        ]  # (N, out_channels, h, w) each
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:])
        return [conv(x) for conv, x in zip(self.fpn_convs, maps)]


NECKS = {"FPN": FPN}


# ------------------------------------------- Losses: logits (N, C, h, w) of any resolution and label (N, H, W) -> scalar
CHUNK = 2**25  # values of full-resolution logits that exist at a time: 128 MiB in float32


def images_at_a_time(logits: Tensor, label: Tensor) -> int:
    return max(1, CHUNK // (logits.shape[1] * label[0].numel()))


class ChunkedLoss(torch.autograd.Function):
    """Sum of `total(logits, label, weight)` over `size` images at a time, whose gradient is worked out along with it.

    Logits at full resolution, their softmax and gradient never exist for the whole batch, and nothing is computed twice: what stays until
    the backward pass is the gradient of the head's own small logits.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        label: Tensor,
        weight: Tensor | None,
        total: Callable,
        align_corners: bool,
        size: int,
        differentiate: bool,
    ) -> Tensor:
        sums, gradients = [], []
        weights = [None] * len(label) if weight is None else weight.split(size)
        with without_autocast(logits.device), torch.set_grad_enabled(differentiate):
            for x, y, w in zip(logits.split(size), label.split(size), weights):
                x = upcast(x.detach()).requires_grad_(differentiate)  # (n, C, h, w)
                loss = total(resize(x, y.unsqueeze(1), align_corners), y.long(), w)
                sums.append(loss.detach())
                if differentiate:
                    gradients.append(torch.autograd.grad(loss, x)[0])
        ctx.dtype = logits.dtype
        ctx.save_for_backward(torch.cat(gradients) if differentiate else None)
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return (ctx.saved_tensors[0] * gradient).to(ctx.dtype), *[None] * 6


def chunked_loss(
    logits: Tensor,
    label: Tensor,
    weight: Tensor | None,
    total: Callable,
    align_corners: bool,
    size: int,
) -> Tensor:
    differentiate = torch.is_grad_enabled() and logits.requires_grad
    return ChunkedLoss.apply(logits, label, weight, total, align_corners, size, differentiate)


def mean_over_processes(count: Tensor) -> Tensor:
    """As gradients are averaged over the processes, a divisor has to be: then 4 processes x 2 images give what 1 x 8 gives."""
    if dist.is_available() and dist.is_initialized() and not count.is_meta:
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count


def one_hot(label: Tensor, channels: int) -> Tensor:
    """(n, H, W) -> (n, channels, H, W) bool, nothing where ignored; one channel stands for class 1."""
    classes = (
        torch.arange(channels, device=label.device)
        if channels > 1
        else torch.ones(1, device=label.device)
    )
    return label.unsqueeze(1) == classes.view(1, -1, 1, 1)


class Loss(nn.Module):
    """What all losses share: loss_weight * sum over images of `loss_sum` / `normalizer`; `class_weight` has one factor a channel.

    `loss_name`: its name in the log, with the same name several losses are added up there.
    """

    NAME = "loss"
    whole_batch = False  # `loss_sum` cannot be had image by image

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        class_weight: list[float] | None = None,
        loss_name: str | None = None,
    ):
        super().__init__()
        self.loss_weight, self.loss_name = loss_weight, loss_name or self.NAME
        factors = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64)
        self.register_buffer("class_weight", factors, persistent=False)

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """Sum over these images: logits (n, C, H, W), label (n, H, W) of int64, weight (n, H, W) of a sampler or None -> scalar."""
        raise NotImplementedError

    def normalizer(self, logits: Tensor, label: Tensor) -> int | Tensor:
        return label.numel() * logits.shape[1]

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        align_corners: bool = False,
        weight: Tensor | None = None,
    ) -> Tensor:
        if self.class_weight is not None and len(self.class_weight) != logits.shape[1]:
            raise UserError(
                f"class_weight has {len(self.class_weight)} values, the head {logits.shape[1]} channels"
            )
        size = len(label) if self.whole_batch else images_at_a_time(logits, label)
        total = chunked_loss(logits, label, weight, self.loss_sum, align_corners, size)
        return self.loss_weight * total / self.normalizer(logits, label)


class CrossEntropyLoss(Loss):
    """Cross entropy, by default averaged over all pixels, ignored ones counted, as MMSegmentation does; `avg_non_ignore`: over the valid
    ones of all processes. With `class_weight` the mean is weighted, an ignored pixel counts 1. `use_sigmoid`: binary, one logit a class.
    """

    NAME = "loss_ce"

    def __init__(self, *, use_sigmoid: bool = False, avg_non_ignore: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.use_sigmoid, self.avg_non_ignore = use_sigmoid, avg_non_ignore

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        factors = None if self.class_weight is None else self.class_weight.to(logits.dtype)
        if self.use_sigmoid:
            factors = None if factors is None else factors.view(-1, 1, 1)
            entries = F.binary_cross_entropy_with_logits(
                logits,
                one_hot(label, logits.shape[1]).to(logits.dtype),
                pos_weight=factors,
                reduction="none",
            )
            pixels = entries.sum(1) * (label != IGNORE)  # (n, H, W)
        else:
            pixels = F.cross_entropy(
                logits, label, factors, ignore_index=IGNORE, reduction="none"
            )  # (n, H, W)
        return (pixels if weight is None else pixels * weight).sum()

    def normalizer(self, logits: Tensor, label: Tensor) -> int | Tensor:
        weighted = self.class_weight is not None and not self.use_sigmoid
        entries = logits.shape[1] if self.use_sigmoid else 1
        if not weighted and not self.avg_non_ignore:
            return label.numel() * entries
        counts = label != IGNORE
        if weighted:
            factors = self.class_weight[label.long().clamp(max=len(self.class_weight) - 1)]
            counts = torch.where(counts, factors, float(not self.avg_non_ignore))
        count = counts.sum().to(upcast(logits).dtype) * entries
        return (mean_over_processes(count) if self.training else count).clamp(min=1e-6)


class DiceLoss(Loss):
    """Dice of each image over all its classes, ignored pixels left out (https://arxiv.org/abs/1606.04797)."""

    NAME = "loss_dice"
    FIXED = {"activate": [True], "naive_dice": [False]}

    def __init__(self, *, use_sigmoid: bool = True, eps: float = 1e-3, **kwargs):
        super().__init__(**kwargs)
        self.use_sigmoid, self.eps = use_sigmoid, eps

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        probability = (
            logits.sigmoid() if self.use_sigmoid or logits.shape[1] == 1 else logits.softmax(1)
        )
        counted = (
            (label != IGNORE).unsqueeze(1)
            if weight is None
            else (weight * (label != IGNORE)).unsqueeze(1)
        )
        p, t = (
            (probability * counted).flatten(1),
            (one_hot(label, logits.shape[1]) * counted).flatten(1).to(logits.dtype),
        )  # (n, C*H*W)
        return (1 - 2 * (p * t).sum(1) / ((p * p).sum(1) + (t * t).sum(1) + 2 * self.eps)).sum()

    def normalizer(self, logits: Tensor, label: Tensor) -> int:
        return len(label)


class FocalLoss(Loss):
    """Sigmoid focal loss (https://arxiv.org/abs/1708.02002), the mean over pixels and classes; `alpha`: one for all classes or a list."""

    NAME = "loss_focal"
    FIXED = {"use_sigmoid": [True]}

    def __init__(self, *, gamma: float = 2.0, alpha: float | list[float] = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.gamma = gamma
        self.register_buffer(
            "alpha", torch.tensor(alpha, dtype=torch.float64).view(-1, 1, 1), persistent=False
        )

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        t = one_hot(label, logits.shape[1]).to(logits.dtype)
        alpha = self.alpha.to(logits.dtype)
        factors = alpha * t + (1 - alpha) * (1 - t)
        if self.class_weight is not None:
            factors = factors * self.class_weight.to(logits.dtype).view(-1, 1, 1)
        missed = (logits.sigmoid() - t).abs()  # 1 - the probability of what is right
        entries = (
            F.binary_cross_entropy_with_logits(logits, t, reduction="none")
            * missed**self.gamma
            * factors
        )
        pixels = entries.sum(1) * (label != IGNORE)
        return (pixels if weight is None else pixels * weight).sum()


def lovasz_extension(errors: Tensor, truth: Tensor) -> Tensor:
    """The Lovász extension of 1 - IoU: errors and truth (0 or 1) of the pixels, both (P,) -> scalar."""
    errors, order = errors.sort(descending=True)
    truth = truth[order].to(errors.dtype)
    jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
    return errors.relu() @ jaccard.diff(prepend=jaccard.new_zeros(1))


class LovaszLoss(Loss):
    """Lovász-Softmax, or for `loss_type` "binary" Lovász hinge (https://arxiv.org/abs/1705.08790); `classes`: "present", "all" or a list;
    `per_image`: the mean over images instead of one loss over the batch."""

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
        if (
            loss_type not in ("multi_class", "binary")
            or isinstance(classes, str)
            and classes not in ("present", "all")
        ):
            raise UserError(
                'loss_type is "multi_class" or "binary", classes "present", "all" or a list of numbers'
            )
        self.binary, self.classes, self.per_image, self.whole_batch = (
            loss_type == "binary",
            classes,
            per_image,
            not per_image,
        )

    def loss_sum(self, logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        counted = label != IGNORE if weight is None else (label != IGNORE) & (weight > 0)
        images = range(len(label)) if self.per_image else [slice(None)]
        return torch.stack([self.of_pixels(logits[i], label[i], counted[i]) for i in images]).sum()

    def of_pixels(self, logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
        """An error of 0 counts nothing, so ignored pixels get that; no size depends on the values, which would stall a GPU."""
        if self.binary:
            truth = (label == 1).flatten()
            errors = (1 - logits.flatten() * (2.0 * truth - 1)) * counted.flatten()
            return lovasz_extension(errors, truth & counted.flatten())
        probability, losses, present = logits.softmax(-3), [], []
        for c in range(logits.shape[-3]) if isinstance(self.classes, str) else self.classes:
            truth = ((label == c) & counted).flatten()
            errors = (
                truth.to(logits.dtype) - probability.select(-3, c).flatten()
            ).abs() * counted.flatten()
            losses.append(
                lovasz_extension(errors, truth)
                * (1 if self.class_weight is None else self.class_weight[c].to(errors.dtype))
            )
            present.append(truth.any() if self.classes == "present" else torch.ones_like(truth[0]))
        present = torch.stack(present).to(logits.dtype)
        return (torch.stack(losses) * present).sum() / present.sum().clamp(min=1)

    def normalizer(self, logits: Tensor, label: Tensor) -> int:
        return len(label) if self.per_image else 1


class OHEMPixelSampler:
    """Online hard example mining (https://arxiv.org/abs/1604.03540): weight 1 for the pixels whose own class has a probability below
    `thresh`, at least `min_kept` an image (on the batch's average); without `thresh` for exactly those; 0 for the rest."""

    def __init__(self, *, thresh: float | None = None, min_kept: int = 100000):
        if min_kept < 1:
            raise UserError(f"min_kept is {min_kept}; it must be 1 or more")
        self.thresh, self.min_kept = thresh, min_kept

    @torch.no_grad()
    def __call__(
        self, logits: Tensor, label: Tensor, align_corners: bool
    ) -> Tensor:  # (N, C, h, w), (N, H, W) -> (N, H, W)
        size, last_class, valid, probability = (
            images_at_a_time(logits, label),
            logits.shape[1] - 1,
            label != IGNORE,
            [],
        )
        for x, y in zip(logits.split(size), label.split(size)):
            x = resize(upcast(x), y.unsqueeze(1), align_corners).softmax(1)  # (n, C, H, W)
            probability.append(x.gather(1, y.long().clamp(max=last_class).unsqueeze(1)).squeeze(1))
        probability = torch.cat(probability)  # (N, H, W)
        probability[~valid] = 2  # beyond every valid one
        kept, ordered = self.min_kept * len(label), probability.flatten().sort().values
        if self.thresh is None:
            last = ordered.take(
                (valid.sum() - 1).clamp(0, kept - 1)
            )  # indexing would wait for the device
            return (valid & (probability <= last)).to(probability.dtype)
        last = ordered.take((valid.sum() - 1).clamp(0, kept)).clamp(min=self.thresh)
        return (valid & (probability < last)).to(probability.dtype)


LOSSES = {c.__name__: c for c in (CrossEntropyLoss, DiceLoss, FocalLoss, LovaszLoss)}
SAMPLERS = {"OHEMPixelSampler": OHEMPixelSampler}


# --------------------------- Heads: list of feature maps -> logits (N, out_channels, h, w) by name, the prediction first
class DecodeHead(nn.Module):
    """What all heads share: which features they take, the classifier and the losses. A head of one's own defines `decode`.

    `in_index` picks the feature maps that have `in_channels`; `input_transform`: "resize_concat" makes one map of several,
    "multiple_select" hands over the list. `out_channels`: 1 for two classes by one logit (losses with use_sigmoid), class 1 being where its
    sigmoid exceeds `threshold`. `sampler`: which pixels count in the losses. `loss_decode`: one loss or several.
    """

    input_transform = None  # a head that works on several maps names its own

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
        if self.input_transform not in (None, "resize_concat", "multiple_select"):
            raise UserError(
                f"input_transform is {input_transform!r}; it can be resize_concat, multiple_select or null"
            )
        several = [isinstance(x, (list, tuple)) for x in (in_channels, in_index)]
        if (
            several != [bool(self.input_transform)] * 2
            or all(several)
            and len(in_channels) != len(in_index)
        ):
            raise UserError(
                f"in_channels {in_channels} and in_index {in_index} should be "
                + (
                    "lists of the same length"
                    if self.input_transform
                    else "single numbers, or set input_transform"
                )
            )
        self.in_channels = (
            sum(in_channels) if self.input_transform == "resize_concat" else in_channels
        )
        self.in_index, self.channels, self.align_corners = in_index, channels, align_corners
        self.num_classes, self.out_channels = (
            num_classes,
            num_classes if out_channels is None else out_channels,
        )
        if self.out_channels != num_classes and (self.out_channels, num_classes) != (1, 2):
            raise UserError(
                f"out_channels is {out_channels}; it can be num_classes, {num_classes}, or 1 where num_classes is 2"
            )
        if threshold is not None and not 0 < threshold < 1:
            raise UserError(f"threshold is {threshold}; it is a probability, between 0 and 1")
        self.threshold = 0.5 if self.out_channels > 1 else threshold or 0.3  # MMSegmentation's
        losses = loss_decode if isinstance(loss_decode, (list, tuple)) else [loss_decode]
        self.loss_decode = nn.ModuleList(
            construct(LOSSES, {"type": "CrossEntropyLoss", **loss}, "loss_decode")
            for loss in losses
        )
        if self.out_channels == 1 and any(
            isinstance(x, CrossEntropyLoss) and not x.use_sigmoid for x in self.loss_decode
        ):
            raise UserError("with one output channel, loss_decode needs use_sigmoid: true")
        if not losses or self.out_channels == 1 and sampler:
            raise UserError(
                "loss_decode is empty; leave it out for CrossEntropyLoss"
                if not losses
                else "a sampler needs an output channel for each class"
            )
        self.sampler = construct(SAMPLERS, sampler, "sampler") if sampler else None
        self.dropout = nn.Dropout2d(max(dropout_ratio, 0))
        self.conv_seg = nn.Conv2d(channels, self.out_channels, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def select(self, features: list[Tensor]) -> Tensor | list[Tensor]:
        if not self.input_transform:
            return features[self.in_index]
        picked = [features[i] for i in self.in_index]
        return self.concat(picked) if self.input_transform == "resize_concat" else picked

    def concat(self, maps: list[Tensor]) -> Tensor:
        """All maps in the size of the first, side by side."""
        return torch.cat([resize(x, maps[0], self.align_corners) for x in maps], 1)

    def decode(self, x: Tensor | list[Tensor]) -> Tensor:
        """What `select` gives -> (N, channels, h, w)."""
        raise NotImplementedError

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        return {"": self.conv_seg(self.dropout(self.decode(self.select(features))))}

    def loss(self, outputs: dict[str, Tensor], label: Tensor) -> dict[str, Tensor]:
        """What forward gives and label (N, H, W) -> scalars by name."""
        found = {}
        for part, logits in outputs.items():
            weight = self.sampler(logits, label, self.align_corners) if self.sampler else None
            for loss in self.loss_decode:
                value, name = loss(logits, label, self.align_corners, weight), part + loss.loss_name
                found[name] = found[name] + value if name in found else value
        return found


class FCNHead(DecodeHead):
    """Fully Convolutional Networks (https://arxiv.org/abs/1411.4038): `num_convs` convolutions; `concat_input`: the input beside them."""

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
                f"without convolutions channels has to be in_channels, {self.in_channels}"
            )
        widths = [self.in_channels] + [self.channels] * num_convs
        self.convs = nn.Sequential(
            *[ConvModule(i, o, kernel_size, dilation=dilation) for i, o in zip(widths, widths[1:])]
        )
        self.concat_input = concat_input
        if concat_input:
            self.conv_cat = ConvModule(self.in_channels + self.channels, self.channels, kernel_size)

    def context(self, x: Tensor) -> Tensor:
        """Between the first convolution and the second; heads derived from this one look around the image here."""
        return x

    def decode(self, x: Tensor) -> Tensor:  # (N, in_channels, h, w) -> (N, channels, h, w)
        y = x
        for i, conv in enumerate(self.convs):
            y = conv(y) if i else self.context(conv(y))
        return self.conv_cat(torch.cat([x, y], 1)) if self.concat_input else y


class NonLocal(nn.Module):
    """Every pixel looks at every other."""

    def __init__(self, channels: int, reduction: int, use_scale: bool):
        super().__init__()
        inner = max(channels // reduction, 1)
        self.scale = inner**-0.5 if use_scale else 1.0
        self.g, self.theta, self.phi = (
            ConvModule(channels, inner, norm=False, act=None) for _ in range(3)
        )
        self.conv_out = ConvModule(inner, channels, act=None)
        for m in (self.g, self.theta, self.phi):
            nn.init.normal_(m.conv.weight, std=0.01)
        nn.init.zeros_(self.conv_out.bn.weight)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        return x + self.conv_out(attend(self.theta(x), self.phi(x), self.g(x), self.scale))


class NLHead(FCNHead):
    """Non-local neural networks (https://arxiv.org/abs/1711.07971)."""

    FIXED = {"mode": ["embedded_gaussian"]}

    def __init__(self, *, reduction: int = 2, use_scale: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.nl_block = NonLocal(self.channels, reduction, use_scale)

    def context(self, x: Tensor) -> Tensor:
        return self.nl_block(x)


class GlobalContext(nn.Module):
    """One weighted mean of all pixels is added to each."""

    def __init__(self, channels: int, inner: int):
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

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        share = self.conv_mask(x).flatten(2).softmax(2).to(x.dtype)  # (N, 1, h*w)
        return x + self.channel_add_conv((x.flatten(2) @ share.transpose(1, 2)).unsqueeze(3))


class GCHead(FCNHead):
    """GCNet (https://arxiv.org/abs/1904.11492)."""

    FIXED = {"pooling_type": ["att"], "fusion_types": [["channel_add"]]}

    def __init__(self, *, ratio: float = 0.25, **kwargs):
        super().__init__(**kwargs)
        self.gc_block = GlobalContext(self.channels, int(self.channels * ratio))

    def context(self, x: Tensor) -> Tensor:
        return self.gc_block(x)


class CrissCrossAttention(nn.Module):
    """Every pixel looks along its row and its column."""

    def __init__(self, channels: int):
        super().__init__()
        self.query_conv, self.key_conv = (
            nn.Conv2d(channels, channels // 8, 1),
            nn.Conv2d(channels, channels // 8, 1),
        )
        self.value_conv, self.gamma = nn.Conv2d(channels, channels, 1), Scale()

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        query, key, value, h = self.query_conv(x), self.key_conv(x), self.value_conv(x), x.shape[2]
        column = torch.einsum("nchw,nciw->nhwi", query, key)  # (N, h, w, h)
        itself = torch.eye(h, dtype=torch.bool, device=x.device).unsqueeze(
            1
        )  # is in its row already
        row = torch.einsum("nchw,nchj->nhwj", query, key)  # (N, h, w, w)
        attention = (
            torch.cat([column.masked_fill(itself, -math.inf), row], 3).softmax(3).to(value.dtype)
        )
        seen = torch.einsum("nciw,nhwi->nchw", value, attention[..., :h]) + torch.einsum(
            "nchj,nhwj->nchw", value, attention[..., h:]
        )
        return self.gamma(seen) + x


class CCHead(FCNHead):
    """CCNet (https://arxiv.org/abs/1811.11721): criss-cross attention `recurrence` times, so that everything reaches everything."""

    def __init__(self, *, recurrence: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.recurrence, self.cca = recurrence, CrissCrossAttention(self.channels)

    def context(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            x = self.cca(x)
        return x


class PSPHead(DecodeHead):
    """Pyramid Scene Parsing (https://arxiv.org/abs/1612.01105): the map pooled to each of `pool_scales` squared, beside the map itself."""

    def __init__(self, *, pool_scales: list[int] = (1, 2, 3, 6), **kwargs):
        super().__init__(**kwargs)
        self.psp_modules = PPM(pool_scales, self.in_channels, self.channels, self.align_corners)
        self.bottleneck = ConvModule(
            self.in_channels + len(pool_scales) * self.channels, self.channels, 3
        )

    def decode(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.psp_modules(x))


class UPerHead(DecodeHead):
    """Unified Perceptual Parsing (https://arxiv.org/abs/1807.10221): PSPNet's pyramid on the coarsest map, a feature pyramid over all."""

    input_transform = "multiple_select"

    def __init__(self, *, pool_scales: list[int] = (1, 2, 3, 6), **kwargs):
        super().__init__(**kwargs)
        *finer, last = self.in_channels
        self.psp_modules = PPM(pool_scales, last, self.channels, self.align_corners)
        self.bottleneck = ConvModule(last + len(pool_scales) * self.channels, self.channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, self.channels) for c in finer)
        self.fpn_convs = nn.ModuleList(ConvModule(self.channels, self.channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvModule(len(self.in_channels) * self.channels, self.channels, 3)

    def decode(self, xs: list[Tensor]) -> Tensor:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, xs)] + [
            self.bottleneck(self.psp_modules(xs[-1]))
        ]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i], self.align_corners)
        return self.fpn_bottleneck(
            self.concat([conv(x) for conv, x in zip(self.fpn_convs, maps)] + maps[-1:])
        )


class FPNHead(DecodeHead):
    """Panoptic FPN's semantic branch (https://arxiv.org/abs/1901.02446): each map brought up to the finest in steps of two, and added."""

    input_transform = "multiple_select"

    def __init__(self, *, feature_strides: list[int], **kwargs):
        super().__init__(**kwargs)
        if (
            len(feature_strides) != len(self.in_channels)
            or min(feature_strides) != feature_strides[0]
        ):
            raise UserError(
                f"feature_strides {feature_strides}: one for each of in_channels, the smallest first"
            )
        self.scale_heads = nn.ModuleList()
        for c, stride in zip(self.in_channels, feature_strides):
            layers, up = (
                [],
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=self.align_corners),
            )
            for k in range(max(1, int(math.log2(stride / feature_strides[0])))):
                layers += [ConvModule(self.channels if k else c, self.channels, 3)] + [up] * (
                    stride != feature_strides[0]
                )
            self.scale_heads.append(nn.Sequential(*layers))

    def decode(self, xs: list[Tensor]) -> Tensor:
        first, *others = [head(x) for head, x in zip(self.scale_heads, xs)]
        return first + sum(resize(x, first, self.align_corners) for x in others)


class SegformerHead(DecodeHead):
    """SegFormer's all-MLP decoder (https://arxiv.org/abs/2105.15203): 1x1 convolutions alone."""

    input_transform = "multiple_select"
    FIXED = {"interpolate_mode": ["bilinear"]}

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convs = nn.ModuleList(ConvModule(c, self.channels) for c in self.in_channels)
        self.fusion_conv = ConvModule(len(self.in_channels) * self.channels, self.channels)

    def decode(self, xs: list[Tensor]) -> Tensor:
        return self.fusion_conv(self.concat([conv(x) for conv, x in zip(self.convs, xs)]))


class ASPPHead(DecodeHead):
    """DeepLabV3 (https://arxiv.org/abs/1706.05587): convolutions of several `dilations` beside each other, and the image's mean."""

    def __init__(self, *, dilations: list[int] = (1, 6, 12, 18), **kwargs):
        super().__init__(**kwargs)
        self.image_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), ConvModule(self.in_channels, self.channels)
        )
        self.aspp_modules = nn.ModuleList(self.branch(d) for d in dilations)
        self.bottleneck = ConvModule((len(dilations) + 1) * self.channels, self.channels, 3)

    def branch(self, dilation: int) -> nn.Module:
        return ConvModule(
            self.in_channels, self.channels, 1 if dilation == 1 else 3, dilation=dilation
        )

    def decode(self, x: Tensor) -> Tensor:
        mean = self.image_pool(x).expand(-1, -1, *x.shape[2:])  # (N, channels, h, w)
        return self.bottleneck(torch.cat([mean, *(m(x) for m in self.aspp_modules)], 1))


class DepthwiseSeparableASPPHead(ASPPHead):
    """DeepLabV3+ (https://arxiv.org/abs/1802.02611): depthwise separable; a decoder with the first map (`c1_in_channels`, 0 for none)."""

    def __init__(self, *, c1_in_channels: int, c1_channels: int, **kwargs):
        super().__init__(**kwargs)
        self.c1_bottleneck = ConvModule(c1_in_channels, c1_channels) if c1_in_channels else None
        self.sep_bottleneck = nn.Sequential(
            SeparableConvModule(self.channels + c1_channels * bool(c1_in_channels), self.channels),
            SeparableConvModule(self.channels, self.channels),
        )

    def branch(self, dilation: int) -> nn.Module:
        return (
            super().branch(1)
            if dilation == 1
            else SeparableConvModule(self.in_channels, self.channels, dilation=dilation)
        )

    def select(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        return super().select(features), features[0]

    def decode(self, xs: tuple[Tensor, Tensor]) -> Tensor:
        y = super().decode(xs[0])
        if self.c1_bottleneck is not None:
            fine = self.c1_bottleneck(xs[1])  # (N, c1_channels, H/4, W/4)
            y = torch.cat([resize(y, fine, self.align_corners), fine], 1)
        return self.sep_bottleneck(y)


class DAHead(DecodeHead):
    """Dual Attention (https://arxiv.org/abs/1809.02983): over positions (PAM) and over channels (CAM), each with a loss of its own."""

    def __init__(self, *, pam_channels: int, **kwargs):
        super().__init__(**kwargs)
        c = self.channels
        self.pam_in_conv, self.cam_in_conv = (
            ConvModule(self.in_channels, c, 3),
            ConvModule(self.in_channels, c, 3),
        )
        self.pam, self.cam = SelfAttentionBlock(c, c, pam_channels, None, norm=False), nn.Module()
        self.pam.gamma, self.cam.gamma = Scale(), Scale()
        self.pam_out_conv, self.cam_out_conv = ConvModule(c, c, 3), ConvModule(c, c, 3)
        self.pam_conv_seg, self.cam_conv_seg = (
            nn.Conv2d(c, self.out_channels, 1),
            nn.Conv2d(c, self.out_channels, 1),
        )

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        x = self.select(features)
        pam, cam = self.pam_in_conv(x), self.cam_in_conv(x)  # (N, channels, h, w)
        pam = self.pam_out_conv(self.pam.gamma(self.pam(pam, pam)) + pam)
        energy = cam.flatten(2) @ cam.flatten(2).transpose(1, 2)  # (N, channels, channels)
        attention = (energy.amax(2, keepdim=True) - energy).softmax(2).to(cam.dtype)
        cam = self.cam_out_conv(
            self.cam.gamma((attention @ cam.flatten(2)).unflatten(2, cam.shape[2:])) + cam
        )
        return {
            "pam_cam.": self.conv_seg(self.dropout(pam + cam)),
            "pam.": self.pam_conv_seg(self.dropout(pam)),
            "cam.": self.cam_conv_seg(self.dropout(cam)),
        }


class Encoding(nn.Module):
    """How far the pixels are, in all, from each of `num_codes` learnt codewords."""

    def __init__(self, channels: int, num_codes: int):
        super().__init__()
        std = (num_codes * channels) ** -0.5
        self.codewords = nn.Parameter(torch.empty(num_codes, channels).uniform_(-std, std))
        self.scale = nn.Parameter(torch.empty(num_codes).uniform_(-1, 0))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, num_codes, C)
        x = x.flatten(2).transpose(1, 2)  # (N, h*w, C)
        with without_autocast(x.device):  # differences of large numbers
            x = x.to(self.codewords.dtype)
            distance = (
                x.square().sum(2, keepdim=True)
                - 2 * x @ self.codewords.T
                + self.codewords.square().sum(1)
            )  # (N, h*w, num_codes)
            share = (self.scale * distance).softmax(2)
            return share.transpose(1, 2) @ x - share.sum(1).unsqueeze(2) * self.codewords


class EncModule(nn.Module):
    """Scales the channels by what the whole image encodes."""

    def __init__(self, channels: int, num_codes: int):
        super().__init__()
        self.encoding_project = ConvModule(channels, channels)
        self.encoding = nn.Sequential(
            Encoding(channels, num_codes), nn.BatchNorm1d(num_codes), nn.ReLU(inplace=True)
        )
        self.fc = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (N, C, h, w) -> (N, C), (N, C, h, w)
        encoded = self.encoding(self.encoding_project(x)).mean(1)
        return encoded, F.relu(x + x * self.fc(encoded)[:, :, None, None])


class EncHead(DecodeHead):
    """EncNet (https://arxiv.org/abs/1803.08904); `use_se_loss`: also learn which classes the image holds."""

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
            section = {
                "type": "CrossEntropyLoss",
                "use_sigmoid": True,
                "loss_weight": 0.2,
                **loss_se_decode,
            }
            loss = construct(LOSSES, section, "loss_se_decode")
            if (
                type(loss) is not CrossEntropyLoss
                or not loss.use_sigmoid
                or loss.class_weight is not None
            ):
                raise UserError(
                    "loss_se_decode is always CrossEntropyLoss with use_sigmoid and without class_weight; only its loss_weight can be set"
                )
            self.se_weight = loss.loss_weight
            self.se_layer = nn.Linear(self.channels, self.num_classes)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        encoded, x = self.enc_module(self.bottleneck(self.select(features)[-1]))
        outputs = {"": self.conv_seg(self.dropout(x))}
        return (
            outputs if self.se_layer is None else {**outputs, "se": self.se_layer(encoded)}
        )  # (N, num_classes)

    def loss(self, outputs: dict[str, Tensor], label: Tensor) -> dict[str, Tensor]:
        found = super().loss({"": outputs[""]}, label)
        if self.se_layer is not None:
            classes = outputs["se"].shape[1]
            present = torch.zeros(len(label), classes + 1, device=label.device)
            present = present.scatter_(1, label.long().clamp(max=classes).flatten(1), 1)[
                :, :-1
            ]  # (N, num_classes)
            found["loss_se"] = self.se_weight * F.binary_cross_entropy_with_logits(
                outputs["se"], present
            )
        return found


class ANNHead(DecodeHead):
    """Asymmetric Non-local (https://arxiv.org/abs/1908.07678): keys and values are the map pooled to each of `key_pool_scales` squared."""

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
        (low, high), c, p = self.in_channels, self.channels, project_channels

        def pool(x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C, 110)
            return torch.cat([AdaptiveAvgPool(s)(x).flatten(2) for s in key_pool_scales], 2)

        self.fusion, self.context = nn.Module(), nn.Module()
        self.fusion.stages = nn.ModuleList(
            [SelfAttentionBlock(high, low, p, high, scale=p**-0.5, pool=pool)]
        )
        self.fusion.bottleneck = ConvModule(2 * high, high, act=None)
        self.bottleneck = ConvModule(high, c, 3)
        self.context.stages = nn.ModuleList(
            [SelfAttentionBlock(c, c, p, c, scale=p**-0.5, pool=pool, share=True)]
        )
        self.context.bottleneck = ConvModule(2 * c, c)

    def decode(self, xs: list[Tensor]) -> Tensor:
        low, high = xs
        x = self.fusion.bottleneck(
            torch.cat([self.fusion.stages[0](high, low), high], 1)
        )  # (N, high, h, w)
        x = self.bottleneck(self.dropout(x))
        return self.context.bottleneck(torch.cat([self.context.stages[0](x, x), x], 1))


class OCRHead(DecodeHead):
    """Object-Contextual Representations (https://arxiv.org/abs/1909.11065), the second of a cascade: pixels look at each class's mean."""

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

    def forward(self, features: list[Tensor], previous: Tensor) -> dict[str, Tensor]:
        x = self.bottleneck(self.select(features))  # (N, channels, h, w)
        share = previous.flatten(2).softmax(2).to(x.dtype)  # (N, num_classes, h*w)
        objects = (x.flatten(2) @ share.transpose(1, 2)).unsqueeze(
            3
        )  # (N, channels, num_classes, 1)
        block = self.object_context_block
        x = block.bottleneck(torch.cat([block(x, objects), x], 1))
        return {"": self.conv_seg(self.dropout(x))}


def point_wise_attention(mask: Tensor, mask_size: tuple[int, int], collect: bool) -> Tensor:
    """PSANet's masks (N, mask_h * mask_w, h, w), each around its pixel, laid out over the image: (N, h*w, h*w), zero beyond the mask.

    `collect`: column s holds what pixel s's mask gives to each pixel; else row s does.
    """
    (mh, mw), (h, w) = mask_size, mask.shape[2:]
    rows = (
        torch.arange(h, device=mask.device)[:, None]
        - torch.arange(h, device=mask.device)
        + (mh - 1) // 2
    )  # (to, from)
    columns = (
        torch.arange(w, device=mask.device)[:, None]
        - torch.arange(w, device=mask.device)
        + (mw - 1) // 2
    )
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]  # (h, 1, h, 1), (1, w, 1, w)
    inside = ((rows >= 0) & (rows < mh) & (columns >= 0) & (columns < mw)).reshape(h * w, h * w)
    index = (rows.clamp(0, mh - 1) * mw + columns.clamp(0, mw - 1)).reshape(1, h * w, h * w)
    spread = mask.flatten(2).gather(1, index.expand(len(mask), -1, -1)) * inside
    return spread if collect else spread.transpose(1, 2)


class PSAHead(DecodeHead):
    """PSANet (https://hszhao.github.io/papers/eccv18_psanet.pdf): each pixel has a mask of `mask_size` of what it collects from the others
    ("collect"), gives to them ("distribute"), or both ("bi-direction"), on a map made `shrink_factor` times smaller."""

    FIXED = {"compact": [False]}

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
        ways = {"collect": [True], "distribute": [False], "bi-direction": [True, False]}
        if psa_type not in ways:
            raise UserError(f"psa_type is {psa_type!r}; it can be {', '.join(ways)}")
        self.mask_size, self.shrink_factor, self.psa_softmax = mask_size, shrink_factor, psa_softmax
        self.ways, c, values = ways[psa_type], self.channels, mask_size[0] * mask_size[1]
        self.normalization_factor = values if normalization_factor is None else normalization_factor
        for suffix in ("", "_p")[: len(self.ways)]:
            self.add_module(f"reduce{suffix}", ConvModule(self.in_channels, c))
            self.add_module(
                f"attention{suffix}",
                nn.Sequential(ConvModule(c, c), nn.Conv2d(c, values, 1, bias=False)),
            )
        self.proj = ConvModule(
            c * len(self.ways), self.in_channels, padding=1
        )  # MMSegmentation pads this 1x1
        self.bottleneck = ConvModule(2 * self.in_channels, c, 3)

    def decode(self, x: Tensor) -> Tensor:
        size, align = x.shape[2:], self.align_corners
        if self.shrink_factor != 1:
            align = all(s % self.shrink_factor for s in size)
            size = [
                (s - 1) // self.shrink_factor + 1 if align else s // self.shrink_factor
                for s in size
            ]
        seen = []
        for collect, suffix in zip(self.ways, ("", "_p")):
            y = getattr(self, f"reduce{suffix}")(x)
            y = F.interpolate(
                y, size, mode="bilinear", align_corners=align
            )  # (N, channels, h', w')
            weights = point_wise_attention(
                getattr(self, f"attention{suffix}")(y), self.mask_size, collect
            )  # (N, h'*w', h'*w')
            weights = weights.softmax(1).to(y.dtype) if self.psa_softmax else weights
            seen.append(
                (y.flatten(2) @ weights / self.normalization_factor).unflatten(2, y.shape[2:])
            )
        y = resize(self.proj(torch.cat(seen, 1)), x, align)
        return self.bottleneck(torch.cat([x, y], 1))


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
    )
}


# --------------------------------------------------------------------------------------------------------- The whole net
class Segmentor(nn.Module):
    """Backbone, neck and heads. Of a list of decode heads, a cascade, each also gets the logits of the one before.

    forward(image): image (N, C, H, W), normalized -> the (last) decode head's logits (N, out_channels, h, w) at its own resolution.
    forward(image, label): label (N, H, W) of uint8 or int64, 255 ignored -> a dict of scalar losses, the sum of which is trained.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: nn.Module | list[nn.Module],
        auxiliary_head: nn.Module | list[nn.Module] | None = None,
        neck: nn.Module | None = None,
        pretrained: str | None = None,
    ):
        super().__init__()
        self.backbone, self.neck, self.pretrained = backbone, neck, pretrained
        self.decode_head = (
            nn.ModuleList(decode_head) if isinstance(decode_head, list) else decode_head
        )
        self.auxiliary_head = (
            nn.ModuleList(auxiliary_head) if isinstance(auxiliary_head, list) else auxiliary_head
        )
        last = decode_head[-1] if isinstance(decode_head, list) else decode_head
        self.num_classes, self.out_channels, self.threshold = (
            last.num_classes,
            last.out_channels,
            last.threshold,
        )
        self.align_corners, self.in_channels = last.align_corners, backbone.in_channels

    @staticmethod
    def named(heads: nn.Module | None, name: str) -> list[tuple[str, nn.Module]]:
        if isinstance(heads, nn.ModuleList):
            return [(f"{name}_{i}", head) for i, head in enumerate(heads)]
        return [(name, heads)] if heads is not None else []

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        features = self.backbone(image)
        if self.neck is not None:
            features = self.neck(features)
        losses, logits = {}, None
        for name, head in self.named(self.decode_head, "decode"):
            outputs = head(features) if logits is None else head(features, logits)
            logits = next(iter(outputs.values()))
            if label is not None:
                losses |= {f"{name}.{k}": v for k, v in head.loss(outputs, label).items()}
        if label is None:
            return logits
        for name, head in self.named(self.auxiliary_head, "aux"):
            losses |= {f"{name}.{k}": v for k, v in head.loss(head(features), label).items()}
        return losses

    def inference(
        self,
        image: Tensor,
        mode: str = "whole",
        crop_size: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        batch_size: int = 1,
    ) -> Tensor:
        """Class logits (N, num_classes, h, w) of normalized images (N, C, H, W).

        mode "whole": one forward pass, at the head's resolution. mode "slide": windows of `crop_size`
        (height, width) every `stride` (down, right) pixels, `batch_size` at a time, at the image's resolution;
        where windows overlap, their logits are averaged.
        """
        if mode == "whole":
            return self.class_logits(image)
        height, width = image.shape[2:]
        window_height = min(crop_size[0], height)
        window_width = min(crop_size[1], width)
        window_size = (window_height, window_width)
        tops = window_starts(height, window_height, stride[0])
        lefts = window_starts(width, window_width, stride[1])
        windows = [(n, top, left) for n in range(len(image)) for top in tops for left in lefts]
        total = image.new_zeros(())
        count = image.new_zeros(len(image), 1, height, width)
        for start in range(0, len(windows), batch_size):
            chunk = windows[start : start + batch_size]
            crops = [image[n, :, y : y + window_height, x : x + window_width] for n, y, x in chunk]
            logits = self.class_logits(torch.stack(crops))
            logits = F.interpolate(
                logits, window_size, mode="bilinear", align_corners=self.align_corners
            )
            if start == 0:
                total = logits.new_zeros(len(image), logits.size(1), height, width)
            for (n, y, x), window in zip(chunk, logits):
                total[n, :, y : y + window_height, x : x + window_width] += window
                count[n, :, y : y + window_height, x : x + window_width] += 1
        return total / count

    def inference_tta(
        self, image: Tensor, size: tuple[int, int], ratios: list[float], **settings
    ) -> Tensor:
        """Log of the mean probabilities (N, num_classes, *size) over every scale in `ratios` and its mirror image.

        settings: the keywords of `inference`.
        """
        total = 0.0
        for ratio in ratios:
            scaled_size = [int(side * ratio + 0.5) for side in image.shape[2:]]
            scaled = F.interpolate(image, scaled_size, mode="bilinear", align_corners=False)
            for flip in (False, True):
                logits = self.inference(scaled.flip(3) if flip else scaled, **settings)
                logits = logits.flip(3) if flip else logits
                logits = F.interpolate(
                    logits, size, mode="bilinear", align_corners=self.align_corners
                )
                total = total + logits.softmax(1)
        mean = total / (2 * len(ratios))
        return mean.clamp_min(1e-12).log()

    def class_logits(self, image: Tensor) -> Tensor:
        """One logit per class in float32; a binary network's one logit z becomes (0, z), whose softmax is z's sigmoid."""
        logits = self(image).float()
        if logits.size(1) > 1:
            return logits
        return torch.cat([torch.zeros_like(logits), logits], 1)


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one axis; the last one is moved back so that it ends at the border."""
    last = size - window
    return [min(start, last) for start in range(0, last + stride, stride)]


def compiled(net: nn.Module, **options) -> nn.Module:
    """torch.compile(net), which shall leave three things alone: SyncBN, whose gradient torch 2.11 gets wrong; `frozen_statistics`, which it would
    lose where SyncBN breaks its graph; the loss's loop.

    Said here and not where they stand, since to say it imports the compiler, which takes as long as importing torch.
    """
    global checkpointed, chunked_loss
    checkpointed, chunked_loss = (
        torch.compiler.disable(checkpointed, recursive=False),
        torch.compiler.disable(chunked_loss),
    )
    for module in net.modules():
        if type(module).__name__ == "SyncBatchNorm":  # torch's, or dist_utils'
            module.forward = torch.compiler.disable(module.forward)
    return torch.compile(net, **options)


# ------------------------------------------------------------------------------------------------------- Config -> network
def fits(value, annotation) -> bool:
    """Whether a value read from JSON is of an annotated type. An int serves as a float; a bool is never a number."""
    if annotation in (inspect.Parameter.empty, typing.Any):
        return True
    if annotation in (None, type(None)):
        return value is None
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, a) for a in args)
    if origin is tuple and isinstance(value, (list, tuple)) and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args))
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(fits(v, args[0]) for v in value)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else origin or annotation)


def keywords(function) -> dict[str, inspect.Parameter]:
    """The keyword parameters of a function or class; a class that takes **kwargs has its parents' as well."""
    found = {}
    for owner in function.__mro__ if isinstance(function, type) else [function]:
        if isinstance(function, type) and "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(
            vars(owner)["__init__"] if isinstance(function, type) else function
        ).parameters.values()
        found = {
            **{
                p.name: p
                for p in parameters
                if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"
            },
            **found,
        }
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def suggest(name: str, right: list[str]) -> str:
    close = difflib.get_close_matches(name, right, 1)
    return f"did you mean {close[0]}?" if close else f"it can be: {', '.join(sorted(right))}"


def check_keywords(function, section: dict, place: str) -> None:
    """Raises ConfigError unless `section` can be the keyword arguments of `function`: known names, none missing, the right types."""
    known = keywords(function)
    for key, value in section.items():
        if key not in known:
            raise ConfigError(
                f"{place}.{key}: {function.__name__} has no such keyword; {suggest(key, list(known))}"
            )
        annotation = known[key].annotation
        if not fits(value, annotation):
            kind = (
                annotation.__name__
                if isinstance(annotation, type) and not typing.get_args(annotation)
                else annotation
            )
            raise ConfigError(f"{place}.{key}: is {value!r}, should be of type {kind}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in section:
            raise ConfigError(f"{place}.{name}: is missing; {function.__name__} needs it")


# MMSegmentation's keywords that have one value here. A class whose own differ names them in FIXED.
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


def without_fixed(cls: type, section: dict, place: str) -> dict:
    """`section` without the keywords that have become automatic; a value that cannot be honored is a ConfigError."""
    fixed, known, kept = {**FIXED, **getattr(cls, "FIXED", {})}, keywords(cls), {}
    for key, value in section.items():
        if key in known or key not in fixed:
            kept[key] = value
            continue
        if isinstance(value, dict):  # "SyncBN", requires_grad: what happens anyway
            value = {
                k: v
                for k, v in value.items()
                if (k, v) not in (("requires_grad", True), ("inplace", True), ("inplace", False))
            }
        if (list(value) if isinstance(value, tuple) else value) not in fixed[key]:
            raise ConfigError(
                f"{place}.{key}: is {value!r}; in {cls.__name__} it is always {fixed[key][0]!r}. Leave the key out"
            )
    return kept


def construct(table: dict, section: dict, place: str):
    """`{"type": "PSPHead", "channels": 512, ...}` -> `table["PSPHead"](channels=512, ...)`; `place` leads the error messages."""
    section = {key: value for key, value in section.items() if key != "init_cfg"}
    kind = str(section.pop("type", None)).removeprefix("mmpretrain.")
    if kind not in table:
        raise ConfigError(f"{place}.type: is {kind!r}; {suggest(kind, list(table))}")
    section = without_fixed(table[kind], section, place)
    check_keywords(table[kind], section, place)
    try:
        return table[kind](**section)
    except ConfigError as error:  # of a section within this one
        raise ConfigError(f"{place}.{error}") from None
    except UserError as error:
        raise ConfigError(f"{place}: {error}") from error
    except (
        TypeError,
        RuntimeError,
        LookupError,
        ArithmeticError,
    ) as error:  # what torch says of a value that cannot be, or a slip in a net of one's own
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{place}: {kind} cannot be built of these values: {error} ({os.path.basename(where.filename)}, line {where.lineno})"
        ) from error


def build_model(cfg: dict) -> Segmentor:
    """A config's `model` section, or an MMSegmentation `model` dict -> Segmentor. Reads no files and leaves `cfg` as it is."""
    cfg = dict(cfg)
    kind = cfg.pop("type", "EncoderDecoder")
    if kind not in ("EncoderDecoder", "CascadeEncoderDecoder"):
        raise ConfigError(
            f"model.type: is {kind!r}; it can be EncoderDecoder or CascadeEncoderDecoder, or left out"
        )
    for key in (
        "num_stages",
        "data_preprocessor",
        "train_cfg",
        "test_cfg",
        "init_cfg",
    ):  # belong to other sections here, or are automatic
        cfg.pop(key, None)
    check_keywords(assemble, cfg, "model")
    return assemble(**cfg)


def assemble(
    *,
    backbone: dict,
    decode_head: dict | list[dict],
    auxiliary_head: dict | list[dict] | None = None,
    neck: dict | None = None,
    pretrained: str | None = None,
) -> Segmentor:
    def heads(section: dict | list[dict] | None, place: str) -> nn.Module | list[nn.Module] | None:
        if isinstance(section, (list, tuple)):
            return [construct(HEADS, s, f"{place}.{i}") for i, s in enumerate(section)]
        return construct(HEADS, section, place) if section else None

    if not decode_head:
        raise ConfigError(
            'model.decode_head: is empty; name a head, such as {"type": "FCNHead", ...}'
        )
    backbone = dict(backbone)
    init = backbone.get("init_cfg") or {}
    weights = (
        backbone.pop("pretrained", None)
        or pretrained
        or (init.get("checkpoint") if isinstance(init, dict) else None)
    )
    if not isinstance(weights, str | None):
        raise ConfigError(
            f"model.backbone.pretrained: is {weights!r}, should be the name of weights, a URL, a file or null"
        )
    return Segmentor(
        construct(BACKBONES, backbone, "model.backbone"),
        heads(decode_head, "model.decode_head"),
        heads(auxiliary_head, "model.auxiliary_head"),
        construct(NECKS, neck, "model.neck") if neck else None,
        weights,
    )


# ---------------------------------------------------------------------------------------------------- Weights from files
OPENMMLAB = "https://download.openmmlab.com/"
PRETRAINED = {  # the names that MMSegmentation's configs use
    **{
        name: f"{OPENMMLAB}pretrain/third_party/{file}.pth"
        for name, file in {
            "open-mmlab://resnet18_v1c": "resnet18_v1c-b5776b93",
            "open-mmlab://resnet50_v1c": "resnet50_v1c-2cccc1ad",
            "open-mmlab://resnet101_v1c": "resnet101_v1c-e67eebb6",
            "open-mmlab://resnext50_32x4d": "resnext50-32x4d-0ab1a123",
            "open-mmlab://resnext101_32x4d": "resnext101_32x4d-a5af3160",
            "open-mmlab://resnext101_64x4d": "resnext101_64x4d-ee2c6f71",
            "open-mmlab://msra/hrnetv2_w18_small": "hrnetv2_w18_small-b5a04e21",
            "open-mmlab://msra/hrnetv2_w18": "hrnetv2_w18-00eb2006",
            "open-mmlab://msra/hrnetv2_w48": "hrnetv2_w48-d2186c55",
        }.items()
    },
    "mmcls://mobilenet_v2": f"{OPENMMLAB}mmclassification/v0/mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth",
}


def load_pretrained(model: Segmentor) -> str | None:
    """Loads what the config's `pretrained` names into the backbone and returns a report; None if it names nothing.

    A torchvision weight name (IMAGENET1K_V1, torchvision://resnet50), one of PRETRAINED, a URL or a file. ConfigError if it cannot be had.
    """
    name = model.pretrained
    if name is None:
        return None
    if os.path.exists(name):
        try:
            state = read_weights(name)
        except UserError as error:
            raise ConfigError(
                f"model.backbone.pretrained: {name} cannot be read as weights: {error}"
            ) from None
    else:
        state = fetch(name, model.backbone.torchvision_name)
    state = plain_state(state)
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items()
            if key.startswith("backbone.")
        }
    if any(key.startswith("features.") for key in state):
        state = model.backbone.from_torchvision(state)
    try:
        return f"pretrained {name}: " + load_matching(model.backbone, state)
    except ConfigError as error:
        raise ConfigError(
            f"model.backbone.pretrained: {name}: {error}. Name weights of this backbone, or null"
        ) from None


class Absent:
    """Takes the place of the log that MMEngine keeps in its checkpoints as Python objects, so that the tensors beside it can be read. Does nothing."""

    def __init__(self, *arguments: object, **keywords: object): ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


def read_weights(path: str | os.PathLike) -> dict:
    """The dict in a file, onto the CPU, without running code that may be in it. Raises ValueError with what is wrong."""
    try:
        names = []
        if zipfile.is_zipfile(
            path
        ):  # torch.save writes a CRC-32 of each record, which torch.load does not look at
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"record {damaged} does not match its checksum")
            names = [
                n
                for n in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if re.match(r"(mmengine|numpy)\.|builtins\.getattr$", n)
            ]
        with torch.serialization.safe_globals([(Absent, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise UserError(
                f"it holds a {type(content).__name__}, where a dict of tensors is expected"
            )
        return content
    except Exception as error:  # damage can show anywhere in the reader
        raise UserError(
            re.sub(r"\x1b\[\d+m", "", str(error)).splitlines()[0]
            if str(error)
            else type(error).__name__
        ) from None


def fetch(name: str, net: str | None) -> dict:
    """From torch.hub's cache or the network."""
    url = PRETRAINED.get(name, name)
    if name.startswith("torchvision://") or re.fullmatch(r"IMAGENET1K_\w+|DEFAULT", name):
        import torchvision  # here, because its import takes as long as torch's, whose compiler it brings

        if net not in torchvision.models.list_models():
            raise ConfigError(
                f"model.backbone.pretrained: torchvision has no weights {name} for this backbone"
            )
        if name.startswith("torchvision://") and name != f"torchvision://{net}":
            raise ConfigError(
                f"model.backbone.pretrained: {name} is not of this backbone, which is torchvision://{net}"
            )
        weights, key = (
            torchvision.models.get_model_weights(net).__members__,
            re.sub("^torchvision://.*", "IMAGENET1K_V1", name),
        )
        if key not in weights:
            raise ConfigError(
                f"model.backbone.pretrained: {net} has no weights {name}; {suggest(name, list(weights))}"
            )
        url = weights[key].url
    if not url.startswith(("http://", "https://", "file://")):
        raise ConfigError(
            f"model.backbone.pretrained: {name} is no file, no URL and no name of weights; names are IMAGENET1K_V1, "
            f"{', '.join(PRETRAINED)}"
        )
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # of the network, the address or the file
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise ConfigError(
            f"model.backbone.pretrained: {name} cannot be fetched from {url} ({error}). Fetch it where there is a network "
            f"and put it into {folder}, or name the file: --options model.backbone.pretrained=/path/to/{url.split('/')[-1]}"
        ) from None


def load_weights(model: Segmentor, state: dict) -> str:
    """Loads every tensor of `state` whose name and shape are the model's, and returns a report that names the others.

    `state`: of this code, of MMSegmentation (a checkpoint or its state_dict), or of torchvision's fcn_resnet and deeplabv3_resnet.
    ConfigError if nothing matches.
    """
    state = plain_state(state)
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
    return load_matching(model, state)


def plain_state(state: dict) -> dict[str, Tensor]:
    """The tensors alone, out of a checkpoint's `state_dict`, without a wrapper's `module.`."""
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return {
        key.removeprefix("module."): value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def load_matching(module: nn.Module, state: dict[str, Tensor]) -> str:
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    counted = [
        k for k in own if own[k].is_floating_point()
    ]  # a counter of batches has one shape in every net
    if not any(k in fitting for k in counted):
        raise ConfigError(
            f"none of the {len(state)} tensors fits this net: it has {', '.join(list(own)[:3])}, ..., "
            f"the file {', '.join(list(state)[:3]) or 'none'}, ..."
        )
    module.load_state_dict(fitting, strict=False)

    def listed(title: str, names: list[str]) -> str:
        return (
            f"; {title}: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
            if names
            else ""
        )

    wrong = [
        f"{k} {tuple(v.shape)} in the file, {tuple(own[k].shape)} here"
        for k, v in state.items()
        if k in own and k not in fitting
    ]
    return (
        f"loaded {sum(k in fitting for k in counted)} of {len(counted)} tensors"
        + listed("left out, of another shape", wrong)
        + listed("missing in the file", [k for k in counted if k not in state])
        + listed("in the file alone", [k for k in state if k not in own])
    )
