"""The examples without their weights: inputs from files of the public schemas, plans of their runs on tiny models."""

import gzip
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import runs
from transformers import AutoConfig, AutoModelForCausalLM

from msif_ray.config import parse_run
from msif_ray.plan.make import make_plan

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("dolly", "bloomz", "olmo2")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), EXAMPLES / f"{path}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plan = load("plan")
prepare = {name: load(f"{name}/prepare") for name in NAMES}


def texts(seed: int, count: int, words: int = 12) -> list[str]:
    drawer = random.Random(seed)
    return [models.random_text(drawer, words) for _ in range(count)]


def words_of(said: list[str]) -> np.ndarray:
    """An encoder: counts of words, [texts, words]."""
    return np.array([[text.count(word) for word in models.WORDS] for text in said], dtype=np.float64)


def dolly_inputs(folder: Path) -> None:
    data, own = folder / "data", prepare["dolly"]
    records = [{"instruction": a, "context": b, "response": c, "category": "open_qa"} for a, b, c in records_of(12)]
    own.write_lines(data / "dolly.jsonl", own.completions(records, "dolly"))
    asked = [{"instruction": a, "context": "", "response": b} for a, b in zip(texts(5, 2), texts(6, 2), strict=True)]
    (folder / "qa.json").write_text(json.dumps(asked))
    queries = list(own.completions(own.read_rows(folder / "qa.json"), "qa"))
    own.write_lines(data / "queries.jsonl", queries)
    own.write_lines(
        data / "pile.jsonl", [{"text": text, "meta": {"pile_set_name": "Pile-CC"}} for text in texts(7, 12)]
    )
    articles = [{"title": text.split()[0], "text": text} for text in texts(8, 9)]
    pq.write_table(pa.Table.from_pylist(articles), folder / "wikipedia.parquet")
    for name, path in (("wikipedia", folder / "wikipedia.parquet"), ("pile-nearest", data / "pile.jsonl")):
        found = own.write_candidates(data, name, lambda path=path: own.read_rows(path), words_of, queries, 4)
        assert found == (9 if name == "wikipedia" else 12)


def records_of(count: int) -> list[tuple[str, str, str]]:
    contexts = [text if number % 2 else "" for number, text in enumerate(texts(2, count))]
    return list(zip(texts(1, count), contexts, texts(3, count), strict=True))


FACTS = [("P19", f"Q{n}", f"Q{100 + n}", models.WORDS[n], models.WORDS[n + 8]) for n in range(8)]


def bloomz_inputs(folder: Path) -> None:
    data, lama, trex = folder / "data", folder / "LAMA", folder / "T-REx"
    (lama / "TREx").mkdir(parents=True)
    trex.mkdir()
    rows = [
        {"uuid": f"u{s}", "predicate_id": p, "sub_uri": s, "sub_label": a, "obj_uri": o, "obj_label": b}
        for p, s, o, a, b in FACTS
    ]
    runs.write_lines(lama / "TREx" / "P19.jsonl", rows)
    relations = [{"relation": "P19", "template": "[X] was born in [Y] ."}, {"relation": "P1", "template": "[Y] [X]"}]
    runs.write_lines(lama / "relations.jsonl", relations)
    (trex / "re-nlg_0-10000.json").write_text(json.dumps([article(fact) for fact in FACTS[:6]]))
    counts = prepare["bloomz"].write(lama, trex, data, count=3, seed=0)
    assert counts == (3, 6)
    pq.write_table(pa.table({"text": texts(4, 12)}), data / "wikipedia.parquet")
    pairs = zip(texts(5, 12), texts(6, 12), strict=True)
    runs.write_lines(data / "xp3.jsonl", [{"inputs": a, "targets": f" {b}"} for a, b in pairs])


def article(fact: tuple[str, str, str, str, str]) -> dict[str, Any]:
    """As T-REx has them: a sentence without the fact, one with it, and a date."""
    predicate, subject, obj, *labels = fact
    first, second = texts(9, 1)[0], f"the {labels[0]} was in the {labels[1]}."
    entity, prop = prepare["bloomz"].ENTITY, prepare["bloomz"].PROPERTY
    stated = {"predicate": {"uri": f"{prop}{predicate}"}, "subject": {"uri": f"{entity}{subject}"}, "sentence_id": 1}
    date = {"object": {"uri": "1970-01-01^^http://www.w3.org/2001/XMLSchema#dateTime"}}
    return {
        "docid": f"{entity}{subject}",
        "text": f"{first} {second}",
        "sentences_boundaries": [[0, len(first)], [len(first) + 1, len(first) + 1 + len(second)]],
        "triples": [stated | {"object": {"uri": f"{entity}{obj}"}}, stated | date],
    }


def olmo2_inputs(folder: Path) -> None:
    data, own = folder / "data", prepare["olmo2"]
    for name, seed in (("stage1", 1), ("stage2", 2)):
        (folder / name).mkdir()
        with gzip.open(folder / name / "0.json.gz", "wt") as file:
            file.writelines(json.dumps({"id": "same", "text": text}) + "\n" for text in texts(seed, 20))
        drawn = own.sample(own.read_rows(folder / name), 12, 0)
        own.write_lines(data / f"{'olmo' if name == 'stage1' else 'dolmino'}-mix.jsonl", own.texts(drawn, name))
    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(texts(3, 12), texts(4, 12), strict=True)
    ]
    path = data / "tulu-3-sft-olmo-2-mixture-0225" / "train-00000.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([{"id": "x", "messages": each, "source": "s"} for each in turns]), path)
    own.write_lines(data / "sft-sample.jsonl", own.chats(own.sample(own.read_rows(path.parent), 8, 0)))
    path = data / "olmo-2-0425-1b-preference-mix" / "train-00000.parquet"
    path.parent.mkdir()
    pairs = [
        {
            "id": "x",
            "source": "s",
            "chosen": [{"content": a, "role": "user"}, {"content": b, "role": "assistant"}],
            "rejected": [{"content": a, "role": "user"}, {"content": c, "role": "assistant"}],
        }
        for a, b, c in zip(*(texts(seed, 12, 8) for seed in (7, 8, 9)), strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(pairs), path)
    own.write_lines(data / "dpo-sample.jsonl", own.pairs(own.sample(own.read_rows(path.parent), 8, 0)))
    own.write_lines(data / "queries.jsonl", [own.query("q", texts(5, 1)[0], texts(6, 1)[0])])


INPUTS: dict[str, Callable[[Path], None]] = {"dolly": dolly_inputs, "bloomz": bloomz_inputs, "olmo2": olmo2_inputs}
SMALL = {
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "olmo2": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2},
}


def save_tiny(example: str, stages: list[dict[str, Any]], folder: Path) -> None:
    """Random models of each stage's own configuration class, with the vocabularies' differences."""
    tokenizer = models.build_tokenizer(pad=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    sizes = [plan.config_of(example, stage["name"])["vocab_size"] for stage in stages]
    for number, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        described = plan.config_of(example, stage["name"])
        ids = {key: models.VOCABULARY.index(models.EOS) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        described |= SMALL[described["model_type"]] | ids | {"vocab_size": len(models.VOCABULARY) + size - min(sizes)}
        config = AutoConfig.for_model(described.pop("model_type"), **described)
        model = models.randomise(AutoModelForCausalLM.from_config(config), number)
        models.save(model, tokenizer, folder / stage["name"])


def described(example: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The example's own run, on tiny models, short windows and a CPU."""
    monkeypatch.chdir(folder)
    (folder / "data").mkdir()
    INPUTS[example](folder)
    description = plan.description_of(example)
    save_tiny(example, description["stages"], folder / "models")
    for stage in description["stages"]:
        stage.pop("revision", None)
        stage["model"] = str(folder / "models" / stage["name"])
        stage["fit"]["max_tokens"] = 24
    for entry in description["score"]:
        entry["max_tokens"] = 24
    description["run_dir"] = str(folder / "run")
    description["cluster"] = {"gpus_per_rank": 0, "dtype": "float32", "tokens_per_batch": 96}
    return description


@pytest.mark.parametrize("example", NAMES)
def test_its_run_is_planned(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = described(example, tmp_path, monkeypatch)
    found = make_plan(parse_run(description), measured=False)
    assert found.pairs > 0 and all(corpus.skipped == 0 for corpus in found.corpora)


def test_nearest_is_by_cosine_and_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    own = prepare["dolly"]
    said, asked = texts(1, 50, 30), texts(2, 3, 30)
    vectors, wanted = words_of(said), words_of(asked)
    cosines = (wanted / np.linalg.norm(wanted, axis=1)[:, None]) @ (
        vectors / np.linalg.norm(vectors, axis=1)[:, None]
    ).T
    monkeypatch.setattr(own, "BATCH", 7)
    found = own.nearest(words_of, asked, iter(said), 5)
    for row, numbers in zip(cosines, found, strict=True):
        np.testing.assert_allclose(row[numbers], np.sort(row)[::-1][:5])


def test_dollys_prompts_are_those_that_it_was_trained_with() -> None:
    row = {"instruction": "Which sea?", "context": "the north", "response": "That."}
    (found,) = prepare["dolly"].completions([row], "dolly")
    assert found["prompt"].startswith("Below is an instruction that describes a task. Write a response that")
    assert found["prompt"].endswith("### Instruction:\nWhich sea?\n\nInput:\nthe north\n\n### Response:\n")
    assert found["completion"] == "That.\n\n### End"
    assert "Input:" not in prepare["dolly"].prompt_of(row | {"context": ""})


def test_lamas_facts_are_prompts_and_sentences_state_them(tmp_path: Path) -> None:
    bloomz_inputs(tmp_path)
    queries = [json.loads(line) for line in (tmp_path / "data" / "queries.jsonl").read_text().splitlines()]
    rows = pq.read_table(tmp_path / "data" / "trex.parquet").to_pylist()
    for query in queries:
        (stated,) = [row for row in rows if query["fact"] in row["facts"]]
        subject = query["prompt"].removesuffix(" was born in")
        assert stated["text"] == f"the {subject} was in the{query['completion']}." and stated["id"].endswith("#1")


def test_a_sample_is_random_and_the_same_for_a_seed() -> None:
    sample = prepare["olmo2"].sample
    rows = [{"n": number} for number in range(1000)]
    first = [row["n"] for row in sample(rows, 200, 1)]
    assert first == [row["n"] for row in sample(iter(rows), 200, 1)] and len(set(first)) == 200
    assert abs(np.mean(first) - 499.5) < 4 * 1000 / 12**0.5 / 200**0.5
    assert sample(rows[:5], 9, 1) == rows[:5]


def test_every_shard_of_a_mix_is_read_or_named(tmp_path: Path) -> None:
    """A sample of those that are easy to read would be of other sources than the mix."""
    read, rows = prepare["olmo2"].read_rows, [{"text": f"{number} é"} for number in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with pytest.raises(SystemExit, match="no files there; name the folder of the shards"):
        list(read(tmp_path / "none"))
    (tmp_path / "wiki").mkdir()
    for name, compression in (("0.json.gz", "gzip"), ("wiki/1.jsonl.zst", "zstd"), ("2.jsonl.zstd", "zstd")):
        with pa.output_stream(str(tmp_path / name), compression=compression) as stream:
            stream.write(lines)
    (tmp_path / "3.jsonl").write_bytes(lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "4.parquet")
    for name in ("README.md", ".gitattributes"):
        (tmp_path / name).write_text("about")
    assert [row["text"] for row in read(tmp_path)] == [row["text"] for row in rows] * 5
    (tmp_path / "5.jsonl.xz").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"5\.jsonl\.xz is neither JSON lines \(\.gz, \.zst\) nor Parquet; unpack"):
        list(read(tmp_path))


def test_olmo2s_queries_are_as_its_template_writes_a_turn() -> None:
    """The published template, of which this is the part that matters, writes the same text."""
    found = prepare["olmo2"].query("q", "Which sea?", "That one.")
    tokenizer = models.build_tokenizer()
    tokenizer.chat_template = (
        "{{ '<|endoftext|>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}"
        "{% else %}{{ '<|assistant|>\n' + m.content + '<|endoftext|>' }}{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Which sea?"}, {"role": "assistant", "content": "That one."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == found["prompt"] + found["completion"]


def test_the_papers_dampings_are_in_the_units_of_ours() -> None:
    """Theirs are per token of a row of so many, ours per document."""
    for example, tokens, dampings in (("dolly", 512, (1e-4, 2e-4)), ("bloomz", 1024, (1e-4, 1e-4))):
        first, second = plan.description_of(example)["stages"]
        assert first["fit"]["max_tokens"] == second["fit"]["max_tokens"] == tokens
        found = first["damping"]["absolute"], second["response"]["alpha"]["absolute"]
        assert found == pytest.approx([tokens * damping for damping in dampings])
