"""
Load the trunk that --trunk names, and see that it fits the data.
"""
from configurator import UserError, require
from plumbing.checkpoint import load_checkpoint, pair_from
from plumbing.gpt2_weights import load_gpt2


def load_trunk(name, manifest):
    """
    Return the trunk of that name, a GPT on the CPU in float32, for data with this manifest.

    name: a checkpoint of train.py (.pt), whose trunk LoRA is merged in; or GPT-2's weights, as load_gpt2 takes
    them. Raises UserError where there is no such trunk, or it has another tokenizer than the data.
    """
    tokenizer = manifest["tokenizer"]
    if name.endswith(".pt"):
        checkpoint = load_checkpoint(name)
        trained = checkpoint["tokenizer"]
        if trained["fingerprint"] != tokenizer["fingerprint"]:
            raise UserError(f"the data has tokenizer {tokenizer['name']}, but the trunk {name} was trained with "
                            f"{trained['name']}; prepare the data with --tokenizer={trained['name']}")
        trunk = pair_from(checkpoint, name).trunk
        if checkpoint["trunk_lora"]:
            trunk.merge_lora()
    else:
        trunk = load_gpt2(name)
    found, wanted = trunk.config.vocab_size, manifest["n_vocab"]
    require(found == wanted, f"the trunk {name} has {found} tokens, but the data's tokenizer, {tokenizer['name']}, "
            f"has {wanted}")
    return trunk
