"""benchmarks/pretrain_step.py at its tiny size, and what it counts."""

import re

import pytest

from benchmarks.pretrain_step import SIZES, TEXT_LENGTH, main, step_flops


@pytest.mark.parametrize("name", ["tiny", "l14"])
def test_flops_are_those_of_the_formula(name):
    """Matrix products only: both towers forward, the branch on the kept patches forward and twice backward."""
    size, T, mask = SIZES[name], 8, 0.7

    def layers(sizes, rows, n):
        D, hidden = sizes["hidden_size"], sizes["intermediate_size"]
        return sizes["num_hidden_layers"] * rows * (2 * n * (4 * D * D + 2 * D * hidden) + 4 * n * n * D)

    vision = size["vision"]
    D, N = vision["hidden_size"], (size["image_size"] // size["patch_size"]) ** 2
    frozen = layers(vision, T, N + 1) + 2 * T * N * 3 * size["patch_size"] ** 2 * D
    frozen += layers(size["text"], 1, TEXT_LENGTH)
    M = N - int(mask * N)
    temporal = 2 * T * M * 5 * D * D + 4 * T * M * T * D
    spatial = 2 * T * (M + 1) * 4 * D * D + 4 * T * (M + 1) ** 2 * D
    spatial += 2 * (T * M + 1) * 2 * D * vision["intermediate_size"]
    branch = size["K"] * (temporal + spatial) + 2 * T * M * D * size["projection_dim"]  # and the alignment head
    expected = frozen + 2 * T * M * D * size["projection_dim"] + 3 * branch  # the teacher is projected without a graph
    assert step_flops(size, 16, T, mask) / 16 == pytest.approx(expected, rel=0.02)


def test_it_runs_on_a_cpu(capsys):
    main(["--size", "tiny", "--device", "cpu", "--batch", "8", "--repeats", "1"])
    number = r" +([\d.]+)"
    rows = re.findall(rf"^ *(\w+){number * 3}%{number * 4}$", capsys.readouterr().out, re.MULTILINE)
    rows = {name: tuple(map(float, values)) for name, *values in rows}
    assert rows.keys() == {"plain", "checkpointed", "cached"}
    for seconds, per_second, _, _, _, _, hours in rows.values():
        assert per_second == pytest.approx(8 / seconds, rel=0.1)
        assert hours == pytest.approx(2.5e6 / per_second / 3600, rel=0.1)
    assert rows["plain"][5] == 1.0 and rows["cached"][5] < 0.4 and rows["checkpointed"][5] < 0.6
