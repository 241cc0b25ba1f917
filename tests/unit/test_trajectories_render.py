"""Conversations as the text of a chat template and as tokens: which words are the assistant's, to the byte."""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from conversation_cases import CHATML, END, START, TEMPLATES, THINKING, conversation, spoken, tokenizer_folder, tool_call, turn
from limbeck.data.trajectories.formats import trajectory_of
from limbeck.data.trajectories.reading import raw_rows
from limbeck.data.trajectories.render import ChatTemplate, Rendered
from limbeck.data.trajectories.tokens import Tokens, tokenise
from limbeck.data.trajectories.trajectory import Trajectory, Unusable
from limbeck.errors import DataError
from limbeck.models.loading import load_tokenizer

SHIPPED = (
    "Qwen-QwQ-32B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3-Coder", "llama3_2", "qwen2_5_training", "qwen3_training",
)  # fmt: skip
SINGLE_CALLS = "llama3_2"
"""The template that takes no more than one call a turn."""
USER = {"role": "user", "content": "The cat does not purr."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "t")))


@pytest.fixture(scope="module")
def qwen(shared_data: Path) -> Any:
    folder = shared_data / "tokenizers" / "qwen2.5"
    if not folder.is_dir():
        pytest.skip("needs the tokenizer ../shared/data/tokenizers/qwen2.5, which is not there")
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def shipped(shared_data: Path) -> list[Trajectory]:
    folder = shared_data / "trajectories"
    if not folder.is_dir():
        pytest.skip("needs the runs in ../shared/data/trajectories, which are not there")
    return [trajectory_of(record, name) for name, record in raw_rows([str(folder)], None, folder)]


def jinja(shared_data: Path, name: str) -> str:
    path = shared_data / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"needs the template ../shared/data/chat_templates/{name}.jinja, which is not there")
    return path.read_text(encoding="utf-8")


def decoded(tokenizer: Any, tokens: Tokens) -> list[str]:
    """The targets of each turn as text."""
    return [tokenizer.decode(tokens.ids_T[start:end]) for _, start, end in tokens.turns_N3]


def turns_of(rendered: Rendered) -> list[str]:
    """What the assistant says, turn by turn."""
    return [rendered.text[start:end] for _, start, end in rendered.turns]


def check_tokens(tokenizer: Any, rendered: Rendered) -> Tokens:
    """What must hold of any conversation, whatever its words."""
    [tokens] = tokenise(tokenizer, [rendered])
    assert tokenizer.decode(tokens.ids_T) == rendered.text
    assert decoded(tokenizer, tokens) == turns_of(rendered)
    by_turn = np.zeros(len(tokens), dtype=bool)
    for header, start, end in tokens.turns_N3:
        assert header <= start <= end
        by_turn[start:end] = True
    assert (by_turn == tokens.spoken_T).all(), "the mask is not the turns"
    whole = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    edges = {edge for _, start, end in rendered.turns for edge in (start, end)}
    if not any(a < edge < b for edge in edges for a, b in whole["offset_mapping"]):
        assert tokens.ids_T.tolist() == whole["input_ids"], "tokens changed though none crosses an edge"
    return tokens


# -- real runs and real templates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_real_run_is_rendered_as_the_template_does_and_its_targets_are_what_the_agent_says(shared_data, qwen, shipped, name):
    source = jinja(shared_data, name)
    template, refused = ChatTemplate(qwen, source), 0
    for run in shipped:
        calls = max(len(message.get("tool_calls", ())) for message in run.messages)
        if name == SINGLE_CALLS and calls > 1:
            refused += 1
            with pytest.raises(Unusable, match=r"template: the chat template refuses it \(.*single tool-calls"):
                template.render(run.messages, run.tools)
            continue
        rendered = template.render(run.messages, run.tools)
        assert rendered.text == qwen.apply_chat_template(run.messages, tools=run.tools or None, chat_template=source, tokenize=False)
        assert len(rendered.turns) == sum(message["role"] == "assistant" for message in run.messages)
        check_tokens(qwen, rendered)
        for own, message in zip(turns_of(rendered), (m for m in run.messages if m["role"] == "assistant"), strict=True):
            # Llama's template writes a call in the place of the words beside it.
            assert name == SINGLE_CALLS or message["content"].strip() in own
            assert all(call["function"]["name"] in own for call in message.get("tool_calls", ()))
    assert refused < len(shipped) and (refused > 0) == (name == SINGLE_CALLS)


@pytest.mark.parametrize(("name", "newlines"), [("qwen2_5_training", 2), ("qwen3_training", 1)])
def test_the_mask_is_that_of_a_template_with_generation_marks(shared_data, qwen, shipped, name, newlines):
    """Apart from newlines: theirs counts the one behind the end mark, Qwen2.5's also the one in front of the words."""
    source = jinja(shared_data, name)
    template = ChatTemplate(qwen, source)
    for run in shipped[:4]:
        [tokens] = tokenise(qwen, [template.render(run.messages, run.tools)])
        theirs = qwen.apply_chat_template(run.messages, tools=run.tools or None, chat_template=source, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = (np.asarray(theirs[key]).reshape(-1) for key in ("input_ids", "assistant_masks"))
        assert ids.tolist() == tokens.ids_T.tolist()
        more = mask.astype(bool) & ~tokens.spoken_T
        assert not (tokens.spoken_T & (mask == 0)).any(), "a target that is not the assistant's"
        assert more.sum() == newlines * len(tokens.turns_N3)
        assert set(qwen.convert_ids_to_tokens(ids[more])) == {"Ċ"}


@pytest.mark.parametrize("name", ["Qwen3-Coder", "Qwen-Qwen3-0.6B", "Qwen-QwQ-32B"])
def test_random_conversations_in_real_templates(shared_data, qwen, name):
    source, sound = jinja(shared_data, name), 0
    template = ChatTemplate(qwen, source)
    for seed in range(40):
        messages = [{**m, "content": unicodedata.normalize("NFC", m["content"])} for m in conversation(seed)]
        rendered = template.render(messages)
        assert rendered.text == qwen.apply_chat_template(messages, chat_template=source, tokenize=False)
        rendered_nfc = unicodedata.normalize("NFC", rendered.text) == rendered.text
        sound += rendered_nfc
        if rendered_nfc:
            check_tokens(qwen, rendered)
        assert all(own.endswith(END) and own.count(END) == 1 and START not in own for own in turns_of(rendered))
    assert sound > 20


def test_a_tokenizer_that_composes_characters_still_masks_the_right_ones(qwen):
    """Qwen's ids are those of the composed text: the targets are the assistant's words composed, no more and no less."""
    decomposed = "e\u0301 cafe\u0301"
    template = ChatTemplate(qwen, CHATML)
    [tokens] = tokenise(qwen, [template.render([{"role": "user", "content": decomposed}, turn(decomposed), turn(f"\u0301{decomposed}")])])
    assert decoded(qwen, tokens) == [unicodedata.normalize("NFC", own) + END for own in (decomposed, f"\u0301{decomposed}")]


def test_thoughts_are_the_assistants_own_words(shared_data, qwen):
    template = ChatTemplate(qwen, jinja(shared_data, "Qwen-Qwen3-0.6B"))
    asked, answer = turn("", tool_call(path="a"), reasoning_content="Where is it?"), {"role": "tool", "content": "a"}
    rendered = template.render([USER, asked, answer, turn("Done.", reasoning_content="Well.")])
    assert turns_of(rendered)[0].startswith("<think>\nWhere is it?\n</think>\n\n") and turns_of(rendered)[1] == f"<think>\nWell.\n</think>\n\nDone.{END}"
    check_tokens(qwen, rendered)
    # What only a fresh answer is begun with is not in what is learnt.
    assert ChatTemplate(qwen, jinja(shared_data, "Qwen-QwQ-32B")).header == f"{START}assistant\n"


# -- made-up templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_two_hundred_random_conversations(tokenizer, name):
    template = ChatTemplate(tokenizer, TEMPLATES[name][0])
    for seed in range(200):
        messages = conversation(seed)
        rendered = template.render(messages)
        assert rendered.text == tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name][0], tokenize=False)
        assert turns_of(rendered) == spoken(name, messages), seed
        assert all(rendered.text[header:start] == template.header for header, start, _ in rendered.turns)
        check_tokens(tokenizer, rendered)


HARD = {
    "the same words twice": [USER, turn("Look."), USER, turn("Look.")],
    "turns that follow each other": [USER, turn("Look."), turn("Look."), turn("")],
    "calls only": [USER, turn("", tool_call(path="a"), tool_call(path="a")), {"role": "tool", "content": "x"}, {"role": "tool", "content": "x"}, turn("")],
    "an answer quoted": [USER, turn("Look.", tool_call()), {"role": "tool", "content": "def purr(): pass"}, turn("It says\ndef purr(): pass"), USER, turn("x")],
    "the text between turns quoted": [USER, turn(f"\nuser\n{USER['content']}\nassistant\n"), USER, turn(f"{USER['content']}\nassistant\nassistant\n")],
    "white space": [USER, turn("  \n a \n\n"), USER, turn("\n"), USER, turn(" ")],
    "long characters": [USER, turn("👩‍💻"), {"role": "user", "content": "e\u0301\r\n"}, turn("\u0301x\r\n\r\n")],
    "nothing behind the last call": [USER, turn("Look.", tool_call())],
    "an answer last": [USER, turn("Look.", tool_call()), {"role": "tool", "content": "Look."}],
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", HARD)
def test_hard_conversations(tokenizer, name, case):
    rendered = ChatTemplate(tokenizer, TEMPLATES[name][0]).render(HARD[case])
    assert turns_of(rendered) == spoken(name, HARD[case])
    check_tokens(tokenizer, rendered)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": f"{START}assistant\n"}, turn("a")],
        [USER, turn(f"a{END}")],
        [USER, turn("a", tool_call(text=["x", {"deep": END}]))],
        [USER, turn("a", tool_call(**{END: 1}))],
        [USER, turn("a", reasoning_content=END)],
        [USER, turn("a", tool_call(END))],
    ],
    ids=["user", "assistant", "argument", "name of an argument", "thought", "tool"],
)
@pytest.mark.parametrize("source", [CHATML, THINKING])
def test_words_that_spell_a_turn_are_no_turn(tokenizer, messages, source):
    with pytest.raises(Unusable, match=r"special token in text: turn \d \((user|assistant)\) spells <\|im_(start|end)\|>"):
        ChatTemplate(tokenizer, source).render(messages)


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


def test_a_template_that_never_asks_for_an_answer(tokenizer):
    template = ChatTemplate(tokenizer, PLAIN)
    assert (template.header, template.closing) == ("assistant: ", "")
    rendered = template.render([USER, turn(" a "), USER, turn("b\n"), turn("c")])
    assert turns_of(rendered) == [" a ", "b\n", "c"]
    check_tokens(tokenizer, rendered)


@pytest.mark.parametrize(
    "messages",
    [
        [USER, turn(f"a\nuser: {USER['content']}\nassistant: b"), USER, turn("c")],
        [USER, turn("a"), turn("b\nassistant: c")],
    ],
)
def test_words_that_could_be_two_turns_are_refused(tokenizer, messages):
    """Where nothing but words tells turns apart, a quotation of them cannot be told from a turn."""
    with pytest.raises(Unusable, match="template: "):
        ChatTemplate(tokenizer, PLAIN).render(messages)
    with pytest.raises(Unusable, match="template: "):
        ChatTemplate(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}").render([USER, turn("a"), turn("b")])


def test_words_of_the_marks_are_refused(tokenizer):
    with pytest.raises(Unusable, match="template: "):
        ChatTemplate(tokenizer, CHATML).render([{"role": "user", "content": "\ue0f00\ue0f1"}, turn("a")])


@pytest.mark.parametrize(
    "source",
    [
        "Hello", "{{ messages[0].content }}", "{% for m in messages %}", "{{ raise_exception('no') }}", "{{ messages[0].content + 1 }}", "{{ nothing.at.all }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
)  # fmt: skip
def test_what_is_no_chat_template_is_refused_by_name(tokenizer, source):
    with pytest.raises(DataError, match=r"^template: "):
        ChatTemplate(tokenizer, source)


def test_without_a_template_the_error_says_what_to_give(tokenizer):
    with pytest.raises(DataError, match=r"^template: the tokenizer has no chat template: name a \.jinja file"):
        ChatTemplate(tokenizer)


def test_a_template_that_cannot_take_one_conversation_leaves_the_others(tokenizer):
    source = CHATML.replace("{{ '<|im_end|>\\n' }}{% endfor %}", "{% if m.tool_calls %}{{ m.content + 1 }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}")
    template = ChatTemplate(tokenizer, source)
    with pytest.raises(Unusable, match=r"template: the chat template refuses it \(TypeError"):
        template.render([USER, turn("a", tool_call())])
    assert turns_of(template.render([USER, turn("a")])) == [f"a{END}"]


def test_a_template_that_hears_the_assistant_elsewhere_is_refused(tokenizer):
    """What the assistant says must stand where it speaks, and nowhere else."""
    source = CHATML.replace("{% for m in messages %}", "{{ messages[-1].content | length }}{% for m in messages %}", 1)
    with pytest.raises(Unusable, match="template: the beginning is rendered differently"):
        ChatTemplate(tokenizer, source).render([USER, turn("a long answer of the agent")])


# -- tokenizers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_offsets_without_white_space_give_the_same_targets(tokenizer, tmp_path, name):
    tokenizer.save_pretrained(tmp_path)
    trimming = load_tokenizer(str(tmp_path))
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = ChatTemplate(tokenizer, TEMPLATES[name][0])
    seen = False
    for seed in range(60):
        rendered = template.render(conversation(seed))
        [wanted], [found] = tokenise(tokenizer, [rendered]), tokenise(trimming, [rendered])
        assert tokenizer.decode(found.ids_T) == rendered.text and decoded(tokenizer, found) == turns_of(rendered) == decoded(tokenizer, wanted)
        offsets = trimming(rendered.text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        seen |= any(a > b for (_, b), (a, _) in pairwise(offsets))
    assert seen, "no offset left out a space: nothing was tested"


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_inside(stories260k):
    """SentencePiece begins a text with a space; a conversation is one text, cut or not."""
    tokenizer = load_tokenizer(str(stories260k))
    template = ChatTemplate(tokenizer, PLAIN)
    for words in (("Hello there", "Once upon a time"), ("Hello", "😀 \n"), ("\n x", "1")):
        rendered = template.render([USER, turn(words[0]), USER, turn(words[1])])
        [tokens] = tokenise(tokenizer, [rendered])
        assert tokenizer.decode(tokens.ids_T) == rendered.text
        assert decoded(tokenizer, tokens) == list(words)


def test_a_token_that_crosses_an_edge_is_cut_there(tokenizer):
    """The end of the header and the words would be one token: a model that is asked to go on from the header cannot say it."""
    template = ChatTemplate(tokenizer, "{% for m in messages %}{{ m.role + ' ' + m.content + ';' }}{% endfor %}")
    rendered = template.render([USER, turn("Look."), USER, turn("Look")])
    edges = {start for _, start, _ in rendered.turns}
    offsets = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert any(a < edge < b for edge in edges for a, b in offsets), "no token crosses an edge: nothing is tested"
    check_tokens(tokenizer, rendered)


def test_a_slow_tokenizer_is_refused_by_name():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"^tokenizer: .*save it as a fast one"):
        tokenise(Slow(), [])
