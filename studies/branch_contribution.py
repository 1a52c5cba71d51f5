"""Branch against shortcut: the deeper the residual network, the less each block's branch contributes. Beyond the paper.

Claims R1 and R2 are ours. The paper's words behind them: "if the optimal function is closer to an identity mapping than
to a zero mapping, it should be easier for the solver to find the perturbations with reference to an identity mapping"
(§3.2), and, of Fig. 7, "when there are more layers, an individual layer of ResNets tends to modify the signal less"
(§4.2). Fig. 7 shows how large branches are (`python -m studies.layer_responses`); here it is asked how much they matter
for the answer.

    python -m studies.branch_contribution                                 # embedded digits, minutes on two cores
    python -m studies.branch_contribution --depths 20 56 --conductance-images 64
    python -m studies.branch_contribution --preset paper --data cifar10   # for a GPU

A block adds its branch and its shortcut. With z that sum and f the logit of the right class, Σ ∂f/∂z · branch and
Σ ∂f/∂z · shortcut say how much of the block's effect on f came by which (gradient × activation). The branch's share is
|branch| / (|branch| + |shortcut|) of each test image, averaged over images and then over blocks. Two more readings
stand beside it: the same of the elements' absolute values, where nothing cancels; and conductance, which follows f all
the way from the mean image instead of linearizing it at the image, on fewer images since it costs sixty times as much.

In a deeper network a branch is one summand among more, trained or not. So the same networks are also measured before
their training (the seed's weights, with batch normalization's statistics over the training set): R2 asks what training
adds. From 110 layers on they are trained with the paper's warm-up (§4.2: a tenth of the rate until the training error
is below 80 %), on any data. What would refute the claims stands with them below.

Measured (2026-11-21, two cores of an AMD EPYC, torch 2.15.0, bf16, n = 3; record in
docs/measurements/2026-11-21-branch-contribution-quick):
- quick, digits: mean branch share of ResNet-20/32/44/56/110 32.8 ± 0.9, 22.2 ± 0.7, 17.2 ± 0.8, 13.4 ± 1.1, 10.3 ± 1.8 %;
  before training 39.4 ± 0.7, 34.0 ± 2.3, 30.1 ± 0.9, 27.2 ± 1.5, 25.2 ± 0.6 %. R1 and R2 hold;
- the paper preset: not tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import resprobe as rp
from resprobe.claims import one_depth

if TYPE_CHECKING:
    import pandas
    from torch import nn


MARGIN = 1.0
"""Percentage points of a share below which a difference is no effect. Fixed before the recorded run."""
PICTURES = 8
"""Test images whose pixels are explained in the last figure."""
TRAINED, CONDUCTANCE, UNTRAINED = "gradient × activation", "conductance", "before training"

SMALLER_WITH_DEPTH = rp.Claim(
    id="R1",
    statement="In deeper residual networks each block's branch contributes a smaller share of the block's effect on the logit",
    section="ours, after §3.2 and §4.2",
    paper="not in the paper, which shows the size of branches (Fig. 7), not what they contribute",
    falsifier="the deepest residual network's mean branch share is not below the shallowest's, over seeds",
    beyond=True,
)
SMALLER_BY_TRAINING = rp.Claim(
    id="R2",
    statement="In deep residual networks training makes the branches' share smaller than it is by construction",
    section="ours, after §3.2",
    paper="not in the paper, which conjectures that residual functions are small perturbations of the identity",
    falsifier="the deepest residual network's mean branch share is not below the same network's before training, over seeds",
    beyond=True,
)


@dataclass(frozen=True)
class Options(rp.Options):
    """How many test images are explained."""

    images: int = 256
    """test images explained by gradient × activation"""
    conductance_images: int = 16
    """test images, the first of them, explained by conductance"""


def plan(options: Options) -> list[rp.Planned]:
    """Residual networks over depth. A plain one has no shortcut, and so nothing to compare its branches with."""
    for name in ("images", "conductance_images"):
        rp.check_whole(name, getattr(options, name), 1)
    residual = {"block": options.block, "shortcut": options.shortcut}
    _check_blocks(f"cifar/resnet-{min(options.depths)}", residual)
    return [
        rp.Planned(
            {"depth": depth},
            f"cifar/resnet-{depth}",
            residual,
            recipe=rp.recipes.with_warm_up if depth >= rp.recipes.WARM_UP_FROM else None,
        )
        for depth in options.depths
    ]


def _check_blocks(name: str, options: dict[str, str]) -> None:
    """Blocks that do more than add their branch and shortcut cannot be measured: better said before training than after."""
    import torch

    from plugins.attribution import branch_and_shortcut

    with torch.random.fork_rng(devices=[]):
        branch_and_shortcut(rp.build(name, **options), torch.rand(1, 3, 8, 8))


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a block, network, seed and reading: `depth`, `seed`, `reading`, `block`, `stage`, `position` (from 0, the first
    block, to 1, the last), `branch` and `shortcut` (logit), `branch_share` and `branch_share_absolute` (percent)."""
    import pandas

    from plugins.attribution import branch_and_shortcut

    data, options = rp.load_data(results.options.data), results.options
    images, labels = next(iter(data.test.views(max(options.images, options.conductance_images))))
    rows = []
    for row, run in zip(results.table.itertuples(), results.runs, strict=True):
        for reading, network, method, count in (
            (TRAINED, run.network, "gradient-x-activation", options.images),
            (CONDUCTANCE, run.network, "conductance", options.conductance_images),
            (UNTRAINED, _before_training(run, data, results.device), "gradient-x-activation", options.images),
        ):
            given = run.network.normalization(images[:count])
            table = branch_and_shortcut(network.to(results.device), given, labels[:count], method=method)
            table["position"] = (table["position"] - 1) / max(1, len(table) - 1)
            table[["branch_share", "branch_share_absolute"]] *= 100
            columns = ["block", "stage", "position", "branch", "shortcut", "branch_share", "branch_share_absolute"]
            rows.append(table[columns].assign(depth=row.depth, seed=row.seed, reading=reading))
        run.network.cpu()
    return pandas.concat(rows, ignore_index=True)


def _before_training(run: rp.Run, data: rp.Data, device: str) -> nn.Module:
    """The network that the run began with. Its batch normalization knows no statistics yet, so they are taken first."""
    with rp.seeded(run.config.seed):
        network = rp.build(run.config.network).to(device)
    batches = (run.network.normalization(batch).to(device) for batch, _ in data.train.views(128))
    rp.precise_batch_norm(network, batches)
    return network


def _shares(results: rp.Results, depth: int, reading: str = TRAINED, column: str = "branch_share") -> list[float]:
    """Mean share over blocks, in percent, one value a seed."""
    table = results.measurements
    rows = table[(table["depth"] == depth) & (table["reading"] == reading)]
    return rows.groupby("seed")[column].mean().tolist()


def _compare(higher: list[float], lower: list[float]) -> rp.Comparison:
    return rp.compare(higher, lower, margin=MARGIN)


def judge(results: rp.Results) -> list[rp.Verdict]:
    return [_judge_depth(results), _judge_training(results)]


def _judge_depth(results: rp.Results) -> rp.Verdict:
    depths = sorted(results.options.depths)
    shallow, deep = depths[0], depths[-1]
    if shallow == deep:
        return one_depth(SMALLER_WITH_DEPTH)[0]

    def fall(reading: str, column: str = "branch_share") -> rp.Comparison:
        return _compare(_shares(results, shallow, reading, column), _shares(results, deep, reading, column))

    path = " → ".join(rp.mean_std(_shares(results, depth), 1) for depth in depths)
    decided = fall(TRAINED)
    return rp.Verdict(
        SMALLER_WITH_DEPTH,
        decided.verdict,
        f"mean branch share {path} % at {', '.join(map(str, depths))} layers",
        f"ResNet-{shallow} above ResNet-{deep}: {decided}. Other readings: absolute values "
        f"{fall(TRAINED, 'branch_share_absolute').difference:+.1f}, conductance {fall(CONDUCTANCE).difference:+.1f} points. "
        f"Before training, by construction alone: {fall(UNTRAINED).difference:+.1f} points",
    )


def _judge_training(results: rp.Results) -> rp.Verdict:
    deep = max(results.options.depths)
    before, after = _shares(results, deep, UNTRAINED), _shares(results, deep)
    shallow = min(results.options.depths)
    change = _compare(_shares(results, shallow, UNTRAINED), _shares(results, shallow))
    others = f". In ResNet-{shallow}: {change.difference:+.1f} points" if shallow != deep else ""
    return rp.Verdict(
        SMALLER_BY_TRAINING,
        _compare(before, after).verdict,
        f"mean branch share of ResNet-{deep} {rp.mean_std(before, 1)} % before and {rp.mean_std(after, 1)} % after training",
        f"before above after: {_compare(before, after)}{others}",
    )


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    on = results.options.data_name
    seeds = results.options.seeds
    over = f"Mean ± std over {len(seeds)} seeds" if len(seeds) > 1 else "One seed"
    figure, (along, against) = rp.figures.new_figure(2)
    _draw_positions(along, results)
    _draw_depths(against, results)
    means = [f"{depth} layers {rp.mean_std(_shares(results, depth), 1)} %" for depth in sorted(results.options.depths)]
    drawings = {
        "figure": rp.Drawing(
            figure,
            f"The branch's share of a block's effect on the logit, on test images of {on}; the rest is the shortcut's. Left: "
            "block by block after training, from the first (0) to the last (1); dotted lines: where the deepest network's "
            f"stages begin. Right: mean over all blocks against depth, by two methods and, in grey, before training. {over}.",
            "Branch share along and against depth. Mean over blocks after training: " + ", ".join(means) + ".",
        )
    }
    if results.runs:
        drawings["figure-pixels"] = _pictures(results)
    return drawings


def _draw_positions(axis, results: rp.Results) -> None:
    table = results.measurements[results.measurements["reading"] == TRAINED]
    palette, ends = rp.figures.colours(sorted(table["depth"].unique())), []
    for depth, rows in table.groupby("depth"):
        mean = rp.figures.mean_and_band(axis, rows["branch_share"], rows["position"], color=palette[depth], lw=2)
        ends.append((float(mean.iloc[-1]), f"{depth} layers", palette[depth]))
    deepest = table[table["depth"] == table["depth"].max()]
    for begin in deepest.groupby("stage")["position"].min().iloc[1:]:
        axis.axvline(begin, color="0.5", lw=0.8, ls=":")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("position of the block (0 first, 1 last)")
    axis.set_ylabel("branch's share (%)")
    axis.set_title("along the network")
    rp.figures.label_ends(axis, ends)


def _draw_depths(axis, results: rp.Results) -> None:
    table = results.measurements.groupby(["reading", "depth", "seed"])["branch_share"].mean()
    ends = []
    # In greys: colours are depths in the panel beside it.
    for reading, marker, line, grey in (
        (TRAINED, "o", "-", 0.1),
        (CONDUCTANCE, "^", "--", 0.4),
        (UNTRAINED, "s", ":", 0.6),
    ):
        shares, colour = table[reading], (grey, grey, grey)
        depths = shares.index.get_level_values("depth")
        mean = rp.figures.mean_and_bars(axis, shares, depths, color=colour, marker=marker, ls=line, label=reading)
        ends.append((float(mean.iloc[-1]), reading, colour))
    axis.set_xticks(sorted(results.options.depths))
    axis.set_xlabel("depth (weighted layers)")
    axis.set_title("mean over blocks")
    rp.figures.label_ends(axis, ends)


def _pictures(results: rp.Results) -> rp.Drawing:
    """What the deepest network's answer rests on in the images themselves: integrated gradients."""
    from plugins.attribution import pictures

    deep = max(results.options.depths)
    row = results.table["depth"].tolist().index(deep)
    run = results.runs[row]
    data = rp.load_data(results.options.data)
    images, labels = next(iter(data.test.views(PICTURES)))
    figure = pictures(run.network, run.network.normalization(images), labels, shown=images)
    return rp.Drawing(
        figure,
        f"The first test images, and below each what speaks for (red) and against (blue) its class in ResNet-{deep}, seed "
        f"{run.config.seed}: integrated gradients from the mean image. Above: class and logit; below: how far the pixels' sum "
        "is from the logit's difference to the mean image's.",
        f"Test images of the classes {', '.join(str(int(label)) for label in labels)} above maps of integrated gradients.",
    )


def tabulate(results: rp.Results) -> pandas.DataFrame:
    import pandas

    rows = []
    for depth in sorted(results.options.depths):
        blocks = results.measurements.query("depth == @depth")["block"].nunique()
        rows.append(
            {
                "network": f"ResNet-{depth}",
                "blocks": blocks,
                "branch share (%)": rp.mean_std(_shares(results, depth), 1),
                "of absolute values (%)": rp.mean_std(_shares(results, depth, column="branch_share_absolute"), 1),
                "by conductance (%)": rp.mean_std(_shares(results, depth, CONDUCTANCE), 1),
                "before training (%)": rp.mean_std(_shares(results, depth, UNTRAINED), 1),
                "training error (%)": rp.mean_std(results.values("train_error", depth=depth)),
                "seeds": len(_shares(results, depth)),
            }
        )
    return pandas.DataFrame(rows)


_QUICK = Options(preset="quick", data="digits", depths=(20, 32, 44, 56, 110), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="branch_contribution",
    title="Beyond the paper: what a block's branch contributes, and what its shortcut",
    description=(
        "Attributes every block's effect on the logit to its branch and its shortcut, over depth, in trained networks and "
        "before training (claims R1 and R2, which are ours and not the paper's)."
    ),
    claims=(SMALLER_WITH_DEPTH, SMALLER_BY_TRAINING),
    presets=rp.cifar_presets(_QUICK),
    plan=plan,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    leaves_open=rp.lacks_depths,
    rules=(
        f"The margin of R1 and R2 is {MARGIN:g} percentage point. Verdicts rest on gradient × activation; the other readings "
        "stand beside it."
    ),
)

if __name__ == "__main__":
    raise SystemExit(study.main())
