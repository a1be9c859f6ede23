"""Does better search give better text? Probability a token against repetition, beams of 1 to 8.

    python -m benchmarks.curse            40 openings, 100 tokens each; 07 draws the result
    python -m benchmarks.curse --quick    a short look, nothing recorded

End marks are ignored, so that all texts have one length. Repetition is the share of 4-grams that
occurred earlier in the text.
"""

import json
import time

from benchmarks.common import arguments, save

OPENINGS = """It was a quiet morning in the city when
In a shocking finding, scientists discovered
The best way to learn a new language is
When the ship finally reached the shore,
My grandmother always told me that
The history of bread begins
On the third day of the expedition,
The most important thing about music is
After years of research, the team
There once was a king who
To make a good soup, you
The night sky over the desert
The old man opened the letter and
In the middle of the forest stood
Most people do not know that
The train was late again, and
She had never seen the sea before
The new law will change how
A good teacher knows
During the long winter,
The first computers were
If you want to grow tomatoes,
The detective looked at the map and
Nobody in the village remembered
The price of coffee has
Dear Sir or Madam, I am writing
Birds migrate because
The museum opened its doors in
At the end of the street there was
One of the strangest animals is
The mountain was higher than
Our company offers
The water in the lake had turned
In the year 1850,
The children were playing when
Every language has words for
The bridge was built by
What we call time is
The recipe calls for two eggs and
He walked into the room and said""".splitlines()


def measure(model, openings, width, tokens, at_once):
    "For each opening the beam's log-probability a token, its repetition, and its text."
    from decoding_book.beam import beam_search
    from decoding_book.greedy import repeated_ngrams

    found = []
    for i in range(0, len(openings), at_once):
        part = openings[i : i + at_once]
        for opening, (h,) in zip(part, beam_search(model, part, width, tokens, ignore_eos=True)):
            found.append(
                {
                    "opening": opening,
                    "width": width,
                    "logprob_per_token": round(h.logprob / tokens, 5),
                    "repeated_4grams": round(repeated_ngrams(h.ids), 4),
                    "text": h.text,
                }
            )
    return found


def main():
    from decoding_book.smollm import SmolLM2

    args = arguments(__doc__, "curse.json", dict(tokens=100), dict(tokens=12))
    openings = OPENINGS[:2] if args.quick else OPENINGS
    model, rows = SmolLM2(), []
    for width in (1, 2, 4, 8):
        start = time.perf_counter()
        found = measure(model, openings, width, args.tokens, 10)
        rows += found
        mean = {
            key: round(sum(r[key] for r in found) / len(found), 4)
            for key in ("logprob_per_token", "repeated_4grams")
        }
        print(
            json.dumps({"width": width, "seconds": round(time.perf_counter() - start, 1)} | mean),
            flush=True,
        )
    if not args.quick:
        save(args.out, tokens=args.tokens, rows=rows)


if __name__ == "__main__":
    main()
