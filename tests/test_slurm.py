"""Slurm, and several machines without it: on a real cluster, which this file starts and stops on this machine (slurm_cluster.sh).

All jobs run at the same time, each on nodes of its own where it breaks something; a test waits for its own.
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

import pytest
import torch

import launch_slurm

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS, EVERY = 24, 8  # of a run, and from one checkpoint to the next
CONFIG = json.loads((ROOT / "configs" / "quickstart.json").read_text())  # its net, on less
CONFIG |= {
    "precision": "fp32",
    "schedule": {"max_iters": ITERATIONS},
    "evaluation": {"interval": ITERATIONS},
    "checkpoint": {"interval": EVERY, "keep": 9},
    "log": {"interval": 1},
}
CONFIG["data"] |= {"workers": 0, "crop_size": [48, 48], "length": 20, "val_length": 4}
for head in ("decode_head", "auxiliary_head"):
    CONFIG["model"][head]["dropout_ratio"] = (
        0.0  # its noise belongs to a rank, and some runs here differ in their number
    )


# Takes the place of data.py in a job whose --setup puts it first: PAUSE seconds an iteration; a rank BREAK that fails at iteration 10; no iteration after
# the tenth before there is a file HALT.
MEDDLER = f"""
import os, time
exec(compile(open({str(ROOT / "data.py")!r}).read(), {str(ROOT / "data.py")!r}, "exec"))
_prepare = Data.prepare
def prepare(self, batch, device):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    if os.environ.get("BREAK") == os.environ.get("RANK", "0") and int(batch["position"][0]) >= 10 * self.batch_size:
        raise RuntimeError("broken on purpose")
    while "HALT" in os.environ and int(batch.get("position", [0])[0]) >= 10 * self.batch_size and not os.path.exists(os.environ["HALT"]):
        time.sleep(0.1)
    return _prepare(self, batch, device)
Data.prepare = prepare
"""
# With LATE set, the first start of a task says so in that file, and imports nothing before a signal has come that it holds back.
LATE = """
import os, pathlib, signal, sys, time
if os.environ.get("LATE") and "SLURM_RESTART_COUNT" not in os.environ and "submitit.core._submit" in sys.orig_argv:
    pathlib.Path(os.environ["LATE"]).touch()
    while signal.SIGUSR2 not in signal.sigpending():
        time.sleep(0.05)
"""
SUBMIT = """
import json, os, sys, launch_slurm
for environment, argv in json.load(sys.stdin):
    os.environ.update(environment)
    if launch_slurm.main(argv):
        print("refused", flush=True)
    for name in environment:
        del os.environ[name]
"""


class Cluster:
    """Slurm on `nodes` nodes of this machine, and what runs there. Nothing of it outlives `stop`, nor this process if that is killed."""

    def __init__(self, nodes: int):
        self.folder = Path(
            tempfile.mkdtemp(prefix="cluster-", dir="/tmp")
        )  # short: a socket's path has 108 bytes
        self.folder.chmod(0o755)
        self.script = str(ROOT / "tests" / "slurm_cluster.sh")
        with open(self.folder / "head.out", "w") as log:
            spaces = "unshare --net --mount --uts --pid --fork --kill-child --mount-proc --propagation private"
            self.outer = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    *spaces.split(),
                    "bash",
                    self.script,
                    "head",
                    str(self.folder),
                    str(nodes),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_for(
                lambda: (
                    (self.folder / "munge/socket").exists()
                    and self.call(
                        "sinfo", "-h", "-p", "dev", "-t", "idle", "-o", "%D", check=False
                    ).strip()
                    == str(nodes)
                ),
                30,
                lambda: (self.folder / "head.out").read_text(),
            )
        except BaseException:
            self.stop()
            raise

    def command(self, argv: tuple, node: int | None = None) -> list[str]:
        """`argv` as it runs on the head, or on a node."""

        def init_of(pid: int | str) -> str:
            return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]

        enter = ["nsenter", "--all", "--target", init_of(self.outer.pid)]
        if node:
            enter += [
                "bash",
                "-c",
                'p=$1; shift; exec nsenter --all --target $(cat /proc/$p/task/$p/children) "$@"',
                "-",
                (self.folder / f"node{node}.pid").read_text().strip(),
            ]
        # Not from ROOT: `python -m` finds the modules of the folder it starts in before those of PYTHONPATH, so before the meddler.
        return [
            *enter,
            "env",
            "-C",
            str(self.folder),
            f"PYTHONPATH={ROOT}",
            f"SLURM_CONF={self.folder}/slurm.conf",
            *map(str, argv),
        ]

    def call(self, *argv, check: bool = True, **keywords) -> str:
        """Runs it on the head; what it prints."""
        return subprocess.run(
            self.command(argv), check=check, stdout=subprocess.PIPE, text=True, **keywords
        ).stdout

    def start(self, output: Path, *argv, node: int | None = None) -> subprocess.Popen:
        with open(output, "a") as file:
            return subprocess.Popen(
                self.command(argv, node), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def power(self, on: bool, node: int) -> None:
        self.call("bash", self.script, "boot" if on else "kill", self.folder, node)

    def stop(self) -> None:
        self.outer.kill()
        self.outer.wait()
        time.sleep(0.5)  # for the name spaces to empty
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_for(
    true: Callable[[], bool], seconds: float = 240, otherwise: Callable[[], str] = str
) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s\n{otherwise()}"
        time.sleep(0.2)


class Runs:
    """The jobs of this file; each has a folder of its name. All are submitted at once, and `when` disturbs them as they run."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.ids, self.processes, self.events = (
            cluster,
            folder,
            {},
            {},
            [],
        )
        (folder / "config.json").write_text(json.dumps(CONFIG))
        self.meddler = folder / "meddler"
        self.meddler.mkdir()
        (self.meddler / "data.py").write_text(MEDDLER)
        (self.meddler / "sitecustomize.py").write_text(LATE)
        (self.meddler / "run.py").write_text(
            f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
        )

    def flags(self, name: str, *slurm, setup: str = "", options: tuple = ()) -> list[str]:
        """launch_slurm.py's command line for a job."""
        setup = [
            "--setup",
            f"export OMP_NUM_THREADS=1 PYTHONPATH={self.meddler}:$PYTHONPATH",
            *(["--setup", setup] if setup else []),
        ]
        return [
            *map(str, slurm),
            "--cpus-per-task",
            "1",
            *setup,
            "--config",
            str(self.folder / "config.json"),
            "--work-dir",
            str(self.folder / name),
            *(["--options", *options] if options else []),
        ]

    def submit(self, jobs: dict[str, tuple[dict, list[str]]]) -> None:
        self.submitted = self.cluster.call(
            sys.executable,
            "-c",
            SUBMIT,
            input=json.dumps(list(jobs.values())),
            stderr=subprocess.STDOUT,
        )
        self.ids |= dict(
            zip(
                jobs, re.findall(r"^job (\d+):|^refused", self.submitted, re.MULTILINE), strict=True
            )
        )

    def when(self, true: Callable[[], bool], act: Callable[[], object]) -> None:
        """Once it is true, acts."""

        def watch() -> None:
            while self.watching and not true():
                time.sleep(0.3)
            if self.watching:
                act()

        self.watching = True
        self.events.append(threading.Thread(target=watch))
        self.events[-1].start()

    def stop(self) -> None:
        self.watching = False
        for process in self.processes.values():
            process.kill()
        for event in self.events:
            event.join()

    def log(self, name: str, rank: int = 0) -> str:
        file = self.folder / name / "slurm" / f"{self.ids[name]}_{rank}_log.out"
        return file.read_text() if file.exists() else ""

    def iteration(self, name: str) -> int:
        """How many iterations it has finished."""
        file = self.folder / name / "metrics.jsonl"
        return (
            max(
                (json.loads(line)["iteration"] for line in file.read_text().splitlines()), default=0
            )
            if file.exists()
            else 0
        )

    def job(self, name: str) -> dict[str, str]:
        """What Slurm says of it."""
        return dict(
            re.findall(
                r"(\w+)=(\S*)", self.cluster.call("scontrol", "show", "job", "-o", self.ids[name])
            )
        )

    def wait(self, name: str) -> dict[str, str]:
        """Until it has ended; what Slurm says of it then."""
        wait_for(
            lambda: self.job(name)["JobState"] in launch_slurm.ENDED,
            otherwise=lambda: f"{self.job(name)}\n{self.log(name)}",
        )
        return self.job(name)

    def output(self, name: str) -> tuple[int, str]:
        """Exit status and output of a process that was started, when it has ended."""
        return self.processes[name].wait(240), (self.folder / f"{name}.out").read_text()

    def losses(self, name: str) -> list[float]:
        lines = [
            json.loads(line)
            for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        lines = [line for line in lines if line["mode"] == "train"]
        assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1)), (
            "no line lost, none doubled"
        )
        return [line["loss"] for line in lines]

    def assert_undisturbed(self, name: str) -> None:
        """That a run of two processes ended with the losses and weights of `pair`, to which nothing happened."""
        self.wait("pair")
        assert self.losses(name) == self.losses("pair")
        ours, theirs = (
            torch.load(self.folder / run / f"iter_{ITERATIONS}.pth", weights_only=True)[
                "state_dict"
            ]
            for run in (name, "pair")
        )
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        )


def submit_all(runs: Runs) -> None:
    def on(*nodes: int) -> tuple:
        return "--slurm", "nodelist=" + ",".join(f"node{node}" for node in nodes)

    cluster, cpus, slow, first_slow = (
        runs.cluster,
        ("--gpus-per-node", 0),
        "export PAUSE=0.5",
        '[ "$SLURM_RESTART_COUNT" ] || export PAUSE=5',
    )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node")
    # With its stores shared, torchrun 2.14's surviving agent never tells the one that comes back where to meet.
    host = (
        "env",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        "OMP_NUM_THREADS=1",
        f"HALT={runs.folder}/hosts_lost",
        *torchrun,
        1,
        "--nnodes",
        2,
        "--max-restarts",
        3,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "node9:29400",
        runs.meddler / "run.py",
        "--config",
        runs.folder / "config.json",
        "--work-dir",
        runs.folder / "hosts",
        "--resume-from",
        "auto",
    )
    launch, two = (
        (sys.executable, ROOT / "launch_slurm.py", "--follow"),
        (*cpus, "--tasks-per-node", 2),
    )
    programs = {
        "host9": (host, 9),
        "host10": (host, 10),
        "followed": (
            (*launch, *runs.flags("followed", *two, *on(5), setup="export BREAK=1")),
            None,
        ),
        "local": ((*launch, *runs.flags("local", *two, "--local")), None),
        "local_broken": (
            (*launch, *runs.flags("local_broken", *two, "--local", setup="export BREAK=1")),
            None,
        ),
        "local_stopped": (
            (*launch, *runs.flags("local_stopped", *cpus, "--local", setup="export PAUSE=1")),
            None,
        ),
        "torchrun": (
            (
                "env",
                "OMP_NUM_THREADS=1",
                *torchrun,
                4,
                "--standalone",
                ROOT / "train.py",
                "--config",
                runs.folder / "config.json",
                "--work-dir",
                runs.folder / "torchrun",
            ),
            None,
        ),
    }
    runs.submit(
        {
            "four": ({}, runs.flags("four", "--nodes", 2, "--gpus-per-node", 2, *on(1, 2))),
            "pair": ({}, runs.flags("pair", "--nodes", 2, *cpus, *on(1, 2))),
            "preempted": (
                {},
                runs.flags(
                    "preempted",
                    "--nodes",
                    2,
                    *cpus,
                    "--partition",
                    "dev",
                    "--time",
                    60,
                    *on(3, 4),
                    setup=slow,
                ),
            ),
            "lost": (
                {},
                runs.flags(
                    "lost",
                    "--nodes",
                    2,
                    *cpus,
                    "--exclude",
                    "node[1-5]",
                    setup=f"export HALT={runs.folder}/node_lost",
                ),
            ),
            "limited": (
                {},
                runs.flags(
                    "limited",
                    *cpus,
                    "--time",
                    "00:01:00",
                    "--slurm",
                    "signal_delay_s=30",
                    *on(5),
                    setup=first_slow,
                ),
            ),
            "late": (
                {},
                runs.flags("late", *cpus, *on(5), setup=f"export LATE={runs.folder}/late_starts"),
            ),
            "cancelled": ({}, runs.flags("cancelled", *cpus, *on(5), setup="export PAUSE=1")),
            "vain": ({}, runs.flags("vain", *cpus, *on(5), setup="export PAUSE=60")),
            "port": ({"MASTER_PORT": "6818"}, runs.flags("port", *two, *on(5))),  # slurmd's own
            "nowhere": ({}, runs.flags("nowhere", *cpus, "--partition", "nowhere")),
            "greedy": (
                {},
                runs.flags("greedy", "--gpus-per-node", 9, options=("data.batch_size=9",)),
            ),
        }
    )
    runs.processes |= {
        name: cluster.start(runs.folder / f"{name}.out", *argv, node=node)
        for name, (argv, node) in programs.items()
    }

    def lose(node: int, file: str) -> None:
        cluster.power(False, node)
        (runs.folder / file).touch()

    def boot_again() -> None:
        lose(10, "hosts_lost")
        cluster.power(True, 10)
        runs.processes["host10"] = cluster.start(runs.folder / "host10.out", *host, node=10)

    runs.when(
        lambda: runs.iteration("preempted") >= 3,
        lambda: cluster.call(
            "sbatch", "--partition=urgent", "--nodelist=node3", "--exclusive", "--wrap=sleep 1"
        ),
    )
    runs.when(lambda: runs.iteration("lost") == 10, lambda: lose(7, "node_lost"))
    runs.when(
        (runs.folder / "late_starts").exists,
        lambda: cluster.call("scancel", "--signal=USR2", runs.ids["late"]),
    )
    runs.when(
        lambda: runs.iteration("cancelled") >= 2,
        lambda: cluster.call("scancel", runs.ids["cancelled"]),
    )
    runs.when(
        lambda: runs.iteration("local_stopped") >= 2,
        lambda: cluster.call(
            "kill",
            re.search(r"cancel  kill (\d+)", (runs.folder / "local_stopped.out").read_text())[1],
        ),
    )
    for starts in (1, 2):
        runs.when(
            lambda starts=starts: runs.log("vain").count("starting afresh") == starts,
            lambda: cluster.call("scontrol", "requeue", runs.ids["vain"]),
        )
    runs.when(lambda: runs.iteration("hosts") == 10, boot_again)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    missing = [
        name
        for name in ("slurmctld", "slurmd", "munged", "ip", "nsenter", "setpriv")
        if not shutil.which(name)
    ]
    if os.geteuid() or missing:
        reason = (
            "needs root"
            if os.geteuid()
            else f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
        )
        pytest.fail(reason) if os.environ.get("REQUIRE_ALL") else pytest.skip(reason)
    cluster = Cluster(nodes=10)
    runs = Runs(cluster, tmp_path_factory.mktemp("slurm"))
    try:
        submit_all(runs)
        yield runs
    finally:
        runs.stop()
        cluster.stop()


def test_two_nodes_equal_four_processes_of_torchrun(runs: Runs):
    assert runs.wait("four")["JobState"] == "COMPLETED", runs.log("four")
    code, output = runs.output("torchrun")
    assert code == 0, output
    assert runs.losses("four") == runs.losses("torchrun")


def test_two_jobs_at_once_on_the_same_nodes_do_not_meet(runs: Runs):
    four, pair = runs.wait("four"), runs.wait("pair")
    assert four["NodeList"] == pair["NodeList"] == "node[1-2]"
    assert max(four["StartTime"], pair["StartTime"]) < min(four["EndTime"], pair["EndTime"])
    assert runs.losses("pair")[:EVERY] == pytest.approx(
        runs.losses("four")[:EVERY], rel=1e-4
    )  # the same experiment, on two processes


def test_preempted_job_comes_back_and_ends_as_the_undisturbed_one(runs: Runs):
    job = runs.wait("preempted")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), runs.log("preempted")
    stopped = int(re.search(r"stopped by a signal after iteration (\d+)", runs.log("preempted"))[1])
    assert stopped >= 3 and f"at iteration {stopped}" in runs.log("preempted"), (
        "it went on where it was"
    )
    runs.assert_undisturbed("preempted")


def test_after_the_loss_of_a_node_a_job_goes_on_elsewhere(runs: Runs):
    job = runs.wait("lost")
    nodes = runs.cluster.call("scontrol", "show", "hostnames", job["NodeList"]).split()
    assert (job["JobState"], job["Restarts"], "node7" in nodes) == ("COMPLETED", "1", False), (
        runs.log("lost")
    )
    assert f"iter_{EVERY}.pth at iteration {EVERY}" in runs.log("lost"), "from the last checkpoint"
    runs.assert_undisturbed("lost")


def test_ahead_of_the_time_limit_a_job_saves_and_comes_back(runs: Runs):
    job = runs.wait("limited")
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, runs.log("limited")
    assert "stopped by a signal after iteration" in runs.log(
        "limited"
    ) and "DUE TO TIME LIMIT" not in runs.log("limited")
    assert len(runs.losses("limited")) == ITERATIONS


def test_a_notice_before_a_task_has_started_is_not_lost(runs: Runs):
    job = runs.wait("late")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), runs.log("late")
    assert "stopped by a signal after iteration 1 of" in runs.log("late")


def test_a_cancelled_job_saves_and_stays_away(runs: Runs):
    job = runs.wait("cancelled")
    wait_for(
        lambda: "stopped by a signal" in runs.log("cancelled"), 20, lambda: runs.log("cancelled")
    )
    assert list((runs.folder / "cancelled").glob("iter_*.pth"))
    time.sleep(8)  # a requeued job would be back
    assert (job["JobState"], runs.job("cancelled")["JobState"], job["Restarts"]) == (
        "CANCELLED",
        "CANCELLED",
        "0",
    )


def test_a_job_that_comes_back_in_vain_ends(runs: Runs):
    job = runs.wait("vain")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "2"), runs.log("vain")
    assert re.search(
        r"^error: job \d+ came back twice without a checkpoint beyond iteration 0",
        runs.log("vain"),
        re.MULTILINE,
    )


def test_a_rank_that_fails_ends_all_and_its_traceback_is_what_one_sees(runs: Runs):
    code, output = runs.output("followed")
    assert code == 1 and re.search(r"job \d+: FAILED", output), output
    assert (
        "rank 1 on node5 failed first:\nTraceback" in output
        and "\nRuntimeError: broken on purpose" in output
    )


def test_a_port_that_was_asked_for_and_is_taken_is_named(runs: Runs):
    assert runs.wait("port")["JobState"] == "FAILED"
    assert (
        "error: port 6818 of node5 is in use, and MASTER_PORT=6818 was set at submission"
        in runs.log("port")
    )


def test_what_slurm_refuses_is_said(runs: Runs):
    assert re.search(r"error: Slurm refuses this job: .*invalid partition", runs.submitted), (
        runs.submitted
    )
    assert re.search(
        r"error: Slurm refuses this job: .*node configuration is not available",
        runs.submitted,
        re.DOTALL,
    )


def test_local_runs_the_same_job_without_slurm(runs: Runs):
    code, output = runs.output("local")
    assert code == 0 and f"Iter [{ITERATIONS}/{ITERATIONS}]" in output, output
    assert runs.losses("local")[:EVERY] == pytest.approx(runs.losses("four")[:EVERY], rel=1e-4)
    code, output = runs.output("local_stopped")
    assert code == 1 and re.search(r"job \d+ stopped, its state saved; over", output), output
    code, output = runs.output("local_broken")
    assert (
        code == 1
        and "rank 1 on head failed first:\nTraceback" in output
        and "\nRuntimeError: broken on purpose" in output
    )


def test_torchrun_on_two_hosts_of_which_one_is_lost_and_comes_back(runs: Runs):
    wait_for(lambda: runs.events[-1].is_alive() is False)
    for name in ("host9", "host10"):
        code, output = runs.output(name)
        assert code == 0, output
    assert (
        f"iter_{EVERY}.pth at iteration {EVERY}"
        in (runs.folder / "hosts" / "train.log").read_text()
    )
    runs.assert_undisturbed("hosts")


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("", (1, 1, 1)),
        ("--gpus 16", (2, 8, 8)),
        ("--gpus 4", (1, 4, 4)),
        ("--gpus 12 --nodes 3", (3, 4, 4)),
        ("--gpus 6 --gpus-per-node 2", (3, 2, 2)),
        ("--nodes 2 --gpus-per-node 8", (2, 8, 8)),
        ("--gpus-per-node 0 --tasks-per-node 4", (1, 0, 4)),
        ("--nodes 3 --gpus-per-node 0", (3, 0, 1)),
        ("--gpus 12", "--gpus 12 cannot be had as 1 node(s) x 8"),
        ("--gpus 3 --nodes 2", "whose product is 3"),
        ("--gpus 2 --nodes 4", "cannot be had"),
        ("--gpus 4 --gpus-per-node 0", "cannot be had"),
        ("--gpus 0", "1 or more"),
        ("--nodes 0", "1 or more"),
        ("--gpus-per-node -1", "1 or more"),
        ("--gpus-per-node 4 --tasks-per-node 2", "a GPU has one task"),
    ],
)
def test_what_is_asked_for_is_worked_out(asked: str, given: tuple | str):
    args, rest = launch_slurm.parse_args(asked.split())
    request = (args.nodes, args.gpus, args.gpus_per_node, args.tasks_per_node)
    if isinstance(given, tuple):
        assert launch_slurm.work_out(*request) == given and rest == []
    else:
        with pytest.raises(launch_slurm.UserError, match=re.escape(given)):
            launch_slurm.work_out(*request)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 3", "data.batch_size 8 cannot be dealt out evenly to 3 processes"),
        ("--load-from nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("--options model.backbone.dept=34", "model.backbone.dept"),
        ("--local --nodes 2", "--local has one node"),
        ("--partition", "expected one argument"),
        ("--partitoin dev", "unrecognized arguments: --partitoin dev"),
    ],
)
def test_a_wrong_flag_is_an_error_before_anything_waits(
    flags: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture
):
    try:
        code = launch_slurm.main(
            [
                *flags.split(),
                "--config",
                str(ROOT / "configs" / "quickstart.json"),
                "--work-dir",
                str(tmp_path / "run"),
            ]
        )
    except SystemExit as error:  # argparse's
        code = error.code
    assert code == 2 and message in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_a_port_that_is_none_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setenv("MASTER_PORT", "http")
    assert launch_slurm.main(["--config", str(ROOT / "configs" / "quickstart.json")]) == 2
    assert "MASTER_PORT=http" in capfd.readouterr().err


def test_dry_run_prints_the_script_and_leaves_nothing(
    runs: Runs, capfd: pytest.CaptureFixture
):  # `runs`, because it asks for srun
    flags = (
        "--nodes 2 --gpus-per-node 4 --partition dev --job-name psp --time 1-00:00:00 --mem 64G --qos high --account lab --constraint a100 "
        "--exclude n[1-2] --reservation r --cpus-per-task 6 --slurm exclusive --slurm mail-user=me --slurm signal_delay_s=300 --dry-run"
    )
    assert (
        launch_slurm.main(
            [
                *flags.split(),
                "--setup",
                "module load cuda",
                "--config",
                str(ROOT / "configs" / "quickstart.json"),
                "--work-dir",
                str(runs.folder / "dry"),
            ]
        )
        == 0
    )
    script = capfd.readouterr().out
    for line in (
        "nodes=2",
        "gpus-per-node=4",
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
        assert f"#SBATCH --{line}\n" in script, script
    assert (
        "\nmodule load cuda\n" in script
        and "--kill-on-bad-exit=1 --cpus-per-task=6" in script
        and not (runs.folder / "dry").exists()
    )
