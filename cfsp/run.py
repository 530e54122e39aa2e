"""Entry point of ``python -m cfsp.run``; the command line itself is in :mod:`cfsp.cli.main`."""

from cfsp.cli.main import main

if __name__ == "__main__":
    main()
