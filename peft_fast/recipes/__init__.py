"""Fine-tuning recipes on the Hugging Face Trainer: `peft_fast.train(...)`, and what the commands share."""
