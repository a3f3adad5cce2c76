"""The Optimal Brain Surgeon engine: numpy arrays in, numpy arrays out; it knows no networks.

One layer: weight W (rows, d), Hessian H = 2 X Xᵀ / N + damping (d, d); rows are independent and share H. The error of a
compressed layer is ½ tr(ΔW H ΔWᵀ). Everything here also takes groups: W (g, rows, d) with H (g, d, d).
"""

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

__all__ = [
    "Cell",
    "layer_error",
    "prune",
    "prune_trace",
    "pruned_counts",
    "quantise_salient",
    "rate_distortion_cells",
    "rd_quantise",
    "salient_cells",
    "search_scale",
    "trellis_codes",
]
