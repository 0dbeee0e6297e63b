"""
CUDA graphs: the kernels of a function are recorded once, and then started together.

On a GPU a small model waits for its host, which takes 5 to 20 microseconds to start a kernel. A graph starts
hundreds of them at once. It does exactly what was recorded, on the same addresses. So a function that is to
be recorded
    takes tensors and returns a tuple of tensors, whose shapes follow from those that it takes;
    reads, besides these, only tensors that stay at their addresses: weights, tables, and the cache. It may
    write into the cache;
    reads no number back to the host, and copies none from it (torch.arange and the like are allowed);
    may run twice with the same inputs, since a first run warms up.
tests/test_graphs.py has a class in place of Graphs that checks all of this on a CPU.
"""
import sys

import torch

from configurator import first_line


class Graphs:
    """Calls functions of tensors. On a GPU it records each for every key and shape once, then replays it.

    All graphs share their memory. So what a call returns is valid only until the next call, which may still
    take it as inputs.
    """
    def __init__(self, device):
        self.enabled = device.type == "cuda"                      # on a CPU functions are just called
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self.graphs = {}

    def __call__(self, key, function, *inputs):
        """Return function(*inputs). key: the same for the same function, constants and numbers within."""
        if not self.enabled:
            return function(*inputs)
        key = key, *((x.shape, x.dtype) for x in inputs)
        if key not in self.graphs:
            try:
                self.graphs[key] = self.record(function, inputs)
            except torch.cuda.OutOfMemoryError:                   # for the caller: fewer rows may do
                raise
            except RuntimeError as e:
                print(f"note: a CUDA graph cannot be recorded here ({first_line(e)}): going on without",
                      file=sys.stderr)
                self.enabled = False
                return function(*inputs)
        graph, buffers, outputs = self.graphs[key]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x)
        graph.replay()
        return outputs

    def record(self, function, inputs):
        """Return the graph of function, the buffers that it reads, and the outputs that it writes."""
        buffers = [x.clone() for x in inputs]
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()                                # as torch's documentation asks for
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function(*buffers)                                    # warms up: libraries, and tables on demand
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = function(*buffers)
        return graph, buffers, outputs
