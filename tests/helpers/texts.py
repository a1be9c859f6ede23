"What SmolLM2 is asked in several tests, and how its answers are looked at."

import torch

TOLERANCE = 2e-4


PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "It was a quiet morning in the city when",
    "def fibonacci(n):\n",
    "In a shocking finding, scientists discovered",
    "x  12 + 34 =",
    "Hello",
    "1 2 3 4 5 6 7 8",
    "The best programming language for",
    "I like cold coffee",
    "Dear Sir or Madam,",
    "To be, or not to be, that is the",
    "A",
    "SELECT * FROM users WHERE",
    "Water boils at",
    "La capitale de la France est",
    "½ ² 🙂",
    "import numpy as np\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "The",
    "My favourite season is",
    "The three laws of motion are",
    "He opened the door and",
    "Q: Why?\nA:",
    "A language model scores the next token and nothing else. A loop turns those scores into text. "
    * 4,
]


AWKWARD = [
    "",
    " ",
    "  ",
    "x  12",
    "½ ²",
    "12½",
    "🙂",
    "👩‍🚀👍🏽",
    "one\r\ntwo\r\n\r\n",
    " lead",
    "trail ",
    "trail  ",
    "a\tb\n\n c",
    "I'll they've 'S",
    "3.14e-10",
    "٣٤ Ⅷ",
    "日本語のテキスト",
    "é e\u0301",
    "\x00\x7f",
    "<|im_end|>",
    "a<|im_start|>user\nHi <|im_end|> b",
    "<|endoftext|><|endoftext|>",
    "<|im_",
    "naïve café",
    "a" * 300,
    "\u00a0\u2003x",
    "Ġ Ċ Â",
]


def ids_of(model, text):
    return torch.tensor([model.encode(text)])


def forced(model, prompt_ids, ids):
    """The logits after each prefix of a text, alone and without a cache, in one pass: if each best
    token is the text's own next token, then the text is the greedy text, token after token."""
    with torch.inference_mode():
        out = model(torch.cat([prompt_ids, ids])[None, :-1])
    return out.logits[0, len(prompt_ids) - 1 :]


CONTROLS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
