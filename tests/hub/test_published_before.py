"""Repositories that were made with their code before the package had folders, by the code of commit 52d2f5b.

`tests/data/published_before_rooms.tar.xz` holds a dual encoder, a LLaVA and an adapter of it, with what that code made
of some inputs. Weights and inputs are rounded, so that the file is small.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.hub.test_remote_code import ABSENT


ARCHIVE = Path(__file__).parents[1] / "data" / "published_before_rooms.tar.xz"

COMPARE = """
expected = load_file("expected.safetensors")
def same(found, name):
    torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=1e-5)
with torch.no_grad():
    model = AutoModel.from_pretrained("dual", **trust).eval()
    same(model.get_video_features(expected["videos"]).pooler_output, "features")
    processor = AutoProcessor.from_pretrained("dual", **trust)
    pixels = processor(videos=torch.zeros(9, 3, 20, 20), text="red", return_tensors="pt").pixel_values_videos
    print(tuple(pixels.shape))
    chat = AutoModelForImageTextToText.from_pretrained("llava", **trust).eval()
    inputs = {"input_ids": expected["ids"], "attention_mask": torch.ones_like(expected["ids"])}
    same(chat(**inputs, pixel_values=expected["images"]).logits, "logits")
    same(chat.get_video_features(expected["chat_videos"]).pooler_output[0], "tokens")
    processor = AutoProcessor.from_pretrained("llava", **trust)
    print(processor.video_token, *(type(thing).__module__.split(".")[0] for thing in (model, chat, processor)))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(code: str, folder: Path) -> list[str]:
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_without_the_package(published):
    """As far as the old code runs: on transformers from 5.24 its LLaVA answers about images, and not about videos."""
    shape, rest = run(ABSENT + "trust = {'trust_remote_code': True}\n" + COMPARE, published)[-2:]
    assert shape == "(1, 4, 3, 16, 16)"
    assert rest == "<video>" + " transformers_modules" * 3


def test_with_the_package(published):
    """Whose own code is used, so that videos work too."""
    imports = "import torch, bt_adapter_hf\nfrom safetensors.torch import load_file\n"
    imports += "from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor\ntrust = {}\n"
    video = """
with torch.no_grad():
    ids = torch.where(expected["ids"] == chat.config.image_token_id, chat.config.video_token_id, expected["ids"])
    print(chat(input_ids=ids, pixel_values_videos=expected["chat_videos"]).logits.isfinite().all().item())
"""
    shape, rest, finite = run(imports + COMPARE + video, published)[-3:]
    assert (shape, finite) == ("(1, 4, 3, 16, 16)", "True")
    assert rest == "<video>" + " bt_adapter_hf" * 3
