"""Encoders, decoders and encoder-decoders of text."""

from __future__ import annotations

from tests.architectures.architecture import VOCAB, Architecture, classified, spoken, translated

BERT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)
LLAMA = dict(BERT, num_key_value_heads=2, pad_token_id=0)
GPT = dict(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4)
SHARED = ("model.encoder.embed_tokens", "model.decoder.embed_tokens")
QKV = "q_proj k_proj v_proj"
# PEFT turns the targets gate_proj, up_proj and down_proj into the experts' parameters: dense MLPs stay frozen
EXPERTS = dict(
    experts=("model.layers.0.mlp.*_proj", "model.layers.1.mlp.shared_experts.*_proj"),
)
GATED = "mlp: down(silu(gate)·up)"
GATED_TANH = "mlp: down(gelu_tanh(gate)·up)"


def llama(name: str, cls: str, mlp: str = GATED, groups: str = QKV, **config) -> Architecture:
    """A decoder with Llama's names."""
    return Architecture(
        name,
        cls,
        {**LLAMA, **config},
        spoken,
        groups=(f"model.layers.*.self_attn: {groups}",) if groups else (),
        blocks=(f"model.layers.*.{mlp}",) if mlp else (),
        embeddings=("model.embed_tokens",),
    )


def bart(name: str, cls: str, inputs=translated, **config) -> Architecture:
    """An encoder-decoder with BART's names: fc1 and fc2 lie in the layer itself, which is more than an MLP."""
    sizes = dict(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    return Architecture(
        name,
        cls,
        {**sizes, **config},
        inputs,
        groups=(
            f"model.encoder.layers.*.self_attn: {QKV}",
            f"model.decoder.layers.*.self_attn: {QKV}",
            "model.decoder.layers.*.encoder_attn: k_proj v_proj",
        ),
    )


def t5(name: str, mlp: str, act: str) -> Architecture:
    """T5: all decoder layers read k and v from the encoder's output, one tensor; no group is wider than a module."""
    return Architecture(
        name,
        "T5ForConditionalGeneration",
        dict(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj=act,
            decoder_start_token_id=0,
        ),
        translated,
        groups=(
            "encoder.block.*.layer.0.SelfAttention: q k v",
            "decoder.block.*.layer.0.SelfAttention: q k v",
            "decoder.block.*.layer.1.EncDecAttention: k v",
        ),
        blocks=(
            f"encoder.block.*.layer.1.DenseReluDense: {mlp}",
            f"decoder.block.*.layer.2.DenseReluDense: {mlp}",
        ),
        embeddings=("encoder.embed_tokens", "decoder.embed_tokens"),
    )


ENCODERS = (
    Architecture(
        "BERT",
        "BertForSequenceClassification",
        BERT,
        classified,
        groups=("bert.encoder.layer.*.attention.self: query key value",),
        embeddings=("bert.embeddings.word_embeddings",),
    ),
    Architecture(
        "RoBERTa",
        "RobertaForSequenceClassification",
        dict(BERT, pad_token_id=1),
        classified,
        groups=("roberta.encoder.layer.*.attention.self: query key value",),
        embeddings=("roberta.embeddings.word_embeddings",),
    ),
    Architecture(
        "DistilBERT",
        "DistilBertForSequenceClassification",
        dict(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32),
        classified,
        groups=("distilbert.transformer.layer.*.attention: q_lin k_lin v_lin",),
        blocks=("distilbert.transformer.layer.*.ffn: dropout(fc2(gelu(fc1)))",),
        embeddings=("distilbert.embeddings.word_embeddings",),
    ),
    # one layer, called three times in a forward
    Architecture(
        "ALBERT",
        "AlbertForSequenceClassification",
        dict(BERT, embedding_size=16, num_hidden_layers=3),
        classified,
        groups=("albert.encoder.albert_layer_groups.*.albert_layers.*.attention: query key value",),
        embeddings=("albert.embeddings.word_embeddings",),
    ),
    Architecture(
        "DeBERTa-v2",
        "DebertaV2ForSequenceClassification",
        dict(BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False),
        classified,
        groups=(
            "deberta.encoder.layer.*.attention.self: query_proj key_proj value_proj",
            "deberta.encoder.layer.*.attention.self: pos_key_proj pos_query_proj",
        ),
        embeddings=("deberta.embeddings.word_embeddings",),
    ),
    # query and key also project the positions: only those two always come together, which takes a while to see
    Architecture(
        "DeBERTa-v3",
        "DebertaV2ForSequenceClassification",
        dict(
            BERT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            share_att_key=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
        ),
        classified,
        groups=("deberta.encoder.layer.*.attention.self: query_proj key_proj",),
        embeddings=("deberta.embeddings.word_embeddings",),
        learns=5,
    ),
    Architecture(
        "ModernBERT",
        "ModernBertForMaskedLM",
        dict(BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        spoken,
        blocks=("model.layers.*.mlp: Wo(dropout(gelu(first half of Wi)·second half))",),
        embeddings=("model.embeddings.tok_embeddings",),
    ),
)

DECODERS = (
    Architecture(
        "GPT-2",
        "GPT2LMHeadModel",
        GPT,
        spoken,
        blocks=("transformer.h.*.mlp: dropout(fc2(gelu_tanh(fc1)))",),
        embeddings=("transformer.wte",),
    ),
    Architecture(
        "GPT-NeoX",
        "GPTNeoXForCausalLM",
        BERT,
        spoken,
        blocks=("gpt_neox.layers.*.mlp: fc2(gelu(fc1))",),
        embeddings=("gpt_neox.embed_in",),
    ),
    # fc_in reads what q, k and v read, but in another module
    Architecture(
        "GPT-J",
        "GPTJForCausalLM",
        dict(GPT, rotary_dim=4),
        spoken,
        groups=(f"transformer.h.*.attn: {QKV}",),
        blocks=("transformer.h.*.mlp: dropout(fc2(gelu_tanh(fc1)))",),
        embeddings=("transformer.wte",),
    ),
    Architecture(
        "OPT",
        "OPTForCausalLM",
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        ),
        spoken,
        groups=(f"model.decoder.layers.*.self_attn: {QKV}",),
        embeddings=("model.decoder.embed_tokens",),
    ),
    # its MLP's forward takes the residual and adds it
    Architecture(
        "BLOOM",
        "BloomForCausalLM",
        dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        spoken,
        embeddings=("transformer.word_embeddings",),
    ),
    # every linear layer is a FalconLinear, whose own forward is nn.Linear's in other words
    Architecture(
        "Falcon",
        "FalconForCausalLM",
        dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        spoken,
        blocks=("transformer.h.*.mlp: dense_4h_to_h(gelu(dense_h_to_4h))",),
        embeddings=("transformer.word_embeddings",),
    ),
    # as BLOOM
    Architecture(
        "MPT",
        "MptForCausalLM",
        dict(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=32),
        spoken,
        embeddings=("transformer.wte",),
    ),
    llama("Llama", "LlamaForCausalLM"),
    llama("Mistral", "MistralForCausalLM", sliding_window=4),
    llama("Qwen2", "Qwen2ForCausalLM"),
    llama("Qwen3", "Qwen3ForCausalLM", head_dim=8),
    llama("Gemma2", "Gemma2ForCausalLM", GATED_TANH, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    llama("Gemma3", "Gemma3ForCausalLM", GATED_TANH, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    llama("Phi", "PhiForCausalLM", "mlp: fc2(gelu_tanh(fc1))", num_key_value_heads=4),
    llama("Phi-3", "Phi3ForCausalLM", "mlp: down(silu(first half of gate_up)·second half)", groups=""),
    llama("OLMo2", "Olmo2ForCausalLM"),
    llama("GLM-4", "Glm4ForCausalLM", "mlp: down(silu(first half of gate_up)·second half)", head_dim=8),
    # experts are 3-dimensional parameters, not linear layers
    llama("Mixtral", "MixtralForCausalLM", "", num_local_experts=4, num_experts_per_tok=2),
    llama(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        num_experts=4,
        head_dim=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0],
    )._replace(blocks=("model.layers.0.mlp: down(silu(gate)·up)",), **EXPERTS),
    llama(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        groups="q_a_proj kv_a_proj_with_mqa",
        num_key_value_heads=4,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )._replace(
        blocks=(
            "model.layers.0.mlp: down(silu(gate)·up)",
            "model.layers.1.mlp.shared_experts: down(silu(gate)·up)",
        ),
        **EXPERTS,
    ),
    llama("gpt-oss", "GptOssForCausalLM", "", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
)

ENCODER_DECODERS = (
    t5("T5", "wo(dropout(relu(wi)))", "relu"),
    t5("flan-T5", "wo(dropout(gelu_tanh(wi_0)·wi_1))", "gated-gelu"),
    bart("BART", "BartForConditionalGeneration", max_position_embeddings=32)._replace(embeddings=SHARED),
    bart("Marian", "MarianMTModel", max_position_embeddings=32, pad_token_id=0, decoder_start_token_id=0)._replace(
        embeddings=SHARED
    ),
)
