import math

import pytest
from pydantic import TypeAdapter, ValidationError

from precision_lab.runner.claims import Claim, Diverged

CLAIM = TypeAdapter(Claim)
SEEDS = (0, 1, 2)


def judge(claim, numbers, seeds=SEEDS):
    """Returns the verdict on a claim when each arm reached these numbers, seed by seed."""
    claim = CLAIM.validate_python({"metric": "eval/loss", **claim})

    def value(arm, seed, metric, reduce):
        assert (metric, reduce) == ("eval/loss", claim.reduce)
        return numbers[arm][seed]

    return claim.judge(value, seeds)


GT = {"kind": "gt", "a": "x", "b": "y", "margin": 0.5}
CLOSE = {"kind": "close", "a": "x", "b": "y", "margin": 0.5}
EQUAL = {"kind": "equal", "a": "x", "b": "y"}
ABOVE = {"kind": "above", "a": "x", "value": 1.0}
BELOW = {"kind": "below", "a": "x", "value": 1.0}
RISES = {"kind": "monotone", "arms": ["x", "y", "z"]}
Y = [0.0, 10.0, 20.0]  # Seeds differ far more than arms, as they do in earnest.

CASES = [
    (GT, {"x": [0.6, 10.6, 20.6], "y": Y}, "reproduced"),
    (GT, {"x": [0.4, 10.4, 20.4], "y": Y}, "not_reproduced"),
    (GT, {"x": [0.5, 10.5, 20.5], "y": Y}, "not_reproduced"),  # the margin itself is not enough
    (GT, {"x": [9.0, 19.0, 19.9], "y": Y}, "not_reproduced"),  # large on average, negative on one seed
    (GT, {"x": [9.0, 19.0, 20.0], "y": Y}, "not_reproduced"),  # zero on one seed
    (GT, {"x": [-0.6, 9.4, 19.4], "y": Y}, "not_reproduced"),  # the wrong way round
    (CLOSE, {"x": [0.5, 10.5, 20.5], "y": Y}, "reproduced"),  # the margin itself is close
    (CLOSE, {"x": [0.75, 10.75, 20.75], "y": Y}, "not_reproduced"),
    (CLOSE, {"x": [-0.75, 9.25, 19.25], "y": Y}, "not_reproduced"),
    (CLOSE, {"x": [5.0, 5.0, 20.0], "y": Y}, "reproduced"),  # it speaks of the mean
    (EQUAL, {"x": Y, "y": Y}, "reproduced"),
    (EQUAL, {"x": [0.0, 10.0, math.nextafter(20.0, 21.0)], "y": Y}, "not_reproduced"),
    ({**EQUAL, "tol": 1.0}, {"x": [1.0, 9.0, 20.0], "y": Y}, "reproduced"),
    ({**EQUAL, "tol": 1.0}, {"x": [1.5, 9.0, 20.0], "y": Y}, "not_reproduced"),
    (ABOVE, {"x": [1.1, 5.0, 9.0]}, "reproduced"),
    (ABOVE, {"x": [1.0, 5.0, 9.0]}, "not_reproduced"),
    (BELOW, {"x": [0.9, 0.0, -9.0]}, "reproduced"),
    (BELOW, {"x": [0.9, 0.0, 1.0]}, "not_reproduced"),
    (RISES, {"x": [1.0] * 3, "y": [1.0] * 3, "z": [2.0] * 3}, "reproduced"),  # standing still is allowed
    (RISES, {"x": [1.0] * 3, "y": [0.9] * 3, "z": [2.0] * 3}, "not_reproduced"),
    ({**RISES, "tol": 0.2}, {"x": [1.0] * 3, "y": [0.9] * 3, "z": [2.0] * 3}, "reproduced"),
    ({**RISES, "direction": "decreasing"}, {"x": [3.0] * 3, "y": [2.0] * 3, "z": [2.0] * 3}, "reproduced"),
    ({**RISES, "direction": "decreasing"}, {"x": [1.0] * 3, "y": [2.0] * 3, "z": [0.0] * 3}, "not_reproduced"),
]


@pytest.mark.parametrize(("claim", "numbers", "verdict"), CASES)
def test_claims_are_judged_as_the_grammar_says(claim, numbers, verdict):
    assert judge(claim, numbers).verdict == verdict


@pytest.mark.parametrize("claim", [GT, CLOSE, EQUAL, ABOVE, BELOW, RISES], ids=lambda claim: claim["kind"])
@pytest.mark.parametrize("bad", ["diverged at step 7", "not run", math.nan, math.inf, -math.inf])
def test_a_run_without_a_finite_number_is_inconclusive_never_a_pass(claim, bad):
    numbers = {"x": [5.0, bad, 5.0], "y": [0.0] * 3, "z": [9.0] * 3}

    verdict = judge(claim, numbers)

    assert verdict.verdict == "inconclusive"
    assert "x, seed 1: " in verdict.because
    assert str(bad) in verdict.because


@pytest.mark.parametrize("claim", [GT, CLOSE, EQUAL, ABOVE, BELOW, RISES], ids=lambda claim: claim["kind"])
def test_a_verdict_carries_its_numbers_and_a_sentence(claim):
    verdict = judge(claim, {"x": [1.0, 2.0, 3.0], "y": [1.0, 1.5, 2.5], "z": [4.0, 5.0, 6.0]})

    assert verdict.numbers["x"] == [1.0, 2.0, 3.0]
    assert verdict.seeds == SEEDS
    assert "x" in verdict.say
    assert "eval/loss" in verdict.say


def test_pairing_sees_through_a_spread_over_seeds_that_hides_the_means():
    verdict = judge({**GT, "margin": 0.05}, {"x": [0.1, 10.1, 20.1], "y": Y})

    assert verdict.verdict == "reproduced"
    assert verdict.numbers["x - y"] == pytest.approx([0.1, 0.1, 0.1])


def test_the_author_says_it_in_his_own_words():
    assert judge({**GT, "say": "worse", "paper": "80 %"}, {"x": Y, "y": Y}).say == "worse"
    assert judge({**GT, "say": "worse", "paper": "80 %"}, {"x": Y, "y": Y}).paper == "80 %"


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({**GT, "b": "x"}, "a and b are the same arm, 'x'"),
        ({**GT, "margin": -1}, "greater than or equal to 0"),
        ({**GT, "margin": math.nan}, "finite number"),
        ({**GT, "margn": 1}, "Extra inputs"),
        ({**RISES, "arms": ["x"]}, "at least 2"),
        ({**RISES, "arms": ["x", "y", "x"]}, "arms names 'x' twice"),
        ({**GT, "reduce": "median"}, "'last', 'mean', 'max' or 'min'"),
        ({**GT, "kind": "greater"}, "'gt', 'close'"),
        ({"kind": "close", "a": "x", "b": "y"}, "Field required"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(claim, message):
    with pytest.raises(ValidationError, match=message):
        CLAIM.validate_python({"metric": "eval/loss", **claim})


@pytest.mark.parametrize("claim", [CLOSE, {"kind": "equal", "a": "x", "b": "y"}])
@pytest.mark.parametrize("diverged", ["x", "y"])
def test_an_arm_that_diverged_is_not_close_to_one_that_did_not(claim, diverged):
    numbers = {arm: [Diverged("diverged at step 7") if arm == diverged else 1.0] for arm in ("x", "y")}

    verdict = judge(claim, numbers, seeds=[0])

    assert verdict.verdict == "not_reproduced"
    assert "diverged at step 7, while" in verdict.because


@pytest.mark.parametrize("other", [Diverged("diverged at step 9"), "failed: KeyError"])
def test_where_no_arm_ended_with_a_number_closeness_is_undecided(other):
    assert judge(CLOSE, {"x": [Diverged("diverged at step 7")], "y": [other]}, seeds=[0]).verdict == "inconclusive"


def test_closeness_on_average_shows_the_largest_difference():
    because = judge(CLOSE, {"x": [5.0, 5.0, 20.0], "y": Y}).because

    assert because == "difference +0 on average, allowed 0.5, largest 5"
