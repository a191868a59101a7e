"""The outer loop of one run: iterations, validations, tests, and when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments import checkpoint
from experiments.ingredients.tasks import Tasks
from experiments.meta_learning import Diverged, Interval, MetaLearner, OuterStep
from experiments.peak_memory import peak_memory, process_peak
from experiments.tracking import record

_STATE = (
    "steps", "validations", "tests", "result", "seconds", "_validated_at", "diverged", "peak",
    "_records",
)  # fmt: skip


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


class Training:
    """One run: the outer loop with what it records.

    Args:
        run: Sacred's.
        learner: theta and its steps.
        tasks: the task sets.
        schedule: what to do when.
        seed: of the stream of training tasks; those of validation and test are the same for
            every run.
        folder: where checkpoints go.

    Attributes:
        steps: one entry for each outer iteration.
        validations: (iteration, score) pairs.
        tests: test score by outer iteration.
        result: the test score that counts, once it is there.
        seconds: of training so far, by the schedule's clock.
        diverged: the reason, if the run left the finite numbers.
        peak: bytes of live tensors, at most, in the measured steps.
    """

    def __init__(
        self,
        run: Any,
        learner: MetaLearner,
        tasks: Tasks,
        schedule: Schedule,
        seed: int,
        folder: Path,
    ) -> None:
        self.folder = folder
        self.run, self.learner, self.tasks, self.schedule = run, learner, tasks, schedule
        self._stream = tasks.stream("train", seed)
        self.steps: list[OuterStep] = []
        self.validations: list[tuple[int, Interval]] = []
        self.tests: dict[int, Interval] = {}
        self.result: Interval | None = None
        self.seconds = self._validated_at = 0.0
        self.diverged: str | None = None
        self.peak = 0
        self._records: list[tuple[dict[str, Any], int]] = []
        self._saved_at = time.monotonic()

    def loop(self) -> None:
        """All outer iterations, with a progress bar, and the test at the end."""
        with self._bar() as bar:
            bar.update(self._progress())
            while not self._finished() and self.diverged is None:
                try:
                    self._iterate()
                    self._look(bar)
                except Diverged as reason:
                    self._note_divergence(str(reason))
                bar.update(self._progress() - bar.n)
                self._save_if_due()
        if self.result is None:
            self.result = self._tested()

    def _bar(self) -> tqdm:  # type: ignore[type-arg]
        budget = self.schedule.budget
        silent = not self.learner.ranks.first
        if budget is None:
            total = self.schedule.iterations
            return tqdm(total=total, unit="iteration", desc="meta-training", disable=silent)
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of training [{elapsed}<{remaining}{postfix}]"
        return tqdm(total=budget, desc="meta-training", bar_format=form, disable=silent)

    def _progress(self) -> float:
        """Of the bar's total, which it must not pass."""
        budget = self.schedule.budget
        return len(self.steps) if budget is None else min(self.seconds, budget)

    def _finished(self) -> bool:
        schedule, done = self.schedule, len(self.steps)
        if done >= schedule.iterations:
            return True
        return self._spent() and done >= max(schedule.test_at, default=0)

    def _spent(self) -> bool:
        return self.schedule.budget is not None and self.seconds >= self.schedule.budget

    def _iterate(self) -> None:
        start, schedule, iteration = time.perf_counter(), self.schedule, len(self.steps) + 1
        episodes = [self._stream.sample() for _ in range(schedule.batch)]
        loading = time.perf_counter() - start
        if iteration % schedule.validate_every == 1 or schedule.validate_every == 1:
            self._measure_memory(iteration, episodes)
        step = self.learner.step(episodes)
        self.steps.append(step)
        self.seconds += step.cpu_seconds if schedule.cpu else step.seconds
        noted = {key: value for key, value in step._asdict().items() if value is not None}
        noted[f"query_{self.learner.measure.name}"] = noted.pop("query_score")
        values = {f"train/{name}": value for name, value in noted.items()}
        values["train/loading_seconds"] = loading
        values["train/process_peak_bytes"] = process_peak()
        self._record(values, iteration)

    def _measure_memory(self, iteration: int, episodes: list[Any]) -> None:
        """On a repetition of the step's gradient that is not timed: counting slows it down."""
        network = self.learner.algorithms.training.network()
        state = {name: buffer.clone() for name, buffer in network.named_buffers()}
        device = self.learner.device
        with self.learner.ranks.together(Diverged):
            peak = peak_memory(lambda: self.learner.hypergradient(episodes), device)
        self.peak = max(self.peak, peak)
        for name, buffer in network.named_buffers():
            buffer.copy_(state[name])
        self._record({"train/step_peak_bytes": peak}, iteration)

    def _look(self, bar: Any) -> None:
        """Validate and test where it is due."""
        schedule, done = self.schedule, len(self.steps)
        due = done % schedule.validate_every == 0
        if schedule.validate_seconds is not None:
            due = self.seconds - self._validated_at >= schedule.validate_seconds
        ends = self._spent() and self.result is None
        if due or ends or self._finished():
            score = self._validate()
            bar.set_postfix_str(f"validation {self.learner.measure.show(score)}")
        if ends:
            self.result = self._tested()
        if done in schedule.test_at and done not in self.tests:
            self._tested()

    def _validate(self) -> Interval:
        start, iteration, name = time.perf_counter(), len(self.steps), self.learner.measure.name
        stream, number = self.tasks.stream("validation", 0), self.schedule.validation_tasks
        score = self.learner.evaluate(stream, number, _quiet)
        self.validations.append((iteration, score))
        self._validated_at = self.seconds
        values = {
            name: score.mean,
            "half_width": score.half_width,
            "seconds": time.perf_counter() - start,
            "training_seconds": self.seconds,
        }
        self._record({f"validation/{k}": v for k, v in values.items()}, iteration)
        return score

    def _tested(self) -> Interval:
        """The test score at this iteration, recorded."""
        iteration, name = len(self.steps), self.learner.measure.name
        if iteration not in self.tests:
            stream, number = self.tasks.stream("test", 0), self.schedule.test_tasks
            try:
                score = self.learner.evaluate(
                    stream, number, _bar if self.learner.ranks.first else _quiet
                )
            except Diverged as reason:
                self._note_divergence(str(reason))
                score = Interval(math.nan, math.nan)
            self.tests[iteration] = score
            values = {name: score.mean, "half_width": score.half_width,
                      "training_seconds": self.seconds}
            self._record({f"test/{k}": v for k, v in values.items()}, iteration)
        return self.tests[iteration]

    def _note_divergence(self, reason: str) -> None:
        """A run that diverges has a result too: that of the last finite theta."""
        if self.diverged is None:
            self.diverged = f"at outer iteration {len(self.steps) + 1}: {reason}"
            if self.learner.ranks.first:
                tqdm.write(f"diverged {self.diverged}")

    def _record(self, values: dict[str, Any], iteration: int) -> None:
        self._records.append((values, iteration))
        record(self.run, values, iteration)

    def _save_if_due(self) -> None:
        due = time.monotonic() - self._saved_at >= self.schedule.checkpoint_seconds
        if due and self.learner.ranks.first:
            checkpoint.save(self.folder, self.state_dict())
            self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, and all that was recorded."""
        state = {name: getattr(self, name) for name in _STATE}
        journal = getattr(self.run, "journal", None)
        state["token"] = None if journal is None else journal.token
        return {**state, "learner": self.learner.state_dict(), "stream": self._stream.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what was recorded before it is recorded again, for this run."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.learner.load_state_dict(state["learner"])
        self._stream.state = state["stream"]
        for values, iteration in self._records:
            record(self.run, values, iteration)


def _quiet(items: Iterable[int]) -> Iterable[int]:
    return items


def _bar(items: Iterable[int]) -> Iterable[int]:
    return tqdm(items, unit="task", desc="meta-testing", leave=False)
