"""The outer loop: episodes, algorithms, scores, checkpoints, and what a run leaves."""

import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)
