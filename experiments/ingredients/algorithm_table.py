"""The algorithms by name, and their settings.

A setting is one line of `AlgorithmSettings`: its type, its default in each family of algorithms
that has it, its words. An algorithm's own defaults stand in `ALGORITHMS`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import BeforeValidator, Field, model_validator

from experiments.tracking.config import Count, NotNegative, Positive, Settings, Values
from experiments.tracking.errors import wrong

_HEAD, _NETWORK = ("head", "implicit"), ("network", "implicit")
_UNROLLED_HEAD, _UNROLLED = ("head", "unrolled"), ("network", "unrolled")

# The families of an algorithm, and what differs from their defaults.
ALGORITHMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    # Yang, Ma, Yu (2025), Algorithm 1.
    "ImplicitCGHead": (_HEAD, {"l2": 0.1, "step": "newton", "together": "auto"}),
    # Rajeswaran et al. (2019), Algorithm 2 with gradient descent, or Hessian-free, inside. With the
    # paper's l2 = 2 and the Hessian neither learns (docs/choosing.md).
    "ImplicitMAML": (_NETWORK, {"l2": 0.5, "step": "gradient", "lr": 0.2, "steps": 8,
                                "cg_steps": 5, "curvature": "gauss_newton", "meta_lr": 0.003}),
    "ImplicitMAML_HF": (_NETWORK, {"l2": 0.1, "step": "newton", "steps": 3, "cg_steps": 5,
                                   "curvature": "gauss_newton", "meta_lr": 0.003}),
    # Ji, Yang, Liang (2020): unrolled, theta = features only.
    "itd_bio": (_UNROLLED_HEAD, {"steps": 20}),
    # Raghu et al. (2019).
    "anil": (_UNROLLED_HEAD, {"steps": 10}),
    "fo_anil": (_UNROLLED_HEAD, {"steps": 10}),
    # Finn, Abbeel, Levine (2017).
    "maml": (_UNROLLED, {"steps": 3}),
    "fomaml": (_UNROLLED, {"steps": 3}),
    # Nichol, Achiam, Schulman (2018): plain steps towards phi^K.
    "reptile": (("network",), {"optimizer": "sgd", "lr": 0.05, "steps": 5,
                               "meta_optimizer": "sgd", "meta_lr": 0.5}),
    # Any module, any differentiable inner optimiser.
    "unrolled": (_UNROLLED_HEAD, {"steps": 5}),
    # Bertinetto et al. (2019): a ridge head in closed form.
    "r2d2": (_HEAD, {"l2": 0.1, "step": "newton", "together": "auto", "learn_l2": True,
                     "scale": 10.0}),
    # ImplicitCGHead with a learned l2, and a learned factor as in Lee et al. (2019), MetaOptNet.
    "logistic": (_HEAD, {"l2": 0.1, "step": "newton", "together": "auto", "learn_l2": True,
                         "scale": 1.0}),
    # Snell, Swersky, Zemel (2017).
    "protonet": (("head",), {"features": None}),
    # Li et al. (2017): a learned step size for each entry of each parameter, and one step.
    "meta_sgd": (_UNROLLED, {"steps": 1, "learn_lr": None}),
    # Antoniou et al. (2019): of MAML++, the multi-step loss; a tenth of a default run is ours.
    "maml_msl": (_UNROLLED, {"steps": 5, "anneal": 60}),
}  # fmt: skip

# The papers' names of them, and those of earlier records.
ALIASES = {"rm_metal": "ImplicitCGHead", "imaml_gd": "ImplicitMAML", "imaml_hf": "ImplicitMAML_HF"}
VARIANTS: dict[str, dict[str, Any]] = {
    # Algorithm 1 as printed: fixed gradient steps, plain gradient outside.
    "paper": {"step": "gradient", "meta_optimizer": "sgd", "meta_lr": 0.1},
    # The released code: no regulariser, Adam outside, no warm start.
    "as_released": {"step": "gradient", "l2": 0.0},
}
LEARNED_INITIAL_HEAD = ("anil", "fo_anil", "unrolled")
OF_CLASSES = ("r2d2", "logistic", "protonet")
OUTER = {"meta_optimizer": "adam", "meta_lr": 0.001}


def canonical(name: Any) -> Any:
    """An algorithm's name, where it is called by another."""
    return ALIASES.get(name, name) if isinstance(name, str) else name


def own(**families: Any) -> Any:
    """A setting that the algorithms of these families have, with its default there."""
    return Field(default=None, json_schema_extra={"own": families})


class AlgorithmSettings(Settings):
    """The settings of all algorithms; None where an algorithm has no such setting."""

    # one of docs/algorithms.md
    name: Annotated[Literal[tuple(ALGORITHMS)], BeforeValidator(canonical)] = "ImplicitCGHead"
    # ImplicitCGHead: None (the learner's own defaults), paper or as_released
    variant: Literal[tuple(VARIANTS)] | None = None
    # what is adapted: head or network
    scope: Literal["head", "network"] = own(head="head", network="network")
    # inner step size; auto: from the largest curvature (step=gradient)
    lr: Positive | Literal["auto"] = own(implicit=0.1, unrolled=0.1)
    steps: Count = own(implicit=20)  # the most inner steps K
    test_steps: Count | None = None  # inner steps in validation and test; None: as in training
    # head: a network's head alone is adapted in validation and test
    test_scope: Literal["head"] | None = None
    l2: NotNegative = own()  # inner regulariser
    test_l2: NotNegative | None = None  # of a head in validation and test; None: as in training
    # 10: a head's features in validation and test are the mean over ten crops of each image
    test_crops: Literal[10] | None = None
    step: Literal["newton", "lbfgs", "gradient"] = own()  # inner solver: newton, lbfgs or gradient
    # linear solver: cg, neumann, nystrom, identity or direct
    solver: Literal["cg", "neumann", "nystrom", "identity", "direct"] = own(implicit="cg")
    # of cg: none, jacobi, nystrom or kronecker (a linear head)
    preconditioner: Literal["none", "jacobi", "nystrom", "kronecker"] = own(implicit="none")
    truncated: bool = own(implicit=False)  # of cg: end where the loss is not convex
    # relative error of the hypergradient at which both solvers end; 0: by their own tolerances
    accuracy: NotNegative = own(implicit=0.0)
    cg_steps: Count = own(implicit=20)  # the most steps N of the linear solver
    cg_tol: Positive = own(implicit=1e-4)  # relative residual at which the linear solver stops
    damping: NotNegative = own(implicit=0.0)  # added to the diagonal of the linear system
    # matrix of the linear system and of Newton's method: hessian or gauss_newton
    curvature: Literal["hessian", "gauss_newton"] = own()
    # cached (once a task) or as_published (at every inner step)
    features: Literal["cached", "as_published"] = own(head="cached")
    # of unrolled differentiation: higher or learn2learn
    engine: Literal["higher", "learn2learn"] = own(unrolled="higher")
    optimizer: Literal["sgd", "adam", "rmsprop"] = own(unrolled="sgd")  # inner: sgd, adam, rmsprop
    learn_lr: bool = own(unrolled=False)  # meta-learn the inner step size
    learn_l2: bool = own(implicit=False)  # meta-learn the regulariser
    scale: Positive = own()  # of the head's outputs as logits: a factor, meta-learned from here on
    anneal: Count = own()  # outer iterations until the query loss after the last step counts alone
    # the heads of all tasks of a batch at once; auto: see docs/cost.md
    together: bool | Literal["auto"] = own()
    # support and query: together, separately or eval
    batch_norm: Literal["together", "separately", "eval"] = own(
        head="together", network="separately"
    )

    @classmethod
    def own_defaults(cls, given: Values, others: Values) -> Values:
        return defaults_of(given.get("name"), given.get("variant"))

    @classmethod
    def read(cls, values: Values) -> list[str]:
        has = defaults_of(values.get("name"), values.get("variant"))
        return [name for name in cls.model_fields if has.get(name, "") is not None]

    @model_validator(mode="before")
    @classmethod
    def _without_those_of_others(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None or key not in _OWN}

    @model_validator(mode="after")
    def _fit_together(self) -> AlgorithmSettings:
        def refuse(key: str, expected: str, todo: str = "leave it out", why: str = "") -> NoReturn:
            raise wrong(key, expected, f"{getattr(self, key)!r}{why}", todo)

        name = self.name
        for key, default in defaults_of(name, self.variant).items():
            value = getattr(self, key, default)
            if default is None and value is not None:
                refuse(key, f"no such setting for {name}")
            if default is not None and value is None:
                refuse(key, f"a value for {name}", f"try {default!r}")
        network, usual = self.scope == "network", defaults_of(name, None)["scope"]
        for key, has in {
            "variant": name == "ImplicitCGHead", "test_steps": self.steps is not None,
            "test_crops": not network, "test_scope": network and name != "meta_sgd",
        }.items():  # fmt: skip
            if getattr(self, key) is not None and not has:
                refuse(key, f"none for {name}")
        if self.scope != usual and name != "unrolled":
            refuse("scope", f"{usual!r} for {name}", "use unrolled, or an algorithm of that scope")
        if network and self.batch_norm == "together":
            refuse("batch_norm", f"separately or eval for {name}",
                   "a network that is adapted sees the query set only after the inner loop")
        if network and self.features == "as_published":
            refuse("features", "'cached' with scope='network'",
                   "a network that is adapted has no features to keep")
        if self.test_l2 is not None and (network or self.learn_l2 is not False):
            refuse("test_l2", f"none for {name}, or a head whose l2 is not learned")
        if self.solver not in ("cg", None) and (self.preconditioner != "none" or self.truncated):
            refuse("solver", "cg with a preconditioner or truncated=True", "leave them out")
        if network and self.preconditioner == "kronecker":
            refuse("preconditioner", f"jacobi or nystrom for {name}",
                   why=", which only a linear head has")
        if self.lr == "auto" and self.step != "gradient":
            refuse("lr", "a number without step=gradient", "try 0.1")
        if self.together is True and self.features == "as_published":
            refuse("together", "False with features='as_published'",
                   "the backbone cannot run again at every inner step of all tasks at once")
        own_steps = name in ("itd_bio", "unrolled", "meta_sgd")
        others = own_steps or self.optimizer != "sgd" or self.learn_lr
        if self.engine == "learn2learn" and others:
            refuse("engine", f"higher for {name} with optimizer={self.optimizer}, learn_lr="
                   f"{self.learn_lr}", "use engine=higher", ", whose MAML has none of these")
        return self


_OWN: dict[str, Any] = {
    name: field.json_schema_extra["own"]
    for name, field in AlgorithmSettings.model_fields.items()
    if isinstance(field.json_schema_extra, dict)
}


def defaults_of(name: Any, variant: Any) -> dict[str, Any]:
    """The settings of an algorithm that depend on its name, those of the outer problem too.

    Those of an unknown name are ImplicitCGHead's: it is the name that the user has to hear of.
    """
    families, values = ALGORITHMS.get(canonical(str(name)), ALGORITHMS["ImplicitCGHead"])
    found = {
        key: next((given[family] for family in families if family in given), None)
        for key, given in _OWN.items()
    }
    return {**OUTER, **found, **values, **VARIANTS.get(str(variant), {})}
