"""Block comparison: does a block err less than another, or than several, and what does it cost? Beyond the paper.

Claim R3 is ours. The other studies ask of each claim whether it holds for a block; here blocks stand beside each other in one
verdict.

    python -m studies.block_comparison                                            # bottleneck beside basic, digits
    python -m studies.block_comparison --plugin my_block.py --block my-block      # yours beside the paper's
    python -m studies.block_comparison --block my-block --against bottleneck --shortcut B --plugin my_block.py
    python -m studies.block_comparison --plugin halved.py --block basic:halved --against basic:A basic:B   # shortcuts
    python -m studies.block_comparison --plugin my_block.py --block my-block --against basic without-norm no-last-relu
    python -m studies.block_comparison --plugin my_block.py --block my-block --match macs       # for as much work
    python -m studies.block_comparison --preset paper --data cifar10 --plugin my_block.py --block my-block

Residual networks of all these blocks are trained at the same depths, in weighted layers as the paper counts them, from the
same seeds and by the same recipe. Depths must be ones that all of them can make up: two layers a block have 6n+2, three have
9n+2, both have 20, 38, 56, 110. A name may say a shortcut too, behind a colon: so shortcuts stand beside each other.

The verdict rests on test errors of the deepest networks. Equal depth is not equal cost: parameters and multiply-adds stand
beside the errors, with the operators that multiply-adds leave out of one block alone, and one figure has the errors over
multiply-adds. With `--match macs` or `parameters` networks are as wide, in whole filters, as brings their multiply-adds (of
one 32×32 image) or parameters nearest to those of the paper's width of the block it is set against, of several the first.
The claim holds if it holds against each. What would refute it: that the block errs less by half a point or more than each is
excluded, over seeds.

Measured (2026-11-27, two cores of an AMD EPYC, torch 2.14.1, bf16; record in docs/measurements/):
- quick, digits, bottleneck against basic, n = 3: test error at 56 layers 4.72 ± 1.21 against 2.22 ± 0.28 %, for 0.63 of the
  multiply-adds. R3 fails;
- the same for as many multiply-adds (2026-11-28), bottlenecks of 20 filters: 6.02 ± 1.85 against 2.22 ± 0.28 %. R3 fails;
- an ablation (2026-11-28): basic blocks without the ReLU after the addition 2.04 ± 0.42 %, beside basic ones, 2.22 ± 0.28 %, and
  such with their second normalization after the addition, 14.26 ± 8.81 %. R3 is inconclusive;
- the paper preset: not tested.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import resprobe as rp
from resprobe.claims import NO_GAIN_LEFT
from resprobe.tables import error_columns, network_name

if TYPE_CHECKING:
    import pandas

COSTS = {"parameters": "parameters", "macs": "multiply-adds", "activations": "activations"}
"""Columns of the measurements."""

ERRS_LESS = rp.Claim(
    id="R3",
    statement="Residual networks of one block err less than those of another, at the same depth",
    section="ours",
    paper="not in the paper, whose Table 3 has basic blocks beside bottlenecks at like cost",
    falsifier="at the greatest depth, an advantage of 0.5 points or more in test error is excluded, over seeds",
    beyond=True,
)
MATCHED = {"depth": "", "macs": ", for as many multiply-adds", "parameters": ", of as many parameters"}
"""What `--match` adds to the claim."""


@dataclass(frozen=True)
class Options(rp.Options):
    """A block, and those that it is set against."""

    BUILT_OF = ("block", "against", "shortcut")

    block: str = "bottleneck"
    """the block to test: bottleneck, single, or one that a plugin registers; BLOCK:SHORTCUT for a shortcut of its own"""
    against: tuple[str, ...] = ("basic",)
    """the block, or blocks, to compare it with"""
    match: Literal["depth", "macs", "parameters"] = "depth"
    """depth: compare at equal depth. macs, parameters: also choose widths at which networks cost as much as the first of
    --against"""


def plan(options: Options) -> list[rp.Planned]:
    """Residual networks of all blocks at every depth."""
    if not options.against:
        raise rp.UsageError("against (='') must name a block, or several")
    for block in options.against:
        if block == options.block:
            free = ", ".join(name for name in rp.BLOCKS.names() if name not in options.against)
            raise rp.UsageError(
                f"block (={block!r}) is the one it is set against; accepted: {free}, or a plugin's; or another --against"
            )
        if options.against.count(block) > 1:
            raise rp.UsageError(f"against (={' '.join(options.against)!r}) must name each block once")
    blocks = _blocks(options)
    step = rp.networks.depth_step(*(_built_of(block, options)["block"] for block in blocks))
    for depth in options.depths:
        if depth < step + 2 or (depth - 2) % step:
            common = ", ".join(str(step * n + 2) for n in range(1, 6))
            which = f"{'both' if len(blocks) == 2 else 'all of'} {', '.join(blocks[:-1])} and {blocks[-1]}"
            raise rp.UsageError(f"depths (={depth}) must be {step}n+2, which {which} can make up: {common}, …")
    planned = []
    for depth in options.depths:
        for block in blocks:
            name, chosen = f"cifar/resnet-{depth}", _built_of(block, options)
            width = rp.networks.resolve(name)["width"]
            if options.match != "depth" and block != options.against[0]:
                width = _matched_width(options, block, name, width)
            planned.append(
                rp.Planned({"block": block, "depth": depth, "width": width}, name, chosen | {"width": width})
            )
    return planned


def _matched_width(options: Options, block: str, name: str, usual: int) -> int:
    """The width at which the block's network costs about as much as the network that is matched has at its usual width."""
    from plugins import flops

    def cost(block: str, width: int) -> int:
        return int(flops.of_named(name, (3, 32, 32), **_built_of(block, options), width=width)[options.match])

    def nearest_to(width: float) -> Iterator[tuple[int, int]]:
        """Widths and costs, the nearest width first. A block may not have every width, with channels in groups say."""
        for other in sorted(range(1, 4 * usual + 1), key=lambda other: abs(other - width)):
            with contextlib.suppress(rp.UsageError):
                yield other, cost(block, other)

    wanted, estimate = cost(options.against[0], usual), float(usual)
    for _ in range(3):  # a cost grows about as the square of the width
        if (found := next(nearest_to(estimate), None)) is None:
            return usual  # what is wrong with it is said when all networks are built, before any is trained
        width, known = found
        estimate = width * math.sqrt(wanted / known)
    about = dict(itertools.islice(nearest_to(estimate), 3))
    return min(about, key=lambda width: abs(about[width] - wanted))


def _blocks(options: Options) -> tuple[str, ...]:
    """The block in question, and those that it is set against."""
    return options.block, *options.against


def _built_of(block: str, options: Options) -> dict[str, str]:
    """The options of a network of this block, whose name may say its shortcut."""
    name, _, shortcut = block.partition(":")
    return {"block": name, "shortcut": shortcut or options.shortcut}


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a network: `block`, `depth`, and what it costs for one image of the data: the columns of `COSTS`, and
    `uncounted`, the operators that `macs` leaves out."""
    from plugins import flops

    return flops.of_study(results, "block", "depth")


def judge(results: rp.Results) -> list[rp.Verdict]:
    options, deep = results.options, max(results.options.depths)
    lower = {other: _compare(results, "test_error", other, deep) for other in options.against}
    evidence = [line for other, found in lower.items() for line in _evidence(results, other, found)]
    words = {other: found.gain()[0] for other, found in lower.items()}
    errors = ", ".join(
        f"{block}{_filters(results, block, deep)} {_error(results, 'test_error', block, deep)} %"
        + (f" ({words[block]})" if block in words and len(words) > 1 else "")
        for block in _blocks(options)
    )
    statement = ERRS_LESS.statement + MATCHED[options.match]
    if len(options.against) > 1:
        statement = statement.replace("another", "each of several others")
    claim = dataclasses.replace(ERRS_LESS, statement=statement)
    verdict = rp.Verdict(
        claim, rp.all_of(words.values()), f"test error at {deep} layers: {errors}", "\n".join(evidence)
    )
    trained = [results.values("train_error", block=block, depth=deep) for block in _blocks(options)]
    return [rp.if_learned(verdict, *trained, opposite=any(found.reversed for found in lower.values()))]


def _evidence(results: rp.Results, other: str, lower: rp.Comparison) -> Iterator[str]:
    """What is told of the block beside another. `lower` compares their test errors at the greatest depth."""
    ours, (*shallower, deep) = results.options.block, sorted(results.options.depths)
    yield f"test error, {other} less {ours}: {lower}"
    word, reason = lower.gain()
    if reason:
        yield reason
    elif word == "fails":  # p is that of an advantage, and says neither
        excluded = f"that {ours} errs by 0.5 points less than {other} is excluded"
        yield f"{ours} certainly errs more than {other}" if lower.reversed else excluded
    yield f"training error, {other} less {ours}: {_compare(results, 'train_error', other, deep)}"
    costs = ", ".join(
        f"{name} × {_cost(results, column, ours, deep) / _cost(results, column, other, deep):.2f}"
        for column, name in COSTS.items()
    )
    yield f"{ours} by {other}: {costs}{_left_out(results, other, deep)}"
    for depth in shallower:
        yield f"test error at {depth} layers, {other} less {ours}: {_compare(results, 'test_error', other, depth)}"


def _filters(results: rp.Results, block: str, depth: int) -> str:
    """How wide a network is, where widths differ."""
    if results.options.match == "depth":
        return ""
    (width,) = set(results.values("width", block=block, depth=depth))
    return f" ({width} filters)"


def _left_out(results: rp.Results, other: str, depth: int) -> str:
    """Operators of one block alone that its multiply-adds do not count, which may be most of what it does."""
    pair = results.options.block, other
    operators = {block: set(_cost(results, "uncounted", block, depth).split()) for block in pair}
    said = ""
    for block, beside in itertools.permutations(pair):
        if alone := sorted(operators[block] - operators[beside]):
            said += f" (multiply-adds leave out of {block}: {', '.join(alone)})"
    return said


def _compare(results: rp.Results, column: str, other: str, depth: int) -> rp.Comparison:
    """Whether the other block's error is above that of the block in question."""
    ours, theirs = (results.values(column, block=block, depth=depth) for block in (results.options.block, other))
    return rp.compare(theirs, ours)


def _above(results: rp.Results, block: str, depth: int) -> str:
    """How far another block's test error is above that of the block in question, with the limits, and what that says."""
    if block == results.options.block:
        return "–"
    found = _compare(results, "test_error", block, depth)
    limits = f" ({found.lower:+.2f} to {found.upper:+.2f})" if found.seeds > 1 else ""
    return f"{found.difference:+.2f}{limits}: {found.gain()[0]}"


def _error(results: rp.Results, column: str, block: str, depth: int) -> str:
    return rp.mean_std(results.values(column, block=block, depth=depth))


def _cost(results: rp.Results, column: str, block: str, depth: int) -> Any:
    """A column of the measurements for one network."""
    return results.measurements.set_index(["block", "depth"])[column][block, depth]


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    options, on, deep = results.options, results.options.data_name, max(results.options.depths)
    table = results.table.merge(results.measurements[["block", "depth", "macs"]], on=["block", "depth"])
    blocks = (*options.against, options.block)  # what it is set against looks the same, whatever the block in question
    table = table.sort_values("block", key=lambda names: names.map(blocks.index), kind="stable")
    figure, (over_depth, over_cost) = rp.figures.new_figure(2)
    rp.figures.error_against_depth(over_depth, table, "test_error", by="block")
    over_depth.set_title("over depth")
    over_depth.set_ylabel("test error (%)")
    rp.figures.error_against_cost(over_cost, table, "test_error", by="block")
    over_cost.set_title("over what it costs")
    means = table.groupby(["block", "depth", "macs"], sort=False)["test_error"].mean()
    said = ", ".join(
        f"{block} {depth} layers, {macs / 1e6:.1f} million multiply-adds: {error:.2f} %"
        for (block, depth, macs), error in means.items()
    )
    drawings = {
        "figure": rp.Drawing(
            figure,
            f"Final test error on {on} of residual networks by block, over depth (left) and over multiply-adds (right): "
            "mean ± std over seeds, a dot for each run.",
            f"Mean final test error: {said}.",
        )
    }
    histories = results.histories[results.histories["depth"] == deep]
    top = rp.figures.error_limit(histories)
    ends = ", ".join(f"{block} {_error(results, 'train_error', block, deep)} %" for block in _blocks(options))
    drawings["figure-curves"] = rp.Drawing(
        rp.figures.curves_apart(histories, "block", top=top, order=blocks),
        f"Training of the {deep}-layer networks on {on}: training error (left) and test error (right); "
        f"{results.over_seeds(band=True)}. Along the training, tests are with running statistics of batch normalization, which "
        "the final figures' need not be.",
        f"Error over iterations by block. Final training error: {ends}.",
    )
    return drawings


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a network; the paper prints no number to put beside them."""
    import pandas

    return pandas.DataFrame(
        {
            "network": f"{network_name('residual', depth)}, {block}{_filters(results, block, depth)}",
            **{title: f"{_cost(results, column, block, depth):,}" for column, title in COSTS.items()},
            **error_columns(results, block=block, depth=depth),
            f"test error above {results.options.block}'s (points)": _above(results, block, depth),
            "seeds": len(results.values("seed", block=block, depth=depth)),
        }
        for depth in sorted(results.options.depths)
        for block in _blocks(results.options)
    )


_QUICK = Options(preset="quick", data="digits", depths=(20, 56), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="block_comparison",
    title="Beyond the paper: a block beside another",
    description=(
        "Trains residual networks of two blocks or more at the same depths, and compares their errors and what they cost "
        "(claim R3, which is ours and not the paper's)."
    ),
    claims=(ERRS_LESS,),
    presets=rp.cifar_presets(_QUICK, depths=(20, 56, 110)),
    plan=plan,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    rules=f"{NO_GAIN_LEFT} Beside several blocks the claim holds if it holds against each, and fails if it fails against one.",
)

if __name__ == "__main__":
    raise SystemExit(study.main())
