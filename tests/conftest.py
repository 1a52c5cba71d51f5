"""What all tests share: the real data where it is there, devices, and how much hypothesis tries."""

import os

# NVIDIA's libraries read these when they are loaded or first used, so they are set before torch is there. Convolutions alone
# use TF32 unless asked otherwise, and would not be those of the CPU; up to torch 2.9 deterministic products need the second
# from the start.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from resprobe.devices import flush_denormals
from resprobe.registry import Registry

# Before torch's first parallel operation, else only the main thread flushes: deep plain networks would crawl.
# Denormal floats are then zero, so hypothesis draws floats only with `allow_subnormal=False`.
# Where tests run two at a time, each computes with one.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
flush_denormals()

# A shell has what it starts in the background ignore Ctrl-C, and so would all processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A fixed seed where a failure must be met again by a rerun; fresh examples on a developer's machine.
settings.register_profile(
    "resprobe",
    deadline=None,
    max_examples=50,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("resprobe")

_ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """A card is there for the tests marked `gpu` alone, with `-m gpu`: the others expect a CPU's figures, in this process
    and in those that they start."""
    if not re.match(r"gpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_report_header() -> str:
    there = torch.cuda.is_available()
    return f"card: {torch.cuda.get_device_name() if there else 'a stand-in, for the tests marked gpu (tests/card.py)'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if (gpu := item.get_closest_marker("gpu")) and gpu.kwargs.get("real"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device itself, and -m gpu"))


@pytest.fixture(autouse=True)
def _card(request: pytest.FixtureRequest) -> Iterator[None]:
    """Before any other fixture, which may put something on it."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        from card import stand_in  # a second and more, for the torch compiler that comes along

        with stand_in():
            yield
    else:
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: $RESPROBE_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("RESPROBE_DATA") or _ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the real data: there is no {folder}; set RESPROBE_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def cifar10_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole of CIFAR-10 as cifar-10-batches-py/, decoded from its lossless shards."""
    unpack = shared_data / "cifar10" / "cifar10_unpack.py"
    if not unpack.is_file():
        pytest.skip(f"needs the real CIFAR-10: there is no {unpack}; set RESPROBE_DATA to its folder's parent")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, unpack, "py", folder / "cifar-10-batches-py"], check=True, capture_output=True)
    return folder


@pytest.fixture
def clean_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the test registers is forgotten after it."""
    from resprobe import data, initialization, networks, normalization, probes, shortcuts
    from resprobe.blocks import BLOCKS

    for registry in (
        BLOCKS,
        data.DATASETS,
        initialization.INITIALIZATIONS,
        networks.NETWORKS,
        normalization.NORMALIZATIONS,
        probes.PROBES,
        shortcuts.SHORTCUTS,
    ):
        assert isinstance(registry, Registry)
        registry.names()  # the installed plugins first: they register once a process
        monkeypatch.setattr(registry, "_things", dict(registry._things))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., None]:
    """Whether a study, in an empty folder, answers unusable arguments with one line that has a text in it."""

    def check(study, arguments, text: str) -> None:
        monkeypatch.chdir(tmp_path)
        assert study.main(arguments) == 2
        said = capsys.readouterr().err
        assert text in said
        assert said.count("\n") == 1

    return check
