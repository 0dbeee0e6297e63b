"""
L2D on GPT-2 (124M, frozen), on a mix of subjects whose group is the guidance group: math, code, knowledge.

    python prepare_data.py mix && python train.py config/l2d_mix.py
    python sample.py --out_dir=out/l2d_mix --group=math --guidance=1.5 --prompt="What is 7 times 8?"

Meant for one to eight GPUs. Not yet run with real weights.
"""
data_dir = "data/mix"
out_dir = "out/l2d_mix"

trunk = "gpt2"
trunk_mode = "frozen"
path_mode = "full"
block_size = 1024
group_dropout = 0.2

batch_size = 32
max_iters = 3000
learning_rate = 1e-4
min_lr = 1e-6
warmup_iters = 100
