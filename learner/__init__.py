from rlmed.core.process import threads  # noqa: F401  with it OpenMP is settled, before torch is imported here
