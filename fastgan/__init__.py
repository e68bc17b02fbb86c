"""fastgan: every classic GAN family, trained fast."""

__version__ = "0.1.0"
