"""Trends and laws against SciPy's rank correlation and normal equations, on numbers drawn at random."""

import math

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from scipy import stats as oracle

from precision_lab.runner.claims import Claim

CLAIM = TypeAdapter(Claim)
AT = [10, 20, 40, 80, 160, 320]
SEEDS = (0, 1, 2)


def judged(claim, value):
    """Returns the verdict on a claim whose terms have the values of a function of (term, seed)."""
    return CLAIM.validate_python({"metric": "eval/loss", **claim}).judge(value, SEEDS)


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("seed", range(5))
def test_a_trend_is_scipys_spearman_on_the_worst_seed(seed, direction):
    """Ties included; just below the least correlation of all seeds it holds, just above it does not."""
    columns = np.random.default_rng(seed).integers(0, 4, (len(AT), len(SEEDS))).astype(float)
    sign = 1 if direction == "increasing" else -1
    expected = [sign * oracle.spearmanr(AT, column).statistic for column in columns.T]

    def verdict(least):
        claim = {"kind": "trend", "a": "x", "at": AT, "value": least, "direction": direction}
        return judged(claim, lambda term, seed: columns[AT.index(term.at), seed])

    assert verdict(min(expected) - 1e-6).verdict == "reproduced"
    assert verdict(min(expected) + 1e-6).verdict == "not_reproduced"
    np.testing.assert_allclose(verdict(0.0).numbers["rank correlation"], expected, atol=1e-12)


def test_a_trend_that_stands_still_on_one_seed_is_undecided():
    claim = {"kind": "trend", "a": "x", "at": AT, "value": 0.5}

    found = judged(claim, lambda term, seed: 1.0 if seed == 1 else float(term.at))

    assert found.verdict == "inconclusive"
    assert "does not move at all on some seed" in found.because


def test_steps_of_a_trend_are_different_steps():
    with pytest.raises(ValidationError, match="at must be rising steps"):
        CLAIM.validate_python({"kind": "trend", "metric": "loss", "a": "x", "at": [1, 2, 2], "value": 0.5})


def law(r2, **more):
    """Returns the claim of a law in step and bits; at least 9 numbers each seed."""
    points = [{"arm": "x", "metric": f"m{bits}", "steps": AT[:3], "where": {"bits": bits}} for bits in (2, 3, 5)]
    return {"kind": "log_fit", "points": points, "powers": ["step"], "exponentials": ["bits"], "r2": r2, **more}


@pytest.mark.parametrize("seed", range(5))
def test_a_law_explains_what_the_normal_equations_do(seed):
    numbers = np.exp(np.random.default_rng(seed).normal(size=(3, 3, len(SEEDS))))
    bits, step, _ = np.meshgrid([2, 3, 5], np.log(AT[:3]), SEEDS, indexing="ij")
    rows, y = np.stack([np.ones(27), step.ravel(), bits.ravel()], 1), np.log(numbers).ravel()
    fitted = rows @ np.linalg.solve(rows.T @ rows, rows.T @ y)
    expected = 1 - np.sum((y - fitted) ** 2) / np.sum((y - y.mean()) ** 2)

    def value(term, seed):
        return numbers[(2, 3, 5).index(int(term.metric[1:])), AT.index(term.at), seed]

    assert judged(law(expected * 0.999), value).verdict == "reproduced"
    assert judged(law(expected * 1.001), value).verdict == "not_reproduced"


def test_a_law_whose_variables_move_together_is_undecided():
    points = [{"arm": f"x{n}", "where": {"bits": n, "twice": 2.0 * n}} for n in range(1, 6)]
    claim = {"kind": "log_fit", "points": points, "exponentials": ["bits", "twice"], "r2": 0.5}

    found = judged(claim, lambda term, seed: math.exp(int(term.arm[1:])))

    assert found.verdict == "inconclusive"
    assert "do not tell the variables apart" in found.because
