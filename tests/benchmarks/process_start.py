"""When was the interpreter of this worker process up? Ray calls ``mark`` before it gives the process any work.

Nothing heavy is imported here, for that would count as the interpreter's start.
"""

from __future__ import annotations

import os
import time

UP = "GROUNDSWELL_BENCHMARK_UP_S"


def mark() -> None:
    os.environ[UP] = repr(time.monotonic())
