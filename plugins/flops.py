"""What a network costs: parameters, multiply-adds and activations per layer and in total (Table 1, Table 6, §4.1).

    with rp.attach(network, "flops") as probe:
        network(images)
    probe.table(), probe.total(), probe.uncounted()

    from plugins import flops
    flops.count(network, (3, 224, 224))        # one row a layer
    flops.total(network, (3, 224, 224)).macs   # 3.86e9 for ResNet-50; the paper prints 3.8 × 10⁹ FLOPs
    flops.uncounted(network, (3, 224, 224))    # operators that `macs` leaves out

The paper's FLOPs are multiply-adds: one multiplication and the addition that follows it are one. Other tools count two,
or also count the additions of biases. Here `macs` are those of convolutions and matrix products, which is what Table 1
holds. Everything else (normalization, additions, nonlinearities, pooling, resizing; deformable convolutions and bilinear
layers too) is no part of `macs` and is listed, operator by operator, so that nothing is left out in silence.

One row for each module that holds parameters or does counted work itself, in the order of the first calls:

| column | meaning | unit |
| --- | --- | --- |
| `layer` | name of the module in the network; empty for the network itself | |
| `type` | its class | |
| `stage` | n where the name says `stageN` or, in torchvision's ResNets, `layerN`; 0 outside the stages | |
| `block` | name of the block that the layer is in; empty outside blocks | |
| `position` | order in the forward pass, from 1; modules that were not called come last | |
| `kernel_size` | of a convolution: "3x3", "1x1", ...; empty else | |
| `calls` | how often it was called in the pass | |
| `parameters` | numbers it holds itself; one that several modules share counts where it comes first | |
| `macs` | multiply-adds for one image | multiply-adds |
| `activations` | numbers that its convolutions and matrix products give for one image | |
| `output_shape` | for one image, "16x32x32"; empty where the output is not a tensor | |

A total is the sum of a column. Work done by a module's own code outside any module inside it is the module's own.

`uncounted()` has a row for each operator (`operator`, such as "aten::add") and module (`layer`) with the number of `calls`.
Operators that only make, move or choose numbers, and those on whole numbers, are not listed.

As a probe it takes the inputs of the first forward pass after each `attach` and, when that pass is over, counts in a copy
of the network, in the mode that the network is in; it divides by the number of images. In a training that is done at
iteration 0. The network itself is only read. A call that is not a whole forward pass of the module that it is attached to
is not counted.

The number of images is the length of the first tensor, except where
- the first argument is a list or tuple of tensors of three dimensions, as torchvision's detectors take: its length;
- the network takes one image without a batch, seen by what the first convolution that is called is given: one. Then
  `output_shape` is the whole shape.

`torch.compile`: the probe attaches to the module as written, which runs uncompiled while the probe is attached.
`DistributedDataParallel`: it attaches to `.module` and counts one process's pass, which per image is everyone's.

Why not fvcore's `FlopCountAnalysis`, with which the tests compare: its tracing of a 1202-layer network takes six to
fourteen seconds on a laptop's core and as long again for the activations, it computes with real numbers, and it fails on
device "meta". Here operators are seen as they are called, on "meta" without any arithmetic; the formula for convolutions
is fvcore's. The operators of a scripted module inside the network (`torch.jit`), which has no layers to be seen, are
counted as the work of the module that calls it. A network that is itself scripted is refused.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

import resprobe as rp
from resprobe.errors import blamed, short
from resprobe.modes import evaluation_mode

with warnings.catch_warnings():
    # fvcore scripts a function when it is imported, which torch now advises against.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=DeprecationWarning)
    from fvcore.nn.jit_handles import conv_flop_count

COLUMNS = (
    *("layer", "type", "stage", "block", "position", "kernel_size", "calls"),
    *("parameters", "macs", "activations", "output_shape"),
)
TOTALS = ("parameters", "macs", "activations")
UNCOUNTED_COLUMNS = ("operator", "layer", "calls")

aten = torch.ops.aten


def _of_convolution(arguments: Sequence[Any], output: Tensor) -> int:
    x, weight, transposed = arguments[0], arguments[1], arguments[6]
    # The operator always has a batch here: torch adds one to a single image.
    return int(conv_flop_count(list(x.shape), list(weight.shape), list(output.shape), transposed=transposed))


def _of_product(first: int) -> Callable[[Sequence[Any], Tensor], int]:
    """Multiply-adds of a matrix product: a row's length, of the left matrix (argument `first`), for each number of the output."""
    return lambda arguments, output: output.numel() * arguments[first].shape[-1]


def _of_attention(arguments: Sequence[Any], output: Any) -> int:
    query, key, value = arguments[:3]
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return scores * (query.shape[-1] + value.shape[-1])


COUNTED: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    aten.convolution: _of_convolution,
    aten._convolution: _of_convolution,
    aten.convolution_overrideable: _of_convolution,
    aten.linear: _of_product(0),
    aten.mm: _of_product(0),
    aten.bmm: _of_product(0),
    aten.mv: _of_product(0),
    aten.dot: lambda arguments, output: arguments[0].numel(),
    aten.addmm: _of_product(1),
    aten.addmv: _of_product(1),
    aten.addbmm: lambda arguments, output: arguments[1].numel() * arguments[2].shape[-1],
    aten.baddbmm: _of_product(1),
    aten._int_mm: _of_product(0),
    aten._scaled_dot_product_flash_attention: _of_attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    aten._scaled_dot_product_efficient_attention: _of_attention,
    aten._scaled_dot_product_cudnn_attention: _of_attention,
    aten._scaled_dot_product_fused_attention_overrideable: _of_attention,
}
"""Multiply-adds of an operator from its arguments and its output."""
COUNTED |= {
    getattr(aten, f"{name}_"): COUNTED[getattr(aten, name)] for name in ("addmm", "addmv", "addbmm", "baddbmm")
}  # in place

NO_ARITHMETIC = {
    *("arange", "bernoulli_", "empty", "empty_like", "empty_strided", "fill_", "full", "full_like", "native_dropout"),
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "normal_", "ones", "ones_like", "rand"),
    *("rand_like", "randn", "randn_like", "scalar_tensor", "uniform_", "zero_", "zeros", "zeros_like"),
    *("_local_scalar_dense", "_to_copy", "_unsafe_view", "bool", "cat", "clone", "constant_pad_nd", "copy_", "flip"),
    *("index", "index_select", "repeat", "roll", "stack", "unsafe_split"),
}
"""Operators that only make, move or choose numbers. Like those that give views, they are not listed as uncounted."""


class _Pass(TorchDispatchMode):
    """What one forward pass does, by module. Its hooks stay on the network, which is a copy to throw away."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.running: list[str] = []
        self.calls: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()
        self.activations: Counter[str] = Counter()
        self.shapes: dict[str, list[int]] = {}
        self.uncounted: Counter[tuple[str, str]] = Counter()
        for name, module in network.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self._enter(name))
                # Called after an exception too, which the network may catch.
                module.register_forward_hook(self._leave(name), always_call=True)

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.running.append(name)
            self.calls[name] += 1

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.running.pop()
            if isinstance(output, Tensor):
                self.shapes[name] = list(output.shape)

        return leave

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operator(*args, **(kwargs or {}))
        packet = operator.overloadpacket
        module = self.running[-1] if self.running else ""
        macs = COUNTED.get(packet)
        if macs is not None:
            result = output[0] if isinstance(output, tuple | list) else output
            self.macs[module] += macs(args, result)
            self.activations[module] += result.numel()
        elif not operator.is_view and packet.__name__ not in NO_ARITHMETIC and _is_arithmetic(output):
            self.uncounted[str(operator.name()).partition(".")[0], module] += 1
        return output


def _is_arithmetic(output: Any) -> bool:
    """Whether an operator gives other than whole numbers: counting batches, say, is no cost of a layer."""
    return any(each.is_floating_point() or each.is_complex() for each in rp.probes.tensors(output))


@rp.register_probe("flops")
class Flops(rp.Probe):
    """Parameters, multiply-adds and activations; the module's docstring explains the tables.

    Raises `rp.UsageError` if the network is scripted, if the pass has no input tensor whose length says how many images
    there are, and if neither an empty nor a full copy of the network runs.
    """

    name = "flops"
    schedule = staticmethod(rp.probes.at([0]))  # what a network costs does not change while it learns

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[dict[str, Any]] = []
        self._uncounted: list[dict[str, Any]] = []

    def hook(self, network: nn.Module) -> Iterator[RemovableHandle]:
        self._refuse_scripted(network)
        waiting = True

        def end_pass(network: nn.Module, inputs: Any, named_inputs: dict[str, Any], output: Any) -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                self.count(network, *inputs, **named_inputs)

        yield network.register_forward_hook(end_pass, with_kwargs=True)

    def _refuse_scripted(self, network: nn.Module) -> None:
        if isinstance(network, torch.jit.ScriptModule):
            raise rp.UsageError(f"{self.name}: the network is scripted, which hides its layers; count before scripting")

    @torch.inference_mode(False)  # in which operators are seen whole, a linear layer's as one of another name
    @torch.no_grad()
    def count(self, network: nn.Module, *inputs: Any, **named_inputs: Any) -> None:
        """Counts in a copy of `network`, which is called with copies of these inputs."""
        self._refuse_scripted(network)
        given = (*inputs, *named_inputs.values())
        first = next((each for each in rp.probes.tensors(given) if each.ndim), torch.empty(0))
        listed = bool(given) and _is_list_of_images(given[0])
        images = len(given[0] if listed else first)
        if images == 0:
            raise rp.UsageError(
                f"{self.name}: {type(network).__name__} was given no images, so there is no cost for one image"
            )
        with rp.keeping_random_state(network):
            try:
                seen = _watch(network, inputs, named_inputs, _without_data)
            except Exception:
                # Some networks look at numbers to decide what to do. Those are copied with their data.
                shapes = ", ".join(str(tuple(each.shape)) for each in rp.probes.tensors(given))
                with blamed(f"{self.name}: {type(network).__name__} fails on an input of shape {shapes}"), _unfused():
                    seen = _watch(network, inputs, named_inputs, _with_data)
        unbatched = _is_unbatched(network, seen, first)
        if unbatched and not listed:
            images = 1
        self._rows = list(_rows(network, seen, images, unbatched))
        self._uncounted = [
            dict(zip(UNCOUNTED_COLUMNS, (*of, calls), strict=True)) for of, calls in seen.uncounted.items()
        ]

    def table(self) -> pandas.DataFrame:
        """One row a layer; the module's docstring explains the columns. Empty if no pass was seen."""
        return pandas.DataFrame(self._rows, columns=list(COLUMNS))

    def total(self) -> pandas.Series:
        """`parameters`, `macs` for one image and `activations` for one image of the whole network."""
        return self.table()[list(TOTALS)].sum().astype(int)

    def uncounted(self) -> pandas.DataFrame:
        """The operators that `macs` leaves out, except those that only move numbers: `operator`, `layer`, `calls`."""
        return pandas.DataFrame(self._uncounted, columns=list(UNCOUNTED_COLUMNS))

    def state(self) -> dict[str, Any]:
        return {"rows": self._rows, "uncounted": self._uncounted}

    def load_state(self, state: dict[str, Any]) -> None:
        self._rows, self._uncounted = list(state["rows"]), list(state["uncounted"])


def measure(network: nn.Module, image_shape: Sequence[int]) -> Flops:
    """The probe after it has counted one image of `image_shape` (channels, height, width) in evaluation mode.

    `network` may be on any device, "meta" included, and is only read. Raises `rp.UsageError` if it fails on such an image.
    """
    network, probe = rp.probes.unwrap(network), Flops()
    shape = tuple(image_shape)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise rp.UsageError(f"image_shape (={short(image_shape)}) must be whole numbers ≥ 1, such as (3, 32, 32)")
    weight = next((each for each in network.parameters() if each.is_floating_point()), torch.empty(0))
    with evaluation_mode(network):
        probe.count(network, torch.zeros((1, *shape), dtype=weight.dtype, device=weight.device))
    return probe


def count(network: nn.Module, image_shape: Sequence[int]) -> pandas.DataFrame:
    """Parameters, multiply-adds and activations of each layer for one image of `image_shape` (channels, height, width).

    The module's docstring explains the columns; `measure` says what else is accepted and raised.
    """
    return measure(network, image_shape).table()


def total(network: nn.Module, image_shape: Sequence[int]) -> pandas.Series:
    """`parameters`, `macs` and `activations` of the whole network for one image of `image_shape`."""
    return measure(network, image_shape).total()


def of_named(name: str, image_shape: Sequence[int], **options: Any) -> pandas.Series:
    """Totals for one image of the network that `rp.build` makes of these, without weights, in no time."""
    try:
        with torch.device("meta"):
            network = rp.build(name, **options)
    except rp.UsageError:  # a stranger's block may compute with its weights where it is made
        network = rp.build(name, **options)
    return total(network, image_shape)


def uncounted(network: nn.Module, image_shape: Sequence[int]) -> pandas.DataFrame:
    """The operators that `macs` leaves out, for one image of `image_shape`."""
    return measure(network, image_shape).uncounted()


def of_study(results: rp.Results, *labels: str) -> pandas.DataFrame:
    """What the networks of a study cost for one image of its data: a row each, its `labels` ("depth", say), then `TOTALS`, and
    `uncounted`: the operators that `macs` leaves out, with spaces between them."""
    data = rp.load_data(results.options.data).cropped(results.runs[0].config.recipe.crop)
    image = tuple(data.train.sample(1).shape[1:])
    firsts = results.table.reset_index(drop=True).drop_duplicates(list(labels))
    rows = []
    for row in firsts.index:
        measured = measure(results.runs[row].network, image)
        left_out = " ".join(sorted(set(measured.uncounted()["operator"])))
        rows.append(measured.total().to_dict() | {"uncounted": left_out})
    return firsts[list(labels)].reset_index(drop=True).join(pandas.DataFrame(rows))


def _watch(network: nn.Module, inputs: Any, named_inputs: Any, copied: Callable[[Tensor], Tensor]) -> _Pass:
    """Calls a copy of `network`, its tensors and those of the inputs made by `copied`."""
    memory = rp.probes.without_hooks(network)  # hooks of others must not see this pass
    for module in network.modules():
        for value in vars(module).values():
            # Parameters and buffers follow; what else stands there could not be copied: results of past passes.
            for tensor in rp.probes.tensors(value):
                memory[id(tensor)] = copied(tensor)
    for parameter in network.parameters():
        memory[id(parameter)] = nn.Parameter(copied(parameter), requires_grad=False)
    for buffer in network.buffers():
        memory[id(buffer)] = copied(buffer)
    for tensor in rp.probes.tensors((inputs, named_inputs)):
        memory[id(tensor)] = copied(tensor)
    own, inputs, named_inputs = copy.deepcopy((network, inputs, named_inputs), memory)
    seen = _Pass(own)
    # Attached to a probe that does nothing, a copy of compiled modules runs uncompiled.
    with rp.attach(own, rp.Probe()), seen:
        own(*inputs, **named_inputs)
    return seen


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _with_data(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@contextmanager
def _unfused() -> Iterator[None]:
    """Without kernels that do the work of many operators in one, in which products are not seen: attention's and LSTMs'.

    Sets only what is needed: the backends' own `flags()` would also reset precisions that the user has set.
    """
    attention = torch.backends.mha.get_fastpath_enabled()
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [backend.enabled for backend in backends]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        for backend, was in zip(backends, enabled, strict=True):
            backend.enabled = was


def _is_list_of_images(argument: Any) -> bool:
    images = argument if isinstance(argument, tuple | list) else ()
    return len(images) > 0 and all(isinstance(each, Tensor) and each.ndim == 3 for each in images)


def _is_unbatched(network: nn.Module, seen: _Pass, first: Tensor) -> bool:
    """Whether the first convolution was given an image without a batch, as torch allows."""
    modules = dict(network.named_modules())
    for name in seen.calls:
        module = modules[name]
        if isinstance(module, _ConvNd):
            dimensions = len(seen.shapes.get(name, []))  # of its output, which has as many as its input
            # A network may also take a batch apart itself, and then its input has more.
            return first.ndim <= dimensions == len(module.kernel_size) + 1
    return False


def _rows(network: nn.Module, seen: _Pass, images: int, unbatched: bool) -> Iterator[dict[str, Any]]:
    modules = dict(network.named_modules())
    parameters = _own_parameters(network)
    order = {name: index for index, name in enumerate(seen.calls)}
    names = [name for name in modules if parameters[name] or seen.macs[name]]
    names.sort(key=lambda name: order.get(name, math.inf))
    for position, name in enumerate(names, start=1):
        module = modules[name]
        shape = seen.shapes.get(name, [])
        yield {
            "layer": name,
            "type": type(module).__name__,
            "stage": rp.probes.stage_of(name),
            "block": rp.probes.block_of(name, modules) or "",
            "position": position,
            "kernel_size": "x".join(map(str, module.kernel_size)) if isinstance(module, _ConvNd) else "",
            "calls": seen.calls[name],
            "parameters": parameters[name],
            "macs": _per_image(seen.macs[name], images),
            "activations": _per_image(seen.activations[name], images),
            "output_shape": "x".join(map(str, shape if unbatched else shape[1:])),
        }


def _own_parameters(network: nn.Module) -> dict[str, int]:
    """How many numbers each module holds that no module before it holds."""
    own, counted = {}, set()
    for name, module in network.named_modules():
        mine = {id(each): each.numel() for each in module.parameters(recurse=False) if id(each) not in counted}
        counted.update(mine)
        own[name] = sum(mine.values())
    return own


def _per_image(figure: int, images: int) -> int:
    # Exact for layers that treat every image alike; else (work that does not grow with the batch) the nearest whole.
    return figure // images if figure % images == 0 else round(figure / images)
