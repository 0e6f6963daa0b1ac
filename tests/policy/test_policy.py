"""Policies: parsing, printing, equality, casts. jmp itself is the oracle for jmp's strings."""

import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precision_lab import formats
from precision_lab.policy import PRESETS, Policy
from precision_lab.policy.patterns import glob_matches

JMP_NAMES = ["full", "f32", "float32", "half", "f16", "float16", "bf16", "bfloat16", "f64", "float64"]
FLOATS = ["float32", "float16", "bfloat16", "tf32", "float8_e4m3fn", "float8_e5m2"]


def jmp_strings():
    """Every form that jmp's parser accepts: a dtype, or any non-empty choice of its keys, long or short."""
    yield from JMP_NAMES
    for keys in (("params", "compute", "output"), ("p", "c", "o")):
        for count in (1, 2, 3):
            for chosen in itertools.combinations(keys, count):
                for names in itertools.product(("f32", "float16", "bf16", "half"), repeat=count):
                    yield ",".join(f"{key}={name}" for key, name in zip(chosen, names, strict=True))


@pytest.mark.parametrize("spec", sorted(set(jmp_strings())))
def test_every_jmp_string_means_what_it_means_to_jmp(spec):
    theirs = jmp.get_policy(spec)

    ours = Policy.parse(spec)

    expected = [np.dtype(d) for d in (theirs.param_dtype, theirs.compute_dtype, theirs.output_dtype)]
    assert [ours.params.dtype, ours.compute.dtype, ours.output.dtype] == expected


@pytest.mark.parametrize("spec", ["float32", "bf16", "c=f16", "p=bf16,c=f16,o=f32"])
def test_a_jmp_policy_is_accepted_and_given_back(spec):
    theirs = jmp.get_policy(spec)

    back = Policy.parse(theirs).to_jmp()

    for field in ("param_dtype", "compute_dtype", "output_dtype"):
        assert np.dtype(getattr(back, field)) == np.dtype(getattr(theirs, field))


def test_what_jmp_cannot_hold_is_not_dropped():
    with pytest.raises(ValueError, match="jmp has no rules"):
        Policy.parse("c=bf16;**/head/**:compute=float32").to_jmp()
    with pytest.raises(ValueError, match="compute=tf32 cannot store"):
        Policy.parse("c=tf32,o=f32").to_jmp()


globs = st.lists(st.sampled_from(["**", "*", "head", "blocks", "0", "att*"]), min_size=1, max_size=4).map("/".join)
rules = st.lists(st.tuples(globs, st.sampled_from(FLOATS)), max_size=3)


@given(st.sampled_from(["float32", "float16", "bfloat16"]), st.sampled_from(FLOATS), rules)
def test_parsing_what_is_printed_gives_the_same_policy(storage, compute, rules):
    policy = Policy.parse(f"params={storage},compute={compute},output={storage}")
    for pattern, fmt in rules:
        policy = policy.with_rule(pattern, compute=fmt)

    again = Policy.parse(str(policy))

    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == str(policy)
    assert eval(repr(policy), {"Policy": Policy}) == policy
    assert Policy.parse(json.loads(json.dumps(str(policy)))) == policy


@pytest.mark.parametrize("spec", [jnp.bfloat16, np.dtype("bfloat16"), "bf16", "BFLOAT16", formats.format("bfloat16")])
def test_a_format_is_the_same_policy_however_it_is_written(spec):
    assert Policy.parse(spec) == Policy.parse("params=bfloat16,compute=bfloat16,output=bfloat16")
    assert hash(Policy.parse(spec)) == hash(Policy.parse("bfloat16"))


@pytest.mark.parametrize(
    "spec", [" p = f32 , c = bf16, o=F32 ,", "P=F32,C=BF16,O=F32", "bfloat16_mixed", "BFloat16_Mixed"]
)
def test_spaces_case_and_a_trailing_comma_do_not_matter(spec):
    assert Policy.parse(spec) == Policy.parse("p=f32,c=bf16,o=f32")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("c=tf33", "unknown format 'tf33'.*tf32"),
        ("c=f32,compute=bf16", "'compute' is given twice"),
        ("comput=bf16", "unknown key 'comput'; did you mean 'compute'"),
        ("head/**:compute=float16", "a rule follows a policy, such as 'float32;head/\\*\\*:compute=...'"),
        ("weights=int4", "unknown key 'weights'; did you mean 'weight'"),
        ("zzz=int4", "unknown key 'zzz'; the keys are params, compute, output, accum, weight, activation"),
        ("bfloat16_mixt", "did you mean 'bfloat16_mixed'"),
        ("mixed", "Presets: float32, bfloat16_mixed"),
        ("c=", "expected 'key=value', got 'c='"),
        ("c=bf16,,o=f32", "expected 'key=value', got ''"),
        ("c=int8", "compute=int8 is not a floating format"),
        ("c=float8_e8m0fnu", "compute=float8_e8m0fnu has no sign or no zero"),
        ("p=float8_e8m0fnu,c=f32", "params=float8_e8m0fnu has no sign or no zero"),
        ("c=mxfp4", "compute=mxfp4 is not a floating format"),
        ("p=nf4,c=f32", "params=nf4 cannot store"),
        ("p=tf32", "params=tf32 cannot store floating tensors"),
        ("p=int8,c=f32", "params=int8 cannot store floating tensors"),
        ("c=bf16,accum=f64", "accum=float64 is not available with compute=bfloat16"),
        ("c=bf16,accum=f16,execution=native", "accum=float16 is simulated, but execution=native"),
        ("c=bf16,execution=fast", "execution=fast must be one of auto, native, simulated"),
        ("c=bf16,ops=torch", "ops=torch must be one of products, autocast"),
        ("c=bf16,backward=original", "backward=original needs weight=, activation= or gradient="),
        ("c=bf16;**:op=lower", "op=lower must be one of low, float32, promote, follow, never"),
        ("float32,mixed", "expected 'key=value', got 'mixed'"),
        ("bfloat16,accum=f16", "only a preset may stand before a comma; 'bfloat16' is none"),
        ("c=bf16;head", "rule 'head' is not of the form"),
        ("c=bf16;**/head/**:output=float32", "unknown key 'output'"),
        ("c=bf16;**:compute=int4", "compute=int4 in rule '\\*\\*' is not a floating format"),
        (
            "weight=int8,lsq,backward=original",
            "backward=original goes straight through .* 'lsq' .*; leave one of them out",
        ),
        ("w8a8,gradient=int8,outliers=6", "can only be quantized, but there is gradient=int8; leave one of them out"),
        (
            "weight=int8,backward=original;**/head/**:gradient=int8",
            "gradient=int8 in rule '\\*\\*/head/\\*\\*' .* can only be requantized, but there is backward=original; "
            "say backward= in rule '\\*\\*/head/\\*\\*' too \\(none switches it off\\)",
        ),
        ("", "unknown format ''"),
    ],
)
def test_a_string_that_cannot_be_honoured_says_why(spec, message):
    with pytest.raises(ValueError, match=message):
        Policy.parse(spec)


@pytest.mark.parametrize("compute", ["tf32", "float8_e4m3fn"])
def test_outputs_do_not_follow_compute_into_a_format_without_scale_or_storage(compute):
    assert Policy.parse(f"c={compute}").output.name == "float32"


def test_a_rule_that_sets_nothing_or_cannot_be_written_down_is_refused():
    with pytest.raises(ValueError, match="sets nothing"):
        Policy().with_rule("**/head/**")
    with pytest.raises(ValueError, match="without spaces and any of"):
        Policy().with_rule("a;b", compute="float16")


def test_later_rules_win_setting_by_setting():
    policy = Policy.parse("c=bf16;blocks/**:compute=float16;blocks/0/**:compute=float32")

    assert policy.at("blocks/0/up/kernel").compute.name == "float32"
    assert policy.at("blocks/1/up/kernel").compute.name == "float16"
    assert policy.at("head/kernel").compute.name == "bfloat16"


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("**/head/**", ["head", "head/kernel", "a/b/head/kernel"], ["heads/kernel", "a/overhead/kernel"]),
        ("head/*", ["head/kernel"], ["head", "head/a/kernel", "a/head/kernel"]),
        ("blocks/*/att/**", ["blocks/0/att", "blocks/11/att/q/kernel"], ["blocks/att/q", "blocks/0/1/att/q"]),
        ("blocks/?/up", ["blocks/0/up"], ["blocks/10/up"]),
        ("**:dot_general#*", ["att:dot_general#1"], ["att/q/kernel"]),
        ("a.b/[c]", ["a.b/[c]"], ["axb/c"]),
        ("**", ["anything", "at/any/depth"], []),
    ],
)
def test_globs_match_whole_components(pattern, matching, other):
    assert all(glob_matches(pattern, name) for name in matching)
    assert not any(glob_matches(pattern, name) for name in other)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_by_name_and_has_a_source(name):
    preset = PRESETS[name]

    assert Policy.parse(name) == Policy.preset(name) == Policy.parse(str(preset.policy))
    assert preset.source
    assert preset.summary


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'float16_mixed'"):
        Policy.preset("float16_mix")


def test_casting_touches_floating_arrays_only_and_returns_the_same_object_where_nothing_changes():
    tree = {
        "w": jnp.ones(2), "n": jnp.arange(2), "flag": jnp.array(True), "key": jax.random.key(0), "none": None,
        "z": jnp.ones(2, jnp.complex64), "f8": jnp.ones(2, jnp.float8_e4m3fn), "python": 1.5,
    }  # fmt: skip
    policy = Policy.parse("p=bf16,c=f16,o=f32")

    cast = policy.cast_to_param(tree)

    assert cast["w"].dtype == jnp.bfloat16
    assert all(cast[name] is tree[name] for name in tree if name != "w")
    assert policy.cast_to_compute(tree)["w"].dtype == jnp.float16
    assert policy.cast_to_output(tree) is tree


def test_parsing_a_policy_does_not_import_jax():
    code = "import sys; from precision_lab.policy import Policy; Policy.parse('c=bf16;**/a/**:compute=tf32')"
    code += "; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
