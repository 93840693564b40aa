"""How far a number measured on a test split can be trusted: intervals, and tests of differences.

All of it is about *which images were drawn* for the test split, with the models as they are: that
another seed would train another model comes on top, and only several seeds show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.functional import one_hot

from distill.metrics._shared import check_count
from distill.metrics.calibration import _bin_index

LEVEL, RESAMPLES = 0.95, 1000
BLOCK_ELEMENTS = 1 << 20  # of the weights that are held at a time: 8 MB
Statistic = Callable[[Tensor], Tensor]  # weights [R, N], each row a data set → values [R]


class Interval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Interval for a probability of which `successes` of `trials` are seen.

    `(p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n)`, with `p = successes/trials`: all
    probabilities under which a normal test would not reject what was seen. It never leaves [0, 1]
    and has a width where all or none succeed.

    Args:
        successes: from 0 to `trials`.
        trials: at least 1.
        level: how often such intervals hold the probability.

    Returns:
        Its ends in [0, 1].

    Raises:
        ValueError: If a count or the level is out of range.

    Example:
        >>> low, high = wilson_interval(10, 10)
        >>> round(low, 4), high
        (0.7225, 1.0)

    Reference: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    check_count(trials, "trials")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie in 0 … {trials}, not {successes}.")
    z, share = _normal_quantile(level), successes / trials
    centre = share + z**2 / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = ((centre + sign * half) / (1 + z**2 / trials) for sign in (-1, 1))
    # At the ends the formula is exact, its rounding is not.
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == trials else high)


def paired_interval(
    only_first: int, only_second: int, trials: int, level: float = LEVEL
) -> Interval:
    """Interval for the difference of two probabilities that were seen on the same trials.

    With `p = (only_first + 1)/(n + 2)`, `q = (only_second + 1)/(n + 2)`: `p − q ± z·sqrt((p + q −
    (p − q)²)/(n + 2))`. Trials on which both succeed or both fail say nothing of the difference
    but their number. Unlike a bootstrap it has a width where the two never differ.

    Args:
        only_first: trials on which the first succeeds and the second does not.
        only_second: the other way round.
        trials: all of them, n.
        level: how often such intervals hold the difference.

    Returns:
        Its ends in [−1, 1], first less second.

    Raises:
        ValueError: If a count or the level is out of range.

    Example:
        >>> low, high = paired_interval(8, 2, 100)
        >>> round(low, 3), round(high, 3)
        (-0.007, 0.124)

    Reference: Bonett and Price, Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data, 2012.
    """
    _check_discordant(only_first, only_second)
    if trials < max(1, only_first + only_second):
        raise ValueError(f"{only_first} + {only_second} of {trials} trials are too many.")
    first, second = ((count + 1) / (trials + 2) for count in (only_first, only_second))
    difference = first - second
    spread = math.sqrt((first + second - difference**2) / (trials + 2))
    half = _normal_quantile(level) * spread
    return Interval(max(difference - half, -1.0), min(difference + half, 1.0))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact p-value of two models being right equally often, seen on the same examples.

    `min(1, 2·P(X ≤ min(b, c)))` with `X ~ Binomial(b + c, 1/2)`, b and c the examples on which one
    alone is right.

    Args:
        only_first: b.
        only_second: c.

    Returns:
        A probability; 1 where the two are never right apart.

    Raises:
        ValueError: If a count is below zero.

    Example:
        >>> mcnemar_p(1, 7), mcnemar_p(0, 0)
        (0.0703125, 1.0)

    Reference: McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions
    or Percentages, 1947.
    """
    _check_discordant(only_first, only_second)
    differ, fewer = only_first + only_second, min(only_first, only_second)
    if differ < 1000:
        return min(1.0, 2 * sum(math.comb(differ, k) for k in range(fewer + 1)) / 2**differ)
    k = torch.arange(fewer + 1, dtype=torch.float64)  # as logarithms, or they would be huge
    ways = math.lgamma(differ + 1) - torch.lgamma(k + 1) - torch.lgamma(differ - k + 1)
    return min(1.0, 2 * float((ways - differ * math.log(2)).logsumexp(0).exp()))


def balanced_interval(
    successes: Sequence[int], trials: Sequence[int], level: float = LEVEL
) -> Interval:
    """Interval for the mean of the probabilities of K classes, each with trials of its own.

    `mean(x_k/n_k) ± z·sqrt(Σ_k p_k(1 − p_k)/n_k)/K` with `p_k = (x_k + z²/2K)/(n_k + z²/K)`: the
    z²/2 successes and failures that Agresti and Coull add for the variance are spread over the
    classes, so that it has a width where all succeed. Of recalls it is one for balanced accuracy.

    Args:
        successes: x_k.
        trials: n_k, at least 1.
        level: how often such intervals hold the mean.

    Returns:
        Its ends in [0, 1].

    Raises:
        ValueError: If counts or the level are out of range.

    Example:
        >>> low, high = balanced_interval([40, 3], [40, 6])
        >>> round(low, 3), round(high, 3)
        (0.549, 0.951)

    Reference: Agresti and Coull, Approximate Is Better than “Exact” for Interval Estimation of
    Binomial Proportions, 1998.
    """
    check_count(len(trials), "the number of classes")
    for hits, count in zip(successes, trials, strict=True):
        wilson_interval(hits, count, level)  # refuses what is out of range
    added = _normal_quantile(level) ** 2 / 2 / len(trials)
    means, variances = [], []
    for hits, count in zip(successes, trials, strict=True):
        share = (hits + added) / (count + 2 * added)
        means.append(hits / count)
        variances.append(share * (1 - share) / count)
    return _about(means, variances, level, 0.0)


def balanced_paired_interval(
    only_first: Sequence[int],
    only_second: Sequence[int],
    trials: Sequence[int],
    level: float = LEVEL,
) -> Interval:
    """Interval for the difference of two balanced accuracies on the same examples.

    As `balanced_interval`, with the differences and variances of `paired_interval`, of which the
    added trials are spread over the K classes.

    Args:
        only_first: of each class, trials on which the first alone succeeds.
        only_second: the other way round.
        trials: all of each class, at least 1.
        level: how often such intervals hold the difference.

    Returns:
        Its ends in [−1, 1], first less second.

    Raises:
        ValueError: If counts or the level are out of range.
    """
    check_count(len(trials), "the number of classes")
    added = 1 / len(trials)
    means, variances = [], []
    for first, second, count in zip(only_first, only_second, trials, strict=True):
        paired_interval(first, second, count, level)  # refuses what is out of range
        one, two = ((alone + added) / (count + 2 * added) for alone in (first, second))
        means.append((first - second) / count)
        variances.append((one + two - (one - two) ** 2) / count)
    return _about(means, variances, level, -1.0)


def _about(
    means: Sequence[float], variances: Sequence[float], level: float, least: float
) -> Interval:
    mean = math.fsum(means) / len(means)
    half = _normal_quantile(level) * math.sqrt(math.fsum(variances)) / len(means)
    return Interval(max(mean - half, least), min(mean + half, 1.0))


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Interval for the mean that values, such as those of several seeds, are drawn about.

    Student's `mean ± t·s/sqrt(n)`, with n − 1 degrees of freedom.

    Args:
        values: n of them.
        level: how often such intervals hold the mean.

    Returns:
        Its ends, or None of fewer than two values.

    Raises:
        ValueError: If the level is not between 0 and 1.

    Example:
        >>> low, high = mean_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)

    Reference: Student, The Probable Error of a Mean, 1908.
    """
    _check_level(level)
    if len(values) < 2:
        return None
    mean, spread = fmean(values), stdev(values) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * spread
    return Interval(mean - half, mean + half)


def bootstrap(
    statistics: Mapping[str, Statistic], examples: int, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Tensor]:
    """Values of statistics on data sets that are drawn with replacement from the one there is.

    All statistics see the same draws, so that differences of two are those of paired data.

    Args:
        statistics: name → what gives the values `[R]` of R data sets from their weights `[R, N]`:
            how often each example is in each of them.
        examples: N.
        resamples: how many data sets are drawn.
        seed: of the draws.

    Returns:
        Name → float64 values `[resamples]`.

    Raises:
        ValueError: If a count is below 1.

    Reference: Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.
    """
    check_count(examples, "examples")
    check_count(resamples, "resamples")
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in statistics}
    size = max(1, BLOCK_ELEMENTS // examples)
    for start in range(0, resamples, size):
        weights = _weights(examples, min(size, resamples - start), generator)
        for name, statistic in statistics.items():
            parts[name].append(statistic(weights))
    return {name: torch.cat(values) for name, values in parts.items()}


def bootstrap_interval(
    estimate: float, resampled: Tensor, examples: int, level: float = LEVEL
) -> Interval | None:
    """Interval around an estimate, from its values on resampled data.

    `estimate + sqrt(n/(n − 1))·(q − mean)`, q the quantiles `(1 ∓ level)/2` of the resampled
    values. They are taken about their own mean: a statistic such as ECE, which noise can only
    raise, is larger on resampled data, and plain quantiles might not even hold the estimate.

    Args:
        estimate: the value on the data themselves.
        resampled: its values on resampled data `[R]`.
        examples: n.
        level: how often such intervals hold what is estimated.

    Returns:
        Its ends, or None where nothing can be resampled: of one example, or of what is undefined.

    Raises:
        ValueError: If the level is not between 0 and 1.
    """
    _check_level(level)
    finite = resampled[resampled.isfinite()]
    if examples < 2 or not len(finite) or not math.isfinite(estimate):
        return None
    spread = math.sqrt(examples / (examples - 1)) * (finite - finite.mean())
    tail = (1 - level) / 2
    low, high = spread.quantile(torch.tensor([tail, 1 - tail], dtype=spread.dtype)).tolist()
    return Interval(estimate + low, estimate + high)


def mean_statistic(values: Tensor) -> Statistic:
    """Return the mean of values `[N]`, of resampled data."""
    wide = values.detach().double()
    return lambda weights: weights @ wide / len(wide)


def calibration_statistic(confidence: Tensor, correct: Tensor, bins: int = 15) -> Statistic:
    """Return the expected calibration error, of resampled data.

    Args:
        confidence: of the answers, in [0, 1], `[N]`.
        correct: whether they are right, `[N]`.
        bins: of equal width, as in `expected_calibration_error`.
    """
    gaps = correct.detach().double() - confidence.detach().double()
    cell = _bin_index(confidence.detach().double(), bins)
    by_bin = gaps[:, None] * one_hot(cell, bins)
    return lambda weights: (weights @ by_bin).abs().sum(dim=1) / len(gaps)


def _weights(examples: int, resamples: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(examples, (resamples, examples), generator=generator)
    place = drawn + examples * torch.arange(resamples)[:, None]
    counts = torch.bincount(place.flatten(), minlength=resamples * examples)
    return counts.view(resamples, examples).double()


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}.")


def _normal_quantile(level: float) -> float:
    _check_level(level)
    return NormalDist().inv_cdf((1 + level) / 2)


def _check_discordant(only_first: int, only_second: int) -> None:
    check_count(only_first, "only_first", least=0)
    check_count(only_second, "only_second", least=0)
