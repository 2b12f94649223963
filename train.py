"""Trains a language model: ``python train.py [--config NAME_OR_PATH] [--section.field value]``.

The same as ``lowprec_jax train``. ``--help`` lists every option.
"""

import os
import sys

# Before JAX starts: emulated CPU devices deadlock at random with fewer threads.
os.environ.setdefault("PJRT_NPROC", "32")

from lowprec_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
