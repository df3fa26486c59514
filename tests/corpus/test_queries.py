"""What queries ask: which tokens are their targets, by hand, and bad rows refused in one line."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
from corpora import write_lines, write_rows
from corpus.test_chat import MARKED, PLAIN, RUN_TOGETHER, TALK, by_hand, tokenizer_of
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CTRLTokenizer, PreTrainedTokenizerFast

from msif_ray.config import Queries, parse_run
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.queries import Query, asked, query_of, read_queries
from msif_ray.corpus.windows import Encoded, Margin, Skipped, encode
from msif_ray.errors import UserError
from msif_ray.preflight import Resolved, check

TOKENIZER = models.build_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def query(prompt: str, completion: str, **asks: Any) -> Query:
    return Query("q", prompt, completion, has_prompt=True, **asks)


def chat_query(talk: Any, **asks: Any) -> Query:
    return Query("q", None, talk, is_chat=True, **asks)


def test_a_margin_is_two_sequences_of_which_each_completion_is_the_target() -> None:
    found = encode(TOKENIZER, query("the king is", " old", rather_than=" the green sea"), append_eos=True)
    assert isinstance(found, Margin)
    first, second = found.windows(2)  # never cut
    assert (first.key.window, second.key.window) == (0, 1)
    assert first.ids == (*ids_of("the king is"), *ids_of(" old"), EOS)
    assert second.ids == (*ids_of("the king is"), *ids_of(" the green sea"), EOS)
    assert first.targets == (False,) * 3 + (True,) * 2 and second.targets == (False,) * 3 + (True,) * 4
    assert (found.longest, found.explained, len(found.ids)) == (7, 2, 12)
    assert isinstance(encode(TOKENIZER, query("", "the", rather_than=" old sea"), append_eos=False), Skipped)


# The completion is " the green sea": tokens of its characters 0-4, 4-10, 10-14, each with the space before it.
SPANS = [
    ((5, 10), (False, True, False)),  # green
    ((4, 10), (False, True, False)),  # with its space
    ((9, 10), (False, True, False)),  # its last letter
    ((0, 14), (True, True, True)),
    ((3, 6), (True, True, False)),  # the end of one and the beginning of another
    ((13, 14), (False, False, True)),
]


@pytest.mark.parametrize(("span", "inside"), SPANS)
def test_a_span_is_the_tokens_that_overlap_it_and_never_the_eos(span: Any, inside: tuple[bool, ...]) -> None:
    found = encode(TOKENIZER, query("the king", " the green sea", span=list(span)), append_eos=True)
    assert isinstance(found, Encoded)
    assert found.ids == (*ids_of("the king"), *ids_of(" the green sea"), EOS)
    assert found.targets == (False, False, *inside, False)


def test_all_bytes_of_a_character_are_in_its_span_and_a_first_token_is_never_a_target() -> None:
    letters = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_alone = PreTrainedTokenizerFast(tokenizer_object=backend)
    found = encode(bytes_alone, query("x", "aé€b", span=[1, 3]), append_eos=False)
    assert isinstance(found, Encoded)
    assert found.targets == (False, False, True, True, True, True, True, False)  # é is two bytes, € three
    found = encode(bytes_alone, query("", "ab", span=[0, 1]), append_eos=False)
    assert found == Skipped("q", "no token that is predicted overlaps the span [0, 1] of 'ab'")


@pytest.mark.parametrize(("template", "turns"), [(PLAIN, 3), (PLAIN, 5), (MARKED, 1), (MARKED, 3), (MARKED, 5)])
def test_the_last_turn_of_a_conversation_alone_is_explained(template: str, turns: int) -> None:
    talk = TALK[2:3] if turns == 1 else TALK[:turns]
    found = encode(tokenizer_of(template), chat_query(talk), append_eos=False)
    ids, targets = by_hand(talk)
    first = len(by_hand(talk[:-1])[0])
    assert isinstance(found, Encoded) and found.ids == ids
    assert found.targets == tuple(target and place >= first for place, target in enumerate(targets))
    assert sum(found.targets) == len(talk[-1]["content"].split()) + 1  # with its end


# A template that writes the thoughts of the last turn alone, as those of reasoning models do.
THINKING = (
    "{% for message in messages %}<bos>{{ message['role'] }}"
    "{% if loop.last and message['role'] == 'assistant' %} stone{% endif %} {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant{% endif %}"
)


def test_earlier_turns_may_be_written_otherwise_than_when_they_were_last() -> None:
    tokenizer = tokenizer_of(THINKING)
    found = encode(tokenizer, chat_query(TALK), append_eos=False)
    assert isinstance(found, Encoded)
    targets = [token for token, target in zip(found.ids, found.targets, strict=True) if target]
    assert targets == [*ids_of(" stone was green to the sea"), tokenizer.eos_token_id]


@pytest.mark.parametrize("other", [" old", [*TALK[:4], {"role": "assistant", "content": " old"}]])
def test_a_conversation_may_be_about_one_last_turn_rather_than_another(other: Any) -> None:
    found = encode(tokenizer_of(PLAIN), chat_query(TALK, rather_than=other), append_eos=False)
    assert isinstance(found, Margin)
    first, second = found.windows(64)
    begins = len(by_hand(TALK[:4])[0])
    for window, talk in ((first, TALK), (second, [*TALK[:4], {"role": "assistant", "content": " old"}])):
        ids, targets = by_hand(talk)
        assert window.ids == ids
        assert window.targets == tuple(target and place >= begins for place, target in enumerate(targets))


def test_a_span_of_the_last_turn_is_of_its_own_characters() -> None:
    """Though the earlier turns say the same, and the template trims and moves it."""
    trimming = PLAIN.replace("message['content']", "message['content'] | trim")
    for template, content, span in ((PLAIN, "the sea", [4, 7]), (trimming, "  the sea ", [6, 9])):
        talk = [*TALK[:4], {"role": "assistant", "content": content}]
        found = encode(tokenizer_of(template), chat_query(talk, span=span), append_eos=False)
        ids = by_hand([*TALK[:4], {"role": "assistant", "content": "the sea"}])[0]
        assert isinstance(found, Encoded) and found.ids == ids
        assert [place for place, target in enumerate(found.targets) if target] == [len(ids) - 2]
    found = encode(tokenizer_of(trimming), chat_query(talk, span=[9, 10]), append_eos=False)
    assert isinstance(found, Skipped) and "no token that is predicted overlaps the span [9, 10]" in found.reason
    upper = PLAIN.replace("message['content']", "message['content'] | upper")
    found = encode(tokenizer_of(upper), chat_query(TALK, span=[0, 3]), append_eos=False)
    assert isinstance(found, Skipped) and "does not write the last turn's content where its generation" in found.reason


def test_a_last_turn_that_runs_into_the_one_before_says_so() -> None:
    content = "{{ message['content'] }}"
    marked = "{% if message['role'] == 'assistant' %}{% generation %}" + content + "{% endgeneration %}{% else %}"
    marked = "{% for message in messages %}" + marked + content + "{% endif %}{% endfor %}"
    for template in (RUN_TOGETHER, marked):
        found = encode(tokenizer_of(template), chat_query(TALK[1:3]), append_eos=False)
        assert isinstance(found, Skipped) and "not begin" in found.reason


@pytest.mark.parametrize("kind", ("jsonl", "parquet"))
def test_queries_are_read_and_recorded_as_they_were_asked(tmp_path: Path, kind: str) -> None:
    rows = [
        {"id": "a", "talk": TALK, "other": None, "part": [0, 3]},
        {"id": "b", "talk": TALK, "other": "the old", "part": None},
        {"id": "c", "talk": TALK[:3], "other": None, "part": None},
    ]
    path = write_rows(tmp_path / f"queries.{kind}", rows)
    queries = Queries(path=path, id="id", messages="talk", rather_than="other", span="part")
    assert not queries.documents.ends_with_eos
    found = list(read_queries(corpus_files(queries.documents, "queries")[0], queries, "queries"))
    assert found == [
        Query("a", None, TALK, is_chat=True, span=[0, 3]),
        Query("b", None, TALK, is_chat=True, rather_than="the old"),
        Query("c", None, TALK[:3], is_chat=True),
    ]
    assert found[1].before.endswith("user: green\n\nassistant: ") and found[1].completion == TALK[4]["content"]
    assert found[1].words == "the old king the sea the sea green was green to the sea the old"
    assert query("the", " sea", rather_than=" old").words == "the sea  old"
    assert [query_of(json.loads(json.dumps(asked(each)))) for each in found] == found
    plain = query("the", " sea")
    assert asked(plain) == ["q", "the", " sea"] and query_of(asked(plain)) == plain


def description(folder: Path, rows: list[dict[str, Any]], **queries: Any) -> dict[str, Any]:
    models.save(models.build_model("gpt_neox", 0), tokenizer_of(PLAIN), folder / "model")
    (folder / "base.jsonl").write_text('{"text": "the old king"}\n')
    return {
        "run_dir": str(folder / "run"),
        "stages": [{"name": "tune", "model": str(folder / "model"), "documents": {"path": str(folder / "base.jsonl")}}],
        "queries": {"path": write_lines(folder / "queries.jsonl", rows), "id": "id"} | queries,
        "score": [{"stage": "tune"}],
    }


def resolve(folder: Path, rows: list[dict[str, Any]], **queries: Any) -> Resolved:
    run = description(folder, rows, **queries)
    run["stages"][0]["documents"]["text"] = "text"
    return check(parse_run(run))


SPAN, OTHER = {"span": "part"}, {"rather_than": "other"}
GOOD = {"id": "a", "prompt": "the", "completion": " old sea", "other": None, "part": None}
TALKING = {"id": "a", "talk": TALK, "other": None, "part": None}
CHAT = {"messages": "talk"}
ROW = r"queries: .*queries\.jsonl row 1 \(id 'b'\): "
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "other of another type": (GOOD, {"other": 3}, OTHER, ROW + r"'other' is int, not text"),
    "other empty": (GOOD, {"other": ""}, OTHER, ROW + r"'other' is empty; give another completion, or null"),
    "other the same": (GOOD, {"other": " old sea"}, OTHER, ROW + r"'other' is the completion itself; give another one"),
    "both": (
        GOOD,
        {"other": " a", "part": [0, 1]},
        OTHER | SPAN,
        ROW + r"it has 'other' and 'part'; .* leave one null",
    ),
    "empty span": (GOOD, {"part": [2, 2]}, SPAN, ROW + r"'part' is \[2, 2\]; give \[start, end\) with .* end <= 8, in"),
    "span too long": (GOOD, {"part": [2, 9]}, SPAN, ROW + r"'part' is \[2, 9\]; give "),
    "span before": (GOOD, {"part": [-1, 2]}, SPAN, ROW + r"'part' is \[-1, 2\]; give "),
    "span of fractions": (GOOD, {"part": [0.5, 2]}, SPAN, ROW + r"'part' is \[0\.5, 2\]; give "),
    "span of one": (GOOD, {"part": 3}, SPAN, ROW + r"'part' is 3; give "),
    "long other": (
        GOOD,
        {"other": " sea" * models.CONTEXT},
        OTHER,
        rf"queries: 'b' has {models.CONTEXT + 3} tokens, more than the {models.CONTEXT} of 'tune'",
    ),
    "other not Unicode": (
        GOOD,
        {"other": "\ud800"},
        OTHER,
        r"queries: 'b': the other completion: completion is not valid Unicode",
    ),
    "no column": (GOOD, {}, {"span": "characters"}, r"queries: .*queries\.jsonl has no column 'characters'"),
    "no list": (TALKING, {"talk": "the"}, CHAT, ROW + r"'talk': messages is not a list but str"),
    "no last turn": (TALKING, {"talk": TALK[:4]}, CHAT, ROW + r"'talk': the last message is the user's; end with the"),
    "nobody's turn": (TALKING, {"talk": TALK[:2]}, CHAT, ROW + r"'talk': no message is the assistant's"),
    "name not Unicode": (
        TALKING,
        {"talk": [TALK[0] | {"name": "\ud800"}, *TALK[1:]]},
        CHAT,
        ROW + r"'talk': message 0 is not valid Unicode",
    ),
    "other turn's name not Unicode": (
        TALKING,
        {"other": [*TALK[:4], {"role": "assistant", "content": " old", "name": "\ud800"}]},
        CHAT | OTHER,
        ROW + r"'other': message 4 is not valid Unicode",
    ),
    "silence": (
        TALKING,
        {"talk": [*TALK[:2], {"role": "assistant", "content": ""}]},
        CHAT,
        ROW + r"the last turn is empty; there is nothing to explain",
    ),
    "other turns": (
        TALKING,
        {"other": [TALK[0], *TALK[3:]]},
        CHAT | OTHER,
        ROW + r"'other': the turns before the last are others; the two must differ in their last turn alone",
    ),
    "other without an end": (
        TALKING,
        {"other": TALK[:4]},
        CHAT | OTHER,
        ROW + r"'other': the last message is the user",
    ),
    "EOS": (TALKING, {}, CHAT | {"append_eos": True}, r"run description: queries: `append_eos` does not go with `mess"),
    "both kinds": (TALKING, {}, CHAT | {"prompt": "p"}, r"run description: queries: give `messages`, or `prompt` and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_query_is_one_line(tmp_path: Path, case: str) -> None:
    good, changes, queries, message = REFUSED[case]
    with pytest.raises(UserError, match=f"^{message}") as error:
        resolve(tmp_path, [good, good | {"id": "b"} | changes], **queries)
    assert "\n" not in str(error.value)


def test_what_is_right_is_counted(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"id": "b", "other": " green"}, GOOD | {"id": "c", "part": [1, 4]}]
    resolved = resolve(tmp_path, rows, rather_than="other", span="part")
    assert resolved.query_tokens == (5, 9, 5)  # a BOS, the prompt, the completion and the EOS
    assert resolved.completion_tokens == (3, 3, 1)
    resolved = resolve(tmp_path, [TALKING], messages="talk")
    assert resolved.completion_tokens == (6,)


def test_conversations_need_a_template(tmp_path: Path) -> None:
    run = description(tmp_path, [TALKING], messages="talk")
    run["stages"][0]["documents"]["text"] = "text"
    for name in tmp_path.glob("model/chat_template*"):
        name.unlink()
    with pytest.raises(UserError, match=r"^stages\.0\.tokenizer: it has no chat template, which `messages` needs"):
        check(parse_run(run))


def test_a_tokenizer_without_offsets_is_refused_where_a_span_is_asked_for(tmp_path: Path) -> None:
    run = description(tmp_path, [GOOD, GOOD | {"id": "b", "part": [1, 4]}], span="part", append_eos=False)
    run["stages"][0]["documents"]["text"] = "text"
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "words.json").write_text(json.dumps({"<unk>": 0, "the": 1}))
    (slow / "merges").write_text("#version: 0.2\nt h\nth e</w>\n")
    CTRLTokenizer(str(slow / "words.json"), str(slow / "merges")).save_pretrained(slow)
    run["stages"][0]["tokenizer"] = str(slow)
    message = r"^queries\.span: the tokenizer of 'tune' \(CTRLTokenizer\) has no offsets that tell which characters"
    with pytest.raises(UserError, match=message):
        check(parse_run(run))
    (tmp_path / "queries.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert check(parse_run(run)).completion_tokens == (6,)  # letters
