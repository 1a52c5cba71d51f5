"""Where a classification network is cut in two to become a detector (Appendix A).

The trunk is run once an image: conv1…conv4_x of a ResNet, all convolutions of VGG. The head is run once a region, on what
RoI pooling takes out of the trunk's map: conv5_x and the average pooling of a ResNet, the two hidden fc layers of VGG.
The layer that gives the classes is left out. Nothing is assumed of what is inside a stage.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torchvision
from torch import nn

import resprobe as rp
from resprobe.errors import blamed


@dataclass(frozen=True)
class Backbone:
    """The two halves of a network, which share its modules and weights.

    `head(pooled(trunk(images)))` is what the network's last layer sees.
    """

    trunk: nn.Sequential
    """The stages that are shared, by name: stem, stage1, … of a ResNet (conv1, conv2_x, …); stage1, … of VGG."""
    head: nn.Sequential
    """From a region's map [N, channels, region_size, region_size] to its feature [N, features]."""
    in_channels: int
    """Channels of the images."""
    stride: int
    """Pixels of the image for one of the trunk's map, along a side."""
    channels: int
    """Channels of the trunk's map."""
    region_size: int
    """Side of the maps that the head takes."""
    features: int
    """Numbers that the head gives for a region."""


def split(network: nn.Module, region_size: int | None = None) -> Backbone:
    """Cuts a network from `rp.build`, or torchvision's ResNets and VGGs, in two.

    The network must have parts stem, stage1, stage2, …, then those that pool and classify, as all families of `rp.build`
    have. It is cut before the last stage; if hidden fc layers follow the stages, as in VGG, it is cut at the last
    stage's max pooling, in whose place RoI pooling steps. `region_size` is the side of the regions' maps: 14 unless
    given, which a last stage of stride 2 turns into 7; with hidden fc layers it is the side that they were made for.

    Raises `rp.UsageError` for a network without such parts, or if its halves do not fit together.
    """
    parts = _parts(network)
    names = list(parts)
    cut = max((place for place, name in enumerate(names) if re.fullmatch(r"stage\d+", name)), default=0)
    if cut == 0:
        raise rp.UsageError(
            f"network (={_describe(network)}) cannot be a detector's backbone: it has no parts stem, stage1, stage2, "
            "…; accepted: networks of rp.build, torchvision's ResNet and VGG"
        )
    before = OrderedDict((name, parts[name]) for name in names[:cut])
    last = parts[names[cut]]
    after = OrderedDict((name, parts[name]) for name in names[cut + 1 : -1])
    if any(isinstance(module, nn.Linear) for part in after.values() for module in part.modules()):
        trunk = nn.Sequential(before | {names[cut]: _without_last_pool(last)})
        for name in [name for name, part in after.items() if isinstance(part, nn.AdaptiveAvgPool2d)]:
            size = after.pop(name).output_size
            region_size = region_size or (size if isinstance(size, int) else size[0])
        head = nn.Sequential(after)
    else:
        trunk, head = nn.Sequential(before), nn.Sequential(OrderedDict({names[cut]: last}) | after)
    region_size = region_size or 14
    in_channels = next((each.in_channels for each in trunk.modules() if isinstance(each, nn.Conv2d)), 3)
    side = 64
    _, channels, side_of_map, *_ = _shape(network, "trunk", trunk, (in_channels, side, side), dimensions=4)
    _, features = _shape(network, "head", head, (channels, region_size, region_size), dimensions=2)
    return Backbone(trunk, head, in_channels, side // side_of_map, channels, region_size, features)


def _parts(network: nn.Module) -> OrderedDict[str, nn.Module]:
    """The network's parts in forward order under the names that `rp.build` gives them; the last one classifies."""
    parts = OrderedDict(network.named_children())
    if isinstance(network, rp.Network):
        return _parts(parts["body"]) if list(parts) == ["body"] else parts
    if isinstance(network, torchvision.models.ResNet):
        stem = OrderedDict((name, parts[name]) for name in ("conv1", "bn1", "relu", "maxpool"))
        stages = OrderedDict((f"stage{index}", parts[f"layer{index}"]) for index in (1, 2, 3, 4))
        return OrderedDict(
            stem=nn.Sequential(stem), **stages, pool=parts["avgpool"], flatten=nn.Flatten(), fc=parts["fc"]
        )
    if isinstance(network, torchvision.models.VGG):
        stages, layers = OrderedDict(), OrderedDict()
        for name, layer in network.features.named_children():
            layers[name] = layer
            if isinstance(layer, nn.MaxPool2d):
                stages[f"stage{len(stages) + 1}"] = nn.Sequential(layers)
                layers = OrderedDict()
        if layers:
            stages[f"stage{len(stages) + 1}"] = nn.Sequential(layers)
        hidden = OrderedDict((f"classifier{name}", layer) for name, layer in network.classifier.named_children())
        return OrderedDict(**stages, pool=parts["avgpool"], flatten=nn.Flatten(), **hidden)
    return OrderedDict()


def _without_last_pool(stage: nn.Module) -> nn.Module:
    parts = list(stage.named_children())
    pooled = isinstance(stage, nn.Sequential) and isinstance(parts[-1][1], nn.MaxPool2d)
    return nn.Sequential(OrderedDict(parts[:-1])) if pooled else stage


def _shape(
    network: nn.Module, half: str, module: nn.Sequential, shape: tuple[int, ...], *, dimensions: int
) -> torch.Size:
    """The shape of what one half makes of one input; the half itself is left as it is."""
    weight = next(module.parameters(), torch.empty(0))
    module = copy.deepcopy(module).eval()
    what = f"network (={_describe(network)}) cannot be a detector's backbone: its {half}"
    with blamed(f"{what} fails on an input of shape {(1, *shape)}"), torch.no_grad():
        made = module(torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)).shape
    if len(made) != dimensions:
        raise rp.UsageError(
            f"{what} turns an input of shape {(1, *shape)} into {tuple(made)}; expected {dimensions} dimensions"
        )
    return made


def _describe(network: nn.Module) -> str:
    return network.spec.name if isinstance(network, rp.Network) and hasattr(network, "spec") else type(network).__name__
