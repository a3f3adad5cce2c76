"""What people look at: tables and one self-contained page."""

from __future__ import annotations

from autocompress.reporting.page import render_report

__all__ = ["render_report"]
