"""The steps of a compression."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resuscitate.workflows.stages import stages


def schedule(sparsity, steps):
    return list(stages(sparsity, steps, "unstructured"))


@example(sparsity=8.752166216043719e-16, steps=9)
@given(sparsity=st.floats(0, 0.999), steps=st.integers(1, 12))
def test_it_ascends_to_the_sparsity_in_at_most_so_many_steps(sparsity, steps):
    stops = schedule(sparsity, steps)
    assert stops == sorted(stops)
    assert stops[-1] == sparsity
    assert len(stops) == (steps if sparsity else 1) or sparsity < 1e-6  # where steps round to one another
    assert len(stops) == 1 or stops[0] == pytest.approx(sparsity / 2)


def test_each_step_keeps_the_same_fraction():
    kept = [1 - stop for stop in schedule(0.9, 5)]
    assert [b / a for a, b in pairwise(kept)] == pytest.approx([(0.1 / 0.55) ** 0.25] * 4)
    assert schedule(0.3, 3) == pytest.approx([0.15, 1 - (0.85 * 0.7) ** 0.5, 0.3])


def test_stops_may_be_given():
    assert schedule(0.8, [0.3, 0.6, 0.8]) == [0.3, 0.6, 0.8]
    for wrong in ([], [0.6, 0.3, 0.8], [0.3, 0.9], [0.8, 0.8]):
        with pytest.raises(ValueError, match=r"must ascend to sparsity=0\.8"):
            schedule(0.8, wrong)
    for wrong in (0, -1, True):
        with pytest.raises(ValueError, match="must be at least 1"):
            schedule(0.8, wrong)
    with pytest.raises(TypeError, match="give a float"):
        schedule(1, 3)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "steps", "expected"),
    [
        ("2:4", 0.5, 7, {0.25: "3:4", 0.5: "2:4"}),
        ("1:4", 0.75, 7, {0.25: "3:4", 0.5: "2:4", 0.75: "1:4"}),
        ("1:4", 0.75, 2, {0.25: "3:4", 0.75: "1:4"}),
        ("1:4", 0.75, 1, {0.75: "1:4"}),
        ("1:4", 0.75, [0.5, 0.75], {0.5: "2:4", 0.75: "1:4"}),
        ("1:3", 0.6666666666666667, 1, {1 - 1 / 3: "1:3"}),
    ],
)
def test_n_of_m_goes_by_fewer_and_fewer_of_m(pattern, sparsity, steps, expected):
    assert stages(sparsity, steps, pattern) == expected


def test_sparsities_that_n_of_m_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"pattern 2:4 keeps 2 of 4: give sparsity=0\.5"):
        stages(0.8, 3, "2:4")
    with pytest.raises(ValueError, match=r"1:4 is reached by the sparsities 0\.25, 0\.5, 0\.75"):
        stages(0.75, [0.3, 0.75], "1:4")
