"""Claims of the paper and verdicts on them: what was measured, how sure it is, and what would have said otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from resprobe.errors import UsageError, not_accepted, short

Word = Literal["holds", "fails", "inconclusive", "not tested"]
VERDICTS = ("holds", "fails", "inconclusive", "not tested")
LEVEL = 0.05
"""Of the one-sided tests."""
MARGIN = 0.5
"""Points of error below which a difference does not count as an effect. Fixed before any run."""
FITTED = (
    "the shallower network fits every training image, and the deeper nearly all, so that a gain cannot be refuted here"
)
"""Evidence where `Comparison.gain` is "not tested"."""


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
    """What the measurements say of a claim: `measured` the figures, `evidence` the test that decided."""

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
    where one side is a constant).

    `verdict` says whether `higher` is indeed higher: it holds if the lower limit is above 0; it fails if the upper
    limit is below `margin`, which excludes any effect that matters; else it is inconclusive. Without a spread on
    either side (fewer than two seeds) nothing can be said. `n` has the seeds of both sides, None for a constant.
    """

    difference: float
    lower: float
    upper: float
    p: float
    n: tuple[int | None, int | None]
    margin: float = MARGIN
    unit: str = "points"

    @property
    def seeds(self) -> int:
        """Of the side that has fewer."""
        return min(count for count in self.n if count is not None)

    @property
    def verdict(self) -> Word:
        if self.seeds < 2:
            return "inconclusive"
        if self.lower > 0:
            return "holds"
        return "fails" if self.upper < self.margin else "inconclusive"

    @property
    def exceeds(self) -> Word:
        """Whether `higher` is above by more than `margin`, where less would not be what the claim speaks of."""
        if self.seeds < 2:
            return "inconclusive"
        if self.lower > self.margin:
            return "holds"
        return "fails" if self.upper < self.margin else "inconclusive"

    @property
    def similar(self) -> Word:
        """Whether both are the same but for `margin`: it holds if a larger difference is excluded in both directions,
        and fails if that is not so and there is certainly a difference, in either."""
        if self.seeds < 2:
            return "inconclusive"
        if self.lower > -self.margin and self.upper < self.margin:
            return "holds"
        return "fails" if self.lower > 0 or self.upper < 0 else "inconclusive"

    def gain(self, shallow: Sequence[float], deep: Sequence[float]) -> Word:
        """Whether a deeper network gained accuracy, where `higher` is the error of the shallower one.

        `shallow` and `deep`: their training errors, one a seed. Where the shallower network fits every training image, and the
        deeper all but `MARGIN` percent, a gain that is not shown is "not tested": depth is to help by fitting them better, and
        they are fitted. So the paper takes 1202 layers' higher test error, at the training error of 110, for overfitting
        (§4.2). A deeper network that does not fit them has degraded.
        """
        fitted = len(shallow) > 0 and not any(shallow) and len(deep) > 0 and _mean(deep) < MARGIN
        return "not tested" if fitted and self.verdict != "holds" else self.verdict

    def __str__(self) -> str:
        digits = self._decimals
        difference = f"difference {self.difference:+.{digits}f} {self.unit}"
        if self.seeds < 2:
            return f"{difference}, n = {self.seeds}: one seed has no spread to judge by"
        against = " and ".join("a constant" if count is None else f"{count}" for count in self.n)
        if self.lower == self.upper:
            return f"{difference}, the same at every seed, n = {against} seeds"
        return (
            f"{difference}, 95 % limits {self.lower:+.{digits}f} and {self.upper:+.{digits}f}, "
            f"one-sided {'t' if None in self.n else 'Welch'} test p = {self.p:.2g}, n = {against} seeds"
        )

    @property
    def _decimals(self) -> int:
        """Two for errors, as the paper prints them; elsewhere so many that the largest figure has three digits."""
        largest = max(abs(each) for each in (self.difference, self.lower, self.upper) if math.isfinite(each))
        return 2 if self.unit == "points" or largest == 0 else max(0, 2 - math.floor(math.log10(largest)))


def compare(
    higher: Sequence[float] | float, lower: Sequence[float] | float, *, margin: float = MARGIN, unit: str = "points"
) -> Comparison:
    """Is the mean of `higher` above that of `lower`? One value a seed, in percent unless `margin` and `unit` say else.

    A bare number on one side is a constant: the test is then that of one sample.
    """
    from scipy import stats

    higher, lower = _values(higher), _values(lower)
    n = tuple(len(side) if isinstance(side, list) else None for side in (higher, lower))
    if n == (None, None) or 0 in n:
        raise UsageError("compare needs one value a seed on either side, or on one side a constant")
    higher, lower = (side if isinstance(side, list) else [side] * 2 for side in (higher, lower))
    difference = _mean(higher) - _mean(lower)
    if min(count for count in n if count is not None) < 2:
        return Comparison(difference, -math.inf, math.inf, math.nan, n, margin, unit)
    # Welch's test, from its formula since scipy's warns where all seeds of one side agree, which errors of 0 % do.
    parts = [_std(values) ** 2 / len(values) for values in (higher, lower)]
    error = math.sqrt(sum(parts))
    if error == 0:  # the same figure at every seed on both sides: there is nothing to test
        return Comparison(difference, difference, difference, 0.0 if difference > 0 else 1.0, n, margin, unit)
    freedom = error**4 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (higher, lower), strict=True))
    # Each limit is that of a one-sided 95 % interval, so that each of the two verdicts errs at most 5 % of the time.
    reach = float(stats.t.ppf(1 - LEVEL, freedom)) * error
    p = float(stats.t.sf(difference / error, freedom))
    return Comparison(difference, difference - reach, difference + reach, p, n, margin, unit)


def _values(side: Sequence[float] | float) -> list[float] | float:
    """A list of numbers, of an array or a column too, or one number."""
    try:
        values = [float(value) for value in side] if isinstance(side, Iterable) else float(side)
    except (TypeError, ValueError):
        values = math.nan
    if not all(map(math.isfinite, values if isinstance(values, list) else [values])):
        raise UsageError(f"compare needs finite numbers, one a seed, not {short(side)}")
    return values


def all_of(words: Iterable[Word]) -> Word:
    """The verdict on a claim of several parts: it holds if every part does, and fails if one fails. Without a part that
    was tested it is "not tested"."""
    parts = set(words)
    if "fails" in parts:
        return "fails"
    return "holds" if parts == {"holds"} else "inconclusive" if parts - {"not tested"} else "not tested"


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
    """Of a sample: with n − 1."""
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
