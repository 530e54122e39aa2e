"""Run what is missing of an experiment; ``python scripts/sweep.py --help``."""

import sys

from cfsp.system import interrupts

if __name__ == "__main__":
    interrupts.quiet("sweep")

from cfsp.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
