"""Measure one aspect of the code on this machine and print one JSON line.

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
python tests/benchmark.py gpu [--peer PATH/mmseg_peer.py]
    a table of all that matters on a GPU, as JSON and Markdown
"""

# ruff: noqa: E402  (the clock starts before the imports, which `start` measures)
import time

START = time.perf_counter()

import argparse
import dataclasses
import functools
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
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

        self.config = train.read_config(args.config, args.options)
        self.device = dist_utils.init()
        self.precision = train.choose_precision(args.precision, self.device)
        train.set_up_arithmetic(self.precision, deterministic=False)
        dtype, self.autocast_dtype = train.PRECISIONS[self.precision]
        model = models.build_model(self.config.model).to(
            device=self.device, dtype=dtype, memory_format=torch.channels_last
        )
        optimizer = train.build_optimizer(model, **self.config.optimizer)
        scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.autocast_dtype == torch.float16
        )
        self.state = train.TrainState(model, optimizer, scaler)
        self.model = train.wrap(model, self.config)

        shape = (args.batch, model.in_channels, *args.size)
        self.image = torch.randn(shape, device=self.device).to(memory_format=torch.channels_last)
        self.label = torch.randint(
            0, model.num_classes, (args.batch, *args.size), device=self.device, dtype=torch.uint8
        )
        self.batch = {"image": self.image, "label": self.label}
        self.data = SimpleNamespace(prepare=lambda batch, device: (batch["image"], batch["label"]))

    def autocast(self):
        import torch

        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=enabled)

    def train_step(self) -> None:
        """One iteration of the loop of train.py."""
        import torch

        import dist_utils
        import train

        state = self.state
        train.set_learning_rate(state.optimizer, state.iteration, self.config)
        torch.manual_seed(train.step_seed(self.config.seed, state.iteration, dist_utils.rank()))
        losses, _ = train.forward_backward(
            state, self.model, [self.batch], self.data, self.autocast, stopping=False, timeout=600
        )
        if not math.isfinite(losses["loss"]):
            raise ValueError(losses)
        train.optimizer_step(state, self.config.clip_grad)
        state.iteration += 1

    def bare_step(self) -> None:
        """The least that a step needs."""
        with self.autocast():
            loss = sum(self.model(self.image, self.label).values())
        state = self.state
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)


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
    core_seconds = time.process_time()
    for _ in range(args.steps):
        loop.append(seconds_per_iteration(trainer.train_step))
        bare.append(seconds_per_iteration(trainer.bare_step))

    # Of all threads: with OMP_NUM_THREADS=1 about the same on a machine that is busy.
    core_seconds = time.process_time() - core_seconds
    seconds = statistics.median(loop)
    return {
        "config": args.config,
        "precision": trainer.precision,
        "batch": args.batch,
        "size": args.size,
        "s_per_iter": seconds,
        "images_per_s": args.batch * dist_utils.world_size() / seconds,
        "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "process_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "bare_s_per_iter": statistics.median(bare),
        "core_s_per_iter": core_seconds / (2 * repeats * args.steps),
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
    _, dtype = train.PRECISIONS[train.choose_precision(args.precision, device)]
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
    """Resume at iteration 0 and at --iteration, three times each, in turns."""
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


# --------------------------------------------------------------------------------------------- gpu

# Name: config, size of a batch, height and width, MMSegmentation's config.
NETWORKS = {
    "PSPNet-R50": (
        "pspnet_r50-d8_512x1024_40k_cityscapes",
        8,
        (512, 1024),
        "pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py",
    ),
    "DeepLabV3+-R50": (
        "deeplabv3plus_r50-d8_512x1024_40k_cityscapes",
        8,
        (512, 1024),
        "deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py",
    ),
    "SegFormer-B0": (
        "segformer_mit-b0_1024x1024_160k_cityscapes",
        8,
        (1024, 1024),
        "segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py",
    ),
    "UPerNet-R50": (
        "upernet_r50_512x512_80k_ade20k",
        16,
        (512, 512),
        "upernet/upernet_r50_4xb4-80k_ade20k-512x512.py",
    ),
    "UPerNet-Swin-T": (
        "upernet_swin-t_512x512_160k_ade20k",
        16,
        (512, 512),
        "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
    ),
    "HRNet-18": (
        "fcn_hr18_512x1024_40k_cityscapes",
        8,
        (512, 1024),
        "hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py",
    ),
}
# The options of train.py. Compiling comes last: it takes the longest and may fail.
MODES = {
    "auto": ["precision=auto"],
    "with_cp": ["precision=auto", "model.backbone.with_cp=true"],
    "fp32": ["precision=fp32"],
    "tf32": ["precision=tf32"],
    "compile": ["precision=auto", "compile=true"],
}
# What MMSegmentation does in these modes. Without AMP, torch computes convolutions in TF32.
PEER_MODES = {
    "auto": (["--amp"], {}),
    "fp32": ([], {"NVIDIA_TF32_OVERRIDE": "0"}),
    "tf32": ([], {}),
}


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default=str(ROOT / "work_dirs" / "gpu_benchmark"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--limit", type=float, default=1140, help="seconds for the whole table")
    parser.add_argument("--peer", help="the path of mmseg_peer.py")
    parser.add_argument("--peer-python", default=sys.executable, help="with MMSegmentation")
    parser.add_argument("--part", help="measure one part within this process (used by itself)")


def measure_gpu(args: argparse.Namespace) -> dict:
    """The whole table, each part in a process that may fail. Writes OUT.json and OUT.md."""
    if args.part == "machine":
        measure_machine(args)
    elif args.part:
        measure_network(args.part, args)
    else:
        return GpuTable(args).measure()
    return {}


def print_row(**row) -> None:
    """Send a row from a part of the table to the process that collects them."""
    print("ROW " + json.dumps(row), flush=True)


class GpuTable:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.deadline = time.monotonic() + args.limit
        self.rows = []

    def measure(self) -> dict:
        has_peer = self.args.peer is not None and self.peer_is_installed()
        error = self.run_part("machine", 120)
        if error:
            self.add(table="failure", part="machine", error=error)
        for name in self.args.networks:
            error = self.run_part(name, 420)
            steps = [(row["network"], row["mode"]) for row in self.rows if row["table"] == "step"]
            for mode in MODES:
                if error and (name, mode) not in steps:
                    self.add(table="step", network=name, mode=mode, error=error)
        self.measure_loader(has_peer)
        if has_peer:
            for mode in PEER_MODES:
                for name in self.args.networks:
                    self.measure_peer_step(name, mode)
        return {"json": f"{self.args.out}.json", "markdown": f"{self.args.out}.md"}

    def add(self, **row) -> None:
        """Add a row and write both files, so that an end before the last row loses none."""
        self.rows.append(row)
        out = Path(self.args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": sys.argv, "rows": self.rows}
        Path(f"{out}.json").write_text(json.dumps(content, indent=1))
        Path(f"{out}.md").write_text(gpu_markdown(self.rows, ["python", *sys.argv]))

    def run_part(self, part: str, limit: float) -> str | None:
        """Measure a part in its own process. Return why it ended early, if it did."""
        command = [sys.executable, __file__, "gpu", "--part", part, "--device", self.args.device]
        if self.args.quick:
            command.append("--quick")
        return self.run(command, limit, self.add_line)

    def add_line(self, line: str) -> None:
        if line.startswith("ROW "):
            row = json.loads(line.removeprefix("ROW "))
            self.add(**row)
            print(row, file=sys.stderr)

    def run(
        self,
        command: list[str],
        limit: float,
        take: Callable[[str], None],
        env: dict[str, str] | None = None,
    ) -> str | None:
        """Run a command and pass on the lines that it prints. Return what went wrong."""
        limit = min(limit, self.deadline - time.monotonic())
        if limit <= 0:
            return "no time left (--limit)"
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | (env or {}),
                start_new_session=True,
            )
            # Its own group, since torch.compile starts further processes.
            timer = threading.Timer(limit, os.killpg, [process.pid, signal.SIGKILL])
            timer.start()
            with process:
                for line in process.stdout:
                    take(line)
            in_time = timer.is_alive()
            timer.cancel()
            if process.returncode == 0:
                return None
            if not in_time:
                return f"killed after {limit:.0f} s"
            errors.seek(0)
            last_lines = errors.read().strip().splitlines()[-1:]
            return f"exit code {process.returncode}: {''.join(last_lines)[:300]}"

    def run_for_json(self, command: list[str], env: dict[str, str] | None = None) -> dict:
        """The JSON object of a command's last line, or {"error": ...}."""
        lines = []
        error = self.run(command, 300, lines.append, env)
        return {"error": error} if error else json.loads(lines[-1])

    def measure_loader(self, has_peer: bool) -> None:
        """Images a second of PSPNet's Cityscapes pipeline, from PNG files."""
        args = self.args
        workers = 1 if args.quick else min(16, len(os.sched_getaffinity(0)))
        with tempfile.TemporaryDirectory() as folder:
            root = args.root
            if not root:
                root = folder
                write_cityscapes(Path(root), 2 if args.quick else 24)
            command = ["data", "--root", root, "--count", "2" if args.quick else "64"]
            row = self.run_for_json([sys.executable, __file__, *command])
            if has_peer:
                row["peer"] = self.run_for_json([args.peer_python, args.peer, *command])
            self.add(table="loader", workers=0, **row)
            command[-1] = "2" if args.quick else "512"
            command += ["--workers", str(workers)]
            row = self.run_for_json([sys.executable, __file__, *command])
            self.add(table="loader", **{"workers": workers} | row)

    def peer_is_installed(self) -> bool:
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('mmseg') is None)"
        if subprocess.run([self.args.peer_python, "-c", code]).returncode == 0:
            return True
        self.add(table="failure", part="peer", error=f"{self.args.peer_python} has no mmseg")
        return False

    def measure_peer_step(self, name: str, mode: str) -> None:
        """MMSegmentation's figures for one mode of a network."""
        _, batch, size, config = NETWORKS[name]
        if self.args.quick:
            batch, size = QUICK_BATCH, QUICK_SIZE
        options, env = PEER_MODES[mode]
        command = [self.args.peer_python, self.args.peer, "step", "--net", config]
        command += ["--batch", str(batch), "--size", *map(str, size), *options]
        if self.args.quick:
            command += ["--steps", "1", "--warmup", "1"]
        result = self.run_for_json(command, env)
        if "s_per_iter" in result:
            result["images_per_s"] = batch / result["s_per_iter"]
        self.add(table="peer", network=name, mode=mode, **result)


QUICK_BATCH = 2
QUICK_SIZE = (64, 64)


def write_cityscapes(root: Path, count: int, size: tuple[int, int] = (1024, 2048)) -> None:
    """Made-up scenes in the layout of Cityscapes, with noise: PNG files of a real frame's size."""
    import numpy as np
    from PIL import Image

    from data import Synthetic

    scenes = Synthetic("train", size=size)
    rng = np.random.default_rng(0)
    for kind in ("leftImg8bit", "gtFine"):
        (root / kind / "train" / "town").mkdir(parents=True)
    for i in range(count):
        image, label = scenes.load(i)
        noise = rng.normal(0, 1.2, image.shape).round()
        image = (image + noise).clip(0, 255).astype(np.uint8)
        name = f"town_{i:06d}_000019"
        images = root / "leftImg8bit" / "train" / "town"
        labels = root / "gtFine" / "train" / "town"
        Image.fromarray(image).save(images / f"{name}_leftImg8bit.png")
        Image.fromarray(label).save(labels / f"{name}_gtFine_labelTrainIds.png")


def measure_machine(args: argparse.Namespace) -> None:
    """Versions, and the speed of a large matrix product in each precision."""
    import torch

    import train

    device = torch.device(args.device)
    n = 512 if args.quick else 8192
    print_row(table="machine", versions=train.versions(), cores=len(os.sched_getaffinity(0)))
    auto = train.choose_precision("auto", device)
    for precision in dict.fromkeys((auto, "fp32", "tf32")):
        train.set_up_arithmetic(precision, deterministic=False)
        dtype, low_precision = train.PRECISIONS[precision]
        a, b = torch.randn(2, n, n, device=device, dtype=low_precision or dtype)
        seconds = seconds_per_call(functools.partial(torch.mm, a, b), device, args.quick)
        print_row(table="peak", precision=precision, n=n, tflops=2 * n**3 / seconds / 1e12)


def seconds_per_call(function: Callable[[], object], device, quick: bool) -> float:
    """The median over windows of calls, after a warm-up. In a window the GPU may lag behind."""
    import torch

    def window(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / calls

    if quick:
        return window(1)
    window(5)
    return statistics.median(window(5) for _ in range(5))


def measure_network(name: str, args: argparse.Namespace) -> None:
    """Print the rows of one network: a step in each mode, a profile and the evaluation."""
    import gc

    import torch

    for mode in MODES:
        row = {"table": "step", "network": name, "mode": mode}
        try:
            trainer = GpuTrainer(name, mode, args)
            print_row(**row, **trainer.measure())
            if mode == "auto":
                print_row(table="profile", network=name, **trainer.profile())
                print_row(table="evaluation", network=name, **trainer.measure_evaluation())
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            print_row(**row, error=f"{type(error).__name__}: {text[0][:300]}")
        trainer = None
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()


class GpuTrainer:
    """A network in one mode, as train.py sets it up, and one random batch on the device."""

    def __init__(self, name: str, mode: str, args: argparse.Namespace):
        import torch

        import models
        import train

        config_name, self.batch, self.size, _ = NETWORKS[name]
        self.quick = args.quick
        options = list(MODES[mode])
        if self.quick:
            self.batch, self.size = QUICK_BATCH, QUICK_SIZE
            options.append(f"data.crop_size={list(self.size)}")
        self.config = train.read_config(ROOT / "configs" / f"{config_name}.json", options)
        self.device = torch.device(args.device)
        # As torch starts: `set_up_arithmetic` of an earlier mode may have changed these.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True
        self.precision = train.choose_precision(self.config.precision, self.device)
        train.set_up_arithmetic(self.precision, deterministic=False)
        self.dtype, self.low_precision = train.PRECISIONS[self.precision]

        torch.manual_seed(0)
        model = models.build_model(self.config.model).train()
        model = model.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last)
        optimizer = train.build_optimizer(model, **self.config.optimizer)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.low_precision == torch.float16)
        self.state = train.TrainState(model, optimizer, scaler)
        self.model = model
        if self.config.compile:
            # Trying the command need not wait for a compiler.
            self.model = models.compiled(model, **{"backend": "eager"} if self.quick else {})
        image = torch.randn(self.batch, 3, *self.size, device=self.device)
        label = torch.randint(
            0, model.num_classes, (self.batch, *self.size), device=self.device, dtype=torch.uint8
        )
        image = image.contiguous(memory_format=torch.channels_last)
        self.random_batch = {"image": image, "label": label}
        self.data = SimpleNamespace(prepare=lambda batch, device: (batch["image"], batch["label"]))

    def autocast(self):
        import torch

        enabled = self.low_precision is not None
        return torch.autocast(self.device.type, self.low_precision, enabled=enabled)

    def step(self) -> None:
        """One iteration of the loop of train.py."""
        import torch

        import train

        state = self.state
        train.set_learning_rate(state.optimizer, state.iteration, self.config)
        torch.manual_seed(train.step_seed(0, state.iteration, 0))
        losses, _ = train.forward_backward(
            state, self.model, [self.random_batch], self.data, self.autocast, False, 600.0
        )
        if not math.isfinite(losses["loss"]):
            raise ValueError(f"the loss is not finite: {losses}")
        train.optimizer_step(state, self.config.clip_grad)
        state.iteration += 1

    def measure(self) -> dict:
        import torch

        is_cuda = self.device.type == "cuda"
        began = time.perf_counter()
        self.step()
        first = time.perf_counter() - began
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_call(self.step, self.device, self.quick)
        memory = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None
        return {
            "precision": self.precision,
            "batch": self.batch,
            "size": self.size,
            "first_step_s": first,
            "s_per_iter": seconds,
            "images_per_s": self.batch / seconds,
            "gpu_memory_gib": memory,
            "tflops": self.flops() / seconds / 1e12,
        }

    def flops(self) -> int:
        """Of a step: backward, for inputs and weights, takes twice what forward takes."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        import models

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = models.build_model(self.config.model)
            label = torch.zeros(self.batch, *self.size, dtype=torch.uint8)
            model(torch.zeros(self.batch, 3, *self.size), label)
        return 3 * counter.get_total_flops()

    def profile(self) -> dict:
        """Which share of the time no kernel runs, and which kernels take the most time."""
        from torch.profiler import ProfilerActivity, profile, schedule

        is_cuda = self.device.type == "cuda"
        activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
        kind = "kernel" if is_cuda else "cpu_op"
        warmup, steps = (1, 1) if self.quick else (2, 3)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            with profile(
                activities=[activity],
                schedule=schedule(wait=0, warmup=warmup, active=steps, repeat=1),
                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            ) as profiler:
                for _ in range(warmup + steps):
                    self.step()
                    profiler.step()
            events = json.loads(path.read_text())["traceEvents"]
        return summarize([event for event in events if event.get("cat") == kind], steps)

    def measure_evaluation(self) -> dict:
        """Whole images of the data set's usual size, by the `evaluation` section of the config."""
        import torch

        import train

        height, width = (1024, 2048) if "cityscapes" in self.config.data["type"] else (512, 683)
        evaluation = self.config.evaluation
        if self.quick:
            height, width = 64, 96
            if evaluation.mode == "slide":
                evaluation = dataclasses.replace(evaluation, crop_size=(64, 64), stride=(48, 48))
        image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        label = torch.randint(0, self.state.model.num_classes, (1, height, width)).byte()
        image = image.contiguous(memory_format=torch.channels_last)
        if self.device.type == "cuda":
            image, label = image.pin_memory(), label.pin_memory()
        batch = {"image": image, "label": label, "index": torch.tensor([0])}
        section = {"type": "synthetic", "batch_size": 1, "crop_size": [64, 64]}
        synthetic = train.Data(**section).to(self.device)
        data = SimpleNamespace(
            classes=range(self.state.model.num_classes),
            val=synthetic.val,
            prepare=synthetic.prepare,
        )

        def evaluate(count: int) -> float:
            data.val_batches = lambda *arguments: [batch] * count
            return timed(
                lambda: train.evaluate(
                    self.state.model, data, self.device, evaluation, self.autocast
                )
            )

        count = 1 if self.quick else 20
        if not self.quick:
            evaluate(4)
        return {
            "precision": self.precision,
            "mode": evaluation.mode,
            "size": (height, width),
            "images_per_s": count / evaluate(count),
        }


def summarize(kernels: list[dict], steps: int, count: int = 12) -> dict:
    """Of the kernels in a trace; their times are in microseconds."""
    spans = sorted((kernel["ts"], kernel["ts"] + kernel["dur"]) for kernel in kernels)
    busy = 0.0
    end = spans[0][0]
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    total = end - spans[0][0]
    by_name = {}
    for kernel in kernels:
        by_name[kernel["name"]] = by_name.get(kernel["name"], 0.0) + kernel["dur"]
    longest = sorted(by_name.items(), key=lambda item: item[1], reverse=True)[:count]
    return {
        "idle_share": 1 - busy / total,
        "kernels_per_step": len(kernels) / steps,
        "busy_ms_per_step": busy / steps / 1e3,
        "longest": [(name, duration / steps / 1e3) for name, duration in longest],
    }


# ----------------------------------------------------------------------------- gpu: as Markdown


def gpu_markdown(rows: list[dict], command: list[str]) -> str:
    """The rows as tables of Markdown."""
    tables = {}
    for row in rows:
        tables.setdefault(row["table"], []).append(row)
    text = []
    for row in tables.get("machine", []):
        versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items())
        text += [f"{versions}; {row['cores']} cores", ""]
    text += [f"`{' '.join(command)}`", ""]
    peaks = {row["precision"]: row["tflops"] for row in tables.get("peak", [])}
    figures = ", ".join(f"{name} {tflops:.1f}" for name, tflops in peaks.items())
    text += [f"A large matrix product, TFLOP/s: {figures}", ""]
    idle = {row["network"]: row["idle_share"] for row in tables.get("profile", [])}
    peer = {(row["network"], row["mode"]): row for row in tables.get("peer", [])}
    text += markdown_table(
        "network,batch,mode,precision,images/s,ms,GiB,share of the peak,no kernel runs,"
        "peer's images/s,peer's GiB,times the peer",
        [step_cells(row, peaks, idle, peer) for row in tables.get("step", [])],
    )
    text += markdown_table(
        "network,evaluation,size,precision,images/s",
        map(evaluation_cells, tables.get("evaluation", [])),
    )
    text += markdown_table(
        "loader,images/s,peer's images/s", map(loader_cells, tables.get("loader", []))
    )
    text += markdown_table("failed,error", map(failure_cells, tables.get("failure", [])))
    for row in tables.get("profile", []):
        text += markdown_table(
            f"{row['network']}: kernel,ms a step",
            [(f"`{name[:90]}`", f"{ms:.2f}") for name, ms in row["longest"]],
        )
    return "\n".join(text)


def markdown_table(header: str, rows: Iterable[Sequence]) -> list[str]:
    """Lines of a table, or none if it has no rows. header: names with commas between them."""
    names = header.split(",")
    lines = []
    for cells in (names, ["---"] * len(names), *rows):
        texts = [str(cell).replace("|", "/") for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return [*lines, ""] if len(lines) > 2 else []


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def step_cells(row: dict, peaks: dict, idle: dict, peer: dict) -> list:
    network, mode = row["network"], row["mode"]
    peer = peer.get((network, mode), {})
    peer_speed = peer.get("images_per_s")
    peer_cells = [
        peer.get("error") or number(peer_speed, ".1f"),
        number(peer.get("gpu_memory_gib"), ".1f"),
    ]
    if "error" in row:
        return [network, "", mode, "", row["error"], "", "", "", "", *peer_cells, ""]
    speed = row["images_per_s"]
    peak = peaks.get(row["precision"])
    height, width = row["size"]
    return [
        network,
        f"{row['batch']} x {height} x {width}",
        mode,
        row["precision"],
        number(speed, ".1f"),
        number(1000 * row["s_per_iter"], ".1f"),
        number(row["gpu_memory_gib"], ".1f"),
        number(row["tflops"] / peak if peak else None, ".0%"),
        number(idle.get(network) if mode == "auto" else None, ".0%"),
        *peer_cells,
        number(speed / peer_speed if peer_speed else None, ".2f"),
    ]


def evaluation_cells(row: dict) -> list:
    height, width = row["size"]
    speed = number(row["images_per_s"], ".1f")
    return [row["network"], row["mode"], f"{height} x {width}", row["precision"], speed]


def loader_cells(row: dict) -> list:
    """One core alone, or workers and the copy to the device."""
    name = f"{row['workers']} workers" if row["workers"] else "one core"
    speed = row.get("images_per_s", row.get("images_per_s_per_core"))
    peer = row.get("peer") or {}
    peer_speed = peer.get("error") or number(peer.get("images_per_s_per_core"), ".1f")
    return [name, row.get("error") or number(speed, ".1f"), peer_speed]


def failure_cells(row: dict) -> list:
    return [row["part"], row["error"]]


# ------------------------------------------------------------------------------------ command line

MEASUREMENTS = {
    "start": measure_start,
    "data": measure_data,
    "step": measure_step,
    "eval": measure_eval,
    "resume": measure_resume,
    "gpu": measure_gpu,
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
    add_gpu_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    print(json.dumps(MEASUREMENTS[args.what](args)))
