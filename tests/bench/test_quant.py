"""The quantization benchmark: each arm multiplies in the formats that it claims, ours and the peers' alike.

No time is asserted. Peers are tested where they are installed.
"""

import importlib.util
import json
import math
import time

import jax
import numpy as np
import pytest
import typer
from flax import nnx
from typer.testing import CliRunner

from precision_lab.bench import quant, quant_arms, quant_sweep
from precision_lab.bench.arms import compiled_anew, traced_anew
from precision_lab.bench.interleaved import Timing
from precision_lab.bench.quant_arms import PROBLEMS, SMALL, inference, steps
from precision_lab.cli import bench
from precision_lab.nn import apply_policy
from precision_lab.rewrite import is_qtensor
from tests.jaxprs import products

F32, BF16, INT8 = ("float32",) * 3, ("bfloat16", "bfloat16", "float32"), ("int8", "int8", "int32")
LINEARS = {"mlp": 2, "transformer": 7}
QWIX = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="Qwix is not installed")
AQT = pytest.mark.skipif(importlib.util.find_spec("aqt") is None, reason="AQT is not installed")


def products_of(arm):
    return products(arm.step, arm.state, arm.batch)


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("float32", F32, F32),
        ("W8A8 simulated", F32, F32),
        ("W8A8 native", INT8, BF16),
        ("W8A8 native, float32 backward", INT8, F32),
        ("W4A8 native", INT8, BF16),
        ("W4A16", BF16, BF16),
        pytest.param("Qwix W8A8", INT8, F32, marks=QWIX),
        pytest.param("Qwix W4A8", ("int8", "int4", "int32"), F32, marks=QWIX),
        pytest.param("AQT W8A8", INT8, F32, marks=AQT),
    ],
)
def test_every_linear_layer_multiplies_as_its_arm_says_forward_and_backward(model, name, forward, backward):
    """Else a peer that reaches nothing would be beaten, or beat us, for that."""
    found = products_of(steps(SMALL[model])[name]())

    if forward != backward:
        assert found.count(forward) == LINEARS[model]
    assert found.count(backward) >= LINEARS[model]
    assert set(found) <= {forward, backward, F32}


def test_arms_start_from_the_same_parameters_and_quantize_them_little():
    made = {name: make() for name, make in steps(SMALL["mlp"]).items()}

    losses = {name: float(jax.jit(arm.step)(arm.state, arm.batch)[1]) for name, arm in made.items()}

    plain = losses.pop("float32")
    assert {name for name, loss in losses.items() if not abs(loss - plain) < 0.2} == set()
    assert all(loss != plain for loss in losses.values())


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize(
    ("name", "product"),
    [("float32 inference", F32), ("inference int8 dynamic", INT8), ("inference int8 static", INT8)]
    + [(f"inference {weights} weights", BF16) for weights in ("int4", "NF4")],
)
def test_inference_multiplies_as_its_arm_says_and_gives_the_state_back(model, name, product):
    arm = inference(SMALL[model])[name]()

    assert products_of(arm).count(product) >= LINEARS[model]
    state, logits, _ = jax.jit(arm.step)(arm.state, arm.batch)
    assert logits.shape[-1] == SMALL[model].spec.num_classes
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(arm.state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("name", quant_arms.INFERENCE)
def test_models_for_inference_store_their_linear_weights_packed(model, name):
    """Of a weight-only or int8 arm that packs nothing the time would be that of quantizing at every call."""
    bits = 4 if "4" in name else 8
    arm = inference(SMALL[model])[f"inference {name}"]()

    packed = [leaf for leaf in jax.tree.leaves(arm.state.params, is_leaf=is_qtensor) if is_qtensor(leaf)]

    assert len(packed) == LINEARS[model]
    for stored in packed:
        assert stored.packed.size == -(-math.prod(stored.shape) * bits // 8)


def test_static_scales_are_a_part_of_what_is_stored():
    arms = {name: inference(SMALL["mlp"])[f"inference int8 {name}"]() for name in ("static", "dynamic")}

    scalars = {name: sum(leaf.ndim == 0 for leaf in jax.tree.leaves(arm.state.params)) for name, arm in arms.items()}

    assert scalars == {"static": LINEARS["mlp"], "dynamic": 0}


def test_groups_divide_every_width():
    """784 is 16 times 49; else the tiles of Qwix, which must divide, and our groups would differ."""
    sizes = {
        (model, weights): quant_arms.group_size(PROBLEMS[model], weights)
        for model in PROBLEMS
        for weights in ("int4", "NF4")
    }

    assert sizes == {("mlp", "int4"): 16, ("mlp", "NF4"): 16, ("transformer", "int4"): 32, ("transformer", "NF4"): 64}


@QWIX
@pytest.mark.parametrize("model", SMALL)
def test_qwix_stores_codes_for_inference(model):
    arm = inference(SMALL[model])["Qwix inference int4 weights"]()

    stored = [leaf.dtype.name for leaf in jax.tree.leaves(nnx.to_pure_dict(arm.state.params))]

    assert stored.count("int4") == LINEARS[model]


@pytest.mark.parametrize("model", SMALL)
def test_check_24_a_sweep_of_seven_widths_is_one_program_whose_losses_are_those_of_each_width(model, monkeypatch):
    """Bit for bit, also for the width that the other arm has in its policy."""
    arms = {name: make() for name, make in quant_sweep.sweeps(SMALL[model]).items()}
    one, seven = arms[quant_sweep.ONE], arms[quant_sweep.SEVEN]
    step, traces = jax.jit(seven.step), []
    monkeypatch.setattr(quant_sweep, "apply_policy", lambda *args, **kw: traces.append(1) or apply_policy(*args, **kw))

    losses = [float(step(seven.state, quant_sweep.with_width(seven.batch, b))[1]) for b in quant_sweep.WIDTHS]

    assert len(traces) == step._cache_size() == 1
    assert losses[quant_sweep.WIDTHS.index(4)] == float(jax.jit(one.step)(one.state, one.batch)[1])
    assert len(set(losses)) == 7


def test_a_compilation_that_is_timed_is_one():
    """JAX keeps lowered and compiled programs, so that a second `lower().compile()` took a tenth of a millisecond."""
    compiled = []
    traced = traced_anew(steps(SMALL["mlp"])["float32"]())
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))

    for _ in range(2):
        compiled_anew(traced)

    assert sum("backend_compile" in event for event in compiled) == 2


@pytest.fixture
def instant(monkeypatch):
    """Leaves of the benchmark all but compiling and training."""

    def prepared(problem, tell):
        names = quant._prepared_names(problem)
        tell("", 2 * len(names))
        return {
            (f"{what} {name}", f"{what} float32"): Timing(f"{what} {name}", 1.0, 1.5, 1.4, 1.6)
            for name in names
            for what in ("tracing", "compiling")
        }

    monkeypatch.setattr(quant, "call_of", lambda arm: lambda: time.sleep(1e-4))
    monkeypatch.setattr(quant, "steps", lambda problem: {name: lambda: None for name in steps(problem)})
    monkeypatch.setattr(quant, "inference", lambda problem: {name: lambda: None for name in inference(problem)})
    monkeypatch.setattr(quant, "_prepared", prepared)
    monkeypatch.setattr(quant, "sweeps", lambda problem: {name: lambda: None for name in quant_sweep.sweeps(problem)})
    sweep = {quant_sweep.PREPARED: Timing(quant_sweep.PREPARED[0], 1.0, 1.1, 1.0, 1.2)}
    monkeypatch.setattr(quant_sweep, "prepared", lambda problem: sweep)


@pytest.mark.usefixtures("instant")
def test_every_target_is_of_a_row_unless_it_names_a_peer_that_is_absent():
    told = []

    result = quant.run(rounds=3, small=True, tell=lambda message, units: told.append(units))

    found = {(row["name"], row["against"], row["model"]) for row in result["rows"]}
    assert {row for row in set(quant.TARGETS) - found if row[1].split()[0] not in ("Qwix", "AQT")} == set()
    assert sum(told) == quant.work("both", 3)


@pytest.mark.usefixtures("instant")
def test_ratios_to_peers_follow_from_those_to_float32():
    timings = {name: Timing(name, 1.0, ratio, ratio, ratio) for name, ratio in (("W4A16", 0.6), ("Qwix W4A16", 1.2))}

    rows = quant._against_peers({(name, "float32"): timing for name, timing in timings.items()})

    assert rows == {("W4A16", "Qwix W4A16"): 0.5}


@pytest.mark.parametrize(
    ("row", "units", "expected"),
    [
        (("W8A8 simulated", "float32", "mlp"), [], {"target": 1.10, "needs": ""}),
        (("W8A8 native", "float32", "transformer"), ["avx512_bf16"], {"target": 0.70, "needs": "AMX"}),
        (("W8A8 native", "float32", "mlp"), ["amx_bf16"], {"target": 0.60, "needs": ""}),
    ],
)
def test_what_supposes_amx_is_judged_with_amx_only(row, units, expected):
    env = {"platform": "cpu", "bfloat16_units": units}

    assert quant.judged(quant.TARGETS[row], env) == expected


def test_the_workloads_are_those_of_the_notes():
    mlp, transformer = PROBLEMS["mlp"], PROBLEMS["transformer"]

    assert (mlp.spec.input_shape, mlp.config.hidden, mlp.spec.num_classes, mlp.batch) == ((784,), (1024, 1024), 10, 256)
    config = transformer.config
    assert (config.width, config.depth, config.heads) == (256, 4, 4)
    assert (transformer.spec.input_shape, transformer.spec.num_classes, transformer.batch) == ((128,), 256, 16)


@pytest.mark.usefixtures("instant")
def test_the_command_prints_what_it_writes(tmp_path):
    app = typer.Typer()
    bench.register(app)
    app.callback()(lambda: None)

    options = ["bench", "quant", "--rounds", "3", "--small", "--json", "--write", str(tmp_path)]
    result = CliRunner().invoke(app, options)

    assert result.exit_code == 0, result.output
    data, page = sorted(tmp_path.iterdir())
    assert json.loads(result.stdout) == json.loads(data.read_text())
    assert "| W8A8 native | mlp | float32 |" in page.read_text()
    assert "`precision-lab bench quant --model both --rounds 3 --small --write DIRECTORY`" in page.read_text()


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="model must be one of mlp, transformer, both; got 'convnet'"):
        quant.run(model="convnet", small=True)
