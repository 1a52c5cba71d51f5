"""A sweep on a real cluster of two nodes, one of which dies: the runs are those of this machine, to the last bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_sweep import alive

import resprobe as rp
from resprobe import cluster, files, keeping, runs
from resprobe.cluster import RayCluster, ray_cluster
from resprobe.sweep import Job

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(600)

NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(other, allow_graceful=False)
    else:
        other = cluster.add_node(num_cpus=1)
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster of two nodes with a core each, in a process of its own, which takes them down when it ends."""

    def __init__(self, folder: Path):
        (folder / "ray").mkdir()
        script = folder / "nodes.py"
        script.write_text(NODES)
        with (folder / "nodes.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment() | {"RAY_TMPDIR": str(folder)},
            )
        self.address = self._answer()
        assert re.fullmatch(r"[\d.]+:\d+", self.address), (folder / "nodes.log").read_text()

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.communicate(timeout=180)


def environment() -> dict[str, str]:
    # The hooks that give a machine several nodes for tests are off on macOS and Windows unless asked for.
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Iterator[Nodes]:
    pytest.importorskip("ray")
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("reads /proc")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: short
        found = Nodes(Path(folder))
        yield found
        found.close()
        assert not processes_of(folder)


def processes_of(folder: str) -> list[str]:
    """Commands of processes that work in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if folder in command:
                found.append(command)
    return found


PATIENT = """
import os
import time
from pathlib import Path

import resprobe as rp
import torch
from resprobe import keeping

keeping.CHECKPOINT_SECONDS = 0
GO = Path(__file__).with_name("go")


class Wait(torch.nn.Module):
    passes = 0

    def forward(self, x):
        self.passes += self.training
        while self.passes == 30 and not GO.is_file():
            GO.with_name(f"waiting-{os.getpid()}").touch()
            time.sleep(0.05)
        return x


@rp.register_block("patient")
class Patient(rp.Block):
    weighted_layers = 2

    def make_branch(self, in_channels, width, stride, layers):
        return torch.nn.Sequential(
            layers.conv(in_channels, width, stride=stride), layers.norm(width), torch.nn.ReLU(),
            layers.conv(width, width), layers.norm(width), Wait(),
        )
"""
"""A block that waits at the 30th pass for a file `go`, with a checkpoint at every log point: time to pull a plug."""

STUDY = ("--block", "patient", "--depths", "8", "--seeds", "0", "1", "--iterations", "60", "--device", "cpu")
STUDY += ("--precision", "fp32")


@pytest.fixture
def patient(tmp_path) -> Path:
    plugin = tmp_path / "patient.py"
    plugin.write_text(PATIENT)
    return plugin


def start(address: str, *arguments: object, cwd: Path, **how) -> subprocess.Popen:
    command = ["-m", "studies.degradation", "--executor", "ray", "--address", address, *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def contents(root: Path) -> dict[str, tuple[dict, dict, dict]]:
    """Of each run: its weights, history and metrics."""
    store = {}
    for folder in root.iterdir():
        assert {"result.json", "history.csv", "network.safetensors"} <= {file.name for file in folder.iterdir()}
        assert not list(folder.glob("checkpoint*"))
        assert not list(folder.glob(".*.tmp"))
        history = files.read_table(folder / "history.csv").to_dict("list")
        metrics = json.loads((folder / "result.json").read_text())["metrics"]
        store[folder.name] = load_file(folder / "network.safetensors"), history, metrics
    return store


# -- on the cluster --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clean_registries")
def test_a_lost_node_changes_nothing(nodes, patient, tmp_path, monkeypatch):
    process = start(nodes.address, "--plugin", patient.name, *STUDY, cwd=tmp_path)
    try:
        wait_for(lambda: len(list(tmp_path.glob("waiting-*"))) == 2, process)  # of the four runs, one on each node
        assert len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 2
        nodes.tell("kill")
        trained = [int(file.name.removeprefix("waiting-")) for file in tmp_path.glob("waiting-*")]
        wait_for(lambda: sum(map(alive, trained)) == 1, process)
        (tmp_path / "go").touch()
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        nodes.tell("add")
    assert process.returncode == 0, err
    assert "4 runs: 0 finished already, 4 to train\n" in out
    assert "a Ray cluster with 2 CPUs on 2 nodes, 2 at a time" in out
    assert [int(count) for count in re.findall(r"^\[(\d)/4\] ", out, re.MULTILINE)] == [1, 2, 3, 4]
    (note,) = re.findall(r"^note: (?!one )(.*)$", err, re.MULTILINE)
    went_on = r"cifar/\S+-8, seed \d goes on from iteration 29 where there is room"
    assert re.fullmatch(
        went_on + r", since it lost its process \(1 of 3 times at this iteration\): .*node.* dead.*", note
    )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", keeping.CHECKPOINT_SECONDS)
    from studies.degradation import study

    with tiny.one_thread():
        again = ("--plugin", str(patient), *STUDY, "--concurrency", "1", "--runs", "local", "--out", "local-results")
        assert study.main(again) == 0
    there, here = contents(tmp_path / "runs"), contents(tmp_path / "local")
    assert len(here) == 4
    assert sorted(there) == sorted(here)
    for name, run in here.items():
        tiny.assert_same(run, there[name], name)


def test_interrupted_it_keeps_what_is_done_and_begins_no_other_run(nodes, patient, tmp_path):
    process = start(nodes.address, "--plugin", patient.name, *STUDY, cwd=tmp_path)
    try:
        wait_for(lambda: len(list(tmp_path.glob("waiting-*"))) == 2, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 1
    *notes, line = err.splitlines()
    assert line == "error: interrupted; finished runs and checkpoints are kept, the same command goes on from there"
    assert all(note.startswith("note: one ") for note in notes)
    assert len(list(tmp_path.glob("runs/*/checkpoint.pt"))) == 2
    assert len(list((tmp_path / "runs").iterdir())) == 2


SWEEP = """
import sys

import resprobe as rp
from resprobe.cluster import ray_cluster
from resprobe.runs import configure
from resprobe.sweep import Job, SweepFailed, run_all

address, plugin, runs = sys.argv[1:]
rp.load_plugin(plugin)
recipe = rp.default_recipe(rp.load_data("digits"), 4)
jobs = [
    Job(configure("cifar/resnet-8", "digits", recipe, width=4, block=block, shortcut="B"))
    for block in ("explodes", "raises", "dies", "basic")
]
store = rp.RunStore(runs)
with ray_cluster(address, "cpu") as cluster:
    try:
        run_all(jobs, store, device=cluster.device, cluster=cluster)
    except SweepFailed as error:
        print("FAILED", error)
print([job.config.network.get("block") for job in jobs if store.find(job.config) is not None])
"""

BAD_BLOCKS = """
import os

import resprobe as rp
import torch


class Bad(torch.nn.Module):
    def forward(self, x):
        # Where a block is tried before the training it has two images.
        return self.spoil(x) if self.training and len(x) > 2 and os.environ.get("RAY_RAYLET_PID") else x


class Explode(Bad):
    def spoil(self, x):
        return x * float("inf")


class Raise(Bad):
    def spoil(self, x):
        raise ValueError("of the user's own")


class Die(Bad):
    def spoil(self, x):
        os._exit(7)


def register(name, kind):
    @rp.register_block(name)
    class Block(rp.Block):
        weighted_layers = 2

        def make_branch(self, in_channels, width, stride, layers):
            return torch.nn.Sequential(layers.conv(in_channels, width, stride=stride), kind(), layers.conv(width, width))


register("explodes", Explode)
register("raises", Raise)
register("dies", Die)
"""
"""Blocks that go wrong, but only on a node: the machine that asks must get as far as asking."""


def test_a_run_that_goes_wrong_leaves_the_others(nodes, tmp_path):
    script, plugin = tmp_path / "sweep.py", tmp_path / "bad_blocks.py"
    script.write_text(SWEEP)
    plugin.write_text(BAD_BLOCKS)
    done = subprocess.run(
        [sys.executable, script, nodes.address, plugin, tmp_path / "runs"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert re.search(
        r"cifar/resnet-8, block explodes, seed 0: failed: the loss is not finite at iteration 1, ",
        out,
    )
    assert re.search(
        r"block raises, seed 0: failed: of the user's own \(bad_blocks.py, line \d+\); \S+/traceback.txt$", out, re.M
    )
    assert re.search(r"cifar/resnet-8, block dies, seed 0: failed: lost 3 times at iteration 0: ", out)
    assert done.stderr.count("goes on from iteration 0 where there is room") == 2
    assert re.search(
        r"^FAILED 3 of 4 runs failed: .*; 1 finished runs and the failed ones' last checkpoints", out, re.M
    )
    assert out.endswith("['basic']\n")


def test_a_folder_that_is_not_shared_gets_one_line(nodes, tmp_path):
    # A path that means a folder in one process and nothing in the others, as a folder of one machine does.
    (tmp_path / "runs").mkdir()
    ours = os.open(tmp_path / "runs", os.O_RDONLY)
    arguments = (
        "--depths",
        "8",
        "--seeds",
        "0",
        "--iterations",
        "4",
        "--device",
        "cpu",
        "--runs",
        f"/proc/self/fd/{ours}",
    )
    try:
        process = start(nodes.address, *arguments, cwd=tmp_path, pass_fds=(ours,))
        _, err = process.communicate(timeout=180)
    finally:
        os.close(ours)
    assert process.returncode == 2
    *notes, line = err.splitlines()
    assert all(note.startswith("note: one ") for note in notes)
    assert line.startswith(
        f"error: runs (='/proc/self/fd/{ours}') must be a folder that all nodes share, at the same path (on "
    )
    assert not list((tmp_path / "runs").iterdir())


# -- without a cluster -----------------------------------------------------------------------------------------------


def refused(*arguments: str, capsys) -> str:
    """The one line that a study says to `arguments`."""
    from studies.degradation import study

    assert study.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


def test_without_ray_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused("--executor", "ray", capsys=capsys)
    assert line == "error: executor (='ray') needs Ray, which is not installed: pip install 'resprobe[ray]'"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, when it is imported
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nobody", "ray://127.0.0.1:10001"])
def test_an_address_where_nobody_is_gets_one_line(address, capsys):
    pytest.importorskip("ray")
    line = refused("--executor", "ray", "--address", address, capsys=capsys)
    assert line.startswith(f"error: address (='{address}') cannot be joined: ")
    assert line.endswith("; accepted: HOST:PORT of a running cluster, auto, local")


def test_options_that_do_not_go_together(monkeypatch, capsys):
    line = refused("--address", "127.0.0.1:1", capsys=capsys)
    assert line == "error: address (='127.0.0.1:1') is that of a Ray cluster; it needs --executor ray"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(rp.UsageError, match=r"executor \(='ray'\) trains a run in one process; under torchrun"):
        ray_cluster().__enter__()


CPUS = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]
GPUS = [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
ASIDE = [{"Alive": True, "Resources": {"memory": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]


def test_a_cluster_is_what_its_living_nodes_offer():
    on_cpus = cluster._look_at(CPUS + ASIDE, "auto")
    assert on_cpus == RayCluster(torch.device("cpu"), (8, 4), 1)
    assert on_cpus.name == "a Ray cluster with 12 CPUs on 2 nodes"
    on_gpus = cluster._look_at(CPUS + GPUS + ASIDE, "auto")
    assert on_gpus == RayCluster(torch.device("cuda"), (2, 1), 8)
    assert cluster._look_at(CPUS + GPUS, "cpu").sizes == (8, 4, 16, 8)
    with pytest.raises(
        rp.UsageError, match=r"device \(='cuda'\) is not available: no node of the Ray cluster offers it"
    ):
        cluster._look_at(CPUS, "cuda")
    with pytest.raises(rp.UsageError, match=r"device \(='auto'\) is not available"):
        cluster._look_at(ASIDE, "auto")
    with pytest.raises(rp.UsageError, match=r"device \(='gpu'\) is unknown; accepted: auto, cuda, cpu; nearest: cuda"):
        cluster._look_at(GPUS, "gpu")


@pytest.mark.parametrize(
    ("nodes", "asked", "given"),
    [
        # One run a core; the fewer the runs, the more cores for each.
        (CPUS, (100, None), (12, 1, 1)),
        (CPUS, (4, None), (4, 2, 2)),
        (CPUS, (2, None), (2, 4, 4)),
        (CPUS, (1, None), (1, 4, 4)),
        (CPUS, (0, None), (0, 4, 4)),
        # So many on the smallest node.
        (CPUS, (100, 2), (6, 2, 2)),
        (CPUS, (100, 3), (12, 1, 1)),
        (CPUS, (100, 8), (24, 1, 0.5)),
        # So many a GPU, and not all on one while others are idle.
        (GPUS, (100, None), (3, 8, 1)),
        (GPUS, (100, 4), (12, 2, 0.25)),
        (GPUS, (100, 3), (9, 2, 0.3333)),
        (GPUS, (100, 7), (21, 1, 0.1428)),
        (GPUS, (3, 4), (3, 8, 1)),
        (GPUS, (4, 4), (4, 4, 0.5)),
        (GPUS, (0, 4), (0, 8, 1)),
    ],
)
def test_shares_of_a_cluster(nodes, asked, given):
    assert cluster._look_at(nodes, "auto").share(*asked) == given


def test_a_run_that_gets_on_is_never_given_up(tmp_path, monkeypatch):
    store = rp.RunStore(tmp_path)
    job = Job(runs.configure("cifar/resnet-8", "digits", tiny.recipe()))
    done = iter([0, 0, 10, 10, 20, 20, 20])
    monkeypatch.setattr(store, "iterations_done", lambda _: next(done))
    losses = cluster._Losses(store)
    for iteration in (0, 0, 10, 10, 20, 20):
        with pytest.warns(UserWarning, match=f"^a run goes on from iteration {iteration} where there is room.*: gone$"):
            assert losses.count(job, "a run", RuntimeError("gone. And more,\nand more")) is None
    assert str(losses.count(job, "a run", RuntimeError("gone"))) == "lost 3 times at iteration 20: gone"


def test_what_another_machine_wrote_may_be_seen_late(tmp_path, monkeypatch):
    store = rp.RunStore(tmp_path)
    job = Job(runs.configure("cifar/resnet-8", "digits", tiny.recipe()))
    monkeypatch.setattr(cluster, "_LATE", 0.0)
    assert "is not seen on this one" in str(cluster._not_seen(job, store))
    monkeypatch.setattr(cluster, "_LATE", 5.0)
    shown = iter([None, object()])
    monkeypatch.setattr(store, "find", lambda *_: next(shown))
    assert cluster._not_seen(job, store) is None
