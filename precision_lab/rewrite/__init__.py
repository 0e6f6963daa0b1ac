"""The rewrite: applies a Policy to any JAX function without touching its code, and observes what is inside."""

from precision_lab.rewrite.adapters import Adapter
from precision_lab.rewrite.api import (
    UNDER,
    Traced,
    apply_to_function,
    call,
    scaled_sites,
    sites_of_function,
    trace,
    trace_program,
)
from precision_lab.rewrite.choices import Choosable, call_with_alternatives, call_with_choices, choosable
from precision_lab.rewrite.harvest import Collector, harvest
from precision_lab.rewrite.held import Held, StateMark
from precision_lab.rewrite.marks import OUTPUT, SHADOW, Mark, mark, observing
from precision_lab.rewrite.parameters import Use, Uses, is_qtensor, leaf_names
from precision_lab.rewrite.regions import full_precision
from precision_lab.rewrite.sites import Site, SiteTable

__all__ = [
    "OUTPUT",
    "SHADOW",
    "UNDER",
    "Adapter",
    "Choosable",
    "Collector",
    "Held",
    "Mark",
    "Site",
    "SiteTable",
    "StateMark",
    "Traced",
    "Use",
    "Uses",
    "apply_to_function",
    "call",
    "call_with_alternatives",
    "call_with_choices",
    "choosable",
    "full_precision",
    "harvest",
    "is_qtensor",
    "leaf_names",
    "mark",
    "observing",
    "scaled_sites",
    "sites_of_function",
    "trace",
    "trace_program",
]
