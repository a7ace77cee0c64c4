"""Encoding, decoding token by token, chat templates, and broken tokenizer files."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cupaged import tokenizer as tokenizer_module
from cupaged.errors import CheckpointError
from cupaged.tokenizer import Tokenizer as OurTokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁▁", "a", "b", "▁a", "ab", "▁ab", "é", "▁é", "字", "�", "x▁y"]  # some whole, some with spaces inside


def byte_level():
    """256 bytes, a few merges, and special and plain added tokens (one with characters outside the byte alphabet)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"Ġa": 256, "ab": 257, "Ã©": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a"), ("a", "b"), ("Ã", "©")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("a b字", normalized=False)])
    return backend


def sentencepiece(decoder=None):
    """SentencePiece with byte fallback, as in Llama 2."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES])}
    merges = [("▁", "▁"), ("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "é")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoder or decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


BACKENDS = {
    "byte level": byte_level,
    "byte fallback": sentencepiece,
    "metaspace": lambda: sentencepiece(decoders.Metaspace("▁", "always")),
    "metaspace with fallback": lambda: sentencepiece(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "first")])
    ),
}


def ours(backend, config=None, chat_template=None):
    return OurTokenizer(backend, config or {}, chat_template, source="model")


@pytest.fixture(scope="module", params=BACKENDS)
def both(request):
    backend = BACKENDS[request.param]()
    return ours(backend), backend


def pieces_of(tokenizer, ids, skip):
    decoder = tokenizer.decoder(skip_special_tokens=skip)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


class TestDecoding:
    @settings(max_examples=300, deadline=None)
    @given(data=st.data(), skip=st.booleans())
    def test_pieces_join_to_the_whole_for_any_ids(self, both, data, skip):
        tokenizer, backend = both
        size = tokenizer.vocab_size + 2  # and ids that are no tokens
        ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
        pieces = pieces_of(tokenizer, ids, skip)
        whole = backend.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
        # Of byte fallbacks that are no UTF-8 the library gives up the valid characters too.
        if "ByteFallback" not in str(backend.decoder) or "�" not in whole:
            assert "".join(pieces) == whole

    @settings(max_examples=300, deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40), skip=st.booleans())
    def test_text_comes_back_whole_and_as_early_as_it_can(self, both, text, skip):
        tokenizer, backend = both
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, ids, skip)
        assert "".join(pieces) == backend.decode(ids, skip_special_tokens=skip)
        assert pieces[-1] == ""  # nothing was left over
        for count in range(len(ids)):  # nothing is held back but an unfinished character
            known = backend.decode(ids[:count], skip_special_tokens=skip).rstrip("�")
            assert "".join(pieces[:count]).startswith(known)

    def test_half_a_character_waits(self):
        tokenizer = ours(byte_level())
        ids = tokenizer.encode("a字é🤗")
        assert pieces_of(tokenizer, ids, True) == ["a", "", "", "字", "é", "", "", "", "🤗", ""]
        assert pieces_of(tokenizer, ids[:2], True) == ["a", "", "�"]

    def test_an_invalid_byte_holds_nothing_back(self):
        tokenizer = ours(byte_level())
        start, letter = tokenizer.encode("字")[0], tokenizer.encode("a")[0]
        assert pieces_of(tokenizer, [start, start, letter], True) == ["", "�", "�a", ""]

    def test_the_space_that_stands_before_a_text_is_taken_off_once(self):
        tokenizer = ours(sentencepiece())
        ids = [tokenizer.backend.token_to_id(token) for token in ["▁a", "▁a", "▁", "▁▁", "b"]]
        assert pieces_of(tokenizer, ids, True) == ["a", " a", " ", "  ", "b", ""]
        assert pieces_of(tokenizer, ids[2:], True) == ["", "  ", "b", ""]
        nothing = [1, tokenizer.vocab_size]  # <s>, which is skipped, and an id without a token
        assert pieces_of(tokenizer, [*nothing, *ids], True) == ["", "", "a", " a", " ", "  ", "b", ""]
        space = tokenizer.backend.token_to_id("<0x20>")  # spelled in bytes it is taken off as well
        assert pieces_of(tokenizer, [space, space], True) == ["", " ", ""]

    def test_special_tokens(self):
        tokenizer = ours(byte_level())
        ids = tokenizer.encode("<s>a<think>b</s>")
        assert tokenizer.decode(ids) == "a<think>b"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a<think>b</s>"

    def test_the_last_of_many_tokens_costs_what_the_first_does(self, both):
        tokenizer, _ = both
        decoder = tokenizer.decoder()
        ids = tokenizer.encode("ab é字 " * 10)

        def seconds(repeats):
            start = time.perf_counter()
            for _ in range(repeats):
                for token_id in ids:
                    decoder.push(token_id)
            return time.perf_counter() - start

        seconds(20)
        first = min(seconds(20) for _ in range(5))
        seconds(2000)
        assert min(seconds(20) for _ in range(5)) < 20 * first

    def test_other_decoders_are_refused(self):
        backend = byte_level()
        backend.decoder = decoders.WordPiece()
        with pytest.raises(CheckpointError, match="decoder WordPiece is not supported"):
            ours(backend)


class TestEncoding:
    def test_bos_is_added_when_asked_for(self):
        backend = byte_level()
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 259)])
        tokenizer = ours(backend, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (259, 260)
        assert tokenizer.encode("a") == [259, *tokenizer.encode("a", add_special_tokens=False)]

    def test_training_limits_are_lifted(self):
        backend = byte_level()
        backend.enable_truncation(4)
        backend.enable_padding(length=100)
        assert len(ours(backend).encode("abcdefgh" * 4)) == 31 - 3

    def test_lone_surrogates_are_refused(self):
        with pytest.raises(ValueError, match="lone surrogate"):
            ours(byte_level()).encode("a\ud800")

    def test_vocab_size_counts_up_to_the_last_id(self):
        assert ours(byte_level()).vocab_size == 259 + 4
        assert ours(Tokenizer(models.BPE(vocab={"a": 0, "b": 7}, merges=[]))).vocab_size == 8

    def test_special_tokens_without_an_id(self):
        tokenizer = ours(byte_level(), {"eos_token": "<none>", "pad_token": None})
        assert tokenizer.eos_token_id is None
        assert tokenizer.bos_token_id is None
        assert "pad_token" not in tokenizer.special_tokens


CHATML = (
    "{% for message in messages %}\n"
    "    {% if message.role == 'system' %}{% continue %}{% endif %}\n"
    "<s>{{ message['role'] }}: {{ message['content'] | trim }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{% generation %}assistant:{% endgeneration %}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": " <b>hi</b> "}]


class TestChat:
    def test_rendering(self):
        tokenizer = ours(byte_level(), chat_template=CHATML)
        assert tokenizer.apply_chat_template(MESSAGES) == "<s>user: <b>hi</b>\nassistant:"
        assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == "<s>user: <b>hi</b>\n"

    def test_bos_comes_from_the_template_alone(self):
        backend = byte_level()
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 259)])
        tokenizer = ours(backend, {"bos_token": "<s>"}, "{{ bos_token }}{{ messages[0].content }}")
        assert tokenizer.chat([{"role": "user", "content": "a"}]) == [259, *tokenizer.encode("a", False)]

    def test_json_is_not_escaped_for_html(self):
        template = "{{ tools | tojson(indent=2) }}|{{ messages[0] | tojson }}"
        text = ours(byte_level(), chat_template=template).apply_chat_template(
            [{"role": "user", "content": "<é & 'x'>"}], tools=[{"a": 1}]
        )
        assert text == '[\n  {\n    "a": 1\n  }\n]|{"role": "user", "content": "<é & \'x\'>"}'

    def test_other_variables_and_the_date(self):
        template = "{{ enable_thinking }} {{ strftime_now('%Y') }} {{ tools is none }} {{ nothing is defined }}"
        text = ours(byte_level(), chat_template=template).apply_chat_template(MESSAGES, enable_thinking=False)
        assert text == f"False {time.strftime('%Y')} True False"

    def test_named_templates(self):
        tokenizer = ours(byte_level(), chat_template={"default": "plain", "tool_use": "tools"})
        assert tokenizer.apply_chat_template(MESSAGES) == "plain"
        assert tokenizer.apply_chat_template(MESSAGES, tools=[{}]) == "tools"
        with pytest.raises(CheckpointError, match="no chat template is named 'default'"):
            ours(byte_level(), chat_template={"rag": "x"}).apply_chat_template(MESSAGES)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ messages[5].content }}", "refuses these messages"),
            ("{{ messages[0].content + 1 }}", "refuses these messages"),
            ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses these messages"),
            ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
            ("{{ messages.append(1) }}", "refuses these messages"),
        ],
    )
    def test_what_a_template_refuses_is_a_value_error(self, template, message):
        with pytest.raises(ValueError, match=message):
            ours(byte_level(), chat_template=template).apply_chat_template(MESSAGES)

    def test_a_broken_template(self):
        with pytest.raises(CheckpointError, match="model: chat template, line 2: "):
            ours(byte_level(), chat_template="a\n{% for %}").apply_chat_template(MESSAGES)

    def test_no_template(self):
        with pytest.raises(ValueError, match="has no chat template"):
            ours(byte_level()).chat(MESSAGES)

    @pytest.mark.parametrize("messages", [[], "hi", {"role": "user"}, [{"content": "x"}], ["hi"], [{"role": 1}]])
    def test_messages_of_another_form(self, messages):
        with pytest.raises(ValueError, match="messages"):
            ours(byte_level(), chat_template=CHATML).chat(messages)


class TestDirectory:
    @pytest.fixture
    def path(self, tmp_path):
        byte_level().save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    @staticmethod
    def write_config(path, **config):
        (path / "tokenizer_config.json").write_text(json.dumps(config))

    def test_the_jinja_file_beats_the_config(self, path):
        self.write_config(path, chat_template="from the config")
        assert OurTokenizer.from_dir(path).apply_chat_template(MESSAGES) == "from the config"
        (path / "chat_template.jinja").write_text("from the file")
        assert OurTokenizer.from_dir(path).apply_chat_template(MESSAGES) == "from the file"

    def test_a_list_of_named_templates(self, path):
        self.write_config(path, chat_template=[{"name": "default", "template": "x"}, {"name": "rag", "template": "y"}])
        assert OurTokenizer.from_dir(path).apply_chat_template(MESSAGES) == "x"
        self.write_config(path, chat_template=["x"])
        with pytest.raises(CheckpointError, match="chat_template must be text or a list"):
            OurTokenizer.from_dir(path)

    def test_neither_config_nor_template_is_needed(self, path):
        tokenizer = OurTokenizer.from_dir(path)
        assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
        assert tokenizer.chat_template is None

    def test_the_config_decides_over_bos_and_eos(self, path):
        ends = {"bos_token": "<s>", "eos_token": "</s>"}
        plain = OurTokenizer.from_dir(path).encode("a")
        for config, expected in [
            (ends, plain),
            ({**ends, "add_bos_token": True}, [259, *plain]),
            ({**ends, "add_bos_token": True, "add_eos_token": True}, [259, *plain, 260]),
            ({"add_bos_token": True}, plain),
            ({**ends, "add_bos_token": False}, plain),
        ]:
            self.write_config(path, **config)
            assert OurTokenizer.from_dir(path).encode("a") == expected
        self.write_config(path, bos_token="<nope>", add_bos_token=True)
        with pytest.raises(CheckpointError, match="'<nope>' is to be added to every text but is no token"):
            OurTokenizer.from_dir(path)

    @pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"model": {"type": "BPE"}}', "\x00"])
    def test_a_broken_tokenizer_file(self, path, text):
        (path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: broken tokenizer") as error:
            OurTokenizer.from_dir(path)
        assert "\n" not in str(error.value)

    def test_a_broken_config_file(self, path):
        (path / "tokenizer_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
            OurTokenizer.from_dir(path)

    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json there"):
            OurTokenizer.from_dir(tmp_path)


def test_the_byte_alphabet_is_the_library_s():
    alphabet = tokenizer_module._byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
