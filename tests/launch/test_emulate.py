"""The emulated cluster: what its links count, whose exit code it returns, and that nothing of it stays behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import emulate
from launch.emulate import EmulateConfig, LinkConfig

ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"), reason="needs root and iproute2"
)

TALK = """
import os, socket, sys, time
rank, size = int(os.environ["RANK"]), int(sys.argv[1])
to = {"across": 2, "within": 1}[sys.argv[2]]
address = f"10.77.0.{to // int(os.environ['LOCAL_WORLD_SIZE']) + 1}"
if rank == to:
    with socket.create_server((address, 4000)) as server:
        peer, _ = server.accept()
        while size > 0:
            size -= len(peer.recv(1 << 16))
elif rank == 0:
    for _ in range(100):
        try:
            with socket.create_connection((address, 4000)) as peer:
                peer.sendall(bytes(size))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""


def namespaces() -> set[str]:
    lines = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines()
    return {line.split()[0] for line in lines if line.startswith("braid.")}


def namespaces_of(pid: int) -> set[str]:
    return {name for name in namespaces() if name.startswith(f"braid.{pid}.")}


def start(script: Path, *options: str, args: tuple[str, ...] = ()) -> subprocess.Popen:
    words = [sys.executable, "-m", "launch.emulate", *options, "--", str(script), *args]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: Path, *options: str, args: tuple[str, ...] = ()) -> tuple[int, str, str]:
    process = start(script, *options, args=args)
    out, err = process.communicate(timeout=60)
    assert not namespaces_of(process.pid)
    return process.returncode, out, err


@needs_root
@pytest.mark.parametrize("way", ["across", "within"])
def test_only_what_leaves_a_node_is_on_its_card(tmp_path, way):
    script, report, size = tmp_path / "talk.py", tmp_path / "report.json", 3_000_000
    script.write_text(TALK)
    options = ["nodes=2", "ranks_per_node=2", "link.rate=400mbit", f"report={report}"]
    code, _, err = run(script, *options, args=(str(size), way))
    assert code == 0, err
    sender, receiver = json.loads(report.read_text())["nodes"]
    across = size if way == "across" else 0
    for counted in (sender["sent_bytes"], receiver["received_bytes"]):
        assert across <= counted <= across * 1.05 + 10_000
    assert "2 nodes x 2 ranks" in err


@needs_root
def test_a_rank_learns_its_place_and_a_failure_is_passed_on(tmp_path):
    script = tmp_path / "place.py"
    script.write_text(
        "import os, sys\n"
        "names = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR GLOO_SOCKET_IFNAME '\n"
        "names = (names + 'HYDRA_FULL_ERROR').split()\n"
        "os.write(1, (' '.join(os.environ[name] for name in names) + '\\n').encode())\n"  # one write: no interleaving
        "sys.exit(7 if os.environ['RANK'] == '3' else 0)\n"
    )
    code, out, err = run(script, "nodes=2", "ranks_per_node=2")
    assert sorted(out.splitlines()) == [f"{r} 4 {r % 2} 2 10.77.0.1 eth0 0" for r in range(4)]  # 0: errors in one line
    assert code == 7
    assert "rank 3 ended with exit code 7" in err


@needs_root
def test_ranks_that_outlive_a_failure_are_ended_after_the_grace(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text("import os, sys, time\nsys.exit(5) if os.environ['RANK'] == '1' else time.sleep(600)\n")
    code, _, err = run(script, "nodes=2", "ranks_per_node=1", "grace=0.2")
    assert code == 5, err


def _alive(script: Path) -> bool:
    words = [str(script).encode()]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if set(words) <= set(path.read_bytes().split(b"\0")) and b"launch.emulate" not in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def _wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@needs_root
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_behind_when_it_is_killed(tmp_path, signal_number):
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(600)\n")
    process = start(script, "nodes=2", "ranks_per_node=1")
    _wait_until(lambda: _alive(script))
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=90)
    assert "Traceback" not in err
    if signal_number == signal.SIGKILL:  # what cannot be caught is cleaned up by the next start
        assert namespaces_of(process.pid)
        emulate.remove_leftovers()
    assert not namespaces_of(process.pid)
    _wait_until(lambda: not _alive(script))


def test_a_rank_whose_parent_is_gone_before_it_starts_does_not_start():
    parent = os.getpid()
    orphan = "import os, sys; from launch.emulate import _die_with; _die_with(int(sys.argv[1])); print('started')"
    for pid, alive in ((parent, True), (parent + 1, False)):
        done = subprocess.run([sys.executable, "-c", orphan, str(pid)], cwd=ROOT, capture_output=True, text=True)
        assert (done.stdout == "started\n") is alive, done.stderr
        assert done.returncode == (0 if alive else -signal.SIGKILL)


def test_a_signal_ends_the_run_from_where_it_waits(monkeypatch):
    monkeypatch.setattr(emulate, "_asked_to_stop", [signal.SIGTERM])
    with subprocess.Popen(["sleep", "60"]) as rank:
        with pytest.raises(SystemExit) as stopped:
            emulate.wait([rank], grace=60)
        rank.kill()
    assert stopped.value.code == 128 + signal.SIGTERM


@needs_root
def test_namespaces_of_a_living_run_are_no_leftovers():
    with emulate.Cluster(EmulateConfig(nodes=1)) as cluster:
        emulate.remove_leftovers()
        assert set(cluster.made) <= namespaces()
    assert not set(cluster.made) & namespaces()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinkConfig(rate="fast"), "link.rate=fast: write it as"),
        (lambda: LinkConfig(rate="0gbit"), "link.rate=0gbit"),
        (lambda: LinkConfig(latency="20"), "link.latency=20: write it as"),
        (lambda: EmulateConfig(nodes=0), "nodes=0 must be between 1 and 250"),
        (lambda: EmulateConfig(grace=float("nan")), "grace=nan must be seconds"),
        (lambda: EmulateConfig(report="/"), "report=/ is a folder"),
    ],
)
def test_wrong_options_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_rates_are_read_as_tc_reads_them():
    rates = {"1gbit": 1e9, "2.5gbit": 2.5e9, "500mbit": 5e8, "64kbit": 64e3}
    assert {rate: LinkConfig(rate=rate).bits_per_second for rate in rates} == rates


def test_without_root_or_iproute2_it_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "tc" else program)
    with pytest.raises(SystemExit, match=r"tc not found: install the package iproute2"):
        emulate.check_machine()
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="need root"):
        emulate.check_machine()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nodes=2", "launch/pretrain.py"], "stand after --"),
        (["nodes=2"], "nothing to run"),
        (["nodes=2", "--", "no/such.py"], "no/such.py: no such script"),
        (["node=2", "--", __file__], "node"),
        (["nodes=two", "--", __file__], "nodes"),
    ],
)
def test_wrong_input_ends_in_one_line(monkeypatch, capsys, words, complaint):
    monkeypatch.setattr(sys, "argv", ["emulate.py", *words])
    with pytest.raises(SystemExit, match="2"):
        emulate.main()
    said = capsys.readouterr().err
    assert complaint in said
    assert "\n" not in said.strip()
