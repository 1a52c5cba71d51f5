"""What is made of errors, for people to read: one line."""

import json
import subprocess
import sys

import pytest
import torch

from resprobe.blocks import BLOCKS
from resprobe.commands import EXPECTED
from resprobe.errors import UsageError, blamed, last_words, one_line


@pytest.mark.parametrize(
    ("error", "plain", "named"),
    [
        (ValueError("width\n  is wrong"), "width is wrong", "ValueError: width is wrong"),
        (RuntimeError(), "RuntimeError", "RuntimeError"),
        (KeyError("gate"), "KeyError: 'gate'", "KeyError: 'gate'"),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for …\nCompile with …"),
            "CUDA error: an illegal memory access was encountered",
            "RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
    ],
    ids=["lines", "silent", "key", "card"],
)
def test_an_error_is_one_line(error, plain, named):
    assert (one_line(error), one_line(error, named=True)) == (plain, named)


def test_an_error_in_a_users_file_names_the_line(tmp_path):
    """The innermost of theirs, though the error arises in torch; and none of ours or of a cell that is no file."""
    file = tmp_path / "my_block.py"
    file.write_text("import torch\n\ndef forward(x):\n    return torch.relu(x) @ x\n\ndef call(other):\n    other()\n")
    module = {}
    exec(compile(file.read_text(), str(file), "exec"), module)
    with pytest.raises(RuntimeError) as caught:
        module["forward"](torch.zeros(2, 3))
    assert one_line(caught.value).endswith(" (my_block.py, line 4)")

    cell = {}
    exec(compile("def fail():\n    raise ValueError('no')", "/tmp/ipykernel_1/2.py", "exec"), cell)
    with pytest.raises(ValueError, match="no") as caught:
        module["call"](cell["fail"])
    assert one_line(caught.value, named=True) == "ValueError: no (my_block.py, line 7)"

    with pytest.raises(SyntaxError) as caught:
        exec(compile("import does_not(parse", "half.py", "exec"))
    assert one_line(caught.value).endswith("(half.py, line 1)")  # once

    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    assert one_line(caught.value).endswith(f" (test_errors.py, line {caught.tb.tb_lineno})")
    error = caught.value.with_traceback(caught.tb.tb_next)  # as who is below this file sees it
    assert one_line(error) == str(error)

    with pytest.raises(ValueError, match="must begin with a letter or digit") as caught:
        BLOCKS.register("a name")
    assert one_line(caught.value) == str(caught.value)  # which says all


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("gate"), "net cannot be built: KeyError: 'gate'"),
        (StopIteration(), "net cannot be built: StopIteration"),
        (UsageError("width (=0) must be ≥ 1"), "width (=0) must be ≥ 1"),
        (KeyboardInterrupt("stop"), "stop"),
    ],
    ids=["another", "stop", "ours", "no error"],
)
def test_what_a_strangers_code_raises_is_one_line_of_what_is_to_blame(error, said):
    with pytest.raises(type(error) if said == str(error) else UsageError) as caught, blamed("net cannot be built"):
        raise error
    assert str(caught.value).startswith(said)  # and the line in this file
    assert caught.value is error or caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ValueError('first\\nadvice')", "ValueError: first"),
        ("try:\n  1 / 0\nexcept ZeroDivisionError as e:\n  raise KeyError('x') from e", "KeyError: 'x'"),
        ("import sys; sys.exit('stopped:\\n\\nno memory\\n')", "no memory"),
        ("import atexit, os; atexit.register(print, 'bye', file=open(2, 'w')); {}['x']", "KeyError: 'x'"),
        ("", ""),
    ],
)
def test_the_last_words_of_a_process(code, words):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert last_words(done.stderr) == words


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_a_notebook_shows_a_line_in_place_of_a_traceback(kind):
    """IPython asks the error itself."""
    assert kind("width (=0) must be ≥ 1")._render_traceback_() == [f"{kind.__name__}: width (=0) must be ≥ 1"]
