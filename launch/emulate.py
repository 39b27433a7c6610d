"""A cluster on one machine: nodes that are network namespaces, fast inside, joined by slow links.

    python launch/emulate.py nodes=2 ranks_per_node=2 link.rate=1gbit link.latency=20us -- launch/pretrain.py
    parallel.ep=4 ...

What stands after `--` is started once a rank, as torchrun would start it: a Python script and its arguments, with
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and the rest in the environment. Ranks of one node share a namespace and
talk over its loopback at memory speed. Between nodes everything crosses the node's one network card `eth0`, which a
token bucket (`tc tbf`) holds to `link.rate` in each direction, and which `netem` delays by `link.latency` each way
where the kernel has it:

    node0 [rank 0, rank 1] eth0 --rate--+
                                        +-- bridge, in a namespace of its own
    node1 [rank 2, rank 3] eth0 --rate--+

Options: `nodes` (2), `ranks_per_node` (2), `link.rate` (1gbit, as tc writes rates), `link.latency` (0us), `grace`
(15, the seconds other ranks get to end by themselves once one has failed), `report` (a JSON file for the table of the
end).

When all is done the counters of the cards are read and printed. The exit code is that of the first rank that failed.
Nothing outside the namespaces is touched; they are removed at the end, also on Ctrl-C and SIGTERM. After SIGKILL the
ranks die with their parent, and the next start removes the namespaces left behind. Needs root and the package
iproute2.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from launch.errors import TRACES, one_line_errors

_PREFIX = "braid"  # of namespaces: braid.<pid>.<start time of that process>.<name>
_UNITS = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
BUCKET_BYTES = (80 * 1024, 128 * 1024)  # least and most that may leave at once; TCP hands down up to 64 KB
_MTU = 9000  # jumbo frames, as clusters have them
_WINDOW = "4096 131072 524288"  # TCP's receive window: more than any link holds, less than makes a queue of seconds
_LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec must take no lock
_QUEUE_BYTES = 32 * 1024 * 1024  # a slow link queues, it does not drop: what was dropped would be counted twice


@dataclass
class LinkConfig:
    """Of each node's network card: rate in each direction as tc writes it ("1gbit"), latency each way ("20us")."""

    rate: str = "1gbit"
    latency: str = "0us"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(\.\d+)?[kmgt]?bit", self.rate) or not self.bits_per_second:
            raise ValueError(f"link.rate={self.rate}: write it as 500mbit, 1gbit or 2.5gbit")
        if not re.fullmatch(r"\d+(\.\d+)?(us|ms|s)", self.latency):
            raise ValueError(f"link.latency={self.latency}: write it as 20us or 1.5ms")

    @property
    def bits_per_second(self) -> float:
        number, unit = re.fullmatch(r"([\d.]+)([a-z]+)", self.rate).groups()  # type: ignore[union-attr]
        return float(number) * _UNITS[unit]

    @property
    def has_latency(self) -> bool:
        return float(self.latency.rstrip("ums")) > 0


@dataclass
class EmulateConfig:
    """The emulated cluster."""

    nodes: int = 2
    ranks_per_node: int = 2
    link: LinkConfig = field(default_factory=LinkConfig)
    grace: float = 15.0
    report: str | None = None

    def __post_init__(self) -> None:
        for name, most in (("nodes", 250), ("ranks_per_node", 250)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be between 1 and {most}")
        if not 0 <= self.grace < float("inf"):
            raise ValueError(f"grace={self.grace} must be seconds, 0 or more")
        if self.report is not None and Path(self.report).is_dir():
            raise ValueError(f"report={self.report} is a folder: name a JSON file")


def _run(*words: str, stdin: str | None = None) -> str:
    """Runs a program and returns what it printed; raises RuntimeError with its complaint."""
    done = subprocess.run(words, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(words)}`: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def check_machine() -> None:
    """Exits with one line unless this machine can make namespaces and links."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not found: install the package iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        sys.exit("error: network namespaces need root: run this as root (sudo .venv/bin/python launch/emulate.py ...)")


def _start_time(pid: str) -> str | None:
    """When a process started, in clock ticks since boot; None when it is gone. Tells a pid from its later reuse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(f"{_PREFIX}.")]


def remove_leftovers() -> None:
    """Removes the namespaces of runs whose process is gone."""
    for name in _namespaces():
        _, pid, started, _ = name.split(".", 3)
        if _start_time(pid) != started:
            try:
                remove_namespace(name)
            except RuntimeError:
                if name in _namespaces():  # otherwise somebody else was faster
                    raise


def remove_namespace(name: str) -> None:
    """Ends what still runs in a namespace, and removes it with all its devices."""
    for pid in _run("ip", "netns", "pids", name).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    _run("ip", "netns", "del", name)


class Cluster:
    """The namespaces and links of one emulated cluster, from `__enter__` to `__exit__`."""

    def __init__(self, config: EmulateConfig):
        self.config = config
        self.made: list[str] = []

    def namespace(self, name: str) -> str:
        return f"{_PREFIX}.{os.getpid()}.{_start_time('self')}.{name}"

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def __enter__(self) -> Cluster:
        try:
            switch = self._make_namespace("switch")
            _run("ip", "-n", switch, "link", "add", "bridge", "mtu", str(_MTU), "type", "bridge")
            _run("ip", "-n", switch, "link", "set", "bridge", "up")
            for node in range(self.config.nodes):
                name, port = self._make_namespace(f"node{node}"), f"port{node}"
                peer = ["peer", "name", "eth0", "mtu", str(_MTU), "netns", name]
                _run("ip", "-n", switch, "link", "add", port, "mtu", str(_MTU), "type", "veth", *peer)
                _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
                _run("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
                _run("ip", "-n", name, "link", "set", "eth0", "up")
                _run("ip", "netns", "exec", name, "tee", "/proc/sys/net/ipv4/tcp_rmem", stdin=_WINDOW)
                self._limit(name, "eth0", delayed=True)  # out of the node
                self._limit(switch, port, delayed=False)  # into the node
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        while self.made:
            remove_namespace(self.made.pop())

    def _make_namespace(self, name: str) -> str:
        name = self.namespace(name)
        _run("ip", "netns", "add", name)
        self.made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _limit(self, namespace: str, device: str, delayed: bool) -> None:
        link = self.config.link
        least, most = BUCKET_BYTES
        bucket = int(min(max(link.bits_per_second / 8 * 2e-3, least), most))
        words = ["root", "handle", "1:", "tbf", "rate", link.rate, "burst", str(bucket), "limit", str(_QUEUE_BYTES)]
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *words)
        if delayed and link.has_latency:
            words = ["parent", "1:", "netem", "delay", link.latency, "limit", "100000"]
            try:
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *words)
            except RuntimeError:
                if namespace == self.namespace("node0"):
                    print("note: this kernel has no netem: link.latency is not emulated, link.rate is", file=sys.stderr)

    def counters(self, node: int) -> dict[str, int]:
        """Bytes and packets that have left and reached a node since it was made, as its card counted them."""
        out = _run("ip", "-n", self.namespace(f"node{node}"), "-s", "-j", "link", "show", "eth0")
        stats = json.loads(out)[0]["stats64"]
        return {
            f"{way}_{what}": stats[key][what]
            for way, key in (("sent", "tx"), ("received", "rx"))
            for what in ("bytes", "packets")
        }

    def start(self, command: list[str]) -> list[subprocess.Popen]:
        """Starts the ranks: `command` is a Python script and its arguments."""
        ranks = []
        config = self.config
        for rank in range(config.nodes * config.ranks_per_node):
            node, local_rank = divmod(rank, config.ranks_per_node)
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(config.nodes * config.ranks_per_node),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(config.ranks_per_node),
                "GROUP_RANK": str(node),
                "MASTER_ADDR": self.address(0),
                "MASTER_PORT": "29500",  # free: the namespace is new
                "GLOO_SOCKET_IFNAME": "eth0",
                "NCCL_SOCKET_IFNAME": "eth0",
                "HYDRA_FULL_ERROR": "1" if TRACES else "0",  # here it is 1, while `one_line_errors` lasts
            }
            env.setdefault("OMP_NUM_THREADS", "1")
            env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch would warn that these addresses have no names
            words = ["ip", "netns", "exec", self.namespace(f"node{node}"), sys.executable, *command]
            die_with_me = partial(_die_with, os.getpid())
            ranks.append(subprocess.Popen(words, env=env, start_new_session=True, preexec_fn=die_with_me))
        return ranks


def _die_with(parent: int) -> None:
    pr_set_pdeathsig = 1
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked after, and nobody will say so again
        os.kill(os.getpid(), signal.SIGKILL)


def wait(ranks: list[subprocess.Popen], grace: float) -> int:
    """Waits for all ranks; once one fails the others get `grace` seconds. Returns the first failure's exit code."""
    code, deadline = 0, float("inf")
    while True:
        if _asked_to_stop:
            raise SystemExit(128 + _asked_to_stop[0])
        running = [rank for rank in ranks if rank.poll() is None]
        failed = [(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode]
        if failed and not code:
            number, status = failed[0]
            code, deadline = status if status > 0 else 128 - status, time.monotonic() + grace
            how = f"exit code {status}" if status > 0 else f"signal {-status}"
            print(f"rank {number} ended with {how}; the others have {grace:g} s to end", file=sys.stderr)
        if not running:
            return code
        if time.monotonic() > deadline:
            end(running)
        time.sleep(0.05)


def end(ranks: list[subprocess.Popen], patience: float = 5.0) -> None:
    """Asks the ranks that still run to end, and ends them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = [rank for rank in ranks if rank.poll() is None]
        for rank in running:
            os.killpg(rank.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(rank.poll() is None for rank in running):
            time.sleep(0.02)


def as_table(rows: list[dict[str, Any]], config: EmulateConfig, seconds: float) -> Table:
    """What went over each card, with its share of what the link could have carried."""
    shape = f"{config.nodes} nodes x {config.ranks_per_node} ranks"
    table = Table(title=f"{shape}, links of {config.link.rate}, {seconds:.1f} s")
    for column in ("node", "sent MB", "received MB", "packets sent", "packets received", "link busy"):
        table.add_column(column, justify="right")
    for node, row in enumerate(rows):
        busiest = max(row["sent_bytes"], row["received_bytes"]) * 8 / config.link.bits_per_second / seconds
        cells = [f"{row['sent_bytes'] / 1e6:.2f}", f"{row['received_bytes'] / 1e6:.2f}"]
        table.add_row(str(node), *cells, str(row["sent_packets"]), str(row["received_packets"]), f"{busiest:.0%}")
    return table


def emulate(config: EmulateConfig, command: list[str]) -> int:
    """Runs `command` on the emulated cluster; returns the exit code of its first rank that failed, or 0."""
    remove_leftovers()
    with Cluster(config) as cluster:
        began = time.monotonic()
        ranks = cluster.start(command)
        try:
            code = wait(ranks, config.grace)
        finally:
            end(ranks)
        seconds = time.monotonic() - began
        rows = [cluster.counters(node) for node in range(config.nodes)]
    Console(stderr=True).print(as_table(rows, config, seconds))
    if config.report is not None:
        path = Path(config.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"config": asdict(config), "seconds": seconds, "exit_code": code, "nodes": rows}))
        part.replace(path)
    return code


_asked_to_stop: list[int] = []  # signals received


def _stop(number: int, frame: FrameType | None) -> None:
    """Notes that the run is to end; `wait` ends it. To raise here would not do: in the hooks of a fork, as wherever
    Python cannot pass an exception on, it would be dropped."""
    _asked_to_stop.append(number)


@one_line_errors()
def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    options, command = words[:cut], words[cut + 1 :]
    if {"-h", "--help"} & set(options):
        print(__doc__)
        return
    for word in options:
        if "=" not in word:
            raise ValueError(
                f"{word}: not of the form option=value; the script to run and its arguments stand after --"
            )
    merged = OmegaConf.merge(OmegaConf.structured(EmulateConfig), OmegaConf.from_cli(options))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, EmulateConfig)
    if not command:
        raise ValueError("nothing to run: put a Python script and its arguments after --")
    if not Path(command[0]).is_file():
        raise ValueError(f"{command[0]}: no such script")
    check_machine()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    sys.exit(emulate(config, command))


if __name__ == "__main__":
    main()
