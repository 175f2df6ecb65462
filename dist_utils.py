"""Distributed training: start-up, collectives, synchronized batch norm and stop signals.

Everything also works without a process group: a single process is rank 0 of 1.
"""

import contextlib
import datetime
import inspect
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable

# Libraries read these variables when they are loaded, and this module is the first to load torch.
# Without a limit on spinning, the OpenMP threads of processes that share cores block each other.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
# Images of many sizes, as in validation, would fragment the GPU's memory.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import _functions
from torch.nn.modules.batchnorm import _BatchNorm

# torch 2.14 renamed all_gather_into_tensor.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class UserError(Exception):
    """An error that the user can fix; printed without a traceback.

    The message says what is wrong, where, and what to do about it.
    """


class ProcessError(UserError):
    """The processes cannot start, or one of them was lost."""


def is_communication_error(error: Exception) -> bool:
    """Return whether a collective failed, usually because another process is gone."""
    # gloo raises plain RuntimeErrors that mention its name.
    return isinstance(error, (dist.DistError, ProcessError)) or "gloo" in str(error).lower()


# ---------------------------------------------------------------------------------------- Start-up


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def init(store: dist.Store | None = None, timeout: float = 600) -> torch.device:
    """Join the process group that torchrun or launch_slurm.py set up. Return this rank's device.

    GPUs communicate through NCCL, CPUs through gloo; DIST_BACKEND in the environment overrides
    that. A single process needs no group, and another call changes nothing.

    store: where the ranks meet, instead of at MASTER_ADDR:MASTER_PORT.
    timeout: seconds to wait for the other ranks, here and in every collective.
    """
    _check_launcher()
    device = _select_device()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    _check_environment(needs_address=store is None)
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    limit = datetime.timedelta(seconds=timeout)
    backend = os.environ.get("DIST_BACKEND", "nccl" if device.type == "cuda" else "gloo")
    try:
        if store is None:
            shared_store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            store = _store_for_this_start(shared_store, rank, world_size, timeout)
        dist.init_process_group(
            backend,
            timeout=limit,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if backend == "nccl" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessError(
            f"rank {rank} cannot meet the other ranks at {address}: {str(error).splitlines()[0]}\n"
            "If another job uses that port, choose a free one (torchrun --standalone, or "
            "--master_port). Otherwise check that all ranks were started and can reach rank 0's "
            "machine under that name."
        ) from None
    except RuntimeError as error:
        if "gloo" not in str(error).lower():
            raise
        raise ProcessError(
            f"rank {rank} cannot connect to the other ranks: {str(error).splitlines()[0]}\n"
            "The last lines that they printed may say why."
        ) from None
    return device


def _check_launcher() -> None:
    """Raise ProcessError if srun or mpirun started several tasks that do not know each other."""
    if "WORLD_SIZE" in os.environ:
        return
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(name, "1")
        if tasks.isdecimal() and int(tasks) > 1:
            raise ProcessError(
                f"srun or mpirun started {tasks} tasks ({name}), of which each would train alone. "
                "Let launch_slurm.py start the tasks, or one torchrun per node "
                "(srun --ntasks-per-node=1 torchrun ...). If each task is meant to be a run of its "
                "own, set WORLD_SIZE=1."
            )


def _select_device() -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        # torchrun limits each process to one thread, however many cores there are.
        if local_world_size > 1:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // local_world_size))
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if os.environ.get("DIST_BACKEND") == "gloo":
        local_rank %= gpus  # processes may share a GPU, which NCCL refuses
    elif gpus == 1 and "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        local_rank = 0  # Slurm showed this task its own GPU only (--gpus-per-task, --gpu-bind)
    if local_rank >= gpus:
        raise ProcessError(
            f"process {local_rank} on this machine has no GPU: there are {local_world_size} "
            f"processes but {gpus} visible GPUs. Start with --nproc_per_node={gpus}, or under "
            "Slurm let each task see all GPUs of its node."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _check_environment(needs_address: bool) -> None:
    """Raise ProcessError if a variable that torchrun sets is missing."""
    required = ["RANK", "LOCAL_RANK"]
    if needs_address:
        required += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in required if name not in os.environ]
    if missing:
        raise ProcessError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, but there is no "
            f"{', '.join(missing)}. Start several processes with torchrun or launch_slurm.py; "
            "to run a single process, unset WORLD_SIZE."
        )


def _store_for_this_start(
    store: dist.Store, rank: int, world_size: int, timeout: float
) -> dist.Store:
    """Return the part of `store` under a prefix that no earlier start of this run has used.

    torchrun 2.14 keeps its store across --max-restarts, so the store may still hold the addresses
    of dead processes. The ranks therefore agree on a new random prefix:

    1. Rank 0 proposes a prefix.
    2. Every other rank answers with the prefix that it reads and a random token of its own.
    3. Once every answer names its prefix, rank 0 confirms by listing the answers under it.
    4. A rank that finds its own answer listed is done. Otherwise it read a prefix left over from
       an earlier start, and answers again.
    """
    token = uuid.uuid4().hex
    deadline = time.monotonic() + timeout

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def pause(missing_rank: int) -> None:
        if time.monotonic() > deadline:
            raise ProcessError(
                f"rank {missing_rank} did not start within {timeout:.0f} s (the config's timeout); "
                "its last output may say why"
            )
        time.sleep(0.05)

    if rank == 0:
        store.set("prefix", token)
        answers = []
        for other in range(1, world_size):
            while not (answer := read(f"answer/{other}")).startswith(token):
                pause(other)
            answers.append(answer)
        store.set(token, "\n".join(answers))
        return dist.PrefixStore(token, store)
    while True:
        prefix = read("prefix")
        answer = f"{prefix} {token}"
        if prefix and answer in read(prefix):
            return dist.PrefixStore(prefix, store)
        store.set(f"answer/{rank}", answer)
        pause(0)


def is_first_to_report(message: str) -> bool:
    """Return whether no other process of this job on this node has reported this error yet.

    An error in the config is found by every process, but need not be printed by each. Asks the
    store of torchrun, which outlives the processes; without one the answer is True.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    node = os.environ.get("GROUP_RANK", "0")
    key = f"reported/{restart}/{node}/{uuid.uuid5(uuid.NAMESPACE_OID, message)}"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=5),
        )
        return store.add(key, 1) == 1
    except (RuntimeError, ValueError, KeyError):
        return True


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- Collectives


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(vector: Tensor) -> Tensor:
    """Return every process's `vector` (C), as rows: (world_size, C).

    For small vectors this is twice as fast as gloo's all_reduce, and the rows can be summed in an
    order that never changes.
    """
    if torch.compiler.is_compiling():
        # The functional form, which torch.compile can trace.
        from torch.distributed._functional_collectives import all_gather_tensor

        return all_gather_tensor(vector, 0, dist.group.WORLD).view(world_size(), -1)
    gathered = vector.new_empty(world_size() * len(vector))
    _all_gather_single(gathered, vector)
    return gathered.view(world_size(), -1)


def broadcast_object(value: object) -> object:
    """Return rank 0's `value`, small and picklable, on every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def all_gather_object(value: object) -> list:
    """Return every process's `value`, small and picklable, in the order of the ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


class AsyncMean:
    """The mean of a small vector over all processes, computed while the device does other work.

    The reduction starts at once, and changes `vector`. `result()` waits for this vector only, not
    for work that was queued on the device after it.
    """

    def __init__(self, vector: Tensor, timeout: float = 600):
        self.timeout = timeout
        self.work = None
        self.event = None
        if world_size() > 1:
            vector /= world_size()
            self.work = dist.all_reduce(vector, async_op=True)
        if vector.is_cuda:
            if self.work is not None:
                self.work.wait()  # blocks the stream, not the host
            vector = vector.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        self.vector = vector

    def result(self) -> list[float]:
        if self.event is not None:
            # Poll, because event.synchronize() would wait forever for a lost process. Give up
            # before NCCL's watchdog, which kills this process without an explanation.
            deadline = time.monotonic() + 0.8 * self.timeout
            while not self.event.query():
                if time.monotonic() > deadline:
                    raise ProcessError(
                        f"no answer from the other processes for {self.timeout:.0f} s"
                    )
                time.sleep(1e-4)
        elif self.work is not None:
            self.work.wait()
        return self.vector.tolist()


def lost_ranks(patience: float = 5) -> list[int]:
    """Return the ranks that no longer respond. Call it on every rank after a collective failed.

    Each rank that is still running reports to the store, waits `patience` seconds, and reads which
    others have reported.
    """
    store = dist.distributed_c10d._get_default_store()
    alive = []

    def report_and_read() -> None:
        # The store is gone if the process that held it is.
        with contextlib.suppress(RuntimeError):
            store.set(f"alive/{rank()}", "")
            time.sleep(patience)
            for r in range(world_size()):
                if store.check([f"alive/{r}"]):
                    alive.append(r)

    # In a thread, because the store of a suspended process never answers.
    thread = threading.Thread(target=report_and_read, daemon=True)
    thread.start()
    thread.join(2 * patience)
    if not alive:
        return [0]  # rank 0 holds the store
    return [r for r in range(world_size()) if r not in alive]


# ------------------------------------------------------------------------- Synchronized batch norm


def _channel_layout(x: Tensor) -> tuple[list[int], list[int]]:
    """Return all dimensions of `x` but the channels, and the shape that broadcasts (C) over `x`."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    return dims, shape


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C), biased variance (C) and number of values per channel of all processes.

    Statistics are merged as in Chan et al., "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979), with one all_gather.
    """
    dims, _ = _channel_layout(x)
    channels = x.size(1)
    var, mean = torch.var_mean(_upcast(x), dims, correction=0)
    count = mean.new_tensor([x.numel() // channels])
    gathered = all_gather(torch.cat([mean, var, count]))  # (world_size, 2C + 1)
    means, variances, counts = gathered.split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean, var, count


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _SyncBatchNormFunction(torch.autograd.Function):
    """(x - mean) * inv_std * weight + bias, with the gradient of batch norm.

    mean (C), inv_std (C) and count are those of the values of all processes in x, so x has a
    gradient through them too (https://arxiv.org/abs/1502.03167). That takes one all_gather.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, inv_std, count):
        _, shape = _channel_layout(x)
        ctx.save_for_backward(x, weight, mean, inv_std, count)
        y = (_upcast(x) - mean.view(shape)) * (inv_std * weight).view(shape) + bias.view(shape)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, mean, inv_std, count = ctx.saved_tensors
        dims, shape = _channel_layout(x)
        grad_y = grad_y.to(mean.dtype)
        x_hat = (x - mean.view(shape)) * inv_std.view(shape)
        # Gradients (C) of this process only: DDP averages them.
        grad_bias = grad_y.sum(dims)
        grad_weight = (grad_y * x_hat).sum(dims)
        sums = all_gather(torch.cat([grad_bias, grad_weight])).sum(0)  # (2C)
        mean_grad, mean_grad_x_hat = (sums / count).chunk(2)
        grad_x = grad_y - mean_grad.view(shape) - x_hat * mean_grad_x_hat.view(shape)
        grad_x = grad_x * (inv_std * weight).view(shape)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None


class _FusedSyncBatchNormFunction(_functions.SyncBatchNorm):
    """What nn.SyncBatchNorm computes with on GPUs, without making the host wait.

    The host waits in torch's own forward, because it leaves out processes without images by a
    mask whose result has a size that depends on its values. Here every process has images.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, momentum, group, world_size):
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        channels = x.size(1)
        mean, inv_std = torch.batch_norm_stats(x, eps)
        count = torch.full_like(mean[:1], x.numel() // channels)
        gathered = all_gather(torch.cat([mean, inv_std, count]))  # (world_size, 2C + 1)
        means, inv_stds, counts = gathered.split([channels, channels, 1], dim=1)
        mean, inv_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inv_stds, running_mean, running_var, momentum, eps, counts.view(-1)
        )
        ctx.save_for_backward(x, weight, mean, inv_std, counts.to(torch.int32))
        ctx.process_group = group
        return torch.batch_norm_elemt(x, weight, bias, mean, inv_std, eps)


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, on CPUs and GPUs.

    (N, C, ...) -> the same shape. Up to rounding, the statistics are those of a single process
    with the whole batch. On GPUs it uses torch's fused kernels, unless it is compiled.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if self.track_running_stats:
            self.num_batches_tracked += 1
        if x.is_cuda and not torch.compiler.is_compiling():
            return _FusedSyncBatchNormFunction.apply(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.eps,
                self.momentum,
                dist.group.WORLD,
                world_size(),
            )
        weight = x.new_ones(x.size(1)) if self.weight is None else self.weight
        bias = x.new_zeros(x.size(1)) if self.bias is None else self.bias
        with torch.no_grad():
            mean, var, count = _global_statistics(x)
        inv_std = torch.rsqrt(var + self.eps)
        y = _SyncBatchNormFunction.apply(x, weight, bias, mean, inv_std, count)
        if self.track_running_stats:
            unbiased_var = var * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), self.momentum)
        return y


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every batch norm in `model` by a SyncBatchNorm with its parameters and buffers.

    They are not copied, so an optimizer that holds them stays valid. Returns `model`, or its
    replacement if it is itself a batch norm, as nn.SyncBatchNorm.convert_sync_batchnorm does.
    Raises UserError for a class of batch norm that computes something else.
    """
    replacements = {}  # a norm that has several names remains shared
    for name, norm in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(norm, _BatchNorm):
            continue
        if norm not in replacements:
            replacements[norm] = _as_sync_batchnorm(norm)
        if name:
            model.set_submodule(name, replacements[norm])
    return replacements.get(model, model)


class SyncBatchNormAct(SyncBatchNorm):
    """timm's batch norm that is followed by dropout and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def _as_sync_batchnorm(norm: _BatchNorm) -> SyncBatchNorm:
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    sync_class = SyncBatchNorm
    if type(norm).__name__ == "BatchNormAct2d":
        sync_class = SyncBatchNormAct
    elif type(norm).forward not in known:
        raise UserError(
            f"{type(norm).__name__} has a forward() of its own, which would be lost when batch "
            "norm is synchronized over processes. Use nn.BatchNorm2d, followed by what it adds."
        )
    sync = sync_class(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(sync, name, getattr(norm, name))
    for name, module in norm.named_children():  # of BatchNormAct2d
        sync.add_module(name, module)
    return sync.train(norm.training)


def distribute(model: nn.Module) -> nn.Module:
    """Wrap `model` in DDP with synchronized batch norm. A single process gets `model` itself.

    Every process starts with the weights and statistics of rank 0.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = [device] if device.type == "cuda" else None
    model = convert_sync_batchnorm(model)
    # DDP broadcasts the parameters, but the buffers only since torch 2.14.
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    # SyncBN keeps the buffers equal, so DDP need not. torch 2.14 renamed the option.
    ddp = nn.parallel.DistributedDataParallel
    is_renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters
    option = "forward_sync_buffers" if is_renamed else "broadcast_buffers"
    return ddp(model, device_ids, gradient_as_bucket_view=True, **{option: False})


# ------------------------------------------------------------------------------------ Stop signals


class StopSignal:
    """Records a stop signal in `received`, so that the run can save before it stops.

    Schedulers announce preemption and the time limit by SIGUSR1 or SIGUSR2; a terminal that closes
    sends SIGHUP, which stays ignored where it is, as under nohup. To stop all ranks after the same
    iteration, average `received` over them. A second SIGINT (Ctrl-C) raises KeyboardInterrupt.

    Python handles signals in the main thread only. In another thread, nothing is recorded.

        with StopSignal() as stop:
            while not stop.received:  # the number of the signal, or 0
                ...
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    received = 0

    @classmethod
    def set_handlers(cls, handler: Callable | signal.Handlers) -> dict:
        """Set the handler of all these signals. Return the earlier ones, by signal."""
        previous = {}
        for number in cls.SIGNALS:
            is_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not is_nohup:
                previous[number] = signal.signal(number, handler)
        return previous

    def _receive(self, number: int, frame: object) -> None:
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> "StopSignal":
        self.previous = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self.previous = self.set_handlers(self._receive)
        # launch_slurm.py blocks these signals until there is a handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
