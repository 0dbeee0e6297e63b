"""
What a step costs: `python -m bench` counts and measures decoding and training, `python -m bench.memory`
counts the memory of training.
"""
