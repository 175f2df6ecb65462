"""What can only be tested on a GPU. Skipped without CUDA.

With TEST_CUDA_ON=cpu in the environment, the same tests run on the CPU, to try the tests themselves
where there is no GPU.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same, checkpoint
from test_fake_cuda import BINARY_LOSSES, CONFIGS, LOSSES, SAMPLERS, distinct, model_section
from torch import Tensor, nn

import data
import dist_utils
import models
import train

DEVICE = torch.device(os.environ.get("TEST_CUDA_ON", "cuda"))
CPU = torch.device("cpu")
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # the environment of a run for comparison
IS_CUDA = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    IS_CUDA and not torch.cuda.is_available(), reason="needs a GPU with CUDA"
)


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    """Restore torch's global switches, which runs in this process change, and free memory."""
    yield
    train.set_up_arithmetic("fp32", deterministic=False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = True
    if IS_CUDA:
        torch.cuda.empty_cache()


def small(name: str, work_dir: Path, **settings) -> dict:
    """Two iterations of a config of configs/ on small made-up images, then an evaluation."""
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    section = config["model"]
    section["backbone"].pop("pretrained", None)
    for key in ("decode_head", "auxiliary_head"):
        heads = section.get(key) or []
        for head in heads if isinstance(heads, list) else [heads]:
            head["num_classes"] = 8
            losses = head.get("loss_decode") or []
            for loss in losses if isinstance(losses, list) else [losses]:
                loss.pop("class_weight", None)
    config["data"] = {
        "type": "synthetic",
        "size": [80, 96],
        "length": 4,
        "val_length": 2,
        "batch_size": 2,
        "crop_size": [64, 64],
        "workers": 0,
    }
    evaluation = {"interval": 2, "mode": config["evaluation"].get("mode", "whole")}
    if evaluation["mode"] == "slide":
        evaluation |= {"crop_size": [64, 64], "stride": [48, 48]}
    config["evaluation"] = evaluation
    config["schedule"]["max_iters"] = 2
    config["checkpoint"] = {"interval": 2}
    config["log"] = {"interval": 1}
    config["work_dir"] = str(work_dir)
    return config | settings


def run_here(config: dict, *argv: str) -> None:
    """`train.py` within this process."""
    work_dir = Path(config["work_dir"])
    path = work_dir.with_name(f"{work_dir.name}.json")
    path.write_text(json.dumps(config))
    assert train.main(["--config", str(path), *argv]) == "done"


def lines(config: dict, mode: str) -> list[dict]:
    """The lines of metrics.jsonl of one mode."""
    text = (Path(config["work_dir"]) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if line["mode"] == mode]


def losses(config: dict) -> Tensor:
    """The loss of every iteration."""
    return torch.tensor([line["loss"] for line in lines(config, "train")], dtype=torch.float64)


def without_dropout(config: dict) -> dict:
    """The random numbers of a GPU are not those of the CPU."""
    for key in ("decode_head", "auxiliary_head"):
        config["model"][key]["dropout_ratio"] = 0.0
    return config


# ----------------------------------------------------------------------------------------- Configs


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_and_evaluates(name, tmp_path):
    config = small(name, tmp_path / "work")
    run_here(config)
    assert len(losses(config)) == 2
    assert losses(config).isfinite().all()
    [validation] = lines(config, "val")
    assert sum(map(sum, validation["confusion"])) == 2 * 80 * 96


# --------------------------------------------------------------------------- Compared with the CPU


def train_step(
    section: dict, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients by name, computed on `device` in `dtype`, as float64 on the CPU."""
    train.set_up_arithmetic("fp32", deterministic=False)
    torch.manual_seed(0)
    model = models.build_model(section).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    image = torch.randn(4, model.in_channels, 96, 96)
    label = torch.randint(0, model.num_classes, (4, 96, 96), dtype=torch.uint8)
    label[:, :8] = data.IGNORE
    model.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    found = model(image.to(device, dtype), label.to(device))
    sum(found.values()).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = parameter.grad.double().cpu()
    return {name: loss.detach().double().cpu() for name, loss in found.items()}, gradients


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace functions with kinks, where one rounding makes a gradient jump."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.silu(x))
    monkeypatch.setattr(F, "hardtanh", lambda x, *limits: F.silu(x))  # ReLU6
    monkeypatch.setattr(F, "max_pool2d", lambda x, *sizes, **options: F.avg_pool2d(x, *sizes[:3]))


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The norm of the difference over that of the exact values, of all tensors together."""
    difference = sum((found[name] - exact[name]).square().sum() for name in exact)
    norm = sum(value.square().sum() for value in exact.values())
    return (difference / norm).sqrt().item()


def assert_as_exact(
    on_gpu: dict[str, Tensor], on_cpu: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The GPU in float32 is as near to the values in float64 as the CPU in float32.

    How much rounding matters depends on the computation: the CPU's error measures it. A GPU sums in
    another order, and convolves by Winograd's algorithm. TF32, with 13 bits less, would not pass.
    """
    allowed = 10 * relative_error(on_cpu, exact) + 1e-6
    assert relative_error(on_gpu, exact) <= allowed, list(exact)


@pytest.mark.parametrize("name", distinct(CONFIGS))
def test_losses_and_gradients_are_those_of_the_cpu(name, smooth):
    section = model_section(name)
    exact = train_step(section, CPU, torch.float64)
    on_cpu = train_step(section, CPU, torch.float32)
    on_gpu = train_step(section, DEVICE, torch.float32)
    for i in range(2):
        assert_as_exact(on_gpu[i], on_cpu[i], exact[i])


def loss_and_gradient(section: dict, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    num_classes = section["num_classes"]
    head = models.FCNHead(in_channels=4, channels=4, num_convs=0, concat_input=False, **section).to(
        device
    )
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, head.out_channels, 16, 16, generator=generator)
    label = torch.randint(0, num_classes, (3, 64, 64), generator=generator, dtype=torch.uint8)
    label[:, :8] = data.IGNORE
    logits = logits.to(device, dtype).requires_grad_()
    [loss] = head.loss({"": logits}, label.to(device)).values()
    loss.backward()
    return {"loss": loss.detach().double().cpu(), "gradient": logits.grad.double().cpu()}


def assert_loss_of_the_cpu(**section) -> None:
    exact = loss_and_gradient(section, CPU, torch.float64)
    on_cpu = loss_and_gradient(section, CPU, torch.float32)
    on_gpu = loss_and_gradient(section, DEVICE, torch.float32)
    for name in exact:
        assert_as_exact({name: on_gpu[name]}, {name: on_cpu[name]}, {name: exact[name]})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_that_of_the_cpu(loss, sampler):
    assert_loss_of_the_cpu(num_classes=5, loss_decode=LOSSES[loss], sampler=SAMPLERS[sampler])


@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_every_binary_loss_is_that_of_the_cpu(loss):
    assert_loss_of_the_cpu(num_classes=2, out_channels=1, loss_decode=BINARY_LOSSES[loss])


CHANGES = {
    "plain": {},
    "with_cp": {"model.backbone.with_cp": True},
    "accumulate": {"data.accumulate": 2},
    "clip_grad": {"clip_grad": 0.5},
    "AdamW": {"optimizer": {"type": "AdamW", "lr": 0.001}},
    "compile": {"compile": True},
    "deterministic": {"deterministic": True},
}


def change(config: dict, changes: dict) -> dict:
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = config
        for name in parents:
            section = section[name]
        section[last] = value
    return config


@pytest.mark.parametrize("changes", CHANGES)
def test_a_run_is_that_of_the_cpu(tiny, run, tmp_path, changes):
    config = change(without_dropout(tiny), CHANGES[changes])
    run_here(config)
    reference = config | {"work_dir": str(tmp_path / "cpu"), "compile": False}
    run(reference, env=ON_CPU)
    # Rounding of 2^-24, amplified by six updates.
    torch.testing.assert_close(losses(config), losses(reference), rtol=1e-3, atol=0)
    mean_iou, expected = (lines(c, "val")[0]["mIoU"] for c in (config, reference))
    assert mean_iou == pytest.approx(expected, abs=0.01)


# The first loss differs by a multiple of the unit roundoff: 2^-11 with 10 bits of mantissa, 2^-8
# with 7.
@pytest.mark.parametrize(
    "precision, roundoff", [("tf32", 2**-11), ("fp16", 2**-11), ("bf16", 2**-8)]
)
def test_precision(tiny, tmp_path, precision, roundoff):
    config = without_dropout(tiny) | {"precision": precision}
    run_here(config)
    reference = config | {"work_dir": str(tmp_path / "fp32"), "precision": "fp32"}
    run_here(reference)
    assert losses(config)[0] == pytest.approx(losses(reference)[0], rel=8 * roundoff)
    assert losses(config).isfinite().all()
    [validation] = lines(config, "val")
    assert 0 <= validation["mIoU"] <= 1


@pytest.mark.parametrize(
    "argv, evaluation",
    [
        ([], {}),
        ([], {"mode": "slide", "crop_size": [64, 64], "stride": [48, 48], "batch_size": 2}),
        (["--aug-test"], {"ratios": [0.75, 1.0]}),
    ],
    ids=["whole", "slide", "augmented"],
)
def test_an_evaluation_is_that_of_the_cpu(tiny, run, tmp_path, argv, evaluation):
    run_here(tiny)
    command = ["--eval-only", "--load-from", f"{tiny['work_dir']}/latest.pth", *argv]
    results = []
    for name in ("gpu", "cpu"):
        config = tiny | {"work_dir": str(tmp_path / name), "evaluation": evaluation}
        if name == "gpu":
            run_here(config, *command)
        else:
            run(config, *command, env=ON_CPU)
        results.append(lines(config, "val")[0])
    # Only pixels with almost equal logits may change their class.
    confusion, expected = (torch.tensor(result["confusion"]) for result in results)
    assert (confusion - expected).abs().sum() <= 0.002 * expected.sum()
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)


# ----------------------------------------------------------------------------------- Deterministic


@pytest.mark.parametrize("name", distinct(CONFIGS))
def test_deterministic_runs_are_equal(name, tmp_path):
    results = []
    for work_dir in ("a", "b"):
        config = small(name, tmp_path / work_dir, deterministic=True)
        run_here(config)
        results.append([checkpoint(config)["state_dict"], losses(config).tolist()])
    assert_same(*results)


@pytest.mark.parametrize("precision", ["fp32", "auto", "fp16"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_resumed_deterministic_run_is_the_same(tiny, tmp_path, precision, compile):
    straight = tiny | {"precision": precision, "compile": compile, "deterministic": True}
    run_here(straight)
    resumed = straight | {"work_dir": str(tmp_path / "resumed")}
    start_from(resumed, straight, "iter_3.pth")
    run_here(resumed, "--resume-from", "auto")
    assert_same_end(resumed, straight)


def start_from(config: dict, other: dict, name: str) -> None:
    """Copy a checkpoint into the config's work_dir."""
    Path(config["work_dir"]).mkdir()
    shutil.copy(Path(other["work_dir"]) / name, config["work_dir"])


def assert_same_end(a: dict, b: dict) -> None:
    for key in ("state_dict", "optimizer", "scaler", "best"):
        assert_same(checkpoint(a)[key], checkpoint(b)[key], key)


# ------------------------------------------------------------------------- Two processes, one GPU


GLOO = {"DIST_BACKEND": "gloo"}


@pytest.mark.parametrize("changes", ["plain", "with_cp", "compile"])
def test_two_processes_are_like_one(tiny, run, tmp_path, changes):
    # DDP averages gradients, and SyncBN takes its statistics over both processes.
    config = change(without_dropout(tiny), CHANGES[changes])
    run_here(config)
    parallel = config | {"work_dir": str(tmp_path / "parallel")}
    process = run(parallel, world_size=2, env=GLOO, started=True)
    assert process.wait(400) == [0, 0], process.output()  # compiling takes minutes on few cores
    torch.testing.assert_close(losses(parallel), losses(config), rtol=1e-3, atol=0)
    for name, expected in checkpoint(config)["state_dict"].items():
        found = checkpoint(parallel)["state_dict"][name]
        if name.endswith("num_batches_tracked"):
            assert torch.equal(found, expected), name
        elif "running" in name:
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3, msg=name)


def test_a_resumed_run_of_two_processes_is_the_same(tiny, run, tmp_path):
    straight = tiny | {"deterministic": True}
    run(straight, world_size=2, env=GLOO)
    resumed = straight | {"work_dir": str(tmp_path / "resumed")}
    start_from(resumed, straight, "iter_3.pth")
    run(resumed, "--resume-from", "auto", world_size=2, env=GLOO)
    assert_same_end(resumed, straight)


# ---------------------------------------------------------------------------------- Host and device


@contextlib.contextmanager
def host_must_not_wait(mode: str = "error") -> Iterator[None]:
    """Make every wait of the host for the device an error, or allow it with mode "default"."""
    if not IS_CUDA:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def stepper(config: dict, path: Path) -> Callable[[], float]:
    """A function that trains one iteration and returns its loss."""
    path.write_text(json.dumps(config))
    config = train.read_config(path)
    precision = train.choose_precision(config.precision, DEVICE)
    train.set_up_arithmetic(precision, config.deterministic)
    dtype, low_precision = train.PRECISIONS[precision]
    dataset = data.Data(**config.data).to(DEVICE)
    model = models.build_model(config.model)
    model.to(device=DEVICE, dtype=dtype, memory_format=torch.channels_last)
    optimizer = train.build_optimizer(model, **config.optimizer)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=low_precision == torch.float16)
    state = train.TrainState(model, optimizer, scaler)
    batches = dataset.train_batches()

    def autocast() -> torch.autocast:
        return torch.autocast(DEVICE.type, low_precision, enabled=low_precision is not None)

    def step() -> float:
        train.set_learning_rate(optimizer, state.iteration, config)
        micro_batches = list(itertools.islice(batches, dataset.accumulate))
        losses, _ = train.forward_backward(
            state, model, micro_batches, dataset, autocast, stopping=False, timeout=600.0
        )
        train.optimizer_step(state, config.clip_grad)
        return losses["loss"]

    return step


def assert_no_wait(config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = dist_utils.AsyncMean.result

    def intended_wait(self) -> list[float]:
        with host_must_not_wait("default"):
            return result(self)

    monkeypatch.setattr(dist_utils.AsyncMean, "result", intended_wait)
    step = stepper(config, tmp_path / "config.json")
    for _ in range(2):  # cuDNN's autotuning waits
        step()
    with host_must_not_wait():
        step()


@pytest.mark.parametrize("name", distinct(CONFIGS))
def test_no_network_makes_the_host_wait(name, tmp_path, monkeypatch):
    assert_no_wait(small(name, tmp_path / "work"), tmp_path, monkeypatch)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_setting_makes_the_host_wait(
    tiny, tmp_path, monkeypatch, precision, clip_grad, optimizer
):
    tiny |= {"precision": precision, "clip_grad": clip_grad}
    tiny["optimizer"] = {"type": optimizer, "lr": 0.001}
    assert_no_wait(tiny, tmp_path, monkeypatch)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_makes_the_host_wait(loss, sampler):
    head = models.FCNHead(
        in_channels=4,
        channels=4,
        num_convs=0,
        concat_input=False,
        num_classes=5,
        loss_decode=LOSSES[loss],
        sampler=SAMPLERS[sampler],
    ).to(DEVICE)
    feature = torch.randn(2, 4, 16, 16, device=DEVICE)
    label = torch.randint(0, 5, (2, 64, 64), device=DEVICE, dtype=torch.uint8)
    with host_must_not_wait():
        sum(head.loss(head([feature]), label).values()).backward()


@pytest.mark.skipif(not IS_CUDA, reason="the CPU is the host")
def test_a_wait_is_noticed():
    with pytest.raises(RuntimeError, match="synchroniz"), host_must_not_wait():
        torch.ones(1, device=DEVICE).item()


def test_the_evaluation_loop_does_not_wait(tiny, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny))
    dataset = data.Data(**train.read_config(path).data).to(DEVICE)
    model = models.build_model(tiny["model"]).to(DEVICE)
    all_reduce = dist_utils.all_reduce
    train.evaluate(model, dataset, DEVICE)

    def end_of_loop(tensor: Tensor) -> Tensor:
        if IS_CUDA:
            torch.cuda.set_sync_debug_mode("default")
        return all_reduce(tensor)

    monkeypatch.setattr(dist_utils, "all_reduce", end_of_loop)
    with host_must_not_wait():
        metrics = train.evaluate(model, dataset, DEVICE)
    assert sum(map(sum, metrics["confusion"])) > 0
