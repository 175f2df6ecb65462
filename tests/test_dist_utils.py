"""Start-up, collectives, synchronized batch norm and stop signals, in real processes."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    SERVER,
    Run,
    checkpoint,
    free_port,
    metrics,
    rank_environment,
    sibling,
    write_config,
)
from torch import Tensor, nn

import dist_utils
from dist_utils import ProcessError, StopSignal, SyncBatchNorm, convert_sync_batchnorm


def _run_rank(function: Callable, args: tuple, environment: dict[str, str], result: Path) -> None:
    os.environ.update(environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist_utils.init(timeout=60)
    torch.save(function(*args), result)
    dist_utils.cleanup()


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list]:
    """`on_ranks(world_size, function, *args)` -> what `function(*args)` returns on each rank."""

    def start(world_size: int, function: Callable, *args) -> list:
        port = free_port()
        results = [tmp_path / f"rank{rank}.pt" for rank in range(world_size)]
        processes = []
        for rank, result in enumerate(results):
            environment = rank_environment(rank, world_size, port)
            process = SERVER.Process(target=_run_rank, args=(function, args, environment, result))
            process.start()
            processes.append(process)
        for process in processes:
            process.join(120)
            process.kill()
        assert [process.exitcode for process in processes] == [0] * world_size
        return [torch.load(result) for result in results]

    return start


# ------------------------------------------------------------------------------------- Collectives


def collectives() -> dict:
    rank = dist_utils.rank()
    vector = torch.arange(3.0) + 10 * rank
    gathered = dist_utils.all_gather(vector)
    summed = vector.clone()
    assert dist_utils.all_reduce(summed) is summed
    mean = dist_utils.AsyncMean(vector.clone())
    dist_utils.barrier()
    return {
        "world_size": dist_utils.world_size(),
        "rank": rank,
        "all_gather": gathered,
        "all_reduce": summed,
        "mean": mean.result(),
        "object": dist_utils.broadcast_object({"from": rank}),
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives(on_ranks, world_size):
    vectors = torch.stack([torch.arange(3.0) + 10 * rank for rank in range(world_size)])
    for rank, found in enumerate(on_ranks(world_size, collectives)):
        assert found["world_size"] == world_size
        assert found["rank"] == rank
        assert torch.equal(found["all_gather"], vectors)
        assert torch.equal(found["all_reduce"], vectors.sum(0))
        assert found["mean"] == pytest.approx(vectors.mean(0).tolist())
        assert found["object"] == {"from": 0}


def test_a_single_process_needs_no_group():
    vector = torch.arange(3.0)
    model = nn.BatchNorm2d(3)
    assert dist_utils.rank() == 0
    assert dist_utils.world_size() == 1
    assert torch.equal(dist_utils.all_reduce(vector), torch.arange(3.0))
    assert dist_utils.AsyncMean(vector).result() == [0.0, 1.0, 2.0]
    assert dist_utils.broadcast_object("value") == "value"
    assert dist_utils.distribute(model) is model
    dist_utils.barrier()
    dist_utils.cleanup()


# ------------------------------------------------------------------------- Synchronized batch norm


def small_model() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03))
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), block).double()


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 8, 9, generator=generator, dtype=torch.float64)


def train_steps(shares: list[int]) -> dict:
    """Three steps of a model whose rank r sees `shares[r]` of the five images."""
    x = images().split(shares)[dist_utils.rank()]
    model = dist_utils.distribute(small_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        # DDP averages the gradients, so this is the gradient of the mean over all images.
        loss = model(x).square().flatten(1).mean(1).sin().sum() / len(images())
        (loss * dist_utils.world_size()).backward()
        optimizer.step()
    plain = model.module if dist_utils.world_size() > 1 else model
    gradients = {f"{name}.grad": p.grad for name, p in plain.named_parameters()}
    return plain.state_dict() | gradients | {"output": plain.eval()(images())}


@pytest.mark.parametrize("shares", [[2, 3], [1, 1, 3]])
def test_training_equals_one_process_with_the_whole_batch(on_ranks, shares):
    """Weights, gradients, running statistics, and the output in evaluation mode."""
    expected = train_steps([5])
    for found in on_ranks(len(shares), train_steps, shares):
        assert list(found) == list(expected)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-11)


def initial_state() -> dict:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    torch.manual_seed(dist_utils.rank())
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randint(100, tensor.shape))
    return dist_utils.distribute(model).module.state_dict()


def test_all_ranks_start_with_the_weights_and_statistics_of_rank_0(on_ranks):
    first, second = on_ranks(2, initial_state)
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    torch.manual_seed(0)
    assert torch.equal(first["0.weight"].flatten(), torch.randint(100, (6,)).float())


NORMS = {
    "2d": (nn.BatchNorm2d(4), (5, 4, 3, 2)),
    "1d": (nn.BatchNorm1d(4), (5, 4)),
    "1d with length": (nn.BatchNorm1d(4), (5, 4, 7)),
    "3d": (nn.BatchNorm3d(4), (5, 4, 3, 2, 2)),
    "not affine": (nn.BatchNorm2d(4, affine=False), (5, 4, 3, 2)),
    "no running statistics": (nn.BatchNorm2d(4, track_running_stats=False), (5, 4, 3, 2)),
}


def norm_and_input(name: str) -> tuple[nn.Module, Tensor]:
    norm, shape = NORMS[name]
    norm = copy.deepcopy(norm).double()
    torch.manual_seed(2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, torch.randn(shape, dtype=torch.float64) * 3 + 1


def apply_norm(norm: nn.Module, x: Tensor) -> dict:
    """Output and input gradient in training mode, then the output in evaluation mode."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y.sin() * x.detach()).sum().backward()
    return {"y": y.detach(), "grad": x.grad, "eval": norm.eval()(x.detach())}


def apply_norms(shares: list[int]) -> dict:
    found = {}
    for name in NORMS:
        norm, x = norm_and_input(name)
        # The root module is itself the norm.
        found[name] = apply_norm(convert_sync_batchnorm(norm), x.split(shares)[dist_utils.rank()])
    return found


@pytest.mark.parametrize("shares", [[4, 1], [2, 1, 2]])
def test_every_kind_of_norm(on_ranks, shares):
    ranks = on_ranks(len(shares), apply_norms, shares)
    for name in NORMS:
        norm, x = norm_and_input(name)
        expected = apply_norm(norm, x)
        for key in ("y", "grad"):
            found = torch.cat([rank[name][key] for rank in ranks])
            torch.testing.assert_close(found, expected[key], rtol=1e-9, atol=1e-11)
        for rank, share in zip(ranks, x.split(shares)):
            # Without running statistics, a rank normalizes by its own batch.
            torch.testing.assert_close(rank[name]["eval"], norm(share), rtol=1e-9, atol=1e-11)


def norm_in_half_precision() -> dict:
    norm = convert_sync_batchnorm(nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3)) + 100
    x = x.bfloat16().requires_grad_()
    y = norm(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "grad": x.grad, "mean": norm.running_mean}


def test_statistics_of_half_precision_are_computed_in_float32(on_ranks):
    for found in on_ranks(2, norm_in_half_precision):
        assert found["y"].dtype == found["grad"].dtype == torch.bfloat16
        # In bfloat16, a sum of 25 numbers near 100 is off by more.
        assert found["mean"].tolist() == pytest.approx([10.0] * 4, abs=0.05)
        assert found["y"].float().mean().item() == pytest.approx(0, abs=0.01)


def test_conversion_keeps_everything_but_the_class():
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.BatchNorm2d(3, eps=0.1, momentum=0.2), nn.Conv2d(3, 3, 1)]),
            "frozen": nn.Sequential(nn.BatchNorm3d(4), nn.GroupNorm(2, 4)).eval(),
            "shared": nn.Sequential(shared, nn.ReLU(), shared),
        }
    )
    model["list"][0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    parameters = list(model.parameters())
    buffers = list(model.buffers())

    assert convert_sync_batchnorm(model) is model
    assert [name for name, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert all(new is old for new, old in zip(model.buffers(), buffers, strict=True))
    for new, old in zip(model.modules(), before.modules()):
        assert new.training == old.training
        if not isinstance(old, nn.modules.batchnorm._BatchNorm):
            assert type(new) is type(old)
            continue
        assert type(new) is SyncBatchNorm
        assert repr(new).partition("(")[2] == repr(old).partition("(")[2]
    assert not model["list"][0].weight.requires_grad
    assert model["shared"][0] is model["shared"][2]


def test_conversion_of_a_model_that_is_a_norm():
    norm = nn.BatchNorm2d(3).eval()
    sync = convert_sync_batchnorm(norm)
    assert type(sync) is SyncBatchNorm
    assert sync.weight is norm.weight
    assert sync.running_var is norm.running_var
    assert not sync.training


# ---------------------------------------------------------------------------------------- Start-up


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({}, "no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "1", "RANK": "1", "MASTER_PORT": "1"}, "no MASTER_ADDR. "),
        ({"LOCAL_RANK": "1", "RANK": "1", "MASTER_ADDR": "localhost"}, "no MASTER_PORT. "),
        ({"RANK": "1", "MASTER_PORT": "1", "MASTER_ADDR": "localhost"}, "no LOCAL_RANK. "),
    ],
)
def test_missing_variables_are_named(monkeypatch, environment, missing):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=missing) as error:
        dist_utils.init()
    assert "torchrun" in str(error.value)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_do_not_know_each_other(monkeypatch, name):
    """As `srun -n 2 python train.py` starts them."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ProcessError, match="2 tasks .*launch_slurm.py .*torchrun"):
        dist_utils.init()
    monkeypatch.setenv("WORLD_SIZE", "1")  # runs that are meant to be independent
    assert dist_utils.init().type in ("cpu", "cuda")


def test_missing_variables_end_the_run_without_a_traceback(tiny, run):
    output = run(tiny, env={"WORLD_SIZE": "2"}, expect=1).output()
    assert "error: WORLD_SIZE is 2 in the environment, but there is no RANK" in output
    assert "Traceback" not in output


def threads() -> int:
    return torch.get_num_threads()


def test_processes_share_the_cores(on_ranks):
    cores = len(os.sched_getaffinity(0))
    assert on_ranks(2, threads) == [max(1, cores // 2)] * 2


def test_a_port_that_is_in_use(tiny, run):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = run(tiny, env=rank_environment(0, 2, port), expect=1).output()
    assert str(port) in output
    assert "--standalone" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_starts(tiny, run, rank):
    """The other waits for it, for the config's `timeout`."""
    port = free_port()
    tiny["timeout"] = 2
    environment = rank_environment(rank, 2, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    output = run(tiny, env=environment, expect=1).output()
    assert f"rank {rank} cannot meet the other ranks at 127.0.0.1:{port}" in output
    assert "all ranks were started" in output
    assert "Traceback" not in output


def start_on_store(store: dist.Store, world_size: int) -> list[dist.Store]:
    """Every rank's store, of one start whose ranks share `store`."""
    stores: list[dist.Store | None] = [None] * world_size

    def start(rank: int) -> None:
        stores[rank] = dist_utils._store_for_this_start(store, rank, world_size, timeout=30)

    ranks = [threading.Thread(target=start, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in ranks:
        thread.start()
        time.sleep(0.1)
    for thread in ranks:
        thread.join()
    return stores


def test_a_restart_sees_nothing_of_the_earlier_start():
    """Even where ranks come before rank 0 and read what the earlier start left behind."""
    store = dist.HashStore()
    first = start_on_store(store, 3)
    first[0].set("address", "dead")
    assert first[2].get("address") == b"dead"
    second = start_on_store(store, 3)
    assert not any(rank.check(["address"]) for rank in second)
    second[1].set("address", "alive")
    assert [rank.get("address") for rank in second] == [b"alive"] * 3
    assert first[0].get("address") == b"dead"


def test_a_rank_that_is_missing_at_the_start_is_named():
    for rank, missing in ((0, 1), (1, 0)):
        with pytest.raises(ProcessError, match=f"rank {missing} did not start within 0 s"):
            dist_utils._store_for_this_start(dist.HashStore(), rank, 2, timeout=0.1)


def torchrun(config: Path, *argv: str) -> list[str]:
    """The command that trains in two processes."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *argv,
        str(ROOT / "train.py"),
        *("--config", str(config), "--resume-from", "auto"),
    ]


def test_two_torchruns_at_once(tiny, tmp_path):
    """The real torchrun, as the README starts it; two jobs on one machine do not collide."""
    jobs = []
    for name in ("a", "b"):
        config = sibling(tiny, name)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        job = subprocess.Popen(
            torchrun(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        jobs.append((config, job))
    for config, job in jobs:
        output, _ = job.communicate(timeout=180)
        assert job.returncode == 0, output
        assert checkpoint(config)["iteration"] == 6
    assert metrics(jobs[0][0]) == metrics(jobs[1][0])


def test_torchrun_restarts_after_a_kill(tiny, tmp_path):
    """--max-restarts with --resume-from auto goes on after a process was killed."""
    tiny["schedule"]["max_iters"] = 40
    tiny["checkpoint"]["interval"] = 2
    tiny["evaluation"]["interval"] = 100
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    log = tmp_path / "out"
    command = torchrun(tmp_path / "config.json", "--max-restarts=2")
    with open(log, "w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while not (Path(tiny["work_dir"]) / "iter_4.pth").exists():
            assert job.poll() is None, log.read_text()
            time.sleep(0.02)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert job.wait(120) == 0, log.read_text()
    assert "resumed from" in log.read_text()
    assert [line["iteration"] for line in metrics(tiny)] == list(range(1, 41))


# -------------------------------------------------------------------------------------- Lost ranks


def find_lost_ranks(victim: int) -> list[int]:
    if dist_utils.rank() == victim:
        return [victim]  # ends here, and with it the store if it is rank 0
    time.sleep(1)  # until it is gone
    lost = dist_utils.lost_ranks(patience=1)
    if dist_utils.rank() == 0:
        time.sleep(1)  # the others still read the store
    return lost


@pytest.mark.parametrize("victim", [0, 1])
def test_lost_ranks(on_ranks, victim):
    assert on_ranks(3, find_lost_ranks, victim) == [[victim]] * 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_and_is_named(tiny, run, how, victim):
    tiny["schedule"]["max_iters"] = 10000
    tiny["timeout"] = 4
    log = Path(tiny["work_dir"], "metrics.jsonl")
    job: Run = run(tiny, "--no-validate", world_size=2, started=True)
    survivor = job.processes[1 - victim]
    while not log.exists() or len(metrics(tiny)) < 3:
        assert survivor.is_alive(), job.output()
        time.sleep(0.02)
    os.kill(job.processes[victim].pid, how)
    survivor.join(40)
    assert survivor.exitcode == 1, job.output()
    assert f"rank {1 - victim} lost contact" in job.output()
    assert f"No answer from rank(s) [{victim}]" in job.output()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (ProcessError("no answer"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("Gloo connectFullMesh failed"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_communication_errors(error, expected):
    assert dist_utils.is_communication_error(error) is expected


# ------------------------------------------------------------------------------------ Stop signals


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_stop_signal_is_recorded(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.received == 0
        signal.raise_signal(number)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.received == 0
    assert signal.signal(signal.SIGHUP, previous) == signal.SIG_IGN


def test_a_signal_that_was_held_back_arrives():
    """As in launch_slurm.py's tasks, which block the signals until there is a handler."""
    signal.pthread_sigmask(signal.SIG_BLOCK, StopSignal.SIGNALS)
    signal.raise_signal(signal.SIGUSR2)
    with StopSignal() as stop:
        assert stop.received == signal.SIGUSR2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(StopSignal.SIGNALS)


def test_a_second_ctrl_c_interrupts():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def steps_until_stopped() -> int:
    with StopSignal() as stop:
        for step in range(100):
            if step == 4 and dist_utils.rank() == 1:
                signal.raise_signal(signal.SIGTERM)
            flag = torch.tensor([float(stop.received > 0)])
            if dist_utils.AsyncMean(flag).result()[0] > 0:
                return step
    return 100


def test_a_signal_to_one_rank_stops_all_at_the_same_step(on_ranks):
    assert on_ranks(3, steps_until_stopped) == [4, 4, 4]


@pytest.mark.parametrize("restart", ["0", "1"])
def test_an_error_of_every_rank_is_printed_once(tiny, tmp_path, restart):
    """Under torchrun, an error in the config is found by both ranks and printed by one of them."""
    tiny["optimizer"]["lr"] = "fast"
    config = write_config(tiny, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["--max-restarts", restart, str(ROOT / "train.py"), "--config", str(config)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 1
    output = process.stdout + process.stderr
    assert output.count("error: optimizer.lr") == 1 + int(restart)


@pytest.mark.parametrize("module", ["train", "launch_slurm", "models", "data"])
def test_environment_is_set_before_torch_is_loaded(module):
    """OpenMP and the allocator read their variables only when they are loaded."""
    code = f"""
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("PYTORCH_ALLOC_CONF"))
            os._exit(0)

sys.meta_path.insert(0, Watch())
import {module}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment.pop(name, None)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert found.stdout.decode().split() == ["30000", "expandable_segments:True"]
