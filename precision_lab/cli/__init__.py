"""The `precision-lab` command. Nothing here imports JAX until a run needs it."""

from precision_lab.cli.app import app, main

__all__ = ["app", "main"]
