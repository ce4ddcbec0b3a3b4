"""`merge`: a folder that transformers loads, and words about what was compared."""

import pytest

from peft_fast.cli import merge
from peft_fast.errors import SettingsError


def test_a_plain_model_and_what_was_compared(finished, tmp_path, capsys):
    assert merge.app([str(finished), "--out", str(tmp_path / "plain")]) == 0
    shown = capsys.readouterr().out
    assert "BertForSequenceClassification" in shown and "without its adapter" in shown
    assert (tmp_path / "plain" / "config.json").exists() and (tmp_path / "plain" / "tokenizer.json").exists()
    with pytest.raises(SettingsError, match="there already"):
        merge.app([str(finished), "--out", str(tmp_path / "plain")])
    assert merge.app([str(finished), "--out", str(tmp_path / "plain"), "--overwrite", "--dtype", "bf16"]) == 0
