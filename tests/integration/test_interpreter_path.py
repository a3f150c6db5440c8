"""Ray's workers start in an environment whose path contains a space."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rlmed.core.process.threads import WAITING
from tests.integration.processes import marked, new_mark, wait_until
from tests.root import ROOT

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]
PROGRAM = f"""
import os, sys, ray
from rlmed.core.process.torch_extensions import disable_broken_extensions

disable_broken_extensions()
from rlmed.cluster.ray_session import start_ray
from rlmed.core.config.composing import compose_config
from tests.integration.processes import MARK, marked

@ray.remote(num_cpus=0)
class Actor:
    def tell(self):
        return sys.executable, bool({set(WAITING)} & os.environ.keys())

stop = start_ray(compose_config("train", ["cluster=ray"]).cluster)
executable, prepared = ray.get(Actor.remote().tell.remote(), timeout=120)
idle = marked({{MARK: os.environ[MARK]}}, "ray::IDLE")
print(prepared, len(idle), executable)
stop()
"""


def test_an_actor_starts_where_the_interpreters_path_contains_a_space(tmp_path: Path) -> None:
    """It alone: processes that Ray would start in advance could not be used."""
    environment = tmp_path / "my 'new' environment"
    subprocess.run([sys.executable, "-m", "venv", "--symlinks", "--without-pip", environment], check=True)
    python, version = environment / "bin" / "python", f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / "lib" / version / "site-packages"
    packages.rmdir()
    packages.symlink_to(sysconfig.get_path("purelib"))  # Ray's own files have that path too
    mark = new_mark()
    clean = {name: value for name, value in os.environ.items() if name not in (*WAITING, "RAY_ADDRESS")}
    try:
        done = subprocess.run(
            [python, "-c", PROGRAM],
            cwd=tmp_path,
            env=clean | mark | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    finally:
        wait_until(lambda: not marked(mark), 120, "Ray's processes end")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"True 0 {python}"
