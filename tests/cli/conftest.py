"""A finished run for the commands that use one, trained once."""

import pytest

from tests.recipes.conftest import at_step, options, reviews, signalled, tiny_bert  # noqa: F401


@pytest.fixture(scope="session")
def finished(tiny_bert, reviews, tmp_path_factory):  # noqa: F811
    """The folder of a LoRA run that has learnt its sentences."""
    from peft_fast.recipes import run

    out = tmp_path_factory.mktemp("runs") / "lora"
    given = dict(task="sequence-classification", model=str(tiny_bert), data=reviews, out=str(out), dtype="fp32")
    run.train(given, epochs=4, batch_size=16, learning_rate=1e-2, r=4, device="cpu", say=lambda text: None)
    return out
