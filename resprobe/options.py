"""What a study can be asked: options with their defaults, from a command line or from Python, and what is wrong with them in one
line. Imports nothing that takes time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from resprobe.errors import UsageError, not_accepted, plain, short


@dataclass(frozen=True)
class Options:
    """What every study can be asked. A study's presets are instances; what is not given is the preset's."""

    BUILT_OF = ("block", "shortcut")  # without a type, or it would be an option itself
    """Names of the options that say what the networks are built of."""

    preset: Literal["quick", "paper"] = "quick"
    """quick: minutes on a laptop, on embedded data. paper: the paper's recipe."""
    data: str = "digits"
    """data set: digits, digits-64, cifar10, cifar100, or NAME:PATH to read a local copy; folder:PATH for class folders"""
    depths: tuple[int, ...] = (20, 56)
    """depths in weighted layers, as the paper counts them"""
    block: str = "basic"
    """block of the networks: basic, bottleneck, single, or one that a plugin registers"""
    shortcut: str = "A"
    """shortcuts of the residual networks: A, A-centred, B, C, or one that a plugin registers (highway)"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one run for each; verdicts rest on the spread over them"""
    iterations: int = 64_000
    """training iterations (mini-batches); the whole schedule is scaled, and printed as a departure"""
    recipe: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """change fields of the training recipe, such as bn_batch=64 learning_rate=0.05; printed as departures"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the processor computes in it, else fp32; weights stay in fp32"""
    recompute: bool = False
    """compute activations again in the backward pass instead of keeping them: same numbers, less memory, more time"""
    step: Literal["auto", "eager", "graph", "compile", "compile-blocks"] = "auto"
    """how a training step runs. eager: operation by operation; graph: as one captured CUDA graph; compile, compile-blocks: by
    torch.compile, the whole network or block by block. auto: graph on CUDA, else eager"""
    deterministic: bool = False
    """the same last digits each time on the same machine, also on a GPU"""
    concurrency: str = "auto"
    """how many runs train at the same time. auto: one per core on a CPU (one in all if they are short), one on a GPU"""
    executor: Literal["local", "ray"] = "local"
    """where runs are trained: on this machine, or on the nodes of a Ray cluster, which share the folder of runs"""
    address: str = ""
    """address of the Ray cluster, HOST:PORT; by default RAY_ADDRESS, else the cluster on this machine, else a new one of it"""
    plugin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE|MODULE")] = ()
    """plugin to load first: a file (my_block.py) or a module (package.module)"""
    probe: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """watch every training with this probe: gradient-norms, layer-responses, flops, or one of a plugin; its table is written
    beside the report"""
    dry_run: bool = False
    """only say what would be trained, how much of it is there, and how long the rest would take"""
    out: str = ""
    """folder for the report, figures and tables; by default results/STUDY"""
    runs: str = "runs"
    """folder in which finished runs are kept and found again"""

    @property
    def data_name(self) -> str:
        """The data set's name, without the place of a copy."""
        return self.data.partition(":")[0]

    def measured(self) -> dict[str, Any]:
        """The options on which it depends what is measured. Where a copy of CIFAR lies is no matter; a folder may hold any."""
        found = {name: value for name, value in vars(self).items() if name not in _NOT_THE_SETTING}
        return found | ({"data": self.data_name} if self.data_name in ("cifar10", "cifar100") else {})


def cifar_presets(quick: Options, **paper: Any) -> dict[str, Options]:
    """The presets of a study of CIFAR networks: `quick`, and the same in the paper's setting, 64,000 iterations on CIFAR-10
    (§4.2). `paper`: further options that differ there, such as depths."""
    return {
        "quick": quick,
        "paper": dataclasses.replace(quick, preset="paper", data="cifar10", iterations=64_000, **paper),
    }


def lacks_depths(options: Options) -> list[str]:
    """What a claim that compares depths lacks, if there is but one: `Study.leaves_open` of such a study."""
    one = f"one depth only (--depths {options.depths[0]}), and two are needed to compare"
    return [one] if len(options.depths) == 1 else []


# What does not change what is measured: where it is computed and where it is put. See `Options.measured`.
_NOT_THE_SETTING = {
    "preset",
    "device",
    "precision",
    "recompute",
    "step",
    "deterministic",
    "concurrency",
    "executor",
    "address",
    "dry_run",
    "plugin",
    "probe",
    "out",
    "runs",
}


def of_their_kinds(options: Options) -> Options:
    """Options as given in Python, each of its kind: lists for tuples, numpy's numbers and paths are taken for what they say.
    Raises `UsageError` for what is of another kind."""
    hints, found = get_type_hints(type(options)), {}
    for option in dataclasses.fields(options):
        value, hint = getattr(options, option.name), hints[option.name]
        kind = get_origin(hint) or hint
        if kind is Literal:
            if not (isinstance(value, str) and value in get_args(hint)):
                raise not_accepted(option.name, value, get_args(hint))
            found[option.name] = value
        elif kind is tuple:
            found[option.name] = _several(option, value, get_args(hint)[0])
        else:
            found[option.name] = _plain(value, kind)
            if not _is_of(found[option.name], kind):
                raise UsageError(
                    f"{option.name} (={short(value)}) must be {_KINDS[kind][0]}, such as {option.default!r}"
                )
    return dataclasses.replace(options, **found)


_KINDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("True or False", ""),
}


def _several(option: dataclasses.Field, value: Any, kind: type) -> tuple:
    """The values of an option that takes several."""
    value = plain(value)
    ordered = isinstance(value, Iterable) and not isinstance(value, str | bytes | set | frozenset | dict)
    values = tuple(_plain(each, kind) for each in value) if ordered else (value,)
    if ordered and all(_is_of(each, kind) for each in values):
        return values
    example = option.default or (values if _is_of(values[0], kind) else ())
    aside = f", such as {example!r}" if example else ""
    raise UsageError(f"{option.name} (={short(value)}) must be a tuple of {_KINDS[kind][1]}{aside}")


def _plain(value: Any, kind: type) -> Any:
    """A number of numpy's as Python's, and a path as its text."""
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    return plain(value)


def _is_of(value: Any, kind: type) -> bool:
    return type(value) in ((int, float) if kind is float else (kind,))


# -- the command line ------------------------------------------------------------------------------------------------


def offered(options: type[Options]) -> list[str]:
    """Names of the options that a command line takes: those that the study does not put away."""
    hints = get_type_hints(options, include_extras=True)
    return [name for name, hint in hints.items() if tyro.conf.Suppress not in get_args(hint)]


def preset_in(arguments: Sequence[str]) -> str:
    """The preset is needed before the rest, since it holds the defaults that `--help` shows."""
    preset = "quick"
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == "--preset":
            preset = following
        elif argument.startswith("--preset="):
            preset = argument.partition("=")[2]
    return preset


def as_argument(value: object) -> str:
    """The value of an option as it is given on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def arguments_of(options: Options, usual: Options) -> list[str]:
    """The command line that asks for `options`, as given in Python. `usual`: those of their preset."""
    asked = ["--preset", options.preset] if options.preset != "quick" else []
    told = get_type_hints(type(options), include_extras=True)
    for name, value in vars(options).items():
        if name == "preset" or value == getattr(usual, name):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, tuple):
            one_by_one = tyro.conf.UseAppendAction in get_args(told[name])
            asked += [word for each in value for word in (flag, str(each))] if one_by_one else [flag, *map(str, value)]
        elif isinstance(value, bool):
            asked.append(flag if value else f"--no-{flag[2:]}")
        else:
            asked += [flag, str(value)]
    return asked


def parse_options(defaults: Options, arguments: Sequence[str], *, called: str, description: str) -> Options:
    """The options of a command line; those that are not given are the defaults'. `called`: how the command is. Raises
    `UsageError` in one line."""
    said = io.StringIO()
    try:
        # Its errors are boxes of several lines; what is in them is said in one.
        with contextlib.redirect_stderr(said):
            options = tyro.cli(
                type(defaults),
                prog=called,
                description=description,
                default=defaults,
                args=list(arguments),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(said.getvalue(), defaults)) from None
    _check_repeated(type(defaults), arguments)
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if argument.startswith("--") and following.startswith("--"):
            name = argument[2:].replace("-", "_")
            if getattr(defaults, name, None) == getattr(options, name, None) == ():  # else it would count as not given
                raise UsageError(f"{argument} needs a value after it, or several")
    return options


def _check_repeated(kind: type[Options], arguments: Sequence[str]) -> None:
    """Raises `UsageError` for an option that is given twice, of which the first would be lost."""
    hints, told = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    given = Counter(
        argument.partition("=")[0][2:].replace("-", "_") for argument in arguments if argument.startswith("--")
    )
    for name, times in given.items():
        if times > 1 and tyro.conf.UseAppendAction not in get_args(told.get(name)):
            several = ", with all its values" if get_origin(hints.get(name)) is tuple else ""
            raise UsageError(f"--{name.replace('_', '-')} is given {times} times; accepted: once{several}")


def _one_line(box: str, defaults: Options) -> str:
    """What a box says of an error: value, what is accepted, nearest name."""
    lines = [line.strip(" │").strip() for line in box.splitlines()]
    paragraphs = " ".join("\n" if set(line) <= set("─╭╮╰╯- ") else line for line in lines[1:]).split("\n")
    text = next((paragraph.strip() for paragraph in paragraphs if paragraph.strip()), "unusable arguments")
    if unknown := re.search(r"^Unrecognized options: (\S+?),?(?: |$)", text):
        known = [f"--{name.replace('_', '-')}" for name in offered(type(defaults))]
        return str(not_accepted("option", unknown.group(1), known))
    if choice := re.search(r"invalid choice '(.*?)' for argument '(--\S+)'. Expected one of \((.*?)\)", text):
        return str(not_accepted(choice.group(2), choice.group(1), re.findall(r"'(.*?)'", choice.group(3))))
    if unreadable := re.search(r"^Error parsing (--\S+): .*?(\[?'[^']*'(?:, '[^']*')*\]?)$", text):
        option, value = unreadable.groups()
        accepted = re.search(rf"{option} (.*?)(?:  |$|\n)", "\n".join(lines))
        kind = {"INT": "a whole number", "[INT [INT ...]]": "whole numbers with spaces between them"}
        wanted = accepted.group(1).strip() if accepted else "another value"
        return f"{option} (={value.strip('[]')}) cannot be read; accepted: {kind.get(wanted, wanted)}"
    return text
