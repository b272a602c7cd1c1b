import logging
import sys

import pytest

from bt_adapter_hf.import_utils import is_available, require_package


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
    with pytest.raises(ImportError, match=r"'no_such_package_at_all'.*pip install 'bt_adapter_hf\[train\]'"):
        require_package("no_such_package_at_all", "train")
    require_package("json", "train")


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
