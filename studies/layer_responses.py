"""Layer responses: residual functions are small, and smaller the deeper the network.

Claim C5 (§4.2, "Analysis of Layer Responses"; Fig. 7).

    python -m studies.layer_responses                          # embedded digits, minutes on two cores
    python -m studies.layer_responses --depth 110              # the deepest residual network; 110 is the default
    python -m studies.layer_responses --data cifar10:PATH --weights resnet20.th resnet56.th   # no training
    python -m studies.layer_responses --preset paper --data cifar10

A response is the output of a 3×3 layer after batch normalization and before the nonlinearity or the addition; its
standard deviation is taken over all images, positions and channels. The paper shows it for plain-20, plain-56 and
ResNet-20, -56 and -110. It does not say over which images, nor in which mode, so three readings are measured: the finished
network on the test images (which the verdict rests on), in training mode on training images, and the closed form from
batch normalization's weights alone, std² = mean(γ²) + var(β), which training mode comes to but for ε.

What would refute it: on average over layers, ResNet-56's responses not below plain-56's, or the deepest residual
network's not below the shallowest's.
"""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import resprobe as rp

if TYPE_CHECKING:
    import pandas
    from torch import nn

MARGIN = 0.05
"""Of a mean standard deviation of responses, which batch normalization keeps near 1: less is no effect."""
READINGS = {"test": "test images", "train": "training mode", "closed": "closed form"}

RESPONSES_ARE_SMALL = rp.Claim(
    id="C5",
    statement="Residual networks have smaller layer responses than plain ones, and deeper residual networks smaller still",
    section="§4.2, Fig. 7",
    paper="std of the responses: ResNets below their plain counterparts; ResNet-20 > ResNet-56 > ResNet-110 (curves only)",
    falsifier="mean over layers of ResNet-56 not below plain-56, or of the deepest ResNet not below the shallowest",
)


@dataclass(frozen=True)
class Options(rp.Options):
    """The depths of plain and residual networks, and one deeper residual network."""

    depth: int = 110
    """depth of one more residual network, beyond `--depths` (Fig. 7 has 110)"""
    weights: tuple[str, ...] = ()
    """trained networks to look at instead of training: weight files of CIFAR ResNets, or folders of runs"""


def plan(options: Options) -> list[rp.Planned]:
    if options.weights:
        return []
    plain = {"block": options.block}
    residual = plain | {"shortcut": options.shortcut}
    planned = [rp.Planned({"kind": "plain", "depth": depth}, f"cifar/plain-{depth}", plain) for depth in options.depths]
    planned += [
        rp.Planned({"kind": "residual", "depth": depth}, f"cifar/resnet-{depth}", residual)
        for depth in sorted({*options.depths, options.depth})
    ]
    return planned


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a 3×3 layer, network, seed and reading: `kind`, `depth`, `seed`, `reading`, `layer`, `order`, `mean`, `std`."""
    import pandas

    data = rp.load_data(results.options.data)
    rows = []
    for labels, network in _networks(results, data):
        rows += [row.assign(**labels) for row in _readings(network, data, results)]
    return pandas.concat(rows, ignore_index=True)


def _networks(results: rp.Results, data: rp.Data):
    """Labels and trained networks: those of the runs, or those that `--weights` names."""
    for row, run in zip(results.table.itertuples(), results.runs, strict=True):
        yield {"kind": row.kind, "depth": row.depth, "seed": row.seed}, run.network
    for path in results.options.weights:
        network = _published(path, data)
        kind = "plain" if network.spec.family.endswith("plain") else "residual"
        yield {"kind": kind, "depth": network.depth, "seed": 0}, network


def _published(path: str, data: rp.Data) -> rp.Network:
    """The network that a run's folder, or the name of a file ("resnet56-…"), says it is, with its weights."""
    import json

    config = Path(path) / "config.json"
    if config.is_file():
        return rp.load_weights(rp.build(rp.NetworkSpec(**json.loads(config.read_text())["network"])), path)
    named = re.search(r"(plain|resnet)[-_]?(\d+)", Path(path).name)
    if named is None:
        raise rp.UsageError(
            f"weights (={path!r}) must be a run's folder or a file named for its network, as resnet56.th"
        )
    network = rp.build(
        f"cifar/{named.group(1)}-{named.group(2)}", in_channels=data.in_channels, num_classes=data.num_classes
    )
    return rp.load_weights(network, path)


def _readings(network: nn.Module, data: rp.Data, results: rp.Results) -> list[pandas.DataFrame]:
    import torch

    device = torch.device(results.device)
    network = copy.deepcopy(network).to(device)  # training mode below moves its statistics
    normalize = network.normalization.to(device)
    found = []
    for reading, batches in (("test", data.test.views(128)), ("train", _whole_batches(data.train))):
        network.train(reading == "train")
        with torch.inference_mode(), rp.attach(network, "layer-responses") as probe:
            for batch, _ in batches:
                network(normalize(batch.to(device)))
        table = probe.table().query("kernel_size == '3x3' and kind != 'shortcut'").sort_values("position")
        found.append(
            table[["layer", "measured", "mean", "std"]].assign(order=range(1, len(table) + 1), reading=reading)
        )
    closed = found[0].assign(reading="closed")
    modules = dict(network.named_modules())
    closed["mean"], closed["std"] = zip(*(_closed_form(modules[name]) for name in closed["measured"]), strict=True)
    return [*found, closed]


def _whole_batches(images: rp.ImageSet | rp.FolderSet):
    """Batches of 128 and of no other size, since in training mode statistics are the batch's own; at most 40."""
    whole = (batch for batch in images.views(128) if len(batch[0]) == 128)
    return itertools.islice(whole, 40)


def _closed_form(norm: nn.Module) -> tuple[float, float]:
    """Mean and standard deviation of normalized responses over a batch, from γ and β alone; NaN without them."""
    if getattr(norm, "weight", None) is None or norm.weight.ndim != 1:
        return float("nan"), float("nan")
    gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    return float(beta.mean()), float((gamma.square().mean() + beta.var(correction=0)).sqrt())


def _means(results: rp.Results, kind: str, depth: int, reading: str = "test") -> list[float]:
    """Mean over layers of the standard deviation, one value a seed."""
    table = results.measurements
    rows = table[(table["kind"] == kind) & (table["depth"] == depth) & (table["reading"] == reading)]
    return rows.groupby("seed")["std"].mean().tolist()


def judge(results: rp.Results) -> list[rp.Verdict]:
    networks = results.measurements[["kind", "depth"]].drop_duplicates().sort_values(["kind", "depth"])
    have = {kind: sorted(group["depth"]) for kind, group in networks.groupby("kind")}
    measured = "mean std over layers: " + ", ".join(
        f"{row.kind}-{row.depth} {rp.mean_std(_means(results, row.kind, row.depth))}" for row in networks.itertuples()
    )
    parts, evidence = [], []
    both = [depth for depth in have.get("plain", []) if depth in have.get("residual", [])]
    if both:
        depth = max(both)
        comparisons = {
            reading: _compare(results, ("plain", depth), ("residual", depth), reading) for reading in READINGS
        }
        parts.append(comparisons["test"].verdict)
        evidence.append(f"plain-{depth} above ResNet-{depth}: " + _in_all_readings(comparisons))
        evidence.append(f"ResNet-{depth} is smaller in {_share_smaller(results, depth):.0%} of the layers")
    if len(have.get("residual", [])) > 1:
        shallow, deep = have["residual"][0], have["residual"][-1]
        comparisons = {
            reading: _compare(results, ("residual", shallow), ("residual", deep), reading) for reading in READINGS
        }
        parts.append(comparisons["test"].verdict)
        evidence.append(f"ResNet-{shallow} above ResNet-{deep}: " + _in_all_readings(comparisons))
    if len(parts) < 2:
        missing = "plain networks" if not both else "residual networks of two depths"
        word = "fails" if "fails" in parts else "not tested" if not parts else "inconclusive"
        evidence.append(f"there are no {missing} to compare with, so one half of the claim was not tested")
    else:
        word = "fails" if "fails" in parts else "holds" if set(parts) == {"holds"} else "inconclusive"
    return [rp.Verdict(RESPONSES_ARE_SMALL, word, measured, "; ".join(evidence))]


def _compare(results: rp.Results, higher: tuple[str, int], lower: tuple[str, int], reading: str) -> rp.Comparison:
    return rp.compare(
        _means(results, *higher, reading), _means(results, *lower, reading), margin=MARGIN, unit="in mean std"
    )


def _in_all_readings(comparisons: dict[str, rp.Comparison]) -> str:
    others = ", ".join(f"{READINGS[name]} {comparisons[name].difference:+.2f}" for name in ("train", "closed"))
    return f"{comparisons['test']} on {READINGS['test']} ({others})"


def _share_smaller(results: rp.Results, depth: int) -> float:
    """In how many layers the residual network's response is below the plain one's, mean over seeds."""
    table = results.measurements
    rows = table[(table["depth"] == depth) & (table["reading"] == "test")]
    std = rows.groupby(["kind", "order"])["std"].mean().unstack("kind")
    return float((std["residual"] < std["plain"]).mean())


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    table = results.measurements[results.measurements["reading"] == "test"]
    networks = sorted(table[["kind", "depth"]].drop_duplicates().itertuples(index=False, name=None))
    depths = sorted({depth for _, depth in networks})
    palette = rp.figures.colours(depths)
    figure, panels = rp.figures.new_figure(2)
    for axis, by_size in zip(panels, (False, True), strict=True):
        for kind, depth in networks:
            rows = table[(table["kind"] == kind) & (table["depth"] == depth)]
            seeds = rows.pivot(index="order", columns="seed", values="std")
            if by_size:
                seeds = seeds.apply(lambda column: column.sort_values(ascending=False).to_numpy())
            mean, spread = seeds.mean(axis=1), seeds.std(axis=1).fillna(0.0)
            style = {"ls": (0, (4, 2)), "lw": 1.3} if kind == "plain" else {"ls": "-", "lw": 2.2}
            name = f"{'plain' if kind == 'plain' else 'ResNet'}-{depth}"
            axis.plot(mean.index, mean, color=palette[depth], label=name, **style)
            axis.fill_between(mean.index, mean - spread, mean + spread, color=palette[depth], alpha=0.15, lw=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("layer, sorted by size" if by_size else "layer, in order")
    panels[0].set_ylabel("standard deviation of responses")
    panels[1].legend(frameon=False)
    on = results.options.data.partition(":")[0]
    said = "; ".join(f"{kind}-{depth} mean {rp.mean_std(_means(results, kind, depth))}" for kind, depth in networks)
    return {
        "figure": rp.Drawing(
            figure,
            f"Standard deviation of the responses of all 3×3 layers on {on}'s test images, in the manner of Fig. 7: in layer "
            "order (left) and sorted by size (right). Dashed: plain; solid: residual. Mean ± std over seeds.",
            f"Standard deviation of layer responses over layers. {said}.",
        )
    }


def tabulate(results: rp.Results) -> pandas.DataFrame:
    import pandas

    rows = []
    for (kind, depth), group in results.measurements.groupby(["kind", "depth"]):
        readings = {
            f"mean std, {text}": rp.mean_std(_means(results, kind, depth, name)) for name, text in READINGS.items()
        }
        rows.append(
            {"network": f"{kind}-{depth}", "3×3 layers": group["order"].max(), "seeds": group["seed"].nunique()}
            | readings
        )
    return pandas.DataFrame(rows)


_QUICK = Options(preset="quick", data="digits", depths=(20, 56), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="layer_responses",
    title="Residual functions are small",
    description=(
        "Measures the standard deviation of every 3×3 layer's response in plain and residual networks (claim C5; §4.2, Fig. 7)."
    ),
    claims=(RESPONSES_ARE_SMALL,),
    presets={"quick": _QUICK, "paper": replace(_QUICK, preset="paper", data="cifar10", iterations=64_000)},
    plan=plan,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
)

if __name__ == "__main__":
    raise SystemExit(study.main())
