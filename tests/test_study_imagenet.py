"""The ImageNet study: verdicts follow the data; files are trained on and tested at 224 pixels; published weights are read."""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from PIL import Image

import resprobe as rp
from resprobe.networks import resolve
from resprobe.report import _how_sure
from studies import imagenet
from studies.imagenet import Options, judge, plan, study

ROOT = Path(__file__).parent.parent

TABLES_2_AND_3 = {  # kind, shortcut, depth: top-1 error of three networks around the paper's
    ("plain", "none", 18): [27.9, 28.0, 27.9],
    ("plain", "none", 34): [28.5, 28.6, 28.5],
    ("residual", "A", 18): [27.8, 27.9, 27.9],
    ("residual", "A", 34): [25.0, 25.1, 25.0],
    ("residual", "B", 34): [24.5, 24.6, 24.5],
    ("residual", "B", 50): [22.8, 22.9, 22.8],
    ("residual", "B", 101): [21.7, 21.8, 21.7],
    ("residual", "B", 152): [21.4, 21.5, 21.4],
}


def results(errors, *, protocols=("single-view", "ten-crop"), trained=True, **options) -> rp.Results:
    """Networks of given 10-crop errors; single view two points above them, training error as many below."""
    table, histories, measured = [], [], []
    for (kind, shortcut, depth), seeds in errors.items():
        for seed, error in enumerate(seeds):
            labels = {"kind": kind, "shortcut": shortcut, "depth": depth, "seed": seed}
            errors_of_run = {"train_error": error - 2, "train_error_single_view": error - 3, "test_error": error + 2}
            table.append(labels | errors_of_run)
            histories += [
                labels | {"iteration": i, "train_error": error - 2 + 9 / i, "test_error": error + 2 + 9 / i}
                for i in (1, 2, 3)
            ]
            for protocol in protocols:
                figures = {"error": error + 2 * (protocol == "single-view"), "top5_error": error / 4}
                measured.append(labels | {"parameters": 10, "protocol": protocol, "images": 50_000} | figures)
    chosen = Options(data="folder:x", shortcuts=("A", "B"), deep=(50, 101, 152), protocols=protocols, **options)
    table = pandas.DataFrame(table if trained else [])
    return rp.Results(chosen, table, pandas.DataFrame(histories), [], measurements=pandas.DataFrame(measured))


def verdicts(errors, **options) -> dict[str, str]:
    return {verdict.claim.id: verdict.verdict for verdict in judge(results(errors, **options))}


def test_plain_networks_that_have_not_learned_do_not_deny_degradation():
    """Each kind by itself: that residual ones have learned says nothing of these."""
    guessing = {("plain", "none", depth): [78.0, 78.1, 77.9] for depth in (18, 34)}
    first, _ = judge(results(TABLES_2_AND_3 | guessing))
    assert first.verdict == "inconclusive" and "none of these networks has learned" in first.evidence
    better = {("plain", "none", 34): [70.0, 70.1, 69.9]}
    assert verdicts(TABLES_2_AND_3 | guessing | better)["C14"] == "fails"


def test_errors_as_in_the_paper_confirm_both_claims():
    assert verdicts(TABLES_2_AND_3) == {"C14": "holds", "C15": "holds"}
    first, second = judge(results(TABLES_2_AND_3))
    assert "error at 18 → 34 layers (ten-crop): plain training 25.93 ± 0.06 → 26.53 ± 0.06 %" in first.measured
    assert "residual validation 27.87 ± 0.06 → 25.03 ± 0.06 %" in first.measured
    assert "validation error, ResNet-18 above ResNet-34: difference +2.83 points" in first.evidence
    # Option B at 34 layers too, as the deeper networks have it.
    assert second.measured.startswith("top-1 error (ten-crop) 24.53 ± 0.06 → 22.83 ± 0.06 → ")


@pytest.mark.parametrize(
    ("key", "errors"),
    [
        (("plain", "none", 34), [27.3, 27.2, 27.4]),  # plain networks that do not degrade
        (("residual", "A", 34), [28.0, 28.1, 28.0]),  # residual networks that do not gain
    ],
)
def test_other_orders_at_18_and_34_layers_refute_the_first_claim(key, errors):
    assert verdicts(TABLES_2_AND_3 | {key: errors})["C14"] == "fails"


def test_training_errors_alone_can_refute_the_first_claim():
    made = results(TABLES_2_AND_3)
    made.table.loc[(made.table["kind"] == "residual") & (made.table["depth"] == 34), "train_error"] += 10
    assert judge(made)[0].verdict == "fails"


def test_networks_that_fit_every_training_image_refute_no_gain():
    """As on the embedded digits."""
    made = results(
        TABLES_2_AND_3 | {("residual", "A", 34): [28.0, 28.1, 28.0], ("residual", "B", 101): [24.0, 24.1, 24.0]}
    )
    made.table.loc[made.table["kind"] == "residual", "train_error_single_view"] = 0.0
    assert [verdict.verdict for verdict in judge(made)] == ["inconclusive", "inconclusive"]
    assert all("fits every training image" in verdict.evidence for verdict in judge(made))
    made.table.loc[made.table["kind"] == "residual", "train_error_single_view"] = 0.1
    assert [verdict.verdict for verdict in judge(made)] == ["fails", "fails"]


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_a_deeper_network_that_is_not_better_refutes_the_second_claim(depth):
    assert verdicts(TABLES_2_AND_3 | {("residual", "B", depth): [26.0, 26.1, 26.0]})["C15"] == "fails"


def test_what_may_be_the_papers_smallest_gain_does_not_refute_the_second_claim():
    close = {("residual", "B", 101): [21.7, 21.8, 21.9], ("residual", "B", 152): [21.6, 21.7, 21.8]}  # upper limit 0.27
    assert verdicts(TABLES_2_AND_3 | close)["C15"] == "inconclusive"


def test_noise_and_single_networks_are_inconclusive():
    noisy = {key: [error - 15, error, error + 15] for key, (error, *_) in TABLES_2_AND_3.items()}
    single = {key: errors[:1] for key, errors in TABLES_2_AND_3.items()}
    for errors in (noisy, single):
        assert verdicts(errors) == {"C14": "inconclusive", "C15": "inconclusive"}


def test_what_is_not_there_is_not_tested():
    shallow = {key: errors for key, errors in TABLES_2_AND_3.items() if key[2] == 18}
    assert verdicts(shallow, depths=(18,)) == {"C14": "not tested", "C15": "not tested"}
    first, second = judge(results({key: errors for key, errors in TABLES_2_AND_3.items() if key[2] <= 50}))
    assert (first.verdict, second.verdict) == ("holds", "inconclusive")
    assert "not there: 101, 152 layers" in second.evidence


def test_of_published_weights_the_order_is_said_and_no_more():
    errors = {key: seeds[:1] for key, seeds in TABLES_2_AND_3.items() if key[1] == "B"}
    first, second = judge(results(errors, weights=("a.pth",), trained=False))
    assert (first.verdict, second.verdict) == ("not tested", "inconclusive")
    assert "the order is the paper’s; the order only is to be compared" in second.evidence
    assert "one seed has no spread to judge by" in second.evidence
    broken = errors | {("residual", "B", 101): [23.0]}
    assert "the order is not the paper’s" in judge(results(broken, weights=("a.pth",), trained=False))[1].evidence


def test_of_several_weights_of_a_depth_the_means_are_ordered():
    falling = results(
        {("residual", "B", 34): [53.3, 33.3], ("residual", "B", 50): [35.0, 30.0]}, weights=("a", "b", "c", "d")
    )
    (found,) = [verdict for verdict in judge(falling) if verdict.claim.id == "C15"]
    assert "the order is the paper’s" in found.evidence


def test_weights_of_a_plain_network_are_not_called_residual(tmp_path):
    recipe = replace(rp.recipes.digits_quick(iterations=1), batch_size=8)
    runs = [
        rp.train(
            resolve(f"imagenet/{family}-18", width=4, in_channels=1, num_classes=10),
            "digits-64",
            recipe,
            runs=tmp_path,
            progress=False,
        )
        for family in ("plain", "resnet")
    ]
    options = replace(study.presets["quick"], weights=tuple(str(run.path) for run in runs))
    of = rp.Results(options, pandas.DataFrame(), pandas.DataFrame(), [])
    found = [labels["kind"] for labels, _ in imagenet._networks(of)]
    assert found == ["plain", "residual"]
    assert _how_sure(of).startswith("weights trained elsewhere, as many a network as were given")


def test_another_folder_than_imagenet_is_not_the_papers_setting(generated):
    for folder in (generated, "not/there"):
        assert study.setting(study.parse(["--preset", "paper", "--data", f"folder:{folder}"])) == "custom"


def test_the_papers_plan():
    planned = plan(replace(study.presets["paper"], data="folder:x"))
    assert [(one.network, one.labels["shortcut"]) for one in planned] == [
        ("imagenet/plain-18", "none"),
        ("imagenet/resnet-18", "A"),
        ("imagenet/plain-34", "none"),
        ("imagenet/resnet-34", "A"),
        ("imagenet/resnet-34", "B"),
        ("imagenet/resnet-34", "C"),
        ("imagenet/resnet-50", "B"),
        ("imagenet/resnet-101", "B"),
        ("imagenet/resnet-152", "B"),
    ]
    recipe = rp.recipes.imagenet_paper()
    assert all(one.recipe(recipe) == recipe for one in planned)  # nothing is changed
    assert {one.options["width"] for one in planned} == {64}


def test_smaller_crops_and_batches_change_the_recipe():
    (one, *_) = plan(Options(data="folder:x", crop=112, batch=32))
    changed = one.recipe(rp.recipes.imagenet_paper())
    assert (changed.crop, changed.scale, changed.batch_size) == (112, (128, 240), 32)
    assert (changed.plateau, changed.colour) == (5, "pca")
    photographs = replace(rp.recipes.imagenet_paper(), augmentation="none", colour="none")  # --recipe
    assert one.recipe(photographs).crop == 112
    (one, *_) = plan(Options(crop=112, batch=32, protocols=("single-view",)))
    on_digits = one.recipe(rp.recipes.digits_quick())
    assert on_digits == replace(rp.recipes.digits_quick(), batch_size=32)


def test_both_panels_of_figure_4():
    drawings = study.draw(results(TABLES_2_AND_3))
    assert set(drawings) == {"figure", "figure-depth"}
    plain, residual = drawings["figure"].figure.axes
    assert plain.get_ylim() == residual.get_ylim()
    for axis, ends in ((plain, (27.93, 28.53)), (residual, (27.87, 25.03))):
        dashed = [line.get_ydata()[-1] for line in axis.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
        bold = [line.get_ydata()[-1] for line in axis.lines if line.get_linewidth() > 2 and len(line.get_ydata())]
        assert dashed == pytest.approx([end - 2 + 3 for end in ends], abs=0.01)
        assert bold == pytest.approx([end + 2 + 3 for end in ends], abs=0.01)
    assert "(ten-crop): plain-18 27.9 %, plain-34 28.5 %, " in drawings["figure"].alt


def test_a_panel_for_each_way_of_testing():
    (*_, ten_crop) = axes = study.draw(results(TABLES_2_AND_3))["figure-depth"].figure.axes
    assert [axis.get_title() for axis in axes] == [
        "training error",
        "validation error, single-view",
        "validation error, ten-crop",
    ]
    means = {tuple(line.get_xdata()): line.get_ydata() for line in ten_crop.lines if line.get_marker() == "s"}
    assert means[18, 34, 50, 101, 152] == pytest.approx([27.87, 25.03, 22.83, 21.73, 21.43], abs=0.01)
    for axis in axes:  # nothing is cut off
        assert axis.get_ylim()[1] > max(max(line.get_ydata()) for line in axis.lines)
    weights = study.draw(results(TABLES_2_AND_3, weights=("a.pth",), trained=False))
    assert set(weights) == {"figure-depth"}
    assert len(weights["figure-depth"].figure.axes) == 2


def test_the_table_stands_beside_the_papers(monkeypatch):
    table = study.tabulate(results(TABLES_2_AND_3)).set_index("network")
    assert table.loc["plain-34", "paper, ten-crop, ImageNet (%)"] == "28.54 / 10.02"
    assert table.loc["ResNet-34 B", "paper, multi-scale, ImageNet (%)"] == "21.84 / 5.71"
    assert table.loc["ResNet-34 A", "ten-crop, top-1 / top-5 (%)"] == "25.03 ± 0.06 / 6.26 ± 0.01"
    assert table.loc["ResNet-152 B", "training error (%)"] == "19.43 ± 0.06"
    monkeypatch.setattr(type(study), "beside_paper", lambda *_: True)  # which wants ImageNet's own images
    beside = study.tabulate(results(TABLES_2_AND_3)).set_index("network")["paper, ten-crop, ImageNet (%)"]
    assert beside["plain-34"] == "28.54 / 10.02 (top-1 -0.01, within ±0.50)"
    assert beside["ResNet-34 B"].startswith("24.52 / 7.46 (top-1 ")
    untrained = study.tabulate(results(TABLES_2_AND_3, trained=False))
    assert set(untrained["training error (%)"]) == {"–"}


# -- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def generated(tmp_path) -> Path:
    """Two classes of two generated photographs a part, one upright, one lying."""
    random, folder = numpy.random.default_rng(0), tmp_path / "generated"
    for part in ("train", "val"):
        for name, (low, high) in {"dark": (0, 128), "light": (128, 256)}.items():
            (folder / part / name).mkdir(parents=True)
            for index, shape in enumerate([(90, 120, 3), (130, 80, 3)]):
                Image.fromarray(random.integers(low, high, shape, dtype=numpy.uint8)).save(
                    folder / part / name / f"{index}.png"
                )
    return folder


@pytest.fixture
def real(tmp_path, shared_data) -> Path:
    """A few photographs of each of two ImageNet classes: four to train on, two to test on."""
    folder = tmp_path / "real"
    for part, count in (("train", 4), ("val", 2)):
        for source in sorted((shared_data / "imagenette-224" / part).iterdir())[:2]:
            (folder / part / source.name).mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                (folder / part / source.name / image.name).symlink_to(image)
    return folder


def test_small_images_have_no_other_scales(generated, tmp_path, monkeypatch, capsys):
    """They are kept in memory, and the study would find that out after the training."""
    for file in generated.rglob("*.png"):
        with Image.open(file) as image:
            small = image.resize((16, 16))
        small.save(file)
    monkeypatch.chdir(tmp_path)
    assert study.main([*SMALL, "--data", "folder:generated"]) == 2
    assert capsys.readouterr().err == (
        "error: protocols (=single-view ten-crop multi-scale): small images of one size, as those of folder:generated, have "
        "no other scales; accepted: single-view, ten-crop\n"
    )


SMALL = ["--preset", "paper", "--depths", "18", "--deep", "50", "--shortcuts", "A", "--width", "4", "--batch", "8"]
SMALL += ["--seeds", "0", "--iterations", "2", "--device", "cpu", "--precision", "fp32", "--concurrency", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["generated", "real"])
def test_the_whole_path_at_224_pixels(kind, request, tmp_path, monkeypatch):
    """Augmented training, validation curves, and all three protocols, on photographs where they are there."""
    folder = request.getfixturevalue(kind)
    monkeypatch.chdir(tmp_path)
    assert study.main([*SMALL, "--data", f"folder:{folder}"]) == 0
    out = tmp_path / "results" / "imagenet"
    measured = pandas.read_csv(out / "measurements.csv")
    assert measured["depth"].tolist() == [18] * 6 + [50] * 3
    assert measured["protocol"].tolist() == ["single-view", "ten-crop", "multi-scale"] * 3
    assert set(measured["images"]) == {len(rp.load_data(f"folder:{folder}").test)}
    table = pandas.read_csv(out / "results.csv")
    # The curves' validation error is the single view's: the crop is the recipe's in both.
    single = measured[measured["protocol"] == "single-view"]
    assert single["error"].tolist() == table["test_error"].tolist()
    record = json.loads((out / "verdict.json").read_text())
    assert record["config"]["recipes"][0]["crop"] == 224
    assert {claim["id"]: claim["verdict"] for claim in record["claims"]} == {"C14": "not tested", "C15": "not tested"}
    assert {path.name for path in out.glob("*.png")} == {"figure.png", "figure-depth.png"}


def test_smaller_crops_are_tested_as_they_are_trained(generated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shallow = [word for word in SMALL if word not in ("--deep", "50")]
    arguments = [*shallow, "--data", f"folder:{generated}", "--crop", "64", "--deep"]
    assert study.main([*arguments, "--protocols", "ten-crop", "single-view"]) == 0
    measured = pandas.read_csv("results/imagenet/measurements.csv").query("protocol == 'single-view'")
    table = pandas.read_csv("results/imagenet/results.csv")
    assert measured["error"].tolist() == table["test_error"].tolist()
    recipe = json.loads(Path("results/imagenet/verdict.json").read_text())["config"]["recipes"][0]
    assert (recipe["crop"], recipe["scale"], recipe["batch_size"]) == (64, [73, 137], 8)


# -- published weights -------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path) -> list[str]:
    """Files as torchvision publishes them, of untrained networks."""
    import torchvision

    paths = []
    for seed, name in enumerate(("resnet18", "resnet50")):
        torch.manual_seed(seed)
        paths.append(str(tmp_path / f"{name}-0123abcd.pth"))
        torch.save(torchvision.models.get_model(name, num_classes=2).state_dict(), paths[-1])
    return paths


def test_published_weights_give_torchvisions_answers(weights, generated, tmp_path, monkeypatch):
    import torchvision

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resprobe.evaluation.SCALES", (224, 256))  # 640 pixels are five seconds
    arguments = ["--preset", "paper", "--data", f"folder:{generated}", "--device", "cpu", "--precision", "fp32"]
    seen = {}
    evaluate = rp.evaluate

    def watched(network, data, protocol, **options):
        found = evaluate(network, data, protocol, **options)
        seen[network.depth, protocol] = found
        return found

    monkeypatch.setattr(rp, "evaluate", watched)
    assert study.main([*arguments, "--weights", *weights]) == 0
    measured = pandas.read_csv("results/imagenet/measurements.csv")
    assert measured["depth"].tolist() == [18] * 3 + [50] * 3
    assert not (tmp_path / "runs").exists()  # nothing is trained
    # Their single view is ours: the same pixels, normalization and network.
    data = rp.load_data(f"folder:{generated}")
    pixels = torch.cat([batch for batch, _ in data.test.views(8)]).float() / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for depth, path in zip((18, 50), weights, strict=True):
        theirs = torchvision.models.get_model(f"resnet{depth}", num_classes=2).eval()
        theirs.load_state_dict(torch.load(path))
        with torch.no_grad():
            logits = theirs((pixels - mean) / std)
        loss = torch.nn.functional.cross_entropy(logits, data.test.labels).item()
        assert seen[depth, "single-view"].loss == pytest.approx(loss, rel=1e-4)
        assert seen[depth, "single-view"].errors == int((logits.argmax(1) != data.test.labels).sum())
    record = json.loads(Path("results/imagenet/verdict.json").read_text())
    assert [claim["verdict"] for claim in record["claims"]] == ["not tested", "not tested"]


MISTAKES = [
    (("--preset", "paper"), "data (='folder') needs a path: folder:PATH"),
    (
        ("--preset", "paper", "--data", "folder:absent"),
        "data folder (='absent') is not there; expected train/ and val/",
    ),
    (("--depths", "18", "50"), "depths (=18 50) must be different ones of 18, 34 with block 'basic' (Table 1)"),
    (("--deep", "34"), "deep (=34) must be different ones of 50, 101, 152 (Table 1)"),
    (
        ("--protocols", "tencrop"),
        "protocols (=tencrop) must be different ones of single-view, ten-crop, multi-scale",
    ),
    (
        ("--protocols", "single-view", "multi-scale"),
        "protocols (=single-view multi-scale) cannot be used with data (='digits-64'); accepted: --data folder:PATH",
    ),
    (
        ("--weights", "resnet50.pth"),
        "weights (=resnet50.pth) cannot be used with data (='digits-64'); accepted: --data",
    ),
    (("--shortcuts", "D"), "shortcut (='D') is unknown; accepted: A, A-centred, B, C, highway"),
    (("--shortcuts",), "shortcuts (=) must be given, each once"),
    (("--shortcuts", "none"), "shortcuts (=none) must be given, each once (plain networks are always there)"),
    (("--protocols",), "protocols (=) must be given; accepted: single-view, ten-crop, multi-scale"),
    (("--crop", "16"), "crop (=16) must be a whole number ≥ 32"),
    (("--batch", "0"), "batch_size (=0) must be a whole number ≥ 1"),
    (("--width", "0"), "width (=0) must be a whole number ≥ 1"),
    (("--block", "basci"), "block (='basci') is unknown; accepted: basic, bottleneck"),
    (
        ("--block", "bottleneck", "--depths", "50", "101", "--deep", "50", "--shortcuts", "B"),
        "the network of kind residual, shortcut B, depth 50 is asked for twice; name it once",
    ),
]


@pytest.mark.parametrize(("arguments", "text"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_gets_one_line(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert text in said
    assert said.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_weights_of_no_use_are_refused(generated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "paper", "--data", f"folder:{generated}", "--protocols", "single-view", "--weights"]
    (tmp_path / "resnet50.pth").write_bytes(b"")
    torch.save(rp.build("cifar/resnet-8", shortcut="B", width=4).state_dict(), tmp_path / "resnet34-0123abcd.pth")
    for file, said in (
        ("resnet50.pth", "are damaged, or no file of weights"),
        ("resnet50-absent.pth", "are not there"),
        ("resnet34-0123abcd.pth", "are those of cifar/resnet-8, which is none of ImageNet's networks"),
    ):
        assert study.main([*arguments, file]) == 2
        assert f"error: weights (='{file}') {said}" in capsys.readouterr().err
