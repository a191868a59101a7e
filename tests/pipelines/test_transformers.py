"""Encoders of transformers and LoRA of peft against finite differences through the inner solve.

Tiny models from a configuration: nothing is downloaded. In float64 the differences are of fourth
order with a step of 1e-4: 1e-16 of truncation and 1e-12 of rounding, times what derivatives of
a network with layer norm are. So 1e-6 is asked for.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention import kernel
from docs_blocks import ROOT, follow
from oracles import relative_error, slope_at_zero
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Newton,
    Perturbed,
    UnsolvedWarning,
)

WHY = "the extra huggingface is not installed"
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)

pytestmark = pytest.mark.usefixtures("float64")
STEP, TOL, LABELS = 1e-4, 1e-6, torch.arange(6) % 3
TOKENS = torch.randint(1, 32, (12, 5), generator=torch.Generator().manual_seed(1))  # 0 is padding
EXACT: dict[str, Any] = {"inner": Newton(200, 1e-13), "linear": CG(300, 1e-12)}


@pytest.fixture(autouse=True)
def none_left_open() -> Iterator[None]:
    """What one test has compiled is not another's."""
    yield
    torch._dynamo.reset()


def made(kind: str, attention: str = "eager") -> Any:
    """A BERT of one layer, always with the same numbers."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.2, num_labels=3,
        attn_implementation=attention,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def lora(attention: str = "eager") -> Any:
    """Two matrices for each query and value; B, which begins at zero, at something else."""
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"])
    model = peft.get_peft_model(made("BertForSequenceClassification", attention), settings)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def directions(parameters: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


def slope(value: Callable[[], Tensor], parameters: list[Tensor]) -> Tensor:
    """Of ``value``, which adapts anew, along the `directions`, by differences."""
    before = [p.detach().clone() for p in parameters]

    def moved(size: float) -> float:
        with torch.no_grad():
            for p, start, d in zip(parameters, before, directions(parameters), strict=True):
                p.copy_(start + size * d)
        return float(value().detach())

    found = slope_at_zero(moved, STEP)
    moved(0.0)
    return torch.tensor([found])


def along(parameters: list[Tensor]) -> Tensor:
    """The slope that the gradients say; no gradient is zero."""
    pairs = zip(parameters, directions(parameters), strict=True)
    parts = [(p.grad * d).sum() for p, d in pairs if p.grad is not None]
    return torch.stack(parts).sum().reshape(1)


# A head on the pooled output: the encoder is differentiated once.


def head_loss(run: Callable[[Tensor], Any], tokens: Tensor = TOKENS) -> Tensor:
    """The query loss of a head that is adapted to what ``run`` makes of the tokens."""
    torch.manual_seed(4)
    learner = ImplicitCGHead(nn.Linear(8, 3), 0.1, **EXACT).clone()
    features = run(tokens).pooler_output
    learner.adapt(lambda: F.cross_entropy(learner(features[:6]), LABELS), steps=50)
    return F.cross_entropy(learner(features[6:]), LABELS.roll(1))


@functools.cache
def expected_of_a_head() -> Tensor:
    encoder = made("BertModel")
    return slope(lambda: head_loss(encoder), list(encoder.parameters()))


def checkpointing(encoder: Any, reentrant: bool) -> Any:
    encoder.activation_checkpointing_enable({"use_reentrant": reentrant})
    return encoder.train()


BACKBONES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda encoder: encoder,
    "checkpointing": lambda encoder: checkpointing(encoder, False),
    "reentrant checkpointing": lambda encoder: checkpointing(encoder, True),
    "compiled": lambda encoder: torch.compile(encoder, backend="aot_eager"),
    "inductor": torch.compile,
}
SLOW = {"inductor"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in BACKBONES
])  # fmt: skip
def test_a_head(kind: str, attention: str) -> None:
    """With sdpa the plain kernel is forbidden: the fused one it is, or an error."""
    encoder = made("BertModel", attention)
    with kernel("FLASH_ATTENTION") if attention == "sdpa" else nullcontext():
        head_loss(BACKBONES[kind](encoder)).backward()
    found = along(list(encoder.parameters()))
    assert relative_error([found], [expected_of_a_head()]) < TOL


def test_a_head_under_bfloat16() -> None:
    """The encoder's gradient is right to a few roundings of bfloat16 (2**-8 each).

    What the learner does is in float32 (core/test_mixed_precision.py).
    """
    torch.set_default_dtype(torch.float32)
    encoder = made("BertModel", "sdpa")
    found = []
    for low in (True, False):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = head_loss(encoder)
        loss.backward()
        found.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert 2**-12 < relative_error(*found) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(TOKENS).pooler_output.dtype == torch.bfloat16


# A whole network, or LoRA's part of it: the inner problem is the network's.


def network_loss(maml: ImplicitMAML, steps: int = 100) -> Tensor:
    learner = maml.clone()
    learner.adapt(lambda: F.cross_entropy(learner(TOKENS[:6]).logits, LABELS), steps=steps)
    return F.cross_entropy(learner(TOKENS[6:]).logits, LABELS.roll(1))


MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "whole": (lambda attention="eager": made("BertForSequenceClassification", attention),
              {"l2": 5.0}),
    "lora": (lora, {"l2": 0.5, "allow_nograd": True}),
}  # fmt: skip


def phi_of(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@functools.cache
def expected_of(which: str) -> Tensor:
    make, settings = MODELS[which]
    model = make()
    maml = ImplicitMAML(model, 0.1, **settings, **EXACT)
    found = slope(lambda: network_loss(maml), phi_of(model))
    assert float(found.abs()) > 1e-3
    return found


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("attention", ["eager", "math"])
def test_a_network(which: str, attention: str) -> None:
    make, settings = MODELS[which]
    model = make("eager" if attention == "eager" else "sdpa")
    maml = ImplicitMAML(model, 0.1, **settings, **EXACT)
    with kernel("MATH"):
        network_loss(maml).backward()
    assert relative_error([along(phi_of(model))], [expected_of(which)]) < TOL
    assert maml.diagnostics.unsolved == 0


@pytest.mark.parametrize("which", MODELS)
def test_a_network_with_fused_attention(which: str) -> None:
    """`Perturbed` takes differences of gradients: 1e-5 is what it has elsewhere too."""
    make, settings = MODELS[which]
    model = make("sdpa")
    with kernel("FLASH_ATTENTION"):
        with pytest.raises(RuntimeError, match="got fused attention .*; compute it within"):
            network_loss(ImplicitMAML(model, 0.1, **settings, **EXACT), steps=2).backward()
        first_only = {"inner": LBFGS(tol=1e-12), "linear": Perturbed(tol=1e-9)}
        network_loss(ImplicitMAML(model, 0.1, **settings, **first_only)).backward()
    assert relative_error([along(phi_of(model))], [expected_of(which)]) < 1e-5


@pytest.mark.parametrize(("l2", "unsolved"), [(0.5, 1), (5.0, 0)])
def test_which_l2_the_default_solves(l2: float, unsolved: int) -> None:
    """What docs/transformers.md says of it."""
    maml = ImplicitMAML(made("BertForSequenceClassification"), 0.1, l2=l2)
    assert maml.inner == GradientDescent() and maml.max_error == 0.01
    with pytest.warns(UnsolvedWarning) if unsolved else nullcontext():
        network_loss(maml, steps=50).backward()
    assert maml.diagnostics.unsolved == unsolved


def test_the_page() -> None:
    torch.set_default_dtype(torch.float32)
    follow(ROOT / "docs" / "transformers.md")
