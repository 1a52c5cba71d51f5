"""Claims of the paper and verdicts on them: what was measured, how sure it is, and what would have said otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from resprobe.errors import UsageError, not_accepted, short

Word = Literal["holds", "fails", "inconclusive", "not tested"]
VERDICTS = ("holds", "fails", "inconclusive", "not tested")
LEVEL = 0.05
"""Level of the one-sided tests."""
MARGIN = 0.5
"""Points of error below which a difference does not count as an effect. Fixed before any run."""
LEARNED = 45.0
"""Training error (%) up to which a network has learned: half of what guessing among ten classes gives. Where none of those
that are compared has, nothing is said by a difference that is not seen."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper. `paper` holds its numbers; `falsifier` what result would contradict it.

    `beyond`: the statement is ours, and the paper does not make it.
    """

    id: str
    statement: str
    section: str
    paper: str
    falsifier: str
    beyond: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the measurements say of a claim: `measured` the figures, `evidence` the test that decided, in lines if it is long."""

    claim: Claim
    verdict: Word
    measured: str
    evidence: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise not_accepted("verdict", self.verdict, VERDICTS)


@dataclass(frozen=True)
class Comparison:
    """The difference of two means over seeds, `higher − lower`, with one-sided 95 % confidence limits (Welch's; Student's
    where one side is a constant, or figures are `paired` by seed).

    `verdict` says whether `higher` is indeed higher: it holds if the lower limit is above 0; it fails if the upper
    limit is below `margin`, which excludes any effect that matters; else it is inconclusive. Without a spread on
    either side (fewer than two seeds) nothing can be said. `n` has the seeds of both sides, None for a constant.
    `higher`: the mean of that side.
    """

    difference: float
    lower: float
    upper: float
    p: float
    n: tuple[int | None, int | None]
    margin: float = MARGIN
    unit: str = "points"
    paired: bool = False
    higher: float = math.inf

    @property
    def seeds(self) -> int:
        """Seeds of the side that has fewer."""
        return min(count for count in self.n if count is not None)

    @property
    def verdict(self) -> Word:
        if self.seeds < 2:
            return "inconclusive"
        if self.lower > 0:
            return "holds"
        return "fails" if self.upper < self.margin else "inconclusive"

    @property
    def reversed(self) -> bool:
        """Whether it is certain that `lower` has the higher mean."""
        return self.upper < 0

    @property
    def exceeds(self) -> Word:
        """Whether `higher` is above by more than `margin`: for claims that speak of a size."""
        if self.seeds < 2:
            return "inconclusive"
        if self.lower > self.margin:
            return "holds"
        return "fails" if self.upper < self.margin else "inconclusive"

    @property
    def similar(self) -> Word:
        """Whether both are the same but for `margin`: it holds if a larger difference is excluded in both directions,
        and fails if there is certainly a larger one, in either."""
        if self.seeds < 2:
            return "inconclusive"
        if self.lower > -self.margin and self.upper < self.margin:
            return "holds"
        return "fails" if self.lower > self.margin or self.upper < -self.margin else "inconclusive"

    def gain(self, before: Sequence[float] = (), after: Sequence[float] = ()) -> tuple[Word, str]:
        """Whether something errs less than what it is to improve on, whose error is the `higher`: the word of `verdict`, and no
        reason. Where no gain is shown, and none is to be had, the word is "not tested", and the reason says why.

        `higher` may be below `margin`, where no gain can reach that. `before` and `after`: training errors of a network and of
        a deeper one, one a seed. Where the one fits every training image, and the other all but `MARGIN` percent, depth, which
        is to help by fitting them better, cannot. So the paper takes 1202 layers' higher test error, at the training error of
        110, for overfitting (§4.2). A deeper network that does not fit them has degraded.
        """
        if self.verdict == "holds":
            return "holds", ""
        if len(before) > 0 and not any(before) and len(after) > 0 and _mean(after) < MARGIN:
            worse = ", though the deeper certainly errs more" if self.reversed else ""
            return "not tested", (
                "the shallower network fits every training image, and the deeper nearly all, so that a gain cannot be refuted "
                f"here{worse}"
            )
        if self.seeds > 1 and self.higher < self.margin and not self.reversed:
            return "not tested", (
                f"the error to improve on is {self.higher:.2f} {self.unit}: a gain of {self.margin:g} is impossible, and its "
                "absence refutes nothing"
            )
        return self.verdict, ""

    def __str__(self) -> str:
        return self.said()

    def said(self, *, p: bool = True) -> str:
        """The comparison in words. `p`: whether to say the p-value, which is that of a difference above 0; another claim has
        no use for it."""
        digits = self._decimals
        difference = f"difference {self.difference:+.{digits}f} {self.unit}"
        if self.seeds < 2:
            return f"{difference}, n = {self.seeds}: one seed has no spread to judge by"
        if self.paired:
            test, n = "paired t", f"{self.seeds} pairs"
        elif None in self.n:
            test, n = "t", f"{self.seeds} seeds against a constant"
        else:
            test, n = "Welch", f"{self.n[0]} and {self.n[1]} seeds"
        if self.lower == self.upper:
            return f"{difference}, the same at every seed, n = {n}"
        tested = f", {test} test p = {self.p:.2g}" if p else ""
        limits = f"{self.lower:+.{digits}f} and {self.upper:+.{digits}f}"
        return f"{difference}, one-sided 95 % limits {limits}{tested}, n = {n}"

    @property
    def _decimals(self) -> int:
        """Decimals to print: two for errors, as in the paper; elsewhere as many as give the largest figure three digits."""
        largest = max(abs(each) for each in (self.difference, self.lower, self.upper) if math.isfinite(each))
        return 2 if self.unit == "points" or largest == 0 else max(0, 2 - math.floor(math.log10(largest)))


def compare(
    higher: Sequence[float] | float,
    lower: Sequence[float] | float,
    *,
    margin: float = MARGIN,
    unit: str = "points",
    paired: bool = False,
) -> Comparison:
    """Is the mean of `higher` above that of `lower`? One value a seed, in percent unless `margin` and `unit` say else.

    A bare number on one side is a constant: the test is then that of one sample. `paired`: the sides have what stands in both
    in common (the same weights, say), seed by seed; the test is then that of their differences.
    """
    from scipy import stats

    higher, lower = _values(higher), _values(lower)
    n = tuple(len(side) if isinstance(side, list) else None for side in (higher, lower))
    if n == (None, None) or 0 in n:
        raise UsageError("compare needs one value a seed on either side, or on one side a constant")
    if paired and (None in n or n[0] != n[1]):
        raise UsageError("compare needs as many values on either side where they are paired")
    sides = [side if isinstance(side, list) else [side] for side in (higher, lower)]
    means = [_mean(side) for side in sides]
    # Equal figures have means that may differ in their last digit: a difference of that size is none.
    none = 1e-12 * max(abs(value) for side in sides for value in side)
    if paired:
        sides = [[one - other for one, other in zip(*sides, strict=True)]]
    difference = means[0] - means[1] if abs(means[0] - means[1]) > none else 0.0

    def found(lower: float, upper: float, p: float) -> Comparison:
        return Comparison(difference, lower, upper, p, n, margin, unit, paired, means[0])

    if min(count for count in n if count is not None) < 2:
        return found(-math.inf, math.inf, math.nan)
    # Welch's test, from its formula since scipy's warns where all seeds of one side agree, which errors of 0 % do.
    sides = [side for side in sides if len(side) > 1]  # a constant has no spread
    parts = [_std(side) ** 2 / len(side) for side in sides]
    error = math.sqrt(sum(parts))
    if error <= none:  # the same figure at every seed on both sides: there is nothing to test
        return found(difference, difference, 0.0 if difference > 0 else 1.0)
    freedom = error**4 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, sides, strict=True))
    # Each limit is that of a one-sided 95 % interval, so that each of the two verdicts errs at most 5 % of the time.
    reach = float(stats.t.ppf(1 - LEVEL, freedom)) * error
    p = float(stats.t.sf(difference / error, freedom))
    return found(difference - reach, difference + reach, p)


def _values(side: Sequence[float] | float) -> list[float] | float:
    """A list of numbers, from any sequence, or one number."""
    try:
        values = [float(value) for value in side] if isinstance(side, Iterable) else float(side)
    except (TypeError, ValueError):
        values = math.nan
    if not all(map(math.isfinite, values if isinstance(values, list) else [values])):
        raise UsageError(f"compare needs finite numbers, one a seed, not {short(side)}")
    return values


# -- the rules in words, as reports state them -----------------------------------------------------------------------

NO_GAIN_LEFT = "Where the error to improve on is below the margin, a gain that is not shown is not tested."
"""What `Comparison.gain` adds to the rule of order."""
NO_GAIN_FROM_DEPTH = (
    "A gain from depth that is not shown is not tested in two cases: the error to improve on is below the margin, or the "
    f"shallower network fits every training image, and the deeper all but {MARGIN} percent."
)
"""The same for a gain from depth."""


def rule_of_order(test: str = "one-sided Welch test over seeds") -> str:
    """The rule of `Comparison.verdict` in words. `test` decides."""
    return (
        f"A claim of order holds if a {test} has p < {LEVEL}; it fails if the same test at the same level excludes a difference "
        f"of the margin or more, {MARGIN} points unless another is named here; else it is inconclusive. Level and margin were "
        "fixed beforehand."
    )


# -- verdicts of several parts, and on networks that have not learned ------------------------------------------------


def all_of(words: Iterable[Word]) -> Word:
    """The verdict on a claim of several parts: it holds if every part does, and fails if one fails. Without a part that
    was tested it is "not tested"."""
    parts = set(words)
    if "fails" in parts:
        return "fails"
    return "holds" if parts == {"holds"} else "inconclusive" if parts - {"not tested"} else "not tested"


def one_depth(*claims: Claim) -> list[Verdict]:
    """Verdicts on claims that compare depths, where there is but one."""
    return [Verdict(claim, "not tested", "one depth only", "two depths are needed to compare") for claim in claims]


def if_learned(verdict: Verdict, *training: Sequence[float], absent: Word = "fails", opposite: bool = False) -> Verdict:
    """The verdict, but "inconclusive" where no difference was seen and none of the networks has learned: such networks do not
    differ in anything.

    `training`: the training errors of each network, one a seed. `absent`: the word by which the verdict says that there is no
    difference. `opposite`: whether there certainly is one, the other way round; the verdict then stays.
    """
    best = min(map(_mean, training))
    if verdict.verdict != absent or opposite or best <= LEARNED:
        return verdict
    why = f"none of these networks has learned (training error {best:.1f} % at best): that they do not differ says nothing"
    return replace(verdict, verdict="inconclusive", evidence=f"{why}. {verdict.evidence}")


# -- figures over seeds ----------------------------------------------------------------------------------------------


def band(values: Sequence[float]) -> float:
    """How far the mean of `values` over seeds may be from the paper's number, in points, to count as the same: `MARGIN`,
    or twice their standard deviation if that is more."""
    return max(MARGIN, 2 * _std(values)) if len(values) > 1 else MARGIN


def from_paper(values: Sequence[float], paper: float) -> str:
    """How far the mean of `values` over seeds is from the paper's number, and whether that is within `band`:
    "+0.12, within ±0.50"."""
    distance, allowed = _mean(values) - paper, band(values)
    return f"{round(distance, 2) + 0.0:+.2f}, {'within' if abs(distance) <= allowed else 'beyond'} ±{allowed:.2f}"


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """ "6.61 ± 0.16", or the bare figure where there is one value only."""
    if not len(values):
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{_mean(values):.{digits}f} ± {_std(values):.{digits}f}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    """Standard deviation of a sample: with n − 1."""
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
