import json
import logging
import sys

import pytest

from bt_adapter_hf.import_utils import install_command, is_available, require_package


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    """A package that is installed and raises on import, as a decoder without its shared libraries does."""
    name = "broken_decoder_of_the_test"
    (tmp_path / f"{name}.py").write_text("raise OSError('libavutil.so.60: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_available_and_missing():
    assert is_available("json")
    assert not is_available("no_such_package_at_all")
    assert not is_available("json.no_such_module")


def test_missing_package_names_our_extra():
    with pytest.raises(ImportError, match=r"'no_such_package_at_all'.*not installed: pip install .*\[train\]'"):
        require_package("no_such_package_at_all", "train")
    require_package("json", "train")


@pytest.mark.parametrize(
    ("noted", "command"),
    [
        (None, "pip install -e '.[train]' in the clone of bt_adapter_hf"),
        (
            {"url": "file:///my%20work/bt", "dir_info": {"editable": True}},
            "pip install -e '.[train]' in the clone of bt_adapter_hf (/my work/bt)",
        ),
        ({"url": "file:///w/bt", "dir_info": {}}, "pip install '.[train]' in the clone of bt_adapter_hf (/w/bt)"),
        (
            {"url": "https://x.org/bt.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            "pip install 'bt_adapter_hf[train] @ git+https://x.org/bt.git@c0ffee'",
        ),
        (
            {"url": "file:///w/bt_adapter_hf-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'bt_adapter_hf[train] @ file:///w/bt_adapter_hf-0.1.0-py3-none-any.whl'",
        ),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came_from(tmp_path, monkeypatch, noted, command):
    """As pip notes it beside an installed package; there is no release on PyPI that a hint could name."""
    info = tmp_path / "bt_adapter_hf-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bt_adapter_hf\nVersion: 0.1.0\n")
    if noted is not None:
        (info / "direct_url.json").write_text(json.dumps(noted))
    monkeypatch.syspath_prepend(tmp_path)
    assert install_command("train") == command


def test_broken_package_is_unavailable_and_its_cause_is_told(broken_package, caplog):
    with caplog.at_level(logging.WARNING):
        assert not is_available(broken_package)
        assert not is_available(broken_package)
    assert [record.getMessage() for record in caplog.records] == [
        f"'{broken_package}' is installed but does not import "
        "(OSError: libavutil.so.60: cannot open shared object file)"
    ]
    with pytest.raises(ImportError, match="installed but does not import.*libavutil.*bt-adapter env"):
        require_package(broken_package, "demo")
