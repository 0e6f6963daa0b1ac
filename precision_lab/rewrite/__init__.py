"""The rewrite: applies a Policy to any JAX function without touching its code."""

from precision_lab.rewrite.api import apply_to_function, call, sites_of_function
from precision_lab.rewrite.regions import full_precision
from precision_lab.rewrite.sites import Site, SiteTable

__all__ = ["Site", "SiteTable", "apply_to_function", "call", "full_precision", "sites_of_function"]
