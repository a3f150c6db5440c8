"""Show run folders in a browser; see `rlmed.studio.command`."""

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)

from rlmed.studio.command import main

if __name__ == "__main__":
    main()
