"""The tiny runs of the training tests, on their text."""

from training.conftest import run_config, text_file

__all__ = ["run_config", "text_file"]
