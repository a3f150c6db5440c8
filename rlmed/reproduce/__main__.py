"""Run base, SFT and RL over several seeds; see `rlmed.reproduce.runs`."""

from rlmed.reproduce.runs import main

if __name__ == "__main__":
    main()
