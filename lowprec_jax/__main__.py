"""``python -m lowprec_jax``: the same as the command ``lowprec_jax``."""

import sys

from lowprec_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
