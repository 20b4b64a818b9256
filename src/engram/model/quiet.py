"""Keep transformers silent while it loads something: engram says itself what went wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from reporting, drawing bars and converting for the length of the block."""
    from transformers.utils import logging as reports

    verbosity = reports.get_verbosity()
    # Otherwise weights that are pickled are looked for in an unmerged request of a robot.
    converting = os.environ.get(_NO_CONVERSION)
    hook = reports.set_tqdm_hook(lambda bar, given, how: bar(*given, **{**how, "disable": True}))
    try:
        reports.set_verbosity(logging.CRITICAL)
        os.environ[_NO_CONVERSION] = "1"
        yield
    finally:
        reports.set_verbosity(verbosity)
        reports.set_tqdm_hook(hook)
        if converting is None:
            del os.environ[_NO_CONVERSION]
        else:
            os.environ[_NO_CONVERSION] = converting
