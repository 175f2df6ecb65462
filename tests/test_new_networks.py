"""Vision transformers, U-Net, PIDNet and their heads: the authors' own numbers and names, sizes,
settings that must not change the numbers, and losses by hand."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import PARITY, checkpoint, failing, parity_normal, parity_tensor, without_dropout
from torch import Tensor, nn

import dist_utils
import models
import train

VITS = ["dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------ Reference numbers


def fill(model: nn.Module, described: dict) -> nn.Module:
    """`model` in float64 with the rule's weights; all its keys and shapes have to match."""
    model = without_dropout(model.double())
    assert sum(p.numel() for p in model.parameters()) == described["parameters"]
    state = {}
    for key, shape, *mark in described["checkpoint"]:
        if key == "rope_embed.periods":
            count = shape[0]
            state[key] = 100 ** (torch.arange(count, dtype=torch.float64) / count)
        elif key.endswith("bias_mask"):
            state[key] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(shape[0] // 3)
        elif mark:
            state[key] = model.state_dict()[key]
        else:
            state[key] = parity_tensor(key, tuple(shape))
        assert list(state[key].shape) == shape
    model.load_state_dict(state, strict=True)
    return model


def reference(name: str) -> tuple[dict, dict]:
    described = json.loads((PARITY / f"{name}.json").read_text())
    return described, dict(np.load(PARITY / f"{name}.npz"))


def gradient_norm(model: nn.Module) -> float:
    norms = [p.grad.norm() for p in model.parameters() if p.requires_grad]
    return torch.stack(norms).norm().item()


def close(x: Tensor, expected: np.ndarray) -> bool:
    atol = 1e-8 * abs(expected).max()
    return x.shape == expected.shape and np.allclose(x.detach(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("arch", VITS)
def test_vit_parity(arch: str):
    described, expected = reference(arch)
    with torch.device("meta"):  # random initial weights would take longer than all the rest
        net = models.VisionTransformer(arch=arch)
    net = fill(net.to_empty(device="cpu"), described).train()
    maps = net(torch.as_tensor(parity_normal("input", (2, 3, *described["size"]))))
    assert net.out_indices == [2, 5, 8, 11]
    assert all(close(x, expected[f"map_{i}"]) for i, x in zip(net.out_indices, maps))
    sum(x.square().mean() for x in maps).backward()
    assert gradient_norm(net) == pytest.approx(float(expected["grad_norm"]), rel=1e-8)


def test_dpt_parity():
    described, expected = reference("dpt_head")
    head = fill(models.construct(models.HEADS, described["head"], "head"), described)
    maps = [torch.as_tensor(parity_normal(f"map{i}", (2, 384, 6, 9))) for i in range(4)]
    assert close(head.eval()(maps)[""], expected["logits"])
    head.train()(maps)[""].square().mean().backward()
    assert gradient_norm(head) == pytest.approx(float(expected["grad_norm"]), rel=1e-8)


def test_dpt_of_depth_anything():
    """Without BN, and with maps of odd sizes, by the formulas of its repository."""
    widths = [4, 6, 8, 10]
    options = {"post_process_channels": widths, "norm": False, "match_sizes": True}
    section = {"in_channels": [12] * 4, "in_index": [0, 1, 2, 3], "channels": 5, "num_classes": 3}
    head = models.DPTHead(**section, **options).double().eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in head.modules())
    maps = [torch.randn(2, 12, 5, 7, dtype=torch.float64) for _ in range(4)]
    weight = dict(head.named_parameters())

    def conv(x: Tensor, name: str, **kwargs) -> Tensor:
        return F.conv2d(x, weight[f"{name}.weight"], weight.get(f"{name}.bias"), **kwargs)

    def unit(x: Tensor, name: str) -> Tensor:
        y = conv(x.relu(), f"{name}.conv1.conv", padding=1)
        return x + conv(y.relu(), f"{name}.conv2.conv", padding=1)

    layers = []
    for i, x in enumerate(maps):
        x = conv(x, f"reassemble_blocks.projects.{i}.conv")
        name = f"reassemble_blocks.resize_layers.{i}"
        if i < 2:
            factor = [4, 2][i]
            kernel, bias = weight[f"{name}.weight"], weight[f"{name}.bias"]
            x = F.conv_transpose2d(x, kernel, bias, stride=factor)
        elif i == 3:
            x = conv(x, name, stride=2, padding=1)
        layers.append(conv(x, f"convs.{i}.conv", padding=1))
    assert [tuple(x.shape[2:]) for x in layers] == [(20, 28), (10, 14), (5, 7), (3, 4)]
    x = layers[3]
    for i in range(4):
        name = f"fusion_blocks.{i}"
        if i > 0:
            x = x + unit(layers[3 - i], f"{name}.res_conv_unit1")
        size = layers[2 - i].shape[2:] if i < 3 else (40, 56)
        x = unit(x, f"{name}.res_conv_unit2")
        x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        x = conv(x, f"{name}.project.conv")
    expected = conv(conv(x, "project.conv", padding=1).relu(), "conv_seg")
    assert torch.allclose(head(maps)[""], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["unet_s5-d16", "pidnet_s"])
def test_segmentor_parity(name: str):
    described, expected = reference(name)
    model = fill(models.build_model(described["model"]), described)
    size = (2, *described["size"])
    image = torch.as_tensor(parity_normal("input", (2, 3, *described["size"])))
    with torch.no_grad():
        assert close(model.eval()(image), expected["logits"])
    if "label" in expected:
        label = torch.as_tensor(expected.pop("label"))
    else:
        label = np.random.default_rng(zlib.crc32(b"labels")).integers(0, model.num_classes, size)
        label[:, :9] = 255
        label = torch.as_tensor(label)
    losses = model.train()(image, label)
    assert set(losses) == set(expected) - {"logits", "loss", "grad_norm"}
    loss = sum(losses.values())
    loss.backward()
    for key, value in {**losses, "loss": loss}.items():
        assert value.item() == pytest.approx(float(expected[key]), rel=1e-8), key
    assert gradient_norm(model) == pytest.approx(float(expected["grad_norm"]), rel=1e-8)


# -------------------------------------------------------------------- Names of the authors' files
def linear(name: str, i: int, o: int) -> dict[str, tuple]:
    return {f"{name}.weight": (o, i), f"{name}.bias": (o,)}


def norm(name: str, c: int) -> dict[str, tuple]:
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def vit_keys(
    c: int,
    depth: int,
    patch: int,
    hidden: int,
    positions: int = 0,
    registers: int = 0,
    mlp: str = "mlp",
    dino: int = 0,
) -> dict[str, tuple]:
    """Keys and shapes of a weight file; `dino`: the version, 0 for timm's plain transformers."""
    keys = {"cls_token": (1, 1, c), **norm("norm", c)}
    keys |= {"patch_embed.proj.weight": (c, 3, patch, patch), "patch_embed.proj.bias": (c,)}
    if positions:
        keys["pos_embed"] = (1, 1 + positions, c)
    if registers:
        keys["storage_tokens" if dino == 3 else "register_tokens"] = (1, registers, c)
    if dino:
        keys["mask_token"] = (1, c)
    if dino == 3:
        keys["rope_embed.periods"] = (16,)
    for i in range(depth):
        block = f"blocks.{i}."
        keys |= norm(block + "norm1", c) | norm(block + "norm2", c)
        keys |= linear(block + "attn.qkv", c, 3 * c) | linear(block + "attn.proj", c, c)
        if dino:
            keys |= {block + "ls1.gamma": (c,), block + "ls2.gamma": (c,)}
        if dino == 3:
            keys[block + "attn.qkv.bias_mask"] = (3 * c,)
        if mlp == "mlp":
            keys |= linear(block + "mlp.fc1", c, hidden) | linear(block + "mlp.fc2", hidden, c)
        elif mlp == "w12":
            keys |= linear(block + "mlp.w12", c, 2 * hidden) | linear(block + "mlp.w3", hidden, c)
        else:
            keys |= linear(block + "mlp.w1", c, hidden) | linear(block + "mlp.w2", c, hidden)
            keys |= linear(block + "mlp.w3", hidden, c)
    return keys


V2 = {"patch": 14, "positions": 37**2, "dino": 2}
V3 = {"patch": 16, "registers": 4, "dino": 3}
FILES = {  # the file's keys, and the millions of parameters that its authors state
    "dinov2_vits14": (vit_keys(384, 12, hidden=1536, **V2), 22.06),
    "dinov2_vitb14": (vit_keys(768, 12, hidden=3072, **V2), 86.58),
    "dinov2_vitl14": (vit_keys(1024, 24, hidden=4096, **V2), 304.37),
    "dinov2_vitg14": (vit_keys(1536, 40, hidden=4096, mlp="w12", **V2), 1136.48),
    "dinov2_vits14_reg": (vit_keys(384, 12, hidden=1536, registers=4, **V2), 22.06),
    "dinov2_vitb14_reg": (vit_keys(768, 12, hidden=3072, registers=4, **V2), 86.58),
    "dinov2_vitl14_reg": (vit_keys(1024, 24, hidden=4096, registers=4, **V2), 304.37),
    "dinov2_vitg14_reg": (vit_keys(1536, 40, hidden=4096, registers=4, mlp="w12", **V2), 1136.49),
    "dinov3_vits16": (vit_keys(384, 12, hidden=1536, **V3), 21.60),
    "dinov3_vits16plus": (vit_keys(384, 12, hidden=1536, mlp="w1", **V3), 28.70),
    "dinov3_vitb16": (vit_keys(768, 12, hidden=3072, **V3), 85.67),
    "dinov3_vitl16": (vit_keys(1024, 24, hidden=4096, **V3), 303.15),
    "dinov3_vitl16plus": (vit_keys(1024, 24, hidden=4096, mlp="w1", **V3), 403.92),
    "dinov3_vith16plus": (vit_keys(1280, 32, hidden=5120, mlp="w1", **V3), 840.63),
}


@pytest.mark.parametrize("arch", models.VisionTransformer.ARCHS)
def test_vit_keys(arch: str):
    keys, millions = FILES[arch]
    with torch.device("meta"):
        net = models.VisionTransformer(arch=arch)
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == keys
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_vit_keys_that_are_left_out():
    """timm's classifier, and what DINOv3's satellite weights have more; a real misfit is told."""
    net = models.VisionTransformer(embed_dim=24, depth=4, num_heads=3)
    keys = vit_keys(24, 4, 16, 96, positions=14**2)
    state = {key: torch.randn(shape) for key, shape in keys.items()}
    net.load_state_dict({**state, "head.weight": torch.zeros(1000, 24), "head.bias": None})
    assert torch.equal(net.blocks[3].mlp.fc2.weight, state["blocks.3.mlp.fc2.weight"])
    net.load_state_dict({**state, **{f"local_cls_norm.{k}": None for k in ("weight", "bias")}})
    with pytest.raises(RuntimeError, match="Unexpected key.*dist_token"):
        net.load_state_dict({**state, "dist_token": torch.zeros(1)})


def test_positions_of_another_image_size():
    """They would stay random."""
    with torch.device("meta"):
        net = models.VisionTransformer(arch="dinov2_vits14", depth=4, img_size=224)
    state = {"pos_embed": torch.zeros(1, 1 + 37**2, 384), "cls_token": torch.zeros(1, 1, 384)}
    with pytest.raises(models.ConfigError, match=r"\(1, 1370, 384\) in the file, .* set img_size"):
        models.load_matching(net, state)


def test_arch_and_keywords():
    """An arch's keywords one by one make the same network, and other keywords override them."""
    with torch.device("meta"):
        by_name = models.VisionTransformer(arch="dinov3_vitb16")
        one_by_one = models.VisionTransformer(**models.VisionTransformer.ARCHS["dinov3_vitb16"])
        overridden = models.VisionTransformer(arch="dinov3_vitb16", depth=4, out_indices=[3])
        version_2 = models.VisionTransformer(arch="dinov2_vits14")
    assert repr(by_name) == repr(one_by_one)
    assert len(overridden.blocks) == 4
    assert version_2.interpolate_offset == 0.1 and not version_2.interpolate_antialias


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"arch": "dinov2_vits16"}, "arch is 'dinov2_vits16'; it can be dinov2_vits14, "),
        ({"ffn_layer": "glu"}, "ffn_layer is 'glu', which can be mlp, swiglu, swiglufused"),
        ({"embed_dim": 100}, "embed_dim 100.* multiple of 4 \\* num_heads, 48"),
        ({"norm_cfg": {"type": "LN", "eps": 1e-6}, "embed_dims": 768}, "did you mean embed_dim"),
        ({"depth": 4, "out_indices": [4]}, "out_indices is \\[4\\].*from 0 to 3"),
        ({"arch": "dinov2_vits14", "patchsize": 8}, "patchsize: .*did you mean patch_size"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate: is '0.1', should be of type float"),
    ],
)
def test_vit_errors(keywords: dict, message: str):
    with torch.device("meta"), pytest.raises(models.ConfigError, match=message):
        models.construct(
            models.BACKBONES, {"type": "VisionTransformer", **keywords}, "model.backbone"
        )


def test_blocks_without_a_map_are_not_trained():
    net = models.VisionTransformer(embed_dim=24, depth=4, num_heads=3, out_indices=[1])
    (x,) = net(torch.randn(1, 3, 32, 48))
    x.sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in net.parameters())
    assert not net.blocks[2].mlp.fc1.weight.requires_grad


# ------------------------------------------------------------------------------------------ Sizes
SMALL_VIT = {"type": "VisionTransformer", "embed_dim": 24, "depth": 4, "num_heads": 3}
SMALL = {
    "ViT": {**SMALL_VIT, "drop_path_rate": 0.3, "init_values": 1.0, "num_register_tokens": 2},
    "RoPE": {
        **SMALL_VIT,
        "drop_path_rate": 0.3,
        "ffn_layer": "swiglu",
        "pos_embed_rope_base": 100.0,
        "mask_k_bias": True,
        "num_register_tokens": 2,
    },
    "UNet": {
        "type": "UNet",
        "base_channels": 4,
        "num_stages": 4,
        "strides": [1, 2, 1, 1],
        "enc_num_convs": [2, 1, 3, 2],
        "dec_num_convs": [2, 1, 3],
        "downsamples": [True, True, False],
        "enc_dilations": [1, 1, 2, 1],
        "dec_dilations": [2, 1, 1],
    },
    "PIDNet": {"type": "PIDNet", "channels": 4, "ppm_channels": 8},
    "PIDNet-L": {
        "type": "PIDNet",
        "channels": 4,
        "ppm_channels": 8,
        "num_stem_blocks": 3,
        "num_branch_blocks": 4,
    },
}
CROSS_ENTROPY = {"type": "CrossEntropyLoss"}
PID_LOSSES = [
    {**CROSS_ENTROPY, "loss_weight": 0.4},
    {"type": "OhemCrossEntropy", "thres": 0.9, "min_kept": 500},
    {"type": "BoundaryLoss", "loss_weight": 20.0},
    {"type": "OhemCrossEntropy", "thres": 0.9, "min_kept": 500},
]


def small(name: str, **backbone) -> models.Segmentor:
    section = {**SMALL[name], **backbone}
    head = {"type": "FCNHead", "channels": 8, "num_convs": 1, "concat_input": False}
    if section["type"] == "PIDNet":
        head = {"type": "PIDHead", "in_channels": 16, "channels": 8, "loss_decode": PID_LOSSES}
    elif section["type"] == "UNet":
        head["in_channels"] = 4
    else:
        head["in_channels"] = 24
    torch.manual_seed(0)
    return models.build_model({"backbone": section, "decode_head": {**head, "num_classes": 5}})


def batch(size: tuple[int, int] = (64, 80)) -> tuple[Tensor, Tensor]:
    """Images and labels of blocks of one class, the first rows ignored."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(5, (2, 1, 4, 5), generator=generator).float()
    label = F.interpolate(label, size).squeeze(1).to(torch.uint8)
    label[:, :5] = 255
    return torch.randn(2, 3, *size, generator=generator), label


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 80), (97, 129), (66, 47)])
def test_any_size(name: str, size: tuple[int, int]):
    model = small(name)
    image, label = batch(size)
    with torch.no_grad():
        maps = model.backbone(image)
        logits = model.eval()(image)
    if "UNet" in name:
        # Stage 1 has a stride of 2, stage 2 a pooling, stage 3 neither.
        half = [-(-side // 2) for side in size]
        shapes = [[32, *(s // 2 for s in half)], [16, *(s // 2 for s in half)], [8, *half]]
        assert [list(x.shape[1:]) for x in maps] == [*shapes, [4, *size]]
    elif "PIDNet" in name:
        eighth = [-(-side // 8) for side in size]
        assert [list(x.shape[1:]) for x in maps] == [[8, *eighth], [16, *eighth], [8, *eighth]]
    else:
        patches = [-(-side // 16) for side in size]
        assert [list(x.shape[1:]) for x in maps] == [[24, *patches]] * 4
    assert logits.shape[2:] == maps[1 if "PIDNet" in name else -1].shape[2:]
    losses = model.train()(image, label)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_padded_maps_are_cropped_to_the_image():
    """A map's value stays at its place in the image, whatever was padded."""
    centers = torch.arange(7) + 0.5  # of 7 patches, of which the image covers 6.25
    cropped = models.crop_map(centers.expand(1, 1, 3, 7), 12, 25, 4)
    expected = (torch.arange(7) + 0.5) * 6.25 / 7
    assert torch.allclose(cropped[0, 0, :, 1:], expected[1:].expand(3, -1))
    x = torch.randn(1, 2, 3, 7)
    assert models.crop_map(x, 12, 28, 4) is x
    assert models.crop_map(x[:, :, :1, :1], 1, 9, 10).shape == (1, 2, 1, 1)


@pytest.mark.parametrize(("offset", "antialias"), [(0.1, False), (0.0, True), (0.0, False)])
@pytest.mark.parametrize("grid", [(6, 9), (20, 11), (14, 14)])
def test_interpolated_positions(grid: tuple[int, int], offset: float, antialias: bool):
    """By matrices as by F.interpolate, in value and gradient."""
    net = models.VisionTransformer(
        embed_dim=8,
        depth=4,
        num_heads=2,
        interpolate_offset=offset,
        interpolate_antialias=antialias,
    ).double()
    learned = net.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    target = {"size": grid}
    if offset and grid != (14, 14):
        target = {"scale_factor": tuple((side + offset) / 14 for side in grid)}
    expected = F.interpolate(learned, mode="bicubic", antialias=antialias, **target)
    expected = expected.flatten(2).transpose(1, 2)
    got = net.positions(*grid)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(got)
    gradients = [torch.autograd.grad(x, net.pos_embed, direction)[0] for x in (got, expected)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------- Settings that must not change the numbers
def gradients(model: nn.Module, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)  # of dropout and stochastic depth
    losses = model(image, label)
    sum(losses.values()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: value.detach() for name, value in losses.items()}


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_nothing(name: str):
    expected = gradients(plain := small(name), *batch())
    got = gradients(checkpointed := small(name, with_cp=True), *batch())
    assert set(expected) == set(got)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    for (key, a), (_, b) in zip(plain.named_buffers(), checkpointed.named_buffers()):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_stores_less(name: str):
    saved = {}
    for with_cp in (False, True):
        seen: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.append(t.numel()) or t, lambda t: t
        ):
            small(name, with_cp=with_cp).backbone(batch()[0])
        saved[with_cp] = sum(seen)
    assert saved[True] < 0.7 * saved[False]


@pytest.mark.parametrize("name", SMALL)
def test_layouts_and_precisions(name: str):
    """bf16 autocast gives nearly the same, channels_last too; the meta device runs it as well."""
    image, label = batch()
    expected = sum(without_dropout(small(name))(image, label).values()).item()
    model = without_dropout(small(name)).to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    assert sum(model(image, label).values()).item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = without_dropout(small(name))(image, label)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert sum(losses.values()).item() == pytest.approx(expected, rel=0.1)
    with torch.device("meta"):
        meta = small(name)
    assert all(v.is_meta for v in gradients(meta, image.to("meta"), label.to("meta")).values())


@pytest.mark.parametrize("name", ["ViT", "RoPE"])
def test_compiled(name: str):
    image, label = batch((64, 72))
    expected = gradients(without_dropout(small(name)), image, label)
    compiled = torch.compile(without_dropout(small(name)), backend="aot_eager")
    got = gradients(compiled, image, label)
    got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
    assert all(torch.allclose(got[k], expected[k], rtol=1e-3, atol=1e-5) for k in expected)


def test_stochastic_depth():
    """Off in evaluation; in training it drops residuals, the more the deeper the block."""
    net = models.VisionTransformer(embed_dim=24, depth=4, num_heads=3, drop_path_rate=0.3)
    assert [block.drop_path.p for block in net.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    image = torch.randn(8, 3, 32, 32)
    assert not torch.equal(net(image)[-1], net(image)[-1])
    net.eval()
    assert torch.equal(net(image)[-1], net(image)[-1])


# ---------------------------------------------------------------------------- Heads, neck, losses
def test_upernet_on_a_vit():
    model = models.build_model(
        {
            "backbone": {**SMALL_VIT, "patch_size": 8, "img_size": 64},
            "neck": {"type": "Feature2Pyramid", "embed_dim": 24, "rescales": [4, 2, 1, 0.5]},
            "decode_head": {
                "type": "UPerHead",
                "in_channels": [24] * 4,
                "in_index": [0, 1, 2, 3],
                "channels": 8,
                "num_classes": 5,
            },
        }
    )
    image, label = batch()
    maps = model.neck(model.backbone(image))
    assert [x.shape[2:] for x in maps] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    assert model(image).shape == (2, 5, 32, 40)
    assert model(image, label)["decode.loss_ce"].isfinite()
    assert [key for key in model.state_dict() if key.startswith("neck") and "weight" in key] == [
        "neck.upsample_4x.0.weight",
        "neck.upsample_4x.1.weight",
        "neck.upsample_4x.3.weight",
        "neck.upsample_2x.0.weight",
    ]


def test_linear_probe():
    """The keys of DINOv2's published heads, dinov2_vitb14_ade20k_linear_head.pth and its like."""
    head = {
        "type": "BNHead",
        "in_channels": [24],
        "in_index": [3],
        "input_transform": "resize_concat",
        "channels": 24,
        "num_classes": 150,
        "dropout_ratio": 0,
        "align_corners": False,
    }
    model = models.build_model({"backbone": SMALL_VIT, "decode_head": head})
    shapes = {key: tuple(value.shape) for key, value in model.decode_head.state_dict().items()}
    assert shapes == {
        "conv_seg.weight": (150, 24, 1, 1),
        "conv_seg.bias": (150,),
        "bn.weight": (24,),
        "bn.bias": (24,),
        "bn.running_mean": (24,),
        "bn.running_var": (24,),
        "bn.num_batches_tracked": (),
    }
    assert model(batch()[0]).shape == (2, 150, 4, 5)
    four = {**head, "in_channels": [24] * 4, "in_index": [0, 1, 2, 3], "channels": 96}
    assert (
        models.build_model({"backbone": SMALL_VIT, "decode_head": four})(batch()[0])
        .isfinite()
        .all()
    )
    with pytest.raises(models.ConfigError, match="channels is 24; it has to be 96"):
        models.build_model({"backbone": SMALL_VIT, "decode_head": {**four, "channels": 24}})


DPT = {
    "type": "DPTHead",
    "in_channels": [24] * 4,
    "in_index": [0, 1, 2, 3],
    "input_transform": "multiple_select",
    "channels": 8,
    "embed_dims": 24,
    "post_process_channels": [4, 8, 12, 16],
    "num_classes": 5,
    "readout_type": "ignore",
}


def test_dpt_on_a_vit():
    model = models.build_model({"backbone": SMALL_VIT, "decode_head": DPT})
    image, label = batch((64, 76))
    assert model(image).shape == (2, 5, 32, 48)
    losses = model(image, label)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"readout_type": "project"}, "readout_type: is 'project'; .* always 'ignore'"),
        ({"embed_dims": 32}, "in_channels is .*, but embed_dims is 32"),
        ({"post_process_channels": [4, 8]}, "need four values each"),
    ],
)
def test_dpt_errors(change: dict, message: str):
    with pytest.raises(models.ConfigError, match=message):
        models.build_model({"backbone": SMALL_VIT, "decode_head": {**DPT, **change}})


def generate_edge(label: np.ndarray, width: int) -> np.ndarray:
    """MMSegmentation's edges, pixel by pixel: a difference to the neighbor above, right, lower
    right or lower left; then a rectangle from width // 2 before to what is left after it."""
    h, w = label.shape
    thin = np.zeros((h, w))
    for y in range(h):
        for x in range(w):
            for v, u in ((y - 1, x), (y, x + 1), (y + 1, x + 1), (y + 1, x - 1)):
                if 0 <= v < h and 0 <= u < w and 255 not in (label[y, x], label[v, u]):
                    thin[y, x] = max(thin[y, x], label[y, x] != label[v, u])
    edges = np.zeros((h, w))
    for y in range(h):
        for x in range(w):
            top, left = max(0, y - width // 2), max(0, x - width // 2)
            bottom, right = y + (width + 1) // 2, x + (width + 1) // 2
            edges[y, x] = thin[top:bottom, left:right].max()
    return edges


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_label_edges(width: int, dtype: torch.dtype):
    label = torch.randint(2, (2, 3, 4)).repeat_interleave(9, 1).repeat_interleave(7, 2)
    label[0, 5:15, 10:] = 255
    expected = np.stack([generate_edge(y, width) for y in label.numpy()])
    got = models.label_edges(label.to(dtype), width)
    assert np.array_equal(got.numpy(), expected)
    assert 0 < expected.mean() < 1


def pid_inputs() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    label = torch.randint(4, (3, 17, 23), dtype=torch.uint8)
    label[:, :4] = 255
    full = F.interpolate(logits, (17, 23), mode="bilinear", align_corners=True)
    return logits, full, label


@pytest.mark.parametrize("chunk", [1, 2**25])
@pytest.mark.parametrize(("thres", "min_kept"), [(0.3, 9), (0.05, 300), (0.9, 10**6)])
def test_ohem_cross_entropy_by_hand(thres: float, min_kept: int, chunk: int, monkeypatch):
    monkeypatch.setattr(models, "CHUNK", chunk)
    logits, full, label = pid_inputs()
    factors = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    criterion = models.OhemCrossEntropy(
        thres=thres, min_kept=min_kept, class_weight=factors.tolist(), loss_weight=0.5
    )
    valid = label != 255
    scores = full.permute(0, 2, 3, 1)[valid]  # (P, 4)
    own_class = label[valid].long()
    probability = scores.softmax(1).gather(1, own_class[:, None]).squeeze(1)
    kth = probability.sort().values[min(min_kept, len(probability) - 1)]
    hard = probability < kth.clamp(min=thres)
    expected = F.cross_entropy(scores, own_class, factors, reduction="none")[hard].mean() / 2
    got = criterion(logits, label, True)
    assert got.item() == pytest.approx(expected.item(), rel=1e-10)
    pair = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, expected)]
    assert torch.allclose(*pair, rtol=1e-9, atol=1e-14)


def test_ohem_cross_entropy_of_ignored_pixels():
    logits, _, label = pid_inputs()
    loss = models.OhemCrossEntropy()(logits, torch.full_like(label, 255))
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()


@pytest.mark.parametrize("chunk", [1, 2**25])
def test_boundary_loss_by_hand(chunk: int, monkeypatch):
    monkeypatch.setattr(models, "CHUNK", chunk)
    logits, full, label = pid_inputs()
    edges = models.label_edges(label, 2)
    positive = edges == 1
    weight = torch.where(positive, (~positive).double().mean(), positive.double().mean())
    expected = F.binary_cross_entropy_with_logits(full[:, :1].squeeze(1), edges.double(), weight)
    got = models.BoundaryLoss(loss_weight=20.0)(logits[:, :1], edges, True)
    assert got.item() == pytest.approx(20 * expected.item(), rel=1e-6)
    pair = [torch.autograd.grad(x, logits)[0] for x in (got, 20 * expected)]
    assert torch.allclose(*pair, rtol=1e-6)


@pytest.mark.parametrize("loss_weight", [0.3, 0.7, 20.0])
def test_loss_weight_multiplies_the_mean(loss_weight: float):
    """In this order, as in MMSegmentation, so that float32 is rounded in the same way."""
    logits, _, label = pid_inputs()
    logits = logits[:, :1].float()
    edges = models.label_edges(label, 2)
    mean = models.BoundaryLoss()(logits, edges)
    assert models.BoundaryLoss(loss_weight=loss_weight)(logits, edges) == loss_weight * mean


LOSSES_OVER_PROCESSES = [
    lambda logits, label: models.OhemCrossEntropy(thres=0.3, min_kept=1)(logits, label),
    lambda logits, label: models.BoundaryLoss()(logits[:, :1], models.label_edges(label, 3)),
]


def rank_of_two(rank: int, path: str, expected: Tensor) -> None:
    """Half of the batch each; the average of the gradients is the whole batch's."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    logits, _, label = pid_inputs()
    half = logits.detach()[rank : rank + 1].requires_grad_()
    for loss in LOSSES_OVER_PROCESSES:
        loss(half, label[rank : rank + 1]).backward()
    assert torch.allclose(half.grad / 2, expected[rank : rank + 1], rtol=1e-6)
    dist.destroy_process_group()


def test_divisors_over_processes(tmp_path: Path):
    logits, _, label = pid_inputs()
    pair = logits.detach()[:2].requires_grad_()
    for loss in LOSSES_OVER_PROCESSES:
        loss(pair, label[:2]).backward()
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path / "store"), pair.grad), nprocs=2)


def test_pid_head_at_ignored_pixels_with_class_weights():
    """Labels 255 and class weights, where MMSegmentation's own loss fails."""
    weights = {"class_weight": [0.8, 0.9, 1.0, 1.1, 1.2]}
    losses = [loss if "Boundary" in loss["type"] else {**loss, **weights} for loss in PID_LOSSES]
    head = {"type": "PIDHead", "in_channels": 16, "channels": 8, "num_classes": 5}
    model = models.build_model(
        {"backbone": SMALL["PIDNet"], "decode_head": {**head, "loss_decode": losses}}
    )
    image, label = batch()
    found = model(image, label)
    names = ["loss_sem_p", "loss_sem_i", "loss_bd", "loss_sem_bd"]
    assert list(found) == [f"decode.{name}" for name in names]
    sum(found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        everything_ignored = model(image, torch.full_like(label, 255))
    assert all(value == 0 for value in everything_ignored.values())
    with pytest.raises(models.ConfigError, match="loss_decode needs four losses, not 1"):
        models.build_model({"backbone": SMALL["PIDNet"], "decode_head": head})


# ----------------------------------------------------------- Model sections that are published
SYNC_BN = {"type": "SyncBN", "requires_grad": True}
CITYSCAPES_WEIGHTS = [0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023]
CITYSCAPES_WEIGHTS += [0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507]
OHEM = {
    "type": "OhemCrossEntropy",
    "thres": 0.9,
    "min_kept": 131072,
    "class_weight": CITYSCAPES_WEIGHTS,
    "loss_weight": 1.0,
}


def pidnet_section(channels: int, head_channels: int, **backbone) -> dict:
    """MMSegmentation's pidnet-s, -m and -l for Cityscapes."""
    common = {"norm_cfg": SYNC_BN, "act_cfg": {"type": "ReLU", "inplace": True}}
    first = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 0.4}
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "size": [1024, 1024]},
        "backbone": {
            "type": "PIDNet",
            "in_channels": 3,
            "channels": channels,
            "ppm_channels": 96,
            "num_stem_blocks": 2,
            "num_branch_blocks": 3,
            "align_corners": False,
            "init_cfg": {"type": "Pretrained", "checkpoint": "https://example.org/pidnet.pth"},
            **common,
            **backbone,
        },
        "decode_head": {
            "type": "PIDHead",
            "in_channels": 4 * channels,
            "channels": head_channels,
            "num_classes": 19,
            "align_corners": True,
            "loss_decode": [
                {**first, "class_weight": CITYSCAPES_WEIGHTS},
                OHEM,
                {"type": "BoundaryLoss", "loss_weight": 20.0},
                OHEM,
            ],
            **common,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }


def unet_section(head: dict) -> dict:
    """MMSegmentation's unet-s5-d16 for STARE."""
    common = {
        "num_classes": 2,
        "dropout_ratio": 0.1,
        "norm_cfg": SYNC_BN,
        "align_corners": False,
    }
    return {
        "type": "EncoderDecoder",
        "pretrained": None,
        "backbone": {
            "type": "UNet",
            "in_channels": 3,
            "base_channels": 64,
            "num_stages": 5,
            "strides": [1, 1, 1, 1, 1],
            "enc_num_convs": [2, 2, 2, 2, 2],
            "dec_num_convs": [2, 2, 2, 2],
            "downsamples": [True, True, True, True],
            "enc_dilations": [1, 1, 1, 1, 1],
            "dec_dilations": [1, 1, 1, 1],
            "with_cp": False,
            "conv_cfg": None,
            "norm_cfg": SYNC_BN,
            "act_cfg": {"type": "ReLU"},
            "upsample_cfg": {"type": "InterpConv"},
            "norm_eval": False,
        },
        "decode_head": {"in_channels": 64, "in_index": 4, **common, **head},
        "auxiliary_head": {
            "type": "FCNHead",
            "in_channels": 128,
            "in_index": 3,
            "channels": 64,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4},
            **common,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "slide", "crop_size": [128, 128], "stride": [85, 85]},
    }


CE_AND_DICE = [
    {"type": "CrossEntropyLoss", "loss_name": "loss_ce", "loss_weight": 1.0},
    {"type": "DiceLoss", "loss_name": "loss_dice", "loss_weight": 3.0},
]
FCN = {"type": "FCNHead", "channels": 64, "num_convs": 1, "concat_input": False}
SECTIONS = {  # the section, and the millions of parameters
    "pidnet-s": (pidnet_section(32, 128), 7.72),
    "pidnet-m": (pidnet_section(64, 128), 28.76),
    "pidnet-l": (
        pidnet_section(64, 256, ppm_channels=112, num_stem_blocks=3, num_branch_blocks=4),
        37.31,
    ),
    "unet_fcn": (unet_section({**FCN, "loss_decode": CE_AND_DICE}), 29.06),
    "unet_pspnet": (unet_section({"type": "PSPHead", "channels": 16}), 29.05),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_published_sections(name: str):
    section, millions = SECTIONS[name]
    before = json.dumps(section)
    with torch.device("meta"):
        model = models.build_model(section)
        losses = model(torch.zeros(2, 3, 128, 128), torch.zeros(2, 128, 128, dtype=torch.uint8))
    assert json.dumps(section) == before
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert ("decode.loss_bd" in losses) == name.startswith("pidnet")


def test_unet_errors():
    with pytest.raises(models.ConfigError, match="num_stages is 4; strides, .* need as many"):
        models.construct(models.BACKBONES, {"type": "UNet", "num_stages": 4}, "model.backbone")
    section = {"type": "UNet", "upsample_cfg": {"type": "DeconvModule"}}
    with pytest.raises(models.ConfigError, match="upsample_cfg: is .*DeconvModule"):
        models.construct(models.BACKBONES, section, "model.backbone")


# ------------------------------------------------------------- Networks of timm and of torchvision
SWIN = {"depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 2, 4, 8]}
TIMM = [
    ({"name": "test_convnext", "in_channels": 4, "with_cp": True}, [1, 2, 4]),
    ({"name": "test_efficientnet", "out_indices": [1, 4], "drop_path_rate": 0.2}, [5]),
    ({"name": "swin_tiny_patch4_window7_224", "options": SWIN}, [1, 2]),
    ({"name": "test_vit", "options": {"dynamic_img_size": True}}, [1, 5, 6]),
]


@pytest.mark.optional("timm")
@pytest.mark.parametrize("keywords,distances", TIMM, ids=lambda x: str(x)[:36])
def test_timm_backbone(keywords: dict, distances: list[int]):
    """Maps are timm's, N x C x H x W; the whole network's weights load; every weight is used."""
    net = models.construct(models.BACKBONES, {"type": "TimmBackbone", **keywords}, "backbone")
    whole = net.create()
    report = models.load_matching(net, net.from_published(whole.state_dict()))
    assert "missing" not in report, report
    image = torch.randn(2, net.in_channels, 224, 224)
    with torch.no_grad():
        maps = net.eval()(image)
        expected = whole.eval().forward_intermediates(image, intermediates_only=True)
    assert [x.shape[1] for x in maps] == net.channels
    assert [224 // x.shape[2] for x in maps] == net.strides
    for x in maps:
        same_size = [y for y in expected if y.shape == x.shape]
        assert any(torch.allclose(x, y, atol=1e-5) for y in same_size)
    sum(x.square().mean() for x in net.train()(image)).backward()
    assert all(p.grad is not None for p in net.parameters())
    found = net.layer_distances()
    assert found.keys() == dict(net.named_parameters()).keys()
    assert set(distances) <= set(found.values())


@pytest.mark.optional("timm")
def test_timm_network_of_one_image_size(tiny):
    """A crop of another size is an error, a validation with other images a warning."""
    tiny["model"].pop("auxiliary_head")
    vit = {"depth": 3, "embed_dim": 24, "num_heads": 3, "img_size": [64, 96]}
    section = {"type": "TimmBackbone", "name": "vit_tiny_patch16_224", "options": vit}
    tiny["model"]["backbone"] = section
    tiny["model"]["decode_head"] |= {"in_channels": 24, "in_index": -1}
    with pytest.raises(models.ConfigError, match=r"fails on a crop of .* doesn't match model"):
        train.check_network(train.make_config(tiny, ["data.crop_size=[64, 64]"], "tiny"))
    options = ["data.crop_size=[64, 96]"]
    (warning,) = train.check_network(train.make_config(tiny, options, "tiny"))
    assert "set evaluation.mode=slide, evaluation.crop_size=[64, 96]" in warning
    vit["dynamic_img_size"] = True
    assert train.check_network(train.make_config(tiny, options, "tiny")) == []


@pytest.mark.optional("timm")
def test_timm_network_whose_maps_are_caught_by_hooks():
    section = {"type": "TimmBackbone", "name": "pit_ti_224"}
    net = models.construct(models.BACKBONES, section, "backbone")
    state = net.create().state_dict()
    assert "missing" not in models.load_matching(net, net.from_published(state))


@pytest.mark.optional("timm")
def test_timm_batch_norm_is_synchronized_with_its_activation():
    section = {"type": "TimmBackbone", "name": "test_efficientnet"}
    net = models.construct(models.BACKBONES, section, "backbone")
    image = torch.randn(2, 3, 64, 64)
    names = list(net.state_dict())
    with torch.no_grad():
        expected = net.eval()(image)
        found = dist_utils.convert_sync_batchnorm(net)(image)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))
    assert list(net.state_dict()) == names


@pytest.mark.optional("timm")
def test_timm_trains_on_two_processes(tiny, run):
    """With an average and layer decay; "timm" asks timm for weights, which a test network lacks."""
    tiny["model"].pop("auxiliary_head")
    tiny["model"]["backbone"] = {"type": "TimmBackbone", "name": "test_resnet"}
    tiny["model"]["decode_head"] |= {"in_channels": 96, "in_index": -1}
    tiny["optimizer"]["paramwise"] = {"layer_decay": 0.8}
    tiny["ema_decay"] = 0.9
    run(tiny, world_size=2)
    assert checkpoint(tiny)["iteration"] == 6
    tiny["work_dir"] += "2"
    tiny["model"]["backbone"] |= {"name": "resnet10t.untrained", "pretrained": "timm"}
    assert "model.backbone" in failing(run, tiny)


TORCHVISION = [
    ("mobilenet_v3_small", {"features.1": "fine", "features.12": "coarse"}, [16, 576], [4, 32]),
    ("swin_t", ["features.1", "features.3"], [96, 192], [4, 8]),
]


@pytest.mark.parametrize("name,nodes,channels,strides", TORCHVISION)
def test_torchvision_backbone(name: str, nodes, channels: list[int], strides: list[int]):
    section = {"type": "TorchvisionBackbone", "name": name, "return_nodes": nodes}
    net = models.construct(models.BACKBONES, section, "backbone")
    assert net.channels == channels
    assert net.strides == strides
    whole = torchvision.models.get_model(name, weights=None)
    report = models.load_matching(net, net.from_published(whole.state_dict()))
    assert "missing" not in report, report
    image = torch.randn(2, 3, 64, 96)
    layers = [whole.features[int(node.split(".")[1])] for node in nodes]
    expected = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: expected.append(output))
    with torch.no_grad():
        whole.eval()(image)
        maps = net.eval()(image)
    for x, y, count in zip(maps, expected, channels):
        assert x.shape[1] == count
        assert torch.equal(x, y if name != "swin_t" else y.permute(0, 3, 1, 2))
    sum(x.square().mean() for x in net.train()(image)).backward()
    assert all(p.grad is not None for p in net.parameters())


TORCHVISION_MAPS = [
    ("efficientnet_b3", "features.2", 32, 4),  # 32 x 64 x 128 for 256 x 512 pixels
    ("regnet_y_400mf", "trunk_output.block2", 104, 8),  # cannot be built on the meta device
]


@pytest.mark.parametrize("name,node,channels,stride", TORCHVISION_MAPS)
def test_channels_of_torchvision_backbone(name: str, node: str, channels: int, stride: int):
    section = {"type": "TorchvisionBackbone", "name": name, "return_nodes": [node]}
    net = models.construct(models.BACKBONES, section, "backbone")
    assert (net.channels, net.strides) == ([channels], [stride])
    with torch.no_grad():
        (x,) = net(torch.zeros(2, 3, 224, 224))
    assert x.shape == (2, channels, 224 // stride, 224 // stride)


@pytest.mark.parametrize(
    "section,message",
    [
        ({"name": "mobilenet_v9"}, "mobilenet_v2"),
        ({"name": "fcn_resnet50"}, "did you mean .*resnet50"),  # would download other weights
        ({"name": "resnet18", "return_nodes": ["fc"]}, "not a feature map"),
        ({"name": "resnet18", "return_nodes": ["layer7"]}, "layer7"),
        ({"name": "resnet18", "in_channels": 4}, "no such keyword"),
    ],
)
def test_errors_of_torchvision_backbone(section: dict, message: str):
    section = {"type": "TorchvisionBackbone", "return_nodes": ["layer1"], **section}
    with pytest.raises(models.ConfigError, match=message):
        models.construct(models.BACKBONES, section, "backbone")


@pytest.mark.optional("timm")
@pytest.mark.parametrize(
    "section,message",
    [
        ({"name": "convnext_tinny"}, "convnext_tiny"),
        ({"name": "zzz"}, r"it can be: (\w+, ){100}\.\.\.$"),
        (
            {"name": "test_resnet", "out_indices": [7]},
            "cannot be built of these values",
        ),
        ({"name": "test_resnet", "options": {"depht": 1}}, "depht"),
    ],
)
def test_errors_of_timm_backbone(section: dict, message: str):
    with pytest.raises(models.ConfigError, match=message):
        models.construct(models.BACKBONES, {"type": "TimmBackbone", **section}, "backbone")


@pytest.mark.optional("timm")
def test_timm_without_its_weights(tmp_path: Path):
    """As without network access."""
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "absent.pth")}}
    section = {"type": "TimmBackbone", "name": "test_resnet", "options": options}
    net = models.construct(models.BACKBONES, section, "backbone")
    with pytest.raises(models.UserError, match="name the file in place of timm"):
        net.published_weights("timm")
