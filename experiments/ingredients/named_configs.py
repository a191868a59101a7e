"""Settings by name: benchmarks, algorithms, and the papers' own. ``with cifarfs anil seed=1``.

Later names beat earlier ones, as in ``rm_metal paper``, but no two may choose different algorithms
or data sets; a key given on the command line beats a named config, in either order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.ingredients.algorithm_table import ALGORITHMS, ALIASES, VARIANTS, canonical
from experiments.tracking.errors import wrong

Config = dict[str, Any]

BENCHMARKS: dict[str, Config] = {
    "glyphs": {"tasks": {"name": "glyphs"}},
    "caltech101": {"tasks": {"name": "caltech101"}},
    "cifarfs": {"tasks": {"name": "cifarfs"}, "model": {"hidden": 64}},
    "fc100": {"tasks": {"name": "fc100"}, "model": {"hidden": 64}},
    "mini_imagenet": {"tasks": {"name": "mini_imagenet"}},
    "tiered_imagenet": {"tasks": {"name": "tiered_imagenet"}},
    "omniglot": {"tasks": {"name": "omniglot"}, "model": {"hidden": 64}},
    "folder": {"tasks": {"name": "folder"}},
    "sine": {"tasks": {"name": "sine", "shots": 10, "queries": 10}},
}

_METHODS: dict[str, Config] = {
    **{name: {"algorithm": {"name": canonical(name)}} for name in (*ALGORITHMS, *ALIASES)},
    **{name: {"algorithm": {"name": "ImplicitCGHead", "variant": name}} for name in VARIANTS},
}

# A run of seconds, to see that everything works.
_SMOKE: Config = {
    "tasks": {"name": "glyphs", "level": "easy"}, "model": {"hidden": 8}, "iterations": 4,
    "validate_every": 2, "validation_tasks": 4, "test_tasks": 8,
}  # fmt: skip


def _yang() -> dict[str, Config]:
    """Yang et al. (2025), section 5 and appendix C.2: ``yang_<benchmark>_<algorithm>``."""
    printed = {  # meta_lr, lr, steps: on CIFAR-FS and FC100, and on mini- and tieredImageNet
        "rm_metal": ((1e-4, 0.1, 20), (1e-3, 0.05, 20)),
        "itd_bio": ((1e-4, 0.1, 20), (1e-3, 0.05, 20)),
        "maml": ((1e-3, 0.5, 3), (5e-3, 0.5, 3)),
        "anil": ((1e-4, 0.1, 10), (1e-3, 0.1, 5)),
    }
    more = {"rm_metal": {"variant": "paper", "cg_steps": 20}, "maml": {"test_scope": "head"}}
    data = {"cifarfs": (64, 0), "fc100": (64, 0), "mini_imagenet": (32, 1),
            "tiered_imagenet": (32, 1)}  # fmt: skip
    return {
        f"yang_{benchmark}_{name}": {
            "tasks": {"name": benchmark, "ways": 5, "shots": 5, "queries": 5},
            "model": {"name": "cnn4", "hidden": hidden},
            "algorithm": {"name": name, "lr": lr, "steps": steps, "test_steps": 20,
                          **more.get(name, {})},
            "meta_lr": meta_lr, "iterations": 2000, "meta_batch": 32,
        }
        for benchmark, (hidden, column) in data.items() for name, rows in printed.items()
        for meta_lr, lr, steps in [rows[column]]
    }  # fmt: skip


def _rajeswaran() -> dict[str, Config]:
    """Rajeswaran et al. (2019), Tables 2 and 3: ``rajeswaran_omniglot_5way_1shot_gd`` and so on.

    The paper prints lambda, the inner steps and the CG steps; the networks are those of Finn et al.
    (2017), which it refers to: strided convolutions for Omniglot, pools for mini-ImageNet. Its
    outer step size, meta-batch, number of outer iterations and query images are not in the text:
    ours. Its lambda (2 on Omniglot, 0.5 on mini-ImageNet) is here what learns, 0.5 and Hessian-free
    0.1: docs/choosing.md.
    """
    kinds: dict[str, Config] = {"gd": {"l2": 0.5, "lr": 0.1}, "hf": {"l2": 0.1, "steps": 5}}
    tables = {
        f"omniglot_{ways}way_{shots}shot":
            (("omniglot", ways, shots, 5, shots), ("omniglot_cnn", 64), steps)
        for ways, steps in ((5, 16), (20, 25)) for shots in (1, 5)
    }  # fmt: skip
    tables["mini_imagenet"] = (("mini_imagenet", 5, 1, 15, 15), ("cnn4", 32), 10)
    sizes = ("name", "ways", "shots", "queries", "test_queries")
    return {
        f"rajeswaran_{table}_{kind}": {
            "tasks": dict(zip(sizes, task, strict=True)),
            "model": {"name": network, "hidden": hidden, "channels_last": False},
            "algorithm": {"name": f"imaml_{kind}", "cg_steps": 5, "steps": steps, **own},
        }
        for table, (task, (network, hidden), steps) in tables.items()
        for kind, own in kinds.items()
    }


def _best() -> dict[str, Config]:
    """The best that CNN4-64 gave here on CIFAR-FS, and the same for FC100.

    Tasks of ten classes in training, augmented images, an outer step that decays to 0; in test
    heads that are held closer than in training, on features of ten crops; as many images as the
    protocol of Yang et al. (2025). Which choices validation made: reproduction.md.
    """
    return {
        f"{name}_best": {
            "tasks": {"name": name, "ways": 10, "test_ways": 5, "augmentation": "lee2019"},
            "model": {"name": "cnn4", "hidden": 64, "precision": "bfloat16"},
            "algorithm": {"name": "ImplicitCGHead", "test_l2": 3.0, "test_crops": 10},
            "meta_lr": 0.003, "meta_lr_schedule": "cosine", "iterations": 2000, "meta_batch": 16,
            "validate_every": 200, "validation_tasks": 400, "early_stopping": True,
            "test_tasks": 2000,
        }
        for name in ("cifarfs", "fc100")
    }  # fmt: skip


def all_configs() -> dict[str, Config]:
    """Every named config of `experiments.train`."""
    return {**BENCHMARKS, **_METHODS, **_yang(), **_rajeswaran(), **_best(), "smoke": _SMOKE}


def check_choices(names: Sequence[str]) -> None:
    """UserError for two of these that choose different data sets, algorithms or variants."""
    known = all_configs()
    for group, key in (("tasks", "name"), ("algorithm", "name"), ("algorithm", "variant")):
        values = {name: known.get(name, {}).get(group, {}).get(key) for name in names}
        chosen = {canonical(value): name for name, value in values.items() if value is not None}
        if len(chosen) > 1:
            raise wrong(f"{group}.{key}", "one choice", " and ".join(chosen.values()),
                        "leave out all but one")
