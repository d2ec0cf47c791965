"""The guard on a Hugging Face model: for scanning, calibration, and as a reference in tests."""
