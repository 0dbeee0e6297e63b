"""
The demo's trunk: a GPT of 3 layers x 128 (0.7M parameters) from scratch, on a broad mixture of exercises.

    python prepare_data.py arithmetic && python train.py config/demo_trunk.py

Two CPU cores, about 3 minutes.
"""
data_dir = "data/arithmetic"
train_split = "mix"
val_split = "mix_val"
out_dir = "out/demo_trunk"

trunk = "scratch"
trunk_mode = "full"
path_mode = "none"
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128

batch_size = 16             # on a CPU many small steps learn more per minute than few large ones
max_iters = 5000
learning_rate = 2e-3
min_lr = 1e-4
warmup_iters = 100
eval_interval = 1000
log_interval = 200
