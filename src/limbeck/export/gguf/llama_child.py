"""llama.cpp in a process of its own, which a file that it cannot run may end: run as a script, a JSON line in, a JSON line out.

It imports nothing of Limbeck, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

PULL = 1e4
TIMEOUT = 600


def load(path: str, context: int) -> Any:
    """The file, set up to compute as exactly as it can: fp32 cache, one thread, no flash attention."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = path
    options.n_ctx = options.n_batch = options.n_ubatch = max(context, 32)
    options.n_parallel = 1
    options.n_gpu_layers = 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.port = options.cache_ram_mib = 0
    options.warmup = options.fit_params = False
    options.verbosity = 1
    return xllamacpp.Server(options)


def probabilities(server: Any, ids: list[int], vocabulary: int, whole: int) -> list[list[float]]:
    """Ids and log-probabilities of the token after a prompt, for the whole vocabulary, from a clean cache."""
    # llama.cpp holds an answer back while a character is unfinished, and one that ends the text: so the token drawn is one that is
    # whole.  The probabilities are those before that.
    question = {
        "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": vocabulary, "cache_prompt": False, "ignore_eos": True,
        "logit_bias": [[whole, PULL]],
    }  # fmt: skip
    answer = server.handle_completions(question)
    try:
        listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no probabilities for a prompt of {len(ids)} tokens: {str(answer)[:300]}") from None
    return [[entry["id"], entry["logprob"]] for entry in listed]


def tokens(server: Any, text: str, special: bool) -> list[int]:
    """Ids of a text; names of special tokens inside it are text."""
    body = json.dumps({"content": text, "add_special": special, "parse_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", data=body, headers={"Content-Type": "application/json"})
    # A proxy of the environment is no way to this process.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT) as answer:
        return json.load(answer)["tokens"]


def main() -> None:
    """Answer until there is no more question."""
    # llama.cpp writes to standard output too: what is meant for us has a way of its own.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        kind = question.pop("kind")
        try:
            answer: Any = True
            if kind == "load":
                server = load(**question)
            else:
                answer = (probabilities if kind == "probabilities" else tokens)(server, **question)
            reply: dict[str, Any] = {"answer": answer}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
