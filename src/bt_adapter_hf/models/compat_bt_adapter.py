"""The names of other libraries that they do not document, imported in one place.

They may move between minor versions; a move is mended here, and `tests/package/test_compat.py` says
which it was. The layers and outputs of native models are imported from their models, where they are used: in here,
every model would import all of them. The file lies beside the modelling files and is imported
with a single dot so that `trust_remote_code` finds it too.
"""

# ruff: noqa: F401  (the others import them from here)
from huggingface_hub.dataclasses import strict, validate_typed_dict
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import resolve_revision


# Where the hooks are defined that transformers leaves in a model whose hidden states were asked for.
CAPTURING_HOOKS = "transformers.utils.output_capturing"
