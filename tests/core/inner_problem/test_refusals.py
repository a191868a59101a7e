"""What torch cannot differentiate is said in one line, by its kind, and what it names works."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention import kernel
from oracles import relative_error
from small_task import FLOAT64, UNSOLVED_OR_NOT, Made
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2l_implicit import CG, LBFGS, GaussNewton, Hessian, ImplicitMAML, Newton, Perturbed
from l2l_implicit.inner_problem import refusals

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = [FLOAT64, UNSOLVED_OR_NOT]
Y = torch.arange(6) % 3
FIRST_ONLY = {"inner": LBFGS(tol=1e-12), "linear": Perturbed(tol=1e-10)}
SECOND = {"inner": Newton(100, 1e-13), "linear": CG(200, 1e-13)}


class Attention(nn.Module):
    """Two heads over six tokens, by torch's kernel, which has a first derivative alone."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.make, self.last = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.make(x).view(1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.last(mixed[0].transpose(0, 1).flatten(1))


class Pinned(Attention):
    """Chooses its kernel itself."""

    def forward(self, x: Tensor) -> Tensor:
        with kernel("FLASH_ATTENTION"):
            return super().forward(x)


class Encoder(nn.Module):
    """Torch's own layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.net = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[None])[0]


def meta_gradient(
    module: nn.Module, in_features: bool = False, l2: float = 0.5, **settings: Any
) -> list[Tensor]:
    """Of the initial value and, if asked for, of the support set's features."""
    torch.manual_seed(2)
    x, query = torch.randn(6, 4, requires_grad=in_features), torch.randn(6, 4)
    learner = ImplicitMAML(module, lr=0.1, l2=l2, **settings).clone()
    learner.adapt(lambda: F.cross_entropy(learner(x), Y), steps=100)
    F.cross_entropy(learner(query), Y.roll(1)).backward()
    found = [p.grad for p in module.parameters() if p.requires_grad]
    for parameter in module.parameters():
        parameter.grad = None
    return [*found, x.grad] if in_features else found


def said(module: nn.Module, **settings: Any) -> str:
    """The one line of an error."""
    with pytest.raises(RuntimeError) as caught:
        meta_gradient(module, **settings)
    line = str(caught.value)
    assert "\n" not in line and "expected" in line and ", got " in line and "; " in line
    return line


@pytest.mark.parametrize("module", [Attention, Encoder])
def test_each_way_out_of_fused_attention_leads_to_one_number(module: Callable) -> None:
    """1e-5: `Perturbed` takes differences of gradients, with an error of 1e-16 ** (2/3)."""
    net = module()
    line = said(net, **SECOND)
    for way in ("sdpa_kernel(SDPBackend.MATH)", "linear=Perturbed() with inner=LBFGS()"):
        assert way in line
    assert re.search(r"got fused attention \(_scaled_dot_product\w*attention\w*\);", line)
    l2 = 3.0 if module is Encoder else 0.5  # convex enough to have one minimum
    with kernel("MATH"):
        expected = meta_gradient(net, True, l2, **SECOND)
    with kernel("FLASH_ATTENTION"):
        assert relative_error(meta_gradient(net, True, l2, **FIRST_ONLY), expected) < 1e-5


@pytest.mark.parametrize("module", [Attention, Encoder])
@pytest.mark.parametrize("training, frozen", [(True, False), (False, False), (True, True)])
def test_gauss_newton_needs_no_other_kernel(
    module: Callable, training: bool, frozen: bool
) -> None:
    """Forward mode takes attention in steps, gradients take the kernel: two roundings of one."""
    net, found = module().train(training), []
    next(net.parameters()).requires_grad_(not frozen)
    for name in ("MATH", "FLASH_ATTENTION"):
        with kernel(name):
            settings = {"curvature": GaussNewton(), "linear": CG(200, 1e-12)}
            found.append(meta_gradient(net, l2=3.0, allow_nograd=frozen, **settings))
    assert relative_error(found[1], found[0]) < 1e-9


def test_gauss_newton_has_a_mixed_derivative_only_where_theta_is_the_anchor() -> None:
    line = said(Attention(), in_features=True, curvature=GaussNewton())
    assert "got fused attention" in line and "if theta is the anchor alone" in line


def test_a_kernel_that_the_module_insists_on() -> None:
    """No way out is named that ends at the same kernel."""
    line = said(Pinned(), curvature=GaussNewton())
    assert line.startswith("GaussNewton: ") and "got fused attention (_scaled_dot" in line
    assert "Perturbed()" in line and "Hessian()" not in line and "fallback" not in line


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope = 1 - ctx.saved_tensors[0].numpy() ** 2
        return torch.from_numpy(gradient.numpy() * slope)


def reentrant(x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x, use_reentrant=True)


def doubled_later(x: Tensor) -> Tensor:
    y = x.exp()  # which saves y
    z = y.tanh()
    y.mul_(2.0)
    return z


WRITE_IT, ENDS = "write it in operations that have one", "takes first derivatives only"


@pytest.mark.parametrize(
    ("bend", "curvature", "got", "do"),
    [
        (ByNumpy.apply, Hessian(), "custom autograd.Function whose backward() uses numpy",
         WRITE_IT),
        (ByNumpy.apply, GaussNewton(), "a custom autograd.Function without jvp", "fallback=True"),
        (reentrant, Hessian(), "the reentrant one", "use_reentrant=False"),
        (doubled_later, Hessian(), "modified by an inplace operation", "clone what is changed"),
    ],
)  # fmt: skip
def test_other_kinds(bend: Callable, curvature: Any, got: str, do: str) -> None:
    net = nn.Sequential(nn.Linear(4, 5), l2l.nn.Lambda(bend), nn.Linear(5, 3))
    line = said(net, curvature=curvature)
    assert got in line.split("; ")[0] and do in line.split("; ", 1)[1]
    assert "attention" not in line


def test_an_operation_that_torch_names() -> None:
    words = torch.arange(12).view(6, 2) % 6
    bag = Made(lambda own, x: own.last(own.words(words)) + x.sum(),
               words=nn.EmbeddingBag(6, 4, mode="mean"), last=nn.Linear(4, 3))  # fmt: skip
    line = said(bag)
    assert re.search(r"got _embedding_bag(_dense)?_backward; ", line) and line.endswith(ENDS)
    line = said(bag, curvature=GaussNewton())
    assert "got _embedding_bag; use GaussNewton(fallback=True)" in line


NOT_THERE = "derivative for aten::{} is not implemented"
NO_FORWARD = (
    "Trying to use forward AD with {} that does not support it because it has not been implemented "
    "yet.\nPlease file an issue"
)
UNREGISTERED = (
    "Trying to backward through {}.default but no autograd formula was registered. Please use "
    "register_autograd to add one."
)


@pytest.mark.parametrize(("text", "got"), [
    # Kernels of other devices, as torch 2.13 words them.
    *((text.format(name), f"got fused attention ({name}); compute it within")
      for name in ("_scaled_dot_product_cudnn_attention_backward", "_efficient_attention_backward")
      for text in (NOT_THERE, NO_FORWARD)),
    (UNREGISTERED.format("flash_attn._flash_attn_backward"), "fused attention (flash_attn._flash"),
    (UNREGISTERED.format("mine.twist"), "got mine.twist; write it"),
    ("trying to differentiate twice a function that was marked with @once_differentiable",
     "got a function marked once_differentiable; write it"),
    ("torch.compile with aot_autograd does not currently support double backward",
     "got a function that torch.compile has compiled; write it"),
    ("Something else.\nOn two lines.", "got 'Something else'; clone"),
])  # fmt: skip
def test_messages(text: str, got: str) -> None:
    forward = text.startswith("Trying to use forward AD")
    line = (refusals.of_forward_mode if forward else refusals.of_gradients)(RuntimeError(text))
    assert got in line and "\n" not in line and (forward or line.endswith(ENDS))
