"""
JSON that a person can read and git can compare: one run, or one row of a table, a line.
"""
import json
import os

from plumbing.files import write_file


def format_json(value, levels, indent=""):
    """JSON text of value. Down to `levels` of nesting, each entry of a dict or list has a line of its own.

    Deeper ones stand on one line, and so do those that hold neither dicts nor lists.
    """
    containers = (dict, list, tuple)
    entries = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, containers) and any(isinstance(x, containers) for x in entries)
    if levels == 0 or not nested:
        return json.dumps(value)
    inner = indent + " "
    lines = [format_json(x, levels - 1, inner) for x in entries]
    if isinstance(value, dict):
        lines = [f"{json.dumps(str(key))}: {line}" for key, line in zip(value, lines)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + "\n" + ",\n".join(inner + line for line in lines) + "\n" + indent + closing


def write_json(path, value, levels):
    """Write value to path, as format_json has it. Raises UserError where that cannot be done."""
    text = format_json(value, levels) + "\n"
    write_file(os.path.expanduser(path), lambda file: file.write(text.encode()))
