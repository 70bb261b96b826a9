"""A server as a process: signals, several workers, tokens, slow clients, what its log says."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from command_line import fails, memedge
from engines import edit_manifest
from servers import ask, serving

from memedge.embedded import EMBEDDED_ENGINE

CPU = ("--provider", "cpu")


@pytest.fixture
def copy_of_embedded(tmp_path):
    return shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))


def queued(url: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    return float(text.partition("\nmemedge_queue_prompts ")[2].partition("\n")[0])


def test_sigterm_finishes_what_is_under_way(tmp_path):
    with serving(tmp_path, *CPU, "--queue", 1000) as server, ThreadPoolExecutor(4) as pool:
        lists = [[f"prompt {number} of {one}" for number in range(100)] for one in range(4)]
        asked = [pool.submit(ask, server.url, prompts, "off") for prompts in lists]
        end = time.monotonic() + 30
        while queued(server.url) < 301:  # all four are in: at most 64 prompts have left
            assert time.monotonic() < end
        assert server.end() == 0
        assert {future.result().status_code for future in asked} == {200}
        assert "Traceback" not in server.said()


@pytest.mark.slow
def test_sigint_ends_it_too(tmp_path):
    with serving(tmp_path, *CPU) as server:
        assert server.end(signal.SIGINT) == 0


@pytest.mark.slow
def test_a_new_calibration_is_taken_without_dropping_a_request(tmp_path, copy_of_embedded):
    with serving(tmp_path, *CPU, "--engine", copy_of_embedded) as server:
        stop, statuses, digests = threading.Event(), [], []

        def keep_asking():
            while not stop.is_set():
                answer = ask(server.url, ["a green star on a hill", "the left luggage sign"])
                statuses.append(answer.status_code)
                digests.append(answer.json()["engine"])

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(keep_asking) for _ in range(2)]
            edit_manifest(copy_of_embedded, lambda m: m["calibrations"]["cpu-fp32"].update(threshold=-24.5))
            server.process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 60
            while len(set(digests)) < 2 and time.monotonic() < end:
                time.sleep(0.02)
            stop.set()
            for one in asking:
                one.result()
        assert set(statuses) == {200} and len(set(digests)) == 2
        answer = ask(server.url, ["a green star on a hill"])
        assert answer.json()["verdicts"][0]["memorized"] is True and answer.json()["engine"] == digests[-1]
        # By a request; and an engine that is gone does not end the old one.
        shutil.rmtree(copy_of_embedded)
        with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client:
            answer = client.post("/v1/engine/reload")
            assert answer.status_code == 500 and "is not a directory" in answer.json()["error"]["message"]
        assert ask(server.url, ["a star"]).status_code == 200
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 20
        while "the old one goes on" not in server.said() and time.monotonic() < end:
            time.sleep(0.05)
        assert "the old one goes on" in server.said() and ask(server.url, ["a star"]).status_code == 200


@pytest.mark.slow
def test_several_processes(tmp_path):
    with serving(tmp_path, *CPU, "--workers", 2) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: ask(server.url, [f"prompt {n}"]), range(40)))
        assert {answer.status_code for answer in answers} == {200}
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        samples = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
        assert float(samples['memedge_requests_total{route="/v1/verdicts",status="200"}']) == 40  # of all processes
        pid = server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        worker = next(int(child) for child, line in lines.items() if b"spawn_main" in line)
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 60
        while "another takes its place" not in server.said() and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        assert ask(server.url, ["after a worker died"]).status_code == 200
        assert server.end() == 0


@pytest.mark.slow
def test_workers_end_with_their_supervisor(tmp_path):
    with serving(tmp_path, *CPU, "--workers", 2) as server:
        ask(server.url, ["a star"])
        server.end(signal.SIGKILL)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                ask(server.url, ["a star"])
            except httpx.HTTPError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("a worker went on")


@pytest.mark.slow
def test_a_token(tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    with serving(tmp_path, *CPU, MEMEDGE_SERVE_TOKEN_FILE=str(tmp_path / "token")) as server:
        body = {"prompts": ["a star"]}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = httpx.post(f"{server.url}/v1/verdicts", json=body, headers=headers, trust_env=False, timeout=30)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert "bears no valid token" in answer.json()["error"]["message"]
        right = {"Authorization": "Bearer s3cret"}
        assert httpx.post(f"{server.url}/v1/verdicts", json=body, headers=right, trust_env=False).status_code == 200
        assert httpx.get(f"{server.url}/health/ready", trust_env=False).status_code == 200
        assert "s3cret" not in server.said()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "hash", "text"])
def test_the_access_log_says_of_prompts_what_it_may(tmp_path, how):
    with serving(tmp_path, *CPU, MEMEDGE_SERVE_LOG_PROMPTS=how) as server:
        ask(server.url, ["a very private\nprompt", "the left luggage sign"])
        assert server.end() == 0
        lines = [json.loads(line) for line in server.said().splitlines() if line.startswith("{")]
    (line,) = [one for one in lines if one["path"] == "/v1/verdicts"]
    assert (line["method"], line["status"], line["prompts"], line["memorized"]) == ("POST", 200, 2, 1)
    assert line["seconds"] > 0 and line["client"] == "127.0.0.1"
    assert ("private" in json.dumps(lines)) == (how == "text")
    digest = hashlib.sha256(b"a very private\nprompt").hexdigest()
    assert (digest in line.get("hashes", [])) == (how == "hash")


@pytest.mark.slow
def test_slow_and_half_open_clients(tmp_path):
    """A connection without a request is closed; a body that does not come is refused; others are served meanwhile."""
    with serving(tmp_path, *CPU, "--timeout", 5) as server:
        host, port = server.url.removeprefix("http://").split(":")
        silent, half, slow = (socket.create_connection((host, int(port)), 30) for _ in range(3))
        half.sendall(b"POST /v1/verdicts HTTP/1.1\r\nHost: x\r\n")
        slow.sendall(b"POST /v1/verdicts HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert ask(server.url, ["a star"]).status_code == 200
        answer = slow.makefile("rb").read()
        assert b" 408 " in answer.splitlines()[0] and b"was not there after" in answer
        for connection in (silent, half):
            assert connection.recv(100) == b""
        for connection in (silent, half, slow):
            connection.close()
        assert ask(server.url, ["a star"]).status_code == 200


@pytest.mark.slow
def test_an_engine_without_calibration_is_no_green_light(tmp_path, engine):
    with serving(tmp_path, *CPU, "--engine", engine) as server, httpx.Client(base_url=server.url, trust_env=False) as c:
        for path, body in (("verdicts", {"prompts": ["a"]}), ("moderations", {"input": "a"})):
            answer = c.post(f"/v1/{path}", json=body, timeout=30)
            assert answer.status_code == 503 and "not calibrated" in answer.json()["error"]["message"]
        given = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
        answer = c.post("/v2/models/memedge/infer", json=given, timeout=30)
        assert answer.status_code == 503 and "not calibrated" in answer.json()["error"]


def test_what_keeps_it_from_starting(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = memedge("serve", "--port", port)
        fails(done, f"Cannot listen on 127.0.0.1, port {port} (Address already in use): name another")
    fails(memedge("serve", "--host", "no.such.host.invalid"), "Cannot listen on no.such.host.invalid")
    fails(memedge("serve", "--port", 0, "--token-file", tmp_path / "absent"), "absent cannot be read")
    (tmp_path / "empty").touch()
    fails(memedge("serve", "--port", 0, "--token-file", tmp_path / "empty"), "The token is empty")
    fails(memedge("serve", "--port", 0, "--token-file", tmp_path / "empty", "--token", "a"), "Two tokens were given")
    fails(memedge("serve", "--port", 70000), "--port", code=2)
    command = [sys.executable, "-P", "-m", "memedge.cli", "serve", "--port", "0", "--engine", str(tmp_path)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "holds no manifest.json" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
