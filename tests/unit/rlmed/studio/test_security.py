import json
import os
import re
import shutil

import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from rlmed.studio.security import Guard
from rlmed.studio.server import build
from rlmed.studio.state import Studio
from tests.unit.rlmed.report.test_page import EVIL, Page, line, write_lines
from tests.unit.rlmed.studio.run_folders import HOST, SAME_ORIGIN, client_of, pictures_of, write_run

TOKEN = "a secret of this studio"
ADDRESSES = ("/", "/run?name=day/a", "/compare", "/rollouts?run=day/a", "/assets/studio.css", "/nowhere", "/image")


@pytest.fixture
def locked(folders, tmp_path):
    return client_of(folders, cache=tmp_path, token=TOKEN)


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_opens_without_the_token(locked, address):
    answer = locked.get(address)
    assert (answer.status_code, "day/" in answer.text) == (401, False)
    locked.cookies.set(locked.app.cookie, TOKEN)
    assert locked.get(address).status_code == 401


def test_the_token_moves_from_the_address_into_a_cookie_that_no_script_reads(locked):
    answer = locked.get("/run", params={"token": TOKEN, "name": "day/a"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/run?name=day%2Fa")
    assert TOKEN not in answer.headers["set-cookie"]  # which other ports of the host see
    flags = answer.headers["set-cookie"].lower()
    assert "httponly" in flags
    assert "samesite=strict" in flags
    assert TOKEN not in answer.text
    assert locked.get("/run?name=day/a").status_code == 200


def test_two_studios_of_one_host_do_not_shut_each_other_out(folders, tmp_path):
    clients = [client_of(folders, cache=tmp_path, token=token) for token in ("one", "two")]
    clients[1].cookies = clients[0].cookies  # ports of one host share them
    for client, token in zip(clients, ("one", "two"), strict=True):
        client.get("/", params={"token": token})
    assert [client.get("/").status_code for client in clients] == [200, 200]


@pytest.mark.parametrize("given", ["", "b", TOKEN + "x", "ä", "\ud7ff"])
def test_a_wrong_token_sets_no_cookie(locked, given):
    answer = locked.get("/", params={"token": given})
    assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)


def test_the_way_back_is_a_path_of_the_studio(locked):
    answer = locked.get(f"{HOST}//elsewhere.example/a", params={"token": TOKEN})
    assert answer.headers["location"] == "/elsewhere.example/a"
    answer = locked.get("/theme?to=dark&back=//elsewhere.example")
    assert answer.headers["location"] == "/elsewhere.example"
    assert locked.get("/theme?to=dark&back=https://elsewhere.example").headers["location"].startswith("/https")


@pytest.mark.parametrize(
    "host", ["elsewhere.example", "localhost.elsewhere.example", "10.0.0.7:8642", "", "[::1", "a b"]
)
def test_another_host_name_is_refused(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "[::1]:8642", "LOCALHOST:8642"])
def test_own_names_pass_whatever_the_port(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_a_server_on_all_addresses_is_reached_by_any_address_but_not_by_any_name(folders, tmp_path):
    studio = Studio([folders], token=None, cache=tmp_path)
    client = TestClient(build(studio, {"node7"}, any_address=True), base_url=HOST)
    answers = [client.get("/", headers={"Host": host}).status_code for host in ("10.0.0.7", "node7:1", "localhost")]
    assert answers == [200, 200, 400]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:9999"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": HOST}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://elsewhere.example"}, 403),
        ({"Origin": HOST}, 405),
        (SAME_ORIGIN, 405),
    ],
)
def test_another_origin_may_send_nothing(client, headers, status):
    """405: it got past the guard, and this page takes no form."""
    assert client.post("/", headers=headers).status_code == status


def test_a_websocket_of_another_origin_is_closed():
    async def answer(scope, receive, send):
        raise AssertionError("it got past the guard")

    client = TestClient(Guard(answer, None, {"localhost"}), base_url=HOST)
    headers = {"Origin": "http://elsewhere.example"}
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/", headers=headers):
        pass
    assert closed.value.code == 1008


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_answer_says_what_a_browser_may_do(client, address):
    headers = client.get(address).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert "script-src" not in policy
    assert "style-src" not in policy
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize("address", ["/", "/run?name=day/a", "/compare?run=day/a&run=day/b", "/rollouts?run=day/a"])
def test_pages_hold_no_style_or_script_that_the_policy_forbids_and_name_no_other_host(client, address):
    page = Page(client.get(address).text)
    forbidden = [
        (tag, name) for tag, attributes in page.tags for name in attributes if name == "style" or name.startswith("on")
    ]
    assert forbidden == []
    assert [
        tag for tag, attributes in page.tags if tag == "style" or (tag == "script" and "src" not in attributes)
    ] == []
    targets = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src")]
    assert targets
    assert all(re.match(r"/(?!/)|#", target) for target in targets)


@pytest.mark.parametrize(
    "name",
    ["..", "day/../day/a", "/etc", "day", "", "day/a/", "day/a/..", "day/a/evaluations", "day\\a", "day/a\0", "DAY/A"],
)
@pytest.mark.parametrize(
    "address", ["/run?name=", "/run/live?name=", "/rollouts?run=", "/compare?run=", "/rollouts/live?run="]
)
def test_only_names_of_the_list_are_runs(client, address, name):
    path, parameter = address.rstrip("=").split("?")
    answer = client.get(path, params={parameter: name})
    # without a run, this page asks for one
    assert answer.status_code == (200 if (name, path) == ("", "/rollouts") else 404)


def test_a_link_out_of_the_folders_is_not_followed(folders, tmp_path):
    inside, outside = tmp_path / "inside", write_run(tmp_path / "outside" / "private", texts=("secret", "secret"))
    run = write_run(inside / "run")
    (inside / "link").symlink_to(outside)
    (run / "rollouts.jsonl").unlink()
    (run / "rollouts.jsonl").symlink_to(outside / "rollouts.jsonl")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(outside / "config.yaml")
    client = client_of(inside, cache=tmp_path / "cache")
    assert re.findall(r'name="run" value="(.*?)"', client.get("/").text) == ["run"]
    assert client.get("/run?name=link").status_code == 404
    assert "group_size" not in client.get("/run?name=run").text
    assert client.get("/rollouts?run=run").status_code == 404


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose name and texts are markup, with a damaged line and half a surrogate pair."""
    top = tmp_path_factory.mktemp("hostile")
    folder = write_run(
        top / EVIL.replace("/", "∕"),
        texts=(EVIL, f"<think>{EVIL}</think>\n<answer>{EVIL}</answer>"),
        modality=EVIL,
        example_id=EVIL,
        options=[EVIL, "b"],
        question_type=EVIL,
    )
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 1, "completions": 5}\nnot JSON\n')
        half = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[0])
        file.write(json.dumps({**half, "question": "half \ud800 pair", "modality": "\ud800", "task": "\udfff"}) + "\n")
    (folder / "config.yaml").write_text(f"name: {json.dumps(EVIL)}\nsteps: 3\n")
    os.mkdir(os.fsencode(top) + b"/caf\xe9")
    shutil.copy(folder / "metrics.jsonl", os.fsencode(top) + b"/caf\xe9/metrics.jsonl")
    return folder


@pytest.mark.parametrize("path", ["/", "/run", "/run/live", "/compare", "/rollouts", "/rollouts/live"])
def test_markup_in_names_and_completions_is_text(hostile, tmp_path, path):
    client = client_of(hostile.parent, cache=tmp_path)
    other = "name" if path.startswith("/run/") or path == "/run" else "run"
    answer = client.get(path, params=[(other, hostile.name), *([(other, r"caf\xe9")] if path == "/compare" else [])])
    assert answer.status_code == 200
    page = Page(answer.text)
    sources = [attributes.get("src", "") for tag, attributes in page.tags if tag in ("script", "img")]
    assert all(source.startswith("/") for source in sources)
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    if path != "/rollouts/live":
        assert "alert('owned')" in page.text.replace("∕", "/") or path == "/run/live"
    assert (path == "/rollouts/live") == ("2 damaged lines left out" in answer.text and path != "/rollouts")


def test_a_name_that_is_no_utf8_is_shown_and_found(hostile, tmp_path):
    client = client_of(hostile.parent, cache=tmp_path)
    assert r"caf\xe9" in client.get("/").text
    assert client.get("/run", params={"name": r"caf\xe9"}).status_code == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "nowhere"},
        {"rollout": "999999"},
        {"rollout": "-1"},
        {"rollout": "9" * 40},
        {"rollout": "/etc/passwd"},
        {"number": "1"},
        {"number": "-1"},
        {"number": "../../x"},
        {"size": "huge"},
        {"rollout": ""},
        {"prompt": ""},
        {"prompt": "0" * 16},
    ],
)
def test_only_recorded_pictures_are_sent(client, changes):
    right = pictures_of(client, "/rollouts?run=day/a&sort=oldest")[0]
    answer = client.get("/image", params=right)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert client.get("/image", params=right | changes).status_code == 404


def test_what_is_no_picture_is_not_sent_though_a_record_names_it(tmp_path):
    run = write_run(tmp_path / "top" / "run")
    secret = tmp_path / "top" / "run.png"
    secret.write_text("a key, not a picture")
    client = client_of(tmp_path / "top", cache=tmp_path / "cache")
    address = pictures_of(client, "/rollouts?run=run")[0]
    answer = client.get("/image", params=address)
    assert (answer.status_code, "key" in answer.text) == (404, False)
    Image.new("L", (3000, 20)).save(secret)
    assert client.get("/image", params=address | {"size": "large"}).status_code == 200
    assert run.is_dir()


@pytest.mark.parametrize("linked", [False, True])
def test_pictures_outside_of_the_folders_are_shown_only_if_their_folder_is_given(tmp_path, linked):
    inside, outside = tmp_path / "top", tmp_path / "scans"
    write_run(inside / "run")
    outside.mkdir()
    (inside / "run.png").replace(outside / "scan.png")
    if linked:
        (inside / "run.png").symlink_to(outside / "scan.png")
    else:
        records = inside / "run" / "rollouts.jsonl"
        records.write_text(records.read_text().replace(f"{inside}/run.png", f"{outside}/scan.png"))
    page = "/rollouts?run=run"
    allowed = client_of(inside, cache=tmp_path / "cache", images=[outside])
    address = pictures_of(allowed, page)[0]
    assert allowed.get("/image", params=address).status_code == 200
    client = client_of(inside, cache=tmp_path / "cache")
    assert client.get("/image", params=address).status_code == 404
    assert f"--images {outside}" in client.get(page).text


def test_a_picture_that_changed_is_sent_again(tmp_path):
    write_run(tmp_path / "top" / "run")
    client = client_of(tmp_path / "top", cache=tmp_path / "cache")
    address = pictures_of(client, "/rollouts?run=run")[0]
    first = client.get("/image", params=address)
    assert "no-cache" in first.headers["cache-control"]
    asked = {"If-None-Match": first.headers["etag"]}
    assert client.get("/image", params=address, headers=asked).status_code == 304
    Image.new("L", (40, 30), 250).save(tmp_path / "top" / "run.png")
    again = client.get("/image", params=address, headers=asked)
    assert (again.status_code, again.content == first.content) == (200, False)


def test_a_run_that_starts_anew_sends_none_of_its_pictures_to_an_old_page(tmp_path):
    run = write_run(tmp_path / "top" / "run")
    client = client_of(tmp_path / "top", cache=tmp_path / "cache")
    old = pictures_of(client, "/rollouts?run=run&sort=oldest")[0]
    write_lines(run / "rollouts.jsonl", [line(step=1, image=str(tmp_path / "top" / "run.png"), question="Another?")])
    new = pictures_of(client, "/rollouts?run=run&sort=oldest")[0]
    assert [client.get("/image", params=one).status_code for one in (old, new)] == [404, 200]
    assert (new["rollout"], new["number"]) == (old["rollout"], old["number"])


def test_assets_are_a_closed_list(client):
    for name in ("base.html.j2", "..%2Fstate.py", "%2Fetc%2Fpasswd", "report.html.j2"):
        assert client.get(f"/assets/{name}").status_code == 404
    assert client.get("/assets/studio.css").headers["content-type"].startswith("text/css")
