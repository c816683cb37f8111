import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Each run collects garbage several times: a third of a second each, among all the objects of the imports."""
    gc.freeze()
    yield
    gc.unfreeze()
