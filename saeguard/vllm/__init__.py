"""Everything that knows vLLM; `CONTRACT.md` lists which internals."""
