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
SECOND = "never_silent_derivatives::test_operations"
ALONE = "together::test_newton_equals_the_dense_oracle recognition::test_every_loss_is_right"

MINIMUM = "linear_heads::test_minimum_is_the_dense_one"
RIGHT = "recognition::test_every_loss_is_right"
TRACE = "closed_form::test_data_changed_without_a_trace_are_refused_on_the_general_path"
AS_COUNTED = "together::test_diagnostics_are_each_tasks_and_the_parent_counts_them_all"

BOUNDARY = "inner_problem/boundary.py"
CG = "linear_solvers/conjugate_gradient.py"
CURVATURE = "linear_solvers/curvature.py"
HEADS = "inner_problem/linear_heads.py"
IN_LOSSES = "inner_problem/losses.py"
LEARNER = "learner.py"
LINEARIZATION = "inner_problem/linearization.py"
LOOK = "inner_problem/second_derivative.py"
NEWTON = "inner_solvers/newton.py"
RECOGNITION = "inner_problem/recognition.py"
UNROLLED = "baselines/unrolled.py"


class Mutation(NamedTuple):
    """A mistake: ``old`` becomes ``new`` in ``file``; ``tests`` are FILE or FILE::NAME."""

    name: str
    file: str
    old: str
    new: str
    tests: str


m = Mutation
MUTATIONS = (
    # Both paths.
    m("the mixed product's sign", "implicit_diff.py", "if product is None else product.neg()",
      "if product is None else product", ALONE),
    m("no regulariser in the Hessian product, closed form", HEADS,
      "return self.problem.in_phi(change).add_(vector, alpha=self.quadratic.strength)",
      "return self.problem.in_phi(change)", DERIVATIVES),
    m("no regulariser in the gradient, closed form", HEADS,
      "(self.loss.gradient).add_(offset, alpha=self.quadratic.strength)", "(self.loss.gradient)",
      DERIVATIVES),
    m("no regulariser in the Hessian product, general path", LINEARIZATION,
      "return product.add_(vector, alpha=self.quadratic.strength)", "return product", CLOSED),
    m("no regulariser in the gradient, general path", LINEARIZATION,
      "self._loss_gradient.add(offset, alpha=strength)", "self._loss_gradient", CLOSED),
    m("the anchor's sign", LINEARIZATION, "pull = vector.sum(0).mul_(-self.strength)",
      "pull = vector.sum(0).mul_(self.strength)", MIXED),
    m("one task's anchor for all", LINEARIZATION, "pull = vector.sum(0)",
      "pull = vector[0].clone()", MIXED),
    m("the gradient in l2 without the anchor", LINEARIZATION,
      "(self.offset(point) * vector).sum().to", "(point * vector).sum().to", MIXED),
    # Linear heads.
    m("features detached, closed form", HEADS,
      "return [*([] if source is None else [source]), *self.quadratic.sources()]",
      "return [*([] if source is None else [source.detach()]), *self.quadratic.sources()]", CLOSED),
    m("a mixed product without its curvature", HEADS,
      "product = torch.baddbmm(product, curved, self.problem.weights(self.point))", "", MIXED),
    m("a mixed product without the gradient", HEADS,
      "product = torch.bmm(self.loss.gradient, self.problem.weights(v))",
      "product = torch.bmm(0 * self.loss.gradient, self.problem.weights(v))", MIXED),
    m("no bias on the way back", HEADS, "torch.cat([weight, per_output.sum(1)], 1)",
      "torch.cat([weight, 0 * per_output.sum(1)], 1)", DERIVATIVES),
    m("no bias in the Gram matrix", HEADS, "return gram.add_(1.0) if self.bias else gram",
      "return gram", MINIMUM),
    m("softmax without its coupling of classes", IN_LOSSES,
      "return weighted.addcmul_(self.probabilities, total, value=-1.0).mul_(self.scale)",
      "return weighted.mul_(self.scale)", LOSSES),
    m("the softmax's inverse without its coupling", IN_LOSSES,
      "return each.sub_((self._each * common.mT.unsqueeze(1)).sum(3)).mT", "return each.mT",
      "linear_heads::test_the_inverse_is_that_of_the_dense_matrix"),
    m("the squared error's curvature halved", IN_LOSSES, "return change * (2.0 * self.scale)",
      "return change * self.scale", LOSSES),
    m("the movement too small", IN_LOSSES, "return math.sqrt(2.0) * change", "return change",
      "linear_heads::test_the_hessian_stays_within_the_movement"),
    m("minimum stopped too early", HEADS, "small = largest < _NEAR and", "small = largest < 0.5 or",
      MINIMUM),
    m("minimum takes every long step whole", HEADS,
      "        if bool(enough.all()):\n            return change, move",
      "        if True:\n            return change, move",
      "linear_heads::test_minimum_of_hostile_data "
      "linear_heads::test_minimum_where_long_steps_fail"),
    m("minimum starts where the head is", HEADS,
      "base = problem.outputs(center.expand_as(self.point))", "base = problem.outputs(self.point)",
      MINIMUM),
    m("no refinement in solve", HEADS, "q - residual + inverse(k_residual)", "q",
      "linear_heads::test_systems_at_the_minimum_are_solved"),
    m("the chord step's inverse never renewed", HEADS, "if inverse is None or last > _NEAR:",
      "if inverse is None:",
      "linear_heads::test_minimum_is_the_dense_one linear_heads::test_minimum_of_hostile_data"),
    m("one class's factor for all at every step", HEADS, "alike=not movements and center is None",
      "alike=True",
      "linear_heads::test_minimum_is_the_dense_one linear_heads::test_minimum_of_hostile_data"),
    m("classes alike counted once", IN_LOSSES, "total.mul_(classes)", "pass",
      "linear_heads::test_the_inverse_where_all_classes_are_alike"),
    m("the factor without the damping", HEADS,
      "problem, mu = self.problem, self.quadratic.strength + damping",
      "problem, mu = self.problem, self.quadratic.strength",
      "linear_heads::test_systems_at_the_minimum_are_solved"),
    m("the Gram recursion without shrinking", "inner_solvers/gradient_descent.py",
      "shrink, tau, c = 1.0 - lr * quadratic.strength,", "shrink, tau, c = 1.0,", GRAM),
    m("the Gram recursion forgets the start", "inner_solvers/gradient_descent.py",
      "point = problem.in_phi(c).add_(drift_in_phi, alpha=tau)", "point = problem.in_phi(c)", GRAM),
    # Recognition.
    m("a loss with ignored targets recognised", RECOGNITION,
      "if float(nll._saved_total_weight) != len(targets):", "if False:", RIGHT),
    m("targets of theta taken for constants", RECOGNITION,
      "if of_target is not None or outputs.dim()", "if outputs.dim()", RIGHT),
    m("any scale of a linear map recognised", RECOGNITION,
      "if bias and not linear._saved_alpha == linear._saved_beta == 1:", "if False:",
      "recognition::test_other_spellings_of_a_linear_map"),
    m("features of phi taken for constants", RECOGNITION, "if node in inner:", "if False:",
      "recognition::test_learner_fed_its_own_weight"),
    m("a change in place goes unnoticed", BOUNDARY, "ctx.save_for_backward(source)",
      "ctx.save_for_backward(source.data)",
      "closed_form::test_features_overwritten_before_adapt_are_refused"),
    m("the quick path ignores changed weights", LEARNER, "return at if unmoved and at.quad",
      "return at if at.quad", ANEW),
    m("the quick path ignores changed targets", RECOGNITION,
      "            and torch.equal(self.targets, other.targets)\n", "",
      "closed_form::test_what_has_changed_is_solved_anew "
      "closed_form::test_a_closure_that_draws_anew_is_asked_at_every_step"),
    m("the quick path ignores changed features", RECOGNITION,
      "            and torch.equal(self.x, other.x)\n", "", ANEW),
    m("the quick path ignores a changed l2", LINEARIZATION,
      "if self.strength != other.strength or self._l2 is not other._l2:", "if False:", ANEW),
    m("the quick path ignores a moved anchor", LINEARIZATION,
      "return self.center is None or torch.equal(self.center, other.center)", "return True", ANEW),
    m("the quick path ignores another history", LEARNER,
      "elif there.known.origin == known.origin and task", "elif task", ANEW),
    m("the quick path ignores another linear solver", LEARNER,
      "known.origin and task.linear == self.linear:", "known.origin:",
      "closed_form::test_another_linear_solver_is_that_of_the_next_call"),
    m("Newton keeps what a closure computed first", LEARNER,
      "there = self._on_heads(again.heads(objective.phi, quadratic), steps)", "pass",
      "closed_form::test_newton_solves_what_a_closure_computed_last"),
    m("a closure's changed data go unnoticed", LEARNER,
      "same = again is not None and again.same(known)", "same = again is not None",
      "closed_form::test_a_closure_that_draws_anew_is_asked_at_every_step"),
    # The general path.
    m("linearized beside phi, general path", "inner_solvers/protocol.py",
      "at = linearize(point, hvp or last)", "at = linearize(0.9 * point, hvp or last)", GENERAL),
    m("features detached, general path", BOUNDARY,
      "return [*(source_of(node) for node in self.boundaries), *self.leaves]",
      "return [*(source_of(node).detach() for node in self.boundaries), *self.leaves]", CLOSED),
    m("phi of the loss counted as theta", BOUNDARY, "ctx.inner = True", "ctx.inner = False",
      "hypergradient::test_implicit_unrolled_and_finite_differences_meet"),
    m("data changed without a trace go unnoticed", LINEARIZATION,
      "if not bool((now - before).norm() <= tol * before.norm()):", "if False:", TRACE),
    m("data changed without a trace not looked for", LINEARIZATION,
      "        self._check_unchanged()\n", "", TRACE),
    m("the second derivative always agrees, closures", LOOK,
      "return bool((product - narrow).norm() <= _TOL * scale + _FLAT * rounding)", "return True",
      SECOND),
    m("the second derivative always agrees, loss tensors", LOOK, "if missing <= _TOL:", "if True:",
      SECOND),
    m("loss tensors never tell of a second derivative", LOOK,
      "return (False if short or missing > 0.7 * before else None), missing",
      "return None, missing", SECOND),
    m("a module that moves with each pass goes unnoticed", LOOK,
      "if part.training and (hooks or type(part).__name__ == \"_SpectralNorm\"):", "if False:",
      "never_silent_derivatives::test_normalised_weights"),
    m("the first loss's second derivative stands for all", LEARNER,
      "return hash(tuple(at.operations)) not in self._compared and",
      "return not self._compared and",
      "never_silent_losses::test_a_loss_that_comes_after_a_good_one"),
    # Solvers.
    m("CG with beta = 0", CG, "zeta = torch.where(active, rz /",
      "zeta = torch.where(active, 0.0 * rz /",
      "linear_solve together::test_each_task_has_its_own_numbers"),
    m("CG with beta inverted", CG, "rz / torch.where(active, before, 1.0), 0.0)",
      "before / torch.where(active & (rz > 0), rz, 1.0), 0.0)", "linear_solve"),
    m("CG goes on where a task has ended", CG,
      "eta = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)",
      "eta = (rz / torch.where(curvature > 0, curvature, 1.0))",
      "linear_solve together::test_tasks_that_end_for_different_reasons"),
    m("CG with the preconditioned residual's tolerance", CG,
      "active = active & ~(rr.sqrt() <= threshold)", "active = active & ~(rz.sqrt() <= threshold)",
      "preconditioners::test_the_tolerance_is_that_of_the_users_residual"),
    m("truncated CG goes on from the sphere", CG, "active = active & ~short",
      "active = active & ~unknown",
      "preconditioners::test_truncated_ends_on_the_sphere_between_two_steps"),
    m("Nystrom forgets what is known", "linear_solvers/nystrom.py",
      "share = values / (values + shift)", "share = values / (values + 2.0 * shift)",
      "preconditioners::test_nystrom_is_the_dense_approximation_and_its_inverse"),
    m("Jacobi without the damping", "linear_solvers/preconditioners.py",
      "diagonal = diagonal + system.damping", "diagonal = diagonal + 0.0",
      "preconditioners::test_the_diagonal_of_a_head_is_exact"),
    m("Kronecker factors of the sum", HEADS, "self.loss.curve(one).mean(1)",
      "self.loss.curve(one).sum(1)",
      "preconditioners::test_kronecker_is_the_inverse_of_the_kronecker_product"),
    m("one step of length one", "linear_solvers/identity.py", "right * self.step_size",
      "right * 1.0", "one_step preconditioners::test_one_step_is_as_wrong_as_the_step_contracts"),
    m("accuracy of the inner problem alone", LEARNER, "None if self.accuracy is None else _PART",
      "None if True else _PART", "accuracy::test_a_head_is_as_accurate_as_asked_and_steps_follow"),
    m("the estimate of a long solution", LINEARIZATION,
      "max(1.0, strength * sizes.v / sizes.b)", "max(1.0, 0.0 * sizes.v / sizes.b)",
      "diagnostics::test_a_solution_that_is_too_long_makes_the_estimate_larger"),
    m("Newton: every step accepted", NEWTON,
      "return objective > last.objective + _ARMIJO * self._length * last.slope", "return False",
      "inner_steps solvers hypergradient_rules"),
    m("Newton: the stand-in step uphill", NEWTON, "direction = -self.lr * at.gradient",
      "direction = self.lr * at.gradient", "inner_steps solvers"),
    m("the series' residual half updated", "linear_solvers/neumann.py", "r - share * product",
      "r - 0.5 * share * product", "linear_solve"),
    m("curvature from below", CURVATURE, "largest = ritz + norm * last", "largest = ritz",
      "linear_solve"),
    m("each task's curvature is that of the last to end", CURVATURE,
      "found = torch.where(done, found, largest)", "found = largest", "together::" + EACH),
    # What is said of it.
    m("an unsolved problem not counted", "diagnostics.py",
      "bad = not self.hypergradient_error <= limit", "bad = False", AS_COUNTED),
    m("the bound without its inner part", HEADS, "return inner, sizes.linear",
      "return 0.0, sizes.linear", "diagnostics::test_the_bound_holds_before_the_minimum "
      "together::test_diagnostics_are_each_tasks_and_the_parent_counts_them_all"),
    m("the bound without its linear part", HEADS,
      "sizes.linear_error(strength + damping), rounding", "0.0, rounding",
      "diagnostics::test_unsolved_linear_system_warns_once_and_counts"),
    m("the bound without its rounding part", HEADS,
      "sizes.linear_error(strength + damping), rounding",
      "sizes.linear_error(strength + damping), 0.0", ROUNDED),
    m("the bound's rounding is that of one number", HEADS,
      "rounding = eps + 0.4 * eps * amplified *", "rounding = eps + 0.0 * amplified *", ROUNDED),
    m("the estimate without its inner part", LINEARIZATION, "return inner * weaker, sizes.linear",
      "return 0.0, sizes.linear",
      "diagnostics::test_the_estimate_is_the_distance_from_the_minimum"),
    m("the linear error is the residual alone", LINEARIZATION,
      "return self.residual * self.b / (strength * self.v) if self.v > 0.0 else math.inf",
      "return self.residual", "diagnostics::test_the_linear_part_bounds_the_systems_error"),
    m("the gradient's norm at the minimum taken for zero", HEADS,
      "return (self._rho * torch.bmm(gram, self._rho)).sum", "return (0.0 * self._rho).sum", BOUND),
    m("tasks together: K steps for every one", LEARNER, "there.steps = torch.tensor(counts,",
      "there.steps = torch.tensor([steps] * len(counts),", "together::" + EACH),
    m("is_bound always True", LINEARIZATION, "    is_bound = False", "    is_bound = True",
      "together::test_without_a_regulariser diagnostics::test_solved_says_nothing"),
    m("is_bound never True", HEADS, "there.solved = there.is_bound = True", "there.solved = True",
      "diagnostics::test_solved_says_nothing"),
    # The learner.
    m("FOMAML: a step twice as long", LEARNER, "p - self.lr * g for p, g in pairs",
      "p - 2 * self.lr * g for p, g in pairs", "first_order"),
    m("warm start: v forgotten", LEARNER, "start = memory[key].v", "start = None", "warm_start"),
    m("damping: none", LEARNER, "System(at.hvp, damping, at, part)",
      "System(at.hvp, 0.0, at, part)", "damping::test_the_damped_system_is_solved"),
    m("autocast: features stay half", BOUNDARY,
      "wide = source if dtype is None else widened(source, dtype)", "wide = source",
      "mixed_precision"),
    m("chunked: nothing computed twice", "chunked.py",
      "self._run_twice if torch.is_grad_enabled() else self.backbone", "self.backbone", "chunked"),
    m("chunked: statistics updated twice", "module_state.py",
      "return [t._replace(buffers={**t.buffers, **_copies(written)}) for t, written in pairs]",
      "return [t for t, written in pairs]", "chunked"),
    m("baselines: every step first-order", UNROLLED, "if keep and not first_order else",
      "if False else", "baselines_unrolled"),
    m("baselines: ITD-BiO learns the start", UNROLLED, "self._links_to_initial = learn_init",
      "self._links_to_initial = True", "baselines_unrolled"),
    m("baselines: Reptile's sign", "baselines/reptile.py", "way = weight * (initial - adapted)",
      "way = weight * (adapted - initial)", "baselines_reptile"),
)  # fmt: skip
