"""``python -m orthrus_rt``: the ``orthrus-rt`` command."""

import sys

from orthrus_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
