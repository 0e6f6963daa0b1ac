"""What all tests share: each process compiles a program once."""

import tempfile

_FOLDER = None


def pytest_configure(config):
    """Keeps what is compiled while the tests of this process run, under the text of its program.

    Tests of one subject build the same program again and again, as functions of their own; the second time its machine
    code is read instead of made, and is the same. No two processes share a folder, since JAX does not write its files
    at once, and the processes that tests start compile for themselves.
    """
    global _FOLDER
    if getattr(config.option, "numprocesses", None):
        return  # only starts the processes that run the tests
    import jax

    _FOLDER = tempfile.TemporaryDirectory(prefix="precision_lab_compiled_")
    jax.config.update("jax_compilation_cache_dir", _FOLDER.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
