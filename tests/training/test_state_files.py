"""States from files: what was written comes back, whatever wrote it, and damage is told in one line."""

import io
import json
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from precision_lab.training.state_files import read_state

TREE = {"layer": {"kernel": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "bias": np.float32([0.1, 0.2])},
        "blocks": [np.float16([1, 2]), np.array([3, 4], ml_dtypes.float8_e4m3fn)], "step": np.int32(7)}  # fmt: skip


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, np.asarray(theirs).tobytes())


def test_files_of_numpy(tmp_path):
    np.save(tmp_path / "a.npy", np.float16([1, 2]))
    np.savez(tmp_path / "a.npz", **{"layer/kernel": TREE["layer"]["kernel"], "step": TREE["step"]})

    archive = read_state(tmp_path / "a.npz")

    assert_same(read_state(tmp_path / "a.npy"), {"array": np.float16([1, 2])})
    assert archive["step"] == 7
    # NumPy forgets the name of bfloat16, and keeps its bytes.
    assert archive["layer/kernel"].dtype == np.dtype("V2")
    assert archive["layer/kernel"].tobytes() == TREE["layer"]["kernel"].tobytes()


def safetensors(header, body=b""):
    """Returns a file as the format's README has it: the header's length in 8 bytes, the header, the tensors."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_safetensors(tmp_path):
    kernel, bias = TREE["layer"]["kernel"], TREE["layer"]["bias"]
    header = {"__metadata__": {"format": "pt"}, "w": entry("BF16", [2, 3], 0, 12), "n": entry("I64", [], 12, 20)}
    header["b"], header["empty"] = entry("F32", [2], 20, 28), entry("F8_E5M2", [0, 4], 28, 28)
    content = safetensors(header, kernel.tobytes() + struct.pack("<q", -5) + bias.tobytes())
    (tmp_path / "a.safetensors").write_bytes(content)

    found = read_state(tmp_path / "a.safetensors")

    assert_same({key: found[key] for key in "wb"}, {"w": kernel, "b": bias})
    assert found["n"] == -5
    assert (found["empty"].dtype, found["empty"].shape) == (ml_dtypes.float8_e5m2, (0, 4))


def save_plain(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "plain", TREE)
    return folder / "plain"


def save_managed(folder):
    with ocp.CheckpointManager(folder / "managed") as manager:
        manager.save(9, args=ocp.args.StandardSave(jax.tree.map(lambda x: x * 0, TREE)), force=True)
        manager.save(10, args=ocp.args.StandardSave(TREE), force=True)
    return folder / "managed"


def save_with_a_record(folder):
    args = ocp.args.Composite(state=ocp.args.StandardSave(TREE), record=ocp.args.JsonSave({"step": 7}))
    with ocp.CheckpointManager(folder / "run" / "checkpoints") as manager:
        manager.save(3, args=args, force=True)
    return folder / "run"


@pytest.mark.parametrize("save", [save_plain, save_managed, save_with_a_record])
def test_folders_of_orbax_whoever_wrote_them_the_latest_step_of_several(tmp_path, save):
    assert_same(read_state(save(tmp_path)), TREE)


def test_trees_that_were_saved_together_are_under_their_names(tmp_path):
    args = ocp.args.Composite(params=ocp.args.StandardSave(TREE), ema=ocp.args.StandardSave({"x": jnp.ones(2)}))
    with ocp.CheckpointManager(tmp_path / "two") as manager:
        manager.save(1, args=args, force=True)

    found = read_state(tmp_path / "two")

    assert_same(found, {"params": TREE, "ema": {"x": np.ones(2, np.float32)}})


def archive(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, written in members.items():
            file.writestr(name, written)
    return content.getvalue()


def header(*shape):
    """Returns the beginning of a .npy file of float64 of a shape, and 8 bytes of what it should hold."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return content.getvalue() + bytes(8)


BAD = {
    "a.npz": (b"PK\x03\x04 torn", "cannot be read: it is damaged"),
    "b.npy": (b"", "cannot be read: it is damaged"),
    "wide.npy": (header(10**15), "its header is damaged, or it needs more memory than there is"),
    "wide.npz": (archive(**{"w.npy": header(10**15)}), "its header is damaged, or it needs more memory"),
    "wider.npy": (header(10**30), "its header is damaged, or it needs more memory than there is"),
    "c.safetensors": (b"\xff" * 8, "its header is longer than the file"),
    "d.safetensors": (safetensors({"w": entry("F32", [3], 0, 8)}, bytes(8)), "'w' has 8 bytes for F32 [3]"),
    "e.safetensors": (safetensors({"w": entry("F32", [2], 4, 12)}, bytes(8)), "'w' has 8 bytes for F32 [2]"),
    "f.safetensors": (safetensors({"w": entry("F4", [2], 0, 1)}, bytes(1)), "'w' has the unknown dtype F4"),
    "g.safetensors": (b"\x02" + bytes(7) + b"hi", "cannot be read as safetensors"),
    "deep.safetensors": (struct.pack("<Q", 100_000) + b"[" * 100_000, "cannot be read as safetensors"),
    "text.npz": (archive(note=b"hi"), "cannot be read: it holds note, which is no array"),
    "half.npz": (archive(**{"w.npy": b"hi"}), "cannot be read: it holds w, which is no array"),
    "h.pt": (b"", "such files are not opened, since reading some of them runs their code"),
    "i.txt": (b"", "is not a .npy, .npz or .safetensors file, or the folder of a run or an Orbax checkpoint."),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_and_other_files_are_told(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read_state(tmp_path / name)

    assert message in str(error.value)
    assert name in str(error.value)


def test_folders_without_a_checkpoint_and_torn_ones_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no Orbax checkpoint of a tree"):
        read_state(tmp_path)
    plain = save_plain(tmp_path)
    (plain / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="plain' cannot be read"):
        read_state(plain)
    with pytest.raises(OSError, match=r"nothing\.npy"):
        read_state(tmp_path / "nothing.npy")
