"""The side-by-side run of stock PEFT and peft_fast: one fine-tuning, two processes, in turns."""
