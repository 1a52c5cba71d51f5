"""Several processes train as one: the same losses, one report, killed and resumed with another number of processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import tiny
import torch
from torch import distributed
from torchvision.transforms.functional import to_pil_image

import resprobe as rp
from resprobe.distributed import Team, join, team
from studies.degradation import study

ROOT = Path(__file__).parent.parent

TRAIN = """
import os, signal, sys, torch
import resprobe as rp
from resprobe import keeping
from resprobe.distributed import join, leave
from tests import tiny

torch.set_num_threads(1)
keeping.CHECKPOINT_SECONDS = 0
device = join(torch.device("cpu"))
kill_at = int(sys.argv[2])


def watch(news):
    if news.iteration == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


data = rp.load_data("digits")
recipe = tiny.recipe(bn_batch=8, weight_decay=1e-3)
run = rp.train(tiny.spec("cifar/resnet"), "digits", recipe, runs=sys.argv[1], device=device, precision="fp32", progress=watch)
leave()
"""


def launch(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *starter, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )


def trained(processes: int, folder: Path, *, kill_at: int = -1) -> int:
    """Trains in `folder`; gives the exit status."""
    script = folder / "train.py"
    folder.mkdir(exist_ok=True)
    script.write_text(TRAIN)
    if processes == 1:
        command = [sys.executable, str(script), str(folder / "runs"), str(kill_at)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, timeout=480).returncode
    return launch(processes, str(script), str(folder / "runs"), str(kill_at), cwd=folder).returncode


def outcome(folder: Path) -> tuple[pandas.DataFrame, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    (run,) = (folder / "runs").iterdir()
    assert (run / "result.json").is_file()
    assert not list(run.glob("checkpoint*"))
    tensors = load_file(run / "network.safetensors")
    return pandas.read_csv(run / "history.csv"), {
        name: tensor for name, tensor in tensors.items() if name.startswith("network.")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert trained(1, folder) == 0
    return outcome(folder)


def assert_near(one, other):
    (history, weights), (other_history, other_weights) = one, other
    assert history["iteration"].tolist() == other_history["iteration"].tolist()
    for column in ("train_loss", "train_error", "learning_rate"):
        assert history[column].tolist() == pytest.approx(other_history[column].tolist(), rel=1e-4)
    for name, tensor in weights.items():
        if "running" in name or "num_batches" in name:
            continue  # while training each process sees its own images; precise statistics are those of all
        torch.testing.assert_close(tensor, other_weights[name], rtol=1e-3, atol=1e-4)
    for name, tensor in weights.items():
        if "running" in name:
            torch.testing.assert_close(tensor, other_weights[name], rtol=1e-2, atol=1e-3)


def test_two_processes_make_the_losses_of_one(tmp_path, alone):
    assert trained(2, tmp_path) == 0
    assert_near(outcome(tmp_path), alone)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_killed_and_resumed_by_another_number_of_processes(tmp_path, alone, before, after):
    assert trained(before, tmp_path, kill_at=6) != 0
    (run,) = (tmp_path / "runs").iterdir()
    assert list(run.glob("checkpoint*"))
    assert trained(after, tmp_path) == 0
    assert_near(outcome(tmp_path), alone)


def test_a_study_of_two_processes_speaks_with_one_voice(tmp_path):
    asked = ("-m", "studies.degradation", "--depths", "8", "14", "--seeds", "0", "--iterations", "6")
    done = launch(2, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 runs: 0 finished already, 4 to train") == 1
    assert done.stdout.count("[4/4]") == 1
    assert done.stdout.count("report:") == 1
    said = (tmp_path / "results/degradation/report.md").read_text()
    assert "batch normalization over the images of each of 2 processes" in said
    assert "processes: 2" in said
    # Found again by one process, they are what two made.
    assert study.main([*asked[2:], "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "again")]) == 0
    assert "batch normalization over the images of each of 2 processes" in (tmp_path / "again/report.md").read_text()
    mistake = launch(2, *asked, "--shortcut", "Z", cwd=tmp_path)
    assert mistake.stderr.count("error: shortcut (='Z')") == 1


LONELY = """
import os
import resprobe as rp
from resprobe.blocks import BasicBlock


@rp.register_block("lonely")
class Lonely(BasicBlock):
    passes = 0

    def forward(self, x):
        Lonely.passes += x.requires_grad
        if os.environ["RANK"] == "1" and Lonely.passes > 40:
            raise MemoryError("no room left")
        return super().forward(x)
"""


def test_what_one_process_is_alone_with_ends_all(tmp_path):
    """The other one waits for its gradients, and would for a day."""
    (tmp_path / "lonely.py").write_text(LONELY)
    asked = [
        "-m",
        "studies.degradation",
        "--depths",
        "8",
        "14",
        "--seeds",
        "0",
        "--iterations",
        "60",
        "--precision",
        "fp32",
    ]
    failed = launch(2, *asked, "--plugin", "lonely.py", "--block", "lonely", cwd=tmp_path)
    assert failed.returncode != 0
    said = r", in process 1: no room left \(lonely.py, line 14\); (\S+); finished runs and the last checkpoint are kept"
    found = re.search(said, failed.stderr)
    assert found and Path(tmp_path, found[1]).name == "traceback-1.txt"
    assert "no room left" in Path(tmp_path, found[1]).read_text()


RAISES = """
import resprobe as rp


@rp.register_block("raises")
class Raises(rp.BLOCKS["basic"]):
    def forward(self, x):
        if self.training and self.shortcut is None and len(x) > 2:  # where it is tried it has two images
            raise MemoryError("no room at all")
        return super().forward(x)
"""


def test_what_all_processes_meet_alike_ends_one_run(tmp_path):
    """As a block of a stranger that raises: the other runs are trained."""
    (tmp_path / "raises.py").write_text(RAISES)
    asked = ["-m", "studies.degradation", "--depths", "8", "--seeds", "0", "--iterations", "6", "--precision", "fp32"]
    failed = launch(2, *asked, "--plugin", "raises.py", "--block", "raises", cwd=tmp_path)
    assert failed.returncode != 0
    assert (
        "1 of 2 runs failed: cifar/plain-8, seed 0: no room at all (raises.py, line 9); 1 finished runs"
        in failed.stderr
    )
    (finished,) = tmp_path.glob("runs/*/result.json")
    assert finished.parent.name.startswith("cifar-resnet-8_raises_")


def test_class_folders_of_two_processes(tmp_path):
    """The path of ImageNet: files read by each process's loaders."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("dark", "light"):
            (tmp_path / "photographs" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 128, (3, 80 + index, 90), dtype=torch.uint8, generator=generator)
                pixels = pixels + (128 if name == "light" else 0)
                to_pil_image(pixels).save(tmp_path / "photographs" / part / name / f"{index}.png")
    asked = ["-m", "studies.imagenet", "--preset", "paper", "--data", "folder:photographs", "--depths", "18", "--deep"]
    asked += ["50", "--shortcuts", "A", "--width", "4", "--batch", "4", "--crop", "32", "--seeds", "0", "--iterations"]
    asked += ["4", "--precision", "fp32", "--protocols", "single-view"]
    done = launch(2, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[3/3]") == 1 and done.stdout.count("report:") == 1
    table = pandas.read_csv(tmp_path / "results/imagenet/results.csv")
    assert len(table) == 3 and table["train_loss"].gt(0).all()
    recipe = json.loads((tmp_path / "results/imagenet/verdict.json").read_text())["config"]["recipes"][0]
    assert recipe["augmentation"] == "scale-crop" and recipe["batch_size"] == 4


def test_a_rate_that_follows_the_error_is_one_rate(tmp_path):
    script = TRAIN.replace("weight_decay=1e-3", "plateau=1, milestones=(), evaluations=12, learning_rate=1e-9")
    (tmp_path / "train.py").write_text(script)
    assert launch(2, "train.py", "runs", "-1", cwd=tmp_path).returncode == 0
    history, _ = outcome(tmp_path)
    # Nothing is learned, so that the error falls no more after the first test, which follows an iteration.
    assert history["learning_rate"].iloc[-1] < 1e-9 / 5


def test_parts_of_a_batch_are_the_batch():
    data, recipe = tiny.digits(), tiny.recipe(augmentation="pad-crop", pad=2)
    fit = rp.Normalization.fit(data.train.images, "per-pixel-mean")

    def batch(part):
        return next(tiny.batches(data.train, recipe, 0, fit, torch.device("cpu"), 3, part))

    whole = batch(slice(None))
    parts = [batch(Team(rank, 4).part(recipe)) for rank in range(4)]
    for index in (0, 1):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_unequal_parts_are_refused():
    with pytest.raises(rp.UsageError, match=r"batch_size \(=16\) must be a multiple of the 3 processes"):
        Team(0, 3).part(tiny.recipe())
    with pytest.raises(rp.UsageError, match=r"bn_batch \(=8\) must divide the 4 images of one of the 4 processes"):
        Team(0, 4).part(tiny.recipe(bn_batch=8))
    assert Team(0, 1).part(tiny.recipe(bn_batch=5)) == slice(0, 16)


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert team() == Team(0, 1)
    assert join(torch.device("cpu")) == torch.device("cpu")
    assert not distributed.is_initialized()
    assert team().broadcast(lambda: 3) == 3
    figures = torch.tensor([1.0])
    assert team().total(figures).tolist() == [1.0]
