"""The page of what is recognised says what the tests assert."""

from tests.architectures import table


def test_the_page_is_current():
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run `python -m tests.architectures.table`"
