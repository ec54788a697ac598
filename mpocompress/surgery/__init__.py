"""Find, match and replace weights in a model."""

from mpocompress.surgery import (  # noqa: F401  # they register their adapters
    adapt_conv,
    adapt_embedding,
    adapt_linear,
    adapt_recurrent,
)
from mpocompress.surgery.adapter import WeightAdapter, adapter_for, register
from mpocompress.surgery.find import check_finite, find_weights, tied_names
from mpocompress.surgery.inventory import Inventory, KeptEntry, WeightSite
from mpocompress.surgery.match import select, select_sites
from mpocompress.surgery.opening import open_modules, opened_for, opened_names
from mpocompress.surgery.replace import Replacement, copy_with_replacements

__all__ = [
    "Inventory",
    "KeptEntry",
    "Replacement",
    "WeightAdapter",
    "WeightSite",
    "adapter_for",
    "check_finite",
    "copy_with_replacements",
    "find_weights",
    "open_modules",
    "opened_for",
    "opened_names",
    "register",
    "select",
    "select_sites",
    "tied_names",
]
