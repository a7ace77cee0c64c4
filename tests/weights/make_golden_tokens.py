"""Writes golden_tokens.json: ids of varied texts in SmolLM2's vocabulary, by a plain byte-pair encoder.

    python make_golden_tokens.py MODEL_DIR          (needs `regex`; with transformers installed, compares with it too)

The encoder below shares no code with `tokenizers`: it cuts text by SmolLM2's published rules (each digit alone, then
GPT-2's pattern) and joins the pair with the lowest rank until none is left.
"""

# ruff: noqa: RUF001 (texts in many scripts are the point)

import itertools
import json
import sys
from pathlib import Path

import regex

GPT2_PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
DIGIT = regex.compile(r"(\p{N})")
TEXTS = [
    "Hello",
    "The capital of France is",
    " leading and trailing spaces  ",
    "  two   three    four     five",
    "tabs\tand\nnewlines\n\n\nand\r\nreturns \n",
    "it's we'll I'd they've you're IT'S WE'LL",
    "3.14159 and 2024-11-05, 1,000,000 or 0x7FFF; ½ ² ٣ 四",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\nclass A:\n\tpass",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 3.5e-7f; }",
    '{"key": [1, 2.5, null, true], "s": "\\u00e9\\n"}',
    "Ünïcödé façade naïve coöperate Straße ﬁne",
    "中文测试，包括标点。日本語のテスト、ひらがなとカタカナ。한국어 시험",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया",
    "🤗 👩‍👩‍👧‍👦 🇫🇷 ✊🏽 a😀b",
    "e\u0301 vs \u00e9, A\u030a, \u200bzero width\u200d, nbsp\u00a0here, \ufeffbom",
    "<|im_start|>user\nspecial tokens<|im_end|>\n<|endoftext|> <repo_name>x",
    "not special: <|im_start <im_end|> |>",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 math: ∑∫√≠≈∞ → ← ⇒ €£¥",
    "a" * 100 + " " + "ab" * 50,
    "https://example.com/path?query=1&other=%20#frag user@example.org C:\\dir\\file.txt",
    "\n",
    " ",
    "\x00\x01\x7f control",
]


def main(model_dir: Path) -> None:
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))
    encoder = Encoder(tokenizer)
    cases = [{"text": text, "ids": encoder.encode(text)} for text in TEXTS]
    try:
        from transformers import AutoTokenizer
    except ImportError:
        print("transformers is not installed: not compared")
    else:
        theirs = AutoTokenizer.from_pretrained(model_dir)
        for case in cases:
            assert theirs.encode(case["text"]) == case["ids"], case
            case_text = theirs.decode(case["ids"], clean_up_tokenization_spaces=False)
            assert case_text == case["text"], case
        print(f"transformers agrees on {len(cases)} texts")
    out = Path(__file__).with_name("golden_tokens.json")
    out.write_text(json.dumps(cases, indent=None, ensure_ascii=True).replace('}, {"text"', '},\n{"text"') + "\n")


class Encoder:
    def __init__(self, tokenizer):
        self.vocab = tokenizer["model"]["vocab"]
        self.ranks = {tuple(m if isinstance(m, list) else m.split(" ")): i
                      for i, m in enumerate(tokenizer["model"]["merges"])}  # fmt: skip
        special = [token["content"] for token in tokenizer["added_tokens"]]
        self.special = regex.compile("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        self.characters = {b: chr(b) for b in printable}
        for byte in range(256):
            if byte not in self.characters:
                self.characters[byte] = chr(256 + len(self.characters) - len(printable))

    def encode(self, text):
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.vocab[part])
            else:
                for piece in (p for p in DIGIT.split(part) if p):
                    for word in GPT2_PATTERN.findall(piece):
                        ids += self.merge([self.characters[byte] for byte in word.encode()])
        return ids

    def merge(self, symbols):
        while len(symbols) > 1:
            rank, at = min((self.ranks.get(pair, 1e9), i) for i, pair in enumerate(itertools.pairwise(symbols)))
            if rank == 1e9:
                break
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self.vocab[symbol] for symbol in symbols]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
