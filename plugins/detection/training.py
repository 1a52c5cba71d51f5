"""Training a Faster R-CNN, kept in a run store and found again by what it is.

    run = train_detector(network, "shapes", shapes_quick(), seed=0, runs="runs", shorter_side=192, longer_side=192)
    run.metrics["mAP"], run.history, run.model

Approximate joint training: the four losses of RPN and head are added and minimized together, with no gradient through
the proposals' coordinates. The paper trains the two in turn (Ren et al.'s 4-step training).

Difficult and crowd objects are not trained on. Which images make a batch, their flips, and the samples that the losses
are taken over are functions of (seed, iteration) alone: on a CPU a resumed run ends in the same bits as an unbroken one.
All figures are in percent.

Everything is computed in float32. In bfloat16 a coordinate between 512 and 1024 has steps of four pixels, and torchvision
reckons anchors and boxes in the precision of the feature map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas
import torch
from torch import Tensor, nn

import resprobe as rp
from plugins.detection.data import DetectionData, DetectionSet, Target, flip, load_detection
from plugins.detection.improvements import detect
from plugins.detection.metrics import coco_metrics, voc_average_precision
from plugins.detection.model import Detector, faster_rcnn
from plugins.detection.recipes import DetectionRecipe
from plugins.detection.spec import DetectorSpec
from resprobe import memory
from resprobe.data.images import generator
from resprobe.devices import fastest, resolve_device
from resprobe.digests import network_digest
from resprobe.environment import environment
from resprobe.files import read_tensors, write_json, write_tensors
from resprobe.keeping import RunFolder, RunIdentity, failures_kept
from resprobe.runs import check_seed

FORMAT = 1
"""Raised when the meaning of a stored run changes."""
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")

Prediction = dict[str, Tensor]


@dataclass(frozen=True)
class DetectorConfig(RunIdentity):
    """What a detector's run is. `start` is a digest of the weights that it begins with, the new layers' among them."""

    network: str
    detector: DetectorSpec
    data: str
    data_identity: str
    recipe: DetectionRecipe
    seed: int
    start: str
    metrics: ClassVar = ("mAP",)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON. What network, data and recipe are called does not."""
        return {
            "format": FORMAT,
            "detector": dataclasses.asdict(self.detector),
            "data": self.data_identity,
            "recipe": self.recipe.identity(),
            "seed": self.seed,
            "precision": "fp32",
            "start": self.start,
        }

    def called(self) -> list[str]:
        """Backbone, batch normalization, data, iterations and seed."""
        parts = ["detector", self.network, self.detector.bn, self.data]
        return [*parts, f"{self.recipe.iterations}it", f"seed{self.seed}"]


@dataclass
class DetectorRun:
    """A finished run. `history`: one row a log point: iteration, learning_rate, loss, its four parts, mAP of the test
    images (nan where not measured), seconds. `metrics`: what `score` gives for the test images. `model`: on the CPU."""

    config: DetectorConfig
    metrics: dict[str, float]
    history: pandas.DataFrame
    model: Detector
    path: Path | None = None


def train_detector(
    network: nn.Module,
    data: str | DetectionData,
    recipe: DetectionRecipe,
    *,
    seed: int = 0,
    runs: str | Path | rp.RunStore | None = None,
    device: str | torch.device = "auto",
    progress: bool | Callable[[dict[str, float]], None] = True,
    **options: Any,
) -> DetectorRun:
    """Trains a detector around a copy of `network`, or finds that this has been done.

    `options` are those of `DetectorSpec` but for `num_classes`, which is the data's. `runs`: the folder that runs are
    kept in; None keeps nothing on disk. `progress`: a bar, or a function that is told every row of the history.

    Raises `rp.UsageError` for what cannot be done as asked and `rp.TrainingDiverged` when the loss stops being finite.
    """
    device = resolve_device(device)
    data = load_detection(data)
    config, model = begin(network, data, recipe, seed, **options)
    if runs is None:
        return _train(model.to(device), data, config, None, device, progress)
    store = runs if isinstance(runs, rp.RunStore) else rp.RunStore(runs)
    path = store.folder(config)
    found = store.find(config)
    if found is None:
        with store.lock(config, print):
            found = store.find(config)  # it may have been finished while another command held the lock
            if found is None:
                with failures_kept(path):
                    return _train(model.to(device), data, config, path, device, progress)
    model.load_state_dict(read_tensors(path / "detector.safetensors"))
    return DetectorRun(config, found.metrics, found.history, model.eval(), path)


def begin(
    network: nn.Module, data: DetectionData, recipe: DetectionRecipe, seed: int, **options: Any
) -> tuple[DetectorConfig, Detector]:
    """What a detector's run is, and the detector that it begins with, on the CPU; arguments as for `train_detector`."""
    with _drawn_for(torch.device("cpu"), "detector", check_seed(seed)):
        model = faster_rcnn(network, len(data.classes) + 1, **options).cpu()
    spec = getattr(network, "spec", None)
    name = spec.name if isinstance(spec, rp.NetworkSpec) else type(network).__name__
    start = network_digest(model, f"{spec} {model.transform.image_mean} {model.transform.image_std}")
    return DetectorConfig(name, model.spec, data.name, data.identity, recipe, seed, start), model


def timed(model: Detector, data: DetectionData, recipe: DetectionRecipe, device: torch.device) -> float:
    """Seconds that the training of such a detector takes on `device`, with the tests along it: from two steps and the
    detections in two images. The model is left trained a little."""
    model.to(device)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, 1e-6)

    def step(iteration: int) -> None:
        images, targets = _placed(*training_batch(data.train, recipe, 0, iteration), device)
        sum(model.train()(images, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with _drawn_for(device, "timing"):
        step(0)  # what is set up at first use is no part of a step
        a_step = fastest(lambda: step(1), device, 2)
        few = data.test.select(range(min(2, len(data.test))))
        predict(model, few, device)
        an_image = fastest(lambda: predict(model, few, device), device) / max(1, len(few))
    return recipe.iterations * a_step + (recipe.evaluations + 1) * len(data.test) * an_image


def _placed(
    images: list[Tensor], targets: list[Target], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    on_device = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return [image.to(device) for image in images], on_device


@contextlib.contextmanager
def _drawn_for(device: torch.device, *what: object) -> Iterator[None]:
    """Torch's global random numbers as a function of `what`; the caller's are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        number = generator(*what).initial_seed()
        torch.default_generator.manual_seed(number)  # and no other card's, which are the caller's
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def batch_choices(count: int, recipe: DetectionRecipe, seed: int, iteration: int) -> list[tuple[int, bool]]:
    """The images of a batch, and which of them are flipped: one permutation an epoch, the epochs end to end."""
    chosen = []
    for place in range(iteration * recipe.batch_size, (iteration + 1) * recipe.batch_size):
        epoch, position = divmod(place, count)
        if not chosen or position == 0:
            random = generator("detection epoch", seed, epoch)
            order, drawn = torch.randperm(count, generator=random), torch.rand(count, generator=random)
        chosen.append((int(order[position]), bool(drawn[position] < recipe.flip)))
    return chosen


def training_batch(
    part: DetectionSet, recipe: DetectionRecipe, seed: int, iteration: int
) -> tuple[list[Tensor], list[Target]]:
    """Images in [0, 1] and the boxes and labels to be learned."""
    images, targets = [], []
    for index, flipped in batch_choices(len(part), recipe, seed, iteration):
        image, target = flip(*part[index]) if flipped else part[index]
        wanted = ~target["difficult"] & (target["iscrowd"] == 0)
        images.append(image.float() / 255)
        targets.append({name: target[name][wanted] for name in ("boxes", "labels")})
    return images, targets


def _train(
    model: Detector,
    data: DetectionData,
    config: DetectorConfig,
    path: Path | None,
    device: torch.device,
    progress: bool | Callable[[dict[str, float]], None],
) -> DetectorRun:
    recipe, seed = config.recipe, config.seed
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, recipe.rate(0), recipe.momentum, weight_decay=recipe.weight_decay)
    rows: list[dict[str, float]] = []
    done, counted, before = 0, 0, 0.0
    sums = torch.zeros(len(LOSSES), device=device)  # of the losses since the last log point, on the device
    folder = RunFolder(path) if path else None
    kept = folder.load() if folder else None
    if kept is not None:
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        rows, done, counted, before = kept["rows"], kept["done"], kept["counted"], kept["seconds"]
        sums.copy_(kept["sums"])
    if folder:
        folder.begin(config.identity() | {"network": config.network, "name": config.data}, environment(device))
    measured_at = {round(recipe.iterations * k / recipe.evaluations) for k in range(recipe.evaluations)}
    started = time.monotonic() - before

    with _watching(progress, config) as tell:

        def log(measure: bool) -> None:
            nonlocal counted
            means = (sums / counted).tolist() if counted else [math.nan] * len(LOSSES)
            mean_ap = score(predict(model, data.test, device), data.test)["mAP"] if measure else math.nan
            row = {"iteration": done, "learning_rate": recipe.rate(max(0, done - 1)), "loss": sum(means)}
            row |= {**dict(zip(LOSSES, means, strict=True)), "mAP": mean_ap, "seconds": time.monotonic() - started}
            rows.append(row)
            sums.zero_()
            counted = 0
            tell(row)

        def check() -> None:
            if not torch.isfinite(sums).all():
                since = rows[-1]["iteration"]
                raise rp.TrainingDiverged(
                    f"detector on {config.network}, seed {seed}: the loss stopped being finite between iterations "
                    f"{since:.0f} and {done}, learning rate {recipe.rate(done - 1):g}; a lower rate or bn='trained' may train"
                )

        if not rows:
            log(measure=True)
        for iteration in range(done, recipe.iterations):
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(iteration)
            images, targets = _placed(*training_batch(data.train, recipe, seed, iteration), device)
            with _drawn_for(device, "detection samples", seed, iteration):
                losses = model(images, targets)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            optimizer.step()
            sums += torch.stack([losses[name].detach() for name in LOSSES])
            counted, done = counted + 1, iteration + 1
            to_log = done in measured_at or done % recipe.window == 0 or done == recipe.iterations
            to_save = folder is not None and folder.due
            if to_log or to_save:  # between them nothing is asked of the device
                check()
            if to_log:
                log(measure=done in measured_at)
            if folder and to_save:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows, "done": done}
                folder.save(state | {"sums": sums, "counted": counted, "seconds": time.monotonic() - started}, rows)
    predictions = predict(model, data.test, device)
    metrics = score(predictions, data.test)
    rows[-1]["mAP"] = metrics["mAP"]
    run = DetectorRun(config, metrics, pandas.DataFrame(rows), model.cpu().eval(), path)
    if folder:
        write_tensors(folder.path / "detector.safetensors", model.state_dict())
        write_json(folder.path / "detections.json", [_as_rows(each) for each in predictions])
        folder.finish(metrics, rows)
    return run


def kept_for_backward(model: Detector, images: list[Tensor], targets: list[Target]) -> int:
    """Bytes that autograd keeps from the forward pass of a training step for its backward pass.

    The model's own parameters and buffers (all that a `FrozenBatchNorm2d` has) are not counted, as in
    `resprobe.memory.kept_for_backward`, which says what is.
    """
    own = (*model.parameters(), *model.buffers())
    return memory.kept_for_backward(lambda: model.train()(images, targets), own)


def predict(model: Detector, part: DetectionSet, device: torch.device, **improvements: Any) -> list[Prediction]:
    """Detections in all images, one image at a time, on the CPU; `improvements` are those of `detect`."""
    model.to(device).eval()
    found = []
    for image, _ in part:
        (one,) = detect(model, [image.to(device).float() / 255], **improvements)
        found.append(
            {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in one.items()}
        )
    return found


def score(predictions: Sequence[Prediction], part: DetectionSet) -> dict[str, float]:
    """Figures in percent: `mAP` (VOC, 11-point) and `mAP all-point`, AP of each class by either rule, and COCO's twelve."""
    metrics = {}
    for suffix, rule in (("", "11-point"), (" all-point", "all-point")):
        each = voc_average_precision(predictions, part.targets, rule=rule, classes=part.classes)
        metrics |= {f"mAP{suffix}": float(each.mean())} | {f"AP {name}{suffix}": ap for name, ap in each.items()}
    metrics |= {f"COCO {name}": value for name, value in coco_metrics(predictions, part.targets).items()}
    return {name: 100 * float(value) for name, value in metrics.items()}


def _as_rows(prediction: Prediction) -> list[dict[str, Any]]:
    """The detections of one image as JSON: `box`, `label`, `score`."""
    columns = [prediction[name].tolist() for name in ("boxes", "labels", "scores")]
    return [dict(zip(("box", "label", "score"), values, strict=True)) for values in zip(*columns, strict=True)]


@contextlib.contextmanager
def _watching(
    progress: bool | Callable[[dict[str, float]], None], config: DetectorConfig
) -> Iterator[Callable[[dict[str, float]], None]]:
    if callable(progress) or not progress:
        yield progress if callable(progress) else lambda row: None
        return
    from tqdm.auto import tqdm

    bar = tqdm(
        total=config.recipe.iterations,
        unit="it",
        desc=f"detector on {config.network}, seed {config.seed}",
        disable=not sys.stderr.isatty(),
        leave=False,
    )
    with bar:

        def show(row: dict[str, float]) -> None:
            measured = "" if math.isnan(row["mAP"]) else f", mAP {row['mAP']:.1f} %"
            bar.set_postfix_str(f"loss {row['loss']:.3f}{measured}")
            bar.update(row["iteration"] - bar.n)

        yield show
