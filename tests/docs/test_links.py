"""Links between the pages, and from them to the repository's files, lead somewhere; so do their anchors."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT

EVERY = [*PAGES, ROOT / "CHANGELOG.md"]


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """The anchors that a code host makes of the headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):  # another site: not fetched
            continue
        path, _, anchor = target.partition("#")
        at = (page.parent / path).resolve() if path else page
        if not at.exists() or (anchor and anchor not in anchors(at)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", EVERY, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not dead_links(page)


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#nowhere) [c](missing.md) [d](https://example.org) `[e](f)`")
    assert dead_links(page) == ["#nowhere", "missing.md"]
