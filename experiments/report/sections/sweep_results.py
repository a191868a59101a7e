"""One section for each sweep and benchmark that has runs."""

from __future__ import annotations

from experiments.report.content import Figure, Section, Source, Table, file_name
from experiments.report.learning_curves import curve_caption, curve_records, draw_curves
from experiments.report.request import Request
from experiments.report.sections.accuracy import accuracy_table, cost_table
from experiments.report.sections.accuracy_figure import accuracy_figure
from experiments.report.sections.accuracy_summary import summary_table
from experiments.report.sections.grid import grid_table
from experiments.report.sections.missing import missing_table
from experiments.report.sections.time_to import time_table
from experiments.report.sweep_state import DONE, SweepState


def sections(request: Request) -> list[Section]:
    """Accuracy, cost, curves, time to accuracy, the grids, and what is missing."""
    return [_section(state, request) for state in request.started()]


def _section(state: SweepState, request: Request) -> Section:
    items: list[Table | Figure | None] = [
        accuracy_table(state, request),
        accuracy_figure(state, request),
        _figure(state, request),
        time_table(state, request),
        cost_table(state, request),
        summary_table(state, request),
        missing_table(state),
        grid_table(state, request.archive),
    ]
    done = sum(cell.state == DONE for cell in state.cells)
    text = f"{done} of {len(state.cells)} cells are complete."
    kept = tuple(item for item in items if item is not None)
    return Section(f"{state.benchmark}, sweep {state.name}", (text,), kept)


def _figure(state: SweepState, request: Request) -> Figure | None:
    found = {method.name: request.summaries(method.runs) for method in state.methods}
    curves = {name: runs for name, runs in found.items() if any(run.points for run in runs)}
    if not curves:
        return None
    runs = [run.run for of in curves.values() for run in of]
    budgets = {run.settings.get("budget") for run in runs}
    budget = budgets.pop() if len(budgets) == 1 else None
    absent = [name for name in found if name not in curves]
    dotted = " Dotted: the budget, where the test accuracy of the table is taken." if budget else ""
    return Figure(
        file_name("curves", state.name, state.benchmark),
        f"{state.benchmark}. {curve_caption(curves, 'accuracy')}{dotted}",
        lambda: draw_curves(curves, "accuracy", budget),
        curve_records(curves),
        Source(state.command(), tuple(run.id for run in runs)),
        (f"Missing: {', '.join(absent)}.",) if absent else (),
    )
