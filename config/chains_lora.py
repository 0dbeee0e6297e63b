"""
Control of config/chains_l2d.py: a LoRA on the trunk and no path, as many trained parameters and the same tokens.

    python train.py config/chains_lora.py
"""
data_dir = "data/chains"
out_dir = "out/chains_lora"

trunk = "out/chains_trunk/best.pt"
trunk_mode = "lora"
path_mode = "none"
block_size = 64
lora_rank = 112
lora_alpha = 112.0

batch_size = 32
steps = 1000
learning_rate = 1e-3
min_lr = 1e-4
warmup = 100
eval_every = 500
log_every = 100
