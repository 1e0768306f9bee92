"""`python -m bench` is the command `fastbn bench`."""

import sys

from fastbn.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
