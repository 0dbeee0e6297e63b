"""
Control: GPT-2 (124M) with a LoRA on the trunk and no path, on GSM8K, same tokens as config/l2d_gsm8k.py.

    python prepare_data.py gsm8k && python train.py config/lora_gsm8k.py

Rank 256 trains 37.7M parameters; --lora_rank=32 is the usual 4.7M. Not yet run with real weights.
"""
out_dir = "out/lora_gsm8k"

trunk_mode = "lora"
path_mode = "none"
lora_rank = 256
lora_alpha = 256.0

max_iters = 3000
learning_rate = 3e-4
