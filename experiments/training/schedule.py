"""What a run does when."""

from __future__ import annotations

from typing import NamedTuple


class Schedule(NamedTuple):
    """What a run does when.

    Attributes:
        iterations: the most outer iterations.
        batch: tasks an outer iteration, |B|.
        validate_every: outer iterations between validations.
        validate_seconds: seconds of training between validations instead; or None.
        validation_tasks, test_tasks: how many.
        test_at: outer iterations at which the test score is recorded besides.
        budget: seconds of training after which the test score is the run's result; the run goes
            on to the last of ``test_at``. None: the result is that of the last iteration.
        cpu: count seconds of the process's own time, not of the wall's.
        checkpoint_seconds: of the wall, between checkpoints.
        early_stopping: test, besides, theta of the best validation before the result.
    """

    iterations: int
    batch: int
    validate_every: int
    validate_seconds: float | None
    validation_tasks: int
    test_tasks: int
    test_at: tuple[int, ...]
    budget: float | None
    cpu: bool
    checkpoint_seconds: float
    early_stopping: bool = False

    def tasks(self, mode: str) -> int:
        """How many tasks a score on ``validation`` or ``test`` is the mean of."""
        return {"validation": self.validation_tasks, "test": self.test_tasks}[mode]
