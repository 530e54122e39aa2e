"""Tables and figures of an experiment from its records; ``python scripts/tables.py --help``."""

import sys

from cfsp.tables.command import main

if __name__ == "__main__":
    sys.exit(main())
