"""A small GGUF file that llama.cpp loads: the llama architecture, weights at random, a byte-level tokenizer, a chat template."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH, LAYERS, HEADS, INNER, CONTEXT = 64, 2, 4, 128, 2048
LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def write_gguf(path: Path, *, template: str | None = TEMPLATE, context: int = CONTEXT, seed: int = 0, ends: float = -8.0) -> Path:
    """Write the file.

    The model writes random small letters: one feature of the residual stream is constant, so that a column of the head adds to
    the logits of each token.  ``ends`` is what the end of a turn gets there.
    """
    rng = np.random.default_rng(seed)
    letters = byte_letters()
    merges = [("t", "h"), ("th", "e"), ("i", "n")]
    tokens = [*letters, *(a + b for a, b in merges), *SPECIAL]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)) + [gguf.TokenType.CONTROL] * len(SPECIAL))
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)

    def random(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    embedding = random(len(tokens), WIDTH, scale=8)
    embedding[:, 0] = 8
    head = random(len(tokens), WIDTH, scale=2)
    head[:, 0] = -8
    for letter in LETTERS:
        head[tokens.index(letters[ord(letter)]), 0] = 0
    head[tokens.index("the"), 0] = head[tokens.index("in"), 0] = 0
    head[tokens.index("<|im_end|>"), 0] = ends
    tensors = {"token_embd": embedding, "output": head, "output_norm": np.ones(WIDTH, np.float32)}
    for i in range(LAYERS):
        output, down = random(WIDTH, WIDTH), random(WIDTH, INNER)
        output[0] = down[0] = 0
        tensors |= {
            f"blk.{i}.attn_norm": np.ones(WIDTH, np.float32), f"blk.{i}.ffn_norm": np.ones(WIDTH, np.float32),
            f"blk.{i}.attn_q": random(WIDTH, WIDTH), f"blk.{i}.attn_k": random(WIDTH, WIDTH), f"blk.{i}.attn_v": random(WIDTH, WIDTH),
            f"blk.{i}.attn_output": output, f"blk.{i}.ffn_gate": random(INNER, WIDTH), f"blk.{i}.ffn_up": random(INNER, WIDTH),
            f"blk.{i}.ffn_down": down,
        }  # fmt: skip
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
