"""From the database to tables, figures and one page: `python -m experiments.report`.

Read `archive` (the runs), `sweep_state` (which cells of a sweep they fill), `sections` (what is
shown, one file each), `content` (tables and figures as data), `page`, `table_text`, `drawing` (as
files). Nothing here trains, and nothing imports torch.
"""

from experiments import extra  # noqa: F401  (says what to install)
