"""`benchmark.py gpu` on the CPU, with a tiny network."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import benchmark
import pytest

import train


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.Namespace]:
    networks = {"tiny": ("quickstart", 2, (64, 64), "tiny.py")}
    monkeypatch.setattr(benchmark, "NETWORKS", networks)
    parser = argparse.ArgumentParser()
    benchmark.add_gpu_arguments(parser)
    yield parser.parse_args(["--device", "cpu", "--quick", "--out", str(tmp_path / "out" / "gpu")])
    train.set_up_arithmetic("fp32", deterministic=False)


def rows_of(output: str) -> list[dict]:
    lines = [line for line in output.splitlines() if line.startswith("ROW ")]
    return [json.loads(line.removeprefix("ROW ")) for line in lines]


def test_every_measurement(args, capsys):
    benchmark.measure_machine(args)
    benchmark.measure_network("tiny", args)
    rows = rows_of(capsys.readouterr().out)
    assert not [row for row in rows if "error" in row]
    steps = [row for row in rows if row["table"] == "step"]
    assert [row["mode"] for row in steps] == list(benchmark.MODES)
    for row in steps:
        assert row["images_per_s"] == pytest.approx(2 / row["s_per_iter"])
        assert row["tflops"] > 0
    [profile] = [row for row in rows if row["table"] == "profile"]
    assert 0 <= profile["idle_share"] < 1
    assert profile["longest"]

    peer = {"table": "peer", "network": "tiny", "mode": "auto", "images_per_s": 8.0}
    loader = {"table": "loader", "workers": 2, "images_per_s": 33.0}
    text = benchmark.gpu_markdown([*rows, peer, loader], ["python", "benchmark.py"])
    [auto] = [line for line in text.splitlines() if line.startswith("| tiny | 2 x 64 x 64 | auto")]
    speed = steps[0]["images_per_s"]
    assert f"| {speed:.1f} |" in auto
    assert auto.endswith(f"| 8.0 |  | {speed / 8:.2f} |")
    assert "| 2 workers | 33.0 |" in text


def test_a_mode_that_fails_is_a_row(args, capsys, monkeypatch):
    def fail(trainer: benchmark.GpuTrainer) -> None:
        raise MemoryError("the GPU is full\nand more")

    monkeypatch.setattr(benchmark.GpuTrainer, "step", fail)
    benchmark.measure_network("tiny", args)
    rows = rows_of(capsys.readouterr().out)
    assert [row["mode"] for row in rows] == list(benchmark.MODES)
    assert {row["error"] for row in rows} == {"MemoryError: the GPU is full"}
    assert "MemoryError: the GPU is full" in benchmark.gpu_markdown(rows, [])


def test_a_part_that_dies_is_a_row(args, monkeypatch):
    died = 'print(\'ROW {"table": "step", "network": "tiny", "mode": "auto", "error": "x"}\'); '
    died += "import sys; sys.exit('CUDA error')"

    def run_part(table: benchmark.GpuTable, part: str, limit: float) -> str | None:
        return table.run([sys.executable, "-c", died], limit, table.add_line)

    monkeypatch.setattr(benchmark.GpuTable, "run_part", run_part)
    monkeypatch.setattr(benchmark.GpuTable, "measure_loader", lambda table, has_peer: None)
    args.networks = ["tiny"]
    benchmark.measure_gpu(args)
    content = json.loads(Path(f"{args.out}.json").read_text())
    errors = {row["mode"]: row["error"] for row in content["rows"] if row["table"] == "step"}
    assert errors == {
        mode: "x" if mode == "auto" else "exit code 1: CUDA error" for mode in benchmark.MODES
    }
    assert "exit code 1: CUDA error" in Path(f"{args.out}.md").read_text()


def test_the_limits_of_time(args):
    table = benchmark.GpuTable(args)
    began = time.monotonic()
    sleep = [sys.executable, "-c", "import time; print('line', flush=True); time.sleep(60)"]
    lines = []
    assert table.run(sleep, 1, lines.append) == "killed after 1 s"
    assert lines in ([], ["line\n"])
    assert time.monotonic() - began < 30
    table.deadline = time.monotonic()
    assert table.run(sleep, 1, lines.append) == "no time left (--limit)"


def test_idle_share_of_overlapping_kernels():
    spans = [(0, 10), (5, 3), (8, 4), (20, 5)]  # begin and duration, microseconds
    kernels = [{"name": "k", "ts": begin, "dur": duration} for begin, duration in spans]
    found = benchmark.summarize(kernels, steps=1)
    assert found["idle_share"] == pytest.approx(8 / 25)
    assert found["longest"] == [("k", 0.022)]


def test_cityscapes_like_files(tmp_path):
    benchmark.write_cityscapes(tmp_path, 2, size=(64, 128))
    dataset = train.Data(type="cityscapes", root=str(tmp_path), batch_size=2, crop_size=[32, 32])
    assert len(dataset.train) == 2
    image, label = dataset.train.load(1)
    assert image.shape == (64, 128, 3)
    assert label.max() < 19
