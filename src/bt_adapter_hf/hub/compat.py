"""What this folder leans on that its libraries do not document, in one place; `tests/package/test_compat.py` watches
it."""

from huggingface_hub.utils.sha import git_hash
from transformers.dynamic_module_utils import get_relative_import_files


__all__ = ["get_relative_import_files", "git_hash"]
