"""Let vLLM's Model Runner V2 start on a machine without a GPU, for tests.

vLLM looks for a Triton backend named `cpu` before it runs V2 on a CPU. Triton's interpreter can
run the kernels, slowly, so a backend that says it is there is registered, and the interpreter
switched on. Active only where `SAEGUARD_TRITON_INTERPRET=1`, with this folder on PYTHONPATH.
"""

import os

if os.environ.get("SAEGUARD_TRITON_INTERPRET") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    triton.backends.backends["cpu"] = triton.backends.Backend(
        compiler=type("Compiler", (), {}), driver=_Driver
    )
