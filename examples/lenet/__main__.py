"""`python -m examples.lenet` is the command `fastbn demo`."""

import sys

from fastbn.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
