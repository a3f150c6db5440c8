"""Where the studio keeps what it derives from run folders."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/rlmed/studio`, or the same below `~/.cache`; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification of XDG has relative paths ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "rlmed" / "studio"
