"""
Say what made a result: commit, command, versions, machine; and get matplotlib to draw it.
"""
import os
import platform
import subprocess
import sys

import torch

from configurator import UserError


def commit():
    """The commit of this code, -dirty where files have changed since; "" where git cannot tell."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(command, capture_output=True, check=False, text=True).stdout.strip()
    except OSError:                                                      # no git here
        return ""


def provenance(device):
    """What made these numbers: commit, command, versions, machine."""
    cpu = platform.processor() or platform.machine()
    return {"commit": commit(), "command": " ".join(sys.argv), "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu}


def pyplot(option):
    """matplotlib.pyplot, drawing to files. UserError, naming the option that needs it, if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{option} needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
