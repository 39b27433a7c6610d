"""What the pictures, the page and the trace say is what the timeline says."""

import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from parallel.pipeline.actions import Action, Op, Schedule, depends_on
from parallel.pipeline.palette import Lanes, halves, ink_on
from parallel.pipeline.render import chrome_trace, html, key, picture, text
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.timeline import Span, Timeline

SHAPES = [("gpipe", 4, 6), ("interleaved_1f1b", 4, 8), ("zbv", 4, 8), ("dualpipe", 4, 8), ("dualpipe", 8, 20)]


def simulated(name: str, num_ranks: int, num_microbatches: int, **costs: Any) -> tuple[Schedule, Timeline]:
    schedule = SCHEDULES[name](num_ranks, num_microbatches)
    return schedule, simulate(schedule, Costs(**costs))


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


# ---- lanes and halves


def test_the_lanes_of_dualpipe_are_its_routes() -> None:
    schedule, timeline = simulated("dualpipe", 4, 9)
    lanes = Lanes.of(timeline)
    assert lanes.names == ("downward", "upward")
    assert lanes.lane_A.tolist() == [schedule.route_of(mb) for mb in timeline.mb_A.tolist()]
    assert len({lanes.colour(op, lane) for op in (Op.F, Op.B, Op.I, Op.W) for lane in (0, 1)}) == 8


def test_the_lanes_of_one_route_are_the_stages_of_a_rank() -> None:
    _, timeline = simulated("interleaved_1f1b", 4, 8)
    lanes = Lanes.of(timeline)
    assert lanes.lane_A.tolist() == (timeline.stage_A // 4).tolist()
    assert lanes.word(Op.F, 1) == "forward, stage 2 of its rank"
    assert Lanes.of(simulated("1f1b", 4, 8)[1]).word(Op.B, 0) == "backward"


def test_halves_are_the_two_of_a_slot() -> None:
    schedule, timeline = simulated("dualpipe", 4, 8)
    half_A, partner_A = halves(timeline)
    pairs = sum(len(slot) == 2 for program in schedule.programs for slot in program)
    assert (half_A == 0).sum() == (half_A == 1).sum() == pairs > 0
    in_pair = np.flatnonzero(half_A >= 0)
    assert (partner_A[partner_A[in_pair]] == in_pair).all()
    assert (timeline.slot_A[partner_A[in_pair]] == timeline.slot_A[in_pair]).all()
    assert (halves(simulated("gpipe", 4, 6)[1])[0] == -1).all()


def test_ink_reads_on_both_ends() -> None:
    assert (ink_on("#2f6db5"), ink_on("#f3e0c0")) == ("#ffffff", "#1f2430")


# ---- the grid


def test_the_grid_of_a_small_step() -> None:
    _, timeline = simulated("gpipe", 2, 2)
    assert text(timeline, 80).plain.splitlines()[1:] == [
        "rank 0  F0 F1 ······B0    B1    ",
        "rank 1  ···F0 F1 B0    B1    ···",
    ]


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), SHAPES)
def test_the_grid_names_every_action_or_fits_one_block(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule, timeline = simulated(name, num_ranks, num_microbatches)
    wide = text(timeline, 2000).plain.splitlines()[1:]
    for rank, line in enumerate(wide):
        labels = re.findall(r"[FBIW]\d+", line.split(maxsplit=2)[2].replace("·", " ").upper())
        assert labels == [f"{a.op}{a.mb}" for slot in schedule.programs[rank] for a in slot]
    narrow = text(timeline, 40).plain.splitlines()
    assert all(len(line) <= 40 for line in narrow)
    assert len(narrow) <= 4 * (num_ranks + 2)


def test_the_key_names_the_letters_of_the_grid() -> None:
    assert key(simulate(SCHEDULES["gpipe"](2, 2))) == "F forward, B backward"
    split = "F forward, B backward, I input gradient, W weight gradient"
    assert key(simulate(SCHEDULES["dualpipe"](4, 8))) == f"{split}; small letters: upward; &: overlapped"
    interleaved = simulate(SCHEDULES["interleaved_1f1b"](2, 4))
    assert key(interleaved) == "F forward, B backward; small letters: stage 2 of its rank"


def test_idle_time_is_dotted_and_nothing_else() -> None:
    _, timeline = simulated("1f1b", 4, 8)
    for rank, line in enumerate(text(timeline, 2000).plain.splitlines()[1:]):
        columns_of_time = 3
        assert line.count("·") == columns_of_time * timeline.bubble_R[rank]


# ---- the page


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), SHAPES)
def test_the_page_holds_the_timeline(name: str, num_ranks: int, num_microbatches: int) -> None:
    _, timeline = simulated(name, num_ranks, num_microbatches, p2p=0.25, optimizer=2.0)
    data = page_data(html([(name, timeline)]))["timelines"][0]
    spans = data["spans"]
    assert spans["start"] == timeline.start_A.tolist()
    assert spans["end"] == timeline.end_A.tolist()
    assert spans["cause"] == timeline.waited_A.tolist()
    assert [Action.parse(n) for n in spans["name"]] == [s.action for rank in timeline.spans for s in rank]
    for rank in range(num_ranks):
        waits = {s: w for s, w, r in zip(spans["start"], spans["wait"], spans["rank"], strict=True) if r == rank}
        trailing = timeline.pipeline_time - timeline.end_A[timeline.rank_A == rank].max()
        assert sum(waits.values()) + trailing == pytest.approx(timeline.bubble_R[rank])
        assert sum(time for _, time, _ in data["where"][rank]) == pytest.approx(timeline.step_time)
    assert data["end"] == data["pipeline"] + 2.0


def test_two_timelines_share_a_page() -> None:
    _, predicted = simulated("dualpipe", 4, 8)
    _, measured = simulated("dualpipe", 4, 8, jitter=0.2)
    data = page_data(html([("predicted", predicted), ("measured", measured)], unit="ms"))
    assert [t["title"] for t in data["timelines"]] == ["predicted", "measured"]
    assert len(data["legend"]) == 8  # said once


def test_the_page_asks_the_network_for_nothing_and_no_title_breaks_it() -> None:
    _, timeline = simulated("1f1b", 2, 4)
    evil = '</script><img src="http://x">'
    page = html([(evil, timeline)], title=evil)
    assert page_data(page)["title"] == evil

    class Attributes(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("img", "link", "iframe")
            assert not {"src", "href"} & {name for name, _ in attrs}

    Attributes().feed(page)
    assert "http" not in page.replace('src=\\"http://x\\"', "")


# ---- the picture


def test_a_picture_in_each_format() -> None:
    _, timeline = simulated("dualpipe", 4, 8, optimizer=1.0)
    png = picture(timeline, "png", title="dualpipe")
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert width > height > 300
    svg = picture(timeline, "svg", title="dualpipe").decode()
    assert svg.rstrip().endswith("</svg>")
    for colour in ("#2f6db5", "#e08e12", "#9aa1b1"):
        assert colour in svg
    assert picture(timeline, "pdf").startswith(b"%PDF")


# ---- the trace


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), SHAPES)
def test_the_trace_has_the_form_of_the_profilers(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule, timeline = simulated(name, num_ranks, num_microbatches, p2p=0.5, optimizer=1.0)
    trace = json.loads(json.dumps(chrome_trace(timeline, schedule, p2p=0.5)))
    assert trace["schemaVersion"] == 1
    assert trace["distributedInfo"] == {"backend": "nccl", "rank": 0, "world_size": num_ranks}
    required = {"X": {"cat", "dur", "args"}, "M": {"args"}, "C": {"args"}, "s": {"cat", "id"}, "f": {"cat", "id", "bp"}}
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "ts"} | required[event["ph"]] <= set(event)
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        assert event["ts"] >= 0
        assert event.get("dur", 0) >= 0
        if event["ph"] == "X":
            assert event["cat"] == "kernel"
            assert event["args"]["stream"] == event["tid"]
            assert event["args"]["device"] == event["pid"]
    correlations = [e["args"]["correlation"] for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(correlations) == len(set(correlations))
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "X"} <= named


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), SHAPES)
def test_every_transfer_is_a_kernel_with_an_arrow(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule, timeline = simulated(name, num_ranks, num_microbatches, p2p=0.5)
    events = chrome_trace(timeline, schedule, p2p=0.5)["traceEvents"]
    rank_of = {span.action: span.rank for rank in timeline.spans for span in rank}
    crossing = sum(rank_of[need] != rank_of[a] for a in rank_of for need in depends_on(a, schedule))
    kernels = {e["args"]["correlation"]: e for e in events if e["name"].startswith("ncclDevKernel_SendRecv")}
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert len(kernels) == len(starts) == len(ends) == crossing > 0
    kernel_at = {(e["pid"], e["tid"], e["ts"]): e for e in events if e["ph"] == "X"}
    for flow, start in starts.items():
        kernel, end = kernels[flow], ends[flow]
        assert (start["pid"], start["tid"], start["ts"]) == (kernel["pid"], kernel["tid"], kernel["ts"])
        assert end["pid"] == kernel["args"]["to rank"] != start["pid"]
        assert end["ts"] >= kernel["ts"] + kernel["dur"] - 1e-6  # nothing is used before it arrives
        assert (end["pid"], end["tid"], end["ts"]) in kernel_at  # the arrow ends at an action


@pytest.mark.parametrize("p2p", [0.0, 0.5, 3.0])
def test_events_of_one_stream_follow_each_other(p2p: float) -> None:
    """Viewers nest what lies within another event, and drop what overlaps it only in part."""
    schedule, timeline = simulated("dualpipe", 4, 8, p2p=p2p)
    kernels = [e for e in chrome_trace(timeline, schedule, p2p=p2p)["traceEvents"] if e["ph"] == "X"]
    assert (len({e["tid"] for e in kernels}) > 2) == (p2p > 1)  # a slow link carries several transfers at once
    for stream in {(e["pid"], e["tid"]) for e in kernels}:
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in kernels if (e["pid"], e["tid"]) == stream)
        for (start, end), (next_start, next_end) in pairwise(times):
            assert end <= next_start + 1e-6 or (start, end) == (next_start, next_end)


def test_analysers_take_transfers_for_communication() -> None:
    """Holistic Trace Analysis goes by this pattern, other analysers by the prefix."""
    schedule, timeline = simulated("1f1b", 2, 2)
    kernels = [e for e in chrome_trace(timeline, schedule)["traceEvents"] if e["ph"] == "X"]
    communication = {e["name"] for e in kernels if re.match(r"^nccl.*Kernel", e["name"])}
    assert communication == {e["name"] for e in kernels if "message" in e["args"]} != set()


def test_the_counter_of_the_trace_is_the_memory_curve() -> None:
    schedule, timeline = simulated("dualpipe", 4, 8)
    events = chrome_trace(timeline, schedule, microseconds=1.0)["traceEvents"]
    for rank in range(4):
        counted = [(e["ts"], e["args"]["microbatches"]) for e in events if e["ph"] == "C" and e["pid"] == rank]
        times, live = timeline.memory_curve(rank)
        assert counted == list(zip(times.tolist(), live.tolist(), strict=True))


# ---- and all of it


def test_a_measured_timeline_is_drawn_by_the_same_code() -> None:
    schedule = SCHEDULES["1f1b"](2, 1)
    spans = [
        Span(0, 0, Action(0, Op.F, 0), 100.0, 101.0, 101.0),
        Span(1, 0, Action(1, Op.F, 0), 101.5, 102.5, 102.5, Action(0, Op.F, 0)),
        Span(1, 1, Action(1, Op.B, 0), 102.5, 104.0, 104.0),
        Span(0, 1, Action(0, Op.B, 0), 104.5, 106.0, 106.0, Action(1, Op.B, 0)),
    ]
    timeline = Timeline.from_spans(spans)
    assert "rank 1" in text(timeline).plain
    assert page_data(html([("measured", timeline)], unit="s"))["timelines"][0]["spans"]["wait"] == [0, 3.5, 1.5, 0]
    assert len(chrome_trace(timeline, schedule, microseconds=1e6)["traceEvents"]) > 4
    assert picture(timeline).startswith(b"\x89PNG")


def test_an_empty_timeline_is_drawn_too() -> None:
    timeline = Timeline.from_spans([])
    assert text(timeline).plain == ""
    assert page_data(html([("nothing", timeline)]))["timelines"][0]["ranks"] == 0


def test_drawing_imports_no_torch() -> None:
    code = "import sys, parallel.pipeline.render; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
