"""Write the report of a run folder; see `rlmed.report.page`."""

from rlmed.report.page import main

if __name__ == "__main__":
    main()
