"""
L2D with the style as guidance label, beside the trunk of config/styles_trunk.py (experiments/guidance.py).

    python train.py config/styles_l2d.py

Two CPU cores, about 3 minutes. sigma is small, so that x_t can be read early: guidance acts through x_t.
"""
data_dir = "data/styles"
out_dir = "out/styles_l2d"

trunk = "out/styles_trunk/best.pt"
trunk_mode = "frozen"
path_mode = "full"
block_size = 128
x_dim = 64
t_dim = 64
sigma = 2.0

batch_size = 16
steps = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup = 100
eval_every = 1000
log_every = 200
