"""An exported folder goes to a hub on this machine: what arrives, how refusals are told; the token is never shown."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.cli.test_bad_inputs import check_refused

TOKEN, NAME = "hf_secretOfTheUser", "somebody/student"


class Hub:
    """The hub's protocol for one new repository, as far as an upload needs it: what it was told.

    refusal: (status, message) of the answer to a new repository.
    """

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refusal: tuple[int, str] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                hub.tokens.add(self.headers["Authorization"])
                status, answer = hub.answer(self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: str) -> tuple[int, dict]:
        if path == "/api/repos/create":
            if self.refusal:
                return self.refusal[0], {"error": self.refusal[1]}
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.url}/{NAME}"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{NAME}/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None}
        return 200, {"errors": [], "warnings": []}  # of the card's front matter


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    made.server.shutdown()


@pytest.mark.parametrize("private", [True, False])
def test_exported_folder_arrives_whole(cli, hub, pipeline_run, tmp_path, private):
    flags = ["--private"] if private else []
    done = cli("export", pipeline_run, "--to", tmp_path / "made", "--push-to-hub", NAME, *flags)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(tmp_path / "made"), f"{hub.url}/{NAME}"]
    here = {p.relative_to(tmp_path / "made").as_posix(): p for p in (tmp_path / "made").rglob("*") if p.is_file()}
    assert hub.files == {name: path.read_bytes() for name, path in here.items()} and len(here) > 8
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("somebody", "student")
    assert created["visibility"] == ("private" if private else "public")
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in done.output


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((409, "You already created this model repo"), [f"/{NAME} exists", "choose another name"]),
        ((401, f"Invalid token {TOKEN}"), ["the token is not accepted", "hf auth login"]),
        ((403, f"Forbidden for {TOKEN}"), ["the token may not write to 'somebody'", "another owner"]),
        ((400, f"Bad request by {TOKEN}"), ["cannot push"]),
        (None, ["cannot be reached"]),
    ],
)
def test_refusals_are_told_in_words_and_the_folder_stays(cli, hub, pipeline_run, tmp_path, refusal, said):
    hub.refusal = refusal
    if refusal is None:
        hub.server.shutdown()
        hub.server.server_close()
    done = cli("export", pipeline_run, "--to", tmp_path / "made", "--push-to-hub", NAME)
    check_refused(done, *said, "The folder is written", f"hf upload {NAME} {tmp_path / 'made'}")
    assert (tmp_path / "made" / "model_index.json").is_file() and TOKEN not in done.output


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (["--push-to-hub", "student"], {}, ["'student' must be OWNER/NAME"]),
        (["--push-to-hub", "a/b/c"], {}, ["'a/b/c' is no name of a repository"]),
        (["--push-to-hub", NAME], {"HF_TOKEN": ""}, ["no token; `hf auth login`, or set HF_TOKEN"]),
        (["--push-to-hub", NAME], {"offline": "1"}, ["HF_HUB_OFFLINE is set", "leave --push-to-hub out"]),
        (["--private"], {}, ["--private goes with --push-to-hub"]),
    ],
)
def test_what_is_known_before_is_refused_before(
    cli, hub, pipeline_run, tmp_path, monkeypatch, flags, environment, said
):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "offline" in environment)
    monkeypatch.setenv("HF_TOKEN", environment.get("HF_TOKEN", TOKEN))
    check_refused(cli("export", pipeline_run, "--to", tmp_path / "made", *flags), *said)
    assert not (tmp_path / "made").exists()
