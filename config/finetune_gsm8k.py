"""
Control: full finetuning of GPT-2 (124M) and no path, on GSM8K, same tokens as config/l2d_gsm8k.py.

    python prepare_data.py gsm8k && python train.py config/finetune_gsm8k.py

Not yet run with real weights.
"""
out_dir = "out/finetune_gsm8k"

trunk_mode = "full"
path_mode = "none"

max_iters = 3000
learning_rate = 5e-5
