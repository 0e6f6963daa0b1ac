"""The numerics fingerprint: what, besides its configuration, can change the numbers of a run.

It is stored beside a run in `env.json` and is no part of its identity: the same run on another machine is the same
run, and a difference is said in words.
"""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from precision_lab.training import AnyRun

_PACKAGES = ("precision-lab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_dtypes", "numpy")
_JAX_OPTIONS = {
    "x64": "jax_enable_x64",
    "matmul_precision": "jax_default_matmul_precision",
    "prng": "jax_default_prng_impl",
    "threefry_partitionable": "jax_threefry_partitionable",
}


def fingerprint() -> dict[str, Any]:
    """Returns versions, devices, cores, XLA flags and the state of the code as a flat mapping of plain values."""
    return {**_software(), **_hardware(), **_jax_settings(), **code_state()}


def _software() -> dict[str, Any]:
    """Returns the versions of Python and of every package whose version can move a number."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _hardware() -> dict[str, Any]:
    """Returns the processor and how many cores this process may use."""
    return {"machine": platform.machine(), "system": platform.system(), "cpu": _cpu_name(), "cores": cores()}


def cores() -> int:
    """Returns how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    """Returns the processor's name, which tells whether it has wide or bfloat16 units."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _jax_settings() -> dict[str, Any]:
    """Returns the devices and the settings of JAX that change arithmetic or random numbers."""
    import jax

    devices = jax.devices()
    return {
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{key: getattr(jax.config, name) for key, name in _JAX_OPTIONS.items()},
    }


@lru_cache
def code_state() -> dict[str, Any]:
    """Returns the commit of the package's sources and a hash of what differs from it; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    # An installed copy may lie inside the user's own repository; only a tracked file makes it ours.
    if _git(package, "ls-files", "--error-unmatch", "runner/environment.py") is None:
        return {"commit": None, "uncommitted": None}
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "diff", "HEAD", "--", ".")
    digest = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None
    return {"commit": commit.strip() if commit else None, "uncommitted": digest}


def registered_modules(config: AnyRun) -> list[str]:
    """Returns the modules that registered a run's parts, other than the package's own."""
    from precision_lab.data import DATASETS
    from precision_lab.models import MODELS
    from precision_lab.training.probes import PROBES

    registries = {"model": MODELS, "data": DATASETS, "probe": PROBES}
    parts = [(registry, getattr(config, key)) for key, registry in registries.items() if hasattr(config, key)]
    names = [getattr(one, "__module__", "") for registry, part in parts for one in (type(part), registry.builder(part))]
    return [name for name in dict.fromkeys(names) if not _ours(name)]


def registered_code(config: AnyRun) -> dict[str, str]:
    """Returns, by module, a hash of the source that registered a run's parts, if it is not the package's."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in registered_modules(config)}
    return {
        f"source of {name}": hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
        for name, file in files.items()
        if file and Path(file).is_file()
    }


def _ours(module: str) -> bool:
    """Returns whether a module belongs to the package, whose own state is in `code_state`."""
    return module.partition(".")[0] == __name__.partition(".")[0]


def _git(folder: Path, *words: str) -> str | None:
    """Returns what a git command prints, None if there is no git or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns what differs, in words: `jax 0.10.2, here 0.12.0`."""
    keys = [key for key in {**current, **stored} if stored.get(key) != current.get(key)]
    return [f"{key} {_text(stored.get(key))}, here {_text(current.get(key))}" for key in keys]


def _text(value: Any) -> str:
    """Returns a value as short text; hashes are cut to what tells them apart."""
    text = "none" if value in (None, "") else str(value)
    return text[:12] if len(text) == 40 else text
