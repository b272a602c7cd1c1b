"""What stands between a visitor's mistake and the page."""

import functools
from collections.abc import Callable

import gradio as gr

from ..models.video_errors import VideoError
from .clips import say


def clear_errors(handler: Callable) -> Callable:
    """Errors that a visitor can do something about are shown, without the folders of this machine."""

    @functools.wraps(handler)
    def answer(*args):
        try:
            return handler(*args)
        except (VideoError, ValueError) as error:
            raise gr.Error(say(error), print_exception=False) from error

    return answer
