"""The guard on a Hugging Face model: for scanning and calibration, and as the reference."""
