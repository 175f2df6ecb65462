"""Submit train.py to Slurm through submitit, one task per GPU. Only this module knows about Slurm.

    python launch_slurm.py --nodes 2 --gpus-per-node 8 --partition dev --config C --work-dir D

All flags that are not listed here belong to train.py. They are checked before the job enters the
queue. The config is copied at submission, so you can edit yours while the job waits. Ahead of
preemption and the time limit, the run saves a checkpoint, requeues itself under the same job id,
and later resumes where it stopped.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

import dist_utils  # before torch, which reads the environment that this sets

# isort: split
import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from torch.distributed import DistNetworkError, TCPStore

import train
from dist_utils import ProcessError, StopSignal, UserError

# Starts a task's Python with the stop signals blocked. Importing torch can take a minute, and a
# signal that arrives meanwhile stays pending until train.main listens.
TASK_PYTHON = (
    sys.executable,
    "-ISc",
    "import os, signal, sys; "
    f"signal.pthread_sigmask(signal.SIG_BLOCK, {[int(number) for number in StopSignal.SIGNALS]}); "
    "os.execv(sys.argv[1], sys.argv[1:])",
    sys.executable,
)
PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h
RENDEZVOUS_TIMEOUT = 600  # seconds to wait for rank 0, which may import torch from a slow disk
DEFAULT_GPUS_PER_NODE = 8
DEFAULT_WORKERS = 8  # data loader processes that a task gets cores for
# Passed to sbatch unchanged
SBATCH_FLAGS = ("mem", "qos", "account", "constraint", "exclude", "reservation")
# Options of sbatch that this file sets itself, and the flags that they come from
OWN_OPTIONS = {
    "array": "one command for each run",
    "output": "--work-dir",
    "error": "--work-dir",
    "nodes": "--nodes",
    "ntasks": "--tasks-per-node",
    "ntasks_per_node": "--tasks-per-node",
    "gpus": "--gpus",
    "gpus_per_node": "--gpus-per-node",
    "gpus_per_task": "--gpus-per-node",
    "cpus_per_task": "--cpus-per-task",
    "cpus_per_gpu": "--cpus-per-task",
    "wait": "--follow",
    "test_only": "--dry-run",
}
# SBATCH_* variables with these prefixes override the script, or come from an enclosing job.
HIDDEN_VARIABLES = (
    "ARRAY_INX",
    "CPUS_PER_GPU",
    "CPU_BIND",
    "ERROR",
    "GPUS",
    "GRES",
    "MEM_BIND",
    "NO_REQUEUE",
    "OPEN_MODE",
    "OUTPUT",
    "WAIT",
)
FINAL_STATES = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "FORGOTTEN",  # ours: Slurm forgets a job some minutes after its end
)


# ------------------------------------------------------------------------------------ In each task


class Job:
    """What every task runs: join the other tasks, train, and requeue the job if it was stopped.

    submitit pickles an instance of it at submission, so `__init__` stores plain values only.

    argv: flags for train.py. The paths below take precedence over those in it.
    resume_from: what the first start resumes from; None for a job that never resumes.
    port: where rank 0 listens; 0 takes a free port.
    timeout: as for dist_utils.init.
    """

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
        self.config = config
        self.work_dir = work_dir
        self.resume_from = resume_from
        self.port = port
        self.timeout = timeout
        self.submitted = time.time()

    def __call__(self) -> str:
        # TASK_PYTHON has blocked the stop signals, and train.main unblocks them. After that they
        # have no effect. SIG_IGN in place of a function would discard a pending signal.
        StopSignal.set_handlers(lambda *_: None)
        self.task = submitit.JobEnvironment()
        self.rank = self.task.global_rank
        self.is_slurm = self.task.cluster == "slurm"
        if self.is_slurm:
            self.attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
        else:
            self.attempt = str(int(self.submitted))  # a job id is a process id, which can recur
            # End together with submitit's controller, which `fail` kills.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Every GPU of the node stays visible; LOCAL_RANK selects the one of this task.
        submitit.helpers.TorchDistributedEnvironment().export(
            set_cuda_visible_devices=False, overwrite=True
        )
        try:
            ending = self.run()
            # Python resets other handlers while it exits. A signal would then fail the job.
            StopSignal.set_handlers(signal.SIG_IGN)
            return ending
        except UserError as error:
            self.fail(f"error: {error}\n")
        except Exception:
            self.fail(traceback.format_exc())

    def run(self) -> str:
        """Train. Return "done", or requeue the job and end this task."""
        iteration = 0
        has_saved = False
        checkpoints = train.newest_checkpoints(self.work_dir)
        if checkpoints:
            iteration = train.iteration_of(checkpoints[0])
            # The clock of one file server gives both times.
            has_saved = checkpoints[0].stat().st_mtime >= self.config.stat().st_mtime
        if self.rank == 0:
            self.check_progress(iteration)
        store = self.rendezvous() if self.task.num_tasks > 1 else None
        dist_utils.init(store, self.timeout)

        # Once this job has saved, it resumes from its own latest checkpoint; until then, from what
        # was requested at submission. Rank 0 decides, because others may see older files.
        has_saved = dist_utils.broadcast_object(has_saved)
        argv = self.argv
        if self.resume_from:
            argv = [*argv, "--resume-from", "auto" if has_saved else self.resume_from]
        try:
            ending = train.main(argv)
        except ProcessError as error:
            if not self.is_slurm or self.failure_file.exists():
                raise
            # A peer vanished; Slurm may notice minutes later, so requeue now.
            print(error, flush=True)
            self.requeue("lost a task")
        if ending == "stopped":
            self.requeue("stopped and saved its state")
        return ending

    def file(self, name: str) -> Path:
        return self.work_dir / "slurm" / f"{self.task.job_id}_{name}"

    @property
    def failure_file(self) -> Path:
        """Where the first task that fails writes its error."""
        return self.file(f"{self.attempt}_failure.txt")

    def check_progress(self, iteration: int) -> None:
        """Record the iteration at which this start begins.

        Raises UserError if the two previous starts began there too: the job would restart forever.
        """
        file = self.file("progress.json")
        stalled_restarts = 0
        if self.attempt != "0" and file.exists():
            previous = json.loads(file.read_text())
            if previous["iteration"] == iteration:
                stalled_restarts = previous["stalled_restarts"] + 1
        if stalled_restarts == 2:
            raise UserError(
                f"job {self.task.job_id} restarted twice without a checkpoint beyond iteration "
                f"{iteration}, so it ends here. The log above says what stopped it. A longer "
                "--time, an earlier notice (--slurm signal_delay_s=SECONDS) or a shorter "
                "checkpoint.interval may help. Run the same command again to resume."
            )
        progress = {"iteration": iteration, "stalled_restarts": stalled_restarts}
        train.atomic_write(file, lambda out: out.write(json.dumps(progress).encode()))

    def rendezvous(self) -> TCPStore:
        """Return the store where the tasks meet.

        Rank 0 opens it on a free port and writes the address to a file that belongs to this start
        of this job. So no other process can take the port between choosing and binding it, and no
        task can join the store of another job.
        """
        file = self.file(f"{self.attempt}_store.json")
        if self.rank == 0:
            store = self.open_store()
            address = json.dumps([store.host, store.port])
            train.atomic_write(file, lambda out: out.write(address.encode()))
        else:
            store = self.join_store(file)
        os.environ.update(MASTER_ADDR=store.host, MASTER_PORT=str(store.port))
        return store

    def open_store(self) -> TCPStore:
        host = self.task.hostnames[0] if self.is_slurm else "localhost"
        try:
            return TCPStore(
                host, self.port, self.task.num_tasks, is_master=True, wait_for_workers=False
            )
        except DistNetworkError:
            raise UserError(
                f"port {self.port} of {socket.gethostname()} is in use, and MASTER_PORT="
                f"{self.port} was set at submission. Unset it, and each job takes a free port."
            ) from None

    def join_store(self, file: Path) -> TCPStore:
        task = f"rank {self.rank} on {socket.gethostname()}"
        deadline = time.monotonic() + RENDEZVOUS_TIMEOUT
        while not file.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{task} waited {RENDEZVOUS_TIMEOUT} s for {file}, which rank 0 writes when "
                    f"it starts. See its log {self.file('0_log.out')}, and check that all nodes "
                    "share this folder."
                )
            time.sleep(0.2)
            os.utime(file.parent)  # NFS may cache for a minute that the file is missing
        host, port = json.loads(file.read_text())
        # TCPStore would retry for minutes if the host name does not resolve.
        try:
            socket.create_connection((host, port), timeout=60).close()
        except OSError as error:
            raise UserError(f"{task} cannot reach rank 0 at {host}:{port}: {error}") from None
        return TCPStore(host, port, self.task.num_tasks, is_master=False)

    def requeue(self, reason: str) -> None:
        """End this task. Rank 0 puts the job back into the queue."""
        StopSignal.set_handlers(signal.SIG_IGN)  # for scontrol too, which inherits this
        if self.rank == 0:
            outcome = "run the same command to resume"
            if self.is_slurm:
                outcome = self.scontrol_requeue()
            print(f"job {self.task.job_id} {reason}; {outcome}", flush=True)
        # Do not return: submitit would record a result, which means that training is done.
        sys.exit(0)

    def scontrol_requeue(self) -> str:
        """Requeue the job unless Slurm has canceled or requeued it. Return what was done."""
        job_id = self.task.job_id
        state = job_info(job_id)["JobState"]
        if state != "RUNNING":
            return f"Slurm says {state}"
        answer = scontrol("requeue", job_id)
        if answer.returncode == 0:
            return "requeued"
        return f"not requeued: {answer.stderr.strip()}; run the same command to resume"

    def fail(self, text: str) -> None:
        """End this task and thereby all others.

        The first task that fails writes down why; the others only report that they lost it.
        """
        print(text, file=sys.stderr, flush=True)
        note = f"\nrank {self.rank} on {socket.gethostname()} failed first"
        note += f":\n{text}" if self.rank else "; see above\n"
        with contextlib.suppress(FileExistsError):
            with open(self.failure_file, "x") as file:
                file.write(note)
            # Under Slurm, srun and the batch script do this.
            if not self.is_slurm:
                with open(self.file("0_log.out"), "a") as log:
                    log.write(note)
                os.kill(os.getppid(), signal.SIGKILL)
        # Immediately: a regular exit leaves the process group, which waits for the other ranks.
        os._exit(1)


# -------------------------------------------------------------------------------------- Submission


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this file, and those that are left for train.py."""
    parser = argparse.ArgumentParser(
        "launch_slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=int, help=f"total; by default on nodes of {DEFAULT_GPUS_PER_NODE}")
    add("--nodes", type=int, help="number of machines; default 1, or as --gpus requires")
    add("--gpus-per-node", type=int, help="one task each; default 1; 0 trains on CPUs")
    add("--tasks-per-node", type=int, help="processes per node, for CPUs only")
    add("--cpus-per-task", type=int, help="cores per process; default: data.workers + 1, or 9")
    add("--partition", help="the queue")
    add("--job-name", help="default: the name of the work_dir")
    add(
        "--time",
        help="limit in minutes or as D-HH:MM:SS; default: the partition's. "
        "The job is requeued until training is done",
    )
    for name in SBATCH_FLAGS:
        add(f"--{name}", help="as for sbatch")
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
        help="any other option of sbatch, such as exclusive or nodelist=n[1-2] (repeatable), or "
        "signal_delay_s=SECONDS: how long before the limit the run is told to save (default 120)",
    )
    add("--local", action="store_true", help="run the same job on this machine, without Slurm")
    add("--dry-run", action="store_true", help="print the sbatch script, then exit")
    add(
        "--follow",
        action="store_true",
        help="print rank 0's log until the job ends, and exit with its status",
    )
    return parser.parse_known_args(argv)


def resolve_resources(
    nodes: int | None, gpus: int | None, gpus_per_node: int | None, tasks_per_node: int | None
) -> tuple[int, int, int]:
    """Return (nodes, GPUs per node, tasks per node) for what was requested.

    None stands for no request. Raises UserError if the requests contradict each other.
    """
    for number, minimum in ((nodes, 1), (gpus, 1), (gpus_per_node, 0), (tasks_per_node, 1)):
        if number is not None and number < minimum:
            raise UserError(
                "--nodes, --gpus and --tasks-per-node must be 1 or more, "
                "--gpus-per-node must be 0 (to train on CPUs) or more"
            )
    if gpus:
        if gpus_per_node is None:
            gpus_per_node = gpus // nodes if nodes else min(gpus, DEFAULT_GPUS_PER_NODE)
        nodes = nodes or gpus // max(gpus_per_node, 1) or 1
        if nodes * gpus_per_node != gpus:
            raise UserError(
                f"--gpus {gpus} does not equal {nodes} node(s) x {gpus_per_node} GPU(s). Request a "
                f"multiple of {gpus_per_node or DEFAULT_GPUS_PER_NODE}, or give --nodes and "
                f"--gpus-per-node whose product is {gpus}."
            )
    nodes = nodes or 1
    if gpus_per_node == 0:
        return nodes, 0, tasks_per_node or 1
    gpus_per_node = gpus_per_node or 1
    if tasks_per_node not in (None, gpus_per_node):
        raise UserError(
            f"--tasks-per-node {tasks_per_node} with {gpus_per_node} GPU(s) per node: each GPU has "
            "one task. Omit it, or train on CPUs with --gpus-per-node 0."
        )
    return nodes, gpus_per_node, gpus_per_node


def setup_lines(args: argparse.Namespace) -> list[str]:
    """Return shell lines that run before the tasks, which need PYTHONPATH to unpickle `Job`."""
    code = shlex.quote(str(Path(__file__).resolve().parent))
    return [
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        # Or `python -m` would prefer modules in the current folder, such as another models.py.
        "export PYTHONSAFEPATH=1",
        *args.setup,
        "set +e",  # a `set -e` above is not meant for what follows
    ]


def visibility_check(files: Sequence[Path], nodes: int) -> str:
    """Return a shell line that ends the job unless all nodes see these files.

    File servers may hide a new file for a minute.
    """
    script = (
        'for file; do for second in $(seq 90); do [ -e "$file" ] && continue 2; sleep 1; done; '
        'echo "error: $(hostname) does not see $file. All nodes must share the work_dir and the '
        'folder of the code, until the job ends."; exit 1; done'
    )
    command = ["bash", "-c", script, "bash", *map(str, files)]
    if nodes > 1:
        one_task_per_node = ("--export=ALL", f"--ntasks={nodes}", "--ntasks-per-node=1")
        command = ["srun", *one_task_per_node, *command]
    return shlex.join(command) + " || exit 1"


def sbatch_options(args: argparse.Namespace) -> dict[str, object]:
    """Return the options of sbatch that the command line sets, with underscores in their names."""
    options = {
        "ntasks_per_node": args.tasks_per_node,
        "gpus_per_node": args.gpus_per_node or None,
        "requeue": True,
    }
    for name in ("nodes", "job_name", "partition", "time", "cpus_per_task", *SBATCH_FLAGS):
        options[name] = getattr(args, name)
    for item in args.slurm:
        key, has_value, value = item.partition("=")
        options[key.replace("-", "_")] = value if has_value else True
    if gpus_in(str(options.get("gres"))):
        options["gpus_per_node"] = None  # the same number, but without the type
    delay = options.pop("signal_delay_s", 120)
    options.setdefault("signal", f"USR2@{delay}")
    return {key: value for key, value in options.items() if value is not None}


def gpus_in(gres: str) -> int:
    """Return the number of GPUs in a request such as gpu:a100:4,nvme:1."""
    count = 0
    for part in gres.split(","):
        name, *details = part.split(":")
        if name.removeprefix("gres/") == "gpu":
            is_number = details and details[-1].isdecimal()
            count += int(details[-1]) if is_number else 1
    return count


@contextlib.contextmanager
def outside_of_jobs(options: dict[str, object]) -> Iterator[None]:
    """Hide the job that this command runs in, if any: the new job would inherit its settings.

    Of the user's defaults in SBATCH_* variables, hides those that would override these options.
    """
    names = {"time": "TIMELIMIT", "switches": "REQ_SWITCH"}
    names |= dict.fromkeys(("mem", "mem_per_cpu", "mem_per_gpu"), "MEM_PER")
    overriding = list(HIDDEN_VARIABLES)
    for option in options:
        overriding.append(names.get(option, option.upper()))
    hidden = tuple(f"SBATCH_{name}" for name in overriding)
    kept = {}
    for name, value in os.environ.items():
        is_default = name.startswith("SBATCH_") and not name.startswith(hidden)
        if is_default or name in ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"):
            kept[name] = value
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def slurm_executor(
    folder: Path, copy: Path, args: argparse.Namespace, options: dict[str, object]
) -> submitit.SlurmExecutor:
    try:
        executor = submitit.SlurmExecutor(folder, python=shlex.join(TASK_PYTHON))
    except RuntimeError:
        raise UserError(
            "there is no srun on this machine: submit from a node of the cluster, "
            "or train here with --local"
        ) from None
    failure_file = (
        shlex.quote(f"{folder}/") + "${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}_failure.txt"
    )
    executor.update_parameters(
        additional_parameters=options,
        time=None,
        wckey=None,
        stderr_to_stdout=True,
        setup=[*setup_lines(args), visibility_check((copy, Path(__file__).resolve()), args.nodes)],
        # srun does not inherit --cpus-per-task from sbatch. With SBATCH_EXPORT=NONE, which some
        # centers set, it would not hand on the environment either.
        srun_args=[
            "--kill-on-bad-exit=1",
            "--export=ALL",
            f"--cpus-per-task={args.cpus_per_task}",
        ],
        # Users read rank 0's log, so it ends with the cause of a failure.
        teardown=[
            "status=$?",
            f"[ $status = 0 ] || cat {failure_file} 2>/dev/null",
            "exit $status",
        ],
    )
    return executor


def local_executor(folder: Path, args: argparse.Namespace) -> submitit.LocalExecutor:
    # The child processes inherit this. So Ctrl-C reaches the tasks, which save, but not submitit's
    # controller, which would kill them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # When the terminal closes, the job goes on.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    lines = [*setup_lines(args), 'exec "$@"']
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    if args.gpus_per_node and gpus is not None:
        # submitit replaces it by the numbers from 0.
        lines.insert(0, f"export CUDA_VISIBLE_DEVICES={shlex.quote(gpus)}")
    # Not through submitit's `setup`, which puts a shell between the job id and the controller:
    # killing the job would only kill the shell.
    shell = ("bash", "-c", "\n".join(lines), "bash")
    executor = submitit.LocalExecutor(folder, python=shlex.join([*shell, *TASK_PYTHON]))
    executor.update_parameters(
        tasks_per_node=args.tasks_per_node,
        gpus_per_node=args.gpus_per_node,
        timeout_min=365 * 24 * 60,
        stderr_to_stdout=True,
    )
    return executor


def scontrol(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(["scontrol", *argv], check=False, capture_output=True, text=True)


def job_info(job_id: str) -> dict[str, str]:
    """Return what Slurm knows about a job: JobState, Reason, ExitCode, ..."""
    while True:
        answer = scontrol("show", "job", "--oneliner", job_id)
        if answer.returncode == 0:
            words = [word.partition("=") for word in answer.stdout.split()]
            return {key: value for key, _, value in words}
        if "Invalid job id" in answer.stderr:
            return {"JobState": "FORGOTTEN", "ExitCode": "1:0"}
        time.sleep(5)  # Slurm's controller is down


def progress_of(job: submitit.Job, is_local: bool) -> tuple[str, int | None]:
    """Return what Slurm says about a job, and its exit status; None while it is not over."""
    if is_local:
        if not job.done():
            return "", None
        tasks = [job.task(rank) for rank in range(job.num_tasks)]
        # Each successful task leaves a result.
        return "", 0 if all(task.paths.result_pickle.exists() for task in tasks) else 1
    info = job_info(job.job_id)
    state = info["JobState"]
    if state == "PENDING":
        state += f" ({info['Reason']})"
    if state not in FINAL_STATES:
        return state, None
    if state == "COMPLETED":
        return state, 0
    code, number = info["ExitCode"].split(":")
    return state, int(code) or 128 + int(number)


def follow(log: Path, job: submitit.Job, is_local: bool) -> int:
    """Print the states and the log of a job. Return the job's exit status when it has ended."""
    position = 0
    shown = ""
    status = None
    while status is None:
        time.sleep(1)
        # Before reading, so that the end of the log is not missed.
        state, status = progress_of(job, is_local)
        if state != shown:
            print(f"job {job.job_id}: {state}", file=sys.stderr)
            shown = state
        if log.exists():
            with open(log, "rb") as file:
                file.seek(position)
                sys.stdout.buffer.write(file.read())
                sys.stdout.buffer.flush()
                position = file.tell()
    if not log.exists():
        print(
            f"error: there is no {log}. If the job has started, its node does not see that folder: "
            "name a --work-dir that all machines share",
            file=sys.stderr,
        )
    return status


def check_request(
    args: argparse.Namespace, train_args: argparse.Namespace, work_dir: Path, data: dict
) -> None:
    """Raise UserError for what would otherwise fail after the job has waited in the queue."""
    if args.local and (args.nodes > 1 or args.dry_run):
        raise UserError("--local uses this machine alone: it allows one node and no --dry-run")
    for item in args.slurm:
        key, _, value = item.partition("=")
        option = key.replace("-", "_")
        if option in OWN_OPTIONS:
            raise UserError(
                f"--slurm {item} contradicts what this command sets: use {OWN_OPTIONS[option]}"
            )
        gpus = gpus_in(value)
        if option == "gres" and gpus not in (0, args.gpus_per_node):
            raise UserError(
                f"--slurm {item} requests {gpus} GPU(s) per node, but there are tasks for "
                f"{args.gpus_per_node}: add --gpus-per-node {gpus}"
            )
    processes = args.nodes * args.tasks_per_node
    parts = processes * data.get("accumulate", 1)
    if data["batch_size"] % parts and not train_args.eval_only:
        raise UserError(
            f"data.batch_size {data['batch_size']} cannot be split evenly over {processes} "
            "processes (x data.accumulate). Request other nodes or GPUs, or set it to a multiple "
            f"of {parts}, which needs another learning rate."
        )
    if "%" in str(work_dir) or "\\" in str(work_dir):
        raise UserError(
            f"work_dir {work_dir}: Slurm replaces % and \\ in the names of its logs. Name another "
            "with --work-dir; each job writes its own files into work_dir/slurm."
        )
    for path in (train_args.load_from, train_args.resume_from):
        if path not in (None, "auto") and not Path(path).is_file():
            raise UserError(f"checkpoint {path} does not exist")


def requested_port() -> int:
    """Return MASTER_PORT, or 0 for any free port."""
    port = os.environ.get("MASTER_PORT", "0")
    if not port.isdigit() or int(port) > 65535:
        raise UserError(
            f"MASTER_PORT={port} in the environment is not a port. Unset it, and each job takes a "
            "free port."
        )
    return int(port)


def launch(args: argparse.Namespace, train_argv: list[str]) -> int:
    """Submit the job. Return the exit status of this command."""
    args.nodes, args.gpus_per_node, args.tasks_per_node = resolve_resources(
        args.nodes, args.gpus, args.gpus_per_node, args.tasks_per_node
    )
    train_args = train.parse_args(train_argv)
    if not train_args.config:
        raise UserError("--config is missing; each job keeps a copy of its config")
    config = train.load_config(train_args.config, train_args.options)
    work_dir = Path(train_args.work_dir or config["work_dir"]).absolute()
    check_request(args, train_args, work_dir, config["data"])
    args.job_name = args.job_name or work_dir.name
    if not args.cpus_per_task:
        workers = config["data"].get("workers")
        args.cpus_per_task = 1 + (DEFAULT_WORKERS if workers is None else workers)
    resume_from = train_args.resume_from
    if resume_from is None and not train_args.eval_only:
        resume_from = "auto"
    folder = work_dir / "slurm"
    copy = folder / f"config_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}.json"
    task = Job(train_argv, copy, work_dir, resume_from, requested_port(), config["timeout"])
    options = sbatch_options(args)
    try:
        if args.local:
            executor = local_executor(folder, args)
        else:
            executor = slurm_executor(folder, copy, args, options)
        if args.dry_run:
            print(executor._make_submission_file_text(executor._submitit_command_str, ""))
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        train.atomic_write(copy, lambda file: file.write(json.dumps(config).encode()))
        # submitit prints sbatch's error, and raises it too.
        with contextlib.redirect_stderr(io.StringIO()), outside_of_jobs(options):
            job = executor.submit(task)
    except OSError as error:
        raise UserError(
            f"work_dir {work_dir} cannot be written: {error}. Choose another with --work-dir."
        ) from None
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(
            f"Slurm refuses this job: {error}\n"
            "`sinfo -o '%P %l %D %c %m %G'` shows limits, nodes, cores, memory and GPUs."
        ) from None
    log = folder / f"{job.job_id}_0_log.out"
    print(
        f"job {job.job_id}: {args.nodes} node(s), each with {args.gpus_per_node} GPU(s) and "
        f"{args.tasks_per_node} task(s)\n"
        f"  log     {log} (other ranks: {job.job_id}_RANK_log.out)\n"
        f"  follow  tail -F {shlex.quote(str(log))}\n"
        f"  cancel  {'kill' if args.local else 'scancel'} {job.job_id}",
        flush=True,
    )
    if not args.follow:
        return 0
    try:
        return follow(log, job, args.local)
    except (KeyboardInterrupt, BrokenPipeError):
        print(f"\njob {job.job_id} goes on", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    train.escape_output()
    args, train_argv = parse_args(argv)
    try:
        return launch(args, train_argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    import launch_slurm

    # Under its own name, so that the job is pickled as launch_slurm.Job, not as __main__.Job.
    sys.exit(launch_slurm.main())
