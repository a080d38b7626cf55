"""The engine that other programs import: requests in, tokens out, many sequences at once.

Requests may join, leave and be aborted between two calls of :meth:`Engine.step`, and every sequence advances by its own
acceptance. The host knows the tokens of each request, and everything on the device can be rebuilt from them. That is
why preemption, faults and interrupts lose nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

import torch

from orthrus_rt import checkpoint as ckpt
from orthrus_rt import dispatch, ops
from orthrus_rt.auto import Autos
from orthrus_rt.cycle_plan import batch_buckets, cycle_plan
from orthrus_rt.device import (
    DTYPES,
    claim,
    device_scope,
    dtype_name,
    pick_device,
    prepare_for_forks,
    scope,
    stream_of,
    with_index,
)
from orthrus_rt.exclusive import Turn, exclusive, in_turn, torn_if_cut
from orthrus_rt.fork_lock import ForkLock
from orthrus_rt.generation import Generation
from orthrus_rt.memory import memory_report
from orthrus_rt.metrics import Metrics
from orthrus_rt.model import Model
from orthrus_rt.out_of_memory import naming_the_knobs
from orthrus_rt.outbox import Outbox
from orthrus_rt.outputs import RequestOutput
from orthrus_rt.progress import progress_bar
from orthrus_rt.request import Request, TokenIds, check_prompt, on_host
from orthrus_rt.room import check_cache, check_threads, check_weights
from orthrus_rt.rope import cos_sin_table
from orthrus_rt.runner import Runner
from orthrus_rt.sampling import MAX_STOP_TOKEN_IDS, SamplingParams
from orthrus_rt.scheduler import Scheduler
from orthrus_rt.sizes import engine_sizes
from orthrus_rt.state import SlotSampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("orthrus_rt")
_loading_a_tokenizer = ForkLock(threading.RLock)  # two threads must not import transformers at once


class Engine(Generation):
    """Lossless dual-view decoding of one model on one device.

    A process may have one open engine per CUDA device, and any number on the CPU. One thread at a time may call an
    engine; calls from others raise RuntimeError (:class:`orthrus_rt.AsyncEngine` shares an engine). Ctrl-C in a call,
    at any instruction, loses no request, token or page: the next call, of any thread, continues. (Statistics may miss
    what was cut.)

    Attributes:
        config: the model's shape and conventions, a :class:`orthrus_rt.ModelConfig`.
        tokenizer: the checkpoint's transformers tokenizer, chat template included.
        device: the :class:`torch.device` that it runs on.
        max_seq_len: the most tokens that a sequence may have, prompt included.
        mode, draft_len, fan_out: defaults for calls that pass none; None is the default of checkpoint, mode and device.
        metrics: what it has done since it was made: ``as_dict()`` and ``as_prometheus()``, from any thread.
        closed: whether :meth:`close` has been called.

    >>> import orthrus_rt
    >>> engine = orthrus_rt.Engine.from_pretrained("smollm2-135m", max_seq_len=256)
    >>> prompt = engine.tokenizer("def add(a, b):").input_ids
    >>> params = orthrus_rt.SamplingParams(max_new_tokens=16)
    >>> out = engine.generate(prompt, params)
    >>> out.token_ids == engine.generate(prompt, params, mode="ar").token_ids
    True
    >>> len(out.token_ids), out.finish_reason
    (16, 'length')
    """

    def __init__(
        self, checkpoint: ckpt.Checkpoint, *, device, dtype, mode, max_seq_len, draft_len, fan_out, max_batch_size,
        num_pages, prefix_caching,
    ):  # fmt: skip
        prepare_for_forks()
        config = checkpoint.config
        sizes = engine_sizes(config, max_seq_len, max_batch_size, num_pages)
        if not isinstance(prefix_caching, bool):
            raise ValueError(f"prefix_caching must be True or False, got {prefix_caching!r}")
        self.turn, self.closed, self.torn, self.dropped = Turn(), False, False, deque()
        self.config, self.max_seq_len = config, sizes.max_seq_len
        self.checkpoint, self._tokenizer = checkpoint, None
        self.device = with_index(device)
        self.cuda_stream = stream_of(self.device)
        self.mode, self.draft_len, self.fan_out = mode, draft_len, fan_out
        self._plan = self._default_plan = self.make_plan(fan_out=fan_out)
        self.outbox, self.metrics = Outbox(), Metrics(self)
        claim(self.device, self)
        try:
            with scope(self.device, self.cuda_stream), naming_the_knobs(f"making an engine of {sizes}"):
                self.model = Model(checkpoint, device=self.device, dtype=dtype, max_seq_len=sizes.max_seq_len)
                self._autos = Autos(self.model, sizes)
                self.runner = Runner(
                    self.model, num_slots=sizes.max_batch_size, max_seq_len=sizes.max_seq_len,
                    shapes=self._autos.shapes(self._default_plan), num_pages=sizes.num_pages,
                    max_stop_ids=len(config.eos_token_ids) + MAX_STOP_TOKEN_IDS,
                )  # fmt: skip
            if prefix_caching and not dispatch.row_invariant(self.device, dtype):
                log.info("no prefix caching: keys and values of the reference depend on the rows of their pass")
                prefix_caching = False
            self.kv = self.runner.kv
            check_cache(sizes, self.kv.nbytes, self.device)
            check_threads(self.device)
            self.scheduler = Scheduler(self.kv, sizes.max_batch_size, prefix_caching)
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """Close: the device is free for another engine, and memory is freed once nothing refers to it."""
        self.closed = True
        self.model = self.runner = self.kv = self.scheduler = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "bfloat16",
        mode: str = "auto",
        max_seq_len: int | None = None,
        draft_len: int | None = None,
        fan_out: int | None = None,
        adapter: str | os.PathLike[str] | None = None,
        base_gguf: str | os.PathLike[str] | None = None,
        max_batch_size: int = 8,
        num_pages: int | None = None,
        prefix_caching: bool = True,
    ) -> Engine:
        """Load a model and make an engine for it.

        Args:
            model: ``"smollm2-135m"`` (the embedded model), a checkpoint folder, or a hub id, whose files are downloaded
                if they are not on this machine; ``owner/name@revision`` pins a branch, a tag or a commit.
                Files of a loaded model may be replaced but not written into: on a CPU its embedding stays there.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or a :class:`torch.device`; ``"auto"`` is CUDA if available,
                else the CPU.
            dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, or the torch dtype. float16 runs the plain torch
                reference; the other two have row-invariant kernels.
            mode: ``"ar"``, ``"two_pass"``, ``"one_pass"`` or ``"auto"``. ``auto`` chooses the fastest of these every
                few cycles, from measured costs and acceptance. As far as those are right, all tokens together take at
                most 1% plus eight AR cycles longer than in ``ar``.
            max_seq_len: the most tokens a sequence may have, prompt included; sizes the cache. None is 4096, or the
                checkpoint's own limit if that is less.
            draft_len: drafts per cycle, 1 ... K-1 (in mode auto the maximum; it tries 3, 5, 7, 15 and this). None is
                the checkpoint's K-1, or on a CPU, where every row costs arithmetic, 3 unless the mode is auto, or
                in one_pass as many as ``fan_out`` needs.
            fan_out: blocks that a one_pass cycle drafts, 1 ... 3 * draft_len + 1 (one per outcome). None is 6, or as
                many as fit into 160 rows together with the AR rows (4 with 31 drafts); on a CPU it is 2, and mode auto
                tries 2, 4 and 8.
            adapter: folder or hub id of a diffusion view, for a base that has none.
            base_gguf: path of the embedded model's base as a GGUF file, used instead of the installed wheel's.
            max_batch_size: the most sequences decoded at once; further requests wait.
            num_pages: pages of 64 positions in the cache; None is enough for ``max_batch_size`` sequences of
                ``max_seq_len``. With fewer, sequences wait for pages or are preempted for a while (same tokens).
            prefix_caching: whether a prompt reuses whole pages of keys and values that sequences with the same
                beginning have, or left, in the cache. They are bitwise what it would have computed itself; only the
                duration of its prefill reveals that the same beginning was seen before. No effect where an op that
                computes keys and values runs ``reference``, as in float16, which is not row-invariant.

        Raises:
            CheckpointError: the checkpoint is incomplete, unsupported or inconsistent.
            ValueError: an argument, or ``ORTHRUS_BACKEND``, is out of range, or the device does not exist.
            RuntimeError: ``ORTHRUS_BACKEND`` requests an implementation that is not available, or the CUDA device
                already has an engine.
            torch.OutOfMemoryError: there is no room for the weights or the cache; the message says what to lower, if
                that helps.
        """
        dtype = dtype_name(dtype)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        device, model = pick_device(device), str(model)
        if ckpt.is_hub_id(model):  # before gigabytes are downloaded for a model that cannot run
            config = ckpt.load_config(model, adapter=adapter, base_gguf=base_gguf)
            engine_sizes(config, max_seq_len, max_batch_size, num_pages)
            cycle_plan(mode, draft_len, fan_out, config, on_cpu=device.type == "cpu")
            cos_sin_table(config, 1)
            ops.check_head_dim(config.head_dim, device, DTYPES[dtype])
            if device.type == "cpu":
                check_weights(config, device, DTYPES[dtype])
        loaded = ckpt.load(model, adapter=adapter, base_gguf=base_gguf)
        return cls(
            loaded, device=device, dtype=DTYPES[dtype], mode=mode, max_seq_len=max_seq_len, draft_len=draft_len,
            fan_out=fan_out, max_batch_size=max_batch_size, num_pages=num_pages, prefix_caching=prefix_caching,
        )  # fmt: skip

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's transformers tokenizer, chat template included."""
        with _loading_a_tokenizer.held():
            if self._tokenizer is None:
                self._tokenizer = self.checkpoint.load_tokenizer()
            return self._tokenizer

    @exclusive
    def explain(self, batch_size: int = 1, greedy: bool = True) -> dict | None:
        """The estimates behind ``mode="auto"`` for a batch of ``batch_size`` sequences, ``greedy`` if none of them
        samples: see :meth:`Policy.explain`. None if the mode (of what runs, or else the engine's) is a fixed one.

        Raises:
            ValueError: ``batch_size`` is out of its range, or ``greedy`` is no bool.
            RuntimeError: the engine is closed, or another thread is using it.
        """
        auto = self._autos.get(self._plan_to_join())
        return auto.policy.explain(batch_size, greedy) if auto else None

    def check(
        self, prompt_ids: TokenIds, params: SamplingParams | None = None, request_id: str | None = None
    ) -> list[int]:
        """Validate the arguments of :meth:`submit` without submitting; may be called from any thread.

        Returns:
            The prompt's ids as a new list.

        Raises:
            ValueError: :meth:`submit` would refuse them; whether ``request_id`` is in use is not checked.
            RuntimeError: the engine is closed.
        """
        return self._make_request(prompt_ids, params, None, request_id).prompt

    def submit(self, prompt_ids: TokenIds, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue one prompt; :meth:`step` returns its tokens.

        Args:
            prompt_ids: a list of ints or a 1-D integer tensor or array, 1 ... max_seq_len-1 tokens.
            params: greedy by default; they may differ between the requests of a batch.
            request_id: a non-empty string of the caller's choice; None draws one.

        Returns:
            The request's id.

        Raises:
            ValueError: this engine cannot serve the prompt or the parameters, or the id is in use.
            RuntimeError: the engine is closed, or another thread is using it.
        """
        return self._queue(self._make_request(prompt_ids, params, None, request_id))

    @exclusive
    def _queue(self, request: Request) -> str:
        """:meth:`submit` for a request that has been made already."""
        self._plan = self._plan_to_join()
        self._check_acceptance(request, self._plan)  # again: the plan may have changed since the request was made
        if request.request_id in self.outbox:
            raise ValueError(f"request_id must be unused, got {request.request_id!r} twice")
        with torn_if_cut(self):
            self.outbox.add(request)
            self.scheduler.enqueue(request)
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Run one cycle of all decoding sequences together with one chunk of the prompts, and return what is new since
        the last step: at most one output per submitted request. Returns at once if there is nothing to do.

        A request that runs out of memory, or has no logit above -inf (because all are NaN, for example), keeps its
        tokens and ends with finish_reason ``"error"``; the others continue.

        Raises:
            RuntimeError: the engine is closed, or another call is using it.
            Exception: any other failure; a note names the requests that it may be due to. Nothing is lost, and the next
                step tries again. After a second failure these requests' prompts have a pass each, so that the note on
                the third usually names one: abort it. If steps fail even so, as on a lost device, close the engine.
        """
        self.turn.hold(sys._getframe())
        try:
            with self._charging():
                in_turn(self, Engine._advance_and_collect)
            try:
                return self.outbox.outputs
            finally:  # emptied only on the return: outputs held back by an interrupt are returned by the next step
                self.outbox.outputs = []
        finally:
            self.turn.holder = {}

    def _advance_and_collect(self) -> None:
        self._advance()
        self.outbox.collect()

    def abort(self, request_id: str) -> None:
        """End a request now; :meth:`step` returns its last output, with finish_reason ``"abort"``.

        A request that has ended or never existed is ignored, and so is any once the engine is closed, as an abort may
        be a moment late. :meth:`is_unfinished` says whether a request is still there.

        Raises:
            RuntimeError: another call is using the engine.
        """
        try:
            if not self.closed:
                self._abort_named(request_id)
        except RuntimeError:
            if not self.closed:  # else another thread has closed it meanwhile
                raise

    @exclusive
    def _abort_named(self, request_id: str, error: Exception | None = None) -> None:
        """Abort the request, or end it with ``error``."""
        if request := self.outbox.get(request_id):
            with torn_if_cut(self):
                if error is None:
                    self._abort(request)
                elif request.finish_reason is None:
                    self._fail(request, error)

    def has_unfinished(self) -> bool:
        """Whether :meth:`step` has anything to run or to return."""
        return not self.closed and (bool(self.outbox) or not self._idle())

    def is_unfinished(self, request_id: str) -> bool:
        """Whether :meth:`step` has yet to return the last output of a submitted request."""
        return not self.closed and request_id in self.outbox

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Abort all requests and release weights, cache and graphs. The device can then take another engine. This one
        refuses further calls; :meth:`abort` does nothing, and nothing is unfinished. Closing twice is harmless.

        Outputs that :meth:`step` has not returned by then, last ones included, are lost. To let requests finish first,
        as a server does at SIGTERM, submit no more and step while :meth:`has_unfinished`. To cut them short, abort them
        and step once. An :class:`orthrus_rt.AsyncEngine` has ``close(drain=True)``.
        """
        with self.turn:
            if self.closed:
                return
            try:
                for request in self.scheduler.unfinished:
                    self.metrics.finished["abort"] += 1
                    request.finish_reason = "abort"
                with device_scope(self.device):
                    self.runner.drop_cycles()
            except Exception:
                self.runner.flights.abandon()
                raise
            finally:  # a device that has failed must not keep the engine open
                self._let_go()

    @exclusive
    def warmup(self, progress: bool = False, *, sampling: bool = False) -> None:
        """Build the greedy cycles of every batch bucket for the engine's own mode and record them if the device can; on
        CUDA also the prefill passes of a single prompt. Cycles with prompts are recorded when their shapes recur. A
        recording lasts until a call asks for cycles with more rows, or until 256 others have been used since.

        In mode ``auto`` this also times them: at length the first time for this device, number of threads, model and
        version, later once each.

        Args:
            progress: show a progress bar.
            sampling: do the same for requests that sample without penalties, ``logit_bias``, ``min_tokens`` or
                ``acceptance="rejection"``, and allocate the memory for their logits (see :meth:`memory_report`).
                Otherwise the first such request allocates it, if it is still free then.

        Raises:
            RuntimeError: a request is running, the engine is closed, or another thread is using it.
            torch.OutOfMemoryError: there is no room for the cycles or the logits; the message says what to lower.
        """
        if any(self.scheduler.slots):
            raise RuntimeError("warmup: no request may be running")
        self.runner.warm_up_prefills()
        if auto := self._autos.get(self._default_plan):
            shapes = auto.warmup(self, progress)
        else:
            shapes = [(self._default_plan, size) for size in batch_buckets(self.scheduler.num_slots)]
            self._record(shapes, progress, "warm-up")
        if sampling:
            self.runner.make_room_for_logits()
            self.runner.warm_up_prefills(scored=True)
            self._record(shapes, progress, "warm-up, sampling", self.runner.plain_sampling)

    def _record(self, shapes, progress: bool, desc: str, sampling: SlotSampling | None = None) -> None:
        """Build and record the cycles of these pairs ``(plan, slots)``."""
        with progress_bar(progress, total=len(shapes), desc=desc, unit="cycle") as bar:
            for plan, slots in shapes:
                self.runner.cycle(plan, slots, sampling).warm_up()
                bar.update()

    @exclusive
    def memory_report(self) -> dict[str, int]:
        """Bytes by use: see :func:`orthrus_rt.memory.memory_report`.

        Raises:
            RuntimeError: the engine is closed, or another thread is using it.
        """
        return memory_report(self)

    def next_logits(self, token_ids: TokenIds) -> torch.Tensor:
        """The AR logits of the token after ``token_ids``, at most ``max_seq_len`` ids: fp32 ``[vocab_size]`` on the
        engine's device.

        Raises:
            ValueError: ``token_ids`` is empty, too long, or has ids outside the vocabulary.
            RuntimeError: a request is running, the engine is closed, or another thread is using it.
        """
        return self.next_logits_and_hidden(token_ids)[0]

    def next_logits_and_hidden(self, token_ids: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`next_logits`, and the final normalised row, ``[hidden_size]`` of the model's dtype, behind them."""
        self._check_open()
        rows = self._next_logits(on_host(token_ids))
        if self.cuda_stream is not None:
            for row in rows:  # their memory is not reused before what the caller launches here has read it
                row.record_stream(stream_of(self.device))
        return rows

    @exclusive
    def _next_logits(self, token_ids: TokenIds) -> tuple[torch.Tensor, torch.Tensor]:
        if any(self.scheduler.slots):
            raise RuntimeError("next_logits: no request may be running")
        ids = check_prompt(token_ids, self.config.vocab_size, sys.maxsize, "token_ids")
        if len(ids) > self.max_seq_len:
            raise ValueError(f"token_ids must hold at most max_seq_len ({self.max_seq_len}) tokens, got {len(ids)}")
        with torn_if_cut(self):
            rows = self.runner.next_logits(ids)
            with torch.inference_mode(False):
                logits, hidden = (row.clone() for row in rows)  # the caller may change or differentiate through them
        if self.cuda_stream is not None:
            self.cuda_stream.synchronize()  # the caller may read them on another stream
        return logits, hidden
