"""Gradient norms along a network (§4.1): do plain networks fail because gradients vanish?

    with rp.attach(network, "gradient-norms") as probe:
        F.cross_entropy(network(images), labels).backward()
    probe.table()

    rp.train("cifar/plain-56", "cifar10:PATH", probes=["gradient-norms"]).tables["gradient-norms"]

§4.1 says of plain networks with batch normalization that "backward propagated gradients exhibit healthy norms". The probe
measures two things: the gradient of each layer's weights, and the gradient that reaches each block's output.

One row a layer and one a block, for every measurement:

| column | meaning | unit |
| --- | --- | --- |
| `iteration` | of the training, from 0; a running count from 0 where there is no training | |
| `layer` | name of the layer or block in the network | |
| `kind` | `conv`, `linear`, `norm`, `other` (any other module's weights) or `block` | |
| `stage` | n where the name says `stageN` or, in torchvision's ResNets, `layerN`; 0 outside the stages | |
| `block` | name of the block that the layer is in, or that the row is of; empty outside blocks | |
| `position` | order in the forward pass from 1, layers and blocks counted apart | |
| `call` | 0; for a block that is used several times in one pass, which use | |
| `gradient_norm` | ‖∇W‖₂, the gradient of the loss for the layer's weights | loss / weight |
| `weight_norm` | ‖W‖₂ | weight |
| `gradient_to_weight` | ‖∇W‖₂ / ‖W‖₂; infinite for weights that are all zero | loss / weight² |
| `output_gradient_norm` | ‖∂L/∂y‖₂ for the block's output y, over the whole batch | loss / response |
| `output_gradient_rms` | √N · ‖∂L/∂y‖₂ for N images | loss / response |

If the loss L is a mean over images, N · ∂L/∂yᵢ is the gradient of image i's own loss, and `output_gradient_rms` the root
mean square of its norm over the images: that figure compares between batch sizes, `output_gradient_norm` does not.
N is the length of the block's output along its first axis: regions, in the head of a detector. `position` is the order in which
modules are called; weights that another module reads without calling theirs (the `out_proj` of torch's attention) come last.
A weight that several modules share has a row for each, with the gradient of all its uses.

W is the layer's `weight`, without its bias; where `torch.nn.utils` has put other parameters in its place (pruning, weight and
spectral norm), there is a row for each of those. What has no gradient (frozen, or not used) has NaN.

When gradients are read: in a training, when they are complete and before the optimizer uses them. Elsewhere, if a backward
pass has come since the last reading: at `table()`, and when the `with` block is left without an exception. A loop of one's
own with several steps inside the `with` block calls `probe.read()` after each backward pass.

Gradients that are accumulated over several passes are measured as accumulated: ∇W is `.grad` as it stands, and a block's
‖∂L/∂y‖₂ is the root of the sum of squares over the passes since the `.grad` were last None. (Gradients set to zero
instead of None look like accumulated ones: call `probe.read()` after each step.) A reading between the passes, that of
`table()` too, ends the sum over blocks, not that over weights. Under autocast the norms of half-precision
gradients are summed up in float32; those of large bfloat16 tensors on a CPU are good to about 1e-4. Norms whose squares
leave float32's range (below 1e-14, above 1e18) are summed up in float64. With a loss that a `GradScaler` has scaled, call
`probe.read(scale=scaler.get_scale())` after `unscale_`, which divides the weights' gradients, and before `update`: those of
blocks' outputs are divided here.

A block has NaN where several backward passes went through the same forward pass (`retain_graph`, a gradient penalty): the
gradients of the parts of a loss add up to its own, their norms do not. With reentrant checkpointing one backward pass
through several forward passes counts each as a use of the block.

`torch.compile`: the probe attaches to the module as written, which runs uncompiled while the probe is attached.
A deep copy of the network that is made meanwhile is not measured.
`DistributedDataParallel`: it attaches to `.module`. ∇W is then the gradient averaged over the processes, ∂L/∂y that of
this process's own images; each process has a table of its own.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy
import pandas
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

import resprobe as rp

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (_ConvNd,),
    "linear": (nn.Linear, nn.Bilinear),
    "norm": rp.probes.normalization_classes(),
}

COLUMNS = (
    *("iteration", "layer", "kind", "stage", "block", "position", "call"),
    *("gradient_norm", "weight_norm", "gradient_to_weight", "output_gradient_norm", "output_gradient_rms"),
)

_SMALL, _LARGE = 1e-14, 1e18
"""Norms between which the squares of float32 numbers are within float32's range."""

_PART = 2**18
"""Numbers that are converted to float64 at a time."""

_MANY_ROWS = 1024
"""Fewest rows of a bfloat16 tensor whose norms may be rounded to bfloat16 before they are put together."""


class Row(NamedTuple):
    """A row of the table without its figures, which are kept apart: a long table costs 8 bytes a figure."""

    layer: str
    kind: str
    stage: int
    block: str
    position: int
    call: int


class Part(NamedTuple):
    """A layer's weights, or a block."""

    name: str
    kind: str
    stage: int
    block: str
    module: nn.Module
    parameter: str = ""

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that goes by its name now; loading weights may have put another in its place."""
        return self.module._parameters[self.parameter]  # type: ignore[return-value]


@rp.register_probe("gradient-norms")
class GradientNorms(rp.Probe):
    """The norms of gradients per layer and per block; the module's docstring says what they are.

    `schedule`: the iterations of a training to measure at (`rp.probes.every`, `logarithmic`, `at`); by default ten in
    every power of ten. `blocks`: the modules whose output gradient is measured, by their names in the network or by
    class; by default the blocks of resprobe's and torchvision's residual networks. Raises `UsageError` for a name that
    is not there, a block whose output is not a tensor, sparse gradients, and weights that have no shape yet.
    """

    name = "gradient-norms"

    def __init__(
        self,
        schedule: rp.probes.Schedule | None = None,
        *,
        blocks: Iterable[str | type[nn.Module]] = rp.probes.block_classes(),
    ):
        super().__init__()
        self.schedule = schedule or rp.probes.logarithmic()
        if isinstance(blocks, str):
            raise rp.UsageError(f"blocks (={blocks!r}) must be a list of names or classes, as [{blocks!r}]")
        self.blocks = tuple(blocks)
        self._layouts: list[tuple[Row, ...]] = []
        self._measured: list[tuple[int, int]] = []  # iteration, index of the layout
        self._figures = array("d")
        self._network: nn.Module | None = None
        self._order: MutableMapping[nn.Module, int] = WeakKeyDictionary()
        self._on_tensors: list[RemovableHandle] = []
        self._forget()

    # -- watching ------------------------------------------------------------------------------------------------

    def hook(self, network: nn.Module) -> Iterator[RemovableHandle]:
        self._network, self._exception = network, sys.exc_info()[1]
        self._layers, self._blocks = self._find(network)
        self._forget()
        self._pass = 0
        yield network.register_forward_pre_hook(self._begin_pass)
        yield network.register_forward_hook(self._end_pass)
        for block in self._blocks:
            yield block.module.register_forward_hook(self._watch_block(block))
        modules = {part.module: None for part in (*self._layers, *self._blocks)}
        if set(self._order) != set(modules):
            self._order = WeakKeyDictionary()
            for module in modules:
                yield module.register_forward_hook(self._note_order)

    def detach(self) -> None:
        try:
            # Left by an exception, perhaps in the middle of a backward pass, there is nothing whole to read.
            if self._network is not None and sys.exc_info()[1] is self._exception:
                self.read()
        finally:
            super().detach()
            self._forget()
            self._network = self._exception = None
            self._layers = self._blocks = []

    def _find(self, network: nn.Module) -> tuple[list[Part], list[Part]]:
        """The layers and the blocks, in the order in which the network lists them."""
        classes = tuple(each for each in self.blocks if isinstance(each, type))
        names = {each for each in self.blocks if isinstance(each, str)}
        layers: list[Part] = []
        blocks: list[Part] = []
        met: set[nn.Module] = set()

        def walk(module: nn.Module, name: str, block: str) -> None:
            if module in met:  # a module that goes by two names is one layer
                return
            met.add(module)
            stage = rp.probes.stage_of(name)
            if name in names or isinstance(module, classes):
                block = name
                blocks.append(Part(name, "block", stage, name, module))
            self.refuse_scripted(name, module)
            self.refuse_meta(name, *module._parameters.values())
            if module._parameters:
                layers.extend(Part(*each, module, weight) for *each, weight in _weights(module, name, stage, block))
            for child_name, child in module._modules.items():
                if child is not None:
                    walk(child, f"{name}.{child_name}" if name else child_name, block)

        walk(network, "", "")
        for missing in names - {block.name for block in blocks}:
            raise rp.UsageError(
                f"blocks (={missing!r}) is no module of the network; its modules have names like "
                f"{', '.join(repr(name) for name, _ in list(network.named_modules())[1:4])}"
            )
        return layers, blocks

    def _forget(self) -> None:
        """Drops what was seen of passes and not read."""
        for handle in self._on_tensors:
            handle.remove()
        self._on_tensors.clear()
        self._seen: dict[tuple[str, int], list[tuple[int, int, Tensor]]] = {}  # block and call → pass, images, norm
        self._calls: dict[str, int] = {}
        self._pending = self._unsure = False

    def _begin_pass(self, network: nn.Module, inputs: Any) -> None:
        self._calls = {}
        self._pass += 1

    def _end_pass(self, network: nn.Module, inputs: Any, output: Any) -> None:
        number = self._pass

        def backward_begins(gradient: Tensor) -> None:
            self._pending = True
            # Nothing is accumulated yet: what was seen of earlier passes belongs to gradients that are gone. (One backward
            # call through several passes comes to the last of them first.)
            if all(layer.weight.grad is None for layer in self._layers):
                for use, passes in self._seen.items():
                    self._seen[use] = [each for each in passes if each[0] >= number]

        given = [tensor for tensor in rp.probes.tensors(output) if tensor.requires_grad]
        self._on_tensors += [tensor.register_hook(backward_begins) for tensor in given]
        self._unsure |= torch.is_grad_enabled() and not given

    def _watch_block(self, block: Part) -> Callable[..., None]:
        # A hook on the output itself, not a full backward hook on the module: that one hands the output on as a view,
        # on which an in-place ReLU behind the block fails. A tensor's hook that is there before an operation in place
        # is given the gradient for the values before it, which are the block's output.
        name = block.name

        def watch_output(module: nn.Module, inputs: Any, output: Any) -> None:
            if module is not block.module:  # a deep copy takes its hooks along
                return
            if not isinstance(output, Tensor):
                raise rp.UsageError(
                    f"{self.name} cannot measure block {name!r} ({type(module).__name__}): its output is a "
                    f"{type(output).__name__}, not a tensor; name other modules by `blocks=`"
                )
            if output.requires_grad:
                call = self._calls[name] = self._calls.get(name, -1) + 1
                self._on_tensors.append(output.register_hook(self._take_norm(name, call, self._pass)))

        return watch_output

    def _take_norm(self, name: str, call: int, number: int) -> Callable[[Tensor], None]:
        def take_norm(gradient: Tensor) -> None:
            images = len(gradient) if gradient.ndim else 1
            norm = _norm(gradient.detach())
            if _doubtful(gradient, norm):
                norm = _wide_norm(gradient.detach())
            self._seen.setdefault((name, call), []).append((number, images, norm))

        return take_norm

    def _note_order(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._order.setdefault(module, len(self._order))

    # -- reading -------------------------------------------------------------------------------------------------

    def after_backward(self, network: nn.Module, iteration: int) -> None:
        self.read(iteration)

    @torch.no_grad()
    def read(self, iteration: int | None = None, *, scale: float = 1.0) -> None:
        """Reads the gradients as they are now; does nothing if no backward pass has come since the last reading.

        `iteration` is what the rows are filed under; None: one more than the last. `scale`: what the loss was multiplied by,
        and weights' gradients are divided by already. This is the one wait for the device.
        """
        # Where no tensor is seen in the output, gradients alone tell that there was a backward pass.
        unsure = self._unsure and any(layer.weight.grad is not None for layer in self._layers)
        if not (self._pending or unsure):
            return
        weights = [layer.weight for layer in self._layers]
        gradients = [layer.weight.grad for layer in self._layers]
        for layer, gradient in zip(self._layers, gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise self.cannot_measure(layer.name, f"its gradient is {gradient.layout}")
        calls = {block.name: 1 for block in self._blocks}
        for name, call in self._seen:
            calls[name] = max(calls[name], call + 1)
        uses = [(block, call) for block in self._blocks for call in range(calls[block.name])]
        seen = [self._seen.get((block.name, call), []) for block, call in uses]
        given = [gradient for gradient in gradients if gradient is not None]
        measured = weights + given
        figures = _to_host(_norms(measured) + [norm for passes in seen for _, _, norm in passes])
        for index, tensor in enumerate(measured):
            if _doubtful(tensor, figures[index]):
                figures[index] = _wide_norm(tensor)
        of_weights, of_gradients, of_passes = numpy.split(figures, [len(weights), len(weights) + len(given)])
        values = numpy.full((len(weights) + len(seen), 5), math.nan)
        values[: len(weights), 1] = of_weights
        values[[index for index, gradient in enumerate(gradients) if gradient is not None], 0] = of_gradients
        with numpy.errstate(divide="ignore", invalid="ignore"):
            values[: len(weights), 2] = values[: len(weights), 0] / of_weights
        own = iter(of_passes / scale)
        for row, passes in zip(values[len(weights) :], seen, strict=True):
            if len({number for number, _, _ in passes}) < len(passes):  # several backward passes through one
                for _ in passes:
                    next(own)
            elif passes:
                norm = math.hypot(*(next(own) for _ in passes))
                row[3:] = norm, norm * math.sqrt(sum(images for _, images, _ in passes))

        layout = self._layout(uses)
        if layout not in self._layouts:
            self._layouts.append(layout)
        if iteration is None:
            iteration = self._measured[-1][0] + 1 if self._measured else 0
        self._measured.append((iteration, self._layouts.index(layout)))
        self._figures.extend(values.ravel())
        self._forget()

    def _layout(self, uses: list[tuple[Part, int]]) -> tuple[Row, ...]:
        """The rows of one measurement, without their figures."""
        layers, blocks = self._positions(self._layers), self._positions(self._blocks)
        rows = [Row(*layer[:4], layers[layer.name], 0) for layer in self._layers]
        return (*rows, *(Row(*block[:4], blocks[block.name], call) for block, call in uses))

    def _positions(self, parts: list[Part]) -> dict[str, int]:
        """Order in the first pass, from 1. What it did not use comes last."""
        ordered = sorted(parts, key=lambda part: self._order.get(part.module, math.inf))
        return {part.name: number for number, part in enumerate(ordered, start=1)}

    # -- results -------------------------------------------------------------------------------------------------

    def table(self) -> pandas.DataFrame:
        """All that was measured; the module's docstring explains the columns."""
        self.read()
        figures, rows = iter(self._figures), []
        for iteration, layout in self._measured:
            for row in self._layouts[layout]:
                rows.append((iteration, *row, *(next(figures) for _ in range(5))))
        return pandas.DataFrame(rows, columns=list(COLUMNS))

    def state(self) -> dict[str, Any]:
        return {
            "layouts": [[list(row) for row in layout] for layout in self._layouts],
            "measured": torch.tensor(self._measured, dtype=torch.int64).reshape(-1, 2),
            "figures": torch.tensor(self._figures, dtype=torch.float64),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._layouts = [tuple(Row(*row) for row in layout) for layout in state["layouts"]]
        self._measured = [(iteration, layout) for iteration, layout in state["measured"].tolist()]
        self._figures = array("d", state["figures"].tolist())


def _weights(module: nn.Module, name: str, stage: int, block: str) -> Iterator[tuple[Any, ...]]:
    """Name, kind, stage, block and weight of the layer that a module is. If it is no known layer, every parameter is a weight."""
    kind = next((kind for kind, classes in KINDS.items() if isinstance(module, classes)), "other")
    own = "weight" if kind != "other" and module._parameters.get("weight") is not None else None
    for parameter_name, parameter in module._parameters.items():
        if parameter is None or own not in (None, parameter_name) or (kind != "other" and parameter_name == "bias"):
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise rp.UsageError(
                f"gradient-norms cannot measure {name!r}: its weights have no shape yet; run a forward pass first"
            )
        full = name if parameter_name == own else f"{name}.{parameter_name}" if name else parameter_name
        yield full, kind, stage, block, parameter_name


def _norm(tensor: Tensor) -> Tensor:
    """The 2-norm, on the device."""
    tensor = _real(tensor)
    if tensor.device.type != "cpu":
        return torch._foreach_norm([tensor], 2, dtype=_accurate(tensor))[0]
    norm, rows = torch.linalg.vector_norm, tensor
    if tensor.ndim > 1:
        # A CPU adds up float32 squares one after the other: 1e-4 is lost over ten million, not so if by rows first.
        rounded = _rounded_rows(tensor)
        inner = tuple(range(1, tensor.ndim))
        rows = norm(tensor, dim=inner, dtype=_accurate(tensor)) if rounded is None else rounded
    return norm(rows, dtype=_accurate(tensor))


def _doubtful(tensor: Tensor, norm: Tensor | float) -> bool:
    """Whether squares may have left float32's range in `norm`, the 2-norm of `tensor`. CUDA adds up in float64."""
    return tensor.device.type in ("cpu", "mps") and not _SMALL < norm < _LARGE


def _wide_norm(tensor: Tensor) -> Tensor:
    """The 2-norm on a CPU, summed up in float64, a part at a time, since each part is copied. Apple's GPUs have no float64."""
    tensor = tensor.cpu()
    norm, rows = torch.linalg.vector_norm, _real(tensor) if tensor.ndim else _real(tensor).reshape(-1)
    size = max(1, _PART * len(rows) // max(1, rows.numel()))
    return norm(torch.stack([norm(part, dtype=torch.float64) for part in rows.split(size)]))


def _rounded_rows(tensor: Tensor) -> Tensor | None:
    """2-norms of the rows of a large bfloat16 tensor on a CPU, in bfloat16; None where rounding them would show.

    Asked for float32, a CPU would write a copy of the tensor, which costs a training step more than the norm does. Within
    a row, squares are summed up in float32 all the same. That each row is rounded by up to 2⁻⁹ averages out over thousands,
    unless they are so alike that all are rounded the same way, or a few make up the norm.
    """
    if tensor.dtype != torch.bfloat16 or tensor.ndim < 3:
        return None
    *inner, second, first = sorted(range(tensor.ndim), key=tensor.stride)
    if tensor.shape[first] * tensor.shape[second] < _MANY_ROWS:
        return None
    rows = torch.linalg.vector_norm(tensor, dim=inner)
    std, mean = map(float, torch.std_mean(rows.float()))
    return rows if mean / 64 < std < 2 * mean else None


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """2-norms on the device. One call for all small ones, or for all on a GPU: a network has hundreds."""
    norms: list[Tensor | None] = [None] * len(tensors)
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    tensors = [_real(tensor) for tensor in tensors]
    for index, tensor in enumerate(tensors):
        if tensor.device.type == "cpu" and tensor.numel() > 2**16:
            norms[index] = _norm(tensor)
        else:
            together.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in together.values():
        same = [tensors[index] for index in indices]
        for index, norm in zip(indices, torch._foreach_norm(same, 2, dtype=_accurate(same[0])), strict=True):
            norms[index] = norm
    return norms  # type: ignore[return-value]


def _to_host(scalars: list[Tensor]) -> numpy.ndarray:
    """All figures in one transfer."""
    if not scalars:
        return numpy.zeros(0)
    if any(scalar.device.type == "mps" for scalar in scalars):  # whose GPU holds no float64
        scalars = [scalar.cpu() for scalar in scalars]
    device = scalars[0].device
    dtype = torch.float64 if any(scalar.dtype == torch.float64 for scalar in scalars) else torch.float32
    return numpy.array(torch.stack([scalar.to(device, dtype) for scalar in scalars]).tolist())


def _accurate(tensor: Tensor) -> torch.dtype:
    """The precision to sum squares in: a CUDA kernel converts as it adds, where a CPU would write a copy first."""
    return torch.float64 if tensor.dtype == torch.float64 or tensor.device.type == "cuda" else torch.float32


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
