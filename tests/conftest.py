"""What all tests share: few threads, since the suite itself runs in two processes."""

import pytest
import torch

collect_ignore = ["plugin"]


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(1)
