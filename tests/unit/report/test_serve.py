"""The page of a run that goes on."""

import threading
import urllib.error
import urllib.request

import pytest

from fewstep.report.serve import server


@pytest.fixture
def serving(make_run):
    """serving(**run) -> the folder and a URL that shows it."""
    open_servers = []

    def start(**run):
        folder = make_run(**run)
        made = server([folder])
        threading.Thread(target=made.serve_forever, daemon=True).start()
        open_servers.append(made)
        return folder, f"http://127.0.0.1:{made.server_address[1]}/"

    yield start
    for made in open_servers:
        made.shutdown()
        made.server_close()


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.read().decode("utf-8")


def test_every_look_is_at_the_run_as_it_is(serving):
    folder, url = serving(done=200)
    assert "iteration 200 of 600" in get(url) and 'data-refresh="15"' in get(url)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 600, "seconds": 300.0, "dm": 0.1}\n')
    assert "finished" in get(url) and "data-refresh=" not in get(url)


def test_other_paths_and_other_sites_are_refused(serving):
    """Fails if the Host header is not looked at: a name that points to this machine would open runs to a site."""
    _, url = serving()
    for there, headers, code in ((url + "config.yaml", {}, 404), (url, {"Host": "evil.example:80"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(there, **headers)
        assert refused.value.code == code
        refused.value.close()


def test_port_that_is_taken_is_said(serving, make_run):
    _, url = serving()
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(ValueError, match=f"--port {port} cannot be used"):
        server([make_run("other")], port)
