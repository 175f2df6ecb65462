"""Measures one aspect of the code on this machine and prints one JSON line.

python tests/benchmark.py start
    seconds to import and to build PSPNet-R50
python tests/benchmark.py data --root R --count 64 [--cache D]
    training samples a second on one core, PSPNet's Cityscapes pipeline
python tests/benchmark.py data --root R --count 64 --workers 2 [--cache D]
    images a second of the loader with its workers, up to the batch on the device
python tests/benchmark.py step --config C --batch 4 --size 360 360
    seconds an iteration of the training loop on random images, beside those of a bare step
python tests/benchmark.py eval --config C --load-from P
    images a second of the evaluation
python tests/benchmark.py resume --config C --iteration 39000
    seconds from the command to the end of the first iteration of a resumed run
"""

# ruff: noqa: E402  (the clock starts before the imports, which `start` measures)
import time

START = time.perf_counter()

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The modules of the project, and torch, are imported by the measurements, so that `start` sees
# what an import costs.


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------- start


def measure_start(args: argparse.Namespace) -> dict:
    import models

    imported = time.perf_counter() - START
    path = ROOT / "configs" / "pspnet_r50-d8_512x1024_40k_cityscapes.json"
    models.build_model(json.loads(path.read_text())["model"])
    return {"import_s": imported, "import_and_build_s": time.perf_counter() - START}


# -------------------------------------------------------------------------------------------- data


def measure_data(args: argparse.Namespace) -> dict:
    from data import Data

    dataset = Data(
        type="cityscapes",
        root=args.root,
        batch_size=2,
        crop_size=[512, 1024],
        scale=[2048, 1024],
        workers=args.workers or 0,
        cache=args.cache,
    )
    if args.workers:
        return measure_loader(args, dataset)
    return measure_samples(args, dataset)


def measure_loader(args: argparse.Namespace, dataset) -> dict:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = dataset.to(device).train_batches()
    warmup = 3 * args.workers
    if args.cache:  # fill it
        warmup = max(warmup, len(dataset.train))
    for _ in range(warmup):
        next(batches)

    count = args.count // dataset.batch_size
    began = time.perf_counter()
    for _ in range(count):
        dataset.prepare(next(batches), device)
    seconds = time.perf_counter() - began
    return {
        "workers": args.workers,
        "cache": args.cache,
        "images_per_s": count * dataset.batch_size / seconds,
    }


def measure_samples(args: argparse.Namespace, dataset) -> dict:
    import torch

    torch.set_num_threads(1)
    warmup = len(dataset.train) if args.cache else 3
    for position in range(warmup):
        dataset.samples[[position]]

    began = time.perf_counter()
    for position in range(args.count):
        batch = dataset.samples[[position]]
    seconds = (time.perf_counter() - began) / args.count
    color = statistics.median(timed(lambda: dataset.prepare(batch, "cpu")) for _ in range(10))
    return {
        "cache": args.cache,
        "images_per_s_per_core": 1 / seconds,
        "s_per_image": seconds,
        "s_per_image_of_color_on_this_core": color,
    }


# -------------------------------------------------------------------------------------------- step


class Trainer:
    """A model with its optimizer, and one random batch on the device."""

    def __init__(self, args: argparse.Namespace):
        import torch

        import dist_utils
        import models
        import train

        self.config = train.load_config(args.config, args.options)
        self.device = dist_utils.init()
        torch.backends.cudnn.benchmark = True
        self.dtype, self.autocast_dtype = train.choose_precision(args.precision, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.autocast_dtype == torch.float16
        )
        model = models.build_model(self.config["model"]).to(
            device=self.device, dtype=self.dtype, memory_format=torch.channels_last
        )
        self.optimizer = train.build_optimizer(model, **self.config["optimizer"])
        self.model = dist_utils.distribute(model)
        if self.config["compile"]:
            self.model = models.compiled(self.model)

        shape = (args.batch, model.in_channels, *args.size)
        self.image = torch.randn(shape, device=self.device).to(memory_format=torch.channels_last)
        self.label = torch.randint(
            0, model.num_classes, (args.batch, *args.size), device=self.device, dtype=torch.uint8
        )
        self.batches = itertools.repeat((self.image, self.label))
        self.data = SimpleNamespace(accumulate=1, prepare=lambda batch, device: batch)
        self.iteration = 0

    def autocast(self):
        import torch

        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=enabled)

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def train_step(self) -> None:
        """One iteration of the loop of train.py."""
        import torch

        import dist_utils
        import train

        base_lr = self.config["optimizer"]["lr"]
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate(
                self.iteration, base_lr * group["lr_mult"], **self.config["schedule"]
            )
        seed = train.step_seed(self.config["seed"], self.iteration, dist_utils.rank())
        torch.manual_seed(seed)
        losses, *_ = train.forward_backward(
            self.model,
            self.batches,
            self.data,
            self.device,
            self.dtype,
            self.autocast,
            self.scaler,
            stopping=False,
            timeout=600,
        )
        if not math.isfinite(losses["loss"]):
            raise ValueError(losses)
        self.update()
        self.iteration += 1

    def bare_step(self) -> None:
        """The least that a step needs."""
        with self.autocast():
            loss = sum(self.model(self.image, self.label).values())
        self.scaler.scale(loss).backward()
        self.update()


def measure_step(args: argparse.Namespace) -> dict:
    """The two kinds of steps in turns; under torchrun, on every process."""
    import torch

    import dist_utils

    trainer = Trainer(args)
    cuda = trainer.device.type == "cuda"
    repeats = 10 if cuda else 1  # the GPU runs behind the host

    def seconds_per_iteration(step: Callable[[], None]) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / repeats

    for _ in range(args.warmup):
        trainer.train_step()
        trainer.bare_step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    loop = []
    bare = []
    for _ in range(args.steps):
        loop.append(seconds_per_iteration(trainer.train_step))
        bare.append(seconds_per_iteration(trainer.bare_step))

    seconds = statistics.median(loop)
    precision = trainer.autocast_dtype or trainer.dtype
    return {
        "config": args.config,
        "precision": str(precision).removeprefix("torch."),
        "batch": args.batch,
        "size": args.size,
        "s_per_iter": seconds,
        "images_per_s": args.batch * dist_utils.world_size() / seconds,
        "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "process_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "bare_s_per_iter": statistics.median(bare),
        "loop_over_bare": statistics.median(a / b for a, b in zip(loop, bare)),
    }


# -------------------------------------------------------------------------------------------- eval


def measure_eval(args: argparse.Namespace) -> dict:
    import torch

    import dist_utils
    import models
    import train

    config = train.load_config(args.config, args.options)
    device = dist_utils.init()
    _, dtype = train.choose_precision(args.precision, device)
    model = models.build_model(config["model"]).to(device=device, memory_format=torch.channels_last)
    if args.load_from:
        models.load_weights(model, train.load_checkpoint(args.load_from)["state_dict"])
    dataset = train.Data(**config["data"]).to(device)

    began = time.perf_counter()
    result = train.evaluate(
        model,
        dataset,
        device,
        train.Evaluation(**config["evaluation"]),
        lambda: torch.autocast(device.type, dtype, enabled=dtype is not None),
    )
    return {
        "images": len(dataset.val),
        "images_per_s": len(dataset.val) / (time.perf_counter() - began),
        "mIoU": result["mIoU"],
        "confusion": result["confusion"],
    }


# ------------------------------------------------------------------------------------------ resume


def train_command(args: argparse.Namespace, *argv: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        args.config,
        "--no-validate",
        *argv,
        "--options",
        *args.options,
        "log.interval=1",
    ]


def seconds_to_first_step(command: list[str]) -> float:
    """Seconds from the start of a run to its first line in the log; the run is killed then."""
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


def measure_resume(args: argparse.Namespace) -> dict:
    """Resumes at iteration 0 and at --iteration, three times each, in turns."""
    import torch

    seconds = {0: [], args.iteration: []}
    with tempfile.TemporaryDirectory() as folder:
        command = [*train_command(args, "--work-dir", folder), "schedule.max_iters=1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        content = torch.load(Path(folder) / "latest.pth", weights_only=True)
        for number, iteration in enumerate(3 * list(seconds)):
            path = f"{folder}/resumed.pth"
            torch.save(content | {"iteration": iteration}, path)
            command = [
                *train_command(args, "--work-dir", f"{folder}/{number}", "--resume-from", path),
                f"schedule.max_iters={args.iteration + 1000}",
            ]
            seconds[iteration].append(seconds_to_first_step(command))
    return {
        "iteration": args.iteration,
        "s_at_0": statistics.median(seconds[0]),
        "s_at_iteration": statistics.median(seconds[args.iteration]),
    }


# ------------------------------------------------------------------------------------ command line

MEASUREMENTS = {
    "start": measure_start,
    "data": measure_data,
    "step": measure_step,
    "eval": measure_eval,
    "resume": measure_resume,
}


def parse_args() -> argparse.Namespace:
    camvid = ROOT / "configs" / "pspnet_r18-d8_360x360_camvid.json"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=MEASUREMENTS)
    parser.add_argument("--config", default=str(camvid))
    parser.add_argument("--options", nargs="+", default=[])
    parser.add_argument("--root")
    parser.add_argument("--cache")
    parser.add_argument("--load-from")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(360, 360))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--iteration", type=int, default=39000)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    print(json.dumps(MEASUREMENTS[args.what](args)))
