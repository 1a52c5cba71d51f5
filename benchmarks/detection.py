"""Detection's speed beside torchvision's own Faster R-CNN, as ratios in one run, and where the time goes.

    python -m benchmarks.detection [--backbone imagenet/resnet-50] [--side 224] [--images 1] [--rounds 3] [--device auto]

Variants, each on the same random images with four objects, 300 proposals at test and 1000 in training, in interleaved
rounds, weights random:

- ours: `faster_rcnn` around the backbone, as the paper wires it (conv5_x runs once a region, no feature pyramid);
- torchvision: `fasterrcnn_resnet50_fpn`, a feature pyramid with two small fc layers a region.

They are different detectors: what is compared is what a user of either waits for, and not how well a design was written.
Where the time goes is shares of ours, in inference.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import resprobe as rp
from benchmarks.measuring import Spread, ratios, seconds, write_json
from benchmarks.training import precisions
from plugins.detection import faster_rcnn
from resprobe.commands import Parser, answer
from resprobe.devices import resolve_device, synchronize
from resprobe.environment import environment

CLASSES = 21
PARTS = ("transform", "backbone", "rpn", "roi_heads")


def precision(device: torch.device) -> str:
    """What torch, as it is set, computes float32 convolutions in: TF32 on a card that has it."""
    return "tf32" if "tf32" in precisions(device) else "fp32"


def subjects(backbone: str, side: int, device: torch.device) -> dict[str, nn.Module]:
    """Both detectors with the same input size, proposals and batch normalization (frozen)."""
    network = _settled(rp.build(backbone), side)
    ours = faster_rcnn(network, CLASSES, shorter_side=side, longer_side=side, proposals_train=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without weights all layers train, of which torchvision warns
        theirs = fasterrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=CLASSES,
            min_size=side,
            max_size=side,
            rpn_post_nms_top_n_train=1000,
            rpn_post_nms_top_n_test=300,
            box_batch_size_per_image=128,
        )
    return {"ours": ours.to(device), "torchvision": theirs.to(device)}


def _settled(network: nn.Module, side: int) -> nn.Module:
    """The network with the running statistics of random images: fixed ones of an untrained network would let activations grow."""
    channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    network.train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.rand(2, channels, side, side))
    return network.eval()


def batch(images: int, side: int, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Random images with four boxes each."""
    corners = torch.tensor([[0.1, 0.1], [0.5, 0.1], [0.1, 0.5], [0.5, 0.5]], device=device) * side
    target = {"boxes": torch.cat([corners, corners + 0.35 * side], 1), "labels": torch.arange(1, 5, device=device)}
    return [torch.rand(3, side, side, device=device) for _ in range(images)], [target] * images


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: list[Tensor], targets: list[dict]) -> None:
    """One training step."""
    optimizer.zero_grad(set_to_none=True)
    sum(model(images, targets).values()).backward()
    optimizer.step()


def rounds_of(work: dict[str, Callable[[], object]], count: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds of each variant, a mapping a round; the first round only warms up."""
    return [{name: seconds(each, device) for name, each in work.items()} for _ in range(count + 1)][1:]


def timed(
    models: dict[str, nn.Module], images: list[Tensor], targets: list[dict], count: int, device: torch.device
) -> dict[str, list[dict[str, float]]]:
    """Seconds of an inference and of a training step of each model, a mapping a round. The models are left trained a little."""
    for model in models.values():
        model.eval()
    with torch.no_grad():
        inference = rounds_of({name: functools.partial(m, images) for name, m in models.items()}, count, device)
    work = {}
    for name, model in models.items():
        learning = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(learning, 1e-6, 0.9)
        work[name] = functools.partial(step, model, optimizer, images, targets)
    return {"inference": inference, "training step": rounds_of(work, count, device)}


def shares(model: nn.Module, images: list[Tensor], device: torch.device, rounds: int) -> dict[str, float]:
    """The part of an inference's time that is spent in each of torchvision's parts, by hooks around them."""
    spent, started = dict.fromkeys(PARTS, 0.0), {}
    handles = []
    for name in PARTS:
        part = model.get_submodule(name)

        def before(_module: nn.Module, _inputs: object, name: str = name) -> None:
            started[name] = _now(device)

        def after(_module: nn.Module, _inputs: object, _output: object, name: str = name) -> None:
            spent[name] += _now(device) - started[name]

        handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        with torch.no_grad():
            whole = seconds(lambda: [model(images) for _ in range(rounds)], device)
    finally:
        for handle in handles:
            handle.remove()
    return {name: each / whole for name, each in spent.items()}


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.detection", description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="imagenet/resnet-50")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/detection.json"))
    return answer(lambda: run(parser.parse(arguments)))


def run(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = resolve_device(options.device)
    machine = environment(device)
    print(
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads; {options.backbone} beside "
        f"torchvision's fasterrcnn_resnet50_fpn, {options.images} image(s) of {options.side} pixels, {precision(device)}"
    )
    models = subjects(options.backbone, options.side, device)
    images, targets = batch(options.images, options.side, device)
    record = {"environment": machine, "backbone": options.backbone, "side": options.side, "images": options.images}
    record |= {"precision": precision(device)}
    found = timed(models, images, targets, options.rounds, device)
    record["shares"] = shares(models["ours"].eval(), images, device, options.rounds)
    for title, rounds in found.items():
        print(f"\n{title}: images/s, median (range)")
        for name in models:
            print(f"  {name:<12} {Spread.of([options.images / each[name] for each in rounds])}")
        record[title] = {"seconds": rounds, "ours over torchvision": ratios(rounds, "ours")["torchvision"]}
        print(f"  time, ours over torchvision: {record[title]['ours over torchvision']}")
    print(
        "\nwhere our inference's time goes: "
        + ", ".join(f"{name} {part:.0%}" for name, part in record["shares"].items())
    )
    write_json(options.out, record)


if __name__ == "__main__":
    raise SystemExit(main())
