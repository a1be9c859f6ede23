"""What vLLM documents of its per-request logits processors, for tests where it is not installed: an
`AdapterLogitsProcessor` as its V1 engine has it, and an engine that joins, moves and drops requests
in one batch. Written for these tests from the documented behaviour; vLLM itself was not run."""

from functools import partial
from inspect import signature
from types import SimpleNamespace

import torch


class AdapterLogitsProcessor:
    "Keeps one processor a request; a subclass makes it from the request's parameters."

    def __init__(self, vllm_config=None, device="cpu", is_pin_memory=False):
        self.places = {}  # row of the batch: the request's processor, which holds its lists of ids

    def join(self, place, params, prompt, new):
        self.places.pop(place, None)
        process = self.new_req_logits_processor(params)
        if process:
            ids = (prompt, new) if len(signature(process).parameters) == 3 else (new,)
            self.places[place] = partial(process, *ids)

    def move(self, old, new):
        if old in self.places:
            self.places[new] = self.places.pop(old)

    def apply(self, logits):
        for place, process in self.places.items():
            logits[place] = process(logits[place])
        return logits


def engine(model, processor, requests, n, at_once=2):
    """The greedy ids of each request (prompt, params), `n` each. At most `at_once` run together; as
    one ends the last takes its place."""
    waiting, running, done = list(enumerate(requests)), [], {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, (prompt, params) = waiting.pop(0)
            running.append(SimpleNamespace(number=number, prompt=prompt, new=[]))
            processor.join(len(running) - 1, params, prompt, running[-1].new)
            if number % 2 == 0:  # the batch fills step by step, so rows differ in age
                break
        rows = [model(torch.tensor([r.prompt + r.new])).logits[0] for r in running]
        logits = processor.apply(torch.stack(rows).float())
        assert not processor.is_argmax_invariant()  # else the engine may leave it out when greedy
        for r, row in zip(running, logits):
            r.new.append(row.argmax().item())
        for place in reversed(range(len(running))):
            if len(running[place].new) == n:
                ended = running[place]
                done[ended.number] = ended.new
                processor.places.pop(place, None)
                last = running.pop()
                if last is not ended:
                    running[place] = last
                    processor.move(len(running), place)
    return [done[number] for number in range(len(requests))]
