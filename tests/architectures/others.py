"""Pictures, speech and time series."""

from __future__ import annotations

import torch
from transformers import ResNetConfig

from tests.architectures.architecture import ROWS, VOCAB, Architecture, ids, pairs, pictures
from tests.architectures.text import QKV, bart

VIT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=16,
    patch_size=8,
)
TOWER = dict(VIT, projection_dim=16)
WORDS = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    projection_dim=16,
    eos_token_id=2,
)
SPEECH = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16, 16),
    conv_kernel=(8, 4),
    conv_stride=(8, 4),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    apply_spec_augment=False,
    mask_time_prob=0.0,
)
FC = "fc2(gelu(fc1))"


def detection() -> dict:
    """Pictures of which one is smaller, so that its borders are masked."""
    mask = torch.ones(ROWS, 32, 32, dtype=torch.long)
    mask[-1, :, 20:] = 0
    return {"pixel_values": torch.randn(ROWS, 3, 32, 32), "pixel_mask": mask}


def heard() -> dict:
    """Mel frames and what was said."""
    return {"input_features": torch.randn(ROWS, 8, 24), "labels": ids(ROWS, 6)}


def waves(**labels) -> dict:
    """Sound of which one is shorter."""
    mask = torch.ones(ROWS, 640, dtype=torch.long)
    mask[-1, 500:] = 0
    return {"input_values": torch.randn(ROWS, 640), "attention_mask": mask, **labels}


def series() -> dict:
    """Past and future of two series with one unobserved value."""
    seen = torch.ones(ROWS, 11)
    seen[0, 3] = 0
    return {
        "past_values": torch.rand(ROWS, 11),
        "past_time_features": torch.rand(ROWS, 11, 2),
        "past_observed_mask": seen,
        "static_categorical_features": torch.tensor([[0], [1]]),
        "future_values": torch.rand(ROWS, 4),
        "future_time_features": torch.rand(ROWS, 4, 2),
    }


VISION = (
    Architecture(
        "ViT",
        "ViTForImageClassification",
        VIT,
        pictures,
        groups=(f"vit.layers.*.attention: {QKV}",),
        blocks=(f"vit.layers.*.mlp: {FC}",),
    ),
    Architecture(
        "DINOv2",
        "Dinov2ForImageClassification",
        dict(VIT, mlp_ratio=2),
        pictures,
        groups=(f"dinov2.encoder.layer.*.attention: {QKV}",),
        blocks=(f"dinov2.encoder.layer.*.mlp: {FC}",),
    ),
    Architecture(
        "DINOv2 giant",
        "Dinov2ForImageClassification",
        dict(VIT, mlp_ratio=2, use_swiglu_ffn=True),
        pictures,
        groups=(f"dinov2.encoder.layer.*.attention: {QKV}",),
        blocks=("dinov2.encoder.layer.*.mlp: down(silu(gate)·up)",),
    ),
    Architecture(
        "Swin",
        "SwinForImageClassification",
        dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2.0),
        pictures,
        groups=(f"swin.encoder.layers.*.blocks.*.attention: {QKV}",),
        blocks=(f"swin.encoder.layers.*.blocks.*.mlp: {FC}",),
        reentrant=False,
    ),
    Architecture(
        "CLIP",
        "CLIPModel",
        dict(text_config=WORDS, vision_config=TOWER, projection_dim=16),
        pairs,
        groups=(f"*.encoder.layers.*.self_attn: {QKV}",),
        blocks=("*.encoder.layers.*.mlp: fc2(quick_gelu(fc1))",),
        embeddings=("text_model.embeddings.token_embedding",),
    ),
    # the head's nn.MultiheadAttention reads its weights and never calls out_proj
    Architecture(
        "SigLIP",
        "SiglipModel",
        dict(text_config=WORDS, vision_config=VIT),
        pairs,
        groups=(f"*.encoder.layers.*.self_attn: {QKV}",),
        blocks=(
            "*.encoder.layers.*.mlp: fc2(gelu_tanh(fc1))",
            "vision_model.head.mlp: fc2(gelu_tanh(fc1))",
        ),
        embeddings=("text_model.embeddings.token_embedding",),
        skip=("vision_model.head.attention.out_proj",),
    ),
    # q and k read the picture with its positions, v reads it without; in cross-attention all three differ
    Architecture(
        "DETR",
        "DetrForObjectDetection",
        dict(
            use_timm_backbone=False,
            backbone_config=ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
            ),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_queries=7,
        ),
        detection,
        groups=(
            "model.encoder.layers.*.self_attn: q_proj k_proj",
            "model.decoder.layers.*.self_attn: q_proj k_proj",
        ),
        blocks=("model.*.layers.*.mlp: dropout(fc2(dropout(relu(fc1))))",),
        reentrant=False,
    ),
)

SOUND = (
    bart(
        "Whisper",
        "WhisperForConditionalGeneration",
        heard,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )._replace(embeddings=("model.decoder.embed_tokens",)),
    Architecture(
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        SPEECH,
        lambda: waves(labels=ids(ROWS, 4)),
        groups=(f"wav2vec2.encoder.layers.*.attention: {QKV}",),
        blocks=("wav2vec2.encoder.layers.*.feed_forward: dropout(fc2(dropout(gelu(fc1))))",),
    ),
    Architecture(
        "HuBERT",
        "HubertForSequenceClassification",
        SPEECH,
        lambda: waves(labels=torch.tensor([0, 1])),
        groups=(f"hubert.encoder.layers.*.attention: {QKV}",),
        blocks=("hubert.encoder.layers.*.feed_forward: dropout(fc2(dropout(gelu(fc1))))",),
    ),
)

SERIES = (
    Architecture(
        "Time series transformer",
        "TimeSeriesTransformerForPrediction",
        dict(
            prediction_length=4,
            context_length=8,
            lags_sequence=[1, 2, 3],
            num_time_features=2,
            num_static_categorical_features=1,
            cardinality=[3],
            embedding_dimension=[2],
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        ),
        series,
        groups=(
            *bart("", "").groups,
            # the list of layers whose names are 0, 1 and 2: the parameters of the predicted distribution
            "parameter_projection.proj: 0 1 2",
        ),
    ),
)
