"""The fixtures and hooks of checkpoints.py, where pytest looks for them."""
from checkpoints import (  # noqa: F401
    checkpoint,
    one_thread,
    pytest_collection_modifyitems,
    pytest_configure,
    verifier,
)
