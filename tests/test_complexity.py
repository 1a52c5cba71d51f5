"""The complexity study: its counts are the paper's, and a changed count turns each verdict."""

import dataclasses
import json

import pandas
import pytest
import torch

import resprobe as rp
from resprobe.memory import peak_memory
from studies import complexity
from studies.complexity import _time, judge, study


@pytest.fixture(scope="module")
def results() -> rp.Results:
    """The counts of all networks; the times are of no concern here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complexity, "_time", lambda *_, **__: {"forward_ms": 2.0, "forward_mib": 3.0})
        options = dataclasses.replace(study.presets["quick"], depths=(20, 56))
        bare = rp.Results(options, pandas.DataFrame(), pandas.DataFrame(), [])
        return dataclasses.replace(bare, measurements=study.measure(bare))


def verdicts(results: rp.Results) -> dict[str, str]:
    return {verdict.claim.id: verdict.verdict for verdict in judge(results)}


def changed(results: rp.Results, network: str, shortcut: str | None, column: str, factor: float) -> rp.Results:
    """The results with one count multiplied."""
    counts = results.measurements.copy()
    rows = counts["network"] == network
    rows &= counts["shortcut"].isna() if shortcut is None else counts["shortcut"] == shortcut
    assert rows.sum() == 1
    counts.loc[rows, column] = (counts.loc[rows, column] * factor).astype(counts[column].dtype)
    return dataclasses.replace(results, measurements=counts)


def test_the_paper_is_confirmed(results):
    assert verdicts(results) == {"C10": "holds", "C11": "holds", "C12": "holds", "C22": "fails"}


def test_counts_are_the_oracles(results):
    counts = results.measurements.set_index(["network", "shortcut"])
    assert counts.loc[("cifar/resnet-56", "A"), "macs"] == 125_485_696
    assert counts.loc[("cifar/resnet-56", "C"), "parameters"] == 900_858
    assert counts.loc[("imagenet/resnet-152", "B"), "parameters"] == 60_192_808


def test_one_parameter_more_refutes_free_shortcuts(results):
    assert verdicts(changed(results, "cifar/resnet-56", "A", "parameters", 1.00001))["C10"] == "fails"
    (first, *_) = judge(changed(results, "cifar/resnet-56", "A", "parameters", 1.00001))
    assert "not cifar/resnet-56 (+8 parameters)" in first.measured


def test_a_cost_off_the_printed_one_refutes_the_table(results):
    # The stride in the 3×3 convolution makes ResNet-50 cost 4.09e9 instead of 3.86e9.
    assert verdicts(changed(results, "imagenet/resnet-50", "B", "macs", 4.089 / 3.858))["C11"] == "fails"


def test_a_152_layer_network_above_vgg_refutes_the_table(results):
    assert verdicts(changed(results, "imagenet/resnet-152", "B", "macs", 1.4))["C11"] == "fails"


@pytest.mark.usefixtures("clean_registries")
def test_free_projections_would_refute_the_doubling(results, monkeypatch):
    monkeypatch.setitem(rp.SHORTCUTS._things, "C", rp.SHORTCUTS._things["A"])
    assert verdicts(results)["C12"] == "fails"


def test_a_smaller_network_of_another_method_refutes_fewer_parameters(results, monkeypatch):
    found = judge(results)[3]
    assert found.measured == (
        "ResNet-110 1,727,962 parameters: fewer than FitNet-19 and Highway-19, not fewer than Highway-32"
    )
    assert "ResNet-56, with 853,018, has fewer than all of them" in found.evidence
    monkeypatch.setitem(complexity.THIN_AND_DEEP, "Highway-32", 1.8e6)
    assert verdicts(results)["C22"] == "holds"


@pytest.mark.parametrize(
    ("chosen", "own"), [({"block": "bottleneck"}, "bottleneck"), ({"shortcut": "highway"}, "highway")]
)
def test_fewer_parameters_is_asked_of_ones_own_block(chosen, own, results):
    found = judge(dataclasses.replace(results, options=dataclasses.replace(results.options, **chosen)))[3]
    count = sum(parameter.numel() for parameter in rp.build("cifar/resnet-110", **chosen).parameters())
    assert found.verdict == ("holds" if count < 1_250_000 else "fails")
    assert found.measured.startswith(f"ResNet-110, {own} {count:,} parameters: fewer than FitNet-19")


def test_a_block_that_makes_no_110_layers_is_not_tested(results, clean_registries):
    @rp.register_block("five")
    class Five(rp.blocks.BasicBlock):
        weighted_layers = 5

    found = judge(dataclasses.replace(results, options=dataclasses.replace(results.options, block="five")))[3]
    assert (found.verdict, found.measured) == ("not tested", "no ResNet-110 of block five")
    assert found.evidence == "depth (=110) must be 15n+2 with block 'five'; nearest are 107 and 122"


def test_table_and_figure(results):
    table = study.tabulate(results)
    fifty = table[table["network"] == "ResNet-50 (imagenet), B"].iloc[0]
    assert fifty["multiply-adds"] == "3,857,973,248"
    assert fifty["paper's FLOPs"] == "3.8 × 10⁹"
    assert table[table["network"] == "ResNet-20 (cifar), A"].iloc[0]["paper's parameters"] == "0.27 M"
    cost, _ = study.draw(results)["figure"].figure.axes
    plain, option_a = cost.lines[0], cost.lines[1]
    assert plain.get_ydata().tolist() == option_a.get_ydata().tolist()


def test_the_fastest_pass_is_the_one_that_counts(results, monkeypatch):
    """What else the machine does can only add."""
    ticks = iter([0.0, 9.0, 10.0, 10.25, 20.0, 27.0])
    monkeypatch.setattr("resprobe.devices.time.perf_counter", lambda: next(ticks))
    three = dataclasses.replace(results, options=dataclasses.replace(results.options, repeats=3))
    with rp.cpu_threads(2):
        assert _time("imagenet/resnet-18", three)["forward_ms"] == 250.0
        assert torch.get_num_threads() == 2  # timed by one, and given back


def test_the_memory_of_a_pass_is_what_it_holds_at_a_time():
    class Pass(torch.nn.Module):
        def forward(self, x):
            a = x + 1  # 1 MiB
            a.relu_().view(-1)  # in place, and a view: no more
            b = a * 2  # a and b: 2 MiB
            b = torch.cat((a, b))  # 1 + 1 + 2 MiB at its making; then 3, b's first value having gone
            del a
            return [b, b.sum()]

    network, image = Pass(), torch.zeros(2**18)
    for _ in range(2):
        with torch.inference_mode():
            assert peak_memory(lambda: network(image)) == 4 * 2**20


@pytest.mark.parametrize("depth", [3, 30])
def test_the_memory_of_a_stack_of_layers_is_that_of_two(depth):
    """A layer's input and output, and nothing of the layers before."""
    stack = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(depth)])
    images = torch.zeros(4, 16, 32, 64)
    with torch.inference_mode():
        assert peak_memory(lambda: stack(images)) == 2 * images.nbytes


def test_no_pass_cannot_be_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(["--repeats", "0"]) == 2
    assert capsys.readouterr().err == "error: repeats (=0) must be a whole number ≥ 1\n"


def test_options_of_trainings_are_put_away(capsys):
    assert study.main(["--seeds", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: option (='--seeds') is unknown; accepted: --preset, --depths, --block")
    assert "--iterations" not in said


def test_from_the_command_line(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(complexity, "_time", lambda *_, **__: {"forward_ms": 2.0, "forward_mib": 3.0})
    assert study.main(["--depths", "20", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "results/complexity/verdict.json").read_text())
    assert record["setting"] == "custom"
    assert [claim["verdict"] for claim in record["claims"]] == ["holds"] * 3 + ["fails"]
    assert not (tmp_path / "runs").exists()
    assert len(pandas.read_csv(tmp_path / "results/complexity/results.csv")) == 4 + 20 + 2


def test_ones_own_shortcut_is_counted_beside_the_papers():
    own = dataclasses.replace(study.presets["quick"], depths=(20,), shortcut="highway")
    assert [chosen.get("shortcut") for _, chosen in complexity._of_cifar(own)] == [None, "A", "B", "C", "highway"]
    assert [chosen.get("shortcut") for _, chosen in complexity._of_cifar(study.presets["quick"])][:5] == [
        *(None, "A", "B", "C"),
        None,
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--depths", "21"], "depth (=21) must be 6n+2 with block 'basic'; nearest are 20 and 26"),
        (["--block", "nope"], "block (='nope') is unknown"),
        (["--shortcut", "D"], "shortcut (='D') is unknown"),
        (["--step", "compile"], "option (='--step') is unknown"),
    ],
)
def test_mistakes_are_said_by_a_dry_run_too(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main([*arguments, "--dry-run"]) == 2
    assert text in capsys.readouterr().err
