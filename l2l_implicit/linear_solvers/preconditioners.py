"""Approximate inverses that conjugate gradient multiplies its residuals with."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers.solution import Matvec, System


class Preconditioner(Protocol):
    """Settings and a method: an approximate inverse of T symmetric matrices.

    It may use products with the matrix, or ask ``System.of(hvp)`` what else is known of it.

    Example:
        >>> import torch
        >>> from l2l_implicit import CG
        >>> class Known:
        ...     def inverse(self, hvp, like):
        ...         return lambda r: r / torch.tensor([1.0, 1e6])
        >>> A = torch.tensor([1.0, 1e6])
        >>> CG(preconditioner=Known()).solve(lambda p: p * A, torch.ones(1, 2)).steps
        tensor([1])
    """

    def inverse(self, hvp: Matvec, like: Tensor) -> Matvec:
        """Products with the inverse, ``[T, n] -> [T, n]``: symmetric and positive definite.

        Args:
            hvp: products with the matrices, l2 and damping in them.
            like: a tensor as the vectors are.
        """
        ...


@dataclass(frozen=True)
class Jacobi:
    r"""The inverse of the diagonal: for features, or parameters, of different sizes.

    The diagonal of a linear head is computed exactly. For any other module it is estimated from
    products, as the mean of :math:`z \odot A z` over random signs z: right on average, and the
    better the heavier the diagonal is beside the rest of its row. An entry below l2 plus damping,
    which only an estimate or an indefinite matrix has, counts as that.

    Args:
        probes: the number of products an estimate takes.
        seed: of their signs; torch's own generator is left alone.

    References:
        Bekas, Kokiopoulou, Saad (2007), An estimator for the diagonal of a matrix.

    Example:
        >>> import torch
        >>> from l2l_implicit import CG, Jacobi
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 1e6]])
        >>> CG(preconditioner=Jacobi(probes=2)).solve(lambda p: p @ A, torch.ones(1, 2)).steps
        tensor([3])
    """

    probes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        checks.count("Jacobi: probes", self.probes)

    def inverse(self, hvp: Matvec, like: Tensor) -> Matvec:
        """Division by the diagonal."""
        system = System.of(hvp)
        known = None if system.at is None else system.at.diagonal()
        diagonal = self._estimate(system, like) if known is None else known + system.damping
        eps = torch.finfo(diagonal.dtype).eps
        least = (eps * diagonal.abs().amax(1, keepdim=True)).clamp_min(system.shift)
        inverse = torch.maximum(diagonal, least).reciprocal()
        inverse = torch.where(inverse.isfinite(), inverse, 1.0)
        return lambda vector: vector * inverse

    def _estimate(self, system: System, like: Tensor) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        total = torch.zeros_like(like)
        for _ in range(self.probes):
            signs = torch.randint(2, like.shape[1:], generator=generator, device="cpu")
            z = (2 * signs - 1).to(like).expand_as(like)
            total.addcmul_(z, system(z))
        return total.div_(self.probes)


@dataclass(frozen=True)
class Kronecker:
    r"""The Kronecker factors of a linear head: covariance of the features, of the outputs.

    The Hessian of a head is :math:`\sum_i S_i \otimes x_i x_i^\top + l_2 I` with the features
    :math:`x_i` and the softmax's covariance :math:`S_i` of sample i; here every :math:`S_i` is
    replaced by the mean. It costs one eigenvalue problem as large as the samples or the features
    are few, and no product. For the squared error it is the Hessian itself, and one step is enough.

    For a linear head with cross-entropy or squared error and l2 (or the damping) above 0.

    References:
        Martens, Grosse (2015), Kronecker-factored Approximate Curvature.

    Example:
        >>> from torch import nn
        >>> from l2l_implicit import CG, ImplicitCGHead, Kronecker, LBFGS
        >>> linear = CG(preconditioner=Kronecker())
        >>> head = ImplicitCGHead(nn.Linear(10, 5), lr=0.1, inner=LBFGS(), linear=linear)
    """

    def inverse(self, hvp: Matvec, like: Tensor) -> Matvec:
        """The inverse of the Kronecker product plus l2.

        Raises:
            ValueError: for anything but a regularised linear head.
        """
        system, inverse, got = System.of(hvp), None, "products alone"
        if (at := system.at) is not None:
            got = "another module or loss" if system.shift > 0.0 else "l2=0 and no damping"
            inverse = at.kronecker_inverse(system.shift) if system.shift > 0.0 else None
        if inverse is None:
            raise ValueError(
                "preconditioner=Kronecker(): expected a linear head with cross-entropy or squared "
                f"error and l2 above 0, got {got}; use preconditioner=Nystrom() or Jacobi()"
            )
        return inverse
