"""The demo corpus: a seeded grammar of dialogues, and ordinary text found on the machine."""
