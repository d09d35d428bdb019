"""Networks and their roles: the denoiser view of any backbone, the generator/fake-score/real-score trio, EMA."""
