"""
L2D where steps earn their cost: chains of up to six links beside a trunk that follows two, trained through Algorithm 1.

    python train.py config/chains_l2d.py
    python evaluate.py --out_dir=out/chains_l2d --steps=1,2,3,4,8,16,32 --guess=mean --t_end=0.9 --shift=3

One CPU core, about 10 minutes.
"""
data_dir = "data/chains"
out_dir = "out/chains_l2d"

trunk = "out/chains_trunk/best.pt"
trunk_mode = "frozen"
path_mode = "full"
block_size = 64
x_dim = 64
t_dim = 64
sigma = 1.0                 # a guess can be read from the first call on
unroll = 31                 # the path learns to use what it guessed: with unroll = 0, x_t from the truth, it does not

batch_size = 32
steps = 1000
learning_rate = 1e-3
min_lr = 1e-4
warmup = 100
eval_every = 500
log_every = 100
