"""Names for things: found, missed, refused, forgotten, and told apart by their source."""

import functools
import hashlib
import importlib
import linecache
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import resprobe as rp
from resprobe.digests import sources_of, typed_in
from resprobe.registry import Registry
from resprobe.typed import told


def apple():
    return "apple"


def banana():
    return "banana"


@pytest.fixture
def fruits() -> Registry:
    registry = Registry("fruit")
    registry.register("banana")(banana)
    registry.register("apple")(apple)
    return registry


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stranger's importable module, `strange_fruit.py`."""
    (tmp_path / "strange_fruit.py").write_text("def cherry():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strange_fruit", raising=False)
    yield importlib.import_module("strange_fruit")
    sys.modules.pop("strange_fruit", None)


def test_registered_things_are_found_under_their_names_in_alphabetical_order(fruits):
    assert fruits["apple"] is apple
    assert fruits.names() == ("apple", "banana")
    assert "banana" in fruits
    assert "cherry" not in fruits


def test_decorator_returns_what_it_decorates(fruits):
    assert fruits.register("apple")(apple) is apple


YOURS = "one of yours comes with --plugin FILE, or rp.load_plugin(FILE)"


def test_unknown_name_gets_the_nearest_one(fruits):
    with pytest.raises(rp.UsageError) as error:
        fruits["Aple"]
    assert str(error.value) == "fruit (='Aple') is unknown; accepted: apple, banana; nearest: apple"


def test_no_name_is_suggested_when_none_comes_close(fruits):
    with pytest.raises(rp.UsageError) as error:
        fruits["zzz"]
    assert str(error.value) == f"fruit (='zzz') is unknown; accepted: apple, banana; {YOURS}"


def test_empty_registry_says_so():
    with pytest.raises(rp.UsageError) as error:
        Registry("fruit")["apple"]
    assert str(error.value) == f"fruit (='apple') is unknown; accepted: none are registered; {YOURS}"


def test_second_thing_under_a_name_is_refused_and_the_first_stays(fruits):
    with pytest.raises(rp.UsageError) as error:
        fruits.register("apple")(banana)
    assert str(error.value) == f"fruit (='apple') is already registered by {__name__}.apple; choose another name"
    assert fruits["apple"] is apple


@pytest.mark.parametrize("name", ["", "two words", "tab\t", None, 3, "_hidden", "a|b", "$x^2$", "a,b"])
def test_unusable_names_are_refused(fruits, name):
    with pytest.raises(rp.UsageError) as error:
        fruits.register(name)
    assert (
        str(error.value)
        == f"fruit name (={name!r}) must begin with a letter or digit, and be of letters, digits and _ . / + -"
    )


def test_reimport_of_the_same_definition_is_tolerated(fruits, strange):
    fruits.register("cherry")(strange.cherry)
    first = strange.cherry
    again = importlib.reload(strange).cherry
    assert again is not first
    fruits.register("cherry")(again)
    assert fruits["cherry"] is again


def test_what_is_typed_in_again_takes_the_place_of_what_was(fruits):
    """As a notebook's cell that is run twice, edited or not: a class, whose source Python cannot find, and a function."""
    for text in ("class Cherry: size = {}", "def Cherry(): return {}"):
        found = []
        for number in (1, 1, 2):
            space = {"__name__": "typed"}
            exec(text.format(number), space)
            fruits.register("cherry")(space["Cherry"])
            assert fruits["cherry"] is space["Cherry"]
            found.append(fruits.fingerprint("cherry"))
        assert found[0] == found[1] != found[2]
    with pytest.raises(rp.UsageError, match=r"already registered by typed\.Cherry; choose another name"):
        fruits.register("cherry")(apple)


def test_what_was_typed_in_is_what_its_helpers_are_now(fruits):
    space = {"__name__": "typed"}
    exec("def cherry(): return stone()\ndef stone(): return 1", space)
    fruits.register("cherry")(space["cherry"])
    before = fruits.fingerprint("cherry")
    exec("def stone(): return 2", space)  # another cell
    assert fruits.fingerprint("cherry") != before


def test_cells_are_kept_as_they_are_typed(fruits):
    """A notebook puts its cells where tracebacks find their lines."""
    cells = {"<cell 1>": "def stone(): return 1\n", "<cell 2>": "class Cherry:\n    def f(self): return stone()\n"}
    space = {"__name__": "typed"}
    for name, text in cells.items():
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), space)
    fruits.register("cherry")(space["Cherry"])
    kept = sources_of(fruits.fingerprint("cherry"))
    assert sorted(kept) == ["typed-1.py", "typed-2.py"] and set(kept.values()) == {
        text.encode() for text in cells.values()
    }


def test_a_registry_shows_its_names(fruits):
    assert repr(fruits) == "<fruit: apple, banana>"


def test_equal_qualified_name_from_another_file_is_refused(fruits, strange, tmp_path):
    fruits.register("cherry")(strange.cherry)
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text("def cherry():\n    return 2\n")
    other = rp.load_plugin(str(elsewhere))
    other.cherry.__module__ = "strange_fruit"
    with pytest.raises(rp.UsageError, match="is already registered by strange_fruit.cherry"):
        fruits.register("cherry")(other.cherry)


def test_temporary_name_is_gone_after_the_block(fruits):
    with fruits.temporary("cherry", apple) as thing:
        assert thing is fruits["cherry"] is apple
    assert "cherry" not in fruits


def test_temporary_name_is_gone_after_an_exception(fruits):
    with pytest.raises(RuntimeError, match="inside"), fruits.temporary("cherry", apple):
        raise RuntimeError("inside")
    assert "cherry" not in fruits


def test_temporary_does_not_replace_another_thing(fruits):
    with pytest.raises(rp.UsageError, match="already registered"), fruits.temporary("apple", banana):
        pass
    assert fruits["apple"] is apple


def test_temporary_leaves_what_was_there_before(fruits):
    with fruits.temporary("apple", apple):
        pass
    assert fruits["apple"] is apple


def test_what_is_told_of_a_temporary_name_goes_with_it(fruits):
    with fruits.temporary("green-apple", apple, about="green"):
        assert fruits.about("green-apple") == "green"
    assert "green-apple" not in fruits


def test_what_is_told_of_a_name_is_that_names_alone(fruits):
    fruits.register("red-apple", about="red")(apple)
    fruits.register("green-apple", about="green")(apple)
    assert [fruits.about(name) for name in ("red-apple", "green-apple", "apple")] == ["red", "green", None]
    with pytest.raises(rp.UsageError, match="fruit"):
        fruits.about("pear")


def test_one_function_may_make_two_families(clean_registries):
    class Made:
        def family(self, depth, *, size=None):
            return torch.nn.Linear(size or 1, depth)

    rp.register_network("by-depth", defaults=lambda depth: {"size": depth + 1})(Made().family)
    rp.register_network("fixed")(Made().family)
    assert rp.build("by-depth-3").body.in_features == 4
    assert rp.networks.resolve("fixed-3").get("size") is None


def test_own_things_have_no_fingerprint():
    assert rp.BLOCKS.fingerprint("basic") is None
    assert rp.SHORTCUTS.fingerprint("A") is None
    assert rp.NETWORKS.fingerprint("cifar/resnet") is None


def test_fingerprint_of_a_strangers_thing_is_its_files_digest(fruits, strange, tmp_path):
    fruits.register("cherry")(strange.cherry)
    file = tmp_path / "strange_fruit.py"
    before = fruits.fingerprint("cherry")
    assert before == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text() + "\n# edited\n")
    assert fruits.fingerprint("cherry") == before, "what is loaded is what it was"
    fruits.register("cherry")(importlib.reload(strange).cherry)
    assert fruits.fingerprint("cherry") == hashlib.sha256(file.read_bytes()).hexdigest() != before


def test_fingerprint_looks_through_decorators(fruits, strange, tmp_path):
    file = tmp_path / "strange_fruit.py"
    fruits.register("cherry")(torch.no_grad()(strange.cherry))
    assert fruits.fingerprint("cherry") == hashlib.sha256(file.read_bytes()).hexdigest()
    fruits.register("lime")(
        functools.wraps(strange.cherry)(lambda: 3)
    )  # what wraps it counts too, if it is a stranger's
    before = fruits.fingerprint("lime")
    assert before not in (fruits.fingerprint("cherry"), None)
    file.write_text(file.read_text() + "# edited\n")
    fruits.register("lime")(functools.wraps(importlib.reload(strange).cherry)(lambda: 3))
    assert fruits.fingerprint("lime") not in (before, None)
    fruits.register("plum")(functools.wraps(rp.networks.cifar_resnet)(lambda depth: 3))
    assert fruits.fingerprint("plum") == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def test_what_is_no_function_is_what_it_is_made_of(fruits, strange):
    """A partial, or an object that can be called: the same in every process, and in a file where that is."""
    for number in (1, 1, 2):
        for made in (functools.partial(strange.cherry, number), SimpleNamespace(value=strange.cherry, number=number)):
            name = f"{type(made).__name__}-{number}"
            assert "0x" not in told(made)[0] and not typed_in(made)
            fruits._things.pop(name, None)
            fruits.register(name)(made)
    found = [fruits.fingerprint(name) for name in ("partial-1", "partial-2", "SimpleNamespace-1", "SimpleNamespace-2")]
    assert len({*found, None}) == 5


def test_fingerprint_of_something_without_a_file_is_what_it_does(fruits):
    def typed_in(number: int):
        namespace = {"__name__": "notebook"}
        exec(f"def typed_in(): return {number}", namespace)
        return namespace["typed_in"]

    for name, number in (("one", 1), ("again", 1), ("two", 2)):
        fruits.register(name)(typed_in(number))
    assert fruits.fingerprint("one") == fruits.fingerprint("again") != fruits.fingerprint("two")


def test_fingerprint_of_an_unknown_name_is_refused(fruits):
    with pytest.raises(rp.UsageError, match="nearest: apple"):
        fruits.fingerprint("appel")


def test_a_registry_is_a_collection_of_names(fruits):
    assert list(fruits) == list(fruits.names())
    assert len(fruits) == len(fruits.names())
