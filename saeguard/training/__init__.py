"""Train a sparse autoencoder on a model's residual stream, and measure what it is worth.

Offline tools. SAELens trains (extra `train`); this package brings it the activations, keeps a run
resumable, and writes the card.
"""
