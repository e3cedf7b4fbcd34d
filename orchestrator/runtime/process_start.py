"""Since when has this process run? A worker costs from its start, long before it has imported anything."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED_S = time.time()
_START_TIME = 19  # of the fields behind the command's name, counted from 0; see proc(5), field 22


def process_start() -> float:
    """Seconds since the epoch; where the system does not say (it is Linux that does), when this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        age_s = up_s - int(fields[_START_TIME]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return _IMPORTED_S
    return min(_IMPORTED_S, time.time() - age_s)
