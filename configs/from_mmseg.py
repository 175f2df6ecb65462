"""Convert a whole MMSegmentation 1.x config into a config of train.py.

    python -c "from mmengine import Config; Config.fromfile('F.py').dump('dumped.json')"
    python configs/from_mmseg.py dumped.json --gpus 4 > configs/mine.json

A key that cannot be translated is an error that names it; what is left out or done differently is a
note on stderr (a warning of `convert`). What the two programs count differently:

- Batch size: MMSegmentation's is per GPU; ours is global, over all GPUs and `accumulative_counts`.
- Iterations: MMEngine counts forward passes, we count updates; `accumulative_counts` divides them.
- Warm-up: MMEngine's decay begins where the warm-up of W iterations ends; ours begins at iteration
  0 and is multiplied by the warm-up, as in MMSegmentation 0.x. The base rate stays as published, so
  ours is lower, by a factor of (1 - W / max_iters)^power: 1 % for 1500 of 160,000. MMEngine's ramps
  and decays also reach their last value one iteration early.
- Precision: MMSegmentation trains in fp32 unless the config says AmpOptimWrapper, and so does the
  converted config. `"precision": "auto"`, as in the other files of configs/, is faster.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import models
from dist_utils import UserError

# ------------------------------------------------------------------------------------------- Tables
# Keys without influence on training and validation, wherever they stand: what is printed and drawn,
# how processes and loaders work, how files are read and written, metadata, test-time augmentation,
# and the scale of the loss in fp16, which the gradient is divided by again.
UNUSED = """
    visualizer vis_backends log_processor log_level log_metric_by_epoch ignore_last experiment_name
    default_scope custom_imports launcher env_cfg model_wrapper_cfg find_unused_parameters sync_bn
    diff_rank_seed persistent_workers pin_memory prefetch_factor collate_fn drop_last collect_device
    backend_args file_client_args imdecode_backend serialize_data lazy_init max_refetch test_mode
    work_dir out_dir filename_tmpl save_last published_keys meta_keys bypass_duplicate
    timer sampler_seed visualization test_evaluator tta_model tta_pipeline img_ratios loss_scale
""".split()
# What MMEngine reads at the top level. Other keys are variables of the config files, whose values
# were copied to where they are used; those of MMSegmentation's own files need no note.
READ = """
    model data_preprocessor train_dataloader val_dataloader test_dataloader val_evaluator train_cfg
    val_cfg test_cfg optim_wrapper auto_scale_lr param_scheduler default_hooks custom_hooks
    load_from resume randomness compile activation_checkpointing efficient_conv_bn_eval
    runner_type strategy
""".split()
VARIABLES = """
    norm_cfg backbone_norm_cfg dataset_type data_root crop_size img_scale train_pipeline metainfo
    test_pipeline dataset_train dataset_aug optimizer checkpoint checkpoint_file class_weight iters
""".split()

# What the values of these keys have to be, wherever they stand, unless they are null.
KINDS = {
    "a section": "backbone data_preprocessor dataset optimizer test_dataloader".split(),
    "a list of sections": ["datasets", "pipeline"],
    "a section or a list of sections": ["param_scheduler", "val_evaluator"],
    "an integer": """
        batch_size num_workers accumulative_counts max_iters val_interval interval begin end
        max_keep_ckpts
    """.split(),
    "an integer or a list of integers": ["size", "crop_size", "stride"],
    "a text": "type img_path seg_map_path ann_file".split(),
}
# The settings of train.py that stand for what is not translated.
SETTINGS = {
    "EMAHook": "ema_decay",
    "EarlyStoppingHook": "evaluation.patience",
    "activation_checkpointing": "model.backbone.with_cp",
}

# The steps of pipelines in the order of data.py, with what data.py does for keys that it does not
# have. In these and all lists of values for expect(), None stands for a missing key.
OFF = [None, False]
COLOR = {
    "brightness_delta": [None, 32],
    "contrast_range": [None, [0.5, 1.5]],
    "saturation_range": [None, [0.5, 1.5]],
    "hue_delta": [None, 18],
}
STEPS = {
    "LoadImageFromFile": {"to_float32": OFF, "color_type": [None, "color"]},
    "LoadAnnotations": {},
    "Resize": {"keep_ratio": [True]},
    "RandomResize": {"keep_ratio": [True], "resize_type": [None, "Resize"]},
    "RandomCrop": {"ignore_index": [None, 255]},
    "PhotoMetricDistortion": COLOR,
    "RandomFlip": {"direction": [None, "horizontal"]},
    "Pad": {},
    "GenerateEdge": {"edge_width": [4]},
    "PackSegInputs": {},
}
# MMSegmentation's own constructor of optimizers; the usual one is MMEngine's.
LAYER_DECAY = "LearningRateDecayOptimizerConstructor"
VAL_STEPS = ("LoadImageFromFile", "Resize", "LoadAnnotations", "PackSegInputs")


@dataclass(frozen=True)
class Layout:
    """A data set: our `data.type`, and the files that MMSegmentation reads; `{}` is a split."""

    type: str
    images: str = "images/{}"
    labels: str = "annotations/{}"
    files: str = ""
    splits: tuple[str, str] = ("training", "validation")
    reduce_zero_label: bool = False

    def paths(self, split: str) -> list[str]:
        return [path.format(split) for path in (self.images, self.labels, self.files)]


TRAIN_VAL = ("train", "val")
TILES = ("img_dir/{}", "ann_dir/{}", "", TRAIN_VAL)
VOC = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt", TRAIN_VAL)
CONTEXT_LIST = "ImageSets/SegmentationContext/{}.txt"
CONTEXT = ("JPEGImages", "SegmentationClassContext", CONTEXT_LIST, TRAIN_VAL)
LAYOUTS = {
    "ADE20KDataset": Layout("ade20k", reduce_zero_label=True),
    "BDD100KDataset": Layout("bdd100k", "images/10k/{}", "labels/sem_seg/masks/{}", "", TRAIN_VAL),
    "ChaseDB1Dataset": Layout("chase_db1"),
    "CityscapesDataset": Layout("cityscapes", "leftImg8bit/{}", "gtFine/{}", "", TRAIN_VAL),
    "COCOStuffDataset": Layout("coco_stuff", splits=("train2017", "val2017")),
    "COCO-Stuff 10k": Layout("folder", splits=("train2014", "test2014"), reduce_zero_label=True),
    "DRIVEDataset": Layout("drive"),
    "HRFDataset": Layout("hrf"),
    "iSAIDDataset": Layout("isaid", *TILES),
    "ISPRSDataset": Layout("vaihingen", *TILES, reduce_zero_label=True),
    "LoveDADataset": Layout("loveda", *TILES, reduce_zero_label=True),
    "MapillaryDataset_v1": Layout("mapillary", "{}/images", "{}/v1.2/labels"),
    "PascalContextDataset": Layout("pascal_context", *CONTEXT),
    "PascalContextDataset59": Layout("pascal_context_59", *CONTEXT, reduce_zero_label=True),
    "PascalVOCDataset": Layout("voc", *VOC),
    "Pascal VOC, augmented": Layout("voc_aug", *VOC),
    "PotsdamDataset": Layout("potsdam", *TILES, reduce_zero_label=True),
    "REFUGEDataset": Layout("refuge"),
    "STAREDataset": Layout("stare"),
    "SynapseDataset": Layout("synapse", *TILES),
}
COCO_STUFF_10K = {
    "images": "images/{split}",
    "labels": "annotations/{split}",
    "image_suffix": ".jpg",
    "label_suffix": "_labelTrainIds.png",
    "classes": data.COCO_STUFF_CLASSES,
    "reduce_zero_label": True,
    "train_split": "train2014",
    "val_split": "test2014",
}


# ------------------------------------------------------------------------- Sections, read by taking
class Section(dict):
    """A section of the dumped config. What is translated is taken out; the rest is an error."""

    def __init__(self, place: str, items: dict = {}):
        super().__init__(items)
        self.place = place

    def at(self, key: str) -> str:
        return f"{self.place}.{key}".lstrip(".")

    def take(self, key: str, *default: object) -> object:
        """Take a value. Null counts as missing. Raise UserError if there is no default either."""
        value = self.pop(key, None)
        if value is None and not default:
            raise UserError(f"{self.at(key)} is missing; expected a whole config, see --help")
        return default[0] if value is None else value

    def section(self, key: str) -> "Section":
        """Return a section, an empty one if it is missing."""
        value = self.get(key)
        if value is None:
            return Section(self.at(key))
        if not isinstance(value, Section):
            raise UserError(f"{self.at(key)} is {json.dumps(value)}; expected a section")
        return value

    def expect(self, **allowed: list) -> None:
        """Take keys that train.py lacks, as it does what the allowed values mean."""
        for key, values in allowed.items():
            value = self.take(key, None)
            if value not in values:
                raise UserError(
                    f"{self.at(key)} is {json.dumps(value)}; train.py can only do what "
                    f"{json.dumps(values[-1])} means. Set that if the experiment can do with it"
                )


def read(node: object, place: str = "") -> object:
    """Return a copy of `node` in which dicts are Sections, without the keys in UNUSED."""
    if isinstance(node, dict):
        section = Section(place)
        for key, value in node.items():
            if key not in UNUSED:
                check_kind(key, value, section.at(key))
                section[key] = read(value, section.at(key))
        return section
    if isinstance(node, (list, tuple)):
        return [read(value, f"{place}.{i}") for i, value in enumerate(node)]
    return node


def check_kind(key: str, value: object, place: str) -> None:
    """Raise UserError if a value is not what KINDS says."""
    is_section = isinstance(value, dict)
    is_list = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    numbers = value if isinstance(value, list) else [value]
    are_integers = all(type(number) is int for number in numbers)
    fits = {
        "a section": is_section,
        "a list of sections": is_list,
        "a section or a list of sections": is_section or is_list,
        "an integer": type(value) is int,
        "an integer or a list of integers": are_integers,
        "a text": isinstance(value, str),
    }
    for kind, keys in KINDS.items():
        if key in keys and value is not None and not fits[kind]:
            raise UserError(f"{place} is {json.dumps(value)}; expected {kind}")


def leaves(node: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value within `node` that is not null, with its place: `model.backbone.type`."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{place}.{key}".lstrip("."))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from leaves(value, f"{place}.{i}")
    elif node is not None:
        yield place, node


def note(text: str) -> None:
    warnings.warn(text, stacklevel=3)


# --------------------------------------------------------------------------------------- The config
def convert(config: dict, gpus: int) -> dict:
    """Convert a whole dumped MMSegmentation config to a config for train.load_config.

    gpus: how many GPUs the config is made for, such as the 4 of 4xb2. Raises UserError for what
    cannot be translated, and warns of what is left out or done differently.
    """
    if gpus < 1:
        raise UserError(f"gpus is {gpus}; expected 1 or more")
    if isinstance(config, dict) and config.keys() >= {"data", "runner"}:
        raise UserError(
            "data and runner are keys of MMSegmentation 0.x; expected a config of 1.x. Take its "
            "config of the same name, or write yours anew as 1.x's migration guide says"
        )
    for key in ("model", "train_dataloader", "val_dataloader", "optim_wrapper", "train_cfg"):
        if not isinstance(config, dict) or not isinstance(config.get(key), dict):
            raise UserError(f"{key} is missing; expected a whole config, dumped as --help says")
    config = read(config)
    model = convert_model(config["model"], gpus)
    check_top_level(config)
    train_dataset = config["train_dataloader"].section("dataset")
    train, train_steps = read_dataset(train_dataset, tuple(STEPS), split=0)
    val_dataset = config["val_dataloader"].section("dataset")
    val, val_steps = read_dataset(val_dataset, VAL_STEPS, split=1)
    validate_on(val, train)

    wrapper = config["optim_wrapper"]
    accumulate = wrapper.take("accumulative_counts", 1)
    schedule = convert_schedule(config)
    randomness = config.section("randomness")
    converted = {
        "seed": randomness.take("seed", 0),
        "deterministic": randomness.take("deterministic", False),
        **convert_precision(wrapper),
        "model": model,
        "data": train | convert_loader(config["train_dataloader"], gpus, accumulate),
        "optimizer": convert_optimizer(wrapper, model["backbone"]),
        "schedule": schedule,
        "evaluation": convert_evaluation(config, val_steps),
        **convert_hooks(config.section("default_hooks"), schedule["max_iters"]),
    }
    converted["data"] |= convert_pipeline(train_steps)
    converted["data"] |= convert_preprocessor(config, converted["data"]["crop_size"])
    for section in ("schedule", "evaluation", "checkpoint", "log"):
        count_updates(converted[section], accumulate)
    for place, value in leaves(config):
        setting = SETTINGS.get(value) or SETTINGS.get(place.partition(".")[0])
        if setting:
            raise UserError(
                f"{place} is {json.dumps(value)}, which is not translated. Remove it from the "
                f"dumped config, and set {setting} in the converted one"
            )
        raise UserError(
            f"{place} is {json.dumps(value)}, which has no counterpart in train.py. Remove it from "
            "the dumped config if the experiment can do without it"
        )
    return json.loads(json.dumps(converted))  # plain dicts


def check_top_level(config: Section) -> None:
    """Note what is left out at the top level, and check the sections without a counterpart."""
    unread = [key for key in config if key not in READ]
    for key in unread:
        del config[key]
    unread = ", ".join(key for key in unread if key not in VARIABLES)
    if unread:
        note(f"left out, as MMEngine does not read these top-level keys: {unread}")
    weights = config.take("load_from", None)
    if weights:
        note(f"load_from is not a part of a config here: start train.py with --load-from {weights}")
    if config.take("resume", False):
        note("resume is not a part of a config here: start train.py with --resume-from auto")
    val = config["val_dataloader"].get("dataset")
    test = config.take("test_dataloader", {}).get("dataset") or val
    if test != val:
        note(f"test_dataloader with {test.get('type')} is left out; val_dataloader is scored")
    config.expect(compile=OFF)
    config.section("val_cfg").expect(type=[None, "ValLoop"], fp16=OFF)
    config.section("test_cfg").expect(type=[None, "TestLoop"], fp16=OFF)
    config.section("auto_scale_lr").take("base_batch_size", None)
    config.section("auto_scale_lr").expect(enable=OFF)


def count_updates(section: dict, accumulate: int) -> None:
    """Turn MMEngine's iterations, which are forward passes, into ours, which are updates."""
    for key in ("max_iters", "warmup_iters", "interval"):
        if key in section:
            section[key] = -(-section[key] // accumulate)
    if "milestones" in section:
        section["milestones"] = [-(-passes // accumulate) for passes in section["milestones"]]


# ---------------------------------------------------------------------------------------- The model
def convert_model(section: Section, gpus: int) -> dict:
    """Take all of `section` but its data_preprocessor, train_cfg and test_cfg."""
    backbone = section.section("backbone")
    if not backbone:
        raise UserError("model.backbone is missing; expected a whole config, see --help")
    others = ("data_preprocessor", "train_cfg", "test_cfg")
    model = {key: section.pop(key) for key in list(section) if key not in others}
    refuse_unknown_types(model)
    init = backbone.section("init_cfg")
    init.expect(type=[None, "Pretrained"], prefix=[None, "backbone."])
    checkpoint = init.take("checkpoint", None)
    weights = model.pop("pretrained", None) or backbone.take("pretrained", checkpoint)
    if weights:
        backbone["pretrained"] = weights
    for place, value in leaves(model, "model"):
        if ".init_cfg." in place:
            raise UserError(
                f"{place} is {value!r}; remove it, as layers initialize themselves here"
            )
        if place.endswith("norm_cfg.type") and value == "BN" and gpus > 1:
            note(f"{place} is BN: here batch norm is synchronized over GPUs, there only SyncBN is")
    backbone.pop("init_cfg", None)
    return model


def refuse_unknown_types(model: dict) -> None:
    """Raise UserError with everything that models.py lacks."""
    known = {"EncoderDecoder", "CascadeEncoderDecoder", *models.BACKBONES, *models.NECKS}
    known |= {*models.HEADS, *models.LOSSES, *models.SAMPLERS}
    lacking = []
    for place, name in leaves(model, "model"):
        if not place.endswith(".type") or "_cfg." in place:
            continue
        name = str(name).removeprefix("mmpretrain.")
        if name == "VisionTransformer":
            lacking.append(f"MMSegmentation's VisionTransformer, only timm's ({place})")
        elif name not in known:
            lacking.append(f"{name} ({place})")
    if lacking:
        raise UserError(
            f"models.py does not have {', '.join(lacking)}. Write it as the README's 'Hack it' "
            "says, or take the config of another network"
        )


# --------------------------------------------------------------------------- Optimizer and schedule
def convert_precision(wrapper: Section) -> dict:
    """Return precision and clip_grad, which stand at the top level here."""
    precision = "fp32"
    if wrapper.get("type") == "AmpOptimWrapper":
        precision = "bf16" if wrapper.get("dtype") == "bfloat16" else "fp16"
    wrapper.expect(
        type=[None, "AmpOptimWrapper", "OptimWrapper"],
        dtype=[None, "bfloat16", "float16"],
    )
    clip = wrapper.section("clip_grad")
    clip.expect(type=[None, "norm"], norm_type=[None, 2])
    return {"precision": precision, "clip_grad": clip.take("max_norm", None)}


def convert_optimizer(wrapper: Section, backbone: dict) -> dict:
    optimizer = wrapper.take("optimizer")
    paramwise = wrapper.section("paramwise_cfg")
    if wrapper.get("constructor") == LAYER_DECAY:
        del wrapper["constructor"]
        optimizer["paramwise"] = convert_layer_decay(paramwise, backbone)
        return optimizer
    wrapper.expect(constructor=[None, "DefaultOptimWrapperConstructor"])
    custom = paramwise.section("custom_keys")
    rules = {}
    for part in sorted(custom):  # of matching keys of one length MMEngine takes the first of these
        rule = custom.section(part)
        multipliers = [key for key in ("lr_mult", "decay_mult") if key in rule]
        rules[part] = {key: rule.take(key) for key in multipliers}
    for key in ("norm_decay_mult", "bias_lr_mult", "bias_decay_mult"):
        if key in paramwise:
            rules[key] = paramwise.take(key, 1.0)
    if "bias_decay_mult" in rules and "norm_decay_mult" not in rules:
        note("paramwise_cfg.bias_decay_mult does not apply to the biases of norm layers here")
    if rules:
        optimizer["paramwise"] = rules
    return optimizer


def convert_layer_decay(paramwise: Section, backbone: dict) -> dict:
    """Return the rules of LearningRateDecayOptimizerConstructor, for ConvNeXt in models.py.

    Biases and other vectors have no weight decay.
    """
    kind = str(backbone.get("type")).removeprefix("mmpretrain.")
    arch = backbone.get("arch", "tiny")
    if kind != "ConvNeXt" or arch not in list(models.ConvNeXt.ARCHS):
        raise UserError(
            f"optim_wrapper.constructor is {LAYER_DECAY}, which can be translated for ConvNeXt of "
            f"arch {', '.join(models.ConvNeXt.ARCHS)}, not for {kind} of arch {arch}. Remove it "
            "from the dumped config, and set optimizer.paramwise.layer_decay in the converted one"
        )
    depths, _ = models.ConvNeXt.ARCHS[arch]
    # Three blocks of the third stage are a layer. The learning rates depend on this number.
    paramwise.expect(num_layers=[depths[2] // 3 + 3])
    decay_type = paramwise.take("decay_type", "layer_wise")
    return {
        "layer_decay": paramwise.take("decay_rate"),
        "decay_type": "layer_wise" if "layer_wise" in str(decay_type) else decay_type,
        "norm_decay_mult": 0.0,
        "bias_decay_mult": 0.0,
        "gamma": {"decay_mult": 0.0},
    }


def convert_schedule(config: Section) -> dict:
    """Count iterations as MMEngine does. The head of this file says how warm-ups differ."""
    loop = config["train_cfg"]
    loop.expect(type=["IterBasedTrainLoop"], val_begin=[None, 0, 1])
    max_iters = loop.take("max_iters")
    schedule = {"max_iters": max_iters}
    schedulers = config.get("param_scheduler") or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    kinds = [scheduler.take("type") for scheduler in schedulers]
    known = ("PolyLR", "CosineAnnealingLR", "MultiStepLR")
    if not kinds or kinds[-1] not in known or kinds[:-1] not in ([], ["LinearLR"]):
        raise UserError(
            f"param_scheduler is {kinds}; expected one of {', '.join(known)}, alone or after "
            "LinearLR"
        )
    begins = [None, 0]
    for warmup in schedulers[:-1]:
        warmup.expect(by_epoch=[False], begin=[None, 0], end_factor=[None, 1.0])
        begins.append(warmup.take("end"))
        schedule |= {"warmup": "linear", "warmup_iters": begins[-1]}
        schedule["warmup_ratio"] = warmup.take("start_factor", 1 / 3)
    main = schedulers[-1]
    begin = main.get("begin") or 0
    main.expect(by_epoch=[False], begin=begins)
    end = main.take("end", max_iters)
    if kinds[-1] == "MultiStepLR":  # whose milestones count from `begin`
        milestones = [begin + milestone for milestone in main.take("milestones")]
        schedule["milestones"] = [milestone for milestone in milestones if milestone < end]
        return schedule | {"policy": "step", "gamma": main.take("gamma", 0.1)}
    if end > max_iters:
        raise UserError(f"{main.place}.end is {end}; set it to max_iters, {max_iters}")
    if end < max_iters:
        note(f"{main.place}.end is {end}; here the decay ends with the run, at {max_iters}")
    schedule["min_lr"] = main.take("eta_min", 0.0)
    if kinds[-1] == "CosineAnnealingLR":
        main.expect(T_max=[None, end - begin])
        return schedule | {"policy": "cosine"}
    return schedule | {"power": main.take("power", 1.0)}


# ----------------------------------------------------------------------------------------- The data
def convert_loader(loader: Section, gpus: int, accumulate: int) -> dict:
    kinds = [None, "DefaultSampler", "InfiniteSampler"]
    loader.section("sampler").expect(type=kinds, shuffle=[None, True])
    return {
        "batch_size": loader.take("batch_size") * gpus * accumulate,
        "accumulate": accumulate,
        "workers": loader.take("num_workers", 0),
    }


def convert_preprocessor(config: Section, crop_size: list[int]) -> dict:
    """Return mean and std. The model's data_preprocessor comes before that of the top level."""
    usual = config.take("data_preprocessor", Section("data_preprocessor"))
    section = config["model"].get("data_preprocessor") or usual
    config["model"]["data_preprocessor"] = section
    section.expect(type=["SegDataPreProcessor"], bgr_to_rgb=[True], rgb_to_bgr=OFF)
    section.expect(pad_val=[None, 0], seg_pad_val=[None, 255])
    size = section.take("size", crop_size)
    size = [size, size] if isinstance(size, int) else size
    if any(padded > crop for padded, crop in zip(size, crop_size)):
        note(
            f"data_preprocessor.size is {size}: crops are padded to it there, and the loss is a "
            "mean over the padding too. Here they are not padded"
        )
    return {"mean": section.take("mean", [0.0] * 3), "std": section.take("std", [1.0] * 3)}


def validate_on(val: dict, train: dict) -> None:
    """Leave out of validation what is trained on alone. Raise UserError if `val` is not in it."""
    if train == val or train | {"type": train["type"].removesuffix("_aug")} == val:
        return
    if val not in train.get("datasets", []):
        raise UserError(f"val_dataloader.dataset is {val}; expected that of training, {train}")
    for section in train["datasets"]:
        if section != val:
            section["splits"] = {"val": None}


def read_dataset(dataset: Section, order: tuple, split: int) -> tuple[dict, dict[str, Section]]:
    """Return the data section's keys of the data set itself, and its pipeline's steps by name.

    order: the steps that data.py has, in its order. split: 0 for training, 1 for validation.
    """
    if dataset.get("type") == "RepeatDataset":  # the stream of training samples is endless anyway
        dataset.take("type")
        dataset.take("times")
        return read_dataset(dataset.section("dataset"), order, split)
    if dataset.get("type") == "ConcatDataset" and not is_voc_aug(dataset):
        return read_concat(dataset, order, split)
    kind, dataset = name_of(dataset)
    if kind not in LAYOUTS:
        raise UserError(
            f"{dataset.place}.type is {kind}; expected one of {', '.join(LAYOUTS)}. Name one of "
            'them, and describe your data set in the converted config by data.type "folder"'
        )
    layout = LAYOUTS[kind]
    zero = [None, layout.reduce_zero_label]
    dataset.expect(reduce_zero_label=zero, ignore_index=[None, 255])
    if layout.type == "mapillary" and len(dataset.section("metainfo").get("classes", [])) == 65:
        del dataset["metainfo"]  # all classes but "Unlabeled", as ours
    prefix = dataset.section("data_prefix")
    paths = [
        prefix.take("img_path", ""),
        prefix.take("seg_map_path", ""),
        dataset.take("ann_file", ""),
    ]
    expected = layout.paths(layout.splits[split])
    if [path.rstrip("/") for path in paths] != expected:
        raise UserError(
            f"{dataset.place} reads {paths}; data.type {layout.type} reads {expected}. Name these, "
            'and yours in the converted config, by data.train_split or data.type "folder"'
        )
    steps = read_pipeline(dataset, order)
    if "LoadAnnotations" in steps:
        steps["LoadAnnotations"].expect(reduce_zero_label=zero)
    section = {"type": layout.type, "root": dataset.take("data_root")}
    if layout.type == "folder":
        section |= COCO_STUFF_10K
    return section, steps


def name_of(dataset: Section) -> tuple[str, Section]:
    """Return the key of LAYOUTS for the data set, and the Section that names its files."""
    kind = dataset.take("type")
    if kind == "COCOStuffDataset" and dataset.get("reduce_zero_label"):
        return "COCO-Stuff 10k", dataset
    if kind != "ConcatDataset":
        return kind, dataset
    first, _ = dataset.take("datasets")
    first.take("type")
    dataset["dataset"] = first  # whose other keys are looked at in the end
    return "Pascal VOC, augmented", first


def is_voc_aug(dataset: Section) -> bool:
    """Return whether a ConcatDataset is PascalVOCDataset's train.txt with aug.txt's labels."""
    first, *others = dataset.get("datasets") or [Section(dataset.place)]
    prefix = first.section("data_prefix") | {"seg_map_path": "SegmentationClassAug"}
    augmentation = first | {"ann_file": VOC[2].format("aug"), "data_prefix": prefix}
    return first.get("type") == "PascalVOCDataset" and others == [augmentation]


def read_concat(dataset: Section, order: tuple, split: int) -> tuple[dict, dict[str, Section]]:
    """Do what `read_dataset` does for a ConcatDataset whose data sets have the same pipeline."""
    dataset.take("type")
    parts = dataset.get("datasets")
    if not parts:
        raise UserError(f"{dataset.place}.datasets is {parts}; expected a list of data sets")
    sections = []
    pipelines = []
    for part in parts:
        section, steps = read_dataset(part, order, split)
        if part.get("dataset") or section["type"] == "folder":
            raise UserError(
                f"{part.place} repeats a data set or cannot be a section of a concat. Name one "
                'data set, and write data.type "concat" with weights into the converted config'
            )
        sections.append(section)
        pipelines.append(steps)
        if steps != pipelines[0]:
            raise UserError(f"{part.place}.pipeline is not that of {parts[0].place}")
    for part in parts[1:]:
        del part["pipeline"]
    if len({section["type"] for section in sections}) > 1:
        note(f"{dataset.place}: set class_map in data.datasets where class names differ")
    return {"type": "concat", "datasets": sections}, pipelines[0]


def read_pipeline(dataset: Section, order: tuple) -> dict[str, Section]:
    pipeline = dataset.get("pipeline") or []
    names = [step.take("type") for step in pipeline]
    for name, step in zip(names, pipeline):
        if name not in order:
            raise UserError(
                f"{step.place} is {name}, which data.py does not have. Remove it from the dumped "
                f"config, or write it there. The others are {', '.join(order)}"
            )
        step.expect(**STEPS[name])
    in_order = [name for name in names if name != "RandomFlip"]  # which may stand anywhere
    if in_order != [name for name in order if name in in_order]:
        raise UserError(f"{dataset.place}.pipeline is {names}; data.py's order is {order}")
    return dict(zip(names, pipeline))


def convert_pipeline(steps: dict[str, Section]) -> dict:
    """Convert the training pipeline."""
    if "RandomCrop" not in steps or {"Resize", "RandomResize"} <= steps.keys():
        raise UserError(
            f"the pipeline is {list(steps)}; expected a RandomCrop and one resize at most"
        )
    nothing = Section("pipeline")
    resize = steps.get("RandomResize") or steps.get("Resize", nothing)
    crop = steps["RandomCrop"]
    size = crop.take("crop_size")
    size = [size, size] if isinstance(size, int) else size
    if "Pad" in steps:
        steps["Pad"].expect(size=[size])
        note("Pad: images smaller than a crop get a black border there, one of data.mean here")
    return {
        "scale": resize.take("scale", None),
        "ratio_range": resize.take("ratio_range", [1.0, 1.0]),
        "crop_size": size,
        "cat_max_ratio": crop.take("cat_max_ratio", 1.0),
        "flip": steps.get("RandomFlip", nothing).take("prob", 0.0),
        "photometric": "PhotoMetricDistortion" in steps,
    }


# ------------------------------------------------------------------ Evaluation, checkpoints and log
def convert_evaluation(config: Section, steps: dict[str, Section]) -> dict:
    loader = config["val_dataloader"]
    for key in ("num_workers", "sampler"):  # data.workers serves both; each image is taken once
        loader.pop(key, None)
    evaluators = config.get("val_evaluator") or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        evaluator.expect(type=["IoUMetric"])
        evaluator.pop("iou_metrics", None)  # train.py logs all
        evaluator.pop("prefix", None)
    test_cfg = config["model"].section("test_cfg")
    mode = test_cfg.get("mode", "whole")
    test_cfg.expect(mode=[None, "slide", "whole"])
    windows = {key: test_cfg.pop(key) for key in ("crop_size", "stride") if key in test_cfg}
    section = {"interval": config["train_cfg"].take("val_interval", 1000), "mode": mode}
    if mode == "slide":
        section |= windows
    if "Resize" in steps:
        section["scale"] = steps["Resize"].take("scale")
    section["batch_size"] = loader.take("batch_size", 1)
    return section


def convert_hooks(hooks: Section, max_iters: int) -> dict:
    """Return the sections checkpoint and log."""
    hooks.section("param_scheduler").expect(type=[None, "ParamSchedulerHook"])
    logger = hooks.section("logger")
    logger.expect(type=[None, "LoggerHook"])
    checkpoint = hooks.section("checkpoint")
    checkpoint.expect(type=[None, "CheckpointHook"], by_epoch=[False])
    checkpoint.expect(save_best=[None, "auto", "mIoU"], rule=[None, "greater"])
    interval = checkpoint.take("interval", -1)
    if interval < 1:  # at the end only
        interval = max_iters
    keep = checkpoint.take("max_keep_ckpts", -1)
    if keep < 1:  # all
        keep = -(-max_iters // interval)
    return {
        "checkpoint": {"interval": interval, "keep": keep},
        "log": {"interval": logger.take("interval", 10)},
    }


# ------------------------------------------------------------------------------------- Command line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dumped", type=Path, help="the dumped config, a JSON file")
    parser.add_argument("--gpus", type=int, help="default: the 4 of 4xb2 in the name of the file")
    args = parser.parse_args(argv)
    named = re.search(r"(?<![a-z0-9])(\d+)xb\d", args.dumped.name)
    if args.gpus is None and not named:
        parser.error("--gpus is missing: the number of GPUs that the config is made for")
    try:
        config = json.loads(args.dumped.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{args.dumped} cannot be read: {error}. Dump it as --help says") from None
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        converted = convert(config, int(named[1]) if args.gpus is None else args.gpus)
    for text in notes:
        print(f"note: {text.message}", file=sys.stderr)
    pretty = json.dumps(converted, indent=2)
    # Lists of numbers on one line.
    print(re.sub(r"\[[-+.,\de\s]+\]", lambda found: json.dumps(json.loads(found[0])), pretty))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
