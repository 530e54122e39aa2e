"""The one entry point: ``cfsp ...`` and ``python -m cfsp.run ...``.

The Hydra task never exits the process (that would end a whole multirun); :func:`main` maps exceptions to exit codes:
0 success, 1 a run failed, 2 the configuration or an input is wrong.
"""

from __future__ import annotations

import logging
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cfsp.components import suggest
from cfsp.compose import explain
from cfsp.config import parse
from cfsp.errors import CfspError, ConfigError
from cfsp.package import config_folder

#: First words that are not overrides.
COMMANDS = ("prune",)


@hydra.main(config_path=str(config_folder().resolve()), config_name="config", version_base="1.3")
def _task(config: DictConfig) -> None:
    checked = parse(config)
    from cfsp.pipeline import run
    from cfsp.tables.terminal import show

    record, out = run(checked, multirun=HydraConfig.get().mode == RunMode.MULTIRUN)
    show(record, out)


def main() -> None:
    """Run, and exit with the code that says how it ended."""
    sys.exit(_main(sys.argv))


def _main(argv: list[str]) -> int:
    debug = "debug=true" in [word.lower() for word in argv]
    # Hydra would print its own message and exit; the mapping below needs the exception.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("cfsp").setLevel(logging.INFO)
    try:
        _strip_command(argv)
        _task()
        return 0
    except Exception as error:
        if debug:
            raise
        return _report(error)
    except KeyboardInterrupt:
        print("cfsp: interrupted", file=sys.stderr)
        return 1


def _strip_command(argv: list[str]) -> None:
    if len(argv) < 2 or argv[1].startswith(("-", "+", "~")) or "=" in argv[1]:
        return
    if argv[1] not in COMMANDS:
        raise ConfigError(
            f"{argv[1]}: there is no such command{suggest(argv[1], COMMANDS)}; commands: {', '.join(COMMANDS)} "
            "(the default), then key=value ...; see cfsp --help"
        )
    del argv[1]


def _report(error: Exception) -> int:
    if isinstance(error, HydraException | OmegaConfBaseException):
        error = explain(error)
    if isinstance(error, OSError) and error.filename and _is_output_error(error):
        error = ConfigError(
            f"paths.output_dir: {error.filename} cannot be written ({error.strerror}); give another folder"
        )
    if isinstance(error, ConfigError):
        for problem in error.problems:
            print(f"cfsp: {problem}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, CfspError):
        print(f"cfsp: {error}", file=sys.stderr)
        return error.exit_code
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"cfsp: the run failed ({type(error).__name__}: {reason}); debug=true shows where", file=sys.stderr)
    return 1


def _is_output_error(error: OSError) -> bool:
    """Hydra makes the run's folder before the task starts; what fails there is the user's path."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "run_job" and "hydra" in traceback.tb_frame.f_code.co_filename:
            inner = traceback.tb_next
            return inner is not None and inner.tb_frame.f_code.co_name in ("makedirs", "mkdir", "_save_config", "__init__")
        traceback = traceback.tb_next
    return False


if __name__ == "__main__":
    main()
