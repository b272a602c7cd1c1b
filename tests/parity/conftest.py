"""`compare` checks a quantity against the released code and keeps a line for the table that `pytest -s` prints."""

import pytest
import torch


_ROWS = pytest.StashKey[list]()


@pytest.fixture
def compare(request):
    rows = request.config.stash.setdefault(_ROWS, [])

    def check(
        case: str,
        quantity: str,
        found,
        expected,
        *,
        absolute: float | None = None,
        of_maximum: float | None = None,
        relative: float | None = None,
    ):
        """One tolerance: of the largest difference, of it over the largest value, or of the difference's norm."""
        found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
        assert found.shape == expected.shape, f"{case} {quantity}: {tuple(found.shape)} != {tuple(expected.shape)}"
        assert expected.numel() and expected.isfinite().all()
        difference = found - expected
        if absolute is not None:
            kind, error, tolerance = "max abs", difference.abs().max(), absolute
        elif of_maximum is not None:
            kind, error, tolerance = "of max", difference.abs().max() / expected.abs().max(), of_maximum
        else:
            kind, error, tolerance = "relative", difference.norm() / expected.norm(), relative
        rows.append((case, quantity, kind, float(error), tolerance))
        assert error <= tolerance, f"{case} {quantity}: {kind} error {error:.2e} > {tolerance:.0e}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_ROWS, [])
    if not rows or config.option.capture != "no":
        return
    terminalreporter.section("parity with the released code")
    worst = {}
    for case, quantity, kind, error, tolerance in rows:
        key = (case, quantity, kind)
        worst[key] = max(worst.get(key, (0.0, tolerance)), (error, tolerance))
    widths = [max(len(key[i]) for key in worst) for i in range(2)]
    for (case, quantity, kind), (error, tolerance) in worst.items():
        terminalreporter.line(
            f"{case:<{widths[0]}}  {quantity:<{widths[1]}}  {kind:<8}  {error:9.1e}  (tolerance {tolerance:.0e})"
        )
