"""Layer responses (§4.2, Fig. 7): the mean and the standard deviation of what each convolution gives.

    with rp.attach(network, "layer-responses") as probe:
        for images, _ in batches:
            network(images)
    table = probe.table()
    table.query("kernel_size == '3x3' and kind != 'shortcut'")["std"]  # the layers of Fig. 7
    probe.channels()

A response is, as in Fig. 7, the output of a convolution after batch normalization and before the nonlinearity or the
addition; where no normalization follows, the convolution's own output. What a branch does behind its last normalization,
as a gate does, is not in it. Figures are over all images seen while attached,
in training or evaluation mode as the network is, and equal those of all responses put together, however these were
split into batches. In a training they are those of an iteration, at the iterations of the probe's schedule. `table()` has
a row a layer, over all its channels; `channels()` a row a channel:

| column | meaning | unit |
| --- | --- | --- |
| `iteration` | of the training, from 0; there is no such column where there was none | |
| `layer` | name of the convolution in the network | |
| `call` | 0; for a convolution that is used several times in one pass, which use | |
| `stage` | n where the name says `stageN` or, in torchvision's ResNets, `layerN`; 0 outside the stages | |
| `block` | name of the block that the layer is in; empty outside blocks | |
| `position` | order in the first forward pass, from 1; what that did not use comes last | |
| `kind` | `branch` or `shortcut` in a block, `stem` if the network lists it before its first block, else `other` | |
| `kernel_size` | "3x3", "1x1", ... | |
| `measured` | name of the module whose output was measured: the normalization, or the convolution itself | |
| `channels` | in `table()`: number of channels | |
| `channel` | in `channels()`: which one, from 0 | |
| `mean`, `std` | of the responses; `std` is `torch.std`'s, with n − 1 in the denominator | response |
| `count` | n: images × positions in the image, in `table()` × channels | |

Which normalization follows a convolution is seen from the tensors of the first pass: it is the one that is given the
convolution's output, unchanged. A normalization is one of torch's or torchvision's modules, or a module without children
whose class says "norm" in its name, and what it gives is the response, also where its own code ends in an activation;
`F.batch_norm` called as a function is not seen. Responses are reduced as soon as
their module has given them, so nothing that happens to them later, an in-place ReLU or addition, matters.

What is counted: whole forward passes of the module that the probe is attached to. A pass that ends in an exception is
not counted, nor are calls to parts of the network alone, nor what checkpointing computes again on the way back.

What is refused, by name (`rp.UsageError`): a normalization with modules of its own inside (an activation in it would
change the response before anyone could see it), scripted modules, modules without data (device "meta"), passes in which
a convolution is no longer followed by its normalization, and figures of two networks in one probe.

`torch.compile`: the probe attaches to the module as written, which runs uncompiled while the probe is attached.
`DistributedDataParallel`: it attaches to `.module` and sees the images of its own process; each process has a table of
its own.

Cost: two readings of each response, one merge a pass for all layers together; the first pass also measures convolutions
that prove to be normalized. Kept are three float64 numbers a channel, in a training those of each iteration measured.
Nothing waits for a GPU but `table()` and `channels()`, and, for the first pass alone, passes in inference mode. On a GPU
moments are computed in float32, whose squares end at 1e-38 and 1e38: a `std` below 1e-18 or above 1e18 is lost there, not
on a CPU.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pandas
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

import resprobe as rp

NORMALIZATIONS = rp.probes.normalization_classes()

_PLACE = ("layer", "call", "stage", "block", "position", "kind", "kernel_size", "measured")
COLUMNS = (*_PLACE, "channels", "mean", "std", "count")
CHANNEL_COLUMNS = (*_PLACE, "channel", "mean", "std", "count")

_SCRATCH = 2**18
"""Numbers that `_by_shift` works on at a time: 1 MiB stays in the cache, and is all the memory that it costs."""

_COLUMNS, _MOST_COLUMNS = 1024, 2**16
"""Columns that `_by_columns` seeks, for the processor's sake, and the most that stay in its cache."""

_ROWS, _FEWEST_ROWS = 2048, 64
"""Rows that `_by_columns` seeks, for the sake of rounding, and the fewest that are worth a merging of columns."""

_LARGE_MEAN = 100
"""Standard deviations above which a mean is large: `_by_columns` leaves it to `_by_shift`, which does not cancel."""

_SMALL_VARIANCE, _SMALL_MEAN, _LARGE_VARIANCE = 1e-30, 1e-8, 1e36
"""Where squares of float32 numbers may have left float32's range; about a larger mean none differ by as little."""

Use = tuple[str, int]
"""A module's name and which call to it in the pass, from 0."""

_Figures = tuple[int, Tensor, Tensor, Tensor]
"""An iteration of a training, and the counts, means and sums of squared deviations of all layers' channels in it."""


class _Response:
    """A convolution's response until its normalization is met. Does not keep the tensor alive."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.address = weakref.ref(tensor), tensor.data_ptr()
        self.version = None if tensor.is_inference() else tensor._version

    def may_be(self, other: Tensor) -> bool:
        """Whether `other` is this response, unchanged, as far as can be told without reading its numbers.

        Inference mode counts no versions, and a full backward hook puts a view in the tensor's place. Memory may also have
        been given to something else since.
        """
        return other._version == self.version if self.surely(other) else other.data_ptr() == self.address

    def surely(self, other: Tensor) -> bool:
        return self.tensor() is other and self.version is not None


@dataclass
class _Candidate:
    """A convolution's response in the first pass, with its channels' axis and moments."""

    use: Use
    response: _Response
    axis: int
    moments: tuple[Tensor, Tensor]

    def is_same(self, other: Tensor) -> bool:
        """Whether `other` is this response, unchanged; equal moments per channel say so where nothing else does."""
        if not self.response.may_be(other):
            return False
        if self.response.surely(other):
            return True
        moments = _moments(other, self.axis) if other.ndim > self.axis else ()
        return len(moments) == 2 and all(map(_equal, moments, self.moments))


@rp.register_probe("layer-responses")
class LayerResponses(rp.Probe):
    """Mean and standard deviation of every convolution's response; the module's docstring says what that is.

    `schedule`: the iterations of a training to measure at (`rp.probes.every`, `logarithmic`, `at`); by default ten in
    every decade.
    """

    name = "layer-responses"

    def __init__(self, schedule: rp.probes.Schedule | None = None):
        super().__init__()
        self.schedule = schedule or rp.probes.logarithmic()
        self._network: weakref.ref[nn.Module] | None = None
        self._layers: dict[Use, dict[str, Any]] = {}
        self._filed: list[_Figures] = []
        self._begin_figures()
        self._counts_of_pass: tuple[Any, Tensor] | None = None
        self._relearn()

    def _begin_figures(self) -> None:
        self._count = self._mean = self._squares = torch.zeros(0, dtype=torch.float64)

    def _relearn(self) -> None:
        """Forgets what was seen of the network's structure, not the figures."""
        self._norm_of: dict[Use, str | None] = {}
        self._conv_of: dict[Use, Use] = {}
        self._places: dict[str, dict[str, Any]] = {}
        self._forget_pass()

    def _forget_pass(self) -> None:
        self._inside = False
        self._calls: dict[str, int] = {}
        self._order: list[Use] = []
        self._awaited: dict[Use, _Response] = {}
        self._candidates: list[_Candidate] = []
        self._seen: dict[Use, tuple[int, Tensor, Tensor]] = {}

    # -- watching ------------------------------------------------------------------------------------------------

    def hook(self, network: nn.Module) -> Iterator[RemovableHandle]:
        if self._network is None or self._network() is not network:
            if self._network is not None and self._layers:
                raise rp.UsageError(
                    f"{self.name} has figures of another network ({len(self._layers)} layers); use a new probe"
                )
            self._network = weakref.ref(network)
            self._relearn()
        self._forget_pass()
        modules = dict(network.named_modules())
        for name, module in modules.items():
            self._check(name, module)
        self._places = _places(modules)
        yield network.register_forward_pre_hook(self._begin_pass)
        for name, module in modules.items():
            if isinstance(module, _ConvNd):
                yield module.register_forward_hook(self._watch_convolution(name))
            elif _is_normalization(module):
                yield module.register_forward_hook(self._watch_normalization(name), with_kwargs=True)
        yield network.register_forward_hook(self._end_pass)

    def detach(self) -> None:
        super().detach()
        self._forget_pass()

    def _check(self, name: str, module: nn.Module) -> None:
        inside = [type(child).__name__ for child in module.children() if not isinstance(child, nn.Identity)]
        holds = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if inside and (_is_normalization(module) or (holds and _named(module))):
            why = (
                f"it has {', '.join(inside)} inside, so its response before the nonlinearity is never given; use a "
                "normalization and an activation of their own"
            )
            raise self.cannot_measure(name, why, module)
        self.refuse_scripted(name, module)

    def _begin_pass(self, network: nn.Module, inputs: Any) -> None:
        self._forget_pass()
        self._inside = not _on_the_way_back()

    def _next_use(self, name: str) -> Use:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        return name, call

    def _watch_convolution(self, name: str) -> Callable[..., None]:
        def note(module: _ConvNd, inputs: Any, output: Tensor) -> None:
            if not self._inside:
                return
            use = self._next_use(name)
            self._order.append(use)
            if use not in self._norm_of:
                # Whether a normalization follows is not known yet. The response is measured now all the same: later,
                # something may have been written over it.
                axis, moments = self._reduce(use, output)
                self._candidates.append(_Candidate(use, _Response(output), axis, moments))
            elif self._norm_of[use] is None:
                self._reduce(use, output)
            else:
                self._awaited[use] = _Response(output)

        return note

    def _watch_normalization(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, named_inputs: dict[str, Any], output: Any) -> None:
            if not self._inside:
                return
            use = self._next_use(name)
            of = self._conv_of.get(use)
            given = inputs[0] if inputs else next(iter(named_inputs.values()), None)
            if of is not None:
                response = self._awaited.pop(of, None)
                if response is None or not (isinstance(given, Tensor) and response.may_be(given)):
                    why = f"{name!r} normalized it in an earlier pass, and something else in this one"
                    raise self.cannot_measure(of[0], why)
                self._reduce(of, output)
            elif self._candidates:
                if isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape:
                    self._learn(use, given, output)

        return note

    def _learn(self, norm: Use, given: Tensor, output: Tensor) -> None:
        for index in reversed(range(len(self._candidates))):
            if self._candidates[index].is_same(given):
                of = self._candidates.pop(index).use
                self._conv_of[norm], self._norm_of[of] = of, norm[0]
                self._reduce(of, output)
                return

    def _reduce(self, use: Use, response: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
        """Notes the moments of each channel, on the device; gives the channels' axis too."""
        if not isinstance(response, Tensor) or response.is_complex():
            kind = f"{response.dtype} tensor" if isinstance(response, Tensor) else type(response).__name__
            raise self.cannot_measure(use[0], f"it gives a {kind}, not a tensor of real numbers")
        self.refuse_meta(use[0], response)
        spatial = len(self._places[use[0]]["kernel_size"].split("x"))
        axis = response.ndim - spatial - 1  # 1, or 0 for a single image without a batch
        moments = _moments(response, axis)
        count = response.numel() // max(1, response.shape[axis])
        if count:
            self._seen[use] = (count, *moments)
        return axis, moments

    @torch.no_grad()
    def _end_pass(self, network: nn.Module, inputs: Any, output: Any) -> None:
        for conv, _ in self._awaited:
            raise self.cannot_measure(conv, "its normalization was not called in this pass, as it was before")
        self._norm_of.update({candidate.use: None for candidate in self._candidates})
        self._merge()
        self._forget_pass()

    def _merge(self) -> None:
        """Adds a pass to the figures: the pairwise rule of Chan, Golub and LeVeque (1979), for all channels at once."""
        for use in self._order:
            if use in self._seen:
                self._describe(use, len(self._seen[use][1]))
        if not self._seen:
            return
        example = next(iter(self._seen.values()))[1]
        device, kind = example.device, torch.float32 if example.device.type == "mps" else torch.float64
        sizes = [layer["channels"] for layer in self._layers.values()]
        counts = tuple(self._seen[use][0] if use in self._seen else 0 for use in self._layers)
        if self._counts_of_pass is None or self._counts_of_pass[0] != (counts, sizes, device):
            of_channels = torch.tensor(counts, dtype=kind).repeat_interleave(torch.tensor(sizes))
            self._counts_of_pass = (counts, sizes, device), of_channels.to(device, non_blocking=device.type == "cuda")
        added = self._counts_of_pass[1]
        blank = example.new_zeros(max(sizes))
        parts = [
            self._seen.get(use, (0, blank[:size], blank[:size])) for use, size in zip(self._layers, sizes, strict=True)
        ]
        # One concatenation and a few operations for the whole network, not a few for each layer.
        mean, variance = (torch.cat([part[index].to(device) for part in parts]).to(kind) for index in (1, 2))
        old_count, old_mean, squares = (
            nn.functional.pad(figure.to(device, kind), (0, len(added) - len(figure)))
            for figure in (self._count, self._mean, self._squares)
        )
        self._count = old_count + added
        share = added / self._count.clamp(min=1)
        difference = mean - old_mean
        self._mean = old_mean + difference * share
        self._squares = squares + variance * added + difference.square() * old_count * share

    def _describe(self, use: Use, channels: int) -> None:
        if use not in self._layers:
            self._layers[use] = self._places[use[0]] | {
                "measured": self._norm_of[use] or use[0],
                "channels": channels,
            }
        known = self._layers[use]["channels"]
        if known != channels:
            raise rp.UsageError(f"{self.name} has figures of {known} channels for {use[0]!r}, which now has {channels}")

    def after_backward(self, network: nn.Module, iteration: int) -> None:
        """Files the iteration's figures under its number; the next begins anew."""
        if len(self._count):
            self._filed.append((iteration, self._count, self._mean, self._squares))
            self._begin_figures()

    # -- results -------------------------------------------------------------------------------------------------

    def table(self) -> pandas.DataFrame:
        """One row a layer and call; the module's docstring explains the columns. Empty if no pass was seen."""
        rows = []
        for place, count, means, squares in self._figures():
            mean = means.mean()
            total = squares.sum() + count * numpy.square(means - mean).sum()
            size = count * len(means)
            rows.append((*place, len(means), float(mean), _std(total, size), size))
        return self._tidy(rows, COLUMNS)

    def channels(self) -> pandas.DataFrame:
        """One row a channel; the module's docstring explains the columns. Empty if no pass was seen."""
        rows = []
        for place, count, means, squares in self._figures():
            for channel, (mean, square) in enumerate(zip(means, squares, strict=True)):
                rows.append((*place, channel, float(mean), _std(square, count), count))
        return self._tidy(rows, CHANNEL_COLUMNS)

    def _tidy(self, rows: list[tuple[Any, ...]], columns: tuple[str, ...]) -> pandas.DataFrame:
        table = pandas.DataFrame(rows, columns=["iteration", *columns])
        return table if self._filed else table.drop(columns="iteration")

    def _figures(self) -> Iterator[tuple[tuple[Any, ...], int, numpy.ndarray, numpy.ndarray]]:
        """A row for each iteration and layer: place, count per channel, the channels' means and sums of squared deviations.
        What was seen after a training, or without one, goes by the number after the last."""
        since = (self._filed[-1][0] + 1 if self._filed else 0, self._count, self._mean, self._squares)
        for iteration, *figures in (*self._filed, since):
            count, mean, squares = (figure.cpu().double().numpy() for figure in figures)
            start = 0
            for position, ((layer, call), about) in enumerate(self._layers.items(), start=1):
                end = start + about["channels"]
                if end <= len(count) and count[start]:  # the iteration used it
                    known = {"layer": layer, "call": call, "position": position} | about
                    place = (iteration, *(known[column] for column in _PLACE))
                    yield place, round(count[start]), mean[start:end], squares[start:end]
                start = end

    def state(self) -> dict[str, Any]:
        return {
            "layers": [{"layer": layer, "call": call, **about} for (layer, call), about in self._layers.items()],
            "count": self._count,
            "mean": self._mean,
            "squares": self._squares,
            "filed": [list(figures) for figures in self._filed],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        # Tensors need no copy: merging makes new ones.
        self._count, self._mean, self._squares = state["count"], state["mean"], state["squares"]
        self._filed = [tuple(figures) for figures in state["filed"]]
        layers = [dict(layer) for layer in state["layers"]]
        self._layers = {(layer.pop("layer"), layer.pop("call")): layer for layer in layers}


def _on_the_way_back() -> bool:
    """Whether autograd is at work: checkpointing then computes again what was seen on the way forward."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks it


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def _moments(response: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (with n in the denominator) of each index of `axis`; nothing large is kept."""
    x = response.detach()
    if axis == 0:
        x = x.unsqueeze(0)
    if x.numel() == 0:
        empty = x.new_zeros(x.shape[1], dtype=torch.float64)
        return empty, empty
    if x.device.type != "cpu":
        # One kernel, by Welford's rule. It would round to the input's type, hence the cast of half precision.
        variance, mean = torch.var_mean(x.to(_precise(x)), _all_but_channels(x), correction=0)
        return mean, variance
    # On a CPU that kernel takes as long as three convolutions.
    mean, variance = _by_columns(x) or _by_shift(x, _precise(x))
    vanished = (variance < _SMALL_VARIANCE) & (mean.abs() < _SMALL_MEAN)
    return _by_shift(x, torch.float64) if (vanished | ~(variance < _LARGE_VARIANCE)).any() else (mean, variance)


def _by_columns(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Moments on a CPU at the price of reading `x` twice; None where `x` is too few rows or its mean too large for it.

    `x` is taken as a matrix with many columns for each channel. Batch normalization's own kernel gives the moments of
    the columns, those of a channel are merged in float64. Columns are short sums: `std` is good to a few millionths of its
    size, the mean of its own, as long as the mean is below a hundred times `std`.
    """
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    if x.is_contiguous():
        columns, by_channel, within = x.view(len(x), -1), (channels, -1), 1
    else:
        last = x.movedim(1, -1)
        if not last.is_contiguous():
            return None
        sought = max(1, _COLUMNS // channels, pixels // _ROWS)
        repeats = math.gcd(pixels, 2 ** int(math.log2(sought)))
        columns, by_channel, within = last.view(pixels // repeats, -1), (-1, channels), 0
    rows, width = columns.shape
    if rows < _FEWEST_ROWS or width > _MOST_COLUMNS:
        return None
    # Float32 running statistics, which nobody reads, have the kernel answer in float32 also for half precision.
    unread = torch.zeros(2, width, dtype=_precise(x))
    mean, variance = torch.batch_norm_update_stats(columns, *unread, momentum=0.0)
    between, mean = torch.var_mean(mean.view(by_channel).double(), within, correction=0)
    variance = variance.view(by_channel).mean(within, dtype=torch.float64) + between
    return None if (mean.square() > _LARGE_MEAN**2 * variance).any() else (mean, variance)


def _by_shift(x: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
    """Moments on a CPU whatever the strides and the mean, in numbers of type `precise`.

    Sums are sound about a shift near the mean: with the mean of a share 1/k of the numbers as the shift,
    |shift − mean| ≤ std · √(k − 1), so little cancels.
    """
    dims = _all_but_channels(x)
    parts = x.split(max(1, _SCRATCH // x[0].numel()))
    shift = torch.mean(parts[0], dims, keepdim=True, dtype=precise)
    scratch = torch.empty_like(parts[0], dtype=precise)
    sums, squares = [], []
    for part in parts:
        deviation = torch.sub(part, shift, out=scratch[: len(part)])
        sums.append(deviation.sum(dims))
        squares.append(deviation.mul_(deviation).sum(dims))
    count = x.numel() // x.shape[1]
    offset, square = (torch.stack(each).double().sum(0) / count for each in (sums, squares))
    return shift.flatten().double() + offset, (square - offset.square()).clamp_(min=0)


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _precise(x: Tensor) -> torch.dtype:
    """The type to sum in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _std(squares: float, count: int) -> float:
    return math.sqrt(squares / (count - 1)) if count > 1 else math.nan


def _is_normalization(module: nn.Module) -> bool:
    return isinstance(module, NORMALIZATIONS) or (_named(module) and next(module.children(), None) is None)


def _named(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _places(modules: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Where each convolution is in the network, by name."""
    blocks = [name for name, module in modules.items() if isinstance(module, rp.probes.block_classes())]
    before_blocks, places = True, {}
    for name, module in modules.items():
        before_blocks = before_blocks and name not in blocks
        if not isinstance(module, _ConvNd):
            continue
        block = rp.probes.block_of(name, modules)
        if block is not None:
            part = name[len(block) :].lstrip(".").partition(".")[0]
            kind = "shortcut" if part in ("shortcut", "downsample") else "branch"
        else:
            kind = "stem" if blocks and before_blocks else "other"
        places[name] = {
            "stage": rp.probes.stage_of(name),
            "block": block or "",
            "kind": kind,
            "kernel_size": "x".join(map(str, module.kernel_size)),
        }
    return places
