"""Verdicts: each can come out each way, and none is given without a spread to judge by."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import resprobe as rp
from resprobe.claims import MARGIN

CLAIM = rp.Claim("C0", "a statement", "§0", "a number", "its opposite")


def test_a_clear_difference_holds():
    found = rp.compare([60.0, 62.0, 61.0], [1.0, 1.2, 0.9])
    assert found.verdict == "holds"
    assert found.p < 0.001
    assert "one-sided 95 % limits +58.31 and +61.62, Welch test p = 3.3e-05" in str(found)
    assert "n = 3 and 3 seeds" in str(found)


def test_no_difference_fails_once_the_spread_excludes_an_effect():
    found = rp.compare([5.00, 5.02, 4.98], [5.01, 4.99, 5.00])
    assert found.verdict == "fails"
    assert found.upper < MARGIN


def test_the_opposite_order_fails():
    assert rp.compare([1.0, 1.2, 0.9], [60.0, 62.0, 61.0]).verdict == "fails"


def test_noise_is_inconclusive():
    assert rp.compare([5.0, 9.0, 3.0], [4.0, 8.0, 6.0]).verdict == "inconclusive"


@pytest.mark.parametrize("seeds", [([60.0], [1.0]), ([60.0, 61.0], [1.0]), ([60.0], [1.0, 2.0])])
def test_one_seed_is_never_enough(seeds):
    found = rp.compare(*seeds)
    assert found.verdict == "inconclusive"
    assert "one seed has no spread to judge by" in str(found)


def test_figures_without_any_spread_need_no_test():
    assert rp.compare([2.0, 2.0], [1.0, 1.0]).verdict == "holds"
    assert rp.compare([1.0, 1.0], [1.0, 1.0]).verdict == "fails"


def test_limits_against_the_textbook():
    # Welch's limit by hand: difference − t · √(s₁²/n₁ + s₂²/n₂), with the Welch–Satterthwaite degrees of freedom.
    from scipy import stats

    higher, lower = [5.0, 7.0, 6.0], [1.0, 2.0]
    v1, v2 = 1.0 / 3, 0.5 / 2
    freedom = (v1 + v2) ** 2 / (v1**2 / 2 + v2**2 / 1)
    reach = stats.t.ppf(0.95, freedom) * math.sqrt(v1 + v2)
    found = rp.compare(higher, lower)
    assert found.lower == pytest.approx(4.5 - reach)
    assert found.upper == pytest.approx(4.5 + reach)


errors = st.lists(st.floats(0, 100, allow_subnormal=False).map(lambda value: round(value, 3)), min_size=2, max_size=5)


@given(errors, errors)
def test_a_claim_and_its_opposite_do_not_both_hold(one, other):
    verdicts = {rp.compare(one, other).verdict, rp.compare(other, one).verdict}
    assert verdicts != {"holds"}


def test_mean_std():
    assert rp.mean_std([6.0, 7.0]) == "6.50 ± 0.71"
    assert rp.mean_std([6.0]) == "6.00"
    assert rp.mean_std([]) == "–"


def test_a_verdict_is_one_of_four_words():
    with pytest.raises(rp.UsageError, match=r"verdict \(='hold'\) is unknown; accepted: holds, fails.*nearest: holds"):
        rp.Verdict(CLAIM, "hold", "measured", "evidence")


def test_against_a_constant_it_is_the_test_of_one_sample():
    from scipy import stats

    values = [0.05, 0.07, 0.04, 0.06]
    found = rp.compare(0.1, values, margin=0)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="less").pvalue)
    assert found.verdict == "holds"
    assert str(found).endswith("n = 4 seeds against a constant")
    assert rp.compare(0.1, [0.05]).verdict == "inconclusive"
    assert rp.compare([0.3, 0.4, 0.35], 0.1).verdict == "holds"


@pytest.mark.parametrize(
    ("scale", "unit", "said"),
    [
        (1, "points", "difference +0.05 points, one-sided 95 % limits +0.04 and +0.06,"),
        (1, "in mean std", "difference +0.0467 in mean std, one-sided 95 % limits +0.0369 and +0.0564,"),
        (10_000, "iterations", "difference +467 iterations, one-sided 95 % limits +369 and +564,"),
    ],
)
def test_figures_have_the_digits_that_their_size_asks_for(scale, unit, said):
    found = rp.compare([0.14 * scale, 0.15 * scale, 0.15 * scale], [0.1 * scale] * 3, unit=unit)
    assert str(found).startswith(said)


def test_values_come_in_any_order_of_things():
    import pandas

    expected = rp.compare([3.0, 4.0, 5.0], [1.0, 2.0, 2.5])
    assert rp.compare(numpy.array([3.0, 4.0, 5.0]), pandas.Series([1.0, 2.0, 2.5])) == expected
    assert rp.compare(numpy.float32(2.0), (1.0, 1.5)) == rp.compare(2.0, [1.0, 1.5])


@pytest.mark.parametrize(
    ("higher", "lower", "said"),
    [
        ([1, 2, float("nan")], [1, 2, 3], "compare needs finite numbers, one a seed, not [1, 2, nan]"),
        ([1, 2], float("inf"), "compare needs finite numbers, one a seed, not inf"),
        (["a"], [1.0], "compare needs finite numbers, one a seed, not ['a']"),
        (None, [1.0], "compare needs finite numbers, one a seed, not None"),
        (5.0, 4.0, "compare needs one value a seed on either side, or on one side a constant"),
        ([], [1.0], "compare needs one value a seed on either side, or on one side a constant"),
    ],
)
def test_what_cannot_be_compared_is_said(higher, lower, said):
    with pytest.raises(rp.UsageError) as error:
        rp.compare(higher, lower)
    assert str(error.value) == said


def test_similar_means_that_a_larger_difference_is_excluded_both_ways():
    assert rp.compare([6.0, 6.1, 6.2], [6.0, 6.1, 6.2]).similar == "holds"
    assert rp.compare([9.0, 9.1, 9.2], [6.0, 6.1, 6.2]).similar == "fails"
    assert rp.compare([6.0, 6.1, 6.2], [9.0, 9.1, 9.2]).similar == "fails"
    assert rp.compare([3.0, 6.0, 9.0], [6.0, 6.1, 6.2]).similar == "inconclusive"
    assert rp.compare([6.0], [6.0, 6.1]).similar == "inconclusive"


def test_seeds_that_all_agree_are_said_to():
    assert str(rp.compare([30, 30, 30], [20, 20, 20], unit="iterations")) == (
        "difference +10.0 iterations, the same at every seed, n = 3 and 3 seeds"
    )


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0, 2.0], [])])
def test_a_side_without_values_is_refused(sides):
    with pytest.raises(rp.UsageError, match="one value a seed"):
        rp.compare(*sides)


def test_more_than_the_margin():
    certain = rp.compare([3.0, 3.1, 2.9], [1.0, 1.1, 0.9])
    assert (certain.verdict, certain.exceeds) == ("holds", "holds")
    small = rp.compare([1.20, 1.21, 1.19], [1.00, 1.01, 0.99])
    assert (small.verdict, small.exceeds) == ("holds", "fails")
    assert rp.compare([1.4, 1.6, 1.5], [1.0, 1.1, 0.9]).exceeds == "inconclusive"
    assert rp.compare([3.0], [1.0]).exceeds == "inconclusive"


def test_networks_that_fit_every_training_image_refute_no_gain():
    none = rp.compare([1.9, 1.6, 2.2], [2.2, 2.5, 1.9], margin=1.5)
    fits, nearly, degraded = [0.0] * 3, [0.0, 0.0, 0.14], [3.0, 2.0, 4.0]
    assert (
        none.gain(nearly, fits) == none.gain([], []) == none.gain(fits, degraded) == (none.verdict, "") == ("fails", "")
    )
    assert none.gain(fits, fits) == none.gain(fits, nearly)
    assert none.gain(fits, fits)[0] == "not tested"
    assert rp.compare([2.2, 2.5, 1.9], [0.9, 0.6, 1.2]).gain(fits, fits) == ("holds", "")


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "inconclusive", "fails"], "fails"),
        (["holds", "inconclusive"], "inconclusive"),
        (["holds", "not tested"], "inconclusive"),
        (["inconclusive", "not tested"], "inconclusive"),
        (["not tested", "not tested"], "not tested"),
        ([], "not tested"),
    ],
)
def test_a_claim_of_several_parts(words, word):
    assert rp.all_of(words) == rp.all_of(iter(words)) == word


def test_how_near_is_the_same():
    assert rp.band([8.75]) == rp.band([8.7, 8.8, 8.75]) == MARGIN
    assert rp.band([8.0, 9.0, 8.5]) == pytest.approx(2 * 0.5)
    assert rp.band([7.0, 9.0, 8.0]) == pytest.approx(2.0)
    assert rp.from_paper([6.6, 6.7, 6.8], 6.61) == "+0.09, within ±0.50"
    assert rp.from_paper([5.9], 6.61) == "-0.71, beyond ±0.50"
    assert rp.from_paper([5.0, 7.0, 6.0], 6.61) == "-0.61, within ±2.00"


def test_against_a_constant_the_test_is_no_welch_test():
    assert ", t test p =" in str(rp.compare([1.0, 1.1, 1.2], 0.5))
    assert ", Welch test p =" in str(rp.compare([1.0, 1.1, 1.2], [0.5, 0.6]))


def test_pairs_are_compared_by_their_differences():
    from scipy import stats

    higher, lower = [5.0, 7.0, 9.1], [4.0, 6.2, 8.0]
    found = rp.compare(higher, lower, paired=True)
    assert found.p == pytest.approx(stats.ttest_rel(higher, lower, alternative="greater").pvalue)
    assert found.verdict == "holds" and rp.compare(higher, lower).verdict == "inconclusive"
    assert str(found).startswith("difference +0.97 points, one-sided 95 % limits +0.71 and +1.22, paired t test p = ")
    assert str(found).endswith(", n = 3 pairs")
    for others in [1.0, 2.0], 1.0:
        with pytest.raises(rp.UsageError, match="as many values on either side where they are paired"):
            rp.compare(higher, others, paired=True)


def test_where_p_is_of_another_difference_it_is_left_out():
    assert rp.compare([3.0, 3.1, 2.9], [1.0, 1.1, 0.9]).said(p=False) == (
        "difference +2.00 points, one-sided 95 % limits +1.83 and +2.17, n = 3 and 3 seeds"
    )


@pytest.mark.parametrize("value", [100 * 5 / 360, 100 * 11 / 360, 0.1, 1234.567])
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_the_last_digit_of_a_mean_is_no_difference(value, count):
    """The mean of three equal numbers need not be that number."""
    same = rp.compare([value] * count, [value] * 3)
    assert (same.difference, same.lower, same.upper, same.verdict) == (0.0, 0.0, 0.0, "fails")
    assert "the same at every seed" in str(same) and "the same at every seed" in str(
        rp.compare([value + 10] * count, [value] * 3)
    )
    assert rp.compare([value] * count, [value] * count, paired=True).difference == 0.0


def test_a_difference_within_the_margin_does_not_refute_likeness():
    """Certainly there, and certainly too small to count: it holds. Perhaps too small to count: it is open."""
    assert rp.compare([6.21, 6.22, 6.20], [6.0, 6.01, 5.99]).similar == "holds"
    assert rp.compare([6.35, 6.45, 6.25], [6.0, 6.1, 5.9]).similar == "inconclusive"


def test_an_error_below_the_margin_leaves_nothing_to_gain():
    halved = rp.compare([0.42, 0.35, 0.49], [0.28, 0.0, 0.28])
    assert halved.verdict == "fails"
    assert halved.gain() == (
        "not tested",
        "the error to improve on is 0.42 points: a gain of 0.5 is impossible, and its absence refutes nothing",
    )
    shown = rp.compare([0.42, 0.41, 0.43], [0.1, 0.11, 0.09])
    assert shown.gain() == ("holds", "")
    worse = rp.compare([0.3, 0.31, 0.29], [42.0, 42.1, 41.9])
    assert worse.gain() == ("fails", "")
    more = rp.compare([5.0, 5.02, 4.98], [5.01, 4.99, 5.0])
    assert more.gain() == ("fails", "")
    assert rp.compare([0.42], [0.28]).gain() == ("inconclusive", "")


def test_that_the_deeper_errs_more_is_not_passed_over():
    worse = rp.compare([2.1, 2.2, 2.0], [12.1, 12.2, 12.0])
    word, reason = worse.gain([0.0] * 3, [0.0] * 3)
    assert word == "not tested"
    assert reason.endswith("cannot be refuted here, though the deeper certainly errs more")


def test_networks_that_have_not_learned_do_not_differ_in_anything():
    guessing, learned = [89.9, 90.0, 90.1], [3.0, 4.0, 5.0]
    alike = rp.Verdict(CLAIM, "fails", "measured", "evidence")
    found = rp.if_learned(alike, guessing, guessing)
    assert (found.verdict, found.measured) == ("inconclusive", "measured")
    assert found.evidence == (
        "none of these networks has learned (training error 90.0 % at best): that they do not differ says nothing. evidence"
    )
    assert rp.if_learned(alike, guessing, learned) is alike
    apart = rp.Verdict(CLAIM, "holds", "measured", "evidence")
    assert rp.if_learned(apart, guessing, guessing) is apart
    assert rp.if_learned(apart, guessing, guessing, absent="holds").verdict == "inconclusive"
    # "Fails" may also say that they differ the other way round.
    assert rp.if_learned(alike, guessing, [50.0, 50.1, 49.9], opposite=True) is alike


# -- how often a rule errs: the figures of docs/verdicts.md ---------------------------------------------------------


def rates(draw, studies: int = 1500) -> dict[str, float]:
    """How often each word is said, in percent of so many studies; `draw` gives the two sides of one."""
    words = [rp.compare(*draw()).verdict for _ in range(studies)]
    return {word: 100 * words.count(word) / studies for word in ("holds", "fails")}


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spreads", [(0.3, 0.3), (0.15, 0.6)])
def test_either_word_is_wrong_in_two_to_five_of_a_hundred_studies(seeds, spreads):
    random = numpy.random.default_rng(0)

    def draw(difference: float) -> list[list[float]]:
        means = 5 + difference, 5
        return [random.normal(mean, spread, seeds).tolist() for mean, spread in zip(means, spreads, strict=True)]

    assert 1.5 < rates(lambda: draw(0.0))["holds"] < 6.5
    assert 1.5 < rates(lambda: draw(MARGIN))["fails"] < 6.5


@pytest.mark.parametrize(("seeds", "share"), [(3, 50), (5, 33)])
def test_trainings_that_get_stuck_now_and_then_are_missed(seeds, share):
    """One in five ends 30 points higher: half of all studies of three seeds say that there is no difference."""
    random = numpy.random.default_rng(0)

    def draw() -> list[list[float]]:
        stuck = 30 * (random.random(seeds) < 0.2)
        return [abs(random.normal(0.05, 0.03, seeds) + more).tolist() for more in (stuck, 0)]

    assert rates(draw)["fails"] == pytest.approx(share, abs=5)
