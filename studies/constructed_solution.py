"""The constructed solution: a deeper network can be a shallower one with identity layers added. Does SGD stay there?

Claim C13 (§1), and a question of ours beyond it (C13b).

    python -m studies.constructed_solution                       # embedded digits, minutes on two cores
    python -m studies.constructed_solution --depths 20 32 110    # other depths; the shallowest is the one learned first
    python -m studies.constructed_solution --preset paper --data cifar10

§1 argues that a deeper model has a solution by construction, the learned shallower model with identity layers added, and so
should have no higher training error; but that solvers do not find one as good. The paper builds no such network and prints
no number; here it is built and trained on.

Identity blocks are put at the end of each stage, where a ReLU has left nothing negative. In a plain network their
convolutions are Dirac kernels, and their batch normalization takes γ = √(σ² + ε) and β = μ from the statistics of
what comes in: an identity exactly in testing mode, and in training mode on the images that were measured. In a
residual network the last normalization of the branch is zeroed, which is an identity in both modes. What would refute the
claims stands with them below.

Measured (2026-11-21, two cores of an AMD EPYC, torch 2.15.0, bf16; record in docs/measurements/):
- quick, digits, n = 3, 6.4 minutes of training summed over 24 runs: every output of six networks of 56 layers equals that of
  the 20 layers they were made from, to 1.3e-5 of logits up to 28; C13 holds. Trained on by the whole recipe, plain-56
  leaves (20 % training error at most) and returns to 0.57 ± 0.26 %, where plain-20 had 0.03 ± 0.03 % and plain-56 from
  random weights ends at 83.30 ± 5.21 %; at the last learning rate it stays (0.02 ± 0.03 %). C13b fails. Residual networks
  stay at 0.00 %;
- the paper preset: not tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import resprobe as rp
from resprobe.claims import one_depth
from resprobe.tables import network_name

if TYPE_CHECKING:
    import pandas
    from torch import Tensor, nn

MEASURED_IMAGES = 256
"""Training images that the inserted normalizations take their statistics from."""
ROUNDING = 1e-4
"""Share of the largest logit that counts as rounding in fp32. A hundred layers that each err by 1e-7 stay well below it."""
SCRATCH, TRAINED_ON, LAST_RATE = "scratch", "constructed", "constructed, last rate"
"""How a network's training began: from random weights, or from the constructed solution, by the whole recipe again or at
the recipe's last learning rate throughout."""

SOLUTION_EXISTS = rp.Claim(
    id="C13",
    statement="Copied layers and identity layers make a deeper network with the shallower one's training error",
    section="§1",
    paper="such a solution exists by construction; no numbers are printed",
    falsifier="an output of the constructed network that differs by more than rounding, or a changed training error",
)
SGD_KEEPS_IT = rp.Claim(
    id="C13b",
    statement="Trained on from the constructed solution, a plain network ends where the shallower one was",
    section="§1; the experiment is ours",
    paper="not in the paper, which says that solvers do not find a solution as good as the constructed one",
    falsifier="training error after the whole recipe from the constructed solution above the shallower network's, over seeds",
    beyond=True,
)


def plan(options: rp.Options) -> list[rp.Planned]:
    """Plain and residual networks of every depth from random weights; the shallowest are the learned ones."""
    import torch

    planned = []
    plain = {"block": options.block}
    residual = plain | {"shortcut": options.shortcut}
    for kind, family, chosen in (("plain", "cifar/plain", plain), ("residual", "cifar/resnet", residual)):
        shallow, deep = min(options.depths), max(options.depths)
        if deep > shallow:  # blocks that cannot be identities are found before anything is trained
            deepen(rp.build(f"{family}-{shallow}", **chosen), deep, torch.rand(2, 3, 8, 8))
        for depth in options.depths:
            planned.append(rp.Planned({"kind": kind, "depth": depth, "start": SCRATCH}, f"{family}-{depth}", chosen))
    return planned


def deepen(network: rp.Network, depth: int, images: Tensor, *, seed: int = 0) -> rp.Network:
    """A network of `depth` layers that computes what `network` does: its blocks copied, the added ones identities.

    `images` are normalized inputs [N, C, H, W], on which the statistics for the added batch normalizations are taken, in
    training mode: on them the result equals `network` in training mode too, and in testing mode on any. What the added
    blocks of a residual network hold behind their zeros is drawn from `seed`. Raises `UsageError` if `depth` is not
    beyond the network's, or its blocks cannot be identities.
    """
    if depth <= (network.depth or 0):
        raise rp.UsageError(f"depth (={depth}) must be above that of the network to deepen ({network.spec.name})")
    with rp.seeded(seed):
        deeper = rp.build(replace(network.spec, depth=depth))
    deeper.load_state_dict(network.state_dict(), strict=False)  # what is added comes last in its stage, under new names
    deeper.normalization = network.normalization
    statistics, copied = _stage_statistics(network, images), {name for name, _ in network.blocks()}
    for name, block in deeper.blocks():
        if name not in copied:
            _make_identity(block, *statistics[name.partition(".")[0]])
    return deeper.eval()


def _stage_statistics(network: rp.Network, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and biased variance of each channel at the end of each stage, in training mode.

    In float64, so that rounding to float32 gives the same network on every machine, and its runs are found again.
    """
    import torch

    twin, found = copy.deepcopy(network).double().train(), {}
    for stage in {name.partition(".")[0] for name, _ in network.blocks()}:

        def note(_module, _inputs, output: Tensor, stage: str = stage) -> None:
            found[stage] = output.mean((0, 2, 3)), output.var((0, 2, 3), correction=0)

        twin.get_submodule(stage).register_forward_hook(note)
    with torch.no_grad():
        twin(images.double())
    return found


def _make_identity(block: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Makes a block of stride 1 hand on what it is given, for inputs ≥ 0 of these statistics."""
    import torch
    from torch import nn

    norms = [module for module in block.branch.modules() if isinstance(module, nn.BatchNorm2d)]
    convolutions = [module for module in block.branch.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        if block.shortcut is not None and norms:
            norms[-1].weight.zero_()  # relu(0 + x) = x, in both modes
            norms[-1].bias.zero_()
        elif all(norm.num_features == len(mean) for norm in norms):
            for convolution in convolutions:
                nn.init.dirac_(convolution.weight, convolution.groups)
            for norm in norms:  # (x − μ) / √(σ² + ε) · γ + β = x
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
                norm.weight.copy_((variance + norm.eps).sqrt())
                norm.bias.copy_(mean)
        sample = mean[:, None, None] + variance.sqrt()[:, None, None] * torch.linspace(0, 1, 9).view(3, 3)
        sample = sample[None].float()
        same = torch.allclose(block.eval()(sample), sample, rtol=1e-4, atol=1e-4 * float(sample.max()))
    if not same:
        raise rp.UsageError(
            f"{type(block).__name__} ({'plain' if block.shortcut is None else 'with this shortcut'}) cannot be made an "
            "identity mapping; accepted: plain blocks of convolutions that keep their channels (basic, single), and "
            "blocks that end in batch normalization beside an identity shortcut (A, B)"
        )


def then(results: rp.Results) -> list[rp.Planned]:
    """Every deepened network, trained by the whole recipe again, and at its last rate."""
    planned = []
    for labels, _, deeper in _deepened(results):
        seeds = (labels.pop("seed"),)
        planned.append(rp.Planned(labels | {"start": TRAINED_ON}, deeper, seeds=seeds))
        planned.append(rp.Planned(labels | {"start": LAST_RATE}, deeper, seeds=seeds, recipe=_at_last_rate))
    return planned


def _at_last_rate(recipe: rp.Recipe) -> rp.Recipe:
    rate = rp.learning_rate(recipe, recipe.iterations - 1, error=0.0)
    name = f"{recipe.name}, from the constructed solution at rate {rate:g}"
    return replace(rp.recipes.without_warm_up(recipe), name=name, learning_rate=rate, milestones=())


def _deepened(results: rp.Results) -> Iterator[tuple[dict, rp.Network, rp.Network]]:
    """Labels, the learned network and the constructed one, for each shallow network and deeper depth."""
    shallow = min(results.options.depths)
    images = rp.load_data(results.options.data).train.sample(MEASURED_IMAGES)
    images = images[:: max(1, len(images) // MEASURED_IMAGES)][:MEASURED_IMAGES]
    for row, run in zip(results.table.itertuples(), results.runs, strict=True):
        if row.depth == shallow:
            for depth in sorted(set(results.options.depths) - {shallow}):
                deeper = deepen(run.network, depth, run.network.normalization(images), seed=row.seed)
                yield {"kind": row.kind, "depth": depth, "seed": row.seed}, run.network, deeper


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a constructed network, before it is trained on: how its outputs in fp32 differ on all training and test
    images, and both networks' errors on them (percent)."""
    import pandas

    data = rp.load_data(results.options.data)
    rows = []
    for labels, network, deeper in _deepened(results):
        train, test = (_compare_outputs(network, deeper, part, results.device) for part in (data.train, data.test))
        row = labels | {name: max(train[name], test[name]) for name in ("largest_difference", "largest_logit")}
        for part, found in (("train", train), ("test", test)):
            row |= {f"{part}_error_{which}": found[which] for which in ("before", "after")}
        rows.append(row | {"images": len(data.train) + len(data.test)})
    return pandas.DataFrame(rows)


def _compare_outputs(network, deeper, images: rp.ImageSet | rp.FolderSet, device: str) -> dict[str, float]:
    import torch

    # On a GPU convolutions compute in TF32 unless told otherwise, which rounds a thousand times more coarsely.
    precisely = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    before, after = copy.deepcopy(network).to(device).eval(), copy.deepcopy(deeper).to(device).eval()
    normalize, found = network.normalization.to(device), []
    with torch.inference_mode(), precisely:
        for batch, labels in images.views(250):
            batch, labels = normalize(batch.to(device)), labels.to(device)
            one, other = before(batch), after(batch)
            wrong = [(logits.argmax(1) != labels).sum().item() for logits in (one, other)]
            found.append(((one - other).abs().max().item(), one.abs().max().item(), *wrong))
    differences, logits, wrong_before, wrong_after = zip(*found, strict=True)
    return {
        "largest_difference": max(differences),
        "largest_logit": max(logits),
        "before": 100 * sum(wrong_before) / len(images),
        "after": 100 * sum(wrong_after) / len(images),
    }


def judge(results: rp.Results) -> list[rp.Verdict]:
    shallow, deep = min(results.options.depths), max(results.options.depths)
    if shallow == deep:
        return one_depth(SOLUTION_EXISTS, SGD_KEEPS_IT)
    return [_judge_outputs(results.measurements), _judge_training(results, shallow, deep)]


def _judge_outputs(measured: pandas.DataFrame) -> rp.Verdict:
    relative = measured["largest_difference"] / measured["largest_logit"]
    # Written so that a NaN is a failure.
    equal = (relative <= ROUNDING) & (measured["train_error_after"] == measured["train_error_before"])
    errors = " → ".join(f"{measured[f'train_error_{when}'].mean():.2f}" for when in ("before", "after"))
    return rp.Verdict(
        SOLUTION_EXISTS,
        "holds" if equal.all() else "fails",
        f"{equal.sum()} of {len(measured)} constructed networks equal to rounding; largest difference "
        f"{measured['largest_difference'].max():.1e} of logits up to {measured['largest_logit'].max():.0f}",
        f"all {measured['images'].iloc[0]:,} training and test images in fp32; mean training error {errors} %; rounding is "
        f"taken to be {ROUNDING:g} of the largest logit, and was at most {relative.max():.1e}",
    )


def _judge_training(results: rp.Results, shallow: int, deep: int) -> rp.Verdict:
    def errors(kind: str, depth: int, start: str) -> list[float]:
        return results.values("train_error", kind=kind, depth=depth, start=start)

    rise = rp.compare(errors("plain", deep, TRAINED_ON), errors("plain", shallow, SCRATCH))
    # The claim is that nothing rises, so it is the upper limit that can confirm it.
    if rise.seeds < 2:
        word = "inconclusive"
    elif rise.upper < rise.margin:
        word = "holds"
    else:
        word = "fails" if rise.lower > 0 else "inconclusive"
    gap = rp.compare(errors("plain", deep, SCRATCH), errors("plain", deep, TRAINED_ON))
    trained = errors("plain", shallow, SCRATCH), errors("plain", deep, TRAINED_ON)
    ways = "; ".join(
        f"{network_name(kind, deep)} {_way(results, kind, deep, TRAINED_ON)}" for kind in ("plain", "residual")
    )
    verdict = rp.Verdict(
        SGD_KEEPS_IT,
        word,
        f"training error of plain-{shallow} {rp.mean_std(errors('plain', shallow, SCRATCH))} %; of plain-{deep} trained on from "
        f"the constructed solution {rp.mean_std(errors('plain', deep, TRAINED_ON))} %, at the last rate "
        f"{rp.mean_std(errors('plain', deep, LAST_RATE))} %, from random weights {rp.mean_std(errors('plain', deep, SCRATCH))} %",
        f"training error of the trained-on plain-{deep} above plain-{shallow}: {rise.said(p=False)}; it holds if a rise of "
        f"{rise.margin} points is excluded. From random weights above trained on, plain-{deep}: {gap}. Trained on by the whole "
        "recipe "
        f"(means over seeds): {ways}",
    )
    return rp.if_learned(verdict, *trained, absent="holds", opposite=rise.reversed)


def _way(results: rp.Results, kind: str, depth: int, start: str) -> str:
    """Training error at the first log point, at its highest, and at the last one."""
    first, highest, last = _first_highest_last(results, kind, depth, start)
    return f"{first:.2f} % at first, {highest:.2f} % at most, {last:.2f} % at the end"


def _first_highest_last(results: rp.Results, kind: str, depth: int, start: str) -> tuple[float, float, float]:
    histories = results.histories
    rows = histories[(histories["kind"] == kind) & (histories["depth"] == depth) & (histories["start"] == start)]
    by_seed = rows.sort_values("iteration").groupby("seed")["train_error"]
    return by_seed.first().mean(), by_seed.max().mean(), by_seed.last().mean()


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    shallow, deep = min(results.options.depths), max(results.options.depths)
    histories = results.histories
    starts = {
        SCRATCH: f"{deep} layers from random weights",
        TRAINED_ON: f"{deep} layers from the constructed solution",
        LAST_RATE: "the constructed solution, at the last learning rate",
    }
    starts = {start: name for start, name in starts.items() if start in set(histories["start"])}
    styles, palette = ("-", "-", (0, (4, 2))), rp.figures.colours(list(starts))
    figure, panels = rp.figures.new_figure(2, height=4.8)
    for axis, kind in zip(panels, ("plain", "residual"), strict=True):
        for (start, name), style in zip(starts.items(), styles, strict=False):
            rows = histories[(histories["kind"] == kind) & (histories["depth"] == deep) & (histories["start"] == start)]
            seeds = rows.pivot_table(index="iteration", columns="seed", values="train_error")
            axis.plot(seeds.index, seeds.mean(axis=1), color=palette[start], ls=style, lw=2, label=name)
            axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=palette[start], alpha=0.15, lw=0)
        learned = results.table[(results.table["kind"] == kind) & (results.table["depth"] == shallow)]
        axis.axhline(learned["train_error"].mean(), color="0.2", ls=":", lw=1.5, label=f"{shallow} layers, learned")
        # From chance to a hundredth of a percent: logarithmic above 1 %, linear below.
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axis.set_ylim(-0.1, 100)
        axis.set_xlabel("iterations")
        axis.set_title(f"{kind} networks")
    panels[0].set_ylabel("training error (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    on = results.options.data_name
    words = "; ".join(
        f"{kind} from {start}: {_way(results, kind, deep, start)}" for kind in ("plain", "residual") for start in starts
    )
    return {
        "figure": rp.Drawing(
            figure,
            f"Training error on {on} of {deep}-layer networks: from random weights, and trained on from the constructed "
            f"solution (the learned {shallow}-layer network and identity layers). Logarithmic above 1 %, linear below; mean "
            "over seeds, band from the lowest to the highest.",
            f"Training error over iterations for three beginnings. {words}.",
        )
    }


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a network and beginning; the constructed ones also as they are before any training."""
    import pandas

    shallow, rows = min(results.options.depths), []

    def row(kind: str, depth: int, origin: str, training: str, test: list[float], expected: str) -> None:
        names = ("network", "from", "training error: first → highest → end (%)", "test error (%)", "§1 says", "seeds")
        said = (network_name(kind, depth), origin, training, rp.mean_std(test), expected, len(test))
        rows.append(dict(zip(names, said, strict=True)))

    if results.measurements is not None and len(results.measurements):
        for (kind, depth), group in results.measurements.groupby(["kind", "depth"], sort=False):
            training = f"{rp.mean_std(group['train_error_after'].tolist())} (one view)"
            row(kind, depth, "constructed, untrained", training, group["test_error_after"].tolist(), "no higher")
    for (kind, depth, start), group in results.table.groupby(["kind", "depth", "start"], sort=False):
        first, highest, _ = _first_highest_last(results, kind, depth, start)
        training = f"{first:.2f} → {highest:.2f} → {rp.mean_std(group['train_error'].tolist())}"
        degrades = kind == "plain" and depth > shallow and start == SCRATCH
        origin = "random weights" if start == SCRATCH else start
        row(kind, depth, origin, training, group["test_error"].tolist(), "higher" if degrades else "–")
    return pandas.DataFrame(rows)


_QUICK = rp.Options(preset="quick", data="digits", depths=(20, 56), seeds=(0, 1, 2), iterations=400)

study = rp.Study(
    name="constructed_solution",
    title="A deeper network can be a shallower one with identity layers",
    description=(
        "Builds deeper networks from learned shallower ones and identity layers, compares their outputs, and trains them on "
        "(claim C13, §1, and C13b, beyond the paper)."
    ),
    claims=(SOLUTION_EXISTS, SGD_KEEPS_IT),
    presets=rp.cifar_presets(_QUICK),
    plan=plan,
    then=then,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    leaves_open=rp.lacks_depths,
    rules=(
        "C13 rests on no seed: every output is compared, on all images, and one that differs by more than rounding refutes it. "
        "C13b says that there is no difference. So it holds if a rise of the margin or more is excluded. It fails if a "
        "rise is certain, and one of the margin is not excluded."
    ),
)

if __name__ == "__main__":
    raise SystemExit(study.main())
