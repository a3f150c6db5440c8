from rlmed.core.process import threads  # noqa: F401  configures OpenMP before torch is imported
