"""
Load the trunk that --trunk names, and see that it fits the data.
"""
from configurator import UserError
from model import GPTConfig
from plumbing.checkpoint import load_checkpoint, pair_from

GPT2_TOKENS = GPTConfig().vocab_size


def load_trunk(name, manifest):
    """
    Return the trunk of that name, on the CPU in float32, for data with this manifest.

    name: a checkpoint of train.py (.pt), whose trunk LoRA is merged; or what load_llama or load_gpt2 takes.
    Raises UserError where there is no such trunk, or where it has another tokenizer than the data.
    """
    wanted = manifest["tokenizer"]
    if name.endswith(".pt"):
        checkpoint = load_checkpoint(name)
        check_tokenizer(name, checkpoint["tokenizer"], wanted)
        trunk = pair_from(checkpoint, name).trunk
        if checkpoint["trunk_lora"]:
            trunk.merge_lora()
        return trunk
    from plumbing.hub_weights import is_hub_trunk, load_llama  # here: a checkpoint needs neither of them

    if is_hub_trunk(name):
        from plumbing.hub_tokenizer import load_hub_tokenizer
        from plumbing.tokenizer import describe_tokenizer
        encoding = load_hub_tokenizer(name)
        if encoding is not None:
            check_tokenizer(name, describe_tokenizer(encoding), wanted)
        return load_llama(name, manifest["n_vocab"])
    from plumbing.gpt2_weights import load_gpt2

    trunk = load_gpt2(name)
    n, n_vocab = trunk.config.vocab_size, manifest["n_vocab"]
    if n == n_vocab:
        return trunk
    remedy = f"choose a trunk with {n_vocab} tokens, or train one: --trunk=scratch --trunk_mode=full"
    if n == GPT2_TOKENS:
        remedy = "prepare the data with --tokenizer=gpt2"
    elif n_vocab == GPT2_TOKENS < n < GPT2_TOKENS + 1024:
        remedy = f"the last {n - n_vocab} are padding, as nanoGPT adds it: save wte.weight without them"
    raise UserError(f"the trunk {name} has {n} tokens, but the data's tokenizer, {wanted['name']}, has "
                    f"{n_vocab}; {remedy}")


def check_tokenizer(name, trained, wanted):
    """Raise UserError where the trunk of that name was trained with another tokenizer than the data has."""
    if trained["fingerprint"] == wanted["fingerprint"]:
        return
    remedy = f"prepare the data with --tokenizer={trained['name']}"
    if trained["name"] == wanted["name"]:
        remedy = "one is of an older version: prepare the data and train the trunk again"
    raise UserError(f"the data has tokenizer {wanted['name']}, but the trunk {name} was trained with "
                    f"{trained['name']}; {remedy}")
