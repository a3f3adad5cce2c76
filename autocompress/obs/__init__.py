"""The Optimal Brain Surgeon engine: numpy arrays in, numpy arrays out; it knows no networks.

One layer: weight W (rows, d), Hessian H = 2 X Xᵀ / N + damping (d, d); rows are independent and share H. The error of a
compressed layer is ½ tr(ΔW H ΔWᵀ). Everything here also takes groups, W (g, rows, d) with H (g, d, d); and a
`RowHessian`, where rows weigh differently.
"""

from autocompress.obs.grids import column_runs, quantise_levels, search_grid
from autocompress.obs.kernels import PATHS
from autocompress.obs.orders import ORDERS, obq, quantise
from autocompress.obs.patterns import Units, input_blocks, nm_mask, order_of_mask, row_losses, unit_mask, unit_trace
from autocompress.obs.pruning import layer_error, prune, prune_trace, pruned_counts
from autocompress.obs.quantising import (
    Cell,
    quantise_salient,
    rate_distortion_cells,
    rd_quantise,
    salient_cells,
    search_scale,
)
from autocompress.obs.trellis import trellis_codes
from autocompress.obs.vectors import Assignment, Runs
from autocompress.obs.visiting import least_pivots
from autocompress.obs.weighted import RowHessian, search_square
from autocompress.obs.wide import EXACT_LIMIT, exact_operations, shared_cells, shared_prune, shared_trace

__all__ = [
    "EXACT_LIMIT",
    "ORDERS",
    "PATHS",
    "Assignment",
    "Cell",
    "RowHessian",
    "Runs",
    "Units",
    "column_runs",
    "exact_operations",
    "input_blocks",
    "layer_error",
    "least_pivots",
    "nm_mask",
    "obq",
    "order_of_mask",
    "prune",
    "prune_trace",
    "pruned_counts",
    "quantise",
    "quantise_levels",
    "quantise_salient",
    "rate_distortion_cells",
    "rd_quantise",
    "row_losses",
    "salient_cells",
    "search_grid",
    "search_scale",
    "search_square",
    "shared_cells",
    "shared_prune",
    "shared_trace",
    "trellis_codes",
    "unit_mask",
    "unit_trace",
]
