"""Conversations and tasks that the tests of causal-lm share."""

import json

import datasets

from peft_fast.recipes import config, data
from peft_fast.recipes.tasks import causal_lm

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "what is good?"},
    {"role": "assistant", "content": "the film is good"},
    {"role": "user", "content": "the film is good, or bad?"},
    {"role": "assistant", "content": "bad"},
]
END = "<|im_end|>"


def task_for(model="example:tiny-llama", form="messages", template=None, **options):
    """A task whose tokenizer has ChatML's tokens, and ``template``."""
    made = causal_lm.Task(config.read(task="causal-lm", model=model, data="-", **options), {"form": form})
    made.load_processor()
    if template:
        made.processor.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END]})
        made.processor.chat_template = template
        made.facts["chat_template"] = template
    return made


def rows_of(*rows):
    return datasets.Dataset.from_list([{"row": place, **row} for place, row in enumerate(rows, 1)])


def talks(*conversations):
    return rows_of(*({"messages": json.dumps(one)} for one in conversations))


def splits_of(rows):
    made = data.Splits()
    made.add("train", rows, "train.jsonl")
    return made
