"""Prepares a process that tests start, as conftest.py does theirs; to be imported first."""

from rlmed.core.process.starting import prepare_process

prepare_process()
