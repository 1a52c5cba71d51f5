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


@pytest.mark.parametrize("label", ["seed", "test_error", "network", "learning_rate"])
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


def test_where_all_diverged_there_is_no_report(tmp_path):
    def at(rate: float):
        return lambda usual: dataclasses.replace(usual, learning_rate=rate, window=1, iterations=4, milestones=())

    def rates(options: rp.Options) -> list[rp.Planned]:
        return [dataclasses.replace(one, recipe=at(1e30)) for one in plan(options)[:1]]

    for said in "1 of 1 runs failed: .* is not finite", "^all of these trainings have diverged, and would again":
        with pytest.raises(rp.errors.SweepFailed, match=said):
            run(tmp_path, plan=rates, diverged="leave out")
    assert not (tmp_path / "out/verdict.json").exists()


def test_what_diverged_in_a_second_round_is_told_too(tmp_path):
    def then(results: rp.Results) -> list[rp.Planned]:
        def at(rate: float):
            return lambda usual: dataclasses.replace(usual, learning_rate=rate, window=1, iterations=4, milestones=())

        return [rp.Planned({"rate": rate}, "cifar/plain-8", {"width": 2}, recipe=at(rate)) for rate in (0.1, 1e30)]

    record = run(tmp_path, then=then, diverged="leave out")
    assert record["config"]["left_out"] == {"cifar/plain-8, learning_rate 1e+30": [0]}
    assert pandas.read_csv(tmp_path / "out/table.csv")["rate"].tolist() == [0.01, 0.1, 0.1]


def test_no_label_takes_the_place_of_a_column(tmp_path):
    from resprobe.planning import _COLUMNS

    run(tmp_path)
    columns = set(pandas.read_csv(tmp_path / "out/results.csv"))
    history = set(pandas.read_csv(next(tmp_path.glob("runs/*/history.csv"))))
    assert (columns - {"rate"}) | history <= _COLUMNS


def test_an_expected_error_of_ones_own_part_stays_what_it_is(tmp_path):
    def measure(results: rp.Results) -> pandas.DataFrame:
        raise rp.errors.TrainingDiverged("the loss is not finite")

    with pytest.raises(rp.errors.TrainingDiverged):
        run(tmp_path, measure=measure)
    yielded = run(tmp_path, judge=lambda results: (verdict for verdict in STUDY.judge(results)))
    assert yielded["claims"][0]["verdict"] == "holds"


def test_every_claim_has_a_verdict(tmp_path):
    assert refused(tmp_path, judge=lambda results: []) == "judge of study 'rates' gives no verdict on L1"


def test_what_happens_to_the_diverged_is_said_in_known_words():
    with pytest.raises(
        rp.UsageError, match=r"^diverged \(='leave-out'\) is unknown; accepted: fail, leave out; nearest: leave out$"
    ):
        dataclasses.replace(STUDY, diverged="leave-out")
