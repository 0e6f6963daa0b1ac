"""What all tests share: programs are compiled quickly unless `--optimized` is given, and once in each process."""

import gc
import importlib.metadata
import os
import tempfile

import pytest

_FOLDER = None
# Options of XLA that say how machine code is made: for tests, for users.
_CODE = {"xla_backend_optimization_level": (0, 3), "xla_cpu_parallel_codegen_split_count": (1, 32)}
if tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]) < (0, 12):
    # Since 0.12 there is one way of emitting a fusion, and XLA ends a process that names an option it does not know.
    _CODE["xla_cpu_use_fusion_emitters"] = (False, True)


def pytest_addoption(parser):
    parser.addoption("--optimized", action="store_true", help="compile programs as users do; takes twice as long")


def pytest_configure(config):
    """Says how JAX, which is imported after this, compiles, and keeps what it compiled while the process runs.

    Most programs of tests run once or twice on small arrays, and to make their machine code fast took more than half
    of the time of all tests. XLA gets the same program and simplifies it in the same way; what it fuses differs little,
    and the code of a fusion differs. So what claims bits of numbers is run with `--optimized` as well, by `.ci/run`.

    Tests of one subject build the same program again and again, as functions of their own; the second time its machine
    code is read instead of made, and is the same. No two processes share a folder, since JAX does not write its files
    at once, and the processes that tests start compile for themselves.
    """
    global _FOLDER
    if not config.option.optimized and not hasattr(config, "workerinput"):  # workers inherit what is said here
        flags = [f"--{name}={quick}" for name, (quick, _) in _CODE.items()]
        os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
    if getattr(config.option, "numprocesses", None):
        return  # only starts the processes that run the tests
    import jax

    _FOLDER = tempfile.TemporaryDirectory(prefix="precision_lab_compiled_")
    jax.config.update("jax_compilation_cache_dir", _FOLDER.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_search():
    """Leaves what the imports and the tests before left behind out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def as_users_compile():
    """The `compiler_options` of a program whose machine code is the subject of its test."""
    return {name: users for name, (_, users) in _CODE.items()}
