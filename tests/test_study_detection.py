"""The detection study: verdicts follow the data, what is not run is not tested, figures and table show what was measured."""

import json
import re
from dataclasses import replace

import pandas
import pytest

import resprobe as rp
from plugins.detection import draw_shapes
from plugins.detection.recipes import coco_paper, shapes_quick, voc_paper
from studies import detection
from studies.detection import Options, judge, study

PLAIN, RESIDUAL = "cifar/plain-20", "cifar/resnet-20"
QUICK = study.presets["quick"]


def rows(backbone, maps, *, bn="frozen", step="baseline", ap=None):
    """One seed a value: a point in training at a third of the final mAP, and the final row."""
    made, trained = [], "-context" if step in detection.STEPS[2:] else ""
    for seed, value in enumerate(maps):
        labels = {"backbone": backbone, "seed": seed, "bn": bn, "step": step}
        if step == "baseline":
            made += [labels | {"iteration": 0, "mAP": 0.0}, labels | {"iteration": 100, "mAP": value / 3}]
        made.append(
            labels
            | {
                "iteration": 300,
                "seconds": 0.02,
                "macs": 2_500_000_000,
                "kept_mib": 10.0 if bn == "frozen" else 16.0,
                "run": f"run-{backbone[-2:]}-{bn}{trained}",
                "mAP": value,
            }
            | {"mAP all-point": value - 1, "AP disc": value + 5, "AP star": value - 5, "AP disc all-point": 1.0}
            | {"COCO AP": value / 2 if ap is None else ap[seed], "COCO AP50": value}
        )
    return made


def results(made, preset=QUICK, **options):
    return rp.Results(
        replace(preset, **options), pandas.DataFrame(), pandas.DataFrame(), [], measurements=pandas.DataFrame(made)
    )


def words(made, **options):
    return {verdict.claim.id: verdict for verdict in judge(results(made, **options))}


TABLE_7 = rows(PLAIN, [50.0, 50.6]) + rows(RESIDUAL, [53.3, 53.7])


def test_a_gain_as_in_table_7_confirms_the_claim_and_nothing_else_is_tested():
    found = words(TABLE_7)
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "C18": "holds",
        "C19": "not tested",
        "C20": "not tested",
        "C24": "not tested",
        "C24b": "not tested",
    }
    assert found["C18"].measured == "mAP of cifar/plain-20 → cifar/resnet-20: 50.30 ± 0.42 → 53.50 ± 0.28 %"
    assert "an analogue: not the paper's networks nor its data" in found["C18"].evidence
    assert found["C24"].evidence == "needs --bn both"


def test_no_gain_refutes_it_and_noise_or_one_seed_do_not():
    assert words(rows(PLAIN, [53.3, 53.7]) + rows(RESIDUAL, [50.0, 50.6]))["C18"].verdict == "fails"
    assert words(rows(PLAIN, [40.0, 60.0]) + rows(RESIDUAL, [53.3, 53.7]))["C18"].verdict == "inconclusive"
    assert words(rows(PLAIN, [50.0]) + rows(RESIDUAL, [53.3]))["C18"].verdict == "inconclusive"


def test_on_coco_it_is_c19_that_is_judged_by_cocos_ap():
    made = rows(PLAIN, [41.5, 41.5], ap=[21.1, 21.3]) + rows(RESIDUAL, [41.5, 41.5], ap=[27.1, 27.3])
    found = words(made, detection="coco:PATH")
    assert (found["C18"].verdict, found["C19"].verdict) == ("not tested", "holds")
    assert "21.20 ± 0.14 → 27.20 ± 0.14 %" in found["C19"].measured
    assert words(made, detection="voc:PATH")["C18"].verdict == "fails"  # the same mAP on both sides
    same = rows(PLAIN, [41.5, 41.5], ap=[27.1, 27.3]) + rows(RESIDUAL, [41.5, 41.5], ap=[21.1, 21.3])
    assert words(same, detection="coco:PATH")["C19"].verdict == "fails"


def test_the_papers_networks_are_no_analogue_and_a_hidden_truth_is_not_tested():
    names = detection._PAPER_BACKBONES
    made = rows(names[0], [73.1, 73.3]) + rows(names[1], [76.3, 76.5])
    verdict = words(made, backbones=names, detection="voc:PATH")["C18"]
    assert verdict.verdict == "holds" and "analogue" not in verdict.evidence
    hidden = rows(names[0], [float("nan")] * 2) + rows(names[1], [float("nan")] * 2)
    verdict = words(hidden, backbones=names, detection="voc:PATH@07++12")["C18"]
    assert verdict.verdict == "not tested" and "not public" in verdict.evidence


def test_every_step_of_table_9_must_gain():
    def table_9(*maps):
        steps = zip(detection.STEPS, maps, strict=False)
        return rows(PLAIN, [21.0, 21.2]) + [
            row
            for step, value in steps
            for row in rows(RESIDUAL, [value - 0.05, value + 0.05], step=step, ap=[30.0, 30.0])
        ]

    assert words(table_9(48.4, 49.9, 51.1, 53.8))["C20"].verdict == "holds"  # Table 9
    found = words(table_9(48.4, 49.9, 49.0, 53.8))["C20"]
    assert found.verdict == "fails" and "context: difference -0.90" in found.evidence
    assert words(table_9(48.4, 49.9, 50.0, 53.8))["C20"].verdict == "fails"  # 0.1 points: no effect that matters
    found = words(table_9(48.4, 49.9))["C20"]
    assert found.verdict == "not tested"
    assert "box refinement 49.90 ± 0.07 (30.00 ± 0.00)" in found.measured
    assert found.evidence.endswith("not there: context, multi-scale testing")


def test_gains_of_the_same_detectors_are_paired_and_those_of_new_ones_are_not():
    """mAP@.5 of the recorded run: detectors differ by more than box refinement brings each of them."""

    def table_9(context, scaled):
        maps = ([58.38, 60.90, 62.75], [60.48, 61.95, 65.68], context, scaled)
        steps = [rows(RESIDUAL, each, step=step) for step, each in zip(detection.STEPS, maps, strict=True)]
        return rows(PLAIN, [21.0, 21.1, 21.2]) + sum(steps, [])

    found = words(table_9([53.70, 56.98, 55.53], [59.18, 62.72, 61.86]))["C20"]
    refined, context, scaled = found.evidence.split("; ")
    assert refined.startswith("box refinement: difference +2.03 points, one-sided 95 % limits +0.4")
    assert "p = 0.033" in refined and refined.endswith("n = 3 pairs")
    assert context.startswith("context: difference -7.30 points, one-sided 95 % limits -11.41 and -3.19, Welch test")
    assert scaled.startswith("multi-scale testing: difference +5.85")
    assert found.verdict == "fails"
    gains = table_9([74.0, 75.0, 74.5], [75.0, 76.1, 75.4])
    assert words(gains)["C20"].verdict == "holds"
    apart = [row | ({"run": "run-anew"} if row["step"] == "box refinement" else {}) for row in gains]
    assert words(apart)["C20"].verdict == "inconclusive"
    without = [row for row in gains if row["step"] != "context"]
    refined, scaled, _ = words(without)["C20"].evidence.split("; ")
    assert "paired" in refined and scaled.startswith("multi-scale testing: ")


def test_fixed_against_trained_normalization():
    def both(trained, **changes):
        made = [row | changes for row in rows(RESIDUAL, trained, bn="trained")]
        return words(TABLE_7 + made, bn="both")

    found = both([47.0, 47.4])
    assert (found["C24"].verdict, found["C24b"].verdict) == ("holds", "holds")
    assert "4 images a step: fixed 10.00 ± 0.00, trained 16.00 ± 0.00 MiB" in found["C24"].measured
    assert found["C24"].evidence.startswith("38 % less")
    assert "fixed 53.50 ± 0.28, trained 47.20 ± 0.28 %" in found["C24b"].measured
    assert both([47.0, 47.4], kept_mib=10.0)["C24"].verdict == "fails"
    assert both([60.0, 60.4])["C24b"].verdict == "fails"
    assert both([40.0, 65.0])["C24b"].verdict == "inconclusive"
    only = [row | {"bn": "trained"} for row in TABLE_7]
    assert words(only, bn="trained")["C18"].verdict == "holds"


def test_the_plan_is_the_two_backbones_and_weights_need_none(monkeypatch):
    monkeypatch.setattr("plugins.detection.load_detection", lambda data: draw_shapes(48, 1, 1), raising=False)
    shapes, asked = rp.load_data("shapes"), []
    monkeypatch.setattr(rp, "load_data", lambda data: asked.append(data) or shapes)
    planned = detection.plan(QUICK)
    assert [(one.labels["backbone"], one.network, one.options) for one in planned] == [
        (PLAIN, PLAIN, {"width": 8}),
        (RESIDUAL, RESIDUAL, {"width": 8}),
    ]
    recipe = planned[0].recipe(rp.recipes.cifar_paper(300))
    assert (recipe.batch_size, recipe.learning_rate) == (64, 0.05)
    paper = study.presets["paper"]
    (first, *_) = detection.plan(paper)
    assert first.network == "imagenet/vgg-16"
    assert first.recipe(rp.recipes.imagenet_paper()) == rp.recipes.imagenet_paper()
    assert asked == ["shapes", "folder"]
    assert detection.plan(replace(paper, weights=("vgg16.pth", "resnet101.pth"))) == []
    assert len(asked) == 2, "what is not trained on need not be there"


def test_the_schedule_is_that_of_what_is_detected_in():
    paper = study.presets["paper"]
    assert detection.recipe_of(paper) == voc_paper()
    assert detection.recipe_of(replace(paper, detection="coco:PATH", detection_iterations=320_000)) == coco_paper()
    assert detection.recipe_of(QUICK) == shapes_quick()
    assert detection.recipe_of(replace(paper, schedule="shapes", detection_iterations=600)) == shapes_quick(600)
    assert detection.recipe_of(replace(paper, detection_rate=0.01)) == replace(voc_paper(), learning_rate=0.01)


def test_sizes_are_in_proportion_to_the_side():
    paper = detection.shape_of(study.presets["paper"])
    assert paper == {"shorter_side": 600, "longer_side": 1000, "anchor_sizes": (128, 256, 512)}
    half = detection.shape_of(replace(study.presets["paper"], side=300))
    assert half == {"shorter_side": 300, "longer_side": 500, "anchor_sizes": (64, 128, 256)}
    quick = detection.shape_of(QUICK)
    assert (quick["shorter_side"], quick["anchor_sizes"], quick["roi_size"]) == (64, (8, 14, 24), 8)


def test_departures_are_those_of_the_detectors_too():
    said = detection.departs(QUICK)
    assert said[0].startswith("detection: in drawn shapes instead of PASCAL VOC and COCO")
    assert "backbones: cifar/plain-20 and cifar/resnet-20 instead of VGG-16 and ResNet-101" in said
    assert "detectors: 1,000 iterations of 4 images, rate 0.06" in said
    said = detection.departs(study.presets["paper"])
    assert len(said) == 2 and "approximate joint training" in said[0]
    small = replace(study.presets["paper"], side=300, weights=("vgg16.pth", "resnet101.pth"))
    assert "detectors: shorter side 300 instead of 600 pixels, anchors in proportion" in detection.departs(small)
    assert any("as the files have them" in line for line in detection.departs(small))
    assert "detectors: 70,000 iterations of 1 image, rate 0.001" in detection.departs(
        replace(study.presets["paper"], detection_iterations=70_000)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbones": ("cifar/plain-20",)}, r"backbones \(=cifar/plain-20\) must be two different networks"),
        ({"weights": ("one.pth",)}, r"weights \(=one.pth\) must be two files"),
        ({"detection": "voc:absent"}, r"detection data \(='voc:absent'\): there is no folder absent"),
        ({"detection": "cifar10"}, r"detection data \(='cifar10'\) is unknown; accepted: shapes, voc:PATH, coco:PATH"),
        ({"scales": (0, 600)}, r"scales \(=0 600\) must be shorter sides ≥ 1"),
        ({"width": 0}, r"width \(=0\) must be a whole number ≥ 1"),
        ({"detection_rate": -1.0}, r"detection_rate \(=-1.0\) must be above 0"),
        ({"scales": (48, 48)}, r"scales \(=48 48\) must be shorter sides ≥ 1, each once"),
        (
            {"data": "digits"},
            r"data \(='digits'\) must have images of 3 channels, as those to detect in have, not of 1",
        ),
    ],
)
def test_mistakes_are_one_clear_line(wrong, message):
    with pytest.raises(rp.UsageError, match=message):
        detection.plan(replace(QUICK, **wrong))


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_data_of_one_channel_are_refused_before_a_backbone_is_trained(tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    asked = ["--data", "digits", "--seeds", "0", "--iterations", "2", "--device", "cpu", "--width", "4", *more]
    assert study.main(asked) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: data (='digits') must have") and said.err.count("\n") == 1
    assert said.out == "" and not list(tmp_path.iterdir())


def test_the_figures_show_what_was_measured(tmp_path):
    data = draw_shapes()
    target = data.test.targets[0]
    found = [[] for _ in data.test.targets]
    found[0] = [
        {"box": target["boxes"][0].tolist(), "label": int(target["labels"][0]), "score": 0.9},
        {"box": [0.0, 0.0, 9.0, 9.0], "label": 1, "score": 0.3},
    ]
    (tmp_path / "run-20-frozen").mkdir()
    (tmp_path / "run-20-frozen" / "detections.json").write_text(json.dumps(found))
    drawings = study.draw(results(TABLE_7, runs=str(tmp_path)))
    left, right = drawings["figure"].figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == ["plain-20, BN frozen", "ResNet-20, BN frozen"]
    assert lines["ResNet-20, BN frozen"].get_xdata().tolist() == [0, 100, 300]
    assert lines["ResNet-20, BN frozen"].get_ydata() == pytest.approx([0, 53.5 / 3, 53.5])
    assert [bar.get_height() for bar in right.patches] == pytest.approx([55.3, 45.3, 58.5, 48.5])
    assert [text.get_text() for text in right.get_xticklabels()] == ["disc", "star"]
    assert "ResNet-20 53.50 ± 0.28 %" in drawings["figure"].alt
    axes = drawings["figure-pictures"].figure.axes
    assert len(axes) == 8
    assert len(axes[0].patches) == len(target["labels"])
    (only,) = axes[4].texts  # what is found with a score below 0.5 is not drawn
    assert only.get_text() == f"{data.classes[int(target['labels'][0]) - 1]} 0.90"


def test_the_table_stands_beside_the_papers():
    table = study.tabulate(results(TABLE_7)).set_index("backbone")
    assert table["mAP (%)"].to_dict() == {PLAIN: "50.30 ± 0.42", RESIDUAL: "53.50 ± 0.28"}
    assert table.loc[RESIDUAL, "AP disc"] == "58.5 ± 0.3"
    assert table.loc[RESIDUAL, "10⁹ multiply-adds an image"] == "2.50"
    assert "AP disc all-point" not in table and "paper (%)" not in table
    names = detection._PAPER_BACKBONES
    made = rows(names[0], [70.0]) + rows(names[1], [73.0])
    table = study.tabulate(results(made, backbones=names, detection="voc:PATH"))
    assert table["paper (%)"].tolist() == ["73.2 / 70.4", "76.4 / 73.8"]


THE_PAPERS = replace(study.presets["paper"], data="folder:IMAGENET")


@pytest.fixture
def imagenet(monkeypatch):
    monkeypatch.setattr("resprobe.study.is_imagenet", lambda data: data == THE_PAPERS.data)


def test_in_the_papers_setting_figures_are_held_against_its_own(imagenet):
    vgg, resnet = detection._PAPER_BACKBONES
    made = rows(vgg, [73.2, 73.4]) + rows(resnet, [77.0, 77.2])
    evidence = words(made, preset=THE_PAPERS)["C18"].evidence
    assert evidence.endswith("; 1 of 2 figures are within max(0.5 points, 2 std) of Table 7's")
    table = study.tabulate(results(made, THE_PAPERS))
    assert table["paper (%)"].tolist() == ["73.2 / 70.4 (+0.10, within ±0.50)", "76.4 / 73.8 (+0.70, beyond ±0.50)"]
    made = rows(vgg, [41.0, 43.0], ap=[21.2, 21.4]) + rows(resnet, [48.5, 48.5], ap=[26.0, 26.2])
    coco = {"preset": THE_PAPERS, "detection": "coco:PATH@train2014/val2014"}
    assert "; 3 of 4 figures are within" in words(made, **coco)["C19"].evidence
    assert study.tabulate(results(made, **coco))["paper (%)"].tolist() == [
        "41.5 / 21.2 (+0.50, within ±2.83; +0.10, within ±0.50)",
        "48.4 / 27.2 (+0.10, within ±0.50; -1.10, beyond ±0.50)",
    ]


@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        ({"detection": "voc:elsewhere/VOCdevkit@07+12", "seeds": (0, 1), "refine": True, "preset": "quick"}, True),
        ({"bn": "both", "context": True, "scales": (200, 400)}, True),
        ({"bn": "trained"}, False),
        ({"data": "folder:OTHER"}, False),
        ({"detection": "voc:VOCdevkit@2007-trainval/2007-test"}, False),
        ({"iterations": 6000}, False),
        ({"weights": ("vgg16.pth", "resnet101.pth")}, False),
        ({"recipe": ("bn_batch=64",)}, False),
        ({"side": 300}, False),
        ({"detection_iterations": 1000}, False),
        ({"schedule": "coco"}, False),
    ],
    ids=str,
)
def test_elsewhere_the_papers_figures_stand_alone(imagenet, changes, beside):
    vgg, resnet = detection._PAPER_BACKBONES
    made = [row for bn in ("frozen", "trained") for row in rows(vgg, [73.2], bn=bn) + rows(resnet, [76.4], bn=bn)]
    of = rp.Results(
        replace(THE_PAPERS, **changes), pandas.DataFrame(), pandas.DataFrame(), [], measurements=pandas.DataFrame(made)
    )
    told = study.tabulate(of).query("`batch normalization` == 'frozen'")["paper (%)"].str.contains("within").tolist()
    assert told == [beside] * 2
    assert ("of Table 7's" in judge(of)[0].evidence) is beside
    alone = study.tabulate(of).query("`batch normalization` == 'trained'")["paper (%)"].tolist()
    assert alone == ["73.2 / 70.4", "76.4 / 73.8"]


def test_the_whole_study_on_a_few_images(tmp_path, monkeypatch, capsys):
    """Trains for real: two tiny backbones, all steps of Table 9, and normalization of both kinds."""
    monkeypatch.chdir(tmp_path)
    few, read = draw_shapes(48, 6, 2), []
    monkeypatch.setattr("plugins.detection.load_detection", lambda data: read.append(data) or few, raising=False)
    arguments = [
        "--seeds",
        "0",
        "--iterations",
        "2",
        "--detection-iterations",
        "2",
        "--bn",
        "both",
        "--refine",
        "--context",
    ]
    arguments += [
        "--scales",
        "32",
        "64",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--concurrency",
        "1",
        "--width",
        "4",
    ]
    arguments += ["--backbones", "cifar/plain-8", "cifar/resnet-8"]
    assert study.main([*arguments, "--dry-run"]) == 0
    assert re.search(r"4 detectors: 0 finished already, 4 to train\ntime: about \d+ s on cpu", capsys.readouterr().out)
    assert read == ["shapes"]
    assert study.main(arguments) == 0
    assert read == ["shapes"] * 2, "annotations are read once a study, and anew by the next"
    said = capsys.readouterr()
    assert "what trains in the detector on cifar/resnet-8, batch normalization trained" in said.out, said.err
    assert study.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("4 detectors: 4 finished already, nothing to train\n")
    written = json.loads((tmp_path / "results/detection/verdict.json").read_text())
    assert written["setting"] == "custom"
    table = pandas.read_csv(tmp_path / "results/detection/measurements.csv").dropna(subset=["run"])
    assert table[["bn", "step"]].agg(" ".join, axis=1).tolist() == [
        "frozen baseline",
        *(f"frozen {step}" for step in detection.STEPS),
        "trained baseline",
    ]


def test_a_detector_that_diverges_does_not_stop_the_others(monkeypatch, capsys):
    monkeypatch.setattr(detection, "_backbones", lambda results: [(PLAIN, 0, None), (RESIDUAL, 0, None)])
    done = []

    def measured(results, data, name, seed, network, bn):
        if name == PLAIN:
            raise rp.TrainingDiverged("detector on cifar/plain-20, seed 0: the loss stopped being finite")
        done.append(name)
        return []

    monkeypatch.setattr(detection, "_measured", measured)
    with pytest.raises(rp.TrainingDiverged, match="plain-20, seed 0: .*; finished detectors are kept in runs$"):
        detection.measure(results([]))
    assert done == [RESIDUAL]
    assert capsys.readouterr().out.startswith("failed: detector on cifar/plain-20")


def test_every_schedule_has_its_own_length():
    paper = study.presets["paper"]
    assert detection.recipe_of(paper) == voc_paper()
    assert detection.recipe_of(replace(paper, detection="coco:PATH")) == coco_paper()
    assert detection.recipe_of(QUICK) == shapes_quick()
    assert detection.recipe_of(replace(QUICK, detection_iterations=50)).iterations == 50


@pytest.fixture
def published(tmp_path):
    """The folders of runs of two tiny backbones, one a bottleneck with the stride of the paper."""
    paths = []
    for name, options in (("cifar/plain-8", {}), ("cifar/resnet-11", {"block": "bottleneck"})):
        recipe = rp.recipes.digits_quick(iterations=1)
        run = rp.train(
            rp.build(name, width=4, in_channels=1, **options), "digits", recipe, runs=tmp_path / "runs", progress=False
        )
        paths.append(str(run.path))
    return paths


def test_a_runs_folder_is_a_backbone_as_it_was_trained(published):
    def backbones(*weights):
        names = ("cifar/plain-8", "cifar/resnet-11")
        options = replace(QUICK, backbones=names, weights=weights, seeds=(0, 1))
        return list(detection._backbones(rp.Results(options, pandas.DataFrame(), pandas.DataFrame(), [])))

    found = backbones(*published)
    assert [(name, seed) for name, seed, _ in found] == [
        ("cifar/plain-8", 0),
        ("cifar/plain-8", 1),
        ("cifar/resnet-11", 0),
        ("cifar/resnet-11", 1),
    ]
    bottleneck = found[-1][2]
    assert bottleneck.spec["stride_in"] == "1x1" and bottleneck.spec["width"] == 4
    with pytest.raises(rp.UsageError, match="are those of cifar/plain-8, not of cifar/resnet-11 in --backbones"):
        backbones(published[0], published[0])


def test_weights_need_no_data_to_pretrain_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "paper", "--detection", "shapes", "--dry-run", "--weights", "a.pth", "b.pth"]
    assert study.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: weights (='a.pth') are not there")


def test_labels_of_boxes_lie_beside_each_other_inside_the_picture():
    taken = []
    for text in ("triangle 0.90", "star 0.57", "star 0.52", "disc 0.51"):  # around one thing at the upper border
        taken.append(detection._label_place([40, 2, 90, 60], text, (128, 128), taken))
    for index, (x0, y0, x1, y1) in enumerate(taken):
        assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 128
        for a0, b0, a1, b1 in taken[:index]:
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0


def test_the_options_are_said_in_help():
    assert isinstance(QUICK, Options)
    assert study.parse(["--bn", "both", "--scales", "48", "64"]).scales == (48, 64)
    with pytest.raises(rp.UsageError, match="accepted: frozen, trained, both"):
        study.parse(["--bn", "fixed"])
