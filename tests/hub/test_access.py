import pytest
from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError

from bt_adapter_hf.hub import access
from bt_adapter_hf.hub.access import explain, http_cause, retried


def test_an_error_that_is_its_own_cause_has_an_end():
    first, second = OSError("first"), ValueError("second")
    first.__context__, second.__cause__ = second, first
    assert http_cause(first) is None and explain(second, "org/name") == "second"


def test_what_may_be_over_soon_is_tried_again(caplog):
    calls = []

    def call():
        calls.append(1)
        if len(calls) < 3:
            raise OSError(f"failure {len(calls)}.")
        return "found"

    waits = {"waits": [0.0, 0.0], "again": lambda error: isinstance(error, OSError)}
    assert retried(call, "Asking", **waits) == "found"
    assert [record.getMessage() for record in caplog.records] == [
        "Asking: failure 1. Next try in 0 s.",
        "Asking: failure 2. Next try in 0 s.",
    ]


@pytest.mark.parametrize(
    "cause, said",
    [
        (None, "was not to be fetched: load it once online"),
        (
            FileMetadataError("Distant resource has no ETag."),
            "could not be fetched (Distant resource has no ETag): try",
        ),
        (OSError(), "could not be fetched (OSError): try later"),
    ],
)
def test_why_a_file_is_not_in_the_cache(cause, said, monkeypatch):
    monkeypatch.setattr(access, "is_offline_mode", lambda: False)
    error = LocalEntryNotFoundError("no connection")
    error.__cause__ = cause
    assert said in explain(error, "org/name")
