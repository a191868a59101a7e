"""The implicit learners in PyTorch Lightning 2: modules, and episodic data that Lightning accepts.

Nothing else in the library imports this package.
"""

try:
    import pytorch_lightning  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"expected pytorch-lightning 2, got {str(error)!r}; pip install 'l2l-implicit[lightning]'"
    ) from error

from l2l_implicit.lightning.data import EpisodicDataModule
from l2l_implicit.lightning.module import LightningImplicitCGHead, LightningImplicitMAML

__all__ = ["EpisodicDataModule", "LightningImplicitCGHead", "LightningImplicitMAML"]
