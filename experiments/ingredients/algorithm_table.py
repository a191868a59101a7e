"""The algorithms by name, each with its settings; None marks what an algorithm does not have."""

from __future__ import annotations

from typing import Any

KEYS = (
    "scope", "lr", "steps", "l2", "step", "solver", "cg_steps", "cg_tol", "damping", "features",
    "engine", "optimizer", "learn_lr", "learn_l2", "batch_norm", "together", "meta_optimizer",
    "meta_lr",
)  # fmt: skip

_IMPLICIT = {
    "solver": "cg", "cg_steps": 20, "cg_tol": 1e-4, "damping": 0.0, "learn_l2": False, "lr": 0.1,
    "steps": 20,
}  # fmt: skip
_UNROLLED = {"engine": "higher", "optimizer": "sgd", "learn_lr": False, "lr": 0.1}
_HEAD = {"scope": "head", "features": "cached", "batch_norm": "together"}
_NETWORK = {"scope": "network", "batch_norm": "separately"}

ALGORITHMS: dict[str, dict[str, Any]] = {
    # Yang, Ma, Yu (2025), Algorithm 1.
    "rm_metal": {**_HEAD, **_IMPLICIT, "l2": 0.1, "step": "newton", "together": "auto"},
    # Rajeswaran et al. (2019), Algorithm 2 with gradient descent, or Hessian-free, inside. The
    # damping is not in the paper but in its code; without it neither learns (docs/choosing.md).
    "imaml_gd": {**_NETWORK, **_IMPLICIT, "l2": 2.0, "step": "gradient", "steps": 16,
                 "cg_steps": 5, "damping": 20.0},
    "imaml_hf": {**_NETWORK, **_IMPLICIT, "l2": 2.0, "step": "newton", "steps": 5,
                 "cg_steps": 5, "damping": 20.0},
    # Ji, Yang, Liang (2020): unrolled, theta = features only.
    "itd_bio": {**_HEAD, **_UNROLLED, "steps": 20},
    # Raghu et al. (2019).
    "anil": {**_HEAD, **_UNROLLED, "steps": 10},
    "fo_anil": {**_HEAD, **_UNROLLED, "steps": 10},
    # Finn, Abbeel, Levine (2017).
    "maml": {**_NETWORK, **_UNROLLED, "steps": 3},
    "fomaml": {**_NETWORK, **_UNROLLED, "steps": 3},
    # Nichol, Achiam, Schulman (2018): plain steps towards phi^K.
    "reptile": {**_NETWORK, "optimizer": "sgd", "lr": 0.05, "steps": 5,
                "meta_optimizer": "sgd", "meta_lr": 0.5},
    # Any module, any differentiable inner optimiser.
    "unrolled": {**_HEAD, **_UNROLLED, "steps": 5},
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    # Algorithm 1 as printed: fixed gradient steps, plain gradient outside.
    "paper": {"step": "gradient", "meta_optimizer": "sgd", "meta_lr": 0.1},
    # The released code: no regulariser, Adam outside, no warm start.
    "as_released": {"step": "gradient", "l2": 0.0},
}
LEARNED_INITIAL_HEAD = ("anil", "fo_anil", "unrolled")


def settings_of(name: str, variant: str | None) -> dict[str, Any]:
    """The settings of an algorithm; every one of `KEYS` is there.

    Those of an unknown name are rm_metal's: it is the name that the user has to hear of.
    """
    common = {"meta_optimizer": "adam", "meta_lr": 0.001}
    own = {**ALGORITHMS.get(name, ALGORITHMS["rm_metal"]), **VARIANTS.get(variant or "", {})}
    return {**dict.fromkeys(KEYS), **common, **own}
