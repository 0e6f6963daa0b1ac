import math

import pytest
from pydantic import TypeAdapter, ValidationError

from precision_lab import runner
from precision_lab.runner.claim import Diverged
from precision_lab.runner.claims import Claim

CLAIM = TypeAdapter(Claim)
SEEDS = (0, 1, 2)


def judge(claim, numbers, seeds=SEEDS):
    """Returns the verdict on a claim when each arm reached these numbers, seed by seed."""
    claim = CLAIM.validate_python({"metric": "eval/loss", **claim})

    def value(term, seed):
        assert (term.metric, term.reduce, term.at) == ("eval/loss", claim.reduce, None)
        return numbers[term.arm][seed]

    return claim.judge(value, seeds)


GT = {"kind": "gt", "a": "x", "b": "y", "margin": 0.5}
CLOSE = {"kind": "close", "a": "x", "b": "y", "margin": 0.5}
EQUAL = {"kind": "equal", "a": "x", "b": "y"}
ABOVE = {"kind": "above", "a": "x", "value": 1.0}
BELOW = {"kind": "below", "a": "x", "value": 1.0}
RATIO = {"kind": "ratio", "a": "x", "b": "y", "reference": "z", "factor": 0.5}
RISES = {"kind": "monotone", "arms": ["x", "y", "z"]}
Y = [0.0, 10.0, 20.0]  # Seeds differ far more than arms, as they do in earnest.

LAW = {
    "kind": "log_fit", "powers": ["step"], "exponentials": ["bits"], "r2": 0.9, "rising": ["step"], "falling": ["bits"],
    "points": [
        {"arm": "x", "metric": f"eval_{b}/loss", "less": {"arm": "x"}, "steps": [10, 20, 40], "where": {"bits": b}}
        for b in (3, 4, 5)
    ],
}  # fmt: skip

POINT = {"arm": "x", "steps": [10, 20], "where": {"bits": 3}}
TREND = {"kind": "trend", "a": "x", "at": [1, 2, 3], "value": 0.9}
FAILS = {"kind": "fails", "a": "x", "value": 10.0}

CASES = [
    (FAILS, {"x": [math.nan, math.inf, 10.5]}, "reproduced"),
    (FAILS, {"x": [Diverged("diverged at step 3"), 1e30, math.nan]}, "reproduced"),
    (FAILS, {"x": [math.nan, -math.inf, 10.5]}, "reproduced"),
    (FAILS, {"x": [math.nan, 10.0, 11.0]}, "not_reproduced"),  # the value itself is no failure
    (FAILS, {"x": [math.nan, -1e30, 11.0]}, "not_reproduced"),
    (FAILS, {"x": [math.nan, "failed: a crash", 11.0]}, "inconclusive"),
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
    ({**EQUAL, "tol": 1.0}, {"x": [0.0, 8.5, 20.0], "y": Y}, "not_reproduced"),
    (RATIO, {"x": [1.4, 11.4, 21.6], "y": [2.0, 12.0, 22.0], "z": [1.0, 11.0, 21.0]}, "reproduced"),
    (RATIO, {"x": [1.5, 11.5, 21.5], "y": [2.0, 12.0, 22.0], "z": [1.0, 11.0, 21.0]}, "not_reproduced"),
    (RATIO, {"x": [0.0] * 3, "y": [1.0] * 3, "z": [1.0] * 3}, "inconclusive"),  # half of nothing
    ({**RATIO, "reference": None}, {"x": [4.0] * 3, "y": [9.0] * 3}, "reproduced"),
    ({**RATIO, "reference": None}, {"x": [5.0] * 3, "y": [9.0] * 3}, "not_reproduced"),
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


@pytest.mark.parametrize("claim", [GT, CLOSE, EQUAL, RATIO, ABOVE, BELOW, RISES], ids=lambda claim: claim["kind"])
@pytest.mark.parametrize("bad", ["diverged at step 7", "not run", math.nan, math.inf, -math.inf])
def test_a_run_without_a_finite_number_is_inconclusive_never_a_pass(claim, bad):
    numbers = {"x": [5.0, bad, 5.0], "y": [0.0] * 3, "z": [9.0] * 3}

    verdict = judge(claim, numbers)

    assert verdict.verdict == "inconclusive"
    assert "x, seed 1: " in verdict.because
    assert str(bad) in verdict.because


@pytest.mark.parametrize("claim", [GT, CLOSE, EQUAL, RATIO, ABOVE, BELOW, RISES], ids=lambda claim: claim["kind"])
def test_a_verdict_carries_its_numbers_and_a_sentence(claim):
    verdict = judge(claim, {"x": [1.0, 2.0, 3.0], "y": [1.0, 1.5, 2.5], "z": [4.0, 5.0, 6.0]})

    assert verdict.numbers["x"] == [1.0, 2.0, 3.0]
    assert verdict.seeds == SEEDS
    assert "x" in verdict.say
    assert "eval/loss" in verdict.say


@pytest.mark.parametrize(
    "claim", [GT, CLOSE, EQUAL, RATIO, ABOVE, BELOW, RISES, FAILS], ids=lambda claim: claim["kind"]
)
def test_without_seeds_nothing_is_decided(claim):
    verdict = judge(claim, {}, seeds=())

    assert verdict.verdict == "inconclusive"
    assert "no seed was run" in verdict.because


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
        ({**GT, "metric": ""}, "metric\n.*Field required"),
        ({**GT, "a": {"arm": "x", "reduce": "max", "at": 3}}, "reduce and at exclude each other"),
        ({**GT, "a": {"arm": "x"}, "b": {"arm": "x"}}, "a and b are the same term"),
        ({"kind": "trend", "a": "x", "at": [1, 2], "value": 0.9}, "at least 3"),
        ({"kind": "trend", "a": "x", "at": [1, 3, 2], "value": 0.9}, "at must be rising steps"),
        ({**TREND, "at": [-1, 2, 3]}, "greater than or equal to 0"),
        ({**TREND, "reduce": "max"}, "leave out reduce"),
        ({**TREND, "a": {"arm": "x", "at": 3}}, "leave out reduce and their at"),
        ({**TREND, "reference": {"arm": "y", "reduce": "min"}}, "leave out reduce"),
        ({**LAW, "points": [{**POINT, "at": 3}] * 3}, "leave out reduce and at"),
        ({**LAW, "points": [{**POINT, "less": {"arm": "y", "reduce": "max"}}] * 3}, "leave out reduce and at"),
        ({**LAW, "points": [{**POINT, "where": {"bits": 3, "step": 5}}] * 3}, "leave out one of them"),
        ({**LAW, "points": [{**POINT, "steps": [0, 10]}] * 3}, "as a power must be positive"),
        ({**LAW, "rising": ["size"]}, "'size' is not among the variables step, bits"),
        ({**LAW, "powers": ["step", "step"]}, "each only once"),
        ({**LAW, "falling": ["step"]}, "'step' is in rising and in falling"),
        ({**LAW, "points": [{**POINT, "where": {"bits": math.inf}}] * 3}, "finite number"),
        (
            {**LAW, "points": [{**POINT, "steps": [10]}, POINT, {**POINT, "where": {"bits": 4}, "steps": [10]}]},
            "a law of 2 variables and a constant fits any 3 points: give it points at 4 or more",
        ),
        ({**LAW, "powers": ["step", "bits"]}, "each only once"),
        ({**LAW, "powers": ["step", "size"]}, "arm 'x' does not say what 'size' is"),
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


def judged(claim, value, seeds=SEEDS):
    """Returns the verdict on a claim whose terms have the values of a function of (term, seed)."""
    return CLAIM.validate_python({"metric": "eval/loss", **claim}).judge(value, seeds)


def test_terms_have_a_metric_a_reduction_or_a_step_of_their_own():
    def value(term, seed):
        known = {
            ("x", "eval/loss", "last", None): 1.0,
            ("x", "eval_int3/loss", "last", None): 1.5,
            ("x", "eval/loss", None, 250): 3.0,
            ("y", "eval/loss", "max", None): 9.0,
        }
        return known[term.arm, term.metric, term.reduce, term.at]

    damage = judged({"kind": "gt", "a": {"arm": "x", "metric": "eval_int3/loss"}, "b": "x", "margin": 0.4}, value)
    later = judged({"kind": "gt", "a": {"arm": "x", "at": 250}, "b": "x", "margin": 1.9}, value)
    largest = judged({"kind": "below", "a": {"arm": "y", "reduce": "max"}, "value": 9.5}, value)

    assert [one.verdict for one in (damage, later, largest)] == ["reproduced"] * 3
    assert damage.numbers["eval_int3/loss of x - x"] == [0.5] * 3
    assert damage.say == "eval_int3/loss of x exceeds eval/loss of x by more than 0.4"
    assert later.say == "eval/loss of x at step 250 exceeds eval/loss of x by more than 1.9"
    assert largest.numbers == {"max of eval/loss of y": [9.0] * 3}


@pytest.mark.parametrize(
    ("values", "least", "verdict"),
    [
        ([1.0, 2.0, 4.0, 8.0, 16.0], 1.0, "reproduced"),
        ([1.0, 2.0, 8.0, 4.0, 16.0], 0.9, "reproduced"),  # 1 - 6 * 2 / (5 * 24) = 0.9
        ([1.0, 2.0, 8.0, 4.0, 16.0], 0.91, "not_reproduced"),
        ([5.0, 4.0, 3.0, 2.0, 1.0], -0.9, "not_reproduced"),
        ([1.0] * 5, 0.0, "inconclusive"),
    ],
)
def test_a_trend_is_spearmans_correlation_with_the_step(values, least, verdict):
    at = [10, 20, 40, 80, 160]
    claim = {"kind": "trend", "a": {"arm": "x", "metric": "eval_int3/loss"}, "reference": "x", "at": at, "value": least}

    def value(term, seed):
        loss = 100.0 * seed - at.index(term.at)  # falls, as losses do; what is added to it is tested
        return loss + values[at.index(term.at)] if term.metric == "eval_int3/loss" else loss

    assert judged(claim, value).verdict == verdict


@pytest.mark.parametrize(("power", "rate", "verdict"), [
    (0.5, -0.7, "reproduced"), (-0.5, -0.7, "not_reproduced"), (0.5, 0.7, "not_reproduced"),
])  # fmt: skip
def test_a_law_is_found_again_with_its_exponents(power, rate, verdict):
    def value(term, seed):
        bits = 0 if term.metric == "eval/loss" else int(term.metric.split("_")[1].split("/")[0])
        return 2.0 + (3.0 * term.at**power * math.exp(rate * bits) if bits else 0.0)

    found = judged(LAW, value)

    assert found.verdict == verdict
    assert f"step {power:+.3g}, bits {rate:+.3g}" in found.because
    assert "R^2 1," in found.because
    assert "27 numbers" in found.because


def test_a_law_that_does_not_fit_is_not_reproduced_and_one_without_logarithm_is_undecided():
    noise = {10: 5.0, 20: 1.0, 40: 4.0}

    noisy = judged(LAW, lambda term, seed: noise[term.at] if "_" in term.metric else 0.0)
    flat = judged(LAW, lambda term, seed: 1.0)

    assert noisy.verdict == "not_reproduced"
    assert flat.verdict == "inconclusive"
    assert "x at step 10: 0 has no logarithm" in flat.because


def test_a_law_of_numbers_that_are_all_the_same_is_undecided():
    assert judged(LAW, lambda term, seed: 2.0 if "_" in term.metric else 1.0).verdict == "inconclusive"


SPARSE = {
    "name": "sparse",
    "model": {"kind": "mlp", "hidden": [4]},
    "data": {"kind": "digits", "batch": 8},
    "optim": {"kind": "sgd", "lr": 0.1},
    "train": {"steps": 100, "eval_every": 40, "log_every": 25},
    "arms": {"a": {}, "b": {"policy": "float16_mixed"}, "p": {"probe": {"kind": "dot_product", "length": 8}}},
}
AT = {"kind": "above", "value": 0}


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (
            {"kind": "trend", "a": "a", "metric": "eval/loss", "at": [0, 50, 100], "value": 0.9},
            "claims[0].at: eval/loss is not logged at step 50, but at 40 and 80; train.eval_at: [50] adds it (",
        ),
        (
            {**AT, "a": {"arm": "b", "metric": "train/loss", "at": 0}},
            "claims[0].a.at: train/loss is not logged at step 0, but at 25; train.log_every sets them (arm 'b').",
        ),
        (
            {**AT, "a": {"arm": "b", "metric": "train/loss", "at": 101}},
            "claims[0].a.at: train/loss has no step 101: the run ends at 100; --set claims=[] leaves claims out (arm",
        ),
        (
            {**AT, "a": {"arm": "p", "metric": "probe/error", "at": 0}},
            "claims[0].a.at: probe/error is logged once, at step 1, not at 0 (arm 'p').",
        ),
        (
            {
                "kind": "log_fit", "metric": "eval/loss", "powers": ["step"], "r2": 0.5,
                "points": [{"arm": "a", "steps": [40, 80]}, {"arm": "b", "steps": [100]}, {"arm": "b", "steps": [41]}],
            },
            "claims[0].points[2].steps: eval/loss is not logged at step 41, but at 40 and 80;",
        ),
    ],
)  # fmt: skip
def test_a_claim_about_a_step_that_no_run_logs_is_refused_where_it_was_written(claim, words):
    with pytest.raises(ValueError) as caught:
        runner.load({**SPARSE, "claims": [claim]})

    assert str(caught.value).startswith(words)


def test_a_claim_about_the_steps_that_runs_do_log_is_taken():
    steps = {"eval/loss": (0, 40, 80, 100), "eval_train/accuracy": (0, 40, 80, 100), "train/loss": (25, 50, 75, 100)}
    claims = [{**AT, "a": {"arm": "a", "metric": metric, "at": at}} for metric in steps for at in steps[metric]]

    assert len(runner.load({**SPARSE, "claims": claims}).claims) == 12
