"""Models of Llama's type as the hub has them: weights against transformers, tokenizers against the library tokenizers."""
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import argv, error_of, losses, says, start_ranks, tokens
from test_llama import ours, transformers_model

import prepare_data
import sample
import train
from llama import Llama, LlamaConfig
from plumbing.checkpoint import load_checkpoint
from plumbing.dataset import load_manifest, load_split
from plumbing.download import authorization
from plumbing.hub_tokenizer import (
    DIGITS_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    count_positions,
    load_hub_tokenizer,
)
from plumbing.hub_weights import HUB, is_hub_trunk, load_llama, read_config
from plumbing.tokenizer import describe_tokenizer, encode_prompt, encode_text, load_tokenizer

TEXT = """Natalia sold 1,234.50 clips to 48 of her friends in April, and then she sold half as many in May.
She's got 12 apples;  they're    $3 each.\n\nHow much?\tIt's 48/2 = <<48/2=24>>24.\r\n  \n Ünïcödé: cafe\u0301 \u00e9 — 東京 ١٢٣ 😀 I'LL   """


@pytest.fixture(scope="module")
def texts():
    lines = [line for path in sorted(Path(__file__).parent.glob("test_d*.py")) for line in path.read_text().split("\n")]
    lines = [line for line in lines if "<|" not in line]
    return [TEXT, *TEXT.split(","), *lines[:400], "  ", "\n\n 7", "a 12", "x  1 2", "", " don't DON'T", "\u0065\u0301"]


# ----------------------------------------------------------------------------------------------- tokenizers
def library_tokenizer(kind, corpus):
    """A small byte-level BPE of the library tokenizers, with the pre-tokenizer of a known model."""
    tokenizers = pytest.importorskip("tokenizers")
    pre, regex = tokenizers.pre_tokenizers, tokenizers.Regex
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama"))
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = {
        "gpt2": lambda: pre.ByteLevel(add_prefix_space=False),
        "smollm": lambda: pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
        "llama": lambda: pre.Sequence([pre.Split(regex(LLAMA3_PATTERN), "isolated"), plain]),
        "qwen": lambda: pre.Sequence([pre.Split(regex(QWEN2_PATTERN), "isolated"), plain])}[kind]()
    if kind == "qwen":
        tok.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(corpus, trainer)
    if kind == "llama":
        tok.post_processor = tokenizers.processors.Sequence([
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])])
    return tok


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama", "qwen"])
def test_a_tokenizer_json_encodes_as_the_library_does(tmp_path, texts, kind):
    tok = library_tokenizer(kind, texts)
    tok.save(str(tmp_path / "tokenizer.json"))
    eos = [0, 2] if kind == "llama" else 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": eos}))
    encoding = load_hub_tokenizer(str(tmp_path))
    assert encoding.n_vocab == 400 and encoding.eot_token == (2 if kind == "llama" else 0)
    for text in texts:
        expected = tok.encode(text, add_special_tokens=False).ids
        assert encode_text(encoding, text, "here") == expected, text
        assert encode_prompt(encoding, text, "here") == [1] * (kind == "llama") + expected
    again = load_tokenizer(json.loads(json.dumps(describe_tokenizer(encoding))))      # as data and checkpoints have it
    assert encode_prompt(again, TEXT, "here") == encode_prompt(encoding, TEXT, "here")
    assert again.eot_token == encoding.eot_token and describe_tokenizer(again) == describe_tokenizer(encoding)
    assert again.decode(encode_text(again, "She's 12", "here")) == "She's 12"
    says(error_of(encode_text, encoding, "a <|im_end|> b", "line 7"), "line 7", "<|im_end|>")


def damaged(found, what):
    if what == "order":
        found["model"]["merges"].reverse()
    elif what == "bytes":
        found["model"]["byte_fallback"] = True
    elif what == "kind":
        found["model"]["type"] = "Unigram"
    elif what == "normalizer":
        found["normalizer"] = {"type": "Lowercase"}
    elif what == "pre_tokenizer":
        found["pre_tokenizer"] = {"type": "Whitespace"}
    elif what == "whole words":
        found["model"]["merges"].pop()
    elif what == "pattern":
        found["pre_tokenizer"]["pretokenizers"][0] = {"type": "Split", "pattern": {"Regex": "(unclosed"}, "behavior": "Isolated"}
        found["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False
    elif what == "prefix":
        found["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    else:
        del found[what]


@pytest.mark.parametrize("what, part", [
    ("order", "merges in another order"), ("bytes", "byte_fallback"), ("kind", "Unigram"), ("normalizer", "Lowercase"),
    ("pre_tokenizer", "Whitespace"), ("whole words", "no merge makes"), ("pattern", "tiktoken cannot"), ("prefix", "pre_tokenizer"), ("model", "KeyError"), ("added_tokens", "KeyError")])
def test_another_kind_of_tokenizer_is_refused_by_name(tmp_path, texts, what, part):
    library_tokenizer("smollm", texts).save(str(tmp_path / "tokenizer.json"))
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    damaged(found, what)
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    says(error_of(load_hub_tokenizer, str(tmp_path)), str(tmp_path), part)


def test_an_end_of_text_that_is_none_is_refused(tmp_path, texts):
    library_tokenizer("smollm", texts).save(str(tmp_path / "tokenizer.json"))
    for eos in (None, 77, [], "0"):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
        says(error_of(load_hub_tokenizer, str(tmp_path)), "eos_token_id")


def test_a_character_without_a_token_is_refused(tmp_path, texts):
    """SmolLM2 lacks 21 bytes."""
    encoding = load_hub_tokenizer(str(tiny_folder(tmp_path, texts)))
    ranks = {piece: token for piece, token in encoding._mergeable_ranks.items() if b"\x06" not in piece}
    lacks = type(encoding)("x", "<|endoftext|>", pat_str=DIGITS_PATTERN, mergeable_ranks=ranks,
                           special_tokens=encoding._special_tokens)
    says(error_of(encode_text, lacks, "a \x06", "line 7"), "line 7", "no token")


# -------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("kind", ["grouped", "ungrouped untied", "scaled", "qwen", "qwen untied"])
@pytest.mark.parametrize("shards", [False, True])
@torch.no_grad()
def test_a_folder_of_the_hub_loads(tmp_path, kind, shards):
    hf = transformers_model(kind)
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    assert is_hub_trunk(str(tmp_path))
    idx = tokens(2, 20, vocab=29)
    trunk = load_llama(str(tmp_path), 29)
    assert trunk.config == ours(hf).config
    torch.testing.assert_close(trunk.head(trunk(idx)[0]), hf(idx).logits, atol=1e-5, rtol=1e-5)
    short = load_llama(str(tmp_path), 27)                         # the last two are padding
    torch.testing.assert_close(short.head(short(idx % 27)[0]), hf(idx % 27).logits[..., :27], atol=1e-5, rtol=1e-5)
    says(error_of(load_llama, str(tmp_path), 30), "29 tokens", "30")


@torch.no_grad()
def test_old_files_of_half_precision_load(tmp_path):
    """Older configs have rope_theta and rope_scaling by themselves; old files hold inv_freq; the tied head is there twice."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    hf = transformers_model("scaled")
    state = {k: v.bfloat16() for k, v in hf.state_dict().items()}
    hf.load_state_dict(state)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    config = hf.config.to_dict()
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
    trunk = load_llama(str(tmp_path / "model.safetensors"), 29)
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}
    idx = tokens(2, 50, vocab=29)
    torch.testing.assert_close(trunk.head(trunk(idx)[0]), hf(idx).logits, atol=1e-5, rtol=1e-5)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    says(error_of(load_llama, str(tmp_path), 29), "lm_head.weight differs")
    del state["model.norm.weight"]
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    says(error_of(load_llama, str(tmp_path), 29), "missing ln_f.weight")
    state["model.layers.1.self_attn.q_norm.weight"] = torch.ones(6)
    save_file(state, tmp_path / "model.safetensors")
    says(error_of(load_llama, str(tmp_path), 29), "q_norm")


@pytest.mark.parametrize("change, part", [
    ({"model_type": "mistral"}, "model_type='mistral'"), ({"model_type": "qwen3"}, "qwen3"), ({"model_type": None}, "None"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_parameters": None}, "yarn"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ({"mlp_bias": True}, "mlp_bias"), ({"attention_bias": True}, "attention_bias"), ({"num_local_experts": 8}, "num_local_experts"),
    ({"hidden_act": "gelu"}, "gelu"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "wide"}, "config of a model"), ({"rms_norm_eps": None}, "config of a model"),
    ({"num_key_value_heads": 4}, "n_kv_head=4")])
def test_a_config_that_computes_something_else_is_refused_by_name(change, part):
    config = dict(model_type="llama", hidden_size=36, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40,
                  num_hidden_layers=2, vocab_size=29, max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu")
    assert read_config(config, "config.json").n_kv_head == 2
    says(error_of(read_config, config | change, "config.json"), part)


def test_the_hubs_token_goes_to_the_hub_alone(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert authorization("https://huggingface.co/x/y") == {"Authorization": "Bearer secret"}
    for url in ("https://cdn.huggingface.co/x", "http://huggingface.co/x", "https://huggingface.co.evil.org/x"):
        assert authorization(url) == {}
    monkeypatch.delenv("HF_TOKEN")
    assert authorization("https://huggingface.co/x/y") == {}
    assert all("/" in place for place in HUB.values()) and is_hub_trunk("SmolLM2-135M") and not is_hub_trunk("gpt2")


class HubHandler(BaseHTTPRequestHandler):
    """A loopback hub, which names the hash of weights alone."""
    def do_GET(self):
        self.server.paths.append(f"{self.command} {self.path}")
        data = (self.server.folder / self.path.rpartition("/")[2]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        if self.path.endswith(".safetensors"):
            self.send_header("X-Linked-Etag", f'"{self.server.sha256 or hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_name_is_downloaded_from_the_hub_and_kept(tmp_path, texts, monkeypatch):
    (tmp_path / "there").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.folder, server.paths, server.sha256 = tiny_folder(tmp_path / "there", texts), [], None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("plumbing.download.LARGEST", 1 << 16)     # weights are larger, but their hash is known
    monkeypatch.chdir(tmp_path)
    assert load_hub_tokenizer("Qwen2.5-0.5B").n_vocab == 400 and count_positions("Qwen2.5-0.5B") == 150
    assert not any("safetensors" in path for path in server.paths)
    trunk = load_llama("Qwen2.5-0.5B", 400)
    there = load_llama(str(server.folder), 400)
    assert all(torch.equal(a, b) for a, b in zip(trunk.parameters(), there.parameters()))
    assert "GET /Qwen/Qwen2.5-0.5B/resolve/main/model.safetensors" in server.paths
    n = len(server.paths)
    load_llama("Qwen2.5-0.5B", 400)
    assert len(server.paths) == n
    server.sha256 = "0" * 64
    says(error_of(load_llama, "SmolLM2-135M", 400), "SmolLM2-135M/resolve/main/model.safetensors")
    assert not (tmp_path / "data/weights/SmolLM2-135M/model.safetensors").exists()
    server.shutdown()
    server.server_close()


# -------------------------------------------------------------------------------------- from end to end
def tiny_folder(folder, texts):
    """A folder as the hub has it, with a tiny Llama and a tokenizer."""
    library_tokenizer("smollm", texts).save(str(folder / "tokenizer.json"))
    hf = transformers_model("grouped", vocab_size=410, max_position_embeddings=150)
    hf.config.eos_token_id = 0
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory, texts):
    """(the folder of the trunk, data_dir, out_dir) of a short run on a tiny Llama."""
    base = tmp_path_factory.mktemp("llama")
    (base / "trunk").mkdir()
    folder = tiny_folder(base / "trunk", texts)
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}.\n#### {a + b}"} for a in range(9) for b in range(9)]
    (base / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data.main(["jsonl", f"--source={base}/train.jsonl", "--val=10", f"--tokenizer={folder}", f"--out_dir={base}/data"])
    train.main(argv(data_dir=base / "data", trunk=folder, out_dir=base / "out", max_iters=12))
    return folder, base / "data", base / "out"


def test_data_training_and_sampling_with_a_folder(llama_run, capsys):
    folder, data, out = llama_run
    manifest = load_manifest(data)
    assert manifest["n_vocab"] == 400 and manifest["eot"] == 0 and manifest["tokenizer"]["name"] == str(folder)
    assert losses(out)[-1] < losses(out)[0]
    checkpoint = load_checkpoint(out / "best.pt")
    assert checkpoint["trunk_config"]["family"] == "llama" and checkpoint["trunk_config"]["vocab_size"] == 400
    sample.main([f"--out_dir={out}", "--prompt=What is 3 plus 4?", "--steps=4", "--max_new_tokens=12", "--trace"])
    assert "Question: What is 3 plus 4?" in capsys.readouterr().out


def test_chats_in_data_training_and_sampling(llama_run, texts, tmp_path, capsys):
    """A tokenizer with SmolLM2's special tokens, whose text ends with a turn of the chat."""
    shutil.copytree(llama_run[0], tmp_path / "trunk")
    tok = library_tokenizer("smollm", texts)
    tok.add_special_tokens(["<reponame>"])
    tok.save(str(tmp_path / "trunk" / "tokenizer.json"))
    (tmp_path / "train.jsonl").write_text('{"question": "What is 1 plus 2?", "answer": "#### 3"}\n' * 4)
    prepare = ["jsonl", f"--source={tmp_path}/train.jsonl", "--val=2", f"--tokenizer={tmp_path}/trunk", f"--out_dir={tmp_path}/data"]
    says(error_of(prepare_data.main, [*prepare, "--chat"]), "base model", "Instruct")
    config = json.loads((tmp_path / "trunk" / "config.json").read_text())
    (tmp_path / "trunk" / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    prepare_data.main([*prepare, "--chat"])
    example = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
               "<|im_start|>user\nQuestion: What is 1 plus 2?\nAnswer:<|im_end|>\n<|im_start|>assistant\n#### 3<|im_end|>")
    assert example.replace("\n", "\n    ") in capsys.readouterr().out
    data, manifest = load_split(tmp_path / "data", "train"), load_manifest(tmp_path / "data")
    tokens = data.tokens[:data.offsets[1]].tolist()
    chat = load_tokenizer(manifest["tokenizer"])
    assert chat.decode(tokens) == example and manifest["chat"] and tokens[0] == 1 and tokens[-1] == 2
    assert chat.decode([token for token, is_target in zip(tokens, data.mask) if is_target]) == "#### 3<|im_end|>"
    train.main(argv(data_dir=tmp_path / "data", trunk=tmp_path / "trunk", out_dir=tmp_path / "out", max_iters=2, warmup_iters=1,
                    batch_size=2, block_size=150))
    sample.main([f"--out_dir={tmp_path}/out", "--prompt=What is 1 plus 2?", "--steps=2", "--max_new_tokens=3"])
    assert example[:example.index("####")] in capsys.readouterr().out
    says(error_of(prepare_data.main, ["arithmetic", "--chat", f"--out_dir={tmp_path}/x"]), "--chat", "arithmetic")


def test_a_trunk_of_another_tokenizer_is_refused(llama_run, arithmetic, tmp_path, texts):
    folder, data, _ = llama_run
    says(error_of(train.main, argv(data_dir=arithmetic, trunk=folder, out_dir=tmp_path / "out")),
         "tokenizer arithmetic", f"--tokenizer={folder}")
    says(error_of(prepare_data.main, ["arithmetic", "--tokenizer=klingon", f"--out_dir={tmp_path}/x"]), "klingon", "SmolLM2")


@pytest.mark.parametrize("path_mode, trunk_mode", [("full", "frozen"), ("lora", "frozen"), ("lora", "lora"), ("none", "full")])
def test_a_run_can_be_resumed_and_its_trunk_be_used_again(llama_run, tmp_path, path_mode, trunk_mode):
    folder, data, _ = llama_run
    options = dict(data_dir=data, path_mode=path_mode, trunk_mode=trunk_mode, eval_interval=3)
    train.main(argv(**options, trunk=folder, out_dir=tmp_path / "whole", max_iters=6))
    train.main(argv(**options, trunk=folder, out_dir=tmp_path / "parts", max_iters=6))
    shutil.copy(tmp_path / "parts" / "previous.pt", tmp_path / "parts" / "last.pt")
    train.main(argv(**options, trunk=folder, out_dir=tmp_path / "parts", max_iters=6, resume=True))
    assert losses(tmp_path / "parts")[-3:] == losses(tmp_path / "whole")[-3:]
    train.main(argv(data_dir=data, trunk=tmp_path / "whole" / "best.pt", out_dir=tmp_path / "next", max_iters=3))


def test_two_ranks_are_one_process_with_two_micro_batches(llama_run, tmp_path):
    folder, data, _ = llama_run
    options = dict(data_dir=data, trunk=folder, max_iters=4)
    ranks = start_ranks(tmp_path, 2, argv(**options, out_dir=tmp_path / "ranks"))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].err()
    train.main(argv(**options, out_dir=tmp_path / "one", gradient_accumulation_steps=2))
    torch.testing.assert_close(losses(tmp_path / "ranks"), losses(tmp_path / "one"), atol=1e-5, rtol=1e-5)


def test_a_trunk_in_bfloat16(llama_run, tmp_path):
    folder, data, out = llama_run
    options = dict(data_dir=data, trunk=folder, trunk_dtype="bfloat16", max_iters=12)
    for mode in ("full", "lora"):
        train.main(argv(**options, dtype="bfloat16", path_mode=mode, out_dir=tmp_path / mode))
        assert losses(tmp_path / mode)[-1] < losses(tmp_path / mode)[0]
        weights = torch.load(tmp_path / mode / "trunk.pt", weights_only=True)
        assert {p.dtype for p in weights.values()} == {torch.bfloat16}
        checkpoint = load_checkpoint(tmp_path / mode / "best.pt")
        own = {p.dtype for name, p in checkpoint["model"].items() if name.startswith("path.")}
        assert own == {torch.float32}                             # what trains stays as it was
        sample.main([f"--out_dir={tmp_path / mode}", "--steps=3", "--max_new_tokens=4"])
    assert abs(losses(tmp_path / "full")[0] - losses(out)[0]) < 0.05
    says(error_of(train.main, argv(**options, dtype="float32", out_dir=tmp_path / "x")), "trunk_dtype=bfloat16 needs")
    says(error_of(train.main, argv(**options, trunk_mode="lora", out_dir=tmp_path / "x")), "half precision")


def test_sizes_of_the_hubs_models():
    """Parameters as their cards and configs say."""
    smol = LlamaConfig(8192, 49152, 30, 9, 3, 576, 64, 1536)
    llama = LlamaConfig(131072, 128256, 16, 32, 8, 2048, 64, 8192)
    qwen = LlamaConfig(32768, 151936, 24, 14, 2, 896, 64, 4864, qkv_bias=True)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Llama(config).parameters()) for config in (smol, llama, qwen)]
    assert counts == [134_515_008, 1_235_814_400, 494_032_768]
