"""What a run is found by: another network, another source or another probe is another run."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resprobe as rp
from resprobe.digests import as_text, network_digest, settings, source_digest
from resprobe.runs import configure

ROOT = Path(__file__).parent.parent


def made(*changed: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)]
    for index, part in enumerate(changed):
        parts[index] = part or parts[index]
    return nn.Sequential(*parts)


class Mine(nn.Module):
    def __init__(self, act=F.relu, power=1, table=(1, 2)):
        super().__init__()
        self.act, self.power, self.table = act, power, list(table)
        self.register_buffer("kept", torch.zeros(2), persistent=False)


def strided() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(1, 4, 3, padding=1)


def test_networks_that_compute_otherwise_differ():
    without = rp.build("cifar/resnet-8", width=4)
    without.stage1[0].shortcut = None
    frozen_part, buffered = made(), Mine()
    frozen_part[2].eval()
    buffered.kept += 1
    others = [
        made(),
        made(None, nn.Tanh()),
        made(None, nn.LeakyReLU(0.2)),
        made(None, None, nn.Dropout(0.1)),
        made(strided()),
        made().requires_grad_(False),
        frozen_part,
        Mine(),
        Mine(act=F.elu),
        Mine(act=functools.partial(F.elu, alpha=2.0)),
        Mine(power=2),
        Mine(table=(1, 3)),
        buffered,
        without,
    ]
    found = [network_digest(network) for network in others]
    assert len(set(found)) == len(found)


def test_copies_and_modes_of_the_whole_are_the_same():
    for network in (made(), Mine(), rp.build("cifar/resnet-8", width=4)):
        found = network_digest(network)
        assert network_digest(copy.deepcopy(network)) == found
        assert network_digest(network.eval()) == found
        assert network_digest(network, "more") != found


def test_digests_are_the_same_in_every_process():
    code = "import test_digests as t; print(t.network_digest(t.made()), t.network_digest(t.Mine()))"
    command = [sys.executable, "-c", code]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": "7"}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert said.split() == [network_digest(made()), network_digest(Mine())]


class Part:
    def __init__(self, size):
        self.size, self.whole = size, self


def closing_over(number):
    return lambda x: x * number


def test_what_a_setting_is_made_of_counts():
    table = numpy.arange(3)
    settings_of_one_kind = [
        (Part(1), Part(2)),
        (closing_over(1), closing_over(2)),
        (lambda x, by=1: x, lambda x, by=2: x),
        (Part(1).__init__, Part(2).__init__),
        (table, table[::-1]),
        (numpy.float32(0.5), numpy.float32(0.25)),
        ({"a": [Part(1)]}, {"a": [Part(3)]}),
        (range(3), range(9)),
        (slice(3), slice(9)),
    ]
    for one, other in settings_of_one_kind:
        assert network_digest(Mine(power=one)) == network_digest(Mine(power=copy.deepcopy(one)))
        assert network_digest(Mine(power=one)) != network_digest(Mine(power=other)), one
    assert as_text(numpy.int64(5)) == as_text(5)
    assert as_text(torch.device("cpu")) is None, "where a run is trained is no part of what it is"


def test_a_schedule_of_numpys_numbers_is_its_numbers():
    def identity(schedule):
        return Counting(schedule=schedule).identity()

    every, at = rp.probes.every, rp.probes.at
    assert identity(every(numpy.int64(5))) == identity(every(5)) != identity(every(numpy.int64(50)))
    assert identity(at(numpy.arange(0, 9, 3))) == identity(at([0, 3, 6])) != identity(at(numpy.arange(0, 12, 4)))


def test_without_a_source_the_code_itself_counts():
    def made(number, indent=""):
        space = {"__name__": "typed"}
        exec(f"class Block:\n    scale = {number}\n{indent}\n    def f(self, x):\n        return x + {number}", space)
        return space["Block"]

    assert source_digest(made(1)) == source_digest(made(1, indent="\n")) != source_digest(made(2))
    assert source_digest(made(1).f) == source_digest(made(1).f) != source_digest(made(2).f)


TYPED = """
import math
from torch import nn
from torch.nn import functional as F

POWER, UNREAD = 2, 1
TABLE = {"a": [1, 2]}

def deeper(x):
    return x + 3

def helper(x):
    return deeper(x) ** POWER

class Scale:
    def __init__(self):
        self.by, self.block = 4, Block  # which names this in turn

class Base(nn.Module):
    def extra(self, x):
        return x * 5

    @property
    def wide(self):
        return 6

class Block(Base):
    kind = "seven"

    def __init__(self, act=F.relu, times=8):
        super().__init__()
        self.act = act

    def forward(self, x):
        if self.kind in {"seven", "two", "three", "four"}:
            x = [self.wide * each for each in helper(x)]
        return self.again(x) + SCALE.by + math.pi + TABLE["a"][0]

    @staticmethod
    def again(x):
        return x - 9 if x else Block

SCALE = Scale()
"""


def typed(text: str = TYPED, name: str = "Block"):
    space = {"__name__": "typed"}
    exec(compile(text, "<typed>", "exec", dont_inherit=True), space)
    return space[name]


def test_what_was_typed_in_is_what_it_and_all_it_names_does():
    found = source_digest(typed())
    for old, new in (
        ("POWER, UNREAD = 2", "POWER, UNREAD = 3"),
        ('"a": [1', '"a": [0'),
        ("x + 3", "x + 2"),
        ("deeper(x) **", "deeper(x) *"),
        ("self.by, self.block = 4", "self.by, self.block = 5"),
        ("x * 5", "x * 6"),
        ("return 6", "return 7"),
        ('kind = "seven"', 'kind = "eight"'),
        ("act=F.relu", "act=F.elu"),
        ("times=8", "times=9"),
        ('"two", ', ""),
        ("self.wide * each", "self.wide + each"),
        ("x - 9", "x - 8"),
        ("class Base(nn.Module)", "class Base(nn.Identity)"),
    ):
        assert TYPED.count(old) == 1, old
        assert source_digest(typed(TYPED.replace(old, new))) != found, old
    for old, new in (
        ("UNREAD = 2, 1", "UNREAD = 2, 5"),
        ("import math\n", "import math, os\n\n"),
        ("  # which", "  # that"),
    ):
        assert TYPED.count(old) == 1, old
        assert source_digest(typed(TYPED.replace(old, new))) == found, old
    helpers = [source_digest(typed(TYPED.replace("x + 3", new), "helper")) for new in ("x + 3", "x + 4")]
    assert len({found, *helpers}) == 3


DIFFER = {
    "which of two lambdas": (
        "f = lambda x: x + 1\ng = lambda x: x - 1\ndef B(x): return f(x) * 2 + g(x)",
        "f(x) * 2 + g(x)",
        "g(x) * 2 + f(x)",
    ),
    "order of parameters": ("def B(x, a=1, b=2): return x * a + b", "x, a=1, b=2", "x, b=1, a=2"),
    "where a try ends": (
        "def B():\n try: a(); b()\n except E: pass",
        "a(); b()\n except E: pass",
        "a()\n except E: pass\n else: b()",
    ),
    "a wrapper": ("import functools\ndef f(x): return x\n@functools.wraps(f)\ndef B(x): return f(x) + 1", "+ 1", "+ 2"),
    "what is wrapped": (
        "import functools\ndef f(x): return x + 1\n@functools.wraps(f)\ndef B(x): return f(x)",
        "+ 1",
        "+ 2",
    ),
    "a wrapper of torch's": (
        "import functools, torch\n@functools.wraps(torch.relu)\ndef B(x): return torch.relu(x) + 1",
        "+ 1",
        "+ 2",
    ),
    "a fraction": ("from fractions import Fraction\nP = Fraction(1, 2)\ndef B(x): return x * P", "(1, 2)", "(1, 3)"),
    "a pattern": ("import re\nP = re.compile('a')\ndef B(x): return P.match(x)", "'a'", "'b'"),
    "slots": (
        "class S:\n __slots__ = ('v',)\n def __init__(self, v): self.v = v\nP = S(1)\ndef B(x): return x * P.v",
        "S(1)",
        "S(2)",
    ),
    "a table": (
        "import pandas\nP = pandas.DataFrame({'a': range(200)})\ndef B(x): return P",
        "range(200)",
        "[*range(99), 9, *range(100)]",
    ),
    "an attribute of a function": ("def B(x): return x\nB.by = 1", "by = 1", "by = 2"),
    "a metaclass": ("class M(type):\n def f(cls): return 1\nclass B(metaclass=M): pass", "return 1", "return 2"),
    "a cached property": (
        "import functools\nclass B:\n @functools.cached_property\n def f(self): return 1",
        "return 1",
        "return 2",
    ),
    "a dataclass's field": ("from dataclasses import dataclass\n@dataclass\nclass B:\n a: int = 1", "= 1", "= 2"),
    "a class in a class": ("class B:\n class C:\n  def f(self): return 1", "return 1", "return 2"),
    "a closure": ("def make(n):\n def B(x): return x * n\n return B\nB = make(1)", "make(1)", "make(2)"),
    "classes that hold each other": (
        "class A: by = 1\nclass B: own = A\nA.other = B\nB.own_self = B",
        "by = 1",
        "by = 2",
    ),
    "a static method of a partial": (
        "import functools\ndef f(x, y): return x\nclass B:\n g = staticmethod(functools.partial(f, 1))",
        "f, 1",
        "f, 2",
    ),
}
"""Code, and what in it is put in place of what."""


@pytest.mark.parametrize("what", DIFFER)
def test_what_does_something_else_is_something_else(what):
    text, old, new = DIFFER[what]
    assert text.count(old) == 1
    assert (
        source_digest(typed(text, "B"))
        == source_digest(typed(text, "B"))
        != source_digest(typed(text.replace(old, new), "B"))
    )


def test_of_two_that_name_each_other_each_is_itself():
    text = "def B(n): return C(n) + 1\ndef C(n): return B(n) + 2"
    assert source_digest(typed(text, "B")) != source_digest(typed(text, "C"))


def test_things_that_all_name_each_other_are_told_at_once():
    many = 30
    text = "class T:\n def __init__(self): self.by = {}\n" + "\n".join(f"t{n} = T()" for n in range(many))
    text += f"\nfor t in [*range({many})]: globals()['t%d' % t].by.update({{n: globals()['t%d' % n] for n in range({many})}})"
    text += "\ndef B(): return t0"
    started = time.perf_counter()
    source_digest(typed(text, "B"))
    assert time.perf_counter() - started < 5


def test_a_users_module_counts_by_what_is_in_it(tmp_path, monkeypatch):
    file = tmp_path / "typed_help.py"
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number in (1, 1, 22):
        file.write_text(f"def scale(x): return x * {number}\n")
        monkeypatch.delitem(sys.modules, "typed_help", raising=False)
        importlib.invalidate_caches()
        found.append(source_digest(typed("import typed_help\ndef B(x): return typed_help.scale(x)", "B")))
    assert found[0] == found[1] != found[2]


ELSEWHERE = """
import abc, enum, functools, logging, dataclasses, pathlib, typing
from contextlib import contextmanager
from functools import partial

LOG = logging.getLogger("mine")

class Kind(enum.Enum):
    ONE = 1

class B(abc.ABC, typing.Generic[typing.TypeVar("T")]):
    kinds = frozenset({"a", "b", "c"}), {Kind.ONE}
    half = partial(max, 1)
    path: pathlib.Path = pathlib.Path("a")

    @contextmanager
    def f(self):
        LOG.info("x")
        yield Kind.ONE

    @functools.cached_property
    def g(self):
        return {"x", "y", "z"}
"""


def test_what_was_typed_in_is_the_same_in_every_process():
    """Whatever else that has imported, and however it orders sets."""
    for seed, first in (
        ("1", ""),
        ("2", "import pandas, matplotlib.pyplot, sklearn.datasets, logging; logging.warning('x'); "),
    ):
        code = f"{first}import test_digests as t; print(t.source_digest(t.typed()), t.source_digest(t.typed(t.ELSEWHERE, 'B')))"
        env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": seed}
        said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert said.split() == [source_digest(typed()), source_digest(typed(ELSEWHERE, "B"))]


def test_who_asks_for_annotations_changes_nothing():
    block = typed("class B:\n def f(self): return 1", "B")
    before = source_digest(block)
    assert block.__annotations__ == {} and source_digest(block) == before


def test_what_a_typed_block_names_may_change_while_it_is_trained(tmp_path, clean_registries):
    """A list that grows with every pass: the run is kept under what it was when it was asked for."""
    space = {"__name__": "typed", "rp": rp}
    exec(
        "SEEN = []\n\nclass Seen(rp.blocks.BasicBlock):\n    def forward(self, x):\n        SEEN.append(1)\n"
        "        return super().forward(x)\n",
        space,
    )
    rp.register_block("seen")(space["Seen"])
    run = rp.train("cifar/resnet-8", "digits", RECIPE, block="seen", runs=tmp_path, device="cpu", progress=False)
    assert space["SEEN"]
    assert run.path.name == run.config.folder_name and rp.RunStore(tmp_path).find(run.config) is not None
    assert pickle.loads(pickle.dumps(run.config)).key != run.config.key  # elsewhere it is what is there


def test_what_cannot_be_told_in_words_is_left_out():
    class Thing:
        def __init__(self):
            self.number, self.thing, self._private, self.training = 3, object(), 1, True

    assert settings(Thing()) == {"number": "3"}
    assert as_text({"a": {1, 2}, "b": [None, torch.ones(2)]}) == as_text({"a": {2, 1}, "b": (None, torch.ones(2))})
    assert as_text(torch.ones(2)) != as_text(torch.zeros(2))


def test_the_files_beside_a_plugin_that_it_imports_are_part_of_it(tmp_path, monkeypatch):
    for name, text in (("helper_a", "X = 1"), ("helper_b", "from helper_a import X"), ("unused_c", "")):
        (tmp_path / f"{name}.py").write_text(f"{text}\ndef of_{name}(): pass\n")
    (tmp_path / "own_d.py").write_text("from helper_b import of_helper_b\ndef mine(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def found():
        for name in ("helper_a", "helper_b", "own_d"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return source_digest(importlib.import_module("own_d").mine)

    (tmp_path / "helper_b.py").write_text("import helper_a\ndef of_helper_b(): pass\n")
    before = found()
    (tmp_path / "unused_c.py").write_text("# edited")
    assert found() == before
    for name in ("own_d", "helper_b", "helper_a"):
        file = tmp_path / f"{name}.py"
        file.write_text(file.read_text() + "# edited\n")
        assert found() != before, name
        before = found()


def test_what_a_plugin_imports_counts_whatever_it_is_and_as_it_was_loaded(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "settings.py").write_text("WIDTH = 1\n")
    (tmp_path / "later_e.py").write_text("DEPTH = 1\n")
    # A number is imported, not a function; one file is imported when the other is asked for something.
    text = "from .settings import WIDTH\ndef mine():\n    from ..later_e import DEPTH\n"
    (tmp_path / "own_f.py").write_text(text.replace("from .settings", "from package.settings").replace("..", ""))
    (tmp_path / "package" / "own_g.py").write_text(text.replace("..later_e", "package.settings"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    def found(name):
        for each in ("package.settings", "package.own_g", "own_f"):
            monkeypatch.delitem(sys.modules, each, raising=False)
        return source_digest(importlib.import_module(name).mine)

    for name, files in (("own_f", ["package/settings.py", "later_e.py"]), ("package.own_g", ["package/settings.py"])):
        before = found(name)
        module = sys.modules[name]
        for file in files:
            (tmp_path / file).write_text((tmp_path / file).read_text() + "# edited\n")
            assert source_digest(module.mine) == before, "as it was loaded"
            assert found(name) != before, file
            before, module = found(name), sys.modules[name]
        assert source_digest(importlib.reload(module).mine) == before
        (tmp_path / f"{name.replace('.', '/')}.py").write_text("def mine(): pass\n")
        assert source_digest(importlib.reload(module).mine) != before


RECIPE = rp.recipes.digits_quick(iterations=4)


def test_another_network_with_the_same_weights_is_another_run(tmp_path):
    runs = [
        rp.train(made(None, act), "digits", RECIPE, runs=tmp_path, device="cpu", progress=False)
        for act in (nn.ReLU(), nn.Sigmoid(), nn.ReLU())
    ]
    assert runs[0].path == runs[2].path != runs[1].path


NORM = """
import torch, resprobe as rp
@rp.register_normalization("mine")
def norm(channels):
    return torch.nn.GroupNorm({groups}, channels)
@rp.register_initialization("small")
def small(weight):
    return weight.normal_(0, {std})
"""


def test_the_sources_of_normalizations_and_initializations_count(tmp_path, clean_registries):
    keys = []
    for number, (groups, std) in enumerate(((1, 0.1), (2, 0.1), (2, 0.2))):
        file = tmp_path / f"norm{number}" / "norm.py"
        file.parent.mkdir()
        file.write_text(NORM.format(groups=groups, std=std))
        for registry in (rp.NORMALIZATIONS, rp.INITIALIZATIONS):
            registry._things.pop("mine", None)
            registry._things.pop("small", None)
        rp.load_plugin(str(file))
        for options in ({"norm": "mine"}, {"init": "small"}, {}):
            keys.append(configure("cifar/resnet-8", "digits", RECIPE, **options).key)
    assert len(set(keys)) == 7


class Counting(rp.Probe):
    """Counts the iterations at which it measures, times a factor."""

    name = "counting"

    def __init__(self, factor=1, schedule=None):
        super().__init__()
        self.factor, self.seen = factor, 0
        if schedule is not None:
            self.schedule = schedule

    def after_backward(self, network, iteration):
        self.seen += 1

    def table(self):
        import pandas

        return pandas.DataFrame({"count": [self.factor * self.seen]})

    def state(self):
        return self.seen

    def load_state(self, state):
        self.seen = state


def counted(folder, *given, **named) -> int:
    probe = Counting(*given, **named)
    run = rp.train("cifar/resnet-8", "digits", RECIPE, runs=folder, probes=[probe], device="cpu", progress=False)
    return run.tables["counting"]["count"].item()


def test_a_probe_with_other_settings_measures_anew(tmp_path):
    assert counted(tmp_path) == 4
    assert counted(tmp_path, 2) == 8
    assert counted(tmp_path, schedule=rp.probes.every(2)) == 2
    assert counted(tmp_path, schedule=rp.probes.at([0, 1, 3])) == 3
    assert counted(tmp_path, schedule=rp.probes.at([0])) == 1


def test_a_probe_that_is_made_again_finds_its_table(tmp_path, monkeypatch):
    assert counted(tmp_path, 3, schedule=rp.probes.at([1, 0])) == 6
    monkeypatch.setattr("resprobe.runs._KeptTraining", None)  # not called
    assert counted(tmp_path, 3, schedule=rp.probes.at([0, 1])) == 6
    with pytest.raises(TypeError):
        counted(tmp_path, 4)


def test_a_finished_run_keeps_its_history_while_it_is_trained_anew(tmp_path):
    def train(**settings):
        recipe = rp.recipes.digits_quick(iterations=8)
        return rp.train("cifar/resnet-8", "digits", recipe, runs=tmp_path, device="cpu", **settings)

    def stop(news):
        if news.iteration == 3:
            raise KeyboardInterrupt

    whole = train(progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(probes=[Counting()], progress=stop)
    found = train(progress=False)
    assert found.history["iteration"].tolist() == whole.history["iteration"].tolist()
    assert found.metrics == whole.metrics
    (whole.path / "history.csv").write_text((whole.path / "history.csv").read_text().rpartition("\n8,")[0] + "\n")
    with pytest.warns(UserWarning, match="is damaged .its history ends early.; the run is made again"):
        assert len(train(progress=False).history) == len(whole.history)


def test_what_is_handed_over_is_evaluated_as_it_was_trained(tmp_path):
    import dataclasses

    recipe = dataclasses.replace(RECIPE, normalization="channel-mean-std")
    for _ in range(2):  # trained, then found
        run = rp.train(made(), "digits", recipe, runs=tmp_path, device="cpu", precision="fp32", progress=False)
        assert rp.evaluate(run.network, "digits", device="cpu").error == pytest.approx(run.metrics["test_error"])
    mine = made()
    mine.normalization = nn.Identity()  # a part of the network that is called so
    rp.train(mine, "digits", recipe, device="cpu", progress=False)
    assert isinstance(mine.normalization, nn.Identity)


def test_line_ends_are_no_part_of_a_source(tmp_path):
    from resprobe.digests import files_digest

    for folder, ends in ("here", b"\n"), ("there", b"\r\n"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_bytes(ends.join([b"import helper", b"x = 1", b""]))
        (tmp_path / folder / "helper.py").write_bytes(ends.join([b"y = 2", b""]))
    one, other = (files_digest("mine", tmp_path / folder / "mine.py") for folder in ("here", "there"))
    assert one == other
