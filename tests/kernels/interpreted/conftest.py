"""These run in processes of their own, which tests/kernels/test_interpreter.py starts with TRITON_INTERPRET=1."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    if "TESTS_PLAIN_INTERPRETER" not in os.environ:
        from tests.kernels import interpreter_bf16

        interpreter_bf16.install()
else:
    collect_ignore_glob = ["test_*.py"]
