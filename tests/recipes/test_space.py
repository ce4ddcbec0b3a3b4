"""What a search tries: choices and ranges, what is refused, and what a trial is made of."""

import pytest

from peft_fast.errors import SettingsError
from peft_fast.recipes import config as configs
from peft_fast.recipes import space
from peft_fast.recipes.space import Range

BASE = dict(task="sequence-classification", model="m", data="d")


def config(**more):
    return configs.read(BASE | more)


class Fixed:
    """A trial that draws the first choice, or the low end."""

    def suggest_categorical(self, name, choices):
        return choices[0]

    def suggest_int(self, name, low, high, log=False, step=1):
        return low

    def suggest_float(self, name, low, high, log=False, step=None):
        return low


def test_lists_are_choices_and_mappings_ranges():
    given = {
        "r": [4, 8],
        "learning_rate": {"low": "1e-5", "high": 1e-3, "log": True},
        "batch_size": dict(low=2, high=8),
    }
    found = space.read(config(search=given))
    assert found == {"r": [4, 8], "learning_rate": Range(1e-5, 1e-3, True), "batch_size": Range(2, 8)}
    assert found["batch_size"].whole and not found["learning_rate"].whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"r": []}, "r: .*no value"),
        ({"r": [4, 4]}, "a value twice"),
        ({"r": 4}, "values to choose from"),
        ({"r": [0]}, r"r: 0: .*greater than or equal to 1"),
        ({"r": {"low": 4}}, "values to choose from"),
        ({"r": {"low": 8, "high": 4}}, "low is below high"),
        ({"learning_rate": {"low": 0.0, "high": 1.0, "log": True}}, "log starts above 0"),
        ({"learning_rate": {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}, "log has no step"),
        ({"learning_rate": {"low": "a", "high": 1.0}}, "are numbers"),
        ({"schedule": ["cosine", "sine"]}, "schedule: 'sine'"),
        ({"data": ["a", "b"]}, "is the same in all trials"),
        ({"seed": [0, 1]}, "seed: is the same in all trials"),
        ({"long_rows": ["skip", "truncate"]}, "long_rows: is the same in all trials"),
        ({"unfreeze_layers": [1, 2]}, "means nothing for lora, only for gradual"),
        ({"alpha": [8, 16], "alpha_ratio": [1, 2]}, "both say the same"),
    ],
)
def test_what_no_trial_can_be_made_of_is_said_before_any(given, said):
    with pytest.raises(SettingsError, match=f"(?s){said}"):
        space.read(config(search=given))


def test_rows_that_are_too_long_are_the_same_in_all_trials():
    assert space.read(config(search={"max_length": [16, 32]}))
    with pytest.raises(SettingsError, match="decides which rows"):
        space.read(config(search={"max_length": [16, 32]}, long_rows="skip"))


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(SettingsError) as caught:
        space.read(config(search={"r": [0], "schedule": ["sine"], "out": ["a"]}))
    assert all(word in str(caught.value) for word in ("3 problems", "r: 0", "sine", "out: is the same"))


def test_the_default_tries_what_the_method_has():
    assert set(space.default(config())) == {
        *("method", "r", "alpha_ratio", "learning_rate_ratio", "lora_dropout", "target_modules", "weight_decay")
    }
    assert "r" not in space.default(config(method="head")) and "layer_decay" in space.default(config(method="gradual"))
    for method in configs.METHODS:
        assert space.read(config(method=method))


def test_rank_is_drawn_for_methods_that_have_one():
    tried = {"r": [4, 8], "alpha_ratio": [2.0], "method": ["full", "lora"], "weight_decay": [0.0]}
    drawn = space.draw(Fixed(), config(), tried)
    assert drawn == {"method": "full", "weight_decay": 0.0}
    drawn = space.draw(Fixed(), config(), tried | {"method": ["dora"]})
    assert drawn == {"method": "dora", "r": 4, "alpha_ratio": 2.0, "weight_decay": 0.0}


def test_ratios_become_options():
    made = space.options(config(r=8), {"method": "lora", "r": 32, "alpha_ratio": 0.5, "learning_rate_ratio": 3.0})
    assert (made.r, made.alpha, made.learning_rate) == (32, 16, 1.5e-3)
    made = space.options(config(r=8), {"method": "full", "learning_rate_ratio": 3.0})
    assert (made.method, made.learning_rate) == ("full", 6e-5) and "r" not in made.model_fields_set


def test_a_learning_rate_belongs_to_the_method_it_was_given_with():
    given = config(method="lora", learning_rate=1e-2)
    assert space.options(given, {"method": "dora", "learning_rate_ratio": 2.0}).learning_rate == 2e-2
    assert space.options(given, {"method": "full", "learning_rate_ratio": 2.0}).learning_rate == 4e-5
    assert space.options(given, {"method": "full"}).learning_rate is None
    assert space.options(given, {"method": "full", "learning_rate": 1e-4}).learning_rate == 1e-4
