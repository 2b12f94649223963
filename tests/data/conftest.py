import pytest

from lowprec_jax.data import Corpus, load_corpus


@pytest.fixture(scope="session")
def stdlib() -> Corpus:
    return load_corpus("stdlib")
