"""Sashimi: raw-audio state-space models, trained and sampled on many GPUs."""

from sashimi.audio import AudioConfig, Quantizer, write_wav
from sashimi.model import ModelConfig, Sashimi
from sashimi.model_folder import load_model, read_audio_config
from sashimi.sampler import generate

__all__ = [
    "AudioConfig",
    "ModelConfig",
    "Quantizer",
    "Sashimi",
    "generate",
    "load_model",
    "read_audio_config",
    "write_wav",
]
