"""The one error that reading a compressed file can raise."""

from __future__ import annotations

__all__ = ["FormatError"]


class FormatError(ValueError):
    """A file or payload that is damaged, hostile, or of a version or codec this reader does not know.

    The message says where (the file, the section or the entry), what was found and what was expected.
    """

    def within(self, place: str) -> FormatError:
        """Return the same error with the place put in front: `entry 'conv1.weight': payload ends early`."""
        return FormatError(f"{place}: {self}")
