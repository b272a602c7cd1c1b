"""Modules of `datasets` that it does not document, in one place; `tests/package/test_compat.py` watches them.

The package is optional: what needs it imports this file when it is used.
"""

from datasets.packaged_modules.videofolder.videofolder import VideoFolder
from datasets.utils.file_utils import xopen


__all__ = ["VideoFolder", "xopen"]
