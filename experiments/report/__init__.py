"""From the runs to tables, figures and one page: `python -m experiments.report`.

Read `runs` (what there is), `sweep_state` (which cells of a sweep it fills), `sections` (what is
shown), `content` (tables and figures as data), `write` (as files); `get_results` gives the runs as
a pandas DataFrame. Nothing here trains, and nothing imports torch.
"""

from experiments import extra  # noqa: F401, I001  (first: it says what to install)
from experiments.report.results import get_results

__all__ = ["get_results"]
