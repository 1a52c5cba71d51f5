"""Sweeps: several runs at a time are the same runs; one failure does not take the others down; nothing is orphaned."""

from __future__ import annotations

import gc
import importlib
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import resprobe as rp
from resprobe import board, sweep
from resprobe.devices import deterministic
from resprobe.runs import configure
from resprobe.sweep import Job, SweepFailed, parse_concurrency, run_all, survey
from resprobe.workers import Lost

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def jobs(*depths: int, iterations: int = 8, seeds: tuple[int, ...] = (0,)) -> list[Job]:
    recipe = rp.default_recipe(rp.load_data("digits"), iterations)
    return [
        Job(configure(f"cifar/resnet-{depth}", "digits", recipe, seed=seed, width=4))
        for depth in depths
        for seed in seeds
    ]


def weights(run: rp.Run) -> dict[str, torch.Tensor]:
    return run.network.state_dict()


def test_runs_come_back_in_the_order_of_their_jobs(tmp_path, capsys):
    asked = jobs(14, 8, 20)
    runs = run_all(asked, rp.RunStore(tmp_path), device=CPU, concurrency=1)
    assert [run.config.network.depth for run in runs] == [14, 8, 20]
    said = capsys.readouterr().out
    assert said.startswith("3 runs: 0 finished already, 3 to train\n")
    # The longest first: no worker is left alone with one at the end.
    assert said.index("cifar/resnet-20") < said.index("cifar/resnet-14") < said.index("cifar/resnet-8")
    assert "[3/3] cifar/resnet-8, seed 0: training error" in said


def test_side_by_side_gives_the_same_weights_as_one_by_one(tmp_path):
    asked = jobs(8, 14)
    with rp.cpu_threads(1):  # as each worker has; sums are ordered by the number of threads
        alone = run_all(asked, rp.RunStore(tmp_path / "alone"), device=CPU, concurrency=1)
    cores = len(os.sched_getaffinity(0))
    together = run_all(asked, rp.RunStore(tmp_path / "together"), device=CPU, concurrency=max(2, cores))
    for one, other in zip(alone, together, strict=True):
        assert one.metrics["train_error"] == other.metrics["train_error"]
        for name, tensor in weights(one).items():
            assert torch.equal(tensor, weights(other)[name]), name


@pytest.mark.parametrize(("seconds", "workers"), [((4.0, 3.0), 1), ((40.0, 30.0), 2)])
def test_short_runs_need_no_processes(seconds, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "cores", lambda: 2)
    monkeypatch.setattr(sweep, "_seconds", lambda *asked: seconds)
    ahead = survey(jobs(8, 14), rp.RunStore(tmp_path), device=CPU)
    assert (ahead.workers, ahead.threads) == (workers, 1)
    assert survey(jobs(8, 14), rp.RunStore(tmp_path), device=CPU, concurrency=2).workers == 2, (
        "what is asked for is done"
    )


def test_short_runs_are_trained_with_the_threads_of_a_process(tmp_path, monkeypatch):
    """A slow moment of the machine may make them long: the same numbers must come out."""
    seen = []

    def stop(*_):
        seen.append(torch.get_num_threads())
        raise RuntimeError("seen enough")

    monkeypatch.setattr(sweep, "cores", lambda: 2)
    monkeypatch.setattr(sweep, "_seconds", lambda *asked: (1.0, 1.0))
    monkeypatch.setattr(sweep, "train_job", stop)
    with rp.cpu_threads(2), pytest.raises(SweepFailed):
        run_all(jobs(8, 14), rp.RunStore(tmp_path), device=CPU)
    assert seen == [1, 1]


def test_a_job_asked_for_twice_is_trained_once(tmp_path, monkeypatch):
    asked = jobs(8)
    trained = []
    real = sweep.train_job
    monkeypatch.setattr(sweep, "train_job", lambda job, *others: trained.append(job) or real(job, *others))
    runs = run_all([*asked, *asked], rp.RunStore(tmp_path), device=CPU)
    assert len(trained) == 1
    assert runs[0].metrics == runs[1].metrics


BLOCK = """
import resprobe as rp
import torch

@rp.register_block("explodes")
class Explodes(rp.Block):
    weighted_layers = 2

    def make_branch(self, in_channels, width, stride, layers):
        return torch.nn.Sequential(layers.conv(in_channels, width, stride=stride), Overflow(), layers.conv(width, width))

class Overflow(torch.nn.Module):
    def forward(self, x):
        return x * float("inf") if self.training else x
"""


@pytest.fixture
def plugin(tmp_path, clean_registries) -> str:
    """A file with the block "explodes", loaded here."""
    file = tmp_path / "explodes.py"
    file.write_text(BLOCK)
    rp.load_plugin(str(file))
    return str(file)


@pytest.fixture
def bad(plugin) -> Job:
    """A run whose loss is not finite."""
    recipe = rp.default_recipe(rp.load_data("digits"), 8)
    return Job(configure("cifar/resnet-8", "digits", recipe, width=4, block="explodes"))


def test_a_failed_run_does_not_take_the_others_down(bad, plugin, tmp_path, capsys):
    asked = [bad, *jobs(8, 14)]
    store = rp.RunStore(tmp_path / "runs")
    with pytest.raises(
        SweepFailed,
        match=r"1 of 3 runs failed: cifar/resnet-8, block explodes, seed 0: the loss is not finite at iteration 1, ",
    ) as caught:
        run_all(asked, store, device=CPU, concurrency=2, plugins=[plugin])
    assert str(caught.value).endswith(
        f"are kept in {store.root}; what diverged would diverge again, but not by another --recipe, such as a lower learning_rate"
    )
    assert store.find(bad.config) is None
    assert all(store.find(job.config) is not None for job in asked[1:])
    said = capsys.readouterr().out
    assert "first in stage1.0.branch.1" in said


def test_what_failed_otherwise_is_worth_another_try():
    diverged = "the loss is not finite at iteration 3, learning rate 5, first in fc; the weights of iteration 0, …"
    again = "the same command tries {} again from there"
    assert sweep._what_next({"a": "no memory"}) == again.format("it")
    assert sweep._what_next({"a": "no memory", "b": "killed"}) == again.format("them")
    assert sweep._what_next({"a": "no memory", "b": diverged}).startswith(f"{again.format('it')}; what diverged would")
    # With several processes, or on a device that does not compute the same twice, it may go well.
    assert sweep._what_next({"a": "the loss is not finite; the weights of iteration 5 are kept"}) == again.format("it")


def test_a_run_that_finds_no_memory_is_tried_again_alone(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sweep, "train_job", full)
    (job,) = jobs(8)
    perform = sweep._start({}, torch.get_num_threads(), (), tmp_path, CPU, 0)
    with pytest.raises(Lost, match="^CUDA out of memory"):
        perform((job.config.key, pickle.dumps(job)), lambda news: None)


RAISES = """
import resprobe as rp

@rp.register_block("raises")
class Raises(rp.BLOCKS["basic"]):
    def forward(self, x):
        if self.training and len(x) > 2:  # where it is tried it has two images
            return self.branch(x) + missing
        return super().forward(x)
"""


@pytest.mark.parametrize("concurrency", [1, 2])
def test_where_a_strangers_block_fails_is_kept(concurrency, tmp_path, capsys, clean_registries):
    """The line says which line of whose file, and where the rest is; the rest goes when the run is begun again."""
    file = tmp_path / "raises.py"
    file.write_text(RAISES)
    rp.load_plugin(str(file))
    recipe = rp.default_recipe(rp.load_data("digits"), 4)
    bad = Job(configure("cifar/resnet-8", "digits", recipe, width=4, block="raises"))
    store = rp.RunStore(tmp_path / "runs")
    with pytest.raises(SweepFailed, match="name 'missing' is not defined") as caught:
        run_all([bad, *jobs(8)], store, device=CPU, concurrency=concurrency, plugins=[str(file)])
    assert caught.value.keys == {bad.config.key}
    kept = store.folder(bad.config) / "traceback.txt"
    assert f"failed: name 'missing' is not defined (raises.py, line 8); {kept}\n" in capsys.readouterr().out
    text = kept.read_text()
    assert f'File "{file}", line 8, in forward' in text
    assert text.endswith("NameError: name 'missing' is not defined\n")
    assert not (store.folder(jobs(8)[0].config) / "traceback.txt").exists()

    rp.BLOCKS["raises"].forward = rp.BLOCKS["basic"].forward  # it was the machine's fault, say
    run_all([bad], store, device=CPU)
    assert not kept.exists()


DIES = """
import multiprocessing, os, signal
import resprobe as rp

@rp.register_block("dies")
class Dies(rp.BLOCKS["basic"]):
    def forward(self, x):
        if multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_process_does_not_take_the_other_runs_down(tmp_path, clean_registries):
    plugin = tmp_path / "dies.py"
    plugin.write_text(DIES)
    rp.load_plugin(str(plugin))
    recipe = rp.default_recipe(rp.load_data("digits"), 8)
    asked = [Job(configure("cifar/resnet-8", "digits", recipe, width=4, block="dies")), *jobs(8)]
    store = rp.RunStore(tmp_path / "runs")
    with (
        pytest.warns(
            UserWarning,
            match="^cifar/resnet-8, block dies, seed 0: its process was killed .*; it goes on from its last",
        ),
        pytest.raises(SweepFailed, match=r"1 of 2 runs failed: .*: its process was killed .*, twice; 1 finished"),
    ):
        run_all(asked, store, device=CPU, concurrency=2, plugins=[str(plugin)])
    assert store.find(asked[1].config) is not None


def test_a_run_that_breaks_the_device_does_not_take_the_others_down(bad, plugin, tmp_path, monkeypatch):
    """All runs on a card share a process, which CUDA refuses everything after a fault."""
    train_here = sweep.train_job

    def train_job(job, *given):
        try:
            return train_here(job, *given)
        finally:
            monkeypatch.setattr(sweep, "usable", lambda device: False)

    monkeypatch.setattr(sweep, "train_job", train_job)
    asked = [bad, *jobs(8, seeds=(0, 1))]
    store = rp.RunStore(tmp_path / "runs")
    with pytest.raises(
        SweepFailed, match="^1 of 3 runs failed: cifar/resnet-8, block explodes, seed 0: the loss is not finite"
    ):
        run_all(asked, store, device=CPU, concurrency=1, plugins=[plugin])
    assert all(store.find(job.config) is not None for job in asked[1:])


NOTES = """
import os, pathlib
pathlib.Path({folder!r}, str(os.getpid())).write_text(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "none"))
"""


def test_processes_are_told_of_the_service_by_which_they_share_a_card(tmp_path, monkeypatch, clean_registries):
    asked_for, notes = [], tmp_path / "notes"
    notes.mkdir()

    @contextmanager
    def sharing(device):
        asked_for.append(device)
        yield {"CUDA_MPS_PIPE_DIRECTORY": "/somewhere"}

    monkeypatch.setattr(sweep, "sharing", sharing)
    plugin = tmp_path / "notes.py"
    plugin.write_text(NOTES.format(folder=str(notes)))
    run_all(jobs(8, 14), rp.RunStore(tmp_path / "runs"), device=CPU, concurrency=2, plugins=[str(plugin)])
    assert asked_for == [CPU]
    told = {file.read_text() for file in notes.iterdir()}
    assert told == {"/somewhere"}
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ, "this process is told nothing"


def test_processes_compute_deterministically_where_this_one_does(tmp_path):
    with deterministic():
        (one, *_) = run_all(jobs(8, 14), rp.RunStore(tmp_path), device=CPU, concurrency=2)
    (other, *_) = run_all(jobs(8, 14, seeds=(1,)), rp.RunStore(tmp_path), device=CPU, concurrency=2)
    assert (one.environment["deterministic"], other.environment["deterministic"]) == (True, False)


@pytest.mark.gpu(real=True)
@pytest.mark.filterwarnings("ignore:processes take turns")
def test_on_a_gpu_runs_side_by_side_are_those_one_by_one(tmp_path):
    alone, together = (
        run_all(jobs(8, 14), rp.RunStore(tmp_path / str(count)), device=torch.device("cuda"), concurrency=count)
        for count in (1, 2)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.metrics["train_loss"] == pytest.approx(other.metrics["train_loss"], rel=1e-3)


FAULTY = """
import torch
import resprobe as rp

@rp.register_block("faulty")
class Faulty(rp.BLOCKS["basic"]):
    def forward(self, x):
        if not x.is_cuda:  # as when its shapes are checked
            return super().forward(x)
        beyond = torch.full((1,), 10**6, device=x.device)
        return super().forward(x) + torch.zeros(3, device=x.device)[beyond]
"""


@pytest.mark.gpu(real=True)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("concurrency", [1, 2])
def test_on_a_gpu_a_fault_in_a_kernel_does_not_take_the_other_runs_down(concurrency, tmp_path):
    # In a process of its own, which the fault leaves without the card.
    (tmp_path / "faulty.py").write_text(FAULTY)
    script = tmp_path / "sweep.py"
    script.write_text(FAULT_SWEEP)
    command = [sys.executable, script, str(concurrency), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "found [False, True, True]", done.stderr


FAULT_SWEEP = """
import sys, torch
import resprobe as rp
from resprobe.errors import SweepFailed
from resprobe.runs import configure
from resprobe.sweep import Job, run_all

if __name__ == "__main__":
    concurrency, folder = int(sys.argv[1]), sys.argv[2]
    rp.load_plugin(folder + "/faulty.py")
    recipe = rp.default_recipe(rp.load_data("digits"), 8)
    bad = Job(configure("cifar/resnet-20", "digits", recipe, width=4, block="faulty"))
    jobs = [bad] + [Job(configure("cifar/resnet-8", "digits", recipe, seed=seed, width=4)) for seed in (0, 1)]
    store = rp.RunStore(folder + "/runs")
    try:
        run_all(jobs, store, device=torch.device("cuda"), concurrency=concurrency, plugins=[folder + "/faulty.py"])
    except SweepFailed:
        print("found", [store.find(job.config) is not None for job in jobs])
"""


def test_a_failed_run_leaves_no_network_in_memory(bad, tmp_path, monkeypatch):
    """All runs on a card share a process: what a failed one kept would be missing to the others."""
    left = []

    def blocks():
        return sum(type(each) is rp.BLOCKS["explodes"] for each in gc.get_objects())

    before = sweep.train_job

    def train_job(job, *given):
        gc.collect()
        left.append(blocks())
        return before(job, *given)

    monkeypatch.setattr(sweep, "train_job", train_job)
    with pytest.raises(SweepFailed, match="1 of 2 runs failed: .* the loss is not"):
        run_all([bad, *jobs(8)], rp.RunStore(tmp_path / "runs"), device=CPU, concurrency=1)
    assert left == [0] * len(left) and len(left) > 1


def test_threads_do_not_depend_on_how_many_runs_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "cores", lambda: 4)
    asked, store = jobs(8, 14, seeds=(0, 1)), rp.RunStore(tmp_path)
    with rp.cpu_threads(4):
        assert survey(asked, store, device=CPU, concurrency=2).threads == 2
        run_all(asked[1:], store, device=CPU, concurrency=1)
        ahead = survey(asked, store, device=CPU, concurrency=2)
        assert (ahead.workers, ahead.threads) == (1, 2)
        assert survey(asked[:1], store, device=CPU, concurrency=2).threads == 4
    with rp.cpu_threads(1):  # as OMP_NUM_THREADS may have it
        assert survey(asked[:1], store, device=CPU, concurrency=2).threads == 1


def test_a_run_that_is_asked_for_with_and_without_a_probe_is_trained_once(tmp_path, capsys):
    (job,) = jobs(8)
    both = [replace(job, probes=("gradient-norms",)), job]
    first, second = run_all(both, rp.RunStore(tmp_path), device=CPU, concurrency=1)
    assert first.path == second.path and "gradient-norms" in first.tables
    assert capsys.readouterr().out.startswith("1 run: 0 finished already, 1 to train\n")


def test_a_plugin_that_is_edited_meanwhile_is_said(tmp_path, clean_registries):
    """Processes load it anew, and would train something else under its name."""
    plugin = tmp_path / "edited.py"
    plugin.write_text(BLOCK.replace("explodes", "edited"))
    rp.load_plugin(str(plugin))
    recipe = rp.default_recipe(rp.load_data("digits"), 8)
    asked = [Job(configure("cifar/resnet-8", "digits", recipe, seed=seed, width=4, block="edited")) for seed in (0, 1)]
    plugin.write_text(plugin.read_text() + "# edited\n")
    with pytest.raises(rp.UsageError, match="a plugin's file was edited since this was begun; begin it again"):
        run_all(asked, rp.RunStore(tmp_path / "runs"), device=CPU, concurrency=2, plugins=[str(plugin)])


def test_a_plugin_that_nobody_names_is_loaded_in_other_processes_too(tmp_path, clean_registries):
    plugin = tmp_path / "unnamed.py"
    plugin.write_text(BLOCK.replace("explodes", "unnamed").replace('x * float("inf") if self.training else x', "x"))
    rp.load_plugin(str(plugin))
    recipe = rp.default_recipe(rp.load_data("digits"), 4)
    asked = [Job(configure("cifar/resnet-8", "digits", recipe, seed=seed, width=4, block="unnamed")) for seed in (0, 1)]
    assert len(run_all(asked, rp.RunStore(tmp_path / "runs"), device=CPU, concurrency=2)) == 2


def test_a_module_that_was_merely_imported_is_imported_in_other_processes_too(tmp_path, monkeypatch, clean_registries):
    (tmp_path / "imported_block.py").write_text(BLOCK.replace("explodes", "imported").replace('x * float("inf")', "x"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("imported_block")
    recipe = rp.default_recipe(rp.load_data("digits"), 4)
    asked = [
        Job(configure("cifar/resnet-8", "digits", recipe, seed=seed, width=4, block="imported")) for seed in (0, 1)
    ]
    assert len(run_all(asked, rp.RunStore(tmp_path / "runs"), device=CPU, concurrency=2)) == 2


def test_what_a_typed_block_changes_while_it_trains_does_not_lose_its_run(tmp_path, clean_registries):
    space = {"__name__": "typed", "rp": rp}
    text = "SEEN = []\nclass Seen(rp.blocks.BasicBlock):\n def forward(self, x):\n  SEEN.append(1)\n  return super().forward(x)"
    exec(text, space)
    rp.register_block("seen")(space["Seen"])
    recipe, store = rp.default_recipe(rp.load_data("digits"), 4), rp.RunStore(tmp_path)
    asked = [Job(configure("cifar/resnet-8", "digits", recipe, seed=seed, width=4, block="seen")) for seed in (0, 1)]
    runs = run_all(asked, store, device=CPU, concurrency=1)
    assert space["SEEN"] and [run.path for run in runs] == [store.folder(job.config) for job in asked]


def test_what_was_typed_in_is_trained_in_this_process(tmp_path, monkeypatch, clean_registries):
    space = {"__name__": "typed", "rp": rp}
    exec("class Mine(rp.blocks.BasicBlock): pass\nclass Watch(rp.Probe): name = 'watch'", space)
    rp.register_block("mine")(space["Mine"])
    rp.register_probe("watch")(space["Watch"])
    monkeypatch.setattr("resprobe.sweep._STARTING", -math.inf)  # processes would pay
    recipe, store = rp.default_recipe(rp.load_data("digits"), 4), rp.RunStore(tmp_path)

    def asked(**settings):
        configs = [configure("cifar/resnet-8", "digits", recipe, seed=seed, width=4, **settings) for seed in (0, 1)]
        return [Job(config) for config in configs]

    probed = [replace(job, probes=("watch",)) for job in asked()]
    for given, what in (asked(block="mine"), "block 'mine'"), (probed, "probe 'watch'"):
        with pytest.warns(UserWarning, match=f"^{what} was typed in, so runs take turns in this process"):
            assert survey(given, store, device=CPU).workers == 1
        with pytest.raises(
            rp.UsageError, match=f"^{what} was typed in, and other processes cannot have it; put it into a file"
        ):
            run_all(given, store, device=CPU, concurrency=2)
        assert survey(given[:1], store, device=CPU, concurrency=2).workers == 1  # no other process
    with pytest.warns(UserWarning, match="takes? turns"):
        assert len(run_all(asked(block="mine"), store, device=CPU)) == 2
    assert survey(asked(), store, device=CPU).workers == 2


UNGUARDED = """
import dataclasses, resprobe as rp
from studies.degradation import study
rp.train("cifar/resnet-8", "digits", rp.recipes.digits_quick(2), width=4, device="cpu", progress=False)
given = dataclasses.replace(study.presets["quick"], depths=(8, 14), seeds=(0,), iterations=2, concurrency="2", device="cpu")
study.{call}(given)
"""


@pytest.mark.parametrize("call", ["run", "results"])
def test_a_script_that_processes_would_run_again_is_told_so_in_a_line(tmp_path, call):
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED.format(call=call))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) < 50
    assert done.stderr.splitlines()[-1] == (
        "resprobe.errors.UsageError: the script trains wherever it is imported, as by processes that are to train side by side "
        "or to read images; put what trains under if __name__ == '__main__':, or ask for concurrency '1'"
    )
    assert not list(tmp_path.rglob("result.json"))


POOLED = """
import multiprocessing, resprobe as rp
run = rp.train("cifar/resnet-8", "digits", rp.recipes.digits_quick(2), width=4, device="cpu", progress=False, runs="runs")

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(len, [[1, 2]], 1))
"""


def test_processes_of_others_import_a_script_that_trains(tmp_path):
    script = tmp_path / "pooled.py"
    script.write_text(POOLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "[2]\n", done.stderr


PROBE = """
import pandas
import resprobe as rp
@rp.register_probe("edited-probe")
class Probe(rp.Probe):
    name = "edited-probe"
    def table(self):
        return pandas.DataFrame({"x": [1]})
"""


def test_a_probe_that_is_edited_meanwhile_is_said(tmp_path, clean_registries):
    plugin = tmp_path / "edited_probe.py"
    plugin.write_text(PROBE)
    rp.load_plugin(str(plugin))
    plugin.write_text(PROBE + "# edited\n")
    asked = [replace(job, probes=("edited-probe",)) for job in jobs(8, 14)]
    store = rp.RunStore(tmp_path / "runs")
    assert len(run_all(asked[:1], store, device=CPU, concurrency=1)) == 1  # in this process it is what was loaded
    with pytest.raises(rp.UsageError, match="a plugin's file was edited since this was begun; begin it again"):
        run_all([asked[1], *jobs(20)], store, device=CPU, concurrency=2, plugins=[str(plugin)])


def test_what_fails_alike_is_said_once(tmp_path, monkeypatch):
    def train_job(*given):
        raise MemoryError("out of memory")

    monkeypatch.setattr(sweep, "train_job", train_job)
    with pytest.raises(
        SweepFailed, match=r"^2 of 2 runs failed: out of memory \(test_sweep.py, line \d+\) \(2 runs\); 0 finished runs"
    ):
        run_all(jobs(8, 14), rp.RunStore(tmp_path / "runs"), device=CPU, concurrency=1)


def test_runs_are_told_apart_by_what_they_differ_in():
    recipe = rp.default_recipe(rp.load_data("digits"), 8)
    configs = [configure("cifar/resnet-8", "digits", recipe, shortcut=shortcut) for shortcut in "AB"]
    configs += [configure("cifar/plain-8", "digits", recipe, seed=seed) for seed in (0, 1)]
    for name, rate in ("slow", 0.01), ("fast", 0.2):
        configs.append(configure("cifar/plain-14", "digits", replace(recipe, name=name, learning_rate=rate)))
    for rate in (0.3, 0.4):
        configs.append(configure("cifar/plain-32", "digits", replace(recipe, learning_rate=rate)))
    built = rp.build("cifar/plain-20", in_channels=1)
    configs += [configure(network, "digits", recipe) for network in ("cifar/plain-20", built)]
    assert [board.names_of(configs)[config.key] for config in configs] == [
        "cifar/resnet-8, shortcut A",
        "cifar/resnet-8, shortcut B",
        "cifar/plain-8",
        "cifar/plain-8",
        "cifar/plain-14, slow",
        "cifar/plain-14, fast",
        "cifar/plain-32, learning_rate 0.3",
        "cifar/plain-32, learning_rate 0.4",
        "cifar/plain-20",
        "cifar/plain-20, trained on",
    ]


def test_a_run_is_told_apart_from_one_that_is_finished_too(tmp_path, capsys):
    """Whose block it was is what is asked when a second block is set beside one that was trained before."""
    recipe = rp.default_recipe(rp.load_data("digits"), 2)
    basic, single = (
        Job(configure("cifar/resnet-8", "digits", recipe, width=4, block=each)) for each in ("basic", "single")
    )
    run_all([basic], rp.RunStore(tmp_path), device=CPU)
    assert "[1/1] cifar/resnet-8, seed 0: " in capsys.readouterr().out
    run_all([single, basic], rp.RunStore(tmp_path), device=CPU)
    assert "[2/2] cifar/resnet-8, block single, seed 0: " in capsys.readouterr().out


def test_concurrency_texts():
    assert parse_concurrency("auto") is None
    assert parse_concurrency("3") == 3
    for wrong in ("0", "-1", "many", "1.5", ""):
        with pytest.raises(rp.UsageError, match=r"concurrency \(='.*'\) must be 'auto' or a whole number ≥ 1"):
            parse_concurrency(wrong)


LONG = """
import sys, torch
import resprobe as rp
from resprobe.runs import configure
from resprobe.sweep import Job, run_all

if __name__ == "__main__":
    recipe = rp.default_recipe(rp.load_data("digits"), 100_000)
    jobs = [Job(configure("cifar/resnet-8", "digits", recipe, seed=seed, width=4)) for seed in range(4)]  # two wait
    run_all(jobs, rp.RunStore(sys.argv[1]), device=torch.device("cpu"), concurrency=2)
"""


def children(parent: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.add(int(entry.name))
            except (OSError, ValueError):
                continue
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(how, tmp_path):
    script = tmp_path / "long.py"
    script.write_text(LONG)
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path / "runs"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 180
        while len(list(tmp_path.glob("runs/*/config.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = children(parent.pid)
        assert len(workers) >= 2
        parent.send_signal(how)
        parent.wait(timeout=180)
        deadline = time.monotonic() + 90
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not any(map(alive, workers))
        if how == signal.SIGINT:  # asked to stop, not killed: what was done is kept
            assert list(tmp_path.glob("runs/*/checkpoint.pt"))
            # The pool hands every worker its next run beforehand; that one must not be begun.
            assert len(list(tmp_path.glob("runs/*/config.json"))) == 2
    finally:
        parent.kill()
        parent.wait()


def test_it_is_said_that_a_plugin_was_edited(tmp_path, clean_registries, monkeypatch):
    """Else nobody knows why what was trained is trained again."""
    monkeypatch.chdir(tmp_path)
    file, store = tmp_path / "mine.py", rp.RunStore(tmp_path / "runs")
    recipe = rp.default_recipe(rp.load_data("digits"), 2)

    def ahead(text: str, **options: str) -> str:
        file.write_text(text)
        rp.load_plugin(str(file))
        jobs = [Job(configure("cifar/resnet-8", "digits", recipe, seed=seed, width=2, block="mine")) for seed in (0, 1)]
        said = str(sweep.survey(jobs, store, device=CPU))
        run_all(jobs, store, device=CPU, concurrency=1)
        return said.splitlines()[0]

    text = "import resprobe as rp\n\n@rp.register_block('mine')\nclass Mine(rp.blocks.BasicBlock):\n    pass\n"
    assert ahead(text) == "2 runs: 0 finished already, 2 to train"
    assert ahead(text) == "2 runs: 2 finished already, nothing to train"
    assert (
        ahead(f"{text}# edited\n")
        == "2 runs: 0 finished already, 2 to train (2 of them anew, as block mine was edited)"
    )
    assert ahead(text) == "2 runs: 2 finished already, nothing to train"
