"""The parts of reports: plain text given to them stays text, and a page's policy forbids what it was not told."""

from elements import Elements

from memedge.reports.document import document, provenance, source_hash, style, table

MARKUP = "<b>&\"'"


def test_plain_text_is_escaped():
    parts = table([MARKUP], [["1"]], MARKUP) + provenance([(MARKUP, MARKUP)], MARKUP)
    elements = Elements(parts)
    assert not elements.named("b")
    assert elements.text.count(MARKUP) == 4
    assert elements.named("div")[0]["aria-label"] == MARKUP


def test_headings_and_numbers():
    elements = Elements(table(["name", "kind", "count"], [["a", "b", "1"]], "x", texts=2))
    assert [cell.get("class") for cell in elements.named("th")] == [None, None, "number"]
    assert [cell.get("class") for cell in elements.named("td")] == [None, None, "number"]
    assert elements.named("table")
    one = Elements(table(["name", "count"], [["a", "1"]], "x"))
    assert [cell["scope"] for cell in one.named("th")] == ["col", "col", "row"]


def test_the_command_is_left_out_where_there_is_none():
    assert "command" not in provenance([("a", "b")], "")


def test_a_page_allows_what_it_is_told_alone():
    elements = Elements(document("title", "about", ["one", "$two"], f"style-src {source_hash(style())}", "<!--end-->"))
    policy = next(one["content"] for one in elements.named("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-")
    assert elements.text.split() == ["title", "title", "about", "one", "$two"]
