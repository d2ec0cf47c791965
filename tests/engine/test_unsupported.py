"""Modes of vLLM under which the guard would be blind are refused before a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from vllm import EngineArgs
from vllm.config import ECTransferConfig, KVTransferConfig, VllmConfig

from saeguard.vllm.kv_connector import KEEPS_APART, ConnectorError, check_connector
from saeguard.vllm.settings import parse_settings
from saeguard.vllm.worker.attach import prepare
from saeguard.vllm.worker.unsupported import UNSUPPORTED, ModeError
from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> models.Guarded:
    """A set-up with nothing wrong."""
    return models.make_guarded(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def config(sound: models.Guarded) -> VllmConfig:
    """What vLLM makes of its arguments for that set-up."""
    arguments = EngineArgs(
        model=str(sound.model), dtype="float32", max_model_len=64, skip_tokenizer_init=True,
        additional_config={"saeguard": sound.settings()},
    )  # fmt: skip
    return arguments.create_engine_config()


MODES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "dual batch": ("parallel_config", {"enable_dbo": True}, ("--enable-dbo", "rows")),
    "ubatches": ("parallel_config", {"ubatch_size": 4}, ("--ubatch-size",)),
    "prefill context": (
        "parallel_config", {"prefill_context_parallel_size": 2},
        ("--prefill-context-parallel-size", "prompt"),
    ),
    "decode context": (
        "parallel_config", {"decode_context_parallel_size": 2}, ("--decode-context-parallel-size",)
    ),
    "hyper-connections": (
        "parallel_config", {"enable_hc_sp": True, "tensor_parallel_size": 2}, ("--enable-hc-sp",)
    ),
    "launcher": (
        "parallel_config", {"distributed_executor_backend": "external_launcher", "world_size": 2},
        ("external_launcher",),
    ),
    "fast prefill": (
        "cache_config", {"kv_sharing_fast_prefill": True}, ("--kv-sharing-fast-prefill",)
    ),
    "pooling": ("model_config", {"runner_type": "pooling"}, ("pooling", "generated")),
    "encoder": ("model_config", {"is_encoder_decoder": True}, ("encoder-decoder",)),
    "diffusion": ("model_config", {"is_diffusion": True}, ("diffusion",)),
}  # fmt: skip
"""Where vLLM keeps the mode, what is set there, and what the error says."""


@contextmanager
def switched(config: VllmConfig, where: str, values: dict[str, Any]) -> Iterator[None]:
    """Switch a mode on; on a CPU, vLLM itself switches some of them off or refuses them."""
    part: Any = config
    for name in where.split("."):
        part = getattr(part, name)
    before = dict(part.__dict__)
    part.__dict__.update(values)
    try:
        yield
    finally:
        part.__dict__.clear()
        part.__dict__.update(before)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_refused_by_name(mode: str, config: VllmConfig, sound: models.Guarded) -> None:
    """The error names the mode and its flag, says why, and what to do."""
    where, values, expected = MODES[mode]
    settings = parse_settings(sound.settings())
    with switched(config, where, values), pytest.raises(ModeError) as refused:
        prepare(config, settings)
    for text in (*expected, "not supported", "serve unguarded"):
        assert text in str(refused.value)
    assert prepare(config, settings).policies


OTHERS = {
    "encoder": (
        "ec_transfer_config", ECTransferConfig(ec_connector="any", ec_role="ec_producer"),
        ("--ec-transfer-config", "language model"),
    ),
    "load": (
        "kv_transfer_config",
        KVTransferConfig(
            kv_connector="NixlConnector", kv_role="kv_both", kv_load_failure_policy="recompute"
        ),
        ("--kv-transfer-config", "kv_load_failure_policy fail"),
    ),
}  # fmt: skip
"""The same for modes that are a part of the configuration of their own."""


@pytest.mark.parametrize("mode", OTHERS)
def test_a_part_is_refused(mode: str, config: VllmConfig, sound: models.Guarded) -> None:
    """An encoder alone runs no language model; KV that failed to load has been judged."""
    where, part, expected = OTHERS[mode]
    with mock.patch.object(config, where, part), pytest.raises(ModeError) as refused:
        prepare(config, parse_settings(sound.settings()))
    for text in expected:
        assert text in str(refused.value)


def test_every_refusal_is_tested() -> None:
    """Each mode in the list is switched on by a test above; dual batch in two ways."""
    assert len(UNSUPPORTED) == len(MODES) - 1 + len(OTHERS)


CLAMP = {"detect": {"a": {"feature": "f12", "above": 0.5}}, "condition": "a", "action": "clamp",
         "clamp": {"features": ["f12"], "to": -6.0}}  # fmt: skip
"""A clamp policy."""


def connector(name: str, **more: Any) -> KVTransferConfig:
    """Return the configuration of a KV connector."""
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", **more)


SEVERAL = {"connectors": [{"kv_connector": "NixlConnector"}, {"kv_connector": "ExampleConnector"}]}
"""The second of these is not known to keep KV apart."""


def test_clamps_with_a_connector(config: VllmConfig, sound: models.Guarded, tmp_path: Path) -> None:
    """Clamped KV must not come back for others: refused at start, and when a reload brings it."""
    models.write_policy(tmp_path / "c.yaml", id="test.clamp", **CLAMP)
    given = {**sound.settings(), "policies": str(tmp_path)}
    clamps, none = engines.compile_policies(given), engines.compile_policies(sound.settings())
    assert clamps.clamps
    for transfer in (
        connector("ExampleConnector"),
        connector("MultiConnector", kv_connector_extra_config=SEVERAL),
        connector("OffloadingConnector", kv_connector_module_path="my.own"),
    ):
        with mock.patch.object(config, "kv_transfer_config", transfer):
            with pytest.raises(ConnectorError, match=r"c\.yaml: action: clamp.*Connector"):
                prepare(config, parse_settings(given))
            check_connector(config, none)
    for name in KEEPS_APART:
        with mock.patch.object(config, "kv_transfer_config", connector(name)):
            check_connector(config, clamps)
    check_connector(config, clamps)
