"""Fused operators for language-model training: a Triton kernel and its torch reference per operator."""
