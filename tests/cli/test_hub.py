"""A hub on this machine: an id is resolved at its pinned commit, a broken download goes on, and refusals are clear."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fewstep.teachers.published import PUBLISHED
from tests.tiny_pipeline import build_stable_diffusion

ROOT = Path(__file__).resolve().parents[2]
SD15 = next(published for published in PUBLISHED if published.name == "sd15")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LOAD = """
import sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = int(sys.argv[2])  # what is kept of a broken download are whole pieces
from fewstep.api import load_teacher
try:
    teacher = load_teacher(sys.argv[1])
except ValueError as error:
    sys.exit(f"refused: {error}")
print("loaded", teacher.card.name, teacher.card.revision, teacher.shape)
"""


class Hub:
    """The hub's protocol for one repository, as far as a download needs it, and what was asked of it.

    refusal: (status, error code) of every answer.  breaks: how many bytes of the weights are sent before the
    connection is cut; None = all.
    """

    def __init__(self, folder: Path, repository: str, commit: str) -> None:
        self.folder, self.repository, self.commit = folder, repository, commit
        self.asked: list[tuple[str, str, str | None]] = []
        self.refusal: tuple[int, str] | None = None
        self.breaks: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        self.asked.append((request.command, request.path, request.headers.get("Range")))
        path, _, _ = request.path.partition("?")
        if self.refusal:
            return self.send(request, self.refusal[0], b"", {"X-Error-Code": self.refusal[1]}, body)
        if path.startswith(f"/api/models/{self.repository}"):
            names = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
            info = {"id": self.repository, "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            if "/tree/" in path:
                listed: object = [
                    {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0" * 40}
                    for name in names
                ]
            else:
                listed = info
            return self.send(request, 200, json.dumps(listed).encode(), {"Content-Type": "application/json"}, body)
        prefix = f"/{self.repository}/resolve/{self.commit}/"
        file = self.folder / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, body)
        data = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": self.commit,
            "Accept-Ranges": "bytes",
        }
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.breaks if path.endswith(WEIGHTS) else None
        self.send(request, 206 if start else 200, data[start:], headers, body, cut)

    def send(
        self, request, status: int, data: bytes, headers: dict[str, str], body: bool, cut: int | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data[:cut])
            if cut is not None:
                request.wfile.flush()
                request.connection.close()

    def paths(self, end: str) -> list[tuple[str, str, str | None]]:
        return [asked for asked in self.asked if asked[1].endswith(end) and asked[0] == "GET"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_stable_diffusion(tmp_path_factory.mktemp("repository") / "sd15")


@pytest.fixture
def hub(folder) -> Iterator[Hub]:
    made = Hub(folder, SD15.source, SD15.revision)
    yield made
    made.server.shutdown()


@pytest.fixture
def load(hub, tmp_path):
    """load(name, **environment): a teacher in a fresh process whose hub this is, with a cache of its own."""

    def run(name: str = "sd15", pieces: int = 10 * 2**20, **more: str) -> subprocess.CompletedProcess:
        told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)} | more
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | told
        command = [sys.executable, "-c", LOAD, name, str(pieces)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    return run


@pytest.mark.slow
def test_name_is_fetched_at_its_pinned_commit_and_kept(hub, load):
    """Once: the second time there is no hub any more.  Fails if a branch is asked for instead of the commit."""
    done = load()
    assert f"loaded sd15 {SD15.revision} (4, 4, 4)" in done.stdout, done.stderr
    assert not [path for _, path, _ in hub.asked if SD15.source in path and SD15.revision not in path]
    assert hub.paths(WEIGHTS)
    hub.asked.clear()
    again = load(HF_HUB_OFFLINE="1")
    assert f"loaded sd15 {SD15.revision}" in again.stdout, again.stderr
    assert not hub.paths(WEIGHTS)


@pytest.mark.slow
def test_broken_download_goes_on_where_it_stopped(hub, load):
    """However often the connection is cut; in pieces of 4 kB."""
    hub.breaks = 20_000
    done = load(pieces=4096, HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert "loaded sd15" in done.stdout, done.stderr
    starts = [int((asked[2] or "bytes=0-")[6:-1]) for asked in hub.paths(WEIGHTS)]
    assert len(starts) > 2 and starts == sorted(set(starts))


@pytest.mark.slow
def test_download_that_fails_is_told_in_words_and_can_be_tried_again(hub, load):
    hub.breaks = 0
    done = load(HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert done.returncode and "refused: cannot load the pipeline" in done.stderr
    assert "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    hub.breaks = None
    assert "loaded sd15" in load().stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refusal", "name", "said"),
    [
        ((403, "GatedRepo"), "sd15", ["is gated: accept its licence at", "HF_TOKEN"]),
        ((401, "RepoNotFound"), "some/other", ["there is no", "/some/other, or it is private"]),
        ((404, "RevisionNotFound"), "sd15", ["it has no revision '451f4fe"]),
        ((404, "EntryNotFound"), "some/other", ["no diffusers pipeline, as model_index.json is missing"]),
    ],
)
def test_refusals_are_told_in_words(hub, load, refusal, name, said):
    hub.refusal = refusal
    done = load(name)
    assert done.returncode and all(words in done.stderr for words in said), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_without_a_network_the_way_out_is_named(load):
    done = load(HF_HUB_OFFLINE="1")
    for words in ("not in the cache", "HF_HUB_OFFLINE is set", f"hf download {SD15.source} --revision {SD15.revision}"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
