"""
Control of the demo: full finetuning of the trunk and no path, on the same tokens as config/demo_l2d.py.

    python train.py config/demo_finetune.py
"""
data_dir = "data/arithmetic"
out_dir = "out/demo_finetune"

trunk = "out/demo_trunk/best.pt"
trunk_mode = "full"
path_mode = "none"
block_size = 128

batch_size = 16
max_iters = 4000
learning_rate = 5e-4
min_lr = 1e-4
warmup_iters = 100
eval_interval = 1000
log_interval = 200
