"""The map goes on from its file, and refuses that of another one."""

from functools import partial

import pytest

from resuscitate import (
    Accuracy,
    recoverability,
)
from resuscitate.errors import JournalError, ResuscitateError
from tests.networks import chain, images, seeded
from tests.resuscitate.workflows.maps import GRID, Likeness


def scaled(model, batch, by):
    return model(batch * by)


class TestResume:
    def test_a_cell_that_is_done_is_not_done_again(self, tmp_path):
        dense, journal = seeded(chain), tmp_path / "map.journal"
        with pytest.raises(ResuscitateError, match=r"none at sparsity 0\.8, allocation global: the disk is full"):
            recoverability(dense, images(), Likeness(dense, fail_at=8), **GRID, resume=journal)
        rest = Likeness(dense)
        found = recoverability(dense, images(), rest, **GRID, resume=journal)
        assert rest.calls == 1 + 6  # the dense model, and the second half of the cells
        whole = recoverability(dense, images(), Likeness(dense), **GRID)
        assert [c.score for c in found.cells] == [c.score for c in whole.cells]

    def test_a_larger_map_adds_to_what_is_there(self, tmp_path):
        dense, journal = seeded(chain), tmp_path / "map.journal"
        recoverability(dense, images(), Likeness(dense), **GRID, resume=journal)
        more = Likeness(dense)
        grid = GRID | {"sparsities": [0.5, 0.8, 0.9]}
        assert len(recoverability(dense, images(), more, **grid, resume=journal).cells) == 18
        assert more.calls == 1 + 6

    def test_another_model_other_images_or_another_score_is_refused(self, tmp_path):
        dense, journal = seeded(chain), tmp_path / "map.journal"
        recoverability(dense, images(), Likeness(dense), **GRID, resume=journal)
        other = seeded(chain, seed=3)
        for model, x, score in (
            (other, images(), Likeness(other)),
            (dense, images(seed=9), Likeness(dense)),
            (dense, images(), Likeness(other)),
        ):
            with pytest.raises(JournalError, match="the journal of another run"):
                recoverability(model, x, score, **GRID, resume=journal)

    def test_another_option_is_refused_and_the_message_names_it(self, tmp_path):
        dense, journal = seeded(chain), tmp_path / "map.journal"
        grid = {"sparsities": [0.5], "allocations": ["erk"], "methods": ["bn"], "resume": journal}
        first = {"forward_fn": lambda m, x: m(x)}
        recoverability(dense, images(), Likeness(dense), **grid, **first)
        for name, value in (
            ("forward_fn", lambda m, x: m(x + 1)),
            ("seed", 1),
            ("dtype", "bf16"),
            ("exclude", "0"),
            ("include", ["3"]),
            ("pattern", "filter"),
        ):
            with pytest.raises(JournalError, match=rf"options \({name}\) differ"):
                recoverability(dense, images(), Likeness(dense), **{**grid, **first, name: value})
        again = Likeness(dense)
        recoverability(dense, images(), again, **grid, **first)
        assert again.calls == 1

    def test_images_in_another_order_and_other_labels_are_refused(self, tmp_path):
        dense, journal, x = seeded(chain), tmp_path / "map.journal", images(20)
        labels = dense(x).argmax(1)
        grid = {"sparsities": [0.5], "allocations": ["erk"], "methods": ["bn"], "resume": journal}
        recoverability(dense, images(), Accuracy(x, labels), **grid)
        with pytest.raises(JournalError, match="images differ"):
            recoverability(dense, images().flip(0), Accuracy(x, labels), **grid)
        # all right too, but on fewer images
        with pytest.raises(JournalError, match="evaluate differ"):
            recoverability(dense, images(), Accuracy(x[:9], labels[:9]), **grid)

    def test_methods_that_differ_in_a_function_are_different_cells(self, tmp_path):
        dense, score = seeded(chain), Likeness(seeded(chain))
        grid = {"sparsities": [0.5], "allocations": ["erk"], "resume": tmp_path / "map.journal"}
        for by, calls in ((1.0, 2), (1.0, 3), (2.0, 5)):
            run = partial(scaled, by=by)
            recoverability(dense, images(), score, **grid, methods={"mine": {"method": "asr", "forward_fn": run}})
            assert score.calls == calls
