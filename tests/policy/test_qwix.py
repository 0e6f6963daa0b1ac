"""Qwix read: its rules as policies, its arrays as QTensors; against Qwix itself where it is installed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.policy.qwix import from_qwix
from precision_lab.quant.qwix import qtensor_of_qarray, qwix_quantizer

RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The fields of `qwix.QuantizationRule`."""

    module_path: str = ".*"
    op_names: Any = ()
    weight_qtype: Any = None
    act_qtype: Any = None
    tile_size: Any = None
    act_static_scale: Any = None
    weight_calibration_method: str = "absmax"
    act_calibration_method: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Rule):
    """Some of those of `qwix.QtRule`."""

    bwd_qtype: Any = None
    disable_channelwise_axes: bool = False


@dataclasses.dataclass
class Array:
    """The fields of `qwix.QArray`."""

    qvalue: Any
    scale: Any
    zero_point: Any
    qtype: Any


def qwix():
    return pytest.importorskip("qwix", reason="Qwix is no dependency")


def test_check_1_the_scale_of_qwix_is_that_of_half_a_step_more():
    """That is 1 / 127.5 = .00784314, where the ends lie on ties: -127.5 is -128 or -127, 127.5 saturates at 127."""
    stored = pl.quantize(jnp.asarray([-1, -0.5, 0, 0.5, 1], jnp.float32), qwix_quantizer("int8", shared="tensor"))

    assert float(stored.scale[0]) == pytest.approx(0.00784314, abs=5e-9)
    assert np.abs(np.asarray(stored.integers[1:]) - [-64, 0, 64, 127]).max() == 0
    assert int(stored.integers[0]) in (-127, -128)


def test_the_first_rule_that_matches_is_the_one_that_counts():
    rules = [
        Rule(module_path="head"),
        Rule(module_path=".*/attention/.*", weight_qtype="int4", tile_size=32),
        Rule(module_path="blocks.*", weight_qtype=jnp.int8, act_qtype="int8", act_calibration_method="minmax,0.9"),
        Rule(weight_qtype="nf4", weight_calibration_method="absmax,0.8"),
        Rule(module_path="never", weight_qtype="nothing"),
    ]

    policy = from_qwix(rules)

    assert str(policy) == str(
        pl.Policy.parse("weight=nf4@channel,clip=0.8")
        .with_rule("blocks**", weight="int8@channel,full_clipped", activation="int8@token,affine,clip=0.9",
                   attention="int8@token,affine,clip=0.9", backward=None)
        .with_rule("**?/attention/**", weight="int4@group32,full_clipped", activation=None, attention=None,
                   backward=None)
        .with_rule("head/*", weight=None, activation=None, attention=None, backward=None)
    )  # fmt: skip
    assert pl.Policy.parse(str(policy)) == policy


def test_rules_of_training_multiply_what_was_not_quantized_backward():
    whole = from_qwix(Training(weight_qtype="int8", act_qtype="int8", op_names=("dot_general",)))
    by_tensor = from_qwix([Training(weight_qtype="int8", act_qtype="float8_e4m3fn", disable_channelwise_axes=True)])

    expected = "weight=int8@channel,full_clipped,activation=int8@token,full_clipped,attention=none,backward=original"
    assert whole == pl.Policy.parse(f"float32;**:dot_general*:{expected}")
    assert str(by_tensor.weight) == "int8,full_clipped"
    assert str(by_tensor.activation) == str(by_tensor.attention) == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("path", "takes", "leaves"),
    [
        (".*", ["mlp/up/kernel", "kernel"], []),
        ("mlp/up", ["mlp/up/kernel"], ["mlp/up/x/kernel", "mlp/up2/kernel", "a/mlp/up/kernel"]),
        (".*up", ["mlp/up/kernel", "up/kernel"], ["mlp/up/x/kernel", "mlp/upper/kernel"]),
        (".*/up", ["mlp/up/kernel", "a/b/up/kernel"], ["up/kernel"]),
        ("a/.*/up", ["a/b/up/kernel", "a/b/c/up/kernel"], ["a/up/kernel"]),
        (".*att.*", ["x/attention/q/kernel", "x/attention"], ["mlp/kernel"]),
        ("(a|b/c)", ["a/kernel", "b/c/kernel"], ["b/kernel"]),
        (r"v1\.0/x-y", ["v1.0/x-y/kernel"], ["v100/x-y/kernel"]),
    ],
)
def test_a_module_path_becomes_a_glob_of_the_same_sites(path, takes, leaves):
    policy = from_qwix([Rule(module_path=path, weight_qtype="int8", op_names=("dot_general", "conv_general_dilated"))])

    def is_matched(name):
        return any(rule.matches(name) for rule in policy.rules)

    assert all(map(is_matched, takes))
    assert not any(map(is_matched, leaves))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(module_path=r"layers_\d+", weight_qtype="int8"), "between whole paths are read, not"),
        (
            Rule(op_names=("ragged_dot",), weight_qtype="int8"),
            "only dot_general, einsum, conv_.* are read",
        ),
        (Rule(op_names=("einsum",), weight_qtype="int8"), "einsums are dot_general here"),
        (Rule(weight_qtype="int8", act_qtype="int8", act_static_scale=True), "static scales by pl.calibrate"),
        (Rule(weight_qtype="int8", tile_size=0.25), "tile_size=0.25 must be a number of elements"),
        (Training(weight_qtype="int8", bwd_qtype="int8"), "bwd_qtype='int8' has no equal here.*say gradient="),
        (Rule(weight_qtype="mxfp8"), "scales of their own rules"),
        (Rule(weight_qtype="int1"), "is all zeros"),
        (Rule(weight_qtype="uint8"), "unsigned types clip"),
        (Rule(weight_qtype="int8", weight_calibration_method="rms,7"), "'rms,7' has no twin here"),
        (Rule(weight_qtype="nf4", weight_calibration_method="minmax"), "'nf4' has no 'minmax'; int4 and int8 do"),
    ],
)
def test_what_has_no_equal_is_refused_with_the_way_out(rule, message):
    with pytest.raises(ValueError, match=message):
        from_qwix([rule])


def test_an_array_worked_by_hand():
    """Codes (in, out) in tiles of 2 along the first axis, affine: (code - zero point) * scale."""
    array = Array(
        jnp.asarray([[3, -8], [-4, 7], [1, 0], [0, 5]], jnp.int4),
        jnp.asarray([[0.5, 2], [1, 0.25]], jnp.float32),
        jnp.asarray([[1, -2], [0, 7]], jnp.int4),
        jnp.int4,
    )

    stored = qtensor_of_qarray(array)

    np.testing.assert_array_equal(stored.dequantize(), [[1, -12], [-2.5, 18], [1, -1.75], [0, -0.5]])
    assert str(stored.quantizer) == "int4@group2,affine"
    assert (stored.axis, stored.nbytes) == ((0,), 4 + 16 + 2)
    with pytest.raises(ValueError, match=r"scales \(2, 1\) of an array \(4, 2\) share axes \(0, 1\) in tiles"):
        qtensor_of_qarray(dataclasses.replace(array, scale=jnp.ones((2, 1)), zero_point=None))


TYPES = ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "nf4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]


WAYS = [(qtype, method) for qtype in TYPES for method in ("absmax", "absmax,0.7")]
WAYS += [("int4", "minmax"), ("int8", "minmax")]  # Qwix has it for no other type.


@pytest.mark.parametrize(("qtype", "method"), WAYS)
@pytest.mark.parametrize("shared", ["tensor", "channel", "group50"])
def test_check_1_values_are_those_of_qwix(qtype, method, shared):
    """1e5 normal numbers: max diff 0, but where XLA's division, a product with the reciprocal, has another last place.

    Told to multiply by the reciprocal too, we differ nowhere; under "minmax" Qwix adds the zero point before it rounds.
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 100)).astype(np.float32))
    axes = {"tensor": {}, "channel": {"channelwise_axes": (1,)}}.get(
        shared, {"channelwise_axes": (1,), "tiled_axes": {0: 50}}
    )
    array = qwix().quantize(x, qtype, calibration_method=method, **axes)
    theirs = np.asarray(qwix().dequantize(array))
    given = {"scale": array.scale} | ({"zero_point": array.zero_point} if method == "minmax" else {})
    spec = qwix_quantizer(qtype, method, shared)

    ours = np.asarray(pl.quantize(x, spec, axis=0, **given).dequantize())

    differing = ours != theirs
    spread = np.repeat(np.asarray(array.scale), 1000 // len(array.scale), 0)
    quotient = np.float32(np.asarray(x, np.float64) / spread)  # rounded correctly: 53 bits are enough for both steps
    product = np.asarray(x) * (np.float32(1) / spread)
    if method != "minmax":
        assert not np.any(differing & (quotient == product))
        by_reciprocal = pl.quantize(x, dataclasses.replace(spec, reciprocal=True), axis=0, **given)
        np.testing.assert_array_equal(by_reciprocal.dequantize(), theirs)
    between = (ours.astype(np.float64) + theirs)[differing] / 2
    np.testing.assert_allclose(between, np.asarray(x)[differing], rtol=2.0**-20, atol=2.0**-20)
    assert np.mean(differing) < 0.004
    own = pl.quantize(x, spec, axis=0)
    np.testing.assert_allclose(own.scale, array.scale, rtol=2.0**-22)
    if method == "minmax":
        assert np.abs(np.asarray(own.zero_point) - np.asarray(array.zero_point, np.float32)).max() <= 1
    read = qtensor_of_qarray(array)
    np.testing.assert_array_equal(read.dequantize(), theirs)
    assert read.quantizer.granularity == own.quantizer.granularity


def with_positive_ends(x, axis):
    """Returns an array whose largest magnitudes are positive, as negative ones are a tie between two codes."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis, keepdims=True), axis)
    return jnp.asarray(x * np.sign(largest), jnp.float32)


@pytest.mark.parametrize("rule", [{"act_qtype": "int8"}, {}, {"tile_size": 16}], ids=str)
def test_a_model_computes_what_qwix_makes_of_it(rule):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(8, name="head")(linen.relu(linen.Dense(32, name="up")(x)))

    x = with_positive_ends(RNG.normal(size=(5, 16)), 1)
    variables = jax.tree.map(lambda w: with_positive_ends(w, 0), Net().init(jax.random.key(0), x))
    rules = [qwix().QuantizationRule(module_path="up", weight_qtype="int4", **rule)]
    rules += [qwix().QuantizationRule(weight_qtype="int8", **rule)]

    theirs = qwix().quantize_model(Net(), qwix().QtProvider(rules)).apply(variables, x)
    ours = pl.apply_policy(Net(), from_qwix(rules)).apply(variables, x)

    apart, effect = np.linalg.norm(ours - theirs), np.linalg.norm(theirs - Net().apply(variables, x))
    assert apart < 0.05 * effect  # a tie or two
    assert effect > 0.01


def test_gradients_are_those_of_qwix():
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    model.kernel[...] = with_positive_ends(np.asarray(model.kernel[...]), 0)
    x = with_positive_ends(RNG.normal(size=(5, 16)), 1)
    rule = qwix().QtRule(weight_qtype="int4", act_qtype="int8")

    def gradient(of):
        return nnx.grad(lambda model: jnp.sum(model(x) ** 2))(of).kernel[...]

    theirs = gradient(qwix().quantize_model(model, qwix().QtProvider([rule]), x))
    ours = gradient(pl.apply_policy(model, from_qwix(rule)))

    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - gradient(model)).max() > 0.01


def test_an_unmodified_model_runs_under_rules_that_were_read():
    """Without Qwix: the policy is one like any other."""
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    x = jnp.asarray(RNG.normal(size=(5, 16)).astype(np.float32))

    out = pl.apply_policy(model, from_qwix(Rule(weight_qtype="int4")))(x)

    kernel = pl.fake_quantize(model.kernel[...], "int4@channel,full_clipped", axis=0)
    np.testing.assert_allclose(out, x @ kernel + model.bias[...], rtol=1e-5, atol=1e-5)
