from rlmed.core.process.starting import prepare_process

prepare_process()  # each file in here is a command
