"""
L2D on SmolLM2-135M (Llama's type, frozen) with a full path, on GSM8K: two epochs.

    python prepare_data.py gsm8k --tokenizer=SmolLM2-135M --out_dir=data/gsm8k_smollm2
    python train.py config/l2d_gsm8k_smollm2.py

A prototype of this run answered 5% of the test problems at T = 2, a LoRA on the trunk 4%, and full finetuning
9.5%.
"""
data_dir = "data/gsm8k_smollm2"
out_dir = "out/l2d_gsm8k_smollm2"

trunk = "SmolLM2-135M"
trunk_mode = "frozen"
path_mode = "full"
block_size = 640            # its tokenizer spells numbers digit by digit

batch_size = 32
max_iters = 440
learning_rate = 6e-4
min_lr = 1e-5
warmup_iters = 50
