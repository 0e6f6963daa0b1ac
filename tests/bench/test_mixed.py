"""The mixed-precision benchmark: its arms train the same model from the same start, each in the formats that it claims.

No time is asserted.
"""

import collections
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from precision_lab.bench import mixed, report
from precision_lab.bench.arms import PROBLEMS, SMALL, arms
from precision_lab.bench.interleaved import Timing, time_alternating
from precision_lab.cli import bench
from tests.jaxprs import result_of

FLOAT32 = ("float32", "policy float32", "observed every step", "observed when=, looking", "observed when=, not looking")
BFLOAT16 = ("policy bfloat16_mixed", "policy bfloat16_autocast", "jmp bfloat16", "Flax dtype=bfloat16")
PRODUCTS = ("dot_general", "conv_general_dilated")


@pytest.fixture(scope="module", params=["stand-ins", pytest.param("compiled", marks=pytest.mark.slow)])
def result(request):
    """The benchmark as it is, and with calls that do nothing in the place of compiled steps."""
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "stand-ins":
            patched.setattr(mixed, "call_of", lambda arm: lambda: time.sleep(1e-4))
            patched.setattr(mixed, "compiled_anew", lambda traced: time.sleep(1e-4))
            patched.setattr(mixed, "traced_anew", lambda arm: time.sleep(1e-4))
        jax.config.update("jax_disable_most_optimizations", True)  # no time is asserted, and compiling takes half of it
        try:
            yield mixed.run(model="transformer", rounds=3, budget_s=0.01, small=True)
        finally:
            jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def instant(monkeypatch):
    """Leaves of the benchmark all but compiling and training."""
    timing = Timing("tracing policy float32", median_s=1.0, ratio=1.5, low=1.4, high=1.6)
    monkeypatch.setattr(mixed, "call_of", lambda arm: lambda: time.sleep(1e-4))
    monkeypatch.setattr(mixed, "arms", lambda problem: {name: lambda: None for name in arms(problem)})
    prepared = {(timing.name, "tracing float32"): timing}
    monkeypatch.setattr(mixed, "_preparations", lambda problem, tell: tell("", 2) or prepared)


def equations(jaxpr):
    """Yields every equation, wherever it is nested."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(getattr(inner, "jaxpr", inner))


def traced(arm):
    return list(equations(jax.make_jaxpr(arm.step)(arm.state, arm.batch).jaxpr))


def traced_products(arm):
    """Returns the dtypes of the operands of every product."""
    return [{str(x.aval.dtype) for x in eqn.invars[:2]} for eqn in traced(arm) if eqn.primitive.name in PRODUCTS]


@pytest.mark.parametrize("model", SMALL)
def test_float32_arms_have_the_loss_and_the_parameters_of_the_plain_step_bit_for_bit(model):
    made = {name: arms(SMALL[model])[name]() for name in ("float32", "policy float32", "observed every step")}

    after = {name: result_of(arm.step, arm.state, arm.batch) for name, arm in made.items()}

    state, loss, _ = after.pop("float32")
    for name, (other, other_loss, _) in after.items():
        assert loss.tobytes() == other_loss.tobytes(), name
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_arms_multiply_in_float32(model, name):
    found = traced_products(arms(SMALL[model])[name]())

    assert len(found) > 6
    assert all(operands == {"float32"} for operands in found)


@pytest.mark.parametrize("model", SMALL)
def test_the_policy_float32_adds_no_operation_to_the_step(model):
    """The same work for the device, which is all that a policy that changes nothing may cost after compilation."""
    plain, rewritten = (arms(SMALL[model])[name]() for name in ("float32", "policy float32"))

    before, after = ([eqn.primitive.name for eqn in traced(arm)] for arm in (plain, rewritten))

    assert collections.Counter(after) == collections.Counter(before)


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_arms_multiply_in_bfloat16_forward_and_backward(model, name):
    """Else a peer that falls back to float32 would be beaten for that; see `arms._with_jmp`."""
    found = traced_products(arms(SMALL[model])[name]())

    assert len(found) > 6
    assert all(operands == {"bfloat16"} for operands in found)


@pytest.mark.parametrize("name", [*FLOAT32, *BFLOAT16])
def test_arms_store_float32_parameters_and_return_a_state_like_the_one_they_got(name):
    arm = arms(SMALL["convnet"])[name]()

    after, loss, _ = jax.eval_shape(arm.step, arm.state, arm.batch)

    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (after, arm.state))
    assert shapes[0] == shapes[1]
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_the_arm_with_master_weights_stores_bfloat16_multiplies_in_float32_and_starts_from_the_float32_numbers():
    plain, arm = (arms(SMALL["transformer"])[name]() for name in ("float32", "loss scaling + master weights"))

    found = traced_products(arm)

    assert all(operands == {"float32"} for operands in found)
    assert {x.dtype for x in jax.tree.leaves(arm.state.params)} == {jnp.dtype("bfloat16")}
    masters = jax.tree.leaves(arm.state.opt_state.inner.master)
    for master, param in zip(masters, jax.tree.leaves(plain.state.params), strict=True):
        np.testing.assert_array_equal(np.asarray(master), np.asarray(param))


@pytest.mark.parametrize(("looks", "expected"), [("looking", True), ("not looking", False)])
def test_the_arms_with_when_look_or_not_as_they_say(looks, expected):
    arm = arms(SMALL["convnet"])[f"observed when=, {looks}"]()

    seen = jax.jit(arm.step)(arm.state, arm.batch)[2]

    assert {reading.count > 0 for _, reading in seen} == {expected}


def test_every_comparison_is_in_the_result_and_every_target_is_of_one(result):
    found = {(row["name"], row["against"]) for row in result["rows"]}

    assert set(mixed.TARGETS) <= found
    assert {(name, against) for against, names in mixed.GROUPS.items() for name in (against, *names)} <= found
    assert all(row["ratio"] > 0 and row["model"] == "transformer" for row in result["rows"])


def test_ratios_to_peers_follow_from_those_to_float32(result):
    ratios = {(row["name"], row["against"]): row["ratio"] for row in result["rows"]}

    for peer in ("jmp bfloat16", "Flax dtype=bfloat16"):
        expected = ratios["policy bfloat16_mixed", "float32"] / ratios[peer, "float32"]
        assert ratios["policy bfloat16_mixed", peer] == pytest.approx(expected, rel=1e-3)
    looking, not_looking = (ratios[f"observed when=, {how}", "policy float32"] for how in ("looking", "not looking"))
    expected = 0.02 * looking + 0.98 * not_looking
    assert ratios["observed every 50 steps by when=", "policy float32"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("instant")
def test_work_is_told_as_much_as_was_announced():
    told = []

    mixed.run(model="both", rounds=4, small=True, tell=lambda message, units: told.append(units))

    assert sum(told) == mixed.work("both", 4)


@pytest.mark.parametrize(
    ("model", "platform", "units", "expected"),
    [
        ("transformer", "cpu", ["amx_bf16", "avx512_bf16"], {"target": 0.45, "needs": ""}),
        ("transformer", "cpu", ["avx512_bf16"], {"target": 0.45, "needs": "AMX"}),
        ("transformer", "gpu", [], {"target": 0.45, "needs": "a CPU"}),
        ("convnet", "cpu", ["amx_bf16"], {"target": None}),
    ],
)
def test_targets_for_bfloat16_are_judged_with_amx_only(model, platform, units, expected):
    env = {"platform": platform, "bfloat16_units": units}

    assert mixed._target("policy bfloat16_mixed", "float32", model, env) == expected


def test_a_target_that_does_not_apply_is_neither_met_nor_missed():
    fast = Timing("a", median_s=0.25, ratio=0.25, low=0.2, high=0.3)
    rows = [report.row(fast, 0.45, needs="AMX"), report.row(fast, 0.45), report.row(fast, 0.2)]
    result = {"versions": {}, "device": "x", "cores": 1, "python": "3", "command": "c", "rows": rows}

    page = report.markdown(result, title="t", lead="l", unit="ratio")

    assert [row["met"] for row in rows] == [None, True, False]
    assert page.splitlines()[-3:] == [
        "| a | 0.25 | 0.20 - 0.30 | 250.000 | <= 0.45 (needs AMX) |",
        "| a | 0.25 | 0.20 - 0.30 | 250.000 | <= 0.45 |",
        "| a | 0.25 | 0.20 - 0.30 | 250.000 | <= 0.2 (missed) |",
    ]


def test_alternating_calls_stand_between_two_of_the_baseline():
    order = []

    timing = time_alternating("b", lambda: order.append("a"), lambda: order.append("b"), rounds=3)

    assert "".join(order) == "ab" + "abababa"
    assert timing.name == "b"
    with pytest.raises(ValueError, match="rounds must be at least 3, got 2"):
        time_alternating("b", lambda: None, lambda: None, rounds=2)


def test_the_default_transformer_is_that_of_the_notes():
    config, spec, batch = PROBLEMS["transformer"]

    assert (config.width, config.heads, config.depth, spec.input_shape, batch) == (512, 8, 2, (128,), 16)


@pytest.mark.usefixtures("instant")
def test_the_command_prints_what_it_writes(tmp_path):
    app = typer.Typer()
    bench.register(app)
    app.callback()(lambda: None)

    options = ["bench", "mixed", "--rounds", "3", "--small", "--json", "--write", str(tmp_path)]
    result = CliRunner().invoke(app, options)

    assert result.exit_code == 0, result.output
    data, page = sorted(tmp_path.iterdir())
    printed = json.loads(result.stdout)
    assert printed == json.loads(data.read_text())
    assert {row["model"] for row in printed["rows"]} == {"transformer", "convnet"}
    assert "| policy bfloat16_mixed | convnet | jmp bfloat16 |" in page.read_text()
    assert f"Units for bfloat16: {', '.join(printed['bfloat16_units']) or 'none'}." in page.read_text()
    assert "`precision-lab bench mixed --model both --rounds 3 --small --write DIRECTORY`" in page.read_text()


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="model must be one of transformer, convnet, both; got 'mlp'"):
        mixed.run(model="mlp", small=True)
