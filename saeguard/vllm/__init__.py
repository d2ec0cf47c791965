"""Everything that knows vLLM; `CONTRACT.md` lists the internals that it relies on."""
