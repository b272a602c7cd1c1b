"""The page, served once for all tests of this folder."""

import argparse

import pytest

from bt_adapter_hf.cli.demo import gather
from bt_adapter_hf.cli.main import build_parser


def arguments(*options: str) -> argparse.Namespace:
    return build_parser(["demo"]).parse_args(["demo", "--port", "0", "--device", "cpu", *options])


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The page on its default models, with limits: (material, address, folder of uploads)."""
    pytest.importorskip("sklearn")
    pytest.importorskip("gradio")
    from bt_adapter_hf.demo.page import serve

    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        material = gather(arguments("--max-upload", "1", "--max-seconds", "20", "--max-files", "2"), folder)
        with serve(material, "127.0.0.1", 0) as address:
            yield material, address, folder / "uploads"
