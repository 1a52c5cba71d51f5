"""ImageNet: the networks of Table 1 on class folders of images, trained, or with published weights.

Claims C14 and C15 (§3.4, §4.1; Tables 2–4, Fig. 4).

    python -m studies.imagenet                                        # enlarged digits, minutes on two cores
    python -m studies.imagenet --preset paper --data folder:PATH      # PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg
    torchrun --nproc-per-node 8 -m studies.imagenet --preset paper --data folder:PATH
    python -m studies.imagenet --preset paper --data folder:PATH --weights resnet34-….pth resnet50-….pth   # no training

The paper trains plain and residual networks of 18 and 34 layers, and residual ones of 50, 101 and 152 layers, for up to
600k iterations of 256 images: shorter side drawn from [256, 480], a 224-pixel crop or its mirror image, AlexNet's colour
augmentation, learning rate divided by 10 when the error plateaus. Curves show the centre crop's validation error; tables
10-crop testing, and testing at five scales. What would refute the claims stands with them below.

The quick preset is not ImageNet: the same networks, a quarter as wide, on the embedded digits enlarged to 64 pixels. It
can show degradation; 1,437 digits leave residual networks little to gain. `--weights` says nothing on C14, and of C15 the
order alone: torchvision's networks were trained by another recipe, and one network of a depth has no spread.

Measured (2026-11-21 and -27, two cores of an AMD EPYC, torch 2.15.0 and 2.14.1, bf16; records in docs/measurements/):
- quick, n = 3: training error at 18 → 34 layers 0.00 → 3.51 ± 3.91 % plain and 0.00 → 0.00 % residual, validation error
  2.41 ± 0.89 → 7.87 ± 4.31 % and 2.22 ± 0.28 → 1.85 ± 0.58 %. C14 is inconclusive: so is its plain half, and residual
  networks of both depths fit all digits. C15 is not tested;
- ten classes of ImageNet, 4,000 photographs, 112-pixel crops, 16 filters, 600 iterations of 64, n = 1: training error at 18 →
  34 layers 59.29 → 88.79 % plain and 48.25 → 68.58 % residual, 10-crop error 57.40 → 88.27 % and 42.07 → 62.73 %;
  far from trained, and inconclusive for want of seeds;
- published ImageNet weights, ImageNet itself and the paper preset: not tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import tyro

import resprobe as rp
from resprobe.claims import NO_GAIN_FROM_DEPTH
from resprobe.tables import network_name

if TYPE_CHECKING:
    import pandas

PROTOCOLS = ("single-view", "ten-crop", "multi-scale")
DEPTHS = {2: (18, 34), 3: (50, 101, 152)}
"""Table 1, by the weighted layers of a block."""
WIDTH, CROP, BATCH = 64, 224, 256
"""Filters of conv1, pixels of a crop, images of a mini-batch: Table 1, §3.4."""

SMALLEST_STEP = 0.2
"""Points of error: a margin that the paper's own smallest gain, 0.32 from 101 to 152 layers (Table 3), stands above."""

UNFITTED = "train_error_single_view"
"""What a finished network errs on of its training images."""

PAPER_TEN_CROP = {
    "plain-18": "27.94 / –",
    "plain-34": "28.54 / 10.02",
    "ResNet-18 A": "27.88 / –",
    "ResNet-34 A": "25.03 / 7.76",
    "ResNet-34 B": "24.52 / 7.46",
    "ResNet-34 C": "24.19 / 7.40",
    "ResNet-50 B": "22.85 / 6.71",
    "ResNet-101 B": "21.75 / 6.05",
    "ResNet-152 B": "21.43 / 5.71",
    "VGG-16": "28.07 / 9.33",
}
"""Top-1 / top-5 error on ImageNet's validation set, Tables 2 and 3."""
PAPER_MULTI_SCALE = {
    "ResNet-34 B": "21.84 / 5.71",
    "ResNet-34 C": "21.53 / 5.60",
    "ResNet-50 B": "20.74 / 5.25",
    "ResNet-101 B": "19.87 / 4.60",
    "ResNet-152 B": "19.38 / 4.49",
}
"""Top-1 / top-5 error at five scales, Table 4."""
PAPER_ERRORS = {"ten-crop": PAPER_TEN_CROP, "multi-scale": PAPER_MULTI_SCALE}

PLAIN_DEGRADE = rp.Claim(
    id="C14",
    statement="On ImageNet the deeper plain network is worse, the deeper residual network better",
    section="§4.1; Table 2, Fig. 4",
    paper="10-crop top-1 error at 18 → 34 layers: plain 27.94 → 28.54 %, residual 27.88 → 25.03 %; training errors likewise",
    falsifier="plain-34 not above plain-18, or ResNet-34 not below ResNet-18, in training or in validation error "
    "(the ResNets are not judged where the shallower fits every training image and the deeper nearly all)",
)
DEEPER_IS_BETTER = rp.Claim(
    id="C15",
    statement="Residual networks of 50, 101 and 152 layers err less the deeper they are, and less than 34 layers",
    section="§4.1; Tables 3, 4",
    paper="10-crop top-1 error at 34 → 50 → 101 → 152 layers: 24.52 (B) → 22.85 → 21.75 → 21.43 %; at five scales 21.84 → "
    "20.74 → 19.87 → 19.38 %",
    falsifier="a deeper network's validation error not below that of the next shallower one (not judged where that fits every "
    "training image and the deeper nearly all)",
)


@dataclass(frozen=True)
class Options(rp.Options):
    """Which of Table 1's networks, how large, and how they are tested."""

    data: str = "digits-64"
    """data set: folder:PATH for class folders of images, or digits-64, the embedded digits enlarged"""
    depths: tuple[int, ...] = (18, 34)
    """depths of plain and residual networks: 18 34, or those of Table 1 that fit `--block`"""
    deep: tuple[int, ...] = ()
    """depths of residual networks of bottlenecks with option B beside them: 50 101 152"""
    shortcuts: tuple[str, ...] = ("A",)
    """shortcuts of the residual networks at `--depths`; those after the first at the greatest depth only, as in Table 3"""
    width: int = WIDTH
    """filters of the first layer; those of the stages in proportion"""
    crop: int = CROP
    """side of the crops in pixels, for image files; the scales they are cropped at in proportion"""
    batch: int = BATCH
    """images of a mini-batch, over all processes"""
    protocols: tuple[str, ...] = PROTOCOLS
    """tests of finished networks: single-view, ten-crop, multi-scale; the last two need image files"""
    weights: tuple[str, ...] = ()
    """what to test instead of training: weight files of torchvision's ResNets and VGGs, or folders of runs"""
    shortcut: tyro.conf.Suppress[str] = "A"


def plan(options: Options) -> list[rp.Planned]:
    """Plain and residual twins at every depth, further shortcuts at the greatest (Table 3), and the bottleneck networks."""
    _check(options)
    if options.weights:
        return []
    planned = []
    recipe, shape = _recipe(options), {"block": options.block, "width": options.width}
    for depth in options.depths:
        labels = {"kind": "plain", "shortcut": "none", "depth": depth}
        planned.append(rp.Planned(labels, f"imagenet/plain-{depth}", shape, recipe=recipe))
        for shortcut in options.shortcuts if depth == max(options.depths) else options.shortcuts[:1]:
            labels = {"kind": "residual", "shortcut": shortcut, "depth": depth}
            planned.append(
                rp.Planned(labels, f"imagenet/resnet-{depth}", shape | {"shortcut": shortcut}, recipe=recipe)
            )
    for depth in options.deep:
        labels = {"kind": "residual", "shortcut": "B", "depth": depth}
        planned.append(rp.Planned(labels, f"imagenet/resnet-{depth}", {"width": options.width}, recipe=recipe))
    return planned


def _check(options: Options) -> None:
    layers = rp.BLOCKS[options.block].weighted_layers
    _among("depths", options.depths, DEPTHS.get(layers, ()), f" with block {options.block!r} (Table 1)")
    _among("deep", options.deep, DEPTHS[3], " (Table 1)")
    _among("protocols", options.protocols, PROTOCOLS)
    shortcuts = options.shortcuts
    if not shortcuts or len(set(shortcuts)) < len(shortcuts) or "none" in shortcuts:
        raise rp.UsageError(
            f"shortcuts (={' '.join(shortcuts)}) must be given, each once (plain networks are always there)"
        )
    if not options.protocols:
        raise rp.UsageError(f"protocols (=) must be given; accepted: {', '.join(PROTOCOLS)}")
    rp.check_whole("crop", options.crop, 32, ": the networks halve it five times")
    if not options.data.startswith("folder"):
        needing = "weights" if options.weights else "protocols" if set(options.protocols) != {"single-view"} else None
        if needing:
            raise rp.UsageError(
                f"{needing} (={' '.join(getattr(options, needing))}) cannot be used with data (={options.data!r}); "
                "accepted: --data folder:PATH"
            )


def _among(name: str, values: tuple, accepted, note: str = "") -> None:
    if set(values) - set(accepted) or len(set(values)) < len(values):
        raise rp.UsageError(
            f"{name} (={' '.join(map(str, values))}) must be different ones of {', '.join(map(str, accepted))}{note}"
        )


def _recipe(options: Options):
    """The recipe of the data with this study's mini-batch and, of image files, its crop and scales in proportion."""

    def change(recipe: rp.Recipe) -> rp.Recipe:
        if recipe.name == rp.recipes.imagenet_paper().name:  # of files
            low, high = (round(side * options.crop / CROP) for side in recipe.scale)
            recipe = replace(recipe, crop=options.crop, scale=(low, high))
        elif "multi-scale" in options.protocols:
            raise rp.UsageError(
                f"protocols (={' '.join(options.protocols)}): small images of one size, as those of {options.data}, have no "
                "other scales; accepted: single-view, ten-crop"
            )
        return replace(recipe, batch_size=options.batch)

    return change


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a network, seed and protocol: `error` and `top5_error` in percent, of `images`; `parameters`."""
    import pandas

    data, rows = rp.load_data(results.options.data).cropped(results.options.crop), []
    for labels, network in _networks(results):
        labels |= {"parameters": sum(parameter.numel() for parameter in network.parameters())}
        for protocol in results.options.protocols:
            found = rp.evaluate(network, data, protocol, device=results.device, precision=results.precision)
            figures = {"images": found.images, "error": found.error, "top5_error": found.top5_error}
            rows.append(labels | {"protocol": protocol} | figures)
    return pandas.DataFrame(rows)


def _networks(results: rp.Results) -> Iterator[tuple[dict, rp.Network]]:
    """Labels and networks: those of the runs, or those that `--weights` names."""
    for row, run in zip(results.table.itertuples(), results.runs, strict=True):
        yield {"kind": row.kind, "shortcut": row.shortcut, "depth": row.depth, "seed": row.seed}, run.network
    for seed, path in enumerate(results.options.weights):  # files are told apart as seeds are
        network = rp.load_network(path)
        if not network.spec.family.startswith("imagenet/"):
            raise rp.UsageError(
                f"weights (={path!r}) are those of {network.spec.name}, which is none of ImageNet's networks"
            )
        kind, shortcut = network.spec.kind, network.spec.get("shortcut", "none")
        yield {"kind": kind, "shortcut": shortcut, "depth": network.depth, "seed": seed}, network


def judge(results: rp.Results) -> list[rp.Verdict]:
    return [_judge_degradation(results), _judge_gain(results)]


def _judge_degradation(results: rp.Results) -> rp.Verdict:
    options = results.options
    shallow, deep = min(options.depths), max(options.depths)
    if options.weights or shallow == deep:
        reason = "of weights the training error is not known" if options.weights else "two depths are needed"
        return rp.Verdict(PLAIN_DEGRADE, "not tested", "no plain and residual networks of two depths", reason)
    protocol, measured, parts, evidence = _protocol(results), [], [], []
    for kind, higher, lower in (("plain", deep, shallow), ("residual", shallow, deep)):
        unfitted, trained = (
            [_errors(results, kind, depth, column) for depth in (shallow, deep)] for column in (UNFITTED, "train_error")
        )
        for part, column in (("training", "train_error"), ("validation", None)):
            errors = {depth: _errors(results, kind, depth, column) for depth in (shallow, deep)}
            comparison = rp.compare(errors[higher], errors[lower])
            word, reason = (comparison.verdict, "") if kind == "plain" else comparison.gain(*unfitted)
            measured.append(f"{kind} {part} {rp.mean_std(errors[shallow])} → {rp.mean_std(errors[deep])} %")
            above, below = network_name(kind, higher), network_name(kind, lower)
            said = f"{part} error, {above} above {below}: {comparison}"
            # One kind of network may have learned, and the other not.
            found = rp.if_learned(rp.Verdict(PLAIN_DEGRADE, word, "", said), *trained, opposite=comparison.reversed)
            parts.append(found.verdict)
            evidence += filter(None, [found.evidence, reason])
    return rp.Verdict(
        PLAIN_DEGRADE,
        rp.all_of(parts),
        f"error at {shallow} → {deep} layers ({protocol}): " + ", ".join(measured),
        "; ".join(dict.fromkeys(evidence)),
    )


def _judge_gain(results: rp.Results) -> rp.Verdict:
    table = results.measurements
    residual = table[(table["kind"] == "residual") & (table["depth"] >= 34)]
    depths = sorted(residual["depth"].unique())
    if len(depths) < 2:
        return rp.Verdict(DEEPER_IS_BETTER, "not tested", "one depth of 34 layers or more", "two depths are needed")
    errors = {depth: _errors(results, "residual", depth, option_b=True) for depth in depths}
    of_runs = [] if results.options.weights else depths
    unfitted = {depth: _errors(results, "residual", depth, UNFITTED, option_b=True) for depth in of_runs}
    parts, evidence = [], []
    for shallow, deep in itertools.pairwise(depths):
        comparison = rp.compare(errors[shallow], errors[deep], margin=SMALLEST_STEP)
        word, reason = comparison.gain(unfitted.get(shallow, []), unfitted.get(deep, []))
        parts.append(word)
        evidence.append(f"ResNet-{shallow} above ResNet-{deep}: {comparison}" + (f" ({reason})" if reason else ""))
    if missing := [str(depth) for depth in (34, *DEPTHS[3]) if depth not in depths]:
        parts.append("inconclusive")
        evidence.append(f"not there: {', '.join(missing)} layers")
    if results.options.weights:
        falling = all(fmean(errors[deep]) < fmean(errors[shallow]) for shallow, deep in itertools.pairwise(depths))
        evidence.append(
            f"the order is {'the paper’s' if falling else 'not the paper’s'}; the order only is to be compared, since "
            "published weights come from another recipe"
        )
    path = " → ".join(rp.mean_std(errors[depth]) for depth in depths)
    return rp.Verdict(
        DEEPER_IS_BETTER,
        rp.all_of(parts),
        f"top-1 error ({_protocol(results)}) {path} % at {', '.join(map(str, depths))} layers",
        "; ".join(evidence),
    )


def _protocol(results: rp.Results) -> str:
    """What verdicts rest on: 10-crop, as Tables 2 and 3, where it was measured."""
    order = ("ten-crop", "single-view", "multi-scale")
    return next(protocol for protocol in order if protocol in results.options.protocols)


def _errors(
    results: rp.Results, kind: str, depth: int, column: str | None = None, *, option_b: bool = False
) -> list[float]:
    """Errors, one a seed: a `column` of the trainings, or validation errors under the protocol of the verdicts.

    Where there are several shortcuts, those of the study's first; with `option_b` those of option B, which deeper networks
    have, if it is there.
    """
    table = results.measurements
    rows = table[(table["kind"] == kind) & (table["depth"] == depth) & (table["protocol"] == _protocol(results))]
    chosen = rows["shortcut"].iloc[0]
    if option_b and "B" in set(rows["shortcut"]):
        chosen = "B"
    if column is not None:
        return results.values(column, kind=kind, depth=depth, shortcut=chosen)
    return rows[rows["shortcut"] == chosen].sort_values("seed")["error"].tolist()


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    options, measured, trained = results.options, results.measurements, len(results.table) > 0
    size = f", networks {options.width} filters wide instead of {WIDTH}" if trained and options.width != WIDTH else ""
    on = (Path(options.data.partition(":")[2]).name or options.data) + size
    drawings = {"figure": _figure_4(results, on)} if trained else {}
    panels = {protocol: measured[measured["protocol"] == protocol] for protocol in options.protocols}
    if trained:
        panels = {"training": results.table.assign(error=results.table["train_error"])} | panels
    figure, axes = rp.figures.new_figure(len(panels), width=4.6)
    axes[0].set_ylim(0, 1.1 * max(1.0, *(table["error"].max() for table in panels.values())))  # one scale for all
    for axis, (name, table) in zip(axes, panels.items(), strict=True):
        further = table["depth"].isin(options.depths) & table["shortcut"].isin(options.shortcuts[1:]) & trained
        rp.figures.error_against_depth(axis, table[~further], "error")
        axis.set_title("training error" if name == "training" else f"validation error, {name}")
    axes[0].set_ylabel("top-1 error (%)")
    drawings["figure-depth"] = rp.Drawing(
        figure,
        f"Top-1 error of the finished networks against depth on {on}: mean ± std, a dot for each network.",
        "Error against depth, a panel for each way of testing. " + _final_errors_said(results),
    )
    return drawings


def _figure_4(results: rp.Results, on: str) -> rp.Drawing:
    options, histories = results.options, results.histories
    histories = histories[
        histories["depth"].isin(options.depths) & histories["shortcut"].isin(["none", options.shortcuts[0]])
    ]
    top = rp.figures.error_limit(histories)
    parts = {f"{kind} networks": histories[histories["kind"] == kind] for kind in ("plain", "residual")}
    figure = rp.figures.curves_beside(parts, "depth", top=top, tested="validation error", label="{} layers")
    figure.axes[0].set_ylabel("top-1 error (%)")
    over = results.over_seeds(band=True)
    return rp.Drawing(
        figure,
        f"Training on {on}, in the manner of Fig. 4: plain networks (left) and residual networks (right); {over}. Dashed: "
        "training error; bold: validation error of the centre crop (of images in memory, the whole image).",
        "Error over iterations, one line a depth. " + _final_errors_said(results),
    )


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """One row a network, beside Tables 2, 3 and 4."""
    import pandas

    beside_paper = not results.options.weights and study.beside_paper(results.options)
    training = {} if results.table.empty else dict(list(results.table.groupby(["kind", "shortcut", "depth"])))
    rows = []
    for key, group in results.measurements.groupby(["kind", "shortcut", "depth"], sort=False):
        name = _name(*key)
        row = {"network": name, "parameters": f"{group['parameters'].iloc[0]:,}"}
        row["training error (%)"] = rp.mean_std(training[key]["train_error"].tolist()) if key in training else "–"
        for protocol, tested in group.groupby("protocol", sort=False):
            top1, top5 = (rp.mean_std(tested[column].tolist()) for column in ("error", "top5_error"))
            row[f"{protocol}, top-1 / top-5 (%)"] = f"{top1} / {top5}"
        for protocol, printed in PAPER_ERRORS.items():
            said, top1 = printed.get(name, "–"), group.loc[group["protocol"] == protocol, "error"].tolist()
            if name in printed and top1 and beside_paper:
                said += f" (top-1 {rp.from_paper(top1, float(said.split()[0]))})"
            row[f"paper, {protocol}, ImageNet (%)"] = said
        rows.append(row | {"seeds": group["seed"].nunique()})
    return pandas.DataFrame(rows)


def _name(kind: str, shortcut: str, depth: int) -> str:
    return network_name(kind, depth) + (f" {shortcut}" if kind == "residual" else "")


def _final_errors_said(results: rp.Results) -> str:
    """Final validation errors, for those who cannot see a figure."""
    table, protocol = results.measurements, _protocol(results)
    means = table[table["protocol"] == protocol].groupby(["kind", "shortcut", "depth"], sort=False)["error"].mean()
    said = [f"{_name(*key)} {error:.1f} %" for key, error in means.items()]
    return f"Mean validation error ({protocol}): " + ", ".join(said) + "."


study = rp.Study(
    name="imagenet",
    title="On ImageNet, deeper plain networks degrade and deeper residual networks gain",
    description=(
        "Trains the networks of Table 1 on class folders of images, or tests published weights (claims C14 and C15; "
        "§3.4, §4.1, Fig. 4, Tables 2 to 4)."
    ),
    claims=(PLAIN_DEGRADE, DEEPER_IS_BETTER),
    presets={
        "quick": Options(
            preset="quick",
            data="digits-64",
            seeds=(0, 1, 2),
            iterations=400,
            width=16,
            batch=64,
            protocols=("single-view",),
        ),
        "paper": Options(
            preset="paper",
            data="folder",
            deep=DEPTHS[3],
            shortcuts=("A", "B", "C"),
            seeds=(0, 1, 2),
            iterations=600_000,
        ),
    },
    plan=plan,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    leaves_open=rp.lacks_depths,
    paper_data="ImageNet",
    rules=(
        f"C15's margin is {SMALLEST_STEP} points, below the paper's own smallest gain. {NO_GAIN_FROM_DEPTH} A claim of several "
        "parts holds if all of them do, and fails if one does."
    ),
)

if __name__ == "__main__":
    raise SystemExit(study.main())
