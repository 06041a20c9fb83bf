from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> Iterator[None]:
    """Fix the seed, and use one thread: small tensors are faster, and results do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    yield
    torch.set_num_threads(threads)
