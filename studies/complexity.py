"""Complexity: identity shortcuts cost nothing, and depth with bottlenecks costs less than VGG.

Claims C10, C11, C12 and C22 (§3.2, §3.3, §4.1, §4.2; Table 1, Table 6).

    python -m studies.complexity                      # half a minute; counts are exact, nothing is trained
    python -m studies.complexity --preset paper       # with the 1202-layer network, and more timings
    python -m studies.complexity --plugin my_block.py --block my-block

The paper prints multiply-adds and calls them FLOPs. Here they are `macs`: multiply-adds of convolutions and fully
connected layers for one image. An audit rests on no seed: what would refute it is a single unequal digit.

Measured (2026-11-22, two cores of an AMD EPYC, torch 2.15.0; record in docs/measurements/2026-11-21-complexity):
- quick, 38 s: 10 of 10 pairs equal; ResNet-18 to -152 1.79, 3.64, 3.86, 7.57, 11.28 × 10⁹ multiply-adds, VGG-16
  and -19 15.35 and 19.63; a 256-d block 69,632 → 135,168 weights. C10 to C12 hold; C22 fails,
  since one of the three networks that Table 6 prints beside ResNet-110 is smaller. One thread's forward pass takes
  263 ms for ResNet-152 and 172 ms for VGG-16, for all its multiply-adds; it holds 10 MiB of tensors at most for ResNet-50,
  -101 and -152 alike, and 24.5 for VGG-16;
- paper (no record): the same, with 11 of 11 pairs equal, those of 1202 layers with 19,421,274 parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import tyro

import resprobe as rp
from resprobe.tables import network_name

if TYPE_CHECKING:
    import pandas

PAPER_MACS = {
    "imagenet/resnet-18": 1.8e9,
    "imagenet/resnet-34": 3.6e9,
    "imagenet/resnet-50": 3.8e9,
    "imagenet/resnet-101": 7.6e9,
    "imagenet/resnet-152": 11.3e9,
    "imagenet/vgg-16": 15.3e9,
    "imagenet/vgg-19": 19.6e9,
}
"""Table 1 (ResNets) and §4.1 (VGG)."""
PAPER_PARAMETERS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6, 1202: 19.4e6}
"""Table 6."""
THIN_AND_DEEP = {"FitNet-19": 2.5e6, "Highway-19": 2.3e6, "Highway-32": 1.25e6}
"""Parameters of other methods' networks, as Table 6 quotes them."""
TOLERANCE = 0.1e9
"""How far a count may be from a printed figure: 3.858e9 is printed as 3.8e9, while the stride in the 3×3 convolution
(4.09e9) would not pass. VGG-16's 15.3e9 leaves out the fully connected layers."""
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)

IDENTITY_IS_FREE = rp.Claim(
    id="C10",
    statement="A plain network and its residual twin with identity shortcuts cost the same",
    section="§3.2, §4.2",
    paper="the same number of parameters, depth, width and computational cost, but for the element-wise addition",
    falsifier="any difference in parameters or multiply-adds between a plain network and its option-A twin",
)
DEEP_IS_CHEAP = rp.Claim(
    id="C11",
    statement="Even 152 layers cost less than VGG-16",
    section="Table 1, §4.1",
    paper="1.8, 3.6, 3.8, 7.6, 11.3 × 10⁹ for 18 to 152 layers; VGG-16 and -19: 15.3 and 19.6 × 10⁹",
    falsifier="a count that differs from the printed one by more than 0.1 × 10⁹, or 152 layers above VGG-16",
)
PROJECTIONS_DOUBLE = rp.Claim(
    id="C12",
    statement="Projection shortcuts would double the size of a bottleneck block",
    section="§4.1 (Deeper Bottleneck Architectures)",
    paper="time complexity and model size are doubled if the identity shortcut is replaced with projection",
    falsifier="a block whose weights grow by less than 1.5 times",
)
FEWER_PARAMETERS = rp.Claim(
    id="C22",
    statement="ResNet-110 has fewer parameters than other deep and thin networks, FitNet and Highway",
    section="§4.2, Table 6",
    paper="1.7 M parameters; FitNet-19 2.5 M, Highway-19 2.3 M, Highway-32 1.25 M",
    falsifier="one of those rows with no more parameters than ResNet-110, counted",
)


@dataclass(frozen=True)
class Options(rp.Options):
    """`repeats` timings of each forward pass; the options of trainings are put away."""

    preset: Literal["quick", "paper"] = "quick"
    """quick: all networks of Tables 1 and 6 but that of 1202 layers. paper: with it, and more timings. Nothing is trained."""
    repeats: int = 5
    """timed forward passes a network; the fastest is shown"""
    data: tyro.conf.Suppress[str] = "digits"
    seeds: tyro.conf.Suppress[tuple[int, ...]] = (0,)
    iterations: tyro.conf.Suppress[int] = 1
    shortcut: str = "A"
    """a shortcut to count in CIFAR's networks beside A, B and C, which always are (highway, or one that a plugin registers)"""
    concurrency: tyro.conf.Suppress[str] = "1"
    executor: tyro.conf.Suppress[str] = "local"
    address: tyro.conf.Suppress[str] = ""
    runs: tyro.conf.Suppress[str] = "runs"
    probe: tyro.conf.Suppress[tuple[str, ...]] = ()
    recipe: tyro.conf.Suppress[tuple[str, ...]] = ()
    precision: tyro.conf.Suppress[Literal["fp32"]] = "fp32"
    recompute: tyro.conf.Suppress[bool] = False
    step: tyro.conf.Suppress[Literal["auto"]] = "auto"
    deterministic: tyro.conf.Suppress[bool] = False


def measure(results: rp.Results) -> pandas.DataFrame:
    """One row a network: its counts, and for those that the paper prints the time and memory of a forward pass."""
    import pandas

    rows = []
    for name, chosen in _of_cifar(results.options):
        rows.append(_count(name, "residual" if "shortcut" in chosen else "plain", (3, 32, 32), **chosen))
    for depth in IMAGENET_DEPTHS:
        for kind, shortcut in (("plain", None), ("residual", "A"), ("residual", "B"), ("residual", "C")):
            chosen = {"shortcut": shortcut} if shortcut else {}
            name = f"imagenet/{'plain' if kind == 'plain' else 'resnet'}-{depth}"
            row = _count(name, kind, (3, 224, 224), **chosen)
            timed = shortcut == _table_1_option(depth) or (depth, shortcut) == (50, "C")  # C12 compares B and C
            rows.append(row | (_time(name, results, **chosen) if timed else {}))
    for depth in (16, 19):
        rows.append(_count(f"imagenet/vgg-{depth}", "VGG", (3, 224, 224)) | _time(f"imagenet/vgg-{depth}", results))
    return pandas.DataFrame(rows)


def plan(options: Options) -> list[rp.Planned]:
    """Nothing to be trained. What cannot be counted is said here, by a dry run too."""
    rp.check_whole("repeats", options.repeats, 1)
    for name, chosen in _of_cifar(options):
        rp.networks.check_family(rp.networks.resolve(name, **chosen))
    return []


def _of_cifar(options: Options) -> Iterator[tuple[str, dict[str, str]]]:
    """At every depth the plain network and the residual ones, and beside another block's those of basic blocks: names and
    options."""
    for depth in options.depths:
        yield f"cifar/plain-{depth}", {"block": options.block}
        for shortcut in dict.fromkeys(("A", "B", "C", options.shortcut)):
            yield f"cifar/resnet-{depth}", {"block": options.block, "shortcut": shortcut}
        if options.block != "basic" and (depth - 2) % rp.networks.depth_step("basic") == 0:
            yield f"cifar/plain-{depth}", {"block": "basic"}
            yield f"cifar/resnet-{depth}", {"block": "basic", "shortcut": "A"}


def _table_1_option(depth: int) -> str:
    """Shortcuts of the networks in Table 1: A for 18 and 34 layers, B above (§4.1)."""
    return "A" if depth < 50 else "B"


def _count(name: str, kind: str, image: tuple[int, int, int], **options: str) -> dict:
    """Parameters and multiply-adds, counted without any arithmetic."""
    from plugins import flops

    total = flops.of_named(name, image, **options)
    counted = {"parameters": int(total["parameters"]), "macs": int(total["macs"])}
    spec = rp.networks.resolve(name, **options)
    labels = {
        "network": name,
        "kind": kind,
        "depth": spec.depth,
        "block": spec.get("block"),
        "shortcut": options.get("shortcut"),
    }
    return labels | counted | {"image": image[1]}


def _time(name: str, results: rp.Results, **options: str) -> dict[str, float]:
    """Time of the fastest forward pass of one image in eval mode, and the memory it takes beside the weights."""
    import torch

    from resprobe.devices import fastest, memory_format, place
    from resprobe.memory import peak_memory

    device = torch.device(results.device)
    network = rp.build(name, **options).eval()
    place(network, device)
    image = torch.randn(1, 3, 224, 224, device=device).contiguous(memory_format=memory_format(device))
    with torch.inference_mode(), rp.cpu_threads(1):
        network(image)  # the first pass prepares kernels
        memory = peak_memory(lambda: network(image)) / 2**20
        soonest = fastest(lambda: network(image), device, results.options.repeats)
    return {"forward_ms": 1000 * soonest, "forward_mib": memory}


def judge(results: rp.Results) -> list[rp.Verdict]:
    return [
        _judge_identity(results),
        _judge_table_1(results),
        _judge_projections(results),
        _judge_table_6(results.options),
    ]


def _judge_identity(results: rp.Results) -> rp.Verdict:
    counts = results.measurements
    unequal, pairs = [], 0
    for _, group in counts[counts["kind"] != "VGG"].groupby(
        [counts["network"].str.split("/").str[0], "depth", "block"]
    ):
        plain = group[group["kind"] == "plain"].iloc[0]
        twin = group[group["shortcut"] == "A"].iloc[0]
        pairs += 1
        if (plain["parameters"], plain["macs"]) != (twin["parameters"], twin["macs"]):
            unequal.append(f"{twin['network']} ({twin['parameters'] - plain['parameters']:+,} parameters)")
    return rp.Verdict(
        IDENTITY_IS_FREE,
        "fails" if unequal else "holds",
        f"{pairs - len(unequal)} of {pairs} pairs equal to the last digit"
        + (f"; not {', '.join(unequal)}" if unequal else ""),
        "parameters and multiply-adds of plain and option-A networks, counted; additions are not multiply-adds",
    )


def _judge_table_1(results: rp.Results) -> rp.Verdict:
    ours = {name: _printed(results, name) for name in PAPER_MACS}
    off = [name for name, macs in ours.items() if abs(macs - PAPER_MACS[name]) > TOLERANCE]
    cheaper = ours["imagenet/resnet-152"] < ours["imagenet/vgg-16"]
    figures = ", ".join(f"{rp.networks.resolve(name).label} {macs / 1e9:.2f}" for name, macs in ours.items())
    return rp.Verdict(
        DEEP_IS_CHEAP,
        "holds" if cheaper and not off else "fails",
        f"{figures} × 10⁹ multiply-adds",
        (f"not within 0.1 × 10⁹: {', '.join(off)}" if off else "all within 0.1 × 10⁹ of what is printed")
        + f"; 152 layers cost {'less' if cheaper else 'more'} than VGG-16. VGG without its fully connected layers for VGG-16 "
        "(15.3), as printed; options as in Table 1: A for 18 and 34 layers, B above",
    )


def _printed(results: rp.Results, name: str) -> int:
    """Our count of what the paper printed."""
    counts = results.measurements
    rows = counts[counts["network"] == name]
    if name == "imagenet/vgg-16":
        # 15.3e9 is the convolutions' alone: three fully connected layers of 7·7·512 → 4096 → 4096 → 1000.
        return int(rows["macs"].iloc[0]) - (7 * 7 * 512 * 4096 + 4096 * 4096 + 4096 * 1000)
    if "resnet" in name:
        rows = rows[rows["shortcut"] == _table_1_option(int(name.rpartition("-")[2]))]
    return int(rows["macs"].iloc[0])


def _judge_projections(results: rp.Results) -> rp.Verdict:
    def weights(shortcut: str) -> int:
        """Convolution weights of a 256-d bottleneck, as the paper counts: without normalization."""
        block = rp.BLOCKS["bottleneck"](256, 64, shortcut=shortcut)
        return sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 4)

    counts = results.measurements
    fifty = counts[counts["network"] == "imagenet/resnet-50"].set_index("shortcut")
    identity, projected = weights("B"), weights("C")
    growth = projected / identity
    whole, slower = fifty["macs"]["C"] / fifty["macs"]["B"], fifty["forward_ms"]["C"] / fifty["forward_ms"]["B"]
    return rp.Verdict(
        PROJECTIONS_DOUBLE,
        "holds" if growth >= 1.5 else "fails",
        f"weights of a 256-d block {identity:,} → {projected:,} (× {growth:.2f})",
        f"the whole of ResNet-50 with projections everywhere (C) against option B: multiply-adds × {whole:.2f}, parameters × "
        f"{fifty['parameters']['C'] / fifty['parameters']['B']:.2f}, measured forward time × {slower:.2f}",
    )


def _judge_table_6(options: Options) -> rp.Verdict:
    """The verdict on ResNet-110, of the block and shortcut asked for. The other methods' networks are not built here: their
    figures are the paper's."""
    chosen = {"block": options.block, "shortcut": options.shortcut}
    own = "".join(f", {value}" for name, value in chosen.items() if value != getattr(_QUICK, name))
    ours = {}
    for depth in (56, 110):
        try:
            ours[depth] = _count(f"cifar/resnet-{depth}", "residual", (3, 32, 32), **chosen)["parameters"]
        except rp.UsageError as error:
            if depth == 110:
                return rp.Verdict(FEWER_PARAMETERS, "not tested", f"no ResNet-110 of block {options.block}", str(error))
    larger = [name for name, parameters in THIN_AND_DEEP.items() if parameters > ours[110]]
    others = [name for name in THIN_AND_DEEP if name not in larger]
    below_all = 56 in ours and ours[56] < min(THIN_AND_DEEP.values())
    return rp.Verdict(
        FEWER_PARAMETERS,
        "fails" if others else "holds",
        f"ResNet-110{own} {ours[110]:,} parameters: fewer than {' and '.join(larger) or 'none of them'}"
        + (f", not fewer than {' and '.join(others)}" if others else ""),
        "ours counted, the others as Table 6 quotes them: "
        + ", ".join(f"{name} {parameters / 1e6:g} M" for name, parameters in THIN_AND_DEEP.items())
        + (f"; ResNet-56, with {ours[56]:,}, has fewer than all of them" if below_all else ""),
    )


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    counts = results.measurements
    imagenet = counts[counts["image"] == 224]
    vgg = imagenet[imagenet["kind"] == "VGG"]
    lines = {label: imagenet[imagenet["shortcut"] == label] for label in "ABC"}
    lines = {"plain": imagenet[imagenet["kind"] == "plain"]} | lines
    palette = rp.figures.colours([*lines, "VGG"])
    figure, (cost, measured) = rp.figures.new_figure(2, share_y=False)

    ends = []
    for (label, rows), marker in zip(lines.items(), "oxs^", strict=True):
        cost.plot(rows["depth"], rows["macs"] / 1e9, color=palette[label], marker=marker, lw=1 if label == "A" else 2)
        ends.append((float(rows["macs"].iloc[-1] / 1e9), label, palette[label]))
    printed = [(int(name.rpartition("-")[2]), macs / 1e9) for name, macs in PAPER_MACS.items()]
    cost.plot(
        *zip(*printed, strict=True), ls="", marker="+", ms=13, mew=1.6, color="0.15", label="printed in the paper"
    )
    cost.set_title("multiply-adds")
    cost.set_ylabel("10⁹ multiply-adds (one 224×224 image)")

    table_1 = imagenet[imagenet["shortcut"] == imagenet["depth"].map(_table_1_option)]
    measured.plot(table_1["depth"], table_1["forward_ms"], color=palette["B"], marker="s", lw=2)
    measured.set_title("measured forward time")
    measured.set_ylabel("milliseconds (one 224×224 image)")
    for axis, column, scale in ((cost, "macs", 1e-9), (measured, "forward_ms", 1.0)):
        axis.plot(vgg["depth"], vgg[column] * scale, color=palette["VGG"], marker="D", lw=2)
        last = (int(vgg["depth"].iloc[-1]), float(vgg[column].iloc[-1] * scale))
        axis.annotate("VGG", last, xytext=(9, 0), textcoords="offset points", va="center", fontweight="bold")
        axis.set_xticks(IMAGENET_DEPTHS)
        axis.set_xlabel("depth (weighted layers)")
        axis.set_ylim(bottom=0)
    rp.figures.label_ends(cost, ends)
    rp.figures.label_ends(measured, [(float(table_1["forward_ms"].iloc[-1]), "ResNet", palette["B"])])
    cost.legend(frameon=False, loc="lower right")
    deep, wide = _printed(results, "imagenet/resnet-152") / 1e9, _printed(results, "imagenet/vgg-16") / 1e9
    return {
        "figure": rp.Drawing(
            figure,
            "Cost against depth of the ImageNet networks. Left: multiply-adds by shortcut option, with the paper's printed "
            "figures; plain networks lie exactly under option A. Right: time of the fastest of several forward passes "
            "of the networks of Table 1 and of VGG on this machine, by one thread where it is a CPU's.",
            f"Cost against depth. ResNet-152 has {deep:.1f} billion multiply-adds, VGG-16 {wide:.1f} billion.",
        )
    }


def tabulate(results: rp.Results) -> pandas.DataFrame:
    """Table 1 and Table 6: ours beside the paper's."""
    import pandas

    rows = []
    for row in results.measurements.itertuples():
        family = row.network.partition("/")[0]
        paper_macs = paper_parameters = ""
        if row.network in PAPER_MACS and (row.kind == "VGG" or row.shortcut == _table_1_option(row.depth)):
            paper_macs = f"{PAPER_MACS[row.network] / 1e9:.1f} × 10⁹"
        if family == "cifar" and row.shortcut == "A" and row.block == "basic" and row.depth in PAPER_PARAMETERS:
            paper_parameters = f"{PAPER_PARAMETERS[row.depth] / 1e6:g} M"
        own = [row.block] if family == "cifar" and row.block != "basic" else []
        shortcut = [row.shortcut] if isinstance(row.shortcut, str) else []
        rows.append(
            {
                "network": ", ".join([f"{network_name(row.kind, row.depth)} ({family})", *own, *shortcut]),
                "parameters": f"{row.parameters:,}",
                "paper's parameters": paper_parameters,
                "multiply-adds": f"{row.macs:,}",
                "paper's FLOPs": paper_macs,
                "forward (ms)": _figure(row.forward_ms, 1),
                "memory of a pass (MiB)": _figure(row.forward_mib, 1),
            }
        )
    return pandas.DataFrame(rows)


def _figure(value: float, digits: int) -> str:
    """A number for the table; nothing where none was measured."""
    return "" if value != value else f"{value:,.{digits}f}"


_QUICK = Options(preset="quick", depths=(20, 32, 44, 56, 110))

study = rp.Study(
    name="complexity",
    title="Identity shortcuts are free, and depth is cheap",
    description=(
        "Counts parameters and multiply-adds of every network of Tables 1 and 6, measures forward time and memory, and "
        "puts them beside the paper's figures (claims C10, C11, C12, C22)."
    ),
    claims=(IDENTITY_IS_FREE, DEEP_IS_CHEAP, PROJECTIONS_DOUBLE, FEWER_PARAMETERS),
    presets={"quick": _QUICK, "paper": replace(_QUICK, preset="paper", depths=(20, 32, 44, 56, 110, 1202), repeats=9)},
    plan=plan,
    measure=measure,
    judge=judge,
    draw=draw,
    tabulate=tabulate,
    how_sure=(
        "Counts are exact: an audit has no seeds and no spread. Times are the fastest of a few passes in float32, on a CPU by "
        "one thread, on a machine that may be busy with other things; no verdict rests on them."
    ),
)

if __name__ == "__main__":
    raise SystemExit(study.main())
