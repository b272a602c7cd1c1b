"""Set before anything imports torch or the Hub's client; then what several folders of tests share."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs one process per core
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


class DeprecationsInOurCode(logging.Handler):
    """Makes errors of the deprecations that transformers logs, in place of warning, where our code is the cause."""

    @staticmethod
    def is_library(module: str) -> bool:
        known = ("logging", "transformers", "torch", "functools", "contextlib")
        return module == __name__ or module.partition(".")[0] in known

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" not in record.getMessage():
            return
        if "Passing `generation_config` together" in record.getMessage():
            return  # assisted decoding of transformers does so itself, and our `generate` only passes it on
        frame = sys._getframe()
        while frame is not None and self.is_library(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        if frame is not None and frame.f_globals.get("__name__", "").startswith("bt_adapter_hf"):
            raise DeprecationWarning(f"{frame.f_code.co_filename}:{frame.f_lineno}: {record.getMessage()}")


@pytest.fixture(scope="session", autouse=True)
def deprecations_in_our_code():
    """The warnings that it gives in Python's way are errors by `filterwarnings` in pyproject.toml."""
    handler = DeprecationsInOurCode(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """What tests compare are numbers of float32, also on a machine where the commands would take bfloat16."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of a random `BTAdapterModel` with its processor: 16 pixels, 4 frames, 12-wide features."""
    import torch

    from bt_adapter_hf import BTAdapterModel
    from tests import tiny_pairs

    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    BTAdapterModel(tiny_pairs.model().config).save_pretrained(folder)
    tiny_pairs.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path) -> Path:
    """Folder with four readable videos (three mp4 in two folders, one GIF), two broken ones and a text file."""
    import numpy as np
    from PIL import Image

    from tests import tiny_pairs

    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for name, colour in zip(("red.mp4", "green.mp4", "more/blue.MP4"), ("red", "green", "blue"), strict=True):
        tiny_pairs.write_clip(folder / name, tiny_pairs.COLOURS[colour], step=3)
    frames = [Image.fromarray(np.full((24, 32, 3), 60 * t, np.uint8)) for t in range(4)]
    frames[0].save(folder / "grey.gif", save_all=True, append_images=frames[1:], duration=100)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "garbage.avi").write_bytes(b"this is not a video" * 50)
    (folder / "notes.txt").write_text("not a video either")
    return folder
