"""Makes mistakes in copies of the library and shows which tests notice them.

Each mutation replaces one piece of text in one file. Words on the command line choose mutations by
part of their name. Exit status 1 if a mutation survives, does not apply any more (the text is gone,
or there twice) or is no valid Python, or if the tests fail without any. Takes minutes, so it is no
test itself; `tox -e mutations` runs it in an environment that has what it needs.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("l2l_implicit", "experiments", "tests", "pyproject.toml")
TIMEOUT = 1800.0
SPAN = "span::test_the_coordinates_keep_objective_gradient_and_products"
CLOSED = "linear_head::test_closed_form_equals_the_general_path"
BASIC = (
    "hypergradient::test_ridge_by_hand "
    "hypergradient::test_implicit_unrolled_and_finite_differences_meet "
    "hypergradient::test_a_loss_is_linearized_where_it_was_computed learner"
)
HEAD = "| mutation | where | caught by (the first three functions) | cases |\n|---|---|---|---|"


class Mutation(NamedTuple):
    """A mistake: ``old`` becomes ``new`` in ``file``; ``tests`` are FILE or FILE::NAME."""

    name: str
    file: str
    old: str
    new: str
    tests: str


class Outcome(NamedTuple):
    """The tests that failed, or why there is no answer."""

    failed: list[str]
    problem: str = ""


MUTATIONS = (
    Mutation(
        "the mixed product's sign", "implicit_diff.py",
        "mixed_vjp(-v)", "mixed_vjp(v)", BASIC,
    ),
    Mutation(
        "no regulariser in the Hessian product", "inner_problem/regularizer.py",
        "return product.add(vector, alpha=self._coefficient)", "return product", BASIC,
    ),
    Mutation(
        "CG with beta = 0", "linear_solvers/conjugate_gradient.py",
        "zeta = rr / rr_before", "zeta = 0.0", "linear_solve",
    ),
    Mutation(
        "CG with beta inverted", "linear_solvers/conjugate_gradient.py",
        "zeta = rr / rr_before", "zeta = rr_before / rr if rr else 0.0", "linear_solve",
    ),
    Mutation(
        "linearized at the start, closed form", "inner_solvers/inner_loop.py",
        "objective.linearize(point, True), at)", "objective.linearize(at.point, True), at)", "span",
    ),
    Mutation(
        "linearized beside phi, general path", "inner_solvers/inner_loop.py",
        "linearize(vector, hvp or last)", "linearize(0.9 * vector, hvp or last)", BASIC,
    ),
    Mutation(
        "features detached, closed form", "inner_problem/linear_head.py",
        "else [self.features.source]", "else [self.features.source.detach()]", CLOSED,
    ),
    Mutation(
        "features detached, general path", "inner_problem/linearization.py",
        "marked = [node.saved_tensors[0] for", "marked = [node.saved_tensors[0].detach() for",
        BASIC,
    ),
    Mutation(
        "the gradient in l2 without the anchor", "inner_problem/regularizer.py",
        "self._offset(point).dot(vector)", "point.dot(vector)", BASIC + " learner_theta",
    ),
    Mutation(
        "the anchor's sign", "inner_problem/regularizer.py",
        "unflatten(vector * -self._coefficient", "unflatten(vector * self._coefficient",
        BASIC,
    ),
    Mutation(
        "a mixed product without its curvature", "inner_problem/linear_head.py",
        " + change @ self._weight(self.point)]", "]", CLOSED,
    ),
    Mutation(
        "softmax without its coupling of classes", "inner_problem/linear_losses.py",
        "return change.addcmul_(self._p, change.sum(1, keepdim=True), value=-1.0)",
        "return change", CLOSED,
    ),
    Mutation(
        "phi of the loss counted as theta", "inner_problem/boundary.py",
        "ctx.inner = True", "ctx.inner = False", BASIC + " learner_theta",
    ),
    Mutation(
        "span: what lies beyond it forgotten", "inner_problem/span.py",
        ".addcmul_(self._e, matrix[0, -1])", "", SPAN,
    ),
    Mutation(
        "span: the direction uphill", "inner_problem/span.py",
        "return direction.squeeze(1).neg_()", "return direction.squeeze(1)", SPAN,
    ),
    Mutation(
        "span: no bias on the way back", "inner_problem/support_features.py",
        "reshape(-1), weights[:,", "reshape(-1), 0 * weights[:,", SPAN,
    ),
    Mutation(
        "Newton: every step accepted", "inner_solvers/newton.py",
        "return now > last.objective + self._ARMIJO * self._length * last.slope", "return False",
        "diagnostics solvers inner_steps hypergradient_rules",
    ),
    Mutation(
        "Newton: the stand-in step uphill", "inner_solvers/newton.py",
        "return -self._gradient_step(at)", "return self._gradient_step(at)",
        "inner_steps solvers",
    ),
    Mutation(
        "the series' residual half updated", "linear_solvers/neumann_series.py",
        "r.sub_(product, alpha=alpha)", "r.sub_(product, alpha=0.5 * alpha)", "solvers",
    ),
    Mutation(
        "curvature from below", "linear_solvers/curvature.py",
        "largest = abs(ritz) + norm * last", "largest = ritz + norm * last", "linear_solvers",
    ),
    Mutation(
        "batched: the mixed product's sign", "batched/implicit_diff.py",
        "-answer.solution)", "answer.solution)", "batched_head",
    ),
    Mutation(
        "batched: no regulariser in the product", "batched/objective.py",
        "return self.objective.in_phi(change).add_(self.objective.l2 * vector)",
        "return self.objective.in_phi(change)", "batched_head",
    ),
    Mutation(
        "batched: no refinement", "batched/linear_solve.py",
        "v = v + self.solve_once(b - self._at.hvp(v))", "v = v + 0.0", "batched_direct_solve",
    ),
    Mutation(
        "batched: CG with beta = 0", "batched/linear_solve.py",
        "torch.where(self.active, rr / self.rr, 0.0)", "torch.where(self.active, 0.0 * rr, 0.0)",
        "batched_head",
    ),
    Mutation(
        "batched: one task's anchor for all", "batched/objective.py",
        "return -self.objective.l2 * vector.sum(0)", "return -self.objective.l2 * vector[0]",
        "batched_head",
    ),
    Mutation(
        "chunked: nothing computed twice", "chunked.py",
        "self._run_twice if torch.is_grad_enabled() else self.backbone", "self.backbone", "chunked",
    ),
    Mutation(
        "chunked: statistics updated twice", "module_state.py",
        "return [t._replace(buffers={**t.buffers, **_copies(written)}) for t, written in pairs]",
        "return [t for t, written in pairs]", "chunked",
    ),
    Mutation(
        "baselines: every step first-order", "baselines/unrolled.py",
        "if keep and not first_order else", "if False else", "baselines_unrolled",
    ),
    Mutation(
        "baselines: ITD-BiO learns the start", "baselines/unrolled.py",
        "self._links_to_initial = learn_init", "self._links_to_initial = True",
        "baselines_unrolled",
    ),
    Mutation(
        "baselines: Reptile's sign", "baselines/reptile.py",
        "way = weight * (initial - adapted)", "way = weight * (adapted - initial)",
        "baselines_reptile",
    ),
    Mutation(
        "FOMAML: a step twice as long", "inner_solvers/first_order.py",
        "p - lr * g", "p - 2 * lr * g", "first_order",
    ),
    Mutation(
        "warm start: v forgotten", "adaptation.py",
        "start = None if before is None else before.v", "start = None", "warm_start",
    ),
    Mutation(
        "damping: none", "adaptation.py",
        "damped(at.hvp, self.damping)", "at.hvp", "damping::test_the_damped_system_is_solved",
    ),
    Mutation(
        "an unsolved inner problem not counted", "diagnostics.py",
        "bad_inner = not residual <= limits.inner", "bad_inner = False", "diagnostics",
    ),
    Mutation(
        "autocast: features stay half", "inner_problem/boundary.py",
        "wide = widened(source, dtype)", "wide = source", "mixed_precision",
    ),
)  # fmt: skip


def line_of(mutation: Mutation) -> int:
    """The line that a mutation changes.

    Raises:
        ValueError: the text is not there exactly once, or would not be Python afterwards.
    """
    source = (ROOT / "l2l_implicit" / mutation.file).read_text(encoding="utf-8")
    if (times := source.count(mutation.old)) != 1:
        raise ValueError(f"expected {mutation.old!r} once in {mutation.file}, got {times} of it")
    try:
        ast.parse(source.replace(mutation.old, mutation.new))
    except SyntaxError as error:
        raise ValueError(f"expected Python after the mutation, got {error}") from None
    return source[: source.index(mutation.old)].count("\n") + 1


def copy(folder: Path) -> None:
    """The library and its tests, and nothing that an earlier run left."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def failures(folder: Path, tests: Iterable[str]) -> Outcome:
    """What pytest says in a copy."""
    parts = [name.partition("::") for name in tests]
    chosen = [f"tests/test_{file}.py{colons}{test}" for file, colons, test in parts]
    options = ["-q", "--tb=no", "-rfE", "--assert=plain", "-p", "no:cacheprovider"]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *chosen],
            cwd=folder, env=kept, text=True, capture_output=True, timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome([], f"no end within {TIMEOUT:.0f} s")
    if done.returncode not in (0, 1):
        return Outcome([], f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
    return Outcome(re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.M))


def outcome(mutation: Mutation) -> Outcome:
    """The tests that fail in a copy with the mutation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        file = folder / "l2l_implicit" / mutation.file
        source = file.read_text(encoding="utf-8")
        file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        return failures(folder, mutation.tests.split())


def without_mutation(tests: set[str]) -> Outcome:
    """The tests that fail anyway; there must be none, or failures would mean nothing."""
    with tempfile.TemporaryDirectory() as name:
        copy(Path(name))
        return failures(Path(name), sorted(tests))


def row(mutation: Mutation) -> tuple[str, bool]:
    """The row of the table, and whether tests caught the mutation."""
    try:
        where = f"{mutation.file}:{line_of(mutation)}"
        failed, problem = outcome(mutation)
    except ValueError as error:
        where, failed, problem = mutation.file, [], str(error)
    functions = dict.fromkeys(name.partition("[")[0].partition("::")[2] for name in failed)
    text = ", ".join(f"`{name}`" for name in [*functions][:3]) or f"**{problem or 'SURVIVED'}**"
    return f"| {mutation.name} | {where} | {text} | {len(failed)} |", bool(failed)


def main() -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="parts of the names of mutations; none: all")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.words or any(w in m.name for w in options.words)]
    with ThreadPoolExecutor(options.jobs) as pool:
        intact = pool.submit(without_mutation, {t for m in chosen for t in m.tests.split()})
        rows = pool.map(row, chosen)
        print(HEAD, flush=True)
        caught = []
        for text, was_caught in rows:
            print(text, flush=True)
            caught.append(was_caught)
    print(f"\n{sum(caught)} of {len(caught)} mutations caught")
    if any(intact.result()):
        print(f"expected the tests to pass without a mutation, got {intact.result()}")
        return 1
    return 0 if all(caught) and caught else 1


if __name__ == "__main__":
    sys.exit(main())
