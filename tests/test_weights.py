"""Published weights: recognised by their keys, the same function in our networks, and no code run."""

import collections
import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import resprobe as rp
from resprobe import weights
from resprobe.evaluation import evaluate


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode, with normalizations that do something, so that a misplaced tensor shows."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


class CommonBlock(nn.Module):
    """The block of the common CIFAR implementation: option A with its zeros on both sides."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, x):
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride != 1 or self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return (out + x).relu()


class CommonResNet(nn.Module):
    """Its network, with the names that its published state dicts have."""

    def __init__(self, n: int, width: int = 16):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        for stage in range(3):
            out = width << stage
            first = CommonBlock(out if stage == 0 else out // 2, out, 1 if stage == 0 else 2)
            layer = nn.Sequential(first, *(CommonBlock(out, out, 1) for _ in range(n - 1)))
            self.add_module(f"layer{stage + 1}", layer)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


class ProjectionResNet(CommonResNet):
    """The other common one: projections where the width changes, of torchvision's blocks, and a last layer called `fc`."""

    def __init__(self, n: int, width: int, classes: int):
        super().__init__(n, width)
        for stage in range(1, 4):
            blocks, out = [], width << (stage - 1)
            for index in range(n):
                before, stride = (out // 2, 2) if stage > 1 and index == 0 else (out, 1)
                changed = nn.Sequential(nn.Conv2d(before, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(
                    torchvision.models.resnet.BasicBlock(before, out, stride, changed if stride == 2 else None)
                )
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        del self.linear
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.fc(x.mean((2, 3)))


def refusal(network: rp.Network, weights: object) -> str:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(rp.UsageError) as error:
        rp.load_weights(network, weights)
    assert "\n" not in str(error.value)
    for name, value in network.state_dict().items():  # a refusal changes nothing
        assert torch.equal(value, before[name]), name
    assert network.normalization is None
    return str(error.value)


class TestTorchvision:
    @pytest.mark.parametrize(
        ("name", "ours", "options"),
        [
            ("resnet18", "imagenet/resnet-18", {"shortcut": "B", "stride_in": "3x3"}),
            ("resnet18", "imagenet/resnet-18", {"shortcut": "B"}),  # basic blocks have no 1×1 to take the stride
            ("resnet50", "imagenet/resnet-50", {"stride_in": "3x3"}),
            ("vgg16", "imagenet/vgg-16", {}),
        ],
    )
    def test_outputs_are_torchvisions(self, name, ours, options):
        torch.manual_seed(0)
        theirs = lively(getattr(torchvision.models, name)(**({"init_weights": False} if name == "vgg16" else {})))
        with torch.device("meta"):  # our own weights would be drawn for nothing
            network = rp.build(ours, **options)
        network = rp.load_weights(network.to_empty(device="cpu"), theirs.state_dict()).eval()
        images = torch.randn(2, 3, 96, 64)
        with torch.no_grad():
            expected = theirs(images)
            torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert expected.std() > 0
        assert network.normalization.mean.view(-1).tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert network.normalization.std.view(-1).tolist() == pytest.approx([0.229, 0.224, 0.225])

    def test_normalized_vgg_absorbs_the_biases_that_ours_has_not(self):
        # Slim, since torchvision's widths take half a gigabyte; the layers keep their names.
        with torch.device("meta"):
            network = rp.build("imagenet/vgg-16", norm="batch", width=2, num_classes=3)
        plan = [2, 2, "M", 4, 4, "M", 8, 8, 8, "M", 16, 16, 16, "M", 16, 16, 16, "M"]
        features = torchvision.models.vgg.make_layers(plan, batch_norm=True)
        theirs = torchvision.models.VGG(features, num_classes=3, init_weights=False)
        theirs.classifier = nn.Sequential(
            nn.Linear(16 * 49, 128),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(128, 3),
        )
        lively(theirs)
        before = {name: value.clone() for name, value in theirs.state_dict().items()}
        network = rp.load_weights(network.to_empty(device="cpu"), theirs.state_dict()).eval()
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-4, atol=1e-5)
        for name, value in theirs.state_dict().items():  # what was given stays as it was
            assert torch.equal(value, before[name]), name

    def test_vgg_of_another_depth_or_norm(self):
        with torch.device("meta"):
            network, theirs = rp.build("imagenet/vgg-16"), torchvision.models.vgg19()
        with pytest.raises(rp.UsageError) as error:
            rp.load_weights(network, theirs.state_dict())
        assert str(error.value) == f"the weights have 19 layers, {network.spec} has 16; check depth and norm"

    def test_bottlenecks_must_have_their_stride_in_the_3x3(self):
        with torch.device("meta"):
            network, theirs = rp.build("imagenet/resnet-50"), torchvision.models.resnet50()
        with pytest.raises(rp.UsageError) as error:
            rp.load_weights(network, theirs.state_dict())
        assert str(error.value) == (
            "torchvision's bottleneck weights were trained with the stride in the 3×3 convolution; build the network "
            "with stride_in=\"3x3\", not stride_in (='1x1')"
        )

    def test_another_shortcut_is_named_with_a_way_out(self):
        with torch.device("meta"):
            network, theirs = rp.build("imagenet/resnet-18"), torchvision.models.resnet18()
        with pytest.raises(rp.UsageError) as error:
            rp.load_weights(network, theirs.state_dict())
        assert str(error.value) == (
            f"the weights do not fit {network.spec}: 18 tensors have no place, first stage2.0.shortcut.0.weight; "
            "the shortcut options differ: try another shortcut, A, B or C"
        )


class TestCommonCifar:
    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
    @pytest.mark.parametrize("suffix", [".th", ".pt", None])
    def test_outputs_are_the_common_implementations(self, tmp_path, prefix, wrapping, suffix):
        theirs = lively(CommonResNet(3)).double()
        weights = {prefix + name: value for name, value in theirs.state_dict().items()}
        if wrapping:
            weights = {wrapping: weights, "best_prec1": 92.6, "epoch": 3}
        if suffix:
            torch.save(weights, tmp_path / f"weights{suffix}")
            weights = tmp_path / f"weights{suffix}"
        network = rp.load_weights(rp.build("cifar/resnet-20", shortcut="A-centred").double(), weights).eval()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-12, atol=1e-12)
        assert network.normalization.mean.view(-1).tolist() == pytest.approx([0.485, 0.456, 0.406])

    @pytest.mark.parametrize(("n", "width"), [(1, 4), (2, 6), (3, 5), (3, 16)])
    def test_trailing_zeros_give_the_same_function(self, n, width):
        theirs = lively(CommonResNet(n, width)).double()
        network = rp.build(f"cifar/resnet-{6 * n + 2}", width=width).double()
        rp.load_weights(network, theirs.state_dict()).eval()
        images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-12, atol=1e-12)
        # It is the permutation that does it: as they stand, the weights make another function.
        centred = rp.load_weights(rp.build(network.spec, shortcut="A-centred").double(), theirs.state_dict())
        network.load_state_dict(centred.state_dict())
        assert not torch.allclose(network(images), theirs(images))

    def test_counters_that_old_files_lack_are_not_missed(self):
        weights = {
            name: value for name, value in CommonResNet(1).state_dict().items() if "num_batches_tracked" not in name
        }
        network = rp.load_weights(rp.build("cifar/resnet-8", shortcut="A-centred"), weights)
        assert torch.equal(network.stem.conv.weight, weights["conv1.weight"])

    def test_weights_of_another_depth(self):
        network = rp.build("cifar/resnet-14", width=4)
        assert refusal(network, CommonResNet(3, 4).state_dict()) == (
            f"the weights do not fit {network.spec}: 36 tensors have no place, first stage1.2.branch.conv1.weight"
        )
        network = rp.build("cifar/resnet-14", width=4, shortcut="A-centred")
        assert refusal(network, CommonResNet(1, 4).state_dict()) == (
            f"the weights do not fit {network.spec}: 30 tensors are missing, first stage1.1.branch.conv1.weight"
        )

    def test_weights_of_another_width(self):
        network = rp.build("cifar/resnet-8", width=8, shortcut="A-centred")
        assert refusal(network, CommonResNet(1, 4).state_dict()).startswith(
            f"the weights do not fit {network.spec}: 36 shapes differ, "
            "first stem.conv.weight is (4, 3, 3, 3), the network's (8, 3, 3, 3)"
        )

    def test_weights_of_a_wider_network_into_a_narrower_one_with_trailing_zeros(self):
        network = rp.build("cifar/resnet-8", width=8)
        assert "shapes differ, first stem.conv.weight is (16, 3, 3, 3)" in refusal(
            network, CommonResNet(1).state_dict()
        )

    def test_option_b_is_told_apart(self):
        network = rp.build("cifar/resnet-8", width=4, shortcut="B")
        assert refusal(network, CommonResNet(1, 4).state_dict()) == (
            f"the weights do not fit {network.spec}: 10 tensors are missing, first stage2.0.shortcut.0.weight; "
            "the shortcut options differ: try another shortcut, A, B or C"
        )

    def test_weights_for_other_data(self):
        network = rp.build("cifar/resnet-8", in_channels=1, num_classes=7)
        assert refusal(network, CommonResNet(1).state_dict()) == (
            f"the weights do not fit {network.spec}: 3 shapes differ, "
            "first stem.conv.weight is (16, 3, 3, 3), the network's (16, 1, 3, 3); "
            "they are for data of 3 channels, the network is for 1; they are for data of 10 classes, the network is for 7"
        )


class TestOwnLayout:
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_comes_back_as_it_was(self, tmp_path, suffix):
        network = lively(rp.build("cifar/resnet-8", shortcut="B"))
        file = tmp_path / f"weights{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), file)
        other = rp.build(network.spec)
        assert rp.load_weights(other, str(file)) is other
        for name, value in other.state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), name
        assert other.normalization is None  # the file does not say with what it was trained

    def test_run_folder_brings_its_normalization(self, tmp_path):
        network = lively(rp.build("cifar/resnet-8", width=4))
        mean, std = torch.rand(3, 32, 32), torch.ones(3, 1, 1)
        tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
        save_file({**tensors, "normalization.mean": mean, "normalization.std": std}, tmp_path / "network.safetensors")
        other = rp.load_weights(rp.build(network.spec), tmp_path).eval()
        assert torch.equal(other.normalization.mean, mean)
        assert torch.equal(other.normalization.std, std)
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(other(images), network(images))

    def test_other_shortcut_is_named(self):
        network = rp.build("cifar/resnet-8", shortcut="C")
        assert refusal(network, rp.build("cifar/resnet-8").state_dict()) == (
            f"the weights do not fit {network.spec}: 15 tensors are missing, first stage1.0.shortcut.0.weight; "
            "the shortcut options differ: try another shortcut, A, B or C"
        )

    def test_every_kind_of_mismatch_is_named_at_once(self):
        network = rp.build("cifar/resnet-8")
        weights = network.state_dict()
        del weights["stage1.0.branch.norm1.bias"]
        weights["fc.weight"], weights["extra.weight"] = torch.zeros(100, 64), torch.zeros(3)
        assert refusal(network, weights) == (
            f"the weights do not fit {network.spec}: 1 tensors are missing, first stage1.0.branch.norm1.bias; "
            "1 tensors have no place, first extra.weight; "
            "1 shapes differ, first fc.weight is (100, 64), the network's (10, 64)"
        )


class TestUnreadable:
    def test_unknown_layout(self):
        text = refusal(rp.build("cifar/resnet-8"), {"encoder.weight": torch.zeros(1), "decoder.weight": torch.zeros(1)})
        assert text == (
            "the layout of the weights is not known (first keys: decoder.weight, encoder.weight); accepted: resprobe, "
            "torchvision, CIFAR"
        )

    def test_no_tensors(self):
        assert refusal(rp.build("cifar/resnet-8"), {"epoch": 3}) == (
            "weights must be a state dict, a mapping of names to tensors; there is no tensor (keys: 'epoch')"
        )

    @pytest.mark.parametrize("shortcut", ["plain", "none"])
    def test_a_plain_network_is_not_given_residual_weights(self, shortcut):
        given = CommonResNet(1).state_dict()
        plain = rp.build("cifar/plain-8") if shortcut == "plain" else rp.build("cifar/resnet-8", shortcut="none")
        text = refusal(plain, given)
        assert text.startswith("the weights are those of a residual network, and ") and text.endswith(
            " has no shortcuts"
        )

    def test_a_small_networks_weights_in_a_large_one(self):
        text = refusal(rp.build("imagenet/resnet-18"), CommonResNet(1).state_dict())
        assert "tensors are missing, first " in text and "shapes differ, first stem.conv.weight" in text

    @pytest.mark.parametrize(
        ("network", "weights", "text"),
        [
            ("cifar/resnet-20", {}, "network (='cifar/resnet-20') must be one that rp.build made"),
            (None, None, "weights (=None) must be a file, a run's folder or a state dict"),
        ],
    )
    def test_arguments_of_another_kind(self, network, weights, text):
        with pytest.raises(rp.UsageError) as error:
            rp.load_weights(network or rp.build("cifar/resnet-8"), weights)
        assert str(error.value) == text

    def test_missing_file(self, tmp_path):
        where = tmp_path / "absent.pth"
        assert refusal(rp.build("cifar/resnet-8"), where) == (
            f"weights (={str(where)!r}) are not there; accepted: .pth, .th, .pt, .safetensors, a run's folder"
        )

    def test_folder_of_no_run(self, tmp_path):
        assert refusal(rp.build("cifar/resnet-8"), tmp_path).startswith(
            f"weights (={str(tmp_path)!r}) are not in that folder; "
        )

    @pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half an archive"])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_damaged_file(self, tmp_path, content, suffix):
        file = tmp_path / f"damaged{suffix}"
        file.write_bytes(content)
        said = refusal(rp.build("cifar/resnet-8"), file)
        if content.startswith(b"not") and suffix == ".pth":  # which pickle takes for something that it must not read
            assert said.startswith(f"weights (={str(file)!r}) cannot be read without running code: ")
        else:
            assert said.startswith(f"weights (={str(file)!r}) are damaged, or no file of weights: ")

    def test_truncated_file(self, tmp_path):
        network = rp.build("cifar/resnet-8")
        file = tmp_path / "truncated.pth"
        torch.save(network.state_dict(), file)
        file.write_bytes(file.read_bytes()[:-2000])
        assert refusal(network, file).startswith(f"weights (={str(file)!r}) are damaged, or no file of weights: ")

    @pytest.mark.parametrize("thing", [torch.zeros(3), [torch.zeros(3)]])
    def test_file_of_something_else(self, tmp_path, thing):
        torch.save(thing, tmp_path / "thing.pth")
        assert refusal(rp.build("cifar/resnet-8"), tmp_path / "thing.pth") == (
            f"weights must be a state dict, a mapping of names to tensors, not {type(thing).__name__}"
        )

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_code_in_a_pickle_is_not_run(self, tmp_path, wrapped):
        witness, file = tmp_path / "witness", tmp_path / "evil.pth"

        class Evil:
            def __reduce__(self):
                return Path.touch, (witness,)

        evil = collections.OrderedDict({"conv1.weight": Evil()})
        if wrapped:
            torch.save({"state_dict": evil}, file)
        else:
            file.write_bytes(pickle.dumps(evil, protocol=2))
        text = refusal(rp.build("cifar/resnet-8"), file)
        assert text.startswith(f"weights (={str(file)!r}) cannot be read without running code: ")
        assert not witness.exists()
        with file.open("rb") as stream:  # the witness would have seen it
            torch.load(stream, weights_only=False) if wrapped else pickle.load(stream)
        assert witness.exists()

    def test_whole_pickled_network_is_refused(self, tmp_path):
        torch.save(rp.build("cifar/resnet-8"), tmp_path / "network.pth")
        assert "cannot be read without running code: " in refusal(rp.build("cifar/resnet-8"), tmp_path / "network.pth")


def finished(tmp_path: Path, name: str, **options) -> tuple[rp.Network, Path]:
    """A network and the folder of a run that ended with it, as far as its weights are asked for."""
    network = lively(rp.build(name, **options))
    folder = tmp_path / name.replace("/", "-")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"network": dataclasses.asdict(network.spec)}))
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    statistics = {"normalization.mean": torch.zeros(3, 1, 1), "normalization.std": torch.ones(3, 1, 1)}
    save_file(state | statistics, folder / "network.safetensors")
    return network, folder


class TestRuns:
    def test_a_runs_network_is_built_as_it_was(self, tmp_path):
        network, folder = finished(tmp_path, "cifar/resnet-20", block="bottleneck", stride_in="3x3", width=4)
        again = rp.load_network(folder)
        assert again.spec == network.spec
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(again.eval()(images), network(images))

    @pytest.mark.parametrize("file", [".", "network.safetensors"])
    def test_what_no_shape_tells_is_refused(self, tmp_path, file):
        _, folder = finished(tmp_path, "cifar/resnet-20", block="bottleneck", stride_in="3x3", width=4)
        for options, named in (({"stride_in": "1x1"}, "stride_in=3x3"), ({"shortcut": "A-centred"}, "shortcut=A")):
            built = rp.build("cifar/resnet-20", **({"block": "bottleneck", "stride_in": "3x3", "width": 4} | options))
            said = refusal(built, folder / file)
            assert said.endswith(f"are those of cifar/resnet-20 with {named}; build it so")

    def test_another_network_is_named(self, tmp_path):
        _, folder = finished(tmp_path, "cifar/plain-8", width=4)
        said = refusal(rp.build("cifar/resnet-8", width=4), folder)
        assert said == f"weights (={str(folder)!r}) are those of cifar/plain-8, and do not fit cifar/resnet-8"

    def test_how_weights_were_initialized_does_not_matter(self, tmp_path):
        network, folder = finished(tmp_path, "cifar/plain-8", width=4, init="xavier")
        again = rp.load_weights(rp.build("cifar/plain-8", width=4), folder)
        assert torch.equal(again.fc.weight, network.fc.weight)

    def test_a_block_of_another_source_is_said(self, tmp_path, clean_registries):
        """Its weights fit: no shape tells an ELU from a tanh."""
        plugin = tmp_path / "acts.py"
        text = (
            "import torch, resprobe as rp\n\n\n@rp.register_block('acts')\nclass Acts(rp.blocks.BasicBlock):\n"
            "    def forward(self, x):\n        return torch.nn.functional.elu(super().forward(x))\n"
        )
        plugin.write_text(text)
        rp.load_plugin(str(plugin))
        recipe = rp.recipes.digits_quick(iterations=2)
        run = rp.train(
            "cifar/resnet-8", "digits", recipe, block="acts", width=4, runs=tmp_path, progress=False, device="cpu"
        )
        rp.load_network(run.path)  # without a word: as it was
        plugin.write_text(text.replace("elu", "tanh"))
        rp.load_plugin(str(plugin))
        said = "block 'acts' is not from the source that the weights in .* were trained with"
        for file in run.path, run.path / "network.safetensors":
            with pytest.warns(UserWarning, match=said):
                rp.load_network(file)
        with pytest.warns(UserWarning, match=said):
            rp.load_weights(rp.build("cifar/resnet-8", block="acts", width=4, in_channels=1), run.path)
        del rp.BLOCKS._things["acts"]
        with pytest.raises(rp.UsageError) as error:
            rp.load_network(run.path)
        assert str(error.value).startswith("block (='acts') is unknown")
        assert str(error.value).endswith(f"; what this run was trained with is kept in {run.path / 'sources'}")

    def test_a_run_itself_is_no_file(self, tmp_path):
        recipe = rp.recipes.digits_quick(iterations=1)
        run = rp.train("cifar/resnet-8", "digits", recipe, width=4, progress=False, device="cpu")
        with pytest.raises(rp.UsageError, match="must be a file or a run's folder; that of a Run is its .network$"):
            rp.load_network(run)

    def test_a_folder_that_is_no_run_gets_one_line(self, tmp_path):
        (tmp_path / "config.json").write_text('{"network": "cifar/resnet-20"}')
        for folder, why in (
            (tmp_path, "must be the folder of a finished run, with config.json in it"),
            (tmp_path / "absent", "are not there; accepted: .pth"),
        ):
            with pytest.raises(rp.UsageError) as error:
                rp.load_network(folder)
            assert str(error.value).startswith(f"weights (={str(folder)!r}) {why}")

    def test_a_runs_file_is_the_run(self, tmp_path):
        network, folder = finished(tmp_path, "cifar/plain-8", width=4)
        assert rp.load_network(folder / "network.safetensors").spec == network.spec

    def test_a_file_beside_anothers_configuration_is_read(self, tmp_path):
        network = lively(rp.build("cifar/plain-8", width=4))
        (tmp_path / "config.json").write_text('{"network": ')
        with pytest.raises(rp.UsageError, match="must be the folder of a finished run, with config.json in it$"):
            rp.load_network(tmp_path)
        (tmp_path / "config.json").write_text('{"network": {"family": "else", "depth": 1}}')
        save_file(network.state_dict(), tmp_path / "mine.safetensors")
        assert torch.equal(
            rp.load_weights(rp.build("cifar/plain-8", width=4), tmp_path / "mine.safetensors").fc.weight,
            network.fc.weight,
        )


def published(shared_data: Path, depth: int) -> Path:
    """A file of published CIFAR weights."""
    files = sorted((shared_data / "weights" / "akamaster").glob(f"resnet{depth}*.th"))
    if not files:
        pytest.skip(
            f"needs the published weights: there is no {shared_data / 'weights' / 'akamaster'}/resnet{depth}*.th"
        )
    return files[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "shortcut", "errors"),
    [
        (20, "A-centred", 827),
        (20, "A", 827),
        (32, "A-centred", 737),
        (44, "A-centred", 690),
        (56, "A-centred", 661),
    ],
)
def test_published_weights_make_exactly_their_errors(shared_data, cifar10_folder, depth, shortcut, errors):
    file = published(shared_data, depth)
    network = rp.load_weights(rp.build(f"cifar/resnet-{depth}", shortcut=shortcut), file)
    result = evaluate(network, f"cifar10:{cifar10_folder}", device="cpu")
    assert (result.images, result.errors, result.error) == (10_000, errors, errors / 100)


class TestWhatNetworkAFileIsOf:
    """`load_network` of a file: the network is built to fit, and computes what its weights computed."""

    @pytest.mark.parametrize("depth", [20, 56])
    def test_published_cifar_weights(self, shared_data, tmp_path, depth):
        file = published(shared_data, depth)
        shutil.copy(file, tmp_path / "any.th")
        network = rp.load_network(tmp_path / "any.th")
        assert network.spec == rp.build(f"cifar/resnet-{depth}").spec
        by_hand = rp.load_weights(rp.build(f"cifar/resnet-{depth}"), file)
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(network.eval()(images), by_hand.eval()(images))

    @pytest.mark.parametrize(("classes", "std"), [(10, [0.2023, 0.1994, 0.2010]), (100, [0.2673, 0.2564, 0.2761])])
    def test_cifar_weights_with_projections(self, tmp_path, classes, std):
        """They were trained on pixels normalized by CIFAR's own statistics, not by ImageNet's."""
        theirs = lively(ProjectionResNet(2, 4, classes))
        torch.save(theirs.state_dict(), tmp_path / "any.pt")
        ours = rp.load_network(tmp_path / "any.pt").eval()
        assert ours.spec.name == "cifar/resnet-14"
        assert ours.spec.get("shortcut") == "B"
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
        assert ours.normalization.std.view(-1).tolist() == pytest.approx(std)

    def test_cifar_weights_of_unknown_data(self):
        theirs = ProjectionResNet(2, 4, 7)
        ours = rp.build("cifar/resnet-14", shortcut="B", width=4, num_classes=7)
        with pytest.warns(
            UserWarning, match="^how the inputs of weights of 7 classes were normalized is not known; set the"
        ):
            rp.load_weights(ours, theirs.state_dict())
        assert ours.normalization is None

    @pytest.mark.parametrize(
        ("make", "name", "options"),
        [
            ("resnet18", "imagenet/resnet-18", {"block": "basic", "shortcut": "B", "stride_in": "1x1"}),
            ("resnet50", "imagenet/resnet-50", {"block": "bottleneck", "shortcut": "B", "stride_in": "3x3"}),
            ("vgg16_bn", "imagenet/vgg-16", {"norm": "batch"}),
        ],
    )
    def test_torchvisions(self, tmp_path, make, name, options):
        theirs = getattr(torchvision.models, make)(num_classes=7).eval()
        torch.save(theirs.state_dict(), tmp_path / "any.pth")
        ours = rp.load_network(tmp_path / "any.pth").eval()
        assert ours.spec.name == name
        assert dict(ours.spec.options).items() >= (options | {"num_classes": 7}).items()
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("make", "name", "options"),
        [
            ("resnet34", "imagenet/resnet-34", {"block": "basic", "shortcut": "B", "stride_in": "1x1"}),
            ("resnet101", "imagenet/resnet-101", {"block": "bottleneck", "shortcut": "B", "stride_in": "3x3"}),
            ("resnet152", "imagenet/resnet-152", {"block": "bottleneck", "shortcut": "B", "stride_in": "3x3"}),
            ("vgg16", "imagenet/vgg-16", {"norm": "none"}),
            ("vgg19_bn", "imagenet/vgg-19", {"norm": "batch"}),
        ],
    )
    def test_torchvisions_larger_ones(self, make, name, options):
        with torch.device("meta"):
            theirs = getattr(torchvision.models, make)(weights=None).state_dict()
        spec = weights._spec_of(theirs, Path("any.pth"))
        with torch.device("meta"):
            assert rp.build(name, **options).spec == spec

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("cifar/resnet-8", {"width": 4, "in_channels": 1, "num_classes": 3}),
            ("cifar/resnet-14", {"width": 4, "shortcut": "B"}),
            ("cifar/resnet-14", {"width": 4, "shortcut": "C", "norm": "none"}),
            ("cifar/resnet-20", {"width": 4, "block": "bottleneck", "shortcut": "B"}),
            ("cifar/plain-8", {"width": 4}),
            ("imagenet/resnet-18", {"width": 4, "num_classes": 10}),
            ("imagenet/plain-34", {"width": 4, "num_classes": 10}),
            ("imagenet/vgg-16", {"width": 1, "num_classes": 10}),
        ],
    )
    def test_our_own(self, tmp_path, name, options):
        network = rp.build(name, **options)
        file = tmp_path / f"{name.replace('/', '-')}.pth"
        torch.save(network.state_dict(), file)
        again = rp.load_network(file)
        assert again.spec == network.spec
        assert all(map(torch.equal, again.state_dict().values(), network.state_dict().values()))

    def test_whether_it_is_plain_must_be_said(self, tmp_path):
        torch.save(rp.build("cifar/plain-8", width=4).state_dict(), tmp_path / "mine.pth")
        with pytest.raises(rp.UsageError) as error:
            rp.load_network(tmp_path / "mine.pth")
        assert str(error.value) == (
            f"weights (={str(tmp_path / 'mine.pth')!r}) may be a plain or a residual network's; give the file its network's "
            "name, as plain-56.pth or resnet-56.pth"
        )

    @pytest.mark.parametrize("state", [{"a.weight": torch.ones(1)}, {"features.0.weight": torch.ones(1, 1, 3, 3)}])
    def test_what_is_not_known_is_said(self, tmp_path, state):
        torch.save(state, tmp_path / "mine.pth")
        with pytest.raises(
            rp.UsageError, match=r"what network they are of is not known \(first keys: \S+\); accepted: "
        ):
            rp.load_network(tmp_path / "mine.pth")
