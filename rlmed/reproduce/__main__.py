"""Run base, SFT and RL over several seeds; see `rlmed.reproduce.runs`."""

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

from rlmed.reproduce.runs import main

if __name__ == "__main__":
    main()
