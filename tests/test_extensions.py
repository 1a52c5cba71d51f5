"""Plugins: found as a file, a module, an installed entry point; a broken one is one line, not a traceback."""

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch

import resprobe as rp
from resprobe import extensions

BLOCK = """
from torch import nn
import resprobe as rp

@rp.register_block("one-by-one")
class OneByOne(rp.Block):
    weighted_layers = 1

    def make_branch(self, in_channels, width, stride, layers):
        return nn.Sequential(layers.conv(in_channels, width, kernel=1, stride=stride), layers.norm(width))
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module into an importable folder and gives its path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write_module(name: str, text: str) -> Path:
        (tmp_path / f"{name}.py").write_text(text)
        return tmp_path / f"{name}.py"

    return write_module


def refusal(where: object) -> str:
    """The one line that loading the plugin at `where` ends with."""
    with pytest.raises(rp.UsageError) as error:
        rp.load_plugin(str(where))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("clean_registries")
def test_file_registers_a_block_that_networks_are_built_of(write):
    rp.load_plugin(str(write("own_block", BLOCK)))
    network = rp.build("cifar/resnet-8", block="one-by-one", width=4)
    assert [type(block).__name__ for _, block in network.blocks()] == ["OneByOne"] * 6
    assert network.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_file_is_loaded_once(write):
    file = write("loaded_once", "things = []")
    assert rp.load_plugin(str(file)) is rp.load_plugin(str(file.parent / ".." / file.parent.name / file.name))


@pytest.mark.usefixtures("clean_registries")
def test_a_file_that_was_edited_is_loaded_anew(write):
    """As in a notebook whose cell writes it: at once, also within the second in which compiled files look the same."""
    file = write("edited_here", BLOCK)
    first, digest = rp.load_plugin(str(file)), rp.BLOCKS.fingerprint("one-by-one")
    file.write_text(BLOCK.replace("kernel=1", "kernel=3"))
    again = rp.load_plugin(str(file))
    assert again is not first and rp.BLOCKS["one-by-one"] is again.OneByOne
    assert rp.BLOCKS.fingerprint("one-by-one") != digest
    network = rp.build("cifar/resnet-8", block="one-by-one", width=4)
    assert {tuple(each.shape[2:]) for each in network.stage1.parameters() if each.ndim == 4} == {(3, 3)}
    assert rp.load_plugin(str(file)) is again
    file.write_text("1 / 0")
    assert "ZeroDivisionError" in refusal(file)
    assert rp.BLOCKS["one-by-one"] is again.OneByOne
    file.write_text(BLOCK)
    rp.load_plugin(str(file))
    assert rp.BLOCKS.fingerprint("one-by-one") == digest


@pytest.mark.usefixtures("clean_registries")
def test_a_file_beside_it_that_was_edited_is_loaded_anew_too(write):
    helper = write("helper_of_it", "KERNEL = 1\n")
    text = "from helper_of_it import KERNEL\n" + BLOCK.replace("kernel=1", "kernel=KERNEL")
    file = write("has_a_helper", text)
    first, digest = rp.load_plugin(str(file)), rp.BLOCKS.fingerprint("one-by-one")
    helper.write_text("KERNEL = 33\n")
    again = rp.load_plugin(str(file))
    assert (first.KERNEL, again.KERNEL) == (1, 33)
    assert rp.BLOCKS.fingerprint("one-by-one") != digest


@pytest.mark.parametrize("way", ["by way of another file", "in a package", "in a package's own file", "in a folder"])
def test_what_files_beside_it_take_from_each_other_is_loaded_anew(write, tmp_path, way):
    name = f"helps_{abs(hash(way))}"
    if way == "by way of another file":
        edited, text = write(f"{name}_b", "KERNEL = 1\n"), f"from {name}_a import KERNEL\n"
        write(f"{name}_a", f"from {name}_b import KERNEL\n")
    else:
        (tmp_path / name).mkdir()
        edited = tmp_path / name / "sub.py"
        edited.write_text("KERNEL = 1\n")
        text = f"from {name} import sub\nKERNEL = sub.KERNEL\n"
        if way == "in a package":
            (tmp_path / name / "__init__.py").write_text("")
        if way == "in a package's own file":
            (tmp_path / name / "__init__.py").write_text("from .sub import KERNEL\n")
            text = f"from {name} import KERNEL\n"
    importlib.invalidate_caches()
    file = write(f"{name}_plugin", text)
    assert rp.load_plugin(str(file)).KERNEL == 1
    for kernel in (2, 3):  # within the second in which compiled files look the same
        edited.write_text(f"KERNEL = {kernel}\n")
        assert kernel == rp.load_plugin(str(file)).KERNEL


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path):
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"value = {value}")
    one, two = (rp.load_plugin(str(tmp_path / folder / "same.py")) for folder in ("one", "two"))
    assert (one.value, two.value) == (1, 2)
    assert sys.modules[one.__name__] is one


def test_home_folder_is_expanded(write, tmp_path, monkeypatch):
    write("at_home", "value = 7")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rp.load_plugin("~/at_home.py").value == 7


def test_module_is_imported_by_its_name(write):
    write("plugin_as_module", "value = 3")
    assert rp.load_plugin("plugin_as_module") is sys.modules["plugin_as_module"]


def test_missing_file(tmp_path):
    where = tmp_path / "absent.py"
    assert refusal(where) == f"plugin (={str(where)!r}) is not there: no file {where}"


def test_folder_is_no_plugin(tmp_path):
    assert refusal(tmp_path) == f"plugin (={str(tmp_path)!r}) is not there: no file {tmp_path}"


def test_a_folder_without_code_is_no_plugin_either(tmp_path, monkeypatch):
    (tmp_path / "empty_folder_here").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("empty_folder_here") == (
        "plugin (='empty_folder_here') is a folder without code: name a file in it, or give it an __init__.py"
    )


def test_missing_module():
    assert refusal("no_such_module_here") == (
        "plugin (='no_such_module_here') does not import: ModuleNotFoundError: No module named 'no_such_module_here'"
    )


def test_empty_name():
    assert refusal("") == "plugin (='') does not import: ValueError: Empty module name"


def test_syntax_error_names_its_line(write):
    file = write("bad_syntax", "x = 1\ndef f(:\n")
    assert (
        refusal(file) == f"plugin (={str(file)!r}) does not import: SyntaxError: invalid syntax (bad_syntax.py, line 2)"
    )


def test_import_error_inside(write):
    file = write("bad_import", "import no_such_module_here")
    assert refusal(file) == (
        f"plugin (={str(file)!r}) does not import: ModuleNotFoundError: No module named 'no_such_module_here' "
        "(bad_import.py, line 1)"
    )


def test_exception_inside_is_one_line_and_keeps_its_cause(write):
    file = write("bad_start", "raise KeyError('two\\nlines')")
    assert refusal(file) == f"plugin (={str(file)!r}) does not import: KeyError: 'two\\nlines' (bad_start.py, line 1)"
    file = write("bad_value", "raise ValueError('two\\n  lines')")
    with pytest.raises(
        rp.UsageError, match=r"does not import: ValueError: two lines \(bad_value.py, line 1\)$"
    ) as error:
        rp.load_plugin(str(file))
    assert isinstance(error.value.__cause__, ValueError)


def test_module_that_raises(write):
    write("bad_module", "1 / 0")
    assert refusal("bad_module") == (
        "plugin (='bad_module') does not import: ZeroDivisionError: division by zero (bad_module.py, line 1)"
    )


@pytest.mark.usefixtures("clean_registries")
def test_refused_registration_is_passed_on_as_it_is(write):
    file = write("takes_a_name", BLOCK.replace("one-by-one", "basic"))
    assert refusal(file) == (
        "block (='basic') is already registered by resprobe.blocks.BasicBlock; choose another name"
    )


def test_file_can_be_mended_and_loaded_again(write):
    file = write("mended", "1 / 0")
    refusal(file)
    file.write_text("value = 5  # mended")
    assert rp.load_plugin(str(file)).value == 5


def test_broken_installed_plugin_only_warns(write, monkeypatch):
    write("installed_broken", "1 / 0")
    write("installed_sound", "value = 1")
    points = [EntryPoint(name, f"installed_{name}", extensions.GROUP) for name in ("broken", "sound")]
    monkeypatch.setattr(extensions, "entry_points", lambda group: points)
    monkeypatch.setattr(extensions, "_loaded", set())
    with pytest.warns(UserWarning, match="^installed plugin") as caught:
        extensions.load_installed()
    assert [str(warning.message) for warning in caught] == [
        "installed plugin 'broken' (installed_broken) does not import: ZeroDivisionError('division by zero')"
    ]
    assert "installed_sound" in sys.modules
    extensions.load_installed()  # once a process: no second warning, which would be an error here


@pytest.mark.usefixtures("clean_registries")
def test_a_plugin_announced_under_the_name_asked_for_is_imported_alone(write, monkeypatch):
    write("announced", BLOCK.replace("one-by-one", "announced-block"))
    write("another", "raise AssertionError('nobody asked for this')")
    points = [
        EntryPoint("announced-block", "announced", extensions.GROUP),
        EntryPoint("another", "another", extensions.GROUP),
    ]
    monkeypatch.setattr(extensions, "entry_points", lambda group: points)
    monkeypatch.setattr(extensions, "_loaded", set())
    assert rp.BLOCKS["announced-block"].weighted_layers == 1
    assert "another" not in sys.modules


def test_plugins_of_this_installation_import():
    points = [point for point in entry_points(group=extensions.GROUP) if point.value.startswith("plugins.")]
    assert points
    for point in points:
        assert point.load().__name__ == point.value


def test_a_file_that_is_no_python_is_no_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# not code")
    with pytest.raises(rp.UsageError) as caught:
        rp.load_plugin("README.md")
    assert str(caught.value) == "plugin (='README.md') must be a Python file (my_block.py) or a module (package.module)"
