"""Memory arithmetic: round figures everyone knows, and the papers' own."""

import numpy as np
import pytest

from precision_lab.formats.memory import OPTIMIZER_SLOTS, parse_count, storage, training_memory


@pytest.mark.parametrize(("count", "scale"), [(70_000_000_000, 7), (10_000_000_000, 1)])
@pytest.mark.parametrize(
    ("name", "tens_of_gb"),
    [("float32", 40), ("tf32", 40), ("float16", 20), ("bf16", 20), ("e4m3fn", 10), ("int8", 10), ("int4", 5)],
)
def test_weights_take_the_well_known_figures(count, scale, name, tens_of_gb):
    assert storage(count, name).total_bytes == scale * tens_of_gb * 10**9


@pytest.mark.parametrize(
    ("group", "scale_format", "true_bits"), [(32, "float32", 5.0), (128, "float16", 4.125), (32, "e4m3fn", 4.25)]
)
def test_scales_are_counted(group, scale_format, true_bits):
    stored = storage(1 << 20, "int4", group=group, scale_format=scale_format)

    assert stored.bits_per_value == true_bits
    assert stored.total_bytes == stored.value_bytes + stored.scale_bytes == (1 << 20) * true_bits / 8


def test_ragged_groups_and_odd_nibbles_are_rounded_up():
    """33 four-bit codes fill 16.5 bytes; two groups have a scale each."""
    stored = storage(33, "int4", group=32, scale_format="float16")

    assert (stored.value_bytes, stored.scale_bytes) == (17, 4)


@pytest.mark.parametrize(
    ("name", "count", "value_bytes", "scale_bytes"),
    [
        ("mxfp4", 320, 160, 10),
        ("mxfp4", 33, 17, 2),
        ("mxfp6", 32, 24, 1),
        ("mxint8@64", 65, 65, 2),
        ("nvfp4", 32, 16, 2 + 4),
        ("nvfp4_2d", 512, 256, 2 + 4),
        ("nvfp4_2d", 257, 129, 2 + 4),
        ("ternary", 11, 3, 0),
        ("binary", 9, 2, 0),
        ("nf4", 3, 2, 0),
    ],
)
def test_blocks_and_codebooks_take_what_they_store(name, count, value_bytes, scale_bytes):
    stored = storage(count, name)

    assert (stored.value_bytes, stored.scale_bytes) == (value_bytes, scale_bytes)
    assert training_memory(count, params=name, optimizer="sgd").parameters == value_bytes + scale_bytes


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "nvfp4", "bfp5@7", "ternary", "nf4", "int3", "int4"])
def test_the_bytes_accounted_are_the_bytes_stored(name):
    from precision_lab.formats import encode_blocks, format, pack_array
    from precision_lab.formats.storage import block_bytes

    for count in (1, 31, 32, 33, 999):
        x = np.linspace(-1, 1, count, dtype=np.float32)
        blocks = format(name).kind == "block"
        stored = block_bytes(encode_blocks(x, name)) if blocks else pack_array(x, name).nbytes
        assert stored == storage(count, name).total_bytes


def test_adam_with_float16_and_a_float32_master_takes_16_bytes_per_parameter():
    """Rajbhandari et al. 2020, section 3.1; their 1.5 billion parameters need "at least 24 GB"."""
    use = training_memory(1_500_000_000, params="float16", master="float32", optimizer="adam")

    assert use.total_bytes == 24 * 10**9
    assert (use.parameters, use.gradients, use.master, use.optimizer) == (3 * 10**9, 3 * 10**9, 6 * 10**9, 12 * 10**9)


@pytest.mark.parametrize(
    ("options", "bytes_per_parameter"),
    [
        ({}, 16),
        ({"optimizer": "sgd"}, 8),
        ({"optimizer": "momentum"}, 12),
        ({"params": "bf16"}, 8),
        ({"params": "bf16", "moments": "float32"}, 12),
        ({"compute": "bf16"}, 18),
        ({"compute": "bf16", "gradients": "bf16"}, 16),
        ({"compute": "float32"}, 16),
    ],
)
def test_training_adds_up_what_is_kept(options, bytes_per_parameter):
    use = training_memory(1000, **options)

    assert use.total_bytes == 1000 * bytes_per_parameter
    assert use.total_bytes == use.parameters + use.compute_copy + use.master + use.gradients + use.optimizer


@pytest.mark.parametrize(
    ("text", "count"),
    [("70e9", 70 * 10**9), ("70B", 70 * 10**9), ("1.1b", 1_100_000_000), ("350M", 350 * 10**6), ("12_000", 12000),
     ("70,000", 70000), ("1e3k", 10**6), ("2T", 2 * 10**12), ("7", 7)],
)  # fmt: skip
def test_counts_are_read_exactly(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "abc", "-3", "0", "1.5", "1e999", "1e99999999999", "nan", "inf", "7Q"])
def test_bad_counts_are_refused(text):
    with pytest.raises(ValueError, match="expected a positive number of parameters such as 70e9"):
        parse_count(text)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="number of values must be at least 1, got 0"):
        storage(0, "int4")
    with pytest.raises(ValueError, match="group must be at least 1, got 0"):
        storage(8, "int4", group=0)
    with pytest.raises(ValueError, match="group=64: mxfp4 has scales of its own"):
        storage(8, "mxfp4", group=64)
    with pytest.raises(ValueError, match="scale_format='mxfp4': scales are floats"):
        storage(8, "int4", group=64, scale_format="mxfp4")
    with pytest.raises(ValueError, match=f"optimizer must be one of {', '.join(OPTIMIZER_SLOTS)}, got 'adamw'"):
        training_memory(8, optimizer="adamw")
    with pytest.raises(ValueError, match="unknown format 'int44'"):
        storage(8, "int44")
