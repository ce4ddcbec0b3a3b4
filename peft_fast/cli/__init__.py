"""The command line: app.py knows the commands, each lives in a module of its own name."""
