"""Accumulators as data: what they parse from, print as, and refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.policy.accumulator import Accumulator

F16 = formats.format("float16")
MEANT = {
    "float32": Accumulator(formats.format("float32")),
    "float64": Accumulator(formats.format("float64")),
    "float16": Accumulator(F16),
    "bfloat16@step4": Accumulator(formats.format("bfloat16"), 4),
    "float16@promote128": Accumulator(F16, 1, 128),
    "e8m13@step32@promote128": Accumulator(formats.format("e8m13"), 32, 128),
    "e8m13@step32@toward_zero": Accumulator(formats.format("e8m13"), 32, None, "toward_zero"),
    "bfloat16@promote64@stochastic": Accumulator(formats.format("bfloat16"), 1, 64, "stochastic"),
    "float32@step8": Accumulator(formats.format("float32"), 8),
    "e5m3:bias=12,finite@step2@promote2": Accumulator(formats.format("e5m3:bias=12,finite"), 2, 2),
}


@pytest.mark.parametrize("spec", MEANT)
def test_a_string_is_what_it_prints_as_and_means_what_it_says(spec):
    accum = Accumulator.parse(spec)

    assert accum == MEANT[spec]
    assert hash(accum) == hash(MEANT[spec])
    assert str(accum) == spec
    assert repr(accum) == f"Accumulator.parse('{spec}')"
    assert Accumulator.parse(accum) is accum


@pytest.mark.parametrize("spec", ["fp16", "half", "e5m10", " Float16 @ step1 ", "FLOAT16@STEP1", F16, jnp.float16])
def test_spellings_of_one_meaning_are_one_accumulator(spec):
    assert Accumulator.parse(spec) == Accumulator(F16)
    assert str(Accumulator.parse(spec)) == "float16"


def test_options_come_in_any_order():
    assert str(Accumulator.parse("float16@promote8@step2")) == "float16@step2@promote8"
    assert str(Accumulator.parse("float16@Toward_Zero@step2")) == "float16@step2@toward_zero"
    assert Accumulator.parse("float16@nearest_even") == Accumulator(F16)


def test_only_the_devices_own_accumulators_are_native():
    assert [spec for spec in MEANT if Accumulator.parse(spec).is_native] == ["float32", "float64"]


def test_results_are_float32_but_those_of_float64():
    assert {spec: Accumulator.parse(spec).dtype for spec in MEANT} == {
        spec: np.dtype("float64" if spec == "float64" else "float32") for spec in MEANT
    }


REFUSED = {
    "flaot16": "'flaot16': unknown format 'flaot16'. Nearest: 'float16'",
    "int32": "'int32': int32 is no format of single floats.*scale.*Choose a float",
    "int8@step4": "int8 is no format of single floats",
    "fixed8.4": "fixed8.4:?.* is no format of single floats",
    "mxfp4": "mxfp4 is no format of single floats",
    "nf4": "nf4 is no format of single floats",
    "float8_e8m0fnu": "no sign or no zero",
    "e9m5": "e9m5 cannot be simulated in float32",
    "e5m24": "e5m24 cannot be simulated in float32",
    "e8m10:bias=130": "subnormals among those of float32",
    "float64@step2": "float64 is native only",
    "float64@promote8": "float64 is native only",
    "float16@step0": "step must be at least 1, got 0",
    "float16@promote0": "promote must be at least 1, got 0",
    "float16@step8@promote4": "step=8 is more than promote=4.*Choose step=4",
    "float16@step4@promote130": "promote=130 must be a multiple of step=4. Choose promote=128 or 132",
    "float16@chunk4": "'@chunk4' is none of @stepN and @promoteN",
    "float16@step-1": "'@step-1' is none of",
    "float16@": "'@' is none of",
    "float16@step2@step2": "'@step2' is given twice",
    "float16@toward_zero@stochastic": "'@stochastic' is given twice",
    "float16@up": "'@up' is none of .* no rounding, which are nearest_even, toward_zero, stochastic",
    "float32@toward_zero": "float32 sums in float32.*@toward_zero is moot",
    "float64@stochastic": "float64 is native only",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_nonsense_is_refused(spec):
    with pytest.raises(ValueError, match=REFUSED[spec]):
        Accumulator.parse(spec)


@pytest.mark.parametrize("step", [2.0, True, "4", None])
def test_a_count_that_is_no_int_is_refused(step):
    with pytest.raises(TypeError, match="step must be an int"):
        Accumulator(F16, step)


def test_what_is_no_format_is_refused():
    with pytest.raises(TypeError, match=r"must be a Format, got 'float16'; Accumulator\.parse"):
        Accumulator("float16")
    with pytest.raises(TypeError, match="expected a format name"):
        Accumulator.parse(None)
