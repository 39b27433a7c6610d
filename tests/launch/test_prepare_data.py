"""The command itself: what it prints, and one line when something is wrong."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare_data(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "prepare_data.py"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_it_says_what_it_made_and_how_to_train_on_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    done = prepare_data(tmp_path, "source=a.txt", "separator='<|endoftext|>'", "out=data/mine", "held_out=0")
    assert done.returncode == 0, done.stderr
    assert "data/mine: 8 tokens of 2 documents to train on, 0 of 0 held out" in done.stdout
    assert "data.path=data/mine model.vocab_size=320 train.eval_samples=0\n" in done.stdout  # nothing to evaluate on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "data"]  # and no folder of Hydra's


def test_held_out_documents_are_evaluated_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"tale {n}" for n in range(40)))
    done = prepare_data(tmp_path, "source=a.txt", "separator='<|endoftext|>'", "out=d", "held_out=0.5")
    assert done.returncode == 0, done.stderr
    assert " 0 of 0 held out" not in done.stdout
    assert "data.path=d model.vocab_size=320\n" in done.stdout


def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    failed = prepare_data(tmp_path, "source=a.txt", "out=d")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: source=a.txt matches no file")
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.iterdir())
