from __future__ import annotations

import torch

from workers.transfer.ready import Ready, StepReady

CPU = torch.device("cpu")


class Later(Ready):
    """A point that passes when it is told to, as CUDA's do."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._passed = False

    def happen(self) -> None:
        self._passed = True


def test_layers_may_be_read_only_after_the_points_at_which_they_were_computed() -> None:
    step, first, second = StepReady(5), Later(), Later()
    step.reach(2, first)
    step.reach(5, second)
    assert (step.readable, step.over) == (0, False)
    first.happen()
    assert (step.readable, step.over) == (2, False)
    second.happen()
    assert (step.readable, step.over) == (5, True)


def test_a_step_that_is_told_of_as_a_whole_has_no_layer_that_may_be_read_before() -> None:
    end = Later()
    step = StepReady.whole(5, end)
    assert step.readable == 0
    end.happen()
    assert step.readable == 5
