"Tiny random models of transformers, one an architecture, and what their own `generate` says."

import torch
import transformers

V, EOS = 40, 1
WINDOW = 12  # shorter than the texts of the tests
USUAL = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
GPT2 = dict(n_positions=96, n_embd=16, n_layer=2, n_head=4)
ARCHITECTURES = {  # (the start of its classes' names, its sizes)
    "GPT-2": ("GPT2", GPT2),
    "Llama": ("Llama", USUAL),
    "Qwen2": ("Qwen2", USUAL),
    "Mistral": ("Mistral", USUAL | dict(sliding_window=WINDOW)),
    "Gemma": ("Gemma", USUAL | dict(head_dim=4)),
    "Mamba": ("Mamba", dict(hidden_size=16, num_hidden_layers=2, state_size=4)),
    # with --full
    "Qwen3": ("Qwen3", USUAL | dict(head_dim=4)),
    "Gemma 2": ("Gemma2", USUAL | dict(head_dim=4, sliding_window=WINDOW)),
    "Phi": ("Phi", USUAL),
    "GPT-NeoX": ("GPTNeoX", USUAL),
    "OPT": ("OPT", USUAL | dict(ffn_dim=24, word_embed_proj_dim=16)),
    "Falcon": ("Falcon", USUAL),
    "BLOOM": ("Bloom", dict(hidden_size=16, n_layer=2, n_head=4)),
    "Mixtral": ("Mixtral", USUAL | dict(num_local_experts=3)),
}
QUICK = list(ARCHITECTURES)[:6]


def tiny(name, seed=0, attention=None, **more):
    "A random model whose rows are neither flat nor certain."
    kind, sizes = ARCHITECTURES[name]
    ends = dict(vocab_size=V, eos_token_id=EOS, bos_token_id=None, pad_token_id=0)
    config = getattr(transformers, f"{kind}Config")(**sizes | ends | more)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.6)
        head = model.get_output_embeddings().weight
        head.mul_(1.5 / head.std() / 16**0.5)
    return model


def until_end(row):
    "The new ids up to the end mark, as the book's loop has them."
    row = row.tolist()
    return row[: row.index(EOS) + 1] if EOS in row else row


def own(model, ids, mask, **options):
    "The new ids of each row by the model's own `generate`."
    out = model.generate(ids, attention_mask=mask.long(), **options)
    return [until_end(row) for row in out[:, ids.shape[1] :]]
