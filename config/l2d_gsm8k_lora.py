"""
L2D on GPT-2 (124M, frozen) with a LoRA path (20M trained, rank 32: the official code's default), on GSM8K.

    python prepare_data.py gsm8k && python train.py config/l2d_gsm8k_lora.py

Meant for one to eight GPUs. Not yet run with real weights.
"""
out_dir = "out/l2d_gsm8k_lora"

trunk_mode = "frozen"
path_mode = "lora"
lora_rank = 32
lora_alpha = 32.0

max_iters = 3000
learning_rate = 3e-4        # a LoRA bears and wants a larger rate
