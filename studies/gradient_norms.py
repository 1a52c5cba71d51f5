"""Gradient norms: do deep plain networks fail because gradients vanish, or in spite of healthy ones?

Claim C6 (§4.1); C6b is ours.

    python -m studies.gradient_norms                             # embedded digits, minutes on two cores
    python -m studies.gradient_norms --depth 56                  # 110 is the default, at initialization only
    python -m studies.gradient_norms --preset paper --data cifar10

§4.1: in plain networks with batch normalization forward signals keep a variance and gradients have healthy norms, so that
neither vanishes. No numbers are printed. Two problems are to be told apart: gradients that vanish or explode, and
degradation without either.

What is compared is the ratio of the gradients of the loss for the first and for the last block's output, root mean squares
over the images of a mini-batch in training mode, in decades (log10). It is 0 where gradients arrive as they set out,
below 0 where they vanish on their way back, above 0 where they explode. Gradients of weights are measured and tabulated
too, but their ratio cannot tell: without normalization a layer's weight gradient is the product of the signal from before
and the gradient from behind, so that both ends of a network in which all has vanished have the same norm of almost zero.

Looked at are networks at initialization (with and without batch normalization, from He's and from a naive initialization:
normal, std 0.01) and after training, in float64 since float32 ends at 1e-38; and networks along their training, as they
train, at ten readings in every power of ten of iterations. What a verdict says of training rests on the median of the
readings. The lowest (for C6b the highest) is stated beside it: it tells of single mini-batches, and goes further the more
often one looks. What would refute the claims stands with them below.

Measured (2026-11-27, two cores of an Intel Xeon, torch 2.14.1, training in bf16; n = 3, ± std; record in
docs/measurements/2026-11-27-gradient-norms-quick/), decades:
- at initialization plain-20/56/110 1.06 ± 0.03, 3.33 ± 0.13, 6.78 ± 0.24; their residual twins 0.53 ± 0.03, 0.99 ± 0.08,
  1.30 ± 0.09; the control, plain without batch normalization from small weights, −16.10 ± 0.12, −52.31 ± 0.20, −106.75 ± 0.36;
- along training plain-20/56, median 0.55 ± 0.06, −0.90 ± 0.64, lowest 0.12 ± 0.13, −5.09 ± 3.05, at 0.02 ± 0.03 and
  79.65 ± 12.57 % training error. C6 holds; by the lowest single reading it would be inconclusive. C6b fails, at
  initialization;
- the paper preset: not tested.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import resprobe as rp
from resprobe.claims import one_depth
from resprobe.tables import network_name

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from torch import Tensor, nn

LIMIT = 3.0
"""Decades of change with depth that count as vanishing or exploding (a thousandfold), fixed before any run; and decades below
1 at which a forward signal counts as none."""
LOWEST = -20.0
"""Decades at which figures end below."""
BELOW_FLOAT64, BELOW_FLOAT32 = 1e-300, 1e-14
"""What a gradient of 0 is taken for. float32 ends at 1e-38, and where squares are summed up in it, as on MPS, at numbers of
1e-19: over the two million responses of a CIFAR-10 mini-batch a root mean square of 2e-15."""
PROBE = "gradient-norms"
CONDITIONS = {
    ("batch", "he"): "BN, He",
    ("batch", "small-normal"): "BN, small normal",
    ("none", "he"): "no BN, He",
    ("none", "small-normal"): "no BN, small normal",
}
"""Normalization and initialization. The first is the paper's, the last the control in which gradients must vanish."""
PAPERS, CONTROL = ("batch", "he"), ("none", "small-normal")
NETWORK = ["kind", "depth", "norm", "init"]

DO_NOT_VANISH = rp.Claim(
    id="C6",
    statement="In plain networks with batch normalization neither forward signals nor gradients vanish",
    section="§4.1",
    paper="forward signals have non-zero variances, gradients healthy norms (plain-34 on ImageNet; no numbers)",
    falsifier="a forward signal without variance; or, from the shallowest to the deepest plain network, the ratio of "
    "the first to the last block's gradient falls by a factor of 1,000 or more, at initialization or in the median along "
    "training",
)
DO_NOT_EXPLODE = rp.Claim(
    id="C6b",
    statement="In plain networks with batch normalization gradients do not explode with depth either",
    section="§4.1, of healthy norms",
    paper="healthy norms (plain-34 on ImageNet; no numbers); that gradients explode is not spoken of",
    falsifier="from the shallowest to the deepest plain network, the ratio of the first to the last block's gradient rises by "
    "a factor of 1,000 or more, at initialization or in the median along training",
    beyond=True,
)


@dataclass(frozen=True)
class Options(rp.Options):
    """The depths of networks to train, and one more depth to look at before training."""

    depth: int = 110
    """depth of one more plain and one more residual network, measured at initialization only"""


def plan(options: Options) -> list[rp.Planned]:
    """Networks as the paper's at every depth, and the control at the shallowest: there, batch normalization alone decides."""
    # What is looked at beside the trained ones is said not to be there before training too.
    rp.networks.check_family(rp.networks.resolve(f"cifar/plain-{options.depth}", block=options.block))
    shallow = min(options.depths)
    networks = [(kind, depth, *PAPERS) for depth in options.depths for kind in ("plain", "residual")]
    return [
        rp.Planned(dict(zip(NETWORK, one, strict=True)), *_network(options, *one), probes=(PROBE,))
        for one in (*networks, ("plain", shallow, *CONTROL))
    ]


def _network(options: Options, kind: str, depth: int, norm: str, init: str) -> tuple[str, dict[str, str]]:
    """Name and options of a network."""
    chosen = {"block": options.block, "norm": norm, "init": init}
    if kind == "plain":
        return f"cifar/plain-{depth}", chosen
    return f"cifar/resnet-{depth}", chosen | {"shortcut": options.shortcut}


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a layer and one a block (`part`), network, seed and `moment` (initialization, or trained).

    Labels and `moment`, `part`, `layer`, `position` (in the forward pass, from 1); of a layer `forward_std`, the standard
    deviation of its responses, `gradient_norm` ‖∇W‖ and `gradient_to_weight` ‖∇W‖/‖W‖; of a block `output_gradient_rms`.
    """
    import pandas
    import torch

    options, data = results.options, rp.load_data(results.options.data)
    # All networks are looked at as they are trained, those at initialization too.
    recipe, normalize = results.runs[0].config.recipe, results.runs[0].network.normalization
    device = torch.device("cpu" if results.device.startswith("mps") else results.device)  # MPS has no float64
    rows = []

    def look(network: nn.Module, seed: int, **labels: object) -> None:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        batch, classes = next(iter(data.train.select(order[: recipe.batch_size]).views(recipe.batch_size)))
        network = network.to(device, torch.float64).train()
        table = _one_pass(network, normalize(batch).to(device, torch.float64), classes.to(device))
        rows.append(table.assign(**labels, seed=seed))

    depths = sorted({*options.depths, options.depth})
    fit = {"in_channels": data.in_channels, "num_classes": data.num_classes}
    for kind, depth, condition, seed in itertools.product(("plain", "residual"), depths, CONDITIONS, options.seeds):
        labels = _labels(kind, depth, condition)
        name, chosen = _network(options, **labels)
        with rp.seeded(seed):  # as a training begins
            network = rp.build(name, **chosen, **fit)
        look(network, seed, **labels, moment="initialization")
    for row, run in zip(results.table.itertuples(), results.runs, strict=True):
        trained = copy.deepcopy(run.network)  # the run's own stays as it is
        look(trained, row.seed, **{name: getattr(row, name) for name in NETWORK}, moment="trained")
    return pandas.concat(rows, ignore_index=True)


def _one_pass(network: nn.Module, images: Tensor, labels: Tensor) -> pandas.DataFrame:
    """Forward signals and gradients of every layer and block for one mini-batch."""
    import pandas
    from torch.nn import functional as F

    with rp.attach(network, "layer-responses", PROBE) as (responses, gradients):
        F.cross_entropy(network(images), labels).backward()
    forward, backward = responses.table(), gradients.table()
    layers = forward[forward["kind"] != "shortcut"].sort_values("position")[["layer", "std"]]
    layers = layers.rename(columns={"std": "forward_std"}).assign(part="layer", position=range(1, len(layers) + 1))
    layers = layers.merge(backward[["layer", "gradient_norm", "gradient_to_weight"]], on="layer")
    blocks = backward[backward["kind"] == "block"].sort_values("position")
    blocks = blocks[["layer", "position", "output_gradient_rms"]].assign(part="block")
    return pandas.concat([layers, blocks], ignore_index=True)


def ratios(results: rp.Results) -> pandas.DataFrame:
    """One row a network, seed and reading: `decades` of the first to the last block's gradient; `at_most` if that is a bound.

    `moment`: "initialization" and "trained" from `measure`, "training" from the probe at its iterations (from 0).
    """
    import pandas

    rows = []
    blocks = results.measurements[results.measurements["part"] == "block"]
    for key, group in blocks.groupby([*NETWORK, "seed", "moment"], sort=False):
        rows.append((*key, math.nan, *_decades(group, BELOW_FLOAT64)))
    for row, run in zip(results.table.itertuples(), results.runs, strict=True):
        table = run.tables[PROBE]
        for iteration, group in table[table["kind"] == "block"].groupby("iteration"):
            labels = (row.kind, row.depth, row.norm, row.init, row.seed, "training")
            rows.append((*labels, iteration, *_decades(group, BELOW_FLOAT32)))
    return pandas.DataFrame(rows, columns=[*NETWORK, "seed", "moment", "iteration", "decades", "at_most"])


def _decades(blocks: pandas.DataFrame, below: float) -> tuple[float, bool]:
    """log10 of the first to the last block's gradient, and whether that is a bound, `below` standing for 0.

    NaN if no gradient sets out, as when every image is fitted.
    """
    gradients = blocks.sort_values("position")["output_gradient_rms"]
    first, last = float(gradients.iloc[0]), float(gradients.iloc[-1])
    return (math.log10((first or below) / last), first == 0) if last else (math.nan, False)


def _labels(kind: str, depth: int, condition: tuple[str, str]) -> dict[str, object]:
    return dict(zip(NETWORK, (kind, depth, *condition), strict=True))


def _rows(table: pandas.DataFrame, **labels: object) -> pandas.DataFrame:
    return table[(table[list(labels)] == list(labels.values())).all(axis=1)]


def _over_seeds(readings: pandas.DataFrame, reduce: str = "median") -> list[float]:
    """One value a seed: the median, the lowest ("min") or the highest ("max") of its readings."""
    return readings.groupby("seed")["decades"].agg(reduce).dropna().tolist()


def _bounded(readings: pandas.DataFrame, reduce: str = "median") -> bool:
    """Whether one of the values `_over_seeds` would be lower if bounds among the readings were."""
    bounds = readings["decades"].where(readings["at_most"]).groupby(readings["seed"]).max()
    place = {"min": 0.0, "median": 0.5, "max": 1.0}[reduce]  # of two in the middle either counts
    return bool((bounds >= readings.groupby("seed")["decades"].quantile(place, interpolation="lower")).any())


def _stated(readings: pandas.DataFrame, reduce: str = "median") -> str:
    """Mean ± std over seeds; ≤ where no gradient arrives at the first block of one, so that it is a bound."""
    return ("≤ " if _bounded(readings, reduce) else "") + rp.mean_std(_over_seeds(readings, reduce))


def judge(results: rp.Results) -> list[rp.Verdict]:
    table, options = ratios(results), results.options
    depths, trained = sorted({*options.depths, options.depth}), sorted(options.depths)
    if len(depths) == 1:
        return one_depth(DO_NOT_VANISH, DO_NOT_EXPLODE)

    def readings(moment: str, depth: int, condition: tuple[str, str]) -> pandas.DataFrame:
        return _rows(table, moment=moment, **_labels("plain", depth, condition))

    def path(moment: str, over: list[int], reduce: str = "median", condition: tuple[str, str] = PAPERS) -> str:
        means = (_stated(readings(moment, depth, condition), reduce) for depth in over)
        return " → ".join(means) + f" at {', '.join(map(str, over))} layers"

    def change(
        test: Callable[..., rp.Comparison],
        moment: str,
        over: list[int],
        reduce: str = "median",
        condition: tuple[str, str] = PAPERS,
    ) -> tuple[str, str]:
        """Whether the ratio stays within bounds with depth, and what was found."""
        shallow, deep = (readings(moment, depth, condition) for depth in (over[0], over[-1]))
        if _bounded(shallow, reduce):
            return "inconclusive", f"no gradient arrives at the first block of plain-{over[0]}, to compare with"
        found = test(_over_seeds(shallow, reduce), _over_seeds(deep, reduce))
        return found.verdict, str(found)

    verdicts = []
    for claim, test, extreme, which in (
        (DO_NOT_VANISH, _stays_above, "min", "lowest"),
        (DO_NOT_EXPLODE, _stays_below, "max", "highest"),
    ):
        word, found = change(test, "initialization", depths)
        words = [word]
        said = [f"plain-{depths[-1]} {BOUNDS[test]} plain-{depths[0]} at initialization: {found}"]
        if len(trained) > 1:
            word, found = change(test, "training", trained)
            words.append(word)
            said.append(f"plain-{trained[-1]} {BOUNDS[test]} plain-{trained[0]} along training, median: {found}")
            word, found = change(test, "training", trained, extreme)
            said.append(f"by the {which} single reading instead, along training: {word} ({found})")
        else:
            words.append("not tested")
            said.append("along training one depth only, so that was not tested")
        if claim is DO_NOT_VANISH:
            vanishes = change(_stays_above, "initialization", depths, "median", CONTROL)[0] == "fails"
            smallest = _smallest_forward_std(results)
            signal = rp.compare(
                [math.log10(max(std, BELOW_FLOAT64)) for std in smallest], -LIMIT, margin=0.0, unit="decades"
            )
            words += ["holds" if vanishes else "inconclusive", signal.verdict]
            said.append(
                f"control, {CONDITIONS[CONTROL]}: {path('initialization', depths, 'median', CONTROL)} at initialization, "
                + (
                    "which vanishes as it must"
                    if vanishes
                    else "of which vanishing cannot be said, so the test shows nothing"
                )
            )
            said.append(
                f"smallest standard deviation of a layer's responses: {min(smallest):.2g}; over seeds against a thousandth, "
                f"{signal}"
            )
        measured = (
            f"first to last block's gradient in decades: at initialization {path('initialization', depths)}; along training, "
            f"median {path('training', trained, 'median')}, {which} single reading {path('training', trained, extreme)}"
        )
        verdicts.append(rp.Verdict(claim, rp.all_of(words), measured, "; ".join(said)))
    return verdicts


def _stays_above(shallow: list[float], deep: list[float]) -> rp.Comparison:
    return rp.compare(deep, [decades - LIMIT for decades in shallow], margin=0.0, unit="decades")


def _stays_below(shallow: list[float], deep: list[float]) -> rp.Comparison:
    return rp.compare([decades + LIMIT for decades in shallow], deep, margin=0.0, unit="decades")


BOUNDS = {_stays_above: "above a thousandth of", _stays_below: "below a thousand times"}


def _smallest_forward_std(results: rp.Results) -> list[float]:
    """The smallest standard deviation of a layer's responses in the paper's plain networks, at initialization or after training.
    One value a seed."""
    ours = _rows(results.measurements, kind="plain", norm=PAPERS[0], init=PAPERS[1])
    return ours.groupby("seed")["forward_std"].min().tolist()


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    return {
        "figure-problem-one": _problem_one(results, "plain"),
        "figure-problem-one-residual": _problem_one(results, "residual"),
        "figure-problem-two": _problem_two(results),
    }


def _problem_one(results: rp.Results, kind: str) -> rp.Drawing:
    """Forward signals and gradients along the deepest network at initialization, with and without normalization."""
    from matplotlib.ticker import MaxNLocator

    table = results.measurements
    deep = table["depth"].max()
    table = _rows(table, kind=kind, depth=deep, moment="initialization")
    palette = rp.figures.colours(list(CONDITIONS))
    figure, panels = rp.figures.new_figure(2, height=4.6, share_y=False)
    said = []
    for (norm, init), name in CONDITIONS.items():
        rows = _rows(table, norm=norm, init=init)
        # The broad lines show beside the narrow ones where the two fall together, as they do with BN.
        style = {
            "color": palette[norm, init],
            "ls": "-" if norm == "batch" else (0, (4, 2)),
            "lw": 3.0 if init == "he" else 1.4,
        }
        forward = _by_position(rows, "forward_std")
        backward = _by_position(rows, "output_gradient_rms")
        backward = backward - backward.iloc[-1]
        for axis, curves in zip(panels, (forward, backward), strict=True):
            _line(axis, curves, label=name, **style)
        said.append(
            f"{name}: forward std {_power(forward.iloc[-1].mean())} in the last layer, gradient {_power(backward.iloc[0].mean())}"
        )
    panels[0].set_title("forward: std of responses")
    panels[0].set_xlabel("layer, in order")
    panels[1].set_title("backward: gradient, relative to the last block's")
    panels[1].set_xlabel("block, in order")
    panels[1].axhspan(-LIMIT, LIMIT, color="0.93", zorder=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    for axis in panels:
        _decades_axis(axis)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    name = network_name(kind, deep)
    on = results.options.data_name
    return rp.Drawing(
        figure,
        f"Problem one, {name} on {on} at initialization: standard deviation of each layer's responses (left), and gradient "
        "of the loss for each block's output relative to the last block's (right); gradients travel from right to left. Grey: a "
        f"thousandth to a thousand times. Mean over seeds; lines are cut off below 10^{LOWEST:.0f}. "
        + "; ".join(said)
        + ".",
        f"Forward signals and gradients along {name}. " + "; ".join(said) + ".",
    )


def _problem_two(results: rp.Results) -> rp.Drawing:
    """Along training: the ratio of gradients beside the training error."""
    table, options = ratios(results), results.options
    training = table[table["moment"] == "training"]
    extremes = sorted({min(options.depths), max(options.depths)})
    palette = rp.figures.colours(extremes)
    figure, (left, right) = rp.figures.new_figure(2, height=4.6, share_y=False)
    said = []
    networks = [*itertools.product(("plain", "residual"), extremes, [PAPERS]), ("plain", extremes[0], CONTROL)]
    for kind, depth, condition in networks:
        labels = _labels(kind, depth, condition)
        decades, errors = (
            _rows(frame, **labels).pivot(index="iteration", columns="seed", values=value)
            for frame, value in ((training, "decades"), (results.histories, "train_error"))
        )
        name = network_name(kind, depth)
        style = {"color": palette[depth], "ls": (0, (4, 2)) if kind == "plain" else "-"}
        if condition == CONTROL:
            name, style = f"{name}, {CONDITIONS[CONTROL]}", {"color": "0.25", "ls": ":"}
        # A mean with a bound in it is a bound: a line through it would show a gradient that comes back.
        bound = _rows(training, **labels).groupby("iteration")["at_most"].any()
        decades = decades.set_axis(decades.index + 1)
        _line(left, decades[~bound.to_numpy()], label=name, **style)
        if bound.any():
            left.plot(decades[bound.to_numpy()].mean(axis=1), color=style["color"], marker="v", mfc="none", ms=4, ls="")
        _line(right, errors, label=name, **style)
        middle, error = rp.mean_std(decades.median().tolist()), rp.mean_std(results.values("train_error", **labels))
        said.append(f"{name}: median {middle} decades, final training error {error} %")
    left.set_title("first to last block's gradient")
    right.set_title("training error (%)")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("iteration")
    left.axhspan(-LIMIT, LIMIT, color="0.93", zorder=0)
    _decades_axis(left)
    right.set_ylim(0, 100)
    right.set_xlim(left.get_xlim())
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    over = results.over_seeds(band=True)
    return rp.Drawing(
        figure,
        f"Problem two, on {options.data_name}: ratio of the gradients for the first and the last block's output "
        "(left; grey: a thousandth to a thousand times) and running training error (right) over iterations. Where gradients "
        "arrive and the error stays high, vanishing is not the cause. Dashed: plain, solid: residual, dotted: the control "
        f"without batch normalization; ▽: at most there, since the first block's gradient comes to 0 in float32; {over}.",
        "Gradients and training error over iterations. " + "; ".join(said) + ".",
    )


def _by_position(rows: pandas.DataFrame, figure: str) -> pandas.DataFrame:
    """log10 of a figure: one row a position, one column a seed."""
    rows = rows[rows[figure].notna()]
    return rows.pivot(index="position", columns="seed", values=figure).clip(lower=1e-300).map(math.log10)


def _line(axis: Axes, curves: pandas.DataFrame, **style: object) -> None:
    """Mean over the columns, which are seeds, with a band of a standard deviation."""
    seeds = curves.melt(ignore_index=False)["value"]
    rp.figures.mean_and_band(axis, seeds, seeds.index, **({"lw": 1.8} | style))


def _decades_axis(axis: Axes) -> None:
    """Ticks at whole decades; what vanishes leaves the axis, or it would squash everything else."""
    from matplotlib.ticker import MaxNLocator

    highest = max(float(max(line.get_ydata(), default=LOWEST)) for line in axis.lines)
    axis.set_ylim(max(LOWEST, axis.get_ylim()[0]), max(highest, LIMIT) + 1)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axis.yaxis.set_major_formatter(lambda value, _: f"$10^{{{value:.0f}}}$")


def _power(decades: float) -> str:
    return f"10^{round(decades, 1) + 0.0:.1f}"  # + 0.0: never "-0.0"


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a network; the paper prints no numbers to put beside."""
    import pandas

    table, rows = ratios(results), []
    for (kind, depth, *condition), layers in results.measurements.groupby(NETWORK, sort=False):
        labels = _labels(kind, depth, tuple(condition))
        start = _rows(layers, moment="initialization")
        norms = _rows(start, part="layer").sort_values("position").groupby("seed")["gradient_norm"]
        training = _rows(table, moment="training", **labels)
        errors = results.values("train_error", **labels)
        rows.append(
            {
                "network": network_name(kind, depth),
                "condition": CONDITIONS[tuple(condition)],
                "smallest forward std": f"{start['forward_std'].min():.2g}",
                "‖∇W‖, first; last layer": f"{norms.first().mean():.2g}; {norms.last().mean():.2g}",
                "ratio at start (decades)": _stated(_rows(table, moment="initialization", **labels)),
                "median in training": _stated(training),
                "lowest; highest": f"{_stated(training, 'min')}; {_stated(training, 'max')}" if errors else "–",
                "training error (%)": rp.mean_std(errors) if errors else "not trained",
            }
        )
    return pandas.DataFrame(rows)


_QUICK = Options(preset="quick", data="digits", depths=(20, 56), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="gradient_norms",
    title="Plain networks degrade although their gradients do not vanish",
    description=(
        "Measures forward signals and gradients along plain and residual networks, with and without batch normalization, at "
        "initialization and along training (claim C6; §4.1)."
    ),
    claims=(DO_NOT_VANISH, DO_NOT_EXPLODE),
    presets=rp.cifar_presets(_QUICK, depths=(20, 32, 44, 56, 110)),
    plan=plan,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    leaves_open=rp.lacks_depths,
    rules=(
        "A seed decides the initial weights, the images measured with, and the training. A part of a claim (at initialization; "
        "along training) holds if the ratio of gradients certainly changes with depth by less than a factor of "
        f"{10**LIMIT:,.0f}, and fails if it certainly changes by more; this factor was fixed beforehand. That the median along "
        "training decides, and not the lowest reading, was decided after a quick run of which the lowest said otherwise. A "
        "claim holds if all of its parts do, and fails if one of them does; C6 can hold only if the control without batch "
        "normalization is seen to vanish."
    ),
)

if __name__ == "__main__":
    raise SystemExit(study.main())
