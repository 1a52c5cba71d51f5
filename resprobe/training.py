"""The training loop: network, data, recipe, probes → history.

One loop for every device. The host waits for the device only where it logs: losses and errors are summed on the
device, and the learning rate is a pure function of figures that are known already.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resprobe.data import Data, FolderBatches, Normalization, TensorBatches, batches_of
from resprobe.data.images import generator
from resprobe.devices import autocast, place, prepare_cpu
from resprobe.distributed import gathering, team
from resprobe.errors import TrainingDiverged, UsageError, one_line
from resprobe.evaluation import Evaluation, evaluate, precise_batch_norm
from resprobe.layers import safe_subsampling
from resprobe.networks import check_logits
from resprobe.probes import Probe, attach, has_table, table_of
from resprobe.randomness import (
    drawing_from,
    keeping_random_state,
    random_state,
    seeded_random_state,
    set_random_state,
)
from resprobe.recipes import Recipe, learning_rate, plateaus
from resprobe.recompute import recomputing
from resprobe.steps import CapturedStep, CompiledBlocks, resolve_step
from resprobe.watching import Outcome

# What normalizations are fitted on where images come from files; small sets are used whole.
_FIT_IMAGES = 2000


@dataclass(frozen=True)
class Progress:
    """What a watcher of the training is told at every log point. Errors in percent."""

    iteration: int
    iterations: int
    loss: float
    train_error: float
    test_error: float | None
    seconds: float
    images_per_second: float


class Training:
    """The training of one network, from iteration 0 or from a checkpoint's state to the recipe's end.

    `state()` is everything that the rest of the training depends on, so that a training that takes it up ends with
    the same weights, bit for bit on a CPU.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        seed: int = 0,
        device: torch.device,
        precision: str = "fp32",
        probes: Sequence[Probe] = (),
        recompute: bool = False,
        step: str = "auto",
    ):
        self.how = resolve_step(step, device, recompute=recompute)
        if device.type == "cpu" and not prepare_cpu():
            warnings.warn(
                "torch's threads were started before resprobe was imported, so denormal floats are not flushed and deep "
                "plain networks will train several times slower; import resprobe first"
            )
        self.recipe, self.seed, self.device, self.precision, self.probes = recipe, seed, device, precision, list(probes)
        # Once, and of what runs: a source may be edited meanwhile.
        self.identities = {probe.name: probe.identity() for probe in probes}
        self.recompute = recompute
        self.data = data.hold_out(recipe.validation_fraction).cropped(recipe.crop)
        sample = self.data.train.sample(_FIT_IMAGES)
        self.normalization = Normalization.fit(sample, recipe.normalization).to(device)
        self.network = network
        place(network, device)
        self.subsampling = safe_subsampling(network, device)
        self.test = self.data.test.to(device)
        self.validation = None if self.data.validation is None else self.data.validation.to(device)
        self.team = team()
        self.part = self.team.part(recipe)
        self.parallel = self.team.parallel(self.network, device)
        self.forward: nn.Module = self.parallel
        if self.how == "compile":
            torch.compiler.reset()  # else a process compiles eight architectures, and runs further ones as they are written
            self.forward = torch.compile(self.parallel)  # type: ignore[assignment]
        self.blocks = CompiledBlocks(self.network) if self.how == "compile-blocks" else None
        self.optimizer = _optimizer(self.network, recipe, device)
        self.network.zero_grad(set_to_none=True)  # of what was done with a network before it is handed over
        self.rate = recipe.learning_rate
        self._place_rate()
        # Captured at the first step: what is captured must not move to another place in memory afterwards.
        self.capturing = self.how != "eager" and device.type == "cuda" and self.team.size == 1 and not recompute
        self.captured: CapturedStep | None = None
        self.harmless: set[str] = set()
        """Names of the probes that were seen to change nothing."""
        self.iteration = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self.lowest_error: float | None = None
        self.random = self._first_random_state()
        # The state of the last log point: what is left to keep when training is interrupted or diverges.
        self.last_good = self._remember()

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, as tensors and plain data."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "rows": self.rows,
            "lowest_error": self.lowest_error,
            "random": self.random,
            "network": self.network.state_dict(),
            "optimizer": self._optimizer_state(),
            "probes": {probe.name: probe.state() for probe in self.probes},
            "identities": self.identities,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up a training where `state` was taken."""
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.rows, self.lowest_error = list(state["rows"]), state["lowest_error"]
        # The state is the first process's; the others' networks draw (dropout) from streams of their own.
        self.random = self._first_random_state()
        if self.team.first:
            self.random |= state["random"]  # of a training on a CPU, the host's alone
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate = float(self.optimizer.param_groups[0]["lr"])
        self._place_rate()
        self.captured = None
        for probe in self.probes:
            probe.load_state(state["probes"][probe.name])
        self.last_good = self._remember()

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, the same on every device: the rate as a number."""
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = self.rate
        return state

    def _place_rate(self) -> None:
        """On CUDA the rate is a tensor, whose value a captured step reads anew each time."""
        for group in self.optimizer.param_groups:
            on_device = self.device.type == "cuda"
            group["lr"] = torch.tensor(self.rate, device=self.device) if on_device else self.rate

    def _remember(self) -> dict[str, Any]:
        """A copy of the state on the device, to go back to if the loss stops being finite."""
        return _copy(self.state())

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, watch: Callable[[Training, Progress], None] | None = None) -> None:
        """Trains to the end. `watch` is called at every log point, when `state()` may be taken."""
        recipe, started, before = self.recipe, time.perf_counter(), self.seconds
        log_points, test_points = _log_points(recipe), _test_points(recipe)
        loss_sum, wrong_sum, since = self._zeros(), self._zeros(), self.iteration
        # A part alone that is in evaluation mode, as frozen batch normalization is, stays there.
        if not self.network.training:
            self.network.train()
        with drawing_from(self.random, self.device):
            for drawn in self.batches.drawn(self.iteration):
                loss, wrong = self.step(*drawn)
                loss_sum += loss
                wrong_sum += wrong
                self.iteration += 1
                if self.iteration not in log_points:
                    continue
                window = self.iteration - since
                # The only wait for the device: three figures, once a window. The last loss is that before the last update.
                figures = torch.stack([loss_sum / self.team.size, wrong_sum, self._broken()])
                mean_loss, error, broken = (self.team.total(figures) / window).tolist()
                if broken or not math.isfinite(mean_loss):
                    self._report_divergence("weights are" if math.isfinite(mean_loss) else "loss is")
                error *= 100 / recipe.batch_size
                self.lowest_error = error if self.lowest_error is None else min(error, self.lowest_error)
                row = {
                    "iteration": self.iteration,
                    "epoch": self.iteration * recipe.batch_size / len(self.data.train),
                    "learning_rate": self.rate,
                    "train_loss": mean_loss,
                    "train_error": error,
                    "test_loss": math.nan,
                    "test_error": math.nan,
                }
                if self.validation is not None:
                    row["validation_error"] = math.nan
                if self.iteration in test_points:
                    tested = self.test_now()
                    row |= {"test_loss": tested.loss, "test_error": tested.error}
                    if self.validation is not None:
                        row["validation_error"] = self.test_now(self.validation).error
                self.seconds = before + time.perf_counter() - started
                self.rows.append(row | {"seconds": self.seconds})
                self.random = random_state(self.device)
                self.last_good = self._remember()
                if watch is not None:
                    watch(self, self._progress(row, window))
                loss_sum, wrong_sum, since = self._zeros(), self._zeros(), self.iteration

    def step(self, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration: augmentation, forward, backward, update. Gives the mean loss and the count of wrong images, on
        the device. `drawn`: what `self.batches` has drawn for the batch."""
        rate = learning_rate(self.recipe, self.iteration, self.lowest_error, self._plateaus())
        self._set_learning_rate(rate)
        measuring = [probe for probe in self.probes if probe.schedule(self.iteration)]
        if measuring:
            unwatched = self._unwatched(measuring, drawn)
            with attach(self.network, *measuring):
                # Hooks are called by neither a graph nor a compiled network, and twice where activations are recomputed:
                # the few iterations that are measured run as they are written.
                with self.subsampling:
                    loss, wrong = self._gradients(*self.batches.make(*drawn), self.parallel)
                for probe in measuring:
                    probe.after_backward(self.network, self.iteration)
            if unwatched is not None:
                self._check_harmless(measuring, unwatched, Outcome.of(loss, self.network))
                self._try_tables(measuring)
            self._descend()
            return loss, wrong
        if self.capturing and self.captured is None:
            self.captured = self._capture(drawn)
        return (self.captured or self._update)(*drawn)

    def _unwatched(self, probes: Sequence[Probe], drawn: tuple[Tensor, ...]) -> Outcome | None:
        """What the iteration would come to without these probes, when one of them measures for the first time. None where each
        has been looked at, and where that cannot be told."""
        repeatable = self.team.size == 1 and self.device.type in ("cpu", "cuda")
        if not repeatable or all(probe.name in self.harmless for probe in probes):
            return None
        try:
            alone = copy.deepcopy(self.network)  # so that nothing of it has happened afterwards
        except Exception:  # of a stranger's modules
            return None
        subsampling = safe_subsampling(alone, self.device)
        try:
            # A probe of nothing, since under any what is compiled runs as it is written.
            with keeping_random_state(self.network), attach(alone, Probe()), subsampling:
                loss, _ = self._gradients(*self.batches.make(*drawn), alone)
                return Outcome.of(loss, alone)
        except torch.OutOfMemoryError:  # for a second network there is no room
            return None

    def _check_harmless(self, probes: Sequence[Probe], unwatched: Outcome, watched: Outcome) -> None:
        """Raises `UsageError` if a measured iteration comes to something else than it does without the probes."""
        # Some of CUDA's kernels add in whatever order, so that no two passes are equal to the last digit.
        if what := unwatched.differs(watched, 0.0 if self.device.type == "cpu" else 1e-2):
            names = ", ".join(probe.name for probe in probes)
            raise UsageError(
                f"probe {names} changes what it watches: without it the {what} of iteration {self.iteration + 1} would be other "
                f"ones (loss {unwatched.loss.item():.6g}, with it {watched.loss.item():.6g}); hooks must return nothing, change "
                "nothing in place, and draw no random numbers"
            )
        self.harmless |= {probe.name for probe in probes}

    def _try_tables(self, probes: Sequence[Probe]) -> None:
        """Warns of a table that cannot be made of a first measurement: after the training it would be late. A copy is asked,
        since to make a table may empty the probe."""
        for probe in probes:
            if not has_table(probe):
                continue
            try:
                twin = copy.deepcopy(probe)
            except Exception:  # of a stranger's probe
                continue
            try:
                with keeping_random_state(self.network):
                    table_of(twin)
            except Exception as error:
                warnings.warn(
                    f"probe {probe.name}: table() fails after its first measurement: {one_line(error, named=True)}"
                )

    def _update(self, *drawn: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.batches.make(*drawn)
        recomputed = recomputing(self.network) if self.recompute else nullcontext()
        compiled = self.blocks.in_use() if self.blocks else nullcontext()
        with recomputed, compiled, self.subsampling:
            figures = self._gradients(images, labels, self.forward)
        self._descend()
        return figures

    def _gradients(self, images: Tensor, labels: Tensor, forward: nn.Module) -> tuple[Tensor, Tensor]:
        """Forward and backward, in parts where batch normalization is over parts. Gives the mean loss and the count of wrong
        images, on the device."""
        loss, wrong = self._zeros(), self._zeros()
        part_size = self.recipe.bn_batch or len(labels)
        left = len(labels)
        for part, part_labels in zip(images.split(part_size), labels.split(part_size), strict=True):
            left -= len(part)
            with gathering(self.parallel, last=left == 0):
                with autocast(self.device, self.precision):
                    logits = forward(part)
                check_logits(self.network, logits, len(part), self.data.num_classes)
                logits = logits.float()
                part_loss = F.cross_entropy(logits, part_labels) * (len(part_labels) / len(labels))
                part_loss.backward()
            loss += part_loss.detach()
            wrong += (logits.detach().argmax(1) != part_labels).sum()
        return loss, wrong

    def _descend(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _capture(self, drawn: tuple[Tensor, ...]) -> CapturedStep | None:
        try:
            return CapturedStep(self._update, drawn, self.network, self.optimizer)
        except RuntimeError as error:  # a stranger's block that asks the device for a number, above all
            self.capturing = False
            self.how = "eager" if self.how == "graph" else self.how  # what the run's record shall say
            self.optimizer.zero_grad(set_to_none=True)  # what the attempt left
            # What ended a capture says less than what happened in it.
            why = one_line(error.__context__ or error)
            warnings.warn(f"the training step cannot be captured as a CUDA graph, and runs as it is written: {why}")
            return None

    @cached_property
    def batches(self) -> TensorBatches | FolderBatches:
        """This process's parts of the mini-batches."""
        return self._batches_of(self.part)

    def _batches_of(self, part: slice) -> TensorBatches | FolderBatches:
        return batches_of(self.data.train, self.recipe, self.seed, self.normalization, self.device, part)

    def _first_random_state(self) -> dict[str, Any]:
        """The first process's state is derived from the seed. The others draw other numbers: theirs are derived from the seed,
        their rank and the iteration that they begin at."""
        seed = self.seed
        if not self.team.first:
            seed = generator("process", self.seed, self.team.rank, self.iteration).initial_seed()
        return seeded_random_state(seed, self.device)

    def _plateaus(self) -> int:
        if self.recipe.plateau is None:
            return 0
        # Where a part is held out (§4.2), the test images decide nothing.
        watched = "test_error" if self.validation is None else "validation_error"
        return plateaus(self.recipe, [row[watched] for row in self.rows if not math.isnan(row[watched])])

    def _set_learning_rate(self, rate: float) -> None:
        if rate == self.rate:
            return
        for group in self.optimizer.param_groups:
            if self.recipe.momentum_form == "caffe":
                # Caffe's velocity holds the rate it was gathered under; torch's does not.
                for parameter in group["params"]:
                    velocity = self.optimizer.state[parameter].get("momentum_buffer")
                    if velocity is not None:
                        velocity.mul_(self.rate / rate)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.rate = rate

    def _zeros(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def _progress(self, row: dict[str, float], window: int) -> Progress:
        previous = self.rows[-2]["seconds"] if len(self.rows) > 1 else 0.0
        speed = window * self.recipe.batch_size / max(1e-9, self.seconds - previous)
        test_error = None if math.isnan(row["test_error"]) else row["test_error"]
        return Progress(
            self.iteration,
            self.recipe.iterations,
            row["train_loss"],
            row["train_error"],
            test_error,
            self.seconds,
            speed,
        )

    def _broken(self) -> Tensor:
        """1 if one of the weights that are trained is infinite or no number, else 0."""
        trained = [each.detach() for group in self.optimizer.param_groups for each in group["params"] if each.numel()]
        largest = nn.utils.get_total_norm(trained, norm_type=math.inf)
        return 1 - torch.isfinite(largest).to(torch.float32)

    def _report_divergence(self, what: str) -> None:
        """Goes back to the last log point and repeats the window step by step, to name where the numbers broke."""
        where = ""
        self.load_state(_copy(self.last_good))
        self.capturing = False
        if self.team.size > 1:  # repeated step by step, the processes would not stop at the same one
            raise TrainingDiverged(f"the {what} not finite; the weights of iteration {self.iteration} are kept")
        set_random_state(self.random, self.device)
        for drawn in self.batches.drawn(self.iteration):
            rate = learning_rate(self.recipe, self.iteration, self.lowest_error, self._plateaus())
            before = _copy(self.network.state_dict())
            loss, _ = self.step(*drawn)
            if not torch.isfinite(loss):
                self.network.load_state_dict(before)
                images, _ = self.batches.make(*drawn)
                layer = _first_nonfinite(self.network, images, self.device, self.precision)
                where = f" at iteration {self.iteration + 1}, learning rate {rate:g}, first in {layer}"
                break
            self.iteration += 1
            if self.iteration in _log_points(self.recipe):
                if self._broken():
                    where = f" after iteration {self.iteration}, learning rate {rate:g}"
                break  # else it did not happen again: the device does not compute the same twice
        self.load_state(self.last_good)
        raise TrainingDiverged(
            f"the {what} not finite{where}; the weights of iteration {self.iteration}, the last good ones, are kept"
        )

    # -- results -------------------------------------------------------------------------------------------------

    def test_now(self, part: Any = None) -> Evaluation:
        """Error on the test set (or `part`) with the network as it stands: the first process's, with its statistics."""
        return self.team.broadcast(
            lambda: evaluate(
                self.network,
                self.test if part is None else part,
                normalization=self.normalization,
                device=self.device,
                precision=self.precision,
            )
        )

    def finish(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Final figures, and the running statistics that were replaced by precise ones.

        `train_error` is the running error over the last epoch, as the dashed curves of Fig. 6 show it;
        `train_error_single_view` that of the finished network on the training images themselves.
        """
        running = {name: buffer.clone() for name, buffer in self.network.named_buffers() if "running_" in name}
        tested = {"running": self.test_now()}
        if self.recipe.bn_test_statistics == "precise":
            count = max(1, len(self.data.train) // self.recipe.batch_size)
            # Whole ones, in every process the same.
            whole = self.batches if self.team.size == 1 else self._batches_of(slice(None))
            some = itertools.islice(whole.drawn(0), count)
            with autocast(self.device, self.precision):
                precise_batch_norm(self.network, (whole.make(*drawn)[0] for drawn in some))
            tested["precise"] = self.test_now()
        reported = tested[self.recipe.bn_test_statistics]
        train = self.test_now(self.data.train.to(self.device))
        metrics = {
            "train_error": self._last_epoch("train_error"),
            "train_loss": self._last_epoch("train_loss"),
            "train_error_single_view": train.error,
            "test_error": reported.error,
            "test_loss": reported.loss,
            "test_error_running": tested["running"].error,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "iterations": self.iteration,
            "train_images": len(self.data.train),
            "test_images": len(self.data.test),
            "seconds": self.seconds,
            "images_per_second": self.iteration * self.recipe.batch_size / max(1e-9, self.seconds),
        }
        if self.validation is not None:
            metrics["validation_error"] = self.test_now(self.validation).error
            metrics["validation_images"] = len(self.validation)
        return metrics, running

    def _last_epoch(self, column: str) -> float:
        """Mean over the rows of the last epoch. A row counts as many iterations as it was averaged over."""
        start = self.iteration - len(self.data.train) / self.recipe.batch_size
        total, iterations, previous = 0.0, 0, 0
        for row in self.rows:
            if row["iteration"] > start:
                total += row[column] * (row["iteration"] - previous)
                iterations += row["iteration"] - previous
            previous = row["iteration"]
        return total / iterations


def _log_points(recipe: Recipe) -> set[int]:
    points = set(range(recipe.window, recipe.iterations + 1, recipe.window))
    return points | _test_points(recipe) | {recipe.iterations}


def _test_points(recipe: Recipe) -> set[int]:
    """The iterations at which the network is tested: ends of windows, so that none but the last is shorter."""
    windows = recipe.iterations // recipe.window
    count = min(recipe.evaluations, max(1, windows))
    return {recipe.window * round(windows * point / count) for point in range(1, count)} | {recipe.iterations}


def _optimizer(network: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if recipe.weight_decay_on == "all":
        groups = [{"params": parameters}]
    else:
        weights = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        groups,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=device.type in ("cuda", "cpu"),  # one kernel instead of one a tensor; the networks have hundreds
    )
    if recipe.momentum:
        # Zeros are the same as none; but a fused step refuses it if some have none, as where parts are skipped at random.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copy(entry) for entry in value]
    if isinstance(value, tuple):
        entries = map(_copy, value)
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    return value


def _first_nonfinite(network: nn.Module, images: Tensor, device: torch.device, precision: str) -> str:
    """The first layer, in forward order, whose output is not finite; "the loss" if every output is."""
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not names and not torch.isfinite(output).all():
                names.append(name)

        return look

    layers = [(name, module) for name, module in network.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(note(name)) for name, module in layers]
    try:
        with torch.no_grad(), autocast(device, precision):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "the loss"
