"""Feature sets: find, calibrate, load and save named directions with evidence."""
