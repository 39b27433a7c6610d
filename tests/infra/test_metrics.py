"""Three copies of every record, a file that a resumed run continues exactly, a console that fits where it writes."""

import io
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infra.metrics import Metrics, keep_steps


def record(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 5.5 / step, "lr": 0.1, "tokens_per_second": 1234.5, **more}


def plain() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_record_is_a_line_at_once_and_a_point_in_tensorboard(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(tmp_path, 3, log_every=2, console=plain()) as metrics:
        for step in (1, 2, 3):
            load, bias = torch.tensor([step, 0, 5]), torch.tensor([0.5, -0.25])
            metrics.write(record(step), {"expert_load/layer_1": load, "routing_bias/layer_1": bias})
            assert [json.loads(line) for line in path.read_text().splitlines()] == [
                record(s) for s in range(1, step + 1)
            ]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "tokens_per_second"}
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx({s: 5.5 / s for s in (1, 2, 3)})
    loads = events.Histograms("expert_load/layer_1")
    assert [e.step for e in loads] == [1, 2, 3]  # the first, every second, the last
    counts = dict(zip(loads[1].histogram_value.bucket_limit, loads[1].histogram_value.bucket, strict=True))
    assert [counts.get(float(i + 1), 0) for i in range(3)] == [2, 0, 5]  # tokens by expert
    assert events.Histograms("routing_bias/layer_1")[0].histogram_value.min == -0.25


def test_a_resumed_run_ends_with_the_file_of_an_unbroken_one(tmp_path: Path) -> None:
    with Metrics(tmp_path / "unbroken", 6, console=plain()) as metrics:
        for step in range(1, 7):
            metrics.write(record(step))
    with Metrics(tmp_path / "broken", 6, console=plain()) as metrics:
        for step in range(1, 6):
            metrics.write(record(step, loss=float(step <= 3) * 5.5 / step))  # what came after the checkpoint differed
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with Metrics(tmp_path / "broken", 6, done=3, console=plain()) as metrics:
        for step in range(4, 7):
            metrics.write(record(step))
    unbroken, broken = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("unbroken", "broken"))
    assert broken == unbroken
    events = EventAccumulator(str(tmp_path / "broken" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([5.5 / s for s in range(1, 7)])


@pytest.mark.parametrize(("done", "num_left"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_keep_steps(tmp_path: Path, done: int, num_left: int) -> None:
    path = tmp_path / "metrics.jsonl"
    keep_steps(path, done)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    keep_steps(path, done)
    assert path.read_text() == "".join(f'{{"step": {n + 1}}}\n' for n in range(num_left))


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with Metrics(tmp_path, 1, console=plain()) as metrics:
        metrics.write(record(1, grad_norm=float("inf"), loss=float("nan")))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["grad_norm"] is line["loss"] is None


def test_plain_lines_now_and_then_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = plain()
    with Metrics(tmp_path, 25, log_every=10, console=console) as metrics:
        for step in range(1, 26):
            metrics.write(record(step, **({"eval_loss": 3.0, "eval_nats_per_byte": 2.0} if step == 13 else {})))
    lines = text(console).splitlines()
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [1, 10, 13, 20, 25]
    assert re.fullmatch(r"step 10/25  loss 0.5500  1,23\d tokens/s  left \d:\d\d:\d\d", lines[1])
    assert "(held out 2.0000)" in lines[2]


def test_one_live_line_in_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Metrics(tmp_path, 4, done=2, log_every=1, console=console) as metrics:
        metrics.write(record(3))
        metrics.write(record(4))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text(console))
    assert "step 4/4" in shown
    assert "loss 1.3750  1,23" in shown
    assert shown.strip().count("\n") == 0  # drawn over itself


@pytest.mark.parametrize(("last", "how"), [(3, "finished at step 3 of 3"), (2, "stopped at step 2 of 3")])
def test_the_summary_says_where_everything_lies(tmp_path: Path, last: int, how: str) -> None:
    console = plain()
    with Metrics(tmp_path, 3, console=console) as metrics:
        for step in range(1, last + 1):
            metrics.write(record(step))
        metrics.finish({"checkpoints": tmp_path / "checkpoints"})
    said = text(console)
    assert how in said
    assert f"loss        5.5000 at step 1, now {5.5 / last:.4f}" in said
    for place in (tmp_path / "metrics.jsonl", f"tensorboard --logdir {tmp_path}/tensorboard", tmp_path / "checkpoints"):
        assert str(place) in said


def test_a_full_disk_names_the_file_and_the_next_run_mends_it(tmp_path: Path) -> None:
    with Metrics(tmp_path, 9, console=plain()) as metrics:
        metrics.write(record(1))
        size = metrics.path.stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            with pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
                metrics.write(record(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.filename == str(metrics.path)
    with Metrics(tmp_path, 9, done=1, console=plain()) as metrics:
        assert metrics.path.stat().st_size == size
