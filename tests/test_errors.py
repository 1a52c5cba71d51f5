"""What is made of errors, for people to read: one line."""

import subprocess
import sys

import pytest

from resprobe.errors import last_words, one_line


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
