"""The names of transformers that its top level does not export, imported in one place.

They may move between minor versions; a move is mended here. The file lies beside the modelling files and is imported
with a single dot so that `trust_remote_code` finds it too.
"""

from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import resolve_revision


# Where the hooks are defined that transformers leaves in a model whose hidden states were asked for.
CAPTURING_HOOKS = "transformers.utils.output_capturing"


__all__ = [
    "CAPTURING_HOOKS",
    "BaseModelOutputWithPooling",
    "SubConfigSpec",
    "WeightRenaming",
    "can_return_tuple",
    "get_checkpoint_conversion_mapping",
    "register_checkpoint_conversion_mapping",
    "resolve_revision",
]
