"""docs/validation.md is what launch/validate.py writes."""

from pathlib import Path

from launch.validate import Line, document


def test_the_document_is_up_to_date() -> None:
    written = Path(__file__).resolve().parents[2] / "docs" / "validation.md"
    assert written.read_text() == document(), "run: make validation"


def test_errors_are_of_the_published_figure() -> None:
    assert str(Line("x", "y", 200.0, 190.0, "s")) == "| x | y | 200 | 190 | s | -5.00 % |"
    assert "exact" in str(Line("x", "y", 7.0, 7.0))
