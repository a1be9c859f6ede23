"""Break named lines of the package one at a time: each break must turn a test red.

    python tools/mutate.py                all of them
    python tools/mutate.py loop smollm    those of two modules
    python tools/mutate.py --list         what there is

The package is copied to a folder under build/ and broken there; the tests named in the row run against the copy. To add a
mutation, add a row: the module, a piece of its text that occurs exactly once, what takes its place, the tests that
should notice (pytest arguments), and why it matters.
"""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIES = ROOT / "build" / f"mutate-{os.getpid()}"  # two runs do not meet

# (module, old text, new text, tests, what is broken)
LOOP, EDGES = "tests/test_loop.py", "tests/test_loop_edges.py"
SMOLLM = "tests/test_smollm.py -k "  # the file takes minutes: for each break its own test
SEARCH, BEAM, SHOW, TOY = (f"tests/test_{name}.py" for name in ("search", "beam", "show", "toy"))
TREES = SEARCH + " -k 'tree or boxes or names or paths'"
ENTROPY, ENTROPIX = "tests/test_entropy.py -k 'not smollm'", "tests/test_entropix.py -k 'not real_model'"
CUDA, ON_GPU = "tests/test_cuda.py -k ", "tests/test_cuda_device.py -k "
MUTATIONS = [
    ("loop", "logits.argmax(-1)", "logits.argmin(-1)", LOOP, "greedy takes the worst token"),
    ("loop", "ids[i, -len(r):], mask[i, -len(r):]", "ids[i, :len(r)], mask[i, :len(r)]", LOOP,
     "padding on the right"),
    ("loop", "new_mask = None if mask[:, fed:].all() else mask[:, fed:]", "new_mask = None", LOOP,
     "the model never hears of the padding"),
    ("loop", "{model.eos, *getattr", "{*getattr", LOOP,
     "the end mark does not end a row"),
    ("loop", '"stop" if id in end_ids else None', "None", LOOP, "a stop id does not end a row"),
    ("loop", "cache.keep(keep)", "cache.keep(list(range(len(keep))))", EDGES,
     "the cache keeps the wrong rows when one has ended"),
    ("loop", "given[keep], row[keep]", "given[keep], row[:len(keep)]", LOOP,
     "rows change their numbers when one has ended"),
    ("loop", "own.gather(1, ids[:, None])[:, 0]", "logits.gather(1, ids[:, None])[:, 0]",
     EDGES, "log-probabilities are not normalised"),
    ("loop", "text[:len(text) - max(starts, default=0)]", "text", LOOP,
     "the beginning of a stop string is released"),
    ("loop", "text[:min(cuts)]", "text[:max(cuts)]", EDGES, "cut at the last stop string, not the first"),
    ("loop", "(~log_z.isfinite()).nonzero()", "(~log_z.isfinite()).nonzero()[:0]", LOOP,
     "NaN logits pass"),
    ("loop", "ids[:, a + 1:b + 1, None]", "ids[:, a:b, None]", LOOP, "score is off by one"),
    ("loop", "if length >= limit", "if length > limit", LOOP, "one token too many for the context"),
    ("loop", "except KeyboardInterrupt: pass", "except KeyboardInterrupt: raise", LOOP,
     "an interrupt loses what was generated"),
    ("transformer", "key_mask[:, None] & (slot <= own)",
     "key_mask[:, None]",
     SMOLLM + "two_chunks", "a position sees the future"),
    ("transformer", "key_mask[:, None] & (slot <= own)",
     "(key_mask[:, None] | True) & (slot <= own)",
     SMOLLM + "left_padding", "padded keys are attended"),
    ("smollm", "scores = scores.masked_fill(~allowed[:, 0], -torch.inf)", "pass",
     SMOLLM + "by_hand", "one new position attends to padding"),
    ("smollm", "if stepwise or raw is not None else None", "if raw is not None or stepwise and [raw_scores(q[:, :, -1:], k)] else None",
     SMOLLM + "at_hand", "the scores of a step are computed twice"),
    ("smollm", ".float() / q.shape[-1] ** .5",
     ".float() / q.shape[-1]",
     SMOLLM + "raw_scores", "attention scores are divided by d, not its root"),
    ("transformer", "part[new, :, :n] = part[old, :, :n]",
     "part[new, :, :n] = part[new, :, :n]",
     SMOLLM + "reorder_and_keep", "reordering leaves keys and values where they were"),
    ("transformer", "self.mask[new, :n] = self.mask[old, :n]",
     "self.mask[new, :n] = self.mask[new, :n]",
     SMOLLM + "reorder_and_keep", "reordering leaves the mask where it was"),
    ("smollm", "F.silu(gate) * up",
     "F.silu(up) * gate",
     SMOLLM + "logits_agree", "SwiGLU gates the wrong half"),
    ("smollm", "pre_tokenizers.Digits(individual_digits=True),", "",
     SMOLLM + "known_ids", "digits are not set apart"),
    ("smollm", "blocks[:, 4:] & 15, blocks[:, 4:] >> 4",
     "blocks[:, 4:] >> 4, blocks[:, 4:] & 15",
     SMOLLM + "file_is_read", "the halves of a byte are swapped"),
    ("smollm", "longest > self.context",
     "longest > 9 * self.context",
     SMOLLM + "long_cached", "a prompt longer than the context passes"),
    ("smollm", "if not 0 <= id < vocab_size",
     "if not 0 <= id <= vocab_size",
     SMOLLM + "bad_ids", "an id just outside the vocabulary passes"),
    ('noise', '(p.cumsum(-1) <= u[..., None])', '(p.cumsum(-1) < u[..., None])',
     'tests/test_noise.py', 'inverse CDF: a border belongs to the next piece'),
    ('noise', '.sum(-1).clamp(max=last)', '.sum(-1).clamp(max=p.shape[-1] - 1)',
     'tests/test_noise.py', 'inverse CDF leaves the support when the sum falls short'),
    ('noise', 'return mix(mix(token ^ a) ^ b)', 'return mix(token ^ a)',
     'tests/test_noise.py', "half of the key's state is ignored"),
    ('noise', 'for w in words:', 'for w in words[:-1]:', 'tests/test_noise.py', "the hash leaves out the draw's number"),
    ('noise', 'mix(b ^ a)\n    return a, b', 'mix(b ^ a)\n    return a, a', 'tests/test_noise.py', 'one stir for two'),
    ('noise', 'if not ((x >= 0) & x.isfinite()).all() or x.sum() <= 0:', 'if False:', 'tests/test_promises.py',
     'NaN passes the chi-square test'),
    ('exhaustive', 'if len(best) == n_best: others.append(best[-1].logprob)', 'pass', 'tests/test_promises.py',
     'the bound forgets the texts that were refused'),
    ('beam', 'math.inf, False, beam.steps', 'math.inf, True, beam.steps', 'tests/test_promises.py', 'a beam claims a proof'),
    ('toy', 'ended = torch.isin(token, torch.tensor([*ends], dtype=torch.long))', 'ended = token == model.eos',
     'tests/test_promises.py', 'one end mark of several'),
    ('noise', 'b = mix(b ^ a)', 'b = mix(b)',
     'tests/test_noise.py', 'the second half does not depend on the key'),
    ('noise', 'x = (x ^ x >> 15) * MULTIPLIERS[1] & 0xffffffff', 'x = (x ^ x >> 15) & 0xffffffff',
     'tests/test_noise.py', 'one product less in the hash'),
    ('noise', 'return [parts[0] & 0xffffffff, parts[0] >> 32 & 0xffffffff, *parts[1:]]', 'return [parts[0] & 0xffffffff, 0, *parts[1:]]',
     'tests/test_noise.py', 'the high word of the seed is lost'),
    ('noise', 'w = 1 - (float64(bits) + 0.5) * 2**-32', 'w = 1 - (float64(bits >> 9) + 0.5) * 2**-23',
     'tests/test_noise.py', '23 bits of resolution'),
    ('noise', '(float64(bits) + 0.5) * 2**-32', 'float64(bits) * 2**-32',
     'tests/test_noise.py -k ends', 'the luckiest bits give infinite noise'),
    ('noise', 'm, e = m * (1 + low), float64(e) - low', 'm, e = m, float64(e)',
     'tests/test_noise.py -k logarithm', 'the series is used too far from 1'),
    ('noise', 'rest = s * (half + series) + e * LN2_LOW', 'rest = s * (half + series)',
     'tests/test_noise.py -k logarithm', 'the low part of log 2 is lost'),
    ('noise', 'return e * LN2_HIGH - ((half - rest) - f)', 'return e * LN2_HIGH + (f - half + rest)',
     'tests/test_noise.py -k bits', 'another order of the sums: other last bits'),
    ('noise', 'g = -exact_log(-exact_log(w))', 'g = -(-w.log()).log() if torch.is_tensor(w) else -np.log(-np.log(w))',
     'tests/test_noise.py -k bits', "the libraries' logarithms, which differ"),
    ('noise', 'return (z - best + noise).argmax(-1)', 'return (z + noise).argmax(-1)',
     'tests/test_noise.py', 'large logits swallow the noise'),
    ('noise', 'return (z - best + noise).argmax(-1)', 'return z.shape[-1] - 1 - (z - best + noise).flip(-1).argmax(-1)',
     'tests/test_noise.py', 'ties go to the higher id'),
    ('noise', 'if not best.isfinite().all(): log_normalizer(z)', 'if False: log_normalizer(z)',
     'tests/test_noise.py', 'bad logits are not refused'),
    ('noise', 'if not 0 <= v < 2**bits: raise', 'if not v < 2**bits: raise',
     'tests/test_noise.py', 'a negative part of a key passes'),
    ('noise', 'if (counts[p == 0] > 0).any(): return 0.', 'if False: return 0.',
     'tests/test_noise.py', 'draws outside the support pass the chi-square test'),
    ('temperature', 'return torch.where(T > 0, scaled, z.where(is_first, -torch.inf))', 'return scaled',
     'tests/test_temperature_topk.py', 'T = 0 is no longer greedy'),
    ('temperature', 'z.where(is_first, -torch.inf))', 'z.where(z == best, -torch.inf))',
     'tests/test_temperature_topk.py', 'at T = 0 all maxima stay'),
    ('temperature', 'shift = best.where((best / t).isinf(), 0)', 'shift = 0',
     'tests/test_temperature_topk.py', 'z / T overflows'),
    ('temperature', '.clamp(min=limits.min).where(z > -torch.inf, z)', '.clamp(min=limits.min)',
     'tests/test_temperature_topk.py', 'a removed token comes back when the row overflows'),
    ('temperature', 'T.clamp(limits.smallest_normal, limits.max)', 'T.clamp(limits.smallest_normal)',
     'tests/test_temperature_topk.py', 'a huge T makes -inf / inf = NaN'),
    ('temperature', 'z = z if z.dtype == torch.float64 else z.float()', 'z = z.float()',
     'tests/test_temperature_topk.py', 'float64 is not kept'),
    ('temperature', 'if not z.amax(-1).isfinite().all(): log_normalizer(z)', 'if False: log_normalizer(z)',
     'tests/test_temperature_topk.py', 'bad logits are not refused'),
    ('temperature', 'if values.shape not in ((), rows):', 'if values.size not in (1, np.prod(rows)):',
     'tests/test_temperature_topk.py', 'a parameter of another shape passes'),
    ('temperature', '(low < v if open_low else low <= v)', '(low <= v)',
     'tests/test_temperature_topk.py', 'an open lower limit is accepted'),
    ('temperature', 'if isinstance(v, bool) or not isinstance(v, Real):', 'if not isinstance(v, Real):',
     'tests/test_temperature_topk.py', 'True is a number'),
    ('topk', 'equal & (equal.cumsum(-1) <= left)', 'equal',
     'tests/test_temperature_topk.py', 'all that tie with the k-th stay'),
    ('topk', '(equal.cumsum(-1) <= left)', '(equal.flip(-1).cumsum(-1).flip(-1) <= left)',
     'tests/test_temperature_topk.py', 'ties go to the higher id'),
    ('topk', 'above, equal = z > edge, z == edge', 'above, equal = z >= edge, z == edge',
     'tests/test_temperature_topk.py', 'more than k stay'),
    ('topk', 'if most == 0: return z.clone()', 'if most == 0: return z',
     'tests/test_temperature_topk.py', 'the result shares memory with the input'),
    ('topk', 'k = k.where(k < z.shape[-1], 0)', 'k = k.where(k <= 2**62, 0)',
     'tests/test_temperature_topk.py', 'k beyond the vocabulary breaks'),
    ('topk', 'int(k.max()) if', 'int(k.min()) if',
     'tests/test_temperature_topk.py', 'rows with unequal k'),
    ('topp', 'if boundary == "include": keep = before < p', 'if boundary == "include": keep = mass < p',
     'tests/test_topp.py', 'crossing token dropped'),
    ('topp', 'if boundary == "include": keep = before < p', 'if boundary == "include": keep = before <= p',
     'tests/test_topp.py', 'exceeds instead of reaches'),
    ('topp', 'keep | (p >= 1)', 'keep',
     'tests/test_topp.py', 'p = 1 not off'),
    ('topp', 'float64(weights).gather(-1, order)', 'float64(weights).float().gather(-1, order)',
     'tests/test_topp.py', 'sums in single precision'),
    ('topp', 'order = q.argsort(dim=-1, descending=True, stable=True)', 'order = q.argsort(dim=-1, stable=True).flip(-1)',
     'tests/test_topp.py', 'ties by higher id in the mask'),
    ('topp', 'if ties == "low": order = z.argsort(dim=-1, descending=True, stable=True)', 'if ties == "low": order = z.softmax(-1).argsort(dim=-1, descending=True, stable=True)',
     'tests/test_topp.py', 'ranked by probability, not by logit'),
    ('topp', 'float64(z - z.amax(-1, keepdim=True)) >= line', 'float64(z - z.amax(-1, keepdim=True)) > line',
     'tests/test_topp.py', 'min-p strict'),
    ('topp', 'float64(z - z.amax(-1, keepdim=True)) >= line', 'float64(z.softmax(-1)) >= m',
     'tests/test_topp.py', 'min-p without the maximum'),
    ('topp', 'ranked_prefix(order, whole_weights(z), p, boundary)', 'ranked_prefix(order, z.softmax(-1), p, boundary)',
     'tests/test_topp.py -k sizes', 'the total of a float32 softmax'),
    ('topp', 'line = p * mass[..., -1:]', 'line = p',
     'tests/test_topp.py', 'weights measured against 1'),
    ('topp', 'min(52 - (V - 1).bit_length(), 50)', 'min(54 - (V - 1).bit_length(), 52)',
     'tests/test_topp.py -k weights', 'the sum of the weights is no longer exact'),
    ('topp', 'n = library.floor(d * LOG2_E + 0.5)', 'n = library.floor(d * LOG2_E)',
     'tests/test_topp.py -k exponential', 'a rest of twice the size'),
    ('topp', 'share * coins(z.shape[-1]) + 0.5', 'share * coins(z.shape[-1])',
     'tests/test_topp.py -k weights', 'weights rounded down'),
    ('topp', 'line = exact_log(m).where(m > 0, -torch.inf)', 'line = exact_log(m)',
     'tests/test_topp.py -k "limits or infinity"', 'min-p of 0 is not off'),
    ('topp', '& (q > 0)', '',
     'tests/test_topp.py', 'probability 0 kept at p = 1'),
    ('penalties', 'torch.where(z > 0, z / t, z * t)', 'z / t',
     'tests/test_penalties.py', 'everything divided'),
    ('penalties', 'counts.scatter_add_(-1, ids, mask.long())', 'counts.scatter_add_(-1, ids, torch.ones_like(ids))',
     'tests/test_penalties.py', 'padding counted as token 0'),
    ('penalties', 'beta * (token_counts(ids, z, mask) > 0)', 'beta * token_counts(ids, z, mask)',
     'tests/test_penalties.py', 'presence counts'),
    ('penalties', '(z - (alpha * token_counts(ids, z, mask)).to(z.dtype)).where(z.isfinite(), z)', 'z - (alpha * token_counts(ids, z, mask)).to(z.dtype)',
     'tests/test_promises.py -k penalties', 'a removed token becomes NaN'),
    ('sampler', '(there & ~after.isfinite())', '((q > 0) & ~after.isfinite())',
     'tests/test_promises.py -k trace', 'a trace forgets removed tokens of no probability'),
    ('penalties', 'mask.unfold(-1, size, 1).all(-1) & ', '',
     'tests/test_penalties.py', 'padded windows ban'),
    ('penalties', 'start = ids.shape[-1] - size + 1', 'start = ids.shape[-1] - size',
     'tests/test_penalties.py', 'n-gram tail one too long'),
    ('penalties', '& (generated < least)', '& (generated <= least)',
     'tests/test_penalties.py', 'end mark banned one step too long'),
    ('penalties', '_fail(bad, name, value, f"takes', '_fail(bad & False, name, value, f"takes',
     'tests/test_penalties.py', 'overflow not refused'),
    ('sampler', 'ORDER = ("temperature", "top_k", "top_p", "min_p")', 'ORDER = ("temperature", "top_k", "min_p", "top_p")',
     "tests/test_sampler.py -k 'after_top_p or oracle'", 'min-p before top-p'),
    ('sampler', 'elif name == "top_k": z = top_k(z, value)', 'elif name == "top_k": z = top_k_and_ties(z, value)',
     'tests/test_sampler.py -k oracle', 'ties at the k-th kept'),
    ('sampler', 'cut = top_p(full if params.joint else z,', 'cut = top_p(full,',
     'tests/test_sampler.py -k oracle', 'top-p on the full row'),
    ('sampler', 'context.row if own.rows is None else own.rows, context.lengths)', 'context.row if own.rows is None else own.rows, context.ids.shape[1])',
     "tests/test_sampler.py -k 'alone'", 'position counts padding'),
    ('sampler', 'own = self.at(context.row, _rows_of_call(context))', 'own = self.at(torch.arange(len(context.row)), _rows_of_call(context))',
     "tests/test_sampler.py -k 'alone'", 'parameters of the wrong row after one has ended'),
    ('sampler', 'mask & (mask.cumsum(-1) > given)', 'mask & (mask.cumsum(-1) >= given)',
     "tests/test_sampler.py -k 'penalties_in or minimum'", "the prompt's last token counts as generated"),
    ('sampler', 'logprob = float64(z).log_softmax(-1)', 'logprob = float64(logits).log_softmax(-1)',
     "tests/test_sampler.py -k 'chi_square'", 'log-probability under the unfiltered law'),
    ('sampler', 'return float64(z).softmax(-1).to(z)', 'return z.softmax(-1)',
     "tests/test_sampler.py -k 'off_changes'", 'the law has a float32 total'),
    ('sampler', '"sglang": dict(boundary="exceed", joint=True)', '"sglang": dict(joint=True, ties="all")',
     'tests/test_sampler.py -k dialects', "SGLang's dialect"),
    ('sampler', 'mass, q = 1 - q[removed]', 'mass, q = q[removed]',
     'tests/test_sampler.py -k trace', "the trace's mass"),
    ('transformer', 'key_mask[:, None] & (slot <= own)', 'key_mask[:, None] & (slot <= own + 1)',
     "tests/test_transformer.py -k 'future or torch or brute'", 'mask off by one'),
    ('transformer', 'key_mask[:, None] & (slot <= own)', '(slot <= own)[None]',
     "tests/test_transformer.py -k 'padded or torchs'", 'padded key attended'),
    ('transformer', 'return q @ k.mT / q.shape[-1] ** .5', 'return q @ k.mT',
     "tests/test_transformer.py -k 'equals_torch or spread'", 'sqrt d_k left out'),
    ('transformer', 'if step < warmup: return peak * (step + 1) / warmup', 'if step < warmup: return peak',
     "tests/test_transformer.py -k 'learning_rate or same_steps or warm'", 'warm-up gone'),
    ('transformer', 'for g in gradients: g.mul_((limit / (norm + 1e-6)).clamp(max=1))', 'pass',
     "tests/test_transformer.py -k 'clip or same_steps'", 'clip gone (function)'),
    ('transformer', 'norm = clip_gradient(self.model.parameters(), r.clip)', 'norm = 0.',
     "tests/test_transformer.py -k 'clipped or same_steps or gradients_and'", 'clip gone (trainer)'),
    ('transformer', 'square / (1 - b ** self.steps)', 'square',
     "tests/test_transformer.py -k 'adam'", "Adam's squares not corrected"),
    ('transformer', '-rate / (1 - a ** self.steps)', '-rate',
     "tests/test_transformer.py -k 'adam'", "Adam's means not corrected"),
    ('transformer', 'return self.down(self.up(x).relu())', 'return self.down(F.gelu(self.up(x)))',
     "tests/test_transformer.py -k 'torchs'", 'GELU for ReLU'),
    ('transformer', 'x = self.attention_norm(x + mixed)', 'x = self.attention_norm(mixed)',
     "tests/test_transformer.py -k 'torchs'", 'residual gone'),
    ('transformer', 'x = self.attention_norm(x + mixed)', 'x = x + mixed',
     "tests/test_transformer.py -k 'torchs'", 'LayerNorm gone'),
    ('transformer', 'return torch.stack([angles.sin(), angles.cos()], -1)', 'return torch.stack([angles.cos(), angles.sin()], -1)',
     "tests/test_transformer.py -k 'sinusoids'", 'sines and cosines swapped'),
    ('transformer', '(keys.cumsum(1) - 1).clamp(min=0)[:, -T:]', 'torch.arange(keys.shape[1])[None, -T:].expand(len(keys), -1)',
     "tests/test_transformer.py -k 'padded or context'", 'padding counts as positions'),
    ('transformer', 'if places.max() >= self.context:', 'if False:',
     "tests/test_transformer.py -k 'bad_input or context'", 'context overflow not refused'),
    ('transformer', 'ignore_index=model.start', 'ignore_index=-100',
     "tests/test_transformer.py -k 'by_hand'", 'start marks count in the loss'),
    ('transformer', 'r.seed * 10 ** 7 + n', 'r.seed * 10 ** 7 + self.adam.steps % 2',
     "tests/test_transformer.py -k 'same_steps'", 'rows do not follow the step'),
    ('transformer', 'rows[:, 1:].flatten()', 'rows[:, :-1].flatten()',
     "tests/test_transformer.py -k 'by_hand or same_steps'", 'targets off by one'),
    ('transformer', 'self.check("the loss", loss.item())\n', 'pass\n',
     "tests/test_transformer.py -k 'nan'", 'NaN loss not caught'),
    ('transformer', 'self.check("the gradient", norm)\n', 'pass\n',
     "tests/test_transformer.py -k 'gradients_and'", 'infinite gradient not caught'),
    ('transformer', 'self.check("the held-out loss", loss)\n', 'pass\n',
     "tests/test_transformer.py -k 'gradients_and'", 'broken weights are saved'),
    ('transformer', 'self.adam.steps = self.step\n', 'pass\n',
     "tests/test_transformer.py -k 'cut_anywhere'", "Adam's count not resumed"),
    ('transformer', 'os.replace(beside, path)', 'import shutil; shutil.copyfile(beside, path)',
     "tests/test_transformer.py -k 'writing'", 'checkpoint not replaced atomically'),
    ('transformer', 'if notes["sha256"] != _checksum(tensors): raise', 'if False: raise',
     "tests/test_transformer.py -k 'damaged'", 'checksum ignored'),
    ('transformer', 'part[new, :, :n] = part[old, :, :n]', 'part[new, :, :n] = part[new, :, :n]',
     "tests/test_transformer.py -k 'grow'", 'reorder leaves keys'),
    ('transformer', 'self.mask[new, :n] = self.mask[old, :n]', 'self.mask[new, :n] = self.mask[new, :n]',
     "tests/test_transformer.py -k 'reorder'", 'reorder leaves the mask'),
    ('transformer', 'if cache is not None: cache.length += T', 'if cache is not None: cache.length += 1',
     "tests/test_transformer.py -k 'cached'", 'cache length off'),
    ('transformer', 'if self.length + T > self.capacity[1]:', 'if self.length + T > self.capacity[1] + 1:',
     "tests/test_transformer.py -k 'bad_input'", 'cache overflow'),
    ("exhaustive", "complete[ends] = True", "pass", SEARCH, "an end mark does not end a text"),
    ("exhaustive", "n == length, device", "False, device", SEARCH, "a text at the length limit is not complete"),
    ("exhaustive", ".sort(descending=True, stable=True).indices[:n]    # a tie", ".sort(descending=True, stable=True).indices[1:n + 1]    # a tie",
     SEARCH, "the first of equal values is lost"),
    ("exhaustive", "((sums > -math.inf) & ~complete)", "(sums > -math.inf)", SEARCH, "texts go on after their end mark"),
    ("exhaustive", "key < self.done[-1][:2]", "key > self.done[-1][:2]", SEARCH, "best-first prunes what could still win"),
    ("exhaustive", "heapq.heappush(self.heap, (*rest, skip + chunk, total, steps))", "pass", SEARCH,
     "continuations beyond the first chunk are forgotten"),
    ("exhaustive", "proven = not (", "proven = (", SEARCH, "a search that gave up calls itself proven"),
    ("exhaustive", "if texts > limit:", "if texts > 10 * limit:", SEARCH, "the limit is not the limit"),
    ("exhaustive", "cache.reorder([0] * len(texts))", "cache.reorder([0])", SEARCH,
     "one row of cache for several texts"),
    ("greedy", "range(len(ids) - n + 1)", "range(len(ids) - n)", SEARCH, "the last run is not counted"),
    ("greedy", "1 - len(set(runs)) / len(runs)", "len(set(runs)) / len(runs)", SEARCH, "repetition is its opposite"),
    ("greedy", "if n < 1:", "if n < 0:", SEARCH, "runs of no tokens are counted"),
    ("greedy", 'one.reason in ("eos", "stop")', 'one.reason == "stop"', SEARCH, "a text that ended is called cut"),
    ("greedy", "total = sum(logprobs.tolist())", "total = logprobs.mean().item()", SEARCH, "the mean in place of the sum"),
    ("beam", "total / n ** self.penalty", "total * n ** self.penalty", BEAM, "the length penalty is upside down"),
    ("beam", "return -self.score, self.ids", "return -self.score, tuple(-i for i in self.ids)", SEARCH, "ties go to the larger ids"),
    ("beam", "[p for p in kept if not p.finished]", "[p for p in new if not p.finished][:beam.width]", SEARCH,
     "finished texts do not compete for places"),
    ("beam", "return beam.finished[beam.n_best - 1].score > hope", "return True", SEARCH, "early stopping without the bound"),
    ("beam", "rows += [at + p.parent for p in beam.running]", "rows += [at + i for i, p in enumerate(beam.running)]", BEAM,
     "the cache keeps the rows of other paths"),
    ("beam", "zip(new[:beam.width], stops) if stop]", "zip(new, stops) if stop]", BEAM, "Hugging Face: ended texts outside the first k count"),
    ("beam", "len(beam.finished) < beam.width: return False", "len(beam.finished) < 1: return False", BEAM,
     "Hugging Face: one ended text is enough to stop"),
    ("beam", 'beam.early == "never" and beam.penalty > 0 else n', 'beam.early != "never" and beam.penalty > 0 else n', BEAM,
     "Hugging Face: 'never' and False are swapped"),
    ("beam", "        at += size\n", "        at += 0\n", BEAM, "a second prompt reads the first one's rows"),
    ("beam", "sums[:, n - 1] == sums[:, n]) & (sums[:, n] > -math.inf)", "sums[:, n - 1] == sums[:, n]) & (sums[:, n] > math.inf)", SEARCH,
     "ties at the cut are left to topk"),
    ("trees", "mass[text[:n]] = mass.get(text[:n], 0.) + p", "mass[text[:n]] = p", TREES, "a prefix has one text's probability"),
    ("trees", "key=lambda c: -mass[c]", "key=lambda c: mass[c]", TREES, "the least probable word on top"),
    ("trees", "            top += mass[child]\n", "            top += mass[child] / 2\n", TREES, "bands overlap"),
    ("trees", "sum(map(mass.get, thin))", "0.", TREES, "the thin bands lose their mass"),
    ("trees", "        at = max(y, free)\n", "        at = y\n", TREES, "names overlap"),
    ("trees", "if tuple(text) not in mass:", "if False:", TREES, "a path outside the tree is drawn"),
    ("show", "max(-logprob / math.log(2), 0.0)", "max(-logprob, 0.0)", SHOW, "nats are called bits"),
    ("show", "if .9995 <= p < 1:", "if False:", SHOW, "a false 100 %"),
    ("show", "escape(text.encode", "str(text.encode", SHOW, "text is read as HTML"),
    ("show", "if at is not None else rows + [(token, logprob, True)]", "if True else rows", SHOW,
     "a chosen token outside the list is not shown"),
    ("show", "if math.isnan(value) or value > 1e-6:", "if math.isnan(value):", SHOW, "a probability passes for a log-probability"),
    ("show", 'tabindex="0" role="group"', 'role="group"', SHOW, "tokens cannot be reached by keyboard"),
    ("show", "finally: mpl.rcParams.update(old)", "finally: pass", SHOW, "a figure changes every later figure"),
    ("toy", "return table.log()", "return table", TOY, "probabilities in place of logits"),
    ("toy", "| (table < 0).any(-1)", "", TOY, "negative probabilities pass"),
    ("toy", "if self.context else min(prefix.shape[1], 1)", "", TOY, "a Markov table looks at the whole text"),
    ("toy", "ids[lengths == n, ids.shape[1] - n:]", "ids[lengths == n, :n]", TOY, "padding is read as words"),
    ("toy", "mask[:, :-1] & ~mask[:, 1:]", "mask[:, 1:] & ~mask[:, 1:]", TOY, "right padding passes"),
    ("entropy", "H = (total.log() - mean) / math.log(2)", "H = total.log() - mean", ENTROPY, "entropy in nats"),
    ("entropy", "(total * math.log(2)**2)", "(total * math.log(2))", ENTROPY, "varentropy in a unit of its own"),
    ("entropy", "below = (z - z.amax(-1, keepdim=True)).clamp_(min=-1000)", "below = z - z.amax(-1, keepdim=True)", ENTROPY,
     "a removed token makes NaN"),
    ("entropy", "s = s.where(real, s.new_full((), torch.finfo(s.dtype).min))", "s = s.nan_to_num(0)", ENTROPY, "padded keys take part in the softmax"),
    ("entropy", "bits.var(-1, correction=0)", "bits.var(-1)", ENTROPY, "another variance over heads"),
    ("entropy", "1 - gap / 2,", "gap / 2,", ENTROPY, "agreement with the wrong sign"),
    ("entropy", "gap / keys, strength", "gap / s.shape[-1], strength", ENTROPY, "padding counts in the disagreement"),
    ("entropy", "else s.abs() * real", "else s.abs().clamp(max=1e9)", ENTROPY, "padding counts in the interaction"),
    ("entropy", "given[context.row, context.lengths]", "given[context.row, context.lengths - 1]", ENTROPY,
     "a text is followed one token late"),
    ("entropy", "not key_mask.is_cuda and key_mask.all()", "key_mask.all()", ENTROPIX, "measuring attention waits for the GPU"),
    ("entropy", "below = (s - s.amax(-1, keepdim=True))", "below = s.sub_(s.amax(-1, keepdim=True))", ENTROPY, "the model's scores are overwritten"),
    ("entropix", "inside.int().argmax(0)", "4 - inside.flip(0).int().argmax(0)", ENTROPIX, "the last corner wins, not the first"),
    ("entropix", "(ent < c.high_ent_thresh) & wild, (ent", "(ent < c.low_ent_thresh) & wild, (ent", ENTROPIX,
     "published LEHV asks for low entropy"),
    ("entropix", "k.trunc(), k.round())", "k.round(), k.round())", ENTROPIX, "published LEHV rounds its top-k"),
    ("entropix", "getattr(found, agreement), found.interaction", "found.agreement, found.interaction", ENTROPIX,
     "the published form gets the repaired agreement"),
    ("entropix", "rule(c.temp * formula, 0, c.max_temp)", "rule(c.temp * formula, 0)", ENTROPIX, "the temperature has no cap"),
    ("entropix", "(1.5 * ONE - .5 * AGREE), 1)", "(ONE + .5 * AGREE), 1)", ENTROPIX, "agreement widens top-k"),
    ("entropix", "(branch == 1) & asked", "(branch == 1) & ~asked", ENTROPIX, "asks again when it has just asked"),
    ("entropix", "context.lengths - context.prompt_lengths >= n", "context.lengths >= n", ENTROPIX,
     "a question in the prompt counts as asked"),
    ("entropix", "parts[\"draw\"] = torch.cat([first * 0, later])", "pass", ENTROPIX, "the five draws share their noise"),
    ("entropix", "z < z.amax(1, keepdim=True)", "z > z.amin(1, keepdim=True)", ENTROPIX, "the least likely draw is kept"),
    ("entropix", "worse[..., :-1].pow(n)", "worse[..., :-1].pow(n + 1)", ENTROPIX, "the law of the best of n is off by one draw"),
    ("entropix", "share[:, 4] = x[:, 4]", "pass", ENTROPIX, "agreement is measured against its usual value"),
    ("entropix", "more = first if logits.is_cuda else many", "more = many", ENTROPIX, "the draw looks at the GPU's decision"),
    ("entropix", "drawn.T.clamp(min=0)", "drawn.T", ENTROPIX, "a row without a token stops the batch"),
    ("entropix", "ids.masked_fill(speaking & (done == i), id)", "torch.where(speaking, torch.tensor(clarify, device=ids.device)[done], ids)",
     ENTROPIX, "the clarifying text is sent to the GPU at each step"),
    ("entropix", "x if device.type == \"cpu\" else x.pin_memory().to(device, non_blocking=True)", "x.to(device)", ENTROPIX,
     "the policy's constants are waited for"),
    ("entropix", "(done + 1) % n", "(done + 2) % n", ENTROPIX, "a clarifying text loses a token"),
    ("cuda", "back * (s1 + d * s0), back", "back * s1, back", CUDA + "slices", "moments keep the old maximum"),
    ("cuda", "v * tl.exp(bar) <= tl.exp(x) * 1.0001", "v * tl.exp(bar) <= tl.exp(x) * 0.5", CUDA + "key_counts",
     "tokens that could win are passed over"),
    ("cuda", "b = stir(b ^ a)", "b = stir(b)", CUDA + "key_counts", "half of the key is not stirred"),
    ("cuda", "(reached >= target)", "(reached > target)", CUDA + "size_of_the_buffer", "the cut is one too deep"),
    ("cuda", "(mine == key) & (ids <= last)", "(mine == key)", CUDA + "size_of_the_buffer", "all that tie are kept"),
    ("cuda", "else: places = target - tl.sum(count)", "else: places = target - tl.sum(count) + 1",
     CUDA + "size_of_the_buffer", "one tied token too many"),
    ("cuda", "size = tl.where(enough & (got <= SLOTS), got, -1)", "size = tl.where(enough, tl.minimum(got, SLOTS), -1)",
     CUDA + "size_of_the_buffer", "a list that overflows is cut"),
    ("cuda", "edge = tl.where(k > 0, key - 1, key)", "edge = key", CUDA + "size_of_the_buffer",
     "tokens equal to the threshold are lost"),
    ("cuda", "bad = (z != z) | (z == float(\"inf\"))", "bad = z != z", CUDA + "bad_rows", "+inf passes"),
    ("cuda", "shift = tl.where(over, m, 0.0)", "shift = tl.where(over, 0.0, 0.0)", CUDA + "extreme",
     "a tiny temperature overflows"),
    ("cuda", "held = t.clamp(limits.smallest_normal, limits.max).where(t != 0, 1.)\n    k = k.where(fine, 1).long().clamp(max=2**31 - 1).where(t != 0, 1)",
     "held = t.clamp(limits.smallest_normal, limits.max).where(t != 0, 1.)\n    k = k.where(fine, 1).long().clamp(max=2**31 - 1)",
     CUDA + "greedy", "temperature 0 draws"),
    ("cuda", ">= goal:", "> 2 * goal:", CUDA + "token_only_is_verified", "a proposal outside the nucleus passes"),
    ("cuda", "return torch.full((B,), value, device=device)", "return torch.full((B,), value).to(device)",
     ON_GPU + "draw_waits", "a number is copied to the GPU, and waited for"),
    ("cuda", "fine = (t >= 0)", "bool(t.min() < 0)\n    fine = (t >= 0)", ON_GPU + "draw_waits", "parameters are looked at"),
    ("cuda", "fine &= (k >= 0) & (k.double().frac() == 0)", "fine &= k >= 0", ON_GPU + "impossible", "k = 2.5 draws"),
    ("cuda", "(m >= 0) & (m <= 1)", "(m >= 0)", ON_GPU + "impossible", "min-p of 1.5 draws"),
    ("cuda", "there[\"row\"] = torch.arange(B, device=device)", "there[\"row\"] = torch.arange(B).to(device)", ON_GPU + "draw_waits",
     "the rows' numbers are copied to the GPU"),
    ("sampler", "if rows.is_cuda: return _take_on_gpu(name, value, rows)", "pass", ON_GPU + "sampler_in_the_loop",
     "parameters by row make the sampler wait"),
    ("sampler", "if context.row.is_cuda or not", "if not", ON_GPU + "sampler_in_the_loop", "the sampler asks whether the step is the first"),
    ("sampler", "if not _on_gpu(value): per_row", "per_row", ON_GPU + "that_are_on", "parameters on the GPU are looked at"),
    ("sampler", "gone = gone or getattr(form, \"missing\", None)", "pass", CUDA + "without_triton_everything",
     "nobody says that Triton is missing"),
    ("fused", "(abs(x) * 2**-22 + 1e-37)", "0", "tests/test_fused.py -k 'division or contenders'", "the floor is not lowered"),
    ("fused", "+ G * _STEPS", "+ G * _STEPS[1:]",
     "tests/test_fused.py -k contenders", "a group's first token is not looked at"),
    ("fused", "[:, :max(rows.ks)]", "[:, :max(rows.ks) + 1]", "tests/test_fused.py -k oracle", "k + 1 tokens kept"),
    ("fused", "keep &= np.arange(s.shape[1]) < rows.k", "keep &= np.arange(s.shape[1]) <= rows.k", "tests/test_fused.py -k same_token",
     "k + 1 tokens kept where k differs by row"),
    ("fused", "keep[:, 1:] &= over[:, :-1] < 0", "keep &= over < 0",
     "tests/test_fused.py -k oracle", "the crossing token is dropped"),
    ("fused", "return over[:, -1:] >= 0, near", "return over[:, -1:] >= -9, near", "tests/test_fused.py -k 'same_token'",
     "64 candidates are always enough"),
    ("fused", "sure | (floor - best < rows.line)", "sure | (floor - best < 0)", "tests/test_fused.py -k 'same_token'", "min-p is always settled"),
    ("fused", 'kind="stable"', 'kind="quicksort"', "tests/test_fused.py -k 'ties or same_token'", "ties rank as the sort likes"),
    ("fused", "np.where(score == c.top, c.ids, ALL).min(1)", "np.where(score == c.top, c.ids, -1).max(1)",
     "tests/test_fused.py -k 'equal_scores'", "the higher id among equal scores"),
    ("fused", "need = min(max(M - gap - 1e-4, -4.), 40.)", "need = min(max(M - gap + 1, -4.), 40.)",
     "tests/test_fused.py -k 'same_token or chi'", "luck that would be enough is overlooked"),
    ("fused", "np.count_nonzero(s[:i] == s[i])", "np.count_nonzero(s == s[i])", "tests/test_fused.py -k 'rounding or worst or same'",
     "equal tokens with higher ids count as before"),
    ("fused", "if before < p: return i", "return i", "tests/test_fused.py -k 'same_token or worst'", "nothing is verified"),
    ("fused", "(k <= MOST) | (k == ALL)", "k > 0", "tests/test_fused.py -k worst", "a large k is cut to 64"),
    ("fused", "if not _is_tame(rows, best, least): return _gather(_divided(rows, rows.T), n)", "pass", "tests/test_fused.py -k overflow",
     "overflow is not seen"),
    ("fused", "return max(*map(abs, best), -least) < rows.limit", "return -least < rows.limit", "tests/test_fused.py -k overflow",
     "a single large logit overflows unseen"),
    ("fused", "return max(*map(abs, best), -least) < rows.limit", "return max(map(abs, best)) < rows.limit",
     "tests/test_fused.py -k masks", "a hopeless candidate becomes -inf"),
    ("fused", "if least == -inf: least = z.reshape(-1).take(at).min(initial=0.)", "if least == -inf: least = 0.",
     "tests/test_fused.py -k masks", "a hopeless candidate becomes -inf where all tokens are candidates"),
    ("fused", "@np.errstate(over=\"ignore\")", "@np.errstate()", "tests/test_fused.py -k masks", "NumPy warns of hopeless logits"),
    ("fused", "line = -inf if rows.m is None else rows.line[0, 0]", "line = -inf if rows.m is None else rows.line.item()",
     "tests/test_fused.py -k two_floats", "min-p's line is rounded to float32"),
    ("fused", "in (1 - p) / len(q) / 2, -1:", "in ((1 - p) / len(q) / 2,):", "tests/test_fused.py -k never_reaches",
     "tokens of the tail are not counted where rounding lost mass"),
    ("fused", "z = z.resolve_neg().contiguous()", "z = z.contiguous()", "tests/test_fused.py -k negated", "a lazy minus sign is no array"),
    ("fused", "sure, enough = sure | held, enough & ~near", "sure = (sure | held) & ~near", "tests/test_fused.py -k rounding",
     "min-p settles what rounding decides"),
    ("fused", "fit = score >= M", "fit = score > -9", "tests/test_fused.py -k cut_off", "tokens are missing from the race's list"),
    ("fused", "(np.abs(over) < 1e-5)", "(np.abs(over) < -1)", "tests/test_fused.py -k rounding", "no margin where rounding decides"),
    ("fused", "if rest.size: best = np.maximum(best, rest.max(1, keepdims=True))", "pass", "tests/test_fused.py -k contenders_of_a_batch",
     "the best is not looked for in the rest"),
    ("fused", ".cumsum(1, dtype=np.float64)[:, -1]   #", ".sum(1)   #", "tests/test_sampler.py -k row_alone",
     "a log-probability depends on the width of the batch"),
    ("fused", "other + (other // (V - 16 * G) + 1) * 16 * G", "other + 16 * G", "tests/test_fused.py -k contenders_of_a_batch",
     "the rest of a later row is taken for the first row's"),
    ("fused", "at + row * (V - G) + G * _STEPS", "at + row * 15 * G + G * _STEPS", "tests/test_fused.py -k contenders_of_a_batch",
     "rows have no rest"),
    ("fused", "(x ^ x >> 15 ^ x >> 30) * _INVERSES[0]", "(x ^ x >> 15) * _INVERSES[0]", "tests/test_fused.py -k lucky",
     "a fold is undone by half"),
    ("fused", "enough = enough & [[c <= MOST] for c in count]", "pass", "tests/test_fused.py -k 'worst or cut_off'", "a crowded row passes for whole"),
    ("sampler", "if name is None and (params is None or is_ours(params)):", "if name is None:",
     "tests/test_fused.py -k by_itself", "the fused form is taken for dialects"),
]


def copy():
    "This worker's own folder."
    return COPIES / str(os.getpid())


def run(
    *args,  # What comes after `python`
):
    "Run Python in the copy's folder, so that the copy is what it imports."
    path = os.pathsep.join(filter(None, [str(copy()), os.environ.get("PYTHONPATH", "")]))
    env = dict(os.environ, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run([sys.executable, *args], cwd=copy(), env=env, capture_output=True, text=True)


def run_tests(
    tests,  # Arguments for pytest, in one string; paths start with tests/
):
    "Whether the tests pass against the copy."
    args = [str(ROOT / a) if a.startswith("tests/") else a for a in shlex.split(tests)]
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *args)
    if done.returncode not in (0, 1, 2):  # 2: a test, or the import of the module, broke off
        sys.exit(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def fresh_copy():
    "The package as it is, copied."
    shutil.rmtree(copy(), ignore_errors=True)
    shutil.copytree(ROOT / "decoding_book", copy() / "decoding_book",
                    ignore=shutil.ignore_patterns("__pycache__"))


def check_origin():
    "The tests must import the copy, or every mutation would survive for the wrong reason."
    origin = run("-c", "import decoding_book; print(decoding_book.__file__)").stdout.strip()
    if not origin.startswith(str(copy())):
        sys.exit(f"the tests would import {origin}, not the copy in {copy()}")


def broken(
    module,  # Name of a module of the package
    old,     # Text that occurs exactly once in it
    new,     # What takes its place
):
    "Write the broken module into the copy."
    path = copy() / "decoding_book" / f"{module}.py"
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        sys.exit(f"{module}.py holds {text.count(old)} times, not once: {old!r}")
    path.write_text(text.replace(old, new), encoding="utf-8")


def clean(
    tests,  # Arguments for pytest
):
    "Whether the tests pass while nothing is broken."
    fresh_copy()
    check_origin()
    return run_tests(tests)


def attempt(
    row,  # One of MUTATIONS
):
    "Whether a break survives its tests, and the seconds it took to know."
    module, old, new, tests, _ = row
    start = time.perf_counter()
    fresh_copy()
    broken(module, old, new)
    return run_tests(tests), time.perf_counter() - start


def main():
    "Run the rows that were asked for, and name the survivors."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules whose rows to run (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="how many breaks to try at a time")
    parser.add_argument("--record", metavar="FILE", help="add the counts to this file of results")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    args = parser.parse_args()
    rows = [r for r in MUTATIONS if not args.modules or r[0] in args.modules]
    if args.list:
        for module, _, _, tests, why in rows:
            print(f"{module:12} {why:50} {tests}")
        return
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    survivors = []
    with ProcessPoolExecutor(args.jobs) as pool:
        suites = sorted({r[3] for r in rows})
        for tests, passed in zip(suites, pool.map(clean, suites)):
            if not passed:
                sys.exit(f"{tests} fails before anything is broken")
        for (module, _, _, tests, why), (survived, seconds) in zip(rows, pool.map(attempt, rows)):
            survivors += [f"{module}: {why} ({tests})"] * survived
            print(f"  {'SURVIVED' if survived else 'noticed ':8} {module:12} {why} ({seconds:.0f} s)", flush=True)
    print(f"{len(rows) - len(survivors)} of {len(rows)} breaks were noticed")
    if args.record:
        path = Path(args.record)
        results = json.loads(path.read_text(encoding="utf-8"))
        results["mutations"] = {"tried": len(rows), "noticed": len(rows) - len(survivors)}
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if survivors:
        sys.exit("no test noticed:\n  " + "\n  ".join(survivors))


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(COPIES, ignore_errors=True)
