"""The audit of dependencies: pip-audit against a service that knows something, nothing, nonsense, or is not there."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
Answer = Callable[[dict[str, Any]], tuple[int, str]]
KNOWN = {
    "id": "PYSEC-2099-1",
    "summary": "reads what it should not",
    "affected": [
        {
            "package": {"name": "einops", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
        }
    ],
}


@pytest.fixture
def service() -> Iterator[Callable[[Answer], tuple[str, list[dict[str, Any]]]]]:
    """Starts a server that speaks as OSV does, or as it should not; its address, and what it was asked."""
    running: list[http.server.HTTPServer] = []

    def start(answer: Answer) -> tuple[str, list[dict[str, Any]]]:
        asked: list[dict[str, Any]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append(query)
                status, text = answer(query)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *words: Any) -> None:
                """Keeps the test's output clean."""

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1/query", asked

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    path = tmp_path / "pins.txt"
    path.write_text("einops==0.8.2\nmpmath==1.3.0\n")
    return path


def audit(url: str, pins: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), "--osv-url", url, "--requirement", str(pins), *more]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_nothing_known_is_told_with_the_number_of_packages(service: Any, pins: Path) -> None:
    url, asked = service(lambda query: (200, "{}"))
    done = audit(url, pins)
    assert (done.returncode, done.stdout) == (0, "audited: nothing is known against any of 2 packages\n"), done.stderr
    assert {(each["package"]["name"], each["version"]) for each in asked} == {("einops", "0.8.2"), ("mpmath", "1.3.0")}


def test_a_known_vulnerability_fails_and_is_named_with_its_cure(service: Any, pins: Path) -> None:
    url, _ = service(
        lambda query: (200, json.dumps({"vulns": [KNOWN]}) if query["package"]["name"] == "einops" else "{}")
    )
    for more in ((), ("--allow-unreachable",)):
        done = audit(url, pins, *more)
        assert done.returncode == 1
        assert "einops 0.8.2: PYSEC-2099-1, fixed in 99.1\n" in done.stdout
        assert "AUDIT FAILED: 1 known vulnerabilities in 2 packages" in done.stdout


@pytest.mark.parametrize("answer", [(500, "no"), (200, "<html>log in first</html>")], ids=str)
def test_a_service_that_answers_nonsense_is_no_audit(service: Any, pins: Path, answer: tuple[int, str]) -> None:
    url, _ = service(lambda query: answer)
    done = audit(url, pins)
    assert done.returncode == 75 and done.stdout.startswith("NOT AUDITED: the advisory service could not be asked: ")


def test_no_service_is_no_audit_and_passes_only_where_that_is_allowed(service: Any, pins: Path) -> None:
    closed = "http://127.0.0.1:9/v1/query"
    for more, code in (((), 75), (("--allow-unreachable",), 0)):
        done = audit(closed, pins, *more)
        assert done.returncode == code
        assert re.match(r"NOT AUDITED: the advisory service could not be asked: .*refused", done.stdout), done.stdout


def test_ci_and_the_workflow_call_it() -> None:
    assert 'make audit AUDIT="${AUDIT---allow-unreachable}"' in (ROOT / ".ci" / "run").read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow and 'AUDIT: ""' in workflow
    assert ".ci/audit.py $(AUDIT)" in (ROOT / "Makefile").read_text()
