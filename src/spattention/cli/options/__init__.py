"""Options of the commands, apart from the commands: `--help` imports nothing else.

Each module has a frozen dataclass `Options`.
"""
