"""Definitions: each op in a few lines of plain PyTorch, right in any dtype; the truth in tests, the last fallback."""
