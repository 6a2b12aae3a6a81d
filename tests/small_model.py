"""A configuration small enough to export in a second or two, in the release's schema."""

TINY = """
DATASET: {NAME: tiny}
MODEL:
  AUDIO_ENCODER: {type: mel, hidden_fps: 30, mel_bins: 8, width: 16, dilations: [1, 2], lookahead_ms: 40,
    level_floor: 0.001}
  DIFF_AR_DEC: {vq_dim: 16, latent_dim: 24, audio_encode_dim: 16, feedforward_dim: 20, period: 30, n_heads: 2,
    num_layers: 2, dropout: 0.0, activation: gelu, head: residual_mlp, num_res_blocks: 1, id_dim: 2}
  VAE: {n_embed: 16, zquant_dim: 4, face_quan_num: 4, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
    intermediate_size: 40, instance_norm: true, n_vert: 30}
  STREAM: {hop: 1, decode_window: 6}
  num_inference_timesteps: 2
  window_size: 5
  sampler: ddim
"""
