"""Student and teacher of one vocabulary whose heads are padded to different widths: tokens count, sizes do not."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from limbeck.config.load import load_recipe
from limbeck.config.parts.objectives import ForwardKLOptions, TopKKLOptions
from limbeck.engine.metrics import loss_trace
from limbeck.errors import ModelError
from limbeck.models.head import head_of
from limbeck.models.loading import build_model, load_model, load_tokenizer
from limbeck.models.vocabulary import shared_ids
from limbeck.needs import HeadHidden, TopK
from limbeck.objectives.kl import ForwardKL
from limbeck.objectives.topk_kl import TopKKL
from limbeck.stages.run import run_recipe
from limbeck.types import Batch, Output, Signal, TopKSignal

MODEL = {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": True}  # fmt: skip
RECIPE = """
name: padded
stages:
  teacher:
    data: {{source: {{kind: text, path: corpus, suffixes: [.py]}}, tokenizer: {{vocabulary: 400}}, sequence: 64, held_out: 0.1}}
    student: {{config: {{vocab_size: {teacher}, {rest}}}}}
    optim: {{groups: [{{lr: 3e-3}}]}}
    loop: {{steps: 3, batch_tokens: 512}}
  distil:
    data: {{from: teacher}}
    student: {{config: {{vocab_size: {student}, {rest}}}}}
    teacher: {{kind: local, model: {{from: teacher}}}}
    objectives: [{{kind: {kind}}}]
    optim: {{groups: [{{lr: 3e-3}}]}}
    loop: {{steps: 6, batch_tokens: 512}}
  evaluate: {{kind: evaluate, from: distil, rows: 4, recall: null, speed: null, samples: null}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("padded")
    (home / "corpus").mkdir()
    for source in sorted(Path(textwrap.__file__).parent.glob("[a-c]*.py"))[:20]:
        (home / "corpus" / source.name).write_bytes(source.read_bytes())
    return home


@pytest.mark.parametrize("kind", ["kl", "topk_kl"])
@pytest.mark.parametrize(("student", "teacher"), [(416, 400), (400, 416)])
def test_heads_of_different_widths_are_distilled(home: Path, kind: str, student: int, teacher: int) -> None:
    rest = ", ".join(f"{name}: {str(value).lower()}" for name, value in MODEL.items())
    name = f"{kind}-{student}-{teacher}"
    (home / f"{name}.yaml").write_text(RECIPE.format(student=student, teacher=teacher, kind=kind, rest=rest))
    run = run_recipe(load_recipe(home / f"{name}.yaml"), recipe_dir=home, run_dir=home / name, say=lambda line: None)
    trace = loss_trace(run / "distil" / "metrics.jsonl")
    assert trace[-1] < trace[0]
    tokenizer = load_tokenizer(str(run / "teacher" / "model"))
    models = [load_model(str(run / stage / "model")) for stage in ("distil", "teacher")]
    assert shared_ids(tokenizer, *models) == 400


def test_padding_rows_of_the_wider_head_get_no_probability_and_no_gradient() -> None:
    torch.manual_seed(0)
    wide, narrow = (build_model({**MODEL, "vocab_size": size}, seed=1, dtype=torch.float64) for size in (48, 40))
    hidden_BTD = torch.randn(1, 6, 16, dtype=torch.float64)
    ids_BT = torch.arange(6)[None]
    batch = Batch(ids_BT, ids_BT + 1, ids_BT, torch.zeros_like(ids_BT))
    teacher = Output(torch.randn(1, 6, 16, dtype=torch.float64), head_of(narrow))
    logits_nV = teacher.hidden_BTD[0] @ teacher.head.weight_VD.T
    kept_nK, ids_nK = logits_nV.topk(8)
    sparse = TopKSignal(torch.arange(6), ids_nK, kept_nK.detach(), logits_nV.logsumexp(1, keepdim=True).detach(), (1.0,))
    signal = Signal({HeadHidden: teacher, TopK: sparse})
    for objective in (ForwardKL(ForwardKLOptions()), TopKKL(TopKKLOptions(k=8))):
        losses, gradients = [], []
        for head, rows in ((head_of(wide, 40), 48), (head_of(narrow), 40)):
            weight_VD = head.weight_VD
            if rows == 48:
                with torch.no_grad():
                    weight_VD[:40].copy_(head_of(narrow).weight_VD)
            weight_VD.grad = None
            term = objective(Output(hidden_BTD, head), signal, batch)
            term.sum.backward()
            losses.append(term.sum.detach())
            gradients.append(weight_VD.grad.clone())
        assert torch.allclose(losses[0], losses[1], rtol=1e-12)
        assert torch.allclose(gradients[0][:40], gradients[1], rtol=1e-10, atol=1e-14)
        assert not gradients[0][40:].any()


class Words:
    """A tokenizer as far as its vocabulary goes."""

    def __init__(self, number: int):
        self.number = number

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(self.number)}

    def convert_ids_to_tokens(self, index: int) -> str:
        return f"w{index}"


def test_a_head_too_narrow_for_the_tokenizer_is_refused_with_the_token() -> None:
    wide, narrow = (build_model({**MODEL, "vocab_size": size}) for size in (48, 40))
    assert shared_ids(Words(40), wide, narrow) == 40
    with pytest.raises(ModelError, match=r"the teacher has 40 output rows.*2 tokens beyond them .first: id 40, 'w40'"):
        shared_ids(Words(42), wide, narrow)
