"""Measures one thing and prints one JSON line, so that it can be set beside another code on the same work.

python tests/benchmark.py start                                         seconds to import and to build PSPNet-R50
python tests/benchmark.py data --root R --count 64 [--cache D]          training samples a second on one core, PSPNet's Cityscapes pipeline
python tests/benchmark.py data --root R --count 64 --workers 2          the loader as a whole: batches on the device
python tests/benchmark.py step --config C --batch 4 --size 360 360      seconds an iteration of the loop on random images, beside a bare step
python tests/benchmark.py eval --config C --load-from P                 images a second of the evaluation
python tests/benchmark.py resume --config C --iteration 39000           seconds from the start to the first step of a resumed run
"""

import time

T0 = time.perf_counter()
import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import resource as system  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def start(args: argparse.Namespace) -> dict:
    import models

    imported = time.perf_counter() - T0
    models.build_model(
        json.loads((ROOT / "configs/pspnet_r50-d8_512x1024_40k_cityscapes.json").read_text())[
            "model"
        ]
    )
    return {"import_s": imported, "import_and_build_s": time.perf_counter() - T0}


def data(args: argparse.Namespace) -> dict:
    import torch

    from data import Data

    source = Data(
        type="cityscapes",
        root=args.root,
        batch_size=2,
        crop_size=[512, 1024],
        scale=[2048, 1024],
        workers=args.workers or 0,
        cache=args.cache,
    )
    if args.workers:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batches = source.to(device).train_batches()
        for _ in range(
            max(3 * args.workers, len(source.train) if args.cache else 0)
        ):  # fills the cache
            next(batches)
        began = time.perf_counter()
        for _ in range(args.count // 2):
            source.prepare(next(batches), device)
        return {
            "workers": args.workers,
            "cache": args.cache,
            "images_per_s": args.count // 2 * 2 / (time.perf_counter() - began),
        }
    torch.set_num_threads(1)
    for position in range(len(source.train) if args.cache else 3):
        source.samples[[position]]
    began = time.perf_counter()
    for position in range(args.count):
        batch = source.samples[[position]]
    seconds = (time.perf_counter() - began) / args.count
    prepared = statistics.median(timed(lambda: source.prepare(batch, "cpu")) for _ in range(10))
    return {
        "cache": args.cache,
        "images_per_s_per_core": 1 / seconds,
        "s_per_image": seconds,
        "s_per_image_of_color_on_this_core": prepared,
    }


def timed(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def step(args: argparse.Namespace) -> dict:
    """The loop of train.py on one random batch, and a bare step without anything of the loop, in turns; on every process under torchrun."""
    import torch

    import dist_utils
    import models
    import train

    config = train.load_config(args.config, args.options)
    device = dist_utils.init()
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    dtype, low = train.choose_precision(args.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=low == torch.float16)
    model = models.build_model(config["model"]).to(
        device=device, dtype=dtype, memory_format=torch.channels_last
    )
    optimizer = train.build_optimizer(model, **config["optimizer"])
    net = dist_utils.distribute(model)
    net = models.compiled(net) if config["compile"] else net
    image = torch.randn(args.batch, model.in_channels, *args.size, device=device).to(
        memory_format=torch.channels_last
    )
    label = torch.randint(
        0, model.num_classes, (args.batch, *args.size), device=device, dtype=torch.uint8
    )
    source, rank, numbers = (
        SimpleNamespace(accumulate=1, prepare=lambda batch, device: batch),
        dist_utils.rank(),
        itertools.count(),
    )

    def autocast():
        return torch.autocast(device.type, low, enabled=low is not None)

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def loop() -> None:
        iteration = next(numbers)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(
                iteration, config["optimizer"]["lr"] * group["lr_mult"], **config["schedule"]
            )
        torch.manual_seed(train.step_seed(config["seed"], iteration, rank))
        losses, *_ = train.forward_backward(
            net,
            itertools.repeat((image, label)),
            source,
            device,
            dtype,
            autocast,
            scaler,
            False,
            600,
        )
        if not math.isfinite(losses["loss"]):
            raise ValueError(losses)
        update()

    def bare() -> None:
        with autocast():
            loss = sum(net(image, label).values())
        scaler.scale(loss).backward()
        update()

    def window(function) -> float:
        """Seconds an iteration, over ten where the device runs behind the host."""
        began = time.perf_counter()
        for _ in range(10 if cuda else 1):
            function()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / (10 if cuda else 1)

    for _ in range(args.warmup):
        loop(), bare()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    pairs = [(window(loop), window(bare)) for _ in range(args.steps)]
    seconds, plain = (statistics.median(column) for column in zip(*pairs))
    return {
        "config": args.config,
        "precision": str(low or dtype).removeprefix("torch."),
        "batch": args.batch,
        "size": args.size,
        "s_per_iter": seconds,
        "images_per_s": args.batch * dist_utils.world_size() / seconds,
        "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "process_memory_gib": system.getrusage(system.RUSAGE_SELF).ru_maxrss / 2**20,
        "bare_s_per_iter": plain,
        "loop_over_bare": statistics.median(a / b for a, b in pairs),
    }


def evaluate(args: argparse.Namespace) -> dict:
    import torch

    import dist_utils
    import models
    import train

    config = train.load_config(args.config, args.options)
    device = dist_utils.init()
    _, low = train.choose_precision(args.precision, device)
    model = models.build_model(config["model"]).to(device=device, memory_format=torch.channels_last)
    if args.load_from:
        models.load_weights(model, train.load_checkpoint(args.load_from)["state_dict"])
    source = train.Data(**config["data"]).to(device)
    began = time.perf_counter()
    result = train.evaluate(
        model,
        source,
        device,
        train.Evaluation(**config["evaluation"]),
        lambda: torch.autocast(device.type, low, enabled=low is not None),
    )
    return {
        "images": len(source.val),
        "images_per_s": len(source.val) / (time.perf_counter() - began),
        "mIoU": result["mIoU"],
        "confusion": result["confusion"],
    }


def resume(args: argparse.Namespace) -> dict:
    """From the start of the command to the end of the first step: resumed at --iteration and at 0, three times each in turns."""
    import torch

    def first_step(*argv) -> float:
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--config",
            args.config,
            "--no-validate",
            *argv,
        ]
        began = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Iter ["):
                    seconds = time.perf_counter() - began
                    process.kill()
                    return seconds
        raise RuntimeError("".join(lines))

    options, seconds = ["--options", *args.options, "log.interval=1"], {0: [], args.iteration: []}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "train.py"),
                "--config",
                args.config,
                "--work-dir",
                folder,
                "--no-validate",
                *options,
                "schedule.max_iters=1",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        content = torch.load(Path(folder) / "latest.pth", weights_only=True)
        for number, iteration in enumerate(3 * list(seconds)):
            path = Path(folder) / "at.pth"
            torch.save(content | {"iteration": iteration}, path)
            seconds[iteration].append(
                first_step(
                    "--work-dir",
                    f"{folder}/{number}",
                    "--resume-from",
                    str(path),
                    *options,
                    f"schedule.max_iters={args.iteration + 1000}",
                )
            )
    return {
        "iteration": args.iteration,
        "s_at_0": statistics.median(seconds[0]),
        "s_at_iteration": statistics.median(seconds[args.iteration]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["start", "data", "step", "eval", "resume"])
    parser.add_argument("--config", default=str(ROOT / "configs/pspnet_r18-d8_360x360_camvid.json"))
    parser.add_argument("--options", nargs="+", default=[])
    (
        parser.add_argument("--root"),
        parser.add_argument("--cache"),
        parser.add_argument("--load-from"),
    )
    (
        parser.add_argument("--count", type=int, default=64),
        parser.add_argument("--workers", type=int),
        parser.add_argument("--batch", type=int, default=4),
    )
    (
        parser.add_argument("--size", type=int, nargs=2, default=(360, 360)),
        parser.add_argument("--precision", default="auto"),
    )
    (
        parser.add_argument("--steps", type=int, default=10),
        parser.add_argument("--warmup", type=int, default=3),
    )
    parser.add_argument("--iteration", type=int, default=39000)
    arguments = parser.parse_args()
    print(
        json.dumps({"eval": evaluate}.get(arguments.what, globals().get(arguments.what))(arguments))
    )
