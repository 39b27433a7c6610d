"""launch/pretrain.py as people run it: to the end, stopped, killed, resumed, and with wrong input."""

import json
import multiprocessing as mp
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import pytest

from infra import distributed, incidents, run_lock
from infra.prepare import PrepareConfig, prepare
from infra.tokenizer import train_bpe
from launch import generate, pretrain
from tests.launch.runs import TIMES, small_data

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "precision=fp64",
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.moe_intermediate_size=8",
    "model.num_hidden_layers=2",
    "data.sequence_length=16",
    "train.global_batch_size=4",
    "train.microbatch_size=1",
    "train.eval_samples=4",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("cli"))


def command(*arguments: str, ranks: int = 1) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, str(ROOT / "launch/pretrain.py"), *SMALL, *arguments]


def run(*arguments: str, ranks: int) -> subprocess.CompletedProcess:
    """Under torchrun."""
    return subprocess.run(command(*arguments, ranks=ranks), capture_output=True, text=True, timeout=100, cwd=ROOT)


def run_alone(*arguments: str) -> subprocess.CompletedProcess:
    """One rank, in a fork of this process: a fresh one would spend its time importing torch."""
    words = command(*arguments)[1:]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = mp.get_context("fork").Process(target=_pretrain, args=(words, out, err))
        process.start()
        process.join(timeout=100)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{words} did not end")
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(words, process.exitcode, out.read(), err.read())


def _pretrain(words: list[str], out: TextIO, err: TextIO) -> None:
    sys.argv, sys.stdout, sys.stderr = words, out, err
    try:
        pretrain.main()
    finally:
        distributed.stop()


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = run_alone(f"data.path={data}", f"run.dir={folder}", "train.steps=12")
    assert done.returncode == 0, done.stderr
    assert "finished at step 12 of 12" in done.stdout
    return folder


def test_a_run_leaves_what_it_says(unbroken):
    assert [r["step"] for r in records(unbroken)] == list(range(1, 13))
    wanted = "step loss lm_loss mtp_loss balance_loss grad_norm lr tokens max_vio dispatch_bytes_across_nodes"
    assert set(wanted.split()) <= set(records(unbroken)[0])
    assert "eval_nats_per_byte" in records(unbroken)[-1]
    assert (unbroken / "checkpoints/step_12/index.json").exists()
    assert "overrides:" in (unbroken / "config.yaml").read_text()
    assert list((unbroken / "tensorboard").iterdir())


def generated(monkeypatch, capsys, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch/generate.py"), *options])
    generate.main()
    return capsys.readouterr().out


def test_a_run_can_be_continued_in_words(unbroken, monkeypatch, capsys, tmp_path):
    large = tmp_path / "large.json"
    large.write_text(train_bpe(iter([Path(__file__).read_text()] * 2), 340).to_json())
    options = [f"checkpoint={unbroken}", "prompt='document 7'", "num_tokens=20"]
    greedy = generated(monkeypatch, capsys, *options, "temperature=0")
    assert greedy.startswith("document 7")
    assert len(greedy) > len("document 7\n")
    assert generated(monkeypatch, capsys, *options, "temperature=0", "seed=1") == greedy
    assert generated(monkeypatch, capsys, *options, "temperature=2", "seed=1") != greedy
    for wrong, words in (
        ("checkpoint=/nowhere", "neither a checkpoint nor"),
        ("num_tokens=0", "num_tokens=0"),
        ("weights=best", "weights=best: expected one of master, ema"),
        ("weights=ema", "holds no averages"),
        (f"tokenizer={large}", "large.json has 340 tokens, more than the model's vocab_size=320"),
    ):
        with pytest.raises(SystemExit, match="2"):
            generated(monkeypatch, capsys, *options, wrong)
        assert re.fullmatch(f"error: .*{words}.*\n", capsys.readouterr().err)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step}: {process.communicate(timeout=10)}")


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_sigterm_saves_and_exits_cleanly_and_the_rest_is_bit_identical(data, unbroken, tmp_path):
    arguments = [f"data.path={data}", f"run.dir={tmp_path}", "train.steps=12"]
    process = start(*arguments)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped at step" in out
    assert run_alone(*arguments).returncode == 0
    assert records(tmp_path) == records(unbroken)


def test_sigkill_costs_the_steps_since_the_last_checkpoint(data, unbroken, tmp_path):
    arguments = [f"data.path={data}", f"run.dir={tmp_path}", "train.steps=12", "checkpoint.every=2"]
    process = start(*arguments)
    wait_for_step(tmp_path, 5, process)
    process.kill()
    process.communicate()
    assert run_alone(*arguments).returncode == 0
    assert records(tmp_path) == records(unbroken)


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(data, tmp_path):
    arguments = [f"data.path={data}", f"run.dir={tmp_path}", "checkpoint.every=2"]
    process = start(*arguments, "train.steps=1000000")
    try:
        wait_for_step(tmp_path, 3, process)
        assert run_lock.is_held(tmp_path)
        config = (tmp_path / "config.yaml").read_bytes()
        done = run_alone(*arguments, "train.steps=12")
        assert done.returncode != 0
        host = socket.gethostname()
        assert f"error: run.dir={tmp_path} is in use by process {process.pid} on {host}: " in done.stderr
        assert done.stderr.count("error: ") == 1
        assert process.poll() is None
        assert config == (tmp_path / "config.yaml").read_bytes()
        assert not incidents.read(tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert run_lock.is_held(tmp_path) is False
    steps = [record["step"] for record in records(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.stepz=3"], "stepz"),
        (["train.steps=many"], "train.steps"),
        (["parallel.schedule=1f2b"], "1f2b"),
        (["model.num_experts_per_tok=99"], "num_experts_per_tok"),
        (["parallel.pp=3"], "pp=3"),
        (["parallel.ep=3"], "ep=3"),
        (["parallel.ep=2", "parallel.dispatcher=local"], "parallel.dispatcher=local"),
        (["data.path=/nowhere"], "/nowhere"),
        (["precision=fp7"], "fp7"),
        (["model.vocab_size=100"], "vocab"),
        (["train.log_every=0"], "train.log_every=0"),
        (["train.eval_samples=-1"], "train.eval_samples=-1"),
        (["train.max_skipped_steps=0"], "train.max_skipped_steps=0"),
        (["spike.skip=99"], "spike.skip=99"),
        (["hang.factor=-1"], "hang.factor=-1"),
        (["optim.weight_decay=-1"], "optim.weight_decay=-1"),
        (["optim.clip=nan"], "optim.clip=nan"),
        (["optim.moments=fp8"], "optim.moments=fp8"),
        (["optim.moments=bf16", "optim.betas=[0.9,0.999]"], "optim.betas=[0.9, 0.999]"),
        (["train.ema_decay=1"], "train.ema_decay=1"),
        (["train.eval_samples=3", "train.microbatch_size=2"], "train.eval_samples=3"),
        (["data.sequence_length=20000"], "(train) holds"),
        (["train.batch_ramp.start=3", "train.microbatch_size=2"], "train.batch_ramp.start=3 does not divide"),
    ],
)
def test_wrong_input_is_one_line(data, tmp_path, monkeypatch, capsys, arguments, words):
    """In this process: a fresh one for each would spend its time importing torch."""
    options = [*SMALL, f"data.path={data}", f"run.dir={tmp_path / 'run'}", "train.steps=2", *arguments]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch/pretrain.py"), *options])
    try:
        with pytest.raises(SystemExit) as stopped:
            pretrain.main()
    finally:
        distributed.stop()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert words in message
    assert not (tmp_path / "run").exists()


def test_a_folder_without_data_is_one_line_on_standard_error(data, tmp_path):
    done = run_alone(f"data.path={tmp_path}", f"run.dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_checkpoint_of_another_model_is_refused_and_its_run_untouched(data, unbroken):
    before = {name: (unbroken / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    done = run_alone(f"data.path={data}", f"run.dir={unbroken}", "train.steps=14", "model.hidden_size=32")
    assert done.returncode != 0
    assert "hidden_size is 16" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert before == {name: (unbroken / name).read_bytes() for name in before}


def test_a_run_with_nothing_left_to_do_is_untouched(data, unbroken):
    def content() -> dict[Path, bytes]:
        return {f: f.read_bytes() for f in unbroken.rglob("*") if f.is_file() and f.name != run_lock.FILE}

    before = content()
    done = run_alone(f"data.path={data}", f"run.dir={unbroken}", "train.steps=2")
    assert done.returncode == 0
    assert "is at step 12 already: nothing to do for train.steps=2" in done.stdout
    assert before == content()


def test_experts_are_shared_without_naming_a_dispatcher(data, tmp_path):
    done = run(f"data.path={data}", f"run.dir={tmp_path}", "train.steps=2", "parallel.ep=2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "ep=2 schedule=1f1b dispatcher=two_hop" in done.stdout
    assert records(tmp_path)[-1]["dispatch_bytes_within_nodes"] > 0


def test_two_ranks_complain_once(data, tmp_path):
    done = run(f"data.path={data}", f"run.dir={tmp_path}", "train.global_batch_size=3", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: train.global_batch_size=3") == 1
    assert "traceback : train.global_batch_size=3" in done.stderr, "torchrun's report ends in the reason"


def test_what_fails_on_one_rank_alone_is_said_once(data, tmp_path):
    """Only rank 0 opens the run folder; the other one must neither hang nor show a trace of its own."""
    (tmp_path / "file").touch()
    done = run(f"data.path={data}", f"run.dir={tmp_path / 'file' / 'run'}", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "[rank1]" not in done.stderr


def mpirun(*arguments: str) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("mpirun")
    if not program.exists():
        pytest.skip("no mpirun beside this python")
    start = [str(program), "-n", "2", "--oversubscribe", "--allow-run-as-root"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run([*start, *command(*arguments)], capture_output=True, text=True, timeout=100, env=environment)


def test_mpirun_starts_ranks_too(data, tmp_path):
    done = mpirun(f"data.path={data}", f"run.dir={tmp_path}", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert "finished at step 3 of 3" in done.stdout


@pytest.mark.slow
def test_ranks_of_mpirun_complain_once(data, tmp_path):
    done = mpirun(f"data.path={data}", f"run.dir={tmp_path}", "train.global_batch_size=3")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr


def test_data_that_holds_nothing_out_is_refused_before_training(data, tmp_path):
    empty = tmp_path / "data"
    (tmp_path / "text.txt").write_text("some text " * 100)
    prepare(PrepareConfig(source=str(tmp_path / "text.txt"), out=str(empty), held_out=0.0, workers=1), quiet=True)
    arguments = [f"data.path={empty}", f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    done = run_alone(*arguments)
    assert done.returncode != 0
    assert "(held_out) holds 0 tokens" in done.stderr
    assert "train.eval_samples=0" in done.stderr
    assert not (tmp_path / "run").exists()
    done = run_alone(*arguments, "train.eval_samples=0")
    assert done.returncode == 0, done.stderr
    assert "eval_loss" not in records(tmp_path / "run")[-1]
