"""Reading published weights into our networks. The layout is recognised by its keys; loading runs no code."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from resprobe.data import Normalization
from resprobe.errors import UsageError, one_line, short
from resprobe.files import load_tensors, read_json
from resprobe.keeping import CONFIG, NETWORK
from resprobe.networks import Network, NetworkSpec, Option, build, made_of, resolve
from resprobe.shortcuts import ZeroPadding

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that normalize inputs of torchvision's models, and of the CIFAR weights with `linear`."""
# The same for chenyaofo/pytorch-cifar-models (2021; by the logs of their training): number of classes → statistics.
_CIFAR_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.507, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


def load_weights(network: Network, weights: str | Path | Mapping[str, Tensor]) -> Network:
    """Loads weights into `network`, in place, and returns it.

    `weights` is a file (.pth, .th, .pt, .safetensors), a finished run's folder, or a state dict. Layouts: resprobe's
    own, torchvision's ResNets and VGGs, and the two common CIFAR ones (`layer1.0.conv1`, …, with option A and `linear`, or
    with projections and `fc`), with or without a `module.` prefix. The input normalization that belongs to a layout is set as
    `network.normalization`.

    The CIFAR weights that end in `linear` were trained with option A's zeros on both sides; a network with trailing zeros
    (option A as in the paper) gets the same function, its channels permuted. Raises `UsageError` with how many tensors do not
    fit, and the first of them; of a run also for mismatches that no shape tells of, such as which convolution of a bottleneck
    takes the stride.
    """
    if not isinstance(network, Network):
        raise UsageError(f"network (={short(network)}) must be one that rp.build made")
    if not isinstance(weights, Mapping | str | Path):
        raise UsageError(f"weights (={short(weights)}) must be a file, a run's folder or a state dict")
    if not isinstance(weights, Mapping):
        _check_run(network, Path(weights))
    given = _unwrap(weights if isinstance(weights, Mapping) else _read(Path(weights)))
    own = network.state_dict()
    normalization, centred = None, False
    if "normalization.mean" in given:  # a run's file
        given, normalization = unpack_run(given)
    head = {"fc.weight", "fc.bias"}  # torchvision's ResNets call their last layer as we do
    if not (set(own) & set(given)) - head:
        statistics = _statistics(given)
        if "features.0.weight" in given:
            given = _from_torchvision_vgg(network, given)
        elif "conv1.weight" in given and "layer1.0.conv1.weight" in given:
            if "fc.weight" in given and network.spec.get("stride_in") == "1x1" and "layer1.0.conv3.weight" in given:
                raise UsageError(
                    "torchvision's bottleneck weights were trained with the stride in the 3×3 convolution; build "
                    f'the network with stride_in="3x3", not stride_in (={network.spec.get("stride_in")!r})'
                )
            if not any(block.shortcut is not None for _, block in network.blocks()):
                raise UsageError(f"the weights are those of a residual network, and {network.spec} has no shortcuts")
            centred = "linear.weight" in given
            given = {_resnet_name(name): value for name, value in given.items()}
        else:
            some = ", ".join(sorted(given)[:3]) or "none"
            raise UsageError(
                f"the layout of the weights is not known (first keys: {some}); accepted: resprobe, torchvision, CIFAR"
            )
        if statistics is None:
            warnings.warn(
                f"how the inputs of weights of {len(given['fc.weight'])} classes were normalized is not known; set the network's "
                "normalization"
            )
        else:
            normalization = Normalization.channels(*statistics)
    # Counters of batches seen are bookkeeping of the framework; old files lack them.
    given = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | given
    _check(network, own, given)
    network.load_state_dict(_zeros_from_centred(network, given) if centred else given)
    network.normalization = normalization or network.normalization
    return network


def pack_run(network: nn.Module, normalization: Normalization, running: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a run keeps of its trained network. `running`: the running statistics that precise ones have replaced.

    The precise statistics are the reported ones, and part of the network; the running ones stay beside them.
    """
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"running.{name}": tensor for name, tensor in running.items()}
    return tensors | {"normalization.mean": normalization.mean, "normalization.std": normalization.std}


def unpack_run(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Normalization]:
    """The network's state and the input normalization from what `pack_run` gave."""
    state = {name.removeprefix("network."): tensors[name] for name in tensors if name.startswith("network.")}
    return state, Normalization(tensors["normalization.mean"], tensors["normalization.std"])


def _statistics(given: Mapping[str, Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the pixels that published weights were trained on; None where they are not known."""
    if "fc.weight" in given and not any(name.startswith("layer4.") for name in given):
        return _CIFAR_STATISTICS.get(len(given["fc.weight"]))
    return IMAGENET_STATISTICS


def load_network(weights: str | Path) -> Network:
    """The network that these are the weights of, with its weights: a finished run's folder, or a file.

    A run's folder says how its network was built; a stranger's block must be registered (`load_plugin`). Of a file of
    torchvision's ResNets and VGGs, or in the common CIFAR layout, names and shapes say it. Of resprobe's own layout they do
    not say whether there are shortcuts that hold no weights, so the file's name must: plain-56.pth, resnet-56.pth.

    It is in training mode, as a new one: passes of your own want `.eval()` first. `Run.network` is in evaluation mode. Raises
    `UsageError` for what is neither, and for a file whose network is not known.
    """
    if not isinstance(weights, str | Path):
        raise UsageError(f"weights (={short(weights)}) must be a file or a run's folder; that of a Run is its .network")
    path = Path(weights)
    if path.is_dir() or path.name == NETWORK:
        spec = _run_spec(path)
        if spec is None:
            raise UsageError(f"weights (={str(path)!r}) must be the folder of a finished run, with {CONFIG} in it")
        try:
            network = build(spec)
        except UsageError as error:
            if (sources := _config_of(path).with_name("sources")).is_dir():
                raise UsageError(f"{error}; what this run was trained with is kept in {sources}") from error
            raise
        return load_weights(network, path)
    given = _unwrap(_read(path))
    return load_weights(build(_spec_of(given, path)), given)


def _spec_of(given: Mapping[str, Tensor], path: Path) -> NetworkSpec:
    """The network that these weights fit, by their names and shapes."""
    named = {_resnet_name(name): value for name, value in given.items()}
    norm = "batch" if any(name.endswith("running_mean") for name in given) else "none"
    vgg = [name for name in given if re.fullmatch(r"features\.\d+\.weight|stage\d+\.conv\d+\.weight", name)]
    convolutions = [name for name in vgg if given[name].ndim == 4]
    blocks = Counter(
        found[1] for name in named if (found := re.match(r"(stage\d+\.\d+)\.branch\.conv\d+\.weight", name))
    )
    stem = convolutions[0] if convolutions else "stem.conv.weight"
    head = "classifier.6.weight" if "classifier.6.weight" in given else "fc.weight"
    if not (convolutions or blocks) or not {stem, head} <= {*given, *named}:
        some = ", ".join(sorted(given)[:3])
        raise UsageError(
            f"weights (={str(path)!r}): what network they are of is not known (first keys: {some}); accepted: torchvision's "
            "ResNets and VGGs, CIFAR ResNets, a run's folder; else build the network, and load_weights into it"
        )
    width, in_channels = named[stem].shape[:2]
    options: dict[str, Option] = {"width": width, "in_channels": in_channels, "norm": norm}
    options["num_classes"] = named[head].shape[0]
    if convolutions:
        return resolve(f"imagenet/vgg-{len(convolutions) + 3}", **options)
    layers = blocks["stage1.0"]
    theirs = "fc.weight" in given and "conv1.weight" in given  # torchvision's stride is in the 3×3 layer
    options |= {
        "block": "bottleneck" if layers == 3 else "basic",
        "stride_in": "3x3" if theirs and layers == 3 else "1x1",
    }
    projections = sum(name.endswith(".shortcut.0.weight") for name in named)
    kind = "resnet" if projections or named.keys() != given.keys() else _kind_by_name(path)
    if kind == "resnet":
        options["shortcut"] = "A" if not projections else "C" if projections == len(blocks) else "B"
    family = "cifar" if len({block.partition(".")[0] for block in blocks}) == 3 else "imagenet"
    return resolve(f"{family}/{kind}-{layers * len(blocks) + 2}", **options)


def _kind_by_name(path: Path) -> str:
    named = re.search(r"plain|resnet", path.name)
    if named is None:
        raise UsageError(
            f"weights (={str(path)!r}) may be a plain or a residual network's; give the file its network's name, as plain-56.pth "
            "or resnet-56.pth"
        )
    return named[0]


def check_weights_there(path: Path, there: bool) -> None:
    """Raises `UsageError` for a file of weights that is not there."""
    if not there:
        what = "are not in that folder" if path.is_dir() else "are not there"
        raise UsageError(f"weights (={str(path)!r}) {what}; accepted: .pth, .th, .pt, .safetensors, a run's folder")


def _run_spec(path: Path) -> NetworkSpec | None:
    """The network of a run, given its folder or the file of its weights; None for what is neither."""
    network = read_json(_config_of(path)).get("network")
    return NetworkSpec(**network) if isinstance(network, dict) else None  # a detector's has the name of its backbone


def _config_of(path: Path) -> Path:
    return (path.parent if path.name == NETWORK else path) / CONFIG


def _check_run(network: Network, path: Path) -> None:
    theirs = _run_spec(path)
    if theirs is None:
        return
    ours = network.spec
    if theirs.name != ours.name:
        raise UsageError(f"weights (={str(path)!r}) are those of {theirs.name}, and do not fit {ours.name}")
    differ = [f"{name}={value}" for name, value in theirs.options if name != "init" and ours.get(name) != value]
    if differ:
        raise UsageError(f"weights (={str(path)!r}) are those of {ours.name} with {', '.join(differ)}; build it so")
    sources = read_json(_config_of(path)).get("sources")
    for registry, name in made_of(ours) if isinstance(sources, dict) else ():
        what = f"{registry.kind} {name}"
        if registry.kind != "init" and sources.get(what) != registry.fingerprint(name):
            warnings.warn(
                f"{registry.kind} {name!r} is not from the source that the weights in {path} were trained with, and may compute "
                "something else; sources are kept beside them"
            )


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir() and (path / NETWORK).is_file():
        path = path / NETWORK
    check_weights_there(path, path.is_file())
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"weights (={str(path)!r}) cannot be read without running code: they hold more than tensors (a whole module, say), "
            "or are damaged; a file of network.state_dict() is read"
        ) from error
    except OSError as error:
        raise UsageError(f"weights (={str(path)!r}) cannot be read: {error.strerror or error}") from error
    except Exception as error:  # safetensors has an exception of its own; of what is no file of weights, torch has any
        raise UsageError(
            f"weights (={str(path)!r}) are damaged, or no file of weights: {one_line(error, named=True)[:200]}"
        ) from error


def _unwrap(given: object) -> dict[str, Tensor]:
    if not isinstance(given, Mapping):
        raise UsageError(f"weights must be a state dict, a mapping of names to tensors, not {type(given).__name__}")
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(given.get(key), Mapping):
            given = given[key]
    tensors = {name.removeprefix("module."): value for name, value in given.items() if isinstance(value, Tensor)}
    if not tensors:
        some = ", ".join(map(repr, list(given)[:3])) or "none"
        raise UsageError(
            f"weights must be a state dict, a mapping of names to tensors; there is no tensor (keys: {some})"
        )
    return tensors


def _resnet_name(name: str) -> str:
    """torchvision's and the common CIFAR names → ours."""
    name = re.sub(r"^conv1\.", "stem.conv.", name)
    name = re.sub(r"^bn1\.", "stem.norm.", name)
    name = re.sub(r"^linear\.", "fc.", name)
    name = re.sub(r"^layer(\d+)\.(\d+)\.(conv\d)", r"stage\1.\2.branch.\3", name)
    name = re.sub(r"^layer(\d+)\.(\d+)\.bn(\d)", r"stage\1.\2.branch.norm\3", name)
    return re.sub(r"^layer(\d+)\.(\d+)\.(?:downsample|shortcut)\.", r"stage\1.\2.shortcut.", name)


def _from_torchvision_vgg(network: Network, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`features.N` and `classifier.N` in order → our layers with weights, in order."""
    ours = [
        name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    theirs = sorted(
        {tuple(name.split(".")[:2]) for name in given}, key=lambda part: (part[0] == "classifier", int(part[1]))
    )
    if len(ours) != len(theirs):
        raise UsageError(f"the weights have {len(theirs)} layers, {network.spec} has {len(ours)}; check depth and norm")
    names = {".".join(part): name for part, name in zip(theirs, ours, strict=True)}
    result = {names[name.rpartition(".")[0]] + "." + name.rpartition(".")[2]: value for name, value in given.items()}
    for name in list(result):
        mean = re.sub(r"\.conv(\d+)\.bias$", r".norm\1.running_mean", name)
        # Our normalized convolutions have no bias; one before a normalization only moves the mean that is subtracted.
        if mean in result and mean != name:
            result[mean] = result[mean] - result.pop(name)
    return result


def _other_data(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Iterator[str]:
    """What the weights' first and last layers say about the data they were trained on, where those are others."""
    for name, axis, what in (("stem.conv.weight", 1, "channels"), ("fc.weight", 0, "classes")):
        if name in own and own[name].shape[axis] != given[name].shape[axis]:
            yield f"; they are for data of {given[name].shape[axis]} {what}, the network is for {own[name].shape[axis]}"


def _zeros_from_centred(network: Network, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Permutes channels so that weights trained with zeros on both sides fit a network whose zeros trail.

    Where option A widens C channels to D, trailing zeros put old channel c at c, centred ones at (D − C)/2 + c. What a
    block adds on top is learned, so renaming the channels of all blocks after it gives exactly the same function.
    """
    order: Tensor | None = None  # ours → theirs, for the channels between blocks
    result = dict(given)
    for name, block in network.blocks():
        if any(isinstance(module, nn.Conv2d) for module in (block.shortcut or nn.Identity()).modules()):
            return given  # projections: nothing is padded
        keys = [key for key in given if key.startswith(f"{name}.branch.")]
        convolutions = sorted({key.split(".")[-2] for key in keys if ".conv" in key})
        if not convolutions:
            return given
        if order is not None:
            first = f"{name}.branch.{convolutions[0]}.weight"
            result[first] = result[first][:, order]
        if isinstance(block.shortcut, ZeroPadding) and block.shortcut.before == 0 and block.shortcut.after > 0:
            before = (block.out_channels - block.in_channels) // 2
            kept = (torch.arange(block.in_channels) if order is None else order) + before
            rest = torch.tensor([c for c in range(block.out_channels) if c not in set(kept.tolist())], dtype=torch.long)
            order = torch.cat([kept, rest])
        if order is not None:
            last = convolutions[-1]
            for key in keys:
                if key.split(".")[-2] in (last, last.replace("conv", "norm")) and result[key].ndim > 0:
                    result[key] = result[key][order]
    if order is not None and "fc.weight" in result:
        result["fc.weight"] = result["fc.weight"][:, order]
    return result


def _check(network: Network, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, extra = [name for name in own if name not in given], [name for name in given if name not in own]
    wrong = [
        f"{name} is {tuple(given[name].shape)}, the network's {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, first {missing[0]}")
    if extra:
        problems.append(f"{len(extra)} tensors have no place, first {extra[0]}")
    if wrong:
        problems.append(f"{len(wrong)} shapes differ, first {wrong[0]}")
    if problems:
        hint = ""
        if not wrong and all(".shortcut." in name for name in [*missing, *extra]):
            hint = "; the shortcut options differ: try another shortcut, A, B or C"
        elif not missing and not extra:
            hint = "".join(_other_data(own, given))
        raise UsageError(f"the weights do not fit {network.spec}: {'; '.join(problems)}{hint}")
