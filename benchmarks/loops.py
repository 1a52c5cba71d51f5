"""Training loops to be timed beside each other: resprobe's and those of others, on the same network and images.

A loop trains until it is stopped, and calls `pause` after every window of steps: there it is timed, and waits for its
next turn. All train with SGD at batch 128 and with the augmentation of §4.2.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import resprobe as rp
from benchmarks.data import MEAN, STD, Pictures, augmentation
from resprobe import devices
from resprobe.devices import autocast
from resprobe.networks import check_family, resolve
from resprobe.training import Training

Pause = Callable[[], None]
OWN = ("ours", "deterministic", "bare")
"""The loops that have a choice of step, and no DataLoader."""
WINDOWS = 10_000
"""More than anybody waits for."""


@dataclass(frozen=True)
class Case:
    """What is timed: a loop, the network it trains, and how.

    `precision`: bf16, tf32 or fp32. tf32 is what torch calculates float32 convolutions in on a CUDA device unless it is
    told otherwise. `window`: steps between two pauses. `workers`: processes of a DataLoader, where there is one.
    `data`: see `benchmarks.data`.
    """

    loop: str
    network: str
    precision: str = "fp32"
    step: str = "eager"
    batch: int = 128
    window: int = 8
    device: str = "cpu"
    workers: int = 2
    data: str = "random"

    @property
    def kind(self) -> str:
        """The device's type: "cuda" for "cuda:0" too."""
        return torch.device(self.device).type

    @property
    def label(self) -> str:
        """A short name for tables, which tells the loops of one network apart."""
        words = (self.loop, self.step, self.precision) if self.loop in OWN else (self.loop, self.precision)
        return " ".join(words)


def ours(case: Case, data: rp.Data, pause: Pause) -> None:
    """resprobe's: its augmentation, schedule, logging and safety copy; the log point is at the end of each window."""
    recipe = dataclasses.replace(
        rp.recipes.cifar_paper(),
        batch_size=case.batch,
        learning_rate=0.01,
        milestones=(),
        iterations=WINDOWS * case.window,
        window=case.window,
        evaluations=1,
    )
    precision = "bf16" if case.precision == "bf16" else "fp32"
    training = Training(
        rp.build(case.network), data, recipe, device=torch.device(case.device), precision=precision, step=case.step
    )
    # What is timed under a name must be what the name says.
    warnings.filterwarnings("error", message="the training step cannot be captured")
    training.run(lambda *_: pause())


def deterministic(case: Case, data: rp.Data, pause: Pause) -> None:
    """resprobe's with only such operations as compute the same last digits each time (`--deterministic` of a study)."""
    with devices.deterministic():
        ours(case, data, pause)


def bare(case: Case, data: rp.Data, pause: Pause) -> None:
    """The limit: forward, backward, update on one batch that is there already, channels last as in ours.

    With `step` "graph" the whole step is one CUDA graph; with "compile" the network is compiled, and the step captured
    on a CUDA device all the same, as resprobe does it.
    """
    device = torch.device(case.device)
    network = rp.build(case.network).to(device, memory_format=torch.channels_last)
    images = data.train.images[: case.batch].to(device).float().div(255).contiguous(memory_format=torch.channels_last)
    labels = data.train.labels[: case.batch].to(device)
    optimizer = sgd(network, fused=device.type in ("cpu", "cuda"))
    forward = torch.compile(network) if case.step == "compile" else network
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True

    def step() -> None:
        with autocast(device, case.precision if case.precision == "bf16" else "fp32"):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    _repeat(captured(step) if case.step != "eager" and device.type == "cuda" else step, case, pause)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A function that replays `step` as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is done once (choosing kernels, allocating) may not be captured
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def usual(case: Case, data: rp.Data, pause: Pause) -> None:
    """The way that most CIFAR repositories train: a DataLoader with PIL transforms, eager float32, `.item()` at each step."""
    device = torch.device(case.device)
    network = rp.build(case.network).to(device)
    optimizer = sgd(network)
    batches = _endless(_loader(case, data))

    def step() -> float:
        pictures, labels = next(batches)
        pictures, labels = pictures.to(device), labels.to(device)
        loss = F.cross_entropy(network(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    _repeat(step, case, pause)


def lightning(case: Case, data: rp.Data, pause: Pause) -> None:
    """Lightning's Trainer with the usual DataLoader, its own precision setting and cuDNN's search for kernels.

    Without logger, checkpoints and progress bar, which a user may have on.
    """
    import lightning.pytorch as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = rp.build(case.network)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            pictures, labels = batch
            loss = F.cross_entropy(self.network(pictures), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.network)

    class Pausing(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step % case.window == 0:
                pause()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice, on the number of workers above all
        trainer = L.Trainer(
            accelerator={"cuda": "gpu"}.get(case.kind, case.kind),
            devices=1,
            precision="bf16-mixed" if case.precision == "bf16" else "32-true",
            benchmark=case.kind == "cuda",
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Pausing()],
        )
        trainer.fit(Module(), _loader(case, data))


def timm(case: Case, data: rp.Data, pause: Pause) -> None:
    """timm's loader, which normalizes on the device, its optimizer and the step of its training script.

    In bf16 with its options --amp and --channels-last. The loss is read every 50 steps, as the script logs.
    """
    from timm.data import create_loader
    from timm.data.transforms import ToNumpy
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter

    device, mixed = torch.device(case.device), case.precision == "bf16"
    network = rp.build(case.network).to(device)
    if mixed:
        network = network.to(memory_format=torch.channels_last)
    pictures = Pictures(data.train)
    loader = create_loader(
        pictures,
        (3, 32, 32),
        case.batch,
        is_training=True,
        mean=MEAN,
        std=STD,
        num_workers=case.workers,
        persistent_workers=case.workers > 0,
        pin_memory=device.type == "cuda",
        device=device,
    )
    pictures.transform = augmentation(ToNumpy())  # in place of ImageNet's, which the loader has put there
    optimizer = create_optimizer_v2(network, "momentum", lr=0.01, weight_decay=1e-4, momentum=0.9)
    losses, batches, count = AverageMeter(), _endless(loader), itertools.count()
    network.train()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True

    def step() -> None:
        images, labels = next(batches)
        if mixed:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if next(count) % 50 == 0:
            losses.update(loss.item(), len(images))

    _repeat(step, case, pause)


LOOPS: dict[str, Callable[[Case, rp.Data, Pause], None]] = {
    "ours": ours,
    "deterministic": deterministic,
    "bare": bare,
    "usual": usual,
    "lightning": lightning,
    "timm": timm,
}
_PACKAGES = {"lightning": "lightning.pytorch", "timm": "timm.data"}
"""What a loop needs beside resprobe."""


def needed(loop: str) -> str | None:
    """The module that a loop imports beside resprobe's."""
    return _PACKAGES.get(loop)


def absent(loop: str) -> str | None:
    """Why a loop cannot be timed here; None if it can."""
    package = (needed(loop) or "torch").partition(".")[0]
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def check_network(name: str) -> None:
    """Raises `UsageError` for a network that is not there, without the work of making it."""
    check_family(resolve(name))


def sgd(network: nn.Module, **options: Any) -> torch.optim.SGD:
    """The paper's optimizer at a rate at which nothing diverges on random labels."""
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, **options)


def _loader(case: Case, data: rp.Data) -> DataLoader:
    return DataLoader(
        Pictures(data.train),
        case.batch,
        shuffle=True,
        drop_last=True,
        num_workers=case.workers,
        pin_memory=case.kind == "cuda",
        persistent_workers=case.workers > 0,
    )


def _endless(loader: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


def _repeat(step: Callable[[], object], case: Case, pause: Pause) -> None:
    while True:
        for _ in range(case.window):
            step()
        pause()
