"""Print the coverage that `make coverage` measured, one row per package of the architecture."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from coverage import Coverage

from tests.root import ROOT


def main() -> None:
    """Print the share of statements that ran."""
    coverage = Coverage(data_file=ROOT / ".coverage", config_file=ROOT / "pyproject.toml")
    coverage.load()
    statements: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for file in coverage.get_data().measured_files():
        if not file.endswith(".py"):  # a template, which jinja names in what it compiles
            continue
        _, here, _, unrun, _ = coverage.analysis2(file)
        path = Path(file).relative_to(ROOT)
        package = "/".join(path.parts[: 2 if path.parts[0] == "rlmed" and len(path.parts) > 2 else 1])
        for name in (package, "all"):
            statements[name] += len(here)
            missing[name] += len(unrun)
    for name in sorted(statements, key=lambda name: (name == "all", name)):
        share = 100 * (1 - missing[name] / max(statements[name], 1))
        sys.stdout.write(f"{name:20} {statements[name]:6} statements {share:5.1f} %\n")


if __name__ == "__main__":
    main()
