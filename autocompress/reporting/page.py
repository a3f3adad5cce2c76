"""The page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autocompress.profiling import Profile
from autocompress.types import Plan

__all__ = ["render_report"]


def render_report(plan: Plan, profile: Profile, metrics: dict[str, Any], file: Path) -> str:
    """One self-contained HTML page."""
    return ""
