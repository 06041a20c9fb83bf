"""Share one tokenised corpus among the data tests."""

import pytest

from tests.helpers.corpus import TokenisedCorpus, tokenised_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenisedCorpus:
    return tokenised_corpus(tmp_path_factory.mktemp("corpus"))
