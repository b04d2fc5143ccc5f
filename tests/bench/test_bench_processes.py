"""CPU accounting over process trees, and starting and stopping processes."""

import os
import re
import sys

import pytest

from bench.coldstart import cold_round
from bench.processes import (
    ProcessFailed,
    ProcessTimes,
    Server,
    all_processes,
    cpu_clocks,
    free_port,
    parse_stat,
    processes_of,
    tree,
)

READY = re.compile(r"^ready (?P<port>\d+)$", re.MULTILINE)

# Spends CPU in itself and in a child that it waits for.
SPENDS = """
import subprocess, sys, time
def spend(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.1: pass"])
spend(0.1)
print("ready 1", flush=True)
time.sleep(60)
"""
ANSWERS = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_POST(self):
        Handler.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503 if Handler.asked < 3 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_stat_of_a_command_with_spaces_and_parentheses():
    fields = "S 7 1 1 0 -1 4 0 0 0 0 150 50 30 20 20 0 1 0 5 6 7"
    ticks = os.sysconf("SC_CLK_TCK")
    assert parse_stat(f"42 (a (b) c) {fields}") == ProcessTimes(42, 7, 200 / ticks, 50 / ticks)


def test_tree_leaves_out_the_subtree_of_postgres():
    parents = {1: 0, 2: 1, 3: 1, 4: 3, 5: 4, 6: 0}
    processes = {pid: ProcessTimes(pid, parent, 1.0, 0.0) for pid, parent in parents.items()}
    assert sorted(p.pid for p in tree(processes, 1, without=[3])) == [1, 2]
    assert sorted(p.pid for p in tree(processes, 3)) == [3, 4, 5]
    assert tree(processes, 99) == []


def test_own_process_is_seen():
    assert all_processes()[os.getpid()].parent == os.getppid()


def test_cpu_of_a_server_includes_children_that_have_ended(tmp_path):
    server = Server([sys.executable, "-c", SPENDS], {}, tmp_path / "log")
    try:
        server.wait_ready(READY, 20)
        clocks = cpu_clocks(server.pid, None)
    finally:
        code = server.stop()
    assert clocks.server >= 0.18
    assert 0.08 <= clocks.busiest < clocks.server
    assert clocks.postgres == 0.0
    assert code == -15
    with pytest.raises(ProcessFailed, match="has ended"):
        cpu_clocks(server.pid, None)


def test_a_server_that_ends_early_is_reported_with_its_output(tmp_path):
    server = Server([sys.executable, "-c", "raise SystemExit('no such setting')"], {}, tmp_path / "log")
    with pytest.raises(ProcessFailed, match="no such setting"):
        server.wait_ready(READY, 20)
    assert server.ended()


def test_processes_of_a_directory(tmp_path):
    waits = "import time; print('ready 1', flush=True); time.sleep(60)"
    server = Server([sys.executable, "-c", waits], {}, tmp_path / "log", cwd=tmp_path)
    try:
        server.wait_ready(READY, 20)
        assert processes_of(tmp_path) == [server.pid]
    finally:
        server.stop()
    assert processes_of(tmp_path) == []


def test_cold_round_lasts_until_the_first_200(tmp_path, monkeypatch):
    def start(home, port):
        return Server([sys.executable, "-c", ANSWERS, str(port), str(home)], {}, home / "log")

    monkeypatch.setattr("bench.coldstart.start_server", start)
    measured = cold_round(tmp_path)
    assert 0 < measured["first_answer_ms"] < measured["first_200_ms"]
    assert processes_of(tmp_path) == []


def test_free_port_is_free():
    assert free_port() > 0
