"""Branch or shortcut: through which of them does a block act on a logit? (Beyond the paper; blocks as in Eqn. 1 and 2.)

    with rp.attach(network, "attribution") as probe:
        probe.explain(images, labels)
    probe.table()

    from plugins.attribution import branch_and_shortcut, pictures
    branch_and_shortcut(network, images, labels, method="conductance")
    pictures(network, images, labels).savefig("why.png")

A block computes activation(F(x) + shortcut(x)). With z that sum and f the logit of one class, two methods say how much
of the block's effect on f came by which summand:

- `gradient-x-activation` (captum's LayerGradientXActivation): Σ ∂f/∂z · F(x) and Σ ∂f/∂z · shortcut(x). They add up to
  Σ ∂f/∂z · z, but for rounding: a relative 1e-4 of the absolute contributions in float32. One forward and backward pass.
- `conductance` (Dhamdhere, Sundararajan and Yan 2018): ∫ ∂f/∂z · dF and ∫ ∂f/∂z · dshortcut along the straight path from
  a baseline image to the image. Every path through the network crosses every block, so they add up to the logit's
  difference to the baseline's, but for the steps of the integral: compare the columns `total` and `logit` (in 64 steps,
  within 3 % of the absolute contributions on the networks of the tests). The integral is a trapezoid sum over all blocks
  at once; captum's LayerConductance is the same integral by rectangles, block by block.

One row a block:

| column | meaning | unit |
| --- | --- | --- |
| `iteration` | of the training, from 0; a running count of explanations where there is no training | |
| `block`, `stage`, `position` | name; n of `stageN` or `layerN`, else 0; order in the forward pass from 1 | |
| `method`, `target` | as above; `given` classes or the `predicted` ones | |
| `images` | averaged over | |
| `branch`, `shortcut`, `total` | contributions to the logit, mean over images; `total` is both together | logit |
| `branch_absolute`, `shortcut_absolute` | the same, the elements' absolute values summed: what cancels is seen | logit |
| `branch_share` | ∣branch∣ / (∣branch∣ + ∣shortcut∣), of each image, then averaged: from 0 to 1, whatever the signs | |
| `branch_share_absolute` | the same of the absolute contributions | |
| `logit` | the logit of the class; for `conductance` its difference to the baseline's | logit |

and `_std` behind a name is the standard deviation over images (NaN for one image). A plain block has no shortcut: its
`shortcut` is 0 and its share 1. A share is NaN where branch and shortcut are both 0.

The network is explained as it answers in eval mode: in train mode, batch normalization would make an image's logit depend
on the other images. All passes run through a copy of the network, so its mode, weights, gradients, statistics and hooks
and the random numbers are not touched, and no other probe sees them. Hooks are not copied: what a hook changes in the
network's answers is not explained. Images are given as the network takes them, normalized.

Blocks are those of resprobe and of torchvision's ResNets; in the copy, torchvision's work out of place. A block that is
used twice in one pass is refused by name, as is one that does not simply add its branch and its shortcut. A network without
blocks, such as VGG, has neither; `integrated_gradients` and `pictures` explain any network.

`torch.compile` and `DistributedDataParallel`: what is explained is the module beneath, uncompiled, in this process.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import pandas
import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerGradientXActivation
from torch import Tensor, nn
from torchvision.models import resnet

import resprobe as rp
from resprobe.errors import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("gradient-x-activation", "conductance")
STEPS = 64
"""Intervals of the path from the baseline to the image."""
BATCH = 64
"""Images, or points on paths, per pass."""

_MEASURES = (
    *("branch", "shortcut", "total", "branch_absolute", "shortcut_absolute"),
    *("branch_share", "branch_share_absolute", "logit"),
)
COLUMNS = (
    *("iteration", "block", "stage", "position", "method", "target", "images"),
    *(column for measure in _MEASURES for column in (measure, f"{measure}_std")),
)
_Explain = TypeVar("_Explain", bound=Callable[..., pandas.DataFrame])


def _apart(explain: _Explain) -> _Explain:
    """Explains with gradients, wherever it is called, and leaves the random numbers as they were."""

    @functools.wraps(explain)
    def wrapped(network: nn.Module, *args: Any, **options: Any) -> pandas.DataFrame:
        with rp.keeping_random_state(network), torch.inference_mode(False), torch.enable_grad():
            return explain(network, *args, **options)

    return cast(_Explain, wrapped)


@_apart
def branch_and_shortcut(
    network: nn.Module,
    images: Tensor,
    targets: Tensor | int | None = None,
    *,
    method: str = "gradient-x-activation",
    steps: int = STEPS,
    baseline: Tensor | float = 0.0,
    batch_size: int = BATCH,
    per_image: bool = False,
) -> pandas.DataFrame:
    """How much of each block's effect on a logit runs through its branch and how much through its shortcut.

    `images`: [N, C, H, W], normalized as the network takes them. `targets`: the classes whose logits are explained, [N]
    or one for all; None: the predicted ones. `steps` and `baseline` are for the conductance. A baseline is an image, or one
    value for all pixels; 0 is the mean image where the mean was subtracted. `batch_size`: images per pass, or points on
    their paths, where an image's points go together. A pass holds the values and gradients of all branches and shortcuts.
    Columns: see the module; with `per_image`, one row a block and image instead, with `image` and `target_class` in the
    place of `images`, and no `_std`.

    Raises `UsageError` for a network without known blocks, and for a block that cannot be measured.
    """
    if method not in METHODS:
        raise rp.not_accepted("method", method, METHODS)
    rp.check_whole("steps", steps, 2)
    twin = _Twin(network)
    images, baseline = twin.take(images), _as_baseline(baseline, images)
    sums = twin.tap_blocks(images[:1])
    classes = twin.classes(images, targets)
    count = max(1, batch_size if method == "gradient-x-activation" else batch_size // (steps + 1))
    rows = []
    for start in range(0, len(images), count):
        part, part_classes = images[start : start + count], classes[start : start + count]
        if method == "conductance":
            path = _path(part, baseline.to(part), steps)
            measured = _measure(twin, sums, path.flatten(0, 1), part_classes.repeat(steps + 1))
            logits = twin.logits(path[[0, -1]].flatten(0, 1), part_classes.repeat(2)).unflatten(0, (2, -1))
            logit = logits[1] - logits[0]
        else:
            measured = _measure(twin, sums, part, part_classes)
            logit = twin.logits(part, part_classes)
        for block, gradient, branch, shortcut in measured:
            if method == "conductance":
                parts = [_integral(gradient, each, steps) for each in (branch, shortcut)]
            else:
                parts = [gradient * each for each in (branch, shortcut)]
            figures = torch.stack([*_sums(*parts), _wide(logit)], dim=1).tolist()
            for index, row in enumerate(figures):
                where = (start + index, int(part_classes[index]))
                rows.append(
                    (block.name, rp.probes.stage_of(block.name), block.position, method, _kind(targets), *where, *row)
                )
    columns = ["block", "stage", "position", "method", "target", "image", "target_class"]
    table = pandas.DataFrame(rows, columns=[*columns, *_MEASURES])
    return table if per_image else _averaged(table)


@rp.register_probe("attribution")
class Attribution(rp.Probe):
    """`branch_and_shortcut` as a probe: `probe.explain(images, targets)` while it is attached, then `probe.table()`.

    In a training it explains the `images` it was made with, at the iterations of `schedule`; by default ten in every
    power of ten. `method`, `steps`, `baseline` and `batch_size` are those of `branch_and_shortcut`.
    """

    name = "attribution"

    def __init__(
        self,
        images: Tensor | None = None,
        targets: Tensor | int | None = None,
        *,
        schedule: rp.probes.Schedule | None = None,
        method: str = METHODS[0],
        steps: int = STEPS,
        baseline: Tensor | float = 0.0,
        batch_size: int = BATCH,
    ):
        super().__init__()
        self.images, self.targets = images, targets
        self.schedule = schedule or rp.probes.logarithmic()
        self.options: dict[str, Any] = {
            "method": method,
            "steps": steps,
            "baseline": baseline,
            "batch_size": batch_size,
        }
        self._network: nn.Module | None = None
        self._rows: list[list[Any]] = []

    def hook(self, network: nn.Module) -> Iterator[Any]:
        if not any(isinstance(module, rp.probes.block_classes()) for module in network.modules()):
            raise _no_blocks(network)
        self._network = network
        yield _Release(self)  # there is nothing to hook, but to be attached twice is refused all the same

    def lacks(self) -> str:
        if self.images is not None:
            return ""
        return (
            "images to explain: in Python probes=[plugins.attribution.Attribution(images, targets)]; "
            "studies.branch_contribution explains trained networks"
        )

    def after_backward(self, network: nn.Module, iteration: int) -> None:
        self._explain(self.images, self.targets, iteration)

    def explain(self, images: Tensor, targets: Tensor | int | None = None) -> pandas.DataFrame:
        """Explains the network's logits for `images` as it is now; gives the rows that it adds to the table."""
        return self._explain(images, targets, self._rows[-1][0] + 1 if self._rows else 0)

    def _explain(self, images: Tensor, targets: Tensor | int | None, iteration: int) -> pandas.DataFrame:
        if self._network is None:
            raise rp.UsageError("attribution is not attached: explain inside `with rp.attach(network, ...)`")
        rows = branch_and_shortcut(self._network, images, targets, **self.options)
        rows.insert(0, "iteration", iteration)
        self._rows += [list(row) for row in rows.astype(object).itertuples(index=False)]
        return rows

    def table(self) -> pandas.DataFrame:
        """All explanations; the module's docstring explains the columns."""
        return pandas.DataFrame(self._rows, columns=list(COLUMNS))

    def state(self) -> list[list[Any]]:
        return self._rows

    def load_state(self, state: list[list[Any]]) -> None:
        self._rows = [list(row) for row in state]


@_apart
def integrated_gradients(
    network: nn.Module,
    images: Tensor,
    targets: Tensor | int | None = None,
    *,
    steps: int = STEPS,
    baseline: Tensor | float = 0.0,
) -> pandas.DataFrame:
    """Integrated gradients (Sundararajan, Taly and Yan 2017, by captum) of a logit for every pixel.

    One row an image: `target_class`, `logit`, `difference` (to the baseline's logit), `delta` (what the attributions sum
    to, less `difference`: the error of the integral) and `attribution`, a [C, H, W] tensor on the CPU. Unit: logit.
    """
    rp.check_whole("steps", steps, 2)
    twin = _Twin(network)
    images, baseline = twin.take(images), _as_baseline(baseline, images)
    classes = twin.classes(images, targets)
    method, rows = IntegratedGradients(twin.network), []
    for image, target in zip(images.split(1), classes.split(1), strict=True):
        start = baseline.to(image).expand_as(image)
        attribution = method.attribute(image, start, target=target, n_steps=steps, internal_batch_size=BATCH)
        before, after = twin.logits(torch.cat([start, image]), target.repeat(2)).cpu().double().tolist()
        delta = float(attribution.cpu().sum(dtype=torch.float64)) - (after - before)
        rows.append((int(target), after, after - before, delta, attribution[0].detach().cpu()))
    return pandas.DataFrame(rows, columns=["target_class", "logit", "difference", "delta", "attribution"])


def pictures(
    network: nn.Module,
    images: Tensor,
    targets: Tensor | int | None = None,
    *,
    shown: Tensor | None = None,
    steps: int = STEPS,
    baseline: Tensor | float = 0.0,
) -> Figure:
    """The images, and below each what speaks for (red) and against (blue) the class: integrated gradients.

    Pixels are summed over channels and scaled by the image's largest. Above each pair stands the class with its logit,
    below it the convergence delta: how far the attributions' sum is from the logit's difference to the baseline's.
    `shown`: the images as they are to be seen, [N, C, H, W], if not stretched from their own darkest to brightest value.
    """
    explained = integrated_gradients(network, images, targets, steps=steps, baseline=baseline)
    seen = images if shown is None else shown
    if len(seen) != len(images):
        raise rp.UsageError(f"shown has {len(seen)} images, but {len(images)} are explained")
    columns = min(8, len(images))
    bands = -(-len(images) // columns)
    figure, _ = rp.figures.new_figure(width=1.6 * columns + 0.4, height=4.4 * bands)
    figure.clear()  # the house's size and layout; pictures need axes of their own
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    kind = "class" if targets is not None else "predicted"
    for index, row in enumerate(explained.itertuples()):
        band, column = divmod(index, columns)
        above, below = axes[2 * band, column], axes[2 * band + 1, column]
        above.imshow(_picture(seen[index]), cmap="gray")
        above.set_title(f"{kind} {row.target_class}\nlogit {row.logit:.2f}", fontsize=9)
        map_ = row.attribution.sum(0).numpy()
        limit = abs(map_).max() or 1.0
        below.imshow(map_, cmap="RdBu_r", vmin=-limit, vmax=limit)
        below.set_title(f"sum off by {row.delta:+.1g}\nof {row.difference:.2f}", fontsize=9, y=-0.3)
    return figure


# -- the copy that is explained --------------------------------------------------------------------------------------


class Tap(nn.Module):
    """Hands on what a module gives, as a tensor of its own, and counts how often.

    An identity shortcut gives the very tensor that the branch is given too, whose gradient holds both ways' shares.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.uses = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.uses += 1
        out = self.inner(x)
        return out.view_as(out)

    # A block whose own forward pass looks into its branch finds what is there. `tap_blocks` refuses one that never calls it.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: Any) -> Any:
        return self.inner[index]


class _Block(NamedTuple):
    name: str
    kind: str
    branch: Tap
    shortcut: Tap | None
    position: int = 0


class _Twin:
    """A copy of a network in eval mode, without hooks, in which nothing works in place."""

    def __init__(self, network: nn.Module):
        network = rp.probes.unwrap(network)
        if any(parameter.is_meta for parameter in network.parameters()):
            raise rp.UsageError("attribution explains numbers, and a network on device 'meta' has none")
        try:
            self.network = copy.deepcopy(network, rp.probes.without_hooks(network)).eval().requires_grad_(False)
        except Exception as error:
            raise rp.UsageError(
                f"attribution works on a copy of the network, and {type(network).__name__} cannot be copied: {one_line(error)}"
            ) from error
        for module in self.network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False

    def take(self, images: Tensor) -> Tensor:
        """A copy of the images on the network's device; like the network's, it is no inference tensor."""
        if not (isinstance(images, Tensor) and images.is_floating_point() and images.ndim >= 2 and len(images)):
            what = f"{tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise rp.UsageError(f"images (={what}) must be floating-point [N, C, H, W], normalized, N ≥ 1")
        tensor = next(self.network.parameters(), images)
        return images.detach().to(tensor.device, tensor.dtype, copy=True)

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        answers = []
        for part in images.split(BATCH):
            answer = self.network(part)
            if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(part):
                what = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise rp.UsageError(
                    f"attribution explains logits [N, classes]; the network turns {tuple(part.shape)} into {what}"
                )
            answers.append(answer)
        return torch.cat(answers)

    def logits(self, images: Tensor, classes: Tensor) -> Tensor:
        """The logit of each image's class, [N]."""
        return self.answers(images).gather(1, classes[:, None])[:, 0]

    def classes(self, images: Tensor, targets: Tensor | int | None) -> Tensor:
        """The classes to explain, [N]."""
        answers = self.answers(images)
        if targets is None:
            return answers.argmax(1)
        # A copy, as `take` makes one: autograd keeps no inference tensor.
        classes = torch.as_tensor(targets).to(images.device, torch.long, copy=True)
        classes = classes.expand(len(images)) if classes.ndim == 0 else classes
        if classes.shape != (len(images),):
            raise rp.UsageError(
                f"targets have the shape {tuple(classes.shape)}; expected [{len(images)}], one an image"
            )
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= answers.shape[1]:
            wrong = low if low < 0 else high
            raise rp.UsageError(f"targets hold the class {wrong}; the network has 0 to {answers.shape[1] - 1}")
        return classes

    def tap_blocks(self, image: Tensor) -> list[_Block]:
        """Taps every branch and shortcut; gives the blocks in forward order, as one pass of `image` meets them."""
        blocks = []
        for name, module in list(self.network.named_modules()):
            found = _tap(module)
            if found is not None:
                blocks.append(_Block(name, type(module).__name__, *found))
        if not blocks:
            raise _no_blocks(self.network)
        order: dict[Tap, int] = {}
        handles = [
            block.branch.register_forward_pre_hook(lambda tap, _: order.setdefault(tap, len(order) + 1) and None)
            for block in blocks
        ]
        self.answers(image)
        for handle in handles:
            handle.remove()
        for block in blocks:
            for tap in filter(None, (block.branch, block.shortcut)):
                if tap.uses != 1:
                    raise rp.UsageError(
                        f"attribution cannot measure {block.name!r} ({block.kind}): its branch or shortcut is called {tap.uses} "
                        "times in one pass; expected once"
                    )
        return sorted(
            (block._replace(position=order[block.branch]) for block in blocks), key=lambda each: each.position
        )


def _tap(block: nn.Module) -> tuple[Tap, Tap | None] | None:
    """Puts taps in the place of a block's two summands; None if the module is no block."""
    if isinstance(block, rp.Block):
        block.branch = Tap(block.branch)
        if block.shortcut is not None:
            block.shortcut = Tap(block.shortcut)
        return block.branch, block.shortcut
    if isinstance(block, resnet.BasicBlock | resnet.Bottleneck):
        # Its last normalization ends the branch; where nothing is projected, the input itself is added.
        last = "bn2" if isinstance(block, resnet.BasicBlock) else "bn3"
        setattr(block, last, Tap(getattr(block, last)))
        block.downsample = Tap(nn.Identity() if block.downsample is None else block.downsample)
        return getattr(block, last), block.downsample
    return None


def _no_blocks(network: nn.Module) -> rp.UsageError:
    return rp.UsageError(
        f"attribution finds no block in {type(network).__name__}: it knows resprobe.Block (`.branch` and `.shortcut`) and "
        "torchvision's BasicBlock and Bottleneck"
    )


class _Release:
    """Stands where a hook's handle would: lets the network go."""

    def __init__(self, probe: Attribution):
        self.probe = probe

    def remove(self) -> None:
        self.probe._network = None


# -- measuring -------------------------------------------------------------------------------------------------------


def _measure(
    twin: _Twin, blocks: list[_Block], images: Tensor, classes: Tensor
) -> Iterator[tuple[_Block, Tensor, Tensor, Tensor]]:
    """For every block: the logit's gradient for the sum, and the values of the branch and of the shortcut."""
    taps = [tap for block in blocks for tap in (block.branch, block.shortcut) if tap is not None]
    images = images.clone().requires_grad_()
    gradient_of = LayerGradientXActivation(twin.network, taps, multiply_by_inputs=False)
    gradients = dict(zip(taps, gradient_of.attribute(images, target=classes), strict=True))
    values = dict(zip(taps, LayerActivation(twin.network, taps).attribute(images), strict=True))
    for block in blocks:
        gradient, branch = gradients[block.branch].detach(), values[block.branch].detach()
        shortcut = torch.zeros_like(branch)
        if block.shortcut is not None:
            shortcut = values[block.shortcut].detach()
            # What is added as it is has the gradient of the sum, however small that is.
            rounding = 1e-6 * float(gradient.nan_to_num(0, 0, 0).abs().max())
            if not torch.allclose(gradient, gradients[block.shortcut], rtol=1e-4, atol=rounding, equal_nan=True):
                raise rp.UsageError(
                    f"attribution cannot measure {block.name!r} ({block.kind}): it does not add its branch and its "
                    "shortcut as they are"
                )
        yield block, gradient, branch, shortcut


def _path(images: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """Points from the baseline to each image, [steps + 1, N, C, H, W]."""
    weights = torch.linspace(0, 1, steps + 1, device=images.device, dtype=images.dtype)
    return torch.lerp(baseline.expand_as(images), images, weights.reshape(-1, *(1 for _ in images.shape)))


def _integral(gradient: Tensor, value: Tensor, steps: int) -> Tensor:
    """∫ ∂f/∂z · dvalue over the path, [N, ...], by the trapezoid rule; both given at its points one after the other."""
    gradient, value = (each.unflatten(0, (steps + 1, -1)) for each in (gradient, value))
    return ((gradient[1:] + gradient[:-1]) / 2 * value.diff(dim=0)).sum(0)


def _wide(x: Tensor) -> Tensor:
    """The same numbers in float64; on the CPU, if they are on one of Apple's GPUs, which have no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _sums(branch: Tensor, shortcut: Tensor) -> list[Tensor]:
    """The measures of each image but the logit, from the contributions of the elements."""
    if branch.device.type == "mps":  # which has no float64
        branch, shortcut = branch.cpu(), shortcut.cpu()
    sums = [each.flatten(1).sum(1, dtype=torch.float64) for each in (branch, shortcut, branch + shortcut)]
    sums += [each.abs().flatten(1).sum(1, dtype=torch.float64) for each in (branch, shortcut)]
    for one, other in (sums[:2], sums[3:5]):
        sums.append(one.abs() / (one.abs() + other.abs()))
    return sums


def _averaged(table: pandas.DataFrame) -> pandas.DataFrame:
    """Means and standard deviations over the images."""
    where = ["block", "stage", "position", "method", "target"]
    groups = table.groupby(where, sort=False)
    result = groups.size().rename("images").to_frame()
    mean, spread = groups[list(_MEASURES)].mean(), groups[list(_MEASURES)].std()
    for measure in _MEASURES:
        result[measure], result[f"{measure}_std"] = mean[measure], spread[measure]
    return result.reset_index().sort_values("position", ignore_index=True)


def _as_baseline(baseline: Tensor | float, images: Tensor) -> Tensor:
    """The baseline, [1, C, H, W]."""
    result = torch.as_tensor(baseline).clone()  # no inference tensor either
    try:
        return result.expand_as(images[:1])
    except RuntimeError:
        raise rp.UsageError(
            f"baseline has the shape {tuple(result.shape)}; expected one value or that of an image, "
            f"{tuple(images.shape[1:])}"
        ) from None


def _kind(targets: Tensor | int | None) -> str:
    return "predicted" if targets is None else "given"


def _picture(image: Tensor) -> Any:
    """[H, W, 3] or [H, W] from 0 to 1, as it can be shown."""
    image = image.detach().float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    return image.permute(1, 2, 0).numpy() if len(image) == 3 else image.mean(0).numpy()
