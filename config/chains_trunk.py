"""
The trunk of the second embedded task: a GPT of 3 layers x 128 from scratch, on chains of one or two links.

    python prepare_data.py chains && python train.py config/chains_trunk.py

One CPU core, about 6 minutes.
"""
data_dir = "data/chains"
train_split = "mix"
val_split = "mix_val"
out_dir = "out/chains_trunk"

trunk = "scratch"
trunk_mode = "full"
path_mode = "none"
n_layer = 3
n_head = 4
n_embd = 128
block_size = 64

batch_size = 64
steps = 2500
learning_rate = 1e-3
min_lr = 1e-4
warmup = 100
eval_every = 500
log_every = 250
