"""``lowprec_jax report``: the report of a run, at any time.

Imports no JAX. Public name: `run_report`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lowprec_jax.errors import UserError

__all__ = ["run_report"]


def run_report(words: Sequence[str]) -> None:
    """Runs ``lowprec_jax report WORDS`` and says what was written.

    Raises:
      UserError: the words are not one run directory, or see `training.report.write_report`.
    """
    parser = argparse.ArgumentParser(
        prog="lowprec_jax report",
        usage="lowprec_jax report RUN",
        description="Writes report.html and PNG files into a run directory, finished or not.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="*", metavar="RUN", help="directory, such as runs/quickstart")
    options, unknown = parser.parse_known_args(words)
    if unknown or len(options.run) != 1:
        given = f"given: {' '.join(words)}" if words else "given: nothing"
        raise UserError(
            f"lowprec_jax report takes one run directory, {given}. Write: "
            "lowprec_jax report runs/quickstart."
        )
    run = Path(options.run[0])
    if not run.exists() and (Path("runs") / run).is_dir():
        raise UserError(f"No run directory '{run}'. Did you mean '{Path('runs') / run}'?")

    from lowprec_jax.training.report import write_report

    page, *pictures = write_report(run)
    print(f"Wrote {page}, and beside it {', '.join(path.name for path in pictures)}.")
