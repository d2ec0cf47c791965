"""The page on which to look at latents, features, policies and events."""
