"""launch_slurm.py on a real Slurm cluster, which slurm_cluster.sh starts on this machine.

Several machines without Slurm are tested there too. Each test stands below the job that it checks.
All jobs start when the first test needs one, and run at the same time. A job that breaks a node
has nodes of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

launch_slurm = pytest.importorskip("launch_slurm")  # needs submitit

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.json"
MAX_ITERS = 24
CHECKPOINT_INTERVAL = 8


def small_config() -> dict:
    config = json.loads(QUICKSTART.read_text())
    config["precision"] = "fp32"
    config["schedule"] = {"max_iters": MAX_ITERS}
    config["evaluation"] = {"interval": MAX_ITERS}
    config["checkpoint"] = {"interval": CHECKPOINT_INTERVAL, "keep": 9}
    config["log"] = {"interval": 1}
    config["data"] |= {"workers": 0, "crop_size": [48, 48], "length": 20, "val_length": 4}
    # Dropout depends on the rank, and runs with different numbers of ranks are compared.
    config["model"]["decode_head"]["dropout_ratio"] = 0.0
    config["model"]["auxiliary_head"]["dropout_ratio"] = 0.0
    return config


CONFIG = small_config()

# Replaces data.py in jobs, which these variables disturb:
# PAUSE: seconds to sleep before every iteration.
# BREAK: the rank that raises an error at iteration 10.
# HALT: no iteration from the tenth on starts before this file exists.
DISTURBED_DATA = f"""
import os, time
exec(compile(open({str(ROOT / "data.py")!r}).read(), {str(ROOT / "data.py")!r}, "exec"))
undisturbed = Data.train_batches

def train_batches(self, rank=0, world_size=1, start=0):
    for iteration, batch in enumerate(undisturbed(self, rank, world_size, start), start):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        if iteration >= 10 and os.environ.get("BREAK") == str(rank):
            raise RuntimeError("broken on purpose")
        while iteration >= 10 and "HALT" in os.environ and not os.path.exists(os.environ["HALT"]):
            time.sleep(0.1)
        yield batch

Data.train_batches = train_batches
"""
# With LATE set, the first start of a task creates that file before it imports anything, and goes on
# once a stop signal is pending. When it exits, a task prints whether it ignores SIGUSR2.
SITECUSTOMIZE = """
import atexit, os, signal, sys, time
is_task = "submitit.core._submit" in sys.orig_argv
if is_task:
    handler = lambda: signal.getsignal(signal.SIGUSR2)
    atexit.register(lambda: print("ignores SIGUSR2:", handler() == signal.SIG_IGN))
if is_task and os.environ.get("LATE") and "SLURM_RESTART_COUNT" not in os.environ:
    open(os.environ["LATE"], "w").close()
    while not signal.sigpending() & {signal.SIGTERM, signal.SIGUSR2}:
        time.sleep(0.05)
"""
# Submits many jobs from one process, which imports torch once.
SUBMIT = """
import json, os, sys, launch_slurm
for environment, argv in json.load(sys.stdin):
    os.environ.update(environment)
    if launch_slurm.main(argv):
        print("refused", flush=True)
    for name in environment:
        del os.environ[name]
"""


def wait_for(
    condition: Callable[[], bool], seconds: float = 240, explain: Callable[[], str] = str
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s\n{explain()}"
        time.sleep(0.2)


class Cluster:
    """Slurm on `nodes` nodes of this machine.

    Nothing of it outlives `stop`, or this process if it is killed.
    """

    def __init__(self, nodes: int):
        # Not in pytest's folder: the path of a socket is limited to 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="cluster-", dir="/tmp"))
        self.folder.chmod(0o755)
        # The current directory of all commands. It is not ROOT, because `python -m` finds modules
        # there before those of PYTHONPATH, and so the undisturbed data.py.
        self.runs = self.folder / "runs"
        self.runs.mkdir()
        self.script = str(ROOT / "tests" / "slurm_cluster.sh")
        self.log = self.folder / "head.out"
        spaces = "--net --mount --uts --pid --fork --kill-child --mount-proc --propagation private"
        head = ("bash", self.script, "head", str(self.folder), str(nodes))
        with open(self.log, "w") as log:
            self.outer = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces.split(), *head],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for(lambda: self.idle_nodes() == str(nodes), 30, self.log.read_text)
        except BaseException:
            self.stop()
            raise

    def idle_nodes(self) -> str:
        if not (self.folder / "munge/socket").exists():
            return ""
        query = ("sinfo", "--noheader", "-p", "dev", "-t", "idle", "-o", "%D")
        return self.call(*query, check=False).strip()

    def command(self, argv: tuple, node: int | None = None) -> list[str]:
        """`argv` as it runs on the head, or on a node."""
        outer = self.outer.pid
        head = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0]
        enter = ["nsenter", "--all", "--target", head]
        if node:
            pid = (self.folder / f"node{node}.pid").read_text().strip()
            find_init = "$(cat /proc/$pid/task/$pid/children)"
            script = f'pid={pid}; exec nsenter --all --target {find_init} "$@"'
            enter += ["bash", "-c", script, "bash"]
        environment = [f"PYTHONPATH={ROOT}", f"SLURM_CONF={self.folder}/slurm.conf"]
        return [*enter, "env", "-C", str(self.runs), *environment, *map(str, argv)]

    def call(self, *argv, check: bool = True, **options) -> str:
        """What a command prints that runs on the head."""
        command = self.command(argv)
        return subprocess.run(
            command, check=check, stdout=subprocess.PIPE, text=True, **options
        ).stdout

    def start(self, name: str, *argv, node: int | None = None) -> subprocess.Popen:
        """Start a command on the head or on a node; its output goes to NAME.out."""
        with open(self.runs / f"{name}.out", "a") as output:
            return subprocess.Popen(
                self.command(argv, node), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def power_off(self, node: int) -> None:
        self.call("bash", self.script, "kill", self.folder, node)

    def boot(self, node: int) -> None:
        self.call("bash", self.script, "boot", self.folder, node)

    def stop(self) -> None:
        self.outer.kill()
        self.outer.wait()
        time.sleep(0.5)  # until the kernel has killed all processes of the namespaces
        shutil.rmtree(self.folder, ignore_errors=True)


class Runs:
    """The jobs of this file. Each has a work_dir of its name in the cluster's `runs` folder."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.folder = cluster.runs
        self.ids: dict[str, str] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        self.watchers: list[threading.Thread] = []
        self.is_stopping = False

    def start(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(CONFIG))
        disturbed = self.folder / "disturbed"
        disturbed.mkdir()
        (disturbed / "data.py").write_text(DISTURBED_DATA)
        (disturbed / "sitecustomize.py").write_text(SITECUSTOMIZE)
        (disturbed / "run.py").write_text(
            f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
        )
        # A folder in which another project has a module of the same name as ours.
        (self.folder / "other").mkdir()
        (self.folder / "other" / "models.py").write_text("raise ImportError")
        (self.folder / "hidden").mkdir()
        hide = ("mount", "-t", "tmpfs", "tmpfs", self.folder / "hidden")
        subprocess.run(self.cluster.command(hide, node=5), check=True)
        self.submit()
        for name, (argv, node) in PROGRAMS.items():
            self.processes[name] = self.cluster.start(name, *argv, node=node)
        for condition, action in EVENTS:
            watcher = threading.Thread(target=self.watch, args=(condition, action))
            watcher.start()
            self.watchers.append(watcher)

    def submit(self) -> None:
        jobs = json.dumps(list(JOBS.values()))
        command = (sys.executable, "-c", SUBMIT)
        self.submitted = self.cluster.call(*command, input=jobs, stderr=subprocess.STDOUT)
        ids = re.findall(r"^job (\d+):|^refused", self.submitted, re.MULTILINE)
        self.ids = dict(zip(JOBS, ids, strict=True))

    def watch(self, condition: Callable, action: Callable) -> None:
        while not self.is_stopping and not condition(self):
            time.sleep(0.3)
        if not self.is_stopping:
            action(self)

    def stop(self) -> None:
        self.is_stopping = True
        for process in self.processes.values():
            process.kill()
        for watcher in self.watchers:
            watcher.join()

    def log(self, name: str) -> str:
        file = self.folder / name / "slurm" / f"{self.ids[name]}_0_log.out"
        return file.read_text() if file.exists() else ""

    def metrics(self, name: str) -> list[dict]:
        file = self.folder / name / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines()]

    def iteration(self, name: str) -> int:
        """How many iterations it has finished."""
        return max([line["iteration"] for line in self.metrics(name)], default=0)

    def losses(self, name: str) -> list[float]:
        """The loss of every iteration. No line may be missing or doubled."""
        lines = [line for line in self.metrics(name) if line["mode"] == "train"]
        assert [line["iteration"] for line in lines] == list(range(1, MAX_ITERS + 1))
        return [line["loss"] for line in lines]

    def job(self, name: str) -> dict[str, str]:
        """What Slurm knows about a job."""
        text = self.cluster.call("scontrol", "show", "job", "-o", self.ids[name])
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, name: str) -> dict[str, str]:
        """Wait until a job has ended. Return what Slurm knows about it then."""

        def has_ended() -> bool:
            return self.job(name)["JobState"] in launch_slurm.FINAL_STATES

        wait_for(has_ended, explain=lambda: f"{self.job(name)}\n{self.log(name)}")
        return self.job(name)

    def output(self, name: str) -> tuple[int, str]:
        """Exit status and output of a started program, when it has ended."""
        return self.processes[name].wait(240), (self.folder / f"{name}.out").read_text()

    def assert_undisturbed(self, name: str) -> None:
        """A run of two processes has the losses and weights of `pair`, which nothing disturbed."""
        self.wait("pair")
        assert self.losses(name) == self.losses("pair")
        states = []
        for run in (name, "pair"):
            path = self.folder / run / f"iter_{MAX_ITERS}.pth"
            states.append(torch.load(path, weights_only=True)["state_dict"])
        found, expected = states
        assert found.keys() == expected.keys()
        for key in expected:
            assert torch.equal(found[key], expected[key]), key


# What `Runs.start` starts: jobs to submit (their environment and launch_slurm.py's arguments),
# programs (command and node; None is the head), and events (condition and action).
JOBS: dict[str, tuple[dict[str, str], list[str]]] = {}
PROGRAMS: dict[str, tuple[tuple, int | None]] = {}
EVENTS: list[tuple[Callable[[Runs], bool], Callable[[Runs], object]]] = []

CPUS = ("--gpus-per-node", 0)
TWO_TASKS = (*CPUS, "--tasks-per-node", 2)
TWO_NODES = (*CPUS, "--nodes", 2)


def flags(name: str, *slurm, nodes: str = "", setup: str = "true") -> list[str]:
    """launch_slurm.py's arguments for a job. nodes: those that it must run on."""
    argv = [*slurm, "--cpus-per-task", 1]
    argv += ["--setup", "export OMP_NUM_THREADS=1 PYTHONPATH=$PWD/disturbed:$PYTHONPATH"]
    argv += ["--setup", setup]
    if nodes:
        argv += ["--slurm", f"nodelist={nodes}"]
    argv += ["--config", "config.json", "--work-dir", name]
    return [str(argument) for argument in argv]


def submitted(name: str, *slurm, environment: dict | None = None, **options) -> None:
    JOBS[name] = (environment or {}, flags(name, *slurm, **options))


def followed(name: str, *slurm, environment: tuple = (), **options) -> None:
    """Start `launch_slurm.py --follow` on the head."""
    command = ("env", *environment, sys.executable, ROOT / "launch_slurm.py", "--follow")
    PROGRAMS[name] = ((*command, *flags(name, *slurm, **options)), None)


def once(condition: Callable[[Runs], bool]) -> Callable:
    """Run the decorated function when `condition(runs)` is true."""

    def register(action: Callable[[Runs], object]) -> Callable:
        EVENTS.append((condition, action))
        return action

    return register


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    programs = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "setpriv")
    missing = [name for name in programs if not shutil.which(name)]
    reason = ""
    if missing:
        packages = "slurmctld slurmd slurm-client munge iproute2"
        reason = f"needs {', '.join(missing)}: apt-get install {packages}"
    if os.geteuid() != 0:
        reason = "needs root"
    if reason and os.environ.get("REQUIRE_ALL"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    cluster = Cluster(nodes=10)
    runs = Runs(cluster)
    try:
        runs.start()
        yield runs
    finally:
        runs.stop()
        cluster.stop()


# --------------------------------------------------------------------------- Jobs on several nodes

submitted("four", "--nodes", 2, "--gpus-per-node", 2, nodes="node[1-2]")
PROGRAMS["torchrun"] = (
    (
        *("env", "OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc_per_node", 4, ROOT / "train.py"),
        *("--config", "config.json", "--work-dir", "torchrun"),
    ),
    None,
)


def test_two_nodes_equal_four_processes_of_torchrun(runs: Runs):
    assert runs.wait("four")["JobState"] == "COMPLETED", runs.log("four")
    code, output = runs.output("torchrun")
    assert code == 0, output
    assert runs.losses("four") == runs.losses("torchrun")


submitted("pair", *TWO_NODES, nodes="node[1-2]")


def test_two_jobs_on_the_same_nodes_do_not_collide(runs: Runs):
    four = runs.wait("four")
    pair = runs.wait("pair")
    assert four["NodeList"] == pair["NodeList"] == "node[1-2]"
    assert max(four["StartTime"], pair["StartTime"]) < min(four["EndTime"], pair["EndTime"])
    # Both run the same experiment, on different numbers of processes.
    first = slice(CHECKPOINT_INTERVAL)
    assert runs.losses("pair")[first] == pytest.approx(runs.losses("four")[first], rel=1e-4)


# -------------------------------------------------------------------------- Stopped, lost, resumed

preemptible = ("--partition", "dev", "--time", 60)
# The pauses last long enough for the scheduler of a busy machine.
submitted(
    "preempted",
    *(*TWO_NODES, *preemptible),
    nodes="node[3-4]",
    setup='[ "$SLURM_RESTART_COUNT" ] || export PAUSE=2',
)


@once(lambda runs: runs.iteration("preempted") >= 3)
def preempt(runs: Runs) -> None:
    urgent = ("--partition=urgent", "--nodelist=node3", "--exclusive", "--wrap=sleep 1")
    runs.cluster.call("sbatch", *urgent)


def test_a_preempted_job_resumes_where_it_stopped(runs: Runs):
    job = runs.wait("preempted")
    log = runs.log("preempted")
    assert job["JobState"] == "COMPLETED", log
    assert job["Restarts"] == "1", log
    stopped = int(re.search(r"stopped by a signal after iteration (\d+)", log)[1])
    assert stopped >= 3
    assert f"at iteration {stopped}" in log
    runs.assert_undisturbed("preempted")


submitted("lost", *TWO_NODES, "--exclude", "node[1-5]", setup="export HALT=$PWD/node_lost")


@once(lambda runs: runs.iteration("lost") == 10)
def lose_a_node(runs: Runs) -> None:
    runs.cluster.power_off(7)
    (runs.folder / "node_lost").touch()


def test_after_the_loss_of_a_node_a_job_resumes_elsewhere(runs: Runs):
    job = runs.wait("lost")
    log = runs.log("lost")
    assert job["JobState"] == "COMPLETED", log
    assert job["Restarts"] == "1", log
    assert "node7" not in runs.cluster.call("scontrol", "show", "hostnames", job["NodeList"])
    assert f"iter_{CHECKPOINT_INTERVAL}.pth at iteration {CHECKPOINT_INTERVAL}" in log
    runs.assert_undisturbed("lost")


submitted(
    "limited",
    *(*CPUS, "--time", "00:01:00", "--slurm", "signal_delay_s=30"),
    nodes="node5",
    setup='[ "$SLURM_RESTART_COUNT" ] || export PAUSE=5',
)


def test_a_job_saves_ahead_of_its_time_limit_and_resumes(runs: Runs):
    job = runs.wait("limited")
    log = runs.log("limited")
    assert job["JobState"] == "COMPLETED", log
    assert int(job["Restarts"]) >= 1, log
    assert "stopped by a signal after iteration" in log
    assert "DUE TO TIME LIMIT" not in log
    assert len(runs.losses("limited")) == MAX_ITERS
    # The next notice may come while Python exits, and must not fail the job.
    assert "ignores SIGUSR2: True" in log


submitted("late", *CPUS, nodes="node5", setup="export LATE=$PWD/late_start")


@once(lambda runs: (runs.folder / "late_start").exists())
def notify_before_the_start(runs: Runs) -> None:
    runs.cluster.call("scancel", "--signal=USR2", runs.ids["late"])


def test_a_signal_before_a_task_has_imported_anything_is_not_lost(runs: Runs):
    job = runs.wait("late")
    assert job["JobState"] == "COMPLETED", runs.log("late")
    assert job["Restarts"] == "1", runs.log("late")
    assert "stopped by a signal after iteration 1 of" in runs.log("late")


submitted("cancelled", *CPUS, nodes="node5", setup="export PAUSE=1")


@once(lambda runs: runs.iteration("cancelled") >= 2)
def cancel(runs: Runs) -> None:
    runs.cluster.call("scancel", runs.ids["cancelled"])


def test_a_cancelled_job_saves_and_does_not_restart(runs: Runs, monkeypatch):
    job = runs.wait("cancelled")
    wait_for(
        lambda: "stopped by a signal" in runs.log("cancelled"), 20, lambda: runs.log("cancelled")
    )
    assert list((runs.folder / "cancelled").glob("iter_*.pth"))
    time.sleep(8)  # a requeued job would have started by then
    assert job["JobState"] == runs.job("cancelled")["JobState"] == "CANCELLED"
    assert job["Restarts"] == "0"
    # --follow would not report success, although all tasks have exited with 0.
    monkeypatch.setattr(launch_slurm, "job_info", lambda job_id: job)
    assert launch_slurm.progress_of(SimpleNamespace(job_id="1"), is_local=False)[1] >= 128


submitted("stalled", *CPUS, nodes="node5", setup="export PAUSE=60")


def requeue_stalled(runs: Runs) -> None:
    runs.cluster.call("scontrol", "requeue", runs.ids["stalled"])


once(lambda runs: runs.log("stalled").count("starting afresh") == 1)(requeue_stalled)
once(lambda runs: runs.log("stalled").count("starting afresh") == 2)(requeue_stalled)


def test_a_job_that_restarts_without_progress_ends(runs: Runs):
    job = runs.wait("stalled")
    log = runs.log("stalled")
    assert job["JobState"] == "FAILED", log
    assert job["Restarts"] == "2", log
    message = r"^error: job \d+ restarted twice without a checkpoint beyond iteration 0"
    assert re.search(message, log, re.MULTILINE), log


# ---------------------------------------------------------------------------------------- Failures

followed("failed", *TWO_TASKS, nodes="node5", setup="set -e; export BREAK=1")


def test_the_traceback_of_the_rank_that_fails_first_is_shown(runs: Runs):
    code, output = runs.output("failed")
    assert code == 1
    assert re.search(r"job \d+: RUNNING", output), output
    assert re.search(r"job \d+: FAILED", output), output
    assert "rank 1 on node5 failed first:\nTraceback" in output
    assert "\nRuntimeError: broken on purpose" in output


# slurmd listens on this port.
submitted("port", *TWO_TASKS, nodes="node5", environment={"MASTER_PORT": "6818"})


def test_a_requested_port_that_is_in_use(runs: Runs):
    assert runs.wait("port")["JobState"] == "FAILED"
    message = "error: port 6818 of node5 is in use, and MASTER_PORT=6818 was set at submission"
    assert message in runs.log("port")


# What a job, an array task and the settings of some centers leave in the environment.
enclosing = {
    "SBATCH_ARRAY_INX": "0-1",
    "SBATCH_CPUS_PER_GPU": "4",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_OUTPUT": "/nowhere",
    "SBATCH_PARTITION": "nowhere",
    "SBATCH_WAIT": "1",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_JOB_ID": "77",
    "SLURM_MEM_PER_NODE": "1",
    "SLURM_NTASKS": "5",
    "SUBMITIT_EXECUTOR": "local",
}
in_dev = ("--slurm", "partition=dev")
submitted("enclosed", *TWO_TASKS, *in_dev, nodes="node4", environment=enclosing, setup="cd other")


def test_a_job_submitted_from_within_a_job(runs: Runs):
    assert runs.wait("enclosed")["JobState"] == "COMPLETED", runs.log("enclosed")
    assert len(runs.losses("enclosed")) == MAX_ITERS


followed("hidden/all", *CPUS, nodes="node5")
submitted("hidden/one", *TWO_NODES, nodes="node[4-5]")


def test_a_work_dir_that_a_node_does_not_see(runs: Runs):
    code, output = runs.output("hidden/all")
    assert code > 0
    assert re.search("error: there is no .*its node does not see that folder", output), output
    assert runs.wait("hidden/one")["JobState"] == "FAILED"
    assert re.search("error: node5 does not see .*hidden/one", runs.log("hidden/one"))


submitted("nowhere", *CPUS, "--partition", "nowhere")
submitted("greedy", "--gpus-per-node", 9, "--options", "data.batch_size=9")


def test_jobs_that_slurm_refuses(runs: Runs):
    refused = "error: Slurm refuses this job: "
    assert re.search(refused + ".*invalid partition", runs.submitted), runs.submitted
    message = refused + ".*node configuration is not available"
    assert re.search(message, runs.submitted, re.DOTALL), runs.submitted


# ----------------------------------------------------------------------------------- Without Slurm

followed("local", *TWO_TASKS, "--local")


def test_local_runs_the_same_job(runs: Runs):
    code, output = runs.output("local")
    assert code == 0, output
    assert f"Iter [{MAX_ITERS}/{MAX_ITERS}]" in output
    first = slice(CHECKPOINT_INTERVAL)
    assert runs.losses("local")[first] == pytest.approx(runs.losses("four")[first], rel=1e-4)


followed("local_failed", *TWO_TASKS, "--local", setup="export BREAK=1")


def test_local_shows_the_traceback_of_the_rank_that_fails_first(runs: Runs):
    code, output = runs.output("local_failed")
    assert code == 1, output
    assert "rank 1 on head failed first:\nTraceback" in output
    assert "\nRuntimeError: broken on purpose" in output


def kill_local(runs: Runs, name: str) -> None:
    """Run the command to cancel a job that launch_slurm.py printed."""
    output = (runs.folder / f"{name}.out").read_text()
    runs.cluster.call(*re.search(r"cancel  (kill \d+)", output)[1].split())


followed("local_stopped", *CPUS, "--local", setup="export PAUSE=1")


@once(lambda runs: runs.iteration("local_stopped") >= 2)
def stop_local(runs: Runs) -> None:
    kill_local(runs, "local_stopped")


def test_local_saves_when_it_is_killed(runs: Runs):
    code, output = runs.output("local_stopped")
    assert code == 1, output
    assert re.search(r"job \d+ stopped and saved its state; run the same command", output), output


followed(
    "local_late",
    *("--local", "--gpus-per-node", 1),
    environment=("CUDA_VISIBLE_DEVICES=GPU-name",),
    setup='echo "GPUs: $CUDA_VISIBLE_DEVICES"; export LATE=$PWD/local_late_start',
)


@once(lambda runs: (runs.folder / "local_late_start").exists())
def stop_local_before_the_start(runs: Runs) -> None:
    kill_local(runs, "local_late")


def test_local_loses_no_signal_before_a_task_has_imported_anything(runs: Runs):
    code, output = runs.output("local_late")
    assert code == 1, output
    assert "stopped by a signal after iteration 1 of" in output
    assert re.search(r"job \d+ stopped and saved its state", output), output
    assert "GPUs: GPU-name\n" in output


host = (
    # torchrun 2.14 shares its store by default, and then the agent that survives never tells the
    # one that comes back where to meet.
    *("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "OMP_NUM_THREADS=1", "HALT=hosts_lost"),
    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 1, "--nnodes", 2),
    *("--max-restarts", 3, "--rdzv-backend", "c10d", "--rdzv-endpoint", "node9:29400"),
    *("disturbed/run.py", "--config", "config.json", "--work-dir", "hosts"),
    *("--resume-from", "auto"),
)
PROGRAMS["host9"] = (host, 9)
PROGRAMS["host10"] = (host, 10)


@once(lambda runs: runs.iteration("hosts") == 10)
def reboot_a_host(runs: Runs) -> None:
    runs.cluster.power_off(10)
    (runs.folder / "hosts_lost").touch()
    runs.cluster.boot(10)
    runs.processes["host10"] = runs.cluster.start("host10", *host, node=10)
    (runs.folder / "host_rebooted").touch()


def test_torchrun_on_two_hosts_of_which_one_reboots(runs: Runs):
    wait_for((runs.folder / "host_rebooted").exists)
    for name in ("host9", "host10"):
        code, output = runs.output(name)
        assert code == 0, output
    log = (runs.folder / "hosts" / "train.log").read_text()
    assert f"iter_{CHECKPOINT_INTERVAL}.pth at iteration {CHECKPOINT_INTERVAL}" in log
    runs.assert_undisturbed("hosts")


# ----------------------------------------------------------------------------------- Command line


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("", (1, 1, 1)),
        ("--gpus 16", (2, 8, 8)),
        ("--gpus 4", (1, 4, 4)),
        ("--gpus 12 --nodes 3", (3, 4, 4)),
        ("--gpus 6 --gpus-per-node 2", (3, 2, 2)),
        ("--nodes 2 --gpus-per-node 8", (2, 8, 8)),
        ("--gpus-per-node 4 --tasks-per-node 4", (1, 4, 4)),
        ("--gpus-per-node 0 --tasks-per-node 4", (1, 0, 4)),
        ("--nodes 3 --gpus-per-node 0", (3, 0, 1)),
    ],
)
def test_resources(requested: str, expected: tuple):
    args, train_argv = launch_slurm.parse_args(requested.split())
    assert train_argv == []
    resources = (args.nodes, args.gpus, args.gpus_per_node, args.tasks_per_node)
    assert launch_slurm.resolve_resources(*resources) == expected


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("--gpus 12", "--gpus 12 does not equal 1 node(s) x 8"),
        ("--gpus 3 --nodes 2", "whose product is 3"),
        ("--gpus 2 --nodes 4", "does not equal"),
        ("--gpus 4 --gpus-per-node 0", "does not equal"),
        ("--gpus 0", "1 or more"),
        ("--nodes 0", "1 or more"),
        ("--gpus-per-node -1", "1 or more"),
        ("--gpus-per-node 4 --tasks-per-node 2", "each GPU has one task"),
        ("--gpus 3", "data.batch_size 8 cannot be split evenly over 3 processes"),
        ("--load-from nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("--options model.backbone.dept=34", "model.backbone.dept"),
        ("--local --nodes 2", "--local uses this machine alone"),
        ("--local --dry-run", "--local uses this machine alone"),
        ("--partition", "expected one argument"),
        ("--slurm array=0-3", "--slurm array=0-3 contradicts what this command sets: use one"),
        ("--slurm ntasks-per-node=3", "use --tasks-per-node"),
        ("--slurm output=log", "use --work-dir"),
        ("--slurm wait", "use --follow"),
        ("--slurm gres=gpu:a100:4,nvme:1", "add --gpus-per-node 4"),
        ("--partitoin dev", "unrecognized arguments: --partitoin dev"),
    ],
)
def test_a_bad_request_is_an_error_before_anything_is_submitted(
    requested: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture
):
    argv = [*requested.split(), "--config", str(QUICKSTART), "--work-dir", str(tmp_path / "run")]
    try:
        code = launch_slurm.main(argv)
    except SystemExit as error:  # from argparse
        code = error.code
    assert code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_work_dir_in_which_slurm_replaces_characters(capfd: pytest.CaptureFixture):
    """Its logs would be in another folder."""
    assert launch_slurm.main(["--config", str(QUICKSTART), "--work-dir", "runs/%j"]) == 2
    assert "runs/%j: Slurm replaces %" in capfd.readouterr().err


def test_a_work_dir_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "file").touch()
    work_dir = str(tmp_path / "file" / "run")
    assert launch_slurm.main(["--local", "--config", str(QUICKSTART), "--work-dir", work_dir]) == 2
    assert f"work_dir {work_dir} cannot be written" in capfd.readouterr().err


@pytest.mark.parametrize("port", ["http", "70000", "-1"])
def test_a_requested_port_that_is_not_one(
    port: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setenv("MASTER_PORT", port)
    assert launch_slurm.main(["--config", str(QUICKSTART)]) == 2
    assert f"MASTER_PORT={port} in the environment is not a port" in capfd.readouterr().err


def test_dry_run_prints_the_script_and_writes_nothing(runs: Runs, capfd: pytest.CaptureFixture):
    """It uses the cluster, because submitit needs srun."""
    requested = (
        "--nodes 2 --gpus-per-node 4 --partition dev --job-name psp --time 1-00:00:00 --mem 64G "
        "--qos high --account lab --constraint a100 --exclude n[1-2] --reservation r "
        "--cpus-per-task 6 --slurm exclusive --slurm mail-user=me --slurm signal_delay_s=300 "
        "--slurm gres=gpu:a100:4 "
        f"--dry-run --config {QUICKSTART} --work-dir {runs.folder}/dry"
    )
    assert launch_slurm.main([*requested.split(), "--setup", "module load cuda"]) == 0
    script = capfd.readouterr().out
    for option in (
        "nodes=2",
        "gres=gpu:a100:4",
        "ntasks-per-node=4",
        "partition=dev",
        "job-name=psp",
        "time=1-00:00:00",
        "mem=64G",
        "qos=high",
        "account=lab",
        "constraint=a100",
        "exclude='n[1-2]'",
        "reservation=r",
        "cpus-per-task=6",
        "exclusive",
        "mail-user=me",
        "signal=USR2@300",
        "requeue",
    ):
        assert f"#SBATCH --{option}\n" in script, script
    assert "--gpus-per-node" not in script
    assert "\nmodule load cuda\n" in script
    assert "--kill-on-bad-exit=1 --export=ALL --cpus-per-task=6" in script
    assert not (runs.folder / "dry").exists()
