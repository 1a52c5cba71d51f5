"""What a study of one's own may ask for, and its mistakes: one line each, and nothing that is silently something else."""

from __future__ import annotations

import dataclasses

import pandas
import pytest

import resprobe as rp

CLAIM = rp.Claim("L1", "A rate is best", "beyond the paper", "not in the paper", "another is better", beyond=True)
QUICK = rp.Options(depths=(8,), seeds=(0,), iterations=2, concurrency="1")


def plan(options: rp.Options) -> list[rp.Planned]:
    def at(rate: float):
        return lambda usual: dataclasses.replace(usual, learning_rate=rate, window=1)

    return [rp.Planned({"rate": rate}, "cifar/resnet-8", {"width": 2}, recipe=at(rate)) for rate in (0.01, 0.1)]


def draw(results: rp.Results) -> dict[str, rp.Drawing]:
    return {"figure": rp.Drawing(rp.figures.new_figure()[0], "Nothing.", "Nothing.")}


STUDY = rp.Study(
    name="rates",
    title="One rate is best",
    claims=(CLAIM,),
    presets={"quick": QUICK, "paper": QUICK},
    plan=plan,
    judge=lambda results: [rp.Verdict(CLAIM, "holds", "as it is", "by looking")],
    draw=draw,
    tabulate=lambda results: pandas.DataFrame(
        {"rate": results.table["rate"], "error (%)": results.table["test_error"]}
    ),
)


def run(tmp_path, **parts) -> dict:
    options = dataclasses.replace(QUICK, out=str(tmp_path / "out"), runs=str(tmp_path / "runs"))
    return dataclasses.replace(STUDY, **parts).run(options)


def refused(tmp_path, **parts) -> str:
    with pytest.raises(rp.UsageError) as error:
        run(tmp_path, **parts)
    return str(error.value)


def test_a_report_has_its_table_and_figures_for_a_paper(tmp_path, capsys):
    assert run(tmp_path)["tables"] == ["table", "results"]
    assert "cifar/resnet-8, learning_rate 0.01, seed 0: training error" in capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "out/table.csv")
    assert table["rate"].tolist() == [0.01, 0.1]
    assert "error (\\%)" in table.to_latex(index=False, escape=True)
    before = (tmp_path / "out/figure.pdf").read_bytes()
    assert before.startswith(b"%PDF")
    run(tmp_path)
    assert (tmp_path / "out/figure.pdf").read_bytes() == before, "the same figure, the same file"


def test_one_run_behind_two_labels_is_refused(tmp_path):
    """All functions of a loop see its last value."""

    def late(options: rp.Options) -> list[rp.Planned]:
        made = []
        for rate in (0.01, 0.1):
            recipe = lambda usual: dataclasses.replace(usual, learning_rate=rate)  # noqa: B023, E731
            made.append(rp.Planned({"rate": rate}, "cifar/resnet-8", recipe=recipe))
        return made

    assert refused(tmp_path, plan=late) == (
        "rate 0.1, seed 0 and rate 0.01, seed 0 are one and the same run, which says nothing of a difference"
    )


@pytest.mark.parametrize("label", ["seed", "test_error", "network", "run"])
def test_columns_of_every_study_are_no_labels(label, tmp_path):
    def own(options: rp.Options) -> list[rp.Planned]:
        return [rp.Planned({label: 1}, "cifar/resnet-8")]

    assert refused(tmp_path, plan=own) == (
        f"label (={label!r}) is the name of a column that every study has; call it something else"
    )


def test_a_recipe_is_a_function_of_the_usual_one(tmp_path):
    recipe = rp.recipes.digits_quick()
    message = refused(tmp_path, plan=lambda options: [rp.Planned({}, "cifar/resnet-8", recipe=recipe)])
    assert message == (
        "recipe (=a Recipe) of a Planned must be a function of the usual recipe, such as "
        "lambda usual: dataclasses.replace(usual, learning_rate=0.05)"
    )


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ("plan", "a list of rp.Planned"),
        ("then", "a list of rp.Planned"),
        ("measure", "a pandas.DataFrame"),
        ("judge", "a list of rp.Verdict"),
        ("draw", "a dict of names and rp.Drawing"),
        ("tabulate", "a pandas.DataFrame"),
    ],
)
def test_a_part_gives_what_it_is_to_give(part, wanted, tmp_path):
    assert refused(tmp_path, **{part: lambda given: None}) == (
        f"{part} of study 'rates' must return {wanted}, not None"
    )


def test_a_mistake_in_ones_own_part_is_one_line_with_its_place(tmp_path):
    def judge(results: rp.Results) -> list[rp.Verdict]:
        return [rp.Verdict(CLAIM, "holds", str(results.values("test_error", lr=0.1)), "")]

    message = refused(tmp_path, judge=judge)
    assert message.startswith("judge of study 'rates' fails: KeyError: 'lr' (test_planning.py, line ")
    assert run(tmp_path)["claims"][0]["verdict"] == "holds", "what was trained is there"


def test_where_to_diverge_is_a_result_the_others_are_reported(tmp_path, capsys):
    def rates(options: rp.Options) -> list[rp.Planned]:
        return [
            dataclasses.replace(one, labels={"rate": rate}, recipe=at(rate))
            for rate, one in zip((0.1, 1e30), plan(options), strict=False)
        ]

    def at(rate: float):
        return lambda usual: dataclasses.replace(usual, learning_rate=rate, window=1, iterations=4, milestones=())

    with pytest.raises(rp.errors.SweepFailed, match="1 of 2 runs failed: .* is not finite"):
        run(tmp_path, plan=rates)
    capsys.readouterr()
    record = run(tmp_path, plan=rates, diverged="leave out")
    assert record["config"]["left_out"] == {"cifar/resnet-8, learning_rate 1e+30": [0]}
    assert pandas.read_csv(tmp_path / "out/table.csv")["rate"].tolist() == [0.1]
    assert "1 run: 1 finished already" in capsys.readouterr().out, "it is not tried again"
    again = run(tmp_path / "fresh", plan=rates, diverged="leave out")
    assert again["config"]["left_out"] == record["config"]["left_out"]
