"""The tests import the scripts of the project root; two of them may run beside a training, so one thread each."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
