"""Tables and figures of an experiment from its records; ``python scripts/tables.py --help``."""

import sys

from cfsp.system import interrupts

if __name__ == "__main__":
    interrupts.quiet("tables")

from cfsp.tables.command import main

if __name__ == "__main__":
    sys.exit(main())
