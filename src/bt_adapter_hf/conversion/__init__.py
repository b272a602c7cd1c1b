"""Released BT-Adapter checkpoints to models of this package, and back."""

from .original import (
    ConversionPlan,
    convert_original_checkpoint,
    convert_to_original,
    plan_conversion,
    read_llava_projector,
)
from .reading import CheckpointError, read_checkpoint
from .released_tokens import released_token_ids


__all__ = [
    "CheckpointError",
    "ConversionPlan",
    "convert_original_checkpoint",
    "convert_to_original",
    "read_llava_projector",
    "plan_conversion",
    "read_checkpoint",
    "released_token_ids",
]
