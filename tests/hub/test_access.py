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
