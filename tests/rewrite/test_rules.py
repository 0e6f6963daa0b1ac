"""Rules whose settings cannot act where they match are refused; those of a whole policy are not."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab.policy import PRESETS, Policy
from precision_lab.rewrite import apply_to_function, sites_of_function

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
PARAMS = {"w": np.eye(16, dtype=np.float32), "v": np.eye(16, dtype=np.float32), "e": np.eye(4, 16, dtype=np.float32)}


def model(params, x):
    """A product with each of two weights, one without, a lookup, and exponentials."""
    rows = params["e"][jnp.arange(4)]
    hidden = jnp.exp((x + rows) @ params["w"]) @ params["v"]
    return hidden @ hidden.T


def run(spec):
    return apply_to_function(model, Policy.parse(spec))(PARAMS, X)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("float32;w:attention=int8@tensor", "rule 'w' sets attention=int8, which acts on none of the 1 sites"),
        ("float32;w:embedding=int8@tensor", "'w' is a product whose operands are quantized by activation= and weight="),
        ("float32;:dot_general*:weight=int8@tensor", "by attention=: say these or leave it out"),
        ("float32;*:activation=int8@token;e*:weight=int8@tensor", "'e:gather#0' is a lookup of parameters: say embed"),
        ("bfloat16_autocast;**:exp#*:weight=int8@channel", "':exp#0' is no product: say op= or round= or leave it out"),
        ("bfloat16_autocast;**:exp#*:compute=float32", "sets compute=float32, which acts on none"),
        ("bfloat16_autocast;**:exp#*:op=low,accum=float16", "sets accum=float16, which acts on none"),
        ("float32;**:exp#*:round=bfloat16,execution=simulated", "sets execution=simulated, which acts on none"),
        ("float32;**:exp#*:round=bfloat16,gradient=int8@tensor", "sets gradient=int8, which acts on none"),
        ("weight=int8@tensor;:dot_general*:wgrad=bfloat16", "sets wgrad=bfloat16, which acts on none"),
        ("weight=int8@tensor;:dot_general*:backward=original", "sets backward=original, which acts on none"),
        ("w8a8;:dot_general*:outliers=6", "sets outliers=6, which acts on none"),
        ("float32;w:outliers=6", "sets outliers=6, which acts on none"),
    ],
)
def test_a_setting_that_acts_on_none_of_the_sites_of_its_rule_is_refused(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "float32;**:weight=int8@channel,activation=int8@token,attention=int8@token,embedding=int8@channel",
        "float32;w:weight=int8@channel,attention=int8@token",  # a recipe for a part of a model, with or without any
        "w8a8;:dot_general*:weight=none,outliers=none,backward=none",
        "bfloat16_autocast;**:exp#*:op=low,compute=bfloat16",
        "gradient=int8@tensor;w:backward=requantized",
        "float32;**:dot_general#*:dgrad=bfloat16,wgrad=bfloat16",
        "float32;**:round=bfloat16,accum=float16@step4",
    ],
)
def test_a_setting_that_acts_on_some_of_the_sites_of_its_rule_is_taken(spec):
    assert run(spec).shape == (4, 4)


GRADIENT = jax.grad(lambda params, x, fn: jnp.sum(fn(params, x) ** 2))


W8A8 = "weight=int8@channel,activation=int8@token"


@pytest.mark.parametrize("said", ["backward=original", "backward=requantized", "outliers=1"])
@pytest.mark.parametrize("spec", [f"{W8A8},", f"float32;?:{W8A8},"])
def test_a_rule_may_leave_a_product_unquantized_whatever_is_said_of_how_to_quantize(spec, said):
    """It was refused as "backward=original in rule 'v' needs weight=", though that rule says nothing of backward."""
    off, key = "v:weight=none,activation=none", said.split("=")[0]
    specs = [f"{spec}{said};{off}", f"{spec}{said};{off},{key}=none"]

    found, expected = (GRADIENT(PARAMS, X, apply_to_function(model, Policy.parse(each))) for each in specs)

    for key in PARAMS:
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            f"**:{W8A8},backward=original;v:gradient=int8@tensor",
            "'v': gradient=int8 in rule 'v' quantizes all three products anew: backward can only be requantized, but "
            "there is backward=original in rule '**'; say backward= in rule 'v' too (none switches it off).",
        ),
        (
            "**:weight=int8@channel,clipped;v:backward=original",
            "'v': weight=int8@channel,clipped in rule '**': backward=original in rule 'v' goes straight through a "
            "quantizer, so that its estimator 'clipped' would have no effect; say weight= in rule 'v' too",
        ),
        (
            f"**:{W8A8},outliers=6;v:activation=none",
            "'v': outliers=6 in rule '**' excepts features from weight= and activation=, which are not both given, but "
            "activation=none in rule 'v'; say outliers= in rule 'v' too (none switches it off).",
        ),
        (
            "**:weight=int8@channel;v:outliers=6",
            "which are not both given, but activation=none; say activation= in rule 'v' too.",
        ),
    ],
)
def test_rules_that_contradict_each_other_at_a_site_are_refused_by_name(rules, message):
    """Each rule was held against the policy alone: a quantizer of gradients was passed over in silence."""
    with pytest.raises(ValueError, match=re.escape(message)):
        run(f"float32;{rules}")


def test_a_later_rule_may_say_how_what_an_earlier_one_quantizes_is_multiplied_backward():
    """It was refused, as needing a quantizer in the same rule."""
    two = Policy.parse("float32;**:weight=int8@channel;**:backward=original")
    one = Policy.parse("float32;**:weight=int8@channel,backward=original")

    found, expected = (GRADIENT(PARAMS, X, apply_to_function(model, policy)) for policy in (two, one))

    for key in PARAMS:
        np.testing.assert_array_equal(found[key], expected[key])
    with pytest.raises(ValueError, match="sets backward=original, which acts on none"):
        run("float32;**:backward=original")


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_policy_says_of_everything_needs_no_site_of_its_kind(name):
    policy = Policy.parse(f"{name},embedding=int8@channel,attention=int8@token")

    assert apply_to_function(lambda w, x: x @ w, policy)(PARAMS["w"], X).shape == (4, 16)


def test_never_leaves_a_product_alone():
    """It was refused as a rule for what cannot be cast."""
    sites = sites_of_function(model, Policy.parse("bfloat16_mixed;w:op=never"), PARAMS, (X,), {})
    run("bfloat16_mixed;w:op=never")

    assert [site.name for site in sites.untouched if site.is_product] == ["w"]


def test_an_operation_can_be_left_out_of_rounding():
    """Nothing is left for the rule to do at such a site, which is what it asks for, and not a site out of reach."""
    policy = Policy.parse("round=float8_e4m3fn;**:exp#*:round=none")

    left_out = apply_to_function(lambda w, x: jnp.exp(x * w), policy)(jnp.float32(2), X)
    rounded = apply_to_function(lambda w, x: jnp.exp(x * w), Policy.parse("round=float8_e4m3fn"))(jnp.float32(2), X)

    factor = (X * 2).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(left_out, jnp.exp(factor))
    np.testing.assert_array_equal(rounded, np.asarray(jnp.exp(factor)).astype(ml_dtypes.float8_e4m3fn))
