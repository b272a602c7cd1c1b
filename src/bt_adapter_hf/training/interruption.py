"""Ctrl-C in a way that loses nothing."""

import logging
import signal

from transformers import TrainerCallback


logger = logging.getLogger(__name__)


class StopAtInterrupt(TrainerCallback):
    """On the first Ctrl-C, finishes the step, saves a checkpoint and ends training; a second one ends it at once.

    With several processes, which would get it in different steps, Ctrl-C ends training at once as ever.

    Attributes:
        interrupted: whether training ended because of it.
    """

    def __init__(self):
        self.interrupted = False
        self._previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupted = False
        if args.world_size == 1:
            # Loader workers inherit it as well: they live on until the step is done.
            self._previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, *_) -> None:
        self.interrupted = True
        self.restore()
        logger.warning("Interrupted: saving a checkpoint after this step. Interrupt again to stop at once.")

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Give Ctrl-C its former meaning back; also to be called when training ends by an exception."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
