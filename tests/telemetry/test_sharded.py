"""What the devices of a shard_map see is merged; on two devices, in a process of its own."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp
from precision_lab.rewrite import mark
from precision_lab.telemetry import observed

def layer(h, _):
    return mark(h * 2, "h"), None

def body(x):
    y = jax.lax.scan(layer, x, None, length=3)[0]
    y = jax.lax.cond(x.sum() > 10, lambda h: mark(h * 2, "last"), lambda h: h, y)  # on the second device only
    return jax.lax.psum((y**2).sum(), "a")

mesh = jax.sharding.Mesh(jax.devices(), ("a",))
x = jnp.arange(8.0)
for check_vma in (True, False):
    fn = jax.value_and_grad(
        jax.shard_map(body, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P(), check_vma=check_vma)
    )
    (loss, grad), seen = jax.jit(observed(fn, limit=None))(x)
    assert (loss, list(grad)) == (fn(x)[0], list(fn(x)[1]))
    h, last = seen["h", "value"], seen["last", "value"]
    # 2x, 4x and 8x of 0..7; then 16x of 4..7, whose gradient is twice that.
    assert (h.count, h.zeros, h.amax) == (24, 3, 56.0), h
    assert (last.count, last.zeros, last.amin, last.amax) == (4, 0, 64.0, 112.0), last
    assert seen["last", "value_cotangent"].amax == 224.0
    for look in (True, False):
        (loss, grad), sometimes = jax.jit(observed(fn, limit=2, when=lambda x: (x[0] == 0) == look))(x)
        assert (loss, list(grad)) == (fn(x)[0], list(fn(x)[1]))
        assert sometimes["h", "value"].count == (12 if look else 0)
print("passed", jax.device_count())
"""


def test_devices_are_merged_and_the_results_stay():
    two = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": two.strip(), "JAX_PLATFORMS": "cpu"}

    done = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | flags, capture_output=True, text=True)

    assert done.stdout.strip() == "passed 2", done.stderr
