"""Incidents are lines that survive whatever happens to the line before."""

from infra import incidents


def test_what_is_noted_is_read(tmp_path):
    assert incidents.read(tmp_path) == []
    incidents.note(tmp_path / "run", "rollback", 7, "loss 9 is a spike", to=4)
    incidents.note(tmp_path / "run", "resumed", 4, "from step 4")
    first, second = incidents.read(tmp_path / "run")
    assert (first["kind"], first["step"], first["to"], first["why"]) == ("rollback", 7, 4, "loss 9 is a spike")
    assert second["time"] >= first["time"]


def test_a_line_that_was_cut_short_costs_no_other(tmp_path):
    incidents.note(tmp_path, "resumed", 1, "first")
    whole = (tmp_path / incidents.FILE).read_bytes()
    (tmp_path / incidents.FILE).write_bytes(whole + whole[:20])
    incidents.note(tmp_path, "resumed", 2, "second")
    assert [incident["why"] for incident in incidents.read(tmp_path)] == ["first", "second"]
    assert (tmp_path / incidents.FILE).read_text().count("\n") == 3
