"""A sweep's report, one HTML file, from its records; ``python scripts/report.py --help``."""

import sys

from cfsp.system import interrupts

if __name__ == "__main__":
    interrupts.quiet("report")

from cfsp.tables.report import main

if __name__ == "__main__":
    sys.exit(main())
