"""
The demo's L2D: a diffusion path beside the frozen trunk of config/demo_trunk.py, on word problems.

    python train.py config/demo_l2d.py

Two CPU cores, about 5 minutes.
"""
data_dir = "data/arithmetic"
out_dir = "out/demo_l2d"

trunk = "out/demo_trunk/best.pt"
trunk_mode = "frozen"
path_mode = "full"
block_size = 128
x_dim = 64
t_dim = 64

batch_size = 16
max_iters = 4000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
eval_interval = 1000
log_interval = 200
