"""Benchmarks: what the project's kernels cost beside their peers, as ratios measured in one run."""
