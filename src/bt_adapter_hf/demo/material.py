"""What the page works with: the models, the index, the clips, and what a visitor may send."""

from dataclasses import dataclass, field

import gradio as gr

from ..adapters.writing import no_character
from ..search.encoding import VideoEncoder
from ..search.index import VideoIndex
from .answers import Chat
from .clips import Clips, Limits, check_upload


LONGEST_TEXT = 500  # characters


@dataclass
class Material:
    """What the tabs work with.

    Attributes:
        examples: videos to begin with; film: a longer one; texts: that fit some of them.
    """

    encoder: VideoEncoder
    index: VideoIndex
    chat: Chat
    limits: Limits = Limits()
    examples: list[str] = field(default_factory=list)
    film: str | None = None
    texts: list[str] = field(default_factory=list)
    clips: Clips = field(default_factory=Clips)

    def upload(self, path: str | None, what: str = "video") -> str:
        """A file that a visitor has sent, if it may be used."""
        if not path:
            raise gr.Error(f"Choose a {what} first.", print_exception=False)
        check_upload(path, self.limits)
        return path

    @staticmethod
    def text(words: str | None, what: str = "text") -> str:
        """What a visitor has typed, if it may be used."""
        words = (words or "").strip()
        problem = no_character(words)
        if not words:
            raise gr.Error(f"Type a {what} first.", print_exception=False)
        if problem or len(words) > LONGEST_TEXT:
            problem = problem or f"has {len(words)} characters, and {LONGEST_TEXT} are taken here"
            raise gr.Error(f"The {what} {problem}.", print_exception=False)
        return words
