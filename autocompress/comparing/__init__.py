"""Comparison: strategies x budgets x seeds on one profile, row by row, as a table."""

from autocompress.comparing.bench import CompareWarning, compare, task_context
from autocompress.comparing.table import COLUMNS, KEYS, load_comparison, spending, summary, write_comparison

__all__ = [
    "COLUMNS",
    "KEYS",
    "CompareWarning",
    "compare",
    "load_comparison",
    "spending",
    "summary",
    "task_context",
    "write_comparison",
]
