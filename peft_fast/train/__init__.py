"""Fine-tuning recipes on the Hugging Face Trainer, and the side-by-side run of stock PEFT and peft_fast."""
