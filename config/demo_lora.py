"""
Control of the demo: a LoRA on the trunk and no path; as many trained parameters, and the same tokens.

    python train.py config/demo_lora.py
"""
data_dir = "data/arithmetic"
out_dir = "out/demo_lora"

trunk = "out/demo_trunk/best.pt"
trunk_mode = "lora"
path_mode = "none"
block_size = 128
lora_rank = 112
lora_alpha = 112.0

batch_size = 16
max_iters = 4000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
eval_interval = 1000
log_interval = 200
