"""Several machines on one: Ray nodes in network namespaces or on loopback, cut off and killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from tests.integration.processes import marked, new_mark, wait_until

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    # a node is given up after about five seconds instead of a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


def command(*words: str) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def why_no_namespaces() -> str | None:
    """Why there cannot be network namespaces here; None where there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "network namespaces need the command `ip` (iproute2)"
    network = Network(1)
    try:
        network.open()
    except AssertionError as error:
        return f"no network namespaces here: {error}"
    finally:
        network.close()
    return None


class Network:
    """Namespaces joined by a bridge in one more, so this machine's own network is not touched."""

    def __init__(self, machines: int) -> None:
        self.name = f"rlmed-{uuid.uuid4().hex[:6]}"
        self.machines = range(machines)

    def open(self) -> None:
        switch = f"{self.name}-switch"
        command("ip", "netns", "add", switch)
        command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        command("ip", "-n", switch, "link", "set", "bridge", "up")
        for number in self.machines:
            space, port = self.space(number), f"port{number}"
            command("ip", "netns", "add", space)
            command("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            command("ip", "-n", space, "link", "set", "lo", "up")
            command("ip", "-n", space, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            command("ip", "-n", space, "link", "set", "eth0", "up")
            command("ip", "-n", space, "route", "add", "default", "dev", "eth0")

    def space(self, number: int) -> str:
        return f"{self.name}-{number}"

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def inside(self, number: int) -> tuple[str, ...]:
        """What a command begins with to run there."""
        return ("ip", "netns", "exec", self.space(number))

    def cut(self, number: int) -> None:
        """Nothing reaches this machine or is reached by it; no connection is closed."""
        command("ip", "-n", f"{self.name}-switch", "link", "set", f"port{number}", "down")

    def close(self) -> None:
        """Remove the namespaces, and with them the bridge and the links."""
        for space in [f"{self.name}-switch", *map(self.space, self.machines)]:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=60)


class Loopback:
    """Machines that are addresses of this one; they can be killed but not cut off."""

    def address(self, number: int) -> str:
        return f"127.0.0.{number + 1}"

    def inside(self, number: int) -> tuple[str, ...]:
        return ()


class Machines:
    """Ray nodes: 0 is the head, where runs start, with a resource `learning`; others `sampling`.

    A context manager; whatever happens in it, no process, file or namespace is left.
    """

    def __init__(self, count: int, network: Network | Loopback) -> None:
        self.network = network
        self.marks = [new_mark() for _ in range(count)]
        # sockets have long names, so it has a short one
        self.folder = Path(tempfile.mkdtemp(prefix="r"))
        # a node that joins does not look for the head's token by itself
        self.settings = SETTINGS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex + uuid.uuid4().hex}
        self.head = ""

    def __enter__(self) -> Machines:
        try:
            if isinstance(self.network, Network):
                self.network.open()
            self._start_nodes()
        except BaseException as error:
            error.add_note("\n".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("node-*.log"))))
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            wait_until(self._killed, 120, "all processes of the machines end")
        finally:
            if isinstance(self.network, Network):
                self.network.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _killed(self) -> bool:
        # again and again, since a process may have started another meanwhile
        for number in range(len(self.marks)):
            self.kill(number)
        return not any(map(marked, self.marks))

    def kill(self, number: int) -> None:
        """Kill all processes of a machine at once."""
        for pid in marked(self.marks[number]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended together with another

    def environment(self, number: int) -> dict[str, str]:
        return os.environ | self.settings | self.marks[number] | {"RAY_ADDRESS": self.head}

    def running(self, number: int, title: str = "") -> list[int]:
        """Process ids of a machine."""
        return marked(self.marks[number], title)

    def _start_nodes(self) -> None:
        address = self.network.address(0)
        port = 6379 if isinstance(self.network, Network) else _free_port(address)
        self._start_node(0, "--head", f"--port={port}", "--include-dashboard=false", '--resources={"learning": 1}')
        self._wait_for_node(0)
        self.head = f"{address}:{port}"
        others = range(1, len(self.marks))
        for number in others:
            self._start_node(number, f"--address={self.head}", '--resources={"sampling": 1}')
        for number in others:
            self._wait_for_node(number)

    def _wait_for_node(self, number: int) -> None:
        log = self._log(number)
        wait_until(lambda: "Ray runtime started" in log.read_text(), 240, f"machine {number} has a Ray node")

    def _log(self, number: int) -> Path:
        return self.folder / f"node-{number}.log"

    def _start_node(self, number: int, *options: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        with self._log(number).open("w") as file:
            subprocess.Popen(
                [
                    *self.network.inside(number),
                    sys.executable,
                    str(ray),
                    "start",
                    f"--node-ip-address={self.network.address(number)}",
                    f"--temp-dir={self.folder / str(number)}",
                    "--num-cpus=1",
                    f"--object-store-memory={100 * 2**20}",
                    "--block",
                    *options,
                ],
                env=self.environment(number),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _free_port(address: str) -> int:
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])
