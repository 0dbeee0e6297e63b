"""
L2D on GPT-2 (124M, frozen) with a full diffusion path (86.7M trained), on GSM8K: the defaults of train.py.

    python prepare_data.py gsm8k && python train.py config/l2d_gsm8k.py
    torchrun --nproc_per_node=8 train.py config/l2d_gsm8k.py

Meant for one to eight GPUs; 3,000 iterations of 32 examples are 13.8 epochs. Not yet run with real weights.
"""
data_dir = "data/gsm8k"
out_dir = "out/l2d_gsm8k"

trunk = "gpt2"
trunk_mode = "frozen"
path_mode = "full"

batch_size = 32
max_iters = 3000
learning_rate = 1e-4        # the paper's, as are warm-up, decay and weight decay
min_lr = 1e-6
warmup_iters = 100
