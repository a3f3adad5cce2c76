"""What people look at: tables and one self-contained page."""

from __future__ import annotations

from autocompress.reporting.comparison import render_comparison
from autocompress.reporting.page import render_report
from autocompress.reporting.rows import FilePart, LayerRow, byte_groups, file_parts, layer_rows

__all__ = ["FilePart", "LayerRow", "byte_groups", "file_parts", "layer_rows", "render_comparison", "render_report"]
