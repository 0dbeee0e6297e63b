"""
Control of config/chains_l2d.py: full finetuning of the trunk and no path, on the same tokens.

    python train.py config/chains_finetune.py
"""
data_dir = "data/chains"
out_dir = "out/chains_finetune"

trunk = "out/chains_trunk/best.pt"
trunk_mode = "full"
path_mode = "none"
block_size = 64

batch_size = 32
steps = 1000
learning_rate = 5e-4
min_lr = 1e-4
warmup = 100
eval_every = 500
log_every = 100
