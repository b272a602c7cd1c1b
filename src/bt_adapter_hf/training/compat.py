"""What training leans on that its libraries do not document, in one place; `tests/package/test_compat.py` watches it.

Which private methods of `Trainer` the trainers here take the place of is listed in that test.
"""

from accelerate.state import GradientState
from accelerate.utils.constants import OPTIMIZER_NAME
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME


__all__ = ["OPTIMIZER_NAME", "SCHEDULER_NAME", "TRAINER_STATE_NAME", "set_sync_gradients"]


def set_sync_gradients(state: GradientState, value: bool) -> None:
    """Whether the next backward pass is the last one of a step."""
    state._set_sync_gradients(value)
