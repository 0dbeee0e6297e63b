"""
The trunk of the guidance experiment: a GPT of 3 layers x 128, on a mixture whose answers have two styles.

    python prepare_data.py styles && python train.py config/styles_trunk.py

Two CPU cores, about 3 minutes.
"""
data_dir = "data/styles"
train_split = "mix"
val_split = "mix_val"
out_dir = "out/styles_trunk"

trunk = "scratch"
trunk_mode = "full"
path_mode = "none"
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128

batch_size = 16
steps = 5000
learning_rate = 2e-3
min_lr = 1e-4
warmup = 100
eval_every = 1000
log_every = 200
