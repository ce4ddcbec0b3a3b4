"""The page of options is what the table in config.py says, and the index has every page."""

import re

from peft_fast.recipes import manual
from peft_fast.recipes.config import TASKS, Config


def test_the_page_of_options_is_not_stale():
    assert manual.PAGE.read_text(encoding="utf-8") == manual.page(), "run `python -m peft_fast.recipes.manual`"


def test_every_option_has_a_row_with_its_default_and_where_it_applies():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", manual.page(), re.M)
    assert [row[0] for row in rows] == list(Config.model_fields) or {row[0] for row in rows} == set(Config.model_fields)
    found = {row[0]: row[1:] for row in rows}
    assert found["r"] == ("whole number", "`16`", "rank of the adapters (lora, dora)")
    assert found["task"][1] == "needed" and found["max_length"][2].endswith("(text)")
    assert found["fast"][:2] == ("yes or no", "`true`") and found["packing"][2].endswith("(causal-lm)")


def test_the_index_names_every_page_and_no_other():
    folder = manual.PAGE.parent
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert linked == {path.name for path in folder.glob("*.md")} - {"README.md"} | {f"{task}.md" for task in TASKS}
