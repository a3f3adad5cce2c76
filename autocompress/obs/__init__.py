"""The Optimal Brain Surgeon engine: numpy arrays in, numpy arrays out; it knows no networks.

One layer: weight W (rows, d), Hessian H = 2 X Xᵀ / N + damping (d, d); rows are independent and share H. The error of a
compressed layer is ½ tr(ΔW H ΔWᵀ). Everything here also takes groups: W (g, rows, d) with H (g, d, d).
"""

from autocompress.obs.orders import ORDERS, obq, quantise
from autocompress.obs.pruning import layer_error, prune, prune_trace, pruned_counts
from autocompress.obs.quantising import (
    Cell,
    quantise_salient,
    rate_distortion_cells,
    rd_quantise,
    salient_cells,
    search_scale,
)
from autocompress.obs.wide import EXACT_LIMIT, exact_operations, shared_cells, shared_prune, shared_trace

__all__ = [
    "EXACT_LIMIT",
    "ORDERS",
    "Cell",
    "exact_operations",
    "layer_error",
    "obq",
    "prune",
    "prune_trace",
    "pruned_counts",
    "quantise",
    "quantise_salient",
    "rate_distortion_cells",
    "rd_quantise",
    "salient_cells",
    "search_scale",
    "shared_cells",
    "shared_prune",
    "shared_trace",
]
