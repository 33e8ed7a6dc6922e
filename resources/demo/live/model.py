"""The model folder that Dynamo's mocker wants: a configuration and a tokenizer, no weights. One byte is one token."""

from __future__ import annotations

import json
from pathlib import Path

CONTEXT_TOKENS = 8192
_SPECIAL = ("<s>", "</s>")


def write_model(folder: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json; what is there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", _config()), ("tokenizer", _tokenizer()), ("tokenizer_config", _chat())):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _byte_letters() -> list[str]:
    """A printable letter for every byte, as byte-level BPE has them: itself where it is printable in Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(other)) for byte in range(256)]


def _tokenizer() -> dict[str, object]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {token: place for place, token in enumerate((*_SPECIAL, *_byte_letters()))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": place, "content": token, **flags} for place, token in enumerate(_SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": len(_SPECIAL) + 256,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _chat() -> dict[str, object]:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "model_max_length": CONTEXT_TOKENS,
        "chat_template": template,
    }
