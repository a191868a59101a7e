"""The mistakes that tests/mutations.py makes, and the tests that are to notice them."""

from typing import NamedTuple

SPAN = "span::test_the_coordinates_keep_objective_gradient_and_products"
CLOSED = "linear_head::test_closed_form_equals_the_general_path"
BASIC = (
    "hypergradient::test_ridge_by_hand "
    "hypergradient::test_implicit_unrolled_and_finite_differences_meet "
    "hypergradient::test_a_loss_is_linearized_where_it_was_computed learner"
)


class Mutation(NamedTuple):
    """A mistake: ``old`` becomes ``new`` in ``file``; ``tests`` are FILE or FILE::NAME."""

    name: str
    file: str
    old: str
    new: str
    tests: str


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
