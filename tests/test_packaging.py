"""What a stranger installs: the wheel has everything, and its command works where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

import resprobe as rp

ROOT = Path(__file__).parent.parent
PACKAGES = ("resprobe", "plugins", "studies")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation: the build needs no network, only hatchling, which the extra `dev` has.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    done = subprocess.run([*command, "--quiet", "--disable-pip-version-check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel in a folder of its own, in front of what is installed."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel]
    done = subprocess.run([*command, "--quiet", "--disable-pip-version-check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def call(installed, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Calls an installed program, as it is found beside the packages, in an empty folder."""

    def run(*command: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def resprobe(installed, call) -> Callable[..., subprocess.CompletedProcess]:
    return lambda *arguments: call(str(installed / "bin" / "resprobe"), *arguments)


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel):
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == there
    assert packed >= {f"{package}/py.typed" for package in PACKAGES}
    assert packed >= {"resprobe/templates/report.html", "resprobe/__init__.pyi", "plugins/detection/model.py"}


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == rp.__version__
    assert metadata["License-Expression"] == "MIT"
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert "# resprobe" in metadata.get_payload()


def test_help_and_version(resprobe):
    helped = resprobe("--help")
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith("usage: resprobe [STUDY [OPTION ...]]\n")
    assert "degradation" in helped.stdout and "scorecard" in helped.stdout
    study = resprobe("degradation", "--help")
    assert study.returncode == 0, study.stderr
    assert study.stdout.startswith("usage: resprobe degradation ")
    assert resprobe("--version").stdout == f"resprobe {rp.__version__}\n"


@pytest.mark.slow
def test_a_study_outside_the_checkout(installed, call, resprobe, tmp_path):
    where = call(
        sys.executable,
        "-c",
        "import resprobe, plugins, studies; print(*(m.__file__ for m in (resprobe, plugins, studies)))",
    )
    assert where.stdout.split() == [str(installed / package / "__init__.py") for package in PACKAGES]
    # A module of the folder in which the command is given, as `python -m` would find it.
    (tmp_path / "my_shortcut.py").write_text(
        "import resprobe as rp\n"
        "from torch import nn\n\n\n"
        '@rp.register_shortcut("mine")\n'
        "def mine(in_channels, out_channels, stride, layers):\n"
        "    return nn.Sequential(layers.conv(in_channels, out_channels, kernel=1, stride=stride))\n"
    )
    options = ["--depths", "8", "--seeds", "0", "--iterations", "2", "--plugin", "my_shortcut", "--shortcut", "mine"]
    done = resprobe("degradation", *options, "--concurrency", "1")
    assert done.returncode == 0, done.stderr
    assert [line.split(" (")[0] for line in done.stderr.splitlines()] == ["note: one depth only", "note: one seed only"]
    record = json.loads((tmp_path / "results/degradation/verdict.json").read_text())
    assert record["config"]["command"] == " ".join(["resprobe degradation", *options, "--concurrency", "1"])
    assert "commit" not in record["environment"]  # there is no checkout of resprobe here
    assert 'src="data:image/svg+xml' in (tmp_path / "results/degradation/report.html").read_text()
    listed = resprobe().stdout
    assert "resprobe degradation\n    C1   not tested (custom)" in listed


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" in project["dynamic"]
    assert f'__version__ = "{rp.__version__}"' in (ROOT / "resprobe/__init__.py").read_text()
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_is_of_the_paper_and_of_this_software():
    """What the schema 1.2.0 of the Citation File Format demands, and what this project does."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"].startswith(project["name"])
    assert citation["message"]
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    for work in [citation, *citation["references"]]:
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    papers = citation["references"]
    assert {paper["doi"] for paper in papers} == {"10.48550/arXiv.1512.03385", "10.1109/CVPR.2016.90"}
    for paper in papers:
        assert set(paper) >= {"type", "title", "authors", "year"}
        assert [author["family-names"] for author in paper["authors"]] == ["He", "Zhang", "Ren", "Sun"]
