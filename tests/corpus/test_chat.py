"""Conversations: the tokenizer's own template, the assistant's tokens alone as targets, and what is refused."""

import json

import models
import pytest
import reference
import torch
from corpora import write_rows
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as TrimOffsets
from transformers import CTRLTokenizer, PreTrainedTokenizerFast

from msif_ray.config import Documents, parse_run
from msif_ray.corpus.chat import encode_chat
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.objectives import as_text
from msif_ray.corpus.reader import Document, read_documents
from msif_ray.corpus.windows import Encoded, Skipped, encode, to_batch
from msif_ray.errors import UserError
from msif_ray.influence.capture import Capture
from msif_ray.influence.modules import find_linear_maps
from msif_ray.preflight import check

TURN = "<bos>{{ message['role'] }} {{ message['content'] }}<eos>"
PROMPT = "{% if add_generation_prompt %}<bos>assistant{% endif %}"
PLAIN = "{% for message in messages %}" + TURN + "{% endfor %}" + PROMPT
MARKED = (
    "{% for message in messages %}<bos>{{ message['role'] }}"
    "{% if message['role'] == 'assistant' %}{% generation %} {{ message['content'] }}<eos>{% endgeneration %}"
    "{% else %} {{ message['content'] }}<eos>{% endif %}{% endfor %}" + PROMPT
)
# As templates do that leave earlier turns' thoughts out.
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    + TURN
    + ("{% endif %}{% endfor %}" + PROMPT)
)
RUN_TOGETHER = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + PLAIN

NAMED = "{% for message in messages %}{{ message['role'] + message['name'] }}{% endfor %}"
CALLING = "{% for m in messages %}{% for key, value in m.calls | items %}{{ key }}{% endfor %}{% endfor %}"
LOOKING = "{% if messages[0]['role'] == 'system' %}{% endif %}" + PLAIN

# The assistant says what the user says, so that no search could tell whose is whose.
TALK = [
    {"role": "system", "content": "the old king"},
    {"role": "user", "content": "the sea"},
    {"role": "assistant", "content": "the sea"},
    {"role": "user", "content": "green"},
    {"role": "assistant", "content": "was green to the sea"},
]


def tokenizer_of(template):
    tokenizer = models.build_tokenizer(bos=True)
    tokenizer.chat_template = template
    return tokenizer


def by_hand(talk):
    """Tokens and targets of the talk, turn by turn: <bos> role content <eos>."""
    tokenizer, ids, targets = models.build_tokenizer(bos=True), [], []
    for message in talk:
        content = tokenizer(f" {message['content']}", add_special_tokens=False)["input_ids"]
        own = [tokenizer.bos_token_id, tokenizer.unk_token_id, *content, tokenizer.eos_token_id]
        ids += own
        targets += [message["role"] == "assistant" and place >= 2 for place in range(len(own))]
    return tuple(ids), tuple(targets)


def by_letter(template, trim_offsets):
    """A tokenizer with a token per character, whose spaces are of no characters where offsets are trimmed."""
    backend = Tokenizer(BPE({letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.post_processor = TrimOffsets(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def with_each(**more):
    """The talk, whose messages hold more than role and content."""
    return [message | more for message in TALK]


def chat(talk):
    return Document("d", None, talk, is_chat=True)


@pytest.mark.parametrize("template", (PLAIN, MARKED))
@pytest.mark.parametrize("turns", (3, 4, 5))
def test_the_assistants_turns_and_their_ends_alone_are_targets(template, turns):
    found = encode(tokenizer_of(template), chat(TALK[:turns]), append_eos=False)
    assert isinstance(found, Encoded) and (found.ids, found.targets) == by_hand(TALK[:turns])
    predicted = [window.ids[t] for window in found.windows(4) for t in range(len(window.ids)) if window.targets[t]]
    assert predicted == [token for token, target in zip(found.ids, found.targets, strict=True) if target]


SAID = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
SAID += "{% else %}{{ m.content }}{% endif %}"
WITH_ROLES = "{% for m in messages %}{{ m.role }}:" + SAID + "{{ '\\n' }}{% endfor %}"
SAID_ALONE = "{% for m in messages %}" + SAID + "{% endfor %}"


@pytest.mark.parametrize("trim_offsets", (False, True))
@pytest.mark.parametrize("template", (WITH_ROLES, SAID_ALONE))
@pytest.mark.parametrize("since", (0, 2, 3))
@pytest.mark.parametrize("first", ("the sea", "t", "", " ", "the sea ", " the sea", "  the\n "))
def test_of_what_the_template_marks_the_tokens_alone_are_targets(first, since, template, trim_offsets):
    """Letter by letter, where transformers' own mask goes on to the end, or leaves turns out."""
    said = [("assistant", first), ("user", " secret "), ("assistant", first), ("user", "secret"), ("assistant", "two ")]
    letters, expected = "", []
    for turn, (role, content) in enumerate(said):
        header, end = (f"{role}:", "\n") if template == WITH_ROLES else ("", "")
        spoken = role == "assistant" and turn >= since
        letters += header + content + end
        own = [spoken and not (trim_offsets and letter == " ") for letter in content]
        expected += [False] * len(header) + own + [False] * len(end)
    talk = [{"role": role, "content": content} for role, content in said]
    tokenizer = by_letter(template, trim_offsets)
    ids, targets = encode_chat(tokenizer, talk, since)
    assert tokenizer.convert_ids_to_tokens(ids) == [{" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in letters]
    assert targets == expected


def test_a_marked_conversation_has_the_tokens_that_transformers_gives_it():
    """With special tokens and without keys that are null, as rows of Parquet have."""
    template = "{{ bos_token }}{% for m in messages %}{{ ' king' if m.name is defined }}" + SAID + "{% endfor %}<eos>"
    tokenizer = tokenizer_of(template.replace("{% generation %}", "{%-\tgeneration -%}"))
    talk = [{"role": "user", "content": "the sea", "name": None}, {"role": "assistant", "content": " the", "name": "a"}]
    ids, targets = encode_chat(tokenizer, talk)
    assert ids == tokenizer.apply_chat_template(talk)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "the", "Ġsea", "Ġking", "Ġthe", "<eos>"]
    assert targets == [False] * 4 + [True, False]


def test_marks_need_a_tokenizer_with_offsets(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps({"<unk>": 0, "the": 1}))
    (tmp_path / "merges").write_text("#version: 0.2\nt h\nth e</w>\n")
    in_python = CTRLTokenizer(str(tmp_path / "words.json"), str(tmp_path / "merges"), chat_template=WITH_ROLES)
    assert encode(in_python, chat(TALK), append_eos=False) == Skipped(
        "d", "the tokenizer (CTRLTokenizer) has no offsets that tell which tokens the chat template marks"
    )


def test_an_assistant_who_speaks_first_has_no_header_as_target():
    found = encode(tokenizer_of(PLAIN), chat(TALK[2:]), append_eos=False)
    assert isinstance(found, Encoded) and (found.ids, found.targets) == by_hand(TALK[2:])
    found = encode(tokenizer_of(LOOKING), chat(TALK[2:]), append_eos=False)
    assert isinstance(found, Skipped) and found.reason == (
        "the assistant speaks first, and the template does not say what comes before that: the chat template refuses "
        "it: list object has no element 0"
    )


REFUSED = {
    "null": (PLAIN, None, "messages is null"),
    "text": (PLAIN, "the king", "messages is not a list but str"),
    "no mapping": (PLAIN, ["the"], "message 0 is not a mapping but str"),
    "pictures": (PLAIN, [{"role": "user", "content": [{"type": "image"}]}], "the content of message 0 is not text"),
    "no role": (PLAIN, [{"content": "the"}], "the role of message 0 is not text"),
    "no assistant": (PLAIN, TALK[:2], "no message is the assistant's"),
    "surrogate": (
        PLAIN,
        [*TALK, {"role": "user", "content": "\ud800"}],
        "message 5 is not valid Unicode",
    ),
    "surrogate role": (PLAIN, [{**TALK[0], "role": "\ud800"}, *TALK], "message 0 is not valid Unicode"),
    "surrogate name": (NAMED, with_each(name="\ud800"), "message 0 is not valid Unicode"),
    "number as name": (NAMED, with_each(name=5), "the chat template fails on it: TypeError: can only concatenate str"),
    "arguments as text": (
        CALLING,
        with_each(calls='{"a": 1}'),
        "the chat template fails on it: TypeError: Can only get",
    ),
    "division": ("{{ 1 / (messages | length - 5) }}", TALK, "fails on it: ZeroDivisionError: division by zero"),
    "no default": ({"tools": PLAIN}, TALK, "fails on it: ValueError: This model has multiple chat templates"),
    "refused": (STRICT, TALK, "the chat template refuses it: a user begins"),
    "forgetful": (FORGETFUL, TALK, "mark what the assistant writes, and turn 2 does not begin and end between tokens"),
    "run together": (RUN_TOGETHER, TALK, "turn 2 does not begin and end between tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_conversation_that_cannot_be_scored_is_skipped_with_its_reason(case):
    template, talk, reason = REFUSED[case]
    found = encode(tokenizer_of(template), chat(talk), append_eos=False)
    assert isinstance(found, Skipped) and reason in found.reason


@pytest.mark.parametrize("kind", ("jsonl", "parquet"))
def test_conversations_are_read_and_shown(tmp_path, kind):
    path = write_rows(tmp_path / f"chat.{kind}", [{"id": "a", "talk": TALK}, {"id": "b", "talk": None}])
    documents = Documents(path=path, messages="talk", id="id")
    assert not documents.ends_with_eos
    first, second = read_documents(corpus_files(documents, "k")[0], documents, "k")
    assert first == Document("a", None, TALK, is_chat=True) and second.text is None
    assert as_text(None, first, models.build_tokenizer()).startswith(
        "system: the old king\n\nuser: the sea\n\nassistant: the sea"
    )


def test_gradients_are_of_the_assistants_tokens_alone():
    """Against autograd on the weights of one unpadded sequence, beside a longer one."""
    model, tokenizer = models.build_model("gpt_neox", 0), tokenizer_of(PLAIN)
    talks = [TALK[:3], TALK]
    windows = [next(encode(tokenizer, chat(talk), False).windows(64)) for talk in talks]
    maps = find_linear_maps(model)
    with Capture(model, maps) as capture:
        captured = capture.run(to_batch(windows))
    for row, talk in enumerate(talks):
        expected = reference.window_gradients(model, list(maps), *map(list, by_hand(talk)))
        for name in maps:
            found = captured.gradients(name)[row].T @ captured.activations(name)[row]
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-10)


def description(folder, **documents):
    model = models.build_model("gpt_neox", 0)
    models.save(model, models.build_tokenizer(), folder / "model")
    (folder / "chat.jsonl").write_text(json.dumps({"talk": TALK}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"prompt": "the", "completion": " sea"}) + "\n")
    corpus = {"path": str(folder / "chat.jsonl")} | documents
    return {
        "run_dir": str(folder / "run"),
        "stages": [{"name": "tune", "model": str(folder / "model"), "documents": corpus}],
        "queries": {"path": str(folder / "queries.jsonl")},
        "score": [{"stage": "tune"}],
    }


def test_a_tokenizer_without_a_template_is_refused_by_name(tmp_path):
    run = description(tmp_path, messages="talk")
    with pytest.raises(UserError, match=r"^stages\.0\.tokenizer: it has no chat template, which `messages` needs"):
        check(parse_run(run))
    tokenizer_of(PLAIN).save_pretrained(tmp_path / "model")
    resolved = check(parse_run(run))
    assert "chat_template.jinja" in resolved.stages[0].files


CONFIGURATIONS = [
    (
        {"messages": "talk", "text": "t"},
        "give one of `text`, `completion` with an optional `prompt`, `messages`, `packed`, and",
    ),
    ({"messages": "talk", "prompt": "p"}, "`prompt` goes with `completion`, not with `messages`"),
    ({"messages": "talk", "append_eos": True}, "`append_eos` does not go with `messages`"),
]


@pytest.mark.parametrize(("columns", "message"), CONFIGURATIONS)
def test_columns_that_do_not_go_together(columns, message):
    stage = {"name": "a", "model": "m", "documents": {"path": "x.jsonl"} | columns}
    run = {"run_dir": "r", "stages": [stage], "queries": {"path": "q"}, "score": [{"stage": "a"}]}
    with pytest.raises(UserError, match=f"stages.0.documents: {message}"):
        parse_run(run)
