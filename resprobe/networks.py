"""Plain and residual networks by name: `build("cifar/resnet-110", shortcut="A")`.

A family is a function `(depth, *, options...) -> Network`; its signature states which options it takes and their
defaults, so that a specification is always complete and a stranger's family needs no other declaration.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resprobe.blocks import BLOCKS, Block
from resprobe.errors import UsageError, blamed, check_whole, nearest, not_accepted, plain, short
from resprobe.initialization import INITIALIZATIONS, initialize
from resprobe.layers import Layers
from resprobe.normalization import NORMALIZATIONS
from resprobe.registry import Registry
from resprobe.shortcuts import SHORTCUTS
from resprobe.tables import network_name

if TYPE_CHECKING:
    from resprobe.data import Data

Option = int | str | bool | float | None

NETWORKS: Registry[Callable[..., nn.Module]] = Registry("network")


_REGISTERED = {"block": BLOCKS, "shortcut": SHORTCUTS, "norm": NORMALIZATIONS, "init": INITIALIZATIONS}
"""Options of networks whose values are names of registered things."""


def register_network(name: str, *, defaults: Callable[[int], Mapping[str, Option]] | None = None):
    """Decorator that files a family `(depth, *, options...) -> nn.Module` under `name`.

    `defaults(depth)` gives the values of options whose default depends on the depth; the signature says None there.
    """
    return NETWORKS.register(name, defaults)


# Blocks per stage (Table 1), by the weighted layers of a block.
_IMAGENET_BLOCKS = {
    2: {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)},
    3: {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)},
}
# VGG (Simonyan and Zisserman 2015), configurations D and E: 3×3 convolutions per stage.
_VGG_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_IMAGENET_DEPTHS = {*_IMAGENET_BLOCKS[2], *_IMAGENET_BLOCKS[3], *_VGG_CONVOLUTIONS}


@dataclass(frozen=True)
class NetworkSpec:
    """What a network is, complete and without its weights: family, depth, and every option of the family.

    Hashable and JSON-able; `build(spec)` makes the network again.
    """

    family: str
    depth: int | None
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        # JSON knows no tuples: what comes back as lists becomes what was written.
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(name), value) for name, value in pairs)))

    def __getitem__(self, option: str) -> Option:
        return dict(self.options)[option]

    def get(self, option: str, default: Option = None) -> Option:
        """The value of an option, or `default` where the family has no such option."""
        return dict(self.options).get(option, default)

    @property
    def name(self) -> str:
        """The name `build` takes: "cifar/resnet-20"."""
        return self.family if self.depth is None else f"{self.family}-{self.depth}"

    @property
    def kind(self) -> str:
        """ "plain", "residual", "VGG", or the name of another family."""
        name = self.family.rpartition("/")[2]
        known = {"plain": "plain", "resnet": "residual", "vgg": "VGG"}
        return "plain" if self.get("shortcut") == "none" else known.get(name, name)

    @property
    def label(self) -> str:
        """The name by which people know it: "ResNet-20", "plain-20", "VGG-16"."""
        return network_name(self.kind, self.depth)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NetworkSpec:
        """The specification that `to_json` wrote."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{name}={value}' for name, value in self.options)})"


class Network(nn.Sequential):
    """A network that `build` made: its parts in order, and what it is in `.spec`.

    `normalization` is the input normalization its weights were trained with (see `resprobe.data.Normalization`), or
    None while it is untrained; `evaluate` uses it.
    """

    spec: NetworkSpec
    normalization = None

    @property
    def depth(self) -> int | None:
        """Weighted layers on the longest path, as the paper counts them (shortcut projections are not counted)."""
        return self.spec.depth

    def blocks(self) -> list[tuple[str, Block]]:
        """The building blocks in forward order, each with its name."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, Block)]


def build(network: str | NetworkSpec, **options: Option) -> Network:
    """Builds a network, its weights freshly initialized from torch's global random generator.

    `network` is a name ("cifar/resnet-110", "cifar/plain-56", "imagenet/resnet-50", "imagenet/vgg-16", or that of a
    registered family) or a `NetworkSpec`; options replace those of the specification or the family's defaults.
    Raises `UsageError` for an unknown family, a depth the family does not have, or an option it does not take.
    """
    spec = resolve(network, **options)
    with blamed(f"{spec} cannot be built"):
        made = _made(spec)
    result = made if isinstance(made, Network) else Network(OrderedDict(body=made))
    result.spec = spec
    checked = set()
    for name, block in result.blocks():
        shape = (type(block), block.in_channels, block.out_channels, block.stride)
        if shape not in checked:
            checked.add(shape)
            try:
                block.check_shapes()
            except UsageError as error:
                raise UsageError(f"{spec.name}, {name}: {error}") from error.__cause__
    shortcut = spec.get("shortcut", "none")
    if shortcut != "none" and (blocks := result.blocks()) and all(block.shortcut is None for _, block in blocks):
        raise UsageError(
            f"shortcut (={shortcut!r}) returns none in any block of {spec.name}, which would be a plain network"
        )
    if spec.get("init") is not None:  # a stranger's family without that option initializes its networks itself
        with blamed(f"{spec} cannot be initialized"):  # a stranger's module may do so itself
            initialize(result, str(spec["init"]))
    return result


def _made(spec: NetworkSpec) -> nn.Module:
    return NETWORKS[spec.family](**({} if spec.depth is None else {"depth": spec.depth}), **dict(spec.options))


def check_family(spec: NetworkSpec) -> None:
    """Raises `UsageError` for what the family refuses, above all a depth that it does not have. Costs neither memory nor the
    drawing of weights; of what a stranger's block does without them nothing is said."""
    try:
        with torch.device("meta"):
            _made(spec)
    except UsageError:
        raise
    except Exception:
        # A block may compute something when it is made; `build` says what is wrong with it, if anything.
        return


def resolve(network: str | NetworkSpec, **options: Option) -> NetworkSpec:
    """The complete specification for a name and options, without building anything."""
    if isinstance(network, NetworkSpec):
        family, depth, options = network.family, network.depth, {**dict(network.options), **options}
    else:
        family, depth = _parse_name(network)
    signature = inspect.signature(NETWORKS[family]).parameters.values()
    parameters = {each.name: each for each in signature if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    takes_depth = parameters.pop("depth", None) is not None
    if takes_depth != (depth is not None):
        wanted = f"needs a depth: {family}-DEPTH" if takes_depth else f"takes no depth: {family}"
        raise UsageError(f"network (={network!r}) {wanted}")
    for option in options:
        if option not in parameters:
            raise not_accepted(f"option of {family}", option, parameters)
    complete = {name: parameter.default for name, parameter in parameters.items()}
    by_depth = NETWORKS.about(family)
    complete |= {name: value for name, value in (by_depth(depth) if by_depth else {}).items() if name in parameters}
    complete |= {name: plain(value) for name, value in options.items()}
    for name, value in complete.items():
        if value is inspect.Parameter.empty:
            raise UsageError(f"network (={network!r}) needs a value for its option {name}, which has no default")
        _check_option(name, value)
    return NetworkSpec(family, depth, tuple(complete.items()))


def made_of(spec: NetworkSpec) -> list[tuple[Registry, str]]:
    """What a network takes from registries, and under which names."""
    used = [(NETWORKS, spec.family), *((registry, spec.get(option)) for option, registry in _REGISTERED.items())]
    return [(registry, str(name)) for registry, name in used if name is not None and name in registry]


def check_fit(spec: NetworkSpec, data: Data) -> None:
    """Raises `UsageError` if the network's channels or classes are not the data's."""
    for name, needed in (("in_channels", data.in_channels), ("num_classes", data.num_classes)):
        if spec.get(name, needed) != needed:
            raise UsageError(
                f"{name} (={spec.get(name)}) of {spec.name} does not fit data {data.name!r}, which has {needed}"
            )


def check_logits(network: nn.Module, given: object, images: int, classes: int) -> None:
    """Raises `UsageError` unless what a network gave for so many images is one logit a class for each, or more."""
    if isinstance(given, Tensor) and given.ndim == 2 and len(given) == images and given.shape[1] >= classes:
        return
    what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
    raise UsageError(
        f"{type(network).__name__} gives {what} for {images} images of {classes} classes; a tensor of shape "
        f"({images}, {classes}) is needed"
    )


def _parse_name(name: str) -> tuple[str, int | None]:
    if not isinstance(name, str):
        raise UsageError(f"network (={short(name)}) must be a name such as 'cifar/resnet-20' or a NetworkSpec")
    family, dash, depth = name.rpartition("-")
    if depth.isdecimal() and family.endswith("-") and family[:-1] in NETWORKS:
        return family[:-1], -int(depth)  # the family itself says which depths it has
    for known in (NETWORKS.known, NETWORKS.__contains__):  # plugins are looked into only if nothing else fits
        if known(name):  # also one that ends like a depth: "my-net-2"
            return name, None
        if depth.isdecimal() and known(family):
            return family, int(depth)
    if depth.isdecimal():
        raise not_accepted("network", family, NETWORKS.names())
    if dash and family in NETWORKS:
        raise UsageError(f"depth (={depth!r}) of network {name!r} must be a whole number")
    if slip := re.fullmatch(r"(\D+)(\d+)", name):  # "cifar/resnet20", "resnet50"
        group = "" if "/" in name else "imagenet/" if int(slip[2]) in _IMAGENET_DEPTHS else "cifar/"
        if near := nearest(group + slip[1], NETWORKS.names()):
            raise UsageError(f"network (={name!r}) is unknown; nearest: {near}-{slip[2]}")
    raise not_accepted("network", name, NETWORKS.names())


def _check_option(name: str, value: Option) -> None:
    try:
        hash(value)
    except TypeError:
        raise UsageError(f"{name} (={short(value)}) must be a text, a number, True, False, None or a tuple") from None
    if name in _REGISTERED:
        _REGISTERED[name][value]  # type: ignore[index]
    if name in ("width", "num_classes", "in_channels"):
        check_whole(name, value, 1)
    if name == "stride_in" and value not in ("1x1", "3x3"):
        raise not_accepted("stride_in", value, ("1x1", "3x3"))


def _stages(
    blocks: tuple[int, ...], width: int, stem_width: int, block: str, shortcut: str, layers: Layers
) -> tuple[OrderedDict[str, nn.Module], int]:
    """Stages of blocks; each after the first halves the map and doubles the width (§3.3, rule ii)."""
    make, stages, channels = BLOCKS[block], OrderedDict(), stem_width
    for index, count in enumerate(blocks):
        stage = []
        for position in range(count):
            stride = 2 if index > 0 and position == 0 else 1
            stage.append(make(channels, width * 2**index, stride, shortcut=shortcut, layers=layers))
            channels = stage[-1].out_channels
        stages[f"stage{index + 1}"] = nn.Sequential(*stage)
    return stages, channels


def _head(channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes))


def depth_step(*blocks: str) -> int:
    """Layers by which depths of §4.2's networks grow with n, one block more in each of three stages: 6 for basic blocks, 9 for
    bottlenecks; of several blocks, the step in which depths come that all of them can make up."""
    return 3 * math.lcm(*(BLOCKS[block].weighted_layers for block in blocks))


@register_network("cifar/resnet")
def cifar_resnet(
    depth: int,
    *,
    block: str = "basic",
    shortcut: str = "A",
    width: int = 16,
    num_classes: int = 10,
    in_channels: int = 3,
    norm: str = "batch",
    init: str = "he",
    stride_in: str = "1x1",
) -> Network:
    """The networks of §4.2: 3×3 convolution, three stages of n blocks at {32, 16, 8} pixels and {16, 32, 64} filters.

    With two-layer blocks the depth is 6n+2, with three-layer bottlenecks 9n+2. Any input size works.
    """
    per_n = depth_step(block)
    if depth < per_n + 2 or (depth - 2) % per_n:
        below = max(per_n + 2, (depth - 2) // per_n * per_n + 2)
        neighbours = f"nearest are {below} and {below + per_n}" if depth > below else f"the smallest is {below}"
        raise UsageError(f"depth (={depth}) must be {per_n}n+2 with block {block!r}; {neighbours}")
    layers = Layers(norm, stride_in)
    stem = nn.Sequential(
        OrderedDict(conv=layers.conv(in_channels, width, kernel=3), norm=layers.norm(width), relu=nn.ReLU())
    )
    stages, channels = _stages(((depth - 2) // per_n,) * 3, width, width, block, shortcut, layers)
    return Network(OrderedDict(stem=stem, **stages, **_head(channels, num_classes)))


@register_network("cifar/plain")
def cifar_plain(
    depth: int,
    *,
    block: str = "basic",
    width: int = 16,
    num_classes: int = 10,
    in_channels: int = 3,
    norm: str = "batch",
    init: str = "he",
    stride_in: str = "1x1",
) -> Network:
    """The plain twin of `cifar/resnet`: the same layers, without shortcuts (§4.2)."""
    return cifar_resnet(**locals(), shortcut="none")


def _imagenet_defaults(depth: int) -> dict[str, Option]:
    """Basic blocks and option A for 18 and 34 layers, bottlenecks and option B for 50, 101 and 152 (§4.1)."""
    shallow = depth in _IMAGENET_BLOCKS[2]
    return {"block": "basic" if shallow else "bottleneck", "shortcut": "A" if shallow else "B"}


@register_network("imagenet/resnet", defaults=_imagenet_defaults)
def imagenet_resnet(
    depth: int,
    *,
    block: str = None,  # type: ignore[assignment]  # by depth
    shortcut: str = None,  # type: ignore[assignment]  # by depth
    width: int = 64,
    num_classes: int = 1000,
    in_channels: int = 3,
    norm: str = "batch",
    init: str = "he",
    stride_in: str = "1x1",
) -> Network:
    """The networks of Table 1. 18 and 34 layers: basic blocks, option A; 50, 101, 152: bottlenecks, option B (§4.1).

    A block of one's own fits the depths of the blocks with as many weighted layers as its own.
    """
    counts = _IMAGENET_BLOCKS.get(BLOCKS[block].weighted_layers)
    if counts is None:
        raise UsageError(
            f"block (={block!r}) has {BLOCKS[block].weighted_layers} weighted layers; Table 1 has 2 or 3 a block"
        )
    if depth not in counts:
        every = sorted(known for table in _IMAGENET_BLOCKS.values() for known in table)
        fit = f"; with block {block!r}: {', '.join(map(str, counts))}" if depth in every else ""
        raise UsageError(f"depth (={depth}) of ImageNet networks must be one of {', '.join(map(str, every))}{fit}")
    layers = Layers(norm, stride_in)
    stem = nn.Sequential(
        OrderedDict(
            conv=layers.conv(in_channels, width, kernel=7, stride=2),
            norm=layers.norm(width),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )
    stages, channels = _stages(counts[depth], width, width, block, shortcut, layers)
    return Network(OrderedDict(stem=stem, **stages, **_head(channels, num_classes)))


@register_network("imagenet/plain", defaults=_imagenet_defaults)
def imagenet_plain(
    depth: int,
    *,
    block: str = None,  # type: ignore[assignment]  # by depth
    width: int = 64,
    num_classes: int = 1000,
    in_channels: int = 3,
    norm: str = "batch",
    init: str = "he",
    stride_in: str = "1x1",
) -> Network:
    """The plain twin of `imagenet/resnet` (Fig. 3 middle)."""
    return imagenet_resnet(**locals(), shortcut="none")


@register_network("imagenet/vgg")
def imagenet_vgg(
    depth: int,
    *,
    width: int = 64,
    num_classes: int = 1000,
    in_channels: int = 3,
    norm: str = "none",
    init: str = "he",
) -> Network:
    """VGG-16 and VGG-19 (Fig. 3 left): the rivals of Tables 1, 3, 7 and 8. Input 224×224; dropout 0.5 in the head."""
    if depth not in _VGG_CONVOLUTIONS:
        close = min(_VGG_CONVOLUTIONS, key=lambda known: abs(known - depth))
        raise UsageError(f"depth (={depth}) of imagenet/vgg must be one of 16, 19; nearest: {close}")
    layers, parts, channels = Layers(norm), OrderedDict(), in_channels
    for index, count in enumerate(_VGG_CONVOLUTIONS[depth]):
        out, stage = min(width * 2**index, width * 8), OrderedDict()
        for position in range(1, count + 1):
            stage[f"conv{position}"] = layers.conv(channels, out, kernel=3)
            stage[f"norm{position}"] = layers.norm(out)
            stage[f"relu{position}"] = nn.ReLU()
            channels = out
        stage["pool"] = nn.MaxPool2d(2)
        parts[f"stage{index + 1}"] = nn.Sequential(stage)
    parts["pool"], parts["flatten"] = nn.AdaptiveAvgPool2d(7), nn.Flatten()
    features = channels * 7 * 7
    for index, (wide, out) in enumerate([(features, width * 64), (width * 64, width * 64)], start=1):
        parts[f"fc{index}"], parts[f"relu{index}"] = nn.Linear(wide, out), nn.ReLU()
        parts[f"dropout{index}"] = nn.Dropout(0.5)
    parts["fc"] = nn.Linear(width * 64, num_classes)
    return Network(parts)
