"""Processes: their start, synchronized batch norm, averages over them, stop signals. Knows no other module.

Everything works without a process group too: then there is one process, rank 0 of 1.
"""

import contextlib
import datetime
import inspect
import os
import signal
import threading
import time
import uuid

import torch
import torch.distributed as dist
from torch import Tensor, nn


class UserError(Exception):
    """An error that the user can fix. Its message says what is wrong, where, and what to do; it is printed without a traceback."""


class ProcessError(UserError):
    """The processes cannot start, or one of them was lost."""


_all_gather_single = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # its name since torch 2.14
COMMUNICATION = (
    dist.DistError,
    ProcessError,
)  # gloo's own errors are plain RuntimeErrors that say gloo


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init(store: dist.Store | None = None, timeout: float = 600) -> torch.device:
    """Joins the processes that torchrun (or launch_slurm.py) started and returns this one's device; a second call changes nothing.

    NCCL connects GPUs, gloo CPUs. `store`: where the processes meet, in place of MASTER_ADDR and MASTER_PORT.
    `timeout`: seconds that a process waits for the others before it ends with an error.
    """
    local_rank, local_world = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ProcessError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} visible, {local_world} processes. "
                f"Start with --nproc_per_node={torch.cuda.device_count()}."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif local_world > 1:  # torchrun leaves one thread to each process, whatever the machine has
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    missing = [
        name
        for name in ["RANK"] + ["MASTER_ADDR", "MASTER_PORT"] * (store is None)
        if name not in os.environ
    ]
    if missing:
        raise ProcessError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but there is no {', '.join(missing)}. Start several processes by "
            "torchrun or launch_slurm.py; for one alone, unset WORLD_SIZE."
        )
    number, processes, limit = (
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        datetime.timedelta(seconds=timeout),
    )
    try:
        store = store or _store_of_this_start(
            next(dist.rendezvous("env://", timeout=limit))[0], number, processes, timeout
        )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=limit,
            store=store,
            rank=number,
            world_size=processes,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessError(
            f"rank {number} cannot meet the others at {address}: {str(error).splitlines()[0]} If another job "
            "holds that port, choose a free one (torchrun --standalone, or --master_port); if not, see that all were started and that "
            "rank 0's machine can be reached under that name."
        ) from None
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise ProcessError(
            f"rank {number} cannot connect to the others: {str(error).splitlines()[0]} What they printed last may say why."
        ) from None
    return device


def _store_of_this_start(
    store: dist.Store, number: int, processes: int, timeout: float
) -> dist.Store:
    """A part of `store` with nothing of an earlier start in it. torchrun 2.14 keeps its store over --max-restarts, with addresses of the dead.

    Rank 0 names the start, each other process answers with that name and one of its own, rank 0 lists these: what was left behind has other names.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout

    def wait(for_whom: int) -> None:
        if time.monotonic() > end:
            raise ProcessError(
                f"rank {for_whom} did not come within {timeout:.0f} s (the config's timeout): see what it printed last"
            )
        time.sleep(0.05)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if number == 0:
        store.set("start", own)
        answers = []
        for other in range(1, processes):
            while not (answer := read(f"answer/{other}")).startswith(own):
                wait(other)
            answers.append(answer)
        store.set(own, "\n".join(answers))
        return dist.PrefixStore(own, store)
    while True:
        start = read("start")
        answer = f"{start} {own}"
        if start and answer in read(start):
            return dist.PrefixStore(start, store)
        store.set(f"answer/{number}", answer)
        wait(0)


def cleanup() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor: Tensor) -> Tensor:
    """Adds up `tensor` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(thing: object) -> object:
    """Rank 0's `thing` (picklable, small) on every process."""
    things = [thing]
    if world_size() > 1:
        dist.broadcast_object_list(things)
    return things[0]


class AsyncMean:
    """The mean of a small vector over all processes, worked out while the device goes on with other work.

    It starts at once. `result()` waits for this vector alone, never for what was queued on the device after it.
    """

    def __init__(self, vector: Tensor, timeout: float = 600):
        self.timeout, self.work, self.event = timeout, None, None
        if world_size() > 1:
            vector /= world_size()
            self.work = dist.all_reduce(vector, async_op=True)
        if vector.is_cuda:
            if self.work:
                self.work.wait()  # the stream waits, not the host
            vector = vector.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        self.vector = vector

    def result(self) -> list[float]:
        if self.event:
            end = (
                time.monotonic() + 0.8 * self.timeout
            )  # a lost process would leave event.synchronize() waiting for ever
            while not self.event.query():
                if (
                    time.monotonic() > end
                ):  # before NCCL's own watchdog, which would end this process without a word
                    raise ProcessError(
                        f"no answer from the other processes for {self.timeout:.0f} s"
                    )
                time.sleep(1e-4)
        elif self.work:
            self.work.wait()
        return self.vector.tolist()


def all_gather(vector: Tensor) -> Tensor:
    """Every process's `vector` (C): (world_size, C). For small ones twice as fast as gloo's all_reduce, and its sum has one order."""
    rows = vector.new_empty(world_size() * len(vector))
    _all_gather_single(rows, vector)
    return rows.view(world_size(), -1)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over the batches of all processes; one message each way.

    Returns mean and biased variance (C) and the number of values a channel, too. Means are merged as by Chan et al., "Updating formulae and a
    pairwise algorithm for computing sample variances" (1979); the derivative is batch norm's (https://arxiv.org/abs/1502.03167).
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, dims, shape = (
            x.size(1),
            [d for d in range(x.dim()) if d != 1],
            [1, -1] + [1] * (x.dim() - 2),
        )
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        var, mean = torch.var_mean(wide, dims, correction=0)
        found = all_gather(torch.cat([mean, var, mean.new_tensor([x.numel() // channels])]))
        means, variances, counts = (
            found[:, :channels],
            found[:, channels:-1],
            found[:, -1:],
        )  # (world_size, C), (world_size, C), (world_size, 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        return (
            ((wide - mean.view(shape)) * (scale * weight).view(shape) + bias.view(shape)).to(
                x.dtype
            ),
            mean,
            var,
            count,
        )

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)
        gradient, normal = gradient.to(mean.dtype), (x - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight = (
            gradient.sum(dims),
            (gradient * normal).sum(dims),
        )  # (C), of this process: DDP averages them
        a, b = (all_gather(torch.cat([of_bias, of_weight])).sum(0) / count).chunk(2)
        of_x = (gradient - a.view(shape) - normal * b.view(shape)) * (scale * weight).view(shape)
        return of_x.to(x.dtype), of_weight, of_bias, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, for CPUs, which torch.nn.SyncBatchNorm refuses.

    (N, C, ...) -> the same. Its mean and variance are those of one process with the whole batch, up to rounding.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(
                (var * count / (count - 1)).to(self.running_var.dtype), self.momentum
            )
        return y


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Makes every batch norm of `model` synchronous if there are several processes; names and weights stay."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm
    return model


def distribute(model: nn.Module) -> nn.Module:
    """`model` in DDP with synchronized batch norm, every process starting from rank 0's weights and statistics; alone: as it is."""
    if world_size() == 1:
        return model
    synchronize_batch_norm(model)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    device, ddp = next(model.parameters()).device, nn.parallel.DistributedDataParallel
    newer = (
        "forward_sync_buffers" in inspect.signature(ddp).parameters
    )  # which torch 2.14 has in place of broadcast_buffers
    options = {
        "forward_sync_buffers" if newer else "broadcast_buffers": False
    }  # SyncBN keeps them equal
    return ddp(
        model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True, **options
    )


def lost_ranks(patience: float = 5) -> list[int]:
    """Which ranks do not answer, asked when a collective has failed: every process that still runs says so in the store."""
    store, answered = dist.distributed_c10d._get_default_store(), []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the store went down with the process that held it
            store.set(f"alive/{rank()}", "")
            time.sleep(patience)
            answered.extend(r for r in range(world_size()) if store.check([f"alive/{r}"]))

    asking = threading.Thread(
        target=ask, daemon=True
    )  # a store whose process was halted does not even refuse
    asking.start()
    asking.join(2 * patience)
    return [r for r in range(world_size()) if r not in answered] if answered else [0]


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR2 (Slurm's notice ahead of preemption and time limit) instead of dying of them.

    `with StopSignal() as stop:` ... `stop.received` is the signal's number or 0. Ends all processes at the same iteration when each feeds
    it into an average over the processes.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    received = 0

    def _note(self, number: int, frame: object) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C once more
        self.received = number

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, self.SIGNALS
        )  # launch_slurm.py holds them back until someone listens
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
