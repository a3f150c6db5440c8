"""Write the report of a run folder; see `rlmed.report.command`."""

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)

from rlmed.report.command import main

if __name__ == "__main__":
    main()
