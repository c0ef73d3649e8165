"""The report replaces reports alone."""

from __future__ import annotations


def test_the_report_replaces_pages_of_mergeline_alone(workspace, mergeline):
    report = workspace / "build" / "report.html"
    report.parent.mkdir()
    report.write_text("<html>mine</html>")
    given = ["report", "--params", workspace / "params.yaml"]
    outcome = mergeline(*given)
    assert outcome.code == 2 and "is no page of Mergeline's" in outcome.err and "--force" in outcome.err
    assert report.read_text() == "<html>mine</html>"
    assert "is missing; run" in mergeline(*given, "--force").err  # that no run has ended is all that is left
