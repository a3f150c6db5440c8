import builtins
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from rlmed.studio import command
from rlmed.studio.cache import cache_folder
from rlmed.studio.server import greeting
from tests.unit.rlmed.studio.run_folders import write_run


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


def test_a_folder_that_is_not_there_is_named(capsys, tmp_path):
    assert f"{tmp_path}/none" in failure(capsys, f"{tmp_path}/none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2"])
def test_without_a_token_only_this_machine_is_served(capsys, tmp_path, host):
    assert f"--host {host}" in failure(capsys, str(tmp_path), "--host", host, "--no-token")


@pytest.mark.parametrize(
    ("address", "shown"),
    [("0.0.0.0", "localhost"), ("::", "localhost"), ("10.0.0.7", "10.0.0.7"), ("fd00::1", "[fd00::1]")],
)
def test_an_address_of_the_network_is_told_with_a_warning(address, shown):
    first, warning = greeting(address, 8642, "abc").splitlines()
    assert first == f"studio: http://{shown}:8642/?token=abc"
    assert "not encrypted" in warning
    assert len(greeting("127.0.0.1", 8642, "abc").splitlines()) == 1


def test_a_port_or_a_model_that_cannot_be_is_refused(capsys, tmp_path):
    for port in ("80000", "-3"):
        assert f"--port {port}: choose 0" in failure(capsys, str(tmp_path), "--port", port)
    assert f"--model {tmp_path}/nope" in failure(capsys, str(tmp_path), "--model", f"{tmp_path}/nope")


@pytest.mark.parametrize(
    ("given", "expected"), [("my own secret: a+b&c#d", "my own secret: a+b&c#d"), (" ", None), (None, None)]
)
def test_the_token_is_that_of_the_environment_or_else_a_random_one(monkeypatch, tmp_path, given, expected):
    monkeypatch.delenv("RLMED_STUDIO_TOKEN", raising=False)
    if given is not None:
        monkeypatch.setenv("RLMED_STUDIO_TOKEN", given)
    served = []
    monkeypatch.setattr("rlmed.studio.server.serve", lambda studio, *_, **__: served.append(studio))
    for _ in range(2):
        command.main([str(tmp_path), "--cache", str(tmp_path / "cache")])
    tokens = [studio.token for studio in served]
    assert tokens == [expected] * 2 if expected else len(set(tokens)) == 2
    assert all(len(token) >= 16 for token in tokens)


def test_a_token_that_can_be_guessed_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RLMED_STUDIO_TOKEN", "secret")
    assert "RLMED_STUDIO_TOKEN has 6 characters" in failure(capsys, str(tmp_path))


def test_the_address_has_the_token_as_a_browser_reads_it():
    address = greeting("127.0.0.1", 8642, "a+b&c#d").split()[1]
    assert parse_qs(urlsplit(address).query) == {"token": ["a+b&c#d"]}


def test_a_port_in_use_is_named(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert f"--port {taken.getsockname()[1]}" in failure(
            capsys, str(tmp_path), "--port", str(taken.getsockname()[1])
        )


def test_a_missing_extra_says_what_to_install(capsys, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "starlette":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.split(".")[0] == "starlette" or name.startswith("rlmed.studio.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert "-e '.[studio]'" in failure(capsys, str(tmp_path))


@pytest.mark.parametrize(("value", "expected"), [("/x", Path("/x/rlmed/studio")), ("x", None), ("", None)])
def test_the_cache_is_the_users(monkeypatch, value, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == (expected or Path.home() / ".cache" / "rlmed" / "studio")


def test_the_command_prints_an_address_that_opens_it_and_each_start_has_its_own_token(tmp_path):
    write_run(tmp_path / "top" / "run")
    arguments = [
        sys.executable,
        "-m",
        "rlmed.studio",
        str(tmp_path / "top"),
        "--port",
        "0",
        "--cache",
        str(tmp_path / "c"),
    ]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as studio:
        ending = threading.Timer(60, studio.kill)
        ending.start()
        try:
            address = re.fullmatch(r"studio: (http://127\.0\.0\.1:\d+/\?token=[\w-]{20,})\n", studio.stdout.readline())[
                1
            ]
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            assert 'value="run"' in opener.open(address, timeout=30).read().decode()
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(address.split("?")[0], timeout=30)
        finally:
            studio.terminate()
            output, errors = studio.communicate(timeout=30)
            ending.cancel()
    assert address.split("=")[1] not in output + errors
