import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test modules import them, too


@pytest.fixture(scope="session", autouse=True)
def hostile_rewards_are_importable():
    """Spawned workers get a copy of `sys.path`."""
    sys.path.insert(0, str(Path(__file__).parent))
    yield
    sys.path.remove(str(Path(__file__).parent))
