"""The mistakes that tests/mutations.py makes, and the tests that are to notice them."""

from typing import NamedTuple

DERIVATIVES = "linear_heads::test_derivatives_are_autograds"
MIXED = "linear_heads::test_mixed_products_are_autograds"
LOSSES = "linear_heads::test_value_gradient_and_curvature_of_the_loss"
GRAM = "linear_heads::test_the_gram_recursion_is_plain_gradient_descent"
CLOSED = "recognition::test_closed_form_equals_the_general_path"
ANEW = "closed_form::test_what_has_changed_is_solved_anew"
GENERAL = "closed_form::test_the_steps_are_those_of_the_general_path"
EACH = "test_each_task_has_its_own_numbers"
BOUND = "diagnostics::test_the_bound_holds_before_the_minimum"
ROUNDED = "diagnostics::test_the_bound_holds_for_rounded_numbers"
SECOND = "second_derivative::test_a_wrong_one_is_said"
ALONE = "together::test_newton_equals_the_dense_oracle recognition::test_every_loss_is_right"


class Mutation(NamedTuple):
    """A mistake: ``old`` becomes ``new`` in ``file``; ``tests`` are FILE or FILE::NAME."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    # Both paths.
    Mutation(
        "the mixed product's sign", "implicit_diff.py",
        "if product is None else product.neg()", "if product is None else product", ALONE,
    ),
    Mutation(
        "no regulariser in the Hessian product, closed form", "inner_problem/linear_heads.py",
        "return self.problem.in_phi(change).add_(vector, alpha=self.quadratic.strength)",
        "return self.problem.in_phi(change)", DERIVATIVES,
    ),
    Mutation(
        "no regulariser in the gradient, closed form", "inner_problem/linear_heads.py",
        "(self.loss.gradient).add_(offset, alpha=self.quadratic.strength)", "(self.loss.gradient)",
        DERIVATIVES,
    ),
    Mutation(
        "no regulariser in the Hessian product, general path", "inner_problem/linearization.py",
        "return product.add_(vector, alpha=self.quadratic.strength)", "return product", CLOSED,
    ),
    Mutation(
        "no regulariser in the gradient, general path", "inner_problem/linearization.py",
        "self._loss_gradient.add(offset, alpha=strength)", "self._loss_gradient", CLOSED,
    ),
    Mutation(
        "the anchor's sign", "inner_problem/linearization.py",
        "pull = vector.sum(0).mul_(-self.strength)", "pull = vector.sum(0).mul_(self.strength)",
        MIXED,
    ),
    Mutation(
        "one task's anchor for all", "inner_problem/linearization.py",
        "pull = vector.sum(0)", "pull = vector[0].clone()", MIXED,
    ),
    Mutation(
        "the gradient in l2 without the anchor", "inner_problem/linearization.py",
        "(self.offset(point) * vector).sum().to", "(point * vector).sum().to", MIXED,
    ),
    # Linear heads.
    Mutation(
        "features detached, closed form", "inner_problem/linear_heads.py",
        "return [*([] if source is None else [source]), *self.quadratic.sources()]",
        "return [*([] if source is None else [source.detach()]), *self.quadratic.sources()]",
        CLOSED,
    ),
    Mutation(
        "a mixed product without its curvature", "inner_problem/linear_heads.py",
        "product = torch.baddbmm(product, curved, self.problem.weights(self.point))", "", MIXED,
    ),
    Mutation(
        "a mixed product without the gradient", "inner_problem/linear_heads.py",
        "product = torch.bmm(self.loss.gradient, self.problem.weights(v))",
        "product = torch.bmm(0 * self.loss.gradient, self.problem.weights(v))", MIXED,
    ),
    Mutation(
        "no bias on the way back", "inner_problem/linear_heads.py",
        "torch.cat([weight, per_output.sum(1)], 1)",
        "torch.cat([weight, 0 * per_output.sum(1)], 1)", DERIVATIVES,
    ),
    Mutation(
        "no bias in the Gram matrix", "inner_problem/linear_heads.py",
        "return gram.add_(1.0) if self.bias else gram", "return gram",
        "linear_heads::test_minimum_is_the_dense_one",
    ),
    Mutation(
        "softmax without its coupling of classes", "inner_problem/losses.py",
        "return weighted.addcmul_(self.probabilities, total, value=-1.0).mul_(self.scale)",
        "return weighted.mul_(self.scale)", LOSSES,
    ),
    Mutation(
        "the softmax's inverse without its coupling", "inner_problem/losses.py",
        "return each.sub_((self._each * common.mT.unsqueeze(1)).sum(3)).mT", "return each.mT",
        "linear_heads::test_the_inverse_is_that_of_the_dense_matrix",
    ),
    Mutation(
        "the squared error's curvature halved", "inner_problem/losses.py",
        "return change * (2.0 * self.scale)", "return change * self.scale", LOSSES,
    ),
    Mutation(
        "the movement too small", "inner_problem/losses.py",
        "return math.sqrt(2.0) * change", "return change",
        "linear_heads::test_the_hessian_stays_within_the_movement",
    ),
    Mutation(
        "minimum stopped too early", "inner_problem/linear_heads.py",
        "small = largest < _NEAR and", "small = largest < 0.5 or",
        "linear_heads::test_minimum_is_the_dense_one",
    ),
    Mutation(
        "minimum takes every long step whole", "inner_problem/linear_heads.py",
        "        if bool(enough.all()):\n            return change, move",
        "        if True:\n            return change, move",
        "linear_heads::test_minimum_of_hostile_data "
        "linear_heads::test_minimum_where_long_steps_fail",
    ),
    Mutation(
        "minimum starts where the head is", "inner_problem/linear_heads.py",
        "base = problem.outputs(center.expand_as(self.point))",
        "base = problem.outputs(self.point)",
        "linear_heads::test_minimum_is_the_dense_one",
    ),
    Mutation(
        "no refinement in solve", "inner_problem/linear_heads.py",
        "q - residual + inverse(k_residual)", "q",
        "linear_heads::test_systems_at_the_minimum_are_solved",
    ),
    Mutation(
        "the chord step's inverse never renewed", "inner_problem/linear_heads.py",
        "if inverse is None or last > _NEAR:", "if inverse is None:",
        "linear_heads::test_minimum_is_the_dense_one linear_heads::test_minimum_of_hostile_data",
    ),
    Mutation(
        "one class's factor for all at every step", "inner_problem/linear_heads.py",
        "alike=not movements and center is None", "alike=True",
        "linear_heads::test_minimum_is_the_dense_one linear_heads::test_minimum_of_hostile_data",
    ),
    Mutation(
        "classes alike counted once", "inner_problem/losses.py",
        ".mul_(classes / probabilities.shape[2])", "",
        "linear_heads::test_the_inverse_where_all_classes_are_alike",
    ),
    Mutation(
        "the factor without the damping", "inner_problem/linear_heads.py",
        "problem, mu = self.problem, self.quadratic.strength + damping",
        "problem, mu = self.problem, self.quadratic.strength",
        "linear_heads::test_systems_at_the_minimum_are_solved",
    ),
    Mutation(
        "the Gram recursion without shrinking", "inner_solvers/gradient_descent.py",
        "shrink, tau, c = 1.0 - lr * quadratic.strength,", "shrink, tau, c = 1.0,", GRAM,
    ),
    Mutation(
        "the Gram recursion forgets the start", "inner_solvers/gradient_descent.py",
        "point = problem.in_phi(c).add_(drift_in_phi, alpha=tau)", "point = problem.in_phi(c)",
        GRAM,
    ),
    # Recognition.
    Mutation(
        "a loss with ignored targets recognised", "inner_problem/recognition.py",
        "if float(nll._saved_total_weight) != len(targets):", "if False:",
        "recognition::test_every_loss_is_right",
    ),
    Mutation(
        "targets of theta taken for constants", "inner_problem/recognition.py",
        "if of_target is not None or outputs.dim()", "if outputs.dim()",
        "recognition::test_every_loss_is_right",
    ),
    Mutation(
        "any scale of a linear map recognised", "inner_problem/recognition.py",
        "if bias and not linear._saved_alpha == linear._saved_beta == 1:", "if False:",
        "recognition::test_other_spellings_of_a_linear_map",
    ),
    Mutation(
        "features of phi taken for constants", "inner_problem/recognition.py",
        "if node in inner:", "if False:",
        "recognition::test_learner_fed_its_own_weight",
    ),
    Mutation(
        "a change in place goes unnoticed", "inner_problem/boundary.py",
        "ctx.save_for_backward(source)", "ctx.save_for_backward(source.data)",
        "closed_form::test_features_overwritten_before_adapt_are_refused",
    ),
    Mutation(
        "the quick path ignores changed weights", "learner.py",
        "return at if unmoved and at.quad", "return at if at.quad", ANEW,
    ),
    Mutation(
        "the quick path ignores changed targets", "inner_problem/recognition.py",
        "            and torch.equal(self.targets, other.targets)\n", "",
        ANEW + " closed_form::test_a_closure_that_draws_anew_is_asked_at_every_step",
    ),
    Mutation(
        "the quick path ignores changed features", "inner_problem/recognition.py",
        "            and torch.equal(self.x, other.x)\n", "", ANEW,
    ),
    Mutation(
        "the quick path ignores a changed l2", "inner_problem/linearization.py",
        "if self.strength != other.strength or self._l2 is not other._l2:", "if False:", ANEW,
    ),
    Mutation(
        "the quick path ignores a moved anchor", "inner_problem/linearization.py",
        "return self.center is None or torch.equal(self.center, other.center)", "return True", ANEW,
    ),
    Mutation(
        "the quick path ignores another history", "learner.py",
        "elif there.known.origin == known.origin and task", "elif task", ANEW,
    ),
    Mutation(
        "the quick path ignores another linear solver", "learner.py",
        "known.origin and task.linear == self.linear:", "known.origin:",
        "closed_form::test_another_linear_solver_is_that_of_the_next_call",
    ),
    Mutation(
        "Newton keeps what a closure computed first", "learner.py",
        "there = self._on_heads(again.heads(objective.phi, quadratic), steps)", "pass",
        "closed_form::test_newton_solves_what_a_closure_computed_last",
    ),
    Mutation(
        "a closure's changed data go unnoticed", "learner.py",
        "same = again is not None and again.same(known)", "same = again is not None",
        "closed_form::test_a_closure_that_draws_anew_is_asked_at_every_step",
    ),
    # The general path.
    Mutation(
        "linearized beside phi, general path", "inner_solvers/protocol.py",
        "at = linearize(point, hvp or last)", "at = linearize(0.9 * point, hvp or last)", GENERAL,
    ),
    Mutation(
        "features detached, general path", "inner_problem/boundary.py",
        "return [*(source_of(node) for node in self.boundaries), *self.leaves]",
        "return [*(source_of(node).detach() for node in self.boundaries), *self.leaves]", CLOSED,
    ),
    Mutation(
        "phi of the loss counted as theta", "inner_problem/boundary.py",
        "ctx.inner = True", "ctx.inner = False",
        "hypergradient::test_implicit_unrolled_and_finite_differences_meet",
    ),
    Mutation(
        "data changed without a trace go unnoticed", "inner_problem/linearization.py",
        "if not bool((now - before).norm() <= tol * before.norm()):", "if False:",
        "closed_form::test_data_changed_without_a_trace_are_refused_on_the_general_path",
    ),
    Mutation(
        "data changed without a trace not looked for", "inner_problem/linearization.py",
        "        self._check_unchanged()\n", "",
        "closed_form::test_data_changed_without_a_trace_are_refused_on_the_general_path",
    ),
    Mutation(
        "the second derivative always agrees, closures", "inner_problem/second_derivative.py",
        "return bool((product - narrow).norm() <= _TOL * scale + _FLAT * rounding)", "return True",
        SECOND,
    ),
    Mutation(
        "the second derivative always agrees, loss tensors", "inner_problem/second_derivative.py",
        "if missing <= _TOL:", "if True:", SECOND,
    ),
    Mutation(
        "loss tensors never tell of a second derivative", "inner_problem/second_derivative.py",
        "return (False if short or missing > 0.7 * before else None), missing",
        "return None, missing", SECOND,
    ),
    Mutation(
        "a module that moves with each pass goes unnoticed", "inner_problem/second_derivative.py",
        'if part.training and (hooks or type(part).__name__ == "_SpectralNorm"):', "if False:",
        "never_silent_derivatives::test_normalised_weights",
    ),
    Mutation(
        "the first loss's second derivative stands for all", "learner.py",
        "return hash(tuple(at.operations)) not in self._compared and",
        "return not self._compared and",
        "second_derivative::test_one_loss_does_not_speak_for_another",
    ),
    # Solvers.
    Mutation(
        "CG with beta = 0", "linear_solvers/conjugate_gradient.py",
        "zeta = torch.where(active, rr /", "zeta = torch.where(active, 0.0 * rr /",
        "linear_solve together::" + EACH,
    ),
    Mutation(
        "CG with beta inverted", "linear_solvers/conjugate_gradient.py",
        "rr / torch.where(active, before, 1.0), 0.0)",
        "before / torch.where(active & (rr > 0), rr, 1.0), 0.0)",
        "linear_solve",
    ),
    Mutation(
        "CG goes on where a task has ended", "linear_solvers/conjugate_gradient.py",
        "eta = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)",
        "eta = (rr / torch.where(curvature > 0, curvature, 1.0))",
        "linear_solve together::test_tasks_that_end_for_different_reasons",
    ),
    Mutation(
        "Newton: every step accepted", "inner_solvers/newton.py",
        "return objective > last.objective + _ARMIJO * self._length * last.slope",
        "return False", "inner_steps solvers hypergradient_rules",
    ),
    Mutation(
        "Newton: the stand-in step uphill", "inner_solvers/newton.py",
        "direction = -self.lr * at.gradient", "direction = self.lr * at.gradient",
        "inner_steps solvers",
    ),
    Mutation(
        "the series' residual half updated", "linear_solvers/neumann.py",
        "r - share * product", "r - 0.5 * share * product", "linear_solvers",
    ),
    Mutation(
        "curvature from below", "linear_solvers/curvature.py",
        "largest = ritz + norm * last", "largest = ritz", "linear_solvers",
    ),
    Mutation(
        "each task's curvature is that of the last to end", "linear_solvers/curvature.py",
        "found = torch.where(done, found, largest)", "found = largest", "together::" + EACH,
    ),
    # What is said of it.
    Mutation(
        "an unsolved problem not counted", "diagnostics.py",
        "bad = not self.hypergradient_error <= limit", "bad = False",
        "together::test_diagnostics_are_each_tasks_and_the_parent_counts_them_all",
    ),
    Mutation(
        "the bound without its inner part", "inner_problem/linear_heads.py",
        "return inner, sizes.linear", "return 0.0, sizes.linear",
        BOUND + " together::test_diagnostics_are_each_tasks_and_the_parent_counts_them_all",
    ),
    Mutation(
        "the bound without its linear part", "inner_problem/linear_heads.py",
        "sizes.linear_error(strength + damping), rounding", "0.0, rounding",
        "diagnostics::test_unsolved_linear_system_warns_once_and_counts",
    ),
    Mutation(
        "the bound without its rounding part", "inner_problem/linear_heads.py",
        "sizes.linear_error(strength + damping), rounding",
        "sizes.linear_error(strength + damping), 0.0", ROUNDED,
    ),
    Mutation(
        "the bound's rounding is that of one number", "inner_problem/linear_heads.py",
        "rounding = eps + 0.4 * eps * amplified *", "rounding = eps + 0.0 * amplified *", ROUNDED,
    ),
    Mutation(
        "the estimate without its inner part", "inner_problem/linearization.py",
        "return inner, sizes.linear", "return 0.0, sizes.linear",
        "diagnostics::test_the_estimate_is_the_distance_from_the_minimum",
    ),
    Mutation(
        "the linear error is the residual alone", "inner_problem/linearization.py",
        "return self.residual * self.b / (strength * self.v) if self.v > 0.0 else math.inf",
        "return self.residual", "diagnostics::test_the_linear_part_bounds_the_systems_error",
    ),
    Mutation(
        "the gradient's norm at the minimum taken for zero", "inner_problem/linear_heads.py",
        "return (self._rho * (gram @ self._rho)).sum", "return (0.0 * self._rho).sum", BOUND,
    ),
    Mutation(
        "tasks together: K steps for every one", "learner.py",
        "there.steps = torch.tensor(counts,", "there.steps = torch.tensor([steps] * len(counts),",
        "together::" + EACH,
    ),
    Mutation(
        "is_bound always True", "inner_problem/linearization.py",
        "    is_bound = False", "    is_bound = True",
        "together::test_without_a_regulariser diagnostics::test_solved_says_nothing",
    ),
    Mutation(
        "is_bound never True", "inner_problem/linear_heads.py",
        "there.solved = there.is_bound = True", "there.solved = True",
        "diagnostics::test_solved_says_nothing",
    ),
    # The learner.
    Mutation(
        "FOMAML: a step twice as long", "learner.py",
        "p - self.lr * g for p, g in pairs", "p - 2 * self.lr * g for p, g in pairs", "first_order",
    ),
    Mutation(
        "warm start: v forgotten", "learner.py",
        "start = memory[key].v", "start = None", "warm_start",
    ),
    Mutation(
        "damping: none", "learner.py",
        "self.linear_solve(damped(at.hvp, damping), b, start)",
        "self.linear_solve(at.hvp, b, start)", "damping::test_the_damped_system_is_solved",
    ),
    Mutation(
        "autocast: features stay half", "inner_problem/boundary.py",
        "wide = source if dtype is None else widened(source, dtype)", "wide = source",
        "mixed_precision",
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
)  # fmt: skip
