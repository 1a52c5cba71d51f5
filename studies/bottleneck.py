"""Bottlenecks: deeper for as many multiply-adds, as long as their shortcuts are identities; plain, they degrade too.

Claims C12 and C23 (§4.1, "Deeper Bottleneck Architectures" and footnote 4; Fig. 5, Table 3).

    python -m studies.bottleneck                                    # embedded digits, minutes on two cores
    python -m studies.bottleneck --repeats 31                       # a closer look at time
    python -m studies.bottleneck --preset paper --data cifar10      # the paper's recipe, for a GPU

The paper puts a bottleneck of three layers in the place of each basic block of two, which turns 34 layers into 50. A basic
64-d block (73,728 weights) and a bottleneck 256-d block (69,632) are said to cost about the same time; with a projection in
the place of the identity time and size are said to double (65,536 weights more, × 1.94). Footnote 4 says that plain nets of
bottlenecks degrade too; no number is printed. On CIFAR-10 the paper uses basic
blocks alone: bottleneck networks of 9n+2 layers (20, 56) beside basic ones of 6n+2 layers with as many blocks (14, 38) are
an analogue of ours, with option B as the paper's 50 layers have.

Blocks are measured as Fig. 5 has them, at 56×56 pixels, and untrained networks at the 32×32 of §4.2, in the precision of the
trainings; on a CPU with one thread, as trainings side by side have. A training step is a forward and a backward pass,
without the update of the weights. Memory is what the forward pass keeps for the backward pass, counted tensor by tensor and
hence exact. Candidates take turns, so that what slows the machine slows all of them; a ratio is taken round by round.

What would refute the claims stands with them below.

Measured (2026-11-21, two idle cores of an AMD EPYC, torch 2.15.0, bf16; record in docs/measurements/):
- quick, digits, n = 3: training error of plain bottleneck networks 0.02 ± 0.03 % at 20 and 66.32 ± 8.89 % at 56 layers, of
  residual ones 0.00 ± 0.00 and 0.49 ± 0.59 %. C23 holds;
- a projection in the place of the block's identity, 9 rounds: weights × 1.94, memory kept × 1.25, training step × 1.88
  (1.74–2.30). C12 holds. The bottleneck block by the basic one: weights × 0.94, but memory kept × 3.16 and training step
  × 1.42 (1.30–1.59): like multiply-adds are not like time here;
- the paper preset: not tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import resprobe as rp
from resprobe.claims import LEVEL, one_depth
from resprobe.tables import error_columns

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import pandas
    from matplotlib.axes import Axes
    from torch import Tensor, nn

WIDTH, PIXELS, IMAGES = 64, 56, 4
"""Width and pixels of the blocks that are measured, which are Fig. 5's at their place in Table 1 (conv2_x); images at a time."""
NETWORK_PIXELS, NETWORK_IMAGES = 32, 8
PASSES = 3
"""Passes timed in each round. The fastest counts: other work on a machine can only slow a pass."""
DOUBLED = 1.5
"""A block counts as doubled from this many times the weights and multiply-adds on, as in the study of complexity. The paper's
block comes to 1.94 in both."""
SLOWER = 10.0
"""Percent of time from which on a block counts as slower. Fixed before any run."""
COSTS = {
    "weights": "weights",
    "macs": "multiply-adds",
    "kept_mib": "memory kept",
    "forward_ms": "forward pass",
    "step_ms": "training step",
}
"""Columns of the measurements: convolution weights, multiply-adds for one image, MiB, milliseconds."""
PAPER = {"basic": "24.52 (34 layers)", "bottleneck": "22.85 (50 layers)"}
"""Top-1 error on ImageNet by 10-crop, option B, Table 3."""

PROJECTIONS_DOUBLE = rp.Claim(
    id="C12",
    statement="A projection in the place of its identity would double a bottleneck block",
    section="§4.1, Fig. 5",
    paper="basic 64-d and bottleneck 256-d similar in time complexity; time and size doubled by a projection",
    falsifier="with a projection the block has less than 1.5 times the weights or multiply-adds, or its training step takes "
    "less than 10 % longer",
)
PLAIN_BOTTLENECKS_DEGRADE = rp.Claim(
    id="C23",
    statement="Plain networks of bottlenecks degrade too",
    section="§4.1, footnote 4",
    paper="observed, no number is printed (footnote 4)",
    falsifier="the deepest plain bottleneck network's training error is not above the shallowest's, over seeds",
)


@dataclass(frozen=True)
class Options(rp.Options):
    """Depths are those of the bottleneck networks; each has its basic one with as many blocks."""

    block: str = "bottleneck"
    """block to set beside the basic one: bottleneck, or one that a plugin registers"""
    shortcut: str = "B"
    """shortcuts of the residual networks: A, B, or one that a plugin registers; C is measured beside it"""
    repeats: int = 9
    """rounds of timing"""


def plan(options: Options) -> list[rp.Planned]:
    """Plain and residual bottleneck networks, and the residual basic network with as many blocks."""
    if options.block == "basic":
        raise rp.UsageError("block (='basic') is what the other is compared with; accepted: bottleneck, or a plugin's")
    rp.check_whole("repeats", options.repeats, 2, ", to have a spread")
    planned = []
    for depth in options.depths:
        plain, shortcut = {"block": options.block}, {"shortcut": options.shortcut}
        labels, basic = {"block": options.block, "depth": depth}, _basic_depth(options, depth)
        planned += [
            rp.Planned(labels | {"kind": "plain"}, f"cifar/plain-{depth}", plain),
            rp.Planned(labels | {"kind": "residual"}, f"cifar/resnet-{depth}", plain | shortcut),
            rp.Planned(
                {"block": "basic", "depth": basic, "kind": "residual"},
                f"cifar/resnet-{basic}",
                {"block": "basic"} | shortcut,
            ),
        ]
    return planned


def _basic_depth(options: Options, depth: int) -> int:
    """Depth of the basic network with as many blocks: 34 layers to 50, 38 to 56."""
    per_stage = max(1, (depth - 2) // rp.networks.depth_step(options.block))
    return per_stage * rp.networks.depth_step("basic") + 2


# -- time and memory -------------------------------------------------------------------------------------------------


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a candidate and round. `depth`: the bottleneck network's, 0 for single blocks; `role`: basic, bottleneck, or
    projection (a bottleneck with option C); `candidate`, its name; `images` at a time; the columns of `COSTS`."""
    import pandas

    with rp.cpu_threads(1):
        candidates = [_prepare(*candidate, results) for candidate in _candidates(results.options)]
        return pandas.DataFrame(
            labels | {"round": number, "forward_ms": passes.time(passes.forward), "step_ms": passes.time(passes.step)}
            for number in range(results.options.repeats)
            for labels, passes in candidates
        )


def _prepare(labels: dict, module: nn.Module, shape: tuple[int, ...], results: rp.Results) -> tuple[dict, _Passes]:
    """Adds to the labels what is counted. Each kind of pass is done once, which prepares kernels."""
    import torch

    from plugins import flops
    from resprobe.devices import memory_format, place

    device = torch.device(results.device)
    place(module, device)
    images = torch.randn(shape, device=device).contiguous(memory_format=memory_format(device))
    if labels["depth"] == 0:  # within a network a block is given activations, and passes the gradient on
        images = images.to(torch.bfloat16 if results.precision == "bf16" else torch.float32).requires_grad_()
    passes = _Passes(module, images, results.precision)
    passes.forward()
    counted = {
        "images": shape[0],
        "weights": sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 4),
        "macs": int(flops.total(module, shape[1:])["macs"]),
        "kept_mib": passes.kept() / 2**20,
    }
    return labels | counted, passes


def _candidates(options: Options) -> Iterator[tuple[dict, nn.Module, tuple[int, ...]]]:
    """Labels, module, and the shape of its input: blocks as in Fig. 5, then networks of like cost."""
    channels = WIDTH * rp.BLOCKS[options.block].expansion
    blocks = {
        "basic": ("basic", WIDTH, "B"),  # B is the identity where the shape stays
        "bottleneck": (options.block, channels, "B"),
        "projection": (options.block, channels, "C"),
    }
    for role, (block, width, shortcut) in blocks.items():
        name = f"{block} {width}-d, {'identity' if shortcut == 'B' else 'projection'}"
        module = rp.BLOCKS[block](width, WIDTH, shortcut=shortcut)
        yield {"depth": 0, "role": role, "candidate": name}, module, (IMAGES, width, PIXELS, PIXELS)
    for depth in sorted(options.depths):
        networks = {
            "basic": ("basic", _basic_depth(options, depth), options.shortcut),
            "bottleneck": (options.block, depth, options.shortcut),
            "projection": (options.block, depth, "C"),
        }
        for role, (block, layers, shortcut) in networks.items():
            labels = {"depth": depth, "role": role, "candidate": f"{block}-{layers}, {shortcut}"}
            module = rp.build(f"cifar/resnet-{layers}", block=block, shortcut=shortcut)
            yield labels, module, (NETWORK_IMAGES, 3, NETWORK_PIXELS, NETWORK_PIXELS)


@dataclass(frozen=True)
class _Passes:
    """Passes of a module over the same images, in the precision of the trainings."""

    module: nn.Module
    images: Tensor
    precision: str

    @cached_property
    def subsampling(self) -> AbstractContextManager:
        """Puts right the convolutions whose gradients a CPU gets wrong, as in a training."""
        from resprobe.layers import safe_subsampling

        return safe_subsampling(self.module, self.images.device)

    def __call__(self) -> Tensor:
        import torch

        with torch.autocast(self.images.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.module(self.images)

    def forward(self) -> None:
        """A pass as at test time."""
        import torch

        self.module.eval()
        with torch.inference_mode():
            self()

    def step(self) -> None:
        """A forward and a backward pass, as in training."""
        import torch

        self.module.train()
        with self.subsampling:
            out = self()
            out.backward(torch.ones_like(out))
        self.module.zero_grad(set_to_none=True)
        self.images.grad = None

    def kept(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, parameters apart."""
        from resprobe.memory import kept_for_backward

        return kept_for_backward(self.step, self.module.parameters())

    def time(self, work: Callable[[], None]) -> float:
        """Milliseconds of the fastest of a few passes."""
        from resprobe.devices import fastest

        return 1000 * fastest(work, self.images.device, PASSES)


def _ratios(results: rp.Results, role: str, by: str, depth: int = 0) -> pandas.DataFrame:
    """What a candidate costs by another's cost, round by round."""
    rows = results.measurements[results.measurements["depth"] == depth].set_index("round")
    return rows.loc[rows["role"] == role, list(COSTS)] / rows.loc[rows["role"] == by, list(COSTS)]


def _said(ratios: pandas.DataFrame) -> str:
    """Ratios in words: what was counted, and median (least–largest) of what was timed."""
    return ", ".join(f"{name} × {_figure(ratios[column], 2)}" for column, name in COSTS.items())


def _figure(rounds: pandas.Series, digits: int) -> str:
    if rounds.nunique() == 1:  # counted: the same in every round
        return f"{rounds.iloc[0]:,.{digits}f}"
    return f"{rounds.median():,.{digits}f} ({rounds.min():,.{digits}f}–{rounds.max():,.{digits}f})"


# -- verdicts --------------------------------------------------------------------------------------------------------


def judge(results: rp.Results) -> list[rp.Verdict]:
    return [_judge_cost(results), _judge_degradation(results)]


def _judge_cost(results: rp.Results) -> rp.Verdict:
    """Both halves of the falsifier: weights and multiply-adds, which are counted, and time, which has a spread."""
    block, projected = _ratios(results, "bottleneck", by="basic"), _ratios(results, "projection", by="bottleneck")
    rounds = (100 * (projected["step_ms"] - 1)).tolist()
    slower = rp.compare(rounds, 0.0, margin=SLOWER, unit="%")
    # Counted: the same in every round.
    doubled = projected[["weights", "macs"]].iloc[0].min() >= DOUBLED
    evidence = [
        f"training step of the block, in % longer with a projection: {slower.difference:+.0f}, one-sided 95 % limits "
        f"{slower.lower:+.0f} and {slower.upper:+.0f}, n = {len(rounds)} rounds (above {SLOWER:.0f} is needed)",
        f"the bottleneck block by the basic one: {_said(block)}",
    ]
    for depth in sorted(results.options.depths):
        basic = _basic_depth(results.options, depth)
        errors = [results.values("test_error", kind="residual", **labels) for labels in _pair(results.options, depth)]
        evidence += [
            f"{results.options.block}-{depth} by basic-{basic}: {_said(_ratios(results, 'bottleneck', 'basic', depth))}",
            f"its projections everywhere (C): {_said(_ratios(results, 'projection', 'bottleneck', depth))}",
            f"test error, basic-{basic} less {results.options.block}-{depth}: {rp.compare(*errors)}",
        ]
    return rp.Verdict(
        PROJECTIONS_DOUBLE,
        rp.all_of([slower.exceeds, "holds" if doubled else "fails"]),
        f"a projection in the place of the block's identity: {_said(projected)}",
        "; ".join(evidence),
    )


def _pair(options: Options, depth: int) -> tuple[dict, dict]:
    """Labels of the networks of like cost: the basic one, the bottleneck one."""
    return {"block": "basic", "depth": _basic_depth(options, depth)}, {"block": options.block, "depth": depth}


def _judge_degradation(results: rp.Results) -> rp.Verdict:
    options = results.options
    shallow, deep = min(options.depths), max(options.depths)
    if shallow == deep:
        return one_depth(PLAIN_BOTTLENECKS_DEGRADE)[0]

    def rise(kind: str, column: str) -> rp.Comparison:
        return rp.compare(
            *(results.values(column, block=options.block, kind=kind, depth=depth) for depth in (deep, shallow))
        )

    path = " → ".join(
        rp.mean_std(results.values("train_error", block=options.block, kind="plain", depth=depth))
        for depth in sorted(options.depths)
    )
    trained = [
        results.values("train_error", block=options.block, kind="plain", depth=depth) for depth in (shallow, deep)
    ]
    verdict = rp.Verdict(
        PLAIN_BOTTLENECKS_DEGRADE,
        rise("plain", "train_error").verdict,
        f"training error of plain networks {path} % at {', '.join(map(str, sorted(options.depths)))} layers",
        f"training error, plain-{deep} against plain-{shallow}: {rise('plain', 'train_error')}. "
        f"Test error: {rise('plain', 'test_error')}. Training error of the residual ones: {rise('residual', 'train_error')}",
    )
    return rp.if_learned(verdict, *trained, opposite=rise("plain", "train_error").reversed)


# -- figures and table -----------------------------------------------------------------------------------------------


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    options, on = results.options, results.options.data_name
    table = results.table[results.table["block"] == options.block]
    means = table.groupby(["kind", "depth"])["train_error"].mean()
    said = ", ".join(f"{kind} {depth} layers {error:.1f} %" for (kind, depth), error in means.items())
    drawings = {
        "figure": rp.Drawing(
            rp.figures.errors_against_depth(table),
            f"Error after the last iteration against depth on {on}, networks of {options.block} blocks: mean ± std over "
            "seeds, a dot for each run.",
            f"Mean final training error: {said}.",
        )
    }
    deep = max(options.depths)
    figure, panels = rp.figures.new_figure(2, width=6.6)
    for axis, depth, title in (
        (panels[0], 0, f"one block, {PIXELS}×{PIXELS} pixels"),
        (panels[1], deep, f"a network, {NETWORK_PIXELS}×{NETWORK_PIXELS} pixels"),
    ):
        _draw_costs(axis, results, depth)
        axis.set_title(title)
    panels[0].set_ylabel("times the basic one's cost")
    panels[0].set_ylim(0, 1.3 * panels[0].get_ylim()[1])  # of both: room for the key above the bars
    drawings["figure-cost"] = rp.Drawing(
        figure,
        f"Cost of {options.block} blocks by that of the basic ones they replace: single blocks as in Fig. 5 (left), and "
        f"whole networks with as many blocks (right); {IMAGES} and {NETWORK_IMAGES} images at a time. Times: median over "
        f"{options.repeats} rounds, with the least and the largest.",
        f"A block by the basic one: {_said(_ratios(results, 'bottleneck', 'basic'))}. With a projection: "
        f"{_said(_ratios(results, 'projection', 'basic'))}.",
    )
    return drawings


def _draw_costs(axis: Axes, results: rp.Results, depth: int) -> None:
    import pandas

    rows = results.measurements[results.measurements["depth"] == depth]
    names = dict(zip(rows["role"], rows["candidate"], strict=True))
    palette = rp.figures.colours(list(names))
    for (role, name), shift, hatch in zip(names.items(), (-0.27, 0.0, 0.27), ("", "//", "xx"), strict=True):
        ratios = _ratios(results, role, "basic", depth)
        middle = ratios.median()
        places = pandas.Series(range(len(COSTS)), list(COSTS)) + shift
        axis.bar(places, middle, 0.25, color=palette[role], hatch=hatch, edgecolor="white", label=name)
        spread = ratios.max() > ratios.min()  # what was counted has none
        reach = [(middle - ratios.min())[spread], (ratios.max() - middle)[spread]]
        whiskers = {"ls": "", "color": "0.2", "capsize": 3, "lw": 1.2}
        axis.errorbar(places[spread], middle[spread], yerr=reach, **whiskers)
    axis.set_xticks(range(len(COSTS)), [name.replace(" ", "\n", 1) for name in COSTS.values()])
    axis.legend(frameon=False, loc="upper left")


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a block, then one a network: those that are measured, and the plain ones."""
    import pandas

    options = results.options
    rows = []
    for (depth, role, name), costs in results.measurements.groupby(["depth", "role", "candidate"], sort=False):
        row = {
            "what": name,
            "weights": f"{costs['weights'].iloc[0]:,}",
            "multiply-adds": f"{costs['macs'].iloc[0]:,}",
            "memory kept (MiB)": f"{costs['kept_mib'].iloc[0]:,.1f}",
            "training step (ms)": _figure(costs["step_ms"], 1),
        }
        if depth and role != "projection":
            labels = _pair(options, depth)[role == "bottleneck"]
            row |= error_columns(results, kind="residual", **labels)
            row["paper, ImageNet (%)"] = PAPER.get(labels["block"], "–")
        rows.append(row)
    for depth in sorted(options.depths):
        own = error_columns(results, kind="plain", block=options.block, depth=depth)
        rows.append({"what": f"{options.block}-{depth}, plain", "paper, ImageNet (%)": "not printed"} | own)
    return pandas.DataFrame(rows).fillna("–")


_QUICK = Options(preset="quick", data="digits", depths=(20, 56), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="bottleneck",
    title="Bottlenecks need identity shortcuts",
    description=(
        "Measures time and memory of basic and bottleneck blocks, and trains bottleneck networks, plain and residual, beside "
        "basic ones of like cost (claims C12 and C23; §4.1, Fig. 5)."
    ),
    claims=(PROJECTIONS_DOUBLE, PLAIN_BOTTLENECKS_DEGRADE),
    presets=rp.cifar_presets(_QUICK, depths=(20, 56, 110), repeats=31),
    plan=plan,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    leaves_open=rp.lacks_depths,
    rules=(
        f"C12 needs no seeds. Weights and multiply-adds are counted, and must grow at least {DOUBLED}-fold. The training step "
        f"must take more than {SLOWER:.0f} % longer (one-sided t-test over rounds, level {LEVEL}). C12 fails if a count falls "
        f"short, or {SLOWER:.0f} % are excluded."
    ),
)

if __name__ == "__main__":
    raise SystemExit(study.main())
