"""The demo model: a small language model, an SAE on it, and the labelled texts they come with."""
