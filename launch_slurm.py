"""Submits train.py to Slurm by submitit, one task a GPU. The only file that knows of Slurm.

    python launch_slurm.py --nodes 2 --gpus-per-node 8 --partition dev --config configs/NAME.json --work-dir /nfs/NAME

Flags that are not listed here are train.py's; they are checked before anything waits in a queue. The config is copied then, so edit yours freely.
Ahead of preemption and of the time limit the run saves, goes back into the queue under the same id, and later resumes where it was.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import submitit

import dist_utils
import train
from dist_utils import UserError

# torch and train are imported in functions: a task of --local must hold signals back before these imports, which can take a minute.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
# What a task under Slurm is started through: a notice that comes during submitit's import, too, waits until someone listens.
HOLD_BACK = f"import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {[*map(int, STOP_SIGNALS)]}); os.execv(sys.argv[1], sys.argv[1:])"
PATIENCE = 600  # seconds that a task waits for rank 0, which may be importing from a slow disk
GPUS_PER_NODE = 8  # what --gpus counts with where nothing else is said
SBATCH = (
    "job_name",
    "partition",
    "time",
    "mem",
    "qos",
    "account",
    "constraint",
    "exclude",
    "reservation",
    "cpus_per_task",
)  # passed on as they are
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "FORGOTTEN",
)


# ------------------------------------------------------------------------------------------------------------ in each task


class Job:
    """What every task runs: meet the others, train, come back if stopped. submitit pickles it by name, so it holds plain values."""

    def __init__(
        self,
        argv: list[str],
        config: Path,
        work_dir: Path,
        resume_from: str | None,
        port: int,
        timeout: float,
    ):
        self.argv = [*argv, "--config", str(config), "--work-dir", str(work_dir)]
        self.config, self.work_dir, self.resume_from, self.port, self.timeout = (
            config,
            work_dir,
            resume_from,
            port,
            timeout,
        )
        self.submitted = time.time()

    def __call__(self) -> str:
        signal.pthread_sigmask(
            signal.SIG_BLOCK, STOP_SIGNALS
        )  # held back until train.main listens, which lets them in
        for number in (
            STOP_SIGNALS
        ):  # without effect after it has ended; SIG_IGN would forget one that is held back
            signal.signal(number, lambda *_: None)
        task = submitit.JobEnvironment()
        self.job_id, self.rank, self.slurm = task.job_id, task.global_rank, task.cluster == "slurm"
        self.attempt = (
            os.environ.get("SLURM_RESTART_COUNT", "0") if self.slurm else str(int(self.submitted))
        )  # a process id can come again
        if not self.slurm:
            ctypes.CDLL(None).prctl(
                1, signal.SIGKILL
            )  # PR_SET_PDEATHSIG: to end with submitit's controller, see `fail`
        # Every GPU of the node stays visible; LOCAL_RANK says which is this task's.
        os.environ.update(
            RANK=str(task.global_rank),
            WORLD_SIZE=str(task.num_tasks),
            LOCAL_RANK=str(task.local_rank),
            LOCAL_WORLD_SIZE=str(task.num_tasks // task.num_nodes),
        )

        try:
            newest = next(iter(train.newest_checkpoints(self.work_dir)), None)
            if self.rank == 0:
                self.check_progress(train.iteration_of(newest) if newest else 0)
            store = (
                self.meet(task.hostnames[0] if self.slurm else "localhost", task.num_tasks)
                if task.num_tasks > 1
                else None
            )
            dist_utils.init(store, self.timeout)
            # A restart goes on from the job's own last checkpoint; the first start, and one before there is any, from what was asked for.
            # Both times are by the clock of one file server; one rank decides, as others may see an older state of it.
            own = dist_utils.broadcast_object(
                newest is not None and newest.stat().st_mtime >= self.config.stat().st_mtime
            )
            try:
                ending = train.main(
                    self.argv
                    + (
                        ["--resume-from", "auto" if own else self.resume_from]
                        if self.resume_from
                        else []
                    )
                )
            except dist_utils.ProcessError as error:
                if not self.slurm or self.note().exists():
                    raise
                print(
                    error, flush=True
                )  # a task is gone without a word, so its node may be, which Slurm notices minutes later, if the job still runs
                self.come_back("lost a task")
            if ending == "stopped":
                self.come_back("stopped, its state saved")
            return ending
        except dist_utils.UserError as error:
            self.fail(f"error: {error}\n")
        except Exception:
            self.fail(traceback.format_exc())

    def file(self, name: str) -> Path:
        return self.work_dir / "slurm" / f"{self.job_id}_{name}"

    def note(self) -> Path:
        """Where the first task to fail says so."""
        return self.file(f"{self.attempt}_failure.txt")

    def check_progress(self, iteration: int) -> None:
        """Notes where this start begins. Raises UserError where the two before it began there too: the job would come back for ever."""

        file, in_vain = self.file("progress.json"), 0
        if self.attempt != "0" and file.exists():
            before = json.loads(file.read_text())
            in_vain = before["in_vain"] + 1 if before["iteration"] == iteration else 0
        if in_vain == 2:
            raise UserError(
                f"job {self.job_id} came back twice without a checkpoint beyond iteration {iteration}, so it ends here. The log above says what "
                "stopped it. A longer --time, an earlier notice (--slurm signal_delay_s=SECONDS) or a shorter checkpoint.interval may help; "
                "then the same command goes on from there."
            )
        train.atomic_write(
            file,
            lambda out: out.write(
                json.dumps({"iteration": iteration, "in_vain": in_vain}).encode()
            ),
        )

    def meet(self, host: str, world_size: int):
        """The store where the tasks meet: rank 0 holds it on a free port, and says where in a file of this job and this start.

        So nothing can take the port between choosing and binding it, and no task can join another job's store.
        """
        from torch.distributed import DistNetworkError, TCPStore

        file, here = self.file(f"{self.attempt}_store.json"), socket.gethostname()
        if self.rank == 0:
            try:
                store = TCPStore(
                    host, self.port, world_size, is_master=True, wait_for_workers=False
                )
            except DistNetworkError:
                raise UserError(
                    f"port {self.port} of {here} is in use, and MASTER_PORT={self.port} was set at submission. Unset it: then each job "
                    "finds a free port by itself."
                ) from None
            train.atomic_write(file, lambda out: out.write(json.dumps([host, store.port]).encode()))
        else:
            end = time.monotonic() + PATIENCE
            while not file.exists():
                if time.monotonic() > end:
                    raise UserError(
                        f"rank {self.rank} on {here} waited {PATIENCE} s for {file}, which rank 0 writes when it starts. See its log "
                        f"{self.file('0_log.out')}, and that all nodes share this folder."
                    )
                time.sleep(0.2)
                os.utime(
                    file.parent
                )  # or NFS would say for up to a minute that there is no such file
            host, port = json.loads(file.read_text())
            try:
                socket.create_connection(
                    (host, port), timeout=60
                ).close()  # TCPStore would try a name that does not resolve for minutes
            except OSError as error:
                raise UserError(
                    f"rank {self.rank} on {here} cannot reach rank 0 at {host}:{port}: {error}"
                ) from None
            store = TCPStore(host, port, world_size, is_master=False)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(store.port))
        return store

    def come_back(self, why: str) -> None:
        """Puts the job back into the queue, unless Slurm has decided otherwise about it; ends this task."""
        for number in STOP_SIGNALS:  # here and in scontrol
            signal.signal(number, signal.SIG_IGN)
        if self.rank == 0:
            state = (
                job_info(self.job_id)["JobState"]
                if self.slurm
                else "over; the same command goes on"
            )
            if state == "RUNNING":  # cancelled, or requeued by Slurm itself, it no longer would be
                answer = subprocess.run(
                    ["scontrol", "requeue", self.job_id],
                    check=False,
                    capture_output=True,
                    text=True,
                )
                state = (
                    "requeued"
                    if answer.returncode == 0
                    else f"not requeued: {answer.stderr.strip()}; the same command goes on"
                )
            print(f"job {self.job_id} {why}; {state}", flush=True)
        sys.exit(0)  # not a return, of which submitit would note a result

    def fail(self, text: str) -> None:
        """Ends this task and with it all others. The first to fail leaves a note; what the others print only tells that it is gone."""
        print(text, file=sys.stderr, flush=True)
        note = f"\nrank {self.rank} on {socket.gethostname()} failed first" + (
            f":\n{text}" if self.rank else "; see above\n"
        )
        with contextlib.suppress(FileExistsError):
            with open(self.note(), "x") as file:
                file.write(note)
            if not self.slurm:  # what the batch script and srun do under Slurm
                with open(self.file("0_log.out"), "a") as log:
                    log.write(note)
                os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)  # at once: leaving the process group in order would wait for the others


# ------------------------------------------------------------------------------------------------------------ submission


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this file, and the rest, which are train.py's."""
    parser = argparse.ArgumentParser(
        "launch_slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=int, help=f"GPUs in all; alone it asks for nodes of {GPUS_PER_NODE}")
    add("--nodes", type=int, help="machines; default 1, or what --gpus makes of it")
    add(
        "--gpus-per-node", type=int, help="GPUs, and so tasks, on each; default 1; 0 trains on CPUs"
    )
    add("--tasks-per-node", type=int, help="processes on each, for CPUs only")
    add("--cpus-per-task", type=int, help="cores of each process; default data.workers + 1")
    add("--partition", help="the queue")
    add("--job-name", help="default: the work_dir's name")
    add(
        "--time",
        help="limit, in minutes or as D-HH:MM:SS; default: the partition's. The job comes back until it is done",
    )
    for name in ("mem", "qos", "account", "constraint", "exclude", "reservation"):
        add(f"--{name}", help="as sbatch has it")
    add(
        "--setup",
        action="append",
        default=[],
        help="a shell line to run first, such as 'module load cuda' (repeatable)",
    )
    add(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="any other option of sbatch, such as exclusive or nodelist=n[1-2] (repeatable), "
        "or signal_delay_s=SECONDS: how long before the limit the run is told to save (default 120)",
    )
    add("--local", action="store_true", help="the same job on this machine, without Slurm")
    add("--dry-run", action="store_true", help="print the sbatch script and end")
    add(
        "--follow",
        action="store_true",
        help="print rank 0's log until the job has ended, and end with its status",
    )
    return parser.parse_known_args(argv)


def work_out(
    nodes: int | None, gpus: int | None, per_node: int | None, tasks: int | None
) -> tuple[int, int, int]:
    """(nodes, GPUs on each, tasks on each) of what was asked for; None is what was not."""
    if any(
        number is not None and number < least
        for number, least in ((nodes, 1), (gpus, 1), (per_node, 0), (tasks, 1))
    ):
        raise UserError(
            "--nodes, --gpus and --tasks-per-node must be 1 or more, --gpus-per-node 0 (to train on CPUs) or more"
        )
    if gpus:
        if per_node is None:
            per_node = gpus // nodes if nodes else min(gpus, GPUS_PER_NODE)
        nodes = nodes or gpus // max(per_node, 1) or 1
        if nodes * per_node != gpus:
            raise UserError(
                f"--gpus {gpus} cannot be had as {nodes} node(s) x {per_node} GPU(s). Ask for a multiple of {per_node or GPUS_PER_NODE}, "
                f"or name --nodes and --gpus-per-node whose product is {gpus}."
            )
    per_node = 1 if per_node is None else per_node
    if per_node and tasks not in (None, per_node):
        raise UserError(
            f"--tasks-per-node {tasks} with {per_node} GPU(s) on each node: a GPU has one task. Leave it out, "
            "or train on CPUs by --gpus-per-node 0."
        )
    return nodes or 1, per_node, per_node or tasks or 1


def slurm_executor(
    folder: Path, args: argparse.Namespace, nodes: int, gpus: int, tasks: int
) -> submitit.SlurmExecutor:
    try:
        executor = submitit.SlurmExecutor(
            folder, python=shlex.join([sys.executable, "-ISc", HOLD_BACK, sys.executable])
        )
    except RuntimeError:
        raise UserError(
            "there is no srun on this machine: submit from a node of the cluster, or train here by --local"
        ) from None
    extra = {
        key.replace("-", "_"): value if equals else True
        for key, equals, value in (item.partition("=") for item in args.slurm)
    }
    options = (
        {key: getattr(args, key) for key in SBATCH}
        | {
            "nodes": nodes,
            "ntasks_per_node": tasks,
            "gpus_per_node": gpus or None,
            "requeue": True,
            "signal": f"USR2@{extra.pop('signal_delay_s', 120)}",
        }
        | extra
    )
    here, note = (
        shlex.quote(str(Path(__file__).resolve().parent)),
        shlex.quote(f"{folder}/") + "${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}_failure.txt",
    )
    executor.update_parameters(
        additional_parameters={key: value for key, value in options.items() if value is not None},
        time=None,
        wckey=None,
        stderr_to_stdout=True,
        setup=[f"export PYTHONPATH={here}${{PYTHONPATH:+:$PYTHONPATH}}", *args.setup],
        srun_args=[
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={args.cpus_per_task}",
        ],  # which srun does not take over from sbatch
        teardown=["status=$?", f"[ $status = 0 ] || cat {note} 2>/dev/null", "exit $status"],
    )  # rank 0's log, which one reads, ends with the cause
    return executor


def local_executor(
    folder: Path, args: argparse.Namespace, gpus: int, tasks: int
) -> submitit.LocalExecutor:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")])
    )
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # inherited: Ctrl-C then reaches the tasks, which save, and not submitit's controller, which kills them
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if gpus else ""
    # Its own `setup` would put a shell between the job's id and the controller, which could then not be cancelled.
    executor = submitit.LocalExecutor(
        folder,
        python=shlex.join(
            ["bash", "-c", "\n".join([*args.setup, 'exec "$@"']), "bash", sys.executable]
        ),
    )
    executor.update_parameters(
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        timeout_min=60 * 24 * 365,
        stderr_to_stdout=True,
        **({"visible_gpus": [int(gpu) for gpu in visible.split(",")]} if visible else {}),
    )
    return executor


def job_info(job_id: str) -> dict[str, str]:
    """What Slurm says of a job: JobState, Reason, ExitCode, ..."""
    while True:
        answer = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job_id],
            check=False,
            capture_output=True,
            text=True,
        )
        if answer.returncode == 0:
            return {
                key: value
                for key, _, value in (word.partition("=") for word in answer.stdout.split())
            }
        if "Invalid job id" in answer.stderr:  # it forgets a job some minutes after its end
            return {"JobState": "FORGOTTEN", "ExitCode": "1:0"}
        time.sleep(5)  # the controller is away


def status(job: submitit.Job, local: bool) -> int | None:
    """The exit status of a job; None until it has ended."""
    if local:  # each task that ends well leaves a result
        return (
            None
            if not job.done()
            else int(
                not all(
                    job.task(rank).paths.result_pickle.exists() for rank in range(job.num_tasks)
                )
            )
        )
    info = job_info(job.job_id)
    if info["JobState"] not in ENDED:
        return None
    print(f"job {job.job_id}: {info['JobState']}", file=sys.stderr)
    code, number = map(int, info["ExitCode"].split(":"))
    return 0 if info["JobState"] == "COMPLETED" else code or 128 + number


def follow(log: Path, ended: Callable[[], int | None]) -> int:
    """Prints a log as it grows until there is an exit status, which it returns."""
    position, code = 0, None
    while code is None:
        time.sleep(1)
        code = ended()  # before reading, so that all of it is there
        if log.exists():
            with open(log, "rb") as file:
                file.seek(position)
                sys.stdout.buffer.write(file.read())
                sys.stdout.buffer.flush()
                position = file.tell()
    return code


def launch(args: argparse.Namespace, rest: list[str]) -> int:

    nodes, gpus, tasks = work_out(args.nodes, args.gpus, args.gpus_per_node, args.tasks_per_node)
    run = train.parse_args(rest)
    config = train.load_config(run.config, run.options)
    processes, port = nodes * tasks, os.environ.get("MASTER_PORT", "0")
    parts = processes * config["data"].get("accumulate", 1)
    if config["data"]["batch_size"] % parts and not run.eval_only:
        raise UserError(
            f"data.batch_size {config['data']['batch_size']} cannot be dealt out evenly to {processes} processes (x data.accumulate); "
            f"ask for other nodes or GPUs, or set it to a multiple of {parts}, which needs another learning rate"
        )
    for path in (run.load_from, run.resume_from):
        if path not in (None, "auto") and not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist")
    if not (port.isdigit() and int(port) < 65536):
        raise UserError(
            f"MASTER_PORT={port} in the environment is no port. Unset it: then each job finds a free port by itself."
        )
    if args.local and (nodes > 1 or args.dry_run):
        raise UserError("--local has one node, this one, and no sbatch script")
    work_dir = Path(run.work_dir or config["work_dir"]).absolute()
    folder, copy = (
        work_dir / "slurm",
        work_dir / "slurm" / f"config_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}.json",
    )
    args.job_name, args.cpus_per_task = (
        args.job_name or work_dir.name,
        args.cpus_per_task or config["data"].get("workers", 4) + 1,
    )
    executor = (
        local_executor(folder, args, gpus, tasks)
        if args.local
        else slurm_executor(folder, args, nodes, gpus, tasks)
    )
    if args.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        train.atomic_write(copy, lambda file: file.write(json.dumps(config).encode()))
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # submitit prints sbatch's refusal, which it raises too
            job = executor.submit(
                Job(
                    rest,
                    copy,
                    work_dir,
                    run.resume_from or (None if run.eval_only else "auto"),
                    int(port),
                    config["timeout"],
                )
            )
    except OSError as error:
        raise UserError(
            f"work_dir {work_dir} cannot be written: {error}. Name another by --work-dir."
        ) from None
    except submitit.core.utils.FailedJobError as error:
        raise UserError(
            f"Slurm refuses this job: {error}\n`sinfo -o '%P %l %D %c %m %G'` shows limits, nodes, cores, memory, GPUs."
        ) from None
    log, cancel = folder / f"{job.job_id}_0_log.out", "kill" if args.local else "scancel"
    print(
        f"job {job.job_id}: {nodes} node(s), each with {gpus} GPU(s) and {tasks} task(s)\n  log     {log} (other ranks: {job.job_id}_RANK_log.out)\n"
        f"  follow  tail -F {shlex.quote(str(log))}\n  cancel  {cancel} {job.job_id}",
        flush=True,
    )
    try:
        return follow(log, lambda: status(job, args.local)) if args.follow else 0
    except KeyboardInterrupt:
        print(f"\njob {job.job_id} goes on", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parse_args(argv)

    try:
        return launch(args, rest)
    except dist_utils.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    import launch_slurm  # by its name, so that the pickled job is launch_slurm.Job and not __main__.Job

    sys.exit(launch_slurm.main())
