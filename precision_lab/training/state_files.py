"""States from files: NumPy's .npy and .npz, .safetensors, and folders of Orbax checkpoints. Nothing is executed."""

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".msgpack", ".h5")
# Source: the format's README, https://github.com/huggingface/safetensors, "Format".
_SAFETENSORS = {
    "BOOL": np.bool_,
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


def read_state(path: Path) -> Any:
    """Returns the arrays that a file or a folder holds, as dicts (and lists) of NumPy arrays.

    Args:
      path: a .npy file, whose array is called "array"; .npz; .safetensors; or a folder, see `read_arrays`.

    Raises:
      ValueError: another kind of file, one that is damaged, or one for more memory than there is.
      OSError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        from precision_lab.training.checkpointing import read_arrays

        return read_arrays(path)[0]
    if path.suffix in (".npy", ".npz"):
        return _numpy(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    known = "a .npy, .npz or .safetensors file, or the folder of a run or an Orbax checkpoint"
    why = "; such files are not opened, since reading some of them runs their code" if path.suffix in _PICKLES else ""
    raise ValueError(f"{path} is not {known}{why}.")


def _numpy(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file of NumPy's."""
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"array": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        others = [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]  # which NumPy gives as bytes
    except (MemoryError, OverflowError) as error:
        why = "its header is damaged, or it needs more memory than there is"
        raise ValueError(f"{path} cannot be read: {why} ({error}).") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds Python objects, which are not opened."
        ) from None
    if others:
        raise ValueError(f"{path} cannot be read: it holds {others[0]}, which is no array.")
    return arrays


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file: a length, a header in JSON, and the bytes."""
    content = np.fromfile(path, np.uint8)
    length = int(content[:8].view("<u8")[0]) if content.size >= 8 else -1
    try:
        if not 0 <= length <= content.size - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(content[8 : 8 + length].tobytes())
        body = content[8 + length :]
        return {name: _tensor(name, entry, body) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}.") from None


def _tensor(name: str, entry: Any, body: np.ndarray) -> np.ndarray:
    """Returns one tensor from the bytes of all."""
    start, end = entry["data_offsets"]
    if entry["dtype"] not in _SAFETENSORS:
        raise ValueError(f"'{name}' has the unknown dtype {entry['dtype']}")
    dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
    if not 0 <= start <= end <= body.size or end - start != math.prod(entry["shape"]) * dtype.itemsize:
        raise ValueError(f"'{name}' has {end - start} bytes for {entry['dtype']} {entry['shape']}")
    return body[start:end].copy().view(dtype).reshape(entry["shape"])
