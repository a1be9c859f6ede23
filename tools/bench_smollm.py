"""Greedy tokens a second: this book's SmolLM2 against transformers, on the same weights.

    python tools/bench_smollm.py                    two threads, batches of 1 and 8, float32 and bfloat16
    python tools/bench_smollm.py --quick            a short look, nothing recorded

Both models run in one process, in turns, so that a busy machine slows both. transformers runs as its users run it: `model.generate`,
greedy, with its cache, in inference mode. Both make exactly the same number of tokens: the end mark is off.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "It was a quiet morning in the city when the first tram of the day came round the corner, and"
LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def reference_weights(path):
    "The file's weights as the package `gguf` reads them, and the metadata."
    import gguf
    import torch
    reader = gguf.GGUFReader(str(path))
    weights = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return weights, {name: field.contents() for name, field in reader.fields.items()}


def transformers_peer(weights, dtype=None):
    "A transformers Llama with these weights. It pairs number i of a head with i + 32, the file with i + 1."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=None, pad_token_id=2))
    state = {"model.embed_tokens.weight": weights["token_embd.weight"],
             "lm_head.weight": weights["token_embd.weight"],
             "model.norm.weight": weights["output_norm.weight"]}
    for i in range(30):
        for ours, theirs in LAYER.items():
            w = weights[f"blk.{i}.{ours}.weight"]
            if ours in ("attn_q", "attn_k"):
                heads = 9 if ours == "attn_q" else 3
                w = w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
            state[f"model.layers.{i}.{theirs}.weight"] = w
    model.load_state_dict(state)
    model.generation_config.eos_token_id = None
    return model.to(dtype or torch.float32).eval()


def run_ours(model, ids, n):
    "Greedy decoding with the cache; seconds, and the ids."
    import torch
    start = time.perf_counter()
    cache, new, out = model.new_cache(len(ids), ids.shape[1] + n), ids, []
    for _ in range(n):
        new = model(new, cache=cache).logits.argmax(-1, keepdim=True)
        out.append(new)
    return time.perf_counter() - start, torch.cat(out, 1)


def run_loop(model, ids, n):
    "The same through the book's `generate`, with all that it records."
    import torch
    from decoding_book.loop import generate
    start = time.perf_counter()
    out = generate(model, ids, max_new_tokens=n, ignore_eos=True)
    return time.perf_counter() - start, torch.stack(out.ids)


def run_transformers(model, ids, n):
    "transformers' own `generate`, greedy."
    import torch
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                             do_sample=False, use_cache=True)
    return time.perf_counter() - start, out[:, ids.shape[1]:]


def compare(dtype, batch, tokens, repeats, weights):
    "Medians in tokens a second, and the median of the ratios of neighbouring runs."
    import torch
    from decoding_book.smollm import SmolLM2
    ours, peer = SmolLM2(dtype=dtype), transformers_peer(weights, dtype)
    ids = torch.tensor([ours.encode(PROMPT)] * batch)
    runs = {"model": (run_ours, ours), "generate": (run_loop, ours), "transformers": (run_transformers, peer)}
    speed = {name: [] for name in runs}
    for repeat in range(repeats + 1):                   # the first round only warms up
        for name, (run, model) in runs.items():
            seconds, out = run(model, ids, tokens)
            assert out.shape == (batch, tokens), (name, out.shape)
            if repeat: speed[name].append(batch * tokens / seconds)
    row = {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "tokens": tokens, "repeats": repeats}
    row |= {f"{name}_tokens_per_second": round(statistics.median(s), 1) for name, s in speed.items()}
    for name in ("model", "generate"):
        ratios = [a / b for a, b in zip(speed[name], speed["transformers"])]
        row[f"{name}_ratio"] = round(statistics.median(ratios), 2)
        row[f"{name}_ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    row["load_average"] = [round(x, 2) for x in os.getloadavg()]
    return row


def machine():
    "What the figures were measured on."
    import torch
    import transformers
    info = Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines()
             if x.startswith("model name")] if info.is_file() else []
    return {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__}


def save(
    path,       # Where to
    **results,  # What was found, by name
):
    "Record results, with the machine, as JSON."
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"recorded in {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens, one repeat, nothing recorded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/smollm.json")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"                    # no progress bar inside a measurement
    if args.quick: args.tokens, args.repeats = 16, 1
    import torch
    from decoding_book.smollm import weights_path
    torch.set_num_threads(args.threads)
    weights, _ = reference_weights(weights_path())
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 8):
            rows.append(compare(dtype, batch, args.tokens, args.repeats, weights))
            print(json.dumps(rows[-1]), flush=True)
    if not args.quick:
        save(args.out, prompt=PROMPT, rows=rows)


if __name__ == "__main__":
    main()
