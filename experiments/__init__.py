"""The commands, `python -m experiments.train` and others, and what they are made of."""

import signal
import sys

if sys.argv[:1] == ["-m"]:  # a command's modules are imported: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
