"""The command line of the simulator: what it prints, what it writes, what it refuses."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launch import simulate as cli
from launch.costs import costs_of
from launch.validate import BATCH, V3, config_of, planner_of
from parallel.pipeline.actions import Action
from parallel.pipeline.passes import from_csv
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate import Costs


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `simulate.py` with these words in an empty folder; returns (what it printed, what it refused)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["simulate.py", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert code == (0 if not said.err else 1 if "-m" in words else 2)
        return said.out, said.err.removesuffix("\n")

    return run


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_without_out_it_prints_and_writes_nothing(run, tmp_path: Path) -> None:
    printed, refused = run("parallel.schedule=1f1b", "parallel.pp=2", "num_microbatches=2")
    assert refused == ""
    assert "rank 0  F0 F1 ···B0    ···B1    " in printed
    assert "1f1b, 2 ranks, 2 microbatches: step time 8, bubble 25.0 %, peak activations 2" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_contract(run, tmp_path: Path) -> None:
    words = "parallel.schedule=dualpipe parallel.pp=8 num_microbatches=20 costs.f=1 costs.i=1 costs.w=1 out=DIR"
    assert run(*words.split())[1] == ""
    figures = report(tmp_path / "DIR")
    assert (figures["schedule"], figures["pp"], figures["num_microbatches"]) == ("dualpipe", 8, 20)
    assert figures["peak_live_microbatches"] == [9] * 8
    for rank in range(8):
        assert figures["busy_time"][rank] == 60
        assert figures["bubble_time"][rank] == figures["pipeline_time"] - 60
        assert sum(figures["bubble_by_cause"][rank].values()) == figures["bubble_time"][rank]
    assert figures["bubble_fraction"] == pytest.approx(sum(figures["bubble_time"]) / (8 * figures["step_time"]))
    schedule = json.loads((tmp_path / "DIR" / "schedule.json").read_text())
    assert schedule["placement"] == [list(range(8)), list(range(7, -1, -1))]
    actions = [Action.parse(text) for program in schedule["programs"] for slot in program for text in slot]
    assert len(actions) == len(set(actions))
    assert {len(slot) for program in schedule["programs"] for slot in program} == {1, 2}
    names = {"report.json", "schedule.json", "trace.json", "timeline.html", "timeline.png"}
    assert {path.name for path in (tmp_path / "DIR").iterdir()} == names
    assert {path.name for path in tmp_path.iterdir()} == {"DIR"}
    assert json.loads((tmp_path / "DIR" / "trace.json").read_text())["distributedInfo"]["world_size"] == 8


def test_slot_end_gives_the_published_bubble(run, tmp_path: Path) -> None:
    run("parallel.schedule=1f1b", "parallel.pp=4", "num_microbatches=12", "costs.send_when=slot_end", "out=DIR")
    assert report(tmp_path / "DIR")["bubble_time"] == [9.0] * 4  # (PP - 1)(F + B)


def test_a_csv_goes_out_and_comes_in(run, tmp_path: Path) -> None:
    run("parallel.schedule=zbv", "parallel.pp=4", "num_microbatches=8", "costs.w=0.5", "out=A")
    assert run("parallel.schedule_csv=A/schedule.csv", "costs.w=0.5", "out=B")[1] == ""
    there, back = report(tmp_path / "A"), report(tmp_path / "B")
    assert (back["pp"], back["num_microbatches"], back["num_stages"]) == (4, 8, 8)
    assert back["step_time"] == there["step_time"]
    assert back["bubble_by_cause"] == there["bubble_by_cause"]
    assert (tmp_path / "A/schedule.csv").read_text() == (tmp_path / "B/schedule.csv").read_text()
    assert from_csv((tmp_path / "A/schedule.csv").read_text()).num_stages == 8


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_costs_from_a_file_yield_to_the_command_line(run, tmp_path: Path, suffix: str) -> None:
    costs = {"f": 2.0, "i": 3.0, "w": 1.0, "optimizer": 5.0, "slow": {"1": 1.5}}
    (tmp_path / f"costs.{suffix}").write_text(json.dumps(costs))
    words = ("parallel.schedule=gpipe", "parallel.pp=2", "num_microbatches=2", f"costs.file=costs.{suffix}", "out=DIR")
    run(*words, "costs.w=4")
    found = report(tmp_path / "DIR")["costs"]
    assert {name: found[name] for name in costs} == costs | {"w": 4}


def test_slow_ranks_and_jitter(run, tmp_path: Path) -> None:
    words = ("parallel.schedule=1f1b", "parallel.pp=2", "num_microbatches=4", "num_runs=20", "costs.slow={1: 2.0}")
    run(*words, "out=A")
    assert report(tmp_path / "A")["busy_time"] == [12, 24]
    printed, _ = run(*words, "costs.jitter=0.1", "out=B")
    low, middle, high = report(tmp_path / "B")["step_time_quantiles"].values()
    assert low < middle < high
    assert f"quantiles of 20 runs with jitter: 5% {low:.6g}, 50% {middle:.6g}, 95% {high:.6g}" in printed


def test_stages_per_rank_and_zero_bubble(run, tmp_path: Path) -> None:
    shape = ("parallel.pp=2", "num_microbatches=4")
    run("parallel.schedule=interleaved_1f1b", "parallel.stages_per_rank=3", *shape, "out=A")
    assert report(tmp_path / "A")["num_stages"] == 6
    for limit in (2, 3):
        run("parallel.schedule=zero_bubble", f"auto.memory_limit={limit}", *shape, "out=B")
        assert max(report(tmp_path / "B")["peak_activations"]) <= limit


def test_auto_keeps_its_shape_and_limit(run, tmp_path: Path) -> None:
    words = ("parallel.pp=4", "num_microbatches=8", "costs.w=0.6", "auto.memory_limit=4")
    stages = {"loop": {4, 8}, "v": {8}, "bidirectional": {4}}
    for shape, fixed in (("loop", "zb1p"), ("v", "zbv"), ("bidirectional", None)):
        run("parallel.schedule=auto", f"auto.shape={shape}", *words, "out=A")
        found = report(tmp_path / "A")
        assert found["schedule"] == "auto"
        assert found["num_stages"] in stages[shape]
        assert max(found["peak_activations"]) <= 4
        if fixed is not None:
            run(f"parallel.schedule={fixed}", *words, "out=B")
            assert found["step_time"] <= report(tmp_path / "B")["step_time"]


def test_too_few_microbatches_are_said(run) -> None:
    assert (
        "wants 8 microbatches or more: with 3, 0 of 12 forwards overlap"
        in run("parallel.pp=4", "num_microbatches=3")[0]
    )
    assert "or more" not in run("parallel.pp=4", "num_microbatches=8")[0]


def test_a_csv_of_a_spreadsheet(run, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(b"\xef\xbb\xbf0F0,0B0,\r\n\r\n1F0,1B0,\r\n\r\n")
    assert "mine.csv, 2 ranks, 1 microbatch:" in run("parallel.schedule_csv=mine.csv")[0]


def test_the_help_names_every_option(run) -> None:
    said = run("--help")[0]
    for option in fields(Costs):
        assert re.search(rf"\b(costs\.)?{option.name}\b", said.partition("The defaults")[0]), option.name
    for option in (*fields(cli.PipelineConfig), *fields(cli.AutoConfig), *fields(cli.SimulateConfig)):
        assert option.name in said.partition("The defaults")[0], option.name
    for name in (*SCHEDULES, *cli.MADE_FOR_COSTS):
        assert name in said


def test_large_steps_are_not_drawn(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "MOST_DRAWN", 10)
    printed, _ = run("parallel.schedule=1f1b", "parallel.pp=2", "num_microbatches=4", "out=DIR")
    assert "no pictures: 16 actions" in printed
    names = {"report.json", "schedule.json", "schedule.csv"}
    assert {path.name for path in (tmp_path / "DIR").iterdir()} == names


# ---- sweeps


def test_a_sweep_ends_with_one_table(run, tmp_path: Path) -> None:
    printed, refused = run(
        "-m", "parallel.schedule=1f1b,zb1p", "parallel.pp=2", "num_microbatches=8", "costs.w=0.5,1", "out=DIR"
    )
    assert refused == ""
    assert len(re.findall(r"^ +(?:1f1b|zb1p) ", printed, re.MULTILINE)) == 4
    with open(tmp_path / "DIR/summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["schedule"], row["costs.w"]) for row in rows} == {
        (schedule, w) for schedule in ("1f1b", "zb1p") for w in ("0.5", "1")
    }
    reports = [report(folder) for folder in (tmp_path / "DIR").iterdir() if folder.is_dir()]
    assert sorted(r["step_time"] for r in reports) == sorted(float(row["step_time"]) for row in rows)
    page = (tmp_path / "DIR/summary.html").read_text()
    data = json.loads(re.search(r'application/json">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert len(data["rows"]) == 4
    assert "http" not in page


def test_a_sweep_without_out_writes_nothing(run, tmp_path: Path) -> None:
    printed, refused = run("-m", "parallel.schedule=1f1b,gpipe", "parallel.pp=2")
    assert len(re.findall(r"^ +(?:1f1b|gpipe) ", printed, re.MULTILINE)) == 2
    assert refused == ""
    assert list(tmp_path.iterdir()) == []


def test_one_impossible_combination_does_not_end_a_sweep(run, tmp_path: Path) -> None:
    printed, refused = run("-m", "parallel.schedule=1f1b,dualpipe", "parallel.pp=3,4", "out=DIR")
    assert re.search(r"dualpipe +3 .* \(1\) *\n", printed)
    assert "\n(1) dualpipe needs an even number of ranks, got 3: use 4, or dualpipev\n" in printed
    assert refused == "error: 1 of 4 simulated steps could not be: the table says why"
    with open(tmp_path / "DIR/summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step_time"] == "" for row in rows] == [bool(row["note"]) for row in rows]
    assert sum(bool(row["note"]) for row in rows) == 1


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("parallel.pp=7", "needs an even number of ranks, got 7"),
        ("parallel.pp=0", "parallel.pp=0: must be at least 1"),
        ("parallel.schedule=dualpiep", "parallel.schedule=dualpiep: expected one of gpipe"),
        ("parallel.scheduel=zbv", "did you mean parallel.schedule?"),
        ("num_microbatches=2000000", "parallel.pp=8 times num_microbatches=2000000 are 16,000,000 forwards"),
        ("num_microbatches=many", "num_microbatches: Value 'many'"),
        ("costs.f=0", "costs.f = 0"),
        ("costs.i=-1", "costs.i = -1"),
        ("costs.w=nan", "costs.w = nan"),
        ("costs.g=1", "costs.g: no such option"),
        ("costs.slow={9: 2}", "rank 9"),
        ("costs.slow=[1]", "expected a factor for each slow rank"),
        ("costs.file=no.yaml", "no.yaml: No such file"),
        ("costs.file=cost.yaml", "costs.file=cost.yaml: option=g: expected one of f, i, w"),
        ("costs.file=broken.yaml", "neither YAML nor JSON"),
        ("costs.file=list.yaml", "must hold names and values"),
        ("parallel.schedule_csv=dead.csv", "dead.csv: rank 0, slot 0: 0B0 needs 0F0"),
        ("parallel.schedule_csv=unknown.csv", "unknown.csv: row 1, column 2: '0X0' is not an action"),
        ("parallel.schedule_csv=binary.csv", "binary.csv: not a text file"),
        ("auto.shape=w", "auto.shape=w: expected one of loop, v, bidirectional, any"),
        ("unit=weeks", "unit=weeks: expected one of"),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("num_runs=100000000000", "num_runs=100000000000: must be between 1 and 100,000"),
        ("sequence_length=0", "sequence_length=0: must be at least 1"),
        ("layout.ep=4", "model= and layout= are for the planner's costs: name cluster="),
        ("layout.stages=4", "layout.stages: no such option"),
        ("layout.precision=fp4", "layout.precision=fp4: expected one of bf16, fp8"),
        ("measure=.", ". holds no measured step (trace/measured.json): a run with parallel.pp above 1"),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path: Path, words: str, says: str) -> None:
    (tmp_path / "dead.csv").write_text("0B0,0F0\n")
    (tmp_path / "unknown.csv").write_text("0F0,0X0\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cost.yaml").write_text("g: 1\n")
    (tmp_path / "broken.yaml").write_text("f: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    before = set(tmp_path.iterdir())
    _, refused = run(words, "out=DIR")
    assert says in refused
    assert refused.startswith("error: ")
    assert "\n" not in refused
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("auto.memory_limit=0.5", "memory_limit = 0.5: a rank holds at least the activations of one microbatch"),
        ("parallel.pp=3 auto.shape=bidirectional", "needs an even number of ranks"),
        ("parallel.pp=2 costs.f=[1,2,3]", "costs.f lists 3 stages"),
    ],
)
def test_auto_says_in_one_line_what_cannot_be(run, words: str, says: str) -> None:
    _, refused = run("parallel.schedule=auto", *words.split())
    assert says in refused
    assert refused.startswith("error: ")
    assert "\n" not in refused


def test_the_grid_of_a_deadlock_marks_the_slot(run, tmp_path: Path) -> None:
    (tmp_path / "dead.csv").write_text("0F0,0B1,0F1,0B0\n")
    printed, _ = run("parallel.schedule_csv=dead.csv")
    assert "[0B1]" in printed


def test_a_key_of_a_costs_file_is_a_rank() -> None:
    options = {"file": None, "f": 1.0, "slow": {"3": 1.1}}
    assert costs_of(options, []).slow == {3: 1.1}


def test_the_process_says_one_line_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from launch.simulate import main\n"
        "main()\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv[1:] = ['parallel.pp=7']\n"
        "main()\n"
    )
    words = ["parallel.pp=2", "num_microbatches=4", "out=DIR"]
    ended = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: dualpipe needs an even number of ranks, got 7: use 8, or dualpipev\n"
    assert {path.name for path in tmp_path.iterdir()} == {"DIR"}


def test_pairs_of_a_cluster_are_not_executed(run) -> None:
    """Their costs are means over all pairs, and stages that only take time cannot be laid over each other."""
    words = ("cluster=h100", "model=16b", "parallel.schedule=zbv", "parallel.pp=2", "num_microbatches=4", "layout.ep=8")
    assert "use layout.overlap=false" in run("execute=true", *words)[1]
    assert "is a schedule of 2 ranks, but 1 were started" in run("execute=true", *words, "layout.overlap=false")[1]
    assert "leave out -m" in run("-m", "execute=true", "parallel.pp=2,4")[0]


def test_both_bubbles_of_the_documented_example_are_shown(run, tmp_path: Path) -> None:
    """The README's command, and the figure that docs/schedules.md derives for it."""
    words = ("parallel.schedule=dualpipe", "parallel.pp=8", "num_microbatches=20")
    printed, _ = run(*words)
    assert "dualpipe, 8 ranks, 20 microbatches: step time 63, bubble 4.8 %" in printed
    assert "(costs.send_when=slot_end): step time 66, bubble 9.1 %" in printed
    assert run(*words, "costs.send_when=slot_end", "out=DIR")[1] == ""
    assert report(tmp_path / "DIR")["bubble_time"] == [6.0] * 8
    assert "1f1b, 1 rank, 1 microbatch:" in run("parallel.schedule=1f1b", "parallel.pp=1", "num_microbatches=1")[0]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [("1f1b", ""), ("zbv", ", overlap: false"), ("dualpipe", ""), ("dualpipe", ", overlap: false"), ("dualpipev", "")],
)
def test_a_cluster_and_a_model_give_the_planners_costs(run, tmp_path: Path, schedule: str, words: str) -> None:
    """The same step as the planner's, in pairs and in turn, however unlike the stages are."""
    layout = f"layout={{ep: 64, dispatcher: auto, recompute: selective, precision: fp8{words}}}"
    common = ("cluster=h800_2048", "model=671b", "parallel.pp=16", "num_microbatches=120")
    printed, refused = run(f"parallel.schedule={schedule}", *common, layout, "out=DIR")
    assert refused == ""
    assert "note: shapes outside the measured tables" in printed
    told = report(tmp_path / "DIR")
    assert told["unit"] == "s"
    planner = planner_of(config_of("model=671b"))
    expected = planner.step.simulate(replace(V3, schedule=schedule, overlap=not words), BATCH).total
    assert told["step_time"] == pytest.approx(expected, rel=1e-9)


def test_a_word_that_no_layout_has_is_refused(run) -> None:
    common = ("cluster=laptop", "model=debug", "parallel.pp=2")
    assert "layout.epp: no such option; did you mean layout.ep?" in run(*common, "layout={epp: 2}")[1]
    assert "ep=3" in run(*common, "layout={ep: 3}")[1]
    once = ("parallel.schedule=interleaved_1f1b", "parallel.stages_per_rank=1", "num_microbatches=4")
    assert "but the planner knows it with 4" in run(*common, *once)[1]


def test_out_is_a_folder(run, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    assert "out=notes.md is a file: name a folder" in run("out=notes.md")[1]
