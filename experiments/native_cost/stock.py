"""What stock transformers makes of an exported folder; run by a Python that is not shown Limbeck.

    python -I stock.py FOLDER INPUTS OUTPUTS
"""

import sys
from typing import Any


class Refuse:
    """Any import of Limbeck ends here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "limbeck":
            raise ImportError("Limbeck is not to be imported here")


sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

folder, inputs, outputs = sys.argv[1:]
ids = load_file(inputs)["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert type(model).__name__ == "Qwen3_5ForCausalLM", type(model)
with torch.no_grad():
    logits = model(input_ids=ids).logits
    greedy = model.generate(ids[:, :64], max_new_tokens=50, do_sample=False)
assert not any(name.split(".")[0] == "limbeck" for name in sys.modules)
save_file({"logits": logits.contiguous(), "greedy": greedy.contiguous()}, outputs)
