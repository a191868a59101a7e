"""From configuration to objects: the tasks, the feature extractor, the algorithm."""

import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)
