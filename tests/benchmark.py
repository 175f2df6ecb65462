"""Measures one thing and prints one JSON line, so that it can be set beside another code on the same work.

    python tests/benchmark.py start                                         seconds to import and to build PSPNet-R50
    python tests/benchmark.py data --root R --count 64 [--cache D]          training samples a second on one core, PSPNet's Cityscapes pipeline
    python tests/benchmark.py data --root R --count 64 --workers 2          the loader as a whole: batches on the device
    python tests/benchmark.py step --config C --batch 4 --size 360 360      seconds an iteration of the training loop on random images
    python tests/benchmark.py eval --config C --load-from P                 images a second of the evaluation
    python tests/benchmark.py resume --config C --iteration 39000           seconds from the start to the first step of a resumed run
"""
import time

T0 = time.perf_counter()
import argparse  # noqa: E402
import contextlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def start(args: argparse.Namespace) -> dict:
    import models
    imported = time.perf_counter() - T0
    models.build_model(json.loads((ROOT / "configs/pspnet_r50-d8_512x1024_40k_cityscapes.json").read_text())["model"])
    return {"import_s": imported, "import_and_build_s": time.perf_counter() - T0}


def data(args: argparse.Namespace) -> dict:
    import torch

    from data import Data
    source = Data(type="cityscapes", root=args.root, batch_size=2, crop_size=[512, 1024], scale=[2048, 1024], workers=args.workers or 0, cache=args.cache)
    if args.workers:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batches = source.train_batches(0, 1, 0)
        for _ in range(3 * args.workers):
            source.prepare(next(batches), device)
        began = time.perf_counter()
        for _ in range(args.count // 2):
            source.prepare(next(batches), device)
        return {"workers": args.workers, "cache": args.cache, "images_per_s": args.count // 2 * 2 / (time.perf_counter() - began)}
    torch.set_num_threads(1)
    samples = source.train_samples()
    for position in range(-(-len(source.train) // 8) * 8 if args.cache else 3):  # fills the cache
        samples[position]
    began = time.perf_counter()
    for position in range(args.count):
        samples[position]
    return {"cache": args.cache, "images_per_s_per_core": args.count / (time.perf_counter() - began)}


def step(args: argparse.Namespace) -> dict:
    """The loop of train.py, its logging left out, on one random batch; on every process under torchrun."""
    import torch

    import dist_utils
    import models
    import train
    config = train.load_config(args.config, args.options)
    device = dist_utils.init()
    torch.backends.cudnn.benchmark = True
    dtype, low = train.choose_precision(args.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=low == torch.float16)
    model = models.build_model(config["model"]).to(device=device, dtype=dtype, memory_format=torch.channels_last)
    optimizer = train.build_optimizer(model, **config["optimizer"])
    net = dist_utils.distribute(model)
    net = torch.compile(net) if config["compile"] else net
    image = torch.randn(args.batch, model.in_channels, *args.size, device=device).to(memory_format=torch.channels_last)
    label = torch.randint(0, model.num_classes, (args.batch, *args.size), device=device)
    source = SimpleNamespace(accumulate=1, prepare=lambda batch, device: batch)

    def autocast():
        return torch.autocast(device.type, low, enabled=low is not None)

    def one() -> None:
        train.forward_backward(net, itertools.repeat((image, label)), source, device, dtype, autocast, scaler, False, 600)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def timed() -> float:
        began = time.perf_counter()
        one()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
    for _ in range(args.warmup):
        one()
    seconds = statistics.median(timed() for _ in range(args.steps))
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"config": args.config, "precision": str(low or dtype).removeprefix("torch."), "batch": args.batch, "size": args.size, "s_per_iter": seconds,
            "images_per_s": args.batch * dist_utils.world() / seconds, "gpu_memory_gib": memory}


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
    source = train.Data(**config["data"])
    began = time.perf_counter()
    result = train.evaluate(model, source, device, train.Evaluation(**config["evaluation"]), lambda: torch.autocast(device.type, low, enabled=low is not None))
    return {"images": len(source.val), "images_per_s": len(source.val) / (time.perf_counter() - began), "mIoU": result["mIoU"], "confusion": result["confusion"]}


def resume(args: argparse.Namespace) -> dict:
    """From main's start to the end of the first step, once at --iteration and once at 0, both from a checkpoint."""
    import torch

    import train

    class FirstStep(Exception):
        pass

    def leave(*arguments) -> None:
        raise FirstStep
    with tempfile.TemporaryDirectory() as folder:
        options = [*args.options, "evaluation.interval=100000000"]
        train.main(["--config", args.config, "--work-dir", folder, "--no-validate", "--options", *options, "schedule.max_iters=1"])
        content = torch.load(Path(folder) / "latest.pth", weights_only=True)
        train.report = leave
        seconds = {}
        for iteration in (0, args.iteration, 0, args.iteration, 0, args.iteration):
            path = Path(folder) / "at.pth"
            torch.save(content | {"iteration": iteration}, path)
            began = time.perf_counter()
            with contextlib.suppress(FirstStep):
                train.main(["--config", args.config, "--work-dir", f"{folder}/resumed", "--no-validate", "--resume-from", str(path), "--options", *options,
                            f"schedule.max_iters={args.iteration + 1000}", "log.interval=1"])
            seconds.setdefault(iteration, []).append(time.perf_counter() - began)
    return {"iteration": args.iteration, "s_at_0": statistics.median(seconds[0]), "s_at_iteration": statistics.median(seconds[args.iteration])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "data", "step", "eval", "resume"])
    parser.add_argument("--config", default=str(ROOT / "configs/pspnet_r18-d8_360x360_camvid.json"))
    parser.add_argument("--options", nargs="+", default=[])
    parser.add_argument("--root"), parser.add_argument("--cache"), parser.add_argument("--load-from")
    parser.add_argument("--count", type=int, default=64), parser.add_argument("--workers", type=int), parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(360, 360)), parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=10), parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--iteration", type=int, default=39000)
    arguments = parser.parse_args()
    print(json.dumps({"eval": evaluate}.get(arguments.what, globals().get(arguments.what))(arguments)))
