"""Trains a language model: ``python train.py [--config NAME_OR_PATH] [--section.field value]``.

The same as ``lowprec_jax train``. ``--help`` lists every option.
"""

import sys

from lowprec_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
