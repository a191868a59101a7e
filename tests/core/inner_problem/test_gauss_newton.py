"""Gauss-Newton products and hypergradients against dense J^T H_L J, in float64.

The oracle knows a module as a function of one vector (`torch.func`), the loss as a function of its
outputs and of phi, and multiplies dense matrices.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles import flat, relative_error, subroutine_1
from problems import on_vector
from small_task import FLOAT64, HOWS, UNSOLVED_OR_NOT, Made, adapt, unsolved
from torch import Tensor, nn
from torch.func import hessian, jacrev
from torch.nn.functional import cross_entropy, dropout, mse_loss
from torch.utils.checkpoint import checkpoint

from l2l_implicit import CG, GaussNewton, GradientDescent, Hessian, ImplicitMAML, Newton
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = [FLOAT64, UNSOLVED_OR_NOT]
L2, LABELS = 0.5, torch.arange(8) % 3
EXACT = CG(steps=300, tol=1e-13)


class Recorded(ImplicitMAML):
    """Keeps the system of its last backward pass."""

    system: dict[str, Any]

    def linear_solve(self, hvp: Matvec, b: Tensor, start: Tensor | None) -> LinearSolution:
        self.system.update(hvp=hvp, b=b)
        return super().linear_solve(hvp, b, start)


class Quartic(Recorded):
    """A regulariser of its own, which is no quadratic."""

    def regularizer(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        pairs = zip(parameters, anchor, strict=True)
        return super().regularizer(parameters, anchor) + sum((p - a).pow(4).sum() for p, a in pairs)


def recorded(module: nn.Module, cls: type[Recorded] = Recorded, **settings: Any) -> Recorded:
    usual = {"l2": L2, "curvature": GaussNewton(), "linear": EXACT}
    learner = cls(module, 0.1, **{**usual, **settings})
    learner.system = {}
    return learner


def function_of(module: nn.Module) -> Callable[..., Any]:
    """Outputs of a copy of the module at a vector phi."""
    plain = copy.deepcopy(module)
    for part in plain.modules():  # torch.func refuses writing into running statistics
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) and part.training:
            part.running_mean = part.running_var = part.num_batches_tracked = None
            part.track_running_stats = False
    return lambda phi, *args, **kwargs: on_vector(plain, phi)(*args, **kwargs)


def dense(outputs: Callable[[Tensor], Tensor], loss: Callable[..., Tensor], phi: Tensor) -> Tensor:
    """[J; I]^T (Hessian of the loss in outputs and phi) [J; I]."""
    z = outputs(phi)
    both = torch.cat([jacrev(outputs)(phi), torch.eye(len(phi))])
    inner = hessian(lambda zp: loss(zp[: len(z)].view(8, -1), zp[len(z) :]))(torch.cat([z, phi]))
    return both.T @ inner @ both


def plain(z: Tensor, phi: Tensor) -> Tensor:
    return cross_entropy(z, LABELS)


def assert_product(maml: Recorded, matrix: Tensor) -> None:
    vector = torch.randn_like(maml.system["b"])
    assert relative_error([maml.system["hvp"](vector)], [vector @ matrix]) <= 1e-12


def assert_same(ones: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    assert all(relative_error([a], [b]) <= 1e-12 for a, b in zip(ones, others, strict=True))


def images_to(norm: nn.Module) -> nn.Module:
    layers = nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers)


def dense_net(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), *middle, nn.Tanh(), nn.Linear(4, 3))


def warm(norm: nn.Module) -> nn.Module:
    """Its running statistics are some."""
    with torch.no_grad():
        norm(torch.randn(20, 4, *([3, 3] if isinstance(norm, nn.BatchNorm2d) else [])))
    return norm.eval()


def twice() -> nn.Module:
    """One batch norm at two places, and tied weights."""
    return Made(
        lambda own, x: own.last(own.norm(torch.tanh(own.first(own.norm(own.first(x)))))),
        first=nn.Linear(5, 5), norm=nn.BatchNorm1d(5), last=nn.Linear(5, 3),
    )  # fmt: skip


TARGETS = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)
Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs [8, k] and of phi as one vector
CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "batch norm": (lambda: images_to(nn.BatchNorm2d(4)), plain),
    "batch norm, eval": (lambda: images_to(warm(nn.BatchNorm2d(4))), plain),
    "batch norm, bare": (
        lambda: dense_net(nn.BatchNorm1d(4, affine=False, track_running_stats=False)), plain),
    "batch norm, twice": (twice, plain),
    "group norm": (lambda: images_to(nn.GroupNorm(2, 4)), plain),
    "squared error": (dense_net, lambda z, phi: mse_loss(z, TARGETS)),
    "scaled, smoothed": (
        dense_net, lambda z, phi: cross_entropy(3.0 * z, LABELS, label_smoothing=0.1)),
    "not convex in the outputs": (dense_net, lambda z, phi: (z - TARGETS).sin().sum()),
    "penalty times outputs": (
        lambda: dense_net(nn.BatchNorm1d(4)),
        lambda z, phi: cross_entropy(z, LABELS) + 0.1 * z.square().mean() * phi.square().sum()),
    "linear in the outputs": (dense_net, lambda z, phi: (z * TARGETS).sum()),
}  # fmt: skip


@HOWS
@pytest.mark.parametrize("name, cls", [
    *((name, Recorded) for name in CASES), ("squared error", Quartic),
])  # fmt: skip
def test_products_and_hypergradient_are_the_dense_ones(
    name: str, cls: type[Recorded], how: str
) -> None:
    """Of the anchor; of other theta: test_every_way_of_adapting (core/test_hypergradient.py)."""
    make, loss = CASES[name]
    module = make()
    x, query = torch.randn(2, 8, *([2, 6, 6] if "Conv" in repr(module) else [5]))
    outputs, start = function_of(module), flat(module.parameters())
    maml = recorded(module, cls, inner=GradientDescent())
    learner, at = maml.clone(), []

    def closure() -> Tensor:
        phi = torch.cat([p.reshape(-1) for p in learner.parameters()])
        at.append(phi.detach())
        return loss(learner(x), phi)

    adapt(learner, closure, how, 3)
    there = flat(learner.parameters()) if how == "closure" else at[-1]  # it compares elsewhere, too
    cross_entropy(learner(query), LABELS).backward()
    own = L2 + (12 if cls is Quartic else 0) * (there - start).square()
    matrix = dense(lambda p: outputs(p, x).reshape(-1), loss, there) + torch.diag(own)
    assert_product(maml, matrix)
    if name != "not convex in the outputs":
        wanted = own * torch.linalg.solve(matrix, maml.system["b"][0])
        assert relative_error([flat(p.grad for p in module.parameters())], [wanted]) <= 1e-9


class Several(nn.Module):
    """Named inputs, and outputs in a dict; a dropout between."""

    def __init__(self, share: float = 0.0) -> None:
        super().__init__()
        self.inside, self.outside, self.share = nn.Linear(5, 4), nn.Linear(4, 3), share

    def forward(self, x: Tensor, *, gain: Tensor) -> dict[str, Any]:
        h = dropout(torch.tanh(self.inside(x)), self.share, self.training)
        return {"logits": gain * self.outside(h), "all": [h, torch.ones(3)]}


def test_several_passes_named_inputs_nested_outputs() -> None:
    module, x, gain = Several(), torch.randn(2, 8, 5), torch.tensor(2.0)
    outputs, maml = function_of(module), recorded(module)

    def loss(first: Tensor, second: Tensor, hidden: Tensor) -> Tensor:
        apart = (first.softmax(1) - second.softmax(1)).square().sum()
        return cross_entropy(first, LABELS) + apart + 0.1 * hidden.pow(4).sum()

    learner = maml.clone()

    def closure() -> Tensor:
        first, second = (learner(part, gain=gain) for part in x)
        return loss(first["logits"], second["logits"], second["all"][0])

    learner.adapt(closure, steps=2)
    phi, answer = flat(learner.parameters()), learner(x[0], gain=gain)
    assert answer["logits"].requires_grad and not answer["all"][1].requires_grad
    answer["logits"].square().sum().backward()

    def everything(p: Tensor) -> Tensor:
        first, second = (outputs(p, part, gain=gain) for part in x)
        parts = first["logits"], second["logits"], second["all"][0]
        return torch.cat([part.reshape(-1) for part in parts])

    def of_outputs(z: Tensor, phi: Tensor) -> Tensor:
        first, second, hidden = z.reshape(-1).split([24, 24, 32])
        return loss(first.view(8, 3), second.view(8, 3), hidden.view(8, 4))

    assert_product(maml, dense(everything, of_outputs, phi) + L2 * torch.eye(len(phi)))


def test_newton_inside_takes_the_same_matrix() -> None:
    """By its first product, where the whole step is accepted."""
    module, x = dense_net(), torch.randn(8, 5)
    start, outputs = flat(module.parameters()), function_of(module)
    settings = {"inner": Newton(cg_steps=1), "curvature": GaussNewton()}
    learner = ImplicitMAML(module, 0.1, l2=5.0, **settings).clone()
    learner.adapt(lambda: cross_entropy(learner(x), LABELS), steps=1)
    slope = torch.func.grad(lambda p: plain(outputs(p, x), p))(start)
    matrix = dense(lambda p: outputs(p, x).reshape(-1), plain, start) + 5.0 * torch.eye(len(start))
    step = subroutine_1(matrix.mv, -slope, 1)
    assert relative_error([flat(learner.parameters()) - start], [step]) <= 1e-9


def test_running_statistics_and_random_numbers_move_as_with_the_hessian() -> None:
    def run(curvature: Any) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 3))
        maml = recorded(module, curvature=curvature)
        learner, x = maml.clone(), torch.randn(8, 5)
        for _ in range(2):
            learner.adapt(cross_entropy(learner(x), LABELS))
        cross_entropy(learner(x), LABELS).backward()
        return [*learner.buffers(), *module.buffers()], torch.get_rng_state()

    # Loss tensors: the first closure of a kind is looked at with more passes.
    (one, after), (other, also_after) = run(GaussNewton()), run(Hessian())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(after, also_after)


def test_dropout_is_that_of_the_pass() -> None:
    module, x = Several(share=0.5), torch.randn(8, 5)
    maml, gain = recorded(module), torch.tensor(1.0)
    learner, outputs = maml.clone(), function_of(module)
    torch.manual_seed(3)
    learner.adapt(cross_entropy(learner(x, gain=gain)["logits"], LABELS))
    phi = flat(module.parameters())
    learner(x, gain=gain)["logits"].sum().backward()

    def drawn(p: Tensor) -> Tensor:
        torch.manual_seed(3)
        return outputs(p, x, gain=gain)["logits"].reshape(-1)

    jacobian = torch.autograd.functional.jacobian(drawn, phi)
    inner = hessian(lambda z: cross_entropy(z.view(8, 3), LABELS))(drawn(phi))
    assert_product(maml, jacobian.T @ inner @ jacobian + L2 * torch.eye(len(phi)))


class Hooked(torch.autograd.Function):
    """A square with forward mode and without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, d: Tensor) -> Tensor:
        return 2 * d * ctx.saved_tensors[0]


def system_of(module: nn.Module, curvature: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """The hypergradient of the initial value after one step, and a product of the system."""
    maml = recorded(module, curvature=curvature, **settings)
    learner, x = maml.clone(), torch.linspace(-1, 1, 40).view(8, 5)
    learner.adapt(lambda: cross_entropy(learner(x), LABELS), steps=1)
    for p in module.parameters():
        p.grad = None
    cross_entropy(learner(x), LABELS).backward()
    found = flat(p.grad for p in module.parameters())
    return found, maml.system["hvp"](torch.linspace(-1, 1, len(found))[None])


def test_no_second_derivative_is_asked_of_the_module() -> None:
    module = dense_net(l2l.nn.Lambda(Hooked.apply))
    twin = dense_net(l2l.nn.Lambda(torch.square))
    twin.load_state_dict(module.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*second derivative")
        asked = system_of(module, GaussNewton())
    assert_same(asked, system_of(twin, GaussNewton()))
    with unsolved(match="second derivative"):
        system_of(module, Hessian())


def test_without_forward_mode_one_line_or_the_hessian() -> None:
    """One line for each kind: test_refusals.py."""
    module = dense_net(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    got = "_weight_norm_interface"
    with pytest.raises(RuntimeError, match=f"^GaussNewton: expected a module .* got {got};"):
        system_of(module, GaussNewton(), linear=CG(damping=5))
    with pytest.warns(UserWarning, match=f"{got}; here the Hessian takes its place"):
        asked = system_of(module, GaussNewton(fallback=True), linear=CG(damping=5))
    assert_same(asked, system_of(module, Hessian(), linear=CG(damping=5)))


def changed(learner: Any, x: Tensor) -> Tensor:
    loss = cross_entropy(learner(x), LABELS)
    x.data.mul_(2.0)
    return loss


@pytest.mark.parametrize("loss, text", [
    (lambda n, x: cross_entropy(n.module(x), LABELS), "does not use them"),
    (lambda n, x: cross_entropy(n(torch.cat([n(x), x[:, :2]], 1)), LABELS),
     "do not depend on its parameters"),
    (changed, "expected the same outputs"),
])  # fmt: skip
def test_refused_in_one_line_and_not_where_asked(loss: Callable, text: str) -> None:
    x, ends, module = torch.randn(8, 5), [], dense_net()
    learner = recorded(module, inner=Newton()).clone()
    with pytest.raises(RuntimeError, match=f"^[^\n]*{text}[^\n]*$"):
        learner.adapt(lambda: loss(learner, x), steps=1)
    for curvature in (GaussNewton(fallback=True), Hessian()) if loss is not changed else ():
        learner = recorded(module, inner=Newton(), curvature=curvature).clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.adapt(lambda: loss(learner, x), steps=3)  # noqa: B023
        ends.append(flat(learner.parameters()))
    assert not ends or torch.allclose(*ends, rtol=1e-12, atol=1e-14)


# Half of its output has no gradient by ``no_grad``, which forward mode does not see; and parameters
# used through an object that is not among the module's children.
DIFFERENT: list[Callable[[Any, Tensor], Tensor]] = [
    lambda own, x: torch.tanh(own.layer(x)) + torch.no_grad()(own.layer)(x).square(),
    lambda own, x: torch.tanh(own.itself[0].layer(x)),
]


@pytest.mark.parametrize("run", DIFFERENT)
def test_two_derivatives_that_differ_are_seen(run: Callable[[Any, Tensor], Tensor]) -> None:
    learner = recorded(Made(run, layer=nn.Linear(5, 3)), inner=Newton()).clone()
    learner.module.itself = [learner.module]
    with pytest.raises(RuntimeError, match="expected one derivative"):
        learner.adapt(lambda: cross_entropy(learner(torch.ones(8, 5)), LABELS), steps=1)


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_activation_checkpointing() -> None:
    net = dense_net()
    assert_same(system_of(Checkpointed(net), GaussNewton()), system_of(net, GaussNewton()))


def test_under_autocast_the_products_keep_phis_precision() -> None:
    module = dense_net().float()
    x = torch.randn(8, 5, dtype=torch.float32)
    systems = []
    for low in (True, False):
        maml = recorded(module, linear=CG(steps=50, tol=1e-5))
        learner = maml.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            learner.adapt(lambda: cross_entropy(learner(x), LABELS), steps=2)  # noqa: B023
        learner(x).square().sum().backward()
        systems.append(maml.system["hvp"](torch.ones_like(maml.system["b"])))
    assert relative_error(systems[:1], systems[1:]) <= 1e-5
