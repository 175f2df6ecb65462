"""The converter of MMSegmentation's configs, on dumps of published ones in tests/zoo."""

import copy
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import data
import models
import train
from dist_utils import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "configs"))

import from_mmseg

ZOO = Path(__file__).resolve().parent / "zoo"
PSP = "pspnet_r101-d8_4xb4-160k_coco-stuff164k-512x512"
SWIN = "swin-large-patch4-window12-in22k-384x384-pre_upernet_8xb2-160k_ade20k-512x512"
OHEM = "deeplabv3plus_r101-d16-mg124_4xb2-40k_cityscapes-512x1024"
OCR = "ocrnet_hr18_4xb4-20k_voc12aug-512x512"
SLIDE = "nonlocal_r101-d8_4xb2-80k_cityscapes-769x769"
CONTEXT = "deeplabv3_r50-d8_4xb4-40k_pascal-context-59-480x480"
UNET = "unet-s5-d16_fcn_4xb4-ce-1.0-dice-3.0-40k_stare-128x128"
CONVNEXT = "convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512"
PIDNET = "pidnet-s_2xb6-120k_1024x1024-cityscapes"

# name: data.type, batch_size, max_iters, crop_size, scale, lr, classes of the last head
PUBLISHED = {
    PSP: ("coco_stuff", 16, 160000, [512, 512], [2048, 512], 0.01, 171),
    SWIN: ("ade20k", 16, 160000, [512, 512], [2048, 512], 6e-5, 150),
    OHEM: ("cityscapes", 8, 40000, [512, 1024], [2048, 1024], 0.01, 19),
    OCR: ("voc_aug", 16, 20000, [512, 512], [2048, 512], 0.01, 21),
    SLIDE: ("cityscapes", 8, 80000, [769, 769], [2049, 1025], 0.01, 19),
    CONTEXT: ("pascal_context_59", 16, 40000, [480, 480], [520, 520], 0.004, 59),
    UNET: ("stare", 16, 40000, [128, 128], [605, 700], 0.01, 2),
    CONVNEXT: ("ade20k", 16, 160000, [512, 512], [2048, 512], 1e-4, 150),
    PIDNET: ("cityscapes", 12, 120000, [1024, 1024], [2048, 1024], 0.01, 19),
}
GPUS = {name: int(re.search(r"(\d+)xb\d", name)[1]) for name in PUBLISHED}


def dumped(name: str) -> dict:
    return json.loads((ZOO / f"{name}.json").read_text())


def convert(config: dict, gpus: int = 4) -> tuple[dict, str]:
    """The converted config and all notes."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        converted = from_mmseg.convert(config, gpus)
    return converted, "\n".join(str(note.message) for note in notes)


def load(converted: dict, folder: Path) -> dict | None:
    """train.load_config's answer; None if the network or the data set is not there yet."""
    backbone = converted["model"]["backbone"]["type"]
    if backbone not in models.BACKBONES or converted["data"]["type"] not in data.DATASETS:
        return None
    path = folder / "converted.json"
    path.write_text(json.dumps(converted))
    return train.load_config(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str, tmp_path: Path) -> None:
    published = dumped(name)
    before = copy.deepcopy(published)
    converted, _ = convert(published, GPUS[name])
    assert published == before
    section, schedule = converted["data"], converted["schedule"]
    head = converted["model"]["decode_head"]
    head = head[-1] if isinstance(head, list) else head
    assert PUBLISHED[name] == (
        section["type"],
        section["batch_size"],
        schedule["max_iters"],
        section["crop_size"],
        section["scale"],
        converted["optimizer"]["lr"],
        head["num_classes"],
    )
    assert (section["ratio_range"], section["cat_max_ratio"]) == ([0.5, 2.0], 0.75)
    assert (section["flip"], section["photometric"]) == (0.5, True)
    assert (section["mean"][0], section["std"][0]) == (123.675, 58.395)
    assert converted["evaluation"]["scale"] == section["scale"]
    assert converted["evaluation"]["interval"] == schedule["max_iters"] // 10
    assert converted["checkpoint"] == {"interval": schedule["max_iters"] // 10, "keep": 10}
    assert converted["precision"] == ("fp16" if name == CONVNEXT else "fp32")
    assert converted["clip_grad"] is None
    for place in ("decode_head", "auxiliary_head", "neck"):  # as published
        assert converted["model"].get(place) == published["model"].get(place)
    load(converted, tmp_path)


def test_details() -> None:
    swin, notes = convert(dumped(SWIN), 8)
    assert notes == ""
    assert swin["model"]["backbone"]["pretrained"].endswith("384_22k_20220412-6580f57d.pth")
    assert "init_cfg" not in swin["model"]["backbone"] and "test_cfg" not in swin["model"]
    norm = {"decay_mult": 0.0}
    keys = ("absolute_pos_embed", "norm", "relative_position_bias_table")
    assert swin["optimizer"]["paramwise"] == dict.fromkeys(keys, norm)
    warmup = {"warmup": "linear", "warmup_iters": 1500, "warmup_ratio": 1e-6}
    assert swin["schedule"] == {"max_iters": 160000, "power": 1.0, "min_lr": 0.0} | warmup
    assert swin["evaluation"]["mode"] == "whole"
    slide, _ = convert(dumped(SLIDE))
    windows = {"mode": "slide", "crop_size": [769, 769], "stride": [513, 513]}
    assert slide["evaluation"].items() >= windows.items()
    assert slide["model"]["backbone"]["pretrained"] == "open-mmlab://resnet101_v1c"
    _, notes = convert(dumped(OCR))
    assert notes.startswith("Pad: ") and "\n" not in notes
    assert convert(dumped(PIDNET), 2)[0]["seed"] == 304


def test_coco_stuff_10k_is_a_folder(tmp_path: Path) -> None:
    config = dumped(PSP)
    for loader, split in (("train_dataloader", "train2014"), ("val_dataloader", "test2014")):
        dataset = config[loader]["dataset"]
        prefix = {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}
        dataset |= {"data_prefix": prefix, "reduce_zero_label": True}
        dataset["pipeline"][1 if loader == "train_dataloader" else 2]["reduce_zero_label"] = True
    converted, _ = convert(config)
    section = load(converted, tmp_path)["data"]
    assert (section["type"], len(section["classes"])) == ("folder", 171)
    assert (section["train_split"], section["val_split"]) == ("train2014", "test2014")
    assert section["reduce_zero_label"] is True


def test_several_data_sets(tmp_path: Path) -> None:
    config = dumped(OHEM)
    usual = convert(dumped(OHEM))[0]["data"]
    loader = config["train_dataloader"]
    city = loader["dataset"]
    bdd = copy.deepcopy(city) | {"type": "BDD100KDataset", "data_root": "data/bdd100k"}
    prefix = {"img_path": "images/10k/train", "seg_map_path": "labels/sem_seg/masks/train"}
    bdd["data_prefix"] = prefix
    loader["dataset"] = {"type": "ConcatDataset", "datasets": [city, bdd]}
    section = load(convert(copy.deepcopy(config))[0], tmp_path)["data"]
    assert section["datasets"] == [
        {"type": "cityscapes", "root": usual["root"]},
        {"type": "bdd100k", "root": "data/bdd100k", "splits": {"val": None}},
    ]
    assert section["type"] == "concat"
    assert section["scale"] == usual["scale"]
    for text, part in {
        "pipeline.3.cat_max_ratio = 0.9": "pipeline is not that of",
        'img_suffix = ".bmp"': "datasets.1.img_suffix",
        'type = "MyDataset"': "MyDataset; expected one of",
    }.items():
        with pytest.raises(UserError, match=part):
            convert(change(copy.deepcopy(config), f"train_dataloader.dataset.datasets.1.{text}"))
    repeated = {"type": "RepeatDataset", "times": 3, "dataset": bdd}
    loader["dataset"]["datasets"][1] = repeated
    with pytest.raises(UserError, match="repeats a data set"):
        convert(config)


def test_amp_clip_and_accumulation(tmp_path: Path) -> None:
    config = dumped(SWIN)
    config["optim_wrapper"] |= {
        "type": "AmpOptimWrapper",
        "loss_scale": "dynamic",
        "clip_grad": {"max_norm": 1.0, "norm_type": 2},
        "accumulative_counts": 2,
    }
    converted = load(convert(config, 8)[0], tmp_path)
    assert (converted["precision"], converted["clip_grad"]) == ("fp16", 1.0)
    # MMEngine's iterations are forward passes: half as many updates of twice the batch.
    assert (converted["data"]["batch_size"], converted["data"]["accumulate"]) == (32, 2)
    schedule, evaluation = converted["schedule"], converted["evaluation"]
    assert (schedule["max_iters"], schedule["warmup_iters"]) == (80000, 750)
    assert (evaluation["interval"], converted["checkpoint"]["interval"]) == (8000, 8000)
    assert converted["log"]["interval"] == 25
    config["optim_wrapper"]["dtype"] = "bfloat16"
    assert convert(config, 8)[0]["precision"] == "bf16"


def test_paramwise_groups(tmp_path: Path) -> None:
    """Multipliers of the parameters as MMEngine's DefaultOptimWrapperConstructor sets them."""
    config = dumped(OHEM)
    config["optim_wrapper"]["paramwise_cfg"] = {
        "custom_keys": {"head": {"lr_mult": 10.0}, "stem": {"lr_mult": 0.1, "decay_mult": 0.0}},
        "norm_decay_mult": 0.0,
        "bias_lr_mult": 2.0,
    }
    converted = load(convert(config)[0], tmp_path)
    with torch.device("meta"):
        model = models.build_model(converted["model"])
    optimizer = train.build_optimizer(model, **converted["optimizer"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert seen["decode_head.conv_seg.bias"] == pytest.approx((0.1, 5e-4))
    assert seen["backbone.stem.0.weight"] == pytest.approx((0.001, 0.0))
    assert seen["backbone.layer1.0.bn1.weight"] == pytest.approx((0.01, 0.0))
    assert seen["backbone.layer1.0.conv1.weight"] == pytest.approx((0.01, 5e-4))


def convnext_layer(name: str, num_layers: int) -> int:
    """MMSegmentation's get_layer_id_for_convnext."""
    part, stage, block = [*name.removeprefix("backbone.").split("."), "0"][:3]
    if part == "downsample_layers":
        return [0, 2, 3, num_layers][int(stage)]
    if part == "stages":
        return [1, 2, 3 + int(block) // 3, num_layers][int(stage)]
    return num_layers + 1


def convnext_stage(name: str, num_layers: int) -> int:
    """MMSegmentation's get_stage_id_for_convnext."""
    part, stage = name.removeprefix("backbone.").split(".")[:2]
    if part == "downsample_layers":
        return 0
    return int(stage) + 1 if part == "stages" else num_layers + 1


@pytest.mark.parametrize(
    ("arch", "num_layers", "decay_type"),
    [("tiny", 6, "stage_wise"), ("small", 12, "stage_wise"), ("tiny", 6, "layer_wise")],
)
def test_layer_decay_of_convnext(arch: str, num_layers: int, decay_type: str) -> None:
    """Rates and decays of all parameters as LearningRateDecayOptimizerConstructor sets them."""
    config = change(dumped(CONVNEXT), f'model.backbone.arch = "{arch}"')
    paramwise = config["optim_wrapper"]["paramwise_cfg"]
    paramwise |= {"num_layers": num_layers, "decay_type": decay_type}
    converted, notes = convert(config, 8)
    assert notes == ""
    with torch.device("meta"):
        model = models.build_model(converted["model"])
    optimizer = train.build_optimizer(model, **converted["optimizer"])
    number = convnext_stage if decay_type == "stage_wise" else convnext_layer
    expected = {}
    for name, parameter in model.named_parameters():
        rate = 1e-4 * 0.9 ** (num_layers + 2 - number(name, num_layers) - 1)
        is_decayed = parameter.dim() > 1 and not name.endswith(".bias")
        expected[id(parameter)] = pytest.approx((rate, 0.05 if is_decayed else 0.0)), name
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates, name = expected.pop(id(parameter))
            assert (group["lr"], group["weight_decay"]) == rates, name
    assert not expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim_wrapper.paramwise_cfg.num_layers = 12", "num_layers is 12.*what 6 means"),
        ("optim_wrapper.paramwise_cfg.decay_rate = null", "decay_rate is missing"),
        ('model.backbone.type = "ResNet"', "not for ResNet of arch tiny"),
        ('model.backbone.arch = {"depths": [3, 3, 9, 3]}', "not for ConvNeXt of arch"),
    ],
)
def test_layer_decay_that_cannot_be_translated(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(change(dumped(CONVNEXT), text), 8)


def mmengine_rates(schedulers: list[dict], base_lr: float, iterations: int) -> list[float]:
    """The learning rate of each iteration by MMEngine's chained recursions, _get_value()."""
    lr, rates = base_lr, []
    for iteration in range(iterations):
        for scheduler in schedulers:
            begin, end = scheduler["begin"], scheduler["end"]
            step, total = iteration - begin, end - begin - 1
            if not begin <= iteration < end:
                continue
            if scheduler["type"] == "LinearLR":
                start = scheduler["start_factor"]
                if step == 0:
                    lr *= start
                else:
                    lr *= 1 + (1 - start) / (total * start + (step - 1) * (1 - start))
            elif scheduler["type"] == "MultiStepLR":
                if step in scheduler["milestones"]:
                    lr *= scheduler["gamma"]
            elif step:
                factor = (1 - 1 / (total - step + 1)) ** scheduler["power"]
                lr = (lr - scheduler["eta_min"]) * factor + scheduler["eta_min"]
        rates.append(lr)
    return rates


@pytest.mark.parametrize(
    ("warmup", "power", "eta_min"), [(0, 0.9, 1e-4), (0, 1.0, 0.0), (15, 1.0, 0.0), (10, 0.9, 1e-4)]
)
def test_learning_rates_are_those_of_mmengine(warmup: int, power: float, eta_min: float) -> None:
    """Exact but for the last iteration of ramps, and for the part of the decay in the warm-up."""
    iters, base_lr = 1600, 0.01
    poly = {"type": "PolyLR", "begin": warmup, "end": iters, "by_epoch": False}
    schedulers = [poly | {"power": power, "eta_min": eta_min}]
    if warmup:
        ramp = {"type": "LinearLR", "begin": 0, "end": warmup, "by_epoch": False}
        schedulers.insert(0, ramp | {"start_factor": 1e-6})
    config = dumped(SWIN)
    config["train_cfg"]["max_iters"] = iters
    config["param_scheduler"] = schedulers
    section = convert(config, 8)[0]["schedule"]
    ours = [train.learning_rate(i, base_lr, **section) for i in range(iters)]
    theirs = mmengine_rates(schedulers, base_lr, iters)
    rounding = base_lr * (power / iters + (1 / warmup if warmup else 0))
    late = base_lr * (1 - (1 - warmup / iters) ** power)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert abs(a - b) <= (rounding if i < warmup else base_lr * 1.1 / iters**power) + late, i
    assert ours[warmup] == pytest.approx(base_lr, rel=0.01)


def test_step_schedule() -> None:
    """MMEngine counts a step scheduler's milestones from where it begins."""
    config = dumped(OHEM)
    ramp = {"type": "LinearLR", "begin": 0, "end": 1000, "start_factor": 0.1, "by_epoch": False}
    step = {"type": "MultiStepLR", "begin": 1000, "end": 40000, "by_epoch": False}
    config["param_scheduler"] = [ramp, step | {"milestones": [20000, 30000], "gamma": 0.2}]
    section = convert(config)[0]["schedule"]
    expected = {"policy": "step", "milestones": [21000, 31000], "gamma": 0.2, "warmup_iters": 1000}
    assert section.items() >= expected.items()
    rates = mmengine_rates(config["param_scheduler"], 1.0, 40000)
    assert rates[20999] == pytest.approx(1.0) and rates[21000] == pytest.approx(0.2)


def test_cosine_schedule() -> None:
    config = dumped(OHEM)
    cosine = {"type": "CosineAnnealingLR", "T_max": 40000, "eta_min": 1e-5, "by_epoch": False}
    config["param_scheduler"] = [cosine]
    section = convert(config)[0]["schedule"]
    assert section == {"max_iters": 40000, "policy": "cosine", "min_lr": 1e-5}
    config["param_scheduler"][0]["T_max"] = 1000  # the rate would rise again
    with pytest.raises(UserError, match="T_max is 1000"):
        convert(config)


CHANGES = {  # what is changed: a part of the error
    'train_dataloader.dataset.pipeline.4.direction = "vertical"': "direction",
    "train_dataloader.dataset.pipeline.2.keep_ratio = false": "keep_ratio is false",
    'train_dataloader.dataset.pipeline.2.type = "RandomChoiceResize"': "RandomChoiceResize",
    'train_dataloader.dataset.pipeline.2.type = "RandomRotate"': "Remove it",
    "train_dataloader.dataset.pipeline.5.hue_delta = 30": "hue_delta is 30",
    "train_dataloader.dataset.pipeline.1.reduce_zero_label = true": "reduce_zero_label is true",
    'train_dataloader.dataset.type = "MyDataset"': "MyDataset; expected one of ADE20KDataset",
    'train_dataloader.dataset.data_root = "elsewhere"': "expected that of training",
    'train_dataloader.dataset.data_prefix.img_path = "photos"': "photos",
    'train_dataloader.dataset.metainfo = {"classes": ["road"]}': "metainfo.classes.0",
    'train_dataloader.dataset.img_suffix = ".bmp"': "img_suffix",
    "train_dataloader.sampler.shuffle = false": "shuffle is false",
    'train_cfg.type = "EpochBasedTrainLoop"': "EpochBasedTrainLoop",
    "train_cfg.max_iters = null": "train_cfg.max_iters is missing",
    "train_cfg.val_begin = 5000": "val_begin is 5000",
    "param_scheduler.0.by_epoch = true": "param_scheduler.0.by_epoch is true",
    "param_scheduler.0.end = 50000": "set it to max_iters, 40000",
    'param_scheduler.0.type = "ExponentialLR"': "ExponentialLR",
    'optim_wrapper.clip_grad = {"max_norm": 1, "norm_type": 1}': "norm_type is 1",
    'optim_wrapper.constructor = "LayerDecayOptimizerConstructor"': "LayerDecayOptimizer",
    'optim_wrapper.paramwise_cfg = {"flat_decay_mult": 0.0}': "paramwise_cfg.flat_decay_mult",
    'optim_wrapper.paramwise_cfg = {"custom_keys": {"a": {"wd_mult": 0}}}': "a.wd_mult is 0",
    'custom_hooks = [{"type": "EMAHook"}]': 'custom_hooks.0.type is "EMAHook"',
    "auto_scale_lr = {\"enable\": true}": "auto_scale_lr.enable",
    "model.data_preprocessor.bgr_to_rgb = false": "bgr_to_rgb is false",
    "model.data_preprocessor.size_divisor = 32": "size_divisor",
    "model.data_preprocessor.pad_val = 114": "pad_val is 114",
    'model.test_cfg.mode = "slide_flip"': "slide_flip",
    'model.backbone.init_cfg = {"type": "Kaiming"}': 'init_cfg.type is "Kaiming"',
    'model.decode_head.init_cfg = {"type": "Normal"}': "model.decode_head.init_cfg.type",
    "default_hooks.checkpoint.by_epoch = true": "by_epoch is true",
    'default_hooks.checkpoint.save_best = "mDice"': "mDice",
    'val_evaluator = {"type": "DepthMetric"}': "DepthMetric",
    'model = "pspnet.py"': "model is missing; expected a whole config",
    "model.backbone = null": "model.backbone is missing",
    'strategy = {"type": "FSDPStrategy"}': 'strategy.type is "FSDPStrategy"',
    'custom_hooks = [{"type": "EarlyStoppingHook"}]': "set evaluation.patience in the converted",
    'activation_checkpointing = ["backbone"]': "set model.backbone.with_cp in the converted one",
    'data = {"train": {}}': "keys of MMSegmentation 0.x",
    "train_dataloader.dataset = []": "dataset is []; expected a section",
    'train_dataloader.dataset.pipeline = ["Resize"]': '["Resize"]; expected a list of sections',
    'param_scheduler = "poly"': '"poly"; expected a section or a list of sections',
    'train_cfg.max_iters = "40000"': 'max_iters is "40000"; expected an integer',
    "train_dataloader.dataset.data_prefix.img_path = []": "img_path is []; expected a text",
}  # fmt: skip


def change(config: dict, text: str) -> dict:
    place, _, value = text.partition(" = ")
    *parents, key = place.split(".")
    node = config
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node[name]
    node[key] = json.loads(value)
    return config


@pytest.mark.parametrize("text", CHANGES)
def test_what_cannot_be_translated_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(CHANGES[text])):
        convert(change(dumped(OHEM) | {"runner": None}, text))


def test_a_size_may_be_an_integer() -> None:
    config = change(dumped(SWIN), "data_preprocessor.size = 512")
    change(config, "model.data_preprocessor = null")
    assert convert(config, 8) == convert(dumped(SWIN), 8)


def test_unknown_networks_are_listed() -> None:
    config = change(dumped(OHEM), 'model.backbone.type = "BEiT"')
    change(config, 'model.neck = {"type": "JPU"}')
    change(config, 'model.auxiliary_head.loss_decode.type = "TverskyLoss"')
    with pytest.raises(UserError) as error:
        convert(config)
    for name in ("BEiT (model.backbone", "JPU (model.neck", "TverskyLoss (model.aux"):
        assert name in str(error.value)
    change(config, 'model.backbone.type = "VisionTransformer"')
    with pytest.raises(UserError, match="only timm's \\(model.backbone.type"):
        convert(config)


def test_notes() -> None:
    for text, expected in {
        'load_from = "a.pth"': "--load-from a.pth",
        "resume = true": "--resume-from auto",
        "surprise = 1": "surprise",
        'test_dataloader.dataset.type = "DarkZurichDataset"': "DarkZurichDataset is left out",
        "model.data_preprocessor.size = [1024, 1024]": "padded",
        'model.decode_head.norm_cfg.type = "BN"': "model.decode_head.norm_cfg.type is BN",
        'optim_wrapper.paramwise_cfg = {"bias_decay_mult": 0.0}': "bias_decay_mult",
        "param_scheduler.0.end = 20000": "here the decay ends with the run, at 40000",
    }.items():
        assert expected in convert(change(dumped(OHEM), text))[1], text


def places(node: object, place: tuple = ()) -> Iterator[tuple[tuple, object]]:
    yield place, node
    children = {}
    if isinstance(node, dict):
        children = node
    elif isinstance(node, list):
        children = dict(enumerate(node))
    for key, child in children.items():
        yield from places(child, (*place, key))


# What may change without an effect: names of hooks, of files and of samplers; see UNUSED.
WITHOUT_EFFECT = re.compile(
    r"data_preprocessor|test_dataloader|default_hooks\.(timer|sampler_seed|visualization)"
    r"|val_dataloader\.(num_workers|sampler)|val_evaluator.*iou_metrics|.*dataset\.times"
    r"|.*(persistent_workers|log_metric_by_epoch|loss_scale)"
)


@pytest.mark.parametrize("name", [SWIN, OCR, UNET, PIDNET, CONVNEXT])
def test_nothing_is_dropped(name: str) -> None:
    """Each value, and each new key, changes the result or the notes, or is an error."""

    def outcome(config: dict) -> object:
        try:
            return convert(config)
        except UserError as error:
            return str(error)

    published = dumped(name)
    usual = outcome(published)
    for place, value in places(published):
        dotted = ".".join(map(str, place))
        if not place or place[0] not in from_mmseg.READ or WITHOUT_EFFECT.match(dotted):
            continue
        if isinstance(value, list):  # its elements follow
            continue
        changed = copy.deepcopy(published)
        node = changed
        for key in place[:-1]:
            node = node[key]
        if isinstance(value, dict):
            node[place[-1]]["surprise"] = 1
        elif isinstance(value, bool):
            node[place[-1]] = not value
        elif isinstance(value, (int, float)):
            node[place[-1]] = value * 2 + 3
        else:
            node[place[-1]] = "surprise"
        assert outcome(changed) != usual, dotted


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from_mmseg.main([str(ZOO / f"{OCR}.json")])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["data"]["batch_size"] == 16
    assert '"crop_size": [512, 512]' in printed.out
    assert printed.err.startswith("note: Pad: ")
    unnamed = tmp_path / "dumped.json"
    unnamed.write_text((ZOO / f"{OCR}.json").read_text())
    from_mmseg.main([str(unnamed), "--gpus", "2"])
    assert json.loads(capsys.readouterr().out)["data"]["batch_size"] == 8
    with pytest.raises(SystemExit):
        from_mmseg.main([str(unnamed)])
    assert "--gpus" in capsys.readouterr().err
    (tmp_path / "config.py").write_text("model = dict()")
    with pytest.raises(UserError, match="cannot be read"):
        from_mmseg.main([str(tmp_path / "config.py"), "--gpus", "2"])
    with pytest.raises(UserError, match="gpus is 0"):
        from_mmseg.main([str(unnamed), "--gpus", "0"])
