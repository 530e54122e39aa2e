"""Console output of runs and commands."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Show only warnings on the console; runs write the rest to their run.log."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=UserWarning)
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    cfsp_logger = logging.getLogger("cfsp")
    cfsp_logger.setLevel(cfsp_logger.level or logging.INFO)  # debug=true may have set it
