"""Read the feature values of texts with vLLM's engine, offline: batched, cached, on many devices.

Each text is one prompt of token ids, of which vLLM samples one token. That token is dropped. All
tokens of the text lie in the prompt, so the taps read all of them, the last one too. The engine
core returns the values of every token with the request's own output. What is prompt and what is
output, roles and policies stay with the command: a request holds tokens and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from saeguard.errors import CannotRunError, InputError
from saeguard.features.model_fit import ModelShape, check_fit, read_shape
from saeguard.guard.readings import Reading, most_tokens
from saeguard.guard.watchlist import WatchList
from saeguard.hf.text_rows import TextError
from saeguard.hf.texts import Text
from saeguard.vllm import contract
from saeguard.vllm.attributes import CHOICE_VERDICTS
from saeguard.vllm.messages import KEY, STATE, VALUES
from saeguard.vllm.patches import INTERNALS, calls, reads
from saeguard.vllm.startup import readings_of

ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
CLIENT = "vllm.v1.engine.core_client"
LOOKS = 0.5
"""Seconds between two looks at whether the engine core lives."""
WAITING = 4
"""Texts under way, as a multiple of those that vLLM computes at a time, so that none idles."""
EXPECTED: Mapping[str, tuple[Any, ...]] = {
    "additional_config": ({}, None),
    "speculative_config": (None,),
    "kv_transfer_config": (None,),
    "data_parallel_size": (1,),
    "runner": ("auto", "generate"),
    "kv_sharing_fast_prefill": (False,),
}
"""The values that options of vLLM may have."""

calls(f"{ENGINE}.from_engine_args", "engine_args", "usage_context", why="an engine without server")
calls(f"{ENGINE}.add_request", "request_id", "prompt", "params", why="reading texts offline")
reads(ENGINE, "step", "has_unfinished_requests", "vllm_config", "engine_core", why="the same")
reads(f"{CLIENT}:EngineCoreClient", "shutdown", why="ending the engine core")
reads(f"{CLIENT}:BackgroundResources", "engine_dead", why="noticing that it died")
reads(f"{CLIENT}:SyncMPClient", "resources", "outputs_queue", why="no wait for one that died")
reads("vllm.v1.engine.exceptions:EngineDeadError", why="the same")
calls("vllm.engine.arg_utils:EngineArgs.add_cli_args", "parser", why="vLLM's own options")
calls("vllm.engine.arg_utils:EngineArgs.from_cli_args", "args", why="vLLM's own options")
reads("vllm.utils.argparse_utils:FlexibleArgumentParser", why="vLLM's own options")
reads("vllm.usage.usage_lib:UsageContext.LLM_CLASS", why="batch sizes as offline use has them")
reads("vllm.config:ModelConfig", "max_model_len", why="how long a text may be")
reads("vllm.config:SchedulerConfig", "max_num_seqs", why="how many texts to keep under way")


class EngineError(CannotRunError):
    """vLLM does not start, fails while it reads texts, or leaves tokens unread."""


class VllmEngine:
    """Reads texts with vLLM."""

    def __init__(self, engine: Any, readings: WatchList, shape: ModelShape) -> None:
        """Take an engine; `open_engine` makes one.

        Args:
            engine: an `LLMEngine` whose settings name the features to read.
            readings: the same features.
            shape: of the model.
        """
        self.features = readings.features
        self.shape = shape
        self._engine = engine
        self._digest = readings.digest
        config = engine.vllm_config
        self.longest: int | None = int(config.model_config.max_model_len) - 1
        """Most tokens of a text."""
        self._ended = Event()
        _wake_if_it_dies(engine.engine_core, self._ended)
        self._texts = WAITING * int(config.scheduler_config.max_num_seqs)

    def read(self, texts: Iterable[Text]) -> Iterator[tuple[Text, Reading]]:
        """Yield every text with its reading, in order.

        Raises:
            TextError: a text is too long for the engine.
            EngineError: vLLM failed, or did not read all tokens of a text.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        source, most = iter(texts), most_tokens(len(self.features))
        waiting: deque[tuple[str, Text]] = deque()
        found: dict[str, Reading] = {}
        held = number = 0
        more = True
        while more or waiting:
            while more and len(waiting) < self._texts and held < most:
                text = next(source, None)
                if text is None:
                    more = False
                    break
                self._check(text)
                name, number = str(number), number + 1
                with _reported():
                    self._engine.add_request(name, {"prompt_token_ids": [*text.tokens]}, params)
                waiting.append((name, text))
                held += len(text.tokens)
            if waiting and waiting[0][0] not in found:
                with _reported():
                    if not self._engine.has_unfinished_requests():
                        raise EngineError(f"{waiting[0][1].id}: vLLM returned no result for it")
                    outputs = self._engine.step()
                found |= {out.request_id: self._reading(out) for out in outputs if out.finished}
            while waiting and waiting[0][0] in found:
                name, text = waiting.popleft()
                held -= len(text.tokens)
                yield text, self._whole(text, found.pop(name))

    def close(self) -> None:
        """End the engine core and its workers."""
        self._ended.set()
        self._engine.engine_core.shutdown()

    def _check(self, text: Text) -> None:
        if self.longest is not None and len(text.tokens) > self.longest:
            raise TextError(
                f"{text.id}: {len(text.tokens)} tokens; this engine takes {self.longest}, since "
                "vLLM samples one more; shorten the text or raise --max-model-len"
            )

    def _reading(self, output: Any) -> Reading:
        read: Mapping[str, Any] | None = CHOICE_VERDICTS.get(output.outputs[0])
        if read is None or VALUES not in read:
            raise EngineError(
                "vLLM returned a text without values: its engine core runs without the guard; is "
                "saeguard installed beside vLLM, and VLLM_PLUGINS unset?"
            )
        if read["watchlist"] != self._digest:
            raise EngineError("feature sets changed while vLLM started; run the command again")
        state = np.frombuffer(read[STATE], np.uint8)
        values = np.frombuffer(read[VALUES], np.float32)
        return Reading(values.reshape(len(state), len(self.features)), state)

    def _whole(self, text: Text, reading: Reading) -> Reading:
        if len(reading.state) != len(text.tokens):
            raise EngineError(
                f"{text.id}: vLLM computed {len(text.tokens)} tokens, of which the taps read "
                f"{len(reading.state)}; expected all of them. This is a fault of the guard"
            )
        return reading


def _wake_if_it_dies(client: Any, ended: Event) -> None:
    """Let `LLMEngine.step` raise if the engine core is killed, as for want of memory.

    vLLM notices the death and marks the client, but whoever waits for an output of that engine core
    would wait for ever (seen with vLLM 0.32).

    Args:
        client: of the engine core; one that runs in this process needs no watch.
        ended: set when the engine is closed on purpose.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    outputs = getattr(client, "outputs_queue", None)
    if outputs is None:
        return

    def watch() -> None:
        while not ended.wait(LOOKS):
            if client.resources.engine_dead:
                outputs.put_nowait(EngineDeadError())
                return

    Thread(target=watch, name="saeguard-engine-watch", daemon=True).start()


def open_engine(
    model: Path,
    feature_sets: Path,
    features: Sequence[str],
    *,
    dtype: str,
    options: Sequence[str] = (),
) -> VllmEngine:
    """Start vLLM's engine core and workers, which read `features` of every text.

    Args:
        model: folder of the model.
        feature_sets: folder of feature sets.
        features: `feature_set/feature` of each.
        dtype: of the weights, such as float32.
        options: further options, as `vllm serve` takes them.

    Raises:
        InputError: an option is not for the user to set, or vLLM does not know it.
        ModelFitError: a feature set was made for another model.
        EngineError: vLLM does not start.
    """
    readings = readings_of(feature_sets, features)
    shape = read_shape(model)
    for made_for in readings.models:
        check_fit(made_for, shape, model, at="the feature set")
    with _reported("start"):
        contract.check(internal for internal in INTERNALS if internal.user == __name__)
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        args = _arguments(["--model", str(model), "--dtype", dtype, *options])
        args.skip_tokenizer_init = True
        args.disable_log_stats = True
        folder = str(feature_sets.absolute())
        args.additional_config = {
            KEY: {"read": list(features), "feature_sets": folder, "reload": False}
        }
        engine = LLMEngine.from_engine_args(args, UsageContext.LLM_CLASS)
    return VllmEngine(engine, readings, shape)


def _arguments(options: Sequence[str]) -> Any:
    """Return vLLM's `EngineArgs` for the options of a command line.

    Raises:
        InputError: vLLM does not know an option, or texts would not be read whole under it.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="--vllm-args"))
    try:
        args = EngineArgs.from_cli_args(parser.parse_args(options))
    except SystemExit as error:  # the parser has printed why
        raise InputError("--vllm-args: vLLM does not take these options") from error
    for name, expected in EXPECTED.items():
        found = getattr(args, name, expected[0])
        if found not in expected:
            option = name.replace("_", "-")
            raise InputError(
                f"--vllm-args: --{option}: found {found!r}, expected {expected[0]!r}: one engine "
                "must compute every text from its first token to its last, and the command itself "
                "sets what the guard reads; leave the option out"
            )
    return args


@contextmanager
def _reported(doing: str = "read texts") -> Iterator[None]:
    """Turn what vLLM raises into an `EngineError`; saeguard's own errors pass."""
    try:
        yield
    except (CannotRunError, InputError, ModuleNotFoundError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise EngineError(
            f"vLLM failed to {doing}: {type(error).__name__}: {lines[0] if lines else 'no message'}"
        ) from error
