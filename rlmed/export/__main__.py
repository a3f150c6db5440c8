"""Export a run's model as a Hugging Face folder; see `rlmed.export.command`."""

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

from rlmed.export.command import main

if __name__ == "__main__":
    main()
